"""Markers: what a test needs beyond a CPU, and the reason printed when that is not here."""
import os
from pathlib import Path

import pytest


def pytest_addoption(parser):
    try: parser.addoption("--run-slow", action="store_true", help="run the tests marked slow")
    except ValueError: pass


def data_dir():
    "The folder of real data, or None."
    d = os.environ.get("JETSON_DET_DATA")
    return Path(d) if d and Path(d).is_dir() else None


def _cuda():
    try: import torch
    except ImportError: return False
    return torch.cuda.is_available()


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--run-slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --run-slow"))
        if item.get_closest_marker("data") and data_dir() is None:
            item.add_marker(pytest.mark.skip(reason="no real data: set JETSON_DET_DATA to its folder"))
        if item.get_closest_marker("cuda") and not _cuda():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    "What jetson_det keeps (indexes, facts of images, decoded pixels) goes to a folder of this run alone."
    before = os.environ.get("JETSON_DET_CACHE")
    os.environ["JETSON_DET_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None: del os.environ["JETSON_DET_CACHE"]
    else: os.environ["JETSON_DET_CACHE"] = before


@pytest.fixture
def data():
    "The folder of real data."
    d = data_dir()
    if d is None: pytest.skip("no real data: set JETSON_DET_DATA to its folder")
    return d


@pytest.fixture
def one_thread():
    "Torch on one thread: small tensors gain nothing from more, and tests run side by side."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
