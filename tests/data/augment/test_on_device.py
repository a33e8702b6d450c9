"""Batches drawn at once: the same boxes and the same pixels as samples drawn one by one."""
import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from jetson_det.config import AugmentConfig
from jetson_det.core import InputError
from jetson_det.data.augment import on_device as B
from jetson_det.data.augment.on_device import DevicePixels, _shift_planes, pack_plans, render_batch
from jetson_det.data.augment.plan import Layer, Plan, epoch_order, plan_sample
from jetson_det.data.augment.render import ImageCache, _draw_layer, make_sample, reduction, shift_colors
from jetson_det.data.dataset import DetDataset
from jetson_det.data.loader import TrainLoader

SIZES = [(240, 320), (180, 400), (301, 203), (97, 640), (640, 480), (33, 35), (480, 854), (12, 500)] * 2
pytestmark = pytest.mark.usefixtures("one_thread")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(scope="module")
def ds(tmp_path_factory):
    "Smooth images of many sizes, as JPEG and PNG, with boxes."
    folder = tmp_path_factory.mktemp("batch")
    rng = np.random.default_rng(0)
    index = []
    boxes = []
    names = [f"{i}.{('jpg', 'png')[i % 2]}" for i in range(len(SIZES))]
    for i, (h, w) in enumerate(SIZES):
        colors = rng.integers(0, 256, (5, 7, 3), np.uint8)
        cv2.imwrite(str(folder/names[i]), cv2.resize(colors, (w, h), interpolation=cv2.INTER_CUBIC))
        for _ in range(i % 4):
            x = rng.uniform(0, w * .7)
            y = rng.uniform(0, h * .7)
            index.append(i)
            boxes.append((x, y, x + w * rng.uniform(.05, .3), y + h * rng.uniform(.05, .3)))
    return DetDataset(folder, ("a", "b"), names, SIZES, index, np.array(boxes, np.float32), np.arange(len(boxes)) % 2)


def quiet(line): pass


def planned(ds, size, augment, epoch=0, mosaics=True, seed=0):
    order = epoch_order(len(ds), seed, epoch)
    return [plan_sample(ds, order, p, size, augment, seed, epoch, mosaics) for p in range(len(ds))]


def edges(cache, plans, size):
    """(B,h,w) bool: pixels next to an edge of a tile, as far as a pixel of its image reaches; found by drawing each
    over gray and over black."""
    h, w = size
    found = np.zeros((len(plans), h, w), np.uint8)
    for mask, plan in zip(found, plans):
        for layer in plan.layers:
            frame_h, frame_w = layer.frame
            mask[min(frame_h, h - 1)] = 1
            mask[:, min(frame_w, w - 1)] = 1
            for tile in layer.tiles:
                over_gray = _draw_layer(cache, Layer([tile], size), (0, 0, w, h))[..., :3]
                over_black = _draw_layer(cache, Layer([tile], (0, 0)), (0, 0, w, h))[..., :3]
                inside = (over_gray == over_black).all(-1).astype(np.uint8)
                zoom = tile.zoom * 2**reduction(cache.ds.sizes[tile.index].tolist(), cache.detail)
                reach = 5 + 2 * int(1.5 * zoom)
                mask |= cv2.morphologyEx(inside, cv2.MORPH_GRADIENT, np.ones((reach, reach), np.uint8),
                                         borderType=cv2.BORDER_REPLICATE)
    return found > 0


def compare(ds, pixels, cache, size, augment, epoch=0, mosaics=True):
    plans = planned(ds, size, augment, epoch, mosaics)
    batch = render_batch(pixels, pack_plans(plans, pixels.table), size)
    assert batch.shape == (len(ds), 3, *size) and batch.dtype == torch.uint8
    assert batch.is_contiguous(memory_format=torch.channels_last)
    order = epoch_order(len(ds), 0, epoch)
    samples = [make_sample(cache, order, p, size, augment, 0, epoch, mosaics) for p in range(len(ds))]
    for plan, s in zip(plans, samples):
        assert np.array_equal(plan.boxes, s.boxes) and np.array_equal(plan.labels, s.labels) and plan.index == s.index
    images = batch.permute(0, 2, 3, 1).cpu().numpy().astype(int)
    apart = np.abs(images - np.stack([s.image for s in samples])).max(-1)
    inner = apart[~edges(cache, plans, size)]
    assert inner.mean() < .5 and apart.mean() < 2
    return inner


