"""The table of runs: states, damage, the index, copies and moves, several processes, what goes back to `estimate`."""
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jetson_det.config import Config, save_config
from jetson_det.core import InputError
from jetson_det.experiments import registry
from jetson_det.experiments.registry import find_run, list_runs, write_calibration
from jetson_det.runtime.files import write_json_atomic
from jetson_det.train.run_folder import flat_config, hold_run, journal, run_holder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_run(run, ap=.3, epochs=2, done=True, started="2026-11-28T10:00:00+0000", **changes):
    "The text files of a training."
    (run / "best").mkdir(parents=True)
    cfg = Config()
    cfg.data.path = "docks"
    cfg.train.epochs = 4
    for key, value in changes.items():
        section, name = key.split("__")
        setattr(getattr(cfg, section), name, value)
    save_config(cfg, run / "config.yaml")
    write_json_atomic(run / "environment.json", {"started": started, "settings": flat_config(cfg)})
    rows = [f"{k + 1},{10. * (k + 1)},{ap}\n" for k in range(epochs)]
    (run / "metrics.csv").write_text("epoch,seconds,AP\n" + "".join(rows))
    manifest = {"files": {"weights.safetensors": {"sha256": f"{run.name:x>64}"}}}
    write_json_atomic(run / "best" / "manifest.json", manifest)
    journal(run, "began")
    if done:
        write_json_atomic(run / "metrics.json", {"seconds": 75., "artifact": str(run / "best"),
                                                 "val": {"stats": {"AP": ap, "AP50": ap + .1}}})
    return run


def states(runs): return {row.name: row.state for row in runs}


def test_states(tmp_path):
    make_run(tmp_path / "runs" / "done")
    make_run(tmp_path / "runs" / "killed", done=False)
    for event in ("stopped", "failed"):
        run = make_run(tmp_path / "runs" / event, done=False)
        journal(run, event, why="GPU on fire")
    resumed = make_run(tmp_path / "runs" / "resumed and killed", done=False)
    journal(resumed, "stopped", why="SIGTERM")
    journal(resumed, "resumed")
    runs = list_runs(tmp_path / "runs")
    assert states(runs) == {"done": "done", "killed": "torn", "stopped": "stopped", "failed": "failed",
                            "resumed and killed": "torn"}
    assert runs.run("failed").note == "GPU on fire" and "failed: failed: GPU on fire" in runs.text()
    assert runs.run("killed").note == "after epoch 2" and runs.run("killed").AP == .3


def test_a_run_of_another_process_is_running_until_that_is_killed(tmp_path):
    run = make_run(tmp_path / "runs" / "a", done=False)
    code = ("import sys, time\nfrom jetson_det.train.run_folder import hold_run\n"
            f"with hold_run({str(run)!r}):\n    print('held', flush=True)\n    time.sleep(100)")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        row = list_runs(tmp_path / "runs")[0]
        assert (row.state, row.note) == ("running", f"process {process.pid}")
        with pytest.raises(InputError, match=str(process.pid)):
            with hold_run(run): pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert list_runs(tmp_path / "runs")[0].state == "torn"


def test_to_look_takes_no_lock_from_this_process(tmp_path):
    run = make_run(tmp_path / "runs" / "a", done=False)
    (tmp_path / "link").symlink_to(run)
    code = f"from jetson_det.train.run_folder import run_holder; print(run_holder({str(run)!r}))"
    with hold_run(run):
        assert list_runs(tmp_path / "runs")[0].state == "running"
        assert run_holder(tmp_path / "link") == os.getpid() # by another name
        seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert int(seen) == os.getpid()


def test_an_interval_that_is_stored_is_shown(tmp_path):
    run = make_run(tmp_path / "a")
    rows = [{"name": "AP50", "value": .5, "low": .4, "high": .6}, {"name": "AP", "value": .3, "low": .25, "high": .34}]
    write_json_atomic(run / "metrics.json", {"val": {"stats": {"AP": .3}, "intervals": {"stats": rows}}})
    row = list_runs(tmp_path)[0]
    assert (row.low, row.high) == (.25, .34) and "0.300 (0.250 to 0.340)" in list_runs(tmp_path).text()


