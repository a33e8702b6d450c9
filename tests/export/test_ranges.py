"""export.ranges: what leaves FP16 is found, by magnitude, inside a sum, or under the smallest number; the emulated file
computes what rounding each tensor computes."""
import json

import numpy as np
import onnx
import pytest
from exported import SIZE, scene
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from kept import network
from onnx import TensorProto, helper, numpy_helper

from jetson_det.core import InputError
from jetson_det.data.formats.registry import read_dataset
from jetson_det.export.golden import parity
from jetson_det.export.onnx import export_onnx
from jetson_det.export.ranges import FP16_SMALLEST, FP16_SMALLEST_NORMAL, _Range, as_fp16, range_audit
from jetson_det.export.rewrite import rewrite_for_fp16
from jetson_det.runtime.contract import preset
from jetson_det.runtime.sessions import open_session

pytestmark = pytest.mark.usefixtures("one_thread", "kept_graphs")


def saved(path, nodes, shape, constants=(), output="y", opset=13, output_shape=None):
    "A small graph from `x` to `y`."
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), (output, output_shape))]
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in dict(constants).items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def layer_norm(path, epsilon=1e-5, width=64, opset=13):
    def mean(x, y):
        if opset < 18: return helper.make_node("ReduceMean", [x], [y], axes=[-1], name=y)
        return helper.make_node("ReduceMean", [x, "axes"], [y], name=y)
    nodes = [mean("x", "mean"), helper.make_node("Sub", ["x", "mean"], ["d"], name="d"),
             helper.make_node("Mul", ["d", "d"], ["square"], name="square"), mean("square", "variance"),
             helper.make_node("Add", ["variance", "eps"], ["v"], name="v"),
             helper.make_node("Sqrt", ["v"], ["root"], name="root"),
             helper.make_node("Div", ["d", "root"], ["y"], name="y")]
    constants = dict(eps=np.float32(epsilon))
    if opset >= 18: constants["axes"] = np.int64([-1])
    return saved(path, nodes, [2, width], constants, opset=opset)


def softmax_without_maximum(path):
    nodes = [helper.make_node("Exp", ["x"], ["e"], name="e"),
             helper.make_node("ReduceSum", ["e", "axes"], ["sum"], name="sum"),
             helper.make_node("Div", ["e", "sum"], ["y"], name="y")]
    return saved(path, nodes, [2, 16], dict(axes=np.int64([-1])))


def named(report): return {t.name: t for t in report.tensors}
def kept(report): return dict(report.keep_fp32)


@pytest.mark.parametrize("opset", [13, 18])
def test_the_sum_of_squares_overflows_before_any_tensor(tmp_path, opset):
    x = np.random.default_rng(0).uniform(-80, 80, (2, 64)).astype(np.float32)
    report = range_audit(layer_norm(tmp_path / "a.onnx", opset=opset), [{"x": x}])
    tensors = named(report)
    assert max(t.largest for t in report.tensors) < 8188
    deviations = np.float64(x) - x.mean(1, keepdims=True)
    assert tensors["variance"].inner == pytest.approx((deviations**2).sum(1).max(), rel=1e-5)
    assert report.verdict == "overflows"
    assert list(kept(report)) == ["variance"] and "adds up" in kept(report)["variance"]
    assert tensors["square"].verdict == "safe" and tensors["variance"].verdict == "overflows"
    assert range_audit(tmp_path / "a.onnx", [{"x": x / 80}]).verdict == "safe"


def test_squares_that_overflow_themselves_are_kept_with_their_takers(tmp_path):
    x = np.random.default_rng(0).uniform(-400, 400, (2, 64)).astype(np.float32)
    report = range_audit(layer_norm(tmp_path / "a.onnx"), [{"x": x}])
    assert named(report)["square"].verdict == "overflows"
    assert {"square", "variance", "v", "root"} <= set(kept(report))
    assert "y" not in kept(report) and "d" not in kept(report)


def test_the_rewrite_is_a_cure(tmp_path):
    x = np.random.default_rng(0).uniform(-80, 80, (2, 64)).astype(np.float32)
    model = onnx.load(layer_norm(tmp_path / "a.onnx"))
    assert rewrite_for_fp16(model)["layer_norms"] == 1
    onnx.save(model, tmp_path / "b.onnx")
    report = range_audit(tmp_path / "b.onnx", [{"x": x}])
    assert report.verdict == "safe", report.widest()


def test_softmax_without_its_maximum(tmp_path):
    path = softmax_without_maximum(tmp_path / "a.onnx")
    x = np.zeros((2, 16), np.float32)
    x[0, 3] = 12
    report = range_audit(path, [{"x": x}])
    assert report.verdict == "overflows" and set(kept(report)) == {"e", "sum", "y"}
    x[0, 3] = 9.5 # 13,360: no overflow, and within a factor of 8 of one
    report = range_audit(path, [{"x": x}])
    assert report.verdict == "near"
    assert range_audit(path, [{"x": x * .5}]).verdict == "safe"
    one = saved(tmp_path / "b.onnx", [helper.make_node("Softmax", ["x"], ["y"], axis=-1)], [2, 16])
    assert range_audit(one, [{"x": x + 200}]).keep_fp32 == () # it subtracts the largest itself


