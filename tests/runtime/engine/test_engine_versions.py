"""Our build and session on NVIDIA's real bindings of six versions of TensorRT, and on what 8.2, 8.4 and 8.5 have of
them.

Each version runs in a process of its own (`drive.py`): the classes are the real ones, and an object of a class refuses
what that class does not have, and a call that its binding would not take. What the GPU computes is played by numpy."""
import json
import os
import shutil
import sys
from pathlib import Path

import fake_cuda
import numpy as np
import pytest
from trt_bindings import OLDER, PACKAGES, bindings_folder, run_with_bindings, stub_libraries

onnx = pytest.importorskip("onnx")
cv2 = pytest.importorskip("cv2")
REPO = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
VERSIONS = list(OLDER) + list(PACKAGES)
FRAME = np.full((64, 128, 3), (230, 20, 40), np.uint8)


def write_onnx(path, contract, batch):
    "A network that says how blue, green and red the image is."
    from onnx import TensorProto, helper, numpy_helper
    h, w = contract.input_size
    nodes = [helper.make_node("GlobalAveragePool", ["images"], ["means"], "pool"),
             helper.make_node("Mul", ["means", "step"], ["shares"], "scale"),
             helper.make_node("Reshape", ["shares", "row"], ["scores"], "row"),
             helper.make_node("Slice", ["scores", "from", "to", "axis"], ["one"], "one"),
             helper.make_node("Mul", ["one", "zero"], ["nothing"], "nothing"),
             helper.make_node("Add", ["nothing", "box"], ["boxes"], "boxes")]
    constants = dict(step=np.float32(1 / 255), row=np.int64([0, 1, 3]), zero=np.float32(0), axis=np.int64([2]),
                     box=np.float32([[[8, 4, 24, 28]]]), **{"from": np.int64([0]), "to": np.int64([1])})
    graph = helper.make_graph(
        nodes, "colors", [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, h, w])],
        [helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [batch, 1, 4]),
         helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 1, 3])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    helper.set_model_props(model, {"jetson_det.contract": contract.to_json()})
    onnx.save(model, str(path))
    return path


@pytest.fixture(scope="session")
def libraries(tmp_path_factory): return stub_libraries(tmp_path_factory.mktemp("libraries"))


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    "The files that a build starts from; ONNX Runtime computes the golden answers."
    from jetson_det.runtime.contract import preset
    from jetson_det.runtime.golden import Golden, golden_image, golden_model, write_golden
    from jetson_det.runtime.sessions import OnnxSession
    folder = tmp_path_factory.mktemp("material")
    contract = preset("yolox", ("Blue", "Green", "Red"), (32, 64))._replace(name="colors", output="boxes_scores")
    reference = OnnxSession(write_onnx(folder / "colors.onnx", contract, 1), threads=1)
    write_onnx(folder / "open.onnx", contract, "batch")
    (folder / "images").mkdir()
    images = []
    for k, color in enumerate([(230, 20, 40), (10, 200, 30), (40, 60, 250), (120, 90, 200), (250, 240, 10)]):
        frame = np.full((48, 96, 3), color, np.uint8)
        cv2.imwrite(str(folder / "images" / "{}.png".format(k)), frame)
        images.append(golden_image(str(k), frame, reference(frame)))
    golden = Golden(golden_model(contract), .25, .45, "ONNX Runtime", tuple(images))
    for name in ("colors", "open"): write_golden(folder / (name + ".golden"), golden)
    return folder


def drive(version, material, libraries, tmp_path, python=sys.executable, pythons=None):
    "What `drive.py` found."
    wheel = "8.6.1" if version in OLDER else version
    folder = tmp_path / "work"
    shutil.copytree(str(material), str(folder))
    path = os.pathsep.join([str(REPO), str(REPO / "tests")])
    done = run_with_bindings(wheel, libraries, [HERE / "drive.py", folder, version if version in OLDER else "real"],
                             python, pythons, path)
    assert not done.returncode, done.stderr.decode("utf-8", "replace")[-3000:]
    return json.loads(done.stdout.decode().splitlines()[-1])


