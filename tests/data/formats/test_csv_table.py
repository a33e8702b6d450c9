"""Tables of boxes (CSV), Open Images and plate lists: layouts met in the wild, the one line of every error, damaged
files."""
import csv
import random
import signal

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from label_files import attributes_of, image_bytes, put, refused
from jetson_det.core import InputError
from jetson_det.data.dataset import CROWD, DIFFICULT, IGNORE
from jetson_det.data.formats.columns import KINDS, column_roles, find_layout, to_corners
from jetson_det.data.formats.csv_table import _find_tables, detect_tables, read_tables
from jetson_det.data.formats.openimages import _class_descriptions, detect_openimages, read_openimages
from jetson_det.data.formats.plates import _plate_row, detect_plates, read_plates
from jetson_det.data.formats.reader import Files
from jetson_det.data.formats.registry import read_dataset
from jetson_det.data.formats.tables import find_image
from jetson_det.scenes.docks import write_scenes

OI = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
TF = "filename,width,height,class,xmin,ymin,xmax,ymax"


def images(root, *names):
    return put(root, {n: image_bytes() for n in names or ("a.jpg", "b.jpg")})


def boxes(ds):
    "{image path: [(class, x1, y1, x2, y2)]}."
    found = {}
    for i, p in enumerate(ds.paths):
        xyxy, labels, _ = ds.boxes_of(i)
        found[p] = [(ds.classes[c], *box) for box, c in zip(xyxy.tolist(), labels)]
    return found


# The layout of a table

LAYOUTS = {
    "tensorflow": TF + "\na.jpg,64,48,Sack,1,2,30,40\n",
    "bccd": "filename,cell_type,xmin,xmax,ymin,ymax\na.jpg,Sack,1,30,2,40\n",
    "upper case, spaces, quotes": (
        '"File Name","X Min","Y Min","X Max","Y Max","Class"\n"a.jpg","1","2","30","40","Sack"\n'
    ),
    "semicolon": "image;label;x1;y1;x2;y2\na.jpg;Sack;1;2;30;40\n",
    "tab": "image_path\tspecies\tleft\ttop\tright\tbottom\nimgs/a.jpg\tSack\t1\t2\t30\t40\n",
    "bar": "path|name|xtl|ytl|xbr|ybr\na.jpg|Sack|1|2|30|40\n",
    "BOM, CRLF": "\ufeff" + TF + "\r\na.jpg,64,48,Sack,1,2,30,40\r\n",
    "carriage returns of old": TF + "\ra.jpg,64,48,Sack,1,2,30,40\r",
    "excel": "sep=;\r\nfile;class;xmin;ymin;xmax;ymax\r\na.jpg;Sack;1;2;30;40\r\n",
    "decimal commas": "file;class;xmin;ymin;xmax;ymax\na.jpg;Sack;1,0;2,00;30;40,0\n",
    "decimal commas in quotes": 'file,class,xmin,ymin,xmax,ymax\na.jpg,Sack,"1,0","2,0","30,0","40,0"\n',
    "extra columns": "id,file,note,class,xmin,ymin,xmax,ymax,score\n1,a.jpg,\"x, y\",Sack,1,2,30,40,.9\n",
    "corner and size": "file,x,y,w,h,class\na.jpg,1,2,29,38,Sack\n",
    "corner and size, long": "file,class,x,y,width,height,image_width,image_height\na.jpg,Sack,1,2,29,38,64,48\n",
    "center": "file,class,x_center,y_center,width,height\na.jpg,Sack,15.5,21,29,38\n",
    "zero-based corners": "image,x0,y0,x1,y1,label\na.jpg,1,2,30,40,Sack\n",
    "shares": "image,xmin,ymin,xmax,ymax,label\na.jpg,.015625,.041666667,.46875,.833333333\n".replace(
        "333\n", "333,Sack\n"
    ),
    "shares, center": "image,x_center,y_center,w,h,label\na.jpg,0.2421875,0.4375,0.453125,0.791666667,Sack\n",
    "path of another computer": "filename,class,xmin,ymin,xmax,ymax\nC:\\data\\imgs\\A.JPG,Sack,1,2,30,40\n",
    "image id": "image_id,class_name,class_id,xmin,ymin,xmax,ymax\na,Sack,3,1,2,30,40\n",
    "other ending": "image,class,xmin,ymin,xmax,ymax\na.png,Sack,1,2,30,40\n",
    "units": "image,class,xmin (px),ymin (px),xmax (px),ymax (px)\na.jpg,Sack,1,2,30,40\n",
    "keras-retinanet": "imgs/a.jpg,1,2,30,40,Sack\n",
    "sku110k": "a.jpg,1,2,30,40,Sack,64,48\n",
    "blank lines, trailing separators": "\n\nimage,class,xmin,ymin,xmax,ymax\n\na.jpg,Sack,1,2,30,40,,\n\n",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path, name):
    images(tmp_path, "imgs/a.jpg", "imgs/b.jpg")
    put(tmp_path, {"my labels.csv": LAYOUTS[name]})
    assert detect_tables(Files(tmp_path)) == "my labels.csv"
    assert detect_openimages(Files(tmp_path)) == detect_plates(Files(tmp_path)) == ""
    for ds in (read_tables(tmp_path), read_tables(tmp_path / "my labels.csv")):
        assert ds.paths.tolist() == ["imgs/a.jpg"] and ds.classes == ("Sack",) and ds.format == "csv"
        np.testing.assert_allclose(ds.boxes, [[1, 2, 30, 40]], atol=1e-4)


