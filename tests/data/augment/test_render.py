"""Boxes must stay on what they were drawn around: rectangles are painted, warped, and found again in the pixels."""
import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jetson_det.config import AugmentConfig
from jetson_det.core import InputError, rng_for
from jetson_det.data.augment.plan import (_MAX_COVERED, Layer, _boxes_in, _partners, _random_affine, _random_crop,
                                          _random_shifts, _region, _sample_rng, detail_of, epoch_order, group_of, mixup,
                                          mosaic, move_boxes, plan_sample, single_image, training_boxes)
from jetson_det.data.augment.render import (ImageCache, _draw, _draw_layer, _read_reduced, make_sample, reduction,
                                            render, shift_colors)
from jetson_det.data.dataset import DetDataset
from jetson_det.runtime.preprocess import letterbox

COLORS = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0], [0, 250, 250], [250, 0, 250]])
GRAY = 90


def painted(folder, sizes, ext=".png", empty=()):
    "A dataset with one rectangle an image: its color and its label are the image's number (mod 6)."
    rng = np.random.default_rng(0)
    paths = []
    index = []
    boxes = []
    labels = []
    for i, (h, w) in enumerate(sizes):
        image = np.full((h, w, 3), GRAY, np.uint8)
        if i not in empty:
            bw = rng.integers(w // 8, w // 3)
            bh = rng.integers(h // 8, h // 3)
            x = rng.integers(0, w - bw)
            y = rng.integers(0, h - bh)
            image[y:y + bh, x:x + bw] = COLORS[i % 6]
            index.append(i)
            boxes.append((x, y, x + bw, y + bh))
            labels.append(i % 6)
        paths.append(f"{i}{ext}")
        cv2.imwrite(str(folder / paths[-1]), image, [cv2.IMWRITE_JPEG_QUALITY, 98] if ext == ".jpg" else [])
    return DetDataset(folder, tuple("abcdef"), paths, sizes, index, np.array(boxes, np.float32).reshape(-1, 4), labels)


def found(image, label):
    "The smallest upright box around the pixels of a color: those that are nearer to it than to the gray around it."
    high = COLORS[label] > 0
    mask = cv2.inRange(np.ascontiguousarray(image[..., :3]), np.where(high, 170, 0), np.where(high, 255, 48))
    ys = np.flatnonzero(mask.any(1))
    xs = np.flatnonzero(mask.any(0))
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])


def pixels(cache, tiles, size, frame=None):
    "A layer of tiles as an image."
    return _draw_layer(cache, Layer(tiles, frame or size), (0, 0, size[1], size[0]))


def cut(box, size):
    "Whether a box reaches the rim of the sample."
    return box[:2].min() <= 0 or box[2] >= size[1] or box[3] >= size[0]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return painted(tmp_path_factory.mktemp("wide"), [(240, 320), (360, 640), (200, 150), (270, 480)] * 2)


SIZES = [(416, 416), (384, 640), (640, 384), (288, 512)]


@pytest.mark.parametrize("size", SIZES)
def test_rectangles_are_found_again_after_the_mosaic(wide, size):
    augment = AugmentConfig(min_visible=.3)
    seen = 0
    cache = ImageCache(wide, size)
    for seed in range(50):
        tiles, boxes, labels, _ = mosaic(rng_for(seed), wide, [0, 1, 2, 3], size, augment, flips=seed % 4)
        canvas = pixels(cache, tiles, size)
        for box, label in zip(boxes, labels):
            if cut(box, size): continue # a turned rectangle that is cut has no exact box
            np.testing.assert_allclose(found(canvas, label), box, atol=1.5)
            seen += 1
    assert seen > 10


@pytest.mark.parametrize("size", SIZES)
def test_cut_rectangles_are_found_again_when_nothing_turns(wide, size):
    augment = AugmentConfig(degrees=0, shear=0)
    at_rim = 0
    cache = ImageCache(wide, size)
    for seed in range(20):
        tiles, boxes, labels, _ = mosaic(rng_for(seed), wide, [4, 5, 6, 7], size, augment, flips=seed % 4)
        canvas = pixels(cache, tiles, size)
        for box, label in zip(boxes, labels):
            np.testing.assert_allclose(found(canvas, label), box, atol=1.5)
            at_rim += cut(box, size)
    assert at_rim > 3


