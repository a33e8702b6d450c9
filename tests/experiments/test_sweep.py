"""Sweeps: every point once, whatever dies. The trials are scripts of a tenth of a second, run as real processes."""
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna", reason="the sweep extra is not installed")

from jetson_det.config import load_config
from jetson_det.experiments import sweep as sweeps
from jetson_det.experiments.sweep import (best_overrides, open_study, run_sweep, sweep_trials, train_best, trial_slots)
from jetson_det.experiments.sweep_file import read_sweep
from jetson_det.experiments.trial import TrialResult, epoch_rows
from jetson_det.runtime.files import InputError

GRID = "search: {train.lr: [0.01, 0.02, 0.04], augment.mosaic: [0.5, 1.0]}\n"
JOB = '{"cells": [{"cell_type": "code", "source": "", "metadata": {"tags": ["parameters"]}}]}'


def silent(line): pass


@pytest.fixture
def write(tmp_path, monkeypatch):
    "Writes a sweep file whose job needs no data."
    monkeypatch.chdir(tmp_path)
    (tmp_path/"quick.ipynb").write_text(JOB)
    def write(text):
        (tmp_path/"s.yaml").write_text(text + "\njob: quick.ipynb\n")
        return read_sweep("s.yaml")
    return write


class Quick:
    "In the place of `run_trial`: figures from the settings, and what is to go wrong."
    def __init__(self, epochs=0, wrong=None):
        self.calls = []
        self.epochs = epochs
        self.wrong = wrong or {} # (folder, number of the call) -> TrialResult's status, or an exception

    def __call__(self, config, overrides, out, on_epoch=None, **kw):
        self.calls.append(out.name)
        number = self.calls.count(out.name)
        wrong = self.wrong.get((out.name, number))
        if isinstance(wrong, BaseException): raise wrong
        if wrong: return TrialResult(wrong, "a bad day", {}, out, 0.)
        ap = .5 - abs(overrides["train.lr"] - .02) * 5 + overrides.get("augment.mosaic", 0) / 100
        for epoch in range(1, self.epochs + 1):
            reason = on_epoch({"epoch": epoch, "AP": ap * epoch / self.epochs, "AP50": None})
            if reason: return TrialResult("stopped", reason, {}, out, 0.)
        return TrialResult("done", "", {"AP": ap}, out, 0.)


def test_a_grid_is_tried_once_and_the_best_is_written(write, tmp_path):
    sweep = write(GRID)
    quick = Quick()
    rows = run_sweep(sweep, tmp_path/"out", trial=quick, jobs=3, say=silent)
    assert sorted(quick.calls) == [f"{i:04d}" for i in range(6)]
    assert rows[0]["settings"] == {"train.lr": .02, "augment.mosaic": 1.0} and rows[0]["point"] == 3
    cfg = load_config(tmp_path/"out"/"best.yaml")
    assert (cfg.train.lr, cfg.augment.mosaic) == (.02, 1.)
    assert load_config(tmp_path/"out"/"best_resolved.yaml") == cfg
    assert json.loads((tmp_path/"out"/"sweep.json").read_text())["trials"][0]["value"] == pytest.approx(.51)
    assert run_sweep(sweep, tmp_path/"out", trial=quick, say=silent) == rows and len(quick.calls) == 6


def test_listed_points_and_lists_as_values(write, tmp_path):
    sweep = write("points:\n  - {train.lr: 0.02, augment.mosaic_scale: [0.3, 1.7]}\n  - {train.lr: 0.04}\n")
    rows = run_sweep(sweep, tmp_path/"out", trial=Quick(), say=silent)
    assert best_overrides(sweep, rows) == {"train.lr": .02, "augment.mosaic_scale": [.3, 1.7]}
    assert load_config(tmp_path/"out"/"best.yaml").augment.mosaic_scale == [.3, 1.7]
    assert rows[1]["settings"] == {"train.lr": .04}


