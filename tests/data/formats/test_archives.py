"""Archives of datasets: what is unpacked, what is refused, and that nothing is ever written elsewhere."""
import io
import multiprocessing
import os
import random
import shutil
import stat
import tarfile
import time
import zipfile

import pytest
from hypothesis import given, strategies as st

from jetson_det.core import InputError
from jetson_det.data.formats.archives import Limits, is_archive, open_archive, _safe_name
from jetson_det.data.formats.registry import read_dataset
from jetson_det.scenes.docks import write_scenes

KINDS = {"zip": "zip", "tar": "tar", "gztar": "tar.gz", "bztar": "tar.bz2", "xztar": "tar.xz"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "A cache folder of the test's own, in a place where whatever leaves it is seen."
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path / "around" / "cache"))
    return tmp_path / "around" / "cache"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes") / "my scenes", 6, (240, 320), seed=3)


def make_zip(path, members):
    "members: {name or ZipInfo: bytes}"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in members.items(): z.writestr(name, data)
    return path


def make_tar(path, members):
    "members: [(TarInfo fields, bytes)]"
    with tarfile.open(path, "w" + {".gz": ":gz", ".bz2": ":bz2", ".xz": ":xz"}.get(path.suffix, "")) as t:
        for fields, data in members:
            info = tarfile.TarInfo()
            for k, v in dict(fields, size=len(data)).items(): setattr(info, k, v)
            t.addfile(info, io.BytesIO(data))
    return path


def make_archive(path, members):
    "A zip or a tar of {name: content}, by the suffix."
    if path.suffix == ".zip": make_zip(path, members)
    else: make_tar(path, [(dict(name=name), data) for name, data in members.items()])


def refused(path, *parts, **kw):
    "It is refused in one line, and nothing is left of it."
    before = everything(path.parent)
    with pytest.raises(InputError) as e: open_archive(path, **kw)
    line = str(e.value)
    assert "\n" not in line and all(p in line for p in parts), line
    assert everything(path.parent) == before
    return line


def everything(folder):
    ours = ("around", "cache", "unpacked") # folders of the tests
    found = [p for p in folder.rglob("*") if not (p.is_dir() and p.name in ours)]
    return sorted(p.relative_to(folder).as_posix() for p in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top", [True, False])
def test_every_kind_gives_the_same_dataset(tmp_path, scenes, kind, top):
    path = shutil.make_archive(str(tmp_path/"a b"), kind, scenes.parent if top else scenes,
                               scenes.name if top else None)
    assert path.endswith(KINDS[kind]) and is_archive(path)
    lines = []
    folder = open_archive(path, say=lines.append)
    assert read_dataset(folder).fingerprint() == read_dataset(scenes).fingerprint()
    assert (folder.name == scenes.name) == top
    def times(): return {p: p.stat().st_mtime_ns for p in folder.rglob("[!.]*")}
    before = times()
    assert open_archive(path, say=lines.append) == folder
    assert len(lines) == 1
    assert times() == before


def test_a_changed_archive_is_unpacked_anew(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"x.txt": b"1" * 100})
    first = open_archive(path)
    told = path.stat()
    make_zip(path, {"x.txt": b"2" * 100})
    os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns)) # same size, same time: the content tells
    assert path.stat().st_size == told.st_size
    second = open_archive(path)
    assert first != second and (second / "x.txt").read_text() == "2" * 100
    os.utime(path, ns=(1, 1))
    assert open_archive(path) not in (first, second)


def test_into_a_folder(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"d/x.txt": b"1"})
    into = tmp_path / "new" / "place"
    assert open_archive(path, into) == into / "d" == open_archive(path, into)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    refused(path, "full is there already", into=tmp_path / "full")
    (tmp_path / "empty").mkdir()
    assert (open_archive(path, tmp_path / "empty") / "x.txt").read_text() == "1"
    refused(make_zip(tmp_path / "b.zip", {"x": b""}), "is there already", into=into)


