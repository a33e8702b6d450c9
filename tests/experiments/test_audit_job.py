"""The audit job as it ships: the first audit makes the baseline, a later one alarms, and both leave their figures."""
import json
from pathlib import Path

import nbformat
import onnx
import pytest

pytest.importorskip("papermill", reason="the train extra is not installed")
from audit_sets import write_set

from jetson_det.experiments.jobs import JobError, run_job
from jetson_det.runtime.contract import METADATA_KEY
from jetson_det.runtime.files import InputError
from jetson_det.runtime.ops.audit import run_audit
from jetson_det.runtime.sessions import open_session

COLORS = Path(__file__).parents[1] / "fixtures" / "colors.onnx"


def worse(path):
    "The same network, told that its input is RGB: it takes blue for red."
    model = onnx.load(str(COLORS))
    for row in model.metadata_props:
        if row.key == METADATA_KEY: row.value = json.dumps(dict(json.loads(row.value), color="rgb"))
    onnx.save(model, str(path))
    return str(path)


def test_an_alarm_fails_the_job_and_leaves_its_figures(tmp_path):
    data = write_set(tmp_path / "set", 8)
    keep = tmp_path / "audits"
    shipped = run_audit(open_session(str(COLORS)), data, save_baseline=tmp_path / "baseline.json", out=keep, draws=50)
    (tmp_path / "baseline.json").rename(keep / "baseline.json")
    values = {"artifact": worse(tmp_path / "worse.onnx"), "data": str(data), "keep": str(keep), "draws": 50}
    with pytest.raises(JobError, match=r"job audit, cell 8 of 8 \(Alarm\): RuntimeError: ALARM: AP -0\."):
        run_job("audit", values, tmp_path / "run")
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["alarm"] and metrics["comparison"]["ap"] == shipped.result.AP > metrics["AP"] + .1
    assert len((keep / "history.jsonl").read_text().splitlines()) == 2
    cells = nbformat.read(str(tmp_path / "run/audit.ipynb"), as_version=4).cells
    assert any("image/png" in o.get("data", {}) for c in cells if c.cell_type == "code" for o in c.outputs)


@pytest.mark.slow
def test_the_first_audit_is_the_baseline_and_the_second_finds_nothing(tmp_path):
    values = {"artifact": str(COLORS), "data": str(write_set(tmp_path / "set", 8)), "keep": str(tmp_path / "audits"),
              "draws": 50}
    for number in range(2):
        page = run_job("audit", values, tmp_path / "run{}".format(number))
        assert page.name == "audit.html"
    metrics = json.loads((tmp_path / "run1/metrics.json").read_text())
    assert not metrics["alarm"] and metrics["comparison"]["loss"] == 0
    assert sorted(f.name for f in (tmp_path / "audits").iterdir()) == ["audit.json", "baseline.json", "history.jsonl"]
    with pytest.raises(InputError, match="data: an audit needs it"): run_job("audit", {"artifact": str(COLORS)},
                                                                             tmp_path / "none")