@pytest.fixture(scope="session", params=VERSIONS)
def found(request, material, libraries, tmp_path_factory):
    "(version, what its process found)"
    return request.param, drive(request.param, material, libraries, tmp_path_factory.mktemp("drive"))


def at_least(version, *numbers): return tuple(int(part) for part in version.split(".")[:2]) >= numbers


def test_the_api_is_asked(found):
    version, out = found
    names = ["version", "named_tensors", "memory_pools", "precision_flags", "calibrator", "explicit_batch",
             "progress_monitor", "byte_input", "cuda_graphs"]
    api = dict(zip(names, out["api"]))
    is_11 = at_least(version, 11)
    assert api == dict(version=api["version"], named_tensors=at_least(version, 8, 5),
                       memory_pools=at_least(version, 8, 4), precision_flags=not is_11, calibrator=not is_11,
                       explicit_batch=not is_11, progress_monitor=at_least(version, 10),
                       byte_input=at_least(version, 8, 5), cuda_graphs=at_least(version, 8, 6))


def test_a_build_is_compared(found):
    version, out = found
    is_11 = at_least(version, 11)
    assert out["built"]["ok"] and out["built"]["parity"]["images"] == 5 and out["built"]["parity"]["pairs"] >= 5
    assert out["built"]["precision"] == ("fp32" if is_11 else "fp16")
    assert out["flags"] == [0 if is_11 else 1, [] if is_11 else ["FP16"]]
    assert out["workspace"] == 256 << 20
    assert out["cache"].startswith("timing ") and out["second build"] is True
    assert "timing cache cannot be read (cache header is wrong)" in out["wrong cache"]
    assert out["sidecar"][0]["ok"] is True and out["sidecar"][0]["golden"] == "colors.golden"
    assert "parity holds" in out["text"] and "\n" in out["text"]
    assert out["steps"][-1][1:] == [2, 2] if at_least(version, 10) else out["steps"][-1] == ["timing kernels", 2, 3]
    assert out["alive after build"] == 0


def test_a_session_detects(found):
    version, out = found
    boxes, scores, labels = out["found"]
    assert boxes == [[16, 8, 48, 56]] and labels == [0]
    assert np.allclose(scores, 230 / 255, atol=1e-6)
    assert out["many"] == [[0], [2], [0]] and out["made while running"] == 0
    assert out["kinds"] == dict(input=["copied", "mapped", "pinned"], output=["copied", "mapped", "pinned"])
    assert any("input memory: " in note and "measured: copied " in note for note in out["notes"])
    assert [out["memory " + kind] for kind in ("copied", "pinned", "mapped", "managed")] == [[2]] * 4
    assert out["mapped not offered"] == ["copied", "pinned"]
    assert out["input: half"] == out["input: size"] == [[0], [2]]
    assert not at_least(version, 8, 5) or out["input: bytes"] == [[0], [2]]
    assert np.allclose(out["shared"], 230 / 255, atol=1e-6)
    assert out["alive after sessions"] == [0, 0]


def test_an_engine_of_ultralytics(found):
    version, out = found
    assert out["ultralytics"] == [["blue", "red"], [0], [[8, 4, 24, 28]]]


def test_cuda_graphs(found):
    version, out = found
    if not at_least(version, 8, 6):
        assert not any("CUDA graph" in note for note in out["notes"])
        return
    scores, launches = out["graph"]
    assert launches == 1 and np.allclose(scores, 230 / 255, atol=1e-6)
    assert out["graph fails: begin"][0].endswith("no CUDA graph: cuStreamBeginCapture returned 900")
    assert out["graph fails: end"][0].endswith("no CUDA graph: cuStreamEndCapture returned 901")
    assert out["graph fails: begin"][1] == out["graph fails: end"][1] == out["graph of CUDA 10"] == [0]


def test_an_engine_that_answers_wrongly_is_told(found):
    version, out = found
    ok, looks_like, refusal = out["broken"]
    assert ok is False and "one too low" in looks_like
    assert "did not find what the reference found" in refusal and "jetson-det build" in refusal


