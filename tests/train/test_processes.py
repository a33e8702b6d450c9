"""What processes say to each other; and none is left when one dies."""
import os
import pickle
import re
import signal
import socket
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from process_helpers import gone, preload, together

from jetson_det.core import InputError
from jetson_det.train import launch as launching
from jetson_det.train import processes
from jetson_det.train.processes import SignedStore, decode, encode
from jetson_det.train.state import TrainingError


@pytest.fixture(scope="module", autouse=True)
def preloaded(): preload()


def rank_dies(world, folder, how):
    "In a process: the second one dies while the first waits for it."
    open(f"{folder}/{world.rank}", "w").write(str(os.getpid()))
    world.all_sum([torch.ones(3)])
    if not world.main:
        if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if how == "exception": raise ValueError("a broken\nimage")
        if how == "input": raise InputError("data.path: 'x' is not there")
        if how == "exit": os._exit(3)
        time.sleep(60)
    world.barrier()


DEATHS = {
    "kill": (TrainingError,
             r"^process 1 was ended by SIGKILL \(often a lack of memory\); what was saved before is whole$"),
    "exception": (TrainingError, "^ValueError: a broken image$"),
    "input": (InputError, "^data.path: 'x' is not there$"),
    "exit": (TrainingError, r"^process 1 \(\d+\) is gone; what was saved before is whole$")
}


@pytest.mark.parametrize("how", DEATHS)
def test_one_that_dies_ends_the_others_within_seconds(tmp_path, how):
    kind, words = DEATHS[how]
    start = time.monotonic()
    with pytest.raises(kind, match=words): together(rank_dies, 2, str(tmp_path), how)
    assert time.monotonic() - start < 20 # most of it is the start
    assert gone([int((tmp_path/str(r)).read_text()) for r in (0, 1)])


def test_one_that_hangs_is_found_by_the_time_limit(tmp_path):
    with pytest.raises(TrainingError, match="(?i)timed out|timeout"):
        together(rank_dies, 2, str(tmp_path), "hang", timeout=3.)
    assert gone([int((tmp_path/str(r)).read_text()) for r in (0, 1)], 1)


# ---- waiting without a limit

def rank_waits(world, folder):
    "In a process: the first one takes longer than the time limit, then one after the other."
    from jetson_det.train.world import main_first
    seen = []
    with main_first(world):
        if world.main: time.sleep(3.2)
        seen.append(sorted(os.listdir(folder)))
        if not world.main: time.sleep(3.2)
        open(f"{folder}/{world.rank}", "w").close()
    def work():
        time.sleep(3.2)
        open(f"{folder}/once.{world.rank}", "w").close()
        return world.rank
    doers = world.once_on_machine(work, lambda rank: [rank, sorted(os.listdir(folder))])
    return [world.gather(seen), world.gather(doers)]


def test_what_takes_longer_than_the_time_limit_is_waited_for(tmp_path):
    seen, doers = together(rank_waits, 2, str(tmp_path), timeout=3.)
    assert seen == [[[]], [["0"]]] and doers == [[0, ["0", "1", "once.0"]]] * 2


def rank_fails_first(world):
    "In a process: the first fails while the second waits for it."
    from jetson_det.train.world import main_first
    with main_first(world):
        if world.main: raise InputError("data.path: 'x' is not there")


def test_who_waits_hears_of_a_failure():
    with pytest.raises(InputError, match="^data.path: 'x' is not there$"): together(rank_fails_first, 2)


# ---- one GPU a process

def test_a_process_is_bound_to_its_gpu(monkeypatch):
    bound, options = [], {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    def init(backend, **more):
        options.update(more, backend=backend)
        raise KeyboardInterrupt # far enough
    monkeypatch.setattr(dist, "init_process_group", init)
    second = processes.gpu_of(1, 2)
    with pytest.raises(KeyboardInterrupt): processes.DistributedWorld(dist.HashStore(), 1, 2, 1, gpu=second)
    assert bound == [torch.device("cuda", 1)] and options["device_id"] == bound[0]
    assert options["backend"] == "cpu:gloo,cuda:nccl"
    assert processes.gpu_of(1, 3) is None # more processes than GPUs: the CPU, or an error by `train.device`
    with pytest.raises(KeyboardInterrupt): processes.DistributedWorld(dist.HashStore(), 1, 2, 1)
    assert options["device_id"] is None and options["backend"] == "gloo" and len(bound) == 1


# ---- memory that all share

def rank_fills(world, data, kind):
    "In a process: a loader with a cache of all images; what was said, which memory the pixels are in, the first batch."
    from train_helpers import config
    from jetson_det.data.loader import TrainLoader
    from jetson_det.train.data import training_data
    torch.set_num_threads(1)
    cfg = config(data)
    ds = training_data(cfg, "", lambda line: None).split("train")
    where = dict(augment_on="device", device="cpu") if kind == "device" else dict(cache=kind)
    said = []
    loader = TrainLoader(ds, (64, 64), cfg.augment, 4, workers=1, say=said.append, **where)
    loader.fill_cache(world.once_on_machine)
    pixels = loader.maker.pixels.pixels.numpy() if kind == "device" else loader.maker.cache.store._pixels
    address = pixels.ctypes.data
    maps = [line.split() for line in open("/proc/self/maps")]
    spans = [(*(int(end, 16) for end in line[0].split("-")), line[4]) for line in maps]
    inode, = [number for low, high, number in spans if low <= address < high]
    batch = next(loader.epoch(0))
    loader.close()
    digest = [float(batch.images.double().mean()), batch.indices.tolist()]
    return world.gather([said, inode, digest, next(TrainLoader(ds, (64, 64), cfg.augment, 4, workers=0).epoch(0))
                         .indices.tolist()])


@pytest.mark.parametrize("kind", ["ram", "disk", "device"])
def test_decoded_images_are_held_once_by_all_processes(tmp_path, monkeypatch, kind):
    "One decodes and says so; both read the same memory, and draw the same samples. Nothing is left behind."
    from train_helpers import scenes
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path/"cache"))
    before = set(os.listdir("/dev/shm"))
    first, second = together(rank_fills, 2, str(scenes(tmp_path/"data")), kind)
    assert len(first[0]) == 1 and second[0] == [] and first[1] == second[1] != "0"
    assert first[2] == second[2] and first[2][1] == first[3]
    assert {n for n in set(os.listdir("/dev/shm")) - before if "jetson" in n} == set()


