"""The Dockerfiles, compose.yaml and .dockerignore, read as text: what they copy is there, what they install is pinned,
and nothing of them is a secret. docker-compose, where it is installed, reads compose.yaml too."""
import fnmatch
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from jetson_det.runtime.boards import JETPACKS

REPO = Path(__file__).resolve().parents[2]
DOCKER = REPO/"docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
# What `jetson-det bundle` makes itself; its other files are those of docker/ and of bundle_files/.
MADE = {"SHA256SUMS", "bundle.env", "bundle.json", "contract.json", "detector.pyz", "model.onnx", "model.golden",
        "model.build.sh"}
SAME = "# ---- from here on the four Dockerfiles are the same\n"
SECRET = re.compile(r"passw|secret|token|api_?key|credential|private", re.I)
is_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.suffix[1:])


def instructions(path):
    "(instruction, rest) of a Dockerfile; lines that go on are joined, comments left out."
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def of(path, name): return [rest for instruction, rest in instructions(path) if instruction == name]


def copied(path):
    "What is copied out of the build's folder."
    found = []
    for rest in of(path, "COPY"):
        if "--from=" not in rest: found += rest.split()[:-1]
    return found


def settings(path):
    "The environment that the image sets, of its last stage."
    last = path.read_text().rpartition("\nFROM ")[2]
    words = shlex.split(" ".join(re.findall(r"^ENV (.*)$", last, re.M)))
    return dict(word.split("=", 1) for word in words)


def test_one_for_each_jetpack():
    assert {path.suffix[8:] for path in DOCKERFILES} == {version.split(".")[0] for version in JETPACKS}
    tails = {path.read_text().partition(SAME)[2] for path in DOCKERFILES}
    assert len(tails) == 1 and "ENTRYPOINT" in tails.pop()


@is_dockerfile
def test_releases(path):
    "The image, its label and the table of boards agree on L4T."
    major = path.suffix[8:]
    wanted = {release.l4t.split(".")[0] for release in JETPACKS.values() if release.version.split(".")[0] == major}
    assert set(settings(path)["DETECTOR_L4T"].split()) == wanted
    assert f'io.github.jetson-det.l4t="{settings(path)["DETECTOR_L4T"]}"' in path.read_text()


@is_dockerfile
def test_base_images_are_pinned(path):
    for rest in of(path, "FROM"):
        image = rest.split()[0]
        assert re.fullmatch(r"[a-z0-9./-]+:[a-z0-9.-]*\d[a-z0-9.-]*", image) and not image.endswith(":latest"), image


@is_dockerfile
def test_python_packages_are_pinned(path):
    for rest in of(path, "RUN"):
        for words in re.findall(r"pip3 (?:install|wheel) ([^&]*)", rest):
            words = words.split()
            values = {words[k + 1] for k, word in enumerate(words) if word in ("-w", "-f")}
            packages = [word for word in words if not word.startswith("-") and word not in values]
            assert packages and all(re.fullmatch(r"[\w-]+==[\d.]+", word) for word in packages), packages
            assert "--no-cache-dir" in words


@is_dockerfile
def test_debian_packages_leave_nothing_behind(path):
    for rest in of(path, "RUN"):
        if "apt-get install" in rest:
            assert "--no-install-recommends" in rest and "rm -rf /var/lib/apt/lists/*" in rest


