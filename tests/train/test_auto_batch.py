"""The largest micro-batch that fits: found with few trials, measured in real steps, kept by a resumed training."""
import os
import signal
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
from train_helpers import config, scenes

from jetson_det.config import load_config
from jetson_det.core import InputError
from jetson_det.models.checkpoint import save_checkpoint
from jetson_det.models.zoo import create_model
from jetson_det.train import auto_batch as fitting
from jetson_det.train.auto_batch import (_BatchFit, Trial, TrialProcess, auto_batch, _expected_peak, _fit_batch,
                                         _largest_size, _usual_boxes)
from jetson_det.train.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("effective", [1, 7, 12, 24, 64, 96])
@pytest.mark.parametrize("fixed, each", [(0, 3), (20, 3), (60, 1), (0, 99), (98, 2)])
def test_the_largest_divisor_that_fits_is_found(effective, fixed, each):
    tried = []
    def measure(n):
        tried.append(n)
        return fixed + each * n
    fit = _fit_batch(measure, effective, 100)
    fitting_sizes = [d for d in range(1, effective + 1) if effective % d == 0 and fixed + each * d <= 100]
    assert fit == _BatchFit(max(fitting_sizes), {n: fixed + each * n for n in tried}, 100)
    assert len(set(tried)) == len(tried) and all(fixed + each * n <= 100 for n in tried if n > 2), tried


def test_sizes_that_run_out_of_memory_are_given_up():
    tried = []
    def measure(n): # a step at 9: from there the line of the smaller ones is wrong
        tried.append(n)
        return 10 * n if n < 9 else float("inf")
    assert _fit_batch(measure, 36, 1000).size == 6 and tried == [1, 2, 4, 6, 12, 9]


def test_one_image_too_much_is_said():
    with pytest.raises(InputError, match=r"one image takes 5\.00 GB of the 4\.00 GB"):
        _fit_batch(lambda n: 5e9 * n, 8, 4e9)
    with pytest.raises(InputError, match="one image takes inf"): _fit_batch(lambda n: float("inf"), 8, 4e9)


def test_the_line_through_the_last_two():
    assert _expected_peak({}, 1) == 0 and _expected_peak({1: 30}, 2) == 30 and _expected_peak(
        {1: 30, 2: 40, 4: 60}, 8) == 100 and _expected_peak({1: 30, 2: 40, 4: float("inf")}, 3) == 50
    assert _expected_peak({1: 50, 2: 40}, 4) == 40


def quick(*more): return config(".", "data.input_size=[64,96]", "augment.multiscale=0", *more)


@pytest.fixture(scope="module")
def trial():
    "The process of two tests; the second kills it."
    process = TrialProcess(quick(), classes=2, boxes=3)
    yield process
    process.close()


def test_a_trial_measures_real_steps_and_they_lie_on_a_line(trial):
    total, free = trial.room
    peaks = {n: trial(n) for n in (4, 8, 16, 32)}
    assert 0 < free < total
    assert list(peaks.values()) == sorted(peaks.values()) and peaks[32] > 1.5 * peaks[8] > 0
    assert _expected_peak({n: peaks[n] for n in (8, 16)}, 32) == pytest.approx(peaks[32], rel=.25)


def test_a_teacher_takes_part_in_the_trials(tmp_path, monkeypatch):
    "Its weights, and its share of a step; the process of the trials has it too."
    teacher = tmp_path/"teacher"
    model = create_model("yolox-nano", ["Sack", "Person"])
    save_checkpoint(teacher, model, None, None, {}, model.contract((64, 96)))
    cfg = quick(f"distill.teacher={teacher}")
    trial = Trial(cfg, classes=2, boxes=3, names=["Sack", "Person"])
    asked = []
    real = trial.stepper.distiller.ask_teacher
    def ask_teacher(images):
        asked.append(len(images))
        return real(images)
    monkeypatch.setattr(trial.stepper.distiller, "ask_teacher", ask_teacher)
    assert trial(2) > 0 and asked == [1, 1, 2]
    lines = []
    cfg.train.batch_size = 2
    cfg.train.accumulate = 1
    auto_batch(cfg, Named(), say=lines.append)
    assert lines[0].startswith("train.auto_batch: micro-batch 2 x accumulation 1")


def test_a_library_without_memory_ends_a_trial_as_torch_does(monkeypatch):
    trial = Trial(quick(), classes=2, boxes=3)
    def step(*args, **kw): raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")
    monkeypatch.setattr(trial.stepper, "step", step)
    assert trial(2) == float("inf")


