"""Tags, stages, two runs side by side, the way from data to engine, and MLflow."""
import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from registry_helpers import make_run, write_checkpoint

from jetson_det.config import Config, save_config
from jetson_det.core import InputError
from jetson_det.experiments.registry import list_runs, read_promotions
from jetson_det.experiments.registry_compare import compare_runs, run_story
from jetson_det.experiments.registry_mlflow import export_mlflow, mlflow_run
from jetson_det.experiments.registry_stages import (promote, rollback_stage, stage_checkpoint, stage_history, tag_run)
from jetson_det.runtime.contract import preset
from jetson_det.runtime.files import sha256_bytes, write_json_atomic
from jetson_det.train.run_folder import flat_config, hold_run, journal


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path / "cache"))


def test_tags(tmp_path):
    run = make_run(tmp_path / "runs" / "dock")
    assert tag_run(run, ["b", "a", "lr=.01"]) == ("a", "b", "lr=.01")
    assert tag_run(run, ["c"], ["b"]) == ("a", "c", "lr=.01")
    assert list_runs(tmp_path / "runs").run("dock").tags == ("a", "c", "lr=.01")
    for wrong in ("", "two words", "-x", "x" * 61, "a,b", "a\nb"):
        with pytest.raises(InputError, match="a word of at most 60"): tag_run(run, [wrong])
    with pytest.raises(InputError, match="has no tag 'd'"): tag_run(run, remove=["d"])
    with pytest.raises(InputError, match="not the folder of a run"): tag_run(tmp_path, ["a"])
    (run / "tags.json").write_text("[1]")
    with pytest.raises(InputError, match="holds no list of tags"): tag_run(run, ["a"])


