"""Training images a second, loader included: ours against LibreYOLO and the yolox package (YOLOX-nano) and against
Ultralytics' own trainer (YOLO11n).

    # the long form: three rounds of an epoch each; about half an hour for bccd on 2 cores
    python bench/bench_train_epoch.py
    # the short form
    python bench/bench_train_epoch.py --batches 6 --rounds 3
    # against Ultralytics alone, drawing on the device
    python bench/bench_train_epoch.py --device cuda --precision fp16 --batch 32 --size 640 --workers 8

Each trains the way it trains by itself, in batches of 8, fp32, at one size, with mosaic, affine, HSV and flip, two
loader workers and two torch threads, SGD with Nesterov momentum, from fresh weights. Every peer is a process of its
own, so that memory and allocator are its own. Ours is the real thing: `TrainLoader` and `Stepper`, with the averaged
weights and the check for numbers that are not finite. LibreYOLO and yolox get their own loader, network and loss, and
a loop with nothing in it but the step: what is measured of them is no more than they do. Ultralytics is its
`DetectionTrainer`, with an optimizer step after each batch as in ours (nbs = batch), without evaluation, plots and
files; on a CPU it takes no workers and all cores but one by itself, and is given both cores here.

Rounds are interleaved (A B C A B C ...) after a beginning that does not count; a ratio is that of two neighbors of
one round: minimum, median, maximum. `cpu` is the processor time of a peer and its workers for an image: on a machine
that does other things too it says more than the clock. `peak` is the most memory its training process has held,
`workers` what its workers hold of their own. Exit code 1 if a median by the clock misses its limit, or a peak is
higher than the peer's. With --device cuda ours has data.augment_on=device (the workers plan, the GPU draws); that way
is written and has not been run on a GPU yet.
"""
import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from itertools import chain, count, islice
from pathlib import Path

import cv2
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "tests")]
import bench_loader as loaders  # noqa: E402
import oracles  # noqa: E402

from jetson_det.config import AugmentConfig, TrainConfig  # noqa: E402
from jetson_det.data.quality.check import prepare  # noqa: E402
from jetson_det.data.formats.registry import read_dataset  # noqa: E402
from jetson_det.data.loader import TrainLoader  # noqa: E402
from jetson_det.models.zoo import create_model  # noqa: E402
from jetson_det.scenes.docks import write_scenes  # noqa: E402
from jetson_det.train import allocator  # noqa: E402
from jetson_det.train.step import Stepper  # noqa: E402

# ours must train so many times the images a second
PAIRS = {"yolox-nano": {"libreyolo": 1.2, "yolox": 2.}, "yolo11n": {"ultralytics": 1.1}}
ON_CUDA = {"yolo11n": {"ultralytics": 3.}}
WARM = 4  # batches that do not count: the first three settle the memory of ours
warnings.filterwarnings("ignore")


# ---- the peers: each is a function of (ds, folder, args) that gives `train(batches)`, which trains on so many batches
def on_batches(batches, step):
    "Train on the next batches of an endless iterator."
    def train(n):
        for batch in islice(batches, n): step(batch)
    return train


def ours(ds, folder, args):
    "Our loader and our step."
    settings = TrainConfig()
    settings.precision = args.precision
    if args.device == "cpu": allocator.keep_memory()  # as a training does
    model = create_model(args.model, ds.classes).to(args.device, memory_format=torch.channels_last).train()
    stepper = Stepper(model, settings, args.batch)
    drawn = "device" if args.device == "cuda" else "cpu"
    loader = TrainLoader(ds, (args.size, args.size),
                         AugmentConfig(multiscale=0),
                         args.batch,
                         workers=args.workers,
                         augment_on=drawn)
    return on_batches(chain.from_iterable(loader.epoch(e) for e in count()), lambda batch: stepper.step([batch], 1e-4))


def peer(loader, model, loss_of, args):
    "A plain step of a peer on its own loader."
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=.9, nesterov=True)

    def step(batch):
        optimizer.zero_grad(set_to_none=True)
        loss_of(batch).backward()
        optimizer.step()
    return on_batches(loader(args.workers)[0], step)


def yolox(ds, folder, args):
    model = oracles.yolox_model(args.model, len(ds.classes)).train()
    return peer(
        loaders.yolox(folder, args.size)["yolox"], model, lambda b: model(b[0].float(), b[1].float())["total_loss"],
        args)


def libreyolo(ds, folder, args):
    from libreyolo.models.yolox.nn import LibreYOLOXModel
    model = LibreYOLOXModel(args.model.split("-")[1][0], len(ds.classes)).train()
    model.init_weights()
    return peer(
        loaders.libreyolo(folder, args.size)["libreyolo"], model,
        lambda b: model(b[0].float(), b[1].float())["total_loss"], args)


