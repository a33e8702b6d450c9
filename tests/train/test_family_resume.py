"""Train = train + kill -9 + resume for each family, bit for bit; and a disk that is full."""
import random
import subprocess
import time

import pytest
from train_helpers import (
    EACH_STEP,
    FAMILIES,
    PACKAGES,
    QUICK,
    command_in_child,
    config,
    each_family,
    family_words,
    forkserver,
    in_a_save,
    installed,
    killed_when,
    result_of,
    scenes,
    small_detrs,
)

from jetson_det.train.state import TrainingError
from jetson_det.models.checkpoint import list_checkpoints, newest_whole, verify_checkpoint
from jetson_det.train.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")
# 18 images: 5 steps an epoch, the last of one micro-batch; a checkpoint after each
RUN = ["data.input_size=[64,96]", "train.epochs=2", "augment.multiscale=0", "train.trackers=[]", *EACH_STEP]


@pytest.fixture(scope="module")
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data"), 24)


@pytest.fixture
def small(monkeypatch): small_detrs(monkeypatch.setitem)


@pytest.fixture(scope="module")
def child():
    "Starts `jetson-det` in a process of its own; the modules are imported once."
    context = forkserver()
    def start(*args):
        process = context.Process(target=command_in_child, args=args)
        process.start()
        return process
    return start


def command(data, out, words): # a training is begun as long as its settings are not written, else gone on with
    if (out/"config.yaml").exists(): return ["train", "--out", out, "--resume"]
    return ["train", f"data.path={data}", *QUICK, *words, "--out", out]


def after_step(out, n): return lambda: list_checkpoints(out) and int(list_checkpoints(out)[-1].name[5:]) >= n


def finish(child, data, out, words):
    process = child(command(data, out, words), out)
    process.join(120)
    assert process.exitcode == 0, open(f"{out}.txt").read()[-2000:]


QUICK_FAMILIES = ("yolox-nano", "dfine-n")
OTHERS = [n for n in FAMILIES if n not in QUICK_FAMILIES]

@pytest.mark.parametrize("name", [*each_family(QUICK_FAMILIES), *each_family(OTHERS, slow=True)])
def test_killed_in_the_middle_of_an_epoch_and_in_a_save(name, tmp_path, data, child, small):
    whole = tmp_path/"whole"
    out = tmp_path/"run"
    words = family_words(name, *RUN)
    train(config(data, *words), whole)
    for moment in (after_step(out, 2), in_a_save(out)):
        assert killed_when(child(command(data, out, words), out), moment), open(f"{out}.txt").read()[-2000:]
    assert all(verify_checkpoint(p) for p in list_checkpoints(out))
    finish(child, data, out, words)
    assert result_of(out) == result_of(whole)
    assert open(f"{out}.txt").read().count("resumed after epoch 0, step ") == 2


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", each_family(slow=True))
def test_killed_at_thirty_random_moments(name, tmp_path, data, child, small):
    "Every third time in a save. Whenever a training gets to its end in spite of that, another is begun."
    words = family_words(name, *RUN)
    rng = random.Random(name)
    kills = 0
    ends = 0
    where = set()
    start = time.monotonic()
    finish(child, data, tmp_path/"whole", words)
    took = time.monotonic() - start
    while kills < 30:
        out = tmp_path/f"run{ends}"
        process = child(command(data, out, words), out)
        end = time.monotonic() + rng.uniform(.1, 1.)*took
        hit = killed_when(process, (lambda: time.monotonic() > end and in_a_save(out)
                                    ()) if kills % 3 == 2 else lambda: time.monotonic() > end)
        assert hit or process.exitcode == 0, open(f"{out}.txt").read()[-2000:]
        kills += hit
        if hit: where.add(newest_whole(out).name if list_checkpoints(out) else "")
        else:
            assert result_of(out) == result_of(tmp_path/"whole")
            ends += 1
    finish(child, data, out, words)
    assert result_of(out) == result_of(tmp_path/"whole")
    print(
        f"{name}: {took:.1f} s undisturbed; 30 kills, {ends + 1} trainings, killed after {len(where)} different steps")
    assert len(where) >= 5


# ---- a full disk

@pytest.fixture
def disk(tmp_path):
    "A file system in memory; a function that gives it another size, kilobytes."
    path = tmp_path/"disk"
    path.mkdir()
    def size(kilobytes, how="remount,"):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", f"{how}size={kilobytes}k", "tmpfs",
                               str(path)],
                              capture_output=True).returncode == 0
    if not size(1000, ""): pytest.skip("a file system can be mounted by root only")
    size.path = path
    yield size
    subprocess.run(["umount", str(path)], check=True)


SLOW_DISKS = [("yolox-nano", 31000), ("yolox-nano", 20000), ("rtdetr-r18", 14000), ("dfine-n", 3500), ("dfine-n", 4000)]

@pytest.mark.parametrize("name, kilobytes", [
    ("dfine-n", 5000), *(pytest.param(name, room, marks=pytest.mark.slow) for name, room in SLOW_DISKS)
])
def test_a_disk_that_gets_full(name, kilobytes, tmp_path, data, small, disk, capsys):
    """A real one. What was saved is whole, one line says what happened; with more room the training ends as one that
    always had it."""
    if not installed(name): pytest.skip(f"the package {PACKAGES[name]} is not installed")
    words = family_words(name, *RUN)
    out = disk.path/"run"
    train(config(data, *words), tmp_path/"whole")
    assert disk(kilobytes)
    with pytest.raises(TrainingError) as e: train(config(data, *words), out)
    left = list_checkpoints(out)
    print(e.value, [p.name for p in left])
    assert "No space left" in str(e.value) and "what was saved before is whole" in str(e.value) and "\n" not in str(
        e.value)
    assert left and all(verify_checkpoint(p) for p in left)
    assert disk(200000)
    train(config(data, *words), out, resume=True)
    assert result_of(out) == result_of(tmp_path/"whole")
