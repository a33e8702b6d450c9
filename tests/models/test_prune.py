"""Pruning: what hangs together goes together, the right channels go, the small network computes what the full one
does without them, and is rebuilt from JSON."""
import copy
import json
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from train_helpers import FAMILIES, each_family, installed  # noqa: E402

from jetson_det.core import InputError  # noqa: E402
from jetson_det.export.onnx import export_onnx  # noqa: E402
from jetson_det.models.detector import count_gflops
from jetson_det.models.zoo import create_model  # noqa: E402
from jetson_det.runtime.contract import Contract  # noqa: E402
from jetson_det.models.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from jetson_det.train.ema import ModelEMA  # noqa: E402
from jetson_det.train.optim import build_optimizer, gradients  # noqa: E402
from jetson_det.models.prune import (
    _merged_widths,
    plan_pruning,
    prune_model,
    rebuild_pruned,
    _removable_units,
    _trace_channels,
)  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = (64, 96)
NAMES = list(FAMILIES)
PRUNED = [*each_family(NAMES[:2]), *each_family(NAMES[2:], slow=True)]
CFG = SimpleNamespace(lr=.002,
                      lr_per_image=1.,
                      optimizer="adamw",
                      momentum=.9,
                      betas=(.9, .999),
                      weight_decay=.1,
                      lookahead=0,
                      lookahead_alpha=.5)


def trained(name, classes=("sack", "person"), seed=0):
    "A model in evaluation mode whose every number is its own."
    if not installed(name): pytest.skip(f"the package of {name} is not installed")
    torch.manual_seed(seed)
    model = create_model(name, classes).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, low, high in ((m.weight, .5, 1.5), (m.bias, -.3, .3), (m.running_mean, -.2, .2), (m.running_var, .5,
                                                                                                     1.5)):
                nn.init.uniform_(t, low, high)
    return model


def tensors(out):
    "All that a network says, as one list."
    from torch.utils._pytree import tree_leaves
    with torch.no_grad(): return [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def features(model, x):
    "What can be compared number by number: before the queries are chosen, where a network chooses some."
    with torch.no_grad(): return [model.features(x)[0]] if model.needs_targets else tensors(model(x))


def silenced(model, plan):
    "The full network in which every channel that the plan removes sends zeros."
    model = copy.deepcopy(model)
    for name, places in plan.norms.items():
        m = model.get_submodule(name)
        gone = torch.ones(m.num_features, dtype=torch.bool)
        gone[places] = False
        with torch.no_grad():
            m.weight[gone] = 0
            m.bias[gone] = 0
    # D-FINE's backbone adds a number after the activation: a removed channel sends that, unless it is 0
    for name, m in model.named_modules():
        if type(m).__name__ == "HGNetV2LearnableAffineBlock": nn.init.zeros_(m.bias)
    return model


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_computes_what_the_full_network_does_with_those_channels_at_zero(name):
    full = trained(name)
    for m in full.modules():
        if type(m).__name__ == "HGNetV2LearnableAffineBlock": nn.init.zeros_(m.bias)
    small = copy.deepcopy(full)
    plan = plan_pruning(full, SIZE, .3)
    report = prune_model(small, SIZE, .3)
    assert .3 <= report.removed < .45 and report.params[1] < report.params[0] and small.pruned == plan.widths
    full = silenced(full, plan)
    x = torch.rand(2, 3, *SIZE)*(255 if "yolox" in name else 1)
    for training in (False, True):
        full.train(training), small.train(training)
        for ours, theirs in zip(features(small, x), features(full, x)):
            torch.testing.assert_close(ours,
                                       theirs,
                                       rtol=1e-4,
                                       atol=(1e-3 if training else 1e-4)*max(1,
                                                                             theirs.abs().max().item()))


@pytest.mark.parametrize("name", PRUNED)
def test_it_is_rebuilt_from_json_and_trains(name):
    model = trained(name)
    prune_model(model, SIZE, .25)
    fresh = rebuild_pruned(create_model(name, model.classes), json.loads(json.dumps(model.pruned)))
    fresh.load_state_dict(model.state_dict()) # strict: every shape
    x = torch.rand(1, 3, *SIZE)
    for a, b in zip(tensors(model(x)), tensors(fresh.eval()(x))): assert torch.equal(a, b)
    for m in fresh.modules():
        if isinstance(m, nn.Conv2d):
            assert m.weight.shape[:2] == (m.out_channels, m.in_channels // m.groups) and (m.groups == 1
                                                                                          or m.groups == m.out_channels)
        if isinstance(m, nn.BatchNorm2d):
            assert {len(t) for t in (m.weight, m.bias, m.running_mean, m.running_var)} == {m.num_features}
    ema = ModelEMA(fresh, .5, 1.)
    optimizer = build_optimizer(fresh.train(), CFG, 2)
    boxes = torch.tensor([[[8., 8, 60, 50]], [[20., 30, 50, 60]]])
    labels = torch.tensor([[0], [1]])
    x = torch.rand(2, 3, *SIZE)
    before = {k: v.clone() for k, v in fresh.named_parameters()}
    fresh.loss(fresh(x, boxes, labels) if fresh.needs_targets else fresh(x), boxes, labels).total.backward()
    assert all(g.isfinite().all() for g in gradients(optimizer))
    optimizer.step()
    ema.update()
    changed = [k for k, v in fresh.named_parameters() if not torch.equal(v, before[k])]
    assert set(model.pruned) & {k.rpartition(".")[0] for k in changed}
    assert [p.shape for p in ema.module.parameters()] == [p.shape for p in fresh.parameters()]


def test_channels_that_nobody_hears_go_first_and_nothing_changes():
    model = trained("yolox-tiny")
    names = ["backbone.backbone.dark3.1.m.0.conv1", "backbone.C3_p4.conv2", "head.cls_convs.1.0"]
    dead = {}
    with torch.no_grad():
        for i, name in enumerate(names):
            bn = model.get_submodule(name).bn
            dead[name + ".bn"] = torch.randperm(bn.num_features,
                                                generator=torch.Generator().manual_seed(i))[:16].sort().values
            bn.weight[dead[name + ".bn"]] = 0
            bn.bias[dead[name + ".bn"]] = 0
    x = torch.rand(1, 3, *SIZE)*255
    before = tensors(model(x))
    plan = plan_pruning(model, SIZE, 1e-4)
    assert set(plan.norms) == set(dead)
    for name, gone in dead.items():
        assert sorted(plan.norms[name] + gone.tolist()) == list(range(model.get_submodule(name).num_features))
    prune_model(model, SIZE, 1e-4)
    for a, b in zip(before, tensors(model(x))):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5*a.abs().max().item())