def rank_dies_with_the_memory(world, folder):
    "In a process: the one that made the memory is killed; the other still reads it."
    from jetson_det.data.augment.pixel_store import SharedMemory, map_shared
    made = []
    def make():
        made.append(SharedMemory(1 << 20))
        made[0].memory[:5] = b"pixel"
        return made[0].path
    taken = world.once_on_machine(make, map_shared)
    if world.main: os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(.2)
    open(f"{folder}/read", "wb").write(taken[:5])
    world.barrier()


def test_shared_memory_outlives_who_made_it_and_not_the_last(tmp_path):
    with pytest.raises(TrainingError, match="^process 0 was ended by SIGKILL"):
        together(rank_dies_with_the_memory, 2, str(tmp_path))
    assert (tmp_path/"read").read_bytes() == b"pixel"


# ---- without pickle

VALUES = [None, 3, 2.5, float("inf"), "Säcke\n", b"\0raw", True, [1, [2]], (1, (None, "a")), {},
          {("loss", "iou"): 1., 3: [()]},
          np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((0, 4)), np.array([True]),
          {"boxes": [np.eye(2), np.ones(3, np.int64)], "array": {"dict": 1}}]


def same(a, b):
    if isinstance(a, np.ndarray): return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    if isinstance(a, dict): return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_a_value_arrives_as_it_was_sent(value): assert same(decode(encode(value)), value)


def test_a_pickle_is_not_opened(tmp_path):
    class Evil:
        def __reduce__(self): return open, (str(tmp_path/"ran"), "w")
    head = lambda text: len(text).to_bytes(8, "little") + text
    for data in (pickle.dumps(Evil()), head(pickle.dumps(Evil())), head(b'{"array": ["O", [1]]}') + bytes(8),
                 head(b'{"array": ["<f4", [9]]}'), head(b'{"code": 1}')):
        with pytest.raises((ValueError, OverflowError)): decode(data)
    assert not (tmp_path/"ran").exists()


def test_torch_is_not_asked_to_send_objects():
    "`*_object*` of torch.distributed sends pickles."
    for path in Path(processes.__file__).parents[1].rglob("*.py"):
        assert not re.search(r"(gather|broadcast|scatter|send|recv)_object", path.read_text(encoding="utf-8")), path


def rank_shares(world):
    "In a process: what comes from the others."
    gathered = [(rank, text, values.tolist())
                for rank, text, values in world.gather((world.rank, "x" * world.rank, np.full(world.rank, 7)))]
    shared = world.share({("a", 1): np.ones(2)} if world.main else "not mine")
    return [repr(gathered), repr({key: values.tolist() for key, values in shared.items()})]


def test_values_of_unequal_length_are_gathered_and_shared():
    found = [(rank, "x" * rank, [7] * rank) for rank in range(2)]
    assert together(rank_shares, 2) == [repr(found), repr({("a", 1): [1., 1.]})]


# ---- nobody else

def test_a_store_of_several_machines_is_signed():
    plain = dist.HashStore()
    mine, stranger = SignedStore(plain, "the key of the machines"), SignedStore(plain, "another key, guessed")
    mine.set("result", "AP .5")
    assert mine.get("result") == b"AP .5"
    with pytest.raises(TrainingError, match="JETSON_DET_KEY"): stranger.get("result")
    stranger.set("result", "AP 1.")
    with pytest.raises(TrainingError, match="somebody else"): mine.get("result")
    mine.set("other", "AP .5")
    plain.set("result", plain.get("other")) # an entry belongs to its name
    with pytest.raises(TrainingError, match="somebody else"): mine.get("result")


def test_several_machines_need_a_key(monkeypatch):
    said = dict(WORLD_SIZE="4", LOCAL_WORLD_SIZE="2", RANK="1", MASTER_ADDR="10.0.0.1", MASTER_PORT="1")
    for name, value in said.items(): monkeypatch.setenv(name, value)
    monkeypatch.setattr(launching, "_launcher_store", lambda: (dist.HashStore(), 1, 4))
    for key in ("", "short"):
        monkeypatch.setenv("JETSON_DET_KEY", key)
        with pytest.raises(InputError, match="set JETSON_DET_KEY"): launching.world_of_environment()


def test_the_store_of_a_launcher_on_this_machine_listens_on_the_loopback_alone(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
    for name, value in dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="localhost", MASTER_PORT=str(port)).items():
        monkeypatch.setenv(name, value)
    store, rank, size = launching._launcher_store()
    assert (rank, size) == (0, 2)
    listening = [c for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"]
    assert [c.laddr.ip for c in listening if c.laddr.port == port] == ["127.0.0.1"]
    del store


def test_processes_do_not_meet_in_a_folder_of_others(tmp_path):
    store = dist.HashStore()
    (tmp_path/"open").mkdir()
    (tmp_path/"open").chmod(0o755)
    store.set("jetson_det/folder", str(tmp_path/"open"))
    with pytest.raises(InputError, match="not a private folder"): launching._shared_folder(store, rank=1)
