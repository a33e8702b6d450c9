"""export.half: a typed FP16 file that stays valid, answers as the FP32 file does, keeps what needs the digits, and that
a strongly typed builder takes."""
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from exported import FAMILY_NAMES, SIZE, scene
from kept import network
from onnx import TensorProto, helper, numpy_helper
from referee import needs_referee, takes

from jetson_det.core import InputError
from jetson_det.export.graph import read_onnx
from jetson_det.export.half import _kept_nodes, _Typed, to_half
from jetson_det.export.lint import lint
from jetson_det.export.onnx import export_onnx
from jetson_det.export.ranges import as_fp16
from jetson_det.models.int8 import name_nodes
from jetson_det.runtime.engine.onnx_file import read_onnx_file
from jetson_det.runtime.metadata import read_contract
from jetson_det.runtime.sessions import open_session

pytestmark = pytest.mark.usefixtures("one_thread", "kept_graphs")
FLOAT = TensorProto.FLOAT
QUICK = ("yolox-nano", "yolo26n")
FRAMES = [scene(k) for k in range(2)]


def graph_of(tmp_path, nodes, shape, constants=(), out_shape=None, kind=FLOAT):
    "A small file from `x` to `y`, read. `out_shape`: None: as `shape`."
    ends = [helper.make_tensor_value_info("x", kind, shape),
            helper.make_tensor_value_info("y", FLOAT, out_shape or shape)]
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in dict(constants).items()]
    body = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return read_onnx(path)


def typed(graph, keep=(), audited=()):
    "The graph in two types, and what stayed."
    model = onnx.ModelProto.FromString(graph.model.SerializeToString())
    name_nodes(model)
    kept = _kept_nodes(model, graph, [node.name for node in model.graph.node], audited, keep)
    walk = _Typed(model, graph, kept)
    for node in list(model.graph.node): walk.add(node)
    made = walk.finish()
    onnx.checker.check_model(made, full_check=True)
    return made, kept


def run(model, x):
    import onnxruntime as ort
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def node(operator, inputs, outputs, **attributes):
    return helper.make_node(operator, inputs, outputs, outputs[0] + "_n", **attributes)


def convolutions(tmp_path):
    "Two convolutions, and behind them a sigmoid that decodes."
    w = np.random.default_rng(0).normal(0, .3, (2, 4, 4, 1, 1)).astype(np.float32)
    nodes = [node("Conv", ["x", "w0"], ["a"]), node("Relu", ["a"], ["r"]), node("Conv", ["r", "w1"], ["b"]),
             node("Reshape", ["b", "shape"], ["c"]), node("Sigmoid", ["c"], ["s"]), node("Mul", ["s", "scale"], ["y"])]
    return graph_of(tmp_path, nodes, [1, 4, 3, 3],
                    dict(w0=w[0], w1=w[1], shape=np.int64([1, 36]), scale=np.float32(640.3)), [1, 36])


def types_of(model): return {t.name: t.data_type for t in model.graph.initializer}


def test_decoding_is_float_and_the_cast_comes_after_the_moves(tmp_path):
    graph = convolutions(tmp_path)
    made, kept = typed(graph)
    assert kept == dict(c_n="decoding", s_n="decoding", y_n="decoding")
    assert [n.op_type for n in made.graph.node] == ["Cast", "Conv", "Relu", "Conv", "Reshape", "Cast", "Sigmoid", "Mul"]
    assert {k: v for k, v in types_of(made).items() if v != TensorProto.INT64} == {
        "w0/half": TensorProto.FLOAT16, "w1/half": TensorProto.FLOAT16, "scale": FLOAT}
    x = np.random.default_rng(1).normal(0, 1, (1, 4, 3, 3)).astype(np.float32)
    found, wanted = run(made, x), run(graph.model, x)
    assert found.dtype == np.float32
    assert 0 < np.abs(found - wanted).max() < 1 # of 640: rounded, and not to a step of FP16
    assert not np.array_equal(found, found.astype(np.float16))


def test_what_is_asked_for_and_audited_stays(tmp_path):
    graph = convolutions(tmp_path)
    made, kept = typed(graph, ["a_n"], [("r_n", "makes numbers over 8188")])
    assert kept["a_n"] == "asked for" and kept["r_n"] == "makes numbers over 8188"
    assert [n.op_type for n in made.graph.node][:4] == ["Conv", "Relu", "Cast", "Conv"]
    with pytest.raises(InputError, match="keep 'a_m': no such node"): typed(graph, ["a_m"])


