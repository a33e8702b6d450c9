"""Which convolutions become INT8: the rule sees the same in memory and in a file, and every node of every family has
its layer, with its weights."""
import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from exported import SIZE, network  # noqa: E402
from train_helpers import FAMILIES, each_family  # noqa: E402

from jetson_det.core import InputError  # noqa: E402
from jetson_det.export.graph import read_onnx  # noqa: E402
from jetson_det.export.onnx import export_onnx  # noqa: E402
from jetson_det.models.int8 import CONVOLUTIONS, graph_view, int8_layers, name_nodes, quantizable  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ("yolox-nano",)
OTHERS = [name for name in FAMILIES if name not in QUICK]


def is_multiple(one, other):
    "Are the two weights the same up to a factor for each output channel, such as BatchNorm's?"
    a = one.reshape(len(one), -1).astype(np.float64)
    b = other.reshape(len(other), -1).astype(np.float64)
    factor = (a*b).sum(1)/np.maximum((b*b).sum(1), 1e-30)
    return np.abs(a - factor[:, None]*b).max() <= 1e-4*max(np.abs(a).max(), 1e-30)


@pytest.mark.parametrize("name", [*each_family(QUICK), *each_family(OTHERS, slow=True)])
def test_every_node_has_its_layer(tmp_path, name, monkeypatch):
    model = network(name, monkeypatch.setitem)
    state = copy.deepcopy(model.state_dict())
    found = int8_layers(model, SIZE)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    export_onnx(model, tmp_path / "net.onnx", SIZE)
    graph = read_onnx(tmp_path / "net.onnx")
    wanted = [layer for layer in quantizable(graph) if not layer.stays]
    assert [one.node for one in found] == [layer.name for layer in wanted] and len(found) > 20
    assert quantizable(graph_view(graph.model)) == quantizable(graph)
    stored = {node.name: graph.constants[node.input[1]] for node in graph.nodes if node.op_type in CONVOLUTIONS}
    for one in found:
        conv = model.get_submodule(one.module)
        assert isinstance(conv, torch.nn.Conv2d) and is_multiple(stored[one.node], conv.weight.detach().numpy()), one


def test_names():
    from onnx import helper
    nodes = [helper.make_node("Relu", [str(i)], [str(i + 1)], name) for i, name in enumerate(["", "a", "a", "Relu_0"])]
    model = helper.make_model(helper.make_graph(nodes, "g", [], []))
    name_nodes(model)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == 4 and names[1] == "a"


def test_a_convolution_that_is_no_layer_is_named(monkeypatch):
    "One that the copy could not mark, because its weights are made elsewhere."
    from jetson_det.models import int8
    model = network("yolox-nano")
    marked, names = int8._marked(model)
    with torch.no_grad(): marked.get_submodule(names[3]).weight[0] = .5
    monkeypatch.setattr(int8, "_marked", lambda _: (marked, names))
    with pytest.raises(InputError, match="yolox-nano.*is no layer of it"): int8_layers(model, SIZE)
