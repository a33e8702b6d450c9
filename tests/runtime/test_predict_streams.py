"""Films, cameras and streams: boxes as they come, and everything whole however it ends."""
import http.server
import json
import os
import resource
import signal
import socketserver
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from predict_sources import count_frames, middle_session, put_film, put_image, visible
from signals import hear_ctrl_c

from jetson_det.runtime import predict as module
from jetson_det.runtime.files import InputError
from jetson_det.runtime.predict import _stem, predict
from jetson_det.runtime.signals import StoppedBySignal, StopSignals, stop_raises
from jetson_det.runtime.stream import sources
from jetson_det.runtime.stream.sources import Frame

HERE = Path(__file__).parent


class Camera:
    "A source without an end, or with one."
    live = True
    name = "camera7"
    count = None

    def __init__(self, frames=None, size=(24, 32), fps=None, on_frame=None):
        self.frames = frames
        self.size = size
        self.fps = fps
        self.on_frame = on_frame
        self.is_closed = False

    def __iter__(self):
        k = 0
        while self.frames is None or k < self.frames:
            if self.on_frame: self.on_frame(k)
            yield Frame(np.full(self.size + (3,), k % 200, np.uint8), self.name, k)
            k += 1

    def __str__(self): return self.name
    def close(self): self.is_closed = True


@pytest.fixture
def camera(monkeypatch):
    "`open_source` gives the camera that was put here."
    here = []
    monkeypatch.setattr(module, "open_source", lambda source: here[0])
    return here


def rows_of(folder):
    text = (folder / "predictions.jsonl").read_text()
    return [json.loads(line) for line in text.split("\n")[:-1]]


@pytest.mark.parametrize("limit", [dict(most=0), dict(seconds=0.), dict(seconds=-1), dict(seconds=float("nan"))])
def test_a_limit_that_lets_nothing_through(camera, tmp_path, limit):
    camera.append(Camera())
    with pytest.raises(InputError, match="^(frames: at least 1|seconds: give more than 0), not "):
        predict(middle_session(), 7, tmp_path / "out", **limit)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", [dict(most=7), dict(seconds=1e-9)])
def test_a_camera_with_a_limit(camera, tmp_path, limit):
    camera.append(Camera())
    done = predict(middle_session(), 7, tmp_path / "out", **limit)
    assert done.frames == limit.get("most", 1) and done.is_complete and camera[0].is_closed
    assert visible(tmp_path / "out") == ["camera7-0001.mp4", "predictions.json", "predictions.jsonl"]
    assert count_frames(tmp_path / "out" / "camera7-0001.mp4") == done.frames
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())["frames"]
    assert rows == rows_of(tmp_path / "out") and [row["index"] for row in rows] == list(range(done.frames))


def test_boxes_are_on_the_disk_after_each_frame(camera, tmp_path):
    counts = []
    def look(k):
        if k: counts.append(len(rows_of(tmp_path / "out")))
    camera.append(Camera(5, on_frame=look))
    predict(middle_session(), 7, tmp_path / "out")
    assert counts == [1, 2, 3, 4]


def test_a_film_a_minute(camera, tmp_path, monkeypatch):
    "Each film is whole before the next begins; another size of frame begins one too."
    monkeypatch.setattr(module, "_FILM_SECONDS", 1)
    source = Camera(12, fps=5)
    def change(k):
        if k == 10: source.size = (32, 24)
        if k == 6: assert visible(tmp_path / "out")[0] == "camera7-0001.mp4"
    source.on_frame = change
    camera.append(source)
    done = predict(middle_session(), 7, tmp_path / "out")
    films = [name for name in visible(tmp_path / "out") if name.endswith(".mp4")]
    assert done.is_complete and [count_frames(tmp_path / "out" / name) for name in films] == [5, 5, 2]


