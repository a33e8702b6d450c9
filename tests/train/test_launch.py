"""Trainings in several processes, whole: resumed by another number, stopped, killed, under torchrun."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from process_helpers import FROZEN, gone, preload, rank_train, together
from signals import hear_ctrl_c
from train_helpers import EACH_STEP, QUICK, config, distance, result_of, scenes

from jetson_det.models.checkpoint import list_checkpoints, load_checkpoint, newest_whole
from jetson_det.train.launch import train_processes
from jetson_det.train.loop import train
from jetson_det.train.state import TrainingError

pytestmark = pytest.mark.usefixtures("one_thread")
slow = pytest.mark.slow
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")


@pytest.fixture(scope="module")
# 14 to train on (a short last batch), 4 to evaluate
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data"), 18)


@pytest.fixture(scope="module", autouse=True)
def preloaded(): preload()


def without(out, step):
    "Take the checkpoints after `step` away."
    import shutil
    for p in list_checkpoints(out):
        if int(p.name[5:]) > step: shutil.rmtree(p)


def test_resumed_by_another_number_of_processes(tmp_path, data):
    """2 -> 1 -> 2 processes, in the middle of an epoch both times: the steps are those of two throughout, and the
    weights to 1e-4 of the way."""
    import shutil
    cfg = config(data, *FROZEN, *EACH_STEP, "train.accumulate=1", "train.keep=100")
    out = tmp_path/"whole"
    again = tmp_path/"again"
    figures = train_processes(cfg, out, processes=2, start="forkserver")
    assert figures["steps"] == 8 and json.loads((out/"metrics.json").read_text()) == figures
    shutil.copytree(out, again)
    without(again, 2)
    train(cfg, again, resume=True)
    without(again, 5)
    resumed = train_processes(cfg, again, resume=True, processes=2, start="forkserver")
    assert resumed["steps"] == 8 and [p.name
                                      for p in list_checkpoints(again)] == [p.name for p in list_checkpoints(out)]
    first, one, two = (load_checkpoint(p)
                       for p in (list_checkpoints(out)[0], list_checkpoints(out)[-1], list_checkpoints(again)[-1]))
    state = lambda c: {
        "weights": {k: v.numpy()
                    for k, v in c.weights.items()}, "ema": {k: v.numpy()
                                                            for k, v in c.ema.items()}
    }
    assert distance(state(one), state(two), state(first)) < 1e-4 and one.state["step"] == two.state["step"] == 8
    rows = [result_of(f)["rows"] for f in (out, again)]
    assert [r["step"] for r in rows[0]] == ["4", "8"] and all(
        abs(float(a["loss"]) - float(b["loss"])) < 1e-3*float(a["loss"]) for a, b in zip(*rows))
    log = (again/"log.txt").read_text()
    assert log.count("devices  2") == 2 and log.count("devices  1") == 1 and log.count("epoch 2/2") == 3 and log.count(
        "those of the beginning") == 1
    assert json.loads((again/"resolved.json").read_text())["effective batch"]["value"] == 4


def test_all_stop_after_the_same_step(tmp_path, data):
    "A signal to the second process alone."
    out = tmp_path/"run"
    with pytest.raises(
            TrainingError,
            match="^stopped by SIGTERM after step 4 of 8; saved; go on with: jetson-det train --out .* --resume$"):
        together(rank_train, 2, config(data, *FROZEN, "train.accumulate=1"), str(out), "stop")
    assert newest_whole(out).name == "step-00000004"


def test_ranks_that_differ_are_an_error(tmp_path, data):
    with pytest.raises(TrainingError, match="^after step 4 the weights of process 1 differ from those of process 0"):
        together(rank_train, 2, config(data, *FROZEN, "train.accumulate=1"), str(tmp_path/"run"), "drift")


@slow
def test_killed_in_the_middle_and_resumed(tmp_path, data):
    "With loader workers; nothing is left, the checkpoint is whole."
    out = tmp_path/"run"
    cfg = config(data, *FROZEN, *EACH_STEP, "train.accumulate=1", "data.workers=1")
    with pytest.raises(TrainingError, match="^process 1 was ended by SIGKILL"):
        together(rank_train, 2, cfg, str(out), "kill")
    assert gone([int((tmp_path/f"run.{r}").read_text()) for r in (0, 1)])
    assert newest_whole(out).name in ("step-00000003", "step-00000002")
    assert train(cfg, out, resume=True)["steps"] == 8


PARENT = """
import sys
sys.path[:0] = [{tests!r}]
from process_helpers import *
from train_helpers import EACH_STEP, config
from jetson_det.train.state import TrainingError
if __name__ == "__main__":
    cfg = config({data!r}, *FROZEN, *EACH_STEP, "train.epochs=500", "train.eval_every=500")
    try: launch(rank_train, 2, cfg, {out!r}, "nothing", start="forkserver")
    except TrainingError as e: sys.exit(f"error: {{e}}")
