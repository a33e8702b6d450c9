"""Everything but the network, from a decoded frame to detections: ours against YOLOX's demo and against a bare loop.

    python bench/bench_runtime.py --model yolox_nano.onnx --images DIR [--json FILE]

The model is an official YOLOX export (undecoded, as its demo takes it). All three run the same file in ONNX Runtime
with the same number of threads, on the same decoded frames, with confidence .25 and IoU .45. `ours` is the session of
the package. `yolox demo` is the body of demo/ONNXRuntime/onnx_inference.py of the `yolox` package. `bare loop` is the
least that anybody would write by hand: cv2.resize, cv2.dnn.blobFromImage, a filter and cv2's suppression, without
checks and without an answer in the image's own limits.

Whole passes over the frames are interleaved (A B C A B C ...), and what is compared is the time of a call less its
time in `session.run`. Two ratios are given: of passes beside each other (minimum, median and maximum over the
rounds), which shows how disturbed the machine was; and of each frame's fastest call, summed over the frames, which a
busy machine disturbs least. Exit code 1 if the latter misses its limit.
"""
import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import cv2
import numpy as np

from jetson_det.runtime.geometry import box_iou
from jetson_det.runtime.sessions import OnnxSession
from jetson_det.runtime.images import read_image
from jetson_det.runtime.stream.sources import list_images

CONF, IOU = .25, .45
LIMITS = {"yolox demo": .5, "bare loop": 1.0}  # ours must take at most this share of theirs


class Timed:
    "The ONNX Runtime session that all share, with the seconds spent in it."
    def __init__(self, session): self.session, self.seconds = session, 0.0

    def run(self, names, feed):
        start = time.perf_counter()
        answer = self.session.run(names, feed)
        self.seconds += time.perf_counter() - start
        return answer


def ours(session):
    "The package's session."
    def detect(image):
        found = session(image)
        return found.boxes, found.scores, found.labels
    return detect


def import_yolox():
    """yolox's two functions; its import needs torchvision's operators to be declared even where only torch for the
    CPU is installed."""
    import torch
    try: from yolox.data.data_augment import preproc
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for name in [m for m in sys.modules if m.split(".")[0] in ("torchvision", "yolox")]: del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_yolox.library = library  # the declarations live as long as this object
        from yolox.data.data_augment import preproc
    from yolox.utils import demo_postprocess, multiclass_nms
    return preproc, demo_postprocess, multiclass_nms


def yolox_demo(ort, feed, size):
    "The body of YOLOX's demo/ONNXRuntime/onnx_inference.py."
    preproc, demo_postprocess, multiclass_nms = import_yolox()

    def detect(image):
        img, ratio = preproc(image, size)
        output = ort.run(None, {feed: img[None, :, :, :]})
        predictions = demo_postprocess(output[0], size)[0]
        boxes = predictions[:, :4]
        scores = predictions[:, 4:5] * predictions[:, 5:]
        xyxy = np.ones_like(boxes)
        xyxy[:, 0] = boxes[:, 0] - boxes[:, 2] / 2.
        xyxy[:, 1] = boxes[:, 1] - boxes[:, 3] / 2.
        xyxy[:, 2] = boxes[:, 0] + boxes[:, 2] / 2.
        xyxy[:, 3] = boxes[:, 1] + boxes[:, 3] / 2.
        xyxy /= ratio
        found = multiclass_nms(xyxy, scores, nms_thr=IOU, score_thr=CONF)
        return (np.zeros(
            (0, 4)), np.zeros(0), np.zeros(0, int)) if found is None else (found[:, :4], found[:,
                                                                                               4], found[:,
                                                                                                         5].astype(int))
    return detect


