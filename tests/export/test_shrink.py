"""shrink: the search meets its target and no less than needed; what can't be met is one line with the nearest; a real
training of the narrower network, its report and its folder."""
import copy
import json

import pytest
import torch
import train_helpers as helpers

from jetson_det.config import load_config
from jetson_det.core import InputError
from jetson_det.export import shrink as module
from jetson_det.export.shrink import Target, _latency, _rounded_up, find_ratio, shrink, shrink_config
from jetson_det.models.checkpoint import save_checkpoint
from jetson_det.models.detector import count_gflops
from jetson_det.models.prune import PruneSearch, prune_model
from jetson_det.models.session import load_detector
from jetson_det.models.zoo import create_model

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ("Sack", "Person")
SIZE = (96, 96)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("yolox-nano", CLASSES).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory): return helpers.scenes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    "A trained run."
    from jetson_det.train.loop import train
    out = tmp_path_factory.mktemp("run") / "docks"
    train(helpers.config(data, "train.epochs=1", "augment.multiscale=0", "model.gains={iou: 4}"), out)
    return out


def pruned(model, ratio):
    narrow = copy.deepcopy(model)
    prune_model(narrow, SIZE, ratio)
    return narrow


def gflops(model): return count_gflops(copy.deepcopy(model).to("meta"), SIZE)


def test_flops(model):
    ratio = find_ratio(model, SIZE, Target(flops=.6))
    assert ratio == pytest.approx(.4)
    assert .5*gflops(model) < gflops(pruned(model, ratio)) <= .6*gflops(model)


@pytest.mark.slow
def test_latency(model, monkeypatch):
    "A board whose time is its work: the search finds the least share."
    calls = []
    def fake(narrow, size, target):
        calls.append(gflops(narrow)/gflops(model))
        class Found: ms = 10*calls[-1]
        return Found
    monkeypatch.setattr(module, "_latency", fake)
    ratio = find_ratio(model, SIZE, Target(latency=7., board="nano"))
    assert 10*gflops(pruned(model, ratio))/gflops(model) <= 7
    assert ratio < .3 + PruneSearch(model, SIZE).most/64 + .02 and len(calls) <= 8


@pytest.mark.parametrize("target, words", [
    (Target(flops=.01), "at least 0\\.\\d+ of them stay; the nearest target is flops=0\\.\\d+"),
    (Target(latency=.5, board="nano"), "the nearest target is latency="),
    (Target(latency=500, board="nano"), "already: nothing is to be removed"),
    (Target(), "one target"), (Target(flops=.5, latency=3), "one target"), (Target(latency=3), "which board"),
    (Target(flops=1.), "under 1"), (Target(flops=-1), "over 0"), (Target(flops=True), "over 0"),
    (Target(latency=float("nan"), board="nano"), "over 0"), (Target(latency=3, board="orin"), "unknown board")])
def test_what_cannot_be_met(model, target, words):
    with pytest.raises(InputError, match=words) as e: find_ratio(model, SIZE, target)
    assert "\n" not in str(e.value)


@pytest.mark.slow
def test_the_nearest_target_can_be_met(model):
    for target, option in ((Target(flops=.01), "flops"), (Target(latency=.5, board="nano"), "latency")):
        with pytest.raises(InputError) as e: find_ratio(model, SIZE, target)
        nearest = float(str(e.value).split(f"{option}=")[1].split(";")[0])
        ratio = find_ratio(model, SIZE, target._replace(**{option: nearest}))
        narrow = pruned(model, ratio)
        if option == "flops": assert gflops(narrow) <= nearest*gflops(model)
        else: assert _latency(narrow, SIZE, target).ms <= nearest


@pytest.mark.parametrize("value, text", [(2.1612, "2.17"), (.2341, "0.235"), (12.34, "12.4"), (.5, "0.5")])
def test_rounding_up(value, text): assert _rounded_up(value) == text and float(text) >= value


def test_the_search_leaves_the_network_as_it_is(model):
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    _latency(model, SIZE, Target(board="nano"))
    find_ratio(model, SIZE, Target(flops=.5))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_settings_of_the_run(run, data):
    _, contract = load_detector(run)
    cfg = shrink_config(run, contract, .3, settings=["train.epochs=7", "data.workers=0"])
    assert cfg.data.path == str(data) and cfg.data.input_size == [96, 96] and cfg.data.workers == 0
    assert cfg.model.name == "yolox-nano" and cfg.model.prune == .3 and cfg.model.gains == {"iou": 4}
    assert cfg.model.weights == cfg.distill.teacher == str(run) and cfg.train.epochs == 7
    assert "lr" not in cfg.train.model_fields_set and cfg.train.recipe == "auto" # the recipe fills it in
    inner = shrink_config(run/"best", contract, .3, settings=["distill.teacher=''"])
    assert inner.data.path == str(data) and inner.distill.teacher == ""


