"""The board check on NVIDIA's real bindings: which claims hold, and which do not where a board breaks them."""
import json
import os
import sys
from pathlib import Path

import fake_cuda
import pytest
from trt_bindings import OLDER, run_with_bindings, stub_libraries

REPO = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
LATER = ("8.6.1", "10.3.0", "11.4.0.106")
VERSIONS = ["8.2"] + [pytest.param(version, marks=pytest.mark.slow) for version in LATER]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory): return stub_libraries(tmp_path_factory.mktemp("libraries"))


@pytest.fixture(scope="module", params=VERSIONS)
def found(request, libraries, tmp_path_factory):
    "(version, board -> check -> (holds, measured))"
    version = request.param
    folder = tmp_path_factory.mktemp("boards") / "work"
    folder.mkdir()
    path = os.pathsep.join([str(REPO), str(REPO / "tests")])
    done = run_with_bindings("8.6.1" if version in OLDER else version, libraries,
                             [HERE / "drive_board_check.py", folder, version if version in OLDER else "real"],
                             sys.executable, None, path)
    assert not done.returncode, done.stderr.decode("utf-8", "replace")[-3000:]
    return version, json.loads(done.stdout.decode().splitlines()[-1])


def test_a_nano_that_keeps_our_claims(found):
    version, out = found
    nano = out["nano"]
    for name in ("driver", "build", "parity", "refusal", "memory", "threads", "latency", "clock", "tegrastats"):
        assert nano[name][0] is True, (name, nano[name])
    assert "parity holds" in nano["build"][1] and "the table has sm_53 for Jetson Nano 4GB" in nano["driver"][1]
    assert "was built by TensorRT 1.2.3.4" in nano["refusal"][1] and "jetson-det build" in nano["refusal"][1]
    assert all(kind in nano["memory"][1] for kind in ("copied", "pinned", "mapped", "managed"))
    assert nano["mapped"][0] in (True, False) and "chosen: " in nano["mapped"][1], "numpy's memory has no claim to keep"
    assert nano["camera"] == [None, "no camera was given (--camera)"]
    assert "every field is known; power 4.50 W, GPU 99 %" in nano["tegrastats"][1]


def test_what_a_version_has_not_is_not_checked(found):
    version, out = found
    major = int(version.split(".")[0])
    graphs = out["nano"]["graphs"]
    assert graphs[0] is (None if version == "8.2" else True), graphs
    assert ("from TensorRT 8.6 on" in graphs[1]) == (version == "8.2")
    if major < 11:
        assert out["nano"]["int8"][0] is True and "INT8" in out["nano"]["int8"][1], "refused on a Nano"
        assert out["orin"]["int8"][0] is True and "parity holds" in out["orin"]["int8"][1]
    else: assert [out[name]["int8"][0] for name in ("nano", "orin")] == [None, None]


def test_what_does_not_hold_is_said(found):
    version, out = found
    assert [row[0] for row in out["wrong answers"].values()][:2] == [False, False]
    assert "after its build it did not find what the reference found" in out["wrong answers"]["parity"][1]
    assert out["another GPU"]["driver"][0] is False and "sm_87" in out["another GPU"]["driver"][1]
    assert out["lost mapped"]["memory"][0] is False
    assert "other detections with mapped" in out["lost mapped"]["memory"][1]
    assert out["no graph"]["graphs"][0] is (None if version == "8.2" else False)
    assert out["new field"]["tegrastats"][0] is False and "not known: ???!" in out["new field"]["tegrastats"][1]
    assert out["orin"]["clock"][0] is False and "the mode promises 1020 MHz" in out["orin"]["clock"][1]
    assert out["orin"]["latency"][0] is False


def test_without_an_engine_nothing_is_claimed(found):
    version, out = found
    for name, (holds, measured) in out["no build"].items(): assert holds is None and "no engine" in measured, name


@pytest.mark.slow
def test_the_checks_on_a_driver_made_of_malloc(libraries, tmp_path):
    "cuda-python unmodified; the letterbox kernel is the real text, compiled for the CPU."
    from jetson_det.runtime.engine.letterbox import LETTERBOX_CU
    packages = fake_cuda.needs(fake_cuda.installed, *fake_cuda.CUDA_PYTHON)
    fake_cuda.needs(fake_cuda.make_driver, tmp_path)
    names = ("letterbox_float", "letterbox_half", "letterbox_bytes")
    kernels = fake_cuda.needs(fake_cuda.compile_for_cpu, tmp_path, LETTERBOX_CU, names)
    path = os.pathsep.join([str(packages), str(REPO), str(REPO / "tests"), str(HERE)])
    done = run_with_bindings("10.3.0", "{}:{}".format(tmp_path, libraries),
                             [HERE / "drive_board_check.py", tmp_path / "work", "malloc", kernels], path=path)
    assert not done.returncode, done.stderr.decode("utf-8", "replace")[-3000:]
    out = json.loads(done.stdout.decode().splitlines()[-1])
    for name in ("build", "parity", "letterbox", "memory", "threads"): assert out[name][0] is True, (name, out[name])
    assert "gray levels at most" in out["letterbox"][1] and "cuda-python" in out["driver"][1]