def bare_loop(ort, feed, size):
    "As little as possible, by hand."
    cells, strides = [], []
    for s in (8, 16, 32):
        y, x = np.mgrid[:size[0] // s, :size[1] // s]
        cells.append(np.stack([x, y], -1).reshape(-1, 2))
        strides.append(np.full((x.size, 1), s))
    cells = np.concatenate(cells).astype(np.float32)
    strides = np.concatenate(strides).astype(np.float32)
    canvas = np.full(size + (3,), 114, np.uint8)

    def detect(image):
        h, w = image.shape[:2]
        r = min(size[0] / h, size[1] / w)
        nh = int(h * r)
        nw = int(w * r)
        canvas[:] = 114
        cv2.resize(image, (nw, nh), dst=canvas[:nh, :nw])
        p = ort.run(None, {feed: cv2.dnn.blobFromImage(canvas, 1.0)})[0][0]
        rows = np.flatnonzero(p[:, 4] > CONF)
        q = p[rows]
        scores = q[:, 5:] * q[:, 4:5]
        labels = scores.argmax(1)
        scores = scores[np.arange(len(q)), labels]
        over = scores > CONF
        rows = rows[over]
        q = q[over]
        scores = scores[over]
        labels = labels[over]
        wh = np.exp(q[:, 2:4]) * strides[rows]
        boxes = np.concatenate([(q[:, :2] + cells[rows]) * strides[rows] - wh / 2, wh], 1)
        keep = np.asarray(cv2.dnn.NMSBoxesBatched(boxes, scores, labels.astype(np.int32), CONF, IOU),
                          int).reshape(-1) if len(rows) else []
        boxes = boxes[keep] / r
        boxes[:, 2:] += boxes[:, :2]
        return boxes, scores[keep], labels[keep]
    return detect


def agreement(found, reference):
    "Share of `reference`'s boxes that have one of `found` with the same label and IoU over .9."
    hits = total = 0
    for (a, _, la), (b, _, lb) in zip(found, reference):
        iou = box_iou(b, a) * (np.asarray(lb)[:, None] == np.asarray(la)[None])
        hits = hits + int((iou > .9).any(1).sum()) if len(a) else hits
        total = total + len(b)
    return hits / max(total, 1)


def one_call(detect, frame, timed):
    "Milliseconds of a call, less those in `session.run`."
    start = time.perf_counter()
    timed.seconds = 0.0
    detect(frame)
    return (time.perf_counter() - start - timed.seconds) * 1e3


def frames_of(folder, count):
    "Decoded images of a folder, or seeded noise with rectangles where there is none."
    if folder is None:
        rng = np.random.RandomState(0)
        frames = []
        for h, w in [(480, 640), (720, 1280), (1080, 1920)] * (count // 3 + 1):
            image = rng.randint(90, 140, (h, w, 3)).astype(np.uint8)
            for x, y in rng.randint(0, h - 120, (6, 2)):
                cv2.rectangle(image, (x, y), (x + 100, y + 110), rng.randint(0, 255, 3).tolist(), -1)
            frames.append(image)
        return frames[:count]
    return [read_image(Path(folder) / f) for f in list_images(folder)[0][:count]]


def main():
    data = os.environ.get("JETSON_DET_DATA")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model",
                        default=data and data + "/models/yolox_nano_coco_416.onnx",
                        help="official YOLOX ONNX (needed unless JETSON_DET_DATA is set)")
    parser.add_argument("--images",
                        default=data and data + "/datasets/images",
                        help="folder of images; without it and without JETSON_DET_DATA: generated ones")
    parser.add_argument("--count", type=int, default=20, help="frames at most")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved passes")
    parser.add_argument("--threads", type=int, default=2, help="of ONNX Runtime and OpenCV")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    if not args.model:
        return print(
            "NOT RUN: an official YOLOX ONNX is needed: --model FILE, or the environment variable JETSON_DET_DATA") or 0
    frames = frames_of(args.images, args.count)
    if not frames: parser.error("no images in {}".format(args.images))
    session = OnnxSession(args.model, "yolox", threads=args.threads)
    session.confidence, session.iou = CONF, IOU
    timed = session.ort = Timed(session.ort)
    feed = session._feed
    size = session.contract.input_size
    peers = {
        "ours": ours(session), "yolox demo": yolox_demo(timed, feed, size), "bare loop": bare_loop(timed, feed, size)
    }
    cv2.setNumThreads(args.threads)  # yolox's import sets 0
    found = {name: [detect(f) for f in frames] for name, detect in peers.items()}
    rest = {name: [] for name in peers}
    for _ in range(args.rounds):
        for name, detect in peers.items():
            detect(frames[0])  # the first call after another peer finds cold caches
            rest[name].append([one_call(detect, f, timed) for f in frames])
    print("{} frames, {} rounds, {}x{}, {} threads; everything but session.run, ms a frame".format(
        len(frames), args.rounds, size[1], size[0], args.threads))
    print("{:12}{:>10}{:>10}{:>10}{:>10}{:>8}{:>20}".format("", "fastest", "pass min", "median", "max", "boxes",
                                                            "same as the demo's"))
    fastest, passes = {}, {}
    for name, ms in rest.items():
        fastest[name] = float(np.min(ms, 0).mean())
        passes[name] = np.mean(ms, 1).tolist()
        print("{:12}{:10.3f}{:10.3f}{:10.3f}{:10.3f}{:8d}{:19.0%}".format(name, fastest[name], min(passes[name]),
                                                                          statistics.median(passes[name]),
                                                                          max(passes[name]),
                                                                          sum(len(s) for _, s, _ in found[name]),
                                                                          agreement(found[name], found["yolox demo"])))
    figures = {"frames": len(frames), "rounds": args.rounds, "fastest_ms": fastest, "pass_ms": passes}
    missed = []
    for name, limit in LIMITS.items():
        ratio = fastest["ours"] / fastest[name]
        ratios = [a / b for a, b in zip(passes["ours"], passes[name])]
        figures["ours / " + name] = {
            "fastest": ratio, "min": min(ratios), "median": statistics.median(ratios), "max": max(ratios),
            "limit": limit
        }
        if ratio > limit: missed.append(name)
        print(
            "ours / {:11} fastest calls {:.2f} (limit {:.2f}: {})   passes min {:.2f} median {:.2f} max {:.2f}".format(
                name, ratio, limit, "MISSED" if ratio > limit else "ok", min(ratios), statistics.median(ratios),
                max(ratios)))
    if args.json: Path(args.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__": sys.exit(main())
