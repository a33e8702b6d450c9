"Rows on their way to real brokers that are killed, refuse and hang."
import base64
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import cv2
import numpy as np
import pytest

from jetson_det.runtime.files import InputError
from jetson_det.runtime.geometry import as_detections
from jetson_det.runtime.ops.privacy import PrivacyRules, hash_text
from jetson_det.runtime.stream.brokers import FrameFilter, HttpPost, Mqtt, Outbox, RedisStream
from jetson_det.runtime.stream.regions import RegionEvent
from jetson_det.runtime.stream.result import FrameResult

LONG = 20 # seconds, for what takes a moment on a quiet machine
SECRET = "tr\u00e9s s3cret"


def frame(index=0, events=(), source="yard", texts=None):
    boxes = as_detections([[1, 2, 30, 40]], [.9], [0])
    return FrameResult(source, index, 1.7e9 + index / 10., np.full((48, 64, 3), 90, np.uint8), boxes, ("car",),
                       texts=texts, events=events)


ENTERED = (RegionEvent("yard", "entered", 3, 0, 1.7e9, 0.),)


def until(true):
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end, "never true"
        time.sleep(.01)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def listens(port):
    try: socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError: return False
    return True


class Program:
    "A server as a process."
    def __init__(self, command, port):
        self.command = [str(c) for c in command]
        self.port = port
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda: listens(self.port))

    def kill(self):
        self.process.kill()
        self.process.wait()


# The queue

def test_the_oldest_are_dropped_and_counted(capfd):
    gate = threading.Event()
    got = []
    def deliver(batch):
        gate.wait(LONG)
        while batch: got.append(batch.popleft())
    outbox = Outbox("x", deliver, capacity=5, batch=1)
    outbox.put(0)
    until(lambda: not outbox._rows) # the thread has it
    for n in range(1, 20): outbox.put(n)
    assert outbox.waiting == 6 and outbox.dropped == 14
    gate.set()
    assert outbox.close(LONG) == 14
    assert got == [0, 15, 16, 17, 18, 19] and outbox.sent == 6
    assert capfd.readouterr().err.count("oldest rows are dropped") == 1
    outbox.put(99)
    assert outbox.waiting == 0


def test_a_full_queue_that_waits_loses_nothing():
    got = []
    def deliver(batch):
        time.sleep(.001)
        got.append(batch.popleft())
    outbox = Outbox("x", deliver, capacity=2, batch=1, wait=True)
    for n in range(40): outbox.put(n)
    assert outbox.close(LONG) == 0 and got == list(range(40))


def test_what_arrived_before_a_failure_is_not_sent_again(capfd):
    got = []
    def deliver(batch):
        while batch:
            if len(got) % 3 == 2:
                got.append(None)
                raise OSError("away, " + SECRET)
            got.append(batch.popleft())
    outbox = Outbox("x", deliver, first_wait=.001, hidden=[SECRET])
    for n in range(30): outbox.put(n)
    assert outbox.close(LONG) == 0 and [n for n in got if n is not None] == list(range(30))
    assert SECRET not in capfd.readouterr().err and outbox.sent == 30


def test_close_ends_in_time_however_deliver_hangs(capfd):
    gate = threading.Event()
    outbox = Outbox("x", lambda batch: gate.wait(LONG))
    for n in range(3): outbox.put(n)
    began = time.monotonic()
    assert outbox.close(.1) == 3 and time.monotonic() - began < 2
    assert "3 rows could not be sent" in capfd.readouterr().err
    gate.set()


def test_close_tries_once_more_during_a_long_wait():
    got, away = [], [True]
    def deliver(batch):
        if away[0]: raise OSError("away")
        while batch: got.append(batch.popleft())
    outbox = Outbox("x", deliver, first_wait=1000)
    outbox.put(1)
    until(lambda: outbox.failures)
    away[0] = False
    assert outbox.close(LONG) == 0 and got == [1]


# The filter

def test_filter():
    chosen = FrameFilter(every=1)
    assert [n for n in range(30) if chosen(frame(n, ENTERED if n == 5 else ()))] == [0, 5, 10, 20]
    assert chosen(frame(20, source="other")) and not chosen(frame(21))
    assert chosen(frame(0)) # the clock was set back by two seconds
    assert [n for n in range(9) if FrameFilter("events")(frame(n, ENTERED if n == 5 else ()))] == [5]
    for wrong in (dict(when="event"), dict(every=-1), dict(every=float("nan")), dict(every=float("inf"))):
        with pytest.raises(InputError): FrameFilter(**wrong)


