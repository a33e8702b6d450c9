"Files and films that a pipeline leaves, and the list of outputs in its YAML."
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from jetson_det.runtime.files import InputError
from jetson_det.runtime.geometry import as_detections
from jetson_det.runtime.ops.privacy import PrivacyRules
from jetson_det.runtime.ops.rotation import rotated_files
from jetson_det.runtime.stream import film
from jetson_det.runtime.stream.film import DrawnVideo, draw_result
from jetson_det.runtime.stream.regions import RegionEvent, read_regions
from jetson_det.runtime.stream.result import FrameResult, result_row
from jetson_det.runtime.stream.sinks import OUTPUT_KINDS, JsonLines, open_sink, read_outputs

REPO = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))


def frame(index=0, size=(48, 64), texts=("AB 1", None), name="car"):
    boxes = as_detections([[4, 4, 30, 40], [35, 10, 60, 30]], [.9, .8], [0, 1])
    return FrameResult("yard", index, 1.7e9 + index / 10., np.full(size + (3,), 90, np.uint8), boxes,
                       (name, "person"), ids=np.array([3, 4]), missed=np.array([0, 2]), texts=texts)


# JSON lines

def test_rows_are_those_of_result_row(tmp_path):
    sink = JsonLines(tmp_path / "x.jsonl", max_bytes=1500, keep=50, privacy=PrivacyRules("drop"))
    for n in range(30): sink.write(frame(n, name="\u043a\udcff\n"))
    sink.close()
    rows = []
    for path in rotated_files(tmp_path / "x.jsonl") + [str(tmp_path / "x.jsonl")]:
        with open(path, "rb") as f: rows += [json.loads(line.decode("utf-8")) for line in f]
    assert rows == [result_row(frame(n, texts=None, name="\u043a\udcff\n")) for n in range(30)] and sink.failed == 0


def test_a_killed_process_leaves_whole_lines(tmp_path):
    code = ("import sys, os, signal, numpy as np\n"
            "sys.path.insert(0, sys.argv[2])\n"
            "from test_stream_sinks import frame, JsonLines\n"
            "sink = JsonLines(sys.argv[1])\n"
            "for n in range(50): sink.write(frame(n))\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n")
    path = tmp_path / "x.jsonl"
    here = os.path.dirname(os.path.abspath(__file__))
    assert subprocess.call([sys.executable, "-c", code, str(path), here], cwd=REPO) == -signal.SIGKILL
    with open(str(path), "ab") as f: f.write(b'{"source": "ya') # what a power failure leaves
    sink = JsonLines(path)
    sink.write(frame(50))
    sink.close()
    with open(str(path), "rb") as f: assert [json.loads(line.decode())["frame"] for line in f] == list(range(51))


def test_a_full_disk_is_counted_and_said_once(tmp_path, capfd):
    sink = JsonLines(tmp_path / "x.jsonl")
    real = sink.file.write
    def fail(line): raise OSError(28, "No space left on device", sink.file.path)
    for _ in range(2):
        sink.write(frame(0))
        sink.file.write = fail
        for n in range(5): sink.write(frame(n))
        sink.file.write = real
    sink.write(frame(9))
    sink.close()
    err = capfd.readouterr().err
    assert sink.failed == 10 and err.count("No space left") == 2 and err.count("can be written again") == 2
    assert len((tmp_path / "x.jsonl").read_bytes().splitlines()) == 3


def test_events_alone(tmp_path):
    sink = JsonLines(tmp_path / "x.jsonl", when="events")
    sink.write(frame(0))
    sink.write(frame(1)._replace(events=(RegionEvent("gate", "entered", 3, 0, 1.7e9, 0.),)))
    sink.close()
    assert [json.loads(line)["frame"] for line in (tmp_path / "x.jsonl").read_text().splitlines()] == [1]


# Drawn frames and films

def test_drawing_shows_what_is_known():
    gate = read_regions([{"name": "gate", "line": [[.1, .9], [.9, .9]]}])
    seen = frame(size=(240, 320))
    before = seen.image.copy()
    plain = draw_result(seen._replace(ids=None, missed=None, texts=None))
    images = [plain] + [draw_result(s, r) for s, r in (
        (seen._replace(ids=None, missed=None), ()), (seen._replace(missed=None, texts=None), ()),
        (seen._replace(ids=None, texts=None), ()), (seen._replace(ids=None, missed=None, texts=None), gate))]
    assert (seen.image == before).all()
    for i, image in enumerate(images):
        for other in images[:i]: assert (image != other).any()
    assert film._box_text(seen, 0) == "car #3 0.90 AB 1" and film._box_text(seen, 1) == "person #4 0.80"
    none = seen._replace(detections=as_detections([], [], []), ids=None, missed=None, texts=None)
    assert (draw_result(none) == before).all()


