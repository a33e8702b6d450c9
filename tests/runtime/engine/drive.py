"""One version of TensorRT's real bindings, and our build and session on them: a program that prints JSON. Python 3.6.

python drive.py FOLDER 8.2|8.4|8.5|real: FOLDER holds colors.onnx, open.onnx, colors.golden and images/
"""
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import tensorrt_bindings as real
from trt_bindings import OLDER
from trt_fake_cuda import FakeCuda, FakeDriver
from trt_recording import FakeTensorRT

from jetson_det.runtime.engine.bindings import api_of
from jetson_det.runtime.engine.build import build
from jetson_det.runtime.engine.session import TensorRTSession
from jetson_det.runtime.engine.sidecar import read_sidecar
from jetson_det.runtime.files import InputError

BOX = [8, 4, 24, 28]


def colors(x):
    "The network of colors.onnx: how blue, green and red the image is."
    scores = x.astype(np.float32).mean((2, 3))[:, None] / 255
    return dict(boxes=np.broadcast_to(np.float32(BOX), (len(x), 1, 4)), scores=scores)


def broken(x):
    "An engine that answers less one, as a plugin in FP16 did."
    found = colors(x)
    return dict(found, scores=found["scores"] - 1)


class World:
    "A TensorRT, a GPU and a file system."
    def __init__(self, folder, version, network=colors, batch=1, root=None, **options):
        name, missing = OLDER.get(version, (None, {}))
        self.cuda = FakeCuda((5, 3) if version == "8.2" else (8, 7), "GPU of the test", **options)
        shape = [batch, 3, 32, 64]
        self.trt = FakeTensorRT(real, network, dict(images=shape), dict(boxes=[batch, 1, 4], scores=[batch, 1, 3]),
                                self.cuda.streams, missing, name)
        self.root = root or folder / "no-board"
        self.parts = dict(trt=self.trt, cuda=self.cuda, root=self.root)


def message(call):
    "The text of an InputError or RuntimeError; None where the call works."
    try: call()
    except (InputError, RuntimeError) as e: return str(e)
    return None


