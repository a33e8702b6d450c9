"""The evaluation job as it ships: the decision at the top, figures for programs, and the page to send."""
import json
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("papermill", reason="the train extra is not installed")
from audit_sets import write_set

from jetson_det.experiments.jobs import run_job
from jetson_det.runtime.files import InputError

COLORS = Path(__file__).parents[1] / "fixtures" / "colors.onnx"


def test_an_evaluation_leaves_its_decision_figures_and_page(tmp_path):
    data = write_set(tmp_path / "set", 12).parent
    values = {"artifact": str(COLORS), "data": str(data), "resamples": 100, "split": "all"}
    page = run_job("evaluate", values, tmp_path / "run")
    assert page.name == "evaluate.html"
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["images"] == 12 and metrics["intervals"]["resamples"] == 100 and isinstance(metrics["advice"], list)
    assert metrics["intervals"]["stats"][0]["value"] == pytest.approx(metrics["stats"]["AP"])
    assert metrics["bytes"] == COLORS.stat().st_size and metrics["board"] is None
    text = (tmp_path / "run/report.html").read_text()
    assert text.index("What to do next") < text.index("<table>") and "default-src 'none'" in text
    shown = page.read_text(encoding="utf-8")
    assert shown.index("Result") < shown.index("What to do next") < shown.index("The artifact and the images")
    cells = nbformat.read(str(tmp_path / "run/evaluate.ipynb"), as_version=4).cells
    outputs = [o for c in cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert sum("image/jpeg" in o.get("data", {}) or "image/png" in o.get("data", {}) for o in outputs) >= 5


@pytest.mark.slow
def test_what_is_missing_is_said_in_one_line(tmp_path):
    with pytest.raises(InputError, match="artifact: an evaluation needs it"): run_job("evaluate", {}, tmp_path / "a")
    with pytest.raises(InputError, match="data: an evaluation needs it"):
        run_job("evaluate", {"artifact": str(COLORS)}, tmp_path / "b")
    with pytest.raises(InputError, match="orin-nano"):
        run_job("evaluate", {"artifact": str(COLORS), "data": str(tmp_path), "board": "orin-nono"}, tmp_path / "c")
