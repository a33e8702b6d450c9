"""Plates read on photos: ours beside fast-alpr's `ALPR.predict`, with the same two models.

    python bench/bench_plates.py --detector plates.onnx --ocr cct_xs.onnx --images DIR [--list FILE] [--json FILE]

A photo `name.jpg` has its labels in `name.txt`, a line each of file, x, y, width, height and text, divided by tabs (the
form of OpenALPR's benchmark). `--list` names the photos to take, one a line; give those that the detector was not
trained on. `--ocr` is a reader of fast-plate-ocr with its configuration beside it.

Both find plates with the same session, as fast-alpr takes any detector; so what differs is how plates are cropped and
read: ours as one batch of all plates, the peer one by one. `own` is the time of reading without that in its network.
Calls are interleaved, who goes first changes from call to call. Two ratios are given: of all calls, with an interval
(95 %, bootstrap over photos and passes), and of each photo's fastest call, summed over the photos, which a busy machine
disturbs least. Exit code 1 if ours finds or reads fewer plates, or takes longer for a photo beyond the interval.

The peer: pip install --no-deps fast-alpr fast-plate-ocr open-image-models, and pip install pyyaml rich tqdm. Without it
ours is measured alone.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from jetson_det.runtime.geometry import box_iou
from jetson_det.runtime.images import read_image
from jetson_det.runtime.ops.average_precision import draw_weights, interval
from jetson_det.runtime.plates.alpr import Alpr, PlateReader, crop_plates, open_plate_detector
from jetson_det.runtime.plates.ocr import open_ocr

IOU = .5     # of a plate that was found
LIMIT = 1.0  # of ours over the peer's, for a photo: the interval must not lie above it
PEER_CONFIG = ("max_plate_slots", "alphabet", "pad_char", "img_height", "img_width", "keep_aspect_ratio",
               "interpolation", "image_color_mode")
PARTS = ("preprocess", "inference", "postprocess") # of the detector
STAGES = ("total", "detect", "read", "own")


class Photo(NamedTuple):
    "A photo with its plates."
    name: str
    image: np.ndarray
    boxes: np.ndarray # (N,4) xyxy
    texts: tuple


def read_photos(folder, names):
    "Photos that have labels."
    photos = []
    for name in names:
        labels = (Path(folder) / name).with_suffix(".txt")
        rows = [line.split("\t") for line in labels.read_text(encoding="utf-8").splitlines() if line.strip()]
        xywh = np.array([row[1:5] for row in rows], np.float32)
        boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
        photos.append(Photo(name, read_image(Path(folder) / name), boxes, tuple(row[5] for row in rows)))
    return photos


class Timed:
    "A function, with the seconds spent in it."
    def __init__(self, function):
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args):
        start = time.perf_counter()
        answer = self.function(*args)
        self.seconds += time.perf_counter() - start
        return answer


class Ours:
    "The package's pipeline."
    name = "ours"

    def __init__(self, alpr):
        self.alpr = alpr
        self.network = alpr.reader.ocr.infer = Timed(alpr.reader.ocr.infer)
        self.seconds = {}

    def __call__(self, image): # (boxes, texts)
        self.network.seconds = 0.0
        start = time.perf_counter()
        plates = self.alpr(image)
        self.seconds = {"total": time.perf_counter() - start, "detect": self.alpr.timings["detect"]}
        return [plate.box for plate in plates], [plate.text for plate in plates]

    def read_crops(self, crops): return [reading.text for reading in self.alpr.reader.ocr(crops)]


class Peer:
    "fast-alpr. Raises ImportError where it is not installed."
    name = "fast-alpr"

    def __init__(self, detector, ocr, model, threads):
        import onnxruntime
        from fast_alpr import ALPR
        from fast_alpr.base import BaseDetector
        from fast_alpr.default_ocr import DefaultOCR
        from open_image_models.detection.core.base import BoundingBox, DetectionResult
        peer = self
        self.seconds = {}

        class Detector(BaseDetector):
            "The same session, with the peer's kind of answer."
            def predict(self, frame):
                start = time.perf_counter()
                found = detector(frame)
                results = []
                for box, score in zip(found.boxes.tolist(), found.scores.tolist()):
                    corners = BoundingBox(*[int(round(v)) for v in box])
                    results.append(DetectionResult("plate", float(score), corners))
                peer.seconds["detect"] = time.perf_counter() - start
                return results

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "ocr.yaml"
            config.write_text(json.dumps({key: getattr(ocr.config, key) for key in PEER_CONFIG}), encoding="utf-8")
            reader = DefaultOCR(model_path=model, config_path=config, device="cpu", sess_options=options)
        graph = reader.ocr_model.model
        self.network = graph.run = Timed(graph.run)
        self._pad = ocr.config.pad_char
        self._alpr = ALPR(detector=Detector(), ocr=reader)

    def __call__(self, image): # (boxes, texts)
        self.network.seconds = 0.0
        start = time.perf_counter()
        results = self._alpr.predict(image)
        self.seconds["total"] = time.perf_counter() - start
        corners = [result.detection.bounding_box for result in results]
        return [(box.x1, box.y1, box.x2, box.y2) for box in corners], [self._text(result.ocr) for result in results]

    def read_crops(self, crops): return [self._text(self._alpr.ocr.predict(crop)) for crop in crops]
    def _text(self, reading): return reading.text.rstrip(self._pad)


def judge(photos, answers): # (plates found, read exactly, other boxes)
    "Against the labels."
    found = exact = others = 0
    for photo, (boxes, texts) in zip(photos, answers):
        boxes = np.array(boxes, np.float32).reshape(-1, 4)
        others += len(boxes)
        if not len(boxes): continue
        iou = box_iou(photo.boxes, boxes)
        for row, text in enumerate(photo.texts):
            best = int(iou[row].argmax())
            if iou[row, best] < IOU: continue
            found += 1
            others -= 1
            exact += texts[best] == text
    return found, exact, others


def exact_crops(photos, side):
    "How many labeled plates are read exactly from their labeled boxes."
    exact = 0
    for photo in photos:
        crops = crop_plates(photo.image, photo.boxes)
        texts = side.read_crops([crop for crop in crops if crop is not None])
        wanted = [text for text, crop in zip(photo.texts, crops) if crop is not None]
        exact += sum(a == b for a, b in zip(texts, wanted))
    return exact


def measure(photos, sides, rounds): # side -> stage -> (rounds, photos) ms; and the detector's parts
    "Interleaved."
    times = {side.name: {stage: np.zeros((rounds, len(photos))) for stage in STAGES} for side in sides}
    detector = sides[0].alpr.detector
    known = getattr(detector, "timings", None) or {}
    parts = {part: np.zeros((rounds, len(photos))) for part in PARTS if part in known}
    for turn in range(rounds):
        for k, photo in enumerate(photos):
            for side in sides if (turn + k) % 2 else sides[::-1]:
                side(photo.image)
                seconds = side.seconds
                seconds["read"] = seconds["total"] - seconds["detect"]
                seconds["own"] = seconds["read"] - side.network.seconds
                for stage, table in times[side.name].items(): table[turn, k] = seconds[stage] * 1e3
                if side is sides[0]:
                    for part, table in parts.items(): table[turn, k] = detector.timings[part] * 1e3
    return times, parts


def ratio_of(ours, theirs): # figures
    "Of all calls, with its interval, and of the fastest ones."
    rounds, count = ours.shape
    of_photos = draw_weights(count)
    of_passes = draw_weights(rounds, seed=1)
    sums = [np.einsum("dp,di,pi->d", of_passes, of_photos, table, optimize=True) for table in (ours, theirs)]
    return {"all": float(ours.sum() / theirs.sum()), "interval": interval(sums[0] / sums[1]),
            "fastest": float(ours.min(0).sum() / theirs.min(0).sum())}


def percentiles(table): # figures
    "Milliseconds a photo."
    return {"p50": float(np.percentile(table, 50)), "p95": float(np.percentile(table, 95)),
            "fastest": float(table.min(0).mean())}


def print_accuracy(photos, sides): # figures
    "What is found and read."
    plates = sum(len(photo.texts) for photo in photos)
    figures = {}
    answers = {}
    for side in sides:
        answers[side.name] = [side(photo.image) for photo in photos]
        found, exact, others = judge(photos, answers[side.name])
        crops = exact_crops(photos, side)
        figures[side.name] = {"plates": plates, "found": found, "exact": exact, "others": others, "exact_crops": crops}
        print("{:10} {} of {} plates found (IoU {:g}), {} other boxes; {} read exactly, {} from their labeled "
              "boxes".format(side.name, found, plates, IOU, others, exact, crops))
    if len(sides) == 2:
        texts = [[texts for _, texts in answers[side.name]] for side in sides]
        same = sum(a == b for a, b in zip(*texts))
        figures["same_texts"] = same
        print("the same texts on {} of {} photos".format(same, len(photos)))
    return figures


def print_times(times, parts): # figures
    "Milliseconds of each stage."
    figures = {}
    print("{:24}{:>10}{:>10}{:>10}".format("ms a photo", "p50", "p95", "fastest"))
    for name, stages in times.items():
        figures[name] = {stage: percentiles(table) for stage, table in stages.items()}
        if name == "ours": figures[name].update({part: percentiles(table) for part, table in parts.items()})
        for stage, row in figures[name].items():
            label = "{} {}".format(name, "detect, " + stage if stage in PARTS else stage)
            print("{:24}{p50:10.3f}{p95:10.3f}{fastest:10.3f}".format(label, **row))
    return figures


def print_ratios(times): # (figures, whether the limit holds)
    "Ours over the peer's."
    figures = {stage: ratio_of(*[stages[stage] for stages in times.values()]) for stage in STAGES}
    holds = figures["total"]["interval"][0] <= LIMIT
    for stage, row in figures.items():
        verdict = "   limit {:.2f}: {}".format(LIMIT, "ok" if holds else "MISSED") if stage == "total" else ""
        print("ours / {}, {:7} all calls {:.2f} (95 %: {:.2f} to {:.2f})   fastest calls {:.2f}{}".format(
            Peer.name, stage, row["all"], *row["interval"], row["fastest"], verdict))
    return figures, holds


def reads_as_many(accuracy):
    "Whether ours finds and reads as many plates as the peer."
    ours, peer = accuracy[Ours.name], accuracy[Peer.name]
    return all(ours[key] >= peer[key] for key in ("found", "exact", "exact_crops"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("JETSON_DET_DATA")
    parser.add_argument("--detector", help="plate detector, .onnx (needed)")
    parser.add_argument("--ocr", default=data and data + "/models/cct_xs_v1_global.onnx", help="reader, .onnx")
    parser.add_argument("--images", default=data and data + "/datasets/plates_eu", help="folder of photos and labels")
    parser.add_argument("--list", help="file with the names of the photos, one a line; none: all that have labels")
    parser.add_argument("--confidence", type=float, default=.4, help="of the detector")
    parser.add_argument("--rounds", type=int, default=20, help="interleaved passes")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime and OpenCV")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    if not (args.detector and args.ocr and args.images):
        return print("NOT RUN: two models and photos are needed: --detector ONNX --ocr ONNX --images DIR") or 0
    if args.list: names = Path(args.list).read_text(encoding="utf-8").split("\n")
    else: names = sorted(path.name for path in Path(args.images).glob("*.jpg") if path.with_suffix(".txt").is_file())
    photos = read_photos(args.images, [name.strip() for name in names if name.strip()])
    if not photos: parser.error("no photos with labels in {}".format(args.images))
    cv2.setNumThreads(args.threads)
    detector = open_plate_detector(args.detector, threads=args.threads)
    detector.confidence = args.confidence
    ocr = open_ocr(args.ocr, threads=args.threads)
    sides = [Ours(Alpr(detector, PlateReader(ocr, confidence=args.confidence, least=0.)))]
    try: sides.append(Peer(detector, ocr, args.ocr, args.threads))
    except ImportError as e:
        print("fast-alpr: NOT RUN: {}; pip install --no-deps fast-alpr fast-plate-ocr open-image-models, and "
              "pip install pyyaml rich tqdm".format(e))
    else: print(", ".join("{} {}".format(name, version(name))
                          for name in ("fast-alpr", "fast-plate-ocr", "open-image-models", "onnxruntime")))
    print("{} photos, {} passes, {} threads, confidence {:g}".format(
        len(photos), args.rounds, args.threads, args.confidence))
    figures = {"photos": len(photos), "rounds": args.rounds, "threads": args.threads}
    figures["accuracy"] = print_accuracy(photos, sides)  # warms both up
    times, parts = measure(photos, sides, args.rounds)
    figures["ms"] = print_times(times, parts)
    holds = True
    if len(sides) == 2:
        figures["ratio"], is_fast = print_ratios(times)
        holds = is_fast and reads_as_many(figures["accuracy"])
    if args.json: Path(args.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 0 if holds else 1


if __name__ == "__main__": sys.exit(main())
