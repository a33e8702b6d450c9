"The words of the command line: verbs, versions, help, hints, and refusals before anything heavy is imported."
import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import jetson_det
from jetson_det import __version__
from jetson_det.cli import _OTHER_VERBS, _check_gpus, app, main
from jetson_det.runtime.files import InputError

HEAVY = {"torch", "transformers", "matplotlib", "onnx", "papermill", "albumentations", "scipy"}


def call(*words):
    "(exit code, standard output, standard error) of a verb in this process."
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err): code = main(list(map(str, words)))
    return code, out.getvalue(), err.getvalue()


def refused(words, *parts):
    code, out, err = call(*words)
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: "), (words, code, err)
    for part in parts: assert part in err, (part, err)


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_version(word):
    code, out, err = call(word)
    assert code == 0 and out.startswith(f"jetson_det {__version__}, Python 3") and not err


def verbs():
    "(words, command) of every verb."
    import typer
    group = typer.main.get_command(app)
    for name in group.commands:
        command = group.commands[name]
        if not hasattr(command, "commands"): yield (name,), command
        else: yield from (((name, sub), command.commands[sub]) for sub in command.commands)


@pytest.mark.parametrize("words", [(), *(words for words, _ in verbs())], ids="-".join)
def test_help_has_a_short_form_everywhere(words):
    short, long = call(*words, "-h"), call(*words, "--help")
    assert short == long and short[0] == 0 and "Usage: jetson-det" in short[1] and not short[2]


def test_the_verbs_are_in_groups():
    text = call("--help")[1]
    panels = ["Start", "Data", "Training", "Measuring", "Export and prediction"]
    places = [text.index(f"─ {panel} ─") for panel in panels]
    assert places == sorted(places) and "─ Commands ─" not in text
    for words, _ in verbs(): assert f"│ {words[0]} " in text


def test_an_option_of_many_verbs_is_one_option():
    "The same word has the same reading; what prints figures can write them."
    kinds = {}
    for words, command in verbs():
        for parameter in command.params:
            for option in parameter.opts:
                if option in ("--json", "--html", "--format", "--device", "--contract"):
                    kinds.setdefault(option, set()).add((*parameter.opts, parameter.is_flag))
    for option, found in kinds.items(): assert len(found) == 1, (option, found)
    have = {"-".join(words) for words, command in verbs() for p in command.params if "--json" in p.opts}
    for verb in ("doctor", "data-check", "data-stats", "data-convert", "data-split", "data-tile", "config-explain",
                 "config-diff", "evaluate", "bench", "export", "lineage"): assert verb in have, verb


def test_doctor_tells_room_and_what_to_type(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path))
    (tmp_path/"weights").mkdir()
    (tmp_path/"weights"/"w.pth").write_bytes(b"x")
    (tmp_path/"weights"/"w.pth.json").write_text("{}")
    (tmp_path/"weights"/"half.pth.part").write_bytes(b"x")
    code, out, _ = call("doctor", "--json", tmp_path/"d.json")
    lines = out.splitlines()
    starts = ["CPU: ", "OpenCV ", "memory: ", "disk ", f"cache {tmp_path}: ", "weights in the cache: w.pth", "next: "]
    for start in starts:
        assert sum(line.startswith(start) for line in lines) == 1, (start, out)
    assert code == 0 and "half" not in out and json.loads((tmp_path/"d.json").read_text())["next"]


def test_shell_completion():
    env = dict(os.environ, _JETSON_DET_COMPLETE="complete_bash", COMP_WORDS="jetson-det ev", COMP_CWORD="1")
    code = "import sys; from jetson_det.cli import main; sys.exit(main([]))"
    r = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert r.stdout.split() == ["evaluate"], r
    text = call("--help")[1]
    assert "--install-completion" in text and "--show-completion" in text


@pytest.mark.parametrize("word, verb", [(other, verb) for verb, others in _OTHER_VERBS.items()
                                        for other in others.split()])
def test_another_programs_verb_gets_a_hint(word, verb):
    refused([word, "x"], f"no verb '{word}'", f"'jetson-det {verb}'")
    name = tuple(part for part in verb.split() if not part.startswith("-"))
    known = {path[:len(name)] for path in dict(verbs())} | {("data", "download")}  # a verb, or a group of verbs
    assert not name or name in known


