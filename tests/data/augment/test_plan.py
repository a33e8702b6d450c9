"""What a sample is: the same boxes and (to the rounding of OpenCV's kernels) the same pixels as ever."""
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from jetson_det.config import AugmentConfig
from jetson_det.data.augment.plan import epoch_order, plan_sample
from jetson_det.data.augment.render import ImageCache, make_sample, render
from jetson_det.data.dataset import DetDataset

PINNED = Path(__file__).parents[2] / "fixtures" / "samples.json"


def scenes(folder, sizes, ext):
    """Images of smooth colors with rectangles of plain ones, made of whole numbers alone; some flagged, some
    without boxes."""
    rng = np.random.default_rng(5)
    paths = []
    index = []
    boxes = []
    labels = []
    flags = []
    for i, (h, w) in enumerate(sizes):
        y, x = np.mgrid[:h, :w]
        image = np.stack([(x*200 // w + 20*i) % 256, (y*180 // h + 40) % 256, (x + y)*120 // (h + w) + 60],
                         -1).astype(np.uint8)
        for k in range(0 if i == 5 else 1 + (i * 3) % 5):
            bw = rng.integers(w // 12, w // 3)
            bh = rng.integers(h // 12, h // 3)
            x1 = rng.integers(0, w - bw)
            y1 = rng.integers(0, h - bh)
            image[y1:y1 + bh, x1:x1 + bw] = rng.integers(0, 256, 3)
            index.append(i)
            boxes.append((x1, y1, x1 + bw, y1 + bh))
            labels.append(k % 3)
            flags.append((0, 0, 0, 2, 0)[k])
        paths.append(f"{i:03}{ext}")
        cv2.imwrite(str(folder / paths[-1]), image, [cv2.IMWRITE_JPEG_QUALITY, 95] if ext == ".jpg" else [])
    return DetDataset(folder, tuple("abc"), paths, sizes, index, np.array(boxes, np.float32), labels, flags=flags)


SMALL = [(240, 320), (360, 640), (200, 150), (270, 480), (333, 517), (64, 400), (300, 300)]
LARGE = [(1080, 1920), (721, 1283), (1031, 517), (480, 640), (900, 1600)]
SETTINGS = {  # name: (dataset, size, settings, mosaics)
    "mosaic": ("small", (416, 416), {}, True),
    "mixup": ("small", (288, 512), {"mixup": 1.0}, True),
    "flip": ("small", (384, 640), {"flip": 1.0, "hsv_prob": 0}, True),
    "half": ("small", (416, 416), {"mosaic": 0.5, "mixup": 0.5, "mixup_scale": [0.8, 1.6]}, True),
    "plain": ("small", (320, 416), {"mosaic": 0.0}, True),
    "last": ("small", (640, 384), {}, False),
    "hsv": ("small", (256, 256), {"hsv": [180, 90, 90], "flip": 0}, True),
    "turned": ("small", (416, 416),
               {"degrees": 60, "shear": 10, "mosaic_scale": [0.1, 2.0], "hsv_prob": 0.5, "min_visible": 0.4}, True),
    "mips": ("small", (96, 160), {"mosaic_scale": [0.1, 0.4], "min_box": 3}, True),
    "reduced": ("large", (160, 160), {"mixup": 0.5}, True),
    "reduced-last": ("large", (128, 224), {}, False),
    "large": ("large", (448, 768), {}, True),
}


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    "Both datasets; the large one has JPEGs, so that decoding at a part of the size is that of the JPEG decoder."
    small = scenes(tmp_path_factory.mktemp("small"), SMALL, ".png")
    large = scenes(tmp_path_factory.mktemp("large"), LARGE, ".jpg")
    return lambda name, size: ImageCache({"small": small, "large": large}[name], size)


def samples_of(caches, name):
    "Three samples, as make_sample gives them."
    dataset, size, settings, mosaics = SETTINGS[name]
    cache = caches(dataset, size)
    order = epoch_order(len(cache.ds), 3, 1)
    return [make_sample(cache, order, p, size, AugmentConfig(**settings), 3, 1, mosaics) for p in (1, 2, 4)]


def summary(sample):
    "What is stored of a sample: its boxes, and the means of 4 x 4 cells of its pixels."
    image, boxes, labels, index = sample
    cells = []
    for rows in np.array_split(image, 4, 0):
        cells.append([cell.reshape(-1, 3).mean(0).round(2).tolist() for cell in np.array_split(rows, 4, 1)])
    boxes = [[round(v, 3) for v in box] for box in boxes.tolist()]
    return {"index": index, "labels": labels.tolist(), "boxes": boxes, "cells": cells}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_samples_are_those_of_before(caches, name):
    pinned = json.loads(PINNED.read_text())[name]
    for sample, kept in zip(samples_of(caches, name), pinned, strict=True):
        now = summary(sample)
        assert (now["index"], now["labels"]) == (kept["index"], kept["labels"])
        np.testing.assert_allclose(np.reshape(now["boxes"], (-1, 4)), np.reshape(kept["boxes"], (-1, 4)), atol=2e-3)
        np.testing.assert_allclose(now["cells"], kept["cells"], atol=.7)


def plainly(ds, plan):
    "A plan's pixels in the plainest way, whole images in three channels and whole canvases; where tiles have edges."
    h, w = plan.size
    layers = []
    edges = np.zeros((h, w), bool)
    for layer in plan.layers:
        canvas = np.zeros((h, w, 3), np.uint8)
        canvas[:layer.frame[0], :layer.frame[1]] = 114
        for tile in layer.tiles:
            image = ds.image(tile.index)
            matrix = tile.matrix
            x1, y1, x2, y2 = tile.within
            if tile.resize:
                small = cv2.resize(image, (x2, y2))
                _, _, flips = tile.resize
                if flips & 1: small = small[:, ::-1]
                if flips & 2: small = small[::-1]
                canvas[:y2, :x2] = small
                continue
            for _ in range(max(int(np.ceil(np.log2(.5 / tile.zoom))), 0)):
                half_size = (image.shape[1] + 1) // 2, (image.shape[0] + 1) // 2
                image = cv2.resize(image, half_size, interpolation=cv2.INTER_AREA)
            full_h, full_w = ds.sizes[tile.index]
            matrix = matrix * [full_w / image.shape[1], full_h / image.shape[0], 1]
            # pixel (0, 0) of OpenCV lies half a pixel from the corner
            center = np.array([[1, 0, -.5], [0, 1, -.5], [0, 0, 1]])
            matrix = (center @ np.vstack([matrix, [0, 0, 1]]) @ np.linalg.inv(center))[:2]
            drawn = cv2.warpAffine(image, matrix, (w, h), borderMode=cv2.BORDER_REPLICATE)
            inside = cv2.warpAffine(np.full(image.shape[:2], 255, np.uint8), matrix, (w, h)) > 127
            inside[:y1] = False
            inside[y2:] = False
            inside[:, :x1] = False
            inside[:, x2:] = False
            canvas[inside] = drawn[inside]
            edges |= cv2.morphologyEx(inside.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((5, 5))) > 0
        layers.append(canvas.astype(float))
    return np.mean(layers, 0).round().astype(np.uint8), edges


@pytest.mark.parametrize("name", [n for n, s in SETTINGS.items() if s[0] == "small"])
def test_pixels_are_those_of_the_plain_way(caches, name):
    dataset, size, settings, mosaics = SETTINGS[name]
    cache = caches(dataset, size)
    means = []
    for seed in range(3):
        for position in range(len(cache.ds)):
            order = epoch_order(len(cache.ds), seed, 0)
            plan = plan_sample(cache.ds, order, position, size, AugmentConfig(**settings), seed, 0, mosaics)
            plan = plan._replace(shifts=(0, 0, 0))
            expected, edges = plainly(cache.ds, plan)
            means.append(np.abs(render(cache, plan).astype(int) - expected)[~edges].mean())
    assert max(means) < .4 and np.mean(means) < .08 # half a pixel beside it would be .16 to .39 on the average


if __name__ == "__main__":  # writes the file anew: python tests/data/augment/test_plan.py
    import tempfile
    a = Path(tempfile.mkdtemp())
    b = Path(tempfile.mkdtemp())
    made = {"small": scenes(a, SMALL, ".png"), "large": scenes(b, LARGE, ".jpg")}
    def new_cache(dataset, size): return ImageCache(made[dataset], size)
    lines = []
    for name in SETTINGS:
        kept = [summary(sample) for sample in samples_of(new_cache, name)]
        lines.append(f"{json.dumps(name)}: {json.dumps(kept)}")
    PINNED.write_text("{" + ",\n".join(lines) + "}\n")
