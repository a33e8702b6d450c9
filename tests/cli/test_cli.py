"""The command line as a user calls it: exit codes, one line for a mistake, nothing heavy before it is needed."""
import json
import subprocess
import sys

import pytest
from command_helpers import run_command as run


def one_line(result, *parts):
    "Exit code 2, one line on standard error, no traceback, and the parts in it."
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    lines = [l for l in result.stderr.splitlines() if l.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    for p in parts: assert p in lines[0], (p, lines[0])


def test_help_imports_nothing_heavy():
    code = """import sys
from jetson_det.cli import main
main(["--help"])
heavy = {"torch", "numpy", "cv2", "onnx", "onnxruntime", "pydantic", "matplotlib", "yaml", "transformers"}
heavy &= set(sys.modules)
sys.exit(str(heavy) if heavy else 0)"""
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


def scenes(folder, count=24):
    "A small dataset of generated scenes."
    from jetson_det.scenes.docks import write_scenes
    return write_scenes(folder, count=count, size=(96, 160))


SMALL = ["data.input_size=[64,96]", "data.workers=0", "train.batch_size=8", "train.threads=1", "augment.multiscale=0",
         "model.weights=none"]


def test_the_whole_way(tmp_path):
    "Labels in, a measured ONNX out, by the verbs alone."
    data = scenes(tmp_path / "dock")
    out = tmp_path / "run"
    r = run("train", "--data", data, "--out", out, "train.epochs=1", *SMALL)
    assert r.returncode == 0, r.stderr
    one_line(run("train", "--data", data, "--out", out, *SMALL), "run", "--resume")
    r = run("export", out / "best", "--out", tmp_path / "m.onnx")
    assert r.returncode == 0, r.stderr
    figures = []
    for artifact in (out / "best", tmp_path / "m.onnx"):
        r = run("evaluate", artifact, "--data", data, "--json", tmp_path / "e.json")
        assert r.returncode == 0, r.stderr
        figures.append(json.loads((tmp_path / "e.json").read_text())["stats"])
    assert figures[0]["AP"] == pytest.approx(figures[1]["AP"], abs=1e-3)
    r = run("predict", tmp_path / "m.onnx", data / "images" / "test", "--out", tmp_path / "p", "--confidence", "0.001")
    assert r.returncode == 0 and (tmp_path / "p" / "predictions.json").exists(), r.stderr
    r = run("bench", tmp_path / "m.onnx", "--repeats", "2", "--frames", "2", "--json", tmp_path / "b.json")
    assert r.returncode == 0, r.stderr
    assert json.loads((tmp_path / "b.json").read_text())["stages"]["total"]["p95"] > 0


def test_data_verbs(tmp_path):
    data = scenes(tmp_path / "dock", 10)
    r = run("data", "check", data, "--json", tmp_path / "c.json")
    assert r.returncode == 0, r.stdout + r.stderr
    assert run("data", "stats", data, "--size", "256x448").returncode == 0
    for to in ("yolo", "voc", "coco"):
        r = run("data", "convert", data, tmp_path / to, "--to", to)
        assert r.returncode == 0, r.stderr
        assert run("data", "check", tmp_path / to).returncode == 0
    one_line(run("data", "convert", data, tmp_path / "voc", "--to", "voc"), "voc")
