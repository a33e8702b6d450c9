"""One network of each family in ONNX Runtime: how long the network takes, and how long everything beside it.

    python bench/bench_families.py [--size 640] [--threads 2] [--rounds 12] [--names yolox-nano dfine-n] [--json FILE]

Each network has random weights, is exported as `jetson-det export` does it, and is fed generated scenes. Rounds are
interleaved: each round runs every network on the same scene. Printed are the median milliseconds of a frame in
`session.run`, those of letterbox, decoding and NMS, and the ratio to YOLOX-nano's network in the same round (minimum,
median, maximum). Exit code 1 where everything beside the network takes more than a tenth of the network's time.

The networks are the smallest of their families but for RT-DETR, whose smallest is R18: the ratios compare these files
on a CPU, not the families, and say nothing of a GPU.
"""
import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from jetson_det.export.onnx import export_onnx
from jetson_det.models.zoo import create_model
from jetson_det.runtime.sessions import open_session
from jetson_det.scenes.docks import dock_scene

NAMES = ("yolox-nano", "yolov8n", "yolo11n", "yolo11n-p2-lite", "yolo26n", "dfine-n", "rtdetr-r18", "rtdetrv2-r18")
LIMIT = .1 # of the network's time


def exported(name, size, folder):
    "An ONNX file of random weights."
    torch.manual_seed(0)
    path = Path(folder)/f"{name}.onnx"
    export_onnx(create_model(name, ["Sack", "Person"]).eval(), path, (size, size))
    return path


def measure(sessions, frames):
    "name -> [(milliseconds in the network, beside it)], one a frame, the networks in turns."
    found = {name: [] for name in sessions}
    for frame in frames:
        for name, session in sessions.items():
            session(frame)
            seconds = session.timings
            found[name].append((1000*seconds["inference"], 1000*(seconds["preprocess"] + seconds["postprocess"])))
    return found


def rows(found):
    "A dict a network."
    first = next(iter(found))
    table = []
    for name, times in found.items():
        ratios = [own[0]/base[0] for own, base in zip(times, found[first])]
        network, beside = (statistics.median(column) for column in zip(*times))
        table.append(dict(name=name, network_ms=round(network, 2), beside_ms=round(beside, 2),
                          ratio=[round(f(ratios), 2) for f in (min, statistics.median, max)]))
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--names", nargs="+", default=NAMES)
    parser.add_argument("--json")
    args = parser.parse_args()
    frames = [dock_scene(k, (720, 1280))[0] for k in range(args.rounds + 2)]
    with tempfile.TemporaryDirectory() as folder:
        sessions = {name: open_session(exported(name, args.size, folder), threads=args.threads) for name in args.names}
        measure(sessions, frames[:2]) # warm
        table = rows(measure(sessions, frames[2:]))
    print(f"input {args.size}x{args.size}, {args.threads} threads, {args.rounds} frames of 1280x720")
    print(f"{'':<18}{'network ms':>12}{'beside ms':>12}   ratio to {args.names[0]}: min, median, max")
    for row in table:
        print(f"{row['name']:<18}{row['network_ms']:>12}{row['beside_ms']:>12}   {row['ratio']}")
    if args.json: Path(args.json).write_text(json.dumps(table, indent=1))
    slow = [row["name"] for row in table if row["beside_ms"] > LIMIT*row["network_ms"]]
    if slow: print(f"over {LIMIT:.0%} of the network's time beside it: {', '.join(slow)}")
    sys.exit(bool(slow))


if __name__ == "__main__": main()
