"""export.rewrite: the same numbers in FP32, and close to them where the plain graph overflows in FP16."""
import copy
import io
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported import SIZE, scene
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import network
from train_helpers import each_family

from jetson_det.export.rewrite import rewrite_for_fp16, rewrite_layer_norm, rewrite_softmax, through_fp16
from jetson_det.models.graph import operators, simplify_onnx
from jetson_det.runtime.preprocess import Preprocessor

pytestmark = pytest.mark.usefixtures("one_thread")
D = 24


def traced(module, opset=13):
    "A module's graph on rows of D numbers."
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), (torch.zeros(1, 6, D),), file, opset_version=opset, dynamo=False,
                          input_names=["images"])
    return simplify_onnx(onnx.load_from_string(file.getvalue()))


def opened(graph):
    "A call that runs a graph."
    onnx.checker.check_model(graph, full_check=True)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"images": np.asarray(x, np.float32)})


class Attention(torch.nn.Module):
    def __init__(self, divide):
        super().__init__()
        self.divide = divide

    def forward(self, x):
        product = x @ x.transpose(1, 2)
        return (product/D**.5 if self.divide else product*D**-.5).softmax(-1) @ x


class Middle(torch.nn.Module):
    "A softmax over an axis in the middle, whose scores are used elsewhere too."
    def forward(self, x):
        scores = (x @ x.transpose(1, 2))*.25
        return scores.softmax(1) + scores


torch.manual_seed(0)
NORM = torch.nn.LayerNorm(D)
with torch.no_grad():
    NORM.weight.uniform_(.5, 2)
    NORM.bias.normal_()
PLAIN = traced(NORM)
SAFE = copy.deepcopy(PLAIN)
COUNT = rewrite_layer_norm(SAFE)
PLAIN_RUN, SAFE_RUN, SAFE_HALF = opened(PLAIN), opened(SAFE), opened(through_fp16(SAFE))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.floats(-4, 4.3), st.floats(-3, 3))
def test_layer_norm_at_any_scale(seed, exponent, shift):
    "Deviations of 1e-4 to 20000, means up to 1000."
    rng = np.random.default_rng(seed)
    deviations = np.clip(rng.normal(0, 1, (1, 6, D)), -2.5, 2.5)*10**exponent
    plain, = PLAIN_RUN(deviations)
    np.testing.assert_allclose(SAFE_RUN(deviations)[0], plain, atol=1e-5)
    # with a mean: FP32's own cancellation is what both have
    moved = np.float32(deviations + np.sign(shift)*10**abs(shift))
    noise = np.abs(moved).max()*1.2e-7/max(np.abs(deviations).std(), 3e-3)*30
    np.testing.assert_allclose(SAFE_RUN(moved)[0], PLAIN_RUN(moved)[0], atol=1e-5 + noise)
    # in FP16 the inputs have 11 bits; the answers are of size 1 to 5
    rounded = np.float32(np.float16(deviations))
    np.testing.assert_allclose(SAFE_HALF(rounded)[0], PLAIN_RUN(rounded)[0], atol=.03)


def test_layer_norm_where_the_plain_one_overflows():
    assert COUNT == 1 and "Pow" not in operators(SAFE)
    x = np.float32(np.float16(np.random.default_rng(0).normal(0, 2000, (1, 6, D))))
    right, = PLAIN_RUN(x)
    plain_half, = opened(through_fp16(PLAIN))(x)
    assert np.abs(plain_half - right).max() > 1 # the variance is infinite: only the bias is left
    np.testing.assert_allclose(SAFE_HALF(x)[0], right, atol=.03)


def test_rows_of_equal_numbers():
    for value in (0, 7, -60000):
        x = np.full((1, 6, D), value, np.float32)
        for run in (SAFE_RUN, SAFE_HALF):
            np.testing.assert_allclose(run(x)[0], np.broadcast_to(NORM.bias.detach(), x.shape), atol=.002)


@pytest.mark.parametrize("opset", [13, 17, 19])
@pytest.mark.parametrize("module", [Attention(True), Attention(False), Middle()], ids=["div", "mul", "middle"])
def test_softmax(module, opset):
    plain = traced(module, opset)
    safe = copy.deepcopy(plain)
    assert rewrite_softmax(safe) == 1
    for scale in (.1, 1, 5):
        x = np.random.default_rng(1).normal(0, scale, (1, 6, D))
        np.testing.assert_allclose(opened(safe)(x)[0], opened(plain)(x)[0], atol=1e-5, rtol=1e-5)


