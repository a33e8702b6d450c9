"""Networks of every family with answers like a trained one's, and comparisons of what two sessions find."""
import cv2
import numpy as np
import torch
from train_helpers import small_detrs

from jetson_det.models.zoo import create_model
from jetson_det.runtime.geometry import box_iou

CLASSES = ("Sack", "Person", "Forklift")
SIZE = (96, 160)
FAMILY_NAMES = ("yolox-nano", "yolov8n", "yolo11n-p2-lite", "yolo26n", "rtdetr-r18", "rtdetrv2-r18", "dfine-n")
NEEDS_NO_NMS = ("yolo26n", "rtdetr-r18", "rtdetrv2-r18", "dfine-n")


def scene(seed, size=(120, 200)):
    "A generated scene: soft ground, some shapes with edges."
    rng = np.random.default_rng(seed)
    image = cv2.resize(rng.integers(60, 200, (6, 10, 3), np.uint8), size[::-1], interpolation=cv2.INTER_CUBIC)
    for _ in range(8):
        x, y = (int(rng.integers(0, side)) for side in size[::-1])
        w, h = (int(rng.integers(10, 60)) for _ in range(2))
        color = tuple(int(v) for v in rng.integers(0, 256, 3))
        cv2.rectangle(image, (x, y), (x + w, y + h), color, -1)
    return cv2.GaussianBlur(image, (0, 0), 1)


@torch.no_grad()
def network(name, put=None, seed=1):
    "Random weights whose activations and scores have the size of a trained network's. `put`: see `small_detrs`."
    if put is not None: small_detrs(put)
    torch.manual_seed(seed)
    model = create_model(name, CLASSES).eval()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms:
        # some of the first variance stays: no channel is amplified without bound
        m.momentum = .98 if name.startswith("yolox") else .9
        m.train()
    frames = np.stack([cv2.resize(scene(100 + i), SIZE[::-1]) for i in range(8)])
    x = model.normalize(torch.from_numpy(frames.transpose(0, 3, 1, 2).copy()))
    model(x)
    model.eval()

    def widen(layer, inputs, output): # logits spread as those of a trained network
        layer.weight.mul_(1.5/output.std())
    last = []
    for key, layer in model.named_modules():
        width = getattr(layer, "out_channels", getattr(layer, "out_features", 0))
        if getattr(layer, "bias", None) is None or not (width == len(CLASSES) or "obj_preds" in key): continue
        last.append(layer)
    hooks = [layer.register_forward_hook(widen) for layer in last]
    model(x)
    for hook in hooks: hook.remove()
    for bias in np.arange(-4, 4, .25): # until a few in a hundred answers are objects
        for layer in last: layer.bias.fill_(float(bias))
        _, scores = model.decode(model(x))
        if .03 < (scores.amax(-1) > .35).float().mean() < .4: return model
    raise AssertionError(f"{name}: no bias gives it objects")


def assert_same(found, wanted, pixels=.1, score=1e-3):
    "Each detection of one has its counterpart in the other: label, box within `pixels`, score."
    assert len(found.scores) == len(wanted.scores)
    if not len(found.scores): return
    apart = np.abs(found.boxes[:, None] - wanted.boxes[None]).max(-1)
    fits = (apart < pixels) & (np.abs(found.scores[:, None] - wanted.scores) < score)
    fits &= found.labels[:, None] == wanted.labels
    assert fits.any(1).all() and fits.any(0).all(), (found, wanted)


def plugin_reference(boxes, scores, iou, confidence, most):
    """What NVIDIA's documentation says that EfficientNMS_TRT computes, for one image: boxes (A,4), scores (A,C).
    Every class over the threshold is a candidate; greedy NMS within a class; the best `most`."""
    rows, labels = np.nonzero(scores > confidence)
    order = np.argsort(-scores[rows, labels], kind="stable")
    kept = []
    for k in order:
        mine = [j for j in kept if labels[j] == labels[k]]
        if mine and box_iou(boxes[rows[k]][None], boxes[rows[mine]]).max() > iou: continue
        kept.append(k)
    kept = kept[:most]
    out_boxes = np.zeros((most, 4), np.float32)
    out_scores = np.zeros(most, np.float32)
    out_labels = np.zeros(most, np.float32)
    out_boxes[:len(kept)] = boxes[rows[kept]]
    out_scores[:len(kept)] = scores[rows[kept], labels[kept]]
    out_labels[:len(kept)] = labels[kept]
    return [np.float32([[len(kept)]]), out_boxes[None], out_scores[None], out_labels[None]]
