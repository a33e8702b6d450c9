"export.litert and runtime.litert: a .tflite file against ONNX Runtime, what it says of itself, and what is refused."
import io
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from exported import SIZE, assert_same, scene
from kept import network

from jetson_det.core import InputError
from jetson_det.export.litert import export_litert
from jetson_det.export.onnx import export_onnx
from jetson_det.export.targets import export_target
from jetson_det.models.session import torch_session
from jetson_det.runtime.contract import METADATA_KEY, Contract
from jetson_det.runtime.litert import LiteRtSession, read_litert, with_contract
from jetson_det.runtime.outputs import is_own_output
from jetson_det.runtime.sessions import open_session

needs_runtime = pytest.mark.skipif(find_spec("ai_edge_litert") is None,
                                   reason="ai-edge-litert is not installed: the extra mobile")
needs_converter = pytest.mark.skipif(find_spec("litert_torch") is None,
                                     reason="litert-torch is not installed: the extra litert")
# of the page of runtime.litert: its box is fixed, its score is the brightness of the image
LIGHT = Path(__file__).parent.parent / "fixtures" / "light.tflite"
GRAY = np.full((64, 128, 3), 200, np.uint8)


@pytest.fixture
def light(tmp_path):
    "A copy of the fixture, to be damaged."
    (tmp_path / "light.tflite").write_bytes(LIGHT.read_bytes())
    return tmp_path / "light.tflite"


def repacked(path, **texts):
    "The file with other texts behind its model; None: without that one."
    model, known = read_litert(path)
    out = io.BytesIO(model)
    with zipfile.ZipFile(out, "a") as archive:
        for name, text in {**known, **{"jetson_det." + k: v for k, v in texts.items()}}.items():
            if text is not None: archive.writestr(name, text)
    path.write_bytes(out.getvalue())


@needs_runtime
def test_the_toy_runs(light):
    session = LiteRtSession(light, threads=1)
    found = session([GRAY, GRAY[::2, ::2], np.zeros((30, 60, 3), np.uint8)])
    np.testing.assert_allclose(found[0].boxes, [[8, 8, 48, 56]])
    np.testing.assert_allclose(found[0].scores, [200/255], atol=1e-6)
    assert len(found[1].scores) == 1 and not len(found[2].scores)
    assert (session.batch_size, session.engine[:7], is_own_output(light)) == (1, "LiteRT ", True)


def test_the_archive_is_one_that_unzip_reads(light):
    contract = Contract.from_json(zipfile.ZipFile(light).read(METADATA_KEY).decode())
    assert (contract.name, contract.classes) == ("brightness", ("Light",))
    model, texts = read_litert(light)
    assert with_contract(model, contract) == light.read_bytes() # the same bytes from the same parts
    assert sorted(texts) == ["jetson_det.contract", "jetson_det.model_sha256"]


DAMAGES = [
    (lambda p: p.write_bytes(b"TFL3"), "not a LiteRT file"),
    (lambda p: p.write_bytes(b""), "not a LiteRT file"),
    (lambda p: p.unlink(), "no such file"),
    (lambda p: p.write_bytes(p.read_bytes()[:200] + b"\0" + p.read_bytes()[201:]), "altered since its export"),
    (lambda p: repacked(p, model_sha256=None), "altered since its export"),
    (lambda p: repacked(p, model_sha256="0"*64), "altered since its export"),
    (lambda p: repacked(p, contract="{"), "contract in the metadata"),
    (lambda p: p.write_bytes(p.read_bytes().replace(b"jetson_det.contract", b"jetson_det.contrast")),
     "no contract in its metadata"),
    (lambda p: p.write_bytes(p.read_bytes().replace(b'"brightness"', b'"Brightness"')),
     "archive at its end is damaged"),
]


@needs_runtime
@pytest.mark.parametrize("damage, text", DAMAGES)
def test_a_damaged_file_is_one_line(light, damage, text):
    damage(light)
    with pytest.raises(InputError, match=text) as e: LiteRtSession(light)
    assert "\n" not in str(e.value) and str(light) in str(e.value)


@needs_runtime
def test_every_truncation_and_many_flips_are_one_line(light):
    "None opens: LiteRT itself would follow a damaged offset to wherever it leads."
    whole = light.read_bytes()
    rng = np.random.default_rng(0)
    start = len(read_litert(light)[0])
    for size in rng.integers(0, len(whole) - 1, 60):
        light.write_bytes(whole[:size])
        with pytest.raises(InputError): LiteRtSession(light)
    for at in rng.integers(0, start, 60):
        data = bytearray(whole)
        data[at] ^= 1 << int(rng.integers(8))
        light.write_bytes(data)
        with pytest.raises(InputError, match="altered|not a LiteRT"): LiteRtSession(light)


@needs_runtime
def test_a_contract_that_contradicts_the_file(light):
    with pytest.raises(InputError, match="64x64 does not fit"): LiteRtSession(light, input_size=(64, 64))
    own = LiteRtSession(light).contract
    with pytest.raises(InputError, match="light.tflite: .*2 classes"):
        LiteRtSession(light, own._replace(classes=("A", "B")))
    assert LiteRtSession(light, classes=("Lamp",)).contract.classes == ("Lamp",)


