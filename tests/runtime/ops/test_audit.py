"""The monthly audit, with a real ONNX file through ONNX Runtime: its figures are those of `evaluate`, it alarms where
something was lost and not where nothing was, and what is written is whole. Python 3.6 too."""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from audit_sets import write_set

from jetson_det.runtime.files import InputError
from jetson_det.runtime.geometry import Detections, as_detections
from jetson_det.runtime.ops import audit as module
from jetson_det.runtime.ops.audit import (append_history, audit, read_audit_set, read_baseline, read_history, run_audit,
                                          write_baseline)
from jetson_det.runtime.sessions import open_session

COLORS = Path(__file__).parents[2] / "fixtures" / "colors.onnx"


@pytest.fixture(scope="module")
def session():
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    return open_session(str(COLORS), threads=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory): return write_set(tmp_path_factory.mktemp("audit"))


def prints_of(baseline):
    columns = zip(baseline.fingerprints, baseline.image_prints, baseline.label_prints)
    return [module._Print(*row) for row in columns]


class Worse:
    "The same session, which loses some of its detections and doubts the others."
    def __init__(self, session, share=.3, less=0.):
        self.session = session
        self.contract = session.contract
        self.path = None
        self.confidence = session.confidence
        self.random = np.random.RandomState(0)
        self.share = share
        self.less = less

    def __call__(self, frame):
        before = self.session.confidence
        self.session.confidence = self.confidence
        try: found = self.session(frame)
        finally: self.session.confidence = before
        kept = self.random.uniform(size=len(found.scores)) >= self.share
        return as_detections(found.boxes[kept], np.maximum(found.scores[kept] - self.less, .02), found.labels[kept])


def test_its_figures_are_those_of_evaluate(session, data):
    dataset = pytest.importorskip("jetson_det.data.formats.registry", reason="the data part needs a newer Python")
    pytest.importorskip("hotcoco", reason="no matcher is installed")
    from jetson_det.evaluate.coco import evaluate
    result = evaluate(session, dataset.read_dataset(data), progress=False)
    found = audit(session, read_audit_set(data), draws=20)
    assert 0.2 < found.result.AP < 1
    for name in ("AP", "AP50", "AP75"):
        assert abs(getattr(found.result, name) - result.stats[name]) < 1e-9
    for ours, theirs in zip(found.result.per_class, result.per_class): assert abs(ours[0] - theirs["AP"]) < 1e-9
    assert (found.images, found.boxes, found.classes) == (result.images, result.boxes, result.classes)


def test_it_leaves_the_session_as_it_was(session, data):
    before = (session.confidence, session.iou, session.max_detections, session.max_per_class)
    audit(session, read_audit_set(data), draws=5)
    assert (session.confidence, session.iou, session.max_detections, session.max_per_class) == before
    broken = read_audit_set(data)
    image = broken.images[0]._replace(path=str(data))
    with pytest.raises(InputError, match="audit.json: OpenCV cannot decode it"):
        audit(session, broken._replace(images=(image,)), draws=5)
    assert (session.confidence, session.iou, session.max_detections, session.max_per_class) == before


def test_nothing_lost_is_no_alarm_and_a_loss_is_one(session, data, tmp_path):
    shipped = audit(session, read_audit_set(data), draws=100)
    assert shipped.sha256 and not shipped.alarm and shipped.comparison is None
    write_baseline(shipped.baseline, tmp_path / "baseline.json")
    baseline = read_baseline(tmp_path / "baseline.json")
    same = audit(session, read_audit_set(data), baseline, tolerance=0, draws=100)
    assert same.comparison.loss == 0 and same.comparison.interval == (0, 0) and same.comparison.apart == 0
    assert not same.alarm and same.verdict().startswith("ok: ")
    worse = audit(Worse(session), read_audit_set(data), baseline, draws=100)
    assert worse.alarm and worse.comparison.is_paired and worse.comparison.is_worse(.01)
    assert worse.comparison.interval[0] < worse.comparison.loss < worse.comparison.interval[1]
    assert worse.drift.per_image < shipped.drift.per_image
    assert "ALARM" in worse.lines()[-1]
    doubting = audit(Worse(session, 0, .1), read_audit_set(data), baseline, draws=100)
    assert doubting.comparison.apart > .2 # the scores drifted, and nothing was lost
    assert not doubting.alarm and doubting.drift.quantiles[1] < shipped.drift.quantiles[1]


