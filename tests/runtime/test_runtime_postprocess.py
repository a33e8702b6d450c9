"""Reading a network's answer: the fast way against anchor point by anchor point."""
import numpy as np
import pytest

from jetson_det.runtime.geometry import fit_image
from jetson_det.runtime.contract import OUTPUTS, anchor_count, preset
from jetson_det.runtime.files import InputError
from jetson_det.runtime.postprocess import postprocess

SIZE = (64, 96)
CLASSES = ("a", "b", "c")
A = anchor_count(SIZE)


def answer(kind, seed, batch=2):
    "A random answer in the layout of `kind`."
    rng = np.random.RandomState(seed)
    boxes = np.concatenate([rng.uniform(0, 96, (batch, A, 2)), rng.uniform(4, 40, (batch, A, 2))], 2).astype(np.float32)
    scores = (rng.uniform(0, 1, (batch, A, 3)) ** 3).astype(np.float32)
    obj = rng.uniform(0, 1, (batch, A, 1)).astype(np.float32)
    if kind in ("boxes_scores", "queries"):
        return [np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], 2), scores]
    if kind == "detr": return [boxes / np.float32([SIZE[1], SIZE[0]] * 2), np.log(scores + 1e-6) - np.log1p(-scores)]
    if kind == "ultralytics": return [np.ascontiguousarray(np.concatenate([boxes, scores], 2).transpose(0, 2, 1))]
    shares = boxes / np.float32([SIZE[1], SIZE[0]] * 2)
    if kind == "detr-scores": return [np.concatenate([shares, scores], 2)]
    best, label = scores.max(2), scores.argmax(2).astype(np.float32)
    if kind == "detr-end2end": return [np.dstack([shares, best, label])]
    corners = np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], 2)
    if kind == "end2end": return [np.dstack([corners, best, label])]
    if kind == "nms-rows":
        image = np.repeat(np.arange(batch), A).astype(np.float32)[:, None]
        return [np.concatenate([image, corners.reshape(-1, 4), label.reshape(-1, 1), best.reshape(-1, 1)], 1)]
    if kind == "efficient-nms": return [np.full((batch, 1), A, np.float32), corners, best, label]
    if kind == "labels-boxes-scores": return [label, corners, best]
    if kind == "yolox-raw": boxes = rng.normal(0, 1, boxes.shape).astype(np.float32)
    return [np.concatenate([boxes, obj, scores], 2)]


FINISHED = { # kind -> box, score and label of row `a` of image `i`
    "detr-end2end": lambda o, i, a: (o[0][i, a, :4] * np.float32([SIZE[1], SIZE[0]] * 2), o[0][i, a, 4], o[0][i, a, 5]),
    "end2end": lambda o, i, a: (o[0][i, a, :4], o[0][i, a, 4], o[0][i, a, 5]),
    "nms-rows": lambda o, i, a: (o[0][i * A + a, 1:5], o[0][i * A + a, 6], o[0][i * A + a, 5]),
    "efficient-nms": lambda o, i, a: (o[1][i, a], o[2][i, a], o[3][i, a]),
    "labels-boxes-scores": lambda o, i, a: (o[1][i, a], o[2][i, a], o[0][i, a]),
}
XYXY = ("boxes_scores", "queries", "end2end", "nms-rows", "efficient-nms", "labels-boxes-scores")


def first_image(kind, outputs):
    "The outputs of a batch of one."
    return [o[:A] for o in outputs] if kind == "nms-rows" else [o[:1] for o in outputs]


