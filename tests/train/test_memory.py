"""What a lack of memory leaves behind: no dead graph, no old trainer, and one line where it can't be helped."""
import gc
import re
import weakref

import pytest
import torch
from train_helpers import config, distance, fitted, scenes, state_of

from jetson_det.models.zoo import create_model
from jetson_det.train import averages, loop
from jetson_det.train.auto_batch import noise_batch
from jetson_det.train.data import training_data
from jetson_det.train.distill import Distiller
from jetson_det.train.loop import Trainer, train
from jetson_det.train.oom import Pieces, TooLarge, explain_memory, is_out_of_memory
from jetson_det.train.state import TrainingError
from jetson_det.train.step import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")
FROZEN = ["train.freeze_bn=true", "augment.multiscale=0", "data.input_size=[64,64]"]
SHORT = [*FROZEN, "train.epochs=1", "train.no_aug_epochs=0", "train.warmup_epochs=0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data"), 16)


def trainer(data, tmp_path, *more, said=None, callbacks=()):
    cfg = config(data, *SHORT, *more)
    say = (lambda line: None) if said is None else said.append
    ds = training_data(cfg, tmp_path, lambda line: None)
    return Trainer(cfg, ds, tmp_path/"none", callbacks=list(callbacks), say=say)


SAID = ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory\nCUDA kernel errors might be reported later",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"]
OTHERS = ["CUDA error: device-side assert triggered", "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
          "shape '[2]' is invalid for input of size 3"]


@pytest.mark.parametrize("text", SAID)
def test_a_library_without_memory_is_known(text): assert is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize("text", OTHERS)
def test_other_errors_are_no_lack_of_memory(text): assert not is_out_of_memory(RuntimeError(text))


def fails_above(images, text):
    "A backward pass that fails, with what a library says, for more images than these; and the sizes that it was given."
    real, sizes = Stepper.backward, []
    def backward(self, batch, l1):
        sizes.append(len(batch.indices))
        if len(batch.indices) > images: raise RuntimeError(text)
        return real(self, batch, l1)
    return backward, sizes


def test_pieces_are_halved_until_they_fit(data, tmp_path, monkeypatch):
    more = [*SHORT, "train.batch_size=6", "train.accumulate=2"]
    start, plain, _ = fitted(config(data, *more), str(tmp_path))
    backward, sizes = fails_above(1, SAID[0])
    monkeypatch.setattr(Stepper, "backward", backward)
    said = []
    t = trainer(data, tmp_path, "train.batch_size=6", "train.accumulate=2", said=said)
    t.fit()
    assert sizes == [6, 3, 2, *[1] * 12] and distance(plain, state_of(t), start) < 1e-4
    lines = [line for line in said if line.startswith("OUT OF MEMORY in step 1: CUDA error: CUBLAS_STATUS_ALLOC")]
    words = [re.search("micro-batches of . instead of .", line)[0] for line in lines]
    assert words == [f"micro-batches of {b} instead of {a}" for a, b in ((6, 3), (3, 2), (2, 1))]
    assert t.stepper.ema.updates == t.run.step == 1


def test_what_fits_nowhere_ends_in_one_line(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Stepper, "backward", fails_above(0, SAID[1])[0])
    words = "^cuDNN error: CUDNN_STATUS_ALLOC_FAILED, with one image at a time, in step 1; "
    with pytest.raises(TrainingError, match=words):
        trainer(data, tmp_path, "train.batch_size=4").fit()


# ---- behind the gradients

def test_the_first_step_of_the_optimizer_is_taken_again(data, tmp_path, monkeypatch):
    "The memory ends while the averages are made: half of them are there."
    more = ["train.optimizer=adamw", "train.lr=0.0001", "train.batch_size=4", "train.accumulate=3"]
    start, plain, _ = fitted(config(data, *SHORT, *more), str(tmp_path))
    said = []
    t = trainer(data, tmp_path, *more, said=said)
    real, made = torch.zeros_like, []
    def zeros_like(*args, **kw):
        made.append(args)
        if len(made) == 9: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*args, **kw)
    monkeypatch.setattr(torch, "zeros_like", zeros_like)
    t.fit()
    found = [line.partition(".")[0] for line in said if line.startswith("OUT")]
    assert found == ["OUT OF MEMORY in step 1: CUDA out of memory"]
    assert t.run.step == t.stepper.ema.updates == 1 and distance(plain, state_of(t), start) < 1e-4


def test_a_step_that_was_half_taken_ends_in_one_line(data, tmp_path):
    t = trainer(data, tmp_path)
    def step(*args, **kw):
        with torch.no_grad(): next(t.model.parameters()).mul_(2)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    t.stepper.optimizer.step = step
    words = "^CUDA out of memory, in the middle of the optimizer's step, which can't be undone; "
    with pytest.raises(TrainingError, match=words): t.fit()


# ---- in the evaluation

def out_of_memory_in(monkeypatch, calls):
    "The evaluations of these numbers run out of memory."
    real, seen = averages.evaluate_shared, []
    def evaluate(*args, **kw):
        seen.append(len(seen) + 1)
        if seen[-1] in calls: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*args, **kw)
    monkeypatch.setattr(averages, "evaluate_shared", evaluate)
    return seen