def test_a_channel_nobody_reads_counts_as_little_as_one_that_sends_nothing():
    model = trained("yolox-tiny")
    deaf = list(range(8, 24))
    with torch.no_grad(): model.get_submodule("head.reg_convs.0.1").conv.weight[:, deaf] = 0
    plan = plan_pruning(model, SIZE, 1e-4)
    assert list(plan.norms) == ["head.reg_convs.0.0.bn"] and not set(plan.norms["head.reg_convs.0.0.bn"]) & set(deaf)


def test_what_must_stay_stays():
    for name in ("yolox-nano", "yolo11n"):
        model = trained(name)
        widths = plan_pruning(model, SIZE, .6).widths
        preds = [k for k, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
        assert len(preds) >= 6 and all(widths.get(k, [None])[0] is None for k in preds)
        assert not any("attn" in k for k in widths) and widths.get("model.10.cv1.conv", [None])[0] is None
        for k, m in model.named_modules():
            n = widths.get(k, [None])[0]
            if n is None or not isinstance(m, nn.Conv2d): continue
            assert n % 8 == 0 and n >= .1*m.out_channels
            if type(model.get_submodule(
                    k.rpartition(".")[0].rpartition(".")[0])).__name__ in ("C2f", "C3k2") and k.endswith("cv1.conv"):
                assert n % 16 == 0


class Odd(nn.Module):
    "Operations that no list foresees: a sum over channels, a shuffle, a product of matrices, a pad of channels."
    name = "odd"

    def __init__(self):
        super().__init__()
        conv = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 1), nn.BatchNorm2d(b))
        self.plain = conv(3, 16)
        self.shuffled = conv(16, 16)
        self.summed = conv(16, 16)
        self.padded = conv(16, 16)
        self.gate = conv(16, 1)
        self.grouped = nn.Conv2d(16, 16, 1, groups=4)
        self.last = nn.Conv2d(17, 4, 1)

    def forward(self, x):
        x = self.shuffled(self.plain(x))
        x = self.summed(x.unflatten(1, (2, 8)).transpose(1, 2).flatten(1, 2))
        x = self.padded(x - x.mean(1, keepdim=True))
        x = x*self.gate(x).sigmoid() + self.grouped(x)
        return self.last(torch.cat([x, x[:, :1]], 1))


