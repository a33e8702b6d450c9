"""What a run writes down: its folder, its settings, its journal, its lock."""
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from callback_helpers import finished_run, hashes
from command_helpers import run_command
from train_helpers import EACH_STEP, config, scenes

from jetson_det.config import load_config, save_config
from jetson_det.core import InputError
from jetson_det.data.dataset import DetDataset
from jetson_det.models.checkpoint import checkpoint_path, list_checkpoints, verify
from jetson_det.train import environment, loop, run_folder
from jetson_det.train.data import training_data
from jetson_det.train.environment import git_state
from jetson_det.train.loop import train
from jetson_det.train.rollback import rollback
from jetson_det.train.state import NotWritten, TrainingError, not_written
from jetson_det.train.run_folder import (check_run_folder, check_same_data, default_run_folder, hold_run, journal,
                                         read_journal)

KEEP = [*EACH_STEP, "train.keep=20"]
ONE = ["train.epochs=1", "train.trackers=[]", "train.resource_seconds=0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data")/"dock")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory): return finished_run(config(data, *KEEP), tmp_path_factory.mktemp("runs")/"whole")


@pytest.fixture(scope="module")
def short(data, tmp_path_factory):
    "A run of one epoch."
    out = tmp_path_factory.mktemp("runs")/"short"
    train(config(data, *ONE), out)
    return out


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


def test_no_second_process_trains_or_goes_back_in_a_run(tmp_path, data, short):
    out = shutil.copytree(short, tmp_path/"run")
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        other.stdout.readline()
        for call in (lambda: train(config(data, *ONE), out, resume=True), lambda: rollback(out)):
            with pytest.raises(InputError, match="is at work in this run"): call()
    finally:
        other.kill()
        other.wait()


def test_what_a_kill_left_half_written_is_no_hindrance(tmp_path, data, short):
    "A file, or a folder of weights, that a killed process was writing beside the others."
    shutil.copytree(short, tmp_path/"run")
    (tmp_path/"run"/".best.part").mkdir()
    (tmp_path/"run"/".best.part"/"weights.safetensors").write_bytes(b"torn")
    (tmp_path/"run"/".resolved.json.1.part").write_bytes(b"{")
    train(config(data, *ONE), tmp_path/"run", resume=True)
    assert not [p.name for p in (tmp_path/"run").iterdir() if p.name.endswith(".part")]


# ---- nothing is replaced

def once(monkeypatch, name, do):
    "The next call of a function of the loop does something else first."
    real = getattr(loop, name)
    def first(*args, **kw):
        monkeypatch.setattr(loop, name, real)
        do()
        return real(*args, **kw)
    monkeypatch.setattr(loop, name, first)


def test_a_training_that_came_first_is_not_replaced(tmp_path, data, monkeypatch):
    "It begins and ends while the second one reads its data, in the folder that both were given."
    out = tmp_path/"run"
    once(monkeypatch, "training_data", lambda: train(config(data, *ONE), out))
    with pytest.raises(InputError, match="is not empty .*; choose another folder with --out"):
        train(config(data, *ONE, "train.seed=1"), out)
    assert "seed: 0" in (out/"config.yaml").read_text() and [e["event"] for e in read_journal(out)] == ["began"]
    assert (out/"log.txt").read_text().count("trained in") == 1


def test_a_resumed_training_does_not_go_back_behind_another(tmp_path, data, monkeypatch):
    out = tmp_path/"run"
    cfg = config(data, *ONE, *EACH_STEP)
    train(cfg, out)
    shutil.rmtree(checkpoint_path(out, 3))
    for name in ("best", "last"): shutil.rmtree(out/name)
    (out/"metrics.json").unlink()
    once(monkeypatch, "load_checkpoint", lambda: train(cfg, out, resume=True))
    with pytest.raises(InputError, match="another process has trained in this run meanwhile"):
        train(cfg, out, resume=True)
    assert [e["event"] for e in read_journal(out)] == ["began", "resumed"] and (out/"metrics.json").exists()


def test_a_run_is_held_against_this_process_too(tmp_path):
    with hold_run(tmp_path):
        with pytest.raises(InputError, match="this process is at work"):
            with hold_run(tmp_path/"."): pass
    with hold_run(tmp_path): pass


