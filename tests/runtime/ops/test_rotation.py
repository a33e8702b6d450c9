"Rotated files: no line is lost, whatever ends the process; their number is bounded."
import gzip
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from jetson_det.runtime.files import InputError
from jetson_det.runtime.ops import rotation
from jetson_det.runtime.ops.rotation import RotatingFile, RotatingLog, heal_lines, iso_week, rotated_files

REPO = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))


def lines_of(path):
    "All lines, the oldest first."
    lines = []
    for file in rotated_files(path) + [str(path)]:
        opener = gzip.open if file.endswith(".gz") else open
        with opener(file, "rb") as f: lines += f.read().splitlines()
    return lines


@pytest.mark.parametrize("seed", range(12))
def test_no_line_is_lost_and_sizes_hold(tmp_path, seed):
    "Random sizes, weeks that go forward and back, closing and opening, compression."
    draw = random.Random(seed)
    most = draw.randint(20, 200)
    now = [1.7e9]
    def open_file():
        return RotatingFile(tmp_path / "a.b.log", most, draw.random() < .7, keep=1000, compress=seed % 3 == 0,
                            clock=lambda: now[0])
    file, written = open_file(), []
    for number in range(150):
        line = b"%d:" % number + b"x" * draw.choice([0, 3, 30, 300])
        file.write(line + b"\n" * draw.randint(0, 1))
        written.append(line)
        if draw.random() < .05: now[0] += draw.choice([-2, 1, 7]) * 86400
        if draw.random() < .05:
            file.close()
            file = open_file()
    file.close()
    assert lines_of(tmp_path / "a.b.log") == written
    for name in rotated_files(tmp_path / "a.b.log"):
        with (gzip.open if name.endswith(".gz") else open)(name, "rb") as f: data = f.read()
        assert len(data) <= most or data.count(b"\n") == 1
        assert name.endswith(".gz") == (seed % 3 == 0)


def test_rotates_once_a_week_and_names_the_week_of_the_lines(tmp_path):
    now = [1.7e9]
    with RotatingFile(tmp_path / "x.log", clock=lambda: now[0]) as file:
        for day in range(21):
            now[0] = 1.7e9 + day * 86400
            file.write(iso_week(now[0]).encode())
    for name in rotated_files(tmp_path / "x.log"):
        with open(name) as f: weeks = set(f.read().split())
        assert len(weeks) == 1 and weeks.pop() in os.path.basename(name)
    assert len(rotated_files(tmp_path / "x.log")) == 3
    os.utime(str(tmp_path / "x.log"), (now[0], now[0])) # opened again in another week: by the file's time
    now[0] += 7 * 86400
    with RotatingFile(tmp_path / "x.log", clock=lambda: now[0]) as file: file.write(b"later")
    assert (tmp_path / "x.log").read_bytes() == b"later\n"


@pytest.mark.parametrize("compress", [False, True])
def test_the_number_of_files_is_bounded(tmp_path, compress):
    with RotatingFile(tmp_path / "x.log", 10, keep=3, compress=compress) as file:
        for number in range(60): file.write(b"line %04d" % number)
    assert lines_of(tmp_path / "x.log") == [b"line %04d" % n for n in range(56, 60)]
    assert len(os.listdir(str(tmp_path))) == 4
    (tmp_path / "x.2020-W01-abc.log").write_text("of somebody else")
    with RotatingFile(tmp_path / "x.log", 10, keep=1) as file: file.write(b"next line")
    assert len(os.listdir(str(tmp_path))) == 3 # one rotated, the open one, somebody else's


def test_torn_lines_are_healed(tmp_path):
    path = tmp_path / "x"
    for left, kept in ((b"a\nb", b"a\nb\n"), (b"", b""), (b"a\n", b"a\n"), (b"ab", b"ab\n")):
        path.write_bytes(left)
        assert heal_lines(path) == 0 and path.read_bytes() == kept
    for left, kept in ((b"a\nbcd", b"a\n"), (b"bcd", b""), (b"a\n" + b"\0" * 200000, b"a\n")):
        path.write_bytes(left)
        assert heal_lines(path, lambda piece: False) == len(left) - len(kept) and path.read_bytes() == kept