PLAIN = dict(hsv_prob=0, multiscale=0)
CASES = {
    "mosaic": dict(PLAIN),
    "mixup": dict(PLAIN, mixup=1),
    "letterbox": dict(PLAIN, mosaic=0),
    "flips": dict(PLAIN, mosaic=0, flip=1, flip_vertical=.5),
    "zoomed": dict(PLAIN, mosaic_scale=[.05, .2]),
    "crop": dict(PLAIN, mosaic=.3, crop=1),
    "affine": dict(PLAIN, mosaic=0, affine=1, degrees=180),
    "zoom_out": dict(PLAIN, mosaic=0, zoom_out=1, zoom_out_scale=[2., 8.]),
    "copy_paste": dict(PLAIN, copy_paste=1),
    "hsv": dict(mosaic=.5),
    "everything": dict(mixup=.5, mosaic=.6, crop=.5, affine=.5, zoom_out=.5, copy_paste=.7, flip_vertical=.5,
                       hsv=[90, 80, 80]),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_pixels_and_boxes_are_those_of_single_samples(ds, case, device):
    size = (160, 256)
    augment = AugmentConfig(**CASES[case])
    pixels = DevicePixels(ds, size, device, quiet)
    cache = ImageCache(ds, size)
    inner = np.concatenate([compare(ds, pixels, cache, size, augment, epoch=e) for e in (0, 1)])
    colors = augment.hsv_prob > 0 # a step of gray in a dim or gray pixel may turn its hue
    assert np.mean(inner <= (3 if colors else 2)) > (.995 if colors else .9999), np.bincount(inner)[:20]


@pytest.mark.parametrize("size", [(256, 160), (96, 320), (32, 32), (320, 320)])
def test_sizes_other_than_the_one_decoded_for(ds, size):
    pixels = DevicePixels(ds, (160, 160), "cpu", quiet)
    cache = ImageCache(ds, (160, 160))
    for mosaics in True, False:
        inner = compare(ds, pixels, cache, size, AugmentConfig(hsv_prob=0, mixup=.5), mosaics=mosaics)
        assert np.mean(inner <= 2) > .9999


def test_a_part_at_a_time_changes_nothing(ds):
    pixels = DevicePixels(ds, (96, 160), "cpu", quiet)
    plans = planned(ds, (96, 160), AugmentConfig(mixup=.5))
    tables = pack_plans(plans, pixels.table)
    whole = render_batch(pixels, tables, (96, 160), chunk=10**9)
    for chunk in 1, 3 * 96 * 160: assert torch.equal(render_batch(pixels, tables, (96, 160), chunk=chunk), whole)
    for k, p in enumerate(plans):
        assert torch.equal(render_batch(pixels, pack_plans([p], pixels.table), (96, 160))[0], whole[k])


def test_plans_without_tiles(ds):
    pixels = DevicePixels(ds, (96, 160), "cpu", quiet)
    none = np.zeros((0, 4), np.float32)
    def plan_of(*frames):
        return Plan((96, 160), 0, [Layer([], f) for f in frames], (0, 0, 0), none, np.zeros(0, np.int64), None)
    plans = [plan_of((96, 160)), plan_of((96, 160), (50, 60))]
    one_layer, two_layers = render_batch(pixels, pack_plans(plans, pixels.table), (96, 160))
    assert (one_layer == 114).all()
    assert (two_layers[:, :50, :60] == 114).all()
    assert (two_layers[:, 50:] == 57).all() and (two_layers[:, :, 60:] == 57).all()


def test_no_pixel_outside_the_image_is_read(ds):
    "Every copy of every image is surrounded by a color that no sample may show."
    pixels = DevicePixels(ds, (160, 256), "cpu", quiet)
    clean = pixels.pixels.clone()
    table = pixels.table
    pixels.pixels.fill_(0x0000FF00) # green
    for i in range(len(ds)):
        for level in range(B._LEVELS):
            h, w = table.shapes[i, level].tolist()
            start = int(table.starts[i, level])
            pixels.pixels[start:start + h * w] = 0x00FF00FF # what is an image is magenta
    for case in "mosaic", "everything", "letterbox", "crop":
        plans = planned(ds, (160, 256), AugmentConfig(**{**CASES[case], **PLAIN}))
        batch = render_batch(pixels, pack_plans(plans, table), (160, 256))
        assert (batch[:, 1] <= 114).all()
    pixels.pixels = clean


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(-255, 255), st.integers(-255, 255), st.integers(-255, 255)), st.integers(0, 2**32 - 1))
def test_colors_are_those_of_shift_colors(shifts, seed):
    image = np.random.default_rng(seed).integers(0, 256, (1, 2000, 3), np.uint8)
    planes = [torch.from_numpy(image[..., k].astype(np.float32))[None] for k in range(3)]
    hue = (shifts[0] + 90) % 180 - 90
    if not (hue or any(shifts[1:])): return # nothing is shifted, and `render_batch` keeps the bytes
    drawn = torch.stack(_shift_planes(*planes, torch.tensor([[hue, *shifts[1:]]]).float()), -1)[0].numpy()
    assert np.abs(drawn - shift_colors(image, shifts, image.copy())).max() <= 2


