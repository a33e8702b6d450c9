"""The device benchmark: windows, heat, throttling, memory, the checklist, rows for the estimate."""
import json
import os
import signal
import threading
import time

import numpy as np
import pytest
from board_files import NANO, fake_tegrastats, make_board, nano_line

from jetson_det.runtime.contract import anchor_count, preset
from jetson_det.runtime.files import InputError
from jetson_det.runtime.bench import ProcessMemory
from jetson_det.runtime.ops import sustained
from jetson_det.runtime.ops.checklist import BOUNDS, Bound, checklist
from jetson_det.runtime.ops.sustained import Sustained, Window, after_idle, bench_device, sustain, write_measured
from jetson_det.runtime.session import Session

FRAME = np.full((48, 64, 3), 114, np.uint8)
CONTRACT = preset("yolox", ("Sack", ), (64, 64))
ANSWER = np.zeros((1, anchor_count((64, 64)), 6), np.float32)


def session_of(seconds=.001, engine=""):
    def network(x):
        time.sleep(seconds)
        return [ANSWER]
    session = Session(CONTRACT, network)
    session.engine = engine
    return session


def test_windows_are_the_run():
    run = sustain(session_of(), [FRAME] * 3, minutes=.01, window_s=.1)
    assert 3 <= len(run.windows) <= 6 and run.seconds == pytest.approx(.6, abs=.15)
    for w in run.windows:
        assert w.fps == pytest.approx(w.frames / w.seconds) and 1 <= w.p50_ms <= w.p95_ms and w.rss_mb > 1
        assert (w.watts, w.throttled) == (None, None)
    starts = [w.start_s for w in run.windows]
    assert starts == sorted(starts) and sum(w.frames for w in run.windows) <= run.frames
    assert run.fps == pytest.approx(run.frames / run.seconds) and run.throttled is None and run.ended_by == ""


def window(start, fps, **more):
    return Window(start, 10., int(10 * fps), fps, 1e3 / fps, 1e3 / fps, 100. + start, **more)


