"Which images an artifact is evaluated on, and that their labels are those of the file."
import json
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from jetson_det.config import DataConfig
from jetson_det.core import InputError, rng_for
from jetson_det.data.augment.plan import training_boxes
from jetson_det.data.open import evaluation_data, open_data, open_evaluation, split_settings
from jetson_det.runtime.foreign import split_record


def coco_folder(root, images, splits=(), seed=0, size=(48, 64)):
    "Noise images with two boxes each as COCO: one file, or one for each of `splits` in turn."
    (root / "images").mkdir(parents=True)
    rng = rng_for(seed)
    parts = splits or ("",)
    labels = {s: dict(images=[], annotations=[], categories=[dict(id=1, name="Sack")]) for s in parts}
    for i in range(images):
        part = labels[parts[i % len(parts)]]
        cv2.imwrite(str(root / "images" / f"{i}.png"), rng.integers(0, 256, (*size, 3), np.uint8))
        part["images"].append(dict(id=i + 1, file_name=f"{i}.png", height=size[0], width=size[1]))
        for _ in range(2):
            box = [round(float(v), 2) for v in (*rng.uniform(0, 20, 2), *rng.uniform(5, 25, 2))]
            part["annotations"].append(
                dict(id=len(part["annotations"]) + 1, image_id=i + 1, category_id=1, bbox=box, area=box[2] * box[3],
                     iscrowd=0))
    for s, d in labels.items(): (root / f"{s or 'labels'}.json").write_text(json.dumps(d))
    return root


def trained(root, **settings):
    "What the contract of an artifact trained on this folder says of its splits, and its data."
    cfg = DataConfig(path=str(root), **settings)
    ds = open_data(cfg, say=lambda line: None)
    return split_settings(cfg, ds), ds


def opened(*args, **kw):
    "The dataset, and what was said but for the index: other tests use the same cache, which may drop it."
    lines = []
    ds = open_evaluation(*args, say=lines.append, **kw)
    return ds, "\n".join(line for line in lines if not line.startswith("opened from the index"))


def names(ds): return sorted(ds.paths)


def test_a_training_is_evaluated_though_images_are_broken(tmp_path):
    root = coco_folder(tmp_path / "a", 20)
    _, ds = trained(root)
    for path in ds.split("val").paths: (root / path).write_bytes((root / path).read_bytes()[:500])
    made, ds = trained(root, max_flawed=1.)
    assert len(ds.split("val")) == 3 and set(ds.split_names) == {"train", "val", "test"} and len(ds) == 16
    again, lines = opened(root, "val", made)
    assert names(again) == names(ds.split("val")) and "which the training kept apart" in lines


@pytest.mark.parametrize("lists", [False, True])
def test_a_val_that_is_lost_is_a_warning(tmp_path, lists):
    "That of the data, and that of lists."
    root = coco_folder(tmp_path / "a", 20, () if lists else ("train", "train", "train", "val"))
    val = [f"images/{i}.png" for i in range(3, 20, 4)]
    if lists:
        train = [f"images/{i}.png" for i in range(20) if i % 4 != 3]
        for name, paths in (("train", train), ("val", val)): (tmp_path / f"{name}.txt").write_text("\n".join(paths))
    for path in val: (root / path).write_bytes((root / path).read_bytes()[:500])
    said = []
    ds = open_data(DataConfig(path=str(root), max_flawed=1., splits=str(tmp_path) if lists else ""), said.append)
    warning, = [line for line in said if "of val cannot be used" in line]
    assert warning.startswith("warning: all 5 images of val cannot be used (images/") and len(ds) == 15
    assert ("val" in ds.split_names) != lists # made of train, where no list says what is in it


def test_groups_of_some_images_alone_are_a_warning(tmp_path):
    said = []
    open_data(DataConfig(path=str(coco_folder(tmp_path, 20)), group_by="(1[0-9])"), said.append)
    assert [line for line in said if line.startswith("warning: group_by") and "in none: 10 images" in line]
    said = []
    open_data(DataConfig(path=str(tmp_path), group_by="([0-9]+)"), said.append)
    assert not [line for line in said if "group_by" in line]


