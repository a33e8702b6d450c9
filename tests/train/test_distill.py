"""Distillation: every pair of families, exact over micro-batches, the teacher untouched, resume, classes by name,
and that it teaches."""
import copy
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402

import train_helpers as helpers  # noqa: E402
from jetson_det.core import InputError  # noqa: E402
from jetson_det.models.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from jetson_det.models.detector import Detector, part_of  # noqa: E402
from jetson_det.models.zoo import create_model  # noqa: E402
from jetson_det.train import distill  # noqa: E402
from jetson_det.train.distill import (  # noqa: E402
    Distiller,
    TeacherObjects,
    cell_weights,
    feature_sum,
    find_objects,
    make_distiller,
    neck_channels,
    predictions_of,
    score_sum,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = (64, 96)
CLASSES = ("Sack", "Person", "Van")
needs = {
    k: pytest.mark.skipif(importlib.util.find_spec(k) is None, reason=f"{k} is not installed")
    for k in ("ultralytics", "transformers")
}
PAIRS = [pytest.param("yolox-nano", "yolox-nano", id="same grid"),
         pytest.param("yolo11n", "yolox-nano", id="same grid, other family", marks=needs["ultralytics"]),
         pytest.param("yolo11n-p2-lite", "yolo11n", id="other strides", marks=needs["ultralytics"]),
         pytest.param("dfine-n", "yolox-nano", id="queries teach points", marks=needs["transformers"]),
         pytest.param("yolox-nano", "dfine-n", id="points teach queries", marks=needs["transformers"]),
         pytest.param("yolox-nano", "yolo26n", id="points teach two heads", marks=needs["ultralytics"])]


def network(name, seed=0, classes=CLASSES):
    "A network whose predictions differ from place to place, with BatchNorm as it is."
    torch.manual_seed(seed)
    model = create_model(name, classes)
    g = torch.Generator().manual_seed(seed)
    for k, p in model.named_parameters():
        if any(w in k for w in ("_preds", "cv2", "cv3", "score_head", "class_embed", "bbox")) and p.ndim > 1:
            p.data += torch.randn(p.shape, generator=g)*.6/p[0].numel()**.5
        if k.endswith("bias") and p.mean() < -2: p.data.fill_(-1.)  # priors of a percent and less
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms: m.momentum = 1.
    with torch.no_grad(): model(model.normalize(random_images(8)))
    for m in norms: m.eval().requires_grad_(False)
    return model


def random_images(n, size=SIZE, seed=0):
    "More of them begin with the same ones."
    found = [torch.rand(1, 3, 17, 25, generator=torch.Generator().manual_seed(100*seed + i)) for i in range(n)]
    return F.interpolate(torch.cat(found), size, mode="bilinear").mul(255).byte()


def labeled(n, size=SIZE, seed=0):
    "Boxes (n,3,4) and labels (n,3); the last image has none."
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(n, 3, 2, generator=g)*torch.tensor([size[1], size[0]])*.5
    labels = torch.randint(0, len(CLASSES), (n, 3), generator=g)
    labels[-1] = -1
    return torch.cat([low, low + 12 + 16*torch.rand(n, 3, 2, generator=g)], -1), labels


def sums_of(distiller, images, targets=()):
    student = distiller.networks[1]
    with distiller.watch(): outputs = student(student.normalize(images), *(targets if student.needs_targets else ()))
    return distiller.losses(images, outputs)


def pair(teacher, student, **kw):
    "A distiller whose teacher is sure of some objects in each image."
    teacher = network(teacher, 1)
    teacher.eval()
    with torch.no_grad(): predictions, = predictions_of(teacher, teacher(teacher.normalize(random_images(4))))
    confidence = float(predictions.scores.amax(-1).quantile(.9))
    return Distiller(teacher, network(student, 2), **{"confidence": confidence, **kw})


@pytest.mark.parametrize("teacher,student", PAIRS)
def test_the_gradient_is_the_same_however_a_step_is_cut(teacher, student):
    distiller = pair(teacher, student)
    images = random_images(4)
    targets = labeled(4)
    learns = [p for p in (*distiller.networks[1].parameters(), *distiller.parameters()) if p.requires_grad]

    def gradient(pieces):
        for p in learns: p.grad = None
        totals = {}
        for i in torch.arange(4).chunk(pieces):
            sums = sums_of(distiller, images[i], [t[i] for t in targets])
            sum(sums.values()).backward()
            for k, v in sums.items(): totals[k] = totals.get(k, 0.) + v.item()
        return totals, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in learns]

    def norm(tensors): return float(torch.stack(torch._foreach_norm(tensors)).norm())
    one, whole = gradient(1)
    four, cut = gradient(4)
    assert all(v > .01 for v in one.values()), one
    assert one == pytest.approx(four, rel=1e-3)
    adapters = len(distiller.strides) # the last of what learns
    for part in (slice(0, -adapters), slice(-adapters, None)): # student, adapters
        assert norm([w - c for w, c in zip(whole[part], cut[part])]) < 2e-3*norm(whole[part])
    assert all(float(w.abs().max()) > 0 for w in whole[-adapters:])


