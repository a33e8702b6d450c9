"export.tensorrt: which rule gives what, what is refused, the file and the command. TensorRT itself is not run here."
import os
import subprocess

import onnx
import pytest
from exported import SIZE, assert_same, scene
from hypothesis import given
from hypothesis import strategies as st
from kept import network
from train_helpers import each_family

from jetson_det.core import InputError
from jetson_det.export.targets import export_target
from jetson_det.export.tensorrt import (Choice, build_command, build_engine, choices_text, choose_for_board,
                                        export_tensorrt)
from jetson_det.models.graph import operators
from jetson_det.models.session import torch_session
from jetson_det.models.zoo import create_model
from jetson_det.runtime.boards import BOARDS, JETPACKS, PRECISIONS
from jetson_det.runtime.contract import Contract
from jetson_det.runtime.sessions import open_session

pytestmark = pytest.mark.usefixtures("kept_graphs")
YOLOX = Contract("yolox", "yolox-s", ("Sack",), (640, 640), "boxes_scores")
RTDETR = YOLOX._replace(family="rtdetr", name="rtdetr-r18", output="queries")
DFINE = RTDETR._replace(family="dfine", name="dfine-n")
YOLO26 = YOLOX._replace(family="ultralytics", name="yolo26n", output="queries")


def chosen(*args, **options): return {c.name: c.value for c in choose_for_board(*args, **options)}


@pytest.mark.parametrize("contract, board, jetpack, want", [
    (YOLOX, "nano", None, dict(tensorrt="8.2", opset=13, precision="fp16", input="float32 chw", output="raw",
                               workspace=256)),
    (YOLOX, "Jetson Nano", None, dict(board="nano", opset=13)),
    (YOLOX, "nano-2gb", None, dict(workspace=256)),
    (YOLOX, "tx2", None, dict(opset=13, precision="fp16", workspace=512)),
    (YOLOX, "xavier-nx", None, dict(tensorrt="8.2 to 8.5", opset=13, input="float32 chw")),
    (YOLOX, "xavier-nx", "5.1", dict(tensorrt="8.5", opset=13, input="uint8 hwc")),
    (YOLOX, "orin-nano", "6.2", dict(tensorrt="10.3", opset=17, input="uint8 hwc")),
    (YOLOX, "thor", None, dict(opset=17, input="uint8 hwc", workspace=4096)),
    (RTDETR, "nano", None, {"opset": 13, "precision": "fp16", "layer norm": "rewritten"}),
    (RTDETR, "orin-nx", None, {"opset": 13, "layer norm": "rewritten"}),
    (RTDETR, "orin-nx", "6.2", {"opset": 17, "layer norm": "one operator"}),
    (DFINE, "nano", None, {"opset": 13, "precision": "fp32", "layer norm": "single steps"}),
    (DFINE, "orin-nx", "5.1", {"precision": "fp32"}),
    (DFINE, "orin-nx", "6.2", {"opset": 17, "precision": "fp16", "layer norm": "one operator"}),
    (YOLO26, "orin-nx", "6.2", dict(precision="fp16", output="raw")),
])
def test_what_a_board_gets(contract, board, jetpack, want):
    found = chosen(contract, board, jetpack)
    assert {name: found[name] for name in want} == want


@pytest.mark.parametrize("contract, board, options, text", [
    (YOLOX, "nanu", {}, "unknown board 'nanu': did you mean 'nano'"),
    (YOLOX, "nano", dict(jetpack="6.2"), "JetPack 6.2 is not in the table for Jetson Nano 4GB; it has 4.6"),
    (YOLOX, "nano", dict(precision="int8"), "has no fast INT8"),
    (YOLOX, "tx2", dict(precision="int8"), "has no fast INT8"),
    (YOLO26, "orin-nx", dict(precision="int8", jetpack="6.2"), "10.7 and later build it"),
    (YOLO26, "orin-nx", dict(precision="int8", jetpack="7.2"), "needs a quantized ONNX"),
    (YOLOX, "orin-nx", dict(precision="int8"), "needs a quantized ONNX"),
    (YOLOX, "orin-nx", dict(precision="fp61"), "did you mean 'fp16'"),
    (YOLOX, "nano", dict(output="efficient-nms"), "returns the scores less 1"),
    (YOLOX, "xavier-nx", dict(output="efficient-nms"), "less 1 on .*, TensorRT 8.2 .*TensorRT#2903"),
    (YOLOX, "orin-nx", dict(output="nms"), "pads the results"),
    (RTDETR, "orin-nx", dict(output="efficient-nms"), "needs no NMS"),
    (YOLOX, "orin-nx", dict(output="boxes"), "output 'boxes'"),
    (YOLOX, "nano", dict(uint8=True), "8.5 and later do"),
    (YOLOX, "nano", dict(opset=14), "reads operators up to 13"),
    (YOLOX, "orin-nx", dict(opset=19), "TensorRT 8.5 reads operators up to 17"),
    (RTDETR, "orin-nx", dict(opset=17), "has no LayerNormalization; take 13 to 16"),
])
def test_what_is_known_not_to_work(contract, board, options, text):
    with pytest.raises(InputError, match=text) as e: choose_for_board(contract, board, **options)
    assert "\n" not in str(e.value)


