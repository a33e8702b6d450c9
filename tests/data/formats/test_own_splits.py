"Splits that folders, files and lists already make: one rule for all readers."
import json
import shutil

import pytest

from format_writers import WRITERS, reader_of, with_one_class
from label_files import image_bytes, put, refused
from jetson_det.data.formats.reader import Files
from jetson_det.data.formats.registry import read_dataset
from jetson_det.data.formats.splits import own_splits, split_lists, split_of
from jetson_det.data.formats.yolo import read_yolo
from jetson_det.data.split import ensure_splits, split_digest, write_split_lists
from jetson_det.scenes.docks import write_scenes


@pytest.mark.parametrize("name, split", [
    ("train", "train"), ("Training", "train"), ("TRAIN_SET", "train"), ("trainset", "train"), ("train2017", "train"),
    ("TrainImages", "train"), ("fold_3/train/images", "train"), ("images/train/test_track", "train"),
    ("val", "val"), ("valid", "val"), ("Validation", "val"), ("dev", "val"), ("eval", "val"), ("valData", "val"),
    ("instances_val2017.json", "val"), ("my_dev.csv", "val"), ("minival2014.json", "val"),
    ("test", "test"), ("testing", "test"), ("TestSet", "test"), ("test-dev2017", "test"), ("holdout", "test"),
    ("test_data/train/a", "train"), ("trainval", ""), ("contest", ""), ("latest.json", ""), ("VOCdevkit", ""),
    ("dev_kit", ""), ("my_dev_box", ""), ("evaluated", ""), ("trains", ""), ("", ""),
])
def test_a_name_says_a_split(name, split):
    assert split_of(name) == split


def per_split(read_only_scenes, root, writer, folders):
    "The same scenes in each of the folders, under names of their own, as the writer writes them."
    ds = read_dataset(read_only_scenes)
    if writer == "plates": ds = with_one_class(ds)
    for k, folder in enumerate(folders):
        WRITERS[writer](ds.subset([k, k + 3]), root / folder)
    return read_dataset(root, reader_of(writer))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes") / "made", 6, (96, 128), seed=4, splits={"all": 1.})


@pytest.mark.parametrize("writer", ["coco", "voc", "csv", "labelme", "kitti", "openimages", "plates", "cvat"])
@pytest.mark.parametrize("folders", [("train", "valid", "test"), ("Training", "Validation", "Testing"),
                                     ("set/train_data", "set/dev", "set/eval_2")])
def test_a_folder_for_each_split(scenes, tmp_path, writer, folders):
    ds = per_split(scenes, tmp_path, writer, folders)
    want = ["train", "val", "val" if "eval" in folders[2] else "test"]
    of_folder = {folder: split for folder, split in zip(folders, want)}
    assert len(ds) == 6
    for path, split in zip(ds.paths, ds.splits):
        folder = next(f for f in folders if path.startswith(f + "/"))
        assert split == of_folder[folder], path


@pytest.mark.parametrize("layout", ["images/{}/{}", "{}/images/{}", "{}/{}"])
def test_yolo_folders(tmp_path, layout):
    for k, folder in enumerate(("train", "valid", "test")):
        image = layout.format(folder, f"{k}.jpg")
        put(tmp_path, {image: image_bytes(), image.replace("images", "labels")[:-4] + ".txt": "0 .5 .5 .5 .5\n"})
    put(tmp_path, {"classes.txt": "s\n"})
    assert sorted(read_dataset(tmp_path).splits) == ["test", "train", "val"]
    # a data.yaml that names one folder for all tells no split
    if layout.startswith("images"):
        put(tmp_path, {"data.yaml": "train: images\nval: images\nnames: [s]\n"})
        assert sorted(read_dataset(tmp_path).splits) == ["test", "train", "val"]


