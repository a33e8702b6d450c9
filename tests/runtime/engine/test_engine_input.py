"""What a build refuses before TensorRT is asked: one line each, and nothing is written."""
from types import SimpleNamespace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402

from jetson_det.runtime.contract import METADATA_KEY, preset  # noqa: E402
from jetson_det.runtime.engine.build import build  # noqa: E402
from jetson_det.runtime.files import InputError  # noqa: E402
from jetson_det.runtime.geometry import as_detections  # noqa: E402
from jetson_det.runtime.golden import Golden, golden_image, golden_model, write_golden  # noqa: E402

CONTRACT = preset("yolox", ("Blue", "Red"), (32, 64))._replace(name="colors", output="boxes_scores")


def write(path, contract=CONTRACT, operator="Relu"):
    def value(name, *shape): return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    graph = helper.make_graph([helper.make_node(operator, ["images"], ["boxes"])], "g", [value("images", 1, 3, 32, 64)],
                              [value("boxes", 1, 1, 4), value("scores", 1, 1, 2)])
    model = helper.make_model(graph)
    helper.set_model_props(model, {METADATA_KEY: contract.to_json()})
    onnx.save(model, str(path))
    return path


def stand_in(version):
    "A TensorRT of the kind before 11, as far as it is asked before it builds."
    def of(*names): return SimpleNamespace(**dict.fromkeys(names))
    return SimpleNamespace(
        __version__=version, ICudaEngine=of("num_bindings"), IBuilderConfig=of("int8_calibrator"),
        BuilderFlag=of("FP16", "INT8"), NetworkDefinitionCreationFlag=of("EXPLICIT_BATCH"), DataType=of("FLOAT"),
        IInt8EntropyCalibrator2=of("get_batch"))


NANO = dict(trt=stand_in("8.2.1.8"), cuda=SimpleNamespace(compute_capability=(5, 3), name="NVIDIA Tegra X1"))


def refused(folder, *args, **options):
    "The line; nothing new lies in the folder."
    before = sorted(folder.iterdir())
    with pytest.raises(InputError) as e: build(*args, root=folder / "no-board", **options)
    assert sorted(folder.iterdir()) == before and "\n" not in str(e.value)
    return str(e.value)


def test_before_tensorrt(tmp_path):
    model = write(tmp_path / "colors.onnx")
    (tmp_path / "torn.onnx").write_bytes(model.read_bytes()[:90])
    (tmp_path / "theirs.engine").write_bytes(b"ftrt of somebody")
    (tmp_path / "empty").mkdir()
    for text, options in (
        ("no such file", dict(onnx=tmp_path / "gone.onnx")),
        ("not an ONNX file", dict(onnx=tmp_path / "torn.onnx")),
        ("must end in .engine", dict(engine=tmp_path / "a.plan")),
        ("jetson-det did not write it", dict(engine=tmp_path / "theirs.engine")),
        ("precision 'fp8': it is one of fp32, fp16, int8", dict(precision="fp8")),
        ("batch 0: it is a whole number", dict(batch=0)),
        ("batch True", dict(batch=True)),
        ("workspace 3", dict(workspace=3)),
        ("gone.golden: no such file", dict(golden=tmp_path / "gone.golden")),
        ("not a golden file", dict(golden=model)),
        ("is read here and would be replaced", dict(timing_cache=model)),
        ("empty", dict(calibration=tmp_path / "empty")),
        ("no such file, and no preset", dict(contract="yoloy")),
    ):
        found = refused(tmp_path, **dict(dict(onnx=model, **NANO), **options))
        assert text in found, found


def test_golden_images_of_another_model(tmp_path):
    frame = np.zeros((32, 64, 3), np.uint8)
    other = golden_model(CONTRACT._replace(name="other"))
    images = (golden_image("a", frame, as_detections()),)
    write_golden(tmp_path / "colors.golden", Golden(other, .25, .45, "x", images))
    assert "made for another model" in refused(tmp_path, write(tmp_path / "colors.onnx"), **NANO)


def test_what_is_known_before_it_builds(tmp_path):
    made = dict(board="orin-nano", precision="fp16", workspace=512)
    path = write(tmp_path / "orin.onnx", CONTRACT._replace(extra=dict(tensorrt=made)))
    assert "was exported for Orin Nano 8GB, and this is NVIDIA Tegra X1" in refused(tmp_path, path, **NANO)
    plugin = write(tmp_path / "plugin.onnx", operator="EfficientNMS_TRT")
    assert "returns the scores less 1" in refused(tmp_path, plugin, **NANO)
    assert "TensorRT-For-YOLO-Series#98" in refused(tmp_path, plugin, **NANO)
    yolo26 = write(tmp_path / "yolo26.onnx", CONTRACT._replace(name="yolo26n"), "QuantizeLinear")
    orin = dict(trt=stand_in("10.3.0"), cuda=SimpleNamespace(compute_capability=(8, 7), name="Orin"))
    assert "YOLO26 does not build in INT8" in refused(tmp_path, yolo26, **orin)