def test_memory_does_not_grow(camera, tmp_path):
    "1500 frames, in memory no more than 500."
    peaks = []
    def look(k):
        if k in (500, 1499): peaks.append(tracemalloc.get_traced_memory()[1])
    camera.append(Camera(1500, size=(8, 8), on_frame=look))
    session = middle_session()
    tracemalloc.start()
    try: predict(session, 7, tmp_path / "out")
    finally: tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] + 100_000
    assert len(rows_of(tmp_path / "out")) == 1500


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_it_whole(camera, tmp_path, name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    signal.signal(number, signal.default_int_handler)  # however the tests were started
    try:
        camera.append(Camera(fps=10, on_frame=lambda k: os.kill(os.getpid(), number) if k == 4 else None))
        done = predict(middle_session(), 7, tmp_path / "out")
        assert signal.getsignal(number) is signal.default_int_handler
    finally: signal.signal(number, before)
    assert done.stopped == name and not done.is_complete and 4 <= done.frames <= 6 and name in str(done)
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(found["frames"]) == done.frames and found["complete"] is False
    assert count_frames(tmp_path / "out" / "camera7-0001.mp4") == done.frames


def test_the_second_signal_acts_as_before():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            while not stop.reason: pass
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10)
    finally: signal.signal(signal.SIGINT, before)


def test_short_work_ends_with_an_exception():
    "The second signal ends the process; handlers of others, and signals that are ignored, stay."
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_raises():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            with pytest.raises(StoppedBySignal, match="stopped by SIGTERM") as e: os.kill(os.getpid(), signal.SIGTERM)
            assert e.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with StopSignals() as stop, stop_raises(): os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGHUP), before): signal.signal(number, handler)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop: os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.reason
    finally: signal.signal(signal.SIGHUP, before)


