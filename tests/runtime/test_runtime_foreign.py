"""What an ONNX file from elsewhere says of itself: names, sizes and presets, and texts that mean harm."""
import json
import os

import pytest

from jetson_det.runtime.contract import (
    COCO_COLUMNS,
    PRESETS,
    Contract,
    check_input,
    check_outputs,
    load_contract,
    preset,
)
from jetson_det.runtime.files import InputError, printable
from jetson_det.runtime.foreign import (
    classes_for,
    fitting_presets,
    foreign_contract,
    input_size_of,
    preset_of,
    read_classes,
    read_literal,
    read_metadata,
    renaming_notes,
    split_record,
)

OPEN = ["batch", 3, "height", "width"]
HOSTILE = [
    "[" * 100000, "{" * 100000, "-" * 100000 + "1", "~" * 50000 + "1", "not " * 100000 + "1", "(" * 300 + ")" * 300,
    "lambda:" * 50000 + "1", "a" + ".a" * 100000, "1 if 1 else " * 30000 + "1", "9" * 100000, "'" * 99999, "\0", "",
    "__import__('os').system('true')", "open('/etc/passwd').read()", "{[]: 1}", "[*range(9)]", "{**{}}", "f'{1}'",
    "b'names'", "0x" + "f" * 100000, "1" + "+1" * 100000, "x" * (1 << 21), "{'a': " * 100 + "1" + "}" * 100
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_is_run_or_brings_the_reader_down(text):
    assert not isinstance(read_literal(text), (list, tuple, dict, str))
    facts = read_metadata({"names": text, "imgsz": text, "stride": text})
    assert facts.names is facts.input_size is facts.stride is None


@pytest.mark.parametrize("text, names", [
    ("{0: 'cat', 1: 'dog'}", ("cat", "dog")), ("['cat', 'dog']", ("cat", "dog")), ('["cat", "dog"]', ("cat", "dog")),
    ('{"1": "dog", "0": "cat"}', ("cat", "dog")), ("('cat', 'dog')", ("cat", "dog")), ("{0: 0, 1: 1}", ("0", "1")),
    ("[u'cat', u'dog']", ("cat", "dog")), ("{0: \"it's\", 1: 'a\\\\b{['}", ("it's", "a\\b{[")),
    ("{0: 'cat', 2: 'dog'}", None), ("{1: 'cat'}", None), ("['cat', 'cat']", None), ("['cat', '']", None),
    ("[['cat']]", None), ("'cat'", None), ("7", None), ("[]", None), ("{'a': 'cat'}", None),
    ("cat, dog", ("cat", "dog")),
    ("cat\ntraffic light\n", ("cat", "traffic light")), ("cat", None), ("cat,,dog", None), ("cat,cat", None),
    ("['cat', 'dog'", None), ("a: cat, b: dog", None), ('{"person": 1, "cat": 0}', ("cat", "person")),
    ('{"0": "cat", "0": "dog"}', None), ("{'a': 0, 'b': 0}", None), ('["S\\u00e4cke", "\\ud83d\\ude9a"]',
                                                                     ("S\u00e4cke", "\U0001f69a")),
    ('["a\\/b", "c"]', ("a/b", "c")), ('["\\ud83d", "c"]', None), ('["cat", null]', None), ("1" * 99999 + ",2", None),
    ("[" + "1" * 99999 + "]", None)])
def test_names_as_exporters_write_them(text, names):
    assert read_metadata({"names": text}).names == names


@pytest.mark.parametrize("key", ["names", "class_names", "class_labels", "classes", "labels"])
@pytest.mark.parametrize("text", ['["cat", "dog"]', "['cat', 'dog']", "{0: 'cat', 1: 'dog'}",
                                  '{"0": "cat", "1": "dog"}', "cat,dog", "cat\ndog"])
def test_names_count_under_every_usual_key_whatever_else_stands_there(key, text):
    for others in ({}, {"classes": "2", "labels": "coco.txt"}, {"author": "someone", "stride": "?"}):
        contract, _ = foreign_contract("yolox", dict(others, **{key: text}), [1, 3, 64, 64], [("o", [1, 84, 7])])
        assert contract.classes == ("cat", "dog")
    with pytest.raises(InputError, match=r"5 \+ 3 columns: 3 classes, but its metadata has 2 names \(cat, dog\)"):
        foreign_contract("yolox", {key: text}, [1, 3, 64, 64], [("o", [1, 84, 8])])
    with pytest.raises(InputError, match=r"names 2 classes \(cat, dog\), its outputs hold 3 or 4; it looks like yolox"):
        foreign_contract(None, {key: text}, [1, 3, 64, 64], [("o", [1, 84, 8])])


def test_names_that_contradict_or_cannot_be_read_are_said():
    two = [("o", [1, 84, 7])]
    texts = {"names": "['a', 'b']", "labels": "c,d", "classes": "a,b"}
    _, notes = foreign_contract("yolox", texts, [1, 3, 64, 64], two)
    assert notes == ["its metadata has other class names under labels; those under names are used (a, b)"]
    with pytest.raises(InputError, match="the names in its metadata can't be read"):
        foreign_contract("yolox", {"labels": "coco.txt"}, [1, 3, 64, 64], two)
    _, notes = foreign_contract("yolox", {"names": "['a', 'b'", "classes": "a,b"}, [1, 3, 64, 64], two)
    assert notes == ["not understood in its metadata: names"]
    assert read_metadata({"classes": "80", "names": "a,b"}).unread == ()
    assert preset_of(read_metadata({"labels": "a,b", "stride": "32"}), {"yolov5": 2}) is None # no file of YOLOv5


@pytest.mark.parametrize("text, size", [("[320, 640]", (320, 640)), ("320", (320, 320)), ("(64, 32)", (64, 32)),
                                        ("0", None), ("[320]", None), ("[320, 320, 3]", None), ("[-1, 320]", None),
                                        ("1e9", None), ("[1000000, 1000000]", None), ("'320'", None),
                                        ("[320, '320']", None)])
def test_sizes_as_exporters_write_them(text, size):
    facts = read_metadata({"imgsz": text})
    assert facts.input_size == size and facts.unread == (() if size else ("imgsz",))


def test_the_input_size_is_found_or_asked_for():
    facts = read_metadata({"imgsz": "[320, 640]"})
    nothing = read_metadata({})
    assert input_size_of(OPEN, facts) == ((320, 640), [])
    assert input_size_of(OPEN, facts, (64, 64)) == ((64, 64), [])
    assert input_size_of([1, 3, 320, "w"], facts) == ((320, 640), [])
    assert input_size_of([1, 3, 416, "w"], facts) == (None, [])
    assert input_size_of(OPEN, nothing) == (None, [])
    assert input_size_of([1, 3, 416, 416], nothing) == ((416, 416), [])
    size, notes = input_size_of([1, 3, 416, 416], facts)
    assert size == (416, 416) and "imgsz 320x640" in notes[0] and "416x416" in notes[0]
    with pytest.raises(InputError, match="416x416 .* 64x64 does not fit"):
        input_size_of([1, 3, 416, 416], nothing, (64, 64))
    for given in (None, "yolox", "ultralytics"):
        texts = {"names": "['a']", "stride": "32"} if given is None else {}
        with pytest.raises(InputError, match="--size HEIGHTxWIDTH"):
            foreign_contract(given, texts, OPEN, [("o", [1, 5 if given != "yolox" else "a", "n"])])


LAYOUTS = { # outputs at 640x640 -> (presets, number of classes)
    "yolox": ([("output", [1, 8400, 85])], ["yolox", "yolox-decoded", "yolov6"], 80),
    "yolov5": ([("output0", [1, 25200, 8])], ["yolov5"], 3),
    "yolov5 with what it trains on": ([("output", [1, 25200, 85]), ("339", [1, 3, 80, 80, 85]),
                                       ("392", [1, 3, 40, 40, 85]), ("445", [1, 3, 20, 20, 85])], ["yolov5"], 80),
    "yolov5 p6": ([("output0", [1, 25500, 85])], ["yolov5"], 80),
    "yolov8": ([("output0", ["batch", 6, 8400])], ["ultralytics"], 2),
    "yolov8 open": ([("output0", ["batch", 84, "anchors"])], ["ultralytics"], 80),
    "yolov8 p2": ([("output0", [1, 84, 34000])], ["ultralytics"], 80),
    "yolov10": ([("output0", [1, 300, 6])],
                ["ultralytics-end2end", "rtdetr-ultralytics", "rtdetr-ultralytics-end2end"], 0),
    "rtdetr of ultralytics": ([("output0", [1, 300, 84])], ["rtdetr-ultralytics"], 80),
    "rtdetr of transformers": ([("logits", ["b", 300, 80]), ("pred_boxes", ["b", 300, 4])], ["rtdetr"], 80),
    "rtdetr": ([("labels", ["N", 300]), ("boxes", ["N", 300, 4]), ("scores", ["N", 300])], ["rtdetr-deploy"], 0),
    "rfdetr": ([("dets", [1, 300, 4]), ("labels", [1, 300, 91])], ["rfdetr"], 91),
    "open-image-models": ([("output", ["n", 7])], ["open-image-models"], 0),
    "efficient-nms": ([("num_dets", [1, 1]), ("det_boxes", [1, 100, 4]), ("det_scores", [1, 100]),
                       ("det_classes", [1, 100])], ["efficient-nms"], 0),
    "four of open-image-models": ([("num", [1, 1]), ("boxes", [1, 100, 4]), ("scores", [1, 100]), ("labels", [1, 100])],
                                  ["efficient-nms"], 0),
    "only maps": ([("a", [1, 3, 80, 80, 85]), ("b", [1, 3, 40, 40, 85]), ("c", [1, 3, 20, 20, 85])], [], None),
    "all open": ([("output0", ["batch", "rows", "columns"])], None, None),
    "yolov5 open": ([("output0", ["batch", "anchors", 85])], ["yolox", "yolox-decoded", "yolov5", "yolov6"], 80),
    "no detector": ([("prob", [1, 1000])], [], None),
    "segmentation": ([("output0", [1, 116, 8400]), ("output1", [1, 32, 160, 160])], ["ultralytics"], 112),
    "nothing declared": ([("o", None)], [], None),
    "no output": ([], [], None),
}


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_layouts_are_known_by_their_shapes(layout):
    outputs, names, count = LAYOUTS[layout]
    fits = fitting_presets(outputs, (640, 640))
    if names is None: assert len(fits) > 4 # only the metadata can tell
    else: assert list(fits) == names and (not names or fits[names[0]] == count)


@pytest.mark.parametrize("texts, layout, name", [
    ({"author": "Ultralytics", "task": "detect", "names": "{0: 'a', 1: 'b'}", "stride": "32"}, "yolov8", "ultralytics"),
    ({"author": "Ultralytics", "names": "{0: 'a'}"}, "yolov10", "ultralytics-end2end"),
    ({"author": "Ultralytics", "head": "RTDETRDecoder"}, "yolov10", "rtdetr-ultralytics-end2end"),
    ({"author": "Ultralytics", "head": "RTDETRDecoder"}, "rtdetr of ultralytics", "rtdetr-ultralytics"),
    ({"author": "Ultralytics"}, "rtdetr of ultralytics", "rtdetr-ultralytics"),
    ({"names": "['a', 'b', 'c']", "stride": "32"}, "yolov5", "yolov5"),
    ({"names": "['a', 'b', 'c']", "stride": "32"}, "yolox", None), # somebody else's: Ultralytics has no such layout
    ({"author": "Ultralytics", "head": "Detect"}, "all open", "ultralytics"),
    ({"author": "Ultralytics", "head": "Detect", "end2end": "True"}, "all open", "ultralytics-end2end"),
    ({"author": "Ultralytics", "args": "{'nms': True, 'batch': 1}"}, "all open", "ultralytics-end2end"),
    ({"author": "Ultralytics", "args": "{'nms': False}", "end2end": "False"}, "all open", "ultralytics"),
    ({"author": "Ultralytics", "args": "[" * 100000}, "yolov8", "ultralytics"),
    ({"names": "['a']", "stride": "32"}, "yolov5 open", "yolov5"),
    ({"names": "['a', 'b']"}, "yolov8", None), ({}, "yolov8", None)])
def test_the_metadata_chooses_where_it_can(texts, layout, name):
    assert preset_of(read_metadata(texts), fitting_presets(LAYOUTS[layout][0], (640, 640))) == name


def made(given, texts, layout, **kw):
    return foreign_contract(given, texts, [1, 3, 640, 640], LAYOUTS[layout][0], **kw)


def test_what_contradicts_is_named():
    two = {"names": "{0: 'a', 1: 'b'}", "stride": "32", "author": "Ultralytics"}
    assert made(None, two, "yolov8")[0].classes == ("a", "b")
    cases = [
        (lambda: made("yolov5", two, "yolov5"),
         "[1, 25200, 8] holds 5 + 3 columns: 3 classes, but its metadata has 2 names (a, b)"),
        (lambda: made("ultralytics", {}, "yolov8"), "[batch, 6, 8400] holds 4 + 2 rows: 2 classes"),
        (lambda: made("ultralytics", {}, "yolov8"), "--classes a,b,c"),
        (lambda: made("ultralytics", {"names": "{0: 'a', 2: 'b'}"}, "yolov8"),
         "the names in its metadata can't be read"),
        (lambda: made("ultralytics", two, "yolov8", classes=("a", "b", "c")), "but 3 names were given (a, b, c)"),
        (lambda: made("ultralytics", dict(two, task="segment"), "yolov8"), "task 'segment'"),
        (lambda: made("yolox-decoded", {}, "yolov5"), "looks like yolov5: --contract yolov5"),
        (lambda: made("ultralytics", {}, "rtdetr"), "looks like rtdetr-deploy: --contract rtdetr-deploy"),
        (lambda: made(None, {}, "rfdetr"), "looks like rfdetr: --contract rfdetr"),
        (lambda: made(None, {}, "no detector"), "give one with --contract"),
        (lambda: made("ultralytics", {}, "no detector"), "[1, 1000]"),
        (lambda: made("yolov5", {}, "only maps"), "3 outputs are feature maps, such as 'a' [1, 3, 80, 80, 85]"),
        (lambda: made(None, {}, "only maps"), "YOLOv7 with --grid"),
        (lambda: foreign_contract("yolov8", {}, [1, 640, 640, 3], LAYOUTS["yolov8"][0]), "(batch, 3, height, width)"),
        (lambda: made("rfdetr", {}, "rfdetr", classes=("a", "b")),
         "holds 91 columns: 91 classes, but 2 names were given"),
    ]
    for call, message in cases:
        with pytest.raises(InputError) as e: call()
        assert message in str(e.value).replace("'batch'", "batch") and "\n" not in str(e.value), str(e.value)
    notes = made("ultralytics", dict(two, imgsz="[320, 320]", stride="64"), "yolov8")[1]
    assert len(notes) == 2 and "imgsz 320x320" in notes[0] and "stride 64" in notes[1] and "8, 16, 32" in notes[1]
    assert "not understood in its metadata: imgsz" in made("ultralytics", dict(two, imgsz="?"), "yolov8")[1]
    for own in (("class_0", "class_1"), ("0", "1"), ("Label 0", "Label 1")):
        numbers = dict(two, names=json.dumps(own))
        assert "are called x, y" in made("ultralytics", numbers, "yolov8", classes=("x", "y"))[1][0]


def test_a_pipe_is_no_class_name(tmp_path, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    os.mkfifo("names")
    os.mkdir("car")
    for given in ("names", "./names", str(tmp_path / "names")):
        with pytest.raises(InputError, match="names: is a named pipe"): read_classes(given)
    assert read_classes("car") == ("car", ) and read_classes("names,car") == ("names", "car")


def test_names_of_a_file_keep_their_labels():
    own = {"names": "['cat', 'dog', 'pig7']"}
    for given in (("dog", "cat", "pig7"), ("x", "y", "Cat"), ("cat", "pig7", "dog")):
        with pytest.raises(InputError, match=r"names its own classes \(cat, dog, pig7\).*another label.*--map"):
            renaming_notes(read_metadata(own).names, given)
    for given in (("Cat", "dog", "pig7"), ("cat", "dog", "pig 7"), ("x", "y", "z")):
        notes = renaming_notes(read_metadata(own).names, given)
        assert notes == ["its classes cat, dog, pig7 are called " + ", ".join(given)]
    assert renaming_notes(("cat", "dog"), ["cat", "dog"]) == [] and renaming_notes(None, ("x", )) == []


def test_a_project_has_several_layouts():
    for given, layout, name in (("ultralytics", "yolov10", "ultralytics-end2end"),
                                ("rtdetr", "rtdetr", "rtdetr-deploy"),
                                ("yolov10", "yolov8", "ultralytics"), ("d-fine", "rtdetr of transformers", "rtdetr")):
        texts = {"names": "['a', 'b']"} if layout == "yolov8" else {}
        contract, notes = made(given, texts, layout)
        assert contract.name == name
        assert any("read as --contract " + name in note for note in notes) == (given != "d-fine")


def test_classes_of_rfdetr():
    contract, _ = made("rfdetr", {}, "rfdetr")
    assert contract.extra["class_columns"] == list(COCO_COLUMNS) and len(contract.classes) == 80
    nothing = read_metadata({})
    outputs = [("dets", [1, 300, 4]), ("labels", [1, 300, 3])]
    assert classes_for("rfdetr", outputs, 3, nothing, ("a", "b"))[1] == (0, 1)
    assert classes_for("rfdetr", outputs, 3, nothing, ("a", "b", "c"))[1] is None


def test_names_from_the_person(tmp_path):
    (tmp_path / "n.txt").write_bytes("\ufefftraffic light\r\nS\u00e4cke\r\n\r\n".encode("utf-8"))
    (tmp_path / "n.names").write_text("a\nb")
    (tmp_path / "n.json").write_text('["a", "b"]')
    assert read_classes(str(tmp_path / "n.txt")) == ("traffic light", "S\u00e4cke")
    for given in (str(tmp_path / "n.names"), tmp_path / "n.json", "a, b"): assert read_classes(given) == ("a", "b")
    assert read_classes("x" * 5000 + "/y") == ("x" * 5000 + "/y", )
    assert read_classes("car/truck") == ("car/truck", ) and read_classes(["x"]) == ("x", )
    (tmp_path / "gap.txt").write_text("a\n\nb\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "data.yaml").write_text("names: [a]")
    (tmp_path / "map.json").write_text('{"a": 1}')
    for folder in ("names", "folder.txt"): (tmp_path / folder).mkdir()
    for pipe in ("pipe", "pipe.txt"): os.mkfifo(str(tmp_path / pipe))
    for given, message in ((tmp_path / "names", "names: is a folder"), (tmp_path / "folder.txt", "is a folder"),
                           (tmp_path / "pipe", "is a named pipe"), (tmp_path / "pipe.txt", "is a named pipe"),
                           ("/dev/zero", "/dev/zero: is a device"), ("/dev/urandom", "is a device"),
                           (tmp_path / "gap.txt", "gap.txt, line 2: a blank line"),
                           (tmp_path / "latin.txt", "not UTF-8"), (tmp_path / "empty.txt", "no name"),
                           (tmp_path / "gone.txt", "no such file with class names"),
                           ("/dev/zero", "is a device"), (tmp_path, "is a folder"),
                           (tmp_path / "data.yaml", "one name a line"), (tmp_path / "map.json", "not a list"),
                           ("a,,b", "no name"), ("a,b,a", "'a' is there twice"), ("", "no name"), ("/dev/zero.txt",
                                                                                                   "no such file")):
        with pytest.raises(InputError) as e: read_classes(str(given))
        assert message in str(e.value) and "\n" not in str(e.value)


DOCK = Contract("yolox", "yolox-nano", ("Sack", "Person"), (416, 416), "boxes_scores")
RECORDS = [("[" * 100000, "nested too deeply"), ('{"extra": ' * 100000, "nested too deeply"), ("9" * 10000, "JSON"),
           ('{"classes": ' + "[" * 100 + "]" * 100 + "}", "nested too deeply"),
           ('{"' + "k" * 100000 + '": 1}', "unknown key"), ("NaN", "a JSON object"), ('"text"', "a JSON object")]


@pytest.mark.parametrize("text, message", RECORDS, ids=range(len(RECORDS)))
def test_our_own_contract_from_a_stranger(text, message):
    with pytest.raises(InputError) as e: Contract.from_json(text, "x.onnx")
    assert message in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize("field, value", [("scale", 10 ** 400), ("mean", [10 ** 400] * 3),
                                          ("input_size", [32768, 32768]), ("classes", ["a"] * 9), ("output", [[]]),
                                          ("family", {}), ("extra", {"class_columns": "a"}),
                                          ("extra", {"class_columns": [-1]}), ("color", ["rgb"]), ("pad", 1e400),
                                          ("iou", "x" * 10000)])
def test_fields_that_nobody_means(field, value):
    fields = dict(json.loads(DOCK.to_json()), **{field: value})
    with pytest.raises(InputError) as e: Contract.from_json(json.dumps(fields), "x.onnx")
    assert "x.onnx: {} is ".format(field) in str(e.value) and len(str(e.value)) < 500


def test_a_record_of_splits_runs_and_opens_nothing():
    plain = {"val": .2, "test": 0, "seed": 7, "split_by": "stratified", "group_by": "", "splits": "", "digest": "ab",
             "marks": ["a"]}
    assert split_record(plain) == (plain, []) and split_record(None) == (None, [])
    assert split_record(dict(plain, group_by="folder"))[0]["group_by"] == "folder"
    for harm in ({"group_by": "(a+)+$"}, {"splits": "/etc"}, {"splits": "/dev"}, {"splits": "//host/x", "files": ["b"]},
                 {"splits": "\\\\host\\x", "files": ["b"]}, {"splits": "/etc", "files": [""]}):
        kept, notes = split_record(dict(plain, **harm))
        assert kept.pop("withheld") and "--splits" in notes[0]
        assert set(kept) <= {"digest", "marks", "files"} and kept["marks"] == ["a"]
    lists = dict(plain, splits="lists", files=["b"])  # opened only for data that bears the marks: test_open.py
    assert split_record(lists) == (lists, []) and split_record(dict(lists, group_by="(a+)+$"))[0]["group_by"] == ""
    assert "path" not in split_record(dict(plain, path="/etc"))[0]
    for wrong in ({"val": "x"}, {"val": 1}, {"seed": -1}, {"seed": .5}, {"marks": [1]}, {"splits": 3},
                  {"group_by": "x" * 9999}):
        with pytest.raises(InputError, match="must be"): split_record(dict(plain, **wrong))
    with pytest.raises(InputError, match="must be a record"): split_record([1])


@pytest.mark.parametrize("text, shown", [("S\u00e4cke \u4eba \u0633\u0648\u0627\u0631 \U0001f69a", None),
                                         ("a\x1b[2Jb", "a\\x1b[2Jb"), ("a\nb\r\tc", "a\\nb\\r\\tc"),
                                         ("\u202eabc\u2066", "\\u202eabc\\u2066"), ("a\u2028b\x85", "a\\u2028b\\x85"),
                                         ("\x7f\x9b", "\\x7f\\x9b"), ("caf\udce9", "caf\\xe9"),
                                         ("\ufeff\u200b", "\\ufeff\\u200b"), ("\u06a9\u200c\u0627", None),
                                         ("\0", "\\x00")])
def test_printable(text, shown):
    assert printable(text) == (text if shown is None else shown)
    assert printable(printable(text)) == printable(text) and len(printable(text).splitlines()) == 1


def test_every_preset_can_be_meant():
    six = [("o", [1, 300, 6])]
    outputs = {
        "yolox": [("o", [1, 84, 7])], "yolox-raw": [("o", [1, 84, 7])], "ultralytics": [("o", [1, 6, "n"])],
        "detr": [("pred_boxes", [1, 300, 4]), ("logits", [1, 300, 2])], "detr-scores": six, "detr-end2end": six,
        "end2end": six, "nms-rows": [("o", ["n", 7])], "labels-boxes-scores": LAYOUTS["rtdetr"][0],
        "efficient-nms": LAYOUTS["efficient-nms"][0]
    }
    special = {"yolov5": [("o", [1, 252, 7])], "rfdetr": [("dets", [1, 300, 4]), ("labels", [1, 300, 2])]}
    for name in PRESETS:
        graph = special.get(name, outputs[PRESETS[name]["output"]])
        assert foreign_contract(name, {"names": "['a', 'b']"}, [1, 3, 64, 64], graph)[0].name == name


@pytest.mark.parametrize("name", ["a\x1b[31m", "a\u202eb", "a\nb", "a\x9b2J"])
def test_names_of_strangers_are_escaped_in_every_message(tmp_path, name):
    "Of classes, inputs and outputs, presets, keys and files."
    names = json.dumps([name, "b", "c"])
    two = [("o", [1, 84, 7])]
    odd = [(name, [1, 84, 9]), (name + "2", [1, 84, 4])]
    size = [1, 3, 64, 64]
    dock = DOCK._replace(name=name, classes=(name, "b"))
    fields = json.loads(DOCK.to_json())
    calls = [
        lambda: foreign_contract("yolox", {"names": names}, size, two),
        lambda: foreign_contract(None, {"names": names}, size, two),
        lambda: foreign_contract(None, {"task": name}, size, two),
        lambda: foreign_contract("yolox", {}, size, two, classes=(name, "b", "c")),
        lambda: foreign_contract("yolox", {}, size, odd),
        lambda: foreign_contract("yolox", {}, [1, name, "h", "w", 3], two),
        lambda: foreign_contract("yolox", {}, size, [(name, [1, 3, 8, 8, 7]), ("b", [1, 3, 4, 4, 7])]),
        lambda: foreign_contract("yolox", {}, [1, 3, name, 64], two, input_size=(32, 32)),
        lambda: read_classes(name + "," + name),
        lambda: read_classes(str(tmp_path / (name + ".txt"))),
        lambda: load_contract(name),
        lambda: preset(name),
        lambda: check_input(dock, name, [1, 3, name, 4]),
        lambda: check_outputs(dock, odd),
        lambda: check_outputs(dock, [(name, [1, 4, name]), ("b", [name])]),
        lambda: Contract.from_json(json.dumps(dict(fields, **{name: 1})), name),
        lambda: Contract.from_json("{" + name, name),
        lambda: Contract.from_json(json.dumps(dict(fields, fit=name)), name),
        lambda: split_record({"val": name}),
    ]
    for call in calls:
        with pytest.raises(InputError) as e: call()
        assert str(e.value).isprintable(), str(e.value)
    _, notes = foreign_contract("yolox", {"names": json.dumps([name, "b"]), "labels": "c,d"}, size, two)
    assert all(note.isprintable() for note in notes)
