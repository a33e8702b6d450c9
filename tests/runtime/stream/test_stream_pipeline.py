"""A pipeline loses nothing from a file, keeps up with a camera, and ends whole whatever fails."""
import itertools
import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from signals import hearing_ctrl_c

from jetson_det.runtime.files import InputError
from jetson_det.runtime.geometry import Detections
from jetson_det.runtime.stream.pipeline import Area, Cascade, Pipeline
from jetson_det.runtime.stream.regions import read_regions
from jetson_det.runtime.stream.tracker import Tracker


class Frames:
    "Frames of a moving square, as a capture hands them on."
    name = "yard"
    fps = 10

    def __init__(self, count, live=False, seconds=0, fails_at=None):
        self.count = count
        self.live = live
        self.seconds = seconds
        self.fails_at = fails_at
        self.given = 0
        self.closed = 0

    def __iter__(self):
        for k in range(self.count):
            if k == self.fails_at: raise InputError("yard: the cable is out")
            time.sleep(self.seconds)
            image = np.zeros((100, 200, 3), np.uint8)
            image[40:60, 2 * k % 180:2 * k % 180 + 20] = 255
            self.given += 1
            yield image, k, 1000 + k / self.fps

    def close(self): self.closed += 1


class Bright:
    "A session that finds what is bright."
    contract = SimpleNamespace(classes=("box", "lid"))

    def __init__(self, seconds=0, fails_at=None, score=.9):
        self.confidence = .5
        self.seconds = seconds
        self.fails_at = fails_at
        self.score = score
        self.calls = 0

    def __call__(self, image):
        if isinstance(image, list): return [self(one) for one in image]
        self.calls += 1
        if self.calls == self.fails_at: raise RuntimeError("out of memory")
        time.sleep(self.seconds)
        y, x = np.nonzero(image[..., 0])
        boxes = [[x.min(), y.min(), x.max() + 1, y.max() + 1]] if len(x) else []
        return Detections(np.float32(boxes).reshape(-1, 4), np.full(len(boxes), self.score, np.float32),
                          np.zeros(len(boxes), np.int64))


class Kept:
    "An output that keeps the numbers of its frames."

    def __init__(self, seconds=0, fails_at=None, fails_to_close=False):
        self.results = []
        self.seconds = seconds
        self.fails_at = fails_at
        self.fails_to_close = fails_to_close
        self.closed = 0

    def write(self, result):
        if result.index == self.fails_at: raise OSError("no space left")
        time.sleep(self.seconds)
        self.results.append(result)

    def close(self):
        self.closed += 1
        if self.fails_to_close: raise OSError("no space for the end")

    @property
    def indices(self): return [result.index for result in self.results]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("count, every, with_tracker, queue_size", itertools.product(
    (0, 1, 4, 23), (1, 3), (False, True), (1, 4)))
@pytest.mark.parametrize("seconds", [(.001, 0, 0), (0, .001, 0), (0, 0, .001)], ids=["source", "network", "output"])
def test_a_file_loses_no_frame_and_keeps_their_order(count, every, with_tracker, queue_size, seconds):
    frames, session, kept = Frames(count, seconds=seconds[0]), Bright(seconds[1]), Kept(seconds[2])
    tracker = Tracker() if with_tracker else None
    summary = Pipeline(frames, session, [kept], every=every, tracker=tracker, queue_size=queue_size).run()
    looked = list(range(0, count, every))
    assert kept.indices == (list(range(count)) if with_tracker else looked)
    assert [r.index for r in kept.results if r.looked] == looked
    assert (summary.frames, summary.looked, summary.dropped) == (count, len(looked), 0)
    assert summary.results + summary.skipped == count == frames.given
    assert (kept.closed, frames.closed) == (1, 1)


def test_a_camera_is_kept_up_with():
    frames, kept = Frames(80, live=True, seconds=.002), Kept()
    summary = Pipeline(frames, Bright(.02), [kept]).run()
    assert summary.dropped > 20 and summary.frames + summary.dropped == 80
    assert kept.indices == sorted(set(kept.indices)) and kept.indices[-1] == 79  # the newest is always seen


@pytest.mark.parametrize("parts, message", [
    ({"frames": Frames(20, fails_at=5)}, "cable is out"), ({"session": Bright(fails_at=5)}, "out of memory"),
    ({"output": Kept(fails_at=5)}, "no space left"), ({"output": Kept(fails_to_close=True)}, "space for the end")])
