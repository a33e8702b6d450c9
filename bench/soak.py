"""Many frames through a pipeline: is one lost, and does memory grow?

    PYTHONPATH=. python bench/soak.py --videos DIR [--frames 20000] [--json FILE]

The videos of a folder are played one after the other, again and again, as one source in file mode, through a small
ONNX file in ONNX Runtime, a tracker and an output that makes the row of each result. Resident memory is read each 500
frames; its growth is that from the median of the second tenth of the readings to that of the last. Exit code 1 for a
lost frame, or for a growth of 2 % or more. `PYTHONPATH=.`, as the ONNX file is one of the tests'.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from jetson_det.runtime.sessions import open_session
from jetson_det.runtime.stream.pipeline import Pipeline
from jetson_det.runtime.stream.result import result_row
from jetson_det.runtime.stream.sources import open_source
from jetson_det.runtime.stream.tracker import Tracker
from tests import onnx_files

LIMIT = .02


class Again:
    "Videos, one after the other and from the beginning again."
    name, live, fps = "soak", False, 25

    def __init__(self, paths, frames): self.paths, self.frames, self.given = paths, frames, 0

    def __iter__(self):
        while True:
            for path in self.paths:
                source = open_source(str(path))
                try:
                    for frame in source:
                        if self.given == self.frames: return
                        yield frame.image, self.given, self.given / self.fps
                        self.given += 1
                finally: source.close()

    def close(self): pass
    def __str__(self): return self.name


class Rows:
    "An output that counts, and reads the memory."
    def __init__(self): self.count, self.lost, self.memory = 0, 0, []

    def write(self, result):
        json.dumps(result_row(result))
        if result.index != self.count: self.lost += 1
        self.count += 1
        if self.count % 500 == 0: self.memory.append(resident_mb())

    def close(self): pass


def resident_mb():
    "Of this process."
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def small_session(folder):
    "An ONNX file that finds two objects in any image."
    boxes, scores, labels = onnx_files.finished()
    rows = np.concatenate([boxes, scores[:, None], labels[:, None]], 1)[None]
    path = onnx_files.write_graph(Path(folder) / "small.onnx", {"output0": rows})
    return open_session(path, "yolo26", classes="cat,dog", threads=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("JETSON_DET_DATA")
    parser.add_argument("--videos", default=data and data + "/videos", help="folder")
    parser.add_argument("--frames", type=int, default=20000)
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    paths = sorted(Path(args.videos).glob("*.mp4")) if args.videos else []
    if not paths: return print("NOT RUN: a folder with videos is needed: --videos DIR, or JETSON_DET_DATA") or 0
    source, rows = Again(paths, args.frames), Rows()
    with tempfile.TemporaryDirectory() as folder:
        summary = Pipeline(source, small_session(folder), [rows], tracker=Tracker()).run()
    print(summary)
    lost = source.given - rows.count + rows.lost + summary.dropped
    tenth = max(1, len(rows.memory) // 10)
    first = statistics.median(rows.memory[tenth:2 * tenth] or rows.memory or [0])
    last = statistics.median(rows.memory[-tenth:] or [0])
    growth = last / first - 1 if first else 0.0
    print("{} given, {} results, {} lost; memory {:.1f} -> {:.1f} MB, {:+.2%} (limit {:.0%})".format(
        source.given, rows.count, lost, first, last, growth, LIMIT))
    if args.json: Path(args.json).write_text(json.dumps({"lost": lost, "growth": growth, "mb": rows.memory}))
    return 1 if lost or growth >= LIMIT else 0


if __name__ == "__main__": sys.exit(main())
