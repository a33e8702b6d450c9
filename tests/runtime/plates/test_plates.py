"Plates from box to text, with readers whose answers are known."
import itertools
import json
import os

import cv2
import numpy as np
import pytest

from jetson_det.runtime.files import InputError
from jetson_det.runtime.geometry import as_detections
from jetson_det.runtime.ops.privacy import PrivacyRules, hash_text
from jetson_det.runtime.plates.alpr import Alpr, OpenImageSession, PlateReader, crop_plates, draw_plates, read_plates
from jetson_det.runtime.plates.alpr import row_text, run_alpr
from jetson_det.runtime.plates.ocr import OcrSession, PlateConfig, PlateText, as_plate_config, decode_ctc
from jetson_det.runtime.plates.ocr import decode_slots, fit_crop, open_ocr, read_plate_config
from jetson_det.runtime.plates.patterns import PATTERNS, correct_text, countries_of, fits_pattern, is_plausible
from jetson_det.runtime.plates.votes import TrackVotes, vote

LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_"


def reading(text, confidence=.9):
    return PlateText(text, confidence ** len(text), (confidence,) * len(text))


def sharp(indices, classes, peak=.9):
    "Probabilities whose largest is at each index."
    rest = (1 - peak) / (classes - 1)
    scores = np.full((len(indices), classes), rest, np.float32)
    scores[np.arange(len(indices)), indices] = peak
    return scores


# ---- decoding

def test_ctc_is_groupby_without_blanks():
    rng = np.random.RandomState(0)
    for _ in range(300):
        columns = rng.randint(0, 4, rng.randint(1, 20))
        expected = "".join("ABC_"[k] for k, _ in itertools.groupby(columns) if k != 3)
        found = decode_ctc(sharp(columns, 4)[None], "ABC_")[0]
        assert found.text == expected
        assert len(found.confidences) == len(expected)


def test_ctc_takes_the_surest_column_and_any_blank():
    scores = np.array([[[.6, .4], [.9, .1], [.2, .8]]])
    assert decode_ctc(scores, "A_")[0] == PlateText("A", .9, (.9,))
    assert decode_ctc(scores[..., ::-1], "_A", 0)[0].text == "A"
    assert decode_ctc(np.array([[[.1, .9]]]), "A_")[0] == PlateText("", 0., ())


def test_slots_leave_padding_out_but_count_its_doubt():
    scores = np.stack([sharp([0, 2, 2], 3, .8)])
    found = decode_slots(scores, "AB_")[0]
    assert found.text == "A"
    assert found.confidence == pytest.approx(.8 ** 3, abs=1e-6)
    assert found.confidences == pytest.approx((.8,), abs=1e-6)


# ---- feeding

@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("mode", ["grayscale", "rgb", "bgr"])
def test_fit_crop_equals_the_steps_of_opencv(keeps, mode):
    "Against cv2.resize and cv2.copyMakeBorder, as fast-plate-ocr calls them."
    rng = np.random.RandomState(1)
    for _ in range(40):
        h, w = rng.randint(4, 90), rng.randint(4, 200)
        crop = rng.randint(0, 256, (h, w, 3)).astype(np.uint8)
        config = PlateConfig(LETTERS, 9, 64, 128, image_color_mode=mode, keep_aspect_ratio=keeps)
        found = fit_crop(crop, config)
        codes = {"grayscale": cv2.COLOR_BGR2GRAY, "rgb": cv2.COLOR_BGR2RGB}
        image = cv2.cvtColor(crop, codes[mode]) if mode in codes else crop
        if keeps:
            ratio = min(64 / h, 128 / w)
            new = max(round(w * ratio), 1), max(round(h * ratio), 1)
            dw, dh = (128 - new[0]) / 2, (64 - new[1]) / 2
            image = cv2.copyMakeBorder(cv2.resize(image, new), round(dh - .1), round(dh + .1), round(dw - .1),
                                       round(dw + .1), cv2.BORDER_CONSTANT, value=(114, 114, 114))
        else:
            image = cv2.resize(image, (128, 64))
        assert np.array_equal(found, image.reshape(64, 128, -1))


def fixed_reader(word, batch_size=None, **kw):
    seen = []

    def infer(x):
        seen.append(x)
        return np.stack([sharp([LETTERS.index(c) for c in word], 37)] * len(x))
    config = PlateConfig(LETTERS, len(word), 16, 32, image_color_mode="grayscale")
    return OcrSession(config, infer, batch_size=batch_size, **kw), seen


