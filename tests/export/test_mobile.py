"export.mobile and runtime.openvino: OpenVINO's pair of files against ONNX Runtime, and what is refused."
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from exported import SIZE, assert_same, scene
from kept import network

from jetson_det.core import InputError
from jetson_det.export.mobile import export_openvino
from jetson_det.export.onnx import export_onnx
from jetson_det.export.targets import export_target
from jetson_det.models.session import torch_session
from jetson_det.runtime.contract import METADATA_KEY
from jetson_det.runtime.openvino import OpenVinoSession, openvino_core, weights_path
from jetson_det.runtime.outputs import is_own_output
from jetson_det.runtime.sessions import open_session

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed: the extra mobile")
pytestmark = pytest.mark.usefixtures("kept_graphs")


@pytest.fixture(scope="module")
def nano(): return network("yolox-nano")


@pytest.fixture(scope="module")
def pair(nano, tmp_path_factory):
    "The .xml file of a network, and the same network as ONNX."
    folder = tmp_path_factory.mktemp("pair")
    contract = export_openvino(nano, folder / "net.xml", input_size=SIZE)
    assert sorted(p.name for p in folder.iterdir()) == ["net.bin", "net.xml"]
    export_onnx(nano, folder / "net.onnx", SIZE, 17)
    return folder / "net.xml", folder / "net.onnx", contract


def copied(pair, folder):
    "The pair again, to be damaged."
    for path in (pair[0], weights_path(pair[0])): (folder / path.name).write_bytes(path.read_bytes())
    return folder / pair[0].name


@needs_openvino
def test_it_finds_what_onnx_runtime_and_torch_find(pair, nano):
    found = OpenVinoSession(pair[0], threads=1)
    onnx = open_session(pair[1], threads=1)
    torch = torch_session(nano, SIZE)
    frames = [scene(k) for k in range(6)]
    assert sum(len(found(frame).scores) for frame in frames) > 20
    for frame in frames:
        assert_same(found(frame), onnx(frame))
        assert_same(found(frame), torch(frame))


@needs_openvino
def test_the_contract_travels_in_the_file(pair):
    contract = OpenVinoSession(pair[0]).contract
    assert contract == pair[2]
    assert contract.parity["compared"].startswith("OpenVINO 20") and contract.parity["frames"] == 3
    assert contract.parity["boxes"] < 1e-3 and contract.extra["openvino"]["precision"] == "fp32"
    assert contract.made_from == open_session(pair[1]).contract.made_from
    assert is_own_output(pair[0])


@needs_openvino
def test_nothing_but_the_pair_is_left_and_it_may_be_replaced(pair, nano, tmp_path):
    path = copied(pair, tmp_path)
    export_openvino(nano, path, "fp16", SIZE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.bin", "net.xml"]
    whole, half = (weights_path(p).stat().st_size for p in (pair[0], path))
    assert .45 < half / whole < .55
    assert_same(OpenVinoSession(tmp_path / "net.xml")(scene(1)), torch_session(nano, SIZE)(scene(1)), 2, .03)


@needs_openvino
def test_bytes_and_an_open_batch(nano, tmp_path):
    contract = export_openvino(nano, tmp_path / "net.xml", None, SIZE, dynamic_batch=True, uint8=True)
    session = OpenVinoSession(tmp_path / "net.xml", threads=1)
    assert (contract.layout, session.batch_size) == ("hwc", None)
    frames = [scene(k) for k in range(3)]
    for together, frame in zip(session(frames), frames): assert_same(together, torch_session(nano, SIZE)(frame))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("yolo11n-p2-lite", "rtdetr-r18")]


@needs_openvino
@pytest.mark.parametrize("name", ["yolo26n", pytest.param("dfine-n", marks=pytest.mark.slow), *SLOW])
def test_other_families(name, tmp_path, monkeypatch):
    model = network(name, monkeypatch.setitem)
    frames = [scene(k, SIZE) for k in range(3)]
    export_openvino(model, tmp_path / "net.xml", input_size=SIZE, frames=frames)
    found = OpenVinoSession(tmp_path / "net.xml", threads=1)
    reference = torch_session(model, SIZE)
    assert len(found(frames[0]).scores)
    assert_same(found(frames[0]), reference(frames[0]), .5, 5e-3)


