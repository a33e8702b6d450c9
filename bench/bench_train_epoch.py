"""Training images a second on the CPU, loader included: ours against LibreYOLO and the yolox package (YOLOX-nano), on the same images.

    python bench/bench_train_epoch.py [--data DIR] [--size 640] [--rounds N] [--json FILE]

Each trains the way it trains by itself, in batches of 8, fp32, at one size, with mosaic, affine, HSV and flip, two loader workers and two torch threads,
SGD with Nesterov momentum. Ours is the real thing: `TrainLoader` and `Stepper`, with the averaged weights and the check for numbers that are not finite. The
peers get their own loader, network and loss, and a loop with nothing in it but the step, without averaged weights: what is measured of them is no more than they do.
All start from fresh weights. Rounds are interleaved (A B C A B C ...), each as many batches as the training images make, after two that do not count; a ratio is that of two neighbours
of one round: minimum, median, maximum. Exit code 1 if a median misses its limit.
"""
import argparse
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from itertools import chain, count, islice
from pathlib import Path

import cv2
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "tests")]
import bench_loader as loaders  # noqa: E402
import oracles  # noqa: E402

from jetson_det.config import AugmentConfig, TrainConfig  # noqa: E402
from jetson_det.data.check import prepare  # noqa: E402
from jetson_det.data.formats import read_dataset  # noqa: E402
from jetson_det.data.loader import TrainLoader  # noqa: E402
from jetson_det.models.zoo import create_model  # noqa: E402
from jetson_det.synth import write_scenes  # noqa: E402
from jetson_det.train.loop import Stepper  # noqa: E402

LIMITS = {"libreyolo": 1.2, "yolox": 2.}  # ours must train so many times the images a second
BATCH, WORKERS = loaders.BATCH, 2
warnings.filterwarnings("ignore")


def ours(ds, size):
    "Our loader and our step."
    model = create_model("yolox-nano", ds.classes).to(memory_format=torch.channels_last).train()
    stepper = Stepper(model, TrainConfig(), BATCH)

    def start():
        loader = TrainLoader(ds, (size, size), AugmentConfig(multiscale=0), BATCH, workers=WORKERS)
        return chain.from_iterable(loader.epoch(e) for e in count()), loader.close
    return start, lambda batch: stepper.step([batch], 1e-4)


def stepper_of(model, loss_of):
    "A plain step of a peer."
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=.9, nesterov=True)

    def step(batch):
        optimizer.zero_grad(set_to_none=True)
        loss_of(batch).backward()
        optimizer.step()
    return step


def yolox(ds, folder, size):
    model = oracles.yolox_model("yolox-nano", len(ds.classes)).train()
    start = loaders.yolox(folder, size)["yolox"]
    return lambda: start(WORKERS), stepper_of(model, lambda b: model(b[0].float(), b[1].float())["total_loss"])


def libreyolo(ds, folder, size):
    from libreyolo.models.yolox.nn import LibreYOLOXModel
    model = LibreYOLOXModel("n", len(ds.classes)).train()
    model.init_weights()
    start = loaders.libreyolo(folder, size)["libreyolo"]
    return lambda: start(WORKERS), stepper_of(model, lambda b: model(b[0].float(), b[1].float())["total_loss"])


def rate(start, step, batches):
    "Images a second over some batches, after two to get going."
    it, stop = start()
    for batch in islice(it, 2): step(batch)
    began = time.perf_counter()
    for batch in islice(it, batches): step(batch)
    seconds = time.perf_counter() - began
    stop()
    return batches * BATCH / seconds


def build(ds, folder, size):
    "Whoever can be had: name -> (start of a loader, step)."
    peers = {"ours": ours(ds, size)}
    loaders.allow_import_of_torchvision()
    for make in (libreyolo, yolox):
        try: peers[make.__name__] = make(ds, folder, size)
        except ImportError as e: print(f"{make.__name__} is not measured: {e}")
    return peers


def main():
    data = os.environ.get("JETSON_DET_DATA")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=data and data + "/datasets/bccd", help="labelled images; without it and without JETSON_DET_DATA: generated scenes")
    parser.add_argument("--size", type=int, default=640, help="side of the input, pixels")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--batches", type=int, default=0, help="timed batches in a round; 0: one epoch")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(2)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = Path(args.data) if args.data else write_scenes(folder / "scenes", 96, (480, 640), splits={"train": 1.})
        ds, _ = prepare(read_dataset(source), check_images=False)
        if "train" in ds.split_names: ds = ds.split("train")
        loaders.copy_for_peers(ds, folder / "copy")
        peers, batches = build(ds, folder / "copy", args.size), args.batches or -(-len(ds) // BATCH)
        print(f"{len(ds)} images of {source.name}, {len(ds.boxes)} boxes, {batches} batches of {BATCH} at {args.size}x{args.size}")
        rates = {name: [] for name in peers}
        for _ in range(args.rounds):
            for name, (start, step) in peers.items(): rates[name].append(rate(start, step, batches))
    ratios = {name: r for (_, name), r in loaders.report("YOLOX-nano, images a second in training", rates).items()}
    print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB (all peers together)")
    if args.json: Path(args.json).write_text(json.dumps({"images/s": rates, "ours / peer": ratios}, indent=1), encoding="utf-8")
    missed = [f"{name}: {ratios[name]['median']:.2f} < {limit}" for name, limit in LIMITS.items() if name in ratios and ratios[name]["median"] < limit]
    print("\n" + ("MISSED: " + "; ".join(missed) if missed else "limits held: at least " + ", ".join(f"{v:g}x {k}" for k, v in LIMITS.items() if k in ratios)))
    return 1 if missed else 0


if __name__ == "__main__": sys.exit(main())
