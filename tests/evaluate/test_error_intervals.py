"Costs of mistakes under weights are those of images repeated; their intervals hold what they say."
import numpy as np
import pytest

from jetson_det.core import InputError, rng_for
from jetson_det.data.dataset import DetDataset
from jetson_det.evaluate.error_intervals import _gains, _mended_curves, bootstrap_errors
from jetson_det.evaluate.errors import KINDS, error_types
from simulated_detector import random_problem, repeated, simulated_detector, simulated_images
from tide_oracle import problem


def assert_same(ds, found, times):
    "Weighted and repeated give the same costs, over all and of each class."
    gains = _gains(_mended_curves(error_types(ds, found)), times)
    for k, row in enumerate(times):
        hard = error_types(*repeated(ds, found, row))
        for name, (over_all, of_class) in gains.items():
            np.testing.assert_allclose(over_all[k], hard.cost[name], atol=1e-12, err_msg=name)
            expected = [np.nan if c["cost"][name] is None else c["cost"][name] for c in hard.per_class]
            np.testing.assert_allclose(of_class[k], expected, atol=1e-12, err_msg=name)


def test_costs_of_a_resample_are_those_of_images_repeated():
    "Six kinds, FP, FN, each class: 80 resamples of 20 problems with mistakes of all kinds, and their jackknife."
    seen = dict.fromkeys(KINDS, 0)
    for seed in range(20):
        ds, found = problem(seed)
        rng = rng_for(5, seed)
        times = np.stack([np.bincount(rng.integers(0, len(ds), len(ds)), minlength=len(ds)) for _ in range(3)])
        times = np.vstack([times, np.arange(len(ds)) != 1])
        assert_same(ds, found, times[times.sum(1) > 0])
        for name, n in error_types(ds, found).count.items():
            if name in seen: seen[name] += n
    assert min(seen.values()) > 20, seen


def test_crowds_ignored_boxes_and_classes_without_boxes():
    "Random problems of other kinds: classes vanish in resamples, images are without boxes."
    done = 0
    for seed in range(30):
        ds, found = random_problem(seed, images=8)
        try: error_types(ds, found)
        except InputError: continue
        rng = rng_for(6, seed)
        for row in rng.integers(0, 3, (3, len(ds))):
            try: error_types(*repeated(ds, found, row))
            except InputError: continue # no boxes in this resample
            assert_same(ds, found, row[None])
            done += 1
    assert done > 40


def test_values_are_the_reports():
    ds, hard = simulated_images(60)
    report = error_types(ds, simulated_detector(ds, hard))
    spread = bootstrap_errors(report, 200, .9)
    for name, row in spread.cost.items():
        assert abs(row.value - report.cost[name]) < 1e-12
        assert row.low is None or row.low <= row.value <= row.high
    for known in report.per_class:
        for name, row in spread.per_class[known["name"]].items():
            assert abs(row.value - known["cost"][name]) < 1e-12
    assert spread.cost["Loc"].groups <= 60
    assert "Bkg" in repr(spread) and "forklift: " in repr(spread)


def test_few_images_with_a_mistake_have_no_interval():
    "Duplicates in four images: their cost is told, without an interval; a fifth gives one."
    ds, hard = simulated_images(40)
    clean = [type(d)(d.boxes[:0], d.scores[:0], d.labels[:0]) for d in simulated_detector(ds, hard)]
    for i in range(len(ds)):
        boxes, labels, _ = ds.boxes_of(i)
        clean[i] = type(clean[i])(boxes.astype(np.float32), np.linspace(.5, .9, len(boxes), dtype=np.float32), labels)
    with_boxes = [i for i in range(len(ds)) if len(ds.boxes_of(i)[0])]
    for n, is_known in ((4, False), (5, True)):
        found = list(clean)
        for i in with_boxes[:n]:
            d = clean[i]
            found[i] = type(d)(np.vstack([d.boxes, d.boxes[:1] + 1]), np.append(d.scores, np.float32(.45)),
                               np.append(d.labels, d.labels[:1]))
        row = bootstrap_errors(error_types(ds, found), 200).cost["Dupe"]
        assert row.groups == n
        assert (row.low is not None) == is_known


def test_groups_are_drawn_together():
    "Ten frames of a video that are alike say little more than one: the interval of the groups is wider."
    ds, hard = simulated_images(40)
    found = simulated_detector(ds, hard)
    times = np.full(40, 10)
    again, more = repeated(ds, found, times)
    report = error_types(again, more)
    alone = bootstrap_errors(report, 300).cost["Miss"]
    grouped = bootstrap_errors(report, 300, groups=np.repeat([f"v{k}" for k in range(40)], 10)).cost["Miss"]
    assert grouped.error > 2 * alone.error
    assert grouped.groups <= 40 < alone.groups


@pytest.mark.parametrize("call, line", [
    (dict(level=95), "level is 95"),
    (dict(resamples=10), "resamples is 10"),
    (dict(groups=["a"]), "1 groups for 12 images"),
    (dict(method="t"), "method is 't'"),
])
def test_wrong_calls(call, line):
    report = error_types(*problem(1))
    with pytest.raises(InputError, match=line): bootstrap_errors(report, **call)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("images, sets, least", [(100, 400, .78), (400, 200, .82)])
def test_coverage(images, sets, least):
    "Of simulated sets the share whose interval of 90 % holds the true cost; the page has the figures."
    population, hard = simulated_images(20_000, seed=11)
    found = simulated_detector(population, hard, seed=11)
    true = error_types(population, found).cost
    inside = {name: [] for name in true}
    for k in range(sets):
        rows = np.sort(rng_for(31, k).choice(20_000, images, replace=False))
        report = error_types(population.subset(rows), [found[i] for i in rows])
        for name, row in bootstrap_errors(report, 300, .9, seed=k).cost.items():
            if row.low is not None: inside[name].append(row.low <= true[name] <= row.high)
    shares = {name: float(np.mean(held)) for name, held in inside.items()}
    print(images, "images:", {name: round(share, 3) for name, share in shares.items()})
    assert min(shares.values()) > least
    assert .86 < np.mean(list(shares.values())) < .98
