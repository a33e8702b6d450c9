"""Every family: the same steps however a batch is split, and training on crowds, empty, single and wide images."""
import json
import os

import cv2
import numpy as np
import pytest
import torch
from train_helpers import (
    FAMILIES,
    PACKAGES,
    TWINS,
    Watch,
    config,
    distance,
    each_family,
    family_words,
    fitted,
    forkserver,
    installed,
    scenes,
    small_detrs,
)

from jetson_det.models.detr.loss import overlap
from jetson_det.models.zoo import create_model
from jetson_det.scenes.docks import write_scenes
from jetson_det.train import loop
from jetson_det.models.checkpoint import load_checkpoint, verify_checkpoint
from jetson_det.train.data import make_loader, training_data
from jetson_det.train.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(monkeypatch): small_detrs(monkeypatch.setitem)


# ---- 1 x 32 = 4 x 8 = 2 processes x 16

# anchor points, two heads whose parts have normalizers of their own, a decoder; the others go the same ways
ONE_OF_A_KIND = ("yolox-nano", "yolo26n", "dfine-n")
ALL_FAMILIES = [*each_family(ONE_OF_A_KIND), *each_family([n for n in FAMILIES if n not in ONE_OF_A_KIND], slow=True)]
# each decodes its boxes in a way of its own, but for the twins
DECODERS = [*each_family([n for n in FAMILIES if n not in TWINS]), *each_family(TWINS, slow=True)]
# AdamW moves every weight that has a gradient, however small
# 36 images: steps of 32 and of 4, twice
EXACT = [
    "data.input_size=[64,96]", "train.epochs=2", "train.no_aug_epochs=1", "train.warmup_epochs=0",
    "augment.multiscale=0", "train.optimizer=adamw", "train.lr=0.0001", "train.clip=0.1"
]


# fresh BatchNorm over a few pixels magnifies rounding from step to step
LEARNING = ["train.epochs=1", "train.no_aug_epochs=0", "train.optimizer=sgd", "train.clip=0", "train.lr=0.00001"]


def exactly(data, name, batch, accumulate, frozen):
    return config(
        data,
        *family_words(name, *EXACT, f"train.batch_size={batch}", f"train.accumulate={accumulate}",
                      f"train.freeze_bn={frozen}", *([] if frozen else LEARNING)))


@pytest.fixture(scope="module")
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data"), 48)


def rank_fitted(world, data, names, tmp):
    "In a process: every family, with BatchNorm frozen and learning; the first leaves states and steps in files."
    torch.set_num_threads(1)
    small_detrs()
    for name in names:
        for frozen in (True, False):
            world.names.clear() # of the figures of another family
            _, end, steps = fitted(exactly(data, name, 16, 1, frozen), tmp, world)
            if world.main: torch.save((end, steps), os.path.join(tmp, f"{name}-{frozen}.pt"))


@pytest.fixture(scope="module")
def two(data, tmp_path_factory, pytestconfig):
    "Where two processes with 16 images each have left what they came to."
    from jetson_det.train.launch import launch
    forkserver()
    tmp = tmp_path_factory.mktemp("two")
    with_slow = pytestconfig.getoption("--run-slow")
    names = [n for n in FAMILIES if installed(n) and (with_slow or n in ONE_OF_A_KIND)]
    launch(rank_fitted, 2, data, names, str(tmp), start="forkserver")
    return tmp


