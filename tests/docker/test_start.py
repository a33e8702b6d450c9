"""docker/start.sh: run for real, in a file system that says which board it is, with a stand-in for the program."""
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

REPO = Path(__file__).resolve().parents[2]
START = REPO/"docker/start.sh"
STAND_INS = Path(__file__).resolve().parent/"stand_ins"
VERSION = "docks-0123456789ab"
pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("flock"), reason="needs Linux and flock")


class Container:
    "Folders that are what a container sees: the board's files, a bundle, the volume of engines."
    def __init__(self, folder, release="# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t210ref\n"):
        self.root = folder/"root"
        self.home = folder/"bundle"
        self.engines = folder/"engines"
        self.state = folder/"state"
        self.log = folder/"log"
        self.libraries = self.root/"usr/lib/aarch64-linux-gnu"
        for place in (self.root/"etc", self.home, self.state, self.libraries): place.mkdir(parents=True)
        (self.root/"etc/nv_tegra_release").write_text(release)
        (self.root/"etc/nv_jetson_model").write_bytes(b"NVIDIA Jetson Nano Developer Kit\0")
        (self.libraries/"libnvinfer.so.8.2.1").write_bytes(b"a library")
        (self.libraries/"libnvinfer.so.8").symlink_to("libnvinfer.so.8.2.1")
        (self.home/"bundle.env").write_text(f"VERSION={VERSION}\nBOARD=nano\nL4T=R32\n")
        (self.home/"bundle.json").write_text("{}")
        (self.home/"model.onnx").write_bytes(b"the model")
        shutil.copy(STAND_INS/"program.py", self.home/"detector.pyz")
        self.settings = dict(DETECTOR_L4T="R32", PYTHON=sys.executable)

    def environment(self, **settings):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DETECTOR_", "LD_"))}
        folders = dict(DETECTOR_ROOT=self.root, DETECTOR_HOME=self.home, DETECTOR_ENGINES=self.engines,
                       DETECTOR_STATE=self.state, LOG=self.log)
        return dict(kept, **{name: str(path) for name, path in folders.items()}, **dict(self.settings, **settings))

    def start(self, *words, **settings):
        "A start that goes on by itself."
        return subprocess.Popen(["sh", str(START), *words], env=self.environment(**settings), text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

    def run(self, *words, **settings):
        "A start to its end: exit code, standard output, standard error."
        p = self.start(*words, **settings)
        out, err = p.communicate(timeout=60)
        return p.returncode, out, err

    def notes(self):
        "What the program noted: (process, text)."
        if not self.log.exists(): return []
        return [tuple(line.split(" ", 1)) for line in self.log.read_text().splitlines()]

    def texts(self): return [text for _, text in self.notes()]

    def wait_for(self, text):
        end = time.monotonic() + 20
        while not any(text in line for line in self.texts()):
            assert time.monotonic() < end, f"{text!r} was not noted"
            time.sleep(.01)

    def folders(self):
        "What lies in the volume, the lock aside."
        return sorted(path.name for path in self.engines.iterdir() if path.name != ".lock")


ENGINE = f"{VERSION}-R32.7.1-tensorrt8.2.1-NVIDIA-Jetson-Nano-Developer-Kit"
TIMINGS = "timings-R32.7.1-tensorrt8.2.1-NVIDIA-Jetson-Nano-Developer-Kit"


@pytest.fixture
def container(tmp_path): return Container(tmp_path)


def refused(done, part):
    "The script's own line is the last one; a program that it started may have said something before."
    code, _, err = done
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and part in last, done
    assert len(err.splitlines()) == 1 or "building the engine" in err


# ---- the first start and the next ones

def test_the_first_start_builds_and_the_next_does_not(container):
    assert container.run("info")[0] == 0
    assert container.texts() == ["builds", "built", "runs info engine of the model"]
    assert container.folders() == sorted([ENGINE, TIMINGS])
    code, _, err = container.run("check", "--threads", "2")
    assert (code, err) == (0, "") and container.texts()[3:] == ["runs check --threads 2 engine of the model"]


def test_the_program_takes_the_process_of_the_script(container):
    p = container.start("info")
    p.communicate(timeout=60)
    assert container.notes()[-1] == (str(p.pid), "runs info engine of the model")
    assert (container.state/"detector.pid").read_text() == f"{p.pid}\n"


@pytest.mark.parametrize("change", ["model", "tensorrt", "l4t", "board"])
def test_another_engine_where_something_is_different(container, change):
    container.run("info")
    if change == "model": (container.home/"bundle.env").write_text("VERSION=docks-ff\nBOARD=nano\nL4T=R32\n")
    if change == "tensorrt":
        (container.libraries/"libnvinfer.so.8.2.1").rename(container.libraries/"libnvinfer.so.8.2.9")
        (container.libraries/"libnvinfer.so.8").unlink()
    if change == "l4t": (container.root/"etc/nv_tegra_release").write_text("# R32 (release), REVISION: 7.5, GCID: 1\n")
    if change == "board": (container.root/"etc/nv_jetson_model").write_bytes(b"NVIDIA Jetson TX2\0")
    assert container.run("info")[0] == 0
    assert container.texts().count("built") == 2 and len([f for f in container.folders() if f.startswith("docks")]) == 2


def test_rebuild(container):
    container.run("info")
    (container.engines/ENGINE/"model.engine").write_bytes(b"damaged")
    assert container.run("rebuild")[0] == 0 and not any("runs rebuild" in text for text in container.texts())
    assert (container.engines/ENGINE/"model.engine").read_bytes() == b"engine of the model"


def test_words_for_the_build(container):
    assert container.run("info", DETECTOR_BUILD_WORDS="--precision fp16 --workspace 256")[0] == 0
    assert container.texts()[0] == "builds --precision fp16 --workspace 256"


def test_another_command(container):
    code, out, _ = container.run("--", "sh", "-c", 'pwd; echo "$1"', "sh", "two words")
    assert code == 0 and out == f"{container.engines/ENGINE}\ntwo words\n"


def test_without_an_engine(container):
    shutil.rmtree(container.libraries)
    assert container.run("info", DETECTOR_ENGINE="none")[0] == 0
    assert container.texts() == ["runs info without an engine"] and not container.engines.exists()


# ---- a board that does not fit

@pytest.mark.parametrize("release, part", [
    ("# R36 (release), REVISION: 4.3, GCID: 1\n", "L4T R36.4.3 and the image is for R32: build the image with"
     " Dockerfile.jetpack6"),
    ("# R35 (release), REVISION: 4.1, GCID: 1\n", "Dockerfile.jetpack5"),
    ("# R34 (release), REVISION: 1.1, GCID: 1\n", "Dockerfile.jetpack5"),
    ("# R38 (release), REVISION: 2.0, GCID: 1\n", "Dockerfile.jetpack7"),
    ("# R39 (release), REVISION: 1.0, GCID: 1\n", "Dockerfile.jetpack7"),
    ("# R28 (release), REVISION: 2.0, GCID: 1\n", "no image of ours is for it"),
    ("", "does not know the board's L4T"), ("not a release\n", "does not know the board's L4T"),
    ("# R32 (release), REVISION: $(touch evil)\n", "does not know the board's L4T"),
])
def test_a_foreign_release(container, release, part):
    (container.root/"etc/nv_tegra_release").write_text(release)
    refused(container.run("info", DETECTOR_ENGINE="none"), part)
    refused(container.run("info"), part)
    assert not container.engines.exists() and container.texts() == []


def test_an_old_board(container):
    (container.home/"bundle.env").write_text(f"VERSION={VERSION}\nBOARD=xavier-nx\nL4T=R32 R35\n")
    refused(container.run("info", DETECTOR_L4T="R35"), "L4T R32.7.1 and the image is for R35: build the image with"
            " Dockerfile.jetpack4")


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(st.sampled_from("# R3256(release),REVION:.7\n$`;'\"\\*\t\0"), max_size=60))
def test_any_text_in_place_of_the_release(container, text):
    "One line, and nothing is built or run."
    (container.root/"etc/nv_tegra_release").write_text(text)
    assume("# R32 (release), REVISION: 7" not in text)
    refused(container.run("info"), "L4T")
    assert not container.engines.exists() and container.texts() == []


