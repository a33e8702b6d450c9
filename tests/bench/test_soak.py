"""The soak's own judgment: what is lost, what grows, and what overlaps."""
import importlib
import json
import mmap
from pathlib import Path

import cv2
import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    monkeypatch.syspath_prepend(str(REPOSITORY / "bench"))
    return importlib.import_module("soak")


@pytest.mark.parametrize("indices, wrong", [
    (range(6), 0), ([0, 1, 2, 3, 4], 1), ([0, 1, 3, 4, 5], 4), ([0, 1, 1, 2, 3, 4, 5], 6), ([0, 2, 1, 3, 4, 5], 2),
])
def test_a_row_that_is_missing_twice_or_out_of_order_is_counted(soak, tmp_path, indices, wrong):
    path = tmp_path / "frames.jsonl"
    path.write_text("".join(json.dumps({"frame": index}) + "\n" for index in indices))
    assert soak.lost_rows(path, 6) == (len(indices), wrong)


@pytest.mark.parametrize("step, holds", [(0, True), (-.1, True), (.01, True), (.03, False)])
def test_memory_that_grows_is_a_miss(soak, step, holds):
    "Each round has small and large frames; the first one warms up, and the last begins within a round."
    memory = soak.Memory(10, 200)
    memory.frames = 1130
    for frame in range(10, 1131, 10):
        warm = 60 if frame <= 200 else 100
        memory.readings.append((frame, warm + (5 if frame % 200 < 80 else 0) + step * frame / 10))
    assert soak.memory_line(memory)[2] == holds


def test_fewer_than_three_rounds_are_no_proof(soak):
    memory = soak.Memory(10, 200)
    memory.frames = 599
    memory.readings = [(frame, frame) for frame in range(10, 600, 10)]
    line, _, holds = soak.memory_line(memory)
    assert line == "memory not judged: fewer than 600 frames" and holds


def test_readings_are_taken_of_both_processes(soak):
    memory = soak.Memory(2, 4)
    for _ in range(5): memory.read("self")
    memory.read("none") # the child is gone
    assert [frame for frame, _ in memory.readings] == [2, 4] and memory.readings[0][1] > 10


def test_memory_is_that_of_the_process(soak):
    before = soak.allocated_mb("self")
    with mmap.mmap(-1, 30_000_000) as held:  # new pages: an array may lie in memory that was freed before
        for k in range(0, len(held), mmap.PAGESIZE): held[k] = 1
        assert 25 < soak.allocated_mb("self") - before < 40
    with pytest.raises(OSError): soak.allocated_mb("none")


def test_the_time_in_which_both_threads_work(soak, tmp_path):
    assert soak.both_seconds([(0, 2), (3, 5), (1, 4)]) == 2
    assert soak.both_seconds([(0, 1), (1, 2)]) == 0
    def event(name, begin, seconds): return {"ph": "X", "name": name, "ts": begin * 1e6, "dur": seconds * 1e6}
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [
        {"ph": "M", "name": "thread_name"}, event("capture", 0, 9), event("detect", 10, 4), event("capture", 11, 2),
        event("output", 14, 2), event("detect", 14, 1)]}))
    figures = soak.read_trace(path)
    assert figures["hidden"] == pytest.approx(3 / 4) and figures["wall_s"] == pytest.approx(6)
    assert figures["stages_s"] == pytest.approx({"detect": 5, "capture": 2, "output": 2})


def test_a_short_play_is_lost_frames(soak, tmp_path):
    whole = tmp_path / "whole.avi"
    writer = cv2.VideoWriter(str(whole), cv2.VideoWriter_fourcc(*"MJPG"), 10, (32, 32))
    for k in range(8): writer.write(np.full((32, 32, 3), 20 * k, np.uint8))
    writer.release()
    short = tmp_path / "short.avi"
    short.write_bytes(whole.read_bytes())
    assert soak.count_frames(whole) == 8
    source = soak.Again({whole: 8, short: 10}, 16, soak.Memory(100, 18))
    assert [index for _, index, _ in source] == list(range(16))
    source.close()
    assert (source.plays, source.short) == (2, 2)
