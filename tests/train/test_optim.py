"""Optimizers against torch's own, parameter groups, Lookahead against its formula and through checkpoints, clipping."""
import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from jetson_det.core import InputError
from jetson_det.models.checkpoint import load_checkpoint, save_checkpoint
from jetson_det.models.zoo import create_model
from jetson_det.runtime.contract import Contract
from jetson_det.train.optim import (Lookahead, _trainable_groups, base_lr, build_optimizer, clip_gradients, gradients,
                                    lr_rule, set_lr)
from jetson_det.train.schedule import lr_at, make_schedule, plan_phases

CFG = SimpleNamespace(lr=None, lr_per_image=.01/64, optimizer="sgd", momentum=.9, betas=(.9, .999), weight_decay=5e-4,
                      lookahead=0, lookahead_alpha=.5, min_lr_ratio=.05, warmup_epochs=5., warmup_steps=None,
                      warmup_shape="quadratic", schedule="cosine", milestones=[], gamma=.1)
CONTRACT = Contract(family="yolox", name="yolox-nano", classes=("a",), input_size=(64, 96), output="boxes_scores")
pytestmark = pytest.mark.usefixtures("one_thread")


def but(**kw): return SimpleNamespace(**{**vars(CFG), **kw})


LR_SCALES = {"0": .1, "4": 3.}


class Net(nn.Sequential):
    "Convolutions of 3x3, 1x1 and depthwise, a norm; the first at a tenth of the rate, the last at three times."
    name = "net"

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, groups=8),
                         nn.Conv2d(8, 4, 1))

    def param_groups(self, weight_decay):
        groups = []
        for name, p in self.named_parameters():
            decay = weight_decay if p.ndim > 1 else 0.
            groups.append(dict(name=name, params=[p], weight_decay=decay, lr_scale=LR_SCALES.get(name[0], 1.)))
        return groups


def net(seed=0, layout=torch.channels_last):
    torch.manual_seed(seed)
    return Net().to(memory_format=layout)


