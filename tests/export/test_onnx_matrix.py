"""export.onnx: every family, operator set, kind of output and kind of input finds what the checkpoint finds. Boxes
within .1 px, scores within .001."""
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported import CLASSES, FAMILY_NAMES, NEEDS_NO_NMS, SIZE, assert_same, plugin_reference, scene
from kept import network
from train_helpers import each_family

from jetson_det.core import InputError
from jetson_det.export.onnx import export_onnx
from jetson_det.export.rewrite import rewrite_for_fp16
from jetson_det.models.checkpoint import save_checkpoint
from jetson_det.models.graph import operators
from jetson_det.models.session import torch_session
from jetson_det.runtime.postprocess import postprocess
from jetson_det.runtime.preprocess import Preprocessor
from jetson_det.runtime.sessions import open_session

pytestmark = pytest.mark.usefixtures("one_thread", "kept_graphs")
CONFIDENCE = .3
FRAMES = [scene(i) for i in range(3)]


@pytest.fixture(scope="module")
def networks():
    "name -> network, made once."
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        def get(name):
            if name not in made: made[name] = network(name, patch.setitem)
            return made[name]
        yield get


def in_torch(model):
    "What the network finds in the frames."
    session = torch_session(model, SIZE)
    session.confidence = CONFIDENCE
    return session(FRAMES)


def check(path, model, **options):
    "Export, run, compare."
    export_onnx(model, path, SIZE, frames=FRAMES, **options)
    return compare(path, model)


def compare(path, model):
    "Run a file and compare; its contract and its session."
    session = open_session(path, threads=1)
    session.confidence = CONFIDENCE
    wanted = in_torch(model)
    assert sum(len(w.scores) for w in wanted) >= 3 # there is something to compare
    for found, right in zip(session(FRAMES), wanted): assert_same(found, right)
    return session.contract, session


QUICK = { # each value of each option, and each family, at least once
    "yolox-nano": dict(opset=13, output="nms", uint8=True),
    "yolov8n": dict(opset=13, uint8=True, batch=2),
    "yolo11n-p2-lite": dict(opset=19, output="nms", dynamic_batch=True),
    "yolo26n": dict(opset=13),
    "rtdetr-r18": dict(opset=13, uint8=True, rewrites=[rewrite_for_fp16]),
    "rtdetrv2-r18": dict(opset=17, dynamic_batch=True),
    "dfine-n": dict(opset=13, rewrites=[rewrite_for_fp16], batch=2),
}


@pytest.fixture(scope="module")
def quick_files(networks, tmp_path_factory):
    "name -> the file of `QUICK`, made once."
    folder = tmp_path_factory.mktemp("quick")
    def get(name):
        path = folder/f"{name}.onnx"
        if not path.exists(): export_onnx(networks(name), path, SIZE, frames=FRAMES, **QUICK[name])
        return path
    return get


@pytest.mark.parametrize("name", each_family(QUICK))
def test_each_family_finds_the_same(name, networks, quick_files):
    options = QUICK[name]
    path = quick_files(name)
    contract, session = compare(path, networks(name))
    assert contract.opset == options["opset"] == onnx.load(str(path)).opset_import[0].version
    assert contract.layout == ("hwc" if options.get("uint8") else "chw")
    assert session.batch_size == (None if options.get("dynamic_batch") else options.get("batch", 1))
    assert [n.partition(": ")[2] for n in session.notes] == (options.get("output") == "nms")*[
        "NMS is part of the graph: the overlap stays 0.45, scores up to 0.01 are dropped, and an image has 300 boxes at"
        " most"]
    assert "GridSample" not in operators(path)
    assert not {"BatchNormalization", "Identity"} & set(operators(path)) # it is slimmed


MATRIX = [(name, opset, output, uint8, batch)
          for name, opset, output, uint8, batch in itertools.product(
              FAMILY_NAMES, (13, 15, 17, 19), ("raw", "nms"), (False, True), (1, 2, None))
          if not (output == "nms" and name in NEEDS_NO_NMS)]


