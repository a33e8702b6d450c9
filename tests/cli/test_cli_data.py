"""The `data` verbs as a user calls them: what they print, what they write, how they end."""
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from command_helpers import run_command as run
from format_writers import WRITERS as FORMAT_WRITERS
from signals import hear_ctrl_c

from jetson_det.data.formats.registry import read_dataset, write_dataset
from jetson_det.runtime.outputs import _host
from jetson_det.scenes.docks import write_scenes


def ok(*words, cwd=None):
    done = run(*words, cwd=cwd)
    assert done.returncode == 0, (words, done.returncode, done.stdout, done.stderr)
    return done.stdout


def jpeg(seed):
    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    return cv2.imencode(".jpg", cv2.resize(noise, (80, 60)))[1].tobytes()


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
    output = ok("data", "check", tmp_path / "good")
    assert "no flaws" in output or "0 errors, 0 warnings" in output


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


def listed(folder): return {f.name: f.read_text() for f in sorted(folder.iterdir()) if f.suffix == ".txt"}


@pytest.mark.parametrize("way", ["copied", "moved", "written there", "listed alone"])
def test_lists_count_as_soon_as_they_are_in_the_dataset(scenes, tmp_path, way):
    shutil.copytree(scenes, tmp_path / "d")
    splits = tmp_path / "d" / "splits"
    ok("data", "split", tmp_path/"d", "--anew", "--test", ".25", "--out",
       splits if way == "written there" else tmp_path/"lists")
    if way == "moved": shutil.move(tmp_path / "lists", splits)
    if way == "copied": shutil.copytree(tmp_path / "lists", splits)
    if way == "listed alone":
        splits.mkdir()
        for name in listed(tmp_path / "lists"): shutil.copy(tmp_path / "lists" / name, splits)
    ds = read_dataset(tmp_path / "d")
    want = {name[:-4]: text.splitlines() for name, text in listed(splits).items()}
    assert {s: sorted(ds.split(s).paths) for s in ds.split_names} == want and len(want["test"]) == 6
    assert "own-output" not in ok("data", "check", tmp_path / "d")


@pytest.mark.parametrize("out", ["d/splits", "d", "splits", "d/more/splits"])
def test_a_split_is_renewed(scenes, tmp_path, out):
    "In the dataset, in its own folder or beside what is there."
    shutil.copytree(scenes, tmp_path / "d")
    words = ["data", "split", "d", "--anew", "--out", out]
    ok(*words, cwd=tmp_path)
    first = listed(tmp_path / out)
    output = ok(*words, "--seed", "4", "--test", "0", cwd=tmp_path)
    second = listed(tmp_path / out)
    assert "(in place of train.txt, val.txt, test.txt of an earlier split)" in output
    assert list(second) == ["train.txt", "val.txt"] and first["val.txt"] != second["val.txt"]
    assert listed(tmp_path / out) == second and len(read_dataset(tmp_path / "d")) == 24


@pytest.mark.parametrize("out", ["d/splits", "d", "lists"])
def test_lists_of_somebody_else_stay(scenes, tmp_path, out):
    shutil.copytree(scenes, tmp_path / "d")
    ok("data", "split", "d", "--anew", "--out", out, cwd=tmp_path)
    for change in ("edited", "unmarked"):
        if change == "edited": (tmp_path / out / "val.txt").write_text("mine")
        else: (tmp_path / out / ".jetson-det-output").unlink()
        done = run("data", "split", "d", "--anew", "--out", out, cwd=tmp_path)
        assert done.returncode == 2 and "move it away" in done.stderr and done.stderr.count("\n") == 1
        assert (tmp_path / out / "val.txt").read_text() == "mine"


