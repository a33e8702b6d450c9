"Matches are pycocotools': which detection found which box, at every threshold, with crowds, ignored boxes and ties."
import contextlib
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jetson_det.core import InputError
from jetson_det.data.dataset import CROWD, DetDataset
from jetson_det.data.formats.registry import read_dataset
from jetson_det.evaluate.coco import coco_of, coco_results, coco_stats
from jetson_det.evaluate.intervals import weighted_ap
from jetson_det.evaluate.matching import COCO_IOUS, match, take_images
from jetson_det.runtime.geometry import Detections
from simulated_detector import random_problem, simulated_detector, simulated_images, to_detections


def oracle(ds, found, max_detections=100):
    "pycocotools' own matches: its job and, for each class and image, a row of evalImgs of the range 'all'."
    coco = coco_of(ds)
    rows = coco_results(found, ds.image_ids.tolist())
    if not rows: return None
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = coco
        truth.createIndex()
        job = COCOeval(truth, truth.loadRes(rows), "bbox")
        job.params.maxDets = [max_detections]
        job.params.areaRng = job.params.areaRng[:1]
        job.params.areaRngLbl = ["all"]
        job.evaluate()
        job.accumulate()
    return job


def check_same(ds, found, max_detections=100):
    job = oracle(ds, found, max_detections)
    if job is None: return 0
    m = match(ds, found, max_detections=max_detections)
    # annotation id -> box; an area of no class stands in every class under an id of its own
    boxes = list(range(len(ds.boxes)))
    for k in np.flatnonzero(ds.flags == CROWD | 2): boxes += [int(k)] * (len(ds.classes) - 1)
    starts = np.cumsum([0] + [len(found[k].scores) for k in range(len(found))])
    seen = 0
    for row in job.evalImgs:
        if row is None: continue
        image = int(np.flatnonzero(ds.image_ids == row["image_id"])[0])
        mine = np.flatnonzero((m.image == image) & (m.label == row["category_id"] - 1))
        # loadRes numbers the detections from 1, image by image as they were given
        assert m.index[mine].tolist() == [k - 1 - int(starts[image]) for k in row["dtIds"]]
        theirs = np.array([[boxes[int(k) - 1] if k else -1 for k in at] for at in row["dtMatches"]], int)
        assert m.box[:, mine].tolist() == theirs.reshape(len(m.ious), -1).tolist()
        assert m.ignored[:, mine].tolist() == np.asarray(row["dtIgnore"], bool).reshape(len(m.ious), -1).tolist()
        is_pair = (m.box_image == image) & (m.box_label == row["category_id"] - 1)
        assert m.box_count[is_pair].sum() == (np.asarray(row["gtIgnore"]) == 0).sum()
        seen += len(mine)
    assert seen == len(m.score)
    ap = weighted_ap(m, np.ones((1, len(ds))))[0]
    for label in range(len(ds.classes)):
        theirs = job.eval["precision"][:, :, label, 0, -1].mean(1)
        if theirs[0] < 0: assert np.isnan(ap[:, label]).all()
        else: np.testing.assert_allclose(ap[:, label], theirs, atol=1e-12, rtol=0)
    return seen


def test_random_problems():
    "200 problems, half of them with four scores only: every match, and the average precision from it."
    seen = [check_same(*random_problem(seed, levels=4 if seed % 2 else None)) for seed in range(200)]
    assert sum(seen) > 3000


def test_the_limit():
    for seed in range(20): check_same(*random_problem(seed, levels=3), max_detections=3)


def test_simulated_images():
    ds, hard = simulated_images(40)
    assert check_same(ds, simulated_detector(ds, hard)) > 150


@pytest.mark.slow
def test_2000_random_problems():
    for seed in range(1000, 3000): check_same(*random_problem(seed, images=12, levels=(None, 2, 5, 50)[seed % 4]))


