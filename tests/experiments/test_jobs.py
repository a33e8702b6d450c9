"""The jobs as they ship: run by papermill for real, small, and inside the wheel."""
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("papermill", reason="the train extra is not installed")
from click.testing import CliRunner
from papermill.cli import papermill

from jetson_det.experiments.jobs import (JobError, check_parameters, describe_job, find_job, job_parameters, list_jobs,
                                         run_job, write_page)
from jetson_det.cli import main
from jetson_det.runtime.files import InputError, sha256_file
from jetson_det.train.run_folder import hold_run

REPO = Path(__file__).resolve().parents[2]
OVERRIDES = [
    "data.workers=0", "train.threads=1", "augment.multiscale=0", "train.warmup_epochs=0", "train.no_aug_epochs=0",
    "train.report=false"
]
TINY = {
    "weights": "none",
    "scenes": 20,
    "scene_size": [96, 128],
    "epochs": 1,
    "batch_size": 4,
    "input_size": [64, 96],
    "frames": 2,
    "repeats": 1,
    "overrides": OVERRIDES,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "The training job, once for all tests of this file; run from another folder than the repository's."
    folder = tmp_path_factory.mktemp("caller")
    before = os.getcwd()
    os.chdir(folder)
    try: return run_job("train", TINY, "run")
    finally: os.chdir(before)


def outputs(notebook):
    "Everything that the cells of an executed notebook printed or showed, and the kinds of it."
    nb = nbformat.read(str(notebook), as_version=4)
    found = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    return "".join(o.get("text", "") for o in found), {k for o in found for k in o.get("data", {})}


def test_training_job_leaves_its_report(trained):
    run = trained.parent
    assert {"train.ipynb", "train.html", "metrics.json"} <= {f.name for f in run.iterdir()}
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["checkpoint"]) >= {"AP", "AP50"}
    assert metrics["onnx"]["AP"] == pytest.approx(metrics["checkpoint"]["AP"], abs=1e-3)
    assert metrics["split"] == "test" and metrics["images"] == 2
    assert metrics["latency_ms"]["total"]["p50"] > 0
    artifact = run / metrics["artifact"]
    assert artifact.suffix == ".onnx" and metrics["sha256"] == sha256_file(artifact)
    text, kinds = outputs(run / "train.ipynb")
    assert "image/png" in kinds and "nan" not in text.lower().split()


def test_the_folder_of_a_job_is_that_of_a_training(trained, tmp_path, capsys):
    "All verbs that take a run take it, and what the job has found stays."
    run = trained.parent
    assert {"best", "last", "checkpoints", "config.yaml", "metrics.csv", "log.txt"} <= {f.name for f in run.iterdir()}
    assert not (run / "training").exists()
    image = next((run / "scenes").rglob("*.jpg"))
    copy = shutil.copytree(run, tmp_path / "copy")
    verbs = [
        ["evaluate", run, "--data", run / "scenes"],
        ["export", run, "--out", tmp_path / "a.onnx"],
        ["predict", run, image, "--out", tmp_path / "predictions"],
        ["lineage", run],
        ["verify", run],
        ["train", "--out", copy, "--resume"],
        ["rollback", copy],
    ]
    for words in verbs: assert main(list(map(str, words))) == 0, capsys.readouterr().err
    before = json.loads((run / "metrics.json").read_text())
    assert json.loads((copy / "metrics.json").read_text()) == before and before["steps"] > 0 and "onnx" in before


def test_a_job_does_not_begin_in_the_folder_of_another(trained, tmp_path):
    run = shutil.copytree(trained.parent, tmp_path / "run")
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    with pytest.raises(InputError, match="is not empty .* -p resume true"): run_job("train", TINY, run)
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before


def test_a_job_goes_on_in_its_folder_and_keeps_its_earlier_results(trained, tmp_path):
    run = shutil.copytree(trained.parent, tmp_path / "run")
    before = (run / "metrics.json").read_bytes()
    run_job("train", {**TINY, "data": str(trained.parent / "scenes"), "resume": True}, run)
    assert (run / "earlier" / "1" / "metrics.json").read_bytes() == before
    assert {f.name for f in (run / "earlier" / "1").iterdir()} == {"metrics.json", "train.html", "train.ipynb"}
    assert json.loads((run / "metrics.json").read_text())["checkpoint"] == json.loads(before)["checkpoint"]


