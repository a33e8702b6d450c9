"""Downloads against a real server that cuts, stalls, lies and changes its mind; two processes; a killed one; a full
disk."""
import contextlib
import email.utils
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from jetson_det import downloads
from jetson_det.downloads import DownloadError
from jetson_det.models.weights import download
from jetson_det.models.weights.download import fetch, locate, official_urls, remote_file
from jetson_det.runtime.files import InputError
from servers import Site

posix = pytest.mark.skipif(os.name != "posix", reason="locks and signals of a POSIX system")


@pytest.fixture
def site():
    s = Site()
    yield s
    s.close()


@pytest.fixture
def get(tmp_path, monkeypatch):
    "fetch with a cache of its own, fast retries, and its lines kept; as if no checksums were published."
    monkeypatch.setattr(download, "official_sha256", lambda url: None)
    for name in ("JETSON_DET_MIRROR", "JETSON_DET_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    def run(what, **options):
        defaults = dict(cache=tmp_path/"cache", say=run.lines.append, wait=.005, timeout=2., tries=4)
        return fetch(what, **{**defaults, **options})
    run.lines = []
    run.cache = tmp_path/"cache"
    return run


def left(get): return sorted(p.name for p in get.cache.rglob("*") if p.is_file() and not p.name.endswith(".lock"))


def test_whole_then_kept_then_offline(site, get):
    steps = []
    path = get(site.url, progress=lambda done, total: steps.append((done, total)))
    assert path.read_bytes() == site.data and steps[-1] == (600_000, 600_000) and steps == sorted(steps)
    assert left(get) == ["w.pth", "w.pth.json"]
    record = json.loads((path.parent/"w.pth.json").read_text())
    assert record == {"url": site.url, "sha256": hashlib.sha256(site.data).hexdigest(), "bytes": 600_000}
    site.close()
    assert get(site.url) == get(site.url, offline=True) == path and site.asked == [0]


@pytest.mark.parametrize("chunked", [False, True])
def test_cut_in_the_middle_goes_on_from_there(site, get, chunked):
    site.steps = [{"cut": 250_000, "chunked": chunked}, {"cut": 1, "chunked": chunked},
                  {"cut": 100_000, "chunked": chunked}, {"chunked": chunked}]
    assert get(site.url).read_bytes() == site.data
    assert site.asked == [0, 250_000, 250_001, 350_001], site.asked
    assert sum("going on after" in line for line in get.lines) == 3


def test_a_server_without_ranges_is_asked_for_all_of_it(site, get):
    site.steps = [{"cut": 400_000, "ranges": False}, {"ranges": False}]
    assert get(site.url).read_bytes() == site.data and site.asked == [0, 400_000]
    assert any("sends all of it again" in line for line in get.lines)


def test_always_cut_ends_and_the_next_call_goes_on(site, get):
    site.steps = [{"cut": 50_000}]
    with pytest.raises(DownloadError, match="4 times; 0.2 MB are kept"): get(site.url)
    assert site.asked == [0, 50_000, 100_000, 150_000] and not (get.cache/remote_file(site.url).folder/"w.pth").exists()
    site.steps = [{}]
    assert get(site.url).read_bytes() == site.data and site.asked[-1] == 200_000


def test_progress_renews_the_tries(get):
    data = random.Random(3).randbytes(9_000_000)
    site = Site(data, cut=1_100_000)
    assert get(site.url, tries=2).read_bytes() == data and len(site.asked) == 9
    site.close()


@pytest.mark.parametrize("how", ["honest", "ignores_if_range", "same_length", "shorter"])
def test_changed_between_two_tries(site, get, how):
    new = random.Random(8).randbytes(600_000 if how == "same_length" else 200_000 if how == "shorter" else 700_000)
    def change(s): s.data, s.etag = new, '"v2"'
    site.steps = [{"cut": 300_000}, {"then": change, "ignores_if_range": how != "honest"}, {}]
    assert get(site.url).read_bytes() == new


@pytest.mark.parametrize("etag, date, resumes", [
    ('W/"v1"', None, False),
    (None, None, False),
    (None, "now", True),
    ('W/"v1"', "now", True),
])
def test_only_a_file_with_a_mark_is_resumed(site, get, etag, date, resumes):
    site.etag = etag
    site.date = date and email.utils.formatdate(1e9, usegmt=True)
    site.steps = [{"cut": 300_000}, {}]
    assert get(site.url).read_bytes() == site.data
    assert site.asked == [0, 300_000 if resumes else 0]


def test_a_wrong_range_never_joins(site, get):
    site.steps = [{"cut": 300_000}, {"content_range": "bytes 100-599999/600000"}, {}]
    assert get(site.url).read_bytes() == site.data and site.asked == [0, 300_000, 0]
    site.steps = [{"cut": 300_000}, {"content_range": "bytes 5-3/2"}]
    with pytest.raises(DownloadError, match="Content-Range"): get(site.url + "?b")


def test_announced_too_much(site, get):
    site.steps = [{"length": 700_000, "ranges": False}]
    with pytest.raises(DownloadError, match="ended after 0.6 MB of 0.7 MB, 4 times"): get(site.url)
    site.steps = [{"length": 700_000}] # and another length when it is asked for the rest
    with pytest.raises(DownloadError, match="another file now"): get(site.url + "?b")
    assert not [n for n in left(get) if n == "w.pth"]


def test_announced_too_little_is_seen_in_a_pth(get, tmp_path):
    with zipfile.ZipFile(tmp_path/"z.pth", "w") as z: z.writestr("archive/data.pkl", random.Random(1).randbytes(50_000))
    data = (tmp_path/"z.pth").read_bytes()
    site = Site(data, length=30_000)
    with pytest.raises(DownloadError, match="cut off"): get(site.url)
    assert left(get) == []
    site.steps = [{}]
    assert get(site.url).read_bytes() == data
    site.close()


def test_an_empty_file_is_none(get):
    site = Site(b"")
    with pytest.raises(DownloadError, match="empty"): get(site.url)
    site.close()


def test_silence_ends(site, get):
    site.steps = [{"cut": 200_000, "stall": 20}, {"cut": 0, "stall": 20}, {}]
    start = time.monotonic()
    assert get(site.url, timeout=.3).read_bytes() == site.data and time.monotonic() - start < 10
    assert site.asked == [0, 200_000, 200_000]


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_busy_is_tried_again(site, get, status):
    site.steps = [{"status": status, "body": b"<html>busy</html>"}, {"cut": 100_000}, {"status": status}, {}]
    assert get(site.url).read_bytes() == site.data and site.asked == [0, 0, 100_000, 100_000]


def test_retry_after_is_kept_to(site, get):
    site.steps = [{"status": 503, "headers": {"Retry-After": "1"}}, {}]
    start = time.monotonic()
    get(site.url)
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize("status", [404, 403, 401, 410, 400])
def test_refused_is_one_line_at_once(site, get, status):
    site.steps = [{"status": status, "body": b"<html>not here</html>"}]
    with pytest.raises(DownloadError, match=f"{status}") as e: get(site.url)
    assert "\n" not in str(e.value) and site.asked == [0] and left(get) == []


@pytest.mark.parametrize("step", [
    {"body": b"\n <!DOCTYPE html><html>sign in</html>"},
    {"type": "text/html; charset=utf-8", "body": b"busy"},
    {"body": b"version https://git-lfs.github.com/spec/v1\noid"},
    {"body": b'{"error": "quota"}'},
    {"body": b"<?xml version='1.0'?><Error/>"},
])
def test_a_page_is_no_file_and_costs_nothing(site, get, step):
    site.steps = [{"cut": 250_000}, {"ranges": False, **step}]
    with pytest.raises(DownloadError, match="came instead of the file"): get(site.url)
    assert site.asked == [0, 250_000]
    site.steps = [{}] # what was there before the page still counts
    assert get(site.url).read_bytes() == site.data and site.asked[-1] == 250_000


def test_redirects_are_followed_with_the_range(site, get):
    other = Site(site.data)
    other.steps = [{"cut": 150_000}, {}]
    site.steps = [{"location": other.url}]
    assert get(site.url).read_bytes() == site.data and other.asked == [0, 150_000]
    site.steps = [{"location": site.url}]
    with pytest.raises(DownloadError, match="redirect|infinite|302"): get(site.url + "?loop")
    other.close()


def test_https_never_leads_to_http():
    import urllib.request
    with pytest.raises(DownloadError, match="from https to http:"):
        downloads._Redirects().redirect_request(urllib.request.Request("https://a.example/w"), None, 302, "", {},
                                               "http://a.example/w")


def test_nobody_there(get):
    s = Site()
    s.close()
    with pytest.raises(DownloadError, match="4 times") as e: get(s.url)
    assert "refused" in str(e.value).lower() and left(get) == []


@pytest.mark.parametrize("behavior", [{"status": 404}, {"status": 503}, {"body": b"<html>log in</html>"}, {"cut": 10}])
def test_what_cannot_be_had_may_be_put_there(get, behavior):
    "The line names the file; one that is put there is taken, and offline too."
    s = Site(**behavior)
    with pytest.raises(DownloadError) as e: get(s.url)
    s.close()
    place = re.search(r"; or get it elsewhere, and put the file at (\S+) \(make the folder where it is missing\)$",
                      str(e.value))
    assert place and Path(place[1]).is_relative_to(get.cache) and place[1].endswith("/w.pth"), e.value
    shutil.rmtree(get.cache)
    with pytest.raises(InputError, match=re.escape(f"offline: put the file at {place[1]} ")): get(s.url, offline=True)
    Path(place[1]).parent.mkdir(parents=True, exist_ok=True)
    Path(place[1]).write_bytes(s.data)
    assert str(get(s.url, offline=True)) == str(get(s.url)) == place[1]


def test_a_full_disk_has_no_room_for_a_file_from_elsewhere(site, get, monkeypatch):
    full = SimpleNamespace(free=1000)
    monkeypatch.setattr("jetson_det.downloads.shutil.disk_usage", lambda folder: full)
    with pytest.raises(DownloadError, match="the disk is full") as e: get(site.url)
    assert "elsewhere" not in str(e.value)


def test_sha256_given(site, get):
    right = hashlib.sha256(site.data).hexdigest()
    with pytest.raises(DownloadError, match=f"{'0' * 64} is expected"): get(site.url, sha256="0" * 64)
    assert left(get) == []
    path = get(site.url, sha256=right.upper())
    with pytest.raises(InputError, match="64 hexadecimal"): get(site.url, sha256="abc")
    with pytest.raises(DownloadError): get(site.url, sha256="0" * 64)
    assert path.read_bytes() == site.data # the good one stays


def test_the_first_download_is_trusted_and_no_other(site, get):
    path = get(site.url)
    assert any(hashlib.sha256(site.data).hexdigest() in line for line in get.lines)  # shown in full, the first time
    old = site.data
    path.unlink()
    site.data = random.Random(9).randbytes(600_000)
    site.etag = '"v2"'
    with pytest.raises(DownloadError, match="remove .*w.pth.json"): get(site.url)
    assert not path.exists() and not path.with_name("w.pth.part").exists()
    site.data = old
    assert get(site.url).read_bytes() == old
    path.unlink()
    path.with_name("w.pth.json").unlink()
    site.data = random.Random(9).randbytes(600_000)
    assert get(site.url).read_bytes() == site.data


def test_a_file_that_rotted_in_the_cache_is_fetched_again(site, get):
    path = get(site.url)
    data = bytearray(site.data)
    data[12345] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="offline"): get(site.url, offline=True)
    assert any("is not used: its sha256" in line for line in get.lines)
    assert get(site.url).read_bytes() == site.data
    path.with_name("w.pth.json").write_text("{}")
    with pytest.raises(InputError, match="holds no sha256"): get(site.url)


