"""The fast path against the plain one, and both against what the upstream projects do."""
import cv2
import numpy as np
import pytest

from jetson_det.runtime.contract import preset
from jetson_det.runtime.files import InputError
from jetson_det.runtime.preprocess import Preprocessor, as_bgr, letterbox

RNG = np.random.RandomState(0)
SIZES = [(1, 1), (1, 50), (50, 1), (31, 33), (416, 416), (415, 416), (720, 1280), (1000, 37), (3, 2000)]


def photo(h, w): return RNG.randint(0, 256, (h, w, 3)).astype(np.uint8)


def yolox_preproc(img, size):
    "yolox.data.data_augment.preproc of yolox 0.3.0."
    padded = np.ones((size[0], size[1], 3), dtype=np.uint8) * 114
    r = min(size[0] / img.shape[0], size[1] / img.shape[1])
    resized = cv2.resize(img, (int(img.shape[1]*r), int(img.shape[0]*r)),
                         interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    padded[:int(img.shape[0] * r), :int(img.shape[1] * r)] = resized
    return np.ascontiguousarray(padded.transpose(2, 0, 1), dtype=np.float32)


def ultralytics_letterbox(img, size):
    "ultralytics.data.augment.LetterBox(auto=False) and the division of its predictor."
    r = min(size[0] / img.shape[0], size[1] / img.shape[1])
    w = int(round(img.shape[1] * r))
    h = int(round(img.shape[0] * r))
    dw = (size[1] - w) / 2
    dh = (size[0] - h) / 2
    img = cv2.resize(img, (w, h), interpolation=cv2.INTER_LINEAR) if img.shape[:2] != (h, w) else img
    img = cv2.copyMakeBorder(img,
                             int(round(dh - .1)),
                             int(round(dh + .1)),
                             int(round(dw - .1)),
                             int(round(dw + .1)),
                             cv2.BORDER_CONSTANT,
                             value=(114, )*3)
    return img[..., ::-1].transpose(2, 0, 1).astype(np.float32) / 255


@pytest.mark.parametrize("size", [(416, 416), (320, 640)])
def test_upstream_letterboxes(size):
    yolox = Preprocessor(preset("yolox", input_size=size))
    v8 = Preprocessor(preset("ultralytics", input_size=size))
    for h, w in SIZES[3:7]:
        image = photo(h, w)
        np.testing.assert_array_equal(yolox([image])[0][0], yolox_preproc(image, size))
        np.testing.assert_allclose(v8([image])[0][0], ultralytics_letterbox(image, size), atol=1e-6)


@pytest.mark.parametrize("fit", ["letterbox-topleft", "letterbox-center", "stretch"])
@pytest.mark.parametrize("color", ["bgr", "rgb"])
def test_fast_is_plain(fit, color):
    c = preset("yolox", input_size=(96, 160))._replace(fit=fit,
                                                       color=color,
                                                       scale=1/255,
                                                       mean=(.4, .5, .6),
                                                       std=(.2, .25, .3),
                                                       pad=50)
    fast = Preprocessor(c)
    for batch in (SIZES[:3], SIZES[3:6], SIZES[::-1][:2], SIZES[2:]):
        images = [photo(*s) for s in batch]
        x, fits = fast(images)
        assert x.shape == (len(batch), 3, 96, 160) and x.dtype == np.float32 and x.flags.c_contiguous
        for got, place, image in zip(x, fits, images):
            plain, place2 = letterbox(image, (96, 160), fit, 50)
            plain = plain[..., ::1 if color == "bgr" else -1]
            np.testing.assert_allclose(got, ((plain*c.scale - np.array(c.mean))/c.std).transpose(2, 0, 1), atol=1e-5)
            assert place == place2


def test_memory_is_reused_and_frames_are_untouched():
    fast = Preprocessor(preset("yolox", input_size=(64, 64)))
    frames = [photo(64, 64), photo(100, 40)]
    before = [f.copy() for f in frames]
    x = fast(frames)[0]
    assert np.shares_memory(x, fast(frames[:1])[0]) and np.shares_memory(x, fast(frames)[0])
    for f, b in zip(frames, before): np.testing.assert_array_equal(f, b)


def test_all_kinds_of_images():
    bgr = photo(20, 30)
    gray = np.ascontiguousarray(bgr[..., 0])
    views = [
        bgr[::-1], bgr[:, ::-1], bgr[::2, ::3], bgr[..., ::-1],
        bgr.transpose(1, 0, 2),
        np.asfortranarray(bgr), bgr[2:9, 3:20]
    ]
    for image in views: np.testing.assert_array_equal(as_bgr(image), image)
    for image in (gray, gray[..., None], gray.astype(np.uint16) * 257, np.dstack([gray] * 3 + [bgr[..., 1]])):
        np.testing.assert_array_equal(as_bgr(image), np.dstack([gray] * 3))
    fast = Preprocessor(preset("yolox", input_size=(64, 64)))
    for image in views + [gray]:
        np.testing.assert_array_equal(fast([image])[0][0], letterbox(image, (64, 64))[0].transpose(2, 0, 1))


@pytest.mark.parametrize("bad", [
    None, "a.jpg", [[1, 2]], np.array("x"), np.array(7, np.uint8),
    np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros((4,), np.uint8), np.zeros((0, 4, 3), np.uint8),
    np.zeros((1, 4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.int32), np.zeros((4, 4), bool)])
def test_what_is_no_image(bad):
    with pytest.raises(InputError) as e: letterbox(bad, (32, 32))
    assert "an image must" in str(e.value) and "\n" not in str(e.value)
