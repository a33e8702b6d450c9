"""The board check: a process for each claim, its limits, the report; all of it without a GPU."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from board_files import fake_tegrastats, nano_line

from jetson_det.runtime.engine.cuda import init_driver
from jetson_det.runtime.files import InputError
from jetson_det.runtime.golden import compare_golden, read_golden
from jetson_det.runtime.ops import board_check as page
from jetson_det.runtime.ops.board_check import (
    CLAIMS, BoardCheck, CheckJob, Claim, Finding, Outcome, board_check, check_apart, check_here
)
from jetson_det.runtime.ops.check_network import (
    check_answers, check_contract, check_frames, check_onnx, write_check_network
)
from jetson_det.runtime.session import Session


def has_driver():
    try: init_driver()
    except InputError: return False
    return True


NO_DRIVER = pytest.mark.skipif(has_driver(), reason="a driver is here")


@pytest.fixture
def job(tmp_path):
    onnx = write_check_network(tmp_path)
    return CheckJob(str(tmp_path), str(onnx), str(onnx.with_suffix(".golden")), seconds=.5)


def test_the_network_is_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    model = onnx.load_model_from_string(check_onnx())
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 13 and [o.name for o in model.graph.output] == ["boxes", "scores"]
    assert write_check_network(tmp_path).read_bytes() == write_check_network(tmp_path / "b").read_bytes()


def test_onnx_runtime_and_numpy_agree_on_the_network(tmp_path):
    pytest.importorskip("onnxruntime")
    from jetson_det.runtime.sessions import OnnxSession
    path = write_check_network(tmp_path)
    report = compare_golden(OnnxSession(path, threads=1), path.with_suffix(".golden"))
    assert report.ok and report.detections >= 30 and report.scores["max"] < 1e-4
    assert {len(image.detections.labels) > 0 for image in read_golden(path.with_suffix(".golden")).images} == {True}


def test_the_golden_file_finds_a_wrong_network(tmp_path):
    path = write_check_network(tmp_path).with_suffix(".golden")

    def swapped(x): return check_answers(x[:, ::-1])
    assert compare_golden(Session(check_contract(), check_answers), path).ok
    assert not compare_golden(Session(check_contract(), swapped), path).ok
    assert len({frame.shape for frame in check_frames()}) == 4


@NO_DRIVER
def test_without_a_driver_no_claim_is_made(tmp_path):
    seen = []
    found = board_check(tmp_path / "out", only=("driver", "build", "threads"), report=seen.append)
    assert [row.name for row in seen] == ["driver", "build", "threads"] and tuple(seen) == found.findings
    assert all(row.holds is None and "no NVIDIA driver here" in row.measured for row in found.findings)
    assert not found.ok and (found.count(True), found.count(False), found.count(None)) == (0, 0, 3)
    stored = json.loads((tmp_path / "out" / "board-check.json").read_text())
    assert stored["ok"] is False and [row["name"] for row in stored["findings"]] == ["driver", "build", "threads"]
    text = (tmp_path / "out" / "board-check.md").read_text()
    assert text.count("| not checked |") == 3 and "0 claims hold, 0 do not, 3 could not be checked: exit code 1" in text
    assert not list(tmp_path.glob("board-check-*")), "no folder of work is left"


def test_a_check_that_is_ended_or_hangs_stops_no_other(job):
    def python(code): return [sys.executable, "-c", code]
    crash = check_apart("driver", job, 20, python(
        "import os, signal, sys; sys.stderr.write('about to fall\\n'); sys.stderr.flush();"
        "os.kill(os.getpid(), signal.SIGSEGV)"))
    assert crash == Outcome(False, "its process ended by SIGSEGV: about to fall")
    start = time.monotonic()
    assert check_apart("driver", job, .3, python("import time; time.sleep(60)")) == Outcome(None, "not done in 0 s")
    assert time.monotonic() - start < 5
    quiet = check_apart("driver", job, 20, python("import sys; sys.exit(3)"))
    assert quiet == Outcome(None, "its process ended with exit code 3")
    late = check_apart("driver", job, 20, python(
        "import json, os, signal, sys;"
        "json.dump(dict(holds=True, measured='fine', figures=None), open(sys.argv[3], 'w'));"
        "os.kill(os.getpid(), signal.SIGABRT)"))
    assert late == Outcome(False, "fine; then its process ended by SIGABRT"), "an abort at exit is a fault"


def test_a_check_takes_its_children_with_it(job, tmp_path):
    code = ("import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
            "open({!r}, 'w').write(str(p.pid)); time.sleep(60)".format(str(tmp_path / "pid")))
    check_apart("driver", job, 1, [sys.executable, "-c", code])
    pid = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try: state = Path("/proc/{}/stat".format(pid)).read_text().rpartition(")")[2].split()[0]
        except (IOError, OSError): break
        if state == "Z": break
        time.sleep(.02)
    else: pytest.fail("the child of the check lives")


def test_a_fault_in_a_check_is_no_verdict_on_the_board(job, monkeypatch, tmp_path):
    def faulty(job, parts): raise ZeroDivisionError("x")
    monkeypatch.setitem(CLAIMS, "driver", Claim("driver", "", 1, faulty))
    page._run_child("driver", *_files(job, tmp_path))
    row = json.loads((tmp_path / "outcome.json").read_text())
    assert row["holds"] is None and "the check itself failed: ZeroDivisionError" in row["measured"]


def _files(job, folder):
    (folder / "job.json").write_text(json.dumps(job._asdict()))
    return str(folder / "job.json"), str(folder / "outcome.json")


def test_no_time_is_left(tmp_path, monkeypatch):
    jumps = []
    clock = time.monotonic

    def slow(name, job, seconds, command=None):
        jumps.append(60)
        return Outcome(True, "took {:.2f}".format(seconds))
    monkeypatch.setattr(page, "check_apart", slow)
    monkeypatch.setattr(page.time, "monotonic", lambda: clock() + sum(jumps))
    found = board_check(tmp_path, minutes=1.5, only=["driver", "build", "parity", "memory"])
    assert [row.holds for row in found.findings] == [True, True, None, None]
    assert "no time was left" in found.findings[2].measured


@NO_DRIVER
def test_without_a_driver_the_reason_is_the_driver_though_no_time_is_left(tmp_path, monkeypatch):
    started = []
    real = page.check_apart

    def note(name, job, seconds, command=None):
        started.append(name)
        outcome = real(name, job, 60, command)
        if name == "driver": now.append(1000)
        return outcome
    now = []
    clock = time.monotonic
    monkeypatch.setattr(page, "check_apart", note)
    monkeypatch.setattr(page.time, "monotonic", lambda: clock() + sum(now))
    found = board_check(tmp_path, minutes=10)
    reasons = {row.name: row.measured for row in found.findings}
    assert started == ["doctor", "driver"]
    assert [name for name in CLAIMS if "no time was left" in reasons[name]] == ["tegrastats", "camera", "cut"]
    gpu = [name for name, claim in CLAIMS.items() if claim.needs_gpu]
    assert len(gpu) == 12 and all("no NVIDIA driver here" in reasons[name] for name in gpu)


def test_what_needs_no_gpu_says_so(job):
    "The flag is what the checks do, on a machine without a driver."
    for name in ("doctor", "tegrastats", "camera", "cut"):
        assert not CLAIMS[name].needs_gpu
        outcome = check_here(name, job._replace(tegrastats=("absent", ), root=job.folder))
        assert "driver here" not in outcome.measured and outcome.figures != {"lacks": "driver"}


@pytest.mark.parametrize("holds, ok, words", [
    ([None, None], False, "0 hold, 0 do not, 2 could not be checked; 3 s: exit code 1, nothing could be checked"),
    ([], False, "exit code 1, nothing could be checked"),
    ([True, None], True, "exit code 0, what could be checked holds"),
    ([True, True], True, "exit code 0"), ([True, False, None], False, "exit code 1, not every claim holds here"),
    ([False], False, "exit code 1, not every claim")])
def test_success_is_a_claim_that_holds_and_none_that_fails(holds, ok, words):
    findings = tuple(Finding(str(n), "a claim", verdict, "", 1., None) for n, verdict in enumerate(holds))
    report = BoardCheck("2026-01-01T00:00:00.000Z", 3., "Nano", "m.onnx", findings)
    assert report.ok is ok and words in report.summary() and report.summary() in str(report)
    assert report.to_json()["ok"] is ok and words.partition("; 3 s")[0].split(", ")[-1] in report.markdown()


@NO_DRIVER
def test_the_programs_end_with_1_where_nothing_was_checked(tmp_path, monkeypatch, capsys):
    from jetson_det.runtime.program import main
    write_check_network(tmp_path / "home")
    os.rename(str(tmp_path / "home" / "check.onnx"), str(tmp_path / "home" / "model.onnx"))
    (tmp_path / "home" / "bundle.json").write_text('{"parts": {"model": "model.onnx"}}')
    assert main(["board-check", "--only", "camera", "--out", str(tmp_path / "a")], tmp_path / "home") == 1
    assert "exit code 1, nothing could be checked" in capsys.readouterr().out
    typer = pytest.importorskip("typer", reason="the command line needs a newer Python")
    from jetson_det.cli_board import board_check as verb
    with pytest.raises(typer.Exit) as e: verb(out=tmp_path / "b", only=["camera"], minutes=1)
    assert e.value.exit_code == 1 and "exit code 1, nothing could be checked" in capsys.readouterr().out
    assert "none could be checked" in " ".join(verb.__doc__.split())


def test_tegrastats_lines(job, tmp_path):
    good = job._replace(tegrastats=fake_tegrastats(tmp_path, [nano_line()]))
    outcome = check_here("tegrastats", good)
    assert outcome.holds is True and "4.50 W" in outcome.measured and outcome.figures["unknown"] == []
    strange = job._replace(tegrastats=fake_tegrastats(tmp_path, [nano_line() + " ???!"]))
    outcome = check_here("tegrastats", strange)
    assert outcome.holds is False and "not known: ???!" in outcome.measured
    absent = check_here("tegrastats", job._replace(tegrastats=(str(tmp_path / "absent"), )))
    assert absent.holds is None and "is not on this machine" in absent.measured
    refuses = job._replace(tegrastats=(sys.executable, "-c", "print('tegrastats: not permitted')"))
    assert check_here("tegrastats", refuses).holds is False


def test_a_camera_and_a_capture_that_is_cut(job, tmp_path):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 25, (64, 48))
    if not writer.isOpened(): pytest.skip("this OpenCV writes no MJPG")
    for k in range(250): writer.write(np.full((48, 64, 3), k, np.uint8))
    writer.release()
    with_camera = job._replace(camera=str(path))
    camera = check_here("camera", with_camera)
    assert "said to be 25" in camera.measured and camera.figures["fps"] > 1
    assert camera.holds is (camera.figures["fps"] >= 20), "four fifths of what it states"
    cut = check_here("cut", with_camera)
    assert cut.holds is True and "its numbers go on (" in cut.measured, cut


def test_wrong_calls(tmp_path):
    for options, message in ((dict(only=["speed"]), "no such check; there are doctor, driver"),
                             (dict(minutes=0), "minutes is 0"), (dict(model=tmp_path / "a.onnx"), "no such file")):
        with pytest.raises(InputError, match=message): board_check(tmp_path, **options)


def test_a_report_that_a_table_can_hold(tmp_path):
    finding = Finding("driver", "a claim", False, "a | b <script>\nc\x1b[31m", 1., None)
    report = BoardCheck("2026-01-01T00:00:00.000Z", 1., "Nano", "m.onnx", (finding, ))
    assert not report.ok and "DOES NOT HOLD driver" in str(report)
    row = report.markdown().splitlines()[-1]
    assert row.count("|") - row.count("\\|") == 4 and "<script" not in row and "\x1b" not in row
    json.dumps(report.to_json())


def test_it_starts_from_another_folder(tmp_path):
    "As from a .pyz: the child finds the package where the parent has it."
    script = ("from jetson_det.runtime.ops.board_check import board_check; import sys;"
              "print(board_check(sys.argv[1], only=['camera']).findings[0].measured)")
    home = str(Path(page.__file__).resolve().parents[3])
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", "import sys; sys.path.insert(0, {!r}); ".format(home) + script, "out"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=str(tmp_path), env=env)
    assert done.stdout.decode().strip() == "no camera was given (--camera)", done.stderr.decode()
