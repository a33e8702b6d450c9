"""Several processes: the weights of one, whoever takes which micro-batch."""
import numpy as np
import pytest
import torch
from process_helpers import FROZEN, preload, rank_fitted, together
from train_helpers import Step, config, distance, fitted, scenes

pytestmark = pytest.mark.usefixtures("one_thread")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
# 14 to train on (a short last batch), 4 to evaluate
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data"), 18)


@pytest.fixture(scope="module", autouse=True)
def preloaded(): preload()


def compare(tmp_path, data, processes, more, one, several):
    """A training in one process, (batch, accumulation) `one`, and in several with `several`: state at the start and
    at both ends."""
    cfg = lambda b, a: config(data, *more, f"train.batch_size={b}", f"train.accumulate={a}")
    start, end, steps = fitted(cfg(*one), str(tmp_path))
    theirs = [Step(*s) for s in together(rank_fitted, processes, cfg(*several), str(tmp_path))]
    assert [(s.images, s.normalizers) for s in steps] == [(s.images, s.normalizers) for s in theirs]
    assert len(steps) >= 3 and theirs[-1].batch == -(-14 // several[0])
    assert np.allclose([s.loss for s in steps], [s.loss for s in theirs], rtol=1e-3)
    return start, end, torch.load(tmp_path/"state.pt", weights_only=False)


@pytest.mark.parametrize("processes, one, several", [
    (2, (8, 1), (2, 2)),
    pytest.param(2, (4, 2), (4, 1), marks=slow),
    pytest.param(3, (6, 1), (2, 1), marks=slow)
])
def test_the_same_weights_as_one_process(tmp_path, data, processes, one, several):
    """BatchNorm frozen, clipped, workers: float32 weights and averages after four steps and more, equal to 1e-4 of
    the way they went. Last steps are short."""
    start, alone, shared = compare(tmp_path, data, processes, [*FROZEN, "train.clip=5", "data.workers=1"], one, several)
    assert distance(alone, shared, start) < 1e-4


@slow
@pytest.mark.parametrize("processes, one, several", [(2, (4, 1), (2, 1)), (3, (6, 1), (2, 1))])
def test_batchnorm_learns_from_all_images(tmp_path, data, processes, one, several):
    """Statistics over the processes are those of the joint batch, in a short last step too. Small steps, and loose
    limits: fresh layers over a few pixels magnify rounding, and SimOTA's choices are yes or no; the next test is
    strict."""
    more = [w for w in FROZEN if not w.startswith(("train.freeze_bn", "train.lr_per", "train.epochs"))]
    start, alone, shared = compare(tmp_path, data, processes, [*more, "train.lr_per_image=1e-7", "train.epochs=1"], one,
                                   several)
    assert distance(alone, shared, start, learned=False) < 1e-4
    assert distance(alone, shared, start) < 2e-2
