"""Sources in child processes: nothing lost, nothing left behind, and back after whatever happened to the camera."""
import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from rtsp_helpers import RtspServer, needs_rtsp_server

from jetson_det.runtime.boards import ThisBoard, board
from jetson_det.runtime.files import InputError
from jetson_det.runtime.stream import capture as module
from jetson_det.runtime.stream import gstreamer
from jetson_det.runtime.stream.capture import Capture, _Backoff, _Slots, choose_pipeline
from jetson_det.runtime.stream.sources import open_source

REPOSITORY = Path(__file__).resolve().parents[3]
QUICK = dict(stall_seconds=.5, open_seconds=8, retry_seconds=(.02, .1), close_seconds=.5)


def put_film(path, frames=60, size=(48, 64)):
    "A film whose frames all differ."
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (size[1], size[0]))
    rng = np.random.RandomState(0)
    for i in range(frames):
        image = rng.randint(0, 255, size + (3,)).astype(np.uint8)
        image[:, :i % size[1]] = 3 * i % 256
        writer.write(image)
    writer.release()
    return path


def gone(pid, seconds=5):
    "Has it ended?"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try: state = Path("/proc/{}/stat".format(pid)).read_text().rsplit(")", 1)[1].split()[0]
        except OSError: return True
        if state == "Z": return True
        time.sleep(.01)
    return False


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end: time.sleep(.005)
    assert condition()


@pytest.fixture
def film(tmp_path): return put_film(tmp_path / "film.avi")


@pytest.fixture
def rtsp():
    needs_rtsp_server()
    with RtspServer() as server: yield server


@pytest.fixture
def short_probe(monkeypatch):
    "FFmpeg looks at a stream for .1 s, not for more than 1 s."
    monkeypatch.setenv("OPENCV_FFMPEG_CAPTURE_OPTIONS", "rtsp_transport;tcp|analyzeduration;100000|fflags;nobuffer")


# files


def test_a_film_is_whole_and_the_same_as_cv2(film):
    bare = cv2.VideoCapture(str(film))
    source = Capture(film)
    assert (source.live, source.name, source.fps, source.count) == (False, "film.avi", 10, 60)
    count = 0
    for frame in source:
        ok, image = bare.read()
        assert ok and frame.index == count and (frame.image == image).all() and frame.image.flags.owndata
        assert abs(frame.time - time.time()) < 60
        count += 1
    assert not bare.read()[0] and count == source.frames == 60
    assert (source.dropped, source.state, source.pid) == (0, "ended", None)


def test_the_child_waits_for_a_slow_program(film):
    "Longer than the watchdog's limit: it is not the child that hangs."
    source = Capture(film, stall_seconds=.2, slots=3)
    indices = []
    for frame in source:
        if frame.index == 4: time.sleep(.5)
        indices.append(frame.index)
    assert indices == list(range(60))


