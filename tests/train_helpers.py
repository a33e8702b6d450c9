"""Small trainings for the tests: a dozen generated scenes, yolox-nano at 64x64 to 128x128, one thread."""
import csv
import hashlib
import os
import sys
from pathlib import Path

from jetson_det.config import load_config
from jetson_det.synth import write_scenes

QUICK = ["data.input_size=[96,96]", "data.workers=0", "train.threads=1", "train.batch_size=2", "train.accumulate=2", "train.epochs=3",
         "train.no_aug_epochs=1", "train.warmup_epochs=1", "train.eval_every=1", "train.device=cpu", "augment.multiscale=1", "augment.multiscale_every=2",
         "train.save_minutes=0.000001", "train.ema_tau=50"]


def scenes(folder, count=12):
    "A dataset of easy scenes: 3/4 train, 1/4 val."
    return write_scenes(folder, count, size=(96, 96), splits={"train": .75, "val": .25}, hard=0.)


def config(data, *more):
    "Settings of a training of some seconds."
    return load_config(overrides=[f"data.path={data}", *QUICK, *more])


def result_of(out):
    "What two equal trainings have in common: hashes of the weights, the table without times, the figures without times."
    out, found = Path(out), {}
    for folder in ("last", "best"):
        for file in ("weights.safetensors", "ema.safetensors"):
            if (out/folder/file).exists(): found[f"{folder}/{file}"] = hashlib.sha256((out/folder/file).read_bytes()).hexdigest()
    rows = list(csv.DictReader(open(out/"metrics.csv")))
    found["rows"] = [{k: v for k, v in r.items() if k not in ("images_per_second", "seconds")} for r in rows]
    return found


def train_in_child(data, out, more=(), resume=False):
    "Target of a child process: a whole training, its words in a file beside the run."
    from jetson_det.train.loop import train
    words = open(f"{out}.txt", "a", buffering=1)
    os.dup2(words.fileno(), 1)
    os.dup2(words.fileno(), 2)
    try: train(config(data, *more), out, resume=resume)
    except Exception as e:
        print(f"{type(e).__name__}: {e}", flush=True)
        sys.exit(1)
