"""Files of other projects, read: two objects in each layout, wrong presets, wrong numbers, damage."""
import warnings

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx writes the files of these tests")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import onnx
import onnx_files as files
from jetson_det.runtime import plausible
from jetson_det.runtime.contract import COCO_CLASSES, COCO_COLUMNS, METADATA_KEY, Contract
from jetson_det.runtime.files import InputError
from jetson_det.runtime.sessions import open_session
from jetson_det.runtime.tiles import Tiled

IMAGE = np.full(files.SIZE + (3,), 114, np.uint8)
ULTRALYTICS = {
    "author": "Ultralytics", "task": "detect", "stride": "32", "imgsz": "[320, 320]", "names": "{0: 'cat', 1: 'dog'}"
}
YOLOV5 = {"stride": "32", "names": "['cat', 'dog']"}


def maps(rows):
    "Feature maps as YOLOv5 wrote them beside its answer."
    found = {}
    for i, s in enumerate(files.LEVELS):
        found["map%d" % i] = np.zeros((1, 3, files.SIZE[0] // s, files.SIZE[1] // s, rows.shape[1]), np.float32)
    return found


def layouts():
    "name -> (outputs, metadata, --contract, --classes, preset that must read it)"
    boxes, scores, labels = files.finished()
    end2end = np.concatenate([boxes, scores[:, None], labels[:, None]], 1)[None]
    shares, probabilities = files.queries(2)
    rows = files.dense(2, True)
    five = files.dense(2, True, each=3)
    eight = np.ascontiguousarray(files.dense(2, False).T)[None]
    best = files.probabilities(2).max(1)[:, None]
    ordered = np.concatenate([files.cxcywh(files.BOXES) / 320, best, files.LABELS[:, None]], 1)
    detr_rows = np.concatenate([ordered, np.zeros((298, 6))]).astype(np.float32)[None]
    image = np.zeros((2, 1))
    seven = np.concatenate([image, files.BOXES, files.LABELS[:, None], files.SCORES[:, None]], 1).astype(np.float32)
    coco = files.queries(80, list(COCO_COLUMNS), logits=True)
    plus_one = files.queries(2, [0, 1, 2], logits=True)
    logits = files.queries(2, logits=True)
    two = "cat,dog"
    detr = dict(labels=labels[None], boxes=(boxes / 320)[None], scores=scores[None])
    return {
        "yolox": ({"output": files.yolox_raw(rows)[None]}, {}, "yolox", two, "yolox"),
        "yolox-decoded": ({"output": rows[None]}, {}, "yolox-decoded", two, "yolox-decoded"),
        "yolov5": ({"output0": five[None]}, YOLOV5, None, None, "yolov5"),
        "yolov5-maps": (dict({"output": five[None]}, **maps(five)), YOLOV5, None, None, "yolov5"),
        "yolov5-asked": (dict(maps(five), output=five[None]), {}, "yolov7", two, "yolov5"),
        "yolov6": ({"outputs": rows[None]}, {}, "yolov6", two, "yolov6"),
        "yolov8": ({"output0": eight}, ULTRALYTICS, None, None, "ultralytics"),
        "yolov8-asked": ({"output0": eight}, {}, "yolo11", two, "ultralytics"),
        "yolo26": ({"output0": end2end}, dict(ULTRALYTICS, end2end="True",
                                              head="Detect"), None, None, "ultralytics-end2end"),
        "yolov10-asked": ({"output0": end2end}, {}, "yolov10", two, "ultralytics-end2end"),
        "rtdetr-l": ({"output0": np.concatenate([shares, probabilities],
                                                1)[None]}, {}, "rtdetr-ultralytics", two, "rtdetr-ultralytics"),
        "rtdetr-l-rows": ({"output0": detr_rows}, dict(ULTRALYTICS,
                                                       head="RTDETRDecoder"), None, None, "rtdetr-ultralytics-end2end"),
        "rtdetr": (dict(logits=logits[1][None], pred_boxes=logits[0][None]), {}, "rtdetr", two, "rtdetr"),
        "rtdetr-deploy": (detr, {}, "rtdetr", two, "rtdetr-deploy"),
        "rfdetr-coco": (dict(dets=coco[0][None], labels=coco[1][None]), {}, "rfdetr", None, "rfdetr"),
        "rfdetr": (dict(dets=plus_one[0][None], labels=plus_one[1][None]), {}, "rf-detr", two, "rfdetr"),
        "open-image-models": ({"output": seven}, {}, "open-image-models", two, "open-image-models"),
        "efficient-nms": (dict(num_dets=np.float32([[2]]),
                               det_boxes=boxes[None],
                               det_scores=scores[None],
                               det_classes=labels[None]), {}, "efficient-nms", two, "efficient-nms"),
    }


LAYOUTS = layouts()


def write(path, layout):
    outputs, metadata, _, _, preset = LAYOUTS[layout]
    return files.write_graph(path,
                             outputs,
                             metadata,
                             sizes_input="orig_target_sizes" if preset == "rtdetr-deploy" else None)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_two_objects_in_every_layout(tmp_path, layout):
    _, _, contract, classes, preset = LAYOUTS[layout]
    session = open_session(write(tmp_path / "m.onnx", layout), contract, classes=classes, threads=1)
    assert session.contract.name == preset
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, again = session([IMAGE, IMAGE[::2, ::2]])
    np.testing.assert_allclose(found.boxes, files.BOXES, atol=.02)
    np.testing.assert_allclose(found.scores, files.SCORES, atol=1e-3)
    np.testing.assert_allclose(again.boxes, files.BOXES / 2, atol=.02)
    names = [session.contract.classes[label] for label in found.labels]
    assert names == (["bicycle", "person"] if layout == "rfdetr-coco" else ["dog", "cat"])


def refused(path, contract, image=IMAGE, **kw):
    "The line with which a file is refused, when it is opened or at the first frame."
    with pytest.raises(InputError) as e: open_session(path, contract, threads=1, **kw)(image)
    text = str(e.value)
    assert text.startswith(str(path)) and "\n" not in text and len(text) < 700
    return text


@pytest.mark.parametrize("layout, given, likely",
                         [("yolox", "yolox-decoded", "yolox"), ("yolox", "yolov6", "yolox"),
                          ("yolox-decoded", "yolox", "yolox-decoded"), ("yolov6", "yolox", "yolox-decoded or yolov6"),
                          ("yolov5-asked", "yolox-decoded", "yolov5"), ("yolov5-asked", "yolox", "yolov5"),
                          ("yolov8-asked", "yolov5", "ultralytics"), ("yolov8-asked", "yolox", "ultralytics"),
                          ("yolov10-asked", "yolox", "ultralytics-end2end"),
                          ("yolov10-asked", "rtdetr-ultralytics", "ultralytics-end2end"),
                          ("yolov10-asked", "rtdetr-ultralytics-end2end", "ultralytics-end2end"),
                          ("rtdetr-l", "yolov10", "rtdetr-ultralytics"),
                          ("rtdetr-l-rows", "ultralytics-end2end", "rtdetr-ultralytics-end2end"),
                          ("rtdetr", "rfdetr", "rtdetr"), ("rfdetr", "rtdetr", "rfdetr"),
                          ("open-image-models", "ultralytics", "open-image-models"),
                          ("efficient-nms", "yolox", "efficient-nms"),
                          ("rtdetr-deploy", "ultralytics", "rtdetr-deploy")])
def test_a_wrong_preset_is_refused_and_the_likelier_one_named(tmp_path, layout, given, likely):
    text = refused(write(tmp_path / "m.onnx", layout), given, classes="cat,dog")
    assert "looks like " + likely in text and "--contract " + likely.split(" or ")[0] in text, text


@pytest.mark.parametrize("layout", sorted(name for name in LAYOUTS if LAYOUTS[name][2]))
def test_without_a_contract_the_likely_one_is_named(tmp_path, layout):
    text = refused(write(tmp_path / "m.onnx", layout), None)
    assert "no contract in its metadata" in text and "it looks like" in text and LAYOUTS[layout][4] in text


def scrambled(rows):
    "The same numbers with their columns in another order."
    return np.ascontiguousarray(rows.T).reshape(rows.shape)


def test_numbers_that_no_detector_gives(tmp_path):
    rows = files.dense(2, True)
    path = tmp_path / "m.onnx"
    eight = np.ascontiguousarray(files.dense(2, False).T)
    over = eight.copy()
    over[4:] *= 14
    logits = eight.copy()
    logits[4:] = np.log(eight[4:] + 1e-6)
    shares = eight.copy()
    shares[:4] /= 320
    fractions = np.concatenate([files.BOXES, files.SCORES[:, None], [[.5], [.25]]], 1)
    boxes, probabilities = files.queries(2)
    cases = [
        ("yolox", {"output": scrambled(files.yolox_raw(rows))[None]}, "where 0 to 1 is right"),
        ("yolox-decoded", {"output": scrambled(rows)[None]}, "where 0 to 1 is right"),
        ("ultralytics", {"output0": over[None]}, "its scores are 0"),
        ("ultralytics", {"output0": logits[None]}, "its scores are -"),
        ("ultralytics", {"output0": shares[None]}, "have no width or no height"),
        ("ultralytics",
         {"output0": (eight * np.float32([[9], [9], [9], [9], [1], [1]]) + [[999], [0], [0], [0], [0], [0]])[None]
          }, "lie outside the input"),
        ("ultralytics-end2end", {"output0": fractions[None].astype(np.float32)}, "no class number"),
        ("rtdetr", dict(pred_boxes=boxes[None], logits=probabilities[None]), "the sigmoid is in the graph already"),
        ("rtdetr", dict(pred_boxes=boxes[None] * 320,
                        logits=(probabilities[None] - .5) * 8), "are larger than the input"),
    ]
    for contract, outputs, message in cases:
        files.write_graph(path, outputs)
        text = refused(path, contract, classes="cat,dog")
        assert message in text and "or the file is damaged" in text, text


def test_a_class_beyond_the_names_is_refused_on_any_frame(tmp_path):
    boxes, scores, labels = files.finished(2)
    outputs = {"output0": np.concatenate([boxes, scores[:, None], labels[:, None] + 2], 1)[None]}
    session = open_session(files.write_graph(tmp_path / "m.onnx", outputs), "yolo26", classes="cat,dog,cow", threads=1)
    for _ in range(2):
        with pytest.raises(InputError, match="name class 3, but its contract has 3"): session(IMAGE)
    outputs["output0"][..., 5] = -1
    with pytest.raises(InputError, match="name class -1"):
        open_session(files.write_graph(tmp_path / "m.onnx", outputs), "yolo26", classes="cat", threads=1)(IMAGE)


def test_our_own_contract_warns_where_the_network_may_be_untrained(tmp_path):
    contract = Contract("yolox", "yolox-nano", ("cat", "dog"), files.SIZE, "boxes_scores")
    boxes = np.zeros((1, 20, 4), np.float32)
    scores = np.full((1, 20, 2), .3, np.float32)
    path = files.write_graph(tmp_path / "m.onnx", dict(boxes=boxes, scores=scores), {METADATA_KEY: contract.to_json()})
    with pytest.warns(UserWarning, match="20 of its 20 best boxes have no width"):
        found = open_session(path, threads=1)(IMAGE)
    assert len(found.scores) == 0
    files.write_graph(path, dict(boxes=boxes, scores=scores * 9), {METADATA_KEY: contract.to_json()})
    assert "its scores are 2.7 to 2.7" in refused(path, None)


def test_only_the_first_frames_are_judged(tmp_path, monkeypatch):
    calls = []
    usual = plausible.find_flaw
    monkeypatch.setattr("jetson_det.runtime.session.find_flaw", lambda *a: calls.append(1) or usual(*a))
    session = open_session(write(tmp_path / "m.onnx", "yolov8"), threads=1)
    for _ in range(5): session(IMAGE)
    assert len(calls) == 1 and session._judge is None
    session = open_session(write(tmp_path / "r.onnx", "yolox"), "yolox-decoded", classes="cat,dog", threads=1)
    for _ in range(3): # what can't be is not let through the second time
        with pytest.raises(InputError, match="upper left corner|no width"): session(IMAGE)
    calls.clear()
    quiet = files.write_graph(tmp_path / "q.onnx", {"output0": np.zeros((1, 300, 6), np.float32)}, ULTRALYTICS)
    session = open_session(quiet, threads=1)
    for _ in range(30): assert len(session(IMAGE).scores) == 0
    assert len(calls) == 10


def test_the_size_comes_from_the_metadata_or_the_person(tmp_path):
    outputs = {"output0": np.ascontiguousarray(files.dense(2, False).T)[None]}
    some = {"output0": ["batch", 6, "anchors"]}
    path = tmp_path / "m.onnx"
    files.write_graph(path, outputs, ULTRALYTICS, ("batch", 3, "height", "width"), some)
    for given in (None, "yolov8"): assert open_session(path, given, threads=1).contract.input_size == (320, 320)
    assert open_session(path, input_size=(640, 320), threads=1).contract.input_size == (640, 320)
    fixed = files.write_graph(tmp_path / "f.onnx", outputs, ULTRALYTICS, ("batch", 3, "height", "width"))
    for given in (None, "yolov8"):
        assert "output 'output0' [1, 6, 2100] is not that of an input of 640x320" in refused(fixed,
                                                                                             given,
                                                                                             input_size=(640, 320))
    files.write_graph(path, outputs, {}, ("batch", 3, "height", "width"), some)
    assert "--size HEIGHTxWIDTH" in refused(path, "yolov8", classes="cat,dog")
    session = open_session(path, "yolov8", classes="cat,dog", input_size=(320, 320), threads=1)
    np.testing.assert_allclose(session(IMAGE).boxes, files.BOXES, atol=.02)
    files.write_graph(path, outputs, ULTRALYTICS)
    assert "320x320 (height x width); 640x640 does not fit" in refused(path, None, input_size=(640, 640))
    own = Contract("x", "own", ("cat", "dog"), (640, 640), "ultralytics", color="rgb", scale=1 / 255)
    files.write_graph(path, outputs, {METADATA_KEY: own.to_json()}, ("batch", 3, "height", "width"), some)
    assert open_session(path, threads=1).contract.input_size == (640, 640)
    assert open_session(path, input_size=(320, 320), threads=1).contract.input_size == (320, 320)


def test_shapes_that_are_known_only_when_it_runs(tmp_path):
    rows = np.ascontiguousarray(files.dense(2, False).T)[None]
    path = tmp_path / "m.onnx"
    model = onnx.load(str(files.write_graph(path, {"output0": rows}, ULTRALYTICS, ("batch", 3, "height", "width"),
                                            {"output0": ["batch", 6, "anchors"]})))
    for node in model.graph.node: # the rows are not known before it runs either
        if node.op_type == "Slice": node.output[0] = "cut"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32([6]), "six"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.int64([1]), "rows_axis"))
    model.graph.node.extend([onnx.helper.make_node("Add", ["six", "nothing"], ["rows"]),
                             onnx.helper.make_node("Cast", ["rows"], ["rows_int"], to=onnx.TensorProto.INT64),
                             onnx.helper.make_node("Slice", ["cut", "start", "rows_int", "rows_axis"], ["output0"])])
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    for name in ("batch", "rows", "anchors"): model.graph.output[0].type.tensor_type.shape.dim.add().dim_param = name
    onnx.save(model, str(path))
    session = open_session(path, threads=1)
    assert session.contract.name == "ultralytics"
    np.testing.assert_allclose(session(IMAGE).boxes, files.BOXES, atol=.02)
    assert "it looks like ultralytics: --contract ultralytics" in refused(path, "yolov5")