def test_what_is_asked_for_and_works_is_taken():
    assert chosen(YOLOX, "nano", precision="fp32", output="efficient-nms")["output"] == "efficient-nms"
    assert chosen(YOLOX, "xavier-nx", jetpack="5.1", output="efficient-nms")["output"] == "efficient-nms"
    assert chosen(YOLOX, "orin-nx", uint8=False)["input"] == "float32 chw"
    assert chosen(YOLOX, "orin-nx", opset=17)["opset"] == 17
    assert chosen(RTDETR, "orin-nx", opset=16)["layer norm"] == "rewritten"
    fp16 = next(c for c in choose_for_board(DFINE, "nano", precision="fp16") if c.name == "precision")
    assert fp16.value == "fp16" and "known to fail" in fp16.rule


@given(st.sampled_from(list(BOARDS)), st.sampled_from([YOLOX, RTDETR, DFINE, YOLO26]), st.sampled_from(list(JETPACKS)),
       st.sampled_from([None, *PRECISIONS]), st.sampled_from([None, "raw", "nms", "efficient-nms"]),
       st.sampled_from([None, True, False]), st.sampled_from([None, 13, 16, 17, 19]))
def test_no_choice_is_one_that_is_known_not_to_work(board, contract, jetpack, precision, output, uint8, opset):
    """What facts about TensorRT forbid never comes out, whatever is asked for."""
    try: found = chosen(contract, board, jetpack, precision, output, uint8, opset)
    except InputError as e:
        assert "\n" not in str(e)
        return
    version = tuple(int(v) for v in JETPACKS[jetpack].tensorrt.split("."))
    assert found["opset"] <= (13 if version < (8, 4) else 17 if version < (10, 0) else 19)
    if version < (8, 5): assert found["input"] == "float32 chw"
    if version < (8, 4) and found["precision"] == "fp16": assert found["output"] != "efficient-nms"
    if contract.output == "queries": assert found["output"] == "raw"
    if contract.family in ("rtdetr", "dfine"):
        assert version >= (8, 6) or found["opset"] < 17
        if found["precision"] == "fp16": assert found["layer norm"] in ("rewritten", "one operator")
    assert found["precision"] != "int8" and 256 <= found["workspace"] <= 4096


def test_every_choice_has_its_rule():
    for board in BOARDS:
        choices = choose_for_board(RTDETR, board)
        lines = choices_text(choices).splitlines()
        assert len(lines) == len(choices) and all(c.rule.strip() for c in choices)
        for line, choice in zip(lines, choices): assert line.startswith(choice.name) and line.endswith(choice.rule)
    assert choices_text([Choice("a", 1, "b")]) == "a  1  b"


def a_jetson(root, model, release="7.1", l4t=32):
    "The files by which a board is known."
    (root/"proc/device-tree").mkdir(parents=True)
    (root/"etc").mkdir()
    (root/"proc/device-tree/model").write_bytes(model.encode() + b"\0")
    (root/"proc/meminfo").write_text("MemTotal:        4059272 kB\n")
    (root/"etc/nv_tegra_release").write_text(f"# R{l4t} (release), REVISION: {release}, GCID: 1, BOARD: x\n")
    return root


