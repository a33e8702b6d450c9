"""Statistics, the advice that follows from them, and the balance of classes."""
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jetson_det.core import InputError
from jetson_det.data.balance import balance_table, class_weights, image_shares, repeat_factors
from jetson_det.data.dataset import CROWD, IGNORE, DetDataset
from jetson_det.data.formats.registry import read_dataset
from jetson_det.data.quality.stats import (_COMFORTABLE, _STRIDES, _VISIBLE, _advice_text, _cooccurrence, _input_shapes,
                                           _position_map, _real_sides, _sides_at_input, _stats_table, _tile_plan,
                                           _visibility, advise, dataset_stats, plot_stats, sizes_at_input)


def columns(sizes, rows, classes=("a", "b"), **kw):
    "rows: (image, label, x1, y1, x2, y2)"
    rows = np.array(sorted(map(tuple, rows)), np.float64).reshape(-1, 6)
    return DetDataset("nowhere", classes, [f"{k}.jpg" for k in range(len(sizes))], sizes, rows[:, 0], rows[:, 2:],
                      rows[:, 1], **kw)


def scenes(size=(1080, 1920), low=8, high=64, n=60, m=900, seed=0):
    "Boxes whose sides are evenly spread in the logarithm."
    rng = np.random.default_rng(seed)
    side = np.exp(rng.uniform(np.log(low), np.log(high), m))[:, None] * np.exp(rng.normal(0, .1, (m, 2)))
    xy = rng.random((m, 2)) * (np.array(size[::-1]) - np.minimum(side, min(size) - 1))
    return columns([size] * n, np.c_[np.sort(rng.integers(0, n, m)), np.zeros(m), xy, xy + side], ("debris",))


def random_set(seed, n=12, m=80, c=4):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(50, 2000, (n, 2))
    image = np.sort(rng.integers(0, n, m))
    corners = np.sort(rng.random((m, 2, 2)), 1).reshape(m, 4) * np.tile(sizes[image][:, ::-1], 2)
    return DetDataset("nowhere", [f"c{k}" for k in range(c)], [f"{k}.jpg" for k in range(n)],
                      sizes,
                      image,
                      corners,
                      rng.integers(0, c - 1, m),
                      rng.choice(["train", "val", ""], n),
                      flags=rng.choice([0, 0, 0, CROWD, IGNORE], m))


# Figures

def test_a_box_without_area_is_in_no_count():
    "The table and the advice speak of the same boxes."
    rows = [(0, 0, 5, 5, 45, 45), (0, 0, 10, 10, 10, 30), (0, 1, 20, 20, 18, 30), (1, 1, 0, 0, 3, 40)]
    ds = columns([(60, 80)] * 2, rows)
    stats = dataset_stats(ds, (60, 80))
    under = _visibility(_real_sides(ds), (60, 80))["under4"]
    assert stats["all"]["under"]["4"] == under == .5
    assert (stats["boxes"], stats["without_area"], stats["crowd_or_ignored"]) == (2, 2, 0)
    assert "2 boxes without an area left out" in str(stats)


def test_sides_and_strides():
    ds = columns([(60, 80)]*4, [(k, 0, 5, 5, 40, 40) for k in range(4)], ("s", ),
                 flags=[0, 0, 0, IGNORE],
                 splits=["train", "train", "val", ""])
    assert np.allclose(sizes_at_input(ds, (30, 80)), 17.5) and np.allclose(_sides_at_input(ds, (30, 80)), 17.5)
    stats = dataset_stats(ds, (30, 80))
    assert (stats["boxes"], stats["crowd_or_ignored"],
            stats["empty_images"]) == (3, 1, 1) and stats["splits"] == {"train": 2, "val": 1, "none": 1}
    assert stats["all"]["under"] == {"4": 0, "8": 0, "16": 0, "32": 1} and stats["common_sizes"] == [[60, 80, 4]]
    assert len(plot_stats(ds, (30, 80)).axes) == 6


