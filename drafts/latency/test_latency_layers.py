"export.layers: the ONNX graph and the network on the meta device have the same layers."
from collections import Counter

import onnx
import pytest

from jetson_det.export.graph import read_onnx
from jetson_det.export.layers import onnx_layers, torch_layers
from jetson_det.models.graph import simplify_onnx, trace_onnx
from jetson_det.models.zoo import MODELS, create_model

COCO = [str(i) for i in range(80)]


@pytest.mark.parametrize("name", ["yolox-nano", "yolo11n", "yolo26n"])
def test_both_ways_give_the_same_layers(tmp_path, name):
    model = create_model(name, ["sack", "person"]).eval()
    onnx.save(simplify_onnx(trace_onnx(model, (256, 320), 13)), tmp_path/"m.onnx")
    # the file ends in boxes and scores, the network before its decoding: convolutions are those of the network
    from_onnx = Counter(layer for layer in onnx_layers(read_onnx(tmp_path/"m.onnx")))
    from_torch = Counter(torch_layers(model, (256, 320)))
    assert not from_torch - from_onnx
    decoding = from_onnx - from_torch
    assert {layer.kind for layer in decoding} <= {"concat", "softmax", "matmul", "conv"}
    assert sum(layer.flops for layer in decoding.elements()) < .001*sum(layer.flops for layer in from_torch.elements())


@pytest.mark.parametrize("name", ["yolox-nano", "yolox-s", "yolov8n", "yolo11s"])
def test_the_operations_are_those_of_the_card(name):
    card = MODELS[name].card
    layers = torch_layers(create_model(name, COCO), (card.input, card.input))
    assert sum(layer.flops for layer in layers)/1e9 == pytest.approx(card.gflops, rel=.05)