def test_images_of_any_size_share_the_slots(tmp_path):
    rng = np.random.RandomState(1)
    for i, size in enumerate([(20, 30), (400, 300), (10, 10), (401, 299), (64, 64)] * 2):
        cv2.imwrite(str(tmp_path / "{}.png".format(i)), rng.randint(0, 255, size + (3,)).astype(np.uint8))
    expected = [frame.image for frame in open_source(tmp_path)]
    got = [frame.image for frame in Capture(tmp_path, slots=3)]
    assert len(got) == 10 and all(np.array_equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("content", [None, b"", b"a text\n", b"PK\x03\x04\x14\0", b"\0\0\0\x20ftypisom" + bytes(1000)])
def test_errors_are_those_of_open_source(tmp_path, content):
    path = tmp_path / "x.mp4"
    if content is not None: path.write_bytes(content)
    with pytest.raises(InputError) as expected: list(open_source(path))
    with pytest.raises(InputError) as got: list(Capture(path))
    assert str(got.value) == str(expected.value)


def test_the_warning_of_a_truncated_film_arrives(film):
    film.write_bytes(film.read_bytes()[:film.stat().st_size // 2])
    lines = []
    for opener in (open_source, Capture):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lines.append([len(list(opener(film)))] + [str(w.message) for w in caught if "truncated" in str(w.message)])
    assert lines[0] == lines[1] and len(lines[0]) == 2


def test_a_killed_child_is_an_error_of_a_file(film):
    source = Capture(film)
    frames = iter(source)
    next(frames)
    os.kill(source.pid, signal.SIGKILL)
    with pytest.raises(InputError, match="film.avi: its process was ended by SIGKILL"): list(frames)


def test_a_file_that_hangs_is_an_error(film):
    source = Capture(film, stall_seconds=.2)
    frames = iter(source)
    next(frames)
    os.kill(source.pid, signal.SIGSTOP)
    with pytest.raises(InputError, match="film.avi: no frame for 0.2 s"): list(frames)


# what is left behind


def shared_memory():
    "Files in memory that this process has mapped, and whether they have a name."
    lines = Path("/proc/self/maps").read_text().splitlines()
    return ["(deleted)" in line for line in lines if "/dev/shm/" in line]


def names_in_memory(): return [name for name in os.listdir("/dev/shm") if name.startswith("jetson-det-")]


def test_nothing_is_left_open(film):
    def once():
        source = Capture(film)
        pid = source.pid
        frames = iter(source)
        next(frames)
        assert any(shared_memory()) and all(shared_memory()) and not names_in_memory()
        source.close()
        return pid
    def counts():
        gc.collect() # of the tests before
        return len(os.listdir("/proc/self/fd")), threading.active_count(), len(shared_memory())
    once()
    before = counts()
    pids = [once() for _ in range(2)]
    assert counts() == before and all(map(gone, pids))


def test_closing_a_hanging_child_kills_it(film):
    source = Capture(film, close_seconds=.2)
    pid = source.pid
    os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    source.close()
    assert .15 < time.monotonic() - start < 3 and gone(pid, .2)


PARENT = """
import os, signal, sys, time
from jetson_det.runtime.stream.capture import Capture
source = Capture({film!r})
for frame in source: break
{fork}
source = Capture({film!r})
print(source.pid, flush=True)
time.sleep(.05)
os.kill(os.getpid(), signal.SIGKILL)
"""
FORK = """
source = Capture({film!r})
if os.fork() == 0:
    os.close(1)
    time.sleep(4)
    os._exit(0)
print(source.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("fork", ["", FORK], ids=["alone", "with-a-process-that-inherited-its-pipes"])
def test_a_killed_parent_leaves_nothing(tmp_path, film, fork):
    "The program has no `if __name__ == '__main__'`."
    program = tmp_path / "program.py"
    program.write_text(PARENT.format(film=str(film), fork=fork.format(film=str(film))))
    process = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
                               env=dict(os.environ, PYTHONPATH=str(REPOSITORY)))
    pid = int(process.stdout.readline())
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    assert gone(pid) and not names_in_memory()


# live


def test_every_frame_is_given_or_dropped(film):
    "A film read as a camera is much faster than the program."
    lines = []
    with Capture(film, live=True, report=lines.append, **QUICK) as source:
        frames = iter(source)
        for _ in range(2): next(frames)
        wait_for(lambda: source.state == "lost")
        assert source.frames + source.dropped + len(source._ready) == source._next_index
        assert source._next_index % 60 == 0
    assert "film.avi: lost (the stream ended)" in lines[0]


def test_a_camera_that_is_not_there(tmp_path):
    lines = []
    url = "rtsp://admin:secret@127.0.0.1:9/gate"
    start = time.monotonic()
    source = Capture(url, report=lines.append, give_up_seconds=.3, retry_seconds=(.01, .02))
    assert (source.live, source.name, source.state, source.age) == (True, "rtsp://127.0.0.1:9/gate", "opening", None)
    wait_for(lambda: source.pid)
    command = Path("/proc/{}/cmdline".format(source.pid)).read_text()
    with pytest.raises(InputError, match="rtsp://127.0.0.1:9/gate: no frame for .* s: the camera or stream cannot be"):
        list(source)
    assert time.monotonic() - start < 5
    assert len(lines) == 1 and "not there yet (the camera or stream cannot be opened" in lines[0]
    assert "secret" not in lines[0] + command


def test_closing_does_not_wait_for_the_next_attempt():
    source = Capture("rtsp://127.0.0.1:9/gate", report=lambda line: None, retry_seconds=(60, 60))
    wait_for(lambda: source.state == "lost")
    start = time.monotonic()
    source.close()
    assert time.monotonic() - start < .5


def test_a_flag_ends_the_wait_for_a_lost_camera():
    asked = []
    source = Capture("rtsp://127.0.0.1:9/gate", report=lambda line: None, retry_seconds=(60, 60),
                     should_stop=lambda: asked.append(source.state) or source.state == "lost")
    assert list(source) == [] and asked[-1] == "lost" and len(asked) < 50
    assert source.state == "ended" and source.pid is None


def test_ctrl_c_is_not_for_the_child(film):
    with Capture(film) as source: assert os.getsid(source.pid) == source.pid


# a real server


def cut_and_restore(server, times, size=None):
    """A camera that is cut as often, in (lines, images, source). `size`: of the image after each cut."""
    lines = []
    with Capture(server.url, report=lines.append, **QUICK) as source:
        images = []
        indices = []
        cuts = 0
        since_cut = 0
        for frame in source:
            indices.append(frame.index)
            since_cut += 1
            if since_cut < 3 or source.reconnects < cuts: continue
            images.append(frame.image)
            if cuts == times: break
            cuts += 1
            since_cut = 0
            server.cut()
            wait_for(lambda: source.state == "lost") # otherwise the new server may come before the loss
            server.start(size or (48, 64))
    assert indices == sorted(set(indices))
    return lines, images, source


def test_a_stream_is_cut_and_comes_back_with_another_size(rtsp, short_probe):
    lines, images, source = cut_and_restore(rtsp, 2, (64, 96))
    assert [image.shape for image in images] == [(48, 64, 3), (64, 96, 3), (64, 96, 3)]
    assert all(image.max() > 200 for image in images) # the ball of the test image
    assert source.reconnects == 2
    assert [line.split(": ")[1].split(" ")[0] for line in lines] == ["lost", "back"] * 2
    assert all(line.startswith("rtsp://127.0.0.1:") and "secret" not in line for line in lines)


def test_a_server_that_stands_still(rtsp, short_probe):
    lines = []
    with Capture(rtsp.url, report=lines.append, **QUICK) as source:
        frames = iter(source)
        before = [next(frames) for _ in range(3)][-1]
        pid = source.pid
        rtsp.stop()
        wait_for(lambda: source.age > .4)
        wait_for(lambda: source.state == "lost")
        assert "no frame for 0.5 s" in lines[0] and gone(pid)
        rtsp.go_on()
        while source.reconnects == 0: frame = next(frames)
        assert frame.index > before.index and source.age < .5
    assert len(lines) == 2


def test_the_newest_frame_is_what_the_program_gets(rtsp, short_probe):
    with Capture(rtsp.url, report=lambda line: None) as source:
        frames = iter(source)
        first = next(frames)
        time.sleep(.6) # 15 frames
        second = next(frames)
        assert second.index >= first.index + 5 and time.time() - second.time < .4
        assert source.frames == 2 and source.dropped >= second.index - first.index - 1


def test_a_child_that_hangs_or_crashes_is_replaced(rtsp, short_probe):
    lines = []
    with Capture(rtsp.url, report=lines.append, **QUICK) as source:
        frames = iter(source)
        next(frames)
        pid = source.pid
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: source.age > .4)
        assert source.pid == pid and source.state == "running"
        while source.reconnects == 0: next(frames)
        assert gone(pid) and source.pid != pid
        os.kill(source.pid, signal.SIGSEGV)
        while source.reconnects == 1: next(frames)
    assert "lost (no frame for 0.5 s); trying again" in lines[0] and "back after" in lines[1]
    assert "lost (its process was ended by SIGSEGV); trying again" in lines[2] and len(lines) == 4


@pytest.mark.slow
def test_a_stream_cut_and_restored_twenty_times(rtsp, short_probe):
    before = len(os.listdir("/proc/self/fd")), len(shared_memory())
    lines, images, source = cut_and_restore(rtsp, 20)
    assert source.reconnects == 20 and len(images) == 21 and len(lines) == 40
    assert (len(os.listdir("/proc/self/fd")), len(shared_memory())) == before


# parts


def test_backoff_doubles_to_its_ceiling_and_starts_again_after_a_steady_connection():
    backoff = _Backoff(.5, 7)
    for ceiling in (.5, 1, 2, 4, 7, 7, 7): assert ceiling / 2 <= backoff.after(0) <= ceiling
    assert backoff.after(3) >= 3.5
    assert .25 <= backoff.after(8) <= .5
    for _ in range(2000): assert backoff.after(0) <= 7 # 2 ** 2000 is no float
    assert len({backoff.after(0) for _ in range(20)}) > 10


def test_no_memory_is_one_line(tmp_path, monkeypatch):
    with open(str(tmp_path / "memory"), "w+b") as file:
        os.ftruncate(file.fileno(), 2 * module._SLOT_BYTES)
        slots = _Slots(file.fileno(), 2)
        assert slots.reserve(1, (4, 5, 3)).shape == (4, 5, 3)
        with pytest.raises(InputError, match="too large"): slots.reserve(0, (10000, 10000, 3))
        def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(os, "posix_fallocate", full)
        slots.reserve(1, (5, 4, 3)) # reserved already
        with pytest.raises(InputError, match="no shared memory for an image of 6.2 MB: No space left.*--shm-size"):
            slots.reserve(0, (1080, 1920, 3))


def test_slots_are_checked(film):
    for slots in (2, 255):
        with pytest.raises(InputError, match="slots {}: 3 to 200".format(slots)): Capture(film, slots=slots)


@pytest.mark.parametrize("l4t, decoder",
                         [("R32.7.1", "nvv4l2decoder"), ("R36.3.0", "nvv4l2decoder"), ("R38.2", "avdec_h264")])
def test_on_a_jetson_streams_go_through_its_decoder(monkeypatch, film, l4t, decoder):
    "The table of boards knows no R36.3. Under R38 GStreamer is asked, and here it knows no element of NVIDIA."
    here = ThisBoard(board("Orin Nano"), "a model", l4t, None)
    monkeypatch.setattr(module, "this_board", lambda: here)
    monkeypatch.setattr(module, "has_gstreamer", lambda: True)
    monkeypatch.setattr(gstreamer, "has_gstreamer", lambda: True)
    pipeline, line = choose_pipeline("rtsp://10.0.0.7/gate", latency_ms=50)
    assert decoder in pipeline and "latency=50" in pipeline and line == ""
    assert choose_pipeline(film) == choose_pipeline("http://10.0.0.7/a") == ("", "")
    assert "nvarguscamerasrc" in choose_pipeline("csi://0")[0]
    monkeypatch.setattr(module, "has_gstreamer", lambda: False)
    monkeypatch.setattr(gstreamer, "has_gstreamer", lambda: False)
    pipeline, line = choose_pipeline("rtsp://u:secret@10.0.0.7/gate")
    assert pipeline == "" and line.startswith("rtsp://10.0.0.7/gate: this OpenCV has no GStreamer")
    with pytest.raises(InputError, match="csi://0: needs an OpenCV with GStreamer"): choose_pipeline("csi://0")
    with pytest.raises(InputError, match="camera3: needs an OpenCV with GStreamer"): Capture(3, pipeline="x ! appsink")
