"""The loader: the same batches in every way of asking for them, and workers that neither leak nor outlive their
parent."""
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import islice

import cv2
import numpy as np
import pytest
import torch

from jetson_det.config import AugmentConfig
from jetson_det.core import InputError
from jetson_det.data import workers
from jetson_det.data.augment import pixel_store
from jetson_det.data.augment.plan import epoch_order, plan_sample
from jetson_det.data.augment.render import ImageCache, make_sample
from jetson_det.data.dataset import DetDataset
from jetson_det.data.loader import BatchKey, BatchMaker, TrainLoader, _input_size_at, pad_boxes, scaled_size
from jetson_det.data.workers import WorkerPool
from jetson_det.runtime.contract import Contract
from jetson_det.runtime.images import read_image
from jetson_det.runtime.preprocess import Preprocessor

SIZE = (96, 160)


def make_dataset(folder, n, boxes_each=lambda i: i % 4):
    rng = np.random.default_rng(n)
    index = []
    boxes = []
    for i in range(n):
        image = cv2.resize(rng.integers(0, 256, (9, 16, 3), np.uint8), (128, 72))
        cv2.imwrite(str(folder / f"{i}.jpg"), image)
        for _ in range(boxes_each(i)):
            x = rng.integers(0, 90)
            y = rng.integers(0, 40)
            index.append(i)
            boxes.append((x, y, x + 30, y + 30))
    return DetDataset(folder, ("a", "b"), [f"{i}.jpg" for i in range(n)], [(72, 128)] * n, index,
                      np.array(boxes, np.float32).reshape(-1, 4), np.arange(len(boxes)) % 2)


@pytest.fixture(scope="module")
def ds(tmp_path_factory): return make_dataset(tmp_path_factory.mktemp("loader"), 150)


def same(a, b): return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b))


def assert_same(one, other):
    one = list(one)
    other = list(other)
    assert len(one) == len(other) and all(map(same, one, other))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_change_nothing(ds, workers):
    augment = AugmentConfig(mixup=.5, multiscale=1, multiscale_every=3)
    serial = TrainLoader(ds, SIZE, augment, 8, seed=3, workers=0)
    loader = TrainLoader(ds, SIZE, augment, 8, seed=3, workers=workers)
    for epoch in 0, 1: assert_same(serial.epoch(epoch), loader.epoch(epoch))
    assert_same(serial.epoch(2, augment=False), loader.epoch(2, augment=False))
    loader.close()


def test_starting_anywhere_changes_nothing(ds):
    loader = TrainLoader(ds, SIZE, AugmentConfig(), 8, workers=2)
    whole = [b for b in TrainLoader(ds, SIZE, AugmentConfig(), 8, workers=0).epoch(4)]
    for start in 18, 5, 1: assert_same(whole[start:], loader.epoch(4, start=start))
    assert list(loader.epoch(4, start=19)) == []
    list(islice(loader.epoch(4), 3)) # left in the middle
    # two at a time: slow, but right
    a = loader.epoch(4)
    b = loader.epoch(4, start=2)
    for k in range(3):
        assert same(next(a), whole[k])
        assert same(next(b), whole[k + 2])
    loader.close()


def test_starting_late_makes_nothing_earlier(ds):
    loader = TrainLoader(ds, SIZE, AugmentConfig(), 8, workers=0)
    next(loader.epoch(0, start=18))
    assert loader.maker.cache.decoded <= 6 * 4


REPEATS = np.random.default_rng(1).uniform(.3, 3, 150)


EVERYTHING = AugmentConfig(mixup=.5, multiscale=1, multiscale_every=3, copy_paste=.3, crop=.3, mosaic=.7)


@pytest.fixture(scope="module")
def plain(ds):
    "For each kind of repeats: the batches of epoch 1, and the last three of epoch 2, made without workers and caches."
    made = []
    for repeats in None, REPEATS:
        loader = TrainLoader(ds, SIZE, EVERYTHING, 8, seed=1, workers=0, repeats=repeats)
        made.append((repeats, list(loader.epoch(1)), list(loader.epoch(2, augment=False))[-3:]))
    return made


