"Boxes and detections paired whatever their classes: hotcoco's confusion matrix, and what pictures are made of."
import numpy as np
import pytest

from jetson_det.core import InputError
from jetson_det.data.dataset import DetDataset
from jetson_det.evaluate.coco import coco_stats
from jetson_det.evaluate.plots import confusion, image_pairs, worst_images
from jetson_det.runtime.geometry import as_detections
from simulated_detector import random_problem, simulated_detector, simulated_images
from tide_oracle import problem


def hotcoco_matrix(ds, found, confidence):
    "Its confusion matrix of all detections over the confidence."
    from hotcoco import COCO, COCOeval
    xywh = ds.boxes.copy()
    xywh[:, 2:] -= xywh[:, :2]
    images = [dict(id=i + 1, height=9, width=9) for i in range(len(ds))]
    categories = [dict(id=k + 1, name=name) for k, name in enumerate(ds.classes)]
    truth = COCO.from_arrays(images, categories, ds.box_image + 1, ds.labels + 1, xywh)
    boxes = np.concatenate([d.boxes for d in found]).astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    image = np.repeat(np.arange(len(ds)), [len(d.scores) for d in found]) + 1
    columns = [image, boxes, np.concatenate([d.scores for d in found]), np.concatenate([d.labels for d in found]) + 1]
    job = COCOeval(truth, truth.load_res(np.column_stack(columns)), "bbox")
    return job.confusion_matrix(iou_thr=.5, max_det=10_000, min_score=confidence)["matrix"].astype(int)


@pytest.mark.parametrize("seed", range(8))
def test_the_confusion_matrix_of_hotcoco(seed):
    pytest.importorskip("hotcoco")
    if seed < 4: ds, found = problem(seed, images=20)
    else:
        ds, hard = simulated_images(50, seed=seed)
        found = simulated_detector(ds, hard, seed=seed)
    result = coco_stats(ds, found)
    for confidence in (0., .25, .6):
        assert np.array_equal(confusion(ds, result, confidence), hotcoco_matrix(ds, found, confidence))


@pytest.mark.parametrize("seed", range(10))
def test_each_box_and_each_detection_is_in_one_place(seed):
    "With crowds, ignored boxes and ties; what takes up an ignored box is in none."
    ds, found = random_problem(seed, levels=4)
    try: result = coco_stats(ds, found)
    except InputError: return
    for i, m in enumerate(image_pairs(ds, result, .3)):
        boxes, _, flags = ds.boxes_of(i)
        box = np.concatenate([m.pairs[:, 0], m.missed])
        detection = np.concatenate([m.pairs[:, 1], m.false])
        assert sorted(box.tolist()) == np.flatnonzero(flags == 0).tolist()
        assert len(set(detection.tolist())) == len(detection) <= len(m.detections.scores)
        assert (m.detections.scores >= .3).all() and (np.diff(m.detections.scores) <= 0).all()
        if not flags.any(): assert len(detection) == len(m.detections.scores)


def test_images_without_boxes_and_without_detections():
    ds = DetDataset(".", ("a",), ["a.jpg", "b.jpg", "c.jpg"], [[9, 9]] * 3, [1], [[0, 0, 9, 9]], [0])
    nothing = as_detections()
    result = coco_stats(ds, [as_detections([[0, 0, 5, 5]], [.9], [0]), nothing, nothing])
    first, second, third = image_pairs(ds, result)
    assert (first.false.tolist(), second.missed.tolist(), len(third.pairs)) == ([0], [0], 0)
    assert worst_images(ds, result) == [(0, 0, 1, 0), (1, 1, 0, 0)]
    with pytest.raises(InputError, match="evaluate this dataset first"): image_pairs(ds.subset([0, 1]), result)