def test_two_jobs_do_not_share_a_folder(tmp_path):
    job = notebook(tmp_path / "j.ipynb", "out:str = '' # folder", SAVE)
    with hold_run(tmp_path / "run", lock=".job.lock"):
        with pytest.raises(InputError, match="is at work in this run"): run_job(job, {}, tmp_path / "run")


def test_benchmark_job_measures_what_the_training_left(trained, tmp_path):
    run = trained.parent
    metrics = json.loads((run / "metrics.json").read_text())
    artifact = str(run / metrics["artifact"])
    parameters = {"artifact": artifact, "data": str(run / "scenes"), "frames": "2", "repeats": "2", "minutes": "0.01",
                  "idle": "0", "text": "96"}
    page = run_job("benchmark", parameters, tmp_path)
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["sha256"] == metrics["sha256"]
    bench = report["bench"]
    device = report["device"]
    assert device["sustained"]["windows"] and device["stats"] is None and "not measured" in device["notes"][0]
    verdicts = {check["name"]: check["passed"] for check in device["checks"]}
    assert verdicts["text"] is True and verdicts["GPU"] is None and isinstance(verdicts["rate"], bool)
    assert bench["calls"] == 4 and bench["stages"]["total"]["p99"] > 0 and bench["measured_on"]["device"]
    assert report["accuracy"]["stats"]["AP"] == pytest.approx(metrics["onnx"]["AP"], abs=1e-6)
    assert "image/png" in outputs(tmp_path / "benchmark.ipynb")[1] and page.name == "benchmark.html"


def test_the_page_shows_the_result_before_settings_and_code(trained):
    html = trained.read_text(encoding="utf-8")
    heads = re.findall(r"<h2[^>]*>(.*?)<", html)
    assert heads[0] == "Result" and heads.index("Settings") < heads.index("Training")
    result = html[html.index(">Result<"):html.index(">Settings<")]
    figure, table = result.index("data:image/jpeg;base64"), result.index('class="tiles"')
    assert figure < table < result.index("<summary>Parameters</summary>")
    assert result.count("data:image/") == 6, "four of the evaluation, the epochs, the latency"
    settings = html[html.index(">Settings<"):html.index(">Training<")]
    given = re.findall(r"<td[^>]*>([a-z]+\.\w+)</td>", settings)
    assert "train.epochs" in given and "augment.mosaic" not in given, "what was given"


def test_code_and_long_output_are_folded_and_parameters_are_open(trained):
    html = trained.read_text(encoding="utf-8")
    cells = [c for c in nbformat.read(trained.with_suffix(".ipynb"), as_version=4).cells if c.cell_type == "code"]
    assert html.count("<details><summary>Code</summary>") == len(cells) - 2
    opened = re.findall(r'<details open(?:="")?>\s*<summary>(.*?)<', html)
    assert opened == ["Parameters", "Parameters"], "the defaults and what was given"
    assert re.search(r"<details><summary>\d{3} lines of output</summary>", html), "the resolved settings"


def page_of(tmp_path, *sources):
    "The headings of the page of a notebook with these cells, in order."
    cells = [(nbformat.v4.new_markdown_cell if s.startswith("#") else nbformat.v4.new_code_cell)(s) for s in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), str(tmp_path / "j.ipynb"))
    html = write_page(tmp_path / "j.ipynb", tmp_path / "j.html").read_text(encoding="utf-8")
    return re.findall(r"<h[1-6][^>]*>(.*?)<", html)


@pytest.mark.parametrize("sources, heads", [
    (["# A", "1", "## B", "## Result", "2", "#### c", "3", "## D"], ["A", "Result", "c", "B", "D"]),
    (["## B", "1", "## Result\n\nwhat it is", "2"], ["Result", "B"]),
    (["# A", "1", "## Results of others", "## B"], ["A", "Results of others", "B"]),
    (["# A\n\ntext", "## Result"], ["A", "Result"]),
])
def test_the_section_named_result_comes_first(sources, heads, tmp_path):
    assert page_of(tmp_path, *sources) == heads


def test_papermill_lists_the_parameters_with_their_meanings():
    for name in list_jobs():
        p = CliRunner().invoke(papermill, ["--help-notebook", str(find_job(name))])
        assert p.exit_code == 0 and p.stderr == ""
        text = " ".join(p.stdout.split())
        for parameter in job_parameters(name).values():
            line = f"{parameter.name}: {parameter.type.__name__} (default "
            assert line in text and " ".join(parameter.comment.split()) in text


