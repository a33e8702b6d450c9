"""Tiles: windows that cover, and every object of a large frame reported once. Runs under Python 3.6 too."""
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest

from jetson_det.runtime.bench import bench
from jetson_det.runtime.geometry import as_detections, box_iou
from jetson_det.runtime.contract import preset
from jetson_det.runtime.files import InputError
from jetson_det.runtime.sessions import Session, open_session
from jetson_det.runtime.tiles import Tiled, merge_tiles, tile_grid

COLORS = Path(__file__).parents[1] / "fixtures" / "colors.onnx"


def test_windows_cover_evenly_with_the_overlap():
    rng = np.random.RandomState(0)
    for _ in range(400):
        h, w = rng.randint(1, 3000, 2).tolist()
        th, tw = rng.randint(16, 900, 2).tolist()
        overlap = rng.choice([0, .1, .2, .25, 1/3, .5, .9])
        grid = tile_grid((h, w), (th, tw), overlap)
        for length, tile, low, high in ((w, tw, grid[:, 0], grid[:, 2]), (h, th, grid[:, 1], grid[:, 3])):
            a = np.unique(low)
            b = np.unique(high)
            assert a[0] == 0 and b[-1] == length and (b - a == min(tile, length)).all() and len(a) == len(b)
            if len(a) == 1: assert length <= tile
            else:
                step = max(int(tile * (1 - overlap) + 1e-6), 1)
                assert np.diff(a).max() <= step and np.ptp(np.diff(a)) <= 1 # the overlap, everywhere the same
                assert (len(a) - 2) * step + tile < length # one window less would not do
        assert len(grid) == len(np.unique(grid[:, 0])) * len(np.unique(grid[:, 1]))
        assert len(np.unique(grid, axis=0)) == len(grid)


@pytest.mark.parametrize("size, is_small", [
    ((128, 160), False), (64, False), ((32, 80), False), (40, True), (16, True)])
def test_tiny_tiles_are_said(size, is_small):
    "Each is enlarged to the network's 128x160."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Tiled(Finder(), size)
    lines = [str(w.message) for w in caught]
    assert [line for line in lines if "tiles of 128x160 keep the image's own pixels" in line] == lines
    assert bool(lines) == is_small


@pytest.mark.parametrize("size, overlap, message", [
    (640, 1, "from 0 to .9"), (640, -.1, "from 0"), (640, float("nan"), "from 0"), (8, .2, "from 16 up"),
    (640., .2, "from 16"), ((640, True), .2, "from 16"), ((1, 2, 3), .2, "from 16"), ("640", .2, "from 16")])
def test_windows_that_cannot_be(size, overlap, message):
    with pytest.raises(InputError) as e: tile_grid((1080, 1920), size, overlap)
    assert message in str(e.value) and "\n" not in str(e.value)


class Finder(object):
    """Finds each rectangle of a scene, by its number in blue and green, as much of it as is in the frame; its class
    is the red."""
    def __init__(self, jitter=0):
        self.contract = preset("yolox", tuple("c%d" % k for k in range(4)), (128, 160))
        self.confidence = .25
        self.iou = .45
        self.max_detections = 300
        self.timings = {}
        self.jitter = jitter

    def __call__(self, frames):
        self.timings = {"preprocess": .1, "inference": .2, "postprocess": 0.}
        return [self.find(f) for f in frames]

    def find(self, frame):
        number = frame[..., 0].astype(int) + 256 * frame[..., 1].astype(int)
        boxes = []
        labels = []
        scores = []
        h, w = number.shape
        for k in np.unique(number)[1:].tolist():
            here = number == k
            x = np.flatnonzero(here.any(0))
            y = np.flatnonzero(here.any(1))
            box = np.array([x[0], y[0], x[-1] + 1, y[-1] + 1], float)
            rng = np.random.RandomState([k] + box.astype(int).tolist()) # another score in every window
            if self.jitter: box = np.clip(box + rng.uniform(-self.jitter, self.jitter, 4), 0, [w, h, w, h])
            if (box[2:] <= box[:2]).any(): continue
            boxes.append(box)
            labels.append(frame[y[0], x[0], 2])
            scores.append(rng.uniform(.3, .99))
        return as_detections(boxes, scores, labels)


