"""Callbacks of one's own, through `train`: in one process and in several, and what a checkpoint keeps of them."""
import threading

import pytest
from process_helpers import FROZEN, preload
from train_helpers import config, scenes

from jetson_det.core import InputError
from jetson_det.models.checkpoint import load_checkpoint, newest_whole
from jetson_det.train import loop
from jetson_det.train.callbacks.base import Callback
from jetson_det.train.launch import train_processes
from jetson_det.train.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data"))


class Count(Callback):
    "Counts steps, also those before a resume."
    def __init__(self): self.steps = 0
    def after_step(self, trainer): self.steps += 1
    def state(self): return self.steps
    def load(self, trainer, state): self.steps = state


class Leave(Callback):
    "Leaves a file in each process that it runs in."
    def __init__(self, folder, everywhere):
        self.folder = folder
        self.everywhere = everywhere
    def after_train(self, trainer): open(f"{self.folder}/{self.everywhere}.{trainer.world.rank}", "w").close()


def test_own_callbacks_run_beside_the_usual_ones_and_are_resumed(data, tmp_path):
    cfg = config(data, "train.epochs=2", "train.save_minutes=5")
    count = Count()
    figures = train(cfg, tmp_path/"run", callbacks=[count])
    assert count.steps == figures["steps"] > 0 and (tmp_path/"run"/"metrics.csv").exists()
    checkpoint = load_checkpoint(newest_whole(tmp_path/"run"))
    assert checkpoint.state["callbacks"]["Count"] == count.steps # that of the same moment
    again = Count()
    train(cfg, tmp_path/"run", resume=True, callbacks=[again])
    assert again.steps == count.steps


def test_own_callbacks_stay_behind_a_rollback(data, tmp_path, monkeypatch):
    count = Count()
    real, calls = loop.Stepper.step, []
    def step(self, *args, **kw):
        calls.append(1)
        if len(calls) == 3: raise loop.NotFinite("the loss", [])
        return real(self, *args, **kw)
    monkeypatch.setattr(loop.Stepper, "step", step)
    cfg = config(data, "train.epochs=2", "train.on_nan=rollback", "train.save_minutes=5")
    assert train(cfg, tmp_path/"run", callbacks=[count])["steps"] == count.steps


def test_of_several_processes_the_first_runs_them_unless_they_say_everywhere(data, tmp_path, capsys):
    preload()
    own = [Leave(str(tmp_path), False), Leave(str(tmp_path), True)]
    train_processes(config(data, *FROZEN, "train.epochs=1", "train.accumulate=1"), tmp_path/"run", processes=2,
                    callbacks=own, start="forkserver")
    assert sorted(p.name for p in tmp_path.glob("*.[01]")) == ["False.0", "True.0", "True.1"]
    assert "train.device is cpu: 2 processes train on the CPU" in capsys.readouterr().out


def test_a_callback_that_cannot_be_sent_is_refused(data, tmp_path):
    own = Count()
    own.lock = threading.Lock()
    words = r"^callback Count: it can't be sent to the processes of the training \(.*lock"
    with pytest.raises(InputError, match=words):
        train_processes(config(data), tmp_path/"run", processes=2, callbacks=[own])
    assert not (tmp_path/"run").exists()
