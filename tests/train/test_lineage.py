"""Which weights a detector was made from."""
import hashlib
import os
import shutil
from pathlib import Path

import pytest
from train_helpers import config, scenes

from jetson_det.core import InputError
from jetson_det.models.checkpoint import newest_whole
from jetson_det.train import loop, resume
from jetson_det.train.lineage import lineage, lineage_text, origin_of
from jetson_det.train.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data")/"dock")


def trained_from(monkeypatch, data, out, source):
    "A run that begins with weights, whose contract says so."
    usual = resume.contract_of
    def contract_of(trainer):
        contract = usual(trainer)
        return contract._replace(extra={**contract.extra, "origin": origin_of(source)})
    with monkeypatch.context() as m:
        for module in (loop, resume): m.setattr(module, "contract_of", contract_of)
        train(config(data, "train.epochs=1", *([f"model.weights={source}"] if source else [])), out)
    return out


def test_every_checkpoint_knows_where_it_came_from(tmp_path, data, monkeypatch):
    first = trained_from(monkeypatch, data, tmp_path/"first", None)
    second = trained_from(monkeypatch, data, tmp_path/"second", first/"best")
    chain = lineage(second)
    assert [Path(e["path"]) for e in chain] == [second/"best", first/"best"] and [e["found"]
                                                                                  for e in chain] == ["as it was"]*2
    assert chain[1]["sha256"] == hashlib.sha256(
        (first/"best"/"ema.safetensors").read_bytes()).hexdigest() and chain[1]["step"] == 3
    assert chain[1]["begins"] == "with random weights" and lineage(newest_whole(second))[1] == chain[1]
    text = lineage_text(chain)
    assert text.count("\n") == 2 and "made from" in text and text.endswith("begun with random weights")
    far = shutil.copytree(second/"best", tmp_path/"far")
    from jetson_det.export.onnx import export_onnx
    export_onnx(far, tmp_path/"a.onnx", simplify=False)
    shutil.rmtree(first)
    lost = f"not in {tmp_path/'a'}, where it is looked for"
    for artifact, between in ((far, []), (tmp_path/"a.onnx", [("yolox-nano", lost)])):
        chain = lineage(artifact)
        found = [(e["name"], e["found"]) for e in chain]
        assert found == [("yolox-nano", "as it was"), *between, ("yolox-nano", "gone")]
    assert chain[1]["sha256"] == origin_of(far)["sha256"]


def test_files_from_elsewhere_have_a_lineage_too(tmp_path):
    (tmp_path/"a.pth").write_bytes(b"weights")
    assert origin_of(tmp_path/"a.pth") == dict(path=str(tmp_path/"a.pth"),
                                               sha256=hashlib.sha256(b"weights").hexdigest(),
                                               name="a.pth")
    assert origin_of(None) is None and origin_of("hub/name")["sha256"] is None
    assert "nothing is recorded" in lineage_text(lineage(tmp_path/"a.pth"))
    with pytest.raises(InputError, match="no such file or folder"): lineage(tmp_path/"b.pth")
    (tmp_path/"b.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError, match="not an ONNX file, or torn"): lineage(tmp_path/"b.onnx")


def test_a_copy_from_the_hub_has_the_name_of_its_repository(tmp_path):
    folder = tmp_path/"models--somebody--detector"/"snapshots"/"0123abcd"
    folder.mkdir(parents=True)
    (folder/"config.json").write_text("{}")
    (folder/"model.safetensors").write_bytes(b"weights")
    found = origin_of(folder, "somebody/detector")
    assert (found["name"], found["copy_of"], found["path"]) == ("detector", "somebody/detector", str(folder))
    assert found["sha256"] == hashlib.sha256(b"weights").hexdigest()


def test_the_chain_of_real_trainings(tmp_path, data):
    train(config(data, "train.epochs=1"), tmp_path/"a")
    train(config(data, "train.epochs=1", f"model.weights={tmp_path/'a'}"), tmp_path/"b")
    shutil.rmtree(tmp_path/"b"/"last")
    train(config(data, "train.epochs=1", f"model.weights={tmp_path/'a'}"), tmp_path/"b", resume=True)
    assert [(e["found"], e["begins"]) for e in lineage(tmp_path/"b"/"last")] == [("as it was", ""),
                                                                                 ("as it was", "with random weights")]


def test_a_pipe_or_a_device_has_no_lineage(tmp_path):
    os.mkfifo(tmp_path/"weights.pth")
    for path in (tmp_path/"weights.pth", "/dev/zero"):
        with pytest.raises(OSError, match="not a regular file"): lineage(path)