def test_lists_name_what_can_be_used(scenes, tmp_path):
    "And a group_by that leaves images over is said."
    shutil.copytree(scenes, tmp_path / "d")
    ok("data", "split", "d", "--anew", cwd=tmp_path)
    broken = (tmp_path / "splits/val.txt").read_text().splitlines()
    for path in broken: (tmp_path / "d" / path).write_bytes((tmp_path / "d" / path).read_bytes()[:900])
    done = run("data", "split", "d", "--anew", "--group-by", "(00000)[0-9].jpg", "--out", "again", cwd=tmp_path)
    assert done.returncode == 0 and "5 images that cannot be used: in no split" in done.stderr
    assert "warning: group_by '(00000)[0-9].jpg' finds 1 group in 9 images; in none: 15 images" in done.stderr
    lists = "".join(listed(tmp_path / "again").values())
    assert len(lists.splitlines()) == 19 and not [path for path in broken if path in lists]
    assert "5 images in no split: in none of the lists\n" in done.stdout


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
    assert "2 changes (1 unread-file, 1 not-kept), listed in" in done.stdout
    assert "annotations/more.json,,unread-file,in the source,not read" in (tmp_path / "out/changes.csv").read_text()


def unlabel(folder, format, names):
    "Take images out of the labels; their files stay."
    if format == "csv":
        file = folder / "labels.csv"
        file.write_text("\n".join(l for l in file.read_text().split("\n") if not l.startswith(tuple(names))))
    elif format == "coco":
        for file in folder.rglob("*.json"):
            d = json.loads(file.read_text())
            gone = {im["id"] for im in d["images"] if im["file_name"].endswith(tuple(names))}
            d["images"] = [im for im in d["images"] if im["id"] not in gone]
            d["annotations"] = [a for a in d["annotations"] if a["image_id"] not in gone]
            file.write_text(json.dumps(d))
    else:
        for name in names: next(folder.rglob(name[:-4] + ".json")).unlink()


@pytest.mark.parametrize("format", ["csv", "coco", "labelme"])
def test_every_image_that_is_left_out_is_listed(tmp_path, format):
    "By convert and by --fix: no label names it."
    ds = read_dataset(write_scenes(tmp_path / "scenes", 12, (96, 160)))
    ds = ds.subset(np.unique(ds.box_image))
    FORMAT_WRITERS[format](ds, tmp_path / "in")
    names = [path.rpartition("/")[2] for path in ds.paths[[1, 4, 8]]]
    unlabel(tmp_path / "in", format, names)
    done = run("data", "convert", tmp_path / "in", tmp_path / "copy", "--to", "coco")
    assert done.stderr.count("note: 3 images beside labeled ones, without labels, left out") == 1
    assert "3 no-labels" in done.stdout and len(read_dataset(tmp_path / "copy")) == len(ds) - 3
    run("data", "check", tmp_path / "in", "--fix", tmp_path / "fixed")
    for folder in ("copy", "fixed"):
        changes = json.loads((tmp_path / folder / "changes.json").read_text())["changes"]
        assert sorted(c["file"].rpartition("/")[2] for c in changes if c["now"] == "left out") == sorted(names)


@pytest.mark.parametrize("splits", [("", ""), ("train", "val")])
def test_an_image_that_loses_its_folder_is_listed(tmp_path, splits):
    "Two cameras: `--group-by folder` can't work in the copy. A folder for each split loses nothing."
    for k, (folder, split) in enumerate([("cam0", 0), ("cam1", 0), ("cam2", 1)]):
        place = Path("images", splits[split], folder)
        for j in range(3):
            stem = f"{j}{k}" if splits[0] else f"{j}{k % 2}"
            for name, data in ((f"{stem}.jpg", jpeg(9 * k + j)), (f"{stem}.txt", b"0 .5 .5 .2 .2\n")):
                file = tmp_path / "in" / (place if name.endswith("jpg") else Path("labels", *place.parts[1:])) / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
    names = "names: [a]\n" + "".join(f"{s}: images/{s}\n" for s in splits if s)
    (tmp_path / "in/data.yaml").write_text(names if splits[0] else names + "train: images\nval: images\n")
    ok("data", "convert", tmp_path / "in", tmp_path / "out", "--to", "coco")
    rows = json.loads((tmp_path / "out/changes.json").read_text())["changes"]
    moved = {row["file"]: row["now"] for row in rows if row["kind"] == "renamed-image"}
    flat = [path for path in read_dataset(tmp_path / "in").paths if not (splits[0] and "cam2" in path)]
    assert sorted(moved) == sorted(flat)
    for old, new in moved.items(): assert old.endswith(new) or new == "_".join(old.split("/")[-2:])


