"""The stores of decoded pixels: what is in them, whole or not there, told before they are filled."""
import errno
import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from signals import hear_ctrl_c

from jetson_det.core import InputError
from jetson_det.data.augment import pixel_store as cache
from jetson_det.data.augment.pixel_store import _disk_store, _memory_store, _store_name, _store_offsets, open_store
from jetson_det.data.augment.render import ImageCache
from jetson_det.data.dataset import DetDataset


def store_size(ds, detail): return int(_store_offsets(ds, detail)[-1])


SIZES = [(72, 128), (100, 33), (1, 1), (301, 467), (480, 640), (97, 101)]


def make(folder, sizes=SIZES, ext="jpg"):
    rng = np.random.default_rng(len(sizes))
    for i, (h, w) in enumerate(sizes):
        cv2.imwrite(str(folder / f"{i}.{ext}"), cv2.resize(rng.integers(0, 256, (9, 9, 3), np.uint8), (w, h)))
    return DetDataset(folder, ("a",), [f"{i}.{ext}" for i in range(len(sizes))], sizes)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pixels"


@pytest.fixture
def ds(tmp_path):
    (tmp_path / "images").mkdir()
    return make(tmp_path / "images")


def assert_holds(store, ds, detail):
    expected = ImageCache(ds, detail)
    for i in range(len(ds)): assert np.array_equal(store.get(i), expected.pixels(i))


@pytest.mark.parametrize("ext", ["jpg", "png"])
@pytest.mark.parametrize("detail", [(640, 640), (96, 160), (32, 32)])
@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_pixels_are_those_of_the_image_cache(tmp_path, kind, detail, ext):
    ds = make(tmp_path, ext=ext)
    lines = []
    store = open_store(kind, ds, detail, lines.append)
    assert_holds(store, ds, detail)
    assert len(store) == len(ds) and store.nbytes == store_size(ds, detail)
    assert len(lines) == 1 and f"{len(ds)} images" in lines[0]
    with pytest.raises(ValueError, match="read-only"): store.get(0)[...] = 0
    assert np.shares_memory(store.get(3), store.get(3)) # views
    cv2.warpAffine(store.get(3), np.eye(2, 3), (20, 20)) # OpenCV reads what may not be written


def test_the_size_is_the_sum_of_the_images(ds):
    exact = sum(ImageCache(ds, (640, 640)).pixels(i).nbytes for i in range(len(ds)))
    assert exact <= store_size(ds, (640, 640)) < exact + 64 * len(ds)
    assert store_size(ds, (96, 160)) < store_size(ds, (640, 640)) / 4
    assert store_size(ds.subset([]), (640, 640)) == 0


def test_no_file_is_opened_for_the_size(ds, tmp_path):
    for f in (tmp_path / "images").iterdir(): f.unlink()
    assert store_size(ds, (640, 640)) > 0


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_what_does_not_fit_is_refused_before_anything_is_read(ds, tmp_path, cache_folder, monkeypatch, kind):
    for f in (tmp_path / "images").iterdir(): f.write_bytes(b"not an image") # reading one would raise something else
    monkeypatch.setattr(cache, "free_memory", lambda: cache._KEEP_FREE + store_size(ds, (640, 640)) - 1)
    usage = cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage",
                        lambda p: usage._replace(free=cache._KEEP_FREE_ON_DISK + store_size(ds, (640, 640))))
    with pytest.raises(InputError, match=f"data.cache={kind}: 6 images take .*[KM]iB, and .* free") as e:
        open_store(kind, ds, (640, 640), print)
    assert "\n" not in str(e.value)
    assert not cache_folder.exists() or not list(cache_folder.iterdir())


def test_memory_is_shared_with_forked_processes(ds):
    store = _memory_store(ds, (640, 640), lambda line: None)
    store._pixels.flags.writeable = True
    if not (child := os.fork()):
        store.get(4)[5, 6] = 1, 2, 3, 4
        os._exit(0)
    os.waitpid(child, 0)
    assert store.get(4)[5, 6].tolist() == [1, 2, 3, 4]


