"""A run made before the modules moved still resumes, evaluates and exports, to the same figures.

tests/fixtures/old_run is a pruned YOLOX-nano at 96x128 on four generated scenes, with its checkpoint of step 498 of
500. `expected.json` holds what the code that made it found: the figures of that checkpoint, and norms of the weights
after step 500.
"""
import json
import shutil
from pathlib import Path

import pytest

from jetson_det.cli import main

OLD = Path(__file__).parent / "fixtures" / "old_run"
EXPECTED = json.loads((OLD / "expected.json").read_text())


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A copy of the run and its data, as the working folder."
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluated(artifact):
    "The figures of an artifact on the training split."
    assert main(["evaluate", str(artifact), "--data", "scenes", "--split", "train", "--json", "figures.json"]) == 0
    return json.loads(Path("figures.json").read_text())["stats"]


def test_an_old_checkpoint_evaluates_and_exports(project):
    checkpoint = "run/checkpoints/step-00000498"
    figures = evaluated(checkpoint)
    for name, value in EXPECTED["evaluate"].items():
        assert figures[name] == pytest.approx(value, abs=2e-3), name
    assert main(["export", checkpoint, "--out", "old.onnx"]) == 0
    assert evaluated("old.onnx")["AP"] == pytest.approx(figures["AP"], abs=2e-3)


def test_an_old_run_resumes_to_the_weights_that_it_would_have_found(project):
    from safetensors.torch import load_file
    assert main(["train", "--out", "run", "--resume"]) == 1 # its overfit check is not passed
    want = EXPECTED["resumed"]
    last = project / "run" / "checkpoints" / f"step-{want['step']:08}"
    before = load_file(str(project / "run" / "checkpoints" / "step-00000498" / "weights.safetensors"))
    weights = load_file(str(last / "weights.safetensors"))
    ema = load_file(str(last / "ema.safetensors"))
    for name, norm in want["norms"].items():
        assert float(weights[name].double().norm()) == pytest.approx(norm, rel=1e-4), name
        assert float(ema[name].double().norm()) == pytest.approx(want["ema_norms"][name], rel=1e-4), name
        moved = float((weights[name] - before[name]).double().norm())
        assert moved == pytest.approx(want["moved"][name], rel=.02, abs=1e-6), name
