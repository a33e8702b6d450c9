"""500 damaged label files for each reader: a dataset or one line that names the file and the line in it, soon."""
import json
import random
import re
import signal

import pytest

from format_writers import WRITERS, reader_of, with_one_class
from jetson_det.core import InputError
from jetson_det.data.formats.registry import read_dataset
from jetson_det.scenes.docks import write_scenes

DAMAGED = 500
SECONDS = 10
NASTY = [
    None, True, -1, 0, 10**400, 2**63, 1e308, -1e308, "", " ", "x", "1,5", "nan", "inf", "\x00", "9"*5000, "\ud800", [],
    {}, [[]], [1], {"a": 1}, "../../etc/passwd", "/", ".", "é"*300
]
LAUGHS = b'<!DOCTYPE a [<!ENTITY b "ha">' + b"".join(b'<!ENTITY %c "%s">' % (99 + k, b"&%c;" % (98 + k)*10)
                                                     for k in range(9)) + b"]><annotation>&k;</annotation>"
DEEP = (b"["*200_000, b'{"a":'*100_000, b"<annotation>"*20_000, b'{"images":' + b"["*100_000, LAUGHS,
        b"<annotations>" + b"<image>"*50_000)


def cut(rng, data): return data[:rng.randrange(len(data) + 1)]


def flip(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 30))): data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def insert(rng, data):
    at = rng.randrange(len(data) + 1)
    what = rng.choice((b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n\n\n", b'"', b"<", b"&", b",,,,", b"  ",
                       bytes(rng.randrange(256) for _ in range(20))))
    return data[:at] + what + data[at:]


def word(rng, data):
    "Another word or number in the place of one, or none."
    spots = list(re.finditer(rb"[^\s,;<>\"{}\[\]:=]+", data)) or [re.match(b"", data)]
    spot = rng.choice(spots)
    new = rng.choice((b"", b"-1", b"nan", b"inf", b"1e999", b"9"*400, b"0x10", b"1_0", b"word", b"1,5", b"-0.0",
                      b"1e-320", "ü".encode(), b"\x00", b"true", b"99999999999"))
    return data[:spot.start()] + new + data[spot.end():]


def line(rng, data):
    "A line lost, doubled or moved."
    lines = data.splitlines(keepends=True)
    k = rng.randrange(len(lines)) if lines else 0
    return b"".join(
        rng.choice((lines[:k] + lines[k + 1:], lines[:k] + lines[k:k + 1] + lines[k:], lines[k:] + lines[:k])))


def deep(rng, data): return rng.choice(DEEP)


def tree(rng, data):
    "One value of a JSON file lost, or of another type."
    try: d = json.loads(data)
    except ValueError: return word(rng, data)
    at = d
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys: break
        k = rng.choice(keys)
        if isinstance(at[k], (dict, list)) and at[k] and rng.random() < .75: at = at[k]
        elif rng.random() < .3: return drop(d, at, k)
        else:
            at[k] = rng.choice(NASTY)
            break
    return json.dumps(d, ensure_ascii=rng.random() < .5).encode("utf-8", "surrogatepass")


def drop(d, at, k):
    del at[k]
    return json.dumps(d).encode()


WAYS = (cut, flip, insert, word, word, word, line, tree, tree, tree, deep)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return read_dataset(write_scenes(tmp_path_factory.mktemp("fuzz")/"made", 3, (96, 128), seed=5, splits={"all": 1.}))


def too_long(*_): raise TimeoutError(f"no answer in {SECONDS} s")


# of the whole, not of a line
NO_LINE = re.compile(
    r"none of its \d+ images|no readable image|not one box|no images and no labels|images and no labels|a folder"
    r" without images"
)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("writer", WRITERS)
def test_damaged_files(scenes, tmp_path, writer):
    WRITERS[writer](with_one_class(scenes) if writer == "plates" else scenes, tmp_path / "there")
    files = sorted(p for p in (tmp_path / "there").rglob("*") if p.is_file() and p.suffix.lower() != ".jpg")
    assert files
    whole = {p: p.read_bytes() for p in files}
    rng = random.Random(writer)
    outcomes = {"read": 0, "refused": 0}
    before = signal.signal(signal.SIGALRM, too_long)
    try:
        for k in range(DAMAGED):
            path = rng.choice(files)
            way = rng.choice(WAYS)
            bad = way(rng, whole[path])
            path.write_bytes(bad)
            signal.alarm(SECONDS)
            try: outcomes["read"] += len(read_dataset(tmp_path / "there", rng.choice(("auto", reader_of(writer))))) >= 0
            except InputError as e:
                outcomes["refused"] += 1
                text = str(e)
                assert "\n" not in text and len(text) < 2000, text
                assert path.name in text or NO_LINE.search(text) or "formats" in text, (way.__name__, k, text,
                                                                                        bad[:300])
                assert re.search(r", line \d+|: line \d+",
                                 text) or NO_LINE.search(text) or "formats" in text or "twice" in text, (way.__name__,
                                                                                                         k, text)
            except Exception as e:
                raise AssertionError(
                    f"{writer}, {k}, {way.__name__}, {path.name}: {type(e).__name__}: {e}: {bad[:300]!r}") from e
            finally: signal.alarm(0)
            path.write_bytes(whole[path])
    finally: signal.signal(signal.SIGALRM, before)
    # the damage is real, and not all of it is refused
    assert outcomes["refused"] > DAMAGED // 5 and outcomes["read"] > DAMAGED // 50, outcomes
