"""albumentations pipelines: mistakes are named, samples are the same everywhere, boxes stay on what they were drawn
around."""
import pickle
import subprocess
import sys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

pytest.importorskip("albumentations")

from jetson_det.config import AugmentConfig
from jetson_det.core import InputError, rng_for
from jetson_det.data.augment.albumentations import load_transforms
from jetson_det.data.augment.plan import epoch_order
from jetson_det.data.augment.render import ImageCache, make_sample
from jetson_det.data.dataset import DetDataset
from jetson_det.data.loader import TrainLoader

GRAY = 90
COLORS = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]])


def make_image(size, seed):
    "Three rectangles of their own colors, apart from each other; boxes and labels."
    h, w = size
    rng = np.random.default_rng(seed)
    image = np.full((h, w, 3), GRAY, np.uint8)
    boxes = []
    for k in range(3): # one in each third of the width
        x1 = k * w // 3 + rng.integers(w // 15, w // 8)
        y1 = rng.integers(h // 6, h // 2)
        x2 = x1 + rng.integers(w // 12, w // 6)
        y2 = y1 + rng.integers(h // 8, h // 3)
        image[y1:y2, x1:x2] = COLORS[k]
        boxes.append((x1, y1, x2, y2))
    return image, np.array(boxes, np.float32), np.arange(3)


def found(image, label):
    "The smallest upright box around the pixels of a color."
    high = COLORS[label] > 0
    mask = cv2.inRange(image, np.where(high, 170, 0), np.where(high, 255, 48))
    ys = np.flatnonzero(mask.any(1))
    xs = np.flatnonzero(mask.any(0))
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])


GEOMETRY = {  # name: arguments, bound in pixels, bound as a share of the longer side
    "HorizontalFlip": ({}, 1, 0),
    "VerticalFlip": ({}, 1, 0),
    "Affine": ({"rotate": [-15, 15], "scale": [.7, 1.2], "shear": [-5, 5], "translate_percent": [-.1, .1],
                "fill": GRAY}, 2.5, 0),
    "Rotate": ({"limit": 20, "fill": GRAY}, 2.5, 0),
    "SafeRotate": ({"limit": 20, "fill": GRAY}, 2.5, 0),
    "ShiftScaleRotate": ({"rotate_limit": 15, "fill": GRAY}, 2.5, 0),
    "Perspective": ({"scale": [0.02, 0.06], "fill": GRAY}, 3, 0),
    "CropAndPad": ({"percent": [-0.1, 0.1], "fill": GRAY}, 2.5, 0),
    "GridDistortion": ({"distort_limit": 0.2, "fill": GRAY}, 3, 0.01),
    "OpticalDistortion": ({"distort_limit": 0.2, "fill": GRAY}, 3, 0.01),
    "ThinPlateSpline": ({"scale_range": [0.05, 0.1], "fill": GRAY}, 3, 0.01),
}


@pytest.mark.parametrize("name", list(GEOMETRY))
def test_boxes_follow(name):
    arguments, bound, share = GEOMETRY[name]
    looked = 0
    sizes = [(240, 320), (416, 416), (333, 517), (320, 192)]
    transform = load_transforms([{name: {**arguments, "p": 1}}])
    for seed in range(12):
        size = sizes[seed % 4]
        image, boxes, labels = make_image(size, seed)
        got, moved, kept = transform(image, boxes, labels, rng_for(seed))
        assert got.shape == image.shape and len(moved) == len(kept) and moved.dtype == np.float32
        assert (moved >= 0).all() and (moved <= np.array([size[1], size[0]] * 2)).all()
        for box, label in zip(moved, kept):
            # cut: a turned one has no exact box
            if box.min() <= 1 or box[2] >= size[1] - 1 or box[3] >= size[0] - 1: continue
            np.testing.assert_allclose(found(got, label), box, atol=bound + share * max(size))
            looked += 1
    assert looked > 12


@pytest.mark.parametrize("size", [(900, 1600), (1260, 2240)])
def test_boxes_follow_at_the_steps_of_1080(size):
    transform = load_transforms([{"HorizontalFlip": {"p": .5}},
                                 {"Affine": {"rotate": [-10, 10], "scale": [.6, .9], "fill": GRAY, "p": 1}}])
    image, boxes, labels = make_image(size, 3)
    got, moved, kept = transform(image, boxes, labels, rng_for(5))
    assert len(kept) == 3
    for box, label in zip(moved, kept): np.testing.assert_allclose(found(got, label), box, atol=3)


@given(st.integers(0, 10**6), st.sampled_from([(96, 160), (240, 320), (161, 97)]), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_labels_stay_with_their_boxes(seed, size, count):
    image, boxes, labels = make_image(size, seed)
    got, moved, kept = PIPELINE(image, boxes[:count], labels[:count], rng_for(seed))
    assert set(kept.tolist()) <= set(range(count)) and len(set(kept.tolist())) == len(kept) == len(moved)
    for box, label in zip(moved, kept):
        x, y = ((box[:2] + box[2:]) / 2).astype(int)
        if (box[2:] - box[:2]).min() > 8 and (box[:2] > 2).all() and (box[2:] < [size[1] - 2, size[0] - 2]).all():
            assert got[y - 2:y + 3, x - 2:x + 3].mean((0, 1)).argmax() == label


PIPELINE = load_transforms([
    {"OneOf": {"p": 1, "transforms": [
        {"Affine": {"rotate": [-12, 12], "fill": 114}}, {"HorizontalFlip": {"p": .5}}, "VerticalFlip"]}},
    {"SomeOf": {"n": 2, "p": .8, "transforms": [{"GaussNoise": {"p": .9}}, "Blur", {"ShotNoise": {"p": 1}}]}},
    {"Sequential": [{"ImageCompression": {"p": .5}}, "RandomBrightnessContrast"]},
])


def scenes(folder, n=10):
    "Images of `image` as a dataset."
    boxes = []
    size = (120, 160)
    for i in range(n):
        image, b, _ = make_image(size, i)
        cv2.imwrite(str(folder / f"{i}.png"), image)
        boxes.append(b)
    return DetDataset(folder, tuple("abc"), [f"{i}.png" for i in range(n)], [size]*n, np.repeat(np.arange(n), 3),
                      np.concatenate(boxes), [0, 1, 2]*n)


def test_the_same_samples_with_any_number_of_workers(tmp_path):
    ds = scenes(tmp_path)
    made = {}
    for workers in 0, 2, 8:
        loader = TrainLoader(ds, (96, 128), AugmentConfig(multiscale=0), 2, seed=4, workers=workers, transform=PIPELINE)
        made[workers] = [[a.numpy().copy() for a in batch] for batch in loader.epoch(1)]
        loader.close()
    for workers in 2, 8:
        for a, b in zip(made[0], made[workers], strict=True):
            for x, y in zip(a, b): np.testing.assert_array_equal(x, y)
    elsewhere = pickle.loads(pickle.dumps(PIPELINE))
    loader = TrainLoader(ds, (96, 128), AugmentConfig(multiscale=0), 2, seed=4, workers=0, transform=elsewhere)
    resumed = [[a.numpy().copy() for a in batch] for batch in loader.epoch(1, start=3)]
    for a, b in zip(made[0][3:], resumed, strict=True):
        for x, y in zip(a, b): np.testing.assert_array_equal(x, y)


def test_global_random_numbers_have_no_say(tmp_path):
    ds = scenes(tmp_path, 3)
    def make():
        cache = ImageCache(ds, (96, 128))
        order = epoch_order(3, 0, 0)
        return make_sample(cache, order, 0, (96, 128), AugmentConfig(mosaic=0), 0, 0, transform=PIPELINE).image
    first = make()
    for seed in range(3):
        np.random.seed(seed)
        cv2.setRNGSeed(seed)
        PIPELINE(*make_image((96, 160), seed), rng_for(seed))
        np.testing.assert_array_equal(make(), first)


def test_colors_are_not_exchanged():
    image, boxes, labels = make_image((96, 160), 0)
    image[..., 2] = 0 # no red at all
    shift = {"RGBShift": {"r_shift_limit": [100, 100], "g_shift_limit": 0, "b_shift_limit": 0, "p": 1}}
    got, *_ = load_transforms([shift])(image, boxes, labels, rng_for(0))
    assert (got[..., 2] >= 99).all() and (got[..., 0] == image[..., 0]).all()


def test_without_boxes_and_without_change():
    image, boxes, labels = make_image((96, 160), 0)
    flip = load_transforms([{"HorizontalFlip": {"p": 0}}])
    got, none, empty = flip(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), rng_for(0))
    assert none.shape == (0, 4) and empty.shape == (0,)
    got, same, kept = flip(image, boxes, labels + 5, rng_for(0))
    np.testing.assert_array_equal(got, image)
    np.testing.assert_allclose(same, boxes, atol=1e-3)
    assert kept.tolist() == [5, 6, 7]
    got, inside, kept = flip(image, np.float32([[-20, 5, 30, 40], [200, 5, 240, 40]]), np.arange(2), rng_for(0))
    assert kept.tolist() == [0] and inside[0, 0] == 0


WRONG = [
    ("- Blurr\n", 1, r"unknown transform 'Blurr': did you mean 'Blur'\?"),
    ("- Blur\n- Xyzzy: {p: 1}\n", 2, "unknown transform 'Xyzzy': albumentations 2.0.8 has none"),
    ("- Blur:\n    p: .5\n    blur_limits: 3\n", 3,
     r"Blur: unknown argument 'blur_limits': did you mean 'blur_limit'\?"),
    ("- Blur:\n    blur_limit: many\n", 2, "Blur: blur_limit: "),
    ("- Blur:\n    p: 7\n", 2, "Blur: p: "),
    ("- Blur\n- OneOf:\n    transforms:\n    - HorizontalFlip\n    - MotionBlur:\n        blur_limit: [3, 5]\n"
     "        angel: 3\n", 7, "MotionBlur: unknown argument 'angel'"),
    ("- OneOf:\n    p: 2\n    transforms: [Blur]\n", 2, "OneOf: p: a number of 0 to 1"),
    ("- SomeOf:\n    n: 0\n    transforms: [Blur]\n", 2, "SomeOf: n: a whole number from 1"),
    ("- SomeOf:\n    m: 1\n    transforms: [Blur]\n", 2, "SomeOf: unknown argument 'm'"),
    ("- OneOf:\n    p: 1\n", 1, "expected a list of transforms, found None"),
    ("- OneOf: [{Blur: {p: 0}}]\n", 1, "every p in it is 0"),
    ("Blur: {p: 1}\n", 1, "expected a list of transforms"),
    ("- Blur: {p: 1}\n  Rotate: {p: 1}\n", 1, "expected a transform such as"),
    ("- [Blur]\n", 1, "expected a transform such as"),
    ("- Blur: .5\n", 1, "arguments are written as names and values"),
    ("", 1, "expected a list of transforms"),
    ("- Blur\n- Resize: {height: 64, width: 64}\n", 2, "Resize: changes .* a sample keeps its size"),
    ("- RandomCrop: {height: 640, width: 640}\n", 1, "RandomCrop: fails on an image"),
    ("- RandomScale\n", 1, "RandomScale: changes"),
    ("- ToGray: {num_output_channels: 1}\n", 1, "ToGray: changes"),
    ("- Normalize\n", 1, "Normalize: makes float32"),
    ("- MaskDropout\n", 1, "MaskDropout: needs mask"),
    ("- HistogramMatching\n", 1, "HistogramMatching: "),
    ("- Mosaic\n", 1, "Mosaic: needs mosaic_metadata"),
    ("- OverlayElements\n", 1, "unknown transform 'OverlayElements'"),
    ("- Pad3D: {padding: 3}\n", 1, "unknown transform 'Pad3D'"),
    ("- Blur: {p: .5\n- X\n", "0-9", "not valid YAML"),
    ("- Compose: [Blur]\n", 1, "unknown transform 'Compose'"),
    ("- RandomCrop: {height: 3}\n", 1, "RandomCrop: needs the argument 'width'"),
    ("- 5\n", 1, "expected a transform"),
]


@pytest.mark.parametrize("text,line,words", WRONG)
def test_mistakes_are_named(tmp_path, text, line, words):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=rf"mine\.yaml, line [{line}].*: .*{words}") as e:
        load_transforms("mine.yaml", base=tmp_path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_mistakes_in_a_list_and_in_files(tmp_path):
    with pytest.raises(InputError,
                       match=r"augment\.transforms\[1\]\.OneOf\.transforms\[0\]\.Blur\.x: Blur: unknown argument 'x'"):
        load_transforms(["Blur", {"OneOf": {"transforms": [{"Blur": {"x": 1}}]}}])
    with pytest.raises(InputError, match="absent.yaml: cannot be read"): load_transforms(tmp_path / "absent.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00- Blur")
    with pytest.raises(InputError, match="bytes.yaml"): load_transforms(tmp_path / "bytes.yaml")
    (tmp_path / "loop.yaml").write_text("&a [*a]\n")
    with pytest.raises(InputError, match="loop.yaml"): load_transforms(tmp_path / "loop.yaml")
    assert load_transforms(None) is None


def test_a_quarter_turn_needs_a_square():
    turn = load_transforms([{"Transpose": {"p": 1}}])
    image, boxes, labels = make_image((160, 160), 0)
    got, moved, _ = turn(image, boxes, labels, rng_for(0))
    np.testing.assert_allclose(moved, boxes[:, [1, 0, 3, 2]], atol=1e-3)
    with pytest.raises(InputError, match="only where the input is square"): turn(*make_image((96, 160), 0), rng_for(0))


def test_albumentations_is_imported_when_needed_and_asks_nobody():
    code = ("import sys, jetson_det.data.augment.albumentations as t; assert 'albumentations' not in sys.modules\n"
            "import urllib.request; urllib.request.OpenerDirector.open = lambda *a, **k: print('ONLINE')\n"
            "t.load_transforms(['Blur']); assert 'albumentations' in sys.modules")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0 and "ONLINE" not in out.stdout and not out.stdout, out.stdout + out.stderr[-800:]