# HTTP

class Web:
    "A web server that does what `steps` say, a step a request; the last one stays."
    def __init__(self, *steps, **more):
        self.steps = list(steps)
        self.rows = []
        self.headers = []
        self.paths = []
        self.hang = threading.Event()
        web = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_): pass
            def do_POST(self):
                step = web.steps.pop(0) if len(web.steps) > 1 else web.steps[0]
                rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])).decode("utf-8"))
                web.headers.append(dict(self.headers))
                web.paths.append(self.path)
                if callable(step): step = step(rows)
                if step == "hang": web.hang.wait(LONG)
                elif step == "drop": self.connection.shutdown(socket.SHUT_RDWR)
                else:
                    if step == 204: web.rows += rows
                    self.send_response(step)
                    if step == 302: self.send_header("Location", "/elsewhere")
                    self.end_headers()
        self.server = HTTPServer(("127.0.0.1", more.get("port", 0)), Handler)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, args=(.01,), daemon=True)
        self.thread.start()

    def close(self):
        self.hang.set()
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self): return self
    def __exit__(self, *_): self.close()


def test_post_through_failures(capfd):
    with Web(500, "drop", 302, 401, "hang", 204) as web:
        sink = HttpPost("http://127.0.0.1:{}/in?key=abc".format(web.port), first_wait=.001, seconds=.2, user="me",
                        password=SECRET)
        def release():
            until(lambda: len(web.paths) == 5)
            until(lambda: sink.outbox.failures >= 5)
            web.hang.set()
        threading.Thread(target=release, daemon=True).start()
        slowest = 0
        for n in range(60):
            began = time.perf_counter()
            sink.write(frame(n))
            slowest = max(slowest, time.perf_counter() - began)
        assert sink.close(LONG) == 0
        assert [row["frame"] for row in web.rows] == list(range(60)) and sink.outbox.failures == 5
    assert slowest < .15 # the other threads have their share of the time; alone it is under a millisecond
    pair = base64.b64encode(("me:" + SECRET).encode("utf-8")).decode()
    assert {h["Authorization"] for h in web.headers} == {"Basic " + pair} and set(web.paths) == {"/in?key=abc"}
    err = capfd.readouterr().err
    assert err.count("trying again") == 1 and err.count("is back") == 1
    assert SECRET not in err + str(sink) and "abc" not in err + str(sink)


def test_refused_rows_are_dropped_alone(capfd):
    with Web(lambda rows: 400 if any(row["frame"] == 3 for row in rows) else 204) as web:
        sink = HttpPost("http://user:pw@127.0.0.1:{}/".format(web.port), batch=7, first_wait=.001)
        for n in range(10): sink.write(frame(n))
        assert sink.close(LONG) == 0
        assert [row["frame"] for row in web.rows] == [0, 1, 2, 4, 5, 6, 7, 8, 9] and sink.refused == 1
        assert web.headers[0]["Authorization"] == "Basic " + base64.b64encode(b"user:pw").decode()
    assert "refused" in capfd.readouterr().err


def test_a_server_that_comes_later():
    port = free_port()
    sink = HttpPost("http://127.0.0.1:{}/".format(port), first_wait=.01, password="token")
    sink.write(frame(1))
    until(lambda: sink.outbox.failures > 1)
    with Web(204, port=port) as web:
        assert sink.close(LONG) == 0 and [row["frame"] for row in web.rows] == [1]
        assert web.headers[0]["Authorization"] == "Bearer token"


def test_images_and_texts_leave_only_as_asked():
    with Web(204) as web:
        url = "http://127.0.0.1:{}/".format(web.port)
        plain = HttpPost(url, privacy=PrivacyRules("hash", b"k" * 32))
        plain.write(frame(0, texts=("AB 1",)))
        assert plain.close(LONG) == 0
        full = HttpPost(url, images=True, privacy=PrivacyRules("drop"))
        full.write(frame(1, texts=("AB 1",)))
        assert full.close(LONG) == 0
    assert "image" not in web.rows[0] and web.rows[0]["objects"][0]["text"] == hash_text("AB1", b"k" * 32)
    assert "text" not in web.rows[1]["objects"][0]
    data = np.frombuffer(base64.b64decode(web.rows[1]["image"]), np.uint8)
    assert cv2.imdecode(data, cv2.IMREAD_COLOR).shape == (48, 64, 3)


