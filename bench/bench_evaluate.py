"""Evaluation beside its peers in one run: COCO's numbers, the types of error, intervals.

    python bench/bench_evaluate.py [--rounds N] [--images N] [--slow-images N] [--json FILE]

The problem is generated, of the size of COCO's validation set: 5000 images, 36,000 boxes, 500,000 detections, 80
classes. Everything starts from a dataset and a `Detections` for each image, and what a peer needs to be told in its
own way is part of its time: arrays for hotcoco, dictionaries for the others. `ours` gives more than the twelve numbers
(each class's own, with the best threshold), `hotcoco` is its from_arrays, load_res, evaluate, accumulate, summarize.
For the types of error, hotcoco's time is evaluate at the one overlap and tide_errors.

pycocotools and tidecv take minutes for all of it, so they run on the first --slow-images images, with ours beside them
on the same. A peer that is not installed is left out and said so (tidecv: pip install --no-deps tidecv appdirs).

Intervals are a paired bootstrap of two models, ours beside hotcoco's `compare`; the others have none. Both have their
matches before the clock starts (hotcoco: `evaluate()`), and what is compared is the time of one resample of both
models, with what a call takes without resampling in it, which is small for both. hotcoco's interval covers all twelve
numbers, ours AP, AP50, AP75 and the AP of every class; ours also has p values and a jackknife.

Rounds are interleaved (A B C A B C ...); seconds are those of the CPU, of all threads. Ratios are those of rounds
beside each other: minimum, median, maximum; the median has to hold the limit. Two more runs in fresh processes give
the peak of the memory, the problem's own arrays included: of counting and the types of error, and of 1000 resamples of
two models with their matching. Last come 20 pairs of models that differ by chance alone: how often does
`compare_results` say that one is better? Exit code 1 if a limit is missed.
"""
import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from jetson_det.data.dataset import DetDataset  # noqa: E402
from jetson_det.evaluate.coco import coco_of, coco_results, coco_stats  # noqa: E402
from jetson_det.evaluate.compare import compare_results  # noqa: E402
from jetson_det.evaluate.errors import error_types  # noqa: E402
from jetson_det.evaluate.intervals import paired_bootstrap  # noqa: E402
from jetson_det.evaluate.matching import match  # noqa: E402
from jetson_det.runtime.geometry import Detections  # noqa: E402

LIMITS = {"coco: ours / hotcoco": 2.5, "coco: ours / faster-coco-eval": .5, "coco: ours / pycocotools": .1,
          "errors: ours / hotcoco": 1.5, "errors: ours / tidecv": .1, "intervals: ours / hotcoco": .2}
ONCE = {"coco, CPU s": 1.5, "errors, CPU s": 1., "peak, MB": 500, "1000 resamples, CPU s": 30,
        "1000 resamples, peak, MB": 1000}
MOST_ALARMS = 4 # of 20 pairs without a difference: by chance more come once in 400 runs


def problem(images, classes=80, seed=0, model=0):
    """Boxes of all sizes, classes as uneven as COCO's, 7.2 boxes and 100 detections an image; another `model` has
    other detections of the same kind."""
    rng = np.random.default_rng(seed)
    n = images * 36 // 5
    image = np.sort(rng.integers(0, images, n))
    share = 1 / np.arange(1, classes + 1)
    label = rng.choice(classes, n, p=share / share.sum())
    size = np.exp(rng.uniform(np.log(8), np.log(300), (n, 2)))
    corner = rng.uniform(0, 1, (n, 2)) * (640 - size)
    boxes = np.concatenate([corner, corner + size], 1)
    ds = DetDataset(".", [f"c{k}" for k in range(classes)], [f"{i}.jpg" for i in range(images)],
                    [[640, 640]] * images, image, boxes, label)
    found = []
    if model: rng = np.random.default_rng([seed, model])
    for i in range(images):
        own, labels, _ = ds.boxes_of(i)
        if len(own):
            k = rng.integers(0, len(own), 100)
            near = own[k] + rng.normal(0, 1, (100, 4)) * rng.choice([1, 6, 40], (100, 1))
            labels = np.where(rng.random(100) < .7, labels[k], rng.integers(0, classes, 100))
        else:
            near = rng.uniform(0, 640, (100, 4))
            labels = rng.integers(0, classes, 100)
        near = np.concatenate([np.minimum(near[:, :2], near[:, 2:]), np.maximum(near[:, :2], near[:, 2:]) + 1], 1)
        score = rng.random(100) ** 3
        found.append(Detections(near.astype(np.float32), score.astype(np.float32), labels.astype(np.int64)))
    return ds, found