@pytest.mark.slow
@pytest.mark.parametrize("name", each_family(FAMILY_NAMES))
def test_the_whole_matrix(name, networks, tmp_path):
    for row in MATRIX:
        if row[0] != name: continue
        _, opset, output, uint8, batch = row
        fixed = dict(dynamic_batch=True) if batch is None else dict(batch=batch)
        check(tmp_path/"m.onnx", networks(name), opset=opset, output=output, uint8=uint8, **fixed)


OLD = [name for name, options in QUICK.items() if options["opset"] == 13]
PYTHON36 = Path(__file__).parents[2]/".venv-py36"/"bin"/"python"
RUN36 = """
import json, sys
import numpy as np
import onnxruntime
from jetson_det.runtime.sessions import open_session
assert sys.version_info[:2] == (3, 6) and onnxruntime.__version__.startswith("1.10.")
frames = list(np.load(sys.argv[1]))
for path in sys.argv[2:]:
    session = open_session(path, threads=1)
    session.confidence = %r
    print(json.dumps([[v.tolist() for v in (d.boxes, d.scores, d.labels)] for d in session(frames)]))
""" % CONFIDENCE


@pytest.mark.skipif(not PYTHON36.exists(), reason="no .venv-py36: tools/test_runtime36.sh makes it")
def test_opset_13_runs_on_the_onnx_runtime_of_a_nano(networks, quick_files, tmp_path):
    "A file of each kind of network: NMS in the graph, bytes in, a batch of two, rewritten for FP16."
    from jetson_det.runtime.geometry import Detections
    pytest.importorskip("transformers")
    pytest.importorskip("ultralytics")
    np.save(tmp_path/"frames.npy", np.stack(FRAMES))
    assert len(OLD) == 5
    paths = [str(quick_files(name)) for name in OLD]
    root = Path(__file__).parents[2]
    done = subprocess.run([PYTHON36, "-c", RUN36, str(tmp_path/"frames.npy"), *paths], capture_output=True, text=True,
                          cwd=root, env=dict(os.environ, PYTHONPATH=str(root), LC_ALL="C.UTF-8"))
    assert done.returncode == 0, done.stderr[-2000:]
    for name, line in zip(OLD, done.stdout.splitlines(), strict=True):
        for (boxes, scores, labels), right in zip(json.loads(line), in_torch(networks(name)), strict=True):
            found = Detections(np.float32(boxes).reshape(-1, 4), np.float32(scores), np.int64(labels))
            assert_same(found, right)


@pytest.mark.parametrize("name", ["yolox-nano"])
def test_efficient_nms_is_given_what_the_checkpoint_finds(name, networks, tmp_path):
    "The plugin runs in TensorRT alone: its inputs come from the graph, its work from a reference of its documentation."
    model = networks(name)
    contract = export_onnx(model, tmp_path/"m.onnx", SIZE, output="efficient-nms", max_detections=200)
    assert contract.output == "efficient-nms" and contract.extra["nms"] == dict(iou=.45, confidence=.01,
                                                                                  max_detections=200)
    graph = onnx.load(str(tmp_path/"m.onnx"))
    onnx.checker.check_model(graph)
    shapes = {o.name: [d.dim_value for d in o.type.tensor_type.shape.dim] for o in graph.graph.output}
    assert shapes == dict(num_dets=[1, 1], det_boxes=[1, 200, 4], det_scores=[1, 200], det_classes=[1, 200])
    node = graph.graph.node[-1]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert node.op_type == "EfficientNMS_TRT" and attributes["box_coding"] == 0 and attributes["score_activation"] == 0
    assert attributes["background_class"] == -1 and attributes["plugin_version"] == b"1"

    inputs = list(node.input)
    del graph.graph.node[-1]
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.helper.make_tensor_value_info(i, onnx.TensorProto.FLOAT, None) for i in inputs)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    prepare = Preprocessor(contract)
    for frame, right in zip(FRAMES, in_torch(model)):
        x, fits = prepare([frame])
        boxes, scores = session.run(inputs, {"images": x})
        outputs = plugin_reference(boxes[0], scores[0], attributes["iou_threshold"], attributes["score_threshold"], 200)
        assert_same(postprocess(contract, outputs, fits, CONFIDENCE)[0], right)


