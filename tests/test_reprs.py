"What a notebook shows of a dataset, settings, a check, an evaluation and a run: short, harmless, no torch, no error."
import subprocess
import sys

import cv2
import numpy as np
import pytest
from html_pages import STRANGE, check

from jetson_det.config import Config, load_config, save_config
from jetson_det.core import InputError
from jetson_det.data.dataset import DetDataset, Flaw
from jetson_det.data.quality.check import CheckReport
from jetson_det.evaluate.coco import coco_stats
from jetson_det.runtime.files import write_json_atomic
from jetson_det.runtime.geometry import Detections
from jetson_det.train.runs import read_run, read_runs


def dataset(folder, n=4, classes=("Sack", "Person"), write=True, **columns):
    "A dataset of `n` gray images with a box each."
    paths = [f"{k}.jpg" for k in range(n)]
    if write:
        for path in paths: cv2.imwrite(str(folder/path), np.full((48, 64, 3), 90, np.uint8))
    values = dict(root=folder, classes=classes, paths=paths, sizes=[(48, 64)] * n, box_image=range(n),
                  boxes=[(4, 4, 30, 40)] * n, labels=np.arange(n) % len(classes))
    return DetDataset(**{**values, **columns})


def test_a_dataset_shows_images_and_figures(tmp_path):
    ds = dataset(tmp_path, 40, splits=["train"] * 30 + ["val"] * 10)
    text = check(ds._repr_html_())
    assert ds._repr_html_().count("<img") == 6
    assert "40 images, 40 boxes, 2 classes" in text and "train30300" in text and "val10100" in text
    assert "Sack20" in text and "Person20" in text


def test_missing_images_have_their_place(tmp_path):
    ds = dataset(tmp_path)
    (tmp_path/"0.jpg").unlink()
    (tmp_path/"1.jpg").write_bytes(b"no image")
    page = ds._repr_html_()
    assert page.count("<img") == 2 and "missing" in check(page) and "no image" in page and "1.jpg" in page


def test_no_more_images_are_opened_than_are_shown(tmp_path, monkeypatch):
    import jetson_det.data.dataset as module
    ds = dataset(tmp_path, 1000, write=False)
    opened = []
    monkeypatch.setattr(module, "read_thumbnail", lambda path, *args: (opened.append(path), (None, "missing"))[1])
    check(ds._repr_html_())
    assert len(opened) == 6


@pytest.mark.parametrize("columns", [
    dict(n=0), dict(box_image=(), boxes=(), labels=()), dict(n=1), dict(sizes=[(0, 0)] * 4),
    dict(sizes=[(1, 9999)] * 4), dict(boxes=[(-1e300, 4, 1e300, 40)] * 4), dict(boxes=[(4, 4, 4, 4)] * 4),
    dict(splits=["a", "b", "", "test"]),
])
def test_every_dataset_has_a_page(tmp_path, columns):
    ds = dataset(tmp_path, **{"n": 4, **columns})
    assert "image" in check(ds._repr_html_())
    assert "image" in repr(ds)


@pytest.mark.parametrize("name", STRANGE[:-1])
def test_names_of_strangers(tmp_path, name):
    ds = dataset(tmp_path, write=False, classes=(name, "Person"), splits=[name[:20]] * 4, format="yolo")
    ds.paths[0] = name
    flaws = [Flaw("warning", name, name, name, f"{name} is odd", "dropped")]
    cfg = Config()
    cfg.data.path = name.encode("utf-8", "replace").decode()
    found = [Detections(*ds.boxes_of(i)[:1], np.float32([.9]), ds.boxes_of(i)[1].astype(np.int64)) for i in range(4)]
    result = coco_stats(dataset(tmp_path, write=False), found)
    result.per_class[0]["name"] = name
    result.unused.append(name)
    for thing in (ds, CheckReport(name, ds, flaws), cfg, result): check(thing._repr_html_())
    repr(CheckReport(name, ds, flaws)).encode("utf-8")


