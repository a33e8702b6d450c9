"""Campaigns: ways through a plan, kills at any moment, changed plans, the page; and the shipped plans as rehearsals."""
import json
import multiprocessing
import os
import random
import re
import signal
import time

import pytest
from campaign_helpers import PLAN, World, seal
from train_helpers import installed

from jetson_det.core import InputError
from jetson_det.experiments import campaign as module
from jetson_det.experiments.campaign import CampaignFailed, plan_campaign, run_campaign
from jetson_det.experiments.trial import TrialResult
from jetson_det.scenes.docks import write_scenes


def failed(reason, status="failed"): return TrialResult(status, reason, {}, None, 1.)


def test_yes_ends_at_once(tmp_path):
    world = World(tmp_path, first=1.)
    result = world.run()
    assert (result.end, result.phase, world.trained) == ("deploy", "first", ["baseline", "first"])
    assert world.finished == ["deploy"]
    assert result.figures["decisions"][-1]["answer"] == "yes"


def test_no_goes_on(tmp_path):
    result = World(tmp_path, first=.5, light=.8).run()
    answers = [one["answer"] for one in result.figures["decisions"]]
    assert (result.end, answers) == ("deploy light", ["then", "no", "yes"])


def test_not_shown_is_the_cautious_way_and_is_said(tmp_path):
    world = World(tmp_path, first=.9, light=.75)
    result = world.run()
    assert result.end == "keep" and result.phase == "baseline"
    assert [one["answer"] for one in result.figures["decisions"]] == ["then", "not shown", "not shown"]
    text = "\n".join(world.lines)
    assert "does not say where `not shown` leads: taken as no" in text
    assert "would decide: about" in text
    assert "would decide: about" in str(result)


def test_a_watch_ends_a_phase(tmp_path):
    world = World(tmp_path)
    world.rows["first"] = [{"epoch": 1, "loss": 2.}, {"epoch": 2, "loss": float("nan")}]
    result = world.run()
    decision = result.figures["decisions"][1]
    assert (decision["answer"], decision["to"]) == ("stopped", "light")
    assert "epoch 2: loss is nan" in decision["text"]
    assert result.figures["phases"]["first"]["status"] == "stopped"
    world.run()
    assert world.trained == ["baseline", "first", "light"] # a stopped phase is not tried again
    world.plan.write_text(PLAN.replace("watch: [no NaN]", "watch: [memory <= 18 GB]")) # but under other watches
    assert [one["answer"] for one in world.run().figures["decisions"]][:2] == ["then", "no"]
    assert world.trained == ["baseline", "first", "light", "first"]


def test_a_training_that_ends_itself_over_nan(tmp_path):
    world = World(tmp_path)
    world.results["first"] = failed("job train: LossNotFinite: the loss is not finite in epoch 3")
    assert world.run().figures["decisions"][1]["answer"] == "stopped"
    other = World(tmp_path/"b" if (tmp_path/"b").mkdir() is None else None)
    other.results["first"] = failed("job train: the GPU is lost")
    with pytest.raises(CampaignFailed, match="phase first failed: job train: the GPU is lost"): other.run()


def test_a_failed_phase_goes_on(tmp_path):
    world = World(tmp_path, first=1.)
    world.results["first"] = failed("a disk is full", "killed")
    with pytest.raises(CampaignFailed, match="same command goes on"): world.run()
    assert "Not at its end yet" in (tmp_path/"out"/"campaign.html").read_text()
    del world.results["first"]
    assert world.run().end == "deploy"
    assert world.trained == ["baseline", "first", "first"]


class Killed(BaseException): "Stands for kill -9 at a moment."


def killing(write, at, is_after):
    "As `write`; the process ends before or after the state's write of that number."
    left = [at]

    def writing(path, value):
        if path.name != module.STATE: return write(path, value)
        if is_after or left[0]: write(path, value)
        left[0] -= 1
        if left[0] < 0: raise Killed
    return writing


def test_a_kill_at_every_write(tmp_path, monkeypatch):
    "The process ends just before or just after each write of the state; each time the same command goes on."
    world = World(tmp_path, first=.9, light=.75)
    monkeypatch.setattr(module, "write_report", lambda *args: None) # the page is drawn after the last write
    write = module.write_json_atomic
    moments = [(at, is_after) for at in range(40) for is_after in (False, True)]
    for at, is_after in moments:
        monkeypatch.setattr(module, "write_json_atomic", killing(write, at, is_after))
        try: world.run()
        except Killed: continue
        break # it came to its end before that write
    monkeypatch.setattr(module, "write_json_atomic", write)
    result = world.run()
    assert at > 2 and result.end == "keep"
    # a phase is started anew only where the kill came before it was written down that it is done
    assert set(world.trained) == {"baseline", "first", "light"} and len(world.trained) <= 9
    whole = World(tmp_path/"whole" if (tmp_path/"whole").mkdir() is None else None, first=.9, light=.75).run()
    def told(result): return [line for line in result.lines if "page:" not in line and "/" not in line]
    assert told(whole) == told(result)