@pytest.mark.parametrize("kind", ["position", "overlap", "cost"])
def test_predictions_that_follow_the_terms_become_the_teachers(kind):
    "Boxes and scores as free parameters, assigned anew in each step."
    g = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[[10., 10, 40, 50], [50, 5, 90, 30], [60, 35, 80, 60]],
                          [[5, 20, 25, 40], [0, 0, 0, 0], [0, 0, 0, 0]]])
    scores = torch.tensor([[[.9, .05], [.1, .7], [.5, .4]], [[.8, .1], [0, 0], [0, 0]]])
    objects = TeacherObjects(boxes, scores, scores.amax(-1))
    if kind == "position": mine = boxes + torch.randn(boxes.shape, generator=g)*4
    else: mine = torch.cat([boxes + torch.randn(boxes.shape, generator=g)*4 for _ in range(4)], 1).flip(1)
    mine.requires_grad_()
    logits = (torch.randn(*mine.shape[:2], 2, generator=g) - 1).requires_grad_()
    optimizer = torch.optim.Adam([{"params": mine, "lr": .2}, {"params": logits, "lr": .1}])
    for _ in range(200):
        student = mine, logits.sigmoid()
        if kind == "position": terms = distill.point_sums(student, (boxes, scores), .1)
        elif kind == "overlap": terms = distill.object_sums(student, objects, distill.assign_by_overlap(mine, objects))
        else: terms = distill.object_sums(student, objects, distill.assign_by_cost(*student, objects, SIZE))
        optimizer.zero_grad()
        sum(terms).backward()
        optimizer.step()
    for i, slot in ((0, 0), (0, 1), (0, 2), (1, 0)):
        iou = distill.overlap(mine[i], boxes[i, slot])[0]
        p = logits[i].sigmoid()
        best = iou.argmax()
        assert iou[best] > .9 and (p[best] - scores[i, slot]).abs().max() < .1, (kind, i, slot, iou, p)


@pytest.mark.parametrize("teacher,student", PAIRS[:1] + PAIRS[3:4])
def test_the_teacher_stays_as_it_is(teacher, student):
    big = network(teacher, 1).train()
    small = network(student, 2)
    for m in big.modules(): m.train()
    before = copy.deepcopy(big.state_dict())
    distiller = Distiller(big, small, confidence=.001)
    distiller.train()
    sum(sums_of(distiller, random_images(2)).values()).backward()
    assert not big.training and all(p.grad is None and not p.requires_grad for p in big.parameters())
    assert all(torch.equal(v, before[k]) for k, v in big.state_dict().items())
    assert not any("teacher" in k or "student" in k for k in distiller.state_dict())
    assert len(list(distiller.parameters())) == len(distiller.strides)


def test_no_hook_is_left_behind():
    distiller = pair("yolox-nano", "yolox-nano")
    sums_of(distiller, random_images(1))
    for model in distiller.networks: assert not any(m._forward_pre_hooks for m in model.modules())
    assert distiller.maps == []
    student = distiller.networks[1]
    with pytest.raises(InputError, match="inside `watch`"):
        distiller.losses(random_images(1), student(student.normalize(random_images(1))))


def test_classes_are_matched_by_name():
    teacher = network("yolox-nano", 1)
    student = network("yolox-nano", 2)
    turned = create_model("yolox-nano", (CLASSES[2], "Truck", CLASSES[0].upper(), CLASSES[1]))
    state = teacher.state_dict()
    rows = [2, 0, 0, 1]
    state = {k: v[rows] if ".cls_preds." in k else v for k, v in state.items()}
    for k in state:
        if ".cls_preds." in k and k.endswith("bias"): state[k][1] = 9.  # what nobody asks for is seen everywhere
    turned.load_state_dict(state)
    one, two = (sums_of(Distiller(t, student, features=0.), random_images(2)) for t in (teacher, turned))
    assert {k: v.item() for k, v in one.items()} == pytest.approx({k: v.item() for k, v in two.items()}, rel=1e-6)