def test_tags_of_many_at_once_are_all_kept(tmp_path):
    run = make_run(tmp_path / "dock")
    code = ("import sys\nfrom jetson_det.experiments.registry_stages import tag_run\n"
            f"for k in range(6): tag_run({str(run)!r}, ['process-%s-%d' % (sys.argv[1], k)])")
    others = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]

    def tag_often(name):
        for k in range(6): tag_run(run, [f"thread-{name}-{k}"])

    threads = [threading.Thread(target=tag_often, args=(name, )) for name in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert [process.wait() for process in others] == [0, 0]
    assert len(json.loads((run / "tags.json").read_text())["tags"]) == 30


def test_a_running_training_can_be_tagged(tmp_path):
    run = make_run(tmp_path / "dock")
    with hold_run(run): assert tag_run(run, ["promising"]) == ("promising", )


def test_promote_and_roll_back(tmp_path):
    runs = tmp_path / "runs"
    for name, ap in (("a", .3), ("b", .4), ("c", .5)): make_run(runs / name, ap)
    first = promote(runs, "production", "a")
    second = promote(runs, "production", runs / "b" / "best", "better\nat night")
    third = promote(runs, "production", "c")
    promote(runs, "test", "a")
    assert (second.run, second.AP, second.note, second.before) == ("b", .4, "better at night", first.number)
    assert second.weights == sha256_bytes(b"b") and list_runs(runs).run("a").stages == ("test", )
    shutil.rmtree(runs / "c") # the copy stays
    checkpoint = stage_checkpoint(runs, "production")
    assert (checkpoint / "weights.safetensors").read_bytes() == b"c" and third.checkpoint in str(checkpoint)
    shutil.rmtree(runs / "b")
    assert rollback_stage(runs, "production").run == "b" and rollback_stage(runs, "production", "no").run == "a"
    assert (stage_checkpoint(runs, "production") / "weights.safetensors").read_bytes() == b"a"
    with pytest.raises(InputError, match="nothing to go back to"): rollback_stage(runs, "production")
    assert [one.action for one in stage_history(runs, "production")] == ["rolled back"] * 2 + ["promoted"] * 3
    assert len(stage_history(runs)) == 6 and set(os.listdir(runs)) >= {"stages.json", "promoted", "a"}
    promote(runs, "production", runs / "promoted" / sha256_bytes(b"c")[:16])
    assert (stage_checkpoint(runs, "production") / "weights.safetensors").read_bytes() == b"c"


def test_what_is_promoted_is_whole_or_nothing_changes(tmp_path):
    runs = tmp_path / "runs"
    run = make_run(runs / "a")
    (run / "best" / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="altered"): promote(runs, "production", "a")
    shutil.rmtree(run / "best")
    with pytest.raises(InputError, match="neither a checkpoint"): promote(runs, "production", "a")
    for name, message in (("b", "no run 'b'"), (tmp_path / "nothing", "no run")):
        with pytest.raises(InputError, match=message): promote(runs, "production", name)
    for stage in ("", "a b", "1", "x" * 41, "../x"):
        with pytest.raises(InputError, match="a word such as production"): promote(runs, stage, "a")
    assert not (runs / "stages.json").exists() and not (runs / "promoted").exists()
    with pytest.raises(InputError, match="nothing was promoted yet"): stage_checkpoint(runs, "production")
    with pytest.raises(InputError, match="no such folder"): promote(tmp_path / "nowhere", "production", "a")


def test_other_weights_never_stand_in(tmp_path):
    runs = tmp_path / "runs"
    make_run(runs / "a")
    one = promote(runs, "production", "a")
    shutil.rmtree(runs / "promoted")
    write_checkpoint(runs / "a" / "best", b"of a resumed training")
    with pytest.raises(InputError, match="not here any more"): stage_checkpoint(runs, "production")
    make_run(runs / "moved", weights=b"a")
    assert stage_checkpoint(runs, "production") == (runs / "moved" / "best").resolve()
    write_checkpoint(runs / one.checkpoint, b"z" * 20) # sealed, and another one
    assert stage_checkpoint(runs, "production") == (runs / "moved" / "best").resolve()


@pytest.mark.parametrize("content", ["{", "[]", '{"promotions": [{"number": 2}]}', '{"promotions": {}}'])
def test_a_damaged_history_is_one_line(tmp_path, content):
    runs = tmp_path / "runs"
    make_run(runs / "a")
    (runs / "stages.json").write_text(content)
    with pytest.raises(InputError, match="stages.json"): promote(runs, "production", "a")
    assert (runs / "stages.json").read_text() == content
    found = list_runs(runs)
    assert found[0].state == "done" and found.others[0][0] == "stages.json"


def test_many_promote_at_once(tmp_path):
    runs = tmp_path / "runs"
    for k in range(6): make_run(runs / f"run-{k}")
    threads = [threading.Thread(target=promote, args=(runs, "production", f"run-{k}")) for k in range(6)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    history = read_promotions(runs)
    assert [one.number for one in history] == [1, 2, 3, 4, 5, 6]
    assert [one.before for one in history] == [0, 1, 2, 3, 4, 5]
    assert {one.run for one in history} == {f"run-{k}" for k in range(6)}


def test_two_runs_side_by_side(tmp_path):
    make_run(tmp_path / "a", .3, clip=0.)
    make_run(tmp_path / "b", .35, clip=10., data="other docks")
    runs = list_runs(tmp_path)
    found = compare_runs(runs.run("a"), runs.run("b"))
    assert [(change.key, change.a, change.b) for change in found.settings] == [("train.clip", 0., 10.)]
    assert [change.key for change in found.made_with] == ["data.path", "host"] and found.same_data is False
    assert ("AP on val", .3, .35) in found.figures and "their data differ" in repr(found)
    json.dumps(found.to_dict(), allow_nan=False)
    same = compare_runs(runs.run("a"), runs.run("a"))
    assert same.settings == [] and "the settings are the same" in repr(same) and same.same_data
    (tmp_path / "b" / "metrics.json").write_text("{")
    with pytest.raises(InputError, match="damaged"): compare_runs(runs.run("a"), list_runs(tmp_path).run("b"))


def test_from_the_data_to_the_engine(tmp_path):
    from onnx import TensorProto, helper, save
    from jetson_det.runtime.contract import METADATA_KEY
    run = make_run(tmp_path / "runs" / "dock", data=str(tmp_path))
    weights = sha256_bytes(b"dock")
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    for name, made_from in (("best", weights), ("old", "0" * 64), ("foreign", None)):
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [info],
                                  [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
        model = helper.make_model(graph)
        if made_from:
            contract = preset("yolox", ("Sack", ), (416, 416))._replace(made_from=made_from)
            helper.set_model_props(model, {METADATA_KEY: contract.to_json()})
        save(model, run / f"{name}.onnx")
    (run / "broken.onnx").write_bytes(b"not an ONNX")
    (run / "best.engine").write_bytes(b"plan")
    stages = {"inference": {"p50": 5.}, "total": {"p50": 7.}}
    write_json_atomic(run / "bench.json", {"artifact": "best.onnx", "stages": stages})
    runs = list_runs(tmp_path / "runs")
    story = run_story(runs.run("dock"), runs.benches)
    assert [(link.kind, link.agrees) for link in story.links] == [
        ("data", None), ("training", None), ("weights", True), ("export", True), ("export", False), ("export", None),
        ("export", False), ("engine", None), ("measured", None)]
    assert story.links[2].sha256 == weights and "9 images, 30 boxes" in story.links[0].text
    text = repr(story)
    assert "made from other weights: export it again" in text and "network 5.00 ms" in text
    json.dumps(story.to_dict(), allow_nan=False)


def test_what_mlflow_is_told(tmp_path):
    make_run(tmp_path / "dock")
    tag_run(tmp_path / "dock", ["good", "camera:3"])
    told = mlflow_run(list_runs(tmp_path)[0])
    assert told.status == "FINISHED" and told.params["train.epochs"] == "100" and told.end_ms - told.start_ms == 9500
    assert ("val/AP", .3, 20) in told.metrics and ("train/loss", 3.5, 10) in told.metrics
    assert all(np.isfinite(value) for _, value, _ in told.metrics) # what is not is left out
    assert told.tags["tag.camera_3"] == "camera:3" and told.tags["jetson_det.weights_sha256"] == sha256_bytes(b"dock")


def test_without_mlflow_there_is_one_line(tmp_path, monkeypatch):
    make_run(tmp_path / "dock")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InputError, match=r"jetson_det\[mlflow\]"): export_mlflow(list_runs(tmp_path))


@pytest.mark.slow
def test_mlflow_reads_what_was_exported(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (the extra jetson_det[mlflow])")
    runs = tmp_path / "runs"
    make_run(runs / "dock", .3, clip=10.)
    make_run(runs / "gate", .4)
    tag_run(runs / "gate", ["good"])
    killed = make_run(runs / "killed")
    (killed / "metrics.json").unlink()
    (make_run(runs / "damaged") / "config.yaml").write_text("x: [")
    (runs / "damaged" / "environment.json").unlink()
    first = export_mlflow(list_runs(runs))
    assert (first.written, first.there, [name for name, _ in first.left_out]) == (3, 0, ["damaged"])
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{(runs / 'mlflow.db').resolve()}")
    experiment = client.get_experiment_by_name("jetson_det")

    def stored(): return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}

    found = stored()
    assert {name: run.info.status for name, run in found.items()} == {
        "dock": "FINISHED", "gate": "FINISHED", "killed": "KILLED"}
    assert found["dock"].data.params["train.clip"] == "10.0" and found["gate"].data.metrics["final/val/AP"] == .4
    curve = client.get_metric_history(found["dock"].info.run_id, "train/loss")
    assert [(point.step, point.value) for point in curve] == [(10, 3.5)]
    gate = found["gate"]
    assert gate.data.tags["tag.good"] == "good" and gate.info.end_time - gate.info.start_time == 9500
    tag_run(runs / "dock", ["late"])
    (runs / "dock").rename(runs / "moved")
    write_json_atomic(killed / "metrics.json", {"seconds": 20., "val": {"stats": {"AP": .45}}})
    second = export_mlflow(list_runs(runs))
    assert (second.written, second.brought_up, second.there) == (0, 1, 2)
    found = stored()
    assert len(found) == 3 and found["killed"].info.status == "FINISHED"
    assert found["dock"].data.tags["tag.late"] == "late"
    with pytest.raises(InputError, match="^mlflow at "):
        export_mlflow(list_runs(runs), f"sqlite:///{runs}/mlflow.db/in-a-file.db")
