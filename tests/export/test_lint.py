"The tables of TensorRT's limits and what the lint makes of a file with them."
import itertools
import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from jetson_det.core import InputError
from jetson_det.export import lint as lint_module
from jetson_det.export.lint import cut_nms, lint, lint_text
from jetson_det.export.rules import HOW_KNOWN, LIMITS, OPERATORS, VERSIONS, check_version, limits_of
from jetson_det.runtime.boards import BOARDS
from jetson_det.runtime.contract import METADATA_KEY
from jetson_det.runtime.known_bad import KNOWN_BAD, known_bad

FLOAT, LONG = TensorProto.FLOAT, TensorProto.INT64


def write(tmp_path, nodes, inputs, outputs, weights=(), opset=13, contract=None):
    "A model of a few nodes; outputs are names of floats."
    ends = [helper.make_tensor_value_info(o, FLOAT, None) for o in outputs]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info(*i) for i in inputs], ends,
                              [numpy_helper.from_array(np.asarray(value), key) for key, value in weights])
    opsets = [helper.make_opsetid("", opset)] + [helper.make_opsetid(n.domain, 1) for n in nodes if n.domain]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    if contract: helper.set_model_props(model, {METADATA_KEY: json.dumps(contract)})
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    return tmp_path / "m.onnx"


def texts(report, level="error"): return [f.what for f in report.findings if f.level == level]


def test_the_tables_are_whole():
    names = [name for row in OPERATORS for name in row.names]
    assert len(names) == len(set(names)) > 150
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    old = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"} # of ONNX before 1.0
    newer = {"CausalConvWithState", "LinearAttention", "Swish", "TensorScatter", "Attention"} # than some onnx packages
    assert set(names) - known - old - newer == set()
    assert all(row.known in HOW_KNOWN and row.source for row in (*OPERATORS, *LIMITS))
    assert all(check_version(text) for text in VERSIONS)


def test_every_limit_has_a_check_and_every_check_a_limit():
    source = open(lint_module.__file__).read()
    for row in LIMITS: assert f'"{row.key}"' in source, row.key
    for version in VERSIONS: assert limits_of(check_version(version))


@pytest.mark.parametrize("operator, since", [("GridSample", "8.5"), ("LayerNormalization", "8.6"), ("Gelu", "10.0"),
                                             ("HardSwish", "8.4"), ("Mod", "8.5")])
def test_an_operator_counts_from_its_version(tmp_path, operator, since):
    arity = 2 if operator in ("GridSample", "LayerNormalization", "Mod") else 1
    names = ["x", "y"][:arity]
    inputs = [(name, FLOAT, [1, 2, 8, 2]) for name in names]
    path = write(tmp_path, [helper.make_node(operator, names, ["o"], "n")], inputs, ["o"], opset=20)
    report = lint(path, precision="fp32")
    refused = {v for f in report.findings if f.effect == "refused" for v in f.versions}
    assert refused == {v for v in VERSIONS if check_version(v) < check_version(since)}


@pytest.mark.parametrize("kind", ["UINT16", "INT16", "UINT32", "UINT64", "STRING"])
def test_inputs_of_a_type_that_no_version_reads(tmp_path, kind):
    node = helper.make_node("Cast", ["x"], ["o"], "cast", to=FLOAT)
    report = lint(write(tmp_path, [node], [("x", getattr(TensorProto, kind), [1, 3])], ["o"]), precision="fp32")
    refused, = [f for f in report.findings if f.effect == "refused"]
    assert "the input x has the type " in refused.what and refused.versions == VERSIONS and not report.takes
    taken = lint(write(tmp_path, [node], [("x", TensorProto.INT32, [1, 3])], ["o"]), precision="fp32")
    assert taken.findings == ()


