"The averages: what is averaged, what ships, and that a resume ends with the same."
import json

import numpy as np
import pytest
import torch

from jetson_det.core import InputError
from jetson_det.train.callbacks.base import Callback
from jetson_det.models.checkpoint import load_checkpoint
from jetson_det.train.averages import Averages
from jetson_det.train.data import training_data
from jetson_det.train.loop import Trainer, train
from jetson_det.train.world import current_world
from process_helpers import preload, together
from train_helpers import config, scenes

pytestmark = pytest.mark.usefixtures("one_thread")
MORE = ["train.epochs=4", "train.eval_every=1", "train.no_aug_epochs=0", "train.keep=1", "train.ema_tau=5"]


class Scores(Callback):
    "Instead of an evaluation: the AP that is said for each epoch."
    everywhere = True
    def __init__(self, *ap): self.ap = ap
    def after_epoch(self, t):
        run = t.run
        run.metrics = {"AP": self.ap[run.epoch - 1]}
        if run.best is None or run.metrics["AP"] >= run.best["AP"]:
            run.best = {**run.metrics, "epoch": run.epoch, "step": run.step}


class Ends(Callback):
    "Keeps the weights of each epoch's end, and breaks off after a step."
    def __init__(self, cut=None, folder=None):
        self.cut = cut
        self.folder = folder
        self.weights = []
        self.shipped = {}
    def after_epoch(self, t):
        self.weights.append({k: v.clone() for k, v in t.stepper.model.state_dict().items()})
        self.shipped[t.run.step] = {k: v.clone() for k, v in t.stepper.shipped.state_dict().items()}
    def after_step(self, t):
        if t.run.step == self.cut:
            t.save(self.folder)
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("average")/"scenes")


def parameters(model): return [k for k, _ in model.named_parameters()]


def test_swa_is_the_mean_of_the_last_ends_also_after_a_resume(data, tmp_path):
    cfg = config(data, *MORE, "train.swa_epochs=3")
    ds = training_data(cfg, tmp_path, lambda l: None)
    ends = Ends()
    one = Averages()
    t = Trainer(cfg, ds, tmp_path/"a", callbacks=[Scores(.1, .2, .3, .4), one, ends])
    one.after_train = lambda t: None # what is averaged, not what ships
    t.fit()
    mean = one.swa.module.state_dict()
    for k in parameters(one.swa.module):
        want = torch.stack([w[k] for w in ends.weights[1:]]).mean(0)
        assert torch.allclose(mean[k], want, atol=1e-6), k
        assert not torch.equal(want, ends.weights[-1][k])
    cut = t.run.step - 2 # in the last epoch
    with pytest.raises(KeyboardInterrupt):
        Trainer(cfg, ds, tmp_path/"b", callbacks=[Scores(.1, .2, .3, .4), Averages(), Ends(cut, tmp_path/"cut")]).fit()
    two = Averages()
    two.after_train = lambda t: None
    again = Trainer(cfg, ds, tmp_path/"b", load_checkpoint(tmp_path/"cut"), callbacks=[Scores(.1, .2, .3, .4), two])
    again.fit()
    assert two.swa.count == 3 and two.best.rows == one.best.rows
    resumed = two.swa.module.state_dict()
    for k, v in mean.items(): assert torch.equal(v, resumed[k]), k


def test_the_best_are_kept_and_averaged(data, tmp_path, monkeypatch):
    """Their checkpoints stay although one is the newest; what ships is their mean where it is better, with
    statistics of its own."""
    from jetson_det.train import averages
    from jetson_det.train import loop
    cfg = config(data, *MORE, "train.average_best=2")
    ends = Ends()
    scores = Scores(.1, .4, .2, .3)
    monkeypatch.setattr(loop, "default_callbacks", lambda: [scores, Averages(), loop.SaveCheckpoints(), ends])
    asked = []
    real = averages.evaluate_weights
    def evaluate(model, *rest):
        asked.append({k: v.clone() for k, v in model.state_dict().items()})
        result = real(model, *rest)
        result.stats["AP"] = .5
        return result
    monkeypatch.setattr(averages, "evaluate_weights", evaluate)
    train(cfg, tmp_path/"run")
    per = max(ends.shipped) // 4
    assert sorted(p.name for p in (tmp_path/"run"/"checkpoints").iterdir()) == [f"step-{per * e:08d}" for e in (2, 4)]
    best = load_checkpoint(tmp_path/"run"/"best")
    (mean,) = asked
    for k in mean:
        assert torch.equal(best.weights[k], mean[k]), k
        if "running" in k or "tracked" in k: continue
        assert torch.allclose(mean[k], (ends.shipped[2 * per][k] + ends.shipped[4 * per][k]) / 2, atol=1e-6), k
    moved = [
        k for k in mean if k.endswith("running_var")
        and not torch.allclose(mean[k], (ends.shipped[2*per][k] + ends.shipped[4*per][k])/2, rtol=1e-3)
    ]
    assert moved and best.state["best"]["average"] == "mean of the 2 best epochs"


