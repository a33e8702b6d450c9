"""A trial's process: watched, ended whole, taken up again. Stand-ins take moments; real trainings are slow."""
import csv
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from trial_helpers import is_gone, job, wait_for

from jetson_det.experiments.trial import epoch_rows, override_words, run_trial, watch_process
from jetson_det.runtime.files import InputError

# writes a row each 50 ms, leaves its number, and ends when its standard input closes
STAND_IN = """
import os, sys, threading, time
out = sys.argv[1]
open(out + "/pid", "w").write(str(os.getpid()))
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(7)), daemon=True).start()
with open(out + "/metrics.csv", "w", buffering=1) as f:
    f.write("epoch,AP\\n")
    for epoch in range(1, int(sys.argv[2]) + 1):
        time.sleep(.05)
        f.write(f"{epoch},{epoch / 100}\\n")
"""
# hears nothing, and has a child in a session of its own, as a kernel of Jupyter is
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], start_new_session=True)
open(sys.argv[1] + "/pids.part", "w").write(f"{__import__('os').getpid()} {child.pid}")
__import__("os").rename(sys.argv[1] + "/pids.part", sys.argv[1] + "/pids")
time.sleep(60)
"""


def command(script, *words): return [sys.executable, "-S", "-c", script, *map(str, words)]


def test_each_row_is_seen_once_and_a_program_runs_to_its_end(tmp_path):
    seen = []
    code, why, reason = watch_process(command(STAND_IN, tmp_path, 4), tmp_path, seen.append)
    assert (code, why, reason) == (0, "", "")
    assert [row["epoch"] for row in seen] == [1, 2, 3, 4] and seen[1] == {"epoch": 2, "AP": .02}


def test_it_is_ended_for_a_reason_a_limit_or_an_event(tmp_path):
    script = command(STAND_IN, tmp_path, 10_000)
    stop = threading.Event()
    stop.set()
    assert watch_process(script, tmp_path, lambda row: row["epoch"] == 2 and "two") == (7, "epoch", "two")
    assert watch_process(script, tmp_path, limit=.5)[:2] == (7, "limit")
    assert watch_process(script, tmp_path, stop=stop)[1] == "stop"
    assert is_gone(int((tmp_path/"pid").read_text()))


def test_an_error_of_the_watcher_ends_it_too(tmp_path):
    def interrupted(row): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): watch_process(command(STAND_IN, tmp_path, 10_000), tmp_path, interrupted)
    assert is_gone(int((tmp_path/"pid").read_text()))


def test_what_hears_nothing_is_killed_with_what_it_started(tmp_path):
    stop = threading.Event()
    thread = threading.Thread(target=lambda: (wait_for((tmp_path/"pids").exists), stop.set()))
    thread.start()
    code, why, _ = watch_process(command(STUBBORN, tmp_path), tmp_path, stop=stop, grace=.2)
    thread.join()
    pids = [int(word) for word in (tmp_path/"pids").read_text().split()]
    assert why == "stop" and code == -signal.SIGKILL and all(map(is_gone, pids))


def test_it_ends_with_a_parent_that_is_killed(tmp_path):
    parent = "import sys; from jetson_det.experiments.trial import watch_process as w; w(sys.argv[2:], sys.argv[1])"
    words = [sys.executable, "-c", parent, str(tmp_path), *command(STAND_IN, tmp_path, 10_000)]
    process = subprocess.Popen(words)
    wait_for(lambda: len(epoch_rows(tmp_path)) > 1)
    process.kill()
    process.wait()
    wait_for(lambda: is_gone(int((tmp_path/"pid").read_text())), 10)


def test_rows_of_a_table_that_is_torn_or_another(tmp_path):
    assert epoch_rows(tmp_path) == []
    (tmp_path/"metrics.csv").write_text("epoch,AP\n1,0.5\n2,\n3,0.")
    assert epoch_rows(tmp_path) == [{"epoch": 1, "AP": .5}, {"epoch": 2, "AP": None}]
    (tmp_path/"metrics.csv").write_text("name,AP\na,b\n")
    assert epoch_rows(tmp_path) == []


def test_wrong_settings_and_anothers_folder_start_nothing(tmp_path):
    with pytest.raises(InputError, match="did you mean 'train.epochs"):
        run_trial(None, {"train.epoch": 3}, tmp_path/"a")
    with pytest.raises(InputError, match="no parameter 'frame'"):
        run_trial(None, {}, tmp_path/"a", parameters={"frame": 3})
    (tmp_path/"b").mkdir()
    (tmp_path/"b"/".trial.json").write_text(json.dumps({"status": "done", "trial": "another"}))
    with pytest.raises(InputError, match="holds a trial with other settings"): run_trial(None, {}, tmp_path/"b")
    assert not (tmp_path/"a").exists()


@pytest.mark.slow
def test_how_a_job_ended_is_told(tmp_path):
    failed = run_trial(None, {}, tmp_path/"a", job=job(tmp_path, "1/0"))
    assert failed.status == "failed" and "ZeroDivisionError" in failed.reason and "\n" not in failed.reason
    killed = run_trial(None, {}, tmp_path/"b", job=job(tmp_path, "import os; os.kill(os.getpid(), 9)"))
    assert killed.status == "killed" and "out of memory?" in killed.reason


SMALL = {
    "data.input_size": [96, 96], "data.workers": 0, "train.threads": 1, "train.batch_size": 2, "train.epochs": 6,
    "train.no_aug_epochs": 1, "train.warmup_epochs": 1, "train.eval_every": 1, "train.device": "cpu",
    "augment.multiscale": 0, "model.weights": "none", "train.recipe": "none", "train.report": False
}
WORDS = {"split": "val", "frames": 2, "repeats": 1}


def rows_of(out):
    "The table without times."
    rows = list(csv.DictReader(open(Path(out)/"metrics.csv")))
    return [{k: v for k, v in r.items() if k not in ("images_per_second", "seconds")} for r in rows]


@pytest.mark.slow
def test_a_real_training_is_stopped_killed_and_comes_to_the_same_end(tmp_path):
    "Stopped by its curve, its parent killed in the middle, and finished: bit for bit what an unbroken one gives."
    from train_helpers import scenes
    data = tmp_path/"data"
    scenes(data)
    out = tmp_path/"broken"
    result = run_trial(None, SMALL, out, data, parameters=WORDS, on_epoch=lambda r: r["epoch"] == 2 and "enough")
    assert (result.status, result.reason) == ("stopped", "enough") and result.metrics == {}
    assert list((out/"checkpoints").iterdir()), "its checkpoint stands"
    parent = ("import json, sys; from jetson_det.experiments.trial import run_trial\n"
              "run_trial(None, json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], parameters=json.loads(sys.argv[4]))")
    process = subprocess.Popen([sys.executable, "-c", parent, json.dumps(SMALL), out, data, json.dumps(WORDS)])
    before = len(result.rows)
    wait_for(lambda: len(epoch_rows(out)) > before or process.poll() is not None, 240)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    seen = []
    result = run_trial(None, SMALL, out, data, parameters=WORDS, on_epoch=lambda r: seen.append(r["epoch"]))
    assert len(family) >= 2 and all(is_gone(p.pid) for p in family), "no orphan trains on"
    assert result.status == "done" and result.metrics["split"] == "val"
    assert result.metrics["checkpoint"]["AP"] is not None
    assert seen == [1, 2, 3, 4, 5, 6]
    unbroken = run_trial(None, SMALL, tmp_path/"unbroken", data, parameters=WORDS)
    assert rows_of(out) == rows_of(unbroken.out)
    started = time.monotonic()
    assert run_trial(None, SMALL, out, data, parameters=WORDS).metrics == result.metrics
    assert time.monotonic() - started < 3, "it is not repeated"


def test_override_words_come_back():
    from jetson_det.config import load_config
    given = {"train.freeze": ["on", "1.0"], "model.name": "yolox-s", "train.lr": None, "model.gains": {"box": 3.5}}
    cfg = load_config(None, override_words(given))
    assert (cfg.train.freeze, cfg.train.lr, cfg.model.gains) == (["on", "1.0"], None, {"box": 3.5})