def test_all_plates_of_a_frame_are_one_batch():
    session, seen = fixed_reader("AB12__")
    assert [r.text for r in session([np.zeros((9, 30, 3), np.uint8)] * 5)] == ["AB12"] * 5
    assert [x.shape for x in seen] == [(5, 16, 32, 1)]


def test_a_fixed_batch_is_filled_up():
    session, seen = fixed_reader("AB12__", batch_size=4, channels_first=True, dtype=np.float32)
    assert len(session([np.full((9, 30, 3), k, np.uint8) for k in range(6)])) == 6
    assert [x.shape for x in seen] == [(4, 1, 16, 32)] * 2
    assert seen[1][:, 0, 0, 0].tolist() == [4, 5, 5, 5]


@pytest.mark.parametrize("shape", [(2, 37, 6), (2, 6 * 37), (2, 6, 37)])
def test_layouts_of_scores(shape):
    scores = np.stack([sharp([10, 11, 1, 2, 36, 36], 37)] * 2)
    given = scores.transpose(0, 2, 1) if shape == (2, 37, 6) else scores.reshape(shape)
    session, _ = fixed_reader("AB12__")
    session.infer = lambda x: np.log(given) + 3  # logits
    assert [r.text for r in session([np.zeros((9, 30, 3), np.uint8)] * 2)] == ["AB12"] * 2


def test_faults_of_the_network_are_said():
    session, _ = fixed_reader("AB12__")
    crop = np.zeros((9, 30, 3), np.uint8)
    session.infer = lambda x: np.full((1, 6, 37), np.nan)
    with pytest.raises(InputError, match="NaN or inf"): session([crop])
    session.infer = lambda x: np.zeros((1, 5, 37))
    with pytest.raises(InputError, match=r"\[1, 5, 37\] does not hold 6 slots"): session([crop])
    with pytest.raises(InputError, match="crop"): session([crop[:0]])


@pytest.mark.parametrize("key, value", [
    ("alphabet", "AAB"), ("alphabet", None), ("pad_char", "?"), ("max_plate_slots", -1), ("img_height", "64"),
    ("image_color_mode", "hsv"), ("interpolation", "best"), ("padding_color", [1, 2]), ("decoder", "beam"),
    ("scale", 0), ("keep_aspect_ratio", "no"), ("colour", 1)])
def test_a_wrong_key_is_named(key, value):
    given = {"alphabet": "AB_", "max_plate_slots": 3}
    given[key] = value
    with pytest.raises(InputError, match=key): as_plate_config(given)


def test_configuration_in_yaml_equals_json(tmp_path):
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    given = {"alphabet": LETTERS, "max_plate_slots": 9, "img_height": 70, "img_width": 140, "padding_color": 7}
    (tmp_path / "a.json").write_text(json.dumps(given))
    (tmp_path / "a.yaml").write_text("".join("{}: {}\n".format(k, json.dumps(v)) for k, v in given.items()))
    assert read_plate_config(tmp_path / "a.yaml") == read_plate_config(tmp_path / "a.json")
    (tmp_path / "b.yaml").write_text("alphabet: [")
    with pytest.raises(InputError, match="b.yaml: not YAML"): read_plate_config(tmp_path / "b.yaml")


def write_graph(path, batch, dtype, shape, slots=3):
    "A graph that gives the same scores for any crop."
    onnx = pytest.importorskip("onnx", reason="onnx is not installed for Python 3.6")
    from onnx import TensorProto, helper, numpy_helper
    kind = TensorProto.UINT8 if dtype == "uint8" else TensorProto.FLOAT
    nodes = [helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
             helper.make_node("ReduceMean", ["f"], ["m"], axes=[1, 2, 3], keepdims=1),
             helper.make_node("Reshape", ["m", "flat"], ["r"]),
             helper.make_node("Mul", ["r", "zero"], ["z"]),
             helper.make_node("Add", ["z", "scores"], ["plate"])]
    constants = {"flat": np.array([-1, 1, 1], np.int64), "zero": np.zeros(1, np.float32),
                 "scores": sharp([1, 0, 2], 3)[None][:, :slots]}
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", kind, [batch] + shape)],
                              [helper.make_tensor_value_info("plate", TensorProto.FLOAT, [batch, slots, 3])],
                              [numpy_helper.from_array(v, k) for k, v in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(path))


