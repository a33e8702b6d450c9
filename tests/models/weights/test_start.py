"""What a training starts from: `auto`, `none`, or what is named; a local server stands for the official place."""
import hashlib
import io
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from jetson_det import cli  # noqa: E402
from jetson_det.models.weights import download  # noqa: E402
from jetson_det.models.weights.download import AUTO, fetch_start, start_of  # noqa: E402
from jetson_det.models.zoo import MODELS, create_model  # noqa: E402
from jetson_det.runtime.contract import COCO_CLASSES  # noqa: E402
from jetson_det.runtime.files import InputError  # noqa: E402
from jetson_det.config import load_config  # noqa: E402
from jetson_det.train.lineage import lineage, lineage_text  # noqa: E402
from servers import Site  # noqa: E402
from train_helpers import QUICK, scenes  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "A cache of its own, and no other settings of downloads."
    for name in ("JETSON_DET_MIRROR", "JETSON_DET_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path/"cache"))
    return tmp_path/"cache"/"weights"


@pytest.fixture(scope="module")
def official():
    "The bytes of a file as the authors publish it: a head of COCO's classes."
    torch.manual_seed(0)
    file = io.BytesIO()
    torch.save({"model": create_model("yolox-nano", COCO_CLASSES).state_dict()}, file)
    return file.getvalue()


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_a_start(cache, name):
    "The official file, or a line that says why there is none and what to do."
    start = start_of(AUTO, name)
    if start.source is None: assert "are published" in start.rule or f"--out {cache}" in start.rule
    else: assert start.source == name and "official" in start.text and MODELS[name].url.endswith(".pth")


def test_a_family_that_nobody_has_trained_begins_with_random_weights(monkeypatch):
    monkeypatch.setitem(MODELS, "toy-n", MODELS["yolox-nano"]._replace(url=None))
    start = start_of(AUTO, "toy-n")
    assert (start.source, start.text) == (None, "random")
    assert start.rule == "model.weights = auto, but no weights of toy-n are published"


@pytest.mark.parametrize("name, base", [("yolo11n", "yolo11n"), ("yolo11s-p2-lite", "yolo11s"), ("yolo26m", "yolo26m")])
def test_an_imported_file_is_found(cache, name, base):
    cache.mkdir(parents=True)
    (cache/f"{base}.safetensors").write_bytes(b"x")
    assert start_of(AUTO, name).source == str(cache/f"{base}.safetensors")


@pytest.mark.parametrize("text, value", [("none", None), ("None", None), ("null", None), ("", None), ("auto", "auto"),
                                         ("a.onnx", "a.onnx")])
def test_the_setting(text, value):
    assert load_config(None, [f"model.weights={text}"]).model.weights == value
    assert load_config().model.weights == AUTO


def test_what_is_named_is_taken_as_it_is(cache, tmp_path):
    assert start_of(None, "yolox-nano").source is None
    assert start_of("somebody/model", "yolox-nano").source == "somebody/model"
    (tmp_path/"a.pth").write_bytes(b"x")
    assert fetch_start(str(tmp_path/"a.pth"), "yolox-nano").source == str(tmp_path/"a.pth")
    with pytest.raises(InputError, match="no such file"): fetch_start(str(tmp_path/"b.pth"), "yolox-nano")


def trained(data, out, *words):
    return cli.main(["train", "--data", str(data), "--out", str(out),
                     *[w for w in QUICK if "model.weights" not in w], "train.epochs=1", *words])



def test_a_training_from_the_official_file(cache, official, tmp_path, monkeypatch, capsys):
    "Downloaded for the first training, taken from the cache by the second, offline."
    data = scenes(tmp_path/"data", 8)
    site = Site(official)
    monkeypatch.setattr(download, "official_sha256", lambda url: hashlib.sha256(official).hexdigest())
    monkeypatch.setenv("JETSON_DET_MIRROR", site.base + "/shelf")
    assert trained(data, tmp_path/"one") == 0
    shown = capsys.readouterr().out
    assert site.paths == ["/shelf/yolox_nano.pth"] and (cache/"yolox_nano.pth").exists()
    assert "classes carried over: Person; new: Sack" in shown
    assert "yolox_nano.pth, official, trained on COCO   # model.weights = auto" in shown
    site.close()
    monkeypatch.setenv("JETSON_DET_OFFLINE", "1")
    assert trained(data, tmp_path/"two") == 0
    assert "carried over: Person" in capsys.readouterr().out


def test_what_was_downloaded_is_in_the_lineage(cache, official, tmp_path, monkeypatch, capsys):
    "By name and by URL: the copy in the cache, its sha256, and where it came from."
    site = Site(official)
    monkeypatch.setattr(download, "official_urls", lambda: {"yolox-nano": site.url})
    monkeypatch.setattr(download, "official_sha256", lambda url: None)
    data = scenes(tmp_path/"data", 8)
    for k, word in enumerate(("auto", "yolox-nano", site.url)):
        out = tmp_path/f"run-{k}"
        assert trained(data, out, f"model.weights={word}") == 0
        found = lineage(out/"best")[1]
        assert found["sha256"] == hashlib.sha256(official).hexdigest() and found["found"] == "as it was"
        assert Path(found["path"]).is_relative_to(cache) and found["name"] == "w.pth"
        assert found["copy_of"] == site.url
        line = lineage_text(lineage(out/"best")).splitlines()[1]
        assert line.endswith(f": w.pth, a copy of {site.url}, sha256 {found['sha256'][:12]}, as it was")
    site.close()
    own = tmp_path/"mine.pth"
    own.write_bytes(official)
    out = tmp_path/"own"
    assert trained(data, out, f"model.weights={own}") == 0
    assert lineage(out/"best")[1]["path"] == str(own) and "copy_of" not in lineage(out/"best")[1]


def test_offline_without_the_file_is_one_line(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JETSON_DET_OFFLINE", "1")
    assert trained(scenes(tmp_path/"data", 8), tmp_path/"run") == 2
    line = capsys.readouterr().err.strip()
    assert line.count("\n") == 0 and not (tmp_path/"run").exists()
    for part in ("model.weights=auto", "yolox_nano.pth: not in", f"put the file at {cache/'yolox_nano.pth'}",
                 MODELS["yolox-nano"].url, "model.weights=none"):
        assert part in line, line


def test_nobody_there_is_one_line(cache, tmp_path, monkeypatch, capsys):
    site = Site()
    site.close()
    monkeypatch.setattr(download, "official_urls", lambda: {"yolox-nano": site.url})
    monkeypatch.setattr("jetson_det.downloads.time.sleep", lambda seconds: None)
    assert trained(scenes(tmp_path/"data", 8), tmp_path/"run") == 2
    line = capsys.readouterr().err.strip()
    assert line.count("\n") == 0 and "model.weights=none" in line
    assert f"put the file at {cache/'w.pth'} (make the folder where it is missing)" in line


def test_random_weights_are_said_aloud(cache, tmp_path, capsys):
    assert trained(scenes(tmp_path/"data", 8), tmp_path/"run", "model.weights=none") == 0
    shown = capsys.readouterr().out
    assert "training starts from random weights (model.weights = none)" in shown
    assert "weights  random   # model.weights = none" in shown