def test_what_is_not_known_is_kept():
    model = Odd()
    trace = _trace_channels(model, (8, 8))
    units = _removable_units(trace)
    assert len(units) == 1 and {trace.channels.of(i) for i in trace.convs["plain.0"].out} == set(units[0][0])


def test_scopes_and_rounding():
    model = trained("yolox-tiny")
    layer = plan_pruning(model, SIZE, .4, scope="layer").widths
    fine = plan_pruning(model, SIZE, .4, round_to=1).widths
    shares = [
        w[0]/model.get_submodule(k).out_channels
        for k, w in layer.items()
        if k.endswith(".conv") and w[0] and model.get_submodule(k).out_channels > 96
    ]
    assert max(shares) - min(shares) < .15
    assert any(w[0] % 8 for k, w in fine.items() if w[0])
    work = lambda widths: count_gflops(rebuild_pruned(create_model("yolox-tiny", model.classes), widths), SIZE
                                       )/count_gflops(model, SIZE)
    assert .599 < work(fine) <= .6 and .5 < work(layer) <= .6


def test_twice():
    model = trained("yolox-tiny")
    prune_model(model, SIZE, .2)
    prune_model(model, SIZE, .2)
    fresh = rebuild_pruned(create_model("yolox-tiny", model.classes), model.pruned)
    fresh.load_state_dict(model.state_dict())
    assert _merged_widths({}, model.pruned) == model.pruned and .6 < count_gflops(model, SIZE)/count_gflops(
        trained("yolox-tiny"), SIZE) <= .64


@pytest.mark.parametrize("ratio", [0, 1, -.1, 1.5, True, "half", float("nan"), None])
def test_bad_ratios(ratio):
    with pytest.raises(InputError, match="over 0 and under 1"):
        prune_model(create_model("yolox-nano", ["a"]), SIZE, ratio)


def test_refused_in_one_line_with_the_model_untouched():
    model = trained("yolox-nano")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"at most 0\.\d\d can be removed"): prune_model(model, SIZE, .95)
    with pytest.raises(InputError, match="global or layer"): prune_model(model, SIZE, .5, scope="both")
    for widths in ({"nowhere": [8, None]}, {"head.stems.0.conv": [8]}, {"head.stems.0.conv": [80, None]},
                   {"head.stems.0.bn": [0]}, {"head.stems.0.bn": "8"}, {"head": [8]}):
        with pytest.raises(InputError, match="not those of yolox-nano"): rebuild_pruned(model, widths)
    assert all(torch.equal(v, before[k])
               for k, v in model.state_dict().items()) and rebuild_pruned(model, None) is model


def test_device_layout_and_grad_flags_stay():
    model = trained("yolox-tiny").to(memory_format=torch.channels_last)
    model.backbone.backbone.requires_grad_(False)
    prune_model(model, SIZE, .3)
    convs = [model.get_submodule(k) for k, w in model.pruned.items() if len(w) == 2]
    assert len(convs) > 30 and all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convs)
    assert not any(p.requires_grad
                   for p in model.backbone.backbone.parameters()) and all(p.requires_grad
                                                                          for p in model.head.parameters())


@pytest.mark.parametrize("name", ["yolox-nano", pytest.param("yolo11n", marks=pytest.mark.slow),
                                  pytest.param("dfine-n", marks=pytest.mark.slow)])
def test_saved_loaded_exported(name, tmp_path):
    pytest.importorskip("onnxruntime")
    model = trained(name)
    prune_model(model, SIZE, .3)
    save_checkpoint(tmp_path/"c", model, None, None, {}, model.contract(SIZE, extra={"pruned": model.pruned}))
    ckpt = load_checkpoint(tmp_path/"c")
    again = rebuild_pruned(create_model(ckpt.contract.name, ckpt.contract.classes), ckpt.contract.extra["pruned"])
    again.load_state_dict(ckpt.shipped)
    contract = export_onnx(again.eval(), tmp_path/"small.onnx", SIZE)
    assert contract.parity["scores"] < 1e-3
    filters = sum(m.weight.numel() for m in trained(name).modules() if isinstance(m, nn.Conv2d))
    assert (tmp_path/"small.onnx").stat().st_size < .95*4*filters # less than the full network's filters alone
    assert isinstance(Contract.from_json(contract.to_json()), Contract)


