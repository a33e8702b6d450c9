"""Flaws: found, counted, repaired in the open, or refused."""
import json
import re
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jetson_det.cli_data import _print_changes
from jetson_det.core import InputError
from jetson_det.data.balance import balance_table
from jetson_det.data.open import _flaw_lines
from jetson_det.data.quality.stats import dataset_stats
from jetson_det.data.split import ensure_splits, split_table
from jetson_det.data.quality.check import (_ADVICE, box_flaws, check_dataset, check_images, class_balance,
                                           input_fit, odd_boxes, prepare, repeated_boxes, similar_classes,
                                           unlearned_boxes)
from jetson_det.data.quality.stats import advise
from jetson_det.data.dataset import CROWD, DIFFICULT, IGNORE, DetDataset, Flaw
from jetson_det.data.formats.registry import read_dataset, write_dataset
from jetson_det.train.data import labeled_split
from train_helpers import config


def jpeg(k=0, suffix=".jpg", params=()):
    img = cv2.resize(np.random.default_rng(k).integers(0, 255, (8, 8, 3), np.uint8), (80, 60))
    return cv2.imencode(suffix, img, list(params))[1].tobytes()


def dataset(root, n=120, boxes=(), **kw):
    "n images with one sound box each and the extra ones: (image, x1, y1, x2, y2)"
    root.mkdir(exist_ok=True)
    for k in range(n): (root / f"{k}.jpg").write_bytes(jpeg(k))
    rows = np.array(sorted([(k, 5, 5, 40, 40) for k in range(n)] + list(boxes), key=lambda r: r[0]), np.float32)
    return DetDataset(root, ("s",), [f"{k}.jpg" for k in range(n)], [(60, 80)] * n, rows[:, 0], rows[:, 1:],
                      [0] * len(rows), format="coco", **kw)


def train_on(folder):
    "Up to the first step, which no test here reaches."
    from jetson_det.train.loop import train
    return train(config(folder), folder.parent / "run")


def refused(call, *parts):
    with pytest.raises(InputError) as e: call()
    line = str(e.value)
    assert "\n" not in line
    for p in parts: assert p in line, line


def test_check_images(tmp_path):
    ds = dataset(tmp_path, 8, splits=["train"] * 4 + ["test"] * 4)
    (tmp_path / "1.jpg").write_bytes(jpeg(1)[:-400])
    (tmp_path / "2.jpg").write_bytes(b"")
    (tmp_path / "3.jpg").write_bytes(b"no image")
    (tmp_path / "4.jpg").unlink()
    (tmp_path / "5.jpg").write_bytes(jpeg(0))
    (tmp_path / "7.jpg").write_bytes(jpeg(6))
    flaws = check_images(ds, workers=3)
    assert [(f.severity, f.kind, f.file, f.action) for f in flaws] == [
        ("warning", "truncated-image", "1.jpg", "dropped"),
        ("warning", "empty-image", "2.jpg", "dropped"),
        ("warning", "unreadable-image", "3.jpg", "dropped"),
        ("warning", "missing-image", "4.jpg", "dropped"),
        ("warning", "duplicate-across-splits", "5.jpg", "noted"),
        ("note", "duplicate-image", "7.jpg", "noted"),
    ]
    assert flaws[-2].where == "0.jpg" and "one is in test, one in train" in flaws[-2].message


def test_the_same_image_in_two_splits(tmp_path):
    "Named is the image to evaluate on, once, with its duplicate in train; near copies as well as the same file."
    ds = dataset(tmp_path, 9, splits=["train", "train", "train", "val", "val", "val", "test", "test", "test"])
    img = cv2.imdecode(np.frombuffer(jpeg(0), np.uint8), 1)
    (tmp_path / "3.jpg").write_bytes(cv2.imencode(".jpg", cv2.resize(img, (160, 120)))[1].tobytes())
    (tmp_path / "7.jpg").write_bytes(jpeg(0))
    (tmp_path / "8.jpg").write_bytes(jpeg(5))
    (tmp_path / "2.jpg").write_bytes(jpeg(1))
    flaws = check_images(ds)
    assert [(f.kind, f.file, f.where) for f in flaws] == [
        ("duplicate-across-splits", "3.jpg", "0.jpg"),
        ("duplicate-across-splits", "7.jpg", "0.jpg"),
        ("duplicate-across-splits", "8.jpg", "5.jpg"),
        ("duplicate-image", "2.jpg", "1.jpg"),
    ]
    assert "nearly the same image" in flaws[0].message and "the same file" in flaws[1].message


