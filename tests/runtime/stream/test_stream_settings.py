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
    with pytest.raises(InputError, match="p.yaml: reading YAML takes PyYAML"): read_settings(folder / "p.yaml")


@pytest.mark.parametrize("data, says", [
    (b"\xff\xfe\x00", "not UTF-8"), (b"source: [1\nmodel: a", "line 2: not valid YAML"),
    (b"a: !!python/object:os.system {}", "not valid YAML"), (b"[" * 5000, "not valid YAML"),
    (b"source: a\nevery: 1\nevery: 5", "the key 'every' stands here and in line 2"),
    (b" " * ((1 << 20) + 1), "over 1 MB"), (b"", "a mapping"), (b"- 1", "a mapping")])
def test_files_that_are_none(folder, data, says):
    if "UTF-8" not in says and "MB" not in says: pytest.importorskip("yaml", reason="PyYAML is not installed")
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


@pytest.mark.parametrize("data, says", [
    (b'{"source": 0, "source": 1}', "the key 'source' stands there twice"), (b"[" * 100000, "nested too deep"),
    (b'{"source": 0', "not valid JSON")])
def test_json_files_that_are_none(folder, data, says):
    (folder / "p.json").write_bytes(data)
    with pytest.raises(InputError) as e: read_settings(folder / "p.json")
    assert says in str(e.value) and "p.json" in str(e.value)


def test_yes_no_and_on_are_texts(folder):
    "YAML 1.1 took `on` for true, and Norway for false."
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    (folder / "p.yaml").write_text("source: a\nmodel: m\ncascade: {model: n, on: [person]}\n"
                                   "plates: {ocr: o, country: NO}\nlive: false\n")
    settings = read_settings(folder / "p.yaml")
    assert settings["cascade"]["on"] == ["person"] and settings["plates"]["country"] == "NO"
    assert settings["live"] is False


@pytest.mark.parametrize("changed, says", [
    ({"source": ""}, "source is empty"), ({"live": True}, "live: a film or folder has an end"),
    ({"area": [0, 0, 1, 0, 1, 1]}, "a list of points"), ({"area": [[0, 0], [1, 1], [1, 0], [0, 1]]}, "crosses itself"),
    ({"confidence": float("inf")}, "confidence must be a number"),
    ({"outputs": [{"video": {"folder": "v", "fps": float("inf")}}]}, "fps must be a number"),
    ({"outputs": [{"jsonl": "a"}, {"jsonl": {"path": "./a"}}]}, r"outputs\[1\].jsonl: writes the same files"),
    ({"outputs": [{"video": "v"}, {"video": {"folder": "v"}}]}, r"outputs\[1\].video: writes the same files"),
    ({"outputs": [{"jsonl": "m.onnx"}]}, "is read here"),
    ({"outputs": [{"jsonl": "images/03.png"}]}, "is a file of .*images, which is read here"),
    ({"outputs": [{"jsonl": "notes.txt"}]}, "something else than JSON lines"),
    ({"tracker": True, "regions": [{"name": "a", "line": [[0, 0], [1, 1]], "labels": [99]}]}, "no class number 99"),
    ({"tracker": True, "regions": [{"name": "a", "line": [[0, 0], [1, 1]], "labels": []}]}, "labels is empty")])
def test_what_would_go_wrong_later_is_refused(folder, changed, says):
    (folder / "m.onnx").write_bytes(b"a model")
    (folder / "notes.txt").write_text("name,phone\nAnna,123\nBob,4")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(InputError, match=says): opened(folder, **changed)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in before} == before


def test_the_file_is_named_in_every_error(folder):
    (folder / "p.json").write_text('{"source": "images", "model": "m.onnx", "every": 0}')
    with pytest.raises(InputError, match="p.json: every is 0"):
        module.open_pipeline_file(folder / "p.json", open_model=lambda path: White())
    (folder / "p.json").write_text('{"source": "images", "model": "m.onnx", "outputs": [{"jsonl": "p.json"}]}')
    with pytest.raises(InputError, match="p.json: is read here"):
        module.open_pipeline_file(folder / "p.json", open_model=lambda path: White())


def test_rows_name_the_images_of_a_folder_and_those_that_could_not_be_read(folder):
    (folder / "images" / "04.png").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="04.png"): summary = opened(folder).run()
    assert [row["file"] for row in lines(folder)] == ["{:02d}.png".format(k) for k in range(12) if k != 4]
    assert summary.unreadable == ("04.png",) and "could not be read: 04.png" in str(summary)


def test_a_film_of_every_third_frame_is_as_long_as_the_source(folder):
    frames = module.open_frames(str(folder / "images"))
    assert module._film_rate(frames.fps, {}) is None
    assert module._film_rate(30, {"every": 3}) == 10 and module._film_rate(30, {"every": 3, "tracker": {}}) == 30


def test_hashed_plates_are_blurred_in_films(folder, monkeypatch):
    class Reader:
        labels = [1]
        def __call__(self, image, detections, ids): return None
    monkeypatch.setattr(module, "read_plates", lambda settings, classes, folder: Reader())
    outputs = [{"video": "film"}, {"jsonl": "found.jsonl"}]
    for texts, blurred in (("keep", ()), ("drop", ("person",)), ("hash", ("person",))):
        privacy = {"texts": texts, "key_file": "key"} if texts == "hash" else {"texts": texts}
        pipeline = opened(folder, plates={"ocr": "o"}, privacy=privacy, outputs=outputs)
        assert [sink.privacy.blur for sink in pipeline.outputs] == [blurred] * 2
        for sink in pipeline.outputs: sink.close()


def test_threads_within_reason(folder):
    from jetson_det.runtime.sessions import load_onnx
    pytest.importorskip("onnxruntime")
    from jetson_det.runtime.ops.check_network import write_check_network
    path = write_check_network(folder)
    for threads in (0, -3, 5000):
        with pytest.raises(InputError, match="threads is {}; it must be from 1 to".format(threads)):
            load_onnx(path, threads, ["CPUExecutionProvider"])