def coco(*names):
    return dict(images=[dict(id=k, file_name=n, height=48, width=64) for k, n in enumerate(names)],
                annotations=[dict(id=k, image_id=k, category_id=1, bbox=[1, 2, 9, 9]) for k, _ in enumerate(names)],
                categories=[dict(id=1, name="s")])


def test_one_coco_file_whose_names_say_the_split(tmp_path):
    names = ["train/a.jpg", "train/b.jpg", "val/a.jpg", "test/c.jpg"]
    put(tmp_path, {"labels.json": coco(*names), **{f"images/{n}": image_bytes() for n in names}})
    assert read_dataset(tmp_path).splits.tolist() == ["train", "train", "val", "test"]


def test_a_single_file_called_train_names_all(tmp_path):
    put(tmp_path, {"train.json": coco("a.jpg", "b.jpg"), "a.jpg": image_bytes(), "b.jpg": image_bytes()})
    assert read_dataset(tmp_path).splits.tolist() == ["", ""]


def test_cvat_files_called_by_their_split(tmp_path):
    for k, split in enumerate(("train", "test")):
        box = '<box label="s" xtl="1" ytl="2" xbr="9" ybr="9"/>'
        put(tmp_path, {f"{split}.xml": f'<annotations><image id="0" name="{k}.jpg" width="64" height="48">{box}</image>'
                       "</annotations>", f"{k}.jpg": image_bytes()})
    assert dict(zip(*columns(tmp_path))) == {"0.jpg": "train", "1.jpg": "test"}


LABELME = dict(shapes=[dict(label="s", points=[[1, 2], [9, 9]], shape_type="rectangle")], imageData=None)


def labelme(name):
    "An image and its label file."
    return {f"{name}.jpg": image_bytes(), f"{name}.json": dict(LABELME, imagePath=f"{name}.jpg")}


@pytest.mark.parametrize("place", ["splits/{}.txt", "{}.txt", "ImageSets/{}.txt", "ImageSets/Main/{}.txt"])
@pytest.mark.parametrize("line", ["{}", "{}.jpg", "img/{}.jpg", "/home/me/data/img/{}.jpg", "data\\img\\{}.jpg"])
def test_lists(tmp_path, place, line):
    for k in range(4): put(tmp_path / "img", labelme(f"{k}"))
    put(tmp_path, {place.format("train"): "".join(line.format(k) + "\n" for k in (0, 1)),
                   place.format("test"): line.format(2) + "\n"})
    assert read_dataset(tmp_path).splits.tolist() == ["train", "train", "test", ""]


def test_lists_go_before_folders_and_those_of_data_split_first(tmp_path):
    for k, folder in enumerate(("train", "test")): put(tmp_path / folder, labelme(f"{k}"))
    put(tmp_path, {"ImageSets/train.txt": "1\n", "ImageSets/val.txt": "0\n"})
    assert dict(zip(*columns(tmp_path))) == {"train/0.jpg": "val", "test/1.jpg": "train"}
    put(tmp_path, {"splits/train.txt": "train/0.jpg\n", "splits/test.txt": "test/1.jpg\n"})
    assert dict(zip(*columns(tmp_path))) == {"train/0.jpg": "train", "test/1.jpg": "test"}


def columns(root):
    ds = read_dataset(root)
    return ds.paths.tolist(), ds.splits.tolist()


def test_what_is_no_list(tmp_path):
    "A label of an image that is called train, a list of plates, a readme."
    put(tmp_path, {"train.jpg": image_bytes(), "a.jpg": image_bytes()})
    for text in ("0 .5 .5 .1 .1\n", "a.jpg\t1\t2\t9\t9\tAB 12\n", "We trained on this.\n", "a\nb\nc\n", "", "\n\n"):
        put(tmp_path, {"train.txt": text})
        assert split_lists(Files(tmp_path)) is None


def test_an_image_in_two_lists(tmp_path):
    put(tmp_path, {**labelme("a"), "train.txt": "a\n", "val.txt": "\na.jpg\n"})
    refused(lambda: read_dataset(tmp_path), "val.txt, line 2: 'a' is in train.txt too")


