"""Generated scenes: the same everywhere, boxes that fit, and COCO folders that are whole or known to be torn."""
import contextlib
import hashlib
import io
import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from pycocotools.coco import COCO

from jetson_det.core import rng_for
from jetson_det.scenes.cutouts import CLUTTER, POSES, SACK_POSES, clutter_cutout, person_cutout, sack_cutout
from jetson_det.runtime.files import InputError, read_json, write_json_atomic
from jetson_det.scenes import docks
from jetson_det.scenes.docks import dock_scene, write_scenes


SIZE = (360, 640)


def digest(scene):
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in scene)).hexdigest()


def changed(a, b, more_than=0):
    d = cv2.absdiff(a, b).max(-1) > more_than
    x, y, w, h = cv2.boundingRect(d.view(np.uint8))
    return np.array([x, y, x + w, y + h])


def labeled(seed, count=6):
    cam = docks._make_camera(rng_for(seed), SIZE)
    return cam, [s for s in docks._place_objects(seed, cam, count) if s.label >= 0]


# --- one scene

def test_the_same_in_another_process():
    code = (
        "import hashlib, numpy as np; from jetson_det.scenes.docks import dock_scene\nfor s in (3, 11):"
        " print(hashlib.sha256(b''.join(np.ascontiguousarray(a).tobytes() for a in dock_scene(s))).hexdigest())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out == [digest(dock_scene(s)) for s in (3, 11)]


def test_order_and_threads_do_not_matter():
    first = [digest(dock_scene(s)) for s in (5, 6)]
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        assert [digest(dock_scene(s)) for s in (6, 5)] == first[::-1]
    finally:
        cv2.setNumThreads(threads)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2 ** 62), h=st.integers(64, 480), w=st.integers(64, 480), hard=st.floats(0, 1))
def test_any_scene_is_valid(seed, h, w, hard):
    img, boxes, labels = dock_scene(seed, (h, w), hard=hard)
    assert img.shape == (h, w, 3) and img.dtype == np.uint8
    assert boxes.dtype == np.float32 and boxes.shape == (len(labels), 4) and labels.dtype == np.int64
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (w, h)).all()
    assert ((boxes[:, 2:] - boxes[:, :2]) >= 8).all()
    assert set(labels) <= {0, 1}


def test_sizes_counts_and_empty_scenes():
    scenes = [dock_scene(s)[1:] for s in range(250)]
    boxes, labels = (np.concatenate(p) for p in zip(*scenes))
    wh = boxes[:, 2:] - boxes[:, :2]
    side = np.sqrt(wh.prod(1))
    assert wh.min() >= 8 and wh.max() <= 300
    assert ((side >= 20) & (side <= 200)).mean() > .85 and side.min() < 16 and side.max() > 150
    empty = np.mean([len(l) == 0 for _, l in scenes])
    assert .04 < empty < .2
    assert np.bincount(labels, minlength=2).min() > .25 * len(labels)
    assert max(len(l) for _, l in scenes) >= 12


def test_one_object_more_leaves_the_room_alone():
    for seed in range(8):
        none, boxes, _ = dock_scene(seed, objects=0, hard=0)
        one, found, _ = dock_scene(seed, objects=1, hard=0)
        assert len(boxes) == 0 and len(found) <= 1
        if len(found):
            far = np.ones(SIZE, bool)
            x1, y1, x2, y2 = found[0].astype(int)
            far[max(0, y1 - 60):y2 + 60, max(0, x1 - 60):x2 + 60] = False
            assert (cv2.absdiff(none, one).max(-1)[far] <= 1).mean() > .99


def test_hard_scenes_have_more_noise():
    # the median passes over edges, which differ from room to room, and keeps the noise that is everywhere
    def rough(hard):
        return np.mean([
            np.median(np.abs(cv2.Laplacian(dock_scene(s, objects=0, hard=hard)[0][:40], cv2.CV_32F))) for s in range(30)
        ])
    assert rough(1) > rough(0)


@pytest.mark.parametrize("bad", [
    dict(seed=-1), dict(seed=1.5), dict(seed=True), dict(seed=0, size=(360, 0)), dict(seed=0, size=(360, 640, 3)),
    dict(seed=0, size=360), dict(seed=0, size=(5000, 640)), dict(seed=0, objects=-1), dict(seed=0, objects="3"),
    dict(seed=0, hard=1.1), dict(seed=0, hard=float("nan")), dict(seed=0, hard=None),
])
def test_what_cannot_be_meant_is_one_line(bad):
    with pytest.raises(InputError) as e:
        dock_scene(**bad)
    assert "\n" not in str(e.value)


