"""Recipes: what fills in the settings that a person leaves open, from which source, and at which length."""
import json
import math
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from train_helpers import QUICK, config, installed, scenes

from jetson_det.config import Config, load_config
from jetson_det.models.detector import TrainingSize
from jetson_det.models.zoo import MODELS, family_of
from jetson_det.train.callbacks.base import Callback
from jetson_det.train.data import training_data
from jetson_det.train.ema import ModelEMA
from jetson_det.train.loop import Trainer, train
from jetson_det.train.optim import build_optimizer, clip_gradients, set_lr, set_warmup
from jetson_det.train.recipes import (_TOGETHER, RECIPE_KEYS, RULES, fill_from_run, finetune_epochs, fitting_average,
                                      recipe_of, with_recipe)
from jetson_det.train.schedule import Schedule, plan_phases, warmup_at

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [name for name in MODELS if installed(name)]
ONE_EACH = [name for name in ("yolox-nano", "yolox-m", "yolo11n", "yolo26n", "rtdetr-r18", "dfine-n") if name in NAMES]
SIZE = TrainingSize(classes=3, images=205, batch=8, epochs=12)


def settings_for(name, *words): return load_config(overrides=[f"model.name={name}", *words])


def value(cfg, key):
    section, leaf = key.split(".")
    return getattr(getattr(cfg, section), leaf)


def filled(cfg, images=205, classes=3, processes=1):
    "Settings with their recipe, and its rows by name."
    cfg, rows = with_recipe(cfg, images, classes, processes)
    return cfg, {name: (value, rule) for name, value, rule in rows}


# ---- which recipe

@pytest.mark.parametrize("word, weights, want", [
    ("auto", "none", "scratch"), ("auto", "yolox-nano", "finetune"), ("auto", "own.pth", "finetune"),
    ("scratch", "yolox-nano", "scratch"), ("finetune", "none", "finetune"), ("none", "yolox-nano", "none")])
def test_the_recipe_follows_the_weights(word, weights, want):
    cfg, rows = filled(settings_for("yolox-nano", f"train.recipe={word}", f"model.weights={weights}"))
    assert cfg.train.recipe == want and rows["recipe"][0] == want and word in rows["recipe"][1]


def test_none_is_the_defaults_as_written():
    cfg = settings_for("rtdetr-r18", "train.recipe=none", "model.weights=none")
    same, rows = with_recipe(cfg, 205, 3)
    assert same == cfg and [name for name, _, _ in rows] == ["recipe"]
    train = Config().train # what a run without a recipe was trained with
    assert (train.epochs, train.optimizer, train.lr, train.lr_per_image) == (100, "sgd", None, .01/64)
    assert (train.momentum, train.weight_decay, train.clip) == (.9, 5e-4, 0.)
    assert (train.warmup_epochs, train.warmup_shape, train.schedule) == (5., "quadratic", "cosine")
    assert (train.warmup_bias_lr, train.warmup_momentum) == (0., None)
    assert (train.ema_decay, train.ema_tau, train.no_aug_epochs, train.min_lr_ratio) == (.9998, 2000., 15, .05)


@pytest.mark.parametrize("finetune", [False, True])
@pytest.mark.parametrize("optimizer", ["", "sgd", "adam", "adamw"])
def test_every_value_is_valid_has_a_source_and_stands_once(finetune, optimizer):
    always = {"train.optimizer", "train.clip", "train.weight_decay", "train.ema_decay", "augment.mosaic"}
    for name in NAMES:
        rows = recipe_of(name, SIZE._replace(optimizer=optimizer), finetune)
        assert all(row.source and "\n" not in row.source for row in rows), name
        keys = [row.key for row in rows]
        assert len(set(keys)) == len(keys) and always <= set(keys) <= set(RECIPE_KEYS), name
        load_config(overrides=[f"{row.key}={row.value}" for row in rows]) # raises where one is out of range
        assert ("train.lr" in keys) != ("train.lr_per_image" in keys), name
        if optimizer: assert {row.key: row.value for row in rows}["train.optimizer"] == optimizer


