"""LabelMe, CVAT, KITTI and Darknet: round trips, layouts met in the wild, the line of every error, and damaged
files."""
import base64
import json
import os
import re
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from label_files import attributes_of, image_bytes, put, refused
from jetson_det.core import InputError
from jetson_det.data.formats.coco import read_coco
from jetson_det.data.formats.cvat import _cvat_box, detect_cvat, read_cvat
from jetson_det.data.dataset import CROWD, DIFFICULT, IGNORE, DetDataset, to_coco
from jetson_det.data.images.exif import boxes_upright
from jetson_det.data.images.header import read_header
from jetson_det.data.formats.reader import Files
from jetson_det.data.formats.kitti import detect_kitti, read_kitti
from jetson_det.data.formats.labelme import detect_labelme, read_labelme
from jetson_det.data.formats.parse import parse_xml
from jetson_det.data.formats.voc import read_voc
from jetson_det.data.formats.yolo import read_yolo, detect_yolo
from jetson_det.scenes.docks import write_scenes

NAMES = ["a b.jpg", "50% #1.JPG", "Straße.jpeg", "写真.jpg", "v1.2.jpg", "A.jpg"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    "Unpacked images go here."
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("JETSON_DET_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    "Six generated scenes under odd names, their boxes moved off whole pixels."
    ds = read_coco(write_scenes(tmp_path_factory.mktemp("scenes"), 6, (240, 320), seed=3))
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("odd")
    put(root, {n: ds.path_of(i).read_bytes() for i, n in enumerate(NAMES)})
    boxes = np.clip(ds.boxes + rng.uniform(-.5, .5, ds.boxes.shape), 0, [320, 240, 320, 240])
    return DetDataset(root, ("Säcke & <Co>", "person"), NAMES, ds.sizes, ds.box_image, boxes, ds.labels, ds.splits)


def rows_of(ds, i):
    "(x1, y1, x2, y2, class name) of an image's boxes."
    return [(*b, ds.classes[c]) for b, c in zip(ds.boxes_of(i)[0].tolist(), ds.boxes_of(i)[1])]


def stem(name):
    return os.path.splitext(name)[0]


def shape(label, points, kind="rectangle", **kw):
    return dict(label=label, points=points, shape_type=kind, **kw)


def as_labelme(ds, root):
    for i, n in enumerate(ds.paths):
        shapes = [shape(c, [[x2, y1], [x1, y2]]) for x1, y1, x2, y2, c in rows_of(ds, i)]
        d = dict(version="5.5.0", flags={}, shapes=shapes, imagePath=n, imageData=None, imageHeight=240, imageWidth=320)
        put(root / ds.splits[i], {n: ds.path_of(i).read_bytes(), f"{stem(n)}.json": d})
    return read_labelme(root)


META = "<meta><task><id>1</id><name>dock</name><labels>\n%s\n</labels></task></meta>"


def cvat(body, names=("s", "p")):
    labels = "\n".join(f"<label><name>{esc(n)}</name><type>any</type></label>" for n in names)
    head = '<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>'
    return f"{head}\n{META % labels}\n{body}\n</annotations>"


def esc(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def as_cvat(ds, root):
    text = []
    for i, n in enumerate(ds.paths):
        subset = {"train": "Train", "val": "Validation", "test": "Test"}[ds.splits[i]]
        put(root, {f"images/{subset}/{n}": ds.path_of(i).read_bytes()})
        boxes = "".join(f'<box label="{esc(c)}" xtl="{x1:.2f}" ytl="{y1:.2f}" xbr="{x2:.2f}" ybr="{y2:.2f}"/>\n'
                        for x1, y1, x2, y2, c in rows_of(ds, i))
        text.append(f'<image id="{i}" name="{esc(n)}" subset="{subset}" width="320" height="240">\n{boxes}</image>')
    put(root, {"annotations.xml": cvat("\n".join(text), ds.classes)})
    return read_cvat(root)


def kitti_row(c, x1, y1, x2, y2, more="-1 -1 -1 -1000 -1000 -1000 -10"):
    return f"{c} 0.00 0 -10 {x1:.2f} {y1:.2f} {x2:.2f} {y2:.2f} {more}\n"


def as_kitti(ds, root):
    for i, n in enumerate(ds.paths):
        text = "".join(kitti_row(c.replace(" ", "_"), x1, y1, x2, y2) for x1, y1, x2, y2, c in rows_of(ds, i))
        put(root / ds.splits[i], {f"image_2/{n}": ds.path_of(i).read_bytes(), f"label_2/{stem(n)}.txt": text})
    return read_kitti(root)


def as_darknet(ds, root):
    lists = {"train": "", "val": ""}
    for i, n in enumerate(ds.paths):
        lists["train" if ds.splits[i] == "train" else "val"] += f"data/obj/{n}\n"
        text = ""
        for x1, y1, x2, y2, c in rows_of(ds, i):
            center = f"{(x1 + x2) / 640:.8f} {(y1 + y2) / 480:.8f}"
            text += f"{ds.classes.index(c)} {center} {(x2 - x1) / 320:.8f} {(y2 - y1) / 240:.8f}\n"
        put(root / "data/obj", {n: ds.path_of(i).read_bytes(), f"{stem(n)}.txt": text})
    put(root / "data", {
        "obj.names": "\n".join(ds.classes) + "\n",
        "obj.data": "classes=2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\nbackup = b",
        "train.txt": lists["train"],
        "valid.txt": lists["val"],
    })
    return read_yolo(root)


@pytest.mark.parametrize("write, within, classes", [
    (as_labelme, 1e-4, ["Säcke & <Co>", "person"]),
    (as_cvat, .00502, ["Säcke & <Co>", "person"]),
    (as_kitti, .00502, ["Säcke_&_<Co>", "person"]),
    (as_darknet, 1e-4, ["Säcke & <Co>", "person"]),
])
def test_round_trip(scenes, tmp_path, write, within, classes):
    "The same boxes, classes and splits, whatever the files are called."
    new = write(scenes, tmp_path)
    image_of = {p.rsplit("/", 1)[-1]: i for i, p in enumerate(new.paths)}
    back = new.subset([image_of[n] for n in NAMES])
    assert len(new) == 6 and np.abs(back.boxes - scenes.boxes).max() <= within
    assert [c.replace(" ", "_") for c in back.classes] == sorted(c.replace(" ", "_") for c in classes)
    def names(ds): return [ds.classes[k].replace(" ", "_") for k in ds.labels]
    assert names(back) == names(scenes)
    splits = scenes.splits.tolist()
    if write is as_darknet: splits = ["train" if s == "train" else "val" for s in splits]
    assert back.splits.tolist() == splits
    assert back.flaws == []
    detect = {as_labelme: detect_labelme, as_cvat: detect_cvat, as_kitti: detect_kitti, as_darknet: detect_yolo}
    assert [d for d in detect.values() if d(Files(tmp_path))] == [detect[write]]


# LabelMe

def labelme(*shapes, size=(48, 64), **kw):
    h, w = size
    d = dict(version="5.5.0", flags={}, shapes=list(shapes), imagePath="1.jpg", imageData=None, imageHeight=h,
             imageWidth=w)
    return {**d, **kw}


def test_labelme_shapes(tmp_path):
    "What encloses an area becomes the box around it; what does not is left out and named."
    shapes = [
        shape("a", [[30, 4], [10, 20]]),
        shape("a", [[10, 4], [30, 4], [30, 20], [10, 20]]),
        shape("b", [[20, 20], [26, 28]], "circle"),
        shape("b", [[5, 6], [20, 9], [9, 30]], "polygon"),
        shape("b", [[5, 6], [20, 9], [9, 30]], None),
        shape("b", [[2, 3], [11, 12]], "mask", mask="..."),
        shape("c", [[5, 6], [20, 9], [18, 30], [3, 27]], "rotation"),
        shape("c", [[1, 2]], "point"),
        shape("c", [[1, 2], [3, 4], [5, 6]], "linestrip"),
        shape("c", [[1, 2], [3, 4]], "line"),
        shape("c", [[1, 2], [3, 4]], "points")
    ]
    put(tmp_path, {"1.jpg": image_bytes(), "1.json": labelme(*shapes)})
    ds = read_labelme(tmp_path)
    assert ds.boxes.tolist() == [[10, 4, 30, 20], [10, 4, 30, 20], [10, 10, 30, 30], [5, 6, 20, 30], [5, 6, 20, 30],
                                 [2, 3, 12, 13], [3, 6, 20, 30]]
    expected = [("no-box", f"shape {k}", "dropped") for k in (8, 9, 10, 11)]
    assert [(f.kind, f.where, f.action) for f in ds.flaws] == expected
    assert ds.classes == ("a", "b", "c")


def test_labelme_attributes_and_flags(tmp_path):
    shapes = [
        shape("a", [[1, 2], [3, 4]], flags={"wet": True, "torn": False, "Difficult": True}, group_id=7, description=""),
        shape("a", [[1, 2], [3, 4]],
              difficult=True,
              attributes={"flags": "red", "label": 2.5},
              description="M 417",
              score=None),
        shape(5, [[1, 2], [3, 4]], flags=None)
    ]
    put(tmp_path, {"1.jpg": image_bytes(), "1.json": labelme(*shapes)})
    ds = read_labelme(tmp_path)
    assert ds.flags.tolist() == [DIFFICULT, DIFFICULT, 0] and ds.classes == ("5", "a")
    assert attributes_of(ds) == {
        "group_id": ["7", "", ""],
        "wet": ["1", "", ""],
        "description": ["", "M 417", ""],
        "flags": ["", "red", ""],
        "label": ["", "2.5", ""],
    }


@pytest.mark.parametrize("image, label, hint", [
    ("images/1.jpg", "labels/1.json", "..\\images\\1.jpg"),
    ("images/1.jpg", "labels/x.json", "../images/1.jpg"),
    ("images/1.jpg", "images/1.json", "C:\\Users\\me\\1.png"),
    ("train/images/1.jpg", "train/labels/1.json", "/home/me/1.jpg"),
    ("a/50% #1.JPG", "a/50% #1.json", "gone.jpg"),
    ("a/v1.2.jpg", "b/v1.2.json", ""),
    ("a/1.jpg", "b/1.jpg.json", None),
])
def test_labelme_finds_the_image(tmp_path, image, label, hint):
    put(tmp_path, {image: image_bytes(), "other/2.jpg": image_bytes()})
    put(tmp_path, {label: labelme(shape("a", [[1, 2], [3, 4]]), imagePath=hint)})
    assert read_labelme(tmp_path).paths.tolist() == [image]


def test_labelme_the_path_wins_over_the_stem(tmp_path):
    "imagePath names an image that is there: it is the one, whatever the label file is called."
    of_second = labelme(shape("a", [[1, 2], [3, 4]]), imagePath="2.jpg")
    put(tmp_path, {"1.jpg": image_bytes(), "2.jpg": image_bytes(), "1.json": of_second})
    assert read_labelme(tmp_path).paths.tolist() == ["2.jpg"]
    put(tmp_path, {"2.json": of_second})
    refused(lambda: read_labelme(tmp_path), "1.json and 2.json both label 2.jpg")
    put(tmp_path, {"x/7.jpg": image_bytes(), "y/7.jpg": image_bytes()})
    put(tmp_path, {"1.json": labelme(imagePath="7.jpg"), "2.json": labelme(imagePath="2.jpg")})
    (tmp_path / "1.jpg").unlink()
    refused(lambda: read_labelme(tmp_path), "could both be its image")


def test_labelme_embedded_images(tmp_path, cache):
    "They are unpacked to the cache once, in the folders of their JSON files; the dataset's folder stays as it is."
    data = {s: base64.b64encode(image_bytes(48, 64, s)).decode() for s in (".jpg", ".png")}
    box = shape("a", [[1, 2], [3, 4]])
    put(tmp_path, {
        "train/1.json": labelme(box, imageData=data[".jpg"]),
        "val/1.json": labelme(box, imageData="data:image/png;base64," + data[".png"]),
        "val/2.json": labelme(box, imageData="bm8gcGljdHVyZQ==", imagePath="2.jpg"),
        "val/3.json": labelme(imageData="", imagePath="3.jpg"),
    })
    before = sorted(p.name for p in tmp_path.rglob("*"))
    ds = read_labelme(tmp_path)
    assert ds.splits.tolist() == ["train", "val"]
    assert ds.sizes.tolist() == [[48, 64]] * 2
    assert ds.image(1).shape == (48, 64, 3)
    assert all(Path(p).is_relative_to(cache / "labelme") for p in ds.paths)
    assert [Path(p).name for p in ds.paths] == ["1.jpg", "1.png"]
    assert [(f.severity, f.kind, f.file) for f in ds.flaws] == [("warning", "unreadable-image", "val/2.json"),
                                                                ("warning", "missing-image", "val/3.json"),
                                                                ("note", "embedded-image", "train/1.json")]
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    times = [os.stat(p).st_mtime_ns for p in ds.paths]
    assert read_labelme(tmp_path).fingerprint() == ds.fingerprint()
    assert [os.stat(p).st_mtime_ns for p in ds.paths] == times
    Path(ds.paths[0]).write_bytes(b"half") # as a full disk leaves it
    assert read_labelme(tmp_path).image(0).shape == (48, 64, 3)
    put(tmp_path, {"train/1.jpg": image_bytes()})
    assert read_labelme(tmp_path).paths[0] == "train/1.jpg"


def with_note(jpeg, orientation, order="MM"):
    "A JPEG with an EXIF orientation behind another segment."
    def n(value, size): return value.to_bytes(size, "big" if order == "MM" else "little")
    header = order.encode() + n(42, 2) + n(8, 4)
    maker = n(0x010f, 2) + n(2, 2) + n(2, 4) + b"x\0\0\0"
    note = n(0x0112, 2) + n(3, 2) + n(1, 4) + n(orientation, 2) + b"\0\0"
    tiff = header + n(2, 2) + maker + note + n(0, 4)
    jfif = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
    exif = b"\xff\xe1" + (len(tiff) + 8).to_bytes(2, "big") + b"Exif\0\0" + tiff
    return jpeg[:2] + jfif + exif + jpeg[2:]


@pytest.mark.parametrize("order", ["MM", "II"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("reader", ["labelme", "cvat"])
def test_drawn_on_the_turned_image(tmp_path, orientation, order, reader):
    "A painted object, labeled on the image as it is shown, is boxed there: an image is what a viewer shows."
    im = np.full((48, 80, 3), 30, np.uint8)
    im[6:20, 12:34] = 230
    jpeg = cv2.imencode(".jpg", im, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    put(tmp_path, {"1.jpg": with_note(jpeg, orientation, order)})
    shown = cv2.imread(str(tmp_path / "1.jpg"))
    ys, xs = np.nonzero(shown[..., 0] > 130)
    x1, y1, x2, y2 = (int(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    h, w = shown.shape[:2]
    assert read_header(tmp_path / "1.jpg").orientation == orientation
    assert (h, w) == ((48, 80) if orientation < 5 else (80, 48))
    if reader == "labelme":
        put(tmp_path, {"1.json": labelme(shape("s", [[x1, y1], [x2, y2]]), size=(h, w))})
        ds = read_labelme(tmp_path)
    else:
        box = f'<box label="s" xtl="{x1}" ytl="{y1}" xbr="{x2}" ybr="{y2}"/>'
        put(tmp_path, {"a.xml": cvat(f'<image id="0" name="1.jpg" width="{w}" height="{h}">{box}</image>')})
        ds = read_cvat(tmp_path)
    assert ds.boxes.tolist() == [[x1, y1, x2, y2]] and ds.sizes.tolist() == [[h, w]]
    assert ds.image(0)[y1:y2, x1:x2].mean() > 200 and ds.flaws == []


def test_drawn_on_the_stored_image(tmp_path):
    "A declared size that is the stored one shows a tool that does not turn: its boxes are turned with the image."
    label = labelme(shape("s", [[12, 6], [34, 20]]), size=(48, 80))
    put(tmp_path, {"1.jpg": with_note(image_bytes(48, 80), 6), "1.json": label})
    ds = read_labelme(tmp_path)
    assert ds.boxes.tolist() == [[28, 12, 42, 34]] and ds.sizes.tolist() == [[80, 48]]
    assert [(f.kind, f.action) for f in ds.flaws] == [("rotated-image", "noted")]


@settings(max_examples=60, deadline=None)
@given(o=st.integers(1, 8), box=st.tuples(*[st.floats(0, 40)] * 4))
def test_boxes_upright_keeps_the_area(o, box):
    x1, y1, x2, y2 = boxes_upright([box], o, (48, 80))[0]
    assert abs(abs((x2 - x1) * (y2 - y1)) - abs((box[2] - box[0]) * (box[3] - box[1]))) < 1e-6


@pytest.mark.parametrize("change, parts", [
    (dict(shapes=5), ["1.json, line 1: shapes must be a list"]),
    (dict(shapes=[5]), ["line 1: shape 1: a shape must have a label and points"]),
    (dict(shapes=[shape(None, [[1, 2], [3, 4]])]), ["shape 1: label must be a text"]),
    (dict(shapes=[shape(" ", [[1, 2], [3, 4]])]), ["label must be a text, and not empty"]),
    (dict(shapes=[shape("\ud800", [[1, 2], [3, 4]])]), ["label holds half a character"]),
    (dict(shapes=[shape("a", [[1, 2], [3]])]), ["points must be a list of [x, y]"]),
    (dict(shapes=[shape("a", "[[1, 2]]")]), ["points must be a list of [x, y]"]),
    (dict(shapes=[shape("a", [])]), ["a rectangle cannot have 0 points"]),
    (dict(shapes=[shape("a", [[1, 2]], "circle")]), ["a circle cannot have 1 points"]),
    (dict(shapes=[shape("a", [[1, 10**400], [3, 4]])]), ["an integer of 1329 bits is no coordinate"]),
    (dict(shapes=[shape("a", [[1, float("nan")], [3, 4]])]), ["nan is no coordinate"]),
    (dict(shapes=[shape("a", [[1, 2], [3, 4]], 7)]), ["shape_type must be a text"]),
    (dict(shapes=[shape("a", [[1, 2], [3, 4]], flags=["x"])]), ["flags must be names with values"]),
    (dict(shapes=[shape("a", [[1, 2], [3, 4]], flags={"x": [1]})]), ["a value in flags must be a text"]),
    (dict(imagePath=5), ["1.json, line 1: imagePath must be a text"]),
    (dict(imageData=[1]), ["imageData must be a text"]),
    (dict(imageHeight="tall"), ["imageHeight and imageWidth: 'tall' is not a number"]),
    (dict(shapes=[]), ["1 images and not one box"]),
])
def test_labelme_errors(tmp_path, change, parts):
    put(tmp_path, {"1.jpg": image_bytes(), "1.json": labelme(**change)})
    refused(lambda: read_labelme(tmp_path), *parts)


def test_labelme_errors_name_the_line(tmp_path):
    put(tmp_path, {
        "1.jpg": image_bytes(),
        "1.json": json.dumps(labelme(shape("a", [[1, 2], [3, 4]]), shape("a", [[1, 2], [3, "x"]])), indent=2),
    })
    text = (tmp_path / "1.json").read_text().splitlines()
    line = int(re.search(r"line (\d+)", refused(lambda: read_labelme(tmp_path), "shape 2: 'x' is not a number"))[1])
    assert text[line - 1].strip() == "{" and '"x"' in "".join(text[line - 1:])and '"x"' not in "".join(text[:line])
    refused(lambda: read_labelme(tmp_path / "1.json"), "1.json: LabelMe has a file for each image: give the folder")
    put(tmp_path, {"1.json": '{"images": []}'})
    refused(lambda: read_labelme(tmp_path), "1.json, line 1: no LabelMe file: shapes is missing")
    (tmp_path / "1.json").unlink()
    refused(lambda: read_labelme(tmp_path), "no LabelMe JSON file")


@pytest.mark.data
def test_real_labelme(data):
    "A folder where COCO JSON lies beside two LabelMe files, one of which names an image of another ending."
    ds = read_labelme(data / "datasets/aerial/coco_utils")
    assert ds.paths.tolist() == ["terrain1.jpg", "terrain2.png"]
    assert ds.class_counts() == {"car": 5, "human": 7}
    assert [f.kind for f in ds.flaws] == ["no-labels"]
    coco = read_coco(data / "datasets/aerial/coco_utils/combined_coco.json") # the same shapes, rounded there
    order = [coco.paths.tolist().index(p) for p in ds.paths]
    assert np.abs(coco.subset(order).boxes - ds.boxes).max() <= 1.01
    assert detect_labelme(Files(data/"datasets/aerial")) == "coco_utils/terrain1.json"
    assert detect_labelme(Files(data/"datasets/bccd")) == ""


# CVAT

@settings(max_examples=60, deadline=None)
@given(v=st.tuples(*[st.floats(-50, 400)] * 4), degrees=st.floats(0, 360))
def test_cvat_turned_box(v, degrees):
    "The box around the four corners, turned clockwise on the screen about their center."
    corners = np.array([(v[0], v[1]), (v[2], v[1]), (v[2], v[3]), (v[0], v[3])])
    a = np.radians(degrees)
    center = corners.mean(0)
    turned = (corners - center) @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) + center
    el = parse_xml(
        f'<box xtl="{v[0]:.9f}" ytl="{v[1]:.9f}" xbr="{v[2]:.9f}" ybr="{v[3]:.9f}" rotation="{degrees:.9f}"/>'.encode(),
        "x", "box", "x")
    x1, y1, x2, y2 = _cvat_box(el)
    got = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    if v[0] <= v[2] and v[1] <= v[3] or not degrees:
        assert np.abs(np.array(got) - (*turned.min(0), *turned.max(0))).max() < 1e-4


def image(body, name="1.jpg", **kw):
    more = " ".join(f'{k}="{v}"' for k, v in kw.items())
    return f'<image id="0" name="{name}" width="64" height="48" {more}>\n{body}\n</image>'


BOX = '<box label="s" xtl="1" ytl="2" xbr="30" ybr="40"/>'


def test_cvat_shapes_and_attributes(tmp_path):
    "Every kind of shape; the order of the labels is that of the file."
    corners = ((corner, k) for k in (1, 2) for corner in ("tl", "bl", "tr", "br"))
    cuboid = " ".join(f'x{corner}{k}="{10 * k + 2}" y{corner}{k}="{10 * k + 3}"' for corner, k in corners)
    body = (
        '<box label="p" occluded="1" group_id="4" xtl="1" ytl="2" xbr="30" ybr="40">'
        '<attribute name="label">a</attribute><attribute name="flags"> </attribute>'
        '<attribute name="ignore">true</attribute></box>'
        '<polygon label="s" points="5,6;20.5,9;9,30"/>'
        '<ellipse label="s" cx="20" cy="20" rx="5" ry="8"/>'
        '<mask label="s" rle="1" left="3" top="4" width="10" height="20"/>'
        f'<cuboid label="s" {cuboid}/>'
        '<polyline label="s" points="1,2;3,4"/>'
        '<points label="s" points="1,2"/>'
        '<skeleton label="s"><points label="joint" points="1,2"/></skeleton>'
        '<tag label="s"/>')
    put(tmp_path, {"images/1.jpg": image_bytes(), "annotations.xml": cvat(image(body))})
    ds = read_cvat(tmp_path)
    assert ds.classes == ("s", "p")
    assert ds.labels.tolist() == [1, 0, 0, 0, 0]
    assert ds.flags.tolist() == [IGNORE, 0, 0, 0, 0]
    assert ds.boxes.tolist() == [[1, 2, 30, 40], [5, 6, 20.5, 30], [15, 12, 25, 28], [3, 4, 13, 24], [12, 13, 22, 23]]
    assert {k: v.tolist()[0] for k, v in ds.attributes.items()} == {"occluded": "1", "group_id": "4", "label": "a"}
    assert [f.message.split("<")[1].split(">")[0] for f in ds.flaws] == ["polyline", "points", "skeleton", "tag"]


def test_cvat_labels_that_are_no_classes(tmp_path):
    types = (("z", "rectangle", ""), ("night", "tag", ""), ("body", "skeleton", ""),
             ("knee", "points", "<parent>body</parent>"), ("a", "any", ""))
    labels = "".join(f"<label><name>{n}</name><type>{t}</type>{parent}</label>" for n, t, parent in types)
    body = image(BOX.replace('"s', '"z') + '<tag label="night"/>')
    text = f"<annotations><meta><project><labels>{labels}</labels></project></meta>{body}</annotations>"
    put(tmp_path, {"1.jpg": image_bytes(), "a.xml": text})
    assert read_cvat(tmp_path).classes == ("z", "a")
    # no <meta>: names in alphabetical order
    body = image(BOX + BOX.replace('"s', '"b'))
    put(tmp_path, {"a.xml": f"<annotations>{body}</annotations>"})
    assert read_cvat(tmp_path).classes == ("b", "s")


def test_cvat_project_groups_and_missing(tmp_path):
    "Two tasks of a project are two groups; a task of one folder has none."
    tasks = "<task><id>3</id><name>north</name></task><task><id>5</id><name>south</name></task>"
    labels = "<labels><label><name>s</name></label></labels>"
    meta = f"<meta><project><tasks>{tasks}</tasks>{labels}</project></meta>"
    images = image(BOX, "1.jpg", subset="Train", task_id="3")
    images += image(BOX, "1.jpg", subset="Test", task_id="5")
    images += image(BOX, "day 1/2.jpg", subset="Test", task_id="5")
    images += image(BOX, "9.jpg", subset="cam", task_id="5")
    paths = ["images/Train/1.jpg", "images/Test/1.jpg", "images/Test/day 1/2.jpg"]
    put(tmp_path, {"annotations.xml": f"<annotations>{meta}{images}</annotations>"})
    put(tmp_path, {path: image_bytes() for path in paths})
    ds = read_cvat(tmp_path)
    assert ds.paths.tolist() == paths
    assert ds.splits.tolist() == ["train", "test", "test"]
    assert ds.groups.tolist() == ["north/", "south/", "south/day 1"]
    assert [(f.kind, f.file) for f in ds.flaws] == [("missing-image", "9.jpg")]
    text = cvat(image(BOX, "sub\\1.jpg", subset="Train"))
    put(tmp_path / "one", {"annotations.xml": text, "images/sub/1.jpg": image_bytes()})
    ds = read_cvat(tmp_path / "one")
    assert (ds.paths.tolist(), ds.groups.tolist(), ds.splits.tolist()) == (["images/sub/1.jpg"], [""], [""])


def track(*boxes, label="s", id=1):
    rows = [f'<box frame="{n}" outside="{outside}" occluded="0" keyframe="1" xtl="{n}" ytl="2" xbr="30" ybr="40"/>'
            for n, outside in boxes]
    return "\n".join([f'<track id="{id}" label="{label}">', *rows, "</track>"])


def test_cvat_tracks(tmp_path):
    body = track((0, 0), (1, 0), (2, 1)) + track((1, 0), (3, 0), (4, 1), label="p", id=9)
    put(tmp_path, {"annotations.xml": cvat(body), "images/cover.jpg": image_bytes()})
    put(tmp_path, {f"images/frame_{n:06d}.PNG": image_bytes(suffix=".png") for n in range(3)})
    ds = read_cvat(tmp_path)
    assert [Path(p).name for p in ds.paths] == [f"frame_{n:06d}.PNG" for n in range(3)]
    assert [ds.boxes_of(i)[0][:, 0].tolist() for i in range(3)] == [[0], [1, 1], []]
    assert attributes_of(ds) == {"track": ["1", "1", "9"]}
    assert [(f.kind, f.where) for f in ds.flaws] == [("missing-image", "frame 3"), ("no-labels", "")] # the cover
    assert read_cvat(tmp_path / "annotations.xml").fingerprint() == ds.fingerprint()


def test_cvat_tracks_without_their_frames(tmp_path):
    put(tmp_path, {"a.xml": cvat(track((0, 0), (1, 0))), "x.jpg": image_bytes()})
    refused(
        lambda: read_cvat(tmp_path),
        "a.xml, line 1: tracks of a video, and no image is named by the number of a frame, such as frame_000000.png")
    put(tmp_path, {"f1.jpg": image_bytes(), "f2.jpg": image_bytes()})
    refused(lambda: read_cvat(tmp_path), "a.xml, line 1: its frames count from 0 and the images from 1, such as f2.jpg")
    put(tmp_path, {"f0.jpg": image_bytes(), "g0.jpg": image_bytes()})
    refused(lambda: read_cvat(tmp_path), "f0.jpg and g0.jpg could both be its frame 0")


def test_cvat_videos_are_groups(tmp_path):
    for day in ("north", "south"):
        put(tmp_path / day, {"annotations.xml": cvat(track((0, 0), (1, 0))).replace("dock", day)})
        put(tmp_path / day, {f"images/frame_{n:06d}.jpg": image_bytes() for n in range(2)})
    assert read_cvat(tmp_path).groups.tolist() == ["north", "north", "south", "south"]


@pytest.mark.parametrize("body, parts", [
    (image('<box label="s" xtl="1" ytl="2" xbr="30"/>'), ["a.xml, line 8: <box> of s: ybr is missing"]),
    (image('<box label="s" xtl="1" ytl="2" xbr="30" ybr="x"/>'), ["line 8: <box> of s: 'x' is not a number"]),
    (image(BOX + "\n" + BOX.replace('"s"', '"t"')),
     ["a.xml, line 9: label 't' is not declared in <meta>: it is one of s, p"]),
    (image(BOX + "<box/>"), ["line 8: <box> has no label"]),
    (image('<polygon label="s" points="1,2;3"/>'), ["line 8: <polygon> of s: points must be pairs"]),
    (image('<polygon label="s"/>'), ["line 8: <polygon> of s: '' is not a number"]),
    (image(BOX).replace('name="1.jpg"', ""), ["a.xml, line 7: <image> has no name"]),
    (image(BOX).replace('height="48"', 'height="x"'), ["line 7: width and height: 'x' is not a number"]),
    (track((0, 0)).replace('frame="0"', 'frame="-1"'), ["line 8: <box> of s: frame must be a whole number, not '-1'"]),
    ("<image>", ["a.xml, line 8: not valid XML: mismatched tag"]),
    (image(""), ["1 images and not one box"]),
])
def test_cvat_errors(tmp_path, body, parts):
    put(tmp_path, {"1.jpg": image_bytes(), "a.xml": cvat(body)})
    refused(lambda: read_cvat(tmp_path), *parts)


def test_cvat_is_told_from_voc(tmp_path):
    put(tmp_path, {"1.jpg": image_bytes(), "a.xml": "<annotation><object/></annotation>"})
    assert detect_cvat(Files(tmp_path)) == ""
    refused(lambda: read_cvat(tmp_path),
            "a.xml, line 1: not a CVAT file: it begins with <annotation>, not <annotations>")
    (tmp_path / "a.xml").unlink()
    refused(lambda: read_cvat(tmp_path), "no CVAT XML file")


# KITTI

ROW = "Car 0.00 2 -1.67 1 2 30 40 1.41 1.58 4.36 3.18 2.27 34.38 -1.58\n"


@pytest.mark.parametrize("image, label", [
    ("training/image_2/1.png", "training/label_2/1.txt"),
    ("image_02/1.PNG", "label_02/1.txt"),
    ("images/1.jpg", "labels/1.txt"),
    ("images/train/1.jpg", "labels/train/1.txt"),
    ("1.jpg", "1.txt"),
    ("Images/1.jpg", "Labels/1.TXT"),
    ("pics/50% #1.jpg", "label_2/50% #1.txt"),
])
def test_kitti_layouts(tmp_path, image, label):
    put(tmp_path, {
        image: image_bytes(),
        label: ROW,
        "calib/1.txt": "P0: " + "0 "*12,
        "other/image_3/1.png" if "image_2" in image else "other/2.png": image_bytes(),
    })
    ds = read_kitti(tmp_path)
    assert ds.paths.tolist() == [image]
    assert ds.boxes.tolist() == [[1, 2, 30, 40]]
    assert detect_kitti(Files(tmp_path)) == label


def test_kitti_rows(tmp_path):
    """A result has a 16th word; an empty file is background; a DontCare area has the flags of one and the commonest
    class."""
    put(tmp_path,
        {f"image_2/{k}.png": image_bytes(suffix=".png")
         for k in range(5)} | {
             "label_2/0.txt": ROW.strip() + " 0.97\r\n\r\n" + ROW + ROW.replace("Car", "Bus"), "label_2/1.txt": "",
             "label_2/2.txt": "DontCare -1 -1 -10 1 2 3 4 -1 -1 -1 -1000 -1000 -1000 -10\n", "label_2/9.txt": ROW,
             "testing/image_2/7.png": image_bytes()
         })
    ds = read_kitti(tmp_path)
    assert ds.classes == ("Bus", "Car")
    assert ds.labels.tolist() == [1, 1, 0, 1]
    assert ds.flags.tolist() == [0, 0, 0, CROWD | IGNORE]
    assert {k: v.tolist()
            for k, v in ds.attributes.items()} == {
                "truncated": ["0.00"]*3 + [""], "occluded": ["2"]*3 + [""], "alpha": ["-1.67"]*3 + [""],
                "area": ["", "", "", "DontCare"]
            }
    assert [(f.kind, f.file, f.action) for f in ds.flaws] == [("missing-image", "label_2/9.txt", "dropped"),
                                                              ("no-labels", "image_2/3.png", "noted"),
                                                              ("no-labels", "image_2/4.png", "noted"),
                                                              ("no-labels", "testing/image_2", "dropped")]


def test_kitti_splits(tmp_path):
    put(tmp_path, {f"training/image_2/{k}.png": image_bytes(suffix=".png")
                   for k in range(3)} | {f"training/label_2/{k}.txt": ROW
                                         for k in range(3)})
    assert read_kitti(tmp_path).splits.tolist() == ["", "", ""] # `training` is no split
    put(tmp_path, {"ImageSets/train.txt": "0\n1\n", "ImageSets/val.txt": "2\n", "ImageSets/trainval.txt": "0\n1\n2\n"})
    assert read_kitti(tmp_path).splits.tolist() == ["train", "train", "val"]
    put(tmp_path, {"ImageSets/val.txt": "2\n\n1\n"})
    refused(lambda: read_kitti(tmp_path), "val.txt, line 3: '1' is in ImageSets/train.txt too")


@pytest.mark.parametrize("text, parts", [
    (ROW + "Car 1 2\n", ["label_2/1.txt, line 2: 3 words: a KITTI label has 15"]),
    (ROW.replace("30", "nan"), ["line 1: 'nan' is not a number"]),
    (ROW.replace("34.38", "x"), ["'x' is not a number"]),
    (ROW.replace("30", "9" * 400), ["is not a number"]),
    (ROW.encode() + b"\n\xff", ["1.txt, line 3: not UTF-8 text"]),
    ("", ["1 images and not one box"]),
    ("DontCare -1 -1 -10 1 2 3 4 -1 -1 -1 -1000 -1000 -1000 -10", ["1 boxes are all DontCare"]),
])
def test_kitti_errors(tmp_path, text, parts):
    put(tmp_path, {"image_2/1.png": image_bytes(suffix=".png"), "label_2/1.txt": text})
    refused(lambda: read_kitti(tmp_path), *parts)


@pytest.mark.data
def test_real_kitti(data):
    ds = read_kitti(data / "datasets/kitti_mini")
    counts = dict(zip(ds.classes, np.bincount(ds.labels[ds.flags == 0], minlength=5).tolist()))
    assert len(ds) == 3
    assert counts == {"Car": 2, "Cyclist": 1, "Misc": 1, "Pedestrian": 1, "Truck": 1}
    assert (ds.flags == CROWD | IGNORE).sum() == 4
    assert ds.sizes.tolist() == [[370, 1224], [375, 1242], [375, 1242]]
    assert ds.flaws == []
    assert ds.splits.tolist() == ["", "", ""]
    assert detect_kitti(Files(data/"datasets/kitti_mini")) == "label_2/000000.txt"
    assert detect_kitti(Files(data/"datasets/plates_eu")) == ""


# Darknet

DARK = {
    "obj/1.jpg": image_bytes(),
    "obj/1.txt": "0 .5 .5 .5 .5\n",
    "obj/2.jpg": image_bytes(),
    "obj/2.txt": "1 .5 .5 .25 .25\n",
}
KEYS = "classes= 2\ntrain  = {0}train.txt\nvalid  = {0}valid.txt\n# a note\nnames = {0}obj.names\nbackup = backup/\n"


@pytest.mark.parametrize("folder, keys, line", [
    ("data/", KEYS.format("data/"), "data/obj/{}"),
    ("", KEYS.format("data/"), "data/obj/{}"),
    ("", KEYS.format(""), "obj/{}"),
    ("", None, "data/obj/{}"),
    ("", KEYS.format("build/darknet/x64/data/"), "build/darknet/x64/data/obj/{}"),
    ("", KEYS.format("/home/me/data/"), "/home/me/data/obj/{}"),
    ("", KEYS.format(""), "obj\\{}"),
])
def test_darknet_layouts(tmp_path, folder, keys, line):
    put(tmp_path / folder, {
        **DARK,
        "obj.names": "\ufeffs\r\np\r\n\r\n",
        "train.txt": line.format("1.jpg") + "\r\n",
        "valid.txt": line.format("2.jpg") + "\n",
    })
    if keys: put(tmp_path / folder, {"obj.data": keys})
    ds = read_yolo(tmp_path)
    assert ds.classes == ("s", "p")
    assert ds.splits.tolist() == ["train", "val"]
    assert ds.boxes.tolist() == [[16, 12, 48, 36], [24, 18, 40, 30]]
    assert ds.flaws == []
    if keys:
        assert read_yolo(tmp_path / folder / "obj.data").fingerprint() == ds.fingerprint()
        assert detect_yolo(Files(tmp_path)) == folder + "obj.data"


def test_darknet_one_list_and_a_missing_image(tmp_path):
    put(tmp_path, {
        **DARK,
        "obj.data": KEYS.format("").replace("valid.txt", "train.txt"),
        "obj.names": "s\np\n",
        "train.txt": "obj/1.jpg\nobj/2.jpg\nobj/3.jpg\n",
    })
    ds = read_yolo(tmp_path)
    assert ds.splits.tolist() == ["", ""]
    assert [(f.kind, f.file, f.where) for f in ds.flaws] == [
        ("same-splits", "", ""),
        *[("missing-image", "obj/3.jpg", "train.txt")] * 2,
    ]


@pytest.mark.parametrize("change, parts", [
    ({"obj.data": KEYS.format("").replace("= 2", "= 3")},
     ["obj.data, line 1: classes is 3, and", "obj.names has 2 names"]),
    ({"obj.data": KEYS.format("").replace("obj.names", "x.names")},
     ["obj.data, line 5: the file of names 'x.names' is not there"]),
    ({"obj.data": KEYS.format("").replace("valid.txt", "gone.txt")}, ["obj.data, line 3: 'gone.txt' is not there"]),
    ({"obj.names": "\n\n"}, ["obj.names, line 1: names must be a list"]),
    ({"obj.names": "s\n"}, ["classes is 2"]),
    ({"valid.txt": "obj/1.jpg\nobj/2.jpg\n"}, ["is in train and in val"]),
    ({"obj/1.txt": "0 .5 .5 .5\n"}, ["obj/1.txt, line 1: 4 numbers"]),
    ({"obj/1.txt": "0 .5 .5 .5 .5\n0 .1 .1 .2 .1 .2 .2 .1 .2\n2 .1 .1 .2 .1 .2 .2 .1 .2"},
     ["obj/1.txt, line 3: class 2: there are 2 classes"]),
])
def test_darknet_errors(tmp_path, change, parts):
    put(tmp_path, {
        **DARK,
        "obj.data": KEYS.format(""),
        "obj.names": "s\np\n",
        "train.txt": "obj/1.jpg\n",
        "valid.txt": "obj/2.jpg\n",
        **change,
    })
    refused(lambda: read_yolo(tmp_path), *parts)


def test_yolo_turned_boxes_are_outlines(tmp_path):
    put(tmp_path, {**DARK, "classes.txt": "s\np\n", "obj/1.txt": "0 .25 .25 .5 .125 .75 .5 .5 .75\n"})
    assert read_yolo(tmp_path).boxes[0].tolist() == [16, 6, 48, 36]


# Damage

HOSTILE = [
    b"", b"nan", b"-1", b"9"*400, b"1e999", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"<", b">", b"&a;", b"[", b"]"*3,
    b"{"*2000, b"["*3000, b'"', b'"\\ud800"', b"\n", b":", b"- ", b"*a", b"&a ", b"!!int x", b"0,5", b"true", b"null",
    b"{}", b"../../..", b"x"*5000, b"<a>"*500, b"<!DOCTYPE a [<!ENTITY b 'c'>]>", "写".encode()
]
VALUES = [
    None, True, [], {}, "", "x", " ", 10**400, -1, 0, 1e300,
    float("nan"), "\ud800", "a"*3000, [[[]]], {"a": {"b": []}}, [1, 2], "9"*400, {"": ""}, "1.jpg\0"
]


def damaged_bytes(data, rng):
    "Cut, flipped, doubled, or with something hostile in the place of a number, a word or nothing."
    kind = rng.integers(6)
    at = int(rng.integers(len(data)))
    end = min(len(data), at + int(rng.integers(1, 30)))
    if kind == 0: return data[:at]
    if kind == 1: return bytes(b ^ (1 << int(rng.integers(8))) if rng.random() < .01 else b for b in data)
    if kind == 2: return data[:at] + data[at:end] * 2 + data[end:]
    if kind == 3: return data[:at] + data[end:]
    spans = [m.span() for m in re.finditer(rb"[0-9.]+|[A-Za-z_]+", data)] if kind == 4 else [(at, at)]
    a, b = spans[int(rng.integers(len(spans)))]
    return data[:a] + HOSTILE[int(rng.integers(len(HOSTILE)))] + data[b:]


def damaged_json(d, rng):
    "One value anywhere is gone or another."
    parent = None
    value = d
    while isinstance(value, (dict, list)) and value and (parent is None or rng.random() < .8):
        key = int(rng.integers(len(value)))
        if isinstance(value, dict): key = list(value)[key]
        parent = value
        value = value[key]
    if rng.random() < .25: del parent[key]
    else: parent[key] = VALUES[int(rng.integers(len(VALUES)))]
    return d


def whole(ds):
    "A dataset can be printed, fingerprinted and written."
    assert np.isfinite(ds.boxes).all() and repr(ds) and len(ds.fingerprint()) == 16
    json.dumps(to_coco(ds), ensure_ascii=False).encode()


PIC = base64.b64encode(image_bytes()).decode()
GOOD_LABELME = labelme(shape("a", [[1, 2], [30, 40]], flags={"wet": True}, group_id=3, description="x"),
                       shape("b", [[20, 20], [26, 28]], "circle", attributes={"c": "d"}),
                       imageData=PIC)
SHAPES = (
    '<ellipse label="p" cx="20" cy="20" rx="5" ry="8" rotation="30"><attribute name="x">y</attribute></ellipse>'
    '<polygon label="s" points="5,6;20.5,9;9,30"/>')
GOOD_CVAT = cvat(image(BOX + SHAPES, subset="Train"))
GOOD_YOLO = {
    "data.yaml": "path: .\ntrain: images\nval: images\nnames:\n  0: s\n  1: p\nnc: 2\n",
    "labels/1.txt": "0 .5 .5 .25 .25\n1 .1 .1 .5 .1 .3 .3 .2 .2\n",
    "images/1.jpg": image_bytes(),
}
GOOD_DARK = {
    **DARK,
    "obj.data": KEYS.format(""),
    "obj.names": "s\np\n",
    "train.txt": "obj/1.jpg\n",
    "valid.txt": "obj/2.jpg\n",
}
VOC_XML = (
    "<annotation><filename>1.jpg</filename><size><width>64</width><height>48</height></size>\n"
    "<object><name>s</name><pose>Left</pose><truncated>1</truncated>"
    "<bndbox><xmin>1</xmin><ymin>2.5</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object>\n"
    "</annotation>")
IMAGES = {"0.jpg": image_bytes(), "1.jpg": image_bytes()}
KITTI = {"image_2/1.png": image_bytes(suffix=".png"), "label_2/1.txt": ROW * 3}
DAMAGE = [
    ("labelme", read_labelme, {"1.jpg": image_bytes(), "1.json": json.dumps(GOOD_LABELME, indent=1)}, "1.json"),
    ("labelme inside", read_labelme, {"1.json": json.dumps(GOOD_LABELME)}, "1.json"),
    ("cvat", read_cvat, {"1.jpg": image_bytes(), "a.xml": GOOD_CVAT}, "a.xml"),
    ("cvat video", read_cvat, {**IMAGES, "a.xml": cvat(track((0, 0), (1, 0)))}, "a.xml"),
    ("kitti", read_kitti, KITTI, "label_2/1.txt"),
    ("kitti lists", read_kitti, {**KITTI, "label_2/1.txt": ROW, "ImageSets/train.txt": "1\n"}, "ImageSets/train.txt"),
    ("yolo yaml", read_yolo, GOOD_YOLO, "data.yaml"),
    ("yolo label", read_yolo, GOOD_YOLO, "labels/1.txt"),
    ("obj.data", read_yolo, GOOD_DARK, "obj.data"),
    ("obj.names", read_yolo, GOOD_DARK, "obj.names"),
    ("list", read_yolo, GOOD_DARK, "train.txt"),
    ("voc", read_voc, {"1.jpg": image_bytes(), "1.xml": VOC_XML}, "1.xml"),
]
OF_ALL = ("not one box", "no readable image", "without class names", "no KITTI labels", "are all DontCare",
          "is in train and in val", "both label", "stands twice", "name no folder or list", "give the folder")


@pytest.mark.parametrize("read, files, name", [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_damaged_files(tmp_path, read, files, name):
    "Whatever the bytes are: a whole dataset, or one line with the file and the line in it; and soon."
    put(tmp_path, files)
    whole(read(tmp_path))
    good = (tmp_path / name).read_bytes()
    rng = np.random.default_rng(5)
    outcomes = set()
    for k in range(300):
        data = damaged_bytes(good, rng) if not name.endswith("json") or k % 2 else json.dumps(
            damaged_json(json.loads(good), rng)).encode()
        (tmp_path / name).write_bytes(data)
        t = time.perf_counter()
        try: whole(read(tmp_path))
        except InputError as e:
            line = str(e)
            assert "\n" not in line and len(line) < 1000, line
            assert re.search(re.escape(name) + r", line \d+: ", line) or re.search(
                r"\.(names|txt|data|yaml), line \d+: ", line) or any(s in line for s in OF_ALL), (line, data[:300])
            outcomes.add("refused")
        else: outcomes.add("read")
        assert time.perf_counter() - t < 5
    # the damage is neither always fatal nor never seen; any line of a list of names may be a name
    assert outcomes == ({"read"} if name.startswith("ImageSets") else {"refused", "read"})
