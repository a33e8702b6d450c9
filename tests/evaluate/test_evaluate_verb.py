"`jetson-det evaluate` as a user calls it: the limit, classes under other names, which images, the page."
import json

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from coco_oracle import pycocotools_stats
from jetson_det.cli import main
from jetson_det.config import DataConfig
from jetson_det.core import InputError
from jetson_det.data.open import open_data, split_settings
from jetson_det.evaluate.coco import coco_stats, parse_class_map, shared_classes
from jetson_det.runtime.contract import METADATA_KEY, Contract
from jetson_det.runtime.geometry import as_detections

H, W = 256, 320


def constant_model(path, boxes, scores, classes):
    "An ONNX file that answers every image with the same boxes."
    arrays = dict(boxes=np.float32(boxes)[None], scores=np.float32(scores)[None])
    nodes = [helper.make_node("Constant", [], [k], value=numpy_helper.from_array(v)) for k, v in arrays.items()]
    outputs = [helper.make_tensor_value_info(k, TensorProto.FLOAT, v.shape) for k, v in arrays.items()]
    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, H, W])
    model = helper.make_model(helper.make_graph(nodes, "constant", [image], outputs),
                              opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    contract = Contract("toy", "constant", tuple(classes), (H, W), "boxes_scores")
    helper.set_model_props(model, {METADATA_KEY: contract.to_json()})
    onnx.save(model, str(path))


def folder(root, counts, names, images=1):
    "COCO: the same gray image `images` times, with so many boxes of each class in a grid."
    (root / "images").mkdir(parents=True)
    k = np.arange(sum(counts))
    xywh = np.stack([k % 26 * 12 + 1, k // 26 * 12 + 1, 0*k + 9, 0*k + 9], 1)
    d = dict(images=[], annotations=[], categories=[dict(id=c, name=n) for c, n in enumerate(names, 1)])
    for i in range(1, images + 1):
        cv2.imwrite(str(root / "images" / f"{i}.png"), np.full((H, W, 3), 90 + i, np.uint8))
        d["images"].append(dict(id=i, file_name=f"{i}.png", height=H, width=W))
        for box, c in zip(xywh.tolist(), np.repeat(np.arange(1, len(counts) + 1), counts).tolist()):
            d["annotations"].append(dict(id=len(d["annotations"]) + 1, image_id=i, category_id=c, bbox=box,
                                         area=81, iscrowd=0))
    (root / "labels.json").write_text(json.dumps(d))
    return d, np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)


def model_for(path, xyxy, counts, names):
    "Finds each box exactly; boxes of a class are surer than those of the next."
    labels = np.repeat(np.arange(len(counts)), counts)
    scores = np.zeros((len(labels), len(names)), np.float32)
    scores[np.arange(len(labels)), labels] = .95 - .2 * labels - np.arange(len(labels)) * 1e-4
    constant_model(path, xyxy, scores, names)


def run(capsys, *words):
    code = main([str(w) for w in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_limit_is_one_of_each_class_and_can_be_set(tmp_path, capsys):
    d, xyxy = folder(tmp_path / "data", [200, 60], ["a", "b"])
    model_for(tmp_path / "m.onnx", xyxy, [200, 60], ["a", "b"])
    words = ["evaluate", tmp_path / "m.onnx", "--data", tmp_path / "data", "--json", tmp_path / "f.json"]
    code, out, _ = run(capsys, *words)
    figures = json.loads((tmp_path / "f.json").read_text())
    a, b = figures["per_class"]
    rows = []
    for k, x in enumerate(d["annotations"]):
        score = .95 - .2 * (x["category_id"] - 1) - k * 1e-4
        rows.append(dict(image_id=1, category_id=x["category_id"], bbox=x["bbox"], score=score))
    truth = pycocotools_stats(d, rows)
    assert code == 0 and b["AP"] == pytest.approx(1) and figures["stats"]["AP"] == pytest.approx(truth.stats[0])
    assert "1.png (200 a)" in out and figures["over_limit"] == [["images/1.png", "a", 200]]
    code, out, _ = run(capsys, *words, "--max-detections", "200")
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["stats"]["AP"] == pytest.approx(1) and "more boxes" not in out and "AR200" in figures["stats"]
    assert run(capsys, *words, "--max-detections", "0")[0] == 2


def test_the_lowest_score_is_printed_and_can_be_set(tmp_path, capsys):
    _, xyxy = folder(tmp_path / "data", [3, 2], ["a", "b"])
    model_for(tmp_path / "m.onnx", xyxy, [3, 2], ["a", "b"]) # scores of about .95 and .75
    words = ["evaluate", tmp_path / "m.onnx", "--data", tmp_path / "data", "--json", tmp_path / "f.json"]
    for more, score, found in (([], "0.01", [3, 2]), (["--confidence", ".8"], "0.8", [3, 0])):
        code, out, _ = run(capsys, *words, *more)
        figures = json.loads((tmp_path / "f.json").read_text())
        assert code == 0 and f"; boxes with a score of {score} or more\n" in out
        assert [c["detections"] for c in figures["per_class"]] == found
        assert figures["settings"]["confidence"] == float(score)
    assert run(capsys, *words, "--confidence", "2")[0] == 2


def test_names_of_the_model_are_mapped_to_those_of_the_data(tmp_path, capsys):
    _, xyxy = folder(tmp_path / "data", [4, 3, 5], ["vehicle", "airplane", "dog"])
    model_for(tmp_path / "m.onnx", xyxy, [4, 3, 5], ["van", "flying thing", "dog"])
    words = ["evaluate", tmp_path / "m.onnx", "--data", tmp_path / "data", "--json", tmp_path / "f.json"]
    code, out, _ = run(capsys, *words)
    assert code == 0 and "not known by the model, AP 0: vehicle, airplane" in out
    assert "not in the data, left out: van, flying thing" in out and "--map" in out
    code, out, _ = run(capsys, *words, "--map", "van=vehicle, flying thing=airplane")
    figures = json.loads((tmp_path / "f.json").read_text())
    assert code == 0 and figures["stats"]["AP"] == pytest.approx(1) and "left out" not in out
    assert figures["settings"]["class_map"] == {"van": "vehicle", "flying thing": "airplane"}
    code, out, _ = run(capsys, *words, "--map", "van=vehicle", "--map", "flying thing=airplane") # repeated: joined
    assert code == 0 and json.loads((tmp_path / "f.json").read_text())["settings"] == figures["settings"]
    for text, message in (("vna=vehicle", "did you mean 'van'?"), ("van=vehicel", "did you mean 'vehicle'?"),
                          ("van", "write MODEL=DATA"), ("van=vehicle,van=dog", "paired with two")):
        code, _, err = run(capsys, *words, "--map", text)
        last = err.splitlines()[-1]
        assert code == 2 and last.startswith("error: map") and message in last and err.count("error") == 1


def test_many_to_one():
    to, unknown, unused = shared_classes(("car", "Bus", "truck", "person"), ("vehicle", "Person"),
                                         {"car": "vehicle", "bus": "Vehicle", "truck": "vehicle"})
    assert to.tolist() == [0, 0, 0, 1] and unknown == [] and unused == []
    gt = dict(images=[dict(id=1)], categories=[dict(id=1, name="vehicle")],
              annotations=[dict(id=k, image_id=1, category_id=1, bbox=[50 * k, 0, 40, 40]) for k in range(3)])
    found = [as_detections([[50 * k, 0, 50*k + 40, 40] for k in range(3)], [.9, .8, .7], [0, 1, 2])]
    pairs = parse_class_map("car=vehicle,bus=vehicle,truck=vehicle")
    mapped = coco_stats(gt, found, ("car", "bus", "truck"), class_map=pairs)
    assert mapped.stats["AP"] == pytest.approx(1)
    with pytest.raises(InputError, match="--map"): coco_stats(gt, found, ("car", "bus", "truck"))


def test_a_pair_of_names_goes_before_matching_by_name():
    to, _, unused = shared_classes(("car", "van"), ("car", "van"), {"car": "van", "van": "van"})
    assert to.tolist() == [1, 1] and unused == []


def test_data_without_splits_is_judged_whole_and_the_page_shows_it(tmp_path, capsys):
    _, xyxy = folder(tmp_path / "data", [3, 2], ["a<b>", "b"], images=12)
    model_for(tmp_path / "m.onnx", xyxy, [3, 2], ["a<b>", "b"])
    page = tmp_path / "new" / "results.html"
    code, out, _ = run(capsys, "evaluate", tmp_path / "m.onnx", "--data", tmp_path / "data", "--html", page)
    assert code == 0 and "all 12 images: the data has no splits" in out and str(page) in out
    text = page.read_text()
    assert "a&lt;b&gt;" in text and "a<b>" not in text and text.index("What to do next") < text.index("<table>")
    code, _, err = run(capsys, "evaluate", tmp_path / "m.onnx", "--data", tmp_path / "data", "--html",
                       tmp_path / "data" / "labels.json")
    assert code == 2 and err.count("error") == 1 and (tmp_path / "data" / "labels.json").exists()


def test_how_many_images_the_training_learned_from_is_in_the_figures(tmp_path, capsys):
    _, xyxy = folder(tmp_path / "data", [3], ["a"], images=12)
    settings = DataConfig(path=str(tmp_path / "data"))
    ds = open_data(settings, say=lambda line: None)
    model_for(tmp_path / "m.onnx", xyxy, [3], ["a"])
    model = onnx.load(str(tmp_path / "m.onnx"))
    extra = {"split": split_settings(settings, ds)}
    contract = Contract("toy", "constant", ("a",), (H, W), "boxes_scores", extra=extra)
    helper.set_model_props(model, {METADATA_KEY: contract.to_json()})
    onnx.save(model, str(tmp_path / "m.onnx"))
    learned = len(ds.split("train"))
    for words, count in (([], 0), (["--split", "all"], learned), (["--split", "train"], learned)):
        code, out, _ = run(capsys, "evaluate", tmp_path / "m.onnx", "--data", tmp_path / "data", *words, "--json",
                           tmp_path / "new.json")
        assert code == 0 and ("no measure of new images" in out) == bool(count)
        figures = json.loads((tmp_path / "new.json").read_text())
        assert figures["images_learned_from"] == count and figures["images_chosen"] in out
