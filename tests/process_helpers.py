"""Trainings in several processes, for the tests: how they are started, and what happens in them."""
import os
import signal
import time

import torch
from train_helpers import fitted, forkserver

from jetson_det.train import loop
from jetson_det.train.callbacks.base import Callback
from jetson_det.train.launch import launch
from jetson_det.train.loop import train
from jetson_det.train.processes import process_lives

FROZEN = [
    "train.freeze_bn=true", "train.warmup_epochs=0", "train.no_aug_epochs=0", "train.epochs=2",
    "train.lr_per_image=0.0003", "augment.multiscale=0"
]


def preload():
    "Processes of these tests begin with the modules imported."
    forkserver()


def together(target, processes, *args, **kw): return launch(target, processes, *args, start="forkserver", **kw)


def gone(pids, seconds=5):
    "Have all ended?"
    end = time.monotonic() + seconds
    while any(map(process_lives, pids)) and time.monotonic() < end: time.sleep(.02)
    return not any(map(process_lives, pids))


class Once(Callback):
    "Does something in one process after one step."
    everywhere = True
    def __init__(self, rank, step, do):
        self.rank = rank
        self.step = step
        self.do = do
    def after_step(self, t):
        if (self.rank, self.step) == (t.world.rank, t.run.step): self.do(t)


def memory_ends(at):
    "The backward pass of that number, counted from 1, raises what CUDA raises; when its gradients are there already."
    real, calls = loop.Stepper.backward, []
    def backward(self, batch, l1):
        calls.append(len(batch.indices))
        figures = real(self, batch, l1)
        if len(calls) in at: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return figures
    return backward, calls


def rank_train(world, cfg, out, what):
    "In a process: a whole training in which something happens to the second."
    torch.set_num_threads(1)
    usual = loop.default_callbacks
    do = {
        "drift": lambda t: next(t.stepper.model.parameters()).data.mul_(1.001),
        "stop": lambda t: os.kill(os.getpid(), signal.SIGTERM), "kill": lambda t: os.kill(os.getpid(), signal.SIGKILL)
    }
    if what in do: loop.default_callbacks = lambda: [*usual(), Once(1, 3, do[what])]
    if what == "memory" and not world.main: loop.Stepper.backward, _ = memory_ends([3])
    open(f"{out}.{world.rank}", "w").write(str(os.getpid()))
    return train(cfg, out, False, world)


def rank_fitted(world, cfg, tmp):
    "In a process: train; the first gives the steps back and leaves the state in a file."
    torch.set_num_threads(1)
    _, end, steps = fitted(cfg, tmp, world)
    assert len({repr(s) for s in world.gather([v.tobytes() for m in end.values() for v in m.values()])}) == 1
    if world.main: torch.save(end, os.path.join(tmp, "state.pt"))
    return steps
