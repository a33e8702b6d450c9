"""`label-errors` and `data view --findings`, called as a user calls them; the network finds colored blocks."""
import csv
import json
import shutil

import cv2
import pytest
from command_helpers import run_command

from jetson_det.runtime.ops.check_network import check_contract, check_frames, write_check_network
from jetson_det.runtime.sessions import open_session
from jetson_det.scenes.docks import write_scenes

TINY = """model: {name: yolox-nano, weights: none}
data: {input_size: [96, 96], workers: 0, val: 0, test: 0}
augment: {multiscale: 0}
train: {epochs: 2, batch_size: 4, threads: 1, no_aug_epochs: 0, warmup_epochs: 1, eval_every: 1, device: cpu,
  report: false, recipe: none, trackers: []}
"""


@pytest.fixture(scope="module")
def yard(tmp_path_factory):
    "Four frames whose labels are the network's own detections, but one that is missing and one of the wrong class."
    folder = tmp_path_factory.mktemp("yard")
    network = open_session(write_check_network(folder))
    names = check_contract().classes
    (folder / "yard").mkdir()
    rows = []
    for k, frame in enumerate(check_frames()):
        assert cv2.imwrite(str(folder / "yard" / f"{k}.png"), frame)
        found = network(frame)
        for box, label in zip(found.boxes.tolist(), found.labels.tolist()):
            rows.append([f"{k}.png", *box, names[label]])
    missing = rows.pop(4)
    wrong = rows[20]
    rows[20] = [*wrong[:5], next(name for name in names if name != wrong[5])]
    with open(folder / "yard" / "labels.csv", "w", newline="") as file: csv.writer(file).writerows(rows)
    return folder, missing, wrong


@pytest.fixture
def run(yard, tmp_path):
    "Calls a verb in a copy of the yard."
    shutil.copytree(yard[0], tmp_path, dirs_exist_ok=True)
    def call(*words): return run_command(*words, cwd=tmp_path)
    return call


def refused(done, *texts):
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr
    for text in texts: assert text in lines[0]


def test_planted_errors_lead_the_list(run, yard, tmp_path):
    _, missing, wrong = yard
    done = run("label-errors", "check.onnx", "--data", "yard", "--out", "list.json", "--crops", "crops.png")
    assert done.returncode == 0, done.stderr
    suspects = json.loads((tmp_path / "list.json").read_text())["suspects"]
    assert {(s["kind"], s["path"]) for s in suspects} == {("missing", missing[0]), ("wrong class", wrong[0])}
    of = {s["kind"]: s for s in suspects}
    assert of["missing"]["suggested"] == missing[5] and of["wrong class"]["suggested"] == wrong[5]
    assert of["missing"]["suggested_box"] == pytest.approx(missing[1:5])
    assert cv2.imread(str(tmp_path / "crops.png")) is not None
    assert "not known which images the model was trained on" in done.stdout


def test_list_as_a_table(run, tmp_path):
    assert run("label-errors", "check.onnx", "--data", "yard", "--out", "list.csv").returncode == 0
    with open(tmp_path / "list.csv", newline="") as file: rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == ["wrong class", "missing"]


def test_suspects_on_the_page(run, yard, tmp_path):
    run("label-errors", "check.onnx", "--data", "yard", "--out", "list.json")
    done = run("data", "view", "yard", "--findings", "list.json", "--html", "yard.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "yard.html").read_text()
    assert "label wrong class" in page and "label missing" in page


@pytest.mark.parametrize("text, why", [
    ("[1, 2]", "no list of findings"),
    ('{"flaws": [{"kind": "label missing"}]}', "no list of findings"),
    (json.dumps({"flaws": [dict.fromkeys(("kind", "file", "where", "message", "action", "advice"), "a") |
                           {"severity": "fatal"}]}), "no list of findings"),
    ("{", "not valid JSON"),
])
def test_wrong_findings(run, tmp_path, text, why):
    (tmp_path / "list.json").write_text(text)
    refused(run("data", "view", "yard", "--findings", "list.json"), "list.json", why)
    assert not (tmp_path / "yard.html").exists()


def test_findings_of_other_data(run, yard, tmp_path):
    run("label-errors", "check.onnx", "--data", "yard", "--out", "list.json")
    write_scenes(tmp_path / "dock", count=2, size=(96, 128), splits={"train": 1.})
    refused(run("data", "view", "dock", "--findings", "list.json"), "list.json", "none of its 2 images is in dock")
    (tmp_path / "list.csv").write_text("score\n")
    refused(run("data", "view", "yard", "--findings", "list.csv"), "as JSON")


def test_names_that_differ(run, yard, tmp_path):
    text = (tmp_path / "yard" / "labels.csv").read_text()
    for english, german in (("Blue", "Blau"), ("Green", "Gruen"), ("Red", "Rot")): text = text.replace(english, german)
    (tmp_path / "yard" / "labels.csv").write_text(text)
    words = ("--data", "yard", "--map", "Blue=Blau,Green=Gruen", "--map", "Red=Rot")
    refused(run("label-errors", "check.onnx", "--data", "yard"), "no class in common", "--map")
    assert "2 suspects" in run("label-errors", "check.onnx", *words).stdout
    shutil.copy(tmp_path / "check.onnx", tmp_path / "same.onnx")
    done = run("compare", "check.onnx", "same.onnx", *words, "--resamples", "100")
    assert done.returncode == 0 and "0.931" in done.stdout, done.stderr  # as with the names of the network


@pytest.mark.parametrize("words, texts", [
    (["--data", "yard"], ["--folds 5"]),
    (["check.onnx", "--data", "yard", "--folds", "2"], ["give one of the two"]),
    (["check.onnx", "--data", "yrad"], ["yrad: no such"]),
    (["check.onnx", "--data", "yard", "--split", "tset"], ["tset"]),
    (["check.onnx", "--data", "yard", "--out", "list.txt"], ["list.txt", ".json or .csv"]),
    (["check.onnx", "--data", "yard", "--out", "check.onnx"], ["check.onnx"]),
    (["check.onnx", "--data", "yard", "--crops", "yard/0.png"], ["yard/0.png"]),
    (["--data", "yard", "--folds", "2", "-c", "nothing.yaml"], ["nothing.yaml"]),
    (["--data", "yard", "--folds", "50"], ["50 folds of 4 units"]),
])
def test_wrong_calls(run, tmp_path, words, texts):
    before = (tmp_path / "yard" / "0.png").read_bytes()
    refused(run("label-errors", *words), *texts)
    assert (tmp_path / "yard" / "0.png").read_bytes() == before


@pytest.mark.slow
def test_folds_go_on(tmp_path):
    write_scenes(tmp_path / "dock", count=8, size=(96, 128), splits={"train": 1.})
    (tmp_path / "tiny.yaml").write_text(TINY)
    words = ("label-errors", "--data", "dock", "--folds", "2", "-c", "tiny.yaml", "--out", "list.json")
    done = run_command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fold 2 of 2: 4 images\n" in done.stdout and "biased" not in done.stdout
    first = json.loads((tmp_path / "list.json").read_text())
    assert first["trained"] == 0 and first["images"] == 8
    (tmp_path / "folds" / "fold-1.json").unlink()  # as after a kill
    done = run_command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fold 1 of 2: 4 images, done before" in done.stdout
    assert json.loads((tmp_path / "list.json").read_text()) == first