def test_our_numbers():
    "The AP of every class is that of `coco_stats`, where the order of ids decides ties between images."
    for seed in range(60):
        ds, found = random_problem(seed, levels=3)
        try: result = coco_stats(ds, found)
        except InputError: continue # nothing to find
        ap = weighted_ap(match(ds, found), np.ones((1, len(ds))))[0].mean(0)
        theirs = [np.nan if row["AP"] is None else row["AP"] for row in result.per_class]
        np.testing.assert_allclose(ap, theirs, atol=1e-12, rtol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_a_subset_of_images(seed, random):
    "Matching some images is taking their matches."
    ds, found = random_problem(seed)
    some = sorted(random.sample(range(len(ds)), random.randint(1, len(ds))))
    a = take_images(match(ds, found), some)
    b = match(ds.subset(some), [found[k] for k in some])
    for name in ("score", "image", "label", "index", "ignored", "box_image", "box_label", "box_count"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    kept = np.flatnonzero(np.isin(ds.box_image, some))
    assert np.array_equal(a.box, np.append(kept, -1)[b.box]) # the indices are those of the whole set


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_one_more_detection_at_the_end(seed):
    "A detection of the lowest score takes no box from another."
    ds, found = random_problem(seed)
    more = list(found)
    more[0] = Detections(np.vstack([found[0].boxes, [[0, 0, 30, 30]]]).astype(np.float32),
                         np.append(found[0].scores, -1.).astype(np.float32), np.append(found[0].labels, 0))
    a = match(ds, found)
    b = match(ds, more)
    kept = b.score >= 0
    assert np.array_equal(a.box, b.box[:, kept])
    assert np.array_equal(a.ignored, b.ignored[:, kept])


def test_a_million_detections_on_one_image():
    "The limit holds for an image and class, and nothing is made of all pairs."
    rng = np.random.default_rng(0)
    boxes = [[0, 0, 9, 9], [50, 50, 70, 70]]
    ds = DetDataset(".", ("a", "b"), ["x.jpg", "y.jpg"], [[99, 99]] * 2, [0, 0], boxes, [0, 1])
    corner = rng.uniform(0, 90, (10**6, 2)).astype(np.float32)
    many = Detections(np.hstack([corner, corner + 9]), rng.random(10**6, np.float32), rng.integers(0, 2, 10**6))
    none = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    m = match(ds, [many, none])
    assert np.bincount(m.label).tolist() == [100, 100]
    assert m.score.min() > .999


@pytest.mark.parametrize("boxes, scores, labels, line", [
    ([[0, 0, 1, 1]], [np.nan], [0], "a.jpg: a detection has a score that is not a finite number"),
    ([[0, 0, np.inf, 1]], [.5], [0], "a.jpg: a detection has a box that is not finite"),
    ([[0, 0, 1, 1]], [.5], [2], "a.jpg: a detection has the label 2, which is outside 0..1"),
    ([[0, 0, 1, 1]], [.5], [-1], "a.jpg: a detection has the label -1, which is outside 0..1"),
])
def test_what_cannot_be_matched(boxes, scores, labels, line):
    ds = DetDataset(".", ("a", "b"), ["a.jpg"], [[9, 9]], [0], [[0, 0, 9, 9]], [0])
    wrong = Detections(np.array(boxes, np.float32), np.array(scores, np.float32), np.array(labels))
    with pytest.raises(InputError, match=line.replace(".", r"\.")): match(ds, [wrong])


def test_wrong_calls():
    ds, found = random_problem(0)
    with pytest.raises(InputError, match="lists of detections for"): match(ds, found + found)
    with pytest.raises(InputError, match="max_detections is 0"): match(ds, found, max_detections=0)
    for ious in ([], [0.], [1.5], [np.nan]):
        with pytest.raises(InputError, match="give thresholds over 0"): match(ds, found, ious)
    assert match(ds, found, .5).ious == (.5,)
    assert len(COCO_IOUS) == 10


def test_nothing_to_match():
    "No detections; no boxes; no images."
    ds, found = random_problem(3)
    none = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    m = match(ds, [none] * len(ds))
    assert m.box.shape == (10, 0) and m.box_count.sum() > 0
    empty = ds.subset([])
    assert len(match(empty, []).score) == 0
    without = DetDataset(".", ds.classes, ds.paths, ds.sizes)
    assert (match(without, found).box < 0).all()


@pytest.mark.data
def test_coco_images(data):
    "A hundred images of COCO's validation set with its crowds, and the detections that pycocotools ships: every match."
    folder = data / "datasets" / "coco_fixtures" / "val2014_100"
    ds = read_dataset(folder / "instances_val2014_100.json")
    rows = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    image = {k: i for i, k in enumerate(ds.image_ids.tolist())}
    categories = json.loads((folder / "instances_val2014_100.json").read_text())["categories"]
    label = {c["id"]: ds.classes.index(c["name"]) for c in categories if c["name"] in ds.classes}
    rows = [row for row in rows if row["category_id"] in label]
    xywh = np.array([row["bbox"] for row in rows])
    columns = (np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]]), np.array([row["score"] for row in rows]),
               np.array([label[row["category_id"]] for row in rows]))
    found = to_detections(np.array([image[row["image_id"]] for row in rows]), *columns, len(ds))
    assert (ds.flags & CROWD).any()
    assert check_same(ds, found) > 500
