"""What the suggested images are worth, and how long it takes to choose among 100,000.

    python bench/bench_suggest.py                                      the choice among 100,000 rows, seconds and memory
    python bench/bench_suggest.py --simulate --out DIR --weights FILE  trainings on bccd of $JETSON_DET_DATA, resumable

The simulation knows all labels and hides them. For each seed a detector is trained on 20 images of `train` drawn by
lot. It looks at the rest; 60 of those are suggested, and 60 are drawn by lot. The labels of both are uncovered, and two
detectors are trained on 80 images each, from the same weights, with the same settings, the same number of steps and
the same `val` to choose the epoch by. What they find in `test` is compared: AP by COCO's rules, and the difference with
its interval from the same images resampled (paired). Rules that rank by one part alone are further arms. `all` trains
on the whole of `train`, for the same number of steps.
A training that is done is read again; one that was stopped goes on. `FILE` are the starting weights, as
`model.weights`.
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
from jetson_det.core import rng_for  # noqa: E402

FIRST = 20  # labeled images at the start
NEXT = 60  # that are labeled then
STEPS = {"start": 300}  # of a training
PARTS = {"suggested": None, "uncertainty alone": dict(novelty=0), "novelty alone": dict(uncertainty=0)}  # weights


def settings(data, weights, seed, size, epochs):
    "The settings of a training."
    from jetson_det.config import load_config
    values = [f"data.path={data}", f"data.input_size={size}", "data.workers=0", "data.max_flawed=1",
              f"train.epochs={epochs}", f"train.seed={seed}", "train.threads=1", "train.trackers=[]",
              "train.report=false", "augment.mosaic=0.5", "augment.multiscale=0", "train.batch_size=8",
              f"train.no_aug_epochs={max(epochs // 6, 1)}",
              f"train.eval_every={max(epochs // 5, 1)}", "model.name=yolox-nano"]
    if weights: values.append(f"model.weights={weights}")
    return load_config(overrides=values)


def trained(ds, rows, folder, options, seed, steps):
    "A session of a detector that was trained on some of the images of `train`."
    from jetson_det.data.formats.registry import write_dataset
    from jetson_det.models.session import torch_session
    from jetson_det.train.loop import train
    data = folder.with_name(folder.name + "-data")
    train_rows = np.flatnonzero(ds.splits == "train")[np.sort(rows)]
    part = ds.subset(np.concatenate([train_rows, np.flatnonzero(ds.splits == "val")]))
    if not data.exists(): write_dataset(part, data, "coco", "symlink")
    epochs = max(round(steps * 8 / len(rows)), 1)
    if not (folder / "metrics.json").is_file():
        train(settings(data, options.weights, seed, options.size, epochs), folder,
              resume=(folder / "config.yaml").is_file())
    return torch_session(folder / "best")


def chosen_rows(name, ds, start, session, seed):
    "The images that are labeled next, as rows of `train`."
    pool = np.setdiff1d(np.arange(int((ds.splits == "train").sum())), start)
    if name == "random": return rng_for(46, seed).permutation(pool)[:NEXT]
    from jetson_det.evaluate.suggest import suggest
    train = ds.split("train")
    weights = PARTS[name]
    more = {} if weights is None else dict(weights=weights)
    result = suggest(session, train.subset(pool), labeled=train.subset(start), count=NEXT, **more)
    place = {path: k for k, path in zip(pool, train.subset(pool).paths)}
    return np.array([place[row.path] for row in result.batch()])


def simulate(options):
    "All seeds; a line for each training as it is done."
    from jetson_det.data.formats.registry import read_dataset
    from jetson_det.evaluate.coco import evaluate
    from jetson_det.evaluate.matching import match
    root = os.environ.get("JETSON_DET_DATA")
    if not root: raise SystemExit("JETSON_DET_DATA is not set: the folder that holds datasets/bccd")
    ds = read_dataset(Path(root) / "datasets" / "bccd")
    test = ds.split("test")
    found = {}
    n = int((ds.splits == "train").sum())
    for seed in range(options.seeds):
        folder = options.out / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        start = np.sort(rng_for(45, seed).permutation(n)[:FIRST])
        session = trained(ds, start, folder / "start", options, seed, STEPS["start"])
        for name in ("start", *options.arms):
            if name == "start": of_arm = session
            else:
                rows_file = folder / f"{name.replace(' ', '-')}.json"
                if name == "all": rows = np.setdiff1d(np.arange(n), start)
                elif rows_file.is_file(): rows = np.array(json.loads(rows_file.read_text()))
                else:
                    rows = chosen_rows(name, ds, start, session, seed)
                    rows_file.write_text(json.dumps(rows.tolist()))
                of_arm = trained(ds, np.concatenate([start, rows]), folder / name.replace(" ", "-"), options, seed,
                                 options.steps)
            result = evaluate(of_arm, test, progress=False)
            found[seed, name] = match(test, result.detections)
            by_class = ", ".join(f"{row['name']} {row['AP']:.3f}" for row in result.per_class)
            print(f"seed {seed} {name}: AP {result.stats['AP']:.4f} ({by_class})", flush=True)
    summarize(found, options)


def summarize(found, options):
    "Each arm beside `random`: the mean of the seeds, and the interval of each seed's difference."
    from jetson_det.evaluate.intervals import paired_bootstrap
    for name in options.arms:
        if name in ("random", "all"): continue
        for seed in range(options.seeds):
            print(f"seed {seed}, {name} - random: {paired_bootstrap(found[seed, 'random'], found[seed, name])}")


def large(images=100_000, labeled=5_000, count=200):
    "Rank images of which all is known already: the choice alone, without the detector's time."
    import resource
    from types import SimpleNamespace
    from jetson_det.data.images.facts import ImageInfo
    from jetson_det.evaluate.suggest import _Look, _ranked
    from jetson_det.runtime.geometry import as_detections
    rng = rng_for(47)
    place = rng.normal(size=(300, 448)).astype(np.float32)
    nothing = as_detections()

    def look(n):
        names = [f"{k:06}.jpg" for k in range(n)]
        seen = _Look(Path("."), names, [nothing] * n, rng.gamma(2, 2, n).tolist(), [None] * n)
        seen.has_maps = True
        hashes = rng.integers(1, 2**63, n)
        for k in range(n):
            seen.columns.append(place[rng.integers(300)] + rng.normal(0, .3, 448).astype(np.float32))
            seen.infos.append(ImageInfo(hash=int(hashes[k]), thumb=rng.integers(0, 255, (16, 16), np.uint8)))
        return seen
    seen = look(images)
    before = look(labeled)
    session = SimpleNamespace(contract=SimpleNamespace(classes=("a",)), confidence=.25, infer=None)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    result = _ranked(session, seen, before, dict(uncertainty=1., novelty=1.), count, [])
    seconds = time.process_time() - start
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    print(f"{len(result)} images beside {labeled} labeled ones, {count} chosen: {seconds:.1f} s of CPU,"
          f" {more:.0f} MiB more than what was seen ({memory / 1024:.0f} MiB)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("suggest-simulation"))
    parser.add_argument("--weights", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", default="160x224")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--arms", nargs="*", default=["random", "suggested"])
    options = parser.parse_args()
    if options.simulate: simulate(options)
    else: large()
