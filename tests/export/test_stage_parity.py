"""export.parity: in a chain of artifacts the planted fault is found in its stage, and named."""
import json
import re
from dataclasses import replace

import cv2
import numpy as np
import onnx
import pytest
from exported import SIZE
from kept import network

from jetson_det.core import InputError
from jetson_det.data.formats.registry import read_dataset
from jetson_det.evaluate.coco import evaluate
from jetson_det.evaluate.intervals import paired_bootstrap
from jetson_det.evaluate.matching import match
from jetson_det.export.golden import judge, parity
from jetson_det.export.onnx import export_onnx
from jetson_det.export.parity import (
    compare_stages,
    difference_sheet,
    image_difference,
    sheet_bytes,
    write_stages,
)
from jetson_det.models.session import torch_session
from jetson_det.runtime.geometry import Detections
from jetson_det.runtime.golden import compare_image
from jetson_det.runtime.sessions import Session, open_session
from jetson_det.scenes.docks import write_scenes

pytestmark = pytest.mark.usefixtures("one_thread", "kept_graphs")
CONFIDENCE = .4
RESAMPLES = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    export_onnx(network("yolox-nano"), folder/"a.onnx", SIZE, confidence=CONFIDENCE)
    write_scenes(folder/"docks", 8, (100, 200), seed=1)
    return folder


@pytest.fixture(scope="module")
def checkpoint():
    session = torch_session(network("yolox-nano"), SIZE)
    session.confidence = CONFIDENCE
    return session


@pytest.fixture(scope="module")
def ds(folder, checkpoint):
    "Images whose labels are the checkpoint's own detections: what it finds is right, and any change costs AP."
    raw = read_dataset(folder/"docks")
    found = [checkpoint(raw.image(i)) for i in range(len(raw))]
    counts = [len(d.scores) for d in found]
    assert min(counts) > 0 and sum(counts) > 40
    return replace(raw, classes=checkpoint.contract.classes, box_image=np.repeat(np.arange(len(raw)), counts),
                   boxes=np.concatenate([d.boxes for d in found]), labels=np.concatenate([d.labels for d in found]),
                   flags=None, attributes={}, areas=None)


def exported(folder): return open_session(folder/"a.onnx", threads=1)


def planted(folder, change=None, **contract):
    "The export with other outputs, or with another contract."
    session = exported(folder)
    infer = session.infer if change is None else lambda x: change(*session.infer(x))
    return Session(session.contract._replace(**contract), infer)


def test_a_chain_that_holds(folder, checkpoint, ds):
    rounded = planted(folder, lambda boxes, scores: [boxes, np.float16(scores).astype(np.float32)],
                      extra=dict(precision="fp16"))
    result = compare_stages({"run": checkpoint, "a.onnx": exported(folder), "h.onnx": rounded}, ds, resamples=RESAMPLES)
    assert result.ok and result.verdict.startswith("parity holds: h.onnx (fp16) against run")
    assert [s.kind for s in result.stages][1:] == ["fp32", "fp16"] and "PyTorch" in result.stages[0].kind
    assert (result.images, result.ap_images) == (len(ds), len(ds))
    a, h = result.stages[1:]
    assert a.before is a.first and h.before is not h.first
    assert (a.first.report.reference, h.before.report.reference) == ("run", "a.onnx")
    assert a.first.report.box_px["max"] < .1 and 0 < h.before.report.scores["max"] < 1e-3
    assert result.stages[0].ap.value > .95 and "the same AP" in result.lines()[1]


def test_the_figures_are_those_of_evaluate_and_of_the_paired_test(folder, checkpoint, ds):
    other = planted(folder, lambda boxes, scores: [boxes, np.where(scores * 1000 % 3 < 1, scores * .5, scores)])
    before = (other.confidence, other.iou, other.max_detections, other.max_per_class)
    step = compare_stages({"run": checkpoint, "b": other}, ds, ap=1, resamples=RESAMPLES).stages[1].first
    assert (other.confidence, other.iou, other.max_detections, other.max_per_class) == before
    a, b = (evaluate(session, ds, progress=False) for session in (checkpoint, other))
    assert step.report.ap == pytest.approx((a.stats["AP"], b.stats["AP"]), abs=1e-9)
    wanted = paired_bootstrap(*(match(ds, r.detections) for r in (a, b)), RESAMPLES, groups=ds.groups)
    assert vars(step.test.stats[0]) == vars(wanted.stats[0])
    assert step.test.stats[0].high < 0 and step.lost > 0
    assert (step.lost + step.other_class, step.new + step.other_class) == (step.report.missing, step.report.extra)
    old = parity(checkpoint, other, [(str(p), ds.image(i)) for i, p in enumerate(ds.paths)], ap=1)
    assert (old.missing, old.extra, old.pairs) == (step.report.missing, step.report.extra, step.report.pairs)