def test_other_images_widen_the_interval(session, data, tmp_path):
    shipped = audit(session, read_audit_set(data), draws=100)
    fresh = audit(session, read_audit_set(write_set(tmp_path, seed=5)), shipped.baseline, draws=100)
    assert not fresh.alarm and not fresh.comparison.is_paired
    paired = audit(Worse(session, .02), read_audit_set(data), shipped.baseline, draws=100).comparison.interval
    assert fresh.comparison.interval[1] - fresh.comparison.interval[0] > 1.5 * (paired[1] - paired[0]) > 0
    lost = audit(Worse(session, .9), read_audit_set(write_set(tmp_path, seed=5)), shipped.baseline, draws=100)
    assert lost.alarm and "on other images" in lost.verdict()


def test_a_changed_label_or_image_is_another_set(session, data, tmp_path):
    shipped = audit(session, read_audit_set(data), draws=5).baseline
    copy = tmp_path / "copy"
    shutil.copytree(str(data.parent), str(copy))
    assert audit(session, read_audit_set(copy / "audit.json"), shipped, draws=5).comparison.is_paired # it moved, only
    rows = json.loads((copy / "audit.json").read_text())
    rows["annotations"][0]["bbox"][0] += 1
    (copy / "audit.json").write_text(json.dumps(rows))
    changed = audit(session, read_audit_set(copy / "audit.json"), shipped, draws=5).comparison
    assert (changed.is_paired, changed.images, changed.is_as_before) == (False, "relabeled", True)
    image = read_audit_set(data).images[0].path
    (copy / Path(image).name).write_bytes(Path(image).read_bytes() + b"x") # a byte behind the end
    other = audit(session, read_audit_set(copy / "audit.json"), shipped, draws=5).comparison
    assert (other.images, other.is_as_before) == ("other", False)


def relabeled(data, folder, change):
    "A copy of the set with changed labels."
    shutil.copytree(str(data.parent), str(folder))
    rows = json.loads((folder / "audit.json").read_text())
    change(rows)
    (folder / "audit.json").write_text(json.dumps(rows))
    return read_audit_set(folder / "audit.json")


def move(rows):
    for row in rows["annotations"]: row["bbox"][0] += 9


def test_other_labels_on_the_same_images_point_to_the_labels(session, data, tmp_path):
    shipped = audit(session, read_audit_set(data), draws=100)
    write_baseline(shipped.baseline, tmp_path / "baseline.json")
    baseline = read_baseline(tmp_path / "baseline.json")
    moved = relabeled(data, tmp_path / "moved", move)
    found = audit(session, moved, baseline, draws=100)
    assert found.alarm and found.comparison.apart == 0
    assert found.verdict().endswith("same images with other labels): the detections are as before: look at the labels")
    tolerated = audit(session, moved, baseline, tolerance=.9, draws=100).verdict()
    assert tolerated.startswith("ok: ") and tolerated.endswith("look at the labels")
    worse = audit(Worse(session), moved, baseline, draws=100).verdict()
    assert worse.endswith("look at the labels, at the model's file and at the engine")
    names = relabeled(data, tmp_path / "names", lambda rows: rows["categories"][0].update(name="cat"))
    assert audit(session, names, baseline, draws=5).comparison.images == "relabeled"
    same = audit(Worse(session), read_audit_set(data), baseline, draws=100).verdict()
    assert same.endswith("look at the model's file and at the engine") and "camera" not in same
    json.dumps(found.to_dict(), allow_nan=False)


def test_boxes_that_moved_are_not_as_before_though_the_scores_are_the_same(session, data, tmp_path):
    class Shifted(Worse):
        def __call__(self, frame):
            found = super().__call__(frame)
            return as_detections(found.boxes + 5, found.scores, found.labels)
    shipped = audit(Worse(session, 0), read_audit_set(data), draws=20).baseline
    found = audit(Shifted(session, 0), relabeled(data, tmp_path / "moved", move), shipped, draws=20)
    assert found.comparison.apart == 0 and not found.comparison.is_as_before


def test_labels_in_another_order_are_the_same_labels(session, data, tmp_path):
    shipped = audit(session, read_audit_set(data), draws=20)
    order = relabeled(data, tmp_path / "order", lambda rows: rows["annotations"].reverse())
    found = audit(session, order, shipped.baseline, draws=20)
    assert found.comparison.images == "reordered" and abs(found.comparison.loss) < 1e-9