def test_a_family_without_a_recipe_gets_the_plain_defaults_at_its_length(monkeypatch):
    from jetson_det.models.detector import Detector
    monkeypatch.setattr("jetson_det.train.recipes.family_of", lambda name: Detector)
    cfg, rows = filled(settings_for("yolox-nano", "train.recipe=scratch"))
    assert (cfg.train.optimizer, cfg.train.epochs, cfg.train.lr) == ("sgd", 100, None)
    assert (cfg.train.warmup_epochs, cfg.train.no_aug_epochs) == (5., 15) and cfg.train.ema_decay < .9998
    cfg, _ = filled(settings_for("yolox-nano", "train.recipe=finetune", "train.lr=0.1"))
    assert (cfg.train.epochs, cfg.train.lr, cfg.augment.mosaic_scale) == (20, .1, [.5, 1.5])


# ---- what a person set stays

OTHERS = { # valid values that no recipe chooses
    "train.epochs": 7, "train.optimizer": "adam", "train.lr": .0123, "train.lr_per_image": .0321,
    "train.betas": [.8, .9], "train.momentum": .5, "train.weight_decay": .05, "train.schedule": "exponential",
    "train.warmup_epochs": .7, "train.warmup_steps": 3, "train.warmup_shape": "quadratic",
    "train.warmup_bias_lr": 3., "train.warmup_momentum": .3, "train.min_lr_ratio": .5, "train.no_aug_epochs": 1,
    "train.ema_decay": .77, "train.ema_tau": 77., "train.clip": 3., "train.eval_every": 7, "augment.mosaic": .3,
    "augment.mosaic_scale": [.9, 1.1], "augment.degrees": 1., "augment.translate": .2, "augment.shear": .3,
    "augment.mixup": .4, "augment.mixup_scale": [.9, 1.2], "augment.hsv_prob": .2, "augment.flip": .1,
    "augment.crop": .2, "augment.crop_scale": [.6, .9], "augment.zoom_out": .3, "augment.zoom_out_scale": [1., 2.],
    "augment.multiscale": 2, "augment.multiscale_every": 3}


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("recipe", ["scratch", "finetune"])
def test_what_a_person_set_stays(name, recipe):
    assert set(OTHERS) == set(RECIPE_KEYS)
    for key, own in OTHERS.items():
        cfg, rows = filled(settings_for(name, f"train.recipe={recipe}", f"{key}={own}"))
        assert value(cfg, key) == own, key
        if key in rows: assert rows[key] == (own, "yours")
        for other in next((group for group in _TOGETHER if key in group), ()): # these keep the plain default
            if other != key: assert value(cfg, other) == value(Config(), other), (key, other)


def test_a_default_that_is_written_down_is_a_choice_too():
    cfg, rows = filled(settings_for("rtdetr-r18", "model.weights=none", "train.clip=0", "train.epochs=100"))
    assert (cfg.train.clip, cfg.train.epochs) == (0., 100) and rows["train.clip"][1] == "yours"
    cfg = Config()
    cfg.train.clip = 0.
    assert with_recipe(cfg, 205, 3)[0].train.clip == 0.


def test_a_rate_is_for_the_published_optimizer():
    for word in ("train.lr=0.01", "train.lr_per_image=0.001"):
        for name in ONE_EACH:
            cfg, rows = filled(settings_for(name, word, "train.recipe=finetune"))
            assert cfg.train.optimizer == family_of(name).published_optimizer, name
            rule = rows["train.optimizer"][1]
            assert rule.startswith("finetune: ") and "rate of your own" in rule
    assert filled(settings_for("yolox-nano", "train.recipe=finetune"))[0].train.optimizer == "adamw"


def test_the_table_shows_what_was_given_and_not_what_it_replaces():
    for word, there, gone in (("train.lr_per_image=0.001", "train.lr_per_image", "train.lr"),
                              ("train.warmup_steps=7", "train.warmup_steps", "train.warmup_epochs"),
                              ("train.ema_decay=0.9", "train.ema_decay", "train.ema_tau")):
        for name in ONE_EACH:
            _, rows = filled(settings_for(name, word, "train.recipe=finetune"))
            assert rows[there][1] == "yours" and gone not in rows, (name, word)


def test_filling_in_twice_changes_nothing_and_the_original_stays():
    for name in ONE_EACH:
        cfg = settings_for(name, "train.recipe=finetune", "train.batch_size=4")
        before = cfg.model_dump()
        once = with_recipe(cfg, 205, 3)[0]
        assert cfg.model_dump() == before and with_recipe(once, 9000, 80)[0] == once


# ---- the lengths

