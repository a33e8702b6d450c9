"""Several processes: the weights of one, whoever takes which micro-batch; and none is left when one dies."""
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from signals import hear_ctrl_c
from train_helpers import PRELOAD, config, distance, result_of, scenes, state_of

from jetson_det.runtime.files import InputError
from jetson_det.train import loop
from jetson_det.train.callbacks.base import Callback
from jetson_det.train.state import TrainingError
from jetson_det.models.checkpoint import list_checkpoints, load_checkpoint, newest_whole
from jetson_det.train.launch import launch, train_processes
from jetson_det.train.processes import process_lives
from jetson_det.train.world import World
from jetson_det.train.data import training_data
from jetson_det.train.loop import Trainer, train

pytestmark = pytest.mark.usefixtures("one_thread")
FROZEN = [
    "train.freeze_bn=true", "train.warmup_epochs=0", "train.no_aug_epochs=0", "train.epochs=2",
    "train.lr_per_image=0.0003", "augment.multiscale=0"
]


@pytest.fixture(scope="module")
# 14 to train on (a short last batch), 4 to evaluate
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data"), 18)


@pytest.fixture(scope="module", autouse=True)
def preload():
    "Processes of these tests begin with the modules imported."
    import multiprocessing
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)


def together(target, processes, *args, **kw): return launch(target, processes, *args, start="forkserver", **kw)


class Step(NamedTuple):
    "What was so after a step."
    step: int
    batch: int
    images: int
    normalizer: float
    loss: float


class Watch(Callback):
    "Remembers each step."
    def __init__(self): self.steps = []
    def after_step(self, t):
        run = t.run
        self.steps.append(Step(run.step, run.batch, run.meter.images, run.meter.normalizers[""], run.losses["loss"]))


def fitted(cfg, tmp, world=None):
    "A trainer at its end, and its steps."
    watch = Watch()
    t = Trainer(cfg,
                training_data(cfg, tmp, lambda l: None),
                os.path.join(tmp, "none"),
                callbacks=[watch],
                say=lambda l: None,
                world=world)
    t.fit()
    return t, watch.steps


def rank_fitted(world, cfg, tmp):
    "In a process: train; the first gives the steps back and leaves the state in a file."
    torch.set_num_threads(1)
    t, steps = fitted(cfg, tmp, world)
    assert len({repr(s) for s in world.gather([v.tobytes() for m in state_of(t).values() for v in m.values()])}) == 1
    if world.main: torch.save(state_of(t), os.path.join(tmp, "state.pt"))
    return steps