def test_the_shorter_side_counts():
    stats = dataset_stats(columns([(416, 416)], [(0, 0, 0, 0, 7, 300), (0, 1, 0, 0, 8, 8)]), (416, 416))
    assert stats["classes"]["a"]["under"] == {"4": 0, "8": 1, "16": 1, "32": 1} and stats["classes"]["b"]["under"] == {
        "4": 0, "8": 0, "16": 1, "32": 1
    }
    assert stats["classes"]["a"]["size"]["p50"] > 45 and stats["classes"]["a"]["short"]["p50"] == 7


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), h=st.integers(32, 1100), w=st.integers(32, 2000))
def test_figures_agree_with_a_loop(seed, h, w):
    ds = random_set(seed)
    stats = dataset_stats(ds, (h, w))
    real = (ds.flags & (CROWD | IGNORE)) == 0
    assert json.loads(json.dumps(stats, allow_nan=False)) == stats and _stats_table(stats) and str(stats)
    for k, c in enumerate(ds.classes):
        mine = stats["classes"][c]
        short = []
        for i in range(len(ds)):
            b, l, f = ds.boxes_of(i)
            scale = min(h / ds.sizes[i][0], w / ds.sizes[i][1])
            short += [
                min(x2 - x1, y2 - y1)*scale
                for (x1, y1, x2, y2), q, g in zip(b.tolist(), l, f)
                if q == k and not g & (CROWD | IGNORE)
            ]
        assert mine["boxes"] == len(short) and all(
            mine["under"][str(s)] == pytest.approx(np.mean(np.array(short) < s) if short else 0, abs=1e-4)
            for s in _STRIDES)
    sets = [set(ds.labels[real & (ds.box_image == i)].tolist()) for i in range(len(ds))]
    assert _cooccurrence(ds).tolist() == [[sum(a in s and b in s for s in sets) for b in range(4)] for a in range(4)]
    heat = _position_map(ds, 3, 5)
    centers = (ds.boxes[real, :2] + ds.boxes[real, 2:]) / 2 / ds.sizes[ds.box_image[real]][:, ::-1]
    for r in range(3):
        for q in range(5):
            assert heat[r, q] == pytest.approx(
                np.mean((np.minimum(centers[:, 1]*3, 2).astype(int) == r)
                        & (np.minimum(centers[:, 0]*5, 4).astype(int) == q)))


def test_nothing_to_count():
    empty = columns([(10, 10)], [])
    flat = columns([(10, 10), (0, 0)], [(0, 0, 1, 1, 1, 5), (1, 0, 1, 1, 4, 5)])
    assert dataset_stats(empty)["boxes"] == 0 and _cooccurrence(empty).sum() == 0 and _position_map(
        empty).sum() == 0 and "nan" in str(dataset_stats(empty))
    assert advise(empty) == advise(flat) == [] and len(plot_stats(empty).axes) == 6
    for bad in ((0, 416), (416,)):
        with pytest.raises(InputError, match="input_size is"): dataset_stats(empty, bad)


def test_the_table_says_what_is_measured():
    ds = columns([(100, 100)] * 4, [(k, 0, 5, 5, 90, 90) for k in range(4)])
    text = str(dataset_stats(ds))
    assert "unsplit" in text and "none" not in text
    assert "px: the square root of a box's area" in text and "whose shorter side is under" in text


# Advice

def advice_by_topic(ds, size, **kw): return {a.topic: a for a in advise(ds, size, **kw)}


@pytest.mark.parametrize("size, aspect, last", [((1080, 1920), 16/9, (1088, 1920)), ((1920, 1080), 9/16, (1920, 1088)),
                                               ((480, 640), 4/3, (480, 640)), ((375, 1242), 3.3, (384, 1248)),
                                               ((500, 500), 1, (512, 512))])
def test_input_shapes(size, aspect, last):
    shapes = _input_shapes(_real_sides(scenes(size, 20, 40)))
    assert shapes[-1] == last and shapes == sorted(shapes) and all(h % 32 == w % 32 == 0 for h, w in shapes)
    assert all(w / aspect - 1 <= h < w / aspect + 33 or h * aspect - 1 <= w < h * aspect + 33 for h, w in shapes)


def test_portrait_and_landscape_are_square():
    sizes = [(1080, 1920), (1920, 1080)] * 10
    ds = columns(sizes, [(k, 0, 5, 5, 90, 90) for k in range(20)])
    assert all(h == w for h, w in _input_shapes(_real_sides(ds)))


def test_large_objects_need_no_more():
    a = advice_by_topic(scenes((1080, 1920), 250, 900), (640, 640))
    assert a["input"].figures["chosen"]["size"] == [384, 640
                                                    ] and a["input"].figures["chosen"]["scale"] == pytest.approx(1/3)
    assert not a["p2"].figures["use"] and a["p5"].figures["use"] and a["tiles"].figures["use"] == "no" and set(a) == {
        "input", "p2", "p5", "tiles"
    }


