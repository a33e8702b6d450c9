"""Readers and writers: round trips, layouts met in the wild, and the one line of every error."""
import os
import shutil
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from label_files import attributes_of, image_bytes, put, refused
from jetson_det.data.dataset import CROWD, DIFFICULT, IGNORE, DetDataset
from jetson_det.data.formats.catalog import WRITERS
from jetson_det.data.images.header import image_size
from jetson_det.data.formats.reader import Files
from jetson_det.data.formats.registry import read_dataset, write_dataset
from jetson_det.data.formats.voc import detect_voc, read_voc


def voc(*objects, name="a.jpg", size=(48, 64), more=""):
    "objects: (class, xmin, ymin, xmax, ymax)"
    body = ""
    for c, x1, y1, x2, y2 in objects:
        box = f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        body += f"<object><name>{c}</name><bndbox>{box}</bndbox></object>\n"
    h, w = size
    return (f"<annotation>\n<filename>{name}</filename><size><width>{w}</width><height>{h}</height></size>\n"
            f"{body}{more}</annotation>")


def coco(images, anns, cats, **kw):
    "images: {id: name}; anns: (image, category, bbox); cats: {id: name}"
    return dict(
        images=[dict(id=k, file_name=n, height=48, width=64) for k, n in images.items()],
        annotations=[dict(id=k, image_id=i, category_id=c, bbox=b, **kw) for k, (i, c, b) in enumerate(anns, 1)],
        categories=[dict(id=k, name=n) for k, n in cats.items()])


ODD_NAMES = ["a b.jpg", "50% #1.JPG", "Straße.jpeg", "写真.PNG", "v1.2.jpg", "A.jpg"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Six images of odd names and different sizes."
    root = tmp_path_factory.mktemp("odd")
    for k, n in enumerate(ODD_NAMES):
        put(root, {f"in/{n}": image_bytes(40 + 8*k, 64 + 4*k, os.path.splitext(n)[1].lower())})
    return root


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), format=st.sampled_from(sorted(WRITERS)), split=st.booleans())
def test_round_trip(folder, tmp_path_factory, seed, format, split):
    rng = np.random.default_rng(seed)
    sizes = np.array([image_size(folder / "in" / n) for n in ODD_NAMES])
    m = int(rng.integers(1, 40))
    which = np.sort(rng.integers(0, 6, m))
    corners = np.sort(rng.random((m, 2, 2)), 1).reshape(m, 4) * np.tile(sizes[which][:, ::-1], 2)
    ds = DetDataset(folder, ("Säcke & <Co>", "person"), [f"in/{n}" for n in ODD_NAMES],
                    sizes,
                    which,
                    corners,
                    rng.integers(0, 2, m), ["train", "train", "train", "val", "val", "test"] if split else None,
                    flags=rng.choice([0, 0, 0, DIFFICULT, CROWD, IGNORE, CROWD | DIFFICULT], m),
                    image_ids=rng.permutation(1000)[:6])
    keep = (ds.flags & (CROWD | IGNORE) == 0) if format == "yolo" else np.ones(m, bool)
    dst = tmp_path_factory.mktemp("out") / "new"
    if not keep.any(): return
    write_dataset(ds, dst, format, images="hardlink")
    new = read_dataset(dst)
    assert new.format == format and new.classes == ds.classes and len(new) == 6
    order = [new.paths.tolist().index(next(p for p in new.paths if p.endswith("/" + n))) for n in ODD_NAMES]
    back = new.subset(order)
    assert back.splits.tolist() == ds.splits.tolist() and (back.sizes == ds.sizes).all()
    assert np.abs(back.boxes - ds.boxes[keep]).max() <= .01
    assert (back.labels == ds.labels[keep]).all()
    if format != "yolo": assert (back.flags == ds.flags).all()
    if format == "coco": assert (back.image_ids == ds.image_ids).all()
    for i in (0, 5): assert back.path_of(i).read_bytes() == ds.path_of(i).read_bytes()


def test_voc_numbers_are_exact(tmp_path):
    "Numbers in a VOC file are used as they stand, and are written as they were read."
    put(tmp_path, {"x/a.jpg": image_bytes(), "x/a.xml": voc(("s", 1, 2.25, 30, 40))})
    ds = read_dataset(tmp_path / "x")
    assert ds.boxes.tolist() == [[1, 2.25, 30, 40]]
    new = write_dataset(ds, tmp_path / "new", "voc")
    assert new.boxes.tolist() == ds.boxes.tolist()
    assert "<xmin>1</xmin><ymin>2.25</ymin>" in (tmp_path / "new/Annotations/a.xml").read_text()


@pytest.mark.parametrize("images, labels", [
    ("JPEGImages/a.JPG", "Annotations/a.xml"),
    ("images/a.jpeg", "annotations/a.xml"),
    ("images/a.png", "annots/a.xml"),
    ("a.jpg", "a.xml"),
    ("train/a.jpg", "train/a.xml"),
    ("images/a.jpg", "xmls/a.jpg.xml"),
])
def test_voc_layouts(tmp_path, images, labels):
    put(tmp_path, {images: image_bytes(), labels: voc(("s", 1, 2, 30, 40), name="other.jpg")})
    assert read_dataset(tmp_path).paths.tolist() == [images]