@pytest.mark.parametrize("ext", [".png", ".jpg"])
@pytest.mark.parametrize("size", [(160, 160), (128, 224), (96, 160)])
def test_rectangles_are_found_again_in_reduced_images(tmp_path, ext, size):
    ds = painted(tmp_path, [(721, 1283), (480, 640), (1031, 517), (1440, 2561)], ext)
    cache = ImageCache(ds, size)
    augment = AugmentConfig(degrees=3, min_box=6, min_visible=1)
    assert cache.pixels(3).shape[0] < 400
    for seed in range(6):
        parts = [mosaic(rng_for(seed), ds, [0, 1, 2, 3], size, augment)]
        for i in range(4): parts.append(single_image(rng_for(seed), ds, i, size, augment, seed % 4))
        for tiles, boxes, labels, _ in parts:
            canvas = pixels(cache, tiles, size)
            for box, label in zip(boxes, labels):
                if box[:2].min() > 1 and box[2] < size[1] - 1 and box[3] < size[0] - 1:
                    np.testing.assert_allclose(found(canvas, label), box, atol=1.5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("flips", range(4))
def test_letterboxed(wide, size, flips):
    cache = ImageCache(wide, size)
    for i in range(4):
        tiles, boxes, labels, _ = single_image(rng_for(0), wide, i, size, AugmentConfig(), flips)
        canvas = pixels(cache, tiles, size)
        np.testing.assert_allclose(found(canvas, i), boxes[0], atol=1.)
        expected, fit = letterbox(wide.image(i), size)
        nh, nw = fit.resized
        code = (None, 1, 0, -1)[flips]
        if flips: expected[:nh, :nw] = cv2.flip(expected[:nh, :nw], code)
        np.testing.assert_array_equal(canvas[..., :3], expected)
        assert (canvas[nh:] == 114).all() and (canvas[:, nw:] == 114).all()


@pytest.mark.parametrize("size", SIZES)
def test_mixup(wide, size):
    cache = ImageCache(wide, size)
    for seed in range(12):
        layer, boxes, labels = mixup(rng_for(seed), wide, seed % 4, size, AugmentConfig(flip_vertical=.5))
        second = pixels(cache, layer.tiles, size, layer.frame)
        for box, label in zip(boxes, labels): np.testing.assert_allclose(found(second, label), box, atol=1.5)
        # the frame is rounded
        assert (second[layer.frame[0] + 1:, :, :3] == 0).all() and (second[:, layer.frame[1] + 1:, :3] == 0).all()


def test_the_matrix_is_that_of_yolox():
    for seed in range(20):
        got, zoom = _random_affine(rng_for(seed), (300, 500), 10, .1, (.5, 1.5), 2)
        rng = rng_for(seed) # the same draws, in the way of yolox.data.data_augment.get_affine_matrix
        angle = rng.uniform(-10, 10)
        scale = rng.uniform(.5, 1.5)
        shear_x, shear_y = (math.tan(s * math.pi / 180) for s in rng.uniform(-2, 2, 2))
        R = cv2.getRotationMatrix2D(angle=angle, center=(0, 0), scale=scale)
        M = np.ones((2, 3))
        M[0] = R[0] + shear_y * R[1]
        M[1] = R[1] + shear_x * R[0]
        M[:, 2] = rng.uniform(-.1, .1, 2) * (500, 300)
        np.testing.assert_allclose(got, M, atol=1e-12)
        assert zoom == scale


boxes_strategy = st.lists(st.tuples(*[st.floats(0, 400, width=32)] * 4), max_size=12)


@given(boxes_strategy, st.integers(0, 10**6), st.sampled_from(SIZES), st.floats(0, 20), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_boxes_stay_inside_and_large_enough(corners, seed, size, min_box, min_visible):
    b = np.array(corners, np.float32).reshape(-1, 4)
    b = np.concatenate([np.minimum(b[:, :2], b[:, 2:]), np.maximum(b[:, :2], b[:, 2:])], 1)
    matrix, _ = _random_affine(rng_for(seed), size, 180, .5, (.2, 3), 10)
    moved, keep = move_boxes(b, matrix, size, min_box, min_visible)
    assert moved.dtype == np.float32 and len(moved) == keep.sum() and keep.shape == (len(b),)
    assert (moved >= 0).all() and (moved[:, [0, 2]] <= size[1]).all() and (moved[:, [1, 3]] <= size[0]).all()
    assert ((moved[:, 2:] - moved[:, :2]) >= max(min_box, 0) - 1e-3).all()
    for k, box in enumerate(b): # the corners, one by one
        points = np.array([[box[x], box[y], 1] for x in (0, 2) for y in (1, 3)]) @ matrix.T
        hull = np.concatenate([points.min(0), points.max(0)])
        cut = np.clip(hull, 0, [size[1], size[0]] * 2)
        share = np.prod(cut[2:] - cut[:2]) / max(np.prod(hull[2:] - hull[:2]), 1e-12)
        if keep[k]: np.testing.assert_allclose(moved[keep[:k].sum()], cut, atol=1e-2)
        elif (cut[2:] - cut[:2]).min() > max(min_box, 1e-3) + 1e-2: assert share <= min_visible + 1e-3


def test_images_meet_without_a_gap(wide):
    canvas = np.full((100, 100, 4), 114, np.uint8)
    white = np.full((62, 62, 4), 255, np.uint8)
    turn, _ = _random_affine(rng_for(3), (100, 100), 10, 0, (1, 1), 2)
    for x in (-10, 50):
        for y in (-10, 50):
            matrix = turn @ np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])
            _draw(canvas, white, matrix, _region(matrix, (60, 60), (100, 100)))
    assert (canvas[20:80, 20:80] == 255).all()


