"Labels that say more than a box: outlines, masks, points, areas; and that what they state is kept to the digit."
import json
import time
from dataclasses import replace

import numpy as np
import pytest

from label_files import attributes_of, image_bytes, put, refused
from jetson_det.data.dataset import CROWD, IGNORE, DetDataset, has_own_area, to_coco
from jetson_det.data.formats.masks import _run_length_box
from jetson_det.data.formats.plates import read_plates
from jetson_det.data.formats.reader import Files, walk_files
from jetson_det.data.formats.registry import find_format, read_dataset, write_dataset
from jetson_det.data.index import load_index, read_indexed
from jetson_det.data.split import ensure_splits, made_splits
from jetson_det.data.tiles import tile_dataset


# Masks

def test_run_lengths_are_those_of_pycocotools():
    coco_mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for share in (0, .02, .3, .9, 1):
        for _ in range(40):
            h, w = rng.integers(1, 50, 2).tolist()
            mask = np.asfortranarray((rng.random((h, w)) < share).astype(np.uint8))
            code = coco_mask.encode(mask)
            x, y, bw, bh = coco_mask.toBbox(code)
            flat = mask.ravel("F")
            edges = np.flatnonzero(np.diff(flat)) + 1
            counts = np.diff([0, *([0] if flat[0] else []), *edges, h * w]).tolist()
            for lengths in (code["counts"].decode(), counts):
                box, area = _run_length_box(lengths, [h, w])
                assert area == mask.sum()
                assert (box is None and not area) or np.allclose(box, (x, y, x + bw, y + bh))


def coco(*annotations):
    return dict(images=[dict(id=1, file_name="a.jpg", height=48, width=64)],
                annotations=[dict(dict(id=k, image_id=1, category_id=1), **a) for k, a in enumerate(annotations, 1)],
                categories=[dict(id=1, name="s")])


def read_coco_of(root, *annotations):
    put(root, {"a.jpg": image_bytes(), "x.json": coco(*annotations)})
    return read_dataset(root)


RLE = dict(counts=[48*3 + 5, 10, 38, 10, 48*64 - 207], size=[48, 64])
RING = [[2, 3, 12, 3, 7, 23]]


@pytest.mark.parametrize("annotation, box, area", [
    (dict(segmentation=RLE), [3, 5, 5, 15], 20),
    (dict(segmentation=RLE, bbox=[], area=7), [3, 5, 5, 15], 7),
    (dict(segmentation=RLE, bbox=None), [3, 5, 5, 15], 20),
    (dict(segmentation=RLE, bbox=[0, 0, 0, 0]), [3, 5, 5, 15], 20),
    (dict(segmentation=RLE, bbox=[1, 2, 3, 4]), [1, 2, 4, 6], np.nan),
    (dict(segmentation=RING, bbox=[]), [2, 3, 12, 23], np.nan),
    (dict(segmentation=RING, bbox=[0, 0, 0, 0], area=99.5), [2, 3, 12, 23], 99.5),
    (dict(segmentation=RING + [[30, 30, 40, 30, 40, 40]]), [2, 3, 40, 40], np.nan),
    (dict(segmentation=[[[2, 3], [12, 3], [7, 23]]]), [2, 3, 12, 23], np.nan),
    (dict(segmentation=RING[0]), [2, 3, 12, 23], np.nan),
])
def test_the_box_of_a_mask(tmp_path, annotation, box, area):
    ds = read_coco_of(tmp_path, annotation)
    assert ds.boxes.tolist() == [box]
    assert np.array_equal(ds.areas, [area], equal_nan=True)


@pytest.mark.parametrize("segmentation", [RLE, RING, [], None, [[]], [[1, 2, 3]], "x"])
def test_flat_boxes_of_regular_files(tmp_path, monkeypatch, segmentation):
    "With and without the quick parser."
    rows = dict(bbox=[1, 2, 3, 0], segmentation=segmentation), dict(bbox=[1, 2, 3, 4])
    with_parser = read_coco_of(tmp_path, *rows)
    monkeypatch.setattr("jetson_det.data.formats.coco_file._parse_columns", lambda data: None)
    without = read_coco_of(tmp_path, *rows)
    assert with_parser.boxes.tolist() == without.boxes.tolist()
    assert np.array_equal(with_parser.areas, without.areas, equal_nan=True)
    assert (without.boxes[0].tolist() == [1, 2, 4, 2]) == (segmentation not in (RLE, RING))


