"""What is not a regular file is never read from; an archive's labels reach nothing outside it; the lines of a file that
is named as a list are not shown."""
import os
import socket
import tarfile
import threading
import zipfile

import pytest
from label_files import image_bytes, put

from jetson_det.core import InputError
from jetson_det.data.formats.registry import read_dataset
from jetson_det.data.quality.check import check_dataset
from jetson_det.runtime.files import open_regular


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path / "cache"))


def make_pipe(path): os.mkfifo(path)


def make_link_to_pipe(path):
    os.mkfifo(str(path) + ".pipe")
    os.symlink(str(path) + ".pipe", path)


def make_endless(path): os.symlink("/dev/zero", path)


def make_socket(path):
    s = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(path.parent) # such a name has at most 107 bytes
    try: s.bind(path.name)
    finally: os.chdir(here)
    s.close()


def make_loop(path): os.symlink(path.name, path)


ODD = [make_pipe, make_link_to_pipe, make_endless, make_socket, make_loop]


def in_time(call):
    "What a call gives or raises; a reader that waits for ever fails the test."
    result = []
    def run():
        try: result.append(call())
        except InputError as e: result.append(e)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert result, "it waits for ever"
    return result[0]


@pytest.mark.parametrize("make", ODD)
def test_open_regular(tmp_path, make):
    make(tmp_path / "odd")
    with pytest.raises(OSError): open_regular(tmp_path / "odd")


LABELED = {"images/a.jpg": image_bytes(), "images/b.jpg": image_bytes(), "labels/a.txt": "0 .5 .5 .5 .5",
           "labels/b.txt": "0 .5 .5 .5 .5", "data.yaml": "train: images\nnames: [cat]\n"}


@pytest.mark.parametrize("make", ODD)
def test_an_image_that_is_no_file(tmp_path, make):
    put(tmp_path / "d", LABELED)
    make(tmp_path / "d/images/c.jpg")
    ds = in_time(lambda: read_dataset(tmp_path / "d"))
    assert len(ds) == 2
    report = in_time(lambda: check_dataset(tmp_path / "d", max_flawed=1))
    assert len(report.ds) == 2 and [f.file for f in report.flaws if f.severity == "warning"] in (["images/c.jpg"], [])


@pytest.mark.parametrize("make", ODD)
@pytest.mark.parametrize("format, files, name", [
    ("yolo", LABELED, "labels/c.txt"),
    ("yolo", {**LABELED, "images/c.jpg": image_bytes()}, "labels/c.txt"),
    ("yolo", {k: v for k, v in LABELED.items() if k != "data.yaml"}, "data.yaml"),
    ("yolo", {**LABELED, "data.yaml": "train: list.txt\nnames: [cat]\n"}, "list.txt"),
    ("yolo", {**LABELED, "data.yaml": "train: images\nval: more\nnames: [cat]\n"}, "more"),
    ("coco", {"images/a.jpg": image_bytes()}, "annotations.json"),
    ("voc", {"a.jpg": image_bytes()}, "a.xml"),
    ("csv", {"a.jpg": image_bytes()}, "labels.csv"),
    ("labelme", {"a.jpg": image_bytes()}, "a.json"),
    ("cvat", {"images/a.jpg": image_bytes()}, "annotations.xml"),
    ("kitti", {"image_2/a.jpg": image_bytes()}, "label_2/a.txt"),
    ("openimages", {"images/a.jpg": image_bytes()}, "train-annotations-bbox.csv"),
    ("plates", {"a.jpg": image_bytes()}, "a.txt"),
])
def test_a_label_that_is_no_file(tmp_path, format, files, name, make):
    "One line, or the file is stepped over; by itself and as the folder's only labels."
    put(tmp_path / "d", files)
    (tmp_path / "d" / name).parent.mkdir(exist_ok=True)
    make(tmp_path / "d" / name)
    for known in (format, "auto"):
        result = in_time(lambda: read_dataset(tmp_path / "d", known))
        if isinstance(result, InputError): assert "\n" not in str(result)


SECRET = "root:x:0:0:alice:/root:/bin/bash\ndaemon:s3cr3t\n"


