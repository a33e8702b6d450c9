"""Splits: the data's own win, made ones are the same each time, and nothing leaks."""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jetson_det.core import InputError
from jetson_det.data.dataset import DetDataset
from jetson_det.data.formats import read_dataset
from jetson_det.data.split import ensure_splits, eval_split, read_split_lists, split_counts, split_units, write_split_lists


def dataset(n=100, labels=None, splits=None, groups=None, root="nowhere", names=None):
    "n images, one box each; labels: of each image, or a list of (image, label)"
    pairs = np.array(sorted(labels if labels is not None else [(k, 0) for k in range(n)])).reshape(-1, 2)
    m = len(pairs)
    return DetDataset(root, [f"c{k}" for k in range(pairs[:, 1].max() + 1)], names or [f"a/{k}.jpg" for k in range(n)], [(60, 80)] * n, pairs[:, 0],
                      [(1, 1, 9, 9)] * m, pairs[:, 1], splits, groups)


def sizes(ds): return {s: int((ds.splits == s).sum()) for s in ds.split_names}
def where(ds): return dict(zip(ds.paths.tolist(), ds.splits.tolist()))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.floats(0, .6), st.floats(0, .39))
def test_counts(n, val, test):
    train, v, t = split_counts(n, val, test)
    assert train >= 1 and v >= 0 and t >= 0 and train + v + t == n
    if n >= 20: assert abs(v - n * val) <= 1 and abs(t - n * test) <= 1


def test_own_lists_win():
    full = dataset(splits=["train"] * 50 + ["val"] * 30 + ["test"] * 20)
    assert where(ensure_splits(full, .5, .4, 7)) == where(full)
    no_test = ensure_splits(dataset(splits=["train"] * 60 + ["val"] * 40))
    assert sizes(no_test) == dict(train=60, val=40)
    with pytest.raises(InputError, match="has no split 'test'"): eval_split(no_test, "test")
    no_val = ensure_splits(dataset(splits=["train"] * 60 + ["test"] * 40))
    assert sizes(no_val) == dict(train=48, val=12, test=40) and (no_val.splits[60:] == "test").all()
    for name in ("", "train", "val", "test"): assert sizes(ensure_splits(dataset(splits=[name] * 100))) == dict(train=70, val=20, test=10)
    with pytest.raises(InputError, match="no train"): ensure_splits(dataset(splits=["test"] * 60 + ["val"] * 40))


def test_images_in_no_list():
    ds = ensure_splits(dataset(splits=["train"] * 60 + ["val"] * 30 + [""] * 10))
    assert sizes(ds) == {"train": 60, "val": 30, "": 10} and [f.kind for f in ds.flaws] == ["no-split"]
    assert sizes(ensure_splits(dataset(splits=["val"] * 30 + [""] * 70))) == dict(train=70, val=30)


@pytest.mark.parametrize("by", ["random", "stratified"])
def test_function_of_seed_and_path(by):
    ds = dataset(labels=[(k, k % 3) for k in range(100)])
    a = ensure_splits(ds, by=by)
    assert where(a) == where(ensure_splits(ds.subset(np.random.default_rng(0).permutation(100)), by=by))
    assert where(a) == where(ensure_splits(replace(ds, root="elsewhere"), by=by))
    assert where(a) != where(ensure_splits(ds, seed=1, by=by))


def test_an_added_image_moves_few():
    a, b = ensure_splits(dataset(300)), ensure_splits(dataset(301))
    assert sum(where(b)[p] != s for p, s in where(a).items()) <= 2


@pytest.mark.parametrize("n, want", [(1, dict(train=1)), (2, dict(train=1, val=1)), (3, dict(train=2, val=1)), (5, dict(train=4, val=1))])
@pytest.mark.parametrize("by", ["random", "stratified"])
def test_tiny(n, want, by):
    ds = ensure_splits(dataset(n), by=by)
    assert sizes(ds) == want
    assert len(eval_split(ds)) >= 1
    assert [f.message for f in ds.flaws] == ([] if n > 1 else ["nothing is left for val: training goes without evaluation, and `evaluate` takes the training images"])