def test_a_file_put_there_by_hand_is_taken(get):
    get.cache.mkdir()
    (get.cache/"yolox_nano.pth").write_bytes(b"\x80\x02weights")
    assert get("yolox-nano", offline=True) == get.cache/"yolox_nano.pth"
    assert json.loads((get.cache/"yolox_nano.pth.json").read_text())["bytes"] == 9
    (get.cache/"yolox_s.pth").write_bytes(b"<html>saved by a browser</html>")
    with pytest.raises(InputError, match="offline"): get("yolox-s", offline=True)


def test_a_mirror_folder(site, get, tmp_path, monkeypatch):
    shelf = tmp_path/"shelf"
    shelf.mkdir()
    (shelf/"yolox_tiny.pth").write_bytes(site.data)
    assert get("yolox-tiny", offline=True, mirror=str(shelf)).read_bytes() == site.data
    monkeypatch.setenv("JETSON_DET_MIRROR", shelf.as_uri())
    monkeypatch.setenv("JETSON_DET_OFFLINE", "1")
    (shelf/"yolox_s.pth").write_bytes(site.data)
    assert get("yolox-s").read_bytes() == site.data
    with pytest.raises(InputError, match="not in .*cache and not in file:"): get("yolox-m")
    with pytest.raises(InputError, match="no such folder"): get("yolox-m", mirror=str(tmp_path/"gone"))
    (shelf/"yolox_s.pth").write_bytes(site.data[::-1])
    (get.cache/"yolox_s.pth").unlink()
    with pytest.raises(DownloadError, match="is expected"): get("yolox-s") # not what it was
    monkeypatch.delenv("JETSON_DET_OFFLINE")
    assert get(site.url).read_bytes() == site.data # the mirror has it not, the server has