def test_no_release_at_all(container):
    (container.root/"etc/nv_tegra_release").unlink()
    refused(container.run("info"), "-v /etc/nv_tegra_release:/etc/nv_tegra_release:ro")
    (container.root/"etc/nv_tegra_release").mkdir() # what Docker makes of a bind mount without a source
    refused(container.run("info"), "-v /etc/nv_tegra_release:/etc/nv_tegra_release:ro")


def test_an_image_for_two_releases(container):
    (container.home/"bundle.env").write_text(f"VERSION={VERSION}\nBOARD=thor\nL4T=R38 R39\n")
    for release in ("R38", "R39"):
        (container.root/"etc/nv_tegra_release").write_text(f"# {release} (release), REVISION: 2.0, GCID: 1\n")
        assert container.run("info", DETECTOR_L4T="R38 R39")[0] == 0


def test_a_bundle_for_another_board(container):
    (container.home/"bundle.env").write_text(f"VERSION={VERSION}\nBOARD=orin-nx\nL4T=R35 R36\n")
    refused(container.run("info"), "the bundle is for orin-nx, L4T R35 R36: bundle the model for this board")


def test_no_bundle_or_no_release_of_the_image(container):
    refused(container.run("info", DETECTOR_L4T=""), "DETECTOR_L4T is not set")
    (container.home/"bundle.env").unlink()
    refused(container.run("info"), "no bundle is here")


