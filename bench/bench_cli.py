"""How long a newcomer waits for the first answer: `jetson-det --help` against the floors and peers, in fresh processes.

python bench/bench_cli.py [--repeats 9]
"""
import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent
COMMANDS = {
    "jetson-det --help": [str(BIN / "jetson-det"), "--help"],
    "bare python": [sys.executable, "-c", "pass"],
    "import numpy": [sys.executable, "-c", "import numpy"],
    "import torch": [sys.executable, "-c", "import torch"],
    "yolo help (ultralytics)": [str(BIN / "yolo"), "help"],
}


def seconds(command):
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    commands = {k: c for k, c in COMMANDS.items() if Path(c[0]).exists()}
    times = {k: [] for k in commands}
    for r in range(repeats + 1):
        for name, command in commands.items():
            t = seconds(command)
            if r: times[name].append(t)
    ours = statistics.median(times["jetson-det --help"])
    print(f"{'':28} {'min':>7} {'median':>7} {'max':>7}  x ours")
    for name, ts in times.items():
        print(
            f"{name:28} {min(ts):7.3f} {statistics.median(ts):7.3f} {max(ts):7.3f}  {statistics.median(ts) / ours:.2f} "
            "  (seconds)"
        )
    print(f"limit 0.4 s: {'held' if ours < .4 else 'MISSED'} at {ours:.3f} s")


if __name__ == "__main__":
    main()
