"""Quantization-aware training: resumed bit for bit, cut into micro-batches without a change, over two processes, pruned
and taught; the thresholds stay; what it can't begin with is one line; and it wins back what rounding cost."""
import copy
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import train_helpers as helpers  # noqa: E402
from int8_helpers import layers_found_once  # noqa: E402

from jetson_det.config import load_config  # noqa: E402
from jetson_det.core import InputError  # noqa: E402
from jetson_det.data.formats.registry import read_dataset  # noqa: E402
from jetson_det.models.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from jetson_det.models.fake_quant import fake_quantized, limits_of, quantize_for_training  # noqa: E402
from jetson_det.models.session import load_detector  # noqa: E402
from jetson_det.models.zoo import create_model  # noqa: E402
from jetson_det.train.recipes import with_recipe  # noqa: E402
from jetson_det.train.state import TrainingError  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ("Sack", "Person")
SIZE = (96, 96)


@pytest.fixture(scope="module", autouse=True)
def graph_read_once():
    with layers_found_once(): yield


@pytest.fixture(scope="module")
def data(tmp_path_factory): return helpers.scenes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def start(tmp_path_factory, data):
    "A checkpoint with the images' statistics, as a training leaves one."
    path = tmp_path_factory.mktemp("start") / "net"
    torch.manual_seed(0)
    model = create_model("yolox-nano", CLASSES)
    ds = read_dataset(data)
    x = torch.from_numpy(np.stack([ds.image(i) for i in range(6)]).transpose(0, 3, 1, 2).copy()).float()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms: m.momentum = 1.
    with torch.no_grad():
        model.train()(x)
        for name, layer in model.named_modules(): # answers of a sensible size
            if "_preds" in name and isinstance(layer, torch.nn.Conv2d): layer.weight.mul_(.05)
    save_checkpoint(path, model.eval(), None, None, {}, model.contract(SIZE))
    return path


def settings(data, start, *more):
    words = [word for word in helpers.QUICK if not word.startswith(("model.weights", "augment.multiscale"))]
    return load_config(overrides=[f"data.path={data}", *words, "augment.multiscale=0", f"model.weights={start}",
                                  "train.qat=true", "train.trackers=[]", "train.lr=0.001", "train.epochs=2", *more])


def test_resumed_bit_for_bit(tmp_path, data, start, monkeypatch):
    from jetson_det.train import loop
    cfg = settings(data, start)
    loop.train(cfg, tmp_path/"whole")
    done, count = loop.Stepper.step, []
    def breaks(self, *args, **kw):
        count.append(1)
        if len(count) == 3: raise TrainingError("broken off")
        return done(self, *args, **kw)
    with monkeypatch.context() as m:
        m.setattr(loop.Stepper, "step", breaks)
        with pytest.raises(TrainingError): loop.train(settings(data, start, *helpers.EACH_STEP), tmp_path/"parts")
    loop.train(cfg, tmp_path/"parts", resume=True)
    assert helpers.result_of(tmp_path/"whole") == helpers.result_of(tmp_path/"parts")
    # what is in the folder: thresholds, weights that moved, statistics that did not, and a contract that says so
    begun = load_checkpoint(start, training=False)
    ended = load_checkpoint(tmp_path/"whole"/"last")
    layers = ended.contract.extra["qat"]["layers"]
    assert len(layers) > 50 and all(f"{name}.int8_limit" in ended.weights for name in layers)
    assert all(torch.equal(ended.weights[f"{name}.int8_limit"], ended.ema[f"{name}.int8_limit"]) for name in layers)
    same = {key: torch.equal(tensor, ended.weights[key]) for key, tensor in begun.weights.items()}
    assert all(is_same for key, is_same in same.items() if helpers.is_statistic(key) or ".bn." in key)
    assert not any(same[f"{name}.weight"] for name in layers)
    model, _ = load_detector(tmp_path/"whole")
    assert fake_quantized(model) == layers
    rows = json.loads((tmp_path/"whole"/"resolved.json").read_text())
    assert f"{len(layers)} convolutions round" in str(rows)
    log = (tmp_path/"whole"/"log.txt").read_text()
    assert "fake INT8 in yolox-nano" in log and "0 layers learn" in log