def run(model, optimizer, steps, seed=5):
    "Steps on seeded noise; the losses."
    g = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(torch.randn(4, 3, 8, 8, generator=g)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---- the rate

def test_the_learning_rate_follows_the_batch_unless_it_is_given():
    assert "effective batch" in lr_rule(CFG) and "train.lr" in lr_rule(but(lr=.1))
    assert base_lr(but(lr=.1), 64) == .1


# ---- optimizers

def test_sgd_is_bit_for_bit_the_plain_one():
    ours = create_model("yolox-nano", ["a"]).to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    a = build_optimizer(ours, CFG, 8)
    b = torch.optim.SGD(theirs.param_groups(5e-4), lr=.01 / 64 * 8, momentum=.9, nesterov=True)
    s = make_schedule(CFG, plan_phases(10, 1., 2), 2, 8)
    losses = []
    for model, optimizer in ((ours, a), (theirs, b)):
        g = torch.Generator().manual_seed(1)
        for step in range(4):
            if optimizer is a: set_lr(a, lr_at(step, s))
            else:
                for group in b.param_groups: group["lr"] = lr_at(step, s)
            optimizer.zero_grad()
            out = model(torch.randn(2, 3, 64, 64, generator=g))
            loss = out.raw.square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[:4] == losses[4:] and len(set(losses)) == 4 and same(ours, theirs)


@pytest.mark.parametrize("name, make", [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_adam_is_torch_s_plain_one(name, make, layout):
    ours = net(layout=layout)
    theirs = net(layout=layout)
    cfg = but(optimizer=name, lr=.01, betas=(.8, .95), weight_decay=.1)
    a = build_optimizer(ours, cfg, 8)
    b = make(theirs.param_groups(.1), lr=.01, betas=(.8, .95), foreach=False, fused=False)
    for g in b.param_groups: g["lr"] = .01 * g["lr_scale"]
    assert a.defaults["fused"]
    for m, o in ((ours, a), (theirs, b)):
        torch.manual_seed(3)
        for _ in range(8): # made-up gradients: a bias before a BatchNorm has none but rounding, which Adam makes large
            for p in m.parameters(): p.grad = torch.empty_like(p).copy_(torch.randn(p.shape))
            o.step()
    for p, q in zip(ours.parameters(), theirs.parameters()): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert not same(ours, net(layout=layout))
    losses = run(ours, a, 8) # and it learns
    assert losses[-1] < losses[0]


def test_adam_and_adamw_decay_differently():
    models = {n: net() for n in ("adam", "adamw")}
    for n, m in models.items(): run(m, build_optimizer(m, but(optimizer=n, lr=.01, weight_decay=.5), 8), 5)
    assert not torch.allclose(models["adam"][0].weight, models["adamw"][0].weight, atol=1e-4)


def settings_of(optimizer):
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


RESUMED = {
    "sgd": but(lr=.05),
    "adamw": but(optimizer="adamw", lr=.01),
    "adam": but(optimizer="adam", lr=.01),
    "adamw-lookahead": but(optimizer="adamw", lr=.01, lookahead=3),
    "sgd-lookahead": but(lr=.05, lookahead=2, lookahead_alpha=.8),
}


@pytest.mark.parametrize("cfg", RESUMED.values(), ids=RESUMED)
@pytest.mark.parametrize("cut", [1, 2, 4, 6])
def test_a_resumed_optimizer_goes_on_bit_for_bit(cfg, cut, tmp_path):
    "Through a real checkpoint, whose tensors are contiguous where the weights are channels_last."
    whole = net()
    part = net()
    before = build_optimizer(part, cfg, 8)
    assert run(whole, build_optimizer(whole, cfg, 8), cut) == run(part, before, cut)
    ckpt = load_checkpoint(save_checkpoint(tmp_path/"c", part, None, before, {}, CONTRACT))
    again = net(seed=9)
    again.load_state_dict(ckpt.weights)
    after = build_optimizer(again, cfg, 8)
    after.load_state_dict(ckpt.optimizer)
    for p, state in after.state.items():
        for v in state.values(): assert v.shape != p.shape or v.stride() == p.stride()
    assert run(part, before, 7, seed=6) == run(again, after, 7, seed=6) and same(part, again)
    assert settings_of(after) == settings_of(before)


def test_gradients_of_another_memory_order_are_put_in_order():
    "The fused kernel would mix their numbers up without a word."
    models = [net(), net()]
    a = build_optimizer(models[0], but(optimizer="adamw", lr=.01), 8)
    b = torch.optim.AdamW(models[1].param_groups(5e-4), foreach=False)
    for g in b.param_groups: g["lr"] = .01 * g["lr_scale"]
    for m, o in zip(models, (a, b)):
        torch.manual_seed(3)
        for p in m.parameters(): p.grad = torch.randn(p.shape).contiguous()
        o.step()
    for p, q in zip(*(m.parameters() for m in models)): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_state_saved_where_no_fused_kernel_was_uses_this_device_s():
    model = net()
    o = build_optimizer(model, but(optimizer="adamw", lr=.01), 8)
    run(model, o, 2)
    state = o.state_dict()
    for g in state["param_groups"]: g["fused"] = False
    o.load_state_dict(state)
    assert all(g["fused"] for g in o.param_groups)


# ---- groups

def test_every_parameter_is_in_one_group_and_only_weights_decay():
    model = create_model("yolox-nano", ["a", "b"])
    optimizer = build_optimizer(model, CFG, 64)
    ids = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert all(g["lr"] == .01 and g["nesterov"] and g["momentum"] == .9 and g["lr_scale"] == 1
               for g in optimizer.param_groups)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d)}


ONE_OF_EACH_FAMILY = ["yolox-nano", "yolo11n", "yolo26n", "rtdetr-r18", "rtdetrv2-r18", "dfine-n"]


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_every_family_sorts_all_of_its_parameters(name):
    """Each parameter is in one group; what multiplies (matrices, convolutions) decays, and neither biases nor norms
    do."""
    if name.startswith("yolo") and not name.startswith("yolox"): pytest.importorskip("ultralytics")
    if "detr" in name or name.startswith("dfine"): pytest.importorskip("transformers")
    model = create_model(name, ["a", "b"])
    groups = _trainable_groups(model, .1)
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
    for group in groups:
        assert group["lr_scale"] > 0
        for p in group["params"]: assert group["weight_decay"] == (.1 if p.ndim > 1 else 0.)


@settings(max_examples=30, deadline=None)
@given(lr=st.floats(1e-8, 1.), scales=st.lists(st.floats(.01, 10.), min_size=1, max_size=4))
def test_each_group_gets_its_share_of_the_rate(lr, scales):
    groups = [dict(params=[nn.Parameter(torch.zeros(1))], lr_scale=s) for s in scales]
    without_scale = dict(params=[nn.Parameter(torch.zeros(1))])
    optimizer = torch.optim.SGD([*groups, without_scale], lr=1.)
    set_lr(optimizer, lr)
    assert [g["lr"] for g in optimizer.param_groups] == [lr * s for s in scales] + [lr]


def test_the_shares_hold_from_the_first_step_and_move_the_weights():
    model = net()
    optimizer = build_optimizer(model, but(lr=.01, momentum=0., weight_decay=0.), 8)
    assert {g["lr_scale"]: g["lr"] for g in optimizer.param_groups} == pytest.approx({.1: .001, 1.: .01, 3.: .03})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run(model, optimizer, 1)
    for n, p in model.named_parameters():
        scale = LR_SCALES.get(n[0], 1.)
        torch.testing.assert_close(before[n] - p.detach(), .01 * scale * p.grad, rtol=1e-3, atol=1e-6)


def test_frozen_parameters_are_left_out():
    model = create_model("yolox-nano", ["a"])
    model.backbone.requires_grad_(False)
    optimizer = build_optimizer(model, CFG, 8)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.head.parameters()}
    model.requires_grad_(False)
    with pytest.raises(InputError, match="frozen"): build_optimizer(model, CFG, 8)
    with pytest.raises(InputError, match="unknown 'admw': did you mean 'adamw'"):
        build_optimizer(model, but(optimizer="admw"), 8)


