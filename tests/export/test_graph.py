"The reader of ONNX files of strangers: what is sound comes with shapes, what is not is one line."
import faulthandler
import time

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from jetson_det.core import InputError
from jetson_det.export.graph import MAX_FILE_BYTES, read_onnx
from jetson_det.export.lint import lint

FLOAT = TensorProto.FLOAT


def small_model(opset=13):
    "Weights, shape arithmetic, TopK, Resize: what a damaged byte can turn into something else."
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["c"], "conv", pads=[1] * 4),
        helper.make_node("Shape", ["c"], ["s"], "shape"),
        helper.make_node("Gather", ["s", "zero"], ["b"], "gather"),
        helper.make_node("Concat", ["b", "rest"], ["sizes"], "concat", axis=0),
        helper.make_node("Reshape", ["c", "sizes"], ["flat"], "flatten"),
        helper.make_node("TopK", ["flat", "k"], ["best", "index"], "select"),
        helper.make_node("Resize", ["c", "", "scales"], ["up"], "up", mode="nearest"),
        helper.make_node("Expand", ["best", "times"], ["many"], "expand"),
    ]
    weights = [("w", np.ones((2, 3, 3, 3), np.float32)), ("zero", np.array([0])), ("rest", np.array([-1])),
               ("k", np.array([5])), ("scales", np.float32([1, 1, 2, 2])), ("times", np.array([4, 1, 5]))]
    outputs = [helper.make_tensor_value_info(name, FLOAT, None) for name in ("best", "up", "many")]
    inputs = [helper.make_tensor_value_info("images", FLOAT, [1, 3, 16, 16])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(v, k) for k, v in weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def refusal(path):
    "The one line that reading gives, or None."
    try: read_onnx(path)
    except InputError as e:
        assert "\n" not in str(e) and len(str(e)) < 1000
        return str(e)


def save(tmp_path, model, name="m.onnx"):
    path = tmp_path / name
    path.write_bytes(model.SerializeToString())
    return path


def test_shapes_are_those_of_onnxruntime(tmp_path):
    import onnxruntime
    path = save(tmp_path, small_model())
    graph = read_onnx(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(list(graph.outputs), {"images": np.zeros((1, 3, 16, 16), np.float32)})
    assert [graph.shapes[name] for name in graph.outputs] == [value.shape for value in found]
    assert graph.opset == 13 and graph.inputs == ("images",)
    assert graph.producers["flat"].name == "flatten" and [n.name for n in graph.consumers["c"]] == [
        "shape", "flatten", "up"]
    assert graph.constants["w"].sum() == 54


@given(batch=st.integers(1, 64))
def test_an_open_dimension_is_named_and_can_be_set(tmp_path_factory, batch):
    model = small_model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    path = save(tmp_path_factory.mktemp("open"), model)
    graph = read_onnx(path)
    assert graph.shapes["c"] == (None, 2, 16, 16) and graph.open_names["c"] == ("batch",)
    assert read_onnx(path, {"batch": batch}).shapes["up"] == (batch, 2, 32, 32)


@pytest.mark.parametrize("content, words", [
    (b"", "is empty"), (b"PK\x03\x04 zip", "a zip archive"), (b"\x80\x04\x95pickle", "a Python pickle"),
    (b"just some text", "not an ONNX file"), (b"\x08\x08", "has no graph"), (b"<!DOCTYPE html>", "a web page"),
    (b"version https://git-lfs.github.com/spec/v1", "Git LFS")])
def test_what_is_no_onnx(tmp_path, content, words):
    (tmp_path / "m.onnx").write_bytes(content)
    assert words in refusal(tmp_path / "m.onnx")


def test_missing_folder_and_huge(tmp_path):
    assert "cannot be read" in refusal(tmp_path / "none.onnx")
    assert "cannot be read" in refusal(tmp_path)
    with open(tmp_path / "huge.onnx", "wb") as f: f.truncate(MAX_FILE_BYTES + 1)
    assert "larger than 1024 MiB" in refusal(tmp_path / "huge.onnx")


def _dims(model, sizes):
    model.graph.initializer[0].dims[:] = sizes


def _external(model, **entries):
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items(): tensor.external_data.add(key=key, value=str(value))


def _nested(model, depth):
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["y"])], "g", [], [
        helper.make_tensor_value_info("y", FLOAT, None)])
    for _ in range(depth):
        node = helper.make_node("If", ["yes"], ["y"], then_branch=graph, else_branch=graph)
        graph = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("y", FLOAT, None)])
    model.graph.node.extend(graph.node)
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))