def test_equal_files_with_different_labels(tmp_path):
    "Which of them is right is for a person to say: 'keep one' would be a coin toss."
    ds = dataset(tmp_path / "in", 8, [(3, 50, 10, 78, 30)])
    boxes = ds.boxes.copy()
    boxes[ds.box_image == 5] += (0, 0, 9, 9)
    boxes[ds.box_image == 7] += .2
    for k in (1, 3, 5, 7): (tmp_path / f"in/{k}.jpg").write_bytes(jpeg(k - 1))
    flaws = check_images(replace(ds, boxes=boxes))
    assert [(f.severity, f.kind, f.file, f.where) for f in flaws] == [
        ("note", "duplicate-image", "1.jpg", "0.jpg"),
        ("note", "conflicting-labels", "3.jpg", "2.jpg"),
        ("note", "conflicting-labels", "5.jpg", "4.jpg"),
        ("note", "duplicate-image", "7.jpg", "6.jpg"),
    ]
    assert "labeled differently (2 boxes and 1)" in flaws[1].message and "boxes are elsewhere" in flaws[2].message
    assert "keep one" == _ADVICE["duplicate-image"] and "look at both" in _ADVICE["conflicting-labels"]


def test_an_input_size_that_cannot_be_trained_at(tmp_path):
    write_dataset(dataset(tmp_path / "in", 3), tmp_path / "d", "coco")
    refused(lambda: check_dataset(tmp_path / "d", input_size=(400, 400)), "400x400", "416x416")


def test_control_characters_are_escaped(tmp_path, capsys):
    "Class names and file names from strangers, in everything that is printed."
    ds = replace(dataset(tmp_path / "in", 8, [(7, 10, 10, 10, 20)]), classes=("\x1b[31mcat\u202e", ))
    (tmp_path / "in/0.jpg").rename(tmp_path / "in/\x1b]0;title\x07.jpg")
    ds = replace(ds, paths=["\x1b]0;title\x07.jpg", *ds.paths[1:]])
    for k in (0, 2): (tmp_path / "in" / ds.paths[k]).write_bytes(jpeg(1))
    copy = write_dataset(ds, tmp_path / "d", "coco")
    report = check_dataset(tmp_path / "d", max_flawed=1)
    split = ensure_splits(ds)
    _print_changes(copy, ds)
    texts = [str(report), repr(ds), str(dataset_stats(ds)), split_table(split), balance_table(ds)]
    texts += [capsys.readouterr().out, *_flaw_lines(report.flaws)]
    for text in texts:
        assert text and all(line.isprintable() for line in text.split("\n")), repr(text)
    assert "\\x1b[31mcat\\u202e" in texts[0]


def test_a_camera_that_looks_at_a_wall_is_one_note(tmp_path):
    ds = dataset(tmp_path, 40)
    img = cv2.imdecode(np.frombuffer(jpeg(0), np.uint8), 1)
    for k in range(40):
        noisy = np.clip(img + np.random.default_rng(k).normal(0, 4, img.shape), 0, 255).astype(np.uint8)
        (tmp_path / f"{k}.jpg").write_bytes(cv2.imencode(".jpg", noisy)[1].tobytes())
    flaws = check_images(ds)
    assert [f.kind for f in flaws] == ["near-duplicate"] and "38 more images of the same kind" in flaws[0].message


def exif(data, orientation):
    tag = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 274, 3, 1, orientation, 0, 0)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(tag) + 2) + tag + data[2:]


