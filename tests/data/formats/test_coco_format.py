"""COCO JSON: what exporters make of it, both ways of parsing, labels without images, damage."""
import copy
import json
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from label_files import attributes_of, image_bytes, put, refused
from jetson_det.core import InputError
from jetson_det.data.formats import coco_file
from jetson_det.data.formats.coco import _find_coco, detect_coco, read_coco
from jetson_det.data.formats.coco_file import _parse_columns
from jetson_det.data.dataset import CROWD, DIFFICULT, IGNORE, Flaw
from jetson_det.data.formats.reader import Files
from jetson_det.data.formats.registry import read_dataset, write_dataset
from jetson_det.scenes.docks import write_scenes

IMAGE = image_bytes(suffix=".png")


def labels(images=("1.png", "2.png"), boxes=((1, 3, [1, 2, 3, 4]), (2, 90, [5, 6, 7, 8])), **kw):
    return dict(
        images=[dict(id=k, file_name=n, width=64, height=48) for k, n in enumerate(images, 1)],
        annotations=[dict(id=k, image_id=i, category_id=c, bbox=b, **kw) for k, (i, c, b) in enumerate(boxes, 1)],
        categories=[dict(id=3, name="Sack"), dict(id=90, name="Person")])


@pytest.fixture
def folder(tmp_path):
    return put(tmp_path, {"1.png": IMAGE, "2.png": IMAGE})


def without_msgspec(monkeypatch):
    monkeypatch.setattr(coco_file, "_parse_columns", lambda data: None)


def both_ways(path, monkeypatch):
    "The dataset or the error's line, parsed into types and parsed as JSON."
    def outcome():
        try: ds = read_coco(path)
        except InputError as e: return str(e)
        return ds.fingerprint(), ds.flaws, ds.attributes.keys()
    lean = outcome()
    with monkeypatch.context() as m:
        without_msgspec(m)
        return lean, outcome()


@pytest.fixture(params=["lean", "plain"])
def parsing(request, monkeypatch):
    if request.param == "plain": without_msgspec(monkeypatch)
    return request.param


def test_round_trip_of_generated_scenes(tmp_path, parsing):
    ds = read_dataset(write_scenes(tmp_path / "s", 6, (240, 320), seed=3))
    write_dataset(ds, tmp_path / "d", "coco")
    back = read_coco(tmp_path / "d")
    assert back.classes == ds.classes and sorted(back.splits) == sorted(ds.splits)
    for i, name in enumerate(back.paths):
        j = [p.rsplit("/", 1)[-1] for p in ds.paths].index(name.rsplit("/", 1)[-1])
        assert np.abs(back.boxes_of(i)[0] - ds.boxes_of(j)[0]).max() < .01
        assert (back.boxes_of(i)[1] == ds.boxes_of(j)[1]).all()


def test_ids_as_text_and_as_fractions(folder, parsing):
    d = labels()
    d["images"][0]["id"] = "1"
    d["annotations"][0]["image_id"] = 1.0
    d["annotations"][0]["category_id"] = " 3 "
    d["categories"][1]["id"] = "90"
    ds = read_coco(put(folder, {"a.json": d}) / "a.json")
    assert ds.classes == ("Sack", "Person") and ds.labels.tolist() == [0, 1] and ds.image_ids.tolist() == [1, 2]
    d["images"][0]["id"] = d["annotations"][0]["image_id"] = "first"
    assert read_coco(put(folder, {"a.json": d}) / "a.json").image_ids.tolist() == [1, 2]


def test_numbers_as_text_and_fields_left_out(folder, parsing):
    d = labels(boxes=[(1, 3, ["1", " 2.5", 3, "4e0"]), (2, 90, None), (2, 3, [0, 0, 9, 9])], iscrowd="0")
    d["annotations"][1].update(segmentation=[[10, 11, 20, 12, 15, 30], [40, 5, 41, 5, 40, 6]], ignore=1)
    d["annotations"][2].update(iscrowd=True, difficult="1", area=None)
    del d["annotations"][2]["id"], d["images"][0]["width"]
    d["images"][1]["height"] = None
    ds = read_coco(put(folder, {"a.json": d}) / "a.json")
    assert ds.boxes.tolist() == [[1, 2.5, 4, 6.5], [10, 5, 41, 30], [0, 0, 9, 9]]
    assert ds.flags.tolist() == [0, IGNORE, CROWD | DIFFICULT]
    assert not ds.flaws


