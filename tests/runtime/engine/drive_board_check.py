"""The board check on one version of TensorRT's real bindings, with boards that keep our claims and boards that break
them: a program that prints JSON. Python 3.6.

python drive_board_check.py FOLDER 8.2|8.4|8.5|real
python drive_board_check.py FOLDER malloc KERNELS: on the driver made of malloc
"""
import json
import sys
from pathlib import Path

import numpy as np
import tensorrt_bindings as real
from board_files import NANO, ORIN, fake_tegrastats, make_board, nano_line
from trt_bindings import OLDER
from trt_fake_cuda import FakeCuda, FakeDriver
from trt_recording import FakeTensorRT

from jetson_det.runtime.engine import session as session_page
from jetson_det.runtime.engine.cuda import open_context
from jetson_det.runtime.ops.board_check import CheckJob, GpuParts, check_here
from jetson_det.runtime.ops.check_network import check_answers, write_check_network

NAMES = ("driver", "build", "parity", "refusal", "memory", "mapped", "threads", "graphs", "int8", "latency", "clock",
         "tegrastats", "camera")


def right(x): return dict(zip(("boxes", "scores"), check_answers(x.astype(np.float32))))


def broken(x):
    found = right(x)
    return dict(found, scores=found["scores"] - 1)


class LostMapped(FakeCuda):
    "Once it loses, the CPU never sees what the GPU writes into mapped memory."
    loses = False

    def _host(self, kind, shape, dtype, pointer):
        made = FakeCuda._host(self, kind, shape, dtype, pointer)
        self.kept = getattr(self, "kept", []) + [made]
        if self.loses and kind == "mapped":
            made.elsewhere = np.zeros(shape, dtype)
            made._pointer = made.elsewhere.ctypes.data
        return made


def world(folder, version, network=right, capability=(5, 3), files=NANO, cuda_type=FakeCuda, graph_fails="",
          lines=(nano_line(),), predicted=None, **changes):
    name, missing = OLDER.get(version, (None, {}))
    cuda = cuda_type(capability, "GPU of the test")
    shapes = dict(images=[1, 3, 320, 320]), dict(boxes=[1, 100, 4], scores=[1, 100, 3])
    trt = FakeTensorRT(real, network, shapes[0], shapes[1], cuda.streams, missing, name)
    folder.mkdir()
    root = make_board(folder / "root", files, **changes)
    onnx = write_check_network(folder)
    job = CheckJob(str(folder), str(onnx), str(onnx.with_suffix(".golden")), predicted=predicted, seconds=.1,
                   tegrastats=fake_tegrastats(folder, lines), root=str(root))
    return job, GpuParts(trt, cuda, FakeDriver(cuda, graph_fails))


def outcomes(names, job, parts):
    return {name: list(check_here(name, job, parts))[:2] for name in names}


def main(folder, version):
    session_page._MOST_RUNS = 3 # of each kind of memory: which is the fastest is no matter here
    out = {}
    slow = dict(ms=1., low=0., high=1e4, evidence="")
    out["nano"] = outcomes(NAMES, *world(folder / "nano", version, predicted=slow, cur_freq="921600000\n"))
    out["orin"] = outcomes(("driver", "build", "int8", "clock", "latency"), *world(
        folder / "orin", version, capability=(8, 7), files=ORIN, predicted=dict(slow, high=1e-6)))
    out["wrong answers"] = outcomes(("build", "parity", "memory"), *world(folder / "wrong", version, broken))
    out["another GPU"] = outcomes(("driver", ), *world(folder / "other", version, capability=(8, 7)))
    job, parts = world(folder / "lost", version, cuda_type=LostMapped)
    assert check_here("build", job, parts).holds
    parts.cuda.loses = True
    out["lost mapped"] = outcomes(("memory", ), job, parts)
    out["no graph"] = outcomes(("build", "graphs"), *world(folder / "graph", version, graph_fails="end"))
    out["new field"] = outcomes(("tegrastats", ), *world(
        folder / "field", version, lines=[nano_line() + " ???!"]))
    out["no build"] = outcomes(("parity", "threads", "refusal", "clock"), *world(folder / "none", version))
    print(json.dumps(out))


def on_malloc(folder, kernels):
    "The real device-memory module, the real letterbox; the engine is played."
    from drive_cuda import InOrder
    folder.mkdir()
    job, parts = world(folder / "malloc", "real")
    trt = FakeTensorRT(real, right, parts.trt.inputs, parts.trt.outputs, InOrder())
    parts = GpuParts(trt, open_context(), kernel=b"cpu:" + kernels.encode())
    print(json.dumps(outcomes(("driver", "build", "parity", "letterbox", "memory", "threads"), job, parts)))


if __name__ == "__main__":
    if sys.argv[2] == "malloc": on_malloc(Path(sys.argv[1]), sys.argv[3])
    else: main(Path(sys.argv[1]), sys.argv[2])