def test_names_are_replaced_one_for_one(tmp_path):
    own = Contract("x", "own", ("cat", "dog"), files.SIZE, "ultralytics", color="rgb", scale=1 / 255)
    outputs = {"output0": np.ascontiguousarray(files.dense(2, False).T)[None]}
    path = files.write_graph(tmp_path / "m.onnx", outputs,
                             dict(YOLOV5, **{METADATA_KEY: own.to_json(), "names": "['x', 'y']"}))
    session = open_session(path, threads=1)
    assert session.contract.classes == ("cat", "dog") and "its metadata names 2 classes (x, y)" in session.notes[0]
    assert open_session(path, classes="Katze,Hund", threads=1).contract.classes == ("Katze", "Hund")
    assert "3 classes were given (a, b, c), but the contract has 2 (cat, dog)" in refused(path, None, classes="a,b,c")


def test_notes_hide_no_control_characters(tmp_path):
    outputs = {"output0": np.ascontiguousarray(files.dense(2, False).T)[None]}
    metadata = dict(ULTRALYTICS, names="{0: 'cat\\x1b[2J', 1: 'dog\\n'}", author="Ultralytics", head="De\x1b[0mtect\n")
    session = open_session(files.write_graph(tmp_path / "m.onnx", outputs, metadata), classes="a,b", threads=1)
    text = "".join(session.notes)
    assert "cat\\x1b[2J" in text and text.isprintable()