def test_on_the_board_the_installed_release_counts(tmp_path):
    root = a_jetson(tmp_path, "NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "4.3", 36)
    (root/"proc/meminfo").write_text("MemTotal:        15900000 kB\n")
    rows = choose_for_board(RTDETR, "orin-nx", root=root)
    assert {c.name: c.value for c in rows}["tensorrt"] == "10.3" and "installed on this board" in rows[1].rule
    assert chosen(RTDETR, "agx-orin", root=root)["tensorrt"].startswith("8.5 to") # another board than this one


@pytest.fixture(scope="module")
def yolox(): return create_model("yolox-nano", ("Sack", "Person")).eval()


@pytest.mark.parametrize("name, board, jetpack", [
    ("yolox-nano", "nano", None), pytest.param("yolox-nano", "orin-nx", "6.2", marks=pytest.mark.slow),
    *(pytest.param(*p.values, "nano", None, marks=[*p.marks, pytest.mark.slow]) for p in each_family(["rtdetr-r18"])),
    *(pytest.param(*p.values, "orin-nx", "6.2", marks=p.marks) for p in each_family(["rtdetr-r18"]))])
def test_the_file_of_a_board_finds_what_the_checkpoint_finds(name, board, jetpack, tmp_path, monkeypatch, one_thread):
    model = network(name, monkeypatch.setitem)
    frames = [scene(seed) for seed in range(3)] # of a gray image a random DETR's best cells are a matter of rounding
    contract = export_tensorrt(model, tmp_path/"m.onnx", board, jetpack, input_size=SIZE, frames=frames)
    made = contract.extra["tensorrt"]
    assert (made["board"], contract.opset) == (board, 13 if board == "nano" else 17)
    session, right = open_session(tmp_path/"m.onnx", threads=1), torch_session(model, SIZE)
    session.confidence = right.confidence = .3
    for frame in frames: assert_same(session(frame), right(frame))
    assert session.contract.extra["tensorrt"] == made
    used = set(operators(tmp_path/"m.onnx"))
    if board == "nano": assert not used & {"LayerNormalization", "GridSample", "Mod", "Pow"}
    elif name == "rtdetr-r18": assert "LayerNormalization" in used


def test_the_command(yolox, tmp_path):
    contract = export_tensorrt(yolox, tmp_path/"my sacks.onnx", "nano", input_size=(64, 96))
    assert build_command(contract, "a/b.onnx") == ["trtexec", "--onnx=a/b.onnx", "--saveEngine=a/b.engine",
                                                   "--workspace=256", "--fp16"]
    made = dict(contract.extra["tensorrt"], oldest="10.3", workspace=512, precision="fp32")
    assert build_command(contract._replace(extra=dict(tensorrt=made)), "b.onnx", "c.engine") == [
        "trtexec", "--onnx=b.onnx", "--saveEngine=c.engine", "--memPoolSize=workspace:512"]
    with pytest.raises(InputError, match="without a board"): build_command(YOLOX, "b.onnx")

    # the script finds a trtexec on the path, and gives it the words
    (tmp_path/"bin").mkdir()
    (tmp_path/"bin"/"trtexec").write_text('#!/bin/sh\nfor word; do echo "$word"; done > words\n')
    (tmp_path/"bin"/"trtexec").chmod(0o755)
    env = dict(os.environ, PATH=f"{tmp_path/'bin'}:{os.environ['PATH']}")
    subprocess.run(["sh", str(tmp_path/"my sacks.build.sh")], check=True, env=env, cwd="/")
    assert (tmp_path/"words").read_text().splitlines() == ["--onnx=my sacks.onnx", "--saveEngine=my sacks.engine",
                                                           "--workspace=256", "--fp16"]


def test_a_script_of_somebody_else_stays(yolox, tmp_path):
    (tmp_path/"m.build.sh").write_text("echo mine\n")
    with pytest.raises(InputError, match="jetson-det did not write it"):
        export_tensorrt(yolox, tmp_path/"m.onnx", "nano", input_size=(64, 96))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.build.sh"]
    (tmp_path/"m.build.sh").unlink()
    first = export_tensorrt(yolox, tmp_path/"m.onnx", "nano", input_size=(64, 96))
    data = (tmp_path/"m.onnx").read_bytes()
    assert export_tensorrt(yolox, tmp_path/"m.onnx", "nano", input_size=(64, 96)) == first # its own is replaced
    assert (tmp_path/"m.onnx").read_bytes() == data


TRTEXEC = """#!/bin/sh
for word; do case $word in --saveEngine=*) engine=${word#--saveEngine=};; esac; done
%s
"""


def test_building(yolox, tmp_path, monkeypatch):
    "With a program in trtexec's place, on what looks like a Nano."
    nano = a_jetson(tmp_path/"nano", "NVIDIA Jetson Nano Developer Kit")
    tx2 = a_jetson(tmp_path/"tx2", "quill")
    path = tmp_path/"m.onnx"
    export_tensorrt(yolox, path, "nano", input_size=(64, 96))
    with pytest.raises(InputError, match="this machine is another; copy m.onnx and m.build.sh"): build_engine(path)
    with pytest.raises(InputError, match="Jetson TX2 is another"): build_engine(path, root=tx2)
    with pytest.raises(InputError, match="trtexec is not installed"): build_engine(path, root=nano)

    program = tmp_path/"bin"/"trtexec"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    program.write_text(TRTEXEC % 'echo "half an engine" > "$engine"; echo "[E] out of memory"; exit 1')
    program.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"exit code 1\): \[E\] out of memory"): build_engine(path, root=nano)
    assert not list(tmp_path.glob("*.engine*"))
    program.write_text(TRTEXEC % "exit 0") # says that it is done, and wrote nothing
    with pytest.raises(RuntimeError, match="could not build"): build_engine(path, root=nano)
    program.write_text(TRTEXEC % 'echo "an engine" > "$engine"')
    assert build_engine(path, root=nano) == tmp_path/"m.engine"
    assert (tmp_path/"m.engine").read_text() == "an engine\n" and not list(tmp_path.glob("*.part"))