def test_an_older_baseline_is_read_and_cannot_tell(session, data, tmp_path):
    path = tmp_path / "baseline.json"
    write_baseline(audit(session, read_audit_set(data), draws=50).baseline, path)
    row = json.loads(path.read_text())
    for name in ("image_prints", "label_prints"): row.pop(name)
    path.write_text(json.dumps(row))
    older = read_baseline(path)
    assert audit(session, read_audit_set(data), older, draws=50).comparison.is_paired
    found = audit(session, relabeled(data, tmp_path / "moved", move), older, draws=50)
    assert found.alarm and "on other images or labels" in found.verdict()


def test_classes_are_matched_by_name(session, data, tmp_path):
    other = write_set(tmp_path / "a", names=("Violet", " green", "RED"))
    found = audit(session, read_audit_set(other), draws=5)
    assert found.unknown == ("Violet",) and found.result.per_class[0][0] == 0
    same = audit(session, read_audit_set(data), draws=5).result.per_class
    assert found.result.per_class[1:] == same[1:]
    assert "not known by the model, AP 0: Violet" in "\n".join(found.lines())
    foreign = read_audit_set(write_set(tmp_path / "b", names=("cat", "dog", "cow")))
    with pytest.raises(InputError, match="no class in common: the model knows Blue, Green, Red; the audit set has cat"):
        audit(session, foreign, draws=5)


def test_a_detector_that_finds_nothing(session, data):
    shipped = audit(session, read_audit_set(data), draws=50).baseline
    found = audit(Worse(session, 2), read_audit_set(data), shipped, draws=50)
    assert found.result.AP == 0 and found.alarm and found.comparison.apart is None
    assert "nothing is detected" in "\n".join(found.lines())
    json.dumps(found.to_dict(), allow_nan=False)


def test_an_alarm_is_rarely_false(session, tmp_path):
    "Two halves of one thing: the alarm for other images goes off in a small share of the cases."
    sets = [read_audit_set(write_set(tmp_path / str(seed), 8, seed)) for seed in range(12)]
    reports = [audit(session, one, draws=60) for one in sets]
    alarms = [module._compare(a.baseline, b.result, b.baseline.draws, None, b.baseline.found,
                              prints_of(b.baseline), two, .5, 0.).alarm
              for a in reports for b, two in zip(reports, sets) if a is not b]
    assert len(alarms) == 132 and sum(alarms) < 14


def test_files(session, data, tmp_path, capsys):
    out = tmp_path / "audits"
    first = run_audit(session, data, save_baseline=tmp_path / "baseline.json", out=out, draws=20)
    second = run_audit(Worse(session), data, baseline=tmp_path / "baseline.json", out=out, draws=20)
    report = json.loads((out / "audit.json").read_text())
    assert report["alarm"] and report["AP"] == second.result.AP and report["comparison"]["ap"] == first.result.AP
    assert [row["alarm"] for row in read_history(out / "history.jsonl")] == [False, True]
    assert sorted(os.listdir(str(out))) == ["audit.json", "history.jsonl"]
    seen = []
    run_audit(session, data, save_baseline=tmp_path / "baseline.json", draws=5, report=lambda *n: seen.append(n))
    assert seen[-1] == (12, 12) # and our own baseline may be replaced
    (tmp_path / "photo.json").write_text('{"mine": 1}')
    with pytest.raises(InputError): run_audit(session, data, save_baseline=tmp_path / "photo.json", draws=5)
    with pytest.raises(InputError): run_audit(session, data, save_baseline=data, draws=5)
    with pytest.raises(InputError, match="tolerance 5"): run_audit(session, data, tolerance=5, draws=5)


def test_a_history_that_was_cut_off_goes_on(session, data, tmp_path):
    report = audit(session, read_audit_set(data), draws=5)
    path = tmp_path / "history.jsonl"
    append_history(path, report)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:50])
    append_history(path, report)
    assert len(read_history(path)) == 2 and path.read_bytes().startswith(whole)


@pytest.mark.parametrize("change,words", [
    (lambda row: row.pop("draws"), "damaged baseline \\(KeyError: 'draws'\\)"),
    (lambda row: row["found"].pop(), "damaged baseline"),
    (lambda row: row.update(found=[[[1, 2]]]), "damaged baseline"),
    (lambda row: row.update(ap="x"), "damaged baseline"), (lambda row: row.update(drift=[]), "damaged baseline"),
    (lambda row: row["image_prints"].pop(), "damaged baseline"), (lambda row: row.update(label_prints=7), "damaged"),
    (lambda row: row.update(format=2), "a baseline of format 2"), (lambda row: row.pop("written_by"), "is no baseline"),
])
def test_damaged_baselines(session, data, tmp_path, change, words):
    path = tmp_path / "baseline.json"
    write_baseline(audit(session, read_audit_set(data), draws=2).baseline, path)
    row = json.loads(path.read_text())
    change(row)
    path.write_text(json.dumps(row))
    with pytest.raises(InputError, match=words): read_baseline(path)


