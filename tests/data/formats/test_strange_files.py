"""Names with a backslash, links to what lies outside of the dataset, named pipes and folders that may not be read, and
text that is not UTF-8, files of something else beside the labels: each is read by one rule in every format, passed
over, or named in one line."""
import json
import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from label_files import image_bytes, put, refused

from jetson_det.core import InputError
from jetson_det.data.dataset import Flaw
from jetson_det.data.formats.registry import read_dataset
from jetson_det.data.index import keep_index
from jetson_det.data.quality.check import check_dataset, prepare, reader_flaws
from jetson_det.data.quality.fix import fix_dataset
from jetson_det.data.split import read_split_lists, write_split_lists
from jetson_det.runtime.stream.sources import list_images

IMAGE = image_bytes()
LINE = "0 .5 .5 .5 .5\n"
KITTI = "cat 0 0 0 10 10 40 30 0 0 0 0 0 0 0\n"


def voc(name, label="cat"):
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    return (f"<annotation><filename>{name}</filename><object><name>{label}</name>{box}</object></annotation>")


def coco(*names):
    images = [{"id": k, "file_name": name, "height": 48, "width": 64} for k, name in enumerate(names)]
    boxes = [{"id": k, "image_id": k, "category_id": 1, "bbox": [1, 1, 9, 9]} for k in range(len(names))]
    return {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}


def labelme(path):
    shape = {"label": "cat", "points": [[1, 1], [9, 9]], "shape_type": "rectangle"}
    return {"shapes": [shape], "imagePath": path, "imageData": None}


def cvat(*names):
    box = '<box label="cat" xtl="1" ytl="1" xbr="9" ybr="9"/>'
    images = "".join(f'<image name="{name}" width="64" height="48">{box}</image>' for name in names)
    return f"<annotations><version>1.1</version>{images}</annotations>"


def rows(*names): return "filename,xmin,ymin,xmax,ymax,class\n" + "".join(f"{name},1,1,9,9,cat\n" for name in names)


# Backslashes

REAL = r"a\b"
DECOYS = {"a/b.jpg": IMAGE, "images/b.jpg": IMAGE}
NAMED = {
    "yolo": {"images/NAME.jpg": IMAGE, "labels/NAME.txt": LINE, "classes.txt": "cat\n"},
    "yolo beside": {"NAME.jpg": IMAGE, "NAME.txt": LINE, "classes.txt": "cat\n"},
    "yolo, list": {"x/NAME.jpg": IMAGE, "x/NAME.txt": LINE, "all.txt": "x/NAME.jpg\n",
                   "data.yaml": "train: all.txt\nnames: [cat]\n"},
    "voc": {"NAME.jpg": IMAGE, "NAME.xml": voc("NAME.jpg")},
    "voc, by hint": {"NAME.jpg": IMAGE, "7.xml": voc("NAME.jpg")},
    "coco": {"img/NAME.jpg": IMAGE, "labels.json": coco("NAME.jpg")},
    "coco, in a folder": {"img/NAME.jpg": IMAGE, "labels.json": coco("img/NAME.jpg")},
    "csv": {"NAME.jpg": IMAGE, "labels.csv": rows("NAME.jpg")},
    "csv, stem": {"NAME.jpg": IMAGE, "labels.csv": rows("NAME")},
    "labelme": {"img/NAME.jpg": IMAGE, "img/NAME.json": labelme("NAME.jpg")},
    "labelme, by path": {"img/NAME.jpg": IMAGE, "7.json": labelme("img/NAME.jpg")},
    "cvat": {"images/NAME.jpg": IMAGE, "annotations.xml": cvat("NAME.jpg")},
    "kitti": {"image_2/NAME.jpg": IMAGE, "label_2/NAME.txt": KITTI},
    "plates": {"NAME.jpg": IMAGE, "NAME.txt": "NAME.jpg\t1\t1\t9\t9\tAB 1\n"},
}