def test_files_that_cannot_be_built(yolox, tmp_path):
    from jetson_det.export.onnx import export_onnx
    export_onnx(yolox, tmp_path/"plain.onnx", (64, 96))
    graph = onnx.load(str(tmp_path/"plain.onnx"))
    del graph.metadata_props[:]
    onnx.save(graph, str(tmp_path/"bare.onnx"))
    (tmp_path/"text.onnx").write_text("no protobuf")
    for name, text in (("plain", "exported without a board"), ("bare", "has no contract"), ("gone", "no such file"),
                       ("text", "not an ONNX file")):
        with pytest.raises(InputError, match=text) as e: build_engine(tmp_path/f"{name}.onnx")
        assert "\n" not in str(e.value)


def test_onnx_for_a_board_is_the_target_tensorrt(yolox, tmp_path):
    target = export_target("onnx", board="nano")
    assert target is export_target("tensorrt") and export_target("onnx") is not target
    contract = target.export(yolox, tmp_path/"m.onnx", board="nano", input_size=(64, 96), precision=None, uint8=False)
    assert contract.extra["tensorrt"]["board"] == "nano"
    with pytest.raises(InputError, match="unknown board"): target.export(yolox, tmp_path/"m.onnx", board="mano-x")


def test_options_through_the_table(yolox, tmp_path):
    target = export_target("tensorrt")
    for options, text in [
        ({}, r"needs a board \(--board NAME\), one of nano, "),
        (dict(board="nano", dynamic_batch=True), "batch is fixed here"),
        (dict(board="nano", rewrites=[print]), "no option rewrites"),
        (dict(board="nano", simplfy=True), "no option simplfy"),
    ]:
        with pytest.raises(InputError, match=text) as e: target.export(yolox, tmp_path/"m.onnx", **options)
        assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())
    # what was not set leaves the choice to the rule: bytes on a Thor
    common = dict(board="thor", input_size=(64, 96), dynamic_batch=False)
    assert target.export(yolox, tmp_path/"m.onnx", uint8=None, **common).layout == "hwc"
    assert target.export(yolox, tmp_path/"m.onnx", uint8=False, **common).layout == "chw"


def test_the_target_without_a_board_is_one_line(yolox, tmp_path, capsys):
    from jetson_det.cli import main
    from jetson_det.models.checkpoint import save_checkpoint
    save_checkpoint(tmp_path/"best", yolox, None, None, {}, yolox.contract((64, 96)))
    assert main(["export", str(tmp_path/"best"), "--to", "tensorrt"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "needs a board" in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
