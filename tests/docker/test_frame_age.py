"""docker/frame_age.sh: the health check of the container, run for real on files of known age and on real processes."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parents[2]/"docker/frame_age.sh"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs GNU coreutils")


@pytest.fixture
def place(tmp_path):
    (tmp_path/"detector.pid").write_text("")
    age(tmp_path/"detector.pid", 1000)
    return tmp_path


def age(path, seconds):
    "Make a file that old."
    path.touch()
    then = time.time() - seconds
    os.utime(path, (then, then))


def check(place, *words, **settings):
    environment = dict(os.environ, DETECTOR_STATE=str(place), DETECTOR_FRAMES=str(place/"found.jsonl"), **settings)
    done = subprocess.run(["sh", str(CHECK), *words], env=environment, capture_output=True, text=True, timeout=20)
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.mark.parametrize("seconds, healthy", [(0, True), (25, True), (40, False), (10**8, False), (-10, True),
                                              (-10**6, False)])
def test_age_of_the_last_frame(place, seconds, healthy):
    "A frame from the future is none: the clock was set back."
    age(place/"found.jsonl", seconds)
    assert check(place)[0] == (0 if healthy else 1)


def test_the_limit_is_an_argument_or_a_setting(place):
    age(place/"found.jsonl", 100)
    assert check(place, str(place/"found.jsonl"), "200")[0] == 0
    assert check(place, DETECTOR_FRAME_SECONDS="200")[0] == 0
    assert check(place)[0] == 1


@pytest.mark.parametrize("words, settings, name", [
    (["FILE", "abc"], {}, "SECONDS is 'abc'"), (["FILE", "-5"], {}, "SECONDS is '-5'"),
    (["FILE", "1.5"], {}, "SECONDS is '1.5'"), (["FILE", "9" * 30], {}, "at most nine digits"),
    ([], dict(DETECTOR_FRAME_SECONDS="30s"), "DETECTOR_FRAME_SECONDS is '30s'"),
    ([], dict(DETECTOR_START_SECONDS="x"), "DETECTOR_START_SECONDS is 'x'"),
    ([], dict(DETECTOR_FAILURES="three"), "DETECTOR_FAILURES is 'three'"),
    (["--limit"], {}, "there is no option --limit"), (["a", "3", "4"], {}, "there are 3 words")])
def test_a_wrong_call_is_one_line_and_exit_code_1(place, words, settings, name):
    "Docker knows 0 and 1 alone; and a young frame does not hide the mistake."
    age(place/"found.jsonl", 0)
    code, out = check(place, *[str(place/"found.jsonl") if word == "FILE" else word for word in words], **settings)
    assert code == 1 and out.startswith("error: ") and name in out and out.count("\n") == 1, out
    assert not (place/"detector.failures").exists(), "it is no failure of the program"


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help(place, word):
    code, out = check(place, word)
    assert code == 0 and "SECONDS" in out and "DETECTOR_FAILURES" in out


@pytest.mark.parametrize("text", ["0090", "090"])
def test_zeros_in_front_are_no_octal_number(place, text):
    age(place/"found.jsonl", 60)
    assert check(place, str(place/"found.jsonl"), text)[0] == 0
    age(place/"found.jsonl", 100)
    assert check(place, str(place/"found.jsonl"), text)[0] == 1


def test_no_frame_yet(place):
    assert check(place) == (1, f"no frame yet: {place/'found.jsonl'} is not there\n")
    age(place/"detector.pid", 5)
    assert check(place)[0] == 0
    age(place/"found.jsonl", 9999) # of the program before this one
    assert check(place)[0] == 0


def test_while_the_engine_is_built(place):
    (place/"detector.building").write_text("")
    assert check(place) == (0, "the engine is being built\n")


STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: print('TERM', flush=True))
print('ready', flush=True)
while True: time.sleep(.05)
"""


def test_the_third_failure_ends_the_program_and_the_fourth_kills_it(place):
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE) as p:
        p.stdout.readline()
        (place/"detector.pid").write_text(f"{p.pid}\n")
        age(place/"detector.pid", 1000)
        age(place/"found.jsonl", 100)
        assert [check(place)[0], check(place)[0]] == [1, 1] and p.poll() is None
        assert "sent SIGTERM" in check(place)[1] and p.stdout.readline() == b"TERM\n"
        assert "sent SIGKILL" in check(place)[1]
        assert p.wait(timeout=10) == -signal.SIGKILL


def test_a_frame_in_between_begins_the_count_again(place):
    age(place/"found.jsonl", 100)
    for _ in range(2): check(place)
    age(place/"found.jsonl", 0)
    assert check(place)[0] == 0
    age(place/"found.jsonl", 100)
    assert "sent" not in check(place)[1] + check(place)[1]


def test_never_end_the_program(place):
    with subprocess.Popen(["sleep", "20"]) as p:
        (place/"detector.pid").write_text(f"{p.pid}\n")
        age(place/"detector.pid", 1000)
        for _ in range(5): assert check(place, DETECTOR_FAILURES="0")[0] == 1
        assert p.poll() is None
        p.kill()


@pytest.mark.parametrize("text", ["", "-1", "1 2", "x", "999999999"])
def test_odd_files(place, text):
    "Nothing is signaled that the file does not name as one process."
    (place/"detector.failures").write_text(text if text != "999999999" else "7")
    (place/"detector.pid").write_text(text)
    age(place/"detector.pid", 1000)
    assert check(place)[0] == 1
