"""Gates: three answers, conditions and watches as text, figures that are kept."""
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jetson_det.core import InputError
from jetson_det.data.dataset import DetDataset
from jetson_det.experiments.figures import (PhaseFigures, Reading, ValFigures, predicted_ratio, read_detections,
                                            rounds_needed, save_detections, time_rounds)
from jetson_det.experiments.gates import (Watcher, answer_gate, answer_reading, memory_in, parse_condition,
                                          parse_watch)
from jetson_det.runtime.postprocess import Detections

unit = st.floats(0, 1)


@given(st.tuples(unit, unit, unit).map(sorted), unit)
def test_an_answer_is_of_the_whole_interval(ends, limit):
    low, value, high = ends
    condition = parse_condition(f"AP >= {limit:.17f}")
    answer = answer_reading(condition, Reading(value, low, high, "", 100))
    if answer.answer == "yes": assert low >= condition.number
    elif answer.answer == "no": assert high < condition.number
    else: assert low < condition.number <= high
    assert bool(answer.decide) == (answer.answer == "not shown")


@given(st.tuples(unit, unit, unit).map(sorted), unit)
def test_at_most_mirrors_at_least(ends, limit):
    low, value, high = ends
    least = answer_reading(parse_condition(f"AP >= {limit:.17f}"), Reading(value, low, high, "", 100)).answer
    time = parse_condition("time <= 1 ms")._replace(number=-parse_condition(f"AP >= {limit:.17f}").number)
    assert answer_reading(time, Reading(-value, -high, -low, "measured")).answer == least


@given(st.floats(.6, .8), st.floats(.01, .1), st.integers(10, 2000))
def test_so_many_images_would_decide(value, half, images):
    "An interval that is narrower by the square root of the images reaches the threshold's other side."
    condition = parse_condition("AP >= 0.59")
    answer = answer_reading(condition, Reading(value, value - half, value + half, "", images))
    if answer.answer == "yes" or "practical size" in answer.decide: return
    needed = int(answer.decide.split()[1].replace(",", ""))
    narrower = half*math.sqrt(images/needed)
    assert answer_reading(condition, Reading(value, value - narrower, value + narrower, "", needed)).answer == "yes"
    assert needed > images


def test_no_interval_no_answer():
    condition = parse_condition("AP of Sack >= .5")
    assert answer_reading(condition, Reading(.9, None, None, "", 3)).answer == "not shown"
    assert answer_reading(condition, Reading(None, None, None, "", 0)).answer == "not shown"


class Given:
    def __init__(self, **answers): self.answers = answers

    def ap(self, phase, figure): return self.answers[figure]


YES, NO, OPEN = (Reading(.8, .7, .9, "", 50), Reading(.2, .1, .3, "", 50), Reading(.5, .4, .6, "", 50))


@pytest.mark.parametrize("readings, verdict", [((YES, YES), "yes"), ((YES, OPEN), "not shown"), ((OPEN, NO), "no"),
                                               ((NO, YES), "no"), ((OPEN, OPEN), "not shown")])
def test_all_conditions_must_hold(readings, verdict):
    conditions = [parse_condition("AP >= .5"), parse_condition("AP50 >= .5")]
    answer, each = answer_gate(conditions, "light", Given(AP=readings[0], AP50=readings[1]))
    assert answer.answer == verdict and len(each) == 2


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text):
    for parse in (parse_condition, parse_watch):
        try: parse(text)
        except InputError as e: assert "\n" not in str(e)


@pytest.mark.parametrize("text, hint", [
    ("AP >= 91.5", "write 0.915"), ("AP <= .9", "write >="), ("time >= 3 ms", "write <="), ("time <= 3", "unit, ms"),
    ("size <= 3 ms", "unit, MB"), ("AP50 >= .9 ms", "no unit"), ("map >= .9", "did you mean 'AP'"),
    ("AP", "one such as"), ("AP >= 2 * base", "cannot be read"), ("size <= base", "cannot be read"),
    ("AP >= base + 5", "0 to 1"), (.9, "one such as"), (None, "one such as"), ("AP of  >= .5", "one such as")])
def test_wrong_conditions(text, hint):
    with pytest.raises(InputError, match=hint.replace("(", r"\(")): parse_condition(text)


@pytest.mark.parametrize("text, hint", [
    ("memory <= 18", "unit, GB"), ("AP50 > .99", "by which epoch"), ("AP50 > 99 by epoch 5", "0 to 1"),
    ("lost < 3", "did you mean 'loss'"), ("loss < 3 GB", "has no unit"), ("no nans", "one such as"),
    (3, "one such as")])
def test_wrong_watches(text, hint):
    with pytest.raises(InputError, match=hint): parse_watch(text)


def test_a_watch_waits_for_its_epoch_and_takes_the_best():
    watcher = Watcher([parse_watch("AP50 > .9 by epoch 3")], memory=None)
    assert watcher({"epoch": 1, "AP50": .95, "loss": 2.}) is None
    assert watcher({"epoch": 2, "AP50": .2, "loss": 2.}) is None
    assert watcher({"epoch": 3, "AP50": None, "loss": 2.}) is None
    late = Watcher([parse_watch("AP50 > .9 by epoch 3")], memory=None)
    assert "not measured" in late({"epoch": 4, "AP50": "", "loss": 2.})


@pytest.mark.parametrize("loss", ["nan", "inf", "-inf", float("nan")])
def test_a_loss_that_is_not_finite(loss):
    assert "loss is" in Watcher([parse_watch("no NaN")], memory=None)({"epoch": 1, "loss": loss, "AP": None})