def with_name(files, name):
    found = {}
    for path, data in files.items():
        if isinstance(data, str): data = data.replace("NAME", name)
        if isinstance(data, dict): data = json.dumps(data).replace("NAME", name.replace("\\", "\\\\"))
        found[path.replace("NAME", name)] = data
    return found


@pytest.mark.skipif(os.sep == "\\", reason="no name holds a backslash on Windows")
@pytest.mark.parametrize("name, decoys", [(REAL, DECOYS), (r"test\7", {}), ("\\.v1", {})])
@pytest.mark.parametrize("kind", NAMED)
def test_a_name_with_a_backslash_is_a_name(tmp_path, kind, name, decoys):
    put(tmp_path, {**decoys, **with_name(NAMED[kind], name)})
    ds = read_dataset(tmp_path, kind.split()[0].rstrip(","))
    labeled = [p for i, p in enumerate(ds.paths) if len(ds.boxes_of(i)[0])]
    assert [p.rsplit("/", 1)[-1] for p in labeled] == [f"{name}.jpg"]
    assert set(ds.splits) == {""} and not [f for f in ds.flaws if f.kind == "missing-image"]


@pytest.mark.parametrize("files", [
    {"labels.csv": rows(r"C:\work\img\b.jpg")},
    {"labels.json": coco(r"img\b.jpg")},
    {"labels.json": coco(r".\img\b.jpg")},
    {"labels/7.xml": voc(r"D:\set\img\b.jpg")},
    {"7.json": labelme(r"img\b.jpg")},
    {"annotations.xml": cvat(r"img\b.jpg")},
    {"img/b.txt": LINE, "all.txt": "img\\b.jpg\n", "data.yaml": "train: all.txt\nnames: [cat]\n"},
    {"img/b.txt": LINE, "data.yaml": "train: .\\img\nnames: [cat]\n"},
])
def test_a_backslash_in_a_text_of_windows_separates_folders(tmp_path, files):
    put(tmp_path, {"img/b.jpg": IMAGE, **files})
    assert [p for p in read_dataset(tmp_path).paths] == ["img/b.jpg"]


@pytest.mark.skipif(os.sep == "\\", reason="no name holds a backslash on Windows")
def test_lists_of_splits_hold_such_names(tmp_path):
    put(tmp_path / "d", with_name(NAMED["yolo"], REAL) | {"images/c.jpg": IMAGE, "labels/c.txt": LINE})
    put(tmp_path / "d", {"splits/train.txt": "images/a\\b.jpg\n", "splits/val.txt": "images\\c.jpg\n"})
    ds = read_dataset(tmp_path / "d")
    assert dict(zip(ds.paths, ds.splits)) == {"images/a\\b.jpg": "train", "images/c.jpg": "val"}
    write_split_lists(ds, tmp_path)
    assert read_split_lists(ds, tmp_path).splits.tolist() == ds.splits.tolist()


# What lies outside

