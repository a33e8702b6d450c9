"""The files of the latency model, made again: python tools/latency_files.py

latency_layers.json: the layers of the networks of the zoo and of the published rows, taken on the meta device. It needs
the packages that define them: ultralytics (AGPL-3.0) and torchvision.
latency_model.json: the parameters, fitted on latency_rows.json with these layers.
"""
import importlib
import json
from pathlib import Path

import torch

from jetson_det.export.latency import fit_model, layer_tables, measurements
from jetson_det.export.layers import layer_table, torch_layers
from jetson_det.models.ultralytics.package import ultralytics_tasks
from jetson_det.models.zoo import MODELS, create_model
from jetson_det.runtime.files import write_bytes_atomic

FOLDER = Path(__file__).resolve().parent.parent / "jetson_det/export"


def anchor_points_without_values(features, strides, offset=.5):
    "Of the right shape; Ultralytics' own function reads the strides, which have no values on the meta device."
    points = sum(f.shape[2]*f.shape[3] for f in features)
    return torch.zeros(points, 2, device="meta"), torch.zeros(points, 1, device="meta")


def build_network(name):
    "A network whose weights do not matter, with its decoding where it is one of ours."
    if name in MODELS:
        model = create_model(name, [str(i) for i in range(80)])
        model.forward = lambda images, forward=model.forward: model.decode(forward(images))
        return model
    if name.startswith("yolo"):
        tasks = ultralytics_tasks()
        importlib.import_module("ultralytics.nn.modules.head").make_anchors = anchor_points_without_values
        return tasks.DetectionModel(name + ".yaml", verbose=False, ch=3).fuse(verbose=False)
    with torch.device("meta"): return getattr(importlib.import_module("torchvision").models, name)()


def build_tables(names):
    "`latency_layers.json` as text: a line a layer."
    lines = []
    for name in names:
        grows = name.startswith(("yolo", "rtdetr", "dfine"))
        side = 640 if grows else 224
        first = torch_layers(build_network(name), (side, side))
        second = torch_layers(build_network(name), (2*side, 2*side)) if grows else None
        rows = [json.dumps(row, separators=(",", ":")) for row in layer_table(first, side, second).to_rows()]
        lines.append(f'{json.dumps(name)}: {{"side": {side}, "layers": [\n' + ",\n".join(rows) + "]}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main():
    names = {one.model for one in measurements() if not one.left_out} | set(MODELS)
    write_bytes_atomic(FOLDER / "latency_layers.json", build_tables(sorted(names)).encode("ascii"))
    layer_tables.cache_clear()
    write_bytes_atomic(FOLDER / "latency_model.json", fit_model().to_json().encode("ascii"))


if __name__ == "__main__":
    main()
