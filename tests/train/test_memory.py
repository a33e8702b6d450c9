"""What a step takes of the memory, and what to do when there is not enough: checkpointed stages, the largest
micro-batch, a lost GPU."""
import os
import signal
import subprocess
import sys
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from train_helpers import config

from jetson_det.core import InputError
from jetson_det.models.zoo import create_model
from jetson_det.train import memory
from jetson_det.train.ema import ModelEMA
from jetson_det.train.memory import (BatchFit, LiveBytes, Trial, TrialProcess, auto_batch, called_parts,
                                     checkpoint_stages, continue_on_cpu, divisors, expected, fit_batch, largest_size,
                                     lost_device, made_up, statistics_of, usual_boxes)

FAMILIES = ["yolox-nano", "yolo11n", "yolo11n-p2-lite", "rtdetr-r18", "dfine-n"]
pytestmark = pytest.mark.usefixtures("one_thread")


def detector(name):
    if name.startswith("yolo1"): pytest.importorskip("ultralytics")
    torch.manual_seed(0)
    return create_model(name, ["car", "van"]).train()


def step_of(model, batch):
    "Loss terms and peak bytes of a forward and backward pass."
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    with LiveBytes() as live:
        outputs = model(model.normalize(batch.images), *([batch.boxes, batch.labels] if model.needs_targets else []))
        loss = model.loss(outputs, batch.boxes, batch.labels, l1=True)
        sum(loss.sums.values()).backward()
    return {k: v.item() for k, v in loss.sums.items()}, live.peak


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointed_stages_give_the_same_step_in_less_memory(name):
    plain = detector(name)
    batch = made_up(4, (64, 96), 2, 3)
    frugal = deepcopy(plain)
    assert len(checkpoint_stages(frugal)) > 10 and not checkpoint_stages(frugal)
    (loss, peak), (again, less) = step_of(plain, batch), step_of(frugal, batch)
    assert again == loss
    for (k, a), b in zip(plain.named_parameters(), frugal.parameters()):
        assert (a.grad is None) == (b.grad is None), k
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-7 + 1e-5 * a.grad.abs().max().item(), msg=k)
    for a, b in zip(statistics_of(plain), statistics_of(frugal)): assert torch.equal(a, b)
    assert less < .85 * peak