def test_memory_of_the_fullest_gpu(tmp_path):
    (tmp_path/"resources.csv").write_text("step,ram_mb,gpu0_mb,gpu1_mb\n1,500,900,1700\n2,500,1900,1800\n3,50")
    assert memory_in(tmp_path) == 1.9 # the last whole row
    assert Watcher([parse_watch("memory <= 1.8 GB")], lambda: memory_in(tmp_path))({"epoch": 1})
    (tmp_path/"resources.csv").write_text("")
    assert memory_in(tmp_path) is None
    assert Watcher([parse_watch("memory <= 1 GB")], lambda: None)({"epoch": 1}) is None # not known: goes on


@settings(max_examples=20)
@given(st.lists(st.integers(0, 4), max_size=6), st.text("0123456789abcdef ", max_size=8))
def test_detections_are_kept(tmp_path_factory, counts, key):
    rng = np.random.default_rng(len(counts))
    found = []
    for n in counts:
        found.append(Detections(rng.random((n, 4), np.float32), rng.random(n, np.float32), rng.integers(0, 3, n)))
    path = save_detections(tmp_path_factory.mktemp("found")/"found.npz", found, key)
    back = read_detections(path, key)
    assert [len(d.scores) for d in back] == counts
    for one, other in zip(found, back): assert all(np.array_equal(a, b) for a, b in zip(one, other))
    assert read_detections(path, key + "x") is None


def test_damaged_detections(tmp_path):
    path = save_detections(tmp_path/"found.npz", [Detections(np.zeros((1, 4)), np.ones(1), np.zeros(1, int))])
    whole = path.read_bytes()
    for data in (whole[:100], b"", b"PK", whole.replace(b"scores", b"scares")):
        path.write_bytes(data)
        with pytest.raises(InputError, match="damaged"): read_detections(path)


def images(n, tmp_path):
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 60, (n, 2))
    boxes = np.hstack([corner, corner + 30])
    return DetDataset(tmp_path, ("Sack",), [f"{i}.jpg" for i in range(n)], [[100, 100]]*n, np.arange(n), boxes,
                      np.zeros(n))


def finding(ds, hit):
    return [Detections(ds.boxes[i:i + k].astype(np.float32), np.full(k, .8, np.float32), np.zeros(k, np.int64))
            for i, k in enumerate(hit.astype(int))]


def test_a_paired_difference_is_of_the_same_images(tmp_path):
    ds = images(60, tmp_path)
    rng = np.random.default_rng(1)
    hit = rng.random(60) < .7
    figures = ValFigures(ds, resamples=300)
    figures.add("a", finding(ds, hit))
    figures.add("b", finding(ds, hit))
    fewer = hit.copy()
    fewer[np.flatnonzero(hit)[:4]] = False
    figures.add("c", finding(ds, fewer))
    same = figures.difference("b", "a")
    assert (same.value, same.low, same.high) == (0, 0, 0)
    apart = figures.difference("c", "a")
    single = figures.reading("a")
    assert apart.high < 0 and apart.high - apart.low < single.high - single.low


@pytest.mark.slow
def test_wrong_answers_are_as_rare_as_the_level_says(tmp_path):
    """A detector that finds each box with the chance of the threshold: yes and no are both wrong there, as often as the
    level allows. The AP of such a detector is about its recall, so the threshold is the mean AP of the simulation."""
    rng = np.random.default_rng(2)
    ds = images(80, tmp_path)
    readings = []
    for _ in range(300):
        figures = ValFigures(ds, level=.9, resamples=300)
        figures.add("a", finding(ds, rng.random(80) < .8))
        readings.append(figures.reading("a"))
    truth = np.mean([one.value for one in readings])
    condition = parse_condition(f"AP >= {truth:.6f}")
    answers = [answer_reading(condition, one).answer for one in readings]
    print({answer: answers.count(answer) for answer in ("yes", "no", "not shown")})
    assert answers.count("yes") <= .09*300 and answers.count("no") <= .09*300 # 5 % each, and three standard errors


def test_the_ratio_of_predictions():
    sizes = ((416, 416), (640, 640))
    ratio = predicted_ratio("yolox-nano", "yolox-s", "orin-nano", input_sizes=sizes)
    back = predicted_ratio("yolox-s", "yolox-nano", "orin-nano", input_sizes=sizes[::-1])
    assert ratio.low < ratio.value < ratio.high < 1
    assert np.allclose([ratio.value, ratio.low, ratio.high], [1/back.value, 1/back.high, 1/back.low])
    same = predicted_ratio("yolox-s", "yolox-s", "orin-nano", input_sizes=sizes[1:]*2)
    assert same.value == 1 and same.low < 1 < same.high


@given(st.floats(.5, .995))
def test_rounds_of_a_level(level):
    n = rounds_needed(level)
    assert 1 - 2**(1 - n) >= level - 1e-9
    assert n == 2 or 1 - 2**(2 - n) < level


def test_models_are_timed_in_turns():
    calls = []

    class Session:
        def __init__(self, name): self.name = name

        def __call__(self, frame):
            calls.append(self.name)
            self.timings = {"a": .001, "b": .002}
    times = time_rounds({name: Session(name) for name in "xy"}, ["frame"]*2, rounds=3)
    assert calls == list("xy") + list("xxyy")*3
    assert np.allclose(times["x"], 3.)


def test_measured_and_predicted_times_say_which(tmp_path, monkeypatch):
    figures = PhaseFigures(ValFigures(images(10, tmp_path)))
    given = {"a": np.array([4., 4.2, 4.1, 4.3, 4.]), "b": np.array([8., 8.2, 8.4, 8.3, 8.1])}
    monkeypatch.setattr(figures, "_measured", lambda *names: {name: given[name] for name in names})
    ratio = figures.time_ratio("a", "b")
    assert ratio.how.startswith("measured here") and ratio.low <= ratio.value <= ratio.high < .53
    assert figures.time("b").value == 8.2