def test_turned_images(tmp_path):
    "Sizes are those of the upright image: 80x60 (h, w) for a file of 60x80 that lies on its side."
    ds = dataset(tmp_path / "in", 5, [(1, 50, 10, 78, 30), (2, 10, 10, 20, 20), (3, 40, 70, 50, 79)])
    sizes = ds.sizes.copy()
    sizes[1:4] = 80, 60
    ds = replace(ds, sizes=sizes)
    for k in (1, 2, 3, 4): (tmp_path / f"in/{k}.jpg").write_bytes(exif(jpeg(k), 6 if k < 4 else 1))
    clean, flaws = prepare(ds, max_flawed=.5)
    warnings = [(f.kind, f.file) for f in flaws if f.severity == "warning"]
    assert warnings[0] == ("rotated-image", "1.jpg")
    assert "1.jpg" not in clean.paths and len(clean) == 4
    write_dataset(ds.subset([0, 2, 3, 4]), tmp_path / "yolo", "yolo", "hardlink") # a copy is turned
    notes = [f for f in check_dataset(tmp_path / "yolo").flaws if f.kind == "exif-rotation"]
    assert [Path(f.file).name for f in notes] == ["2.jpg", "3.jpg"]
    assert {f.severity for f in notes} == {"note"} and "do not say which" in notes[0].message


def test_unusual_images(tmp_path):
    ds = dataset(tmp_path / "in", 4)
    gray = cv2.imdecode(np.frombuffer(jpeg(0), np.uint8), 0)
    (tmp_path / "in/0.jpg").write_bytes(cv2.imencode(".jpg", gray)[1].tobytes())
    (tmp_path / "in/1.jpg").write_bytes(cv2.imencode(".png", cv2.cvtColor(gray, cv2.COLOR_GRAY2BGRA))[1].tobytes())
    deep = cv2.cvtColor(gray, cv2.COLOR_GRAY2BGR).astype(np.uint16) * 200
    (tmp_path / "in/2.jpg").write_bytes(cv2.imencode(".png", deep)[1].tobytes())
    write_dataset(ds, tmp_path / "d", "coco")
    found = [f for f in check_dataset(tmp_path / "d").flaws if f.kind.endswith("-image") and "duplicate" not in f.kind]
    assert [(f.severity, f.kind, f.file) for f in found] == [("note", "gray-image", "images/0.jpg"),
                                                             ("note", "alpha-image", "images/1.jpg"),
                                                             ("note", "deep-image", "images/2.jpg")]
    for k in range(4):
        rolled = np.roll(gray, 9 * k, 1)
        (tmp_path / f"in/{k}.jpg").write_bytes(cv2.imencode(".jpg", rolled)[1].tobytes())
    write_dataset(ds, tmp_path / "all", "coco")
    flaw, = [f for f in check_dataset(tmp_path / "all").flaws if f.kind == "gray-image"]
    assert flaw.message.startswith("all images, such as")


@pytest.mark.parametrize("box, kind, action", [((10, 10, 10, 20), "zero-area", "dropped"),
                                              ((10, 10, 20, 10), "zero-area", "dropped"),
                                              ((20, 10, 10, 20), "zero-area", "dropped"),
                                              ((90, 10, 99, 20), "outside", "dropped"),
                                              ((-9, -9, 0, 5), "outside", "dropped"),
                                              ((10, 60, 20, 70), "outside", "dropped"),
                                              ((70, 10, 85, 20), "partly-outside", "clipped"),
                                              ((-5, 10, 20, 20), "partly-outside", "clipped"),
                                              ((10, 10, 80.5, 20), "rounding", "clipped"),
                                              ((0, 0, 80, 60), None, None)])
def test_box_flaws(tmp_path, box, kind, action):
    ds = dataset(tmp_path, 3, [(1, *box)])
    keep, clipped, flaws = box_flaws(ds)
    assert [(f.kind, f.action, f.file) for f in flaws] == ([(kind, action, "1.jpg")] if kind else [])
    assert keep.sum() == len(ds.boxes) - (action == "dropped")
    kept = clipped[keep]
    assert (kept >= 0).all() and (kept <= [80, 60, 80, 60]).all() and (kept[:, 2:] > kept[:, :2]).all()


def test_under_one_percent_is_repaired_and_said(tmp_path):
    ds = dataset(tmp_path, 120, [(7, 10, 10, 10, 20), (7, 70, 10, 99, 20)])
    clean, flaws = prepare(ds)
    assert len(clean) == 120 and len(clean.boxes) == 121
    assert clean.boxes_of(7)[0].tolist() == [[5, 5, 40, 40], [70, 10, 80, 20]]
    assert [f.kind for f in flaws] == ["zero-area", "partly-outside"]
    assert clean.flaws == flaws and "1 zero-area (dropped)" in repr(clean)
    again, same = prepare(clean)
    assert again.fingerprint() == clean.fingerprint() and same == flaws
    refused(lambda: prepare(ds, strict=True),
            "1 of 120 images has flaws, strict allows none: 7.jpg: box 2 (s) [10.0, 10.0, 10.0, 20.0] has no area",
            "; repair them (data check --fix writes a clean copy), or train without strict")


