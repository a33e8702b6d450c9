"""A dataset in tiles: every box where it was, every pixel as it was, nothing lost without being said."""
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jetson_det.core import InputError
from jetson_det.data import tiles as module
from jetson_det.data.dataset import CROWD, DIFFICULT, IGNORE, DetDataset
from jetson_det.data.formats.registry import read_dataset
from jetson_det.data.split import ensure_splits
from jetson_det.data.tiles import read_tiles, tile_dataset
from jetson_det.runtime.geometry import as_detections
from jetson_det.runtime.contract import preset
from jetson_det.runtime.tiles import Tiled, merge_tiles, tile_grid

SIZES = [(200, 300), (150, 150), (90, 400), (60, 50)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "Four noisy images of odd names, with groups, splits, flags and attributes."
    root = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    boxes = []
    image = []
    names = ["a/pic #1.png", "b/pic #1.PNG", "ünï.jpg", "v1.2.png"]
    for k, (name, (h, w)) in enumerate(zip(names, SIZES)):
        (root / name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(cv2.imencode(Path(name).suffix, rng.integers(0, 255, (h, w, 3), np.uint8))[1].tobytes())
        for _ in range(12 if k < 3 else 0):
            bw, bh = rng.uniform(2, 70, 2)
            x = rng.uniform(0, w - min(bw, w - 1))
            y = rng.uniform(0, h - min(bh, h - 1))
            boxes.append((x, y, min(x + bw, w), min(y + bh, h)))
            image.append(k)
    n = len(boxes)
    flags = np.zeros(n, np.uint8)
    flags[:3] = CROWD, IGNORE, DIFFICULT
    return DetDataset(root, ["Sack", "Person"],
                      names,
                      SIZES,
                      image,
                      boxes,
                      rng.integers(0, 2, n), ["train", "val", "test", "train"], ["gate", "", "", ""],
                      flags=flags,
                      attributes={"text": [f"no {k}" if k % 3 else "" for k in range(n)]})


def sums(root): return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()}


def rows_of(ds, tiles):
    """(source path, box moved back, label, flags, text) of every box of a dataset of tiles, and whether it touches
    no inner edge of its tile."""
    out = []
    for k, path in enumerate(ds.paths):
        i, x1, y1, x2, y2 = tiles.tiles[path]
        h, w = tiles.images[i][1:]
        for m in range(*ds._starts[k:k + 2]):
            b = ds.boxes[m].astype(float)
            inner = (b[0] <= 1e-3 and x1 > 0) or (b[1] <= 1e-3 and y1 > 0) or (b[2] >= x2 - x1 - 1e-3
                                                                               and x2 < w) or (b[3] >= y2 - y1 - 1e-3
                                                                                               and y2 < h)
            out.append((tiles.images[i][0], b + (x1, y1, x1, y1), int(ds.labels[m]), int(
                ds.flags[m]), ds.attributes["text"][m] if "text" in ds.attributes else "", not inner))
    return out


@pytest.mark.parametrize("format", ["coco", "voc", "yolo"])
def test_boxes_pixels_and_all_that_is_known(source, tmp_path, format):
    before = sums(source.root)
    ds = tile_dataset(source, tmp_path / "t", size=(80, 96), overlap=.3, format=format)
    assert sums(source.root) == before and [p.name for p in tmp_path.iterdir()] == ["t"]
    again = read_dataset(tmp_path / "t")
    tiles = read_tiles(tmp_path / "t")
    assert again.fingerprint() == ds.fingerprint() and again.format == format and set(tiles.tiles) == set(ds.paths)
    windows = {}
    for k, path in enumerate(ds.paths):
        i, x1, y1, x2, y2 = tiles.tiles[path]
        windows.setdefault(i, []).append((x1, y1, x2, y2))
        np.testing.assert_array_equal(ds.image(k), source.image(i)[y1:y2, x1:x2])
        assert ds.splits[k] == source.splits[i] and tuple(ds.sizes[k]) == (y2 - y1, x2 - x1)
        if format == "coco": assert ds.groups[k] == (source.groups[i] or source.paths[i])
    for i, found in windows.items():
        assert sorted(found) == sorted(map(tuple, tile_grid(SIZES[i], (80, 96), .3).tolist()))
    assert windows[3] == [(0, 0, 50, 60)]
    rows = rows_of(ds, tiles)
    # each box that fits into the overlap is somewhere whole, with all that is known of it
    for m, (b, i) in enumerate(zip(source.boxes, source.box_image)):
        if b[2] - b[0] > .3 * 96 or b[3] - b[1] > .3 * 80 or (format == "yolo" and source.flags[m] & (CROWD | IGNORE)):
            continue
        hits = [r for r in rows if r[0] == source.paths[i] and np.abs(r[1] - b).max() < 1e-3]
        assert hits and {r[2] for r in hits} == {source.labels[m]}
        if format != "yolo": assert {r[3] for r in hits} == {source.flags[m]}
        if format == "coco": assert {r[4] for r in hits} == {source.attributes["text"][m]}


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 900), st.integers(1, 900), st.integers(16, 300), st.integers(16, 300),
    st.sampled_from([0, .1, .2, .25, .5]), st.sampled_from(module._CUTS), st.floats(0, 1), st.integers(0, 10**6),
)
def test_the_plan_against_plain_loops(h, w, th, tw, overlap, cut, min_visible, seed):
    rng = np.random.default_rng(seed)
    xy = rng.uniform(-20, (w, h), (9, 2))
    boxes = np.float32(np.c_[xy, xy + rng.uniform(0, 120, (9, 2))])
    ds = DetDataset("nowhere", ["a"], ["a.png"], [(h, w)],
                    np.zeros(9),
                    boxes,
                    np.zeros(9),
                    flags=rng.choice([0, 0, CROWD, IGNORE, DIFFICULT], 9))
    plan = module._plan(ds, (th, tw), overlap, min_visible, cut, 1., 0)
    want = []
    for k, (x1, y1, x2, y2) in enumerate(tile_grid((h, w), (th, tw), overlap).tolist()):
        for m, (b, f) in enumerate(zip(boxes.astype(float), ds.flags.tolist())):
            full = max(b[0], 0), max(b[1], 0), min(b[2], w), min(b[3], h)
            part = max(full[0], x1), max(full[1], y1), min(full[2], x2), min(full[3], y2)
            if part[2] <= part[0] or part[3] <= part[1]: continue
            share = (part[2] - part[0]) * (part[3] - part[1]) / ((full[2] - full[0]) * (full[3] - full[1]))
            if part != full:
                if min(part[2] - part[0], part[3] - part[1]) < 1: continue
                if share < min_visible and not f & (CROWD | IGNORE):
                    if cut == "drop": continue
                    if cut == "ignore": f |= IGNORE
            want.append((k, m, f, part[0] - x1, part[1] - y1, part[2] - x1, part[3] - y1))
    got = [(k, m, f, *b)
           for k, m, f, b in zip(plan.box_tile.tolist(), plan.box.tolist(), plan.flags.tolist(), plan.boxes.tolist())]
    assert [g[:3] for g in got] == [v[:3] for v in want]
    np.testing.assert_allclose(np.array(got).reshape(-1, 7), np.array(want).reshape(-1, 7), atol=1e-9)
    sure = (boxes >= 0).all(1) & (boxes[:, 2] <= w) & (boxes[:, 3] <= h) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    small = sure & (boxes[:, 2] - boxes[:, 0] <= tw * overlap) & (boxes[:, 3] - boxes[:, 1] <= th * overlap)
    at = plan.windows[plan.box_tile][:, [0, 1, 0, 1]] + plan.boxes
    # whole in some tile, and back where it was
    for m in np.flatnonzero(small): assert (np.abs(at[plan.box == m] - boxes[m]).max(1) < 1e-3).any()


