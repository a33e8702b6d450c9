"""Our build and session on the real device-memory module, over PyCUDA or cuda-python and a driver made of malloc; the
engine is played. A program that prints JSON, and leaves its sessions open at the end.

python drive_cuda.py FOLDER KERNELS: the letterbox kernel, compiled for the CPU
"""
import ctypes
import json
import sys
import threading
from pathlib import Path

import numpy as np
import tensorrt_bindings as real
from drive import colors
from trt_recording import FakeTensorRT

from jetson_det.runtime.engine import session as session_module
from jetson_det.runtime.engine.build import build
from jetson_det.runtime.engine.cuda import open_context
from jetson_det.runtime.engine.session import TensorRTSession


class InOrder:
    "Streams of the driver made of malloc: what was queued before the network is done before it."
    def __init__(self, handle=None):
        self.handle = handle
        self.driver = ctypes.CDLL("libcuda.so.1")

    def __getitem__(self, handle): return InOrder(handle)

    def add(self, work):
        assert self.driver.cuStreamSynchronize(ctypes.c_void_p(self.handle)) == 0
        work()


def main(folder, kernels):
    trt = FakeTensorRT(real, colors, dict(images=[1, 3, 32, 64]), dict(boxes=[1, 1, 4], scores=[1, 1, 3]), InOrder())
    cuda = open_context()
    out = dict(backend=cuda.backend)
    made = build(folder / "colors.onnx", folder / "colors.engine", trt=trt, cuda=cuda, root=folder / "no-board")
    out["ok"] = made.ok
    frames = [np.full((64, 128, 3), color, np.uint8) for color in ((230, 20, 40), (10, 200, 30), (40, 60, 250))]
    for kind in ("copied", "pinned", "mapped", "managed"):
        session = TensorRTSession(folder / "colors.engine", memory=kind, trt=trt, cuda=cuda, root=folder / "no-board")
        out[kind] = [d.labels.tolist() for d in session(frames)]
        session.close()
    session = TensorRTSession(folder / "colors.engine", trt=trt, cuda=cuda, root=folder / "no-board")
    out["kinds"] = sorted(session.memory_seconds["input"])
    out["graph"] = session.notes[-1].split(": ", 1)[1]
    found = {}

    def work(number, own):
        found[number] = [d.labels.tolist() for _ in range(20) for d in own([frames[number]])]
    shared = [session.share() for _ in range(3)]
    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(shared)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    out["threads"] = [found.get(number) == [[number]] * 20 for number in range(3)]
    # the letterbox kernel writes the input: the same detections, frames of any size, two sessions at a time
    image = b"cpu:" + kernels.encode()
    measured = TensorRTSession(folder / "colors.engine", letterbox=image, trt=trt, cuda=cuda, root=folder / "no-board")
    out["letterbox"] = measured.notes[-1].split(": ", 1)[1]
    session_module._choose = lambda seconds: list(seconds)[-1] # compiled for the CPU it is not faster
    on_gpu = TensorRTSession(folder / "colors.engine", letterbox=image, trt=trt, cuda=cuda, root=folder / "no-board")
    twin = on_gpu.share()
    rng = np.random.RandomState(0)
    off = 0.
    for size in ((64, 128), (200, 90), (31, 47), (480, 640)):
        noise = rng.randint(0, 256, size + (3,)).astype(np.uint8)
        a, b, c = session(noise), on_gpu(noise), twin(noise[:, ::-1][:, ::-1])
        assert len(a.scores) == len(b.scores) == len(c.scores) > 0 and np.array_equal(b.scores, c.scores)
        off = max(off, np.abs(a.boxes - b.boxes).max(), np.abs(a.scores - b.scores).max())
    out["on GPU"] = [on_gpu.letterbox, twin.letterbox, float(off)]
    on_gpu.close()
    other = open_context()
    late = TensorRTSession(folder / "colors.engine", memory="copied", trt=trt, cuda=other, root=folder / "no-board")
    other.close()
    late.close() # the wrong way round: nothing is left to give back
    print(json.dumps(out), flush=True)


if __name__ == "__main__": main(Path(sys.argv[1]), sys.argv[2])