def same_steps(a, b):
    "The same images, as many positives or boxes, the same losses."
    images, normalizers, losses, _ = zip(*a)
    their_images, their_normalizers, their_losses, _ = zip(*b)
    assert list(images) == list(their_images) == [32, 4]*(len(a)//2) and np.isfinite(losses).all()
    np.testing.assert_allclose(normalizers, their_normalizers, rtol=2e-2) # who gets an anchor point is yes or no
    np.testing.assert_allclose(losses, their_losses, rtol=1e-3)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_one_times_32_is_4_times_8_is_2_processes_times_16(name, data, two, tmp_path, small):
    """BatchNorm frozen: the same weights and averages after four steps, the second and fourth of them short.

    Equal to a thousandth of the way they went; measured: 1e-4 and less.
    """
    start, whole, steps = fitted(exactly(data, name, 32, 1, True), str(tmp_path))
    in_four = fitted(exactly(data, name, 8, 4, True), str(tmp_path))[1:]
    in_two = torch.load(two/f"{name}-True.pt", weights_only=False)
    for end, theirs in (in_four, in_two):
        same_steps(steps, theirs)
        print(name, distance(whole, end, start))
        assert distance(whole, end, start) < 1e-3


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_batchnorm_learns_from_both_processes_images(name, data, two, tmp_path, small):
    start, whole, steps = fitted(exactly(data, name, 32, 1, False), str(tmp_path))
    end, theirs = torch.load(two/f"{name}-False.pt", weights_only=False)
    print(name, "statistics", distance(whole, end, start, learned=False), "weights", distance(whole, end, start))
    same_steps(steps, theirs)
    assert distance(whole, end, start, learned=False) < 1e-4
    assert distance(whole, end, start) < 5e-2


# ---- what data there may be

def edited(folder, change):
    "The labels of the training images, changed in place: `change(images, annotations)` gives the annotations."
    for split in ("train", "val"):
        file = folder/"annotations"/f"{split}.json"
        coco = json.loads(file.read_text())
        coco["categories"].append({"id": 3, "name": "Pallet"})
        if split == "train":
            changed = change(coco["images"], coco["annotations"])
            for i, a in enumerate(changed): a.update(id=i + 1, iscrowd=0, area=a["bbox"][2]*a["bbox"][3])
            coco["annotations"] = changed
        file.write_text(json.dumps(coco))
    return folder


def crowded(images, annotations):
    "500 boxes in the first image, one pallet among what is in the second, nothing in the others."
    dice = np.random.default_rng(0)
    wh = dice.uniform(6, 14, (500, 2))
    boxes = np.concatenate([dice.uniform(0, 1, (500, 2))*(96 - wh), wh], 1).round(2).tolist()
    crowd = [dict(image_id=images[0]["id"], category_id=1 + k % 2, bbox=box) for k, box in enumerate(boxes)]
    second = [a for a in annotations if a["image_id"] == images[1]["id"]]
    return [*crowd, *second, dict(image_id=images[1]["id"], category_id=3, bbox=[30, 20, 24, 36])]


# name -> images, a change of the labels, settings
CASES = {
    "a crowd, empty batches, a class with one example": (12, crowded, ["train.accumulate=1", "augment.mosaic=0"]),
    "one image": (2, None, ["train.batch_size=1"]),
    "one image, batch of 4": (2, None, ["train.batch_size=4"]),
    "three images, batch of 8": (4, None, ["train.batch_size=8"]),
}


@pytest.mark.parametrize("name", ALL_FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_trains_on_what_there_is(case, name, tmp_path, small, monkeypatch):
    "Through the whole of `train`: finite losses, a whole checkpoint, an evaluation."
    count, change, words = CASES[case]
    splits = {"train": .75, "val": .25} if count > 2 else {"train": .5, "val": .5}
    folder = write_scenes(tmp_path/"data", count, size=(96, 96), splits=splits, hard=0.)
    if change: edited(folder, change)
    watch = Watch()
    usual = loop.default_callbacks
    monkeypatch.setattr(loop, "default_callbacks", lambda: [watch, *usual()])
    words = family_words(name, "data.input_size=[64,96]", "train.epochs=2", "train.trackers=[]",
                         "train.save_minutes=60", *words)
    figures = train(config(folder, *words), tmp_path/"run")
    normalizers = [min(step[1]) for step in watch.steps]
    losses = [step[2] for step in watch.steps]
    assert len(watch.steps) == figures["steps"] >= 2 and np.isfinite(losses).all() and max(normalizers) > 0
    if change:
        assert min(normalizers) == 0
        assert load_checkpoint(tmp_path/"run"/"last").contract.classes[-1] == "Pallet"
    assert np.isfinite(figures["val"]["stats"]["AP50"])
    assert verify_checkpoint(tmp_path/"run"/"best") and verify_checkpoint(tmp_path/"run"/"last")


# ---- height is not width: from the loader to the decoded box

# (h, w) of the input; x1, y1, x2, y2 of an object in the upper right corner
WIDE = (64, 160)
SPOT = (112, 6, 150, 28)


@pytest.fixture(scope="module")
def corner(tmp_path_factory):
    "The loader's batch of one image, twice as large as the input, with something bright in its upper right corner."
    folder = tmp_path_factory.mktemp("corner")
    image = np.full((128, 320, 3), 60, np.uint8)
    x1, y1, x2, y2 = (2*v for v in SPOT)
    image[y1:y2, x1:x2] = 240
    box = dict(id=1, image_id=1, category_id=2, bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1)*(y2 - y1), iscrowd=0)
    coco = dict(images=[dict(id=1, file_name="a.png", width=320, height=128)],
                categories=[dict(id=1, name="Sack"), dict(id=2, name="Person")],
                annotations=[box])
    for part in ("annotations", "images/train"): (folder/part).mkdir(parents=True)
    cv2.imwrite(str(folder/"images/train/a.png"), image)
    (folder/"annotations/train.json").write_text(json.dumps(coco))
    plain = [f"augment.{k}=0" for k in ("mosaic", "hsv_prob", "flip", "multiscale")]
    cfg = config(folder, "data.input_size=[64,160]", "train.batch_size=1", *plain)
    ds = training_data(cfg, folder, lambda l: None)
    return next(make_loader(ds, cfg.data, cfg.augment, cfg.train, first_look=True).epoch(0))


def leaves_of(outputs): # the numbers of a network, to be changed one by one
    if isinstance(outputs, torch.Tensor):
        return outputs.detach().clone().requires_grad_() if outputs.is_floating_point() else outputs
    return type(outputs)(*map(leaves_of, outputs)) if hasattr(outputs, "_fields") else outputs


def tensors_of(outputs):
    if isinstance(outputs, torch.Tensor): return [outputs] if outputs.requires_grad else []
    return [t for o in outputs for t in tensors_of(o)] if hasattr(outputs, "_fields") else []


def best_box(name, batch, steps=150):
    """The best box, its class and its IoU with the object, after the outputs of a fresh network have followed the loss.

    The outputs themselves are trained, not the weights.
    """
    torch.manual_seed(0)
    model = create_model(name, ("Sack", "Person"))
    with torch.no_grad(): outputs = leaves_of(model(model.normalize(batch.images)))
    lr = .02 if PACKAGES.get(name) == "transformers" else .1
    optimizer = torch.optim.Adam(tensors_of(outputs), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(outputs, batch.boxes, batch.labels).total.backward()
        optimizer.step()
    with torch.no_grad(): boxes, scores = model.decode(outputs)
    at, label = divmod(int(scores[0].argmax()), 2)
    return boxes[0, at], label, float(overlap(boxes[0, at], torch.tensor(SPOT).float())[0])


def test_the_loader_puts_the_object_where_it_is_labeled(corner):
    bright = (corner.images[0].float().mean(0) > 150).nonzero()
    y1, x1 = bright.min(0).values.tolist()
    y2, x2 = (bright.max(0).values + 1).tolist()
    assert corner.images.shape == (1, 3, *WIDE) and corner.labels.tolist() == [[1]]
    assert np.abs(np.array([x1, y1, x2, y2]) - SPOT).max() <= 1
    assert (corner.boxes[0, 0] - torch.tensor(SPOT).float()).abs().max() <= 1


@pytest.mark.parametrize("name", DECODERS)
def test_what_the_loss_wants_is_what_is_decoded(name, corner, small):
    box, label, iou = best_box(name, corner)
    assert label == 1 and iou > .8, (box, iou)


@pytest.mark.parametrize("name", DECODERS)
def test_exchanged_axes_would_be_noticed(name, corner, small, monkeypatch):
    "In the boxes that the loss gets, and in those that are decoded."
    swapped = corner._replace(boxes=corner.boxes[..., [1, 0, 3, 2]])
    assert best_box(name, swapped)[2] < .5
    family = type(create_model(name, ("Sack", "Person")))
    usual = family.decode

    def exchanged(self, outputs):
        boxes, scores = usual(self, outputs)
        return boxes[..., [1, 0, 3, 2]], scores
    monkeypatch.setattr(family, "decode", exchanged)
    assert best_box(name, corner)[2] < .5


def box_and_receptive_field(name, at, size=(128, 320)):
    """For the point of the finest scale whose box is around `at`, px: the middle of the box and of what it sees.

    What a point sees of the image is known by its gradient.
    """
    torch.manual_seed(0)
    model = create_model(name, ("Sack", "Person")).eval()
    x = model.normalize(torch.randint(0, 256, (1, 3, *size),
                                      generator=torch.Generator().manual_seed(0)).byte()).requires_grad_()
    outputs = model(x)
    boxes = model.decode(outputs)[0][0].detach()
    outputs = getattr(outputs, "one2one", outputs) # YOLO26
    h, w = outputs.grids[0]
    middle = ((boxes[:, :2] + boxes[:, 2:])/2)[:h*w]
    point = (middle - torch.tensor(at)).norm(dim=1).argmin()
    logits = outputs.cls if hasattr(outputs, "cls") else outputs.scores.transpose(1, 2)
    seen = torch.autograd.grad(logits[0, point].sum(), x)[0][0].double().square().sum(0)
    x = (seen.sum(0)*torch.arange(size[1])).sum()
    y = (seen.sum(1)*torch.arange(size[0])).sum()
    return middle[point], torch.tensor([x, y])/seen.sum()


@pytest.mark.parametrize("name", each_family([n for n in FAMILIES if PACKAGES.get(n) != "transformers"]))
def test_a_point_sees_where_its_box_is(name):
    "(The DETRs' points: tests/models/detr/test_detr.py.)"
    for at in ((240., 40.), (80., 40.), (240., 88.), (80., 88.)):
        middle, seen = box_and_receptive_field(name, at)
        assert (middle - torch.tensor(at)).abs().max() <= 8 and (seen - middle).abs().max() <= 16, (at, middle, seen)


def embedded(name):
    "Of the map with self-attention: its cells, the tokens made of them, and the position embeddings they get."
    model = create_model(name, ("Sack", "Person")).eval()
    seen = {}
    aifi = model.net.encoder.aifi[0]
    def see_map(module, args, kw): seen["map"] = args[0] if args else kw["hidden_states"]
    def see_tokens(module, args, kw): seen.update(tokens=args[0], where=kw["spatial_position_embeddings"])
    aifi.register_forward_pre_hook(see_map, with_kwargs=True)
    aifi.layers[0].register_forward_pre_hook(see_tokens, with_kwargs=True)
    with torch.no_grad(): model(torch.rand(1, 3, *WIDE))
    return seen


def in_order(seen):
    "Is each token's embedding that of its own row and column?"
    _, d, h, w = seen["map"].shape
    omega = 1/10000**(np.arange(d//4)/(d//4))
    def embedding(y, x): return np.concatenate([np.sin(y*omega), np.cos(y*omega), np.sin(x*omega), np.cos(x*omega)])
    expected = np.stack([embedding(y, x) for y in range(h) for x in range(w)])
    same_tokens = torch.equal(seen["tokens"], seen["map"].flatten(2).transpose(1, 2))
    return h != w and same_tokens and np.allclose(seen["where"][0], expected, atol=1e-5)


@pytest.mark.parametrize("name", each_family([n for n in FAMILIES if PACKAGES.get(n) == "transformers"]))
def test_each_cell_gets_its_own_position(name, small):
    "Row by row, as the cells are; the embedding of the official code, column by column, would be noticed."
    seen = embedded(name)
    assert in_order(seen)
    _, d, h, w = seen["map"].shape
    by_column = seen["where"].view(1, h, w, d).transpose(1, 2).reshape(1, h*w, d)
    assert not in_order(dict(seen, where=by_column))
