"""Opening and checking datasets: seconds and megabytes against limits.

    python bench/bench_data.py [--only scale,xml,check] [--rounds N] [--json FILE]

`scale` generates a set of COCO's size (120,000 images of which each is a small real JPEG, 860,000 boxes, 80 classes,
outlines as large as COCO's) and opens it in fresh processes, first as it comes and then from the index kept of it;
and the same labels as one JSON file without any image. Seconds are those of the whole process, from the start of
Python on; megabytes are its largest resident set. `xml` reads bccd's 364 XML files, `check` checks raccoon with its
images decoded and hashed and nothing remembered; both need JETSON_DET_DATA. Rounds are interleaved; printed are
minimum, median, maximum, and the median has to hold the limit. Exit code 1 if one does not.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from jetson_det.data.quality.check import check_dataset
from jetson_det.data.formats.registry import read_dataset

LIMITS = {
    "first open, s": 15, "first open, MB": 1500, "from the index, s": 1, "from the index, MB": 200, "bccd's XML, s": .3,
    "raccoon checked, images/s": 150
}
LEAST = {"raccoon checked, images/s"}  # at least so many; of all others at most

OPEN = """
import json, sys
from jetson_det.data.index import read_indexed
said = []
ds = read_indexed(sys.argv[1], say=said.append)
try: kb = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
except OSError: kb = __import__("resource").getrusage(0).ru_maxrss
print(json.dumps([len(ds), len(ds.boxes), ds.fingerprint(), bool(said), kb / 1024]))
"""


def image_records(rng, n):
    "JSON of n images of four sizes, their ids and sizes."
    sizes = np.array([(480, 640), (640, 480), (427, 640), (333, 500)])[rng.integers(0, 4, n)]
    ids = np.sort(rng.choice(6 * n, n, replace=False))
    address = "http://images.cocodataset.org/train2017/"
    return ids, sizes, ",".join(
        f'{{"license": 3, "file_name": "{i:012}.jpg", "coco_url": "{address}{i:012}.jpg", "height": {h}, "width": {w}, '
        f'"date_captured": "2013-11-14 11:18:45", "id": {i}}}' for i, (h, w) in zip(ids.tolist(), sizes.tolist()))


def write_labels(file, ids, images, rng, boxes, classes=80):
    "COCO JSON with an outline of 25 points for each box."
    categories = np.sort(rng.choice(np.arange(1, 91), classes, replace=False))
    outline = ", ".join(f"{v:.2f}" for v in rng.random(50) * 400)
    columns = [np.sort(rng.choice(ids, boxes)), rng.choice(categories, boxes), (rng.random(boxes) < .01).astype(int)]
    xywh = rng.random((boxes, 4)) * 200 + 1
    with open(file, "w", encoding="utf-8") as f:
        f.write(f'{{"info": {{"year": 2017}}, "images": [{images}], "annotations": [')
        for s in range(0, boxes, 20_000):
            rows = zip(range(s, s + 20_000), *(c[s:s + 20_000].tolist() for c in columns), xywh[s:s + 20_000].tolist())
            f.write(","*(s > 0) + ",".join(
                f'{{"segmentation": [[{outline}]], "area": {w * h:.4f}, "iscrowd": {crowd}, "image_id": {i}, '
                f'"bbox": [{x:.2f}, {y:.2f}, {w:.2f}, {h:.2f}], "category_id": {c}, "id": {k}}}'
                for k, i, c, crowd, (x, y, w, h) in rows))
        f.write('], "categories": [' +
                ",".join(f'{{"supercategory": "thing", "id": {c}, "name": "class {c}"}}' for c in categories) + "]}")


def generate(root, images, boxes):
    "A folder like COCO's, and the same labels alone; both paths."
    rng = np.random.default_rng(0)
    folder = root / "coco"
    alone = root / "alone"
    for made in (folder / "annotations", folder / "train2017", alone): made.mkdir(parents=True)
    ids, sizes, records = image_records(rng, images)
    write_labels(folder / "annotations/instances_train2017.json", ids, records, rng, boxes)
    os.link(folder / "annotations/instances_train2017.json", alone / "labels.json")
    picture = {
        size: cv2.imencode(".jpg", np.full((*size, 3), 127, np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 30])[1].tobytes()
        for size in map(tuple, sizes[:200].tolist())
    }
    kept = {}
    for k, (i, size) in enumerate(zip(ids.tolist(), map(tuple, sizes.tolist()))):
        path = folder / f"train2017/{i:012}.jpg"
        if (size, k // 20_000) in kept: os.link(kept[size, k // 20_000], path)
        else:
            path.write_bytes(picture[size])
            kept[size, k // 20_000] = path
    return {"images and labels": folder, "labels alone": alone / "labels.json"}


def opened(path, cache):
    "Open a dataset in a fresh process: what it said of itself, and seconds."
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", OPEN, str(path)],
                          capture_output=True,
                          text=True,
                          env=dict(os.environ, JETSON_DET_CACHE=str(cache)))
    seconds = time.perf_counter() - start
    if done.returncode: raise SystemExit(done.stderr)
    return json.loads(done.stdout), seconds


def scale(rounds, args):
    "First open and open from the index, in turn."
    out = {}
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        sets = generate(root, args.images, args.boxes)
        for r in range(rounds):
            for name, path in sets.items():
                (n, m, first, found, mb), seconds = opened(path, root / f"cache{r}")
                (_, _, again, kept, mb2), seconds2 = opened(path, root / f"cache{r}")
                if (n, m, found, kept) != (args.images, args.boxes, False, True) or first != again:
                    raise SystemExit(f"{name}: the index gave another dataset, or none")
                for key, value in (("first open, s", seconds), ("first open, MB", mb), ("from the index, s", seconds2),
                                   ("from the index, MB", mb2)):
                    out.setdefault(f"{name}: {key}", []).append(value)
    return out


def xml(rounds, data):
    "Seconds to read bccd."
    def once():
        start = time.perf_counter()
        ds = read_dataset(data / "bccd")
        if len(ds.boxes) != 4888: raise SystemExit(f"bccd: {len(ds.boxes)} boxes")
        return time.perf_counter() - start
    return {"bccd's XML, s": [once() for _ in range(2 * rounds + 1)][1:]}


def check(rounds, data):
    "Images a second in a check of raccoon."
    def once():
        with tempfile.TemporaryDirectory() as cache:
            os.environ["JETSON_DET_CACHE"] = cache
            start = time.perf_counter()
            report = check_dataset(data / "raccoon")
            return len(report.ds) / (time.perf_counter() - start)
    return {"raccoon checked, images/s": [once() for _ in range(rounds + 1)][1:]}


def report(figures):
    "Print minimum, median and maximum of each; the limits that were missed."
    missed = []
    print(f"{'':46}{'min':>9}{'median':>9}{'max':>9}   limit")
    for name, values in figures.items():
        middle = statistics.median(values)
        kind = name.split(": ")[-1]
        limit = LIMITS[kind]
        least = kind in LEAST
        print(
            f"{name:46}{min(values):9.2f}{middle:9.2f}{max(values):9.2f}   {'at least' if least else 'at most'}"
            f" {limit:g}"
        )
        if middle < limit if least else middle > limit:
            missed.append(f"{name}: {middle:.2f}, {'at least' if least else 'at most'} {limit:g}")
    return missed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="scale,xml,check", help="which measures, separated by commas")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each")
    parser.add_argument("--images", type=int, default=120_000, help="images of the generated set")
    parser.add_argument("--boxes", type=int, default=860_000, help="boxes of the generated set")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    data = os.environ.get("JETSON_DET_DATA")
    figures = {}
    for name in args.only.split(","):
        if name == "scale": figures.update(scale(args.rounds, args))
        elif not data: print(f"{name} is not measured: set JETSON_DET_DATA to the folder of real data")
        else: figures.update({"xml": xml, "check": check}[name](args.rounds, Path(data) / "datasets"))
    missed = report(figures)
    if args.json: Path(args.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print("\n" + ("MISSED: " + "; ".join(missed) if missed else "limits held"))
    return 1 if missed else 0


if __name__ == "__main__": sys.exit(main())