def test_one_percent_and_more_stops(tmp_path):
    ds = dataset(tmp_path, 100, [(7, 10, 10, 10, 20)])
    refused(lambda: prepare(ds), "1 of 100 images has flaws, under 1% is allowed")
    assert len(prepare(ds, max_flawed=.02)[0]) == 100
    refused(lambda: prepare(dataset(tmp_path, 100, [(k, 10, 10, 10, 20) for k in range(9)])), "9 of 100 images",
            "and 6 more; repair them (data check --fix writes a clean copy), or raise data.max_flawed")
    refused(lambda: prepare(ds, max_flawed=0), "1 of 100")


def test_bad_images_are_left_out_with_their_boxes(tmp_path):
    ds = dataset(tmp_path, 120)
    (tmp_path / "50.jpg").write_bytes(jpeg(50)[:500])
    clean, flaws = prepare(ds)
    assert len(clean) == len(clean.boxes) == 119 and "50.jpg" not in clean.paths.tolist()
    assert [f.kind for f in flaws] == ["truncated-image"]
    assert len(prepare(ds, check_images=False)[0]) == 120


def test_an_image_that_loses_all_its_boxes_is_no_background(tmp_path):
    ds = dataset(tmp_path, 200, [(0, 10, 10, 10, 20)])
    ds = ds.keep_boxes(np.arange(len(ds.boxes)) != 0) # 0.jpg has only the box without area
    clean, flaws = prepare(ds)
    assert len(clean) == 199 and "0.jpg" not in clean.paths.tolist()
    assert [f.file for f in flaws if f.kind == "no-box-left"] == ["0.jpg"]
    unboxed = replace(clean.keep_boxes(clean.box_image != 5), flaws=[
        Flaw("warning", "no-box", clean.paths[5], "shape 1", "a line, which has no box", "dropped")])
    assert clean.paths[5] not in prepare(unboxed)[0].paths.tolist()
    background = replace(unboxed, flaws=[])
    assert clean.paths[5] in prepare(background)[0].paths.tolist()


def test_flaws_of_the_reader_count(tmp_path):
    ds = dataset(tmp_path / "in", 60)
    write_dataset(ds, tmp_path / "d", "coco")
    for k in (3, 4): (tmp_path / f"d/images/{k}.jpg").unlink()
    ds = read_dataset(tmp_path / "d")
    assert len(ds) == 58
    refused(lambda: prepare(ds), "2 of 60 images have flaws", "image 4, 3.jpg, is not there")


def test_rounding_and_notes_do_not_count(tmp_path):
    ds = dataset(tmp_path, 10, [(k, 10, 10, 80.4, 20) for k in range(10)])
    clean, flaws = prepare(ds, strict=True)
    assert len(clean.boxes) == 20 and {f.kind for f in flaws} == {"rounding"} and clean.boxes.max() == 80


def test_nothing_left(tmp_path):
    ds = dataset(tmp_path, 2)
    refused(lambda: prepare(replace(ds, boxes=np.zeros((2, 4))), max_flawed=2), "no box is left")


@pytest.mark.parametrize("marks", [[CROWD], [IGNORE], [CROWD | IGNORE], [CROWD, IGNORE, CROWD | IGNORE]])
def test_boxes_of_which_none_counts(tmp_path, marks):
    "As with no box at all: the check has an error, and nothing can be trained."
    write_dataset(replace(dataset(tmp_path / "in", 12), flags=np.resize(marks, 12)), tmp_path / "d", "coco")
    ds = read_dataset(tmp_path / "d")
    text = "no box counts: all 12 are crowd or ignored"
    refused(lambda: prepare(ds), text)
    report = check_dataset(tmp_path / "d")
    assert report.exit_code == 1 and report.flaws[0].kind == "unlearned-boxes" and text in report.flaws[0].message
    refused(lambda: train_on(tmp_path / "d"), text)


