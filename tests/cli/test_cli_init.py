"""`init` as a person meets it: questions in a real terminal, flags without one; and the `config` verbs."""
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from signals import hear_ctrl_c

from jetson_det import cli, cli_init
from jetson_det.cli_init import FAMILY, choose_model, config_text, plan_lines, time_line
from jetson_det.config import load_config
from jetson_det.data.index import read_indexed
from jetson_det.export.plan import ObjectSizes, expected_ap
from jetson_det.models.zoo import MODELS
from jetson_det.runtime.boards import BOARDS
from jetson_det.runtime.files import InputError
from jetson_det.scenes.docks import write_scenes
from jetson_det.train.recipes import finetune_epochs, with_recipe

posix = pytest.mark.skipif(os.name != "posix", reason="a pseudo-terminal of a POSIX system")
CALL = "import sys; from jetson_det import cli; sys.exit(cli.main())"


def run(*words, cwd=None, **kw):
    return subprocess.run([sys.executable, "-c", CALL, *map(str, words)],
                          capture_output=True,
                          text=True,
                          cwd=cwd,
                          timeout=120,
                          stdin=subprocess.DEVNULL,
                          **kw)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("init")/"dock", 12, (360, 640), splits={"train": .75, "val": .25})


class Terminal:
    "A verb in a pseudo-terminal of its own."
    def __init__(self, *words, cwd):
        import fcntl, pty, termios
        def own_terminal():
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            hear_ctrl_c()
        self.master, slave = pty.openpty()
        self.p = subprocess.Popen([sys.executable, "-c", CALL, *map(str, words)], stdin=slave, stdout=slave,
                                  stderr=slave, cwd=cwd, start_new_session=True, preexec_fn=own_terminal)
        os.close(slave)
        self.output = ""
        self.at = 0

    def until(self, text, seconds=60):
        "Read until a text appears after what was waited for last."
        end = time.monotonic() + seconds
        while text not in self.output[self.at:]:
            assert time.monotonic() < end, (text, self.output)
            if select.select([self.master], [], [], .2)[0]:
                try: self.output += os.read(self.master, 4096).decode().replace("\r\n", "\n")
                except OSError: raise AssertionError((text, self.output))
        self.at = self.output.index(text, self.at) + len(text)
        return self

    def type(self, text):
        os.write(self.master, text.encode())
        return self

    def end(self, press="", seconds=60):
        "The exit code, after all was read. A key is pressed again when nothing comes of it, as a person does."
        end = time.monotonic() + seconds
        while True:
            assert time.monotonic() < end, self.output
            if select.select([self.master], [], [], 2)[0]:
                try: got = os.read(self.master, 4096)
                except OSError: break
                if not got: break
                self.output += got.decode().replace("\r\n", "\n")
            elif press and self.p.poll() is None: self.type(press)
        os.close(self.master)
        return self.p.wait(30)


@pytest.fixture
def terminal():
    open_ones = []
    def make(*words, cwd):
        open_ones.append(Terminal(*words, cwd=cwd))
        return open_ones[-1]
    yield make
    for t in open_ones:
        if t.p.poll() is None:
            t.p.kill()
            t.p.wait()


@posix
def test_questions_with_wrong_answers_first(scenes, tmp_path, terminal):
    t = terminal("init", cwd=tmp_path)
    t.until("Folder with images and labels: ").type("\n").until("Folder with images and labels: ").type("nowhere\n")
    t.until("nowhere: no such file or folder").until("Folder with images and labels: ").type(f"{scenes}\n")
    t.until("12 images").until("Sack, Person")
    t.until("Jetson Nano 4GB").until("by name or number [orin-nano]: ").type("orin-nanu\n")
    t.until("did you mean 'orin-nano'?").until("by name or number").type("9\n")
    t.until("[30]: ").type("fast\n").until("over 0 up to 1000").until("[30]: ").type("25\n")
    t.until("such as 8-cores").until("Training machine [this]: ").type("rtx-3061\n")
    t.until("did you mean 'rtx-3060'?").until("Training machine [this]: ").type("8 cores\n")
    t.until("Training takes about").until("a rough guess for 8 CPU cores").until("input_size")
    t.until("File to write [config.yaml]: ").type("\n")
    t.until("wrote config.yaml; next: jetson-det train -c config.yaml")
    assert t.end() == 0
    assert list(BOARDS)[8] == "orin-nx"
    cfg = load_config(tmp_path/"config.yaml")
    assert cfg.data.path == str(scenes) and cfg.data.classes == ["Sack", "Person"]
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    assert "Orin NX 16GB, 25 frames a second" in (tmp_path/"config.yaml").read_text()