SECRET = "alice:x:0:0 s3cr3t\n- [s3cr3t: {\n1 2 s3cr3t 3 4\n"
FORMATS = {
    "yolo": ({"images/a.jpg": IMAGE, "classes.txt": "cat\n"}, "labels/a.txt"),
    "yolo, data.yaml": ({"images/a.jpg": IMAGE, "labels/a.txt": LINE}, "data.yaml"),
    "yolo, obj.data": ({"images/a.jpg": IMAGE, "labels/a.txt": LINE, "obj.names": "cat\n"}, "obj.data"),
    "yolo, classes": ({"images/a.jpg": IMAGE, "labels/a.txt": LINE}, "classes.txt"),
    "yolo, obj.names": ({"images/a.jpg": IMAGE, "labels/a.txt": LINE}, "labels/obj.names"),
    "yolo, notes": ({"images/a.jpg": IMAGE, "labels/a.txt": LINE}, "notes.json"),
    "yolo, list": ({"images/a.jpg": IMAGE, "labels/a.txt": LINE, "data.yaml": "train: l.txt\nnames: [c]\n"}, "l.txt"),
    "yolo, splits": ({"images/a.jpg": IMAGE, "labels/a.txt": LINE, "classes.txt": "cat\n",
                      "splits/train.txt": "images/a.jpg\n"}, "splits/val.txt"),
    "voc": ({"a.jpg": IMAGE}, "a.xml"),
    "voc, classes": ({"a.jpg": IMAGE, "a.xml": voc("a.jpg")}, "classes.txt"),
    "voc, list": ({"a.jpg": IMAGE, "a.xml": voc("a.jpg"), "ImageSets/Main/train.txt": "a\n"},
                  "ImageSets/Main/val.txt"),
    "coco": ({"a.jpg": IMAGE}, "labels.json"),
    "csv": ({"a.jpg": IMAGE}, "labels.csv"),
    "csv, classes": ({"a.jpg": IMAGE, "labels.csv": rows("a.jpg")}, "classes.txt"),
    "labelme": ({"a.jpg": IMAGE}, "a.json"),
    "cvat": ({"a.jpg": IMAGE}, "annotations.xml"),
    "kitti": ({"image_2/a.jpg": IMAGE}, "label_2/a.txt"),
    "plates": ({"a.jpg": IMAGE}, "a.txt"),
    "openimages": ({"a.jpg": IMAGE}, "train-annotations-bbox.csv"),
}


STARTS = {"yolo": LINE, "yolo, data.yaml": "names: [cat]\ntrain: x\n", "yolo, list": "a\nimages/gone\n",
          "voc": "<annotation>\n", "voc, list": "gone\n", "coco": '{"images": [], "annotations": [], "categories": [\n',
          "csv": rows("a.jpg"), "labelme": '{"shapes": [\n', "cvat": "<annotations>\n", "kitti": KITTI,
          "plates": "a.jpg\t1\t1\t9\t9\tAB 1\n",
          "openimages": "ImageID,Source,LabelName,XMin,XMax,YMin,YMax,IsInside\n"}