def test_a_denominator_that_becomes_zero(tmp_path):
    path = saved(tmp_path / "a.onnx", [helper.make_node("Mul", ["x", "k"], ["small"], name="small"),
                                       helper.make_node("Div", ["x", "small"], ["y"], name="y")], [4],
                 dict(k=np.float32(1e-6)))
    report = range_audit(path, [{"x": np.float32([1, 1e-2, 1, 1])}])
    assert kept(report) == {"y": "makes numbers over 8188"}
    report = range_audit(layer_norm(tmp_path / "b.onnx", 1e-12), [{"x": np.ones((2, 64), np.float32)}])
    assert report.verdict == "flushes" and kept(report)["v"] == "takes a constant that becomes 0"
    assert kept(report)["root"] == "Sqrt of numbers that become 0"


def test_weights_that_flush(tmp_path):
    weights = np.full((8, 8), .5, np.float32)
    path = tmp_path / "a.onnx"
    for share, verdict in ((0, "safe"), (1, "flushes")):
        weights[:share] = 1e-9
        saved(path, [helper.make_node("MatMul", ["x", "w"], ["y"])], [2, 8], dict(w=weights), output_shape=[2, 8])
        report = range_audit(path, [{"x": np.ones((2, 8), np.float32)}])
        assert report.verdict == verdict and report.weights[0].lost == share / 8
    weights[-1, 0] = 2 # beside it the lost ones are under FP32's own last digit
    saved(path, [helper.make_node("MatMul", ["x", "w"], ["y"])], [2, 8], dict(w=weights), output_shape=[2, 8])
    assert range_audit(path, [{"x": np.ones((2, 8), np.float32)}]).verdict == "safe"
    weights[0, 0] = 1e5
    saved(path, [helper.make_node("MatMul", ["x", "w"], ["y"])], [2, 8], dict(w=weights), output_shape=[2, 8])
    assert range_audit(path, [{"x": np.zeros((2, 8), np.float32)}]).verdict == "overflows"


def test_a_convolution_before_its_batch_norm_does_not_count(tmp_path):
    constants = dict(w=np.full((1, 1, 1, 1), 1e6, np.float32), s=np.float32([1]), b=np.float32([0]), m=np.float32([0]),
                     v=np.float32([1e12]))
    nodes = [helper.make_node("Conv", ["x", "k"], ["c"], name="c"),
             helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["y"], name="bn")]
    constants["k"] = constants.pop("w") / 10
    path = saved(tmp_path / "a.onnx", nodes, [1, 1, 2, 2], constants)
    report = range_audit(path, [{"x": np.ones((1, 1, 2, 2), np.float32)}])
    conv = named(report)["c"]
    assert conv.is_fused and conv.largest == 1e5 and "bn" not in kept(report)


@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=20), elements=st.floats(-2**20, 2**20, width=32)))
@settings(max_examples=80, deadline=None)
def test_shares_are_those_of_a_direct_count(values):
    counted = _Range()
    counted.add(values)
    counted.add(values[:1])
    size = np.abs(np.concatenate([values.ravel(), values[:1].ravel()]))
    n = max((size > 0).sum(), 1)
    assert counted.largest == size.max()
    assert counted.shares() == (((size > 0) & (size < FP16_SMALLEST_NORMAL)).sum() / n,
                                ((size > 0) & (size < FP16_SMALLEST)).sum() / n)


# ---- detectors


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "name, opset -> the file, made once."
    folder = tmp_path_factory.mktemp("ranges")
    with pytest.MonkeyPatch.context() as patch:
        def get(name, opset=13):
            path = folder / f"{name}-{opset}.onnx"
            if path.exists(): return path
            frames = [scene(k) for k in range(2)] # in a gray frame queries are equal, and which are taken is chance
            export_onnx(network(name, patch.setitem), path, SIZE, opset=opset, confidence=.3, frames=frames)
            return path
        yield get


@pytest.mark.parametrize("name", ["yolox-nano", "rtdetr-r18", pytest.param("dfine-n", marks=pytest.mark.slow)])
def test_a_detector_is_audited(exported, name):
    path = exported(name)
    report = range_audit(path, [scene(k) for k in range(2)])
    model = onnx.load(path)
    made = {o for n in model.graph.node if n.op_type != "Constant" for o in n.output}
    assert {t.name for t in report.tensors} <= made and len(report.tensors) > .6 * len(made)
    boxes = named(report)["boxes"]
    found = open_session(path, threads=1)
    largest = max(np.abs(found.infer(found.preprocess([scene(k)])[0])[0]).max() for k in range(2))
    assert boxes.largest == pytest.approx(largest, rel=1e-4)
    assert {node for node, _ in report.keep_fp32} <= {n.name for n in model.graph.node}
    assert json.loads(report.to_json())["verdict"] == report.verdict and report.verdict in report.to_json()