def test_nested_linked_and_single_runs(tmp_path):
    runs = tmp_path / "runs"
    make_run(runs / "sweep" / "trials" / "trial-1")
    make_run(runs / "a" / "b" / "c" / "d")
    make_run(runs / "a" / "b" / "c" / "e" / "too deep")
    make_run(tmp_path / "elsewhere" / "far")
    (runs / "latest").symlink_to(runs / "sweep" / "trials" / "trial-1")
    (runs / "far").symlink_to(tmp_path / "elsewhere" / "far")
    (runs / "circle").symlink_to(runs)
    (runs / "broken").symlink_to(tmp_path / "nowhere")
    assert {row.name for row in list_runs(runs)} == {"sweep/trials/trial-1", "a/b/c/d", "far"}
    single = list_runs(runs / "sweep" / "trials" / "trial-1")
    assert [row.name for row in single] == ["trial-1"] and single.others == ()
    assert find_run("far", runs)[1].path == runs / "far"
    assert find_run(str(runs / "a/b/c/d"), tmp_path / "nowhere")[1].name == "d"
    with pytest.raises(InputError, match="did you mean 'far'"): find_run("fra", runs)


def test_nothing_foreign_or_damaged_is_a_traceback(tmp_path):
    runs = tmp_path / "runs"
    make_run(runs / "whole")
    for name, file, content in (
        ("yaml", "config.yaml", b"train: ["), ("binary", "config.yaml", b"\xff\xfe\x00"),
        ("json", "metrics.json", b"{"), ("list", "metrics.json", b"[1, 2]"),
        ("environment", "environment.json", b"[]"), ("tags", "tags.json", b"{}"),
        ("table", "metrics.csv", b"epoch,AP\n1,x\n\xff\xfe,\x00\n"), ("deep", "metrics.json", b"[" * 9999),
        ("journal", "journal.jsonl", b"3\nnull\n{\"event\": 7}\n[]\n"), ("infinite", "metrics.json",
         b'{"seconds": 1e999, "val": {"stats": {"AP": NaN}}}'), ("manifest", "best/manifest.json", b'{"files": 3}'),
    ):
        run = make_run(runs / name, done=False)
        (run / file).write_bytes(content)
        if file == "config.yaml": (run / "environment.json").unlink()
    (runs / "hydra").mkdir()
    (runs / "hydra" / "config.yaml").write_text("defaults: [_self_]\nmodel: resnet\n")
    (runs / "folder").mkdir()
    (runs / "folder" / "config.yaml").mkdir()
    (runs / "pipe").mkdir()
    os.mkfifo(runs / "pipe" / "config.yaml")
    (runs / "empty").mkdir()
    (runs / "notes.txt").touch()
    found = list_runs(runs)
    by_state = states(found)
    assert {name for name, state in by_state.items() if state == "damaged"} == {
        "yaml", "binary", "json", "environment", "tags", "deep", "folder", "pipe"}
    assert by_state["hydra"] == "foreign" and by_state["whole"] == "done" and by_state["manifest"] == "torn"
    assert all(found.run(name).note and "\n" not in found.run(name).note for name in ("yaml", "json", "pipe", "deep"))
    assert str(runs) not in found.run("yaml").note
    assert found.others == (("empty", "is empty"), )
    assert len(found.text(0).split("\n")) == len(set(found.text(0).split("\n")))
    json.dumps(found.to_dict(), allow_nan=False)
    for row in found: assert row.AP is None or row.AP == row.AP


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.sampled_from(["config.yaml", "environment.json", "metrics.csv", "metrics.json", "journal.jsonl",
                             "tags.json", "best/manifest.json", "bench.json"]),
       value=st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
                          lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
                              ["val", "stats", "AP", "settings", "model.name", "train.epochs", "tags", "files",
                               "event", "why", "intervals", "stages", "inference", "p50", "total", "on_device",
                               "input_size", "seconds"]),
                              inner, max_size=4), max_leaves=12),
       cut=st.integers(0, 400), is_cut=st.booleans())
def test_any_content_of_a_file_is_a_row(tmp_path, file, value, cut, is_cut):
    run = tmp_path / "runs" / "a"
    shutil.rmtree(run, ignore_errors=True)
    make_run(run)
    text = (run / file).read_bytes()[:cut] if is_cut and (run / file).exists() else json.dumps(value).encode()
    (run / file).write_bytes(text)
    runs = list_runs(tmp_path / "runs", with_index=False)
    assert len(runs) == 1 and runs[0].state in registry.STATES
    json.dumps(runs.to_dict(), allow_nan=False)
    assert "a" in runs.text() and runs._repr_html_() is not None and runs.to_csv()


def test_names_that_are_not_utf8_and_pages(tmp_path):
    name = os.fsdecode(b"caf\xe9 \x1b[31m<b>")
    try: make_run(tmp_path / "runs" / name, model__name="yolox-nano")
    except (OSError, UnicodeError): pytest.skip("this file system takes no such name")
    for _ in range(2): # the second time from the index
        runs = list_runs(tmp_path / "runs")
        assert runs[0].name == name and runs[0].state == "done"
        text = runs.text()
        assert "\x1b" not in text and text.isascii() and "<b>" not in runs._repr_html_()
    write_json_atomic(tmp_path / "figures.json", runs.to_dict())


