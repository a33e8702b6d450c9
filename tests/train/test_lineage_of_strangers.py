"""An ONNX file's record of its origin: shown, and nothing that it names is opened."""
import os

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx writes the files of these tests")
import onnx_files as files
from jetson_det.cli import main
from jetson_det.core import InputError
from jetson_det.models.checkpoint import save_checkpoint
from jetson_det.runtime.contract import METADATA_KEY, Contract
from jetson_det.train.lineage import lineage, lineage_text, origin_of


def write(path, origin, **facts):
    extra = {"origin": origin}
    contract = Contract("yolox", "yolox-nano", ("a", "b"), files.SIZE, "boxes_scores", extra=extra, **facts)
    outputs = dict(boxes=np.zeros((1, 2, 4), np.float32), scores=np.zeros((1, 2, 2), np.float32))
    return files.write_graph(path, outputs, {METADATA_KEY: contract.to_json()})


def test_no_path_in_it_is_opened(tmp_path, monkeypatch):
    os.mkfifo(str(tmp_path / "pipe"))
    entry = dict(path=str(tmp_path / "pipe"), sha256="0" * 64, name="official\x1b[2J",
                 origin=dict(path="/dev/zero", sha256=None, name="zero", origin=None))
    chain = lineage(write(tmp_path / "m.onnx", entry)) # would wait for ever, or read for ever
    assert [e["found"] for e in chain] == ["as it was", "not looked up", "not looked up"]
    text = lineage_text(chain)
    assert text.endswith("begun with random weights") and "\x1b" not in text and "official\\x1b[2J" in text
    gone = dict(entry, path=str(tmp_path / "gone"), origin=None)
    assert lineage(write(tmp_path / "m.onnx", gone))[1]["found"] == "gone"
    long = dict(entry, path="x" * 100000, origin=None)
    assert lineage(write(tmp_path / "m.onnx", long))[1]["found"] == "gone"


def test_the_checkpoint_of_an_export_is_in_the_chain(tmp_path):
    "By its digest, and with its path where it lies beside the file."
    torch = pytest.importorskip("torch")
    path = tmp_path / "run-a"
    state = {"epoch": 2, "step": 20}
    contract = Contract("yolox", "yolox-nano", ("a", "b"), files.SIZE, "boxes_scores", extra={"origin": None})
    save_checkpoint(path, {"w": torch.tensor([1])}, None, None, state, contract)
    digest = origin_of(path)["sha256"]
    lost = f"not in {tmp_path/'other'}, where it is looked for"
    for name, found, where in (("run-a", "as it was", str(path)), ("other", lost, "a checkpoint")):
        file = write(tmp_path / (name + ".onnx"), None, made_from=digest)
        chain = lineage(file)
        assert [(e["path"], e["sha256"]) for e in chain[1:]] == [(where, digest)] and chain[1]["found"] == found
        assert [e["begins"] for e in chain] == ["", "with random weights"]
        assert "made from " + where in lineage_text(chain)
    nested = dict(path="start.onnx", sha256=None, name="x", made_from="1" * 64)
    chain = lineage(write(tmp_path / "run-a.onnx", nested, made_from="0" * 64))
    assert [e["path"] for e in chain[1:]] == ["a checkpoint", "start.onnx", "a checkpoint"]
    assert chain[3]["sha256"] == "1" * 64 and chain[3]["begins"] == "unknown"


@pytest.mark.parametrize("origin", [7, "text", [1], {"path": 3, "sha256": None}, {"path": "a"}, {"sha256": "a"},
                                    {"path": "a", "sha256": None, "made_from": 5}, {"path": "a", "sha256": 5},
                                    {"path": "a", "sha256": None, "step": "x"},
                                    {"path": "a", "sha256": None, "origin": 4}])
def test_a_damaged_record_is_one_line(tmp_path, origin):
    with pytest.raises(InputError) as e: lineage(write(tmp_path / "m.onnx", origin))
    assert "m.onnx" in str(e.value) and "damaged" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["a\x1b[31m", "a\u202eb", "a\nb", "a\x9b2J"])
def test_names_of_strangers_are_escaped(tmp_path, capsys, name):
    "In the record, and of the files that are named."
    (tmp_path / name).mkdir()
    path = write(tmp_path / name / "m.onnx", dict(path=name, sha256=None, name=name, origin=None))
    (tmp_path / name / "torn.onnx").write_bytes(b"x")
    (tmp_path / name / "a.txt").write_bytes(b"x")
    for verb in ("lineage", "verify"):
        for file in (path, tmp_path / name / "torn.onnx", tmp_path / name / "a.txt", tmp_path / name, tmp_path / "no"):
            assert main([verb, str(file)]) in (0, 1, 2)
    said = capsys.readouterr()
    for line in (said.out + said.err).split("\n"): assert line.isprintable(), line
    with pytest.raises(InputError) as e: lineage(write(path, dict(path=name, sha256=7)))
    assert str(e.value).isprintable()
