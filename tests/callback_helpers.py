"""Callbacks for the tests of trainings: an evaluation that says what is wanted, something that happens after a step."""
import hashlib
from pathlib import Path

import pytest

from jetson_det.train import loop
from jetson_det.train.callbacks.base import Callback
from jetson_det.train.callbacks.checkpoints import SaveCheckpoints
from jetson_det.train.loop import Trainer


def scored(monkeypatch, aps):
    "The evaluation of each epoch says what is given here; that of the end is real."
    monkeypatch.setattr(Trainer, "evaluate", lambda self: {"AP": aps[self.run.epoch - 1], "AP50": None})


def finished_run(cfg, out):
    "A run of three epochs in `out`; the AP of its epochs is .2, .3, .1."
    with pytest.MonkeyPatch.context() as m:
        scored(m, [.2, .3, .1])
        loop.train(cfg, out)
    return out


def with_callbacks(monkeypatch, *more, before=SaveCheckpoints):
    "The usual callbacks, and more before one of them."
    usual = loop.default_callbacks
    def all_of_them():
        found = usual()
        at = next(i for i, c in enumerate(found) if isinstance(c, before))
        return found[:at] + [make() for make in more] + found[at:]
    monkeypatch.setattr(loop, "default_callbacks", all_of_them)


class At(Callback):
    "Does something after a step."
    def __init__(self, step, do): self.step, self.do = step, do
    def after_step(self, t):
        if self.step == t.run.step: self.do(t)


def hashes(folder): return {hashlib.sha256(f.read_bytes()).hexdigest() for f in Path(folder).rglob("*") if f.is_file()}
