"""What a network has learned after the same minutes: YOLO11n from random weights, by our loop and by Ultralytics' own
trainer, each as it trains by itself.

    python bench/bench_train_recipe.py                                    one dataset, one seed, 3 minutes each
    python bench/bench_train_recipe.py --data A B C --seeds 2 --minutes 5

Both get the same images and splits, the same square size and one core: Ultralytics' `YOLO("yolo11n.yaml").train` with
`time=` (its own optimizer, batch, augmentation and schedule), which takes one thread and no workers on a CPU by
itself, and `jetson-det train` with `model.weights=none`, one thread and no workers. Ours has to be told its epochs:
it trains for two and for five of them first, which count for nothing, and the minutes are divided by the time of one.
They run at the same time, each on a core of its own where there are two, and change cores with each seed. The minutes
of both are those of the whole process, with its start, its evaluations and its end.

Then each network is evaluated on the test images twice: by Ultralytics' validator, and by COCO's rules as
`jetson-det evaluate` has them. Exit code 1 if ours has the lower AP by Ultralytics' validator on the mean of the seeds
of a dataset.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
from jetson_det.data.formats.registry import read_dataset, write_dataset  # noqa: E402
from jetson_det.data.quality.check import prepare  # noqa: E402
from jetson_det.data.split import ensure_splits  # noqa: E402
from jetson_det.scenes.docks import write_scenes  # noqa: E402

MODEL = "yolo11n"


def write_data(source, folder):
    "The images of a dataset in three splits, as a YOLO folder that both read."
    ds = prepare(read_dataset(source), max_flawed=1.)[0]
    write_dataset(ensure_splits(ds), folder, "yolo")
    return folder


# ---- one training, in a process of its own
def run(words, core, log):
    "Start a program on a core."
    env = dict(os.environ, OMP_NUM_THREADS="1", YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false",
               YOLO_CONFIG_DIR=str(log.parent))
    cores = {core} & os.sched_getaffinity(0) or os.sched_getaffinity(0)
    return subprocess.Popen(words, env=env, stdout=open(log, "w"), stderr=subprocess.STDOUT,
                            preexec_fn=lambda: os.sched_setaffinity(0, cores))


def our_words(data, out, size, seed, epochs):
    code = "import sys; from jetson_det.cli import main; sys.exit(main())"
    return [sys.executable, "-c", code, "train", "--data", str(data), "--out", str(out), f"model.name={MODEL}",
            "model.weights=none", f"data.input_size={size}x{size}", f"train.seed={seed}", f"train.epochs={epochs}",
            "data.workers=0", "train.threads=1", "train.trackers=[]", "train.report=false"]


def their_words(data, out, size, seed, hours):
    settings = dict(data=str(data/"data.yaml"), imgsz=size, seed=seed, time=hours, project=str(out))
    return [sys.executable, __file__, "--peer", json.dumps(settings)]


def train_theirs(settings):
    "Ultralytics' trainer, in this process."
    bring_nms()
    from ultralytics import YOLO
    YOLO(MODEL + ".yaml").train(pretrained=False, device="cpu", plots=False, verbose=False, name="run", exist_ok=True,
                                **settings)


def bring_nms():
    """Ultralytics suppresses with torchvision, whose compiled part is not there beside a CPU build of torch: OpenCV's
    takes its place, which is compiled too."""
    import cv2
    import torch
    from bench_loader import allow_import_of_torchvision
    allow_import_of_torchvision()
    import torchvision
    if torchvision.extension._has_ops(): return

    def nms(boxes, scores, threshold):
        boxes = boxes.double()
        xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).numpy()
        kept = cv2.dnn.NMSBoxes(xywh, scores.float().numpy(), 0., threshold)
        return torch.as_tensor(kept, dtype=torch.int64).flatten()
    torchvision.ops.nms = nms


def waited(process, log):
    "Wait for a program; its seconds."
    start = time.time()
    if process.wait(): raise SystemExit(f"a training failed:\n{log.read_text()[-3000:]}")
    return time.time() - start


def epoch_seconds(data, folder, size, core):
    "How long an epoch of ours takes beside a training of the peer's, and what the process takes beside epochs."
    times = []
    for epochs in (2, 5):
        log = folder/f"probe{epochs}.log"
        times.append(waited(run(our_words(data, folder/f"probe{epochs}", size, 0, epochs), core, log), log))
    each = (times[1] - times[0]) / 3
    return each, times[0] - 2 * each


# ---- what was learned
def our_tensors(out):
    "Names and values of the averaged weights of our best checkpoint."
    from safetensors.torch import load_file
    return load_file(out/"best/ema.safetensors")


def fill(net, tensors):
    "Put weights into a network; only a constant of the head may be missing."
    left = net.load_state_dict(tensors, strict=False)
    if [key for key in left.missing_keys if "dfl" not in key]: raise SystemExit(f"weights do not fit: {left}")


def validator_figures(tensors, data, size, folder):
    "AP and AP50 on the test images by Ultralytics' validator."
    bring_nms()
    from ultralytics import YOLO
    from ultralytics.nn.tasks import DetectionModel, yaml_model_load
    import yaml
    names = yaml.safe_load((data/"data.yaml").read_text())["names"]
    names = dict(enumerate(names)) if isinstance(names, list) else names
    yolo = YOLO(MODEL + ".yaml")
    net = DetectionModel({**yaml_model_load(MODEL + ".yaml"), "nc": len(names)}, verbose=False)
    fill(net, tensors)
    net.names = names
    net.args = yolo.model.args
    yolo.model = net.eval()
    found = yolo.val(data=str(data/"data.yaml"), split="test", imgsz=size, device="cpu", plots=False, verbose=False,
                     workers=0, project=str(folder), name="val", exist_ok=True)
    return [round(float(found.box.map), 4), round(float(found.box.map50), 4)]


def coco_figures(tensors, data, size):
    "AP and AP50 on the test images by COCO's rules."
    from jetson_det.data.open import open_evaluation
    from jetson_det.evaluate.coco import evaluate
    from jetson_det.models.session import torch_session
    from jetson_det.models.zoo import create_model
    ds = open_evaluation(data, "test", say=lambda line: None)
    model = create_model(MODEL, ds.classes)
    fill(model, tensors)
    stats = evaluate(torch_session(model.eval(), (size, size)), ds, progress=False).stats
    return [round(stats["AP"], 4), round(stats["AP50"], 4)]


def their_tensors(out):
    "Names and values of the network that Ultralytics' trainer calls its best."
    import torch
    saved = torch.load(out/"run/weights/best.pt", map_location="cpu", weights_only=False)  # made a moment ago, here
    net = saved["ema"] or saved["model"]
    return {key: value.float() if value.is_floating_point() else value for key, value in net.state_dict().items()}


# ---- a pair
def pair(data, folder, args, seed, epochs):
    "Both trainings side by side: name -> figures."
    cores = (seed % 2, (seed + 1) % 2)
    outs = {name: folder/f"{name}-{seed}" for name in ("ours", "ultralytics")}
    logs = {name: folder/f"{name}-{seed}.log" for name in outs}
    hours = args.minutes / 60
    words = {"ours": our_words(data, outs["ours"], args.size, seed, epochs),
             "ultralytics": their_words(data, outs["ultralytics"], args.size, seed, hours)}
    started = time.time()
    running = {name: run(words[name], core, logs[name]) for name, core in zip(outs, cores)}
    seconds = {}
    while len(seconds) < 2:
        for name, process in running.items():
            if name in seconds or process.poll() is None: continue
            seconds[name] = time.time() - started
            if process.returncode: raise SystemExit(f"{name} failed:\n{logs[name].read_text()[-3000:]}")
        time.sleep(.2)
    tensors = {"ours": our_tensors(outs["ours"]),
               "ultralytics": their_tensors(outs["ultralytics"])}
    return {name: dict(seconds=round(seconds[name]),
                       validator=validator_figures(tensors[name], data, args.size, folder),
                       coco=coco_figures(tensors[name], data, args.size)) for name in outs}


def arguments():
    home = os.environ.get("JETSON_DET_DATA")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[home + "/datasets/raccoon"] if home else [],
                        help="labeled images; without it and without JETSON_DET_DATA: generated scenes")
    parser.add_argument("--minutes", type=float, default=3.)
    parser.add_argument("--size", type=int, default=320, help="side of the input, pixels")
    parser.add_argument("--seeds", type=int, default=1, help="how many of them")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--peer", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = arguments()
    if args.peer: return train_theirs(args.peer)
    os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}
    rows = []
    missed = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as top:
        os.environ["YOLO_CONFIG_DIR"] = top
        sources = [Path(word) for word in args.data]
        if not sources: sources = [write_scenes(Path(top)/"scenes", 120)]
        for source in sources:
            folder = Path(top)/f"work-{source.name}"
            folder.mkdir()
            data = write_data(source, Path(top)/source.name)
            each, beside = epoch_seconds(data, folder, args.size, 1)
            epochs = max(int((60 * args.minutes - beside) / each), 1)
            print(f"{source.name}: an epoch of ours takes {each:.1f} s, {epochs} of them", flush=True)
            found = []
            for seed in range(args.first_seed, args.first_seed + args.seeds):
                found.append(pair(data, folder, args, seed, epochs))
                for name, figures in found[-1].items():
                    rows.append(dict(data=source.name, seed=seed, trainer=name, epochs=epochs, **figures))
                    print(f"  seed {seed} {name:12} {figures['seconds']:5d} s   Ultralytics' validator AP"
                          f" {figures['validator'][0]:.3f} AP50 {figures['validator'][1]:.3f}   COCO AP"
                          f" {figures['coco'][0]:.3f} AP50 {figures['coco'][1]:.3f}", flush=True)
            ours, theirs = (mean(pair[name]["validator"][0] for pair in found) for name in ("ours", "ultralytics"))
            print(f"  {source.name}: AP {ours:.3f} against {theirs:.3f}", flush=True)
            if ours < theirs: missed.append(f"{source.name}: AP {ours:.3f}, Ultralytics' trainer {theirs:.3f}")
    if args.json: args.json.write_text(json.dumps(rows, indent=1))
    print("missed: " + "; ".join(missed) if missed else "limits held")
    return 1 if missed else 0


if __name__ == "__main__": sys.exit(main())
