"The report of an evaluation: its own figures against plain ways to count them, and what it keeps silent about."
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jetson_det.core import InputError, rng_for
from jetson_det.data.dataset import CROWD, IGNORE, DetDataset
from jetson_det.evaluate.advice import BoardCost
from jetson_det.evaluate.coco import area_factors, average_precision, coco_stats, size_bins
from jetson_det.evaluate.errors import error_types, worst_errors
from jetson_det.evaluate.intervals import resampling_plan
from jetson_det.evaluate.report import (binned_intervals, cheap_resamples, evaluation_report, learned_images,
                                        threshold_gain, worst_by_cost)
from jetson_det.runtime.contract import preset
from jetson_det.runtime.geometry import as_detections


def problem(seed, n=30, classes=3, quality=.7, false=2, flags=False):
    "Boxes of many sizes, found with a shift, and false detections."
    rng = rng_for(77, seed)
    image = np.repeat(np.arange(n), 4)
    corner = rng.uniform(0, 200, (4 * n, 2))
    boxes = np.hstack([corner, corner + np.exp(rng.uniform(1.5, 5, (4 * n, 2)))])
    flag = rng.choice([0, 0, 0, CROWD, IGNORE], 4 * n) if flags else np.zeros(4 * n, int)
    names = tuple(f"c{k}" for k in range(classes))
    labels = rng.integers(0, classes, 4 * n)
    ds = DetDataset(".", names, [f"{i}.jpg" for i in range(n)], [[400, 400]] * n, image, boxes, labels, flags=flag)
    found = []
    for i in range(n):
        b, l, _ = ds.boxes_of(i)
        some = rng.random(len(b)) < quality
        at = rng.uniform(0, 200, (false, 2))
        wrong = np.hstack([at, at + rng.uniform(5, 90, (false, 2))])
        shown = np.vstack([b[some] + rng.normal(0, 3, (some.sum(), 4)), wrong])
        scores = np.append(rng.uniform(.3, 1, some.sum()), rng.uniform(.05, .6, false))
        found.append(as_detections(shown, scores, np.append(l[some], rng.integers(0, classes, false))))
    return ds, found


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_bins_have_the_values_that_coco_counts(seed, flags):
    ds, found = problem(seed, n=12, flags=flags)
    bins = size_bins([10, 30, 80])
    for factors in (None, area_factors(ds.sizes, (320, 224))):
        rows = binned_intervals(ds, found, bins, factors, resampling_plan(12, 100))
        for row, value in zip(rows, average_precision(ds, found, bins=bins, factors=factors).mean()):
            if np.isnan(value): assert row.value is None
            else: assert row.value == pytest.approx(value, abs=1e-9)
            assert row.low is None or row.low <= row.value + 1e-9 and row.value - 1e-9 <= row.high


def test_intervals_of_bins_are_the_spread_of_sets_drawn_the_hard_way():
    "A bin's resamples against the evaluation of repeated images."
    ds, found = problem(4, n=10)
    bins = size_bins([30])
    plan = resampling_plan(10, 100, seed=3)
    row = binned_intervals(ds, found, bins[1:2], None, plan, .9)[0]
    values = []
    for weights in plan.weights[1:101].astype(int):
        images = np.repeat(np.arange(10), weights)
        parts = [ds.boxes_of(i) for i in images]
        drawn = DetDataset(".", ds.classes, [f"{k}.jpg" for k in range(len(images))], [[400, 400]] * len(images),
                           np.repeat(np.arange(len(images)), [len(b) for b, _, _ in parts]),
                           np.concatenate([b for b, _, _ in parts]), np.concatenate([l for _, l, _ in parts]))
        try: values.append(average_precision(drawn, [found[i] for i in images], bins=bins[1:2]).mean()[0])
        except InputError: continue # nothing to find in this draw
    values = np.array(values)
    assert row.error >= values[~np.isnan(values)].std(ddof=1) - 1e-9 # the jackknife may say more, never less
    assert row.error < 3 * np.nanstd(values)


