"Which images are suggested: against the definition written out, on sets made so that the answer is known, and faults."
import csv
import os
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jetson_det.core import InputError, rng_for
from jetson_det.data.dataset import DetDataset
from jetson_det.evaluate.plots import figure_bytes
from jetson_det.evaluate.suggest import (PARTS, _comparable, _nearest, _neck_means, _shares, _summary, choose,
                                         disagreement, parse_weights, rarity, suggest, suggestion_sheet, uncertainty,
                                         write_suggestions)
from jetson_det.runtime.files import read_json
from jetson_det.runtime.geometry import Detections, as_detections

CLASSES = "sack", "person"


def scene(seed):
    "An image with a texture of its own."
    low = rng_for(11, seed).integers(0, 255, (6, 8, 3), np.uint8)
    return cv2.resize(low, (96, 72), interpolation=cv2.INTER_CUBIC)


class Known:
    "A session with a fixed answer for each image, told by the image's hash of pixels."
    confidence = .4
    max_detections = 3
    infer = None

    def __init__(self, answers, classes=CLASSES):
        self.contract = SimpleNamespace(classes=classes)
        self.answers = answers

    def __call__(self, image):
        scores, labels = self.answers[image.tobytes()]
        found = as_detections([[k, 0, k + 20, 20] for k in range(0, 30 * len(scores), 30)], scores, labels)
        keep = found.scores >= self.confidence
        return Detections(*(column[keep][:self.max_detections] for column in found))


def folder_of(path, n):
    "Images 0.png, 1.png, ...; their pixels."
    path.mkdir(exist_ok=True)
    pixels = [scene(k) for k in range(n)]
    for k, image in enumerate(pixels): cv2.imwrite(str(path / f"{k}.png"), image)
    return pixels


def labeled_set(path, names, classes=CLASSES, labels=None):
    "A dataset of images in a folder, one box each."
    labels = [0] * len(names) if labels is None else labels
    return DetDataset(path, classes, names, [(72, 96)] * len(names), np.arange(len(names)),
                      [[0, 0, 20, 20]] * len(names), labels)


# ---- the parts
@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.integers(0, 2)), max_size=12))
def test_uncertainty_is_the_sum_of_margins(rows):
    found = as_detections([[0, 0, 5, 5]] * len(rows), [s for s, _ in rows], [k for _, k in rows])
    weights = [1., 2., .5]
    expected = sum(weights[k] * 2 * min(s, 1 - s) for s, k in rows)
    assert uncertainty(found, weights) == pytest.approx(expected, abs=1e-5)
    assert uncertainty(found) <= len(rows)


def random_boxes(rng, n):
    corner = rng.integers(0, 5, (n, 2)) * 10.
    boxes = np.hstack([corner, corner + rng.integers(1, 4, (n, 2)) * 10])
    return as_detections(boxes, rng.permutation(n) / (n + 1) + .01, rng.integers(0, 2, n))


@given(st.integers(0, 10_000))
def test_disagreement(seed):
    rng = rng_for(12, seed)
    a = random_boxes(rng, int(rng.integers(0, 7)))
    b = random_boxes(rng, int(rng.integers(0, 7)))
    value = disagreement(a, b)
    assert disagreement(a, a) == 0 or len({tuple(box) for box in a.boxes.tolist()}) < len(a.boxes)
    assert 0 <= value <= a.scores.sum() + b.scores.sum() + 1e-6
    assert disagreement(a, as_detections()) == pytest.approx(a.scores.sum(), abs=1e-5)
    other = Detections(b.boxes, b.scores, b.labels + 2)  # no class in common: no pair
    assert disagreement(a, other) == pytest.approx(float(a.scores.sum() + b.scores.sum()), abs=1e-5)


def test_rarity():
    weights = rarity([1000, 10, 0])
    assert (np.diff(weights) >= 0).all() and weights.max() == 4
    assert rarity([7, 7, 7]).tolist() == [1, 1, 1] and len(rarity([])) == 0


@given(st.lists(st.integers(0, 5), min_size=2, max_size=30))
def test_shares_are_ranks(values):
    values = np.array(values, float)
    expected = [((values < v).sum() + (values <= v).sum() - 1) / 2 / (len(values) - 1) for v in values]
    np.testing.assert_allclose(_shares(values), expected)


def test_nearest_in_blocks(monkeypatch):
    rng = rng_for(13)
    a = rng.normal(size=(50, 9)).astype(np.float32)
    b = rng.normal(size=(33, 9)).astype(np.float32)
    expected = np.linalg.norm(a[:, None] - b, axis=2).min(1)
    monkeypatch.setattr("jetson_det.evaluate.suggest._BLOCK", 120)
    np.testing.assert_allclose(_nearest(a, b), expected, atol=1e-4)
    assert np.isinf(_nearest(a, b[:0])).all()


