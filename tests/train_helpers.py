"""Small trainings for the tests: a dozen generated scenes, a small network of each family at 64x64 to 128x128, one
thread."""
import csv
import hashlib
import importlib.util
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from jetson_det.config import load_config
from jetson_det.models.zoo import MODELS
from jetson_det.scenes.docks import write_scenes
from jetson_det.train.callbacks.base import Callback

QUICK = [
    "data.input_size=[96,96]", "data.workers=0", "train.threads=1", "train.batch_size=2", "train.accumulate=2",
    "train.epochs=3", "train.no_aug_epochs=1", "train.warmup_epochs=1", "train.eval_every=1", "train.device=cpu",
    "augment.multiscale=1", "augment.multiscale_every=2", "train.save_minutes=60", "train.ema_tau=50",
    "model.weights=none", "train.recipe=none",
    "train.report=false"
]
EACH_STEP = ["train.save_minutes=0.000001"] # a checkpoint after each step, not only after each epoch

# a network of each family -> what its trainings set
DETR = ["train.optimizer=adamw", "train.lr=0.0001", "train.clip=0.1", "train.warmup_shape=linear"]
FAMILIES = {
    "yolox-nano": [], "yolov8n": [], "yolo11n-p2-lite": [], "yolo26n": [], "rtdetr-r18": DETR, "rtdetrv2-r18": DETR,
    "dfine-n": DETR
}
TWINS = ("yolov8n", "rtdetrv2-r18") # built by the code of yolo11n-p2-lite and rtdetr-r18
# folder of a family -> what must be installed for it
NEEDED = {"ultralytics": "ultralytics", "detr": "transformers"}
# a network of the zoo that needs a package -> which
FOLDERS = {name: row.module.split(".")[2] for name, row in MODELS.items()}
PACKAGES = {name: NEEDED[folder] for name, folder in FOLDERS.items() if folder in NEEDED}


# what processes of the tests begin with; `families` brings in the packages of networks
PRELOAD = [
    "jetson_det.cli", "jetson_det.train.loop", "jetson_det.models.yolox.loss", "jetson_det.evaluate.coco",
    "jetson_det.evaluate.page", "jetson_det.models.session", "faster_coco_eval", "matplotlib.figure", "onnxruntime",
    "onnxslim", "torch._dynamo", "torch.utils.tensorboard", "train_helpers", "process_helpers", "families"
]