def test_hostile_metadata_is_one_line(tmp_path):
    path = tmp_path / "m.onnx"
    outputs = {"output0": np.ascontiguousarray(files.dense(2, False).T)[None]}
    for names in ("[" * 100000, "-" * 100000 + "1", "{0: 'a', 1: ['b']}", "9" * 10000):
        files.write_graph(path, outputs, dict(ULTRALYTICS, names=names))
        assert "name them with --classes" in refused(path, None)
        assert open_session(path, classes="cat,dog", threads=1).contract.classes == ("cat", "dog")
    for own in ("[" * 100000, "{}", "null", '{"extra": {"split": 3}}'):
        files.write_graph(path, outputs, {METADATA_KEY: own})
        assert "contract in the metadata" in refused(path, None)
    own = Contract("x", "own", ("cat", "dog"), files.SIZE, "ultralytics", extra={"split": {"val": "all"}})
    files.write_graph(path, outputs, {METADATA_KEY: own.to_json()})
    assert "val is 'all'; it must be a share" in refused(path, None)
    own = own._replace(extra={"split": {"split_by": "group", "group_by": "(a+)+$"}})
    files.write_graph(path, outputs, {METADATA_KEY: own.to_json()})
    session = open_session(path, threads=1)
    assert session.contract.extra["split"] == {"withheld": True} and "a pattern for groups" in session.notes[0]


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "m.onnx"
    outputs = {"output0": np.ascontiguousarray(files.dense(2, False).T)[None]}
    for marked, metadata in (("note-of-someone", {"key": "note-of-someone"}), ("output0", {})):
        whole = files.write_graph(path, outputs, metadata).read_bytes()
        path.write_bytes(whole.replace(marked.encode("ascii"), b"\xff" * len(marked)))
        text = refused(path, "ultralytics", classes="cat,dog")
        assert "UTF-8" in text or "cannot open it" in text, text


