"export.coreml: the package's specification and contract, the program that it was made from, and what is refused."
import json
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from exported import SIZE, scene
from kept import network

from jetson_det.core import InputError
from jetson_det.export.coreml import export_coreml
from jetson_det.export.golden import gate
from jetson_det.export.targets import export_target
from jetson_det.runtime.contract import METADATA_KEY, Contract
from jetson_det.runtime.golden import read_golden
from jetson_det.runtime.metadata import coreml_metadata

needs_coremltools = pytest.mark.skipif(find_spec("coremltools") is None,
                                       reason="coremltools is not installed: the extra mobile")
pytestmark = pytest.mark.usefixtures("one_thread", "kept_graphs")


def specification(path):
    import coremltools as ct
    return ct.utils.load_spec(str(path))


@pytest.fixture(scope="module")
def nano(): return network("yolox-nano")


@pytest.fixture(scope="module")
def package(nano, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "net.mlpackage"
    return path, export_coreml(nano, path, input_size=SIZE)


@needs_coremltools
def test_the_specification_says_what_the_contract_says(package):
    path, contract = package
    spec = specification(path)
    assert spec.WhichOneof("Type") == "mlProgram" and spec.specificationVersion == 7 # iOS 16
    (image,) = spec.description.input
    assert image.name == "images" and list(image.type.multiArrayType.shape) == [1, 3, *SIZE]
    shapes = {o.name: list(o.type.multiArrayType.shape) for o in spec.description.output}
    points = sum(SIZE[0]//s*(SIZE[1]//s) for s in (8, 16, 32))
    assert shapes == {"boxes": [1, points, 4], "scores": [1, points, 3]}
    metadata = dict(spec.description.metadata.userDefined)
    assert metadata == coreml_metadata(path) # read with coremltools, and without
    assert Contract.from_json(metadata[METADATA_KEY]) == contract


@needs_coremltools
def test_the_contract_says_what_was_compared_and_that_it_was_not_run(package):
    contract = package[1]
    made = contract.extra["coreml"]
    assert contract.parity is None and made["was_run"] is False
    assert made["onnx_parity"]["boxes"] < 1e-3 and made["program_parity"]["boxes"] < 1e-3
    assert "torch.export" in made["program_parity"]["compared"] and made["program_parity"]["frames"] == 3


@needs_coremltools
def test_all_weights_are_in_the_package(package, nano):
    "In FP32: as many numbers as the network has with its BatchNorms folded, and not one more in a hundred."
    convolutions = sum(p.numel() for name, p in nano.named_parameters() if p.ndim == 4)
    numbers = (package[0] / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size/4
    assert convolutions < numbers < 1.1*convolutions


@needs_coremltools
@pytest.mark.slow
def test_an_export_is_replaced_and_half_as_large_in_fp16(package, nano, tmp_path):
    path = tmp_path / "net.mlpackage"
    shutil.copytree(package[0], path)
    contract = export_coreml(nano, path, "fp16", SIZE, batch=2, confidence=.4)
    assert contract.extra["coreml"]["precision"] == "fp16" and contract.confidence == .4
    assert list(specification(path).description.input[0].type.multiArrayType.shape) == [2, 3, *SIZE]
    weights = "Data/com.apple.CoreML/weights/weight.bin"
    assert .45 < (path / weights).stat().st_size/(package[0] / weights).stat().st_size < .6
    assert [p.name for p in tmp_path.iterdir()] == ["net.mlpackage"]
    assert json.loads(coreml_metadata(path)[METADATA_KEY])["extra"]["coreml"]["precision"] == "fp16"


@needs_coremltools
def test_the_gate_leaves_it_to_the_mac(package, nano, tmp_path):
    frames = [(f"scene {k}", scene(k)) for k in range(3)]
    assert gate(nano, package[0], frames, tmp_path / "net.golden") is None
    golden = read_golden(tmp_path / "net.golden", package[1])
    assert len(golden.images) == 3 and golden.confidence == package[1].confidence


@pytest.mark.slow # converts three times
@needs_coremltools
def test_what_is_not_the_network_writes_nothing(package, nano, tmp_path, monkeypatch):
    from jetson_det.export import coreml
    right = coreml._program_session
    def wrong(*args):
        session = right(*args)
        infer = session.infer
        session.infer = lambda x: [v + np.float32(.01) for v in infer(x)]
        return session
    monkeypatch.setattr(coreml, "_program_session", wrong)
    with pytest.raises(RuntimeError, match="torch.export .* does not compute what ONNX Runtime does"):
        export_coreml(nano, tmp_path / "net.mlpackage", input_size=SIZE)
    monkeypatch.undo()
    monkeypatch.setattr(coreml, "_convert", lambda program, path, *rest: shutil.copytree(package[0], path))
    with pytest.raises(RuntimeError, match="does not hold its contract"):
        export_coreml(nano, tmp_path / "net.mlpackage", input_size=SIZE, confidence=.4)
    with pytest.raises(RuntimeError, match=r"where .*\(2, 3, 96, 160\).* was meant; nothing was written"):
        export_coreml(nano, tmp_path / "net.mlpackage", input_size=SIZE, batch=2)
    assert not list(tmp_path.iterdir())


@needs_coremltools
@pytest.mark.slow # 15 to 40 s each
@pytest.mark.parametrize("name", ["yolo11n-p2-lite", "yolo26n", "rtdetr-r18", "rtdetrv2-r18", "dfine-n"])
def test_other_families(name, tmp_path, monkeypatch):
    model = network(name, monkeypatch.setitem)
    frames = [scene(k, SIZE) for k in range(3)]
    contract = export_coreml(model, tmp_path / "net.mlpackage", input_size=SIZE, frames=frames)
    assert contract.extra["coreml"]["program_parity"]["frames"]
    outputs = specification(tmp_path / "net.mlpackage").description.output
    rows = {o.name: o.type.multiArrayType.shape[1] for o in outputs}
    assert rows["boxes"] == rows["scores"] > 20


def test_what_is_not_ours_stays(tmp_path):
    (tmp_path / "mine.mlpackage").mkdir()
    (tmp_path / "file.mlpackage").write_text("mine")
    for name in ("mine", "file"):
        with pytest.raises(InputError, match="jetson-det did not write it"):
            export_coreml(None, tmp_path / f"{name}.mlpackage")
    with pytest.raises(InputError, match="ends in .mlpackage"): export_coreml(None, tmp_path / "a.onnx")
    with pytest.raises(InputError, match="did you mean 'fp16'"): export_coreml(None, tmp_path / "a.mlpackage", "fp61")
    with pytest.raises(InputError, match=".mlpackage files have no option dynamic batch"):
        export_target("coreml").export("ckpt", tmp_path / "a.mlpackage", dynamic_batch=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.mlpackage", "mine.mlpackage"]


def test_a_missing_extra_is_one_line(tmp_path, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "coremltools"]: monkeypatch.delitem(sys.modules, name)
    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "coremltools": raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(InputError, match=r'coremltools is needed here .*pip install "jetson_det\[mobile\]"'):
        export_coreml(None, tmp_path / "a.mlpackage")


@pytest.mark.parametrize("data", [b"", b"no protobuf", b"\x12\xff\xff\xff\xff\x0f"])
def test_a_damaged_package_is_one_line(tmp_path, data):
    path = tmp_path / "a.mlpackage"
    with pytest.raises(InputError, match="no such file"): coreml_metadata(path)
    spec = path / "Data/com.apple.CoreML/model.mlmodel"
    spec.parent.mkdir(parents=True)
    spec.write_bytes(data)
    try: assert coreml_metadata(path) == {}
    except InputError as e: assert "not a Core ML package" in str(e) and "\n" not in str(e)
