"Datasets by name and URL, from a server that cuts: resumed, checked, room looked at, unpacked safely, whole or not."
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from jetson_det.cli import main
from jetson_det.data import download
from jetson_det.data.download import DATASETS, Part, describe_download, download_dataset
from jetson_det.data.formats.registry import read_dataset
from jetson_det.downloads import DownloadError
from jetson_det.runtime.files import InputError
from jetson_det.scenes.docks import write_scenes
from servers import Site


class Files(Site):
    "A server of several files."
    def __init__(self, files, **behavior):
        super().__init__(b"", **behavior)
        self.files = files

    def answer(self, h):
        self.data = self.files[h.path.split("?")[0].rsplit("/", 1)[-1]]
        self.etag = f'"{hashlib.md5(self.data).hexdigest()}"'
        super().answer(h)


def zipped(folder, top=""):
    "The bytes of a zip of a folder."
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as z:
        for file in sorted(folder.rglob("*")):
            if file.is_file(): z.write(file, os.path.join(top, file.relative_to(folder)))
    return content.getvalue()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("origin")
    return write_scenes(folder/"dock", count=8, size=(96, 128), splits={"train": .5, "val": .5})


@pytest.fixture(scope="module")
def coco(scenes):
    "The three archives of COCO in miniature: file name -> bytes."
    files = {}
    annotations = io.BytesIO()
    with zipfile.ZipFile(annotations, "w") as z:
        for split in ("train", "val"):
            source = next(f for f in scenes.rglob("*.json") if split in f.name)
            table = json.loads(source.read_text())
            images = io.BytesIO()
            with zipfile.ZipFile(images, "w") as zi:
                for row in table["images"]:
                    found = next(scenes.rglob(os.path.basename(row["file_name"])))
                    row["file_name"] = found.name
                    zi.write(found, f"{split}2017/{found.name}")
            files[f"{split}2017.zip"] = images.getvalue()
            z.writestr(f"annotations/instances_{split}2017.json", json.dumps(table))
            z.writestr(f"annotations/captions_{split}2017.json", json.dumps({"images": [], "annotations": []}))
    files["annotations_trainval2017.zip"] = annotations.getvalue()
    return files