@pytest.mark.parametrize("workers", [0, 2, 8])
@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_neither_caches_nor_workers_nor_starts_change_a_batch(ds, plain, tmp_path, monkeypatch, cache, workers):
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path))
    for repeats, whole, tail in plain:
        loader = TrainLoader(ds, SIZE, EVERYTHING, 8, seed=1, workers=workers, repeats=repeats, cache=cache,
                             say=lambda line: None)
        assert len(loader) == len(whole)
        assert_same(whole, loader.epoch(1))
        assert_same(whole[7:], loader.epoch(1, start=7))
        assert_same(tail, loader.epoch(2, start=len(whole) - 3, augment=False))
        loader.close()


def test_what_is_cached_is_not_decoded_again(ds, tmp_path, monkeypatch):
    lines = []
    loader = TrainLoader(ds, SIZE, AugmentConfig(), 8, workers=0, cache="ram", say=lines.append)
    assert not lines # nothing is read before the first batch
    for _ in loader.epoch(0): pass
    assert loader.maker.cache.decoded == 0 and len(lines) == 1 and lines[0].startswith("cache: 150 images, ")
    monkeypatch.setattr(pixel_store, "free_memory", lambda: 0)
    with pytest.raises(InputError, match="data.cache=ram: 150 images take"):
        next(TrainLoader(ds, SIZE, AugmentConfig(), 8, cache="ram").epoch(0))
    with pytest.raises(InputError, match="none, ram or disk"):
        next(TrainLoader(ds, SIZE, AugmentConfig(), 8, cache="tape").epoch(0))


