"""Going back to an earlier checkpoint."""
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from callback_helpers import finished_run, hashes, scored
from train_helpers import EACH_STEP, config, result_of, scenes

from jetson_det.core import InputError
from jetson_det.models.checkpoint import list_checkpoints, newest_whole, verify_checkpoint
from jetson_det.train import rollback as rolling
from jetson_det.train.loop import train
from jetson_det.train.rollback import rollback
from jetson_det.train.run_folder import read_journal

KEEP = [*EACH_STEP, "train.keep=20"]


@pytest.fixture(scope="module")
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data")/"dock")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory): return finished_run(config(data, *KEEP), tmp_path_factory.mktemp("runs")/"whole")


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