@pytest.mark.parametrize("mark, count, message", [
    (CROWD, 6, "6 of 12 boxes are crowd or ignored: nothing is learned from them"), (IGNORE, 2, "2 of 12 boxes"),
    (CROWD, 1, ""), (CROWD | IGNORE, 6, ""), (DIFFICULT, 12, ""), (0, 12, "")])
def test_many_crowd_boxes_are_a_warning(tmp_path, mark, count, message):
    "Areas of no class are no boxes, and difficult ones are learned from."
    ds = replace(dataset(tmp_path, 12), flags=[mark] * count + [0] * (12 - count))
    found = unlearned_boxes(ds)
    assert [f.severity for f in found] == ["warning"] * bool(message)
    if message: assert message in found[0].message and prepare(ds)[1] == found


def test_a_training_split_without_a_box_that_counts(tmp_path):
    splits = ["train"] * 9 + ["val"] * 3
    ds = replace(dataset(tmp_path / "in", 12, splits=splits), flags=[CROWD] * 9 + [0] * 3)
    write_dataset(ds, tmp_path / "d", "coco")
    refused(lambda: train_on(tmp_path / "d"), "the split 'train' has no boxes that count: all are crowd or ignored")
    for mark in (CROWD, IGNORE, DIFFICULT): # nothing to evaluate on: as without a val split
        assert labeled_split(replace(ds, flags=[0] * 9 + [mark] * 3), "val", needed=False) is None
    assert len(labeled_split(replace(ds, flags=[DIFFICULT] * 12), "train")) == 9