def test_a_sample_does_not_depend_on_what_was_made_before(wide):
    augment = AugmentConfig(mixup=.5)
    order = epoch_order(len(wide), 1, 4)
    def make(cache, p): return make_sample(cache, order, p, (288, 512), augment, 1, 4)
    one = ImageCache(wide, (288, 512))
    forwards = [make(one, p) for p in range(8)]
    for p in reversed(range(8)):
        again = make(ImageCache(wide, (288, 512), megabytes=0), p)
        for a, b in zip(forwards[p], again): np.testing.assert_array_equal(a, b)
    other = make_sample(one, order, 0, (288, 512), augment, 1, 5)
    assert not np.array_equal(other.image, forwards[0].image)
    out = np.zeros((288, 512, 3), np.uint8)
    made = make_sample(one, order, 3, (288, 512), augment, 1, 4, out=out)
    assert made.image is out and np.array_equal(out, forwards[3].image)


def test_labels_follow_in_whole_samples(wide):
    augment = AugmentConfig(hsv_prob=0, degrees=0, shear=0, min_visible=.2)
    order = epoch_order(4, 0, 0)
    cache = ImageCache(wide.subset(range(4)), (288, 512))
    for epoch in range(6):
        for p in range(4):
            sample = make_sample(cache, order, p, (288, 512), augment, 0, epoch)
            assert sample.index == order[p] and sample.image.shape == (288, 512, 3)
            for label in np.unique(sample.labels):
                several = sample.boxes[sample.labels == label]
                around = np.concatenate([several[:, :2].min(0), several[:, 2:].max(0)])
                seen = found(sample.image, label) # dropped slivers may reach further
                assert (seen[:2] <= around[:2] + 1.5).all() and (seen[2:] >= around[2:] - 1.5).all()


def test_without_boxes_and_alone(tmp_path):
    ds = painted(tmp_path, [(60, 90)], empty=[0])
    for augment in AugmentConfig(), AugmentConfig(mixup=1), AugmentConfig(mosaic=0):
        sample = make_sample(ImageCache(ds, (96, 160)), epoch_order(1, 0, 0), 0, (96, 160), augment, 0, 0)
        assert sample.boxes.shape == (0, 4) and sample.boxes.dtype == np.float32 and sample.labels.shape == (0,)


