"""The same generated scenes in every label format: the same boxes come back, whatever the files are called."""
import shutil
import sys
import types
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest

from format_writers import WRITERS, labels_by_name, reader_of, with_one_class
from jetson_det.core import InputError
from jetson_det.data.dataset import DetDataset
from jetson_det.data.formats.catalog import FORMATS, LabelFormat
from jetson_det.data.formats.registry import read_dataset
from jetson_det.scenes.docks import write_scenes

ODD = ["plain", "with space", "per%cent %20", "hash #1", "Straße 東京", "dots.v1.2", "quote'd & <b>"]  # stems of files


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    "Seven scenes under odd names, one of them without a box."
    folder = tmp_path_factory.mktemp("scenes")
    made = read_dataset(write_scenes(folder / "made", len(ODD), (240, 320), seed=3, splits={"all": 1.}))
    (folder / "odd").mkdir()
    files = [stem + (".JPG" if i == 1 else ".jpg") for i, stem in enumerate(ODD)]
    for i, name in enumerate(files): shutil.copy(made.path_of(i), folder / "odd" / name)
    names = sorted(files)
    keep = made.box_image != 2
    new_image = np.array([names.index(name) for name in files])[made.box_image[keep]]
    order = np.argsort(new_image, kind="stable")
    return DetDataset(folder / "odd", made.classes, names, made.sizes, new_image[order], made.boxes[keep][order],
                      made.labels[keep][order])


@pytest.mark.parametrize("writer", WRITERS)
def test_every_format_gives_the_same_boxes(scenes, tmp_path, writer):
    want = with_one_class(scenes) if writer == "plates" else scenes
    WRITERS[writer](want, tmp_path / "there")
    found = read_dataset(tmp_path / "there")
    assert found.format == reader_of(writer)  # found by itself
    named = read_dataset(tmp_path / "there", reader_of(writer), classes=list(want.classes))
    assert named.classes == want.classes
    want = labels_by_name(want)
    have = labels_by_name(named)
    for name, boxes in want.items():
        if len(boxes) or name in have: np.testing.assert_allclose(have[name], boxes, atol=2e-3, err_msg=name)
    assert set(have) >= {n for n, b in want.items() if len(b)} and set(have) <= set(want)


@pytest.mark.parametrize("writer", [w for w in WRITERS if w not in ("csv", "openimages", "plates")])
def test_class_order_is_kept_or_sorted(scenes, tmp_path, writer):
    WRITERS[writer](scenes, tmp_path / "there")
    assert read_dataset(tmp_path / "there").classes in (scenes.classes, tuple(sorted(scenes.classes)))


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_without_its_images_is_one_line(scenes, tmp_path, writer):
    WRITERS[writer](with_one_class(scenes) if writer == "plates" else scenes, tmp_path / "there")
    for p in (tmp_path / "there").rglob("*"):
        if p.suffix.lower() == ".jpg": p.unlink()
    try: ds = read_dataset(tmp_path / "there", reader_of(writer))
    except InputError as e: assert "\n" not in str(e) and str(tmp_path) in str(e)
    else: assert [f.kind for f in ds.flaws if f.severity == "error"] == ["no-images"]  # labels that declare the sizes


def test_every_format_is_here():
    assert {reader_of(w) for w in WRITERS} == set(FORMATS)


def test_a_format_is_one_line_of_the_table(scenes, tmp_path, monkeypatch):
    toy = types.ModuleType("jetson_det.data.formats.toy")
    def detect_toy(files): return "a.toy" if files.ending(".toy") else ""
    def read_toy(path, files, classes): return replace(scenes, format="toy")
    toy.detect_toy = detect_toy
    toy.read_toy = read_toy
    monkeypatch.setitem(sys.modules, toy.__name__, toy)
    monkeypatch.setitem(FORMATS, "toy", LabelFormat("a toy", "toy", "detect_toy", "read_toy", suffixes=(".toy",)))
    (tmp_path / "a.toy").write_text("")
    shutil.copy(scenes.path_of(0), tmp_path / "a.jpg")
    assert read_dataset(tmp_path).format == "toy"
    assert read_dataset(tmp_path / "a.toy").format == "toy"
    with pytest.raises(InputError, match="unknown label format 'toys': did you mean 'toy'"):
        read_dataset(tmp_path, "toys")


@pytest.mark.parametrize("name", FORMATS)
def test_the_table_names_what_is_there(name):
    f = FORMATS[name]
    module = import_module(f"jetson_det.data.formats.{f.module}")
    for role in (f.detect, f.read, f.write):
        if role: assert callable(getattr(module, role))
