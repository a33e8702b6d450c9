"Hotcoco and faster-coco-eval count the same: whichever is installed, the figures are these."
import sys

import numpy as np
import pytest

from jetson_det.data.dataset import CROWD, IGNORE, DetDataset
from jetson_det.evaluate.coco import coco_stats
from jetson_det.runtime.geometry import as_detections

pytest.importorskip("hotcoco")
pytest.importorskip("faster_coco_eval")


def scene(seed, n=25, classes=4):
    "Boxes, some of them crowds or ignored, and detections near them, many with equal scores."
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 14, n)
    start = rng.uniform(0, 400, (counts.sum(), 2))
    boxes = np.concatenate([start, start + np.exp(rng.uniform(np.log(6), np.log(200), (counts.sum(), 2)))], 1)
    labels = rng.integers(0, classes - 1, len(boxes)) # the last class has no boxes
    flags = np.where(rng.random(len(boxes)) < .25, rng.choice([CROWD, IGNORE], len(boxes)), 0)
    where = np.repeat(np.arange(n), counts)
    found = []
    for i in range(n):
        near = np.repeat(np.flatnonzero(where == i), 2)
        moved = boxes[near] + rng.normal(0, 4, (len(near), 4))
        scores = rng.random(len(near)).round(1)
        found.append(as_detections(moved, scores, np.where(rng.random(len(near)) < .8, labels[near], classes - 1)))
    ds = DetDataset(".", [f"c{k}" for k in range(classes)], [f"{i}.png" for i in range(n)], [[600, 600]] * n, where,
                    boxes, labels, flags=flags)
    return ds, found


def both(ds, found, monkeypatch, **options):
    first = coco_stats(ds, found, **options)
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "hotcoco", None) # as if it were not installed
        second = coco_stats(ds, found, **options)
    return first, second


def flat(result):
    "Every number of a result; -1 where there is none."
    rows = [value for row in result.per_class for key, value in row.items() if key != "name"]
    return [-1. if value is None else value for value in (*result.stats.values(), *rows)
            if value is None or isinstance(value, (int, float))]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most", [1, 10, 100, 300])
def test_the_same_figures(seed, most, monkeypatch):
    ds, found = scene(seed)
    first, second = both(ds, found, monkeypatch, max_detections=most)
    assert flat(first) == pytest.approx(flat(second), abs=1e-9)
    assert first.stats["AP"] > .01


def test_nothing_found_and_nothing_to_find(monkeypatch):
    ds, found = scene(1)
    first, second = both(ds, [f._replace(boxes=f.boxes[:0], scores=f.scores[:0], labels=f.labels[:0]) for f in found],
                         monkeypatch)
    assert first.stats == second.stats and first.stats["AP"] == 0