def test_what_happened_is_counted(source, tmp_path):
    for cut in module._CUTS:
        ds = tile_dataset(source, tmp_path / cut, size=64, overlap=.2, min_visible=.4, cut=cut)
        c = read_tiles(tmp_path / cut).about["counts"]
        assert c["whole"] + c["clipped"] + c["ignored"] == len(
            ds.boxes
        ) and ds.flaws[0].kind == "tiled" and f"{c['whole']} whole, {c['clipped']} clipped" in ds.flaws[0].message
        assert (c["ignored"] > 0) == (
            cut == "ignore"
        ) and c["never_whole"] > 0 and f"{c['never_whole']} boxes are whole in no tile" in ds.flaws[0].message
        assert (ds.boxes[:, 2:] - ds.boxes[:, :2]).min() >= 1 - 1e-3 and (ds.boxes >= 0).all() and (
            ds.boxes[:, 2:] <= ds.sizes[ds.box_image][:, ::-1] + 1e-3).all()
    lossy = tile_dataset(source, tmp_path / "yolo", size=64, overlap=.2, min_visible=.4, format="yolo")
    assert any(f.kind == "lossy" for f in lossy.flaws) and len(lossy.boxes) < len(ds.boxes) + c["left_out"]


def empty_tiles(ds):
    return {p for k, p in enumerate(ds.paths) if not ((ds.boxes_of(k)[2] & (CROWD | IGNORE)) == 0).any()}


