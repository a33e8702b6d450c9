"Random problems for the types of error, and what tidecv and hotcoco say of them."
import sys
import types

import numpy as np

from jetson_det.core import rng_for
from jetson_det.data.dataset import DetDataset
from jetson_det.runtime.geometry import Detections


def problem(seed, images=12, classes=3, most=24, digits=None):
    "Boxes of every class, and detections of all kinds: near, shifted, copies, of another class, of nothing."
    rng = rng_for(77, seed)
    where = []
    boxes = []
    labels = []
    found = []
    for i in range(images):
        # the first image has a box of each class: tidecv would count a class without any
        k = int(rng.integers(0, 7)) if i else classes
        size = rng.uniform(20, 120, (k, 2))
        corner = rng.uniform(0, 200, (k, 2))
        here = np.concatenate([corner, corner + size], 1)
        label = rng.integers(0, classes, k) if i else np.arange(classes)
        where += [i] * k
        boxes.append(here)
        labels.append(label)
        n = int(rng.integers(0, most + 1))
        own = rng.integers(0, k, n) if k else np.zeros(n, np.int64)
        near = here[own] + rng.normal(0, 1, (n, 4)) * rng.choice([2, 15, 40], (n, 1)) if k else rng.uniform(
            0, 300, (n, 4))
        near = np.concatenate([np.minimum(near[:, :2], near[:, 2:]), np.maximum(near[:, :2], near[:, 2:]) + 1], 1)
        same = label[own] if k else np.zeros(n, np.int64)
        score = rng.random(n)
        if digits is not None: score = score.round(digits)
        found.append(Detections(near, score, np.where(rng.random(n) < .7, same, rng.integers(0, classes, n))))
    ds = DetDataset(".", [f"c{k}" for k in range(classes)], [f"{i}.jpg" for i in range(images)],
                    [[400, 400]] * images, where, np.concatenate(boxes), np.concatenate(labels))
    return ds, found


def import_tidecv():
    "tidecv's TIDE and Data, without the plots, which need seaborn and pandas; ImportError where it is not installed."
    try: from tidecv import TIDE, Data
    except ImportError as e:
        if e.name not in ("seaborn", "pandas"): raise
        for name in [m for m in sys.modules if m.split(".")[0] == "tidecv"]: del sys.modules[name]
        plots = types.ModuleType("tidecv.plotting")
        plots.Plotter = lambda *a, **k: None
        sys.modules["tidecv.plotting"] = plots
        from tidecv import TIDE, Data
    return TIDE, Data


def tidecv_data(ds, found):
    "Both of tidecv's containers."
    _, Data = import_tidecv()
    truth = Data("truth")
    guess = Data("guess")
    for i in range(len(ds)):
        truth.add_image(i, str(i))
        boxes, labels, _ = ds.boxes_of(i)
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist()):
            truth.add_ground_truth(i, label, box=[x1, y1, x2 - x1, y2 - y1])
        for (x1, y1, x2, y2), score, label in zip(*(column.tolist() for column in found[i])):
            guess.add_detection(i, label, score, box=[x1, y1, x2 - x1, y2 - y1])
    return truth, guess


def tidecv_errors(truth, guess):
    "AP50, gain of each kind, count of each kind; 0..1."
    TIDE, _ = import_tidecv()
    run = TIDE().evaluate(truth, guess, mode=TIDE.BOX)
    cost = {kind.short_name: gain / 100 for kind, gain in run.fix_main_errors().items()}
    special = {kind.short_name: gain / 100 for kind, gain in run.fix_special_errors().items()}
    count = {kind.short_name: n for kind, n in run.count_errors().items()}
    return run.ap / 100, dict(cost, FP=special["FalsePos"], FN=special["FalseNeg"]), count


def hotcoco_errors(ds, found):
    "The dictionary of hotcoco's tide_errors."
    from hotcoco import COCO, COCOeval
    xywh = ds.boxes.copy()
    xywh[:, 2:] -= xywh[:, :2]
    images = [dict(id=i + 1, height=int(h), width=int(w)) for i, (h, w) in enumerate(ds.sizes.tolist())]
    categories = [dict(id=k + 1, name=name) for k, name in enumerate(ds.classes)]
    truth = COCO.from_arrays(images, categories, ds.box_image + 1, ds.labels + 1, xywh)
    boxes = np.concatenate([d.boxes for d in found]).astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    image = np.repeat(np.arange(len(ds)), [len(d.scores) for d in found]) + 1
    score = np.concatenate([d.scores for d in found])
    label = np.concatenate([d.labels for d in found]) + 1
    job = COCOeval(truth, truth.load_res(np.column_stack([image, boxes, score, label])), "bbox")
    job.evaluate()
    return job.tide_errors()
