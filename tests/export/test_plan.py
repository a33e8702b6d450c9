"The plan: sizes of objects, rules, a ranking that a faster board never worsens, one proposal."
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jetson_det.core import InputError
from jetson_det.data.index import read_indexed
from jetson_det.export.estimate import estimate
from jetson_det.export.plan import ObjectSizes, YOLOX, expected_ap, object_sizes, plan, propose, size_factor
from jetson_det.export.tensorrt import choose_for_board
from jetson_det.models.zoo import MODELS
from jetson_det.runtime.boards import BOARDS
from jetson_det.runtime.contract import preset
from jetson_det.scenes.docks import write_scenes

SIZES = ObjectSizes(np.array([.05, .09, .2], np.float32), 16/9, 1280, 3)
ORIN = ("orin-nano-4gb", "orin-nano", "orin-nano-super", "agx-orin")


@pytest.fixture(scope="module")
def docks(tmp_path_factory):
    return read_indexed(write_scenes(tmp_path_factory.mktemp("plan")/"dock", 12, (360, 640)))


def test_sizes_of_objects(docks):
    sizes = object_sizes(docks)
    boxes = np.asarray(docks.boxes)
    expected = np.sqrt((boxes[:, 2] - boxes[:, 0])*(boxes[:, 3] - boxes[:, 1]))/640
    assert np.allclose(np.sort(sizes.relative), np.sort(expected), atol=1e-6)
    assert sizes.longest == 640 and abs(sizes.aspect - 640/360) < 1e-9 and sizes.boxes == len(boxes)
    assert np.allclose(object_sizes(str(docks.root)).relative, sizes.relative)


def test_no_boxes(docks):
    bare = replace(docks, boxes=(), box_image=(), labels=(), flags=None, attributes={}, areas=None)
    with pytest.raises(InputError, match="no box with an area"): object_sizes(bare)


@given(st.lists(st.floats(0, 5000), min_size=2, max_size=8))
def test_larger_objects_are_found_more_often(sides):
    factors = size_factor(np.sort(sides))
    assert (np.diff(factors) >= 0).all() and factors.min() >= 0 and factors.max() <= 1.39
    assert size_factor([3])[0] == 0


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_published_ap_at_the_published_input(name):
    card = MODELS[name].card
    found = expected_ap(name, (card.input, card.input))
    assert found is None if card.ap is None else abs(found - card.ap) < 1e-9


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(BOARDS)), st.sampled_from([2, 10, 15, 30, 60, 240]), st.sampled_from([SIZES, None]))
def test_every_plan(name, fps, sizes):
    found = plan(sizes, name, fps)
    assert all(row.ms <= found.budget_ms and row.certain == (row.high <= found.budget_ms) for row in found.rows)
    assert [row.ap for row in found.rows] == sorted((row.ap for row in found.rows), reverse=True)
    named = {row.model for row in found.rows} | {model for models in found.left_out.values() for model in models}
    assert named == set(MODELS) # nothing is dropped in silence
    if not BOARDS[name].has_fast_int8: assert all(row.precision == "fp16" for row in found.rows)
    for row in found.rows[:3]:
        assert estimate(row.model, name, row.precision, input_size=row.input_size).ms == row.ms
        assert row.memory_mb < BOARDS[name].memory_gb*1024
    assert json.loads(found.to_json())["board"] == name
    assert BOARDS[name].label in str(found) and "assumed" in str(found) and "| network |" in found._repr_markdown_()