def macro_f1(ds, found, threshold, images):
    "Mean F1 over classes, by a plain evaluation of the detections over a threshold."
    part = ds.subset(images)
    kept = []
    for i in images:
        d = found[i]
        keep = d.scores >= threshold
        kept.append(as_detections(d.boxes[keep], d.scores[keep], d.labels[keep]))
    r = error_types(part, kept)
    f1 = []
    for k in range(len(ds.classes)):
        if not r.to_find[k]: continue
        counted = (r.label == k) & (r.kind != -2)
        f1.append(2 * (r.kind[counted] == -1).sum() / (counted.sum() + r.to_find[k]))
    return float(np.mean(f1))


def test_a_threshold_is_judged_by_images_that_it_was_not_chosen_on():
    ds, found = problem(2, false=6)
    errors = error_types(ds, found)
    plan = resampling_plan(len(ds), 200)
    gain = threshold_gain(errors, .1, plan)
    everything = np.arange(len(ds))
    assert gain["F1_now"] == pytest.approx(macro_f1(ds, found, .1, everything), abs=1e-6)
    assert gain["F1"] == pytest.approx(macro_f1(ds, found, gain["best"], everything), abs=1e-6)
    for t in (.2, .4, .55, .7): assert macro_f1(ds, found, t, everything) <= gain["F1"] + 1e-9
    # two thresholds, one for each half, may be a little better than one
    assert 0 < gain["gain"].low <= gain["gain"].value <= gain["F1"] - gain["F1_now"] + .02
    assert threshold_gain(errors, gain["best"], plan)["gain"].low < .01
    assert threshold_gain(error_types(ds, [as_detections()] * len(ds)), .1, plan) is None


def test_no_threshold_is_better_on_noise():
    "Where scores say nothing, the best of a hundred thresholds is chance: it is seldom said to gain."
    said = 0
    for seed in range(20):
        ds, found = problem(100 + seed, n=16, classes=1)
        rng = rng_for(5, seed)
        found = [as_detections(d.boxes, .5 + rng.uniform(0, .4, len(d.scores)), d.labels) for d in found]
        gain = threshold_gain(error_types(ds, found), .5, resampling_plan(16, 100))["gain"]
        said += gain.low is not None and gain.low >= .01
    assert said <= 3


def test_the_worst_images_are_those_whose_mistakes_cost_most():
    ds, found = problem(2, false=3)
    r = error_types(ds, found)
    worst = worst_by_cost(r, ds, 5, 4)
    every = worst_errors(r, ds, 10_000)
    total = np.bincount([m.image for m in every], [m.cost for m in every], len(ds))
    assert [w.image for w in worst] == np.argsort(-total, kind="stable")[:5].tolist()
    for w in worst:
        mine = [m for m in every if m.image == w.image]
        assert w.cost == pytest.approx(total[w.image]) and w.path == f"{w.image}.jpg"
        assert len(w.mistakes) + w.others == len(mine) and w.mistakes[0] == mine[0]
        costs = [m.cost for m in w.mistakes]
        assert len(costs) <= 4 and costs == sorted(costs, reverse=True)
    right = [as_detections(*ds.boxes_of(i)[:1], np.ones(4), ds.boxes_of(i)[1]) for i in range(len(ds))]
    assert worst_by_cost(error_types(ds, right), ds) == []


def report_of(ds, found, **options):
    contract = preset("yolox", ds.classes, (224, 320))
    return evaluation_report(ds, coco_stats(ds, found), contract, **{"resamples": 100, **options})


def test_ap_without_the_images_that_were_trained_on():
    ds, found = problem(3)
    trained = np.arange(len(ds)) < 10
    report = report_of(ds, found, trained=trained, alike=np.arange(len(ds)) == 12)
    rest = np.flatnonzero(~trained & (np.arange(len(ds)) != 12))
    alone = coco_stats(ds.subset(rest), [found[i] for i in rest]).stats["AP"]
    assert report.leaks["learned"] == 10 and report.leaks["alike"] == 1 and report.leaks["rest"] == 19
    assert report.leaks["AP"][0] == pytest.approx(alone)
    assert report.advice[0].rule == "leakage" and report.lines()[1].startswith("1. Evaluate on other images")
    assert report.suspects.trained == 10
    assert "leakage" not in [row.rule for row in report_of(ds, found, trained=np.zeros(len(ds), bool)).advice]


