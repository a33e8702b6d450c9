"""The program's verbs that keep it running: health, supervise, audit, and what watch tells systemd. Python 3.6 too."""
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
from audit_sets import write_set

from jetson_det.runtime.ops.watchdog import HealthFile
from jetson_det.runtime.program import BUNDLE, main

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
COLORS = Path(__file__).parents[1] / "fixtures" / "colors.onnx"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "The folder of a bundle."
    folder = tmp_path_factory.mktemp("home")
    shutil.copy(str(COLORS), str(folder / "model.onnx"))
    (folder / BUNDLE).write_text('{"parts": {"model": "model.onnx"}}')
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory): return write_set(tmp_path_factory.mktemp("audit"), 4)


def test_audit_against_a_file(home, data, tmp_path, capsys):
    usual = ["audit", str(data), "--threads", "1", "--draws", "30"]
    def run(*words): return main(usual + [str(word) for word in words], home)
    assert run("--save-baseline", tmp_path / "baseline.json") == 0
    assert "no baseline to compare with" in capsys.readouterr().out
    assert run("--baseline", tmp_path / "baseline.json", "--out", tmp_path / "audits") == 0
    assert json.loads((tmp_path / "audits/audit.json").read_text())["comparison"]["loss"] == 0
    shipped = json.loads((tmp_path / "baseline.json").read_text())
    shipped["fingerprints"][0] = "another"
    shipped.update(draws=[1.] * 30, ap=1.)
    (tmp_path / "better.json").write_text(json.dumps(shipped))
    assert run("--baseline", tmp_path / "better.json", "--out", tmp_path / "audits") == 1
    assert "ALARM" in capsys.readouterr().out
    assert len((tmp_path / "audits/history.jsonl").read_text().splitlines()) == 2
    assert run("--baseline", tmp_path / "none.json") == 2
    assert run("--tolerance", "-1") == 2


def test_audit_against_another_bundle(home, data, tmp_path, capsys):
    usual = ["audit", str(data), "--threads", "1", "--draws", "30"]
    def run(*words): return main(usual + [str(word) for word in words], home)
    assert run("--against", home) == 0
    assert "before: colours: AP" in capsys.readouterr().out
    assert run("--against", home, "--bound", "-0.001") == 1 # a bound that nothing meets
    assert "AP is lower by 0.000" in capsys.readouterr().out
    assert run("--against", tmp_path) == 2 and "is this the folder of a bundle?" in capsys.readouterr().err
    assert run("--against", home, "--baseline", "x.json") == 2


def test_health(home, tmp_path, capsys):
    path = str(tmp_path / "health.json")
    assert main(["health", path], home) == 1 and "no frame yet" in capsys.readouterr().out
    HealthFile(path).write()
    assert main(["health", path, "--age", "60"], home) == 0 and "s old" in capsys.readouterr().out
    assert main(["health", path, "--age", "0"], home) == 2


def test_supervise(home, capfd):
    assert main(["supervise", "--", sys.executable, "-c", "print('done')"], home) == 0
    assert capfd.readouterr().out == "done\n"
    assert main(["supervise", "--failures", "1", "--", "false"], home) == 1
    assert "given up" in capfd.readouterr().err
    assert main(["supervise"], home) == 2 and "no command" in capfd.readouterr().err


def test_watch_tells_systemd_and_docker(home, data, tmp_path, monkeypatch):
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name)
        listener.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        monkeypatch.setenv("WATCHDOG_USEC", "10000000")
        words = ["watch", str(data.parent), "--out", str(tmp_path / "found"), "--health", str(tmp_path / "health.json")]
        assert main(words, home) == 0
        told = [listener.recv(4096).decode() for _ in range(3)]
    assert told[0].startswith("READY=1\n") and told[1].startswith("WATCHDOG=1\n")
    assert told[2] == "STOPPING=1\nSTATUS=ending after 4 frames"
    assert json.loads((tmp_path / "health.json").read_text())["frames"] == 1 # at most one a second
    assert main(words[:-1] + [str(tmp_path / "none" / "health.json")], home) == 2
    assert main(words + ["--age", "0"], home) == 2
    assert os.path.exists(str(tmp_path / "found"))
