"""Flaws: found, counted, repaired in the open, or refused."""
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from jetson_det.core import InputError
from jetson_det.data.check import box_flaws, check_dataset, check_images, is_truncated, oddities, prepare
from jetson_det.data.dataset import IGNORE, DetDataset
from jetson_det.data.formats import read_dataset, write_dataset
from jetson_det.data.stats import dataset_stats, plot_stats, seen_sizes


def picture(k=0, suffix=".jpg", params=()):
    img = np.random.default_rng(k).integers(0, 255, (60, 80, 3), np.uint8)
    return cv2.imencode(suffix, img, list(params))[1].tobytes()


def dataset(root, n=120, boxes=(), **kw):
    "n images with one sound box each and the extra ones: (image, x1, y1, x2, y2)"
    root.mkdir(exist_ok=True)
    for k in range(n): (root / f"{k}.jpg").write_bytes(picture(k))
    rows = np.array(sorted([(k, 5, 5, 40, 40) for k in range(n)] + list(boxes), key=lambda r: r[0]), np.float32)
    return DetDataset(root, ("s",), [f"{k}.jpg" for k in range(n)], [(60, 80)] * n, rows[:, 0], rows[:, 1:], [0] * len(rows), format="coco", **kw)


def refused(call, *parts):
    with pytest.raises(InputError) as e: call()
    line = str(e.value)
    assert "\n" not in line
    for p in parts: assert p in line, line


@pytest.mark.parametrize("data", [picture(), picture(suffix=".png"), picture(params=(cv2.IMWRITE_JPEG_PROGRESSIVE, 1))], ids=["jpeg", "png", "progressive"])
def test_truncation_at_every_place(data):
    assert not is_truncated(data) and not is_truncated(data + b"trailing bytes" * 99)
    for cut in range(10, len(data) - 8, 37): assert is_truncated(data[:cut]), cut


def test_a_preview_in_exif_does_not_hide_a_truncation():
    whole, preview = picture(1), picture(2)[:3000] + b"\xff\xd9"
    data = whole[:2] + b"\xff\xe1" + (len(preview) + 2).to_bytes(2, "big") + preview + whole[2:]
    assert not is_truncated(data) and is_truncated(data[:len(data) - 500])


def test_check_images(tmp_path):
    ds = dataset(tmp_path, 8, splits=["train"] * 4 + ["test"] * 4)
    (tmp_path / "1.jpg").write_bytes(picture(1)[:-400])
    (tmp_path / "2.jpg").write_bytes(b"")
    (tmp_path / "3.jpg").write_bytes(b"no picture")
    (tmp_path / "4.jpg").unlink()
    (tmp_path / "5.jpg").write_bytes(picture(0))
    flaws = check_images(ds, workers=3)
    assert [(f.kind, f.file, f.action) for f in flaws] == [
        ("truncated-image", "1.jpg", "dropped"), ("unreadable-image", "2.jpg", "dropped"), ("unreadable-image", "3.jpg", "dropped"),
        ("missing-image", "4.jpg", "dropped"), ("duplicate-image", "5.jpg", "noted")]
    assert "one is in train, one in test" in flaws[-1].message


@pytest.mark.parametrize("box, kind, action", [
    ((10, 10, 10, 20), "zero-area", "dropped"), ((10, 10, 20, 10), "zero-area", "dropped"), ((20, 10, 10, 20), "zero-area", "dropped"),
    ((90, 10, 99, 20), "outside", "dropped"), ((-9, -9, 0, 5), "outside", "dropped"), ((10, 60, 20, 70), "outside", "dropped"),
    ((70, 10, 85, 20), "partly-outside", "clipped"), ((-5, 10, 20, 20), "partly-outside", "clipped"), ((10, 10, 80.5, 20), "rounding", "clipped"),
    ((0, 0, 80, 60), None, None)])
def test_box_flaws(tmp_path, box, kind, action):
    ds = dataset(tmp_path, 3, [(1, *box)])
    keep, clipped, flaws = box_flaws(ds)
    assert [(f.kind, f.action, f.file) for f in flaws] == ([(kind, action, "1.jpg")] if kind else [])
    assert keep.sum() == len(ds.boxes) - (action == "dropped")
    assert (clipped[keep] >= 0).all() and (clipped[keep] <= [80, 60, 80, 60]).all() and (clipped[keep][:, 2:] > clipped[keep][:, :2]).all()