def test_a_frame_without_a_row_is_counted(capfd):
    sink = HttpPost("http://127.0.0.1:9/")
    for _ in range(2): sink.write(None)
    assert sink.failed == 2 and capfd.readouterr().err.count("can't be sent") == 1
    sink.close(0)


@pytest.mark.parametrize("url", ["", "127.0.0.1", "ftp://x", "http://", "http://x:99999", "http://x:0", "http://[::1",
                                 "https://me:{}@:80".format(SECRET)])
def test_addresses(url):
    with pytest.raises(InputError, match="http.url") as e: HttpPost(url)
    assert SECRET not in str(e.value)


@pytest.mark.parametrize("token", ["two\nlines", "tr\u00e9s", "x y"])
def test_a_token_that_is_no_header(token):
    with pytest.raises(InputError, match="bearer") as e: HttpPost("http://127.0.0.1:9", password=token)
    assert token not in str(e.value)


# Redis

@pytest.fixture
def redis_server(tmp_path):
    redis = pytest.importorskip("redis", reason="redis is not installed")
    if not shutil.which("redis-server"): pytest.skip("no redis-server here")
    port = free_port()
    program = Program(["redis-server", "--port", port, "--bind", "127.0.0.1", "--requirepass", SECRET, "--dir",
                       tmp_path, "--save", "", "--appendonly", "yes", "--appendfsync", "always"], port)
    program.client = redis.Redis("127.0.0.1", port, password=SECRET)
    yield program
    program.client.connection_pool.disconnect()
    program.kill()


def test_redis_killed_and_restarted(redis_server, capfd):
    sink = RedisStream("redis://127.0.0.1:{}".format(redis_server.port), password=SECRET, first_wait=.01, seconds=20)
    for n in range(20): sink.write(frame(n))
    until(lambda: sink.outbox.sent == 20)
    redis_server.kill()
    for n in range(20, 40): sink.write(frame(n))
    until(lambda: sink.outbox.failures)
    redis_server.start()
    assert sink.close(LONG) == 0
    entries = redis_server.client.xrange("detections")
    rows = [json.loads(fields[b"data"].decode("utf-8")) for _, fields in entries]
    assert [row["frame"] for row in rows] == list(range(40))
    assert [int(fields[b"frame"]) for _, fields in entries] == list(range(40))
    err = capfd.readouterr().err
    assert err.count("trying again") == 1 and SECRET not in err


def test_redis_wrong_password_and_bound(redis_server, capfd):
    url = "redis://:wrong-one@127.0.0.1:{}/0".format(redis_server.port)
    sink = RedisStream(url, first_wait=.01)
    sink.write(frame())
    until(lambda: sink.outbox.failures)
    assert sink.close(.05) == 1
    err = capfd.readouterr().err
    assert "wrong-one" not in err + str(sink) and ("invalid" in err.lower() or "WRONGPASS" in err)
    bounded = RedisStream("redis://127.0.0.1:{}".format(redis_server.port), "few", maxlen=50, password=SECRET)
    for n in range(500): bounded.write(frame(n))
    assert bounded.close(LONG) == 0
    assert 50 <= redis_server.client.xlen("few") < 300 # ~: whole nodes of 100 entries


# MQTT

def subscriber(port, got, **tls):
    "A client that collects messages. paho-mqtt 1 and 2 are made differently."
    library = pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
    version = getattr(library, "CallbackAPIVersion", None)
    client = library.Client(*((version.VERSION2,) if version else ()), client_id="collector", clean_session=False)
    client.username_pw_set("me", SECRET)
    if tls: client.tls_set(**tls)
    client.reconnect_delay_set(1, 1)
    ready = threading.Event()
    client.on_connect = lambda client, *_: client.subscribe("#", 1)
    client.on_subscribe = lambda *_: ready.set()
    client.on_message = lambda client, _, message: got.append(message)
    client.connect("127.0.0.1", port)
    client.loop_start()
    assert ready.wait(LONG)
    return client


