"Simulated images and detectors for the tests of matching, intervals and comparison."
import numpy as np

from jetson_det.core import rng_for
from jetson_det.data.dataset import CROWD, DIFFICULT, IGNORE, DetDataset
from jetson_det.runtime.geometry import Detections


def to_detections(image, boxes, scores, labels, n):
    "Columns as a Detections for each image."
    order = np.argsort(image, kind="stable")
    cuts = np.searchsorted(image[order], np.arange(1, n))
    columns = (boxes[order].astype(np.float32), scores[order].astype(np.float32), labels[order].astype(np.int64))
    return [Detections(*row) for row in zip(*(np.split(column, cuts) for column in columns))]


def random_problem(seed, images=6, classes=3, levels=None):
    """Boxes on a coarse grid (equal IoUs) with crowds, ignored and difficult ones; `levels`: scores take that many
    values (ties), None: all differ."""
    rng = rng_for(91, seed)
    n = int(rng.integers(1, images + 1))
    count = rng.integers(0, 7, n)
    image = np.repeat(np.arange(n), count)

    def grid(k):
        corner = rng.integers(0, 8, (k, 2)) * 8.
        return np.hstack([corner, corner + rng.integers(1, 7, (k, 2)) * 8.])
    boxes = grid(len(image))
    flags = rng.choice([0, 0, 0, 0, CROWD, IGNORE, DIFFICULT, CROWD | IGNORE], len(image))
    ids = rng.permutation(n) + 1
    ds = DetDataset(".", tuple(f"class {k}" for k in range(classes)), [f"{i}.jpg" for i in range(n)], [[120, 120]] * n,
                    image, boxes, rng.integers(0, classes, len(image)), image_ids=ids, flags=flags)
    m = int(rng.integers(0, 12 * n))
    of = rng.integers(0, n, m)
    found = grid(m)
    if len(boxes) and m: # most lie at a box, some exactly
        at = rng.integers(0, len(boxes), m)
        near = rng.random(m) < .7
        of = np.where(near, image[at], of)
        found = np.where(near[:, None], boxes[at] + rng.integers(-1, 2, (m, 4)) * rng.integers(0, 2, (m, 1)) * 4, found)
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    scores = rng.permutation(m) / (m + 1) if levels is None else rng.integers(1, levels + 1, m) / (levels + 1)
    return ds, to_detections(of, found, scores, rng.integers(0, classes, m), n)


def simulated_images(n, seed=0):
    "Three classes of which the last is rare, and how hard each image is for every detector."
    rng = rng_for(77, seed)
    image = np.repeat(np.arange(n), rng.poisson(3 * rng.gamma(2, .5, n)))
    corner = rng.uniform(0, 500, (len(image), 2))
    boxes = np.hstack([corner, corner + rng.uniform(15, 140, (len(image), 2))])
    ds = DetDataset(".", ("sack", "person", "forklift"), [f"{i}.jpg" for i in range(n)], [[640, 640]] * n, image,
                    boxes, rng.choice(3, len(image), p=[.6, .3, .1]))
    return ds, rng.normal(0, .8, n)


def simulated_detector(ds, hard, seed=0, spread=.06):
    "Boxes found with noise (`spread` of their size), duplicates, wrong classes, false positives."
    rng = rng_for(78, seed)
    n = len(ds)
    hard = hard + rng.normal(0, .3, n)
    is_hit = rng.random(len(ds.boxes)) < 1 / (1 + np.exp(hard[ds.box_image] - 1.2))
    of = np.concatenate([np.flatnonzero(is_hit), np.flatnonzero(is_hit & (rng.random(len(is_hit)) < .15))])
    of_hard = hard[ds.box_image[of]]
    noise = rng.normal(0, spread, (len(of), 4)) * np.exp(.5 * of_hard)[:, None]
    right = ds.boxes[of] + noise * np.tile(ds.boxes[of, 2:] - ds.boxes[of, :2], 2)
    right[:, 2:] = np.maximum(right[:, 2:], right[:, :2] + 1)
    label = np.where(rng.random(len(of)) < .05, rng.integers(0, 3, len(of)), ds.labels[of])
    logit = 1.2 - .8 * of_hard + rng.normal(0, 1, len(of)) - 1.5 * (np.arange(len(of)) >= is_hit.sum())
    image = np.repeat(np.arange(n), rng.poisson(2 * np.exp(.5 * hard)))
    corner = rng.uniform(0, 500, (len(image), 2))
    boxes = np.concatenate([right, np.hstack([corner, corner + rng.uniform(15, 140, (len(image), 2))])])
    label = np.concatenate([label, rng.choice(3, len(image), p=[.5, .3, .2])])
    logit = np.concatenate([logit, rng.normal(-1.5, 1, len(image))])
    image = np.concatenate([ds.box_image[of], image])
    return to_detections(image, boxes, 1 / (1 + np.exp(-logit)), label, n)


def repeated(ds, found, times):
    "The hard way: a dataset in which each image stands as often as it was drawn, one copy after the other."
    drawn = np.repeat(np.arange(len(ds)), times)
    boxes = [np.flatnonzero(ds.box_image == i) for i in drawn]
    at = np.concatenate([np.zeros(0, int), *boxes])
    again = DetDataset(ds.root, ds.classes, [f"{k}.jpg" for k in range(len(drawn))], ds.sizes[drawn],
                       np.repeat(np.arange(len(drawn)), [len(b) for b in boxes]), ds.boxes[at], ds.labels[at],
                       flags=ds.flags[at])
    return again, [found[i] for i in drawn]
