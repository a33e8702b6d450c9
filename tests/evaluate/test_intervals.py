"Weights on images are images repeated; intervals hold what they say; a test of no difference is seldom alarmed."
import math
from dataclasses import replace

import numpy as np
import pytest

from coco_oracle import pycocotools_stats
from jetson_det.core import InputError, rng_for
from jetson_det.data.dataset import DetDataset
from jetson_det.evaluate.coco import coco_of, coco_results, coco_stats
from jetson_det.evaluate.intervals import (
    METHODS,
    _level_reached,
    _recalls_reached,
    _t_deviations,
    _t_cdf,
    bootstrap_ap,
    difference_of,
    intervals_of,
    learning_curve,
    paired_bootstrap,
    replicate,
    resampling_plan,
    weighted_ap,
)
from jetson_det.evaluate.matching import match, take_images
from simulated_detector import random_problem, repeated, simulated_detector, simulated_images


def hard_way(ds, found, times):
    "pycocotools' AP at each IoU of each class, on the repeated images; NaN where there is nothing to find."
    again, more = repeated(ds, found, times)
    rows = coco_results(more, again.image_ids.tolist())
    p = pycocotools_stats(coco_of(again), rows).eval["precision"][:, :, :, 0, -1]
    return np.where(p[:, 0] < 0, np.nan, p.mean(1))


def test_a_resample_is_images_repeated():
    "60 resamples of 15 problems with crowds and ignored boxes: pycocotools on the repeated images."
    done = 0
    for seed in range(40):
        ds, found = random_problem(seed, images=12)
        ds = replace(ds, image_ids=np.arange(1, len(ds) + 1))
        if len(ds) < 3 or not sum(len(d.scores) for d in found): continue
        rng = rng_for(3, seed)
        times = np.stack([np.bincount(rng.integers(0, len(ds), len(ds)), minlength=len(ds)) for _ in range(4)])
        ap = weighted_ap(match(ds, found), times)
        for row, ours in zip(times, ap):
            if not sum(len(found[i].scores) * row[i] for i in range(len(ds))): continue
            np.testing.assert_allclose(ours, hard_way(ds, found, row), atol=1e-12, rtol=0)
            done += 1
        if done >= 60: break
    assert done >= 60


def test_long_rows_and_short_ones():
    "More than 64 resamples go another way through the sums."
    ds, hard = simulated_images(30)
    m = match(ds, simulated_detector(ds, hard))
    plan = resampling_plan(30, 100)
    whole = weighted_ap(m, plan.weights)
    parts = np.concatenate([weighted_ap(m, plan.weights[k:k + 20]) for k in range(0, len(plan.weights), 20)])
    np.testing.assert_allclose(whole, parts, atol=1e-12, rtol=0)
    np.testing.assert_allclose(whole[5], hard_way(ds, simulated_detector(ds, hard), plan.weights[5].astype(int)),
                               atol=1e-12, rtol=0)


def test_recall_thresholds():
    "How many of 101 are reached, for every count of up to 600 boxes: the comparison of floats that pycocotools makes."
    for boxes in range(1, 601):
        found = np.arange(boxes + 1.)[:, None]
        expected = (np.linspace(0, 1, 101) <= found / boxes).sum(1)
        assert np.array_equal(_recalls_reached(found, np.array([float(boxes)]))[:, 0], expected), boxes


def integrated_t(t, dof):
    "Student's distribution by summing its density."
    x = np.linspace(0, abs(t), 20_001)
    density = np.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2) - (dof + 1) / 2 * np.log1p(x * x / dof))
    half = float(np.sum((density[1:] + density[:-1]) / 2) * (x[1] - x[0])) / math.sqrt(dof * math.pi)
    return .5 + math.copysign(half, t)


def test_students_distribution():
    for dof in (1, 2, 3, 4, 7, 30, 101, 200, 201, 1000):
        for t in (-6, -2.5, -1, 0, .3, 1.7, 4):
            assert abs(_t_cdf(t, dof) - integrated_t(t, dof)) < (1e-7 if dof <= 200 else 1e-5), (t, dof)
    for groups in (2, 5, 40, 3000):
        for level in (.5, .9, .95, .999):
            z = _t_deviations(level, groups)
            t = z / math.sqrt(groups / (groups - 1))
            assert abs(_level_reached(z, groups) - (1 - level)) < 1e-9
            assert t > 100 or abs(integrated_t(t, groups - 1) - (1 + level) / 2) < 1e-5