def test_voc_file_name_without_ending_and_stale(tmp_path):
    put(tmp_path, {
        "images/a.jpg": image_bytes(),
        "images/b.jpg": image_bytes(),
        "annotations/1.xml": voc(("s", 1, 2, 30, 40), name="a"),
        "annotations/b.xml": voc(("s", 5, 6, 7, 8), name="a.jpg"),
    })
    ds = read_dataset(tmp_path)
    assert dict(zip(ds.paths, ds.boxes[:, 0])) == {"images/a.jpg": 1, "images/b.jpg": 5}


def test_voc_same_stem_in_two_splits(tmp_path):
    for k, s in enumerate(("train", "val")):
        put(tmp_path, {f"images/{s}/1.jpg": image_bytes(), f"annotations/{s}/1.xml": voc(("s", k, 2, 30, 40))})
    ds = read_dataset(tmp_path)
    expected = [("images/train/1.jpg", "train", 0), ("images/val/1.jpg", "val", 1)]
    assert [(p, s, b) for p, s, b in zip(ds.paths, ds.splits, ds.boxes[:, 0])] == expected


def test_voc_trainval_only_without_train(tmp_path):
    put(tmp_path, {f"JPEGImages/{k}.jpg": image_bytes()
                   for k in range(3)} | {f"Annotations/{k}.xml": voc(("s", 1, 2, 30, 40))
                                         for k in range(3)})
    put(tmp_path, {
        "ImageSets/Main/trainval.txt": "0\n1\n",
        "ImageSets/Main/test.txt": "2.jpg\n",
        "ImageSets/Main/s_test.txt": "0 1\n1 -1\n",
    })
    assert read_dataset(tmp_path).splits.tolist() == ["train", "train", "test"]
    put(tmp_path, {"ImageSets/Main/train.txt": "0  1\n", "ImageSets/Main/val.txt": "1 -1\n"})
    assert read_dataset(tmp_path).splits.tolist() == ["train", "val", "test"]
    put(tmp_path, {"ImageSets/Main/val.txt": "1\n9\n"})
    ds = read_dataset(tmp_path)
    assert [(f.kind, f.file) for f in ds.flaws] == [("missing-image", "9")]
    put(tmp_path, {"ImageSets/Main/val.txt": "1\n2\n"})
    refused(lambda: read_dataset(tmp_path), "test.txt, line 1: '2' is in ImageSets/Main/val.txt too")


def test_voc_header_wins_over_the_label(tmp_path):
    put(tmp_path, {
        "a.jpg": image_bytes(),
        "a.xml": voc(("s", 1, 2, 30, 40), size=(0, 0)),
        "b.jpg": image_bytes(),
        "b.xml": voc(("s", 1, 2, 30, 40), size=(96, 128)).replace("a.jpg", "b.jpg"),
    })
    ds = read_dataset(tmp_path)
    assert ds.sizes.tolist() == [[48, 64]] * 2
    assert [(f.kind, f.file, f.action) for f in ds.flaws] == [("size-mismatch", "b.jpg", "noted")]


BOMB = '<!DOCTYPE l [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>'


@pytest.mark.parametrize("text, parts", [
    (voc(("s", 1, "nan", 30, 40)),
     ["a.xml, line 3: object 1 (s) needs a <bndbox> of four numbers, xmin, ymin, xmax, ymax: 'nan' is not a number"]),
    (voc(("t", 1, 2, 30, 40), ("s", 1, "inf", 30, 40)), ["a.xml, line 4: object 2 (s)", "'inf' is not a number"]),
    (voc(("s", 1, "1e300", 30, 40)), ["1e+300 is no coordinate"]),
    (voc(more="<object><name>s</name><bndbox><xmin>1</xmin></bndbox></object>"), ["ymin is missing"]),
    (voc(("s", 1, "", 30, 40)), ["a.xml, line 3: object 1 (s) needs a <bndbox> of four numbers"]),
    (voc(more="<object><name>s</name></object>"), ["object 1 (s) needs a <bndbox>"]),
    (voc(("", 1, 2, 30, 40)), ["a.xml, line 3: object 1 has no <name>"]),
    ("<annotation>\n<object>", ["a.xml, line 2: not valid XML"]),
    (BOMB + "<annotation>&b;</annotation>", ["a.xml, line 1: has a DOCTYPE"]),
    ((BOMB + "<annotation>&b;</annotation>").encode("utf-16"), ["a.xml, line 1: has a DOCTYPE"]),
    (voc(), ["1 images and not one box"]),
])
def test_voc_errors(tmp_path, text, parts):
    put(tmp_path, {"a.jpg": image_bytes(), "a.xml": text})
    refused(lambda: read_dataset(tmp_path, "voc"), *parts)


def test_voc_attributes(tmp_path):
    "Marks that are set are kept, those that say nothing cost nothing."
    marks = [
        dict(truncated=1, occluded=0, difficult=0, pose="Unspecified"),
        dict(truncated=0, occluded=" 1 ", difficult=1, pose="Rear"),
        dict(difficult="0", pose="Unspecified")
    ]
    text = voc(*[("s", k, 2, 30, 40) for k in range(3)])
    for m in marks:
        text = text.replace("</name><bnd", "</name>" + "".join(f"<{k}>{v}</{k}>" for k, v in m.items()) + "<bnd", 1)
    put(tmp_path, {"a.jpg": image_bytes(), "a.xml": text})
    ds = read_dataset(tmp_path, "voc")
    assert ds.flags.tolist() == [0, DIFFICULT, 0]
    assert attributes_of(ds) == {"truncated": ["1", "", ""], "occluded": ["", "1", ""], "pose": ["", "Rear", ""]}
    put(tmp_path, {"a.xml": voc(("s", 1, 2, 30, 40))})
    assert read_dataset(tmp_path, "voc").attributes == {}


