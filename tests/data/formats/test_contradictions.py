"""Labels that could mean two images, two sources that disagree, and what is left out: each is told, by one rule in all
formats."""
import pytest
from label_files import image_bytes, put, refused

from jetson_det.data.formats.registry import read_dataset
from jetson_det.data.quality.check import check_dataset

IMAGE = image_bytes() # 64x48
LINE = "0 .5 .5 .5 .5\n"


def voc(name, box=(8, 6, 40, 30), label="cat", more=""):
    sides = "".join(f"<{side}>{v}</{side}>" for side, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
    obj = f"<object><name>{label}</name>{more}<bndbox>{sides}</bndbox></object>"
    return f"<annotation><filename>{name}</filename>{obj}</annotation>"


def coco(name, box=(8, 6, 40, 30), **more):
    x1, y1, x2, y2 = box
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], **more}
    return {"images": [{"id": 1, "file_name": name, "height": 48, "width": 64}], "annotations": [annotation],
            "categories": [{"id": 1, "name": "cat"}]}


def labelme(name, box=(8, 6, 40, 30)):
    shape = {"label": "cat", "points": [list(box[:2]), list(box[2:])], "shape_type": "rectangle"}
    return {"shapes": [shape], "imagePath": name, "imageData": None}


def cvat(name, box=(8, 6, 40, 30)):
    sides = " ".join(f'{side}="{v}"' for side, v in zip(("xtl", "ytl", "xbr", "ybr"), box))
    return f'<annotations><image name="{name}" width="64" height="48"><box label="cat" {sides}/></image></annotations>'


def kitti(name, box=(8, 6, 40, 30)):
    return f"cat 0 0 0 {' '.join(map(str, box))} 0 0 0 0 0 0 0\n"


def table(name, box=(8, 6, 40, 30)):
    return f"filename,xmin,ymin,xmax,ymax,class\n{name},{','.join(map(str, box))},cat\n"


def plates(name, box=(8, 6, 40, 30)):
    x1, y1, x2, y2 = box
    return f"{name}\t{x1}\t{y1}\t{x2 - x1}\t{y2 - y1}\tM AB 12\n"


OPENIMAGES = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsGroupOf\n"


def openimages(name):
    return OPENIMAGES + f"{name.partition('.')[0]},xclick,cat,1,.1,.5,.1,.5,0\n"


ONE_FILE = {"t.json": coco, "annotations.xml": cvat, "t.csv": table, "plates.txt": plates,
            "train-annotations-bbox.csv": openimages}
FILE_EACH = {"a.xml": voc, "a.json": labelme, "label_2/a.txt": kitti}
WRITERS = {**ONE_FILE, **FILE_EACH}


def told(ds): return [(f.severity, f.kind) for f in ds.flaws]


# One name, two images

@pytest.mark.parametrize("file", WRITERS)
@pytest.mark.parametrize("folders", [("x", "y"), ("front/images", "rear/images")])
def test_one_name_in_two_folders(tmp_path, file, folders):
    put(tmp_path, {f"{folder}/a.jpg": IMAGE for folder in folders} | {file: WRITERS[file]("a.jpg")})
    refused(lambda: read_dataset(tmp_path), folders[0], folders[1])


@pytest.mark.parametrize("file", ["t.json", "annotations.xml"])
def test_the_folder_of_images_and_a_folder_that_is_written_win(tmp_path, file):
    put(tmp_path, {"images/a.jpg": IMAGE, "masks/a.jpg": IMAGE, file: WRITERS[file]("a.jpg")})
    assert read_dataset(tmp_path).paths.tolist() == ["images/a.jpg"]
    put(tmp_path, {file: WRITERS[file]("masks/a.jpg")})
    assert read_dataset(tmp_path).paths.tolist() == ["masks/a.jpg"]