def test_a_real_kill(tmp_path):
    "kill -9 at random moments, five times; then the campaign comes to its end as if nothing had been."
    world = World(tmp_path, first=.9, light=.75, pause=.15)
    seal(tmp_path/"warm", 1) # torch is loaded before the processes are forked
    rng = random.Random(0)
    kills = 0
    for _ in range(5):
        process = multiprocessing.get_context("fork").Process(target=world.run)
        process.start()
        process.join(rng.uniform(.05, .8))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        state = tmp_path/"out"/"campaign.json"
        if state.exists(): json.loads(state.read_text())
    assert kills > 1
    result = world.run()
    assert result.end == "keep" and all(one["status"] == "done" for one in result.figures["phases"].values())
    starts = (tmp_path/"starts.txt").read_text().split()
    world.run()
    assert (tmp_path/"starts.txt").read_text().split() == starts


def test_one_at_a_time(tmp_path):
    world = World(tmp_path)
    trial = world.trial
    lines = []

    def second(*args, **more):
        with pytest.raises(InputError, match="at work in this run"): world.run()
        lines.append(1)
        return trial(*args, **more)
    world.run(trial=second)
    assert lines


def test_changed_plans(tmp_path):
    world = World(tmp_path, first=.9, light=.75)
    world.run()
    world.plan.write_text(PLAN.replace("train.lr: 0.011", "train.lr: 0.02"))
    with pytest.raises(InputError, match="phase first ran with other settings: train.lr 0.011 -> 0.02"): world.run()
    with pytest.raises(InputError, match="train.seed 0 -> 3"): world.run(overrides={"train.seed": 3})
    world.plan.write_text(PLAN)
    others = write_scenes(tmp_path/"others", 30, size=(96, 160), splits={"train": .5, "val": .5}, hard=0., seed=3)
    with pytest.raises(InputError, match="images and labels"): world.run(data=str(others))
    # a gate that was changed is asked anew; nothing is trained again
    world.plan.write_text(PLAN.replace("AP >= 0.9\n", "AP >= 0.5\n"))
    result = world.run()
    assert (result.end, world.trained) == ("deploy", ["baseline", "first", "light"])
    assert [one["phase"] for one in result.figures["decisions"]] == ["baseline", "first"]
    # an end that asks for something else is done again
    world.plan.write_text(PLAN.replace("AP >= 0.9\n", "AP >= 0.5\n").replace("deploy: {board: orin-nano}",
                                                                            "deploy: {board: nano}"))
    world.run()
    assert world.finished == ["keep", "deploy", "deploy"]


def test_what_is_in_the_way(tmp_path):
    world = World(tmp_path)
    (tmp_path/"out").mkdir()
    (tmp_path/"out"/"mine.txt").write_text("x")
    with pytest.raises(InputError, match="holds mine.txt and no campaign"): world.run()
    assert not world.trained
    (tmp_path/"out"/"mine.txt").unlink()
    (tmp_path/"out"/"campaign.json").write_text("[]")
    with pytest.raises(InputError, match="not the state of a campaign"): world.run()


def test_wrong_calls_come_before_the_first_phase(tmp_path):
    world = World(tmp_path)
    with pytest.raises(InputError, match="a campaign needs images"): world.run(toy=False, data="")
    with pytest.raises(InputError, match="no such file or folder"): world.run(data=str(tmp_path/"gone"))
    world.plan.write_text(PLAN.replace("AP >= 0.9\n", "AP of Truck >= 0.9\n"))
    with pytest.raises(InputError, match="no class 'Truck': it is one of Sack, Person"): world.run()
    world.plan.write_text(PLAN.replace("{train: {}, then: first}", "{checkpoint: gone, then: first}"))
    with pytest.raises(InputError, match="cannot take a checkpoint"): world.run()
    assert not world.trained


def test_a_baseline_that_is_there(tmp_path):
    old = f"{{checkpoint: {tmp_path}/old/baseline/best, then: first}}"
    world = World(tmp_path, PLAN.replace("{train: {}, then: first}", old), first=.5)
    with pytest.raises(InputError, match="no such folder"): world.run(toy=False)
    seal(tmp_path/"old"/"baseline"/"best", 5)
    result = world.run(toy=False)
    assert "baseline" not in world.trained and result.figures["phases"]["baseline"]["status"] == "done"
    assert result.end == "deploy light"
    seal(tmp_path/"old"/"baseline"/"best2", 6)
    os.rename(tmp_path/"old"/"baseline"/"best", tmp_path/"old"/"baseline"/"gone")
    os.rename(tmp_path/"old"/"baseline"/"best2", tmp_path/"old"/"baseline"/"best")
    with pytest.raises(InputError, match="phase baseline ran with other settings: checkpoint"):
        world.run(toy=False)


def test_parity_that_fails(tmp_path):
    world = World(tmp_path, first=1.)

    def finish(*args): return {**World.finish(world, *args), "parity": {"ok": False, "lines": ["boxes moved"]}}
    result = world.run(finish=finish)
    assert not result.ok and "PARITY FAILED" in str(result)
    assert "do not deploy it" in (tmp_path/"out"/"campaign.html").read_text()