BAD_NAMES = ["../x", "a/../../x", "/x", "\\x", "C:\\x", "c:x", "..\\x", "a/b/../../../x", "//server/x"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_member_leaves_the_target(tmp_path, name):
    (tmp_path / "around/cache/unpacked").mkdir(parents=True)
    refused(make_zip(tmp_path / "a.zip", {"ok.txt": b"1", name: b"evil"}), "a.zip: the member ", ascii(name)[:-1])
    refused(make_tar(tmp_path/"a.tar", [(dict(name="ok.txt"), b"1"), (dict(name=name), b"evil")]), "a.tar: the member ")
    refused(make_tar(tmp_path / "b.tar.gz", [(dict(name=name, type=tarfile.DIRTYPE), b"")]), "the member ")


@given(st.lists(st.sampled_from(["..", ".", "", "a", "b c", "C:", "~", "%", "é"]), min_size=1, max_size=6),
       st.sampled_from(["/", "\\"]))
def test_safe_names_stay_inside(parts, sep):
    try: name = _safe_name(sep.join(parts))
    except InputError: assert ".." in parts or parts[0] in ("", "C:")
    else: assert os.path.normpath(os.path.join("/root", name)).startswith("/root") and ".." not in name.split("/")


def test_nul_in_a_name(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a_b.txt": b"1"})
    path.write_bytes(path.read_bytes().replace(b"a_b.txt", b"a\0b.txt"))
    refused(path, "NUL")


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Z"])
def test_devices_are_refused(tmp_path, kind):
    refused(make_tar(tmp_path/"a.tar", [(dict(name="dev", type=kind), b"")]),
            "the member 'dev' is neither a file nor a folder")
    if kind == b"Z": return
    info = zipfile.ZipInfo("dev")
    info.external_attr = (
        {tarfile.CHRTYPE: stat.S_IFCHR, tarfile.BLKTYPE: stat.S_IFBLK, tarfile.FIFOTYPE: stat.S_IFIFO}[kind]
        | 0o600) << 16
    refused(make_zip(tmp_path / "a.zip", {info: b""}), "the member 'dev' is neither a file nor a folder")


def links(tmp_path, *pairs, hard=()):
    members = [(dict(name="d/a.txt"), b"text")]
    for n, to in pairs:
        members.append((dict(name=n, linkname=to, type=tarfile.LNKTYPE if n in hard else tarfile.SYMTYPE), b""))
    members.append((dict(name="e/z.txt"), b"last"))
    return make_tar(tmp_path / "a.tar", members)


@pytest.mark.parametrize("to", ["/etc/passwd", "../../outside.txt", "..", "../../..", "../nothing.txt", "l"])
def test_links_out_are_refused(tmp_path, to):
    (tmp_path / "around").mkdir()
    (tmp_path / "around/outside.txt").write_text("secret")
    refused(links(tmp_path, ("d/l", to if to != ".." else "../..")), "the link 'd/l' leads")
    info = zipfile.ZipInfo("d/l")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    refused(make_zip(tmp_path / "a.zip", {"d/a.txt": b"", info: to if to != ".." else "../.."}), "the link 'd/l' leads")


def test_hard_link_out_is_refused(tmp_path):
    refused(links(tmp_path, ("d/l", "../../outside.txt"), hard={"d/l"}), "leads out")


def test_nothing_is_written_through_a_link(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    refused(
        make_tar(tmp_path/"a.tar", [(dict(name="d", type=tarfile.SYMTYPE, linkname=str(outside)), b""),
                                    (dict(name="d/x.txt"), b"evil")]), "d")
    refused(
        make_tar(tmp_path/"b.tar", [(dict(name="d", type=tarfile.SYMTYPE, linkname="e"), b""),
                                    (dict(name="e", type=tarfile.SYMTYPE, linkname=".."), b""),
                                    (dict(name="d/x.txt"), b"evil")]), "")
    assert not any(outside.iterdir())


def test_links_inside_are_made(tmp_path):
    folder = open_archive(
        links(tmp_path, ("b.txt", "d/a.txt"), ("c.txt", "b.txt"), ("h.txt", "d/a.txt"), ("more", "e"), hard={"h.txt"}))
    expected = ["text", "text", "text", "last"]
    assert [(folder/n).read_text() for n in ("b.txt", "c.txt", "h.txt", "more/z.txt")] == expected
    assert not (folder / "b.txt").is_symlink()


def test_a_long_chain_of_links_ends(tmp_path):
    start = time.monotonic()
    refused(links(tmp_path, *((f"l{k}", f"l{k + 1}") for k in range(3000))), "leads to nothing")
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("suffix", ["zip", "tar.gz", "tar.xz"])
def test_bombs(tmp_path, suffix):
    data = bytes(70 << 20)
    path = tmp_path / f"a.{suffix}"
    make_archive(path, {"a": data})
    refused(path, "its content is over 64 MiB")


def test_limits(tmp_path):
    path = make_zip(tmp_path / "a.zip", {f"{k}.txt": os.urandom(1000) for k in range(20)})
    refused(path, "over 10 members", limits=Limits(files=10))
    refused(path, "its content is over 0 MiB", limits=Limits(size=5000))
    refused(path, "does not fit on the disk", limits=Limits(spare=1 << 60))
    tar = make_tar(tmp_path / "a.tar", [(dict(name=f"{k}"), os.urandom(1000)) for k in range(20)])
    refused(tar, "over 10 members", limits=Limits(files=10))
    refused(tar, "its content is over 0 MiB", limits=Limits(size=5000))
    refused(tar, "does not fit on the disk", limits=Limits(spare=1 << 60))


def test_a_zip_that_lies_about_sizes(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a.txt": b"x" * 5000})
    data = path.read_bytes()
    path.write_bytes(data.replace((5000).to_bytes(4, "little"), (50).to_bytes(4, "little")))
    refused(path, "not a whole archive")


def test_a_zip_whose_table_swallows_entries(tmp_path):
    path = make_zip(tmp_path / "a.zip", {f"{k}.txt": b"x" for k in range(6)})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 32] = 46 + len("1.txt") # the first entry's comment: as long as the second entry
    path.write_bytes(data)
    refused(path, "its table names 6 members")


def test_encrypted_zip(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a.txt": b"x"})
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    refused(path, "it is encrypted")


def test_names_of_a_zip_in_utf8_without_the_bit(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"Straße 写真.txt": b"x"})
    data = path.read_bytes()
    assert (0x800).to_bytes(2, "little") in data
    path.write_bytes(
        data.replace(b"PK\3\4\x14\0\0\x08", b"PK\3\4\x14\0\0\0").replace(b"PK\1\2\x14\x03\x14\0\0\x08",
                                                                         b"PK\1\2\x14\x03\x14\0\0\0"))
    assert [p.name for p in open_archive(path).iterdir() if p.suffix == ".txt"] == ["Straße 写真.txt"]


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_cut_archives_are_never_half_a_dataset(tmp_path, suffix):
    members = {f"d/{k}.txt": os.urandom(700) for k in range(6)}
    path = tmp_path / f"a.{suffix}"
    make_archive(path, members)
    data = path.read_bytes()
    end = len(data.rstrip(b"\0")) + 1 if suffix == "tar" else len(data)
    for n in sorted({0, 1, 100, 511, 512, 1024, 1536, end // 2, *range(512, end - 1, 900), end - 300}):
        if n >= end: continue
        path.write_bytes(data[:n])
        refused(path)


def test_damaged_archives_give_one_line_or_all_files(tmp_path):
    rng = random.Random(0)
    members = {f"d/{k}.txt": rng.randbytes(200) + b"text " * 40 for k in range(5)}
    for suffix in ("zip", "tar", "tar.gz", "tar.bz2", "tar.xz"):
        path = tmp_path / f"a.{suffix}"
        make_archive(path, members)
        data = path.read_bytes()
        for _ in range(60):
            bad = bytearray(data)
            for _ in range(rng.choice((1, 1, 5))): bad[rng.randrange(len(bad))] = rng.randrange(256)
            path.write_bytes(bad)
            try: folder = open_archive(path, tmp_path / "into")
            except InputError as e: assert "\n" not in str(e) and str(path) in str(e)
            else: assert sum(p.is_file() for p in folder.rglob("*") if not p.name.startswith(".")) == 5
            shutil.rmtree(tmp_path / "into", ignore_errors=True)
    assert everything(tmp_path) == sorted(f"a.{s}" for s in ("zip", "tar", "tar.gz", "tar.bz2", "tar.xz"))


def test_what_is_no_archive(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"no zip")
    (tmp_path / "b.tar.gz").write_bytes(b"no tar")
    refused(tmp_path / "a.zip", "a.zip: not a whole archive")
    refused(tmp_path / "b.tar.gz", "b.tar.gz: not a whole archive")
    with pytest.raises(InputError, match="cannot be read"): open_archive(tmp_path / "nothing.zip")
    assert not is_archive(tmp_path / "nothing.zip") and not is_archive(tmp_path)


def test_zstandard(tmp_path):
    path = make_tar(tmp_path / "a.tar", [(dict(name="x.txt"), b"1" * 1000)])
    try: import zstandard
    except ImportError:
        (tmp_path / "a.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(50))
        if not shutil.which("python3.14"): refused(tmp_path / "a.tar.zst", "zstandard is needed")
        return
    (tmp_path / "a.tar.zst").write_bytes(zstandard.compress(path.read_bytes()))
    assert (open_archive(tmp_path / "a.tar.zst") / "x.txt").read_text() == "1" * 1000


def _open(path): return str(open_archive(path))


def test_two_processes_at_once(tmp_path, cache):
    path = make_zip(tmp_path / "a.zip", {f"d/{k}.txt": os.urandom(500) for k in range(300)})
    with multiprocessing.get_context("fork").Pool(4) as pool: folders = pool.map(_open, [path] * 8)
    assert len(set(folders)) == 1 and len(os.listdir(folders[0])) == 300
    assert [p.name.endswith(".part") for p in (cache / "unpacked").iterdir()] == [False]


def test_old_ones_are_forgotten(tmp_path, cache):
    old = open_archive(make_zip(tmp_path / "a.zip", {"a.txt": b"1"}))
    kept = open_archive(make_zip(tmp_path / "b.zip", {"a.txt": b"2"}))
    os.utime(old / ".jetson_det_archive.json", (1, 1))
    new = open_archive(make_zip(tmp_path / "c.zip", {"a.txt": b"3"}))
    assert not old.exists() and kept.exists() and new.exists()
