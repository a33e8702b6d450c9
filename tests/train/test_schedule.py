"""Schedules against yolox's and torch's schedulers, at every step; phases of short trainings."""
from types import SimpleNamespace

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, ExponentialLR, LinearLR, MultiStepLR

from jetson_det.core import InputError
from jetson_det.train.optim import base_lr
from jetson_det.train.schedule import (SCHEDULES, WARMUPS, Phases, Schedule, lr_at, make_schedule, plan_phases,
                                       schedule_text, warmup_epochs)

CFG = SimpleNamespace(lr=None, lr_per_image=.01/64, min_lr_ratio=.05, warmup_epochs=5., warmup_steps=None,
                      warmup_shape="quadratic", schedule="cosine", milestones=[], gamma=.1)
pytestmark = pytest.mark.usefixtures("one_thread")
needs_yolox = pytest.mark.skipif(oracles.yolox() is None, reason=oracles.MISSING)


def but(**kw): return SimpleNamespace(**{**vars(CFG), **kw})


@needs_yolox
@pytest.mark.parametrize("epochs, warmup, tail, per_epoch, batch", [
    (300, 5, 15, 37, 64), (100, 5, 15, 1, 8), (50, 1, 10, 26, 8), (20, 0, 5, 7, 1), (12, 2, 0, 3, 16)])
def test_the_learning_rate_is_yolox_s_at_every_step(epochs, warmup, tail, per_epoch, batch):
    from yolox.utils.lr_scheduler import LRScheduler
    theirs = None
    if warmup:
        theirs = LRScheduler("yoloxwarmcos", CFG.lr_per_image * batch, per_epoch, epochs, warmup_epochs=warmup,
                             no_aug_epochs=tail, warmup_lr_start=0, min_lr_ratio=.05)
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
    "linear": lambda o: LinearLR(o, 1., .05, 80 * 11), # to the end: Ultralytics has no tail at the lowest rate
    "exponential": lambda o: ExponentialLR(o, .05**(1 / MAIN)),
    "multistep": lambda o: MultiStepLR(o, [40 * 11, 55 * 11], .3),
    "constant": lambda o: ConstantLR(o, 1., 5)}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_schedules_are_torch_s(kind):
    cfg = but(lr=.002, schedule=kind, gamma=.3, milestones=[40, 55] if kind == "multistep" else [])
    s = make_schedule(cfg, Phases(80, 0., 10, ""), 11, batch=8)
    theirs = torch_rates(ORACLES[kind], .002, s.steps)
    until = s.steps if kind == "linear" else MAIN
    for step in range(until): assert lr_at(step, s) == pytest.approx(theirs[step], rel=1e-9), step
    end = {"multistep": .002 * .09, "constant": .002}.get(kind, .0001)
    assert all(lr_at(step, s) == pytest.approx(end, rel=1e-9) for step in range(until, s.steps))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_straight_warm_up_is_torch_s_linear_one(kind):
    s = Schedule(.002, 1000, 50, 100, .05, kind, "linear", (400,) if kind == "multistep" else (), .1)
    theirs = torch_rates(lambda o: LinearLR(o, 1 / 50, 1., 49), .002, 51)
    if kind == "linear": theirs = [rate * (1 - .95 * i / 1000) for i, rate in enumerate(theirs)] # it falls meanwhile
    assert [lr_at(i, s) for i in range(51)] == pytest.approx(theirs, rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(SCHEDULES), shape=st.sampled_from(WARMUPS), epochs=st.integers(1, 60),
       warmup=st.floats(0, 20), tail=st.integers(0, 20), per_epoch=st.integers(1, 9), lr=st.floats(1e-6, 1.),
       ratio=st.floats(.001, 1.), milestones=st.lists(st.integers(1, 80), min_size=1, max_size=4, unique=True))