def test_folds_that_divide_the_same_images(tmp_path):
    for fold in (0, 1):
        for k in (0, 1):
            folder = f"fold{fold}/{'train' if k == fold else 'val'}"
            put(tmp_path / folder, labelme(f"{k}"))
    refused(lambda: read_dataset(tmp_path), "fold0 and fold1 divide the same images in different ways",
            "give one of these folders")
    assert sorted(read_dataset(tmp_path / "fold1").splits) == ["train", "val"]
    shutil.rmtree(tmp_path / "fold1")
    assert sorted(read_dataset(tmp_path).splits) == ["train", "val"]


def test_what_the_labels_tell_goes_first(tmp_path):
    labels = {"train/a.jpg": "x.csv", "val/b.jpg": "x.csv"}
    assert own_splits(tmp_path, labels, ["test", ""]) == ["test", ""]
    assert own_splits(tmp_path, labels, ["test", None]) == ["test", "val"]


@pytest.mark.parametrize("key", ["val", "valid", "validation", "dev"])
def test_words_for_val_in_data_yaml(tmp_path, key):
    for k, folder in enumerate(("a", "b")):
        put(tmp_path, {f"{folder}/{k}.jpg": image_bytes(), f"{folder}/{k}.txt": "0 .5 .5 .5 .5\n"})
    put(tmp_path, {"data.yaml": f"train: a\n{key}: b\nnames: [s]\n"})
    assert read_yolo(tmp_path / "data.yaml").splits.tolist() == ["train", "val"]


def test_a_coco_folder_of_the_package_keeps_its_splits(tmp_path):
    "Written labels come back with the same splits, whatever the folder is called."
    folder = write_scenes(tmp_path / "test_track", 4, (64, 96), splits={"train": .5, "val": .5})
    assert sorted(set(read_dataset(folder).splits)) == ["train", "val"]
    names = [im["file_name"] for im in json.loads((folder / "annotations/train.json").read_text())["images"]]
    assert len(names) == 2


def test_lists_of_several_years(tmp_path):
    "VOC's devkit: lists in a folder for each year, and a stem that two of them have."
    def voc(name): return f"<annotation><filename>{name}</filename>{OBJECT}</annotation>"
    for year in ("VOC2007", "VOC2012"):
        for k in ("1", f"{year}_2"):
            put(tmp_path / year, {f"JPEGImages/{k}.jpg": image_bytes(), f"Annotations/{k}.xml": voc(f"{k}.jpg")})
    put(tmp_path, {"VOC2007/ImageSets/Main/trainval.txt": "1\n", "VOC2007/ImageSets/Main/test.txt": "VOC2007_2\n",
                   "VOC2012/ImageSets/Main/train.txt": "VOC2012_2\n", "VOC2012/ImageSets/Main/val.txt": "1\n"})
    assert dict(zip(*columns(tmp_path))) == {
        "VOC2007/JPEGImages/1.jpg": "train", "VOC2007/JPEGImages/VOC2007_2.jpg": "test",
        "VOC2012/JPEGImages/1.jpg": "val", "VOC2012/JPEGImages/VOC2012_2.jpg": "train"}


OBJECT = "<object><name>s</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"


def test_names_in_lists_are_kept_to_the_byte(tmp_path):
    "A line break of Unicode in a name, and a name that is not UTF-8."
    names = ["a\u2028b.jpg", "c\x85d.jpg", "\udcff.jpg"]
    for k, name in enumerate(names):
        put(tmp_path, {name: image_bytes(), f"{name[:-4]}.json": dict(LABELME, imagePath=f"{k}.png")})
    (tmp_path / "train.txt").write_bytes("".join(n + "\n" for n in names[::2]).encode("utf-8", "surrogateescape"))
    put(tmp_path, {"val.txt": names[1] + "\n"})
    assert dict(zip(*columns(tmp_path))) == dict(zip(names, ["train", "val", "train"]))