def scene(seed, size=(420, 560), n=40, largest=40, classes=4):
    "Rectangles that do not touch, in an image: (boxes, labels, image)."
    rng = np.random.RandomState(seed)
    boxes = []
    image = np.zeros(size + (3,), np.uint8)
    room = np.zeros(size, bool)
    labels = rng.randint(0, classes, n)
    for _ in range(5000):
        if len(boxes) == n: break
        w, h = rng.randint(6, largest + 1, 2)
        x = rng.randint(0, size[1] - w + 1)
        y = rng.randint(0, size[0] - h + 1)
        if room[y:y + h, x:x + w].any(): continue
        boxes.append((x, y, x + w, y + h))
        room[max(y - 1, 0):y + h + 1, max(x - 1, 0):x + w + 1] = True
        k = len(boxes)
        image[y:y + h, x:x + w] = (k % 256, k // 256, labels[k - 1])
    return np.array(boxes), labels[:len(boxes)], image


def assert_found(found, boxes, labels, atol=0.):
    "Each box once, at its place, of its class."
    assert len(found.scores) == len(boxes), (len(found.scores), len(boxes))
    iou = box_iou(boxes, found.boxes) * (np.asarray(labels)[:, None] == found.labels)
    match = iou.argmax(1)
    assert sorted(match.tolist()) == list(range(len(boxes)))
    assert np.abs(found.boxes[match] - boxes).max() <= atol
    assert (np.diff(found.scores) <= 0).all() and found.boxes.dtype == np.float32 and found.labels.dtype == np.int64


GRIDS = [((128, 160), .35), ((128, 128), .5), (100, .6), ((200, 90), .5), (300, .2), ((420, 150), .3), (64, .75)]


@pytest.mark.parametrize("size, overlap", GRIDS)
@pytest.mark.parametrize("whole", [False, True])
def test_every_rectangle_once(size, overlap, whole):
    for seed in range(3):
        boxes, labels, image = scene(seed)
        assert_found(Tiled(Finder(), size, overlap, whole)(image), boxes, labels)


@pytest.mark.parametrize("size, overlap", [((128, 160), .2), (100, .3), ((200, 90), .25), (64, .4)])
@pytest.mark.parametrize("whole", [False, True])
def test_larger_than_the_overlap_and_than_the_window(size, overlap, whole):
    for seed in range(3):
        boxes, labels, image = scene(seed, n=14, largest=230)
        assert_found(Tiled(Finder(), size, overlap, whole)(image), boxes, labels)


@pytest.mark.parametrize("size, overlap", GRIDS)
def test_boxes_that_are_not_exact(size, overlap):
    for seed in range(3):
        boxes, labels, image = scene(seed, n=25, largest=40)
        big = (boxes[:, 2:] - boxes[:, :2]).min(1) >= 10
        for k in np.flatnonzero(~big): image[boxes[k][1]:boxes[k][3], boxes[k][0]:boxes[k][2]] = 0
        assert_found(Tiled(Finder(jitter=1.), size, overlap)(image), boxes[big], labels[big], atol=2.)


def test_neighbors_of_one_class_stay_apart():
    "A crowd in a row, each 20 px wide and 3 px from the next, over many seams."
    image = np.zeros((100, 600, 3), np.uint8)
    boxes = []
    for k in range(25):
        boxes.append((23 * k, 10 + k % 5, 23 * k + 20, 90))
        image[10 + k % 5:90, 23 * k:23 * k + 20] = (k + 1, 0, 1)
    for width in (60, 77, 100, 131): assert_found(Tiled(Finder(), (100, width), .45)(image), np.array(boxes), [1] * 25)


def test_a_small_one_before_a_large_one_of_its_class_stays():
    windows = [(0, 0, 100, 100), (60, 0, 160, 100)]
    found = [
        as_detections([(20, 10, 100, 90), (70, 40, 90, 60)], [.9, .8], [0, 0]),
        as_detections([(0, 10, 80, 90), (10, 40, 30, 60)], [.7, .85], [0, 0])
    ]
    once = merge_tiles(found, windows, (100, 160))
    np.testing.assert_allclose(once.boxes, [[20, 10, 140, 90], [70, 40, 90, 60]])
    np.testing.assert_allclose(once.scores, [.9, .85])


def test_objects_that_one_window_separates_stay_separate():
    "Two boxes of a class that overlap by .6: below the threshold of NMS, so both stay, though two windows see them."
    windows = [(0, 0, 100, 100), (40, 0, 140, 100)]
    box = np.float32([(50, 10, 90, 50), (60, 10, 100, 50)])
    found = [as_detections(box, [.9, .8], [0, 0]), as_detections(box - (40, 0, 40, 0), [.85, .95], [0, 0])]
    once = merge_tiles(found, windows, (100, 140), iou=.65)
    np.testing.assert_allclose(once.boxes, box[::-1])
    assert len(merge_tiles([found[0]], windows[:1], (100, 140), iou=.5).scores) == 1 # NMS has the last word


def test_classes_do_not_mix():
    windows = [(0, 0, 100, 100), (50, 0, 150, 100)]
    found = [as_detections([(20, 10, 100, 90)], [.9], [0]), as_detections([(0, 10, 70, 90)], [.7], [1])]
    assert len(merge_tiles(found, windows, (100, 150)).scores) == 2


def test_merge_edges():
    none = as_detections()
    assert len(merge_tiles([], [], (10, 10)).scores) == 0
    assert len(merge_tiles([none, none], [(0, 0, 9, 9), (5, 0, 14, 9)], (9, 14)).scores) == 0
    with pytest.raises(InputError, match="2 windows for 1"): merge_tiles([none, none], [(0, 0, 9, 9)], (9, 9))
    many = as_detections(
        np.random.RandomState(0).randint(0, 50, (900, 2)).repeat(2, 0).reshape(-1, 4) + np.float32([0, 0, 9, 9]),
        np.linspace(1, .01, 900),
        np.arange(900) % 3)
    assert len(merge_tiles([many, many], [(0, 0, 64, 64), (32, 0, 96, 64)], (64, 96), max_detections=7).scores) == 7


def test_it_stands_for_the_session():
    boxes, labels, image = scene(0)
    inner = Finder()
    session = Tiled(inner, overlap=.4)
    assert session.size == (128, 160) and session.contract is inner.contract and session.session is inner
    session.confidence = .5
    session.iou = .6
    session.max_detections = 12
    assert (inner.confidence, inner.iou, inner.max_detections) == (.5, .6, 12) and session.confidence == .5
    assert len(session(image).scores) == 12
    session.max_detections = 300
    one, gray, small = session([image, np.zeros((50, 60), np.uint8), image[:128, :160]])
    assert_found(one, boxes, labels)
    assert len(gray.scores) == 0 and len(small.scores) == len(inner.find(image[:128, :160]).scores)
    assert session([]) == [] and not hasattr(session, "nothing") and session.ort is None
    report = bench(session, [image], warmup=1, repeats=2)
    assert report.calls == 2 and report.stages["inference"]["p50"] == pytest.approx(200)
    for bad in (None, np.zeros((3, 3)), "frame"):
        with pytest.raises(InputError): session(bad)
    with pytest.raises(InputError, match="from 0 to .9"): Tiled(inner, overlap=2)


def test_an_onnx_file_in_tiles():
    "colors.onnx finds cells of 32 px; windows that begin at multiples of 32 see the frame's own cells, each once."
    pytest.importorskip("onnxruntime")
    rng = np.random.RandomState(1)
    cells = rng.randint(0, 6, (14, 17)) # 0 blue, 1 green, 2 red, else gray
    color = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (114, 114, 114), (114, 114, 114), (114, 114, 114)],
                      np.uint8)
    frame = cv2.resize(color[cells], (17 * 32, 14 * 32), interpolation=cv2.INTER_NEAREST)
    y, x = np.nonzero(cells < 3)
    truth = np.stack([x, y, x + 1, y + 1], 1) * 32
    inner = open_session(COLORS, threads=1)
    inner.max_detections = 300
    assert len(Tiled(inner, overlap=.2).windows(frame.shape[:2])) == 4
    for session in (Tiled(inner, overlap=.2), Tiled(Session(inner.contract, inner.infer, batch_size=3), overlap=.2)):
        session.max_detections = 300
        assert_found(session(frame), truth, cells[y, x])
        assert set(session.timings) == {"preprocess", "inference", "postprocess"}


@pytest.mark.data
def test_official_yolox_nano_on_four_photographs_in_one(data):
    inner = open_session(data / "models" / "yolox_nano_coco_416.onnx", "yolox", threads=1)
    bus = cv2.imread(str(data / "datasets" / "images" / "bus.jpg"))
    h, w = bus.shape[:2]
    alone = inner(bus)
    four = Tiled(inner, (h, w), 0)(np.tile(bus, (2, 2, 1)))
    assert len(four.scores) == 4 * len(alone.scores)
    want = np.concatenate([alone.boxes + (x, y, x, y) for x in (0, w) for y in (0, h)])
    assert (box_iou(want, four.boxes).max(1) > .999).all()
    cut = Tiled(inner, (h, w), .5)(np.tile(bus, (2, 2, 1))) # its windows cut every person somewhere
    persons = cut.boxes[(cut.labels == 0) & (cut.scores > .6)]
    want = want[np.tile(alone.labels == 0, 4)]
    overlaps = box_iou(want, persons)
    assert len(persons) == len(want) == 12
    assert (overlaps.max(1) > .5).all() and (overlaps.max(0) > .5).all()
