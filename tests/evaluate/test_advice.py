"What the sentences say, when they are silent, and their order."
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jetson_det.core import InputError
from jetson_det.data.dataset import DetDataset
from jetson_det.evaluate.advice import RULES, BoardCost, advice
from jetson_det.evaluate.coco import area_factors, average_precision, coco_stats, stride_bins
from jetson_det.runtime.geometry import as_detections

TYPES = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")


def result_of(counts=(60, 60), recall=(1., 1.), classes=("sack", "person"), detector=None):
    "An evaluation with so many boxes of each class, one an image, of which a share is found."
    labels = np.repeat(np.arange(len(counts)), counts)
    n = len(labels)
    ds = DetDataset(".", classes, [f"{i}.jpg" for i in range(n)], [[100, 100]] * n, np.arange(n),
                    [[20, 20, 60, 60]] * n, labels)
    found = []
    turn = np.concatenate([np.arange(count) / count for count in counts])
    for i in range(n):
        k = labels[i]
        boxes = [[20, 20, 60, 60]] if turn[i] < recall[k] else np.zeros((0, 4))
        found.append(as_detections(boxes, [.9] * len(boxes), [k] * len(boxes)))
    return coco_stats(ds, found, detector)


def names(rows): return [row.rule for row in rows]


def intervals(whole, **classes):
    "What evaluate.intervals gives, as far as advice reads it."
    row = lambda name, parts: SimpleNamespace(name=name, value=parts[0], low=parts[1], high=parts[2])
    return SimpleNamespace(stats=[row("AP", whole)], per_class=[row(name, parts) for name, parts in classes.items()])


def test_a_perfect_result_has_no_advice():
    zeros = dict.fromkeys(TYPES, 0.)
    bins = [dict(low=0, high=16, boxes=60, AP=1.), dict(low=16, high=None, boxes=60, AP=1.)]
    assert advice(result_of(), zeros, bins, suspects=dict(missing=0), confusion=np.diag([60, 60, 0]), training_ap=1.,
                  intervals=intervals((1., 1., 1.), sack=(1., 1., 1.), person=(1., 1., 1.))) == []


@pytest.mark.parametrize("name,rule", [("Dupe", "duplicates"), ("Bkg", "background"), ("Loc", "localization"),
                                       ("Miss", "misses")])
def test_a_cost_speaks_only_where_it_is_shown(name, rule):
    r = result_of()
    row, = advice(r, {name: .05})
    assert row.rule == rule and row.gain == .05 and "0.05" in row.text
    row, = advice(r, {name: (.05, .02, .08)})
    assert "0.05 (0.02 to 0.08)" in row.text
    assert advice(r, {name: (.05, -.01, .11)}) == []
    assert advice(r, {name: .005}) == []


def test_a_rare_class_needs_a_shown_difference():
    r = result_of((300, 20), (1., .3))
    row, = [row for row in advice(r) if row.rule == "rare class"]
    assert "person" in row.text and "20 boxes" in row.text
    assert row.gain == pytest.approx((r.per_class[0]["AP"] - r.per_class[1]["AP"]) / 2)
    unsure = intervals((.65, .6, .7), sack=(1., 1., 1.), person=(.3, .05, .98))
    rows = advice(r, intervals=unsure)
    assert "rare class" not in names(rows)
    row, = [row for row in rows if row.rule == "too few images"]
    # half the interval is .465, wanted .05: 20 * (.465 / .05)**2
    assert row.figures["wanted"] == 1730 and "0.30 (0.05 to 0.98)" in row.text
    sure = intervals((.65, .6, .7), sack=(1., 1., 1.), person=(.3, .25, .35))
    assert names(advice(r, intervals=sure)) == ["rare class"]


def test_small_objects_name_their_size_and_the_next_input():
    bins = [dict(low=0, high=16, boxes=30, AP=.1), dict(low=16, high=32, boxes=30, AP=.4),
            dict(low=32, high=None, boxes=60, AP=.7)]
    row, = advice(result_of(), sizes=bins, input_size=(416, 416))
    assert row.rule == "small objects" and row.gain == pytest.approx(.25 * .6)
    for part in ("640x640 instead of 416x416", "under 16 network pixels", "0.10", "0.70", "25%"):
        assert part in row.text
    bins[0]["AP"] = (.1, 0., .65)
    assert advice(result_of(), sizes=bins) == [] # the interval reaches the large ones'
    assert advice(result_of(), sizes=bins[:1]) == []


def test_it_takes_the_bins_that_the_evaluation_counts():
    n = 40
    ds = DetDataset(".", ("sack",), [f"{i}.jpg" for i in range(n)], [[400, 400]] * n, np.repeat(np.arange(n), 2),
                    [[10, 10, 30, 30], [100, 100, 300, 300]] * n, [0] * 2 * n)
    found = [as_detections([[100, 100, 300, 300]], [.9], [0])] * n # none of the small ones: 10 network pixels
    bins = average_precision(ds, found, bins=stride_bins(), factors=area_factors(ds.sizes, (200, 200)))
    row, = [row for row in advice(coco_stats(ds, found), sizes=bins) if row.rule == "small objects"]
    assert "objects of 8 to 16 network pixels have an AP of 0.00, those of 64 to 128 network pixels 1.00" in row.text
    assert "50% of the boxes" in row.text and row.gain == pytest.approx(.5)


