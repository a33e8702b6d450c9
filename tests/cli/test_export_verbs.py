"""`lint`, `parity` and `export --board`, as a user calls them."""
import json

import pytest
from command_helpers import run_command
from exported import network
from train_helpers import scenes

from jetson_det.export.onnx import export_onnx


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Two files of one network, one of another, and labeled images."
    folder = tmp_path_factory.mktemp("verbs")
    model = network("yolox-nano")
    export_onnx(model, folder/"a.onnx", (96, 160))
    export_onnx(model, folder/"b.onnx", (96, 160), opset=17)
    export_onnx(network("yolox-nano", seed=2), folder/"other.onnx", (96, 160))
    scenes(folder/"dock")
    return folder


def test_a_clean_file(folder):
    done = run_command("lint", "a.onnx", "--board", "Jetson Nano", "--json", "lint.json", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "clean for nano (TensorRT 8.2), fp16" in done.stdout
    record = json.loads((folder/"lint.json").read_text())
    assert record["ok"] and record["versions"] == ["8.2"]


def test_findings_end_with_1(folder):
    done = run_command("lint", "b.onnx", "--tensorrt", "8.2", "--precision", "int8", "--board", "nano", cwd=folder)
    assert done.returncode == 1 and "error: " in done.stdout and done.stderr == ""


@pytest.mark.parametrize("words, message", [
    (["a.onnx"], "lint needs a board (--board nano) or a version (--tensorrt 10.3)"),
    (["a.onnx", "--board", "orin-nan"], "did you mean 'orin-nano'"),
    (["a.onnx", "--tensorrt", "7"], "7"),
    (["a.onnx", "--board", "nano", "--precision", "fp61"], "fp61"),
    (["none.onnx", "--board", "nano"], "none.onnx"),
    (["dock", "--board", "nano"], "dock"),
    (["text.onnx", "--board", "nano"], "text.onnx"),
    (["a.onnx", "--board", "nano", "--cut-nms", "cut.onnx"], "a.onnx"),
    (["a.onnx", "--board", "nano", "--json", "a.onnx"], "a.onnx"),
])
def test_what_lint_cannot_take_is_one_line(folder, words, message):
    (folder/"text.onnx").write_text("not a model")
    before = (folder/"a.onnx").read_bytes()
    done = run_command("lint", *words, cwd=folder)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (folder/"a.onnx").read_bytes() == before and not (folder/"cut.onnx").exists()


def test_the_same_network_finds_the_same(folder):
    done = run_command("parity", "a.onnx", "b.onnx", "--data", "dock", "--images", 4, "--json", "p.json", cwd=folder)
    assert done.returncode == 0 and "parity holds" in done.stdout
    assert json.loads((folder/"p.json").read_text())["ok"]


def test_another_network_does_not(folder):
    done = run_command("parity", "a.onnx", "other.onnx", "--data", "dock", "--images", 4, cwd=folder)
    assert done.returncode == 1 and "parity holds" not in done.stdout


def test_a_checkpoint_that_is_not_there(folder):
    done = run_command("export", "nowhere", "--board", "nano", cwd=folder)
    assert done.returncode == 2 and "nowhere" in done.stderr