def test_other_data_without_splits_is_judged_whole(tmp_path):
    made, _ = trained(coco_folder(tmp_path / "a", 20))
    other = coco_folder(tmp_path / "b", 12, seed=1) # the same file names and sizes
    for contract in (made, None, {}):
        ds, lines = opened(other, made=contract)
        assert len(ds) == 12 and "all 12 images: the data has no splits" in lines
        assert "not those of the training" not in lines and "too good" not in lines
    assert len(opened(other, "all", made)[0]) == 12
    ds, lines = opened(other, "val", made) # asked for, so it is made, and said
    assert 0 < len(ds) < 12 and "by a split made for this" in lines


def test_the_data_of_the_training_keeps_its_split(tmp_path):
    root = coco_folder(tmp_path / "a", 20)
    made, ds = trained(root)
    found, lines = opened(root, made=made)
    assert names(found) == names(ds.split("test")) and "which the training kept apart" in lines
    for s in ("train", "val", "test"): assert names(opened(root, s, made)[0]) == names(ds.split(s))
    shutil.move(root, tmp_path / "moved")
    assert names(opened(tmp_path / "moved", made=made)[0]) == names(ds.split("test"))
    made, ds = trained(tmp_path / "moved", val=.5, test=0.)
    assert names(opened(tmp_path / "moved", made=made)[0]) == names(ds.split("val"))
    made, ds = trained(tmp_path / "moved", val=0., test=0.)
    found, lines = opened(tmp_path / "moved", made=made)
    assert len(found) == 20 and "no val: the 20 images of train" in lines


def mirror(image): return image[:, ::-1]
def darken(image): return image // 2
def invert(image): return 255 - image


def changed_copy(root, to, change, share=1.):
    "The dataset with the same names and labels and other pixels."
    shutil.copytree(root, to)
    files = sorted((to / "images").iterdir())
    for file in files[:round(share * len(files))]: cv2.imwrite(str(file), change(cv2.imread(str(file))))
    return to


@pytest.mark.parametrize("change", [mirror, darken, invert])
def test_other_images_under_the_same_names_are_other_data(tmp_path, change):
    root = coco_folder(tmp_path / "a", 20)
    made, ds = trained(root)
    copy = changed_copy(root, tmp_path / "b", change)
    found, lines = opened(copy, made=made)
    assert len(found) == 20 and "all 20 images: the data has no splits" in lines and "kept apart;" not in lines
    assert "14 of 14 images of the training" in lines and "14 of them are other files: this is taken for other" in lines
    assert "too good" not in lines and "only saved anew, --split test or val takes" in lines
    # asked for by name, it is that of the training: who saved the images anew can evaluate as before
    found, lines = opened(copy, "test", made)
    assert names(found) == names(ds.split("test")) and "by a split made for this" in lines and "other files" in lines
    assert names(opened(root, made=made)[0]) == names(ds.split("test"))


def test_mirrored_images_with_mirrored_labels(tmp_path):
    root = coco_folder(tmp_path / "a", 20)
    made, _ = trained(root)
    copy = changed_copy(root, tmp_path / "b", mirror)
    labels = json.loads((copy / "labels.json").read_text())
    for row in labels["annotations"]: row["bbox"][0] = round(64 - row["bbox"][0] - row["bbox"][2], 2)
    (copy / "labels.json").write_text(json.dumps(labels))
    found, lines = opened(copy, made=made)
    assert len(found) == 20 and "all 20 images: the data has no splits" in lines


def test_a_few_changed_images_do_not_make_other_data(tmp_path):
    root = coco_folder(tmp_path / "a", 20)
    made, ds = trained(root)
    found, lines = opened(changed_copy(root, tmp_path / "b", darken, .3), made=made)
    assert names(found) == names(ds.split("test")) and "which the training kept apart" in lines


def test_changed_images_with_splits_of_their_own(tmp_path):
    "The data's own splits hold, as in any other data, and the line says whose they are."
    root = coco_folder(tmp_path / "a", 12, ("train", "val", "test"))
    made, _ = trained(root)
    assert "which the training kept apart" in opened(root, made=made)[1]
    found, lines = opened(changed_copy(root, tmp_path / "b", mirror), made=made)
    assert len(found) == 4 and "test: 4 of 12 images, by a split of the data" in lines and "other files" in lines


@pytest.mark.parametrize("word, near", [("TEST", "test"), ("Val", "val"), ("tets", "test"), ("ALL", "all")])
def test_a_split_by_another_word_is_refused_before_the_data_is_read(word, near):
    with pytest.raises(InputError, match=f"split '{word}': did you mean '{near}'"): open_evaluation("/nowhere", word)