@pytest.mark.parametrize("format", ["coco", "voc"])
def test_attributes_come_back(tmp_path, format):
    put(tmp_path, {"in/a.jpg": image_bytes()})
    attributes = {"text": ["M5 <XSX>", "", "B & MW"], "truncated": ["1", "", ""], "pose": ["", "Rear", ""]}
    ds = DetDataset(tmp_path / "in", ("s",), ["a.jpg"], [(48, 64)], [0, 0, 0], [(k, 1, 9, 9) for k in range(3)], [0]*3,
                    attributes=attributes)
    new = write_dataset(ds, tmp_path / "out", format)
    assert attributes_of(new) == attributes
    assert new.flaws == []


def test_voc_split_is_said_by_folders_alone(tmp_path):
    put(tmp_path, {"images/train_7.jpg": image_bytes(), "annotations/train_7.xml": voc(("s", 1, 2, 30, 40))})
    assert read_dataset(tmp_path, "voc").splits.tolist() == [""]
    refused(lambda: read_voc(tmp_path / "annotations/train_7.xml"), "give the folder")


def test_voc_upper_case_endings_and_signs(tmp_path):
    put(tmp_path, {"JPEGImages/a.JPG": image_bytes(), "Annotations/a.XML": voc(("s", 1.5, 2.25, 30, 40))})
    assert read_dataset(tmp_path, "voc").boxes.tolist() == [[1.5, 2.25, 30, 40]]
    assert detect_voc(Files(tmp_path)) == "Annotations/a.XML"
    put(tmp_path, {"Annotations/a.XML": "<annotations><image/></annotations>"}) # CVAT's root has one letter more
    assert detect_voc(Files(tmp_path)) == ""


def test_voc_billion_laughs_is_quick(tmp_path):
    bomb = "<!DOCTYPE l [<!ENTITY a0 'ha'>" + "".join(f"<!ENTITY a{k} '{f'&a{k - 1};' * 10}'>"
                                                      for k in range(1, 12)) + "]><annotation>&a11;</annotation>"
    put(tmp_path, {"a.jpg": image_bytes(), "a.xml": bomb})
    t = time.perf_counter()
    refused(lambda: read_dataset(tmp_path), "has a DOCTYPE")
    assert time.perf_counter() - t < 1


def test_voc_two_labels_of_one_image(tmp_path):
    put(tmp_path, {
        "images/a.jpg": image_bytes(),
        "x/a.xml": voc(("s", 1, 2, 30, 40)),
        "y/a.xml": voc(("s", 1, 2, 30, 40)),
    })
    refused(lambda: read_dataset(tmp_path), "x/a.xml and y/a.xml both label images/a.jpg")


# COCO

@pytest.mark.parametrize("js, image, name", [
    ("annotations/instances_train2017.json", "train2017/1.jpg", "1.jpg"),
    ("annotations/instances_train2017.json", "images/train2017/1.jpg", "1.jpg"),
    ("train.json", "images/1.jpg", "1.jpg"),
    ("train.json", "images/train/sub/1.jpg", "sub/1.jpg"),
    ("train.json", "images/1.jpg", "images/1.jpg"),
    ("train/_annotations.coco.json", "train/1.jpg", "1.jpg"),
    ("train.json", "images/1.jpg", "./1.jpg"),
    ("train.json", "pics/1.jpg", "/home/x/1.jpg"),
    ("train.json", "images/sub/1.jpg", "sub\\1.jpg"),
])
def test_coco_layouts(tmp_path, js, image, name):
    val = js.replace("train", "valid" if js.startswith("train/") else "val")
    put(tmp_path, {
        js: coco({1: name}, [(1, 3, [1, 2, 30, 40])], {3: "s"}),
        image: image_bytes(),
        val: coco({1: "2.jpg"}, [(1, 3, [1, 2, 30, 40])], {3: "s"}),
        image.replace("train", "valid" if js.startswith("train/") else "val").replace("1.jpg", "2.jpg"): image_bytes(),
    })
    ds = read_dataset(tmp_path)
    assert ds.paths.tolist()[0] == image and ds.splits.tolist() == ["train", "val"] and ds.format == "coco"
    assert ds.boxes.tolist() == [[1, 2, 31, 42]] * 2 and ds.image_ids.tolist() == [1, 2]
    if js.startswith("annotations"): assert read_dataset(tmp_path / js).paths.tolist() == [image]


def test_coco_leaves_out_what_is_no_detection(tmp_path):
    d = coco({1: "1.jpg"}, [(1, 1, [1, 2, 30, 40])], {1: "s"})
    put(tmp_path, {
        "images/1.jpg": image_bytes(),
        "annotations/instances_val.json": d,
        "annotations/captions_val.json": dict(d, annotations=[dict(id=1, image_id=1, caption="x")]),
        "annotations/results.json": [dict(image_id=1, bbox=[0, 0, 1, 1], score=1)],
        "package.json": dict(name="x"),
    })
    assert len(read_dataset(tmp_path)) == 1


