"""The page of a sweep: what it says of ties, of too few trials, and of folders that hold none."""
import pytest

pytest.importorskip("optuna", reason="the sweep extra is not installed")
pytest.importorskip("matplotlib", reason="the train extra is not installed")
import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from jetson_det.experiments.sweep import open_study, sweep_trials
from jetson_det.experiments.sweep_summary import (compare_matches, importance, intervals_table, plot_curves,
                                                  plot_parallel, read_sweep_folder, sweep_intervals, trials_table,
                                                  verdict)
from jetson_det.data.dataset import DetDataset
from jetson_det.evaluate.intervals import paired_bootstrap
from jetson_det.evaluate.matching import match
from jetson_det.runtime.files import InputError, write_json_atomic
from jetson_det.runtime.geometry import Detections


def row(point, value, **more):
    settings = {"train.lr": .01 * (point + 1), "augment.mosaic_scale": "[0.5, 1.5]"}
    return dict(dict(point=point, status="done" if value is not None else "pruned", value=value, settings=settings,
                     reason="", seconds=1., attempts=1, curve={"1": .1, "2": .2}, folder=f"trials/{point:04d}"), **more)


def sweep_json(folder, trials):
    write_json_atomic(folder/"sweep.json", dict(metric="AP", split="val", data="", trials=trials))
    return read_sweep_folder(folder)


def test_folders_that_are_no_sweep(tmp_path):
    with pytest.raises(InputError, match="has not come to its end"): read_sweep_folder(tmp_path)
    with pytest.raises(InputError, match="not the folder of a sweep"): sweep_trials(tmp_path)
    assert not (tmp_path/"study.db").exists(), "looking makes nothing"


def test_pages_of_sweeps_in_which_little_was_done(tmp_path):
    for trials in ([], [row(0, None, reason="<b>", curve={})], [row(1, .3), row(0, .3), row(2, None)],
                   [row(0, .5), row(1, .2, settings={})]):
        found = sweep_json(tmp_path, trials)
        assert "<b>" not in trials_table(found)
        for plot in (plot_parallel, plot_curves): plot(found).canvas.draw()
        assert sweep_intervals(tmp_path) == [], "no checkpoints"


def test_the_verdict_names_ties():
    def found(point, tie):
        ends = dict(behind=.01, behind_low=-.01, behind_high=.02)
        return dict(point=point, value=.5, low=.4, high=.6, tie=tie, **ends)

    assert "nothing to compare" in verdict([found(0, True)])
    rows = [found(0, True), found(2, True), found(1, False), found(4, True)]
    assert "do not tell it from trial 3, 5" in verdict(rows)
    assert verdict([found(0, True), found(2, False)]) == "Trial 1 is better than the next 1 for certain (95 %)."
    assert "not told from the best" in intervals_table([found(0, True), found(2, True)])


def test_the_difference_is_the_paired_one():
    "The best minus the other, on the same images: of signs and size as `paired_bootstrap` has it."
    boxes = np.array([[10, 10, 40, 40]] * 60, "float32")
    ds = DetDataset("photos", ("Sack",), [f"{i}.jpg" for i in range(60)], [(100, 100)] * 60, box_image=np.arange(60),
                    boxes=boxes, labels=np.zeros(60, int))
    def detector(missed):
        found = []
        for i in range(60):
            n = 0 if i in missed else 1
            found.append(Detections(boxes[:n], np.full(n, .9, "float32"), np.zeros(n, int)))
        return match(ds, found)
    best, other = detector({1}), detector(set(range(20)))
    rows = compare_matches([best, other], 300)
    expected = paired_bootstrap(other, best, 300).stats[0]
    assert rows[1]["behind"] == pytest.approx(rows[0]["value"] - rows[1]["value"]) and rows[1]["behind"] > .2
    assert (rows[1]["behind_low"], rows[1]["behind_high"]) == (expected.low, expected.high)
    assert not rows[1]["tie"] and rows[0]["low"] <= rows[0]["value"] <= rows[0]["high"]


def test_importance_needs_trials_that_differ(tmp_path):
    study = open_study(tmp_path)
    ranges = {"train.lr": FloatDistribution(.001, .1), "augment.mosaic": CategoricalDistribution([.5, 1.])}
    def add(i, value, **kw):
        params = {"train.lr": .001 + .003 * i, "augment.mosaic": [.5, 1.][i % 2]}
        study.add_trial(create_trial(params=params, distributions=ranges, value=value, **kw))
    add(0, None, state=TrialState.PRUNED)
    for i in range(5): add(i, .5)
    assert importance(tmp_path) == {}
    for i in range(30): add(i, .001 + .003 * i)
    shares = importance(tmp_path)
    assert shares["train.lr"] > shares["augment.mosaic"]
