"""A campaign's surroundings without networks: trainings that seal a checkpoint of one number, detectors that find a
given share of the boxes, exports that write a line."""
import atexit
import shutil
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import numpy as np

from jetson_det.experiments.campaign import run_campaign
from jetson_det.experiments.trial import TrialResult
from jetson_det.runtime.contract import Contract
from jetson_det.runtime.postprocess import Detections
from jetson_det.scenes.docks import write_scenes

SEALED = Contract("yolox", "yolox-nano", ("Sack", "Person"), (96, 160), "boxes_scores")

PLAN = """\
name: a plan
measure: {resamples: 100}
phases:
  baseline: {train: {}, then: first}
  first:
    train: {train.lr: 0.011}
    watch: [no NaN]
    gate: AP >= 0.9
    yes: deploy
    no: light
  light:
    train: {model.name: yolox-tiny}
    gate: AP >= baseline - 0.05
    yes: deploy light
    no: keep
ends:
  deploy: {board: orin-nano}
  deploy light: {board: orin-nano}
  keep: {artifact: baseline, board: orin-nano}
toy: {scenes: 40}
"""


@lru_cache(1)
def scenes():
    "Forty scenes, the same for all campaigns of a process: 24 to train on, 12 to decide on, 4 that decide nothing."
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_scenes(folder/"scenes", 40, size=(96, 160), splits={"train": .6, "val": .3, "test": .1}, hard=0.)


class World:
    "What the stand-ins do, and what was asked of them."

    def __init__(self, folder, plan=PLAN, pause=0., **shares):
        self.folder = Path(folder)
        self.plan = self.folder/"plan.yaml"
        self.plan.write_text(plan)
        self.pause = pause # seconds of a training
        self.shares = {"baseline": .8, "first": .8, "light": .8, **shares} # of the boxes that a phase finds
        self.results = {} # phase -> TrialResult instead of a training that is done
        self.rows = {} # phase -> rows of metrics.csv that its watches see
        self.trained = []
        self.finished = []
        self.lines = []

    def trial(self, config, overrides, out, data="", parameters=None, on_epoch=None, **more):
        name = Path(out).name
        self.trained.append(name)
        # a line a start, which a kill leaves
        with open(self.folder/"starts.txt", "a") as f: f.write(name + "\n")
        for row in self.rows.get(name, ()):
            reason = on_epoch(row)
            if reason: return TrialResult("stopped", reason, {}, Path(out), 1.)
        if name in self.results: return self.results[name]
        time.sleep(self.pause)
        seal(Path(out)/"best", len(name))
        return TrialResult("done", "", {}, Path(out), 60.)

    def detect(self, checkpoint, ds, limits):
        hit = np.random.default_rng(1).random(len(ds.boxes)) < self.shares[checkpoint.parent.name]
        found = []
        for i in range(len(ds)):
            rows = np.flatnonzero((ds.box_image == i) & hit)
            scores = np.full(len(rows), .9, np.float32)
            found.append(Detections(ds.boxes[rows].astype(np.float32), scores, ds.labels[rows]))
        return found

    def finish(self, end, checkpoint, folder, ds, cfg, say):
        self.finished.append(end.name)
        return {"file": "model.onnx", "sha256": "0"*64, "bundle": "", "parity": {"ok": True, "lines": ["holds"]}}

    def run(self, **more):
        options = dict(toy=True, data=str(scenes()), say=self.lines.append)
        options.update(trial=self.trial, detect=self.detect, finish=self.finish)
        return run_campaign(self.plan, self.folder/"out", **{**options, **more})




def seal(folder, number):
    "A sealed checkpoint whose weights are one number."
    import torch
    from jetson_det.models.checkpoint import save_checkpoint
    save_checkpoint(folder, {"w": torch.full((1,), float(number))}, None, None, {}, SEALED)
