"Several files that name the classes: they agree, are mapped by name, or stop with one line."
import pytest

from label_files import image_bytes, put, refused
from jetson_det.data.formats.registry import read_dataset
from jetson_det.data.formats.yolo import read_yolo

LINE = "{} .5 .5 .25 .25\n"


def yolo(root, folder, name, *labels):
    "An image and its label file in one folder."
    put(root, {f"{folder}/{name}.jpg": image_bytes(), f"{folder}/{name}.txt": "".join(map(LINE.format, labels))})


def named(ds):
    "{image: names of its classes}"
    return {ds.paths[i]: [ds.classes[c] for c in ds.boxes_of(i)[1]] for i in range(len(ds))}


def kinds(ds):
    return [(f.kind, f.file, f.severity) for f in ds.flaws]


@pytest.mark.parametrize("file", ["classes.txt", "obj.names", "my.names", "_darknet.labels"])
def test_the_list_of_the_own_folder_counts(tmp_path, file):
    yolo(tmp_path, "train", "a", 0, 1)
    yolo(tmp_path, "val", "b", 0, 1, 2)
    put(tmp_path, {f"train/{file}": "dog\ncat\n", f"val/{file}": "cat\ndog\nbird\n"})
    ds = read_dataset(tmp_path, "yolo")
    assert ds.classes == ("dog", "cat", "bird")
    assert named(ds) == {"train/a.jpg": ["dog", "cat"], "val/b.jpg": ["cat", "dog", "bird"]}
    assert kinds(ds) == [("class-order", f"val/{file}", "note")]


def test_the_nearest_list_above_counts(tmp_path):
    for split in ("train", "val"):
        put(tmp_path, {f"images/{split}/{split}.jpg": image_bytes(), f"labels/{split}/{split}.txt": LINE.format(0)})
    put(tmp_path, {"labels/classes.txt": "dog\ncat\n", "labels/val/classes.txt": "Cat\nbird\n"})
    ds = read_dataset(tmp_path)
    assert named(ds) == {"images/train/train.jpg": ["dog"], "images/val/val.jpg": ["cat"]}
    assert ds.classes == ("dog", "cat", "bird")


def test_lists_that_grow_are_one(tmp_path):
    "labelImg adds to the end of its list."
    yolo(tmp_path, "a", "1", 0, 1)
    yolo(tmp_path, "b", "2", 0, 1, 2)
    put(tmp_path, {"a/classes.txt": "dog\ncat\n", "b/classes.txt": "dog\ncat\nbird\n"})
    ds = read_dataset(tmp_path)
    assert ds.classes == ("dog", "cat", "bird") and ds.flaws == []


def test_two_lists_in_one_folder_must_agree(tmp_path):
    yolo(tmp_path, "x", "a", 0)
    put(tmp_path, {"x/classes.txt": "dog\ncat\n", "x/obj.names": "dog\ncat\nbird\n"})
    assert read_dataset(tmp_path).classes == ("dog", "cat", "bird")
    put(tmp_path, {"x/obj.names": "dog\n\nbird\n"})
    assert read_dataset(tmp_path).classes == ("dog", "cat", "bird")
    put(tmp_path, {"x/obj.names": "cat\ndog\n"})
    refused(lambda: read_dataset(tmp_path), "obj.names, line 1: class 0 is 'cat' here and 'dog' in",
            "classes.txt: one of them is wrong")
    (tmp_path / "x/obj.names").unlink()
    put(tmp_path, {"x/predefined_classes.txt": "person\nbus\n"}) # what labelImg offers
    assert read_dataset(tmp_path).classes == ("dog", "cat")


@pytest.mark.parametrize("describe", [
    {"data.yaml": "train: x\nnames: [cat, dog]\n"},
    {"obj.data": "train = train.txt\nnames = cats.names\n", "train.txt": "x/a.jpg\n", "cats.names": "cat\ndog\n"},
])
def test_a_list_below_a_description_must_agree(tmp_path, describe):
    yolo(tmp_path, "x", "a", 0)
    put(tmp_path, {**describe, "x/classes.txt": "Cat\ndog\nbird\n"})
    assert read_yolo(tmp_path / next(iter(describe))).classes == ("cat", "dog")
    put(tmp_path, {"x/classes.txt": "dog\ncat\n"})
    refused(lambda: read_dataset(tmp_path), "x/classes.txt, line 1: class 0 is 'dog' here and 'cat' in",
            "one of them is wrong")
    (tmp_path / "x/classes.txt").unlink()
    put(tmp_path, {"x/predefined_classes.txt": "person\nbus\n", "coco.names": "person\nbicycle\n"}) # of something else
    assert read_dataset(tmp_path).classes == ("cat", "dog")


