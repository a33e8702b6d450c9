"""Splits: the data's own win, made ones are the same each time, and nothing leaks."""
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from jetson_det.core import InputError
from jetson_det.data.dataset import DetDataset, Flaw
from jetson_det.data.formats.registry import read_dataset
from jetson_det.data.images.facts import inspect_images
from jetson_det.data.split import (SPLITS, ensure_splits, eval_split, kept_splits, made_splits, random_split,
                                   read_split_lists, split_counts, split_digest, split_table, split_units,
                                   stratified_split, tied, with_groups, write_split_lists)


def dataset(n=100, labels=None, splits=None, groups=None, root="nowhere", names=None):
    "n images, one box each; labels: of each image, or a list of (image, label)"
    pairs = np.array(sorted(labels if labels is not None else [(k, 0) for k in range(n)])).reshape(-1, 2)
    m = len(pairs)
    return DetDataset(root, [f"c{k}" for k in range(pairs[:, 1].max() + 1)], names or [f"a/{k}.jpg" for k in range(n)],
                      [(60, 80)]*n, pairs[:, 0], [(1, 1, 9, 9)]*m, pairs[:, 1], splits, groups)


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
    for name in ("", "train", "val", "test"):
        assert sizes(ensure_splits(dataset(splits=[name] * 100))) == dict(train=70, val=20, test=10)
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
    a = ensure_splits(dataset(300))
    b = ensure_splits(dataset(301))
    assert sum(where(b)[p] != s for p, s in where(a).items()) <= 2


@pytest.mark.parametrize("n, want", [
    (1, dict(train=1)), (2, dict(train=1, val=1)), (3, dict(train=2, val=1)), (5, dict(train=4, val=1)),
])
@pytest.mark.parametrize("by", ["random", "stratified"])
def test_tiny(n, want, by):
    ds = ensure_splits(dataset(n), by=by)
    assert sizes(ds) == want
    assert len(eval_split(ds)) >= 1
    assert [
        f.message for f in ds.flaws
    ] == ([] if n > 1 else
          ["nothing is left for val: training goes without evaluation, and `evaluate` takes the training images"])


def test_no_val_wanted():
    ds = ensure_splits(dataset(), val=0, test=0)
    assert sizes(ds) == dict(train=100) and len(eval_split(ds)) == 100 and [f.kind for f in ds.flaws] == ["no-val"]


def test_stratified_keeps_shares_of_rare_classes():
    rng = np.random.default_rng(0)
    labels = [(k, 0) for k in range(400)] + [(k, 1) for k in range(400) if rng.random() < .3] + [
        (k, 2) for k in range(40)
    ] + [(k, 3) for k in (17, 90, 200, 201, 202, 203, 204, 205, 206, 207)]
    ds = ensure_splits(dataset(400, labels), by="stratified")
    assert sum(sizes(ds).values()) == 400 and abs(sizes(ds)["val"] - 80) <= 4 and abs(sizes(ds)["test"] - 40) <= 4
    for c in range(4):
        rows = ds.splits[ds.box_image[ds.labels == c]]
        for s, share in (("train", .7), ("val", .2), ("test", .1)):
            assert abs((rows == s).sum() - share * len(rows)) <= max(1, .03 * len(rows)), (c, s)


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
    assert len(split_units(ds, tied(ds), 0)) == 31


def test_lists(tmp_path):
    ds = ensure_splits(dataset(50, names=[f"ä b/{k} #%.jpg" for k in range(50)]))
    assert set(write_split_lists(ds, tmp_path)) == {"train", "val", "test"}
    bare = replace(ds, splits=None)
    assert where(read_split_lists(bare, tmp_path)) == where(ds)
    (tmp_path / "val.txt").write_text("gone.jpg\n")
    with pytest.raises(InputError, match="val.txt, line 1: gone.jpg is not in"): read_split_lists(bare, tmp_path)
    (tmp_path / "val.txt").write_text((tmp_path / "train.txt").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(InputError, match="is in train.txt too"): read_split_lists(bare, tmp_path)


def test_lists_of_odd_names(tmp_path):
    names = [" a.jpg", "b\x85c.jpg", "d\u2028e.jpg", "f\udcff.jpg", "g .jpg", "h\n\ri.jpg"]
    ds = replace(dataset(6, names=names), splits=["train", "train", "train", "val", "test", "test"])
    write_split_lists(ds, tmp_path)
    assert where(read_split_lists(replace(ds, splits=None), tmp_path)) == where(ds) and len(split_digest(ds)) == 16
    assert (tmp_path / "test.txt").read_bytes() == b"g .jpg\nh%0A%0Di.jpg\n"
    (tmp_path / "train.txt").write_text("\ufeffg .jpg\r\n\r\ng .jpg\r\n", encoding="utf-8")
    with pytest.raises(InputError, match="train.txt, line 3: g .jpg stands twice"): read_split_lists(ds, tmp_path)


def skewed(n, n_classes, a_image, seed):
    "(n, C) bool: the k-th class is as frequent as 1 / k^1.2"
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, n_classes + 1) ** 1.2
    has = np.zeros((n, n_classes), bool)
    for i, k in enumerate(rng.poisson(a_image, n)): has[i, rng.choice(n_classes, k, p=p / p.sum())] = True
    return has