@pytest.mark.slow
def test_papermill_runs_the_training_job_in_a_folder_with_other_files(tmp_path):
    (tmp_path / "photo.txt").write_text("mine")
    words = ["papermill", str(find_job("train")), "out.ipynb", "--no-progress-bar", "-y", json.dumps(TINY)]
    p = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=tmp_path)
    assert p.returncode == 0, p.stderr
    assert {f.name for f in tmp_path.iterdir()} == {"out.ipynb", "photo.txt", "runs"}
    assert "onnx" in json.loads((tmp_path / "runs" / "train" / "metrics.json").read_text())
    text, kinds = outputs(tmp_path / "out.ipynb")
    assert "Warning" not in text and {"image/png", "image/jpeg", "text/html"} <= kinds
    ours = [line for line in p.stderr.splitlines() if "warning" in line.lower() and "IPKernelApp" not in line]
    assert not ours, "the kernel's own line on its transport is not ours"
    p = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=tmp_path)
    assert p.returncode != 0 and "is not empty" in p.stderr, "a second run does not mix with the first"


def test_papermill_runs_the_benchmark_job_without_parameters(tmp_path):
    words = ["papermill", str(find_job("benchmark")), "out.ipynb", "--no-progress-bar"]
    for name, value in (("frames", 1), ("repeats", 1), ("warmup", 0)): words += ["-p", name, str(value)]
    p = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=tmp_path)
    assert p.returncode == 0, p.stderr
    assert {f.name for f in (tmp_path / "runs" / "benchmark").iterdir()} == {"metrics.json", "untrained.onnx"}


def test_pages_ask_no_other_host(trained):
    html = trained.read_text(encoding="utf-8")
    assert "<img" in html and "data:image/png;base64" in html
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"'](?!data:|#)", html)
    assert not re.findall(r"(?:url\(|@import|import\()\s*[\"']?(?:https?:)?//", html)


def test_the_jobs_are_listed_with_typed_commented_parameters():
    assert set(list_jobs()) >= {"audit", "benchmark", "compare", "export", "quantize", "train"}
    for name in list_jobs():
        parameters = job_parameters(name)
        assert len(parameters) >= 6 and "out" in parameters
        for p in parameters.values():
            assert type(p.default) is p.type and len(p.comment) > 8, p
            assert "=" not in p.comment, "papermill cannot parse a line with a second equals sign"
            assert p.name in describe_job(name)


def test_the_jobs_are_thin():
    for f in (REPO / "nbs" / "jobs").glob("*.ipynb"):
        code = [c.source for c in nbformat.read(str(f), as_version=4).cells if c.cell_type == "code"]
        assert not [c for c in code if re.search(r"^(def|class) ", c, re.M)], f
        assert max(len(c.splitlines()) for c in code) <= 25, f


@pytest.mark.parametrize("values, message", [
    ({"epoch": 3}, "did you mean 'epochs'?"),
    ({"epochs": "three"}, "epochs: expected int"),
    ({"epochs": 2.5}, "epochs: expected int"),
    ({"epochs": True}, "epochs: expected int"),
    ({"epochs": [3]}, "epochs: expected int"),
    ({"input_size": "416"}, "input_size: expected list"),
    ({"resume": "perhaps"}, "resume: expected bool"),
    ({"data": 3.5}, "data: expected str"),
])
def test_wrong_parameters_stop_before_anything_is_made(values, message, tmp_path):
    with pytest.raises(InputError) as e: run_job("train", values, tmp_path / "run")
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


def test_text_is_read_as_the_type_of_its_parameter():
    given = {"epochs": "3", "input_size": "[64, 96]", "resume": "true", "data": "2024", "overrides": "[train.seed=1]"}
    values = {"epochs": 3, "input_size": [64, 96], "resume": True, "data": "2024", "overrides": ["train.seed=1"]}
    assert check_parameters("train", given) == values


def test_input_that_the_job_refuses_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    values = {"data": str(tmp_path / "empty"), "weights": "none"}
    with pytest.raises(InputError) as e: run_job("train", values, tmp_path / "run")
    assert "\n" not in str(e.value) and "cell" in str(e.value) and "empty" in str(e.value)
    assert (tmp_path / "run" / "train.ipynb").is_file() and not (tmp_path / "run" / "metrics.json").exists()


def test_a_split_that_is_not_there_stops_before_the_training(tmp_path):
    with pytest.raises(InputError, match="did you mean 'test'"):
        run_job("train", {**TINY, "split": "tset"}, tmp_path / "run")
    assert not (tmp_path / "run" / "training").exists()