@pytest.mark.parametrize("batch, dtype, shape", [
    ("n", "uint8", [64, 128, 3]), (4, "uint8", [70, 140, 1]), ("n", "float", [3, 24, 94])])
def test_a_real_graph_tells_its_input(tmp_path, batch, dtype, shape):
    write_graph(tmp_path / "m.onnx", batch, dtype, shape)
    (tmp_path / "m.json").write_text(json.dumps({"alphabet": "AB_"}))
    session = open_ocr(tmp_path / "m.onnx", threads=1)
    sides = shape[1:] if shape[0] == 3 else shape[:2]
    assert [session.config.img_height, session.config.img_width] == sides
    assert session.config.image_color_mode == ("grayscale" if 1 in shape else "rgb")
    assert session.batch_size == (4 if batch == 4 else None)
    assert [r.text for r in session([np.zeros((9, 30, 3), np.uint8)] * 5)] == ["BA"] * 5
    (tmp_path / "m.json").write_text(json.dumps({"alphabet": "AB_", "img_height": 32}))
    with pytest.raises(InputError, match="img_height is 32, but the graph takes"): open_ocr(tmp_path / "m.onnx")


# ---- patterns

def test_examples_of_countries():
    # the example plates in the countries' own descriptions of their series
    examples = {"DE": "B MW 1234", "FR": "AA-229-AA", "GB": "BD51 SMR", "PL": "WA 12345", "CZ": "1A2 3456",
                "ES": "1234 BBB", "NL": "12-ABC-3",
                "SE": "ABC 12D", "UA": "AA 1234 BB", "IT": "AB 123 CD"}
    for country, text in examples.items():
        assert country in countries_of(text), (country, text)
        assert is_plausible(text, country)


def test_patterns_are_of_the_grammar():
    for country, patterns in PATTERNS.items():
        assert len(set(patterns)) == len(patterns), country
        for pattern in patterns: assert set(pattern) <= set("LDA") and 3 <= len(pattern) <= 10


def test_only_doubtful_similar_characters_change():
    pytest.importorskip("hypothesis", reason="hypothesis is not installed for Python 3.6")
    from hypothesis import given, settings
    from hypothesis import strategies as st
    similar = [set("0OQ"), set("1I"), set("8B"), set("5S"), set("2Z")]

    @settings(max_examples=300, deadline=None)
    @given(st.text("0O1I8B5S2ZQA37X", min_size=1, max_size=9), st.sampled_from(sorted(PATTERNS) + [""]), st.data())
    def check(text, country, data):
        sure = data.draw(st.lists(st.floats(0, 1), min_size=len(text), max_size=len(text)))
        found = correct_text(text, sure, country)
        assert len(found.text) == len(text)
        for place, (before, after) in enumerate(zip(text, found.text)):
            assert (before != after) == (place in found.places)
            if before == after: continue
            assert sure[place] < .9
            assert any({before, after} <= group for group in similar)
        if found.places:
            assert is_plausible(found.text, country) and not is_plausible(text, country)
        assert correct_text(text, [.9] * len(text), country).text == text
    check()


def test_a_pattern_that_does_not_decide_changes_nothing():
    # BE has LLLDDD and DDDLLL: both are one exchange a place away
    assert correct_text("B8B8B8", [.1] * 6, "BE").places == ()
    assert correct_text("8AR123", [.1] * 6, "LT").text == "BAR123"
    with pytest.raises(InputError, match="each needs one"): correct_text("AB", [.5])


def test_fits_pattern_reads_fixed_characters():
    assert fits_pattern("SCV12345", "SCVDDDDD") and not fits_pattern("SCW12345", "SCVDDDDD")


# ---- votes

def test_votes_do_not_depend_on_order():
    rng = np.random.RandomState(2)
    for _ in range(60):
        readings = []
        for _ in range(rng.randint(1, 7)):
            n = rng.randint(0, 4)
            sure = tuple(rng.rand(n).tolist())
            readings.append(PlateText("".join(rng.choice(list("A8"), n)), float(np.prod(sure)) if n else 0., sure))
        first = vote(readings)
        for _ in range(4):
            rng.shuffle(readings)
            other = vote(readings)
            assert other.text == first.text and other.confidences == pytest.approx(first.confidences)