@pytest.mark.parametrize("n, n_classes, a_image, most", [
    (200, 5, 2, 1), (400, 20, 3, 1), (2000, 40, 3, 1.1), (3000, 80, 7, 2),
])
def test_stratified_is_an_image_off_at_most(n, n_classes, a_image, most):
    for seed in range(3):
        has = skewed(n, n_classes, a_image, seed)
        units = [np.array([i]) for i in range(n)]
        counts = split_counts(n, .2, .1)
        at = stratified_split(units, counts, *np.nonzero(has), n_classes)
        off = [np.abs(has[at == s].sum(0) - c / n * has.sum(0)).max() for s, c in enumerate(counts)]
        assert max(off) <= most and all(abs((at == s).sum() - c) <= 2 for s, c in enumerate(counts)), (seed, off)
        chance = random_split(units, counts)
        assert max(off) < np.abs(has[chance == 1].sum(0) - .2 * has.sum(0)).max()


def test_stratified_in_units_of_all_sizes():
    rng = np.random.default_rng(0)
    size = np.r_[[150, 90, 60], rng.integers(1, 25, 60), np.ones(200, int)]
    has = skewed(size.sum(), 12, 2, 1)
    units = np.split(np.arange(size.sum()), np.cumsum(size)[:-1])
    at = stratified_split(units, split_counts(size.sum(), .2, .1), *np.nonzero(has), 12)
    of_image = np.repeat(at, size)
    for s, share in enumerate((.7, .2, .1)):
        assert np.abs(has[of_image == s].sum(0) - share*has.sum(0)).max() <= 4 and abs((of_image == s).sum() -
                                                                                       share*size.sum()) <= 2


@settings(max_examples=60, deadline=None)
@example([3, 3], 1, .5, .25, 0)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(1, 4), st.floats(.01, .6), st.floats(0, .39),
    st.integers(0, 99),
)
def test_every_unit_goes_somewhere(size, n_classes, val, test, seed):
    has = np.random.default_rng(seed).random((sum(size), n_classes)) < .4
    units = np.split(np.arange(sum(size)), np.cumsum(size)[:-1])
    counts = split_counts(sum(size), val, test)
    for at in (stratified_split(units, counts, *np.nonzero(has), n_classes), random_split(units, counts)):
        assert len(at) == len(units) and set(at.tolist()) <= {0, 1, 2} and (at == 0).any()
        assert (len(units) == 1 or (at == 1).any()) and (counts[2] or not (at == 2).any())


def test_an_added_image_moves_few_when_stratified():
    has = skewed(400, 20, 3, 0)
    ds = dataset(400, [tuple(v) for v in np.argwhere(has).tolist()] + [(k, 0) for k in range(400) if not has[k, 0]])
    full = where(ensure_splits(ds, by="stratified"))
    for gone in (3, 200, 399):
        less = where(ensure_splits(ds.subset(np.delete(np.arange(400), gone)), by="stratified"))
        assert sum(full[p] != s for p, s in less.items()) <= 32


def test_groups_from_paths():
    names = [f"cam {k % 4}/ä (1)_{k // 10:02d}_{k:04d}.jpg" for k in range(200)]
    ds = dataset(200, names=names)
    assert set(with_groups(ds, "folder").groups) == {f"cam {k}" for k in range(4)}
    videos = with_groups(ds, r"_(\d\d)_")
    assert len(set(
        videos.groups)) == 20 and videos.flaws[-1].message == r"group_by '_(\\d\\d)_' finds 20 groups in 200 images"
    part = with_groups(ds, r"(?P<video>_0\d)_")
    assert (part.groups != "").sum() == 100 and part.flaws[-1].severity == "warning"
    assert "in 100 images; in none: 100 images (cam 0/" in part.flaws[-1].message
    assert with_groups(replace(ds, groups=["x"]*200), "").groups[0] == "x" and with_groups(
        replace(ds, groups=["x"]*200), "folder").groups[0] == "cam 0"
    for by in ("random", "stratified", "group"):
        made = ensure_splits(ds, by=by, group_by=r"_(\d\d)_")
        assert sizes(made) == dict(train=140, val=40, test=20)
        for k in range(20): assert len(set(made.splits[10 * k:10 * k + 10])) == 1
        assert "20 groups (200 images)" in " ".join(f.message for f in made.flaws)


