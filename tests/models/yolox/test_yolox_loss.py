"""The loss against the yolox package: the same total, terms and gradients on the same outputs and boxes."""
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import oracles  # noqa: E402
from jetson_det.core import InputError  # noqa: E402
from jetson_det.models.yolox.anchors import YOLOXOutputs  # noqa: E402
from jetson_det.models.yolox.loss import GAINS, assign, yolox_loss  # noqa: E402
from jetson_det.models.zoo import create_model  # noqa: E402

needs_yolox = pytest.mark.skipif(oracles.yolox() is None, reason=oracles.MISSING)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast:FutureWarning"), # by yolox
]
C = 7


def pad(labels, keep):
    "Labels with only the first keep[i] of image i."
    labels = labels.clone()
    for i, n in enumerate(keep): labels[i, n:] = -1
    return labels


# name -> batch, boxes an image, (h, w), settings of the scene, boxes kept of each image
SCENES = {
    "ordinary": (3, 12, (160, 160), {}, None),
    "wide": (2, 12, (96, 224), {}, None),
    "tall": (2, 12, (224, 96), {}, None),
    "some images empty": (4, 10, (128, 160), {}, (10, 0, 3, 0)),
    "all images empty": (2, 4, (96, 128), {}, (0, 0)),
    "crowded": (1, 300, (224, 320), dict(small=8., large=.2), None),
    "small boxes": (2, 60, (160, 224), dict(small=9., large=.03), None),
    "one box over everything": (1, 1, (96, 96), dict(small=90., large=0.), None),
}


def scene(name):
    batch, n, size, settings, keep = SCENES[name]
    boxes, labels = oracles.random_scene(batch, n, size, C, **settings)
    return boxes, labels if keep is None else pad(labels, keep), size


def compare(outputs, boxes, labels, l1):
    "Total, terms and gradients of both, to 1e-3 relative (they are nearer)."
    leaves = [t.detach().clone().requires_grad_() for t in outputs[:3]]
    outputs = YOLOXOutputs(*leaves, outputs.grids)
    want = oracles.yolox_loss(
        oracles.yolox_model("yolox-nano", C).head, outputs, oracles.yolox_targets(boxes, labels), l1)
    want_grads = torch.autograd.grad(want[0], leaves)
    have = yolox_loss(outputs, boxes, labels, l1)
    have_grads = torch.autograd.grad(have.total, leaves)
    torch.testing.assert_close(have.total, want[0], rtol=1e-4, atol=1e-4)
    for name, value in zip(("iou", "obj", "cls", "l1"), want[1:]):
        if name not in have.sums: continue
        term = have.sums[name]/have.normalizer.clamp(min=1)
        torch.testing.assert_close(term, value, rtol=1e-4, atol=1e-4, msg=name)
    for a, b in zip(have_grads, want_grads): assert (a - b).norm() <= 1e-3*b.norm() + 1e-9
    return have


@needs_yolox
@pytest.mark.parametrize("l1", [False, True], ids=["", "l1"])
@pytest.mark.parametrize("name", SCENES)
def test_same_loss_on_plausible_outputs(name, l1):
    boxes, labels, size = scene(name)
    loss = compare(oracles.plausible_outputs(boxes, labels, size, C), boxes, labels, l1)
    assert ("l1" in loss.sums) == l1
    if name == "all images empty": assert loss.normalizer == 0
    if name == "crowded": assert loss.normalizer > 300


@needs_yolox
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["ordinary", "crowded", "some images empty", "wide"])
def test_same_loss_on_outputs_that_make_no_sense(name, seed):
    "Boxes of any size anywhere, sure and unsure: where overlaps are zero and the penalty decides."
    boxes, labels, size = scene(name)
    g = torch.Generator().manual_seed(seed)
    outputs = oracles.plausible_outputs(boxes, labels, size, C)
    noise = [torch.randn(t.shape, generator=g)*s for t, s in zip(outputs[:3], (1.5, 3., 3.))]
    compare(YOLOXOutputs(*noise, outputs.grids), boxes, labels, seed == 0)