@pytest.mark.parametrize("text", [
    "",
    "\n",
    "name,price\nSack,3\n",
    "filename,label\na.jpg,Sack\n",
    "file,xmin,ymin,xmax,ymax\na.jpg,1,2,3,4\n",
    "a.jpg,Sack\n",
    "x,y,w,h\n1,2,3,4\n",
    "file,class,xmin,ymin,xmax,xmax\n",
    "file,class,x1,y1,x2,y2,x3,y3,x4,y4\n",
    "a.jpg,300,2,30,40,Sack\n",
    OI + "\n",
])
def test_nothing_is_detected(tmp_path, text):
    images(tmp_path)
    put(tmp_path, {"labels.csv": text, "noise.csv": bytes(range(256)) * 50, "quote.csv": '"' * 9999})
    assert detect_tables(Files(tmp_path)) == ""
    if OI not in text: refused(lambda: read_tables(tmp_path / "labels.csv"), "labels.csv, line 1: ")


def test_text_lists_need_three_rows(tmp_path):
    images(tmp_path)
    put(tmp_path, {"annotate.txt": "a.jpg,1,2,30,40,Sack\n" * 2})
    assert detect_tables(Files(tmp_path)) == ""
    put(tmp_path, {"annotate.txt": "a.jpg,1,2,30,40,Sack\n" * 3})
    assert detect_tables(Files(tmp_path)) == "annotate.txt" and detect_plates(Files(tmp_path)) == ""


def test_two_columns_of_one_name():
    assert column_roles("file,class,xmin,ymin,xmax,ymax,XMin".split(",")) == {}
    assert find_layout("file,file,class,x,y,w,h") is None


# Rows

def one(tmp_path, *rows, header="filename,class,xmin,ymin,xmax,ymax"):
    images(tmp_path)
    put(tmp_path, {"t.csv": "\n".join((header, *rows)) + "\n"})
    return lambda **kw: read_tables(tmp_path, **kw)


@pytest.mark.parametrize("row, expected", [
    ("a.jpg,Sack,1,2,3", "line 3: 5 fields"),
    ("a.jpg,Sack,1,2,3,4,5", "line 3: 7 fields"),
    ("a.jpg,Sack,x,2,3,4", "line 3: xmin: 'x' is not a number"),
    ("a.jpg,Sack,1,,3,4", "line 3: ymin: '' is not a number"),
    ("a.jpg,Sack,1,2,3,nan", "line 3: ymax: 'nan'"),
    ("a.jpg,Sack,1,2,3,inf", "line 3: ymax: 'inf'"),
    ("a.jpg,Sack,1,2,3,1e9", "line 3: ymax"),
    ("a.jpg,Sack,1,2,3," + "9" * 400, "line 3: ymax"),
    ("a.jpg,,1,2,3,4", "line 3: a box without a class"),
    (",Sack,1,2,3,4", "line 3: no file name"),
    ('a.jpg,"Sack,1,2,3,4', "line 3: not a row"),
    ("a.jpg,Sack,1_0,2,3,4", "line 3: xmin"),
    ('a.jpg,Sack,"1,250",2,3,4', "could be 1250 or 1.250"),
])
def test_rows_that_cannot_be_meant(tmp_path, row, expected):
    refused(one(tmp_path, "b.jpg,Sack,1,2,3,4", row, "b.jpg,Sack,1,2,3,9"), "t.csv, ", expected)


