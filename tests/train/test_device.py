"""Which device a training takes, on machines with any number of GPUs, and what is said where it is not there."""
from types import SimpleNamespace

import pytest
import torch

from jetson_det.core import InputError
from jetson_det.train.network import pick_device


def world(size=1, local_rank=0): return SimpleNamespace(size=size, local_rank=local_rank)


@pytest.fixture
def gpus(monkeypatch):
    "A function that gives the machine so many CUDA devices."
    def give(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return give


@pytest.mark.parametrize("count, name, ranks, device", [
    (0, "auto", (1, 0), "cpu"), (1, "auto", (1, 0), "cuda"), (4, "auto", (1, 0), "cuda"),
    (4, "cuda:3", (1, 0), "cuda:3"), (1, "cpu", (1, 0), "cpu"), (1, "cuda", (1, 0), "cuda"),
    (2, "auto", (2, 0), "cuda:0"), (2, "cuda", (2, 1), "cuda:1"), (0, "auto", (2, 1), "cpu"),
    (4, "cpu", (2, 1), "cpu"),
])
def test_the_device_of_a_process(gpus, count, name, ranks, device):
    gpus(count)
    assert pick_device(name, world=world(*ranks)) == torch.device(device)


@pytest.mark.parametrize("count, name, ranks, message", [
    (0, "cuda", (1, 0), "train.device: 'cuda' is not there: torch sees 0 CUDA devices; train.device=cpu"),
    (0, "cuda:9", (1, 0), "'cuda:9' is not there: torch sees 0 CUDA devices; train.device=cpu trains without one"),
    (1, "cuda:9", (1, 0), "'cuda:9' is not there: torch sees 1 CUDA device, the first is cuda:0"),
    (2, "cuda:2", (1, 0), "'cuda:2' is not there: torch sees 2 CUDA devices"),
    (1, "auto", (2, 1), "'cuda:1' is not there: torch sees 1 CUDA device"),
    (2, "cuda:0", (2, 0), "cuda:0 is one device; for 2 processes it is auto, cpu or cuda"),
    (0, "mps", (1, 0), "'mps' is not there"), (0, "mps", (2, 0), "mps is one device"),
    (1, "gpu", (1, 0), "'gpu' is unknown; it is auto, cpu, cuda, cuda:N or mps"), (1, "", (1, 0), "'' is unknown"),
    (1, "cuda:x", (1, 0), "unknown"), (1, "cuda:-1", (1, 0), "unknown"), (1, "xla", (1, 0), "unknown"),
    (1, "cuda:99999999999", (1, 0), "train.device"), (1, "cuda\x1b[31m", (1, 0), "unknown"),
])
def test_what_is_not_there_is_one_line(gpus, count, name, ranks, message):
    gpus(count)
    with pytest.raises(InputError) as e: pick_device(name, world=world(*ranks))
    assert message in str(e.value) and str(e.value).isprintable()


def test_half_precision_takes_a_gpu(gpus):
    gpus(0)
    with pytest.raises(InputError, match="fp16 needs a GPU"): pick_device("auto", "fp16")
    gpus(1)
    assert pick_device("auto", "fp16") == torch.device("cuda")