def test_crowds_and_ignored_boxes_are_not_learned(wide):
    ds = DetDataset(wide.root, wide.classes, wide.paths[:1], wide.sizes[:1], [0]*4, [[1, 1, 9, 9]]*4, [0, 1, 2, 3],
                    flags=[0, 1, 2, 4])
    assert training_boxes(ds, 0)[1].tolist() == [0, 3]


@given(st.integers(1, 700), st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_groups_cover_the_epoch(n, most):
    ends = {group_of(p, n, most) for p in range(n)}
    spans = sorted((first, end, g) for g, first, end in ends)
    assert [g for _, _, g in spans] == list(range(len(spans)))
    assert spans[0][0] == 0 and spans[-1][1] == n and all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
    lengths = [end - first for first, end, _ in spans]
    assert max(lengths) <= most and max(lengths) - min(lengths) <= 1


@given(st.integers(1, 300), st.data())
@settings(max_examples=60, deadline=None)
def test_partners_are_neighbors(n, data):
    p = data.draw(st.integers(0, n - 1))
    got = _partners(rng_for(n, p), p, n)
    _, first, end = group_of(p, n)
    assert ((got >= first) & (got < end)).all()
    assert end - first == 1 or (got != p).all()


def test_each_image_is_decoded_once_an_epoch(wide):
    ds = wide.subset(range(8))
    cache = ImageCache(ds, (416, 416))
    order = epoch_order(8, 0, 0)
    for p in range(8): make_sample(cache, order, p, (320 + 32 * p, 320 + 32 * p), AugmentConfig(), 0, 0)
    assert cache.decoded <= 8


def test_order_and_samples_have_their_own_random_numbers():
    draws = {rng_for(0, 0, *k).integers(2**60) for k in [(1,), (2, 0), (2, 1), (3, 0)]}
    assert len(draws) == 4


def test_no_image_is_decoded_smaller_than_its_letterbox():
    for h, w in [(1080, 1920), (480, 640), (100, 5000), (833, 832), (831, 832)]:
        k = reduction((h, w), (416, 416))
        ratio = min(416 / h, 416 / w)
        assert 2 ** k <= max(1 / ratio, 1) and (k == 3 or 2 ** (k + 1) > 1 / ratio)


SHIFTS = [(5, 30, -30), (-5, -30, 30), (0, 0, 25), (75, 0, 0), (-75, 3, 3), (90, 0, 0), (-90, 0, 0), (130, 5, -5)]


@pytest.mark.parametrize("shifts", SHIFTS)
def test_colors_as_in_whole_numbers(shifts):
    image = np.random.default_rng(1).integers(0, 256, (64, 80, 3)).astype(np.uint8)
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV).astype(int) + shifts
    hsv[..., 0] %= 180
    expected = cv2.cvtColor(hsv.clip(0, 255).astype(np.uint8), cv2.COLOR_HSV2BGR).astype(int)
    got = shift_colors(image, shifts)
    out = np.empty_like(image)
    assert np.abs(got - expected).mean() < 1.2 and np.abs(got - expected).max() <= 12 # hue is in steps of two degrees
    shift_colors(cv2.cvtColor(image, cv2.COLOR_BGR2BGRA), shifts, out)
    np.testing.assert_array_equal(out, got)


def test_shifts_have_their_limits():
    drawn = np.array([_random_shifts(rng_for(0, s), (5, 30, 30)) for s in range(2000)])
    assert (np.abs(drawn).max(0) <= (4, 29, 29)).all() and (np.abs(drawn).max(0) >= (4, 28, 28)).all()
    assert (np.abs((drawn[:, 1:] == 0).mean(0) - .5) < .06).all()


