"""The network against the yolox package: the same weights give the same numbers, for every size."""
import pytest

torch = pytest.importorskip("torch")

import oracles  # noqa: E402
from jetson_det.core import InputError  # noqa: E402
from jetson_det.models.yolox.anchors import anchors_for  # noqa: E402
from jetson_det.models.yolox.network import YOLOX  # noqa: E402
from jetson_det.models.zoo import create_model  # noqa: E402

needs_yolox = pytest.mark.skipif(oracles.yolox() is None, reason=oracles.MISSING)
pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = [f"class {i}" for i in range(80)]


def scatter_norms(model, seed=0):
    "Give BatchNorms statistics, weights and biases as after training, so that each of them counts."
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            for t in (m.running_mean, m.bias.data): t.normal_(0, .1, generator=g)
            for t in (m.running_var, m.weight.data): t.uniform_(.5, 1.5, generator=g)
    return model


def both(name, classes=80):
    torch.manual_seed(0)
    theirs = scatter_norms(oracles.yolox_model(name, classes))
    ours = create_model(name, CLASSES[:classes])
    assert not any(ours.load_state_dict(theirs.state_dict(), strict=True))
    return ours, theirs


@needs_yolox
@pytest.mark.parametrize("name", YOLOX.names)
def test_same_weights_same_outputs(name):
    ours, theirs = both(name)
    ours.eval()
    theirs.eval()
    x = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))*255
    with torch.no_grad():
        want = theirs(x)
        boxes, scores = ours.decode(ours(x))
    corners = torch.cat([want[..., :2] - want[..., 2:4]/2, want[..., :2] + want[..., 2:4]/2], -1)
    torch.testing.assert_close(boxes, corners, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(scores, want[..., 4:5]*want[..., 5:], rtol=0, atol=1e-4)


@needs_yolox
@pytest.mark.parametrize("name", ["yolox-nano", "yolox-tiny"])
def test_training_mode_and_channels_last(name):
    "Batch statistics, running statistics after one step, and the layout we train in: the same numbers still."
    ours, theirs = both(name, 3)
    x = torch.rand(4, 3, 160, 128, generator=torch.Generator().manual_seed(1))*255
    theirs.head.get_losses = lambda imgs, xs, ys, es, labels, outputs, *a, **k: (outputs,)*6
    want = theirs(x, torch.zeros(3, 1, 5))["total_loss"].detach()
    ours = ours.to(memory_format=torch.channels_last)
    out = ours(x.to(memory_format=torch.channels_last))
    raw = out.raw.detach()
    anchors = anchors_for(out.grids, x.device)
    center = (raw[..., :2] + anchors.cells)*anchors.strides
    decoded = torch.cat([center, raw[..., 2:4].exp()*anchors.strides, raw[..., 4:]], -1)
    assert (decoded - want).norm() <= 1e-4*want.norm()
    found = ours.state_dict()
    for k, v in theirs.state_dict().items():
        torch.testing.assert_close(found[k], v, rtol=1e-4, atol=1e-4, msg=k)


@needs_yolox
def test_state_dict_has_the_official_names_and_shapes():
    for name in YOLOX.names:
        with torch.device("meta"):
            ours = create_model(name, CLASSES)
            theirs = oracles.yolox_model(name, 80)
        def shapes(model): return {k: tuple(v.shape) for k, v in model.state_dict().items()}
        assert shapes(ours) == shapes(theirs)


@needs_yolox
def test_parameter_groups_are_those_of_yolox():
    "Decay on the convolutions' weights; none on BatchNorm's scales and on biases (yolox.exp.yolox_base.get_optimizer)."
    ours = create_model("yolox-nano", CLASSES)
    theirs = oracles.yolox_model("yolox-nano", 80)
    decayed = set()
    for k, m in theirs.named_modules():
        is_norm = isinstance(m, torch.nn.BatchNorm2d) or "bn" in k
        if isinstance(getattr(m, "weight", None), torch.nn.Parameter) and not is_norm: decayed.add(k + ".weight")
    names = {id(p): k for k, p in ours.named_parameters()}
    groups = {g["name"]: [names[id(p)] for p in g["params"]] for g in ours.param_groups(5e-4)}
    assert set(groups["weights"]) == decayed
    everything = [k for g in groups.values() for k in g]
    assert sorted(everything) == sorted(names.values())  # each once
    assert [g["weight_decay"] for g in ours.param_groups(5e-4)] == [5e-4, 0, 0]


def test_stages_hold_each_parameter_once():
    for name in ("yolox-nano", "yolox-m"):
        with torch.device("meta"): model = create_model(name, CLASSES)
        held = [id(p) for modules in model.stages().values() for m in modules for p in m.parameters()]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
        assert list(model.stages()) == ["stem", "dark2", "dark3", "dark4", "dark5", "neck", "head"]


def test_anchors_survive_inference_mode():
    "Anchor points made first under inference_mode are kept, and must still serve a training step."
    anchors_for.cache_clear()
    model = create_model("yolox-nano", ["a"])
    x = torch.rand(1, 3, 160, 32)
    with torch.inference_mode(): model.decode(model(x))
    boxes = torch.tensor([[[4., 4, 24, 24]]])
    labels = torch.tensor([[0]])
    model.loss(model(x), boxes, labels, l1=True).total.backward()


def test_normalize_keeps_pixels_and_layout():
    images = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8).to(memory_format=torch.channels_last)
    x = create_model("yolox-nano", ["a"]).normalize(images)
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, images.float())


def test_contract_says_what_the_family_needs():
    c = create_model("yolox-tiny", ["Sack", "Person"]).contract((384, 640), confidence=.3).validate()
    assert (c.family, c.name, c.classes, c.input_size) == ("yolox", "yolox-tiny", ("Sack", "Person"), (384, 640))
    assert (c.color, c.scale, c.fit, c.pad) == ("bgr", 1., "letterbox-topleft", 114)
    assert (c.output, c.confidence) == ("boxes_scores", .3)


def test_names_and_classes_that_cannot_be_meant():
    for name, classes, says in [("yolo-nano", ["a"], "did you mean 'yolox-nano'"), ("yolox-nano", [], "at least one"),
                                ("yolox-nano", "Sack", "list of names"), ("yolox-nano", ["a", "a"], "twice"),
                                ("yolox-nano", ["a", ""], "not a name")]:
        with pytest.raises(InputError, match=says): create_model(name, classes)
    assert isinstance(create_model("yolox-nano", ("a",)), YOLOX)
