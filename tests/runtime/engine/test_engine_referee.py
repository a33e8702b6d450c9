"""The build's path of TensorRT 11 with a real parser and builder: TensorRT-RTX, of the extra [lint-check], which needs
no GPU. It is as strongly typed as TensorRT 11, and is not a Jetson's TensorRT. Its engines are not run here."""
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from referee import needs_referee  # noqa: E402

from jetson_det.runtime.engine.bindings import api_of, make_logger  # noqa: E402
from jetson_det.runtime.engine.build import (BuildError, BuildOptions, choose_precision, compile_plan,  # noqa: E402
                                             parse_network)
from jetson_det.runtime.engine.onnx_file import read_onnx_file  # noqa: E402
from jetson_det.runtime.files import InputError  # noqa: E402

trt = needs_referee()


def write(path, nodes, dtype=TensorProto.FLOAT, batch=1, weights=(), outputs=("y",)):
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", dtype, [batch, 3, 16, 16])],
        [helper.make_tensor_value_info(name, dtype, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))
    return read_onnx_file(path)


def conv(path, dtype=np.float32, batch=1):
    kind = TensorProto.FLOAT if dtype == np.float32 else TensorProto.FLOAT16
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], "stem"), helper.make_node("Relu", ["c"], ["y"], "act")]
    return write(path, nodes, kind, batch, [("w", np.ones((4, 3, 3, 3), dtype))])


def test_it_is_asked_as_tensorrt_11():
    api = api_of(trt)
    assert api.named_tensors and api.memory_pools and api.progress_monitor
    assert not (api.precision_flags or api.calibrator or api.explicit_batch)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_plan_is_built(tmp_path, dtype):
    file = conv(tmp_path / "a.onnx", dtype)
    number, _ = choose_precision(None, file, None, api_of(trt))
    assert number == ("fp32" if dtype == np.float32 else "fp16")
    steps = []
    made = compile_plan(trt, file, BuildOptions(number, 64, report=lambda *row: steps.append(row)))
    assert bytes(memoryview(made.data)[:4]) and memoryview(made.data).nbytes > 1000
    assert made.inputs == [("x", [1, 3, 16, 16])] and made.outputs == [("y", [1, 4, 14, 14])]
    assert steps and all(0 < done <= total for _, done, total in steps if total)


def test_the_timing_cache_comes_back(tmp_path):
    made = compile_plan(trt, conv(tmp_path / "a.onnx"), BuildOptions("fp32", 64), keeps_timing=True)
    again = compile_plan(trt, conv(tmp_path / "a.onnx"), BuildOptions("fp32", 64, timing_cache=made.timing_cache),
                         keeps_timing=True)
    assert again.lines == [] and memoryview(again.data).nbytes > 1000


def test_an_open_batch_gets_a_profile(tmp_path):
    made = compile_plan(trt, conv(tmp_path / "a.onnx", batch="n"), BuildOptions("fp32", 64, batch=4))
    assert made.inputs == [("x", [-1, 3, 16, 16])]


def test_the_parser_names_the_node(tmp_path):
    nodes = [helper.make_node("Relu", ["x"], ["r"], "act"), helper.make_node("Det", ["r"], ["y"], "the determinant")]
    file = write(tmp_path / "a.onnx", nodes)
    with pytest.raises(InputError) as e: parse_network(trt, file, make_logger(trt))
    assert "the determinant" in str(e.value) and "(Det)" in str(e.value) and "\n" not in str(e.value)


def test_a_build_that_fails_gives_the_reason(tmp_path):
    "NonMaxSuppression parses and does not build."
    boxes = [("b", TensorProto.FLOAT, [1, 50, 4]), ("s", TensorProto.FLOAT, [1, 3, 50])]
    nodes = [helper.make_node("NonMaxSuppression", ["b", "s", "k", "i", "t"], ["o"], "nms")]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info(*row) for row in boxes],
                              [helper.make_tensor_value_info("o", TensorProto.INT64, None)],
                              [numpy_helper.from_array(np.asarray(v), n) for n, v in
                               (("k", np.array([10])), ("i", np.float32([.5])), ("t", np.float32([.1])))])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
              str(tmp_path / "a.onnx"))
    with pytest.raises(BuildError) as e:
        compile_plan(trt, read_onnx_file(tmp_path / "a.onnx"), BuildOptions("fp32", 64))
    assert "could not build it: " in str(e.value) and "has no reason" not in str(e.value)


def test_ctrl_c_ends_a_build(tmp_path):
    def report(*row): raise KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        compile_plan(trt, conv(tmp_path / "a.onnx"), BuildOptions("fp32", 64, report=report))


@pytest.mark.data
def test_a_real_detector_is_built(data):
    file = read_onnx_file(Path(data) / "models" / "yolox_nano_coco_416.onnx")
    made = compile_plan(trt, file, BuildOptions("fp32", 256))
    assert memoryview(made.data).nbytes > 1e6