@pytest.mark.parametrize("annotation, parts", [
    (dict(segmentation=dict(counts=[1, 2], size=[48, 64])), ["annotation 1 has no box", "do not add up to the 64x48"]),
    (dict(segmentation=dict(counts="5!", size=[48, 64])), ["compressed run lengths are damaged"]),
    (dict(segmentation=dict(counts="5P", size=[48, 64])), ["are cut"]),
    (dict(segmentation=dict(counts=[1])), ["its mask needs a size [height, width], not None"]),
    (dict(segmentation=dict(counts=[-1, 3073], size=[48, 64])), ["do not add up"]),
    (dict(segmentation=dict(counts=[10**30], size=[48, 64])), ["do not add up"]),
    (dict(segmentation=dict(counts=[1], size=[10**6, 10**6])), ["needs a size"]),
    (dict(segmentation=[[1, 2, 3]]), ["x and y for each point"]),
    (dict(segmentation=[[1, "x"]]), ["'x' is not a number"]),
    (dict(segmentation="x"), ["must be outlines, or counts and size"]),
    (dict(bbox=[]), ["bbox must be four numbers"]),
    (dict(bbox=[1, 2, 3], segmentation=RING), ["bbox must be four numbers"]),
])
def test_masks_that_make_no_sense(tmp_path, annotation, parts):
    refused(lambda: read_coco_of(tmp_path, annotation), "x.json, line 1: ", *parts)


def test_an_empty_mask_is_left_out(tmp_path):
    ds = read_coco_of(tmp_path, dict(bbox=[1, 2, 3, 4]), dict(segmentation=dict(counts=[3072], size=[48, 64])))
    assert len(ds.boxes) == 1
    assert [(f.kind, f.where, f.action) for f in ds.flaws] == [("no-box", "annotation 2", "dropped")]


# Areas and digits

BOXES = [[10.1, 10.3, 5.7, 6.9], [0.123456, 1.654321, 20.000001, 30.999999], [1, 1, 2, 2]]


@pytest.fixture
def stated(tmp_path):
    "Three boxes; areas of an outline, of the box itself, of nothing; flags; an attribute."
    rows = [dict(bbox=b) for b in BOXES]
    rows[0].update(area=17.25, iscrowd=1)
    rows[1].update(area=BOXES[1][2] * BOXES[1][3], ignore=1, attributes=dict(text="B4 XQZ"))
    return read_coco_of(tmp_path / "in", *rows)


def agrees(ds, stated):
    assert np.abs(ds.boxes - stated.boxes).max() < 1e-6 and ds.flags.tolist() == [CROWD, IGNORE, 0]
    assert has_own_area(ds).tolist() == [True, False, False]
    assert ds.areas[0] == 17.25
    assert attributes_of(ds) == {"text": ["", "B4 XQZ", ""]}
    assert to_coco(ds)["annotations"][0]["area"] == 17.25


def test_what_coco_states_is_kept(stated, tmp_path, monkeypatch):
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path / "cache"))
    agrees(stated, stated)
    assert stated.boxes.dtype == np.float64 and stated.boxes[0, 0] == 10.1
    agrees(write_dataset(stated, tmp_path / "out", "coco"), stated)
    agrees(stated.subset([0]), stated)
    agrees(stated.keep_boxes(np.ones(3, bool)), stated)
    agrees(ensure_splits(stated), stated)
    time.sleep(.03) # an index is not kept of files that are as new as the reading
    read_indexed(tmp_path / "in")
    again = load_index(tmp_path / "in")
    agrees(again, stated)
    assert (again.boxes == stated.boxes).all() and again.fingerprint() == stated.fingerprint()


