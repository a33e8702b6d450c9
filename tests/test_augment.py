"""Boxes must stay on what they were drawn around: rectangles are painted, warped, and found again in the pixels."""
import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jetson_det.config import AugmentConfig
from jetson_det.core import InputError, rng_for
from jetson_det.data.augment import (ImageCache, draw, epoch_order, group_of, letterboxed, make_sample, mixup, mosaic, move_boxes,
                                     partners, random_affine, random_shifts, read_reduced, reduction, region, shift_colours,
                                     training_boxes)
from jetson_det.data.dataset import DetDataset
from jetson_det.runtime.preprocess import letterbox

COLOURS = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]])
GREY = 90


def painted(folder, sizes, ext=".png", empty=()):
    "A dataset with one rectangle an image: its colour and its label are the image's number (mod 4)."
    rng, paths, index, boxes, labels = np.random.default_rng(0), [], [], [], []
    for i, (h, w) in enumerate(sizes):
        image = np.full((h, w, 3), GREY, np.uint8)
        if i not in empty:
            bw, bh = rng.integers(w // 8, w // 3), rng.integers(h // 8, h // 3)
            x, y = rng.integers(0, w - bw), rng.integers(0, h - bh)
            image[y:y + bh, x:x + bw] = COLOURS[i % 4]
            index.append(i), boxes.append((x, y, x + bw, y + bh)), labels.append(i % 4)
        paths.append(f"{i}{ext}")
        cv2.imwrite(str(folder / paths[-1]), image, [cv2.IMWRITE_JPEG_QUALITY, 98])
    return DetDataset(folder, tuple("abcd"), paths, sizes, index, np.array(boxes, np.float32).reshape(-1, 4), labels)


def found(image, label):
    "The smallest upright box around the pixels of a colour."
    palette = np.concatenate([COLOURS, [[GREY] * 3, [114] * 3]])
    nearest = ((image[..., None, :3].astype(int) - palette) ** 2).sum(-1).argmin(-1)
    ys, xs = np.nonzero(nearest == label)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return painted(tmp_path_factory.mktemp("wide"), [(240, 320), (360, 640), (200, 150), (270, 480)] * 2)


SIZES = [(416, 416), (384, 640), (640, 384), (288, 512)]


@pytest.mark.parametrize("size", SIZES)
def test_rectangles_are_found_again_after_the_mosaic(wide, size):
    augment, seen = AugmentConfig(min_visible=.3), 0
    cache = ImageCache(wide, size)
    for seed in range(50):
        canvas, boxes, labels = mosaic(rng_for(seed), cache, [0, 1, 2, 3], size, augment, flip=seed % 2 == 1)
        for box, label in zip(boxes, labels):
            if box[:2].min() <= 0 or box[2] >= size[1] or box[3] >= size[0]: continue # a turned rectangle that is cut has no exact box
            np.testing.assert_allclose(found(canvas, label), box, atol=1.5)
            seen += 1
    assert seen > 10


@pytest.mark.parametrize("size", SIZES)
def test_cut_rectangles_are_found_again_when_nothing_turns(wide, size):
    augment, cut = AugmentConfig(degrees=0, shear=0), 0
    cache = ImageCache(wide, size)
    for seed in range(20):
        canvas, boxes, labels = mosaic(rng_for(seed), cache, [4, 5, 6, 7], size, augment, flip=seed % 2 == 1)
        for box, label in zip(boxes, labels):
            np.testing.assert_allclose(found(canvas, label), box, atol=1.5)
            cut += box[:2].min() <= 0 or box[2] >= size[1] or box[3] >= size[0]
    assert cut > 3


@pytest.mark.parametrize("ext", [".png", ".jpg"])
@pytest.mark.parametrize("size", [(160, 160), (128, 224), (96, 160)])
def test_rectangles_are_found_again_in_reduced_images(tmp_path, ext, size):
    ds = painted(tmp_path, [(721, 1283), (480, 640), (1031, 517), (1440, 2561)], ext)
    cache, augment = ImageCache(ds, size), AugmentConfig(degrees=3, min_box=6, min_visible=1)
    assert cache.pixels(3).shape[0] < 400
    for seed in range(6):
        for made in [mosaic(rng_for(seed), cache, [0, 1, 2, 3], size, augment)] + [letterboxed(cache, i, size, augment, seed % 2 == 0) for i in range(4)]:
            canvas, boxes, labels = made
            for box, label in zip(boxes, labels):
                if box[:2].min() > 1 and box[2] < size[1] - 1 and box[3] < size[0] - 1:
                    np.testing.assert_allclose(found(canvas, label), box, atol=1.5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("flip", [False, True])
def test_letterboxed(wide, size, flip):
    cache = ImageCache(wide, size)
    for i in range(4):
        canvas, boxes, labels = letterboxed(cache, i, size, AugmentConfig(), flip)
        np.testing.assert_allclose(found(canvas, i), boxes[0], atol=1.)
        expected, place = letterbox(wide.image(i), size)
        if not flip: np.testing.assert_array_equal(canvas[..., :3], expected)
        assert (canvas[place.resized[0]:] == 114).all() and (canvas[:, place.resized[1]:] == 114).all()


@pytest.mark.parametrize("size", SIZES)
def test_mixup(wide, size):
    cache = ImageCache(wide, size)
    for seed in range(12):
        first = np.full((*size, 4), GREY, np.uint8)
        blend, boxes, labels = mixup(rng_for(seed), cache, seed % 4, first, AugmentConfig())
        assert blend.shape == first.shape
        second = (2 * blend.astype(int) - GREY).clip(0, 255).astype(np.uint8)
        for box, label in zip(boxes, labels): np.testing.assert_allclose(found(second, label), box, atol=1.5)


def test_the_matrix_is_that_of_yolox():
    for seed in range(20):
        got, zoom = random_affine(rng_for(seed), (300, 500), 10, .1, (.5, 1.5), 2)
        rng = rng_for(seed) # the same draws, in the way of yolox.data.data_augment.get_affine_matrix
        angle, scale = rng.uniform(-10, 10), rng.uniform(.5, 1.5)
        shear_x, shear_y = (math.tan(s * math.pi / 180) for s in rng.uniform(-2, 2, 2))
        R, M = cv2.getRotationMatrix2D(angle=angle, center=(0, 0), scale=scale), np.ones((2, 3))
        M[0], M[1] = R[0] + shear_y * R[1], R[1] + shear_x * R[0]
        M[:, 2] = rng.uniform(-.1, .1, 2) * (500, 300)
        np.testing.assert_allclose(got, M, atol=1e-12)
        assert zoom == scale


boxes_strategy = st.lists(st.tuples(*[st.floats(0, 400, width=32)] * 4), max_size=12)


@given(boxes_strategy, st.integers(0, 10**6), st.sampled_from(SIZES), st.floats(0, 20), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_boxes_stay_inside_and_large_enough(corners, seed, size, min_box, min_visible):
    b = np.array(corners, np.float32).reshape(-1, 4)
    b = np.concatenate([np.minimum(b[:, :2], b[:, 2:]), np.maximum(b[:, :2], b[:, 2:])], 1)
    matrix, _ = random_affine(rng_for(seed), size, 180, .5, (.2, 3), 10)
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
    turn, _ = random_affine(rng_for(3), (100, 100), 10, 0, (1, 1), 2)
    for x in (-10, 50):
        for y in (-10, 50):
            matrix = turn @ np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])
            draw(canvas, white, matrix, region(matrix, (60, 60), (100, 100)))
    assert (canvas[20:80, 20:80] == 255).all()


def test_a_sample_does_not_depend_on_what_was_made_before(wide):
    augment, order = AugmentConfig(mixup=.5), epoch_order(len(wide), 1, 4)
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
    order, cache = epoch_order(4, 0, 0), ImageCache(wide.subset(range(4)), (288, 512))
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


def test_crowds_and_ignored_boxes_are_not_learnt(wide):
    ds = DetDataset(wide.root, wide.classes, wide.paths[:1], wide.sizes[:1], [0] * 4, [[1, 1, 9, 9]] * 4, [0, 1, 2, 3], flags=[0, 1, 2, 4])
    assert training_boxes(ds, 0)[1].tolist() == [0, 3]


@given(st.integers(1, 700), st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_groups_cover_the_epoch(n, most):
    ends = {group_of(p, n, most) for p in range(n)}
    spans = sorted((first, end, g) for g, first, end in ends)
    assert [g for _, _, g in spans] == list(range(len(spans)))
    assert spans[0][0] == 0 and spans[-1][1] == n and all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
    assert max(e - f for f, e, _ in spans) <= most and max(e - f for f, e, _ in spans) - min(e - f for f, e, _ in spans) <= 1


@given(st.integers(1, 300), st.data())
@settings(max_examples=60, deadline=None)
def test_partners_are_neighbours(n, data):
    p = data.draw(st.integers(0, n - 1))
    got, (_, first, end) = partners(rng_for(n, p), p, n), group_of(p, n)
    assert ((got >= first) & (got < end)).all()
    assert end - first == 1 or (got != p).all()


def test_each_image_is_decoded_once_an_epoch(wide):
    ds = wide.subset(range(8))
    cache, order = ImageCache(ds, (416, 416)), epoch_order(8, 0, 0)
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


@pytest.mark.parametrize("shifts", [(5, 30, -30), (-5, -30, 30), (0, 0, 25), (75, 0, 0), (-75, 3, 3), (90, 0, 0), (-90, 0, 0), (130, 5, -5)])
def test_colours_as_in_whole_numbers(shifts):
    image = np.random.default_rng(1).integers(0, 256, (64, 80, 3)).astype(np.uint8)
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV).astype(int) + shifts
    hsv[..., 0] %= 180
    expected = cv2.cvtColor(hsv.clip(0, 255).astype(np.uint8), cv2.COLOR_HSV2BGR).astype(int)
    got, out = shift_colours(image, shifts), np.empty_like(image)
    assert np.abs(got - expected).mean() < 1.2 and np.abs(got - expected).max() <= 12 # hue is in steps of two degrees
    shift_colours(cv2.cvtColor(image, cv2.COLOR_BGR2BGRA), shifts, out)
    np.testing.assert_array_equal(out, got)


def test_shifts_have_their_limits():
    drawn = np.array([random_shifts(rng_for(0, s), (5, 30, 30)) for s in range(2000)])
    assert (np.abs(drawn).max(0) <= (4, 29, 29)).all() and (np.abs(drawn).max(0) >= (4, 28, 28)).all()
    assert (np.abs((drawn[:, 1:] == 0).mean(0) - .5) < .06).all()


def test_reading_errors(tmp_path, wide):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name, words in (("absent.jpg", "cannot be read"), ("text.jpg", "not an image"), ("empty.jpg", "not an image")):
        with pytest.raises(InputError, match=words) as e: read_reduced(tmp_path / name, (10, 10), 0)
        assert name in str(e.value) and "\n" not in str(e.value)
    for level in range(4):
        with pytest.raises(InputError, match="read the dataset again"): read_reduced(wide.path_of(0), (320, 240), level)
        assert read_reduced(wide.path_of(0), (240, 320), level).shape == (240 >> level, 320 >> level, 3)


def test_what_a_transform_returns_is_checked(wide):
    cache, order = ImageCache(wide, (96, 160)), epoch_order(8, 0, 0)
    def make(t): return make_sample(cache, order, 0, (96, 160), AugmentConfig(), 0, 0, transform=t)
    for wrong, words in [(lambda i, b, l, r: (i[:9], b, l), "must return an image"), (lambda i, b, l, r: (None, b, l), "must return an image"),
                         (lambda i, b, l, r: (i, b, [1] * 99), "99 labels"), (lambda i, b, l, r: (i, [[0, 0, math.nan, 1]], [1]), "not finite")]:
        with pytest.raises(InputError, match=words) as e: make(wrong)
        assert wide.paths[order[0]] in str(e.value)
    sample = make(lambda i, b, l, r: (255 - i, [[-5, 3, 500, 50]], [2]))
    assert sample.boxes.tolist() == [[0, 3, 160, 50]] and sample.labels.tolist() == [2]
