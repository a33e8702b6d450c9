"""docker/image.sh: images saved, copied and loaded for real with ssh and rsync, onto sshds on the loopback that stand
for Jetsons; docker alone is a stand-in."""
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

SCRIPT = Path(__file__).resolve().parents[2]/"docker/image.sh"
STAND_INS = Path(__file__).resolve().parent/"stand_ins"
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("sha256sum"), reason="needs Linux")
needs_ssh = pytest.mark.skipif(not (SSHD and shutil.which("rsync") and shutil.which("ssh") and os.geteuid() == 0),
                               reason="needs sshd (openssh-server), ssh, rsync, and root to start a sshd")
IMAGE = "detector:v1"


def program(path, text):
    "A small program in a folder of programs."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def image_file(state, size=300_000, name=IMAGE):
    "An image in the stand-in's store."
    state.mkdir(parents=True, exist_ok=True)
    data = f"{name}\n".encode() + random.Random(size).randbytes(size)
    path = state/(name.replace(":", "_").replace("/", "_") + ".image")
    path.write_bytes(data)
    return path


class Desk:
    "The machine from which images are sent."
    def __init__(self, folder):
        self.folder = folder
        self.state = folder/"docker"
        self.image = image_file(self.state)
        (folder/"bin").mkdir()
        shutil.copy(STAND_INS/"docker", folder/"bin/docker")
        self.ssh = "ssh"

    def environment(self):
        return dict(os.environ, PATH=f"{self.folder/'bin'}:{os.environ['PATH']}", DOCKER_STATE=str(self.state),
                    SSH=self.ssh)

    def run(self, *words):
        done = subprocess.run(["sh", str(SCRIPT), *map(str, words)], cwd=self.folder, env=self.environment(),
                              capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    def save(self, name="detector.tar.gz"):
        assert self.run("save", IMAGE, name)[0] == 0
        return self.folder/name


@pytest.fixture
def desk(tmp_path):
    (tmp_path/"desk").mkdir()
    return Desk(tmp_path/"desk")


def refused(done, part):
    code, _, err = done
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and part in err, done


# ---- save

@pytest.mark.parametrize("name", ["detector.tar.gz", "detector.tar.zst"])
def test_save(desk, name):
    if name.endswith("zst") and not shutil.which("zstd"): pytest.skip("needs zstd")
    path = desk.save(name)
    unpack = ["zstd", "-dc"] if name.endswith("zst") else ["gzip", "-dc"]
    assert subprocess.run([*unpack, path], stdout=subprocess.PIPE).stdout == desk.image.read_bytes()
    info = dict(line.split("=", 1) for line in Path(f"{path}.info").read_text().splitlines())
    assert info["SHA256"] == hashlib.sha256(path.read_bytes()).hexdigest() and info["IMAGE"] == IMAGE
    assert (int(info["BYTES"]), int(info["UNPACKED"])) == (path.stat().st_size, desk.image.stat().st_size)
    assert (info["ARCHITECTURE"], info["L4T"]) == ("arm64", "R32")
    left = sorted(p.name for p in desk.folder.iterdir())
    assert left == sorted(["bin", "docker", name, f"{name}.info"])


def test_save_refuses(desk):
    refused(desk.run("save", "other:v1", "x.tar.gz"), "No such image: other:v1")
    refused(desk.run("save", IMAGE, "x.tar"), "ends in .tar.zst or .tar.gz")
    refused(desk.run("save", IMAGE, "no/x.tar.gz"), "no: no such folder")
    refused(desk.run("save", IMAGE), "save takes an image and a file")
    refused(desk.run("save", IMAGE, "a b.tar.gz"), "only letters")
    refused(desk.run("save", "$(touch evil)", "x.tar.gz"), "only letters")
    refused(desk.run(), "save, copy or load?")
    refused(desk.run("send"), "unknown word send")
    (desk.state/"size").write_text(str(10**15))
    refused(desk.run("save", IMAGE, "x.tar.gz"), "the image has up to 1000000000")
    (desk.state/"no-daemon").touch()
    refused(desk.run("save", IMAGE, "x.tar.gz"), "Cannot connect to the Docker daemon")
    assert sorted(p.name for p in desk.folder.iterdir()) == ["bin", "docker"]


def test_a_save_that_breaks_off_leaves_nothing(desk):
    (desk.state/"fail-save").touch()
    refused(desk.run("save", IMAGE, "x.tar.gz"), "docker save detector:v1 failed: nothing was written")
    (desk.state/"fail-save").unlink()
    done = subprocess.run(["bash", "-c", f'ulimit -f 64; exec sh {SCRIPT} save {IMAGE} x.tar.gz'], cwd=desk.folder,
                          env=desk.environment(), capture_output=True, text=True) # files end at 64 KB
    refused((done.returncode, done.stdout, done.stderr.splitlines(True)[-1]), "can't be written; is the disk full?")
    assert sorted(p.name for p in desk.folder.iterdir()) == ["bin", "docker"]


def test_an_older_file_stays_whole_until_the_new_one_is(desk):
    path = desk.save()
    before = path.read_bytes()
    (desk.state/"fail-save").touch()
    assert desk.run("save", IMAGE, path.name)[0] == 2 and path.read_bytes() == before


# ---- copy and load, without a Jetson

def test_copy_refuses(desk):
    refused(desk.run("copy", "gone.tar.gz", "nano1"), "gone.tar.gz: no such file")
    path = desk.save()
    refused(desk.run("copy", path.name), "copy takes a file and one host or more")
    refused(desk.run("copy", path.name, "-oProxyCommand=touch"), "unknown word -oProxyCommand=touch")
    refused(desk.run("copy", path.name, "nano1:evil"), "a host is a name")
    refused(desk.run("copy", path.name, "na no"), "only letters")
    refused(desk.run("copy", path.name, "nano1", "--folder", "a;b"), "--folder a;b")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    refused(desk.run("copy", path.name, "nano1"), "its sha256 is not that of")
    Path(f"{path}.info").unlink()
    refused(desk.run("copy", path.name, "nano1"), "detector.tar.gz.info: no such file")


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(st.sampled_from("a1. $`;&|<>(){}'\"\\*?!#~\n\t="), min_size=1, max_size=12), st.integers(0, 3))
def test_no_word_reaches_another_shell(desk, word, place):
    "As image, file, host or folder: a word with a character of the shell ends the script before anything is called."
    assume(set(word) - set("a1."))
    before = sorted(desk.folder.iterdir())
    words = [["save", word, "x.tar.gz"], ["save", IMAGE, word], ["load", "x.tar.gz", word],
             ["load", "x.tar.gz", "nano1", "--folder", word]][place]
    code, _, err = desk.run(*words)
    assert code == 2 and err.startswith("error: ") and sorted(desk.folder.iterdir()) == before
    assert not (desk.state/"calls").exists()


