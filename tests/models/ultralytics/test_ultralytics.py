"""YOLOv8 and YOLO11 against the package Ultralytics: the same networks, boxes, loss and gradients."""
import copy
import importlib.util
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("ultralytics") is None:
    pytest.skip("the package ultralytics is not installed: pip install --no-deps ultralytics==8.4.190",
                allow_module_level=True)

import oracles  # noqa: E402
from jetson_det.core import InputError  # noqa: E402
from jetson_det.models.ultralytics.network import UltralyticsDetector  # noqa: E402
from jetson_det.models.ultralytics.package import package_folder, ultralytics_tasks  # noqa: E402
from jetson_det.models.ultralytics.graphs import YOLO_NAMES, graph_of  # noqa: E402
from jetson_det.models.ultralytics.loss import GAINS, YOLOOutputs, align, points_for, yolo_loss  # noqa: E402
from jetson_det.models.weights.load import load_weights  # noqa: E402
from jetson_det.models.detector import count_gflops, count_params  # noqa: E402
from jetson_det.models.zoo import MODELS  # noqa: E402

from yolo_scenes import SCENES, overfit, padded_batch, scene, slow_but  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ("Sack", "Person")


def theirs(outputs, boxes, labels, strides, size, gains=GAINS, class_weights=None):
    "The package's own loss on our outputs: (box, cls, dfl), not multiplied by the batch size."
    ultralytics_tasks()
    from ultralytics.utils.loss import v8DetectionLoss
    n_classes = outputs.scores.shape[1]
    h, w = size
    model = torch.nn.Linear(1, 1)
    model.args = SimpleNamespace(**gains)
    model.model = [SimpleNamespace(stride=torch.tensor(strides).float(), nc=n_classes, reg_max=16)]
    if class_weights is not None: model.class_weights = class_weights
    image, slot = (labels >= 0).nonzero(as_tuple=True)
    b = boxes[image, slot]
    cxcywh = torch.cat([(b[:, :2] + b[:, 2:])/2, b[:, 2:] - b[:, :2]], 1)/torch.tensor([w, h, w, h])
    batch = dict(batch_idx=image.float(), cls=labels[image, slot].float(), bboxes=cxcywh)
    feats = [torch.zeros(len(boxes), 1, *g) for g in outputs.grids]
    return v8DetectionLoss(model).get_assigned_targets_and_loss(
        dict(boxes=outputs.boxes, scores=outputs.scores, feats=feats), batch)[1]