# ---- TensorRT's libraries

@pytest.mark.parametrize("empty", [False, True])
def test_no_tensorrt(container, empty):
    for file in container.libraries.iterdir(): file.unlink()
    if empty: (container.libraries/"libnvinfer.so.8").write_bytes(b"") # what the runtime would mount over
    refused(container.run("info"), "libnvinfer is not in the container: start it with --runtime nvidia")


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
@pytest.mark.parametrize("name, release, part", [
    ("libnvdla_compiler.so", "R32", "-v /usr/lib/aarch64-linux-gnu/tegra/libnvdla_compiler.so:/usr/lib/"),
    ("libnvdla_compiler.so", "R36", "-v /usr/lib/aarch64-linux-gnu/nvidia/libnvdla_compiler.so:/usr/lib/"),
    ("libcudla.so", "R32", "TensorRT needs libcudla.so, which is not in the container"),
])
@pytest.mark.parametrize("how", ["gone", "empty"])
def test_a_library_that_tensorrt_needs(container, tmp_path, name, release, part, how):
    "A real library that was linked with another one, which is gone since."
    (tmp_path/"x.c").write_text("int dla(void); int infer(void) { return dla(); }")
    (tmp_path/"dla.c").write_text("int dla(void) { return 1; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", name, "dla.c"], cwd=tmp_path, check=True)
    library = container.libraries/"libnvinfer.so.8.2.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, "x.c", name], cwd=tmp_path, check=True)
    (container.root/"etc/nv_tegra_release").write_text(f"# {release} (release), REVISION: 7.1, GCID: 1\n")
    (container.home/"bundle.env").write_text(f"VERSION={VERSION}\nBOARD=nano\nL4T={release}\n")
    where = dict(LD_LIBRARY_PATH=str(tmp_path), DETECTOR_L4T=release)
    assert container.run("info", **where)[0] == 0
    if how == "gone": (tmp_path/name).unlink()
    else: (tmp_path/name).write_bytes(b"")
    refused(container.run("info", **where), part)