def test_empty_boxes_are_background(tmp_path):
    ds = one(tmp_path, "a.jpg,Sack,1,2,30,40", "b.jpg,,,,,")()
    assert boxes(ds) == {"a.jpg": [("Sack", 1, 2, 30, 40)], "b.jpg": []} and not ds.flaws
    ds = one(tmp_path, "a.jpg,Sack,1,2,30,40", "b.jpg,No finding,nan,nan,nan,nan")()
    assert ds.classes == ("Sack",)
    assert len(ds) == 2
    assert [(f.kind, f.file, f.where) for f in ds.flaws] == [("no-labels", "b.jpg", "t.csv, line 3")]
    (tmp_path / "t.csv").write_text("a.jpg,1,2,30,40,Sack\nb.jpg,,,,,\n")
    assert boxes(read_tables(tmp_path)) == {"a.jpg": [("Sack", 1, 2, 30, 40)], "b.jpg": []}


def test_flags_and_attributes(tmp_path):
    ds = one(tmp_path, "a.jpg,Sack,1,2,30,40,1,0,true,0,2,M AB 1,v1", "a.jpg,Sack,1,2,31,40,0,1,FALSE,0.5,0,,v1",
             header="filename,class,xmin,ymin,xmax,ymax,difficult,iscrowd,ignore,truncated,occluded,text,video")()
    assert ds.flags.tolist() == [DIFFICULT | IGNORE, CROWD] and ds.groups.tolist() == ["v1"]
    assert attributes_of(ds) == {"text": ["M AB 1", ""], "truncated": ["", "0.5"], "occluded": ["2", ""]}
    refused(one(tmp_path, "a.jpg,Sack,1,2,30,40,maybe", header="filename,class,xmin,ymin,xmax,ymax,difficult"),
            "t.csv, line 2: difficult is 'maybe': 0 or 1 is right")


def test_images_without_rows_and_rows_without_images(tmp_path):
    ds = one(tmp_path, "a.jpg,Sack,1,2,30,40", "gone.jpg,Sack,1,2,30,40", "gone.jpg,Sack,1,2,30,40")()
    assert len(ds) == 1
    assert [(f.kind, f.action) for f in ds.flaws] == [("missing-image", "dropped"), ("no-labels", "noted")]
    assert "t.csv, line 3: 'gone.jpg'" in ds.flaws[0].message
    assert "1 image beside labeled ones" in ds.flaws[1].message
    assert "b.jpg" in ds.flaws[1].message
    refused(one(tmp_path, "x.jpg,Sack,1,2,3,4", "y.jpg,Sack,1,2,3,4"),
            "t.csv, line 2: none of its 2 images is there, such as 'x.jpg'")


def test_declared_size(tmp_path):
    ds = one(tmp_path, "a.jpg,64,48,Sack,1,2,3,4", "b.jpg,128,96,Sack,1,2,3,4", header=TF)()
    assert [(f.kind, f.file, f.action) for f in ds.flaws] == [("size-mismatch", "b.jpg", "noted")]


def test_classes(tmp_path):
    rows = ("a.jpg,10,1,2,3,4", "a.jpg,9,1,2,3,4")
    assert one(tmp_path, *rows)().classes == ("9", "10")
    put(tmp_path, {"classes.txt": "10\n9\nunused\n"})
    assert one(tmp_path, *rows)().classes == ("10", "9", "unused")
    put(tmp_path, {"classes.txt": "ten\n9\n"})
    refused(one(tmp_path, *rows), "class '10' is not in classes.txt")
    (tmp_path / "classes.txt").unlink()
    put(tmp_path, {"class_map.csv": "9,1\n10,0\n"})
    assert one(tmp_path, *rows)().classes == ("10", "9")
    no_class = one(tmp_path, "a.jpg,1,2,3,4", header="file,xmin,ymin,xmax,ymax")
    (tmp_path / "class_map.csv").unlink()
    refused(no_class, "line 1: not a table of boxes: no column for the class among file, xmin")
    assert no_class(classes=["bird"]).classes == ("bird",)


@pytest.mark.parametrize("kind, header", [
    ("corner", "file,class,x,y,w,h"),
    ("corners", "file,class,x1,y1,x2,y2"),
    ("center", "file,class,cx,cy,w,h"),
])
def test_columns_named_wrongly(tmp_path, kind, header):
    rng = np.random.default_rng(0)
    wh = rng.integers(8, 20, (40, 2))
    xy = np.floor(rng.random((40, 2)) * ([64, 48] - wh))
    raw = {"corner": np.c_[xy, wh], "corners": np.c_[xy, xy + wh], "center": np.c_[xy + wh / 2, wh]}
    for true in KINDS:
        call = one(tmp_path, *(f"a.jpg,Sack,{','.join(f'{v:g}' for v in r)}" for r in raw[true]), header=header)
        if true == kind: assert np.allclose(np.sort(call().boxes, 0), np.sort(raw["corners"], 0))
        elif true == "corners" or kind == "corners": refused(call, "t.csv, line 1", "name the columns so")