def test_confused_classes_need_more_than_chance():
    table = np.array([[50, 10, 0], [1, 59, 0], [0, 0, 0]])
    row, = advice(result_of(), dict(Cls=.08), confusion=table)
    assert "10 of 60 sack (17%) are taken for person" in row.text
    assert row.gain == pytest.approx(.08 * 10 / 11) # the share of this pair
    assert advice(result_of(), dict(Cls=(.08, -.01, .1)), confusion=table) == []
    for row in ((58, 2, 0), (145, 5, 0)): # few; 3 % of 150, whose interval begins at 1.4 %
        table[0] = row
        row, = advice(result_of(), dict(Cls=.08), confusion=table)
        assert row.rule == "wrong classes" and "none stands out" in row.text


def test_labels_overfit_unknown_and_cut_off():
    r = result_of()
    row, = advice(r, suspects=dict(missing=6, shifted=6, spurious=0))
    assert row.rule == "label errors" and row.text.startswith("Check 12 labels (10.0% of 120)")
    assert row.text.endswith("or more: 6 missing, 6 shifted.")
    half = result_of(recall=(.5, .5))
    assert names(advice(half, training_ap=.95)) == ["overfit"]
    assert "overfit" not in names(advice(half, training_ap=.95, intervals=intervals((.5, .1, .9))))
    rows = advice(result_of(recall=(1., 0.), detector=("sack",)))
    row, = [row for row in rows if row.rule == "unknown classes"]
    assert "person" in row.text and "60 boxes" in row.text and row.gain == pytest.approx(.5)
    r.over_limit = [("a.jpg", "sack", 150)]
    row, = advice(r)
    assert "from 100 to 150" in row.text and row.gain is None


def test_the_largest_gain_comes_first_and_unknown_ones_last():
    r = result_of()
    r.over_limit = [("a.jpg", "sack", 150)]
    rows = advice(r, dict(Dupe=.02, Bkg=.3, Loc=.1))
    assert names(rows) == ["background", "localization", "duplicates", "cut off"]


number = st.floats(-.2, 1)
cost = st.one_of(number, st.tuples(number, number, number))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(TYPES), cost), st.lists(st.integers(0, 30), min_size=9, max_size=9),
       st.lists(st.tuples(st.integers(0, 50), cost), max_size=3), st.integers(0, 200), st.one_of(st.none(), number))
def test_every_sentence_has_figures_and_json_holds_it(errors, table, bins, suspects, training):
    sizes = [dict(low=16 * k, high=16 * (k + 1), boxes=boxes, AP=AP) for k, (boxes, AP) in enumerate(bins)]
    rows = advice(RESULT, errors, sizes, suspects=dict(missing=suspects), confusion=np.reshape(table, (3, 3)),
                  training_ap=training)
    for row in rows:
        assert re.search(r"\d", row.text) and "{" not in row.text and "nan" not in row.text
        assert row.figures
        json.dumps(row._asdict(), allow_nan=False)
    gains = [row.gain for row in rows if row.gain is not None]
    assert gains == sorted(gains, reverse=True)


RESULT = result_of((60, 12), (.9, .4))


def test_what_makes_the_figures_doubtful_comes_first():
    r = result_of()
    leaks = dict(images=120, learned=30, alike=2, rest=88, AP=(.4, .3, .5))
    rows = advice(r, dict(Miss=.3), leaks=leaks)
    assert names(rows) == ["leakage", "misses"]
    doubtful = advice(r, dict(Miss=.3, Bkg=.2), leaks=leaks, unlabeled=dict(false=40, likely=20))
    assert names(doubtful) == ["leakage", "unlabeled objects", "misses"]
    for part in ("of these 120, the training learned from 30 and 2 are nearly", "On the other 88 AP is 0.40 (0.30"):
        assert part in rows[0].text
    assert advice(r, leaks=dict(leaks, learned=0, alike=0)) == []
    row, = advice(r, leaks=dict(leaks, learned=120, alike=0, AP=None))
    assert row.text.endswith("the figures are too good.")


def test_unlabeled_objects_come_before_empty_images():
    r = result_of()
    rows = advice(r, dict(Bkg=(.1, .05, .2), Miss=.3), unlabeled=dict(false=40, likely=20))
    assert names(rows) == ["unlabeled objects", "misses"] and rows[0].gain == pytest.approx(.05)
    assert "20 of 40 false detections" in rows[0].text
    assert names(advice(r, dict(Bkg=.1), unlabeled=dict(false=40, likely=9))) == ["background"]
    assert names(advice(r, dict(Bkg=.1), unlabeled=dict(false=2, likely=2))) == ["background"] # two show nothing
    assert advice(r, dict(Bkg=(.1, -.01, .2)), unlabeled=dict(false=40, likely=20)) == []