# ---- killed, two at once, signals

@pytest.mark.parametrize("seconds", [0, .03, .06, .1, .15])
def test_killed_in_the_midst_of_a_build(container, seconds):
    "All processes at once, as when the power fails: no half engine is taken for one."
    p = container.start("info", BUILD_SECONDS="5")
    time.sleep(seconds)
    if seconds > .1: container.wait_for("builds")
    os.killpg(p.pid, signal.SIGKILL)
    p.communicate()
    assert not (container.engines/ENGINE).exists()
    assert container.run("info")[0] == 0
    assert container.texts()[-2:] == ["built", "runs info engine of the model"]
    assert container.folders() == sorted([ENGINE, TIMINGS])


def overlaps(notes):
    "Did a build begin before another had ended?"
    open_builds = 0
    for _, text in notes:
        if text == "builds": open_builds += 1
        if text == "built": open_builds -= 1
        if open_builds > 1: return True
    return False


def test_the_script_alone_is_killed(container):
    "The builder goes on and holds the lock; the next start waits for it, and builds again."
    p = container.start("info", BUILD_SECONDS="1")
    container.wait_for("builds")
    p.kill()
    code, _, err = container.run("info")
    p.communicate()
    assert code == 0 and "another container builds an engine" in err
    assert container.texts() == ["builds", "built", "builds", "built", "runs info engine of the model"]


def test_three_starts_at_once(container):
    starts = [container.start("info", BUILD_SECONDS=".4") for _ in range(3)]
    done = [(p.communicate(timeout=60), p.returncode) for p in starts]
    assert [code for _, code in done] == [0, 0, 0], done
    assert not overlaps(container.notes()) and container.texts().count("built") == 1
    assert container.texts().count("runs info engine of the model") == 3


def test_ended_in_the_midst_of_a_build(container):
    p = container.start("info", BUILD_SECONDS="20")
    container.wait_for("builds")
    assert (container.state/"detector.building").exists()
    p.terminate()
    p.communicate(timeout=10)
    assert p.returncode == 143 and container.texts() == ["builds", "got signal 15"]
    assert container.folders() == [] and not (container.state/"detector.building").exists()


def test_ended_while_it_waits(container):
    first = container.start("info", BUILD_SECONDS="20")
    container.wait_for("builds")
    second = container.start("info")
    assert "waiting for it" in second.stderr.readline()
    second.terminate()
    second.communicate(timeout=10)
    assert second.returncode == 143 and container.texts() == ["builds"]
    first.terminate()
    first.communicate(timeout=10)


def test_signals_go_to_the_program(container):
    container.run("info")
    p = container.start("watch", "0")
    container.wait_for("runs watch")
    p.terminate()
    p.communicate(timeout=10)
    assert p.returncode == 0 and container.notes()[-1] == (str(p.pid), "got signal 15")


# ---- builds that fail

@pytest.mark.parametrize("end, part", [
    ("1", "the engine was not built, or it does not find what the model finds"), ("2", "the build ended with 2"),
    ("KILL", "most likely for memory; add swap on the board")])
def test_a_build_that_fails(container, end, part):
    container.engines.mkdir()
    (container.engines/TIMINGS).write_bytes(b"damaged")
    refused(container.run("info", BUILD_END=end), part)
    assert container.folders() == [] and container.texts() == ["builds"]
    assert container.run("info")[0] == 0


def test_a_build_without_end(container):
    refused(container.run("info", BUILD_SECONDS="20", DETECTOR_BUILD_SECONDS="1"), "was not built in 1 s")
    assert container.folders() == []


