"""Boxes under any input hypothesis can think of."""
import numpy as np
import pytest

pytest.importorskip("hypothesis")  # not under Python 3.6
from hypothesis import given, settings, strategies as st

from jetson_det.runtime.geometry import FITS, as_detections, box_iou, cxcywh_to_xyxy, fit_image, xyxy_to_cxcywh
from jetson_det.runtime.nms import nms
from jetson_det.runtime.contract import Contract, preset
from jetson_det.runtime.preprocess import letterbox

coordinate = st.integers(0, 40).map(float) | st.floats(-50, 50, width=32)
corner_box = st.tuples(coordinate, coordinate, coordinate, coordinate)
candidate = st.tuples(corner_box,
                      st.sampled_from([0, .1, .25, .5, .5, .9, 1]) | st.floats(0, 1, width=32), st.integers(0, 2))
candidates = st.lists(candidate, max_size=40)
side = st.integers(1, 2000)


def arrays(rows):
    "Boxes, scores and labels of drawn candidates."
    return (np.float32([r[0] for r in rows]).reshape(-1, 4), np.float32([r[1] for r in rows]),
            np.array([r[2] for r in rows], np.int64))


def plain_nms(boxes, scores, labels, threshold, agnostic):
    "Greedy suppression in its own words; turned-out boxes have no area."
    zero = np.float32(0)
    area = [max(b[2] - b[0], zero) * max(b[3] - b[1], zero) for b in boxes]

    def suppresses(j, i):
        a = boxes[j]
        b = boxes[i]
        shared = max(min(a[2], b[2]) - max(a[0], b[0]), zero) * max(min(a[3], b[3]) - max(a[1], b[1]), zero)
        return (agnostic or labels[i] == labels[j]) and shared > np.float32(threshold) * ((area[j] + area[i]) - shared)
    keep = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if not any(suppresses(j, i) for j in keep): keep.append(i)
    return keep


@settings(max_examples=300, deadline=None)
@given(candidates, st.sampled_from([0, .25, .5, 1 / 3, .65, 1]), st.booleans(), st.none() | st.integers(0, 10))
def test_nms_is_greedy(rows, threshold, agnostic, limit):
    boxes, scores, labels = arrays(rows)
    got = nms(boxes, scores, labels, threshold, agnostic, limit)
    assert got.tolist() == plain_nms(boxes, scores, labels, threshold, agnostic)[:limit]


@settings(max_examples=60, deadline=None)
@given(candidates, st.integers(2, 9), st.sampled_from([.3, .5]))
def test_nms_in_blocks(rows, times, threshold):
    rows = [((b[0] + i, b[1], b[2] + i, b[3]), s, l) for i in range(times) for b, s, l in rows]
    boxes, scores, labels = arrays(rows)
    assert nms(boxes, scores, labels, threshold).tolist() == plain_nms(boxes, scores, labels, threshold, False)


@given(candidates)
def test_detections_are_sorted_and_stable(rows):
    boxes, scores, labels = arrays(rows)
    d = as_detections(boxes, scores, labels)
    assert (np.diff(d.scores) <= 0).all() and sorted(d.labels.tolist()) == sorted(labels.tolist())
    again = as_detections(*d)
    assert all((a == b).all() for a, b in zip(d, again))


@given(candidates)
def test_iou_is_symmetric_and_bounded(rows):
    boxes = arrays(rows)[0]
    iou = box_iou(boxes, boxes)
    assert np.isfinite(iou).all() and (iou >= 0).all() and (iou <= 1.0001).all() and (iou == iou.T).all()
    np.testing.assert_allclose(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes, atol=1e-4)


@given(side, side, st.integers(1, 1000), st.integers(1, 1000), st.sampled_from(FITS))
def test_fit_stays_inside_and_comes_back(h, w, H, W, fit):
    place = fit_image((h, w), (H, W), fit)
    (nh, nw), (x, y) = place.resized, place.offset
    assert x >= 0 and y >= 0 and 1 <= nh <= H - y and 1 <= nw <= W - x
    box = np.float32([[0, 0, w, h]])
    np.testing.assert_allclose(place.to_image(place.to_input(box)), box, rtol=1e-4, atol=1e-2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 70), st.integers(1, 70), st.sampled_from(FITS),
       st.integers(0, 255))
def test_letterbox_pads_with_the_gray_alone(h, w, H, W, fit, pad):
    canvas, place = letterbox(np.full((h, w, 3), 200, np.uint8), (H, W), fit, pad)
    (nh, nw), (x, y) = place.resized, place.offset
    assert canvas.shape == (H, W, 3) and (canvas[y:y + nh, x:x + nw] == 200).all()
    outside = np.ones((H, W), bool)
    outside[y:y + nh, x:x + nw] = False
    assert (canvas[outside] == pad).all()


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5, unique=True), st.floats(0, 1),
       st.integers(1, 4000), st.integers(1, 4000))
def test_contract_survives_json(classes, confidence, h, w):
    c = preset("ultralytics", classes, (h, w))._replace(confidence=confidence)
    assert Contract.from_json(c.to_json()) == c