def test_what_fails_is_told_once_and_all_is_closed(parts, message):
    frames, output, other = parts.get("frames", Frames(20)), parts.get("output", Kept()), Kept()
    with pytest.raises(Exception, match=message):
        Pipeline(frames, parts.get("session", Bright()), [output, other]).run()
    assert (frames.closed, output.closed, other.closed) == (1, 1, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_everything_whole(number):
    kept = Kept()
    frames = Frames(10000, seconds=.002)
    with hearing_ctrl_c():
        timer = threading.Timer(.15, os.kill, (os.getpid(), number))
        timer.start()
        summary = Pipeline(frames, Bright(), [kept]).run()
        timer.join()
    assert summary.stopped_by and 0 < summary.results < 10000
    assert kept.indices == list(range(summary.results)) and kept.closed == frames.closed == 1


def test_most_and_seconds_end_it():
    kept = Kept()
    assert Pipeline(Frames(50), Bright(), [kept]).run(most=7).frames == 7 and kept.indices == list(range(7))
    start = time.perf_counter()
    Pipeline(Frames(10000, seconds=.005), Bright(), []).run(seconds=.1)
    assert time.perf_counter() - start < 2


def test_iterating_may_stop_early():
    frames, kept = Frames(1000), Kept()
    for result in Pipeline(frames, Bright(), [kept]):
        if result.index == 3: break
    del result
    assert frames.closed == kept.closed == 1


def test_the_tracker_sees_low_scores_and_without_it_they_are_not_told():
    tracked = Bright(score=.3)
    Pipeline(Frames(3), tracked, tracker=Tracker(low_score=.1))
    assert tracked.confidence == .1
    kept = Kept()
    summary = Pipeline(Frames(3), Bright(score=.3), [kept]).run()
    assert summary.objects == 0 and len(kept.results) == 3


def test_an_area_sees_as_the_whole_frame_within_it():
    kept = Kept()
    half = Area([[0, 0], [.5, 0], [.5, 1], [0, 1]])
    Pipeline(Frames(60), Bright(), [kept], area=half).run()
    for result in kept.results:
        x = 2 * result.index
        if x + 20 <= 100: assert result.detections.boxes.tolist() == [[x, 40, x + 20, 60]]
        if x >= 100: assert len(result.detections.boxes) == 0


def test_a_cascade_finds_the_same_place_in_the_frame():
    kept = Kept()
    second = Bright()
    second.contract = SimpleNamespace(classes=("plate",))
    read = lambda image, detections, ids: tuple("text" for _ in detections.boxes)
    Pipeline(Frames(30), Bright(), [kept], cascade=Cascade(second, on=["box"]), tracker=Tracker(), reader=read).run()
    for result in kept.results:
        first, again = result.detections.boxes
        assert abs(first - again).max() < 3 and result.detections.labels.tolist() == [0, 2]
        assert result.ids[0] == result.ids[1] and result.texts == ("text", "text")
    assert kept.results[0].classes == ("box", "lid", "plate")


def test_a_line_is_crossed_once_with_frames_left_out():
    kept = Kept()
    line = read_regions([{"name": "gate", "line": [[.5, 1], [.5, 0]]}])
    Pipeline(Frames(80), Bright(), [kept], every=3, tracker=Tracker(), regions=line).run()
    assert sum(len(result.events) for result in kept.results) == 1


def test_the_trace_has_each_stage_of_each_frame(tmp_path):
    path = tmp_path / "trace.json"
    Pipeline(Frames(5), Bright(), [Kept()], trace=path).run()
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    for stage in ("detect", "follow", "output"):
        assert [e["args"]["frame"] for e in events if e["name"] == stage] == [0, 1, 2, 3, 4]
    assert len({e["tid"] for e in events}) == 3 and all(e["dur"] >= 0 for e in events)


class Sizes(Frames):
    "After some frames the camera is back in half the size."
    def __iter__(self):
        for k in range(self.count):
            scale = 1 if k < self.count // 2 else 2
            image = np.zeros((200 // scale, 400 // scale, 3), np.uint8)
            image[140 // scale:180 // scale, 40 // scale:80 // scale] = 255
            yield image, k, 1000 + k / self.fps


def test_a_zone_keeps_its_share_of_frames_of_another_size():
    zone = read_regions([{"name": "lower", "zone": [[0, .5], [1, .5], [1, 1], [0, 1]]}])
    kept = Kept()
    Pipeline(Sizes(60), Bright(), [kept], tracker=Tracker(buffer=5), regions=zone).run()
    present = [result.counts["lower"]["present"] for result in kept.results]
    assert present[25] == 1 and present[-1] == 1
    corners = [result.detections.boxes[0].tolist() for result in (kept.results[25], kept.results[-1])]
    assert np.allclose(np.array(corners[0]) / 2, corners[1], atol=2)


def test_a_line_counts_on_in_frames_of_another_size():
    class Crossing(Sizes):
        def __iter__(self):
            for k in range(self.count):
                scale = 1 if k < self.count // 2 else 2
                x = (k % (self.count // 2)) * 12
                image = np.zeros((200 // scale, 400 // scale, 3), np.uint8)
                image[80 // scale:120 // scale, x // scale:(x + 40) // scale] = 255
                yield image, k, 1000 + k / self.fps
    kept = Kept()
    line = read_regions([{"name": "gate", "line": [[.5, 1], [.5, 0]], "point": "center"}])
    Pipeline(Crossing(60), Bright(), [kept], tracker=Tracker(), regions=line).run()
    counts = [sum(result.counts["gate"].values()) for result in kept.results]
    assert (counts[29], counts[-1]) == (1, 2)


def test_what_the_second_session_found_goes_along_in_frames_left_out():
    "A lid found on a box: where the box is predicted, so is the lid, and who hides it hides it there too."
    class Lid(Bright):
        contract = SimpleNamespace(classes=("plate",))
        def __call__(self, images):
            return [Detections(np.float32([[4, 4, 12, 8]]), np.float32([.8]), np.array([0])) for _ in images]
    kept = Kept()
    Pipeline(Frames(30), Bright(), [kept], every=3, tracker=Tracker(), cascade=Cascade(Lid(), pad=0)).run()
    shown = [result for result in kept.results if len(result.ids)]
    assert {result.looked for result in shown[6:]} == {True, False}
    for result in shown[6:]:
        assert result.detections.labels.tolist() == [0, 2] and len(set(result.ids.tolist())) == 1
        box, lid = result.detections.boxes
        assert np.allclose(lid[:2] - box[:2], 4, atol=1.5)


def test_what_has_no_track_yet_is_hidden_all_the_same():
    from jetson_det.runtime.ops.privacy import PrivacyRules, apply_privacy
    class LateLid(Bright):
        contract = SimpleNamespace(classes=("plate",))
        def __call__(self, images): return [Detections(np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0, int))] * 9
    class Second(Frames):
        "A second square comes in frame 4: a track begins with its second detection."
        def __iter__(self):
            for image, k, when in super().__iter__():
                if k == 4: image[80:95, 10:40] = np.arange(30)[None, :, None] % 2 * 240
                yield image, k, when
    class Both(Bright):
        def __call__(self, image):
            found = [[80, 40, 100, 60]] if not image[85, 20:40].any() else [[80, 40, 100, 60], [10, 80, 40, 95]]
            n = len(found)
            return Detections(np.float32(found), np.full(n, .9, np.float32), np.zeros(n, np.int64))
    for blur, cascade in ((("box",), None), (("plate",), Cascade(LateLid()))):
        kept = Kept()
        Pipeline(Second(8), Both(), [kept], tracker=Tracker(), cascade=cascade).run()
        result = kept.results[4]
        assert len(result.detections.boxes) == 1 and [10, 80, 40, 95] in result.untold.boxes.tolist()
        hidden = apply_privacy(result, PrivacyRules(blur=blur)).image
        steps = [np.abs(np.diff(image[87, 12:38, 0].astype(int))).max() for image in (result.image, hidden)]
        assert steps[0] == 240 and steps[1] < 60


def test_losses_are_in_the_summary():
    class Full(Kept):
        lost = 0
        def write(self, result): self.lost += result.index % 2
        def __str__(self): return "a full disk"
    summary = Pipeline(Frames(10), Bright(), [Kept(), Full()]).run()
    assert summary.lost == {"a full disk": 5} and "5 frames lost by a full disk" in str(summary)


def test_a_trace_that_cannot_be_written_costs_no_summary(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="is a folder"): Pipeline(Frames(3), Bright(), trace=tmp_path)
    summary = Pipeline(Frames(3), Bright(), trace=tmp_path / "new" / "t.json").run()
    assert summary.frames == 3 and (tmp_path / "new" / "t.json").is_file()
    pipeline = Pipeline(Frames(3), Bright(), trace=tmp_path / "other" / "t.json")
    (tmp_path / "other").write_text("in the way")
    with pytest.warns(UserWarning, match="the trace can't be written"): assert pipeline.run().frames == 3
