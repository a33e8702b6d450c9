"""Signals, workers that stand still or die, closed terminals: what was trained is saved, and one line says how to go
on."""
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from signals import hear_ctrl_c, hearing_ctrl_c
from train_helpers import QUICK, command_in_child, config, forkserver, result_of, scenes

from jetson_det.data import workers
from jetson_det.models.checkpoint import list_checkpoints, newest_whole
from jetson_det.train import loop
from jetson_det.train.callbacks.base import Callback
from jetson_det.train.callbacks.checkpoints import SaveCheckpoints
from jetson_det.train.callbacks.stop import StopOnSignal
from jetson_det.train.loop import train
from jetson_det.train.state import Interrupted, Stopped, TrainingError

pytestmark = pytest.mark.usefixtures("one_thread")
SELDOM = ["train.save_minutes=5", "train.save_every=50"] # nothing is saved but at the end of an epoch


@pytest.fixture(scope="module")
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    "A training that nothing has interrupted."
    out = tmp_path_factory.mktemp("runs")/"whole"
    train(config(data, *SELDOM), out)
    return out


class At(Callback):
    "Does something after a step."
    def __init__(self, step, do): self.step, self.do = step, do
    def after_step(self, t):
        if self.step == t.run.step: self.do(t)


def with_callback(monkeypatch, callback, before=None):
    "The usual callbacks and one more: before one of a class, else first of all."
    usual = loop.default_callbacks
    def callbacks():
        found = usual()
        at = next((i for i, c in enumerate(found) if before and isinstance(c, before)), 0)
        return [*found[:at], callback, *found[at:]]
    monkeypatch.setattr(loop, "default_callbacks", callbacks)


def resumed(data, out, *more): return train(config(data, *SELDOM, *more), out, resume=True)


@pytest.mark.parametrize("before, name", [
    (SaveCheckpoints, "SIGINT"), (SaveCheckpoints, "SIGHUP"), (StopOnSignal, "SIGTERM"),
    *(pytest.param(*pair, marks=pytest.mark.slow)
      for pair in ((SaveCheckpoints, "SIGTERM"), (StopOnSignal, "SIGINT"), (StopOnSignal, "SIGHUP")))])
def test_what_is_said_to_be_saved_is(tmp_path, data, whole, monkeypatch, name, before):
    "The signal comes before the checkpoint callback has looked, or after."
    out = tmp_path/"run"
    knock = At(4, lambda t: os.kill(os.getpid(), getattr(signal, name)))
    with monkeypatch.context() as m, hearing_ctrl_c():
        with_callback(m, knock, before)
        with pytest.raises(Stopped, match=f"^stopped by {name} after step 4 of 9; saved; go on with: .* --resume$"):
            train(config(data, *SELDOM), out)
    assert newest_whole(out).name == "step-00000004"
    resumed(data, out)
    assert result_of(out) == result_of(whole)


def test_the_second_ctrl_c_says_how_to_go_on_too(tmp_path, data, monkeypatch):
    out = tmp_path/"run"
    def twice(t):
        for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
    with monkeypatch.context() as m, hearing_ctrl_c():
        with_callback(m, At(4, twice))
        words = "^interrupted; saved up to step 3; go on with: jetson-det train --out .* --resume$"
        with pytest.raises(Interrupted, match=words):
            train(config(data, "train.save_minutes=5", "train.save_every=1"), out)


def test_a_screen_that_is_gone_ends_nothing(tmp_path, data, monkeypatch):
    class Gone:
        encoding = "utf-8"
        def write(self, text): raise OSError(5, "Input/output error")
        def flush(self): raise OSError(5, "Input/output error")
    monkeypatch.setattr(sys, "stdout", Gone())
    assert train(config(data, "train.epochs=1"), tmp_path/"run")["steps"] == 3
    assert "epoch 1/1" in (tmp_path/"run"/"log.txt").read_text()


# ---- loader workers

def worker_of(t): return t.loader._pool._processes[0].pid


@pytest.mark.parametrize("step", [1, 4]) # nothing is saved yet; in the second epoch
def test_a_worker_that_is_killed_costs_nothing(tmp_path, data, whole, monkeypatch, step):
    out = tmp_path/"run"
    def kill(t):
        os.kill(worker_of(t), signal.SIGKILL)
        time.sleep(.1)
    with monkeypatch.context() as m:
        with_callback(m, At(step, kill))
        with pytest.raises(TrainingError) as e: train(config(data, *SELDOM, "data.workers=1"), out)
    line = str(e.value)
    assert line.startswith("a loader worker ended by itself (exit code -9") and "\n" not in line
    newest = int(newest_whole(out).name[5:])
    assert newest >= step and f"saved up to step {newest}; go on with: jetson-det train --out {out} --resume" in line
    resumed(data, out)
    assert result_of(out) == result_of(whole)