@pytest.mark.parametrize("has_start", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_text_of_a_link_to_outside_is_not_shown(tmp_path, kind, has_start):
    "A stranger's dataset may link to a file of its reader; what it holds goes into no message and no list of classes."
    files, link = FORMATS[kind]
    start = STARTS.get(kind, LINE) if has_start else ""
    put(tmp_path, {"home/secret.txt": start + SECRET})
    put(tmp_path / "d", files)
    (tmp_path / "d" / link).parent.mkdir(exist_ok=True)
    os.symlink(tmp_path / "home/secret.txt", tmp_path / "d" / link)
    for format in (kind.split(",")[0], "auto"):
        try:
            ds = read_dataset(tmp_path / "d", format)
            said = repr(ds.flaws) + repr(ds.classes)
        except InputError as e: said = str(e)
        assert "s3cr3t" not in said and "alice" not in said and "\n" not in said


def test_a_file_inside_is_shown_and_so_is_the_place_of_one_outside(tmp_path):
    put(tmp_path / "d", {"images/a.jpg": IMAGE, "labels/a.txt": LINE + "0 here\n", "classes.txt": "cat\n"})
    refused(lambda: read_dataset(tmp_path / "d"), "labels/a.txt, line 2: '0 here' is not a row of numbers")
    shutil.move(tmp_path / "d/labels/a.txt", tmp_path / "a.txt")
    os.symlink("../../a.txt", tmp_path / "d/labels/a.txt")
    line = refused(lambda: read_dataset(tmp_path / "d"), "labels/a.txt, line 2: ", "outside of the dataset", "/a.txt)")
    assert "here" not in line


def test_links_that_a_user_makes_are_read(tmp_path):
    "Linked folders, a linked label, the list of classes of another dataset; the dataset is a link itself."
    put(tmp_path / "store", {"images/a.jpg": IMAGE, "labels/a.txt": LINE, "b.txt": LINE, "classes.txt": "cat\n"})
    (tmp_path / "d").mkdir()
    for name in ("images", "labels", "classes.txt"): os.symlink(tmp_path / "store" / name, tmp_path / "d" / name)
    os.symlink(tmp_path / "d", tmp_path / "link")
    put(tmp_path / "store", {"images/b.jpg": IMAGE})
    os.symlink(tmp_path / "store/b.txt", tmp_path / "store/labels/b.txt")
    for root in ("d", "link"):
        ds = read_dataset(tmp_path / root)
        assert len(ds) == len(ds.boxes) == 2 and ds.classes == ("cat",) and ds.flaws == []
    put(tmp_path / "store", {"b.txt": "0 here\n"})
    for root in ("d", "link"): assert "here" not in refused(lambda: read_dataset(tmp_path / root), "b.txt, line 1")


def test_names_that_darknet_takes_from_elsewhere(tmp_path):
    put(tmp_path, {"my/key": SECRET, "my/coco.names": "cat\n"})
    put(tmp_path / "d", {"images/a.jpg": IMAGE, "labels/a.txt": LINE, "all.txt": "images/a.jpg\n"})
    for names, is_read in (("key", False), ("coco.names", True)):
        put(tmp_path / "d", {"obj.data": f"train = all.txt\nnames = {tmp_path}/my/{names}\n"})
        if is_read: assert read_dataset(tmp_path / "d").classes == ("cat",)
        else: refused(lambda: read_dataset(tmp_path / "d"), "my/key", "not called like a list of classes")


def test_a_label_that_a_list_names_outside_is_not_shown(tmp_path):
    put(tmp_path, {"home/a.jpg": IMAGE, "home/a.txt": SECRET})
    put(tmp_path / "d", {"list.txt": f"{tmp_path}/home/a.jpg\n", "data.yaml": "train: list.txt\nnames: [cat]\n"})
    line = refused(lambda: read_dataset(tmp_path / "d"), "home/a.txt, line 1")
    assert "s3cr3t" not in line and "alice" not in line


def test_lists_given_with_splits(tmp_path):
    put(tmp_path, {"secret.txt": SECRET, "d/a.jpg": IMAGE, "d/a.txt": LINE, "d/classes.txt": "cat\n"})
    ds = read_dataset(tmp_path / "d")
    (tmp_path / "lists").mkdir()
    os.symlink(tmp_path / "secret.txt", tmp_path / "lists/train.txt")
    assert "s3cr3t" not in refused(lambda: read_split_lists(ds, tmp_path / "lists"), "train.txt, line 1")


# Pipes, devices, broken links

def pipe(path): os.mkfifo(path)
def nothing(path): os.symlink("gone", path)
def device(path): os.symlink("/dev/null", path)


ODD = [(pipe, "is a named pipe, not a regular file"), (nothing, "is a link to nothing"),
       (device, "is a device, not a regular file")]
LABELED = {"images/a.jpg": IMAGE, "labels/a.txt": LINE}


@pytest.mark.parametrize("make, words", ODD)
@pytest.mark.parametrize("files, name", [
    ({**LABELED, "classes.txt": "cat\n"}, "data.yaml"),
    ({**LABELED, "data.yaml": "train: images\nnames: [cat]\n"}, "classes.txt"),
    ({**LABELED, "data.yaml": "train: images\nnames: [cat]\n"}, "labels/classes.txt"),
    ({**LABELED, "data.yaml": "train: images\nnames: [cat]\n"}, "splits/train.txt"),
    ({**LABELED, "classes.txt": "cat\n"}, "labels/c.txt"),
    ({**LABELED, "classes.txt": "cat\n"}, "obj.data"),
    ({"a.jpg": IMAGE, "a.xml": voc("a.jpg")}, "classes.txt"),
    ({"a.jpg": IMAGE, "a.xml": voc("a.jpg")}, "b.xml"),
    ({"a.jpg": IMAGE, "train.json": coco("a.jpg")}, "val.json"),
    ({"a.jpg": IMAGE, "train.csv": rows("a.jpg")}, "val.csv"),
    (LABELED, "data.yaml"),
    ({"a.jpg": IMAGE}, "labels.json"),
])
def test_what_is_no_file_is_named(tmp_path, files, name, make, words):
    put(tmp_path, files)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    make(tmp_path / name)
    try: said = [f.message for f in read_dataset(tmp_path).flaws if f.kind == "unread-file"]
    except InputError as e: said = [str(e)]
    assert len(said) == 1 and words in said[0] and name in said[0]


def test_many_of_them_take_one_line(tmp_path):
    put(tmp_path, {**LABELED, "classes.txt": "cat\n"})
    for k in range(30): nothing(tmp_path / f"labels/{k}.txt")
    flaw, = [f for f in read_dataset(tmp_path).flaws if f.kind == "unread-file"]
    assert "29 more files" in flaw.message
    assert "unread-file" in str(check_dataset(tmp_path))
    ds, flaws = prepare(read_dataset(tmp_path))
    assert len(ds) == 1 and [f.severity for f in flaws if f.kind == "unread-file"] == ["warning"]


def test_a_dataset_that_is_no_file(tmp_path):
    pipe(tmp_path / "p")
    nothing(tmp_path / "n")
    for read in (read_dataset, check_dataset):
        refused(lambda: read(tmp_path / "p"), "is a named pipe, not a regular file")
        refused(lambda: read(tmp_path / "n"), "is a link to nothing")
        refused(lambda: read("/dev/zero"), "is a device")
        refused(lambda: read(tmp_path / "gone"), "no such file or folder")


# Permissions

@contextmanager
def somebody():
    "Without the rights of root."
    is_root = os.geteuid() == 0
    if is_root: os.seteuid(65534)
    try: yield
    finally:
        if is_root: os.seteuid(0)


@pytest.fixture
def open_folder():
    "A folder that others may enter."
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    for path, _, _ in os.walk(folder): os.chmod(path, 0o755)
    shutil.rmtree(folder)


def closed(path):
    os.chmod(path, 0)
    return path


@pytest.mark.parametrize("files, folder", [
    ({**LABELED, "images/more/b.jpg": IMAGE, "classes.txt": "cat\n"}, "images/more"),
    ({"a.jpg": IMAGE, "a.xml": voc("a.jpg"), "b.jpg": IMAGE, "x/b.xml": voc("b.jpg")}, "x"),
    ({"a.jpg": IMAGE, "t.json": coco("a.jpg"), "x/v.json": coco("b.jpg")}, "x"),
])
def test_a_folder_without_permission_is_named(open_folder, files, folder):
    put(open_folder, files)
    closed(open_folder / folder)
    with somebody(): report = check_dataset(open_folder)
    flaw, = [f for f in report.flaws if f.kind == "unreadable-folder"]
    assert flaw.severity == "warning" and flaw.message.startswith(f"{folder}: the folder cannot be read: Permission")


@pytest.mark.parametrize("files, path", [
    ({**LABELED, "data.yaml": "train: images\nnames: [cat]\n"}, "labels"),
    ({**LABELED, "data.yaml": "train: images\nnames: [cat]\n"}, "data.yaml"),
    ({**LABELED, "classes.txt": "cat\n"}, "labels"),
    ({**LABELED, "classes.txt": "cat\n"}, "images"),
    ({**LABELED, "classes.txt": "cat\n"}, ""),
    ({"JPEGImages/a.jpg": IMAGE, "Annotations/a.xml": voc("a.jpg")}, "Annotations"),
    ({"a.jpg": IMAGE, "t.csv": rows("a.jpg")}, "t.csv"),
])
def test_images_whose_labels_may_not_be_read_are_no_background(open_folder, files, path):
    put(open_folder, files)
    closed(open_folder / path)
    with somebody(): line = refused(lambda: read_dataset(open_folder), path, "Permission denied")
    assert line.startswith(str(open_folder))


def test_an_index_is_kept_only_of_what_was_read(open_folder, monkeypatch, tmp_path):
    "A permission that is given later must not leave the old finding in the index."
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path / "cache"))
    put(open_folder, {**LABELED, "classes.txt": "cat\n", "data.yaml": "train: images\nnames: [cat]\n"})
    closed(open_folder / "data.yaml")
    for path, _, files in os.walk(open_folder):
        for name in files: os.utime(os.path.join(path, name), (1e9, 1e9))
    time.sleep(.03)
    start = time.time_ns()
    with somebody(): ds = read_dataset(open_folder)
    assert [f.message for f in ds.flaws] == ["data.yaml cannot be read: Permission denied: it was passed over"]
    assert not keep_index(ds, start, open_folder)