# Several tables

def test_train_test_and_their_union(tmp_path):
    images(tmp_path, "images/a.jpg", "images/b.jpg", "images/c.jpg")
    head = "filename,class,xmin,ymin,xmax,ymax\n"
    a = "a.jpg,Sack,1,2,30,40\na.jpg,Person,5,6,7,8\n"
    b = "b.jpg,Sack,1,2,30,40\n"
    c = "c.jpg,Sack,1,2,3,4\n"
    put(tmp_path, {
        "data/train_labels.csv": head + a,
        "data/test_labels.csv": head + b,
        "data/all_labels.csv": head + b + "\n".join(a.split("\n")[::-1]) + "\n" + c,
    })
    ds = read_tables(tmp_path)
    assert dict(zip(ds.paths, ds.splits)) == {"images/a.jpg": "train", "images/b.jpg": "test", "images/c.jpg": ""}
    assert len(ds.boxes) == 4
    put(tmp_path, {"data/test_labels.csv": head + b + a})
    refused(lambda: read_tables(tmp_path), "data/train_labels.csv, line 2",
            "images/a.jpg is in train here, and in test in data/test_labels.csv")
    put(tmp_path, {"data/test_labels.csv": head + b.replace("30", "31")})
    refused(lambda: read_tables(tmp_path), "data/test_labels.csv, line 2",
            "images/b.jpg has other boxes here than in data/all_labels.csv, line 2")


def test_split_column(tmp_path):
    ds = one(tmp_path,
             "a.jpg,Sack,1,2,3,4,TRAIN",
             "b.jpg,Sack,1,2,3,4,validation",
             header="filename,class,xmin,ymin,xmax,ymax,Subset")()
    assert ds.splits.tolist() == ["train", "val"]
    refused(
        one(tmp_path,
            "a.jpg,Sack,1,2,3,4,train",
            "a.jpg,Sack,1,2,3,4,test",
            header="filename,class,xmin,ymin,xmax,ymax,split"),
        "t.csv, line 3: 'a.jpg' is in train above, in test here")


def test_a_csv_of_something_else_is_named(tmp_path):
    put(tmp_path, {"prices.csv": "name,price\n"})
    assert [(f.kind, f.file, f.action) for f in one(tmp_path, "a.jpg,Sack,1,2,3,4", "b.jpg,Sack,1,2,3,4")().flaws
            ] == [("not-read", "prices.csv", "noted")]


def test_same_name_in_two_folders(tmp_path):
    images(tmp_path, "train/1.jpg", "val/1.jpg")
    head = "filename,class,xmin,ymin,xmax,ymax\n"
    put(tmp_path, {"all.csv": head + "val/1.jpg,Sack,1,2,3,4\n"})
    assert read_tables(tmp_path).paths.tolist() == ["val/1.jpg"]
    put(tmp_path, {"all.csv": head + "1.jpg,Sack,1,2,3,4\n"})
    refused(lambda: read_tables(tmp_path), "all.csv, line 2: '1.jpg' could be train/1.jpg or val/1.jpg")
    put(tmp_path, {"all.csv": head + "1.jpg,Sack,1,2,3,4\n", "train/x": ""})
    (tmp_path / "all.csv").rename(tmp_path / "val/all.csv")
    assert read_tables(tmp_path).paths.tolist() == ["val/1.jpg"]


