"runtime.metadata: what an ONNX file says of itself, read as protobuf and onnx read it, whole or damaged."
import random

import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from jetson_det.runtime.contract import METADATA_KEY, preset
from jetson_det.runtime.files import InputError
from jetson_det.runtime.metadata import contract_in, graph_bytes, message_fields, onnx_metadata, read_contract

CONTRACT = preset("yolox", ("Sack", "Person"), (96, 160))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def model(texts, weights=4):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [weights])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [weights])
    w = helper.make_tensor("w", TensorProto.FLOAT, [weights], [.5]*weights)
    made = helper.make_model(helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [w]),
                             producer_name="someone", doc_string="a toy")
    for key, text in texts: made.metadata_props.add(key=key, value=text)
    return made


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=5), st.integers(1, 200))
def test_metadata_is_what_onnx_says(tmp_path_factory, texts, weights):
    path = tmp_path_factory.mktemp("m") / "m.onnx"
    made = model(texts, weights)
    onnx.save(made, str(path))
    assert onnx_metadata(path) == {p.key: p.value for p in made.metadata_props} == dict(texts)
    assert graph_bytes(path.read_bytes()) == made.graph.SerializeToString()


@settings(max_examples=60, deadline=None)
@given(st.integers(-2**63, 2**63 - 1), st.integers(0, 2**31 - 1), st.binary(max_size=300))
def test_fields_are_those_of_protobuf(number, small, text):
    "TensorProto has numbers, texts and packed arrays; a negative number takes ten bytes."
    tensor = onnx.TensorProto(dims=[number], data_type=small, raw_data=text, name="n")
    tensor.float_data.append(1.5)
    tensor.double_data.append(2.5)
    fields = {}
    for key, value in message_fields(tensor.SerializeToString()): fields.setdefault(key, value)
    assert fields[2] == small and bytes(fields[9] if text else b"") == text and bytes(fields[8]) == b"n"
    assert fields[1] % (1 << 64) == number % (1 << 64)


def test_damaged_files_are_one_line_or_read_alike(tmp_path):
    "A flip may leave a file that is right in another way; then protobuf's own reader agrees."
    whole = model([(METADATA_KEY, CONTRACT.to_json()), ("author", "J\u00fcrgen")]).SerializeToString()
    draw = random.Random(0)
    path = tmp_path / "m.onnx"
    damaged = [whole[:draw.randrange(len(whole))] for _ in range(100)]
    for _ in range(300):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        damaged.append(bytes(data))
    failed = 0
    for data in damaged:
        path.write_bytes(data)
        try: texts = onnx_metadata(path)
        except InputError as e:
            failed += 1
            assert "\n" not in str(e) and str(path) in str(e)
            continue
        try: read = onnx.load_from_string(data)
        except Exception: continue # protobuf looks into the graph, too
        assert texts == {p.key: p.value for p in read.metadata_props}
    assert 100 < failed < 400


def test_what_is_no_file(tmp_path):
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "folder.onnx").mkdir()
    for name, text in (("empty", "not an ONNX file"), ("gone", "no such file"), ("folder", "no such file")):
        with pytest.raises(InputError, match=text): onnx_metadata(tmp_path / f"{name}.onnx")


def test_a_contract_is_read_as_it_stands(tmp_path):
    "Also what a session would not believe: it may have to be written again."
    own = CONTRACT._replace(extra=dict(split=dict(val=.2, group_by="(a+)+$")))
    onnx.save(model([(METADATA_KEY, own.to_json())]), str(tmp_path / "own.onnx"))
    assert read_contract(tmp_path / "own.onnx") == own
    onnx.save(model([("author", "x")]), str(tmp_path / "bare.onnx"))
    assert contract_in(onnx_metadata(tmp_path / "bare.onnx"), "bare.onnx") is None
    with pytest.raises(InputError, match="bare.onnx: has no contract"): read_contract(tmp_path / "bare.onnx")
    onnx.save(model([(METADATA_KEY, "{")]), str(tmp_path / "torn.onnx"))
    with pytest.raises(InputError, match="torn.onnx: contract in the metadata"): read_contract(tmp_path / "torn.onnx")


def test_large_weights_are_not_read(tmp_path):
    "A sparse file of 3 GB, larger than protobuf itself takes."
    path = tmp_path / "large.onnx"
    end = model([("author", "x")])
    end.ClearField("graph")
    size = 3 << 30
    head = bytes([7 << 3 | 2])
    while True: # the length of the graph as a varint
        head += bytes([size & 127 | (128 if size > 127 else 0)])
        size >>= 7
        if not size: break
    with open(path, "wb") as f:
        f.write(head)
        f.seek(3 << 30, 1)
        f.write(end.SerializeToString())
    assert onnx_metadata(path) == {"author": "x"}
