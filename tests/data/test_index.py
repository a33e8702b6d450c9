"""The index of a dataset: the same dataset again, never a stale or a torn one; sizes without decoding; columns in
bulk."""
import json
import multiprocessing
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jetson_det.core import InputError
from jetson_det.data import index
from jetson_det.data.dataset import CROWD, DIFFICULT, IGNORE, DetDataset, Flaw
from jetson_det.data.images.header import image_size, image_sizes
from jetson_det.runtime.files import cache_dir
from jetson_det.runtime.images import read_image
from jetson_det.data.formats.reader import Rows, walk_files
from jetson_det.data.formats.registry import read_dataset, write_dataset
from jetson_det.data.images.facts import trim_folder
from jetson_det.data.index import folder_state, index_file, keep_index, load_index, read_indexed
from jetson_det.scenes.docks import write_scenes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def read_only_scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes") / "s", 6, (240, 320), seed=3)


@pytest.fixture
def scenes(tmp_path):
    folder = write_scenes(tmp_path / "scenes", 6, (240, 320), seed=3)
    time.sleep(.03) # files that are as old as a reading are not trusted
    return folder


def same(a, b):
    assert a.fingerprint() == b.fingerprint(
    ) and a.flaws == b.flaws and a.root == b.root and a.format == b.format and a.classes == b.classes
    assert all(type(f) is Flaw for f in a.flaws) and a.attributes.keys() == b.attributes.keys()
    for name in ("paths", "sizes", "box_image", "boxes", "labels", "splits", "groups", "image_ids", "flags"):
        x = getattr(a, name)
        y = getattr(b, name)
        assert x.dtype == y.dtype and x.shape == y.shape and (x == y).all(), name


def opened(path, **kw):
    "The dataset, and whether it came from an index."
    said = []
    return read_indexed(path, say=said.append, **kw), any("index" in s for s in said)


# Where