def test_small_objects_in_full_hd():
    ds = scenes()
    a = advice_by_topic(ds, (640, 640))
    chosen = a["input"].figures["chosen"]
    assert chosen["size"] == [960, 1696]
    assert chosen["p50"] >= _VISIBLE[1]
    assert not a["p5"].figures["use"]
    assert a["p2"].figures["use"] == (chosen["under8"] >= .1)
    small = advice_by_topic(ds, (416, 416))
    assert small["p2"].figures["use"] and not small["p5"].figures["use"] and small["tiles"].figures["use"] == "or"
    tight = advice_by_topic(ds, (416, 416), afford=1)
    assert tight["tiles"].figures["use"] == "yes" and tight["input"].figures["chosen"]["pixels"] <= 416**2 and tight[
        "tiles"].figures["p50"] > 2*tight["input"].figures["chosen"]["p50"]


def test_specks_need_pixels_before_p2():
    a = advice_by_topic(scenes((2160, 3840), 6, 14), (416, 416))
    assert not a["p2"].figures["use"] and "first more pixels" in a["p2"].line and a["tiles"].figures["use"] == "yes"


def test_long_objects_do_not_fit_into_tiles():
    rng = np.random.default_rng(0)
    xy = rng.random((300, 2)) * [200, 1000]
    ds = columns([(1080, 1920)] * 30, np.c_[np.arange(300) // 10, np.zeros(300), xy, xy + [1500, 9]])
    tiles = advice_by_topic(ds, (416, 416))["tiles"]
    assert tiles.figures["use"] == "no" and "large boxes" in tiles.line


@settings(max_examples=30, deadline=None)
@given(low=st.floats(3, 200),
      ratio=st.floats(1.2, 10),
      size=st.sampled_from([(1080, 1920), (720, 1280), (480, 640), (1920, 1080), (2160, 3840)]),
      side=st.sampled_from([320, 416, 640]),
      afford=st.floats(1, 6))
def test_advice_keeps_its_own_rules(low, ratio, size, side, afford):
    ds = scenes(size, low, min(low * ratio, min(size) / 2), 20, 200)
    a = advice_by_topic(ds, (side, side), afford=afford)
    sides = _real_sides(ds)
    chosen = a["input"].figures["chosen"]
    given_ = a["input"].figures["given"]
    assert chosen == _visibility(sides, chosen["size"]) and chosen["size"][0] % 32 == chosen["size"][1] % 32 == 0
    assert chosen["pixels"] <= max(afford*side*side, np.prod(
        _input_shapes(sides)[0])) and chosen["p50"] >= .97*given_["p50"]
    if given_["p5"] >= _COMFORTABLE[0] and given_["p50"] >= _COMFORTABLE[1]: assert chosen["pixels"] <= side * side
    t = _tile_plan(sides, (side, side))
    assert t["scale"] <= 1 and t["count"] >= 1 and .1 <= t["overlap"] <= .5 and all(v % 32 == 0 for v in t["size"])
    height = t["size"][0]
    step = height * (1 - t["overlap"])
    down = max(1, np.ceil((size[0] - height * t["overlap"]) / step))
    assert down * step + height * t["overlap"] >= size[0] - 1
    assert "\n" in _advice_text(dataset_stats(ds, (side, side))["advice"])
    assert json.dumps([x._asdict() for x in a.values()], allow_nan=False)


def test_crowds_small_classes_and_rare_ones():
    rng = np.random.default_rng(1)
    rows = [(0, 0, *xy, *(xy + 40))
            for xy in rng.random((130, 2))*300] + [(k, 0, 5, 5, 100, 100)
                                                   for k in range(1, 40)] + [(1, 1, 5, 5, 10, 10), (2, 1, 5, 5, 10, 10)]
    a = advice_by_topic(columns([(416, 416)] * 40, rows), (416, 416))
    assert a["crowd"].figures == dict(over={
        "120": 1, "300": 0
    }, most=130) and a["class"].figures["name"] == "b" and a["balance"].figures["classes"] == {"b": .05}


def test_absent_images_are_enough():
    advice = advice_by_topic(replace(scenes(), root="/no/such/folder"), (640, 640))
    assert advice["input"].why.startswith("images are 1080x1920")


# Balance

def gate(n=200):
    rows = [(i, 0, 1, 1, 9, 9) for i in range(n) for _ in range(3)] + [(i, 1, 1, 1, 9, 9)
                                                                       for i in range(0, n, 10)] + [(7, 2, 1, 1, 9, 9),
                                                                                                    (95, 2, 1, 1, 9, 9)]
    return columns([(48, 64)] * n, rows, ("car", "lorry", "forklift"))


def test_repeat_factors():
    ds = gate()
    assert image_shares(ds).tolist() == [1, .1, .01]
    f = repeat_factors(ds)
    assert f[7] == f[95] == pytest.approx(10**.5) and (np.delete(f, [7, 95]) == 1).all()
    assert repeat_factors(ds, 1)[10] == pytest.approx(10**.5) and (repeat_factors(ds, .01) == 1).all()
    assert (repeat_factors(replace(ds, flags=np.where(ds.labels == 2, CROWD, 0))) == 1).all() and (repeat_factors(
        columns([(9, 9)]*3, [])) == 1).all()
    for bad in (0, -1, 1.1, float("nan")):
        with pytest.raises(InputError, match="threshold is a share"): repeat_factors(ds, bad)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), threshold=st.floats(.001, 1), beta=st.floats(0, .9999), most=st.floats(1, 50))
