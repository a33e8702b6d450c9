"""Fake quantization: the grid against numpy, the straight-through gradient, BatchNorm's folding, thresholds against
those of an exported file, and that a network keeps it when it is copied, averaged and loaded."""
import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from exported import CLASSES, SIZE, network, scene  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.extra.numpy import arrays  # noqa: E402

from int8_helpers import layers_found_once  # noqa: E402

from jetson_det.core import InputError  # noqa: E402
from jetson_det.models.checkpoint import save_checkpoint  # noqa: E402
from jetson_det.models.fake_quant import (  # noqa: E402
    add_fake_quant,
    calibrate_inputs,
    fake_quantized,
    limits_of,
    quantize_for_training,
    rebuild_fake_quant,
    round_input,
    round_weights,
    without_fake_quant,
)
from jetson_det.models.int8 import int8_layers  # noqa: E402
from jetson_det.models.session import load_detector  # noqa: E402
from jetson_det.models.thresholds import threshold  # noqa: E402
from jetson_det.models.zoo import create_model  # noqa: E402
from jetson_det.train.ema import ModelEMA  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
NUMBERS = st.floats(-50, 50, width=32)


def steps_of(values, scale, low=-128):
    "Signed 8-bit numbers, by numpy in double precision."
    return np.clip(np.rint(values.astype(np.float64)/scale), low, 127)


@given(arrays(np.float32, 20, elements=NUMBERS), st.floats(.015625, 60, width=32))
def test_inputs_lie_on_the_grid(values, limit):
    x = torch.tensor(values, requires_grad=True)
    y = round_input(x, torch.tensor(limit))
    y.sum().backward()
    scale = np.float32(limit)/np.float32(127)
    found = y.detach().numpy().astype(np.float64)/scale
    assert np.abs(found - np.rint(found)).max() < 1e-3 and found.min() > -128.01 and found.max() < 127.01
    exact = values.astype(np.float64)/scale
    on_edge = np.abs(np.abs(exact - np.floor(exact)) - .5) < 1e-3 # either neighbor is right
    assert np.abs(np.rint(found) - steps_of(values, scale))[~on_edge].max(initial=0) == 0
    inside = np.abs(exact) < 127
    assert (x.grad.numpy()[inside] == 1).all() and (x.grad.numpy()[np.abs(exact) > 129] == 0).all()


@given(arrays(np.float32, (4, 9), elements=NUMBERS), arrays(np.float32, 4, elements=st.floats(.015625, 30, width=32)),
       st.lists(st.booleans(), min_size=4, max_size=4))
def test_folding_batchnorm_changes_no_integer(values, factors, signs):
    "With a scale for each output channel a factor of the channel passes through the rounding."
    weight = torch.tensor(values).reshape(4, 1, 3, 3)
    factor = torch.tensor(np.where(signs, factors, -factors), dtype=torch.float32).reshape(4, 1, 1, 1)
    folded, after = round_weights(weight*factor), round_weights(weight)*factor
    step = (weight*factor).flatten(1).abs().amax(1).reshape(4, 1, 1, 1)/127
    differs = (folded - after).abs() > 1e-3*step
    # a weight in the middle between two steps may fall to either side
    place = weight.double()/(weight.flatten(1).abs().amax(1).reshape(4, 1, 1, 1).double()/127).clamp(min=1e-300)
    in_the_middle = ((place - place.floor()) - .5).abs() < 1e-3
    assert not (differs & ~in_the_middle).any()


def test_weights_never_reach_minus_128_and_zeros_stay():
    weight = torch.tensor([[-2., 1., .5], [0., 0., 0.]]).reshape(2, 3, 1, 1)
    rounded = round_weights(weight)
    assert rounded[0, 0] == pytest.approx(-2.) and rounded.isfinite().all() and not rounded[1].any()


@pytest.fixture(scope="module", autouse=True)
def graph_read_once():
    with layers_found_once(): yield


@pytest.fixture(scope="module")
def images():
    return np.stack([scene(i, SIZE).transpose(2, 0, 1) for i in range(4)])


@pytest.fixture(scope="module")
def rounding(images):
    "A network in fake INT8, and the float network that it was."
    model = network("yolox-nano")
    exact = copy.deepcopy(model)
    x = model.normalize(torch.from_numpy(images))
    report = quantize_for_training(model, SIZE, lambda: iter(x.split(2)))
    assert report.images == 4 and report.layers == len(fake_quantized(model)) and "entropy" in str(report)
    return model, exact, x


@pytest.fixture(scope="module")
def layers(rounding):
    "What the rule says of the float network."
    return int8_layers(rounding[1], SIZE)


@torch.no_grad()
def answers(model, x): return model.decode(model(x))


def same(one, other): return all(torch.equal(a, b) for a, b in zip(one, other))


def test_the_rule_decides(rounding, layers):
    model, exact, _ = rounding
    assert fake_quantized(model) == sorted((one.module for one in layers),
                                           key=[name for name, _ in model.named_modules()].index)
    assert not fake_quantized(exact) and without_fake_quant(exact) is exact