def test_the_same_checkpoint_gives_the_same_bytes_in_another_process(networks, tmp_path):
    model = networks("yolox-nano")
    save_checkpoint(tmp_path/"best", model, None, None, {}, model.contract(SIZE))
    options = dict(uint8=True, output="nms")
    export_onnx(tmp_path/"best", tmp_path/"a.onnx", **options)
    code = f"from jetson_det.export.onnx import export_onnx; export_onnx('best', 'b.onnx', **{options!r})"
    root = str(Path(__file__).parents[2])
    env = dict(os.environ, PYTHONPATH=root, PYTHONHASHSEED="7", OMP_NUM_THREADS="2")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=env)
    assert (tmp_path/"a.onnx").read_bytes() == (tmp_path/"b.onnx").read_bytes()


def test_options_that_do_not_fit_are_one_line_and_write_nothing(networks, tmp_path):
    model = networks("yolox-nano")
    for options, text in [
        (dict(opset=12), "opset is 12; it must be 13 to 19"),
        (dict(opset=20), "opset is 20; it must be 13 to 19"),
        (dict(output="nsm"), "output 'nsm': did you mean 'nms'"),
        (dict(batch=0), "batch is 0"),
        (dict(batch=True), "batch is True"),
        (dict(batch=2, dynamic_batch=True), "fixed or open"),
        (dict(output="nms", max_detections=0), "max_detections is 0"),
        (dict(output="nms", nms_confidence=1.5), "confidence is 1.5"),
    ]:
        with pytest.raises(InputError, match=text) as e: export_onnx(model, tmp_path/"m.onnx", SIZE, **options)
        assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", each_family(NEEDS_NO_NMS))
def test_families_without_duplicates_refuse_nms(name, networks, tmp_path):
    for output in ("nms", "efficient-nms"):
        with pytest.raises(InputError, match=f"{name} answers once for each object and needs no NMS"):
            export_onnx(networks(name), tmp_path/"m.onnx", SIZE, output=output)


def test_nms_of_one_class_and_more_rows_than_anchor_points(tmp_path):
    from jetson_det.models.zoo import create_model
    torch.manual_seed(0)
    model = create_model("yolox-nano", CLASSES[:1]).eval()
    contract = export_onnx(model, tmp_path/"m.onnx", (32, 32), output="nms", max_detections=300, nms_confidence=0.)
    session = open_session(tmp_path/"m.onnx", threads=1)
    assert session.ort.get_outputs()[0].shape == [1, 21, 6] # as many as there are anchor points
    session.confidence = 0.
    plain = torch_session(model, (32, 32))
    plain.confidence = 0.
    assert_same(session(FRAMES[0]), plain(FRAMES[0]), score=1e-4)
    assert contract.output == "end2end"


@pytest.mark.parametrize("opset", [13, 16])
def test_sampling_by_look_ups_is_grid_sample(opset):
    "In ONNX Runtime, on random maps and points, in and around the map, to 1e-4."
    import io
    import warnings

    from jetson_det.models.detr.deformable import sample_gather, sample_grid
    class Sampler(torch.nn.Module):
        def forward(self, value, points): return sample_gather(value, points)
    g = torch.Generator().manual_seed(3)
    for n, d, h, w, q, p in [(2, 8, 12, 20, 30, 4), (1, 4, 1, 1, 5, 2), (3, 16, 3, 40, 7, 3)]:
        value = torch.randn(n, d, h, w, generator=g)
        points = torch.rand(n, q, p, 2, generator=g)*1.6 - .3
        points[0, 0, 0] = torch.tensor([0., 1.])
        points[0, 1, 0] = torch.tensor([.5/w, .5/h]) # the middle of the first cell
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(Sampler(), (value, points), file, opset_version=opset, dynamo=False,
                              input_names=["value", "points"])
        session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        found = session.run(None, {"value": value.numpy(), "points": points.numpy()})[0]
        np.testing.assert_allclose(found, sample_grid(value, points), atol=1e-4)
        assert "GridSample" not in operators(onnx.load_from_string(file.getvalue()))