def test_attributes(folder, parsing):
    d = labels()
    d["annotations"][1]["attributes"] = {
        "occluded": False, "track_id": 7, "text": "B MW 12", "label": "x", "flags": "y", "self": "z", "empty": "",
        "none": None, "list": [1, "ä"]
    }
    ds = read_coco(put(folder, {"a.json": d}) / "a.json")
    second = {"occluded": "false", "track_id": "7", "text": "B MW 12", "label": "x", "flags": "y", "self": "z",
              "list": '[1, "ä"]'}
    assert attributes_of(ds) == {name: ["", value] for name, value in second.items()}
    assert ds.to_coco()["annotations"][1]["attributes"]["text"] == "B MW 12"


def test_attributes_of_an_image_that_is_missing(folder, parsing):
    d = labels(("gone.png", "2.png"), [(1, 3, [0, 0, 1, 1]), (2, 3, [0, 0, 2, 2]), (1, 3, [0, 0, 3, 3]),
                                       (2, 3, [0, 0, 4, 4])])
    for a in d["annotations"]: a["attributes"] = {"n": str(a["id"])}
    ds = read_coco(put(folder, {"a.json": d}) / "a.json")
    assert ds.boxes[:, 2].tolist() == [2, 4]
    assert attributes_of(ds) == {"n": ["2", "4"]}
    assert [f.kind for f in ds.flaws] == ["missing-image", "no-labels"] # images/1.png is in no list


def test_too_many_attributes_are_not_columns(folder, parsing):
    d = labels(boxes=[(1, 3, [0, 0, 9, 9])] * 300)
    for k, a in enumerate(d["annotations"]): a["attributes"] = {"kept": "1", f"only {k}": "1"}
    ds = read_coco(put(folder, {"a.json": d}) / "a.json")
    assert len(ds.attributes) == 64 and "kept" in ds.attributes
    assert [(f.severity, f.kind) for f in ds.flaws] == [("note", "many-attributes")]


def test_labels_without_their_images(tmp_path, parsing):
    ds = read_coco(put(tmp_path, {"a.json": labels(("images/1.png", "/home/x/../2.png"))}) / "a.json")
    message = "a.json: none of its 2 images is there (such as images/1.png); sizes are the declared ones"
    assert ds.flaws == [Flaw("error", "no-images", "a.json", "", message, "stops")]
    assert ds.sizes.tolist() == [[48, 64]] * 2
    assert ds.paths.tolist() == ["images/1.png", "home/x/2.png"]
    assert len(ds.boxes) == 2
    for change in (dict(width=0), dict(height=None), dict(width=10**9), dict(width="wide")):
        d = labels()
        d["images"][1].update(change)
        refused(lambda: read_coco(put(tmp_path, {"a.json": d})/"a.json"),
                "none of its 2 images is there (such as 1.png)")


def test_one_split_without_its_images(folder, parsing):
    put(folder, {"train.json": labels(("7.png", "8.png")), "val.json": labels()})
    ds = read_coco(folder)
    assert [(f.severity, f.kind, f.file) for f in ds.flaws] == [("error", "no-images", "train.json")] and len(ds) == 4
    assert not ds.split("val").flaws


def test_the_whole_set_of_coco(tmp_path):
    key = labels(("1.png",), [(1, 3, [0, 0, 9, 9])], keypoints=[1, 2, 2])
    key["categories"] = [dict(id=3, name="person", keypoints=["nose"])]
    captions = dict(images=[], annotations=[dict(caption="x", image_id=1)])
    for s in ("train", "val"):
        of_split = dict(key, images=[dict(id=1, file_name=f"{s}.png")])
        put(tmp_path / "annotations", {
            f"instances_{s}2017.json": labels((f"{s}.png",), [(1, 3, [1, 2, 3, 4])]),
            f"person_keypoints_{s}2017.json": of_split,
            f"stuff_{s}2017.json": of_split,
            f"captions_{s}2017.json": captions,
        })
    put(tmp_path, {
        "annotations/image_info_test2017.json": dict(images=[], categories=[]),
        "train2017/train.png": IMAGE,
        "val2017/val.png": IMAGE,
    })
    expected = ["annotations/instances_train2017.json", "annotations/instances_val2017.json"]
    assert list(_find_coco(Files(tmp_path))) == expected
    assert read_coco(tmp_path).paths.tolist() == ["train2017/train.png", "val2017/val.png"]
    assert detect_coco(Files(tmp_path)) == "annotations/instances_train2017.json"


