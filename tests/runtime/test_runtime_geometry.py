"""Suppression against the same thing written as a loop, and the way between image and input."""
import numpy as np
import pytest

from jetson_det.runtime.geometry import (FITS, Detections, as_detections, box_area, box_iou, clip_boxes, cxcywh_to_xyxy,
                                         detection_rows, fit_image, xyxy_to_cxcywh)
from jetson_det.runtime.nms import nms
from jetson_det.runtime.files import InputError


def plain_nms(boxes, scores, labels, iou_threshold, class_agnostic=False):
    "Greedy suppression, box by box, with the same float32 arithmetic."
    keep = []
    area = box_area(boxes)
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        for j in keep:
            w = max(min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0]), np.float32(0))
            h = max(min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1]), np.float32(0))
            shared = w * h
            if (class_agnostic
                    or labels[i] == labels[j]) and shared > np.float32(iou_threshold)*(area[j] + area[i] - shared):
                break
        else: keep.append(i)
    return keep


def crowd(seed, n, objects, classes=3):
    "Candidates around a few objects; scores in steps, so that many tie."
    rng = np.random.RandomState(seed)
    corner = rng.uniform(0, 300, (objects, 2))
    size = rng.uniform(0, 120, (objects, 2))
    which = rng.randint(0, objects, n)
    boxes = np.concatenate([corner[which], corner[which] + size[which]], 1) + rng.normal(0, 6, (n, 4))
    return boxes.astype(np.float32), rng.uniform(0, 1, n).round(2).astype(np.float32), rng.randint(0, classes, n)


@pytest.mark.parametrize("n, objects", [
    (0, 1), (1, 1), (2, 1), (40, 3), (127, 9), (128, 9), (129, 9), (500, 20), (700, 300)])
@pytest.mark.parametrize("agnostic", [False, True])
def test_nms_is_the_loop(n, objects, agnostic):
    boxes, scores, labels = crowd(n, n, objects)
    for threshold in (0, .3, .45, 1):
        expected = plain_nms(boxes, scores, labels, threshold, agnostic)
        assert nms(boxes, scores, labels, threshold, agnostic).tolist() == expected
        for limit in (0, 1, 7):
            assert nms(boxes, scores, labels, threshold, agnostic, limit).tolist() == expected[:limit]


def test_nms_of_boxes_without_area_and_of_a_chain():
    flat = np.zeros((300, 4), np.float32)
    assert nms(flat, np.ones(300, np.float32), np.zeros(300, int)).tolist() == list(range(300))
    x = np.arange(400, dtype=np.float32) * 4 # each overlaps the next by 6 of 14: IoU .43
    chain = np.stack([x, x * 0, x + 10, x * 0 + 10], 1)
    assert nms(chain, -x, np.zeros(400, int), .4).tolist() == list(range(0, 400, 2))


def test_detections_and_rows():
    d = as_detections([[0, 0, 4, 4], [1, 1, 3, 3], [2, 2, 9, 9]], [.5, .9, .5], [1, 0, 2])
    assert isinstance(d, Detections) and d.labels.tolist() == [0, 1, 2]
    assert (d.boxes.dtype, d.scores.dtype, d.labels.dtype) == (np.float32, np.float32, np.int64)
    assert detection_rows(d, "abc")[0] == {"name": "a", "label": 0, "score": .9, "box": [1, 1, 3, 3]}
    assert detection_rows(as_detections(), ()) == []


def test_iou_and_conversions():
    boxes = crowd(1, 60, 5)[0]
    iou = box_iou(boxes, boxes[:7])
    assert iou.shape == (60, 7) and iou.min() >= 0 and iou.max() <= 1 + 1e-6
    assert box_iou(boxes, boxes[:0]).shape == (60, 0)
    np.testing.assert_allclose(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes, atol=1e-4)
    clipped = clip_boxes(boxes, (100, 200))
    assert clipped[:, ::2].max() <= 200 and clipped[:, 1::2].max() <= 100 and clipped.min() >= 0


@pytest.mark.parametrize("fit", FITS)
def test_fit_there_and_back(fit):
    rng = np.random.RandomState(0)
    for _ in range(200):
        h, w, H, W = rng.randint(1, 900, 4)
        place = fit_image((h, w), (H, W), fit)
        (nh, nw), (x, y) = place.resized, place.offset
        assert 1 <= nh and y + nh <= H and 1 <= nw and x + nw <= W
        corners = np.float32([[0, 0, w, h]])
        np.testing.assert_allclose(place.to_input(corners), [[x, y, x + nw, y + nh]], rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(place.to_image(place.to_input(corners)), corners, rtol=1e-4, atol=1e-3)
    with pytest.raises(InputError): fit_image((0, 3), (4, 4), fit)
