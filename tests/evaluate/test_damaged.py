"""Damaged labels, detections and result files, through everything public in evaluate: each gives one clear line or the
right result, and what does not count is told."""
import json
import time
from dataclasses import replace

import numpy as np
import pytest

from coco_oracle import pycocotools_stats
from jetson_det.cli import main
from jetson_det.core import InputError
from jetson_det.data.dataset import DetDataset
from jetson_det.evaluate.coco import average_precision, coco_of, coco_results, coco_stats, over_limit, result_notes
from jetson_det.evaluate.compare import compare_live, compare_results
from jetson_det.evaluate.error_intervals import bootstrap_errors
from jetson_det.evaluate.errors import calibration, confidence_curves, error_types, worst_errors
from jetson_det.evaluate.intervals import bootstrap_ap, paired_bootstrap
from jetson_det.evaluate.label_errors import label_errors, review_list
from jetson_det.evaluate.matching import match, take_images
from jetson_det.evaluate.plots import confusion, contact_sheet, image_pairs, pr_figure, worst_images
from jetson_det.runtime.geometry import Detections, as_detections
from simulated_detector import simulated_detector, simulated_images


@pytest.fixture(scope="module")
def whole():
    "Twelve images, and what a detector finds."
    ds, hard = simulated_images(12, seed=3)
    return ds, simulated_detector(ds, hard)


def all_errors(ds, found):
    "The types of error, and everything that reads them."
    report = error_types(ds, found)
    bootstrap_errors(report, 100)
    worst_errors(report, ds)
    confidence_curves(report)
    repr(report)
    return report


def compared(ds, found):
    "A comparison of two results that were changed after they were counted, as one from a file may be."
    good = coco_stats(ds, [as_detections()] * len(ds))
    return compare_results(ds, {"a": good, "b": replace(good, detections=found)}, resamples=100)


def drawn(ds, found):
    "The pictures of an evaluation."
    result = coco_stats(ds, found)
    pr_figure(result)
    worst_images(ds, result)
    return confusion(ds, result)