def test_the_index_saves_reading_and_follows_every_change(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    for name in "abc": make_run(runs / name)
    read = []
    whole = registry._facts
    monkeypatch.setattr(registry, "_facts", lambda folder: read.append(folder.name) or whole(folder))
    list_runs(runs)
    first = list_runs(runs)
    assert sorted(read) == ["a", "b", "c"] and first.to_dict() == list_runs(runs, with_index=False).to_dict()
    read.clear()
    write_json_atomic(runs / "a" / "metrics.json", {"val": {"stats": {"AP": .9}}})
    (runs / "b").rename(runs / "moved")
    shutil.rmtree(runs / "c")
    found = list_runs(runs)
    assert sorted(read) == ["a", "moved"] and found.run("a").AP == .9 and set(states(found)) == {"a", "moved"}
    read.clear()
    assert set(states(list_runs(runs))) == {"a", "moved"} and not read


@pytest.mark.parametrize("content", [b"", b"no database at all" * 99, None])
def test_a_damaged_index_is_made_anew(tmp_path, cache, content):
    make_run(tmp_path / "runs" / "a")
    before = list_runs(tmp_path / "runs").to_dict()
    index, = (cache / "runs").glob("*.sqlite")
    data = index.read_bytes()
    index.write_bytes(data[:4096] + b"\x99" * 3000 + data[7096:] if content is None else content)
    for _ in range(2): assert list_runs(tmp_path / "runs").to_dict() == before


def test_without_a_place_for_the_index(tmp_path, monkeypatch):
    make_run(tmp_path / "runs" / "a")
    (tmp_path / "file").touch()
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path / "file"))
    assert list_runs(tmp_path / "runs").run("a").state == "done"


def test_many_processes_at_once(tmp_path, cache):
    for k in range(30): make_run(tmp_path / "runs" / f"run-{k}")
    results = []

    def look():
        for _ in range(4): results.append(len(list_runs(tmp_path / "runs")))

    threads = [threading.Thread(target=look) for _ in range(6)]
    code = ("from jetson_det.experiments.registry import list_runs\n"
            f"for _ in range(8): assert len(list_runs({str(tmp_path / 'runs')!r})) == 30")
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert [process.wait() for process in others] == [0, 0] and results == [30] * 24
    assert len(list((cache / "runs").glob("*.sqlite"))) == 1


def test_a_copy_says_what_it_is_a_copy_of(tmp_path):
    runs = tmp_path / "runs"
    make_run(runs / "dock")
    shutil.copytree(runs / "dock", runs / "a copy")
    found = list_runs(runs)
    assert found.run("a copy").copy_of == "dock" and found.run("dock").copy_of == ""
    assert "a copy: a copy of dock" in found.text()


def test_conditions_and_order(tmp_path):
    for name, ap, epochs, tags in (("a", .1, 5, []), ("b", .5, 10, ["good"]), ("c", None, 20, ["good", "night"])):
        run = make_run(tmp_path / name, ap=ap or 0, train__epochs=epochs)
        if ap is None:
            for file in ("metrics.csv", "metrics.json"): (run / file).unlink()
        write_json_atomic(run / "tags.json", {"tags": tags})
    runs = list_runs(tmp_path)

    def names(*conditions): return sorted(row.name for row in runs.where(*conditions))

    assert names("AP>.1") == ["b"] and names("AP>=.1") == ["a", "b"] and names("AP<=.1") == ["a"]
    assert names("train.epochs>=10", "tag=good") == ["b", "c"] and names("tag!=night") == ["a", "b"]
    assert names("state=torn") == ["c"] and names("data~DOCK") == ["a", "b", "c"] and names("planned!=5") == ["b", "c"]
    assert names("train.nothing=1") == []
    assert [row.name for row in runs.by("-AP")] == ["b", "a", "c"] == [row.name for row in runs.by("-AP").by("-AP")]
    assert [row.name for row in runs.by("train.epochs")] == ["a", "b", "c"]
    for wrong, message in (("AP", "COLUMN=VALUE"), ("app>1", "did you mean 'AP'"), ("tag>1", "=, != and ~")):
        with pytest.raises(InputError, match=message): runs.where(wrong)
    with pytest.raises(InputError, match="no column"): runs.by("apple pie")


def test_csv_holds_no_formula(tmp_path):
    make_run(tmp_path / "=cmd()")
    rows = list(csv.DictReader(io.StringIO(list_runs(tmp_path).to_csv())))
    assert rows[0]["name"] == "'=cmd()" and float(rows[0]["AP"]) == .3