def test_coco_ids_flags_and_missing_fields(tmp_path):
    d = coco({"x": "1.jpg", "y": "2.jpg"}, [("x", 90, [1, 2, 3, 4]), ("x", 7, [1, 2, 3, 4]), ("y", 7, [0, 0, 9, 9])],
             {90: "b", 7: "a"})
    for im in d["images"]: del im["height"], im["width"]
    d["annotations"][0].update(iscrowd=1)
    d["annotations"][1].update(ignore=1)
    del d["annotations"][2]["bbox"], d["annotations"][2]["id"]
    d["annotations"][2]["segmentation"] = [[1, 2, 11, 2, 6, 12]]
    put(tmp_path, {"1.jpg": image_bytes(), "2.jpg": image_bytes(), "a.json": d})
    ds = read_dataset(tmp_path)
    assert ds.classes == ("a", "b") and ds.labels.tolist() == [1, 0, 0] and ds.flags.tolist() == [CROWD, IGNORE, 0]
    assert ds.boxes[2].tolist() == [1, 2, 11, 12] and ds.image_ids.tolist() == [1, 2]


def test_coco_roboflow_parent_category_is_left_out(tmp_path):
    d = coco({0: "1.jpg"}, [(0, 1, [1, 2, 3, 4])], {0: "animals", 1: "cat", 2: "dog"})
    for c, parent in zip(d["categories"], ("none", "animals", "animals")): c["supercategory"] = parent
    put(tmp_path, {"train/1.jpg": image_bytes(), "train/_annotations.coco.json": d})
    ds = read_dataset(tmp_path)
    assert ds.classes == ("cat", "dog") and [f.kind for f in ds.flaws] == ["unused-parent"]


def test_coco_missing_image_is_a_flaw(tmp_path):
    put(tmp_path, {
        "images/1.jpg": image_bytes(),
        "a.json": coco({1: "1.jpg", 2: "2.jpg"}, [(1, 1, [1, 2, 3, 4]), (2, 1, [1, 2, 3, 4])], {1: "s"}),
    })
    ds = read_dataset(tmp_path)
    assert len(ds) == 1
    assert len(ds.boxes) == 1
    assert [(f.kind, f.file, f.action) for f in ds.flaws] == [("missing-image", "2.jpg", "dropped")]


def base(**kw): return coco({1: "1.jpg"}, [(1, 1, [1, 2, 3, 4])], {1: "s"}, **kw)


@pytest.mark.parametrize("change, parts", [
    (dict(annotations=[dict(id=7, image_id=2, category_id=1, bbox=[1, 2, 3, 4])]),
     ["a.json, line 1: annotation 7 is of image 2, which is not in the file's images"]),
    (dict(annotations=[dict(id=7, image_id=[], category_id=1, bbox=[1, 2, 3, 4])]), ["annotation 7 is of image []"]),
    (dict(annotations=[dict(id=7, image_id=1, category_id=2, bbox=[1, 2, 3, 4])]),
     ["a.json, line 1: annotation 7 has the category 2, which is not in the file's categories"]),
    (dict(annotations=[dict(id=7, image_id=1, category_id=1, bbox=[1, 2, 3, float("nan")])]),
     ["annotation 7: bbox must be four numbers", "nan is no coordinate"]),
    (dict(annotations=[dict(id=7, image_id=1, category_id=1, bbox=[1, 2, 3])]),
     ["annotation 7: bbox must be four numbers"]),
    (dict(annotations=[dict(id=7, image_id=1, category_id=1, bbox=[1, 2, 3, "x"])]),
     ["annotation 7: bbox must be four numbers"]),
    (dict(annotations=[dict(id=7, image_id=1, category_id=1, bbox=None)]), ["annotation 7: bbox must be four numbers"]),
    (dict(annotations=[dict(bbox=[1, 2, 3, 4]), 5]), ["a.json, line 1: annotations[1] is 5, not an object"]),
    (dict(annotations=[]), ["1 images and not one box"]),
    (dict(images=[dict(id=1, file_name="1.jpg")] * 2), ["a.json, line 1: two images have the id 1"]),
    (dict(images=[dict(id=1)]), ["a.json, line 1: an image without id or file_name"]),
    (dict(images=[dict(id=1, file_name="9.jpg")]), ["none of its 1 images is there (such as 9.jpg)"]),
    (dict(categories=[dict(id=1, name="s")] * 2), ["a.json, line 1: two categories have the id 1"]),
    (dict(categories=[dict(id=1, name="s"), dict(id=2, name="s")]), ["two categories have the name 's'"]),
    (dict(categories=[dict(id=1)]), ["a category without id or name"]),
])
def test_coco_errors(tmp_path, change, parts):
    put(tmp_path, {"1.jpg": image_bytes(), "a.json": dict(base(), **change)})
    refused(lambda: read_dataset(tmp_path), *parts)


def test_coco_broken_json_names_the_line(tmp_path):
    put(tmp_path, {"1.jpg": image_bytes(), "a.json": '{"images": [\n\n}'})
    refused(lambda: read_dataset(tmp_path), "a.json, line 3: not valid JSON")
    refused(lambda: read_dataset(tmp_path / "a.json"), "a.json, line 3: not valid JSON")