def test_what_labelimg_offers_is_no_list_of_a_folder(tmp_path):
    yolo(tmp_path, "x", "a", 0)
    put(tmp_path, {"classes.txt": "cat\ndog\n", "x/predefined_classes.txt": "person\nbus\n"})
    assert named(read_dataset(tmp_path)) == {"x/a.jpg": ["cat"]}
    (tmp_path / "classes.txt").unlink()
    assert named(read_dataset(tmp_path)) == {"x/a.jpg": ["person"]}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_blank_line_keeps_its_number(tmp_path, end):
    yolo(tmp_path, "x", "a", 0, 2)
    put(tmp_path, {"classes.txt": end.join(["cat", "", "dog", "bird", "", " ", ""])})
    ds = read_dataset(tmp_path)
    assert ds.classes == ("cat", "dog", "bird") and named(ds) == {"x/a.jpg": ["cat", "dog"]}
    assert kinds(ds) == [("unnamed-class", "classes.txt", "note")]
    yolo(tmp_path, "x", "a", 0, 1)
    refused(lambda: read_dataset(tmp_path), "x/a.txt, line 2: class 1 has no name", "classes.txt, line 2 is blank")


def test_blank_lines_that_the_count_says_are_space(tmp_path):
    yolo(tmp_path, "x", "a", 0, 1)
    put(tmp_path, {"obj.data": "classes = 2\ntrain = train.txt\nnames = obj.names\n", "train.txt": "x/a.jpg\n",
                   "obj.names": "cat\n\ndog\n"})
    ds = read_yolo(tmp_path / "obj.data")
    assert ds.classes == ("cat", "dog") and ds.flaws == []
    put(tmp_path, {"obj.data": "classes = 3\ntrain = train.txt\nnames = obj.names\n"})
    refused(lambda: read_yolo(tmp_path / "obj.data"), "class 1 has no name")


@pytest.mark.parametrize("text", ["no", "yes", "on", "off", "null", "~", "true", "1e3", "0x1F", "010", "12:30", "1_000",
                                  "2024-01-05", ".5", "-", "1.50"])
@pytest.mark.parametrize("names", ["names: [cat, {}]", "names:\n- cat\n- {}", "names: {{0: cat, 1: {}}}",
                                   "names:\n  1: {}\n  0: cat"])
def test_names_are_what_is_written(tmp_path, text, names):
    if text == "-": text = "'-'"
    yolo(tmp_path, "x", "a", 1)
    put(tmp_path, {"data.yaml": f"train: x\nval:\ntest: null\n{names.format(text)}\nnc: 2\n"})
    assert read_dataset(tmp_path).classes == ("cat", text.strip("'"))


@pytest.mark.parametrize("names, line", [("[cat, , dog]", 2), ("[cat, '', dog]", 2), ("[cat, dog, Dog, dog]", 2),
                                         ("\n  0: cat\n  1:\n  2: dog", 4), ("\n- cat\n- dog\n-\n", 5)])
def test_names_that_are_none(tmp_path, names, line):
    yolo(tmp_path, "x", "a", 1)
    put(tmp_path, {"data.yaml": f"train: x\nnames: {names}\n"})
    refused(lambda: read_dataset(tmp_path), f"data.yaml, line {line}: ")


def test_two_images_of_one_label_file(tmp_path):
    put(tmp_path, {"images/i.jpg": image_bytes(), "images/i.png": image_bytes(suffix=".png"),
                   "labels/i.txt": LINE.format(0), "classes.txt": "s\n"})
    ds = read_dataset(tmp_path)
    assert len(ds) == 2
    assert [(f.kind, f.severity, f.file, f.where) for f in ds.flaws] == [
        ("shared-label", "warning", "images/i.png", "labels/i.txt")]
    assert "images/i.png and images/i.jpg have one label file" in ds.flaws[0].message


