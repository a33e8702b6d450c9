"""export.quantize: the pairs are as TensorRT wants them and where the rule says; what does not pay or is known to fail
is refused; a damaged file is one line; layers go back to float until the loss is within its bound."""
import dataclasses
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from exported import CLASSES, SIZE, scene
from hypothesis import given
from hypothesis import strategies as st
from kept import network
from onnx import TensorProto, helper, numpy_helper

from jetson_det.core import InputError
from jetson_det.data.formats.registry import read_dataset
from jetson_det.export.graph import read_onnx
from jetson_det.export.lint import lint
from jetson_det.export.onnx import export_onnx
from jetson_det.export.quantize import _fewest_kept, label_with, quantizable, quantize
from jetson_det.export.ranges import as_fp16
from jetson_det.runtime.contract import GRAPH_KEY, METADATA_KEY, Contract
from jetson_det.runtime.sessions import open_session, verify_onnx
from jetson_det.scenes.docks import write_scenes

pytestmark = pytest.mark.usefixtures("one_thread", "kept_graphs")
FLOAT = TensorProto.FLOAT


def quiet(line): pass


@pytest.fixture(scope="module")
def docks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docks")
    write_scenes(folder / "docks", 20, size=(96, 160), seed=5)
    return read_dataset(folder / "docks")


def quick(source, path, ds, **options):
    "Without measuring: the training split alone."
    options = dict(dict(count=4, threads=1, say=quiet), **options)
    return quantize(source, path, ds.split("train"), **options)


def pairs_of(path):
    "The graph, and its quantizing nodes."
    graph = read_onnx(path)
    return graph, [node for node in graph.nodes if node.op_type == "QuantizeLinear"]


def check_pairs(path, report):
    "Symmetric signed INT8, a scale for each channel of float weights, float biases, no pair behind a convolution."
    graph, quantizing = pairs_of(path)
    assert quantizing
    for node in quantizing:
        scale, zero = (graph.constants[name] for name in node.input[1:3])
        assert zero.dtype == np.int8 and not zero.any() and (scale > 0).all() and np.isfinite(scale).all()
        back, = graph.consumers[node.output[0]]
        assert back.op_type == "DequantizeLinear"
        takers = graph.consumers[back.output[0]]
        assert all(taker.op_type == "Add" or taker.name not in report.kept for taker in takers)
        assert {taker.op_type for taker in takers} <= {"Conv", "ConvTranspose", "Add"} # no concatenation, no pooling
    done = 0
    for node in graph.nodes:
        if node.op_type not in ("Conv", "ConvTranspose"): continue
        makers = [graph.producers.get(name) for name in node.input]
        is_int8 = makers[0] is not None and makers[0].op_type == "DequantizeLinear"
        assert is_int8 == (node.name not in report.kept), node.name
        if not is_int8: continue
        done += 1
        weights = graph.producers[makers[1].input[0]]
        assert weights.op_type == "QuantizeLinear" and graph.constants[weights.input[0]].dtype == np.float32
        axis = 1 if node.op_type == "ConvTranspose" else 0
        assert graph.constants[weights.input[1]].shape == (graph.constants[weights.input[0]].shape[axis],)
        for bias in node.input[2:]: assert graph.constants[bias].dtype == np.float32
    assert done == report.quantized
    return graph


@pytest.mark.parametrize("name, ends", [("yolox-nano", 9), ("yolo26n", 6),
                                        pytest.param("yolov8n", 6, marks=pytest.mark.slow),
                                        pytest.param("dfine-n", 0, marks=pytest.mark.slow),
                                        pytest.param("rtdetr-r18", 0, marks=pytest.mark.slow)])
