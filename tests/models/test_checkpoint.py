"""Checkpoints: what goes in comes out bit for bit, and no fault leaves half a checkpoint or goes unseen."""
import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnx_files
import pytest
import torch
from torch import nn

import jetson_det.models.checkpoint as checkpoint
from jetson_det.cli import main
from jetson_det.runtime.contract import GRAPH_KEY, METADATA_KEY, Contract
from jetson_det.runtime.files import InputError, sha256_bytes
from jetson_det.models.checkpoint import (MANIFEST, checkpoint_of, checkpoint_path, list_checkpoints, load_checkpoint,
                                          newest_whole, pack, prune_checkpoints, publish_checkpoint, save_checkpoint,
                                          unpack, verify, verify_checkpoint)

CONTRACT = Contract(family="yolox",
                    name="yolox-nano",
                    classes=("Sack", "Person"),
                    input_size=(64, 96),
                    output="boxes_scores")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4,
                                                                          1)).to(memory_format=torch.channels_last)


def stepped(model, make=lambda p: torch.optim.SGD(p, lr=.1 / 3, momentum=.9, nesterov=True)):
    optimizer = make(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    return optimizer


def save(path, seed=0, step=1):
    model = network(seed)
    return save_checkpoint(path, model, network(seed + 1), stepped(model), {"step": step, "rng": torch.get_rng_state()},
                           CONTRACT)


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=.1 / 3, momentum=.9),
    lambda p: torch.optim.AdamW(p, lr=1e-3 / 7, amsgrad=True),
])
def test_everything_comes_back_bit_for_bit(tmp_path, make):
    model = network()
    ema = network(1)
    optimizer = stepped(model, make)
    state = {
        "epoch": 3, "best": None, "text": "Säcke", "third": 1/3, "tiny": 5e-324, "rng": torch.get_rng_state(),
        "nested": [{"t": torch.arange(3), "u": (1, 2.5)}]
    }
    ckpt = load_checkpoint(save_checkpoint(tmp_path/"c", model, ema, optimizer, state, CONTRACT))
    for mine, loaded in ((model, ckpt.weights), (ema, ckpt.ema)):
        assert {k: v.dtype for k, v in mine.state_dict().items()} == {k: v.dtype for k, v in loaded.items()}
        assert all(torch.equal(v, loaded[k]) for k, v in mine.state_dict().items())
    assert ckpt.contract == CONTRACT and ckpt.state["text"] == "Säcke"
    assert ckpt.state["third"] == 1/3 and ckpt.state["tiny"] == 5e-324
    assert torch.equal(ckpt.state["rng"], state["rng"]) and torch.equal(ckpt.state["nested"][0]["t"], torch.arange(3))
    other = network(2)
    other.load_state_dict(ckpt.weights)
    again = make(other.parameters())
    again.load_state_dict(ckpt.optimizer)
    for a, b in zip(optimizer.param_groups, again.param_groups):
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}
    for m, o in ((model, optimizer), (other, again)): # one more step of each gives the same weights
        torch.manual_seed(5)
        o.zero_grad()
        m(torch.randn(2, 3, 8, 8)).square().mean().backward()
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_the_same_state_gives_the_same_bytes(tmp_path):
    a = save(tmp_path/"a")
    b = save(tmp_path/"b")
    assert {f.name: f.read_bytes() for f in a.iterdir()} == {f.name: f.read_bytes() for f in b.iterdir()}


def test_no_pickle_is_in_it(tmp_path):
    for f in save(tmp_path/"c").iterdir():
        data = f.read_bytes()
        if f.suffix == ".json": json.loads(data)
        else: # safetensors: a length, a JSON header, numbers
            header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
            assert all(set(v) == {"dtype", "shape", "data_offsets"} for k, v in header.items() if k != "__metadata__")


def test_pack_takes_any_tree_apart():
    tree = {"a": [1, {"b": torch.zeros(2)}], 3: {None: torch.ones(1)}, "c": True, "d": None}
    plain, tensors = pack(tree)
    back = unpack(json.loads(json.dumps(plain)), tensors)
    assert list(back) == list(tree)
    assert torch.equal(back["a"][1]["b"], torch.zeros(2)) and torch.equal(back[3][None], torch.ones(1))


@pytest.mark.parametrize("name", ["weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json",
                                  "contract.json", "manifest.json"])