def test_constants_of_a_type_that_no_version_reads(tmp_path):
    nodes = [helper.make_node("Cast", ["w"], ["f"], "cast", to=FLOAT),
             helper.make_node("Add", ["x", "f"], ["o"], "add")]
    path = write(tmp_path, nodes, [("x", FLOAT, [3])], ["o"], [("w", np.uint16([1, 2, 3]))])
    assert texts(lint(path)) == ["its constant has the type uint16"]


def test_numbers_beyond_int32(tmp_path):
    def report(operator, value):
        node = helper.make_node(operator, ["x", "w"], ["i"], "n") if operator == "Add" else \
            helper.make_node("Slice", ["x", "zero", "w"], ["i"], "n")
        nodes = [node, helper.make_node("Cast", ["i"], ["o"], "c", to=FLOAT)]
        path = write(tmp_path, nodes, [("x", TensorProto.INT32 if operator == "Slice" else LONG, [4])], ["o"],
                     [("w", np.array([value])), ("zero", np.array([0]))])
        return [f.versions for f in lint(path, precision="fp32").findings if "beyond INT32" in f.what]
    assert report("Add", 2**31) == [("8.2", "8.5", "8.6")]
    assert report("Add", -2**31 - 1) and not report("Add", 2**31 - 1) and not report("Add", -2**31)
    assert not report("Slice", 2**63 - 1)


@pytest.mark.parametrize("value, precision, level", [
    (np.nan, "fp16", "error"), (-np.inf, "fp32", "error"), (np.inf, "int8", "error"), (7e4, "fp16", "warning"),
    (-7e4, "fp16", "warning"), (7e4, "fp32", None), (6e4, "fp16", None),
])
def test_weights_that_no_arithmetic_survives(tmp_path, value, precision, level):
    weights = np.zeros((4, 3, 3, 3), np.float32)
    weights[2, 1, 0, 2] = value
    conv = helper.make_node("Conv", ["x", "w"], ["y"], "stem")
    path = write(tmp_path, [conv], [("x", FLOAT, [1, 3, 8, 8])], ["y"], [("w", weights)])
    findings = [f for f in lint(path, tensorrt="10.3", precision=precision).findings if "weights" in f.what]
    assert [(f.level, f.node) for f in findings] == ([(level, "'stem'")] if level else [])


def test_a_constant_that_is_no_weight_may_be_infinite(tmp_path):
    "The mask of an attention."
    add = helper.make_node("Add", ["x", "mask"], ["y"], "mask")
    path = write(tmp_path, [add], [("x", FLOAT, [1, 3])], ["y"], [("mask", np.float32([0, -np.inf, -1e9]))])
    assert lint(path, "nano").ok


def test_roi_align_is_a_plugin(tmp_path):
    node = helper.make_node("RoiAlign", ["x", "r", "b"], ["o"], "crop")
    path = write(tmp_path, [node], [("x", FLOAT, [1, 3, 8, 8]), ("r", FLOAT, [4, 4])], ["o"], [("b", np.zeros(4, int))],
                 opset=16)
    later = tuple(v for v in VERSIONS if v not in ("8.2", "11.4"))
    assert [f.versions for f in lint(path, precision="fp32").findings if "ROIAlign_TRT" in f.what] == [later]
    by_version = {v: lint(path, tensorrt=v, precision="fp32").takes for v in VERSIONS}
    assert by_version == {v: v not in ("8.2", "11.4") for v in VERSIONS}


def test_topk(tmp_path):
    node = helper.make_node("TopK", ["x", "k"], ["v", "i"], "select", largest=0)
    path = write(tmp_path, [node], [("x", FLOAT, [1, 4000])], ["v"], [("k", np.array([3841]))])
    found = {f.what: f.versions for f in lint(path).findings if f.level == "error"}
    assert found == {"TopK takes K up to 3840, here it is 3841": VERSIONS,
                     "TopK ignores largest=0 and returns the largest": ("8.2",)}