def bench_figures(name="yolox-nano", ms=20., engine="TensorRT 8.2.1.8", board="nano", precision="fp16", **more):
    "As `bench --json` on a board, or the benchmark job."
    bench = {"model": name, "input_size": [416, 416], "stages": {"inference": {"p50": ms}, "total": {"p50": 2 * ms}},
             "measured_on": {"device": "a board"}}
    device = {"board": board, "power_mode": "MAXN", "engine": engine, "bench": bench}
    return {**bench, "artifact": "best.engine", "precision": precision, "on_device": device, **more}


def test_benches_find_their_run(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    make_run(runs / "dock")
    make_run(runs / "gate")
    write_json_atomic(runs / "dock" / "bench.json", bench_figures())
    flat = bench_figures(artifact="runs/gate/best.onnx")
    device = flat["on_device"]
    job = {"artifact": flat["artifact"], "sha256": "0", "bench": device["bench"], "device": device}
    write_json_atomic(Path(runs / "benchmark").mkdir() or runs / "benchmark" / "metrics.json", job)
    manifest = list_runs(runs).run("gate").manifest
    by_digest = {**job, "artifact": "/somewhere/else/best", "sha256": manifest}
    write_json_atomic(Path(runs / "digest").mkdir() or runs / "digest" / "metrics.json", by_digest)
    write_json_atomic(Path(runs / "stranger").mkdir() or runs / "stranger" / "metrics.json", {**job, "artifact": "x"})
    found = list_runs(runs)
    assert {bench.file: bench.run for bench in found.benches} == {
        "dock/bench.json": "dock", "benchmark/metrics.json": "gate", "digest/metrics.json": "gate",
        "stranger/metrics.json": ""}
    assert found.others == () and {row.name for row in found} == {"dock", "gate"}


def test_measured_rows_move_the_estimate(tmp_path):
    from jetson_det.export.estimate import calibrate, estimate
    before = estimate("yolox-m", "nano", "fp16", "MAXN", input_size=(640, 640))
    for name in ("yolox-nano", "yolox-tiny"):
        run = make_run(tmp_path / "runs" / name)
        slow = 1.5 * estimate(name, "nano", "fp16", "MAXN", input_size=(416, 416)).ms
        write_json_atomic(run / "bench.json", bench_figures(name, slow))
    run = tmp_path / "runs" / "yolox-nano"
    write_json_atomic(run / "desk.json", bench_figures(board=""))
    write_json_atomic(run / "ort.json", bench_figures(engine="ONNX Runtime"))
    write_json_atomic(run / "unknown.json", bench_figures(precision=""))
    write_json_atomic(run / "own.json", bench_figures("my-net"))
    written = write_calibration(list_runs(tmp_path / "runs"), tmp_path / "measured.json")
    assert (written.board, written.mode, written.rows) == ("nano", "MAXN", 2) and len(written.left_out) == 4
    calibration = calibrate(tmp_path / "measured.json")
    after = estimate("yolox-m", "nano", "fp16", "MAXN", calibration=calibration, input_size=(640, 640))
    assert calibration.shift == pytest.approx(1.5, rel=.02) and after.ms > 1.2 * before.ms
    with pytest.raises(InputError, match="no time of a board to calibrate with"):
        write_calibration(list_runs(tmp_path / "runs"), tmp_path / "x.json", "orin-nano")
    write_json_atomic(run / "orin.json", bench_figures(board="orin-nano"))
    with pytest.raises(InputError, match="nano MAXN and|nano MAXN, orin-nano MAXN"):
        write_calibration(list_runs(tmp_path / "runs"), tmp_path / "x.json")


@pytest.mark.slow
def test_ten_thousand_runs(tmp_path):
    "Ten thousand in seconds, the second time by the index."
    import time
    first = make_run(tmp_path / "first")
    environment = json.loads((first / "environment.json").read_text())
    for k in range(10000):
        run = tmp_path / "runs" / f"group-{k // 500}" / f"run-{k}"
        (run / "best").mkdir(parents=True)
        for name in ("config.yaml", "metrics.csv", "metrics.json", "journal.jsonl"): os.link(first / name, run / name)
        os.link(first / "best" / "manifest.json", run / "best" / "manifest.json")
        (run / "environment.json").write_text(json.dumps(dict(environment, number=k)))
    spent = []
    for _ in range(2):
        start = time.process_time()
        runs = list_runs(tmp_path / "runs")
        spent.append(time.process_time() - start)
        assert len(runs) == 10000 and all(row.state == "done" for row in runs)
    print(f"10,000 runs: {spent[0]:.1f} s of processor time the first time, {spent[1]:.1f} s by the index")
    assert spent[0] < 60 and spent[1] < 10