def test_what_failed_is_tried_again_and_wrong_settings_are_not(write, tmp_path):
    wrong = {("0000", 1): "failed", ("0001", 1): "killed", ("0002", 1): InputError("no such class"),
             ("0003", 1): "failed", ("0003", 2): "failed", ("0004", 1): "stopped"}
    quick = Quick(wrong=wrong)
    rows = {r["point"]: r for r in run_sweep(write(GRID), tmp_path/"out", trial=quick, say=silent)}
    assert [quick.calls.count(f"{i:04d}") for i in range(6)] == [2, 2, 1, 2, 1, 1]
    assert [rows[i]["status"] for i in range(6)] == ["done", "done", "failed", "failed", "stopped", "done"]
    assert rows[2]["reason"] == "no such class"


def test_a_sweep_in_which_nothing_was_done(write, tmp_path):
    sweep = write("retries: 0\nsearch: {train.lr: [0.01, 0.02]}\n")
    wrong = {(f"{i:04d}", 1): "failed" for i in range(2)}
    rows = run_sweep(sweep, tmp_path/"out", trial=Quick(wrong=wrong), say=silent)
    with pytest.raises(InputError, match="no trial was done; trial 1: a bad day"): best_overrides(sweep, rows)
    assert not (tmp_path/"out"/"best.yaml").exists() and (tmp_path/"out"/"sweep.json").exists()


def test_a_trial_that_raises_ends_the_sweep_which_goes_on_later(write, tmp_path):
    quick = Quick(wrong={("0002", 1): OSError("no space left")})
    with pytest.raises(OSError, match="no space"):
        run_sweep(write(GRID), tmp_path/"out", trial=quick, jobs=1, say=silent)
    assert len(quick.calls) == 3
    rows = run_sweep(write(GRID), tmp_path/"out", trial=quick, say=silent)
    assert all(row["status"] == "done" for row in rows) and len(rows) == 6 and len(quick.calls) == 7


def test_another_sweep_does_not_go_on_in_the_folder(write, tmp_path):
    run_sweep(write("search: {train.lr: [0.01]}"), tmp_path/"out", trial=Quick(), say=silent)
    other = write("search: {train.lr: [0.02]}")
    with pytest.raises(InputError, match="began with other settings"):
        run_sweep(other, tmp_path/"out", trial=Quick(), say=silent)


def test_random_goes_on_with_more(write, tmp_path):
    text = "search: {train.lr: {low: 0.001, high: 0.1, log: true}}\nmethod: random\ntrials: "
    quick = Quick()
    run_sweep(write(text + "2"), tmp_path/"out", trial=quick, say=silent)
    rows = run_sweep(write(text + "3"), tmp_path/"out", trial=quick, say=silent)
    assert len(quick.calls) == 3 == len({row["settings"]["train.lr"] for row in rows})


def test_tpe_counts_its_trials_and_goes_on_with_more(write, tmp_path):
    text = "search: {train.lr: {low: 0.001, high: 0.1, log: true}}\nmethod: tpe\ntrials: "
    quick = Quick(wrong={("0001", 1): "failed"})
    run_sweep(write(text + "2"), tmp_path/"out", trial=quick, say=silent)
    rows = run_sweep(write(text + "3"), tmp_path/"out", trial=quick, say=silent)
    assert sorted(quick.calls) == ["0000", "0001", "0001", "0002"]
    assert sorted(row["point"] for row in rows) == [0, 1, 2] and len({row["settings"]["train.lr"] for row in rows}) == 3


@pytest.mark.slow
def test_tpe_finds_better_ones_and_counts_its_trials(write, tmp_path):
    text = "search: {train.lr: {low: 0.001, high: 0.1, log: true}}\nmethod: tpe\nseed: 3\ntrials: "
    quick = Quick(wrong={("0002", 1): "failed"})
    run_sweep(write(text + "15"), tmp_path/"out", trial=quick, jobs=2, say=silent)
    rows = run_sweep(write(text + "25"), tmp_path/"out", trial=quick, jobs=1, say=silent)
    assert len(rows) == 25 and len(quick.calls) == 26 and sorted(r["point"] for r in rows) == list(range(25))
    off = {r["point"]: abs(r["settings"]["train.lr"] - .02) for r in rows}
    assert sum(off[i] for i in range(15, 25)) / 10 < sum(off[i] for i in range(10)) / 10


