"pycocotools' numbers, and a comparison with ours."
import contextlib
import copy
import io

import numpy as np

NAMES = [
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100", "AR_small", "AR_medium",
    "AR_large"
]


def pycocotools_stats(gt, rows):
    "The oracle: its twelve numbers, -1 where there is nothing to find."
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(gt)
        truth.createIndex()
        guess = truth.loadRes(copy.deepcopy(rows))
        job = COCOeval(truth, guess, "bbox")
        job.evaluate(), job.accumulate(), job.summarize()
    return job


def same(result, job):
    ours = [-1 if result.stats[k] is None else result.stats[k] for k in NAMES]
    np.testing.assert_allclose(ours, job.stats, atol=1e-9, rtol=0)
    p = job.eval["precision"]
    for k, row in enumerate(result.per_class):
        here = p[:, :, k, 0, -1]
        assert (row["AP"] is None) == (not (here > -1).any())
        if row["AP"] is not None: assert abs(row["AP"] - here[here > -1].mean()) < 1e-9