def test_the_gradient_is_the_same_however_a_step_is_cut(start):
    model, _ = load_detector(start)
    model.train()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.eval()
    torch.manual_seed(1)
    x = torch.rand(4, 3, *SIZE)*255
    quantize_for_training(model, SIZE, lambda: iter([x]))
    before = limits_of(model)
    boxes = torch.tensor([[[10., 10., 50., 60.]]]).repeat(4, 1, 1)
    labels = torch.zeros(4, 1, dtype=torch.long)
    def gradient(pieces):
        model.zero_grad()
        for i in torch.arange(4).chunk(pieces):
            sum(model.loss(model(x[i]), boxes[i], labels[i]).sums.values()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    whole = gradient(1)
    assert (gradient(4) - whole).norm() < 2e-3*whole.norm() and limits_of(model) == before


@pytest.mark.slow
def test_a_pruned_network_with_a_teacher(tmp_path, data, start):
    from jetson_det.train.loop import train
    cfg = settings(data, start, "model.prune=0.3", f"distill.teacher={start}", "distill.confidence=0.01",
                   "train.epochs=1")
    train(cfg, tmp_path/"run")
    model, contract = load_detector(tmp_path/"run")
    assert contract.extra["pruned"] and fake_quantized(model) == contract.extra["qat"]["layers"]


@pytest.mark.slow
def test_a_run_in_int8_is_a_start_like_any_other(tmp_path, data, start):
    "Of a float training, and of another one in fake INT8: its thresholds are found anew."
    from jetson_det.train.loop import train
    words = ["train.epochs=1", "train.lr=0.000001"]
    train(settings(data, start, *words), tmp_path/"first")
    train(settings(data, tmp_path/"first", *words, "train.qat=false"), tmp_path/"float")
    model, contract = load_detector(tmp_path/"float")
    assert not fake_quantized(model) and "qat" not in contract.extra
    train(settings(data, tmp_path/"first", *words), tmp_path/"second")
    assert fake_quantized(load_detector(tmp_path/"second")[0])


@pytest.mark.parametrize("words, message", [
    (["model.weights=none"], "must be trained first; model.weights says from where"),
    (["train.compile=true"], "without train.compile"), (["train.auto_batch=true"], "without train.auto_batch")])
def test_what_it_cannot_begin_with(tmp_path, data, start, words, message):
    from jetson_det.train.loop import train
    with pytest.raises(InputError, match=message) as e: train(settings(data, start, *words), tmp_path/"run")
    assert "\n" not in str(e.value) and not (tmp_path/"run").exists()


def test_the_recipe():
    def filled(*words, images=205):
        cfg = load_config(overrides=["model.weights=yolox-nano", "model.name=yolox-nano", *words])
        return with_recipe(cfg, images, 3)
    usual, _ = filled()
    found, rows = filled("train.qat=true")
    rate = lambda cfg: cfg.train.lr or cfg.train.lr_per_image
    assert rate(found) == pytest.approx(rate(usual)/100) and found.train.min_lr_ratio == .01
    assert found.train.warmup_epochs == 0 and found.train.no_aug_epochs == 0 and found.augment.mosaic == 0
    assert found.train.epochs*26 >= 200 > (found.train.epochs - 1)*26 # 26 steps an epoch
    large, _ = filled("train.qat=true", images=118_000)
    assert large.train.epochs == 2 # a tenth of 20
    own, rows = filled("train.qat=true", "train.epochs=7", "train.lr=0.003")
    assert own.train.epochs == 7 and own.train.lr == .003 and ("train.epochs", 7, "yours") in rows
    assert with_recipe(found, 205, 3)[0] == found


def test_it_wins_back_what_rounding_cost(start):
    "The float network is the teacher of the rounding one: after some steps the outputs are nearer."
    exact, _ = load_detector(start)
    torch.manual_seed(2)
    x = torch.rand(4, 3, *SIZE)*255
    model = copy.deepcopy(exact)
    quantize_for_training(model, SIZE, lambda: iter([x]))
    def features(net):
        seen = []
        def see(_, args): seen.append(args[0])
        hooks = [layer.register_forward_pre_hook(see) for layer in net.teacher_layers()]
        net(x)
        for hook in hooks: hook.remove()
        return seen
    with torch.no_grad(): wanted = features(exact)
    def distance(): return sum(((a - b).square().mean()/b.square().mean()) for a, b in zip(features(model), wanted))
    with torch.no_grad(): before = float(distance())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.ndim > 1], lr=1e-4)
    for _ in range(12):
        optimizer.zero_grad()
        distance().backward()
        optimizer.step()
    with torch.no_grad(): after = float(distance())
    assert 0 < after < .8*before


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path, data, start):
    from jetson_det.train.launch import train_processes
    # cut in the same way: a batch of two images rounds some numbers on the edge between two steps the other way, and
    # ends 10 % of the way apart, in one process as in two
    cfg = settings(data, start, "train.accumulate=2", "train.batch_size=1", "train.epochs=1")
    both = settings(data, start, "train.accumulate=1", "train.batch_size=1", "train.epochs=1")
    train_processes(cfg, tmp_path/"one", processes=1)
    train_processes(both, tmp_path/"two", processes=2)
    one, two = (load_checkpoint(tmp_path/name/"last").weights for name in ("one", "two"))
    assert all(torch.equal(one[k], two[k]) for k in one if k.endswith("int8_limit"))
    apart = sum((one[k] - two[k]).double().square().sum() for k in one if one[k].is_floating_point())
    begun = load_checkpoint(start, training=False).weights
    gone = sum((one[k] - begun[k]).double().square().sum() for k in begun if one[k].is_floating_point())
    assert apart < .02*gone