def test_coco_class_lists_that_differ(tmp_path):
    put(tmp_path, {
        "1.jpg": image_bytes(),
        "2.jpg": image_bytes(),
        "train.json": coco({1: "1.jpg"}, [(1, 1, [1, 2, 3, 4])], {1: "a", 2: "b"}),
        "val.json": coco({1: "2.jpg"}, [(1, 1, [1, 2, 3, 4])], {1: "a", 2: "c"}),
    })
    refused(lambda: read_dataset(tmp_path), "train.json and", "val.json differ", "train.json alone has 'b'",
            "val.json alone has 'c'")


def test_coco_one_image_in_two_splits(tmp_path):
    put(tmp_path, {"1.jpg": image_bytes(), "train.json": base(), "val.json": base()})
    refused(lambda: read_dataset(tmp_path), "train.json and val.json both label 1.jpg")


# YOLO

YAML = "train: images/train\nval: images/val\nnames: [s, p]\n"
FILES = {
    "images/train/1.jpg": image_bytes(), "labels/train/1.txt": "0 .5 .5 .5 .5\n",
    "images/val/2.PNG": image_bytes(suffix=".png"), "labels/val/2.txt": "1 .5 .5 .25 .25\n"
}


@pytest.mark.parametrize("more", [
    {"data.yaml": YAML},
    {"dataset.yml": YAML.replace("[s, p]", "{0: s, 1: p}")},
    {"data.yaml": "path: /not/here\n" + YAML},
    {"data.yaml": "path: .\n" + YAML},
    {"data.yaml": YAML.replace("images/val", "../images/val")},
    {"classes.txt": "s\np\n"},
    {"obj.names": "s\np\n"},
    {"data.yaml": "train: train.txt\nval: [val.txt]\nnames: [s, p]", "train.txt": "./images/train/1.jpg\n",
     "val.txt": "images/val/2.PNG\n"},
])
def test_yolo_layouts(tmp_path, more):
    put(tmp_path, {**FILES, **more})
    ds = read_dataset(tmp_path)
    assert ds.format == "yolo" and ds.classes == ("s", "p") and ds.splits.tolist() == ["train", "val"]
    assert ds.boxes.tolist() == [[16, 12, 48, 36], [24, 18, 40, 30]] and ds.labels.tolist() == [0, 1]
    name = next(iter(more))
    if name.endswith("ml"): assert read_dataset(tmp_path / name).fingerprint() == ds.fingerprint()


def test_yolo_beside_the_images(tmp_path):
    put(tmp_path, {"1.jpg": image_bytes(), "1.txt": "0 .5 .5 .5 .5", "2.jpg": image_bytes(), "notes.txt": "hello"})
    ds = read_dataset(tmp_path, classes=["s"])
    assert len(ds) == 2 and [f.kind for f in ds.flaws] == ["no-labels"]


def test_yolo_outline_and_lost_label(tmp_path):
    put(tmp_path, {
        **FILES,
        "data.yaml": YAML,
        "labels/train/1.txt": "0 .25 .25 .5 .25 .5 .75\n\n",
        "labels/train/9.txt": "0 .5 .5 .5 .5",
    })
    ds = read_dataset(tmp_path)
    assert ds.boxes[0].tolist() == [16, 12, 32, 36]
    assert [(f.kind, f.file) for f in ds.flaws] == [("missing-image", "labels/train/9.txt")]


def test_yolo_same_list_twice_is_no_split(tmp_path):
    "The folders below may be one."
    put(tmp_path, {**FILES, "data.yaml": "train: images\nval: images\nnames: [s, p]"})
    assert read_dataset(tmp_path).splits.tolist() == ["train", "val"]
    flat = {path.replace("/train", "").replace("/val", ""): data for path, data in FILES.items()}
    put(tmp_path / "flat", {**flat, "data.yaml": "train: images\nval: images\nnames: [s, p]"})
    assert read_dataset(tmp_path / "flat").splits.tolist() == ["", ""]


@pytest.mark.parametrize("line, parts", [
    ("0 .5 .5 .5", ["1.txt, line 2: 4 numbers"]),
    ("0 .5 .5 .5 .5 .9", ["line 2: 6 numbers"]),
    ("0 .5 .5 .5 x", ["line 2: '0 .5 .5 .5 x' is not a row of numbers"]),
    ("2 .5 .5 .5 .5", ["line 2: class 2: there are 2 classes, 0 to 1"]),
    ("-1 .5 .5 .5 .5", ["class -1"]),
    ("0.5 .5 .5 .5 .5", ["class 0.5"]),
    ("0 nan .5 .5 .5", ["line 2: a number that is not finite"]),
    ("0 .5 inf .5 .5", ["not finite"]),
    ("0 320 240 50 50", ["line 2", "are these pixels?"]),
])
def test_yolo_line_errors(tmp_path, line, parts):
    put(tmp_path, {**FILES, "data.yaml": YAML, "labels/train/1.txt": f"0 .5 .5 .5 .5\n{line}\n"})
    refused(lambda: read_dataset(tmp_path), "labels/train/1.txt, line 2", *parts)


def test_yolo_names_file_with_a_mark_blank_lines_and_windows_ends(tmp_path):
    put(tmp_path, {
        **FILES,
        "classes.txt": b"\xef\xbb\xbfs\r\n  p \r\n\r\n",
        "labels/train/1.txt": b"\xef\xbb\xbf0 .5 .5 .5 .5\r\n\r\n1 .5 .5 .5 .5\r\n",
    })
    ds = read_dataset(tmp_path, "yolo")
    assert ds.classes == ("s", "p") and ds.labels.tolist() == [0, 1, 1]


