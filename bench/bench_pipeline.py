"""What a pipeline costs over the bare session.

    python bench/bench_pipeline.py [--frames 100] [--milliseconds 30] [--json FILE]

A session that takes 30 ms a frame (half computed by numpy, half slept, as a network on an accelerator keeps a thread
waiting) runs over the same frames bare, in a `for` loop, and in a pipeline with tracker, zone and an output that makes
the row of each result. Passes are interleaved. Exit code 1 if the median of the rounds is over 5 % of a frame.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from jetson_det.runtime.geometry import Detections
from jetson_det.runtime.stream.pipeline import Pipeline
from jetson_det.runtime.stream.regions import read_regions
from jetson_det.runtime.stream.result import result_row
from jetson_det.runtime.stream.tracker import Tracker

LIMIT = .05
OBJECTS = 10


class Frames:
    "The same image again and again."
    name, live, fps = "bench", False, 30

    def __init__(self, count, image): self.count, self.image = count, image

    def __iter__(self):
        for k in range(self.count): yield self.image, k, k / self.fps

    def close(self): pass


class Working:
    "A session that takes its time and finds ten boxes that move."
    contract = SimpleNamespace(classes=("box",))
    confidence = .5

    def __init__(self, seconds):
        self.seconds = seconds
        self.calls = 0

    def __call__(self, image):
        start = time.perf_counter()
        while time.perf_counter() - start < self.seconds / 2: np.dot(np.ones((64, 64)), np.ones((64, 64)))
        left = self.seconds - (time.perf_counter() - start)
        if left > 0: time.sleep(left)
        self.calls += 1
        x = np.arange(OBJECTS) * 180 + self.calls % 60
        boxes = np.stack([x, x * 0 + 300, x + 100, x * 0 + 500], 1).astype(np.float32)
        return Detections(boxes, np.full(OBJECTS, .9, np.float32), np.zeros(OBJECTS, np.int64))


class Rows:
    "An output that makes a line of JSON of each result."
    def write(self, result): self.bytes = len(json.dumps(result_row(result)))
    def close(self): pass


def bare(count, image, seconds):
    "Seconds of a frame in a plain loop."
    session = Working(seconds)
    start = time.perf_counter()
    for _ in range(count): session(image)
    return (time.perf_counter() - start) / count


def piped(count, image, seconds):
    "Seconds of a frame in a pipeline."
    zone = read_regions([{"name": "yard", "zone": [[0, 0], [.5, 0], [.5, 1], [0, 1]]}])
    pipeline = Pipeline(Frames(count, image), Working(seconds), [Rows()], tracker=Tracker(), regions=zone)
    start = time.perf_counter()
    summary = pipeline.run()
    assert summary.results == count, summary
    return (time.perf_counter() - start) / count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100, help="of a pass")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved passes")
    parser.add_argument("--milliseconds", type=float, default=30, help="of the session")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    image = np.zeros((1080, 1920, 3), np.uint8)
    times = {"bare": [], "pipeline": []}
    for _ in range(args.rounds):
        times["bare"].append(bare(args.frames, image, args.milliseconds / 1e3) * 1e3)
        times["pipeline"].append(piped(args.frames, image, args.milliseconds / 1e3) * 1e3)
    over = [p / b - 1 for p, b in zip(times["pipeline"], times["bare"])]
    middle = statistics.median(over)
    print("{} rounds of {} frames of 1920x1080, {:.0f} ms each, {} objects".format(
        args.rounds, args.frames, args.milliseconds, OBJECTS))
    for name, ms in times.items(): print("{:10}{:8.2f} ms a frame (median)".format(name, statistics.median(ms)))
    print("pipeline over bare: min {:.1%} median {:.1%} max {:.1%} (limit {:.0%}: {})".format(
        min(over), middle, max(over), LIMIT, "MISSED" if middle > LIMIT else "ok"))
    if args.json: Path(args.json).write_text(json.dumps({"ms": times, "over": over}, indent=1), encoding="utf-8")
    return 1 if middle > LIMIT else 0


if __name__ == "__main__": sys.exit(main())