def test_detection(tmp_path):
    assert detect_coco(
        Files(
            put(
                tmp_path, {
                    "package.json": dict(name="x", images=["a"]), "empty.json": b"",
                    "results.json": [dict(image_id=1, bbox=[])], "bytes.json": b"\0\xff"
                }))) == ""
    assert detect_coco(Files(put(tmp_path, {"broken.json": '{"images": [\n'}))) == "broken.json"
    assert detect_coco(Files(put(tmp_path, {"z.json": labels()}))) == "z.json"
    assert detect_coco(
        Files(
            put(tmp_path/"me",
                {f"{k}.json": dict(shapes=[], imagePath="x", imageData="A"*5000 + '"images"')
                 for k in range(3)}))) == ""


def test_a_cut_split_is_not_passed_over(folder):
    text = json.dumps(labels())
    put(folder, {"train.json": labels(), "val.json": text[:text.index("categories") - 5]})
    refused(lambda: read_coco(folder), "val.json, line 1: not valid JSON")


CHANGES = [(("images", 0, "id"), [True, None, [1], {}, 1.5, 2, "x", 10**400]),
           (("images", 0, "file_name"), [5, None, "", " ", [], "a\nb", "\ud800.png", "a\0b", "x"*5000, "2.png"]),
           (("images", 0, "width"), [-1, "64", 10**400, float("inf"),
                                     float("nan"), [], True]),
           (("annotations", 0, "image_id"), [9, None, [], "1", 1.0, True, "x"*5000]),
           (("annotations", 0, "category_id"), [9, None, {}, "3", "Sack", 10**400]),
           (("annotations", 0, "bbox"), [
               None, "1 2 3 4", [], [1, 2, 3], [1, 2, 3, "x"], [1, 2, 3, None], [1, 2, 3, float("nan")],
               [1, 2, 3, float("inf")], [1e308, 0, 1e308, 1], [1e7, 0, 1, 1], [1.1e7, 0, 1, 1], [1, 2, 3, True],
               {"x": 1}, [[1], 2, 3, 4], [1, 2, 3, 10**400], [1, 2, 3, 4, 5], 7
           ]), (("annotations", 0, "iscrowd"), [True, "1", "0", None, 2, [], [0], {}]),
           (("annotations", 0, "attributes"), [None, [], "x", {"a": {"b": [1]}}, {"a": 10**300}]),
           (("annotations", 0), [None, 5, [], "x", {}]), (("images", 0), [None, 5, {}]),
           (("categories", 0), [None, {}, 7]),
           (("categories", 0, "name"), [None, "", 5, [], "Person", "a\nb", "\ud800"]),
           (("categories", 0, "id"), [None, "3", 3.0, 90, [], 10**400]),
           (("categories", 0, "supercategory"), [None, [], "Sack", "Person",
                                                 {}]), (("annotations", ), [None, {}, [], 5]),
           (("images", ), [None, [], {}]), (("categories", ), [None, []])]


@pytest.mark.parametrize("place, value", [(p, v) for p, values in CHANGES for v in values], ids=lambda v: str(v)[:30])
def test_both_ways_of_parsing_agree(folder, monkeypatch, place, value):
    d = labels()
    *way, last = place
    at = d
    for k in way: at = at[k]
    at[last] = value
    put(folder, {"a.json": json.dumps(d, indent=1)})
    lean, plain = both_ways(folder / "a.json", monkeypatch)
    assert lean == plain
    if isinstance(lean, str): assert str(folder) in lean and "\n" not in lean


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_both_ways_give_the_same_boxes(tmp_path_factory, data):
    number = st.one_of(st.integers(-50, 10**5), st.floats(-1e7, 1e7, width=64))
    boxes = data.draw(
        st.lists(st.tuples(st.integers(1, 2), st.sampled_from([3, 90]), st.lists(number, min_size=4, max_size=4)),
                 min_size=1,
                 max_size=12))
    d = labels(boxes=boxes)
    for a in d["annotations"]:
        a.update(
            data.draw(
                st.fixed_dictionaries({},
                                      optional=dict(iscrowd=st.sampled_from([0, 1, True, "0", None]),
                                                    ignore=st.just(1),
                                                    area=number,
                                                    segmentation=st.just([[1, 2, 3]]),
                                                    attributes=st.dictionaries(st.text(max_size=3),
                                                                               st.sampled_from(["x", 1, None, False]),
                                                                               max_size=2)))))
    root = put(tmp_path_factory.mktemp("c"), {"1.png": IMAGE, "2.png": IMAGE, "a.json": d})
    assert _parse_columns((root / "a.json").read_bytes()) is not None
    with pytest.MonkeyPatch.context() as m:
        lean, plain = both_ways(root / "a.json", m)
    assert lean == plain and not isinstance(lean, str)