def test_areas_as_text_or_wrong(tmp_path):
    values = ["12.5", 0, -1, None, True, "x", 10**400, [], 3]
    ds = read_coco_of(tmp_path, *[dict(bbox=[1, 2, 3, 4], area=v) for v in values])
    assert np.array_equal(ds.areas, [12.5, 0] + [np.nan] * 6 + [3], equal_nan=True)


def test_an_area_of_the_box_follows_the_box(stated):
    moved = stated.keep_boxes(np.ones(3, bool), stated.boxes + [0, 0, 1, 1])
    assert moved.areas[0] == 17.25 and np.isnan(moved.areas[1])


def test_the_fingerprint_knows_areas_but_not_rounding(stated):
    same = replace(stated, areas=[17.25, np.nan, 4.001])
    assert same.fingerprint() == stated.fingerprint()
    assert replace(stated, areas=[17.5, np.nan, np.nan]).fingerprint() != stated.fingerprint()
    assert replace(stated, boxes=stated.boxes + 1e-9).fingerprint() == stated.fingerprint()


@pytest.mark.parametrize("format", ["yolo", "voc"])
def test_formats_without_areas_say_so(stated, tmp_path, format):
    ds = replace(stated, flags=None)
    new = write_dataset(ds, tmp_path / "out", format)
    assert any("areas of 1 outline" in f.message for f in new.flaws)


def test_tiles_keep_the_areas_of_whole_objects(tmp_path):
    put(tmp_path, {"in/a.png": image_bytes(96, 128, ".png")})
    ds = DetDataset(tmp_path / "in", ("s",), ["a.png"], [(96, 128)], [0, 0], [(5, 5, 25, 25), (50, 5, 90, 45)], [0, 0],
                    areas=[99, 1000])
    tiles = tile_dataset(ds, tmp_path / "out", 64, overlap=0, cut="clip")
    assert sorted(tiles.areas[has_own_area(tiles)]) == [99]


# Points

def yolo(root, text, more=""):
    put(root, {"images/a.jpg": image_bytes(50, 100), "labels/a.txt": text,
               "data.yaml": f"train: images\nnames: [s]\n{more}"})
    ds = read_dataset(root, "yolo")
    return ds.boxes.round(6).tolist(), [f.message for f in ds.flaws if f.kind == "two-readings"]


def points(x, y, w, h, *places, mark=None):
    "A line with a box, and points at shares of it."
    numbers = [x, y, w, h]
    for px, py in places: numbers += [x + (px - .5) * w, y + (py - .5) * h] + ([] if mark is None else [mark])
    return "0 " + " ".join(f"{v:.4f}" for v in numbers) + "\n"


CORNERS = [(0, 0), (1, 0), (1, 1), (0, 1)]
FACE = [(.3, .4), (.7, .4), (.5, .6), (.35, .8), (.65, .8)]
BOX = (.5, .4, .3, .4)


@pytest.mark.parametrize("text", [
    points(*BOX, *CORNERS),
    points(*BOX, *FACE),
    points(*BOX, *CORNERS, mark=2),
    points(*BOX, *FACE[:3], mark=1),
    points(*BOX, *CORNERS[::2]),
    points(*BOX, (.2, .2), mark=2),
    points(*BOX, *FACE[:4]) .rstrip() + " -1 -1\n",
])
def test_a_box_with_points(tmp_path, text):
    boxes, notes = yolo(tmp_path, text)
    assert boxes == [[35, 10, 65, 30]]
    assert len(notes) == 1 and "a box and points in it" in notes[0] and "labels/a.txt, line 1" in notes[0]


@pytest.mark.parametrize("text, box", [
    ("0 .5 .5 .52 .5 .52 .53 .5 .53\n", [50, 25, 52, 26.5]),
    ("0 .5 .5 .52 .5 .52 .53\n", [50, 25, 52, 26.5]),
])
def test_a_small_outline_is_an_outline_and_is_noted(tmp_path, text, box):
    boxes, notes = yolo(tmp_path, text)
    assert boxes == [box] and len(notes) == 1 and "are read as outlines" in notes[0] and "kpt_shape" in notes[0]