def main(folder, version):
    warnings.simplefilter("error")
    out = {}
    touched = set()
    frame = np.full((64, 128, 3), (230, 20, 40), np.uint8)

    def world(*args, **options):
        made = World(folder, version, *args, **options)
        touched_sets.append(made.trt.touched)
        return made
    touched_sets = []

    # build, twice with a timing cache; compared with golden images
    w = world()
    api = api_of(w.trt)
    steps = []
    cache = folder / "timing.cache"
    made = build(folder / "colors.onnx", folder / "colors.engine", timing_cache=cache, workspace=256,
                 report=lambda *row: steps.append(row), **w.parts)
    out["api"] = list(api)
    out["steps"] = steps
    out["built"] = json.loads(json.dumps(made.to_json()))
    out["text"] = str(made)
    out["flags"] = [w.trt.flags, list(w.trt.set_flags)]
    pools = w.trt.config["pools"]
    out["workspace"] = pools.get("WORKSPACE", w.trt.config.get("max_workspace_size"))
    out["cache"] = cache.read_bytes().decode()
    out["alive after build"] = len(w.cuda.alive)
    out["second build"] = build(folder / "colors.onnx", folder / "colors.engine", timing_cache=cache, **w.parts).ok
    (folder / "wrong.cache").write_bytes(b"not a cache")
    out["wrong cache"] = message(lambda: build(folder / "colors.onnx", folder / "wrong.engine",
                                               timing_cache=folder / "wrong.cache", **w.parts))
    sidecar = read_sidecar(folder / "colors.engine")
    out["sidecar"] = [sidecar.parity, sidecar.machine.tensorrt, list(sidecar.machine.compute_capability)]

    # the session, its memory, its graph
    driver = FakeDriver(w.cuda)
    session = TensorRTSession(folder / "colors.engine", driver=driver, **w.parts)
    found = session(frame)
    out["found"] = [found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()]
    made_before = len(w.cuda.made)
    for _ in range(50): session(frame)
    out["made while running"] = len(w.cuda.made) - made_before
    out["many"] = [d.labels.tolist() for d in session([frame, frame[..., ::-1], frame])]
    out["notes"] = list(session.notes)
    out["kinds"] = {side: sorted(seconds) for side, seconds in session.memory_seconds.items()}
    captured = api.cuda_graphs
    if captured:
        session._lane.capture(driver, 1)
        before = driver.launches
        out["graph"] = [session(frame).scores.tolist(), driver.launches - before]
    other = session.share()
    out["shared"] = [other(frame).scores.tolist(), session(frame).scores.tolist()]
    other.close()
    session.close()
    out["alive after sessions"] = [len(w.cuda.alive), driver.alive]
    if captured:
        for name, broken_driver in (("begin", FakeDriver(w.cuda, "begin")), ("end", FakeDriver(w.cuda, "end"))):
            failed = TensorRTSession(folder / "colors.engine", driver=broken_driver, **w.parts)
            out["graph fails: " + name] = [failed.notes[-1], failed(frame).labels.tolist()]
        old_driver = FakeDriver(w.cuda, old=True)
        kept = TensorRTSession(folder / "colors.engine", driver=old_driver, **w.parts)
        kept._lane.capture(old_driver, 1)
        out["graph of CUDA 10"] = kept(frame).labels.tolist()
    for kind in ("copied", "pinned", "mapped", "managed"):
        one = TensorRTSession(folder / "colors.engine", memory=kind, graphs=False, **w.parts)
        out["memory " + kind] = one([frame, frame[..., ::-1]])[1].labels.tolist()
        one.close()
    w.cuda.offers = ()
    none = TensorRTSession(folder / "colors.engine", **w.parts)
    out["mapped not offered"] = sorted(none.memory_seconds["input"])

    # other inputs: bytes as a frame lies in memory, half precision, and the size that an RT-DETR asks for
    def packed(x): return dict(boxes=np.float32([[BOX]]), scores=x.astype(np.float32).mean((1, 2))[:, None] / 255)

    def sized(x, size):
        assert size.tolist() == [[64, 32]]
        return colors(x)
    plain = sidecar.contract
    inputs = dict(images=[1, 3, 32, 64])
    cases = [("half", colors, inputs, dict(images="HALF", scores="HALF"), plain),
             ("size", sized, dict(inputs, size=[1, 2]), dict(size="INT32"), plain)]
    if api.byte_input:
        cases.append(("bytes", packed, dict(images=[1, 32, 64, 3]), dict(images="UINT8"),
                      plain._replace(extra=dict(layout="hwc"))))
    for name, network, shapes, kinds, contract in cases:
        w2 = world(network)
        w2.trt.inputs = shapes
        record = dict(version=w2.trt.version, inputs=shapes, outputs=w2.trt.outputs, kinds=kinds)
        (folder / (name + ".engine")).write_bytes(b"ftrt" + json.dumps(record).encode())
        special = TensorRTSession(folder / (name + ".engine"), contract, **w2.parts)
        out["input: " + name] = [special(f).labels.tolist() for f in (frame, frame[..., ::-1])]

    # an engine of Ultralytics, with its notes in front
    def theirs(x):
        out = np.zeros((1, 6, 168), np.float32)
        out[0, :4, 0] = (16, 16, 16, 24)  # center, size
        out[0, 4:, 0] = (x[0, 2].mean(), x[0, 0].mean())  # blue and red of RGB, 0..1
        return dict(output0=out)
    w2 = world(theirs)
    w2.trt.outputs = dict(output0=[1, 6, 168])
    record = dict(version=w2.trt.version, inputs=dict(images=[1, 3, 64, 128]), outputs=w2.trt.outputs, kinds={})
    told = json.dumps(dict(author="Ultralytics", task="detect", stride=32, imgsz=[64, 128], names={0: "blue", 1: "red"},
                           description="Ultralytics YOLO11n model")).encode()
    plan = b"ftrt" + json.dumps(record).encode()
    (folder / "theirs.engine").write_bytes(len(told).to_bytes(4, "little") + told + plan)
    foreign = TensorRTSession(folder / "theirs.engine", **w2.parts)
    one = foreign(frame)
    out["ultralytics"] = [list(foreign.contract.classes), one.labels.tolist(), one.boxes.tolist()]

    # an engine that answers wrongly is told at the build, and is not opened again
    w = world(broken)
    made = build(folder / "colors.onnx", folder / "broken.engine", **w.parts)
    refusal = message(lambda: TensorRTSession(folder / "broken.engine", **w.parts))
    out["broken"] = [made.ok, made.parity.looks_like, refusal]

    # an open batch
    w = world(batch=-1)
    made = build(folder / "open.onnx", batch=4, **w.parts)
    out["profile"] = w.trt.profile
    opened = TensorRTSession(folder / "open.engine", **w.parts)
    out["open"] = [opened.batch_size, [d.labels.tolist() for d in opened([frame, frame[..., ::-1]] * 3)]]
    out["open shared"] = message(lambda: opened.share())

    # INT8
    w = world()
    out["int8"] = message(lambda: build(folder / "colors.onnx", folder / "int8.engine", "int8", **w.parts))
    w = world()
    out["calibrated"] = message(lambda: build(folder / "colors.onnx", folder / "int8.engine", "int8",
                                              calibration=folder / "images", **w.parts))
    out["calibration"] = [[round(float(v), 3) for v in x.mean((0, 2, 3))] for x in w.trt.calibrated]
    out["calibration flags"] = w.trt.set_flags
    w = world()
    out["fp16"] = message(lambda: build(folder / "colors.onnx", folder / "new/fp16.engine", "fp16", **w.parts))

    # what TensorRT refuses
    w = world()
    w.trt.parser_error = (1, "mean", "ReduceMean", "UNSUPPORTED_NODE: Assertion failed:\n axes")
    out["parser"] = message(lambda: build(folder / "colors.onnx", folder / "never.engine", **w.parts))
    out["never"] = (folder / "never.engine").exists()
    w = world()
    later = FakeTensorRT(real, colors, w.trt.inputs, w.trt.outputs, w.cuda.streams, w.trt.missing, "99.1")
    out["other version"] = message(
        lambda: TensorRTSession(folder / "colors.engine", trt=later, cuda=w.cuda, root=w.root))
    (folder / "colors.engine.json").unlink()
    out["other version, no sidecar"] = message(
        lambda: TensorRTSession(folder / "colors.engine", trt=later, cuda=w.cuda, root=w.root))
    alone = TensorRTSession(folder / "colors.engine", **w.parts)
    out["no sidecar"] = [alone.notes[0], alone(frame).labels.tolist()]

    # on a Nano
    nano = folder / "nano"
    (nano / "proc/device-tree").mkdir(parents=True)
    (nano / "etc").mkdir()
    (nano / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson Nano Developer Kit\0")
    (nano / "proc/meminfo").write_text("MemTotal:        4059272 kB\n")
    (nano / "proc/swaps").write_text("Filename Type Size Used Priority\n")
    (nano / "etc/nv_tegra_release").write_text("# R32 (release), REVISION: 7.1, GCID: 29818004\n")
    w = world(root=nano)
    out["nano int8"] = message(lambda: build(folder / "colors.onnx", folder / "nano8.engine", "int8",
                                             calibration=folder / "images", **w.parts))
    made = build(folder / "colors.onnx", folder / "nano.engine", **w.parts)
    out["nano"] = [made.workspace, made.machine.board, [line for line in made.lines if "swap" in line]]
    for names in touched_sets: touched |= names
    out["touched"] = sorted(touched)
    print(json.dumps(out))


if __name__ == "__main__": main(Path(sys.argv[1]), sys.argv[2])