WORDS = ["train.device=cpu", "train.threads=1", "train.batch_size=2", "data.workers=0", "train.report=false",
         "train.trackers=[]"]


def test_a_real_one(run, tmp_path):
    lines = []
    report = shrink(run, tmp_path/"small", flops=.5, board="nano", epochs=1, settings=WORDS, say=lines.append)
    narrow, contract = load_detector(tmp_path/"small")
    assert report.gflops[1] == pytest.approx(gflops(narrow)) and report.gflops[1] <= .5*report.gflops[0]
    assert report.params[1] < report.params[0] and contract.extra["pruned"]
    before, after = report.latency
    assert after.ms < before.ms and after.low <= after.ms <= after.high and before.board == "nano"
    val = json.loads((tmp_path/"small"/"metrics.json").read_text())["val"]
    assert report.ap[1] == val["known"]["AP"] and report.images == val["images"] and report.ap[0] is not None
    record = json.loads((tmp_path/"small"/"shrink.json").read_text())
    assert record["ratio"] == .5 and len(record["latency"]) == 2 and record["epochs"] == 1
    assert "predicted (90 %)" in str(report) and "GFLOPs at 96x96" in report._repr_markdown_()
    assert "teacher" in (tmp_path/"small"/"log.txt").read_text() and len(lines) == 1


@pytest.mark.slow
def test_one_that_was_ended_goes_on(run, tmp_path, monkeypatch):
    "After the training here, before the report."
    def ended(*args, **kw):
        train(*args, **kw)
        raise KeyboardInterrupt
    train = module.train
    call = lambda: shrink(run, tmp_path/"small", flops=.5, epochs=1, settings=WORDS, say=lambda line: None)
    with monkeypatch.context() as m:
        m.setattr(module, "train", ended)
        with pytest.raises(KeyboardInterrupt): call()
    assert not (tmp_path/"small"/"shrink.json").exists()
    weights = (tmp_path/"small"/"last"/"weights.safetensors").read_bytes()
    assert call().epochs == 1 and (tmp_path/"small"/"shrink.json").exists()
    assert (tmp_path/"small"/"last"/"weights.safetensors").read_bytes() == weights
    with pytest.raises(InputError, match="is not empty"): call() # it is done


def test_refused_before_the_search(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_ratio", None)
    for more, words in (({"precision": "fp17"}, "did you mean 'fp16'"), ({"mode": "15W"}, "of which board"),
                        ({"board": "orin-nano", "mode": "99W"}, "mode"),
                        ({"board": "nano", "precision": "int8"}, "no fast INT8"), ({"out": run}, "is not empty")):
        with pytest.raises(InputError, match=words): shrink(run, more.pop("out", tmp_path/"a"), flops=.5, **more)
    assert not (tmp_path/"a").exists()


def test_refusals(run, tmp_path, model):
    contract = model.contract(SIZE)
    save_checkpoint(tmp_path/"alone", model, None, None, {}, contract)
    with pytest.raises(InputError, match="say where the images are"): shrink(tmp_path/"alone", tmp_path/"a", flops=.5)
    with pytest.raises(InputError, match="no such folder"): shrink(tmp_path/"gone", tmp_path/"a", flops=.5)
    with pytest.raises(InputError, match="train.epoch"):
        shrink(run, tmp_path/"a", flops=.5, settings=["train.epoch=3"])
    from jetson_det.models.fake_quant import fake_quantized, quantize_for_training
    rounding = copy.deepcopy(model)
    quantize_for_training(rounding, SIZE, lambda: iter([torch.rand(1, 3, *SIZE)*255]))
    extra = {"qat": {"layers": fake_quantized(rounding)}}
    save_checkpoint(tmp_path/"qat", rounding, None, None, {}, model.contract(SIZE, extra=extra))
    with pytest.raises(InputError, match="was trained with train.qat"): shrink(tmp_path/"qat", tmp_path/"a", flops=.5)
    assert not (tmp_path/"a").exists()
