"""One meaning of an image in all stages: a photo that lies on its side is upright for the reader, the check, the
training loader, evaluation and prediction alike, with its boxes on the same pixels."""
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from jetson_det.config import AugmentConfig
from jetson_det.data.augment.render import ImageCache, _read_reduced
from jetson_det.data.formats.registry import read_dataset
from jetson_det.data.images.facts import inspect_image
from jetson_det.data.images.header import image_size, read_header
from jetson_det.data.loader import TrainLoader
from jetson_det.data.quality import view
from jetson_det.evaluate.coco import evaluate
from jetson_det.runtime.geometry import as_detections
from jetson_det.runtime.images import decode_image, read_image
from jetson_det.runtime.predict import predict
from jetson_det.runtime.stream.sources import open_source

ORIENTATIONS = range(1, 9)
FORMATS = ["JPEG", "PNG", "WEBP", "TIFF"]
STORED = 96, 160 # height, width
OBJECT = 24, 12, 72, 44 # xyxy in stored pixels


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path / "cache"))


def bright_box(image):
    "The box around the bright object."
    ys, xs = np.nonzero(image[..., 0] > 130)
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]


def make_photo(path, orientation, kind="JPEG"):
    "A bright object on dark ground, with an EXIF orientation; the image as Pillow, a third party, shows it."
    pixels = np.full((*STORED, 3), 30, np.uint8)
    x1, y1, x2, y2 = OBJECT
    pixels[y1:y2, x1:x2] = 230
    exif = Image.Exif()
    exif[274] = orientation
    options = dict(tiffinfo={274: orientation}) if kind == "TIFF" else dict(exif=exif)
    if kind in ("JPEG", "WEBP"): options["quality"] = 100
    Image.fromarray(pixels).save(path, kind, **options)
    transpose = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
                 7: "TRANSVERSE", 8: "ROTATE_90"}
    shown = Image.fromarray(pixels)
    if orientation > 1: shown = shown.transpose(Image.Transpose[transpose[orientation]])
    return np.asarray(shown)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_decoding_is_what_a_viewer_shows(tmp_path, kind, orientation):
    path = tmp_path / f"a.{kind.lower()}"
    shown = make_photo(path, orientation, kind)
    image = read_image(path)
    assert image.shape == shown.shape and np.abs(image.astype(int) - shown).mean() < 2
    assert image_size(path) == shown.shape[:2] == inspect_image(path).size
    assert read_header(path).orientation == orientation
    gray = decode_image(path.read_bytes(), gray=True)
    assert gray.shape == shown.shape[:2]
    assert decode_image(path.read_bytes(), reduce=2).shape[0] in (shown.shape[0], shown.shape[0] // 2)


class BrightSession:
    "A session whose detector finds the bright object, and remembers the frames it was given."
    def __init__(self):
        self.contract = SimpleNamespace(classes=("sack",), name="bright")
        self.confidence = .5
        self.iou = .5
        self.max_detections = 100
        self.timings = {}
        self.shapes = []

    def __call__(self, frames):
        if isinstance(frames, list): return [self(f) for f in frames]
        self.shapes.append(frames.shape)
        return as_detections([bright_box(frames)], [.9], [0])


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_stage_sees_the_same_image(tmp_path, orientation):
    "The label is YOLO's, which has no size: it is of the image as a labeling tool shows it."
    path = tmp_path / "a.jpg"
    shown = make_photo(path, orientation)
    h, w = shown.shape[:2]
    box = bright_box(shown)
    x1, y1, x2, y2 = box
    (tmp_path / "a.txt").write_text(f"0 {(x1 + x2) / 2 / w} {(y1 + y2) / 2 / h} {(x2 - x1) / w} {(y2 - y1) / h}\n")
    (tmp_path / "classes.txt").write_text("sack\n")

    # the reader and the dataset
    ds = read_dataset(tmp_path, "yolo")
    assert ds.sizes.tolist() == [[h, w]] and np.allclose(ds.boxes, [box], atol=.01)
    assert bright_box(ds.image(0)) == box

    # training: decoded whole and reduced, cached, drawn into a batch
    assert bright_box(_read_reduced(path, (h, w), 0)) == box
    assert np.allclose(np.array(bright_box(_read_reduced(path, (h, w), 1))) * 2, box, atol=2)
    assert ImageCache(ds, (h, w)).pixels(0).shape == (h + 2, w + 2, 4)
    batch = next(TrainLoader(ds, (160, 160), AugmentConfig(), 1, workers=0).epoch(0, augment=False))
    sample = np.asarray(batch.images[0]).transpose(1, 2, 0)
    x1, y1, x2, y2 = np.asarray(batch.boxes[0][0], float)
    assert sample[int(y1) + 3:int(y2) - 3, int(x1) + 3:int(x2) - 3].min() > 130
    assert (sample > 130).any(-1).sum() <= 1.1 * (x2 - x1) * (y2 - y1)

    # the view of the check
    thumb = cv2.imdecode(np.frombuffer(view._jpegs_of(path, (h, w), (160,))[0], np.uint8), cv2.IMREAD_COLOR)
    assert thumb.shape == (h, w, 3) and np.allclose(bright_box(thumb), box, atol=1)

    # evaluation and prediction
    session = BrightSession()
    assert evaluate(session, ds, progress=False).stats["AP"] == pytest.approx(1)
    frame, = open_source(path)
    assert frame.image.shape == (h, w, 3) and bright_box(frame.image) == box
    predict(session, path, tmp_path / "out")
    assert session.shapes == [(h, w, 3)] * 2
