"Comparisons of results on labeled images and of live predictions: right verdicts, symmetric counts, clear refusals."
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jetson_det.core import InputError
from jetson_det.evaluate.coco import coco_stats
from jetson_det.evaluate.compare import compare_live, compare_results, holm
from jetson_det.evaluate.intervals import bootstrap_ap, paired_bootstrap
from jetson_det.evaluate.matching import match
from jetson_det.runtime.geometry import Detections, detection_rows
from jetson_det.runtime.stream.result import FrameResult, result_row
from simulated_detector import random_problem, simulated_detector, simulated_images


@pytest.fixture(scope="module")
def problem():
    ds, hard = simulated_images(80)
    spreads = {"first": .06, "again": .06, "worse": .14}
    found = {name: simulated_detector(ds, hard, k, spread) for k, (name, spread) in enumerate(spreads.items())}
    return ds, found, {name: coco_stats(ds, d) for name, d in found.items()}


def test_the_figures_are_those_of_the_parts(problem):
    ds, found, results = problem
    c = compare_results(ds, results, {"first": 10.}, {"worse": 5_000_000}, resamples=300)
    for row in c.rows:
        assert abs(row.ap.value - results[row.name].stats["AP"]) < 1e-12
        assert row.stats == bootstrap_ap(match(ds, found[row.name]), 300).stats
    test = paired_bootstrap(match(ds, found["first"]), match(ds, found["worse"]), 300)
    assert c.rows[2].test == test and c.rows[2].difference == test.stats[0]
    assert [row.p for row in c.rows[1:]] == holm([row.difference.p for row in c.rows[1:]])
    assert (c.rows[0].difference, c.rows[0].p) == (None, None)
    assert json.loads(json.dumps(c.to_dict(), allow_nan=False))["rows"][2]["size"] == 5_000_000
    assert [row.milliseconds for row in c.rows] == [10., None, None]
    timed = replace(results["again"], seconds=dict(preprocess=.4, inference=1.2, counting=5., total=9.))
    c = compare_results(ds, {"first": results["first"], "again": timed}, resamples=300)
    assert abs(c.rows[1].milliseconds - 20) < 1e-9 and "ms/image" in repr(c)
    assert c.boxes == len(ds.boxes) and c.images == c.groups == 80


def test_the_verdicts(problem):
    ds, _, results = problem
    pair = lambda a, b: compare_results(ds, {a: results[a], b: results[b]}, resamples=300).verdict
    assert pair("first", "worse").startswith("worse is worse than first: -")
    assert pair("worse", "first").startswith("first is better than worse: +")
    assert pair("first", "again").startswith("no difference shown between first and again")
    many = compare_results(ds, results, resamples=300)
    assert many.verdict.startswith("worse than first: worse -") and "no difference shown: again" in many.verdict
    assert "Holm" in many.verdict and "ms/image" not in repr(many)


def test_the_same_twice(problem):
    ds, _, results = problem
    c = compare_results(ds, {"a": results["first"], "b": results["first"]}, resamples=200)
    assert c.verdict == "a and b have the same AP on every draw of the images"
    assert c.rows[1].p == 1 and c.rows[1].difference.value == 0


def test_groups_come_from_the_dataset(problem):
    ds, found, results = problem
    films = replace(ds, groups=[f"film {k // 4}" for k in range(80)])
    c = compare_results(films, {k: results[k] for k in ("first", "again")}, resamples=200)
    assert c.groups == 20 and "20 groups of the 80 images" in repr(c)


def test_too_few_images(problem):
    ds, found, _ = problem
    some = ds.subset(range(4))
    results = {k: coco_stats(some, found[k][:4]) for k in ("first", "again")}
    assert compare_results(some, results, resamples=200).verdict.startswith("too little to say")


@pytest.mark.parametrize("change, line", [
    (lambda ds, r: dict(a=r), "1 result to compare; give at least 2"),
    (lambda ds, r: dict(a=r, b=replace(r, image_ids=r.image_ids[:-1] + [999])), "b: evaluated on 80 images, not on"),
    (lambda ds, r: dict(a=r, b=replace(r, image_ids=r.image_ids[::-1])), "another order of images"),
    (lambda ds, r: dict(a=r, b=replace(r, classes=("x", "y", "z"))), "b: evaluated with the classes x, y, z"),
    (lambda ds, r: dict(a=r, b=replace(r, settings=dict(data="0123"))), "b: evaluated on other labels"),
    (lambda ds, r: dict(a=r, b=replace(r, settings=dict(max_detections=300))), "b: counts 300 detections"),
    (lambda ds, r: dict(a=r, b=replace(r, detections=[])), "b: its detections are not there"),
])
def test_what_cannot_be_compared(problem, change, line):
    ds, _, results = problem
    with pytest.raises(InputError, match=line) as e: compare_results(ds, change(ds, results["first"]), resamples=200)
    assert "\n" not in str(e.value)


