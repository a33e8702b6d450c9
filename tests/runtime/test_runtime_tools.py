"""Sources, drawing and the benchmark."""
import json
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest

from jetson_det.runtime.bench import STAGES, bench
from jetson_det.runtime.geometry import as_detections
from jetson_det.runtime.contract import anchor_count, preset
from jetson_det.runtime.draw import draw
from jetson_det.runtime.files import InputError
from jetson_det.runtime.sessions import Session
from jetson_det.runtime.images import read_image
from jetson_det.runtime.stream.sources import VideoSource, open_source


def png(path, h=8, w=9, value=7):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(cv2.imencode(".png", np.full((h, w, 3), value, np.uint8))[1].tobytes())


def test_folder_in_natural_order(tmp_path):
    for name in ("f10.png", "f2.PNG", "sub/ünïcode 1.png", ".hidden.png"): png(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".cache").mkdir()
    png(tmp_path / ".cache" / "x.png")
    source = open_source(str(tmp_path))
    names = ["f2.PNG", "f10.png", "sub/ünïcode 1.png"]
    frames = list(source)
    assert [(f.name.replace("\\", "/"), f.index) for f in frames] == list(zip(names, range(3)))
    assert all(f.image.shape == (8, 9, 3) for f in frames)
    assert (source.count, source.others, source.fps) == (3, 1, None) and "1 other file skipped" in str(source)


def test_images_that_cannot_be_read(tmp_path):
    png(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8 nonsense")
    source = open_source(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [f.name for f in source] == ["a.png"]
    assert source.unreadable == ["b.jpg"] and "b.jpg" in str(caught[0].message)
    with pytest.raises(InputError, match="b.jpg: breaks off after 11 bytes"): list(open_source(tmp_path / "b.jpg"))
    (tmp_path / "c.jpg").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="c.jpg: not an image"): list(open_source(tmp_path / "c.jpg"))
    with pytest.raises(InputError, match="cannot be read"): read_image(tmp_path / "none.jpg")


def test_gray_and_16_bit_files(tmp_path):
    gray = np.arange(72, dtype=np.uint8).reshape(8, 9)
    for image in (gray, gray.astype(np.uint16) * 256, np.dstack([gray] * 4)):
        (tmp_path / "x.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
        assert np.abs(read_image(tmp_path / "x.png").astype(int) - gray[..., None]).max() <= 1


def test_video(tmp_path):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 12, (64, 48))
    if not writer.isOpened(): pytest.skip("this OpenCV writes no MJPG")
    for i in range(9): writer.write(np.full((48, 64, 3), 20 * i, np.uint8))
    writer.release()
    video = open_source(path)
    assert (video.fps, video.count, video.size, video.live) == (12, 9, (48, 64), False)
    for _ in range(2): assert [int(round(f.image.mean() / 20)) for f in video] == list(range(9))
    (tmp_path / "broken.mp4").write_bytes(b"nothing of a video" * 100)
    with pytest.raises(InputError, match="broken.mp4: neither an image nor a video"):
        open_source(tmp_path / "broken.mp4")


def test_no_password_in_messages():
    with pytest.raises(InputError) as e: VideoSource("file://user:secret@/none.avi", "file:///none.avi", True)
    assert "secret" not in str(e.value)


def test_draw_stays_in_the_image():
    classes = ("Sack", "Person with a very long name")
    rng = np.random.RandomState(0)
    for h, w in ((1, 1), (20, 30), (480, 640), (2160, 3840)):
        image = np.full((h, w, 3), 100, np.uint8)
        xy = rng.uniform(-20, max(h, w) + 20, (8, 4)).astype(np.float32)
        found = as_detections(np.sort(xy.reshape(8, 2, 2), 1).reshape(8, 4), np.linspace(.2, .9, 8), np.arange(8) % 2)
        drawn = draw(image, found, classes)
        assert drawn.shape == (h, w, 3) and (image == 100).all()
        assert (draw(image, as_detections(), classes) == image).all()
    assert draw(image, found, classes, inplace=True) is image


def test_bench_report():
    session = Session(preset("yolox", ("a", ), (64, 64)),
                      lambda x: [np.zeros((len(x), anchor_count((64, 64)), 6), np.float32)])
    report = bench(session, [np.zeros((48, 64, 3), np.uint8)] * 2, warmup=1, repeats=4)
    assert (report.calls, report.frames, report.boxes) == (8, 2, 0) and set(report.stages) == set(STAGES)
    for s in report.stages.values(): assert 0 < s["min"] <= s["p50"] <= s["p95"] <= s["p99"]
    assert json.loads(report.to_json()) == json.loads(json.dumps(report.to_dict())) and "p99" in str(report)
    assert report.first_ms > 0 and report.peak_mb > 1 and "first call: " in str(report)
    assert bench(session, [np.zeros((48, 64, 3), np.uint8)], warmup=0, repeats=1).first_ms is None
    with pytest.raises(InputError, match="repeats"): bench(session, [np.zeros((4, 4, 3), np.uint8)], repeats=0)


@pytest.mark.data
def test_real_video(data):
    path = data / "videos" / "bottle-detection.mp4"
    video = open_source(path)
    if video.count is None: pytest.skip("this OpenCV has no video decoder")
    first = next(iter(video))
    assert first.image.shape == (360, 640, 3) and video.count == 1189
    assert Path(first.name).name == "bottle-detection.mp4"