FOLDERS = {
    "of a run without a checkpoint": {"config.yaml": "train:\n  epochs: 1\n", "environment.json": "{}"},
    "of a job's results": {"config.yaml": "", "metrics.json": '{"onnx": 1}', "train.html": "<html>", "model.onnx": "x"},
    "of shipped weights alone": {"config.yaml": "", "best/manifest.json": "{}", "last/manifest.json": "{}"},
    "with a page alone": {"train.ipynb": "{}"},
    "that is empty": {},
}

@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)
def test_to_resume_without_a_checkpoint_is_an_error_and_changes_nothing(tmp_path, data, files):
    out = tmp_path/"run"
    out.mkdir()
    for name, text in files.items():
        (out/name).parent.mkdir(exist_ok=True)
        (out/name).write_text(text)
    before = hashes(out)
    with pytest.raises(InputError, match="no checkpoint to resume from|no run to resume") as e:
        train(config(data, *ONE), out, resume=True)
    assert "\n" not in str(e.value) and str(out) in str(e.value)
    assert hashes(out) == before and sum(f.is_file() for f in out.rglob("*")) == len(files)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path, data, short, capsys):
    out = shutil.copytree(short, tmp_path/"run")
    cfg = config(data, *ONE)
    before = json.loads((out/"metrics.json").read_text())["val"]["stats"]
    for name in ("checkpoints", "best", "last"): shutil.rmtree(out/name)
    (out/"metrics.json").unlink()
    (out/".config.yaml.part").write_text("half")
    assert train(cfg, out, resume=True)["val"]["stats"] == before
    assert "begins anew: nothing was saved before it was ended" in capsys.readouterr().out
    assert not (out/".config.yaml.part").exists()
    assert [e["event"] for e in read_journal(out)] == ["began", "resumed"]


def test_a_run_whose_checkpoints_are_gone_is_not_trained_over(tmp_path, data, short):
    out = shutil.copytree(short, tmp_path/"run")
    cfg = config(data, *ONE)
    shutil.rmtree(out/"checkpoints")
    before = hashes(out)
    with pytest.raises(InputError, match="no checkpoint to resume from; a new run needs a folder of its own"):
        train(cfg, out, resume=True)
    assert hashes(out) == before


def test_figures_that_a_job_has_added_to_stay(tmp_path, data, short):
    out = shutil.copytree(short, tmp_path/"run")
    cfg = config(data, *ONE)
    figures = json.loads((out/"metrics.json").read_text())
    (out/"metrics.json").write_text(json.dumps({**figures, "onnx": {"AP": .5}}))
    assert train(cfg, out, resume=True)["val"]["stats"] == figures["val"]["stats"]
    assert json.loads((out/"metrics.json").read_text())["onnx"] == {"AP": .5}


def test_a_journal_has_a_line_for_each_event_and_no_other(tmp_path):
    for step in range(3): journal(tmp_path, "resumed", step=step)
    lines = (tmp_path/"journal.jsonl").read_bytes().split(b"\n")
    assert len(lines) == 4 and lines[-1] == b"" and all(lines[:3])


NAMES = ["a.jpg", "ä b.jpg", "line\u2028break.jpg", "next\x85line.jpg", "tab\there.jpg", "new\nline.jpg", "\udcff.jpg"]

def test_names_of_images_and_words_of_a_command_come_back_as_they_were(tmp_path, monkeypatch):
    n = len(NAMES)
    ds = DetDataset(tmp_path, ("Sack", ), NAMES, [(60, 80)] * n, box_image=range(n), boxes=[[1, 1, 9, 9]] * n,
                    labels=[0] * n, splits=["train"] * n)
    monkeypatch.setattr(sys, "argv", ["jetson-det", *NAMES])
    cfg = config("x")
    run_folder.write_run_folder(tmp_path/"run", cfg, ds, [])
    check_same_data(tmp_path/"run"/"dataset.tsv", ds)
    with pytest.raises(InputError, match="is gone"):
        check_same_data(tmp_path/"run"/"dataset.tsv", ds.subset(range(n - 1)))
    assert read_journal(tmp_path/"run")[0]["command"] == sys.argv
    assert json.loads((tmp_path/"run"/"environment.json").read_text())["command"] == sys.argv