def test_a_full_disk(container, tmp_path):
    (tmp_path/"bin").mkdir()
    (tmp_path/"bin/df").write_text("#!/bin/sh\necho Filesystem\necho /dev/mmcblk0p1 1 1 9000 99% /\n")
    (tmp_path/"bin/df").chmod(0o755)
    path = f"{tmp_path/'bin'}:{os.environ['PATH']}"
    refused(container.run("info", PATH=path), "8 MB are free, and an engine needs 16: make room")
    assert container.folders() == [] and container.texts() == []


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 1 MB."
    place = tmp_path/"small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_real_disk_of_one_megabyte(container, small_disk):
    container.engines = small_disk
    refused(container.run("info"), "1 MB are free, and an engine needs 16: make room")
    assert container.folders() == [] and container.texts() == []


def test_a_disk_that_fills_while_the_bundle_is_copied(container):
    "Files end at 64 KB, as on a disk that is full then."
    (container.home/"model.onnx").write_bytes(bytes(200_000))
    p = subprocess.run(["bash", "-c", 'ulimit -f 64; exec sh "$0" info', str(START)], env=container.environment(),
                       capture_output=True, text=True)
    refused((p.returncode, p.stdout, p.stderr), "model.onnx can't be written; is the disk full?")
    assert container.folders() == [] and container.texts() == []


def test_a_volume_that_cannot_be_written(container, tmp_path):
    container.engines.write_text("a file")
    refused(container.run("info"), "can't be written by user")


# ---- the real program

PYTHONS = [sys.executable] + [str(p) for p in [REPO/".venv-py36/bin/python"] if p.exists()]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_real_program(container, tmp_path, python):
    "It runs without an engine; where there is no TensorRT, its build fails in the words of both."
    from jetson_det.export.bundle import runtime_zipapp
    (container.home/"detector.pyz").write_bytes(runtime_zipapp())
    shutil.copy(REPO/"tests/fixtures/colors.onnx", container.home/"model.onnx")
    (container.home/"bundle.json").write_text('{"format": 1, "name": "colors", "parts": {"model": "model.onnx"}}')
    code, out, err = container.run("info", DETECTOR_ENGINE="none", PYTHON=python)
    assert code == 0 and " classes: " in out, err
    refused_build = container.run("info", PYTHON=python)
    assert refused_build[0] == 2 and "TensorRT" in refused_build[2] and "the build ended with 2" in refused_build[2]
    assert container.folders() == []


# ---- how it is called

def test_help_needs_no_bundle_and_no_board(container):
    shutil.rmtree(str(container.home))
    for word in ("-h", "--help"):
        code, out, err = container.run(word)
        assert code == 0 and err == "" and "rebuild" in out and "watch" in out and "-- COMMAND" in out


@pytest.mark.parametrize("words", [["wacth", "0"], ["--out", "x"], ["Info"], ["watch run"], [""], [], ["*"]])
def test_an_unknown_word_is_one_line_before_anything_is_built(container, words):
    code, out, err = container.run(*words)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert "predict watch run" in err and "rebuild, and -- COMMAND" in err
    assert not container.engines.exists()


def test_nothing_behind_the_two_dashes(container): refused(container.run("--"), "needs a command")


@pytest.mark.parametrize("seconds", ["", "abc", "-1"])
def test_a_wrong_time_of_the_build(container, seconds):
    done = container.run("info", DETECTOR_BUILD_SECONDS=seconds)
    if seconds: refused(done, f"DETECTOR_BUILD_SECONDS is '{seconds}'")
    else: assert done[0] == 0 # as if it were not set


def test_the_words_are_those_of_the_program(container, capsys):
    from jetson_det.runtime.program import main
    with contextlib.suppress(SystemExit): main(["--help"], container.home)
    verbs = re.findall("^    ([a-z-]+)", capsys.readouterr().out, re.M)
    assert "board-check" in verbs
    text = re.search(r'^verbs="([a-z -]+)"', START.read_text(), re.M).group(1)
    assert sorted(text.split()) == sorted(verbs)