"""


@slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_ends_all_and_so_does_the_end_of_the_parent(tmp_path, data, number):
    (tmp_path/"parent.py").write_text(
        PARENT.format(tests=str(Path(__file__).parents[1]),
                      data=str(data),
                      out=str(tmp_path/"run")))
    parent = subprocess.Popen([sys.executable, tmp_path/"parent.py"],
                              stderr=subprocess.PIPE,
                              stdout=subprocess.DEVNULL,
                              text=True,
                              preexec_fn=hear_ctrl_c)
    end = time.monotonic() + 90
    while not list_checkpoints(tmp_path/"run") and time.monotonic() < end and parent.poll() is None: time.sleep(.05)
    pids = [int((tmp_path/f"run.{r}").read_text()) for r in (0, 1)]
    parent.send_signal(number)
    assert parent.wait(20) == (1 if number == signal.SIGINT else -9) and gone(pids, 8) and newest_whole(tmp_path/"run")
    if number == signal.SIGINT:
        assert parent.stderr.read().strip().splitlines()[-1].startswith("error: stopped by SIGINT after step")
    parent.stderr.close()


@slow
@pytest.mark.parametrize("fault, code, words", [
    ([], 0, ""), (["model.name=yolox-nan"], 1, "did you mean 'yolox-nano'")
])
def test_torchrun(tmp_path, data, fault, code, words):
    call = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
        "jetson_det.train", f"data.path={data}", *QUICK, *FROZEN, *fault, "--out",
        str(tmp_path/"run")
    ]
    done = subprocess.run(call, capture_output=True, text=True, timeout=90)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("error: unknown model") == bool(fault) and words in done.stderr
    if not fault:
        assert (tmp_path/"run"/"log.txt").read_text().count("epoch 2/2") == 1 and done.stdout.count("epoch 2/2") == 1


# ---- nobody else

MAIN = "import sys; from jetson_det.cli import main; sys.exit(main())"


def listening(process):
    "Where the processes of a training listen."
    found = []
    for p in (process, *process.children(recursive=True)):
        try: found += [c.laddr.ip for c in p.net_connections("inet") if c.status == "LISTEN"]
        except psutil.NoSuchProcess: pass
    return found


def saved_once(out, process, limit=90):
    end = time.monotonic() + limit
    while not list_checkpoints(out) and process.poll() is None and time.monotonic() < end: time.sleep(.05)
    assert list_checkpoints(out)


def test_nothing_listens_on_a_network(tmp_path, data):
    """While two processes train, as `--gpus 2` starts them; the folder in which they meet is the user's alone. Ctrl-C
    ends all of them."""
    call = [sys.executable, "-c", MAIN, "train", "--gpus", "2", "--out", str(tmp_path/"run"), f"data.path={data}",
            *QUICK, *FROZEN, *EACH_STEP, "train.epochs=500", "train.eval_every=500", "train.trackers=[]",
            "data.workers=1"]
    meeting = tmp_path/"meeting"
    meeting.mkdir()
    environment = {**os.environ, "TMPDIR": str(meeting), "GLOO_SOCKET_IFNAME": "", "MASTER_ADDR": "0.0.0.0"}
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
                               preexec_fn=hear_ctrl_c)
    try:
        saved_once(tmp_path/"run", process)
        found = listening(psutil.Process(process.pid))
        folders = [p for p in meeting.iterdir() if p.name.startswith("jetson_det-")]
        children = [p.pid for p in psutil.Process(process.pid).children(recursive=True)]
        assert len(children) >= 2 and found and set(found) <= set(LOOPBACK)
        assert len(folders) == 1 and folders[0].stat().st_mode & 0o077 == 0
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 1 and errors.strip().splitlines()[-1].startswith("stopped by SIGINT after step")
        assert not list(meeting.glob("jetson_det-*")) and gone(children, 8) and newest_whole(tmp_path/"run")
    finally:
        process.kill()
        process.communicate()