def test_an_open_batch(found):
    version, out = found
    assert out["profile"] == ["images", [1, 3, 32, 64], [4, 3, 32, 64], [4, 3, 32, 64]]
    assert out["open"] == [None, [[0], [2]] * 3]
    assert (out["open shared"] is None) == at_least(version, 10)


def test_int8_and_types(found):
    version, out = found
    if at_least(version, 11):
        assert "takes the types that the ONNX has" in out["int8"]
        assert "takes the types that the ONNX has" in out["fp16"]
        assert out["calibration"] == []
        return
    assert "has no Q/DQ pairs; quantize it" in out["int8"]
    assert out["calibrated"] is None and out["fp16"] is None
    assert out["calibration flags"] == ["FP16", "INT8"]
    assert out["calibration"] == [[230, 20, 40], [10, 200, 30], [40, 60, 250], [120, 90, 200], [250, 240, 10]]


def test_refusals_are_one_line(found):
    version, out = found
    assert "node mean (ReduceMean): UNSUPPORTED_NODE: Assertion failed: axes" in out["parser"] or (
        not at_least(version, 10) and "node scale (Mul): UNSUPPORTED_NODE" in out["parser"])
    assert out["never"] is False
    assert "was built by TensorRT" in out["other version"] and "jetson-det build colors.onnx" in out["other version"]
    assert "Version tag does not match" in out["other version, no sidecar"]
    assert "nothing is known of its build" in out["no sidecar"][0] and out["no sidecar"][1] == [0]
    for text in ("parser", "other version", "other version, no sidecar"): assert "\n" not in out[text]


def test_each_way_is_taken(found):
    "The names that were asked of the real classes: the way of this version, and not the other."
    version, out = found
    by_number = {"ICudaEngine.num_bindings", "IExecutionContext.execute_async_v2", "ICudaEngine.get_profile_shape"}
    by_name = {"ICudaEngine.num_io_tensors", "IExecutionContext.execute_async_v3", "ICudaEngine.get_tensor_mode",
               "IExecutionContext.set_tensor_address", "IExecutionContext.set_input_shape"}
    taken, other = (by_name, by_number - {"ICudaEngine.num_bindings"})
    if not at_least(version, 8, 5): taken, other = by_number, by_name
    touched = set(out["touched"])
    assert taken <= touched and not other & touched
    assert ("IBuilderConfig.max_workspace_size=" in touched) == (not at_least(version, 8, 4))
    assert ("IBuilderConfig.progress_monitor=" in touched) == at_least(version, 10)
    assert ("IBuilderConfig.int8_calibrator=" in touched) == (not at_least(version, 11))


def test_a_nano(found):
    version, out = found
    if at_least(version, 11): return # TensorRT 11 refuses by the types first
    assert "INT8 silently runs at FP32 speed" in out["nano int8"]
    workspace, name, lines = out["nano"]
    assert (workspace, name) == (256, "nano") and "swapfile" in lines[0]


def test_the_recorder_refuses(libraries):
    "What a class does not have, and what a binding does not take, is refused: else the tests above say nothing."
    text = """
import tensorrt_bindings as real
from trt_bindings import OLDER
from trt_fake_cuda import FakeCuda
from trt_recording import FakeTensorRT, Refused
trt = FakeTensorRT(real, None, {"images": [1, 3, 8, 8]}, {}, {}, OLDER["8.2"][1])
logger = real.Logger()
def refused(call):
    try: call()
    except (Refused, AttributeError) as e: return type(e).__name__
builder = trt.Builder(logger)
config = builder.create_builder_config()
def set_wrong(): config.progress_monitor = 3
print([refused(lambda: trt.Builder()), refused(lambda: trt.MemoryPoolType), refused(lambda: trt.BuilderFlag.FP8),
       refused(lambda: config.set_memory_pool_limit(1, 2)), refused(lambda: config.set_flag("FP16")),
       refused(lambda: config.set_flag(trt.BuilderFlag.FP16, 2)), refused(set_wrong),
       refused(lambda: builder.create_network(flags=1.5)), refused(lambda: builder.nonsense),
       refused(lambda: trt.OnnxParser(config, logger)), refused(lambda: config.set_flag(trt.BuilderFlag.FP16))])
"""
    done = run_with_bindings("8.6.1", libraries, ["-c", text], path=str(REPO / "tests") + os.pathsep + str(REPO))
    assert not done.returncode, done.stderr.decode()
    found = eval(done.stdout.decode())
    assert found == ["Refused", "AttributeError", "AttributeError", "AttributeError", "Refused", "Refused", "Refused",
                     "Refused", "AttributeError", "Refused", None]