@pytest.mark.parametrize("indent", [None, 1])
def test_the_line_of_an_error(folder, indent):
    d = labels(boxes=[(1, 3, [1, 2, 3, 4]), (2, 3, [1, 2, 3, 4]), (1, 7, [1, 2, 3, 4])])
    text = json.dumps(d, indent=indent)
    line = text[:text.index('"category_id": 7')].count("\n") - 2 if indent else 1
    put(folder, {"a.json": text})
    refused(lambda: read_coco(folder/"a.json"),
            f"a.json, line {line}: annotation 3 has the category 7, which is not in the file's categories")


def damaged(text, rng):
    "The text cut, flipped, with values exchanged or nested."
    kind = rng.randrange(6)
    data = bytearray(text.encode())
    if kind == 0: return bytes(data[:rng.randrange(len(data))])
    if kind == 1:
        for _ in range(rng.choice((1, 3, 20))): data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if kind == 2:
        a, b = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
        return bytes(data[:a] + data[min(b, a + 40):])
    d = copy.deepcopy(json.loads(text))
    odd = [None, True, -1, 0, 1e308, 10**400, "", "x", "\ud800", "a\0b", [], {}, [[[]]], {"id": []}, "9" * 5000]
    for _ in range(rng.choice((1, 2, 6))):
        key = rng.choice(list(d)) if d else None
        if kind == 3 and key and isinstance(d[key], list) and d[key]:
            e = rng.choice(d[key])
            if isinstance(e, dict) and e: e[rng.choice(list(e))] = rng.choice(odd)
        elif kind == 4 and key and isinstance(d[key], list) and d[key]:
            e = rng.choice(d[key])
            if isinstance(e, dict) and e: del e[rng.choice(list(e))]
        elif key: d[key] = rng.choice([*odd, [rng.choice(odd)]])
    out = json.dumps(d)
    return (out if rng.random() < .9 else out.replace("[", "[" * 3000, 1)).encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("whole", [True, False])
def test_damage_gives_one_line_or_a_dataset(folder, whole):
    rng = random.Random(1)
    text = json.dumps(labels(iscrowd=0, attributes={"text": "x"}, segmentation=[[1, 2, 3, 4, 5, 6]]), indent=1)
    done = 0
    start = time.monotonic()
    for _ in range(250):
        (folder / "a.json").write_bytes(damaged(text, rng))
        try: ds = read_coco(folder if whole else folder / "a.json")
        except InputError as e: assert "\n" not in str(e) and (whole or "a.json" in str(e)), str(e)
        else:
            done += 1
            ds.fingerprint(), repr(ds), json.dumps(ds.to_coco())
            assert all("\n" not in f.message for f in ds.flaws)
    assert 0 < done < 250 and time.monotonic() - start < 30


@pytest.mark.data
@pytest.mark.parametrize("name, images, boxes, flaws", [
    ("aerial/coco_utils/visdrone2019-det-train-first50image.json", 50, 3326, ["no-images"]),
    ("aerial/coco_utils/terrain_all_coco.json", 2, 12, ["missing-image", "no-labels", "stated-area"]),
    ("aerial/coco_utils/combined_coco.json", 2, 12, ["no-labels", "stated-area"]),
    ("aerial/coco_utils/terrain1_coco.json", 1, 7, ["no-labels", "stated-area"]),
    ("aerial/coco_utils/modified_terrain2_coco.json", 1, 5, ["no-labels", "stated-area"]),
    ("coco_fixtures/val2014_100/instances_val2014_100.json", 100, 839, ["no-images"]),
])
def test_real_files(data, monkeypatch, name, images, boxes, flaws):
    ds = read_coco(data / "datasets" / name)
    assert (len(ds), len(ds.boxes), [f.kind for f in ds.flaws]) == (images, boxes, flaws)
    lean, plain = both_ways(data / "datasets" / name, monkeypatch)
    assert lean == plain
