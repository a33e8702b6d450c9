"""export.calibration: images of the training split alone, spread over classes and scenes; thresholds against ONNX
Runtime's own calibrator, numpy's percentile and a literal search for the least divergence."""
import numpy as np
import onnx
import pytest
from exported import SIZE
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from kept import network
from onnx import TensorProto, helper

from jetson_det.core import InputError
from jetson_det.data.dataset import DetDataset
from jetson_det.data.formats.registry import read_dataset
from jetson_det.export.calibration import _spread, choose_calibration, observe
from jetson_det.export.onnx import export_onnx
from jetson_det.models.thresholds import BINS, METHODS, Histogram, _divergence, count_magnitudes, threshold
from jetson_det.runtime.contract import preset
from jetson_det.scenes.docks import write_scenes

pytestmark = pytest.mark.usefixtures("one_thread")
CONTRACT = preset("yolox", ("Sack", "Person"), (96, 160))


@pytest.fixture(scope="module")
def docks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docks")
    write_scenes(folder / "docks", 20, size=(96, 160), seed=5)
    return read_dataset(folder / "docks")


@st.composite
def datasets(draw):
    "Images of four classes, of which some are rare, in a few scenes."
    n = draw(st.integers(4, 40))
    boxes = draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, 3)), max_size=60))
    boxes.sort()
    groups = draw(st.lists(st.sampled_from(["", "dock 1", "dock 2"]), min_size=n, max_size=n))
    return DetDataset(".", ("a", "b", "c", "d"), [f"{k}.jpg" for k in range(n)], [[10, 10]] * n,
                      [i for i, _ in boxes], [[1, 1, 5, 5]] * len(boxes), [c for _, c in boxes], ["train"] * n, groups)


@given(datasets(), st.integers(0, 3), st.data())
def test_each_class_is_there_and_no_image_twice(ds, seed, data):
    count = data.draw(st.integers(1, len(ds)))
    chosen = _spread(ds, count, seed)
    assert len(set(chosen.tolist())) == len(chosen) == count
    assert (chosen == _spread(ds, count, seed)).all()
    if count >= 5: assert set(ds.subset(chosen).labels.tolist()) == set(ds.labels.tolist())
    if count >= 5 and len(set(ds.box_image.tolist())) < len(ds): # an image without boxes is a class of its own
        assert (np.diff(ds.subset(chosen)._starts) == 0).any()


def test_scenes_take_turns():
    n = 30
    groups = ["first"] * 20 + ["second"] * 5 + ["third"] * 5
    ds = DetDataset(".", ("a",), [f"{k}.jpg" for k in range(n)], [[10, 10]] * n, range(n), [[1, 1, 5, 5]] * n, [0] * n,
                    ["train"] * n, groups)
    assert sorted(ds.subset(_spread(ds, 9, 0)).groups.tolist()) == ["first"] * 3 + ["second"] * 3 + ["third"] * 3


def test_training_images_alone(docks):
    chosen = choose_calibration(docks, CONTRACT, 1000)
    train = docks.split("train")
    assert set(chosen.ds.paths.tolist()) == set(train.paths.tolist()) and chosen.asked == 1000
    assert next(iter(chosen.frames)).shape == (96, 160, 3)


@pytest.mark.parametrize("split", ["val", "test"])
def test_validation_images_are_refused(docks, split):
    with pytest.raises(InputError, match="from the training split alone.*data split"):
        choose_calibration(docks.split(split), CONTRACT)


@pytest.mark.parametrize("count", [0, -1, True, 1.5, "100", 10**6])
def test_count(docks, count):
    with pytest.raises(InputError, match="whole number of images"): choose_calibration(docks, CONTRACT, count)


def test_few_images_are_said(docks):
    text = str(choose_calibration(docks, CONTRACT, 100))
    train = len(docks.split("train"))
    assert f"calibration: {train} training images (100 were asked for), which is few" in text
    assert "asked for" not in str(choose_calibration(docks, CONTRACT, 4))


def test_the_fingerprint_is_of_content_and_preprocessing(tmp_path):
    write_scenes(tmp_path / "docks", 8, size=(96, 160), seed=6)
    ds = read_dataset(tmp_path / "docks")
    chosen = choose_calibration(ds, CONTRACT, 4)
    assert chosen.fingerprint == choose_calibration(ds, CONTRACT._replace(confidence=.9), 4).fingerprint
    for changed in (dict(color="rgb"), dict(scale=1 / 255), dict(pad=0), dict(input_size=(96, 96))):
        assert choose_calibration(ds, CONTRACT._replace(**changed), 4).fingerprint != chosen.fingerprint
    file = chosen.ds.path_of(0)
    file.write_bytes(file.read_bytes() + b"\0")
    assert choose_calibration(ds, CONTRACT, 4).fingerprint != chosen.fingerprint
    file.unlink()
    with pytest.raises(InputError, match="no such image"): choose_calibration(ds, CONTRACT, 4)