def frames_in(path):
    capture = cv2.VideoCapture(str(path))
    count = 0
    while capture.read()[0]: count += 1
    capture.release()
    return count


def test_films_hold_all_frames_and_the_newest_stay(tmp_path):
    (tmp_path / ".cam.part.mp4").write_bytes(b"of a killed run")
    for _ in range(2):
        sink = DrawnVideo(tmp_path, "cam", fps=10, seconds=1, keep=4, live=False)
        for n in range(25): sink.write(frame(n))
        sink.close()
        assert (sink.failed, sink.dropped) == (0, 0)
    assert [p.name for p in sink.films()] == ["cam-{:04d}.mp4".format(n) for n in (3, 4, 5, 6)]
    assert [frames_in(p) for p in sink.films()] == [5, 10, 10, 5]
    assert len(os.listdir(str(tmp_path))) == 4


def test_a_film_shows_blurred_people(tmp_path):
    image = np.random.RandomState(0).randint(0, 256, (96, 128, 3)).astype(np.uint8)
    seen = frame()._replace(image=image)
    for folder, rules in (("a", PrivacyRules()), ("b", PrivacyRules(blur=("person",)))):
        sink = DrawnVideo(tmp_path / folder, live=False, privacy=rules)
        sink.write(seen)
        sink.close()
    boxes = []
    for folder in "ab":
        capture = cv2.VideoCapture(str(tmp_path / folder / "film-0001.mp4"))
        boxes.append(capture.read()[1][16:28, 40:56].std())
        capture.release()
    assert boxes[1] < boxes[0] / 2


def test_a_live_film_leaves_frames_out_instead_of_waiting(tmp_path, monkeypatch, capfd):
    gate = threading.Event()
    real = film.draw_result
    def slow(*args):
        gate.wait(20)
        return real(*args)
    monkeypatch.setattr(film, "draw_result", slow)
    sink = DrawnVideo(tmp_path)
    began = time.monotonic()
    for n in range(50): sink.write(frame(n))
    assert time.monotonic() - began < 2
    gate.set()
    sink.close()
    assert sink.dropped >= 41 and frames_in(sink.films()[0]) == 50 - sink.dropped


def test_a_film_that_fails_is_said_once(tmp_path, capfd, monkeypatch):
    sink = DrawnVideo(tmp_path, live=False)
    for _ in range(3): sink.write(None)
    sink.write(frame())
    sink.close()
    assert sink.failed == 3 and capfd.readouterr().err.count("can't be written") == 1
    assert frames_in(sink.films()[0]) == 1
    for wrong in (dict(stem="../x"), dict(stem=""), dict(keep=0), dict(fps=0), dict(seconds=0)):
        with pytest.raises(InputError): DrawnVideo(tmp_path, **wrong)
    with pytest.raises(InputError): DrawnVideo(sink.films()[0])


def test_a_film_on_a_full_disk_is_counted_and_goes_on_with_its_number(tmp_path, capfd, monkeypatch):
    full = [True]
    usage_of = shutil.disk_usage
    def usage(path): return SimpleNamespace(free=0) if full[0] else usage_of(path)
    monkeypatch.setattr(film.shutil, "disk_usage", usage)
    sink = DrawnVideo(tmp_path, live=False)
    for _ in range(60): sink.write(frame())
    until = time.time() + 20
    while sink.failed < 50 and time.time() < until: time.sleep(.01)
    full[0] = False
    for _ in range(5): sink.write(frame())
    sink.close()
    err = capfd.readouterr().err
    assert sink.lost == 50 and err.count("No space left") == 1 and "written again; frames lost: 50" in err
    assert [path.name for path in sink.films()] == ["film-0001.mp4"] and frames_in(sink.films()[0]) == 15


# The list of outputs

