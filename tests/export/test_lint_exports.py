"""Our own exports through the lint: family x operator set x output x input, for every version of TensorRT. Clean, or
exactly what is true of them, from the table below; and what is said of TensorRT 11 against the referee."""
import onnx
import pytest
from exported import FAMILY_NAMES, NEEDS_NO_NMS, SIZE
from kept import network
from referee import takes
from train_helpers import each_family

from jetson_det.export.ends import add_efficient_nms, add_nms, take_bytes
from jetson_det.export.lint import lint
from jetson_det.export.rules import VERSIONS

pytestmark = pytest.mark.usefixtures("one_thread")
DETRS = ("rtdetr-r18", "rtdetrv2-r18", "dfine-n")
OPSETS = (13, 17, 19)
QUICK = {"yolox-nano": 13, "yolov8n": 17, "yolo11n-p2-lite": 19, "yolo26n": 13, "rtdetr-r18": 13,
         "dfine-n": 19} # the quick run: one of each family, and its operator set


def before(version): return tuple(v for v in VERSIONS if VERSIONS.index(v) < VERSIONS.index(version))
def since(version): return tuple(v for v in VERSIONS if v not in before(version))


def wanted(name, opset, output, uint8):
    "What is true of an export in FP32: (effect, a part of the text) -> versions, with the reason of each."
    rows = {}
    # the support matrices: 8.2 reads operators up to opset 13, 8.4 to 8.6 up to 17, 9 up to 19
    if opset > 13: rows["limited", "promises to read up to 13"] = ("8.2",)
    if opset > 17: rows["limited", "promises to read up to 17"] = ("8.5", "8.6")
    # from opset 17 on LayerNorm is one operator, which 8.6 is the first to import
    if opset >= 17 and name in DETRS:
        rows["refused", "LayerNormalization is imported from TensorRT 8.6"] = before("8.6")
    # bytes as a network's input came with 8.5
    if uint8: rows["refused", "no bytes (UINT8) as input"] = ("8.2",)
    # opset 18 made axes an input, which importers before 10.0 do not read; the choice of queries reduces by maximum
    if opset >= 18 and name in DETRS: rows["wrong", "ignores the axes of opset 18"] = before("10.3")
    if output == "nms":
        rows["wrong", "its rows are padded"] = ("8.2",) # by way of the plugin, in a fixed shape
        rows["limited", "gives as many rows as it finds"] = tuple(v for v in since("8.5") if v != "11.4")
        rows["refused", "parses and does not build"] = ("11.4",) # the referee says so below
    if output == "efficient-nms":
        rows["limited", "4096 best candidates"] = VERSIONS # the plugin's documentation
        rows["limited", "is deprecated"] = ("10.13", "10.16") # since 10.12
        rows["refused", "is not found"] = ("11.4",)
    return rows


@pytest.fixture(scope="module")
def traced(graphs):
    "(name, opset) -> a network and its graph."
    with pytest.MonkeyPatch.context() as patch:
        def get(name, opset):
            model = network(name, patch.setitem)
            return model, graphs.simplify_onnx(graphs.trace_onnx(model, SIZE, opset))
        yield get


def exports(traced, name, opset):
    "(output, uint8, graph) of each kind, as `export_onnx` makes them."
    model, graph = traced(name, opset)
    for output in ("raw",) if name in NEEDS_NO_NMS else ("raw", "nms", "efficient-nms"):
        for uint8 in False, True:
            copy = onnx.ModelProto.FromString(graph.SerializeToString())
            if uint8: take_bytes(copy, model.contract(SIZE))
            if output == "nms": add_nms(copy)
            if output == "efficient-nms": add_efficient_nms(copy)
            yield output, uint8, copy


def check(traced, name, opset, folder):
    for output, uint8, graph in exports(traced, name, opset):
        path = folder/"m.onnx"
        path.write_bytes(graph.SerializeToString())
        report = lint(path, precision="fp32")
        rows = wanted(name, opset, output, uint8)
        for f in report.findings:
            key = next((key for key in rows if key[0] == f.effect and key[1] in f.what), None)
            assert key is not None and f.versions == rows[key], (output, uint8, f)
        said = {key for key in rows if any(key[0] == f.effect and key[1] in f.what for f in report.findings)}
        assert said == set(rows), (output, uint8, set(rows) - said)


@pytest.mark.parametrize("name", each_family(QUICK))
def test_what_the_lint_says_of_our_exports(name, traced, tmp_path):
    check(traced, name, QUICK[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", each_family(FAMILY_NAMES))
def test_what_the_lint_says_of_all_our_exports(name, traced, tmp_path):
    for opset in OPSETS:
        if opset != QUICK.get(name): check(traced, name, opset, tmp_path)


def against_referee(traced, name, opset, kinds, folder):
    "The kinds of a network's files: what the lint says of 11.4 is what the referee does."
    for output, uint8, graph in exports(traced, name, opset):
        if (output, uint8) not in kinds: continue
        (folder/"m.onnx").write_bytes(graph.SerializeToString())
        report = lint(folder/"m.onnx", tensorrt="11.4", precision="fp32")
        assert takes(graph.SerializeToString()) == report.takes == (output == "raw"), (output, uint8, report.findings)


@pytest.mark.parametrize("name", each_family(QUICK))
def test_the_referee_agrees(name, traced, tmp_path):
    "A family's plain file; of YOLOX what the referee refuses too."
    kinds = [("raw", name in ("yolov8n", "rtdetr-r18"))] # bytes for some, floats for others
    if name == "yolox-nano": kinds += [("nms", False), ("efficient-nms", True)]
    against_referee(traced, name, QUICK[name], kinds, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", each_family(FAMILY_NAMES))
def test_the_referee_agrees_on_all(name, traced, tmp_path):
    kinds = [(output, uint8) for output in ("raw", "nms", "efficient-nms") for uint8 in (False, True)]
    for opset in OPSETS: against_referee(traced, name, opset, kinds, tmp_path)