def mosquitto(tmp_path, *lines):
    if not shutil.which("mosquitto") or not shutil.which("mosquitto_passwd"): pytest.skip("no mosquitto here")
    pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
    port = free_port()
    passwords = tmp_path / "passwords"
    subprocess.check_call(["mosquitto_passwd", "-c", "-b", str(passwords), "me", SECRET], stderr=subprocess.DEVNULL)
    user = "root" if os.getuid() == 0 else ""
    config = ["listener {} 127.0.0.1".format(port), "allow_anonymous false", "password_file {}".format(passwords),
              "max_queued_messages 0", "persistence true", "persistence_location {}/".format(tmp_path)] + list(lines)
    if user: config.append("user root")
    (tmp_path / "mosquitto.conf").write_text("\n".join(config) + "\n")
    return Program(["mosquitto", "-c", tmp_path / "mosquitto.conf"], port)


def frames_of(messages): return [json.loads(message.payload.decode("utf-8"))["frame"] for message in messages]


def test_mqtt_killed_and_restarted(tmp_path, capfd):
    "At least once: all arrive; what was confirmed is not sent again."
    program = mosquitto(tmp_path)
    first, second = [], []
    try:
        client = subscriber(program.port, first)
        # after a failure it waits for `close`, when somebody listens again: a killed broker forgets its subscribers
        sink = Mqtt("mqtt://127.0.0.1:{}".format(program.port), user="me", password=SECRET, first_wait=1000, seconds=2,
                    topic="yards/{source}", retain=True)
        for n in range(30): sink.write(frame(n, source="a/b #1"))
        until(lambda: len(first) == 30)
        client.disconnect()
        client.loop_stop()
        program.kill()
        for n in range(30, 60): sink.write(frame(n, source="a/b #1"))
        until(lambda: sink.outbox.failures)
        program.start()
        client = subscriber(program.port, second)
        assert sink.close(LONG) == 0
        until(lambda: set(frames_of(second)) >= set(range(30, 60)))
        client.disconnect()
        client.loop_stop()
    finally: program.kill()
    assert frames_of(first) == list(range(30)) and {m.topic for m in first} == {"yards/a_b__1"}
    err = capfd.readouterr().err
    assert err.count("trying again") == 1 and SECRET not in err


def test_mqtt_refuses_a_wrong_password(tmp_path, capfd):
    program = mosquitto(tmp_path)
    try:
        sink = Mqtt("mqtt://me:nonsense@127.0.0.1:{}".format(program.port), first_wait=.01)
        sink.write(frame())
        until(lambda: sink.outbox.failures)
        assert sink.close(.05) == 1
    finally: program.kill()
    err = capfd.readouterr().err
    assert "refuses the connection" in err and "ot authori" in err and "nonsense" not in err


def test_mqtt_over_tls(tmp_path, capfd):
    if not shutil.which("openssl"): pytest.skip("no openssl here")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.check_call(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
                           "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out",
                           str(certificate)], stderr=subprocess.DEVNULL)
    program = mosquitto(tmp_path, "certfile {}".format(certificate), "keyfile {}".format(key))
    got = []
    try:
        client = subscriber(program.port, got, ca_certs=str(certificate))
        url = "mqtts://127.0.0.1:{}".format(program.port)
        sink = Mqtt(url, user="me", password=SECRET, tls=str(certificate), qos=2)
        sink.write(frame(7))
        assert sink.close(LONG) == 0
        until(lambda: frames_of(got) == [7])
        stranger = Mqtt(url, user="me", password=SECRET, first_wait=.01) # does not trust the certificate
        stranger.write(frame(8))
        until(lambda: stranger.outbox.failures)
        assert stranger.close(.05) == 1
        client.disconnect()
        client.loop_stop()
    finally: program.kill()
    assert "certificate" in capfd.readouterr().err.lower()


@pytest.mark.parametrize("wrong", [dict(qos=3), dict(topic="a/#"), dict(topic="a/+"), dict(topic=""),
                                   dict(topic="$SYS/x"), dict(topic="{camera}"), dict(url="http://x"),
                                   dict(tls="nowhere.pem")])
def test_mqtt_settings(wrong):
    pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
    with pytest.raises(InputError, match="mqtt"): Mqtt(**dict(dict(url="mqtt://127.0.0.1"), **wrong))