def test_a_mirror_url(site, get):
    site.steps = [{"cut": 250_000}, {}]
    assert get("yolox-l", mirror=site.base + "/shelf/", offline=True).read_bytes() == site.data
    assert site.paths == ["/shelf/yolox_l.pth"] * 2 and site.asked == [0, 250_000]
    other = Site(random.Random(4).randbytes(1000))
    site.steps = [{"status": 404}]
    assert get(other.url, mirror=site.base).read_bytes() == other.data
    assert any("the mirror failed" in line for line in get.lines)
    with pytest.raises(DownloadError, match="404"): get(other.url + "?c", mirror=site.base, offline=True)
    other.close()


def test_published_checksums(site, get, tmp_path, monkeypatch):
    "Whatever an official file comes from, it is the one that was published."
    shelf = tmp_path/"shelf"
    shelf.mkdir()
    (shelf/"yolox_s.pth").write_bytes(site.data)
    monkeypatch.setattr(download, "official_sha256", lambda url: hashlib.sha256(b"published").hexdigest())
    with pytest.raises(DownloadError, match="sha256 is .* is expected"): get("yolox-s", mirror=str(shelf), offline=True)
    with pytest.raises(DownloadError, match="is expected"): get("yolox-s", mirror=site.base, offline=True)
    (get.cache/"yolox_s.pth").write_bytes(site.data)
    with pytest.raises(InputError, match="nothing is downloaded offline"): get("yolox-s", offline=True)
    assert any("is not used: its sha256" in line for line in get.lines)
    monkeypatch.setattr(download, "official_sha256", lambda url: hashlib.sha256(site.data).hexdigest())
    assert get("yolox-s", offline=True).read_bytes() == site.data
    (get.cache/"yolox_s.pth").unlink()
    (shelf/"yolox_s.pth").write_bytes(site.data[::-1])
    with pytest.raises(DownloadError, match="is expected"): get("yolox-s", mirror=str(shelf), offline=True)


