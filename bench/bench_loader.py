"""Finished training samples a second: our loader against those of Ultralytics, YOLOX and LibreYOLO (where they are
installed) on the same images.

    python bench/bench_loader.py [--data DIR] [--sizes 640,416] [--workers 0,2] [--rounds 7] [--json FILE]

All make mosaic, affine, HSV and flip, without mixup and without changing sizes, in batches of 8, with OpenCV's own
threads off and torch's as it chooses. `ours` keeps the decoded images of one group (64) in memory, so that each image
is decoded about once an epoch; `ours, ram` has all of them in shared memory (cache="ram"), and is compared with
Ultralytics' cache="ram". `yolox` is MosaicDetection + TrainTransform in its own DataLoader, as its nano and tiny
experiments set it up; `libreyolo` is MosaicMixupDataset in its own. Filling a cache is not timed.

Rounds are interleaved (A B C A B C ...), each begins with another peer, and a ratio is that of two neighbors of one
round: minimum, median, maximum. Exit code 1 if a median misses its limit.
"""
import argparse
import contextlib
import gc
import io
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from itertools import chain, count, islice
from pathlib import Path

import cv2
import torch

from jetson_det.config import AugmentConfig
from jetson_det.data.formats.registry import read_dataset
from jetson_det.data.loader import TrainLoader
from jetson_det.data.quality.check import prepare
from jetson_det.scenes.docks import write_scenes

# times as fast
LIMITS = {("ours", "ultralytics"): 1.8, ("ours, ram", "ultralytics, ram"): 1.8, ("ours", "yolox"): 4.,
          ("ours", "libreyolo"): 4.}
BATCH = 8  # samples in a batch
WARM = 10  # batches for each process that are not timed


def copy_for_peers(ds, folder):
    "The dataset as COCO JSON and as YOLO txt with links to the images."
    for part in ("images/train", "labels/train", "annotations"): (folder / part).mkdir(parents=True)
    coco = ds.to_coco()
    for i, record in enumerate(coco["images"]):
        boxes, labels, _ = ds.boxes_of(i)
        h, w = ds.sizes[i].tolist()
        record["file_name"] = f"{i:06}{ds.path_of(i).suffix.lower()}"
        os.symlink(ds.path_of(i).resolve(), folder / "images/train" / record["file_name"])
        rows = []
        for c, (x1, y1, x2, y2) in zip(labels, boxes.tolist()):
            rows.append(f"{c} {(x1 + x2) / 2 / w:.6f} {(y1 + y2) / 2 / h:.6f} {(x2 - x1) / w:.6f} {(y2 - y1) / h:.6f}")
        (folder / "labels/train" / f"{i:06}.txt").write_text("\n".join(rows))
    (folder / "annotations/train.json").write_text(json.dumps(coco))
    names = "\n".join(f"  {i}: {json.dumps(c)}" for i, c in enumerate(ds.classes))
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images/train\nval: images/train\nnames:\n{names}\n")


def ours(ds, size, cache, cache_mb=256):
    "Our loader: a function of the number of workers that gives batches and a way to end them."
    def start(workers):
        loader = TrainLoader(ds, (size, size), AugmentConfig(multiscale=0), BATCH, workers=workers, cache_mb=cache_mb,
                             cache=cache, say=lambda line: None)
        return chain.from_iterable(loader.epoch(e) for e in count()), loader.close
    # a whole epoch: images are decoded when a group begins, which is not at every batch
    start.batches = -(-len(ds) // BATCH)
    return start


def allow_import_of_torchvision():
    """The peers import torchvision, which asks for operators that are not there where it does not match torch:
    declare them."""
    try: import torchvision.ops
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]: del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        allow_import_of_torchvision.library = library  # the declarations live as long as this object
        import torchvision.ops # noqa: F401


def quiet():
    "Keep a peer's progress bars off the screen."
    stack = contextlib.ExitStack()
    nowhere = io.StringIO()
    stack.enter_context(contextlib.redirect_stdout(nowhere))
    stack.enter_context(contextlib.redirect_stderr(nowhere))
    return stack


def torch_loader(make):
    "A peer whose loader is made by `make(workers)`: batches without end, and a way to end its workers."
    def start(workers):
        loader = make(workers)
        def stop():
            for name in ("iterator", "_iterator"):
                getattr(getattr(loader, name, None), "_shutdown_workers", lambda: None)()
        return chain.from_iterable(loader for _ in count()), stop
    return start


def yolox(folder, size):
    "YOLOX's loader, as its experiments build it."
    import yolox.data as data
    with quiet():
        base = data.COCODataset(str(folder), "train.json", "images/train", (size, size),
                                data.TrainTransform(max_labels=50))
    made = data.MosaicDetection(base, (size, size), mosaic=True, preproc=data.TrainTransform(max_labels=120),
                                enable_mixup=False, mosaic_scale=(.5, 1.5))
    def make(workers):
        sampler = data.YoloBatchSampler(sampler=data.InfiniteSampler(len(made), seed=0), batch_size=BATCH,
                                        drop_last=False, mosaic=True)
        return data.DataLoader(made, num_workers=workers, batch_sampler=sampler)
    return {"yolox": torch_loader(make)}


