"""How many planted label errors are among the first hundred suspects: ours beside hotcoco and cleanlab.

    python bench/bench_label_errors.py --detections FILE.json --data PATH [--seeds 10] [--json FILE]
    python bench/bench_label_errors.py                       # a simulated detector

`FILE.json` holds COCO results of a detector that was not trained on these images, PATH their labels. Errors are planted
into 5 % of the labels for each kind (a label left out, a wrong class, a shifted box, a box of nothing, a label twice),
and all see the same labels and the same detections. Errors that the labels had before count as false for all. hotcoco:
the candidates of `image_diagnostics` by falling confidence, from its .5 on. cleanlab: ObjectLab's scores of boxes
(`compute_overlooked_box_scores`, `compute_badloc_box_scores`, `compute_swap_box_scores`) in one list, the lowest first;
scores of 1 and NaN are none; once with its own thresholds (.5 and .95), once with .2 and .5. A suspect is right when it
names a planted error: the label itself (of a doubled one either), or for a missing label a box with IoU .5 or more.
hotcoco looks for no spurious and no doubled labels and for no shifted ones, cleanlab for no spurious and doubled ones:
the second table plants the kinds that both can name. `seconds` is of CPU. What is not installed is left out and said.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from jetson_det.core import rng_for
from jetson_det.data.dataset import CROWD, DIFFICULT, IGNORE, DetDataset
from jetson_det.evaluate.coco import coco_of, coco_results
from jetson_det.evaluate.label_errors import KINDS, label_errors, plant_errors
from jetson_det.runtime.geometry import Detections, box_iou


def ours(ds, detections, **settings):
    "Rows of (image, row of the label or -1, box) by falling score."
    starts = np.searchsorted(ds.box_image, np.arange(len(ds) + 1))
    return [(s.image, s.box if s.box < 0 else int(starts[s.image]) + s.box, s.suggested_box)
            for s in label_errors(ds, detections, **settings).suspects]


def hotcoco(ds, detections):
    "image_diagnostics' candidates."
    from hotcoco import COCO, COCOeval
    truth = COCO(coco_of(ds))
    rows = coco_results(detections, ds.image_ids.tolist())
    job = COCOeval(truth, truth.load_res(rows), "bbox")
    job.evaluate()
    found = job.image_diagnostics()["label_errors"]
    place = {image: k for k, image in enumerate(ds.image_ids.tolist())}
    out = []
    for row in sorted(found, key=lambda row: -row["dt_score"]):
        x, y, w, h = rows[row["dt_id"] - 1]["bbox"]
        out.append((place[row["image_id"]], -1 if row["gt_id"] is None else row["gt_id"] - 1, (x, y, x + w, y + h)))
    return out


def cleanlab(ds, detections, low=None, high=None):
    "ObjectLab's scores of boxes; `low` and `high` are its thresholds (.5 and .95 where none is given)."
    from cleanlab.object_detection import rank
    labels = []
    rows_of = []
    predictions = []
    for i, d in enumerate(detections):
        rows = np.flatnonzero((ds.box_image == i) & (ds.flags & (CROWD | IGNORE | DIFFICULT) == 0))
        rows_of.append(rows)
        labels.append(dict(bboxes=ds.boxes[rows], labels=ds.labels[rows].astype(int)))
        by_class = [np.c_[d.boxes, d.scores][d.labels == k].reshape(-1, 5) for k in range(len(ds.classes))]
        predictions.append(np.array(by_class + [None], object)[:-1])
    out = []
    scores = rank.compute_overlooked_box_scores(labels=labels, predictions=predictions, high_probability_threshold=high)
    for i, (of_image, by_class) in enumerate(zip(scores, predictions)):
        boxes = np.concatenate(list(by_class))
        out += [(score, i, -1, tuple(box[:4])) for score, box in zip(of_image, boxes) if score < 1]
    of_labels = [rank.compute_badloc_box_scores(labels=labels, predictions=predictions, low_probability_threshold=low),
                 rank.compute_swap_box_scores(labels=labels, predictions=predictions, high_probability_threshold=high)]
    for images in of_labels:
        for i, of_image in enumerate(images):
            out += [(score, i, int(row), None) for score, row in zip(of_image, rows_of[i]) if score < 1]
    out.sort(key=lambda row: row[0])
    seen = set()
    kept = []
    for _, image, row, box in out:  # a label that two scores name is one suspect
        if row >= 0 and row in seen: continue
        seen.add(row)
        kept.append((image, row, box))
    return kept


def is_real(suspects, ds, errors):
    "For each suspect whether it names a planted error that none before it has named."
    by_label = {error.row: k for k, error in enumerate(errors) if error.row >= 0}
    by_label.update({error.twin: k for k, error in enumerate(errors) if error.twin >= 0})  # either of the two
    of_image = {}
    for k, error in enumerate(errors):
        if error.kind == "missing": of_image.setdefault(error.image, []).append(k)
    named = set()
    right = []
    for image, row, box in suspects:
        hits = [by_label[row]] if row in by_label else []
        if not hits and box is not None and image in of_image:
            left = of_image[image]
            overlap = box_iou(np.array([box]), np.array([errors[k].box for k in left]))[0]
            hits = [left[int(overlap.argmax())]] if overlap.max() >= .5 else []
        if not hits and row < 0 and box is not None:  # a shifted label, named by the detection beside it
            near = [k for k, error in enumerate(errors) if error.kind == "shifted" and error.image == image]
            if near:
                overlap = box_iou(np.array([box]), np.array([errors[k].box for k in near]))[0]
                hits = [near[int(overlap.argmax())]] if overlap.max() >= .5 else []
        hits = [k for k in hits if k not in named]
        named.update(hits)
        right.append(bool(hits))
    return np.array(right, bool), named


def cleanlab_lower(ds, detections):
    "The same with thresholds for detectors that are less sure."
    return cleanlab(ds, detections, .2, .5)


def ours_even(ds, detections):
    "The same with shifted labels taken as frequent as the other kinds, as they are planted."
    return ours(ds, detections, shifts=1.)


FINDERS = {"ours": ours, "ours, shifts=1": ours_even, "hotcoco": hotcoco, "cleanlab": cleanlab,
           "cleanlab .2/.5": cleanlab_lower}


def measure(ds, detections, seeds, kinds=KINDS, first=100):
    "Means over the seeds."
    out = {}
    for seed in range(seeds):
        flawed, errors = plant_errors(ds, .05, seed, kinds)
        for name, find in FINDERS.items():
            start = time.process_time()
            try: suspects = find(flawed, detections)
            except ImportError as e:
                out[name] = [f"not installed ({e.name})"]
                continue
            seconds = time.process_time() - start
            right, named = is_real(suspects, flawed, errors)
            planted = {error.kind for error in errors}
            row = dict(planted=len(errors), suspects=len(suspects), first=int(right[:first].sum()),
                       of=min(first, len(errors)), at_planted=int(right[:len(errors)].sum()), seconds=seconds)
            top = is_real(suspects[:len(errors)], flawed, errors)[1]
            row.update({kind: sum(errors[k].kind == kind for k in top) for kind in kinds if kind in planted})
            out.setdefault(name, []).append(row)
    means = {}
    for name, rows in out.items():
        means[name] = rows[0] if isinstance(rows[0], str) else \
            {key: round(float(np.mean([row[key] for row in rows])), 2) for key in rows[0]}
    return means


def read_detections(path, ds):
    "COCO results of a detector as a Detections for each image."
    of_image = {image: [] for image in ds.image_ids.tolist()}
    for row in json.loads(Path(path).read_text()): of_image[row["image_id"]].append(row)
    found = []
    for image in ds.image_ids.tolist():
        rows = sorted(of_image[image], key=lambda row: -row["score"])
        boxes = np.array([row["bbox"] for row in rows], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found.append(Detections(boxes, np.array([row["score"] for row in rows], np.float32),
                                np.array([row["category_id"] - 1 for row in rows], np.int64)))
    return found


def simulated(images):
    "Boxes, and a detector that misses small ones, is off, mistakes classes and finds what is not there."
    rng = rng_for(7)
    image = np.repeat(np.arange(images), rng.integers(0, 14, images))
    corner = rng.uniform(0, 500, (len(image), 2))
    boxes = np.hstack([corner, corner + rng.uniform(12, 140, (len(image), 2))])
    ds = DetDataset(".", [f"class {k}" for k in range(80)], [f"{i}.jpg" for i in range(images)], [[640, 640]] * images,
                    image, boxes, rng.integers(0, 80, len(image)))
    found = []
    for i in range(images):
        own, labels, _ = ds.boxes_of(i)
        side = np.sqrt((own[:, 2:] - own[:, :2]).prod(1))
        hit = rng.random(len(own)) < side / (side + 12)
        label = np.where(rng.random(len(own)) < .06, rng.integers(0, 80, len(own)), labels)
        score = 1 / (1 + np.exp(-rng.normal(1, 1.2, len(own))))
        off = rng.normal(0, .06, (len(own), 4)) * side[:, None]
        n = rng.poisson(90)
        corner = rng.uniform(0, 500, (n, 2))
        columns = (np.concatenate([(own + off)[hit], np.hstack([corner, corner + rng.uniform(12, 140, (n, 2))])]),
                   np.concatenate([score[hit], rng.beta(1, 12, n)]),
                   np.concatenate([label[hit], rng.integers(0, 80, n)]))
        order = np.argsort(-columns[1])
        found.append(Detections(columns[0][order].astype(np.float32), columns[1][order].astype(np.float32),
                                columns[2][order].astype(np.int64)))
    return ds, found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data")
    parser.add_argument("--detections")
    parser.add_argument("--images", type=int, default=300, help="of the simulated set")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--without", default="", help="names to leave out, with commas")
    parser.add_argument("--json")
    a = parser.parse_args()
    for name in filter(None, a.without.split(",")): FINDERS.pop(name)
    if a.data:
        from jetson_det.data.formats.registry import read_dataset
        ds = read_dataset(a.data)
        detections = read_detections(a.detections, ds)
    else: ds, detections = simulated(a.images)
    print(f"{len(ds)} images, {len(ds.boxes)} labels, {sum(len(d.scores) for d in detections)} detections")
    out = {}
    for title, kinds in (("five kinds", KINDS), ("missing, wrong class, shifted", KINDS[:3])):
        out[title] = measure(ds, detections, a.seeds, kinds)
        print(title)
        for name, row in out[title].items():
            if isinstance(row, str):
                print(f"  {name:16} {row}")
                continue
            by_kind = ", ".join(f"{kind} {row[kind]:g}" for kind in kinds if kind in row)
            print(f"  {name:16} real among the first 100: {row['first']:g}; among the first {row['planted']:g} (as many"
                  f" as planted): {row['at_planted']:g} ({by_kind}); {row['seconds']:.2f} s of CPU")
    if a.json: Path(a.json).write_text(json.dumps(out, indent=1))
    return 0


if __name__ == "__main__": sys.exit(main())