@pytest.mark.parametrize("version", ["8.2", "8.6.1"])
def test_under_python36(version, material, libraries, tmp_path):
    python = REPO / ".venv-py36/bin/python"
    if not python.exists(): pytest.skip("no Python 3.6 environment: tools/test_runtime36.sh makes one")
    bindings_folder("8.6.1", "3.6")
    out = drive(version, material, libraries, tmp_path, python, "3.6")
    assert out["built"]["ok"] and out["found"][2] == [0] and out["many"] == [[0], [2], [0]]


def test_no_driver_is_one_line(tmp_path, libraries):
    "Before any trt.Runtime: TensorRT's own may end the process where no driver is."
    text = """
import sys
import tensorrt_bindings
sys.modules["tensorrt"] = tensorrt_bindings
from jetson_det.runtime.engine.session import TensorRTSession
from jetson_det.runtime.files import InputError
open(sys.argv[1], "wb").write(b"ftrt" + bytes(50))
try: TensorRTSession(sys.argv[1])
except InputError as e: print(e)
"""
    done = run_with_bindings("11.4.0.106", libraries, ["-c", text, tmp_path / "a.engine"], path=str(REPO))
    assert not done.returncode, done.stderr.decode()
    assert "no NVIDIA driver here" in done.stdout.decode()


@pytest.mark.parametrize("backend", ["pycuda", "cuda-python"])
def test_on_the_device_memory_of_this_project(backend, material, libraries, tmp_path, request):
    "runtime.engine.cuda over unmodified PyCUDA and cuda-python, and a driver made of malloc; three threads; the exit."
    if backend == "pycuda":
        packages = fake_cuda.needs_pycuda(request.config)
        wanted = [name for path in packages.rglob("_driver*.so") for name in fake_cuda.undefined_symbols(path)]
    else:
        packages = fake_cuda.needs(fake_cuda.installed, *fake_cuda.CUDA_PYTHON)
        wanted = []
    fake_cuda.needs(fake_cuda.make_driver, tmp_path, wanted)
    folder = tmp_path / "work"
    shutil.copytree(str(material), str(folder))
    path = os.pathsep.join([str(packages), str(REPO), str(REPO / "tests"), str(HERE)])
    from jetson_det.runtime.engine.letterbox import LETTERBOX_CU
    names = ("letterbox_float", "letterbox_half", "letterbox_bytes")
    kernels = fake_cuda.needs(fake_cuda.compile_for_cpu, tmp_path, LETTERBOX_CU, names)
    done = run_with_bindings("10.3.0", "{}:{}".format(tmp_path, libraries), [HERE / "drive_cuda.py", folder, kernels],
                             path=path)
    errors = done.stderr.decode("utf-8", "replace")
    assert not done.returncode, errors[-3000:]
    out = json.loads(done.stdout.decode().splitlines()[-1])
    assert out["ok"] and out["threads"] == [True] * 3 and errors == ""
    assert [out[kind] for kind in ("copied", "pinned", "mapped", "managed")] == [[[0], [1], [2]]] * 4
    assert out["letterbox"].startswith("letterbox: ") and "GPU" in out["letterbox"]
    assert out["on GPU"][:2] == ["GPU", "GPU"] and out["on GPU"][2] < 1 / 255
    assert "copied" in out["kinds"] and out["backend"].lower().startswith(backend)