def test_the_table_of_checksums():
    from jetson_det.models.weights.download import official_sha256
    from jetson_det.models.zoo import MODELS
    known = {name: model.sha256 for name, model in MODELS.items() if model.sha256}
    assert len(set(known.values())) == len(known) > 20
    for name, text in known.items():
        assert len(text) == 64 and set(text) <= set("0123456789abcdef") and MODELS[name].url
        assert official_sha256(MODELS[name].url) == text
    # six files that no trustworthy source states a sum of
    assert {name for name in official_urls() if name not in known} == {
        "rtdetr-r18", "rtdetr-r34", "rtdetr-r50", "rtdetrv2-r34", "rtdetrv2-r50", "dfine-l"}


def test_an_unencrypted_mirror_needs_a_checksum(site, get, monkeypatch):
    monkeypatch.setenv("http_proxy", site.base) # which stands for all hosts
    monkeypatch.setenv("no_proxy", "")
    mirror = "http://mirror.example/shelf"
    with pytest.raises(DownloadError, match="is not encrypted, and the checksum .* use https://"):
        get("yolox-s", mirror=mirror, offline=True)
    assert site.paths == []
    right = hashlib.sha256(site.data).hexdigest()
    assert get("yolox-s", mirror=mirror, offline=True, sha256=right).read_bytes() == site.data
    assert site.paths == [mirror + "/yolox_s.pth"]
    (get.cache/"yolox_s.pth").unlink() # its sum is still known
    assert get("yolox-s", mirror=mirror, offline=True).read_bytes() == site.data
    other = Site(random.Random(4).randbytes(1000))
    for host in ("127.0.0.1", "localhost"): # nobody is on the way
        get(f"{other.url}?{host}", mirror=f"http://{host}:{other.server.server_port}", offline=True)
    other.close()


