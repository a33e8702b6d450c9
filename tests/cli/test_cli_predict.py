"""`predict` as a user calls it, and the outputs of all verbs beside their inputs."""
import json
import os
import sys

import cv2
import pytest
from predict_sources import count_frames, digests, middle_session, put_film, put_image, visible

from jetson_det import cli


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    "Runs a verb in this process and in `tmp_path`: (exit code, standard output, standard error)."
    monkeypatch.setattr(cli, "open_named", lambda *a, **k: middle_session())
    monkeypatch.chdir(tmp_path)
    def call(*words):
        code = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err
    return call


@pytest.fixture
def photos(tmp_path):
    for name in ("a.jpg", "b.png", "day/a.jpg"): put_image(tmp_path / "photos" / name)
    put_film(tmp_path / "photos" / "v.mp4", 20)
    return tmp_path / "photos"


def one_line(result, *parts):
    code, out, err = result
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1, result
    for part in parts: assert part in err, err


def test_no_photograph_is_replaced(run, photos):
    before = digests(photos)
    one_line(run("predict", "m.onnx", "photos", "--out", "photos"), "photos", "give another folder")
    one_line(run("predict", "m.onnx", "photos/v.mp4", "--out", "photos"), "photos")
    one_line(run("predict", "m.onnx", "photos/a.jpg", "--out", "photos/a.jpg"), "photos/a.jpg")
    assert digests(photos) == before


def test_the_out_folder_is_looked_at_before_the_model(run, photos, monkeypatch):
    def load(*_): raise AssertionError("the model was loaded")
    monkeypatch.setattr(cli, "open_named", load)
    one_line(run("predict", "m.onnx", "photos", "--out", "photos"), "photos")
    one_line(run("predict", "m.onnx", "photos", "--out", "photos/a.jpg/x"), "not a folder")
    one_line(run("predict", "m.onnx", "absent.mp4"), "absent.mp4")
    os.mkfifo("pipe.mp4")
    one_line(run("predict", "m.onnx", "pipe.mp4"), "not a regular file")
    one_line(run("predict", "m.onnx", "/dev/zero"), "not a regular file")


def test_limits(run, photos):
    code, out, _ = run("predict", "m.onnx", "photos/v.mp4", "--frames", "7")
    assert code == 0 and "7 frames" in out and count_frames("predictions/v.mp4") == 7
    code, out, _ = run("predict", "m.onnx", "photos/v.mp4", "--seconds", "0.5")
    assert code == 0 and "5 frames" in out
    assert run("predict", "m.onnx", "photos", "--frames", "0")[0] == 2
    one_line(run("predict", "m.onnx", "photos/v.mp4", "--seconds", "0"), "seconds: give more than 0")


def test_the_home_folder_in_an_option(run, photos, tmp_path, monkeypatch):
    "A shell leaves `--out=~/run` as it is."
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for words, place in ((["--out=~/a/b"], "a/b"), (["--out", "~/c"], "c")):
        code, out, _ = run("predict", "m.onnx", "photos/a.jpg", *words)
        assert code == 0 and visible(tmp_path / "home" / place) == ["a.jpg", "predictions.json"]
    assert not os.path.exists("~") and "1 frame, 1 box in" in out
    one_line(run("train", "data.path=~/absent", "--out=~/d"), str(tmp_path / "home" / "absent"))


def test_a_stop_is_exit_code_1_and_no_error(run, photos, monkeypatch):
    import signal
    monkeypatch.setattr(cli, "progress_line", lambda what: Stopper())
    class Stopper:
        def __call__(self, done, total):
            if done == 3: os.kill(os.getpid(), signal.SIGTERM)
        def end(self): pass
    code, out, err = run("predict", "m.onnx", "photos/v.mp4")
    assert code == 1 and "stopped by SIGTERM" in out and "error" not in err
    assert json.loads((photos.parent / "predictions" / "predictions.json").read_text())["complete"] is False