def notebook(path, *sources):
    cells = [nbformat.v4.new_code_cell(s) for s in sources]
    cells[0].metadata["tags"] = ["parameters"]
    nb = nbformat.v4.new_notebook(cells=cells)
    nb.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "python3"}
    nbformat.write(nb, str(path))
    return str(path)


def assert_error_first(path, text):
    "The error stands above everything in the notebook and in its page, with a link to the cell that failed."
    cells = nbformat.read(str(path), as_version=4).cells
    assert text in cells[0].source and "This job failed" in cells[0].source and str(path.parent) not in cells[0].source
    marked = [i for i, c in enumerate(cells) if "papermill-error-cell" in c.source]
    assert marked == [0, len(cells) - 3], "on top, and before the cell"
    html = path.with_suffix(".html").read_text(encoding="utf-8")
    first = html.index("This job failed")
    assert 0 < first < html.index("<summary>") and 'href="#papermill-error-cell"' in html
    assert 'id="papermill-error-cell"' in html


SAVE = """import json, sys
from pathlib import Path
(Path(out)/"metrics.json").write_text(json.dumps({"python": sys.executable}))"""


def test_a_failing_job_names_the_cell_and_leaves_its_notebook(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.json").write_text("{}")
    job = notebook(tmp_path / "bad.ipynb", "out:str = '' # folder", "print('as far as here')", "1/0", SAVE)
    with pytest.raises(JobError) as e: run_job(job, {}, run)
    message = str(e.value)
    assert "cell 4 of 5" in message and "ZeroDivisionError: division by zero" in message and "\n" not in message
    executed = (run / "bad.ipynb").read_text()
    assert "as far as here" in executed and "Traceback" in executed
    assert_error_first(run / "bad.ipynb", "ZeroDivisionError: division by zero")
    assert not (run / "metrics.json").exists(), "figures of an earlier run beside a failed one"
    assert (run / "earlier" / "1" / "metrics.json").read_text() == "{}"
    assert "as far as here" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("source, error", [
    ("%nosuch", "UsageError: Line magic function `%nosuch` not found."),
    ("%%nosuch\n1", "UsageError: Cell magic `%%nosuch` not found."),
    ("%%bash\nfalse", "CalledProcessError: Command 'b'false\\n'' returned non-zero exit status 1."),
    ("!false", "CalledProcessError: Command 'false' returned non-zero exit status 1."),
    ("%%time\n1/0", "ZeroDivisionError: division by zero"),
    ("raise MemoryError()", "MemoryError: out of memory"),
    ("import numpy\nnumpy.zeros(10**15)", "MemoryError: out of memory Unable to allocate"),
    ("raise SystemExit(3)", "SystemExit: 3"),
])
def test_what_fails_without_a_traceback_of_its_own_is_named(source, error, tmp_path):
    "papermill#501, #539 and its like: nothing passes in silence."
    job = notebook(tmp_path / "j.ipynb", "out:str = '' # folder", source, SAVE)
    with pytest.raises(JobError) as e: run_job(job, {}, tmp_path / "run")
    assert error in str(e.value) and "\n" not in str(e.value)
    assert_error_first(tmp_path / "run" / "j.ipynb", error[:30])


def test_a_failing_magic_is_an_exit_code_of_1(tmp_path, capsys):
    job = notebook(tmp_path / "j.ipynb", "out:str = '' # folder", "%nosuch", SAVE)
    assert main(["job", job, "--out", str(tmp_path / "run")]) == 1
    assert "UsageError: Line magic function `%nosuch` not found." in capsys.readouterr().err


def test_a_process_that_the_system_ended_for_want_of_memory(tmp_path, monkeypatch):
    "The system counts its kills; one more since the job began, and it was this one."
    counts = iter([3, 4])
    monkeypatch.setattr("jetson_det.experiments.jobs._memory_kills", lambda: next(counts))
    job = notebook(tmp_path / "j.ipynb", "out:str = '' # folder", "import os; os.kill(os.getpid(), 9)", SAVE)
    with pytest.raises(JobError, match="was ended by SIGKILL: out of memory .the notebook"): run_job(job, {}, tmp_path)


@pytest.mark.slow
def test_a_job_runs_from_a_notebook(tmp_path):
    "In a kernel, whose event loop runs already."
    from nbclient import NotebookClient
    job = notebook(tmp_path / "j.ipynb", "out:str = '' # folder", "print('inside')", SAVE)
    source = f"from jetson_det.experiments.jobs import run_job\nrun_job({job!r}, {{}}, {str(tmp_path / 'run')!r})"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(nb, kernel_name="python3").execute()
    text = "".join(o.get("text", "") for o in nb.cells[0].outputs)
    assert "inside" in text and (tmp_path / "run" / "j.html").is_file()


@pytest.mark.parametrize("end, how", [
    ("os._exit(9)", "ended with exit status 9 (the notebook"),
    ("os.kill(os.getpid(), 9)", "was ended by SIGKILL (out of memory?)"),
    ("os.kill(os.getpid(), 11)", "was ended by SIGSEGV (the notebook"),
])
def test_a_job_that_dies(tmp_path, end, how):
    job = notebook(tmp_path / "dies.ipynb", "out:str = '' # folder", f"import os; {end}", SAVE)
    with pytest.raises(JobError) as e: run_job(job, {}, tmp_path / "run")
    assert f"the Python of the job {how}" in str(e.value) and "\n" not in str(e.value)
    assert_error_first(tmp_path / "run" / "dies.ipynb", how.partition(" (the")[0])
    assert "go on" not in str(e.value)


def test_a_training_whose_python_is_killed_says_how_to_go_on(tmp_path):
    job = notebook(tmp_path / "dies.ipynb", "out:str = '' # folder\nresume:bool = False # go on",
                   "import os; os.makedirs(f'{out}/checkpoints/step-1'); os.kill(os.getpid(), 9)", SAVE)
    with pytest.raises(JobError, match="SIGKILL .*; what was saved before is whole; .* -p resume true$"):
        run_job(job, {}, tmp_path / "run")


def test_a_list_is_shown_as_it_is_written(tmp_path):
    for key, value, shown in (("overrides", "train.epochs=2", '["train.epochs=2"]'), ("input_size", "416", '[416]')):
        with pytest.raises(InputError) as e: check_parameters("train", {key: value})
        assert f"expected list such as '{shown}', found" in str(e.value)
    assert check_parameters("train", {"overrides": '["train.epochs=2"]'}) == {"overrides": ["train.epochs=2"]}
    with pytest.raises(InputError, match="scene_size: expected list such as .360, 640., found"):
        check_parameters("train", {"scene_size": "9"})
    with pytest.raises(InputError, match="has no parameter 'max_flawed': the parameters are data, out, "):
        check_parameters("train", {"max_flawed": ".05"})
    with pytest.raises(InputError, match="did you mean 'epochs'"): check_parameters("train", {"epoch": "3"})


def test_a_job_without_metrics_failed(tmp_path):
    with pytest.raises(JobError, match="no metrics.json"):
        run_job(notebook(tmp_path / "j.ipynb", "out:str = '' # folder"), {}, tmp_path / "run")


def test_a_notebook_without_parameters_is_no_job(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), str(tmp_path / "n.ipynb"))
    with pytest.raises(InputError, match="one cell tagged"): run_job(str(tmp_path / "n.ipynb"), {}, tmp_path / "run")
    with pytest.raises(InputError, match="did you mean 'train'"): run_job("trian", {}, tmp_path / "run")


