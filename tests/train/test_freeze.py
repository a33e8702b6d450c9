"""What learns when: the plan, frozen stages that do not move, thawed ones that learn as if new, resumes across a
thaw."""
import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from jetson_det.core import InputError
from jetson_det.models.zoo import MODELS, create_model
from jetson_det.runtime.contract import Contract
from jetson_det.models.checkpoint import load_checkpoint, save_checkpoint
from jetson_det.train.freeze import Freezer, FreezePlan, freeze_rows, plan_freeze
from jetson_det.train.optim import build_optimizer, clip_gradients, gradients

CONTRACT = Contract(family="yolox", name="yolox-nano", classes=("a",), input_size=(64, 96), output="boxes_scores")
CFG = SimpleNamespace(lr=.01, lr_per_image=1., optimizer="sgd", momentum=.9, betas=(.9, .999), weight_decay=.1,
                      lookahead=0, lookahead_alpha=.5)
STAGES = ["stem", "body", "neck", "head"]
pytestmark = pytest.mark.usefixtures("one_thread")


def but(**kw): return SimpleNamespace(**{**vars(CFG), **kw})


def block(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.SiLU(), nn.Dropout(.1))


class Net(nn.Module):
    "Four stages of a convolution and a BatchNorm, and a scale that is in no stage."
    name = "net"

    def __init__(self):
        super().__init__()
        self.stem = block(3, 4)
        self.body = block(4, 6)
        self.neck = block(6, 6)
        self.head = block(6, 2)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x): return self.scale * self.head(self.neck(self.body(self.stem(x))))
    def stages(self): return {s: [getattr(self, s)] for s in STAGES}

    def param_groups(self, weight_decay):
        weights = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim == 1]
        return [dict(params=weights, weight_decay=weight_decay), dict(params=others, weight_decay=0.)]


def net(seed=0):
    torch.manual_seed(seed)
    return Net().to(memory_format=torch.channels_last)


def train(model, freezer, optimizer, epochs, start=0, steps=3):
    "Seeded epochs of some steps; the stages that changed in each."
    changed = []
    for epoch in range(start, epochs):
        freezer.apply(epoch)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        torch.manual_seed(epoch)
        for _ in range(steps):
            optimizer.zero_grad()
            (model(torch.randn(4, 3, 6, 6)) - 1).square().mean().backward()
            clip_gradients(optimizer, 10.)
            optimizer.step()
        changed.append({k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])})
    return changed

@settings(max_examples=200, deadline=None)
@given(freeze=st.sets(st.sampled_from(STAGES)), until=st.integers(0, 8),
       steps=st.dictionaries(st.sampled_from(STAGES), st.integers(1, 9)))
def test_a_plan_is_what_was_asked_for(freeze, until, steps):
    unfreeze = {}
    for s, e in steps.items(): unfreeze.setdefault(e, []).append(s)
    if until and not freeze or freeze | set(steps) == set(STAGES):
        with pytest.raises(InputError): plan_freeze(STAGES, freeze, until, unfreeze)
        return
    plan = plan_freeze(STAGES, freeze, until, unfreeze)
    for s in STAGES:
        for epoch in range(12):
            expected = True
            if s in steps: expected = epoch >= steps[s]
            elif s in freeze: expected = until > 0 and epoch >= until
            assert plan.learns(s, epoch) == expected == (s in plan.at(epoch))
    assert all(set(plan.at(e)) <= set(plan.at(e + 1)) for e in range(12)) and list(plan.thaws) == STAGES


@pytest.mark.parametrize("wrong, line", [
    (dict(freeze=["bodi"]), "train.freeze: unknown stage 'bodi': did you mean 'body'?"),
    (dict(freeze=["xyz"]), "it is one of stem, body, neck, head"),
    (dict(unfreeze={2: ["haed"]}), "train.unfreeze: unknown stage 'haed': did you mean 'head'?"),
    (dict(unfreeze={2: ["neck"], 4: ["neck"]}), "'neck' thaws after 2 epochs and again after 4"),
    (dict(unfreeze={0: ["neck"]}), "1 is the first"),
    (dict(freeze_until_epoch=2), "names no stage"),
    (dict(freeze=STAGES), "every stage is frozen in the first epoch"),
    (dict(freeze=STAGES, freeze_until_epoch=1), "every stage is frozen in the first epoch")])
def test_what_can_t_be_meant(wrong, line):
    with pytest.raises(InputError) as e: plan_freeze(STAGES, **wrong)
    assert line in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("cfg", [CFG, but(optimizer="adamw"), but(lookahead=2)], ids=["sgd", "adamw", "lookahead"])
def test_a_frozen_stage_keeps_every_bit_and_a_thawed_one_learns(cfg):
    model = net()
    freezer = Freezer(model, plan_freeze(STAGES, freeze=["stem", "body"], unfreeze={2: ["body"], 3: ["neck"]}))
    optimizer = build_optimizer(model, cfg, 4)
    changed = train(model, freezer, optimizer, 5)
    assert changed[:2] == [{"head", "scale"}] * 2
    assert changed[2:] == [{"body", "head", "scale"}] + [{"body", "neck", "head", "scale"}] * 2
    assert not model.stem.training and model.stem[1].num_batches_tracked == 0 and model.body[1].num_batches_tracked == 9


