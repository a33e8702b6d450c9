"""YOLO26 against the package Ultralytics: the same network, detections, loss and gradients, at every epoch."""
import copy
import importlib.util
import time
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("ultralytics") is None:
    pytest.skip("the package ultralytics is not installed: pip install --no-deps ultralytics==8.4.190",
                allow_module_level=True)

import oracles  # noqa: E402
from jetson_det.core import InputError  # noqa: E402
from jetson_det.models.ultralytics.network import LICENSE, UltralyticsDetector, YOLO26Detector  # noqa: E402
from jetson_det.models.ultralytics.package import package_folder, ultralytics_tasks  # noqa: E402
from jetson_det.models.ultralytics.graphs import YOLO26_NAMES, graph_of  # noqa: E402
from jetson_det.models.ultralytics.loss import YOLOOutputs, align, points_for  # noqa: E402
from jetson_det.models.ultralytics.loss_yolo26 import (  # noqa: E402
    GAINS26,
    PICKS,
    YOLO26Outputs,
    head_weights,
    yolo26_loss,
)
from jetson_det.models.detector import count_gflops, count_params  # noqa: E402
from jetson_det.models.zoo import MODELS  # noqa: E402
from yolo_scenes import SCENES, overfit, padded_batch, scene, slow_but  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ("Sack", "Person")
PARTS = ("one2many", "one2one")
EPOCHS = 11


def progress(epoch, epochs=EPOCHS): return epoch/max(epochs - 1, 1)


def package_loss(strides, n_classes, gains=GAINS26, class_weights=None, epoch=0, epochs=EPOCHS):
    "The package's E2ELoss as it stands after `epoch` epochs."
    ultralytics_tasks()
    from ultralytics.utils.loss import E2ELoss
    model = torch.nn.Linear(1, 1)
    model.args = SimpleNamespace(box=gains["box"], cls=gains["cls"], dfl=gains["l1"], epochs=epochs)
    model.model = [SimpleNamespace(stride=torch.tensor(strides).float(), nc=n_classes, reg_max=1)]
    if class_weights is not None: model.class_weights = class_weights
    loss = E2ELoss(model)
    for _ in range(epoch): loss.update()
    return loss


def package_batch(boxes, labels, size):
    "Our boxes and labels as the package wants them."
    h, w = size
    image, slot = (labels >= 0).nonzero(as_tuple=True)
    b = boxes[image, slot]
    cxcywh = torch.cat([(b[:, :2] + b[:, 2:])/2, b[:, 2:] - b[:, :2]], 1)/torch.tensor([w, h, w, h])
    return dict(batch_idx=image.float(), cls=labels[image, slot].float(), bboxes=cxcywh)


def divided(loss):
    "The loss: each part's sums by its own divisor."
    return sum(v/loss.normalizer[k.partition("/")[0]].clamp(min=1) for k, v in loss.sums.items())