def test_images_to_predict_on(open_folder):
    put(open_folder, {"a.jpg": IMAGE, "more/b.jpg": IMAGE})
    closed(open_folder / "more")
    with somebody(), pytest.warns(UserWarning, match="skipped the folder more: Permission denied"):
        assert list_images(open_folder) == (["a.jpg"], 0)


def test_a_fix_keeps_the_lists_that_are_read(tmp_path):
    "The copy that is read anew holds names in a file that is not called like a list of classes."
    turned = cv2.imencode(".jpg", np.zeros((48, 64, 3), np.uint8))[1].tobytes()
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    turned = turned[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + turned[2:]
    put(tmp_path / "d", {"images/a.jpg": turned, "labels/a.txt": LINE, "all.txt": "images/a.jpg\n",
                         "obj.data": "train = all.txt\nnames = my.list\n", "my.list": "cat\n"})
    report = check_dataset(tmp_path / "d", max_flawed=1)
    flaw = Flaw("warning", "rotated-image", "images/a.jpg", "", "turned", "dropped")
    fix_dataset(replace(report, flaws=[*report.flaws, flaw]), tmp_path / "fixed", "coco")
    assert read_dataset(tmp_path / "fixed").classes == ("cat",)


# Encodings

def table(word): return rows("a.jpg").replace("cat", word)


def as_json(content, word): return json.dumps(content).replace('"cat"', f'"{word}"')


ENCODED = {
    "csv": lambda word: ({"a.jpg": IMAGE}, "t.csv", table(word)),
    "csv, classes": lambda word: ({"a.jpg": IMAGE, "t.csv": table(word)}, "classes.txt", f"{word}\n"),
    "yolo, classes": lambda word: (LABELED, "classes.txt", f"{word}\n"),
    "yolo, data.yaml": lambda word: (LABELED, "data.yaml", f"train: images\nnames: [{word}]\n"),
    "kitti": lambda word: ({"image_2/a.jpg": IMAGE}, "label_2/a.txt", KITTI.replace("cat", word)),
    "labelme": lambda word: ({"a.jpg": IMAGE}, "a.json", as_json(labelme("a.jpg"), word)),
    "coco": lambda word: ({"a.jpg": IMAGE}, "t.json", as_json(coco("a.jpg"), word)),
    "voc": lambda word: ({"a.jpg": IMAGE}, "a.xml", voc("a.jpg", word)),
}


@pytest.mark.parametrize("encoding, words, word", [("utf-16", "UTF-16", "Größe"), ("cp1252", "Windows-1252", "Größe"),
                                                   ("cp1252", "Windows-1252", "caminhão"), ("utf-16", "UTF-16", "猫")])
@pytest.mark.parametrize("kind", ENCODED)
def test_text_of_excel_is_read_and_said(tmp_path, kind, encoding, words, word):
    files, name, text = ENCODED[kind](word)
    put(tmp_path, {**files, name: text.encode(encoding)})
    ds = read_dataset(tmp_path)
    assert word in ds.classes and len(ds.boxes) == 1
    found = [f.message for f in ds.flaws if f.kind == "encoding"]
    severities = {f.severity for f in reader_flaws(ds) if f.kind == "encoding"}
    assert severities <= {"note" if words == "UTF-16" else "warning"} # what was guessed is said in training too
    if kind == "voc" and encoding == "utf-16": assert found == [] # the mark is XML's own way to say it
    else: assert len(found) == 1 and f"{name} is not UTF-8: read as {words}" in found[0]


@pytest.mark.parametrize("kind", [kind for kind in ENCODED if kind not in ("labelme", "coco", "voc")])
def test_other_encodings_say_what_to_do(tmp_path, kind):
    for word, encoding in (("грузовик", "cp1251"), ("猫の車", "shift_jis"), ("卡车", "gbk"), ("τρένο", "cp1253"),
                           ("грузовик", "koi8-r")):
        files, name, text = ENCODED[kind](word)
        put(tmp_path, {**files, name: text.encode(encoding)})
        refused(lambda: read_dataset(tmp_path, kind.split(",")[0]), "UTF-8", name, "iconv -f")


def test_utf_16_without_its_mark(tmp_path):
    put(tmp_path, {"a.jpg": IMAGE, "t.csv": table("Camión").encode("utf-16-le")})
    refused(lambda: read_dataset(tmp_path, "csv"), "t.csv, line 1: holds NUL bytes", "save the file as UTF-8")


def test_a_list_of_powershell(tmp_path):
    put(tmp_path, {**LABELED, "all.txt": "images\\a.jpg\r\n".encode("utf-16")})
    put(tmp_path, {"data.yaml": "train: all.txt\nnames: [c]\n"})
    assert read_dataset(tmp_path).paths.tolist() == ["images/a.jpg"]


# Files of something else, which end like labels

CLUTTER = {
    "notes.xml": "<!DOCTYPE html><html></html>", "empty.xml": "", "half.xml": "<project><a",
    "schema.xml": '<?xml version="1.0"?><!-- of an editor --><schema><annotation/></schema>',
    "image.jpg.xml": "<metadata/>",
    "empty.json": "", "half.json": '{"a": ', "list.json": "[1]", "notes.txt": "Buy milk\n", "empty.csv": "",
    "other.csv": "a,b\n1,2\n", "other.yaml": "a: [", "empty.yaml": "", "x.data": "",
}
LABELS = {
    "voc": {"Annotations/image.xml": voc("image.jpg")}, "coco": {"labels.json": coco("image.jpg")},
    "labelme": {"image.json": labelme("image.jpg")}, "cvat": {"annotations.xml": cvat("image.jpg")},
    "kitti": {"label_2/image.txt": KITTI}, "csv": {"labels.csv": rows("image.jpg")},
    "yolo": {"image.txt": LINE, "data.yaml": "names: [cat]\ntrain: .\n"},
}


@pytest.mark.parametrize("name", CLUTTER)
@pytest.mark.parametrize("format", LABELS)
def test_files_of_something_else_are_passed_over(tmp_path, format, name):
    put(tmp_path, {"image.jpg": IMAGE, **LABELS[format]})
    for folder in {"", *(file.rpartition("/")[0] for file in LABELS[format])}:
        put(tmp_path, {f"{folder}/{name}" if folder else name: CLUTTER[name]})
        ds = read_dataset(tmp_path)
        assert ds.format == format and len(ds) == len(ds.boxes) == 1
        assert {flaw.kind for flaw in ds.flaws} <= {"not-read"}
        os.unlink(tmp_path / folder / name)


@pytest.mark.parametrize("format, name", [("voc", "b.xml"), ("labelme", "b.json"), ("kitti", "label_2/b.txt")])
def test_a_damaged_file_named_like_an_image_is_its_label(tmp_path, format, name):
    put(tmp_path, {"image.jpg": IMAGE, "b.jpg": IMAGE, **LABELS[format], name: "<half 0"})
    refused(lambda: read_dataset(tmp_path), f"{name}, line 1")
    os.unlink(tmp_path / "b.jpg")
    flaw, = read_dataset(tmp_path).flaws
    assert flaw.kind == "not-read" and name in flaw.message


def test_when_nothing_is_a_label_the_first_file_is_named(tmp_path):
    put(tmp_path, {"a.jpg": IMAGE, "notes.xml": "<html/>"})
    refused(lambda: read_dataset(tmp_path, "voc"), "notes.xml, line 1: not a Pascal VOC file: it begins with <html>")