@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from([n for n in ONE_EACH]), finetune=st.booleans(), epochs=st.integers(1, 400),
       images=st.integers(1, 5000), batch=st.integers(1, 64))
def test_warm_up_tail_and_average_fit_into_every_training(name, finetune, epochs, images, batch):
    size = TrainingSize(3, images, batch, epochs)
    t = SimpleNamespace(**{row.key.split(".")[1]: row.value for row in recipe_of(name, size, finetune)})
    assert not plan_phases(epochs, t.warmup_epochs, t.no_aug_epochs).rule # nothing to shrink
    assert t.warmup_epochs <= RULES.warmup_share*epochs + .005 and t.no_aug_epochs <= .15*epochs + .5
    assert 1 <= t.eval_every <= max(epochs, 1)
    window = 1/(1 - t.ema_decay)
    assert window <= max(.15*size.steps, 2.01) and t.ema_tau <= window
    if finetune: assert t.warmup_epochs*size.steps_per_epoch <= max(size.steps_per_epoch, 20) + 1


def test_a_fine_tuning_of_some_length_averages_over_a_tenth_to_a_seventh():
    for steps in (50, 312, 2080, 40_000):
        decay, tau = fitting_average(steps, .9998, 2000.)
        share = 1/(1 - decay)/steps
        assert .1 <= share <= .15 and tau == pytest.approx(.4*share*steps, rel=.05, abs=.1), steps
    assert fitting_average(1_000_000, .9998, 2000.) == (.9998, 2000.)


@pytest.mark.parametrize("steps", [60, 312, 2080])
def test_the_average_forgets_the_first_weights_and_remembers_more_than_the_last(steps):
    "Each step's weights are a unit vector of their own, so the average shows how much each counts."
    net = nn.Linear(steps + 1, 1, bias=False).requires_grad_(False)
    of_step = torch.eye(steps + 1)
    net.weight.copy_(of_step[0])
    ema = ModelEMA(net, *fitting_average(steps, .9998, 2000.))
    for step in range(1, steps + 1):
        net.weight.copy_(of_step[step])
        ema.update()
    shares = ema.module.weight[0].numpy()
    assert shares[0] < 1e-4 and shares[-steps // 2:].sum() > .98 and shares[-1] < .35


def test_epochs_by_the_number_of_images():
    found = [finetune_epochs(images) for images in (0, 1, 18, 140, 205, 1000, 118_000)]
    assert found == sorted(found, reverse=True) and found[0] == found[2] == 100 and found[-1] == 20
    assert 140*finetune_epochs(140) == pytest.approx(RULES.images_seen, rel=.05)
    assert filled(settings_for("yolox-nano", "train.recipe=finetune"), images=18)[0].train.epochs == 100


def test_few_images_are_augmented_mildly_in_a_fine_tuning_alone():
    for images, mixup, scale in ((18, 0., [.5, 1.5]), (50_000, 1., [.1, 2.])):
        cfg = filled(settings_for("yolox-m", "train.recipe=finetune"), images=images)[0]
        assert (cfg.augment.mixup, cfg.augment.mosaic_scale) == (mixup, scale)
    assert filled(settings_for("yolox-m", "train.recipe=scratch"), images=18)[0].augment.mixup == 1.


@pytest.mark.parametrize("side, most", [(32, 0), (96, 1), (192, 2), (416, 5), (1088, 5)])
def test_the_input_varies_by_no_more_than_a_share_of_itself(side, most):
    for name in ("yolox-nano", "yolox-x"):
        cfg, rows = filled(settings_for(name, "train.recipe=scratch", f"data.input_size=[{side},1088]"))
        assert cfg.augment.multiscale == most and ("at most 40%" in rows["augment.multiscale"][1]) == (most < 5)


def test_the_winner_depends_on_the_length():
    short, long = [filled(settings_for("yolox-nano", "train.recipe=finetune", f"train.epochs={n}"))[0].train
                   for n in (12, 80)]
    assert (short.optimizer, short.lr, short.clip) == ("adamw", .001, 10.)
    assert (long.optimizer, long.lr, long.lr_per_image, long.clip) == ("sgd", None, .01/64, 0.)


# ---- the families' numbers

@pytest.mark.skipif(oracles.yolox() is None, reason=oracles.MISSING)
@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("yolox-")])
def test_yolox_s_recipe_is_its_own_experiment_s(name):
    from yolox.exp import get_exp
    exp = get_exp(None, name)
    t = {row.key: row.value for row in recipe_of(name, SIZE._replace(images=118_000, batch=64, epochs=300), False)}
    assert family_of(name).published_epochs(name).value == exp.max_epoch
    assert t["augment.mosaic"] == exp.mosaic_prob and t["augment.mosaic_scale"] == list(exp.mosaic_scale)
    assert t["augment.mixup"] == exp.mixup_prob*exp.enable_mixup and t["augment.mixup_scale"] == list(exp.mixup_scale)
    for key in ("degrees", "translate", "shear", "hsv_prob"): assert t[f"augment.{key}"] == getattr(exp, key)
    assert t["augment.flip"] == exp.flip_prob
    for key in ("warmup_epochs", "no_aug_epochs", "min_lr_ratio", "weight_decay", "momentum"):
        assert t[f"train.{key}"] == getattr(exp, key), key
    assert t["train.lr_per_image"] == exp.basic_lr_per_img and t["train.optimizer"] == "sgd"
    assert (t["train.ema_decay"], t["train.ema_tau"], t["train.clip"]) == (.9998, 2000., 0.)