def compare(tmp_path, data, processes, more, one, several):
    """A training in one process, (batch, accumulation) `one`, and in several with `several`: state at the start and
    at both ends."""
    cfg = lambda b, a: config(data, *more, f"train.batch_size={b}", f"train.accumulate={a}")
    start = state_of(Trainer(cfg(*one), training_data(cfg(*one), tmp_path), tmp_path/"none", callbacks=[]))
    t, steps = fitted(cfg(*one), str(tmp_path))
    theirs = [Step(*s) for s in together(rank_fitted, processes, cfg(*several), str(tmp_path))]
    assert [(s.images, s.normalizer) for s in steps] == [(s.images, s.normalizer) for s in theirs]
    assert len(steps) >= 3 and theirs[-1].batch == -(-14 // several[0])
    assert np.allclose([s.loss for s in steps], [s.loss for s in theirs], rtol=1e-3)
    return start, state_of(t), torch.load(tmp_path/"state.pt", weights_only=False)


slow = pytest.mark.slow
@pytest.mark.parametrize("processes, one, several", [
    (2, (8, 1), (2, 2)),
    pytest.param(2, (4, 2), (4, 1), marks=slow),
    pytest.param(3, (6, 1), (2, 1), marks=slow)
])
def test_the_same_weights_as_one_process(tmp_path, data, processes, one, several):
    """BatchNorm frozen, clipped, workers: float32 weights and averages after four steps and more, equal to 1e-4 of
    the way they went. Last steps are short."""
    start, alone, shared = compare(tmp_path, data, processes, [*FROZEN, "train.clip=5", "data.workers=1"], one, several)
    assert distance(alone, shared, start) < 1e-4


@slow
@pytest.mark.parametrize("processes, one, several", [(2, (4, 1), (2, 1)), (3, (6, 1), (2, 1))])
def test_batchnorm_learns_from_all_images(tmp_path, data, processes, one, several):
    """Statistics over the processes are those of the joint batch, in a short last step too. Small steps, and loose
    limits: fresh layers over a few pixels magnify rounding, and SimOTA's choices are yes or no; the next test is
    strict."""
    more = [w for w in FROZEN if not w.startswith(("train.freeze_bn", "train.lr_per", "train.epochs"))]
    start, alone, shared = compare(tmp_path, data, processes, [*more, "train.lr_per_image=1e-7", "train.epochs=1"], one,
                                   several)
    assert distance(alone, shared, start, learned=False) < 1e-4
    assert distance(alone, shared, start) < 2e-2


def rank_normalized(world):
    """In a process: gradients and statistics of a small network, of images 0-4 in rank 0 and 5-7 in rank 1; and of
    all of them by torch alone."""
    from jetson_det.train.sync_batchnorm import sync_batchnorm
    from jetson_det.train.world import sum_step
    torch.manual_seed(0)
    x = torch.randn(8, 3, 6, 5)
    def run(images, synced):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=.3), nn.SiLU(), nn.Conv2d(4, 5, 1),
                            nn.BatchNorm2d(5), nn.Sigmoid()).train()
        assert len(sync_batchnorm(net, world if synced else World())) == (2 if synced else 0)
        net(images).square().sum().backward()
        if synced: sum_step(world, list(net.parameters()), {"images": len(images)})
        return [p.grad for p in net.parameters()] + list(net.buffers())
    mine = run(x[:5] if world.main else x[5:], True)
    whole = run(x, False)
    return max(
        float((a - b).abs().max()/b.abs().max()) if i not in (0, 4) else float((a - b).abs().max())
        for i, (a, b) in enumerate(zip(mine, whole))
        if i not in (1, 5))


def test_synced_batchnorm_is_batchnorm_of_the_joint_batch():
    "To 1e-5; the convolutions' own biases are without effect, and without gradient but for rounding."
    assert together(rank_normalized, 2) < 1e-5


def without(out, step):
    "Take the checkpoints after `step` away."
    import shutil
    for p in list_checkpoints(out):
        if int(p.name[5:]) > step: shutil.rmtree(p)


def test_resumed_by_another_number_of_processes(tmp_path, data):
    """2 -> 1 -> 2 processes, in the middle of an epoch both times: the steps are those of two throughout, and the
    weights to 1e-4 of the way."""
    import shutil
    cfg = config(data, *FROZEN, "train.accumulate=1", "train.keep=100")
    out = tmp_path/"whole"
    again = tmp_path/"again"
    figures = train_processes(cfg, out, processes=2, start="forkserver")
    assert figures["steps"] == 8 and json.loads((out/"metrics.json").read_text()) == figures
    shutil.copytree(out, again)
    without(again, 2)
    train(cfg, again, resume=True)
    without(again, 5)
    resumed = train_processes(cfg, again, resume=True, processes=2, start="forkserver")
    assert resumed["steps"] == 8 and [p.name
                                      for p in list_checkpoints(again)] == [p.name for p in list_checkpoints(out)]
    first, one, two = (load_checkpoint(p)
                       for p in (list_checkpoints(out)[0], list_checkpoints(out)[-1], list_checkpoints(again)[-1]))
    state = lambda c: {
        "weights": {k: v.numpy()
                    for k, v in c.weights.items()}, "ema": {k: v.numpy()
                                                            for k, v in c.ema.items()}
    }
    assert distance(state(one), state(two), state(first)) < 1e-4 and one.state["step"] == two.state["step"] == 8
    rows = [result_of(f)["rows"] for f in (out, again)]
    assert [r["step"] for r in rows[0]] == ["4", "8"] and all(
        abs(float(a["loss"]) - float(b["loss"])) < 1e-3*float(a["loss"]) for a, b in zip(*rows))
    log = (again/"log.txt").read_text()
    assert log.count("devices  2") == 2 and log.count("devices  1") == 1 and log.count("epoch 2/2") == 3 and log.count(
        "those of the beginning") == 1
    assert json.loads((again/"resolved.json").read_text())["effective batch"]["value"] == 4


