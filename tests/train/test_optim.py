"""Optimizers against torch's own, schedules against yolox's and torch's schedulers, Lookahead against its formula
and through checkpoints, clipping."""
import copy
from types import SimpleNamespace

import oracles
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, ExponentialLR, LinearLR, MultiStepLR

from jetson_det.core import InputError
from jetson_det.models.zoo import create_model
from jetson_det.runtime.contract import Contract
from jetson_det.models.checkpoint import load_checkpoint, save_checkpoint
from jetson_det.train.optim import (SCHEDULES, WARMUPS, Lookahead, Phases, Schedule, base_lr, build_optimizer,
                                    clip_gradients, gradients, learning_groups, lr_at, lr_rule, make_schedule,
                                    plan_phases, schedule_text, set_lr, sorted_groups, warmup_epochs)

CFG = SimpleNamespace(lr=None,
                      lr_per_image=.01/64,
                      optimizer="sgd",
                      momentum=.9,
                      betas=(.9, .999),
                      weight_decay=5e-4,
                      lookahead=0,
                      lookahead_alpha=.5,
                      min_lr_ratio=.05,
                      warmup_epochs=5.,
                      warmup_steps=None,
                      warmup_shape="quadratic",
                      schedule="cosine",
                      milestones=[],
                      gamma=.1)
CONTRACT = Contract(family="yolox", name="yolox-nano", classes=("a",), input_size=(64, 96), output="boxes_scores")
pytestmark = pytest.mark.usefixtures("one_thread")


def but(**kw): return SimpleNamespace(**{**vars(CFG), **kw})


needs_yolox = pytest.mark.skipif(oracles.yolox() is None, reason=oracles.MISSING)


class Net(nn.Sequential):
    "Convolutions of 3x3, 1x1 and depthwise, a norm; the first at a tenth of the rate, the last at three times."
    name = "net"

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, groups=8),
                         nn.Conv2d(8, 4, 1))

    def param_groups(self, weight_decay): return sorted_groups(self, weight_decay, {"0": .1, "4": 3.})


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


# ---- schedules

@needs_yolox
@pytest.mark.parametrize("epochs, warmup, tail, per_epoch, batch", [(300, 5, 15, 37, 64), (100, 5, 15, 1, 8), (50, 1, 10, 26, 8), (20, 0, 5, 7, 1), (12, 2, 0, 3, 16)])
def test_the_learning_rate_is_yolox_s_at_every_step(epochs, warmup, tail, per_epoch, batch):
    from yolox.utils.lr_scheduler import LRScheduler
    theirs = LRScheduler("yoloxwarmcos",
                         CFG.lr_per_image*batch,
                         per_epoch,
                         epochs,
                         warmup_epochs=warmup,
                         no_aug_epochs=tail,
                         warmup_lr_start=0,
                         min_lr_ratio=.05) if warmup else None
    ours = make_schedule(CFG, plan_phases(epochs, warmup, tail), per_epoch, batch)
    assert ours.steps == epochs * per_epoch
    for step in range(ours.steps):
        if theirs: assert lr_at(step, ours) == pytest.approx(theirs.update_lr(step), rel=1e-12, abs=1e-15)
    if not warmup: assert lr_at(0, ours) == base_lr(CFG, batch)


def torch_rates(make, lr, steps):
    "What a scheduler of torch gives, stepped once a step."
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


MAIN = 70 * 11 # steps of the main part of 80 epochs of 11 steps, 10 of them the tail
ORACLES = {
    "cosine": lambda o: CosineAnnealingLR(o, MAIN, eta_min=.002 * .05),
    "linear": lambda o: LinearLR(o, 1., .05, MAIN),
    "exponential": lambda o: ExponentialLR(o, .05**(1 / MAIN)),
    "multistep": lambda o: MultiStepLR(o, [40 * 11, 55 * 11], .3),
    "constant": lambda o: ConstantLR(o, 1., 5)}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_schedules_are_torch_s(kind):
    cfg = but(lr=.002, schedule=kind, gamma=.3, milestones=[40, 55] if kind == "multistep" else [])
    s = make_schedule(cfg, Phases(80, 0., 10, ""), 11, batch=8)
    theirs = torch_rates(ORACLES[kind], .002, s.steps)
    for step in range(MAIN): assert lr_at(step, s) == pytest.approx(theirs[step], rel=1e-9), step
    end = {"multistep": .002 * .09, "constant": .002}.get(kind, .0001)
    assert all(lr_at(step, s) == pytest.approx(end, rel=1e-9) for step in range(MAIN, s.steps))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_straight_warm_up_is_torch_s_linear_one(kind):
    s = Schedule(.002, 1000, 50, 100, .05, kind, "linear", (400,) if kind == "multistep" else (), .1)
    theirs = torch_rates(lambda o: LinearLR(o, 1 / 50, 1., 49), .002, 51)
    assert [lr_at(i, s) for i in range(51)] == pytest.approx(theirs, rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(SCHEDULES), shape=st.sampled_from(WARMUPS), epochs=st.integers(1, 60), warmup=st.floats(0, 20), tail=st.integers(0, 20),
       per_epoch=st.integers(1, 9), lr=st.floats(1e-6, 1.), ratio=st.floats(.001, 1.), milestones=st.lists(st.integers(1, 80), min_size=1, max_size=4, unique=True))
