"From a COCO file with fractions to the figures: those of pycocotools on that very file, to the last digit."
import json

import cv2
import numpy as np
import pytest

from coco_oracle import NAMES, pycocotools_stats
from jetson_det.config import DataConfig
from jetson_det.core import rng_for
from jetson_det.data.augment.plan import training_boxes
from jetson_det.data.open import open_data, open_evaluation
from jetson_det.evaluate.coco import evaluate
from jetson_det.runtime.contract import Contract
from jetson_det.runtime.geometry import Detections

H, W = 240, 320


def coco_file(root, seed, n=20, area="outline", over_edge=0., digits=2):
    "A COCO file as an annotation tool exports it: fractions of a pixel, areas of outlines, boxes at the edge."
    (root / "images").mkdir(parents=True)
    rng = rng_for(21, seed)
    d = dict(images=[], annotations=[], categories=[dict(id=7, name="cell"), dict(id=3, name="sack")])
    for i in range(n):
        cv2.imwrite(str(root / "images" / f"{i:02d}.png"), np.full((H, W, 3), i, np.uint8))
        d["images"].append(dict(id=n - i, file_name=f"{i:02d}.png", height=H, width=W))
        for _ in range(int(rng.integers(0, 9))):
            w, h = np.exp(rng.uniform(np.log(8), np.log(120), 2))
            x, y = rng.uniform(0, (W - w, H - h))
            if rng.random() < .3: x = W - w + rng.uniform(0, over_edge)
            box = [round(float(v), digits) for v in (x, y, w, h)]
            crowd = int(rng.random() < .1)
            a = dict(id=len(d["annotations"]) + 1, image_id=n - i, category_id=int(rng.choice([3, 7])), bbox=box,
                     iscrowd=crowd)
            a["area"] = round(box[2] * box[3] * (rng.uniform(.4, 1) if area == "outline" else 1), digits)
            d["annotations"].append(a)
    (root / "labels.json").write_text(json.dumps(d))
    return d


class Noisy:
    "Finds the boxes of a file, some pixels off; the answer depends on the image alone."
    def __init__(self, ds, spread=3.):
        self.ds = ds
        self.spread = spread
        self.contract = Contract("toy", "toy", ds.classes, (H, W), output="boxes_scores")
        self.confidence, self.iou, self.max_detections, self.timings = .25, .45, 100, {}

    def one(self, i):
        rng = rng_for(5, i)
        boxes, labels, _ = self.ds.boxes_of(i)
        m = int(rng.integers(0, 2 * len(boxes) + 1))
        k = rng.integers(0, len(boxes), m) if len(boxes) else np.zeros(0, int)
        found = boxes[k] + rng.normal(0, self.spread * rng.random((m, 1)), (m, 4))
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        labels = np.where(rng.random(m) < .9, labels[k], 1 - labels[k])
        return Detections(found.astype(np.float32), rng.random(m).astype(np.float32), labels.astype(np.int64))

    def __call__(self, frames): return [self.one(int(f[0, 0, 0])) for f in frames]


def figures(root, d, ds, spread=3.):
    "Ours, and those of pycocotools from the file as it is and from the detections as they were saved."
    ours = evaluate(Noisy(ds, spread), ds, progress=False)
    ours.save_detections(root / "detections.json")
    rows = json.loads((root / "detections.json").read_text())
    by_path = {im["file_name"]: im["id"] for im in d["images"]}
    ids = {int(i): by_path[p.rsplit("/", 1)[-1]] for i, p in zip(ds.image_ids, ds.paths)}
    by_name = {c["name"]: c["id"] for c in d["categories"]}
    for r in rows:
        r["image_id"] = ids[r["image_id"]]
        r["category_id"] = by_name[ds.classes[r["category_id"] - 1]]
    return ours, pycocotools_stats(d, rows)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("over_edge", [0., .4, 6.])
def test_the_figures_are_those_of_the_file(tmp_path, seed, over_edge):
    d = coco_file(tmp_path / "c", seed, over_edge=over_edge)
    ds = open_evaluation(tmp_path / "c", say=lambda line: None)
    again = open_evaluation(tmp_path / "c", say=lambda line: None) # from its index
    assert (again.boxes == ds.boxes).all() and np.array_equal(again.areas, ds.areas, equal_nan=True)
    ours, truth = figures(tmp_path, d, ds)
    np.testing.assert_allclose([-1 if ours.stats[k] is None else ours.stats[k] for k in NAMES], truth.stats, rtol=0,
                               atol=1e-12)


def test_close_to_a_threshold_fractions_decide(tmp_path):
    "Detections that fit to a hundredth of a pixel: float32 boxes of a large image would tip some of them."
    d = coco_file(tmp_path / "c", 7, n=40, digits=6)
    ds = open_evaluation(tmp_path / "c", say=lambda line: None)
    ours, truth = figures(tmp_path, d, ds, spread=.3)
    np.testing.assert_allclose([ours.stats[k] for k in NAMES[:3]], truth.stats[:3], rtol=0, atol=1e-12)
    boxes = {tuple(a["bbox"]) for a in d["annotations"]}
    kept = np.concatenate([ds.boxes[:, :2], ds.boxes[:, 2:] - ds.boxes[:, :2]], 1).round(9)
    assert {tuple(b) for b in kept.tolist()} == boxes


@pytest.mark.parametrize("side", [32, 96])
def test_an_area_at_the_edge_of_a_size_class_counts_in_both(tmp_path, side):
    "pycocotools counts an area of 32² as small and as medium; a side of 31.999999 would be small alone."
    (tmp_path / "c" / "images").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "c" / "images" / "00.png"), np.zeros((H, W, 3), np.uint8))
    boxes = [[x + .1, y + .7, side, side] for x in (1, 101, 201) for y in (1, 101)]
    anns = [dict(id=k, image_id=1, category_id=1, bbox=b, area=b[2] * b[3], iscrowd=0) for k, b in enumerate(boxes, 1)]
    d = dict(images=[dict(id=1, file_name="00.png", height=H, width=W)], annotations=anns,
             categories=[dict(id=1, name="cell")])
    (tmp_path / "c" / "labels.json").write_text(json.dumps(d))
    ds = open_evaluation(tmp_path / "c", say=lambda line: None)
    ours, truth = figures(tmp_path, d, ds)
    np.testing.assert_allclose([-1 if ours.stats[k] is None else ours.stats[k] for k in NAMES], truth.stats, rtol=0,
                               atol=1e-12)
    assert ours.stats["AP_medium"] is not None
    assert (ours.stats["AP_small"] if side == 32 else ours.stats["AP_large"]) is not None


def test_training_and_evaluation_judge_by_the_same_labels(tmp_path):
    "The training learns from boxes clipped to their image; what it is judged by is not clipped."
    d = coco_file(tmp_path / "c", 1, over_edge=5.)
    lines = []
    ds = open_data(DataConfig(path=str(tmp_path / "c"), max_flawed=1.), say=lines.append)
    whole = open_evaluation(tmp_path / "c", say=lines.append)
    assert (ds.subset(np.argsort(ds.paths)).boxes == whole.subset(np.argsort(whole.paths)).boxes).all()
    assert ds.boxes[:, 2].max() > W
    learned = np.concatenate([training_boxes(ds, i)[0] for i in range(len(ds))])
    assert learned.dtype == np.float32 and learned[:, 2].max() == W
    assert any("(clipped)" in line for line in lines[:20]) and any("(noted)" in line for line in lines[-20:])