# ---- Jetsons

class Jetson:
    "A sshd on the loopback with its own programs, home and docker."
    def __init__(self, folder, name, machine="aarch64", release="R32"):
        self.home = folder/name/"home"
        self.state = folder/name/"docker"
        root = folder/name/"root"
        programs = folder/name/"bin"
        for place in (self.home, self.state, root/"etc", programs): place.mkdir(parents=True)
        shutil.copy(STAND_INS/"docker", programs/"docker")
        program(programs/"uname", f"echo {machine}")
        if release: (root/"etc/nv_tegra_release").write_text(f"# {release} (release), REVISION: 7.1, GCID: 1\n")
        self.programs = programs
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        config = folder/name/"sshd_config"
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder/'key'}\n"
            f"AuthorizedKeysFile {folder/'key.pub'}\n"
            f"StrictModes no\nUsePAM no\nPermitRootLogin yes\nPidFile none\n"
            f"SetEnv PATH={programs}:{os.environ['PATH']} DOCKER_STATE={self.state} DETECTOR_ROOT={root}\n"
            f'ForceCommand cd {self.home} && exec sh -c "$SSH_ORIGINAL_COMMAND"\n')
        self.server = subprocess.Popen([SSHD, "-D", "-e", "-f", config], stderr=subprocess.PIPE, text=True)
        for line in self.server.stderr:
            if "listening" in line: break
        else: raise RuntimeError(f"sshd ended with {self.server.wait()}")

    @property
    def copy(self): return self.home/"detector-image/detector.tar.gz"

    def image(self): return (self.state/"detector_v1.image").read_bytes()

    def calls(self):
        path = self.state/"calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def rack(tmp_path, desk):
    "A function that starts a Jetson, which the desk reaches by its name."
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path/"key"], check=True)
    Path("/run/sshd").mkdir(exist_ok=True) # sshd asks for it
    config = tmp_path/"ssh_config"
    config.write_text("")
    desk.ssh = f"ssh -F {config}"
    started = []

    def start(name, bytes_a_second=None, **what):
        one = Jetson(tmp_path, name, **what)
        started.append(one)
        slow = f"  ProxyCommand {sys.executable} {STAND_INS/'slow_proxy.py'} {one.port} {bytes_a_second}"
        slow += f" {desk.folder/'sent'}\n"
        with config.open("a") as f:
            f.write(f"Host {name}\n  HostName 127.0.0.1\n  Port {one.port}\n  User root\n  IdentitiesOnly yes\n"
                    f"  IdentityFile {tmp_path/'key'}\n  StrictHostKeyChecking no\n"
                    "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
                    + (slow if bytes_a_second else ""))
        return one
    yield start
    for one in started:
        one.server.terminate()
        one.server.wait(timeout=10)
        one.server.stderr.close()


