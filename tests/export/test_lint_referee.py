"""The lint's "TensorRT 11 takes it" against a real parser and builder: TensorRT-RTX, of the extra [lint-check]. It has
the parser and the strong typing of TensorRT 11, builds without a GPU, and is not a Jetson's TensorRT."""
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from referee import needs_referee, takes

from jetson_det.export.lint import lint

needs_referee()
FLOAT, BYTES, DOUBLE, LONG = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.DOUBLE, TensorProto.INT64


def node(operator, inputs, outputs, **attributes):
    return helper.make_node(operator, inputs, outputs, operator.lower(), **attributes)


IMAGE, ROW = ("x", FLOAT, [1, 3, 16, 16]), ("x", FLOAT, [1, 4000])
BOXES, SCORES = ("b", FLOAT, [1, 50, 4]), ("s", FLOAT, [1, 3, 50])
NMS = [("k", np.array([10])), ("i", np.float32([.5])), ("t", np.float32([.1]))]
SCALES = [("sc", np.float32([1, 1, 2, 2]))]
STEP = [("s", np.float32(.1))]
# name: nodes, inputs, outputs, weights, opset (17). What is taken is written below.
GRAPHS = {
    "TopK of 3840": ([node("TopK", ["x", "k"], ["v", "i"])], [ROW], ["v"], [("k", np.array([3840]))]),
    "TopK of 3841": ([node("TopK", ["x", "k"], ["v", "i"])], [ROW], ["v"], [("k", np.array([3841]))]),
    "TopK of an input": ([node("TopK", ["x", "k"], ["v", "i"])], [ROW, ("k", LONG, [1])], ["v"], []),
    "TopK of sizes": ([node("Shape", ["x"], ["n"]), node("Gather", ["n", "one"], ["n1"]),
                       node("Div", ["n1", "ten"], ["k"]), node("TopK", ["x", "k"], ["v", "i"])], [ROW], ["v"],
                      [("one", np.array([1])), ("ten", np.array([10]))]),
    "NMS": ([node("NonMaxSuppression", ["b", "s", "k", "i", "t"], ["o"])], [BOXES, SCORES], ["o"], NMS),
    "unknown domain": ([node("Frobnicate", ["x"], ["o"], domain="my")], [ROW], ["o"], []),
    "Unique": ([node("Unique", ["x"], ["o"])], [ROW], ["o"], []),
    "Det": ([node("Det", ["x"], ["o"])], [("x", FLOAT, [1, 4, 4])], ["o"], []),
    "NonZero": ([node("NonZero", ["x"], ["o"])], [ROW], ["o"], []),
    "plugin": ([node("EfficientNMS_TRT", ["b", "s"], ["n", "bb", "ss", "l"], domain="TRT_PLUGINS", plugin_version="1",
                     background_class=-1, box_coding=0, score_activation=0, iou_threshold=.5, score_threshold=.1,
                     max_output_boxes=10)], [BOXES, ("s", FLOAT, [1, 50, 3])], ["n"], []),
    "float64": ([node("Add", ["x", "w"], ["o"])], [("x", DOUBLE, [1, 4])], ["o"], [("w", np.ones(4))]),
    "Reshape by an input": ([node("Reshape", ["x", "n"], ["o"])], [ROW, ("n", LONG, [2])], ["o"], []),
    "Reshape by values": ([node("Cast", ["y"], ["n"], to=LONG), node("Reshape", ["x", "n"], ["o"])],
                          [ROW, ("y", FLOAT, [2])], ["o"], []),
    "bytes, cast": ([node("Cast", ["x"], ["f"], to=FLOAT), node("Relu", ["f"], ["o"])], [("x", BYTES, [1, 8, 8, 3])],
                    ["o"], []),
    "bytes, turned": ([node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]), node("Cast", ["t"], ["o"], to=FLOAT)],
                      [("x", BYTES, [1, 8, 8, 3])], ["o"], []),
    "cubic": ([node("Resize", ["x", "", "sc"], ["o"], mode="cubic")], [IMAGE], ["o"], SCALES),
    "antialias": ([node("Resize", ["x", "", "sc"], ["o"], mode="linear", antialias=1)], [IMAGE], ["o"], SCALES, 18),
    "crop": ([node("Resize", ["x", "r", "sc"], ["o"], mode="linear",
                   coordinate_transformation_mode="tf_crop_and_resize")], [IMAGE], ["o"],
             [("r", np.float32([0, 0, 0, 0, 1, 1, 1, 1])), *SCALES]),
    "Einsum": ([node("Einsum", ["x", "y"], ["o"], equation="...ij,...jk->...ik")],
               [("x", FLOAT, [2, 3, 4]), ("y", FLOAT, [2, 4, 5])], ["o"], []),
    "GridSample": ([node("GridSample", ["x", "g"], ["o"], mode="bilinear")], [IMAGE, ("g", FLOAT, [1, 8, 8, 2])], ["o"],
                   [], 16),
    "DeformConv": ([node("DeformConv", ["x", "w", "of"], ["o"])], [IMAGE, ("of", FLOAT, [1, 18, 14, 14])], ["o"],
                   [("w", np.ones((2, 3, 3, 3), np.float32))], 19),
    "MaxPool indices": ([node("MaxPool", ["x"], ["o", "i"], kernel_shape=[2, 2])], [IMAGE], ["o", "i"], []),
    "MaxPool dilated": ([node("MaxPool", ["x"], ["o"], kernel_shape=[2, 2], dilations=[2, 2])], [IMAGE], ["o"], []),
    "dynamic INT8": ([node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
                      node("DequantizeLinear", ["q", "s", "z"], ["o"])], [ROW], ["o"], []),
    "Q/DQ": ([node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["o"])], [ROW],
             ["o"], [*STEP, ("z", np.int8(0))]),
    "Q/DQ, zero point": ([node("QuantizeLinear", ["x", "s", "z"], ["q"]),
                          node("DequantizeLinear", ["q", "s", "z"], ["o"])], [ROW], ["o"], [*STEP, ("z", np.int8(3))]),
    "LayerNorm, two outputs": ([node("LayerNormalization", ["x", "w"], ["o", "m"])], [("x", FLOAT, [1, 4, 8])],
                               ["o", "m"], [("w", np.ones(8, np.float32))]),
    "ScatterND, add": ([node("ScatterND", ["x", "i", "u"], ["o"], reduction="add")],
                       [("x", FLOAT, [4, 4]), ("i", LONG, [2, 1]), ("u", FLOAT, [2, 4])], ["o"], [], 18),
    "text": ([node("Identity", ["x"], ["o"])], [("x", TensorProto.STRING, [1])], ["o"], []),
    "two types": ([node("Add", ["x", "w"], ["o"])], [("x", TensorProto.FLOAT16, [1, 4])], ["o"],
                  [("w", np.ones(4, np.float32))]),
    "RoiAlign": ([node("RoiAlign", ["x", "r", "b"], ["o"], output_height=2, output_width=2)],
                 [IMAGE, ("r", FLOAT, [4, 4])], ["o"], [("b", np.zeros(4, np.int64))]),
    "16 bits in": ([node("Cast", ["x"], ["o"], to=FLOAT)], [("x", TensorProto.UINT16, [1, 4])], ["o"], []),
    "signed 16 bits in": ([node("Cast", ["x"], ["o"], to=FLOAT)], [("x", TensorProto.INT16, [1, 4])], ["o"], []),
    "16 bits as weights": ([node("Cast", ["w"], ["f"], to=FLOAT), node("Add", ["x", "f"], ["o"])],
                           [("x", FLOAT, [1, 4])], ["o"], [("w", np.uint16([1, 2, 3, 4]))]),
    "32 bits in": ([node("Cast", ["x"], ["o"], to=FLOAT)], [("x", TensorProto.INT32, [1, 4])], ["o"], []),
    "bits": ([node("BitwiseAnd", ["x", "x"], ["o"])], [("x", TensorProto.INT32, [1, 4])], ["o"], [], 18),
}
# what each side is known to say: a referee that refuses all, or a lint that does, would agree with itself
TAKEN = {"TopK of 3840", "TopK of sizes", "float64", "bytes, cast", "cubic", "Einsum", "GridSample", "Q/DQ",
         "32 bits in"}
KINDS = {"o": FLOAT, "v": FLOAT, "i": LONG, "n": TensorProto.INT32, "m": FLOAT}
RESULT_KINDS = {"NMS": LONG, "NonZero": LONG, "float64": DOUBLE, "text": TensorProto.STRING, "bits": TensorProto.INT32}


@pytest.mark.parametrize("name", GRAPHS)
def test_lint_and_referee_agree(tmp_path, name):
    nodes, inputs, outputs, weights, *opset = GRAPHS[name]
    ends = [helper.make_tensor_value_info(o, RESULT_KINDS.get(name, KINDS[o]), None) for o in outputs]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info(*i) for i in inputs], ends,
                              [numpy_helper.from_array(np.asarray(value), key) for key, value in weights])
    opsets = [("", opset[0] if opset else 17)] + [(n.domain, 1) for n in nodes if n.domain]
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid(*o) for o in opsets], ir_version=8)
    (tmp_path / "m.onnx").write_bytes(data.SerializeToString())
    report = lint(tmp_path / "m.onnx", tensorrt="11.4", precision="fp32")
    assert takes(data.SerializeToString()) == report.takes == (name in TAKEN), report.findings