def test_every_harm_is_found_and_named(tmp_path, name):
    path = save(tmp_path/"c")
    rng = random.Random(name)
    whole = (path/name).read_bytes()
    flipped = bytearray(whole)
    at = rng.randrange(len(whole)) if name != "manifest.json" else whole.index(b'"bytes": ') + 9
    flipped[at] ^= 1
    for damaged in (bytes(flipped), whole[:rng.randrange(1, len(whole) - 2)], whole + b"\0" * 7, b""):
        (path/name).write_bytes(damaged)
        for read in (verify_checkpoint, load_checkpoint):
            with pytest.raises(InputError) as e: read(path)
            assert name in str(e.value) and "\n" not in str(e.value)
    (path/name).unlink()
    with pytest.raises(InputError, match=name): verify_checkpoint(path)
    (path/name).write_bytes(whole)
    verify_checkpoint(path)


def test_files_outside_the_folder_are_not_read(tmp_path):
    path = save(tmp_path/"c")
    manifest = json.loads((path/"manifest.json").read_text())
    manifest["files"]["../x"] = manifest["files"]["state.json"]
    manifest["seal"] = checkpoint._seal(manifest["files"])
    (path/"manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="not the name of a file"): verify_checkpoint(path)


def test_a_full_disk_at_any_moment_leaves_the_old_one(tmp_path, monkeypatch):
    "The n-th operation on the disk fails, for every n there is."
    path = save(tmp_path/"c")
    calls = [0]
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    def failing(real, n):
        def call(*a, **kw):
            calls[0] += 1
            if calls[0] == n: raise OSError(errno.ENOSPC, "No space left on device")
            return real(*a, **kw)
        return call
    for n in range(1, 100):
        calls[0] = 0
        with monkeypatch.context() as m:
            m.setattr(checkpoint.os, "fsync", failing(os.fsync, n))
            m.setattr(checkpoint.os, "rename", failing(os.rename, n))
            m.setattr(checkpoint.Path, "mkdir", failing(checkpoint.Path.mkdir, n))
            try: save(tmp_path/"c", seed=n)
            except OSError as e: assert e.errno == errno.ENOSPC and "No space left" in str(e) and "\n" not in str(e)
            else: break
        found = [p for p in (path, tmp_path/".c.old") if p.exists()]
        # between the two renames the old one stands aside, whole
        assert found and all(verify_checkpoint(p) for p in found)
        if n < 8:
            assert {f.name: f.read_bytes()
                    for f in path.iterdir()} == before and [p.name for p in tmp_path.iterdir()] == ["c"]
        if not path.exists(): shutil.move(tmp_path/".c.old", path)
    assert n > 8, "no operation failed"
    verify_checkpoint(path)


def test_a_write_that_the_kernel_cuts_off(tmp_path):
    "A limit on the size of files stops a write in the middle of a file."
    path = save(tmp_path/"checkpoints"/"step-00000001")
    size = (path/"optimizer.safetensors").stat().st_size
    (soft, hard) = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, hard))
    try:
        with pytest.raises(OSError, match="step-00000002 could not be written"):
            save(tmp_path/"checkpoints"/"step-00000002")
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path/"checkpoints").iterdir()] == ["step-00000001"]
    assert newest_whole(tmp_path) == path


def test_the_newest_whole_one_is_found_and_the_others_are_named(tmp_path):
    for step in (1, 2, 3): save(checkpoint_path(tmp_path, step), step=step)
    (checkpoint_path(tmp_path, 3)/"ema.safetensors").unlink()
    (checkpoint_path(tmp_path, 2)/"manifest.json").write_text("{}")
    lines = []
    assert newest_whole(tmp_path, lines.append) == checkpoint_path(tmp_path, 1)
    assert len(lines) == 2 and "step-00000002" in lines[1]
    assert "step-00000003" in lines[0] and "ema.safetensors" in lines[0]
    (checkpoint_path(tmp_path, 1)/"state.json").unlink()
    with pytest.raises(InputError, match="no whole checkpoint"): newest_whole(tmp_path, lines.append)


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 7): save(checkpoint_path(tmp_path, step), step=step)
    (tmp_path/"checkpoints"/".step-00000009.part").mkdir()
    prune_checkpoints(tmp_path, keep=2, stay=[2])
    assert sorted(p.name[-1] for p in (tmp_path/"checkpoints").iterdir()) == ["2", "5", "6"]