def test_each_family(tmp_path, docks, name, ends, monkeypatch):
    model = network(name, monkeypatch.setitem)
    source = tmp_path / "net.onnx"
    export_onnx(model, source, SIZE, opset=17)
    report = quick(source, tmp_path / "int8.onnx", docks)
    check_pairs(tmp_path / "int8.onnx", report)
    assert sum(reason == "output convolution" for reason in report.kept.values()) == ends
    assert report.quantized > len(report.kept)
    exact, found = (open_session(path, threads=1) for path in (source, tmp_path / "int8.onnx"))
    x, _ = exact.preprocess([scene(1)])
    _, scores = exact.infer(x)
    _, other = found.infer(x)
    assert 0 < np.abs(scores - other).mean() < .1 # it is INT8, and it is the same network
    contract = found.contract
    assert contract.extra["precision"] == "int8" and contract.classes == exact.contract.classes
    assert contract.extra["calibration"] == dict(method="entropy", images=4, split="train",
                                                 fingerprint=report.fingerprint)
    assert contract.made_from == exact.contract.made_from
    assert "as it was exported" in " ".join(verify_onnx(tmp_path / "int8.onnx"))
    errors = [{f.what for f in lint(path, "orin-nx").findings if f.level == "error"}
              for path in (source, tmp_path / "int8.onnx")]
    assert errors[0] == errors[1] # D-FINE's and RT-DETR's LayerNormalization is not in TensorRT 8.5


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A network that finds things."
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    export_onnx(network("yolox-nano"), path, SIZE, confidence=.3)
    return path


def test_bytes_as_input(tmp_path, docks):
    export_onnx(network("yolox-nano"), tmp_path / "net.onnx", SIZE, uint8=True)
    report = quick(tmp_path / "net.onnx", tmp_path / "int8.onnx", docks)
    check_pairs(tmp_path / "int8.onnx", report)
    session = open_session(tmp_path / "int8.onnx", threads=1)
    assert session.contract.layout == "hwc" and len(session(scene(1)).scores) >= 0


def test_nms_in_the_graph(tmp_path, docks):
    export_onnx(network("yolox-nano"), tmp_path / "net.onnx", SIZE, output="nms", confidence=.3)
    report = quick(tmp_path / "net.onnx", tmp_path / "int8.onnx", docks)
    assert list(report.kept.values()) == ["output convolution"] * 9


def test_the_same_bytes_again_and_the_source_untouched(tmp_path, docks, exported):
    before = exported.read_bytes()
    for name in "one.onnx", "two.onnx": quick(exported, tmp_path / name, docks, method="percentile")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
    assert exported.read_bytes() == before
    contract = open_session(tmp_path / "one.onnx").contract
    assert contract.extra["calibration"]["percentile"] == 99.99