def test_an_image_that_cannot_be_written_is_exit_code_1(run, photos, monkeypatch):
    from jetson_det.runtime import predict as module
    save = module.save_jpeg
    def fail(folder, name, image):
        if name == "b.jpg": raise OSError(28, "No space left on device", name)
        save(folder, name, image)
    monkeypatch.setattr(module, "save_jpeg", fail)
    code, out, err = run("predict", "m.onnx", "photos")
    assert code == 1 and "not written: b.jpg" in out and err == "warning: b.jpg: not written: No space left on device\n"
    assert visible("predictions") == ["a.jpg", "day/a.jpg", "predictions.json"]


def test_progress_on_a_terminal(run, photos, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, _, err = run("predict", "m.onnx", "photos/v.mp4")
    assert code == 0 and err.endswith("\rframes: 20 of 20\n")
    code, _, err = run("predict", "m.onnx", "photos/v.mp4", "--frames", "7")
    assert err.endswith("\rframes: 7 of 7\n")


def test_a_name_that_is_not_utf8(run, tmp_path):
    put_image(os.fsencode(str(tmp_path)) + b"/src/caf\xe9.jpg")
    put_image(tmp_path / "src" / "line\u2028\x1b[31m.jpg")
    (tmp_path / "src" / "bad\x1b[31m.jpg").write_bytes(b"no image")
    code, out, err = run("predict", "m.onnx", "src")
    assert code == 0 and "\x1b" not in out + err and err.startswith("warning: skipped") and "bad\\x1b[31m" in err
    rows = json.loads((tmp_path / "predictions" / "predictions.json").read_text())["frames"]
    assert {os.fsencode(row["name"]) for row in rows} == {b"caf\xe9.jpg", "line\u2028\x1b[31m.jpg".encode()}


@pytest.fixture
def scenes(tmp_path):
    from jetson_det.scenes.docks import write_scenes
    return write_scenes(tmp_path / "dock", count=6, size=(64, 96), splits={"train": .5, "val": .5})


def labels_of(folder): return next(p for p in sorted((folder / "annotations").iterdir()) if p.suffix == ".json")


@pytest.mark.parametrize("verb", ["check", "stats"])
def test_no_label_file_is_replaced_by_figures(run, scenes, verb):
    before = digests(scenes)
    label = labels_of(scenes)
    one_line(run("data", verb, scenes, "--json", label), "is a file of", label.name)
    os.symlink(str(label), "link.json")
    one_line(run("data", verb, scenes, "--json", "link.json"), "is a file of")
    one_line(run("data", verb, label, "--json", label), "would be replaced")
    assert digests(scenes) == before
    for _ in range(2):  # the second one replaces the first
        assert run("data", verb, scenes, "--json", scenes / "report.json")[0] == 0
    assert json.loads((scenes / "report.json").read_text())["written_by"] == "jetson-det"


def test_no_page_replaces_a_label_file(run, scenes):
    before = digests(scenes)
    for verb in ("check", "view"):
        one_line(run("data", verb, scenes, "--html", labels_of(scenes)), "must end in .html or .htm")
    (scenes / "index.html").write_text("<p>mine")
    before = digests(scenes)
    for verb in ("check", "view"): one_line(run("data", verb, scenes, "--html", scenes / "index.html"), "is a file of")
    assert digests(scenes) == before
    for _ in range(2): assert run("data", "view", scenes, "--html", scenes / "page.html")[0] == 0


@pytest.mark.parametrize("words", [
    ["data", "check", "dock", "--json", "mine.json"], ["data", "check", "dock", "--html", "mine.html"],
    ["data", "stats", "dock", "--plot", "mine.png"], ["data", "view", "dock", "--html", "mine.html"],
    ["evaluate", "mine.onnx", "--data", "dock", "--html", "mine.html"], ["doctor", "--json", "mine.json"],
    ["evaluate", "mine.onnx", "--data", "dock", "--json", "link.json"], ["config", "schema", "--out", "mine.yaml"],
])
def test_a_file_of_somebody_else_is_not_replaced(run, scenes, tmp_path, words):
    "Wherever it lies."
    pytest.importorskip("matplotlib")
    for suffix in (".json", ".html", ".png", ".onnx", ".yaml"): (tmp_path / ("mine" + suffix)).write_text("important")
    os.symlink("mine.json", str(tmp_path / "link.json"))
    one_line(run(*words), words[-1] + ": is there already", "give another name")
    for suffix in (".json", ".html", ".png", ".onnx", ".yaml"):
        assert (tmp_path / ("mine" + suffix)).read_text() == "important"


def test_a_report_has_the_suffix_of_its_kind(run, scenes, tmp_path):
    put_image(tmp_path / "im1.jpg")
    photo = (tmp_path / "im1.jpg").read_bytes()
    for name in ("im1.jpg", "new.jpg", "report.json"):
        one_line(run("data", "view", scenes, "--html", name), name, "must end in .html or .htm")
    for name in ("im1.jpg", "notes.txt", "page.html"):
        one_line(run("data", "check", scenes, "--json", name), name, "must end in .json")
    assert (tmp_path / "im1.jpg").read_bytes() == photo
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dock", "im1.jpg"]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".jpg", ".webp"])
def test_a_plot_of_ours_is_replaced(tmp_path, suffix):
    "Each kind of file says who made it."
    figures = pytest.importorskip("matplotlib.figure")
    from jetson_det.evaluate.plots import figure_bytes
    from jetson_det.runtime.outputs import check_replaced, is_own_output
    path = tmp_path / ("plot" + suffix)
    fig = figures.Figure(figsize=(4, 4))
    fig.savefig(path)
    assert not is_own_output(path)
    path.write_bytes(figure_bytes(fig, suffix[1:]))
    assert check_replaced(path) == path


def test_an_export_replaces_exports_alone(tmp_path):
    from jetson_det.runtime.files import InputError
    from jetson_det.runtime.outputs import check_replaced
    path = tmp_path / "m.onnx"
    assert check_replaced(path) == path
    path.write_bytes(b"")
    check_replaced(path)  # as mktemp makes it
    path.write_bytes(b"graph" * 9000 + b"jetson_det.contract" + b"classes" * 9000)
    check_replaced(path)
    path.write_bytes(b"graph of somebody")
    with pytest.raises(InputError, match="m.onnx: is there already"): check_replaced(path)
    os.symlink("m.onnx", str(tmp_path / "link.onnx"))
    with pytest.raises(InputError, match="link.onnx: is there already"): check_replaced(tmp_path / "link.onnx")


def test_a_plot_is_no_data(run, scenes, tmp_path):
    one_line(run("data", "stats", scenes, "--plot", scenes / "plot.png"), "would be read as data")
    one_line(run("data", "stats", scenes, "--plot", "plot.pgn"), "must end in .png")
    one_line(run("data", "stats", scenes, "--plot", labels_of(scenes) / "x.png"), "is not a folder")
    assert run("data", "stats", scenes, "--plot", "new/plot.svg")[0] == 0 and (tmp_path / "new" / "plot.svg").exists()


def test_a_new_dataset_lies_outside_of_the_old(run, scenes):
    before = digests(scenes)
    for words in (["convert", scenes, scenes / "yolo", "--to", "yolo"], ["tile", scenes, scenes / "tiles"],
                  ["check", scenes, "--fix", scenes / "clean"]):
        one_line(run("data", *words), "lies in the dataset")
    one_line(run("data", "convert", scenes, scenes, "--to", "yolo"), "is there already")
    assert digests(scenes) == before and not (scenes / "yolo").exists()


def test_lists_of_splits(run, scenes, tmp_path):
    (scenes / "train.txt").write_text("mine\n")
    one_line(run("data", "split", scenes, "--anew", "--out", scenes), "train.txt")
    assert (scenes / "train.txt").read_text() == "mine\n"
    (scenes / "train.txt").unlink()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "test.txt").write_text("mine\n")
    one_line(run("data", "split", scenes, "--anew", "--out", "notes"), "test.txt is there already")
    assert run("data", "split", scenes, "--anew", "--val", ".3", "--test", ".3")[0] == 0
    assert visible("splits") == ["test.txt", "train.txt", "val.txt"]
    assert run("data", "split", scenes, "--anew", "--val", ".5", "--test", "0")[0] == 0
    assert visible("splits") == ["train.txt", "val.txt"]  # no list of the first run stays
    (tmp_path / "splits" / "val.txt").write_text("mine\n")
    one_line(run("data", "split", scenes, "--anew"), "val.txt was changed since data split wrote it")
    assert (tmp_path / "splits" / "val.txt").read_text() == "mine\n"


