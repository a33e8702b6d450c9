"""One rule for the same class name: the check of the labels, the weights, the teacher and the evaluation agree."""
import pytest

from jetson_det.core import class_key, match_classes
from jetson_det.data.dataset import DetDataset
from jetson_det.data.quality.check import similar_classes
from jetson_det.data.quality.fix import _fix_classes
from jetson_det.evaluate.coco import coco_stats
from jetson_det.runtime.contract import COCO_CLASSES
from jetson_det.runtime.geometry import as_detections

SAME = [
    ("traffic light", "TrafficLight"), ("traffic light", "Traffic_Light"), ("traffic light", "traffic-light"),
    ("traffic light", " TRAFFIC  LIGHT"), ("person", "PERSON "), ("person", "\uff30erson"), ("stop sign", "stop.sign"),
    ("hot dog", "'Hot Dog'"),
]
DIFFERENT = [
    ("person", "persons"), ("person", "pedestrian"), ("car", "cat"), ("tv", "TV set"), ("tie", "tie 2"),
    ("bus", "bu s2"), ("traffic light", "trafficlights"),
]


def dataset(classes):
    "An image with a box of each class."
    n = len(classes)
    boxes = [[20 * k, 10, 20 * k + 10, 30] for k in range(n)]
    return DetDataset("", classes, ["a.jpg"], [[100, 200]], [0] * n, boxes, list(range(n)))


def is_evaluated(model, data):
    "Whether detections of the model's class count for the data's class."
    ds = dataset(("zebra", data))
    found = as_detections(ds.boxes[1:], [.9], [1])
    result = coco_stats(ds, [found], ("zebra", model))
    assert (result.per_class[1]["AP"] == 1) == (data not in result.unknown)
    return data not in result.unknown


@pytest.mark.parametrize("a, b, is_same", [(*p, True) for p in SAME] + [(*p, False) for p in DIFFERENT])
def test_all_stages_agree(a, b, is_same):
    assert (class_key(a) == class_key(b)) == is_same
    kinds = [f.kind for f in similar_classes(dataset((a, b)))]
    assert ("similar-classes" in kinds) == is_same
    assert len(_fix_classes(dataset((a, b)))[0].classes) == (1 if is_same else 2)
    assert match_classes([b], [a]) == match_classes([a], [b]) == [0 if is_same else None]
    assert is_evaluated(a, b) == is_evaluated(b, a) == is_same


@pytest.mark.parametrize("a, b", [("1.5 t", "15 t"), ("1-5", "15"), ("a", "A"), ("+", "-"), ("é", "e")])
def test_what_is_not_folded(a, b):
    assert class_key(a) != class_key(b)
    assert match_classes([a], [b]) == [None]
    assert [f for f in similar_classes(dataset((a, b))) if f.kind == "similar-classes"] == []


def test_voc_names_are_found_and_stay_two_classes():
    "A VOC dataset takes the rows of COCO's classes and is evaluated by them; a dataset with both names keeps both."
    for voc, coco in [("sofa", "couch"), ("aeroplane", "airplane"), ("Motor Bike", "motorcycle"), ("tvmonitor", "tv")]:
        assert match_classes([voc], COCO_CLASSES) == [COCO_CLASSES.index(coco)]
        assert is_evaluated(coco, voc) and is_evaluated(voc, coco)
        assert [f.kind for f in similar_classes(dataset((voc, coco)))] == []
        assert match_classes([voc, coco], [coco, voc]) == [1, 0]


def test_a_class_that_carries_weights_is_evaluated(tmp_path):
    "The walk of a user: COCO's weights into `TrafficLight`, then the official model on the same data."
    torch = pytest.importorskip("torch")
    from jetson_det.models.weights.load import load_weights
    from jetson_det.models.zoo import create_model
    from jetson_det.train.distill import shared_classes as taught
    data = ("Sack", "TrafficLight", "Fire_Hydrant", "Sofa")
    torch.save({"model": create_model("yolox-nano", COCO_CLASSES).state_dict()}, tmp_path/"yolox_nano.pth")
    report = load_weights(create_model("yolox-nano", data), tmp_path/"yolox_nano.pth")
    assert report.carried == data[1:] and report.fresh == ("Sack",)
    ds = dataset(data)
    labels = [COCO_CLASSES.index(n) for n in ("traffic light", "fire hydrant", "couch")]
    result = coco_stats(ds, [as_detections(ds.boxes[1:], [.9, .8, .7], labels)], COCO_CLASSES)
    assert result.unknown == ["Sack"]
    assert [c["AP"] for c in result.per_class] == [0, 1, 1, 1]
    assert [data[i] for i in taught(data, COCO_CLASSES)[0]] == list(report.carried)