@pytest.fixture(scope="module")
def theirs():
    "The default settings of the installed package Ultralytics."
    if not installed("yolo11n"): pytest.skip("the package ultralytics is not installed")
    from ultralytics.utils import DEFAULT_CFG
    return DEFAULT_CFG


def test_ultralytics_recipe_is_the_package_s(theirs):
    t = {row.key: row.value for row in recipe_of("yolo11n", SIZE._replace(images=118_000, epochs=100), False)}
    assert family_of("yolo11n").published_epochs("yolo11n").value == theirs.epochs
    assert t["train.lr_per_image"] == theirs.lr0 and t["train.momentum"] == theirs.momentum
    assert t["train.weight_decay"] == theirs.weight_decay/theirs.nbs and t["train.clip"] == 10/theirs.nbs
    assert t["train.warmup_bias_lr"] == theirs.warmup_bias_lr/theirs.lr0
    assert t["train.warmup_momentum"] == theirs.warmup_momentum
    assert t["train.warmup_epochs"] == theirs.warmup_epochs and t["train.no_aug_epochs"] == theirs.close_mosaic
    assert t["train.min_lr_ratio"] == theirs.lrf and (t["train.schedule"] == "linear") == (not theirs.cos_lr)
    for key in ("mosaic", "degrees", "translate", "shear", "mixup"): assert t[f"augment.{key}"] == getattr(theirs, key)
    assert t["augment.mosaic_scale"] == [1 - theirs.scale, 1 + theirs.scale] and t["augment.flip"] == theirs.fliplr


@pytest.mark.parametrize("classes, images, epochs, want", [
    (3, 205, 8, ("adamw", .001429)), (80, 5000, 100, ("adamw", .000119)), (3, 118_000, 100, ("sgd", None))])
def test_ultralytics_optimizer_is_the_one_that_its_auto_takes(classes, images, epochs, want):
    if not installed("yolo11n"): pytest.skip("the package ultralytics is not installed")
    from ultralytics.engine.trainer import BaseTrainer
    size = TrainingSize(classes, images, 8, epochs)
    t = {row.key: row.value for row in recipe_of("yolo11n", size, False)}
    stub = SimpleNamespace(data={"nc": classes}, args=SimpleNamespace(lr0=.01, warmup_bias_lr=.1))
    net = nn.Module()
    net.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    real = BaseTrainer.build_optimizer(stub, net, "auto", iterations=math.ceil(images/64)*epochs)
    assert (t["train.optimizer"], t.get("train.lr")) == want
    assert (type(real).__name__ == "AdamW") == (want[0] == "adamw") # else MuSGD, which is absent here
    if want[0] == "adamw": assert real.param_groups[0]["lr"] == t["train.lr"]


class Toy(nn.Sequential):
    "A network with weights and biases."
    name = "toy"

    def param_groups(self, weight_decay):
        return [dict(name="weights", params=[m.weight for m in self], weight_decay=weight_decay),
                dict(name="biases", params=[m.bias for m in self], weight_decay=0.)]


def toy():
    torch.manual_seed(0)
    return Toy(nn.Linear(6, 5), nn.Linear(5, 2)).double()