@is_dockerfile
def test_what_is_copied_is_in_a_bundle(path):
    folders = (DOCKER, REPO/"jetson_det/export/bundle_files")
    there = MADE | {file.name for folder in folders for file in folder.iterdir()}
    names = copied(path)
    for name in names: assert any(fnmatch.fnmatch(one, name) for one in there), name
    lines = (DOCKER/".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in lines if line.startswith("!")]
    assert [line for line in lines if line[:1] not in "#!"] == ["*"]
    assert {name if name.startswith("Dockerfile") else name.rstrip("*") for name in names} == set(kept)
    assert {file.name for file in DOCKER.iterdir() if file.is_file()} - {".dockerignore"} <= {
        one for one in there for name in names if fnmatch.fnmatch(one, name)}
    assert not of(path, "ADD")


@is_dockerfile
def test_user_health_and_entry(path):
    order = [instruction for instruction, _ in instructions(path)]
    assert of(path, "USER") == ["10001:10001"]
    assert not {"RUN", "COPY"} & set(order[order.index("USER"):])
    health, = of(path, "HEALTHCHECK")
    assert "frame_age.sh" in health and "--start-period=" in health
    assert json.loads(of(path, "ENTRYPOINT")[0]) == ["sh", "/opt/detector/start.sh"]
    assert json.loads(of(path, "CMD")[0])[0] == "watch"
    assert json.loads(of(path, "VOLUME")[0]) == ["/engines", "/results"]
    assert order.index("RUN") < order.index("VOLUME") # what RUN changes in a volume after VOLUME is lost


@is_dockerfile
def test_no_secret(path):
    for instruction in ("ENV", "ARG", "LABEL"):
        for rest in of(path, instruction): assert not SECRET.search(rest), rest
    for rest in of(path, "RUN"): assert "--mount=type=secret" not in rest and not re.search(r"https?://[^/\s]*@", rest)


# ---- compose

def service():
    return yaml.safe_load((DOCKER/"compose.yaml").read_text())["services"]["detector"]


def test_compose():
    row = service()
    assert (row["runtime"], row["restart"], row["read_only"], row["init"]) == ("nvidia", "unless-stopped", True, True)
    assert row["logging"] == {"driver": "json-file", "options": {"max-size": "10m", "max-file": "3"}}
    assert row["healthcheck"]["test"] == ["CMD", "sh", "/opt/detector/frame_age.sh"]
    assert row["cap_drop"] == ["ALL"] and row["tmpfs"] == ["/tmp"]
    named = [volume.split(":") for volume in row["volumes"] if isinstance(volume, str)]
    assert [target for _, target in named] == json.loads(of(DOCKERFILES[0], "VOLUME")[0])
    targets = {volume["target"]: volume for volume in row["volumes"] if isinstance(volume, dict)}
    assert targets["/etc/nv_tegra_release"]["read_only"] and targets["/etc/nv_jetson_model"]["read_only"]


def test_the_settings_are_those_that_the_scripts_read():
    scripts = (DOCKER/"start.sh").read_text() + (DOCKER/"frame_age.sh").read_text()
    for name in service()["environment"]: assert f"${{{name}:-" in scripts, name
    for path in DOCKERFILES:
        for name in settings(path):
            if name.startswith("DETECTOR_"): assert f"{{{name}:-" in scripts, name


def compose_config(**values):
    "compose.yaml as docker-compose reads it."
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        program = ["docker", "compose"]
    elif shutil.which("docker-compose"): program = ["docker-compose"]
    else: pytest.skip("needs docker-compose, or docker with its plugin compose")
    done = subprocess.run([*program, "-f", DOCKER/"compose.yaml", "config"], capture_output=True, text=True,
                          env={"PATH": "/usr/local/bin:/usr/bin:/bin", **values})
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)["services"]["detector"]


@pytest.mark.slow
def test_docker_compose_reads_it():
    "Half a second to start; without an engine."
    row = compose_config(SOURCE="rtsp://camera/stream", CAMERA="/dev/video2", RENDER_GID="110", IMAGE="detector:v2")
    assert row["command"] == ["watch", "rtsp://camera/stream", "--out", "/results", "--megabytes", "100"]
    assert row["image"] == "detector:v2" and row["group_add"] == ["44", "110"]
    assert "video2" in str(row["devices"]) and row["runtime"] == "nvidia"
    assert compose_config()["command"][1] == "0"


# ---- the linters

@pytest.mark.slow
def test_the_linters_find_a_fault(tmp_path):
    shutil.copytree(DOCKER, tmp_path/"docker")
    for name in ("tools", ".ci"): (tmp_path/name).mkdir()
    (tmp_path/"jetson_det/export/bundle_files").mkdir(parents=True)
    for file in (REPO/"tools/lint_docker.sh", REPO/"docker/start.sh"): shutil.copy(file, tmp_path/"tools"/file.name)
    for folder in (".ci/run", "jetson_det/export/bundle_files/install.sh"):
        shutil.copy(REPO/"docker/frame_age.sh", tmp_path/folder)
    def lint():
        command = ["bash", tmp_path/"tools/lint_docker.sh", REPO/".venv/bin"]
        return subprocess.run(command, capture_output=True, text=True)
    if "is not here" in lint().stderr: pytest.skip("needs hadolint and shellcheck")
    assert lint().returncode == 0, lint().stdout
    with open(tmp_path/"docker/Dockerfile.jetpack6", "a") as f: f.write("RUN cd /tmp && pip install numpy\n")
    assert lint().returncode == 1 and "DL3013" in lint().stdout
    shutil.copy(DOCKER/"Dockerfile.jetpack6", tmp_path/"docker/Dockerfile.jetpack6")
    with open(tmp_path/"docker/start.sh", "a") as f: f.write("rm -rf $home/x\n")
    assert lint().returncode == 1 and "SC2086" in lint().stdout