@needs_openvino
def test_a_wrong_conversion_writes_nothing(nano, tmp_path, monkeypatch):
    class Wrong(OpenVinoSession):
        def _run(self, x): return [v + np.float32(.01) for v in super()._run(x)]
    monkeypatch.setattr("jetson_det.export.mobile.OpenVinoSession", Wrong)
    with pytest.raises(RuntimeError, match="does not compute what ONNX Runtime does.*nothing was written"):
        export_openvino(nano, tmp_path / "net.xml", input_size=SIZE)
    assert not list(tmp_path.iterdir())


@needs_openvino
def test_weights_of_another_export_are_refused(pair, tmp_path):
    path = copied(pair, tmp_path)
    data = bytearray(weights_path(path).read_bytes())
    data[len(data) // 2] ^= 1
    weights_path(path).write_bytes(data)
    with pytest.raises(InputError, match="net.bin is not the file that it was exported with"): OpenVinoSession(path)


@needs_openvino
def test_a_crash_between_the_two_renames_is_found(pair, nano, tmp_path, monkeypatch):
    path = copied(pair, tmp_path)
    replace = os.replace
    def stop_at_the_graph(source, target, *args, **kw):
        if str(target) == str(path): raise KeyboardInterrupt
        return replace(source, target, *args, **kw)
    monkeypatch.setattr("jetson_det.export.mobile.os.replace", stop_at_the_graph)
    with pytest.raises(KeyboardInterrupt): export_openvino(nano, path, "fp16", SIZE)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.bin", "net.xml"]
    with pytest.raises(InputError, match="net.bin|OpenVINO cannot read it"): OpenVinoSession(path)


@needs_openvino
@pytest.mark.parametrize("damage, text", [
    (lambda path: weights_path(path).unlink(), "its weights, net.bin, are not beside it"),
    (lambda path: path.unlink(), "no such file"),
    (lambda path: path.write_bytes(path.read_bytes()[:20_000]), "OpenVINO cannot read it"),
    (lambda path: path.write_bytes(b""), "not a file of OpenVINO"),
    (lambda path: path.write_bytes(bytes(range(256)) * 9), "not a file of OpenVINO"),
    (lambda path: path.write_text(path.read_text().replace(METADATA_KEY, "another.key")),
     "no contract in its metadata"),
    (lambda path: path.write_text(path.read_text().replace("&quot;input_size&quot;", "&quot;input_sizes&quot;")),
     "did you mean 'input_size'"),
    (lambda path: path.write_text(path.read_text().replace("Forklift", "Sack")), "a list of different names"),
])
def test_a_damaged_pair_is_one_line(pair, tmp_path, damage, text):
    path = copied(pair, tmp_path)
    damage(path)
    with pytest.raises(InputError, match=text) as e: OpenVinoSession(path)
    assert "\n" not in str(e.value) and str(path) in str(e.value)


@needs_openvino
def test_a_contract_of_another_size_contradicts_the_graph(pair):
    with pytest.raises(InputError, match="input is 96x160 .height x width.; 64x96 does not fit"):
        OpenVinoSession(pair[0], input_size=(64, 96))
    with pytest.raises(InputError, match="precision 'int8'"): OpenVinoSession(pair[0], precision="int8")
    renamed = OpenVinoSession(pair[0], classes=("Bag", "Human", "Truck"))
    assert renamed.contract.classes == ("Bag", "Human", "Truck")


@needs_openvino
def test_it_believes_of_a_split_what_an_onnx_session_believes(pair, tmp_path):
    "A pattern for groups is a program: it is not taken from a stranger's file."
    from jetson_det.runtime.openvino import load_openvino
    ov = load_openvino()
    model = ov.Core().read_model(str(pair[0]))
    split = dict(val=.2, seed=1, group_by="(a+)+$", digest="d")
    contract = pair[2]._replace(extra=dict(pair[2].extra, split=split))
    model.set_rt_info(contract.to_json(), METADATA_KEY)
    ov.save_model(model, str(tmp_path / "net.xml"), compress_to_fp16=False)
    session = OpenVinoSession(tmp_path / "net.xml")
    assert session.contract.extra["split"] == {"digest": "d", "withheld": True}
    assert any("a pattern for groups" in note for note in session.notes)


@needs_openvino
def test_files_of_others_are_not_replaced(nano, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"other")
    (tmp_path / "b.xml").write_text("<annotation/>")
    with pytest.raises(InputError, match="a.bin: is there already"): export_openvino(nano, tmp_path / "a.xml")
    with pytest.raises(InputError, match="b.xml: is there already"): export_openvino(nano, tmp_path / "b.xml")
    with pytest.raises(InputError, match="ends in .xml"): export_openvino(nano, tmp_path / "c.onnx")
    with pytest.raises(InputError, match="did you mean 'fp16'"): export_openvino(nano, tmp_path / "c.xml", "fp61")
    assert (tmp_path / "a.bin").read_bytes() == b"other"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "b.xml"]