def test_an_evaluation_without_memory_is_tried_again_then_left_out(data, tmp_path, monkeypatch, capsys):
    seen = out_of_memory_in(monkeypatch, {1, 3, 4})
    figures = train(config(data, *FROZEN, "train.epochs=2", "train.no_aug_epochs=0"), tmp_path/"run")
    assert len(seen) == 5 and figures["best"]["epoch"] == 1 # once more; not at all; the one of the end
    assert "no evaluation after epoch 2: CUDA out of memory, in the evaluation\n" in capsys.readouterr().out


def test_the_last_evaluation_without_memory_ends_in_one_line(data, tmp_path, monkeypatch):
    out_of_memory_in(monkeypatch, range(1, 99))
    words = "^the trained detector cannot be evaluated on val: CUDA out of memory, in the evaluation$"
    with pytest.raises(TrainingError, match=words):
        train(config(data, *SHORT), tmp_path/"run")
    assert (tmp_path/"run"/"best").is_dir()


def test_a_network_without_room_ends_in_one_line(data, tmp_path, monkeypatch):
    def build(*args, **kw): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(loop, "build_model", build)
    with pytest.raises(TrainingError, match="^CUDA out of memory, before the first step; "):
        train(config(data, *SHORT), tmp_path/"run")
    with pytest.raises(ZeroDivisionError):
        with explain_memory("nowhere"): 1 / 0


# ---- nothing dead is kept

class Token:
    "Lives as long as the graph that it is hung into."
    def __call__(self, grad): return None


class Graphs:
    "References to the graphs of forward passes."
    def __init__(self, monkeypatch):
        self.refs = []
        real = Stepper.backward
        def mark(model, args, outputs):
            token = Token()
            outputs[0].register_hook(token)
            self.refs.append(weakref.ref(token))
        def backward(stepper, batch, l1):
            hook = stepper.model.register_forward_hook(mark)
            try: return real(stepper, batch, l1)
            finally: hook.remove()
        monkeypatch.setattr(Stepper, "backward", backward)

    def alive(self): return sum(ref() is not None for ref in self.refs)


def test_a_step_that_does_not_fit_leaves_no_graph(data, tmp_path, monkeypatch):
    "When smaller pieces begin, all that the failed forward and backward passes have made is gone."
    graphs = Graphs(monkeypatch)
    t = trainer(data, tmp_path, "train.batch_size=4")
    real_loss, alive = t.model.loss, []
    def loss(*args, **kw):
        if len(graphs.refs) == 1:
            assert graphs.alive() == 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real_loss(*args, **kw)
    monkeypatch.setattr(t.model, "loss", loss)
    real = Pieces.use_smaller
    def use_smaller(self, error, *args):
        assert error.__traceback__ is None and error.__context__ is None
        alive.append(graphs.alive())
        return real(self, error, *args)
    monkeypatch.setattr(Pieces, "use_smaller", use_smaller)
    gc.disable()
    try: t.fit()
    finally: gc.enable()
    assert alive == [0] and len(graphs.refs) > 1


def test_a_teacher_keeps_nothing_of_a_step_that_does_not_fit(monkeypatch):
    torch.manual_seed(0)
    graphs = Graphs(monkeypatch)
    model = create_model("yolox-nano", ["a", "b"]).train()
    distiller = Distiller(create_model("yolox-nano", ["a", "b"]), model)
    stepper = Stepper(model, config(".").train, 2, distiller=distiller)
    def losses(*args): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(distiller, "losses", losses)
    failed = False
    try: stepper.step([noise_batch(2, (64, 64), 2, 3)], .01)
    except TooLarge: failed = True
    assert failed and len(graphs.refs) == 1 and graphs.alive() == 0


def test_going_back_lets_go_of_the_old_training_first(data, tmp_path, monkeypatch):
    "A loss that is not finite in step 2: network, average, optimizer and graph are gone when the new one is built."
    graphs = Graphs(monkeypatch)
    old, seen = [], []
    real = loop.build_model
    def build(*args, **kw):
        seen.append((sum(ref() is not None for ref in old), graphs.alive()))
        model = real(*args, **kw)
        old.append(weakref.ref(model))
        old.append(weakref.ref(next(model.parameters())))
        return model
    monkeypatch.setattr(loop, "build_model", build)
    real_backward = Stepper.backward
    def backward(self, batch, l1):
        if len(old) == 2 and not len(seen) > 1:
            old.extend([weakref.ref(self), weakref.ref(self.ema.module), weakref.ref(self.optimizer)])
        figures = real_backward(self, batch, l1)
        if len(graphs.refs) == 3 and len(seen) == 1: figures = {k: v * float("nan") for k, v in figures.items()}
        return figures
    monkeypatch.setattr(Stepper, "backward", backward)
    cfg = config(data, *SHORT, "train.on_nan=rollback", "train.accumulate=2", "train.save_minutes=0.000001")
    figures = train(cfg, tmp_path/"run")
    assert figures["steps"] == 3 and len(old) == 7
    assert seen == [(0, 0), (0, 0)]