def test_cache_dir(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("JETSON_DET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_dir() == tmp_path / "x/jetson_det"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache/jetson_det"


# The same again

@pytest.mark.parametrize("format", ["coco", "voc", "yolo"])
def test_every_format_comes_back(tmp_path, read_only_scenes, format):
    write_dataset(read_dataset(read_only_scenes), tmp_path / "d", format)
    time.sleep(.03)
    (first, kept), (again, found) = opened(tmp_path / "d"), opened(tmp_path / "d")
    assert (kept, found) == (False, True)
    same(again, first)
    same(again, read_dataset(tmp_path / "d"))


def test_a_single_label_file_and_relative_paths(scenes, monkeypatch):
    path = scenes / "annotations/train.json"
    same(opened(path)[0], opened(path)[0])
    assert opened(path)[1]
    monkeypatch.chdir(scenes.parent)
    again, found = opened("scenes/annotations/train.json")
    assert found and again.root == read_dataset("scenes/annotations/train.json").root == Path("scenes")
    opened("scenes")
    again, found = opened(scenes)
    assert found and again.root == scenes and read_image(again.path_of(0)).shape == (240, 320, 3)


def test_format_and_classes_are_asked_for(scenes):
    opened(scenes)
    turned = tuple(reversed(read_dataset(scenes).classes))
    assert opened(scenes, format="coco")[1] is False and opened(scenes, format="coco")[1]
    ds, found = opened(scenes, classes=turned)
    assert not found and ds.classes == turned and opened(
        scenes, classes=turned)[0].classes == turned and opened(scenes)[0].classes != turned
    with pytest.raises(InputError): read_indexed(scenes, format="voc")
    with pytest.raises(InputError): read_indexed(scenes / "nothing")


def test_all_columns_survive(tmp_path, cache):
    root = tmp_path / "d"
    root.mkdir()
    paths = ["Straße & \"x\"\n2.jpg", "写真/1 #%.png", "\udcff.jpg"]
    ds = DetDataset(root, ("a\u2028b", "ü"), paths, [(3, 4), (5, 6), (7, 8)], [0, 0, 2], [(0, 0, 1, 1), (-1, 0, 1.5, 2),
                                                                                          (0, 0, 3e6, 1)], [1, 0, 1],
                    ["train", "", "val"], ["", "g\0h", "g"], [2**62, -5, 7], [CROWD, IGNORE | DIFFICULT, 0], "coco",
                    [Flaw("error", "no-images", "x\ud800", "", "m", "noted")],
                    {"text": ["", "B MW 12 京", "\0"], "attribute x": ["1", "", ""], "none": ["", "", ""]})
    assert keep_index(ds, time.time_ns() + 10**9, root)
    back = load_index(root)
    same(back, ds)
    assert {k: v.tolist() for k, v in back.attributes.items()} == {k: v.tolist() for k, v in ds.attributes.items()}
    back.boxes[0] = 7 # its arrays can be written to, as those of a reader can


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_dataset_survives(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("d")
    n = data.draw(st.integers(1, 5))
    m = data.draw(st.integers(0, 8))
    word = st.text(max_size=5)
    paths = data.draw(
        st.lists(st.text(min_size=1, max_size=5).filter(lambda p: not p.startswith(("/", "../"))),
                 min_size=n,
                 max_size=n,
                 unique=True))
    take = lambda values, k: data.draw(st.lists(values, min_size=k, max_size=k))
    ds = DetDataset(root, ("a", "b"),
                    paths, [(2, 3)]*n,
                    sorted(take(st.integers(0, n - 1), m)),
                    np.array(take(st.floats(-1e7, 1e7, width=32), 4*m)).reshape(m, 4),
                    take(st.integers(0, 1), m),
                    take(word, n),
                    take(word, n),
                    flags=take(st.integers(0, 7), m),
                    attributes={k: take(word, m)
                                for k in data.draw(st.sets(word, max_size=3))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JETSON_DET_CACHE", str(tmp_path_factory.mktemp("c")))
        assert keep_index(ds, time.time_ns() + 10**9, root)
        same(load_index(root), ds)


# Never a stale one

def change_label(folder):
    file = folder / "annotations/train.json"
    file.write_text(file.read_text().replace('"iscrowd": 0', '"iscrowd": 1', 1))


def touch_later(folder): os.utime(folder / "annotations/train.json", ns=(1, 1))
def remove_image(folder): next((folder / "images/train").iterdir()).unlink()
def add_image(folder): cv2.imwrite(str(folder / "images/new.png"), np.zeros((4, 4, 3), np.uint8))
def add_label(folder): (folder / "other.xml").write_text("<annotation/>")


def swap_images(folder):
    a, b, *_ = sorted((folder / "images").rglob("*.jpg"))
    a.rename(folder / "t.jpg"), b.rename(a), (folder / "t.jpg").rename(b)
    os.utime(a, ns=(5, 5))


def same_length_same_time(folder):
    "As `rsync --times` and some editors leave it."
    file = folder / "annotations/train.json"
    times = file.stat()
    change_label(folder)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)


@pytest.mark.parametrize("change", [change_label, touch_later, remove_image, add_image, add_label, swap_images,
                                    same_length_same_time])
def test_a_change_is_seen(scenes, change):
    opened(scenes)
    assert opened(scenes)[1]
    change(scenes)
    assert load_index(scenes) is None


def test_hidden_files_and_the_cache_are_no_change(scenes):
    opened(scenes)
    (scenes / ".ipynb_checkpoints").mkdir()
    (scenes / ".DS_Store").write_bytes(b"x")
    assert opened(scenes)[1]


def test_an_image_that_appears_beside_a_json(tmp_path):
    labels = dict(images=[dict(id=1, file_name="1.png", width=4, height=4)],
                  annotations=[dict(image_id=1, category_id=1, bbox=[0, 0, 2, 2])],
                  categories=[dict(id=1, name="a")])
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.json").write_text(json.dumps(labels))
    time.sleep(.03)
    assert [f.kind for f in opened(tmp_path / "d/a.json")[0].flaws] == ["no-images"]
    again, found = opened(tmp_path / "d/a.json")
    assert found and [(f.severity, f.kind) for f in again.flaws] == [("error", "no-images")]
    cv2.imwrite(str(tmp_path / "d/1.png"), np.zeros((4, 4, 3), np.uint8))
    assert not opened(tmp_path / "d/a.json")[0].flaws


def test_what_changes_while_it_is_read_is_not_kept(scenes):
    ds = read_dataset(scenes)
    assert keep_index(ds, time.time_ns(), scenes)
    start = time.time_ns()
    touched = scenes / "annotations/train.json"
    touched.write_bytes(touched.read_bytes())
    assert not keep_index(ds, start, scenes)
    assert not keep_index(ds, start - 10**9, scenes)


def test_images_outside_are_not_kept(tmp_path, scenes):
    ds = read_dataset(scenes)
    ds.paths[0] = "../x.jpg"
    assert not keep_index(ds, time.time_ns(), scenes)


def test_other_readers_made_it(scenes, monkeypatch):
    opened(scenes)
    monkeypatch.setattr(index, "_readers", lambda: "others")
    assert load_index(scenes) is None


# Never a torn one

def test_damage_is_no_index(scenes):
    first, _ = opened(scenes)
    file = index_file(scenes)
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for k in range(120):
        bad = bytearray(whole)
        if k % 2: del bad[rng.integers(len(bad)):]
        else: bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        file.write_bytes(bad)
        assert load_index(scenes) is None
    for bad in (b"", b"\0" * 1000, whole + b"x", index._to_bytes({"readers": index._readers()}, {}),
                index._to_bytes({}, {})):
        file.write_bytes(bad)
        assert load_index(scenes) is None
    same(opened(scenes)[0], first)
    assert opened(scenes)[1]


def test_opening_takes_the_memory_of_the_columns(tmp_path):
    "Neither the file nor a copy of it is in memory beside the arrays."
    root = tmp_path / "d"
    root.mkdir()
    n = 100_000
    boxes = np.tile([1., 2., 30., 40.], (n, 1))
    ds = DetDataset(root, ("a",), ["a.jpg"], [(50, 60)], np.zeros(n), boxes, np.zeros(n), areas=np.full(n, 7.))
    assert keep_index(ds, time.time_ns() + 10**9, root)
    columns = (ds.box_image, ds.boxes, ds.labels, ds.flags, ds.areas)
    tracemalloc.start()
    try:
        back = load_index(root)
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    same(back, ds)
    assert peak < 1.5 * sum(column.nbytes for column in columns) + (2 << 20)


def test_a_cache_that_cannot_be_written(scenes, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path / "file"))
    said = []
    assert len(read_indexed(scenes,
                            say=said.append)) == 6 and "no index could be kept" in said[0] and "\n" not in said[0]


def _open(path): return read_indexed(path).fingerprint()


def test_two_processes_at_once(scenes, cache):
    with multiprocessing.get_context("fork").Pool(4) as pool: prints = pool.map(_open, [scenes] * 12, chunksize=1)
    assert len(set(prints)) == 1 and [p.suffix for p in (cache / "index").iterdir()] == [".npz"]


def test_old_ones_are_removed(tmp_path):
    for k in range(10):
        (tmp_path / f"{k}.npz").write_bytes(bytes(100))
        os.utime(tmp_path / f"{k}.npz", (1000 + k, 1000 + k))
    (tmp_path / "old.part").write_bytes(b"")
    os.utime(tmp_path / "old.part", (2000, 2000))
    trim_folder(tmp_path, max_files=6, max_bytes=10**6)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{k}.npz" for k in range(5, 10)]
    trim_folder(tmp_path, max_files=64, max_bytes=250)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["8.npz", "9.npz"]


def test_the_one_that_is_used_stays(scenes, cache):
    opened(scenes)
    os.utime(index_file(scenes), (1, 1))
    opened(scenes)
    assert index_file(scenes).stat().st_mtime > time.time() - 60


# Walking

def test_walking_follows_links_once(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/x.jpg").write_bytes(b"")
    os.symlink(tmp_path, tmp_path / "a/up")
    os.symlink("loop", tmp_path / "a/loop")
    os.symlink(tmp_path / "nowhere", tmp_path / "a/dead.jpg")
    (tmp_path / "other").mkdir()
    os.symlink(tmp_path / "a", tmp_path / "z")
    assert walk_files(tmp_path/"a") == ["b/x.jpg", "dead.jpg", "loop", "up/other/.".rstrip("/.")] or set(
        walk_files(tmp_path/"a")) == {"b/x.jpg", "dead.jpg", "loop"}
    assert folder_state(tmp_path / "a")[0] == folder_state(tmp_path / "a")[0] != folder_state(tmp_path / "other")[0]


# Sizes

def chunk(kind, n): return kind + n.to_bytes(2, "big") + bytes(n - 2)


@settings(max_examples=60, deadline=None)
@given(
    h=st.integers(1, 400), w=st.integers(1, 400),
    kind=st.sampled_from([".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff"]), gray=st.booleans(),
    notes=st.lists(st.integers(2, 65000), max_size=4), lossless=st.booleans(),
)
def test_sizes_without_decoding(tmp_path_factory, h, w, kind, gray, notes, lossless):
    path = tmp_path_factory.mktemp("i") / f"x{kind}"
    image = np.zeros((h, w) if gray else (h, w, 3), np.uint8)
    flags = [cv2.IMWRITE_WEBP_QUALITY, 101 if lossless else 60] if kind == ".webp" else []
    data = cv2.imencode(kind, image, flags)[1].tobytes()
    if kind == ".jpg":
        data = data[:2] + b"".join(chunk(b"\xff\xe1", n) for n in notes) + b"\xff\xff" * (len(notes) % 2) + data[2:]
    path.write_bytes(data)
    assert image_size(path) == (h, w) == read_image(path).shape[:2]


@pytest.mark.parametrize("save", [
    dict(format="WEBP", quality=50, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"), dict(format="WEBP", lossless=True),
    dict(format="TIFF", compression="tiff_lzw"), dict(format="JPEG", progressive=True, icc_profile=bytes(200_000)),
    dict(format="PNG", optimize=True), dict(format="TIFF", big_tiff=True),
])
def test_sizes_of_files_of_another_library(tmp_path, save):
    Image = pytest.importorskip("PIL.Image")
    Image.new("RGB", (301, 77), (1, 2, 3)).save(tmp_path / "x", **save)
    assert image_size(tmp_path / "x") == (77, 301)


def test_what_has_no_size(tmp_path):
    jpg = cv2.imencode(".jpg", np.zeros((9, 9, 3), np.uint8))[1].tobytes()
    bad = {
        "empty": b"", "text": b"no image", "gif": b"GIF89a" + bytes(100), "cut.jpg": jpg[:30],
        "only.jpg": b"\xff\xd8" + b"\xff\xd0"*50_000, "pixels.jpg": b"\xff\xd8\xff\xda\0\1",
        "huge.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\xff"*8 + bytes(20), "tags.tif": b"II*\0" + b"\xff"*100,
        "riff.webp": b"RIFF" + bytes(4) + b"WEBPVP8 " + bytes(30)
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError) as e: image_size(tmp_path / name)
        assert name in str(e.value) and "\n" not in str(e.value)
    for name in ("nothing.jpg", "a\0b.jpg", "\ud800.jpg"):
        with pytest.raises(InputError): image_size(f"{tmp_path}/{name}")
    with pytest.raises(InputError): image_size(tmp_path)


def test_damaged_headers_give_a_size_or_one_line(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "x"
    for kind in (".jpg", ".png", ".bmp", ".webp", ".tif"):
        data = cv2.imencode(kind, rng.integers(0, 255, (40, 50, 3), np.uint8))[1].tobytes()
        for _ in range(60):
            bad = bytearray(data)
            for _ in range(3): bad[rng.integers(60)] = rng.integers(256)
            path.write_bytes(bad)
            try: size = image_size(path)
            except InputError as e: assert "\n" not in str(e)
            else: assert 0 < min(size) and max(size) < 2**24


def test_many_sizes_on_a_slow_disk(tmp_path, monkeypatch):
    from jetson_det.data.images import header as imagefile
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((4, 5, 3), np.uint8))
    paths = ["a.png", "b.png"] * 250
    quick = image_sizes(tmp_path, paths)
    monkeypatch.setattr(imagefile, "_SLOW", 0)
    slow = image_sizes(tmp_path, paths)
    assert quick[::2] == slow[::2] == [(4, 5)]*250 and [str(e)
                                                        for e in quick[1::2]] == [str(e) for e in slow[1::2]
                                                                                  ] and isinstance(slow[1], InputError)


# Rows in bulk

def test_single_and_many_are_the_same(tmp_path):
    for k in range(3): cv2.imwrite(str(tmp_path / f"{k}.png"), np.zeros((4 + k, 5, 3), np.uint8))
    (tmp_path / "3.png").write_bytes(b"")
    paths = [f"{k}.png" for k in range(4)]
    declared = [(4, 5), (9, 9), None, None]
    one = Rows(tmp_path, "x")
    many = Rows(tmp_path, "x")
    at = [one.image(p, "s", "train", d, k, "g") for k, (p, d) in enumerate(zip(paths, declared))]
    assert many.images(paths, "s", "train", declared, list(range(4)), ["g"] * 4) == at == [0, 1, 2, None]
    boxes = np.arange(24.).reshape(6, 4)
    for k, i in enumerate((2, 0, 1, 0, 2, 2)): one.box(i, boxes[k], k % 2, k, **({"text": f"{k}"} if k > 3 else {}))
    many.box_arrays([2, 0], boxes[:2], [0, 1], np.array([0, 1], np.uint8))
    many.box_arrays([1, 0, 2, 2], boxes[2:], [0, 1, 0, 1], np.array([2, 3, 4, 5], np.uint8), {"text": {2: "4", 3: "5"}})
    a = one.dataset(("a", "b"))
    b = many.dataset(("a", "b"))
    same(a, b)
    assert a.attributes["text"].tolist() == b.attributes["text"].tolist() == ["", "", "", "", "4", "5"]
    with pytest.raises(InputError, match="both label"): many.images(["0.png"], "t")


@pytest.mark.data
@pytest.mark.parametrize("name", [
    "bccd", "raccoon", "kangaroo", "aerial/coco_utils/visdrone2019-det-train-first50image.json",
])
def test_real_sets(data, name):
    same(opened(data / "datasets" / name)[0], read_dataset(data / "datasets" / name))
    again, found = opened(data / "datasets" / name)
    assert found
    same(again, read_dataset(data / "datasets" / name))


@pytest.mark.slow
def test_a_hundred_thousand_images(tmp_path):
    "Time and memory of fresh processes stay within the limits of the benchmark."
    bench = Path(__file__).parents[2] / "bench/bench_data.py"
    done = subprocess.run([sys.executable, str(bench), "--only", "scale", "--rounds", "1"],
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