@pytest.mark.parametrize("file", ["a.xml", "a.json"])
def test_a_label_that_names_another_image(tmp_path, file):
    put(tmp_path, {"a.jpg": IMAGE, "b.jpg": IMAGE, "old/c.jpg": IMAGE})
    for name in ("a.jpg", "renamed_since.jpg", "a.png", "c.jpg", ""):
        put(tmp_path, {file: WRITERS[file](name)})
        assert "two-images" not in [f.kind for f in read_dataset(tmp_path).flaws]
    put(tmp_path, {file: WRITERS[file]("b.jpg")})
    [flaw] = [f for f in read_dataset(tmp_path).flaws if f.kind == "two-images"]
    assert (flaw.severity, flaw.action) == ("error", "stops")
    for name in (file, "a.jpg", "b.jpg"): assert name in flaw.message


# Shares of the image

@pytest.mark.parametrize("file", ["t.json", "annotations.xml", "t.csv", *FILE_EACH])
def test_shares_become_pixels(tmp_path, file):
    put(tmp_path, {"a.jpg": IMAGE, file: WRITERS[file]("a.jpg", (.125, .25, .5, .75))})
    ds = read_dataset(tmp_path)
    assert ds.boxes.tolist() == [[8, 12, 32, 36]]
    assert told(ds) == [("warning", "shares")] and "relative to the image" in ds.flaws[0].message


def test_small_boxes_beside_others_and_single_pixels_are_pixels(tmp_path):
    small = (.125, .25, .5, .75)
    put(tmp_path / "two", {f"{k}.jpg": IMAGE for k in "ab"})
    put(tmp_path / "two", {"a.xml": voc("a.jpg", small), "b.xml": voc("b.jpg")})
    assert read_dataset(tmp_path / "two").boxes[0].tolist() == list(small)
    put(tmp_path / "pixel", {"a.jpg": IMAGE, "a.xml": voc("a.jpg", (0, 0, 1, 1))})
    assert read_dataset(tmp_path / "pixel").boxes.tolist() == [[0, 0, 1, 1]]


def test_one_of_two_coco_files_has_shares(tmp_path):
    put(tmp_path, {"train/a.jpg": IMAGE, "val/b.jpg": IMAGE, "train.json": coco("a.jpg"),
                   "val.json": coco("b.jpg", (.125, .25, .5, .75), area=.1)})
    ds = read_dataset(tmp_path)
    assert ds.boxes.tolist() == [[8, 6, 40, 30], [8, 12, 32, 36]]
    assert ds.areas[1] == pytest.approx(.1 * 48 * 64)
    assert told(ds) == [("warning", "shares")] and "val.json" in ds.flaws[0].message


# What is left out

@pytest.mark.parametrize("file", [*ONE_FILE, "a.json"])
def test_images_without_labels_are_counted(tmp_path, file):
    put(tmp_path, {f"{name}.jpg": IMAGE for name in "abcdef"} | {file: WRITERS[file]("a.jpg")})
    ds = read_dataset(tmp_path)
    assert ds.paths.tolist() == ["a.jpg"] and told(ds) == [("note", "no-labels")]
    assert "5 images" in ds.flaws[0].message and "b.jpg, c.jpg, d.jpg and 2 more" in ds.flaws[0].message


def test_an_image_that_cannot_be_read_is_no_background(tmp_path):
    put(tmp_path, {"images/a.jpg": IMAGE, "images/b.jpg": b"", "labels/a.txt": LINE, "classes.txt": "cat"})
    assert told(read_dataset(tmp_path)) == [("warning", "unreadable-image")]


@pytest.mark.parametrize("mark, n", [("1", 1), ("true", 1), ("0", 2), ("", 2)])
def test_deleted_objects(tmp_path, mark, n):
    put(tmp_path, {"a.jpg": IMAGE, "b.jpg": IMAGE, "a.xml": voc("a.jpg"),
                   "b.xml": voc("b.jpg", more=f"<deleted>{mark}</deleted>")})
    ds = read_dataset(tmp_path)
    assert len(ds.boxes) == n
    assert told(ds) == [("note", "deleted-object")] * (2 - n)


# Sources that disagree

