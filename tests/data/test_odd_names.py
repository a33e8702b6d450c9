"""File names that are not UTF-8, hold a line break or a control character, or are as long as a name may be: through the
readers, the check, the fix, splits, tiles, training's records and conversion. No name ends the run of the others."""
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from jetson_det.core import InputError
from jetson_det.data.dataset import DetDataset
from jetson_det.data.formats.registry import WRITERS, read_dataset, write_dataset
from jetson_det.data.formats.writers import new_names, portable_name, short_name
from jetson_det.data.images.facts import inspect_images
from jetson_det.data.index import load_index, read_indexed
from jetson_det.data.quality.check import check_dataset
from jetson_det.data.quality.fix import fix_dataset
from jetson_det.data.quality.view import write_check_page
from jetson_det.data.split import ensure_splits, read_split_lists, write_split_lists
from jetson_det.data.tiles import tile_dataset
from jetson_det.evaluate.coco import coco_stats
from jetson_det.runtime.files import read_json
from jetson_det.runtime.geometry import as_detections
from jetson_det.train.run_folder import _dataset_text, check_same_data

STEMS = [
    b"plain", b"caf\xe9", "säck".encode(), b"a\nb", b"r\rs", "u\u2028v".encode(), b"n\xc2\x85m", b"x\x0by\x0cz\x1c",
    b"\x1b[31mred", b"tab\tx", b" blank ", "\u202egpj".encode(), b"\xff\xfe", b"quo\"te'", b"c,om;ma", b"<a&b>",
    b"per%cent", b"#hash", b"-dash", b"{brace}", b"*star*", b"l" * 245, "é".encode() * 120,
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "A YOLO dataset with such names, some of its images in a folder that is a link, some deep down."
    root = tmp_path_factory.mktemp("odd")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    deep = "/".join(["deep" * 30] * 20)
    folders = ["images", f"images/{deep}", "images/linked"]
    os.makedirs(root / folders[1])
    os.symlink(elsewhere, root / folders[2])
    (root / "labels").mkdir()
    rng = np.random.default_rng(0)
    for k, stem in enumerate(STEMS):
        folder = os.fsencode(root / folders[k % 3])
        image = cv2.resize(rng.integers(0, 255, (6, 8, 3), np.uint8), (80, 60), interpolation=cv2.INTER_CUBIC)
        with open(folder + b"/" + stem + b".jpg", "wb") as f: f.write(cv2.imencode(".jpg", image)[1].tobytes())
        with open(folder + b"/" + stem + b".txt", "w") as f: f.write("0 .5 .5 .5 .5\n")
    (root / "classes.txt").write_text("cat\n")
    for folder, _, files in os.walk(root, followlinks=True):
        for name in files: os.utime(os.path.join(folder, name), (1e9, 1e9))
    return root


def test_names_are_read_checked_and_written_in_every_format(source, tmp_path):
    ds = read_dataset(source)
    assert len(ds) == len(ds.boxes) == len(STEMS)
    report = check_dataset(source)
    assert not [f for f in report.flaws if f.severity != "note"]
    note, = [f for f in report.flaws if f.kind == "odd-name"]
    assert note.message.startswith("10 images have names")
    assert all(line.isprintable() for line in str(report).split("\n"))
    for to in WRITERS:
        copy = write_dataset(ds, tmp_path / to, to)
        assert len(copy) == len(copy.boxes) == len(STEMS)
        assert [f.kind for f in copy.flaws][:1] == ["renamed-image"]
        names = [p.rsplit("/", 1)[-1] for p in copy.paths]
        assert {"caf%E9.jpg", "a%0Ab.jpg", "u%E2%80%A8v.jpg", "%20blank%20.jpg"} <= set(names)
        for name in names: name.encode("utf-8")
        assert not [f for f in check_dataset(tmp_path / to).flaws if f.kind in ("odd-name", "missing-image")]
        for file in (tmp_path / to).rglob("*"):
            if file.suffix in (".json", ".xml", ".yaml", ".txt"): file.read_text("utf-8")


def test_fix_pages_and_tiles(source, tmp_path):
    report = check_dataset(source)
    page = write_check_page(report, tmp_path / "page.html")
    page.read_text("utf-8")
    changes = fix_dataset(report, tmp_path / "fixed", "coco")
    assert {c.kind for c in changes} == {"renamed-image"} and len(changes) >= 10
    assert {c.was for c in changes} < set(report.ds.paths)
    json.loads((tmp_path / "fixed/changes.json").read_text("utf-8"))
    json.dumps(report.to_dict())
    tiled = tile_dataset(report.ds, tmp_path / "tiles", (32, 32))
    assert len(tiled) and read_json(tmp_path / "tiles/tiles.json")["images"][0][0] == report.ds.paths[0]


def test_changes_name_the_file(tmp_path, source):
    "A flawed image of such a name is in the list of changes, for programs as it is and in the table escaped."
    ds = read_dataset(source)
    boxes = ds.boxes.copy()
    bad = [k for k, p in enumerate(ds.paths) if p.encode("utf-8", "surrogateescape").endswith(b"caf\xe9.jpg")][0]
    boxes[bad] += 25
    write_dataset(ds, tmp_path / "in", "voc")
    report = replace(check_dataset(source), ds=replace(ds, boxes=boxes))
    changes = fix_dataset(report, tmp_path / "fixed", "coco")
    change, = [c for c in changes if c.kind == "partly-outside"]
    assert change.file == ds.paths[bad]
    rows = json.loads((tmp_path / "fixed/changes.json").read_text("utf-8"))["changes"]
    assert {row["file"] for row in rows if row["now"] == "caf%E9.jpg"} == {ds.paths[bad]}
    assert "caf\\udce9.jpg" in (tmp_path / "fixed/changes.csv").read_text("utf-8-sig")


def test_what_is_remembered(source, tmp_path):
    "The index, the facts about images, the lists of splits and the records of a run."
    first = read_indexed(source)
    again = load_index(source)
    assert again is not None and again.paths.tolist() == first.paths.tolist()
    facts = inspect_images(first)
    assert facts.digests.tolist() == inspect_images(again).digests.tolist()
    ds = ensure_splits(first, .3, .2)
    write_split_lists(ds, tmp_path)
    assert read_split_lists(first, tmp_path).splits.tolist() == ds.splits.tolist()
    (tmp_path / "dataset.tsv").write_bytes(_dataset_text(ds).encode("utf-8", "surrogateescape"))
    check_same_data(tmp_path / "dataset.tsv", ds)
    moved = replace(ds, boxes=ds.boxes + .5)
    with pytest.raises(InputError, match="has other labels"): check_same_data(tmp_path / "dataset.tsv", moved)


def test_evaluation_of_such_names(source):
    ds = read_dataset(source)
    found = []
    for i in range(len(ds)):
        boxes, labels, _ = ds.boxes_of(i)
        found.append(as_detections(boxes, np.full(len(boxes), .9), labels))
    assert coco_stats(ds, found, ds.classes, 100).stats["AP"] == pytest.approx(1)


def test_lists_of_images_with_such_names(source, tmp_path):
    "A list in data.yaml is bytes of a file system: a line that is not UTF-8 names an image all the same."
    lines = []
    for path in read_dataset(source).paths:
        if "\n" in path or "\r" in path or " ." in path: continue
        lines.append(os.fsencode(source / path))
    (tmp_path / "all.txt").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "data.yaml").write_text("train: all.txt\nnames: [cat]\n")
    ds = read_dataset(tmp_path / "data.yaml", "yolo")
    assert len(ds) == len(lines) and not [f for f in ds.flaws if f.where == "all.txt"]