class Ultralytics:
    "Ultralytics' own trainer in a thread, which waits in its callback after each batch until it may go on."
    def __init__(self, ds, folder, args):
        os.environ |= {
            "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false", "YOLO_CONFIG_DIR": str(folder)
        }
        from threading import Condition
        from ultralytics.engine import trainer
        from ultralytics.models.yolo.detect import DetectionTrainer
        trainer.check_amp = lambda model: True  # it would download a model
        self.threads = args.threads
        self.device = args.device
        self.allowed = 0
        self.done = 0
        self.error = None
        self.changed = Condition()
        self.trainer = DetectionTrainer(
            overrides=dict(model=args.model + ".yaml",
                           data=str(folder/"data.yaml"),
                           imgsz=args.size,
                           batch=args.batch,
                           nbs=args.batch,
                           epochs=100_000,
                           workers=args.workers,
                           device="0" if args.device == "cuda" else "cpu",
                           amp={"fp32": False, "fp16": True, "bf16": "bf16"}[args.precision],
                           optimizer="SGD",
                           lr0=1e-4,
                           momentum=.9,
                           warmup_epochs=0,
                           close_mosaic=0,
                           val=False,
                           plots=False,
                           save=False,
                           pretrained=False,
                           patience=0,
                           project=str(folder),
                           name="run",
                           exist_ok=True,
                           verbose=False,
                           deterministic=False))
        self.trainer.add_callback("on_train_start", lambda t: torch.set_num_threads(self.threads))
        self.trainer.add_callback("on_train_batch_start", self.wait)
        self.trainer.add_callback("on_train_batch_end", self.count)

    def wait(self, _):
        with self.changed: self.changed.wait_for(lambda: self.done < self.allowed)

    def count(self, _):
        if self.device == "cuda": torch.cuda.synchronize()
        with self.changed:
            self.done += 1
            self.changed.notify_all()

    def run(self):
        try: self.trainer.train()
        except BaseException as e: self.error = e
        with self.changed: self.changed.notify_all()

    def __call__(self, batches):
        from threading import Thread
        with self.changed:
            if not self.allowed: Thread(target=self.run, daemon=True).start()
            self.allowed += batches
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.error or self.done == self.allowed)
        if self.error: raise self.error


def ultralytics(ds, folder, args): return Ultralytics(ds, folder, args)


MAKERS = dict(ours=ours, libreyolo=libreyolo, yolox=yolox, ultralytics=ultralytics)