def test_yolo_label_ending_in_any_case(tmp_path):
    put(tmp_path, {"1.JPG": image_bytes(), "1.TXT": "0 .5 .5 .5 .5", "classes.txt": "s"})
    ds = read_dataset(tmp_path, "yolo")
    assert len(ds.boxes) == 1 and ds.flaws == []


@pytest.mark.parametrize("yaml, parts", [
    ("train: images/train\nval: images/val\nnames: [s, [p]]", ["data.yaml, line 3: names: class 1 must be a text"]),
    ('train: images/train\nnames: [s, "\\ud800"]', ["data.yaml, line 2: "]),
    ("a: &a [s, s]\nb: &b [*a, *a]\nnames: *b", ["data.yaml, line 2: *a repeats another part"]),
    ("train: images/train\nx: !!int y\nnames: [s, p]", ["data.yaml, line 2: not valid YAML: 'y' is no int"]),
    ("train: images/train\n2001-99-99: 1\nnames: [s, p]", ["data.yaml, line 2: not valid YAML: '2001-99-99'"]),
    ("names: " + "[" * 5000, ["data.yaml, line 1: not valid YAML"]),
    ("train: " + "x" * 5000 + "\nnames: [s, p]", ["data.yaml, line 1: 'xxx"]),
    ("train: /\nnames: [s, p]", ["the root of a disk is not a dataset"]),
    ("train: images/train\nnames: [s\n", ["data.yaml, line 3: not valid YAML"]),
    ("train: images/train\nval: images/vla\nnames: [s, p]", ["'images/vla' is not there"]),
    ("train: images/train\nnames: {0: s, 2: p}", ["numbered 0 to 1 without a gap"]),
    ("train: images/train\nnames: [s, p]\nnc: 3", ["nc is 3, and there are 2 names"]),
    ("train: images/train\nnames: 5", ["names must be a list"]),
    ("train: images\nval: images/val\nnames: [s, p]", ["is in train and in val"]),
    ("train: images/train\nval: images/val\nnames: [s, s]", ["class name 's' stands twice"]),
])
def test_yolo_yaml_errors(tmp_path, yaml, parts):
    put(tmp_path, {**FILES, "data.yaml": yaml})
    refused(lambda: read_dataset(tmp_path), *parts)


def test_yolo_without_names(tmp_path):
    put(tmp_path, FILES)
    assert "classes=" not in refused(lambda: read_dataset(tmp_path), "without class names: add a classes.txt")
    put(tmp_path, {"data.yaml": "train: images\n"})
    refused(lambda: read_dataset(tmp_path), "data.yaml, line 1", "without class names: it has no names")
    assert read_dataset(tmp_path, classes=["s", "p"]).classes == ("s", "p")
    put(tmp_path, {"a.yaml": YAML, "b.yaml": YAML})
    refused(lambda: read_dataset(tmp_path), "a.yaml and b.yaml could both describe it")


# Choosing among them

def test_no_images_no_labels_two_formats(tmp_path):
    refused(lambda: read_dataset(tmp_path), "a folder without images")
    put(tmp_path, {"a.xml": voc(("s", 1, 2, 30, 40))})
    for format in ("auto", "voc"): refused(lambda: read_dataset(tmp_path, format), "a folder without images")
    (tmp_path / "a.xml").unlink()
    put(tmp_path, {"a.jpg": image_bytes()})
    refused(lambda: read_dataset(tmp_path), "1 images and no labels")
    put(tmp_path, {"a.xml": voc(("s", 1, 2, 30, 40)), "a.txt": "0 .5 .5 .5 .5", "classes.txt": "s"})
    refused(lambda: read_dataset(tmp_path), "holds labels of 2 formats", "voc: a.xml", "say which")
    assert read_dataset(tmp_path, "voc").format == "voc" and read_dataset(tmp_path, "yolo").format == "yolo"
    refused(lambda: read_dataset(tmp_path, "yollo"), "did you mean 'yolo'?")
    refused(lambda: read_dataset(tmp_path / "nowhere"), "no such file or folder")


def test_the_formats_found_are_options(tmp_path):
    put(tmp_path, {"a.jpg": image_bytes(), "a.xml": voc(("s", 1, 2, 30, 40)), "a.txt": "0 .5 .5 .5 .5",
                   "classes.txt": "s"})
    refused(lambda: read_dataset(tmp_path), "(voc: a.xml, yolo: a.txt): say which with --format voc or --format yolo")


@pytest.mark.parametrize("files, parts", [
    ({"t.csv": "photo,left,kind\na.jpg,1,x\n"}, ["t.csv, line 1: not a table of boxes: no column for the class"]),
    ({"x.json": {"images": [], "labels": []}}, ["x.json, line 1: not COCO labels: no list of annotations, categories"]),
    ({"x.json": [1]}, ["x.json, line 1: not COCO labels: it is no object"]),
    ({"x.json": {"images": [], "annotations": [{"id": 1}], "categories": []}}, ["neither bbox nor segmentation"]),
    ({"x.xml": "<data/>"}, ["x.xml begins with <data>, not with <annotation> or <annotations>"]),
    ({"x.xml": ""}, ["x.xml begins with no tag"]),
    ({"notes/a.txt": "0 .5 .5 .5 .5\n"}, ["notes/a.txt has the name of a.jpg, but lies elsewhere"]),
])
def test_files_that_are_not_understood_are_named(tmp_path, files, parts):
    put(tmp_path, {"a.jpg": image_bytes(), **files})
    refused(lambda: read_dataset(tmp_path), "1 images and no labels", *parts)
    if "x.json" in files: refused(lambda: read_dataset(tmp_path, "coco"), *parts)


