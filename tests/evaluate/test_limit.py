"The limit on detections is one of each class in each image, as in pycocotools, by every way to a figure."
import cv2
import numpy as np
import pytest

from coco_oracle import pycocotools_stats, same
from jetson_det.data.dataset import CROWD, DIFFICULT, DetDataset
from jetson_det.evaluate.coco import coco_of, coco_results, evaluate, over_limit
from jetson_det.evaluate.detect import best_of_each_class
from jetson_det.evaluate.shared import evaluate_shared
from jetson_det.runtime.contract import Contract
from jetson_det.runtime.geometry import Detections
from jetson_det.runtime.sessions import Session
from jetson_det.runtime.tiles import Tiled
from jetson_det.train.world import World

H, W = 512, 640 # of the network's input and of the images


def grid(n, step=16):
    "The first `n` squares of a grid over the input."
    k = np.arange(n)
    xy = np.stack([k % (W // step), k // (W // step)], 1) * step + 2.5
    return np.concatenate([xy, xy + 11.25], 1)


def crowded(tmp_path, counts):
    "A dataset of one gray image a row of `counts`, with so many boxes of each class in it."
    where = []
    boxes = []
    labels = []
    for i, row in enumerate(counts):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((H, W, 3), i, np.uint8))
        here = np.repeat(np.arange(len(row)), row)
        where += [i] * len(here)
        boxes.append(grid(len(here)))
        labels.append(here)
    names = [f"c{k}" for k in range(len(counts[0]))]
    return DetDataset(tmp_path, names, [f"{i}.png" for i in range(len(counts))], [[H, W]] * len(counts), where,
                      np.concatenate(boxes), np.concatenate(labels))


def oracle_session(ds, first_class_surest=True):
    "Finds every box exactly; all boxes of a class are surer than those of the next one."
    contract = Contract("toy", "toy", ds.classes, (H, W), output="boxes_scores")

    def infer(x):
        boxes = np.zeros((len(x), 1280, 4), np.float32)
        scores = np.zeros((len(x), 1280, len(ds.classes)), np.float32)
        for b, image in enumerate(x):
            i = round(float(image[0, 5, 5]) / contract.scale)
            xyxy, labels, _ = ds.boxes_of(i)
            boxes[b, :len(xyxy)] = xyxy
            sure = .95 - .2 * labels if first_class_surest else .95 - .2 * (len(ds.classes) - 1 - labels)
            scores[b, np.arange(len(xyxy)), labels] = sure - np.arange(len(xyxy)) * 1e-4
        return [boxes, scores]
    return Session(contract, infer)


def exact(ds, session):
    "Every detection of a session without any limit, as COCO results."
    session.confidence, session.iou, session.max_detections = .01, .65, None
    return coco_results([session(ds.image(i)) for i in range(len(ds))], ds.image_ids)


COUNTS = [[[200, 60]], [[60, 200, 3]], [[101, 99], [100, 100], [1, 0]], [[0, 300, 120], [30, 0, 150]]]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("first", [True, False])
def test_every_class_has_its_hundred(tmp_path, counts, first):
    ds = crowded(tmp_path, counts)
    session = oracle_session(ds, first)
    truth = pycocotools_stats(coco_of(ds), exact(ds, session))
    session.max_detections = 7 # whatever the session's own limit is
    whole = evaluate(session, ds, progress=False)
    same(whole, truth)
    for k, n in enumerate(np.array(counts).sum(0)):
        if max(row[k] for row in counts) <= 100 and n: assert whole.per_class[k]["AP"] == pytest.approx(1)
    assert session.max_detections == 7
    found_by_tiles = evaluate(Tiled(session, (H, W), .2), ds, progress=False)
    assert found_by_tiles.stats == whole.stats

    class First(World): # of two processes; the other one's share is made here
        size = 2

        def gather(self, value):
            from jetson_det.evaluate.shared import _share_of_images
            second = World()
            second.rank, second.size = 1, 2
            return [value, _share_of_images(second, session, ds, .01, .65, 100)]
    assert evaluate_shared(First(), session, ds, .01, .65, 100).stats == whole.stats


@pytest.mark.parametrize("limit", [1, 5, 10, 150, 300])
def test_another_limit(tmp_path, limit):
    ds = crowded(tmp_path, [[200, 60]])
    session = oracle_session(ds)
    from pycocotools.cocoeval import COCOeval
    rows = exact(ds, session)
    result = evaluate(session, ds, max_detections=limit, progress=False)
    job = pycocotools_stats(coco_of(ds), rows)
    again = COCOeval(job.cocoGt, job.cocoDt, "bbox")
    again.params.maxDets = [limit]
    again.evaluate(), again.accumulate()
    assert result.stats["AP"] == pytest.approx(again.eval["precision"][:, :, :, 0, 0].mean(), abs=1e-9)
    assert f"AR{limit}" in result.stats


def test_images_over_the_limit_are_named(tmp_path):
    ds = crowded(tmp_path, [[3, 1], [0, 2], [1, 4]])
    ds.paths[2] = "a\x1b[31m.png"
    assert over_limit(ds, 2) == [("0.png", "c0", 3), (ds.paths[2], "c1", 4)]
    assert over_limit(ds, 4) == [] and over_limit(coco_of(ds), 3) == [(ds.paths[2], "c1", 4)]
    flags = np.zeros(len(ds.boxes), np.uint8)
    flags[:3] = CROWD, DIFFICULT, 0
    ds.flags = flags
    assert over_limit(ds, 1) == [("1.png", "c1", 2), (ds.paths[2], "c1", 4)] # what counts neither way does not count


def test_the_result_says_which_images(tmp_path):
    ds = crowded(tmp_path, [[3, 1], [0, 2], [1, 4]])
    session = oracle_session(ds)
    result = evaluate(session, ds, max_detections=2, progress=False)
    line, = [line for line in str(result).splitlines() if "more boxes" in line]
    assert line == ("2 images have more boxes of a class than the 2 detections that count: 0.png (3 c0), 2.png (4 c1);"
                    " max_detections of 4 would count all")
    assert result.to_dict()["over_limit"] == [["0.png", "c0", 3], ["2.png", "c1", 4]]
    assert "more boxes" not in str(evaluate(session, ds, progress=False))


def test_ties_keep_the_first():
    d = Detections(np.zeros((5, 4)), np.array([.5, .5, .9, .5, .5]), np.array([0, 0, 0, 1, 1]))
    d = d._replace(boxes=np.arange(20.).reshape(5, 4))
    assert best_of_each_class(d, 2).boxes[:, 0].tolist() == [0, 8, 12, 16]
    assert best_of_each_class(d, 5) is d