def mean_loss(net, x, y): return (net(x) - y).square().sum(1).mean()


@pytest.mark.parametrize("kind", ["sgd", "adamw", "adam"])
@pytest.mark.parametrize("size", [1e-4, 10.]) # of the targets: gradients under the clip, and far over it
@pytest.mark.parametrize("micro", [8, 16, 64])
def test_a_step_of_ours_is_one_of_ultralytics(theirs, kind, size, micro):
    "Their loss is multiplied by the micro-batch and added up over 64 images; ours is the mean of all."
    recipe = {row.key: row.value
              for row in recipe_of("yolo11n", SIZE._replace(batch=64, optimizer=kind), False)}
    x = torch.randn(64, 6, dtype=torch.float64)
    y = torch.randn(64, 2, dtype=torch.float64)*size
    ours = toy()
    other = toy()
    if size < 1: y = other(x).detach() + size # nearly right already
    # theirs, as ultralytics/engine/trainer.py takes it
    lr = theirs.lr0 if kind == "sgd" else recipe["train.lr"]
    groups = other.param_groups(theirs.weight_decay*micro*(64//micro)/theirs.nbs)
    if kind == "sgd": optimizer = torch.optim.SGD(groups, lr=lr, momentum=theirs.momentum, nesterov=True)
    else: optimizer = (torch.optim.AdamW if kind == "adamw" else torch.optim.Adam)(groups, lr=lr, eps=64e-8)
    for step in range(3):
        optimizer.zero_grad()
        for i in range(0, 64, micro): (mean_loss(other, x[i:i + micro], y[i:i + micro])*micro).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 10.)
        optimizer.step()
    # ours
    cfg = load_config(overrides=[f"{key}={recipe[key]}" for key in recipe if key.startswith("train.")]).train
    mine = build_optimizer(ours, cfg, batch=64)
    for step in range(3):
        mine.zero_grad()
        mean_loss(ours, x, y).backward()
        clip_gradients(mine, cfg.clip)
        mine.step()
    for a, b in zip(ours.parameters(), other.parameters()): assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)


def test_detr_rates_follow_the_root_of_the_batch():
    for name, lr, batch in (("rtdetr-r18", 1e-4, 16), ("dfine-n", 8e-4, 128), ("dfine-l", 2.5e-4, 32)):
        for factor in (1, 4, .25):
            rows = {row.key: row.value for row in recipe_of(name, SIZE._replace(batch=round(batch*factor)), False)}
            assert rows["train.lr"] == pytest.approx(lr*factor**.5, rel=1e-3)
            assert (rows["train.optimizer"], rows["train.clip"], rows["train.schedule"]) == ("adamw", .1, "constant")


# ---- the warm-up of biases and momentum

@settings(max_examples=100, deadline=None)
@given(step=st.integers(0, 200), warmup=st.floats(.5, 120), share=st.floats(.1, 50), start=st.floats(0, .9))
def test_biases_and_momentum_follow_ultralytics_formula(step, warmup, share, start):
    schedule = Schedule(.01, 1000, warmup, 0, .01, "linear", "linear")
    cfg = SimpleNamespace(warmup_bias_lr=share, warmup_momentum=start, momentum=.937)
    bias_lr, momentum = warmup_at(step, schedule, cfg)
    want = np.interp(step, [0, warmup], [share*.01, .01])
    assert (.01 if bias_lr is None else bias_lr) == pytest.approx(want, rel=1e-9)
    assert momentum == pytest.approx(np.interp(step, [0, warmup], [start, .937]), rel=1e-9)
    if step > warmup: assert (bias_lr, momentum) == (None, .937)


@pytest.mark.parametrize("name", ONE_EACH)
def test_the_groups_of_biases_alone_have_their_own_rate(name):
    with torch.device("meta"): model = family_of(name)(name, ["a"])
    groups = model.param_groups()
    optimizer = torch.optim.SGD([dict(g, params=[nn.Parameter(torch.zeros(1))]) for g in groups], lr=1., momentum=.9)
    set_warmup(optimizer, bias_lr=.1, momentum=.8)
    set_lr(optimizer, .01)
    for g in optimizer.param_groups:
        pure = g["name"].endswith("biases") and "norms" not in g["name"]
        assert g["lr"] == pytest.approx((.1 if pure else .01)*g.get("lr_scale", 1.)) and g["momentum"] == .8
    set_warmup(optimizer, None, .9)
    set_lr(optimizer, .01)
    assert all(g["lr"] == .01*g.get("lr_scale", 1.) and g["momentum"] == .9 for g in optimizer.param_groups)