@pytest.mark.parametrize("suffix", ["gif", "HEIC", "jp2"])
@pytest.mark.parametrize("labels", [
    {"a.xml": voc(("s", 1, 2, 30, 40)), "b.xml": voc(("s", 1, 2, 30, 40), name="b.jpg")},
    {"a.txt": "0 .5 .5 .5 .5\n", "b.txt": "0 .5 .5 .5 .5\n", "classes.txt": "s"},
    {"data.yaml": "names: [s]\ntrain: train.txt", "train.txt": "a.jpg\nb.jpg\n", "a.txt": "0 .5 .5 .5 .5\n"},
    {"t.csv": "file,xmin,ymin,xmax,ymax,class\na.jpg,1,2,30,40,s\nb.jpg,1,2,30,40,s\n"},
])
def test_images_in_formats_that_are_not_read(tmp_path, labels, suffix):
    put(tmp_path, {"a.jpg": image_bytes(), f"b.{suffix}": "x", **labels})
    flaw, = read_dataset(tmp_path).flaws
    assert flaw.kind == "missing-image" and f"is there as b.{suffix}: {suffix.upper()} is not read" in flaw.message


def test_a_folder_of_images_that_are_not_read(tmp_path):
    put(tmp_path, {"a.gif": "x", "b.heic": "x", "a.txt": "0 .5 .5 .5 .5"})
    refused(lambda: read_dataset(tmp_path), "a folder without images", "a.gif and 1 more cannot be read here")


def test_labels_where_nobody_looks(tmp_path):
    for name in "ab": put(tmp_path, {f"images/train/{name}.jpg": image_bytes(), f"labels/{name}.txt": "0 .5 .5 .5 .5"})
    put(tmp_path, {"data.yaml": "names: [s]\ntrain: images/train"})
    refused(lambda: read_dataset(tmp_path), "2 images and not one box", "2 label files named like images without",
            "such as labels/a.txt: not read (that of images/train/a.jpg belongs in labels/train/)")
    put(tmp_path, {"labels/train/a.txt": "0 .5 .5 .5 .5"})
    assert [flaw.file for flaw in read_dataset(tmp_path).flaws if flaw.kind == "not-read"] == ["labels/b.txt"]


def test_a_list_of_another_machine(tmp_path):
    put(tmp_path, {"a.jpg": image_bytes(), "data.yaml": "names: [s]\ntrain: train.txt",
                   "train.txt": "/home/you/x.jpg\n"})
    refused(lambda: read_dataset(tmp_path), "none of their images is there, such as /home/you/x.jpg")


def test_one_file_that_lists_an_image_twice(tmp_path):
    d = coco({1: "1.jpg", 2: "1.jpg"}, [(1, 1, [1, 2, 3, 4])], {1: "s"})
    put(tmp_path, {"1.jpg": image_bytes(), "t.json": d})
    line = refused(lambda: read_dataset(tmp_path), "t.json: lists 1.jpg twice")
    assert "both" not in line


def test_an_archive_is_named_and_not_its_place_in_the_cache(tmp_path):
    put(tmp_path, {"no/a.txt": "1", "bad/a.jpg": image_bytes(), "bad/a.txt": "7 .5 .5 .5 .5", "bad/classes.txt": "s"})
    for name, part in (("no", "no.zip: a folder without images"), ("bad", "bad.zip/a.txt, line 1: class 7")):
        shutil.make_archive(str(tmp_path / name), "zip", tmp_path / name)
        assert "unpacked" not in refused(lambda: read_dataset(tmp_path / f"{name}.zip"), part)


@pytest.mark.parametrize("format", WRITERS)
def test_unknown_class(tmp_path, folder, format):
    ds = DetDataset(folder, ("Sack", "Person"), [f"in/{ODD_NAMES[0]}"], [image_size(folder/"in"/ODD_NAMES[0])], [0, 0],
                    [(1, 1, 9, 9)]*2, [0, 1])
    write_dataset(ds, tmp_path / "d", format)
    assert read_dataset(tmp_path / "d", classes=["Person", "x", "Sack"]).labels.tolist() == [2, 0]
    refused(lambda: read_dataset(tmp_path/"d", classes=["Sacks", "Person"]), "unknown class 'Sack'",
            "did you mean 'Sacks'?")


def test_links_to_folders_and_loops(tmp_path):
    put(tmp_path / "real", {"1.jpg": image_bytes(), "1.xml": voc(("s", 1, 2, 30, 40))})
    (tmp_path / "d").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "d/images")
    os.symlink(tmp_path / "d", tmp_path / "d/again")
    assert read_dataset(tmp_path / "d").paths.tolist() == ["images/1.jpg"]


# Writing

