"""Trials on a real Ray cluster: two nodes (two raylets on this machine), one of which is killed on the way."""
import json
import os
import threading
from pathlib import Path

import pytest
from trial_helpers import is_gone, job, wait_for

from jetson_det.experiments import sweep_ray
from jetson_det.experiments.sweep_ray import RayTrials, _check_resource, _on_node
from jetson_det.runtime.files import InputError

QUICK = """import json, time
from pathlib import Path
from jetson_det.config import load_config, save_config
cfg = load_config(None, overrides)
out = Path(out)
with open(out/"pids", "a") as f: f.write(f"{__import__('os').getpid()}\\n")
table = out/"metrics.csv"
if not table.exists(): table.write_text("epoch,AP\\n")
if not resume: save_config(cfg, out/"config.yaml")
for epoch in range(len(table.read_text().splitlines()), cfg.train.epochs + 1):
    time.sleep(.25)
    with open(table, "a") as f: f.write(f"{epoch},{cfg.train.lr * epoch}\\n")
(out/"metrics.json").write_text(json.dumps({"AP": cfg.train.lr}))"""


def test_a_node_without_the_paths_says_which(tmp_path):
    out = tmp_path/"trials"/"0000"
    found = _on_node("", {}, str(out), "1", {"data": str(tmp_path/"photos")})
    assert "photos: not on " in found["wrong"] and "all nodes must see it" in found["wrong"]
    (tmp_path/"photos").mkdir()
    words = dict(data="", job="train", parameters={}, limit=0., grace=1.)
    found = _on_node("", {"train.epoch": 3}, str(out), "1", words)
    assert "did you mean 'train.epochs" in found["wrong"]


def test_what_no_cluster_could_give():
    for wanted, match in ((3, "a trial needs 3 CPUs, and the whole cluster has 2"), (-1, "0 or more")):
        with pytest.raises(InputError, match=match): _check_resource("CPU", wanted, {"CPU": 2.})


class Room:
    "In the place of `RayTrials`: what the clock asks of it."
    start_seconds = 100.

    def __init__(self, ours, all_of_it):
        self.begun = set()
        self.rooms = {True: ours, False: all_of_it}

    def has_room(self, held): return self.rooms[held]


@pytest.mark.parametrize("ours, all_of_it, given_up", [(True, True, 100), (True, False, 400), (False, False, None)])
def test_one_that_waits_in_a_full_cluster_has_not_hung(monkeypatch, tmp_path, ours, all_of_it, given_up):
    "Room for it: at once. Room but for what others may use: later. No room: never."
    now = [0.]
    monkeypatch.setattr(sweep_ray.time, "monotonic", lambda: now[0])
    clock = sweep_ray._Clock(Room(ours, all_of_it), "a", 0.)
    late = None
    while late is None and now[0] < 2000:
        now[0] += 10
        if clock.look(tmp_path): late = now[0]
    assert late == given_up or late == given_up + 10


def test_the_limit_counts_from_the_beginning(monkeypatch, tmp_path):
    now = [0.]
    monkeypatch.setattr(sweep_ray.time, "monotonic", lambda: now[0])
    clock = sweep_ray._Clock(Room(False, False), "a", 50.)
    now[0] = 1000.
    assert clock.look(tmp_path) == ""
    (tmp_path/".ray.json").write_text('{"attempt": "another"}')
    assert clock.look(tmp_path) == "" and not clock.trials.begun
    (tmp_path/".ray.json").write_text('{"attempt": "a"}')
    for now[0], late in ((1010., ""), (1050., ""), (1070., "it hung for 60 s")): assert clock.look(tmp_path) == late


