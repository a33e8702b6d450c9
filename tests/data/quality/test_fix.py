"""The cleaned copy: what it repairs, what it leaves, and that the source is never touched."""
import csv
import json
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from jetson_det.core import InputError
from jetson_det.data.quality import fix
from jetson_det.data.quality.check import check_dataset
from jetson_det.data.dataset import CROWD, IGNORE, DetDataset, to_coco
from jetson_det.data.quality.fix import Change, fix_dataset
from jetson_det.data.formats.registry import read_dataset, write_dataset
from jetson_det.data.formats.writers import not_kept, without_orientation
from jetson_det.data.images.header import image_header
from jetson_det.data.tiles import tile_dataset
from jetson_det.data.images.exif import boxes_upright
from jetson_det.runtime.images import read_image, upright
from jetson_det.scenes.docks import write_scenes


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch): monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path_factory.mktemp("cache")))


def jpeg(k=0, suffix=".jpg"):
    img = cv2.resize(np.random.default_rng(k).integers(0, 255, (8, 8, 3), np.uint8), (80, 60),
                     interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(suffix, img)[1].tobytes()


def dataset(root, n=12, boxes=(), **kw):
    "n images with one sound box each and the extra ones: (image, x1, y1, x2, y2)"
    root.mkdir(exist_ok=True, parents=True)
    for k in range(n): (root / f"{k}.jpg").write_bytes(jpeg(k))
    rows = np.array(sorted([(k, 5, 5, 40, 40) for k in range(n)] + list(boxes), key=lambda r: r[0]), np.float32)
    return DetDataset(root, kw.pop("classes", ("s", "t")), [f"{k}.jpg" for k in range(n)], [(60, 80)]*n, rows[:, 0],
                      rows[:, 1:], kw.pop("labels", [0]*len(rows)), **kw)


def state(folder):
    "Every byte, and when each file was last changed."
    return {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in sorted(Path(folder).rglob("*")) if f.is_file()}


def exif(data, orientation):
    tag = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 274, 3, 1, orientation, 0, 0)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(tag) + 2) + tag + data[2:]


def clean(folder):
    report = check_dataset(folder, max_flawed=1)
    # what is crowd or ignored stays so
    assert not [f for f in report.flaws if f.severity != "note" and f.kind != "unlearned-boxes"], str(report)
    return report


def fixed(src, dst, **kw):
    "Fix it; the source is as before, and the lists say what was returned."
    before = state(src)
    changes = fix_dataset(src, dst, **kw)
    assert state(src) == before
    assert [Change(**c) for c in json.loads((dst / "changes.json").read_text("utf-8"))["changes"]] == changes
    with open(dst / "changes.csv", encoding="utf-8-sig", newline="") as f:
        assert [Change(*r) for r in csv.reader(f)] == [Change(*Change._fields), *changes]
    assert not [f for f in dst.parent.iterdir() if f.name.startswith(".")]
    clean(dst)
    return changes


@pytest.mark.parametrize("format", ["coco", "voc", "yolo"])
def test_a_clean_dataset_is_copied_as_it_is(tmp_path, format):
    write_dataset(read_dataset(write_scenes(tmp_path / "scenes", 6, (240, 320), seed=3)), tmp_path / "in", format)
    assert fixed(tmp_path / "in", tmp_path / "out") == []
    a = read_dataset(tmp_path / "in")
    b = read_dataset(tmp_path / "out")
    assert a.format == b.format == format and a.classes == b.classes
    assert a.paths.tolist() == b.paths.tolist() and a.splits.tolist() == b.splits.tolist()
    assert np.abs(a.boxes - b.boxes).max() <= (1e-3 if format == "yolo" else 0) and np.array_equal(a.labels, b.labels)
    assert [a.path_of(i).read_bytes() for i in range(6)] == [b.path_of(i).read_bytes() for i in range(6)]


