"""ONNX files as weights that were damaged, or made to harm: one line each, and the model stays as it was."""
import json
import os
import random
import re
import tempfile
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

import numpy as np  # noqa: E402

from jetson_det.core import InputError  # noqa: E402
from jetson_det.models.graph import trace_onnx  # noqa: E402
from jetson_det.models.weights.load import load_weights  # noqa: E402
from jetson_det.runtime.foreign import names_in_text  # noqa: E402
from jetson_det.models.zoo import create_model  # noqa: E402
from jetson_det.runtime.contract import METADATA_KEY  # noqa: E402
from train_helpers import small_detrs  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ("sack", "person", "truck")
TENSOR = onnx.TensorProto


@pytest.fixture(scope="module")
def whole():
    "The bytes of a good file."
    torch.manual_seed(0)
    return trace_onnx(create_model("yolox-nano", CLASSES).eval(), (64, 64)).SerializeToString()


@pytest.fixture(scope="module")
def model(): return create_model("yolox-nano", CLASSES)


def refused(model, path):
    "The one line with which the file is refused; the model is not touched."
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError) as e: load_weights(model, path)
    for k, v in model.state_dict().items(): assert torch.equal(v, before[k])
    text = str(e.value)
    assert text.isprintable() and len(text) < 700 and str(path) in text
    return text


def harmless(model, path):
    "Either it is read, or it is refused in one line."
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try: load_weights(model, path)
    except InputError as e: assert str(e).isprintable() and len(str(e)) < 700
    finally: model.load_state_dict(before)


def test_cut_files(whole, model, tmp_path):
    path = tmp_path/"a.onnx"
    for n in (0, 1, 10, 100, 1000, len(whole)//2, len(whole) - 1000, len(whole) - 10):
        path.write_bytes(whole[:n])
        assert "torn" in refused(model, path), n


def test_flipped_bytes(whole, model, tmp_path):
    "Some flips change only a number, which nobody can see."
    g = random.Random(0)
    path = tmp_path/"a.onnx"
    # most bytes are weights; the graph is at the beginning and at the end
    for place in [g.randrange(len(whole)) for _ in range(4)] + [g.randrange(20_000) for _ in range(12)]:
        data = bytearray(whole)
        data[place] ^= 1 << g.randrange(8)
        path.write_bytes(data)
        harmless(model, path)


@pytest.mark.parametrize("content", [
    b"", b"\0"*1000, b"not an ONNX file", b"PK\3\4" + b"\0"*100, b"<html>", b"\x08\x01", b"\xff"*1000,
    b'{"graph": {"node": []}}',
])
def test_other_files(model, tmp_path, content):
    (tmp_path/"a.onnx").write_bytes(content)
    refused(model, tmp_path/"a.onnx")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of a POSIX system")
def test_a_pipe_is_not_waited_for(model, tmp_path):
    for suffix in (".onnx", ".pth", ".safetensors"):
        os.mkfifo(tmp_path/("a" + suffix))
        refused(model, tmp_path/("a" + suffix))


# ---- graphs that lie: each function takes the first convolution and the graph -----------------------

def first_conv(graph): return next(n for n in graph.node if n.op_type == "Conv")


def weight_of(graph, k=1):
    name = first_conv(graph).input[k]
    return next(t for t in graph.initializer if t.name == name)


def put(graph, array, k=1):
    "Other numbers for the first convolution's weight (1) or bias (2)."
    tensor = weight_of(graph, k)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def numbers(graph, k=1): return onnx.numpy_helper.to_array(weight_of(graph, k)).copy()


def attribute(graph, name, value):
    node = first_conv(graph)
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    if value is not None: node.attribute.append(onnx.helper.make_attribute(name, value))


def with_value(array, index, value):
    array[index] = value
    return array


def set_dims(graph, dims):
    tensor = weight_of(graph)
    del tensor.dims[:]
    tensor.dims.extend(dims)


def outside(graph, location, **more):
    tensor = weight_of(graph)
    tensor.ClearField("raw_data")
    tensor.data_location = TENSOR.EXTERNAL
    for key, value in {"location": location, **more}.items(): tensor.external_data.add(key=key, value=value)


def fewer_inputs(graph, n):
    node = first_conv(graph)
    kept = list(node.input)[:n]
    del node.input[:]
    node.input.extend(kept)


def without_initializers(graph): del graph.initializer[:]
def without_outputs(graph): del first_conv(graph).output[:]
def bare_identity(graph): graph.node.add(op_type="Identity")
def constant_without_output(graph): graph.node.add(op_type="Constant").attribute.append(
    onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(np.zeros(1, np.float32))))