@pytest.mark.parametrize("change,words", [
    (lambda rows: rows["images"][0].update(file_name="gone.png"), "gone.png: no such image"),
    (lambda rows: rows["images"].pop(0), "has image 0, which the images lack"),
    (lambda rows: rows["annotations"][0].update(id=5, image_id=777),
     "annotation 5 has image 777, which the images lack"),
    (lambda rows: rows["annotations"][0].update(image_id=[1]), "which the images lack"),
    (lambda rows: rows["annotations"][0].pop("image_id"), "has no image_id"),
    (lambda rows: rows["annotations"][0].update(id=5, bbox=[1, 2, 3]),
     "annotation 5: bbox is .1, 2, 3.; it must be four"),
    (lambda rows: rows["annotations"][0].update(bbox=[1, 2, "a", 3]), "it must be four numbers"),
    (lambda rows: rows["annotations"][0].update(bbox=[1, 2, 10**400, 3]), "it must be four numbers"),
    (lambda rows: rows["annotations"][0].update(bbox=[1, 2, float("nan"), 3]), "it must be four numbers"),
    (lambda rows: rows["annotations"][0].update(bbox="1234"), "it must be four numbers"),
    (lambda rows: rows["annotations"][0].pop("bbox"), "bbox is null; it must be four numbers"),
    (lambda rows: rows["annotations"][0].update(id=5, category_id=99),
     "annotation 5 has category 99, which the categories lack"),
    (lambda rows: rows["annotations"][0].update(category_id="cat"), 'has category "cat", which the categories lack'),
    (lambda rows: rows["annotations"].insert(0, 7), "no COCO file of boxes"),
    (lambda rows: rows.update(annotations=[]), "has no box that counts"),
    (lambda rows: rows.pop("categories"), "no COCO file of boxes"),
    (lambda rows: rows.update(images=5), "no COCO file of boxes"),
])
def test_damaged_sets(data, tmp_path, change, words):
    shutil.copytree(str(data.parent), str(tmp_path / "set"))
    path = tmp_path / "set" / "audit.json"
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))
    with pytest.raises(InputError, match=words): read_audit_set(path)


def test_a_negative_area_is_ignored_too(data, tmp_path):
    "As in the dictionaries that pycocotools gets."
    shutil.copytree(str(data.parent), str(tmp_path / "set"))
    path = tmp_path / "set" / "audit.json"
    before = read_audit_set(path).boxes
    rows = json.loads(path.read_text())
    row = next(row for row in rows["annotations"] if not row["iscrowd"] and not row["ignore"])
    row["area"] = -1
    path.write_text(json.dumps(rows))
    assert read_audit_set(path).boxes == before - 1


def test_images_elsewhere(data, tmp_path):
    shutil.copy(str(data), str(tmp_path / "audit.json"))
    with pytest.raises(InputError, match="no such image"): read_audit_set(tmp_path / "audit.json")
    assert len(read_audit_set(tmp_path / "audit.json", data.parent).images) == 12
    shutil.copytree(str(data.parent), str(tmp_path / "images"))
    assert len(read_audit_set(tmp_path / "audit.json").images) == 12
    split = tmp_path / "converted" # as `jetson-det data convert` writes it
    shutil.copytree(str(data.parent), str(split / "images" / "val"))
    (split / "annotations").mkdir()
    shutil.copy(str(data), str(split / "annotations" / "instances_val.json"))
    assert len(read_audit_set(split / "annotations" / "instances_val.json").images) == 12


def test_more_than_a_hundred_of_a_class_are_cut():
    scores = np.linspace(.9, .1, 250)
    found = as_detections(np.tile(np.float32([0, 0, 1, 1]), (250, 1)), scores, np.arange(250) % 2)
    kept = module._best_of_each_class(found)
    assert isinstance(kept, Detections) and np.bincount(kept.labels).tolist() == [100, 100]
    assert (np.diff(kept.scores) <= 0).all() and kept.scores[0] == found.scores[0]