@pytest.mark.parametrize("given, place", [
    ({}, "outputs must be a list"), (["jsonl"], r"outputs\[0\] must have one key"),
    ([{"jsonl": "a", "view": {}}], r"outputs\[0\] must have one key"), ([{"csv": "a"}], r"outputs\[0\]: unknown kind"),
    ([{"jsonl": {}}], r"outputs\[0\].jsonl.path is needed"),
    ([{"jsonl": ["a"]}], r"outputs\[0\].jsonl must be a mapping"),
    ([{"view": {"prot": 1}}], r"outputs\[0\].view.prot: unknown key"),
    ([{"view": {"port": "8080"}}], r"outputs\[0\].view.port must be a whole number"),
    ([{"view": {"port": True}}], r"outputs\[0\].view.port must be a whole number"),
    ([{"view": {"port": 99999}}], r"outputs\[0\].view: view: can't listen"),
    ([{"view": {"host": "0.0.0.0", "port": 0}}], r"outputs\[0\].view: view.host"),
    ([{"http": {"url": "http://x", "seconds": float("nan")}}], r"outputs\[0\].http.seconds must be a number"),
    ([{"http": {"url": "http://x", "queue": 0}}], r"outputs\[0\].http.queue must be over 0"),
    ([{"http": {"url": "http://x", "seconds": float("inf")}}], r"outputs\[0\].http.seconds must be a number"),
    ([{"http": {"url": "http://x", "password": 7}}], r"outputs\[0\].http.password must be text"),
    ([{"http": {"url": "http://x", "password": "a", "password_env": "B"}}], r"outputs\[0\].http: give one of"),
    ([{"http": {"url": "http://x", "password_env": "NOT_SET_HERE"}}], r"outputs\[0\].http.password_env: NOT_SET_HERE"),
    ([{"http": {"url": "http://x", "password_file": "none"}}], r"outputs\[0\].http.password_file: .*none: No such"),
    ([{"http": "x"}], r"outputs\[0\].http: http.url"), ([{"jsonl": {"path": "x", "when": "now"}}], "when is 'now'"),
    ([{"video": {"folder": "x", "regions": []}}], r"outputs\[0\].video.regions: unknown key")])
def test_settings_are_checked(tmp_path, given, place):
    with pytest.raises(InputError, match=place): read_outputs(given, folder=tmp_path)


def test_nothing_is_opened_where_an_entry_is_wrong(tmp_path):
    with pytest.raises(InputError): read_outputs([{"jsonl": "x.jsonl"}, {"view": {"prot": 1}}], folder=tmp_path)
    assert os.listdir(str(tmp_path)) == []
    with pytest.raises(InputError): # checked well, and refused when it is opened: the first is closed again
        read_outputs([{"jsonl": "x.jsonl"}, {"view": {"host": "0.0.0.0"}}], folder=tmp_path)
    JsonLines(tmp_path / "x.jsonl").close() # nobody holds it


def test_passwords_from_files_and_the_environment(tmp_path, monkeypatch):
    (tmp_path / "word").write_text("s3cret\n")
    monkeypatch.setenv("DETECTOR_PASSWORD", "other")
    sinks = read_outputs([{"http": {"url": "http://127.0.0.1:9", "password_file": "word"}},
                          {"http": {"url": "http://127.0.0.1:9", "password_env": "DETECTOR_PASSWORD", "user": "me"}}],
                         folder=tmp_path)
    assert [sink._password for sink in sinks] == ["s3cret", "other"]
    assert "s3cret" not in "".join(map(str, sinks)) and read_outputs(None) == []
    for sink in sinks: sink.close(0)


def test_every_kind_opens(tmp_path):
    pytest.importorskip("redis", reason="redis is not installed")
    pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
    given = [{"jsonl": "x.jsonl"}, {"video": "films"}, {"mqtt": "mqtt://127.0.0.1:9"}, {"redis": "redis://127.0.0.1:9"},
             {"http": "http://127.0.0.1:9"}, {"view": {"port": 0}}]
    assert [list(entry)[0] for entry in given] == list(OUTPUT_KINDS)
    sinks = read_outputs(given, folder=tmp_path, privacy=PrivacyRules("drop"), fps=25, live=False)
    assert sinks[1].film.fps == 25 and len(set(map(str, sinks))) == 6
    for sink in sinks:
        assert sink.privacy.texts == "drop"
        sink.close()
    with pytest.raises(InputError, match="output must have one key"): open_sink({})