def test_every_schedule_rises_falls_and_stays_in_bounds(kind, shape, epochs, warmup, tail, per_epoch, lr, ratio,
                                                        milestones):
    cfg = but(lr=lr,
              schedule=kind,
              warmup_shape=shape,
              min_lr_ratio=ratio,
              milestones=sorted(milestones) if kind == "multistep" else [])
    s = make_schedule(cfg, plan_phases(epochs, warmup, tail), per_epoch, 8)
    rates = [lr_at(i, s) for i in range(s.steps)]
    assert rates == [lr_at(i, s) for i in reversed(range(s.steps))][::-1] # of the step alone
    assert all(0 <= r <= lr * (1 + 1e-9) for r in rates) and all(r > 0 for r in rates[1:])
    up = int(s.warmup) + 1
    risen = rates[:up]
    rest = rates[up:]
    assert risen == sorted(risen)
    assert all(b <= a * (1 + 1e-9) for a, b in zip(rest, rest[1:]))
    if kind in ("cosine", "linear", "exponential") and rest: assert min(rest) >= lr * ratio * (1 - 1e-9)
    if s.tail and kind in ("cosine", "linear", "exponential"): assert rates[-1] == lr * ratio


@pytest.mark.parametrize("epochs", range(1, 40))
def test_short_trainings_leave_room_for_the_middle(epochs):
    phases = plan_phases(epochs, 5., 15)
    assert phases.warmup + phases.tail <= 2 / 3 * epochs + .01 and isinstance(phases.tail, int)
    assert bool(phases.rule) == (epochs < 30)
    s = make_schedule(CFG, phases, 10, 8)
    rates = [lr_at(i, s) for i in range(s.steps)]
    assert max(rates) > .8 * s.lr and min(rates[1:]) > 0 and all(r <= s.lr * (1 + 1e-9) for r in rates)


@settings(max_examples=300, deadline=None)
@given(epochs=st.integers(1, 100), warmup=st.floats(0, 30), tail=st.integers(0, 40))
def test_no_phase_is_ever_negative(epochs, warmup, tail):
    phases = plan_phases(epochs, warmup, tail)
    assert (
        0 <= phases.warmup <= warmup + 0.01
        and 0 <= phases.tail <= tail
        and phases.warmup + phases.tail <= 2 / 3 * epochs + 0.01
    )


def test_a_long_tail_in_a_short_training():
    assert plan_phases(4, 0., 20)[:3] == (4, 0., 2) and plan_phases(4, .1, 20).warmup >= 0


def test_the_warm_up_may_be_meant_in_steps():
    assert warmup_epochs(CFG, 37) == 5. and warmup_epochs(but(warmup_steps=0), 37) == 0
    for per_epoch in (37, 400, 1999):
        phases = plan_phases(300, warmup_epochs(but(warmup_steps=2000, lr=1e-4, warmup_shape="linear"), per_epoch), 0)
        s = make_schedule(but(warmup_steps=2000, lr=1e-4, warmup_shape="linear"), phases, per_epoch, 8)
        assert lr_at(0, s) == pytest.approx(1e-4/2000) and lr_at(999, s) == pytest.approx(5e-5) and lr_at(
            1999, s) == pytest.approx(1e-4) and lr_at(2001, s) <= 1e-4
    assert "shrunk" in plan_phases(3, warmup_epochs(but(warmup_steps=2000), 37), 0).rule


@pytest.mark.parametrize("wrong, line", [
    (dict(schedule="cosinus"), "train.schedule: unknown 'cosinus': did you mean 'cosine'?"),
    (dict(warmup_shape="linaer"), "did you mean 'linear'?"),
    (dict(schedule="multistep"), "rising epochs from 1 on"),
    (dict(schedule="multistep", milestones=[40, 40]), "rising epochs"),
    (dict(schedule="multistep", milestones=[0, 40]), "rising epochs"),
    (dict(milestones=[40]), "says nothing to the cosine schedule")])
def test_schedules_that_can_t_be_meant(wrong, line):
    with pytest.raises(InputError) as e: make_schedule(but(**wrong), plan_phases(72, 5., 0), 10, 8)
    assert line in str(e.value) and "\n" not in str(e.value)


def test_the_words_of_the_table():
    assert schedule_text(but(schedule="linear"), 10) == "linear to 0.05 of the rate" and schedule_text(
        but(schedule="constant"), 10) == "constant"
    assert schedule_text(but(schedule="multistep", milestones=[40, 55]), 72) == "multistep: x 0.1 after epochs 40, 55"
    assert schedule_text(but(schedule="multistep", milestones=[40, 55]), 20).endswith("; 40, 55 beyond the end")
    assert "effective batch" in lr_rule(CFG) and "train.lr" in lr_rule(but(lr=.1))
    assert base_lr(but(lr=.1), 64) == .1


