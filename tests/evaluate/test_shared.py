"""An evaluation by several processes."""
import json

import numpy as np
import pytest
from process_helpers import preload, together
from train_helpers import config, scenes

from jetson_det.core import InputError
from jetson_det.train.data import training_data

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data"), 18)


@pytest.fixture(scope="module", autouse=True)
def preloaded(): preload()


class Noisy:
    "A session that finds most boxes of a dataset, not quite where they are, and some more."
    def __init__(self, ds):
        from types import SimpleNamespace
        self.contract = SimpleNamespace(classes=ds.classes, name="noisy")
        self.timings = {}
        self.confidence = 0.
        self.iou = 0.
        self.max_detections = 0
        self.known = {ds.image(i).tobytes(): (i, ds.boxes_of(i)) for i in range(len(ds))}

    def __call__(self, images):
        from jetson_det.runtime.geometry import Detections
        found = []
        for image in images:
            i, (boxes, labels, _) = self.known[image.tobytes()]
            rng = np.random.default_rng(i)
            keep = rng.random(len(boxes)) < .9
            found.append(
                Detections((boxes + rng.normal(0, 3, boxes.shape))[keep].astype(np.float32),
                           rng.random(keep.sum()).astype(np.float32), labels[keep].astype(np.int64)))
        return found


def rank_evaluated(world, path, broken):
    "In a process: the figures of the shared evaluation; with `broken` the second process's session fails."
    from jetson_det.evaluate.shared import evaluate_shared
    ds = training_data(config(path), "unused", lambda l: None)
    session = Noisy(ds)
    if broken and not world.main:
        session.known = type(
            "", (), {"__getitem__": lambda self, k:
                     (_ for _ in ()).throw(InputError("output 'boxes' is not finite"))})()
    try: result = evaluate_shared(world, session, ds, .01, .65, 100)
    except InputError as e: return world.gather(str(e))
    return [[json.dumps(s) for s in world.gather(result.stats)],
            len(result.detections), result.images,
            str(result), (session.confidence, session.max_detections)]


def test_sharded_evaluation_is_that_of_one_process(data):
    from jetson_det.evaluate.coco import evaluate
    ds = training_data(config(data), "unused", lambda l: None)
    alone = evaluate(Noisy(ds), ds, .01, .65, 100, progress=False)
    assert .05 < alone.stats["AP"] < .95
    stats, detections, images, table, left = together(rank_evaluated, 2, str(data), False)
    assert stats == [json.dumps(alone.stats)]*2 and (detections, images, table) == (len(ds), len(ds),
                                                                                    str(alone)) and left == [0., 0]
    assert together(rank_evaluated, 2, str(data), True) == ["output 'boxes' is not finite"] * 2
