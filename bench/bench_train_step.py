"""A training step of YOLOX-nano on the CPU, and its label assignment alone: ours against the yolox package (0.3.0).

    python bench/bench_train_step.py [--rounds N] [--json FILE]

A step is forward, loss, backward and SGD for a batch of 8 with 80 classes, from the same weights, on the same images
and boxes: at 416 px with 15 boxes an image, and at 640 px with 50. Both run with 2 threads; ours in the memory layout
it trains in (channels_last), yolox's as it comes. The assignment is measured on the outputs of a network that has
learned something (each point finds the box it lies in, roughly), the same for both. `loss share` is the part of our
step that is spent in assignment, loss and the loss's backward, and has no limit.

Rounds are interleaved (A B A B ...), and a ratio is that of two neighbors of one round: minimum, median, maximum. The
exit code is 1 if a median misses its limit.
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

from jetson_det.models.yolox.anchors import YOLOXOutputs  # noqa: E402
from jetson_det.models.yolox.loss import assign, yolox_loss  # noqa: E402
from jetson_det.models.zoo import create_model  # noqa: E402

BATCH = 8
CLASSES = 80
LIMITS = {"step 416/15": 1.2, "step 640/50": 2., "assignment 640/50": 10.}  # ours must be so many times as fast
warnings.filterwarnings("ignore", category=FutureWarning)  # torch.cuda.amp.autocast, in yolox


def stepper(model, groups, loss_of):
    "One training step, and its seconds."
    optimizer = torch.optim.SGD(groups, lr=1e-4, momentum=.9, nesterov=True)

    def step():
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss_of(model).backward()
        optimizer.step()
        return time.perf_counter() - start
    return step


def steps(size, n):
    "The steps of both on one batch."
    boxes, labels = oracles.random_scene(BATCH, n, (size, size), CLASSES)
    targets = oracles.yolox_targets(boxes, labels)
    x = torch.rand(BATCH, 3, size, size) * 255
    theirs = oracles.yolox_model("yolox-nano", CLASSES)
    ours = create_model("yolox-nano", [str(i) for i in range(CLASSES)])
    ours.load_state_dict(theirs.state_dict())
    ours = ours.to(memory_format=torch.channels_last)
    rows = x.to(memory_format=torch.channels_last)
    def our_loss(model): return model.loss(model(rows), boxes, labels).total
    def their_loss(model): return model(x, targets)["total_loss"]
    return {"ours": stepper(ours, ours.param_groups(), our_loss),
            "yolox": stepper(theirs, theirs.parameters(), their_loss)}


def timed(call):
    "The call, as one that returns its seconds."
    def run():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    return run


def assigners(size, n):
    "The assignment alone of both, on the same outputs."
    boxes, labels = oracles.random_scene(BATCH, n, (size, size), CLASSES)
    outputs = oracles.plausible_outputs(boxes, labels, (size, size), CLASSES)
    targets = oracles.yolox_targets(boxes, labels)
    head = oracles.yolox_model("yolox-nano", CLASSES).head
    spent = [0.]
    inner = head.get_assignments

    def watched(*args, **kwargs):
        start = time.perf_counter()
        found = inner(*args, **kwargs)
        spent[0] += time.perf_counter() - start
        return found
    head.get_assignments = watched

    def theirs():
        spent[0] = 0.
        with torch.no_grad(): oracles.yolox_loss(head, outputs, targets, False)
        return spent[0]
    return {"ours": timed(lambda: assign(outputs, boxes, labels)), "yolox": theirs}


def loss_alone(size, n):
    "Assignment, loss and its backward as far as the head's outputs."
    boxes, labels = oracles.random_scene(BATCH, n, (size, size), CLASSES)
    outputs = oracles.plausible_outputs(boxes, labels, (size, size), CLASSES)
    leaves = [t.requires_grad_() for t in outputs[:3]]

    def run():
        loss = yolox_loss(YOLOXOutputs(*leaves, outputs.grids), boxes, labels)
        torch.autograd.grad(loss.total, leaves)
    return timed(run)


def interleave(runs, rounds):
    "Seconds of each run in each round, after one round that does not count."
    found = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            seconds = run()
            if i: found[name].append(seconds)
    return found


def report(name, found, figures):
    "Print the times and ratios of one case and keep them in `figures`; True where the limit is held."
    for peer, seconds in found.items():
        low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
        print(f"{name:18} {peer:15} {low*1e3:9.1f} {middle*1e3:9.1f} {high*1e3:9.1f}")
    ratios = [theirs/ours for ours, theirs in zip(found["ours"], found["yolox"])]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    limit = LIMITS[name]
    held = middle >= limit
    figures[name] = {"ms": {peer: [round(v*1e3, 2) for v in seconds] for peer, seconds in found.items()},
                     "times as fast": {"min": low, "median": middle, "max": high, "limit": limit}}
    print(f"{name:18} ours is {middle:.2f} times as fast (min {low:.2f}, max {high:.2f}; limit {limit:g}:"
          f" {'ok' if held else 'MISSED'})")
    if "our loss alone" in found:
        share = statistics.median(loss/step for step, loss in zip(found["ours"], found["our loss alone"]))
        figures[name]["loss share"] = share
        print(f"{name:18} loss share {share:.1%}")
    return held


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    if oracles.yolox() is None: parser.error(oracles.MISSING)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    figures = {"torch": torch.__version__, "threads": args.threads, "rounds": args.rounds}
    held = []
    print(f"batch {BATCH}, {CLASSES} classes, {args.threads} threads, {args.rounds} rounds; ms (min, median, max)")
    for name, make, size, n in (("step 416/15", steps, 416, 15), ("step 640/50", steps, 640, 50),
                                ("assignment 640/50", assigners, 640, 50)):
        runs = make(size, n)
        if make is steps: runs["our loss alone"] = loss_alone(size, n)
        held.append(report(name, interleave(runs, args.rounds), figures))
    if args.json: Path(args.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 0 if all(held) else 1


if __name__ == "__main__": sys.exit(main())