def test_a_trial_that_dies_did_not_fit_and_the_next_one_begins_anew(trial):
    os.kill(trial.process.pid, signal.SIGKILL)
    trial.process.wait()
    assert trial(2) == float("inf") and trial.process is None
    assert 0 < trial(1) < 2e9 and trial.process is not None
    trial.close()
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
        train=train, augment=cfg.augment, distill=cfg.distill, model_copy=lambda deep: made(deepcopy(train)))
    return made(train)


class Images:
    classes = ("a", "b")
    boxes = (1, 7, 0, 4)
    def __len__(self): return 4
    def boxes_of(self, i): return (np.zeros((self.boxes[i], 4)), np.zeros(self.boxes[i]))


class Named(Images):
    classes = ("Sack", "Person")


class Fake:
    "Trials on a machine with 100 GB, of which 80 can be had."
    room = (100e9, 80e9)
    words = {}
    each = 4e9
    def __init__(self, cfg, **more): Fake.words = more
    def __call__(self, n): return 20e9 + self.each * n
    def close(self): Fake.words["closed"] = True


def test_the_product_of_batch_and_accumulation_stays(monkeypatch):
    monkeypatch.setattr(fitting, "TrialProcess", Fake)
    lines = []
    cfg = with_share("train.batch_size=4", "train.accumulate=6")
    found = auto_batch(cfg, Images(), say=lines.append) # 80 - 15 kept free: 65, of which 45 are for images
    assert (found.train.batch_size, found.train.accumulate) == (8, 3) and (cfg.train.batch_size,
                                                                           cfg.train.accumulate) == (4, 6)
    assert Fake.words == dict(classes=2, boxes=12, local_rank=0, closed=True)
    assert lines == [
        "train.auto_batch: micro-batch 8 x accumulation 3 instead of 4 x 6; measured 1: 24.00 GB, 2: 28.00 GB, 4: 36.00"
        " GB, 8: 52.00 GB; limit 65.00 GB"
    ]
    assert auto_batch(cfg, Images(), held=20e9, say=lines.append).train.batch_size == 6


def test_of_several_processes_the_smallest_counts(monkeypatch):
    monkeypatch.setattr(fitting, "TrialProcess", Fake)
    world = SimpleNamespace(size=2, local_rank=1, gather=lambda n: [n, 3], meet=lambda: None)
    cfg = with_share("train.batch_size=4", "train.accumulate=6", "train.device=auto")
    assert auto_batch(cfg, Images(), world=world,
                      say=lambda line: None).train.batch_size == 3 and Fake.words["local_rank"] == 1


def test_boxes_and_sizes_are_the_largest_ones():
    assert _usual_boxes(Images(), True) == 12 and _usual_boxes(Images(), False) == 7
    # 17 steps of 32, and the nearest aspect
    assert _largest_size((384, 640), 5) == (544, 896)
    assert _largest_size((64, 96), 0) == (64, 96)


@pytest.mark.cuda
def test_the_allocator_of_a_gpu_is_asked():
    cfg = quick("train.device=cuda")
    trial = Trial(cfg, 2, 3)
    few = trial(2)
    many = trial(256)
    assert 0 < few < many < trial.room[0]


def test_a_training_takes_the_batch_that_fits_and_keeps_it_when_resumed(tmp_path, monkeypatch):
    """config.yaml keeps what was asked for; the loop trains with what fits, and so does a resumed one without
    another trial."""
    data = scenes(tmp_path/"data")
    cfg = config(data, "train.auto_batch=true", "train.batch_size=4", "train.accumulate=2", "train.epochs=1")
    class Small:
        room = (100, 100)
        def __init__(self, cfg, **more): pass
        def __call__(self, n): return 30. * n # two images fit into 85
        def close(self): pass
    monkeypatch.setattr(fitting, "TrialProcess", Small)
    figures = train(cfg, tmp_path/"run")
    log = (tmp_path/"run"/"log.txt").read_text()
    assert "micro-batch 2 x accumulation 4 instead of 4 x 2" in log and figures["steps"] == 2
    assert load_config(tmp_path/"run"/"config.yaml").train.batch_size == 4
    monkeypatch.setattr(fitting, "TrialProcess", None)
    assert train(load_config(tmp_path/"run"/"config.yaml"), tmp_path/"run", resume=True)["steps"] == 2
