"""Memory that is kept: fewer page faults for the same numbers, and all of it comes back."""
import json
import subprocess
import sys

import pytest

pytest.importorskip("torch")
from jetson_det.train import heap  # noqa: E402

CHILD = """
import json, resource, sys, torch
from jetson_det.train import heap
torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.rand(3 << 20)

def step(): # eight tensors of 12 MB
    layers = [x]
    for _ in range(8): layers.append(layers[-1].cos())
    return layers[-1].sum().item()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

sums = [step()]
found = {"before": faults()}
found["said"] = heap.keep_memory()
sums.append(step())
found["kept"], held = faults(), resident()
found["said back"] = heap.give_memory_back()
found["given back"] = (held - resident()) >> 10
sums.append(step())
print(json.dumps(found | {"sums": sums}))
"""


@pytest.fixture(scope="module")
def found():
    if heap._glibc() is None: pytest.skip("not glibc")
    return json.loads(subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout)


def test_a_step_takes_its_pages_from_the_one_before(found):
    assert found["said"] and found["before"] > 10_000 and found["kept"] < found["before"] / 20


def test_what_was_kept_comes_back(found):
    assert found["said back"] and found["given back"] > 80  # of 96 MB


def test_the_numbers_are_the_same(found):
    assert len(set(found["sums"])) == 1


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    assert heap.keep_memory() is False and heap.give_memory_back() is False