def test_a_class_that_only_the_student_knows_is_not_taught():
    student = network("yolox-nano", 2)
    distiller = Distiller(network("yolox-nano", 1, ("Person",)), student, confidence=.001)
    sum(sums_of(distiller, random_images(2)).values()).backward()
    grads = [p.weight.grad.abs().amax((1, 2, 3)) for p in student.head.cls_preds]
    assert all(g[0] == g[2] == 0 and g[1] > 0 for g in grads)


@needs["ultralytics"]
def test_two_heads_learn_apart():
    distiller = pair("yolox-nano", "yolo26n")
    groups = distiller.networks[1].param_groups()
    names = ("one2one/teacher_scores", "one2one/teacher_boxes", "one2many/teacher_scores", "one2many/teacher_boxes",
             "one2many/teacher_features")
    assert tuple(sums_of(distiller, random_images(1))) == names and distiller.param_groups()[0]["part"] == "one2many"
    for name in names:
        for p in distiller.networks[1].parameters(): p.grad = None
        sums_of(distiller, random_images(1))[name].backward()
        taught = {g["part"] for g in groups if any(p.grad is not None and p.grad.any() for p in g["params"])}
        assert taught == {part_of(name)}


@pytest.mark.parametrize("size", [(32, 64), (96, 64), (160, 224)])
def test_any_size_and_half_precision(size):
    distiller = pair("yolox-nano", "yolox-nano")
    student = distiller.networks[1]
    images = random_images(2, size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with distiller.watch(): outputs = student(student.normalize(images))
        sums = distiller.losses(images, outputs)
    assert all(v.dtype == torch.float32 and v.isfinite() for v in sums.values())
    full = sums_of(distiller, images)
    assert all(sums[k].item() == pytest.approx(full[k].item(), rel=.2) for k in full)


def test_a_teacher_who_sees_nothing_says_nothing_of_boxes():
    sums = sums_of(pair("yolox-nano", "yolox-nano", confidence=.9999), random_images(2))
    assert sums["teacher_boxes"] == 0 and sums["teacher_features"] == 0 and sums["teacher_scores"] > 0
    sum(sums.values()).backward()


def test_scores_are_cross_entropy_by_distance():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 3, generator=g).mul(4).double().requires_grad_()
    teacher = torch.rand(50, 3, generator=g).double()
    score_sum(logits.sigmoid(), teacher).backward()
    found = logits.grad
    logits.grad = None
    distance = (teacher - logits.detach().sigmoid()).abs()
    (F.binary_cross_entropy_with_logits(logits, teacher, reduction="none")*distance).sum().backward()
    torch.testing.assert_close(found, logits.grad, rtol=1e-5, atol=1e-6)
    far = torch.tensor([[-15.], [11.]], requires_grad=True)  # sure, and wrong: the gradient is still there
    score_sum(far.sigmoid(), torch.tensor([[.9], [.1]])).backward()
    assert far.grad[0] < -.7 and far.grad[1] > .7


def test_features_are_one_minus_the_correlation():
    a = torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    b = torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(1))
    found = feature_sum(a + .5*b, b, torch.full((2, 6, 7), 1/42.))
    pairs = zip((a + .5*b).flatten(0, 1).flatten(1), b.flatten(0, 1).flatten(1))
    right = sum(1 - np.corrcoef(x, y)[0, 1] for x, y in pairs)/5
    assert found.item() == pytest.approx(right, rel=1e-3)


