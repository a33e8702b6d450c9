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
from jetson_det.data.open import open_data, open_evaluation, split_settings


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
    lines = []
    return open_evaluation(*args, say=lines.append, **kw), "\n".join(lines)


def names(ds): return sorted(ds.paths)


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


def test_grown_data_is_known_by_its_marks(tmp_path):
    root = coco_folder(tmp_path / "a", 20)
    made, ds = trained(root)
    more = coco_folder(tmp_path / "b", 24) # the first 20 are the same
    found, lines = opened(more, made=made)
    assert len(found) < 12 and "not those of the training" in lines
    assert len(made["marks"]) == 14 and json.loads(json.dumps(made)) == made


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
    assert len(found) == len(d["images"]) and "1 are among these" in lines and "too good" in lines


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