def test_an_average_that_is_no_better_does_not_ship(data, tmp_path, monkeypatch):
    from jetson_det.train import loop
    cfg = config(data, *MORE, "train.average_best=2", "train.swa_epochs=2")
    ends = Ends()
    monkeypatch.setattr(
        loop, "default_callbacks",
        lambda: [Scores(.1, .4, .2, .3), Averages(), loop.SaveCheckpoints(), ends])
    train(cfg, tmp_path/"run")
    best = load_checkpoint(tmp_path/"run"/"best")
    for k, v in ends.shipped[max(ends.shipped) // 2].items(): assert torch.equal(best.shipped[k], v), k


def test_without_a_val_split_there_is_nothing_to_compare_by(data, tmp_path):
    cfg = config(data, *MORE, "train.swa_epochs=2")
    ds = training_data(cfg, tmp_path, lambda l: None).split("train")
    with pytest.raises(InputError, match="val split"): Trainer(cfg, ds, tmp_path/"a", callbacks=[Averages()]).fit()


def test_the_overfit_check(data, tmp_path):
    "The first images alone, as they are, for training and evaluation; the settings that ran are written down."
    from jetson_det.config import load_config
    cfg = config(data, "train.overfit_batches=2", "train.batch_size=1", "train.epochs=2", "train.eval_every=1",
                 "augment.mosaic=1", "augment.flip=1")
    figures = train(cfg, tmp_path/"run")
    written = load_config(tmp_path/"run"/"config.yaml")
    assert (written.augment.mosaic, written.augment.flip, written.augment.multiscale) == (0, 0, 0)
    assert (figures["steps"], figures["val"]["images"]) == (2, 2) and figures["peak_memory_mb"] > 50
    assert figures["is_overfit"] is False
    assert "the images were not learned" in (tmp_path/"run"/"log.txt").read_text().splitlines()[-1]
    rows = (tmp_path/"run"/"dataset.tsv").read_text().splitlines()[1:]
    assert len(rows) == 2 and all(r.startswith("train\t") for r in rows)


@pytest.mark.parametrize("least, verdict, code", [(.95, "failed", 1), (-1., "passed", 0)])
def test_the_overfit_check_decides_the_exit_code(data, tmp_path, monkeypatch, least, verdict, code):
    "And is the last line, of a resumed training too."
    from jetson_det.cli import main
    from jetson_det.config import save_config
    from jetson_det.train.callbacks import evaluate
    monkeypatch.setattr(evaluate, "OVERFIT_AP50", least)
    cfg = config(data, "train.overfit_batches=2", "train.batch_size=1", "train.epochs=1", "train.trackers=[]",
                 "train.report=true")
    out = tmp_path/"run"
    for words in (["-c", str(save_config(cfg, tmp_path/"quick.yaml"))], ["--resume"]):
        assert main(["train", "--out", str(out), *words]) == code
        assert f"overfit check {verdict}" in (out/"log.txt").read_text().splitlines()[-1]
    assert json.loads((out/"metrics.json").read_text())["is_overfit"] == (code == 0)


@pytest.mark.parametrize("figures, code", [({}, 0), ({"val": {}, "is_overfit": True}, 0), ({"is_overfit": False}, 1)])
def test_figures_are_no_exit_code(data, tmp_path, monkeypatch, figures, code):
    "Of one process, of several, and under a launcher."
    from jetson_det.cli import main
    from jetson_det.train import __main__ as launched, launch, loop
    monkeypatch.setattr(loop, "train", lambda *args, **kw: figures)
    monkeypatch.setattr(launch, "train_processes", lambda *args, **kw: figures)
    words = ["--data", str(data), "--out", str(tmp_path/"run"), "train.device=cpu"]
    assert main(["train", *words]) == code
    assert main(["train", *words, "--gpus", "2"]) == code
    assert launched.main(words) == code
    assert current_world() is not current_world() # a later training in this process is alone again


class Poison(Callback):
    "Makes the loss no number at a step, as often as told."
    def __init__(self, at, times): self.at, self.times = at, times
    def after_step(self, t):
        if t.run.step == self.at and self.times:
            self.times -= 1
            next(t.stepper.model.parameters()).data.fill_(float("nan"))


def test_roll_back_on_nan(data, tmp_path, monkeypatch):
    "From the newest checkpoint, with half the rate; the tables have each epoch once."
    from jetson_det.train import loop
    real = loop.default_callbacks
    poison = Poison(7, 2)
    rates = {}
    class Rates(Callback):
        def after_step(self, t): rates.setdefault(t.run.step, []).append(t.run.lr)
    monkeypatch.setattr(loop, "default_callbacks", lambda: [poison, *real(), Rates()])
    train(config(data, "train.on_nan=rollback", "train.epochs=3", "train.schedule=constant", "train.warmup_epochs=0"),
          tmp_path/"run")
    assert poison.times == 0
    rows = (tmp_path/"run"/"metrics.csv").read_text().splitlines()
    assert [r.split(",")[0] for r in rows[1:]] == ["1", "2", "3"]
    assert np.allclose(np.array(rates[7])/rates[7][0], [1, .5, .25]) and np.allclose(rates[max(rates)], [rates[7][0]/4])
    assert (tmp_path/"run"/"log.txt").read_text().count("rolled back to step 6") == 2 and list(
        (tmp_path/"run"/"nan").iterdir())


def test_rolling_back_ends(data, tmp_path, monkeypatch):
    "A step that never works stops the training after three tries, in the very first step, too."
    from jetson_det.train import loop
    from jetson_det.train.state import TrainingError
    class Always(Callback):
        def before_train(self, t): next(t.stepper.model.parameters()).data.fill_(float("nan"))
    real = loop.default_callbacks
    monkeypatch.setattr(loop, "default_callbacks", lambda: [*real(), Always()])
    with pytest.raises(TrainingError, match="not finite in epoch 1, step 1"):
        train(config(data, "train.on_nan=rollback", "train.epochs=3"), tmp_path/"run")
    assert (tmp_path/"run"/"log.txt").read_text().count("rolled back to step 0") == 3


def test_roll_back_takes_one_process():
    from jetson_det.train.data import resolve_settings
    cfg = config("x", "train.on_nan=rollback")
    resolve_settings(cfg, 1)
    with pytest.raises(InputError, match="one process"): resolve_settings(cfg, 2)


def test_what_was_known_later_does_not_end_a_training_that_went_back(tmp_path):
    "The table has epochs after the checkpoint; they are taken again."
    from types import SimpleNamespace
    from jetson_det.train.callbacks.evaluate import OverfitStop
    from jetson_det.train.state import RunState
    (tmp_path/"metrics.csv").write_text("epoch,AP50\n1,0.2\n2,0.99\n")
    cfg = SimpleNamespace(train=SimpleNamespace(overfit_batches=1))
    for epoch, ends in ((1, 9), (2, 2)):
        run = RunState(tmp_path, epochs=9, steps=9, samples=1, batches=1, batch_size=1, group=1, epoch=epoch,
                       step=epoch, resumed=True)
        t = SimpleNamespace(run=run, cfg=cfg, say=lambda line: None)
        OverfitStop().before_train(t)
        assert t.run.epochs == ends


# ---- several processes

@pytest.fixture(scope="module", autouse=True)
def preloaded(): preload()


def rank_averaged(world, cfg, out):
    "In a process: a training with both averages; a checksum of what they are made of."
    from jetson_det.train import loop
    from jetson_det.train.world import checksum
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
    cfg = config(data, "train.epochs=2", "train.eval_every=1", "train.no_aug_epochs=0", "train.swa_epochs=2",
                 "train.average_best=2")
    one, two = together(rank_averaged, 2, cfg, str(tmp_path/"run"))
    assert one == two and len(one[1]) == 2
    assert "mean of the last 2 epochs" in (tmp_path/"run"/"log.txt").read_text() and "mean of the 2 best" in (
        tmp_path/"run"/"log.txt").read_text()
