"""A network that was trained in fake INT8, exported: each convolution computes what its layer computes, with the
trained scales; the file is what the board's lint, NVIDIA's parser and the runtime take."""
import numpy as np
import onnx
import pytest
import torch
from exported import SIZE, scene
from kept import network
from referee import needs_referee, takes
from train_helpers import each_family

from jetson_det.core import InputError
from jetson_det.export.calibration import open_with_outputs, run_graph
from jetson_det.export.graph import read_onnx
from jetson_det.export.int8_pairs import add_trained_pairs
from jetson_det.export.lint import lint
from jetson_det.export.onnx import export_onnx
from jetson_det.export.quantize import quantize
from jetson_det.models.checkpoint import save_checkpoint
from jetson_det.models.fake_quant import (
    fake_quantized,
    limits_of,
    quantize_for_training,
    round_input,
    round_weights,
    without_fake_quant,
)
from jetson_det.models.int8 import int8_layers
from jetson_det.runtime.sessions import open_session, verify_onnx

pytestmark = pytest.mark.usefixtures("one_thread", "kept_graphs")
QUICK = ("yolox-nano",)
OTHERS = ("dfine-n", "yolov8n", "yolo11n-p2-lite", "rtdetr-r18", "rtdetrv2-r18")


def inputs_of(model, count=3):
    frames = np.stack([scene(i, SIZE).transpose(2, 0, 1) for i in range(count)])
    return model.normalize(torch.from_numpy(frames))


def rounding_network(name, put=None):
    model = network(name, put)
    x = inputs_of(model)
    quantize_for_training(model, SIZE, lambda: iter([x]))
    return model


@pytest.fixture(scope="module")
def rounding(): return rounding_network("yolox-nano")