class Noisy:
    "A session that finds most boxes of a dataset, not quite where they are, and some more."
    def __init__(self, ds):
        from types import SimpleNamespace
        self.contract = SimpleNamespace(classes=ds.classes, name="noisy")
        self.timings = {}
        self.confidence = 0.
        self.iou = 0.
        self.max_detections = 0
        self.known = {ds.image(i).tobytes(): (i, ds.boxes_of(i)) for i in range(len(ds))}

    def __call__(self, images):
        from jetson_det.runtime.geometry import Detections
        found = []
        for image in images:
            i, (boxes, labels, _) = self.known[image.tobytes()]
            rng = np.random.default_rng(i)
            keep = rng.random(len(boxes)) < .9
            found.append(
                Detections((boxes + rng.normal(0, 3, boxes.shape))[keep].astype(np.float32),
                           rng.random(keep.sum()).astype(np.float32), labels[keep].astype(np.int64)))
        return found


def rank_evaluated(world, path, broken):
    "In a process: the figures of the shared evaluation; with `broken` the second process's session fails."
    from jetson_det.evaluate.shared import evaluate_shared
    ds = training_data(config(path), "unused", lambda l: None)
    session = Noisy(ds)
    if broken and not world.main:
        session.known = type(
            "", (), {"__getitem__": lambda self, k:
                     (_ for _ in ()).throw(InputError("output 'boxes' is not finite"))})()
    try: result = evaluate_shared(world, session, ds, .01, .65, 100)
    except InputError as e: return world.gather(str(e))
    return [[json.dumps(s) for s in world.gather(result.stats)],
            len(result.detections), result.images,
            str(result), (session.confidence, session.max_detections)]


def test_sharded_evaluation_is_that_of_one_process(data):
    from jetson_det.evaluate.coco import evaluate
    ds = training_data(config(data), "unused", lambda l: None)
    alone = evaluate(Noisy(ds), ds, .01, .65, 100, progress=False)
    assert .05 < alone.stats["AP"] < .95
    stats, detections, images, table, left = together(rank_evaluated, 2, str(data), False)
    assert stats == [json.dumps(alone.stats)]*2 and (detections, images, table) == (len(ds), len(ds),
                                                                                    str(alone)) and left == [0., 0]
    assert together(rank_evaluated, 2, str(data), True) == ["output 'boxes' is not finite"] * 2


def rank_dies(world, folder, how):
    "In a process: the second one dies while the first waits for it."
    open(f"{folder}/{world.rank}", "w").write(str(os.getpid()))
    world.all_sum([torch.ones(3)])
    if not world.main:
        if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if how == "exception": raise ValueError("a broken\nimage")
        if how == "input": raise InputError("data.path: 'x' is not there")
        if how == "exit": os._exit(3)
        time.sleep(60)
    world.barrier()


def gone(pids, seconds=5):
    "Have all ended?"
    end = time.monotonic() + seconds
    while any(map(process_lives, pids)) and time.monotonic() < end: time.sleep(.02)
    return not any(map(process_lives, pids))


DEATHS = {
    "kill": (TrainingError,
             r"^process 1 was ended by SIGKILL \(often a lack of memory\); what was saved before is whole$"),
    "exception": (TrainingError, "^ValueError: a broken image$"),
    "input": (InputError, "^data.path: 'x' is not there$"),
    "exit": (TrainingError, r"^process 1 \(\d+\) is gone; what was saved before is whole$")
}

@pytest.mark.parametrize("how", DEATHS)
def test_one_that_dies_ends_the_others_within_seconds(tmp_path, how):
    kind, words = DEATHS[how]
    start = time.monotonic()
    with pytest.raises(kind, match=words): together(rank_dies, 2, str(tmp_path), how)
    assert time.monotonic() - start < 20 # most of it is the start
    assert gone([int((tmp_path/str(r)).read_text()) for r in (0, 1)])