def hotcoco_job(ds, found):
    "Hotcoco from arrays."
    from hotcoco import COCO, COCOeval
    xywh = ds.boxes.copy()
    xywh[:, 2:] -= xywh[:, :2]
    images = [dict(id=i, height=1, width=1) for i in ds.image_ids.tolist()]
    categories = [dict(id=k, name=str(k)) for k in range(1, len(ds.classes) + 1)]
    truth = COCO.from_arrays(images, categories, ds.image_ids[ds.box_image], ds.labels + 1, xywh)
    boxes = np.concatenate([d.boxes for d in found]).astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    image = np.repeat(ds.image_ids, [len(d.scores) for d in found])
    columns = [image, boxes, np.concatenate([d.scores for d in found]), np.concatenate([d.labels for d in found]) + 1]
    return COCOeval(truth, truth.load_res(np.column_stack(columns)), "bbox")


def hotcoco_coco(ds, found):
    job = hotcoco_job(ds, found)
    job.evaluate(), job.accumulate(), job.summarize()
    return job.stats[0]


def faster_coco(ds, found):
    from faster_coco_eval import COCO, COCOeval_faster
    quiet = lambda *a, **k: None
    truth = COCO(coco_of(ds), print_function=quiet)
    job = COCOeval_faster(truth, truth.loadRes(coco_results(found, ds.image_ids)), iouType="bbox",
                          print_function=quiet)
    job.evaluate(), job.accumulate(), job.summarize()
    return job.stats[0]


def pycocotools_coco(ds, found):
    from coco_oracle import pycocotools_stats
    return pycocotools_stats(coco_of(ds), coco_results(found, ds.image_ids)).stats[0]


def hotcoco_tide(ds, found):
    job = hotcoco_job(ds, found)
    job.params.iouThrs = [.5]
    job.evaluate()
    return job.tide_errors()["ap_base"]


def tidecv_tide(ds, found):
    from tide_oracle import tidecv_data, tidecv_errors
    return tidecv_errors(*tidecv_data(ds, found))[0]


def our_intervals(ds, models, resamples=100):
    "The paired bootstrap of ours: a call that takes so many resamples, and their number."
    matches = [match(ds, found) for found in models]
    return lambda: paired_bootstrap(*matches, resamples=resamples), resamples


def hotcoco_intervals(ds, models, resamples=5):
    "hotcoco's."
    from hotcoco import compare
    jobs = [hotcoco_job(ds, found) for found in models]
    for job in jobs: job.evaluate()
    return lambda: compare(*jobs, n_bootstrap=resamples), resamples


def interval_rounds(peers, ds, models, rounds):
    "name -> CPU seconds for a resample of both models, of each interleaved round."
    calls = {name: make(ds, models) for name, make in peers.items()}
    seconds = {name: [] for name in peers}
    for _ in range(rounds):
        for name, (run, resamples) in calls.items():
            start = time.process_time()
            run()
            seconds[name].append((time.process_time() - start) / resamples)
    return seconds


def false_alarms(pairs=20, images=100):
    "Of so many pairs of models that differ by chance alone: how many does `compare_results` call different at 5 %?"
    from simulated_detector import simulated_detector, simulated_images
    alarms = 0
    for k in range(pairs):
        ds, hard = simulated_images(images, seed=100 + k)
        results = {f"seed {seed}": coco_stats(ds, simulated_detector(ds, hard, seed=2 * k + seed)) for seed in (0, 1)}
        alarms += compare_results(ds, results, resamples=400, seed=k).rows[1].p < .05
    return int(alarms)


def is_there(run, problem_of_one):
    "Whether a peer is installed."
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run(*problem_of_one)
    except ImportError: return False
    return True


def rounds_of(peers, ds, found, rounds):
    "name -> CPU seconds of each interleaved round, and the figure that it found."
    seconds = {name: [] for name in peers}
    figures = {}
    for _ in range(rounds):
        for name, run in peers.items():
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                start = time.process_time()
                figures[name] = float(run(ds, found))
                seconds[name].append(time.process_time() - start)
    return seconds, figures


def peak_mb():
    "The most memory that this process has held, from /proc: getrusage would hand on the parent's."
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024, 1)


def once_intervals(images):
    "1000 resamples of two models with their matching, in a fresh process."
    ds, found = problem(images)
    _, other = problem(images, model=1)
    start = time.process_time()
    paired_bootstrap(match(ds, found), match(ds, other), resamples=1000)
    used = round(time.process_time() - start, 2)
    return {"1000 resamples, CPU s": used, "1000 resamples, peak, MB": peak_mb()}


