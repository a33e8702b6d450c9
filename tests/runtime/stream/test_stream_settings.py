"""Pipelines from files: what is refused and where, the environment, relative paths, and what is left open."""
import json
import os
import sys
import warnings

import cv2
import numpy as np
import pytest

from jetson_det.runtime.contract import Contract
from jetson_det.runtime.files import InputError
from jetson_det.runtime.geometry import as_detections
from jetson_det.runtime.stream import settings as module
from jetson_det.runtime.stream.pipeline import Pipeline
from jetson_det.runtime.stream.settings import check_settings, open_pipeline, read_settings


class White:
    "A session that finds the white box."
    contract = Contract("yolox", "white", ("box", "person"), (64, 64), output="yolox")
    confidence = .25
    iou = .45

    def __call__(self, frame):
        ys, xs = np.nonzero(frame[..., 0] > 128)
        if not len(xs): return as_detections()
        return as_detections([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]], [.9], [0])


@pytest.fixture
def folder(tmp_path):
    "Twelve images in which a white box moves to the right."
    (tmp_path / "images").mkdir()
    for k in range(12):
        image = np.zeros((64, 96, 3), np.uint8)
        image[20:40, 5 * k:5 * k + 20] = 255
        cv2.imwrite(str(tmp_path / "images" / "{:02d}.png".format(k)), image)
    return tmp_path


def opened(folder, **changed):
    settings = dict({"source": "images", "model": "m.onnx", "outputs": [{"jsonl": "found.jsonl"}]}, **changed)
    return open_pipeline(settings, folder, lambda path: White())


def lines(folder): return [json.loads(line) for line in (folder / "found.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("given, says", [
    ([], "a pipeline is a mapping"),
    (None, "a pipeline is a mapping"),
    ({"source": 0}, "model is needed"),
    ({"model": "m"}, "source is needed"),
    ({"source": 0, "model": "m", "regoins": []}, "regoins: unknown key; did you mean 'regions'?"),
    ({"source": 0, "model": "m", "xyz": 1}, "it is one of"),
    ({"source": 0, "model": "m", "tracker": {"bufer": 3}}, "tracker.bufer: unknown key; did you mean 'buffer'?"),
    ({"source": 0, "model": "m", "every": True}, "every must be a whole number"),
    ({"source": 0, "model": "m", "every": 2.5}, "every must be a whole number"),
    ({"source": 0, "model": "m", "confidence": float("nan")}, "confidence must be a number"),
    ({"source": True, "model": "m"}, "source must be text or a whole number"),
    ({"source": 0, "model": "m", "tracker": [1]}, "tracker must be a mapping"),
    ({"source": 0, "model": "m", "cascade": {"on": ["car"]}}, "cascade.model is needed"),
    ({"source": 0, "model": "m", 3: 4}, "3: unknown key"),
])
def test_what_is_refused(given, says):
    with pytest.raises(InputError) as e: check_settings(given)
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("changed, says", [
    ({"confidence": 1.5}, "confidence is 1.5"),
    ({"every": 0}, "every is 0"),
    ({"area": [[0, 0], [1, 1]]}, "area: 2 points"),
    ({"area": "all"}, "area must be a list"),
    ({"motion": {"share": 0}}, "motion: share is 0"),
    ({"tracker": {"buffer": -1}}, "tracker: buffer is -1"),
    ({"regions": [{"name": "z", "zone": [[0, 0], [1, 0], [1, 1]]}]}, "need a tracker"),
    ({"tracker": True, "regions": [{"name": "z", "zone": [[0, 0], [1, 0], [1, 1]], "labels": ["dog"]}]}, "'dog'"),
    ({"cascade": {"model": "m", "on": ["dog"]}}, "no class 'dog'"),
    ({"cascade": {"model": "m", "most": 0}}, "cascade: most is 0"),
    ({"tiles": {"size": 64, "overlap": 2}}, "overlap"),
    ({"privacy": {"texts": "hide"}}, "privacy.texts"),
    ({"privacy": {"blur": ["dog"]}}, "dog"),
    ({"outputs": [{"paper": "a"}]}, "outputs[0]: unknown kind 'paper'"),
    ({"source": "nothing"}, "no such image"),
    ({"source": "rtsp://a:${JD_NO_SUCH}@b/"}, "JD_NO_SUCH is not set"),
])
def test_what_is_refused_when_it_is_opened(folder, changed, says):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # of small tiles
        with pytest.raises(InputError) as e: opened(folder, **changed)
    assert says in str(e.value) and "\n" not in str(e.value)
    assert not (folder / "found.jsonl").exists() or not (folder / "found.jsonl").read_text()