def test_one_that_hangs_is_found_by_the_time_limit(tmp_path):
    with pytest.raises(TrainingError, match="(?i)timed out|timeout"):
        together(rank_dies, 2, str(tmp_path), "hang", timeout=3.)
    assert gone([int((tmp_path/str(r)).read_text()) for r in (0, 1)], 1)


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


def test_all_stop_after_the_same_step(tmp_path, data):
    "A signal to the second process alone."
    out = tmp_path/"run"
    with pytest.raises(
            TrainingError,
            match="^stopped by SIGTERM after step 4 of 8; saved; go on with: jetson-det train --out .* --resume$"):
        together(rank_train, 2, config(data, *FROZEN, "train.accumulate=1"), str(out), "stop")
    assert newest_whole(out).name == "step-00000004"


def test_ranks_that_differ_are_an_error(tmp_path, data):
    with pytest.raises(TrainingError, match="^after step 4 the weights of process 1 differ from those of process 0"):
        together(rank_train, 2, config(data, *FROZEN, "train.accumulate=1"), str(tmp_path/"run"), "drift")


@slow
def test_killed_in_the_middle_and_resumed(tmp_path, data):
    "With loader workers; nothing is left, the checkpoint is whole."
    out = tmp_path/"run"
    cfg = config(data, *FROZEN, "train.accumulate=1", "data.workers=1")
    with pytest.raises(TrainingError, match="^process 1 was ended by SIGKILL"):
        together(rank_train, 2, cfg, str(out), "kill")
    assert gone([int((tmp_path/f"run.{r}").read_text()) for r in (0, 1)])
    assert newest_whole(out).name in ("step-00000003", "step-00000002")
    assert train(cfg, out, resume=True)["steps"] == 8


def flat(out): return torch.cat([v.flatten().float() for _, v in sorted(load_checkpoint(out/"last").weights.items())])


@slow
def test_out_of_memory_in_one_process_is_taken_again_by_all(tmp_path, data):
    cfg = config(data, *FROZEN, "train.accumulate=1", "train.batch_size=4")
    out = tmp_path/"run"
    plain = tmp_path/"plain"
    figures = together(rank_train, 2, cfg, str(out), "memory")
    train(config(data, *FROZEN, "train.accumulate=1", "train.batch_size=8"), plain)
    log = (out/"log.txt").read_text()
    assert figures["steps"] == 4 and log.count(
        "OUT OF MEMORY"
    ) == 1 and "OUT OF MEMORY in step 3: out of memory in another process. The step is repeated" in log
    assert (flat(out) - flat(plain)).norm() < 1e-6 * flat(plain).norm()


@pytest.mark.parametrize("frozen", [True, False])
def test_out_of_memory_is_taken_again_in_halves(tmp_path, data, monkeypatch, frozen):
    """The third backward pass fails, the second of the step; the same samples, from clean gradients and BatchNorm's
    statistics as they were."""
    more = [*FROZEN, "train.batch_size=4", "train.accumulate=2", f"train.freeze_bn={frozen}", "data.workers=1"]
    start = state_of(Trainer(config(data, *more), training_data(config(data), tmp_path), tmp_path/"none", callbacks=[]))
    plain, steps = fitted(config(data, *more), str(tmp_path))
    said = []
    watch = Watch()
    backward, calls = memory_ends([4])
    monkeypatch.setattr(loop.Stepper, "backward", backward)
    t = Trainer(config(data, *more),
                training_data(config(data), tmp_path),
                tmp_path/"none",
                callbacks=[watch],
                say=said.append)
    t.fit()
    assert calls == [4, 4, 4, 2, 2, 2, 1, 1, *[2] * 6, 1, 1] and [s.images for s in watch.steps] == [8, 6, 8, 6]
    loud = [s for s in said if s.startswith("OUT OF MEMORY in step 2: CUDA out of memory")]
    assert len(loud) == 1 and "micro-batches of 2 instead of 4" in loud[0] and ("BatchNorm" in loud[0]) == (not frozen)
    if frozen: assert distance(state_of(plain), state_of(t), start) < 1e-4
    else: assert int(t.stepper.model.backbone.backbone.stem.conv.bn.num_batches_tracked) == 2 + 4 + 8


