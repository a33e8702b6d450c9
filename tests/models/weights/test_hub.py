"The Hugging Face hub: the real huggingface_hub against a server that cuts, lies, refuses and is not there."
import hashlib
import json
import os
import random
import shutil
import time

import pytest

torch = pytest.importorskip("torch")
huggingface_hub = pytest.importorskip("huggingface_hub")
import huggingface_hub.constants  # noqa: E402,F811
safetensors = pytest.importorskip("safetensors.torch")

from jetson_det.downloads import DownloadError  # noqa: E402
from jetson_det.models.weights import download  # noqa: E402
from jetson_det.models.weights.download import fetch_hub, is_hub_name  # noqa: E402
from jetson_det.runtime.files import InputError  # noqa: E402
from servers import HubSite  # noqa: E402

NAME = "someone/model"
CONFIG = json.dumps({"model_type": "rt_detr"}).encode()
WEIGHTS = safetensors.save({"a": torch.arange(150_000.)})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub with one model, a cache of its own, and no waiting."
    for name in ("JETSON_DET_MIRROR", "JETSON_DET_OFFLINE", "HF_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY",
                 "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    site = HubSite({f"{NAME}/config.json": CONFIG, f"{NAME}/model.safetensors": WEIGHTS})
    monkeypatch.setenv("HF_ENDPOINT", site.base)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path/"token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path/"hub"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None) # the module `time` is one for all
    yield site
    site.close()


def gets(hub): return len(hub.paths)


def test_whole_then_kept_then_offline(hub, monkeypatch, capfd):
    folder = fetch_hub(NAME)
    assert (folder/"config.json").read_bytes() == CONFIG and (folder/"model.safetensors").read_bytes() == WEIGHTS
    assert folder.name == hub.commit and gets(hub) == 2 and len(hub.heads) == 2
    assert capfd.readouterr().err == "" # no bars where nobody watches
    assert fetch_hub(NAME) == folder and gets(hub) == 2 and len(hub.heads) == 2 # nobody is asked
    hub.close()
    assert fetch_hub(NAME, offline=True) == folder
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch_hub(NAME) == folder


def test_a_cut_connection_goes_on(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 50_000) # what is kept of a break
    hub.steps = [{}, {"cut": 200_000}, {"cut": 200_000, "ignores_if_range": True}, {"ignores_if_range": True}]
    folder = fetch_hub(NAME)
    assert (folder/"model.safetensors").read_bytes() == WEIGHTS and hub.asked == [0, 0, 200_000, 400_000]


def test_always_cut_is_one_line(hub):
    hub.steps = [{}, {"cut": 0}]
    with pytest.raises(DownloadError, match=f"{NAME}: .* not to be had from the hub: ") as e: fetch_hub(NAME)
    assert "\n" not in str(e.value)
    hub.steps = [{"ignores_if_range": True}]
    assert (fetch_hub(NAME)/"model.safetensors").read_bytes() == WEIGHTS


def test_bytes_that_are_not_what_the_hub_says(hub):
    wrong = bytearray(WEIGHTS)
    wrong[-5] ^= 1
    hub.files[f"{NAME}/model.safetensors"] = bytes(wrong)
    with pytest.raises(DownloadError, match="model.safetensors: its sha256 is [0-9a-f]{64}, and the hub says "):
        fetch_hub(NAME)
    hub.files[f"{NAME}/model.safetensors"] = WEIGHTS
    assert (fetch_hub(NAME)/"model.safetensors").read_bytes() == WEIGHTS # nothing wrong was kept


def test_a_file_that_rotted_in_the_cache_is_fetched_again(hub):
    path = fetch_hub(NAME)/"model.safetensors"
    data = bytearray(WEIGHTS)
    data[-5] ^= 1
    path.resolve().write_bytes(data)
    lines = []
    assert (fetch_hub(NAME, say=lines.append)/"model.safetensors").read_bytes() == WEIGHTS and gets(hub) == 3
    assert "is not used: its sha256" in lines[0]
    path.resolve().write_bytes(data)
    with pytest.raises(InputError, match="nothing is downloaded offline"): fetch_hub(NAME, offline=True)


@pytest.mark.parametrize("variable", ["JETSON_DET_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_without_it_says_what_to_put_where(hub, monkeypatch, tmp_path, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(InputError, match="nothing is downloaded offline") as e: fetch_hub(NAME)
    for part in (str(tmp_path/"hub"), f"hf download {NAME}", "config.json and model.safetensors"):
        assert part in str(e.value)
    assert "\n" not in str(e.value) and gets(hub) == 0 == len(hub.heads)


def test_a_missing_repository(hub):
    says = "no such file or folder here, .*no such repository, or a private one.*HF_TOKEN"
    with pytest.raises(DownloadError, match=says): fetch_hub("someone/none")


def test_a_repository_without_the_file(hub):
    hub.files = {"someone/pickled/config.json": CONFIG, "someone/pickled/pytorch_model.bin": b"x"}
    hub.hashes = dict.fromkeys(hub.files, "0"*40)
    with pytest.raises(DownloadError, match="it has no config.json or no model.safetensors"):
        fetch_hub("someone/pickled")


@pytest.mark.parametrize("status, code, says", [
    (401, "GatedRepo", "accept their terms at https://huggingface.co/someone/model, then set HF_TOKEN"),
    (403, "GatedRepo", "accept their terms at https://huggingface.co/someone/model, then set HF_TOKEN"),
    (403, None, "403: the hub refuses it; set HF_TOKEN"),
    (401, None, "HF_TOKEN"),
])
def test_gated_and_forbidden(hub, status, code, says):
    hub.refusals[NAME] = (status, code)
    with pytest.raises(DownloadError, match=says) as e: fetch_hub(NAME)
    assert "\n" not in str(e.value) and gets(hub) == 0


def test_the_token_is_sent(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    fetch_hub(NAME)
    assert set(hub.tokens) == {"Bearer hf_abc"}


def test_nobody_there(hub):
    hub.close()
    with pytest.raises(DownloadError, match="not to be had from the hub: .*[Rr]efused") as e: fetch_hub(NAME)
    assert "\n" not in str(e.value)


def test_a_page_of_a_guest_network(hub):
    hub.head = lambda h: (h.send_response(200), h.send_header("Content-Type", "text/html"), h.end_headers())
    with pytest.raises(DownloadError, match="X-Repo-Commit"): fetch_hub(NAME)


def test_a_mirror_folder(hub, tmp_path, monkeypatch):
    shelf = tmp_path/"shelf"/NAME
    shutil.copytree(fetch_hub(NAME), shelf)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path/"other"))
    monkeypatch.setenv("JETSON_DET_MIRROR", str(tmp_path/"shelf"))
    assert fetch_hub(NAME, offline=True) == shelf
    with pytest.raises(InputError, match="no such folder"): fetch_hub(NAME, mirror=str(tmp_path/"gone"))
    assert os.path.samefile(download.locate(NAME), shelf)


def test_load_weights_from_the_hub(hub, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from jetson_det.models.detr.network import detr_classes
    from jetson_det.models.detr.sizes import SIZES
    from jetson_det.models.weights.load import load_weights
    from jetson_det.models.zoo import create_model
    monkeypatch.chdir(tmp_path)
    size = SIZES["dfine-n"]
    Config, Whole = detr_classes(size.kind)
    config = Config(backbone_config=dict(size.backbone), **size.settings, id2label={0: "sack", 1: "person"},
                    label2id={"sack": 0, "person": 1})
    Whole(config).save_pretrained(tmp_path/"saved")
    for file in ("config.json", "model.safetensors"):
        data = (tmp_path/"saved"/file).read_bytes()
        hub.files[f"someone/dfine/{file}"] = data
        hub.hashes[f"someone/dfine/{file}"] = hashlib.sha256(data).hexdigest()
    hub.steps = [{}, {"cut": 1_000_000}, {"ignores_if_range": True}]
    report = load_weights(create_model("dfine-n", ["Person", "sack"]), "someone/dfine")
    assert (report.kind, report.carried, report.missing) == ("hub", ("Person", "sack"), ())


def test_a_cut_safetensors_is_seen(tmp_path):
    safetensors.save_file({"a": torch.arange(100.)}, tmp_path/"a.safetensors", {"names": "[]"})
    whole = (tmp_path/"a.safetensors").read_bytes()
    assert download._broken(tmp_path/"a.safetensors") == ""
    for data, words in ((whole[:-1], "cut off"), (whole[:40], "cut off within"), (whole + b"x", "cut off"),
                        (b"<html>", "web page"), (random.Random(0).randbytes(100), "no safetensors")):
        (tmp_path/"a.safetensors").write_bytes(data)
        assert words in download._broken(tmp_path/"a.safetensors")


def test_what_is_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"runs").mkdir()
    for text, is_one in {
            "PekingU/rtdetr_r18vd": True, "ustc-community/dfine-nano-coco": True, "a/b.pth": False, "runs/best": False,
            "a": False, "a/b/c": False, "../b": False, "a/..": False, "http://a/b": False
    }.items():
        assert is_hub_name(text) is is_one, text