@pytest.mark.parametrize("format", ["coco", "voc", "yolo"])
def test_every_flaw_of_boxes(tmp_path, format):
    extra = [(1, 10, 10, 10, 20), (2, 90, 10, 99, 20), (3, 70, 10, 95, 20), (4, 5, 5, 40, 40), (5, 60, 10, 80.6, 20),
             (6, 79.996, 10, 85, 20)]
    write_dataset(dataset(tmp_path / "d", 12, extra), tmp_path / "in", format)
    changes = fixed(tmp_path / "in", tmp_path / "out")
    found = {Path(c.file).name: (c.where, c.kind, c.now) for c in changes}
    assert found.pop("6.jpg")[1:] == ("partly-outside", "left out")
    assert found == {
        "1.jpg": ("box 2 (s)", "zero-area", "left out"), "2.jpg": ("box 2 (s)", "outside", "left out"),
        "3.jpg": ("box 2 (s)", "partly-outside", "[70.0, 10.0, 80.0, 20.0]"),
        "4.jpg": ("box 2 (s)", "duplicate-box", "left out"),
        "5.jpg": ("box 2 (s)", "rounding", "[60.0, 10.0, 80.0, 20.0]")
    }
    assert fixed(tmp_path / "out", tmp_path / "again") == []
    out = read_dataset(tmp_path / "out")
    assert len(out.boxes) == 14 and (out.boxes >= -1e-3).all() and (out.boxes[:, 2] <= 80.001).all()


def test_bad_images_go_with_their_boxes(tmp_path):
    write_dataset(dataset(tmp_path / "d"), tmp_path / "in", "voc")
    (tmp_path / "in/JPEGImages/1.jpg").write_bytes(jpeg(1)[:-300])
    (tmp_path / "in/JPEGImages/2.jpg").write_bytes(b"")
    (tmp_path / "in/JPEGImages/3.jpg").unlink()
    changes = fixed(tmp_path / "in", tmp_path / "out")
    assert [(Path(c.file).name, c.kind, c.now) for c in changes] == [
        ("2.jpg", "empty-image", "left out"),
        ("3.xml", "missing-image", "left out"),
        ("1.jpg", "truncated-image", "left out"),
    ]
    assert len(read_dataset(tmp_path / "out")) == 9


def test_similar_classes_become_one_before_boxes_are_compared(tmp_path):
    ds = dataset(tmp_path/"d", 6, [(0, 5, 5, 40, 40)], classes=("sack", "Sack", "Person"), labels=[1, 0, 1, 1, 1, 2, 0])
    write_dataset(ds, tmp_path / "in", "coco")
    changes = fixed(tmp_path / "in", tmp_path / "out")
    assert [(c.where, c.kind, c.was, c.now) for c in changes] == [
        ("sack", "similar-classes", "class 'sack', 2 boxes", "class 'Sack'"),
        ("box 2 (Sack)", "duplicate-box", "[5.0, 5.0, 40.0, 40.0]", "left out"),
    ]
    assert read_dataset(tmp_path / "out").class_counts() == {"Sack": 5, "Person": 1}


def test_of_an_image_in_two_splits_the_one_in_train_is_left_out(tmp_path):
    ds = dataset(tmp_path / "d", 9, splits=["train"] * 5 + ["val"] * 2 + ["test"] * 2)
    img = cv2.imdecode(np.frombuffer(jpeg(5), np.uint8), 1)
    (tmp_path / "d/0.jpg").write_bytes(jpeg(5))
    (tmp_path / "d/1.jpg").write_bytes(cv2.imencode(".jpg", cv2.resize(img, (160, 120)))[1].tobytes())
    (tmp_path / "d/6.jpg").write_bytes(jpeg(8))
    (tmp_path / "d/3.jpg").write_bytes(jpeg(2))
    ds = replace(ds, sizes=[(120, 160) if k == 1 else (60, 80) for k in range(9)])
    write_dataset(ds, tmp_path / "in", "coco")
    changes = fixed(tmp_path / "in", tmp_path / "out")
    found = sorted((Path(c.file).name, c.kind, c.now) for c in changes)
    assert found == [(f"{k}.jpg", "duplicate-across-splits", "left out") for k in (0, 1, 6)]
    out = read_dataset(tmp_path / "out")
    # 2 and 3 are one image within train: a note
    assert {s: int((out.splits == s).sum()) for s in out.split_names} == {"train": 3, "val": 1, "test": 2}