def test_under_one_percent_is_repaired_and_said(tmp_path):
    ds = dataset(tmp_path, 120, [(7, 10, 10, 10, 20), (7, 70, 10, 99, 20)])
    clean, flaws = prepare(ds)
    assert len(clean) == 120 and len(clean.boxes) == 121 and clean.boxes_of(7)[0].tolist() == [[5, 5, 40, 40], [70, 10, 80, 20]]
    assert [f.kind for f in flaws] == ["zero-area", "partly-outside"] and clean.flaws == flaws and "1 zero-area (dropped)" in repr(clean)
    again, same = prepare(clean)
    assert again.fingerprint() == clean.fingerprint() and same == flaws
    refused(lambda: prepare(ds, strict=True), "1 of 120 images have flaws, strict allows none: 7.jpg: box 2 (s) [10.0, 10.0, 10.0, 20.0] has no area")


def test_one_percent_and_more_stops(tmp_path):
    ds = dataset(tmp_path, 100, [(7, 10, 10, 10, 20)])
    refused(lambda: prepare(ds), "1 of 100 images have flaws, under 1% is allowed")
    assert len(prepare(ds, max_flawed=.02)[0]) == 100
    refused(lambda: prepare(dataset(tmp_path, 100, [(k, 10, 10, 10, 20) for k in range(9)])), "9 of 100 images", "and 6 more")
    refused(lambda: prepare(ds, max_flawed=0), "1 of 100")


def test_bad_images_are_left_out_with_their_boxes(tmp_path):
    ds = dataset(tmp_path, 120)
    (tmp_path / "50.jpg").write_bytes(picture(50)[:500])
    clean, flaws = prepare(ds)
    assert len(clean) == 119 and "50.jpg" not in clean.paths.tolist() and len(clean.boxes) == 119 and [f.kind for f in flaws] == ["truncated-image"]
    assert len(prepare(ds, check_images=False)[0]) == 120


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


def test_oddities(tmp_path):
    ds = replace(dataset(tmp_path, 4, [(0, 5, 5, 40, 40)], splits=["train"] * 3 + ["val"]), classes=("a", "A ", "b", "c"), labels=[0, 0, 0, 2, 3])
    assert {f.kind: f.action for f in oddities(ds)} == {"similar-classes": "noted", "empty-class": "noted", "untrained-class": "noted", "duplicate-box": "noted"}


def test_report(tmp_path):
    write_dataset(dataset(tmp_path / "in", 120, [(7, 10, 10, 10, 20)]), tmp_path / "d", "voc")
    report = check_dataset(tmp_path / "d")
    d = json.loads(json.dumps(report.to_dict()))
    assert (report.exit_code, d["errors"], d["warnings"], d["images"], d["format"]) == (0, 0, 1, 120, "voc")
    assert d["flaws"][0]["kind"] == "zero-area" and d["flaws"][0]["advice"] and "zero-area" in str(report)
    strict = check_dataset(tmp_path / "d", strict=True)
    assert strict.exit_code == 1 and strict.flaws[0].kind == "too-many-flaws" and str(strict).endswith("1 errors, 1 warnings")
    (tmp_path / "d/Annotations/5.xml").write_text("<annotation>")
    broken = check_dataset(tmp_path / "d")
    assert broken.exit_code == 1 and broken.ds is None and "5.xml, line 1: not valid XML" in str(broken)
    refused(lambda: check_dataset(tmp_path / "nowhere"), "no such file or folder")


def test_stats(tmp_path):
    ds = replace(dataset(tmp_path, 4), flags=[0, 0, 0, IGNORE], splits=["train", "train", "val", ""])
    assert np.allclose(seen_sizes(ds, (30, 80)), 17.5)
    stats = dataset_stats(ds, (30, 80))
    assert (stats["boxes"], stats["crowd_or_ignored"], stats["empty_images"]) == (3, 1, 1) and stats["splits"] == {"train": 2, "val": 1, "none": 1}
    assert stats["all"]["under"] == {"8": 0, "16": 0, "32": 1} and json.loads(json.dumps(stats)) == stats
    assert len(plot_stats(ds, (30, 80)).axes) == 4


# Real data

@pytest.mark.data
@pytest.mark.parametrize("name, left, boxes, kinds", [("bccd", 364, 4886, {"zero-area": 2}), ("raccoon", 200, 217, {}), ("kangaroo", 163, None, {"truncated-image": 1})])
def test_real(data, name, left, boxes, kinds):
    ds, flaws = prepare(read_dataset(data / "datasets" / name))
    found = [f for f in flaws if f.action != "noted"]
    assert len(ds) == left and boxes in (None, len(ds.boxes)) and {k: sum(f.kind == k for f in found) for k in {f.kind for f in found}} == kinds
    assert (ds.boxes[:, 2:] > ds.boxes[:, :2]).all()
    if name == "kangaroo": assert found[0].file == "images/00090.jpg"
    assert check_dataset(data / "datasets" / name).exit_code == 0