def test_copies_averages_and_checkpoints_round(rounding, tmp_path):
    model, exact, x = rounding
    wanted = answers(model, x)
    assert not same(wanted, answers(exact, x))
    assert same(answers(copy.deepcopy(model), x), wanted) and same(answers(ModelEMA(model).module, x), wanted)
    contract = model.contract(SIZE, extra={"qat": {"layers": fake_quantized(model)}})
    save_checkpoint(tmp_path / "net", model, None, None, {}, contract)
    loaded, _ = load_detector(tmp_path / "net")
    assert same(answers(loaded, x), wanted) and limits_of(loaded) == limits_of(model)
    assert same(answers(without_fake_quant(loaded), x), answers(exact, x))
    assert set(without_fake_quant(loaded).state_dict()) == set(exact.state_dict())


def test_a_copy_is_apart(rounding):
    "The copy rounds its own weights, not those of the network that it was copied from."
    model, _, x = rounding
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name in fake_quantized(twin): twin.get_submodule(name).weight.zero_()
    assert not same(answers(twin, x), answers(model, x))


def test_thresholds_are_those_of_the_exported_file(rounding, layers, tmp_path):
    "Another way to the same numbers: ONNX Runtime looks at the tensors of the file."
    from jetson_det.export.calibration import observe
    from jetson_det.export.graph import read_onnx
    from jetson_det.export.onnx import export_onnx
    _, exact, x = rounding
    export_onnx(exact, tmp_path / "net.onnx", SIZE)
    graph = read_onnx(tmp_path / "net.onnx")
    taken = {node.name: node.input[0] for node in graph.nodes if node.op_type == "Conv"}
    layers = layers[::7]
    seen = observe(graph.model, [taken[one.node] for one in layers], lambda: (row[None].numpy() for row in x))
    for method, most in (("minmax", 1e-4), ("entropy", .02)):
        found = calibrate_inputs(exact, [one.module for one in layers], lambda: iter(x.split(3)), method)
        apart = [abs(found[one.module]/threshold(seen[taken[one.node]], method) - 1) for one in layers]
        assert np.median(apart) < most and np.quantile(apart, .9) < 10*most, method


def test_the_mode_is_left_as_it_was(images):
    model = network("yolox-nano").train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    calibrate_inputs(model, ["backbone.backbone.stem.conv.conv"], lambda: iter([torch.from_numpy(images).float()]))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_layers_that_take_only_zeros_stay_in_float(images):
    model = network("yolox-nano")
    with torch.no_grad():
        norm = model.backbone.backbone.stem.conv.bn
        norm.weight.zero_()
        norm.bias.zero_()
    x = model.normalize(torch.from_numpy(images[:1]))
    report = quantize_for_training(model, SIZE, lambda: iter([x]))
    assert any("dark2.0.dconv" in name for name in report.idle) and "only zeros" in str(report)
    assert not set(report.idle) & set(fake_quantized(model))


def test_wrong_calls(rounding, images):
    model, exact, x = rounding
    with pytest.raises(InputError, match="in fake INT8 already"): quantize_for_training(model, SIZE, lambda: iter([x]))
    for limits in ({"head": 1.}, {"nowhere": 1.}):
        with pytest.raises(InputError, match="is no convolution"): add_fake_quant(copy.deepcopy(exact), limits)
    name = fake_quantized(model)[0]
    for limit in (0., -1., float("nan"), float("inf")):
        with pytest.raises(InputError, match="threshold of"): add_fake_quant(copy.deepcopy(exact), {name: limit})
    with pytest.raises(InputError, match="not finite"):
        calibrate_inputs(exact, [name], lambda: iter([x*float("nan")]))
    for record in ({"layers": "all"}, {"layers": [3]}, {"layers": {"a": 1}}):
        with pytest.raises(InputError, match="names no convolutions"): rebuild_fake_quant(copy.deepcopy(exact), record)
    for record in (None, {}, {"layers": []}): assert not fake_quantized(rebuild_fake_quant(exact, record))


def test_a_checkpoint_whose_contract_lies(rounding, tmp_path):
    model, _, _ = rounding
    for layers in ([], fake_quantized(model)[:5]):
        contract = model.contract(SIZE, extra={"qat": {"layers": layers}})
        save_checkpoint(tmp_path / "net", model, None, None, {}, contract)
        with pytest.raises(InputError, match="weights are not those of yolox-nano"): load_detector(tmp_path / "net")


def test_half_precision():
    model = create_model("yolox-nano", CLASSES).train()
    x = torch.rand(2, 3, *SIZE)*255
    with torch.no_grad(): model(x)
    quantize_for_training(model, SIZE, lambda: iter([x]))
    with torch.autocast("cpu", torch.bfloat16): outputs = model(x)
    boxes, scores = model.decode(outputs)
    (boxes.float().mean() + scores.float().sum()).backward()
    conv = model.get_submodule(fake_quantized(model)[-1])
    assert conv.weight.grad.isfinite().all() and conv.weight.grad.abs().sum() > 0