# COCO

def coco(image, names, category=1, first=1):
    return dict(images=[dict(id=1, file_name=image, height=48, width=64)],
                annotations=[dict(id=1, image_id=1, category_id=category, bbox=[1, 2, 9, 9])],
                categories=[dict(id=k, name=n) for k, n in enumerate(names, first)])


def coco_splits(root, train, val):
    put(root, {"train.json": train, "val.json": val, "a.jpg": image_bytes(), "b.jpg": image_bytes()})
    return read_dataset(root)


def test_a_val_file_that_lists_part_of_the_classes(tmp_path):
    ds = coco_splits(tmp_path, coco("a.jpg", ["cat", "dog", "bird"], 2), coco("b.jpg", ["bird", "dog"], 7, first=7))
    assert ds.classes == ("cat", "dog", "bird")
    assert named(ds) == {"a.jpg": ["dog"], "b.jpg": ["bird"]}
    assert kinds(ds) == [("class-lists", "val.json", "note")]
    ds = coco_splits(tmp_path, coco("a.jpg", ["bird"]), coco("b.jpg", ["cat", "bird"], 2))
    assert ds.classes == ("cat", "bird") and named(ds) == {"a.jpg": ["bird"], "b.jpg": ["bird"]}
    assert kinds(ds) == [("class-lists", "train.json", "note")]


def test_ids_that_differ_are_mapped_by_name(tmp_path):
    ds = coco_splits(tmp_path, coco("a.jpg", ["cat", "dog"], 1), coco("b.jpg", ["dog", "cat"], 1))
    assert named(ds) == {"a.jpg": ["cat"], "b.jpg": ["dog"]}


def roboflow(image, *categories, used=1):
    d = coco(image, [], used)
    d["categories"] = [dict(id=k, name=n, supercategory=s) for k, (n, s) in enumerate(categories)]
    return d


@pytest.mark.parametrize("categories, used", [
    ([("pill", "none"), ("pill", "pill")], 1),
    ([("pill", ""), ("pill", "pill"), ("other", "pill")], 1),
    ([("pill", "none"), ("pill", "pill")], 0),
    ([("pill", "none"), ("pill", "pill"), ("box", "pill")], 1),
    ([("pill ", "none"), (" pill", "pill")], 1),
])
def test_a_parent_of_the_same_name(tmp_path, categories, used):
    ds = coco_splits(tmp_path, roboflow("a.jpg", *categories, used=used), roboflow("b.jpg", *categories, used=used))
    assert ds.classes == tuple(dict.fromkeys(n.strip() for n, _ in categories))
    assert named(ds) == {"a.jpg": ["pill"], "b.jpg": ["pill"]}
    assert [f.kind for f in ds.flaws] == ["unused-parent"] * 2


def test_two_classes_of_one_name_with_boxes(tmp_path):
    d = roboflow("a.jpg", ("pill", "none"), ("pill", "pill"))
    d["annotations"].append(dict(d["annotations"][0], id=2, category_id=0))
    put(tmp_path, {"a.jpg": image_bytes(), "x.json": d})
    refused(lambda: read_dataset(tmp_path), "x.json, line 1: two categories have the name 'pill': 0 and 1")


def test_open_images_names_that_contradict(tmp_path):
    table = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax\na,xclick,/m/01,1,.1,.5,.1,.5\n"
    put(tmp_path, {"a.jpg": image_bytes(), "x-annotations-bbox.csv": table,
                   "class-descriptions.csv": "/m/01,Cat\n/m/01,Cat\n"})
    assert read_dataset(tmp_path).classes == ("Cat",)
    put(tmp_path, {"train-class-descriptions.csv": "/m/02,Dog\n/m/01,Dog\n"})
    refused(lambda: read_dataset(tmp_path), "class-descriptions.csv, line 2: '/m/01' is 'Dog' here and 'Cat' above")


def three_folders(root, lists):
    "Two folders of labels with lists of names, and one without."
    for folder in ("a", "b", "c"): yolo(root, folder, folder, 0, 1)
    put(root, lists)


