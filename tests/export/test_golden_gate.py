"""export.golden's gate: an export that finds what its checkpoint finds passes, whatever its size, input and output; one
that moves boxes or AP does not; the golden file is beside it either way."""
import numpy as np
import onnx
import pytest
from exported import SIZE
from kept import network

from jetson_det.core import InputError
from jetson_det.data.formats.registry import read_dataset
from jetson_det.export.golden import gate, golden_path, parity
from jetson_det.export.onnx import export_onnx
from jetson_det.runtime.golden import read_golden
from jetson_det.runtime.preprocess import Preprocessor
from jetson_det.runtime.sessions import Session, open_session
from jetson_det.scenes.docks import write_scenes

pytestmark = pytest.mark.usefixtures("one_thread", "kept_graphs")
CONFIDENCE = .3


@pytest.fixture(scope="module")
def model(): return network("yolox-nano")


@pytest.fixture(scope="module")
def ds(tmp_path_factory):
    return read_dataset(write_scenes(tmp_path_factory.mktemp("data")/"docks", 12, (120, 200), seed=1)).split("train")


@pytest.fixture(scope="module")
def exported_bytes(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("export")/"m.onnx"
    export_onnx(model, path, SIZE, confidence=CONFIDENCE)
    return path.read_bytes()


@pytest.fixture
def file(exported_bytes, tmp_path):
    "A copy of the export, to be changed."
    (tmp_path/"m.onnx").write_bytes(exported_bytes)
    return tmp_path/"m.onnx"


def changed(path, change):
    "The file with some of its weights changed."
    graph = onnx.load(str(path))
    for t in graph.graph.initializer:
        if t.data_type != onnx.TensorProto.FLOAT: continue
        value = change(t.name, onnx.numpy_helper.to_array(t))
        t.CopyFrom(onnx.numpy_helper.from_array(np.float32(value), t.name))
    kept = [p for p in graph.metadata_props if p.key == "jetson_det.contract"] # not the digest of the right graph
    del graph.metadata_props[:]
    graph.metadata_props.extend(kept)
    onnx.save(graph, str(path))


@pytest.mark.parametrize("options", [{}, dict(uint8=True, output="nms"), dict(batch=2, opset=17)],
                         ids=["raw", "whole", "batch"])
def test_an_export_passes(options, model, ds, tmp_path):
    path = tmp_path/"m.onnx"
    export_onnx(model, path, (64, 128), confidence=CONFIDENCE, **options) # another size than the others of this page
    report = gate(model, path, ds, count=4)
    assert report.ok and report.detections >= 4 and report.box_px["max"] < .5, report
    assert report.ap is not None and abs(report.ap[0] - report.ap[1]) < .005
    golden = read_golden(golden_path(path), open_session(path, threads=1).contract)
    assert len(golden.images) == 4 and golden.confidence == CONFIDENCE and "PyTorch" in golden.reference
    assert parity(None, path, golden_path(path)).ok # what travels to the board


def test_boxes_that_move_do_not_pass(file, model, ds):
    "Each bias of the boxes' last layers a hundredth more: a pixel or so, and AP as good as it was."
    assert gate(model, file, ds, count=4).ok
    shift = lambda name, v: v + .03 if "reg_preds" in name and v.ndim == 1 else v
    changed(file, shift)
    report = gate(model, file, ds, count=4)
    assert not report.ok and any("px" in line for line in report.failed), report.failed
    assert gate(model, file, ds, count=4, boxes_px=30, scores=.05).box_px == report.box_px # the bound is the caller's


def test_ap_that_moves_does_not_pass(model, file, ds, tmp_path):
    "Boxes right on the golden images, and nothing found on the others: AP alone tells."
    session = open_session(file, threads=1)
    gate(model, file, ds, count=1)
    name = read_golden(golden_path(file)).images[0].name
    kept = ds.image(list(map(str, ds.paths)).index(name))
    wanted, _ = Preprocessor(session.contract)([kept])
    def infer(x):
        boxes, scores = session.infer(x)
        right = np.array([np.array_equal(v, wanted[0]) for v in x])
        return [boxes, scores*right[:, None, None].astype(np.float32)]
    report = gate(model, Session(session.contract, infer), ds, tmp_path/"some.golden", count=1, ap=1e-6)
    assert report.missing == 0 and report.box_px["max"] < .5
    assert not report.ok and "AP" in report.failed[0] # random weights have an AP near 0, hence the narrow bound


def test_the_plugins_file_is_left_to_the_board(model, ds, tmp_path):
    export_onnx(model, tmp_path/"m.onnx", SIZE, output="efficient-nms", confidence=CONFIDENCE)
    assert gate(model, tmp_path/"m.onnx", ds, count=3) is None
    assert len(read_golden(tmp_path/"m.golden").images) == 3


def test_a_file_of_somebody_else_stays(file, model, ds, tmp_path):
    (tmp_path/"m.golden").write_text("mine")
    with pytest.raises(InputError, match="m.golden: is there already and is no golden file"): gate(model, file, ds)
    assert (tmp_path/"m.golden").read_text() == "mine"
    with pytest.raises(InputError, match="is the artifact itself"): gate(model, file, ds, path=file)
    session = open_session(file, threads=1)
    with pytest.raises(InputError, match="needs the path of its golden file"): gate(model, session, ds)
    (tmp_path/"m.golden").unlink()
    first = gate(model, file, ds, count=2)
    data = (tmp_path/"m.golden").read_bytes()
    assert gate(model, file, ds, count=2) == first and (tmp_path/"m.golden").read_bytes() == data


def test_a_network_that_finds_nothing_is_no_proof(model, ds, tmp_path):
    file = tmp_path/"m.onnx"
    export_onnx(model, file, SIZE, confidence=.9999)
    with pytest.raises(InputError, match="finds nothing over"):
        gate(model, file, [("gray", np.full((120, 200, 3), 114, np.uint8))], count=1)