ODD_NAMES = ["a b.jpg", "50% #1.JPG", "Straße.jpeg", "写真.PNG", "v1.2.jpg", 'quote"s, comma.jpg', "semi;colon.jpg"]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_table_comes_back(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("t")
    images(root, *ODD_NAMES)
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    d = data.draw(st.sampled_from([",", ";", "\t", "|"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    m = data.draw(st.integers(1, 30))
    comma = data.draw(st.booleans())
    corners = np.sort(rng.random((m, 2, 2)), 1).reshape(m, 4) * [64, 48, 64, 48]
    size = corners[:, 2:] - corners[:, :2]
    first = corners[:, :2] + size / 2 if kind == "center" else corners[:, :2]
    raw = np.c_[first, corners[:, 2:] if kind == "corners" else size]
    np.testing.assert_allclose(to_corners(raw, kind), corners)
    columns = ["file", "class", *KINDS[kind]]
    order = data.draw(st.permutations(range(6)))
    which = np.sort(rng.integers(0, len(ODD_NAMES), m))
    labels = rng.choice(["Säcke & <Co>", "per,son", "a b"], m)
    with open(root / "t.csv", "w", newline="", encoding="utf-8") as f:
        w = csv.writer(f, delimiter=d, quoting=data.draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])))
        w.writerow([columns[k] for k in order])
        for i, c, b in zip(which, labels, raw):
            numbers = [f"{v:.4f}".replace(".", "," if comma else ".") for v in b]
            fields = [ODD_NAMES[i], c, *numbers]
            w.writerow([fields[k] for k in order])
    if raw.max() <= 1.5: return
    ds = read_tables(root)
    assert ds.classes == tuple(sorted(set(labels.tolist())))
    assert all(boxes(ds).values())  # every image read has a box
    for i, p in enumerate(ODD_NAMES):
        have = sorted(boxes(ds).get(p, []))
        want = sorted((c, *b) for c, b in zip(labels[which == i].tolist(), corners[which == i].tolist()))
        assert [r[0] for r in have] == [r[0] for r in want]
        np.testing.assert_allclose(np.array([r[1:] for r in have]).reshape(-1, 4),
                                   np.array([r[1:] for r in want]).reshape(-1, 4),
                                   atol=2e-4)


def test_find_image(tmp_path):
    files = Files(images(tmp_path, "x/a.jpg", "y/A.jpg", "y/b.png"))
    expected = {"A.jpg": "y/A.jpg", "a.jpg": "x/a.jpg", "x/A.JPG": "x/a.jpg", "b": "y/b.png", "B.jpg": "y/b.png",
                "./y/b.png": "y/b.png", "": "", "/": "", "..": "", "\0": "", "é" * 9000: ""}
    assert {name: find_image(files, name) for name in expected} == expected


# Open Images

def openimages(tmp_path, *rows, header=OI, **more):
    images(tmp_path, "train/0a.jpg", "train/0b.jpg")
    put(tmp_path, {
        "class-descriptions-boxable.csv": "/m/1,Sack\n/m/2,\"Person, standing\"\n",
        "train-annotations-bbox.csv": "\n".join((header, *rows)) + "\n",
        **more,
    })
    return lambda: read_openimages(tmp_path)


def test_openimages(tmp_path):
    call = openimages(tmp_path, "0a,xclick,/m/1,1,0.25,0.5,0.25,0.75,0,1,0,0,-1", "0a,xclick,/m/2,1,0,1,0,1,1,0,1,0,0",
                      "ff,xclick,/m/2,1,0,1,0,1,1,0,1,0,0")
    files = Files(tmp_path)
    assert detect_openimages(files) == "train-annotations-bbox.csv"
    assert detect_tables(files) == detect_plates(files) == ""
    ds = call()
    assert boxes(ds) == {"train/0a.jpg": [("Sack", 16, 12, 32, 36), ("Person, standing", 0, 0, 64, 48)]}
    assert ds.classes == ("Person, standing", "Sack")
    assert ds.flags.tolist() == [0, CROWD]
    assert attributes_of(ds) == {"truncated": ["1", ""], "occluded": ["", "1"]}
    assert [(f.kind, f.action) for f in ds.flaws] == [("not-downloaded", "noted"), ("no-labels", "noted")]
    assert "1 of 2 images, such as 'ff'" in ds.flaws[0].message
    assert boxes(read_openimages(tmp_path / "train-annotations-bbox.csv")) == boxes(ds)


def test_openimages_splits_order_and_commas(tmp_path):
    val = "IsGroupOf;YMax;YMin;XMax;XMin;LabelName;ImageID\n0;0,75;0,25;0,5;0,25;/m/1;0b\n"
    ds = openimages(tmp_path, "0a,xclick,/m/1,1,0.25,0.5,0.25,0.75,0,1,0,0,0",
                    **{"validation-annotations-bbox.csv": val})()
    assert dict(zip(ds.paths, ds.splits)) == {"train/0a.jpg": "train", "train/0b.jpg": "val"}
    assert (ds.boxes == [16, 12, 32, 36]).all()


def test_openimages_errors(tmp_path):
    refused(openimages(tmp_path, "0a,xclick,/m/1,1,16,32,12,36,0,0,0,0,0"),
            "train-annotations-bbox.csv, line 2: coordinates must be relative to the image")
    refused(openimages(tmp_path, "0a,xclick,/m/1,1,.2,x,.2,.3,0,0,0,0,0"), "line 2: xmax: 'x' is not a number")
    refused(openimages(tmp_path, "zz,xclick,/m/1,1,.2,.3,.2,.3,0,0,0,0,0"),
            "line 2: none of its 1 images is there, such as 'zz'")
    refused(openimages(tmp_path, "0a,xclick,/m/1", **{"class-descriptions-boxable.csv": "/m/1\n"}),
            "class-descriptions-boxable.csv, line 1: a class id and its name")
    ds = openimages(tmp_path, "0a,xclick,/m/7,1,.2,.3,.2,.3,0,0,0,0,0",
                    **{"class-descriptions-boxable.csv": "LabelName,DisplayName\n/m/1,Sack\n"})()
    assert ds.classes == ("/m/7",)
    assert [f.kind for f in ds.flaws] == ["unnamed-class", "no-labels"]
    assert _class_descriptions(Files(tmp_path)) == {"/m/1": "Sack"}


# Plates

@pytest.mark.parametrize("line, want", [
    ("a.jpg\t1\t2\t30\t9\tM AB 12", ("a.jpg", "M AB 12")),
    ("a b.JPG\t1\t2\t30\t9\t", ("a b.JPG", "")),
    ("a.jpg,1,2,30,9,M-AB,12", ("a.jpg", "M-AB,12")),
    ("a, b.jpg,1,2,30,9,X", ("a, b.jpg", "X")),
    ("a.jpg; 1; 2; 30; 9; 京A 123", ("a.jpg", "京A 123")),
    ("a.jpg;1,0;2,0;30,5;9,0;X", ("a.jpg", "X")),
    ("a.jpg|1|2|30|9|X", ("a.jpg", "X")),
    ("a b.jpg 1 2 30 9 M AB 12", ("a b.jpg", "M AB 12")),
    ('"a.jpg","1","2","30","9","M, 1"', ("a.jpg", "M, 1")),
    ("a.jpg 1.jpg\t1\t2\t30\t9\t5\t6\t7\t8", ("a.jpg 1.jpg", "5\t6\t7\t8")),
])
def test_plate_rows(line, want):
    name, numbers, text = _plate_row(line)
    assert (name, text) == want and [float(n.replace(",", ".")) for n in numbers][:2] == [1, 2]


@pytest.mark.parametrize("line", [
    "",
    "a.jpg",
    "a.jpg\t1\t2\t3",
    "a.jpg\t1\t2\tx\t4\tT",
    "a.jpg\t1\t2\tnan\t4\tT",
    "label\t1\t2\t3\t4\tT",
    "0 .5 .5 .1 .1 .1",
    "Car 0 0 1.5 1 2 3 4 1 1 1 1 1 1 1",
    "\0",
    "a.jpg" + "\t1" * 9000,
])
def test_no_plate_rows(line): assert _plate_row(line) is None


def test_plates_beside_their_photos(tmp_path):
    images(tmp_path, "test_1.jpg", "test_2.jpg", "test_3.jpg", "test_4.jpg")
    put(tmp_path, {
        "test_1.txt": "test_1.jpg\t1\t2\t30\t10\tM AB 12\n\ntest_1.jpg\t1\t22\t30.5\t10\tÖ 1\n",
        "test_2.txt": "",
        "test_3.txt": "old name.jpg\t1\t2\t30\t10\tX\n",
        "lost.txt": "lost.jpg\t1\t2\t30\t10\tX\n",
        "readme.txt": "Photos of plates\n",
    })
    assert detect_plates(Files(tmp_path)) == "lost.txt" and detect_tables(Files(tmp_path)) == ""
    ds = read_plates(tmp_path)
    assert boxes(ds) == {
        "test_1.jpg": [("plate", 1, 2, 31, 12), ("plate", 1, 22, 31.5, 32)], "test_2.jpg": [],
        "test_3.jpg": [("plate", 1, 2, 31, 12)], "test_4.jpg": []
    }
    assert ds.attributes["text"].tolist() == ["M AB 12", "Ö 1", "X"] and ds.split_names == [""]
    assert [(f.kind, f.file) for f in ds.flaws] == [("missing-image", "lost.jpg"), ("no-labels", "test_4.jpg")]
    put(tmp_path, {"test_2.txt": "\ntest_2.jpg\t1\t2\t3O\t10\tX\n"})
    refused(
        lambda: read_plates(tmp_path),
        "test_2.txt, line 2: 'test_2.jpg\\t1\\t2\\t3O\\t10\\tX' is no plate: file, x, y, width, height and text are"
        " right",
    )
    put(tmp_path, {"test_2.txt": "test_1.jpg\t1\t2\t3\t10\tX\n"})
    refused(lambda: read_plates(tmp_path),
            "test_2.txt, line 1: test_1.jpg has other boxes here than in test_1.txt, line 1")


@pytest.mark.parametrize("name, text", [
    ("list.txt", "a.jpg,40,12,20,10,M 1\nb.jpg,41,12,20,10,M 2\n"),
    ("list.csv", "a.jpg;40;12;20;10;M 1\nb.jpg;41;12;20;10;M 2\n"),
    ("list.csv", "image,x,y,w,h,text\na.jpg,40,12,20,10,M 1\nb.jpg,41,12,20,10,M 2\n"),
    ("list.tsv", "plate\tfile\tleft\ttop\tright\tbottom\nM 1\ta.jpg\t40\t12\t60\t22\nM 2\tb.jpg\t41\t12\t61\t22\n"),
    ("list.txt", "a.jpg\t.625\t.25\t.3125\t.208333333\tM 1\nb.jpg\t.640625\t.25\t.3125\t.208333333\tM 2\n"),
])
def test_one_list_for_all(tmp_path, name, text):
    images(tmp_path, "photos/a.jpg", "photos/b.jpg", "photos/c.jpg")
    put(tmp_path, {name: text})
    assert detect_plates(Files(tmp_path)) == name and detect_tables(Files(tmp_path)) == ""
    ds = read_plates(tmp_path)
    np.testing.assert_allclose(ds.boxes, [[40, 12, 60, 22], [41, 12, 61, 22]], atol=1e-4)
    assert ds.attributes["text"].tolist() == ["M 1", "M 2"]
    assert [(f.kind, f.action) for f in ds.flaws] == [("no-labels", "noted")]
    assert len(ds) == 2
    assert read_plates(tmp_path / name, classes=["license"]).classes == ("license",)


def test_plates_with_corners_are_refused(tmp_path):
    images(tmp_path)
    put(tmp_path, {"a.txt": "".join(f"a.jpg\t{k}\t20\t{k + 30}\t40\tX\n" for k in range(20, 30))})
    refused(lambda: read_plates(tmp_path), "a.txt, line 1: read as x, y, w, h", "they look like xmin, ymin, xmax, ymax")


# Damage

def damaged(rng, data):
    "A file with something wrong in it."
    k = rng.randrange(8)
    n = len(data)
    a, b = sorted((rng.randrange(n + 1), rng.randrange(n + 1)))
    if k == 0: return data[:a]
    if k == 1: return data[:a] + bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 60)))) + data[a:]
    if k == 2: return data[:a] + data[b:]
    if k == 3:
        return data[:a] + rng.choice(
            (b"\0", b'"', b"\r", b"\n\n", b",,,,", b"\xff\xfe", b";", b"\t"*3000, b","*3000)) + data[a:]
    words = data.replace(b"\n", b" \n ").replace(b",", b" , ").replace(b"\t", b" \t ").split(b" ")
    at = rng.randrange(len(words))
    words[at] = rng.choice((b"", b"nan", b"-1", b"1e999", b"9"*5000, b"x", b"1_0", b"0x1", b"/", b"../..",
                            "\u0663".encode(), b"1,5", b'"', b"a.jpg"))
    return b"".join(words)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return read_dataset(write_scenes(tmp_path_factory.mktemp("scenes") / "made", 6, (240, 320), seed=3))