def test_a_file_of_others(tmp_path, docks, exported):
    "Without our metadata, unnamed nodes, opset as it is: read by a given contract, which the file then has."
    model = onnx.load(exported)
    contract = Contract.from_json({p.key: p.value for p in model.metadata_props}[METADATA_KEY])
    del model.metadata_props[:]
    model.metadata_props.add(key="author", value="somebody")
    for node in model.graph.node: node.name = ""
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(InputError, match="contract"): quick(tmp_path / "foreign.onnx", tmp_path / "a.onnx", docks)
    report = quick(tmp_path / "foreign.onnx", tmp_path / "a.onnx", docks, contract=contract._replace(extra={}))
    texts = {p.key: p.value for p in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert texts["author"] == "somebody" and {GRAPH_KEY, METADATA_KEY} <= set(texts)
    assert len(report.kept) == 9 and open_session(tmp_path / "a.onnx").contract.name == contract.name


def test_measured_and_put_back(tmp_path, docks, exported):
    labeled = label_with(open_session(exported, threads=1), docks, .3)
    lines = []
    report = quantize(exported, tmp_path / "int8.onnx", labeled, count=8, max_ap_loss=.02, threads=1, say=lines.append,
                      board="orin-nano")
    exact, half, int8 = report.measured
    assert exact.ap == 1 and half.ap > .9 and int8.ap < 1
    assert report.ap_loss == exact.ap - int8.ap <= .02
    assert report.before.ap < .98 and report.sensitive and "costs too much AP" in report.kept.values()
    kept = {one.name for one in report.sensitive if one.is_kept}
    assert kept == {name for name, reason in report.kept.items() if reason == "costs too much AP"}
    assert sum(one.ap_loss is not None for one in report.sensitive) == 5
    check_pairs(tmp_path / "int8.onnx", report)
    assert any("does not pay" in line for line in lines) and any("FP16" in line for line in lines)
    best = open_session(tmp_path / "int8.onnx").contract.extra["best_confidence"]
    assert set(best) == set(report.shifts) <= set(CLASSES)
    text = str(report)
    assert "best confidence of" in text and "FP16 (emulated)" in text and "**" not in text
    record = report.to_json()
    assert record["ap_loss"] == report.ap_loss and record["gain"]["pays"] is False
    assert "| alone in INT8 |" in report._repr_markdown_()


def test_other_classes_are_said_before_the_work(tmp_path, docks, exported, monkeypatch):
    monkeypatch.setattr("jetson_det.export.quantize.observe", None)
    others = dataclasses.replace(docks, classes=[f"thing {k}" for k in range(len(docks.classes))])
    with pytest.raises(InputError, match="no class in common|none of"):
        quantize(exported, tmp_path / "int8.onnx", others, count=4, threads=1, say=quiet)
    assert not list(tmp_path.glob("int8*"))


def test_what_was_asked_for_stays(tmp_path, docks, exported):
    name = next(layer.name for layer in quantizable(read_onnx(exported)) if not layer.stays)
    report = quick(exported, tmp_path / "int8.onnx", docks, keep=[name])
    assert report.kept[name] == "asked for" and not report.measured and report.ap_loss is None
    assert any("AP was not measured" in note for note in report.notes)
    with pytest.raises(InputError, match="no such convolution"): quick(exported, tmp_path / "b.onnx", docks, keep=["x"])


@given(st.lists(st.floats(0, .1), min_size=1, max_size=30), st.floats(0, .1))
def test_fewest_kept(losses, bound):
    losses = sorted(losses, reverse=True) + [0.] # that of n layers in float, of len(losses) - 1
    layers = range(len(losses) - 1)
    count = _fewest_kept(layers, lambda n: losses[n], bound)
    assert 1 <= count <= len(layers)
    assert losses[count] <= bound and (count == 1 or losses[count - 1] > bound)


# ---------------------------------------------------------------- refusals

def with_name(source, path, **fields):
    "The file with another contract."
    model = onnx.load(source)
    texts = {p.key: p.value for p in model.metadata_props}
    contract = Contract.from_json(texts[METADATA_KEY])
    texts[METADATA_KEY] = contract._replace(**fields).to_json()
    onnx.helper.set_model_props(model, texts)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("board", ["nano", "nano-2gb", "tx2", "Jetson TX2"])
def test_boards_without_fast_int8(tmp_path, docks, exported, board):
    with pytest.raises(InputError, match="no fast INT8.*FP16"): quick(exported, tmp_path / "a.onnx", docks, board=board)
    assert not (tmp_path / "a.onnx").exists()


def test_the_board_of_the_export_counts(tmp_path, docks, exported):
    path = with_name(exported, tmp_path / "net.onnx", extra=dict(tensorrt=dict(board="nano", versions="8.2")))
    with pytest.raises(InputError, match="Jetson Nano 4GB has no fast INT8"): quick(path, tmp_path / "a.onnx", docks)
    path = with_name(exported, tmp_path / "net.onnx",
                     extra=dict(tensorrt=dict(board="orin-nx", versions="10.3", precision="fp16")))
    quick(path, tmp_path / "a.onnx", docks)
    made = open_session(tmp_path / "a.onnx").contract.extra["tensorrt"]
    assert made["precision"] == "int8" and made["board"] == "orin-nx"


def test_yolo26(tmp_path, docks, exported):
    path = with_name(exported, tmp_path / "net.onnx", name="yolo26n")
    with pytest.raises(InputError, match="YOLO26 does not build in INT8.*10.7"):
        quick(path, tmp_path / "a.onnx", docks, board="orin-nano")
    with pytest.raises(InputError, match="10.7"): quick(path, tmp_path / "a.onnx", docks, tensorrt="10.3")
    report = quick(path, tmp_path / "a.onnx", docks, board="orin-nano", tensorrt="10.7")
    assert any("lowers YOLO26's scores" in note for note in report.notes)


def test_what_is_not_fp32(tmp_path, docks, exported):
    quick(exported, tmp_path / "int8.onnx", docks)
    with pytest.raises(InputError, match="quantized already.*FP32 file"):
        quick(tmp_path / "int8.onnx", tmp_path / "a.onnx", docks)
    half = as_fp16(exported, tmp_path / "half.onnx")
    with pytest.raises(InputError, match="fp16.*start from the FP32 file"): quick(half, tmp_path / "a.onnx", docks)


@pytest.mark.parametrize("options, words", [
    (dict(method="kl"), "method 'kl'"), (dict(max_ap_loss=5), "max_ap_loss is 5"), (dict(max_ap_loss=True), "True"),
    (dict(count=0), "count is 0"), (dict(keep="Conv_1"), "list of names"), (dict(board="orin"), "unknown board"),
    (dict(tensorrt="new"), "TensorRT 'new'"), (dict(percentile=3, method="percentile"), "percentile is 3"),
    (dict(contract="yolo99"), "yolo99")])
def test_wrong_options(tmp_path, docks, exported, options, words):
    with pytest.raises(InputError, match=words) as e: quick(exported, tmp_path / "a.onnx", docks, **options)
    assert "\n" not in str(e.value) and not (tmp_path / "a.onnx").exists()


def test_where_it_is_written(tmp_path, docks, exported):
    for path, words in ((exported, "net.onnx"), (tmp_path / "a.txt", "ends in .onnx"),
                        (tmp_path / "no/a.onnx", "no such")):
        with pytest.raises(InputError, match=words): quick(exported, path, docks)
    (tmp_path / "mine.onnx").write_bytes(b"somebody's")
    with pytest.raises(InputError, match="did not write it"): quick(exported, tmp_path / "mine.onnx", docks)
    with pytest.raises(InputError, match="training split alone"):
        quantize(exported, tmp_path / "a.onnx", docks.split("val"), say=quiet)


# ---------------------------------------------------------------- damage

def small_detector():
    "16 anchor points of 8 pixels: boxes and scores from two convolutions."
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:4, :4] * 8
    corners = np.stack([x, y, x + 12, y + 12]).reshape(1, 4, 16).transpose(0, 2, 1).astype(np.float32)
    weights = dict(w=rng.normal(size=(8, 3, 8, 8)) / 500, w2=rng.normal(size=(6, 8, 1, 1)), corners=corners,
                   flat=np.array([1, 6, 16]), zero=np.array([0]), four=np.array([4]), six=np.array([6]),
                   axis=np.array([2]))
    node = helper.make_node
    nodes = [node("Conv", ["images", "w"], ["a"], "first", strides=[8, 8]), node("Relu", ["a"], ["b"], "relu"),
             node("Conv", ["b", "w2"], ["c"], "last"), node("Reshape", ["c", "flat"], ["d"], "reshape"),
             node("Transpose", ["d"], ["e"], "transpose", perm=[0, 2, 1]),
             node("Slice", ["e", "zero", "four", "axis"], ["f"], "distances"),
             node("Add", ["f", "corners"], ["boxes"], "decode"),
             node("Slice", ["e", "four", "six", "axis"], ["g"], "logits"),
             node("Sigmoid", ["g"], ["scores"], "sigmoid")]
    tensors = [numpy_helper.from_array(v.astype(np.float32) if v.dtype == np.float64 else v, k)
               for k, v in weights.items()]
    ends = [helper.make_tensor_value_info("boxes", FLOAT, [1, 16, 4]),
            helper.make_tensor_value_info("scores", FLOAT, [1, 16, 2])]
    image = helper.make_tensor_value_info("images", FLOAT, [1, 3, 32, 32])
    graph = helper.make_graph(nodes, "g", [image], ends, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    contract = Contract("yolox", "small", ("Sack", "Person"), (32, 32), "boxes_scores")
    onnx.helper.set_model_props(model, {METADATA_KEY: contract.to_json()})
    return model


def external(model, **entries):
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items(): tensor.external_data.add(key=key, value=str(value))


def put(target, **values):
    for key, value in values.items(): setattr(target, key, value)


def attribute(model, node, name, *values):
    for a in model.graph.node[node].attribute:
        if a.name == name: a.ints[:] = values


EDITS = {
    "leaves": lambda m: external(m, location="../secret"),
    "absolute": lambda m: external(m, location="/etc/passwd"),
    "missing": lambda m: external(m, location="w.bin"),
    "offset": lambda m: external(m, location="net.onnx", offset=2**40),
    "circle": lambda m: m.graph.node[0].input.__setitem__(0, "c"),
    "order": lambda m: m.graph.node.insert(0, m.graph.node.pop()),
    "nobody": lambda m: m.graph.node[2].input.__setitem__(1, "nobody"),
    "twice": lambda m: m.graph.node[1].output.__setitem__(0, "a"),
    "dimension": lambda m: m.graph.initializer[0].dims.__setitem__(0, -8),
    "too few": lambda m: m.graph.initializer[0].dims.__setitem__(0, 9),
    "other channels": lambda m: m.graph.initializer[0].dims.__setitem__(slice(None), [3, 8, 8, 8]),
    "type": lambda m: put(m.graph.initializer[0], data_type=99),
    "integers": lambda m: put(m.graph.initializer[0], data_type=TensorProto.INT32),
    "ir": lambda m: put(m, ir_version=99),
    "opset": lambda m: put(m.opset_import[0], version=999),
    "opset 0": lambda m: put(m.opset_import[0], version=0),
    "no opset": lambda m: m.ClearField("opset_import"),
    "operator": lambda m: put(m.graph.node[1], op_type="Frobnicate"),
    "domain": lambda m: put(m.graph.node[1], domain="elsewhere"),
    "no operator": lambda m: put(m.graph.node[1], op_type=""),
    "no inputs": lambda m: m.graph.ClearField("input"),
    "no outputs": lambda m: m.graph.ClearField("output"),
    "no nodes": lambda m: m.graph.ClearField("node"),
    "no convolution input": lambda m: m.graph.node[0].ClearField("input"),
    "one input": lambda m: m.graph.node[0].input.pop(),
    "strides": lambda m: attribute(m, 0, "strides", 0, 0),
    "permutation": lambda m: attribute(m, 4, "perm", 0, 9, 1),
    "contract": lambda m: put(m.metadata_props[0], value="{"),
    "other contract": lambda m: put(m.metadata_props[0], value="[]"),
    "classes": lambda m: put(m.metadata_props[0], value=m.metadata_props[0].value.replace('"Person"', '"Person", "x"')),
    "size": lambda m: put(m.metadata_props[0], value=m.metadata_props[0].value.replace("32", "64")),
    "no contract": lambda m: m.ClearField("metadata_props"),
    "not a number": lambda m: put(m.graph.initializer[0], raw_data=np.full((8, 3, 8, 8), np.nan, np.float32).tobytes()),
    "infinite": lambda m: put(m.graph.initializer[0], raw_data=np.full((8, 3, 8, 8), 1e38, np.float32).tobytes()),
}
CUTS = [f"cut at {k}/24" for k in range(24)]
OTHERS = {"empty": b"", "zip": b"PK\x03\x04 zip", "text": b"just some text", "page": b"<!DOCTYPE html>",
          "zeros": bytes(4096), "pickle": b"\x80\x04\x95", "lfs": b"version https://git-lfs.github.com/spec/v1"}


def damaged(name):
    "The bytes of a damaged file."
    if name in OTHERS: return OTHERS[name]
    model = small_detector()
    if name == "not UTF-8": return model.SerializeToString().replace(b"Sigmoid", b"Sigm\xffid")
    if name in EDITS:
        EDITS[name](model)
        return model.SerializeToString()
    data = model.SerializeToString()
    return data[:len(data) * int(name.split()[-1].split("/")[0]) // 24]


def test_the_small_detector_is_sound(tmp_path, docks):
    (tmp_path / "net.onnx").write_bytes(small_detector().SerializeToString())
    report = quick(tmp_path / "net.onnx", tmp_path / "a.onnx", docks)
    assert report.kept == {"last": "output convolution"} and report.quantized == 1


@pytest.mark.parametrize("name", [*EDITS, *CUTS, *OTHERS, "not UTF-8"])
def test_damaged_files_are_one_line(tmp_path, docks, name):
    (tmp_path / "net.onnx").write_bytes(damaged(name))
    with pytest.raises(InputError) as e: quick(tmp_path / "net.onnx", tmp_path / "a.onnx", docks)
    assert "\n" not in str(e.value) and len(str(e.value)) < 1000
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bytes_are_one_line_or_a_whole_file(tmp_path, docks, seed):
    rng = np.random.default_rng(seed)
    data = bytearray(small_detector().SerializeToString())
    for place in rng.integers(0, len(data), int(rng.integers(1, 6))): data[place] ^= int(rng.integers(1, 256))
    # most of the bytes are weights; one flip is elsewhere
    data[int(rng.integers(max(len(data) - 900, 0), len(data)))] ^= int(rng.integers(1, 256))
    (tmp_path / "net.onnx").write_bytes(bytes(data))
    try: quick(tmp_path / "net.onnx", tmp_path / "a.onnx", docks)
    except InputError as e:
        assert "\n" not in str(e) and len(str(e)) < 1000
        assert not (tmp_path / "a.onnx").exists()
    else: open_session(tmp_path / "a.onnx", threads=1)


# ---------------------------------------------------------------- others' judgment

def test_tensorrt_rtx_takes_it(tmp_path, docks, exported):
    "The referee of the extra [lint-check]: TensorRT-RTX parses and builds it. It is not a Jetson's TensorRT."
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="the referee is not installed: pip install .[lint-check]",
                              exc_type=ImportError)
    quick(exported, tmp_path / "int8.onnx", docks)
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    built = builder.create_network(0)
    parser = trt.OnnxParser(built, logger)
    assert parser.parse((tmp_path / "int8.onnx").read_bytes())
    kinds = [built.get_layer(k).type for k in range(built.num_layers)]
    assert kinds.count(trt.LayerType.QUANTIZE) == kinds.count(trt.LayerType.DEQUANTIZE) == 208
    assert builder.build_serialized_network(built, builder.create_builder_config()) is not None


@pytest.mark.data
def test_a_published_file_of_opset_11(tmp_path):
    "Official-style YOLOX-nano: no metadata, undecoded outputs, opset 11, which has no scale for each channel."
    data = Path(os.environ["JETSON_DET_DATA"])
    source = data / "models/yolox_nano_coco_416.onnx"
    ds = read_dataset(data / "datasets/bccd")
    report = quick(source, tmp_path / "int8.onnx", ds, count=3, contract="yolox", board="orin-nano")
    check_pairs(tmp_path / "int8.onnx", report)
    assert (report.quantized, len(report.kept)) == (104, 9)
    session = open_session(tmp_path / "int8.onnx", threads=1) # its contract came from the preset
    assert session.contract.opset == 13 and session.contract.output == "yolox-raw"
    assert lint(tmp_path / "int8.onnx", "orin-nano", precision="int8").ok
