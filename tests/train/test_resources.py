"""What a training takes, and a disk that gets full."""
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from callback_helpers import At
from train_helpers import config, scenes

from jetson_det.models.checkpoint import list_checkpoints
from jetson_det.train.callbacks import resources
from jetson_det.train.callbacks.log import read_table
from jetson_det.train.callbacks.resources import DiskWatch, ResourceLog
from jetson_det.train.data import training_data
from jetson_det.train.loop import Trainer, train
from jetson_det.train.state import TrainingError


@pytest.fixture(scope="module")
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data")/"dock")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    "A finished run."
    out = tmp_path_factory.mktemp("runs")/"whole"
    train(config(data), out)
    return out


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
