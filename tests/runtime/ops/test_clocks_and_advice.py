"""What a board has and lacks, on the files of a Nano, an Orin and a Thor."""
import subprocess
import sys
from pathlib import Path

import pytest
from board_files import NANO, ORIN, THOR, make_board

from jetson_det.runtime.ops import board_advice as page
from jetson_det.runtime.ops.board_advice import board_advice, gstreamer_of
from jetson_det.runtime.ops.clocks import gpu_clocks, mode_clock

REPO = Path(__file__).resolve().parents[3]


def rows_of(root, environment=(), python="3.6"):
    return {row.name: row for row in board_advice(root, dict(environment), python)}


def test_a_nano_as_it_should_be(tmp_path):
    rows = rows_of(make_board(tmp_path, NANO), {"OPENBLAS_CORETYPE": "ARMV8"})
    good = ["JetPack", "Python", "OPENBLAS_CORETYPE", "libnvinfer", "libnvdla_compiler", "power mode", "swap"]
    assert [rows[name].ok for name in good] == [True] * 7
    assert not any(rows[name].do for name in good)
    assert "4.6 (L4T R32.7.1): CUDA 10.2, TensorRT 8.2" in rows["JetPack"].found
    assert rows["power mode"].found == "MAXN; GPU at 77 MHz, at most 922 MHz"
    assert rows["driver"].ok is False and "no NVIDIA driver here" in rows["driver"].do
    assert list(rows)[-2:] == ["driver", "TensorRT's bindings"], "what may end the process comes last"


@pytest.mark.parametrize("changes, environment, name, advice", [
    (dict(swaps="Filename Type Size Used Priority\n/dev/zram0 partition 507408 0 5\n"), {}, "swap", "fallocate -l 4G"),
    (dict(), {}, "OPENBLAS_CORETYPE", "export OPENBLAS_CORETYPE=ARMV8"),
    (dict(), {"OPENBLAS_CORETYPE": "CORTEXA57"}, "OPENBLAS_CORETYPE", "ARMV8"),
    (dict(libnvdla_compiler_so=None), {}, "libnvdla_compiler", "mount the host's file"),
    (dict(libnvinfer_so_8_2_1=None), {}, "libnvinfer", "apt-get install tensorrt"),
    (dict(max_freq="640000000\n"), {}, "power mode", "promises 921.6 MHz"),
    (dict(nv_tegra_release="# R32 (release), REVISION: 3.1, GCID: 1\n"), {}, "JetPack", "known are R32.7"),
    (dict(nv_tegra_release=None), {}, "JetPack", "mount the host's"),
])
def test_a_fault_has_its_advice(tmp_path, changes, environment, name, advice):
    row = rows_of(make_board(tmp_path, NANO, **changes), environment)[name]
    assert row.ok is False and advice in row.do
    assert str(row).startswith("!! {}: ".format(name)) and "\n" not in str(row)


def test_the_python_of_the_jetpack(tmp_path):
    row = rows_of(make_board(tmp_path, NANO), python="3.8")["Python"]
    assert row.ok is False and "python3.6" in row.do


def test_an_orin_whose_clock_table_ends_early(tmp_path):
    root = make_board(tmp_path, ORIN)
    rows = rows_of(root, python="3.10")
    assert rows["JetPack"].found.startswith("6.2") and rows["Python"].ok
    assert mode_clock(root) == ("MAXN_SUPER", 1020)
    assert gpu_clocks(root)[:2] == (306, 624.75), "of the GPU, not of the VIC"
    assert rows["power mode"].ok is False and "1020 MHz" in rows["power mode"].do
    assert "swap" not in rows and "OPENBLAS_CORETYPE" not in rows


def test_a_thor_in_a_mode_that_the_table_has_not(tmp_path):
    root = make_board(tmp_path, THOR)
    rows = rows_of(root, python="3.12")
    assert rows["JetPack"].found.startswith("7.0")
    assert mode_clock(root) == ("120W", None) and gpu_clocks(root)[:3] == (1575, 1575, None)
    assert rows["power mode"].ok is None and rows["libnvdla_compiler"].ok is False


@pytest.mark.parametrize("text", ["", "x", "-\n", "12.5 MHz\n"])
def test_clocks_that_are_no_numbers(tmp_path, text):
    root = make_board(tmp_path, NANO, cur_freq=text)
    assert gpu_clocks(root) is None or gpu_clocks(root).now_mhz == pytest.approx(0, abs=1)
    assert rows_of(root)["power mode"].ok in (None, True)


def test_no_board(tmp_path):
    assert board_advice(tmp_path) == [] and gpu_clocks(tmp_path) is None and mode_clock(tmp_path) == ("", None)


@pytest.mark.parametrize("text, version", [
    ("  Video I/O:\n    GStreamer:                   YES (1.14.5)\n", "1.14.5"), ("    GStreamer:  NO\n", ""),
    ("    GStreamer:  YES\n", "of unknown version"), ("", ""), ("    No GStreamer: YES\n", ""),
])
def test_gstreamer(text, version): assert gstreamer_of(text) == version


def test_it_runs_without_numpy_and_opencv(tmp_path):
    "One of them may be what is broken."
    script = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numpy", "cv2"): raise ImportError("no " + name)
sys.meta_path.insert(0, Blocked())
from jetson_det.runtime.ops.board_advice import board_advice
print(*board_advice(sys.argv[1], {}, "3.6"), sep="\\n")
"""
    root = make_board(tmp_path, NANO)
    done = subprocess.run([sys.executable, "-c", script, str(root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          cwd=str(REPO))
    text = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert "!! numpy: not there" in text and "!! OpenCV: not there" in text and "!! OPENBLAS_CORETYPE" in text


def test_main_says_what_is_to_be_done(tmp_path, monkeypatch, capsys):
    root = str(make_board(tmp_path, NANO))
    plain = page._rows
    monkeypatch.setattr(page, "_rows", lambda _, environment, python: plain(root, environment, python))
    assert page.main() == 1
    assert "!! driver: not usable" in capsys.readouterr().out
    monkeypatch.setattr(page, "_rows", lambda *_: iter(()))
    assert page.main() == 0 and "not a Jetson" in capsys.readouterr().out
