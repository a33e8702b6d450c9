"""The board's average precision against pycocotools, which it must equal; Python 3.6 against pycocotools' figures."""
import json
import os

import numpy as np
import pytest

from jetson_det.runtime.files import InputError
from jetson_det.runtime.geometry import Detections, as_detections
from jetson_det.runtime.ops.average_precision import (all_matches, average_precision, bootstrap_ap, draw_weights,
                                                      interval, match_image, truth_of)


def random_scene(random, images, classes, most=6, side=40, flags=.2, step=1.):
    "A COCO dictionary, and detections of each image; boxes on a coarse grid overlap, and tie, often."
    annotations = []
    found = []
    grid = lambda low, high, shape: np.round(random.uniform(low, high, shape) / step) * step
    for image in range(1, images + 1):
        boxes = np.concatenate([grid(0, side, (random.randint(most + 1), 2)), np.zeros((0, 2))])
        boxes = np.concatenate([boxes, grid(1, side, boxes.shape)], 1)
        labels = random.randint(0, classes, len(boxes))
        for box, label in zip(boxes, labels):
            area = box[2] * box[3]
            flag = random.uniform()
            annotations.append(dict(id=len(annotations) + 1, image_id=image, bbox=box.tolist(),
                                    category_id=int(label) + 1, iscrowd=int(flag < flags / 2),
                                    area=float(-1 if flags / 2 <= flag < flags else area)))
        again = random.randint(0, 2, len(boxes)) == 1
        jitter = boxes[again]
        if len(jitter): jitter = np.concatenate([jitter[:, :2], np.maximum(jitter[:, 2:] + step, 1)], 1)
        extra = grid(0, side, (random.randint(most + 1), 4)) + [0, 0, 1, 1]
        rows = np.concatenate([boxes, jitter, extra])
        labels = np.concatenate([labels, labels[again], random.randint(0, classes, len(extra))])
        kept = random.permutation(len(rows))[:random.randint(0, len(rows) + 1)]
        rows = rows[kept]
        labels = labels[kept]
        corners = np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:]], 1)
        scores = np.round(random.uniform(.01, 1, len(rows)), 1 if random.uniform() < .5 else 6)
        found.append(as_detections(corners, scores, labels))
    coco = dict(images=[dict(id=k, height=side * 2, width=side * 2) for k in range(1, images + 1)],
                annotations=annotations, categories=[dict(id=k + 1, name=str(k)) for k in range(classes)])
    return coco, found


def ours(coco, found, weights=None):
    classes = len(coco["categories"])
    rows = []
    for image, detections in zip(coco["images"], found):
        mine = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        truth = truth_of([a["bbox"] for a in mine], [a["category_id"] - 1 for a in mine],
                         [a["iscrowd"] for a in mine], [a["area"] < 0 for a in mine])
        rows.append(match_image(detections, truth, classes))
    matches = all_matches(rows)
    return average_precision(matches, weights), matches


def oracle(coco, found):
    "pycocotools' AP, AP50, AP75 and those of each class, -1 where there is nothing to find."
    from coco_oracle import pycocotools_stats

    from jetson_det.evaluate.coco import coco_results
    rows = coco_results(found, [image["id"] for image in coco["images"]])
    if not rows: return None
    job = pycocotools_stats(coco, rows)
    precision = job.eval["precision"][:, :, :, 0, -1]
    per_class = [[precision[some, :, k].mean() for some in (slice(None), 0, 5)] for k in range(precision.shape[2])]
    return job.stats[:3], per_class


def assert_same(result, wanted):
    stats, per_class = wanted
    got = [-1 if v is None else v for v in (result.AP, result.AP50, result.AP75)]
    np.testing.assert_allclose(got, stats, atol=1e-9, rtol=0)
    got = [(-1, -1, -1) if row is None else row for row in result.per_class]
    np.testing.assert_allclose(got, per_class, atol=1e-9, rtol=0)