@pytest.mark.parametrize("first, second", [
    ("a/classes.txt", "b/classes.txt"), ("b/classes.txt", "a/classes.txt"), ("c/classes.txt", "a/classes.txt"),
    ("a/obj.names", "b/classes.txt"), ("a/my.names", "c/_darknet.labels"), ("deep/x/classes.txt", "b/classes.txt"),
    ("a/classes.txt", "images/classes.txt"),
])
def test_a_folder_without_a_list_beside_two_that_differ(tmp_path, first, second):
    three_folders(tmp_path, {first: "dog\ncat\n", second: "cat\ndog\n"})
    refused(lambda: read_dataset(tmp_path, "yolo"), first, second, "'dog'", "'cat'", "copy the one that these labels")
    put(tmp_path, {second: "dog\ncat\nbird\n"})
    assert read_dataset(tmp_path, "yolo").classes == ("dog", "cat", "bird")


def test_a_list_above_or_the_only_one_is_for_all(tmp_path):
    three_folders(tmp_path / "one", {"b/classes.txt": "dog\ncat\n"})
    assert read_dataset(tmp_path / "one").flaws == []
    three_folders(tmp_path / "above", {"classes.txt": "dog\ncat\n", "b/classes.txt": "cat\ndog\n"})
    ds = read_dataset(tmp_path / "above")
    assert named(ds) == {"a/a.jpg": ["dog", "cat"], "b/b.jpg": ["cat", "dog"], "c/c.jpg": ["dog", "cat"]}


def test_the_longest_list_is_for_folders_without_one(tmp_path):
    three_folders(tmp_path, {"a/classes.txt": "dog\n", "b/classes.txt": "dog\ncat\n", "a/a.txt": LINE.format(0)})
    assert named(read_dataset(tmp_path))["c/c.jpg"] == ["dog", "cat"]


def two_trees(root, lists):
    for split in ("train", "val"):
        put(root, {f"images/{split}/{split}.jpg": image_bytes(), f"labels/{split}/{split}.txt": LINE.format(0)})
    put(root, lists)


def test_a_list_beside_the_images(tmp_path):
    "It counts for their labels, which lie elsewhere, and may not contradict a list beside the labels."
    two_trees(tmp_path, {"images/train/classes.txt": "dog\ncat\n", "images/val/classes.txt": "cat\ndog\n"})
    assert named(read_dataset(tmp_path)) == {"images/train/train.jpg": ["dog"], "images/val/val.jpg": ["cat"]}
    put(tmp_path, {"labels/classes.txt": "dog\ncat\n"})
    refused(lambda: read_dataset(tmp_path), "images/val/classes.txt, line 1", "labels/classes.txt")


NOTES = {"categories": [{"id": 1, "name": "cat"}, {"id": 0, "name": "dog"}], "info": {"year": 2024}}


def test_notes_of_label_studio(tmp_path):
    two_trees(tmp_path, {"notes.json": NOTES})
    assert read_dataset(tmp_path).classes == ("dog", "cat")
    put(tmp_path, {"classes.txt": "dog\ncat\n"})
    assert read_dataset(tmp_path).flaws == []
    put(tmp_path, {"classes.txt": "cat\ndog\n"})
    refused(lambda: read_dataset(tmp_path), "notes.json", "classes.txt", "one of them is wrong")
    for other in ({"categories": []}, {"categories": [{"name": "dog"}]}, [1], {"my": "notes"}):
        put(tmp_path, {"notes.json": other})
        assert read_dataset(tmp_path).classes == ("cat", "dog")


@pytest.mark.parametrize("other", [{"notes.json": NOTES}, {"obj.names": "dog\ncat\n"}, {"labels/classes.txt": "dog\n"},
                                   {"obj.data": "classes = 2\nnames = my.list\n", "my.list": "dog\ncat\n"},
                                   {"images/classes.txt": "dog\ncat\n"}])
def test_no_file_of_names_may_contradict_data_yaml(tmp_path, other):
    two_trees(tmp_path, {"data.yaml": "train: images/train\nval: images/val\nnames: [cat, dog]\n", **other})
    refused(lambda: read_dataset(tmp_path), "data.yaml", "one of them is wrong")