@pytest.mark.parametrize("words, parts", [
    (["trian"], ["did you mean 'train'"]),
    (["\x1b[31m"], ["no verb"]),
    (["x" * 5000], ["no verb"]),
    (["data", "chek"], ["check"]),
    (["evaluate"], ["ARTIFACT"]),
    (["evaluate", "a.onnx", "--datta", "x"], ["--data"]),
    (["job", "train", "epoks=3"], ["epochs"]),
    (["job", "train", "epochs"], ["NAME=VALUE"]),
    (["data", "convert", "a", "--to", "coco"], ["the new folder is missing"]),
    (["data", "convert", "a", "b", "--out", "c", "--to", "coco"], ["two new folders"]),
    (["train", "epochs=3"], ["did you mean 'train.epochs=3'?"]),
    (["train", "data.input_size=320"], ["[320, 320]"]),
    (["train", "data.input_size=[400,600]"], ["416x608"]),
    (["train", "--size", "400x600"], ["416x608"]),
    (["train", "--gpus", "0"], ["--gpus"]),
    (["train", "--gpus", "5000"], ["--gpus 5000", "CPU" if not Path("/dev/nvidia0").exists() else "each process"]),
])
def test_a_wrong_word_is_one_line(words, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(words, *parts)
    assert not list(tmp_path.iterdir())


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr("glob.glob", lambda pattern: ["/dev/nvidia0", "/dev/nvidia1"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    _check_gpus(2, "auto")
    with pytest.raises(InputError, match="this machine has 2"): _check_gpus(3, "auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(InputError, match="this machine has 1"): _check_gpus(2, "cuda")
    _check_gpus(2, "cpu")


REFUSALS = """evaluate no.onnx --data d
evaluate run --data d
evaluate run --data nowhere
predict no.onnx d
predict m.onnx nowhere
bench no.onnx
bench run
export nowhere
export run
export run --to tensorrt
export run --size 400x416
export m.onnx
lineage nowhere
rollback nowhere
import-pt nowhere.pt
job trian
job train -p epoks 3
job train data=nowhere
job benchmark -p artifact nowhere
data check nowhere
data check d --size 400
data check d --json /dev/null/x.json
data stats nowhere
data view nowhere
data convert nowhere x --to coco
data convert d x --to kitty
data split nowhere
data tile nowhere x
config explain nope
config diff a b
config schema --out /dev/null/x"""


def test_a_refusal_comes_before_heavy_imports(tmp_path):
    "All in one fresh process; after each, none of the heavy modules is there."
    (tmp_path/"m.onnx").write_bytes(b"junk")
    (tmp_path/"run").mkdir()
    (tmp_path/"d").mkdir()
    code = f"""import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from jetson_det.cli import main
for words in {REFUSALS.splitlines()!r}:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err: code = main(words.split())
    print(json.dumps([words, code, err.getvalue(), sorted({HEAVY!r} & set(sys.modules))]))"""
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    rows = [json.loads(line) for line in r.stdout.splitlines()]
    assert len(rows) == len(REFUSALS.splitlines()), r.stderr
    for words, code, err, heavy in rows:
        assert code == 2 and err.count("\n") == 1 and not heavy, (words, code, err, heavy)


MISSING = """import sys
class Without:
    "The packages of an extra are not installed."
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}: raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Without())
for name in {names!r} & set(sys.modules): del sys.modules[name]
from jetson_det.cli import main
sys.exit(main({words!r}))"""
TRAIN_ONLY = {"torch", "safetensors", "pycocotools", "faster_coco_eval", "onnx", "onnxslim", "albumentations",
              "simplejpeg", "transformers", "huggingface_hub", "scipy", "matplotlib", "tensorboard", "papermill",
              "ipykernel", "nbconvert", "psutil", "pynvml", "nbformat"}


def without(words, cwd, names=TRAIN_ONLY):
    return subprocess.run([sys.executable, "-c", MISSING.format(names=names, words=[str(w) for w in words])],
                          capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    "Scenes and something that looks like a checkpoint."
    from jetson_det.scenes.docks import write_scenes
    folder = tmp_path_factory.mktemp("bare")
    write_scenes(folder/"dock", count=2, size=(96, 128), splits={"train": .5, "val": .5})
    (folder/"run").mkdir()
    (folder/"run"/"manifest.json").write_text("{}")
    (folder/"w.pt").write_bytes(b"x")
    pytest.importorskip("torch")
    from jetson_det.export.onnx import export_onnx
    from jetson_det.models.zoo import create_model
    export_onnx(create_model("yolox-nano", ("Sack", "Person")), folder/"m.onnx", (64, 96))
    return folder


@pytest.mark.parametrize("words", ["train --data dock", "demo", "job train", "job benchmark",
                                   "evaluate run --data dock", "predict run dock", "bench run", "export run",
                                   "import-pt w.pt --trust"])
def test_a_missing_extra_is_one_line_that_names_it(words, material):
    r = without(words.split(), material)
    lines = [line for line in r.stderr.splitlines() if line.startswith("error: ")]
    assert r.returncode == 2 and len(lines) == 1 and "Traceback" not in r.stderr, (r.stdout, r.stderr)
    assert "is needed here and is not installed: pip install" in lines[0], lines
    extra = re.search(r'pip install "jetson_det(\[\w+\])"', lines[0])[1]
    assert lines[0].endswith(f'or in a clone of the repository pip install ".{extra}"'), lines


@pytest.mark.parametrize("words", ["data stats dock --plot a.png", "evaluate m.onnx --data dock --html e.html"])
def test_a_missing_package_that_is_enough_is_named_alone(words, material):
    r = without(words.split(), material)
    lines = [line for line in r.stderr.splitlines() if line.startswith("error: ")]
    assert r.returncode == 2 and lines == [
        "error: matplotlib is needed here and is not installed: pip install matplotlib"], (r.stdout, r.stderr)


def test_the_command_for_an_extra_has_one_place():
    files = [f for f in Path(jetson_det.__file__).parent.rglob("*.py") if "jetson_det[" in f.read_text("utf-8")]
    assert [f.name for f in files] == ["files.py"]


@pytest.mark.parametrize("words", ["doctor", "data check dock", "data stats dock", "data split dock",
                                   "config explain epochs", "data convert dock new --to yolo",
                                   "data view dock --html v.html",
                                   "config schema",
                                   "data tile dock tiles --size 64", "evaluate m.onnx --data dock --json e.json",
                                   "predict m.onnx dock", "bench m.onnx --frames 1 --repeats 1"])
def test_verbs_of_the_base_install_need_no_extra(words, material):
    r = without(words.split(), material)
    assert r.returncode in (0, 1) and "error" not in r.stderr, (r.stdout, r.stderr)


# ---- a process of which something is missing

def in_a_shell(script, folder, **env):
    "A line of sh with `jd` as the program."
    code = "import sys; from jetson_det.cli import main; sys.exit(main())"
    script = f"jd() {{ {sys.executable} -c '{code}' \"$@\"; }}; {script}"
    return subprocess.run(["sh", "-c", script], cwd=folder, capture_output=True, text=True, errors="backslashreplace",
                          env={**os.environ, **env})


@pytest.mark.parametrize("closed, shown", [("2>&-", True), (">&-", False), (">&- 2>&-", False), ("<&-", True),
                                           ("<&- >&- 2>&-", False)])
def test_closed_streams_are_no_error(material, closed, shown):
    r = in_a_shell(f"jd data check dock {closed}", material)
    assert r.returncode == 0 and r.stderr == "", r
    assert ("0 errors" in r.stdout) == shown
    assert in_a_shell(f"jd data check nowhere {closed}", material).returncode == 2


@pytest.mark.parametrize("words", ["data check ../dock", "doctor", "train --data dock", "predict m.onnx dock"])
def test_a_working_folder_that_was_removed(material, tmp_path, words):
    r = in_a_shell(f"mkdir gone; cd gone; rmdir ../gone; jd {words}", tmp_path)
    lines = [line for line in r.stderr.splitlines() if "getcwd" not in line] # of sh
    assert r.returncode == 2 and lines == ["error: the working folder was removed: change to another one (cd)"], r


def test_an_encoding_that_lacks_letters_shows_their_codes(material, tmp_path):
    dock = shutil.copytree(material/"dock", tmp_path/"dock")
    for file in dock.rglob("*.json"): file.write_text(file.read_text("utf-8").replace("Sack", "Säck"), "utf-8")
    ascii_only = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    r = in_a_shell("jd data check dock; jd data check Bücher", tmp_path, **ascii_only)
    assert r.returncode == 2 and "S\\xe4ck" in r.stdout and "Traceback" not in r.stderr, r
    assert r.stderr.startswith("error: B") and r.stderr.count("\n") == 1, r