# ---- optimizers

def test_sgd_is_bit_for_bit_the_plain_one():
    ours = create_model("yolox-nano", ["a"]).to(memory_format=torch.channels_last)
    theirs = None
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


@pytest.mark.parametrize("cfg", [but(lr=.05), but(optimizer="adamw", lr=.01), but(optimizer="adam", lr=.01), but(optimizer="adamw", lr=.01, lookahead=3), but(lr=.05, lookahead=2, lookahead_alpha=.8)],
                         ids=["sgd", "adamw", "adam", "adamw-lookahead", "sgd-lookahead"])
@pytest.mark.parametrize("cut", [1, 2, 4, 6])
def test_a_resumed_optimizer_goes_on_bit_for_bit(cfg, cut, tmp_path):
    "Through a real checkpoint, whose tensors are contiguous where the weights are channels_last."
    whole = net()
    part = net()
    losses = run(whole, build_optimizer(whole, cfg, 8), cut), run(part, before := build_optimizer(part, cfg, 8), cut)
    assert losses[0] == losses[1]
    ckpt = load_checkpoint(save_checkpoint(tmp_path/"c", part, None, before, {}, CONTRACT))
    again = net(seed=9)
    again.load_state_dict(ckpt.weights)
    after = build_optimizer(again, cfg, 8)
    after.load_state_dict(ckpt.optimizer)
    for p, state in after.state.items():
        for v in state.values(): assert v.shape != p.shape or v.stride() == p.stride()
    assert run(part, before, 7, seed=6) == run(again, after, 7, seed=6) and same(part, again)
    assert [{k: v
             for k, v in g.items()
             if k != "params"}
            for g in after.param_groups] == [{k: v
                                              for k, v in g.items()
                                              if k != "params"}
                                             for g in before.param_groups]


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


@settings(max_examples=60, deadline=None)
@given(scales=st.dictionaries(st.sampled_from(["encoder", "encoder.layers.0", "encoder.layers.1.self_attn", "decoder", "decoder.layers"]), st.floats(.001, 10.)), decay=st.floats(0, 1))
def test_sorting_holds_for_a_transformer_too(scales, decay):
    model = TRANSFORMER
    groups = sorted_groups(model, decay, scales)
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    scale_of = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    decay_of = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    for name, p in model.named_parameters():
        fits = [k for k in scales if name.startswith(k + ".")]
        assert scale_of[id(p)] == (scales[max(fits, key=len)] if fits else 1.), name
        assert decay_of[id(p)] == (0 if "norm" in name or name.endswith("bias") else decay), name


TRANSFORMER = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)


def test_shared_parameters_appear_once_and_a_wrong_prefix_is_said():
    a = nn.Linear(3, 3)
    both = nn.ModuleDict(dict(one=a, two=nn.Sequential(a, nn.LayerNorm(3))))
    assert sorted(id(p) for g in sorted_groups(both, .1) for p in g["params"]) == sorted(
        id(p) for p in both.parameters())
    tied = nn.ModuleDict(dict(embed=nn.Embedding(4, 3), out=nn.Linear(3, 4)))
    tied["out"].weight = tied["embed"].weight
    assert sorted(id(p) for g in sorted_groups(tied, .1) for p in g["params"]) == sorted(
        id(p) for p in tied.parameters())
    with pytest.raises(InputError, match="begins with 'ones': did you mean 'one'"):
        sorted_groups(both, .1, {"ones": .1})


@settings(max_examples=30, deadline=None)
@given(lr=st.floats(1e-8, 1.), scales=st.lists(st.floats(.01, 10.), min_size=1, max_size=4))
def test_each_group_gets_its_share_of_the_rate(lr, scales):
    optimizer = torch.optim.SGD([dict(params=[nn.Parameter(torch.zeros(1))], lr_scale=s)
                                 for s in scales] + [dict(params=[nn.Parameter(torch.zeros(1))])],
                                lr=1.)
    set_lr(optimizer, lr)
    assert [g["lr"] for g in optimizer.param_groups] == [lr * s for s in scales] + [lr]


def test_the_shares_hold_from_the_first_step_and_move_the_weights():
    model = net()
    optimizer = build_optimizer(model, but(lr=.01, momentum=0., weight_decay=0.), 8)
    assert {g["lr_scale"]: g["lr"] for g in optimizer.param_groups} == pytest.approx({.1: .001, 1.: .01, 3.: .03})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run(model, optimizer, 1)
    for n, p in model.named_parameters():
        scale = {"0": .1, "4": 3.}.get(n[0], 1.)
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
    class Forgets(Net):
        def param_groups(self, weight_decay): return [dict(params=[self[0].weight], weight_decay=0.)]
    model = Forgets()
    with pytest.raises(InputError, match=r"param_groups of net leaves out 0.bias, 1.weight, 1.bias \.\.\."):
        learning_groups(model, .1)


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