def test_torch_pruning_finds_the_same_channels():
    """The package torch-pruning (DepGraph) ties the same channels together as our trace. (C2f and the attention of
    YOLO11 are beyond it.)"""
    tp = pytest.importorskip("torch_pruning")
    for name in ("yolox-nano", "yolox-tiny"):
        model = trained(name)
        names = {m: n for n, m in model.named_modules()}
        trace = _trace_channels(model, SIZE)
        graph = tp.DependencyGraph().build_dependency(
            model, torch.zeros(1, 3, *SIZE), forward_fn=lambda m, x: [t for t in m(x) if isinstance(t, torch.Tensor)])
        of = trace.channels.of
        free = {i for u in _removable_units(trace) for b in u for i in b}
        seen = 0
        for conv, use in trace.convs.items():
            if not all(of(i) in free for i in use.out): continue
            module = model.get_submodule(conv)
            seen = seen + 1
            for item in graph.get_pruning_group(module, tp.prune_conv_out_channels,
                                                list(range(module.out_channels))).items:
                target = names.get(item.dep.target.module)
                if target not in trace.convs or not isinstance(model.get_submodule(target), nn.Conv2d): continue
                made = graph.is_out_channel_pruning_fn(item.dep.handler)
                numbers = trace.convs[target].into
                if made or numbers is None: numbers = trace.convs[target].out
                for place, root in zip(item.idxs, item.root_idxs):
                    assert of(numbers[place]) == of(use.out[root]), (conv, target)
        assert seen > 40


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    "A training of some steps, to prune from."
    from jetson_det.train.loop import train
    from train_helpers import config, scenes
    folder = tmp_path_factory.mktemp("prune")
    scenes(folder/"data")
    train(config(folder/"data", "train.epochs=2"), folder/"full")
    return folder


@pytest.mark.slow
def test_in_the_loop(full_run, tmp_path):
    from jetson_det.models.session import load_detector
    from jetson_det.models.weights.load import load_weights
    from jetson_det.train.averages import evaluate_weights
    from jetson_det.train.loop import train
    from jetson_det.train.data import training_data
    from train_helpers import config, result_of
    cfg = config(full_run/"data", f"model.weights={full_run/'full'}", "model.prune=0.3", "train.epochs=2")
    train(cfg, tmp_path/"whole")
    assert "pruned yolox-nano: 0.90 ->" in (tmp_path/"whole"/"log.txt").read_text()
    small, contract = load_detector(tmp_path/"whole")
    full, _ = load_detector(full_run/"full")
    assert small.pruned == contract.extra["pruned"] and count_gflops(
        small, SIZE) < .75*count_gflops(full, SIZE) and not full.pruned
    assert export_onnx(tmp_path/"whole", tmp_path/"small.onnx").parity["scores"] < 1e-3
    val = training_data(cfg, None, print).split("val")
    evaluate_weights(tmp_path/"whole", val, cfg.evaluate, cfg.data.input_size)
    from jetson_det.train.callbacks.base import Callback
    from jetson_det.train.loop import Trainer, default_callbacks
    class Break(Callback):
        def after_step(self, trainer):
            if trainer.run.step == 3: trainer.stop("stopped here")
    from jetson_det.train.state import TrainingError
    ds = training_data(cfg, tmp_path/"broken", print)
    trainer = Trainer(cfg, ds, tmp_path/"broken", callbacks=[*default_callbacks(), Break()])
    from jetson_det.train.run_folder import write_run_folder
    write_run_folder(tmp_path/"broken", cfg, ds, [])
    with pytest.raises(TrainingError): trainer.fit()
    train(cfg, tmp_path/"broken", resume=True)
    assert result_of(tmp_path/"broken")["best/weights.safetensors"] == result_of(
        tmp_path/"whole")["best/weights.safetensors"]
    other = create_model("yolox-nano", ["Person", "Truck"])
    assert "carried over: Person" in str(load_weights(other, tmp_path/"whole")) and other.pruned == small.pruned
    # fine-tuned once more, as wide as it came
    again = config(full_run/"data", f"model.weights={tmp_path/'whole'}", "train.epochs=1")
    train(again, tmp_path/"again")
    assert load_detector(tmp_path/"again")[0].pruned == small.pruned


def test_pruning_needs_something_trained(full_run, tmp_path):
    from jetson_det.train.loop import train
    from train_helpers import config
    with pytest.raises(InputError, match="model.prune is 0.3: what is pruned must be trained first"):
        train(config(full_run/"data", "model.prune=0.3"), tmp_path/"run")