@pytest.mark.parametrize("group_by, says", [
    ("(cam", "nor a regular expression"), ("cam", "no bracket"), ("(dog)", "finds no group"),
    ("x*()", "finds no group"), ("[", "regular expression"),
])
def test_groups_that_cannot_be(group_by, says):
    with pytest.raises(InputError, match=says) as e:
        ensure_splits(dataset(names=[f"cam/{k}.jpg" for k in range(100)]), group_by=group_by)
    assert "\n" not in str(e.value)


def test_folder_where_there_is_none():
    with pytest.raises(InputError, match="every image lies in the one folder"):
        ensure_splits(dataset(names=[f"{k}.jpg" for k in range(100)]), group_by="folder")


def test_one_group_holds_everything():
    ds = dataset(100, groups=["gate"] * 100)
    with pytest.raises(InputError, match="the group 'gate' holds all 100 images"): ensure_splits(ds, by="group")
    with pytest.raises(InputError, match="the group 'a' holds all 100 images"):
        ensure_splits(replace(ds, groups=None), group_by="folder")
    assert sizes(ensure_splits(ds, val=0, test=0, by="group")) == dict(train=100)
    made = ensure_splits(ds)
    assert sizes(made) == dict(train=100) and made.flaws[-1].message.startswith(
        "nothing is left for val, as the group 'gate' holds all 100 images: training goes")


@pytest.mark.parametrize("by", ["random", "stratified", "group"])
@pytest.mark.parametrize("groups, most", [
    (["a"] * 50 + ["b"] * 50, 1), (["a"] * 95 + ["b"] * 5, 1), (["a"] * 60 + ["b"] * 25 + ["c"] * 15, 2),
])
def test_few_large_groups_still_give_val(by, groups, most):
    ds = ensure_splits(dataset(groups=groups), by=by)
    assert 1 <= len(ds.split_names) - 1 <= most and sizes(ds)["train"] >= 40 and len(set(zip(
        ds.groups, ds.splits))) == len(set(groups))
    assert ("test" in ds.split_names) == (most == 2) or by == "stratified"
    if "test" not in ds.split_names: assert ds.flaws[-1].kind == "no-test"


def picture(seed):
    return cv2.resize(np.random.default_rng(seed).integers(0, 255, (9, 12, 3), np.uint8), (160, 120),
                      interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    "30 images; 0 resized is 10, 1 in worse quality is 11, 2 is 12 byte for byte"
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path / "cache"))
    for k in range(30):
        image = picture(k - 10 if k in (10, 11, 12) else k)
        if k == 10: image = cv2.resize(image, (240, 180), interpolation=cv2.INTER_LINEAR)
        (tmp_path/f"{k}.jpg").write_bytes(
            cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 60 if k == 11 else 95])[1].tobytes())
    return dataset(30, [(k, k % 3) for k in range(30)], root=tmp_path, names=[f"{k}.jpg" for k in range(30)])


@pytest.mark.parametrize("by", ["random", "stratified", "group"])
def test_near_duplicates_never_cross(pictures, by):
    facts = inspect_images(pictures)
    apart = 0
    groups = [f"g{k // 2}" for k in range(30)]
    for seed in range(8):
        ds = replace(pictures, groups=groups if by == "group" else None)
        at = ensure_splits(ds, seed=seed, by=by, facts=facts).splits
        assert all(at[k] == at[k + 10] for k in range(3))
        # 3 is grouped with 2
        if by == "group": assert all(at[k] == at[k + 1] for k in range(0, 30, 2)) and at[3] == at[12]
        blind = ensure_splits(ds, seed=seed, by=by).splits
        assert blind[2] == blind[12]
        apart += any(blind[k] != blind[k + 10] for k in range(2))
    assert apart # without the facts they do cross
    ds = ensure_splits(pictures, by=by if by != "group" else "random", facts=facts)
    assert (
        ds.flaws[-1].message
        == "kept in one split each: 1 file under two names or more (2 images), 2 clusters of near duplicates (4 images)"
    )
    with pytest.raises(InputError, match="facts of 30 images for a dataset of 10"):
        tied(ds.subset(np.arange(10)), facts)


