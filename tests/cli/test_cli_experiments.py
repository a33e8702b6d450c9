"""`runs`, `sweep` and `campaign` as a user calls them."""
import csv
import json

import pytest
from command_helpers import run_command
from registry_helpers import make_run


@pytest.fixture
def call(tmp_path, monkeypatch):
    "Calls a verb beside a folder `runs` with two trainings."
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path / "cache"))
    make_run(tmp_path / "runs" / "dock", ap=.3)
    make_run(tmp_path / "runs" / "gate", ap=.5, lr=.02)
    return lambda *words: run_command(*words, cwd=tmp_path)


def done(result): # what it printed
    assert result.returncode == 0, result.stderr
    return result.stdout


def names(result): return {line.split()[0] for line in done(result).splitlines()[1:]}


def refused(result, *texts):
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    for text in texts: assert text in lines[0]


def test_the_table(call, tmp_path):
    text = done(call("runs", "--sort=-AP", "--json", "runs.json", "--csv", "runs.csv"))
    assert text.index("gate") < text.index("dock")
    rows = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert {row["name"]: row["AP"] for row in rows} == {"dock": .3, "gate": .5}
    with open(tmp_path / "runs.csv", newline="") as file: assert len(list(csv.DictReader(file))) == 2
    assert names(call("runs", "-w", "AP>.4")) == {"gate"}
    assert names(call("runs", "list", "runs")) == {"gate", "dock"}


def test_tags_and_stages(call, tmp_path):
    assert "good" in done(call("runs", "tag", "dock", "good"))
    assert names(call("runs", "-w", "tag=good")) == {"dock"}
    done(call("runs", "promote", "dock"))
    done(call("runs", "promote", "gate", "--note", "better at night"))
    assert "gate" in done(call("runs", "stages"))
    place = done(call("runs", "stage", "production")).strip()
    assert (tmp_path / place / "manifest.json").is_file()
    done(call("runs", "rollback"))
    history = done(call("runs", "stages", "--history"))
    assert history.count("dock") == 2 and "better at night" in history and "rolled back" in history


def test_two_runs(call):
    text = done(call("runs", "compare", "dock", "gate"))
    assert "train.lr" in text and "0.02" in text
    assert "dock" in done(call("runs", "show", "dock"))


@pytest.mark.parametrize("words, texts", [
    (["nowhere"], ["nowhere", "no such folder"]),
    (["taag"], ["did you mean 'jetson-det runs tag'"]),
    (["show", "dokc"], ["dokc", "dock"]),
    (["promote", "dock", "--stage", "two words"], ["two words"]),
    (["rollback"], ["production"]),
    (["-w", "APP>.5"], ["APP"]),
    (["--sort", "apples"], ["apples"]),
    (["--csv", "runs.txt"], ["runs.txt", ".csv"]),
    (["calibration", "measured.json"], ["no time of a board"]),
])
def test_wrong_words_of_runs(call, words, texts): refused(call("runs", *words), *texts)


def test_a_sweep_is_listed(tmp_path):
    (tmp_path / "rates.yaml").write_text("set: {train.epochs: 3, train.no_aug_epochs: 1}\n"
                                         "search: {train.lr: [0.1, 0.2], augment.mosaic: [0, 1]}\n")
    text = done(run_command("sweep", "rates.yaml", "--check", cwd=tmp_path))
    assert text.count("\ntrial ") == 4
    assert [path.name for path in tmp_path.iterdir()] == ["rates.yaml"]


@pytest.mark.parametrize("words, texts", [
    (["sweep", "p2_smal_objects"], ["p2_small_objects"]),
    (["sweep", "p2_small_objects", "--engine", "rya"], ["ray"]),
    (["sweep", "p2_small_objects", "--gpus", "1"], ["the engine ray"]),
    (["sweep", "p2_small_objects", "--data", "nowhere"], ["nowhere"]),
    (["campaign", "jetson_nona"], ["jetson_nano"]),
    (["campaign", "jetson_nano", "train.epoks=3", "--dry-run"], ["train.epochs"]),
    (["campaign", "jetson_nano", "--data", "nowhere"], ["nowhere"]),
])
def test_wrong_words(tmp_path, words, texts):
    refused(run_command(*words, cwd=tmp_path), *texts)
    assert not list(tmp_path.iterdir())