@lru_cache(1)
def forkserver():
    """The context of processes that begin with the modules imported. The first call starts the process that imports
    them, and waits for it. It must find the modules of the tests: Python 3.11 gives it their path by the environment
    alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PYTHONPATH", os.fspath(Path(__file__).parent), prepend=os.pathsep)
        multiprocessing.forkserver.ensure_running()
    first = context.Process(target=int)
    first.start()
    first.join()
    return context


def installed(name): return name not in PACKAGES or importlib.util.find_spec(PACKAGES[name]) is not None


def each_family(names=FAMILIES, **marks):
    """Parametrisation by family; those whose package is not installed are skipped. `marks`: a mark for every name,
    as slow=True."""
    common = [getattr(pytest.mark, m) for m in marks]
    return [
        pytest.param(n,
                     marks=[
                         *common,
                         pytest.mark.skipif(not installed(n), reason=f"the package {PACKAGES.get(n)} is not installed")
                     ]) for n in names
    ]


def small_detrs(put=dict.__setitem__):
    """DETRs of the same parts, narrower and with fewer layers and queries: 0.1 to 0.4 instead of 4 to 20 million
    parameters. `put` as monkeypatch.setitem."""
    from jetson_det.models.detr import sizes as detr
    narrow = dict(d_model=32,
                  encoder_hidden_dim=32,
                  encoder_ffn_dim=64,
                  decoder_ffn_dim=64,
                  num_queries=30,
                  decoder_layers=2,
                  encoder_attention_heads=4,
                  decoder_attention_heads=4)
    resnet = dict(detr._resnet([16, 32, 64, 128], [1, 1, 1, 1], "basic"), embedding_size=16)
    hgnet = dict(detr._hgnet([8, 8], [8, 8, 8, 16], [8, 16, 32, 64], [1, 1, 1, 1], 1, True), out_indices=[3, 4])
    for name, body, taken, given in (("rtdetr-r18", resnet, [32, 64, 128], [32]*3), ("rtdetrv2-r18", resnet, [
            32, 64, 128
    ], [32]*3), ("dfine-n", hgnet, [32, 64], [32]*2)):
        size = detr.SIZES[name]
        put(
            detr.SIZES, name,
            size._replace(
                settings={**size.settings, **narrow, "encoder_in_channels": taken, "decoder_in_channels": given},
                backbone=body))


def scenes(folder, count=12, size=(96, 96)):
    "A dataset of easy scenes: 3/4 train, 1/4 val."
    return write_scenes(folder, count, size=size, splits={"train": .75, "val": .25}, hard=0.)


def config(data, *more):
    "Settings of a training of some seconds."
    return load_config(overrides=[f"data.path={data}", *QUICK, *more])


def family_words(name, *more): return [f"model.name={name}", *FAMILIES[name], *more]


def result_of(out):
    """What two equal trainings have in common: hashes of the weights, the table without times, the figures without
    times."""
    out = Path(out)
    found = {}
    for folder in ("last", "best"):
        for file in ("weights.safetensors", "ema.safetensors"):
            if (out/folder/file).exists():
                found[f"{folder}/{file}"] = hashlib.sha256((out/folder/file).read_bytes()).hexdigest()
    rows = list(csv.DictReader(open(out/"metrics.csv")))
    found["rows"] = [{k: v for k, v in r.items() if k not in ("images_per_second", "seconds")} for r in rows]
    return found


def killed_when(process, moment, limit=60):
    "Wait for the moment, then SIGKILL. True when the process was still there; one that had ended must have ended well."
    end = time.monotonic() + limit
    while process.is_alive() and not moment() and time.monotonic() < end: time.sleep(.002)
    alive = process.is_alive()
    process.kill()
    process.join()
    assert alive or process.exitcode in (0, -9), "the training failed by itself"
    return alive


def in_a_save(out): return lambda: any(out.glob("checkpoints/.step-*.part"))


def state_of(trainer):
    "Weights, averages and statistics as numpy arrays."
    s = trainer.stepper
    return {
        k: {n: v.detach().cpu().numpy().astype(np.float64)
            for n, v in m.state_dict().items()}
        for k, m in (("weights", s.model), ("ema", s.ema.module))
    }


def is_statistic(name): return "running" in name or "num_batches" in name


def distance(one, two, start, learned=True):
    "How far apart two trainings end, as a share of how far they went: weights, or BatchNorm's statistics."
    flat = lambda s: np.concatenate(
        [np.ravel(v) for m in s.values() for k, v in sorted(m.items()) if is_statistic(k) != learned])
    return np.linalg.norm(flat(one) - flat(two)) / np.linalg.norm(flat(one) - flat(start))


def numbers(normalizer): # of a step: one, or one a part
    return [*normalizer.values()] if isinstance(normalizer, dict) else [normalizer]


class Step(NamedTuple):
    "What was so after a step."
    images: int
    normalizers: list # one, or one a part of the network
    loss: float
    batch: int # micro-batches of the epoch that are done


class Watch(Callback):
    "Remembers each step."
    def __init__(self): self.steps = []
    def after_step(self, t):
        meter = t.run.meter
        self.steps.append(Step(meter.images, numbers(meter.normalizers), meter.losses["loss"], t.run.batch))


def fitted(cfg, tmp, world=None):
    "State at the start and at the end of a training that leaves no files; its steps."
    from jetson_det.train.data import training_data
    from jetson_det.train.loop import Trainer
    watch = Watch()
    t = Trainer(cfg,
                training_data(cfg, tmp, lambda l: None),
                os.path.join(tmp, "none"),
                callbacks=[watch],
                say=lambda l: None,
                world=world)
    start = state_of(t)
    t.fit()
    return start, state_of(t), watch.steps


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


def command_in_child(words, out, small=True):
    """Target of a child process: `jetson-det` with these words, what it says in a file beside the run; the DETRs are
    narrow."""
    from jetson_det.cli import main
    lines = open(f"{out}.txt", "a", buffering=1)
    os.dup2(lines.fileno(), 1)
    os.dup2(lines.fileno(), 2)
    if small: small_detrs()
    sys.exit(main([str(w) for w in words]))