def test_what_a_copy_lacks_is_said_of_the_folder_that_was_asked_for(tmp_path):
    ds = replace(dataset(tmp_path / "in", 3), flags=[CROWD] * 3)
    refused(lambda: write_dataset(ds, tmp_path / "out", "yolo"), f"{tmp_path / 'out'}: 3 images and not one box",
            "crowd or ignored boxes, which YOLO cannot hold: left out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def labeled(root, counts, splits=("",)):
    "A dataset that is never written: {class: boxes}, over 20 images in turn."
    labels = np.repeat(np.arange(len(counts)), list(counts.values()))
    images = np.arange(len(labels)) % 20
    order = np.argsort(images, kind="stable")
    split = [splits[k % len(splits)] for k in range(20)]
    return DetDataset(root, tuple(counts), [f"{k}.jpg" for k in range(20)], [(60, 80)] * 20, images[order],
                      [(5, 5, 40, 40)] * len(labels), labels[order], splits=split)


@pytest.mark.parametrize("a, b, kind", [("Sack", "sack", "similar-classes"),
                                       ("traffic light", "traffic_light", "similar-classes"),
                                       ("Fork-Lift", "forklift", "similar-classes"),
                                       ("SACK", "Sack ", "similar-classes"), ("\uff33ack", "Sack", "similar-classes"),
                                       ("Sack", "Sacks", "class-variants"), ("box", "boxes", "class-variants"),
                                       ("branch", "Branches", "class-variants"), ("car", "cat", None),
                                       ("class1", "class2", None), ("1.5 t", "15 t", None), ("a", "A", None),
                                       ("-", ".", None), ("glass", "glas", None), ("bus", "bu", None),
                                       ("type-1", "type-11", None), ("left-turn", "right-turn", None),
                                       ("C++", "C", None), ("truck", "trucker", None)])
def test_similar_classes(a, b, kind):
    for names in ((a, b), (b, a)):
        assert [f.kind for f in similar_classes(labeled("d", dict.fromkeys(names, 30)))] == ([kind] if kind else [])


@pytest.mark.parametrize("slip", ["persom", "perosn", "persn", "persoon", "pperson"])
def test_a_rare_name_one_letter_away(slip):
    flaw, = similar_classes(labeled("d", {"person": 60, slip: 3}))
    assert (flaw.severity, flaw.kind, flaw.where) == ("note", "class-variants", slip)
    assert "'person' (60 boxes)" in flaw.message
    assert similar_classes(labeled("d", {"person": 59, slip: 3})) == []


def test_the_one_slip_among_many_classes():
    "Numbered classes and rare ones that look alike are no slips; the search ends at any number of classes."
    names = {f"class {k} of {k * k}": k + 1 for k in range(60)}
    for a in "abcdefghij":
        for b in "klmnopqrst":
            for c in "uvwxyzabc": names[f"thing{a}{b}{c}"] = 1
    assert similar_classes(labeled("d", names)) == []
    flaw, = similar_classes(labeled("d", names | {"forklift": 60, "forklfit": 1}))
    assert (flaw.kind, flaw.where) == ("class-variants", "forklfit")


def test_class_balance():
    ds = labeled("d", {"a": 400, "b": 20, "c": 0}, ("train", "val"))
    flaws = class_balance(ds)
    assert {f.kind for f in flaws} == {"few-boxes", "empty-class", "imbalance"}
    assert {f.severity for f in flaws} == {"note"}
    ds = replace(ds, splits=["train"] * 19 + ["val"])
    val = ds.box_image == 19
    kinds = lambda keep: {f.kind: f.message for f in class_balance(ds.keep_boxes(keep))}
    assert "'b' (19)" in kinds(~(val & (ds.labels == 1)))["unjudged-class"]
    assert "unjudged-class" not in kinds(np.ones(len(val), bool))
    moved = replace(ds, labels=np.where(val, 2, ds.labels))
    assert "'c' (21)" in {f.kind: f.message for f in class_balance(moved)}["untrained-class"]
    assert class_balance(labeled("d", {"a": 30, "b": 290})) == []


def test_repeated_boxes(tmp_path):
    ds = dataset(tmp_path, 3, [(0, 5, 5, 40, 40), (1, 6, 6, 41, 41), (2, 5, 5, 40, 40), (2, 20, 20, 60, 60)])
    ds = replace(ds, labels=[0, 0, 0, 0, 0, 1, 0], classes=("s", "t"))
    twice, flaws = repeated_boxes(ds)
    assert twice.tolist() == [False, True, False, False, False, False, False] # another class is no repetition
    flaw, = flaws
    assert (flaw.severity, flaw.kind, flaw.file, flaw.where) == ("warning", "duplicate-box", "0.jpg", "box 2 (s)")
    two = dataset(tmp_path, 2, [(0, 6, 6, 41, 41), (1, 10, 10, 45, 45)])
    assert [(f.severity, f.kind, f.where) for f in repeated_boxes(two)[1]] == []
    two = dataset(tmp_path, 2, [(0, 5, 6, 40, 41), (1, 10, 10, 45, 45)])
    assert [(f.severity, f.kind, f.where) for f in repeated_boxes(two)[1]] == [("note", "doubled-box", "box 2 (s)")]
    crowd = replace(dataset(tmp_path, 1, [(0, 5, 5, 40, 40)]), flags=[IGNORE, IGNORE])
    assert not repeated_boxes(crowd)[0].any() and repeated_boxes(crowd)[1] == []


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60))
def test_repeated_boxes_against_all_with_all(seed, n):
    rng = np.random.default_rng(seed)
    image = np.sort(rng.integers(0, 3, n))
    label = rng.integers(0, 2, n)
    xy = rng.integers(0, 4, (n, 2))
    boxes = np.c_[xy, xy + rng.integers(20, 23, (n, 2))].astype(np.float32)
    ds = DetDataset("d", ("a", "b"), ["0", "1", "2"], [(60, 80)] * 3, image, boxes, label)
    def same(j, k): return image[j] == image[k] and label[j] == label[k] and (boxes[j] == boxes[k]).all()
    assert repeated_boxes(ds)[0].tolist() == [any(same(j, k) for j in range(k)) for k in range(n)]


def test_odd_boxes(tmp_path):
    ds = dataset(tmp_path, 10, [(0, 5, 5, 6, 50), (1, 5, 5, 7, 7), (2, 5, 5, 79, 6.4)])
    flaws = odd_boxes(ds, (60, 80))
    thin = ("thin-box", "box 2 (s)")
    assert [(f.kind, f.where) for f in flaws] == [thin, thin, ("tiny-boxes", "")]
    assert [f.kind for f in odd_boxes(ds, (120, 160))] == ["thin-box", "thin-box"]
    line = "1 of 13 boxes is under 4 px at an input of 60x80: the smallest is 2.0 px (2x2 in 1.jpg)"
    assert line in flaws[-1].message
    full = dataset(tmp_path, 10, [(k, 0, 0, 80, 60) for k in range(5)])
    assert [f.kind for f in odd_boxes(full, (60, 80))] == ["full-boxes"]
    assert odd_boxes(full.subset(range(1, 10)), (60, 80)) == []
    assert odd_boxes(replace(ds, flags=[IGNORE] * 13), (60, 80)) == []