def test_what_the_lists_tear_apart_is_said(pictures):
    facts = inspect_images(pictures)
    ds = replace(pictures, splits=["train"] * 10 + ["val"] * 20, groups=[f"cam {k % 2}" for k in range(30)])
    told = [f.message for f in ensure_splits(ds, facts=facts).flaws if f.kind == "split-leak"]
    assert told == [
        "2 groups in more than one split, such as 'cam 0' (train, val)",
        "1 file under two names or more in more than one split, such as 2.jpg and 12.jpg (train, val)",
        "2 clusters of near duplicates in more than one split, such as 0.jpg and 10.jpg (train, val)"
    ]
    assert [f.kind for f in ensure_splits(ds).flaws] == ["split-leak"] # no file is read
    table = split_table(ds, facts)
    assert all(f"crosses: {t}" in table for t in told) and "kept" not in table


def broken(ds, rows):
    "These files end in the middle."
    for i in rows:
        data = ds.path_of(i).read_bytes()
        ds.path_of(i).write_bytes(data[:len(data) // 2])
    return inspect_images(ds)


@pytest.mark.parametrize("by", ["random", "stratified"])
def test_what_cannot_be_used_gets_no_split(pictures, by):
    "So val is not made of broken files; those that stay are divided as if there were no others."
    before = ensure_splits(pictures, by=by, facts=inspect_images(pictures))
    lost = np.flatnonzero(before.splits == "val")
    facts = broken(pictures, lost)
    ds = ensure_splits(pictures, by=by, facts=facts)
    stay = np.setdiff1d(np.arange(30), lost)
    assert set(ds.splits[lost]) == {""} and set(ds.splits[stay]) == set(SPLITS)
    alone = ensure_splits(pictures.subset(stay), by=by, facts=facts.pick(stay))
    assert ds.splits[stay].tolist() == alone.splits.tolist()
    assert [f.kind for f in ds.flaws if f.kind in ("unusable", "lost-split", "no-split")] == ["unusable"]
    assert f"val {sizes(ds)['val']}," in made_splits(pictures, ds, "d", by=by)


def test_a_split_of_the_data_that_is_lost_is_said(pictures):
    own = replace(pictures, splits=["train"] * 20 + ["val"] * 4 + ["test"] * 6)
    ds = ensure_splits(own, facts=broken(pictures, range(20, 24)))
    flaw, = [f for f in ds.flaws if f.kind == "lost-split"]
    assert flaw.message.startswith("all 4 images of val cannot be used (20.jpg, 21.jpg, 22.jpg and 1 more)")
    assert flaw.severity == "warning" and sizes(ds) == {"train": 16, "val": 4, "test": 6, "": 4}
    assert "the data has no val: val 4 images were chosen" in made_splits(own, ds, "d")
    facts = broken(pictures, [0, 21])
    ds = ensure_splits(own, val=0, facts=facts)
    assert "val" not in ds.split_names and "" in ds.split_names
    everything = broken(pictures, range(30))
    assert set(ensure_splits(pictures, facts=everything).splits) == set(SPLITS) # the check says what is wrong


def test_table():
    ds = ensure_splits(dataset(200, [(k, 0) for k in range(150)] + [(k, 1) for k in range(20)]*2,
                               groups=["cam"]*30 + [""]*170),
                       by="stratified")
    lines = split_table(ds).splitlines()
    of = ds.split("train")
    assert lines[1].split() == [
        "train", "140", "70.0%",
        str(len(of.boxes)), f"{len(of.boxes) / 190:.1%}",
        str(140 - len(set(of.box_image)))
    ] and lines[4].split() == ["class", "boxes", "train", "val", "test"]
    assert lines[5].split()[:3] == ["c0", "150", "105"] and lines[7] == "kept in one split each: 1 group (30 images)"
    assert "and 1 classes with fewer boxes" in split_table(ds, most=1) and "c1" not in split_table(ds, most=1)
    assert "no split" in split_table(dataset())


def test_digest():
    ds = ensure_splits(dataset())
    order = np.random.default_rng(0).permutation(100)
    assert split_digest(ds) == split_digest(ds.subset(order)) == split_digest(replace(ds, root="elsewhere")) and len(
        split_digest(ds)) == 16
    one = ds.splits.copy()
    one[0] = "test" if one[0] != "test" else "val"
    assert len({
        split_digest(ds),
        split_digest(ensure_splits(dataset(), seed=1)),
        split_digest(replace(ds, splits=one)),
        split_digest(ds.subset(order[1:]))
    }) == 4


def test_equal_files_of_one_length_and_one_middle(tmp_path):
    for k in range(40):
        (tmp_path / f"{k}.jpg").write_bytes(bytes(9000) + b"%02d" % (k % 10 if k < 38 else k) + bytes(20000))
    (tmp_path / "40.jpg").write_bytes(b"")
    ds = dataset(42, root=tmp_path, names=[f"{k}.jpg" for k in range(42)]) # the last is not there
    assert sorted(map(len, split_units(ds, tied(ds), 0))) == [1] * 4 + [3, 3] + [4] * 8


@pytest.mark.slow
def test_coco_sized():
    rng = np.random.default_rng(0)
    n = 120_000
    m = 860_000
    p = 1 / np.arange(1, 81)
    ds = DetDataset("nowhere", [f"c{k}" for k in range(80)], [f"train2017/{k:012d}.jpg" for k in range(n)],
                    np.full((n, 2), 480), np.sort(rng.integers(0, n, m)), np.tile([1, 1, 9, 9], (m, 1)),
                    rng.choice(80, m, p=p/p.sum()))
    for by in ("random", "stratified"):
        start = time.perf_counter()
        assert sizes(ensure_splits(ds, by=by))["val"] == pytest.approx(24_000, abs=10)
        assert time.perf_counter() - start < 20


@pytest.mark.parametrize("val, test", [(1, 0), (.6, .4), (-.1, .1), (float("nan"), .1)])
def test_shares_that_cannot_be(val, test):
    with pytest.raises(InputError, match="together under 1"): ensure_splits(dataset(), val, test)


@pytest.mark.data
def test_real(data):
    assert sizes(ensure_splits(read_dataset(data / "datasets/bccd"))) == dict(train=205, val=87, test=72)
    raccoon = ensure_splits(read_dataset(data / "datasets/raccoon"))
    assert sizes(raccoon) == dict(train=140, val=40, test=20)
    at = where(raccoon)
    for a, b in ((116, 11), (74, 52), (83, 120), (98, 65)):
        assert at[f"images/raccoon-{a}.jpg"] == at[f"images/raccoon-{b}.jpg"]


def test_images_in_no_split_are_said_once():
    ds = dataset(6, splits=["train", "train", "train", "val", "", ""])
    flaw, = ensure_splits(ds).flaws
    assert (flaw.kind, flaw.severity, flaw.file) == ("no-split", "warning", ds.paths[4])
    assert "2 images, " in flaw.message and "in no split" in flaw.message and ds.paths[4] in flaw.message
    assert len(ensure_splits(replace(ds, flaws=[flaw])).flaws) == 1
    table = split_table(ensure_splits(ds))
    assert "no split" in table and "(none)" not in table


def test_lists_take_the_place_of_the_datas_splits_and_of_what_was_said_of_them(tmp_path):
    kinds = ("no-split", "split-conflict")
    old = [Flaw("warning", kind, "", "", "of the data's own splits", "noted") for kind in kinds]
    ds = dataset(6, splits=["train", "train", "train", "val", "", ""])
    (tmp_path / "train.txt").write_text("\n".join(ds.paths[:3]))
    (tmp_path / "val.txt").write_text("\n".join(ds.paths[3:]))
    assert read_split_lists(replace(ds, flaws=old), tmp_path).flaws == []
    (tmp_path / "val.txt").write_text("\n".join(ds.paths[3:5]))
    flaw, = read_split_lists(replace(ds, flaws=old), tmp_path).flaws
    assert flaw.message.startswith("1 image, ") and flaw.file == ds.paths[5]


@pytest.mark.parametrize("splits, given, says", [
    (["train", "val"], dict(val=.5, test=.5, seed=3, by="stratified"), "--val, --test, --by, --seed: not used"),
    (["train", "test"], dict(val=.5, test=.5, seed=3), "(train, test); --test: not used"),
    (["train", "val"], {}, "the data's own splits are kept (train, val); --anew makes new ones"),
    (["train", "train"], dict(val=.5), ""), (["", ""], dict(seed=3), ""),
])
def test_options_that_the_datas_splits_leave_unused(splits, given, says):
    line = kept_splits(dataset(2, splits=splits), **given)
    assert says in line and bool(says) == bool(line)
