"""The noise of denoising queries is another one in each epoch, and a function of seed, epoch and image alone."""
import pytest
import torch
from train_helpers import config, each_family, family_words, fitted, scenes, small_detrs

from jetson_det.train.data import _NO_AUGMENTATION

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = [f"augment.{key}={'null' if value is None else value}" for key, value in _NO_AUGMENTATION.items()]


@pytest.fixture(scope="module")
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data"), 8)


def noise_of(data, tmp_path, monkeypatch, name, *more):
    "A training without augmentation: (epoch, boxes of an image) -> its noisy boxes."
    from jetson_det.models.detr import network
    found = {}
    real = network.denoising_of
    def denoising_of(boxes, labels, size, classes, keys):
        noise = real(boxes, labels, size, classes, keys)
        for box, label, noisy, group in zip(boxes, labels, noise.boxes, noise.group):
            found[keys[1], tuple(box[label >= 0].flatten().tolist())] = noisy[group >= 0]
        return noise
    with monkeypatch.context() as m:
        m.setattr(network, "denoising_of", denoising_of)
        words = ["train.epochs=2", "train.no_aug_epochs=0", "data.input_size=[64,64]", *PLAIN, *more]
        fitted(config(data, *family_words(name), *words), str(tmp_path))
    return found


@pytest.mark.parametrize("name", each_family(["dfine-n"]))
def test_noise_changes_with_the_epoch_and_not_with_the_grouping(data, tmp_path, monkeypatch, name):
    small_detrs(monkeypatch.setitem)
    found = noise_of(data, tmp_path, monkeypatch, name, "train.batch_size=6", "train.accumulate=1")
    assert len(found) == 12 # six images, whose boxes are the same in both epochs
    for epoch, boxes in found:
        if not epoch: assert not torch.equal(found[0, boxes], found[1, boxes])
    other = noise_of(data, tmp_path, monkeypatch, name, "train.batch_size=2", "train.accumulate=3")
    assert found.keys() == other.keys() and all(torch.equal(found[key], other[key]) for key in found)
    seeded = noise_of(data, tmp_path, monkeypatch, name, "train.batch_size=6", "train.seed=1")
    assert found.keys() == seeded.keys() and not any(torch.equal(found[key], seeded[key]) for key in found)