@posix
def test_what_is_given_is_not_asked_and_a_file_is_kept(scenes, tmp_path, terminal):
    (tmp_path/"config.yaml").write_text("mine")
    t = terminal("init", "--data", scenes, "--board", "nano", "--fps", "10", "--machine", "t4", cwd=tmp_path)
    t.until("File to write [config.yaml]: ").type("\n")
    t.until("config.yaml exists already. Replace it? [n]: ").type("\n")
    t.until("name another file").until("File to write [config.yaml]: ").type("sub/x.yaml\n")
    t.until("sub: no such folder").until("File to write").type("new.yaml\n").until("wrote new.yaml")
    assert t.end() == 0 and "Board" not in t.output and "Frames" not in t.output and "Folder" not in t.output
    assert "Training machine" not in t.output and "Training takes" in t.output
    assert (tmp_path/"config.yaml").read_text() == "mine" and load_config(tmp_path/"new.yaml").data.path == str(scenes)
    t = terminal("init", "--data", scenes, "--board", "nano", "--fps", "10", "--machine", "t4", cwd=tmp_path)
    t.until("File to write").type("config.yaml\n").until("Replace it?").type("maybe\n")
    t.until("y or n?").type("y\n").until("wrote config.yaml")
    assert t.end() == 0 and load_config(tmp_path/"config.yaml") == load_config(tmp_path/"new.yaml")


@posix
@pytest.mark.parametrize("key", ["\x03", "\x04"], ids=["ctrl-c", "ctrl-d"])
@pytest.mark.parametrize("question", [0, 1, 4])
def test_ctrl_c_leaves_nothing(scenes, tmp_path, terminal, key, question):
    t = terminal("init", cwd=tmp_path)
    dialog = [("labels: ", f"{scenes}\n"), ("number [", "1\n"), ("want [30]: ", "\n"),
              ("machine [this]: ", "t4\n"), ("File to write [", "\n")]
    for i, (text, answer) in enumerate(dialog):
        t.until(text)
        if i == question: break
        t.type(answer)
    t.type(key)
    assert t.end(key) in (130, -2) and "Traceback" not in t.output # -2: pressed again while Python was shutting down
    assert list(tmp_path.iterdir()) == []