@pytest.mark.parametrize("change, contract, seen, looks_like", [
    (lambda boxes, scores: [boxes + np.float32([3, 0, 3, 0]), scores], {}, "boxes up to 3", "boxes are moved by"),
    (lambda boxes, scores: [boxes, scores[..., ::-1]], {}, "of another class", "the classes are in another order"),
    (None, dict(fit="letterbox-center"), "lost", "an input prepared in another way"),
    pytest.param(None, dict(color="rgb"), " px ", "blue and red are exchanged", marks=pytest.mark.slow),
], ids=["shift", "swapped class", "letterbox", "color"])
def test_a_planted_fault_is_found_in_its_stage(change, contract, seen, looks_like, folder, checkpoint, ds):
    if contract.get("color") == exported(folder).contract.color: contract = dict(color="bgr")
    chain = {"run": checkpoint, "a.onnx": exported(folder), "bad": planted(folder, change, **contract),
             "good": exported(folder)}
    result = compare_stages(chain, ds, images=4, resamples=RESAMPLES)
    assert [stage.ok for stage in result.stages] == [True, True, False, True] and not result.ok
    assert "parity fails at bad" in result.verdict
    assert "a.onnx (fp32) is the last one within the bounds" in result.verdict
    assert result.worst[0].name == "bad" and result.images == 4 and result.ap_images == len(ds)
    lines = result.lines()
    assert [k for k, line in enumerate(lines) if line.startswith("bad ") and seen in line], lines
    assert looks_like in result.stages[2].first.report.looks_like
    lost, back = (stage.before.test.stats[0].value for stage in result.stages[2:])
    assert back == pytest.approx(-lost, abs=1e-6)


def test_altered_weights_are_found(folder, checkpoint, ds, tmp_path):
    graph = onnx.load(str(folder/"a.onnx"))
    for t in graph.graph.initializer:
        if "reg_preds" in t.name and len(t.dims) == 1:
            t.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(t) + np.float32(.05), t.name))
    kept = [p for p in graph.metadata_props if p.key == "jetson_det.contract"]
    del graph.metadata_props[:]
    graph.metadata_props.extend(kept)
    onnx.save(graph, str(tmp_path/"w.onnx"))
    result = compare_stages({"run": checkpoint, "w.onnx": open_session(tmp_path/"w.onnx", threads=1)}, ds,
                            resamples=RESAMPLES)
    report = result.stages[1].first.report
    assert not result.ok and any("px" in line for line in report.failed) and report.box_px["p50"] > .2
    wide = compare_stages({"run": checkpoint, "w.onnx": open_session(tmp_path/"w.onnx", threads=1)}, ds, 1e3, 1, 1,
                          resamples=RESAMPLES)
    assert wide.stages[1].first.report.box_px["max"] == report.box_px["max"] # the bounds judge, they don't measure


def test_int8_is_held_by_its_ap_alone(folder, checkpoint, ds):
    "Boxes a pixel off: AP .5:.95 of labels that are exact falls."
    moved = planted(folder, lambda boxes, scores: [boxes + np.float32([1, 0, 1, 0]), scores],
                    extra=dict(precision="int8"))
    kw = dict(resamples=RESAMPLES, images=8)
    result = compare_stages({"run": checkpoint, "i.onnx": moved}, ds, ap=.9, **kw)
    assert result.ok and result.stages[1].first.report.box_px["max"] > .5
    tight = compare_stages({"run": checkpoint, "i.onnx": moved}, ds, **kw)
    assert not tight.ok and all(line.startswith("AP ") for line in tight.stages[1].first.report.failed)
    report = tight.stages[1].first.report
    gained = judge(report._replace(ap=report.ap[::-1]), moved.contract)
    assert gained.ok and not judge(report, moved.contract).ok # what INT8 gains is no fault
    empty = ds.keep_boxes(np.zeros(len(ds.boxes), bool))
    unlabeled = compare_stages({"run": checkpoint, "i.onnx": moved}, empty, **kw) # no AP: boxes and scores decide
    assert not unlabeled.ok and unlabeled.ap_images == 0 and "px" in unlabeled.verdict


def test_a_bound_that_holds_by_chance_is_said_to(folder, checkpoint, ds):
    "A mean within the bound, an interval beyond it."
    def some(boxes, scores): return [boxes, np.where(scores * 1000 % 37 < 1, scores * .3, scores)]
    int8 = dict(extra=dict(precision="int8"))
    result = compare_stages({"run": checkpoint, "b": planted(folder, some, **int8)}, ds, ap=.9, resamples=RESAMPLES)
    low = result.stages[1].first.test.stats[0].low
    assert result.ok and low < 0
    bound = (abs(result.stages[1].first.test.stats[0].value) - low) / 2
    chain = {"run": checkpoint, "b": planted(folder, some, **int8)}
    uncertain = compare_stages(chain, ds, ap=bound, resamples=RESAMPLES)
    assert f"8 images can't rule out a loss of {-low:.3f}" in uncertain.verdict


