"""The batches of a step that failed, to be looked at."""
import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from callback_helpers import At, with_callbacks
from train_helpers import config, scenes

from jetson_det.train.callbacks import bad_batch
from jetson_det.train.callbacks.bad_batch import SaveBadBatch
from jetson_det.train.data import make_loader, training_data
from jetson_det.train.loop import Trainer, train
from jetson_det.train.state import TrainingError


@pytest.fixture(scope="module")
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data")/"dock")


@pytest.fixture
def failing(tmp_path, data):
    "A trainer, and an error that holds a real batch of it."
    cfg = config(data)
    t = Trainer(cfg, training_data(cfg, tmp_path), tmp_path/"run", callbacks=[], say=(said := []).append)
    batch = next(make_loader(t.train_ds, cfg.data, cfg.augment, cfg.train, first_look=True).epoch(0))
    return t, SimpleNamespace(what="the loss", batches=[batch, batch]), said


def test_the_batch_that_failed_can_be_looked_at(failing):
    t, error, said = failing
    error.batches[0].boxes[0, 0, 2] = float("inf")
    SaveBadBatch().not_finite(t, error)
    folder = t.run.out/"nan"
    batch = error.batches[0]
    assert sorted(
        f.name for f in folder.iterdir()) == [f"step-00000001-{k}.{s}" for k in (1, 2) for s in ("json", "npz", "png")]
    with np.load(folder/"step-00000001-1.npz") as kept:
        for key in batch._fields: np.testing.assert_array_equal(kept[key], getattr(batch, key).numpy())
    facts = json.loads((folder/"step-00000001-1.json").read_text())
    assert facts["images"] == [t.train_ds.paths[i] for i in batch.indices
                               ] and facts["boxes_not_finite"] == 1 and facts["what"] == "the loss"
    h, w = batch.images.shape[2:]
    sheet = cv2.imread(str(folder/"step-00000001-1.png"))
    plain = batch.images[0].numpy().transpose(1, 2, 0)
    assert sheet.shape[1] == 2 * round(w * 320 / max(h, w))
    assert said == [f"the batch is saved in {folder} for inspection"]
    assert (np.abs(cv2.resize(sheet[:, :sheet.shape[1] // 2], (w, h)).astype(int) - plain) > 60).any() # boxes are drawn


def test_no_room_for_the_batch_hides_nothing(failing, monkeypatch):
    t, error, said = failing
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(bad_batch, "write_bytes_atomic", full)
    SaveBadBatch().not_finite(t, error)
    assert len(said) == 1 and "could not be saved for inspection" in said[0] and "No space left" in said[0]


def spoil_weight(t): next(t.stepper.model.head.parameters()).data.fill_(float("inf"))
def spoil_gradient(t): next(t.stepper.model.parameters()).register_hook(lambda g: g * float("nan"))


@pytest.mark.parametrize("spoil, batches", [(spoil_weight, 1), (spoil_gradient, 2)])
def test_the_batches_of_a_step_that_failed_are_kept(tmp_path, data, monkeypatch, spoil, batches):
    with_callbacks(monkeypatch, lambda: At(4, spoil))
    with pytest.raises(TrainingError, match="not finite in epoch 2, step 5") as e: train(config(data), tmp_path/"run")
    files = sorted((tmp_path/"run"/"nan").glob("*.npz"))
    assert [f.name for f in files] == [f"step-00000005-{k}.npz" for k in range(1, batches + 1)]
    names = [n for f in files for n in json.loads(f.with_suffix(".json").read_text())["images"]]
    assert ", ".join(names) == str(e.value).split("images ")[1].split(");")[0]
    assert "for inspection" in (tmp_path/"run"/"log.txt").read_text()