def test_checkpointed_stages_count_a_batch_once():
    model = detector("yolox-nano")
    checkpoint_stages(model)
    step_of(model, made_up(2, (64, 64), 2, 1))
    counts = {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert counts == {1} and {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {.03}


def test_checkpointed_stages_roll_the_same_dice_twice():
    class Toy(torch.nn.Module):
        needs_targets = False
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Dropout(.5), torch.nn.Conv2d(8, 1, 1))
        def normalize(self, x): return x.float() / 255
        def forward(self, x): return self.body(x)
        def stages(self): return {"body": [self.body]}
    torch.manual_seed(0)
    plain = Toy()
    x = torch.rand(2, 3, 16, 16)
    frugal = deepcopy(plain)
    assert checkpoint_stages(frugal) == ["body"]
    for m in (plain, frugal):
        torch.manual_seed(3)
        m(x).sum().backward()
        m.after = torch.rand(1)
    for a, b in zip(plain.parameters(), frugal.parameters()): assert torch.equal(a.grad, b.grad)
    assert torch.equal(plain.after, frugal.after)


def test_checkpointed_stages_keep_names_average_modes_and_frozen_parts(tmp_path):
    plain = detector("yolox-nano")
    for m in plain.backbone.backbone.stem.modules(): m.training = False
    plain.backbone.backbone.stem.requires_grad_(False)
    modes = [m.training for m in plain.modules()]
    frugal = deepcopy(plain)
    checkpoint_stages(frugal)
    assert list(frugal.state_dict()) == list(plain.state_dict()) and [m.training for m in frugal.modules()] == modes
    batch = made_up(2, (64, 64), 2, 1)
    assert step_of(frugal, batch)[0] == step_of(plain, batch)[0]
    averages = [ModelEMA(m) for m in (plain, frugal)]
    for e in averages: e.update()
    for a, b in zip(*(e.module.state_dict().values() for e in averages)): assert torch.equal(a, b)
    x = plain.normalize(batch.images)
    with torch.no_grad(): assert torch.equal(*(e.module(x).raw for e in averages))


def test_an_export_does_not_see_checkpointed_stages():
    plain = detector("yolox-nano").eval().requires_grad_(False)
    frugal = deepcopy(plain)
    checkpoint_stages(frugal)
    graphs = [str(torch.jit.trace(lambda x: m(x).raw, torch.zeros(1, 3, 64, 64)).graph) for m in (plain, frugal)]
    assert graphs[0].count("\n") == graphs[1].count("\n") and graphs[0].count("aten::") == graphs[1].count("aten::")


def test_live_bytes_counts_what_lives():
    kept = torch.ones(100)
    with LiveBytes() as live:
        a = torch.ones(1000)
        view = a[:10]
        b = a + kept.repeat(10)
        kept.add_(1)
        del a, b
        assert live.now == 4000 and live.peak == 12000
        del view
    assert live.now == 0


@pytest.mark.parametrize("effective", [1, 7, 12, 24, 64, 96])
@pytest.mark.parametrize("fixed, each", [(0, 3), (20, 3), (60, 1), (0, 99), (98, 2)])
def test_the_largest_divisor_that_fits_is_found(effective, fixed, each):
    tried = []
    def measure(n):
        tried.append(n)
        return fixed + each * n
    fit = fit_batch(measure, effective, 100)
    fitting = [d for d in divisors(effective) if fixed + each * d <= 100]
    assert fit == BatchFit(max(fitting), {n: fixed + each * n for n in tried}, 100)
    assert len(set(tried)) == len(tried) and all(fixed + each * n <= 100 for n in tried if n > 2), tried


def test_sizes_that_run_out_of_memory_are_given_up():
    tried = []
    def measure(n): # a step at 9: from there the line of the smaller ones is wrong
        tried.append(n)
        return 10 * n if n < 9 else float("inf")
    assert fit_batch(measure, 36, 1000).size == 6 and tried == [1, 2, 4, 6, 12, 9]


def test_one_image_too_much_is_said():
    with pytest.raises(InputError, match=r"one image takes 5\.00 GB of the 4\.00 GB"):
        fit_batch(lambda n: 5e9 * n, 8, 4e9)
    with pytest.raises(InputError, match="one image takes inf"): fit_batch(lambda n: float("inf"), 8, 4e9)


def test_the_line_through_the_last_two():
    assert expected({}, 1) == 0 and expected({1: 30}, 2) == 30 and expected(
        {1: 30, 2: 40, 4: 60}, 8) == 100 and expected({1: 30, 2: 40, 4: float("inf")}, 3) == 50
    assert expected({1: 50, 2: 40}, 4) == 40


def quick(*more): return config(".", "data.input_size=[64,96]", "augment.multiscale=0", *more)


def test_a_trial_measures_real_steps_and_they_lie_on_a_line():
    trial = TrialProcess(quick(), classes=2, boxes=3)
    try:
        total, free = trial.room
        peaks = {n: trial(n) for n in (4, 8, 16, 32)}
    finally: trial.close()
    assert 0 < free < total
    assert list(peaks.values()) == sorted(peaks.values()) and peaks[32] > 1.5 * peaks[8] > 0
    assert expected({n: peaks[n] for n in (8, 16)}, 32) == pytest.approx(peaks[32], rel=.25)


def test_a_trial_that_dies_did_not_fit_and_the_next_one_begins_anew(monkeypatch):
    trial = TrialProcess(quick(), classes=2, boxes=3)
    try:
        os.kill(trial.process.pid, signal.SIGKILL)
        trial.process.wait()
        assert trial(2) == float("inf") and trial.process is None
        assert 0 < trial(1) < 2e9
    finally: trial.close()
    assert trial.process is None


def test_a_trial_that_cannot_begin_says_why():
    cfg = quick()
    cfg.train.device = "cuda:99"
    with pytest.raises(InputError, match="no step can be tried: .*torch sees"): TrialProcess(cfg, classes=2, boxes=3)


def with_share(*words):
    "Settings that keep 15 % of the memory free."
    cfg = quick(*words)
    train = SimpleNamespace(**{**cfg.train.model_dump(), "memory_share": .85})
    made = lambda train: SimpleNamespace(
        train=train, augment=cfg.augment, model_copy=lambda deep: made(deepcopy(train)))
    return made(train)


class Images:
    classes = ("a", "b")
    boxes = (1, 7, 0, 4)
    def __len__(self): return 4
    def boxes_of(self, i): return (np.zeros((self.boxes[i], 4)), np.zeros(self.boxes[i]))


class Fake:
    "Trials on a machine with 100 GB, of which 80 can be had."
    room = (100e9, 80e9)
    said = {}
    each = 4e9
    def __init__(self, cfg, **more): Fake.said = more
    def __call__(self, n): return 20e9 + self.each * n
    def close(self): Fake.said["closed"] = True


def test_the_product_of_batch_and_accumulation_stays(monkeypatch):
    monkeypatch.setattr(memory, "TrialProcess", Fake)
    lines = []
    cfg = with_share("train.batch_size=4", "train.accumulate=6")
    found = auto_batch(cfg, Images(), say=lines.append) # 80 - 15 kept free: 65, of which 45 are for images
    assert (found.train.batch_size, found.train.accumulate) == (8, 3) and (cfg.train.batch_size,
                                                                           cfg.train.accumulate) == (4, 6)
    assert Fake.said == dict(classes=2, boxes=12, local_rank=0, closed=True)
    assert lines == [
        "train.auto_batch: micro-batch 8 x accumulation 3 instead of 4 x 6; measured 1: 24.00 GB, 2: 28.00 GB, 4: 36.00"
        " GB, 8: 52.00 GB; limit 65.00 GB"
    ]
    assert auto_batch(cfg, Images(), held=20e9, say=lines.append).train.batch_size == 6


def test_of_several_processes_the_smallest_counts(monkeypatch):
    monkeypatch.setattr(memory, "TrialProcess", Fake)
    world = SimpleNamespace(size=2, local_rank=1, gather=lambda n: [n, 3])
    cfg = with_share("train.batch_size=4", "train.accumulate=6", "train.device=auto")
    assert auto_batch(cfg, Images(), world=world,
                      say=lambda line: None).train.batch_size == 3 and Fake.said["local_rank"] == 1


def test_boxes_and_sizes_are_the_largest_ones():
    assert usual_boxes(Images(), True) == 12 and usual_boxes(Images(), False) == 7
    # 17 steps of 32, and the nearest aspect
    assert largest_size(config(".", "data.input_size=[384,640]", "augment.multiscale=5")) == (544, 896)
    assert largest_size(quick()) == (64, 96)


@pytest.mark.cuda
def test_the_allocator_of_a_gpu_is_asked():
    cfg = quick("train.device=cuda")
    trial = Trial(cfg, 2, 3)
    few = trial(2)
    many = trial(256)
    assert 0 < few < many < trial.room[0]


LOST = [
    "CUDA error: device-side assert triggered", "CUDA error: unspecified launch failure",
    "CUDA error: an illegal memory access was encountered", "CUDA error: GPU is lost",
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable", "CUDA error: uncorrectable ECC error encountered",
    "CUDA error: the launch timed out and was terminated", "No CUDA-capable device is detected",
    "CUDA error: unknown error", "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`", "cudaErrorDevicesUnavailable"
]
ALIVE = [
    "CUDA out of memory. Tried to allocate 20.00 MiB", "CUDA error: out of memory", "CUDA error: invalid argument",
    "CUDA error: no kernel image is available for execution on the device", "mat1 and mat2 shapes cannot be multiplied",
    "unknown error in the data loader", "CUDA error: invalid configuration argument",
    "Expected all tensors to be on the same device, but found cuda:0"
]


@pytest.mark.parametrize("text", LOST)
def test_a_lost_gpu_is_known(text):
    assert lost_device(RuntimeError(text + "\nCUDA kernel errors might be asynchronously reported"))


@pytest.mark.parametrize("text", ALIVE)
def test_other_errors_are_not_taken_for_a_lost_gpu(text): assert not lost_device(RuntimeError(text))


def test_the_kind_of_the_error_and_its_code_count():
    assert not lost_device(ValueError(LOST[0])) and not lost_device(torch.OutOfMemoryError(
        LOST[0])) and not lost_device(KeyboardInterrupt())
    kind = getattr(torch, "AcceleratorError", RuntimeError)
    error = kind("something new")
    assert not lost_device(error)
    error.error_code = 719
    assert lost_device(error) and lost_device(kind("unspecified launch failure")) is (kind is not RuntimeError)


def test_signals_reach_the_process_on_the_cpu_and_its_failure_is_told(tmp_path, monkeypatch):
    started = []
    before = signal.getsignal(signal.SIGTERM)
    class Child:
        def __init__(self, words, env): started.append((words, env["CUDA_VISIBLE_DEVICES"]))
        def send_signal(self, n): started.append(n)
        def wait(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return code
    monkeypatch.setattr(subprocess, "Popen", Child)
    (tmp_path/"metrics.json").write_text('{"steps": 3}')
    code = 0
    assert continue_on_cpu(tmp_path, "train.threads=1") == {"steps": 3}
    assert started == [([
        sys.executable, "-m", "jetson_det.train", "--out",
        str(tmp_path), "--resume", "train.device=cpu", "train.threads=1"
    ], ""), signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == before
    code = 3
    with pytest.raises(InputError, match="exit code 3"): continue_on_cpu(tmp_path)


def test_every_part_is_in_one_stage_and_none_inside_another():
    for name in ("yolox-nano", "dfine-n"):
        model = detector(name)
        parts = called_parts(model)
        assert not any(a is not b and any(m is b for m in a.modules()) for a in parts.values() for b in parts.values())
        inside = {id(p) for m in parts.values() for p in m.parameters()}
        assert sum(p.numel() for p in model.parameters() if id(p) in inside) > .9*sum(p.numel()
                                                                                      for p in model.parameters())


@pytest.mark.slow
def test_a_training_whose_gpu_is_lost_ends_on_the_cpu_as_if_nothing_had_been(tmp_path, monkeypatch):
    from train_helpers import result_of, scenes

    from jetson_det.train.loop import train
    from jetson_det.train.step import Stepper
    cfg = config(scenes(tmp_path/"data"), "data.input_size=[64,64]", "train.epochs=2", "train.no_aug_epochs=0",
                 "train.trackers=[]")
    step = Stepper.step
    calls = []
    train(cfg, tmp_path/"whole")
    def failing(self, *args, **kw):
        calls.append(1)
        if len(calls) == 3: raise RuntimeError("CUDA error: unspecified launch failure")
        return step(self, *args, **kw)
    monkeypatch.setattr(Stepper, "step", failing)
    with pytest.raises(RuntimeError) as found: train(cfg, tmp_path/"broken")
    assert lost_device(found.value) or lost_device(found.value.__cause__)
    figures = continue_on_cpu(tmp_path/"broken")
    assert figures["epochs"] == 2 and result_of(tmp_path/"broken") == result_of(tmp_path/"whole")


def test_a_training_takes_the_batch_that_fits_and_keeps_it_when_resumed(tmp_path, monkeypatch):
    """config.yaml keeps what was asked for; the loop trains with what fits, and so does a resumed one without
    another trial."""
    from jetson_det.train import memory
    from jetson_det.train.loop import train
    from train_helpers import config, scenes
    from jetson_det.config import load_config
    data = scenes(tmp_path/"data")
    cfg = config(data, "train.auto_batch=true", "train.batch_size=4", "train.accumulate=2", "train.epochs=1")
    class Small:
        room = (100, 100)
        def __init__(self, cfg, **more): pass
        def __call__(self, n): return 30. * n # two images fit into 85
        def close(self): pass
    monkeypatch.setattr(memory, "TrialProcess", Small)
    figures = train(cfg, tmp_path/"run")
    log = (tmp_path/"run"/"log.txt").read_text()
    assert "micro-batch 2 x accumulation 4 instead of 4 x 2" in log and figures["steps"] == 2
    assert load_config(tmp_path/"run"/"config.yaml").train.batch_size == 4
    monkeypatch.setattr(memory, "TrialProcess", None)
    assert train(load_config(tmp_path/"run"/"config.yaml"), tmp_path/"run", resume=True)["steps"] == 2