@pytest.mark.parametrize("k", range(2, 9))
def test_remove_orientation(tmp_path, k):
    for suffix in (".jpg", ".png", ".webp"):
        img = cv2.imdecode(np.frombuffer(jpeg(1), np.uint8), 1)
        if suffix == ".jpg": data = exif(jpeg(1), k)
        else:
            note = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 274, 3, 1, k, 0, 0)
            if not hasattr(cv2, "imencodeWithMetadata"): pytest.skip("this OpenCV writes no EXIF")
            params = [cv2.IMWRITE_WEBP_QUALITY, 101] if suffix == ".webp" else []
            metadata = [np.frombuffer(note, np.uint8)]
            data = cv2.imencodeWithMetadata(suffix, img, [cv2.IMAGE_METADATA_EXIF], metadata, params)[1].tobytes()
            if image_header(data).orientation != k: pytest.skip("this OpenCV writes no EXIF")
        (tmp_path / f"a{suffix}").write_bytes(data)
        done = without_orientation(tmp_path / f"a{suffix}", tmp_path / f"b{suffix}", is_upright=False)
        back = cv2.imread(str(tmp_path / f"b{suffix}"), cv2.IMREAD_COLOR)
        want = img.astype(int)
        assert back.shape == want.shape and image_header((tmp_path / f"b{suffix}").read_bytes()).orientation == 1
        is_jpeg = suffix == ".jpg"
        assert np.abs(back - want).mean() <= (3 if is_jpeg else 0)
        assert ("quality 95" in done) == is_jpeg


@pytest.mark.parametrize("k", [5, 6, 7, 8])
@pytest.mark.parametrize("labeled", ["upright", "stored"])
@pytest.mark.parametrize("format", ["coco", "voc"])
def test_images_that_lie_on_their_side(tmp_path, format, labeled, k):
    """The file is stored as 60x80 (h, w). Labeled upright, its boxes are as the labels have them; labeled as stored,
    they are turned with the image. A copy is the same."""
    ds = dataset(tmp_path / "d", 6, [(2, 10, 50, 30, 79)])
    img = cv2.imdecode(np.frombuffer(jpeg(2), np.uint8), 1)
    want = [[5, 5, 40, 40], [10, 50, 30, 79]]
    if labeled == "upright":
        shown = cv2.imencode(".jpg", np.ascontiguousarray(upright(img, k)))[1].tobytes()
        (tmp_path / "d/2.jpg").write_bytes(shown) # written as a person sees it ...
        sizes = ds.sizes.copy()
        sizes[2] = 80, 60
        ds = replace(ds, sizes=sizes)
    else:
        boxes = ds.boxes.copy()
        of_2 = ds.box_image == 2
        boxes[of_2] = want_stored = [[5, 5, 40, 40], [50, 10, 79, 30]]
        ds = replace(ds, boxes=boxes)
        want = boxes_upright(want_stored, k, (60, 80)).tolist()
    write_dataset(ds, tmp_path / "in", format)
    file = next(f for f in (tmp_path / "in").rglob("2.jpg"))
    file.write_bytes(exif(jpeg(2), k)) # ... but stored lying on its side
    report = check_dataset(tmp_path / "in", max_flawed=1)
    assert not [f for f in report.flaws if f.severity == "warning"] and len(report.ds) == 6
    kinds = [(f.kind, f.file.split("/")[-1]) for f in report.flaws if "rotat" in f.kind]
    assert kinds == [("rotated-image" if labeled == "stored" else "exif-rotation", "2.jpg")]
    copies = [tmp_path / "in"]
    if labeled == "stored": # the copy has the upright size in its labels
        fix_dataset(tmp_path / "in", tmp_path / "out")
        assert not [f for f in check_dataset(tmp_path / "out").flaws if f.severity == "warning"]
        copies.append(tmp_path / "out")
    for folder in copies:
        out = read_dataset(folder)
        i = [Path(p).name for p in out.paths].index("2.jpg")
        assert len(out) == 6 and out.sizes[i].tolist() == [80, 60] and out.boxes_of(i)[0].tolist() == want
        assert np.abs(out.image(i).astype(int) - upright(img, k)).mean() < 3