def test_reading_errors(tmp_path, wide):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name, words in (("absent.jpg", "cannot be read"), ("text.jpg", "not an image"), ("empty.jpg", "not an image")):
        with pytest.raises(InputError, match=words) as e: _read_reduced(tmp_path / name, (10, 10), 0)
        assert name in str(e.value) and "\n" not in str(e.value)
    for level in range(4):
        with pytest.raises(InputError, match="read the dataset again"):
            _read_reduced(wide.path_of(0), (320, 240), level)
        assert _read_reduced(wide.path_of(0), (240, 320), level).shape == (240 >> level, 320 >> level, 3)


def test_what_a_transform_returns_is_checked(wide):
    cache = ImageCache(wide, (96, 160))
    order = epoch_order(8, 0, 0)
    def make(t): return make_sample(cache, order, 0, (96, 160), AugmentConfig(), 0, 0, transform=t)
    for wrong, words in [(lambda i, b, l, r: (i[:9], b, l), "must return an image"),
                         (lambda i, b, l, r: (None, b, l), "must return an image"),
                         (lambda i, b, l, r: (i, b, [1]*99), "99 labels"),
                         (lambda i, b, l, r: (i, [[0, 0, math.nan, 1]], [1]), "not finite")]:
        with pytest.raises(InputError, match=words) as e: make(wrong)
        assert wide.paths[order[0]] in str(e.value)
    sample = make(lambda i, b, l, r: (255 - i, [[-5, 3, 500, 50]], [2]))
    assert sample.boxes.tolist() == [[0, 3, 160, 50]] and sample.labels.tolist() == [2]


ALL = {
    "mosaic": 0., "flip": .5, "flip_vertical": .5, "affine": 1., "crop": 1., "zoom_out": 1., "copy_paste": 1.,
    "mixup": 1.
}
STEPS_1080 = [(900, 1600), (1044, 1856), (1260, 2240)]


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    return painted(tmp_path_factory.mktemp("six"), [(240, 320), (360, 640), (200, 150), (270, 480), (64, 400),
                                                    (300, 300)])


def check_sample(ds, plan, augment):
    """Every box of a plan is around its color, and every color that can be seen has a box. Returns how many boxes
    were looked at."""
    zoom = max((t.zoom for layer in plan.layers for t in layer.tiles), default=1)
    bound = 1.5 + .5 * max(zoom, 1) # pixels of the sample: half a pixel of the image shows at the rim of a crop
    cache = ImageCache(ds, plan.size)
    turned = augment.degrees > 0 or augment.shear > 0
    looked = 0
    second = len(_boxes_in(ds, plan.layers[1].tiles, plan.size, augment)[0]) if len(plan.layers) == 2 else 0
    first = len(plan.boxes) - second
    for layer, part in zip(plan.layers, (slice(0, first), slice(first, None))):
        image = pixels(cache, layer.tiles, plan.size, layer.frame)
        boxes = plan.boxes[part]
        labels = plan.labels[part]
        shown = np.bincount([t.index for t in layer.tiles], minlength=6)
        over = [t.within for t in layer.tiles if t.source and t is not layer.tiles[0]]
        for box, label in zip(boxes, labels):
            hidden = 0
            for x1, y1, x2, y2 in over:
                hidden += min(box[2], x2) > max(box[0], x1) and min(box[3], y2) > max(box[1], y1)
            pasted = any(np.abs(box - rect).max() < 1.5 for rect in over)
            if shown[label] != 1 or hidden > pasted: continue
            if turned and cut(box, plan.size) or (box[2:] - box[:2]).min() < 6: continue
            np.testing.assert_allclose(found(image, label), box, atol=bound)
            looked += 1
        for label in set(np.flatnonzero(shown).tolist()) - set(labels.tolist()):
            high = COLORS[label] > 0
            mask = cv2.inRange(image[..., :3].copy(), np.where(high, 170, 0), np.where(high, 255, 48))
            scale = max(abs(np.linalg.det(t.matrix[:, :2])) for t in layer.tiles if t.index == label)
            whole = np.prod(np.diff(training_boxes(ds, label)[0].reshape(2, 2), axis=0)) * scale
            too_little_left = 1.3 * augment.min_visible * whole * (2 if turned else 1)
            too_narrow = 2 * max(plan.size) * augment.min_box
            assert np.count_nonzero(mask) <= max(too_little_left, too_narrow)
    return looked