def test_an_object_counts_once_on_every_map():
    g = torch.Generator().manual_seed(0)
    low = torch.rand(1, 40, 2, generator=g)*torch.tensor([90., 60.])
    boxes = torch.cat([low, low + torch.rand(1, 40, 2, generator=g)**2*40 + 1], -1)
    for i in range(40):
        for stride in (8, 16, 32):
            one = TeacherObjects(boxes[:, i:i + 1], torch.full((1, 1, 1), .7), torch.full((1, 1), .7))
            weights = cell_weights(one, (64//stride, 96//stride), stride)[0]
            assert weights.sum().item() == pytest.approx(.7, rel=1e-5)
            y, x = (((weights > 0).nonzero() + .5)*stride).T
            x1, y1, x2, y2 = boxes[0, i].tolist()
            assert ((x - (x1 + x2)/2).abs() <= max(x2 - x1, stride)/2 + stride).all()
            assert ((y - (y1 + y2)/2).abs() <= max(y2 - y1, stride)/2 + stride).all()


def test_duplicates_of_a_class_count_once():
    boxes = torch.tensor([[[0., 0, 20, 20], [1, 0, 21, 20], [0, 0, 20, 21], [50, 0, 60, 20], [50, 30, 60, 40]]])
    scores = torch.tensor([[[.5, 0], [.8, 0], [0, .6], [.3, .1], [.05, 0]]])
    objects = find_objects(boxes, scores, .1)
    assert objects.confidence[0].tolist() == pytest.approx([.8, .6, .3])
    assert objects.boxes[0].tolist() == boxes[0, [1, 2, 3]].tolist()
    assert find_objects(boxes, scores, .9).confidence.tolist() == [[0.]]


def saved_teacher(folder, seed=1, classes=CLASSES):
    teacher = network("yolox-nano", seed, classes)
    save_checkpoint(folder, teacher, None, None, {}, teacher.contract(SIZE))
    return SimpleNamespace(teacher=str(folder), scores=1., boxes=2., features=1., confidence=.01)


def test_what_is_learned_with_a_teacher_goes_on_where_it_was(tmp_path):
    cfg = saved_teacher(tmp_path/"teacher")

    def begin(student_state=None, checkpoint=None):
        torch.manual_seed(3)
        student = network("yolox-nano", 2)
        distiller = make_distiller(cfg, student)
        optimizer = torch.optim.SGD(
            [{"params": [p for p in student.parameters() if p.requires_grad]}, *distiller.param_groups()],
            1e-7, # the losses are sums: a larger rate ends in NaN after three steps on some CPUs
            momentum=.9)
        if checkpoint:
            student.load_state_dict(checkpoint.weights)
            optimizer.load_state_dict(checkpoint.optimizer)
            distiller.load_state_dict(checkpoint.state["distiller"])
        return student, distiller, optimizer

    def steps(student, distiller, optimizer, which):
        for i in which:
            optimizer.zero_grad()
            sum(sums_of(distiller, random_images(2, seed=i)).values()).backward()
            optimizer.step()
        return [p.detach().clone() for p in (*student.parameters(), *distiller.parameters())]
    whole = steps(*begin(), range(4))
    half = begin()
    steps(*half, range(2))
    save_checkpoint(tmp_path/"half", half[0], None, half[2], dict(distiller=half[1].state_dict()),
                    half[0].contract(SIZE))
    resumed = steps(*begin(checkpoint=load_checkpoint(tmp_path/"half")), range(2, 4))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(whole, resumed))
    cfg = saved_teacher(tmp_path/"another", seed=5)
    with pytest.raises(InputError, match="not those that the training began with"):
        begin(checkpoint=load_checkpoint(tmp_path/"half"))


def test_wrong_teachers_are_refused_in_a_line(tmp_path):
    student = network("yolox-nano", 2)
    cfg = saved_teacher(tmp_path/"teacher")
    assert make_distiller(SimpleNamespace(teacher=""), student) is None
    with pytest.raises(InputError, match="distill.teacher: .*nobody: no such folder"):
        make_distiller(SimpleNamespace(teacher=str(tmp_path/"nobody")), student)
    with pytest.raises(InputError,
                       match="distill.teacher: no class in common: it knows Sack, Person, Van; the data has Truck"):
        make_distiller(cfg, create_model("yolox-nano", ["Truck"]))
    weights = tmp_path/"teacher"/"weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match="distill.teacher: .*weights.safetensors"): make_distiller(cfg, student)
    with pytest.raises(InputError, match="are all 0"): Distiller(student, student, 0., 0., 0.)


def test_maps_of_every_family():
    assert neck_channels(network("yolox-nano")) == {8: 64, 16: 128, 32: 256}
    if importlib.util.find_spec("ultralytics"):
        assert list(neck_channels(create_model("yolo11n-p2-lite", CLASSES))) == [4, 8, 16]
    if importlib.util.find_spec("transformers"):
        assert neck_channels(create_model("dfine-n", CLASSES)) == {16: 128, 32: 128}
    class Other(Detector): names = ("other-s",)
    with pytest.raises(InputError, match="distill.features.*other-s.*distill.features=0"):
        Other("other-s", CLASSES).teacher_layers()


def test_a_training_with_a_teacher_resumes_bit_for_bit(tmp_path):
    from jetson_det.train.loop import train
    from jetson_det.train.state import TrainingError
    data = helpers.scenes(tmp_path/"scenes")
    teacher = tmp_path/"teacher"
    saved_teacher(teacher, classes=("Person", "Sack", "Van"))
    cfg = helpers.config(data, f"distill.teacher={teacher}", "distill.confidence=0.01")
    train(cfg, tmp_path/"whole")
    from jetson_det.train import loop
    done, count = loop.Stepper.step, []

    def breaks(self, *args, **kw):
        count.append(1)
        if len(count) == 4: raise TrainingError("broken off")
        return done(self, *args, **kw)
    loop.Stepper.step = breaks
    try:
        with pytest.raises(TrainingError): train(cfg, tmp_path/"parts")
    finally: loop.Stepper.step = done
    train(cfg, tmp_path/"parts", resume=True)
    whole = helpers.result_of(tmp_path/"whole")
    assert whole == helpers.result_of(tmp_path/"parts")
    assert any("teacher_features" in k for k in whole["rows"][0])
    assert "teacher" in (tmp_path/"whole"/"log.txt").read_text()
    assert not any("adapter" in k for k in load_checkpoint(tmp_path/"whole"/"best", training=False).weights)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path):
    from jetson_det.train.launch import train_processes
    data = helpers.scenes(tmp_path/"scenes")
    teacher = tmp_path/"teacher"
    saved_teacher(teacher, classes=("Sack", "Person"))
    more = [
        f"distill.teacher={teacher}", "distill.confidence=0.01", "train.freeze_bn=true", "train.epochs=1",
        "train.no_aug_epochs=0"
    ]
    train_processes(helpers.config(data, *more, "train.accumulate=2"), tmp_path/"one", processes=1)
    train_processes(helpers.config(data, *more, "train.accumulate=1"), tmp_path/"two", processes=2)
    one, two = (load_checkpoint(tmp_path/k/"last") for k in ("one", "two"))
    for k, v in one.weights.items(): torch.testing.assert_close(v, two.weights[k], rtol=1e-4, atol=1e-5)
    for k in one.state["distiller"]:
        if k.startswith("adapters"):
            torch.testing.assert_close(one.state["distiller"][k], two.state["distiller"][k], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("student", ["yolox-nano", pytest.param("dfine-n", marks=needs["transformers"])])
def test_a_student_comes_nearer_to_its_teacher(student):
    "The teacher overfits four scenes; students with the same initial weights take the same steps with and without it."
    from jetson_det.scenes.docks import CLASSES as names, dock_scene
    found = [dock_scene(s, (96, 128), objects=3, hard=0.) for s in (3, 5, 6, 7)]
    images = torch.from_numpy(np.stack([f[0] for f in found])).permute(0, 3, 1, 2)
    boxes = torch.zeros(4, 12, 4)
    labels = torch.full((4, 12), -1)
    for i, (_, b, la) in enumerate(found):
        boxes[i, :len(b)] = torch.from_numpy(b)
        labels[i, :len(la)] = torch.from_numpy(la)

    def fit(model, steps, lr, distiller=None):
        for m in model.train().modules():
            if isinstance(m, torch.nn.BatchNorm2d): m.momentum = .3
        optimizer = torch.optim.AdamW([*model.parameters(), *(distiller.parameters() if distiller else [])], lr)
        for i in range(steps):
            for g in optimizer.param_groups: g["lr"] = lr*min(1, (i + 1)/10, 2*(1 - i/steps))
            targets = [boxes, labels] if model.needs_targets else []
            sums = {}
            if distiller:
                with distiller.watch(): outputs = model(model.normalize(images), *targets)
                sums = distiller.losses(images, outputs)
            else: outputs = model(model.normalize(images), *targets)
            loss = model.loss(outputs, boxes, labels)
            optimizer.zero_grad()
            (sum({**loss.sums, **sums}.values())/loss.normalizer.clamp(min=1)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.)
            optimizer.step()
        return model.eval()

    torch.manual_seed(0)
    teacher = fit(create_model("yolox-nano", names), 60, 4e-3)
    with torch.no_grad(): objects = find_objects(*teacher.decode(teacher(teacher.normalize(images))), .3)
    assert (objects.confidence > 0).sum() >= 8

    def distance(model):
        "How much less confident of the teacher's objects, at an overlap of half or more."
        with torch.no_grad(): b, s = model.decode(model(model.normalize(images)))
        label = objects.scores.argmax(-1)
        same = distill.overlap(objects.boxes[:, :, None], b[:, None])[0] >= .5
        best = (s.gather(2, label[:, None].expand(-1, s.shape[1], -1)).transpose(1, 2)*same).amax(-1)
        real = objects.confidence > 0
        return float(((objects.confidence - best).abs()*real).sum()/real.sum())
    without = create_model(student, names)
    taught = copy.deepcopy(without)
    steps, lr = (30, 4e-3) if student == "yolox-nano" else (25, 5e-4)
    found = [distance(fit(without, steps, lr)), distance(fit(taught, steps, lr, Distiller(teacher, taught)))]
    print(student, found)
    assert found[1] < (.8 if student == "yolox-nano" else .95)*found[0]
