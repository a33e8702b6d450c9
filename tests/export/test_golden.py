"""export.golden and runtime.golden: an artifact that finds something else is found out, and the report names the fault;
a golden file that is damaged, altered or another model's is refused in one line."""
import json
import zipfile

import numpy as np
import pytest
from exported import SIZE, plugin_reference, scene
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import network

from jetson_det.core import InputError
from jetson_det.data.formats.registry import read_dataset
from jetson_det.evaluate.coco import evaluate
from jetson_det.export.golden import choose_golden, make_golden, parity, parity_exit_code
from jetson_det.export.onnx import export_onnx
from jetson_det.export.ranges import as_fp16
from jetson_det.runtime.geometry import as_detections, box_iou
from jetson_det.runtime.golden import Bounds, compare_golden, compare_image, match_detections, read_golden
from jetson_det.runtime.postprocess import postprocess
from jetson_det.runtime.preprocess import Preprocessor
from jetson_det.runtime.sessions import Session, open_session
from jetson_det.scenes.docks import write_scenes

pytestmark = pytest.mark.usefixtures("one_thread", "kept_graphs")
CONFIDENCE = .3
FRAMES = [(f"scene {k}", scene(k)) for k in range(4)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    "An exported yolox-nano that finds things, and its golden file."
    folder = tmp_path_factory.mktemp("golden")
    path = folder / "net.onnx"
    export_onnx(network("yolox-nano"), path, SIZE, confidence=CONFIDENCE)
    golden = folder / "net.golden"
    make_golden(open_session(path, threads=1), FRAMES, golden)
    return path, golden


@pytest.fixture(scope="module")
def reference(artifact): return open_session(artifact[0], threads=1)


def other(reference, infer, **changes):
    "A session on the same network with something wrong in it."
    contract = reference.contract._replace(**changes)
    return Session(contract, lambda x: infer(*reference.infer(x)))


def test_the_same_artifact_passes(artifact, reference):
    report = parity(artifact[0], artifact[0], FRAMES)
    assert report.ok and report.detections >= 8 and report.pairs >= report.detections
    assert report.box_px["max"] == report.scores["max"] == 0
    assert compare_golden(reference, artifact[1]).box_px["max"] < 1e-3 # the file holds four digits
    assert parity_exit_code(None, artifact[0], artifact[1], write=lambda line: None) == 0


def permuted(boxes, scores): return [boxes, scores[..., [1, 2, 0]]]
def one_lower(boxes, scores): return [boxes, scores - 1]
def not_a_number(boxes, scores): return [boxes, np.where(scores > .5, np.float32(np.nan), scores)]
def moved(boxes, scores): return [boxes + np.float32([0, 17, 0, 17]), scores]
def halved(boxes, scores): return [boxes / 2, scores]
def silent(boxes, scores): return [boxes, scores * 0]
def noisy(boxes, scores):
    rng = np.random.default_rng(0)
    return [rng.permutation(boxes, axis=1), rng.permutation(scores, axis=1)]


@pytest.mark.parametrize(["fault", "message"], [
    (permuted, "another order"), (one_lower, "one too low: EfficientNMS_TRT"), (not_a_number, "not finite"),
    (moved, "moved by 0.0,"), (halved, "0.5 x 0.5 times as large"), (silent, "finds nothing"),
    (noisy, "something else"),
], ids=lambda v: getattr(v, "__name__", ""))
def test_a_fault_is_found_and_named(artifact, reference, fault, message, tmp_path):
    lines = []
    code = parity_exit_code(None, other(reference, fault), artifact[1], tmp_path / "report.json", lines.append)
    assert code == 1
    record = json.loads((tmp_path / "report.json").read_text())
    assert not record["ok"] and message in record["looks_like"]
    assert record["worst"]["image"].startswith("scene ") and "parity fails" in lines[0]


def test_an_input_prepared_in_another_way_is_named(artifact, reference):
    swapped = Session(reference.contract, lambda x: reference.infer(np.ascontiguousarray(x[:, ::-1])))
    assert "blue and red are exchanged" in compare_golden(swapped, artifact[1]).looks_like
    shares = Session(reference.contract._replace(scale=1 / 255), reference.infer)
    assert "0..255 and gets 0..1" in compare_golden(shares, artifact[1]).looks_like
    wants_shares = Session(reference.contract, lambda x: reference.infer(x * 255))
    assert "0..1 and gets 0..255" in compare_golden(wants_shares, artifact[1]).looks_like


def test_duplicates_are_named(artifact, reference):
    "What a plugin without suppression returns: end-to-end rows, each twice, the second a little lower."
    contract = reference.contract
    def infer(x):
        outputs = reference.infer(x)
        h, w = SIZE
        fits = [Preprocessor(contract)([np.zeros((h, w, 3), np.uint8)])[1][0]] * len(x)
        rows = np.zeros((len(x), 400, 6), np.float32)
        for k, d in enumerate(postprocess(contract, outputs, fits, .05)):
            both = np.concatenate([np.c_[d.boxes, d.scores, d.labels], np.c_[d.boxes, d.scores - .01, d.labels]])[:400]
            rows[k, :len(both)] = both
        return [rows]
    twice = Session(contract._replace(output="end2end"), infer)
    report = compare_golden(twice, artifact[1])
    assert not report.ok and report.missing == 0 and "duplicates" in report.looks_like


def test_the_plugin_in_fp16_is_named(artifact, reference):
    "EfficientNMS_TRT before TensorRT 8.4: the right boxes with score - 1."
    contract = reference.contract._replace(output="efficient-nms")
    def infer(x, lower):
        boxes, scores = reference.infer(x)
        rows, _, rest, labels = plugin_reference(boxes[0], scores[0], reference.iou, .01, 200)
        keep = np.arange(200) < rows[0, 0]
        return [rows, _, np.where(keep, rest - lower, 0).astype(np.float32), labels]
    right = compare_golden(Session(contract, lambda x: infer(x, 0)), artifact[1])
    assert right.missing == 0 and right.extra <= 2 # the plugin keeps a second class of a box, the runtime the best
    report = compare_golden(Session(contract, lambda x: infer(x, 1)), artifact[1])
    assert not report.ok and "EfficientNMS_TRT in FP16" in report.looks_like


def test_fp16_is_rounding_and_not_a_fault(artifact):
    path = as_fp16(artifact[0])
    report = parity(artifact[0], path, FRAMES, boxes_px=2)
    assert report.ok and 0 < report.scores["max"] < .02
    tight = parity(artifact[0], path, FRAMES, boxes_px=1e-6, scores=1e-6)
    assert not tight.ok and "rounding" in tight.looks_like


def test_average_precision_is_part_of_the_verdict(reference, tmp_path):
    ds = read_dataset(write_scenes(tmp_path / "docks", 10, (120, 200), seed=1)).split("train")
    names = ("Sack", "Person", "Forklift")
    assert reference.contract.classes == names
    same = parity(reference, reference, ds, count=2)
    assert same.ok and same.ap[0] == same.ap[1] == evaluate(reference, ds, progress=False).stats["AP"]
    boxes_there = {k: ds.boxes_of(k) for k in range(len(ds))}
    def oracle(known): # an engine that knows the answers, but for some of the images
        def infer(x):
            boxes = np.zeros((1, 50, 4), np.float32)
            scores = np.zeros((1, 50, 3), np.float32)
            k = next(k for k in boxes_there if np.array_equal(Preprocessor(reference.contract)([ds.image(k)])[0], x))
            found, labels, _ = boxes_there[k]
            n = len(found)
            _, fits = Preprocessor(reference.contract)([ds.image(k)])
            boxes[0, :n] = fits[0].to_input(found)
            scores[0, np.arange(n), labels] = .9 if k in known else .005 # under what AP counts
            return [boxes, scores]
        return Session(reference.contract._replace(confidence=.25), infer)
    known = set(boxes_there)
    report = parity(oracle(known), oracle(known), ds, count=4)
    assert report.ok and report.ap[0] > .9
    first = choose_golden(ds, SIZE, 1)[0][0]
    broken = parity(oracle(known), oracle({first}), ds, count=1) # the boxes that are compared are right
    assert broken.missing == 0 and not broken.ok and "AP" in broken.failed[0]


def test_a_detection_just_under_the_threshold_is_no_difference():
    ours = as_detections([[0, 0, 20, 20], [40, 40, 60, 60]], [.9, .26], [0, 0])
    just_under = as_detections([[0, 0, 20, 20], [40, 40, 60, 60]], [.9, .23], [0, 0])
    gone = as_detections([[0, 0, 20, 20]], [.9], [0])
    found = compare_image("a", ours, just_under, .25)
    assert not found.missing and not found.extra and len(found.pairs) == 2
    assert compare_image("a", ours, gone, .25).missing == (1,)
    assert compare_image("a", gone, ours, .25).extra == (1,)
    low = as_detections([[0, 0, 20, 20], [40, 40, 60, 60]], [.9, .22], [0, 0])
    assert compare_image("a", gone, low, .25).extra == () # under the threshold on its own side


def test_a_border_of_the_suppression_is_no_difference():
    both = as_detections([[0, 0, 100, 100], [38, 0, 138, 100]], [.9, .8], [0, 0]) # IoU .449
    one = as_detections([[0, 0, 100, 100]], [.9], [0])
    assert compare_image("a", both, one, .25, iou=.45).border == 1
    assert compare_image("a", both, one, .25, iou=.7).missing == (1,)
    copies = as_detections([[0, 0, 100, 100], [0, 0, 100, 100]], [.9, .89], [0, 0])
    assert compare_image("a", one, copies, .25, iou=.45).extra == (1,)


def test_a_tie_of_the_suppression_is_no_difference():
    "Two boxes on one object with nearly the same score: rounding decides which stays."
    everything = as_detections([[0, 0, 100, 100], [0, 0, 120, 100]], [.416, .413], [0, 0])
    first = as_detections([[0, 0, 100, 100]], [.416], [0])
    second = as_detections([[0, 0, 120.2, 100]], [.418], [0])
    fair = compare_image("a", first, second, .25, .45, candidates=everything)
    assert fair.border == 1 and fair.box_px[0] == pytest.approx(.2, abs=1e-4)
    assert compare_image("a", first, second, .25, .45).box_px[0] > 20 # without the candidates nobody can tell
    elsewhere = as_detections([[0, 0, 110, 100]], [.418], [0]) # no candidate lies there
    assert compare_image("a", first, elsewhere, .25, .45, candidates=everything).box_px[0] == 10
    clear = as_detections([[0, 0, 100, 100], [0, 0, 120, 100]], [.8, .413], [0, 0]) # no tie
    apart = compare_image("a", as_detections([[0, 0, 100, 100]], [.8], [0]), second, .25, .45, candidates=clear)
    assert apart.border == 0 and apart.box_px[0] > 20


def drawn(data, n):
    corner = np.array(data.draw(st.lists(st.integers(0, 60), min_size=2 * n, max_size=2 * n)), float).reshape(n, 2)
    side = np.array(data.draw(st.lists(st.integers(4, 40), min_size=2 * n, max_size=2 * n)), float).reshape(n, 2)
    scores = data.draw(st.lists(st.floats(.01, 1), min_size=n, max_size=n))
    labels = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    return as_detections(np.c_[corner, corner + side], scores, labels)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_matching_is_one_to_one(data):
    a, b = (drawn(data, data.draw(st.integers(0, 8))) for _ in range(2))
    pairs = match_detections(a, b)
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
    overlaps = box_iou(a.boxes, b.boxes)
    for i, j in pairs: assert a.labels[i] == b.labels[j] and overlaps[i, j] >= .5
    left_a = set(range(len(a.scores))) - {i for i, _ in pairs}
    left_b = set(range(len(b.scores))) - {j for _, j in pairs}
    assert not any(a.labels[i] == b.labels[j] and overlaps[i, j] >= .5 for i in left_a for j in left_b)
    if len(np.unique(overlaps)) == overlaps.size: # no ties
        assert sorted((j, i) for i, j in pairs) == sorted(match_detections(b, a))


def test_a_large_photo_is_measured_in_pixels_of_the_input():
    ours = as_detections([[0, 0, 2000, 2000]], [.9], [0])
    theirs = as_detections([[0, 0, 2000, 2004]], [.9], [0])
    assert compare_image("a", ours, theirs, .25, scale=.1).box_px.tolist() == pytest.approx([.4])
    assert compare_image("a", ours, theirs, .25, scale=3).box_px.tolist() == pytest.approx([4])


# ---- the file


def test_the_same_golden_file_twice(artifact, reference, tmp_path):
    make_golden(reference, FRAMES, tmp_path / "again.golden")
    assert (tmp_path / "again.golden").read_bytes() == artifact[1].read_bytes()
    golden = read_golden(artifact[1], reference.contract)
    assert [np.array_equal(a.frame, b) for a, (_, b) in zip(golden.images, FRAMES)] == [True] * len(FRAMES)


def test_every_damaged_byte_is_found(artifact, tmp_path):
    "A changed byte gives one line, or leaves all that counts as it was (a date in the zip's directory)."
    whole = artifact[1].read_bytes()
    golden = read_golden(artifact[1])
    rng = np.random.default_rng(0)
    refused = 0
    for at in rng.integers(0, len(whole), 120).tolist() + list(range(len(whole) - 60, len(whole))):
        data = bytearray(whole)
        data[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "bad.golden").write_bytes(data)
        try: found = read_golden(tmp_path / "bad.golden")
        except InputError as e:
            refused += 1
            assert "\n" not in str(e) and "bad.golden" in str(e)
        else: assert [i.png for i in found.images] == [i.png for i in golden.images] and found.model == golden.model
    assert refused > 100
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "bad.golden").write_bytes(whole[:length])
        with pytest.raises(InputError, match="damaged, or not a golden file"): read_golden(tmp_path / "bad.golden")