def written(ds, root, format):
    "The scenes in one of the three formats, label files beside the images; {path: text}."
    files = {}
    for i, p in enumerate(ds.paths):
        name = p.split("/")[-1]
        (h, w) = ds.sizes[i]
        (root / "images").mkdir(exist_ok=True, parents=True)
        (root / "images" / name).write_bytes(ds.path_of(i).read_bytes())
        for k, ((x1, y1, x2, y2), c) in enumerate(zip(ds.boxes_of(i)[0].tolist(), ds.boxes_of(i)[1])):
            if format == "csv":
                file = f"{ds.splits[i]}_labels.csv"
                head = TF
                row = f"{name},{w},{h},{ds.classes[c]},{x1},{y1},{x2},{y2}"
            elif format == "openimages":
                file = f"{ds.splits[i]}-annotations-bbox.csv"
                head = OI
                row = f"{name[:-4]},xclick,/m/{c},1,{x1 / w},{x2 / w},{y1 / h},{y2 / h},0,0,0,0,0"
            else:
                file = f"images/{name[:-4]}.txt"
                head = ""
                row = f"{name}\t{x1}\t{y1}\t{x2 - x1}\t{y2 - y1}\tM {name[:-4]} {k}"
            files.setdefault(file, [head] if head else []).append(row)
    if format == "openimages":
        files["class-descriptions-boxable.csv"] = [f"/m/{k},{c}" for k, c in enumerate(ds.classes)]
    put(root, {f: "\n".join(rows) + "\n" for f, rows in files.items()})
    return sorted(root / f for f in files)


