"AP in any bins of size at any overlap, and the threshold with the best F1: against pycocotools and by trying all."
import json
import sys

import numpy as np
import pytest

from coco_oracle import pycocotools_stats
from coco_scene import scene
from jetson_det.core import InputError
from jetson_det.evaluate.coco import (COCO_BINS, area_factors, average_precision, coco_of, coco_results, coco_stats,
                                      size_bins, stride_bins)
from jetson_det.runtime.geometry import Detections

IOUS = [.3, .55, .8]


def oracle(gt, rows, ious, bins):
    "AP (T,C,A) and recall (T,C,A) of pycocotools, NaN where there is nothing to find."
    from pycocotools.cocoeval import COCOeval
    job = pycocotools_stats(gt, rows)
    again = COCOeval(job.cocoGt, job.cocoDt, "bbox")
    again.params.iouThrs = np.array(ious)
    again.params.areaRng = [list(b.area) for b in bins]
    again.params.areaRngLbl = [b.name for b in bins]
    again.params.maxDets = [100]
    again.evaluate(), again.accumulate()
    p = again.eval["precision"][..., 0]
    r = again.eval["recall"][..., 0]
    return np.where(p[:, 0] > -1, p.mean(1), np.nan), np.where(r > -1, r, np.nan)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("engine", ["hotcoco", "faster_coco_eval"])
def test_bins_and_overlaps_are_pycocotools(monkeypatch, seed, engine):
    if engine == "faster_coco_eval": monkeypatch.setitem(sys.modules, "hotcoco", None)
    ds, found = scene(seed, n=12)
    bins = size_bins((20, 50, 110))
    ap, recall = oracle(coco_of(ds), coco_results(found, ds.image_ids), IOUS, bins)
    for gt in (ds, coco_of(ds)):
        ours = average_precision(gt, found, ds.classes, ious=IOUS, bins=bins)
        np.testing.assert_allclose(ours.AP, ap, rtol=0, atol=1e-12)
        np.testing.assert_allclose(ours.recall, recall, rtol=0, atol=1e-12)
    assert not np.isnan(ours.AP).all()


@pytest.mark.parametrize("engine", ["hotcoco", "faster_coco_eval"])
def test_pixels_of_the_network(monkeypatch, engine):
    "Bins of an input of half the size are those of labels and detections of half the size."
    if engine == "faster_coco_eval": monkeypatch.setitem(sys.modules, "hotcoco", None)
    ds, found = scene(2, n=10)
    factors = area_factors(ds.sizes, (300, 300))
    assert factors.tolist() == [.25] * 10
    ours = average_precision(ds, found, bins=stride_bins(), factors=factors)
    half = coco_of(ds)
    for a in half["annotations"]:
        a["bbox"] = [v / 2 for v in a["bbox"]]
        a["area"] = a["area"] / 4 if a["area"] >= 0 else -1.
    rows = coco_results([d._replace(boxes=d.boxes / 2) for d in found], ds.image_ids)
    ap, recall = oracle(half, rows, ours.ious, stride_bins())
    np.testing.assert_allclose(ours.AP, ap, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.recall, recall, rtol=0, atol=1e-12)
    assert (ours.boxes[:, 1:].sum(1) == ours.boxes[:, 0]).all() # none of these is just at an edge


def test_cocos_own_bins_are_the_evaluation():
    ds, found = scene(1)
    whole = coco_stats(ds, found)
    ours = average_precision(ds, found)
    for k, name in enumerate(("AP", "AP_small", "AP_medium", "AP_large")):
        assert abs(ours.mean()[k] - whole.stats[name]) < 1e-12
    assert abs(ours.mean(.75)[0] - whole.stats["AP75"]) < 1e-12
    assert ours.boxes[:, 0].sum() == whole.boxes
    assert json.dumps(ours.to_dict(), allow_nan=False)
    assert str(ours).splitlines()[1].split()[:2] == ["all", str(whole.boxes)]


def test_factors_follow_the_fit():
    sizes = [[480, 640], [720, 1280], [100, 100]]
    assert area_factors(sizes, (320, 320)) == pytest.approx([.25, .0625, 10.24])
    assert area_factors(sizes, (320, 320), "stretch")[1] == pytest.approx(320 / 720 * 320 / 1280)
    assert area_factors(np.zeros((0, 2)), (320, 320)).shape == (0,)