def test_a_threshold_must_gain_where_it_was_not_chosen():
    threshold = dict(now=.25, best=.6, F1_now=.5, F1=.7, gain=(.2, .1, .3))
    row, = advice(result_of(), threshold=threshold)
    assert row.rule == "threshold" and row.gain == .2 and row.text.endswith("up to 0.20 F1.")
    assert "0.60 instead of 0.25" in row.text and "0.20 (0.10 to 0.30)" in row.text
    assert advice(result_of(), threshold=dict(threshold, gain=(.2, -.1, .5))) == []
    assert advice(result_of(), threshold=dict(threshold, gain=(.005, .004, .006))) == []


BINS = [dict(low=0, high=16, boxes=60, AP=(.1, 0., .2)), dict(low=16, high=None, boxes=60, AP=(.7, .6, .8))]


@pytest.mark.parametrize("size,frame,words", [
    ((416, 416), (720, 960), ["input of 640x640 instead of 416x416", "an image of 720x960 to 43%", "8.0 ms then"]),
    ((416, 416), (480, 640), ["input of 480x640"]), # no larger than the image
    ((416, 416), (2160, 3840), ["tiles (--tiles 1200x2134: 4 for an image", "16.0 ms then, 4.0 ms now (predicted)"]),
    ((640, 640), (480, 640), ["map (stride 4, such as yolo11n-p2-lite)", "no more detail"])])
def test_small_objects_by_what_the_image_has(size, frame, words):
    board = BoardCost("nano, fp16", lambda size: 4. if size == (416, 416) else 8.)
    row, = advice(result_of(), sizes=BINS, input_size=size, frame_size=frame, board=board)
    for part in words: assert part in row.text
    unknown = BoardCost("nano, fp16", lambda size: None)
    row, = advice(result_of(), sizes=BINS, input_size=size, frame_size=frame, board=unknown)
    assert " ms" not in row.text


def test_a_board_that_answers_nonsense_is_refused():
    board = BoardCost("nano", lambda size: float("nan"))
    with pytest.raises(InputError, match="milliseconds on nano"):
        advice(result_of(), sizes=BINS, input_size=(416, 416), frame_size=(720, 960), board=board)


def test_the_worst_class_and_why():
    r = result_of((300, 300), (1., .5))
    costs = dict(sack=dict(Miss=(0., 0., 0.)), person=dict(Miss=(.4, .3, .5), Loc=(.02, -.1, .1)))
    row, = advice(r, class_errors=costs)
    assert row.rule == "worst class" and "person" in row.text
    assert "misses, which cost it 0.40 (0.30 to 0.50)" in row.text
    assert advice(r) == [] # without its errors nothing says why
    assert advice(r, class_errors=dict(person=dict(Miss=(.4, -.3, .5)))) == []
    row, = [row for row in advice(result_of((300, 20), (1., .3)), class_errors=costs) if row.rule == "rare class"]
    assert "most by misses" in row.text


def test_of_one_rule_there_are_a_few_sentences():
    classes = tuple(f"c{k}" for k in range(30))
    r = result_of([200] * 10 + [10] * 20, [1.] * 10 + [.1] * 20, classes)
    rows = [row for row in advice(r) if row.rule == "rare class"]
    assert len(rows) == 3 and rows[-1].text.endswith("So it is with 17 more.")
    wide = intervals((.5, .48, .52), **{name: (.5, .1, .9 - .001 * k) for k, name in enumerate(classes)})
    row, = [row for row in advice(r, intervals=wide) if row.rule == "too few images"]
    assert "AP of c0 is" in row.text and "with 29 more" in row.text
    all_wide = intervals((.5, .2, .8), **{name: (.5, .1, .9) for name in classes})
    row, = [row for row in advice(r, intervals=all_wide) if row.rule == "too few images"]
    assert "all classes" in row.text and "more." not in row.text


def test_nothing_found_is_said():
    row = advice(result_of(recall=(0., 0.)))[0]
    assert row.rule == "nothing found" and "120 images with 120 boxes" in row.text


@pytest.mark.parametrize("kw,words", [
    (dict(errors=dict(Cls=float("nan"))), "errors: Cls is nan"),
    (dict(errors=dict(Dupe="much")), "errors: Dupe is 'much'"),
    (dict(errors=dict(Dupe=(.1, .2))), "give a finite number, or (value, low, high)"),
    (dict(training_ap=float("inf")), "training_ap is inf"),
    (dict(sizes=[dict(low=0, high=16, boxes=3, AP=float("nan"))]), "sizes: AP is nan"),
    (dict(confusion=np.zeros((2, 2))), "confusion has the shape (2, 2); (3, 3) is right")])
def test_what_is_no_figure_is_refused(kw, words):
    with pytest.raises(InputError) as e: advice(RESULT, **kw)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_the_table_is_whole():
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.condition and rule.source and rule.sentence.endswith((".", "}"))
        assert re.search(r"\{\w+", rule.sentence) # a figure