@pytest.mark.parametrize("prune", ["quarter", pytest.param("median", marks=pytest.mark.slow)])
def test_bad_curves_are_pruned_after_their_first_epochs(write, tmp_path, prune):
    text = f"search: {{train.lr: [0.02, 0.021, 0.022, 0.023, 0.09, 0.0205]}}\nprune: {prune}\nprune_after: 3\nset:" \
           " {train.epochs: 9}\n"
    rows = run_sweep(write(text), tmp_path/"out", trial=Quick(epochs=9), jobs=1, say=silent)
    by_point = {row["point"]: row for row in rows}
    assert by_point[4]["status"] == "pruned" and "after epoch 3" in by_point[4]["reason"]
    assert all(by_point[i]["status"] == "done" for i in (0, 1, 2, 3, 5))
    assert max(by_point[4]["curve"]) == 3 and rows[-1]["point"] == 4


def test_a_kill_between_two_lines_of_the_books_loses_no_point(write, tmp_path, monkeypatch):
    "The new attempt is written, and the process dies before it closes the old one; then before it has an owner."
    sweep = write(GRID)
    out = tmp_path/"out"
    out.mkdir()
    study = open_study(out)
    sweeps._take(study, sweep)
    monkeypatch.setattr(sweeps, "_is_gone", lambda owner: True)
    class Killed(BaseException): pass
    def die(*a, **kw): raise Killed
    with monkeypatch.context() as m:
        m.setattr(type(study), "tell", die)
        with pytest.raises(Killed): sweeps._put_right(study, sweep)
    with monkeypatch.context() as m:
        m.setattr(optuna.Trial, "set_user_attr", die)
        with pytest.raises(Killed): sweeps._take(study, sweep)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    owners = [t.user_attrs.get("owner") for t in study.get_trials() if t.state.name == "RUNNING"]
    assert owners == [None]
    quick = Quick()
    rows = run_sweep(sweep, out, trial=quick, jobs=1, say=silent)
    assert sorted(quick.calls) == [f"{i:04d}" for i in range(6)] and len(rows) == 6


def test_an_attempt_of_another_host_is_left_until_its_heartbeat_is_old(write, tmp_path):
    sweep = write(GRID)
    out = tmp_path/"out"
    out.mkdir()
    study = open_study(out)
    trial, point, _ = sweeps._take(study, sweep)
    study._storage.record_heartbeat(trial._trial_id)
    trial.set_user_attr("owner", dict(host="another", pid=1, began=0.))
    sweeps._put_right(study, sweep)
    assert study.trials[trial.number].state.name == "RUNNING"
    with sqlite3.connect(out/"study.db") as db:
        db.execute("UPDATE trial_heartbeats SET heartbeat='2000-01-01 00:00:00'")
    quick = Quick()
    rows = run_sweep(sweep, out, trial=quick, say=silent)
    assert len(rows) == 6 == len(quick.calls) and study.trials[trial.number].state.name == "FAIL"


def test_one_who_comes_late_without_the_lock_invents_no_point(write, tmp_path, monkeypatch):
    "Another machine took the last attempt between the look and the question."
    sweep = write("search: {train.lr: [0.01]}")
    study = open_study(tmp_path)
    ask = study.ask
    def late():
        monkeypatch.setattr(study, "ask", ask)
        ask().set_user_attr("owner", dict(host="another", pid=1, began=0.))
        return ask()
    monkeypatch.setattr(study, "ask", late)
    assert sweeps._take(study, sweep) is sweeps.WAIT
    assert list(sweeps._attempts(study)) == [0] and sweeps._take(study, sweep) is sweeps.WAIT