def test_two_yamls(tmp_path):
    yaml = "train: images\nval: images\nnames: [{}]\n"
    put(tmp_path, {"images/a.jpg": IMAGE, "labels/a.txt": LINE, "data.yaml": yaml.format("cat, dog"),
                   "other.yaml": yaml.format("cat, dog"),
                   "elsewhere.yaml": "train: ../coco\nnames: [person]\n"})
    assert read_dataset(tmp_path).classes == ("cat", "dog")
    put(tmp_path, {"other.yaml": yaml.format("dog, cat")})
    refused(lambda: read_dataset(tmp_path), "other.yaml", "class 0 is 'dog' here and 'cat' in", "data.yaml")


def test_two_label_files_of_one_image(tmp_path):
    put(tmp_path, {"images/a.jpg": IMAGE, "labels/a.txt": LINE, "classes.txt": "cat"})
    for same in (LINE, f"\n{LINE}\n", "a cat on a mat, seen from the left\n"):
        put(tmp_path, {"images/a.txt": same})
        assert len(read_dataset(tmp_path).boxes) == 1
    put(tmp_path, {"images/a.txt": "0 .1 .1 .1 .1\n"})
    refused(lambda: read_dataset(tmp_path), "labels/a.txt", "images/a.txt", "other boxes")


@pytest.mark.parametrize("file", ["a.xml", "t.json", "annotations.xml"])
def test_a_table_beside_other_labels(tmp_path, file):
    put(tmp_path, {"a.jpg": IMAGE, file: WRITERS[file]("a.jpg"), "t.csv": table("a.jpg", (9, 7, 40, 30))})
    assert told(read_dataset(tmp_path)) == [] # a tool that counts from one
    put(tmp_path, {"t.csv": table("a.jpg", (1, 1, 9, 9))})
    ds = read_dataset(tmp_path)
    assert told(ds) == [("warning", "other-labels")] and "--format csv" in ds.flaws[0].message
    assert told(read_dataset(tmp_path, "csv")) == []


def test_columns_that_disagree(tmp_path):
    put(tmp_path, {"a.jpg": IMAGE})
    def read(header, *rows): return read_dataset(put(tmp_path, {"t.csv": "\n".join([header, *rows]) + "\n"}))
    numbered = "filename,class,class_id,xmin,ymin,xmax,ymax"
    assert told(read(numbered, "a.jpg,x,0,1,1,9,9", "a.jpg,y,1,1,1,9,9", "a.jpg,x,0,2,2,9,9")) == []
    for row in ("a.jpg,y,0,1,1,9,9", "a.jpg,x,1,1,1,9,9"):
        ds = read(numbered, "a.jpg,x,0,1,1,9,9", row)
        assert told(ds) == [("warning", "class-numbers")] and "line 3" in ds.flaws[0].message
    sized = "filename,width,height,class,xmin,ymin,xmax,ymax"
    assert told(read(sized, "a.jpg,,,x,1,1,9,9", "a.jpg,64,48,x,1,1,9,9")) == []
    for rows in (("a.jpg,64,48,x,1,1,9,9", "a.jpg,128,96,x,1,1,9,9"),
                 ("a.jpg,128,96,x,1,1,9,9", "a.jpg,64,48,x,1,1,9,9")):
        refused(lambda: read(sized, *rows), "line 3: 'a.jpg' is", "128x96", "64x48")


def test_box_and_outline(tmp_path):
    near = [[8, 6, 40, 6, 40, 30, 8, 29]]
    far = [[50, 40, 60, 40, 60, 46]]
    for outline, kinds in ((near, []), (far, [("warning", "box-and-outline")]), ([], [])):
        for extra in ({}, {"area": None, "iscrowd": [0]}): # columns, and what does not fit them
            put(tmp_path, {"a.jpg": IMAGE, "t.json": coco("a.jpg", segmentation=outline, **extra)})
            assert told(read_dataset(tmp_path)) == kinds


@pytest.mark.parametrize("area, kinds", [(768, []), (500.5, []), (800, []), (5000, [("note", "stated-area")]),
                                         (0, [("note", "stated-area")])])
def test_stated_areas(tmp_path, area, kinds):
    put(tmp_path, {"a.jpg": IMAGE, "t.json": coco("a.jpg", area=area)})
    assert told(read_dataset(tmp_path)) == kinds