def test_background(tmp_path):
    (tmp_path / "s").mkdir()
    for k in range(40): cv2.imwrite(str(tmp_path / "s" / f"{k}.png"), np.full((120, 160, 3), k, np.uint8))
    ds = DetDataset(tmp_path/"s", ["a"], [f"{k}.png" for k in range(40)], [(120, 160)]*40, np.arange(40),
                    [(5, 5, 15, 15)]*40, np.zeros(40), ["train"]*30 + ["val"]*10)
    full, some, none = (tile_dataset(ds, tmp_path / f"b{b}", size=40, overlap=0, background=b) for b in (1, .25, 0))
    assert len(full) == 40*12 and full.flaws[0].message.endswith(
        "440 tiles have nothing to learn, 0 of them are left out")
    for part, share in ((some, .25), (none, 0)):
        assert len(part.split("val")) == 120 and len(part.boxes) == 40 # all of val, every box
        assert abs(len(part.split("train")) - 30 - share*330) <= 25 and empty_tiles(
            part.split("train")) <= empty_tiles(full)
    fewer = tile_dataset(ds.subset(np.arange(0, 40, 2)), tmp_path / "fewer", size=40, overlap=0, background=.25)
    # the others do not change it
    assert set(fewer.paths) == {p for p in some.paths if int(p.split("/")[-1].split("__")[0]) % 2 == 0}
    assert set(tile_dataset(ds, tmp_path / "seed", size=40, overlap=0, background=.25, seed=1).paths) != set(some.paths)


def test_each_image_is_decoded_once(source, tmp_path, monkeypatch):
    seen = []
    steps = []
    read = module.read_image
    monkeypatch.setattr(module, "read_image", lambda p: seen.append(p) or read(p))
    ds = tile_dataset(source, tmp_path / "t", size=40, workers=3, progress=lambda n, total: steps.append((n, total)))
    assert sorted(seen) == sorted(source.path_of(i)
                                  for i in range(4)) and steps == [(k, 4) for k in range(1, 5)] and len(ds) > 40


def test_jpeg(source, tmp_path):
    ds = tile_dataset(source, tmp_path / "t", size=80, quality=97)
    assert all(p.endswith(".jpg") for p in ds.paths) and "JPEG of quality 97" in ds.flaws[0].message
    i, x1, y1, x2, y2 = read_tiles(tmp_path / "t").tiles[ds.paths[0]]
    assert 0 < np.abs(ds.image(0).astype(int) - source.image(i)[y1:y2, x1:x2]).mean() < 25