def test_a_board_that_gets_hot():
    rates = [30.] * 20 + [25.] * 10 + [20.] * 30
    windows = tuple(window(10. * k, fps, throttled=float(fps < 30)) for k, fps in enumerate(rates))
    run = Sustained(windows, 600., int(10 * sum(rates)), sum(rates) / 60)
    assert (run.first_fps, run.last_fps, run.loss) == (30, 20, pytest.approx(1 / 3))
    assert run.throttled == pytest.approx(40 / 60) and run.growth_mb == 590
    lines = run.text().splitlines()
    assert lines[0].endswith("each minute: 30.0 30.0 30.0 25.0 25.0 20.0 20.0 20.0 20.0 20.0")
    assert lines[1] == "it became 33% slower: from 30.0 to 20.0 frames/s"
    assert "67% of the windows" in lines[2]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_keeps_what_was_measured():
    timer = threading.Timer(.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    run = sustain(session_of(), [FRAME], minutes=1, window_s=.1)
    timer.join()
    assert run.ended_by == "SIGTERM" and run.windows and run.seconds < 5
    assert "(ended by SIGTERM)" in run.text()


@pytest.mark.parametrize("options, message", [
    (dict(minutes=0), "minutes is 0"), (dict(minutes=2000), "at most 1440"), (dict(window_s=0), "window_s is 0"),
    (dict(minutes=float("nan")), "minutes is nan"),
])
def test_what_is_no_run(options, message):
    with pytest.raises(InputError, match=message): sustain(session_of(), [FRAME], **options)
    with pytest.raises(InputError, match="no frames"): sustain(session_of(), [])


def test_after_idle_takes_the_first_call():
    calls = []

    def session(frame):
        calls.append(time.monotonic())
        time.sleep(.02)
    start = time.monotonic()
    assert after_idle(session, FRAME, .1) >= 20
    assert len(calls) == 1 and calls[0] - start >= .1


def test_everything_on_a_nano(tmp_path, monkeypatch):
    # the process of the tests may hold gigabytes by now
    monkeypatch.setattr(sustained, "process_memory", lambda: ProcessMemory(400., 450.))
    root = make_board(tmp_path / "nano", NANO)
    # 1100 MB before the artifact is opened, 1400 after; then the clock falls to 640 MHz
    lines = [nano_line(1100, 0, 76, 30, 1500)] * 2
    lines += [nano_line(1400, 99, 921, 43, 4500)] * 20 + [nano_line(1400, 99, 640, 80, 3500)] * 500

    def slow_to_open():
        time.sleep(.2)
        return session_of(.002, "TensorRT 8.2.1.8")
    predicted = dict(ms=2.2, low=1.8, high=5., evidence="three rows")
    found = bench_device(slow_to_open, [FRAME], minutes=.02, window_s=.2, idle_s=.05, repeats=10, interval_ms=20,
                         tegrastats=fake_tegrastats(tmp_path, lines), predicted=predicted, detection=85., text=90.,
                         root=root)
    assert found.board == "nano" and (found.power_mode, found.mode_mhz) == ("MAXN", 921.6)
    assert found.limit_mhz == pytest.approx(921.6)
    assert found.open_s >= .2 and found.bench.first_ms > 1 and found.sustained.after_idle_ms > 1
    assert 3.4 < found.stats.watts < 4.6 and found.stats.celsius["GPU"] == 80
    assert found.stats.joules_per_frame == pytest.approx(
        found.stats.watts * found.stats.seconds / found.sustained.frames, rel=.01)
    assert found.stats.throttled > 0 and found.sustained.throttled > 0
    last = found.sustained.windows[-1]
    assert (last.gpu_mhz, last.gpu_percent, last.throttled, last.celsius) == (640, 99, 1, 80)
    assert found.has_gpu_memory and found.memory_mb >= 300, "what the system's use grew by counts"
    verdicts = {check.name: check.passed for check in found.checks}
    assert verdicts == dict(rate=True, memory=True, detection=True, text=False, GPU=False)
    text = str(found)
    for part in ("network: 2.", "inside; three rows", "FAIL  text", "after 0 s of idling"): assert part in text, part
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert len(again["sustained"]["windows"]) == len(found.sustained.windows) and again["checks"][3]["passed"] is False
    outside = found._replace(predicted=dict(predicted, low=.1, high=.2))
    assert "OUTSIDE" in str(outside)


def test_without_a_board_nothing_is_invented(tmp_path):
    found = bench_device(session_of, lambda session: [FRAME], tegrastats=(str(tmp_path / "tegrastats"), ),
                         root=tmp_path)
    assert found.stats is None and found.sustained is None and not found.has_gpu_memory and found.board == ""
    assert [check.passed for check in found.checks][2:] == [None] * 3
    assert "were not measured" in found.notes[0] and "not measured" in str(found)
    assert bench_device(session_of, [FRAME], tegrastats=None, root=tmp_path).notes == ()


def test_the_program_is_ended_with_a_fault(tmp_path):
    words = fake_tegrastats(tmp_path, [nano_line()])

    def broken(): raise InputError("cannot be opened")
    before = threading.active_count()
    with pytest.raises(InputError, match="cannot be opened"): bench_device(broken, [FRAME], tegrastats=words)
    assert threading.active_count() == before


def test_the_checklist_at_its_bounds():
    for key, bound in BOUNDS.items():
        for value in filter(None, (bound.least, bound.most)):
            assert next(c for c in checklist(**{key: value}) if c.name == bound.name).passed is True
        if bound.least: assert checklist(**{key: bound.least - .01})[list(BOUNDS).index(key)].passed is False
        if bound.most: assert checklist(**{key: bound.most + .01})[list(BOUNDS).index(key)].passed is False
    assert all(check.passed is None and "not measured" in str(check) for check in checklist())
    own = checklist(fps=25, bounds=dict(fps=Bound("rate", "frames/s", least=30)))
    assert [check.passed for check in own] == [False]
    with pytest.raises(InputError, match="0 to 100 %"): checklist(text=101)


def report_of(tmp_path, **changes):
    found = bench_device(lambda: session_of(.001, "TensorRT 8.2.1.8"), [FRAME], tegrastats=None, repeats=2,
                         root=make_board(tmp_path / "board", NANO))
    return found._replace(**changes)


def test_measured_rows(tmp_path):
    found = report_of(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m.onnx").write_bytes(b"x")
    path = tmp_path / "rows" / "measured.json"
    path.parent.mkdir()
    write_measured(path, found, tmp_path / "models" / "m.onnx", "fp16")
    write_measured(path, found, "yolox-nano", "fp16")
    write_measured(path, found, "yolox-nano", "fp32")
    slower = found._replace(bench=found.bench._replace(stages=dict(found.bench.stages, inference=dict(p50=9.))))
    write_measured(path, slower, "yolox-nano", "fp16")
    stored = json.loads(path.read_text())
    assert (stored["board"], stored["mode"]) == ("nano", "MAXN")
    rows = {(row["model"], row["precision"]): row["ms"] for row in stored["rows"]}
    assert set(rows) == {(os.path.join("..", "models", "m.onnx"), "fp16"), ("yolox-nano", "fp16"),
                         ("yolox-nano", "fp32")}
    assert rows["yolox-nano", "fp16"] == 9 and stored["rows"][0]["input_size"] == [64, 64]
    for other, message in ((found._replace(board="tx2"), "was measured on nano in mode MAXN, and this is tx2"),
                           (found._replace(board=""), "no board of the table"),
                           (found._replace(engine="ONNX Runtime 1.10"), "times of ONNX Runtime 1.10")):
        with pytest.raises(InputError, match=message): write_measured(path, other, "yolox-nano", "fp16")
    path.write_text("[]")
    with pytest.raises(InputError, match="no file of measured rows"): write_measured(path, found, "yolox-nano", "fp16")


def test_a_mode_that_the_table_has_not_is_not_written(tmp_path):
    path = tmp_path / "measured.json"
    with pytest.raises(InputError, match="no power mode '7W' in the table; it has MAXN, 5W; measure in one of them"):
        write_measured(path, report_of(tmp_path, power_mode="7W", mode_mhz=None), "yolox-nano", "fp16")
    assert not path.exists()
    unknown = report_of(tmp_path, power_mode="", mode_mhz=None)
    assert json.loads(write_measured(path, unknown, "yolox-nano", "fp16", "5w").read_text())["mode"] == "5w"
