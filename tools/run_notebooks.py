"""Run notebooks again and store their outputs.

    python tools/run_notebooks.py nbs/17_data.augment.render.ipynb [...] or a folder

Each one is exported, run from top to bottom in a fresh kernel with its own folder as working directory, cleaned and
written back. A cell that fails stops it; the notebook on disk then keeps its old outputs.
"""
import os
import sys
import time
from pathlib import Path

import nbformat
from execnb.nbio import read_nb, write_nb
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import _nbdev_clean
from nbdev.export import nb_export

REPO = Path(__file__).resolve().parent.parent


def notebooks(words):
    "The notebooks that the words name; job notebooks are left to papermill."
    for word in map(Path, words):
        found = sorted(word.rglob("*.ipynb")) if word.is_dir() else [word]
        yield from (
            f for f in found
            if not {"jobs", ".ipynb_checkpoints"} & set(f.parts[:-1]) and not any(p.startswith("_") for p in f.parts))


def run(path):
    "Run one notebook; True when every cell did."
    start = time.time()
    nb = nbformat.read(path, as_version=4)
    exported = any("default_exp" in c.source for c in nb.cells)
    if exported: nb_export(path, lib_path=REPO / "jetson_det")
    client = NotebookClient(nb, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    try:
        client.execute()
    except CellExecutionError as e:
        print(f"{path}: FAILED\n{str(e)[-3000:]}")
        return False
    sources = lambda book: [(c.cell_type, c.source) for c in book.cells]
    if sources(nbformat.read(path, as_version=4)) != sources(nb):
        print(f"{path}: NOT STORED: the notebook was edited while it ran")
        return False
    nbformat.write(nb, path)
    clean = read_nb(path)
    _nbdev_clean(clean, path=path)
    write_nb(clean, path)
    print(f"{path}: {time.time() - start:.1f} s, {path.stat().st_size / 1024:.0f} KB", flush=True)
    return True


if __name__ == "__main__":
    os.environ["IN_TEST"] = "1"
    words = sys.argv[1:]
    if not words: sys.exit(__doc__)
    sys.exit(0 if all([run(p) for p in notebooks(words)]) else 1)
