"""Keep the record of a training for the pages of the families: python tools/store_run.py RUN NAME

Of the run folder RUN, nbs/families/curves/NAME gets the table of epochs, the figures, the last lines of the log and the
settings that differ from the defaults; paths of the machine stay out.
"""
import json
import shutil
import sys
from pathlib import Path

from jetson_det.config import Config, load_config
from jetson_det.config_tools import diff_configs

CURVES = Path(__file__).resolve().parent.parent / "nbs" / "families" / "curves"


def store(run, name):
    "Write the record; what is there already is replaced."
    out = CURVES / name
    figures = json.loads((run / "metrics.json").read_text())
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shutil.copy(run / "metrics.csv", out / "metrics.csv")
    (out/"metrics.json").write_text(
        json.dumps({k: figures[k]
                    for k in ("epochs", "steps", "seconds", "peak_memory_mb", "best")
                    if k in figures},
                   indent=1) + "\n")
    known = {"data.path": "bccd", "model.weights": lambda v: Path(v).name}
    words = []
    for c in diff_configs(Config(), load_config(run / "config.yaml")):
        value = known.get(c.key, c.b)
        words.append(f"{c.key}={value(c.b) if callable(value) else value}")
    (out / "settings.txt").write_text("\n".join(words) + "\n")
    log = [line[20:] for line in (run / "log.txt").read_text().rstrip("\n").split("\n")]
    first = max(i for i, line in enumerate(log) if line == "test:")
    (out / "log.txt").write_text("\n".join(log[first:-1] + [log[-1].rpartition(";")[0]]) + "\n")
    env = json.loads((run / "environment.json").read_text())
    (out/"machine.txt"
     ).write_text(f"torch {env['torch']}, {env['machine']}, {env['cpus']} cores; data {env['data']['fingerprint']}\n")


if __name__ == "__main__":
    if len(sys.argv) != 3: sys.exit(__doc__)
    store(Path(sys.argv[1]), sys.argv[2])
