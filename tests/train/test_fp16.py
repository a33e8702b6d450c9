"""fp16: steps whose gradient overflows are skipped and counted, and the head-room is the same for every batch. On the
CPU, which has the same gradient scaler."""
import math

import pytest
import torch
from train_helpers import config, scenes

from jetson_det.data.loader import Batch
from jetson_det.models.checkpoint import checkpoint_path, load_checkpoint
from jetson_det.models.zoo import create_model
from jetson_det.train import loop
from jetson_det.train.auto_batch import noise_batch
from jetson_det.train.callbacks.base import Callback
from jetson_det.train.callbacks.log import EpochLine
from jetson_det.train.data import training_data
from jetson_det.train.loop import LossNotFinite, Trainer
from jetson_det.train.step import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")
FP16 = ["train.precision=fp16", "data.input_size=[64,64]", "augment.multiscale=0", "train.no_aug_epochs=0",
        "train.warmup_epochs=0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data"), 16) # 12 to train on: 3 steps an epoch


@pytest.fixture(autouse=True)
def cpu_takes_fp16(monkeypatch): monkeypatch.setattr(loop, "pick_device", lambda *_: torch.device("cpu"))


class Follow(Callback):
    "Notes what each step has left."
    def __init__(self): self.steps = []
    def before_train(self, t): self.note(t)
    def after_step(self, t): self.note(t)
    def note(self, t):
        stepper = t.stepper
        weights = next(stepper.model.parameters()).detach().clone()
        self.steps.append((t.run.step, t.run.batch, stepper.ema.updates, stepper.scaler.get_scale(), weights))


def trainer(data, tmp_path, callbacks, *more, checkpoint=None, said=None):
    cfg = config(data, *FP16, *more)
    say = (lambda line: None) if said is None else said.append
    t = Trainer(cfg, training_data(cfg, tmp_path, lambda line: None), tmp_path/"none", checkpoint, callbacks, say)
    t.stepper.half = None # the scaler is that of fp16; in full precision the steps of a CPU are ten times as fast
    return t


def test_a_gradient_that_is_never_finite_ends_the_training(data, tmp_path):
    follow = Follow()
    t = trainer(data, tmp_path, [follow], "train.epochs=40", "train.accumulate=1")
    next(t.model.parameters()).register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(LossNotFinite, match="the gradient of 20 steps in a row is not finite in epoch 4, step 1 "):
        t.fit()
    steps, _, updates, scales, weights = zip(*follow.steps)
    assert set(steps) == set(updates) == {0} and len(steps) == 20
    assert scales[-1] == 2.**(10 - 19) and all(torch.equal(w, weights[0]) for w in weights)


def test_skipped_steps_are_counted_and_are_no_steps(data, tmp_path):
    "The gradients of the first five overflow: average, step and learning rate stand still."
    follow, said = Follow(), []
    t = trainer(data, tmp_path, [follow, EpochLine()], "train.epochs=4", said=said)
    next(t.model.parameters()).register_hook(lambda g: g if len(follow.steps) > 5 else g * float("inf"))
    t.fit()
    taken = [b[0] - a[0] for a, b in zip(follow.steps, follow.steps[1:])]
    assert taken == [0] * 5 + [1] * 7
    assert all(step == updates for step, _, updates, _, _ in follow.steps)
    for a, b in zip(follow.steps, follow.steps[1:]):
        assert (b[0] == a[0]) == torch.equal(a[4], b[4]) == (b[3] == a[3] / 2)
    lines = [line for line in said if line.startswith("epoch ")]
    assert "3 steps skipped: fp16 overflowed" in lines[0] and "2 steps skipped" in lines[1]
    assert t.run.step == 7 and t.run.epoch == 4


def test_a_resumed_training_goes_on_behind_a_skipped_step(data, tmp_path):
    "Cut off in the middle of an epoch, after a step that was skipped: the same bits as without."
    class Cut(Follow):
        at = 5 # notes: the state before the first step, and four steps
        def after_step(self, t):
            super().after_step(t)
            if len(self.steps) != self.at: return
            t.save(checkpoint_path(tmp_path/"cut", 4))
            raise KeyboardInterrupt
    def spoiled(t, follow):
        grad = lambda g: g * float("inf") if t.run.epoch * 6 + t.run.batch in (2, 6) else g # the 2nd and the 4th step
        next(t.model.parameters()).register_hook(grad)
        return follow
    whole, cut, rest = Follow(), Cut(), Follow()
    t = trainer(data, tmp_path, [whole])
    spoiled(t, whole)
    t.fit()
    first = trainer(data, tmp_path, [cut])
    spoiled(first, cut)
    with pytest.raises(KeyboardInterrupt): first.fit()
    checkpoint = load_checkpoint(checkpoint_path(tmp_path/"cut", 4))
    again = trainer(data, tmp_path, [rest], checkpoint=checkpoint)
    assert again.stepper.skipped_in_row == 1 and again.run.epoch_meter.skipped == 1
    spoiled(again, rest)
    again.fit()
    assert [s[:4] for s in rest.steps] == [s[:4] for s in whole.steps[4:]]
    assert torch.equal(rest.steps[-1][4], whole.steps[-1][4])


def stepper(precision="fp16", batch=4):
    torch.manual_seed(0)
    cfg = config(".", "train.optimizer=sgd", f"train.precision={precision}", f"train.batch_size={batch}").train
    model = create_model("yolox-nano", ["a", "b"]).train()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.eval()
    return Stepper(model, cfg, batch)


def test_a_scale_that_is_too_large_sinks_until_it_fits():
    "In fp16 itself."
    s = stepper()
    s.scaler.load_state_dict({**s.scaler.state_dict(), "scale": 2.**28})
    batch = noise_batch(2, (64, 64), 2, 3)
    first = next(s.model.parameters()).detach().clone()
    skipped = []
    while not skipped or skipped[-1]: skipped.append(s.step([batch], .01).skipped)
    assert 3 < len(skipped) < 20 and s.scaler.get_scale() == 2.**(29 - len(skipped))
    assert s.skipped_in_row == 0 and not torch.equal(first, next(s.model.parameters()))


def repeated(batch, times): return Batch(*(t.repeat(times, *[1] * (t.ndim - 1)) for t in batch))


@pytest.mark.parametrize("boxes", [1, 12])
def test_the_head_room_does_not_depend_on_images_and_boxes(boxes):
    "The gradient that must fit into fp16: of one image, and of 16 times the same one."
    largest = []
    for times in (1, 16):
        s = stepper()
        s.half = None # in full precision: what it would be
        s.divisor = 0.
        s.backward(repeated(noise_batch(1, (64, 64), 2, boxes), times), False)
        assert math.log2(s.divisor).is_integer()
        largest.append(max(float(p.grad.abs().max()) for p in s.model.parameters() if p.grad is not None))
    assert .6 < largest[1] / largest[0] < 1.7 # 16 without it


def test_the_scaling_is_undone_exactly():
    """The same bits with a scaler and without one, where nothing else differs; short micro-batches and pieces share
    the divisor of the first."""
    ends = []
    for precision in ("fp32", "fp16"):
        s = stepper(precision)
        s.half = None
        group = [noise_batch(n, (64, 64), 2, n) for n in (4, 3, 1)]
        for _ in range(2): meter = s.step(group, .01)
        assert meter.skipped == 0 and meter.images == 8
        ends.append([p.detach().clone() for p in s.model.parameters()])
    assert all(map(torch.equal, *ends))
