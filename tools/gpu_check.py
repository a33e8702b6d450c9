"""What only a GPU can show, in under ten minutes: numbers, memory, several processes, speed.

    python tools/gpu_check.py                 on the GPUs of this machine
    python tools/gpu_check.py --cpu           the same code on the CPU: a dry run
    python tools/gpu_check.py --only resume   some of the checks

A table says of each check whether it held, did not hold, or is not possible here, and why. Exit code 1: something did
not hold.
"""
import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8") # for `train.deterministic`; CUDA reads it when it starts
REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO / "tests")]

import torch # noqa: E402
from train_helpers import FAMILIES, config, family_words, installed, result_of, scenes, small_detrs # noqa: E402

from jetson_det.models.checkpoint import list_checkpoints # noqa: E402
from jetson_det.models.zoo import create_model # noqa: E402
from jetson_det.train.auto_batch import Trial, _fit_batch, noise_batch # noqa: E402
from jetson_det.train.launch import launch # noqa: E402
from jetson_det.train.loop import train # noqa: E402
from jetson_det.train.network import freeze_batchnorm # noqa: E402
from jetson_det.train.oom import TooLarge # noqa: E402
from jetson_det.train.optim import gradients # noqa: E402
from jetson_det.train.processes import DistributedWorld, file_store, gpu_of, private_folder # noqa: E402
from jetson_det.train.step import NotFinite, Stepper # noqa: E402
from jetson_det.train.sync_batchnorm import sync_batchnorm # noqa: E402
from jetson_det.train.world import sum_step # noqa: E402

CLASSES = ["Sack", "Person"]


class NotHere(Exception):
    "The check is not possible on this machine. The text says why."


def settings(*words): return config(".", "train.optimizer=sgd", *words)


def stepper_of(name, device, *words, batch=4, frozen=True):
    "A network with fixed weights, ready to take steps."
    torch.manual_seed(0)
    cfg = settings(*family_words(name), "train.optimizer=sgd", "train.clip=0", f"train.batch_size={batch}", *words)
    model = create_model(name, CLASSES).to(device, memory_format=torch.channels_last).train()
    if frozen: freeze_batchnorm(model)
    return Stepper(model, cfg.train, batch)


def step_of(stepper, batch, lr=0.):
    "Loss, and the gradient of all parameters as one vector on the CPU."
    loss = stepper.step([batch], lr).losses["loss"]
    return loss, torch.cat([g.flatten() for g in gradients(stepper.optimizer)]).cpu()


# ---- numbers

# precision -> relative error of the loss, least cosine between the gradients
TOLERANCES = {"fp32": (1e-3, .999), "bf16": (.1, .9), "fp16": (.05, .95)}


def compare(name, precision, device):
    """A forward and backward pass on the device beside the CPU in fp32.

    Random weights let the scores of a DETR's cells nearly tie, and rounding would decide which become queries: both
    passes take the same cells."""
    batch = noise_batch(2, (128, 128), len(CLASSES), 3)
    reference = stepper_of(name, "cpu")
    stepper = stepper_of(name, device, f"train.precision={precision}")
    if hasattr(stepper.model, "best_cells"): share_cells(reference.model, stepper.model)
    loss, grad = step_of(reference, batch)
    other, theirs = step_of(stepper, batch)
    error = abs(other / loss - 1)
    cosine = float(torch.nn.functional.cosine_similarity(grad, theirs, dim=0))
    most, least = TOLERANCES[precision]
    text = f"loss {loss:.4f} and {other:.4f}, cosine {cosine:.5f}"
    assert error <= most and cosine >= least, f"{text}; wanted {most:g} and {least:g}"
    return text


def share_cells(first, second):
    "The second DETR takes the cells that the first one chooses."
    choose = first.best_cells
    chosen = []
    def note(logits):
        chosen.append(choose(logits))
        return chosen[-1]
    first.best_cells = note
    second.best_cells = lambda logits: chosen.pop(0).to(logits.device)


def family_checks():
    "(name, check) for every family in every precision."
    for name in FAMILIES:
        for precision in TOLERANCES:
            def check(device, name=name, precision=precision):
                if not installed(name): raise NotHere("the package of its family is not installed")
                if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
                    raise NotHere("the GPU has no bf16")
                return compare(name, precision, device)
            yield f"{name} {precision}", check


# ---- steps

def scaler(device):
    "fp16: a scale that is far too large sinks; a gradient that is never finite ends it."
    stepper = stepper_of("yolox-nano", device, "train.precision=fp16")
    batch = noise_batch(2, (64, 64), len(CLASSES), 3)
    stepper.scaler.load_state_dict({**stepper.scaler.state_dict(), "scale": 2.**28})
    skipped = 0
    while stepper.step([batch], .001).skipped: skipped += 1
    updates = stepper.ema.updates
    assert 0 < skipped < 20 and updates == 1, f"{skipped} steps skipped, {updates} averaged"
    next(stepper.model.parameters()).register_hook(lambda grad: grad * float("inf"))
    try:
        for _ in range(20): stepper.step([batch], .001)
    except NotFinite as e: return f"{skipped} steps skipped down to a scale of {stepper.scaler.get_scale():g}; {e.what}"
    raise AssertionError("20 steps without a finite gradient, and no error")