@pytest.fixture
def site(coco, monkeypatch):
    "The server, and a table that points to it."
    for name in ("JETSON_DET_MIRROR", "JETSON_DET_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    s = Files(coco)
    def moved(part):
        name = part.url.rsplit("/", 1)[1]
        data = coco[name]
        return part._replace(url=f"{s.base}/{name}", bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(DATASETS, "coco", tuple(map(moved, DATASETS["coco"])))
    yield s
    s.close()


def get(source, folder, *words, lines=None, **options):
    say = (lines if lines is not None else []).append
    return download_dataset(source, folder, *words, say=say, wait=.005, **{"timeout": 2., "tries": 3, **options})


@pytest.mark.parametrize("split, counts", [("both", {"train": 4, "val": 4}), ("train", {"": 4}),
                                           ("val", {"": 4})])
def test_coco_is_ready_to_train(site, tmp_path, split, counts):
    folder = get("coco", tmp_path/"coco", split)
    ds = read_dataset(folder)
    assert {name: int((ds.splits == name).sum()) for name in ds.split_names} == counts and len(ds.boxes)
    names = sorted(p.name for p in (folder/"annotations").iterdir())
    assert names == [f"instances_{name}2017.json" for name in ("train", "val") if split in (name, "both")]
    assert [p.name for p in tmp_path.iterdir()] == ["coco"]
    assert ("evaluate" if split == "val" else "train") in describe_download(folder, split).splitlines()[1]


@pytest.mark.parametrize("cuts", [[30], [1, 5_000, 6_000], [None, 700, 700, None, 9]])
def test_a_server_that_cuts(site, tmp_path, cuts):
    site.steps = [{"cut": cut} if cut else {} for cut in cuts] + [{}]
    folder = get("coco", tmp_path/"coco", tries=9)
    assert len(read_dataset(folder)) == 8 and [p.name for p in tmp_path.iterdir()] == ["coco"]


def test_what_has_come_stays_for_the_next_call(site, tmp_path):
    site.steps = [{}, {"cut": 3000}, {"status": 404}]
    with pytest.raises(DownloadError, match="404"): get("coco", tmp_path/"coco")
    assert not (tmp_path/"coco").exists()
    site.steps = [{}]
    asked = len(site.asked)
    with pytest.raises(InputError, match="another download"): get("coco", tmp_path/"coco", "val")
    folder = get("coco", tmp_path/"coco")
    assert site.asked[asked:] == [3000, 0] and len(read_dataset(folder)) == 8 # the annotations were done


def test_a_wrong_sum_is_refused(site, tmp_path, monkeypatch):
    parts = DATASETS["coco"]
    monkeypatch.setitem(DATASETS, "coco", (parts[0]._replace(sha256="0" * 64), *parts[1:]))
    with pytest.raises(DownloadError, match="sha256 is .* is expected"): get("coco", tmp_path/"coco")
    assert not (tmp_path/"coco").exists() and not list(tmp_path.rglob("*.zip"))
    url = f"{site.base}/val2017.zip"
    with pytest.raises(DownloadError, match="is expected"): get(url, tmp_path/"x", sha256="0" * 64)
    assert get(url, tmp_path/"y", sha256=hashlib.sha256(site.files["val2017.zip"]).hexdigest()).is_dir()


def test_room_is_looked_at_before_the_first_byte(site, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000, total=10**9))
    with pytest.raises(DownloadError, match="are free there: make room"): get("coco", tmp_path/"coco")
    assert site.asked == [] and not list(tmp_path.iterdir())


def test_offline_says_where_the_file_is(site, tmp_path):
    with pytest.raises(InputError, match=r"nothing is downloaded offline: put the file at \S+ .*; it is at http"):
        get("coco", tmp_path/"coco", offline=True)
    assert site.asked == [] and not list(tmp_path.iterdir())


def test_archives_from_elsewhere_may_be_put_there(site, coco, tmp_path):
    "Where the network fails the line says where, archive by archive; then nothing is asked for."
    site.close()
    for _ in DATASETS["coco"]:
        with pytest.raises(DownloadError) as e: get("coco", tmp_path/"coco", tries=1)
        place = Path(re.search(r"and put the file at (\S+) \(make the folder where it is missing\)$", str(e.value))[1])
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(coco[place.name])
    assert len(read_dataset(get("coco", tmp_path/"coco", tries=1))) == 8 and site.asked == []


def test_a_mirror_folder_is_enough(site, coco, tmp_path):
    (tmp_path/"shelf").mkdir()
    for name, data in coco.items(): (tmp_path/"shelf"/name).write_bytes(data)
    folder = get("coco", tmp_path/"coco", offline=True, mirror=str(tmp_path/"shelf"))
    assert site.asked == [] and len(read_dataset(folder)) == 8


def test_the_official_table():
    "Sizes and sums have the right form, and each split has its images and its labels."
    for parts in DATASETS.values():
        for part in parts:
            assert isinstance(part, Part) and part.bytes > 2**20 and len(part.sha256) == 64 and int(part.sha256, 16)
    assert len({part.sha256 for part in DATASETS["coco"]}) == 3
    sizes = [part.bytes for part in DATASETS["coco"]]
    assert sum(sizes) + max(sizes) < download._room_needed(sizes) < 50e9


def evil(kind):
    "An archive that tries to leave its folder."
    content = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(content, "w") as z: z.writestr("../../escaped.txt", "x")
        return content.getvalue()
    with tarfile.open(fileobj=content, mode="w:gz") as t:
        info = tarfile.TarInfo("images/a" if kind == "link" else "/absolute.txt")
        if kind == "link":
            info.type = tarfile.SYMTYPE
            info.linkname = "../../../etc/passwd"
            t.addfile(info)
        else:
            info.size = 1
            t.addfile(info, io.BytesIO(b"x"))
    return content.getvalue()


@pytest.mark.parametrize("kind", ["zip", "link", "absolute"])
def test_an_archive_that_leads_out_is_refused(tmp_path, kind, monkeypatch):
    monkeypatch.delenv("JETSON_DET_MIRROR", raising=False)
    name = "a.zip" if kind == "zip" else "a.tar.gz"
    s = Files({name: evil(kind)})
    with pytest.raises(InputError, match="leads out|absolute path"): get(f"{s.base}/{name}", tmp_path/"in"/"x")
    s.close()
    assert not (tmp_path/"in"/"x").exists() and not list(tmp_path.rglob("escaped.txt"))


@pytest.mark.parametrize("address", ["{base}/dock.zip", "{base}/dock.zip?key=secret/with=signs", "{base}/ds/dock.zip"])
def test_any_url(scenes, tmp_path, address, monkeypatch):
    monkeypatch.delenv("JETSON_DET_MIRROR", raising=False)
    s = Files({"dock.zip": zipped(scenes, "top")})
    folder = get(address.format(base=s.base), tmp_path/"dock")
    s.close()
    assert len(read_dataset(folder)) == 8 and not list(folder.glob(".jetson*"))


def test_into_an_empty_folder_that_is_there(site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"here").mkdir()
    monkeypatch.chdir(tmp_path/"here")
    assert len(read_dataset(get("coco", "."))) == 8
    with pytest.raises(InputError, match="already"): get("coco", ".")


@pytest.mark.parametrize("words, part", [
    (["coko", "x"], "did you mean 'coco'?"),
    (["coco", "x", "--split", "tset"], "--split tset"),
    (["ftp://a/b.zip", "x"], "ftp:// is not downloaded from"),
    (["http://localhost/", "x"], "names no file"),
    (["coco"], "the new folder is missing"),
])
def test_mistakes_are_one_line(words, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "download", *words]) == 2
    err = capsys.readouterr().err
    assert part in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_the_verb(site, tmp_path, capsys):
    words = ["data", "download", "coco", str(tmp_path/"coco"), "--split", "val", "--json", str(tmp_path/"j.json")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "4 images" in out and "next: jetson-det evaluate" in out
    assert json.loads((tmp_path/"j.json").read_text())["source"] == "coco"


def test_killed_between_download_and_name(site, tmp_path):
    "A process that dies while it unpacks leaves no folder; the next call ends the work without another download."
    code = f"""import os, sys
sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r})
from jetson_det.data import download
download.DATASETS["coco"] = tuple(download.Part(*p) for p in {[tuple(p) for p in DATASETS['coco']]!r})
download._take = lambda *a: os._exit(9)
download.download_dataset("coco", {str(tmp_path/'coco')!r}, say=lambda line: None)"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert not (tmp_path/"coco").exists()
    asked = len(site.asked)
    get("coco", tmp_path/"coco")
    assert len(site.asked) == asked + 2 and len(read_dataset(tmp_path/"coco")) == 8


@pytest.mark.parametrize("sha256", ["0000", "g" * 64, "0" * 65])
def test_a_digest_of_another_form_is_refused_before_the_download(tmp_path, sha256):
    "Nothing listens at the address."
    for source in ("http://127.0.0.1:9/a.zip", "coco"):
        with pytest.raises(InputError, match="64 hexadecimal digits"):
            download_dataset(source, tmp_path/"new", sha256=sha256)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sign", ["data.yaml", "images labels", "JPEGImages", "images annotations"])
def test_no_download_into_a_dataset(tmp_path, sign):
    "It would be read with it."
    (tmp_path/"free"/"images").mkdir(parents=True)
    for name in sign.split(): (tmp_path/"data"/name).mkdir(parents=True)
    os.symlink("data", tmp_path/"link")
    for inside in (tmp_path/"data"/"new", tmp_path/"data"/"a"/"b", tmp_path/"link"/"new"):
        with pytest.raises(InputError, match="lies in the dataset"):
            download_dataset("http://127.0.0.1:9/a.zip", inside)
    assert sorted(p.name for p in (tmp_path/"data").iterdir()) == sorted(sign.split())
    with pytest.raises(DownloadError): download_dataset("http://127.0.0.1:9/a.zip", tmp_path/"free"/"new", tries=1)
