"""The share of a training step that goes into assignment, loss and the loss's backward: each family, 15 to 100 boxes.

The long form takes all families at 640 px, some minutes on 2 cores with 8 GB; the short form two of them:

    python bench/bench_train_loss.py
    python bench/bench_train_loss.py --models yolox-nano,yolo11n --boxes 100 --rounds 3

A step is `Stepper.step`: forward, loss, backward, clipping, optimizer and average, in fp32. The loss is measured on the
outputs of the same network in the same round, cut off from it: assignment, loss, and its backward as far as these
outputs. The network is fresh but for some steps on this batch; all have 80 classes, as for COCO. Shares are by the
clock and by processor time (a loss that uses one core of two takes more by the clock); minimum, median, maximum of the
rounds. The exit code is 1 if a median by the clock passes 5 %.
"""
import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import oracles  # noqa: E402
from train_helpers import FAMILIES  # noqa: E402

from jetson_det.config import TrainConfig  # noqa: E402
from jetson_det.data.loader import Batch  # noqa: E402
from jetson_det.models.zoo import create_model  # noqa: E402
from jetson_det.train import allocator  # noqa: E402
from jetson_det.train.step import Stepper  # noqa: E402

MODELS = tuple(FAMILIES)
CLASSES = 80
LIMIT = .05
warnings.filterwarnings("ignore")


def cut_off(outputs, leaves):
    "The same outputs without what made them; those with a gradient are added to `leaves`."
    if isinstance(outputs, torch.Tensor):
        if not outputs.requires_grad: return outputs
        leaves.append(outputs.detach().requires_grad_())
        return leaves[-1]
    if isinstance(outputs, dict): return {k: cut_off(v, leaves) for k, v in outputs.items()}
    if not isinstance(outputs, (tuple, list)): return outputs
    parts = [cut_off(v, leaves) for v in outputs]
    return type(outputs)(*parts) if hasattr(outputs, "_fields") else type(outputs)(parts)


def timed(run):
    "Seconds by the clock and of the processor."
    wall = time.perf_counter()
    cpu = time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def runs_of(name, size, batch, boxes):
    "A whole step, and the loss alone on the outputs that the network gives now."
    model = create_model(name, [str(i) for i in range(CLASSES)]).to(memory_format=torch.channels_last).train()
    stepper = Stepper(model, TrainConfig(), batch)
    at, labels = oracles.random_scene(batch, boxes, (size, size), CLASSES)
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    group = [Batch(images, at, labels, torch.arange(batch))]

    def loss_alone():
        leaves = []
        targets = [at, labels] if model.needs_targets else []
        outputs = cut_off(model(model.normalize(images), *targets), leaves)

        def run():
            for leaf in leaves: leaf.grad = None
            sum(model.loss(outputs, at, labels).sums.values()).backward()
        return run
    return lambda: stepper.step(group, 1e-3), loss_alone


def shares(name, size, batch, boxes, rounds):
    "Of each round: ms of the step and of the loss, and the loss's share by clock and processor."
    step, loss_alone = runs_of(name, size, batch, boxes)
    found = []
    for _ in range(2): step()
    loss_alone()()
    for _ in range(rounds):
        loss = loss_alone()
        loss()  # the cut outputs are warm, as those of a step are
        wall, cpu = timed(step)
        loss_wall, loss_cpu = timed(loss)
        found.append(dict(step=wall * 1e3, loss=loss_wall * 1e3, clock=loss_wall / wall, processor=loss_cpu / cpu))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="separated by commas")
    parser.add_argument("--boxes", default="15,50,100", help="boxes an image, separated by commas")
    parser.add_argument("--size", type=int, default=640, help="side of the input, pixels")
    parser.add_argument("--batch", type=int, default=4, help="images in a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    figures = {}
    missed = []
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    allocator.keep_memory()  # as a training does
    print(f"{args.size} px, batch {args.batch}, {CLASSES} classes, {args.threads} threads, {args.rounds} rounds\n"
          f"{'':18}{'boxes':>6}{'step ms':>10}{'loss ms':>10}    share by the clock: min, median, max   by processor")
    for name in args.models.split(","):
        for boxes in map(int, args.boxes.split(",")):
            rounds = shares(name, args.size, args.batch, boxes, args.rounds)
            figures[f"{name}/{boxes}"] = rounds
            middle = {k: statistics.median(r[k] for r in rounds) for k in rounds[0]}
            clock = [r["clock"] for r in rounds]
            times = f"{middle['step']:10.0f}{middle['loss']:10.1f}"
            by_clock = f"{min(clock):18.1%}{middle['clock']:8.1%}{max(clock):8.1%}"
            print(f"{name:18}{boxes:6}{times}    {by_clock}{middle['processor']:12.1%}", flush=True)
            if middle["clock"] > LIMIT: missed.append(f"{name} at {boxes} boxes: {middle['clock']:.1%} > {LIMIT:.0%}")
    if args.json: Path(args.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    verdict = "MISSED: " + "; ".join(missed) if missed else f"limit held: no step spends over {LIMIT:.0%} on its loss"
    print("\n" + verdict)
    return 1 if missed else 0


if __name__ == "__main__": sys.exit(main())