def test_pruning_never_takes_the_last_whole_one(tmp_path):
    for step in (1, 2, 3): save(checkpoint_path(tmp_path, step), step=step)
    (checkpoint_path(tmp_path, 3)/"state.json").write_text("{}")
    assert prune_checkpoints(tmp_path, keep=1) == [] and len(list_checkpoints(tmp_path)) == 3
    assert newest_whole(tmp_path, lambda _: None) == checkpoint_path(tmp_path, 2)


def test_what_ships_has_no_optimizer_and_is_replaced(tmp_path):
    a = save(checkpoint_path(tmp_path, 1), 0, 1)
    b = save(checkpoint_path(tmp_path, 2), 5, 2)
    for source in (a, b):
        best = publish_checkpoint(source, tmp_path/"best")
        assert (best/"ema.safetensors").read_bytes() == (source/"ema.safetensors").read_bytes()
    ckpt = load_checkpoint(best)
    assert ckpt.optimizer is None and ckpt.state == {"step": 2} and not (best/"optimizer.safetensors").exists()
    (best/"weights.safetensors").write_bytes(b"torn")
    verify_checkpoint(publish_checkpoint(b, tmp_path/"best")) # a harmed copy is made again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "checkpoints"]


# ---- which one is meant, and whether all are whole

def a_run(folder):
    "A run's folder with two checkpoints and what ships."
    for step in (10, 20): save(checkpoint_path(folder, step), step=step)
    for name in ("best", "last"): publish_checkpoint(checkpoint_path(folder, 20), folder/name)
    return folder


def test_of_a_run_what_ships_is_meant(tmp_path):
    run = a_run(tmp_path/"run")
    assert checkpoint_of(run) == run/"best" and checkpoint_of(run/"last") == run/"last"
    shutil.rmtree(run/"best")
    assert checkpoint_of(run).name == "step-00000020"
    (tmp_path/"job").mkdir()
    shutil.move(run, tmp_path/"job"/"training") # as jobs of earlier versions have left it
    assert checkpoint_of(tmp_path/"job").name == "step-00000020"
    for folder in ("nowhere", "job/training/checkpoints"):
        with pytest.raises(InputError): checkpoint_of(tmp_path/folder)