some = st.sampled_from([0., 0., 1.])


@given(st.fixed_dictionaries({k: some for k in ALL}), st.sampled_from([0., 8., 70.]),
       st.sampled_from(SIZES + [(96, 160), (333, 517)]), st.integers(0, 10**6))
@settings(max_examples=120, deadline=None)
def test_boxes_are_right_after_everything_together(six, shares, degrees, size, seed):
    augment = AugmentConfig(**shares, degrees=degrees, shear=degrees / 10, hsv_prob=0)
    for position in range(3):
        check_sample(six, plan_sample(six, epoch_order(6, seed, 0), position, size, augment, seed, 0), augment)


@pytest.mark.parametrize("size", STEPS_1080)
@pytest.mark.parametrize("shares", [{"mosaic": 1.}, {"mosaic": 1., "mixup": 1., "copy_paste": 1.},
                                    {**ALL, "mixup": 0.}])
def test_boxes_are_right_at_the_steps_of_1080(six, size, shares):
    augment = AugmentConfig(**{**dict.fromkeys(ALL, 0.), **shares}, hsv_prob=0)
    order = epoch_order(6, 1, 0)
    assert sum(check_sample(six, plan_sample(six, order, p, size, augment, 1, 0), augment) for p in range(2)) > 0


@pytest.mark.parametrize("name", ["crop", "zoom_out", "affine", "copy_paste", "flip", "flip_vertical", "mosaic"])
def test_each_alone_keeps_its_boxes(six, name):
    augment = AugmentConfig(**{**dict.fromkeys(ALL, 0.), name: 1.}, hsv_prob=0, degrees=0 if name == "mosaic" else 10)
    looked = 0
    for seed in range(6):
        order = epoch_order(6, seed, 0)
        for p in range(6):
            looked += check_sample(six, plan_sample(six, order, p, (288, 512), augment, seed, 0), augment)
    assert looked >= 20


def test_what_is_off_draws_nothing(six):
    "Settings that were added later leave the samples of a training as they were."
    order = epoch_order(6, 0, 0)
    both = AugmentConfig(crop_scale=[.9, .9], zoom_out_scale=[3, 3], copy_paste_boxes=9)
    for p in range(6):
        for mosaics in True, False:
            a, b = (plan_sample(six, order, p, (96, 160), s, 0, 0, mosaics)
                    for s in (AugmentConfig(mosaic=.5), both.model_copy(update={"mosaic": .5})))
            np.testing.assert_array_equal(a.boxes, b.boxes)
            assert a.rng.integers(2**60) == b.rng.integers(2**60) and a.shifts == b.shifts
    last = plan_sample(six, order, 0, (96, 160), AugmentConfig(**ALL), 0, 0, mosaics=False)
    assert last.layers[0].tiles[0].resize and len(last.layers[0].tiles) == 1