READERS = {
    "csv": (read_tables, detect_tables), "openimages": (read_openimages, detect_openimages),
    "plates": (read_plates, detect_plates)
}


@pytest.mark.parametrize("format", READERS)
def test_scenes_come_back(scenes, tmp_path, format):
    written(scenes, tmp_path, format)
    ds = READERS[format][0](tmp_path)
    image_of = {p.split("/")[-1]: i for i, p in enumerate(ds.paths)}
    assert len(ds) == len(scenes)
    assert not [f for f in ds.flaws if f.action != "noted"]
    for i, p in enumerate(scenes.paths):
        j = image_of[p.split("/")[-1]]
        np.testing.assert_allclose(ds.boxes_of(j)[0], scenes.boxes_of(i)[0], atol=2e-3)
        if format == "plates": continue
        assert ds.splits[j] == scenes.splits[i]
        assert [ds.classes[c] for c in ds.boxes_of(j)[1]] == [scenes.classes[c] for c in scenes.boxes_of(i)[1]]
    if format == "plates":
        texts = []
        for p, n in zip(ds.paths, np.bincount(ds.box_image)):
            texts += [f"M {p.split('/')[-1][:-4]} {k}" for k in range(n)]
        assert ds.attributes["text"].tolist() == texts


@pytest.mark.parametrize("format", READERS)
def test_damaged_files(scenes, tmp_path, format):
    def too_long(*_): raise TimeoutError("no answer in 5 s")
    files = written(scenes, tmp_path, format)
    read, detect = READERS[format]
    rng = random.Random(format)
    read_on = 0
    whole = {p: p.read_bytes() for p in files}
    before = signal.signal(signal.SIGALRM, too_long)
    try:
        for k in range(250):
            path = rng.choice(files)
            path.write_bytes(damaged(rng, whole[path]))
            signal.alarm(5)
            try:
                detect(Files(tmp_path))
                read_on += len(read(tmp_path)) > 0
            except InputError as e:
                text = str(e)
                assert "\n" not in text and len(text) < 2000 and (", line " in text or "not one box" in text), text
                assert path.name in text or "has other boxes" in text or "is in" in text or "not one box" in text, (
                    path, text)
            signal.alarm(0)
            path.write_bytes(whole[path])
    finally: signal.signal(signal.SIGALRM, before)
    assert 20 < read_on < 220