def test_a_run_of_an_earlier_job_is_named(tmp_path):
    (tmp_path/"config.yaml").write_text("")
    checkpoint_path(tmp_path/"training", 3).mkdir(parents=True)
    with pytest.raises(InputError, match=f"the run is in {tmp_path/'training'}"):
        check_run_folder(tmp_path, config("x"), resume=True)


def test_a_way_back_through_a_missing_folder_is_refused_before_anything_is_made(tmp_path):
    (tmp_path/"data").mkdir()
    (tmp_path/"data"/"a.jpg").write_bytes(b"a photograph")
    with pytest.raises(InputError, match="is not empty"): check_run_folder(tmp_path/"new"/".."/"data", None)
    assert [p.name for p in tmp_path.iterdir()] == ["data"] and len(list((tmp_path/"data").iterdir())) == 1


# ---- a disk that gets full

@contextmanager
def file_limit(size):
    "Within it a file of this process has at most so many bytes: a write beyond them fails as on a full disk."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_a_training_with_one_line_and_it_goes_on_when_there_is_room(whole, tmp_path):
    "Real processes, in a folder whose name has a space."
    run = shutil.copytree(whole, tmp_path/"my run")
    shutil.rmtree(run/"last")
    (run/"metrics.json").unlink()
    shutil.rmtree(checkpoint_path(run, 9))
    before = hashes(run/"checkpoints")
    ended = run_command("train", "--out", run, "--resume", file_limit=200_000)
    assert ended.returncode == 2
    line = (f"error: {run}/checkpoints/step-00000009 could not be written: File too large; make room; what was saved"
            f" before is whole; go on with: jetson-det train --out '{run}' --resume\n")
    assert ended.stderr == line
    assert hashes(run/"checkpoints") == before and not any(verify(run).values())
    assert not [p for p in run.rglob("*") if p.name.endswith(".part")]
    ended = run_command("train", "--out", run, "--resume")
    assert ended.returncode == 0, ended.stderr
    assert hashes(run/"last") & hashes(whole/"last") and not any(verify(run).values())


@pytest.mark.parametrize("limit", [10, 1000, 3000]) # the mark and the settings; the settings; the environment
def test_a_run_that_could_not_begin_leaves_nothing_behind(tmp_path, data, limit):
    cfg = config(data)
    ds = training_data(cfg, tmp_path)
    with hold_run(tmp_path/"run"):
        with pytest.raises(NotWritten) as e, file_limit(limit):
            run_folder.write_run_folder(tmp_path/"run", cfg, ds, [])
        assert str(e.value).startswith(f"{tmp_path}/run/")
        assert str(e.value).endswith(": File too large; make room; nothing was saved yet: begin again")
        assert isinstance(e.value, InputError) and isinstance(e.value, TrainingError)
        assert [p.name for p in (tmp_path/"run").iterdir()] == [".lock"]
        assert check_run_folder(tmp_path/"run", cfg) == []
        run_folder.write_run_folder(tmp_path/"run", cfg, ds, [])


def test_the_log_waits_for_room(tmp_path, capsys):
    "A line is in the file whole or not at all, and none is lost."
    log = loop.RunLog()
    log.write_to(tmp_path/"log.txt")
    log("first")
    with file_limit((tmp_path/"log.txt").stat().st_size + 15):
        for line in ("second", "third"): log(line)
    assert [line.split(" ", 2)[2] for line in (tmp_path/"log.txt").read_text().splitlines()] == ["first"]
    log("fourth")
    lines = [line.split(" ", 2)[2] for line in (tmp_path/"log.txt").read_text().splitlines()]
    assert lines == ["first", "second", "third", "fourth"]
    assert capsys.readouterr().out.count("log.txt: File too large; its lines wait for room") == 1


def test_a_lock_without_room_for_its_name_holds_all_the_same(tmp_path):
    (tmp_path/".lock").write_text("123456789")
    with file_limit(0), hold_run(tmp_path): pass


