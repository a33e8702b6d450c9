"""Switches of the training: compiled networks have the same weights and names, deterministic steps the same bits."""
import hashlib
import os
import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch._inductor.lowering  # noqa: F401  at the start: an import that fails half way cannot be tried again

from jetson_det.config import load_config
from jetson_det.core import InputError
from jetson_det.models.zoo import create_model
from jetson_det.train.ema import ModelEMA
from jetson_det.train.activation_checkpointing import checkpoint_stages
from jetson_det.train.auto_batch import noise_batch
from jetson_det.train.compile import compile_model, compiled_parts, deterministic, not_deterministic, why_not_compiled

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def as_before():
    limits = torch._dynamo.config
    before = (limits.recompile_limit, limits.accumulated_recompile_limit)
    cublas = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    limits.recompile_limit, limits.accumulated_recompile_limit = before
    deterministic(False)
    if cublas is None: os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


class Small(torch.nn.Module):
    "A network with stages, BatchNorm and a name for each weight."
    needs_targets = False
    def __init__(self):
        super().__init__()
        block = lambda a, b: torch.nn.Sequential(torch.nn.Conv2d(a, b, 3, 2, 1), torch.nn.BatchNorm2d(b), torch.nn.SiLU(
        ))
        self.stem = block(3, 4)
        self.body = block(4, 8)
    def normalize(self, images): return images.float() / 255
    def forward(self, x): return self.body(self.stem(x))
    def stages(self): return dict(stem=[self.stem], body=[self.body])


def gradients(model, size, n=2):
    model.zero_grad(set_to_none=True)
    model(model.normalize(noise_batch(n, size, 2, 1).images)).square().mean().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("frugal", [False, True])
@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
def test_a_compiled_network_learns_as_the_plain_one(backend, frugal):
    torch.manual_seed(0)
    plain = Small()
    quick = deepcopy(plain)
    if frugal: checkpoint_stages(quick)
    assert compile_model(quick, dynamic=True, backend=backend) == (["stem", "body"] if frugal else [""])
    assert list(quick.state_dict()) == list(plain.state_dict())
    averages = [ModelEMA(m) for m in (plain, quick)]
    for size in ((64, 96), (96, 64), (32, 64)):
        for a, b in zip(*(gradients(m, size) for m in (plain, quick))):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        for e in averages: e.update()
    for a, b in zip(*(e.module.state_dict().values() for e in averages)): torch.testing.assert_close(a, b)
    assert averages[1].module._compiled_call_impl is None


def test_freezing_is_seen_by_the_compiled_network():
    torch.manual_seed(0)
    model = Small()
    compile_model(model, backend="eager")
    gradients(model, (64, 64))
    norm = model.stem[1]
    count = model.stem[1].num_batches_tracked.clone()
    norm.eval().requires_grad_(False)
    found = gradients(model, (64, 64))
    assert torch.equal(norm.num_batches_tracked,
                       count) and found[2] is None and model.body[1].num_batches_tracked == count + 1


def test_sizes_share_their_code_when_the_size_is_dynamic():
    made = []
    def counting(graph, inputs): return made.append(1) or graph
    model = Small()
    compile_model(model, dynamic=True, backend=counting)
    made.clear()
    for k in range(2, 14): gradients(model, (32 * k, 32 * k + 32))
    assert len(made) == 1


def test_more_sizes_than_torch_allows_by_itself_stay_compiled():
    made = []
    def counting(graph, inputs): return made.append(1) or graph
    model = Small()
    compile_model(model, backend=counting)
    model = model.eval()
    made.clear()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False), torch.no_grad():
        for k in range(1, 13): model(torch.zeros(1, 3, 32 * k, 32))
    assert len(made) == 12


def test_without_a_compiler_it_is_said_and_the_network_runs():
    lines = []
    model = Small()
    assert compile_model(model, backend="nothing", say=lines.append) == []
    assert len(lines) == 1 and lines[0].startswith(
        "train.compile: NOT COMPILED, the network runs as it is: InvalidBackend") and "\n" not in lines[0]
    assert gradients(model, (64, 64))[0] is not None and model._compiled_call_impl is None


def test_what_a_backend_raises_is_said():
    def broken(graph, inputs): raise ValueError("no room\nand more")
    assert why_not_compiled(broken).endswith("raised: ValueError: no room")


def test_a_missing_cxx_compiler_is_found_out():
    from torch._inductor import config
    with config.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}):
        assert "InvalidCxxCompiler" in why_not_compiled("inductor", "cpu")


def test_detrs_and_checkpointed_networks_are_compiled_stage_by_stage():
    model = create_model("yolox-nano", ["car"])
    assert list(compiled_parts(model)) == [""]
    checkpoint_stages(model)
    assert len(compiled_parts(model)) == 14
    assert "net.encoder" in compiled_parts(create_model("dfine-n", ["car"]))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++: inductor has nothing to compile with")
def test_inductor_gives_the_same_step():
    torch.manual_seed(0)
    plain = Small()
    quick = deepcopy(plain)
    assert compile_model(quick) == [""]
    for a, b in zip(*(gradients(m, (64, 96)) for m in (plain, quick))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def bits(threads, seed=0, on=True):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    deterministic(on)
    torch.manual_seed(seed)
    model = create_model("yolox-nano", ["car", "van"])
    batch = noise_batch(2, (64, 96), 2, 3)
    loss = model.loss(model(model.normalize(batch.images)), batch.boxes, batch.labels)
    sum(loss.sums.values()).backward()
    torch.set_num_threads(before)
    return hashlib.sha256(b"".join(p.grad.numpy().tobytes() for p in model.parameters())).hexdigest()


def test_the_same_threads_give_the_same_bits():
    assert bits(1) == bits(1) == bits(1, on=False) != bits(1, seed=1)
    assert bits(2) == bits(2)


def test_loader_workers_have_no_say(tmp_path):
    from train_helpers import scenes

    from jetson_det.train.data import make_loader, training_data
    found = []
    for workers in (0, 1, 2):
        cfg = load_config(overrides=[
            f"data.path={scenes(tmp_path/str(workers), 8)}", "data.input_size=[64,64]", "train.batch_size=2",
            f"data.workers={workers}"
        ])
        deterministic(True)
        ds = training_data(cfg, tmp_path/f"run{workers}", lambda line: None).split("train")
        loader = make_loader(ds, cfg.data, cfg.augment, cfg.train, say=lambda line: None)
        found.append(
            hashlib.sha256(b"".join(np.ascontiguousarray(t).tobytes() for b in loader.epoch(0) for t in b)).hexdigest())
        loader.close()
    assert found[0] == found[1] == found[2]


def test_what_cannot_be_deterministic_is_named():
    deterministic(True)
    assert torch.are_deterministic_algorithms_enabled(
    ) and torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    with pytest.raises(RuntimeError) as found: torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1., 2.]))
    assert not_deterministic(found.value) == "put_" and not_deterministic(RuntimeError("another")) == ""
    deterministic(False)
    torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.]))


def test_cuda_that_has_started_without_it_is_refused(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(InputError, match="set CUBLAS_WORKSPACE_CONFIG=:4096:8 before"): deterministic(True)
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    deterministic(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    deterministic(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
