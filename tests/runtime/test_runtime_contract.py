"""Contracts: what can't be meant is refused in one line."""
import json

import pytest

from jetson_det.runtime.contract import (
    COCO_CLASSES,
    OUTPUTS,
    PRESETS,
    Contract,
    check_input,
    check_outputs,
    load_contract,
    preset,
)
from jetson_det.runtime.files import InputError

DOCK = Contract("yolox", "yolox-nano", ("Sack", "Person"), (416, 416), "boxes_scores")


def test_json_there_and_back(tmp_path):
    full = DOCK._replace(opset=13,
                         dataset="ab",
                         config="cd",
                         parity={"max": 1e-5},
                         made_from="ef",
                         extra={"epochs": 3},
                         mean=[1, 2, 3])
    assert Contract.from_json(full.to_json()) == full.validate() and full.validate().mean == (1, 2, 3)
    (tmp_path / "c.json").write_bytes(full._replace(classes=("Säcke", "人")).to_json().encode("utf-8"))
    assert load_contract(tmp_path / "c.json").classes == ("Säcke", "人")
    assert sorted(json.loads(DOCK.to_json())) == sorted(Contract._fields)


WRONG = dict(version=[2, "1", True, None],
             family=["", None],
             name=[3],
             classes=[(), ("a", "a"), "ab", ("a", ""), None],
             input_size=[(416, ), (0, 5), (1.5, 2), 416, None],
             output=["raw", None, []],
             color=["BGR"],
             scale=[0, float("nan"), "1", True],
             mean=[(0, 0), (0, 0, float("inf"))],
             std=[(1, 1, 0)],
             fit=["center"],
             pad=[-1, 256, 114.5],
             confidence=[1.1, None],
             iou=[-.1],
             opset=["13"],
             dataset=[7],
             config=[""],
             parity=[[]],
             made_from=[1],
             extra=[None])


def test_every_field_has_a_rule():
    assert set(WRONG) == set(Contract._fields)
    for field, values in WRONG.items():
        for value in values:
            with pytest.raises(InputError) as e: DOCK._replace(**{field: value}).validate()
            assert "contract: {} is ".format(field) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("text, message", [
    ("", "not valid JSON"), ("[]", "a JSON object"), ("{}", "missing"), ('{"clases": 1}', "did you mean 'classes'"),
    ('{"version": 9, "new": 1}', "version is 9")])
def test_bad_json(text, message):
    with pytest.raises(InputError) as e: Contract.from_json(text, "x.onnx")
    assert message in str(e.value) and str(e.value).startswith("x.onnx: ") and "\n" not in str(e.value)


def test_presets():
    assert len(
        set(COCO_CLASSES)
    ) == 80 and COCO_CLASSES[0] == "person" and COCO_CLASSES[79] == "toothbrush" and COCO_CLASSES[24] == "backpack"
    for name in PRESETS: assert preset(name).output in OUTPUTS and load_contract(name) == preset(name)
    with pytest.raises(InputError, match="no such file, and no preset"): load_contract("yolo9")


SHAPES = {
    "boxes_scores": [("boxes", (1, 3549, 4)), ("scores", (1, 3549, 2))], "yolox": [("o", (1, 3549, 7))],
    "yolox-raw": [("o", ("n", 3549, 7))], "ultralytics": [("o", (None, 6, 3549))], "queries": [("scores", (1, 300, 2)),
                                                                                               ("boxes", (1, 300, 4))],
    "detr": [("logits", ("n", 300, 2)), ("pred_boxes", ("n", 300, 4))], "detr-scores": [("o", (1, 300, 6))],
    "detr-end2end": [("o", (1, 300, 6))], "end2end": [("o", (1, 300, 6))], "nms-rows": [("o", ("n", 7))],
    "efficient-nms": [("num", (1, 1)), ("boxes", (1, 100, 4)), ("scores", (1, 100)), ("labels", (1, 100))],
    "labels-boxes-scores": [("labels", ("n", 300)), ("boxes", ("n", 300, 4)), ("scores", ("n", 300))]
}
SIX = ("detr-scores", "detr-end2end", "end2end") # of two classes the first has six columns too
ALIKE = [{"yolox", "yolox-raw"}, {"boxes_scores", "queries"}] + [{a, b} for a in SIX for b in SIX if a != b]

UNCOUNTED = ("detr-end2end", "end2end", "nms-rows", "efficient-nms", "labels-boxes-scores") # have class numbers


@pytest.mark.parametrize("kind", OUTPUTS)
def test_graphs_and_contracts(kind):
    for other in OUTPUTS:
        c = DOCK._replace(output=other)
        if other == kind or {other, kind} in ALIKE: check_outputs(c, SHAPES[kind])
        else:
            with pytest.raises(InputError): check_outputs(c, SHAPES[kind])
    three = DOCK._replace(output=kind, classes=("a", "b", "c"))
    if kind in UNCOUNTED: check_outputs(three, SHAPES[kind])
    else:
        with pytest.raises(InputError): check_outputs(three, SHAPES[kind])
    with pytest.raises(InputError): check_outputs(DOCK._replace(output=kind), [])


def test_inputs():
    check_input(DOCK, "images", ["b", 3, "h", "w"])
    for shape in ([1, 3, 640, 640], [1, 416, 416, 3], [1, 1, 416, 416], [3, 416, 416], []):
        with pytest.raises(InputError, match="its contract"): check_input(DOCK, "images", shape)