# ---- in a training

@pytest.fixture(scope="module")
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data"))


class Rates(Callback):
    "Rate and momentum of each group at each step."
    def __init__(self): self.steps = []
    def after_step(self, t):
        self.steps.append({g["name"]: (g["lr"], g["momentum"]) for g in t.stepper.optimizer.param_groups})


def test_a_training_warms_up_biases_and_momentum(tmp_path, data):
    cfg = config(data, "train.warmup_epochs=0.7", "train.epochs=2", "train.no_aug_epochs=0", "augment.multiscale=0",
                 "data.input_size=[64,64]", "train.warmup_bias_lr=10", "train.warmup_momentum=0.8",
                 "train.warmup_shape=linear")
    rates = Rates()
    t = Trainer(cfg, training_data(cfg, tmp_path), tmp_path/"none", callbacks=[rates])
    t.fit()
    lr = t.schedule.lr
    assert t.schedule.warmup == pytest.approx(2.1) # of 6 steps
    for i, step in enumerate(rates.steps):
        want = np.interp(i, [0, 2.1], [10*lr, lr]) if i <= 2 else step["weights"][0]
        assert step["biases"][0] == pytest.approx(want) and step["weights"][0] == step["norms"][0]
        for _, momentum in step.values(): assert momentum == pytest.approx(np.interp(i, [0, 2.1], [.8, .9]))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    "A short run whose optimizer, rate, average and augmentation a recipe chooses; the settings that it began with."
    out = tmp_path_factory.mktemp("runs")/"run"
    chosen = ("train.optimizer", "train.warmup", "train.no_aug", "train.ema", "train.recipe", "augment.", "train.eval")
    words = [w for w in QUICK if not w.startswith(chosen)]
    words += [f"data.path={data}", "data.input_size=[64,64]", "train.epochs=2", "model.name=yolox-nano",
              "train.recipe=finetune", "augment.mosaic=0"]
    figures = train(load_config(overrides=words), out)
    return out, words, figures


def test_a_run_keeps_what_its_recipe_filled_in(run):
    out, words, figures = run
    saved = load_config(out/"config.yaml")
    assert saved == with_recipe(load_config(overrides=words), 9, 2)[0]
    assert (saved.train.recipe, saved.train.optimizer, saved.train.clip) == ("finetune", "adamw", 10.)
    rows = json.loads((out/"resolved.json").read_text())
    assert rows["recipe"]["value"] == "finetune" and rows["augment.mosaic"] == {"value": 0., "rule": "yours"}
    assert rows["train.optimizer"]["rule"].startswith("finetune: ")
    log = (out/"log.txt").read_text()
    assert log.index("train.optimizer") < log.index("epoch 1/2") and "# yours" in log


def test_a_resumed_run_needs_no_recipe(run):
    "With the settings that it began with, or with those in its folder; the table stays."
    out, words, figures = run
    before = json.loads((out/"resolved.json").read_text())
    for cfg in (load_config(out/"config.yaml"), load_config(overrides=[w for w in words if "recipe" not in w])):
        assert train(cfg, out, resume=True)["val"]["stats"] == figures["val"]["stats"]
        assert json.loads((out/"resolved.json").read_text()) == before


def test_what_a_resumed_run_may_not_change_is_still_said(run):
    from jetson_det.core import InputError
    out, words, _ = run
    for word in ("train.clip=3", "train.recipe=scratch", "augment.mixup=0.5"):
        with pytest.raises(InputError, match=word.split("=")[0] + " is .* a resumed run can't change it"):
            train(load_config(overrides=[*words, word]), out, resume=True)


def test_a_run_from_before_recipes_keeps_its_values():
    old = load_config(overrides=["train.clip=2", "train.epochs=500"])
    for name in type(old).model_fields: # as a config.yaml that lists all but the new keys
        section = getattr(old, name)
        for key in type(section).model_fields:
            if key not in ("recipe", "warmup_bias_lr", "warmup_momentum"): setattr(section, key, getattr(section, key))
    now = load_config()
    fill_from_run(now, old)
    assert now == old and now.train.recipe == "auto"