def test_the_proxy_of_the_environment(site, get, monkeypatch):
    monkeypatch.setenv("http_proxy", site.base)
    monkeypatch.setenv("no_proxy", "")
    assert get("http://weights.example/far.pth").read_bytes() == site.data
    assert site.paths == ["http://weights.example/far.pth"]


def test_files_of_one_name_are_kept_apart(site, get):
    other = Site(random.Random(5).randbytes(1000))
    for s in (site, other, site): assert get(s.url).read_bytes() == s.data
    other.close()


def test_a_name_never_leaves_the_folder():
    for url, name in {
            "http://h/a/..%2F..%2Fetc%2Fx.pth": "_.._etc_x.pth", "http://h/.hidden": "hidden",
            "http://h/a%00b.pth": "a_b.pth", "http://h/x.pth?token=1#y": "x.pth"
    }.items():
        assert remote_file(url).name == name
    for url in ("http://h/", "http://h/a/..", "http:///x.pth", "file:///etc/passwd"):
        with pytest.raises(InputError): remote_file(url)


def test_locate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JETSON_DET_OFFLINE", "1")
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path/"c"))
    (tmp_path/"run").mkdir()
    assert str(locate("run")) == "run"
    for text, part in {
            "yolox_nano.pth": "say weights=yolox-nano", "runs/yolox_s.pth": "say weights=yolox-s",
            "yolox-n": "did you mean", "a/b": "nothing is downloaded offline", "run/b": "no such file or folder",
            "a/b.pth": "no such file or folder, and no official weights", "no.onnx": "no such file",
            "yolox-x": "offline"
    }.items():
        with pytest.raises(InputError, match=part): locate(text)
    # all lie side by side in the cache
    assert len({url.rsplit("/", 1)[1] for url in official_urls().values()}) == len(official_urls())
    for url in official_urls().values():
        assert url.startswith("https://github.com/") and url.endswith((".pth", ".pt"))


def test_official_names_are_models():
    from jetson_det.models.yolox.network import YOLOX
    from jetson_det.models.zoo import MODELS
    assert set(official_urls()) <= set(MODELS) and set(YOLOX.names) <= set(official_urls())


# ---- other processes

CALL = (
    "import sys; from jetson_det.models.weights.download import fetch; print(fetch(sys.argv[1], sys.argv[2], wait=.01,"
    " say=lambda l: print(l, file=sys.stderr)))"
)

