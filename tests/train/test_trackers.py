"""Trackers: the right figures in the real packages, the same run after a resume, and no trouble of theirs in the
training."""
import json
import logging
import os
import struct
import sys
import threading
import time

import pytest
import torch
from train_helpers import config, scenes

from jetson_det.config import Config
from jetson_det.runtime.files import InputError
from jetson_det.train.callbacks.base import Callback
from jetson_det.train.callbacks.evaluate import Evaluate
from jetson_det.train.callbacks.stop import StopOnSignal
from jetson_det.train.state import TrainingError
from jetson_det.train.data import training_data
from jetson_det.train.loop import Trainer
from jetson_det.train.run_folder import flat_config
from jetson_det.train.trackers import (
    _Background,
    MLflowTracker,
    TensorBoardTracker,
    Tracker,
    Tracking,
    WandbTracker,
    make_trackers,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    "A run folder, and no settings of a service from outside."
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_")): monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path/"runs"/"a").mkdir(parents=True)
    return tmp_path/"runs"/"a"


class Notes(Tracker):
    "Remembers what it was told."
    name = "notes"
    def __init__(self): self.calls = []
    def start(self, run, config): self.calls.append(("start", run, config))
    def log(self, step, figures): self.calls.append(("log", step, figures))
    def finish(self, status): self.calls.append(("finish", status))


class At(Callback):
    "Does something after a step."
    def __init__(self, step, do): self.step, self.do = step, do
    def after_step(self, t):
        if self.step == t.run.step: self.do(t)


def trained(data, tmp_path, *callbacks, more=()):
    "A training of nine steps with these callbacks; what it said."
    cfg = config(data, "train.log_every=2", *more)
    said = []
    t = Trainer(cfg, training_data(cfg, tmp_path), tmp_path/"run", callbacks=list(callbacks), say=said.append)
    t.fit()
    return t, said


def weights_of(t): return torch.cat([p.detach().flatten() for p in t.stepper.model.parameters()])


def test_a_training_tells_its_figures(tmp_path, data, one_thread):
    notes = Notes()
    t, said = trained(data, tmp_path, Evaluate(), Tracking([notes]))
    kinds = [c[0] for c in notes.calls]
    assert kinds[0] == "start" and kinds[-1] == "finish" and notes.calls[-1] == ("finish", "finished") and not said
    assert notes.calls[0][1] == tmp_path/"run" and notes.calls[0][2]["train.epochs"] == 3 and notes.calls[0][2][
        "data.input_size"] == [96, 96]
    steps = [(c[1], set(c[2])) for c in notes.calls if c[0] == "log" and "train/loss" in c[2]]
    assert [s for s, _ in steps
            ] == [2, 4, 6, 8] and steps[0][1] >= {"train/loss", "train/iou", "train/lr", "train/images_per_second"}
    assert [c[1] for c in notes.calls if c[0] == "log" and "val/AP" in c[2]] == [3, 6, 9]
    assert not [th for th in threading.enumerate() if th.name.startswith("tracker")]


class Breaks(Notes):
    "Fails in one of its methods."
    def __init__(self, method):
        super().__init__()
        self.method = method
    def start(self, run, config):
        super().start(run, config)
        self._maybe("start")
    def log(self, step, figures):
        super().log(step, figures)
        self._maybe("log")
    def finish(self, status):
        super().finish(status)
        self._maybe("finish")
    def _maybe(self, method):
        if method == self.method: raise SystemExit("no\nroute")


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    "A training without trackers."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    t, _ = trained(data, tmp_path_factory.mktemp("plain"))
    torch.set_num_threads(before)
    return t


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_one_line_and_changes_nothing(tmp_path, data, plain, method, one_thread):
    t, said = trained(data, tmp_path/"a", Tracking([Breaks(method), notes := Notes()]))
    assert said == ["notes: SystemExit: no route; the training goes on without it"] and t.run.step == 9
    assert torch.equal(weights_of(t), weights_of(plain)) and notes.calls[-1] == ("finish", "finished")


def test_a_tracker_that_hangs_holds_up_nothing(tmp_path, data, one_thread):
    class Hangs(Notes):
        def log(self, step, figures): threading.Event().wait(60)
    tracking = Tracking([Hangs(), quick := Notes()], seconds=.5)
    ends = []
    class Clock(Callback):
        def after_train(self, t): ends.append(time.monotonic())
    trained(data, tmp_path, tracking, Clock())
    assert .4 < time.monotonic() - ends[0] < 5 and quick.calls[-1] == ("finish", "finished")


def test_a_queue_that_is_full_loses_figures_and_says_so():
    class Slow(Notes):
        def log(self, step, figures):
            super().log(step, figures)
            time.sleep(.01)
    place = _Background(Slow(), most=5)
    for step in range(50): place("log", step, {})
    place.end("finished")
    place.wait(5)
    logged = [c for c in place.tracker.calls if c[0] == "log"]
    assert place.tracker.calls[-1] == ("finish", "finished") and len(logged) + place.lost == 50 and place.lost > 20
    assert place.trouble == f"too slow: {place.lost} sets of figures are missing there"


def test_the_end_is_told_as_it_was(tmp_path, data, one_thread):
    failed = Notes()
    stopped = Notes()
    def fail(t): raise OSError(28, "No space left on device")
    with pytest.raises(TrainingError): trained(data, tmp_path/"a", Tracking([failed]), At(3, fail))
    def ask(t): t.stop("SIGTERM")
    with pytest.raises(TrainingError): trained(data, tmp_path/"b", Tracking([stopped]), At(3, ask), StopOnSignal())
    assert (failed.calls[-1], stopped.calls[-1]) == (("finish", "failed"), ("finish", "stopped"))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_line_before_anything_is_done(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError,
                       match=rf'{name} is needed here and is not installed: pip install "jetson_det\[{name}\]"'):
        make_trackers(["tensorboard", name])


def test_a_missing_tensorboard_is_said_and_the_training_goes_on(tmp_path, data, monkeypatch, one_thread):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    t, said = trained(data, tmp_path, Tracking(make_trackers(["tensorboard"])))
    assert t.run.step == 9 and len(said) == 1 and said[0].startswith("tensorboard: ModuleNotFoundError")


# step -> loss; the second from a checkpoint at step 10
FIRST = {10: .5, 20: .25, 30: .125}
AGAIN = {20: .75, 40: .0625}

def tell(tracker, run, losses, status):
    "What `Tracking` does, in a thread, as there."
    place = _Background(tracker)
    place("start", run, flat_config(Config()))
    for step, loss in losses.items(): place("log", step, {"train/loss": loss})
    place.end(status)
    place.wait(60)
    assert not place.trouble, place.trouble
    return tracker


def test_tensorboard_forgets_what_a_resume_does_again(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    tell(TensorBoardTracker(), run, FIRST, "stopped")
    time.sleep(1.1)
    tell(TensorBoardTracker(), run, AGAIN, "finished")
    assert [(e.step, e.value)
            for e in EventAccumulator(str(run/"tensorboard")).Reload().Scalars("train/loss")] == [(10, .5), (20, .75),
                                                                                                  (40, .0625)]


def log_records(file):
    "The records in a file of LevelDB's log format: blocks of 32 KiB, after seven bytes of W&B's own."
    data = file.read_bytes()
    at = 7
    record = b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        length, kind = struct.unpack("<HB", data[at + 4:at + 7])
        if left < 7 or not kind:
            at += left
            continue
        record = record + data[at + 7:at + 7 + length]
        at = at + 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def wandb_records(run):
    "Of every offline folder: (id, project, config, [(step, loss)], exit code), read from W&B's own files."
    from wandb.proto import wandb_internal_pb2 as pb
    found = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        history = []
        head = None
        code = None
        for record in map(pb.Record.FromString, log_records(file)):
            kind = record.WhichOneof("record_type")
            if kind == "run": head = record.run
            if kind == "exit": code = record.exit.exit_code
            if kind == "history":
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                history.append((row["step"], row["train/loss"]))
        settings = {"/".join(u.nested_key) or u.key: json.loads(u.value_json) for u in head.config.update}
        found.append((head.run_id, head.project, settings, history, code))
    return found


def test_wandb_offline(run, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed (the extra jetson_det[wandb])")
    first = tell(WandbTracker("dock"), run, FIRST, "failed")
    assert "to be sent with `wandb sync`" in first.where # no key, no terminal: nothing was asked for
    time.sleep(1.1)
    monkeypatch.setenv("WANDB_MODE", "offline")
    tell(WandbTracker("dock"), run, AGAIN, "finished")
    (a, b) = wandb_records(run)
    assert a[0] == b[0] and a[1] == "dock" and a[2]["train.epochs"] == 100 and (a[4], b[4]) == (1, 0)
    assert a[3] == list(FIRST.items()) and b[3] == list(AGAIN.items())


def test_mlflow_in_a_file(run):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (the extra jetson_det[mlflow])")
    first = tell(MLflowTracker("dock"), run, FIRST, "stopped")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run.parent/'mlflow.db'}")
    assert client.get_run(first.id).info.status == "KILLED"
    second = tell(MLflowTracker("dock"), run, AGAIN, "finished")
    assert second.id == first.id and len(client.search_runs([client.get_experiment_by_name("dock").experiment_id])) == 1
    kept = client.get_run(first.id)
    assert kept.info.status == "FINISHED" and kept.info.run_name == "a" and kept.data.params["train.epochs"] == "100"
    assert len(kept.data.params) == len(flat_config(Config()))
    points = {(m.step, m.value) for m in client.get_metric_history(first.id, "train/loss")}
    assert points == {*FIRST.items(), *AGAIN.items()}


def test_an_mlflow_server_that_is_not_there_is_one_line(run, data, tmp_path, monkeypatch, one_thread):
    pytest.importorskip("mlflow", reason="mlflow is not installed (the extra jetson_det[mlflow])")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    t, said = trained(data, tmp_path, Tracking(make_trackers(["mlflow"]), seconds=20))
    assert t.run.step == 9 and len(said) == 1 and said[0].startswith("mlflow: ") and "secret" not in said[0]


def test_trackers_in_a_real_training(run, data, tmp_path, one_thread):
    pytest.importorskip("wandb", reason="wandb is not installed (the extra jetson_det[wandb])")
    pytest.importorskip("mlflow", reason="mlflow is not installed (the extra jetson_det[mlflow])")
    t, said = trained(data, tmp_path, Evaluate(), Tracking(make_trackers(["tensorboard", "wandb", "mlflow"])))
    plain, _ = trained(data, tmp_path/"b", Evaluate())
    assert torch.equal(weights_of(t), weights_of(plain))
    assert sorted(line.split(" ")[:2]
                  for line in said) == [["mlflow:", "run"], ["wandb:", "run"]] and (tmp_path/"mlflow.db").exists()
    assert {f.name for f in (tmp_path/"run").iterdir()} == {"tensorboard", "wandb", "wandb.json", "mlflow.json"}