def of_a_file(made):
    "The record as it comes from the metadata of an ONNX file."
    return split_record(json.loads(json.dumps(made)))


def test_a_file_trained_with_lists_is_evaluated_like_its_checkpoint(tmp_path):
    root = coco_folder(tmp_path / "a", 20)
    lists = tmp_path / "lists"
    lists.mkdir()
    paths = names(open_data(DataConfig(path=str(root)), say=lambda line: None))
    for split, some in (("train", paths[:12]), ("val", paths[12:16]), ("test", paths[16:])):
        (lists / f"{split}.txt").write_text("\n".join(some))
    made, ds = trained(root, splits=str(lists))
    record, notes = of_a_file(made)
    assert not notes
    for split in ("", "train", "val", "test", "all"):
        theirs, said = opened(root, split, record)
        ours, lines = opened(root, split, made)
        assert names(theirs) == names(ours) and said == lines
    assert names(opened(root, made=record)[0]) == paths[16:]
    # other data: the folder that the file names is not opened
    other = coco_folder(tmp_path / "b", 12, seed=1)
    for name in ("train", "val", "test"): (lists / f"{name}.txt").write_text("secret")
    for data in (other, changed_copy(root, tmp_path / "c", invert)):
        found, lines = opened(data, made=record)
        assert len(found) in (12, 20) and ": the data has no splits" in lines and "secret" not in lines
    assert "only saved anew, --splits with the folder of its lists takes" in lines
    shutil.rmtree(lists)
    for either in (made, record):
        with pytest.raises(InputError, match="give their folder with --splits"): open_evaluation(root, made=either)


def test_a_file_trained_with_a_pattern_for_groups_says_what_it_learned_from(tmp_path):
    "The pattern is not run; the marks tell that the images are those of the training."
    root = coco_folder(tmp_path / "a", 20)
    made, ds = trained(root, group_by=r"(\d+)\.png", split_by="group")
    record, notes = of_a_file(made)
    assert "--splits" in notes[0] and "group_by" not in record
    found, lines = opened(root, made=record)
    assert len(found) == 20
    assert "the training learned from 14 of these 20 images (14 of its images were looked up)" in lines
    # data with splits of its own: no pattern was needed
    root = coco_folder(tmp_path / "b", 12, ("train", "val", "test"))
    record, _ = of_a_file(trained(root, group_by=r"(\d+)\.png")[0])
    found, lines = opened(root, made=record)
    assert len(found) == 4 and "which the training kept apart" in lines
    # the pattern of a checkpoint is for the names of its own data
    other = coco_folder(tmp_path / "c", 12, seed=1)
    assert 0 < len(opened(other, "val", dict(made, group_by="(camera_.*)/"))[0]) < 12


def test_grown_data_is_known_by_its_marks(tmp_path):
    root = coco_folder(tmp_path / "a", 20)
    made, ds = trained(root)
    more = coco_folder(tmp_path / "b", 24) # the first 20 are the same
    found, lines = opened(more, made=made)
    assert len(found) < 12 and "not those of the training" in lines
    assert len(made["marks"]) == len(made["files"]) == 14 and json.loads(json.dumps(made)) == made


def test_a_part_of_the_training_is_said(tmp_path):
    root = coco_folder(tmp_path / "a", 20)
    made, ds = trained(root)
    other = coco_folder(tmp_path / "b", 16, seed=3)
    d = json.loads((other / "labels.json").read_text())
    first = json.loads((root / "labels.json").read_text())
    path = ds.split("train").paths[0].rsplit("/", 1)[-1] # one image of the training takes the place of another
    shutil.copy(root / "images" / path, other / "images" / path)
    image, = [im["id"] for im in first["images"] if im["file_name"] == path]
    here = [im["id"] for im in d["images"] if im["file_name"] == path]
    if not here: d["images"].append(dict(id=99, file_name=path, height=48, width=64))
    here = (here or [99])[0]
    d["annotations"] = [a for a in d["annotations"] if a["image_id"] != here]
    d["annotations"] += [dict(a, image_id=here, id=1000 + a["id"]) for a in first["annotations"]
                         if a["image_id"] == image]
    (other / "labels.json").write_text(json.dumps(d))
    found, lines = opened(other, made=made)
    assert len(found) == len(d["images"]) and "the training learned from 1 of these" in lines and "too good" in lines


