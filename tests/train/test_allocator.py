"""Memory that is kept: fewer page faults for the same numbers, and all of it comes back."""
import json
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
from jetson_det.train import allocator # noqa: E402

CHILD = """
import json, resource, sys, torch
from jetson_det.train import allocator
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

def quiet_faults(): return min(faults() for _ in range(3)) # now and then a tensor finds another place
def resident(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

sums = [step()]
found = {"before": faults()}
found["said"] = allocator.keep_memory()
sums += [step() for _ in range(3)]
found["kept"], held = quiet_faults(), resident()
found["trimmed"] = [allocator.trim(), held - resident() >> 10]
sums += [step() for _ in range(3)]
found["kept after"], held = quiet_faults(), resident()
found["said back"] = allocator.give_memory_back()
found["given back"] = (held - resident()) >> 10
sums.append(step())
print(json.dumps(found | {"sums": sums}))
"""


@pytest.fixture(scope="module")
def found():
    if allocator._glibc() is None: pytest.skip("not glibc")
    return json.loads(subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout)


def test_a_step_takes_its_pages_from_the_one_before(found):
    assert found["said"] and found["before"] > 10_000 and found["kept"] < found["before"] / 20


def test_what_was_kept_comes_back(found):
    assert found["said back"] and found["given back"] > 80  # of 96 MB


def test_trimming_once_gives_back_and_the_next_step_keeps_again(found):
    said, given = found["trimmed"]
    assert said and given > 80 and found["kept after"] < found["before"] / 20


def net_and_steps(keep):
    """A network with a layer that has no part in it and one that doesn't learn; the gradients of three steps of two
    micro-batches, and where they lay."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.SiLU(),
                              torch.nn.Conv2d(8, 2, 1)).to(memory_format=torch.channels_last)
    net[3].bias.requires_grad_(False)
    aside = torch.nn.Linear(2, 2)
    parameters = [*net.parameters(), *aside.parameters()]
    found = []
    places = []
    if keep: allocator.keep_gradients(parameters)
    for _ in range(3):
        for p in parameters: p.grad = None
        for _ in range(2): net(torch.randn(2, 3, 8, 8)).square().sum().backward()
        found.append([None if p.grad is None else p.grad.clone() for p in parameters])
        places.append([p.grad.data_ptr() for p in parameters if p.grad is not None])
    return found, places


def test_kept_gradients_are_the_same_numbers_in_the_same_places():
    (plain, _), (kept, places) = net_and_steps(False), net_and_steps(True)
    for a, b in zip(sum(plain, []), sum(kept, [])):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    assert sum(g is None for g in kept[0]) == 3 and places[0] == places[1] == places[2]


def test_the_numbers_are_the_same(found):
    assert len(set(found["sums"])) == 1


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    assert allocator.keep_memory() is allocator.trim() is allocator.give_memory_back() is False