def test_a_forgotten_parameter_is_said():
    class LeavesOut(Net):
        def param_groups(self, weight_decay): return [dict(params=[self[0].weight], weight_decay=0.)]
    model = LeavesOut()
    with pytest.raises(InputError, match=r"param_groups of net leaves out 0.bias, 1.weight, 1.bias \.\.\."):
        _trainable_groups(model, .1)


# ---- lookahead

@settings(max_examples=40, deadline=None)
@given(k=st.integers(1, 6), alpha=st.floats(.05, 1.), steps=st.integers(1, 15), seed=st.integers(0, 99))
def test_lookahead_is_its_formula(k, alpha, steps, seed):
    "Algorithm 1 of the paper, written out with plain SGD."
    torch.manual_seed(seed)
    start = torch.randn(3)
    grads = torch.randn(steps, 3)
    p = nn.Parameter(start.clone())
    o = Lookahead(torch.optim.SGD([p], lr=.1), k, alpha)
    slow = fast = start
    for i in range(steps):
        p.grad = grads[i] + p.detach()
        o.step()
        fast = fast - .1 * (grads[i] + fast)
        if (i + 1) % k == 0: slow = fast = slow + alpha * (fast - slow)
        torch.testing.assert_close(p.detach(), fast, rtol=1e-5, atol=1e-6)


def test_lookahead_all_the_way_is_the_inner_optimizer():
    models = net(), net()
    run(models[0], build_optimizer(models[0], but(optimizer="adamw", lr=.01, lookahead=1, lookahead_alpha=1.), 8), 6)
    run(models[1], build_optimizer(models[1], but(optimizer="adamw", lr=.01), 8), 6)
    assert same(*models)


