"The live view: real sockets that never read, a real browser."
import base64
import json
import shutil
import socket
import time
from http.client import HTTPConnection

import cv2
import numpy as np
import pytest

from jetson_det.runtime.files import InputError
from jetson_det.runtime.geometry import as_detections
from jetson_det.runtime.ops.privacy import PrivacyRules
from jetson_det.runtime.stream import live_view
from jetson_det.runtime.stream.live_view import LiveView, is_loopback
from jetson_det.runtime.stream.result import FrameResult

LONG = 20 # seconds, for what takes a moment on a quiet machine
EVIL = "<img src=x onerror=alert(1)>\"'&"


def frame(index=0, size=(120, 160), source="yard", seed=None):
    image = np.full(size + (3,), 90, np.uint8)
    if seed is not None: image = np.random.RandomState(seed).randint(0, 256, size + (3,)).astype(np.uint8)
    return FrameResult(source, index, 1.7e9, image, as_detections([[4, 4, 30, 40]], [.9], [0]), ("car",))


def get(view, path, method="GET", **headers):
    connection = HTTPConnection("127.0.0.1", view.port, timeout=LONG)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer, data


def until(true):
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end, "never true"
        time.sleep(.01)


@pytest.fixture
def view():
    with LiveView(port=0, fps=1000, title=EVIL) as v: yield v


def test_before_and_after_the_first_frame(view):
    assert get(view, "/frame.jpg")[0].status == 503 and json.loads(get(view, "/state.json")[1].decode())["age"] is None
    for n in range(5): view.write(frame(n, (1200, 1600)))
    assert view.encoded == 0 # nobody watched
    answer, data = get(view, "/frame.jpg")
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert answer.getheader("Content-Type") == "image/jpeg" and image.shape == (720, 960, 3)
    assert get(view, "/frame.jpg")[1] == data and view.encoded == 1 # once a frame
    state = json.loads(get(view, "/state.json")[1].decode())
    assert (state["source"], state["frame"], state["objects"]) == ("yard", 4, 1) and 0 <= state["age"] < LONG
    assert get(view, "/nothing")[0].status == 404
    answer, data = get(view, "/", "HEAD")
    assert answer.status == 200 and data == b"" and int(answer.getheader("Content-Length")) > 100


def test_frames_a_second_and_age(view, monkeypatch):
    now = [100.]
    monkeypatch.setattr(live_view.time, "monotonic", lambda: now[0])
    for n in range(40):
        now[0] += .04
        view.write(frame(n))
    assert view.state()["fps"] == 25 and view.state()["age"] == 0
    now[0] += 7
    assert view.state()["fps"] == 0 and view.state()["age"] == 7


def parts(stream, count):
    "JPEGs from a stream."
    found = []
    while len(found) < count:
        line = stream.readline()
        assert line, "the stream ended"
        if line.lower().startswith(b"content-length"):
            stream.readline()
            found.append(stream.read(int(line.split(b":")[1])))
    return found


def open_stream(view, buffer=None):
    s = socket.socket()
    if buffer: s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    s.settimeout(LONG)
    s.connect(("127.0.0.1", view.port))
    s.sendall("GET /stream.mjpg HTTP/1.1\r\nHost: 127.0.0.1:{}\r\n\r\n".format(view.port).encode())
    return s


def test_stream_is_encoded_once_for_all(view):
    sockets = [open_stream(view) for _ in range(3)]
    until(lambda: view.watchers == 3)
    streams = [s.makefile("rb") for s in sockets]
    for n in range(4):
        view.write(frame(n, seed=n))
        images = [parts(stream, 1)[0] for stream in streams]
        assert len(set(images)) == 1 and images[0][:2] == b"\xff\xd8" and images[0][-2:] == b"\xff\xd9"
    assert view.encoded == 4
    for f in streams + sockets: f.close()
    until(lambda: view.write(frame()) or view.watchers == 0)


def test_clients_that_never_read_do_not_slow_the_pipeline():
    with LiveView(port=0, fps=1000, client_seconds=.3) as view:
        stuck = [open_stream(view, 4096) for _ in range(8)]
        good = open_stream(view)
        until(lambda: view.watchers == 9)
        stream = good.makefile("rb")
        slowest, frames = 0, [frame(n, (480, 640), seed=n) for n in range(2)]
        for n in range(30):
            began = time.perf_counter()
            view.write(frames[n % 2])
            slowest = max(slowest, time.perf_counter() - began)
            parts(stream, 1) # the reader gets each frame in the meantime
        until(lambda: view.watchers == 1) # the others are disconnected
        assert slowest < .1 and view.encoded == 30
        for f in stuck + [stream, good]: f.close()