def test_axes_as_an_input_are_ignored_by_old_importers(tmp_path):
    node = helper.make_node("ReduceMean", ["x", "axes"], ["o"], "mean")
    path = write(tmp_path, [node], [("x", FLOAT, [1, 3, 8])], ["o"], [("axes", np.array([2]))], opset=18)
    wrong = [f for f in lint(path, precision="fp32").findings if f.effect == "wrong"]
    assert [f.versions for f in wrong] == [("8.2", "8.5", "8.6")]


def test_boards_and_precision(tmp_path):
    path = write(tmp_path, [helper.make_node("Relu", ["x"], ["o"], "r")], [("x", FLOAT, [1, 3])], ["o"])
    for name, row in BOARDS.items():
        report = lint(path, name, precision="int8")
        assert report.ok == row.has_fast_int8
        assert report.versions == tuple(dict.fromkeys(r.tensorrt for r in row.releases))
    for bad in dict(board="nanu"), dict(tensorrt="7.1"), dict(tensorrt="x"), dict(precision="fp8"):
        with pytest.raises(InputError): lint(path, **bad)


def test_yolo26_in_int8(tmp_path):
    path = write(tmp_path, [helper.make_node("Relu", ["x"], ["o"], "r")], [("x", FLOAT, [1, 3])], ["o"],
                 contract=dict(family="ultralytics", name="yolo26n"))
    assert texts(lint(path, tensorrt="10.3", precision="int8")) == ["YOLO26 does not build in INT8"]
    assert lint(path, tensorrt="10.7", precision="int8").ok and lint(path, tensorrt="10.3").ok


def test_layernorm_steps_and_dfine(tmp_path):
    nodes = [helper.make_node("ReduceMean", ["x"], ["m"], "mean", axes=[2]),
             helper.make_node("Sub", ["x", "m"], ["d"], "distance"),
             helper.make_node("Mul", ["d", "d"], ["q"], "square"),
             helper.make_node("ReduceMean", ["q"], ["o"], "variance", axes=[2])]
    for family, errors in ("rtdetr", 0), ("dfine", 1):
        path = write(tmp_path, nodes, [("x", FLOAT, [1, 3, 8])], ["o"], contract=dict(family=family, name=family))
        report = lint(path, "nano")
        assert report.count("error") == errors and any("LayerNorm" in t for t in texts(report, "warning"))
        assert lint(path, "nano", precision="fp32").findings == ()


def test_plugin_in_fp16(tmp_path):
    node = helper.make_node("EfficientNMS_TRT", ["b", "s"], ["n", "bb", "ss", "l"], "nms", domain="TRT_PLUGINS")
    path = write(tmp_path, [node], [("b", FLOAT, [1, 50, 4]), ("s", FLOAT, [1, 50, 3])], ["bb"])
    assert not lint(path, "nano").ok and lint(path, "nano").takes
    assert lint(path, "nano", precision="fp32").ok and lint(path, tensorrt="8.5").ok
    assert not lint(path, tensorrt="11.4", precision="fp32").takes


def test_operators_in_inner_graphs_are_seen(tmp_path):
    def branch(operator):
        end = helper.make_tensor_value_info("y" + operator, FLOAT, None)
        return helper.make_graph([helper.make_node(operator, ["x"], ["y" + operator], operator)], "b", [], [end])
    node = helper.make_node("If", ["c"], ["o"], "if", then_branch=branch("Mish"), else_branch=branch("Relu"))
    path = write(tmp_path, [node], [("x", FLOAT, [1, 3]), ("c", TensorProto.BOOL, [])], ["o"], opset=18)
    assert texts(lint(path, tensorrt="8.6")) == ["Mish is imported from TensorRT 10.0 on"]


def test_the_report_is_safe_to_print(tmp_path):
    path = write(tmp_path, [helper.make_node("Frob|<b>", ["x"], ["o"], "a\x1b[31m\n|<b>", domain="my")],
                 [("x", FLOAT, ["\x1b", 3])], ["o"])
    report = lint(path, "nano")
    assert "\x1b" not in lint_text(report) and "<b>" not in report._repr_markdown_()
    assert json.loads(json.dumps(report.to_json()))["ok"] is False


