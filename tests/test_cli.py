"""The command line as a user calls it: exit codes, one line for a mistake, nothing heavy before it is needed."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from jetson_det.cli import main


def run(*words, cwd=None):
    "The verb in a process of its own."
    return subprocess.run([sys.executable, "-c", "import sys; from jetson_det.cli import main; sys.exit(main())", *map(str, words)],
                          capture_output=True, text=True, cwd=cwd, timeout=280)


def one_line(result, *parts):
    "Exit code 2, one line on standard error, no traceback, and the parts in it."
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    lines = [l for l in result.stderr.splitlines() if l.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    for p in parts: assert p in lines[0], (p, lines[0])


def test_help_imports_nothing_heavy():
    code = ("import sys; from jetson_det.cli import main; main(['--help']); "
            "heavy = {'torch', 'numpy', 'cv2', 'onnx', 'onnxruntime', 'pydantic', 'matplotlib', 'yaml', 'transformers'} & set(sys.modules); "
            "sys.exit(str(heavy) if heavy else 0)")
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


def test_doctor_json(tmp_path):
    r = run("doctor", "--json", tmp_path / "sub" / "d.json")
    assert r.returncode == 0, r.stderr
    assert json.loads((tmp_path / "sub" / "d.json").read_text())["jetson_det"]


@pytest.mark.parametrize("words, parts", [
    (["docter"], ["doctor"]),
    (["train", "trian.epochs=3"], ["unknown key 'trian'", "train"]),
    (["train", "train.epoch=3"], ["train.epoch", "epochs"]),
    (["train", "data.input_size=[400,416]"], ["multiples of 32"]),
    (["train", "-c", "no_such_recipe"], ["no_such_recipe"]),
    (["train", "--data", "no/such/folder"], ["no/such/folder"]),
    (["evaluate", "no.onnx", "--data", "."], ["."]),
    (["predict", "no_such.onnx", "."], ["no_such.onnx"]),
    (["bench", "no_such.onnx"], ["no_such.onnx"]),
    (["export", "no_such_folder"], ["no_such_folder"]),
    (["data", "check", "no/such"], ["no/such"]),
    (["data", "convert", ".", "x", "--to", "kitti"], []),
    (["job", "trian"], ["train"]),
    (["job", "train", "-p", "epoks", "3"], ["epochs"]),
])
def test_a_mistake_is_one_line(words, parts, tmp_path):
    one_line(run(*words, cwd=tmp_path), *parts)
    assert not list(tmp_path.iterdir()), "something was written"