def test_a_container_may_allow_less(tmp_path):
    files = {"memory.max": "5000\n", "memory.current": "3000\n", "memory.stat": "anon 10\ninactive_file 700\n"}
    for name, text in files.items(): (tmp_path / name).write_text(text)
    assert cache._container_memory(tmp_path) == 2700
    (tmp_path / "memory.max").write_text("max\n")
    assert cache._container_memory(tmp_path) == float("inf")
    (tmp_path / "memory.max").unlink()
    assert cache._container_memory(tmp_path) == float("inf")


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_an_unreadable_image_is_named(ds, tmp_path, cache_folder, kind):
    (tmp_path / "images/3.jpg").write_bytes(b"not a jpeg")
    with pytest.raises(InputError, match="3.jpg: not an image"): open_store(kind, ds, (640, 640), print)
    assert not cache_folder.exists() or not list(cache_folder.iterdir())
    (tmp_path / "images/3.jpg").unlink()
    with pytest.raises(InputError, match="3.jpg: cannot be read: No such file"): open_store(kind, ds, (640, 640), print)


def test_a_finished_file_is_used_again(ds, cache_folder, monkeypatch):
    store = _disk_store(ds, (640, 640), print)
    monkeypatch.setattr(cache, "decode_all", None) # would be called
    assert_holds(_disk_store(ds, (640, 640), print), ds, (640, 640))
    assert_holds(_disk_store(ds, (560, 650), print), ds, (640, 640)) # the same reductions
    assert [f.name for f in cache_folder.iterdir()] == [_store_name(ds, (640, 640)) + ".pixels"]


@pytest.mark.parametrize("change", ["content", "time"])
def test_another_file_when_an_image_changes(ds, tmp_path, cache_folder, change):
    old = _store_name(ds, (640, 640))
    kept = _disk_store(ds, (640, 640), print)
    if change == "content": cv2.imwrite(str(tmp_path / "images/3.jpg"), np.full((301, 467, 3), 99, np.uint8))
    else: os.utime(tmp_path / "images/3.jpg")
    store = _disk_store(ds, (640, 640), print)
    assert_holds(store, ds, (640, 640))
    names = {f.name for f in cache_folder.iterdir()}
    assert names == {f"{old}.pixels", _store_name(ds, (640, 640)) + ".pixels"} # a run has the old one open
    del kept
    os.utime(tmp_path / "images/2.jpg")
    del store
    store = _disk_store(ds, (640, 640), print)
    assert {f.name for f in cache_folder.iterdir()} == {_store_name(ds, (640, 640)) + ".pixels"}


def test_other_sizes_and_images_have_their_own_names(ds, tmp_path):
    names = set()
    for images in (ds, ds.subset([0, 1, 3]), ds.subset([1, 0, 3])):
        names |= {_store_name(images, (640, 640)), _store_name(images, (96, 160))}
    assert len(names) == 6


def test_old_files_do_not_pile_up(ds, cache_folder, monkeypatch):
    first, used, fresh = (_disk_store(ds.subset([i]), (640, 640), print) for i in range(3))
    names = [cache_folder / f"{_store_name(ds.subset([i]), (640, 640))}.pixels" for i in range(3)]
    month = time.time() - 31 * 86400
    for n in names[:2]: os.utime(n, (month, month))
    del first
    lines = []
    _disk_store(ds, (640, 640), lines.append)
    assert [n.exists() for n in names] == [False, True, True] and "not used for long" in lines[0] # the second is in use
    del used, fresh
    usage = cache.shutil.disk_usage(cache_folder)
    def room_for_two(path):
        files = len(list(cache_folder.glob("*.pixels")))
        return usage._replace(free=cache._KEEP_FREE_ON_DISK + 10**5 * (3 - files))
    monkeypatch.setattr(cache.shutil, "disk_usage", room_for_two)
    os.utime(names[1], (time.time() - 1000,) * 2)
    _disk_store(ds.subset([5]), (640, 640), lines.append)
    assert not names[1].exists() and names[2].exists() and "needs the room" in lines[-2] # the one used longest ago