def test_a_dataset_in_two_folders_is_copied_beside_them(tmp_path):
    "data.yaml in one, the images in the other: what is around them is no part of it."
    ds = read_dataset(write_scenes(tmp_path / "scenes", 12, (96, 160)))
    write_dataset(ds, tmp_path / "p1", "yolo")
    (tmp_path / "p2").mkdir()
    text = (tmp_path / "p1/data.yaml").read_text()
    (tmp_path / "p1/data.yaml").unlink()
    (tmp_path / "p2/data.yaml").write_text("path: ../p1\n" + text)
    for words in (("convert", "p2", "a", "--to", "coco"), ("check", "p2", "--fix", "b"),
                  ("tile", "p2", "c", "--size", "64"), ("convert", "p2/data.yaml", "d", "--to", "yolo")):
        ok("data", *words, cwd=tmp_path)
    assert all(len(read_dataset(tmp_path / name)) == 12 for name in ("a", "b", "d", "p2"))
    for source in ("p2", "p2/data.yaml"):
        for target in ("p2/a", "p1/images/a"):
            done = run("data", "convert", source, target, "--to", "coco", cwd=tmp_path)
            assert done.returncode == 2 and "lies in the dataset" in done.stderr


def test_images_in_no_list_are_listed(tmp_path):
    "YOLO: data.yaml names folders, and another one has images with labels."
    write_dataset(read_dataset(write_scenes(tmp_path / "scenes", 12, (96, 160))), tmp_path / "in", "yolo")
    for folder in ("images", "labels"): (tmp_path / "in" / folder / "test").rename(tmp_path / "in" / folder / "more")
    text = (tmp_path / "in/data.yaml").read_text()
    (tmp_path / "in/data.yaml").write_text("".join(l for l in text.splitlines(True) if not l.startswith("test")))
    done = run("data", "convert", tmp_path / "in", tmp_path / "out", "--to", "yolo")
    assert done.returncode == 0 and "no-split" in done.stdout
    assert "images/more/000012.jpg,,no-split" in (tmp_path / "out/changes.csv").read_text()


def test_an_error_of_the_reader_stops_every_verb(scenes, tmp_path):
    "As it stops a training: the labels name other images."
    write_dataset(read_dataset(scenes), tmp_path / "in", "voc")
    files = sorted((tmp_path / "in/Annotations").glob("*.xml"))
    for file, other in zip(files, files[1:] + files[:1]):
        file.write_text(file.read_text().replace(f"{file.stem}.jpg", f"{other.stem}.jpg"))
    assert run("data", "check", tmp_path / "in").returncode == 1
    for words in (("convert", "out", "--to", "coco"), ("tile", "out", "--size", "64"), ("split",), ("stats",)):
        done = run("data", words[0], tmp_path / "in", *words[1:], cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


AT_WORK = """
import sys, time
from jetson_det.data import tiles
from jetson_det.data.formats import registry
def wait(*args):
    print("at work", flush=True)
    time.sleep(60)
registry._place_images = tiles._cut_all = wait
from jetson_det.cli import main
sys.exit(main(sys.argv[1:]))
"""


def hidden(folder): return [p.name for p in folder.iterdir() if p.name[0] == "."]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("words", [("convert", "in", "out", "--to", "yolo"), ("check", "in", "--fix", "out"),
                                   ("tile", "in", "out", "--size", "64")], ids=lambda words: words[0])
def test_what_is_stopped_leaves_nothing(scenes, tmp_path, words, number):
    "What was killed leaves its work, and the next call for the same folder removes it."
    (tmp_path / "in").symlink_to(scenes)
    (tmp_path / ".out.notes.part").mkdir() # somebody else's
    (tmp_path / f".out.{_host()}-{os.getpid()}.part").mkdir() # of a process that lives
    there = hidden(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", AT_WORK, "data", *words], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c)
    while process.stdout.readline() != "at work\n": pass
    assert len(hidden(tmp_path)) == 3
    process.send_signal(number)
    errors = process.communicate(timeout=30)[1]
    if number == signal.SIGKILL:
        assert len(hidden(tmp_path)) == 3
        ok("data", *words, cwd=tmp_path)
    else:
        assert process.returncode == 128 + number, errors
        said = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
        assert errors.splitlines()[-1] == said and "Traceback" not in errors
    assert sorted(hidden(tmp_path)) == sorted(there) and (tmp_path / "out").exists() == (number == signal.SIGKILL)
