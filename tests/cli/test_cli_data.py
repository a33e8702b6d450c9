"""The `data` verbs as a user calls them: what they print, what they write, how they end."""
import json
import os
import shutil
import zipfile

import pytest
from command_helpers import run_command as run

from jetson_det.data.formats.registry import read_dataset
from jetson_det.scenes.docks import write_scenes


def ok(*words, cwd=None):
    done = run(*words, cwd=cwd)
    assert done.returncode == 0, (words, done.returncode, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def scenes(tmp_path_factory): return write_scenes(tmp_path_factory.mktemp("cli") / "dock", 24, (96, 160))


def tree(folder):
    return {
        p.relative_to(folder).as_posix(): (p.stat().st_mtime_ns, p.read_bytes())
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_a_flawed_folder_is_checked_fixed_and_clean(scenes, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(scenes, bad)
    image = sorted(bad.rglob("*.jpg"))[3]
    image.write_bytes(image.read_bytes()[:2000])
    before = tree(bad)
    done = run("data", "check", bad, "--fix", tmp_path/"good", "--html", tmp_path/"check.html",
               "--json", tmp_path/"check.json")
    assert done.returncode == 1 and image.name in done.stdout and "Traceback" not in done.stderr
    assert tree(bad) == before  # nothing in place
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["errors"] == 1 and {f["kind"] for f in report["flaws"]} >= {"truncated-image", "too-many-flaws"}
    page = (tmp_path / "check.html").read_text()
    assert image.name in page and 'src="http' not in page
    changes = json.loads((tmp_path / "good" / "changes.json").read_text())
    assert image.name in json.dumps(changes)
    assert "0 errors, 0 warnings" in ok("data", "check", tmp_path / "good")


def test_lists_of_a_split_are_what_is_trained_on(scenes, tmp_path):
    folder = tmp_path/"lists"
    output = ok("data", "split", scenes, "--anew", "--by", "stratified", "--val", ".25", "--test", ".25",
                "--out", folder)
    assert "data.splits" in output
    lists = {s: (tmp_path / "lists" / f"{s}.txt").read_text().splitlines() for s in ("train", "val", "test")}
    assert [len(v) for v in lists.values()] == [12, 6, 6] and len(set(sum(lists.values(), []))) == 24
    small = [
        "data.input_size=[64,96]", "data.workers=0", "train.epochs=1", "train.threads=1", "augment.multiscale=0",
        "data.balance=repeat", "train.class_weights=balanced", "model.weights=none", "train.report=false"
    ]
    output = ok("train", "--data", scenes, "--out", tmp_path / "run", f"data.splits={tmp_path / 'lists'}", *small)
    assert "train 12, val 6, test 6" in output and "class weights" in output and "of images" in output
    assert "on 6 images" in ok("evaluate", tmp_path / "run", "--data", scenes)
    shutil.move(tmp_path / "lists", tmp_path / "moved")
    # the run's own list holds without them; a checkpoint elsewhere has none
    assert "on 6 images" in ok("evaluate", tmp_path / "run", "--data", scenes)
    shutil.copytree(tmp_path / "run" / "best", tmp_path / "alone" / "best")
    gone = run("evaluate", tmp_path / "alone" / "best", "--data", scenes)
    lines = [line for line in gone.stderr.splitlines() if not line.startswith("device: ")]
    assert gone.returncode == 2 and len(lines) == 1 and "--splits" in lines[0]
    assert "on 6 images" in ok("evaluate", tmp_path/"run", "--data", scenes, "--splits", tmp_path/"moved",
                               "--tiles", "64x96")


def test_other_splits_than_those_of_the_training_are_reported(scenes, tmp_path):
    ok("data", "convert", scenes, tmp_path / "all", "--to", "coco")
    loose = tmp_path / "loose"
    (loose / "images").mkdir(parents=True)
    ds = read_dataset(tmp_path / "all")
    labels = ds.to_coco()
    for image in labels["images"]: image["file_name"] = os.path.basename(image["file_name"])
    (loose / "labels.json").write_text(json.dumps(labels))
    for i in range(len(ds)): shutil.copy(ds.path_of(i), loose / "images")
    small = ["data.input_size=[64,96]", "data.workers=0", "train.epochs=1", "train.threads=1", "augment.multiscale=0",
             "model.weights=none", "train.report=false"]
    ok("train", "--data", loose, "--out", tmp_path / "run", *small)
    assert "not those of the training" not in ok("evaluate", tmp_path / "run", "--data", loose)
    d = json.loads((loose / "labels.json").read_text())
    gone = d["images"].pop()
    d["annotations"] = [a for a in d["annotations"] if a["image_id"] != gone["id"]]
    (loose / "labels.json").write_text(json.dumps(d))
    # the run's own list holds
    out = ok("evaluate", tmp_path / "run", "--data", loose)
    assert "not those of the training" not in out and "1 image of the training not here" in out


def test_tiles_and_the_page(scenes, tmp_path):
    assert "tiles" in ok("data", "tile", scenes, tmp_path / "tiles", "--size", "64", "--overlap", ".25", "--to", "yolo")
    assert read_dataset(tmp_path / "tiles").sizes.max() == 64
    assert "open it in a browser" in ok("data", "view", scenes, cwd=tmp_path)
    assert (tmp_path / "dock.html").stat().st_size > 10_000


def test_a_zip_is_read_as_its_folder(scenes, tmp_path):
    with zipfile.ZipFile(tmp_path / "dock.zip", "w") as z:
        for p in scenes.rglob("*"): z.write(p, p.relative_to(scenes.parent))
    report = ok("data", "check", tmp_path / "dock.zip")
    assert "24 images" in report and "24 images" in ok("data", "stats", tmp_path / "dock.zip")


@pytest.mark.parametrize("words, parts", [
    (("check", "nowhere"), ["nowhere: no such file or folder"]),
    (("stats", "DIR", "--size", "big"), ["--size big", "HEIGHTxWIDTH"]),
    (("split", "DIR", "--by", "groop"), ["did you mean 'group'"]),
    (("split", "DIR", "--anew", "--by", "group", "--group-by", "(["), ["regular expression"]),
    (("split", "DIR", "--anew", "--val", ".6", "--test", ".5"), ["val=0.6", "test=0.5"]),
    (("tile", "DIR", "DIR/tiles", "--size", "64"), ["DIR/tiles"]),
    (("tile", "DIR", "tiles", "--size", "64", "--cut", "clap"), ["did you mean 'clip'"]),
    (("convert", "DIR", "out", "--to", "kitti"), ["kitti"]),
    (("convert", "DIR", "out", "--to", "voc", "--images", "move"), ["copy, hardlink or symlink"]),
    (("check", "DIR", "--format", "vok"), ["did you mean 'voc'"]),
])
def test_a_mistake_is_one_line(scenes, tmp_path, words, parts):
    before = tree(scenes)
    done = run("data", *[w.replace("DIR", str(scenes)) for w in words], cwd=tmp_path)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = [l for l in done.stderr.splitlines() if l.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for part in parts: assert part.replace("DIR", str(scenes)) in lines[0], lines
    assert tree(scenes) == before and not [p for p in tmp_path.iterdir() if p.name != "splits"]


def test_what_is_no_dataset_is_named(tmp_path):
    "A pipe or a device is there, and is no folder: one line says so, and nothing waits for it."
    os.mkfifo(tmp_path / "pipe")
    for words, reason in ((("check", tmp_path / "pipe"), "is a named pipe"), (("stats", "/dev/zero"), "is a device")):
        done = run("data", *words)
        assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1


def test_what_was_not_read_is_said_by_every_verb(scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "d")
    os.mkfifo(tmp_path / "d/annotations/more.json")
    words = ["data", "convert", tmp_path / "d", tmp_path / "out", "--to", "yolo"]
    done = run(*words)
    assert done.returncode == 0 and "warning: annotations/more.json is a named pipe" in done.stderr
    assert "1 change (1 not-kept), listed in" in done.stdout and (tmp_path / "out/changes.csv").is_file()