def rewritten(source, target, change):
    "The golden file with files changed and the zip in order."
    with zipfile.ZipFile(source) as archive: parts = {n: archive.read(n) for n in archive.namelist()}
    change(parts)
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in parts.items(): archive.writestr(name, data)
    return target


def test_an_altered_file_is_refused(artifact, tmp_path):
    def other_score(parts): parts["golden.json"] = parts["golden.json"].replace(b"0.", b"0.0", 3)
    def other_image(parts): parts["00.png"] = parts["01.png"]
    def no_image(parts): del parts["00.png"]
    def no_digest(parts): del parts["golden.sha256"]
    for change, message in ((other_score, "altered: the SHA-256 of golden.json"), (no_image, "00.png is missing"),
                            (other_image, "altered: the SHA-256 of 00.png"), (no_digest, "not a golden file")):
        path = rewritten(artifact[1], tmp_path / "altered.golden", change)
        with pytest.raises(InputError, match=message): read_golden(path)
    with pytest.raises(InputError, match="cannot be read"): read_golden(tmp_path / "nothing.golden")
    with pytest.raises(InputError): read_golden(tmp_path)


def test_another_models_file_is_refused(artifact, reference):
    contract = reference.contract
    for change, message in ((dict(name="yolox-s"), "its name"), (dict(input_size=(96, 192)), "its input_size"),
                            (dict(classes=("Sack", "Person", "Truck")), "its classes")):
        with pytest.raises(InputError, match="made for another model: " + message):
            read_golden(artifact[1], contract._replace(**change))
    read_golden(artifact[1], contract._replace(classes=contract.classes[::-1], output="end2end", confidence=.6))