def test_lookahead_takes_a_grad_scaler_clipping_and_a_closure():
    model = net()
    o = build_optimizer(model, but(lr=.01, lookahead=2), 8)
    scaler = torch.GradScaler("cpu", init_scale=4., enabled=True)
    before = [p.detach().clone() for p in model.parameters()]
    for bad in (True, False):
        o.zero_grad()
        scaler.scale(model(torch.randn(2, 3, 8, 8)).square().mean()).backward()
        if bad: next(model.parameters()).grad.fill_(float("inf"))
        scaler.unscale_(o)
        norm = clip_gradients(o, 1.)
        scaler.step(o)
        scaler.update()
        assert bool(norm.isfinite()) != bad and o.steps == (0 if bad else 1)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())) == bad
    def closure():
        o.zero_grad()
        loss = model(torch.ones(2, 3, 8, 8)).square().mean()
        loss.backward()
        return loss
    assert float(o.step(closure).detach()) > 0 and o.steps == 2


def test_lookahead_refuses_what_is_not_its_own():
    a = net()
    b = create_model("yolox-nano", ["a"])
    o = build_optimizer(a, but(lookahead=2), 8)
    with pytest.raises(InputError, match="without Lookahead"):
        o.load_state_dict(build_optimizer(a, CFG, 8).state_dict())
    with pytest.raises(InputError, match="another network"):
        o.load_state_dict(build_optimizer(b, but(lookahead=2), 8).state_dict())
    for k, alpha in ((0, .5), (5, 0.), (5, 1.5)):
        with pytest.raises(InputError, match="train.lookahead"):
            Lookahead(torch.optim.SGD(a.parameters(), lr=.1), k, alpha)


def test_a_saved_lookahead_is_not_moved_by_later_steps(tmp_path):
    model = net()
    o = build_optimizer(model, but(lr=.1, lookahead=1), 8)
    run(model, o, 1)
    other = build_optimizer(net(), but(lr=.1, lookahead=1), 8)
    other.load_state_dict(o.state_dict())
    kept = [t.clone() for t in other.slow]
    run(model, o, 3)
    assert all(torch.equal(a, b) for a, b in zip(kept, other.slow)) and not torch.equal(kept[0], o.slow[0])


# ---- clipping

def test_clipping_is_torch_s():
    a = nn.Linear(5, 5)
    b = nn.Linear(5, 5)
    for m in (a, b):
        torch.manual_seed(1)
        for p in m.parameters(): p.grad = torch.randn(p.shape)
    optimizer = torch.optim.SGD(a.parameters(), lr=1.)
    for limit in (100., 2., 1e-3):
        norm = clip_gradients(optimizer, limit)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(b.parameters(), limit))
        for p, q in zip(gradients(optimizer), b.parameters()): torch.testing.assert_close(p, q.grad)


@settings(max_examples=50, deadline=None)
@given(limit=st.floats(1e-3, 10.), scale=st.floats(1e-4, 1e4), seed=st.integers(0, 99))
def test_clipping_shortens_and_never_turns(limit, scale, seed):
    torch.manual_seed(seed)
    ps = [nn.Parameter(torch.zeros(n)) for n in (1, 7, 3)]
    for p in ps[:2]: p.grad = scale * torch.randn(p.shape)
    before = torch.cat([p.grad for p in ps[:2]]).clone()
    assume(float(before.norm()) > 1e-6)
    clip_gradients(torch.optim.SGD(ps, lr=1.), limit)
    after = torch.cat([p.grad for p in ps[:2]])
    assert float(after.norm()) <= limit * (1 + 1e-5) + 1e-9 or torch.equal(after, before)
    torch.testing.assert_close(after / after.norm(), before / before.norm(), rtol=1e-4, atol=1e-5)
    if float(before.norm()) < limit * .999: torch.testing.assert_close(after, before, rtol=1e-6, atol=0)