# --- boxes

def clearly_covered(sprite):
    "The box of the pixels of which a sprite covers a quarter or more, measured on a black and on a white image."
    black, white = (docks._paint(np.full((*SIZE, 3), v, np.uint8), [sprite]) for v in (0, 255))
    x, y, w, h = cv2.boundingRect((cv2.absdiff(black, white).max(-1) <= 255 - 64).view(np.uint8))
    return np.array([x, y, x + w, y + h])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2 ** 40))
@example(seed=3863) # all that is seen of a hat is the soft edge of its brim: the box begins below it
def test_a_lone_thing_changes_the_pixels_of_its_box(seed):
    cam, things = labeled(seed)
    room = docks._draw_room(rng_for(seed, 1), cam)
    for s in things:
        box = docks._boxes_of([s], SIZE)[0][0]
        h, w = s.bgra.shape[:2]
        is_whole = s.x >= 0 and s.y >= 0 and s.x + w <= SIZE[1] and s.y + h <= SIZE[0]
        assert (clearly_covered(s) == box).all()
        if is_whole: assert np.abs(changed(room, docks._paint(room, [s])) - box).max() <= 2


def test_boxes_still_fit_under_the_light():
    "Seen against a room of another color, after light: the outline is sharp on all four sides."
    for seed in range(20):
        cam, things = labeled(seed)
        gain = docks._light_map(rng_for(seed, 9), SIZE, 0.)
        magenta = np.full((*SIZE, 3), (255, 0, 255), np.uint8)
        for s in things:
            seen = changed(docks._shine(magenta, gain), docks._shine(docks._paint(magenta, [s]), gain), 40)
            assert np.abs(seen - docks._boxes_of([s], SIZE)[0][0]).max() <= 2


@pytest.mark.parametrize("px", [10, 33, 90, 300, 700])
def test_cutouts_are_trimmed_and_premultiplied(px):
    rng = rng_for(px)
    cuts = [sack_cutout(rng, px, px*.6, p)
            for p in SACK_POSES] + [person_cutout(rng, px, p, f) for p in POSES for f in (-1, 1)]
    cuts += [clutter_cutout(rng, n, px, px) for n in CLUTTER]
    for c in cuts:
        a = c.bgra[..., 3]
        assert a.size and min(a[0].max(), a[-1].max(), a[:, 0].max(), a[:, -1].max()) >= 64
        assert (c.bgra[..., :3].astype(int) <= a[..., None].astype(int) + 2).all()


def test_an_upright_person_has_the_height_that_was_asked_for():
    for px in (40, 120, 260):
        assert abs(person_cutout(rng_for(1), px, "front").bgra.shape[0] / px - 1) < .06


def test_hidden_things_go_and_half_hidden_things_stay():
    def square(x, label, depth): return docks._Sprite(np.full((100, 100, 4), 255, np.uint8), x, 50, label, depth, True)
    thing = square(100, 0, 5.)
    for shift, stays in ((0, False), (20, False), (30, True), (60, True)):
        kept = docks._drop_hidden([thing, square(100 + shift, -1, 4.)], SIZE)
        assert any(s.label == 0 for s in kept) is stays
    assert any(s.label == 0 for s in docks._drop_hidden([thing, square(100, -1, 6.)], SIZE))
    for x, stays in ((-80, False), (-70, True), (620, False), (600, True)):
        assert bool(docks._drop_hidden([square(x, 1, 5.)], SIZE)) is stays
    box = docks._boxes_of([square(-70, 1, 5.)], SIZE)[0]
    assert box.tolist() == [[0, 50, 30, 150]]


def test_clutter_has_no_boxes():
    cam = docks._make_camera(rng_for(0), SIZE)
    boxes, labels = docks._boxes_of(docks._place_clutter(0, cam, 10), SIZE)
    assert boxes.shape == (0, 4) and labels.shape == (0,)


# --- sets on disk