def outputs_for(boxes, labels, size, strides, n_classes, kind):
    """Outputs of two heads that have learned something, of fresh ones, or of random ones.

    Returns leaves in the order of `PARTS`, and the grids.
    """
    grids = tuple((size[0]//s, size[1]//s) for s in strides)
    leaves = []
    points = points_for(grids, strides, boxes.device)
    center = points.xy*points.strides
    middle = (boxes[..., :2] + boxes[..., 2:])/2
    for seed in (0, 1):
        g = torch.Generator().manual_seed(seed)
        dice = torch.randn(len(boxes), 4, len(center), generator=g)
        if kind == "learned":
            away = ((center[:, None] - middle[:, None]).abs()/(boxes[..., 2:] - boxes[..., :2])[:, None]).amax(-1)
            near = boxes.gather(1, away.masked_fill((labels < 0)[:, None], 1e9).argmin(-1)[..., None].expand(-1, -1, 4))
            ltrb = torch.cat([center - near[..., :2], near[..., 2:] - center], -1)/points.strides
            reg = ltrb.transpose(1, 2)*(1 + .25*dice)
        else: reg = 2 + .3*dice if kind == "fresh" else 3*dice
        scores = torch.randn(len(boxes), n_classes, len(center), generator=g) - 3
        leaves += [reg.contiguous().requires_grad_(), scores.requires_grad_()]
    return leaves, grids


def both(leaves, grids): return YOLO26Outputs(YOLOOutputs(*leaves[2:], grids), YOLOOutputs(*leaves[:2], grids))


def compare(leaves, grids, boxes, labels, size, strides, gains=GAINS26, class_weights=None, epoch=0):
    feats = [torch.zeros(len(boxes), 1, *g) for g in grids]
    outputs = {part: dict(boxes=b, scores=s, feats=feats) for part, b, s in zip(PARTS, leaves[::2], leaves[1::2])}
    package = package_loss(strides, leaves[1].shape[1], gains, class_weights, epoch)
    batch = package_batch(boxes, labels, size)
    want_grads = torch.autograd.grad(package(outputs, batch)[0].sum()/len(boxes), leaves)
    have = yolo26_loss(both(leaves, grids), boxes, labels, strides, gains, class_weights, progress(epoch))
    have_grads = torch.autograd.grad(divided(have), leaves)
    assert torch.equal(have.total, divided(have))
    for part, share in zip(PARTS, (package.o2m, package.o2o)):
        values = getattr(package, part).loss(outputs[part], batch)[0]/len(boxes)*share
        for value, name in zip(values, ("box", "cls", "l1")):
            term = have.sums[f"{part}/{name}"]/have.normalizer[part].clamp(min=1)
            torch.testing.assert_close(term, value, rtol=5e-6, atol=1e-6, msg=lambda m: f"{part}/{name}: {m}")
    for a, b in zip(have_grads, want_grads): assert (a - b).norm() <= 1e-5*b.norm()
    return have


KINDS = [("learned", 0), ("fresh", 10), ("anything", 3)]


# the largest scene takes 2 s each time: by default with one kind
@pytest.mark.parametrize("name, kind, epoch", [
    pytest.param(name, *kind, marks=[pytest.mark.slow]*(name == "500 boxes" and kind != KINDS[0]))
    for name in SCENES for kind in KINDS])
def test_same_loss_and_gradients(name, kind, epoch):
    boxes, labels, size, strides, n_classes = scene(name)
    leaves, grids = outputs_for(boxes, labels, size, strides, n_classes, kind)
    loss = compare(leaves, grids, boxes, labels, size, strides, epoch=epoch)
    assert all((loss.normalizer[part] == 0) == (name == "all images empty") for part in PARTS)


def test_same_loss_for_boxes_smaller_than_a_cell():
    "The assignment that widens small targets: boxes of 2 to 6 px on a grid of 8 px."
    boxes, labels = oracles.random_scene(3, 20, (128, 160), 3, small=2., large=.03)
    assert (boxes[..., 2:] - boxes[..., :2]).max() < 8
    leaves, grids = outputs_for(boxes, labels, (128, 160), (8, 16, 32), 3, "learned")
    loss = compare(leaves, grids, boxes, labels, (128, 160), (8, 16, 32), epoch=7)
    assert loss.normalizer["one2one"] > 5


def test_same_loss_with_gains_and_class_weights():
    boxes, labels, size, strides, n_classes = scene("wide")
    leaves, grids = outputs_for(boxes, labels, size, strides, n_classes, "learned")
    gains = dict(box=5., cls=1.5, l1=6.)
    weights = torch.linspace(.2, 3., n_classes)
    plain = yolo26_loss(both(leaves, grids), boxes, labels, strides)
    loss = compare(leaves, grids, boxes, labels, size, strides, gains, weights)
    for part in PARTS:
        assert loss.sums[f"{part}/l1"].item() == pytest.approx(plain.sums[f"{part}/l1"].item()*4)
        assert loss.sums[f"{part}/cls"].item() != pytest.approx(3*plain.sums[f"{part}/cls"].item(), rel=.01)


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_head_weights_change_as_in_the_package(epochs):
    for epoch in range(epochs):
        package = package_loss((8, 16, 32), 2, epoch=epoch, epochs=epochs)
        weights = head_weights(progress(epoch, epochs))
        assert list(weights.values()) == pytest.approx([package.o2m, package.o2o], abs=1e-12)


def test_half_precision_outputs_are_counted_in_float32():
    boxes, labels, size, strides, n_classes = scene("ordinary")
    leaves, grids = outputs_for(boxes, labels, size, strides, n_classes, "learned")
    half = [t.detach().bfloat16() for t in leaves]
    with torch.autocast("cpu", dtype=torch.bfloat16): loss = yolo26_loss(both(half, grids), boxes, labels, strides)
    want = yolo26_loss(both([t.float() for t in half], grids), boxes, labels, strides)
    for k in loss.sums: assert loss.sums[k].dtype == torch.float32 and torch.equal(loss.sums[k], want.sums[k])


def test_one_to_one_gives_a_box_one_point_and_a_point_one_box():
    boxes, labels, size, strides, n_classes = scene("100 boxes")
    leaves, grids = outputs_for(boxes, labels, size, strides, n_classes, "learned")
    outputs = both(leaves, grids)
    one = align(outputs.one2one, boxes, labels, strides, **PICKS["one2one"])
    many = align(outputs.one2many, boxes, labels, strides, **PICKS["one2many"])
    for keys in ((one.image, one.slot), (one.image, one.anchor)):
        assert len(torch.stack(keys).unique(dim=1)[0]) == len(one.image)
    assert .9*labels.numel() < len(one.image) < labels.numel() < len(many.image)  # nearly every box, though they crowd


# ---- the network

def trained_looks(model):
    "Weights with which each head predicts differently from point to point: statistics from images, high scores."
    g = torch.Generator().manual_seed(0)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    head = model.model[-1]
    for m in norms: m.momentum = .9
    with torch.no_grad():
        for p in [*head.one2one_cv2.parameters(), *head.one2one_cv3.parameters()]:
            if p.ndim > 1: p.add_(.1*p.std()*torch.randn(p.shape, generator=g))  # they begin as copies of the others
        large = torch.nn.functional.interpolate(torch.rand(4, 3, 6, 10, generator=g), (96, 160), mode="bilinear")
        model.train()(large + .3*torch.rand(4, 3, 96, 160, generator=g))
        for m in (*head.cv3, *head.one2one_cv3):
            m[-1].weight.mul_(20)
            m[-1].bias.fill_(-1)
        for m in (*head.cv2, *head.one2one_cv2): m[-1].weight.mul_(5)
    for m in norms: m.momentum = .03
    return model


def package_model(model):
    "The package's DetectionModel of the same description with the same weights, under the same names."
    package = ultralytics_tasks().DetectionModel(copy.deepcopy(
        graph_of(model.name, len(model.classes), package_folder()).layers),
                                                 ch=3,
                                                 verbose=False)
    package.load_state_dict(model.state_dict())
    return package


@pytest.mark.parametrize("name", ["yolo26n", "yolo26m"])
def test_same_detections_as_the_package(name):
    "Both heads' numbers; and what its end-to-end inference gives is what our runtime reads, without suppression."
    from jetson_det.runtime.postprocess import postprocess
    from jetson_det.runtime.preprocess import Preprocessor
    torch.manual_seed(0)
    model = trained_looks(YOLO26Detector(name, CLASSES)).eval()
    package = package_model(model).eval()
    x = torch.rand(2, 3, 96, 224, generator=torch.Generator().manual_seed(1))
    assert tuple(package.stride.tolist()) == model.strides
    package.end2end = True
    with torch.no_grad():
        want, raw = package(x)
        outputs = model(x)
        maps = model.features(x)
        boxes, scores = model.decode(outputs)
    assert outputs.one2many is None
    for part, have in (("one2one", outputs.one2one), ("one2many", model.run_head(maps))):
        torch.testing.assert_close(have.boxes, raw[part]["boxes"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(have.scores, raw[part]["scores"], rtol=1e-5, atol=1e-5)
    assert (raw["one2one"]["scores"] - raw["one2many"]["scores"]).abs().mean() > .01 and scores.std() > .01
    contract = model.contract((96, 224), confidence=0.).validate()
    _, fits = Preprocessor(contract)([np.zeros((96, 224, 3), np.uint8)]*2)
    for mine, theirs in zip(postprocess(contract, [boxes.numpy(), scores.numpy()], fits, max_detections=300), want):
        # ours end at the image's edge
        theirs[:, :4] = theirs[:, :4].clamp(min=0).minimum(torch.tensor([224., 96.]).repeat(2))
        theirs = theirs[(theirs[:, 2:4] > theirs[:, :2]).all(1)]
        assert len(theirs) > 200 and mine.labels.tolist() == theirs[:, 5].tolist()
        np.testing.assert_allclose(mine.scores, theirs[:, 4], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mine.boxes, theirs[:, :4], rtol=1e-5, atol=1e-3)


def test_same_gradients_of_the_whole_network_as_the_package():
    "Forward, loss and backward of a training step at epoch 4, BatchNorm learning."
    torch.manual_seed(0)
    model = trained_looks(YOLO26Detector("yolo26n", CLASSES))
    size = (64, 96)
    epoch = 4
    package = package_model(model).train()
    x = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(1))
    boxes, labels = oracles.random_scene(3, 5, size, 2)
    labels[1, 2:] = -1
    (package_loss(model.strides, 2, epoch=epoch)(package(x), package_batch(boxes, labels, size))[0].sum()/3).backward()
    model.train().progress = progress(epoch)
    divided(model.loss(model(x), boxes, labels)).backward()
    theirs = dict(package.named_parameters())
    assert sorted(theirs) == sorted(k for k, _ in model.named_parameters())
    whole = torch.cat([p.grad.flatten() for p in theirs.values()]).norm()
    for k, p in model.named_parameters():
        assert (p.grad - theirs[k].grad).norm() <= 1e-4*theirs[k].grad.norm() + 1e-6*whole, k


def test_each_parameter_learns_from_one_part():
    model = YOLO26Detector("yolo26n", CLASSES)
    size = (64, 96)
    boxes, labels = oracles.random_scene(2, 5, size, 2)
    groups = {part: [p for g in model.param_groups() if g["part"] == part for p in g["params"]] for part in PARTS}
    head = model.model[-1]
    of_one = {id(p) for convs in (head.one2one_cv2, head.one2one_cv3) for p in convs.parameters()}
    assert {id(p) for p in groups["one2one"]} == of_one
    for part, other in (PARTS, PARTS[::-1]):
        model.zero_grad(set_to_none=True)
        loss = model.loss(model(torch.rand(2, 3, *size)), boxes, labels)
        sum(v for k, v in loss.sums.items() if k.startswith(f"{part}/")).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in groups[part])
        assert all(p.grad is None for p in groups[other])


def test_an_empty_batch_reaches_every_parameter():
    "Several processes wait for one another's gradients, those of a batch without boxes too."
    model = YOLO26Detector("yolo26n", CLASSES)
    loss = model.loss(model(torch.rand(2, 3, 64, 96)), torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.long))
    sum(loss.sums.values()).backward()
    assert all(v == 0 for v in loss.normalizer.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_four_times_one_is_once_four():
    """Gradients of the whole network, BatchNorm frozen, images with many boxes and with none, each part by its own
    divisor."""
    torch.manual_seed(0)
    model = trained_looks(YOLO26Detector("yolo26n", CLASSES))
    g = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.eval()
    images = torch.randint(0, 256, (4, 3, 64, 96), generator=g).byte()
    boxes, labels = oracles.random_scene(4, 9, (64, 96), 2)
    for i, k in enumerate((9, 0, 1, 4)): labels[i, k:] = -1
    model.progress = .3
    def gradients(parts):
        model.zero_grad(set_to_none=True)
        losses = []
        for part in torch.arange(4).split(parts):
            losses.append(model.loss(model(model.normalize(images[part])), boxes[part], labels[part]))
            sum(losses[-1].sums.values()).backward()
        n = {part: sum(l.normalizer[part] for l in losses).clamp(min=1) for part in PARTS}
        assert abs(n["one2many"] - n["one2one"]) > 1
        return [p.grad/n[g["part"]] for g in model.param_groups() for p in g["params"]]
    whole = gradients(4)
    for parts in (1, 3):
        for a, b in zip(gradients(parts), whole): assert (a - b).norm() <= 1e-4*b.norm() + 1e-7


@pytest.mark.parametrize("name", slow_but("nm", YOLO26_NAMES))
def test_every_size_is_as_published(name):
    "Parameters and work of what ships: without the one-to-many head."
    with torch.device("meta"): model = YOLO26Detector(name, [f"class {i}" for i in range(80)])
    card = MODELS[name].card
    head = model.model[-1]
    assert count_params(model) - count_params(head.cv2) - count_params(head.cv3) == pytest.approx(card.params, rel=.01)
    assert count_gflops(model, (640, 640)) == pytest.approx(card.gflops, rel=.01) and card.input == 640
    published = [MODELS[n].card.ap for n in YOLO26_NAMES]
    assert published == sorted(published)


def test_fresh_heads_start_where_the_package_starts_them():
    ultralytics_tasks()
    package = ultralytics_tasks().DetectionModel(graph_of("yolo26n", 2, package_folder()).layers, ch=3, verbose=False)
    square = YOLO26Detector("yolo26n", CLASSES)
    wide = YOLO26Detector("yolo26n", CLASSES, input_size=(320, 640))
    for kind in ("cv2", "cv3", "one2one_cv2", "one2one_cv3"):
        for a, b, c in zip(*(getattr(m.model[-1], kind) for m in (square, package, wide))):
            torch.testing.assert_close(a[-1].bias, b[-1].bias)
            torch.testing.assert_close(c[-1].bias.exp(), b[-1].bias.exp()*(2 if kind.endswith("cv3") else 1))


def test_groups_and_stages_hold_every_parameter_once():
    model = YOLO26Detector("yolo26n", CLASSES)
    every = sorted(id(p) for p in model.parameters())
    groups = model.param_groups(.01)
    assert sorted(id(p) for g in groups for p in g["params"]) == every and len({g["name"] for g in groups}) == 6
    assert sorted(id(p) for modules in model.stages().values() for m in modules for p in m.parameters()) == every
    assert all(g["weight_decay"] == (.01 if g["name"].endswith("weights") else 0) for g in groups)
    assert list(model.stages()) == ["backbone", "neck", "head"] and model.license == LICENSE


def test_wrong_calls_are_one_line():
    with pytest.raises(InputError, match="unknown gain 'dfl'"): YOLO26Detector("yolo26n", CLASSES, gains=dict(dfl=1))
    with pytest.raises(InputError, match="unknown model 'yolo26q'.*yolo26"): YOLO26Detector("yolo26q", CLASSES)
    # it would train one head of the two
    with pytest.raises(InputError, match="unknown model 'yolo26n'"): UltralyticsDetector("yolo26n", CLASSES)
    with pytest.raises(InputError, match="unknown model 'yolo11n'"): YOLO26Detector("yolo11n", CLASSES)


# ---- export and training

def test_onnx_computes_the_same_with_one_head(tmp_path):
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    from jetson_det.export.onnx import export_onnx
    from jetson_det.models.graph import operators
    torch.manual_seed(0)
    model = trained_looks(YOLO26Detector("yolo26n", CLASSES))
    size = (64, 96)
    contract = export_onnx(model, tmp_path/"m.onnx", size)
    assert (contract.output, contract.opset) == ("queries", 13) and contract.extra["license"].startswith("AGPL-3.0")
    session = ort.InferenceSession(str(tmp_path/"m.onnx"), providers=["CPUExecutionProvider"])
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(2))
    boxes, scores = session.run(["boxes", "scores"], {"images": x.numpy()})
    with torch.no_grad(): want_boxes, want_scores = model.eval().decode(model(x))
    assert abs(boxes - want_boxes.numpy()).max() <= 1e-4*max(size) and abs(scores - want_scores.numpy()).max() <= 1e-4
    assert want_scores.std() > .01
    graph = onnx.load(str(tmp_path/"m.onnx"))
    head = model.model[-1]
    convs = operators(graph)["Conv"]
    def count_convs(part): return sum(isinstance(m, torch.nn.Conv2d) for m in part.modules())
    # the one-to-many head is not in the file
    assert convs == count_convs(model) - count_convs(head.cv2) - count_convs(head.cv3)
    computed = {
        "Shape", "Gather", "GatherND", "ConstantOfShape", "Range", "Expand", "Tile", "NonMaxSuppression", "TopK",
        "Loop", "If", "Where", "Cast", "Mod", "NonZero"
    }
    assert not computed & operators(graph).keys()


@pytest.mark.slow
def test_overfits_two_images(tmp_path):
    "And finds each object once, without NMS."
    from jetson_det.data.formats.registry import read_dataset
    from jetson_det.evaluate.coco import evaluate
    from jetson_det.models.session import torch_session
    from jetson_det.scenes.docks import write_scenes
    torch.manual_seed(0)
    size = (192, 320)  # of objects of some cells: the finest scale has a point every 8 px
    ds = read_dataset(write_scenes(tmp_path/"scenes", 2, size=size, splits={"train": 1.}, hard=0.))
    images, boxes, labels = padded_batch(ds)
    model = YOLO26Detector("yolo26n", ds.classes, input_size=size)
    def tell_progress(share): model.progress = share
    start = time.time()
    loss = overfit(model, images, boxes, labels, before_step=tell_progress)
    stats = evaluate(torch_session(model.eval(), size), ds, progress=False).stats
    _, scores = model.decode(model(model.normalize(images)))
    confident = int((scores > .5).sum())
    print(f"\n300 steps in {time.time() - start:.0f} s, {int((labels >= 0).sum())} boxes, {confident} predictions"
          f" over .5, loss {loss:.3f}, AP50 {stats['AP50']:.3f}, AP {stats['AP']:.3f}")
    assert stats["AP50"] > .95 and confident <= (labels >= 0).sum()
