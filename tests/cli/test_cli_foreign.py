"""A file from elsewhere on the command line: its names, its size, its preset, and how many boxes are drawn."""
import json

import cv2
import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
import onnx_files as files
from jetson_det.cli import main
from jetson_det.runtime.contract import GRAPH_KEY, METADATA_KEY, Contract
from jetson_det.runtime.files import sha256_bytes
from jetson_det.runtime.metadata import graph_bytes

EIGHT = {"output0": np.ascontiguousarray(files.dense(2, False).T)[None]}
OPEN = dict(shape=("batch", 3, "height", "width"), shapes={"output0": ["batch", 6, "anchors"]})


def run(capsys, *words):
    "Exit code, standard output and standard error of one verb."
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "im.png"
    cv2.imwrite(str(path), np.full(files.SIZE + (3,), 114, np.uint8))
    return path


def boxes_of(out):
    "The frames in a prediction's JSON."
    return json.loads((out / "predictions.json").read_text())["frames"]


def test_names_and_size_from_the_command_line(tmp_path, image, capsys):
    model = files.write_graph(tmp_path / "m.onnx", EIGHT, **OPEN)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    code, _, err = run(capsys, "predict", model, image, "--contract", "yolov8", "--classes", "cat,dog", "--out",
                       tmp_path / "p")
    assert code == 2 and "--size HEIGHTxWIDTH" in err and err.count("\n") == 1 and not (tmp_path / "p").exists()
    for names in ("cat,dog", tmp_path / "names.txt"):
        code, _, err = run(capsys, "predict", model, image, "--contract", "yolov8", "--classes", names, "--size", "320",
                           "--out", tmp_path / "p")
        assert code == 0 and "device: cpu" in err, err
        row, = boxes_of(tmp_path / "p")
        assert [d["name"] for d in row["detections"]] == ["dog", "cat"]
        np.testing.assert_allclose([d["box"] for d in row["detections"]], files.BOXES, atol=.02)
    code, _, err = run(capsys, "predict", model, image, "--contract", "yolov8", "--size", "320", "--out",
                       tmp_path / "q")
    assert code == 2 and "holds 4 + 2 rows: 2 classes" in err and "--classes a,b,c" in err and err.count("\n") == 1


def test_the_metadata_is_enough(tmp_path, image, capsys):
    metadata = {
        "author": "Ultralytics", "task": "detect", "stride": "32", "imgsz": "[320, 320]", "names": "['cat', 'dog']"
    }
    model = files.write_graph(tmp_path / "m.onnx", EIGHT, metadata, **OPEN)
    code, _, err = run(capsys, "predict", model, image, "--out", tmp_path / "p")
    assert code == 0 and "read as --contract ultralytics" in err and err.count("note:") == 1
    assert len(boxes_of(tmp_path / "p")[0]["detections"]) == 2
    code, out, err = run(capsys, "bench", model, "--source", image, "--repeats", "1")
    assert code == 0 and "320x320" in out


def test_a_cap_is_said_and_written(tmp_path, image, capsys):
    x, y = np.meshgrid(np.arange(15) * 20, np.arange(15) * 20)
    corners = np.stack([x.ravel(), y.ravel()], 1).astype(np.float32)
    outputs = dict(boxes=np.concatenate([corners, corners + 16], 1)[None],
                   scores=np.linspace(.9, .5, 225, dtype=np.float32)[None, :, None])
    contract = Contract("x", "many", ("pig",), files.SIZE, "boxes_scores")
    model = files.write_graph(tmp_path / "m.onnx", outputs, {METADATA_KEY: contract.to_json()})
    code, out, _ = run(capsys, "predict", model, image, "--out", tmp_path / "all")
    assert code == 0 and len(boxes_of(tmp_path / "all")[0]["detections"]) == 225 and "left out" not in out
    for words in ([], ["--tiles", "320"]):
        code, out, _ = run(capsys, "predict", model, image, "--max-detections", "100", "--out", tmp_path / "few",
                           *words)
        row, = boxes_of(tmp_path / "few")
        assert code == 0 and len(row["detections"]) == 100 and row["cut"] == 125
        assert "max_detections in 1 frame: im.png (125 left out)" in out
    assert json.loads((tmp_path / "few" / "predictions.json").read_text())["max_detections"] == 100
    code, _, err = run(capsys, "predict", model, image, "--max-detections", "0", "--out", tmp_path / "none")
    assert code == 2 and "max-detections" in err


