"""A GPU that is lost is told from other errors, and the training ends on the CPU."""
import os
import signal
import subprocess
import sys

import pytest
import torch
from train_helpers import EACH_STEP, config, result_of, scenes

from jetson_det.core import InputError
from jetson_det.train.loop import train
from jetson_det.train.lost_device import continue_on_cpu, is_device_lost
from jetson_det.train.step import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert is_device_lost(RuntimeError(text + "\nCUDA kernel errors might be asynchronously reported"))


@pytest.mark.parametrize("text", ALIVE)
def test_other_errors_are_not_taken_for_a_lost_gpu(text): assert not is_device_lost(RuntimeError(text))


def test_the_kind_of_the_error_and_its_code_count():
    assert not is_device_lost(ValueError(LOST[0])) and not is_device_lost(torch.OutOfMemoryError(
        LOST[0])) and not is_device_lost(KeyboardInterrupt())
    kind = getattr(torch, "AcceleratorError", RuntimeError)
    error = kind("something new")
    assert not is_device_lost(error)
    error.error_code = 719
    assert is_device_lost(error) and is_device_lost(kind("unspecified launch failure")) is (kind is not RuntimeError)


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


@pytest.mark.slow
def test_a_training_whose_gpu_is_lost_ends_on_the_cpu_as_if_nothing_had_been(tmp_path, monkeypatch):
    cfg = config(scenes(tmp_path/"data"), "data.input_size=[64,64]", "train.epochs=2", "train.no_aug_epochs=0",
                 "train.trackers=[]", *EACH_STEP)
    step = Stepper.step
    calls = []
    train(cfg, tmp_path/"whole")
    def failing(self, *args, **kw):
        calls.append(1)
        if len(calls) == 3: raise RuntimeError("CUDA error: unspecified launch failure")
        return step(self, *args, **kw)
    monkeypatch.setattr(Stepper, "step", failing)
    with pytest.raises(RuntimeError) as found: train(cfg, tmp_path/"broken")
    assert is_device_lost(found.value) or is_device_lost(found.value.__cause__)
    figures = continue_on_cpu(tmp_path/"broken")
    assert figures["epochs"] == 2 and result_of(tmp_path/"broken") == result_of(tmp_path/"whole")