CALLS = {
    "coco": coco_stats,
    "bins": average_precision,
    "match": match,
    "errors": all_errors,
    "intervals": lambda ds, found: bootstrap_ap(match(ds, found), 100),
    "paired": lambda ds, found: paired_bootstrap(match(ds, found), match(ds, [as_detections()] * len(ds)), 100),
    "compare": compared,
    "label errors": label_errors,
    "plots": drawn,
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def one_line(line, call, *args):
    "It raises an InputError of one line that says this."
    with pytest.raises(InputError) as e: call(*args)
    text = str(e.value)
    assert line in text and "\n" not in text and len(text) < 400, text


def changed(found, **columns):
    "The second image's detections with other columns; a function changes what is there."
    d = found[1]
    new = {name: change(getattr(d, name)) if callable(change) else change for name, change in columns.items()}
    return [found[0], Detections(**{**d._asdict(), **new}), *found[2:]]


def put(value, at=1):
    "A change that puts a value into one row of a column of floats."
    def change(column):
        column = np.array(column, np.float64)
        column[at] = value
        return column
    return change


WRONG_DETECTIONS = {
    "a score that is NaN": (dict(scores=put(np.nan)), "image 1.jpg: a detection has a score that is not a finite"),
    "an infinite score": (dict(scores=put(np.inf)), "image 1.jpg: a detection has a score that is not a finite"),
    "a score of -inf": (dict(scores=put(-np.inf)), "image 1.jpg: a detection has a score that is not a finite"),
    "a box of NaN": (dict(boxes=put([np.nan] * 4)), "image 1.jpg: a detection has a box that is not finite"),
    "an infinite side": (dict(boxes=put([0, 0, np.inf, 9])), "image 1.jpg: a detection has a box that is not finite"),
    "a label too high": (dict(labels=put(3)), "image 1.jpg: a detection has the label 3"),
    "a label of -1": (dict(labels=put(-1)), "image 1.jpg: a detection has the label -1"),
    "a huge label": (dict(labels=put(2.**62)), "image 1.jpg: a detection has the label 4.6"),
    "half a label": (dict(labels=put(.5)), "image 1.jpg: a detection has the label 0.5"),
    "a label of NaN": (dict(labels=put(np.nan)), "image 1.jpg: a detection has the label nan"),
    "a score too few": (dict(scores=lambda scores: scores[1:]), "image 1.jpg: boxes of the shape"),
    "a label too many": (dict(labels=lambda labels: np.append(labels, 0)), "image 1.jpg: boxes of the shape"),
    "boxes of five numbers": (dict(boxes=lambda boxes: np.hstack([boxes, boxes[:, :1]])), "each box has four numbers"),
    "one number for all scores": (dict(scores=.5), "image 1.jpg: boxes of the shape"),
    "scores as text": (dict(scores=lambda scores: scores.astype(str)), "scores that are not numbers"),
    "labels as names": (dict(labels=lambda labels: np.full(len(labels), "sack")), "labels that are not numbers"),
    "None among the boxes": (dict(boxes=lambda boxes: np.full((len(boxes), 4), None)), "boxes that are not numbers"),
    "complex scores": (dict(scores=lambda scores: scores + 0j), "scores that are not numbers"),
    "ragged boxes": (dict(boxes=lambda boxes: [[0, 0, 1, 1], [0, 0]] * (len(boxes) // 2)), "not a Detections"),
}


@calls
@pytest.mark.parametrize("damage", WRONG_DETECTIONS.values(), ids=WRONG_DETECTIONS)
def test_wrong_detections_are_named(whole, call, damage):
    ds, found = whole
    columns, line = damage
    one_line(line, call, ds, changed(found, **columns))


@calls
def test_wrong_lists(whole, call):
    ds, found = whole
    for few in (found[:-1], found + found[:1], []):
        with pytest.raises(InputError) as e: call(ds, few)
        assert "lists of detections for 12 images" in str(e.value) or "its detections are not there" in str(e.value)
    for odd in (None, {}, 3, [[1, 2, 3, 4]]): one_line("not a Detections", call, ds, [found[0], odd, *found[2:]])


@calls
def test_nothing_found_is_no_error(whole, call):
    ds, _ = whole
    for nothing in (as_detections(), Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0)), Detections([], [], [])):
        call(ds, [nothing] * len(ds))
    assert coco_stats(ds, [nothing] * len(ds)).stats["AP"] == 0


@calls
def test_nothing_to_find(whole, call):
    ds, found = whole
    bare = replace(ds, box_image=[], boxes=np.zeros((0, 4)), labels=[], flags=None, areas=None)
    if call is match: assert not call(bare, found).is_right.any()
    elif call is label_errors: assert set(s.kind for s in call(bare, found).suspects) <= {"missing"}
    else: one_line("nothing to evaluate", call, bare, found)


@calls
def test_no_images(call):
    none = DetDataset(".", ("a",), [], np.zeros((0, 2)))
    if call is label_errors: assert not call(none, []).suspects
    elif call is match: assert call(none, []).images == 0
    else:
        with pytest.raises(InputError, match="nothing to evaluate|to draw from"): call(none, [])


@calls
def test_no_classes(call):
    none = DetDataset(".", (), ["a.jpg"], [[9, 9]])
    if call is match: assert call(none, [as_detections()]).images == 1
    elif call is label_errors: assert not call(none, [as_detections()]).suspects
    else:
        with pytest.raises(InputError, match="nothing to evaluate|to draw from"): call(none, [as_detections()])


def test_a_class_without_boxes_and_images_without_labels(whole):
    "A class more than the labels have changes no figure of the others; images without labels make false positives."
    ds, found = whole
    more = replace(ds, classes=(*ds.classes, "Säcke ✓ $x$\n"))
    before = coco_stats(ds, found)
    result = coco_stats(more, found)
    assert result.stats == before.stats and result.per_class[3]["AP"] is None
    report = all_errors(more, found)
    assert report.AP50 == error_types(ds, found).AP50 and report.per_class[3]["AP50"] is None
    intervals = bootstrap_ap(match(more, found), 100)
    assert intervals.per_class[3].value is None and "\n" not in repr(intervals).splitlines()[-1]
    assert compared(more, found).rows[1].test.per_class[3].value is None
    pr_figure(result)
    assert confusion(more, result).shape == (5, 5)
    # all that is found is of the class without boxes
    odd = [d._replace(labels=np.full(len(d.labels), 3)) for d in found]
    assert coco_stats(more, odd).stats["AP"] == 0
    assert all_errors(more, odd).count["Bkg"] > 0
    rows = pycocotools_stats(coco_of(more), coco_results(found, more.image_ids)).stats
    np.testing.assert_allclose([result.stats["AP"], result.stats["AP50"]], rows[:2], atol=1e-12)


def test_the_order_of_scores_is_all_that_counts(whole):
    "Scores over 1 give the same AP, matches and errors; a calibration of them says what is wrong."
    ds, found = whole
    large = [d._replace(scores=d.scores * 1e6 - 3) for d in found]
    assert coco_stats(ds, large).stats == coco_stats(ds, found).stats
    assert error_types(ds, large).cost == error_types(ds, found).cost
    assert np.array_equal(match(ds, large).box, match(ds, found).box)
    one_line("calibration needs them in 0..1", calibration, error_types(ds, large))
    one_line("in ascending order", confidence_curves, error_types(ds, found), [.5, np.nan])


def test_swapped_sides_are_counted_and_told(whole):
    "pycocotools takes a negative area for out of range and a positive one of two negative sides for a false positive."
    ds, found = whole
    swap = found[1].boxes.copy()
    swap[0] = swap[0, [2, 1, 0, 3]]
    swap[1] = swap[1, [2, 3, 0, 1]]
    bad = changed(found, boxes=swap)
    result = coco_stats(ds, bad)
    rows = pycocotools_stats(coco_of(ds), coco_results(bad, ds.image_ids)).stats
    np.testing.assert_allclose(list(result.stats.values())[:3], rows[:3], atol=1e-12)
    assert result.inverted == 2 and result.to_dict()["inverted"] == 2
    assert any("2 detections with swapped sides" in line for line in result_notes(result))
    assert not any("swapped" in line for line in result_notes(coco_stats(ds, found)))
    all_errors(ds, bad)
    label_errors(ds, bad)
    drawn(ds, bad)


def test_numbers_of_any_type(whole):
    "Labels of any integer type, whole floats, lists, boxes of float16 to float64, ids of 64 bits: the same figures."
    ds, found = whole
    before = coco_stats(ds, found).stats
    for kind in (np.uint8, np.int16, np.uint64, np.float32, object):
        if kind is object: other = [Detections(*(column.tolist() for column in d)) for d in found]
        else: other = [d._replace(labels=d.labels.astype(kind)) for d in found]
        assert coco_stats(ds, other).stats == pytest.approx(before), kind
        match(ds, other)
        all_errors(ds, other)
        label_errors(ds, other)
        drawn(ds, other)
    far = replace(ds, image_ids=np.arange(len(ds)) + 2**62)
    assert coco_stats(far, found).stats == before
    assert coco_stats(coco_of(far), found).stats == before
    assert all_errors(far, found).cost == error_types(ds, found).cost


@pytest.mark.timeout(120)
def test_a_million_detections_on_one_image(whole):
    "Everything answers in seconds, and what is left out is told."
    ds, found = whole
    rng = np.random.default_rng(0)
    n = 1_000_000
    corner = rng.uniform(0, 500, (n, 2)).astype(np.float32)
    many = Detections(np.hstack([corner, corner + 40]), rng.random(n).astype(np.float32) * .2, rng.integers(0, 3, n))
    start = time.process_time()
    result = coco_stats(ds, [found[0], many, *found[2:]])
    assert sum(row["detections"] for row in result.per_class) == n + sum(len(d.scores) for d in found) - len(
        found[1].scores)
    all_errors(ds, result.detections)
    take_images(match(ds, result.detections), [1])
    suspects = label_errors(ds, result.detections)
    assert "of 1 image only the 1000 surest detections were used" in suspects.notes
    review_list(suspects)
    image_pairs(ds, result)
    assert time.process_time() - start < 20


# COCO dictionaries, as pycocotools takes them

def coco():
    return dict(images=[dict(id=7, file_name="ä.jpg"), dict(id=2**60)], categories=[dict(id=3, name="Säcke ✓")],
                annotations=[dict(id=1, image_id=7, category_id=3, bbox=[0, 0, 20, 20])])


def with_annotation(**change): return dict(coco(), annotations=[dict(coco()["annotations"][0], **change)])


WRONG_LABELS = {
    "no dictionary": (None, "not a COCO dictionary"),
    "a list": ([], "not a COCO dictionary"),
    "text": ("{}", "not a COCO dictionary"),
    "empty": ({}, "not a COCO dictionary"),
    "images that are text": (dict(coco(), images="abc"), "not a COCO dictionary"),
    "an image without an id": (dict(coco(), images=[{}]), "not a COCO dictionary"),
    "an image twice": (dict(coco(), images=[dict(id=7)] * 2), "image id 7 stands twice"),
    "labels of an unknown image": (with_annotation(image_id=9), "an annotation belongs to image 9"),
    "an id of text": (with_annotation(image_id="x"), "not a COCO dictionary"),
    "half an id": (with_annotation(image_id=7.5), "not a COCO dictionary"),
    "an unknown class": (with_annotation(category_id=4), "not a COCO dictionary"),
    "a class twice": (dict(coco(), categories=[dict(id=3, name="a"), dict(id=3, name="b")]), "a category id stands"),
    "a box of NaN": (with_annotation(bbox=[0, 0, np.nan, 9]), "annotation 1: its box is not finite"),
    "a box of text": (with_annotation(bbox=["a", 0, 1, 1]), "not a COCO dictionary"),
    "three numbers": (with_annotation(bbox=[0, 0, 1]), "not a COCO dictionary"),
    "no box": (with_annotation(bbox=None), "not a COCO dictionary"),
    "an area of NaN": (with_annotation(area=np.nan), "annotation 1: its box is not finite"),
    "an annotation that is text": (dict(coco(), annotations=["x"]), "not a COCO dictionary"),
    "no annotations": (dict(coco(), annotations=None), "not a COCO dictionary"),
}


@pytest.mark.parametrize("call", [coco_stats, average_precision, match, error_types], ids=lambda call: call.__name__)
@pytest.mark.parametrize("damage", WRONG_LABELS.values(), ids=WRONG_LABELS)
def test_wrong_coco_dictionaries(call, damage):
    gt, line = damage
    one_line(line, call, gt, [as_detections()] * 2)


@pytest.mark.parametrize("damage", WRONG_LABELS.values(), ids=WRONG_LABELS)
def test_the_limit_of_a_wrong_dictionary(damage):
    gt, line = damage
    one_line(line, over_limit, gt, 100)


def test_a_right_dictionary_with_odd_names_and_ids():
    found = [as_detections([[0, 0, 20, 20]], [.9], [0]), as_detections()]
    assert coco_stats(coco(), found).stats["AP"] == pytest.approx(1)
    assert error_types(coco(), found).image_names == ["ä.jpg", str(2**60)]
    as_text = with_annotation(image_id="7", category_id="3")
    assert coco_stats(as_text, found).stats["AP"] == pytest.approx(1)


# files of results

GOOD = {"name": "a.jpg", "index": 0, "detections": [{"name": "x", "score": .5, "box": [0, 0, 1, 1]}]}
WHOLE = json.dumps(dict(frames=[GOOD]))
FILES = {
    "cut.json": (WHOLE[:-9], "not"),
    "list.json": ("[]", "it has no list of frames"),
    "number.json": ("3", "it has no list of frames"),
    "frames.json": ('{"frames": {}}', "it has no list of frames"),
    "row.json": ('{"frames": [null]}', "frame 0: not a frame"),
    "empty.json": ("", "not"),
    "torn.jsonl": (json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:40], "line 2: not valid JSON: cut off there?"),
    "binary.jsonl": ("\x00\x01\x02\n", "line 1: not valid JSON"),
    "text.jsonl": (json.dumps(dict(GOOD, detections="none")), "line 1: not a frame"),
    "box.jsonl": (json.dumps(dict(GOOD, detections=[dict(name="x", score="high", box=[0, 0, 1, 1])])), "line 1: a det"),
    "twice.jsonl": ((json.dumps(GOOD) + "\n") * 2, "line 2: frame 0 of a.jpg stands twice"),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_end_the_verb_with_one_line(tmp_path, capsys, name):
    text, line = FILES[name]
    good = tmp_path / "good.json"
    good.write_text(WHOLE)
    bad = tmp_path / name
    bad.write_text(text, encoding="latin-1")
    one_line(line, compare_live, good, bad)
    assert main(["compare", str(good), str(bad)]) == 2
    out, err = capsys.readouterr()
    assert line in err.replace("\n", " ") and "Traceback" not in out + err


def test_files_without_detections_and_with_other_frames(tmp_path, capsys):
    "No detections is a result; frames of one file alone are counted and told."
    rows = [dict(GOOD, index=0), dict(GOOD, name="ä ✓.jpg", index=1, detections=[])]
    for name, some in (("a.jsonl", rows), ("b.jsonl", rows[1:])):
        (tmp_path / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some), "utf-8")
    result = compare_live(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert (result.frames, result.only_a_frames, result.agreement) == (1, 1, 1)
    assert main(["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 0
    assert "left out: 1 frame only in A" in capsys.readouterr().out


def test_the_pictures_of_an_evaluation_without_mistakes_or_boxes(tmp_path):
    ds = DetDataset(".", ("ä $x$",), ["a.jpg", "b.jpg"], [[9, 9]] * 2, [0], [[0, 0, 9, 9]], [0])
    result = coco_stats(ds, [as_detections([[0, 0, 9, 9]], [.9], [0]), as_detections()])
    assert worst_images(ds, result) == []
    assert contact_sheet(ds, result).axes[0].get_title() == "no mistakes"