def test_images_that_cannot_be_read_are_named(source, tmp_path):
    (tmp_path / "s").mkdir()
    for k, p in enumerate(["whole.png", "torn.png", "other.png", "gone.png"]):
        if k < 3: (tmp_path / "s" / p).write_bytes(source.path_of(0).read_bytes()[:None if k != 1 else 60])
    cv2.imwrite(str(tmp_path / "s" / "other.png"), np.zeros((20, 20, 3), np.uint8))
    ds = DetDataset(tmp_path/"s", ["a"], ["whole.png", "torn.png", "other.png", "gone.png"], [SIZES[0]]*4, np.arange(4),
                    [(5, 5, 30, 30)]*4, np.zeros(4), ["train"]*4)
    tiled = tile_dataset(ds, tmp_path / "t", size=128)
    assert {tiles[0]
            for tiles in read_tiles(tmp_path/"t").tiles.values()} == {0} and tiled.fingerprint() == read_dataset(
                tmp_path/"t").fingerprint()
    assert [(f.kind, f.file, f.action) for f in tiled.flaws[1:4]] == [("unreadable-image", p, "dropped")
                                                                      for p in ("torn.png", "other.png", "gone.png")]
    assert "20x20, not 300x200" in tiled.flaws[2].message and "1 image gave" in tiled.flaws[0].message
    with pytest.raises(InputError, match="no tile has a box: .*torn.png"): tile_dataset(ds.subset([1]), tmp_path / "u")
    assert not (tmp_path / "u").exists()


@pytest.mark.parametrize("where", ["pixels", "labels", "map"])
def test_nothing_is_left_behind(source, tmp_path, monkeypatch, where):
    def fail(*a, **k): raise OSError(28, "No space left on device")
    if where == "pixels": monkeypatch.setattr(Path, "write_bytes", fail)
    if where == "labels": monkeypatch.setattr(module, "write_labels", fail)
    if where == "map": monkeypatch.setattr(module, "write_bytes_atomic", fail)
    with pytest.raises(InputError, match="could not be written: .*No space left"):
        tile_dataset(source, tmp_path / "t", size=64)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "t").mkdir()
    with pytest.raises(InputError, match="No space left"): tile_dataset(source, tmp_path / "t", size=64)
    assert list(tmp_path.rglob("*")) == [tmp_path / "t"]


def test_what_is_refused(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    calls = [(dict(dst=tmp_path/"full"), "is there already"), (dict(dst=tmp_path/"full"/"x"), "is there already"),
             (dict(dst=source.root/"t"), "lies in the dataset"), (dict(size=3), "from 16 up"),
             (dict(overlap=1), "from 0 to .9"), (dict(cut="igrnoe"), "did you mean 'ignore'"),
             (dict(min_visible=2), "a share from 0 to 1"), (dict(background=-1), "background=-1: a share"),
             (dict(background=float("nan")), "a share"), (dict(quality=101), "1 to 100"),
             (dict(format="csv"), "no writer for 'csv'")]
    for kw, says in calls:
        with pytest.raises(InputError) as e: tile_dataset(source, **{"dst": tmp_path / "t", **kw})
        assert says in str(e.value) and "\n" not in str(e.value), str(e.value)
    assert not (tmp_path / "t").exists()


def test_a_map_that_is_damaged(source, tmp_path):
    tile_dataset(source, tmp_path / "t", size=64)
    file = tmp_path / "t" / "tiles.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    for damage in ({}, [], {**whole, "images": [["a", "x", 3]]}, {**whole, "tiles": [["a.png", 99, 0, 0, 5, 5]]},
                   {**whole, "tiles": [["a.png", 0, 0, 0,
                                        5]]}, {**whole, "tiles": 3}, {**whole, "tiles": [["a.png", 0, 0, 0, 5, 5000]]},
                   {**whole, "about": 1}, {**whole, "tiles": [["a.png", float("inf"), 0, 0, 5, 5]]}):
        file.write_text(json.dumps(damage))
        with pytest.raises(InputError, match="tiles.json: not a list of tiles"): read_tiles(tmp_path / "t")
    file.write_text('{"about"')
    with pytest.raises(InputError, match="tiles.json, line 1"): read_tiles(file)
    file.unlink()
    with pytest.raises(InputError, match="tiles.json: cannot be read"): read_tiles(tmp_path / "t")