def test_blurred_readings_are_outvoted():
    rng = np.random.RandomState(3)
    truth = "AB123CD"
    votes = TrackVotes()
    wrong_alone = 0
    for _ in range(25):
        sure = rng.uniform(.55, .99, 7)
        is_right = rng.rand(7) < sure
        text = "".join(c if right else "X" for c, right in zip(truth, is_right))
        wrong_alone += text != truth
        result = votes.add(4, PlateText(text, float(sure.prod()), tuple(sure)))
    assert wrong_alone > 12
    assert result.text == truth and votes.best(4) == result


def test_a_text_of_another_length_is_another_class():
    assert vote([reading("AB12", .6), reading("AB1", .99)]).text == "AB1"
    assert vote([reading("AB12", .9)] * 3 + [reading("AB1", .99)]).text == "AB12"
    assert vote([reading(""), reading("")]).text == ""


def test_agreement_keeps_the_surest_and_disagreement_takes():
    many = [reading("AB12", .5)] * 20 + [reading("AB12", .99)]
    assert vote(many).confidences == pytest.approx((.99,) * 4)
    split = vote([reading("AB12", .9), reading("AB13", .9), reading("AB12", .9)])
    assert split.text == "AB12" and split.confidences == pytest.approx((.9, .9, .9, .6))
    assert vote([reading("A1", 0.)]).confidences == (0., 0.)


def test_votes_forget():
    votes = TrackVotes(most=2, tracks=3)
    for id in range(50): votes.add(id, reading("A1"))
    assert len(votes) == 3 and votes.best(46).text == "" and votes.best(49).text == "A1"
    for _ in range(2): votes.add(49, reading("B2"))
    assert votes.best(49).text == "B2"
    with pytest.raises(InputError): TrackVotes(most=0)


# ---- the reader and the command

def frame_with_plates():
    image = np.zeros((120, 240, 3), np.uint8)
    image[10:40, 20:110] = 200
    return image, as_detections([[20, 10, 110, 40], [120, 60, 220, 90], [0, 0, 2, 2]], [.9, .3, .8], [1, 1, 0])


def test_only_confident_plates_are_read():
    session, seen = fixed_reader("AB12__")
    image, found = frame_with_plates()
    assert PlateReader(session, labels=[1])(image, found) == ("AB12", None, None)
    assert [len(x) for x in seen] == [1]
    assert PlateReader(session, labels=[1], least=.95)(image, found) == (None,) * 3
    assert PlateReader(session, labels=[1], country="PL")(image, found) == (None,) * 3  # no such form in Poland
    assert PlateReader(session)(image, as_detections()) is None


def test_the_tracks_readings_decide():
    image, found = frame_with_plates()
    words = iter([reading("AB12", .95), reading("A812", .6), reading("AB12", .95)])
    reader = PlateReader(lambda crops: [next(words) for _ in crops], labels=[1])
    ids = np.array([7, -1, 8])
    assert [reader(image, found, ids)[0] for _ in range(3)] == ["AB12"] * 3
    assert len(reader.votes) == 1


def test_the_log_has_confidences_and_no_text(tmp_path):
    session, _ = fixed_reader("ZX98__")
    image, found = frame_with_plates()
    PlateReader(session, labels=[1], log=tmp_path / "log.jsonl")(image, found)
    text = (tmp_path / "log.jsonl").read_text()
    row = json.loads(text)
    assert "ZX98" not in text and row["length"] == 4 and row["told"] and len(row["confidences"]) == 4


def test_crops_stay_inside():
    image = np.zeros((50, 80, 3), np.uint8)
    crops = crop_plates(image, [[-10, -5, 20, 20], [70, 40, 200, 90], [90, 10, 99, 20], [5, 5, 7, 7]], .1)
    assert [None if c is None else c.shape[:2] for c in crops] == [(22, 23), (15, 23), None, None]


def test_in_a_pipeline():
    from jetson_det.runtime.contract import preset
    from jetson_det.runtime.stream.pipeline import Pipeline
    from jetson_det.runtime.stream.tracker import Tracker
    image, _ = frame_with_plates()

    class Detector:
        contract = preset("yolox", ("plate",), (96, 96))
        confidence = .25
        timings = {}
        def __call__(self, frame): return as_detections([[20, 10, 110, 40]], [.9], [0])

    class Frames:
        name, live, fps = "gate", False, 10.
        def __iter__(self): return ((image, k, 1e9 + k / 10) for k in range(6))
        def close(self): pass
    session, _ = fixed_reader("AB12__")
    results = list(Pipeline(Frames(), Detector(), tracker=Tracker(), reader=PlateReader(session)))
    assert results[-1].texts == ("AB12",) and len(results) == 6