@pytest.fixture(scope="module")
def exported(rounding, tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    return path, export_onnx(rounding, path, SIZE, confidence=.3)


class Conv:
    "A convolution of the file, and its parts: what goes in before it is rounded, what is rounded, what comes out."
    def __init__(self, graph, node):
        back = graph.producers[node.input[0]]
        rounding = graph.producers[back.input[0]]
        self.name = node.name
        self.tensors = (rounding.input[0], back.output[0], node.output[0])
        self.scale = graph.constants[rounding.input[1]]
        weights = graph.producers[graph.producers[node.input[1]].input[0]]
        self.weight_scale = graph.constants[weights.input[1]]
        self.weight = graph.constants[weights.input[0]]
        self.options = {a.name: list(a.ints) or a.i for a in node.attribute}

    def __call__(self, x, weight):
        "As the file says: the exporter may have taken a padding in front into the convolution."
        top, left, bottom, right = self.options["pads"]
        x = torch.nn.functional.pad(x, (left, right, top, bottom))
        return torch.nn.functional.conv2d(x, weight, None, self.options["strides"], 0, self.options["dilations"],
                                          self.options["group"])


def convolutions(path):
    graph = read_onnx(path)
    found = []
    for node in graph.nodes:
        maker = graph.producers.get(node.input[0]) if node.input else None
        if node.op_type == "Conv" and maker is not None and maker.op_type == "DequantizeLinear":
            found.append(Conv(graph, node))
    return found


def check_layer_by_layer(model, path):
    """Each convolution of the file gets what the file gives it. Rounding differs by at most one step, and almost
    nowhere; what it makes of the rounded tensor is what the layer makes of it, to float32."""
    layers = {one.node: one.module for one in int8_layers(without_fake_quant(model), SIZE)}
    found = convolutions(path)
    assert {layers[conv.name] for conv in found} == set(fake_quantized(model))
    names = list(dict.fromkeys(name for conv in found for name in conv.tensors))
    loaded = onnx.load(path)
    x = inputs_of(model, 1).numpy()
    fed = loaded.graph.input[0].name
    inner = [name for name in names if name != fed]
    values = dict(zip(inner, run_graph(open_with_outputs(loaded, inner, threads=1), inner, x)), **{fed: x})
    limits = limits_of(model)
    for conv in found:
        module = layers[conv.name]
        layer = model.get_submodule(module)
        assert conv.scale == pytest.approx(limits[module]/127, rel=1e-6), module
        largest = np.abs(conv.weight).reshape(len(conv.weight), -1).max(1)
        assert conv.weight_scale == pytest.approx(largest/127, rel=1e-5), module
        taken, rounded, made = (values[name] for name in conv.tensors)
        ours = round_input(torch.from_numpy(taken), torch.tensor(limits[module])).numpy()
        apart = np.rint(np.abs(ours - rounded)/conv.scale)
        assert apart.max() <= 1 and (apart > 0).mean() < 1e-3, module
        # the layer's rounded weights with the factor of its BatchNorm, which is folded into the file
        weight = layer.weight.detach()
        factor = largest/np.maximum(np.abs(weight.numpy()).reshape(len(weight), -1).max(1), 1e-30)
        signs = np.sign((conv.weight*weight.numpy()).reshape(len(weight), -1).sum(1))
        scaled = round_weights(weight)*torch.from_numpy(np.where(signs, signs, 1)*factor).float().view(-1, 1, 1, 1)
        wanted = conv(torch.from_numpy(rounded), scaled).numpy()
        # a constant of each channel, the bias, is left
        rest = made - wanted
        spread = np.ptp(rest, axis=(0, 2, 3))
        assert spread.max() <= 2e-3*max(np.abs(made).max(), 1e-6), (module, spread.max(), np.abs(made).max())


@pytest.mark.parametrize("name", [*each_family(QUICK), *each_family(OTHERS, slow=True)])
def test_each_family_computes_what_was_trained(tmp_path, name, rounding, monkeypatch):
    model = rounding if name == rounding.name else rounding_network(name, monkeypatch.setitem)
    contract = export_onnx(model, tmp_path / "net.onnx", SIZE, opset=13)
    assert contract.extra["precision"] == "int8" and contract.extra["qat"] == {"layers": len(fake_quantized(model))}
    assert read_onnx(tmp_path / "net.onnx").opset == 13
    check_layer_by_layer(model, tmp_path / "net.onnx")
    found = lint(tmp_path / "net.onnx", "orin-nx", None, "int8")
    assert not [f for f in found.findings if f.level == "error" and "QuantizeLinear" in f.what]


def test_the_pairs_are_in_front_of_convolutions_alone(exported, rounding):
    path, _ = exported
    graph = read_onnx(path)
    for node in graph.nodes:
        if node.op_type != "DequantizeLinear": continue
        assert {taker.op_type for taker in graph.consumers[node.output[0]]} == {"Conv"} # no sum: as in training
    for node in graph.nodes:
        if node.op_type != "QuantizeLinear": continue
        zero = graph.constants[node.input[2]]
        assert zero.dtype == np.int8 and not zero.any()
    assert len(convolutions(path)) == len(fake_quantized(rounding))
    assert all(np.ndim(conv.weight_scale) == 1 and np.ndim(conv.scale) == 0 for conv in convolutions(path))


def test_lint_referee_and_runtime_take_it(exported, rounding):
    path, contract = exported
    assert not [f for f in lint(path, "orin-nano", None, "int8").findings if f.level == "error"]
    session = open_session(path, threads=1)
    assert session.contract == contract and "as it was exported" in " ".join(verify_onnx(path))
    assert len(session(scene(1)).scores) >= 0
    with torch.no_grad(): _, scores = rounding.decode(rounding(inputs_of(rounding, 1)))
    _, found = session.infer(inputs_of(rounding, 1).numpy())
    assert 0 <= np.abs(found - scores.numpy()).mean() < .05


def test_the_referee_builds_it(exported):
    needs_referee()
    assert takes(exported[0].read_bytes())


@pytest.mark.parametrize("options", [dict(uint8=True, output="nms", opset=17), dict(batch=2),
                                     dict(simplify=False), dict(dynamic_batch=True)], ids=lambda o: " ".join(o))
def test_with_every_end(tmp_path, rounding, options):
    contract = export_onnx(rounding, tmp_path / "net.onnx", SIZE, confidence=.3, **options)
    assert len(convolutions(tmp_path / "net.onnx")) == len(fake_quantized(rounding))
    session = open_session(tmp_path / "net.onnx", threads=1)
    frames = [scene(1), scene(2)]
    found = session(frames) if session.batch_size != 1 else [session(frame) for frame in frames]
    assert len(found) == 2 and contract.extra["precision"] == "int8"


@pytest.mark.slow
def test_a_checkpoint_gives_the_same_bytes_each_time(tmp_path, rounding):
    contract = rounding.contract(SIZE, extra={"qat": {"layers": fake_quantized(rounding)}})
    save_checkpoint(tmp_path / "run", rounding, None, None, {}, contract)
    for name in ("a.onnx", "b.onnx"): export_onnx(tmp_path / "run", tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert len(convolutions(tmp_path / "a.onnx")) == len(fake_quantized(rounding))


def test_it_is_not_quantized_again(tmp_path, exported):
    with pytest.raises(InputError, match="quantized already"):
        quantize(exported[0], tmp_path / "a.onnx", tmp_path, say=lambda line: None)


def test_a_graph_of_another_network_is_refused(rounding, graphs):
    graph = graphs.trace_onnx(network("yolox-nano"), SIZE)
    for node in graph.graph.node: node.name = ""
    with pytest.raises(InputError, match="are not in the exported graph"): add_trained_pairs(graph, rounding, SIZE)


def test_two_thresholds_for_one_tensor_are_refused(rounding, graphs):
    import copy
    model = copy.deepcopy(rounding)
    name = next(name for name in fake_quantized(model) if "dark2.1.conv2" in name) # reads what conv1 reads
    model.get_submodule(name).int8_limit.mul_(2)
    graph = graphs.simplify_onnx(graphs.trace_onnx(without_fake_quant(model), SIZE))
    with pytest.raises(InputError, match="two thresholds"): add_trained_pairs(graph, model, SIZE)


def test_for_a_board(tmp_path, rounding):
    from jetson_det.export.tensorrt import build_command, export_tensorrt
    contract = rounding.contract(SIZE, extra={"qat": {"layers": fake_quantized(rounding)}})
    save_checkpoint(tmp_path / "run", rounding, None, None, {}, contract)
    made = export_tensorrt(tmp_path / "run", tmp_path / "net.onnx", "orin-nano")
    assert made.extra["tensorrt"]["precision"] == made.extra["precision"] == "int8"
    assert {"--fp16", "--int8"} <= set(build_command(made, tmp_path / "net.onnx"))
    for board, options, words in (("nano", {}, "no fast INT8.*export the run that it began with"),
                                  ("orin-nano", dict(precision="fp16"), "precision fp16: the network was trained")):
        with pytest.raises(InputError, match=words):
            export_tensorrt(tmp_path / "run", tmp_path / "a.onnx", board, **options)