def test_a_tensor_is_cast_once_and_a_constant_is_stored_in_both_types(tmp_path):
    nodes = [node("Add", ["x", "one"], ["a"]), node("Softmax", ["a"], ["s"]), node("Softmax", ["a"], ["t"], axis=0),
             node("Add", ["s", "one"], ["u"]), node("Add", ["u", "t"], ["v"]), node("MatMul", ["v", "w"], ["y"])]
    graph = graph_of(tmp_path, nodes, [4, 4], dict(one=np.ones(4, np.float32), w=np.eye(4, dtype=np.float32)))
    made, kept = typed(graph, ["u_n"])
    assert sorted(types_of(made)) == ["one", "one/half", "w/half"]
    assert [n.op_type for n in made.graph.node].count("Cast") == 5 # x, a, u, t, y
    x = np.random.default_rng(1).normal(0, 1, (4, 4)).astype(np.float32)
    np.testing.assert_allclose(run(made, x), run(graph.model, x), atol=4e-3)


def test_resize_keeps_its_scales_and_bytes_become_half_at_once(tmp_path):
    nodes = [node("Cast", ["x"], ["f"], to=FLOAT), node("Resize", ["f", "", "sizes"], ["r"], mode="nearest"),
             node("Conv", ["r", "w"], ["y"])]
    graph = graph_of(tmp_path, nodes, [1, 2, 3, 3],
                     dict(sizes=np.float32([1, 1, 2, 2]), w=np.ones((1, 2, 1, 1), np.float32)), [1, 1, 6, 6],
                     TensorProto.UINT8)
    made, _ = typed(graph)
    assert types_of(made) == {"sizes": FLOAT, "w/half": TensorProto.FLOAT16}
    assert [n.op_type for n in made.graph.node] == ["Cast", "Resize", "Conv", "Cast"]
    x = np.arange(18, dtype=np.uint8).reshape(1, 2, 3, 3) * 14
    np.testing.assert_array_equal(run(made, x), run(graph.model, x))