def test_the_block_of_a_pipelines_settings(tmp_path):
    write_graph(tmp_path / "m.onnx", "n", "uint8", [64, 128, 3])
    (tmp_path / "m.json").write_text(json.dumps({"alphabet": "AB_"}))
    reader = read_plates({"ocr": "m.onnx", "classes": ["plate"], "country": "pl", "log": "log.jsonl", "pad": .05},
                         ("car", "plate"), tmp_path)
    assert reader.labels == (1,) and reader.country == "PL" and reader.pad == .05
    assert str(reader.log) == str(tmp_path / "log.jsonl")
    for wrong in ({"ocr": 3}, {"ocr": "m.onnx", "confidence": True}, {}, {"ocr": "m.onnx", "least": 3}, [1]):
        with pytest.raises(InputError): read_plates(wrong, ("plate",), tmp_path)


def test_open_image_models_round_trip():
    "A box put through the letterbox by hand comes back, for any size of frame."
    rng = np.random.RandomState(4)
    for _ in range(50):
        h, w = rng.randint(20, 400, 2)
        box = np.array([.2 * w, .3 * h, .7 * w, .6 * h], np.float32)
        ratio = min(96 / h, 128 / w)
        shift = [(128 - round(w * ratio)) / 2, (96 - round(h * ratio)) / 2] * 2
        row = np.concatenate([[0], box * ratio + shift, [0, .8]])[None]
        found = OpenImageSession(lambda x: row, (96, 128))(np.zeros((h, w, 3), np.uint8))
        assert np.allclose(found.boxes[0], box, atol=1e-2 * max(h, w))
        assert np.allclose(found.boxes[0], box, atol=.01)
    assert len(OpenImageSession(lambda x: np.zeros((0, 7)), (32, 32))(np.zeros((9, 9, 3), np.uint8)).boxes) == 0


@pytest.mark.parametrize("texts", ["keep", "hash", "drop"])
def test_what_leaves(tmp_path, texts):
    session, _ = fixed_reader("AB12__")
    image, found = frame_with_plates()
    rng = np.random.RandomState(0)
    image[10:40, 20:110] = rng.randint(0, 256, (30, 90, 3))
    cv2.imwrite(str(tmp_path / "AB12 gate.png"), image)
    alpr = Alpr(lambda frame: found, PlateReader(session, labels=[1]))
    rules = PrivacyRules(texts, b"k" * 32)
    shown = []
    done = run_alpr(alpr, tmp_path / "AB12 gate.png", tmp_path / "out", rules, lambda name, rows: shown.append(rows))
    rows = json.loads((tmp_path / "out" / "plates.jsonl").read_text())["plates"]
    assert rows == shown[0] and done.images == 1 and done.plates == 3 and done.told == 1
    expected = {"keep": "AB12", "hash": hash_text("AB12", b"k" * 32), "drop": None}[texts]
    assert rows[0].get("text") == expected and ("characters" in rows[0]) == (texts == "keep")
    drawn = draw_plates(image, alpr(image), rules)
    inside = drawn[15:35, 30:100].astype(int)
    assert (np.abs(np.diff(inside, axis=1)).mean() < 20) == (texts != "keep")
    assert len([name for name in os.listdir(str(tmp_path / "out")) if not name.startswith(".")]) == 2


def test_a_run_replaces_its_own_drawings_and_no_others(tmp_path):
    session, _ = fixed_reader("AB12__")
    image, found = frame_with_plates()
    alpr = Alpr(lambda frame: found, PlateReader(session, labels=[1]))
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"): cv2.imwrite(str(tmp_path / "in" / name), image)
    (tmp_path / "in" / "torn.png").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="torn.png"): done = run_alpr(alpr, tmp_path / "in", tmp_path / "out")
    assert done.images == 2 and done.unreadable == ("torn.png",) and "could not be read: torn.png" in str(done)
    (tmp_path / "in" / "torn.png").unlink()
    (tmp_path / "in" / "b.png").unlink()
    run_alpr(alpr, tmp_path / "in", tmp_path / "out")
    left = sorted(name for name in os.listdir(str(tmp_path / "out")) if not name.startswith("."))
    assert left == ["000000_a.jpg", "plates.jsonl"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "plates.jsonl").write_text("mine")
    with pytest.raises(InputError, match="did not write"): run_alpr(alpr, tmp_path / "in", tmp_path / "mine")
    with pytest.raises(InputError, match="holds what is read"): run_alpr(alpr, tmp_path / "in", tmp_path / "in")