@pytest.mark.parametrize("new", [True, False])
def test_both_names_of_the_callback_are_taken(monkeypatch, new):
    seen = {}
    def database(url, heartbeat_interval, grace_period, failed_trial_callback=None, engine_kwargs=None):
        seen.update(callback=failed_trial_callback)
    def renamed(url, heartbeat_interval, grace_period, heartbeat_stale_trial_callback=None, engine_kwargs=None):
        seen.update(callback=heartbeat_stale_trial_callback)
    monkeypatch.setattr(optuna.storages, "RDBStorage", renamed if new else database)
    if not new: monkeypatch.delattr(optuna.storages, "RetryHeartbeatStaleTrialCallback")
    with sweeps._quiet(): sweeps._storage("sqlite:///x.db")
    assert callable(seen["callback"])


def test_as_many_at_once_as_there_are_devices(monkeypatch):
    cfg = load_config(None, ["train.threads=1"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert len(trial_slots(cfg)) == 8 and len(trial_slots(load_config())) == 1
    assert trial_slots(load_config(), jobs=2) == [{"OMP_NUM_THREADS": "4"}] * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert trial_slots(cfg) == [{"CUDA_VISIBLE_DEVICES": "1"}, {"CUDA_VISIBLE_DEVICES": "3"}]
    assert len(trial_slots(load_config(None, ["train.device=cpu", "train.threads=4"]))) == 2


def test_data_is_opened_before_the_first_trial(write, tmp_path):
    sweep = write(GRID)
    sweep.job = "train"
    quick = Quick()
    for data, what in (("", "no data; give --data"), (tmp_path/"nowhere", "nowhere")):
        with pytest.raises(InputError, match=what): run_sweep(sweep, tmp_path/"out", data, trial=quick, say=silent)
    assert not quick.calls and not (tmp_path/"out").exists()


def test_the_best_in_full(write, tmp_path):
    sweep = write("search: {train.lr: [0.02, 0.04], augment.mosaic: [1.0]}\nfull: {train.epochs: 100}\n")
    quick = Quick()
    rows = run_sweep(sweep, tmp_path/"out", trial=quick, say=silent)
    result, settings = train_best(sweep, rows, tmp_path/"out", trial=quick)
    assert settings == {"train.lr": .02, "augment.mosaic": 1.0, "train.epochs": 100} and result.status == "done"
    assert result.out.parent == tmp_path/"out"


# A sweep as a program of its own: its trials are processes that write a line each time one begins, goes on or ends.
TRIAL = """
import json, os, sys, threading, time
out, log, lr = sys.argv[1:4]
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(7)), daemon=True).start()
table = out + "/metrics.csv"
rows = len(open(table).readlines()) - 1 if os.path.exists(table) else 0
def say(word):
    with open(log, "a") as f: f.write(f"{os.path.basename(out)} {word} {rows} {os.getpid()} {os.getppid()}\\n")
if os.path.exists(out + "/metrics.json"): sys.exit(0) # done before, as `run_trial` knows it
say("begins")
if not rows: open(table, "w").write("epoch,AP\\n")
for epoch in range(rows + 1, 5):
    time.sleep(.06)
    with open(table, "a") as f: f.write(f"{epoch},{float(lr) * epoch}\\n")
with open(out + "/metrics.json", "w") as f: json.dump({"AP": float(lr)}, f)
say("ends")
"""
PROGRAM = """
import sys
from pathlib import Path
from jetson_det.experiments.sweep import run_sweep
from jetson_det.experiments.sweep_file import read_sweep
from jetson_det.experiments.trial import TrialResult, watch_process
script, log = sys.argv[1:3]
def trial(config, overrides, out, on_epoch=None, stop=None, **kw):
    command = [sys.executable, "-S", "-c", script, str(out), log, str(overrides["train.lr"])]
    code, why, reason = watch_process(command, out, on_epoch, stop=stop)
    if why: return TrialResult("killed", reason, {}, out, 0.)
    return TrialResult("done", "", {"AP": overrides["train.lr"]}, out, 0.)
run_sweep(read_sweep("s.yaml"), "out", jobs=int(sys.argv[3]), trial=trial)
"""


class Program:
    "Starts sweeps, and reads what their trials wrote."
    def __init__(self, folder):
        self.folder = folder
        self.log = folder/"log"

    def start(self, jobs=1):
        words = [sys.executable, "-c", PROGRAM, TRIAL, str(self.log), str(jobs)]
        return subprocess.Popen(words, cwd=self.folder, stdout=subprocess.DEVNULL)

    def lines(self, word):
        text = self.log.read_text() if self.log.exists() else ""
        return [line.split() for line in text.splitlines() if f" {word} " in line]

    def wait(self, moment, seconds=120):
        end = time.monotonic() + seconds
        while not moment():
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(.01)


def test_a_sweep_that_is_killed_in_a_trial_loses_nothing_and_repeats_nothing(write, tmp_path):
    write("search: {train.lr: [0.01, 0.02, 0.03, 0.04]}\n")
    program = Program(tmp_path)
    first = program.start()
    program.wait(lambda: len(epoch_rows(tmp_path/"out"/"trials"/"0001")) >= 2)
    first.kill()
    first.wait()
    assert program.start().wait(120) == 0
    ends = [line[0] for line in program.lines("ends")]
    assert sorted(ends) == ["0000", "0001", "0002", "0003"], "each once"
    begins = program.lines("begins")
    assert [line[0] for line in begins].count("0000") == 1, "what was done is not done again"
    again = [int(line[2]) for line in begins if line[0] == "0001"]
    assert len(again) == 2 and again[1] >= 2, "it goes on where it was"
    for i in range(4): assert [r["epoch"] for r in epoch_rows(tmp_path/"out"/"trials"/f"{i:04d}")] == [1, 2, 3, 4]
    rows = sweep_trials(tmp_path/"out")
    assert [row["value"] for row in rows] == [.04, .03, .02, .01] and {r["attempts"] for r in rows} == {1, 2}


@pytest.mark.slow
def test_several_programs_share_a_sweep_and_take_over_what_one_leaves(write, tmp_path):
    write("search: {train.lr: [" + ", ".join(f"0.{i:02d}" for i in range(1, 25)) + "]}\n")
    program = Program(tmp_path)
    programs = [program.start(2) for _ in range(3)]
    program.wait(lambda: len(program.lines("ends")) >= 6)
    programs[1].kill()
    for process in programs: process.wait(300)
    assert [p.returncode for p in programs] == [0, -9, 0]
    assert {line[0] for line in program.lines("ends")} == {f"{i:04d}" for i in range(24)}
    begins = [(line[0], int(line[4])) for line in program.lines("begins")]
    points = [point for point, _ in begins]
    for point in {point for point in points if points.count(point) > 1}:
        assert next(parent for p, parent in begins if p == point) == programs[1].pid, "only those of the killed one"
    rows = sweep_trials(tmp_path/"out")
    assert len(rows) == 24 and {row["status"] for row in rows} == {"done"}


@pytest.mark.slow
def test_ctrl_c_ends_the_trials_and_the_sweep_goes_on_later(write, tmp_path):
    write("search: {train.lr: [0.01, 0.02, 0.03, 0.04]}\n")
    program = Program(tmp_path)
    first = program.start(2)
    program.wait(lambda: len(program.lines("begins")) >= 3)
    first.send_signal(signal.SIGINT)
    assert first.wait(120) != 0
    pids = {int(line[3]) for line in program.lines("begins")} - {int(line[3]) for line in program.lines("ends")}
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert {r["status"] for r in sweep_trials(tmp_path/"out")} <= {"done", "killed", "waiting"}
    assert program.start(2).wait(120) == 0
    assert sorted(line[0] for line in program.lines("ends")) == ["0000", "0001", "0002", "0003"]
    assert not any("error" in t.user_attrs for t in open_study(tmp_path/"out").trials), "no attempt was used up"


def test_threads_take_different_points(write, tmp_path):
    "Six threads at once, each slow enough to meet the others."
    meeting = threading.Barrier(6, timeout=60)
    quick = Quick()
    def slow(*a, **kw):
        meeting.wait()
        return quick(*a, **kw)
    run_sweep(write(GRID), tmp_path/"out", trial=slow, jobs=6, say=silent)
    assert sorted(quick.calls) == [f"{i:04d}" for i in range(6)]


SMALL = """
data.input_size: [96, 96]
data.workers: 0
train.threads: 1
train.batch_size: 2
train.epochs: 2
train.no_aug_epochs: 1
train.warmup_epochs: 1
train.eval_every: 1
train.device: cpu
augment.multiscale: 0
model.weights: none
train.recipe: none
train.report: false
"""


@pytest.mark.slow
def test_real_trainings_from_the_file_to_the_page(tmp_path, monkeypatch):
    "Two trainings, one of them ended by its own error at first; the summary; the best in full."
    from train_helpers import scenes
    from jetson_det.experiments.jobs import run_job
    monkeypatch.chdir(tmp_path)
    scenes(tmp_path/"data")
    (tmp_path/"s.yaml").write_text("set:\n" + SMALL.strip().replace("\n", "\n  ").join(["  ", "\n"]) +
                                   "search: {train.lr: [0.001, 0.01]}\nparameters: {frames: 2, repeats: 1}\n"
                                   "full: {train.epochs: 3}\n")
    sweep = read_sweep("s.yaml")
    rows = run_sweep(sweep, "out", "data", say=silent)
    assert [row["status"] for row in rows] == ["done", "done"] and set(rows[0]["curve"]) == {1, 2}
    page = run_job("sweep", {"folder": "out", "best": 2, "resamples": 100}, "out/summary")
    metrics = json.loads((tmp_path/"out"/"summary"/"metrics.json").read_text())
    assert len(metrics["intervals"]) == 2 and metrics["split"] == "val" and page.is_file()
    assert load_config("out/best.yaml").train.lr == rows[0]["settings"]["train.lr"]
    result, settings = train_best(sweep, rows, "out", "data")
    assert result.status == "done" and result.metrics["epochs"] == 3 and settings["train.epochs"] == 3


@pytest.mark.slow
def test_the_shipped_sweep_runs_in_toy_size(tmp_path, monkeypatch):
    "Two of its nine points: every setting of the file reaches a real training."
    pytest.importorskip("ultralytics")
    from train_helpers import scenes
    monkeypatch.chdir(tmp_path)
    scenes(tmp_path/"data")
    sweep = read_sweep("p2_small_objects")
    sweep.points = [sweep.points[1], sweep.points[8]]
    sweep.set.update({"data.input_size": [96, 96], "data.workers": 0, "train.threads": 1, "train.batch_size": 2,
                      "train.epochs": 2, "train.eval_every": 1, "train.device": "cpu", "augment.multiscale": 0,
                      "model.weights": "none", "train.report": False})
    sweep.parameters = {"frames": 2, "repeats": 1}
    rows = run_sweep(sweep, "out", "data", jobs=1, say=silent)
    assert [row["status"] for row in rows] == ["done", "done"], rows
    for row in rows:
        cfg = load_config(f"out/{row['folder']}/config.yaml")
        point = sweep.points[row["point"]]
        assert (cfg.train.lr, cfg.train.warmup_epochs) == (point["train.lr"], point["train.warmup_epochs"])
        assert cfg.model.gains == {"box": point["model.gains.box"], "dfl": point["model.gains.dfl"]}
        assert cfg.augment.copy_paste == point["augment.copy_paste"] and cfg.train.accumulate == 3