def norm_without_weights(graph): graph.node.add(op_type="BatchNormalization", input=["x"], output=["y"])
def untyped(graph): weight_of(graph).data_type = TENSOR.UNDEFINED
def unknown_type(graph): weight_of(graph).data_type = 999
def text_weights(graph):
    weight_of(graph).CopyFrom(onnx.helper.make_tensor(weight_of(graph).name, TENSOR.STRING, [1], [b"a"]))
def undefined_attribute(graph): first_conv(graph).attribute.add(name="strides")


GRAPHS = {
    "int64 weights": (lambda g: put(g, numbers(g).astype(np.int64)), "int64, not floats"),
    "int8 weights": (lambda g: put(g, numbers(g).astype(np.int8)), "int8, not floats"),
    "bool weights": (lambda g: put(g, numbers(g) > 0), "bool, not floats"),
    "complex weights": (lambda g: put(g, numbers(g).astype(np.complex64)), "not floats"),
    "text weights": (text_weights, "not floats"),
    "no type": (untyped, "damaged"),
    "an unknown type": (unknown_type, "damaged"),
    "NaN": (lambda g: put(g, with_value(numbers(g), (0, 0, 0, 0), np.nan)), "NaN or inf"),
    "inf in a bias": (lambda g: put(g, with_value(numbers(g, 2), 0, np.inf), 2), "NaN or inf"),
    "3 axes": (lambda g: put(g, numbers(g)[..., 0]), "have the shape"),
    "5 axes": (lambda g: put(g, numbers(g)[..., None]), "have the shape"),
    "no numbers": (lambda g: put(g, numbers(g)[:0]), "have the shape"),
    "a scalar": (lambda g: put(g, np.float32(1)), "have the shape"),
    "a bias too long": (lambda g: put(g, np.zeros(99, np.float32), 2), "have the shape"),
    "a bias with two axes": (lambda g: put(g, np.zeros((16, 1), np.float32), 2), "have the shape"),
    "fewer filters": (lambda g: (put(g, numbers(g)[:-1]), put(g, numbers(g, 2)[:-1], 2)),
                      "not a yolox-nano|have the shape"),
    "huge dims": (lambda g: set_dims(g, [1 << 40, 1 << 40, 3, 3]), "damaged"),
    "negative dims": (lambda g: set_dims(g, [-1, -1, 3, 3]), "damaged"),
    "other dims": (lambda g: set_dims(g, [16, 12, 3, 4]), "damaged"),
    "no initializers": (without_initializers, "computed or missing"),
    "no weight": (lambda g: fewer_inputs(g, 1), "0 weights"),
    "no input": (lambda g: fewer_inputs(g, 0), "0 weights"),
    "four inputs": (lambda g: first_conv(g).input.append(first_conv(g).input[1]), "3 weights"),
    "no output": (without_outputs, "damaged"),
    "strides of text": (lambda g: attribute(g, "strides", "two"), "damaged|stride"),
    "no strides": (lambda g: attribute(g, "strides", [0.5]), "a stride of 0 and 1 groups"),
    "an attribute without a type": (undefined_attribute, "damaged"),
    "groups of text": (lambda g: attribute(g, "group", "one"), "damaged"),
    "other groups": (lambda g: attribute(g, "group", 3), "not a yolox-nano"),
    "an Identity of nothing": (bare_identity, "damaged"),
    "a Constant for nobody": (constant_without_output, "damaged"),
    "a BatchNorm without weights": (norm_without_weights, "0 weights"),
    "control characters in a name": (lambda g: (setattr(first_conv(g), "name", "\x1b[31m\n"), fewer_inputs(g, 1)),
                                     r"\\x1b\[31m"),
    "missing file": (lambda g: outside(g, "a.bin"), "is missing: put it beside"),
    "no location": (lambda g: outside(g, ""), "not opened"),
    "a path above": (lambda g: outside(g, "../secret"), "not opened"),
    "an absolute path": (lambda g: outside(g, "/etc/passwd"), "not opened"),
    "a link out": (lambda g: outside(g, "link"), "not opened"),
    "the folder": (lambda g: outside(g, "."), "not opened"),
    "a folder": (lambda g: outside(g, "folder"), "cannot be read"),
    "a NUL": (lambda g: outside(g, "a\0b"), "not opened"),
    "too short": (lambda g: outside(g, "short"), "damaged"),
    "a length past the end": (lambda g: outside(g, "short", length="6912"), "cut off"),
    "an offset past the end": (lambda g: outside(g, "short", offset="9999", length="6912"), "cut off"),
    "an offset below 0": (lambda g: outside(g, "short", offset="-5"), "cut off"),
    "an offset of text": (lambda g: outside(g, "short", offset="begin"), "not a number"),
    "an offset beyond all files": (lambda g: outside(g, "short", offset="9"*30), "cannot be read|not a number"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_that_lie(whole, model, tmp_path, name):
    change, says = GRAPHS[name]
    (tmp_path/"in").mkdir()
    (tmp_path/"in"/"folder").mkdir()
    (tmp_path/"in"/"short").write_bytes(b"\0"*100)
    (tmp_path/"secret").write_bytes(b"\1"*6912)
    (tmp_path/"in"/"link").symlink_to(tmp_path/"secret")
    file = onnx.load_model_from_string(whole)
    change(file.graph)
    (tmp_path/"in"/"a.onnx").write_bytes(file.SerializeToString())
    text = refused(model, tmp_path/"in"/"a.onnx")
    assert re.search(says, text), text


def test_weights_in_a_file_beside_it(whole, tmp_path):
    file = onnx.load_model_from_string(whole)
    onnx.save(file, str(tmp_path/"a.onnx"), save_as_external_data=True, location="a.data", size_threshold=0)
    (tmp_path/"b.onnx").write_bytes(whole)
    one, two = (create_model("yolox-nano", CLASSES) for _ in range(2))
    load_weights(one, tmp_path/"a.onnx", CLASSES)
    load_weights(two, tmp_path/"b.onnx", CLASSES)
    found = two.state_dict()
    for k, v in one.state_dict().items(): assert torch.equal(v, found[k])


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_weights_of_another_width(whole, tmp_path, kind):
    file = onnx.load_model_from_string(whole)
    for t in file.graph.initializer:
        array = onnx.numpy_helper.to_array(t)
        if array.dtype == np.float32: t.CopyFrom(onnx.numpy_helper.from_array(array.astype(kind), t.name))
    (tmp_path/"a.onnx").write_bytes(file.SerializeToString())
    assert load_weights(create_model("yolox-nano", CLASSES), tmp_path/"a.onnx", CLASSES).carried == CLASSES


# ---- what a stranger says of the file -----------------------------------------------------------------

def deep(n=100_000): return '{"extra": ' + "["*n + "]"*n + "}"


@pytest.mark.parametrize("contract", [
    "", "{", "[]", "5", "null", '"text"', deep(), '{"version": 1}', '{"classes": 5}', "9"*5000, "\ud83d", "[[]]",
    json.dumps({"family": "yolox", "name": "yolox-nano", "classes": ["a"]*80, "input_size": [64, 64],
                "output": "yolox-raw"}),
    json.dumps({"family": 5, "name": [], "classes": {"a": 1}, "input_size": "big", "output": None}),
    json.dumps({"family": "yolox", "name": "yolox-nano", "classes": ["a", "b"], "input_size": [64, 64],
                "output": "yolox-raw"}),
], ids=lambda text: ascii(text[:20]))
def test_damaged_contracts(whole, model, tmp_path, contract):
    file = onnx.load_model_from_string(whole)
    file.metadata_props.add(key=METADATA_KEY, value=contract.encode("utf-8", "replace").decode())
    (tmp_path/"a.onnx").write_bytes(file.SerializeToString())
    refused(model, tmp_path/"a.onnx")


@pytest.mark.parametrize("names", [
    "", "{", "5", "None", "[[[]]]", "{0: {}}", "{0: ['a']}", "["*100_000, "-"*100_000 + "1", "("*1000, "9"*5000,
    "{0: 'a', 'b': 'c'}", "{0: 'a', 0: 'b'}", "__import__('os').abort()", "{0: 'a' + 'b'}", "{0: f'{1}'}", "{0: b'a'}",
    "{0: 'a'", "['a'; 'b']", "{0: ''}", "{99999999999: 'a'}",
], ids=lambda text: ascii(text[:20]))
def test_names_that_are_none(whole, model, tmp_path, names):
    assert names_in_text(names) is None
    file = onnx.load_model_from_string(whole)
    file.metadata_props.add(key="names", value=names)
    (tmp_path/"a.onnx").write_bytes(file.SerializeToString())
    harmless(model, tmp_path/"a.onnx") # read, with classes that start anew


@pytest.mark.parametrize("names", [
    "{0: 'sack', 1: 'person', 2: 'truck'}", "['sack', 'person', 'truck']", "('sack', 'person', 'truck')",
    '["sack", "person", "truck"]', '{"0": "sack", "1": "person", "2": "truck"}',
    "{2: 'truck', 0: 'sack', 1: 'person'}", " { 0 : 'sack',\n 1 : 'person', 2 : 'truck', } ",
])
def test_names_as_files_write_them(whole, tmp_path, names):
    file = onnx.load_model_from_string(whole)
    file.metadata_props.add(key="names", value=names)
    (tmp_path/"a.onnx").write_bytes(file.SerializeToString())
    report = load_weights(create_model("yolox-nano", ("truck", "Sack")), tmp_path/"a.onnx")
    assert (report.carried, report.left) == (("truck", "Sack"), ("person",))


def test_names_with_quotes_and_control_characters():
    assert names_in_text("""{0: "dog's", 1: 'a, b', 2: '{c: [d]}', 3: 'na\\'ive', 4: '\\x1b[31m'}""") == (
        "dog's", "a, b", "{c: [d]}", "na'ive", "\x1b[31m")


# ---- the DETRs, whose graphs are compared with a twin's --------------------------------------------------

@pytest.fixture(scope="module")
def detr():
    "A small model, and a file that our export wrote of it."
    pytest.importorskip("transformers")
    from jetson_det.export.onnx import export_onnx
    from jetson_det.models.detr import sizes
    kept = dict(sizes.SIZES)
    small_detrs()
    torch.manual_seed(0)
    model = create_model("dfine-n", CLASSES).eval()
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, Path(folder)/"a.onnx", (64, 64), simplify=False)
        data = (Path(folder)/"a.onnx").read_bytes()
    yield model, data
    sizes.SIZES.update(kept)


def contract_of(file): return json.loads(next(p.value for p in file.metadata_props if p.key == METADATA_KEY))


def tell(file, **fields):
    "Put other words into the contract."
    for p in file.metadata_props:
        if p.key == METADATA_KEY: p.value = json.dumps({**contract_of(file), **fields})


def set_input(file, h, w):
    for d, size in zip(file.graph.input[0].type.tensor_type.shape.dim[2:], (h, w)): d.dim_value = size


@pytest.mark.parametrize("change, says", [
    pytest.param(lambda f: tell(f, name="rtdetr-r18"), "not a dfine-n: it is a rtdetr-r18; use", id="another model"),
    pytest.param(lambda f: tell(f, name="\x1b[31m\n"), r"it is a \\x1b\[31m", id="control characters"),
    pytest.param(lambda f: tell(f, input_size=[32000, 32000]), "input", id="a size that the graph has not"),
    pytest.param(lambda f: (tell(f, input_size=[8192, 8192]), set_input(f, 8192, 8192)), "larger than",
                 id="a size that no memory has"),
    pytest.param(lambda f: (tell(f, input_size=[50, 50]), set_input(f, 50, 50)), "multiples of 32", id="an odd size"),
    pytest.param(lambda f: f.graph.ClearField("input"), "no input", id="no input"),
    pytest.param(lambda f: f.graph.input[0].type.Clear(), "input", id="an input without a shape"),
    pytest.param(lambda f: f.graph.node[-1].ClearField("output"), "no output", id="a node without an output"),
    pytest.param(lambda f: setattr(f.graph.initializer[0], "data_type", 999), "damaged", id="an unknown type"),
    pytest.param(lambda f: f.ClearField("opset_import"), "dfine-n", id="no opset"),
    pytest.param(lambda f: setattr(f.opset_import[0], "version", 999), "dfine-n", id="an opset of the future"),
    pytest.param(lambda f: f.metadata_props.pop(), "no contract", id="no contract"),
])
def test_detr_graphs_that_lie(detr, tmp_path, change, says):
    model, data = detr
    file = onnx.load_model_from_string(data)
    change(file)
    (tmp_path/"a.onnx").write_bytes(file.SerializeToString())
    text = refused(model, tmp_path/"a.onnx")
    assert re.search(says, text), text