def test_a_camera_in_the_background_says_how_to_end_it(camera, tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        camera.append(Camera(2))
        with pytest.warns(UserWarning, match="SIGINT ignored; to end it: kill {}".format(os.getpid())):
            predict(middle_session(), 7, tmp_path / "out")
    finally: signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_film_is_interrupted(tmp_path, number):
    "A process of its own, as a service manager stops it."
    put_film(tmp_path / "clip.mp4", 400, (16, 16))
    code = """
import sys, time
from predict_sources import middle_session
from jetson_det.runtime.predict import predict
def slow(done, total):
    if done == 3: print("begun", flush=True)
    time.sleep(.01)
done = predict(middle_session(), "clip.mp4", "out", progress=slow)
print(done.stopped, done.frames)
sys.exit(not done.is_complete)
"""
    paths = [str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
    child = subprocess.Popen([sys.executable, "-c", code], cwd=str(tmp_path), env=env, stdout=subprocess.PIPE,
                             universal_newlines=True, preexec_fn=hear_ctrl_c)
    assert child.stdout.readline() == "begun\n"
    child.send_signal(number)
    stopped, frames = child.communicate(timeout=60)[0].split()
    assert child.returncode == 1 and stopped == signal.Signals(number).name and 3 <= int(frames) < 400
    assert count_frames(tmp_path / "out" / "clip.mp4") == int(frames)
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["frames"]) == int(frames)
    assert visible(tmp_path / "out") == ["clip.mp4", "predictions.json"]


def test_a_killed_run_leaves_its_lines(camera, tmp_path):
    "After SIGKILL the lines are there, and the next run takes everything away."
    class Killed(BaseException): pass
    def kill(k):
        if k == 3: raise Killed()
    camera.append(Camera(fps=10, on_frame=kill))
    with pytest.raises(Killed): predict(middle_session(), 7, tmp_path / "out")
    assert visible(tmp_path / "out") == ["predictions.jsonl"] and len(rows_of(tmp_path / "out")) == 3
    camera[0] = Camera(2)
    predict(middle_session(), 7, tmp_path / "out")
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == [
        ".jetson-det-output", "camera7-0001.mp4", "predictions.json", "predictions.jsonl"]


def test_an_error_in_the_middle_keeps_what_was_done(camera, tmp_path):
    def fail(k):
        if k == 3: raise RuntimeError("the network is gone")
    camera.append(Camera(fps=10, on_frame=fail))
    with pytest.raises(RuntimeError, match="network"): predict(middle_session(), 7, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(found["frames"]) == 3 and found["complete"] is False
    assert count_frames(tmp_path / "out" / "camera7-0001.mp4") == 3 and camera[0].is_closed


@pytest.fixture
def small_files():
    "After it is called no file may grow over 64 KiB, as on a disk that fills up."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_cut_film_gets_no_name(tmp_path, small_files):
    put_film(tmp_path / "clip.mp4", 20, (96, 128), noise=True)
    small_files()
    with pytest.warns(UserWarning, match="clip.mp4: not written.*is the disk full"):
        done = predict(middle_session(), tmp_path / "clip.mp4", tmp_path / "out")
    assert done.failed == ["clip.mp4"] and not done.is_complete and "not written: clip.mp4" in str(done)
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == [".jetson-det-output", "predictions.json"]
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["frames"]) == 20


def test_an_image_that_does_not_fit(tmp_path, small_files):
    rng = np.random.RandomState(0)
    put_image(tmp_path / "src" / "a.png")
    noise = rng.randint(0, 256, (300, 400, 3)).astype(np.uint8)
    (tmp_path / "src" / "b.jpg").write_bytes(cv2.imencode(".jpg", noise)[1].tobytes())
    put_image(tmp_path / "src" / "c.png")
    small_files()
    with pytest.warns(UserWarning, match="b.jpg: not written: File too large"):
        done = predict(middle_session(), tmp_path / "src", tmp_path / "out")
    assert done.frames == 3 and done.failed == ["b.jpg"]
    assert visible(tmp_path / "out") == ["a.jpg", "c.jpg", "predictions.json"]


def test_boxes_that_do_not_fit_end_the_run(camera, tmp_path, small_files):
    "One line, whole lines on the disk, no half of a JSON file."
    camera.append(Camera(2000, size=(8, 8)))
    small_files()
    with pytest.raises(InputError, match="out: predictions.jsonl cannot be written there: File too large"):
        predict(middle_session(), 7, tmp_path / "out")
    assert len(rows_of(tmp_path / "out")) > 300 and not (tmp_path / "out" / ".part.mp4").exists()


def test_a_full_disk(tmp_path):
    "A disk of 200 KiB, a film that does not fit: one line, and no film under its name."
    if not sys.platform.startswith("linux") or os.geteuid() != 0: pytest.skip("only root mounts a small disk")
    put_film(tmp_path / "clip.mp4", 60, (96, 128), noise=True)
    (tmp_path / "disk").mkdir()
    code = """
import os, sys
from predict_sources import middle_session
from jetson_det.runtime.predict import predict
try: print(predict(middle_session(), "clip.mp4", "disk/out").failed)
except Exception as e: print(type(e).__name__, e)
print(sorted(os.listdir("disk/out")))
"""
    mount = 'mount -t tmpfs -o size=200k t disk && "$1" -c "$2"'
    words = ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, code]
    paths = [str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
    try: done = subprocess.run(words, cwd=str(tmp_path), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               universal_newlines=True)
    except OSError: pytest.skip("no unshare here")
    lines = done.stdout.split("\n")
    if "denied" in done.stderr: pytest.skip("mounting is not allowed here")
    assert lines[0] == "['clip.mp4']", (done.stdout, done.stderr)
    assert lines[1] == "['.jetson-det-output', 'predictions.json']"


@pytest.fixture
def stream():
    "Serves MJPEG: (address, settings). `settings.end` frames, then it ends, or stands still with `settings.stall`."
    class Handler(http.server.BaseHTTPRequestHandler):
        end = None
        stall = False
        def log_message(self, *_): pass
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            k = 0
            try:
                while Handler.end is None or k < Handler.end:
                    jpeg = cv2.imencode(".jpg", np.full((48, 64, 3), k % 200, np.uint8))[1].tobytes()
                    self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: ")
                    self.wfile.write(str(len(jpeg)).encode() + b"\r\n\r\n" + jpeg + b"\r\n")
                    k += 1
                while Handler.stall: time.sleep(.01)
            except OSError: pass
    class Server(socketserver.ThreadingMixIn, http.server.HTTPServer): daemon_threads = True
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield "http://127.0.0.1:{}/gate.mjpg?key=secret".format(server.server_port), Handler
    Handler.stall = False
    Handler.end = 0
    server.shutdown()
    server.server_close()


def test_a_stream_without_an_end(stream, tmp_path):
    done = predict(middle_session(), stream[0], tmp_path / "out", most=20)
    assert done.frames == 20 and done.is_complete and len(rows_of(tmp_path / "out")) == 20
    assert visible(tmp_path / "out") == ["gate-0001.mp4", "predictions.json", "predictions.jsonl"]
    assert count_frames(tmp_path / "out" / "gate-0001.mp4") == 20


@pytest.mark.parametrize("stall", [False, True])
def test_a_stream_that_breaks_off(stream, tmp_path, monkeypatch, stall):
    "It is closed, or nothing comes any more."
    monkeypatch.setattr(sources, "_STREAM_SECONDS", .5)
    stream[1].end = 12
    stream[1].stall = stall
    done = predict(middle_session(), stream[0], tmp_path / "out")
    assert 10 <= done.frames <= 12 and done.is_complete
    assert count_frames(tmp_path / "out" / "gate-0001.mp4") == done.frames == len(rows_of(tmp_path / "out"))


def test_seconds_of_a_film(tmp_path):
    put_film(tmp_path / "clip.mp4", 30, fps=10)
    done = predict(middle_session(), tmp_path / "clip.mp4", tmp_path / "out", seconds=1.5)
    assert done.frames == 15 and done.is_complete and count_frames(tmp_path / "out" / "clip.mp4") == 15


def test_progress(tmp_path, camera):
    calls = []
    camera.append(Camera(3))
    predict(middle_session(), 7, tmp_path / "out", progress=lambda *a: calls.append(a))
    camera[0].count = 3
    predict(middle_session(), 7, tmp_path / "out", most=2, progress=lambda *a: calls.append(a))
    assert calls == [(1, None), (2, None), (3, None), (1, 2), (2, 2)]


def test_show(camera, tmp_path, monkeypatch):
    camera.append(Camera())
    keys = iter([-1, -1, ord("q")])
    shown = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", lambda *a: None)
    monkeypatch.setattr(cv2, "destroyAllWindows", lambda: shown.append("closed"))
    monkeypatch.setattr(cv2, "imshow", lambda title, image: shown.append(image.shape))
    monkeypatch.setattr(cv2, "waitKey", lambda wait: next(keys))
    done = predict(middle_session(), 7, tmp_path / "out", show=True)
    assert done.frames == 3 and done.is_complete and shown == [(24, 32, 3)] * 3 + ["closed"]


def test_show_without_a_screen(tmp_path, monkeypatch):
    put_image(tmp_path / "a.png")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"): monkeypatch.delenv(name, raising=False)
    if sys.platform.startswith("linux"):
        with pytest.raises(InputError, match="no screen here"):
            predict(middle_session(), tmp_path / "a.png", tmp_path / "out", show=True)
    def no_windows(*_): raise cv2.error("The function is not implemented")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", no_windows)
    with pytest.raises(InputError, match="no windows"):
        predict(middle_session(), tmp_path / "a.png", tmp_path / "out", show=True)
    assert not (tmp_path / "out").exists()


def test_names_of_streams():
    assert _stem("rtsp://10.0.0.7:554/gate?token=secret") == "gate" and _stem("http://h/a/../..") == "stream"
    assert len(_stem("rtsp://h/" + "x" * 500)) == 60