def test_boxes_that_only_fit_the_upright_image(tmp_path):
    "A COCO file whose sizes are those of the stored image, with boxes drawn on the upright one."
    write_dataset(dataset(tmp_path / "d", 6, [(2, 10, 50, 30, 79)]), tmp_path / "in", "coco")
    (tmp_path / "in/images/2.jpg").write_bytes(exif(jpeg(2), 6))
    ds = read_dataset(tmp_path / "in")
    assert [(f.kind, f.action) for f in ds.flaws] == [("rotated-image", "noted")] and "are kept" in ds.flaws[0].message
    assert ds.sizes[2].tolist() == [80, 60] and ds.boxes_of(2)[0].tolist() == [[5, 5, 40, 40], [10, 50, 30, 79]]


def test_boxes_that_only_fit_the_stored_image(tmp_path):
    "Labels without a size, drawn on the stored image: left out by the check; the copy has the pixels without the note."
    (tmp_path / "in").mkdir()
    lines = ["file,x1,y1,x2,y2,class"]
    for k in range(6):
        (tmp_path / f"in/{k}.jpg").write_bytes(exif(jpeg(k), 6 if k == 2 else 1))
        lines.append(f"{k}.jpg,5,5,{79 if k == 2 else 40},40,a")
    (tmp_path / "in/labels.csv").write_text("\n".join(lines))
    report = check_dataset(tmp_path / "in", max_flawed=1)
    found = [(f.kind, f.action) for f in report.flaws if f.severity == "warning"]
    assert found == [("rotated-image", "dropped"), ("partly-outside", "clipped")]
    changes = fixed(tmp_path / "in", tmp_path / "out")
    assert [(Path(c.file).name, c.kind, c.now) for c in changes] == [
        ("2.jpg", "rotated-image", "without it, encoded anew at quality 95")]
    out = read_dataset(tmp_path / "out")
    i = [Path(p).name for p in out.paths].index("2.jpg")
    assert len(out) == 6 and out.sizes[i].tolist() == [60, 80] and out.boxes_of(i)[0].tolist() == [[5, 5, 79, 40]]


