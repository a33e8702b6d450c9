"What label_errors finds: planted errors, and nothing where labels and detections agree; folds that outlive a kill."
import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_detector import random_problem, simulated_detector, simulated_images

from jetson_det.core import InputError, rng_for
from jetson_det.data.dataset import CROWD, DIFFICULT, IGNORE, DetDataset
from jetson_det.data.quality.view import write_view
from jetson_det.evaluate.label_errors import (KINDS, _agreement, _doubled, _evidence, _logit, _pair_up, _shifted,
                                              _spurious, _wrong_class, fold_of, fold_part, label_errors, out_of_fold,
                                              plant_errors, review_list, suspect_sheet, write_review)
from jetson_det.runtime.files import read_json
from jetson_det.runtime.geometry import Detections, as_detections, box_iou


def exact(ds, score=.9):
    "A detector that finds every label that counts, exactly."
    found = []
    for i in range(len(ds)):
        boxes, labels, flags = ds.boxes_of(i)
        keep = flags == 0
        found.append(as_detections(boxes[keep], np.full(keep.sum(), score), labels[keep]))
    return found


def apart(n=30, seed=0):
    "Images with three boxes each that do not overlap."
    rng = rng_for(55, seed)
    image = np.repeat(np.arange(n), 3)
    corner = np.tile([[20, 20], [200, 30], [60, 200]], (n, 1)) + rng.uniform(0, 10, (3 * n, 2))
    boxes = np.hstack([corner, corner + rng.uniform(40, 90, (3 * n, 2))])
    return DetDataset(".", ("sack", "person"), [f"{i:03}.jpg" for i in range(n)], [[320, 320]] * n, image, boxes,
                      rng.integers(0, 2, 3 * n))


def is_named(s, flawed, errors):
    "Whether a suspect is a planted error of its kind."
    row = int(flawed._starts[s.image]) + s.box
    for error in errors:
        if error.kind != s.kind: continue
        if error.kind != "missing" and s.box >= 0 and row in (error.row, error.twin): return True
        if error.kind == "missing" and s.box < 0 and error.image == s.image:
            if box_iou(np.array([s.suggested_box]), np.array([error.box]))[0, 0] > .5: return True
    return False


def test_a_perfect_set_gives_an_empty_list():
    ds = apart()
    result = label_errors(ds, exact(ds), np.zeros(len(ds), bool))
    assert result.suspects == [] and result.notes == []
    assert set(result.counts().values()) == {0}


@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_detector_finds_each_kind_first(kind):
    ds = apart(60)
    flawed, errors = plant_errors(ds, .05, 3, [kind])
    suspects = label_errors(flawed, exact(ds)).suspects
    assert len(errors) == 9
    first = suspects[:len(errors)]
    right = [is_named(s, flawed, errors) for s in first]
    assert sum(right) >= 8, [(s.kind, s.reason) for s in first] # a box of nothing may fall on an object


def test_the_likeliest_come_first_with_a_detector_that_errs():
    ds, hard = simulated_images(250)
    found = simulated_detector(ds, hard)
    rates = []
    for seed in range(3):
        flawed, errors = plant_errors(ds, .05, seed)
        suspects = label_errors(flawed, found).suspects
        right = np.array([is_named(s, flawed, errors) for s in suspects])
        rates.append((right[:50].mean(), right.mean(), np.mean([s.score for s in suspects[:50]])))
    first, all_of_them, said = np.mean(rates, 0)
    # seeds 0 to 2 give .85 and .22
    assert first > .7 and first > 2.5 * all_of_them
    assert said < first + .15 # no surer than right


def test_what_is_suggested_is_what_was_right():
    ds = apart(60)
    flawed, errors = plant_errors(ds, .05, 1, ["missing", "wrong class", "shifted"])
    by_row = {error.row: error for error in errors if error.row >= 0}
    for s in label_errors(flawed, exact(ds)).suspects[:20]:
        if s.kind == "missing":
            assert s.label_box is None and s.label is None and s.box == -1
            continue
        error = by_row[int(flawed._starts[s.image]) + s.box]
        if s.kind == "wrong class":
            assert s.suggested == ds.classes[error.label] != s.label and s.suggested_box == s.label_box
        if s.kind == "shifted": assert s.suggested_box == pytest.approx(error.box, abs=.01)