def out_of_memory(device):
    "A step of 16 images with room for 6: halved until it fits; the gradient is that of the whole."
    batch = noise_batch(16, (256, 256), len(CLASSES), 3)
    plain = stepper_of("yolox-nano", device, batch=16)
    _, whole = step_of(plain, batch)
    del plain
    stepper = stepper_of("yolox-nano", device, batch=16)
    limit = limit_memory(stepper, device, 6)
    halved = []
    try:
        while True:
            try:
                _, pieces = step_of(stepper, batch)
                break
            except TooLarge as e: message = str(e)
            halved.append(stepper.pieces.use_smaller(TooLarge(message), 16, 1, True))
    finally: limit()
    distance = float((whole - pieces).norm() / whole.norm())
    assert halved and distance < 1e-3, f"{len(halved)} times halved, the gradient differs by {distance:.1e}"
    return f"{len(halved)} times halved ({message}), the gradient differs by {distance:.1e}"


def limit_memory(stepper, device, images):
    "Room for so many images; what is returned takes the limit away."
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        step_of(stepper, noise_batch(images, (256, 256), len(CLASSES), 3))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        step_of(stepper, noise_batch(images, (256, 256), len(CLASSES), 3))
        peak = torch.cuda.max_memory_reserved(device)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(peak / total, device)
        return lambda: torch.cuda.set_per_process_memory_fraction(1., device)
    real = stepper.backward
    def backward(batch, l1): # a CPU's memory has no such limit: what a GPU would say
        if len(batch.indices) > images: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(batch, l1)
    stepper.backward = backward
    return lambda: None


def auto_batch(device):
    "The largest micro-batch of a trial: it fits, and twice as many images are expected not to."
    cfg = settings("data.input_size=[128,128]", "augment.multiscale=0", f"train.device={device.type}")
    trial = Trial(cfg, len(CLASSES), 3)
    first = trial(1)
    limit = trial(8) * 1.05
    fit = _fit_batch(trial, 64, max(limit, first))
    assert fit.size >= 8 and fit.peaks[fit.size] <= fit.limit, str(fit)
    return f"{fit.size} of 64 images in {fit.limit / 1e6:.0f} MB, after {len(fit.peaks)} trials"


# ---- several processes

def rank_normalized(world):
    "In a process: BatchNorm over all processes beside one that sees all images; the largest relative difference."
    device = torch.device("cpu") if world.gpu is None else world.gpu
    torch.manual_seed(0)
    x = torch.randn(8, 3, 6, 5, device=device)
    def run(images, synced):
        torch.manual_seed(1)
        layers = [torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.Sigmoid()]
        net = torch.nn.Sequential(*layers).to(device).train()
        if synced: sync_batchnorm(net, world)
        net(images).square().sum().backward()
        if synced: sum_step(world, list(net.parameters()), {"images": len(images)})
        return [p.grad for p in net.parameters()] + [b for b in net.buffers() if b.is_floating_point()]
    mine = run(x[world.rank::world.size], True)
    whole = run(x, False)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(mine, whole))


def sync_batchnorm_of_two(device):
    "Two processes, each on its GPU (or on the CPU)."
    if device.type == "cuda" and torch.cuda.device_count() < 2: return nccl_alone(device)
    difference = launch(rank_with_gpu, 2, device.type)
    assert difference < 1e-4, f"differs by {difference:.1e}"
    return f"2 processes over {'nccl' if device.type == 'cuda' else 'gloo'}, differs by {difference:.1e}"


def rank_with_gpu(world, kind):
    world.gpu = gpu_of(world.local_rank, world.size) if kind == "cuda" else None
    return rank_normalized(world)


def nccl_alone(device):
    "One GPU: a world of one process over NCCL, its sum, and torch's layer for several."
    from torch.nn.modules._functions import SyncBatchNorm
    gpu = torch.device("cuda", 0)
    folder = private_folder()
    world = DistributedWorld(file_store(folder), 0, 1, 0, gpu=gpu, folder=folder)
    try:
        total = torch.ones(3, device=gpu)
        world.all_sum([total])
        x = torch.randn(4, 3, 5, 5, device=gpu)
        norm = torch.nn.BatchNorm2d(3).to(gpu).train()
        group = torch.distributed.group.WORLD
        mean = norm.running_mean.clone()
        var = norm.running_var.clone()
        ours = SyncBatchNorm.apply(x, norm.weight, norm.bias, mean, var, norm.eps, norm.momentum, group, 1)
        difference = float((ours - norm(x)).abs().max())
    finally: world.close()
    assert total.tolist() == [1., 1., 1.] and difference < 1e-4, f"differs by {difference:.1e}"
    return f"one GPU: 1 process over nccl, differs by {difference:.1e}"


# ---- whole trainings