def test_a_damaged_file_is_one_line(tmp_path):
    whole = write(tmp_path / "m.onnx", "yolov8-asked").read_bytes()
    path = tmp_path / "damaged.onnx"
    rng = np.random.RandomState(0)
    at_ends = list(range(40)) + list(range(len(whole) - 200, len(whole)))
    opened = 0
    for _ in range(120):
        data = bytearray(whole)
        for at in rng.choice(at_ends, 2): data[at] = rng.randint(256)
        path.write_bytes(bytes(data[:rng.randint(len(data))] if rng.rand() < .3 else data))
        try:
            open_session(path, "ultralytics", classes="cat,dog", threads=1)(IMAGE)
            opened += 1
        except InputError as e: assert "\n" not in str(e) and str(path) in str(e) and len(str(e)) < 900
    assert opened < 120


def many_boxes(n=250):
    x, y = np.meshgrid(np.arange(20) * 16, np.arange(20) * 16)
    corners = np.stack([x.ravel(), y.ravel()], 1)[:n]
    boxes = np.concatenate([corners, corners + 12], 1).astype(np.float32)
    scores = np.zeros((n, 2), np.float32)
    scores[:, 0] = np.linspace(.9, .5, n)
    scores[200:, 1], scores[200:, 0] = scores[200:, 0], 0
    return boxes, scores