def test_predictions_inside_a_dataset_are_no_data(run, scenes, monkeypatch):
    monkeypatch.chdir(scenes)
    assert run("predict", "m.onnx", ".")[0] == 0
    code, out, _ = run("data", "check", ".", "--json", "../check.json")
    flaws = json.loads(open("../check.json").read())["flaws"]
    assert code == 0 and [f["file"] for f in flaws if f["kind"] == "own-output"] == ["predictions"]
    assert not [f for f in flaws if f["file"].startswith("predictions/")] and "6 images" in out
    code, out, _ = run("predict", "m.onnx", ".")
    assert code == 0 and "6 frames" in out and "results of jetson-det skipped (predictions)" in out


OUTPUTS = {  # verb -> (what it needs to begin, its options that name a file)
    "doctor": ([], ["--json"]),
    "verify": (["m.onnx"], ["--json"]),
    "lineage": (["m.onnx"], ["--json"]),
    "evaluate": (["m.onnx", "--data", "empty"], ["--json", "--html"]),
    "bench": (["m.onnx"], ["--json"]),
    "compare": (["m.onnx", "m.onnx", "--data", "empty"], ["--json", "--plot"]),
    "export": (["empty"], ["--json"]),
    "lint": (["m.onnx", "--board", "nano"], ["--json"]),
    "estimate": (["m.onnx", "--board", "nano"], ["--json"]),
    "quantize": (["m.onnx", "--data", "empty"], ["--json"]),
    "bundle": (["m.onnx", "--board", "nano"], ["--json"]),
    "build": (["m.onnx"], ["--json"]),
    "audit": (["m.onnx", "--data", "broken.yaml"], ["--json"]),
    "run": (["broken.yaml"], ["--json"]),
    "alpr": (["empty", "--detector", "m.onnx", "--ocr", "m.onnx"], ["--json"]),
    "compare-runtimes": (["m.onnx"], ["--json"]),
    "fleet submit": (["redis://127.0.0.1:1", "gate", "m.onnx"], ["--json"]),
    "fleet status": (["redis://127.0.0.1:1", "gate"], ["--json"]),
    "half": (["m.onnx"], ["--json"]),
    "shrink": (["empty"], ["--json"]),
    "plan": (["--board", "nano", "--data", "empty"], ["--json"]),
    "parity": (["m.onnx", "empty", "--data", "empty"], ["--json", "--html"]),
    "suggest": (["m.onnx", "empty"], ["--json"]),
    "campaign": (["jetson_nano", "--data", "empty"], ["--json"]),
    "sweep": (["p2_small_objects", "--data", "empty"], ["--json"]),
    "runs list": (["empty"], ["--json"]),
    "runs show": (["empty"], ["--json"]),
    "runs compare": (["empty", "empty"], ["--json"]),
    "runs promote": (["empty"], ["--json"]),
    "runs rollback": ([], ["--json"]),
    "runs stages": ([], ["--json"]),
    "data download": (["coco", "new"], ["--json"]),
    "data check": (["empty"], ["--json", "--html"]),
    "data stats": (["empty"], ["--json", "--plot"]),
    "data view": (["empty"], ["--html"]),
    "data convert": (["empty", "new", "--to", "yolo"], ["--json"]),
    "data split": (["empty"], ["--json"]),
    "data tile": (["empty", "new"], ["--json"]),
    "config explain": (["-c", "broken.yaml"], ["--json"]),
    "config diff": (["broken.yaml", "broken.yaml"], ["--json"]),
}