@pytest.mark.parametrize("center", [0, 1])
def test_cut_nms_computes_what_the_nms_got(tmp_path, center):
    nodes = [helper.make_node("Split", ["x"], ["b", "s"], "split", axis=2),
             helper.make_node("Transpose", ["s"], ["st"], "turn", perm=[0, 2, 1]),
             helper.make_node("NonMaxSuppression", ["b", "st", "k"], ["rows"], "nms", center_point_box=center),
             helper.make_node("Cast", ["rows"], ["o"], "end", to=FLOAT)]
    path = write(tmp_path, nodes, [("x", FLOAT, [1, 50, 8])], ["o"], [("k", np.array([10]))])
    assert cut_nms(path, tmp_path / "cut.onnx") == ((1, 50, 4), (1, 50, 4))
    onnx.checker.check_model(str(tmp_path / "cut.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "cut.onnx"), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).random((1, 50, 8), np.float32)
    boxes, scores = session.run(["boxes", "scores"], {"x": x})
    cx, cy, w, h = (x[..., k] for k in range(4))
    wanted = np.stack([cx - w/2, cy - h/2, cx + w/2, cy + h/2], -1) if center else x[..., :4]
    assert np.allclose(boxes, wanted, atol=1e-6) and np.array_equal(scores, x[..., 4:])
    with pytest.raises(InputError, match="has 0 NMS nodes"): cut_nms(tmp_path / "cut.onnx", tmp_path / "again.onnx")


@pytest.mark.parametrize("box, score", [("boxes", "scores"), ("scores", "boxes"), ("b", "s")])
def test_cut_nms_of_a_graph_with_those_names(tmp_path, box, score):
    "As our own export with its NMS has them."
    nodes = [helper.make_node("Split", ["x"], [box, "t"], "split", axis=2),
             helper.make_node("Transpose", ["t"], [score], "turn", perm=[0, 2, 1]),
             helper.make_node("NonMaxSuppression", [box, score, "k"], ["rows"], "nms"),
             helper.make_node("Cast", ["rows"], ["o"], "end", to=FLOAT)]
    path = write(tmp_path, nodes, [("x", FLOAT, [1, 50, 8])], ["o"], [("k", np.array([10]))])
    cut_nms(path, tmp_path / "cut.onnx")
    onnx.checker.check_model(str(tmp_path / "cut.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "cut.onnx"), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).random((1, 50, 8), np.float32)
    boxes, scores = session.run(["boxes", "scores"], {"x": x})
    assert np.array_equal(boxes, x[..., :4]) and np.array_equal(scores, x[..., 4:])
    path = write(tmp_path, nodes[:-1] + [helper.make_node("Cast", ["boxes"], ["o"], to=FLOAT)],
                 [("x", FLOAT, [1, 50, 8]), ("boxes", FLOAT, [1])], ["o"], [("k", np.array([10]))])
    if box == "b":
        with pytest.raises(InputError, match="an input of it is called boxes"): cut_nms(path, tmp_path / "cut.onnx")


def test_known_bad_asks_for_all_conditions():
    versions = (None, "8.2", "8.5", "10.3", "10.13", "11.4")
    features = {feature for row in KNOWN_BAD for feature in row.features}
    seen = set()
    for version, board, precision in itertools.product(versions, (None, "nano", "tx2", "orin-nano-super", "thor"),
                                                       (None, "fp16", "int8")):
        for opset in None, 13, 20:
            rows = known_bad(version, board, precision, features, opset)
            seen |= {row.key for row in rows}
            for row in rows: assert not row.boards or board in row.boards
    assert seen == {row.key for row in KNOWN_BAD}
    assert known_bad() == ()