def start(url, cache, code=CALL):
    return subprocess.Popen([sys.executable, "-c", code, url, str(cache)],
                            stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE,
                            text=True)


def until(what, seconds=20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never happened"
        time.sleep(.005)


@posix
@pytest.mark.parametrize("after", [100_000, 300_000, 520_000])
def test_killed_goes_on_from_its_last_byte(site, get, after):
    site.steps = [{"cut": after, "stall": 30}]
    part = get.cache/remote_file(site.url).folder/"w.pth.part"
    p = start(site.url, get.cache)
    until(lambda: part.exists() and part.stat().st_size >= after)
    p.send_signal(signal.SIGKILL)
    p.communicate()
    have = part.stat().st_size
    assert have == after
    site.steps = [{}]
    assert get(site.url).read_bytes() == site.data and site.asked == [0, have] and left(get) == ["w.pth", "w.pth.json"]


@posix
def test_killed_between_the_last_byte_and_the_name(site, get, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(downloads, "_accept", lambda *a: os._exit(9))
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException): get(site.url)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert get(site.url).read_bytes() == site.data and site.asked == [0]


@posix
def test_two_at_once_download_once(site, get):
    gate = threading.Event()
    site.steps = [{"gate": gate, "at": 400_000}]
    first = start(site.url, get.cache)
    until(lambda: site.asked)
    others = [start(site.url, get.cache) for _ in range(2)]
    for p in others: assert "another process downloads it" in p.stderr.readline()
    gate.set()
    done = [p.communicate(timeout=60)[0] for p in (first, *others)]
    assert [p.returncode for p in (first, *others)] == [0, 0, 0] and len(set(done)) == 1 and site.asked == [0]


@posix
def test_one_that_waits_takes_over_when_the_first_is_killed(site, get):
    site.steps = [{"cut": 150_000, "stall": 30}, {}]
    first = start(site.url, get.cache)
    part = get.cache/remote_file(site.url).folder/"w.pth.part"
    until(lambda: part.exists() and part.stat().st_size == 150_000)
    second = start(site.url, get.cache)
    assert "waiting" in second.stderr.readline()
    first.kill()
    out, _ = second.communicate(timeout=60)
    first.communicate()
    assert second.returncode == 0 and open(out.strip(), "rb").read() == site.data and site.asked == [0, 150_000]


@posix
def test_a_full_disk_is_one_line_and_the_part_stays(site, get):
    limit = (
        "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000));"
        " signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    )
    code = (
        limit
        + "import sys\nfrom jetson_det.models.weights.download import fetch, DownloadError\ntry: fetch(sys.argv[1],"
        " sys.argv[2], say=lambda l: None)\nexcept DownloadError as e: sys.exit(str(e))"
    )
    p = start(site.url, get.cache, code)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 1 and err.count("\n") == 1 and "make room and start again" in err, err
    part = get.cache/remote_file(site.url).folder/"w.pth.part"
    assert part.stat().st_size == 250_000
    assert get(site.url).read_bytes() == site.data and site.asked == [0, 250_000]


def test_no_space_left(site, get, monkeypatch):
    write = os.write
    room = [180_000]
    def little(fd, data):
        if not room[0]: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n = write(fd, data[:room[0]])
        room[0] -= n
        return n
    with monkeypatch.context() as m:
        m.setattr(downloads.os, "write", little)
        with pytest.raises(DownloadError, match="No space left on device after .* make room") as e: get(site.url)
        assert "\n" not in str(e.value)
    assert get(site.url).read_bytes() == site.data and site.asked == [0, 180_000]
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DownloadError, match="0.0 MB are free and 0.6 MB are still to come"): get(site.url + "?d")


def test_a_cache_that_cannot_be(tmp_path, get):
    (tmp_path/"file").write_text("")
    with pytest.raises(InputError, match="cannot be made"): get("yolox-nano", cache=tmp_path/"file"/"cache")
