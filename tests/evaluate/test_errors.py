"""Types of error against tidecv and hotcoco; calibration, curves and ranked mistakes against their definitions.

tidecv's figures of four problems are kept below (version 1.0.1). Where the package is installed, hundreds of problems
are compared with it: pip install --no-deps tidecv appdirs (with its dependencies it would bring a second OpenCV).
"""
import json

import numpy as np
import pytest

import jetson_det.evaluate.errors as errors
from coco_scene import scene
from jetson_det.core import InputError, rng_for
from jetson_det.data.dataset import CROWD, DIFFICULT, IGNORE, DetDataset
from jetson_det.evaluate.coco import coco_of, coco_stats
from jetson_det.evaluate.errors import KINDS, calibration, confidence_curves, error_types, worst_errors
from jetson_det.runtime.geometry import Detections, as_detections
from tide_oracle import hotcoco_errors, import_tidecv, problem, tidecv_data, tidecv_errors

COSTS = (*KINDS, "FP", "FN")
TIDECV = { # seed of the problem: AP50, gains in the order of COSTS, counts in the order of KINDS
    1: (.3157584456410305, [.07246903124199598, .06855535954542084, .032878552903608735, .0504031624917576,
                            .021026118413516315, .07673832627402981, .3608092111246461, .12870532083771188],
        [9, 32, 7, 35, 13, 8]),
    2: (.13911543218641717, [.02037342878759228, .06570943157086154, .00099961170663601, .0024580018865497876,
                             .10828621273998022, .1004269679466861, .29652813217001844, .12655486039694802],
        [4, 10, 3, 11, 64, 12]),
    3: (.43961332714827245, [.05440246902359462, .08928283616337246, .05728910447133458, .052125690786239715,
                             .05414920340833973, .015260500409015236, .44817545172961537, .05062066037459147],
        [14, 42, 18, 59, 17, 1]),
    4: (.13031534524252306, [.06253226564611813, .2163946641042763, .01071806482117239, .00614288007666314,
                             .004304940512198385, .06829363548903201, .2855262389158928, .18040113452320505],
        [14, 48, 13, 28, 17, 17]),
}


