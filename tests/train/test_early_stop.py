"""A training that ends when it no longer gets better."""
from pathlib import Path
from types import SimpleNamespace

import pytest
from callback_helpers import At, scored, with_callbacks
from train_helpers import config, result_of, scenes

from jetson_det.train import loop
from jetson_det.train.callbacks.evaluate import EarlyStop
from jetson_det.train.loop import train
from jetson_det.train.state import RunState, TrainingError


@pytest.fixture(scope="module")
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data")/"dock")


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


def test_a_training_that_finds_nothing_loses_patience_too(tmp_path, data, monkeypatch):
    scored(monkeypatch, [0., 0., 0., .3, .3])
    assert train(config(data, "train.epochs=5", "train.patience=2"), tmp_path/"run")["epochs"] == 3
    assert "stopped early after epoch 3 of 5: AP is 0 for 2 epochs" in (tmp_path/"run"/"log.txt").read_text()


def test_patience_is_a_setting(tmp_path, data, monkeypatch):
    scored(monkeypatch, [.3, .2, .1, .1, .1])
    assert train(config(data, "train.epochs=5", "train.patience=1"), tmp_path/"run")["epochs"] == 2
    assert train(config(data, "train.epochs=5", "train.patience=2", "train.resource_seconds=0"),
                 tmp_path/"run",
                 resume=True)["epochs"] == 3