def torn(file): file.write_bytes(file.read_bytes()[:-9])
def flipped(file): file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
def lost(file): file.unlink()
def emptied(file): file.write_bytes(b"")
def a_folder(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("harm", [torn, flipped, lost, emptied, a_folder])
@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "manifest.json"])
def test_verify_says_what_is_wrong_where(tmp_path, capsys, harm, name):
    run = a_run(tmp_path/"run")
    assert main(["verify", str(run)]) == main(["verify", str(run/"best")]) == 0
    assert "4 of 4 checkpoints are whole" in capsys.readouterr().out
    harm(checkpoint_path(run, 10)/name)
    found = verify(run)
    assert [bool(wrong) for wrong in found.values()] == [True, False, False, False]
    assert main(["verify", str(run), "--json", str(tmp_path/"found.json")]) == 1
    said = capsys.readouterr().out
    assert "3 of 4 checkpoints are whole" in said
    assert str(checkpoint_path(run, 10)) in said.splitlines()[0] and name in said.splitlines()[0]
    assert len(json.loads((tmp_path/"found.json").read_text())["checkpoints"]) == 4
    assert main(["verify", str(checkpoint_path(run, 10))]) == 1 and main(["verify", str(run/"best")]) == 0


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": 3}', "{", '{"files": {"a": 1}, "format": 1, "seal": ""}'])
def test_a_manifest_that_is_none_is_found(tmp_path, text):
    run = a_run(tmp_path/"run")
    (run/"best"/MANIFEST).write_text(text)
    assert verify(run)[run/"best"]


def test_verify_of_something_else_is_refused_by_what_it_is(tmp_path, capsys):
    a_run(tmp_path/"runs"/"a")
    (tmp_path/"empty").mkdir()
    (tmp_path/"job").mkdir()
    for name in ("benchmark.ipynb", "metrics.json"): (tmp_path/"job"/name).write_text("{}")
    (tmp_path/"early").mkdir()
    (tmp_path/"early"/"config.yaml").write_text("")
    (tmp_path/"photo\x1b[31m.jpg").write_bytes(b"x")
    for name in ("pipe", "pipe.onnx"): os.mkfifo(tmp_path/name)
    cases = {"nowhere": "no such file or folder", "nowhere.onnx": "no such file or folder", "empty": "an empty folder",
             "job": "no checkpoint is in it, but benchmark.ipynb, metrics.json",
             "runs": "a folder of runs (a), one of which is to be named",
             "early": "a run without a checkpoint: it ended before the first one",
             "photo\x1b[31m.jpg": "is no artifact", "pipe": "is a named pipe", "pipe.onnx": "is a named pipe",
             "/dev/zero": "is a device"}
    for name, what in cases.items():
        assert main(["verify", str(tmp_path/name)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "\x1b" not in error and what in error, error
        is_there = "nowhere" not in name and what not in ("is a named pipe", "is a device")
        if is_there: assert "verify takes a run's folder, a checkpoint folder, or an ONNX file" in error


# ---- ONNX files

def an_onnx(path, **more):
    "A file as the exporter writes it."
    boxes = np.zeros((1, 5, 4), np.float32)
    scores = np.zeros((1, 5, 2), np.float32)
    contract = CONTRACT._replace(**{"made_from": "ab" * 32, **more}).to_json()
    onnx_files.write_graph(path, dict(boxes=boxes, scores=scores), shape=(1, 3, 64, 96))
    graph = onnx.load(str(path))
    digits = sha256_bytes(graph.graph.SerializeToString())
    onnx.helper.set_model_props(graph, {METADATA_KEY: contract, GRAPH_KEY: digits})
    onnx.save(graph, str(path))
    return path


def altered(path):
    "Another number among its weights: it opens and runs all the same."
    graph = onnx.load(str(path))
    weights = onnx.numpy_helper.to_array(graph.graph.initializer[-1]).copy()
    weights[0, 0, 0] += .25
    graph.graph.initializer[-1].CopyFrom(onnx.numpy_helper.from_array(weights, graph.graph.initializer[-1].name))
    onnx.save(graph, str(path))

def cut(path): path.write_bytes(path.read_bytes()[:-50])
def no_graph(path): path.write_bytes(b"an image")

def with_contract(text):
    def harm(path):
        graph = onnx.load(str(path))
        onnx.helper.set_model_props(graph, {METADATA_KEY: text})
        onnx.save(graph, str(path))
    return harm

OTHER_SIZE = with_contract(CONTRACT._replace(input_size=(32, 32)).to_json())
OTHER_CLASSES = with_contract(CONTRACT._replace(classes=("a", "b", "c")).to_json())


def test_verify_takes_an_onnx_file(tmp_path, capsys):
    path = an_onnx(tmp_path/"best.onnx")
    assert main(["verify", str(path), "--json", str(tmp_path/"found.json")]) == 0
    out = capsys.readouterr().out
    for text in ("yolox-nano, 64x96, 2 classes; opens, agrees", "its graph is as it was exported",
                 "sha256 abababababab\n", f"{path}: whole"): assert text in out
    assert json.loads((tmp_path/"found.json").read_text())["files"] == {str(path): "whole"}
    save(tmp_path/"best") # another training's
    assert main(["verify", str(path)]) == 0
    assert "which are no longer those of" in capsys.readouterr().out
    sha = verify_checkpoint(tmp_path/"best")["files"]["ema.safetensors"]["sha256"]
    an_onnx(path, made_from=sha)
    assert main(["verify", str(path)]) == 0
    assert "those of" in (out := capsys.readouterr().out) and "no longer" not in out


@pytest.mark.parametrize("harm, why", [
    (altered, "altered: the SHA-256"), (cut, "cannot open"), (no_graph, "cannot open"),
    (with_contract("{"), "not valid JSON"), (OTHER_SIZE, "needs [batch, 3, 32, 32]"),
    (OTHER_CLASSES, "3 classes) needs")])
def test_verify_says_what_is_wrong_with_an_onnx_file(tmp_path, capsys, harm, why):
    path = an_onnx(tmp_path/"best.onnx")
    harm(path)
    assert main(["verify", str(path)]) == 1
    said = capsys.readouterr()
    assert why in said.out and said.out.count("\n") == 1 and said.err == ""


def test_an_onnx_file_from_elsewhere_has_nothing_to_be_compared_with(tmp_path, capsys):
    path = onnx_files.write_graph(tmp_path/"a.onnx", dict(o=np.zeros((1, 126, 7), np.float32)), shape=(1, 3, 64, 96))
    assert main(["verify", str(path)]) == 0
    assert "no contract of jetson_det" in capsys.readouterr().out


def test_to_find_and_verify_checkpoints_takes_no_torch():
    code = "import sys, jetson_det.models.checkpoint, jetson_det.train.run_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