@pytest.mark.parametrize("value", [1e6, 1e-9])
def test_a_constant_outside_fp16_is_not_lost(tmp_path, value):
    nodes = [node("Mul", ["x", "large"], ["a"]), node("Div", ["a", "large"], ["b"]), node("MatMul", ["b", "w"], ["y"])]
    graph = graph_of(tmp_path, nodes, [2, 2], dict(large=np.float32(value), w=np.eye(2, dtype=np.float32)))
    made, kept = typed(graph)
    assert set(kept) == {"a_n", "b_n"}
    x = np.float32([[1, 2], [3, 4]])
    np.testing.assert_array_equal(run(made, x), x)


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    "name -> its file, the same in FP16, and the report; made once."
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        def get(name):
            if name not in made:
                folder = tmp_path_factory.mktemp(name)
                whole, half = folder / "whole.onnx", folder / "half.onnx"
                export_onnx(network(name, patch.setitem), whole, SIZE, opset=17)
                made[name] = whole, half, to_half(whole, half, images=FRAMES)
            return made[name]
        yield get


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FAMILY_NAMES])
def test_each_family_answers_the_same_and_is_built(halved, name):
    whole, half, report = halved(name)
    print(report)
    assert report.parity.detections > 0, "nothing is compared"
    assert report.parity.missing + report.parity.extra <= max(1, report.parity.detections // 20), report.parity.lines()
    assert report.parity.box_px["p50"] < .5 and report.parity.scores["p50"] < .02
    file = read_onnx_file(half)
    assert file.precision == "fp16" and file.half_weights > 5 * file.float_weights # narrow networks
    assert report.sizes[1] < .75 * report.sizes[0]
    graph, before = read_onnx(half), read_onnx(whole)
    assert [graph.dtypes[n] for n in (*graph.inputs, *graph.outputs)] == [
        before.dtypes[n] for n in (*before.inputs, *before.outputs)]
    contract = read_contract(half)
    assert contract.extra["precision"] == "fp16" and contract.parity["frames"] == 2
    assert not [f for f in lint(half, tensorrt="11.4", precision="fp16").findings if f.level == "error"]
    needs_referee()
    assert takes(half.read_bytes())


def test_bytes_in_and_the_board_stay_in_the_contract(tmp_path):
    whole, half = tmp_path / "whole.onnx", tmp_path / "half.onnx"
    made = dict(board="orin-nano", oldest="10.3", precision="fp32")
    export_onnx(network("yolox-nano"), whole, SIZE, opset=17, uint8=True, extra=dict(tensorrt=made))
    report = to_half(whole, half, images=FRAMES)
    assert report.parity.ok and report.parity.detections > 10
    contract = read_contract(half)
    assert contract.extra["tensorrt"] == dict(made, precision="fp16")
    graph = read_onnx(half)
    assert graph.dtypes[graph.inputs[0]] == "uint8"
    casts = [n for n in graph.nodes if n.op_type == "Cast"]
    assert graph.dtypes[casts[0].output[0]] == "float16", "bytes go to FP16 without FP32 between"
    needs_referee()
    assert takes(half.read_bytes())


def test_why_the_converter_of_onnx_runtime_is_not_used(tmp_path):
    "When this fails, look whether it can replace `_Typed`."
    convert = pytest.importorskip("onnxruntime.transformers.float16").convert_float_to_float16
    graph = convolutions(tmp_path)
    made = convert(graph.model, keep_io_types=True, node_block_list=["c_n", "s_n", "y_n"])
    with pytest.raises(onnx.checker.ValidationError, match="topologically sorted"): onnx.checker.check_model(made)
    makers = {name: node for node in made.graph.node for name in node.output}
    widened = makers[next(n for n in made.graph.node if n.name == "y_n").input[0]] # what decoding takes from decoding
    rounded = makers[widened.input[0]]
    assert (widened.op_type, rounded.op_type) == ("Cast", "Cast")
    assert makers[rounded.input[0]].name == "s_n" # FP32, FP16, FP32


def test_other_files_are_refused(halved, tmp_path):
    whole, half = (Path(shutil.copy(path, tmp_path)) for path in halved("yolox-nano")[:2])
    with pytest.raises(InputError, match="FP16 in it already"): to_half(half, tmp_path / "b.onnx")
    rounded = as_fp16(whole)
    with pytest.raises(InputError, match="FP16 in it already"): to_half(rounded, tmp_path / "b.onnx")
    with pytest.raises(InputError, match="ends in .onnx"): to_half(whole, tmp_path / "b.txt")
    with pytest.raises(InputError): to_half(whole, whole)
    with pytest.raises(InputError, match="list of names"): to_half(whole, tmp_path / "b.onnx", keep="x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half.onnx", "whole.fp16-emulated.onnx", "whole.onnx"]


@pytest.mark.data
def test_a_trained_network_on_photos(tmp_path):
    data = Path(os.environ["JETSON_DET_DATA"])
    source = data / "models/yolox_nano_coco_416.onnx"
    photos = sorted((data / "datasets").rglob("*.jpg"))[::37][:12]
    frames = [cv2.imread(str(p)) for p in photos]
    report = to_half(source, tmp_path / "half.onnx", images=frames, contract="yolox")
    print(report)
    assert report.parity.ok and report.parity.detections > 10
    found = open_session(tmp_path / "half.onnx", "yolox", threads=1)(frames[0])
    assert np.isfinite(found.boxes).all()


def test_files_beside_it_stay(tmp_path):
    "The source may have any name, and what lies beside it is somebody's."
    export_onnx(network("yolox-nano"), tmp_path/"x.part.onnx", SIZE)
    (tmp_path/"x.fp16.part.onnx").write_text("of somebody")
    before = (tmp_path/"x.part.onnx").read_bytes()
    for out in ("x.onnx", "x.fp16.onnx"): assert to_half(tmp_path/"x.part.onnx", tmp_path/out).parity.ok
    assert (tmp_path/"x.part.onnx").read_bytes() == before
    assert (tmp_path/"x.fp16.part.onnx").read_text() == "of somebody" and len(list(tmp_path.iterdir())) == 4


def test_an_image_without_a_detection_decides_nothing(tmp_path):
    model = network("yolox-nano")
    for layer in model.head.obj_preds: layer.bias.data.fill_(-30)
    export_onnx(model, tmp_path/"x.onnx", SIZE)
    with pytest.raises(InputError, match="nothing is found on 1 image"):
        to_half(tmp_path/"x.onnx", tmp_path/"y.onnx", images=[np.zeros((*SIZE, 3), np.uint8)])
    assert not (tmp_path/"y.onnx").exists()
