"""`watch`, which runs for months: what it writes stays bounded and whole, however it ends. Python 3.6 too."""
import errno
import json
import os
import signal

import numpy as np
import pytest
from signals import hearing_ctrl_c

from jetson_det.runtime import program
from jetson_det.runtime.geometry import as_detections
from jetson_det.runtime.program import main
from jetson_det.runtime.stream.sources import Frame


class Contract:
    name = "sacks"
    classes = ("Sack", "Säcke")


class FakeSession:
    "Finds one box in each frame that is not black."
    contract = Contract()
    confidence = .25

    def __call__(self, image):
        if not image.any(): return as_detections()
        return as_detections(np.float32([[1, 2, 3, 4]]), np.float32([.5]), np.array([1]))


class FakeCamera:
    name = "camera0"
    live = True

    def __init__(self, frames, seen=()):
        self.frames = frames
        self.seen = seen # what happens before a frame: its index -> a function
        self.closed = False

    def __iter__(self):
        for k, bright in enumerate(self.frames):
            if k in self.seen: self.seen[k]()
            yield Frame(np.full((8, 8, 3), 255 * bright, np.uint8), self.name, k)

    def close(self): self.closed = True


@pytest.fixture
def watch(monkeypatch, tmp_path):
    "Calls the program with a camera of these frames."
    (tmp_path/"model.onnx").write_bytes(b"")
    (tmp_path/program.BUNDLE).write_text('{"parts": {"model": "model.onnx"}}')
    monkeypatch.setattr(program, "open_session", lambda path, threads: FakeSession())
    def run(frames, *words, **options):
        camera = FakeCamera(frames, options.get("seen", {}))
        monkeypatch.setattr(program, "open_source", lambda text: camera)
        code = main(["watch", "0", "--out", str(tmp_path/"found")] + list(words), tmp_path)
        assert camera.closed
        return code
    return run


def rows(path): return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_cameras_end_is_a_failure_and_nothing_of_before_is_lost(watch, tmp_path, capsys):
    for _ in range(2):
        assert watch([1, 0, 1]) == 1 # the service starts it again
        assert "camera0: gives no more frames" in capsys.readouterr().err
    head, *found = rows(tmp_path/"found/found.jsonl")
    assert head["written_by"] == "jetson-det watch" and head["classes"] == ["Sack", "Säcke"]
    assert [row["index"] for row in found] == [0, 2, 0, 2] # nothing was in the others
    assert found[0]["detections"] == [{"name": "Säcke", "label": 1, "score": .5, "box": [1, 2, 3, 4]}]


def test_it_stays_bounded(watch, tmp_path, monkeypatch):
    sizes = []
    def look(): sizes.append(sum(p.stat().st_size for p in (tmp_path/"found").iterdir()))
    count = 18000
    assert watch([1] * count, "--megabytes", "1", seen={k: look for k in range(1000, count, 500)}) == 1
    assert max(sizes) <= 1e6 + 300 and min(sizes[10:]) > 4e5
    older, newer = (rows(tmp_path/"found"/name) for name in ("found.1.jsonl", "found.jsonl"))
    assert [row["index"] for row in older[1:] + newer[1:]] == list(range(older[1]["index"], count))
    assert sorted(p.name for p in (tmp_path/"found").iterdir()) == ["found.1.jsonl", "found.jsonl"]


def test_a_line_that_a_power_cut_tore_is_cut_off(watch, tmp_path):
    watch([1, 1])
    path = tmp_path/"found/found.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    watch([1])
    assert [row["index"] for row in rows(path)[1:]] == [0, 0]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_well(watch, tmp_path, name):
    stop = lambda: os.kill(os.getpid(), getattr(signal, name))
    with hearing_ctrl_c(): assert watch([1] * 10, seen={4: stop}) == 0
    assert len(rows(tmp_path/"found/found.jsonl")) == 1 + 5


def test_the_file_tells_when_the_last_frame_came(watch, tmp_path):
    watch([1])
    path = tmp_path/"found/found.jsonl"
    os.utime(str(path), (1e9, 1e9))
    watch([0])
    assert path.stat().st_mtime > 1.5e9 and len(rows(path)) == 2


def test_a_full_disk_is_one_line_and_no_torn_one(watch, tmp_path, monkeypatch, capsys):
    def full(self, row):
        left = (json.dumps(row) + "\n").encode("ascii")
        before = self.file
        class Full:
            def write(self, data):
                before.write(left[:9])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            def truncate(self, size): before.truncate(size)
            def close(self): before.close()
        self.file = Full()
        write(self, row)
    write = program._BoundedLines._write
    def fill(): monkeypatch.setattr(program._BoundedLines, "_write", full)
    assert watch([1] * 5, seen={3: fill}) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "No space left" in error and error.count("\n") == 1
    assert [row["index"] for row in rows(tmp_path/"found/found.jsonl")[1:]] == [0, 1, 2]


@pytest.mark.parametrize("words, part", [
    (["--megabytes", "0"], "--megabytes 0"), (["--megabytes", "nan"], "--megabytes nan"), (["--most", "0"], "--most 0"),
])
def test_wrong_calls(watch, tmp_path, capsys, words, part):
    assert main(["watch", "0", "--out", str(tmp_path/"found")] + words, tmp_path) == 2
    assert part in capsys.readouterr().err and not (tmp_path/"found").exists()


def test_a_file_of_somebody_else_stays(watch, tmp_path, capsys):
    (tmp_path/"found").mkdir()
    (tmp_path/"found/found.jsonl").write_text("mine\n")
    assert main(["watch", "0", "--out", str(tmp_path/"found")], tmp_path) == 2
    assert "jetson-det did not write it" in capsys.readouterr().err
    assert (tmp_path/"found/found.jsonl").read_text() == "mine\n"


def test_most(watch, tmp_path):
    assert watch([1] * 10, "--most", "3") == 0 and len(rows(tmp_path/"found/found.jsonl")) == 4
