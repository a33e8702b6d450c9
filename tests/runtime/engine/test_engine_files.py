"""What an engine's files say: read back, held against the package onnx, damaged. Runs under Python 3.6 too, but for
what needs onnx or hypothesis."""
import json
import struct

import numpy as np
import pytest

from jetson_det.runtime.contract import preset
from jetson_det.runtime.engine.bindings import Machine
from jetson_det.runtime.engine.onnx_file import read_onnx_file
from jetson_det.runtime.engine.sidecar import (Sidecar, check_sidecar, read_engine_file, read_sidecar, sidecar_path,
                                               write_sidecar)
from jetson_det.runtime.files import InputError, sha256_bytes

MACHINE = Machine("8.2.1.8", (5, 3), "NVIDIA Tegra X1", "nano", "R32.7.1", "MAXN")
CONTRACT = preset("yolox", ("Sack", "Person"), (416, 416))


def sidecar(**changed):
    row = Sidecar(CONTRACT, MACHINE, "e" * 64, "sacks.onnx", "0" * 64, "fp16", 256, 1, 431.5,
                  "jetson-det build sacks.onnx")
    return row._replace(**changed)


def test_a_sidecar_comes_back(tmp_path):
    for row in (sidecar(), sidecar(parity=dict(ok=False, failed=["3 detections"], looks_like="x")), sidecar(seconds=3)):
        write_sidecar(tmp_path / "a.engine", row)
        assert read_sidecar(tmp_path / "a.engine") == row
    assert read_sidecar(tmp_path / "b.engine") is None


@pytest.mark.parametrize("field", ["engine_sha256", "machine", "contract", "workspace", "parity", "command", "format"])
@pytest.mark.parametrize("value", [None, 3.5, [], {}, "x", [[[]]], -1])
def test_a_damaged_sidecar_is_one_line(tmp_path, field, value):
    path = write_sidecar(tmp_path / "a.engine", sidecar())
    record = json.loads(path.read_text())
    if field == "parity" and value is None: return
    if field in ("engine_sha256", "command") and value == "x": return # a text, and refused when it is compared
    if field == "parity" and value == {}: return # no verdict: not ok
    if field == "workspace" and value == -1: return
    record[field] = value
    path.write_text(json.dumps(record))
    with pytest.raises(InputError) as e: read_sidecar(tmp_path / "a.engine")
    assert "a.engine.json" in str(e.value) and "\n" not in str(e.value)


def test_a_torn_sidecar_is_one_line(tmp_path):
    whole = write_sidecar(tmp_path / "a.engine", sidecar()).read_bytes()
    for size in range(0, len(whole) - 2, 37):
        sidecar_path(tmp_path / "a.engine").write_bytes(whole[:size])
        with pytest.raises(InputError): read_sidecar(tmp_path / "a.engine")


def test_what_does_not_fit_is_refused_with_the_command():
    fits = check_sidecar("a.engine", sidecar(parity=dict(ok=True)), MACHINE, "e" * 64)
    assert fits == []
    cases = [(MACHINE._replace(tensorrt="8.2.0.6"), "e" * 64, {}, "built by TensorRT 8.2.1.8"),
             (MACHINE._replace(compute_capability=(6, 2)), "e" * 64, {}, "compute capability 5.3"),
             (MACHINE, "f" * 64, {}, "SHA-256"), (MACHINE, "e" * 64, {"parity": {}}, "did not find"),
             (MACHINE, "e" * 64, {"parity": dict(ok=False, failed=[])}, "did not find")]
    for machine, digest, changed, text in cases:
        with pytest.raises(InputError) as e: check_sidecar("a.engine", sidecar(**changed), machine, digest)
        assert text in str(e.value) and str(e.value).endswith("build it again, here: jetson-det build sacks.onnx")
    moved = MACHINE._replace(board="nano-2gb", l4t="R32.7.4", power_mode="5W")
    lines = check_sidecar("a.engine", sidecar(parity=dict(ok=True)), moved, "e" * 64)
    assert [line.split(" is ")[0] for line in lines] == [
        "built on board nano, and this", "built on L4T R32.7.1, and this", "built on power mode MAXN, and this"]


def test_engines_of_ultralytics_are_read(tmp_path):
    plan = b"ftrt" + bytes(range(256))
    notes = dict(author="Ultralytics", task="detect", stride=32, imgsz=[640, 640], names={0: "cat", 1: "dog"})
    text = json.dumps(notes).encode()
    path = tmp_path / "theirs.engine"
    path.write_bytes(len(text).to_bytes(4, "little", signed=True) + text + plan)
    found, said, digest = read_engine_file(path)
    assert bytes(found) == plan and said["imgsz"] == "[640, 640]" and digest == sha256_bytes(path.read_bytes())
    from jetson_det.runtime.foreign import foreign_contract
    contract, _ = foreign_contract(None, said, [1, 3, 640, 640], [("output0", [1, 6, 8400])])
    assert contract.classes == ("cat", "dog") and contract.output == "ultralytics"