def test_artifacts_without_marks(tmp_path):
    root = coco_folder(tmp_path / "a", 20)
    made, ds = trained(root)
    del made["marks"]
    found, lines = opened(root, made=made)
    assert names(found) == names(ds.split("test")) and "note" not in lines
    found, lines = opened(coco_folder(tmp_path / "b", 12, seed=1), made=made)
    assert len(found) == 12 and "not the data of the training" in lines


@pytest.mark.parametrize("splits, taken, count", [
    (("train", "val", "test"), "test", 4), (("train", "val"), "val", 6), (("val", "test"), "test", 6),
    (("train", "test"), "test", 6)
])
def test_splits_of_other_data(tmp_path, splits, taken, count):
    made, _ = trained(coco_folder(tmp_path / "a", 20))
    other = coco_folder(tmp_path / "b", 12, splits, seed=1)
    for contract in (made, None):
        ds, lines = opened(other, made=contract)
        assert len(ds) == count and ds.split_names == [taken] and f"{taken}: {count} of 12 images" in lines
        assert "by a split of the data" in lines and "--split takes" in lines
        for s in splits: assert len(opened(other, s, contract)[0]) == 12 // len(splits)
        assert len(opened(other, "all", contract)[0]) == 12
        with pytest.raises(InputError, match="did you mean 'test'|no split 'tset'"): open_evaluation(other, "tset")


def test_lists_that_do_not_fit_other_data(tmp_path):
    root = coco_folder(tmp_path / "a", 20)
    lists = tmp_path / "lists"
    lists.mkdir()
    paths = names(open_data(DataConfig(path=str(root)), say=lambda line: None))
    (lists / "train.txt").write_text("\n".join(paths[:15]))
    (lists / "val.txt").write_text("\n".join(paths[15:]))
    made, _ = trained(root, splits=str(lists))
    assert names(opened(root, made=made)[0]) == paths[15:]
    other = coco_folder(tmp_path / "b", 12, seed=1)
    shutil.move(lists, tmp_path / "gone")
    assert len(opened(other, made=made)[0]) == 12
    with pytest.raises(InputError, match="give their folder with --splits"): open_evaluation(root, made=made)
    assert names(opened(root, made=made, splits=tmp_path / "gone")[0]) == paths[15:]


def only_images(root, to, paths, name="{}.png", change=None):
    "Images of a dataset with one box each as COCO, in a folder of their own under other names."
    (to / "photos").mkdir(parents=True)
    d = dict(images=[], annotations=[], categories=[dict(id=1, name="Sack")])
    for k, path in enumerate(paths, 1):
        new = to / "photos" / name.format((root / path).stem)
        if change is None: shutil.copy(root / path, new)
        else: cv2.imwrite(str(new), change(cv2.imread(str(root / path))))
        height, width = cv2.imread(str(new)).shape[:2]
        d["images"].append(dict(id=k, file_name=new.name, height=height, width=width))
        d["annotations"].append(dict(id=k, image_id=k, category_id=1, bbox=[1, 1, 9, 9], area=81, iscrowd=0))
    (to / "labels.json").write_text(json.dumps(d))
    return to


def known(*args, **kw):
    lines = []
    data = evaluation_data(*args, say=lines.append, **kw)
    return data.to_dict(), "\n".join(lines)


def cut(image): return image[:32, :32]


def dock_folder(root, images):
    "As `coco_folder`, with names that say something."
    coco_folder(root, images)
    labels = (root / "labels.json").read_text()
    (root / "labels.json").write_text(labels.replace('"file_name": "', '"file_name": "dock_'))
    for file in (root / "images").iterdir(): file.rename(file.with_name(f"dock_{file.name}"))
    return root


def test_copies_of_training_images_are_said_wherever_they_lie(tmp_path):
    root = dock_folder(tmp_path / "a", 20)
    made, ds = trained(root)
    train = ds.split("train").paths.tolist()
    test = ds.split("test").paths.tolist()
    for k, name in enumerate(("{}.png", "other {}.png", "x{}y.png")):
        copy = only_images(root, tmp_path / f"copy{k}", [*train[:5], *test], name)
        figures, lines = known(copy, made=made)
        assert "all 7 images: the data has no splits" in lines
        assert f"the training learned from 5 of these 7 images ({len(train)} of its images" in lines
        assert "no measure of new images" in lines and figures["images_learned_from"] == 5
        assert figures["training_images_looked_up"] == len(train)
    figures, lines = known(only_images(root, tmp_path / "new", test), made=made)
    assert figures["images_learned_from"] == 0 and "learned from" not in lines and "note" not in lines
    # part of the data of the training
    figures, lines = known(root, "all", made)
    assert f"the training learned from {len(train)} of these 20 images:" in lines
    assert figures["images_learned_from"] == len(train)