def test_the_optimizer_holds_what_will_ever_learn_and_makes_its_state_at_the_thaw():
    model = net()
    freezer = Freezer(model, plan_freeze(STAGES, freeze=["stem"], unfreeze={1: ["body"]}))
    optimizer = build_optimizer(model, but(optimizer="adamw"), 4)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for n, p in model.named_parameters() if not n.startswith("stem")}
    train(model, freezer, optimizer, 1)
    assert not any(p in optimizer.state for p in model.body.parameters()) and len(gradients(optimizer)) == 9
    train(model, freezer, optimizer, 2, start=1)
    def steps_of(stage): return {float(optimizer.state[p]["step"]) for p in stage.parameters()}
    assert (steps_of(model.body), steps_of(model.head)) == ({3.}, {6.})


def test_a_thawed_stage_starts_as_in_a_new_optimizer():
    "Its first steps are those of an optimizer that was made at the thaw."
    model = net()
    freezer = Freezer(model, plan_freeze(STAGES, unfreeze={2: ["stem", "body"]}))
    optimizer = build_optimizer(model, but(optimizer="adamw"), 4)
    train(model, freezer, optimizer, 2)
    freezer.apply(2)
    twin = copy.deepcopy(model)
    fresh = build_optimizer(twin, but(optimizer="adamw"), 4)
    for m, o in ((model, optimizer), (twin, fresh)):
        torch.manual_seed(7)
        for p in m.parameters(): p.grad = torch.empty_like(p).copy_(torch.randn(p.shape))
        o.step()
    for s, equal in (("stem", True), ("body", True), ("head", False)):
        pairs = zip(getattr(model, s).parameters(), getattr(twin, s).parameters())
        assert all(torch.equal(a, b) for a, b in pairs) == equal, s


@pytest.mark.parametrize("cfg", [CFG, but(optimizer="adamw"), but(optimizer="adamw", lookahead=2)],
                         ids=["sgd", "adamw", "lookahead"])
@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_a_resume_before_at_and_after_a_thaw_is_bit_for_bit(cfg, cut, tmp_path):
    plan = plan_freeze(STAGES, freeze=["stem"], freeze_until_epoch=3, unfreeze={2: ["body"]})
    def fresh(seed):
        model = net(seed)
        freezer = Freezer(model, plan)
        return model, freezer, build_optimizer(model, cfg, 4)
    whole, freezer, optimizer = fresh(0)
    train(whole, freezer, optimizer, cut)
    ckpt = load_checkpoint(save_checkpoint(tmp_path/"c", whole, None, optimizer, {}, CONTRACT))
    train(whole, freezer, optimizer, 5, start=cut)
    part, freezer, optimizer = fresh(9)
    part.load_state_dict(ckpt.weights)
    optimizer.load_state_dict(ckpt.optimizer)
    train(part, freezer, optimizer, 5, start=cut)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), part.state_dict().values()))


def test_what_the_family_froze_itself_stays_frozen():
    model = net()
    model.stem[0].bias.requires_grad_(False)
    model.body[1].eval().requires_grad_(False) # as train.freeze_bn does
    freezer = Freezer(model, plan_freeze(STAGES, unfreeze={1: ["stem", "body"]}))
    optimizer = build_optimizer(model, CFG, 4)
    for epoch in (0, 1, 5, 0, 3): freezer.apply(epoch)
    assert not model.stem[0].bias.requires_grad and model.stem[0].weight.requires_grad and model.stem.training
    assert not model.body[1].training and not model.body[1].weight.requires_grad
    assert model.body[0].weight.requires_grad and model.body[3].training
    before = copy.deepcopy(model.body[1].state_dict())
    train(model, freezer, optimizer, 3)
    assert all(torch.equal(v, before[k]) for k, v in model.body[1].state_dict().items())


def test_apply_says_what_thawed_and_may_be_called_again():
    model = net()
    freezer = Freezer(model, plan_freeze(STAGES, freeze=["stem"], freeze_until_epoch=2, unfreeze={1: ["neck"]}))
    assert [freezer.apply(e) for e in (0, 1, 1, 2, 3)] == [[], ["neck"], [], ["stem"], []]
    model.stem[0].weight.grad = torch.ones_like(model.stem[0].weight)
    assert freezer.apply(0) == [] and model.stem[0].weight.grad is None and not model.stem.training


def test_a_parameter_of_two_stages_learns_when_one_of_them_does():
    model = net()
    model.neck[0] = model.body[0] = nn.Conv2d(6, 6, 3)
    freezer = Freezer(model, plan_freeze(STAGES, freeze=["neck"]))
    freezer.apply(0)
    assert model.body[0].weight.requires_grad and model.body[0].training and not model.neck[1].weight.requires_grad


@pytest.mark.parametrize("name", list(MODELS)[:2])
def test_every_parameter_of_a_family_is_in_exactly_one_stage(name):
    with torch.device("meta"): model = create_model(name, ["a"])
    ids = [id(p) for parts in model.stages().values() for part in parts for p in part.parameters()]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


def test_the_table():
    model = net()
    plan = plan_freeze(STAGES, freeze=["stem"], unfreeze={2: ["body"], 4: ["neck"]})
    rows = freeze_rows(model, plan, 5)
    expected = ["never learns", "learns from epoch 3", "learns in epoch 5", "learns", "learns"]
    assert [when for _, _, when in rows] == expected
    assert [stage for stage, _, _ in rows] == [*STAGES, "others"]
    assert sum(r[1] for r in rows) == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, abs=.003)
    assert freeze_rows(model, plan, 4)[2][2] == "never learns: thaws after 4 epochs, the training has 4"
    assert rows[1] == ("body", 0., "learns from epoch 3")
    assert FreezePlan({"a": None, "b": 0}).at(99) == ("b",)