def test_chunks_change_nothing(exported):
    path = exported("yolox-nano")
    whole = range_audit(path, [scene(0)])
    parts = range_audit(path, [scene(0)], memory_mb=2)
    assert parts.chunks > whole.chunks == 1 and parts.tensors == whole.tensors


def test_a_decoder_with_large_features_is_found_and_named(exported, tmp_path):
    "A LayerNorm in single operators whose input is amplified a thousand times: its squares leave FP16."
    model = onnx.load(exported("rtdetr-r18"))
    makers = {o: n for n in model.graph.node for o in n.output}
    square = next(n for n in model.graph.node if n.op_type == "Pow" or n.op_type == "Mul" and len(set(n.input)) == 1)
    sub = makers[square.input[0]]
    add = makers[sub.input[0]]
    new = helper.make_node("Mul", [add.output[0], "thousand"], ["amplified"], name="amplified")
    for node in model.graph.node:
        if node is not new: node.input[:] = ["amplified" if i == add.output[0] else i for i in node.input]
    place = [n.output[0] if n.output else "" for n in model.graph.node].index(add.output[0]) + 1
    model.graph.node.insert(place, new)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1000), "thousand"))
    del model.metadata_props[:] # the checksum of the graph
    onnx.save(model, tmp_path / "a.onnx")
    assert range_audit(exported("rtdetr-r18"), [scene(0)]).verdict in ("safe", "flushes")
    report = range_audit(tmp_path / "a.onnx", [scene(0)], contract=open_session(exported("rtdetr-r18")).contract)
    assert report.verdict == "overflows" and square.name in kept(report)


# ---- FP16, emulated


def test_emulation_rounds_each_tensor(tmp_path):
    nodes = [helper.make_node("Mul", ["x", "k"], ["m"]), helper.make_node("Add", ["m", "x"], ["y"])]
    path = saved(tmp_path / "a.onnx", nodes, [64], dict(k=np.float32(1.2345678)), output_shape=[64])
    x = np.random.default_rng(0).normal(0, 300, 64).astype(np.float32)
    half = lambda v: v.astype(np.float16).astype(np.float32)
    import onnxruntime
    session = onnxruntime.InferenceSession(str(as_fp16(path)), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x})[0]
    wanted = half(half(x * half(np.float32(1.2345678))) + x)
    by_half_input = half(half(half(x) * half(np.float32(1.2345678))) + half(x))
    assert np.array_equal(found, wanted) or np.array_equal(found, by_half_input)
    with np.errstate(over="ignore"):
        assert np.isinf(session.run(None, {"x": np.full(64, 60000, np.float32)})[0]).all()


@pytest.mark.parametrize("name", ["yolox-nano", "rtdetr-r18"])
def test_an_emulated_detector_opens_without_a_warning(exported, name, recwarn):
    path = as_fp16(exported(name))
    session = open_session(path, threads=1)
    assert "emulated" in session.contract.extra["precision"] and path.name == f"{name}-13.fp16-emulated.onnx"
    assert not [w for w in recwarn if "altered" in str(w.message)]
    whole = open_session(exported(name), threads=1)
    x, _ = whole.preprocess([scene(0)])
    apart = np.abs(session.infer(x)[1] - whole.infer(x)[1]).max()
    assert 0 < apart < .05


def test_wrong_calls(exported, tmp_path):
    path = exported("yolox-nano")
    with pytest.raises(InputError, match="no images"): range_audit(path, [])
    with pytest.raises(InputError, match="memory_mb is 0"): range_audit(path, [scene(0)], memory_mb=0)
    with pytest.raises(InputError, match="FP32 file itself"): as_fp16(path, path)
    with pytest.raises(InputError, match="ONNX Runtime cannot run it"): range_audit(path, [{"x": np.zeros(3)}])
    (tmp_path / "torn.onnx").write_bytes(path.read_bytes()[:5000])
    for call in (as_fp16, lambda p: range_audit(p, [scene(0)])):
        with pytest.raises(InputError, match="torn.onnx"): call(tmp_path / "torn.onnx")
        with pytest.raises(InputError, match="nothing.onnx"): call(tmp_path / "nothing.onnx")


@pytest.mark.data
def test_a_published_network(data, tmp_path):
    "YOLOX-nano on photos: nothing leaves FP16, and rounding moves no box by half a pixel of its input."
    path = data / "models" / "yolox_nano_coco_416.onnx"
    ds = read_dataset(data / "datasets" / "raccoon")
    frames = [ds.image(k) for k in range(4)]
    contract = preset("yolox", input_size=(416, 416))
    report = range_audit(path, frames, contract)
    assert report.verdict in ("safe", "flushes") and len(report.tensors) > 200
    half = as_fp16(path, tmp_path / "half.onnx")
    named_frames = [(str(k), frame) for k, frame in enumerate(frames)]
    found = parity(open_session(path, contract), open_session(half, contract), named_frames)
    assert found.detections >= 3 and found.missing == found.extra == 0 and found.scores["max"] < .01