@pytest.mark.parametrize("head", [b"", b"\x02\0\0\0{", b"\x05\0\0\0{\"a\":", b"\xff\xff\xff\x7f{", b"\x02\0\0\0[]",
                                  struct.pack("<i", 9) + b'{"a": 1}\xff', struct.pack("<i", 2) + b"{}"])
def test_other_heads_are_part_of_the_plan(tmp_path, head):
    path = tmp_path / "a.engine"
    path.write_bytes(head + b"ftrt" + bytes(60))
    plan, notes, _ = read_engine_file(path)
    if head.endswith(b"{}"): assert notes == {} and bytes(plan[:4]) == b"ftrt"
    else: assert notes is None and bytes(plan) == path.read_bytes()


def test_an_empty_engine_is_one_line(tmp_path):
    (tmp_path / "a.engine").write_bytes(b"")
    for name in ("a.engine", "gone.engine"):
        with pytest.raises(InputError): read_engine_file(tmp_path / name)


# the ONNX reader against the package

def _models():
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper
    def value(name, shape): return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    for opset, dtype, extra in ((13, np.float32, []), (17, np.float16, ["QuantizeLinear"]), (11, np.float64, [])):
        weights = [numpy_helper.from_array(np.ones((2, 3, 1, 1), dtype), "w"),
                   helper.make_tensor("f", TensorProto.FLOAT, [3], [1, 2, 3]), # not raw
                   numpy_helper.from_array(np.ones(500, np.int64), "i")]
        nodes = [helper.make_node("Conv", ["x", "w"], ["c"], "stem"), helper.make_node("Relu", ["c"], ["y"])]
        nodes += [helper.make_node(name, ["y", "w"], [name]) for name in extra]
        nodes += [helper.make_node("Own", ["y"], ["z"], "own", domain="me")]
        graph = helper.make_graph(nodes, "g", [value("x", ["n", 3, 8, 8])], [value("y", None)], weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("me", 99), helper.make_opsetid("", opset)],
                                  ir_version=7)
        helper.set_model_props(model, {"key": "Säcke\n人", "empty": "", "names": "{0: 'a'}"})
        yield onnx, model


def test_the_reader_agrees_with_onnx(tmp_path):
    for onnx, model in _models():
        path = tmp_path / "a.onnx"
        onnx.save(model, str(path))
        found = read_onnx_file(path)
        assert found.metadata == {p.key: p.value for p in model.metadata_props}
        assert found.opset == next(o.version for o in model.opset_import if o.domain == "")
        assert [tuple(map(tuple, (n.input, n.output))) + (n.name, n.op_type) for n in model.graph.node] == [
            (n.inputs, n.outputs, n.name, n.operator) for n in found.nodes]
        sizes = {}
        for t in model.graph.initializer: sizes[t.data_type] = sizes.get(t.data_type, 0) + int(np.prod(t.dims))
        assert (found.float_weights, found.half_weights) == (sizes.get(1, 0), sizes.get(10, 0))
        assert found.precision == ("int8" if "QuantizeLinear" in found.operators else "fp32")


def test_the_reader_reads_real_exports(tmp_path):
    "An export of ours: contract, opset and layer norm as the lint sees them."
    pytest.importorskip("onnx")
    pytest.importorskip("torch")
    from jetson_det.export.graph import read_onnx
    from jetson_det.export.lint import graph_features
    from jetson_det.export.onnx import export_onnx
    from jetson_det.models.zoo import create_model
    from jetson_det.runtime.engine.build import features_of
    path = tmp_path / "nano.onnx"
    contract = export_onnx(create_model("yolox-nano", ("Sack",)).eval(), path, (64, 64), 13)
    found = read_onnx_file(path)
    assert found.opset == 13 and found.precision == "fp32" and "jetson_det.contract" in found.metadata
    assert features_of(found, contract) == graph_features(read_onnx(path))


def test_damage_is_one_line(tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st
    wholes = [model.SerializeToString() for _, model in _models()]
    path = tmp_path / "a.onnx"

    @hypothesis.settings(max_examples=300, deadline=None)
    @hypothesis.given(st.sampled_from(wholes), st.data())
    def run(whole, draw):
        data = bytearray(whole)
        for _ in range(draw.draw(st.integers(1, 4))):
            data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
        path.write_bytes(bytes(data[:draw.draw(st.integers(0, len(data)))]))
        try: read_onnx_file(path)
        except InputError as e: assert "\n" not in str(e)
    run()