def test_an_image_that_is_gone_costs_nothing(tmp_path, whole, monkeypatch):
    mine = scenes(tmp_path/"data") # the same images
    cfg = config(mine, *SELDOM)
    out = tmp_path/"run"
    images = [p for p in mine.rglob("*.jpg")]
    content = {p: p.read_bytes() for p in images}
    def remove(t):
        t.loader.maker.cache = type(t.loader.maker.cache)(t.train_ds, t.loader.maker.cache.detail, 1)
        for p in images: p.unlink()
    with monkeypatch.context() as m:
        with_callback(m, At(4, remove))
        with pytest.raises(Exception, match="saved up to step 4; go on with") as e: train(cfg, out)
    assert ".jpg" in str(e.value)
    for p, data in content.items(): p.write_bytes(data)
    train(cfg, out, resume=True)
    assert result_of(out) == result_of(whole)


def test_a_worker_that_stands_still_is_said_and_ctrl_c_ends_it(tmp_path, data, whole, monkeypatch, capsys):
    out = tmp_path/"run"
    pids = []
    def stop_worker(t):
        pids.append(worker_of(t))
        os.kill(pids[0], signal.SIGSTOP)
        t.loader._pool.say = say
    def say(line): # the training waits for the worker by now
        print(line)
        threading.Timer(.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    monkeypatch.setattr(workers, "STALL_SECONDS", .3)
    monkeypatch.setattr(workers, "STOP_SECONDS", .5)
    with monkeypatch.context() as m, hearing_ctrl_c():
        with_callback(m, At(4, stop_worker))
        with pytest.raises(Stopped) as e: train(config(data, *SELDOM, "data.workers=1"), out)
    line = str(e.value)
    step = int(newest_whole(out).name[5:])
    assert line.startswith(f"stopped by SIGINT after step {step} of 9: loader worker 0 (process {pids[0]}), at batch")
    assert line.endswith(f"saved up to step {step}; go on with: jetson-det train --out {out} --resume")
    said = [text for text in capsys.readouterr().out.splitlines() if "stands still" in text]
    assert len(said) == 1 and f"loader worker 0 (process {pids[0]}), at batch" in said[0] and ".jpg" in said[0]
    assert not psutil.pid_exists(pids[0])
    resumed(data, out)
    assert result_of(out) == result_of(whole)


# ---- the program as it is called

MAIN = "import sys; from jetson_det.cli import main; sys.exit(main())"


ENDLESS = ["train.epochs=500", "train.eval_every=500", "train.trackers=[]", "train.save_minutes=0.0001"]


def saved_twice(out, lives):
    end = time.monotonic() + 90
    while len(list_checkpoints(out)) < 2 and lives() and time.monotonic() < end: time.sleep(.05)


@pytest.fixture
def program(tmp_path, data):
    "Starts `jetson-det train`; waits until it has saved twice."
    started = []
    def start():
        call = [sys.executable, "-c", MAIN, "train", "--data", str(data), "--out", str(tmp_path/"run"), *QUICK,
                *ENDLESS]
        process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                   preexec_fn=hear_ctrl_c)
        started.append(process)
        saved_twice(tmp_path/"run", lambda: process.poll() is None)
        return process
    yield start
    for process in started:
        process.kill()
        process.communicate()


def last_line(process, limit=30):
    _, errors = process.communicate(timeout=limit)
    return process.returncode, errors.strip().splitlines()[-1]


def test_ctrl_c_is_no_error(tmp_path, program):
    process = program()
    process.send_signal(signal.SIGINT)
    code, line = last_line(process)
    assert code == 1 and line.startswith("stopped by SIGINT after step") and line.endswith("--resume")


def patient_command(words, out):
    "In a process: `jetson-det`, which gives a worker ten minutes for its end."
    workers.STOP_SECONDS = 600
    signal.signal(signal.SIGINT, signal.default_int_handler) # as a Python that has just started
    command_in_child(words, out, small=False)


def test_a_second_ctrl_c_says_how_to_go_on(tmp_path, data):
    "While a worker stands still, so that the step does not end."
    out = tmp_path/"run"
    words = ["train", "--data", data, "--out", out, *QUICK, *ENDLESS, "data.workers=1"]
    process = forkserver().Process(target=patient_command, args=(words, out))
    process.start()
    worker = None
    try:
        saved_twice(out, process.is_alive)
        worker = psutil.Process(process.pid).children()[0]
        worker.suspend()
        for _ in range(2):
            time.sleep(1.5)
            os.kill(process.pid, signal.SIGINT)
        process.join(60)
    finally:
        if worker is not None:
            with contextlib.suppress(psutil.NoSuchProcess): worker.kill()
        process.kill()
        process.join()
    line = (tmp_path/"run.txt").read_text().strip().splitlines()[-1]
    assert process.exitcode == 130 and line.startswith("interrupted; saved up to step")
    assert line.endswith(f"go on with: jetson-det train --out {tmp_path/'run'} --resume") and not worker.is_running()