def test_bad_bins_are_one_line():
    ds, found = scene(2, n=6)
    for call, text in [(lambda: size_bins(()), "ascending sides"), (lambda: size_bins((8, 8)), "ascending sides"),
                       (lambda: stride_bins((0, 8)), "ascending sides"), (lambda: stride_bins(()), "ascending sides"),
                       (lambda: average_precision(ds, found, bins=()), "no size bins"),
                       (lambda: average_precision(ds, found, ious=[]), "give overlaps"),
                       (lambda: average_precision(ds, found, ious=[0., .5]), "give overlaps"),
                       (lambda: average_precision(ds, found, ious=[float("nan")]), "give overlaps"),
                       (lambda: average_precision(ds, found, factors=[1.]), "one number over 0 for each image"),
                       (lambda: average_precision(ds, found, factors=[0.] * 6), "one number over 0 for each image"),
                       (lambda: average_precision(ds, found[1:]), "5 lists of detections for 6 images"),
                       (lambda: average_precision(ds, found, max_detections=0), "at least 1"),
                       (lambda: average_precision(ds.subset([]), []), "nothing to evaluate"),
                       (lambda: average_precision(ds, found).mean(.52), "was not counted")]:
        with pytest.raises(InputError, match=text) as e: call()
        assert "\n" not in str(e.value)
    assert COCO_BINS[1].area == (0, 1024)


def counts_at(job, category, threshold):
    "Right and false detections of at least this score at IoU .5, from pycocotools' own matches."
    right = wrong = boxes = 0
    for image in job.evalImgs:
        if image is None or image["category_id"] != category or image["aRng"] != job.params.areaRng[0]: continue
        boxes += int((np.asarray(image["gtIgnore"]) == 0).sum())
        is_in = np.asarray(image["dtScores"]) >= threshold
        counts = is_in & ~np.asarray(image["dtIgnore"][0], bool)
        right += int((counts & (image["dtMatches"][0] > 0)).sum())
        wrong += int((counts & (image["dtMatches"][0] == 0)).sum())
    return right, wrong, boxes


@pytest.mark.parametrize("seed", range(4))
def test_no_threshold_has_a_better_f1(seed):
    "Tried with each score that occurs; scores are tied on purpose, so that the order of equals must not matter."
    ds, found = scene(seed, n=12)
    found = [d._replace(scores=d.scores.round(1)) for d in found]
    job = pycocotools_stats(coco_of(ds), coco_results(found, ds.image_ids))
    for k, row in enumerate(coco_stats(ds, found).per_class):
        best = row["best"]
        scores = np.unique(np.concatenate([d.scores[d.labels == k] for d in found]))
        tried = []
        for threshold in scores:
            right, wrong, boxes = counts_at(job, k + 1, threshold)
            if boxes: tried.append(2 * right / (right + wrong + boxes))
        if row["AP"] is None:
            assert best == dict(F1=None, precision=None, recall=None, confidence=None)
            continue
        assert best["F1"] == pytest.approx(max(tried, default=0), abs=1e-12)
        assert (best["confidence"] is None) == (best["F1"] == 0)
        if not best["F1"]: continue
        right, wrong, boxes = counts_at(job, k + 1, best["confidence"])
        assert best["precision"] == pytest.approx(right / (right + wrong), abs=1e-12)
        assert best["recall"] == pytest.approx(right / boxes, abs=1e-12)


def test_the_curve_of_101_points_was_not_exact():
    "One box of three found at a score that also three false detections have: no threshold takes only the right one."
    from jetson_det.data.dataset import DetDataset
    ds = DetDataset(".", ("a",), ["0.png"], [[400, 400]], [0, 0, 0],
                    [[0, 0, 50, 50], [100, 100, 150, 150], [200, 200, 250, 250]], [0, 0, 0])
    boxes = np.float32([[0, 0, 50, 50], [300, 0, 350, 50], [300, 100, 350, 150], [300, 200, 350, 250]])
    best = coco_stats(ds, [Detections(boxes, np.full(4, .5, np.float32), np.zeros(4, np.int64))]).per_class[0]["best"]
    assert best == dict(F1=pytest.approx(2 / 7), precision=.25, recall=pytest.approx(1 / 3), confidence=.5)