def test_runs_in_the_calling_python_whatever_kernels_are_registered(tmp_path, monkeypatch):
    "A `python3` kernel of another Python comes first on the path, as in a shared account."
    spec = tmp_path / "share" / "kernels" / "python3"
    spec.mkdir(parents=True)
    kernel = {"argv": ["/bin/false", "{connection_file}"], "display_name": "other", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"))
    run_job(notebook(tmp_path / "j.ipynb", "out:str = '' # folder", SAVE), {}, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["python"] == sys.executable


def test_the_wheel_carries_the_jobs(tmp_path):
    pytest.importorskip("build", reason="the dev extra is not installed")
    source = tmp_path / "source"  # a copy, so that no build folder is left in the checkout
    ignored = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "dist", "site", "*.egg-info", "bench", "tests",
                                     "__pycache__")
    shutil.copytree(REPO, source, ignore=ignored)
    words = ["--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)]
    p = subprocess.run([sys.executable, "-m", "build", *words], capture_output=True, text=True)
    assert p.returncode == 0, p.stdout[-2000:] + p.stderr[-2000:]
    wheel = next((tmp_path / "dist").glob("*.whl"))
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        z.extractall(tmp_path / "installed")
    assert {f"jetson_det/jobs/{name}.ipynb" for name in list_jobs()} <= names
    code = (
        "import jetson_det; from jetson_det.experiments.jobs import list_jobs, find_job;"
        " print(jetson_det.__file__, list_jobs(), find_job('train'))"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert p.stdout.count(str(tmp_path/"installed")) == 2, p.stdout + p.stderr
    assert str(list_jobs()) in p.stdout