def once(images):
    "The figures of one fresh process."
    ds, found = problem(images)
    used = []
    for run in (coco_stats, error_types):
        start = time.process_time()
        run(ds, found)
        used.append(round(time.process_time() - start, 3))
    return {"coco, CPU s": used[0], "errors, CPU s": used[1], "peak, MB": peak_mb()}


def ratio_of(title, seconds, name, figures, missed):
    "Print ours by a peer's, round by round; note it, and whether it misses its limit."
    ratios = [a / b for a, b in zip(seconds["ours"], seconds[name])]
    limit = LIMITS[title]
    figures[title] = dict(min=min(ratios), median=statistics.median(ratios), max=max(ratios), limit=limit,
                          seconds=seconds)
    if statistics.median(ratios) > limit: missed.append(title)
    print(f"  {title:32} min {min(ratios):.3f} median {statistics.median(ratios):.3f} max {max(ratios):.3f}"
          f"  (limit {limit:g}: {'MISSED' if title in missed else 'ok'})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds; the slow peers have a third of them")
    parser.add_argument("--images", type=int, default=5000, help="images of the problem")
    parser.add_argument("--slow-images", type=int, default=300, help="images for pycocotools and tidecv")
    parser.add_argument("--once", action="store_true", help="only the figures of this process, as JSON")
    parser.add_argument("--once-intervals", action="store_true", help="the same of the intervals")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    for is_asked, run in ((args.once, once), (args.once_intervals, once_intervals)):
        if not is_asked: continue
        print(json.dumps(run(args.images)))
        return 0
    small = problem(2)
    whole = problem(args.images)
    part = problem(args.slow_images)
    ours = lambda ds, found: coco_stats(ds, found).stats["AP"]
    our_errors = lambda ds, found: error_types(ds, found).AP50
    few = max(args.rounds // 3, 1)
    tables = [("coco", whole, args.rounds, {"ours": ours, "hotcoco": hotcoco_coco, "faster-coco-eval": faster_coco}),
              ("coco", part, few, {"ours": ours, "pycocotools": pycocotools_coco}),
              ("errors", whole, args.rounds, {"ours": our_errors, "hotcoco": hotcoco_tide}),
              ("errors", part, few, {"ours": our_errors, "tidecv": tidecv_tide})]
    figures = {}
    missed = []
    for task, data, rounds, peers in tables:
        there = {name: run for name, run in peers.items() if is_there(run, small)}
        for name in set(peers) - set(there): print(f"{task}: {name} is not installed, left out")
        if len(there) < 2: continue
        seconds, found = rounds_of(there, *data, rounds)
        count = sum(len(d.scores) for d in data[1])
        print(f"{task}: {len(data[0])} images, {len(data[0].boxes)} boxes, {count} detections; {rounds} rounds")
        for name, values in seconds.items():
            print(f"  {name:17} CPU s: min {min(values):7.3f}  median {statistics.median(values):7.3f}"
                  f"  max {max(values):7.3f}   {'AP' if task == 'coco' else 'AP50'} {found[name]:.9f}")
            if name == "ours": continue
            ratio_of(f"{task}: ours / {name}", seconds, name, figures, missed)
    _, second = problem(args.images, model=1)
    peers = {"ours": our_intervals, "hotcoco": hotcoco_intervals}
    if not is_there(hotcoco_coco, small): del peers["hotcoco"]
    seconds = interval_rounds(peers, whole[0], [whole[1], second], args.rounds)
    print(f"intervals: one resample of two models, {len(whole[0])} images; {args.rounds} rounds")
    for name, values in seconds.items():
        low, middle, high = (1e3 * f(values) for f in (min, statistics.median, max))
        print(f"  {name:17} CPU ms: min {low:7.1f}  median {middle:7.1f}  max {high:7.1f}")
        if name != "ours": ratio_of(f"intervals: ours / {name}", seconds, name, figures, missed)
    alone = {}
    for mode in ("--once", "--once-intervals"):
        command = [sys.executable, __file__, mode, "--images", str(args.images)]
        alone.update(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    for name, value in alone.items():
        if value > ONCE[name]: missed.append(name)
        print(f"a fresh process: {name:24} {value:8.2f}  (limit {ONCE[name]:g}:"
              f" {'MISSED' if name in missed else 'ok'})")
    figures["a fresh process"] = alone
    alarms = figures["false alarms of 20 pairs"] = false_alarms()
    if alarms > MOST_ALARMS: missed.append("false alarms")
    print(f"20 pairs without a difference: {alarms} called different at 5 % (1 to be expected, limit {MOST_ALARMS}:"
          f" {'MISSED' if alarms > MOST_ALARMS else 'ok'})")
    if args.json: Path(args.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__": sys.exit(main())
