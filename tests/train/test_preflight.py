"""What is wrong with a call to `train` is said before torch is loaded."""
import subprocess
import sys

import pytest

CODE = """
import sys
from jetson_det.cli import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules, "torch was loaded first"
sys.exit(code)
"""

def refused(*words):
    done = subprocess.run([sys.executable, "-c", CODE, "train", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("words, message", [
    (["model.name=yolox-nan"], "did you mean 'yolox-nano'"),
    (["--data", "nowhere"], "nowhere: no such file or folder"),
    (["data.input_size=[100,64]"], "multiples of 32"),
    (["--resume"], "say which run"),
    (["--out", "nowhere", "--resume"], "no run to resume"),
    (["train.on_nan=rollback", "--gpus", "2"], "in one process"),
])
def test_a_wrong_call_is_refused_without_torch(words, message): assert message in refused(*words)


def test_a_wrong_folder_is_refused_without_torch(tmp_path):
    (tmp_path/"thesis.txt").write_text("mine")
    assert "is not empty (thesis.txt)" in refused("--out", tmp_path)
    assert "not the folder of a run" in refused("--out", tmp_path, "--resume")
    assert "is a file" in refused("--out", tmp_path/"thesis.txt")
    (tmp_path/"run").mkdir()
    (tmp_path/"run"/"config.yaml").write_text("train:\n  epochs: 3\n")
    assert "no checkpoint to resume from" in refused("--out", tmp_path/"run", "--resume")
