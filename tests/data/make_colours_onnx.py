"""Makes colours.onnx, the detector of the runtime's tests: how blue, green or red is each 32x32 cell of a 256x320 input?

    python tests/data/make_colours_onnx.py

Needs the `onnx` package; the file is committed because a board's Python 3.6 has none. Batch open, IR 7 and opset 13,
which onnxruntime 1.10 reads.
"""
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from jetson_det.runtime.contract import METADATA_KEY, preset

CELL, SIZE = 32, (256, 320)


def cells():
    "Boxes of the cells, (A,4) xyxy."
    y, x = np.mgrid[:SIZE[0] // CELL, :SIZE[1] // CELL] * CELL
    return np.stack([x, y, x + CELL, y + CELL], -1).reshape(-1, 4).astype(np.float32)


def make(batch="batch"):
    "The model."
    contract = preset("yolox", ("Blue", "Green", "Red"), SIZE)._replace(name="colours", output="boxes_scores", confidence=.5)
    boxes, node, const = cells(), helper.make_node, lambda name, a: numpy_helper.from_array(np.asarray(a), name)
    weights = (np.eye(3) * 1.5 - .5).astype(np.float32)[:, :, None, None] / np.float32(255)
    info = helper.make_tensor_value_info
    graph = helper.make_graph([
        node("AveragePool", ["images"], ["mean"], kernel_shape=[CELL, CELL], strides=[CELL, CELL]),
        node("Conv", ["mean", "weights"], ["differences"]), node("Relu", ["differences"], ["planes"]),
        node("Reshape", ["planes", "flat"], ["columns"]), node("Transpose", ["columns"], ["scores"], perm=[0, 2, 1]),
        node("Shape", ["images"], ["shape"]), node("Gather", ["shape", "zero"], ["count"]),
        node("Concat", ["count", "tail"], ["wanted"], axis=0), node("Expand", ["cells", "wanted"], ["boxes"])],
        "colours", [info("images", TensorProto.FLOAT, [batch, 3] + list(SIZE))],
        [info("scores", TensorProto.FLOAT, [batch, len(boxes), 3]), info("boxes", TensorProto.FLOAT, [batch, len(boxes), 4])],
        [const("weights", weights), const("flat", np.int64([0, 3, -1])), const("zero", np.int64([0])),
         const("tail", np.int64(boxes.shape)), const("cells", boxes)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    helper.set_model_props(model, {METADATA_KEY: contract.to_json()})
    return model


if __name__ == "__main__":
    path = Path(__file__).with_name("colours.onnx")
    onnx.save(make(), str(path))
    print(path, path.stat().st_size, "bytes")