# ---- measuring
def tree():
    "This process and its children, as numbers."
    parents = {}
    for p in Path("/proc").iterdir():
        try:
            if p.name.isdigit(): parents[int(p.name)] = int((p / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError: pass  # it has ended
    found = {os.getpid()}
    while more := {c for c, p in parents.items() if p in found} - found: found |= more
    return found


def processor_seconds():
    "User and system time of this process and of its children that run."
    fields = [Path(f"/proc/{p}/stat").read_text().rsplit(")", 1)[1].split() for p in tree()]
    return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")


def kilobytes(path, key): return next((int(line.split()[1]) for line in open(path) if line.startswith(key + ":")), 0)


def measured(train, batches, args):
    "A round: images a second, processor seconds an image, MB."
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    wait()
    cpu = processor_seconds()
    began = time.perf_counter()
    train(batches)
    wait()
    seconds = time.perf_counter() - began
    cpu = processor_seconds() - cpu
    images = batches * args.batch
    workers = sum(kilobytes(f"/proc/{p}/smaps_rollup", "Pss") for p in tree() - {os.getpid()})
    return dict(rate=images / seconds,
                cpu=cpu / images,
                peak=kilobytes("/proc/self/status", "VmHWM") / 1024,
                workers=workers / 1024,
                gpu=torch.cuda.max_memory_reserved() / 2**20 if args.device == "cuda" else 0)


def serve(connection, name, ds, folder, args):
    "A peer's process: it is told a number of batches, trains on them, and answers with what that took."
    try:
        multiprocessing.set_start_method("fork", force=True)  # for the loaders' workers, as where nothing was spawned
        torch.set_num_threads(args.threads)
        cv2.setNumThreads(0)
        loaders.BATCH = args.batch
        if name != "ours": loaders.allow_import_of_torchvision()
        with loaders.quiet():
            train = MAKERS[name](ds, folder, args)
            train(WARM)
        connection.send("ready")
        while batches := connection.recv():
            with loaders.quiet(): found = measured(train, batches, args)
            connection.send(found)
    except ImportError as e: connection.send(f"it cannot be imported: {e}")
    except Exception: connection.send(traceback.format_exc())
    os._exit(0)  # its loader's workers end with it


def begin(name, ds, folder, args):
    "Start a peer: the connection to it, or None where it can't be had."
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=serve, args=(there, name, ds, folder, args)).start()
    there.close()
    word = here.recv()
    if word == "ready": return here
    print(f"{name} is not measured: {word}", flush=True)


def compare(names, ds, folder, args, batches):
    "Interleaved rounds: name -> list of what was measured."
    peers = {name: c for name in names if (c := begin(name, ds, folder, args))}
    found = {name: [] for name in peers}
    time.sleep(5)  # the workers of all have made what they make ahead by then
    for _ in range(args.rounds):
        for name, connection in peers.items():
            connection.send(batches)
            answer = connection.recv()
            if isinstance(answer, str): raise SystemExit(f"{name}: {answer}")
            found[name].append(answer)
    for connection in peers.values(): connection.send(0)
    return found


HEAD = (f"{'':14}{'images/s':>24}{'cpu ms/image':>14}{'peak MB':>9}{'workers':>9}{'GPU MB':>8}"
        "    ours / this: min, median, max (by cpu)")


def report(title, found, limits):
    "Print the table; what missed its limit."
    print(f"\n{title}\n{HEAD}")
    missed = []
    for name, rounds in found.items():
        middle = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        rates = [r["rate"] for r in rounds]
        ratios = sorted(a["rate"] / b["rate"] for a, b in zip(found["ours"], rounds))
        ratio = statistics.median(ratios)
        by_cpu = statistics.median(b["cpu"] / a["cpu"] for a, b in zip(found["ours"], rounds))
        print(f"{name:14}{min(rates):8.2f}{middle['rate']:8.2f}{max(rates):8.2f}{middle['cpu'] * 1e3:14.1f}"
              f"{middle['peak']:9.0f}{middle['workers']:9.0f}{middle['gpu']:8.0f}    "
              f"{ratios[0]:6.2f}{ratio:6.2f}{ratios[-1]:6.2f}   ({by_cpu:.2f})", flush=True)
        memory = "gpu" if rounds[0]["gpu"] else "peak"
        peak = max(r[memory] for r in rounds)
        ours = max(r[memory] for r in found["ours"])
        if ratio < limits.get(name, 0): missed.append(f"{title}: {ratio:.2f} x {name} < {limits[name]:g}")
        if ours > peak: missed.append(f"{title}: {ours:.0f} MB, {name} {peak:.0f} MB")
    return missed


def arguments():
    data = os.environ.get("JETSON_DET_DATA")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=data and data + "/datasets/bccd",
                        help="labeled images; without it and without JETSON_DET_DATA: generated scenes")
    parser.add_argument("--models", default="",
                        help=f"of {', '.join(PAIRS)}, separated by commas; empty: all that have a limit on the device")
    parser.add_argument("--peers", default="", help="peers to measure, separated by commas; empty: all")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"],
                        help="fp16 and bf16: on a GPU, against Ultralytics")
    parser.add_argument("--size", type=int, default=640, help="side of the input, pixels")
    parser.add_argument("--batch", type=int, default=8, help="images in a batch")
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--batches", type=int, default=0, help="timed batches in a round; 0: one epoch")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available(): parser.error("there is no CUDA device here")
    if args.device == "cpu" and args.precision != "fp32": parser.error("on the CPU all are compared in fp32")
    return args


def main():
    args = arguments()
    figures = {}
    missed = []
    limits = ON_CUDA if args.device == "cuda" else PAIRS
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        folder = Path(folder)
        source = Path(args.data) if args.data else write_scenes(folder / "scenes", 96, (480, 640), splits={"train": 1.})
        ds, _ = prepare(read_dataset(source), check_images=False)
        if "train" in ds.split_names: ds = ds.split("train")
        loaders.copy_for_peers(ds, folder / "copy")
        batches = args.batches or -(-len(ds) // args.batch)
        print(f"{len(ds)} images of {source.name}, {len(ds.boxes)} boxes, {batches} batches of {args.batch} at"
              f" {args.size}x{args.size} on {args.device}, {args.precision}")
        for args.model in filter(None, args.models.split(",")) if args.models else limits:
            names = [n for n in limits[args.model] if not args.peers or n in args.peers.split(",")]
            found = compare(["ours", *names], ds, folder / "copy", args, batches)
            figures[args.model] = found
            missed += report(f"{args.model}, images a second in training", found, limits[args.model])
    if args.json: Path(args.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if missed:
        print("\nMISSED: " + "; ".join(missed))
        return 1
    held = [f"{m} {v:g}x {k}" for m in figures for k, v in limits[m].items() if k in figures[m]]
    print("\nlimits held: " + ", ".join(held))
    return 0


if __name__ == "__main__": sys.exit(main())