def test_the_threshold_decides_and_a_cap_is_counted(tmp_path):
    boxes, scores = many_boxes()
    contract = Contract("x", "many", ("pig", "cow"), files.SIZE, "boxes_scores")
    path = files.write_graph(tmp_path / "m.onnx", dict(boxes=boxes[None], scores=scores[None]),
                             {METADATA_KEY: contract.to_json()})
    session = open_session(path, threads=1)
    assert len(session(IMAGE).scores) == 250 and session.cut == [0]
    session.max_detections = 100
    found = session([IMAGE, IMAGE])
    assert [len(d.scores) for d in found] == [100, 100] and session.cut == [150, 150]
    session.max_detections = 300
    assert len(session(IMAGE).scores) == 250 and session.cut == [0]
    session.max_detections = None
    session.max_per_class = 100
    assert np.bincount(session(IMAGE).labels).tolist() == [100, 50]


def test_a_cap_holds_for_the_frame_and_not_for_its_tiles(tmp_path):
    boxes, scores = many_boxes()
    contract = Contract("x", "many", ("pig", "cow"), files.SIZE, "boxes_scores")
    path = files.write_graph(tmp_path / "m.onnx", dict(boxes=boxes[None], scores=scores[None]),
                             {METADATA_KEY: contract.to_json()})
    inner = open_session(path, threads=1)
    session = Tiled(inner, 320, 0)
    wide = np.full((320, 960, 3), 114, np.uint8)
    assert len(session(wide).scores) == 750 and session.cut == [0]
    session.max_detections = 300
    assert len(session(wide).scores) == 300 and session.cut == [450] and inner.max_detections == 300
    assert [len(d.scores) for d in session([wide, IMAGE])] == [300, 250] and session.cut == [450, 0]