def test_no_val_wanted():
    ds = ensure_splits(dataset(), val=0, test=0)
    assert sizes(ds) == dict(train=100) and len(eval_split(ds)) == 100 and [f.kind for f in ds.flaws] == ["no-val"]


def test_stratified_keeps_shares_of_rare_classes():
    rng = np.random.default_rng(0)
    labels = [(k, 0) for k in range(400)] + [(k, 1) for k in range(400) if rng.random() < .3] + [(k, 2) for k in range(40)] + [(k, 3) for k in (17, 90, 200, 201, 202, 203, 204, 205, 206, 207)]
    ds = ensure_splits(dataset(400, labels), by="stratified")
    assert sum(sizes(ds).values()) == 400 and abs(sizes(ds)["val"] - 80) <= 4 and abs(sizes(ds)["test"] - 40) <= 4
    for c in range(4):
        rows = ds.splits[ds.box_image[ds.labels == c]]
        for s, share in (("train", .7), ("val", .2), ("test", .1)): assert abs((rows == s).sum() - share * len(rows)) <= max(1, .03 * len(rows)), (c, s)


@pytest.mark.parametrize("by", ["random", "stratified", "group"])
def test_groups_stay_together(by):
    groups = [f"cam {k // 7}" for k in range(210)]
    ds = ensure_splits(dataset(210, groups=groups), by=by)
    for g in set(groups): assert len(set(ds.splits[ds.groups == g])) == 1
    assert set(ds.split_names) == {"train", "val", "test"} and abs(sizes(ds)["val"] - 42) <= 7
    if by == "group":
        with pytest.raises(InputError, match="no image has a group"): ensure_splits(dataset(), by=by)
    with pytest.raises(InputError, match="did you mean 'group'"): ensure_splits(dataset(), by="groups")


def test_the_same_file_twice_stays_together(tmp_path):
    for k in range(60): (tmp_path / f"{k}.jpg").write_bytes(b"twins" if k % 2 else b"%5d" % k)
    for seed in range(3):
        ds = ensure_splits(dataset(60, root=tmp_path, names=[f"{k}.jpg" for k in range(60)]), seed=seed)
        assert len(set(ds.splits[1::2])) == 1
    assert len(split_units(ds, 0)) == 31


def test_lists(tmp_path):
    ds = ensure_splits(dataset(50, names=[f"ä b/{k} #%.jpg" for k in range(50)]))
    assert set(write_split_lists(ds, tmp_path)) == {"train", "val", "test"}
    bare = replace(ds, splits=None)
    assert where(read_split_lists(bare, tmp_path)) == where(ds)
    (tmp_path / "val.txt").write_text("gone.jpg\n")
    with pytest.raises(InputError, match="val.txt: gone.jpg is not in"): read_split_lists(bare, tmp_path)
    (tmp_path / "val.txt").write_text((tmp_path / "train.txt").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(InputError, match="is in train.txt too"): read_split_lists(bare, tmp_path)


@pytest.mark.parametrize("val, test", [(1, 0), (.6, .4), (-.1, .1), (float("nan"), .1)])
def test_shares_that_cannot_be(val, test):
    with pytest.raises(InputError, match="together under 1"): ensure_splits(dataset(), val, test)


@pytest.mark.data
def test_real(data):
    assert sizes(ensure_splits(read_dataset(data / "datasets/bccd"))) == dict(train=205, val=87, test=72)
    raccoon = ensure_splits(read_dataset(data / "datasets/raccoon"))
    assert sizes(raccoon) == dict(train=140, val=40, test=20)
    at = where(raccoon)
    for a, b in ((116, 11), (74, 52), (83, 120), (98, 65)): assert at[f"images/raccoon-{a}.jpg"] == at[f"images/raccoon-{b}.jpg"]