# Splits

@pytest.mark.parametrize("train, val, is_told", [
    ("images/train", "images/train", True), ("images", "images/", True), ("images", "images", False),
    ("images/train", "images/val", False),
])
def test_splits_of_the_same_images(tmp_path, train, val, is_told):
    put(tmp_path, {f"{kind}/{split}/{split}.{suffix}": data for split in ("train", "val")
                   for kind, suffix, data in (("images", "jpg", IMAGE), ("labels", "txt", LINE))})
    put(tmp_path, {"data.yaml": f"train: {train}\nval: {val}\nnames: [cat]\n"})
    found = [flaw for flaw in told(read_dataset(tmp_path)) if flaw[1] == "same-splits"]
    assert found == [("warning", "same-splits")] * is_told


def test_splits_that_are_not_read(tmp_path):
    header = "filename,is_train,class,xmin,ymin,xmax,ymax\n"
    put(tmp_path / "csv", {"a.jpg": IMAGE, "t.csv": header + "a.jpg,1,x,1,1,9,9\n"})
    ds = read_dataset(tmp_path / "csv")
    assert told(ds) == [("note", "split-column")] and "'is_train'" in ds.flaws[0].message
    put(tmp_path / "voc", {"a.jpg": IMAGE, "a.xml": voc("a.jpg"), "ImageSets/Main/cat_train.txt": "a  1\n"})
    ds = read_dataset(tmp_path / "voc")
    assert told(ds) == [("note", "class-lists")] and "cat_train.txt" in ds.flaws[0].message


# Class names

MAP = "item {\n id: 1\n name: 'n02'\n display_name: \"cat\"\n}\nitem { name: 'dog' id: 2 }\n"


def test_a_label_map_names_numbers(tmp_path):
    put(tmp_path, {"a.jpg": IMAGE, "label_map.pbtxt": MAP, "t.csv": table("a.jpg").replace(",cat", ",2")})
    ds = read_dataset(tmp_path)
    assert ds.classes == ("cat", "dog") and ds.labels.tolist() == [1] and told(ds) == [("note", "label-map")]
    put(tmp_path, {"t.csv": table("a.jpg").replace(",cat", ",7")})
    refused(lambda: read_dataset(tmp_path), "class 7 has no name in label_map.pbtxt")
    put(tmp_path, {"t.csv": table("a.jpg")})
    assert read_dataset(tmp_path).classes == ("cat", )


@pytest.mark.parametrize("names, is_told", [
    ("# my classes\ncat\n", True), ("0 cat\n1 dog\n", True), ("0: cat\n1: dog\n", True),
    ("1 cat\n2 dog\n3 cow\n", True),
    ("cat\ndog\n", False), ("1 euro\n2 euro\n", False), ("0\n1\n", False), ("C#\n", False),
])
def test_lines_that_are_no_names(tmp_path, names, is_told):
    put(tmp_path, {"images/a.jpg": IMAGE, "labels/a.txt": LINE, "classes.txt": names})
    assert told(read_dataset(tmp_path)) == [("warning", "class-name")] * is_told


def test_ids_of_one_name(tmp_path):
    rows = "".join(f"a,xclick,/m/{k},1,.1,.5,.1,.5,0\n" for k in (1, 2, 3))
    put(tmp_path, {"a.jpg": IMAGE, "train-annotations-bbox.csv": OPENIMAGES + rows,
                   "class-descriptions.csv": "/m/1,Cat\n/m/2,Cat\n/m/3,Dog\n"})
    ds = read_dataset(tmp_path)
    assert ds.classes == ("Cat", "Dog") and told(ds) == [("warning", "merged-classes")]
    assert "/m/1, /m/2" in ds.flaws[0].message


def test_a_finding_that_stops(tmp_path):
    put(tmp_path, {"a.jpg": IMAGE, "b.jpg": IMAGE, "a.xml": voc("b.jpg")})
    report = check_dataset(tmp_path)
    assert report.exit_code == 1 and "two-images" in str(report)