def test_the_bytes_of_pixels_are_mixed_exactly():
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 256, (4, 5000, 4), np.uint8)
    u, v = rng.random((2, 5000)).astype(np.float32)
    images = np.concatenate(list(corners), 1).reshape(-1, 4) # 5000 images of 2x2 pixels
    memory = torch.from_numpy(images).view(torch.int32).ravel()
    at = torch.arange(0, 20000, 4)
    pitch = torch.full((5000,), 2)
    mixed = B._fetched(memory, at, pitch, torch.from_numpy(u), torch.from_numpy(v))
    mixed = mixed.view(torch.uint8).reshape(5000, 4).numpy()
    c = corners.astype(float)
    u = u[:, None]
    v = v[:, None]
    expected = c[0]*(1 - u)*(1 - v) + c[1]*u*(1 - v) + c[2]*(1 - u)*v + c[3]*u*v
    assert np.abs(mixed - expected).max() < 2.1


def same(a, b): return all(x.shape == y.shape and torch.equal(x.cpu(), y.cpu()) for x, y in zip(a, b))


def loader(ds, **kw):
    augment = AugmentConfig(mixup=.5, multiscale=1, multiscale_every=1)
    return TrainLoader(ds, (96, 160), augment, 4, **{"say": quiet, **kw})


def test_the_loader_gives_the_same_batches_with_any_workers(ds):
    serial = loader(ds, workers=0, augment_on="device", device="cpu")
    whole = [list(serial.epoch(e)) for e in (0, 1)]
    for workers in 1, 2:
        other = loader(ds, workers=workers, augment_on="device", device="cpu")
        for e in 0, 1: assert all(map(same, whole[e], list(other.epoch(e))))
        assert same(next(other.epoch(0, start=2)), whole[0][2])
        other.close()
    for on_device, one_by_one in zip(whole[1], loader(ds, workers=0).epoch(1)):
        assert all(torch.equal(a, b) for a, b in zip(on_device[1:], one_by_one[1:]))
        assert (on_device.images.float() - one_by_one.images).abs().mean() < 1


def test_the_loader_says_how_much_memory_it_takes(ds, tmp_path, monkeypatch):
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path))
    lines = []
    one = loader(ds, workers=0, augment_on="device", device="cpu", say=lines.append)
    first = next(one.epoch(0))
    assert len(lines) == 1 and lines[0].startswith("pixels: 16 images, ") and "on cpu" in lines[0]
    other = loader(ds, workers=0, augment_on="device", device="cpu", cache="disk", say=lines.append)
    assert same(next(other.epoch(0)), first) and len(list((tmp_path / "pixels").iterdir())) == 1


def test_what_does_not_go_with_it_is_refused(ds, monkeypatch):
    with pytest.raises(InputError, match="transforms run on the processor.*data.augment_on.*use cpu"):
        loader(ds, augment_on="device", transform=lambda i, b, l, rng: (i, b, l))
    monkeypatch.setattr(B, "free_memory", lambda: 1000)
    with pytest.raises(InputError, match="data.augment_on=device: 16 images take .* use data.augment_on=cpu"):
        next(loader(ds, workers=0, augment_on="device", device="cpu").epoch(0))


def test_an_unreadable_image_is_named(ds, tmp_path):
    for i in range(3): cv2.imwrite(str(tmp_path / f"{i}.jpg"), np.zeros((40, 50, 3), np.uint8))
    (tmp_path / "1.jpg").write_bytes(b"no")
    bad = DetDataset(tmp_path, ("a",), [f"{i}.jpg" for i in range(3)], [(40, 50)] * 3)
    with pytest.raises(InputError, match="1.jpg: not an image"):
        next(loader(bad, workers=0, augment_on="device", device="cpu").epoch(0))


def test_pixels_that_are_sent_when_needed(ds):
    "What a small card does: the copies of a batch are sent to it, each once."
    pixels = DevicePixels(ds, (96, 160), "cpu", quiet)
    tables = pack_plans(planned(ds, (96, 160), AugmentConfig(mixup=.5)), pixels.table)
    expected = render_batch(pixels, tables, (96, 160))
    pixels.resident = False
    assert torch.equal(render_batch(pixels, tables, (96, 160)), expected)
    assert len(pixels._sent) < 1.3 * len(pixels.pixels)
    few = pack_plans(planned(ds, (96, 160), AugmentConfig(mixup=.5))[:2], pixels.table)
    assert torch.equal(render_batch(pixels, few, (96, 160)), expected[:2])


@pytest.mark.cuda
def test_on_a_card_nothing_waits(ds, monkeypatch):
    "Drawing makes no copy back and no synchronization; pinned pixels give the same batch."
    pixels = DevicePixels(ds, (96, 160), "cuda", quiet)
    tables = pack_plans(planned(ds, (96, 160), AugmentConfig(mixup=.5)), pixels.table)
    expected = render_batch(pixels, tables, (96, 160))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try: again = render_batch(pixels, tables, (96, 160))
    finally: torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, expected) and expected.is_cuda
    monkeypatch.setattr(B, "_DEVICE_SHARE", 0.)
    pinned = DevicePixels(ds, (96, 160), "cuda", quiet)
    assert not pinned.resident and pinned.pixels.is_pinned()
    assert torch.equal(render_batch(pinned, tables, (96, 160)), expected)
    batch = next(loader(ds, workers=2, augment_on="device").epoch(0))
    assert all(t.is_cuda for t in batch)