@pytest.mark.parametrize("images,looked_up,splits,expected", [
    (3, 9, "test", [1, 1, 1]), (0, 9, "test", [0, 0, 0]), (0, 0, "test", None), (2, 9, "test", None),
    (2, 9, "mixed", [1, 1, 0])])
def test_which_images_were_learned_from(images, looked_up, splits, expected):
    names = ["train", "train", "val"] if splits == "mixed" else ["test"] * 3
    ds = DetDataset(".", ("a",), ["0.jpg", "1.jpg", "2.jpg"], [[9, 9]] * 3, splits=names)
    known = learned_images(SimpleNamespace(ds=ds, learned=SimpleNamespace(images=images, looked_up=looked_up)))
    assert (known is None) if expected is None else known.astype(int).tolist() == expected


@pytest.mark.parametrize("case", ["no detections", "a class without boxes", "two images", "one image", "no intervals",
                                  "groups", "one group", "no contract", "scores over 1"])
def test_a_report_of_anything_is_json_and_lines(case):
    ds, found = problem(6, n=8)
    options = {}
    if case == "no detections": found = [as_detections()] * 8
    if case == "a class without boxes":
        ds = DetDataset(".", (*ds.classes, "none"), ds.paths, ds.sizes, ds.box_image, ds.boxes, ds.labels)
    if case in ("two images", "one image"):
        n = 2 if case == "two images" else 1
        ds = ds.subset(range(n))
        found = found[:n]
    if case == "no intervals": options["resamples"] = 0
    if case == "groups": ds.groups = np.array(["a", "a", "b", "b", "c", "c", "d", "e"], object)
    if case == "one group": ds.groups = np.array(["a"] * 8, object)
    if case == "scores over 1": found = [as_detections(d.boxes, d.scores * 9, d.labels) for d in found]
    if case == "no contract": report = evaluation_report(ds, coco_stats(ds, found), resamples=100)
    else: report = report_of(ds, found, **options)
    figures = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    lines = report.lines()
    assert lines[0] == "What to do next:" and all("nan" not in line and "None" not in line for line in lines)
    assert report._repr_html_() and len(figures["confusion"]) == len(ds.classes) + 1
    if case == "no detections": assert report.advice[0].rule == "nothing found"
    if case in ("one image", "one group"):
        assert report.intervals is None and "no interval" in "\n".join(lines)
        assert [row.rule for row in report.advice if row.rule != "label errors"] == ["too few images"]
    if case == "no intervals": assert report.intervals is None and "no intervals were asked for" in lines[-2]
    if case == "groups": assert report.intervals.groups == 5
    if case == "scores over 1": assert report.calibration is None


def test_no_interval_reaches_beyond_what_ap_can_be():
    for seed in range(3):
        report = report_of(*problem(seed, n=9, classes=4, quality=.5))
        rows = [*report.intervals.stats, *report.intervals.per_class, *report.size_intervals]
        assert all(row.low is None or 0 <= row.low <= row.high <= 1 for row in rows)


def test_a_board_is_asked_for_the_sizes_that_are_named():
    ds, found = problem(7, n=60)
    found = [as_detections(d.boxes[large], d.scores[large], d.labels[large]) for d in found
             for large in [(d.boxes[:, 2:] - d.boxes[:, :2]).prod(1) > 1500]]
    asked = []
    board = BoardCost("nano, fp16", lambda size: asked.append(size) or 5.)
    report = report_of(ds, found, board=board, size=10)
    assert "small objects" in [row.rule for row in report.advice] and (224, 320) in asked
    assert report.to_dict()["board"]["value"] == 5 and report.to_dict()["bytes"] == 10


@pytest.mark.parametrize("change,words", [
    (dict(trained=[True]), "trained has the shape"), (dict(alike=np.ones(3)), "alike has the shape"),
    (dict(resamples=5), "resamples is 5")])
def test_wrong_input_is_one_line(change, words):
    ds, found = problem(8, n=6)
    with pytest.raises(InputError) as e: report_of(ds, found, **change)
    assert words in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(InputError, match="other images than these 5"):
        evaluation_report(ds.subset(range(5)), coco_stats(ds, found))


def test_a_training_does_not_wait_for_the_last_digit():
    assert cheap_resamples(72) == 1000 and cheap_resamples(5000) == 200