@pytest.mark.parametrize("name, change", [("{}.jpg", np.copy), ("new_{}.png", darken), ("{}__0_32.png", cut)])
def test_names_of_training_images_are_said(tmp_path, name, change):
    root = dock_folder(tmp_path / "a", 20)
    made, ds = trained(root)
    copy = only_images(root, tmp_path / "copy", ds.split("train").paths[:4], name, change)
    figures, lines = known(copy, made=of_a_file(made)[0])
    assert figures["images_learned_from"] == 0 and figures["images_named_as_in_training"] == 4
    assert "note: names of training images occur in 4 of these 4 images (photos/" in lines


def in_a_run(folder, made, ds):
    "The folder of a run with its list, and its checkpoint."
    folder.mkdir()
    rows = [f"{split or '-'}\t0\t{path}\n" for path, split in zip(ds.paths, ds.splits)]
    (folder / "dataset.tsv").write_text('["Sack"]\n' + "".join(rows))
    return folder / "best"


def test_lists_that_were_changed_after_the_training(tmp_path):
    root = coco_folder(tmp_path / "a", 20)
    paths = names(open_data(DataConfig(path=str(root)), say=lambda line: None))
    lists = tmp_path / "lists"
    lists.mkdir()
    def write(some):
        for split, part in (("train", some[:14]), ("val", some[14:17]), ("test", some[17:])):
            (lists / f"{split}.txt").write_text("\n".join(part))
    write(paths)
    made, ds = trained(root, splits=str(lists))
    write(paths[::-1])
    # the run's own list holds
    best = in_a_run(tmp_path / "run", made, ds)
    found, lines = opened(root, made=made, artifact=best)
    assert names(found) == paths[17:] and "test: 3 of 20 images, which the training kept apart" in lines
    assert "learned from" not in lines and "not those" not in lines
    # without it nothing is claimed
    figures, lines = known(root, made=made)
    assert "kept apart" not in lines and f"the lists in {lists} or the images were changed" in lines
    assert "the training learned from 3 of these 3 images" in lines and figures["images_learned_from"] == 3
    # a list of another run is none
    other = in_a_run(tmp_path / "other", made, open_data(DataConfig(path=str(root), seed=5), say=lambda line: None))
    assert "kept apart" not in opened(root, made=made, artifact=other)[1]


@pytest.mark.parametrize("count", [24, 17])
def test_images_that_were_added_or_removed(tmp_path, count):
    made, ds = trained(coco_folder(tmp_path / "a", 20))
    split_of = dict(zip(ds.paths, ds.splits))
    other = coco_folder(tmp_path / "b", count) # the first ones are the same
    best = in_a_run(tmp_path / "run", made, ds)
    found, lines = opened(other, "all", made, artifact=best)
    assert [split_of.get(path, "") for path in found.paths] == found.splits.tolist()
    added = "4 images that the training did not have are in no split of the run" in lines
    assert added == (count == 24)
    found, lines = opened(other, made=made, artifact=best)
    assert {split_of[path] for path in found.paths} == {"test"} and "which the training kept apart" in lines
    # without the run's list, the settings divide anew, and what was learned from is counted
    figures, lines = known(other, made=made)
    taken = names(open_evaluation(other, made=made, say=lambda line: None))
    assert "kept apart" not in lines and "divided anew by the training's settings" in lines
    assert figures["images_learned_from"] == sum(split_of.get(path) == "train" for path in taken)


def test_a_training_is_told_of_images_in_no_split(tmp_path):
    root = coco_folder(tmp_path / "a", 8, ("train", "val", "unsorted"))
    lines = []
    ds = open_data(DataConfig(path=str(root)), say=lines.append)
    assert ds.splits.tolist().count("") == 2
    assert sum("2 images are in no split and are not used" in line for line in lines) == 1
    (tmp_path / "train.txt").write_text("\n".join(ds.paths[:7]))
    lines.clear()
    open_data(DataConfig(path=str(root), splits=str(tmp_path)), say=lines.append)
    assert any("1 image, 1 of them with boxes" in line for line in lines), lines