def test_large_things_make_short_pages(tmp_path):
    n = 100_000
    classes = tuple(f"class {k}" for k in range(10_000))
    ds = dataset(tmp_path, n, classes, write=False, splits=[f"part {k % 500}" for k in range(n)])
    text = check(ds._repr_html_())
    assert len(text) < 2000 and "and 9992 more classes" in text and "and 488 more splits" in text
    assert len(repr(ds)) < 2000
    flaws = [Flaw("note", f"kind {k % 300}", "", "", "x" * 5000, "noted") for k in range(3000)]
    text = check(CheckReport("photos", ds, flaws)._repr_html_())
    assert "and 240 more kinds" in text and "and 5 more" in text and len(text) < 200_000
    part = ds.subset(range(200))
    found = [Detections(part.boxes_of(i)[0], np.float32([.9]), part.boxes_of(i)[1]) for i in range(200)]
    few = DetDataset(tmp_path, classes[:200], part.paths, part.sizes, part.box_image, part.boxes, part.labels)
    text = check(coco_stats(few, found)._repr_html_())
    assert "and 170 more classes" in text and len(text) < 4000


def test_an_evaluation_has_twelve_numbers_and_its_classes(tmp_path):
    ds = dataset(tmp_path, write=False, labels=[0] * 4)
    found = [Detections(np.float32(ds.boxes_of(i)[0]), np.float32([.9]), np.int64([0])) for i in range(4)]
    result = coco_stats(ds, found)
    text = check(result._repr_html_())
    for name in result.stats: assert name.replace("_", " ") in text
    assert "Sack1.000" in text and "Person--" in text


def test_a_check_shows_kinds_with_counts_and_advice(tmp_path):
    ds = dataset(tmp_path, write=False)
    place = str(tmp_path/"3.jpg")
    flaws = [Flaw("error", "too-many-flaws", "", "", f"{place}: too many", "stops")]
    flaws += [Flaw("warning", "zero-area", "3.jpg", f"box {k}", f"box {k} is flat", "dropped") for k in range(9)]
    report = CheckReport(str(tmp_path), ds, flaws)
    text = check(report._repr_html_())
    assert "1 error, 9 warnings, 0 notes" in text and "draw the box again or remove it" in text
    assert "box 4 is flat" in text and "box 5 is flat" not in text and "and 4 more" in text
    assert str(tmp_path) not in text
    assert "no flaws" in check(CheckReport("photos", ds, [])._repr_html_())
    assert "1 error" in check(CheckReport("photos", None, flaws[:1])._repr_html_())


def test_settings_are_complete_and_those_set_are_marked():
    page = load_config(None, ["train.epochs=3"])._repr_html_()
    assert "train.epochs3100" in check(page)
    assert page.count("<b>") == 1 and "<b>train.epochs = 3</b>" in page
    lines = check(page).split("\n")
    for section, keys in Config().model_dump().items():
        for key in keys: assert sum(f"{section}.{key} = " in line for line in lines) == 1


def write_run(folder, settings=True, rows=3, figures=None, page=False):
    "The text files of a run."
    folder.mkdir(parents=True)
    if settings: save_config(load_config(None, ["train.epochs=3", "data.path=dock"]), folder/"config.yaml")
    lines = [f"{k + 1},{6 / (k + 1)},{'' if k == 0 else k / 10}\n" for k in range(rows)]
    (folder/"metrics.csv").write_text("epoch,loss,AP\n" + "".join(lines))
    if figures: write_json_atomic(folder/"metrics.json", figures)
    if page: (folder/"report.html").write_text("")
    return folder