@pytest.fixture(scope="module")
def dock(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes") / "dock", count=20, size=(96, 160), seed=4)


def test_pycocotools_reads_it(dock):
    ids, files = [], []
    for split, n in (("train", 16), ("val", 2), ("test", 2)):
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(dock / "annotations" / f"{split}.json"))
        assert len(coco.imgs) == n
        assert {c["id"]: c["name"] for c in coco.cats.values()} == {1: "Sack", 2: "Person"}
        assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
        for i, image in coco.imgs.items():
            img = cv2.imread(str(dock / "images" / split / image["file_name"]))
            assert img.shape[:2] == (image["height"], image["width"]) == (96, 160)
            _, boxes, labels = dock_scene(docks._scene_seed(4, i - 1), (96, 160))
            anns = coco.loadAnns(coco.getAnnIds(i))
            xywh = np.array([a["bbox"] for a in anns]).reshape(-1, 4)
            assert np.array_equal(np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1), boxes)
            assert [a["category_id"] - 1 for a in anns] == labels.tolist()
            assert all(a["area"] == a["bbox"][2] * a["bbox"][3] and a["iscrowd"] == 0 for a in anns)
        ids += list(coco.imgs)
        files += [i["file_name"] for i in coco.imgs.values()]
    assert sorted(ids) == list(range(1, 21)) and len(set(files)) == 20


def test_again_is_a_look_not_a_drawing(dock, monkeypatch):
    monkeypatch.setattr(docks, "dock_scene", lambda *a, **k: pytest.fail("drew a scene again"))
    assert write_scenes(dock, count=20, size=(96, 160), seed=4) == dock


@pytest.mark.parametrize("damage", ["image", "annotations", "mark"])
def test_a_torn_set_is_made_whole(tmp_path, damage):
    folder = write_scenes(tmp_path / "d", count=5, size=(96, 160))
    whole = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    if damage == "image": (folder / "images/train/000002.jpg").unlink()
    if damage == "annotations": (folder / "annotations/val.json").write_text("{")
    if damage == "mark":
        write_json_atomic(folder / "scenes.json", {**read_json(folder / "scenes.json"), "complete": False})
    write_scenes(folder, count=5, size=(96, 160))
    assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == whole


def test_interrupted_halfway(tmp_path, monkeypatch):
    real = docks.dock_scene
    calls = []

    def dies(*args, **kw):
        calls.append(1)
        if len(calls) > 3: raise KeyboardInterrupt
        return real(*args, **kw)
    monkeypatch.setattr(docks, "dock_scene", dies)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "d", count=6, size=(96, 160))
    assert not list((tmp_path / "d/annotations").iterdir())
    assert json.loads((tmp_path / "d/scenes.json").read_text())["complete"] is False
    monkeypatch.setattr(docks, "dock_scene", real)
    write_scenes(tmp_path / "d", count=6, size=(96, 160))
    assert json.loads((tmp_path / "d/scenes.json").read_text())["complete"] is True


def test_foreign_folders_are_not_touched(tmp_path, dock):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not generated scenes"): write_scenes(tmp_path, count=5)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match="is a file"): write_scenes(tmp_path / "notes.txt", count=5)
    for other in (dict(seed=5), dict(count=21), dict(quality=80), dict(hard=.1), dict(size=(96, 192))):
        with pytest.raises(InputError, match="other settings"):
            write_scenes(dock, **{**dict(count=20, size=(96, 160), seed=4), **other})


@pytest.mark.parametrize("bad", [
    dict(count=2), dict(count=-3), dict(count=2.5), dict(quality=0), dict(seed=-1), dict(size=(3, 3)), dict(hard=2),
    dict(splits={"train": .5}), dict(splits={"train": 1.2, "val": -.2}), dict(splits={"../x": 1.}),
])
def test_bad_settings_write_nothing(tmp_path, bad):
    with pytest.raises(InputError): write_scenes(tmp_path / "new", **bad)
    assert not (tmp_path / "new").exists()


def test_a_longer_set_begins_like_a_shorter_one(tmp_path):
    a, b = (write_scenes(tmp_path / str(n), count=n, size=(96, 160), splits={"train": 1.}) for n in (3, 5))
    for k in (1, 2, 3):
        name = f"images/train/{k:06d}.jpg"
        assert (a / name).read_bytes() == (b / name).read_bytes()


@given(count=st.integers(3, 5000), val=st.floats(.01, .45), test=st.floats(.01, .45))
def test_splits_add_up(count, val, test):
    try: counts = docks._scene_counts(count, {"train": 1 - val - test, "val": val, "test": test})
    except InputError: return
    assert sum(counts.values()) == count and min(counts.values()) >= 1