def test_the_interval_and_the_p_value_agree():
    "0 lies outside the interval of a level exactly where p is under 1 - level."
    ds, hard = simulated_images(60)
    plan = resampling_plan(60, 3000)
    a = replicate(match(ds, simulated_detector(ds, hard)), plan)
    checked = 0
    for seed, spread in enumerate((.06, .07, .08, .1)):
        b = replicate(match(ds, simulated_detector(ds, hard, seed + 1, spread)), plan)
        for method in METHODS:
            rows = difference_of(a, b, .9, method)
            for k, row in enumerate(rows.stats + rows.per_class):
                if not .03 < row.p < .9: continue
                for level, is_out in ((1 - row.p * 1.1, True), (1 - row.p * .9, False)):
                    again = difference_of(a, b, level, method)
                    end = (again.stats + again.per_class)[k]
                    assert (end.low > 0 or end.high < 0) == is_out, (row, end, method)
                    checked += 1
    assert checked > 20


def test_the_same_model_and_the_order():
    ds, hard = simulated_images(50)
    a = match(ds, simulated_detector(ds, hard))
    b = match(ds, simulated_detector(ds, hard, 1))
    same = paired_bootstrap(a, a, 200)
    assert all(row.p == 1 and row.low == row.high == row.value == 0 for row in same.stats + same.per_class)
    there = paired_bootstrap(a, b, 400)
    back = paired_bootstrap(b, a, 400)
    for one, other in zip(there.stats + there.per_class, back.stats + back.per_class):
        assert one.value == -other.value
        np.testing.assert_allclose([one.low, one.high, one.p], [-other.high, -other.low, other.p], atol=1e-9)


def test_pairing_is_surer():
    "The error of the difference is smaller than that of independent models would be."
    ds, hard = simulated_images(200)
    plan = resampling_plan(200, 400)
    a, b = (replicate(match(ds, simulated_detector(ds, hard, seed)), plan) for seed in (0, 1))
    row = difference_of(a, b).stats[0]
    alone = [intervals_of(r).stats[0].error for r in (a, b)]
    assert (row.high - row.low) / (2 * 1.96) < .95 * math.hypot(*alone)


def test_groups_are_drawn_together():
    "Each image twice, as a group: the very figures of the images alone."
    ds, hard = simulated_images(40)
    found = simulated_detector(ds, hard)
    twice, more = repeated(ds, found, np.full(len(ds), 2))
    groups = np.repeat([f"video {k}" for k in range(40)], 2)
    one = bootstrap_ap(match(ds, found), 200)
    two = bootstrap_ap(match(twice, more), 200, groups=groups)
    blind = bootstrap_ap(match(twice, more), 200)
    for a, b, c in zip(one.stats + one.per_class, two.stats + two.per_class, blind.stats):
        np.testing.assert_allclose([a.value, a.low, a.high, a.error], [b.value, b.low, b.high, b.error], atol=1e-9)
        assert a.groups == b.groups
        assert c.error < .85 * a.error # drawing copies one by one makes the figure look surer than it is
    assert two.groups == 40
    plan = resampling_plan(4, 100, groups=["", "", "a", "a"])
    assert plan.groups == 3


def test_all_or_nothing():
    "A perfect detector and one that finds nothing have no spread."
    ds, hard = simulated_images(30)
    found = simulated_detector(ds, hard)
    perfect = []
    for k in range(len(ds)):
        boxes, labels, _ = ds.boxes_of(k)
        perfect.append(found[k]._replace(boxes=boxes, scores=np.ones(len(boxes)), labels=labels))
    nothing = [d._replace(boxes=d.boxes[:0], scores=d.scores[:0], labels=d.labels[:0]) for d in found]
    best = bootstrap_ap(match(ds, perfect), 200).stats[0]
    assert abs(best.value - 1) < 1e-9 and best.low > 1 - 1e-9
    none = bootstrap_ap(match(ds, nothing), 200).stats[0]
    assert (none.value, none.low, none.high) == (0, 0, 0)
    row = paired_bootstrap(match(ds, nothing), match(ds, perfect), 200).stats[0]
    assert row.low > .99 and row.p < .02 # 200 resamples can say no more