def test_a_missing_runtime_is_one_line(light, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "ai_edge_litert"]: monkeypatch.delitem(sys.modules, name)
    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("ai_edge_litert", "litert_torch"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "litert_torch", raising=False)
    with pytest.raises(InputError, match=r'pip install "jetson_det\[mobile\]"'): LiteRtSession(light)
    with pytest.raises(InputError, match=r'litert_torch is needed here .*pip install "jetson_det\[litert\]"'):
        export_litert(None, light.with_name("a.tflite"))


def test_names_and_options_that_do_not_fit(tmp_path):
    with pytest.raises(InputError, match="ends in .tflite"): export_litert(None, tmp_path / "a.onnx")
    (tmp_path / "mine.tflite").write_bytes(b"other")
    with pytest.raises(InputError, match="mine.tflite: is there already"): export_litert(None, tmp_path / "mine.tflite")
    with pytest.raises(InputError, match=".tflite files have no option uint8"):
        export_target("litert").export("ckpt", tmp_path / "a.tflite", uint8=True)


FAMILIES = ["yolox-nano", "yolo11n-p2-lite", "yolo26n", "rtdetr-r18", "rtdetrv2-r18"]


@needs_converter
@needs_runtime
@pytest.mark.slow # half a minute each
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_finds_what_onnx_runtime_finds(name, tmp_path, monkeypatch):
    model = network(name, monkeypatch.setitem)
    frames = [scene(k, SIZE) for k in range(3)]
    contract = export_litert(model, tmp_path / "net.tflite", SIZE, frames=frames)
    assert [p.name for p in tmp_path.iterdir()] == ["net.tflite"]
    session = LiteRtSession(tmp_path / "net.tflite", threads=1)
    assert session.contract == contract and contract.parity["boxes"] < 1e-3 and contract.parity["frames"]
    export_onnx(model, tmp_path / "net.onnx", SIZE, 17, frames=frames)
    reference = open_session(tmp_path / "net.onnx", threads=1)
    assert sum(len(reference(frame).scores) for frame in frames) > 3
    if contract.parity["undecided"]: return # queries that waver: the export has compared what does not
    for frame in frames: assert_same(session(frame), reference(frame), .5, 5e-3)


@needs_converter
@needs_runtime
@pytest.mark.slow
def test_dfine_is_refused_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="dfine-n: what litert-torch makes of it can't be run .*STABLEHLO_SORT") as e:
        export_litert(network("dfine-n", monkeypatch.setitem), tmp_path / "net.tflite", SIZE,
                      frames=[scene(k, SIZE) for k in range(3)])
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_constants_are_folded_and_the_rest_computes_the_same():
    "Positions in float64, as RT-DETR has them, become one stored tensor in float32."
    import torch

    from jetson_det.export.litert import _fold_constants

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.))
        def forward(self, images):
            at = 10000**(torch.arange(4, dtype=torch.float64)/4)
            table = torch.stack([at.sin(), at.cos()]).to(torch.float32)
            return dict(boxes=images*table*self.scale)

    images = torch.rand(3, 2, 4)
    module = torch.export.export(Net(), (), dict(images=images)).module()
    wanted = module(images=images)["boxes"]
    _fold_constants(module)
    assert torch.allclose(module(images=images)["boxes"], wanted, atol=1e-6)
    names = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert len(names) <= 3 and not any("sin" in str(name) or "arange" in str(name) for name in names), names
    assert all(value.dtype == torch.float32 for value in module.state_dict().values())


@needs_converter
@needs_runtime
@pytest.mark.slow
def test_a_fixed_batch_a_wrong_file_and_the_same_bytes(tmp_path, monkeypatch):
    model = network("yolox-nano")
    export_litert(model, tmp_path / "net.tflite", SIZE, batch=2)
    first = (tmp_path / "net.tflite").read_bytes()
    session = LiteRtSession(tmp_path / "net.tflite", threads=1)
    frames = [scene(k) for k in range(3)]
    assert session.batch_size == 2
    for found, frame in zip(session(frames), frames): assert_same(found, torch_session(model, SIZE)(frame))
    export_litert(model, tmp_path / "net.tflite", SIZE, batch=2)
    assert read_litert(tmp_path / "net.tflite")[0] == read_litert_bytes(first, tmp_path)
    class Wrong(LiteRtSession):
        def _run(self, x): return [v + np.float32(.01) for v in super()._run(x)]
    monkeypatch.setattr("jetson_det.export.litert.LiteRtSession", Wrong)
    with pytest.raises(RuntimeError, match="LiteRT .* does not compute what ONNX Runtime does"):
        export_litert(model, tmp_path / "wrong.tflite", SIZE)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("wrong")] == []


def read_litert_bytes(data, folder):
    (folder / "first.tflite").write_bytes(data)
    return read_litert(folder / "first.tflite")[0]