def test_a_run_at_each_stage(tmp_path):
    text = check(read_run(write_run(tmp_path/"new", rows=0))._repr_html_())
    assert "0 of 3 epochs, not finished" in text and "no AP yet" in text
    figures = {"seconds": 75.2, "best": {"AP": .2}, "val": {"stats": {"AP": .21}}, "test": {"stats": {"AP": None}}}
    run = read_run(write_run(tmp_path/"done", figures=figures, page=True))
    page = run._repr_html_()
    text = check(page)
    assert "3 of 3 epochs in 1:15" in text and "best AP 0.200 in epoch 3" in text and "AP 0.210" in text
    assert "report.html" in text and page.count("<svg") == 2 and run.best == (.2, 3)
    assert repr(run) == "done: yolox-nano, 3 of 3 epochs, best AP 0.200 in epoch 3"


@pytest.mark.parametrize("table", ["", "epoch,loss\n", "epoch,loss,AP\n1,x,nan\n", "epoch,loss,AP\n1,2.5,.1\n2,3",
                                   "nothing\n1\n", "AP\n.5\n"])
def test_a_torn_table_of_epochs_is_no_error(tmp_path, table):
    run = write_run(tmp_path/"run")
    (run/"metrics.csv").write_text(table)
    check(read_run(run)._repr_html_())
    repr(read_run(run))


def test_runs_in_a_folder(tmp_path):
    for k in range(25): write_run(tmp_path/f"run {k} <b>", rows=k % 4)
    write_run(tmp_path/"no run", settings=False)
    (tmp_path/"broken").mkdir()
    (tmp_path/"broken"/"config.yaml").write_text("train: [")
    (tmp_path/"torn").mkdir()
    save_config(Config(), tmp_path/"torn"/"config.yaml")
    (tmp_path/"torn"/"metrics.json").write_text('{"val": ')
    runs = read_runs(tmp_path)
    text = check(runs._repr_html_())
    assert len(runs) == 25 and "and 5 more runs" in text and "broken: " in text and "torn: " in text
    assert "no runs" in check(read_runs(tmp_path/"no run")._repr_html_())
    with pytest.raises(InputError, match="no such folder"): read_runs(tmp_path/"absent")
    with pytest.raises(InputError, match="not the folder of a run"): read_run(tmp_path/"no run")


def test_neither_torch_nor_matplotlib_is_needed(tmp_path):
    dataset(tmp_path)
    write_run(tmp_path/"run")
    code = f"""
import sys
for name in ("torch", "matplotlib", "IPython"): sys.modules[name] = None
import numpy as np
from jetson_det.config import Config
from jetson_det.data.dataset import DetDataset
from jetson_det.data.quality.check import CheckReport
from jetson_det.evaluate.coco import coco_stats
from jetson_det.runtime.geometry import Detections
from jetson_det.train.runs import read_run, read_runs
ds = DetDataset({str(tmp_path)!r}, ("Sack",), ["0.jpg", "1.jpg"], [(48, 64)] * 2, [0, 1], [(4, 4, 30, 40)] * 2, [0, 0])
found = [Detections(np.float32([[4, 4, 30, 40]]), np.float32([.9]), np.int64([0]))] * 2
things = [ds, CheckReport("photos", ds, []), Config(), coco_stats(ds, found), read_run({str(tmp_path/"run")!r}),
          read_runs({str(tmp_path)!r}), found[0]]
print([thing._repr_html_()[:4] for thing in things], ds._repr_html_().count("<img"), len(ds[0]._repr_jpeg_()) > 100)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.split() == ["['<div',", *["'<div',"] * 5, "'<div']", "2", "True"], out.stderr


def test_an_image_that_cannot_be_drawn_is_shown_as_text(tmp_path):
    ds = dataset(tmp_path)
    assert ds[0]._repr_jpeg_()[:2] == b"\xff\xd8"
    assert ds[0]._replace(classes=())._repr_jpeg_() is None
    far = ds[0]._replace(boxes=np.array([[-1e300, 0, 1e300, 5]]))
    assert far._repr_jpeg_()[:2] == b"\xff\xd8"