def test_balance_keeps_its_promises(seed, threshold, beta, most):
    ds = random_set(seed)
    real = (ds.flags & (CROWD | IGNORE)) == 0
    f = repeat_factors(ds, threshold)
    for i in range(len(ds)):
        share = [
            np.mean([k in ds.labels[real & (ds.box_image == j)]
                     for j in range(len(ds))])
            for k in set(ds.labels[real & (ds.box_image == i)].tolist())
        ]
        assert f[i] == pytest.approx(max([1, *(np.sqrt(threshold / s) for s in share)]))
    w = class_weights(ds, beta, most)
    n = np.bincount(ds.labels[real], minlength=4)
    assert (w*n).sum()/n.sum() == pytest.approx(1) and (
        w > 0).all() and w[n > 0].max()/w[n > 0].min() <= most*1.000001 and (w[n == 0] == 1).all()
    order = np.argsort(n[n > 0], kind="stable")
    assert (np.diff(w[n > 0][order]) <= 1e-9).all()  # rarer is never less


def test_class_weights():
    ds = gate()
    w = class_weights(ds, most=1000)
    assert w[1]/w[0] == pytest.approx(
        (1 - .999**600)/(1 - .999**20)) and class_weights(ds, beta=0).tolist() == [1, 1, 1]
    assert class_weights(ds)[2]/class_weights(ds)[0] == pytest.approx(10) and class_weights(columns(
        [(9, 9)], [])).tolist() == [1, 1]
    for kw in (dict(beta=1), dict(beta=-.1), dict(most=.5)):
        with pytest.raises(InputError): class_weights(ds, **kw)


def test_balance_table():
    ds = gate()
    f = repeat_factors(ds)
    w = class_weights(ds)
    lines = balance_table(ds, f, w).splitlines()
    assert lines[1].split()[:4] == [
        "forklift", "2", "0.3%", "1.0%"
    ] and lines[1].split()[4] == "6" and lines[3].startswith(
        "car") and lines[-1] == "an epoch has 204 images, of 200; 2 are repeated, up to 3.2 times"
    assert balance_table(ds, most=1).splitlines()[-1] == "and 2 classes more"
    for bad in (dict(factors=f[1:]), dict(weights=w[1:])):
        with pytest.raises(InputError): balance_table(ds, **bad)


# Real data: what an expert would say

def visdrone(data):
    d = json.loads((data / "datasets/aerial/coco_utils/visdrone2019-det-train-first50image.json").read_bytes())
    row = {im["id"]: k for k, im in enumerate(d["images"])}
    label = {c["id"]: k for k, c in enumerate(d["categories"])}
    rows = [(row[a["image_id"]], label[a["category_id"]], x, y, x + w, y + h)
            for a in d["annotations"]
            for x, y, w, h in [a["bbox"]]]
    return columns([(im["height"], im["width"]) for im in d["images"]], rows, [c["name"] for c in d["categories"]])


@pytest.mark.data
@pytest.mark.parametrize("name, size, chosen, p2, p5", [("bccd", (640, 640), [480, 640], False, True),
                                                       ("bccd", (416, 416), [320, 416], False, True),
                                                       ("raccoon", (416, 416), None, False, True),
                                                       ("kangaroo", (416, 416), None, False, True)])
def test_advice_for_large_objects(data, name, size, chosen, p2, p5):
    a = advice_by_topic(read_dataset(data / "datasets" / name, "voc"), size)
    assert (a["p2"].figures["use"], a["p5"].figures["use"],
            a["tiles"].figures["use"]) == (p2, p5, "no") and a["input"].figures["chosen"]["pixels"] < np.prod(size)
    if chosen: assert a["input"].figures["chosen"]["size"] == chosen


@pytest.mark.data
def test_advice_for_drones(data):
    ds = visdrone(data)
    a = advice_by_topic(ds, (640, 640))
    assert len(ds.boxes) == 3326 and a["p2"].figures["use"] and a["crowd"].figures["over"]["120"] == 5
    assert advice_by_topic(ds, (416, 416))["tiles"].figures["use"] == "yes"
