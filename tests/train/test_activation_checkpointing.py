"""Activation checkpointing: the same step in less memory, and nothing else changes."""
import weakref
from copy import deepcopy

import pytest
import torch
from train_helpers import FAMILIES, TWINS, each_family, small_detrs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jetson_det.models.zoo import create_model
from jetson_det.train.activation_checkpointing import called_parts, checkpoint_stages
from jetson_det.train.auto_batch import noise_batch
from jetson_det.train.ema import ModelEMA
from jetson_det.train.oom import statistics_of

pytestmark = pytest.mark.usefixtures("one_thread")


def detector(name):
    torch.manual_seed(0)
    return create_model(name, ["car", "van"]).train()



class LiveBytes(TorchDispatchMode):
    "Within it the bytes of new tensors are counted, for as long as they live."
    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._meet((args, kwargs), new=False)
        out = func(*args, **(kwargs or {}))
        self._meet(out, new=True)
        return out

    def _meet(self, tree, new):
        for t in tree_leaves(tree):
            if not isinstance(t, torch.Tensor): continue
            storage = t.untyped_storage()
            if storage in self.known: continue
            self.known.add(storage)
            if not new: continue
            self._add(storage.nbytes())
            weakref.finalize(storage, self._add, -storage.nbytes()).atexit = False

    def _add(self, n):
        self.now += n
        self.peak = max(self.peak, self.now)


def step_of(model, batch):
    "Loss terms and peak bytes of a forward and backward pass."
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    with LiveBytes() as live:
        outputs = model(model.normalize(batch.images), *([batch.boxes, batch.labels] if model.needs_targets else []))
        loss = model.loss(outputs, batch.boxes, batch.labels, l1=True)
        sum(loss.sums.values()).backward()
    return {k: v.item() for k, v in loss.sums.items()}, live.peak


@pytest.mark.parametrize("name", [*each_family([n for n in FAMILIES if n not in TWINS]),
                                  *each_family(TWINS, slow=True)])
def test_checkpointed_stages_give_the_same_step_in_less_memory(name, monkeypatch):
    small_detrs(monkeypatch.setitem)
    plain = detector(name)
    batch = noise_batch(4, (64, 96), 2, 3)
    frugal = deepcopy(plain)
    assert len(checkpoint_stages(frugal)) > 10 and not checkpoint_stages(frugal)
    (loss, peak), (again, less) = step_of(plain, batch), step_of(frugal, batch)
    assert again == loss
    for (k, a), b in zip(plain.named_parameters(), frugal.parameters()):
        assert (a.grad is None) == (b.grad is None), k
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-7 + 1e-5 * a.grad.abs().max().item(), msg=k)
    for a, b in zip(statistics_of(plain), statistics_of(frugal)): assert torch.equal(a, b)
    assert less < .85 * peak


def test_checkpointed_stages_count_a_batch_once():
    model = detector("yolox-nano")
    checkpoint_stages(model)
    step_of(model, noise_batch(2, (64, 64), 2, 1))
    counts = {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert counts == {1} and {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {.03}


def test_checkpointed_stages_roll_the_same_dice_twice():
    class Toy(torch.nn.Module):
        needs_targets = False
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Dropout(.5), torch.nn.Conv2d(8, 1, 1))
        def normalize(self, x): return x.float() / 255
        def forward(self, x): return self.body(x)
        def stages(self): return {"body": [self.body]}
    torch.manual_seed(0)
    plain = Toy()
    x = torch.rand(2, 3, 16, 16)
    frugal = deepcopy(plain)
    assert checkpoint_stages(frugal) == ["body"]
    for m in (plain, frugal):
        torch.manual_seed(3)
        m(x).sum().backward()
        m.after = torch.rand(1)
    for a, b in zip(plain.parameters(), frugal.parameters()): assert torch.equal(a.grad, b.grad)
    assert torch.equal(plain.after, frugal.after)


def test_checkpointed_stages_keep_names_average_modes_and_frozen_parts(tmp_path):
    plain = detector("yolox-nano")
    for m in plain.backbone.backbone.stem.modules(): m.training = False
    plain.backbone.backbone.stem.requires_grad_(False)
    modes = [m.training for m in plain.modules()]
    frugal = deepcopy(plain)
    checkpoint_stages(frugal)
    assert list(frugal.state_dict()) == list(plain.state_dict()) and [m.training for m in frugal.modules()] == modes
    batch = noise_batch(2, (64, 64), 2, 1)
    assert step_of(frugal, batch)[0] == step_of(plain, batch)[0]
    averages = [ModelEMA(m) for m in (plain, frugal)]
    for e in averages: e.update()
    for a, b in zip(*(e.module.state_dict().values() for e in averages)): assert torch.equal(a, b)
    x = plain.normalize(batch.images)
    with torch.no_grad(): assert torch.equal(*(e.module(x).raw for e in averages))


def test_an_export_does_not_see_checkpointed_stages():
    plain = detector("yolox-nano").eval().requires_grad_(False)
    frugal = deepcopy(plain)
    checkpoint_stages(frugal)
    graphs = [str(torch.jit.trace(lambda x: m(x).raw, torch.zeros(1, 3, 64, 64)).graph) for m in (plain, frugal)]
    assert graphs[0].count("\n") == graphs[1].count("\n") and graphs[0].count("aten::") == graphs[1].count("aten::")


def test_live_bytes_counts_what_lives():
    kept = torch.ones(100)
    with LiveBytes() as live:
        a = torch.ones(1000)
        view = a[:10]
        b = a + kept.repeat(10)
        kept.add_(1)
        del a, b
        assert live.now == 4000 and live.peak == 12000
        del view
    assert live.now == 0


def test_every_part_is_in_one_stage_and_none_inside_another():
    for name in ("yolox-nano", "dfine-n"):
        model = detector(name)
        parts = called_parts(model)
        assert not any(a is not b and any(m is b for m in a.modules()) for a in parts.values() for b in parts.values())
        inside = {id(p) for m in parts.values() for p in m.parameters()}
        assert sum(p.numel() for p in model.parameters() if id(p) in inside) > .9*sum(p.numel()
                                                                                      for p in model.parameters())