@pytest.mark.parametrize("size, input_size, kinds", [((1080, 1920), (416, 416), {"padding", "downscale"}),
                                                    ((432, 768), (416, 416), {"padding"}),
                                                    ((1080, 1920), (736, 1280), set()),
                                                    ((480, 640), (416, 416), set()),
                                                    ((3000, 4000), (640, 640), {"downscale"}),
                                                    ((90, 120), (416, 416), set())])
def test_input_fit(size, input_size, kinds):
    ds = replace(labeled("d", {"a": 20}), sizes=[size] * 20)
    assert {f.kind for f in input_fit(ds, input_size)} == kinds


@pytest.mark.parametrize("size, box", [((1080, 1920), 40), ((432, 768), 200), ((360, 640), 20), ((1920, 1080), 300)])
def test_one_input_size_is_advised(size, box):
    "The check names the size that the statistics name."
    ds = replace(labeled("d", {"a": 20}), sizes=[size] * 20, boxes=[(5, 5, 5 + box, 5 + box)] * 20)
    note, = [f for f in input_fit(ds, (416, 416)) if f.kind == "padding"]
    advice, = [a for a in advise(ds, (416, 416)) if a.topic == "input"]
    named = note.message.split(": ")[1].split()[0]
    assert f"an input of {named} " in advice.line and named != "416x416"


def test_sizes_of_input_change_the_report(tmp_path):
    write_dataset(dataset(tmp_path / "in", 30), tmp_path / "d", "coco")
    kinds = lambda size: {f.kind for f in check_dataset(tmp_path / "d", input_size=size).flaws}
    assert "padding" in kinds((416, 160)) and kinds((96, 128)) == set()


def test_flaws_of_readers_get_their_severity(tmp_path):
    ds = dataset(tmp_path, 120)
    (tmp_path / "empty.jpg").write_bytes(b"")
    ds = replace(ds, flaws=[
        Flaw("warning", "no-labels", "3.jpg", "", "3.jpg has no label file", "noted"),
        Flaw("warning", "size-mismatch", "4.jpg", "", "other size", "noted"),
        Flaw("warning", "unreadable-image", "empty.jpg", "5.xml", "not an image", "dropped"),
    ])
    flaws = {f.kind: f for f in prepare(ds)[1]}
    assert flaws["no-labels"].severity == "note" and flaws["size-mismatch"].severity == "warning"
    assert flaws["empty-image"].message == "empty.jpg has 0 bytes"
    error = Flaw("error", "no-images", "a.json", "", "a.json: none of its images is there", "noted")
    refused(lambda: prepare(replace(ds, flaws=[*ds.flaws, error])), "none of its images is there")


def test_images_that_are_left_out_are_not_background(tmp_path):
    "One labeled image and three beside it: none of the dataset's is without labels."
    for k in range(4): (tmp_path / f"{k}.jpg").write_bytes(jpeg(k))
    table = "filename,xmin,ymin,xmax,ymax,class\n0.jpg,5,5,40,40,a\n"
    (tmp_path / "t.csv").write_text(table)
    report = check_dataset(tmp_path)
    assert "mostly-unlabeled" not in {f.kind for f in report.flaws}
    flaw, = [f for f in report.flaws if f.kind == "no-labels"]
    assert (flaw.severity, flaw.action) == ("note", "dropped") and "what is left out" in str(report)
    assert "1 of 1 class has fewer" in str(report)
    (tmp_path / "3.jpg").unlink()
    (tmp_path / "t.csv").unlink()
    (tmp_path / "classes.txt").write_text("a\n")
    (tmp_path / "0.txt").write_text("0 .5 .5 .2 .2\n")
    flaw, = [f for f in check_dataset(tmp_path).flaws if f.kind == "mostly-unlabeled"]
    assert flaw.message == "2 of 3 images without labels"