def test_coco_stands_in_only_where_its_count_fits(tmp_path):
    eighty = {"output0": np.ascontiguousarray(files.dense(80, False).T)[None]}
    path = files.write_graph(tmp_path / "m.onnx", eighty)
    assert open_session(path, "yolov8", threads=1).contract.classes == COCO_CLASSES
    path = files.write_graph(tmp_path / "m.onnx", {"output0": np.ascontiguousarray(files.dense(3, False).T)[None]})
    text = refused(path, "yolov8")
    assert "output 'output0' [1, 7, 2100] holds 4 + 3 rows: 3 classes, and the file has no names for them" in text
    boxes, scores, labels = files.finished()
    rows = np.concatenate([boxes, scores[:, None], labels[:, None]], 1)[None]
    session = open_session(files.write_graph(path, {"output0": rows}), "yolo26", threads=1)
    assert "COCO's 80 are taken" in session.notes[0]


def not_utf8(path):
    "A byte of a name that no text has."
    path.write_bytes(path.read_bytes().replace(b"images", b"im\xe9ges"))


def cut_weights(path):
    model = onnx.load(str(path))
    model.graph.initializer[0].raw_data = b"abc"
    onnx.save(model, str(path))


def no_graph(path): path.write_bytes(b"<html>")


@pytest.mark.parametrize("harm", [not_utf8, cut_weights, no_graph])
def test_a_damaged_file_is_one_line_and_onnx_runtime_adds_none(tmp_path, capfd, harm):
    path = files.write_graph(tmp_path / "m.onnx", {"output": files.yolox_raw(files.dense(2, True))[None]})
    harm(path)
    capfd.readouterr()
    with pytest.raises(InputError) as e: open_session(path, "yolox", threads=1, classes="a,b")
    assert str(e.value).startswith(str(path)) and str(e.value).isprintable()
    assert capfd.readouterr() == ("", "")
