"`from jetson_det import ...`: the functions themselves, nothing heavy before one is used, a clear line without torch."
import importlib
import subprocess
import sys

import pytest

import jetson_det
from jetson_det.front_door import NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_name_is_the_function(name):
    if name in ("train_detector", "evaluate_detector"): pytest.importorskip("torch")
    row = NAMES[name]
    module = importlib.import_module("jetson_det." + row.module)
    assert getattr(jetson_det, name) is getattr(module, row.function)
    assert name in dir(jetson_det) and callable(getattr(jetson_det, name))


def test_names_hide_no_package():
    "A package of the same name would replace the function once it is imported."
    import pkgutil
    assert not {m.name for m in pkgutil.iter_modules(jetson_det.__path__)} & set(NAMES)


def test_other_names_stay_what_they_are():
    import jetson_det.train as package
    assert jetson_det.train is package and jetson_det.__version__
    with pytest.raises(AttributeError, match="has no attribute 'trian'"): jetson_det.trian
    with pytest.raises(ImportError): exec("from jetson_det import trian")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_nothing_heavy_before_a_name_is_used():
    heavy = {"torch", "numpy", "cv2", "pydantic", "yaml", "typer", "onnxruntime"}
    r = run(f"import sys, jetson_det; dir(jetson_det); print(sorted({heavy!r} & set(sys.modules)))")
    assert r.stdout.strip() == "[]", r
    r = run("import sys; from jetson_det import load_config, read_dataset; print('torch' in sys.modules)")
    assert r.stdout.strip() == "False", r


def test_without_torch_it_says_what_to_install():
    r = run("import sys; sys.modules['torch'] = None\ntry: from jetson_det import train_detector\n"
            "except ImportError as e: print(e)")
    assert 'pip install "jetson_det[train]"' in r.stdout and "torch" in r.stdout, r


def test_a_notebook_shows_an_image_and_settings(tmp_path):
    import cv2
    import numpy as np
    from jetson_det.config import Config, load_config
    from jetson_det.data.formats.registry import read_dataset
    from jetson_det.scenes.docks import write_scenes
    ds = read_dataset(write_scenes(tmp_path/"dock", count=3, size=(700, 1000)))
    shown = cv2.imdecode(np.frombuffer(ds[-1]._repr_jpeg_(), np.uint8), cv2.IMREAD_COLOR)
    assert shown.shape == (448, 640, 3) and ds[0].pixels.shape == (700, 1000, 3) and len(list(ds)) == 3
    with pytest.raises(IndexError, match="there are 3"): ds[3]
    cfg = load_config(None, ["train.epochs=3", "data.path=a<b>c"])
    page = cfg._repr_html_()
    open_part = page[:page.index("<details>")]
    assert "train.epochs" in open_part and "a&lt;b&gt;c" in open_part and "momentum" not in open_part
    assert "momentum" in page
    assert "All settings have their defaults" in Config()._repr_html_()