def test_flags_alone(scenes, tmp_path):
    done = run("init", "--data", scenes, "--board", "orin-nano", "--fps", "30", "--out", "config.yaml", "--yes",
               "--machine", "t4", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and "wrote config.yaml" in done.stdout
    text = (tmp_path/"config.yaml").read_text()
    load_config(tmp_path/"config.yaml")
    for line in text.splitlines(): assert not line.startswith("  ") or "  # " in line, line
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    again = run("init", "--data", scenes, "--yes", cwd=tmp_path)
    assert again.returncode == 2 and "--force" in again.stderr and again.stderr.count("\n") == 1
    replaced = run("init", "--data", scenes, "--yes", "--force", "--fps", "5", cwd=tmp_path)
    assert replaced.returncode == 0 and "5 frames a second" in (tmp_path/"config.yaml").read_text()


@pytest.mark.parametrize("words, part", [
    ((), "--data is missing"),
    (("--yes",), "--data is missing"),
    (("--data", "DIR"), "no terminal to ask at: say --board"),
    (("--data", "nowhere", "--yes"), "nowhere"),
    (("--data", "DIR", "--yes", "--board", "orin-nanu"), "did you mean 'orin-nano'"),
    (("--data", "DIR", "--yes", "--fps", "0"), "over 0 up to 1000"),
    (("--data", "DIR", "--yes", "--fps", "nan"), "over 0 up to 1000"),
    (("--data", "DIR", "--yes", "--machine", "rtx-4091"), "did you mean 'rtx-4090'"),
    (("--data", "DIR", "--yes", "--machine", "0 cores"), "cores of a CPU, such as 8-cores"),
    (("--data", "DIR", "--yes", "--out", "no/such/x.yaml"), "no such folder"),
    (("--data", "DIR", "--yes", "--out", "."), "is a folder"),
    (("--data", "DIR", "--yes", "--weights", "gone.pth"), "gone.pth"),
    (("--data", "DIR", "--yes", "--format", "vok"), "did you mean 'voc'"),
    (("--data", "DIR", "--yes", "--bord", "nano"), "--bord"),
])
def test_a_mistake_is_one_line_and_nothing_is_written(scenes, tmp_path, monkeypatch, capsys, words, part):
    monkeypatch.chdir(tmp_path)
    code = cli.main(["init", *[w.replace("DIR", str(scenes)) for w in words]])
    err = capsys.readouterr().err
    assert code == 2 and part in err and err.count("\n") == 1 and err.startswith("error: "), (code, err)
    assert list(tmp_path.iterdir()) == []


# ---- what is written, and why

@pytest.mark.parametrize("board", BOARDS)
@pytest.mark.parametrize("fps", [1, 30, 200])
def test_every_board_and_speed_gives_a_config_that_loads(scenes, tmp_path, board, fps):
    lines, advice = plan_lines(read_indexed(scenes), "it's: a #strange [path]", board, fps)
    (tmp_path/"c.yaml").write_text(config_text(lines, advice, ["x"]))
    cfg = load_config(tmp_path/"c.yaml")
    assert cfg.data.path == "it's: a #strange [path]"
    for line in lines:
        assert line.why and "\n" not in line.why
        assert getattr(getattr(cfg, line.section), line.key) == line.value
    name = next(line for line in lines if line.key == "name")
    assert "estimated" in name.why and f"{fps} frames a second" in name.why
    runs_tensorrt_82 = any(release.tensorrt == "8.2" for release in BOARDS[board].releases)
    assert cfg.export.opset == 13
    assert ("opset" in {line.key for line in lines}) == runs_tensorrt_82


MIXED = ObjectSizes(np.array([.03, .08, .2], np.float32), 16/9, 1920, 3)


@pytest.mark.parametrize("board", BOARDS)
def test_a_choice_is_fast_enough_or_says_that_it_is_not(board):
    for fps in (1, 10, 30, 150, 1000):
        choice = choose_model(board, fps, MIXED, 100_000)
        h, w = choice.input_size
        assert choice.fits == (choice.estimate.high <= 1000/fps*2/3)
        assert choice.fits != choice.why.startswith("TOO SLOW") and "estimated" in choice.why
        assert f"{h}x{w}" in choice.why and h*w <= 4*416*416 and choice.model in FAMILY


def test_a_super_board_never_gets_a_smaller_network():
    "It is the same board with a higher clock; published figures alone gave it a smaller one."
    for fps in (10, 20, 30, 60, 120):
        slow, fast = (choose_model(name, fps, MIXED, 100_000) for name in ("orin-nano", "orin-nano-super"))
        assert expected_ap(fast.model, fast.input_size, MIXED) >= expected_ap(slow.model, slow.input_size, MIXED)


def test_names_are_those_of_the_zoo():
    from jetson_det.models.weights.download import official_urls
    from jetson_det.models.zoo import MODELS
    assert set(FAMILY) <= set(MODELS) and set(FAMILY) <= set(official_urls())
    parse = cli_init._parse_board
    for name in BOARDS: assert parse(name) == parse(name.upper().replace("-", " ")) == name


def by_key(lines):
    return {f"{line.section}.{line.key}": line for line in lines}


def plan(scenes, board_name="orin-nano", fps=30, **kw):
    lines, _ = plan_lines(read_indexed(scenes), "d", board_name, fps, **kw)
    return by_key(lines)


def test_length_and_batch_follow_the_images():
    for images, batch in ((5, 2), (40, 4), (205, 8), (1000, 8), (118_000, 8)):
        lines = {line.key: line.value for line in cli_init._training_lines(images, False)}
        assert lines == {"recipe": "finetune", "epochs": finetune_epochs(images), "batch_size": batch}, images
    lines = {line.key: line.value for line in cli_init._training_lines(1000, True)}
    assert lines == {"recipe": "scratch", "epochs": 300, "batch_size": 8}


@pytest.mark.parametrize("count", [6, 18, 40])
def test_few_images_get_a_small_network_and_a_mild_fine_tuning(tmp_path, count):
    ds = read_indexed(write_scenes(tmp_path/"few", count, (96, 160)))
    for board_name in ("orin-nano", "agx-orin", "thor", "nano"):
        lines, advice = plan_lines(ds, "d", board_name, 10)
        found = by_key(lines)
        assert MODELS[found["model.name"].value].card.params < 6 and found["train.epochs"].value <= 100
        assert found["train.recipe"].value == "finetune"
        (tmp_path/"c.yaml").write_text(config_text(lines, advice, ["x"]))
        cfg, _ = with_recipe(load_config(tmp_path/"c.yaml"), count, len(ds.classes))
        assert cfg.augment.mixup == 0 and cfg.augment.mosaic_scale == [.5, 1.5]
        assert cfg.train.optimizer == "adamw" and cfg.train.warmup_epochs <= .1*cfg.train.epochs


def test_the_number_of_images_alone_makes_a_network_smaller():
    for board_name in ("nano", "orin-nano", "agx-orin"):
        free = choose_model(board_name, 10, MIXED, 100_000)
        order = [FAMILY.index(choose_model(board_name, 10, MIXED, n).model) for n in (1, 99, 100, 499, 500, 5000)]
        assert order == sorted(order) and order[-1] <= FAMILY.index(free.model)
        if FAMILY.index(free.model) > 1:
            few = choose_model(board_name, 10, MIXED, 18)
            assert "18 images are few" in few.why and free.model in few.why and few.fits


def test_the_time_is_guessed_or_measured_and_says_which(scenes):
    ds = read_indexed(scenes)
    lines, _ = plan_lines(ds, "d", "orin-nano", 30)
    guess = time_line(ds, lines, "8-cores")
    assert "a rough guess for 8 CPU cores" in guess and "not measured" in guess
    small = [line._replace(value=[64, 96]) if line.key == "input_size" else line for line in lines]
    assert "measured here" in time_line(ds, small, "this")
    epochs = by_key(lines)["train.epochs"].value
    for text in (guess, time_line(ds, small, "t4")): assert f"{epochs} epochs of 9 images" in text


def test_weights_and_splits(scenes, tmp_path):
    lines = plan(scenes)
    weights = lines["model.weights"]
    assert weights.value == lines["model.name"].value and "Person carried over" in weights.why
    assert "data.val" not in lines
    assert plan(scenes, weights=None)["model.weights"].value == "none"
    assert plan(scenes, weights="w.pth")["model.weights"].value == "w.pth"
    whole = write_scenes(tmp_path/"one", 6, (96, 160), splits={"train": 1.})
    assert plan(whole)["data.val"].value == .2
    empty = tmp_path/"one"/"annotations"/"train.json"
    d = json.loads(empty.read_text())
    empty.write_text(json.dumps({**d, "annotations": []}))
    with pytest.raises(InputError, match="nothing to learn"): plan(whole)


def test_a_demanded_speed_makes_the_input_smaller(scenes):
    ds = read_indexed(scenes)
    far = replace(ds, sizes=ds.sizes*3) # the same boxes in larger images
    slow, fast, too_fast = [by_key(plan_lines(far, "d", "orin-nano", fps)[0]) for fps in (5, 140, 900)]
    slow_h, slow_w = slow["data.input_size"].value
    fast_h, fast_w = fast["data.input_size"].value
    assert fast_h*fast_w < slow_h*slow_w and "TOO SLOW" not in fast["model.name"].why
    assert "TOO SLOW" in too_fast["model.name"].why


# ---- the config verbs

def test_config_verbs(tmp_path):
    assert "config.schema.json" in run("config", "schema", "--out", "config.schema.json", cwd=tmp_path).stdout
    schema = json.loads((tmp_path/"config.schema.json").read_text())
    assert json.loads(run("config", "schema").stdout) == schema and "train" in schema["properties"]
    (tmp_path/"a.yaml").write_text("train:\n  epochs: 20\n")
    done = run("config", "explain", "epochs", "-c", "a.yaml", cwd=tmp_path)
    assert "train.epochs = 20  (a.yaml, line 2)" in done.stdout and "default: 100" in done.stdout
    done = run("config", "explain", "epochs", "train.epochs=7", "-c", "a.yaml", cwd=tmp_path)
    assert "train.epochs = 7  (override 'train.epochs=7')" in done.stdout
    done = run("config", "explain", "train.epochs=7", "data.val", "epochs", "train.epochs", "ema", cwd=tmp_path)
    settings = [line.split(" = ")[0] for line in done.stdout.splitlines() if line[0] != " "]
    assert settings == ["data.val", "train.epochs", "train.ema"] and "train.epochs = 7 " in done.stdout
    assert run("config", "diff", "a.yaml", "demo", cwd=tmp_path).stdout.count("train.epochs: 20 -> 12") == 1
    assert run("config", "diff", "a.yaml", "a.yaml", cwd=tmp_path).stdout == "no setting differs\n"


@pytest.mark.parametrize("words, part", [
    (("explain", "epoks"), "did you mean 'epochs'"),
    (("explain", "epochs", "train.recipes"), "did you mean 'train.recipe'"),
    (("diff", "demo", "gone.yaml"), "gone.yaml"),
    (("explain", "epochs", "-c", "gone"), "gone"),
])
def test_a_misspelled_key_is_one_line(words, part, capsys):
    assert cli.main(["config", *words]) == 2
    err = capsys.readouterr().err
    assert part in err and err.count("\n") == 1 and err.startswith("error: ")


def test_nothing_heavy_is_imported():
    code = (
        "import sys, jetson_det.cli_init; heavy = {'torch', 'numpy', 'cv2', 'pydantic', 'yaml'} & set(sys.modules);"
        " sys.exit(str(heavy) if heavy else 0)"
    )
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