@pytest.mark.parametrize("labels", [
    {"labels.json": coco(*(f"{k}.jpg" for k in range(10)))},
    {"labels.csv": "filename,class,xmin,ymin,xmax,ymax,split\n"
     + "".join(f"{k}.jpg,s,1,2,9,9,{'test' if k > 7 else 'train'}\n" for k in range(10))},
    {"data.yaml": "train: train.txt\ntest: test.txt\nnames: [s]\n", "test.txt": "8.jpg\n9.jpg\n",
     "train.txt": "".join(f"{k}.jpg\n" for k in range(8)), **{f"{k}.txt": "0 .5 .5 .5 .5\n" for k in range(10)}},
])
def test_what_data_split_wrote_is_read(tmp_path, labels):
    "Also where the labels name two splits, and val was taken from train."
    put(tmp_path, {**labels, **{f"{k}.jpg": image_bytes() + bytes([k]) for k in range(10)}})
    chosen = ensure_splits(read_dataset(tmp_path), seed=5)
    assert "val" in chosen.split_names
    (tmp_path / "splits").mkdir()
    write_split_lists(chosen, tmp_path / "splits")
    again = read_dataset(tmp_path)
    assert split_digest(again) == split_digest(chosen) and again.flaws == []


def test_a_split_of_each_image_in_coco(tmp_path):
    d = coco("a.jpg", "b.jpg", "c.jpg")
    for im, split in zip(d["images"], ("train", "valid", "test")): im["split"] = split
    put(tmp_path, {"labels.json": d, **{f"{k}.jpg": image_bytes() for k in "abc"}})
    assert read_dataset(tmp_path).splits.tolist() == ["train", "val", "test"]


def test_one_coco_file_with_plain_names_of_images_in_several_folders(tmp_path):
    images = {"train/a.jpg": image_bytes(), "val/b.jpg": image_bytes()}
    put(tmp_path, {"labels.json": coco("a.jpg", "b.jpg"), **images})
    assert dict(zip(*columns(tmp_path))) == {"train/a.jpg": "train", "val/b.jpg": "val"}
    put(tmp_path, {"val/a.jpg": image_bytes()}) # which a.jpg is not clear any more: the folder with most images counts
    assert columns(tmp_path)[0] == ["val/a.jpg", "val/b.jpg"]


def findings(labels, told, files=None, shared=False):
    found = []
    own_splits("D", labels, told, files, shared, lambda *flaw: found.append(flaw))
    return [(kind, message, severity) for kind, _, _, message, _, severity in
            (flaw if len(flaw) == 6 else (*flaw, "warning") for flaw in found)]


def listing(tmp_path, place, **lists):
    "A folder with images a.jpg, b.jpg in train/ and val/, and lists of them."
    for folder, name in (("train", "a"), ("val", "b")): put(tmp_path / folder, labelme(name))
    put(tmp_path, {place.format(split): f"{name}\n" for split, name in lists.items()})
    return Files(tmp_path)


FOLDERS = {"train/a.jpg": "train/a.json", "val/b.jpg": "val/b.json"}


@pytest.mark.parametrize("place, severity", [
    ("ImageSets/Main/{}.txt", "warning"), ("{}.txt", "warning"), ("splits/{}.txt", "note")])
def test_lists_that_contradict_the_folders_are_said(tmp_path, place, severity):
    files = listing(tmp_path, place, train="b", val="a")
    (kind, message, how), = findings(FOLDERS, [None, None], files)
    assert (kind, how) == ("split-conflict", severity) and "disagree on 2 images (train/a.jpg: " in message
    assert f"{place.format('val')} says val, folder train says train" in message
    assert read_dataset(tmp_path).splits.tolist() == ["val", "train"]
    assert [f.kind for f in read_dataset(tmp_path).flaws if f.kind == "split-conflict"] == ["split-conflict"]


