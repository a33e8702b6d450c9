"""The moving average against yolox's, the equal one and BatchNorm's refresh against torch.optim.swa_utils, the mean
of the best; all of them resumed."""
import copy

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from jetson_det.core import InputError
from jetson_det.models.checkpoint import load_checkpoint, publish_checkpoint, save_checkpoint
from jetson_det.models.zoo import create_model
from jetson_det.runtime.contract import Contract
from jetson_det.train.ema import (BestSteps, ModelEMA, ModelSWA, _ema_decay_at, average_weights, learning_norms,
                                  refresh_batchnorm, swa_due)

CONTRACT = Contract(family="yolox", name="yolox-nano", classes=("a",), input_size=(64, 96), output="boxes_scores")
needs_yolox = pytest.mark.skipif(oracles.yolox() is None, reason=oracles.MISSING)
pytestmark = pytest.mark.usefixtures("one_thread")


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=.03), nn.SiLU(), nn.Dropout(.5),
                         nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


@torch.no_grad()
def shake(model, amount=.1):
    model(torch.randn(4, 3, 6, 6)) # moves BatchNorm's statistics
    for p in model.parameters(): p += amount * torch.randn_like(p)


@needs_yolox
def test_the_average_is_yolox_s():
    from yolox.utils import ModelEMA as Theirs
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    ours = ModelEMA(model)
    theirs = Theirs(copy.deepcopy(model), .9998)
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
            for v in model.state_dict().values():
                v += torch.randn_like(v) if v.is_floating_point() else torch.ones_like(v)
        ema.update()
        for k, v in model.state_dict().items():
            if v.is_floating_point(): plain[k].lerp_(v, 1 - _ema_decay_at(n, .9998, 100.))
            else: plain[k].copy_(v)
    assert all(torch.equal(v, plain[k]) for k, v in ema.module.state_dict().items())


# ---- SWA

def test_the_equal_average_is_torch_s():
    model = net()
    ours = ModelSWA(model)
    theirs = AveragedModel(model)
    for _ in range(9):
        shake(model)
        ours.update()
        theirs.update_parameters(model)
    for (name, a), b in zip(ours.module.named_parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)
    for a, b in zip(ours.module.buffers(), model.buffers(), strict=True): assert torch.equal(a, b)
    assert ours.count == 9 and not ours.module.training and not any(p.requires_grad for p in ours.module.parameters())


def test_the_refreshed_statistics_are_torch_s():
    model = net()
    model[3].p = 0. # theirs leaves dropout on
    for _ in range(3): shake(model)
    ours = copy.deepcopy(model).eval()
    theirs = copy.deepcopy(model)
    batches = [torch.randn(n, 3, 6, 6) for n in (4, 7, 2, 5)]
    assert refresh_batchnorm(ours, iter(batches), learning_norms(model)) == 4
    update_bn(batches, theirs)
    for (k, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=k)
    assert not any(m.training for m in ours.modules()) and (ours[1].momentum, ours[5].momentum) == (.03, .1)


def test_a_refresh_leaves_all_else_alone():
    model = net()
    shake(model)
    model[5].eval() # frozen
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    names = learning_norms(model)
    assert names == ["1"]
    torch.manual_seed(1)
    refresh_batchnorm(model, [torch.randn(4, 3, 6, 6)], names)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed <= {"1.running_mean", "1.running_var", "1.num_batches_tracked"} and "1.running_mean" in changed
    assert modes == [m.training for m in model.modules()]
    def breaks():
        yield torch.randn(4, 3, 6, 6)
        raise OSError("gone")
    with pytest.raises(OSError): refresh_batchnorm(model, breaks(), names)
    assert model[1].momentum == .03 and modes == [m.training for m in model.modules()]


def test_without_batches_or_layers_nothing_is_lost():
    model = net()
    shake(model)
    before = copy.deepcopy(model.state_dict())
    assert refresh_batchnorm(model, [], learning_norms(model)) == 0
    assert refresh_batchnorm(model, [torch.randn(4, 3, 6, 6)], []) == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert learning_norms(nn.BatchNorm2d(3, track_running_stats=False)) == []


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_a_resumed_average_goes_on_bit_for_bit(cut, tmp_path):
    model = net().to(memory_format=torch.channels_last)
    whole = ModelSWA(model)
    for i in range(7):
        if i == cut: saved = save_checkpoint(tmp_path/"c", model, None, None, {"swa": whole.state_dict()}, CONTRACT)
        torch.manual_seed(i)
        shake(model)
        whole.update()
    ckpt = load_checkpoint(saved)
    again = net(9).to(memory_format=torch.channels_last)
    again.load_state_dict(ckpt.weights)
    part = ModelSWA(again)
    part.load_state_dict(ckpt.state["swa"])
    for i in range(cut, 7):
        torch.manual_seed(i)
        shake(again)
        part.update()
    assert part.count == whole.count == 7
    for a, b in zip(part.module.state_dict().values(), whole.module.state_dict().values()): assert torch.equal(a, b)
    # what ships carries no average
    assert load_checkpoint(publish_checkpoint(saved, tmp_path/"best")).state["swa"]["count"] == cut


@given(epochs=st.integers(1, 50), last=st.integers(0, 60))
def test_the_last_epochs_count(epochs, last):
    due = [e for e in range(1, epochs + 1) if swa_due(e, epochs, last)]
    assert len(due) == min(last, epochs) and due == list(range(epochs - len(due) + 1, epochs + 1))


# ---- the best k

@settings(max_examples=100, deadline=None)
@given(k=st.integers(1, 5), scores=st.lists(st.sampled_from([0., .1, .2, .3, .30001]), max_size=15),
       cut=st.integers(0, 15))
def test_the_best_are_the_best_and_survive_a_resume(k, scores, cut):
    best = BestSteps(k)
    for i, s in enumerate(scores):
        if i == cut: best = BestSteps(k, best.rows)
        assert best.update(s, i) == (i in best.steps)
    assert best.steps == sorted(range(len(scores)), key=lambda i: (scores[i], i), reverse=True)[:k]


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_mean_of_states(n, seed):
    states = [net(seed + i).state_dict() for i in range(n)]
    for i, s in enumerate(states): s["1.num_batches_tracked"] = torch.tensor(7 + i)
    before = copy.deepcopy(states)
    mean = average_weights(iter(states))
    for k, v in mean.items():
        assert v.dtype == states[0][k].dtype
        if v.is_floating_point():
            expected = torch.stack([s[k].double() for s in states]).mean(0).to(v.dtype)
            torch.testing.assert_close(v, expected, rtol=0, atol=1e-7)
        else: assert torch.equal(v, states[0][k])
    assert all(torch.equal(v, b[k]) for s, b in zip(states, before) for k, v in s.items())
    if n == 1: assert all(torch.equal(v, mean[k]) for k, v in states[0].items())
    net().load_state_dict(mean)


def test_states_in_double_precision_are_not_changed():
    a = {"w": torch.ones(2, dtype=torch.float64)}
    b = {"w": torch.full((2,), 3., dtype=torch.float64)}
    assert torch.equal(average_weights([a, b])["w"], torch.full((2,), 2., dtype=torch.float64))
    assert torch.equal(a["w"], torch.ones(2, dtype=torch.float64))


def test_weights_that_cannot_be_averaged():
    with pytest.raises(InputError, match="no weights"): average_weights(iter(()))
    for other in ({"w": torch.ones(3)}, {"v": torch.ones(2)}, {}):
        with pytest.raises(InputError, match="different networks"): average_weights([{"w": torch.ones(2)}, other])