class Finder:
    "Finds each rectangle by its blue, as much of it as is in the frame."
    contract = preset("yolox", ("a",), (96, 96))
    timings = {}
    confidence = .25
    iou = .45
    max_detections = 300

    def __call__(self, frames): return [self.find(f) for f in frames]

    def find(self, frame):
        at = [np.nonzero(frame[..., 0] == k) for k in np.unique(frame[..., 0])[1:]]
        return as_detections([(x.min(), y.min(), x.max() + 1, y.max() + 1) for y, x in at], [.9]*len(at), [0]*len(at))


def test_detections_come_back_as_a_tiled_session_gives_them(tmp_path):
    (tmp_path / "s").mkdir()
    rng = np.random.default_rng(1)
    truth = {}
    for k, (h, w) in enumerate([(300, 420), (200, 200), (80, 90)]):
        image = np.zeros((h, w, 3), np.uint8)
        boxes = []
        for y in range(4, h - 40, 44):
            for x in range(4, w - 40, 44):
                bw, bh = rng.integers(6, 40, 2)
                boxes.append((x, y, x + bw, y + bh))
                image[y:y + bh, x:x + bw] = len(boxes)
        truth[f"{k}.png"] = np.float32(boxes)
        cv2.imwrite(str(tmp_path / "s" / f"{k}.png"), image)
    n = [len(b) for b in truth.values()]
    ds = DetDataset(tmp_path/"s", ["a"], list(truth), [(300, 420), (200, 200), (80, 90)], np.repeat(np.arange(3), n),
                    np.concatenate(list(truth.values())), np.zeros(sum(n)))
    tiled = tile_dataset(ds, tmp_path / "t", size=96, overlap=.45)
    session = Finder()
    source = read_tiles(tmp_path / "t")
    found = session([tiled.image(k) for k in range(len(tiled))])
    for k, (path, boxes) in enumerate(truth.items()):
        assert source.images[k] == (path, *ds.sizes[k].tolist())
        mine = [n for n, name in enumerate(tiled.paths) if source.tiles[name][0] == k]
        windows = [source.tiles[tiled.paths[n]][1:] for n in mine]
        merged = merge_tiles([found[n] for n in mine], windows, source.images[k][1:], session.iou)
        np.testing.assert_array_equal(sorted(map(tuple, merged.boxes)), sorted(map(tuple, boxes)))
        np.testing.assert_array_equal(Tiled(session, 96, .45)(ds.image(k)).boxes, merged.boxes)


def test_a_split_of_the_tiles_keeps_images_together(source, tmp_path):
    ds = tile_dataset(replace(source, splits=None, groups=None), tmp_path / "t", size=48, overlap=.2)
    made = ensure_splits(ds, seed=2)
    assert set(made.groups) == set(source.paths)
    for g in set(made.groups): assert len(set(made.splits[made.groups == g])) == 1


@pytest.mark.data
def test_real(data, tmp_path):
    ds = read_dataset(data / "datasets" / "bccd").split("val")
    tiled = tile_dataset(ds.subset(np.arange(20)), tmp_path / "t", size=320, overlap=.3, quality=95)
    assert len(tiled) == 20 * 6 and not [f for f in tiled.flaws if f.severity != "note"]
    assert read_tiles(tmp_path / "t").about["counts"]["never_whole"] <= .1 * len(ds.subset(np.arange(20)).boxes)
