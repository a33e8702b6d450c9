"The ratio of two times, and what is said without TensorRT."
import numpy as np
import pytest

from jetson_det.runtime import compare
from jetson_det.runtime.compare import compare_runtimes, compare_sessions
from jetson_det.runtime.files import InputError
from jetson_det.runtime.geometry import as_detections


class Clock:
    "A clock that only the sessions move, and that runs faster and faster."
    def __init__(self): self.now = 0.
    def perf_counter(self): return self.now

    def session(self, seconds, boxes):
        def detect(frame):
            self.now += seconds * (1 + self.now / 10)
            return as_detections(boxes, [.9] * len(boxes), [0] * len(boxes))
        return detect


def test_turns_take_the_drift_out(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(compare, "time", clock)
    box = [[0, 0, 10, 10], [20, 20, 40, 40]]
    found = compare_sessions(clock.session(.03, box), clock.session(.01, box[:1]), [np.zeros((9, 9, 3), np.uint8)] * 4,
                             repeats=10)
    assert found.speedup == pytest.approx(3, rel=.02)
    assert found.interval[0] <= found.speedup <= found.interval[1]
    assert (found.images, found.passes) == (4, 10) and found.boxes == (8, 4) and found.same == 4
    assert "speed-up 3.0" in str(found)


def test_few_images_that_differ_make_a_wide_interval(monkeypatch):
    "Ten times faster on black images, no faster on white ones: the images that one has decide."
    clock = Clock()
    monkeypatch.setattr(compare, "time", clock)
    def session(black):
        def detect(frame):
            clock.now += .001 if frame.any() else black
            return as_detections([[0, 0, 9, 9]], [.9], [0])
        return detect
    frames = [np.full((9, 9, 3), value, np.uint8) for value in (0, 255, 0, 255)]
    found = compare_sessions(session(.01), session(.001), frames, repeats=20)
    assert found.speedup == pytest.approx(5.5)
    assert found.interval[0] < 2 and found.interval[1] > 7


def test_equal_sessions_have_one_inside_the_interval(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(compare, "time", clock)
    same = clock.session(.02, [[0, 0, 9, 9]])
    found = compare_sessions(same, same, [np.zeros((9, 9, 3), np.uint8)] * 3, repeats=8)
    assert found.interval[0] <= 1 <= found.interval[1]


def test_without_tensorrt_threads_are_compared(monkeypatch):
    opened = []

    def session(path, contract, threads, providers):
        opened.append(threads)
        return lambda frame: as_detections()
    monkeypatch.setattr(compare, "OnnxSession", session)
    found = compare_runtimes("a.onnx", [np.zeros((9, 9, 3), np.uint8)], threads=(1, 4), repeats=2)
    assert opened == [1, 4] and "no engine was given" in str(found)
    assert found.names == ("ONNX Runtime, 1 thread", "ONNX Runtime, 4 threads")
    with pytest.raises(InputError, match="two numbers"): compare_runtimes("a.onnx", [], threads=(1,))


@pytest.mark.parametrize("engine", ["nosuch.engine", "folder"])
def test_an_engine_that_is_not_there_is_refused_without_tensorrt_too(tmp_path, engine):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="{}: no such file".format(engine)):
        compare_runtimes(tmp_path / "m.onnx", [np.zeros((9, 9, 3), np.uint8)], tmp_path / engine)