SHORT = ["train.epochs=3", "data.input_size=[96,96]", "train.trackers=[]", "train.keep=20"]


def quietly(cfg, out, **how):
    "A training whose lines go nowhere."
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere): train(cfg, out, **how)


def resume(device):
    "A training that is cut off in the middle and resumed ends with the same bits."
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        cfg = config(scenes(folder/"data"), *SHORT, f"train.device={device.type}", "train.deterministic=true")
        quietly(cfg, folder/"whole")
        shutil.copytree(folder/"whole", folder/"cut")
        saved = list_checkpoints(folder/"cut")
        for path in saved[len(saved) // 2:]: shutil.rmtree(path)
        for part in ("best", "last"): shutil.rmtree(folder/"cut"/part)
        quietly(cfg, folder/"cut", resume=True)
        torch.use_deterministic_algorithms(False)
        assert result_of(folder/"cut") == result_of(folder/"whole"), "the weights or the figures differ"
        return f"from {saved[len(saved) // 2 - 1].name} to {saved[-1].name}: the same bits"


def rollback(device):
    "Going back to a checkpoint does not take the memory of two trainings."
    if device.type != "cuda": raise NotHere("a CPU's allocator does not say what lives")
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        data = scenes(Path(folder)/"data")
        for broken in (False, True):
            real = Stepper.backward
            calls = []
            def backward(self, *args):
                figures = real(self, *args)
                calls.append(1)
                nan = broken and len(calls) == 6
                return {key: value * float("nan") for key, value in figures.items()} if nan else figures
            Stepper.backward = backward
            try:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
                words = [*SHORT, "model.name=yolox-s", "train.device=cuda", "train.on_nan=rollback"]
                quietly(config(data, *words), Path(folder)/str(broken))
            finally: Stepper.backward = real
            peaks.append(torch.cuda.max_memory_allocated(device) / 1e6)
    text = f"{peaks[0]:.0f} MB at most without, {peaks[1]:.0f} MB with a rollback"
    assert peaks[1] < 1.15 * peaks[0], text
    return text


def marked_tests(device):
    "The tests that need a GPU (marker cuda): augmentation on the device, losses, the allocator."
    if device.type != "cuda": raise NotHere("they need a GPU")
    call = [sys.executable, "-m", "pytest", "tests", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    done = subprocess.run(call, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout.strip().splitlines()[-1]


# ---- speed

def speed(device):
    "Images a second of training steps, in each precision."
    on_gpu = device.type == "cuda"
    name, size, images = ("yolox-s", (640, 640), 16) if on_gpu else ("yolox-nano", (64, 64), 2)
    count = 20 if on_gpu else 2
    figures = []
    for precision in TOLERANCES:
        stepper = stepper_of(name, device, f"train.precision={precision}", batch=images, frozen=False)
        batch = noise_batch(images, size, len(CLASSES), 10)
        for _ in range(3): stepper.step([batch], 0.)
        if on_gpu: torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count): stepper.step([batch], 0.)
        if on_gpu: torch.cuda.synchronize()
        figures.append(f"{precision} {count * images / (time.perf_counter() - start):.0f}")
    return f"{name} at {size[0]}x{size[1]}, {images} images a step: {', '.join(figures)} images/s"


CHECKS = {**dict(family_checks()), "scaler": scaler, "out of memory": out_of_memory, "auto_batch": auto_batch,
          "several processes": sync_batchnorm_of_two, "resume": resume, "rollback": rollback,
          "marked tests": marked_tests, "speed": speed}


def outcome_of(check, device)->tuple: # one of the three words of the table, and what is to be said
    "Run a check."
    try: return "held", check(device)
    except NotHere as e: return "not possible here", str(e)
    except AssertionError as e: return "DID NOT HOLD", str(e)
    except Exception as e: return "DID NOT HOLD", f"{type(e).__name__}: {e}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="a dry run on the CPU")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="checks whose names begin so")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        print("error: torch sees no GPU on this machine; --cpu runs the same code on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if args.cpu else "cuda:0")
    if args.cpu: torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    small_detrs()
    where = "CPU" if args.cpu else f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    print(f"torch {torch.__version__}, {where}", flush=True)
    rows = []
    for name, check in CHECKS.items():
        if args.only and not any(name.startswith(word) for word in args.only): continue
        start = time.perf_counter()
        outcome, text = outcome_of(check, device)
        rows.append(dict(check=name, outcome=outcome, text=text, seconds=round(time.perf_counter() - start, 1)))
        print(f"{name:>24}  {outcome:<17}  {rows[-1]['seconds']:6.1f} s  {text}", flush=True)
    if args.json: args.json.write_text(json.dumps(rows, indent=1))
    counts = {outcome: sum(row["outcome"] == outcome for row in rows)
              for outcome in ("held", "DID NOT HOLD", "not possible here")}
    print(", ".join(f"{n} {outcome}" for outcome, n in counts.items()))
    return 1 if counts["DID NOT HOLD"] else 0


if __name__ == "__main__": sys.exit(main())
