"""Everything but the network, from a decoded frame to detections: ours against YOLOX's demo and against a bare loop.

    python bench/bench_runtime.py --model yolox_nano.onnx --images DIR --videos DIR [--sides 0,640,1920] [--json FILE]

The model is an official YOLOX export (undecoded, as its demo takes it). All run the same file in ONNX Runtime with the
same number of threads, on the same decoded frames, with confidence .25 and IoU .45. `ours` is the session of the
package. `yolox demo` is the body of demo/ONNXRuntime/onnx_inference.py of the `yolox` package. `bare loop` is what one
would write by hand: cv2.resize, a copy into a padded canvas, a copy into planes of float, a filter and the package's
NMS, without checks and without an answer in the image's own limits. `tight loop` is the same with every trick that we
know: cv2 resizes into the canvas itself and splits it into planes of bytes before they are copied, and OpenCV's NMS
runs. It has no limit.

Frames are measured as they are (side 0), and resized so that their longer side has 640 and 1920 pixels. Whole passes
over them are interleaved (A B C D A B C D ...), and what is compared is the time of a call less its time in
`session.run`. Two ratios are given: of all passes (with an interval, 95 %, bootstrap over rounds and frames), which
shows how disturbed the machine was; and of each frame's fastest call, summed over the frames, which a busy machine
disturbs least. Exit code 1 if the latter misses its limit: against the demo with frames as they are, against the bare
loop on each side.
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path

import cv2
import numpy as np

from jetson_det.runtime.geometry import box_iou
from jetson_det.runtime.nms import nms
from jetson_det.runtime.ops.average_precision import draw_weights, interval
from jetson_det.runtime.sessions import OnnxSession
from jetson_det.runtime.images import read_image
from jetson_det.runtime.stream.sources import list_images

CONF, IOU = .25, .45
LIMITS = {"yolox demo": .5, "bare loop": 1.0}  # ours must take at most this share of theirs
OF_NATURAL_FRAMES = ("yolox demo",)            # whose limit is that of side 0 alone


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


class Copied:
    "A frame as the network takes it: resize, copy into the canvas, copy into planes."
    def __init__(self, size):
        self.canvas = np.full(size + (3,), 114, np.uint8)
        self.planes = np.empty((1, 3) + size, np.float32)

    def __call__(self, image, nh, nw):
        self.canvas[:] = 114
        self.canvas[:nh, :nw] = cv2.resize(image, (nw, nh))
        np.copyto(self.planes[0], self.canvas.transpose(2, 0, 1))
        return self.planes


class Split(Copied):
    "The same, resized into the canvas itself, and by way of planes of bytes."
    def __init__(self, size):
        super().__init__(size)
        self.bytes = np.empty((3,) + size, np.uint8)

    def __call__(self, image, nh, nw):
        self.canvas[:] = 114
        cv2.resize(image, (nw, nh), dst=self.canvas[:nh, :nw])
        cv2.split(self.canvas, list(self.bytes))
        np.copyto(self.planes[0], self.bytes)
        return self.planes


def own_nms(boxes, scores, labels):
    "The package's; boxes are corner and size."
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    return nms(corners, scores, labels, IOU)


def cv2_nms(boxes, scores, labels):
    "OpenCV's."
    if not len(boxes): return []
    return np.asarray(cv2.dnn.NMSBoxesBatched(boxes, scores, labels.astype(np.int32), CONF, IOU), int).reshape(-1)


def bare_loop(ort, feed, size, fill, suppress):
    "As little as possible, by hand."
    cells, strides = [], []
    for s in (8, 16, 32):
        y, x = np.mgrid[:size[0] // s, :size[1] // s]
        cells.append(np.stack([x, y], -1).reshape(-1, 2))
        strides.append(np.full((x.size, 1), s))
    cells = np.concatenate(cells).astype(np.float32)
    strides = np.concatenate(strides).astype(np.float32)

    def detect(image):
        h, w = image.shape[:2]
        r = min(size[0] / h, size[1] / w)
        p = ort.run(None, {feed: fill(image, int(h * r), int(w * r))})[0][0]
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
        keep = suppress(boxes, scores, labels)
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


def generated_frames(count):
    "Seeded noise with rectangles."
    rng = np.random.RandomState(0)
    frames = []
    for h, w in [(480, 640), (720, 1280), (1080, 1920)] * (count // 3 + 1):
        image = rng.randint(90, 140, (h, w, 3)).astype(np.uint8)
        for x, y in rng.randint(0, h - 120, (6, 2)):
            cv2.rectangle(image, (x, y), (x + 100, y + 110), rng.randint(0, 255, 3).tolist(), -1)
        frames.append(image)
    return frames[:count]


def video_frames(path, count):
    "So many of a video, evenly apart."
    capture = cv2.VideoCapture(str(path))
    length = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    frames = []
    for index in np.linspace(0, length - 1, count + 2).astype(int)[1:-1]:
        capture.set(cv2.CAP_PROP_POS_FRAMES, int(index))
        ok, image = capture.read()
        if ok: frames.append(image)
    capture.release()
    return frames


def frames_of(images, videos, count):
    "Decoded images of a folder and frames of a folder's videos; generated ones where there is neither."
    if images is None and videos is None: return generated_frames(count)
    frames = [read_image(Path(images) / name) for name in list_images(images)[0]] if images else []
    paths = sorted(Path(videos).glob("*.mp4")) if videos else []
    for path in paths: frames += video_frames(path, max(1, (count - len(frames)) // len(paths)))
    return frames[:count]


def resized(frames, side):
    "So that the longer side has so many pixels; 0: as they are."
    if not side: return frames
    sizes = [(frame.shape[1] * side / max(frame.shape[:2]), frame.shape[0] * side / max(frame.shape[:2]))
             for frame in frames]
    return [cv2.resize(frame, (int(round(w)), int(round(h)))) for frame, (w, h) in zip(frames, sizes)]


def measure(peers, frames, rounds, timed): # peer -> (rounds, frames) ms
    "Interleaved."
    ms = {name: np.zeros((rounds, len(frames))) for name in peers}
    for turn in range(rounds):
        for name, detect in peers.items():
            detect(frames[0])  # the first call after another peer finds cold caches
            for k, frame in enumerate(frames): ms[name][turn, k] = one_call(detect, frame, timed)
    return ms


def print_times(ms, found): # figures
    "What each takes and finds."
    print("{:12}{:>10}{:>10}{:>10}{:>10}{:>8}{:>20}".format("", "fastest", "pass min", "median", "max", "boxes",
                                                            "same as the demo's"))
    figures = {}
    for name, table in ms.items():
        passes = table.mean(1)
        fastest = float(table.min(0).mean())
        figures[name] = {"fastest_ms": fastest, "pass_ms": passes.tolist()}
        print("{:12}{:10.3f}{:10.3f}{:10.3f}{:10.3f}{:8d}{:19.0%}".format(
            name, fastest, passes.min(), np.median(passes), passes.max(), sum(len(s) for _, s, _ in found[name]),
            agreement(found[name], found["yolox demo"])))
    return figures


def print_ratios(ms, side): # (figures, peers whose limit is missed)
    "Ours over each peer."
    rounds, count = ms["ours"].shape
    of_rounds = draw_weights(rounds)
    of_frames = draw_weights(count, seed=1)
    sums = {name: np.einsum("dr,df,rf->d", of_rounds, of_frames, table, optimize=True) for name, table in ms.items()}
    figures = {}
    missed = []
    for name in list(ms)[1:]:
        ratio = ms["ours"].min(0).sum() / ms[name].min(0).sum()
        low, high = interval(sums["ours"] / sums[name])
        limit = LIMITS.get(name) if not side or name not in OF_NATURAL_FRAMES else None
        figures[name] = {"fastest": float(ratio), "all": float(ms["ours"].sum() / ms[name].sum()),
                         "interval": [low, high], "limit": limit}
        verdict = "no limit"
        if limit is not None: verdict = "limit {:.2f}: {}".format(limit, "MISSED" if ratio > limit else "ok")
        if limit is not None and ratio > limit: missed.append(name)
        print("ours / {:11} fastest calls {:.2f} ({})   all calls {:.2f} (95 %: {:.2f} to {:.2f})".format(
            name, ratio, verdict, figures[name]["all"], low, high))
    return figures, missed


def main():
    data = os.environ.get("JETSON_DET_DATA")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model",
                        default=data and data + "/models/yolox_nano_coco_416.onnx",
                        help="official YOLOX ONNX (needed unless JETSON_DET_DATA is set)")
    parser.add_argument("--images", default=data and data + "/datasets/images", help="folder of images")
    parser.add_argument("--videos", default=data and data + "/videos",
                        help="folder of .mp4; without either and without JETSON_DET_DATA: generated images")
    parser.add_argument("--sides", default="0,640,1920", help="longer side, pixels; 0: frames as they are")
    parser.add_argument("--count", type=int, default=20, help="frames at most")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved passes")
    parser.add_argument("--threads", type=int, default=2, help="of ONNX Runtime and OpenCV")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    if not args.model:
        return print(
            "NOT RUN: an official YOLOX ONNX is needed: --model FILE, or the environment variable JETSON_DET_DATA") or 0
    natural = frames_of(args.images, args.videos, args.count)
    if not natural: parser.error("no images in {}, no videos in {}".format(args.images, args.videos))
    session = OnnxSession(args.model, "yolox", threads=args.threads)
    session.confidence, session.iou = CONF, IOU
    timed = session.ort = Timed(session.ort)
    feed = session._feed
    size = session.contract.input_size
    peers = {
        "ours": ours(session), "yolox demo": yolox_demo(timed, feed, size),
        "bare loop": bare_loop(timed, feed, size, Copied(size), own_nms),
        "tight loop": bare_loop(timed, feed, size, Split(size), cv2_nms)
    }
    cv2.setNumThreads(args.threads)  # yolox's import sets 0
    figures = {"frames": len(natural), "rounds": args.rounds, "sides": {}}
    missed = []
    for side in [int(text) for text in args.sides.split(",")]:
        frames = resized(natural, side)
        found = {name: [detect(frame) for frame in frames] for name, detect in peers.items()}
        ms = measure(peers, frames, args.rounds, timed)
        print("{}: {} frames, {} rounds, network {}x{}, {} threads; everything but session.run, ms a frame".format(
            "longer side {}".format(side) if side else "as they are", len(frames), args.rounds, size[1], size[0],
            args.threads))
        times = print_times(ms, found)
        ratios, over = print_ratios(ms, side)
        figures["sides"][side] = {"times": times, "ours over": ratios}
        missed += over
    if args.json: Path(args.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__": sys.exit(main())