def test_the_order_of_images_does_not_matter():
    ds, hard = simulated_images(80)
    found = simulated_detector(ds, hard)
    order = rng_for(9).permutation(len(ds))
    a = label_errors(ds, found).suspects
    b = label_errors(ds.subset(order), [found[i] for i in order]).suspects
    key = lambda s: (s.path, s.kind, s.box, s.suggested_box or ())
    assert sorted(map(key, a)) == sorted(map(key, b))
    scores = {key(s): s.score for s in a}
    np.testing.assert_allclose([scores[key(s)] for s in b], [s.score for s in b], atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_random_problems(seed):
    "Crowds, ignored boxes, ties, empty images: every row is whole, every label named once, those aside never."
    ds, found = random_problem(seed)
    result = label_errors(ds, found)
    seen = set()
    for s in result.suspects:
        assert 0 <= s.score <= 1 and s.kind in KINDS and s.path == ds.paths[s.image]
        assert s.reason and "\n" not in s.reason and "nan" not in s.reason
        if s.kind == "missing":
            assert s.box == -1 and s.suggested in ds.classes
            continue
        row = int(ds._starts[s.image]) + s.box
        assert row not in seen and ds.flags[row] & (CROWD | IGNORE | DIFFICULT) == 0
        assert s.label == ds.classes[ds.labels[row]] and s.label_box == tuple(ds.boxes[row])
        seen.add(row)
    scores = [s.score for s in result.suspects]
    assert scores == sorted(scores, reverse=True)
    json.dumps(review_list(result, 0.), allow_nan=False)


def test_a_detection_near_another_label_is_no_partner():
    overlap = np.array([[.9, .0], [.6, .3], [.0, .3]])
    assert _pair_up(overlap, np.ones((3, 2), bool)).tolist() == [0, 2] # the second lies nearer to the first label
    assert _pair_up(overlap, np.array([[0, 1], [1, 0], [1, 0]], bool)).tolist() == [1, -1]


def test_of_several_kinds_a_label_has_the_likeliest():
    ds, hard = simulated_images(400, 2)
    flawed, _ = plant_errors(ds, .05, 2)
    found = simulated_detector(ds, hard, 2, .15)
    e = _evidence(flawed, found)
    shares = {"wrong class": _wrong_class(flawed, e, .1), "shifted": _shifted(flawed, e, .1),
              "spurious": _spurious(flawed, e), "doubled": _doubled(flawed, e)}
    of_label = {}
    for kind, rows in shares.items():
        for g, share in zip(*rows): of_label.setdefault(int(e.box[g]), {})[kind] = share
    named = [s for s in label_errors(flawed, found).suspects if s.box >= 0]
    suspects = {int(flawed._starts[s.image]) + s.box: s.kind for s in named}
    assert set(suspects) == set(of_label)
    assert all(of_label[row][kind] == max(of_label[row].values()) for row, kind in suspects.items())


def test_a_detection_in_a_crowd_is_no_missing_label():
    ds = apart(20)
    found = exact(ds)
    extra = [as_detections([*d.boxes, [220, 220, 260, 260]], [*d.scores, .95], [*d.labels, 0]) for d in found]
    assert label_errors(ds, extra).counts()["missing"] == 20
    n = len(ds)
    crowd = DetDataset(".", ds.classes, ds.paths, ds.sizes, np.repeat(np.arange(n), 4),
                       np.concatenate([np.vstack([ds.boxes_of(i)[0], [[190, 190, 310, 310]]]) for i in range(n)]),
                       np.concatenate([[*ds.boxes_of(i)[1], 0] for i in range(n)]), flags=[0, 0, 0, CROWD] * n)
    assert label_errors(crowd, extra).suspects == []


def test_the_share_that_agrees_is_calibrated():
    rng = rng_for(12)
    score = rng.uniform(.02, .98, 6000)
    group = rng.integers(0, 3, 6000)
    truth = 1 / (1 + np.exp(-(1.5 * _logit(score) - group)))
    p = _agreement(_logit(score)[:, None], group, rng.random(6000) < truth, 3)
    assert np.abs(p - truth).max() < .06 # standard errors of the coefficients give about .03
    # a class with one case stays near the others
    group[:] = 0
    group[0] = 2
    right = rng.random(6000) < .9
    right[0] = False
    p = _agreement(np.zeros((6000, 1)), group, right, 3)
    assert .6 < p[0] < .9 and p[1] == pytest.approx(right[1:].mean(), abs=.01)


def test_little_data():
    one = apart(1)
    empty = replace(one, box_image=[], boxes=np.zeros((0, 4)), labels=[], flags=None, areas=None)
    nothing = [as_detections(np.zeros((0, 4)), [], [])]
    assert label_errors(empty, nothing).suspects == []
    assert label_errors(one, nothing).counts()["spurious"] == 3 # a detector that finds nothing proves little:
    assert max(s.score for s in label_errors(one, nothing).suspects) < .1
    assert label_errors(empty, exact(one)).counts()["missing"] == 3
    none = DetDataset(".", ("sack",), [], np.zeros((0, 2)))
    assert label_errors(none, []).suspects == []


@pytest.mark.parametrize("change,words", [
    (dict(scores=np.array([.9, np.nan, .9], np.float32)),
     "image 000.jpg: a detection has a score that is not a finite number"),
    (dict(boxes=np.full((3, 4), np.inf, np.float32)), "image 000.jpg: a detection has a box that is not finite"),
    (dict(labels=np.array([0, 1, 2])), "image 000.jpg: a detection has the label 2, which is outside 0..1"),
    (dict(labels=np.array([0, 1])), "each box has four numbers and needs a score and a label")])
def test_detections_that_can_not_be_used(change, words):
    ds = apart(3)
    found = exact(ds)
    found[0] = found[0]._replace(**change)
    with pytest.raises(InputError, match=words.replace(".", r"\.")): label_errors(ds, found)


def test_wrong_arguments():
    ds = apart(3)
    found = exact(ds)
    wrong = [(dict(rate=0), "rate is 0"), (dict(lowest=1), "lowest is 1"), (dict(trained=[True]), "trained has"),
             (dict(shifts=0), "shifts is 0")]
    for kw, words in wrong:
        with pytest.raises(InputError, match=words): label_errors(ds, found, **kw)
    with pytest.raises(InputError, match="2 lists of detections for 3 images"): label_errors(ds, found[:2])
    with pytest.raises(InputError, match="too few"): plant_errors(ds, .5)
    with pytest.raises(InputError, match="kind 'odd' is not known"): plant_errors(ds, .05, kinds=["odd"])


def test_it_says_that_it_is_biased():
    ds = apart(10)
    found = exact(ds)
    assert "not known which images" in label_errors(ds, found).notes[0]
    result = label_errors(ds, found[:9] + [found[0]], np.arange(10) < 4)
    assert "biased: the model was trained on 4 of the 10 images" in result.notes[0] and "out_of_fold" in str(result)


def test_the_rate_changes_scores_not_their_order():
    ds, hard = simulated_images(60)
    found = simulated_detector(ds, hard)
    low, high = (label_errors(ds, found, rate=rate).suspects for rate in (.01, .2))
    assert [s[:4] for s in low] == [s[:4] for s in high]
    assert all(a.score < b.score for a, b in zip(low, high))
    place = lambda suspects: np.mean([k for k, s in enumerate(suspects) if s.kind == "shifted"])
    assert place(label_errors(ds, found, shifts=1.).suspects) < place(label_errors(ds, found, shifts=.1).suspects)


def test_planted_errors_are_where_it_says():
    ds = apart(60)
    flawed, errors = plant_errors(ds, .05, 2)
    assert len(errors) == 45 and len(flawed.boxes) == len(ds.boxes) - 9 + 18
    for error in errors:
        if error.kind == "missing": assert error.row == -1
        elif error.kind == "wrong class": assert flawed.labels[error.row] != error.label
        elif error.kind == "shifted": assert .1 < box_iou(flawed.boxes[[error.row]], np.array([error.box]))[0, 0] < .85
        elif error.kind == "doubled": assert box_iou(flawed.boxes[[error.row]], flawed.boxes[[error.twin]])[0, 0] > .6
        else: assert tuple(flawed.boxes[error.row]) == pytest.approx(error.box)
        if error.row >= 0: assert flawed.box_image[error.row] == error.image


def test_the_list_is_written_and_opens_in_the_page(tmp_path):
    ds = apart(12)
    for path in ds.paths: cv2.imwrite(str(tmp_path / path), np.full((320, 320, 3), 90, np.uint8))
    ds = replace(ds, root=tmp_path)
    flawed, errors = plant_errors(ds, .05)
    result = label_errors(flawed, exact(ds))
    review = read_json(write_review(result, tmp_path / "list.json", least=.05))
    assert review["suspects"] and len(review["flaws"]) == len(review["suspects"])
    assert review["left_out"] == len(result) - len(review["suspects"])
    page = write_view(flawed, tmp_path / "view.html", review).read_text()
    s = next(s for s in result.suspects if s.box >= 0)
    assert f"label {s.kind}" in page and s.path in page
    rows = list(csv.DictReader(open(write_review(result, tmp_path / "list.csv", least=.05), encoding="utf-8")))
    assert [row["path"] for row in rows] == [row["path"] for row in review["suspects"]]
    assert len(suspect_sheet(flawed, result, 3, 2).axes) == 4
    assert len(suspect_sheet(flawed, replace(result, suspects=[]), 3).axes) == 5


# folds


def with_groups(n=40):
    return replace(apart(n), groups=[f"video {i // 4}" for i in range(n)])


@pytest.fixture
def images(tmp_path):
    ds = with_groups()
    for i, path in enumerate(ds.paths): cv2.imwrite(str(tmp_path / path), np.full((32, 32, 3), i, np.uint8))
    return replace(ds, root=tmp_path)


def test_folds_keep_groups_together(images):
    fold = fold_of(images, 5)
    assert np.bincount(fold).tolist() == [8] * 5
    assert all(len(set(fold[images.groups == group])) == 1 for group in set(images.groups))
    assert (fold == fold_of(images, 5)).all() and (fold != fold_of(images, 5, seed=1)).any()
    for k in range(5):
        part = fold_part(images, fold, k)
        assert ((part.splits == "test") == (fold == k)).all() and (part.splits == "train").sum() >= 24
        assert all(len(set(part.splits[images.groups == group])) == 1 for group in set(images.groups))
    with pytest.raises(InputError, match="11 folds of 10 units"): fold_of(images, 11)
    with pytest.raises(InputError, match="1 folds"): fold_of(images, 1)


def test_val_is_whole_groups_of_the_other_folds(tmp_path):
    ds = replace(with_groups(120), root=tmp_path)
    for i, path in enumerate(ds.paths): cv2.imwrite(str(tmp_path / path), np.full((8, 8, 3), i, np.uint8))
    part = fold_part(ds, fold_of(ds, 3), 1)
    assert (part.splits == "test").sum() == 40 and (part.splits == "val").sum() == 8
    assert all(len(set(part.splits[ds.groups == group])) == 1 for group in set(ds.groups))


class Session:
    "Finds a box whose score tells which fold's training it came from; knows its classes in another order."
    confidence = iou = 0.
    contract = SimpleNamespace(classes=("other", "person", "sack"))
    def __init__(self, k): self.k = k
    def __call__(self, batch):
        return [as_detections([[1, 2, 3, 4]] * 2, [.5 + self.k / 10, .4], [2, 0]) for _ in batch]


def test_out_of_fold(images, tmp_path):
    fold = fold_of(images, 4)
    calls = []
    def train(part, folder):
        calls.append(folder.name)
        k = int(folder.name[-1])
        assert set(part.paths[part.splits == "test"]) == set(images.paths[fold == k])
        return Session(k)
    folder = tmp_path / "folds"
    found = out_of_fold(images, train, folder, 4)
    for k, d in zip(fold, found):
        assert d.scores.tolist() == [pytest.approx(.5 + k / 10)] # of the data's classes alone
        assert d.labels.tolist() == [0] and isinstance(d, Detections)
    assert calls == [f"fold-{k}" for k in range(4)]
    again = out_of_fold(images, train, folder, 4)
    assert len(calls) == 4 and all((a.boxes == b.boxes).all() for a, b in zip(found, again))
    (folder / "fold-2.json").unlink()
    out_of_fold(images, train, folder, 4)
    assert calls[4:] == ["fold-2"]
    with pytest.raises(InputError, match="begun with other data or settings"): out_of_fold(images, train, folder, 5)
    (folder / "fold-1.json").write_text('{"rows": [{"image": "x.jpg"}]}')
    with pytest.raises(InputError, match="fold-1.json: not the detections of this fold; delete it"):
        out_of_fold(images, train, folder, 4)
    (folder / "fold-1.json").write_text('{"rows": [')
    with pytest.raises(InputError, match="fold-1.json"): out_of_fold(images, train, folder, 4)


KILLED = """
    import os, signal, sys
    sys.path[:0] = {path!r}
    from test_label_errors import Session, with_groups
    from dataclasses import replace
    from jetson_det.evaluate.label_errors import out_of_fold
    def train(part, folder):
        if folder.name == "fold-2": os.kill(os.getpid(), signal.SIGKILL)
        return Session(int(folder.name[-1]))
    out_of_fold(replace(with_groups(), root={root!r}), train, {folder!r}, 4)
"""


def test_a_kill_loses_one_fold(images, tmp_path):
    folder = tmp_path / "folds"
    here = os.path.dirname(__file__)
    path = [here, os.path.dirname(here)]
    script = textwrap.dedent(KILLED).format(path=path, root=str(images.root), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", script])
    assert done.returncode == -signal.SIGKILL
    assert sorted(file.name for file in folder.glob("fold*.json")) == ["fold-0.json", "fold-1.json", "folds.json"]
    calls = []
    def train(part, folder):
        calls.append(folder.name)
        return Session(int(folder.name[-1]))
    assert len(out_of_fold(images, train, folder, 4)) == len(images)
    assert calls == ["fold-2", "fold-3"]


@pytest.mark.data
def test_on_real_labels_most_of_the_first_hundred_are_planted(data):
    "100 COCO images with the detections that come with them (of AP .50), beside hotcoco on the same."
    from hotcoco import COCO, COCOeval
    from jetson_det.evaluate.coco import coco_of, coco_results
    folder = Path(data) / "datasets/coco_fixtures/val2014_100"
    gt, rows = (json.loads((folder / f"instances_val2014_{name}.json").read_text())
                for name in ("100", "fakebbox100_results"))
    label_of = {c["id"]: k for k, c in enumerate(gt["categories"])}
    place = {image["id"]: k for k, image in enumerate(gt["images"])}
    anns = sorted(gt["annotations"], key=lambda a: place[a["image_id"]])
    boxes = np.array([a["bbox"] for a in anns])
    boxes[:, 2:] += boxes[:, :2]
    ds = DetDataset(folder, [c["name"] for c in gt["categories"]], [image["file_name"] for image in gt["images"]],
                    [[image["height"], image["width"]] for image in gt["images"]], [place[a["image_id"]] for a in anns],
                    boxes, [label_of[a["category_id"]] for a in anns], flags=[a["iscrowd"] for a in anns])
    found = []
    for image in gt["images"]:
        own = [row for row in rows if row["image_id"] == image["id"]]
        xyxy = np.array([row["bbox"] for row in own], np.float32).reshape(-1, 4)
        xyxy[:, 2:] += xyxy[:, :2]
        found.append(as_detections(xyxy, [row["score"] for row in own], [label_of[row["category_id"]] for row in own]))
    flawed, errors = plant_errors(ds, .05)
    right = [is_named(s, flawed, errors) for s in label_errors(flawed, found).suspects[:100]]
    truth = COCO(coco_of(flawed))
    job = COCOeval(truth, truth.load_res(coco_results(found, flawed.image_ids.tolist())), "bbox")
    job.evaluate()
    theirs = job.image_diagnostics()["label_errors"]
    wrong = {error.row for error in errors if error.kind == "wrong class"}
    missing = sum(error.kind == "missing" for error in errors)
    most = sum(row["gt_id"] is not None and row["gt_id"] - 1 in wrong for row in theirs) + missing
    assert sum(right) > 75 and sum(right) > most # theirs with every missing label given


def test_a_detector_that_finds_nothing_is_no_judge():
    ds = apart()
    nothing = [Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))] * len(ds)
    result = label_errors(ds, nothing, np.zeros(len(ds), bool))
    assert f"finds 0 of {result.labels} labels: it is too weak to judge them" in result.notes[0]
    assert not label_errors(ds, exact(ds), np.zeros(len(ds), bool)).notes
