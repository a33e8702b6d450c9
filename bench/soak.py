"""Many frames through a pipeline, and a camera that is cut: is a frame lost, and does memory grow?

    PYTHONPATH=. python bench/soak.py --videos DIR [--model yolox_nano.onnx] [--frames 20000] [--cuts 20] [--json FILE]

Three parts, each in a pipeline with a tracker, a zone and JSON lines as its output:

- `overlap`: a few hundred frames with a trace (`--trace FILE` keeps it for Chrome or Perfetto). The time of capture
  and output that falls into the network's own, by the trace, is said. At least half of it must.
- `files`: the videos of a folder, one after the other and again, each read by `Capture` in a child process in file
  mode, as one source. Each play must bring as many frames as OpenCV counts in the file, and the JSON lines must hold
  each frame once and in order.
- `stream`: an RTSP server with a moving test image is killed and started again so many times. The capture must come
  back each time, and leave no open file behind.

Memory is that of this process and of the capture's child together: what they have allocated, and the images between
them, without the pages of programs and libraries, which other processes may share. It depends on the size of the
frames; so it is compared over whole rounds, in which each video is played once (in the stream: two cuts). The first
round warms up. The growth from the median of the second round to that of the last must stay under 2 %; with fewer than
three rounds it is not judged. Exit code 1 where a claim fails. `PYTHONPATH=.`, as the server and the small ONNX file
that stands in for a missing `--model` are the tests'; with the small file `overlap` is said and not judged. Linux only.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from jetson_det.runtime.sessions import open_session
from jetson_det.runtime.stream.capture import Capture
from jetson_det.runtime.stream.pipeline import Pipeline
from jetson_det.runtime.stream.regions import read_regions
from jetson_det.runtime.stream.sinks import JsonLines
from jetson_det.runtime.stream.tracker import Tracker
from tests import onnx_files
from tests.rtsp_helpers import BINDINGS, PYTHON, RtspServer, quiet_call

LIMIT = .02        # growth of memory
LEAST_HIDDEN = .5  # of the time of capture and output
TRACED = 300       # frames
# FFmpeg looks at a stream for .1 s instead of 5. Of the stream alone: with nobuffer it skips the begin of a file.
FFMPEG_OPTIONS = "rtsp_transport;tcp|analyzeduration;100000|fflags;nobuffer"


class Again:
    "Videos, one after the other and from the beginning again, each in a child process."
    name, live, fps = "soak", False, 25

    def __init__(self, counts, frames, memory):
        self.counts = counts # path -> frames in the file
        self.frames = frames
        self.memory = memory
        self.given = 0
        self.plays = 0       # that came to their end
        self.short = 0       # frames that a play did not bring, or brought twice
        self.capture = None

    def __iter__(self):
        while True:
            for path, count in self.counts.items():
                self.capture = Capture(path)
                expected = 0
                for frame in self.capture:
                    if self.given == self.frames: return
                    self.short += frame.index != expected
                    expected += 1
                    yield frame.image, self.given, self.given / self.fps
                    self.given += 1
                    self.memory.read(self.capture.pid)
                self.short += abs(count - expected)
                self.plays += 1

    def close(self): self.capture.close()
    def __str__(self): return "{} videos".format(len(self.counts))


class Cut:
    "A camera whose server is killed and started again after so many frames."
    name, live, fps = "camera", True, 25

    def __init__(self, server, size, cuts, apart, memory):
        self.server = server
        self.size = size
        self.cuts = cuts
        self.apart = apart
        self.memory = memory
        self.capture = Capture(server.url, report=lambda line: None, stall_seconds=5, retry_seconds=(.05, .5))

    def __iter__(self):
        since = 0
        done = 0
        for frame in self.capture:
            yield frame
            self.memory.read(self.capture.pid)
            since += 1
            if since < self.apart or self.capture.reconnects < done: continue
            if done == self.cuts: return
            since = 0
            done += 1
            self.server.cut()
            self._wait_until_lost()
            self.server.start(self.size)

    def _wait_until_lost(self):
        "Else the new server may be there before the loss is seen."
        end = time.monotonic() + 30
        while self.capture.state != "lost" and time.monotonic() < end: time.sleep(.01)

    @property
    def dropped(self): return self.capture.dropped
    def close(self): self.capture.close()
    def __str__(self): return self.name


class Memory:
    "Readings of this process and the capture's child, one each so many frames that the capture brings."
    def __init__(self, every, whole_round):
        self.every = max(1, every)
        self.whole_round = whole_round # frames
        self.frames = 0
        self.readings = []             # (frame, MB)

    def read(self, child):
        "Where it is time."
        self.frames += 1
        if self.frames % self.every: return
        try: self.readings.append((self.frames, allocated_mb("self") + allocated_mb(child)))
        except OSError: pass # between two children there is none

    def growth(self): # (MB of the second round, MB of the last one, share); None: too few rounds
        "Of medians."
        if self.frames < 3 * self.whole_round: return None
        frames, mb = np.array(self.readings).T
        number = (frames - 1) // self.whole_round
        first = float(np.median(mb[number == 1]))
        last = float(np.median(mb[frames > self.frames - self.whole_round]))
        return first, last, last / first - 1


def allocated_mb(pid):
    "Anonymous and shared memory of a process, the latter in proportion. Raises OSError for one that is gone."
    lines = Path("/proc/{}/smaps_rollup".format(pid)).read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:", "SwapPss:"))) / 1e3


def count_frames(path):
    "As OpenCV reads them."
    capture = cv2.VideoCapture(str(path))
    count = 0
    while capture.grab(): count += 1
    capture.release()
    return count


def open_model(model, contract, folder):
    "The session; without a model an ONNX file that finds the same objects in any image."
    if model: return open_session(model, contract or None, threads=1)
    boxes, scores, labels = onnx_files.finished()
    rows = np.concatenate([boxes, scores[:, None], labels[:, None]], 1)[None]
    path = onnx_files.write_graph(Path(folder) / "small.onnx", {"output0": rows})
    return open_session(path, "yolo26", classes="cat,dog", threads=1)


def run_pipeline(source, session, path, **options): # summary
    "The pipeline that all parts use."
    zone = read_regions([{"name": "left half", "zone": [[0, 0], [.5, 0], [.5, 1], [0, 1]]}])
    lines = JsonLines(path, max_bytes=1 << 30, weekly=False)
    return Pipeline(source, session, [lines], tracker=Tracker(), regions=zone, **options).run()


def lost_rows(path, count): # (rows, rows that are missing, twice or out of order)
    "What the JSON lines lack."
    with open(path, encoding="utf-8") as file: indices = [json.loads(line)["frame"] for line in file]
    wrong = sum(index != place for place, index in enumerate(indices))
    return len(indices), wrong + abs(count - len(indices))


def both_seconds(spans): # of two threads, (begin, end)
    "How long both work."
    changes = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    both = 0.0
    depth = 0
    for (at, change), (following, _) in zip(changes, changes[1:]):
        depth += change
        if depth >= 2: both += following - at
    return both


def read_trace(path): # figures
    "Which part of capture's and output's time falls into the network's."
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    start = min(event["ts"] for event in events if event["name"] == "detect") # before it the source is opened
    spans = {}
    for event in events:
        if event["ts"] < start: continue
        span = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
        spans.setdefault(event["name"], []).append(span)
    seconds = {name: sum(end - begin for begin, end in of_stage) for name, of_stage in spans.items()}
    others = {name: both_seconds(spans["detect"] + spans[name]) for name in ("capture", "output")}
    return {
        "wall_s": max(end for _, end in sum(spans.values(), [])) - min(begin for begin, _ in sum(spans.values(), [])),
        "stages_s": seconds,
        "hidden": sum(others.values()) / sum(seconds[name] for name in others)
    }


def overlap(args, session, counts, folder): # figures, whether the claim holds
    "The stages' overlap, by a trace."
    path = Path(args.trace or Path(folder) / "trace.json")
    source = Again(counts, TRACED, Memory(TRACED, TRACED))
    run_pipeline(source, session, Path(folder) / "overlap.jsonl", trace=path)
    figures = read_trace(path)
    stages = figures["stages_s"]
    holds = not args.model or figures["hidden"] >= LEAST_HIDDEN
    print("overlap: {} frames in {:.1f} s; {}: {:.1f} s in all; {:.0%} of capture and output while the network works "
          "({})".format(TRACED, figures["wall_s"],
                        ", ".join("{} {:.2f}".format(name, stages[name]) for name in sorted(stages)),
                        sum(stages.values()), figures["hidden"],
                        "limit {:.0%}: {}".format(LEAST_HIDDEN, "ok" if holds else "MISSED")
                        if args.model else "not judged without a model"))
    return figures, holds


def memory_line(memory): # (line, figures, whether the claim holds)
    "The growth, judged."
    growth = memory.growth()
    figures = {"readings": memory.readings, "round": memory.whole_round}
    if growth is None:
        return "memory not judged: fewer than {} frames".format(3 * memory.whole_round), figures, True
    first, last, share = growth
    holds = share < LIMIT
    line = "memory {:.1f} -> {:.1f} MB, {:+.2%} (limit {:.0%}: {})".format(first, last, share, LIMIT,
                                                                         "ok" if holds else "MISSED")
    return line, dict(figures, first_mb=first, last_mb=last, growth=share), holds


def files(args, session, counts, folder): # figures, whether the claims hold
    "Videos in file mode."
    memory = Memory(50, sum(counts.values()))
    source = Again(counts, args.frames, memory)
    path = Path(folder) / "files.jsonl"
    summary = run_pipeline(source, session, path)
    rows, wrong = lost_rows(path, args.frames)
    lost = wrong + source.short + summary.dropped
    line, figures, holds = memory_line(memory)
    print("files: {}".format(summary))
    print("files: {} frames given, {} rows, {} videos played whole, {} lost ({}); {}".format(
        source.given, rows, source.plays, lost, "MISSED" if lost else "ok", line))
    return dict(figures, given=source.given, rows=rows, lost=lost, seconds=summary.seconds), holds and not lost


def stream(args, session, folder): # figures, whether the claims hold
    "A camera that is cut."
    os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = FFMPEG_OPTIONS
    size = 360, 640
    open_files = len(os.listdir("/proc/self/fd"))
    with RtspServer(size) as server:
        at_server = len(os.listdir("/proc/self/fd")) - open_files
        memory = Memory(args.apart // 10, 2 * args.apart)
        source = Cut(server, size, args.cuts, args.apart, memory)
        path = Path(folder) / "stream.jsonl"
        summary = run_pipeline(source, session, path)
        left_open = len(os.listdir("/proc/self/fd")) - open_files - at_server
    with open(path, encoding="utf-8") as file: indices = [json.loads(line)["frame"] for line in file]
    rises = indices == sorted(set(indices))
    came_back = source.capture.reconnects
    holds = came_back == args.cuts and rises and len(indices) == summary.frames and not left_open
    line, figures, is_flat = memory_line(memory)
    print("stream: {}".format(summary))
    print("stream: cut {} times, back {} times, {} rows of {} frames, {}, {} files left open ({}); {}".format(
        args.cuts, came_back, len(indices), summary.frames, "numbers rise" if rises else "numbers do NOT rise",
        left_open, "ok" if holds else "MISSED", line))
    return dict(figures, cuts=args.cuts, reconnects=came_back, rows=len(indices), frames=summary.frames,
                left_open=left_open, seconds=summary.seconds), holds and is_flat


def main():
    data = os.environ.get("JETSON_DET_DATA")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", default=data and data + "/videos", help="folder of .mp4")
    parser.add_argument("--model", default=data and data + "/models/yolox_nano_coco_416.onnx",
                        help="artifact; '': a small ONNX file that always finds the same")
    parser.add_argument("--contract", default="yolox", help="of the model; '': the one in its metadata")
    parser.add_argument("--frames", type=int, default=20000, help="of the videos")
    parser.add_argument("--cuts", type=int, default=20, help="0: no stream")
    parser.add_argument("--apart", type=int, default=100, help="frames between two cuts")
    parser.add_argument("--trace", help="file for the trace of the first part")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    counts = {path: count_frames(path) for path in sorted(Path(args.videos).glob("*.mp4"))} if args.videos else {}
    if not counts: return print("NOT RUN: a folder with videos is needed: --videos DIR, or JETSON_DET_DATA") or 0
    figures = {}
    claims = []
    with tempfile.TemporaryDirectory() as folder:
        session = open_model(args.model, args.contract, folder)
        parts = {"overlap": lambda: overlap(args, session, counts, folder),
                 "files": lambda: files(args, session, counts, folder)}
        if args.cuts and not quiet_call(PYTHON, "-c", BINDINGS): parts["stream"] = lambda: stream(args, session, folder)
        elif args.cuts: print("stream: NOT RUN: no RTSP server: apt-get install gir1.2-gst-rtsp-server-1.0 python3-gi "
                              "gstreamer1.0-plugins-ugly")
        for name, part in parts.items():
            figures[name], holds = part()
            claims.append(holds)
    if args.json: Path(args.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 0 if all(claims) else 1


if __name__ == "__main__": sys.exit(main())
