"""Images built for real by buildah, on a small base image that is made here in place of NVIDIA's: what gets into an
image, what stops a build, and what the user in it may do. Dockerfiles that install packages need their own base."""
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

DOCKER = Path(__file__).resolve().parents[2]/"docker"
needs_buildah = pytest.mark.skipif(not shutil.which("buildah") or os.geteuid() != 0, reason="needs buildah, and root")
PROGRAMS = ("dash bash env sh sha256sum mkdir chown ls cat stat id sed tr df awk cut sort readlink rm cp mv head date"
            " sync flock timeout dirname ldd").split()


def base_image(folder):
    "A file system with the programs that the Dockerfile and the scripts call, and their libraries."
    for name in PROGRAMS:
        program = shutil.which(name)
        files = {name: program}
        listed = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
        for word in listed.split():
            if word.startswith("/"): files[word] = word
        for target, source in files.items():
            place = folder/target.lstrip("/") if target.startswith("/") else folder/"usr/bin"/target
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists(): shutil.copy(os.path.realpath(source), place)
    (folder/"bin").symlink_to("usr/bin")
    (folder/"tmp").mkdir(mode=0o1777)
    (folder/"etc").mkdir(exist_ok=True)


def bundle_folder(folder, dockerfile):
    "The files of a bundle, as far as an image is concerned, with their sums; and two strangers."
    folder.mkdir()
    for name in "bundle.json contract.json detector.pyz model.onnx detector.service README.txt install.sh".split():
        (folder/name).write_text(f"this is {name}\n")
    release = "R32" if dockerfile.endswith("4") else "R36"
    (folder/"bundle.env").write_text(f"VERSION=docks-01\nBOARD=nano\nL4T={release}\n")
    for name in (dockerfile, "start.sh", "frame_age.sh", "image.sh", "compose.yaml"): shutil.copy(DOCKER/name, folder)
    rows = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder/"SHA256SUMS").write_text("".join(rows))
    shutil.copy(DOCKER/".dockerignore", folder)
    (folder/".env").write_text("SOURCE=rtsp://user:password@camera\n")
    (folder/"notes.txt").write_text("a stranger")


class Buildah:
    def __init__(self, folder): self.places = ["--root", folder/"store", "--runroot", folder/"run"]

    def __call__(self, *words, check=True):
        command = ["buildah", *self.places, "--storage-driver", "vfs", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 or not check, done.stderr
        return done


@pytest.mark.slow
@needs_buildah
@pytest.mark.parametrize("dockerfile", ["Dockerfile.jetpack4", "Dockerfile.jetpack6"])
def test_an_image(tmp_path, dockerfile):
    buildah = Buildah(tmp_path)
    context = tmp_path/"bundle"
    bundle_folder(context, dockerfile)
    base_image(tmp_path/"base")
    (tmp_path/"Base").write_text("FROM scratch\nCOPY base /\n")
    base = (DOCKER/dockerfile).read_text().partition("\nFROM ")[2].split()[0]
    build = ["bud", "--isolation", "chroot", "--format", "docker", "--pull-never"]
    try:
        buildah(*build, "-t", f"docker.io/{base}", "-f", tmp_path/"Base", tmp_path)
        buildah(*build, "-t", "detector:v1", "-f", context/dockerfile, context)
        settings = json.loads(buildah("inspect", "--type", "image", "detector:v1").stdout)["Docker"]["config"]
        assert settings["User"] == "10001:10001" and settings["Healthcheck"]["Retries"] == 3
        assert settings["Entrypoint"] == ["sh", "/opt/detector/start.sh"] and set(settings["Volumes"]) == {
            "/engines", "/results"}

        container = buildah("from", "--pull-never", "detector:v1").stdout.strip()
        inside = Path(buildah("mount", container).stdout.strip())
        names = {path.name for path in (inside/"opt/detector").iterdir()}
        assert names == {path.name for path in context.iterdir()} - {".env", "notes.txt", ".dockerignore"}

        def run(*words): return buildah("run", "--isolation", "chroot", container, "--", *words, check=False)
        writes = "echo x >/engines/x && echo x >/results/x && ! echo x 2>/dev/null >/opt/detector/x"
        who = run("sh", "-c", f"id -u; {writes}")
        assert who.returncode == 0 and who.stdout == "10001\n"
        assert "does not know the board's L4T" in run("sh", "/opt/detector/start.sh", "check").stderr
        (inside/"etc/nv_tegra_release").write_text("# R39 (release), REVISION: 1.0, GCID: 1\n")
        assert "Dockerfile.jetpack7" in run("sh", "/opt/detector/start.sh", "check").stderr
        assert run("sh", "/opt/detector/frame_age.sh").stdout == "no frame yet: /results/found.jsonl is not there\n"

        (context/"model.onnx").write_text("another model")
        done = buildah(*build, "-t", "damaged", "-f", context/dockerfile, context, check=False)
        assert done.returncode != 0 and "sha256sum" in done.stderr
        os.remove(context/"start.sh")
        assert buildah(*build, "-t", "damaged", "-f", context/dockerfile, context, check=False).returncode != 0
    finally:
        buildah("rm", "-a", check=False)
        buildah("rmi", "-a", "-f", check=False)
