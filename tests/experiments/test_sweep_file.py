"""Sweep files: what is read, what is drawn, and one clear line for what is wrong."""
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_det.config import load_config
from jetson_det.experiments.sweep_file import (Dimension, grid_points, random_points, read_sweep, trial_overrides)
from jetson_det.experiments.trial import override_words
from jetson_det.core import rng_for
from jetson_det.runtime.files import InputError

REPO = Path(__file__).resolve().parents[2]


def written(folder, text):
    (folder/"s.yaml").write_text(text)
    return folder/"s.yaml"


WRONG = {
    "serach: {train.lr: [0.1]}": "line 1: unknown field 'serach': did you mean 'search'",
    "search: {train.lr0: [0.1]}": "unknown key 'train.lr0': did you mean 'train.lr'",
    "search:\n  train.lr: [0.1]\n  augment.mosiac: [0, 1]": "line 3: .*did you mean 'augment.mosaic'",
    "search: {lr: [0.1]}": "did you mean 'train.lr'",
    "search: {train.epochs: [3, 0]}": "train.epochs: .*greater than or equal to 1",
    "search: {train.lr: []}": "train.lr has no values",
    "search: {train.lr: [0.1, 0.1]}": "has a value twice",
    "search: {train.lr: {low: 1}}": "needs both ends, such as {low: 1, high: 9}",
    "search: {train.lr: {low: 1, high: 2, lgo: true}}\nmethod: tpe\ntrials: 3": "a range has no 'lgo'",
    "search: {train.lr: {low: 0.1, high: 0.2}}": "a grid needs lists",
    "search: {train.lr: {low: 0.2, high: 0.1}}\nmethod: random\ntrials: 3": "is not below",
    "search: {train.weight_decay: {low: 0, high: 0.1, log: true}}\nmethod: random\ntrials: 3": "log needs a low over 0",
    "search: {train.lr: {low: a, high: 0.1}}\nmethod: random\ntrials: 3": "are numbers",
    "search: {train.lr: {low: 0.1, high: 0.2, step: 1}}\nmethod: random\ntrials: 3": "step 1 does not fit",
    "search: {train.lr: [0.1]}\nmethod: tpe": "tpe needs trials",
    "search: {train.lr: [0.1]}\ntrials: 4": "a grid has as many trials as points",
    "search: {train.lr: [0.1]}\nmethod: tpi": "line 2: method: unknown 'tpi': did you mean 'tpe'",
    "search: {train.lr: [0.1]}\nmetric: mAP": "metric: unknown 'mAP'",
    "search: {train.lr: [0.1]}\nseed: true": "seed: expected a whole number",
    "search: {train.lr: [0.1]}\nretries: -1": "retries: at least 0",
    "search: {train.lr: [0.1]}\nset: {train.lr: 0.2}": "stands in `set` and in `search`",
    "search: {train.lr: [0.1]}\npoints: [{train.lr: 0.2}]": "either `search`",
    "set: {train.epochs: 3}": "either `search`",
    "points:\n  - {train.lr: 0.2}\n  - {train.lrr: 0.3}": "line 3: .*did you mean 'train.lr'",
    "points: [3]": "each is a mapping",
    "search: {model.gains.bx: [5]}": "yolox-nano has no such loss term",
    "search: {model.gians.box: [5]}": "did you mean 'model.gains'",
    "search: {train.lr: [0.1]}\nfull: {train.epoch: 100}": "line 2: .*did you mean 'train.epochs'",
    "search: {train.lr: [0.1]}\nconfig: nowhere.yaml": "line 2: config: nowhere.yaml: no such file",
    "search: {train.lr: [0.1]}\nparameters: {frame: 2}": "no parameter 'frame': did you mean 'frames'",
    "search: {train.lr: [0.1]}\njob: trian": "unknown job 'trian': did you mean 'train'",
    "search: [1, 2]": "search: expected a mapping",
    "- 1": "expected fields",
    "search: {train.lr: [0.1": "not valid YAML",
    "search: {train.seed: [" + ", ".join(map(str, range(1001))) + "]}": "a grid of 1001 trainings; 1000 at most",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_one_line_with_the_file(text, tmp_path):
    with pytest.raises(InputError, match=WRONG[text]) as e: read_sweep(written(tmp_path, text))
    assert "\n" not in str(e.value) and "s.yaml" in str(e.value)


def test_two_settings_that_do_not_go_together_are_found_before_a_trial(tmp_path):
    "Right alone, wrong for one of the four points: the loss term is another family's."
    text = "search:\n  model.name: [yolox-nano, yolov8n]\n  model.gains.dfl: [1, 2]\n"
    with pytest.raises(InputError, match="model.gains.dfl: yolox-nano has no such loss term"):
        read_sweep(written(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="did you mean 'p2_small_objects'"): read_sweep("p2_small_object")


def test_the_config_is_found_beside_the_file(tmp_path, monkeypatch):
    (tmp_path/"base.yaml").write_text("train: {epochs: 7}\n")
    path = written(tmp_path, "config: base.yaml\nsearch: {train.lr: [0.1]}\n")
    monkeypatch.chdir("/")
    assert load_config(read_sweep(path).config).train.epochs == 7


@given(low=st.integers(0, 50), width=st.integers(1, 40), step=st.integers(1, 5), seed=st.integers(0, 99))
def test_what_is_drawn_lies_in_the_range(low, width, step, seed):
    high = low + width
    rng = rng_for(seed)
    assert low <= Dimension("a.b", low=low, high=high).draw(rng) <= high
    stepped = Dimension("a.b", low=low, high=high, step=min(step, width)).draw(rng)
    assert low <= stepped <= high and (stepped - low) % min(step, width) == 0
    assert low <= Dimension("a.b", low=float(low), high=float(high)).draw(rng) <= high
    logarithmic = Dimension("a.b", low=low + 1, high=high + 1, log=True).draw(rng)
    assert isinstance(logarithmic, int) and low + 1 <= logarithmic <= high + 1


def test_more_random_trials_begin_with_the_same(tmp_path):
    text = "search: {train.lr: {low: 0.001, high: 0.1, log: true}, augment.mosaic: [0, 1]}\nmethod: random\ntrials: "
    few = random_points(read_sweep(written(tmp_path, text + "3")))
    many = random_points(read_sweep(written(tmp_path, text + "9")))
    assert many[:3] == few and len({p["train.lr"] for p in many}) == 9


def test_the_fingerprint_is_of_what_is_trained(tmp_path):
    text = "search: {train.lr: [0.1, 0.2]}\n"
    first = read_sweep(written(tmp_path, text)).fingerprint()
    assert read_sweep(written(tmp_path, text + "limit_minutes: 9\nfull: {train.epochs: 3}")).fingerprint() == first
    for more in ("set: {train.epochs: 3}", "metric: AP50", "split: test", "job: benchmark", "seed: 1"):
        assert read_sweep(written(tmp_path, text + more)).fingerprint() != first


def test_the_shipped_grid_is_the_plan():
    "Nine points; the first four settings in L9: each pair of values of two of them once; the others balanced."
    sweep = read_sweep(REPO/"configs"/"sweeps"/"p2_small_objects.yaml")
    points = grid_points(sweep)
    plan = {"train.lr": {.008, .01, .012}, "train.warmup_epochs": {3, 5, 7}, "model.gains.box": {8, 10, 12},
            "model.gains.dfl": {1.5, 2, 2.5}}
    assert len(points) == 9
    for key, values in plan.items(): assert {p[key] for p in points} == values
    for a, b in itertools.combinations(plan, 2): assert len({(p[a], p[b]) for p in points}) == 9
    for key in ("augment.mosaic_scale", "augment.copy_paste"):
        column = [str(p[key]) for p in points]
        assert sorted(column.count(value) for value in set(column)) == [3, 3, 3]
    cfg = load_config(sweep.config or None, override_words(trial_overrides(sweep, points[0])))
    full = load_config(sweep.config or None, override_words(trial_overrides(sweep, points[0], full=True)))
    assert (cfg.train.epochs, full.train.epochs, cfg.model.name) == (20, 100, "yolo11n-p2")
    assert cfg.model.gains == {"box": 8, "dfl": 1.5}