def test_wrong_calls(artifact, reference):
    with pytest.raises(InputError, match="bound boxes_px is -1"): parity(reference, reference, FRAMES, boxes_px=-1)
    with pytest.raises(InputError, match="bound scores is nan"): Bounds(scores=float("nan")).check()
    with pytest.raises(InputError, match="golden file is needed"): parity(None, reference, FRAMES)
    with pytest.raises(InputError, match="golden files hold"): compare_golden(reference, artifact[1], Bounds(scores=.2))
    with pytest.raises(InputError, match="no images"): make_golden(reference, [])
    blank = Session(reference.contract, lambda x: [v * 0 for v in reference.infer(x)])
    with pytest.raises(InputError, match="finds nothing over 0.3"): make_golden(blank, FRAMES)


def test_images_are_chosen_by_rule(tmp_path):
    ds = read_dataset(write_scenes(tmp_path / "docks", 20, (120, 200), seed=4)).split("train")
    chosen = choose_golden(ds, SIZE, 6, seed=1)
    assert chosen == choose_golden(ds, SIZE, 6, seed=1) and len({i for i, _ in chosen}) == 6
    counts = np.bincount(ds.box_image, minlength=len(ds))
    assert counts[chosen[0][0]] == counts.max() and counts[chosen[1][0]] == counts.min()
    rules = dict((why, i) for i, why in reversed(chosen))
    means = [ds.image(i).mean() for i in range(len(ds))]
    assert "darkest" not in rules or means[rules["darkest"]] == min(means)
    assert len(choose_golden(ds, SIZE, 64)) == len(ds)
    for wrong in (0, 65, True, 2.5):
        with pytest.raises(InputError, match="count is"): choose_golden(ds, SIZE, wrong)
