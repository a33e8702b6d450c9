"""Bundles: the archive, and its installer run for real: installed, killed, switched, rolled back, refused; under
Python 3.6 where it is here."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from jetson_det.core import InputError
from jetson_det.data.formats.registry import read_dataset
from jetson_det.export.bundle import bundle, runtime_zipapp
from jetson_det.export.onnx import export_onnx
from jetson_det.export.tensorrt import export_tensorrt
from jetson_det.models.zoo import create_model
from jetson_det.runtime.boards import board as board_of
from jetson_det.runtime.contract import METADATA_KEY
from jetson_det.runtime.sessions import open_session
from jetson_det.scenes.docks import write_scenes

pytestmark = [pytest.mark.usefixtures("kept_graphs"),
              pytest.mark.skipif(sys.platform != "linux" or not shutil.which("flock"), reason="needs Linux and flock")]
DOCKER = Path(__file__).resolve().parents[2]/"docker"
PYTHON36 = Path(__file__).resolve().parents[2]/".venv-py36/bin/python"
PYTHONS = [pytest.param(sys.executable, id="this"),
           pytest.param(str(PYTHON36), id="3.6", marks=pytest.mark.skipif(
               not PYTHON36.exists(), reason="no .venv-py36; tools/test_runtime36.sh makes it"))]


def random_detector(seed):
    torch.manual_seed(seed)
    model = create_model("yolox-nano", ("Sack", "Person")).eval()
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Conv2d) and ("cls_preds" in name or "obj_preds" in name):
            torch.nn.init.normal_(layer.weight, std=20.)
            torch.nn.init.zeros_(layer.bias)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder with two bundles for the Nano, unpacked."
    folder = tmp_path_factory.mktemp("bundle")
    docks = read_dataset(write_scenes(folder/"docks", 6, size=(96, 160)))
    found = []
    for seed, name in enumerate(("old", "new")):
        export_onnx(random_detector(seed), folder/f"{name}.onnx", (96, 160))
        one = bundle(folder/f"{name}.onnx", folder/f"{name}.tar.gz", "nano", data=docks)
        with tarfile.open(folder/f"{name}.tar.gz") as archive: archive.extractall(folder, filter="data")
        found.append(one)
    return folder, found


@pytest.fixture
def machine(tmp_path):
    "A file system that says it is a Nano."
    (tmp_path/"root/etc").mkdir(parents=True)
    (tmp_path/"root/etc/nv_tegra_release").write_text("# R32 (release), REVISION: 7.1, GCID: 29818004\n")
    return tmp_path


def environment(machine, python=sys.executable):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return dict(kept, DETECTOR_ROOT=str(machine/"root"), PYTHON=python, LC_ALL="C.UTF-8")


def install(machine, folder, *words, python=sys.executable):
    return subprocess.run(["sh", str(folder/"install.sh"), "--prefix", str(machine/"opt"), *words], timeout=120,
                          capture_output=True, text=True, env=environment(machine, python))


def current(machine):
    link = machine/"opt/current"
    return os.readlink(link).split("/")[-1] if link.is_symlink() else None


def refused(done, part):
    assert done.returncode == 2 and done.stderr.startswith("error: ") and part in done.stderr, done
    assert done.stderr.count("\n") == 1


def test_a_refused_install_leaves_nothing(made, machine):
    folder, (old, _) = made
    refused(install(machine, folder/old.version, "--rollback"), "")
    assert not (machine/"opt").exists()


# ---- the archive

def test_the_same_files_give_the_same_bytes(made, tmp_path):
    folder, (old, _) = made
    golden = tmp_path/"golden"
    golden.write_bytes((folder/old.version/"model.golden").read_bytes())
    for name in "ab": bundle(folder/"old.onnx", tmp_path/f"{name}.tar.gz", "nano", golden=golden)
    assert (tmp_path/"a.tar.gz").read_bytes() == (tmp_path/"b.tar.gz").read_bytes()
    assert bundle(folder/"old.onnx", tmp_path/"c.tar.gz", "nano", golden=golden).version == old.version


def test_what_is_inside(made):
    folder, (old, _) = made
    home = folder/old.version
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=home).returncode == 0
    listed = {line.split("  ")[1] for line in (home/"SHA256SUMS").read_text().splitlines()}
    unlisted = {"SHA256SUMS", ".dockerignore"}
    assert listed == set(old.files) - unlisted == {f.name for f in home.iterdir()} - unlisted
    assert "@" not in (home/"README.txt").read_text()
    copied = (home/"Dockerfile.jetpack4").read_text().split("COPY ")[1].split(" ./")[0].replace("\\\n", " ").split()
    kept = [line[1:] for line in (home/".dockerignore").read_text().splitlines() if line.startswith("!")]
    for patterns in (copied, kept): # the image's sums are those of the bundle: each listed file has to get into it
        assert {name for name in listed for pattern in patterns if fnmatch(name, pattern)} == listed
    assert os.access(home/"install.sh", os.X_OK)


def test_the_runtime_needs_nothing_else_of_the_package():
    import io
    names = zipfile.ZipFile(io.BytesIO(runtime_zipapp())).namelist()
    assert "__main__.py" in names and all(name.split("/")[1:2] in ([], ["__init__.py"], ["runtime"]) for name in names)


def test_a_file_that_was_exported_for_a_board(tmp_path, made):
    folder, (old, _) = made
    export_tensorrt(random_detector(0), tmp_path/"dock.onnx", "orin-nano", input_size=(96, 160))
    one = bundle(tmp_path/"dock.onnx")
    assert one.board == "orin-nano" and one.l4t == ("R35", "R36", "R39") and one.golden_images == 0
    (tmp_path/"dock.onnx").rename(tmp_path/"e.onnx") # and without its script: the bundle makes its own
    again = bundle(tmp_path/"e.onnx")
    assert again.version == one.version
    (tmp_path/"e.onnx").rename(tmp_path/"dock.onnx")
    with tarfile.open(one.path) as archive: script = archive.extractfile(f"{one.version}/model.build.sh").read()
    assert b"--onnx=model.onnx" in script and b"dock." not in script
    with pytest.raises(InputError, match="was exported for orin-nano"): bundle(tmp_path/"dock.onnx", board_name="nano")
    with pytest.raises(InputError, match="jetpack 4.6"): bundle(tmp_path/"dock.onnx", jetpack="4.6")
    assert bundle(tmp_path/"dock.onnx", tmp_path/"one.tar.gz", jetpack="6.2").l4t == ("R36",)


@pytest.mark.parametrize("seed", range(60))
def test_damaged_models_are_one_line(made, tmp_path, seed):
    folder, _ = made
    data = bytearray((folder/"old.onnx").read_bytes())
    draw = random.Random(seed)
    if seed % 3 == 0: data = data[:draw.randrange(len(data))]
    else:
        most = 20_000 if seed % 2 else len(data)
        for _ in range(1 + seed % 7): data[draw.randrange(most)] ^= 1 << seed % 8
    (tmp_path/"x.onnx").write_bytes(data)
    golden = tmp_path/"golden"
    golden.write_bytes((folder/made[1][0].version/"model.golden").read_bytes())
    try: bundle(tmp_path/"x.onnx", tmp_path/"x.tar.gz", "nano", golden=golden)
    except InputError as e: assert "\n" not in str(e)
    else: assert (tmp_path/"x.onnx").read_bytes() == (folder/"old.onnx").read_bytes(), "an altered file was bundled"


def test_a_plugin_that_the_program_does_not_know(tmp_path, made):
    export_onnx(random_detector(0), tmp_path/"nms.onnx", (96, 160), output="efficient-nms")
    with pytest.raises(InputError, match="TensorRT's NMS plugin"): bundle(tmp_path/"nms.onnx", board_name="orin-nano")


@pytest.mark.parametrize("call, part", [
    (lambda f: bundle(f), "is a folder"), (lambda f: bundle(f/"docks.txt", board_name="nano"), "not an .onnx file"),
    (lambda f: bundle(f/"gone.onnx", board_name="nano"), "gone.onnx"),
    (lambda f: bundle(f/"old.onnx"), "a bundle is for a board"),
    (lambda f: bundle(f/"old.onnx", board_name="nanu"), "did you mean 'nano'"),
    (lambda f: bundle(f/"old.onnx", f/"old.onnx", "nano"), "old.onnx"),
    (lambda f: bundle(f/"old.onnx", f/"x.zip", "nano"), "ends in .tar.gz"),
    (lambda f: bundle(f/"old.onnx", board_name="nano", golden=f/"new.onnx"), "new.onnx"),
])
def test_wrong_calls(made, call, part):
    before = sorted(made[0].iterdir())
    with pytest.raises(InputError, match=part): call(made[0])
    assert sorted(made[0].iterdir()) == before


# ---- the installer

@pytest.mark.parametrize("python", PYTHONS)
def test_installed_switched_and_rolled_back(made, machine, python):
    folder, (old, new) = made
    done = install(machine, folder/old.version, python=python)
    assert done.returncode == 0 and "parity holds" in done.stdout and current(machine) == old.version, done
    refused(install(machine, folder/old.version, "--rollback"), "no earlier version")
    assert install(machine, folder/new.version, python=python).returncode == 0 and current(machine) == new.version
    assert install(machine, folder/new.version, python=python).returncode == 0 # once more: nothing changes
    assert install(machine, folder/new.version, "--rollback").returncode == 0 and current(machine) == old.version
    assert install(machine, folder/old.version, "--rollback").returncode == 0 and current(machine) == new.version
    status = install(machine, folder/new.version, "--status").stdout
    assert f"current: versions/{new.version}\nprevious: versions/{old.version}\n" == status


@pytest.mark.parametrize("python", PYTHONS)
def test_the_installed_program_finds_what_the_package_finds(made, machine, python):
    folder, (old, _) = made
    assert install(machine, folder/old.version, python=python).returncode == 0
    program = str(machine/"opt/current/detector.pyz")
    def run(*words):
        return subprocess.run([python, program, *words], cwd=machine, capture_output=True, text=True, timeout=120,
                              env=environment(machine))
    image = next((folder/"docks/images/train").glob("*.jpg"))
    done = run("predict", str(image), "--out", "found")
    assert done.returncode == 0, done
    theirs = json.loads((machine/"found/predictions.json").read_text())["frames"][0]["detections"]
    docks = read_dataset(folder/"docks")
    ours = open_session(folder/"old.onnx")(docks.image(docks.paths.tolist().index(f"images/train/{image.name}")))
    assert len(theirs) == len(ours.scores) > 0
    assert np.allclose([row["box"] for row in theirs], ours.boxes, atol=.05)
    assert np.allclose([row["score"] for row in theirs], ours.scores, atol=1e-3)
    assert run("info").stdout.startswith("yolox-nano: 96x160, 2 classes: Sack, Person")
    assert run("bench", "--json", "b.json").returncode == 0 and json.loads((machine/"b.json").read_text())["stages"]
    wrong = [(("predict", "gone.jpg", "--out", "x"), "gone.jpg"), (("info", "--confidence", "2"), "confidence")]
    for words, part in wrong:
        done = run(*words)
        assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1, done


def test_a_model_that_finds_something_else_is_not_switched_to(made, machine, tmp_path):
    folder, (old, new) = made
    assert install(machine, folder/old.version).returncode == 0
    wrong = tmp_path/"wrong"
    shutil.copytree(folder/new.version, wrong)
    model = onnx.load(str(wrong/"model.onnx"))
    weights = next(t for t in model.graph.initializer if len(t.dims) == 4 and t.dims[0] == 16)
    weights.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weights)*3, weights.name))
    onnx.save(model, str(wrong/"model.onnx"))
    again = "sha256sum $(sed 's/^[0-9a-f]*  //' SHA256SUMS) > s && mv s SHA256SUMS"
    sums = subprocess.run(again, shell=True, cwd=wrong)
    assert sums.returncode == 0
    done = install(machine, wrong)
    assert done.returncode == 2 and "golden images failed" in done.stderr and "Traceback" not in done.stderr, done
    assert "parity" in done.stdout
    assert current(machine) == old.version
    assert [p.name for p in (machine/"opt/versions").iterdir()] == [old.version]
    assert install(machine, wrong, "--no-check").returncode == 0


@pytest.mark.parametrize("name", "model.onnx detector.pyz model.golden bundle.json bundle.env start.sh".split())
def test_a_damaged_file_is_refused(made, machine, tmp_path, name):
    folder, (old, _) = made
    shutil.copytree(folder/old.version, tmp_path/"b")
    data = bytearray((tmp_path/"b"/name).read_bytes())
    data[len(data)//2] ^= 1
    (tmp_path/"b"/name).write_bytes(data)
    refused(install(machine, tmp_path/"b"), "differs from SHA256SUMS")
    assert current(machine) is None


def test_names_that_lead_elsewhere_are_refused(made, machine, tmp_path):
    folder, (old, _) = made
    shutil.copytree(folder/old.version, tmp_path/"b")
    for name in ("../x", "/etc/x", ".hidden", "-rf"):
        (tmp_path/"b/SHA256SUMS").write_text(f"{'0'*64}  {name}\n")
        refused(install(machine, tmp_path/"b"), "no plain file name")
    assert not (machine/"opt/versions").exists() or not list((machine/"opt/versions").iterdir())


def test_another_board_or_a_pc(made, machine):
    folder, (old, _) = made
    (machine/"root/etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3\n")
    refused(install(machine, folder/old.version), "L4T R36; the bundle is for nano, L4T R32")
    (machine/"root/etc/nv_tegra_release").unlink()
    refused(install(machine, folder/old.version), "no Jetson")
    assert install(machine, folder/old.version, "--force").returncode == 0


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_signatures(made, machine, tmp_path):
    folder, (old, _) = made
    def key(name):
        subprocess.run(["openssl", "genrsa", "-out", str(tmp_path/name), "2048"], check=True, capture_output=True)
        subprocess.run(["openssl", "rsa", "-in", str(tmp_path/name), "-pubout", "-out", str(tmp_path/f"{name}.pub")],
                       check=True, capture_output=True)
        return tmp_path/name
    mine, other = key("mine"), key("other")
    golden = tmp_path/"g.golden"
    golden.write_bytes((folder/old.version/"model.golden").read_bytes())
    one = bundle(folder/"old.onnx", tmp_path/"s.tar.gz", "nano", golden=golden, key=mine)
    with tarfile.open(one.path) as archive: archive.extractall(tmp_path, filter="data")
    assert one.signed
    refused(install(machine, tmp_path/one.version, "--key", f"{other}.pub"), "the signature is not that of")
    signature = tmp_path/one.version/"SHA256SUMS.sig"
    right = signature.read_bytes()
    for torn in (right[:100] + bytes([right[100] ^ 1]) + right[101:], right[:-1], b""):
        signature.write_bytes(torn)
        refused(install(machine, tmp_path/one.version, "--key", f"{mine}.pub"), "the signature is not that of")
    signature.write_bytes(right)
    assert install(machine, tmp_path/one.version, "--key", f"{mine}.pub").returncode == 0
    (machine/"opt/trusted.pem").write_bytes((tmp_path/"mine.pub").read_bytes())
    refused(install(machine, folder/made[1][1].version), "is not signed")
    with pytest.raises(InputError, match="openssl can't sign"): bundle(
        folder/"old.onnx", tmp_path/"x.tar.gz", "nano", golden=golden, key=tmp_path/"mine.pub")


def test_killed_at_twenty_moments(made, machine):
    "The old version runs on, or the new one does; a second call installs it."
    folder, (old, new) = made
    assert install(machine, folder/old.version, "--no-check").returncode == 0
    draw = random.Random(0)
    for _ in range(20):
        p = subprocess.Popen(["sh", str(folder/new.version/"install.sh"), "--prefix", str(machine/"opt"), "--no-check"],
                             env=environment(machine), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             start_new_session=True)
        time.sleep(draw.uniform(0, .12))
        try: os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError: pass # it was faster
        p.wait()
        name = current(machine)
        assert name in (old.version, new.version)
        sums = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=machine/"opt/current")
        assert sums.returncode == 0
    assert install(machine, folder/new.version, "--no-check").returncode == 0 and current(machine) == new.version
    left = sorted(p.name for p in (machine/"opt/versions").iterdir())
    assert left == sorted([old.version, new.version])


def another(folder, name):
    "An unpacked bundle again, as another version."
    again = folder.parent/name
    shutil.copytree(folder, again)
    (again/"README.txt").write_text(name)
    (again/"bundle.env").write_text((again/"bundle.env").read_text().replace(folder.name, name))
    names = [line.split("  ")[1] for line in (again/"SHA256SUMS").read_text().splitlines()]
    with open(again/"SHA256SUMS", "w") as sums:
        subprocess.run(["sha256sum", *names], cwd=again, stdout=sums, check=True)
    return again


@pytest.fixture(scope="module")
def three(made, tmp_path_factory):
    "Three versions, unpacked, and a machine on which the first two were installed."
    folder, (old, new) = made
    third = another(folder/new.version, "third")
    machine = tmp_path_factory.mktemp("three")
    (machine/"root/etc").mkdir(parents=True)
    (machine/"root/etc/nv_tegra_release").write_text("# R32 (release), REVISION: 7.1\n")
    for one in (folder/old.version, folder/new.version):
        assert install(machine, one, "--no-check").returncode == 0
    return machine, (folder/old.version, folder/new.version, third)


def killed_at(step, machine, folder, *words):
    "The installer, ended by SIGKILL at the STEP-th command that changes something; True: there were not so many."
    shims = machine/"shims"
    shims.mkdir(exist_ok=True)
    for name in "ln mv mkdir rm chmod".split():
        (shims/name).write_text(f"""#!/bin/sh