def outputs_for(boxes, labels, size, strides, n_classes, kind, seed=0):
    "Outputs of a network that has learned something, of a fresh one, or of one that says anything."
    grids = tuple((size[0]//s, size[1]//s) for s in strides)
    points = points_for(grids, strides, boxes.device)
    g = torch.Generator().manual_seed(seed)
    n = len(points.xy)
    dice = torch.randn(len(boxes), 64, sum(h*w for h, w in grids), generator=g)
    if kind == "learned":
        center = points.xy*points.strides
        middle = (boxes[..., :2] + boxes[..., 2:])/2
        away = ((center[:, None] - middle[:, None]).abs()/(boxes[..., 2:] - boxes[..., :2])[:, None]).amax(-1)
        near = boxes.gather(1, away.masked_fill((labels < 0)[:, None], 1e9).argmin(-1)[..., None].expand(-1, -1, 4))
        ltrb = torch.cat([center - near[..., :2], near[..., 2:] - center], -1)/points.strides
        ltrb = ltrb*(1 + .25*dice[:, :4].transpose(1, 2))
        reg = -(torch.arange(16.) - ltrb.clamp(0, 14.9)[..., None])**2
        reg = reg.flatten(2).transpose(1, 2)
    else: reg = 2 + .3*dice if kind == "fresh" else 3*dice
    scores = torch.randn(len(boxes), n_classes, n, generator=g) - 3
    return [reg.contiguous().requires_grad_(), scores.requires_grad_()], grids


def compare(outputs, boxes, labels, size, strides, gains=GAINS, class_weights=None):
    leaves = outputs[:2]
    want = theirs(outputs, boxes, labels, strides, size, gains, class_weights)
    want_grads = torch.autograd.grad(want.sum(), leaves)
    have = yolo_loss(outputs, boxes, labels, strides, gains, class_weights)
    have_grads = torch.autograd.grad(have.total, leaves)
    for value, name in zip(want, ("box", "cls", "dfl")):
        term = have.sums[name]/have.normalizer.clamp(min=1)
        torch.testing.assert_close(term, value, rtol=2e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    for a, b in zip(have_grads, want_grads): assert (a - b).norm() <= 2e-5*b.norm()
    return have


@pytest.mark.parametrize("kind", ["learned", "fresh", "anything"])
@pytest.mark.parametrize("name", SCENES)
def test_same_loss_and_gradients(name, kind):
    boxes, labels, size, strides, n_classes = scene(name)
    leaves, grids = outputs_for(boxes, labels, size, strides, n_classes, kind)
    loss = compare(YOLOOutputs(*leaves, grids), boxes, labels, size, strides)
    assert (loss.normalizer == 0) == (name == "all images empty")


def test_same_loss_with_gains_and_class_weights():
    boxes, labels, size, strides, n_classes = scene("wide")
    leaves, grids = outputs_for(boxes, labels, size, strides, n_classes, "learned")
    outputs = YOLOOutputs(*leaves, grids)
    weights = torch.linspace(.2, 3., n_classes)
    plain = yolo_loss(outputs, boxes, labels, strides)
    loss = compare(outputs, boxes, labels, size, strides, dict(box=5., cls=1.5, dfl=.25), weights)
    assert loss.sums["box"].item() == pytest.approx(plain.sums["box"].item()*5/7.5)
    assert loss.sums["cls"].item() != pytest.approx(3*plain.sums["cls"].item(), rel=.01)


def test_half_precision_outputs_are_counted_in_float32():
    boxes, labels, size, strides, n_classes = scene("ordinary")
    leaves, grids = outputs_for(boxes, labels, size, strides, n_classes, "learned")
    half = [t.detach().bfloat16() for t in leaves]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = yolo_loss(YOLOOutputs(*half, grids), boxes, labels, strides)
    want = yolo_loss(YOLOOutputs(*[t.float() for t in half], grids), boxes, labels, strides)
    for k in loss.sums: assert loss.sums[k].dtype == torch.float32 and torch.equal(loss.sums[k], want.sums[k])


def test_each_point_has_one_box_and_each_box_ten_points_at_most():
    boxes, labels, size, strides, n_classes = scene("100 boxes")
    leaves, grids = outputs_for(boxes, labels, size, strides, n_classes, "learned")
    found = align(YOLOOutputs(*leaves, grids), boxes, labels, strides)
    assert len(torch.stack([found.image, found.anchor]).unique(dim=1)[0]) == len(found.anchor)
    points = points_for(grids, strides, boxes.device)
    at = (points.xy*points.strides)[found.anchor]
    box = boxes[found.image, found.slot]
    assert ((at > box[:, :2] - 8) & (at < box[:, 2:] + 8)).all()  # in the box, or in it as widened to 16 px
    assert 0 <= found.score.min() and found.score.max() <= 1


def trained_looks(model):
    """Weights of a network that says different things at different points: statistics from images, a head that is
    sure."""
    g = torch.Generator().manual_seed(0)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms: m.momentum = .9
    with torch.no_grad():
        large = torch.nn.functional.interpolate(torch.rand(4, 3, 6, 10, generator=g), (96, 160), mode="bilinear")
        model(large + .3*torch.rand(4, 3, 96, 160, generator=g))
        for m in model.model[-1].cv3:
            m[-1].weight.mul_(20)
            m[-1].bias.fill_(-1)
        for m in model.model[-1].cv2: m[-1].weight.mul_(10)
    for m in norms: m.momentum = .03
    return model


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolo11m", "yolo11n-p2", "yolo11n-p2-lite"])
def test_same_boxes_and_scores_as_the_package(name):
    "Its DetectionModel, made of the same description, with our weights under the same names, on a wide image."
    torch.manual_seed(0)
    model = trained_looks(UltralyticsDetector(name, CLASSES)).eval()
    tasks = ultralytics_tasks()
    graph = graph_of(name, 2, package_folder())
    package = tasks.DetectionModel(copy.deepcopy(graph.layers), ch=3, verbose=False)
    missing, unexpected = package.load_state_dict(model.state_dict(), strict=False)
    assert missing == [f"model.{len(model.model) - 1}.dfl.conv.weight"] and not unexpected
    assert tuple(package.stride.tolist()) == model.strides
    x = torch.rand(2, 3, 96, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = package.eval()(x)[0]
        boxes, scores = model.decode(model(x))
    cx, cy, w, h = want[:, :4].unbind(1)
    torch.testing.assert_close(boxes, torch.stack([cx - w/2, cy - h/2, cx + w/2, cy + h/2], -1), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(scores, want[:, 4:].transpose(1, 2), rtol=1e-5, atol=1e-6)
    assert scores.std() > .01 and (boxes[..., 2] - boxes[..., 0]).std() > 1  # there is something to compare
    def epsilons(net): return [m.eps for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert epsilons(model) == epsilons(package)


@pytest.mark.parametrize("name", slow_but("nm", YOLO_NAMES))
def test_every_size_is_as_published(name):
    with torch.device("meta"): model = UltralyticsDetector(name, [f"class {i}" for i in range(80)])
    card = MODELS[name].card
    assert count_params(model) == pytest.approx(card.params, rel=.02)
    assert count_gflops(model, (640, 640)) == pytest.approx(card.gflops, rel=.01)
    assert (card.ap is None) == (MODELS[name].url is None) == ("p2" in name)


def test_fresh_heads_start_where_the_package_starts_them():
    tasks = ultralytics_tasks()
    package = tasks.DetectionModel(graph_of("yolo11n-p2", 2).layers, ch=3, verbose=False)
    square = UltralyticsDetector("yolo11n-p2", CLASSES)
    wide = UltralyticsDetector("yolo11n-p2", CLASSES, input_size=(320, 640))
    for kind in ("cv2", "cv3"):
        for a, b, c in zip(*(getattr(m.model[-1], kind) for m in (square, package, wide))):
            torch.testing.assert_close(a[-1].bias, b[-1].bias)
            torch.testing.assert_close(c[-1].bias.exp(), b[-1].bias.exp()*(2 if kind == "cv3" else 1))


def test_eight_times_one_is_once_eight():
    "Gradients of the whole network, BatchNorm frozen, images with many boxes and with none."
    torch.manual_seed(0)
    model = UltralyticsDetector("yolo11n-p2-lite", CLASSES)
    g = torch.Generator().manual_seed(0)
    model.eval()
    images = torch.randint(0, 256, (8, 3, 64, 96), generator=g).byte()
    boxes, labels = oracles.random_scene(8, 9, (64, 96), 2)
    for i, k in enumerate((9, 0, 1, 3, 9, 0, 2, 5)): labels[i, k:] = -1
    def gradients(parts):
        model.zero_grad()
        losses = []
        for part in torch.arange(8).split(parts):
            loss = model.loss(model(model.normalize(images[part])), boxes[part], labels[part])
            sum(loss.sums.values()).backward()
            losses.append(loss)
        n = sum(l.normalizer for l in losses).clamp(min=1)
        return [p.grad/n for p in model.parameters()]
    whole = gradients(8)
    for parts in (1, 3):
        for a, b in zip(gradients(parts), whole): assert (a - b).norm() <= 1e-4*b.norm() + 1e-7


def test_pixels_arrive_as_the_contract_says():
    "What training feeds is what an artifact is fed: color order, scale."
    from jetson_det.runtime.preprocess import Preprocessor
    model = UltralyticsDetector("yolov8n", CLASSES)
    g = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (64, 96, 3), generator=g).byte()
    x, _ = Preprocessor(model.contract((64, 96)).validate())([image.numpy()])
    torch.testing.assert_close(model.normalize(image.permute(2, 0, 1)[None]), torch.from_numpy(x), rtol=0, atol=1e-6)
    last = model.normalize(image.permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, model.normalize(image.permute(2, 0, 1)[None].contiguous()))


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n-p2-lite"])
def test_groups_and_stages_hold_every_parameter_once(name):
    model = UltralyticsDetector(name, CLASSES)
    every = sorted(id(p) for p in model.parameters())
    groups = {g["name"]: g for g in model.param_groups(.01)}
    assert sorted(id(p) for g in groups.values() for p in g["params"]) == every
    assert sorted(id(p) for modules in model.stages().values() for m in modules for p in m.parameters()) == every
    assert all(p.ndim == 4 for p in groups["weights"]["params"])
    assert all(p.ndim == 1 for k in ("norms", "biases") for p in groups[k]["params"])
    assert [groups[k]["weight_decay"] for k in ("weights", "norms", "biases")] == [.01, 0, 0]
    assert list(model.stages()) == ["backbone", "neck", "head"]


def test_a_copy_is_independent_and_says_the_same():
    model = UltralyticsDetector("yolo11n", CLASSES).eval()
    twin = copy.deepcopy(model)
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        want = model(x)
        for p in model.parameters(): p.zero_()
        assert torch.equal(twin(x).scores, want.scores)


def test_wrong_calls_are_one_line():
    with pytest.raises(InputError, match="did you mean 'yolo11n-p2'"): UltralyticsDetector("yolo11n-p3", CLASSES)
    with pytest.raises(InputError, match="unknown gain 'obj'"):
        UltralyticsDetector("yolo11n", CLASSES, gains=dict(obj=1))


def test_without_the_package(monkeypatch):
    for module in ("ultralytics", "ultralytics.nn", "ultralytics.nn.tasks"):
        monkeypatch.setitem(sys.modules, module, None)
    ultralytics_tasks.cache_clear()
    try:
        with pytest.raises(InputError, match=r"AGPL-3.0.*jetson_det\[ultralytics\]"):
            UltralyticsDetector("yolo11n", CLASSES)
    finally: ultralytics_tasks.cache_clear()


def test_the_import_leaves_no_trace(tmp_path):
    "No file in the home folder, no name looked up, nothing printed, the process as it was."
    code = """
import os, socket, sys, numpy, torch, cv2
def refuse(*a, **k): raise SystemExit("the network was asked")
socket.getaddrinfo = socket.socket.connect = refuse
cv2.setNumThreads(2)
save, env, prints = torch.save, dict(os.environ), numpy.get_printoptions()
from jetson_det.models.ultralytics.network import UltralyticsDetector
UltralyticsDetector("yolo11n-p2-lite", ["Sack"])
assert (torch.save, dict(os.environ), numpy.get_printoptions(), cv2.getNumThreads()) == (save, env, prints, 2)
assert "torchvision" not in sys.modules
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("YOLO_", "XDG_", "PYTEST"))}
    env.update(HOME=str(tmp_path), TMPDIR=str(tmp_path), PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and not [p for p in tmp_path.rglob("*") if "ltralytics" in p.name], done.stdout


# ---- weights

@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    "A yolo11s as Ultralytics has it: half precision, the head's constant, names of its own."
    from jetson_det.runtime.contract import COCO_CLASSES
    model = UltralyticsDetector("yolo11s", COCO_CLASSES)
    path = tmp_path_factory.mktemp("weights")/"yolo11s.pth"
    trained_looks(model)
    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save({"model": {**weights, "model.23.dfl.conv.weight": torch.arange(16.).view(1, 16, 1, 1).half()}}, path)
    return model, path


def test_classes_are_carried_by_name(coco):
    teacher, path = coco
    student = UltralyticsDetector("yolo11s", ["sack", "Person", "truck"])
    report = load_weights(student, path)
    assert (report.carried, report.fresh, report.missing, report.unexpected) == (("Person", "truck"), ("sack",), (), ())
    x = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        have = student.eval()(x)
        want = teacher.eval()(x)
    torch.testing.assert_close(have.boxes, want.boxes, rtol=.02, atol=.05)
    torch.testing.assert_close(have.scores[:, 1:], want.scores[:, [0, 7]], rtol=.02, atol=.05)
    # the new class has its bias everywhere
    for scale in have.scores[:, 0].split([h*w for h, w in have.grids], 1): assert scale.std() < 1e-6


@pytest.mark.parametrize("name", ["yolo11s-p2", "yolo11s-p2-lite"])
def test_official_weights_in_a_graph_with_p2(name, coco):
    teacher, path = coco
    student = UltralyticsDetector(name, CLASSES)
    report = load_weights(student, path)
    ours = student.state_dict()
    theirs = teacher.state_dict()
    def same(here, there): return torch.equal(ours[here].half(), theirs[there].half())
    assert all(same(f"model.{i}.{k}", f"model.{i}.{k}") for i in (0, 6, 10, 16) for k in teacher.model[i].state_dict())
    assert same("model.25.cv1.conv.weight", "model.19.cv1.conv.weight") and report.fresh == CLASSES
    head = len(student.model) - 1
    assert same(f"model.{head}.cv2.1.2.weight", "model.23.cv2.0.2.weight")
    assert f"model.{head}.cv2.0.2.weight" in report.missing
    if name == "yolo11s-p2": assert same("model.28.cv1.conv.weight", "model.22.cv1.conv.weight")


def test_a_file_that_does_not_fit_changes_nothing(coco, tmp_path):
    model = UltralyticsDetector("yolo11n", CLASSES)
    before = copy.deepcopy(model.state_dict())
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path/"yolo11n.pt")
    (tmp_path/"torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (tmp_path/"m.onnx").write_bytes(b"")
    for path, words in ((coco[1], "not the weights of yolo11n: they are those of yolo11s; use model.name=yolo11s"),
                        (tmp_path/"yolo11n.pt", "jetson-det import-pt --trust"), (tmp_path/"torn.safetensors", "torn"),
                        (tmp_path/"m.onnx", "not an ONNX file"), (tmp_path/"no.pth", "no such file")):
        with pytest.raises(InputError, match=words): load_weights(model, path)
    with pytest.raises(InputError, match="2 class names for a head of 80"):
        load_weights(UltralyticsDetector("yolo11s", CLASSES), coco[1], CLASSES)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_safetensors_round_trip(tmp_path):
    from safetensors.torch import save_file
    model, twin = (UltralyticsDetector("yolo11n-p2-lite", CLASSES) for _ in range(2))
    save_file(model.state_dict(), str(tmp_path/"w.safetensors"))
    report = load_weights(twin, tmp_path/"w.safetensors", CLASSES[::-1])
    assert report.kind == "safetensors" and not report.missing and report.carried == CLASSES
    for a, b in zip(twin.model[-1].cv3, model.model[-1].cv3): assert torch.equal(a[-1].weight, b[-1].weight.flip(0))


# ---- export and training

@pytest.mark.parametrize("name", ["yolov8n", "yolo11n-p2-lite"])
def test_onnx_computes_the_same(name, tmp_path):
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    from jetson_det.export.onnx import export_onnx
    from jetson_det.models.graph import operators
    torch.manual_seed(0)
    model = trained_looks(UltralyticsDetector(name, CLASSES)).eval()
    size = (96, 160)
    contract = export_onnx(model, tmp_path/"m.onnx", size)
    session = ort.InferenceSession(str(tmp_path/"m.onnx"), providers=["CPUExecutionProvider"])
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(2))
    boxes, scores = session.run(["boxes", "scores"], {"images": x.numpy()})
    with torch.no_grad(): want_boxes, want_scores = model.decode(model(x))
    assert abs(boxes - want_boxes.numpy()).max() <= 1e-4*max(size) and abs(scores - want_scores.numpy()).max() <= 1e-4
    assert want_scores.std() > .01 and contract.opset == 13 and contract.extra["license"].startswith("AGPL-3.0")
    computed = {
        "Shape", "Gather", "GatherND", "ConstantOfShape", "Range", "Expand", "Tile", "NonMaxSuppression", "TopK",
        "Loop", "If", "Where", "Cast", "Mod", "NonZero"
    }
    assert not computed & operators(onnx.load(str(tmp_path/"m.onnx"))).keys()


@pytest.mark.slow
def test_overfits_two_images(tmp_path):
    from jetson_det.data.formats.registry import read_dataset
    from jetson_det.evaluate.coco import evaluate
    from jetson_det.models.session import torch_session
    from jetson_det.scenes.docks import write_scenes
    torch.manual_seed(0)
    size = (96, 160)
    ds = read_dataset(write_scenes(tmp_path/"scenes", 2, size=size, splits={"train": 1.}, hard=0.))
    images, boxes, labels = padded_batch(ds)
    assert (labels >= 0).sum() == 16
    model = UltralyticsDetector("yolo11n-p2-lite", ds.classes, input_size=size)
    start = time.time()
    loss = overfit(model, images, boxes, labels)
    stats = evaluate(torch_session(model.eval(), size), ds, progress=False).stats
    print(f"\n300 steps in {time.time() - start:.0f} s, {int((labels >= 0).sum())} boxes, loss {loss:.3f},"
          f" AP50 {stats['AP50']:.3f}, AP {stats['AP']:.3f}")
    assert stats["AP50"] > .95


@pytest.mark.slow
def test_loss_takes_little_of_a_step():
    """Processor time for 8 images of 100 boxes at 640x640.

    Assignment, loss and its backward, as a share of the whole step and beside the package's own.
    """
    torch.manual_seed(0)
    model = UltralyticsDetector("yolo11n", [str(i) for i in range(80)])
    size = (640, 640)
    boxes, labels = oracles.random_scene(8, 100, size, 80)
    x = torch.rand(8, 3, *size)
    shares = []
    peers = []
    for _ in range(3):
        t = [time.process_time()]
        out = model(x)
        t.append(time.process_time())
        leaves = [v.detach().requires_grad_() for v in out[:2]]
        grads = torch.autograd.grad(model.loss(YOLOOutputs(*leaves, out.grids), boxes, labels).total, leaves)
        t.append(time.process_time())
        torch.autograd.backward(out[:2], grads)
        t.append(time.process_time())
        torch.autograd.grad(theirs(YOLOOutputs(*leaves, out.grids), boxes, labels, model.strides, size).sum(), leaves)
        t.append(time.process_time())
        shares.append((t[2] - t[1])/(t[3] - t[0]))
        peers.append((t[4] - t[3])/(t[2] - t[1]))
    print(f"\nshare of a step {min(shares):.2%}..{max(shares):.2%}; the package's takes"
          f" {min(peers):.1f}..{max(peers):.1f} times as long")
    assert sorted(shares)[1] < .05 and sorted(peers)[1] > 1