def test_paths_begin_at_the_folder_of_the_file(folder, monkeypatch):
    (folder / "p.json").write_text(json.dumps({"source": "images", "model": "m.onnx", "outputs": [
        {"jsonl": "found.jsonl"}]}))
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(str(folder / "elsewhere"))
    asked = []
    def open_model(path, **options):
        asked.append(path)
        return White()
    summary = open_pipeline(read_settings("../p.json"), "..", open_model).run()
    assert (summary.frames, summary.looked, summary.results) == (12, 12, 12)
    assert [line["frame"] for line in lines(folder)] == list(range(12))
    assert os.path.samefile(os.path.dirname(asked[0]), str(folder)) and asked[0].endswith("m.onnx")


def test_the_environment_is_filled_in(folder, monkeypatch):
    monkeypatch.setenv("JD_FOLDER", "images")
    assert opened(folder, source="${JD_FOLDER}").run().frames == 12


def test_a_model_may_come_from_outside(folder):
    (folder / "p.json").write_text('{"source": "images"}')
    assert read_settings(folder / "p.json", "/a/m.onnx")["model"] == "/a/m.onnx"
    with pytest.raises(InputError, match="model is needed"): read_settings(folder / "p.json")


def test_json_needs_no_yaml(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (folder / "p.yaml").write_text('{"source": 0, "model": "m.onnx"}')
    assert read_settings(folder / "p.yaml")["source"] == 0
    (folder / "p.yaml").write_text("source: 0\nmodel: m.onnx\n")
    with pytest.raises(InputError, match="pyyaml"): read_settings(folder / "p.yaml")


@pytest.mark.parametrize("data, says", [
    (b"\xff\xfe\x00", "not UTF-8"), (b"source: [1\nmodel: a", "is not YAML"), (b"a: !!python/object:os.system {}",
                                                                              "is not YAML"),
    (b" " * ((1 << 20) + 1), "over 1 MB"), (b"", "a mapping"), (b"- 1", "a mapping")])
def test_files_that_are_none(folder, data, says):
    if "YAML" in says or says == "a mapping": pytest.importorskip("yaml", reason="PyYAML is not installed")
    (folder / "p.yaml").write_bytes(data)
    with pytest.raises(InputError) as e: read_settings(folder / "p.yaml")
    assert says in str(e.value) and "\n" not in str(e.value) and "p.yaml" in str(e.value)


def test_the_source_is_closed_when_outputs_are_wrong(folder, monkeypatch):
    closed = []
    usual = module.open_frames
    def watched(source, live=None):
        frames = usual(source, live)
        close = frames.close
        def note():
            closed.append(1)
            close()
        frames.close = note
        return frames
    monkeypatch.setattr(module, "open_frames", watched)
    with pytest.raises(InputError): opened(folder, outputs=[{"jsonl": {"path": str(folder / "no" / "such" / "x")}},
                                                            {"view": {"port": -3}}])
    assert closed


class Gaps:
    "A camera that lost frames."
    name, live, fps = "gaps", False, 10

    def __init__(self, indices): self.indices = indices
    def __iter__(self):
        for k in self.indices: yield np.zeros((64, 96, 3), np.uint8), k, 100 + k / 10
    def close(self): pass


def test_every_counts_from_the_last_look():
    "Of a camera whose odd frames were dropped, every third frame is not only every sixth."
    beats = []
    pipeline = Pipeline(Gaps(range(1, 40, 2)), White(), every=3, heartbeat=lambda: beats.append(1))
    found = [result.index for result in pipeline]
    assert found == list(range(1, 40, 4)) and len(beats) == 20