def test_every_kind_has_advice():
    "Every kind that any reader, writer or check can give."
    # those report elsewhere
    folder = Path(read_dataset.__code__.co_filename).parent.parent
    others = {"split.py", "tiles.py", "stats.py", "balance.py", "view.py", "page.py"}
    kinds = set()
    for file in folder.rglob("*.py"):
        if file.name in others: continue
        text = re.sub(r"\(\s+", "(", file.read_text("utf-8")) # a call may begin on the line after its bracket
        text = re.sub(r",\s+", ", ", text)
        kinds |= set(
            re.findall(
                r'(?:flaw|_note|_warning|Flaw|stop|add|_for_images|bad|note)\((?:ds, [^"]*|"(?:warning|error|note)",'
                r' )?"([a-z]+(?:-[a-z]+)*)"',
                text,
            )
        )
        kinds |= set(re.findall(r'\bkind = "([a-z-]+)"', text)) | set(
            re.findall(r'problem="([a-z-]+)"', text)) | set(re.findall(r'\("([a-z]+-image)", ', text))
    kinds -= {"warning", "error", "note"}
    assert {
        "zero-area", "no-labels", "missing-image", "huge-image", "duplicate-across-splits", "imbalance",
        "rotated-image", "too-many-flaws", "no-box"
    } <= kinds
    assert not kinds - set(_ADVICE), f"no advice for {sorted(kinds - set(_ADVICE))}"
    assert all(a and "\n" not in a for a in _ADVICE.values())


def test_report(tmp_path):
    write_dataset(dataset(tmp_path / "in", 120, [(7, 10, 10, 10, 20)]), tmp_path / "d", "voc")
    report = check_dataset(tmp_path / "d")
    d = json.loads(json.dumps(report.to_dict()))
    assert (report.exit_code, d["errors"], d["warnings"], d["notes"]) == (0, 0, 1, 0)
    assert (d["images"], d["format"]) == (120, "voc")
    assert d["flaws"][0]["kind"] == "zero-area" and d["flaws"][0]["advice"] and "zero-area" in str(report)
    strict = check_dataset(tmp_path / "d", strict=True)
    assert strict.exit_code == 1 and strict.flaws[0].kind == "too-many-flaws"
    assert str(strict).endswith("1 error, 1 warning, 0 notes")
    (tmp_path / "d/Annotations/5.xml").write_text("<annotation>")
    broken = check_dataset(tmp_path / "d")
    assert broken.exit_code == 1 and broken.ds is None and "5.xml, line 1: not valid XML" in str(broken)
    refused(lambda: check_dataset(tmp_path / "nowhere"), "no such file or folder")


# Real data

@pytest.mark.data
@pytest.mark.parametrize("name, left, boxes, kinds", [("bccd", 364, 4886, {"zero-area": 2}), ("raccoon", 200, 217, {}),
                                                     ("kangaroo", 163, None, {"truncated-image": 1})])
def test_real(data, name, left, boxes, kinds):
    ds, flaws = prepare(read_dataset(data / "datasets" / name))
    found = [f for f in flaws if f.action != "noted"]
    assert len(ds) == left and boxes in (None, len(ds.boxes))
    assert Counter(f.kind for f in found) == kinds
    assert (ds.boxes[:, 2:] > ds.boxes[:, :2]).all()
    if name == "kangaroo": assert found[0].file == "images/00090.jpg"


@pytest.mark.data
@pytest.mark.parametrize("name, warnings, notes",
                        [("bccd", {"zero-area": 2, "duplicate-across-splits": 1}, {"doubled-box": 7, "imbalance": 1}),
                         ("kangaroo", {"truncated-image": 1}, {"duplicate-image": 1, "doubled-box": 1, "padding": 1}),
                         ("raccoon", {}, {"conflicting-labels": 4, "near-duplicate": 2, "gray-image": 3}),
                         ("plates_eu", {}, {}), ("kitti_mini", {}, {"few-boxes": 1, "padding": 1})])
def test_real_reports(data, name, warnings, notes):
    "Everything that is said of real datasets; each was looked at and is true."
    report = check_dataset(data / "datasets" / name)
    def count(severity): return Counter(f.kind for f in report.flaws if f.severity == severity)
    assert (report.exit_code, count("warning"), count("note")) == (0, warnings, notes)
    known = set(report.ds.paths.tolist())
    assert all(f.file in known for f in report.flaws if f.severity == "warning")
    for f in report.flaws:
        if f.where.startswith("box "): assert f.where in f.message