def test_columns_of_no_spread_do_not_count():
    columns = rng_for(14).normal(size=(40, 5)).astype(np.float32)
    with_constant = np.hstack([columns, np.full((40, 1), 7, np.float32)])
    np.testing.assert_allclose(_comparable(with_constant)[:, :5], _comparable(columns), atol=1e-5)
    assert _comparable(rng_for(15).normal(size=(20, 500)).astype(np.float32)).shape == (20, 64)


def test_what_was_found_as_numbers():
    boxes = [[0, 0, 5, 5], [0, 0, 20, 20], [0, 0, 90, 90], [9, 9, 99, 99]]
    found = as_detections(boxes, [.9, .8, .7, .6], [0, 0, 1, 1])
    expected = np.log1p([.9, .8, 0, 0, 0, 1.3])
    np.testing.assert_allclose(_summary(found, 2, (100, 100)), expected, atol=1e-5)
    assert not _summary(as_detections(), 2, (100, 100)).any()


# ---- the choice
def greedy(fixed, columns, labeled, group, count, novelty, whole):
    "The definition, written out."
    known = list(labeled)
    left = list(range(len(fixed)))
    out = []
    while len(out) < count and left:
        if known:
            far = np.array([min(np.linalg.norm(columns[i] - c) for c in known) for i in left])
            score = [(fixed[i] + novelty * share) / whole for i, share in zip(left, _shares(far))]
        else: score = [fixed[i] / (whole - novelty) for i in left]
        best = left[int(np.argmax(score))]
        out.append(best)
        known.append(columns[best])
        left = [i for i in left if group[i] != group[best]]
    return out


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([0., .5, 1., 3.]), st.integers(0, 4))
def test_choose_is_the_greedy_choice(seed, novelty, labeled):
    rng = rng_for(16, seed)
    n = int(rng.integers(1, 25))
    fixed = rng.random(n)
    columns = rng.normal(size=(n, 4)).astype(np.float32)
    known = rng.normal(size=(labeled, 4)).astype(np.float32)
    group = rng.integers(0, max(n // 2, 1), n)
    chosen = choose(fixed, columns, _nearest(columns, known), group, 8, novelty, 1 + novelty)
    assert [c.image for c in chosen] == greedy(fixed, columns, known, group, 8, novelty, 1 + novelty)
    assert len({int(group[c.image]) for c in chosen}) == len(chosen)
    assert all(0 <= c.score <= 1 for c in chosen)


# ---- all of it
def test_the_unsure_image_is_first(tmp_path):
    pixels = folder_of(tmp_path / "raw", 6)
    answers = {image.tobytes(): ([.97, .02], [0, 0]) for image in pixels}
    answers[pixels[4].tobytes()] = [.55, .45, .5, .5], [0, 0, 1, 1]
    result = suggest(Known(answers), tmp_path / "raw", count=2, weights=dict(novelty=0))
    first = result.rows[0]
    assert first.path == "4.png" and first.uncertainty == 1 and first.unsure == pytest.approx(3.8, abs=1e-6)
    assert first.boxes == 4 and "the least sure one" in first.reason and first.disagreement is None
    assert len(result) == 6 and [row.batch for row in result.rows] == [True] * 2 + [False] * 4


def test_the_rare_class_counts_for_more(tmp_path):
    pixels = folder_of(tmp_path / "raw", 4)
    labeled = labeled_set(tmp_path / "raw", ["2.png", "3.png"], labels=[0, 0])
    answers = {image.tobytes(): ([.6], [0]) for image in pixels}
    answers[pixels[1].tobytes()] = [.62], [1]  # a little surer, but no person is labeled yet
    result = suggest(Known(answers), tmp_path / "raw", labeled, weights=dict(novelty=0))
    assert [row.path for row in result.rows] == ["1.png", "0.png"]
    turned = DetDataset(tmp_path / "raw", CLASSES[::-1], ["2.png", "3.png"], [(72, 96)] * 2, [0, 1],
                        [[0, 0, 20, 20]] * 2, [1, 1])  # the same labels with the classes the other way round
    assert [row.path for row in suggest(Known(answers), tmp_path / "raw", turned).rows] == ["1.png", "0.png"]


def test_near_duplicates_go_to_the_end(tmp_path):
    raw = tmp_path / "raw"
    pixels = folder_of(raw, 6)
    for k, name in ((0, "of_labeled.png"), (3, "z.png"), (3, "y.png")): shutil.copy(raw / f"{k}.png", raw / name)
    answers = {image.tobytes(): ([.5], [0]) for image in pixels}
    labeled = labeled_set(raw, ["0.png", "1.png"])
    for count in (1, 3, 100):
        result = suggest(Known(answers), raw, labeled, count=count)
        assert len(result) == 7 and result.labeled == 2
        last = {row.path: row.like for row in result.rows[-3:]}
        assert last.pop("of_labeled.png") == "0.png"
        trio = {"3.png", "y.png", "z.png"}
        assert set(last) < trio and set(last.values()) == trio - set(last)
        assert not any(row.batch for row in result.rows[-3:])
        assert len(result.batch()) == min(count, 4)


def test_labeled_images_are_left_out_by_the_file(tmp_path):
    raw = tmp_path / "raw"
    pixels = folder_of(raw, 4)
    (tmp_path / "set").mkdir()
    os.symlink(raw / "2.png", tmp_path / "set" / "other name.png")
    labeled = labeled_set(tmp_path / "set", ["other name.png"])
    answers = {image.tobytes(): ([.5], [0]) for image in pixels}
    result = suggest(Known(answers), raw, labeled)
    assert sorted(row.path for row in result.rows) == ["0.png", "1.png", "3.png"]
    assert "1 image left out: labeled already" in repr(result)
    with pytest.raises(InputError, match="all 4 images are labeled already"):
        suggest(Known(answers), raw, labeled_set(raw, [f"{k}.png" for k in range(4)]))


def test_two_models(tmp_path):
    pixels = folder_of(tmp_path / "raw", 5)
    first = {image.tobytes(): ([.9, .9], [0, 1]) for image in pixels}
    second = {image.tobytes(): ([.9, .9], [1, 0]) for image in pixels}  # the same by name: the classes are turned
    second[pixels[3].tobytes()] = [.9, .9], [0, 0]
    other = Known(second, CLASSES[::-1])
    result = suggest(Known(first), tmp_path / "raw", second=other, weights=dict(novelty=0))
    assert result.rows[0].path == "3.png" and result.rows[0].disagreement == 1
    assert result.weights == dict(uncertainty=1, disagreement=1, novelty=0)
    with pytest.raises(InputError, match="no class in common"):
        suggest(Known(first), tmp_path / "raw", second=Known(second, ("cat", "dog")))


def test_strange_images(tmp_path):
    raw = tmp_path / "raw"
    pixels = folder_of(raw, 2)
    (raw / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    answers = {image.tobytes(): ([], []) for image in pixels}
    with pytest.warns(UserWarning, match="skipped"): result = suggest(Known(answers), raw)
    assert len(result) == 2 and "1 image skipped, such as broken.png" in repr(result)
    assert "nothing found at 0.4" in result.rows[0].reason
    one = suggest(Known(answers), raw / "0.png")
    assert len(one) == 1 and one.rows[0].batch


@pytest.mark.parametrize("more, line", [
    (dict(count=0), "count is 0; give 1 or more"),
    (dict(weights=dict(surprise=1)), "weights: 'surprise' is not known; the parts are uncertainty, disagreement, nov"),
    (dict(weights=dict(novelty=-1)), "weights: novelty is -1; give 0 or more"),
    (dict(weights=dict(novelty=float("nan"))), "weights: novelty is nan"),
    (dict(weights=dict(uncertainty=0, novelty=0)), "weights: all are 0"),
    (dict(weights=dict(disagreement=1)), "disagreement takes a second model"),
])
def test_wrong_calls(tmp_path, more, line):
    folder_of(tmp_path / "raw", 1)
    with pytest.raises(InputError, match=line): suggest(Known({}), tmp_path / "raw", **more)


def test_weights_in_words():
    assert parse_weights("novelty=2, uncertainty=.5") == dict(novelty=2, uncertainty=.5) and parse_weights(" ") is None
    with pytest.raises(InputError, match="'novelty' is not PART=NUMBER"): parse_weights("uncertainty=1,novelty")


def test_the_files(tmp_path):
    pixels = folder_of(tmp_path / "raw", 3)
    answers = {image.tobytes(): ([.5], [0]) for image in pixels}
    result = suggest(Known(answers), tmp_path / "raw", count=2)
    with open(write_suggestions(result, tmp_path / "a.csv"), newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert [row["path"] for row in rows] == [row.path for row in result.rows]
    assert [row["batch"] for row in rows] == ["1", "1", "0"]
    content = read_json(write_suggestions(result, tmp_path / "a.json"))
    assert content["rows"][1]["reason"] == result.rows[1].reason and set(content["weights"]) < set(PARTS)
    with pytest.raises(InputError, match="name it .json or .csv"): write_suggestions(result, tmp_path / "a.txt")
    assert figure_bytes(suggestion_sheet(result), dpi=40)[:4] == b"\x89PNG"


def test_the_features_of_a_detector(tmp_path):
    "Every family says where its feature maps are; a session on one is compared by them."
    torch = pytest.importorskip("torch")
    from jetson_det.models.session import torch_session
    from jetson_det.models.zoo import create_model
    torch.manual_seed(0)
    session = torch_session(create_model("yolox-nano", CLASSES), (64, 96))
    folder_of(tmp_path / "raw", 4)
    with _neck_means(session) as means:
        session(scene(0))
        maps = [mean.copy() for mean in means]
        assert [mean.ndim for mean in maps] == [1, 1, 1]
        session(scene(1))
        assert not np.allclose(maps[0], means[0])
    assert not any(layer._forward_pre_hooks for layer in session.infer.model.teacher_layers())
    result = suggest(session, tmp_path / "raw")
    assert len(result) == 4 and "compared by the features of the detector" in repr(result)
    with _neck_means(Known({})) as means: assert means is None

