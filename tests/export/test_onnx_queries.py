"""export.onnx on transformers: queries have no order of their own, and ties on a plain image are no fault; a wrong
weight, a lost row and two exchanged classes are."""
import numpy as np
import onnx
import pytest
import torch
from exported import CLASSES, SIZE
from hypothesis import given
from hypothesis import strategies as st
from kept import network
from train_helpers import each_family

from jetson_det.export import onnx as export
from jetson_det.export.onnx import export_onnx, parity, parity_frames
from jetson_det.models.graph import simplify_onnx, trace_onnx
from jetson_det.models.zoo import create_model

pytestmark = pytest.mark.usefixtures("one_thread")
DETRS = each_family(["rtdetr-r18"]) + each_family(["rtdetrv2-r18", "dfine-n"], slow=True)


@pytest.fixture(scope="module")
def traced():
    """name -> a network with random weights and its graph, made once. Its boxes depend on all its layers, as a trained
    one's: layers that begin with zeros have values."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        def get(name):
            if name not in made:
                model = network(name, patch.setitem)
                torch.manual_seed(2)
                with torch.no_grad():
                    for p in model.parameters():
                        if p.dim() >= 2 and not p.any(): p.normal_(0, .2)
                made[name] = model, simplify_onnx(trace_onnx(model, SIZE))
            return made[name]
        yield get


def compared(model, graph, frames=None):
    contract = model.contract(SIZE)
    return parity(model, graph.SerializeToString(), contract, frames or parity_frames(SIZE))


@pytest.mark.parametrize("name", each_family(["rtdetr-r18"]))
@pytest.mark.slow
def test_a_fresh_network_is_exported(name, tmp_path, monkeypatch):
    "As it is made, at its full size: on a plain gray image its cells are all alike."
    torch.manual_seed(0)
    contract = export_onnx(create_model(name, CLASSES).eval(), tmp_path/"m.onnx", SIZE)
    assert contract.parity["frames"] >= 1 and contract.parity["boxes"] <= 1e-3


@pytest.mark.parametrize("name", DETRS)
def test_each_transformer_is_exported(name, traced, tmp_path, monkeypatch):
    "With nothing but the frames that the export brings, a plain gray one among them."
    model, graph = traced(name)
    monkeypatch.setattr(export, "_trace", lambda *args: onnx.ModelProto.FromString(graph.SerializeToString()))
    contract = export_onnx(model, tmp_path/"m.onnx", SIZE)
    found = contract.parity
    assert found["frames"] >= 1 and found["frames"] + found.get("undecided", 0) == 3
    assert found["boxes"] <= 1e-3 and found["scores"] <= 1e-3


def weights(graph):
    "The float tensors of a graph that are layers' weights."
    kinds = [t for t in graph.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) >= 2]
    return [t for t in kinds if np.prod(t.dims) >= 64]


@pytest.mark.parametrize("name", DETRS)
@pytest.mark.parametrize("part", ["Conv", "aifi.0/layers.0/self_attn/v_proj", "layers.1/self_attn/v_proj"],
                         ids=["backbone", "encoder", "decoder"])
def test_a_wrong_weight_is_caught(name, part, traced):
    "A tenth more in one layer of the graph: of the backbone, the encoder or the decoder."
    model, graph = traced(name)
    wrong = onnx.ModelProto.FromString(graph.SerializeToString())
    tensor = next(t for t in weights(wrong) if part in t.name)
    values = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values*np.float32(1.1), tensor.name))
    found = compared(model, wrong)
    assert found["frames"] >= 1 and not export._within(found), (tensor.name, found)


@pytest.mark.parametrize("name", each_family(["rtdetr-r18"]))
def test_faults_of_the_graphs_end_are_caught(name, traced, tmp_path, monkeypatch):
    "A file is not written when its rows are repeated, its classes exchanged, or all its boxes moved by a tenth."
    model, graph = traced(name)
    helper = onnx.helper
    rows = list(range(30))
    for output, nodes, values in [
        ("scores", [("Gather", dict(axis=2))], [1, 0, 2]),
        ("boxes", [("Gather", dict(axis=1))], [0]*15 + rows[15:]),
        ("boxes", [("Add", {})], None),
    ]:
        def plant(changed):
            for node in changed.graph.node:
                node.output[:] = [output + "/right" if v == output else v for v in node.output]
                node.input[:] = [output + "/right" if v == output else v for v in node.input]
            value = np.float32([.1]) if values is None else np.int64(values)
            changed.graph.initializer.append(onnx.numpy_helper.from_array(value, "planted"))
            (kind, attributes), = nodes
            changed.graph.node.append(helper.make_node(kind, [output + "/right", "planted"], [output], **attributes))
        def trace(*args):
            changed = onnx.ModelProto.FromString(graph.SerializeToString())
            plant(changed)
            return changed
        monkeypatch.setattr(export, "_trace", trace)
        with pytest.raises(RuntimeError, match="does not compute what the network does"):
            export_onnx(model, tmp_path/"m.onnx", SIZE)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", each_family(["rtdetr-r18"]))
def test_images_that_decide_nothing_are_no_proof(name, traced, monkeypatch, tmp_path):
    "Where torch disagrees with itself on every image, the export says so and writes nothing."
    model, graph = traced(name)
    wrong = onnx.ModelProto.FromString(graph.SerializeToString())
    tensor = weights(wrong)[0]
    values = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values*2, tensor.name))
    monkeypatch.setattr(export, "_trace", lambda *args: wrong)
    monkeypatch.setattr(export, "is_undecided", lambda *args: True)
    with pytest.raises(RuntimeError, match="none of the 3 images tells"):
        export_onnx(model, tmp_path/"m.onnx", SIZE)
    assert not list(tmp_path.iterdir())


@given(st.integers(0, 10**6), st.integers(1, 40), st.floats(2e-3, .5))
def test_matching_undoes_an_order_and_hides_no_difference(seed, count, moved):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 100, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(4, 90, (count, 2))], 1)
    ours = [boxes, rng.random((count, 3))]
    order = rng.permutation(count)
    theirs = [v[order] for v in ours]
    assert export.differences_by_content(ours, theirs) == dict(boxes=0, boxes_px=0, scores=0)
    row = int(rng.integers(count))
    theirs[1] = theirs[1].copy()
    theirs[1][row] += 2 + moved # no other row has such scores
    assert not export._within(export.differences_by_content(ours, theirs))
    theirs = [v[order].copy() for v in ours]
    theirs[0][row, 0] = np.nan
    assert export.differences_by_content(ours, theirs)["boxes"] == np.inf