def test_more_clients_than_the_limit_are_sent_away(view):
    streams = [open_stream(view) for _ in range(live_view._MOST_CLIENTS)]
    until(lambda: view.watchers == live_view._MOST_CLIENTS)
    with socket.create_connection(("127.0.0.1", view.port), LONG) as s:
        assert s.recv(100).startswith(b"HTTP/1.0 503")
    for s in streams: s.close()
    until(lambda: view.write(frame()) or view.watchers == 0)
    until(lambda: view._server.clients == 0)
    assert get(view, "/")[0].status == 200


def test_passwords():
    with LiveView(port=0, password="s3cret:\u00e9") as view:
        view.write(frame())
        for path in ("/", "/frame.jpg", "/state.json", "/stream.mjpg", "/view.js"):
            answer, data = get(view, path)
            assert answer.status == 401 and answer.getheader("WWW-Authenticate").startswith("Basic")
        for pair, status in (("viewer:s3cret:\u00e9", 200), ("viewer:wrong", 401), ("x:s3cret:\u00e9", 401)):
            header = "Basic " + base64.b64encode(pair.encode("utf-8")).decode()
            assert get(view, "/frame.jpg", Authorization=header)[0].status == status
        assert "s3cret" not in str(view)
    with LiveView("0.0.0.0", port=0, password="x") as view: assert get(view, "/", Host="board")[0].status == 401
    with pytest.raises(InputError, match="password"): LiveView("0.0.0.0", port=0)
    with pytest.raises(InputError, match="can't listen"): LiveView("192.0.2.1", port=0, password="x")


def test_other_names_of_a_loopback_address_are_refused(view):
    assert get(view, "/state.json", Host="evil.example")[0].status == 403
    assert get(view, "/state.json", Host="localhost:8080")[0].status == 200
    hosts = ("localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]",
             "0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", "")
    assert [is_loopback(h) for h in hosts] == [True] * 5 + [False] * 5


def test_privacy_and_frames_that_fail(capfd):
    with LiveView(port=0, privacy=PrivacyRules(blur=("person",))) as view:
        view.write(frame())
        view.write(frame())
        for _ in range(2): assert get(view, "/frame.jpg")[0].status == 503 # not shown rather than shown unblurred
        assert view.failed == 1 and capfd.readouterr().err.count("can't be shown") == 1


def test_close_ends_streams_and_frees_the_port(view):
    s = open_stream(view)
    until(lambda: view.watchers == 1)
    view.close()
    until(lambda: view.watchers == 0)
    with LiveView(port=view.port) as again: assert again.port == view.port
    s.close()


@pytest.mark.parametrize("wrong", [dict(fps=0), dict(fps=float("nan")), dict(quality=0), dict(width=1),
                                   dict(port=70000)])
def test_settings(wrong):
    with pytest.raises(InputError): LiveView(**dict(dict(port=0), **wrong))


@pytest.mark.browser
@pytest.mark.slow
def test_in_a_browser(view, tmp_path):
    pytest.importorskip("selenium", reason="selenium is not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service
    programs = [shutil.which(p) for p in ("chromium", "chromedriver")]
    if None in programs: pytest.skip("no chromium or no chromedriver here")
    options = Options()
    options.binary_location = programs[0]
    for a in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
              "disable-component-update", "disable-sync", "disable-dev-shm-usage", "no-proxy-server",
              "user-data-dir={}".format(tmp_path)):
                  options.add_argument("--" + a)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(programs[1]))
    browser.set_page_load_timeout(LONG)
    try:
        view.write(frame(1, source=EVIL))
        browser.get(view.url)
        js = browser.execute_script
        until(lambda: js("return document.getElementById('image').naturalWidth") == 160) # one frame is enough
        until(lambda: "objects" in js("return document.getElementById('state').textContent"))
        assert js("return document.getElementById('state').textContent").startswith(EVIL + ": ")
        assert js("return document.querySelector('h1').textContent") == EVIL == browser.title
        assert js("return document.querySelectorAll('img').length") == 1
        assert view.watchers == 1
        assert [e for e in browser.get_log("browser") if "favicon" not in e["message"]] == []
        view.close()
        until(lambda: js("return document.getElementById('state').className") == "old")
        assert js("return document.getElementById('state').textContent") == "no connection"
        with LiveView(port=view.port) as again: # a pipeline that was started again: the page finds it by itself
            until(lambda: again.write(frame(4)) or again.watchers == 1)
    finally: browser.quit()