@given(st.integers(1, 2000), st.integers(1, 2000), boxes_strategy, st.floats(.01, 1), st.floats(0, 1),
       st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_crops_lie_inside_and_hold_a_box(h, w, corners, low, more, seed):
    b = np.array(corners, np.float32).reshape(-1, 4)
    b = np.concatenate([np.minimum(b[:, :2], b[:, 2:]), np.maximum(b[:, :2], b[:, 2:])], 1)
    b = b[(b[:, 0] < w) & (b[:, 1] < h) & ((b[:, 2:] - b[:, :2]).min(1, initial=9) >= 1)]
    x1, y1, x2, y2 = _random_crop(rng_for(seed), (h, w), b, (low, low + more))
    assert 0 <= x1 < x2 <= w and 0 <= y1 < y2 <= h
    seen = np.clip(b, 0, [w, h, w, h])
    assert not len(b) or ((seen[:, :2] >= (x1, y1)) & (seen[:, 2:] <= (x2, y2))).all(1).any()


def test_a_crop_shows_its_part_and_nothing_else(six):
    for seed in range(8):
        tiles, boxes, labels, _ = single_image(rng_for(seed), six, 3, (256, 320), AugmentConfig(crop=1), seed % 4)
        image = pixels(ImageCache(six, (256, 320)), tiles, (256, 320))
        x1, y1, x2, y2 = tiles[0].source
        nw, nh = tiles[0].within[2:]
        expected = cv2.resize(six.image(3)[y1:y2, x1:x2], (nw, nh))
        if seed % 4: expected = cv2.flip(expected, (None, 1, 0, -1)[seed % 4])
        assert (image[nh:] == 114).all() and (image[:, nw:] == 114).all()
        assert np.abs(image[:nh, :nw, :3].astype(int) - expected).mean() < 1.5 # the rim is drawn with the neighbors


def test_pasted_boxes_hide_little(six):
    augment = AugmentConfig(mosaic=.5, copy_paste=1, copy_paste_boxes=5, mixup=0)
    pasted = 0
    off = augment.model_copy(update={"copy_paste": 0})
    for seed in range(40):
        order = epoch_order(6, seed, 0)
        plan, bare = (plan_sample(six, order, 0, (288, 512), a, seed, 0) for a in (augment, off))
        before = bare.boxes
        np.testing.assert_array_equal(plan.boxes[:len(before)], before)
        patches = [t.within for t in plan.layers[0].tiles[len(bare.layers[0].tiles):]]
        pasted += len(patches)
        for box in before:
            area = 0
            for x1, y1, x2, y2 in patches:
                w = min(box[2], x2) - max(box[0], x1)
                h = min(box[3], y2) - max(box[1], y1)
                area += max(w, 0) * max(h, 0)
            assert area <= (_MAX_COVERED + 1e-3) * np.prod(box[2:] - box[:2])
        assert len(plan.boxes) - len(before) >= len(patches)
    assert pasted > 40


def test_a_patch_brings_the_other_boxes_in_it(tmp_path):
    cv2.imwrite(str(tmp_path / "0.png"), np.full((200, 200, 3), 50, np.uint8))
    boxes = [[20, 20, 120, 120], [40, 40, 80, 80], [110, 60, 180, 90], [150, 150, 190, 190]]
    ds = DetDataset(tmp_path, ("big", "inner", "cut", "away"), ["0.png"], [(200, 200)], [0] * 4, boxes, [0, 1, 2, 3])
    for seed in range(60):
        plan = plan_sample(ds, np.array([0]), 0, (640, 640),
                           AugmentConfig(mosaic=0, copy_paste=1, copy_paste_boxes=1, flip=0, min_visible=.1), seed, 0)
        tiles = plan.layers[0].tiles
        if len(tiles) < 2 or tiles[1].source != (20, 20, 120, 120): continue
        assert plan.labels[4:].tolist() == [0, 1, 2]
        np.testing.assert_allclose(plan.boxes[4], tiles[1].within, atol=1e-3)
        assert plan.boxes[6, 2] == pytest.approx(tiles[1].within[2], abs=1e-3)
        return
    raise AssertionError("never pasted")


@given(st.lists(st.floats(0, 6), min_size=1, max_size=60), st.integers(0, 10**6), st.integers(0, 50))
@settings(max_examples=150, deadline=None)
def test_repeats(factors, seed, epoch):
    factors = np.array(factors)
    if factors.sum() < .5: factors[0] += 1
    order = epoch_order(len(factors), seed, epoch, factors)
    assert len(order) == math.floor(factors.sum() + .5) and order.dtype == np.int64
    counts = np.bincount(order, minlength=len(factors))
    assert ((counts == np.floor(factors)) | (counts == np.ceil(factors))).all()
    np.testing.assert_array_equal(order, epoch_order(len(factors), seed, epoch, factors))


def test_repeats_of_one_are_the_plain_order():
    np.testing.assert_array_equal(epoch_order(50, 3, 4, np.ones(50)), epoch_order(50, 3, 4))
    means = np.mean([np.bincount(epoch_order(4, 0, e, [1.25, 1.5, 2.75, 1.5]), minlength=4) for e in range(800)], 0)
    np.testing.assert_allclose(means, [1.25, 1.5, 2.75, 1.5], atol=.15)
    for wrong in ([1, 2, 3], [1, math.nan], [1, -1], [0, 0], [[1, 1]]):
        with pytest.raises(InputError, match="repeat factors must be 2 numbers"): epoch_order(2, 0, 0, wrong)


def test_a_repeated_image_is_another_sample(six):
    order = np.array([2, 0, 2, 1, 2])
    draws = [_sample_rng(order, p, 0, 0).integers(2**60) for p in range(5)]
    assert len(set(draws)) == 5 and draws[0] == _sample_rng(np.array([5, 2]), 1, 0, 0).integers(2**60)
    assert draws[2] == _sample_rng(np.array([2, 2]), 1, 0, 0).integers(2**60)


class Store:
    "What a cache of decoded images is to an ImageCache."
    def __init__(self, images): self.images = images
    def get(self, index): return self.images.get(index)


def test_a_store_is_used_instead_of_decoding(six):
    order = epoch_order(6, 0, 0)
    size = (160, 256)
    augment = AugmentConfig(mosaic_scale=[.2, .9])
    plain = ImageCache(six, size)
    filled = ImageCache(six, size, store=Store({i: plain.pixels(i).copy() for i in range(6) if i != 4}))
    for p in range(6):
        for a, b in zip(make_sample(plain, order, p, size, augment, 0, 0),
                        make_sample(filled, order, p, size, augment, 0, 0)):
            np.testing.assert_array_equal(a, b)
    assert filled.decoded <= 1


@pytest.mark.parametrize("shares", [{"mosaic": 1.}, {"mosaic": 1., "mixup": 1.}, {"mosaic": 0.},
                                    {"mosaic": 0., "zoom_out": 1., "copy_paste": 1.}])
def test_the_window_changes_nothing(six, shares):
    "What no tile reaches is filled without computing: the same pixels as the plain way gives."
    cache = ImageCache(six, (288, 512))
    size = (288, 512)
    for seed in range(10):
        plan = plan_sample(six, epoch_order(6, seed, 0), 0, size, AugmentConfig(**shares), seed, 0)
        canvas, *second = (_draw_layer(cache, layer, (0, 0, 512, 288)) for layer in plan.layers)
        if second: canvas = cv2.addWeighted(canvas, .5, second[0], .5, 0)
        expected = shift_colors(canvas, plan.shifts)
        out = np.full((*size, 3), 7, np.uint8)
        assert render(cache, plan, out) is out
        assert np.abs(out.astype(int) - expected).max() <= 1 # vectors and single pixels may be rounded differently
        assert (out != expected).mean() < .01


def test_boxes_outside_of_the_drawn_part_are_dropped_when_turned():
    turn, _ = _random_affine(rng_for(1), (400, 400), 0, 0, (1, 1), 0)
    turn[:, :2] = [[.7, -.7], [.7, .7]]
    boxes = np.float32([[0, 0, 40, 200], [60, 10, 90, 40], [30, 100, 70, 140]])
    moved, keep = move_boxes(boxes, turn + [[0, 0, 150], [0, 0, 0]], (400, 400), source=(50, 0, 200, 200))
    assert keep.tolist() == [False, True, True] and len(moved) == 2
    whole, _ = move_boxes(np.float32([[50, 100, 70, 140]]), turn + [[0, 0, 150], [0, 0, 0]], (400, 400))
    np.testing.assert_array_equal(moved[1], whole[0])


def test_crops_are_decoded_as_sharp_as_they_are_shown():
    assert detail_of((384, 640), AugmentConfig()) == (384, 640)
    assert detail_of((384, 640), AugmentConfig(crop=.1, crop_scale=[.25, 1.])) == (1536, 2560)
    assert reduction((1080, 1920), detail_of((640, 640), AugmentConfig(crop=.1, crop_scale=[.5, .8]))) == 0