def libreyolo(folder, size):
    "LibreYOLO's loader of its YOLOX family."
    from libreyolo.data.augment.yolox import MosaicMixupDataset, TrainTransform
    from libreyolo.data.dataset import YOLODataset, create_dataloader
    with quiet():
        base = YOLODataset(str(folder), "train", (size, size), TrainTransform(max_labels=50))
    made = MosaicMixupDataset(base, (size, size), preproc=TrainTransform(max_labels=50), enable_mixup=False)
    return {"libreyolo": torch_loader(lambda workers: create_dataloader(made, BATCH, workers, pin_memory=False))}


def ultralytics(folder, size):
    "Ultralytics' loader with its own settings, without and with its cache in memory."
    from ultralytics.cfg import get_cfg
    from ultralytics.data.build import build_dataloader, build_yolo_dataset
    from ultralytics.data.utils import check_det_dataset
    logging.disable(logging.INFO)
    peers = {}
    for name, cache in ("ultralytics", False), ("ultralytics, ram", "ram"):
        config = get_cfg(overrides={"imgsz": size, "cache": cache, "task": "detect", "mode": "train"})
        with quiet():
            made = build_yolo_dataset(config, str(folder/"images/train"), BATCH,
                                      check_det_dataset(str(folder/"data.yaml")), mode="train")
        peers[name] = torch_loader(lambda workers, made=made: build_dataloader(made, BATCH, workers, shuffle=True))
    return peers


def rate(start, workers, batches):
    "Samples a second over some batches, after so many that memory is there and a group of ours is decoded."
    it, stop = start(workers)
    for _ in islice(it, WARM * max(workers, 1)): pass
    t = time.perf_counter()
    for _ in islice(it, batches): pass
    seconds = time.perf_counter() - t
    stop()
    del it
    gc.collect()
    return batches * BATCH / seconds


def compare(peers, workers, rounds, batches):
    "Interleaved rounds: a list of rates for each peer."
    rates = {name: [] for name in peers}
    names = list(peers)
    for r in range(rounds):
        for name in names[r % len(names):] + names[:r % len(names)]:
            rates[name].append(rate(peers[name], workers, getattr(peers[name], "batches", batches)))
    return rates


def report(title, rates):
    "Print the rates, and how many times as fast ours is; those ratios."
    print(f"\n{title}\n{'':18}{'min':>8}{'median':>8}{'max':>8} samples/s    ours / this: min, median, max")
    ratios = {}
    for name, r in rates.items():
        our = "ours, ram" if name.endswith("ram") else "ours"
        q = sorted(a / b for a, b in zip(rates[our], r))
        ratios[our, name] = {"min": q[0], "median": statistics.median(q), "max": q[-1]}
        speeds = f"{min(r):8.0f}{statistics.median(r):8.0f}{max(r):8.0f}"
        quotients = f"{q[0]:6.2f}{statistics.median(q):6.2f}{q[-1]:6.2f}"
        print(f"{name:18}{speeds}{'':14}{quotients}", flush=True)
    return ratios


def build(ds, folder, size):
    "The peers that can be had."
    h, w = ds.sizes.max(0).tolist()
    scale = min(1, 2 * size / max(h, w))  # decoded images are less than twice as large as the input
    group = 64 * 1.3 * h * w * scale ** 2 * 4 / 2**20
    peers = {"ours": ours(ds, size, "none", group), "ours, ram": ours(ds, size, "ram")}
    for make in (ultralytics, yolox, libreyolo):
        try:
            allow_import_of_torchvision()
            peers |= make(folder, size)
        except ImportError as e: print(f"{make.__name__} is not measured: {e}")
    return peers


def main():
    data = os.environ.get("JETSON_DET_DATA")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=data and data + "/datasets/bccd",
                        help="labeled images; without it and without JETSON_DET_DATA: generated scenes")
    parser.add_argument("--sizes", default="640,416", help="input sizes, separated by commas")
    parser.add_argument("--workers", default="0,2", help="numbers of worker processes")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    parser.add_argument("--batches", type=int, default=8,
                        help="timed batches in a round (with workers: three times as many; ours: an epoch)")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    figures = {}
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = Path(args.data) if args.data else write_scenes(folder / "scenes", 96, (480, 640), splits={"train": 1.})
        ds, _ = prepare(read_dataset(source), check_images=False)
        copy_for_peers(ds, folder / "copy")
        print(f"{len(ds)} images of {source.name}, {len(ds.boxes)} boxes, batches of {BATCH}")
        for size in map(int, args.sizes.split(",")):
            peers = build(ds, folder / "copy", size)
            cv2.setNumThreads(0)
            for workers in map(int, args.workers.split(",")):
                rates = compare(peers, workers, args.rounds, args.batches * (3 if workers else 1))
                ratios = report(f"{size}x{size}, " + (f"{workers} workers" if workers else "one process"), rates)
                named = {f"{a} / {b}": ratio for (a, b), ratio in ratios.items()}
                figures[f"{size}/{workers}"] = {"samples/s": rates, "ours / peer": named}
                for (a, b), limit in LIMITS.items():
                    if (a, b) not in ratios or ratios[a, b]["median"] >= limit: continue
                    median = ratios[a, b]["median"]
                    missed.append(f"{a} / {b} at {size}, {workers} workers: {median:.2f} < {limit}")
    if args.json: Path(args.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if missed:
        print(f"\nMISSED: {'; '.join(missed)}")
        return 1
    limits = ", ".join(f"{limit:g}x {peer}" for (_, peer), limit in LIMITS.items())
    print(f"\nlimits held: at least {limits}")
    return 0


if __name__ == "__main__": sys.exit(main())