@pytest.mark.parametrize("damage", ["empty", "text", "half", "scrambled"])
def test_a_damaged_file_is_one_line_for_every_verb(tmp_path, image, capsys, damage):
    model = tmp_path / "m.onnx"
    whole = files.write_graph(model, EIGHT).read_bytes()
    if damage == "scrambled":
        rows = EIGHT["output0"]
        files.write_graph(model, {"output0": np.ascontiguousarray(rows.transpose(0, 2, 1)).reshape(rows.shape)})
    else: model.write_bytes({"empty": b"", "text": b"no model", "half": whole[:len(whole) // 2]}[damage])
    (tmp_path / "data").mkdir()
    cv2.imwrite(str(tmp_path / "data" / "im.png"), np.full(files.SIZE + (3,), 114, np.uint8))
    (tmp_path / "data" / "im.txt").write_text("0 .5 .5 .2 .2\n")
    (tmp_path / "data" / "classes.txt").write_text("cat\ndog\n")
    options = ["--contract", "yolov8", "--classes", "cat,dog"]
    for words in (["predict", model, image, "--out", tmp_path / "p"], ["bench", model, "--source", image],
                  ["evaluate", model, "--data", tmp_path / "data"]):
        code, _, err = run(capsys, *words, *options)
        lines = [line for line in err.splitlines() if not line.startswith(("device:", "note:"))]
        assert code == 2 and len(lines) == 1 and "m.onnx" in lines[0] and "Traceback" not in err, err


def contract_file(tmp_path, names, **metadata):
    "A file of our own that finds two boxes."
    boxes, scores = files.cxcywh(files.BOXES), files.probabilities(2)
    half = boxes[:, 2:] / 2
    corners = np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], 1).astype(np.float32)
    outputs = dict(boxes=corners[None], scores=scores[None].astype(np.float32))
    contract = Contract("x", "two", names, files.SIZE, "boxes_scores")
    return files.write_graph(tmp_path / "own.onnx", outputs, {METADATA_KEY: contract.to_json(), **metadata})


def test_own_names_are_not_replaced(tmp_path, image, capsys):
    "Neither those of a contract nor those of an exporter, by whichever verb; placeholders are."
    theirs = files.write_graph(tmp_path / "m.onnx", EIGHT, {"author": "Ultralytics", "names": "['cat', 'dog']"})
    own = contract_file(tmp_path, ("cat", "dog"))
    for model in (theirs, own):
        for words in (["predict", model, image, "--out", tmp_path / "p"], ["bench", model, "--source", image],
                      ["evaluate", model, "--data", tmp_path]):
            if words[0] == "evaluate": (tmp_path / "im.txt").write_text("0 .5 .5 .2 .2\n")
            if words[0] == "evaluate": (tmp_path / "classes.txt").write_text("cat\ndog\n")
            code, _, err = run(capsys, *words, "--classes", "dog,cat")
            lines = [line for line in err.splitlines() if not line.startswith(("device:", "note:"))]
            assert code == 2 and len(lines) == 1 and not (tmp_path / "p").exists(), err
            assert "its own classes (cat, dog)" in err and "(dog, cat)" in err and "--map" in err
        assert run(capsys, "predict", model, image, "--classes", "cat,dog", "--out", tmp_path / "q")[0] == 0
    unnamed = contract_file(tmp_path, ("class_0", "class_1"))
    code, _, err = run(capsys, "predict", unnamed, image, "--classes", "dog,cat", "--out", tmp_path / "q")
    assert code == 0 and "are called dog, cat" in err
    assert json.loads((tmp_path / "q" / "predictions.json").read_text())["classes"] == ["dog", "cat"]


def test_an_altered_file_is_said_and_run(tmp_path, image, capsys):
    model = contract_file(tmp_path, ("cat", "dog"), **{GRAPH_KEY: "0" * 64})
    code, _, err = run(capsys, "predict", model, image, "--out", tmp_path / "q")
    assert code == 0 and err.count("warning: ") == 1 and "own.onnx: altered since its export" in err
    code, _, err = run(capsys, "verify", model)
    assert code == 1 and "warning" not in err
    digits = sha256_bytes(graph_bytes(model.read_bytes()))
    model = contract_file(tmp_path, ("cat", "dog"), **{GRAPH_KEY: digits})
    assert "warning" not in run(capsys, "predict", model, image, "--out", tmp_path / "q")[2]


def test_names_do_not_reach_the_terminal_as_commands(tmp_path, image, capsys):
    metadata = {"author": "Ultralytics", "stride": "32", "names": "['cat\\x1b[2J', 'dog\\n\\u202e']"}
    model = files.write_graph(tmp_path / "m.onnx", EIGHT, metadata)
    for words in (["predict", model, image, "--classes", "a,b", "--out", tmp_path / "p"],
                  ["predict", model, image, "--classes", "a", "--out", tmp_path / "p"]):
        code, out, err = run(capsys, *words)
        assert "\x1b" not in out + err and "\u202e" not in out + err
    assert "cat\\x1b[2J" in run(capsys, "predict", model, image, "--classes", "a,b", "--out", tmp_path / "p")[2]


def test_the_device_is_chosen_and_said_once(tmp_path, image, capsys):
    model = files.write_graph(tmp_path / "m.onnx", EIGHT, {"author": "Ultralytics", "names": "['a', 'b']"})
    for words, count in (([], 1), (["--device", "cpu"], 0)):
        code, _, err = run(capsys, "predict", model, image, "--out", tmp_path / "p", *words)
        assert code == 0 and err.count("device: cpu") == count
    code, _, err = run(capsys, "predict", model, image, "--device", "tpu", "--out", tmp_path / "p")
    assert code == 2 and "auto, cpu, cuda or cuda:N" in err
    code, _, err = run(capsys, "predict", model, image, "--device", "cuda", "--out", tmp_path / "p")
    assert code == 2 and "CUDAExecutionProvider is not installed" in err
