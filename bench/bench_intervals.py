"""A paired bootstrap of two models on COCO's size: ours beside hotcoco's `compare`.

    python bench/bench_intervals.py [--images 5000 --boxes 36000 --detections 500000 --classes 80] [--json FILE]

Both have their matches before the clock starts (hotcoco: `evaluate()`). hotcoco takes few resamples and ours more, and
CPU seconds (all threads) are compared per resample, with the time that a call takes without resampling in them: it is
small for both. Rounds are interleaved (A B A B ...); ratios are of rounds beside each other, and of the fastest rounds.
hotcoco's interval covers all twelve numbers, ours AP, AP50, AP75 and the AP of every class; ours also has p values and
a jackknife (a hundred more rows of weights).

Then the whole of ours in a process of its own: matching both models, 1000 resamples of both, all figures; CPU seconds
and the peak of its memory, the labels and detections included. Exit code 1 if a limit is missed.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from jetson_det.core import rng_for
from jetson_det.data.dataset import DetDataset
from jetson_det.evaluate.intervals import paired_bootstrap
from jetson_det.evaluate.matching import match
from jetson_det.runtime.geometry import Detections

LIMIT = .2        # of hotcoco's CPU time per resample
CPU_SECONDS = 30  # of 1000 resamples of both models, matching included
PEAK_MB = 1000    # of memory of that process, labels and detections included


def problem(images, boxes, detections, classes):
    "Labels, and the detections of two models: a quarter near a box, the rest anywhere."
    rng = rng_for(40)
    image = np.sort(rng.integers(0, images, boxes))
    label = np.minimum(rng.geometric(5 / classes, boxes) - 1, classes - 1)
    corner = rng.uniform(0, 500, (boxes, 2))
    ds = DetDataset(".", tuple(f"class {k}" for k in range(classes)), [f"{i}.jpg" for i in range(images)],
                    [[640, 640]] * images, image, np.hstack([corner, corner + rng.uniform(10, 140, (boxes, 2))]), label)
    models = []
    for seed in (1, 2):
        rng = rng_for(41, seed)
        of = rng.integers(0, boxes, detections)
        is_near = rng.random(detections) < .25
        size = np.tile(ds.boxes[of, 2:] - ds.boxes[of, :2], 2)
        found = ds.boxes[of] + rng.normal(0, np.where(is_near, .07, 3.)[:, None], (detections, 4)) * size
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        score = np.where(is_near, rng.beta(3, 2, detections), rng.beta(1, 5, detections)).astype(np.float32)
        order = np.argsort(image[of], kind="stable")
        cuts = np.searchsorted(image[of][order], np.arange(1, images))
        columns = (found[order].astype(np.float32), score[order], label[of][order].astype(np.int64))
        models.append([Detections(*row) for row in zip(*(np.split(column, cuts) for column in columns))])
    return ds, models


def hotcoco_evaluations(ds, models):
    "The two evaluations that its `compare` takes, or None where hotcoco is not installed."
    try: from hotcoco import COCO, COCOeval
    except ImportError: return None
    images = [dict(id=k + 1, width=640, height=640) for k in range(len(ds))]
    categories = [dict(id=k + 1, name=name) for k, name in enumerate(ds.classes)]
    xywh = ds.boxes.copy()
    xywh[:, 2:] -= xywh[:, :2]
    truth = COCO.from_arrays(images, categories, ds.box_image + 1, ds.labels + 1, xywh)
    evaluations = []
    for found in models:
        counts = [len(d.scores) for d in found]
        boxes = np.concatenate([d.boxes for d in found]).astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        scores = np.concatenate([d.scores for d in found])
        labels = np.concatenate([d.labels for d in found])
        rows = np.column_stack([np.repeat(np.arange(len(ds)) + 1, counts), boxes, scores, labels + 1])
        job = COCOeval(truth, truth.load_res(rows), "bbox")
        job.evaluate()
        evaluations.append(job)
    return evaluations


def cpu_seconds(call):
    start = time.process_time()
    call()
    return time.process_time() - start


def peak_mb():
    "The most memory that this process has held; Linux's `ru_maxrss` has the parent's in it, from before `exec`."
    try: lines = Path("/proc/self/status").read_text().splitlines()
    except OSError: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def whole(args):
    "For the process of its own: CPU seconds and memory of everything that ours does."
    ds, models = problem(args.images, args.boxes, args.detections, args.classes)
    figures = {}

    def run():
        matches = [match(ds, found) for found in models]
        figures["test"] = paired_bootstrap(*matches, resamples=1000)
    seconds = cpu_seconds(run)
    peak = peak_mb()
    ap = figures["test"].stats[0]
    print(json.dumps({"cpu_seconds": seconds, "peak_mb": peak, "ap": [ap.a, ap.b, ap.low, ap.high, ap.p]}))
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--boxes", type=int, default=36_000)
    parser.add_argument("--detections", type=int, default=500_000, help="of each model")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved passes")
    parser.add_argument("--resamples", type=int, default=200, help="of ours in a round")
    parser.add_argument("--peer-resamples", type=int, default=5, help="of hotcoco in a round")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.whole: return whole(args)
    ds, models = problem(args.images, args.boxes, args.detections, args.classes)
    evaluations = hotcoco_evaluations(ds, models)
    matches = [match(ds, found) for found in models]
    figures = {"images": args.images, "boxes": args.boxes, "detections": args.detections, "classes": args.classes}
    print("{images} images, {boxes} boxes, 2 x {detections} detections, {classes} classes".format(**figures))
    missed = False
    if evaluations is None: print("NOT RUN: hotcoco is not installed")
    else:
        from hotcoco import compare
        ours, theirs = [], []
        for _ in range(args.rounds):
            ours.append(cpu_seconds(lambda: paired_bootstrap(*matches, resamples=args.resamples)) / args.resamples)
            theirs.append(cpu_seconds(lambda: compare(*evaluations, n_bootstrap=args.peer_resamples))
                          / args.peer_resamples)
        print("{:28}{:>10}{:>10}{:>10}   CPU ms per resample of both models".format("", "min", "median", "max"))
        for name, values in (("ours", ours), ("hotcoco compare", theirs)):
            low, middle, high = (1e3 * f(values) for f in (min, statistics.median, max))
            print("{:28}{:10.1f}{:10.1f}{:10.1f}".format(name, low, middle, high))
        ratio = min(ours) / min(theirs)
        ratios = [a / b for a, b in zip(ours, theirs)]
        missed = ratio > LIMIT
        print("ours / hotcoco {:>18} {:.3f} (limit {:.2f}: {})   rounds min {:.3f} median {:.3f} max {:.3f}".format(
            "fastest", ratio, LIMIT, "MISSED" if missed else "ok", min(ratios), statistics.median(ratios),
            max(ratios)))
        figures.update(ours=ours, hotcoco=theirs, ratio=ratio, limit=LIMIT)
    own = [sys.executable, __file__, "--whole"]
    for name in ("images", "boxes", "detections", "classes"): own += ["--" + name, str(figures[name])]
    alone = json.loads(subprocess.run(own, check=True, capture_output=True, text=True).stdout)
    figures["whole"] = alone
    limits = (("cpu_seconds", CPU_SECONDS, "CPU seconds"), ("peak_mb", PEAK_MB, "MB at most"))
    for key, limit, unit in limits:
        is_over = alone[key] > limit
        missed |= is_over
        print("1000 resamples, matching included: {:.1f} {} (limit {}: {})".format(alone[key], unit, limit,
                                                                                   "MISSED" if is_over else "ok"))
    if args.json: Path(args.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__": sys.exit(main())
