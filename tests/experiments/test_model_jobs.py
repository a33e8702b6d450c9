"""The jobs export, quantize and compare: run as they ship, on a small network and generated scenes."""
import json
import subprocess
import sys

import nbformat
import pytest

pytest.importorskip("papermill", reason="the train extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")
from kept import network

from jetson_det.cli import main
from jetson_det.experiments.jobs import JobError, find_job, run_job
from jetson_det.export.onnx import export_onnx
from jetson_det.models.checkpoint import save_checkpoint
from jetson_det.runtime.files import InputError, sha256_file
from jetson_det.scenes.docks import write_scenes

SIZE = (96, 160)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A checkpoint, its ONNX and labeled scenes."
    folder = tmp_path_factory.mktemp("models")
    model = network("yolox-nano")
    save_checkpoint(folder/"run"/"best", model, None, None, {}, model.contract(SIZE, confidence=.4))
    export_onnx(model, folder/"a.onnx", SIZE, confidence=.4)
    write_scenes(folder/"docks", 24, (100, 200), seed=1)
    return folder


def heads(page):
    "The text of the page, and where its result and its code begin."
    html = page.read_text(encoding="utf-8")
    return html, html.index(">Result<"), html.index("<summary>Code</summary>")


@pytest.mark.slow
def test_export(folder, tmp_path):
    values = dict(source=folder/"run", data=folder/"docks", half="true", boxes_px="5")
    page = run_job("export", values, tmp_path/"out")
    metrics = json.loads((tmp_path/"out"/"metrics.json").read_text())
    assert set(metrics["files"]) == {"model.onnx", "model.fp16.onnx"}
    for name, row in metrics["files"].items(): assert row["sha256"] == sha256_file(tmp_path/"out"/name)
    assert metrics["files"]["model.fp16.onnx"]["bytes"] < .6 * metrics["files"]["model.onnx"]["bytes"]
    assert [s["name"] for s in metrics["parity"]["stages"]] == ["checkpoint", "model.onnx", "model.fp16.onnx"]
    html, result, _ = heads(page)
    assert result < html.index("parity holds: model.fp16.onnx") < html.index("<summary>Parameters</summary>")
    assert "data:image/jpeg" in html


@pytest.mark.slow
def test_an_export_beyond_its_bound_fails_with_its_result_on_the_page(folder, tmp_path, capsys):
    words = ["job", "export", "-p", f"source={folder/'run'}", "-p", f"data={folder/'docks'}", "-p", "scores=0", "--out",
             str(tmp_path/"out")]
    assert main(words) == 1 and "parity fails at model.onnx" in capsys.readouterr().err
    assert not json.loads((tmp_path/"out"/"metrics.json").read_text())["parity"]["ok"]
    html = (tmp_path/"out"/"export.html").read_text(encoding="utf-8")
    assert html.index("This job failed") < html.index("parity fails at model.onnx") < html.index(">Export job<")
    assert "Stage by stage" in html


@pytest.mark.slow
def test_quantize(folder, tmp_path):
    values = dict(model=folder/"a.onnx", data=folder/"docks", images=4, max_ap_loss=1., method="minmax")
    page = run_job("quantize", values, tmp_path/"out")
    metrics = json.loads((tmp_path/"out"/"metrics.json").read_text())
    assert metrics["sha256"] == sha256_file(tmp_path/"out"/"int8.onnx") and metrics["quantize"]["quantized"] > 50
    assert [s["kind"] for s in metrics["parity"]["stages"]] == ["fp32", "int8"]
    html, result, _ = heads(page)
    assert result < html.index("int8.onnx (int8) against a.onnx") < html.index("<summary>Parameters</summary>")


@pytest.mark.slow
def test_compare_by_papermill_itself(folder, tmp_path):
    times = tmp_path/"bench.json"
    times.write_text(json.dumps(dict(artifact="a.onnx", model="m", measured_on=dict(device="d"),
                                     stages=dict(inference=dict(p50=1.), total=dict(p50=2.)))))
    given = dict(models=[str(folder/"run"), str(folder/"a.onnx")], data=str(folder/"docks"), resamples=100,
                 times=[str(times)])
    words = [str(find_job("compare")), "out.ipynb", "--no-progress-bar", "-y", json.dumps(given)]
    p = subprocess.run([sys.executable, "-m", "papermill", *words], capture_output=True, text=True, cwd=tmp_path)
    assert p.returncode == 0, p.stderr
    metrics = json.loads((tmp_path/"runs"/"compare"/"metrics.json").read_text())
    assert metrics["pareto"]["front"] == [str(folder/"a.onnx")] and metrics["pareto"]["where"] == "d"
    rows = metrics["comparison"]["rows"]
    assert [row["name"] for row in rows] == given["models"] and abs(rows[1]["difference"]["value"]) < 1e-6
    outputs = [o for c in nbformat.read(str(tmp_path/"out.ipynb"), as_version=4).cells for o in c.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in outputs)


@pytest.mark.parametrize("name, values, message", [
    pytest.param("export", {}, "source: name a checkpoint folder", marks=pytest.mark.slow),
    pytest.param("quantize", {}, "model: INT8 needs it", marks=pytest.mark.slow),
    ("compare", dict(models=["a.onnx", "a.onnx"]), "models: name two or more"),
])
def test_what_is_missing_is_named(name, values, message, tmp_path):
    with pytest.raises(InputError, match=message) as e: run_job(name, values, tmp_path/"out")
    assert "\n" not in str(e.value) and not isinstance(e.value, JobError)
    cells = nbformat.read(str(tmp_path/"out"/f"{name}.ipynb"), as_version=4).cells
    assert message in cells[0].source
