"""The figures for Prometheus: read by the parser of its own client and by curl; bounded; fed by frames."""
import math
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from jetson_det.runtime.files import InputError
from jetson_det.runtime.geometry import as_detections
from jetson_det.runtime.ops.metrics import (CONTENT_TYPE, BoardMetrics, MetricsServer,
                                            PipelineMetrics, Registry)
from jetson_det.runtime.ops.tegrastats import parse_line
from jetson_det.runtime.stream.regions import RegionEvent
from jetson_det.runtime.stream.result import FrameResult

IMAGE = np.zeros((4, 4, 3), np.uint8)


def parsed(registry):
    "(name, labels) -> value, as Prometheus' own client reads the text."
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is not for Python 3.6")
    families = list(parser.text_string_to_metric_families(registry.text().decode()))
    samples = [sample for family in families for sample in family.samples]
    found = {(s.name, tuple(sorted(s.labels.items()))): s.value for s in samples}
    assert len(found) == len(samples)
    return found, {family.name: (family.type, family.documentation) for family in families}


def test_the_client_reads_what_was_written():
    hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed for Python 3.6")
    from hypothesis import strategies as st
    texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=8)
    awkward = st.sampled_from(["", "\\", "\n", '"', '\\n"', "a\\", "},", "é\u2028x", " "])
    rows = st.dictionaries(texts | awkward, st.lists(st.floats(allow_nan=False), min_size=1, max_size=4), max_size=5)

    @hypothesis.settings(max_examples=150, deadline=None)
    @hypothesis.given(rows, texts | awkward)
    def write_and_read(rows, text):
        registry = Registry()
        counter = registry.counter("a_total", text, ["x"])
        gauge = registry.gauge("b", text, ["x", "y"])
        histogram = registry.histogram("c", text, ["x"], [-1, 0, 2.5])
        for value, numbers in rows.items():
            for number in numbers:
                counter.add(abs(number), x=value)
                gauge.set(number, x=value, y="fixed")
                histogram.observe(number, x=value)
        found, families = parsed(registry)
        for value, numbers in rows.items():
            assert found["a_total", (("x", value),)] == sum(map(abs, numbers))
            assert found["b", (("x", value), ("y", "fixed"))] == numbers[-1]
            for le, bound in (("-1", -1), ("0", 0), ("2.5", 2.5), ("+Inf", math.inf)):
                assert found["c_bucket", (("le", le), ("x", value))] == sum(n <= bound for n in numbers)
            assert found["c_count", (("x", value),)] == len(numbers)
            total = sum(numbers)
            assert found["c_sum", (("x", value),)] == total or math.isnan(total)
        if rows: assert {name: kind for name, (kind, _) in families.items()} == {
            "a": "counter", "b": "gauge", "c": "histogram"}

    write_and_read()


def test_help_is_escaped():
    registry = Registry()
    registry.gauge("a", 'one\\two\nthree "four"').set(1)
    assert registry.text() == b'# HELP a one\\\\two\\nthree "four"\n# TYPE a gauge\na 1\n'


@pytest.mark.parametrize("value,text", [(0, "0"), (-3, "-3"), (.1, "0.1"), (1e300, "1e+300"), (math.inf, "+Inf"),
                                        (-math.inf, "-Inf"), (math.nan, "NaN"), (np.float32(.5), "0.5"),
                                        (2**53, "9007199254740992.0")])
def test_numbers(value, text):
    registry = Registry()
    registry.gauge("a", "").set(value)
    assert registry.text().decode().splitlines()[-1] == "a " + text


def test_the_series_are_bounded():
    "A label that somebody brings from outside fills neither the memory nor Prometheus."
    registry = Registry()
    counter = registry.counter("plates_total", "", ["plate"], most=10)
    for number in range(5000): counter.add(plate=number)
    lines = [line for line in registry.text().decode().splitlines() if line.startswith("plates")]
    assert len(lines) == 11 and 'plates_total{plate="other"} 4990' in lines