def test_options_of_other_targets_are_refused(tmp_path):
    with pytest.raises(InputError, match=".xml files have no option opset"):
        export_target("openvino").export("ckpt", tmp_path / "a.xml", opset=13)


def test_a_missing_extra_is_one_line(tmp_path, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "openvino"]: monkeypatch.delitem(sys.modules, name)
    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "openvino": raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(InputError, match=r'openvino is needed here .*pip install "jetson_det\[mobile\]"'):
        export_openvino(None, tmp_path / "a.xml")
    assert "openvino_telemetry" not in sys.modules


@needs_openvino
def test_openvino_is_imported_without_its_telemetry():
    code = ("import sys; from jetson_det.runtime.openvino import load_openvino; ov = load_openvino();"
            " print(sorted(m for m in sys.modules if 'telemetry' in m.split('.')[0]), ov.__version__[:2])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "20"]


@needs_openvino
def test_an_operator_that_openvino_does_not_have_is_one_line(pair, tmp_path, monkeypatch):
    import onnx
    def export_with_plugin(source, path, *args, **options):
        graph = onnx.load(pair[1])
        graph.graph.node[3].op_type = "Plugin"
        onnx.save(graph, path)
        return pair[2]
    monkeypatch.setattr("jetson_det.export.mobile.export_onnx", export_with_plugin)
    with pytest.raises(InputError, match="yolox-nano: OpenVINO 20.* cannot convert it: .*Plugin") as e:
        export_openvino(None, tmp_path / "net.xml")
    assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


@needs_openvino
@pytest.mark.data
def test_the_published_yolox_finds_the_same_on_photos(data, tmp_path):
    "A file of another project, opened with a preset."
    import cv2

    from jetson_det.export.golden import parity
    from jetson_det.runtime.openvino import load_openvino
    source = data / "models" / "yolox_nano_coco_416.onnx"
    photos = sorted((data / "datasets" / "images").glob("*.jpg"))
    if not source.is_file() or not photos: pytest.skip(f"{source} or photos beside it are missing")
    ov = load_openvino()
    ov.save_model(openvino_core().read_model(str(source)), str(tmp_path / "nano.xml"), compress_to_fp16=False)
    with pytest.raises(InputError, match="it looks like yolox"): OpenVinoSession(tmp_path / "nano.xml")
    other = OpenVinoSession(tmp_path / "nano.xml", "yolox", threads=1)
    report = parity(open_session(source, "yolox", threads=1), other, [(p.name, cv2.imread(str(p))) for p in photos])
    assert report.detections > 4
    assert report.box_px["max"] < .01 and report.scores["max"] < 1e-4


DROPPED_IN_A_THREAD = """
import gc, os, signal, sys, threading
from jetson_det.runtime.openvino import OpenVinoSession
session = [OpenVinoSession(sys.argv[1], threads=1)]
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
thread = threading.Thread(target=lambda: (session.clear(), gc.collect()))
thread.start()
thread.join()
os.kill(os.getpid(), signal.SIGTERM)
print(len(heard))
"""


@needs_openvino
def test_a_signal_after_the_last_session_was_dropped_in_a_thread(pair):
    "OpenVINO's plugin takes the stack for signals away with it."
    done = subprocess.run([sys.executable, "-c", DROPPED_IN_A_THREAD, str(pair[0])], capture_output=True, text=True,
                          timeout=120)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