def test_another_format(tmp_path):
    ds = dataset(tmp_path / "d", 6, [(1, 10, 10, 10, 20), (2, 20, 20, 50, 50)], flags=[0, 0, 0, 0, CROWD, 0, 0, 0])
    write_dataset(ds, tmp_path / "in", "coco")
    changes = fixed(tmp_path / "in", tmp_path / "out", to="yolo")
    assert read_dataset(tmp_path / "out").format == "yolo"
    assert [c.kind for c in changes] == ["zero-area", "lossy"]
    with pytest.raises(InputError, match="did you mean|coco"): fix_dataset(tmp_path / "in", tmp_path / "x", to="cocoo")
    assert not (tmp_path / "x").exists() and not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_what_is_refused(tmp_path, monkeypatch):
    write_dataset(dataset(tmp_path / "d"), tmp_path / "in", "voc")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a.txt").write_text("mine")
    with pytest.raises(InputError, match="is there already"): fix_dataset(tmp_path / "in", tmp_path / "full")
    with pytest.raises(InputError, match="inside the dataset"): fix_dataset(tmp_path / "in", tmp_path / "in/clean")
    with pytest.raises(InputError, match="no such file or folder"): fix_dataset(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(fix, "write_changes", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="could not be written: .*No space left"):
        fix_dataset(tmp_path / "in", tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == [] and (tmp_path / "full/a.txt").read_text() == "mine"
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]
    (tmp_path / "in/Annotations/5.xml").write_text("<annotation>")
    with pytest.raises(InputError, match="nothing can be fixed before this is: .*5.xml, line 1"):
        fix_dataset(tmp_path / "in", tmp_path / "out")
    write_dataset(replace(dataset(tmp_path / "d"), boxes=np.full((12, 4), 7.)), tmp_path / "flat", "voc")
    with pytest.raises(InputError, match="no box is left"): fix_dataset(tmp_path / "flat", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", range(12))
def test_fixed_is_clean_and_fixed_again_is_the_same(tmp_path, seed):
    "Many flaws at once, of every kind, in any format."
    rng = np.random.default_rng(seed)
    n = 24
    root = tmp_path / "d"
    format = ("coco", "voc", "yolo")[seed % 3]
    (root).mkdir()
    for k in range(n): (root / f"{k}.jpg").write_bytes(jpeg(int(rng.integers(0, n))))
    m = 90
    image = np.sort(rng.integers(0, n, m))
    xy = rng.uniform(-15, 85, (m, 2))
    wh = rng.choice([0, .004, 1, 8, 30, 60], (m, 2))
    boxes = np.c_[xy, xy + wh].astype(np.float32)
    boxes[1::5] = boxes[:-1:5][:len(boxes[1::5])]
    ds = DetDataset(root, ("Sack", "sack", "SACK_", "Person", "person "), [f"{k}.jpg" for k in range(n)], [(60, 80)]*n,
                    image,
                    boxes,
                    rng.integers(0, 5, m),
                    rng.choice(["train", "val", "test"], n),
                    flags=rng.choice([0, 0, 0, IGNORE], m) if format == "coco" else None)
    write_dataset(ds, tmp_path / "in", format)
    files = sorted((tmp_path / "in").rglob("*.jpg"))
    for f in rng.choice(files, 3, replace=False):
        f.write_bytes((b"", f.read_bytes()[:-200], exif(f.read_bytes(), 6))[rng.integers(0, 3)])
    assert fixed(tmp_path / "in", tmp_path / "out")
    assert fixed(tmp_path / "out", tmp_path / "again") == []
    a = read_dataset(tmp_path / "out")
    b = read_dataset(tmp_path / "again")
    assert a.paths.tolist() == b.paths.tolist() and np.abs(a.boxes - b.boxes).max() < 1e-3 and len(a.classes) == 2


def png_with_note(data, orientation):
    "A PNG with an EXIF orientation."
    note = b"eXIf" + b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 274, 3, 1, orientation, 0, 0)
    return data[:33] + struct.pack(">I", len(note) - 4) + note + struct.pack(">I", zlib.crc32(note)) + data[33:]


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_copy_is_upright_for_every_reader(tmp_path, orientation):
    "The pixels are turned, the note is gone, each such image is listed; a link keeps the file, which is said."
    ds = dataset(tmp_path / "d", 3)
    (tmp_path / "d/1.jpg").write_bytes(exif(jpeg(1), orientation))
    (tmp_path / "d/2.png").write_bytes(png_with_note(jpeg(2, ".png"), orientation))
    size = (80, 60) if orientation == 6 else (60, 80)
    ds = replace(ds, paths=["0.jpg", "1.jpg", "2.png"], sizes=[(60, 80), size, size])
    shown = [read_image(ds.path_of(i)) for i in range(3)]
    assert [image.shape[:2] for image in shown] == [tuple(s) for s in ds.sizes]
    copy = write_dataset(ds, tmp_path / "copy", "coco")
    assert [(f.kind, f.file) for f in copy.flaws] == [("upright-image", "1.jpg"), ("upright-image", "2.png")]
    for i in range(3):
        stored = cv2.imread(str(copy.path_of(i)), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        assert stored.shape == shown[i].shape
        assert np.abs(stored.astype(int) - shown[i]).mean() <= (0 if i != 1 else 3)
        assert image_header(copy.path_of(i).read_bytes()).orientation == 1
    assert copy.path_of(0).read_bytes() == ds.path_of(0).read_bytes()
    linked = write_dataset(ds, tmp_path / "linked", "voc", images="symlink")
    assert "2 links to images with an EXIF orientation" in linked.flaws[0].message
    changes = fix_dataset(tmp_path / "linked", tmp_path / "fixed")
    assert [(Path(c.file).name, c.kind) for c in changes] == [("1.jpg", "upright-image"), ("2.png", "upright-image")]
    assert "turned upright" in changes[0].now and json.loads((tmp_path / "fixed/changes.json").read_text())["changes"]


def test_new_names_are_listed(tmp_path):
    "Names that a label file cannot hold, and names that two images have."
    ds = dataset(tmp_path / "d", 4)
    old = ["a/1.jpg", "b/1.jpg", "two\nlines.jpg", "a/back\\slash.jpg"]
    for folder in "ab": (tmp_path / "d" / folder).mkdir()
    for k, name in enumerate(old): (tmp_path / "d" / f"{k}.jpg").rename(tmp_path / "d" / name)
    copy = write_dataset(replace(ds, paths=old), tmp_path / "copy", "voc")
    new = {f.file: f.where for f in copy.flaws if f.kind == "renamed-image"}
    assert new == {"a/1.jpg": "1.jpg", "b/1.jpg": "b_1.jpg", old[2]: "two%0Alines.jpg", old[3]: "back%5Cslash.jpg"}
    assert {Path(p).name for p in copy.paths} == {"1.jpg", *new.values()}
    (tmp_path / "in").mkdir()
    (tmp_path / "d").rename(tmp_path / "in/d")
    for path in old: (tmp_path / "in/d" / path).with_suffix(".txt").write_text("0 .5 .5 .2 .2\n")
    (tmp_path / "in/classes.txt").write_text("s\n")
    changes = fixed(tmp_path / "in", tmp_path / "out")
    assert {c.was.removeprefix("d/"): c.now for c in changes} == new


def test_an_image_that_loses_all_its_boxes_is_left_out(tmp_path):
    "It shows an object without a label; an image that never had a box stays background."
    ds = dataset(tmp_path / "d", 6, [(1, 10, 10, 30, 30)])
    boxes = ds.boxes.copy()
    boxes[ds.box_image == 1] += 200
    boxes[ds.box_image == 2] = 7
    keep = ds.box_image != 3
    ds = replace(ds, boxes=boxes).keep_boxes(keep)
    write_dataset(ds, tmp_path / "in", "coco")
    changes = fixed(tmp_path / "in", tmp_path / "out")
    found = [(Path(c.file).name, c.was, c.now) for c in changes if c.kind == "no-box-left"]
    assert found == [("1.jpg", "an image with 2 boxes", "left out"), ("2.jpg", "an image with 1 box", "left out")]
    out = read_dataset(tmp_path / "out")
    assert [Path(p).name for p in out.paths] == ["0.jpg", "3.jpg", "4.jpg", "5.jpg"]


def coco_source(root):
    polygon = [[10, 10, 30, 10, 30, 30]]
    box = dict(image_id=7, category_id=18, bbox=[10, 10, 20, 20])
    annotations = [dict(box, id=1, segmentation=polygon, keypoints=[1, 1, 2], score=.4, attributes=dict(n=3)),
                   dict(box, id=2, segmentation=dict(size=[60, 80], counts=[4800]), attributes=dict(n="x")),
                   dict(box, id=3, segmentation=[], keypoints=None)]
    (root / "t.json").write_text(json.dumps(dict(
        images=[dict(id=7, file_name="a.jpg", width=80, height=60, license=2)], annotations=annotations,
        categories=[dict(id=18, name="dog", supercategory="animal")], info=dict(year=1))))
    return ["polygons of 1 box", "masks of 1 box", "keypoints of 1 box", "'score' of 1 box", "'license' of 1 image",
            "attributes that are no texts (texts here) of 1 box", "supercategories of 1 class",
            "category ids (1, 2, 3, ... here) of 1 class", "info of 1 file"]


def labelme_source(root):
    shapes = [dict(label="dog", points=[[10, 10], [50, 50]], shape_type="rectangle"),
              dict(label="dog", points=[[10, 10], [50, 50], [10, 50]], shape_type="polygon"),
              dict(label="dog", points=[[30, 30], [40, 30]], shape_type="circle")]
    (root / "a.json").write_text(json.dumps(dict(shapes=shapes, imagePath="a.jpg", imageHeight=60, imageWidth=80)))
    return ["polygons of 1 box", "circles of 1 box"]


def voc_source(root):
    corners = "<bndbox><xmin>10</xmin><ymin>10</ymin><xmax>30</xmax><ymax>30</ymax></bndbox>"
    part = f"<part><name>head</name>{corners}</part>"
    objects = f"<object><name>dog</name><truncated>0</truncated>{corners}{part * 2}<score>.5</score></object>"
    (root / "a.xml").write_text(f"<annotation><filename>a.jpg</filename>{objects}</annotation>")
    return ["parts of 1 box", "<score> of 1 box"]


def cvat_source(root):
    shapes = ('<box label="dog" xtl="10" ytl="10" xbr="30" ybr="30"/>'
              '<box label="dog" xtl="10" ytl="10" xbr="30" ybr="30" rotation="30"/>'
              '<polygon label="dog" points="10,10;30,10;30,30"/>')
    (root / "a.xml").write_text(f'<annotations><image id="0" name="a.jpg" width="80" height="60">{shapes}</image>'
                                "</annotations>")
    return ["rotations of 1 box", "polygons of 1 box"]


def yolo_source(root):
    (root / "classes.txt").write_text("dog\n")
    (root / "a.txt").write_text("0 .1 .1 .5 .1 .5 .5\n0 .5 .5 .2 .2\n")
    return ["outlines or keypoints of 1 box"]


def csv_source(root):
    (root / "t.csv").write_text("filename,xmin,ymin,xmax,ymax,class,weather\na.jpg,10,10,30,30,dog,rain\n")
    return ["column 'weather' of 1 table"]


SOURCES = [coco_source, labelme_source, voc_source, cvat_source, yolo_source, csv_source]


@pytest.mark.parametrize("write_source", SOURCES)
def test_what_a_dataset_does_not_hold_is_named(tmp_path, write_source):
    "By the conversion, the fix and the tiles; what was written itself has nothing of that kind."
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(jpeg())
    lost = write_source(tmp_path / "in")
    ds = read_dataset(tmp_path / "in")
    copy = write_dataset(ds, tmp_path / "copy", "coco")
    note, = [f for f in copy.flaws if f.kind == "not-kept"]
    for what in lost: assert what in note.message
    assert note.message.count(" of ") == len(lost), note.message
    change, = [c for c in fix_dataset(tmp_path / "in", tmp_path / "fixed") if c.kind == "not-kept"]
    assert change.why == note.message
    assert note in tile_dataset(ds, tmp_path / "tiles", 32).flaws
    again = write_dataset(copy, tmp_path / "again", "voc")
    assert not [f for f in again.flaws if f.kind == "not-kept"]


@pytest.mark.parametrize("write_source, given, copied", [
    (coco_source, "t.json", "old.json"), (csv_source, "t.csv", "u.csv"), (cvat_source, "a.xml", "old.xml"),
    (yolo_source, "", "old/a.txt"), (labelme_source, "", "old/a.json"),
])
def test_what_was_not_read_is_not_counted(tmp_path, write_source, given, copied):
    (tmp_path / "in/old").mkdir(parents=True)
    (tmp_path / "in/a.jpg").write_bytes(jpeg())
    lost = write_source(tmp_path / "in")
    labels = next(p for p in (tmp_path / "in").iterdir() if p.suffix == Path(copied).suffix and p.stem != "classes")
    ds = read_dataset(tmp_path / "in" / given)
    shutil.copy(labels, tmp_path / "in" / copied)
    note, = not_kept(ds)
    for what in lost: assert what in note.message


def test_an_annotation_file_that_is_left_out_is_not_counted(tmp_path):
    ds = dataset(tmp_path, 3)
    polygon = [[1, 1, 9, 1, 9, 9]]
    for name, count in (("all.json", 3), ("part.json", 2)):
        d = to_coco(ds.subset(range(count)))
        for annotation in d["annotations"]: annotation["segmentation"] = polygon
        (tmp_path / name).write_text(json.dumps(d))
    note, = not_kept(read_dataset(tmp_path))
    assert f"polygons of {len(ds.boxes)} box" in note.message


def test_a_box_beside_its_image_cannot_become_yolo(tmp_path):
    "The error names image and box, and nothing that is gone."
    ds = dataset(tmp_path / "d", 3, [(1, 400, 10, 420, 30), (1, 60, 10, 110, 30)])
    with pytest.raises(InputError, match=r"^1\.jpg: box 2 \(s\) .*80x60.*data check --fix") as e:
        write_dataset(ds, tmp_path / "out", "yolo")
    assert "part" not in str(e.value) and sorted(p.name for p in tmp_path.iterdir()) == ["d"]
    write_dataset(ds, tmp_path / "out", "voc")


@pytest.mark.data
@pytest.mark.parametrize("name, kinds, images, boxes",
                        [("bccd", ["duplicate-across-splits", "zero-area", "zero-area"], 363, 4858),
                         ("kangaroo", ["truncated-image"], 163, 263), ("raccoon", [], 200, 217)])
def test_real(data, tmp_path, name, kinds, images, boxes):
    changes = fix_dataset(data / "datasets" / name, tmp_path / "out")
    report = clean(tmp_path / "out")
    assert [c.kind for c in changes] == kinds and (len(report.ds), len(report.ds.boxes)) == (images, boxes)