def test_a_class_of_few_images():
    "No interval for a class in fewer than five images; no figure for one without boxes."
    ds, hard = simulated_images(25)
    found = simulated_detector(ds, hard)
    rare = replace(ds, labels=np.where(ds.labels == 2, 0, ds.labels))
    result = bootstrap_ap(match(rare, found), 200)
    assert result.per_class[2].value is None and result.per_class[2].low is None
    labels = rare.labels.copy()
    labels[:2] = 2
    few = bootstrap_ap(match(replace(rare, labels=labels), found), 200).per_class[2]
    assert few.value is not None and few.low is None
    assert result.groups_needed(.02, "forklift") is None
    assert "-" in repr(result)


@pytest.mark.parametrize("call, line", [
    (lambda m: bootstrap_ap(m, 10), "resamples is 10"),
    (lambda m: bootstrap_ap(m, level=95), "level is 95"),
    (lambda m: bootstrap_ap(m, method="normal"), "method is 'normal'"),
    (lambda m: bootstrap_ap(m, groups=["a"]), "1 groups for 12 images"),
    (lambda m: bootstrap_ap(m, groups=["a"] * 12), "1 image or group to draw from"),
    (lambda m: bootstrap_ap(m, 100).groups_needed(.02, "boat"), "no figure 'boat'"),
    (lambda m: weighted_ap(m, np.ones(12)), "weights have the shape"),
    (lambda m: paired_bootstrap(m, take_images(m, range(11))), "12 images for A, 11 for B"),
    (lambda m: difference_of(replicate(m, resampling_plan(12, 100)), replicate(m, resampling_plan(12, 100))),
     "the same weights for both"),
])
def test_wrong_calls(call, line):
    ds, hard = simulated_images(12)
    with pytest.raises(InputError, match=line): call(match(ds, simulated_detector(ds, hard)))


def test_other_labels_or_classes():
    ds, hard = simulated_images(20)
    found = simulated_detector(ds, hard)
    m = match(ds, found)
    with pytest.raises(InputError, match="the figures differ"):
        paired_bootstrap(m, match(replace(ds, classes=("a", "b", "c")), found))
    with pytest.raises(InputError, match="the boxes to be found differ"):
        paired_bootstrap(m, match(replace(ds, labels=(ds.labels + 1) % 3), found))
    empty = DetDataset(".", ds.classes, ds.paths, ds.sizes)
    with pytest.raises(InputError, match="no boxes that count"): bootstrap_ap(match(empty, found))


def test_one_iou():
    ds, hard = simulated_images(20)
    result = bootstrap_ap(match(ds, simulated_detector(ds, hard), [.5]), 100)
    assert [row.name for row in result.stats] == ["AP", "AP50"]
    assert result.stats[0].value == result.stats[1].value


def test_learning_curve_finds_a_known_one():
    sizes = np.array([100, 200, 400, 800, 1600])
    ap = .6 - .35 * (100 / sizes)**.5
    curve = learning_curve(sizes, ap, ap - .004, ap + .004)
    for times, images, value in ((2, 3200, .5381), (4, 6400, .5563)):
        at = curve.at[(2, 4).index(times)]
        assert at[0] == images and at[2] < value < at[3] and abs(at[1] - value) < .01
    assert curve.is_enough and curve.gains[0][2] > 0
    flat = learning_curve(sizes, np.full(5, .5), np.full(5, .48), np.full(5, .52))
    assert flat.gains[0][1] < .012


