"""An ONNX file from end to end on ONNX Runtime: ours, and (where there is real data) the official YOLOX-nano."""
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from jetson_det.runtime.geometry import box_iou
from jetson_det.runtime.files import InputError
from jetson_det.runtime.sessions import OnnxSession, Session, open_session

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
COLORS = Path(__file__).parents[1] / "fixtures" / "colors.onnx"


def scene():
    "A blue, a green and a red square on gray."
    frame = np.full((512, 640, 3), 114, np.uint8)
    frame[64:128, 128:192] = (250, 10, 10)
    frame[256:320, 448:512] = (5, 240, 20)
    frame[384:448, 64:128] = (0, 0, 255)
    return frame


def test_frames_lists_and_pieces():
    session = open_session(COLORS, threads=1)
    frame = scene()
    found = session(frame)
    assert session.contract.classes == ("Blue", "Green", "Red") and found.labels.tolist() == [2, 0, 1]
    np.testing.assert_allclose(found.boxes, [[64, 384, 128, 448], [128, 64, 192, 128], [448, 256, 512, 320]], atol=1e-3)
    assert set(session.timings) == {"preprocess", "inference", "postprocess"} and min(session.timings.values()) > 0
    many = session([frame, frame[::2, ::2], frame[..., 0]] * 5)
    assert [len(d.scores) for d in many] == [3, 3, 0] * 5 and session([]) == []
    np.testing.assert_allclose(many[13].boxes * 2, found.boxes, atol=1e-3)
    session.confidence = .9
    session.max_detections = 1
    assert session(frame).labels.tolist() == [2]


def test_a_fixed_batch_is_filled_up():
    inner = open_session(COLORS)
    sizes = []

    def infer(x):
        sizes.append(len(x))
        return inner.infer(x)
    session = Session(inner.contract, infer, batch_size=4)
    assert [len(d.scores) for d in session([scene()] * 5)] == [3] * 5 and sizes == [4, 4]


def test_what_is_refused(tmp_path):
    session = open_session(COLORS)
    (tmp_path / "torn.onnx").write_bytes(COLORS.read_bytes()[:900])
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "text.onnx").write_text("not a model")
    calls = [(lambda: open_session(tmp_path), "needs torch"), (lambda: open_session("a.pt"), "not an artifact"),
             (lambda: open_session(tmp_path/"absent.onnx"), "no such file"),
             (lambda: open_session(tmp_path/"torn.onnx"), "cannot open it"),
             (lambda: open_session(tmp_path/"empty.onnx"), ""),
             (lambda: open_session(tmp_path/"text.onnx"), "cannot open it"),
             (lambda: open_session(COLORS, "yolox"), "2 outputs"),
             (lambda: open_session(COLORS, "yolo9"), "no preset of that name"),
             (lambda: open_session(COLORS, session.contract._replace(input_size=(416, 416))), "[batch, 3, 416, 416]"),
             (lambda: open_session(COLORS, session.contract._replace(classes=("Sack", ))), "1 classes"),
             (lambda: open_session(COLORS, providers=["TensorrtExecutionProvider", "NoSuchProvider"]),
              "is not installed"),
             (lambda: session(np.zeros((3, 3))), "uint8"),
             (lambda: session([scene(), None]), "unreadable file")]
    for call, message in calls:
        with pytest.raises(InputError) as e: call()
        assert message in str(e.value) and "\n" not in str(e.value), str(e.value)


def test_an_answer_that_contradicts_the_contract():
    inner = open_session(COLORS)
    answers = [(lambda x: inner.infer(x)[:1], "1 outputs"),
               (lambda x: inner.infer(x)[::-1], "'boxes' of the graph"),
               (lambda x: [o * np.nan for o in inner.infer(x)], "not finite")]
    for infer, message in answers:
        with pytest.raises(InputError, match=message): Session(inner.contract, infer)(scene())


@pytest.mark.data
def test_official_yolox_nano_on_photographs(data):
    path = data / "models" / "yolox_nano_coco_416.onnx"
    with pytest.raises(InputError, match="--contract"): OnnxSession(path)
    session = OnnxSession(path, "yolox", threads=1)
    bus = session(cv2.imread(str(data / "datasets" / "images" / "bus.jpg")))
    names = [session.contract.classes[l] for l in bus.labels]
    assert names.count("person") >= 3 and names.count("bus") == 1
    assert box_iou(bus.boxes[[names.index("bus")]], np.float32([[15, 230, 805, 740]])).item() > .8


@pytest.mark.data
def test_ultralytics_names_come_from_its_metadata(data):
    path = data / "models" / "yolov8n_coco_640_dynamic_int8.onnx"
    try: session = OnnxSession(path, "ultralytics", threads=1)
    except InputError as e: pytest.skip("this onnxruntime is too old for the file: {:.80}".format(str(e)))
    found = session(cv2.imread(str(data / "datasets" / "images" / "zidane.jpg")))
    assert [session.contract.classes[l] for l in found.labels].count("person") == 2


@pytest.mark.parametrize("name, device, message", [
    ("a.engine", "cpu", "an engine runs on the GPU, not on cpu"), ("a.engine", "gpu", "'gpu' is not known"),
    ("a.tflite", "cuda", "LiteRT runs on the CPU here"), ("a.xml", "cuda:0", "OpenVINO runs on the CPU here"),
    ("a.onnx", "tpu", "it is auto, cpu, cuda or cuda:N"), ("a.engine", "auto", "a.engine"),
    ("a.trt", "auto", "ends in one"),
])
def test_any_artifact_is_opened_by_its_suffix(tmp_path, name, device, message):
    with pytest.raises(InputError) as e: open_session(tmp_path / name, device=device)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_the_device_of_onnx_runtime():
    session = open_session(COLORS, device="cpu", threads=1)
    assert session.ort.get_providers() == ["CPUExecutionProvider"]


def test_an_engine_is_opened_without_onnx_runtime():
    "No circle, and nothing is imported for the others."
    script = ("import sys; from jetson_det.runtime.engine.session import TensorRTSession;"
              "assert 'jetson_det.runtime.sessions' not in sys.modules and 'onnxruntime' not in sys.modules")
    subprocess.run([sys.executable, "-c", script], check=True, cwd=str(Path(__file__).resolve().parents[2]))