def test_out_of_memory_twice_ends_with_advice(tmp_path, data, monkeypatch):
    monkeypatch.setattr(loop.Stepper, "backward", memory_ends(range(1, 99))[0])
    with pytest.raises(TrainingError,
                       match="^CUDA out of memory, in pieces of 1 images, in step 1; a smaller train.batch_size"):
        fitted(config(data), str(tmp_path))


PARENT = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]
from test_distributed import *
if __name__ == "__main__":
    cfg = config({data!r}, *FROZEN, "train.epochs=500", "train.eval_every=500")
    try: launch(rank_train, 2, cfg, {out!r}, "nothing", start="forkserver")
    except TrainingError as e: sys.exit(f"error: {{e}}")
"""

@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=slow)])
def test_ctrl_c_ends_all_and_so_does_the_end_of_the_parent(tmp_path, data, number):
    (tmp_path/"parent.py").write_text(
        PARENT.format(tests=str(Path(__file__).parents[1]),
                      here=os.path.dirname(__file__),
                      data=str(data),
                      out=str(tmp_path/"run")))
    parent = subprocess.Popen([sys.executable, tmp_path/"parent.py"],
                              stderr=subprocess.PIPE,
                              stdout=subprocess.DEVNULL,
                              text=True,
                              preexec_fn=hear_ctrl_c)
    end = time.monotonic() + 90
    while not list_checkpoints(tmp_path/"run") and time.monotonic() < end and parent.poll() is None: time.sleep(.05)
    pids = [int((tmp_path/f"run.{r}").read_text()) for r in (0, 1)]
    parent.send_signal(number)
    assert parent.wait(20) == (1 if number == signal.SIGINT else -9) and gone(pids, 8) and newest_whole(tmp_path/"run")
    if number == signal.SIGINT:
        assert parent.stderr.read().strip().splitlines()[-1].startswith("error: stopped by SIGINT after step")
    parent.stderr.close()


@slow
@pytest.mark.parametrize("fault, code, words", [
    ([], 0, ""), (["model.name=yolox-nan"], 1, "did you mean 'yolox-nano'")
])
def test_torchrun(tmp_path, data, fault, code, words):
    from train_helpers import QUICK
    call = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
        "jetson_det.train", f"data.path={data}", *QUICK, *FROZEN, *fault, "--out",
        str(tmp_path/"run")
    ]
    done = subprocess.run(call, capture_output=True, text=True, timeout=90)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("error: unknown model") == bool(fault) and words in done.stderr
    if not fault:
        assert (tmp_path/"run"/"log.txt").read_text().count("epoch 2/2") == 1 and done.stdout.count("epoch 2/2") == 1


def rank_averaged(world, cfg, out):
    "In a process: a training with both averages; a checksum of what they are made of."
    from jetson_det.train import loop
    from jetson_det.train.world import checksum
    from jetson_det.train.averages import Averages
    torch.set_num_threads(1)
    kept = Averages()
    real = loop.default_callbacks
    loop.default_callbacks = lambda: [kept if isinstance(c, Averages) else c for c in real()]
    try: figures = train(cfg, out, world=world)
    finally: loop.default_callbacks = real
    return world.gather((checksum(kept.swa.module), kept.best.rows, figures["best"]))


def test_averages_are_the_same_in_all_processes(tmp_path, data):
    """With BatchNorm that learns over the processes: copies of such a network are made, measured anew, and evaluated
    together."""
    cfg = config(data, "train.epochs=3", "train.eval_every=1", "train.no_aug_epochs=0", "train.swa_epochs=2",
                 "train.average_best=2")
    one, two = together(rank_averaged, 2, cfg, str(tmp_path/"run"))
    assert one == two and len(one[1]) == 2
    assert "mean of the last 2 epochs" in (tmp_path/"run"/"log.txt").read_text() and "mean of the 2 best" in (
        tmp_path/"run"/"log.txt").read_text()