def test_a_full_disk_leaves_nothing(ds, cache_folder, monkeypatch):
    def full(*args): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for name in "posix_fallocate", "pwrite", "fsync":
        with monkeypatch.context() as m:
            m.setattr(cache.os, name, full)
            with pytest.raises(InputError, match="data.cache=disk: .*cannot be written: No space left") as e:
                _disk_store(ds, (640, 640), print)
        assert "\n" not in str(e.value) and not list(cache_folder.iterdir())
    with monkeypatch.context() as m:
        m.setattr(cache.os, "pwrite", lambda fd, data, at: len(data) - 1) # as at the very end of a disk
        with pytest.raises(InputError, match="No space left"): _disk_store(ds, (640, 640), print)
    assert not list(cache_folder.iterdir())
    assert_holds(_disk_store(ds, (640, 640), print), ds, (640, 640))


def test_a_folder_that_cannot_be_written(ds, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        _disk_store(ds, (640, 640), print, tmp_path / "file" / "pixels")


@pytest.mark.parametrize("damage", ["short", "long", "magic", "count"])
def test_a_file_that_is_none_is_made_anew(ds, cache_folder, damage):
    _disk_store(ds, (640, 640), print)
    path, = cache_folder.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "short": del data[-1]
    if damage == "long": data += b"\0"
    if damage == "magic": data[0] ^= 1
    if damage == "count": data[32] ^= 1
    path.write_bytes(data)
    assert_holds(_disk_store(ds, (640, 640), print), ds, (640, 640))


RUN = """
import os, sys, time
from jetson_det.data.augment import pixel_store as cache
from jetson_det.data.dataset import DetDataset
sizes = eval(sys.argv[2])
ds = DetDataset(sys.argv[1], ("a",), [f"{i}.jpg" for i in range(len(sizes))], sizes)
fill = cache.decode_all
def slowly(*args):
    print("filling", flush=True)
    if sys.argv[3] == "slow": time.sleep(float(sys.argv[4]))
    fill(*args)
cache.decode_all = slowly
store = cache._disk_store(ds, (640, 640), lambda line: print(line, flush=True))
print("sum", int(store._pixels.sum()), flush=True)
"""


def run(ds, *how):
    words = [sys.executable, "-c", RUN, str(ds.root), str(SIZES), *how]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)


def until(process, word):
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if word in line: return lines
    raise AssertionError(lines)


def test_two_runs_at_once_fill_one_file(ds, cache_folder):
    one = run(ds, "slow", "3")
    until(one, "filling")
    others = [run(ds, "fast") for _ in range(2)]
    for other in others: until(other, "waiting for it")
    first = until(one, "sum")[-1]
    for other in others:
        lines = until(other, "sum")
        assert "filling" not in lines and lines[-1] == first
    assert [p.wait(10) for p in (one, *others)] == [0, 0, 0] and len(list(cache_folder.iterdir())) == 1


def test_a_killed_run_leaves_nothing_that_is_taken_for_whole(ds, cache_folder):
    one = run(ds, "slow", "60")
    until(one, "filling")
    other = run(ds, "fast")
    until(other, "waiting for it")
    one.send_signal(signal.SIGKILL)
    one.wait(10)
    lines = until(other, "sum") # whoever waited fills it
    assert "filling" in lines and other.wait(10) == 0
    assert [f.suffix for f in cache_folder.iterdir()] == [".pixels"]
    assert_holds(_disk_store(ds, (640, 640), print), ds, (640, 640))


def test_interrupting_leaves_nothing(ds, cache_folder):
    one = run(ds, "slow", "60")
    until(one, "filling")
    one.send_signal(signal.SIGINT)
    one.wait(10)
    assert not list(cache_folder.iterdir())


def test_no_file_is_left_open(ds):
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(3): _disk_store(ds, (640, 640), print)
    assert len(os.listdir("/proc/self/fd")) == files


def test_long_filling_says_how_long(ds, monkeypatch):
    pixels = ImageCache.pixels
    lines = []
    def slowly(self, i, level=0):
        time.sleep(.05)
        return pixels(self, i)
    monkeypatch.setattr(cache.ImageCache, "pixels", slowly)
    cache.decode_all(ds, (640, 640), lambda i, images: images.pixels(i), lines.append, every=.03)
    assert lines and all(l.startswith("cache: ") and l.endswith(" left") and "of 6 images" in l for l in lines)