def test_attention_where_the_plain_one_overflows():
    plain = traced(Attention(False))
    safe = copy.deepcopy(plain)
    rewrite_softmax(safe)
    x = np.float32(np.float16(np.random.default_rng(2).normal(90, 1, (1, 6, D))))
    right, = opened(plain)(x)
    assert not np.isfinite(opened(through_fp16(plain))(x)[0]).all()
    found, = opened(through_fp16(safe))(x)
    # scores of 40000 are 32 apart in FP16, so which row wins is not certain; every answer lies among the rows
    assert np.isfinite(found).all() and np.abs(found - right).max() < 10


@pytest.mark.parametrize("opset", [17, 19])
def test_layer_normalization_as_one_operator_stays(opset):
    graph = traced(NORM, opset)
    before = graph.SerializeToString()
    assert "LayerNormalization" in operators(graph) and rewrite_layer_norm(graph) == 0
    assert operators(graph) == operators(onnx.load_from_string(before))


class NotANorm(torch.nn.Module):
    "Divisions by roots that are no LayerNorm."
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        d = x - x.mean(-1, keepdim=True)
        if self.kind == "another axis": return d/((d**2).mean(1, keepdim=True) + 1e-5).sqrt()
        if self.kind == "cube": return d/((d**3).abs().mean(-1, keepdim=True) + 1e-5).sqrt()
        if self.kind == "no mean": return x/((x**2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return x/((d**2).mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("kind", ["another axis", "cube", "no mean", "other numerator"])
def test_what_looks_like_a_layer_norm_is_left_alone(kind):
    graph = traced(NotANorm(kind))
    x = np.random.default_rng(3).normal(0, 1, (1, 6, D))
    before, = opened(graph)(x)
    assert rewrite_layer_norm(graph) == 0
    np.testing.assert_array_equal(opened(graph)(x)[0], before)


def test_through_fp16_is_numpys_rounding():
    class Two(torch.nn.Module):
        def forward(self, x): return x*3.1415926, (x*70000).relu()
    graph = traced(Two())
    a, b = opened(through_fp16(graph))(np.full((1, 6, D), 1.5))
    factor = np.float32(np.float16(3.1415926))
    assert a[0, 0, 0] == np.float32(np.float16(np.float32(1.5)*factor)) and np.isinf(b).all()
    again, _ = opened(graph)(np.full((1, 6, D), 1.5))
    assert again[0, 0, 0] == np.float32(1.5)*np.float32(3.1415926) # the graph itself is as it was


@pytest.mark.parametrize("name", [*each_family(["rtdetr-r18"]), *each_family(["dfine-n"], slow=True)])
def test_a_network_whose_encoder_is_loud(name, graphs, monkeypatch):
    "The attention of its encoder gives answers in the thousands: LayerNorm takes their scale away again."
    model = network(name, monkeypatch.setitem)
    attention = next(m for key, m in model.named_modules() if key.endswith("aifi.0.layers.0.self_attn"))
    with torch.no_grad():
        for p in attention.o_proj.parameters(): p.mul_(20000)
    graph = graphs.simplify_onnx(graphs.trace_onnx(model, SIZE))
    safe = copy.deepcopy(graph)
    counts = rewrite_for_fp16(safe)
    assert counts["layer_norms"] >= 8 and counts["softmaxes"] >= 4
    x, _ = Preprocessor(model.contract(SIZE))([scene(1)])
    (boxes, scores), (safe_boxes, safe_scores) = opened(graph)(x), opened(safe)(x)
    np.testing.assert_allclose(safe_boxes/SIZE[1], boxes/SIZE[1], atol=2e-5)
    np.testing.assert_allclose(safe_scores, scores, atol=2e-5)

    def loss(graph):
        "How far the sorted best scores are from those of FP32."
        _, half = opened(through_fp16(graph))(x)
        if not np.isfinite(half).all(): return np.inf
        return np.abs(np.sort(half.max(-1)[0]) - np.sort(scores.max(-1)[0])).max()
    assert loss(safe) < .02 and loss(graph) > 5*loss(safe), (loss(safe), loss(graph))
