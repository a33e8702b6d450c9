"Random labels and detections for the tests of the evaluation."
import numpy as np

from jetson_det.core import rng_for
from jetson_det.data.dataset import CROWD, DIFFICULT, IGNORE, DetDataset
from jetson_det.runtime.geometry import as_detections


def scene(seed, n=30, classes=4, p_flag=.25, most=14):
    "A dataset with crowd, ignored and difficult boxes and empty images, and detections of all qualities."
    rng = rng_for(11, seed)
    where = []
    boxes = []
    labels = []
    flags = []
    found = []
    for i in range(n):
        k = 0 if rng.random() < .2 else int(rng.integers(1, most))
        wh = np.exp(rng.uniform(np.log(6), np.log(200), (k, 2)))
        xy = rng.uniform(0, 400, (k, 2))
        # the last class has no boxes
        here = np.concatenate([xy, xy + wh], 1)
        cls = rng.integers(0, classes - 1, k)
        where += [i] * k
        boxes.append(here), labels.append(cls)
        flags.append(np.where(rng.random(k) < p_flag, rng.choice([CROWD, IGNORE, DIFFICULT, CROWD | IGNORE], k), 0))
        m = 0 if rng.random() < .2 else int(rng.integers(0, 30))
        if k: near = here[rng.integers(0, k, m)] + rng.normal(0, rng.choice([1, 4, 12], (m, 1)), (m, 4))
        else: near = rng.uniform(0, 300, (m, 4))
        d = np.concatenate([np.minimum(near[:, :2], near[:, 2:]), np.maximum(near[:, :2], near[:, 2:])], 1)
        if m and rng.random() < .3:
            d = np.concatenate([d, d])
            m *= 2 # copies
        # many ties
        found.append(as_detections(d, rng.random(m).round(int(rng.integers(1, 6))), rng.integers(0, classes, m)))
    return DetDataset(".", [f"c{k}" for k in range(classes)], [f"{i}.png" for i in range(n)], [[600, 600]] * n, where,
                      np.concatenate(boxes), np.concatenate(labels), flags=np.concatenate(flags),
                      image_ids=rng.permutation(1000)[:n]), found