def test_the_nano():
    found = plan(SIZES, "nano", 15)
    assert any("no fast INT8" in rule for rule in found.left_out)
    detrs = next(models for rule, models in found.left_out.items() if "TensorRT 8.2" in rule)
    assert set(detrs) >= {"rtdetr-r18", "dfine-n"}
    names = {row.model for row in found.rows}
    assert {"yolox-nano", "yolox-tiny", "yolov8n"} <= names and not names & {"yolox-l", "yolo11x", "yolov8x"}
    assert any("little is known" in text for text in found.assumptions)
    assert all(row.license == ("Apache-2.0" if row.model in YOLOX else "AGPL-3.0") for row in found.rows)


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_the_plan_and_the_export_choose_the_same_precision(name):
    "What is planned in FP16 is exported in FP16, for the newest JetPack at least; where not for all, it is said."
    found = plan(SIZES, name, 2, precisions=("fp16",), models=["dfine-n", "rtdetr-r18", "yolox-s"])
    planned = {row.model: row.precision for row in found.rows}
    oldest, newest = (BOARDS[name].releases[k].version for k in (0, -1))
    for family, model in (("dfine", "dfine-n"), ("rtdetr", "rtdetr-r18"), ("yolox", "yolox-s")):
        contract = preset("rtdetr" if family != "yolox" else "yolox", ("Sack",), (640, 640))._replace(family=family)
        chosen = [next(one.value for one in choose_for_board(contract, name, jetpack) if one.name == "precision")
                  for jetpack in (newest, oldest)]
        if planned.get(model) == "fp16": assert chosen[0] == "fp16", (name, model)
        if family == "dfine": assert ("dfine-n" in planned) == (chosen[0] == "fp16" and newest != "4.6"), name
        told = any("D-FINE in FP16 needs" in text for text in found.assumptions)
        if family == "dfine" and "dfine-n" in planned: assert told == (chosen[1] != "fp16"), name


def test_yolo26_in_int8_where_no_release_builds_it(monkeypatch):
    assert any(row.model == "yolo26s" for row in plan(None, "orin-nano", 60, ("int8",), models=["yolo26s"]).rows)
    old = BOARDS["orin-nano"]._replace(jetpacks=("6.2",))
    monkeypatch.setitem(BOARDS, "orin-nano", old)
    found = plan(None, "orin-nano", 60, ("int8",), models=["yolo26s"])
    assert not found.rows and "YOLO26 does not build in INT8 (TensorRT 10.3" in next(iter(found.left_out))


def test_too_fast_for_anything():
    found = plan(SIZES, "nano", 1000)
    assert not found.rows and "no network of the zoo is fast enough" in str(found)


def test_small_objects_want_larger_inputs():
    near = propose("orin-nano", 30, SIZES)
    far = propose("orin-nano", 30, SIZES._replace(relative=SIZES.relative/4))
    assert max(far.input_size) > max(near.input_size) and YOLOX.index(far.model) <= YOLOX.index(near.model)


@pytest.mark.parametrize("fps", [5, 10, 15, 30, 60, 120])
@pytest.mark.parametrize("sizes", [SIZES, None])
def test_a_faster_board_gets_no_worse_network(fps, sizes):
    proposals = [propose(name, fps, sizes) for name in ORIN]
    aps = [expected_ap(one.model, one.input_size, sizes) for one in proposals if one.fits]
    assert aps == sorted(aps)
    assert [one.fits for one in proposals] == sorted(one.fits for one in proposals)


@pytest.mark.parametrize("name", ORIN)
def test_a_lower_speed_gets_no_worse_network(name):
    proposals = [propose(name, fps, SIZES) for fps in (120, 60, 30, 15, 5)]
    aps = [expected_ap(one.model, one.input_size, SIZES) for one in proposals if one.fits]
    assert aps == sorted(aps)


def test_the_proposal_is_the_best_certain_row_of_the_plan():
    for name in ("nano", "orin-nano", "orin-nx"):
        one = propose(name, 30, SIZES)
        certain = [row for row in plan(SIZES, name, 30, ("fp16",), models=YOLOX).rows if row.certain]
        assert one.fits and expected_ap(one.model, one.input_size, SIZES) >= max(row.ap for row in certain) - .01


def test_a_settled_input_stays():
    one = propose("nano", 15, SIZES, input_size=(416, 416))
    assert one.input_size == (416, 416) and "416x416" in one.why
    slow = propose("nano", 500, SIZES)
    assert not slow.fits and slow.why.startswith("TOO SLOW") and slow.model == "yolox-nano"


@pytest.mark.parametrize("call, message", [
    (lambda: plan(SIZES, "nano", "fast"), "fps is 'fast'"), (lambda: plan(SIZES, "nano", 15, share=2), "share is 2"),
    (lambda: plan(SIZES, "nanu", 15), "did you mean 'nano'"), (lambda: propose("nano", -1), "over 0"),
    (lambda: plan(SIZES, "nano", 15, models=["yolox"]), "no network of the zoo"),
    (lambda: plan(SIZES, "orin-nx", 15, mode="60W"), "no power mode"),
])
def test_wrong_calls(call, message):
    with pytest.raises(InputError, match=message): call()