def test_the_page(tmp_path):
    plan = PLAN.replace("name: a plan", "name: <script>alert(1)</script>").replace("train: {}, then",
                                                                                  "train: {}, why: <b>x, then")
    world = World(tmp_path, plan, first=.9, light=.75)
    world.run()
    page = (tmp_path/"out"/"campaign.html").read_text()
    assert "<script" not in page and "<b>x" not in page and "&lt;script&gt;" in page
    addresses = re.findall(r"(?:src|href)=\"(.{5})", page)
    assert addresses and set(addresses) == {"data:"} and "url(" not in page
    assert 'alt="Decision tree of 3 phases and 3 ends. The way that was taken: baseline -&gt; first' in page
    assert "2 gates at 90%: the chance of at least one wrong yes is up to 10%" in page
    assert "It does not cover the seed" in page and "rehearsal" in page
    stored = json.loads((tmp_path/"out"/"result.json").read_text())
    assert stored["end"] == "keep" and len(stored["test"]) == 4
    json.dumps(world.run().figures, allow_nan=False)


def test_a_dry_run_trains_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path, PLAN.replace("resamples: 100", "board: orin-nano").replace(
        "AP >= baseline - 0.05", "[AP >= baseline - 0.05, time <= 0.5 * baseline]"))
    before = sorted(tmp_path.rglob("*"))
    lines, figures = plan_campaign(world.plan, toy=True, machine="rtx-4090", say=world.lines.append)
    assert sorted(tmp_path.rglob("*")) == before
    text = "\n".join(lines)
    assert "train.lr: null -> 0.011" in text and "forecast from the architecture: no: time <= 0.5 * baseline: " in text
    assert "12 images of val" in text and figures["images"] == 12
    with pytest.raises(InputError, match="unknown machine"):
        plan_campaign(world.plan, toy=True, machine="abacus", say=world.lines.append)


REAL = """\
name: real trainings
phases:
  first: {train: {train.epochs: 12}, then: second, stopped: nothing}
  second: {train: {train.epochs: 6}, watch: [AP > 0.99 by epoch 2], gate: AP >= first, yes: keep, no: keep}
ends:
  keep: {artifact: first, board: orin-nano}
  nothing: {artifact: none}
toy:
  scenes: 24
  settings:
    data: {input_size: [96, 96], workers: 0}
    model.weights: none
    augment.multiscale: 0
    train: {batch_size: 2, lr: 0.01, warmup_epochs: 1, no_aug_epochs: 2, eval_every: 1, ema_tau: 20, report: false}
    export.confidence: 0.001
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_training_is_killed_and_watched(tmp_path):
    """kill -9 in the middle of a real training: it goes on from its checkpoint, and no epoch is done twice. The second
    phase is ended by its watch after two epochs of six."""
    plan = tmp_path/"plan.yaml"
    plan.write_text(REAL)
    table = tmp_path/"out"/"phases"/"first"/"metrics.csv"
    process = multiprocessing.get_context("fork").Process(target=run_campaign, args=(plan, tmp_path/"out"),
                                                          kwargs={"toy": True})
    process.start()
    end = time.monotonic() + 240
    while not (table.exists() and len(table.read_text().splitlines()) > 3) and time.monotonic() < end: time.sleep(.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = len(table.read_text().splitlines()) - 1
    assert 3 <= before < 12
    assert json.loads((tmp_path/"out"/"campaign.json").read_text())["phases"]["first"]["status"] == "running"
    result = run_campaign(plan, tmp_path/"out", toy=True)
    epochs = [line.split(",")[0] for line in table.read_text().splitlines()[1:]]
    assert epochs == [str(epoch) for epoch in range(1, 13)]
    second = result.figures["phases"]["second"]
    assert second["status"] == "stopped" and "AP > 0.99 by epoch 2" in second["reason"]
    assert len((tmp_path/"out"/"phases"/"second"/"metrics.csv").read_text().splitlines()) < 7
    assert result.end == "keep" and result.ok
    print(before, "epochs before the kill;", second["reason"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["jetson_nano", "p2_small_objects", "rtdetr_1080p"])
def test_shipped_plans_rehearsed(tmp_path, name):
    "Real trainings of seconds, real figures, export for the board and parity."
    needs = {"p2_small_objects": "yolo11n-p2", "rtdetr_1080p": "rtdetr-r18"}.get(name)
    if needs and not installed(needs): pytest.skip("a package is missing")
    start = time.perf_counter()
    result = run_campaign(name, tmp_path/"out", toy=True)
    print(f"{name}: {time.perf_counter() - start:.0f} s")
    print(result)
    assert result.ok and (tmp_path/"out"/"deploy"/"model.onnx").is_file()
    assert (tmp_path/"out"/"campaign.html").stat().st_size > 10_000
    trained = [path for path in (tmp_path/"out"/"phases").iterdir()]
    again = run_campaign(name, tmp_path/"out", toy=True)
    assert again.lines == result.lines and len(trained) == len(list((tmp_path/"out"/"phases").iterdir()))