def test_learning_curve_of_too_few_points():
    for sizes in ([500], [500, 1000], [500, 600, 700, 800]):
        ap = np.linspace(.4, .45, len(sizes))
        curve = learning_curve(sizes, ap, ap - .02, ap + .02)
        assert not curve.is_enough and curve.note.startswith("too few points")
    for bad in (([], [], [], []), ([100], [.5], [.4], [np.nan]), ([100], [.5], [.6], [.4]), ([0], [.5], [.4], [.6]),
                ([100, 200], [.5], [.4], [.6]), ([100], [1.5], [.4], [.6])):
        with pytest.raises(InputError): learning_curve(*bad)


def coverage(images, sets, resamples, level=.9, seed=11):
    "Share of simulated sets whose interval holds the true value: for each method and figure."
    population, hard = simulated_images(20_000)
    everything = match(population, simulated_detector(population, hard))
    true = weighted_ap(everything, np.ones((1, 20_000)))[0]
    true = [true.mean(), true[0].mean(), true[5].mean(), *true.mean(0)]
    rng = rng_for(12, seed)
    inside = {}
    too_high = []
    for k in range(sets):
        some = take_images(everything, rng.choice(20_000, images, replace=False))
        r = replicate(some, resampling_plan(images, resamples, seed=k))
        too_high.append(r.values[0, 0] - true[0])
        for method in ("percentile", "bca"):
            rows = intervals_of(r, level, method)
            for row, value in zip(rows.stats + rows.per_class, true):
                if row.low is not None: inside.setdefault((method, row.name), []).append(row.low <= value <= row.high)
    shares = {key: float(np.mean(v)) for key, v in inside.items()}
    print(images, "images: AP too high by", round(float(np.mean(too_high)), 4))
    for key, share in shares.items(): print(*key, round(share, 3))
    return shares


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("images, sets", [(20, 1000), (100, 1000), (500, 300)])
def test_coverage(images, sets):
    """Intervals of 90 % hold the true value in 88 to 92 % of simulated sets, give or take what `sets` of them can tell;
    the percentile interval does not."""
    shares = coverage(images, sets, 400)
    slack = 2 * math.sqrt(.09 / sets)
    for name in ("AP", "AP50", "AP75", "sack", "person", "forklift"):
        assert .88 - slack < shares["bca", name] < .92 + slack, name
    if images <= 100: assert shares["percentile", "AP"] < .88