def rows(out):
    "The table at the end: host -> (state, the rest)."
    table = [line.split(None, 2) for line in out.split("\n\n")[-1].splitlines() if "call this again" not in line]
    return {row[0]: tuple(row[1:]) for row in table}


@needs_ssh
@pytest.mark.slow
def test_many_jetsons(desk, rack):
    "What can take the image gets it; the table says what the others lack."
    path = desk.save()
    good = rack("nano1")
    rack("xavier", release="R35")
    rack("pc", machine="x86_64")
    rack("server", release=None)
    full = rack("full")
    program(full.programs/"df", "echo Filesystem; echo /dev/mmcblk0p1 1 1 1000 99% /")
    asleep = rack("asleep")
    (asleep.state/"no-daemon").touch()
    old = rack("old")
    program(old.programs/"rsync", "exit 127")
    other = rack("nano2")
    hosts = ["nano1", "xavier", "pc", "server", "full", "asleep", "unknown.invalid", "nano2"]

    code, out, err = desk.run("load", path.name, *hosts, "--dry-run")
    assert code == 1 and rows(out)["nano1"][0] == rows(out)["nano2"][0] == "can"
    assert not good.copy.exists() and not any(call.startswith("load") for call in good.calls())

    code, out, err = desk.run("load", path.name, *hosts)
    table = rows(out)
    assert code == 1 and list(table) == hosts and "6 of 8 failed" in out, out + err
    assert table["nano1"] == table["nano2"] == ("loaded", IMAGE)
    reasons = {"xavier": "has L4T R35, and the image is for R32", "pc": "is x86_64, and the image is for arm64",
               "server": "it is no Jetson", "full": "0 MB are free", "asleep": "the user can't use docker",
               "unknown.invalid": "ssh: "}
    for host, reason in reasons.items(): assert table[host][0] == "FAILED" and reason in table[host][1], table[host]
    for one in (good, other): assert one.image() == desk.image.read_bytes() and not one.copy.exists()

    code, out, err = desk.run("load", path.name, "nano1", "nano2")
    assert code == 0 and rows(out)["nano1"] == ("there", "the image was there already")
    assert sum(call == "load" for call in good.calls()) == 1