echo x >>{shims}/count
[ "$(wc -l <{shims}/count)" != {step} ] || kill -9 $PPID
exec {shutil.which(name)} "$@"
""")
        (shims/name).chmod(0o755)
    (shims/"count").write_text("")
    found = environment(machine)
    found["PATH"] = f"{shims}:{found['PATH']}"
    done = subprocess.run(["sh", str(folder/"install.sh"), "--prefix", str(machine/"opt"), *words], env=found,
                          capture_output=True, timeout=60)
    assert done.returncode in (0, -signal.SIGKILL), done
    return done.returncode == 0


@pytest.mark.parametrize("words", [("--no-check",), ("--rollback",)])
def test_killed_between_any_two_steps(three, tmp_path, words):
    "What runs is whole, and there is a way back from it: nothing is forgotten."
    base, (a, b, c) = three
    step = 0
    while True:
        step += 1
        machine = tmp_path/str(step)
        shutil.copytree(base, machine, symlinks=True)
        reached_the_end = killed_at(step, machine, c, *words)
        now = current(machine)
        before = {b.name: a.name, c.name: b.name, a.name: b.name}[now]
        assert now == b.name or now == (c.name if words[0] == "--no-check" else a.name)
        assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=machine/"opt/current").returncode == 0
        assert f"previous: versions/{before}\n" in install(machine, c, "--status").stdout
        done = install(machine, c, "--rollback")
        assert done.returncode == 0 and current(machine) == before, (step, done)
        assert install(machine, c, "--no-check").returncode == 0 and current(machine) == c.name
        assert not [p for p in (machine/"opt/versions").iterdir() if p.name.startswith(".")]
        if reached_the_end: break
        shutil.rmtree(machine)
    assert step > 4


def test_old_versions_are_removed(three, tmp_path):
    base, (a, b, c) = three
    shutil.copytree(base, tmp_path/"m", symlinks=True)
    assert install(tmp_path/"m", c, "--no-check").returncode == 0
    (tmp_path/f"m/opt/versions/.{a.name}.part").mkdir() # of an install that was killed
    assert install(tmp_path/"m", c, "--remove-old").returncode == 0
    assert sorted(p.name for p in (tmp_path/"m/opt/versions").iterdir()) == sorted([b.name, c.name])
    assert install(tmp_path/"m", c, "--rollback").returncode == 0 and current(tmp_path/"m") == b.name
    (tmp_path/"m/opt/current").unlink()
    refused(install(tmp_path/"m", c, "--remove-old"), "nothing is installed")


def test_a_damaged_version_is_put_right(three, tmp_path):
    base, (a, b, c) = three
    shutil.copytree(base, tmp_path/"m", symlinks=True)
    for one in (a, b): (tmp_path/"m/opt/versions"/one.name/"model.onnx").write_bytes(b"torn")
    refused(install(tmp_path/"m", b, "--rollback"), "is damaged")
    refused(install(tmp_path/"m", b, "--no-check"), "is the current version, and differs")
    assert install(tmp_path/"m", a, "--no-check").returncode == 0 and current(tmp_path/"m") == a.name
    assert install(tmp_path/"m", b, "--no-check").returncode == 0 and current(tmp_path/"m") == b.name


def test_the_service(made, machine):
    "Written, not started: no systemd here. It runs what the installer checked, and what it writes is bounded."
    folder, (old, _) = made
    assert install(machine, folder/old.version, "--no-check", "--service").returncode == 0
    unit = (machine/"root/etc/systemd/system/detector.service").read_text()
    start = next(line for line in unit.splitlines() if line.startswith("ExecStart="))
    program = machine/"opt/current/detector.pyz"
    assert start.startswith(f"ExecStart={sys.executable} {program} watch ") and "--megabytes" in start
    assert "@" not in unit and (machine/"opt/detector.env").read_text() == "SOURCE=0\n"
    if shutil.which("systemd-analyze"):
        done = subprocess.run(["systemd-analyze", "verify", str(machine/"root/etc/systemd/system/detector.service")],
                              capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done
    (machine/"opt/detector.env").write_text("SOURCE=rtsp://gate\n")
    assert install(machine, folder/old.version, "--no-check", "--service").returncode == 0
    assert (machine/"opt/detector.env").read_text() == "SOURCE=rtsp://gate\n"
    words = ["--prefix", str(machine/"a b"), "--service", "--no-check"]
    done = subprocess.run(["sh", str(folder/old.version/"install.sh"), *words], env=environment(machine), text=True,
                          capture_output=True)
    refused(done, "has only letters")


def test_a_python_without_packages(made, machine, tmp_path):
    folder, (old, _) = made
    bare = tmp_path/"python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n') # -S: no packages
    bare.chmod(0o755)
    done = install(machine, folder/old.version, python=str(bare))
    assert done.returncode == 2 and "Traceback" not in done.stderr and current(machine) is None, done
    first, last = done.stderr.splitlines()
    assert "has no" in first and "numpy, OpenCV (cv2) and ONNX Runtime are needed" in first
    assert "detector.pyz does not run here: nothing was switched" in last
    refused(install(machine, folder/old.version, python="python9"), "python9 is not here")


def test_places(made, machine):
    "A space and letters of other alphabets; a relative place; none at all; one that can't be written."
    folder, (old, _) = made
    script = str(folder/old.version/"install.sh")
    def run(prefix):
        return subprocess.run(["sh", script, "--prefix", prefix, "--no-check"], cwd=machine, capture_output=True,
                              text=True, env=environment(machine))
    for prefix in ("ü b/c\td", "-x", "../" + machine.name + "/z"):
        assert run(prefix).returncode == 0 and (machine/prefix/"current/detector.pyz").is_file()
    refused(run(""), "--prefix needs a value")
    (machine/"file").write_text("")
    refused(run("file"), "can't be written")


def test_two_installs_at_once(made, machine):
    folder, (old, _) = made
    (machine/"opt").mkdir()
    with open(machine/"opt/.lock", "w") as lock:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(install(machine, folder/old.version, "--no-check"), "another install is running")
    assert install(machine, folder/old.version, "--no-check").returncode == 0


def test_wrong_words(made, machine):
    folder, (old, _) = made
    refused(install(machine, folder/old.version, "--forse"), "unknown word --forse")
    refused(install(machine, folder/old.version, "--key"), "--key needs a value")
    assert "--rollback" in install(machine, folder/old.version, "--help").stdout


def linter(name):
    program = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if not program: pytest.skip(f"{name} is not installed")
    return program


def test_shellcheck(made):
    folder, (old, _) = made
    done = subprocess.run([linter("shellcheck"), folder/old.version/"install.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("board, jetpack", [("nano", "4.6"), ("xavier-nx", "5.1"), ("orin-nx", "6.2"), ("thor", "7.0")])
def test_dockerfiles(made, tmp_path, board, jetpack):
    "Those of docker/, one for each JetPack of the board, or the one that is named."
    folder, (old, _) = made
    name = f"Dockerfile.jetpack{jetpack[0]}"
    one = bundle(folder/"old.onnx", tmp_path/"x.tar.gz", board, jetpack, golden=folder/old.version/"model.golden")
    assert [file for file in one.files if file.startswith("Dockerfile")] == [name]
    with tarfile.open(one.path) as archive: archive.extractall(tmp_path, filter="data")
    for file in (name, "start.sh", "frame_age.sh", "image.sh", "compose.yaml", ".dockerignore"):
        assert (tmp_path/one.version/file).read_bytes() == (DOCKER/file).read_bytes()
    every = bundle(folder/"old.onnx", tmp_path/"x.tar.gz", board, golden=folder/old.version/"model.golden")
    versions = {release.version[0] for release in board_of(board).releases}
    assert {file[-1] for file in every.files if file.startswith("Dockerfile")} == versions


@pytest.mark.parametrize("name", ["../../evil", "a b", "é", "-rf", ".x", "n"*300, "/", "a\nb"])
def test_odd_names_of_models(made, machine, tmp_path, name):
    folder, (old, _) = made
    model = onnx.load(str(folder/"old.onnx"))
    for row in model.metadata_props:
        if row.key == METADATA_KEY: row.value = json.dumps(dict(json.loads(row.value), name=name))
    onnx.save(model, str(tmp_path/"odd.onnx"))
    one = bundle(tmp_path/"odd.onnx", board_name="nano")
    with tarfile.open(one.path) as archive:
        assert {member.name.split("/")[0] for member in archive} == {one.version}
        archive.extractall(tmp_path, filter="data")
    assert install(machine, tmp_path/one.version, "--no-check").returncode == 0 and current(machine) == one.version


def test_a_bundle_replaces_a_bundle_and_nothing_else(made, tmp_path):
    folder, (old, _) = made
    for _ in range(2): bundle(folder/"old.onnx", tmp_path/"x.tar.gz", "nano")
    (tmp_path/"y.tar.gz").write_bytes(b"of somebody")
    with pytest.raises(InputError, match="is there already"): bundle(folder/"old.onnx", tmp_path/"y.tar.gz", "nano")


def test_another_board_with_the_same_l4t(made, machine):
    folder, (old, _) = made
    tree = machine/"root/proc/device-tree"
    tree.mkdir(parents=True)
    (tree/"model").write_bytes(b"NVIDIA Jetson Xavier NX Developer Kit\0")
    refused(install(machine, folder/old.version), "this machine is xavier-nx; the bundle is for nano")
    (tree/"model").write_bytes(b"NVIDIA Jetson Nano Developer Kit\0")
    assert install(machine, folder/old.version, "--no-check").returncode == 0


def test_ended_while_it_checks(made, machine, tmp_path):
    folder, (old, _) = made
    slow = tmp_path/"python"
    slow.write_text('#!/bin/sh\ncase "$*" in *check) sleep 3 ;; esac\n')
    slow.chmod(0o755)
    p = subprocess.Popen(["sh", str(folder/old.version/"install.sh"), "--prefix", str(machine/"opt")],
                         env=environment(machine, str(slow)), stdout=subprocess.DEVNULL, start_new_session=True)
    while not list(machine.glob("opt/versions/.*.part/SHA256SUMS")): time.sleep(.02)
    time.sleep(.3)
    os.killpg(p.pid, signal.SIGTERM)
    assert p.wait(20) == 130 and current(machine) is None
    assert not (machine/"opt").exists()
