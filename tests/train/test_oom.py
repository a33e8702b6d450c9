"""A step that does not fit is taken again, in pieces."""
import pytest
import torch
from process_helpers import FROZEN, memory_ends, preload, rank_train, together
from train_helpers import Watch, config, distance, fitted, scenes, state_of

from jetson_det.models.checkpoint import load_checkpoint
from jetson_det.train import loop
from jetson_det.train.data import training_data
from jetson_det.train.loop import Trainer, train
from jetson_det.train.state import TrainingError

pytestmark = pytest.mark.usefixtures("one_thread")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
# 14 to train on (a short last batch), 4 to evaluate
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data"), 18)


@pytest.fixture(scope="module", autouse=True)
def preloaded(): preload()


def flat(out): return torch.cat([v.flatten().float() for _, v in sorted(load_checkpoint(out/"last").weights.items())])


@slow
def test_out_of_memory_in_one_process_is_taken_again_by_all(tmp_path, data):
    cfg = config(data, *FROZEN, "train.accumulate=1", "train.batch_size=4")
    out = tmp_path/"run"
    plain = tmp_path/"plain"
    figures = together(rank_train, 2, cfg, str(out), "memory")
    train(config(data, *FROZEN, "train.accumulate=1", "train.batch_size=8"), plain)
    log = (out/"log.txt").read_text()
    assert figures["steps"] == 4 and log.count(
        "OUT OF MEMORY"
    ) == 1 and "OUT OF MEMORY in step 3: out of memory in another process. The step is repeated" in log
    assert (flat(out) - flat(plain)).norm() < 1e-6 * flat(plain).norm()


@pytest.mark.parametrize("frozen", [True, False])
def test_out_of_memory_is_taken_again_in_halves(tmp_path, data, monkeypatch, frozen):
    """The third backward pass fails, the second of the step; the same samples, from clean gradients and BatchNorm's
    statistics as they were."""
    more = [*FROZEN, "train.batch_size=4", "train.accumulate=2", f"train.freeze_bn={frozen}", "data.workers=1"]
    start, plain, _ = fitted(config(data, *more), str(tmp_path))
    said = []
    watch = Watch()
    backward, calls = memory_ends([4])
    monkeypatch.setattr(loop.Stepper, "backward", backward)
    t = Trainer(config(data, *more),
                training_data(config(data), tmp_path),
                tmp_path/"none",
                callbacks=[watch],
                say=said.append)
    t.fit()
    assert calls == [4, 4, 4, 2, 2, 2, 1, 1, *[2] * 6, 1, 1] and [s.images for s in watch.steps] == [8, 6, 8, 6]
    loud = [s for s in said if s.startswith("OUT OF MEMORY in step 2: CUDA out of memory")]
    assert len(loud) == 1 and "micro-batches of 2 instead of 4" in loud[0] and ("BatchNorm" in loud[0]) == (not frozen)
    if frozen: assert distance(plain, state_of(t), start) < 1e-4
    else: assert int(t.stepper.model.backbone.backbone.stem.conv.bn.num_batches_tracked) == 2 + 4 + 8


def test_out_of_memory_twice_ends_with_advice(tmp_path, data, monkeypatch):
    monkeypatch.setattr(loop.Stepper, "backward", memory_ends(range(1, 99))[0])
    with pytest.raises(TrainingError,
                       match="^CUDA out of memory, with one image at a time, in step 1; a smaller model or input"):
        fitted(config(data), str(tmp_path))