def test_magnitudes_are_those_of_onnxruntimes_calibrator(tmp_path):
    from onnxruntime.quantization.calibrate import CalibrationDataReader, MinMaxCalibrater
    export_onnx(network("yolox-nano"), tmp_path / "net.onnx", SIZE)
    model = onnx.load(tmp_path / "net.onnx")
    arrays = [np.random.default_rng(k).uniform(0, 255, (1, 3, *SIZE)).astype(np.float32) for k in range(3)]
    names = [node.input[0] for node in model.graph.node if node.op_type == "Conv"]
    seen = observe(model, names, lambda: iter(arrays), threads=1)

    class Reader(CalibrationDataReader):
        def __init__(self): self.left = [{"images": x} for x in arrays]
        def get_next(self): return self.left.pop() if self.left else None
    calibrator = MinMaxCalibrater(tmp_path / "net.onnx", ["Conv"], tmp_path / "augmented.onnx")
    calibrator.augment_graph()
    calibrator.create_inference_session()
    calibrator.collect_data(Reader())
    theirs = calibrator.compute_data()
    assert len(seen) > 50
    for name, histogram in seen.items():
        low, high = theirs[name].range_value
        assert histogram.largest == pytest.approx(float(max(np.abs(low).max(), np.abs(high).max())), rel=1e-5)
        assert histogram.counts.sum() and threshold(histogram, "minmax") == histogram.largest


VALUES = hnp.arrays(np.float32, st.integers(50, 3000), elements=st.floats(0, 1000, width=32))


@given(VALUES, st.floats(50, 100))
def test_percentile_is_numpys(values, percentile):
    largest = float(values.max())
    if largest <= 1e-12: return
    found = threshold(Histogram(largest, count_magnitudes(values, largest)), "percentile", percentile)
    wanted = float(np.percentile(values, percentile, method="inverted_cdf"))
    assert abs(found - wanted) <= largest / BINS * 1.01 + 1e-6


def literal_divergence(counts, end):
    "The same, number by number."
    inside = [float(c) for c in counts[:end]]
    cut = list(inside)
    cut[-1] += float(sum(counts[end:]))
    told = [0.] * end
    for level in range(128):
        start, stop = level * end // 128, (level + 1) * end // 128
        filled = [k for k in range(start, stop) if inside[k] > 0]
        for k in filled: told[k] = sum(inside[start:stop]) / len(filled)
    if not sum(told): return np.inf
    cut = [c / sum(cut) for c in cut]
    told = [t / sum(told) for t in told]
    return sum(c * np.log(c / max(t, 1e-9)) for c, t in zip(cut, told) if c > 0)


@given(st.integers(0, 1000), st.sampled_from([128, 136, 512, 1000, 2048]))
def test_divergence_is_the_literal_one(seed, end):
    rng = np.random.default_rng(seed)
    counts = (rng.exponential(1, BINS) * (rng.random(BINS) < .4) * 100).round()
    assert _divergence(counts, end) == pytest.approx(literal_divergence(counts, end), rel=1e-9, abs=1e-12)


@given(VALUES, st.sampled_from(METHODS))
def test_a_threshold_is_within_what_was_seen(values, method):
    largest = float(values.max())
    counts = count_magnitudes(values, largest) if largest > 1e-12 else np.zeros(BINS)
    limit = threshold(Histogram(largest, counts), method)
    assert 0 <= limit <= largest * (1 + 1e-6) and (limit > 0) == (largest > 1e-12)


@pytest.mark.parametrize("word, percentile", [("mean", 99.), ("percentile", 0), ("percentile", True), ("minmax", 101)])
def test_wrong_methods(word, percentile):
    with pytest.raises(InputError): threshold(Histogram(1., np.ones(BINS)), word, percentile)


def test_numbers_that_are_not_finite():
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Log", ["x"], ["y"])], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    with pytest.raises(InputError, match="'?y'? is not finite"):
        observe(model, ["y"], lambda: iter([np.float32([0, 1])]))