def test_portable_names():
    assert portable_name("Säcke 袋.v1.2.jpg") == "Säcke 袋.v1.2.jpg"
    assert len(short_name("é" * 300, ".jpeg").encode()) <= 255
    assert short_name("a" * 300, ".jpg") != short_name("a" * 301, ".jpg")
    paths = [f"{folder}/{'é' * 125}.jpg" for folder in "abc"]
    ds = SimpleNamespace(paths=paths)
    names = new_names(ds)
    assert len(set(names)) == 3 and max(len(n.encode()) for n in names) <= 255
    assert portable_name(portable_name("a\nb.jpg")) == "a%0Ab.jpg" and portable_name("a\\b.jpg") == "a%5Cb.jpg"


def test_two_names_that_become_one(tmp_path):
    (tmp_path / "in").mkdir()
    image = cv2.imencode(".jpg", np.zeros((20, 30, 3), np.uint8))[1].tobytes()
    for name in ("a\nb.jpg", "a%0Ab.jpg"): (tmp_path / "in" / name).write_bytes(image)
    ds = DetDataset(tmp_path / "in", ("cat", ), ["a\nb.jpg", "a%0Ab.jpg"], [(20, 30)] * 2, [0, 1], [[1, 1, 9, 9]] * 2,
                    [0, 0])
    assert len(write_dataset(ds, tmp_path / "out", "voc")) == 2