def plain_candidates(kind, outputs, i, confidence):
    "(box in the input, score, label) of each anchor point, one after the other."
    found, a = [], 0
    grid = [(x, y, s) for s in (8, 16, 32) for y in range(SIZE[0] // s) for x in range(SIZE[1] // s)]
    for a in range(A):
        label = None
        if kind in FINISHED:
            box, score, label = FINISHED[kind](outputs, i, a)
            p = np.float32([score])
        elif kind == "detr-scores":
            box = outputs[0][i, a, :4] * np.float32([SIZE[1], SIZE[0]] * 2)
            p = outputs[0][i, a, 4:]
        elif kind in ("boxes_scores", "queries"):
            box = outputs[0][i, a]
            p = outputs[1][i, a]
        elif kind == "detr":
            box = outputs[0][i, a] * np.float32([SIZE[1], SIZE[0]] * 2)
            p = 1 / (1 + np.exp(-outputs[1][i, a]))
        elif kind == "ultralytics": box, p = outputs[0][i, :4, a], outputs[0][i, 4:, a]
        else: box, p = outputs[0][i, a, :4], outputs[0][i, a, 5:] * outputs[0][i, a, 4]
        if kind == "yolox-raw":
            x, y, s = grid[a]
            box = [(box[0] + x) * s, (box[1] + y) * s, np.exp(box[2]) * s, np.exp(box[3]) * s]
        if kind not in XYXY:
            box = [box[0] - box[2] / 2, box[1] - box[3] / 2, box[0] + box[2] / 2, box[1] + box[3] / 2]
        if kind in ("queries", "detr", "detr-scores"): found += [(box, p[k], k) for k in range(3) if p[k] > confidence]
        elif p.max() > confidence: found.append((box, p.max(), p.argmax() if label is None else int(label)))
    return sorted(found, key=lambda c: -c[1])[:A]


@pytest.mark.parametrize("kind", OUTPUTS)
def test_against_anchor_by_anchor(kind):
    c = preset("yolox", CLASSES, SIZE)._replace(output=kind)
    outputs = answer(kind, 1)
    fits = [fit_image((128, 192), SIZE), fit_image((50, 40), SIZE)]
    # IoU is never over 1: nothing is suppressed
    for i, (got, fit) in enumerate(zip(postprocess(c, outputs, fits, .5, 1), fits)):
        plain = plain_candidates(kind, outputs, i, .5)
        boxes = fit.to_image(np.float32([b for b, _, _ in plain]))
        inside = ((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
        assert len(plain) > 5
        np.testing.assert_allclose(got.boxes, boxes[inside], rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(got.scores, np.float32([s for _, s, _ in plain])[inside], rtol=1e-6)
        assert got.labels.tolist() == np.array([l for _, _, l in plain])[inside].tolist()


@pytest.mark.parametrize("kind", OUTPUTS)
def test_properties_of_detections(kind):
    c = preset("yolox", CLASSES, SIZE)._replace(output=kind)
    outputs = answer(kind, 2)
    fit = fit_image((70, 210), SIZE)
    all_of, = postprocess(c, first_image(kind, outputs), [fit], .3, .5)
    few, = postprocess(c, first_image(kind, outputs), [fit], .3, .5, max_detections=5)
    none, = postprocess(c, first_image(kind, outputs), [fit], 1)
    assert (np.diff(all_of.scores) <= 0).all()
    assert all_of.boxes.min() >= 0 and (all_of.boxes <= [210, 70, 210, 70]).all()
    assert [a.shape for a in none] == [(0, 4), (0,), (0,)]
    assert [a.dtype for a in none] == [np.float32, np.float32, np.int64]
    assert len(few.scores) <= 5 and few.scores.tolist() == all_of.scores[:len(few.scores)].tolist()


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_nonsense_gets_through(kind, value):
    "One number of an answer at a time: detections are finite, or it is refused."
    c = preset("yolox", CLASSES, SIZE)._replace(output=kind)
    fit = fit_image(SIZE, SIZE)
    refused = 0
    clean = answer(kind, 3, 1)
    rng = np.random.RandomState(0)
    for which in range(len(clean)):
        for at in rng.choice(clean[which].size, min(40, clean[which].size), replace=False):
            outputs = [o.copy() for o in clean]
            outputs[which].ravel()[at] = value
            try: got, = postprocess(c, outputs, [fit], .3)
            except InputError as e:
                refused += 1
                assert "not finite" in str(e) and "\n" not in str(e)
            else: assert np.isfinite(got.boxes).all() and np.isfinite(got.scores).all()
    assert refused
    outputs = [np.full_like(o, value) for o in clean]
    with pytest.raises(InputError, match="not finite"): postprocess(c, outputs, [fit])


def test_untrained_yolox_overflows_nothing():
    c = preset("yolox", CLASSES, SIZE)
    fit = fit_image(SIZE, SIZE)
    outputs = answer("yolox-raw", 4, 1)
    outputs[0][0, :, 2:4] = 300
    with np.errstate(all="raise"): got, = postprocess(c, outputs, [fit], .5)
    assert np.isfinite(got.boxes).all() and len(got.scores)


@pytest.mark.parametrize("kind", ["queries", "detr"])
def test_queries_are_not_suppressed(kind):
    """Two equal boxes, one of them sure of two classes: three detections, whatever the IoU threshold; two where
    there are two queries to ask."""
    c = preset("rtdetr", CLASSES, SIZE)._replace(output=kind)
    fit = fit_image(SIZE, SIZE)
    p = np.float32([[[.9, .1, .6], [.7, .1, .1], [.1, .1, .1]]])
    box = np.float32([[[.25, .25, .25, .25]] * 3])
    outputs = [box * [96, 64, 96, 64] + [-12, -8, 0, 0], p] if kind == "queries" else [box, np.log(p) - np.log1p(-p)]
    got, = postprocess(c, outputs, [fit], .5, 0)
    assert got.labels.tolist() == [0, 0, 2] and np.allclose(got.scores, [.9, .7, .6])
    assert np.allclose(got.boxes, [[12, 8, 36, 24]] if kind == "detr" else [[12, 8, 24, 16]])
    few, = postprocess(c, [o[:, :2] for o in outputs], [fit], .5)
    assert few.labels.tolist() == [0, 0] and len(postprocess(c, outputs, [fit], .5, max_detections=1)[0].scores) == 1
    for confidence, count in ((0, 3), (1, 0)): assert len(postprocess(c, outputs, [fit], confidence)[0].scores) == count