def test_every_schedule_rises_falls_and_stays_in_bounds(kind, shape, epochs, warmup, tail, per_epoch, lr, ratio,
                                                        milestones):
    cfg = but(lr=lr, schedule=kind, warmup_shape=shape, min_lr_ratio=ratio,
              milestones=sorted(milestones) if kind == "multistep" else [])
    s = make_schedule(cfg, plan_phases(epochs, warmup, tail), per_epoch, 8)
    rates = [lr_at(i, s) for i in range(s.steps)]
    assert rates == [lr_at(i, s) for i in reversed(range(s.steps))][::-1] # of the step alone
    assert all(0 <= r <= lr * (1 + 1e-9) for r in rates) and all(r > 0 for r in rates[1:])
    up = int(s.warmup) + 1
    risen = rates[:up]
    rest = rates[up:]
    if kind != "linear": assert risen == sorted(risen) # the line that it rises to falls meanwhile
    assert all(b <= a * (1 + 1e-9) for a, b in zip(rest, rest[1:]))
    if kind in ("cosine", "linear", "exponential") and rest: assert min(rest) >= lr * ratio * (1 - 1e-9)
    if s.tail and kind in ("cosine", "exponential"): assert rates[-1] == lr * ratio


@pytest.mark.parametrize("epochs, warmup", [(50, 3), (100, 3), (20, 0)])
def test_the_linear_schedule_is_ultralytics(epochs, warmup):
    "lf = max(1 - x / epochs, 0) * (1 - lrf) + lrf; the warm-up rises to lr0 * lf (ultralytics/engine/trainer.py)."
    s = make_schedule(but(lr=.002, schedule="linear", warmup_shape="linear", min_lr_ratio=.01),
                      Phases(epochs, float(warmup), 10, ""), 15, batch=8)
    for step in range(0, s.steps, 15): # Ultralytics takes a line's value at the beginning of an epoch
        lf = max(1 - step / 15 / epochs, 0) * .99 + .01
        rise = min((step + 1) / (warmup * 15), 1.) if warmup and step <= warmup * 15 else 1.
        assert lr_at(step, s) == pytest.approx(.002 * lf * rise, rel=1e-9)


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
    assert 0 <= phases.warmup <= warmup + .01
    assert 0 <= phases.tail <= tail
    assert phases.warmup + phases.tail <= 2 / 3 * epochs + .01


def test_a_long_tail_in_a_short_training():
    assert plan_phases(4, 0., 20)[:3] == (4, 0., 2) and plan_phases(4, .1, 20).warmup >= 0


def test_the_warm_up_may_be_meant_in_steps():
    assert warmup_epochs(CFG, 37) == 5. and warmup_epochs(but(warmup_steps=0), 37) == 0
    for per_epoch in (37, 400, 1999):
        cfg = but(warmup_steps=2000, lr=1e-4, warmup_shape="linear")
        s = make_schedule(cfg, plan_phases(300, warmup_epochs(cfg, per_epoch), 0), per_epoch, 8)
        assert [lr_at(step, s) for step in (0, 999, 1999)] == pytest.approx([1e-4/2000, 5e-5, 1e-4])
        assert lr_at(2001, s) <= 1e-4
    assert "shrunk" in plan_phases(3, warmup_epochs(but(warmup_steps=2000), 37), 0).rule


@pytest.mark.parametrize("wrong, line", [
    (dict(schedule="cosinus"), "train.schedule: unknown 'cosinus': did you mean 'cosine'?"),
    (dict(warmup_shape="linaer"), "did you mean 'linear'?"),
    (dict(schedule="multistep"), "rising epochs from 1 on"),
    (dict(schedule="multistep", milestones=[40, 40]), "rising epochs"),
    (dict(schedule="multistep", milestones=[0, 40]), "rising epochs"),
    (dict(milestones=[40]), "has no effect on the cosine schedule")])
def test_schedules_that_can_t_be_meant(wrong, line):
    with pytest.raises(InputError) as e: make_schedule(but(**wrong), plan_phases(72, 5., 0), 10, 8)
    assert line in str(e.value) and "\n" not in str(e.value)


def test_the_words_of_the_table():
    assert schedule_text(but(schedule="linear"), 10) == "linear to 0.05 of the rate"
    assert schedule_text(but(schedule="constant"), 10) == "constant"
    assert schedule_text(but(schedule="multistep", milestones=[40, 55]), 72) == "multistep: x 0.1 after epochs 40, 55"
    assert schedule_text(but(schedule="multistep", milestones=[40, 55]), 20).endswith("; 40, 55 beyond the end")