def test_write_refuses_and_leaves_nothing(tmp_path, folder):
    size = image_size(folder / "in" / ODD_NAMES[0])
    ds = DetDataset(folder, ("s",), [f"in/{ODD_NAMES[0]}"], [size], [0], [(1, 1, 9, 9)], [0])
    put(tmp_path, {"full/x": "1", "file": "1"})
    refused(lambda: write_dataset(ds, tmp_path / "full", "coco"), "is there already")
    refused(lambda: write_dataset(ds, tmp_path / "file", "coco"), "is there already")
    refused(lambda: write_dataset(ds, tmp_path / "new", "vok"), "did you mean 'voc'?")
    for format in WRITERS:
        refused(lambda: write_dataset(replace(ds, paths=["in/gone.jpg"]), tmp_path/"new", format),
                "could not be written", "gone.jpg")
        refused(lambda: write_dataset(replace(ds, box_image=(), boxes=(), labels=(), flags=()), tmp_path/"new", format),
                "not one box")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
    (tmp_path / "empty").mkdir()
    assert len(write_dataset(ds, tmp_path / "empty", "yolo", images="symlink")) == 1


def test_names_that_collide_and_lossy_yolo(tmp_path):
    put(tmp_path, {"in/a/1.jpg": image_bytes(), "in/b/1.jpg": image_bytes(), "in/1.png": image_bytes(suffix=".png")})
    ds = DetDataset(tmp_path/"in", ("s", ), ["a/1.jpg", "b/1.jpg", "1.png"], [(48, 64)]*3, [0, 1, 2, 2],
                    [(k, 1, 9, 9) for k in range(4)], [0]*4,
                    flags=[0, DIFFICULT, CROWD, 0])
    for format in WRITERS:
        new = write_dataset(ds, tmp_path / format, format)
        assert len(new) == 3 and sorted(new.boxes[:, 0].tolist()) == ([0, 1, 3] if format == "yolo" else [0, 1, 2, 3])
    new = read_dataset(tmp_path / "yolo")
    flaws = write_dataset(ds, tmp_path / "again", "yolo").flaws
    renamed = [(f.file, f.where) for f in flaws if f.kind == "renamed-image"]
    assert renamed == [("a/1.jpg", "1.jpg"), ("b/1.jpg", "b_1.jpg"), ("1.png", "2_1.png")]
    lossy = [(f.kind, f.file, f.action) for f in flaws[3:]]
    assert lossy == [("lossy", "1.png", "dropped"), ("lossy", "b/1.jpg", "noted")]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tiff"])
def test_image_size(tmp_path, suffix):
    put(tmp_path, {"x": image_bytes(33, 77, suffix)})
    assert image_size(tmp_path / "x") == (33, 77)


def test_image_size_of_progressive_jpeg_and_garbage(tmp_path):
    data = cv2.imencode(".jpg", np.zeros((33, 77, 3), np.uint8), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    put(tmp_path, {
        "x": data[:2] + b"\xff\xe2" + (60002).to_bytes(2, "big") + b"\xff"*60000 + data[2:],
        "cut": data[:30],
        "text": "hello",
        "none": b"",
    })
    assert image_size(tmp_path / "x") == (33, 77)
    for name in ("cut", "text", "none", "nowhere"): refused(lambda: image_size(tmp_path / name), name)


# Real data

@pytest.mark.data
@pytest.mark.parametrize("name, images, boxes, splits", [
    ("bccd", 364, 4888, dict(train=205, val=87, test=72)),
    ("raccoon", 200, 217, {"": 200}),
    ("kangaroo", 164, 266, {"": 164}),
])
def test_real_voc(data, name, images, boxes, splits):
    ds = read_dataset(data / "datasets" / name)
    assert (len(ds), len(ds.boxes), ds.format) == (images, boxes, "voc")
    assert {s: len(ds.split(s)) for s in ds.split_names} == splits
    if name == "bccd": assert ds.class_counts() == {"Platelets": 361, "RBC": 4155, "WBC": 372}


@pytest.mark.data
def test_real_coco(data):
    ds = read_dataset(data / "datasets/aerial/coco_utils/combined_coco.json")
    assert (len(ds), len(ds.boxes)) == (2, 12)
    # one file has all the images of five others; the LabelMe files are what they were made of
    for folder in ("aerial", "aerial/coco_utils"):
        ds = read_dataset(data / "datasets" / folder)
        assert (ds.format, len(ds), len(ds.boxes), [f.kind for f in ds.flaws].count("not-read")) == ("coco", 2, 12, 6)


@pytest.mark.data
def test_real_round_trip(data, tmp_path):
    ds = read_dataset(data / "datasets/bccd")
    ds = ds.subset(np.arange(0, 364, 12))
    for format in WRITERS:
        new = write_dataset(ds, tmp_path / format, format)
        order = np.argsort([p.rsplit("/", 1)[-1] for p in new.paths])
        back = new.subset(order)
        assert np.abs(back.boxes - ds.boxes).max() < .01
        assert (back.labels == ds.labels).all()
        assert back.splits.tolist() == ds.splits.tolist()


def test_the_readers_front_door():
    "Scripts import the two functions from the package itself."
    from jetson_det.data import formats
    from jetson_det.data.formats import registry
    assert formats.read_dataset is registry.read_dataset and formats.write_dataset is registry.write_dataset
    with pytest.raises(AttributeError, match="no attribute 'read_datasets'"): formats.read_datasets