def test_workers_share_the_cache(ds):
    "The images are in memory once, whatever the number of workers: their private pages do not grow by it."
    loader = TrainLoader(ds, (416, 416), AugmentConfig(multiscale=0), 8, workers=2, cache="ram", cache_mb=1,
                         say=lambda line: None)
    for _ in loader.epoch(0): pass
    store = loader.maker.cache.store
    for p in loader._pool._processes:
        shared = []
        for line in open(f"/proc/{p.pid}/smaps"):
            if "/dev/zero (deleted)" not in line: continue
            addresses, mode, *_ = line.split()
            first, end = (int(address, 16) for address in addresses.split("-"))
            if mode == "rw-s": shared.append(end - first)
        assert max(shared) >= store.nbytes
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_repeats_give_images_their_share(ds, workers):
    loader = TrainLoader(ds, SIZE, AugmentConfig(), 8, workers=workers, repeats=REPEATS)
    for epoch in 0, 1:
        seen = torch.cat([b.indices for b in loader.epoch(epoch)]).numpy()
        counts = np.bincount(seen, minlength=150)
        assert len(seen) == round(REPEATS.sum())
        assert (counts >= np.floor(REPEATS)).all() and (counts <= np.ceil(REPEATS)).all()
    assert len(loader) == -(-len(seen) // 8)
    loader.close()
    dropping = TrainLoader(ds, SIZE, AugmentConfig(), 8, workers=0, repeats=REPEATS, drop_last=True)
    assert len(dropping) == len(seen) // 8 and {len(b.indices) for b in dropping.epoch(0)} == {8}


def test_wrong_repeats(ds):
    with pytest.raises(InputError, match="repeat factors must be 150 numbers"):
        TrainLoader(ds, SIZE, AugmentConfig(), 8, repeats=[1., 2.])


def test_the_batch_size_changes_no_sample(ds):
    augment = AugmentConfig(multiscale=0)
    small, large = (TrainLoader(ds, SIZE, augment, b, workers=0) for b in (4, 12))
    for fours, twelve in zip(zip(*[small.epoch(1)] * 3), large.epoch(1)):
        assert torch.equal(torch.cat([b.images for b in fours]), twelve.images)
        assert torch.equal(torch.cat([b.boxes[b.labels >= 0] for b in fours]), twelve.boxes[twelve.labels >= 0])


def test_every_image_once_an_epoch(ds):
    loader = TrainLoader(ds, SIZE, AugmentConfig(), 8, workers=2)
    seen = [torch.cat([b.indices for b in loader.epoch(e)]).tolist() for e in range(3)]
    assert all(sorted(s) == list(range(150)) for s in seen) and seen[0] != seen[1]
    loader.close()


def test_images_are_decoded_about_once(ds):
    group = 64 * 74 * 130 * 4 / 2**20 # megabytes of a group's images and no more
    loader = TrainLoader(ds, SIZE, AugmentConfig(multiscale=1), 8, workers=0, cache_mb=1.3 * group)
    for epoch in 0, 1:
        for _ in loader.epoch(epoch): pass
        assert loader.maker.cache.decoded <= 1.1 * 150 * (epoch + 1)


def test_layout_and_types(ds):
    for workers in 0, 2:
        loader = TrainLoader(ds, SIZE, AugmentConfig(multiscale=0), 8, workers=workers)
        for batch in loader.epoch(0):
            b = len(batch.indices)
            assert batch.images.shape == (b, 3, *SIZE) and batch.images.dtype == torch.uint8
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.boxes.shape == (b, batch.labels.shape[1], 4) and batch.labels.shape[1] >= 1
            assert batch.boxes.dtype == torch.float32
            assert batch.labels.dtype == batch.indices.dtype == torch.int64
            assert (batch.boxes[batch.labels < 0] == 0).all()
        assert b == 150 % 8 and len(loader) == 19
        loader.close()


def test_small_and_empty_datasets(tmp_path):
    for n, each in (1, 0), (1, 2), (3, 0), (5, 1):
        (folder := tmp_path / f"{n}-{each}").mkdir()
        few = make_dataset(folder, n, lambda i: each)
        for workers in 0, 2:
            for drop_last in False, True:
                loader = TrainLoader(few, SIZE, AugmentConfig(mixup=1), 8, workers=workers, drop_last=drop_last)
                batches = [b for e in range(3) for b in loader.epoch(e)]
                assert len(batches) == 3 and all(sorted(b.indices.tolist()) == list(range(n)) for b in batches)
                loader.close()


def test_drop_last(ds):
    loader = TrainLoader(ds, SIZE, AugmentConfig(), 8, workers=0, drop_last=True)
    assert len(loader) == 18 and {len(b.indices) for b in loader.epoch(0)} == {8}


@pytest.mark.parametrize("size", [(96, 160), (416, 416), (384, 672), (64, 640), (32, 32)])
def test_input_sizes(size):
    augment = AugmentConfig(multiscale=5, multiscale_every=10)
    sizes = [_input_size_at(size, augment, 0, e, b) for e in range(20) for b in range(0, 60, 5)]
    assert all(h % 32 == 0 and w % 32 == 0 and h >= 32 and w >= 32 for h, w in sizes)
    assert all(abs(h - size[0]) <= 160 and abs(w / h - size[1] / size[0]) <= 16 / h + 1e-9 or w == 32 for h, w in sizes)
    assert len(set(sizes)) >= 6 and all(a == b for a, b in zip(sizes[::2], sizes[1::2]))
    assert scaled_size(size, size[0] // 32) == size == _input_size_at(size, AugmentConfig(multiscale=0), 0, 3, 4)


def test_kept_batches_keep_their_pixels(ds):
    loader = TrainLoader(ds, SIZE, AugmentConfig(), 4, workers=2)
    kept = list(loader.epoch(0)) + list(loader.epoch(1))
    serial = TrainLoader(ds, SIZE, AugmentConfig(), 4, workers=0)
    assert_same(kept, list(serial.epoch(0)) + list(serial.epoch(1)))
    images = kept[0].images[0]
    loader.close()
    del loader, kept
    gc.collect()
    assert torch.equal(images, next(serial.epoch(0)).images[0])


def test_padding():
    boxes, labels = pad_boxes([np.zeros((0, 4))], [np.zeros(0)])
    assert boxes.shape == (1, 1, 4) and labels.tolist() == [[-1]]
    assert pad_boxes([np.ones((300, 4))] * 2, [np.ones(300)] * 2)[0].shape == (2, 300, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_name_the_file(tmp_path, workers):
    few = make_dataset(tmp_path, 6)
    (tmp_path / "3.jpg").write_bytes(b"not a jpeg")
    loader = TrainLoader(few, SIZE, AugmentConfig(mosaic=0), 2, workers=workers)
    with pytest.raises(InputError, match="3.jpg: not an image"): list(loader.epoch(0))
    loader.close()
    def broken(image, boxes, labels, rng): raise ZeroDivisionError("oh")
    loader = TrainLoader(few.subset([0, 1]), SIZE, AugmentConfig(), 2, workers=workers, transform=broken)
    with pytest.raises(RuntimeError, match=r"[01]\.jpg: no sample could be made of it: ZeroDivisionError: oh"):
        next(loader.epoch(0))
    loader.close()


def test_a_batch_after_a_bad_one_can_be_had(tmp_path):
    few = make_dataset(tmp_path, 6)
    loader = TrainLoader(few, SIZE, AugmentConfig(mosaic=0), 1, workers=2)
    bad = next(loader.epoch(0)).indices.item()
    loader.close()
    (tmp_path / f"{bad}.jpg").unlink()
    for _ in range(20): # every failure gives its slot back
        with pytest.raises(InputError): next(loader.epoch(0))
        assert len(list(loader.epoch(0, start=1))) == 5
    loader.close()


@pytest.mark.parametrize("input_size, batch, words", [((100, 160), 8, "multiples of 32"),
                                                      ((0, 32), 8, "multiples of 32"),
                                                      ((96, 160), 0, "at least 1")])
def test_wrong_arguments(ds, input_size, batch, words):
    with pytest.raises(InputError, match=words): TrainLoader(ds, input_size, AugmentConfig(), batch)
    with pytest.raises(InputError, match="no images"): TrainLoader(ds.subset([]), SIZE, AugmentConfig(), 8)


def alive(pid):
    try: return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError: return False


def gone(pids, seconds):
    end = time.time() + seconds
    while time.time() < end and any(map(alive, pids)): time.sleep(.05)
    return not any(map(alive, pids))


def test_a_killed_worker_is_reported(ds):
    loader = TrainLoader(ds, SIZE, AugmentConfig(), 8, workers=2)
    epoch = loader.epoch(0)
    next(epoch)
    os.kill(loader._pool._processes[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="worker ended by itself.*-9"):
        for _ in range(3): list(loader.epoch(5))
    assert len(list(loader.epoch(1))) == 19 # and the next call starts new ones
    loader.close()


def test_workers_end_with_their_loader(ds):
    loader = TrainLoader(ds, SIZE, AugmentConfig(), 8, workers=2)
    next(loader.epoch(0))
    pids = [p.pid for p in loader._pool._processes]
    del loader
    gc.collect()
    assert gone(pids, 5)


PARENT = """
import sys, time
from jetson_det.config import AugmentConfig
from jetson_det.data.dataset import DetDataset
from jetson_det.data.loader import TrainLoader
ds = DetDataset(sys.argv[1], ("a",), [f"{i}.jpg" for i in range(150)], [(72, 128)] * 150)
loaders = [TrainLoader(ds, (96, 160), AugmentConfig(), 8, workers=2) for _ in range(2)]
for l in loaders: next(l.epoch(0))
print(*[p.pid for l in loaders for p in l._pool._processes], flush=True)
if sys.argv[2] == "wait": time.sleep(60)
"""


@pytest.mark.parametrize("how", ["kill", "term", "end"])
def test_no_worker_outlives_its_parent(ds, how):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(ds.root), "end" if how == "end" else "wait"],
        stdout=subprocess.PIPE,
        text=True)
    pids = list(map(int, parent.stdout.readline().split()))
    assert len(pids) == 4
    if how != "end": parent.send_signal(signal.SIGKILL if how == "kill" else signal.SIGTERM)
    parent.wait(20)
    assert gone(pids, 10)


def test_a_terminal_that_closes_is_not_the_workers_business(ds):
    loader = TrainLoader(ds, SIZE, AugmentConfig(), 8, workers=2)
    next(loader.epoch(0))
    pids = [p.pid for p in loader._pool._processes]
    for pid in pids:
        for number in (signal.SIGINT, signal.SIGHUP): os.kill(pid, number)
    assert len(list(loader.epoch(1))) == 19 and [p.pid for p in loader._pool._processes] == pids
    loader.close()


def asleep(image, boxes, labels, rng):
    "A transform that never ends."
    time.sleep(600)


def test_closing_does_not_wait_for_a_worker_that_stands_still(ds):
    loader = TrainLoader(ds, SIZE, AugmentConfig(), 8, workers=2)
    next(loader.epoch(0))
    pids = [p.pid for p in loader._pool._processes]
    os.kill(pids[0], signal.SIGSTOP)
    loader.close()
    assert gone(pids, 5)


def test_a_program_that_is_to_stop_does_not_wait_for_a_transform_that_hangs(ds, monkeypatch):
    monkeypatch.setattr(workers, "STOP_SECONDS", .3)
    loader = TrainLoader(ds, SIZE, AugmentConfig(), 8, workers=2, transform=asleep)
    loader.is_stopping = lambda: True
    with pytest.raises(workers.WorkerLost, match=r"at batch 1 of epoch 1 \(\d+.jpg, .* and 4 more\), did not answer"):
        next(loader.epoch(0))
    assert not loader._pool.close.alive and gone([p.pid for p in loader._pool._processes], 5)


def test_who_stands_still_is_said_once(ds, monkeypatch):
    monkeypatch.setattr(workers, "STALL_SECONDS", .3)
    said = []
    loader = TrainLoader(ds, SIZE, AugmentConfig(), 8, workers=1, say=said.append)
    next(loader.epoch(0))
    pid = loader._pool._processes[0].pid
    os.kill(pid, signal.SIGSTOP)
    waking = threading.Timer(1.5, os.kill, (pid, signal.SIGCONT))
    waking.start()
    assert len(list(loader.epoch(1))) == 19 # it goes on when the worker does
    assert len(said) == 1 and f"loader worker 0 (process {pid}), at batch 1 of epoch 2" in said[0]
    loader.close()


def test_no_file_is_left_open(ds):
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        loader = TrainLoader(ds, SIZE, AugmentConfig(), 8, workers=2)
        next(loader.epoch(0))
        loader.close()
    del loader
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= files + 2


def test_one_worker_has_a_whole_group(ds):
    pool = WorkerPool(BatchMaker(ds, SIZE, AugmentConfig(), 10), 2)
    whose = [pool._worker_of(BatchKey(e, b, True)) for e in (0, 1) for b in range(15)]
    assert whose == [0] * 5 + [1] * 5 + [0] * 5 + [1] * 5 + [0] * 5 + [1] * 5
    pool.close()


def test_only_a_training_that_waits_gets_more_batches_ahead(ds):
    "A slow training finds its batch made; a fast one never does, and gets work for all workers."
    pool = WorkerPool(BatchMaker(ds, SIZE, AugmentConfig(mosaic=0), 8), 2)
    used = set()
    fill = pool._slots.array
    def array_of(slot, shape):
        used.add(slot)
        return fill(slot, shape)
    pool._slots.array = array_of
    pool.take(BatchKey(0, 0, True))
    for i in range(1, 40):
        while pool._coming[0][0] not in pool._done: pool._receive()  # the step took so long
        pool.take(BatchKey(i // 19, i % 19, True))
    assert pool.ahead <= 3 and len(used) <= 5  # the first batch was waited for
    for i in range(40, 200):
        if pool.ahead == pool.max_ahead: break
        pool.take(BatchKey(i // 19, i % 19, True))
    assert pool.ahead == pool.max_ahead == 16
    pool.close()


# ---- how large images are decoded

LARGE = (1080, 1920)


@pytest.fixture(scope="module")
def detailed(tmp_path_factory):
    "A photo-sized JPEG with detail of two or three pixels."
    folder = tmp_path_factory.mktemp("detailed")
    noise = np.random.default_rng(0).integers(0, 256, (*LARGE, 3), np.uint8)
    cv2.imwrite(str(folder / "0.jpg"), cv2.GaussianBlur(noise, (0, 0), 1.2), [cv2.IMWRITE_JPEG_QUALITY, 95])
    return DetDataset(folder, ("a",), ["0.jpg"], [LARGE])


def sharpness(image):
    "The variance of the Laplacian of a gray image."
    return cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.CV_64F).var()


def first_image(ds, size, augment, **kw):
    loader = TrainLoader(ds, size, augment, 1, workers=0, say=lambda line: None, **kw)
    return next(loader.epoch(0)).images[0].permute(1, 2, 0).numpy()


# a part of .3 needs all pixels of the image; for .5 half of its size is enough, drawn at 2/3
@pytest.mark.parametrize("share, least", [(.3, 1.), (.5, .75)])
@pytest.mark.parametrize("how", [{}, {"cache": "ram"}, {"cache": "disk"}, {"augment_on": "device", "device": "cpu"}],
                         ids=["plain", "ram", "disk", "device"])
def test_crops_are_as_sharp_as_the_image(detailed, tmp_path, monkeypatch, how, share, least):
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path))
    size = (320, 320)
    augment = AugmentConfig(mosaic=0, crop=1, crop_scale=[share, share], hsv_prob=0, flip=0, multiscale=0)
    image = first_image(detailed, size, augment, **how)
    x1, y1, x2, y2 = plan_sample(detailed, epoch_order(1, 0, 0), 0, size, augment, 0, 0).layers[0].tiles[0].source
    assert (x2 - x1, y2 - y1) == (round(1920 * share), round(1080 * share))
    h = 180 # of a part of a 16:9 image in a square input
    expected = cv2.resize(detailed.image(0)[y1:y2, x1:x2], (320, h), interpolation=cv2.INTER_AREA)
    assert sharpness(image[:h]) > least * sharpness(expected)
    reduced = ImageCache(detailed, size)
    blurred = make_sample(reduced, epoch_order(1, 0, 0), 0, size, augment, 0, 0).image
    assert sharpness(image[:h]) > 3 * sharpness(blurred[:h]) # as it was when images were decoded for the input size


def test_images_are_decoded_no_larger_than_needed(detailed):
    def decoded_shape(augment):
        loader = TrainLoader(detailed, (320, 320), augment, 1, workers=0)
        next(loader.epoch(0))
        return loader.maker.cache.pixels(0).shape
    assert decoded_shape(AugmentConfig()) == (272, 482, 4) # a quarter, and a border of one pixel
    assert decoded_shape(AugmentConfig(mosaic=.5, crop=.1, crop_scale=[.5, 1.])) == (542, 962, 4)
    assert decoded_shape(AugmentConfig(mosaic=.5, crop=.1, crop_scale=[.3, 1.])) == (1082, 1922, 4)


# ---- the same pixels as at run time

PLAIN = dict(hsv_prob=0, flip=0, multiscale=0)


def at_run_time(ds, index, size):
    "The input that a network with bytes as its input gets from the runtime, (h,w,3) BGR."
    contract = Contract(family="yolox", name="a", classes=ds.classes, input_size=size, output="boxes_scores",
                        color="bgr", scale=1., mean=(0., 0., 0.), std=(1., 1., 1.))
    batch, _ = Preprocessor(contract, np.uint8)([read_image(ds.path_of(index))])
    return batch[0].transpose(1, 2, 0)


@pytest.mark.parametrize("shape", [(72, 128), (190, 150), (97, 301), (191, 319), (33, 35)])
def test_without_augmentation_the_pixels_are_those_of_the_runtime(tmp_path, shape):
    "Bit for bit, for images less than twice as large as the input."
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    for name in ("0.png", "1.jpg"): cv2.imwrite(str(tmp_path / name), image)
    ds = DetDataset(tmp_path, ("a",), ["0.png", "1.jpg"], [shape] * 2)
    loader = TrainLoader(ds, (96, 160), AugmentConfig(**PLAIN), 2, workers=0)
    batch = next(loader.epoch(0, augment=False))
    for drawn, index in zip(batch.images, batch.indices.tolist()):
        np.testing.assert_array_equal(drawn.permute(1, 2, 0).numpy(), at_run_time(ds, index, (96, 160)))


def test_of_larger_images_the_decoder_makes_an_average_and_the_runtime_a_sample(detailed, tmp_path):
    """The one difference: training decodes a large JPEG at a part of its size (each pixel is the mean of several),
    the runtime decodes it whole. Smooth images come out alike; where crops make training decode it whole, all do."""
    whole = first_image(detailed, (320, 320), AugmentConfig(**PLAIN, mosaic=0, crop=1e-9, crop_scale=[.3, 1.]))
    np.testing.assert_array_equal(whole, at_run_time(detailed, 0, (320, 320)))
    smooth = cv2.resize(np.random.default_rng(2).integers(0, 256, (9, 16, 3), np.uint8), LARGE[::-1],
                        interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(tmp_path / "0.jpg"), smooth)
    ds = DetDataset(tmp_path, ("a",), ["0.jpg"], [LARGE])
    reduced = first_image(ds, (320, 320), AugmentConfig(**PLAIN, mosaic=0)).astype(int)
    apart = np.abs(reduced - at_run_time(ds, 0, (320, 320)))
    assert 0 < apart.mean() < 1 and np.quantile(apart, .999) <= 4