def test_a_log_that_cannot_be_written_costs_no_reading(tmp_path):
    session, _ = fixed_reader("AB12__")
    image, found = frame_with_plates()
    (tmp_path / "notes.txt").write_text("name,phone")
    for path, says in ((tmp_path, "is a folder"), (tmp_path / "notes.txt", "something else than JSON lines")):
        with pytest.raises(InputError, match=says): PlateReader(session, log=path)
    log = tmp_path / "new" / "log.jsonl"
    log.parent.mkdir()
    reader = PlateReader(session, labels=[1], log=log)
    log.parent.rmdir()
    alpr = Alpr(lambda frame: found, reader)
    with pytest.warns(UserWarning, match="the log can't be written") as said:
        texts = [alpr(image)[0].text for _ in "ab"]
    assert texts == ["AB12", "AB12"] and len(said) == 1
    log.parent.mkdir()
    alpr(image)
    assert len(log.read_text().splitlines()) >= 1


def test_a_sticker_on_a_vehicle_has_no_vote_in_its_plate():
    "Both have the vehicle's id; the surer one is the plate."
    class Two:
        def __call__(self, crops): return [PlateText("WX407QJ", .9, (.9,) * 7), PlateText("TAXI99", .8, (.8,) * 6)]
    frame = np.zeros((100, 200, 3), np.uint8)
    found = as_detections([[10, 10, 90, 40], [110, 10, 190, 40]], [.9, .5], [0, 0])
    reader = PlateReader(Two())
    for _ in range(3): assert reader(frame, found, np.array([7, 7])) == ("WX407QJ", "TAXI99")
    assert reader.votes.best(7).text == "WX407QJ" and len(reader.votes) == 1
    assert reader(frame, found, np.array([-1, 7])) == ("WX407QJ", "WX407QJ") # no track: its own; else what was voted


def test_a_row_in_words():
    row = {"box": [1.2, 2, 3, 4.6], "score": .9, "confidence": .954, "told": True, "text": "AB12", "countries": ["PT"]}
    assert row_text("a.png", row) == "a.png: AB12 0.95, box 1 2 3 5, PT"
    dropped = {"box": [1, 2, 3, 4], "score": .9, "confidence": .954, "told": False}
    assert row_text("a.png", dropped) == "a.png: a plate 0.95 (doubtful, or not of the country), box 1 2 3 4"
    assert row_text("a.png", dict(dropped, confidence=0.)) == "a.png: not read, box 1 2 3 4"


def test_faults_of_the_command(tmp_path):
    session, _ = fixed_reader("AB12__")
    with pytest.raises(InputError, match="confidence"): PlateReader(session, confidence=2)
    with pytest.raises(InputError, match="country 'QQ'"): PlateReader(session, country="QQ")
    image, found = frame_with_plates()
    cv2.imwrite(str(tmp_path / "a.png"), image)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        run_alpr(Alpr(lambda frame: found, PlateReader(session)), tmp_path / "a.png", tmp_path / "file")


# ---- shared data

def shared(*parts):
    return os.path.join(os.environ["JETSON_DET_DATA"], *parts)


@pytest.mark.data
def test_cct_reads_the_plates_of_plates_eu():
    "101 of 108 labelled boxes: what fast-plate-ocr reads with the same network."
    session = open_ocr(shared("models", "cct_xs_v1_global.onnx"), threads=1)
    folder = shared("datasets", "plates_eu")
    crops = []
    texts = []
    for name in sorted(os.listdir(folder)):
        if not name.endswith(".txt"): continue
        with open(os.path.join(folder, name)) as f: file, x, y, w, h, text = f.read().strip().split("\t")[:6]
        x, y, w, h = int(x), int(y), int(w), int(h)
        crops += crop_plates(cv2.imread(os.path.join(folder, file)), [[x, y, x + w, y + h]])
        texts.append(text)
    found = [r.text for r in session(crops)]
    assert len(texts) == 108 and sum(a == b for a, b in zip(found, texts)) >= 101