@pytest.mark.parametrize("text", [
    "0 .1 .1 .9 .1 .9 .9 .1 .9\n",
    "0 .5 .2 .8 .5 .5 .8 .2 .5\n",
    "0 .25 .25 .5 .25 .5 .75\n",
])
def test_an_outline_without_another_reading_is_not_noted(tmp_path, text):
    assert yolo(tmp_path, text)[1] == []


def test_random_outlines_are_outlines(tmp_path):
    rng = np.random.default_rng(1)
    text = ""
    want = []
    for _ in range(200):
        center = rng.uniform(.2, .8, 2)
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
        ring = center + np.c_[np.cos(angles), np.sin(angles)] * rng.uniform(.02, .2)
        text += "0 " + " ".join(f"{v:.5f}" for v in ring.ravel()) + "\n"
        want.append([*ring.min(0), *ring.max(0)])
    boxes, notes = yolo(tmp_path, text)
    assert np.abs(boxes - np.array(want) * [100, 50, 100, 50]).max() < .01
    assert len(notes) <= 1


def test_kpt_shape_decides(tmp_path):
    boxes, notes = yolo(tmp_path, points(*BOX, (-1, 3)), "kpt_shape: [1, 2]\n")
    assert boxes == [[35, 10, 65, 30]] and notes == []


def test_an_even_number_that_is_no_box_with_points(tmp_path):
    refused(lambda: yolo(tmp_path, "0 .5 .5 .1 .1 .9 .9 2\n"), "labels/a.txt, line 1: 8 numbers")


# Plate lists

def test_the_line_names_its_image_and_another_has_the_stem_of_the_list(tmp_path):
    put(tmp_path, {"gate.jpg": image_bytes(), "gate.png": image_bytes(suffix=".png"),
                   "gate.txt": "gate.jpg\t1\t2\t30\t10\tAB 12\n"})
    ds = read_dataset(tmp_path)
    assert ds.format == "plates" and ds.paths.tolist() == ["gate.jpg"] and ds.boxes.tolist() == [[1, 2, 31, 12]]
    put(tmp_path, {"gate.txt": ""})
    refused(lambda: read_plates(tmp_path), "gate.txt: 'gate' could be gate.jpg or gate.png")


@pytest.mark.parametrize("line, text", [("1.jpg 1 2 30 10 7ABC", "7ABC"), ("1.jpg\t1\t2\t30\t10\t7 ABC 8", "7 ABC 8"),
                                        ("1.jpg,1,2,30,10,7ABC", "7ABC")])
@pytest.mark.parametrize("file", ["1.txt", "labels/1.txt", "2024_list.txt"])
def test_words_that_begin_with_a_digit_are_no_yolo(tmp_path, line, text, file):
    image = "images/1.jpg" if "/" in file else "1.jpg"
    put(tmp_path, {image: image_bytes(), file: line + "\n"})
    assert find_format(Files(tmp_path)) == "plates"
    assert read_dataset(tmp_path).attributes["text"].tolist() == [text]


# Attributes

ATTRIBUTES = {"text": ["M5 <XSX>", "222 AB", "0"], "occluded": ["2", "0", "1"], "truncated": ["0.35", "", "true"],
              "pose": ["Rear", "unspecified", ""], "odd name": ["no", "\x1b[31m", "a & b"], "area": ["7", "", ""]}


@pytest.mark.parametrize("format", ["coco", "voc"])
def test_every_attribute_comes_back(tmp_path, format):
    put(tmp_path, {"in/a.jpg": image_bytes()})
    boxes = [(k, 1, 9, 9) for k in range(3)]
    ds = DetDataset(tmp_path / "in", ("s\x07",), ["a.jpg"], [(48, 64)], [0] * 3, boxes, [0] * 3, attributes=ATTRIBUTES)
    new = write_dataset(ds, tmp_path / "out", format)
    want = json.loads(json.dumps(ATTRIBUTES).replace("\\u001b", "\\\\x1b")) if format == "voc" else ATTRIBUTES
    assert attributes_of(new) == want
    assert attributes_of(write_dataset(new, tmp_path / "again", format)) == want