def _set(target, **values):
    for key, value in values.items(): setattr(target, key, value)


EDITS = {
    "negative": (lambda m: _dims(m, [-2, 3, 3, 3]), "has the dimension -2"),
    "enormous": (lambda m: _dims(m, [2**40, 3, 3, 3]), "more than"),
    "too few": (lambda m: _dims(m, [2, 3, 3, 4]), "damaged"),
    "type": (lambda m: _set(m.graph.initializer[0], data_type=99), "unknown type 99"),
    "leaves": (lambda m: _external(m, location="../secret"), "not in the folder"),
    "absolute": (lambda m: _external(m, location="/etc/passwd"), "not in the folder"),
    "nowhere": (lambda m: _external(m, location="w.bin"), "is missing"),
    "offset": (lambda m: _external(m, location="w.bin", offset="x"), "not a number"),
    "depth": (lambda m: _nested(m, 10), "graphs within graphs"),
    "ir": (lambda m: _set(m, ir_version=99), "IR version 99"),
    "opset": (lambda m: _set(m.opset_import[0], version=999), "opset 999"),
    "no opset": (lambda m: m.ClearField("opset_import"), "which opset"),
    "unordered": (lambda m: m.graph.node.insert(0, m.graph.node.pop()), "not in order"),
    "circle": (lambda m: m.graph.node[0].input.__setitem__(0, "up"), "circle"),
    "unknown": (lambda m: m.graph.node[0].input.__setitem__(0, "nobody"), "nothing makes"),
    "twice": (lambda m: m.graph.node[1].output.__setitem__(0, "c"), "given twice"),
    "same weights": (lambda m: _set(m.graph.initializer[1], name="w"), "given twice"),
    "output": (lambda m: _set(m.graph.output[0], name="nobody"), "made by nothing"),
    "no outputs": (lambda m: m.graph.ClearField("output"), "no outputs"),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_is_wrong_in_a_graph(tmp_path, name):
    edit, words = EDITS[name]
    model = small_model()
    edit(model)
    assert words in refusal(save(tmp_path, model))


def test_weights_beside_the_file(tmp_path):
    model = small_model()
    data = model.graph.initializer[0].raw_data
    _external(model, location="w.bin", offset=16, length=len(data))
    (tmp_path / "w.bin").write_bytes(bytes(16) + data)
    path = save(tmp_path, model)
    assert np.array_equal(read_onnx(path).constants["w"], np.ones((2, 3, 3, 3)))
    (tmp_path / "w.bin").write_bytes(data)
    assert "cut off" in refusal(path)
    (tmp_path / "w.bin").unlink()
    (tmp_path / "w.bin").symlink_to("/etc/passwd")
    assert "not in the folder" in refusal(path)


def damaged(data, seed):
    "Cut, flipped, overwritten or swapped: one file of each seed."
    rng = np.random.default_rng(seed)
    data = bytearray(data)
    if seed % 10 == 0: return bytes(data[:rng.integers(1, len(data))])
    for _ in range(rng.integers(1, 6)):
        at, other = (int(v) for v in rng.integers(len(data), size=2))
        kind = rng.integers(3)
        if kind == 0: data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1: data[at] = int(rng.integers(256))
        else:
            length = int(rng.integers(1, 40))
            data[at:at + length], data[other:other + length] = data[other:other + length], data[at:at + length]
    return bytes(data)


def test_300_damaged_files(tmp_path):
    "Through the reader and the lint: a result or one line, never anything else, and none takes long."
    faulthandler.enable()
    whole = small_model().SerializeToString()
    path = tmp_path / "m.onnx"
    results = {"read": 0, "refused": 0}
    for seed in range(300):
        path.write_bytes(damaged(whole, seed))
        start = time.perf_counter()
        line = refusal(path)
        try: lint(path)
        except InputError as e: assert "\n" not in str(e)
        else: assert line is None
        results["read" if line is None else "refused"] += 1
        assert time.perf_counter() - start < 5
    assert min(results.values()) > 20, results