def test_a_stage_that_does_not_run(folder, checkpoint, ds):
    seen = []
    def fails_late(boxes, scores):
        seen.append(1)
        return [boxes, scores if len(seen) < 4 else scores * np.nan]
    chain = {"run": checkpoint, "nan": planted(folder, fails_late), "good": exported(folder)}
    result = compare_stages(chain, ds, resamples=RESAMPLES)
    assert [s.ok for s in result.stages] == [True, False, True] and len(seen) == 4 # it is asked no more
    assert str(ds.paths[3]) in result.stages[1].error and "does not run" in result.lines()[1]
    good = result.stages[2]
    assert good.before is good.first and good.first.report.pairs > 0 # the last one that ran
    json.dumps(result.to_dict(), allow_nan=False)
    with pytest.raises(InputError, match="not finite"):
        compare_stages({"nan": planted(folder, lambda b, s: [b, s * np.nan]), "good": exported(folder)}, ds)


def test_each_image_is_read_once_and_each_network_runs_once(folder, checkpoint, ds, monkeypatch):
    reads = []
    image = type(ds).image
    monkeypatch.setattr(type(ds), "image", lambda self, i: reads.append(i) or image(self, i))
    runs = []
    other = planted(folder, lambda boxes, scores: runs.append(1) or [boxes, scores])
    compare_stages({"run": checkpoint, "a": exported(folder), "b": other}, ds, resamples=RESAMPLES)
    assert reads == list(range(len(ds))) and len(runs) == len(ds)


def test_wrong_input(folder, checkpoint, ds):
    good = exported(folder)
    renamed = planted(folder, classes=("Sack", "Person", "Truck"))
    with pytest.raises(InputError, match="t: its classes .*Truck.* are not those of run"):
        compare_stages({"run": checkpoint, "t": renamed}, ds)
    with pytest.raises(InputError, match="1 artifact to compare"): compare_stages({"run": checkpoint}, ds)
    with pytest.raises(InputError, match="bound ap is -1"): compare_stages({"run": checkpoint, "a": good}, ds, ap=-1)
    with pytest.raises(InputError, match="no images"): compare_stages({"run": checkpoint, "a": good}, ds.subset([]))
    with pytest.raises(InputError, match="count is 65"): compare_stages({"run": checkpoint, "a": good}, ds, images=65)
    seen = []
    with pytest.raises(InputError, match="no class in common|none of the classes"):
        others = replace(ds, classes=("x", "y", "z"))
        compare_stages({"run": checkpoint, "a": good}, others, on_image=lambda *n: seen.append(n))
    assert not seen # before the work
    blind = {name: planted(folder, lambda b, s: [b, s * 0]) for name in "ab"}
    with pytest.raises(InputError, match="a finds nothing over 0.4 in 8 images"): compare_stages(blind, ds)
    one = compare_stages({"run": checkpoint, "a": good}, ds.subset([0])) # one image: boxes, no interval
    assert one.ok and one.ap_images == 0


def test_the_order_of_classes_may_differ(folder, checkpoint, ds):
    order = planted(folder, lambda boxes, scores: [boxes, scores[..., [2, 0, 1]]],
                    classes=tuple(checkpoint.contract.classes[k] for k in (2, 0, 1)))
    assert compare_stages({"run": checkpoint, "o": order}, ds, resamples=RESAMPLES).ok


def test_one_box_under_two_classes_is_counted_once():
    a = Detections(np.float32([[0, 0, 9, 9], [20, 0, 29, 9]]), np.float32([.9, .8]), np.array([0, 0]))
    b = Detections(np.float32([[0, 0, 9, 9], [50, 0, 59, 9]]), np.float32([.9, .8]), np.array([1, 0]))
    d = image_difference(compare_image("x", a, b, .3), 7)
    assert (d.lost, d.new, d.other_class, d.index, d.changed) == (1, 1, 1, 7, 3)


def test_the_sheet_and_the_page(folder, checkpoint, ds, tmp_path):
    def drop(boxes, scores): return [boxes, np.where(scores * 1000 % 4 < 1, scores * .2, scores)]
    result = compare_stages({"run": checkpoint, "<b>.onnx": planted(folder, drop)}, ds, resamples=RESAMPLES)
    classes = checkpoint.contract.classes
    sheet = difference_sheet(result, ds, classes)
    assert sheet.shape[1] == 2 * 560 + 8 and sheet.dtype == np.uint8
    left, right = (sheet[26:, :560].astype(int), sheet[26:, 568:].astype(int))
    assert np.abs(left - right).max() > 100 # what is lost is drawn
    for suffix in (".png", ".jpg"):
        assert cv2.imdecode(np.frombuffer(sheet_bytes(sheet, suffix), np.uint8), 1).shape == sheet.shape
    with pytest.raises(InputError, match="not as .gif"): sheet_bytes(sheet, ".gif")
    page = write_stages(tmp_path/"new"/"p.html", result, ds, classes, "docks").read_text()
    assert "&lt;b&gt;.onnx" in page and "<b>.onnx" not in page and page.count("<img") == 1
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    same = compare_stages({"run": checkpoint, "again": checkpoint}, ds, images=4, resamples=RESAMPLES)
    assert same.worst is None and "<img" not in write_stages(tmp_path/"s.html", same, ds, classes).read_text()
    with pytest.raises(InputError, match="no image differs"): difference_sheet(same, ds, classes)
    with pytest.raises(InputError, match="was not compared"): difference_sheet(same, ds, classes, index=99)