def patiently(start):
    "Ray gives a node 30 seconds to start, which is short on a machine that is busy."
    for _ in range(3):
        try: return start()
        except Exception as e: last = e
    raise last


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray", reason="the ray extra is not installed")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster
    small = dict(num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
    cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=small))
    yield cluster, small
    import ray
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_dies_and_no_trial_is_lost(cluster, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    from jetson_det.experiments.sweep import run_sweep, sweep_trials
    from jetson_det.experiments.sweep_file import read_sweep
    from jetson_det.experiments.trial import epoch_rows
    cluster, small = cluster
    second = patiently(lambda: cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20))
    monkeypatch.chdir(tmp_path)
    path = Path(job(tmp_path, QUICK)).name
    text = f"search: {{train.lr: [0.01, 0.02, 0.03]}}\nset: {{train.epochs: 24}}\njob: {path}\n"
    (tmp_path/"s.yaml").write_text(text)
    sweep = read_sweep("s.yaml")
    sweep.job = str(tmp_path/path)
    out = tmp_path/"out"
    killed = []

    def kill_the_second():
        "When a trial on it has some epochs."
        def on_it():
            for file in out.glob("trials/*/.ray.json"):
                begun = json.loads(file.read_text())
                if begun["node"] == second.node_id and 2 <= len(epoch_rows(file.parent)) < 20: return file.parent
        wait_for(lambda: on_it() is not None, 400)
        killed.append(on_it())
        cluster.remove_node(second, allow_graceful=False)

    with RayTrials(cluster.address, cpus=1, gpus=0) as trials:
        assert trials.jobs == 2
        thread = threading.Thread(target=kill_the_second)
        thread.start()
        rows = run_sweep(sweep, out, jobs=trials.jobs, trial=trials, say=print)
        thread.join()
    assert [row["value"] for row in rows] == [.03, .02, .01] and {row["status"] for row in rows} == {"done"}
    for i in range(3): assert [r["epoch"] for r in epoch_rows(out/"trials"/f"{i:04d}")] == list(range(1, 25))
    again = json.loads((killed[0]/".ray.json").read_text())
    assert again["attempt"].startswith("1-") and again["node"] != second.node_id
    pids = [int(line) for line in (killed[0]/"pids").read_text().split()]
    assert len(pids) == 2 and all(map(is_gone, pids))
    assert {row["attempts"] for row in sweep_trials(out)} == {1}, "the books did not notice"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tasks_that_hang_are_submitted_again_and_bad_ones_are_ended(cluster, tmp_path):
    "The function of the task is a stand-in here."
    def task(config, overrides, out, attempt, kw):
        import json, os, time
        if overrides["hang"] and attempt.startswith("0-"): time.sleep(600)
        os.makedirs(out, exist_ok=True)
        with open(out + "/.ray.json", "w") as f: json.dump({"attempt": attempt}, f)
        if overrides["die"] and attempt.startswith("0-"): os.kill(os.getpid(), 9)
        with open(out + "/metrics.csv", "w") as f: f.write("epoch,AP\n1,0.25\n")
        end = time.monotonic() + 60
        while overrides["bad"] and time.monotonic() < end:
            time.sleep(.1)
            if not os.path.exists(out + "/.stop"): continue
            return dict(status="killed", reason="x", metrics={}, out=out, seconds=1., rows=())
        return dict(status="done", reason="", metrics={"AP": .5}, out=out, seconds=1., rows=())

    settings = dict(hang=False, die=False, bad=False)
    with RayTrials(cluster[0].address, gpus=0, start_seconds=15, function=task) as trials:
        for i, change in enumerate((dict(), dict(die=True), dict(hang=True))):
            result = trials("", {**settings, **change}, tmp_path/str(i))
            assert (result.status, result.metrics) == ("done", {"AP": .5})
        result = trials("", {**settings, "bad": True}, tmp_path/"bad", on_epoch=lambda row: "too low", grace=5)
        assert (result.status, result.reason) == ("stopped", "too low") and result.rows[0]["AP"] == .25
        trials.retries = 0
        result = trials("", {**settings, "die": True}, tmp_path/"dead")
        assert result.status == "killed" and "given up after 1 attempts: its node or its worker died" in result.reason


def test_an_address_where_no_cluster_is():
    pytest.importorskip("ray")
    with pytest.raises(InputError, match="no Ray cluster answers"): RayTrials("127.0.0.1:1")
