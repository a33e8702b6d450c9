"""Markers: what a test needs beyond a CPU, and the reason printed when that is not here; the order of the files; what
Hypothesis draws."""
import gc
import os
from pathlib import Path

import pytest

# The files that take longest, the longest first (CPU seconds: 50 to 10). Each process of pytest-xdist takes the next
# file when it is done; a long one that comes last would leave the others idle.
LONGEST = """
models/test_families.py export/test_quantize.py experiments/test_jobs.py export/test_bundle.py
models/weights/test_load.py site/test_site.py export/test_onnx_matrix.py data/test_loader.py export/test_mobile.py
cli/test_cli_data.py export/test_int8_pairs.py export/test_latency.py export/test_lint_exports.py
train/test_averages.py train/test_qat.py models/detr/test_detr.py models/test_prune.py train/test_loop.py
export/test_tensorrt.py export/test_half.py evaluate/test_page.py evaluate/test_shared.py train/test_stop.py
train/test_launch.py train/test_run_folder.py export/test_onnx.py export/test_shrink.py export/test_coreml.py
export/test_golden_gate.py cli/test_words.py cli/test_cli_init.py train/test_processes.py train/test_distill.py
train/test_resume.py train/test_family_resume.py models/weights/test_onnx_start.py models/test_fake_quant.py
train/test_auto_batch.py train/test_compile.py data/quality/test_view.py export/test_rewrite.py export/test_ranges.py
export/test_onnx_queries.py models/ultralytics/test_ultralytics.py models/ultralytics/test_yolo26.py
data/augment/test_render.py cli/test_cli.py runtime/engine/test_engine_versions.py
runtime/engine/test_board_check_versions.py export/test_bundle_updates.py runtime/ops/test_board_check.py
runtime/ops/test_audit.py runtime/ops/test_fleet.py
""".split()


def _load_hypothesis_profile():
    """The examples are the same in each run: what an unrelated change meets is not a matter of luck. `make fuzz` draws
    others."""
    try: from hypothesis import settings
    except ImportError: return # the runtime's tests under Python 3.6
    settings.register_profile("same", derandomize=True)
    settings.register_profile("random", print_blob=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


_load_hypothesis_profile() # before the tests' own settings are made, which inherit from it


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk():
    """A third of a small training's time goes into `fsync`, which only a power failure could tell from nothing.
    Programs that a test starts do wait."""
    fsync = os.fsync
    os.fsync = lambda fd: None
    yield
    os.fsync = fsync


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


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"): config.option.loadscopereorder = False # keep the order of `_place`


def _place(item):
    "Of a test's file in the order of the run."
    here = Path(__file__).resolve().parent
    file = Path(str(item.fspath)).resolve()
    name = file.relative_to(here).as_posix() if here in file.parents else ""
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def pytest_collection_modifyitems(config, items):
    items.sort(key=_place)
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--run-slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --run-slow"))
        if item.get_closest_marker("data") and data_dir() is None:
            item.add_marker(pytest.mark.skip(reason="no real data: set JETSON_DET_DATA to its folder"))
        if item.get_closest_marker("cuda") and not _cuda():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session):
    """Garbage is looked for among what the tests make. Each full collection walked through all that was imported, too:
    a tenth of the time of tests that make many objects."""
    if not hasattr(gc, "freeze"): return # Python 3.6
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 10, 10)


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