def same_as_tidecv(report, truth):
    ap, costs, counts = truth
    assert abs(report.AP50 - ap) < 1e-12
    assert [report.count[kind] for kind in KINDS] == counts
    np.testing.assert_allclose([report.cost[kind] for kind in COSTS], costs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", TIDECV)
def test_the_figures_of_tidecv(monkeypatch, seed):
    "It takes recalls of .01 x k, pycocotools of linspace: 57 and some others differ in the last digit."
    monkeypatch.setattr(errors, "_RECALLS", np.array([k / 100 for k in range(101)]))
    same_as_tidecv(error_types(*problem(seed)), TIDECV[seed])


def test_tidecv_on_many_problems(monkeypatch):
    try: import_tidecv()
    except ImportError: pytest.skip("tidecv is not installed: pip install --no-deps tidecv appdirs")
    monkeypatch.setattr(errors, "_RECALLS", np.array([k / 100 for k in range(101)]))
    for seed in range(100, 300):
        ds, found = problem(seed)
        ap, costs, counts = tidecv_errors(*tidecv_data(ds, found))
        same_as_tidecv(error_types(ds, found), (ap, [costs[k] for k in COSTS], [counts[k] for k in KINDS]))


@pytest.mark.parametrize("digits", [None, 1])
def test_the_counts_of_hotcoco(digits):
    "Counts and AP50; and the gains of the kinds that it mends as TIDE does: by leaving them out."
    pytest.importorskip("hotcoco")
    for seed in range(30):
        ds, found = problem(seed, images=8, classes=4, digits=digits)
        report = error_types(ds, found)
        theirs = hotcoco_errors(ds, found)
        assert abs(report.AP50 - theirs["ap_base"]) < 1e-12
        assert {kind: report.count[kind] for kind in KINDS} == theirs["counts"]
        for kind in ("Both", "Dupe", "Bkg"):
            assert abs(report.cost[kind] - max(theirs["delta_ap"][kind], 0)) < 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_the_ap_is_the_evaluations(seed):
    "With crowds, ignored boxes, ties, copies, empty images, ids in any order; of a dataset and of a dictionary."
    ds, found = scene(seed)
    whole = coco_stats(ds, found)
    for gt in (ds, coco_of(ds)):
        report = error_types(gt, found)
        assert report.AP50 == pytest.approx(whole.stats["AP50"], abs=1e-11)
        for ours, theirs in zip(report.per_class, whole.per_class):
            assert (ours["AP50"] is None) == (theirs["AP50"] is None) and ours["boxes"] == theirs["boxes"]
            if ours["AP50"] is not None: assert ours["AP50"] == pytest.approx(theirs["AP50"], abs=1e-11)
    again = error_types(ds, found, iou=.75)
    assert again.AP50 == pytest.approx(whole.stats["AP75"], abs=1e-11)
    counted = report.kind != errors.COUNTS_NEITHER_WAY
    assert counted.sum() == (report.kind == -1).sum() + report.count["FP"]
    assert report.count["FN"] + (report.kind == -1).sum() == report.to_find.sum()
    json.dumps(report.to_dict(), allow_nan=False)


def test_what_counts_neither_way_is_no_mistake():
    boxes = [[0, 0, 50, 50], [100, 100, 150, 150]]
    for flag, extra in ((IGNORE, boxes[1]), (DIFFICULT, boxes[1]), (CROWD, [105, 105, 120, 120]),
                        (CROWD | IGNORE, [105, 105, 120, 120])):
        ds = DetDataset(".", ("a", "b"), ["0.png"], [[400, 400]], [0, 0], boxes, [0, 0], flags=[0, flag])
        report = error_types(ds, [as_detections([boxes[0], extra], [.5, .9], [0, 0])])
        assert (report.AP50, report.count["FP"], report.count["FN"]) == (1, 0, 0)
        assert not worst_errors(report, ds)


def test_each_kind_by_itself():
    "One box of class a, one of b far off; a detection of each kind."
    ds = DetDataset(".", ("a", "b"), ["0.png"], [[900, 900]], [0, 0], [[0, 0, 100, 100], [500, 500, 600, 600]], [0, 1])
    right = [0, 0, 100, 100]
    for extra, label, kind, meant in (([0, 0, 100, 95], 0, "Dupe", 0), ([40, 0, 140, 100], 0, "Loc", 0),
                                      ([500, 500, 600, 590], 0, "Cls", 1), ([550, 500, 650, 600], 0, "Both", 1),
                                      ([300, 300, 350, 350], 1, "Bkg", -1)):
        report = error_types(ds, [as_detections([right, extra], [.9, .8], [0, label])])
        assert [k for k in KINDS[:5] if report.count[k]] == [kind]
        row = [m for m in worst_errors(report, ds) if m.kind != "Miss"][0]
        assert (row.kind, row.truth, row.found, row.index) == (kind, meant, "ab"[label], 1)
        assert row.true == (None if meant < 0 else "ab"[meant])
        assert report.count["Miss"] == (0 if kind == "Cls" else 1) and report.count["FN"] == 1


def test_a_box_is_found_once():
    "Two shifted boxes mean one: only the surest becomes right, also where the other is of another class."
    ds = DetDataset(".", ("a", "b"), ["0.png"], [[900, 900]], [0, 0], [[0, 0, 100, 100], [500, 500, 600, 600]], [0, 1])
    two = [as_detections([[40, 0, 140, 100], [0, 45, 100, 145], [0, 0, 100, 90]], [.5, .6, .7], [0, 0, 1])]
    report = error_types(ds, two)
    assert (report.count["Loc"], report.count["Cls"], report.count["Miss"]) == (2, 1, 1)
    assert report.cost["Loc"] == 0 # the Cls is surer, so mending Loc finds nothing
    assert report.cost["Cls"] == pytest.approx(.5)


def raw_ap(kind, score, boxes):
    "The area under the raw curve of one class: the mean over its boxes of the precision where each was found."
    order = np.argsort(-score, kind="stable")
    right = (kind[order] == -1)[kind[order] != -2]
    return (np.cumsum(right) / np.arange(1, len(right) + 1))[right].sum() / boxes


@pytest.mark.parametrize("seed", range(3))
def test_the_harm_is_what_leaving_it_out_adds(seed):
    ds, found = problem(seed)
    report = error_types(ds, found)
    for k in range(3):
        rows = np.flatnonzero(report.label == k)
        before = raw_ap(report.kind[rows], report.score[rows], report.to_find[k])
        for j in rows[report.kind[rows] >= 0][::3]:
            others = rows[rows != j]
            after = raw_ap(report.kind[others], report.score[others], report.to_find[k])
            assert report.harm[j] == pytest.approx((after - before) / 3, abs=1e-12)
    assert (report.harm[report.kind < 0] == 0).all()


def test_the_worst_mistakes_can_be_looked_up():
    ds, found = problem(5)
    report = error_types(ds, found)
    rows = worst_errors(report, ds, 10_000)
    assert len(rows) == sum(report.count[k] for k in KINDS)
    assert all(a.cost >= b.cost for a, b in zip(rows, rows[1:]))
    for m in rows:
        assert m.image_name == ds.paths[m.image]
        if m.kind == "Miss":
            assert m.box == tuple(ds.boxes[m.truth]) and m.score is None and m.true == ds.classes[ds.labels[m.truth]]
            continue
        d = found[m.image]
        assert m.box == pytest.approx(tuple(d.boxes[m.index]), abs=1e-9)
        assert (m.score, m.found) == (d.scores[m.index], ds.classes[d.labels[m.index]])
        if m.truth >= 0: assert ds.box_image[m.truth] == m.image and m.overlap > .1
    only = worst_errors(report, ds, 10_000, kinds=("Bkg", "Miss"), label="c1")
    assert len(only) == report.per_class[1]["count"]["Bkg"] + report.per_class[1]["count"]["Miss"]


@pytest.mark.parametrize("bins", [1, 7, 10])
def test_calibration_is_hotcocos(bins):
    metrics = pytest.importorskip("hotcoco.metrics")
    report = error_types(*problem(6, images=40))
    expected, largest = metrics.calibration_error(report.score, report.kind == -1, bins)
    ours = calibration(report, bins)
    assert (ours.error, ours.most) == (pytest.approx(expected, abs=1e-12), pytest.approx(largest, abs=1e-12))
    # bins of equal mass, by hand
    score = np.sort(report.score)
    right = (report.kind == -1)[np.argsort(report.score, kind="stable")]
    n = len(score)
    edges = [n * k // bins for k in range(bins + 1)]
    gaps = [abs(score[a:b].sum() - right[a:b].sum()) / n for a, b in zip(edges, edges[1:])]
    by_mass = calibration(report, bins, "mass")
    assert by_mass.error == pytest.approx(sum(gaps), abs=1e-12)
    assert by_mass.count.tolist() == np.diff(edges).tolist()
    sure = calibration(report, bins, confidence=.5, label="c0")
    assert sure.count.sum() == ((report.label == 0) & (report.score >= .5)).sum()


def test_confidences_that_are_true_have_no_error():
    rng = rng_for(4)
    n = 6000
    score = rng.random(n).astype(np.float32)
    is_right = rng.random(n) < score
    place = np.where(is_right, 0, 500)[:, None] + np.array([[0, 0, 50, 50]])
    ds = DetDataset(".", ("a",), [f"{i}.png" for i in range(n)], [[600, 600]] * n, np.arange(n), [[0, 0, 50, 50]] * n,
                    np.zeros(n, int))
    found = [Detections(np.float32([box]), score[i:i + 1], np.zeros(1, np.int64)) for i, box in enumerate(place)]
    report = error_types(ds, found)
    assert calibration(report).error < .03 and calibration(report, equal="mass").error < .03
    halved = error_types(ds, [d._replace(scores=d.scores / 2) for d in found])
    assert calibration(halved).error == pytest.approx(.25, abs=.03) and "not sure enough" in str(calibration(halved))
    assert halved.AP50 == report.AP50 # the order is the same


def test_curves_are_exact_at_each_threshold():
    ds, found = problem(7, digits=2)
    report = error_types(ds, found)
    curves = confidence_curves(report)
    for k in range(3):
        rows = report.label == k
        for j in (0, 13, 50, 57, 99, 100):
            is_in = rows & (report.score >= j / 100)
            right = int((is_in & (report.kind == -1)).sum())
            recall = right / report.to_find[k]
            assert curves.recall[k, j] == pytest.approx(recall)
            if not is_in.any():
                assert np.isnan(curves.precision[k, j])
                continue
            assert curves.precision[k, j] == pytest.approx(right / is_in.sum())
            assert curves.F1[k, j] == pytest.approx(2 * right / (is_in.sum() + report.to_find[k]))
    for k, threshold in enumerate(curves.at_precision(.4)):
        if threshold is None: continue
        after = curves.precision[k, curves.confidence >= threshold]
        assert (after[~np.isnan(after)] >= .4).all()
        assert threshold == 0 or curves.precision[k, round(threshold * 100) - 1] < .4
    at_all = confidence_curves(report, np.unique(report.score))
    for k, row in enumerate(coco_stats(ds, found).per_class):
        assert np.nanmax(at_all.F1[k]) == pytest.approx(row["best"]["F1"], abs=1e-12)


def test_empty_detections_and_classes_without_boxes():
    ds, _ = problem(8)
    nothing = [as_detections()] * len(ds)
    report = error_types(ds, nothing)
    assert report.AP50 == 0 and report.count["Miss"] == len(ds.boxes) == report.count["FN"]
    assert calibration(report).error is None and str(calibration(report)) == "no detections"
    assert f"c0: 0.000, {report.to_find[0]} of {report.to_find[0]} boxes not found" in str(report)
    assert len(worst_errors(report, ds, 5)) == 5 and confidence_curves(report).at_precision(.5) == [None] * 3
    wider = DetDataset(".", (*ds.classes, "none"), ds.paths, ds.sizes, ds.box_image, ds.boxes, ds.labels)
    report = error_types(wider, nothing[1:] + [as_detections([[0, 0, 9, 9]], [.5], [3])])
    assert report.per_class[3]["AP50"] is None and report.per_class[3]["count"]["FP"] == 1
    assert "none" not in str(report)
    json.dumps(report.to_dict(), allow_nan=False)


def test_bad_calls_are_one_line():
    ds, found = problem(1)
    report = error_types(ds, found)
    nan = [d._replace(scores=d.scores * np.nan) for d in found]
    loud = error_types(ds, [d._replace(scores=d.scores * 10) for d in found])
    for call, text in [(lambda: error_types(ds, found[1:]), "11 lists of detections for 12 images"),
                       (lambda: error_types(ds, nan), "a detection has a score that is not a finite number"),
                       (lambda: error_types(ds, found, iou=.05), "background the lower one"),
                       (lambda: error_types(ds, found, max_detections=0), "at least 1"),
                       (lambda: error_types(ds.subset([]), []), "no boxes that count"),
                       (lambda: error_types(ds, found, ("x", "y", "z")), "no class in common"),
                       (lambda: worst_errors(report, ds, 0), "1 or more"),
                       (lambda: worst_errors(report, ds, label="dog"), "class 'dog' is not among"),
                       (lambda: calibration(report, 0), "1 or more"),
                       (lambda: calibration(report, equal="size"), "'width' or 'mass'"),
                       (lambda: calibration(report, label="dog"), "class 'dog' is not among"),
                       (lambda: calibration(loud), "needs them in 0..1"),
                       (lambda: confidence_curves(report, [.5, .4]), "ascending order")]:
        with pytest.raises(InputError, match=text) as e: call()
        assert "\n" not in str(e.value)
