"export.graph: sizes that a graph computes from shapes are known, as ONNX Runtime computes them."
import numpy as np
import onnxruntime
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from jetson_det.export.graph import read_onnx

F = TensorProto.FLOAT


def model_of(batch, height, width):
    "A Reshape whose target is computed from a shape, as exporters write it."
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["features"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Shape", ["features"], ["shape"], "shape"),
        helper.make_node("Gather", ["shape", "first"], ["batch_size"], "gather"),
        helper.make_node("Concat", ["batch_size", "rest"], ["target"], "concat", axis=0),
        helper.make_node("Reshape", ["features", "target"], ["boxes"], "reshape"),
    ]
    constants = dict(weight=np.ones((4, 3, 3, 3), np.float32), first=np.array([0]), rest=np.array([4, -1]))
    graph = helper.make_graph(
        nodes, "computed", [helper.make_tensor_value_info("images", F, [batch, 3, height, width])],
        [helper.make_tensor_value_info("boxes", F, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@settings(deadline=None, max_examples=20)
@given(batch=st.integers(1, 3), height=st.integers(1, 20), width=st.integers(1, 20))
def test_computed_sizes_are_those_of_onnxruntime(tmp_path_factory, batch, height, width):
    path = tmp_path_factory.mktemp("shapes")/"model.onnx"
    data = model_of(batch, height, width).SerializeToString()
    path.write_bytes(data)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    boxes, = session.run(["boxes"], {"images": np.zeros((batch, 3, height, width), np.float32)})
    graph = read_onnx(path)
    assert graph.shapes["boxes"] == boxes.shape
    assert graph.constants["target"].tolist() == [batch, 4, -1]


def test_an_open_batch_stays_open(tmp_path):
    path = tmp_path/"model.onnx"
    path.write_bytes(model_of("batch", 8, 8).SerializeToString())
    graph = read_onnx(path)
    assert graph.open_names["images"] == ("batch",) and "target" not in graph.constants
    assert read_onnx(path, sizes={"batch": 2}).shapes["boxes"] == (2, 4, 64)