@needs_yolox
def test_tiny_boxes(monkeypatch):
    """Boxes of 2 to 5 px lie between the anchor points, so nearly all they get comes with the penalty of 1e5.

    In float32 such costs are multiples of 1/128, and many are equal. yolox then takes what torch.topk brings first,
    which is not defined; we take the lowest index. For the comparison its topk is replaced by one that does the same.
    """
    import yolox.models.yolo_head as yolo_head

    class Torch:
        def __getattr__(self, name): return getattr(torch, name)

        @staticmethod
        def topk(x, k, dim=-1, largest=True):
            values, index = x.sort(dim=dim, descending=largest, stable=True)
            return values.narrow(dim, 0, k), index.narrow(dim, 0, k)
    monkeypatch.setattr(yolo_head, "torch", Torch())
    for seed, noise in ((0, .25), (1, .05)):
        boxes, labels = oracles.random_scene(2, 40, (128, 160), C, small=2., large=.02, seed=seed)
        compare(oracles.plausible_outputs(boxes, labels, (128, 160), C, noise), boxes, labels, True)


@needs_yolox
@pytest.mark.parametrize("l1", [False, True], ids=["", "l1"])
@pytest.mark.parametrize("size", [(96, 160), (160, 96)], ids=["wide", "tall"])
def test_same_gradients_of_all_parameters(size, l1):
    "A whole training step of both packages from the same weights, as the user would run it."
    torch.manual_seed(0)
    theirs = oracles.yolox_model("yolox-nano", C)
    ours = create_model("yolox-nano", [str(i) for i in range(C)])
    ours.load_state_dict(theirs.state_dict())
    theirs.head.use_l1 = l1
    boxes, labels = oracles.random_scene(3, 9, size, C, small=10., seed=2)
    labels = pad(labels, (9, 0, 4))
    x = torch.rand(3, 3, *size)*255
    want = theirs(x, oracles.yolox_targets(boxes, labels))["total_loss"]
    want.backward()
    have = ours.loss(ours(x), boxes, labels, l1).total
    have.backward()
    torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-4)
    grads = {k: p.grad for k, p in theirs.named_parameters()}
    scale = max(g.norm() for g in grads.values())
    for k, p in ours.named_parameters(): assert (p.grad - grads[k]).norm() <= 1e-3*grads[k].norm() + 1e-6*scale, k


@pytest.mark.parametrize("name", ["iou", "obj", "cls", "l1"])
def test_a_gain_changes_its_term_alone(name):
    boxes, labels, size = scene("ordinary")
    outputs = oracles.plausible_outputs(boxes, labels, size, C)
    classes = [str(i) for i in range(C)]
    usual = create_model("yolox-nano", classes)
    assert usual.gains == GAINS == dict(iou=5., obj=1., cls=1., l1=1.)
    plain = usual.loss(outputs, boxes, labels, True)
    model = create_model("yolox-nano", classes, gains={name: 3*GAINS[name]})
    found = model.loss(outputs, boxes, labels, True)
    assert torch.equal(found.normalizer, plain.normalizer)
    for k, term in found.sums.items(): torch.testing.assert_close(term, plain.sums[k]*(3 if k == name else 1))
    without = create_model("yolox-nano", classes, gains={name: 0}).loss(outputs, boxes, labels, True)
    assert without.sums[name] == 0


def test_default_gains_change_nothing():
    "Bit for bit the terms without any gains."
    boxes, labels, size = scene("ordinary")
    outputs = oracles.plausible_outputs(boxes, labels, size, C)
    ones = yolox_loss(outputs, boxes, labels, True, gains=dict.fromkeys(GAINS, 1.))
    usual = yolox_loss(outputs, boxes, labels, True)
    assert torch.equal(usual.sums["iou"], 5*ones.sums["iou"])
    for k in ("obj", "cls", "l1"): assert torch.equal(usual.sums[k], ones.sums[k])


def test_unknown_and_negative_gains_are_refused():
    with pytest.raises(InputError, match="model.gains: unknown gain 'box'"):
        create_model("yolox-nano", ["a"], dict(box=1))
    with pytest.raises(InputError, match="model.gains.obj is -1"): create_model("yolox-nano", ["a"], dict(obj=-1))


def test_batch_equals_its_images():
    "Assigned together or one by one: the same points; so padding and neighbors have no say."
    boxes, labels, size = scene("some images empty")
    outputs = oracles.plausible_outputs(boxes, labels, size, C)
    whole = assign(outputs, boxes, labels)
    for i in range(len(boxes)):
        n = max(int((labels[i] >= 0).sum()), 1)
        one = YOLOXOutputs(*(t[i:i + 1] for t in outputs[:3]), outputs.grids)
        single = assign(one, boxes[i:i + 1, :n], labels[i:i + 1, :n])
        mine = whole.image == i
        assert torch.equal(whole.anchor[mine], single.anchor) and torch.equal(whole.slot[mine], single.slot)


