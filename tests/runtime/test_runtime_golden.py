"""Golden files on a board: written, read and compared with numpy and OpenCV alone. Runs under Python 3.6 too."""
import json

import numpy as np
import pytest

from jetson_det.runtime.contract import preset
from jetson_det.runtime.files import InputError
from jetson_det.runtime.golden import (Bounds, Golden, compare_golden, golden_image, golden_model, read_golden,
                                       write_golden)
from jetson_det.runtime.sessions import Session

CONTRACT = preset("yolox", ("Blue", "Red"), (96, 128))._replace(output="boxes_scores")


def infer(x):
    "One anchor: the bright rectangle, and how blue and how red it is."
    boxes = []
    scores = []
    for image in x:
        rows, columns = np.nonzero(image.max(0) > .6 * image.max())
        boxes.append([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]])
        blue, _, red = image[:, rows, columns].mean(1) / 255
        scores.append([[blue, red]])
    return [np.float32(boxes), np.float32(scores)]


def frame(k):
    image = np.full((90, 120, 3), 30, np.uint8)
    image[12 + 5 * k:42 + 5 * k, 8 + 9 * k:48 + 9 * k] = [(230, 40, 40), (40, 40, 230)][k % 2]
    return image


@pytest.fixture
def path(tmp_path):
    session = Session(CONTRACT, infer)
    images = tuple(golden_image("scene {}".format(k), frame(k), session(frame(k))) for k in range(4))
    return write_golden(tmp_path / "colors.golden", Golden(golden_model(CONTRACT), .25, .45, "here", images))


def test_written_read_and_compared(path):
    golden = read_golden(path, CONTRACT)
    assert all(np.array_equal(image.frame, frame(k)) for k, image in enumerate(golden.images))
    report = compare_golden(Session(CONTRACT, infer), path)
    assert report.ok and report.pairs == report.detections == 4
    record = json.loads(report.to_json())
    assert record["ok"] and record["bounds"] == {"boxes_px": .5, "scores": .05, "ap": .005}


def test_faults_are_named(path):
    def moved(x): return [infer(x)[0] + 9, infer(x)[1]]
    for fault, message in ((lambda x: infer(x[:, ::-1]), "blue and red are exchanged"), (moved, "boxes are moved by"),
                           (lambda x: [infer(x)[0], infer(x)[1] - 1], "one too low"),
                           (lambda x: [infer(x)[0] * np.nan, infer(x)[1]], "not finite"),
                           (lambda x: [infer(x)[0], infer(x)[1][..., ::-1]], "")):
        report = compare_golden(Session(CONTRACT, fault), path)
        assert not report.ok and message in report.looks_like and report.worst["image"].startswith("scene")
        assert "parity fails" in report.lines()[0] and "Parity fails" in report._repr_markdown_()


def test_damaged_altered_foreign(path, tmp_path):
    whole = path.read_bytes()
    bad = tmp_path / "bad.golden"
    for data in (b"", whole[:99], whole[:60] + b"?" + whole[61:], whole[:-30]):
        bad.write_bytes(data)
        with pytest.raises(InputError, match="bad.golden: "): read_golden(bad)
    with pytest.raises(InputError, match="made for another model: its classes"):
        read_golden(path, CONTRACT._replace(classes=("Blue", "Green")))
    with pytest.raises(InputError, match="golden files hold scores down to 0.1"):
        compare_golden(Session(CONTRACT, infer), path, Bounds(scores=.3))
