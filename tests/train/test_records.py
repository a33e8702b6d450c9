"""What a run writes down: its folder, its lineage, going back, stopping early, what it takes, and what it leaves
when it fails."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from train_helpers import config, result_of, scenes

from jetson_det.runtime.files import InputError
from jetson_det.train import environment, loop, resume, run_folder
from jetson_det.train import rollback as rolling
from jetson_det.train.callbacks import bad_batch, resources
from jetson_det.train.callbacks.bad_batch import SaveBadBatch
from jetson_det.train.callbacks.base import Callback
from jetson_det.train.callbacks.checkpoints import SaveCheckpoints
from jetson_det.train.callbacks.evaluate import EarlyStop
from jetson_det.train.callbacks.log import read_table
from jetson_det.train.callbacks.resources import DiskWatch, ResourceLog
from jetson_det.train.state import RunState, TrainingError
from jetson_det.models.checkpoint import list_checkpoints, newest_whole, verify_checkpoint
from jetson_det.train.data import make_loader
from jetson_det.train.data import training_data
from jetson_det.train.loop import Trainer, train
from jetson_det.train.environment import git_state
from jetson_det.train.lineage import lineage, lineage_text, origin_of
from jetson_det.train.rollback import rollback
from jetson_det.train.run_folder import default_run_folder, hold_run, journal, read_journal

KEEP = ["train.keep=20"]


@pytest.fixture(scope="module")
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data")/"dock")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    "A finished run of nine steps, every checkpoint kept; the AP of its epochs is .2, .3, .1."
    out = tmp_path_factory.mktemp("runs")/"whole"
    with pytest.MonkeyPatch.context() as m:
        scored(m, [.2, .3, .1])
        train(config(data, *KEEP), out)
    return out


def scored(monkeypatch, aps):
    "The evaluation of each epoch says what is given here; that of the end is real."
    monkeypatch.setattr(Trainer, "evaluate", lambda self: {"AP": aps[self.run.epoch - 1], "AP50": None})


def with_callbacks(monkeypatch, *more, before=SaveCheckpoints):
    "The usual callbacks, and more before one of them."
    usual = loop.default_callbacks
    def all_of_them():
        found = usual()
        at = next(i for i, c in enumerate(found) if isinstance(c, before))
        return found[:at] + [make() for make in more] + found[at:]
    monkeypatch.setattr(loop, "default_callbacks", all_of_them)


class At(Callback):
    "Does something after a step."
    def __init__(self, step, do): self.step, self.do = step, do
    def after_step(self, t):
        if self.step == t.run.step: self.do(t)


def hashes(folder): return {hashlib.sha256(f.read_bytes()).hexdigest() for f in Path(folder).rglob("*") if f.is_file()}


# ---- the folder

def test_a_run_folder_is_named_by_what_has_a_say(tmp_path, data):
    cfg = config(data)
    ds = training_data(cfg, tmp_path)
    name = default_run_folder(cfg, ds, tmp_path).name
    assert name[:-8] == "yolox-nano-dock-" and int(name[-8:], 16) >= 0
    moved = shutil.copytree(data, tmp_path/"elsewhere"/"dock")
    same = config(moved, "data.workers=1", "train.keep=9")
    assert default_run_folder(same, training_data(same, tmp_path), tmp_path).name == name
    for word in ("train.seed=1", "augment.flip=.2", "model.name=yolox-s"):
        assert default_run_folder(config(data, word), ds, tmp_path).name[-8:] != name[-8:]
    assert default_run_folder(cfg, ds.subset(range(5)), tmp_path).name[-8:] != name[-8:]
    (tmp_path/name).mkdir()
    (tmp_path/f"{name}-2").write_text("a file")
    assert default_run_folder(cfg, ds, tmp_path) == tmp_path/f"{name}-3"
    odd = tmp_path/"Halle 3: Säcke/"
    odd.mkdir()
    cfg.data.path = str(odd)
    assert default_run_folder(cfg, ds, tmp_path).name.startswith("yolox-nano-Halle-3-Säcke-")


def test_the_environment_says_what_ran(whole, data):
    found = json.loads((whole/"environment.json").read_text())
    assert found["packages"]["torch"] == found["torch"] and found["command"] == sys.argv and found[
        "folder"] == os.getcwd()
    ds = training_data(config(data), whole)
    assert found["data"] == dict(path=str(data), fingerprint=ds.fingerprint(), images=12, boxes=len(ds.boxes))
    assert [e["event"] for e in read_journal(whole)] == ["began"]


def repository(folder):
    "A git repository with a commit, a change to a text and to an image, a new file that is added and one that is not."
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
                       cwd=folder,
                       check=True,
                       capture_output=True)
    folder.mkdir()
    git("init", "-b", "main")
    (folder/"a.txt").write_text("one\n")
    (folder/"b.bin").write_bytes(bytes(range(256)))
    git("add", ".")
    git("commit", "-m", "first")
    shutil.copytree(folder, f"{folder}-clean")
    (folder/"a.txt").write_bytes(b"two \xff\n")
    (folder/"b.bin").write_bytes(bytes(range(255, -1, -1)))
    (folder/"new.txt").write_text("new")
    git("add", "new.txt")
    (folder/"secret.env").write_text("KEY=1")
    return folder


def test_the_patch_makes_the_code_that_ran(tmp_path):
    state, patch = git_state(repository(tmp_path/"mine"))
    assert state["branch"] == "main" and len(
        state["commit"]) == 40 and state["changes"] == 4 and "?? secret.env" in state["changed"]
    assert b"KEY=1" not in patch and state["patch_bytes"] == len(patch)
    subprocess.run(["git", "apply", "-"], input=patch, cwd=tmp_path/"mine-clean", check=True)
    for name in ("a.txt", "b.bin", "new.txt"):
        assert (tmp_path/"mine"/name).read_bytes() == (tmp_path/"mine-clean"/name).read_bytes()


def test_a_large_patch_is_named_only_and_no_git_is_no_trouble(tmp_path, monkeypatch):
    mine = repository(tmp_path/"mine")
    (mine/"a.txt").write_text("".join(f"{i}\n" for i in range(60000)))
    state, patch = git_state(mine)
    assert patch is None and state["patch_bytes"] > environment.PATCH_LIMIT
    assert git_state(tmp_path) == ({}, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(mine) == ({}, None) and environment.git_states() == {}


def test_the_patch_of_the_working_folder_is_in_the_run(tmp_path, monkeypatch):
    from jetson_det.data.dataset import DetDataset
    mine = repository(tmp_path/"mine")
    out = tmp_path/"run"
    monkeypatch.chdir(mine)
    ds = DetDataset(tmp_path, ("Sack", ), ["a.jpg"], [(60, 80)],
                    box_image=[0],
                    boxes=[[1, 1, 9, 9]],
                    labels=[0],
                    splits=["train"])
    run_folder.write_run_folder(out, config("x"), ds, [])
    assert (out/"git-here.patch").read_bytes() == git_state(mine)[1]
    git = json.loads((out/"environment.json").read_text())["git"]
    assert git["here"]["root"] == str(mine) and "patch" not in git["here"]
    (mine/"a.txt").write_text("three\n")
    run_folder.write_run_folder(out, config("x"), ds, []) # resumed: what the run began with stays
    assert b"three" not in (out/"git-here.patch").read_bytes() and [e["event"]
                                                                    for e in read_journal(out)] == ["began", "resumed"]


def test_a_journal_outlives_a_torn_line(tmp_path):
    journal(tmp_path, "began", note="Säcke")
    file = tmp_path/"journal.jsonl"
    file.write_bytes(file.read_bytes() + b'{"time": "20')
    journal(tmp_path, "resumed")
    assert [(e["event"], e.get("note")) for e in read_journal(tmp_path)] == [("began", "Säcke"), ("resumed", None)]


HOLD = (
    "import sys, time\nfrom jetson_det.train.run_folder import hold_run\nwith hold_run(sys.argv[1]): print('held',"
    " flush=True); time.sleep(60)"
)

def test_a_run_is_held_by_one_process_until_it_ends_in_whatever_way(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {other.pid} is at work in this run"):
            with hold_run(tmp_path): pass
    finally:
        other.kill()
        other.wait()
    with hold_run(tmp_path): pass


# ---- lineage

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
    export_onnx(far, tmp_path/"a.onnx")
    shutil.rmtree(first)
    for artifact in (far, tmp_path/"a.onnx"):
        chain = lineage(artifact)
        assert [(e["name"], e["found"]) for e in chain] == [("yolox-nano", "as it was"), ("yolox-nano", "gone")]


def test_files_from_elsewhere_have_a_lineage_too(tmp_path, whole):
    (tmp_path/"a.pth").write_bytes(b"weights")
    assert origin_of(tmp_path/"a.pth") == dict(path=str(tmp_path/"a.pth"),
                                               sha256=hashlib.sha256(b"weights").hexdigest(),
                                               name="a.pth")
    assert origin_of(None) is None and origin_of("hub/name")["sha256"] is None
    assert "nothing is recorded" in lineage_text(lineage(tmp_path/"a.pth"))
    with pytest.raises(InputError, match="no such file or folder"): lineage(tmp_path/"b.pth")
    (tmp_path/"b.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError, match="not an ONNX file, or torn"): lineage(tmp_path/"b.onnx")


# ---- going back

def copy_of(whole, out): return Path(shutil.copytree(whole, out))


@pytest.mark.parametrize("to, step", [("best", 6), ("step-00000004", 4), (9, 9)])
def test_taken_back_and_resumed_it_ends_the_same(tmp_path, data, whole, to, step, monkeypatch, capsys):
    out = copy_of(whole, tmp_path/"run")
    before = hashes(out)
    assert int(rollback(out, to).name[5:]) == step
    # nothing is deleted
    assert hashes(out) >= before - {hashlib.sha256((whole/n).read_bytes()).hexdigest() for n in ("journal.jsonl",)}
    assert newest_whole(out).name == f"step-{step:08d}"
    events = [e for e in read_journal(out) if e["event"] == "rolled back"]
    assert len(events) == (step != 9) and all(
        e["to"] == f"step-{step:08d}" and (out/e["folder"]/"metrics.csv").exists() for e in events)
    assert (out/"best").exists() == (step
                                     >= 6) and (out/"last").exists() == (out/"metrics.json").exists() == (step == 9)
    scored(monkeypatch, [.2, .3, .1])
    train(config(data, *KEEP, "train.save_minutes=5"), out, resume=True)
    assert result_of(out) == result_of(whole)
    assert f"resumed after epoch {step // 3}, step {step}" in capsys.readouterr().out


def test_going_back_is_refused_with_nothing_changed(tmp_path, whole):
    out = copy_of(whole, tmp_path/"run")
    (list_checkpoints(out)[3]/"weights.safetensors").write_bytes(b"torn")
    before = sorted(str(p) for p in out.rglob("*") if p.name != ".lock")
    for to, words in ((4, "torn"), (44, "no checkpoint of step 44; there are the steps 1, 2, 3"),
                      ("worst", "no checkpoint of step worst")):
        with pytest.raises(InputError, match=words): rollback(out, to)
    with pytest.raises(InputError, match="not the folder of a run"): rollback(tmp_path)
    assert sorted(str(p) for p in out.rglob("*") if p.name != ".lock") == before


def test_a_rollback_that_was_cut_short_is_done_by_the_next(tmp_path, whole, monkeypatch):
    out = copy_of(whole, tmp_path/"run")
    real = os.rename
    left = [4]
    def cut(a, b):
        left[0] -= 1
        if left[0] < 0: raise KeyboardInterrupt
        real(a, b)
    with monkeypatch.context() as m:
        m.setattr(rolling.os, "rename", cut)
        with pytest.raises(KeyboardInterrupt): rollback(out, 4)
    assert [p.name for p in list_checkpoints(out)] == [f"step-{s:08d}" for s in range(1, 10) if s < 9]
    rollback(out, 4)
    assert newest_whole(out).name == "step-00000004" and len(list((out/"rolled_back").glob("*/step-*"))) == 5


def test_when_the_best_was_pruned_the_best_is_found_anew(tmp_path, data, whole, monkeypatch, capsys):
    out = copy_of(whole, tmp_path/"run")
    shutil.rmtree(out/"checkpoints"/"step-00000003") # the best of that time
    rollback(out, 5)
    assert not (out/"best").exists()
    scored(monkeypatch, [.2, .1, .1])
    train(config(data, *KEEP, "train.save_minutes=5"), out, resume=True)
    assert "the best weights so far, of step 3, are no longer there" in capsys.readouterr().out
    assert json.loads(
        (out/"metrics.json").read_text())["best"] == {"AP": .1, "epoch": 3, "step": 9} and verify_checkpoint(out/"best")


# ---- stopping early

def test_early_stop_counts_what_is_recorded(tmp_path, data, monkeypatch, capsys):
    "AP rises until epoch 2; patience 2 ends the run after epoch 4 of 5, interrupted or not."
    aps = [.1, .3, .2, .3, .9]
    more = ["train.epochs=5", "train.no_aug_epochs=0", "train.save_minutes=5"]
    monkeypatch.setattr(loop, "final_figures", lambda t: dict(epochs=t.run.epoch, steps=t.run.step, best=t.run.best))
    scored(monkeypatch, aps)
    with monkeypatch.context() as m:
        with_callbacks(m, lambda: EarlyStop(patience=2))
        figures = train(config(data, *more), tmp_path/"whole")
    # of equals the later is the best, and no gain
    assert figures["epochs"] == 4 and figures["best"]["epoch"] == 4 and figures["steps"] == 12
    assert "stopped early after epoch 4 of 5: AP has not risen for 2 epochs" in (tmp_path/"whole"/"log.txt").read_text()
    out = tmp_path/"run"
    with monkeypatch.context() as m:
        with_callbacks(m, lambda: At(10, lambda t: t.stop("SIGTERM")), lambda: EarlyStop(patience=2))
        with pytest.raises(TrainingError): train(config(data, *more), out)
    for _ in range(2): # to the end, and once more from there
        with monkeypatch.context() as m:
            with_callbacks(m, lambda: EarlyStop(patience=2))
            assert train(config(data, *more), out, resume=True)["epochs"] == 4
        assert result_of(out) == result_of(tmp_path/"whole")
    with monkeypatch.context() as m: # more patience: it goes on
        with_callbacks(m, lambda: EarlyStop(patience=0))
        assert train(config(data, *more), out, resume=True)["epochs"] == 5


def test_patience_without_a_val_split_is_said():
    said = []
    run = RunState(Path("nowhere"), epochs=5, steps=5, samples=1, batches=1, batch_size=1, group=1)
    EarlyStop(patience=3).before_train(SimpleNamespace(val_ds=None, run=run, say=said.append))
    assert said == ["train.patience has no effect: there is no val split with boxes"]


# ---- a batch to look at

@pytest.fixture
def failing(tmp_path, data):
    "A trainer, and an error that holds a real batch of it."
    cfg = config(data)
    t = Trainer(cfg, training_data(cfg, tmp_path), tmp_path/"run", callbacks=[], say=(said := []).append)
    batch = next(make_loader(t.train_ds, cfg.data, cfg.augment, cfg.train, first_look=True).epoch(0))
    return t, SimpleNamespace(what="the loss", batches=[batch, batch]), said


def test_the_batch_that_failed_can_be_looked_at(failing):
    t, error, said = failing
    error.batches[0].boxes[0, 0, 2] = float("inf")
    SaveBadBatch().not_finite(t, error)
    folder = t.run.out/"nan"
    batch = error.batches[0]
    assert sorted(
        f.name for f in folder.iterdir()) == [f"step-00000001-{k}.{s}" for k in (1, 2) for s in ("json", "npz", "png")]
    with np.load(folder/"step-00000001-1.npz") as kept:
        for key in batch._fields: np.testing.assert_array_equal(kept[key], getattr(batch, key).numpy())
    facts = json.loads((folder/"step-00000001-1.json").read_text())
    assert facts["images"] == [t.train_ds.paths[i] for i in batch.indices
                               ] and facts["boxes_not_finite"] == 1 and facts["what"] == "the loss"
    h, w = batch.images.shape[2:]
    sheet = cv2.imread(str(folder/"step-00000001-1.png"))
    plain = batch.images[0].numpy().transpose(1, 2, 0)
    assert sheet.shape[1] == 2 * round(w * 320 / max(h, w))
    assert said == [f"the batch is saved in {folder} for inspection"]
    assert (np.abs(cv2.resize(sheet[:, :sheet.shape[1] // 2], (w, h)).astype(int) - plain) > 60).any() # boxes are drawn


def test_no_room_for_the_batch_hides_nothing(failing, monkeypatch):
    t, error, said = failing
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(bad_batch, "write_bytes_atomic", full)
    SaveBadBatch().not_finite(t, error)
    assert len(said) == 1 and "could not be saved for inspection" in said[0] and "No space left" in said[0]


# ---- disk and resources

def test_a_disk_that_runs_low_is_said_twice_and_again_when_it_fills_anew(whole, monkeypatch):
    each = resources._bytes_of(list_checkpoints(whole)[-1])
    said = []
    watch = DiskWatch(every=0., marks=((5, 0), (2, 0)))
    t = SimpleNamespace(run=SimpleNamespace(out=whole), say=said.append)
    for room in (6, 4.5, 4, 1.5, 1.4, 6, 4.5):
        monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: SimpleNamespace(free=int(room * each)))
        watch.after_step(t)
    assert len(said) == 3 and all(f"a checkpoint takes {each / 1e6:.0f} MB" in s for s in said)


def threads(): return [th.name for th in threading.enumerate() if th.name == "resources"]


def test_resources_are_logged_for_next_to_nothing(tmp_path, data, one_thread):
    cfg = config(data, "train.epochs=8")
    log = ResourceLog(seconds=.5)
    seen = At(2, lambda t: seen.found.extend(threads()))
    seen.found = []
    start = time.monotonic()
    Trainer(cfg, training_data(cfg, tmp_path), tmp_path/"run", callbacks=[log, seen]).fit()
    taken = time.monotonic() - start
    rows = read_table(tmp_path/"run"/"resources.csv")
    assert seen.found == ["resources"] and not threads() and log.trouble == ""
    assert 1 <= len(rows) <= taken / .5 + 2 and int(rows[-1]["step"]) == 24
    assert max(float(r["cpu_percent"])
               for r in rows) > 5 and all(float(r["ram_mb"]) > 100 and float(r["disk_free_mb"]) > 0 for r in rows)
    assert log.spent < .01 * taken + .02 # start-up apart


def test_the_thread_ends_with_a_training_that_fails(tmp_path, data, one_thread):
    cfg = config(data)
    def fail(t): raise OSError(28, "No space left on device")
    with pytest.raises(TrainingError):
        Trainer(cfg, training_data(cfg, tmp_path), tmp_path/"run", callbacks=[ResourceLog(.05), At(2, fail)]).fit()
    assert not threads()


def test_a_log_that_fails_is_one_line_and_the_training_goes_on(tmp_path, data, monkeypatch, one_thread):
    cfg = config(data)
    said = []
    def broken(self): raise RuntimeError("no /proc")
    monkeypatch.setattr(resources.Resources, "sample", broken)
    t = Trainer(cfg, training_data(cfg, tmp_path), tmp_path/"run", callbacks=[ResourceLog(.01)], say=said.append)
    t.fit()
    assert t.run.step == 9 and said == ["resources.csv ends here: RuntimeError: no /proc"] and not threads()


def test_a_look_that_takes_long_is_taken_less_often(tmp_path, monkeypatch):
    def slow(self):
        end = time.thread_time() + .02
        while time.thread_time() < end: pass
        return {}
    monkeypatch.setattr(resources.Resources, "sample", slow)
    log = ResourceLog(.05)
    t = SimpleNamespace(run=SimpleNamespace(out=tmp_path, step=0), say=print)
    log.before_train(t)
    time.sleep(1.)
    log.finish(t)
    assert len(read_table(tmp_path/"resources.csv")) == 2 # after .05 s, then 2 s would pass; and the last


def test_a_resumed_log_keeps_its_rows_and_its_columns(tmp_path):
    (tmp_path/"resources.csv"
     ).write_text("time,seconds,step,cpu_percent,gpu7_percent\n2026-01-01T00:00:00,1,2,3,99\n2026-01-01T00:00:0")
    log = ResourceLog(.05)
    t = SimpleNamespace(run=SimpleNamespace(out=tmp_path, step=5), say=print)
    log.before_train(t)
    time.sleep(.2)
    log.finish(t)
    rows = read_table(tmp_path/"resources.csv")
    assert rows[0]["gpu7_percent"] == "99" and rows[0]["ram_mb"] == "" and len(
        rows) > 1 and rows[-1]["gpu7_percent"] == "" and rows[-1]["step"] == "5"


def test_graphics_cards_have_columns_and_what_one_does_not_know_stays_empty(tmp_path, monkeypatch):
    import pynvml
    def unknown(card): raise pynvml.NVMLError_NotSupported()
    answers = dict(nvmlInit=lambda: None,
                   nvmlDeviceGetCount=lambda: 2,
                   nvmlDeviceGetHandleByIndex=lambda i: i,
                   nvmlDeviceGetTemperature=lambda card, kind: 61,
                   nvmlDeviceGetUtilizationRates=lambda card: SimpleNamespace(gpu=90 + card),
                   nvmlDeviceGetMemoryInfo=lambda card: SimpleNamespace(used=3_200_000_000),
                   nvmlDeviceGetPowerUsage=lambda card: 71_400 if card else unknown(card))
    for name, answer in answers.items(): monkeypatch.setattr(pynvml, name, answer)
    found = resources.Resources(tmp_path).sample()
    assert {k: v
            for k, v in found.items()
            if k.startswith("gpu")} == dict(gpu0_percent=90,
                                            gpu0_mb=3200,
                                            gpu0_watts="",
                                            gpu0_celsius=61,
                                            gpu1_percent=91,
                                            gpu1_mb=3200,
                                            gpu1_watts=71,
                                            gpu1_celsius=61)


def test_children_are_counted(tmp_path):
    burn = "x = bytearray(200_000_000)\nprint('there', flush=True)\nwhile True: pass"
    before = resources.Resources(tmp_path)
    alone = before.sample()["ram_mb"]
    child = subprocess.Popen([sys.executable, "-c", burn], stdout=subprocess.PIPE, text=True)
    try:
        child.stdout.readline()
        before.sample()
        time.sleep(.5)
        found = before.sample()
        assert found["ram_mb"] - alone > 150 and found["cpu_percent"] > 10
    finally:
        child.kill()
        child.wait()
# ---- as the loop does it

def test_a_run_without_a_folder_gets_one_of_its_own(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = config(data, "train.epochs=1")
    outs = [Path(train(cfg)["artifact"]).parent for _ in range(2)]
    assert outs[0].name == default_run_folder(cfg, training_data(cfg, tmp_path), "none").name
    assert outs[1].name == outs[0].name + "-2" and (outs[1]/"resources.csv").exists()
    with pytest.raises(InputError, match="say which run"): train(cfg, resume=True)


def test_a_missing_tracker_stops_before_anything_is_written(tmp_path, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"jetson_det\[wandb\]"):
        train(config(data, "train.trackers=[wandb]"), tmp_path/"run")
    assert not (tmp_path/"run").exists()


def test_no_second_process_trains_or_goes_back_in_a_run(tmp_path, data):
    out = tmp_path/"run"
    train(config(data, "train.epochs=1"), out)
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        other.stdout.readline()
        for call in (lambda: train(config(data, "train.epochs=1"), out, resume=True), lambda: rollback(out)):
            with pytest.raises(InputError, match="is at work in this run"): call()
    finally:
        other.kill()
        other.wait()


def test_the_chain_of_real_trainings(tmp_path, data):
    train(config(data, "train.epochs=1"), tmp_path/"a")
    train(config(data, "train.epochs=1", f"model.weights={tmp_path/'a'}"), tmp_path/"b")
    shutil.rmtree(tmp_path/"b"/"last")
    train(config(data, "train.epochs=1", f"model.weights={tmp_path/'a'}"), tmp_path/"b", resume=True)
    assert [(e["found"], e["begins"]) for e in lineage(tmp_path/"b"/"last")] == [("as it was", ""),
                                                                                 ("as it was", "with random weights")]


def spoil_weight(t): next(t.stepper.model.head.parameters()).data.fill_(float("inf"))
def spoil_gradient(t): next(t.stepper.model.parameters()).register_hook(lambda g: g * float("nan"))


@pytest.mark.parametrize("spoil, batches", [(spoil_weight, 1), (spoil_gradient, 2)])
def test_the_batches_of_a_step_that_failed_are_kept(tmp_path, data, monkeypatch, spoil, batches):
    with_callbacks(monkeypatch, lambda: At(4, spoil))
    with pytest.raises(TrainingError, match="not finite in epoch 2, step 5") as e: train(config(data), tmp_path/"run")
    files = sorted((tmp_path/"run"/"nan").glob("*.npz"))
    assert [f.name for f in files] == [f"step-00000005-{k}.npz" for k in range(1, batches + 1)]
    names = [n for f in files for n in json.loads(f.with_suffix(".json").read_text())["images"]]
    assert ", ".join(names) == str(e.value).split("images ")[1].split(");")[0]
    assert "for inspection" in (tmp_path/"run"/"log.txt").read_text()


def test_patience_is_a_setting(tmp_path, data, monkeypatch):
    scored(monkeypatch, [.3, .2, .1, .1, .1])
    assert train(config(data, "train.epochs=5", "train.patience=1"), tmp_path/"run")["epochs"] == 2
    assert train(config(data, "train.epochs=5", "train.patience=2", "train.resource_seconds=0"),
                 tmp_path/"run",
                 resume=True)["epochs"] == 3


def test_what_a_kill_left_half_written_is_no_hindrance(tmp_path):
    "A file, or a folder of weights, that a killed process was writing beside the others."
    cfg = config(scenes(tmp_path/"data"), "train.epochs=1")
    train(cfg, tmp_path/"run")
    (tmp_path/"run"/".best.part").mkdir()
    (tmp_path/"run"/".best.part"/"weights.safetensors").write_bytes(b"torn")
    (tmp_path/"run"/".resolved.json.1.part").write_bytes(b"{")
    train(cfg, tmp_path/"run", resume=True)
    assert not [p.name for p in (tmp_path/"run").iterdir() if p.name.endswith(".part")]