def test_wrong_calls(problem):
    ds, _, results = problem
    with pytest.raises(InputError, match="milliseconds has 'other'"): compare_results(ds, results, {"other": 3.})
    with pytest.raises(InputError, match="3 models need at least 160"): compare_results(ds, results, resamples=100)
    with pytest.raises(InputError, match="level is 0"): compare_results(ds, results, level=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm(p):
    "No less than p, no more than Bonferroni's, in the order of p."
    corrected = holm(p)
    for one, other in zip(p, corrected): assert one <= other <= min(one * len(p), 1)
    order = np.argsort(p, kind="stable")
    assert (np.diff(np.array(corrected)[order]) >= 0).all()


def write_predict(path, ds, found):
    rows = []
    for i, d in enumerate(found):
        rows.append({"name": str(ds.paths[i]), "index": 0, "detections": detection_rows(d, ds.classes)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_run(path, ds, found, missed=None):
    "As `jetson-det run` writes it."
    image = np.zeros((640, 640, 3), np.uint8)
    lines = []
    for i, d in enumerate(found):
        row = FrameResult("dock.mp4", i, 1.7e9 + i, image, d, ds.classes, np.arange(len(d.scores)), missed)
        lines.append(json.dumps(result_row(row)) + "\n")
    path.write_text("".join(lines))
    return path


def test_live_counts(tmp_path):
    "Every box of either file is counted once, and the other way round A and B change places."
    for seed in range(30):
        ds, found = random_problem(seed, levels=5)
        other = random_problem(seed + 500)[1]
        other = (other * len(ds))[:len(ds)]
        a = write_predict(tmp_path / "a.jsonl", ds, found)
        b = write_predict(tmp_path / "b.jsonl", ds, other)
        c = compare_live(a, b)
        back = compare_live(b, a)
        assert c.matched + c.changed + c.only_a == c.boxes_a == sum(len(d.scores) for d in found)
        assert c.matched + c.changed + c.only_b == c.boxes_b == sum(len(d.scores) for d in other)
        assert (back.only_a, back.only_b, back.matched) == (c.only_b, c.only_a, c.matched)
        assert sum(row["matched"] for row in c.per_class) == c.matched
        assert sum(row["only_b"] for row in c.per_class) == c.only_b
        different = [row.different for row in compare_live(a, b, worst=1000).worst]
        assert different == sorted(different, reverse=True) and sum(different) == c.changed + c.only_a + c.only_b
        json.dumps(c.to_dict(), allow_nan=False)


def test_live_of_itself(tmp_path):
    ds, hard = simulated_images(30)
    found = simulated_detector(ds, hard)
    a = write_predict(tmp_path / "a.jsonl", ds, found)
    c = compare_live(a, a)
    assert c.agreement == 1 and c.same_frames == c.frames == 30 and c.score_distance == c.box_shift == 0
    nothing = [Detections(d.boxes[:0], d.scores[:0], d.labels[:0]) for d in found]
    none = write_predict(tmp_path / "none.jsonl", ds, nothing)
    c = compare_live(a, none)
    assert c.agreement == 0 and c.only_a == c.boxes_a and c.score_shift is None
    assert compare_live(none, none).agreement == 1
    repr(c)


def test_live_by_hand(tmp_path):
    one = [{"name": "sack", "label": 0, "score": .9, "box": [0, 0, 10, 10]},
           {"name": "sack", "label": 0, "score": .8, "box": [50, 50, 60, 60]},
           {"name": "person", "label": 1, "score": .7, "box": [80, 80, 99, 99]}]
    two = [{"name": "sack", "label": 0, "score": .7, "box": [0, 0, 10, 12]},
           {"name": "person", "label": 1, "score": .6, "box": [50, 50, 60, 60]}]
    row = {"source": "x", "frame": 3, "time": "", "size": [100, 100]}
    (tmp_path / "a.jsonl").write_text(json.dumps(dict(row, objects=one)) + "\n")
    lost = dict(one[0], missed=2) # the tracker's guess
    (tmp_path / "b.jsonl").write_text(json.dumps(dict(row, objects=two + [lost])) + "\n\n")
    c = compare_live(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert (c.matched, c.changed, c.only_a, c.only_b, c.boxes_b) == (1, 1, 1, 0, 2)
    assert abs(c.score_shift + .2) < 1e-9 and c.box_shift == 2 and abs(c.mean_iou - 10 / 12) < 1e-6
    worst, = c.worst
    assert (worst.name, worst.index, worst.different) == ("x", 3, 2)
    assert c.per_class == [dict(name="person", matched=0, only_a=1, only_b=0, changed=0),
                           dict(name="sack", matched=1, only_a=0, only_b=0, changed=1)]


def test_rows_of_run_and_of_predict(tmp_path):
    "The very rows that the stream writes; frames that one of them dropped are counted and left out."
    ds, hard = simulated_images(12)
    found = simulated_detector(ds, hard)
    a = write_run(tmp_path / "a.jsonl", ds, found)
    b = write_run(tmp_path / "b.jsonl", ds, found[:9])
    c = compare_live(a, b)
    assert (c.frames, c.only_a_frames, c.only_b_frames, c.agreement) == (9, 3, 0, 1)
    assert "left out: 3 frames only in A" in repr(c)
    lines = write_predict(tmp_path / "p.jsonl", ds, found)
    whole = tmp_path / "predictions.json"
    frames = [json.loads(line) for line in lines.read_text().splitlines()]
    whole.write_text(json.dumps({"model": "x", "frames": frames}))
    assert compare_live(lines, whole).agreement == 1


def test_a_folder_that_has_grown(tmp_path):
    "Files are found again by their names, frames of a film by their numbers."
    found = [{"name": "x", "score": .5, "box": [0, 0, 9, 9]}]
    rows = {"a": [("one.jpg", 0), ("two.jpg", 1)], "b": [("new.jpg", 0), ("one.jpg", 1), ("two.jpg", 2)]}
    for name, files in rows.items():
        lines = [json.dumps({"name": f, "index": k, "image": f, "detections": found}) for f, k in files]
        (tmp_path / name).write_text("\n".join(lines))
    c = compare_live(tmp_path / "a", tmp_path / "b")
    assert (c.frames, c.only_b_frames, c.agreement) == (2, 1, 1)


GOOD = {"name": "a.jpg", "index": 0, "detections": [{"name": "x", "score": .5, "box": [0, 0, 1, 1]}]}


@pytest.mark.parametrize("text, line", [
    ("", "has no frames"),
    ("\n \n", "has no frames"),
    ('{"name": "a"', "line 1: not valid JSON"),
    ("[" * 100_000, "line 1: not valid JSON"),
    ("\xff", "line 1: not"),
    ("[1]", "line 1: not a frame"),
    ("{}", "line 1: not a frame"),
    (json.dumps(dict(GOOD, index=None)), "line 1: not a frame"),
    (json.dumps(dict(GOOD, detections=[3])), "line 1: a detection without"),
    (json.dumps(dict(GOOD, detections=[{"name": "x", "box": [0, 0, 1, 1]}])), "line 1: a detection without"),
    (json.dumps(dict(GOOD, detections=[{"name": "x", "score": 1, "box": [0, 0, 1]}])), "line 1: a detection without"),
    (json.dumps(dict(GOOD, detections=[{"name": "x", "score": float("nan"), "box": [0, 0, 1, 1]}])), "not a finite"),
    (json.dumps(GOOD) + "\n" + json.dumps(GOOD), "line 2: frame 0 of a.jpg stands twice"),
    (json.dumps(dict(GOOD, name="other.jpg")), "no frame in common"),
])
def test_damaged_files(tmp_path, text, line):
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps(GOOD))
    bad = tmp_path / "bad.jsonl"
    bad.write_text(text, encoding="latin-1")
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(InputError, match=line) as e: compare_live(*pair)
        assert "\n" not in str(e.value)


def test_files_that_are_not_there(tmp_path):
    for name in ("none.jsonl", "none.json", ""):
        with pytest.raises(InputError, match="cannot be read"): compare_live(tmp_path / name, tmp_path / name)
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(InputError, match="no list of frames"): compare_live(tmp_path / "x.json", tmp_path / "x.json")
    with pytest.raises(InputError, match="iou is 0"): compare_live(tmp_path / "x.json", tmp_path / "x.json", iou=0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("images, pairs", [(100, 200)])
def test_pairs_without_a_difference(images, pairs):
    "Models that differ by chance alone: about one of twenty pairs is called different at 5 %."
    alarms = []
    for k in range(pairs):
        ds, hard = simulated_images(images, seed=100 + k)
        results = {name: coco_stats(ds, simulated_detector(ds, hard, seed=2 * k + seed))
                   for seed, name in enumerate("ab")}
        comparison = compare_results(ds, results, resamples=400, seed=k)
        alarms.append(comparison.rows[1].p < .05)
        assert ("no difference shown" in comparison.verdict) != alarms[-1]
    by_twenty = np.reshape(alarms, (-1, 20)).sum(1)
    print(f"{sum(alarms)} of {pairs} pairs; of twenty each: {by_twenty.tolist()}")
    assert sum(alarms) < pairs * (.05 + 3 * np.sqrt(.05 * .95 / pairs))
    assert sum(alarms) > 0
