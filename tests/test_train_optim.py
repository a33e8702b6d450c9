"""Schedule and moving average against the yolox package; optimizer groups; clipping."""
import copy
from types import SimpleNamespace

import oracles
import pytest
import torch
from torch import nn

from jetson_det.models.zoo import create_model
from jetson_det.runtime.files import InputError
from jetson_det.train.ema import ModelEMA, ema_decay_at
from jetson_det.train.optim import base_lr, build_optimizer, clip_gradients, gradients, lr_at, make_schedule, plan_phases

CFG = SimpleNamespace(lr_per_image=.01 / 64, optimizer="sgd", momentum=.9, weight_decay=5e-4, min_lr_ratio=.05)


needs_yolox = pytest.mark.skipif(oracles.yolox() is None, reason=oracles.MISSING)


@needs_yolox
@pytest.mark.parametrize("epochs, warmup, tail, per_epoch, batch", [(300, 5, 15, 37, 64), (100, 5, 15, 1, 8), (50, 1, 10, 26, 8), (20, 0, 5, 7, 1), (12, 2, 0, 3, 16)])
def test_the_learning_rate_is_yolox_s_at_every_step(epochs, warmup, tail, per_epoch, batch):
    from yolox.utils.lr_scheduler import LRScheduler
    theirs = LRScheduler("yoloxwarmcos", CFG.lr_per_image * batch, per_epoch, epochs, warmup_epochs=warmup, no_aug_epochs=tail, warmup_lr_start=0, min_lr_ratio=.05) if warmup else None
    ours = make_schedule(CFG, plan_phases(epochs, warmup, tail), per_epoch, batch)
    assert ours.steps == epochs * per_epoch
    for step in range(ours.steps):
        if theirs: assert lr_at(step, ours) == pytest.approx(theirs.update_lr(step), rel=1e-12, abs=1e-15)
    if not warmup: assert lr_at(0, ours) == base_lr(CFG, batch)


@pytest.mark.parametrize("epochs", range(1, 40))
def test_short_trainings_leave_room_for_the_middle(epochs):
    phases = plan_phases(epochs, 5., 15)
    assert phases.warmup + phases.tail <= 2 / 3 * epochs + .01 and isinstance(phases.tail, int)
    assert bool(phases.rule) == (epochs < 30)
    s = make_schedule(CFG, phases, 10, 8)
    rates = [lr_at(i, s) for i in range(s.steps)]
    assert max(rates) > .8 * s.lr and min(rates[1:]) > 0 and all(r <= s.lr * (1 + 1e-9) for r in rates)


@needs_yolox
def test_the_average_is_yolox_s():
    from yolox.utils import ModelEMA as Theirs
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    ours, theirs = ModelEMA(model), Theirs(copy.deepcopy(model), .9998)
    for _ in range(30):
        model(torch.randn(2, 3, 6, 6))
        with torch.no_grad():
            for p in model.parameters(): p += .1 * torch.randn_like(p)
        ours.update()
        theirs.update(model)
    for (k, a), b in zip(ours.module.state_dict().items(), theirs.ema.state_dict().values()):
        if a.is_floating_point(): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        else: assert int(a) == 30, k # theirs never counts


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_all_tensors_at_once_are_each_by_itself(layout):
    model = create_model("yolox-nano", ["a"]).to(memory_format=layout)
    ema = ModelEMA(model, .9998, 100.)
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    for n in range(1, 4):
        with torch.no_grad():
            for v in model.state_dict().values(): v += torch.ones_like(v) if not v.is_floating_point() else torch.randn_like(v)
        ema.update()
        for k, v in model.state_dict().items():
            if v.is_floating_point(): plain[k].lerp_(v, 1 - ema_decay_at(n, .9998, 100.))
            else: plain[k].copy_(v)
    assert all(torch.equal(v, plain[k]) for k, v in ema.module.state_dict().items())


def test_every_parameter_is_in_one_group_and_only_weights_decay():
    model = create_model("yolox-nano", ["a", "b"])
    optimizer = build_optimizer(model, CFG, 64)
    ids = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert all(g["lr"] == .01 and g["nesterov"] and g["momentum"] == .9 for g in optimizer.param_groups)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d)}


def test_frozen_parameters_are_left_out():
    model = create_model("yolox-nano", ["a"])
    model.backbone.requires_grad_(False)
    optimizer = build_optimizer(model, CFG, 8)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.head.parameters()}
    model.requires_grad_(False)
    with pytest.raises(InputError, match="frozen"): build_optimizer(model, CFG, 8)
    with pytest.raises(InputError, match="adamw"): build_optimizer(model, SimpleNamespace(**{**vars(CFG), "optimizer": "adamw"}), 8)


def test_clipping_is_torch_s():
    a, b = nn.Linear(5, 5), nn.Linear(5, 5)
    for m in (a, b):
        torch.manual_seed(1)
        for p in m.parameters(): p.grad = torch.randn(p.shape)
    optimizer = torch.optim.SGD(a.parameters(), lr=1.)
    for limit in (100., 2., 1e-3):
        norm = clip_gradients(optimizer, limit)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(b.parameters(), limit))
        for p, q in zip(gradients(optimizer), b.parameters()): torch.testing.assert_close(p, q.grad)