def test_a_full_disk_leaves_whole_lines(tmp_path):
    "/dev/full can't be rotated: so the size of the process's files is limited instead."
    code = ("import resource, signal, sys\n"
            "from jetson_det.runtime.ops.rotation import RotatingFile\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "file = RotatingFile(sys.argv[1])\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (25, -1))\n"
            "failed = 0\n"
            "for n in range(6):\n"
            "    try: file.write(b'line %04d' % n)\n"
            "    except OSError as e: failed += 1; assert e.filename == file.path\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))\n"
            "file.write(b'again')\n"
            "print(failed)\n")
    out = subprocess.check_output([sys.executable, "-c", code, str(tmp_path / "x.log")], cwd=REPO)
    assert out.strip() == b"4"
    assert lines_of(tmp_path / "x.log") == [b"line 0000", b"line 0001", b"again"]


def test_two_writers_are_refused_and_a_moved_file_is_begun_again(tmp_path):
    with RotatingFile(tmp_path / "x.log") as file:
        with pytest.raises(InputError, match="another process writes"): RotatingFile(tmp_path / "x.log")
        file.write(b"one")
        os.rename(str(tmp_path / "x.log"), str(tmp_path / "moved"))
        file.write(b"two")
    assert (tmp_path / "x.log").read_bytes() == b"two\n" and (tmp_path / "moved").read_bytes() == b"one\n"
    for wrong in (dict(path=tmp_path), dict(path=tmp_path / "moved" / "x"), dict(path=tmp_path / "y", keep=0),
                  dict(path=tmp_path / "y", max_bytes=0)):
        with pytest.raises(InputError): RotatingFile(**wrong)


def test_compression_that_was_cut_off(tmp_path):
    "Twice there, plain and compressed; and a part of a killed process."
    plain = tmp_path / "x.2026-W01-000001.log"
    plain.write_bytes(b"a\n")
    (tmp_path / (plain.name + ".gz")).write_bytes(gzip.compress(b"a\n"))
    (tmp_path / ("." + plain.name + ".gz.abc123.part")).write_bytes(b"half")
    (tmp_path / "x.2026-W01-000002.log").write_bytes(b"b\n")
    RotatingFile(tmp_path / "x.log", compress=True).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "x.2026-W01-000001.log.gz", "x.2026-W01-000002.log.gz", "x.log"]
    assert lines_of(tmp_path / "x.log") == [b"a", b"b"]


WRITER = """
import sys
from jetson_det.runtime.ops.rotation import RotatingFile
file = RotatingFile(sys.argv[1], 2000, keep=10**6, compress=True)
n = int(sys.argv[2])
while True:
    file.write(b"%09d" % n + b"x" * (n % 50))
    n += 1
    if n % 20 == 0: print(n, flush=True)
"""


def kill_rounds(tmp_path, rounds):
    "Writers that are killed at random moments; the numbers that must be there."
    draw = random.Random(1)
    path = tmp_path / "x.log"
    least = 0
    for _ in range(rounds):
        start = int(lines_of(path)[-1][:9]) + 1 if path.exists() and lines_of(path) else least
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(start)], cwd=REPO,
                                   stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(draw.random() * .05)
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[0].split()
        if said: least = int(said[-1])
        RotatingFile(path, 2000, keep=10**6, compress=True).close() # heals
        numbers = [int(line[:9]) for line in lines_of(path)]
        assert numbers == list(range(len(numbers))) and len(numbers) >= least
        assert not [name for name in os.listdir(str(tmp_path)) if name.endswith(".part")]
    return len(rotated_files(path))


def test_kill(tmp_path): assert kill_rounds(tmp_path, 3) > 3


@pytest.mark.slow
def test_many_kills(tmp_path): assert kill_rounds(tmp_path, 60) > 60


def test_tidying_that_fails_is_said_once_and_writing_goes_on(tmp_path, monkeypatch, capfd):
    def fail(path): raise OSError(5, "the card is broken")
    monkeypatch.setattr(rotation.os, "unlink", fail)
    with RotatingFile(tmp_path / "x.log", 10, keep=1) as file:
        for number in range(9): file.write(b"line %04d" % number)
    err = capfd.readouterr().err
    assert len(re.findall("the card is broken", err)) == 1 and file.problem == "the card is broken"
    assert len(lines_of(tmp_path / "x.log")) == 9


def test_log(tmp_path, capfd):
    handler = RotatingLog(RotatingFile(tmp_path / "x.log", 100, keep=2))
    log = logging.Logger("x")
    log.addHandler(handler)
    for number in range(50): log.warning("a\nb %d", number)
    handler.close()
    assert lines_of(tmp_path / "x.log")[-1] == b"a\\nb 49" and len(rotated_files(tmp_path / "x.log")) == 2
    handler.file.write = None
    log.warning("lost") # said by logging, not raised
    assert "lost" in capfd.readouterr().err