# seed -> what pycocotools 2.0 says
FIGURES = {
    0: (0.348552819567671, 0.3831272412955582, 0.3831272412955582),
    1: (0.26117013624439367, 0.28184606922230687, 0.2528031649318778),
    2: (0.34241827705718214, 0.3647754519041647, 0.3647754519041647),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_stored_figures_of_pycocotools(seed):
    result, _ = ours(*random_scene(np.random.RandomState(seed), 12, 3))
    np.testing.assert_allclose([result.AP, result.AP50, result.AP75], FIGURES[seed], atol=1e-9, rtol=0)


def test_equals_pycocotools():
    pytest.importorskip("pycocotools", reason="pycocotools has no wheel for Python 3.6")
    hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed for Python 3.6")
    from hypothesis import strategies as st
    seen = dict(crowds=0, ties=0, none=0)

    @hypothesis.settings(max_examples=150, deadline=None)
    @hypothesis.given(st.integers(0, 2**31), st.integers(1, 8), st.integers(1, 4), st.sampled_from([1., 5., .37]),
                      st.sampled_from([0., .2, .8]))
    def compare(seed, images, classes, step, flags):
        coco, found = random_scene(np.random.RandomState(seed), images, classes, step=step, flags=flags)
        wanted = oracle(coco, found)
        result, _ = ours(coco, found)
        if wanted is None:
            assert result.AP in (None, 0.)
            return
        assert_same(result, wanted)
        seen["crowds"] += any(a["iscrowd"] for a in coco["annotations"])
        seen["none"] += result.AP is None
        scores = np.concatenate([d.scores for d in found])
        seen["ties"] += len(np.unique(scores)) < len(scores)

    compare()
    assert min(seen.values()) > 0, seen # the cases that differ between programs were among them


def test_more_than_a_hundred_detections():
    pytest.importorskip("pycocotools", reason="pycocotools has no wheel for Python 3.6")
    random = np.random.RandomState(5)
    coco, found = random_scene(random, 2, 1, most=150)
    assert max(len(d.scores) for d in found) > 100
    assert_same(ours(coco, found)[0], oracle(coco, found))


@pytest.mark.data
def test_the_hundred_images_of_cocoapi():
    "The example of the COCO API itself, whose figures its page prints: 0.505, 0.697, 0.573."
    folder = os.path.join(os.environ["JETSON_DET_DATA"], "datasets", "coco_fixtures", "val2014_100")
    with open(os.path.join(folder, "instances_val2014_100.json")) as f: coco = json.load(f)
    with open(os.path.join(folder, "instances_val2014_fakebbox100_results.json")) as f: rows = json.load(f)
    coco["images"].sort(key=lambda row: row["id"])
    label_of = {row["id"]: k for k, row in enumerate(sorted(coco["categories"], key=lambda row: row["id"]))}
    images = []
    for image in coco["images"]:
        mine = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        truth = truth_of([a["bbox"] for a in mine], [label_of[a["category_id"]] for a in mine],
                         [a["iscrowd"] for a in mine])
        found = [row for row in rows if row["image_id"] == image["id"]]
        boxes = np.array([row["bbox"] for row in found]).reshape(-1, 4)
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        detections = Detections(corners, np.array([row["score"] for row in found]),
                                np.array([label_of[row["category_id"]] for row in found], np.int64))
        images.append(match_image(detections, truth, len(label_of)))
    result = average_precision(all_matches(images))
    assert [round(value, 3) for value in result[:3]] == [.505, .697, .573]
    pytest.importorskip("pycocotools", reason="pycocotools has no wheel for Python 3.6")
    from coco_oracle import pycocotools_stats
    for row in coco["annotations"]: row.pop("segmentation", None)
    np.testing.assert_allclose(result[:3], pycocotools_stats(coco, rows).stats[:3], atol=1e-9, rtol=0)


def test_a_class_without_boxes_has_no_figure():
    truth = truth_of([[0, 0, 10, 10]], [1])
    matches = all_matches([match_image(as_detections([[0, 0, 10, 10]] * 2, [.9, .8], [0, 1]), truth, 3)])
    result = average_precision(matches)
    assert result.per_class[0] is None and result.per_class[2] is None
    assert result.AP == pytest.approx(1, abs=1e-12)


def test_weights_are_copies_of_images():
    "An image with the weight 2 counts like two; one with 0 like none."
    random = np.random.RandomState(3)
    coco, found = random_scene(random, 8, 2)
    found = [as_detections(d.boxes, random.uniform(.01, 1, len(d.scores)), d.labels) for d in found] # no ties
    weights = np.array([2, 0, 1, 3, 1, 0, 1, 2])
    copies = np.repeat(np.arange(8), weights)
    annotations = []
    for new, old in enumerate(copies, 1):
        annotations += [dict(a, image_id=new) for a in coco["annotations"] if a["image_id"] == old + 1]
    copied = dict(coco, images=[dict(id=k + 1) for k in range(len(copies))], annotations=annotations)
    one = ours(coco, found, weights)[0]
    other = ours(copied, [found[k] for k in copies])[0]
    assert one.AP == pytest.approx(other.AP, abs=1e-12)
    np.testing.assert_allclose(np.array(one.per_class, float), np.array(other.per_class, float), atol=1e-12)
    assert one.AP != pytest.approx(ours(coco, found)[0].AP, abs=1e-3)


def test_bootstrap_covers_what_it_should():
    "AP of each draw is AP with its weights; the interval holds the whole set's figure; more images narrow it."
    widths = []
    for images in (12, 120):
        coco, found = random_scene(np.random.RandomState(7), images, 2, flags=0)
        result, matches = ours(coco, found)
        weights = draw_weights(images, 60)
        assert (weights.sum(1) == images).all()
        values = bootstrap_ap(matches, weights)
        assert values[7] == average_precision(matches, weights[7]).AP
        low, high = interval(values)
        assert low < result.AP < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 1.5


def test_faults():
    with pytest.raises(InputError, match="label 3 among 3 classes"):
        match_image(as_detections([[0, 0, 1, 1]], [.5], [3]), truth_of([], []), 3)
    with pytest.raises(InputError, match="no image"): all_matches([])
    with pytest.raises(InputError, match="needs images"): draw_weights(0)
    with pytest.raises(InputError, match="level 95"): interval([1, 2], 95)
    assert np.isnan(interval([np.nan])).all()
    nothing = match_image(as_detections(), truth_of([], []), 2)
    assert average_precision(all_matches([nothing])).AP is None