@needs_ssh
@pytest.mark.slow
def test_a_copy_goes_on_where_it_was_cut_off(desk, rack):
    "Killed in the midst; the rest alone is sent then."
    image_file(desk.state, 1_500_000) # rsync writes in steps of 256 KB
    path = desk.save()
    one = rack("nano1", bytes_a_second=600_000)
    p = subprocess.Popen(["sh", str(SCRIPT), "copy", path.name, "nano1"], cwd=desk.folder, env=desk.environment(),
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 20
    while not (one.copy.exists() and one.copy.stat().st_size > 500_000):
        assert time.monotonic() < end and p.poll() is None
        time.sleep(.02)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    time.sleep(.3) # the other end writes what it has got
    have = one.copy.stat().st_size
    assert 500_000 < have < path.stat().st_size
    number = one.copy.stat().st_ino
    code, out, _ = desk.run("copy", path.name, "nano1", "--dry-run")
    assert code == 0 and "would copy 1 MB; 0 MB of it are there" in out
    sent = int((desk.folder/"sent").read_text())
    code, out, _ = desk.run("copy", path.name, "nano1")
    sent = int((desk.folder/"sent").read_text()) - sent
    assert code == 0 and one.copy.read_bytes() == path.read_bytes() and one.copy.stat().st_ino == number
    assert sent < path.stat().st_size - have + 100_000


@needs_ssh
@pytest.mark.slow
@pytest.mark.parametrize("what", ["another prefix", "another file of that size", "a longer file"])
def test_what_lies_there_is_another_file(desk, rack, what):
    path = desk.save()
    one = rack("nano1")
    one.copy.parent.mkdir()
    size = path.stat().st_size
    one.copy.write_bytes(bytes({"another prefix": size//2, "another file of that size": size}.get(what, size + 9)))
    code, out, err = desk.run("copy", path.name, "nano1")
    assert code == 0 and one.copy.read_bytes() == path.read_bytes(), out + err
    code, out, err = desk.run("load", path.name, "nano1", "--keep")
    assert code == 0 and one.copy.exists() and one.image() == desk.image.read_bytes()


@needs_ssh
@pytest.mark.slow
def test_faults_on_the_jetson(desk, rack):
    path = desk.save()
    breaks = rack("breaks")
    (breaks.state/"fail-load").touch()
    alters = rack("alters")
    (alters.state/"alter").touch()
    rots = rack("rots")
    program(rots.programs/"sha256sum", "exit 1")
    code, out, err = desk.run("load", path.name, "breaks", "alters", "rots")
    table = rows(out)
    assert code == 1 and "no space left on device" in table["breaks"][1]
    assert "the layers of detector:v1 differ" in table["alters"][1]
    assert "sha256 differs" in table["rots"][1] and not rots.copy.exists()
    assert breaks.copy.exists() # the next call does not send it again
    (breaks.state/"fail-load").unlink()
    assert desk.run("load", path.name, "breaks")[0] == 0


@needs_ssh
@pytest.mark.slow
def test_the_disk_there_fills(desk, rack):
    "A real disk of 1 MB that claims to have more room: what was sent stays, and the copy goes on after room was made."
    image_file(desk.state, 1_500_000)
    path = desk.save()
    one = rack("nano1")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", one.home], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        code, out, _ = desk.run("copy", path.name, "nano1")
        assert code == 1 and " MB are free, and " in rows(out)["nano1"][1] # by the real df
        program(one.programs/"df", "echo Filesystem; echo tmpfs 9000000 1 9000000 1% /")
        code, out, _ = desk.run("copy", path.name, "nano1")
        assert code == 1 and "No space left on device" in rows(out)["nano1"][1]
        assert one.copy.stat().st_size > 500_000
        subprocess.run(["mount", "-o", "remount,size=4m", one.home], check=True)
        assert desk.run("copy", path.name, "nano1")[0] == 0 and one.copy.read_bytes() == path.read_bytes()
    finally: subprocess.run(["umount", "-l", one.home], check=True)


@needs_ssh
def test_zstd_there(desk, rack):
    if not shutil.which("zstd"): pytest.skip("needs zstd")
    path = desk.save("detector.tar.zst")
    one = rack("nano1")
    assert desk.run("load", path.name, "nano1")[0] == 0 and one.image() == desk.image.read_bytes()