# What systems leave behind

def test_files_of_systems_are_no_data(tmp_path):
    put(tmp_path, {"images/a.jpg": image_bytes(), "labels/a.txt": "0 .5 .5 .5 .5\n", "classes.txt": "s\n"})
    left = ["images/._a.jpg", "images/Thumbs.db", "images/desktop.ini", "images/.DS_Store", "__MACOSX/images/a.jpg",
            "images/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "$RECYCLE.BIN/b.jpg", "labels/._a.txt",
            ".ipynb_checkpoints/c.jpg", "labels/.hidden.names", "#recycle/a.jpg", "System Volume Information/x.jpg"]
    for f in left: put(tmp_path, {f: image_bytes()})
    ds = read_dataset(tmp_path)
    assert ds.paths.tolist() == ["images/a.jpg"] and ds.flaws == []
    assert walk_files(tmp_path) == ["classes.txt", "images/Thumbs.db", "images/a.jpg", "images/desktop.ini",
                                    "labels/a.txt"]
    put(tmp_path, {"list.txt": "images/a.jpg\nimages/._a.jpg\n", "data.yaml": "train: list.txt\nnames: [s]\n"})
    assert read_dataset(tmp_path).paths.tolist() == ["images/a.jpg"]


# Splits that were made are said

def test_made_splits_are_said_with_the_command(tmp_path):
    paths = [f"{k}.jpg" for k in range(10)]
    def ds(splits=None): return DetDataset(tmp_path, ("s",), paths, [(48, 64)] * 10, [0], [(1, 1, 9, 9)], [0], splits)
    whole = ds()
    line = made_splits(whole, ensure_splits(whole), tmp_path)
    assert line == (f"the data has no splits: train 7, val 2, test 1 images were chosen (random, seed 0); to keep this"
                    f" choice: jetson-det data split {tmp_path} --out {tmp_path}/splits")
    part = ds(["train"] * 8 + ["test"] * 2)
    how = dict(val=.25, seed=3, by="stratified")
    line = made_splits(part, ensure_splits(part, **how), "x y.json", **how)
    assert line.startswith("the data has no val: val 2 images were chosen (stratified, seed 3)")
    assert line.endswith("data split 'x y.json' --val 0.25 --by stratified --seed 3 --out splits and"
                         " data.splits=splits")
    own = ds(["train"] * 8 + ["val"] * 2)
    assert made_splits(own, ensure_splits(own), tmp_path) == ""
    rest = ds([""] * 8 + ["val"] * 2)
    assert made_splits(rest, ensure_splits(rest), tmp_path) == ""


@pytest.mark.parametrize("format", ["coco", "voc"])
@pytest.mark.parametrize("files, want", [
    ({"image_2/1.png": image_bytes(suffix=".png"),
      "label_2/1.txt": "Car 0.35 2 -1.57 1 2 30 40 -1 -1 -1 -1000 -1000 -1000 -10\n"},
     {"truncated": ["0.35"], "occluded": ["2"], "alpha": ["-1.57"]}),
    ({"1.jpg": image_bytes(), "list.txt": "1.jpg\t1\t2\t30\t10\tM5  & <8>\n"}, {"text": ["M5  & <8>"]}),
    ({"1.jpg": image_bytes(), "x.csv": "file,class,xmin,ymin,xmax,ymax,occluded,text\n1.jpg,s,1,2,9,9,0.5,AB 1\n"},
     {"occluded": ["0.5"], "text": ["AB 1"]}),
])
def test_attributes_of_other_formats_survive(tmp_path, files, want, format):
    put(tmp_path / "in", files)
    ds = read_dataset(tmp_path / "in")
    assert attributes_of(ds) == want
    assert attributes_of(write_dataset(ds, tmp_path / "out", format)) == want