@pytest.mark.parametrize("error, text", [
    (OSError(errno.ENOSPC, "No space left on device", "RUN/metrics.csv"),
     "RUN/metrics.csv: No space left on device; make room; "),
    (OSError(errno.EDQUOT, "RUN/last could not be written: Disk quota exceeded"),
     "RUN/last could not be written: Disk quota exceeded; make room; "),
    (OSError(errno.ENOSPC, "No space left on device"), "RUN: No space left on device; make room; "),
    (OSError(errno.EIO, "Input/output error", "RUN/log"), "RUN/log: Input/output error; "), (OSError("?"), "RUN: ?; ")
])
def test_the_line_names_the_file_and_what_to_do(tmp_path, monkeypatch, error, text):
    monkeypatch.chdir(tmp_path)
    assert str(not_written(error, "RUN")) == text + "nothing was saved yet: begin again"
    (tmp_path/"RUN").mkdir()
    (tmp_path/"RUN"/"config.yaml").touch()
    assert str(not_written(error, "RUN")).endswith("begin again in another folder (--out)")
    checkpoint_path("RUN", 3).mkdir(parents=True)
    assert len(list_checkpoints("RUN")) == 1 and str(not_written(error, "RUN")) == (
        text + "what was saved before is whole; go on with: jetson-det train --out RUN --resume")

# ---- settings that were edited after the run began

EDITED = {
    "train.epochs": "is 7 and was 1 when the run began: a resumed run can't change it",
    "augment.flip": "is 0.25 and was",
    "data.input_size": r"is \[64, 64\] and was \[96, 96\]",
    "train.seed": "is 5 and was 0",
}
VALUES = {"train.epochs": 7, "augment.flip": .25, "data.input_size": [64, 64], "train.seed": 5}


@pytest.mark.parametrize("key", EDITED)
def test_a_setting_edited_in_config_yaml_is_held_to_the_beginning(short, tmp_path, key):
    "As one that is given on the command line; the run stays as it was."
    out = shutil.copytree(short, tmp_path/"run")
    save_config(load_config(out/"config.yaml", [f"{key}={VALUES[key]}"]), out/"config.yaml")
    before = hashes(out)
    for cfg in (load_config(out/"config.yaml"), load_config(out/"config.yaml", ["train.keep=9"])):
        with pytest.raises(InputError, match=f"{key} {EDITED[key]}"): train(cfg, out, resume=True)
    assert hashes(out) == before


def test_a_setting_edited_in_config_yaml_may_be_a_free_one(short, tmp_path):
    out = shutil.copytree(short, tmp_path/"run")
    save_config(load_config(out/"config.yaml", ["train.keep=9"]), out/"config.yaml")
    train(load_config(out/"config.yaml"), out, resume=True)
    log = (out/"log.txt").read_text()
    assert "resumed after epoch 1, step 3; train.keep: 2 -> 9\n" in log


def test_a_run_of_an_earlier_version_is_held_to_its_config(short, tmp_path):
    out = shutil.copytree(short, tmp_path/"run")
    facts = json.loads((out/"environment.json").read_text())
    del facts["settings"]
    (out/"environment.json").write_text(json.dumps(facts))
    assert check_run_folder(out, load_config(out/"config.yaml"), resume=True) == []
    with pytest.raises(InputError, match="train.epochs is 7 and was 1"):
        check_run_folder(out, load_config(out/"config.yaml", ["train.epochs=7"]), resume=True)


@pytest.mark.parametrize("settings", [{"train.nonsense": 1}, {"train.epochs": "many"}, {"nowhere": 3}])
def test_settings_of_another_version_are_one_line(short, tmp_path, settings):
    out = shutil.copytree(short, tmp_path/"run")
    facts = json.loads((out/"environment.json").read_text())
    (out/"environment.json").write_text(json.dumps({**facts, "settings": settings}))
    with pytest.raises(InputError, match="environment.json: its settings are not those of this version"):
        check_run_folder(out, load_config(out/"config.yaml"), resume=True)


def test_the_log_speaks_of_later_epochs_only_where_it_has_some(tmp_path, data):
    out = tmp_path/"run"
    cfg = config(data, *KEEP, "train.epochs=2", "train.trackers=[]")
    train(cfg, out)
    train(cfg, out, resume=True)
    assert "of the training that broke off" not in (out/"log.txt").read_text()
    for later in (4, 5, 6): shutil.rmtree(checkpoint_path(out, later))
    train(cfg, out, resume=True)
    assert "resumed after epoch 1, step 3; lines above about later epochs are" in (out/"log.txt").read_text()