def verbs_of(command, name=""):
    "Each verb below a command of click, with its options."
    if not hasattr(command, "commands"):
        yield name, {option for parameter in command.params for option in parameter.opts}
        return
    for word, below in command.commands.items(): yield from verbs_of(below, (name + " " + word).strip())


def test_the_table_of_outputs_is_complete():
    import typer
    found = {}
    for verb, options in verbs_of(typer.main.get_command(cli.app)):
        files = sorted(options & {"--json", "--html", "--plot"})
        if files: found[verb] = files
    assert found == {verb: sorted(options) for verb, (_, options) in OUTPUTS.items()}


@pytest.mark.parametrize("verb", sorted(OUTPUTS))
def test_a_file_that_cannot_be_written_is_known_before_the_work(run, tmp_path, monkeypatch, verb):
    "The inputs are worth nothing, so that work which had begun would end with a line about them."
    if not sys.platform.startswith("linux"): pytest.skip("not a Linux")
    monkeypatch.setattr(cli, "open_named", None)
    (tmp_path / "m.onnx").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.yaml").write_text(": [")
    os.symlink("/dev/full", str(tmp_path / "full"))
    words, options = OUTPUTS[verb]
    for option in options:
        if option == "--plot":  # a device has no suffix
            one_line(run(*verb.split(), *words, option, "/sys/x.png"), "error: /sys/x.png: cannot be written")
            continue
        for path, why in (("/dev/full", "No space left on device"), ("full", "No space left on device"),
                          ("/sys/x." + option[2:], "no file can be made in /sys"), ("empty", "is a folder"),
                          ("m.onnx/x." + option[2:], "m.onnx is not a folder")):
            one_line(run(*verb.split(), *words, option, path), f"error: {path}: ", why)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.yaml", "empty", "full", "m.onnx"]


def test_two_outputs_in_one_file(run, tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for verb in ("evaluate", "data check"):
        words = [*verb.split(), *OUTPUTS[verb][0], "--json", "x", "--html", "./x"]
        one_line(run(*words), "x: is named for two outputs")
        os.symlink("x", str(tmp_path / "link"))
        one_line(run(*words[:-1], "link"), "is named for two outputs")
        (tmp_path / "link").unlink()


@pytest.mark.parametrize("words", [
    ["predict", "pipe", "photos"], ["predict", "m.onnx", "pipe"], ["bench", "m.onnx", "--source", "pipe"],
    ["evaluate", "m.onnx", "--data", "pipe"], ["lineage", "pipe"], ["verify", "pipe"], ["import-pt", "pipe"],
    ["train", "--data", "pipe"], ["train", "-c", "pipe"], ["train", "--out", "pipe"],
    ["predict", "m.onnx", "photos", "--out", "pipe"],
])
def test_a_pipe_is_called_a_pipe(photos, monkeypatch, capsys, words):
    monkeypatch.chdir(photos.parent)
    for name in ("m.onnx", "empty.txt"): (photos.parent / name).write_bytes(b"")
    os.mkfifo("pipe")
    code = cli.main(words)
    one_line((code, *capsys.readouterr()), "error: pipe: is a named pipe, not a regular file")


@pytest.mark.parametrize("out", ["m.onnx", "m.onnx/run", "/sys/run"])
def test_a_run_folder_that_cannot_be_written_is_known_before_the_data_is_read(run, tmp_path, out):
    (tmp_path / "m.onnx").write_bytes(b"")
    one_line(run("train", "--data", ".", "--out", out), f"error: {out}: ")


def test_a_split_in_another_case(run, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "open_named", None)
    (tmp_path / "m.onnx").write_bytes(b"")
    one_line(run("evaluate", "m.onnx", "--data", ".", "--split", "TEST"), "split 'TEST': did you mean 'test'?")


@pytest.mark.parametrize("path, why", [("/dev/full", "No space left on device"), ("/proc/x.json", "/proc/x.json")])
def test_an_output_that_fails_is_one_line(run, scenes, path, why):
    code = run("data", "stats", scenes, "--json", path)
    assert code[0] == 2 and code[2].startswith("error: " + path) and why in code[2] and code[2].count("\n") == 1


def test_an_export_does_not_replace_the_weights_it_began_from(tmp_path):
    from jetson_det.export.onnx import _check_origins
    from jetson_det.runtime.contract import preset
    from jetson_det.runtime.files import InputError
    for name in ("a.onnx", "b.onnx"): (tmp_path / name).write_bytes(b"weights")
    os.link(tmp_path / "a.onnx", tmp_path / "hard.onnx")
    os.symlink(tmp_path / "b.onnx", tmp_path / "soft.onnx")
    origin = {"path": str(tmp_path / "b.onnx"), "origin": {"path": str(tmp_path / "a.onnx"), "origin": None}}
    contract = preset("yolox", ("a",), (64, 64))._replace(extra={"origin": origin})
    for name in ("a.onnx", "b.onnx", "hard.onnx", "soft.onnx"):
        with pytest.raises(InputError, match="the training began from this file"):
            _check_origins(tmp_path / name, contract)
    _check_origins(tmp_path / "new.onnx", contract)


def test_a_run_inside_a_dataset_is_no_data(scenes):
    from jetson_det.config import Config
    from jetson_det.data.formats.registry import read_dataset
    from jetson_det.train.run_folder import check_run_folder, write_run_folder
    ds = read_dataset(scenes)
    write_run_folder(scenes / "runs" / "first", Config(), ds, [])
    put_image(scenes / "runs" / "first" / "worst.png")
    again = read_dataset(scenes)
    assert again.paths.tolist() == ds.paths.tolist()
    assert [f.file for f in again.flaws if f.kind == "own-output"] == ["runs/first"]
    (scenes / "new").mkdir()
    (scenes / "new" / ".jetson-det-output").write_text("")
    assert check_run_folder(scenes / "new", Config()) == []


def test_a_table_and_a_log_with_line_breaks_of_unicode(tmp_path, capsys):
    "Only a newline ends a line of what was written here."
    from jetson_det.evaluate.plots import read_history
    from jetson_det.train.loop import RunLog
    (tmp_path / "metrics.csv").write_text("epoch,AP a\u2028b\n1,.5\n2,\n", encoding="utf-8")
    assert read_history(tmp_path / "metrics.csv")["AP a\u2028b"][0] == .5
    log = RunLog()
    log("image a\u2028b.jpg\x85c is odd\nsecond line")
    log.write_to(tmp_path / "log.txt")
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").split("\n")
    assert [line[20:] for line in lines[:-1]] == ["image a\u2028b.jpg\x85c is odd", "second line"] and not lines[-1]


def test_init_replaces_no_file_of_the_dataset(run, scenes):
    (scenes / "data.yaml").write_text("names: [a]\n")
    words = ["init", "--data", scenes, "--yes", "--fps", "5", "--force", "--out"]
    one_line(run(*words, scenes / "data.yaml"), "is a file of")
    assert (scenes / "data.yaml").read_text() == "names: [a]\n"
    for _ in range(2): assert run(*words, scenes / "config.yaml")[0] == 0