def test_wrong_use():
    registry = Registry()
    counter = registry.counter("a_total", "", ["x"])
    for call, words in [
        (lambda: registry.gauge("a_total", ""), "is there already"), (lambda: registry.gauge("a-b", ""), "a name has"),
        (lambda: registry.gauge("a\n", ""), "a name has"), (lambda: registry.gauge("b", "", ["__x"]), "no name"),
        (lambda: registry.histogram("b", "", ["le"]), "no name"),
        (lambda: registry.gauge("b", "", ["self"]), "no name"),
        (lambda: registry.histogram("b", "", buckets=[1, 1]), "that grow"),
        (lambda: registry.histogram("b", "", buckets=[]), "that grow"),
        (lambda: registry.histogram("b", "", buckets=[1, math.inf]), "finite"),
        (lambda: registry.gauge("b", "", most=0), "1 or more"), (lambda: counter.add(), "its labels are x, not none"),
        (lambda: counter.add(y=1), "its labels are x, not y"), (lambda: counter.add(-1, x=1), "can't grow by -1"),
        (lambda: counter.add(math.nan, x=1), "can't grow by nan")
    ]:
        with pytest.raises(InputError, match=words): call()
    assert registry.text() == b"" # nothing was counted


def test_threads_lose_nothing():
    registry = Registry()
    counter = registry.counter("a_total", "", ["x"])

    def count():
        for number in range(2000): counter.add(x=number % 3)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads: thread.start()
    for _ in range(20): registry.text()
    for thread in threads: thread.join()
    lines = registry.text().decode().splitlines()[2:]
    assert sum(int(line.split()[-1]) for line in lines) == 8000


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not here")
def test_curl_gets_it():
    registry = Registry()
    registry.gauge("a", "").set(5)
    with MetricsServer(registry, port=0) as server:
        command = ["curl", "-sS", "-i", "--max-time", "10", server.url]
        head, _, body = subprocess.check_output(command).partition(b"\r\n\r\n")
        assert b" 200 " in head.splitlines()[0] and ("Content-Type: " + CONTENT_TYPE).encode() in head.splitlines()
        assert body == registry.text()
        head = subprocess.check_output(["curl", "-sS", "-I", "--max-time", "10", server.url])
        assert b"Content-Length: %d" % len(body) in head
        status = subprocess.check_output(["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "10",
                                          server.url.replace("/metrics", "/etc/passwd")])
        assert status == b"404"


def test_a_silent_client_keeps_nobody_waiting():
    registry = Registry()
    registry.gauge("a", "").set(5)
    server = MetricsServer(registry, port=0)
    with socket.create_connection(("127.0.0.1", server.port)), \
         socket.create_connection(("127.0.0.1", server.port)) as broken:
        broken.send(b"\x00\xff nonsense\r\n\r\n")
        with urllib.request.urlopen(server.url, timeout=10) as answer: assert answer.read() == registry.text()
        with pytest.raises(urllib.error.HTTPError): urllib.request.urlopen(server.url + "/x", timeout=10)
        start = time.monotonic()
        server.close()
        assert time.monotonic() - start < 5
    with pytest.raises(OSError): socket.create_connection(("127.0.0.1", server.port), 1)


def test_it_listens_at_home_alone():
    with MetricsServer(Registry(), port=0) as server:
        assert server._server.socket.getsockname()[0] == "127.0.0.1"
        with pytest.raises(InputError, match="can't listen"): MetricsServer(Registry(), port=server.port)
    with pytest.raises(InputError, match="can't listen"): MetricsServer(Registry(), port=99999)
    with pytest.raises(InputError, match="can't listen"): MetricsServer(Registry(), host="no-such-host.invalid")


def frame(index, **more):
    detections = as_detections(np.float32([[0, 0, 2, 2], [1, 1, 3, 3], [0, 0, 1, 1]]), [.95, .45, .15], [0, 1, 0])
    return FrameResult("rtsp://gate", index, time.time() - .03, IMAGE, detections, ("sack", 'per"son'), **more)