@pytest.mark.parametrize("labels", [
    {"data.yaml": "train: SECRET\nnames: [cat]\n"},
    {"data.yaml": "train: images\nval: SECRET\nnames: [cat]\n"},
    {"data.yaml": "path: /\ntrain: .SECRET\nnames: [cat]\n"},
    {"obj.data": "classes = 1\ntrain = SECRET\nnames = obj.names\n", "obj.names": "cat\n"},
])
def test_the_lines_of_a_list_are_not_shown(tmp_path, labels):
    (tmp_path / "secret.txt").write_text(SECRET)
    files = {name: text.replace("SECRET", str(tmp_path / "secret.txt")) for name, text in labels.items()}
    put(tmp_path / "d", {**{k: v for k, v in LABELED.items() if k != "data.yaml"}, **files})
    with pytest.raises(InputError) as e: read_dataset(tmp_path / "d", "yolo")
    assert "s3cr3t" not in str(e.value) and "alice" not in str(e.value) and "secret.txt" in str(e.value)
    report = check_dataset(tmp_path / "d", "yolo")
    assert "s3cr3t" not in str(report) and "alice" not in str(report)


def test_a_list_with_some_other_lines(tmp_path):
    put(tmp_path / "d", {**LABELED, "data.yaml": "train: list.txt\nnames: [cat]\n",
                         "list.txt": "images/a.jpg\ndaemon:s3cr3t\nimages/gone.jpg\n/etc/passwd\n/dev/zero\n"})
    ds = read_dataset(tmp_path / "d")
    assert len(ds) == 1 and ds.root == tmp_path / "d"
    assert [f.message for f in ds.flaws if f.kind == "missing-image"][:4] == [
        "list.txt, line 2: names no image", "list.txt: images/gone.jpg is not there",
        "list.txt, line 4: names no image", "list.txt, line 5: names no image"]


def zipped(folder, file):
    with zipfile.ZipFile(file, "w") as z:
        for path in sorted(folder.rglob("*")):
            if path.is_file(): z.write(path, path.relative_to(folder))
    return file


def tarred(folder, file):
    with tarfile.open(file, "w") as t: t.add(folder, ".")
    return file


@pytest.mark.parametrize("entry", ["OUTSIDE/images", "OUTSIDE/list.txt", "RELATIVE/images", "RELATIVE/list.txt"])
@pytest.mark.parametrize("key", ["train", "val", "path"])
def test_an_archive_reads_nothing_outside(tmp_path, entry, key):
    "Absolute paths, and as many `..` as it takes."
    put(tmp_path / "outside", {**LABELED, "list.txt": f"{tmp_path}/outside/images/a.jpg\n"})
    up = "../" * 30 + str(tmp_path / "outside")[1:]
    path = entry.replace("OUTSIDE", str(tmp_path / "outside")).replace("RELATIVE", up)
    yaml = {"train": f"train: {path}\n", "val": f"train: images\nval: {path}\n",
            "path": f"path: {path.rsplit('/', 1)[0]}\ntrain: {path.rsplit('/', 1)[1]}\n"}[key]
    put(tmp_path / "in", {**LABELED, "data.yaml": yaml + "names: [cat]\n"})
    assert len(read_dataset(tmp_path / "in")) # a folder of one's own may lead elsewhere
    archive = zipped(tmp_path / "in", tmp_path / "data.zip")
    try: ds = read_dataset(archive)
    except InputError as e:
        assert "leads out of the archive" in str(e) or "is not there" in str(e)
        return
    inside = os.path.realpath(tmp_path / "cache")
    assert all(os.path.realpath(ds.path_of(i)).startswith(inside) for i in range(len(ds)))


def test_lists_in_an_archive(tmp_path):
    "What a list names outside is not there; what it names inside, with folders too many in front, is."
    put(tmp_path / "outside", LABELED)
    lines = [f"{tmp_path}/outside/images/a.jpg", "images/b.jpg", "../../outside/images/b.jpg", "/etc/passwd"]
    put(tmp_path / "in", {**LABELED, "list.txt": "\n".join(lines), "data.yaml": "train: list.txt\nnames: [cat]\n"})
    ds = read_dataset(tarred(tmp_path / "in", tmp_path / "data.tar"))
    assert ds.paths.tolist() == ["images/b.jpg"]
    assert not [f for f in ds.flaws if "passwd" in f.message]


def test_names_of_darknet_outside_an_archive(tmp_path):
    (tmp_path / "secret.txt").write_text(SECRET)
    put(tmp_path / "in", {"images/a.jpg": image_bytes(), "images/a.txt": "0 .5 .5 .5 .5", "list.txt": "images/a.jpg\n",
                          "obj.data": f"classes = 2\ntrain = list.txt\nnames = {tmp_path}/secret.txt\n"})
    with pytest.raises(InputError) as e: read_dataset(zipped(tmp_path / "in", tmp_path / "data.zip"))
    assert "names" in str(e.value) and "s3cr3t" not in str(e.value)
