"""An update on a board: the new version has to show on labeled images that it is not worse, and to give frames, or the
old one stays. The unit is checked by systemd's own program."""
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import onnx
import pytest
from audit_sets import write_set

from jetson_det.export.bundle import bundle
from jetson_det.runtime.contract import METADATA_KEY

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("flock"), reason="needs Linux and flock")
COLORS = Path(__file__).parents[1] / "fixtures" / "colors.onnx"
PYTHON36 = Path(__file__).resolve().parents[2] / ".venv-py36/bin/python"
PYTHONS = [pytest.param(sys.executable, id="this"),
           pytest.param(str(PYTHON36), id="3.6", marks=pytest.mark.skipif(
               not PYTHON36.exists(), reason="no .venv-py36; tools/test_runtime36.sh makes it"))]


def write_version(folder, name, **changes):
    "An unpacked bundle of colors.onnx, with a contract that says something else."
    model = onnx.load(str(COLORS))
    for row in model.metadata_props:
        if row.key == METADATA_KEY: row.value = json.dumps(dict(json.loads(row.value), name=name, **changes))
    onnx.save(model, str(folder / f"{name}.onnx"))
    made = bundle(folder / f"{name}.onnx", folder / f"{name}.tar.gz", "nano")
    with tarfile.open(folder / f"{name}.tar.gz") as archive: archive.extractall(folder, filter="data")
    return folder / made.version


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    "An audit set; a version, one as good, and one that takes blue for red."
    folder = tmp_path_factory.mktemp("versions")
    data = write_set(folder / "audit")
    return (data, write_version(folder, "old"), write_version(folder, "better"),
            write_version(folder, "worse", color="rgb"))


@pytest.fixture
def machine(tmp_path):
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "root/etc/nv_tegra_release").write_text("# R32 (release), REVISION: 7.1, GCID: 29818004\n")
    return tmp_path


def install(machine, folder, *words, python=sys.executable, **environ):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    kept.update(environ, DETECTOR_ROOT=str(machine / "root"), PYTHON=python, LC_ALL="C.UTF-8")
    done = subprocess.run(["sh", str(folder / "install.sh"), "--prefix", str(machine / "opt"), *map(str, words)],
                          timeout=120, capture_output=True, text=True, env=kept)
    return done.returncode, done.stdout + done.stderr


def current(machine): return os.path.basename(os.readlink(machine / "opt/current"))


def test_a_worse_version_is_refused(versions, machine):
    data, old, _, worse = versions
    assert install(machine, old, "--no-check")[0] == 0
    code, text = install(machine, worse, "--no-check", "--audit", data)
    assert code == 2 and f"it is worse than {old.name}" in text and "nothing was switched" in text
    assert "before: old: AP" in text and current(machine) == old.name
    assert os.listdir(machine / "opt/versions") == [old.name] # and nothing of it stays


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_an_update_must_not_be_worse(versions, machine, python):
    data, old, better, worse = versions
    code, text = install(machine, old, "--audit", data, python=python)
    assert code == 0 and "nothing to compare the audit with" in text
    assert install(machine, worse, "--audit", data, python=python)[0] == 2
    code, text = install(machine, better, "--audit", data, python=python)
    assert code == 0 and current(machine) == better.name
    assert "AP -0.000" in text or "AP +0.000" in text


@pytest.mark.slow
def test_a_bound_and_a_set_that_is_none(versions, machine):
    data, old, _, worse = versions
    assert install(machine, old)[0] == 0
    code, text = install(machine, worse, "--audit", machine / "none.json")
    assert code == 2 and "the audit could not be made: nothing was switched" in text
    assert install(machine, worse, "--audit", data, "--bound", "x")[0] == 2
    assert current(machine) == old.name
    assert install(machine, worse)[0] == 0 # nobody asked


def systemctl(machine, refuses):
    "A program in its place, which refuses to start a version."
    script = machine / "systemctl"
    script.write_text(f'#!/bin/sh\necho "$*" >>{machine}/calls\n'
                      f'[ "$1" != restart ] || case $(readlink {machine}/opt/current) in *{refuses}*) exit 1 ;; esac\n')
    script.chmod(0o755)
    return str(script)


def test_a_version_that_gives_no_frames_goes_back(versions, machine):
    _, old, better, _ = versions
    assert install(machine, old, "--service", "--no-check")[0] == 0
    code, text = install(machine, better, "--no-check", DETECTOR_SYSTEMCTL=systemctl(machine, "better"))
    assert code == 2 and f"gives no frames: went back to {old.name}" in text
    assert current(machine) == old.name
    assert (machine / "calls").read_text().splitlines() == ["restart detector.service"] * 2
    code, text = install(machine, old, "--status")
    assert "previous: none" in text
    assert install(machine, better, "--no-check", DETECTOR_SYSTEMCTL=systemctl(machine, "nothing"))[0] == 0
    assert current(machine) == better.name


def test_a_version_gets_its_engine_before_it_is_compared(versions, machine):
    "The current one has an engine, so the new one is built, in its place; a stand-in for Python answers."
    _, old, better, _ = versions
    assert install(machine, old, "--no-check")[0] == 0
    (machine / "opt/current/model.engine").write_text("")
    python = machine / "python"
    python.write_text(f'#!/bin/sh\ncase "$2" in\nbuild | check) echo "$2 ${{1##*/versions/}}" >>{machine}/calls ;;\n'
                      f'*) exec {sys.executable} "$@" ;;\nesac\n'
                      f'[ "$2" != build ] || : >"${{1%/*}}/model.engine"\n')
    python.chmod(0o755)
    assert install(machine, better, python=str(python))[0] == 0
    part = f".{better.name}.part/detector.pyz"
    assert (machine / "calls").read_text().splitlines() == [f"build {part}", f"check {part}"]
    assert (machine / "opt/current/model.engine").exists() and current(machine) == better.name


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
def test_systemd_takes_the_unit(versions, machine):
    assert install(machine, versions[1], "--service", "--no-check")[0] == 0
    unit = machine / "root/etc/systemd/system/detector.service"
    for line in ("Type=notify", "WatchdogSec=30", "Restart=always", "StartLimitIntervalSec=0"):
        assert line in unit.read_text().splitlines()
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "detector.service" in line]
    assert not lines and done.returncode == 0, done.stderr
    unit.write_text(unit.read_text().replace("WatchdogSec", "WatchdogSek"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert "WatchdogSek" in done.stderr # it does look