def test_pipeline_metrics():
    metrics = PipelineMetrics()
    before = time.time()
    assert b"detector_last_frame" not in metrics.registry.text() # no frame yet is not a frame in 1970
    for index in range(3): metrics.write(frame(index, seconds={"inference": .012, "tracker": .0005}))
    metrics.write(frame(3, ids=np.array([7, 8, 9]), missed=np.array([0, 0, 2]), texts=("AB123", None, None),
                        events=(RegionEvent("dock", "entered", 7, 0, 0., 0.),)))
    found, _ = parsed(metrics.registry)
    assert found["detector_frames_total", ()] == 4
    assert found["detector_objects_total", (("class", "sack"),)] == 7 # one of them was the tracker's guess
    assert found["detector_objects_total", (("class", 'per"son'),)] == 4
    assert found["detector_confidence_bucket", (("class", "sack"), ("le", "0.2"))] == 3
    assert found["detector_stage_seconds_sum", (("stage", "inference"),)] == pytest.approx(.036)
    assert found["detector_stage_seconds_bucket", (("le", "0.02"), ("stage", "inference"))] == 3
    assert found["detector_events_total", (("class", "sack"), ("event", "entered"))] == 1
    assert found["detector_texts_total", ()] == 1
    assert found["detector_latency_seconds_count", ()] == 4
    assert before - .01 <= found["detector_last_frame_timestamp_seconds", ()] <= time.time() + .01
    assert found["detector_resident_memory_bytes", ()] > 1e6
    text = metrics.registry.text().decode()
    assert "gate" not in text and "AB123" not in text # nothing of a camera's address or a plate


def test_a_frame_that_cannot_be_counted_ends_nothing(capsys):
    metrics = PipelineMetrics()
    for _ in range(2): metrics.write(frame(0)._replace(classes=()))
    metrics.write(frame(1))
    assert metrics.failed == 2 and capsys.readouterr().err.count("\n") == 1
    late = frame(2)
    metrics.write(late._replace(time=late.time + 1e6)) # the clock was set back
    lines = metrics.registry.text().decode().splitlines()
    assert "detector_frames_total 4" in lines and "detector_latency_seconds_count 3" in lines


def test_the_sink_closes_its_server():
    registry = Registry()
    metrics = PipelineMetrics(registry, server=MetricsServer(registry, port=0))
    assert str(metrics).startswith("metrics at http://127.0.0.1:")
    metrics.close()
    with pytest.raises(OSError): socket.create_connection(("127.0.0.1", metrics.server.port), 1)


class Stats:
    interval_ms = 500
    rows = ()
    def samples(self, start):
        assert time.monotonic() - 10 < start < time.monotonic()
        return list(self.rows)


def test_board_metrics():
    stats = Stats()
    registry = Registry()
    BoardMetrics(stats, registry)
    assert registry.text().decode().splitlines()[-1] == "jetson_tegrastats_up 0"
    stats.rows = [parse_line("RAM 100/3964MB CPU [3%@729] CPU@41C"),
                  parse_line("RAM 2048/3964MB CPU [3%@729] GR3D_FREQ 62%@921 PLL@-256C GPU@36.5C VDD_IN 5000/4000")]
    lines = registry.text().decode().splitlines()
    for line in ("jetson_tegrastats_up 1", "jetson_ram_used_bytes 2147483648", "jetson_power_watts 5",
                 "jetson_gpu_percent 62", "jetson_gpu_clock_hertz 921000000",
                 'jetson_temperature_celsius{zone="GPU"} 36.5'): assert line in lines
    assert not any("PLL" in line or 'zone="CPU"' in line for line in lines)
    stats.rows = stats.rows[:1] # a board that reports no power and no load
    text = registry.text().decode()
    assert "watts" not in text and "gpu_percent" not in text and 'zone="CPU"} 41' in text