LPRNET = ("\u4eac\u6caa\u6d25\u6e1d\u5180\u664b\u8499\u8fbd\u5409\u9ed1\u82cf\u6d59\u7696\u95fd\u8d63\u9c81\u8c6b"
          "\u9102\u6e58\u7ca4\u6842\u743c\u5ddd\u8d35\u4e91\u85cf\u9655\u7518\u9752\u5b81\u65b0"
          "0123456789ABCDEFGHJKLMNPQRSTUVWXYZIO-")  # provinces, digits, letters, blank


def lprnet(torch):
    "LPRNet (arXiv 1806.10447) with the layers' names of its weights; pooling over channels is a stride of channels."
    from torch import nn

    def block(cin, cout):
        c = cout // 4
        layers = nn.Sequential(nn.Conv2d(cin, c, 1), nn.ReLU(), nn.Conv2d(c, c, (3, 1), padding=(1, 0)), nn.ReLU(),
                               nn.Conv2d(c, c, (1, 3), padding=(0, 1)), nn.ReLU(), nn.Conv2d(c, cout, 1))
        named = nn.Module()
        named.block = layers
        named.forward = layers.forward
        return named

    class Pool(nn.Module):
        def __init__(self, every, stride):
            super().__init__()
            self.every = every
            self.pool = nn.MaxPool2d(3, stride)
        def forward(self, x): return self.pool(x[:, ::self.every])

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            n = len(LPRNET)
            self.backbone = nn.Sequential(
                nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), Pool(1, (1, 1)),
                block(64, 128), nn.BatchNorm2d(128), nn.ReLU(), Pool(2, (1, 2)),
                block(64, 256), nn.BatchNorm2d(256), nn.ReLU(),
                block(256, 256), nn.BatchNorm2d(256), nn.ReLU(), Pool(4, (1, 2)), nn.Dropout(),
                nn.Conv2d(64, 256, (1, 4)), nn.BatchNorm2d(256), nn.ReLU(), nn.Dropout(),
                nn.Conv2d(256, n, (13, 1)), nn.BatchNorm2d(n), nn.ReLU())
            self.container = nn.Sequential(nn.Conv2d(448 + n, n, 1))
        def forward(self, x):
            kept = []
            for i, layer in enumerate(self.backbone):
                x = layer(x)
                if i in (2, 6): kept.append(nn.functional.avg_pool2d(x, 5, 5))
                if i == 13: kept.append(nn.functional.avg_pool2d(x, (4, 10), (4, 2)))
                if i == 22: kept.append(x)
            # each image by its own mean square, so that a batch reads what single images do
            kept = [f / (f * f).mean((1, 2, 3), keepdim=True) for f in kept]
            return self.container(torch.cat(kept, 1)).mean(2)
    return Net().eval()


@pytest.mark.data
@pytest.mark.slow
def test_lprnet_reads_chinese_plates(tmp_path):
    "894 of 1000: what its authors' code reads with the same weights."
    torch = pytest.importorskip("torch", reason="torch is not installed for Python 3.6")
    pytest.importorskip("onnx", reason="onnx is not installed")
    net = lprnet(torch)
    net.load_state_dict(torch.load(shared("models", "lprnet_cn.pth"), map_location="cpu", weights_only=True))
    torch.onnx.export(net, torch.zeros(2, 3, 24, 94), str(tmp_path / "lprnet.onnx"), dynamo=False, opset_version=13,
                      input_names=["image"], output_names=["plate"],
                      dynamic_axes={"image": {0: "n"}, "plate": {0: "n"}})
    config = as_plate_config({"alphabet": LPRNET, "pad_char": "-", "decoder": "ctc", "image_color_mode": "bgr",
                              "mean": 127.5, "scale": 1 / 128})
    session = open_ocr(tmp_path / "lprnet.onnx", config, threads=1)
    folder = shared("datasets", "plate_crops_cn")
    names = sorted(name for name in os.listdir(folder) if name.endswith(".jpg"))
    crops = [cv2.imdecode(np.fromfile(os.path.join(folder, name), np.uint8), cv2.IMREAD_COLOR) for name in names]
    found = [r.text for r in session(crops)]
    truth = [name[:-4].split("-")[0].split("_")[0] for name in names]
    assert len(names) == 1000
    assert sum(a == b for a, b in zip(found, truth)) >= 894
    assert [r.text for r in session(crops[:1])] == found[:1]