def test_order_of_boxes_and_place_of_padding_do_not_matter():
    boxes, labels, size = scene("ordinary")
    outputs = oracles.plausible_outputs(boxes, labels, size, C)
    order = torch.randperm(boxes.shape[1] + 5, generator=torch.Generator().manual_seed(0))
    more = torch.zeros(len(boxes), 5, 4)
    none = torch.full((len(boxes), 5), -1)
    mixed = torch.cat([boxes, more], 1)[:, order], torch.cat([labels, none], 1)[:, order]
    a = yolox_loss(outputs, boxes, labels, True)
    b = yolox_loss(outputs, *mixed, True)
    assert a.normalizer == b.normalizer
    for k in a.sums: torch.testing.assert_close(a.sums[k], b.sums[k], rtol=1e-5, atol=1e-5)


def test_slices_give_the_same(monkeypatch):
    "The tables of pairs are made in slices to bound the memory; the size of the slices changes nothing."
    import jetson_det.models.yolox.loss as module
    boxes, labels = oracles.random_scene(2, 40, (128, 160), C, small=3., large=.1)
    outputs = oracles.plausible_outputs(boxes, labels, (128, 160), C, .05)
    want = assign(outputs, boxes, labels)
    monkeypatch.setitem(module.PAIRS, "cpu", 2000)
    for a, b in zip(want, assign(outputs, boxes, labels)): assert torch.equal(a, b)


def test_a_box_outside_the_image():
    "No point may answer for it, so it gets none (yolox stops with an error here)."
    boxes = torch.tensor([[[500., 500, 540, 540]]])
    labels = torch.tensor([[0]])
    loss = yolox_loss(oracles.plausible_outputs(boxes, labels, (96, 96), C), boxes, labels, True)
    assert loss.normalizer == 0 and loss.total.isfinite()


def test_half_precision_outputs():
    "Assignment and loss are in float32, whatever the network's outputs are."
    boxes, labels, size = scene("ordinary")
    outputs = oracles.plausible_outputs(boxes, labels, size, C)
    half = YOLOXOutputs(*(t.bfloat16().requires_grad_() for t in outputs[:3]), outputs.grids)
    full = YOLOXOutputs(*(t.detach().float() for t in half[:3]), outputs.grids)
    with torch.autocast("cpu", torch.bfloat16): a = yolox_loss(half, boxes, labels, True)
    b = yolox_loss(full, boxes, labels, True)
    assert a.normalizer == b.normalizer and all(v.dtype == torch.float32 for v in a.sums.values())
    for k in a.sums: torch.testing.assert_close(a.sums[k], b.sums[k], rtol=1e-5, atol=1e-5)
    a.total.backward()
    assert all(t.grad.isfinite().all() for t in half[:3])


def test_crowded_batch_stays_small():
    "8 images of 300 boxes at 640: the tables of pairs would be gigabytes, the slices of them are not."
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import oracles
from jetson_det.models.yolox.loss import assign
torch.set_num_threads(2)
boxes, labels = oracles.random_scene(8, 300, (640, 640), 80)
outputs = oracles.plausible_outputs(boxes[:, :20], labels[:, :20], (640, 640), 80)
def memory(key): return next(int(line.split()[1])/1024 for line in open("/proc/self/status") if line.startswith(key))
before = memory("VmRSS:")
assign(outputs, boxes, labels)
print(memory("VmHWM:") - before)
"""
    if not sys.platform.startswith("linux"): pytest.skip("reads /proc")
    tests = Path(oracles.__file__).parent
    out = subprocess.run([sys.executable, "-c", code, tests], capture_output=True, text=True, check=True).stdout
    assert float(out) < 400, f"{out} MB"


@pytest.mark.cuda
def test_cuda_agrees_with_the_cpu():
    boxes, labels, size = scene("crowded")
    outputs = oracles.plausible_outputs(boxes, labels, size, C)
    gpu = YOLOXOutputs(*(t.cuda() for t in outputs[:3]), outputs.grids)
    a = yolox_loss(outputs, boxes, labels, True)
    b = yolox_loss(gpu, boxes.cuda(), labels.cuda(), True)
    for k in a.sums: torch.testing.assert_close(a.sums[k], b.sums[k].cpu(), rtol=1e-3, atol=1e-3)