def differences(images, pairs, resamples, spread=.06):
    """Of pairs of detectors on simulated sets: shares in which p < .05, and in which the interval of 90 % holds the
    true difference."""
    population, hard = simulated_images(20_000)
    a = match(population, simulated_detector(population, hard))
    b = match(population, simulated_detector(population, hard, 1, spread))
    ones = np.ones((1, 20_000))
    true = float(weighted_ap(b, ones).mean() - weighted_ap(a, ones).mean())
    rng = rng_for(13, images)
    p = []
    inside = []
    for k in range(pairs):
        some = rng.choice(20_000, images, replace=False)
        plan = resampling_plan(images, resamples, seed=k)
        row = difference_of(*(replicate(take_images(m, some), plan) for m in (a, b)), level=.9).stats[0]
        p.append(row.p)
        inside.append(row.low <= true <= row.high)
    figures = float(np.mean(np.array(p) < .05)), float(np.mean(inside))
    print(images, "images, spread", spread, "true difference", round(true, 4), "p < .05, inside:", *figures)
    return figures


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("images, pairs", [(20, 1000), (100, 600), (500, 200)])
def test_false_alarms(images, pairs):
    "Two detectors that do not differ: at most one false alarm in twenty, give or take what `pairs` of them can tell."
    alarms, inside = differences(images, pairs, 400)
    slack = 2 * math.sqrt(.05 * .95 / pairs)
    assert .02 < alarms < .05 + slack
    assert .88 - 1.5 * slack < inside < .92 + 1.5 * slack


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_difference_is_found():
    "Of two detectors that do differ, the interval holds the true difference, and 100 images mostly show it."
    alarms, inside = differences(100, 300, 400, spread=.1)
    assert alarms > .8 and .86 < inside < .95


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("images, sets", [(20, 500), (60, 400), (200, 150)])
def test_another_population(images, sets):
    "Images that had no part in choosing the methods: eight boxes on average, most in few images, looser detections."
    n = 12_000
    rng = rng_for(501)
    image = np.repeat(np.arange(n), rng.poisson(8 * rng.gamma(1, 1, n)))
    corner = rng.uniform(0, 500, (len(image), 2))
    boxes = np.hstack([corner, corner + rng.uniform(8, 200, (len(image), 2))])
    labels = rng.choice(3, len(image), p=[.45, .4, .15])
    population = DetDataset(".", ("sack", "person", "forklift"), [f"{i}.jpg" for i in range(n)], [[640, 640]] * n,
                            image, boxes, labels)
    hard = rng.normal(.5, 1.2, n)
    both = [match(population, simulated_detector(population, hard, seed, .09)) for seed in (21, 22)]
    true = [float(weighted_ap(m, np.ones((1, n))).mean()) for m in both]
    rng = rng_for(502, images)
    seen = []
    for k in range(sets):
        some = rng.choice(n, images, replace=False)
        plan = resampling_plan(images, 400, seed=k)
        a, b = (replicate(take_images(m, some), plan) for m in both)
        ap = intervals_of(a, .9).stats[0]
        plain = intervals_of(a, .9, "percentile").stats[0]
        row = difference_of(a, b, .9).stats[0]
        seen.append((plain.low <= true[0] <= plain.high, ap.low <= true[0] <= ap.high,
                     row.low <= true[1] - true[0] <= row.high, row.p < .05))
    percentile, bca, difference, alarms = np.mean(seen, 0).tolist()
    print(images, "images: percentile", percentile, "bca", bca, "difference", difference, "p < .05", alarms)
    slack = 2 * math.sqrt(.09 / sets)
    assert .88 - slack < bca < .92 + slack and .88 - slack < difference < .93 + slack
    assert alarms < .05 + 2 * math.sqrt(.05 * .95 / sets)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_videos():
    "Of 40 videos of 10 images, as hard as each other within a video: drawn as groups the interval holds, else not."
    population, _ = simulated_images(20_000)
    hard = np.repeat(rng_for(15).normal(0, 1.2, 2000), 10)
    everything = match(population, simulated_detector(population, hard))
    true = weighted_ap(everything, np.ones((1, 20_000)))[0].mean()
    rng = rng_for(16)
    inside = {"groups": 0, "images": 0}
    for k in range(300):
        some = (rng.choice(2000, 40, replace=False)[:, None] * 10 + np.arange(10)).reshape(-1)
        m = take_images(everything, some)
        for name, groups in (("groups", np.repeat(np.arange(40), 10)), ("images", None)):
            row = bootstrap_ap(m, 300, .9, k, groups).stats[0]
            inside[name] += row.low <= true <= row.high
    print("40 videos of 10 images: inside", {name: n / 300 for name, n in inside.items()})
    assert inside["groups"] > .86 * 300 and inside["images"] < .82 * 300


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_learning_curve_coverage():
    "Intervals of 90 % for twice the images hold the true value, over random curves."
    rng = rng_for(14)
    inside = []
    for k in range(500):
        limit = rng.uniform(.3, .8)
        drop = rng.uniform(.05, limit)
        c = math.exp(rng.uniform(math.log(.1), math.log(2)))
        sizes = np.array([125, 250, 500, 1000])
        true = limit - drop * (125. / np.append(sizes, 2000))**c
        ap = np.clip(true[:4] + rng.normal(0, .01, 4), 0, 1)
        curve = learning_curve(sizes, ap, ap - .0196, ap + .0196, seed=k)
        inside.append(curve.at[0][2] <= true[4] <= curve.at[0][3])
    print("learning curve: inside", np.mean(inside))
    assert .86 < np.mean(inside) < .94


def test_the_table_is_whole():
    ds, hard = simulated_images(15)
    found = simulated_detector(ds, hard)
    result = bootstrap_ap(match(ds, found), 100)
    assert abs(result.stats[0].value - coco_stats(ds, found).stats["AP"]) < 1e-12
    assert set(result.to_dict()) == {"stats", "per_class", "level", "resamples", "groups", "method"}
    assert "90% intervals" in repr(bootstrap_ap(match(ds, found), 100, level=.9))