def test_lists_that_agree_or_refine_are_not_said(tmp_path):
    assert findings(FOLDERS, [None, None], listing(tmp_path, "{}.txt", train="a", val="b")) == []
    both = {"training/a.jpg": "training/a.xml", "training/b.jpg": "training/b.xml", "testing/c.jpg": "testing/c.xml"}
    assert findings(both, ["train", "val", "test"]) == []
    assert findings(FOLDERS, [None, None]) == []


@pytest.mark.parametrize("labels, told, shared, says", [
    (FOLDERS, ["val", "train"], False, "the labels' own splits and names of folders disagree on 2 images"),
    ({"train/a.jpg": "l.csv", "val/b.jpg": "l.csv"}, ["test", "train"], True,
     "l.csv says test, folder train says train"),
    ({"train/a.jpg": "val.json", "val/b.jpg": "train.json"}, [None, None], True, "names of label files and names of"),
    ({"train/a.jpg": "x.xml", "test/b.jpg": "x.xml"}, ["val", "train"], True, "disagree on 2 images"),
    ({"val/a.jpg": "x.json", "train/b.jpg": "x.json"}, ["test", "train"], True, "disagree on 1 image (val/a.jpg"),
])
def test_each_pair_of_sources_that_disagree_is_said(labels, told, shared, says):
    (kind, message, _), = findings(labels, told, shared=shared)
    assert kind == "split-conflict" and says in message
    wanted = own_splits("D", labels, told, shared=shared)
    assert wanted == (told if None not in told else ["val", "train"])


def test_images_in_no_split_are_said(tmp_path):
    (kind, message, _), = findings({**FOLDERS, "c.jpg": "c.json", "d.jpg": "d.json"}, [None] * 4)
    assert kind == "no-split" and "2 images are in no split and are not used (c.jpg, d.jpg)" in message
    assert findings({"a.jpg": "a.json", "b.jpg": "b.json"}, [None, None]) == []
    assert findings({"test/a.jpg": "a.json", "b.jpg": "b.json"}, [None, None]) == [] # the others are train


def test_labeled_images_that_data_yaml_does_not_name_are_said(tmp_path):
    for k, folder in enumerate(("train", "val", "extra", "extra", "photos")):
        put(tmp_path, {f"images/{folder}/{k}.jpg": image_bytes()})
        if folder != "photos": put(tmp_path, {f"labels/{folder}/{k}.txt": "0 .5 .5 .5 .5\n"})
    put(tmp_path, {"data.yaml": "train: images/train\nval: images/val\nnames: [s]\n"})
    flaw, = [f for f in read_dataset(tmp_path).flaws if f.kind == "no-split"]
    assert flaw.file == "images/extra/2.jpg" and flaw.severity == "warning"
    assert "data.yaml names 2 images with labels in no split" in flaw.message
    put(tmp_path, {"data.yaml": "train: [images/train, images/extra]\nval: images/val\nnames: [s]\n"})
    assert not [f for f in read_dataset(tmp_path).flaws if f.kind == "no-split"]


def test_lists_of_a_part_of_the_images_miss_no_image(tmp_path):
    "Images in the same folder that no list names are in no split; only a label without any image misses one."
    for k in range(4):
        put(tmp_path, {f"images/{k}.jpg": image_bytes(), f"labels/{k}.txt": "0 .5 .5 .5 .5\n"})
    put(tmp_path, {"labels/9.txt": "0 .5 .5 .5 .5\n", "train.txt": "images/0.jpg\n", "val.txt": "images/1.jpg\n",
                   "data.yaml": "train: train.txt\nval: val.txt\nnames: [s]\n"})
    flaws = read_dataset(tmp_path).flaws
    assert [f.file for f in flaws if f.kind == "missing-image"] == ["labels/9.txt"]
    assert [f.file for f in flaws if f.kind == "no-split"] == ["images/2.jpg"]