# Real data

@pytest.mark.data
@pytest.mark.parametrize("name, table", [("bccd", "test.csv"), ("raccoon", "data/raccoon_labels.csv")])
def test_real_tables_say_what_the_xml_says(data, name, table):
    root = data / "datasets" / name
    assert detect_tables(Files(root)) == table
    ds = read_tables(root)
    xml = read_dataset(root, "voc")
    assert {p: sorted(b) for p, b in boxes(ds).items()} == {p: sorted(b) for p, b in boxes(xml).items()}
    assert not ds.flaws
    if name == "raccoon":
        assert {s: int((ds.splits == s).sum()) for s in ds.split_names} == {"train": 160, "test": 40}
        assert _find_tables(Files(root))[1:] == ["data/test_labels.csv", "data/train_labels.csv"]


@pytest.mark.data
def test_real_plates(data):
    root = data / "datasets/plates_eu"
    files = Files(root)
    assert detect_plates(files) == "eu1.txt"
    assert detect_tables(files) == detect_openimages(files) == ""
    ds = read_plates(root)
    assert (len(ds), len(ds.boxes), ds.classes, ds.split_names, ds.flaws) == (108, 108, ("plate",), [""], [])
    at = ds.paths.tolist().index("eu1.jpg")
    assert ds.boxes_of(at)[0].tolist() == [[396, 340, 599, 386]]
    assert ds.attributes["text"][at] == (root / "eu1.txt").read_text().split()[-1]
    assert all(ds.attributes["text"])
    assert (ds.boxes[:, 2:] <= ds.sizes[ds.box_image][:, ::-1]).all() and (ds.boxes >= 0).all()


@pytest.mark.data
@pytest.mark.parametrize("name", ["kangaroo", "kitti_mini", "aerial", "coco_fixtures", "plate_crops_cn"])
def test_no_sign_where_there_is_none(data, name):
    files = Files(data / "datasets" / name)
    assert (detect_tables(files), detect_openimages(files), detect_plates(files)) == ("", "", "")
