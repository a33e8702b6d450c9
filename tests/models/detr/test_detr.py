"""The DETR family: forward and loss against transformers', h != w, exact accumulation, export, and that it learns."""
import copy
from functools import lru_cache

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from train_helpers import small_detrs

from jetson_det.core import InputError
from jetson_det.models.detr.deformable import sample_gather, sample_grid
from jetson_det.models.detr.denoising import attention_mask, denoising_of
from jetson_det.models.detr.loss import DETROutputs, Layers, fractions, match, xyxy
from jetson_det.models.detr.loss_dfine import (
    bin_values,
    boxes_from_sides,
    ddf_sums,
    fgl_sums,
    merge_matchings,
    right_bins,
)
from jetson_det.models.detr.network import RTDETR, anchor_boxes, detr_classes
from jetson_det.models.detr.sizes import SIZES
from jetson_det.models.zoo import MODELS, family_of

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = (96, 160)
CLASSES = ("Sack", "Person", "Van")
FAMILIES = ("rtdetr-r18", "rtdetrv2-r18", "dfine-n")


def network(name, seed=0, **kw):
    """A network that is not in its first state: boxes move, classes and distributions differ; BatchNorm as it is, as
    a training with train.freeze_bn has it."""
    torch.manual_seed(seed)
    model = family_of(name)(name, CLASSES, **{**dict(num_queries=40), **kw})
    g = torch.Generator().manual_seed(seed)
    for k, p in model.named_parameters():
        last = k.endswith(("layers.2.weight", "layers.2.bias", "reg_conf.layers.1.weight", "sampling_offsets.weight",
                           "attention_weights.weight"))
        if last or "class_embed.0.bias" in k: p.data += torch.randn(p.shape, generator=g) * .05
        if "enc_score_head.weight" in k: p.data += torch.randn(p.shape, generator=g) * .2
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms: m.momentum = 1.
    # activations of a trained network's size
    with torch.no_grad(): model(F.interpolate(torch.rand(4, 3, 6, 10, generator=g), (128, 160), mode="bilinear"))
    for m in norms: m.eval().requires_grad_(False)
    return model


@lru_cache
def fixed_network(name): return network(name).eval()


def scenes(counts, size=SIZE, pad=0, seed=0):
    "Images (uint8), boxes (B,G,4) and labels (B,G) with these numbers of boxes; pads lie between them."
    g = torch.Generator().manual_seed(seed)
    h, w = size
    n = max(counts) + pad
    images = F.interpolate(torch.rand(len(counts), 3, 6, 10, generator=g), size, mode="bilinear").mul(255).byte()
    boxes = torch.zeros(len(counts), n, 4)
    labels = torch.full((len(counts), n), -1)
    for i, k in enumerate(counts):
        wh = torch.rand(k, 2, generator=g) * torch.tensor([w, h]) * .4 + 6
        low = torch.rand(k, 2, generator=g) * (torch.tensor([w, h]) - wh)
        at = torch.randperm(n, generator=g)[:k].sort().values
        boxes[i, at] = torch.cat([low, low + wh], 1)
        labels[i, at] = torch.randint(0, len(CLASSES), (k,), generator=g)
    return images, boxes, labels


def theirs(model):
    "The same network, in transformers' own class."
    Config, Whole = detr_classes(model.published.kind)
    whole = Whole(Config.from_dict(model.net.config.to_dict()))
    left = whole.model.load_state_dict(model.net.state_dict(), strict=False)
    assert not left.unexpected_keys and all("points_scale" in k for k in left.missing_keys)
    return whole.eval()


def their_labels(boxes, labels, size=SIZE):
    targets = fractions(boxes, size)
    return [dict(class_labels=l[l >= 0], boxes=t[l >= 0]) for t, l in zip(targets, labels)]


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_is_transformers_at_h_unlike_w(name):
    model = network(name).eval()
    x = torch.rand(2, 3, 160, 96)
    with torch.no_grad(): ours, other = model(x), theirs(model)(x)
    assert ours.queries.boxes.shape == (1, 2, 40, 4) and ours.queries.boxes.std(2).min() > .003
    torch.testing.assert_close(ours.queries.logits[-1], other.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.queries.boxes[-1], other.pred_boxes, atol=1e-4, rtol=1e-4)


def test_layers_in_training_are_transformers():
    "Numbers of every layer, the encoder's among them; the gradients of the boxes differ on purpose."
    model = network("rtdetr-r18").train()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.eval()
    x = torch.rand(1, 3, *SIZE)
    ours = model(x)
    other = theirs(model).model(x)
    torch.testing.assert_close(ours.queries.logits[1:], other.intermediate_logits.transpose(0, 1), atol=1e-4, rtol=1e-4)
    boxes = other.intermediate_reference_points.transpose(0, 1)
    torch.testing.assert_close(ours.queries.boxes[1:], boxes, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.queries.logits[0], other.enc_topk_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.queries.boxes[0], other.enc_topk_bboxes, atol=1e-4, rtol=1e-4)
    first = torch.autograd.grad(ours.queries.boxes[-1].sum(), model.net.decoder.bbox_embed[1].layers[-1].bias)[0]
    assert first.abs().sum() > 0  # look forward twice


def test_position_embedding_belongs_to_its_cell():
    "Each token of the encoder is a cell, row by row, and its embedding is that of the cell's own row and column."
    model = network("rtdetr-r18").eval()
    seen = {}
    aifi = model.net.encoder.aifi[0]
    def see_map(module, args, kw): seen["map"] = args[0] if args else kw["hidden_states"]
    def see_tokens(module, args, kw): seen.update(tokens=args[0], where=kw["spatial_position_embeddings"])
    aifi.register_forward_pre_hook(see_map, with_kwargs=True)
    aifi.layers[0].register_forward_pre_hook(see_tokens, with_kwargs=True)
    with torch.no_grad(): model(torch.rand(1, 3, *SIZE))
    _, d, h, w = seen["map"].shape
    assert (h, w) == (3, 5)
    omega = 1 / 10000 ** (np.arange(d // 4) / (d // 4))
    for y in range(h):
        for x in range(w):
            right = np.concatenate([np.sin(y * omega), np.cos(y * omega), np.sin(x * omega), np.cos(x * omega)])
            np.testing.assert_allclose(seen["where"][0, y * w + x], right, atol=1e-5)
            torch.testing.assert_close(seen["tokens"][0, y * w + x], seen["map"][0, :, y, x])


@pytest.mark.parametrize("name", ["rtdetr-r18", "dfine-n"])
@pytest.mark.parametrize("at", [(24, 40), (24, 200), (104, 40), (72, 136)])
def test_what_is_painted_is_found_where_it_is(name, at):
    "A spot in the image changes the features of the cells around it, and the boxes of those cells lie around it."
    model = fixed_network(name)
    size = (128, 256)
    y, x = at
    blank = torch.full((1, 3, *size), .5)
    painted = blank.clone()
    painted[..., y - 6:y + 6, x - 6:x + 6] = 1.
    with torch.no_grad():
        a, sizes = model.features(painted)
        b, _ = model.features(blank)
    far = (a - b).abs().sum(-1)[0]
    anchors, valid = anchor_boxes(sizes)
    finest = sizes[0][0] * sizes[0][1]
    center = anchors.sigmoid()[far[:finest].argmax(), :2] * torch.tensor([256., 128.])
    assert (center - torch.tensor([float(x), float(y)])).abs().max() <= 24 and far.max() > 0


def test_gather_is_grid_sample():
    for seed, (h, w) in enumerate([(5, 12), (12, 5), (1, 3), (34, 60)]):
        g = torch.Generator().manual_seed(seed)
        value = torch.randn(6, 4, h, w, generator=g)
        points = torch.rand(6, 20, 3, 2, generator=g) * 2 - .5
        torch.testing.assert_close(sample_gather(value, points), sample_grid(value, points), atol=1e-4, rtol=1e-4)


# ---- the loss

def random_outputs(b, q=40, layers=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    boxes = torch.rand(layers, b, q, 4, generator=g) * .5 + .2
    return Layers(torch.randn(layers, b, q, len(CLASSES), generator=g) * 2 - 1, boxes)


def their_loss(config, layers, boxes, labels, noisy=None, dn=None):
    from transformers.loss import loss_rt_detr
    logits = layers.logits[1:]
    where = layers.boxes[1:]
    if noisy is not None:
        logits = torch.cat([noisy.logits, logits], 2)
        where = torch.cat([noisy.boxes, where], 2)
    logits = logits.transpose(0, 1)
    where = where.transpose(0, 1)
    meta = None
    if dn is not None:
        meta = dict(dn_positive_idx=[torch.nonzero(s >= 0)[:, 0] for s in dn.slot],
                    dn_num_group=int(dn.group.max()) + 1,
                    dn_num_split=[dn.labels.shape[1], layers.logits.shape[2]])
    found = loss_rt_detr.RTDetrForObjectDetectionLoss(
        logits[:, -1], their_labels(boxes, labels), "cpu", where[:, -1], config, logits, where,
        enc_topk_logits=layers.logits[0], enc_topk_bboxes=layers.boxes[0], denoising_meta_values=meta)
    return found[0]


@pytest.mark.parametrize("counts", [(3, 1, 7), (0, 5), (50, 2)])
def test_loss_is_transformers(counts):
    _, boxes, labels = scenes(counts, pad=2)
    model = network("rtdetr-r18")
    layers = random_outputs(len(counts))
    ours = model.loss(DETROutputs(layers, SIZE), boxes, labels)
    other = their_loss(model.net.config, layers, boxes, labels)
    torch.testing.assert_close(ours.total, other, rtol=1e-4, atol=1e-4)
    assert ours.normalizer == sum(counts)


@pytest.mark.parametrize("counts", [(4,), (6, 6), (120,)])
def test_loss_with_denoising_is_transformers(counts):
    "Images with equally many boxes have equally many groups: the published division by the batch's groups is ours."
    _, boxes, labels = scenes(counts)
    model = network("rtdetr-r18")
    layers = random_outputs(len(counts))
    dn = denoising_of(boxes, labels, SIZE, len(CLASSES))
    noisy = random_outputs(len(counts), dn.labels.shape[1], 3, seed=5)
    ours = model.loss(DETROutputs(layers, SIZE, noisy, dn), boxes, labels)
    other = their_loss(model.net.config, layers, boxes, labels, noisy, dn)
    torch.testing.assert_close(ours.total, other, rtol=1e-4, atol=1e-4)
    assert ours.sums["dn"] > 0


def test_dfine_terms_are_transformers():
    "FGL and DDF of one image and one pairing, layer by layer; and the decoding of sides."
    g = torch.Generator().manual_seed(0)
    model = network("dfine-n")
    q = 30
    _, boxes, labels = scenes((5,))
    from transformers.loss.loss_d_fine import DFineLoss
    from transformers.models.d_fine.modeling_d_fine import distance2bbox, weighting_function
    start = torch.rand(1, q, 4, generator=g) * .4 + .2
    corners = torch.randn(3, 1, q, 4, 33, generator=g)
    bins = bin_values()
    torch.testing.assert_close(bins, weighting_function(32, torch.tensor([.5]), torch.tensor([4.])))
    where = boxes_from_sides(start, corners, bins)
    torch.testing.assert_close(where[0], distance2bbox(start, (corners[0].softmax(-1) * bins).sum(-1), 4.))
    layers = Layers(torch.randn(3, 1, q, 3, generator=g), where, corners, start)
    targets = fractions(boxes, SIZE)
    counts = torch.tensor([5])
    pairs = merge_matchings(match(layers, targets, labels), q, 5)
    chosen = torch.bincount(pairs.image, minlength=1)
    share = chosen.sqrt(), (q - chosen).sqrt()
    real = torch.ones(1, q, dtype=torch.bool)
    fgl = fgl_sums(layers, pairs, targets, torch.ones(1))
    ddf = ddf_sums(layers, pairs, targets, counts, share, real)
    criterion = DFineLoss(model.net.config)
    for k in range(2):
        outputs = dict(logits=layers.logits[k], pred_boxes=where[k], pred_corners=corners[k].flatten(-2),
                       ref_points=start, teacher_corners=corners[-1].flatten(-2),
                       teacher_logits=layers.logits[-1].clone())
        other = criterion.loss_local(outputs, their_labels(boxes, labels), [(pairs.query, pairs.slot)], 1)
        torch.testing.assert_close(fgl[k], other["loss_fgl"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ddf[k] / 5, other["loss_ddf"], rtol=1e-4, atol=1e-4)


def test_boxes_out_of_a_side_s_reach_are_at_its_end():
    start = torch.tensor([[.5, .5, .1, .1]])
    left, share = right_bins(start, torch.tensor([[.5, .5, .9, .01]]), bin_values())
    assert left[0].tolist()[0] == 31 and share[0, 0] == 1 and 0 <= share.min() and left.min() >= 0


def test_merged_matchings_are_the_official_union():
    "Against the way D-FINE does it, one image after the other."
    _, boxes, labels = scenes((6, 3, 0), pad=1)
    layers = random_outputs(3, 12, 5)
    pairs = match(layers, fractions(boxes, SIZE), labels)
    merged = merge_matchings(pairs, 12, boxes.shape[1])
    got = {(i, q): s for _, i, q, s in torch.stack(merged, 1).tolist()}
    for image in range(3):
        votes = {}
        for _, i, q, s in torch.stack(pairs, 1).tolist():
            if i == image: votes[q, s] = votes.get((q, s), 0) + 1
        for q in {q for q, _ in votes}:
            best = max(n for (k, _), n in votes.items() if k == q)
            assert votes[q, got[image, q]] == best
    assert len(got) == len({(i, q) for i, q in zip(pairs.image.tolist(), pairs.query.tolist())})


@pytest.mark.parametrize("name", ["rtdetr-r18", pytest.param("rtdetrv2-r18", marks=pytest.mark.slow), "dfine-n"])
def test_four_micro_batches_are_one(name):
    "The gradient of 1x4 and 4x1, BatchNorm as it is: crowded, empty and padded images, denoising and all."
    model = network(name)
    images, boxes, labels = scenes((3, 0, 30, 1), pad=2)
    def gradient(parts):
        model.zero_grad()
        n = 0
        for p in parts:
            outputs = model(model.normalize(images[p]), boxes[p], labels[p])
            loss = model.loss(outputs, boxes[p], labels[p])
            sum(loss.sums.values()).backward()
            n += loss.normalizer
        assert n == 34
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) / n
    whole = gradient([slice(0, 4)])
    split = gradient([slice(i, i + 1) for i in range(4)])
    assert whole.norm() > 0 and (whole - split).norm() < 2e-3 * whole.norm()


@pytest.mark.parametrize("name", ["rtdetr-r18", "dfine-n"])
@pytest.mark.parametrize("counts", [(0, 0), (500,), (1, 0)])
def test_no_boxes_and_five_hundred_train(name, counts):
    model = network(name)
    if max(counts): images, boxes, labels = scenes(counts)
    else:
        images, _, _ = scenes((1, 1))
        boxes = torch.zeros(2, 0, 4)
        labels = torch.zeros(2, 0, dtype=torch.long)
    loss = model.loss(model(model.normalize(images), boxes, labels), boxes, labels)
    loss.total.backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    # several processes rely on it
    assert loss.normalizer == sum(counts) and all(p.grad is not None and p.grad.isfinite().all() for p in learning)
    assert loss.total > 0 and (sum(counts) or loss.sums["l1"] == loss.sums["dn"] == 0)


def test_class_weights_and_gains():
    _, boxes, labels = scenes((4, 2))
    layers = random_outputs(2)
    model = RTDETR("rtdetr-r18", CLASSES, gains=dict(l1=0))
    plain = model.loss(DETROutputs(layers, SIZE), boxes, labels)
    model.class_weights = torch.full((3,), 2.)
    heavy = model.loss(DETROutputs(layers, SIZE), boxes, labels)
    assert plain.sums["l1"] == 0 and heavy.sums["giou"] == plain.sums["giou"]
    assert plain.sums["vfl"] < heavy.sums["vfl"] < 2*plain.sums["vfl"]
    with pytest.raises(InputError, match="model.gains.l1 is -1"): RTDETR("rtdetr-r18", CLASSES, gains=dict(l1=-1))


# ---- denoising

def test_noise_is_the_image_s_own():
    "The same queries for an image by itself, in a batch, and with other padding; other boxes, other noise."
    _, boxes, labels = scenes((3, 40, 0), pad=3)
    batch = denoising_of(boxes, labels, SIZE, 3)
    single = denoising_of(boxes[:1], labels[:1], SIZE, 3)
    n = single.labels.shape[1]
    assert n == 198
    for one, many in zip(single, batch): assert torch.equal(one[0], many[0, :n])
    assert (batch.group[0, n:] == -1).all() and (batch.group[2] == -1).all()
    real = labels[0] >= 0
    packed = denoising_of(boxes[:1, real], labels[:1, real], SIZE, 3)
    assert torch.equal(packed.boxes, single.boxes)
    slots = torch.nonzero(real)[:, 0][packed.slot[packed.slot >= 0]]
    assert torch.equal(slots, single.slot[single.slot >= 0])
    other = denoising_of(boxes[:1] + 1, labels[:1], SIZE, 3)
    assert not torch.equal(other.boxes - single.boxes, torch.zeros_like(single.boxes))


def test_noise_is_as_published():
    """Positives overlap their box by more than .1 and keep their label 5/6 of the time (3 classes); negatives' sides
    are half to all of a side away."""
    boxes = torch.tensor([[[40., 30, 100, 70]]]).repeat(64, 1, 1) + torch.arange(64.)[:, None, None] / 10
    labels = torch.ones(64, 1, dtype=torch.long)
    dn = denoising_of(boxes, labels, SIZE, 3)
    right = fractions(boxes, SIZE)
    moved = (xyxy(dn.boxes) - xyxy(right)).abs() / right[..., [2, 3, 2, 3]]
    positive = dn.slot >= 0
    assert dn.labels.shape == (64, 200) and positive.sum() == 6400
    assert moved[positive].max() <= .5 + 1e-5 and abs(moved[positive].mean() - .25) < .01
    cut = (xyxy(dn.boxes) < 1e-5) | (xyxy(dn.boxes) > 1 - 1e-5)  # at the border
    whole = ~positive & ~cut.any(-1) & (dn.boxes[..., 2:] > 0).all(-1)  # sides may pass each other
    assert whole.sum() > 500 and (moved[whole] >= .5 - 1e-3).all()
    assert cut.float().mean() < .2 and moved[~positive].max() <= 1 + 1e-5


@pytest.mark.parametrize("name", ["rtdetr-r18", "dfine-n"])
def test_denoising_queries_do_not_leak(name):
    "Ordinary queries are as without denoising ones, and an image is as by itself."
    model = network(name)
    images, boxes, labels = scenes((2, 30))
    x = model.normalize(images)
    with torch.no_grad():
        without = model(x)
        batch = model(x, boxes, labels)
        single = model(x[:1], boxes[:1], labels[:1])
    torch.testing.assert_close(batch.queries.logits, without.queries.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch.queries.boxes[:, :1], single.queries.boxes, atol=1e-4, rtol=1e-4)
    d = single.noisy.logits.shape[2]
    torch.testing.assert_close(batch.noisy.boxes[:, :1, :d], single.noisy.boxes, atol=1e-4, rtol=1e-4)
    assert without.noisy is None and without.denoising is None


def test_every_row_sees_something_and_padding_is_unseen():
    mask = attention_mask(torch.tensor([[0, 0, 1, 1, -1], [-1] * 5]), 3)[:, 0] == 0
    assert mask.any(-1).all() and mask[:, :, 5:].all()
    assert not mask[:, :, 4].any() and not mask[1, :, :5].any() and not mask[:, 5:, :5].any()


# ---- the detector

def test_shares_of_the_backbones_rates():
    """The rates in the authors' files, backbone over rest: rtdetr_r18vd_6x_coco.yml and so on."""
    theirs = {
        "rtdetr-r18": 1e-5/1e-4, "rtdetr-r34": 1e-5/1e-4, "rtdetr-r50": 1e-5/1e-4,
        "rtdetrv2-r18": 1e-4/1e-4, "rtdetrv2-r34": 5e-5/1e-4, "rtdetrv2-r50": 1e-5/1e-4,
        "dfine-n": 4e-4/8e-4, "dfine-s": 1e-4/2e-4, "dfine-m": 2e-5/2e-4, "dfine-l": 1.25e-5/2.5e-4,
    }
    assert {name: size.lr_scale for name, size in SIZES.items()} == pytest.approx(theirs)


@pytest.mark.parametrize("name", ["rtdetr-r18", "rtdetr-r50", "dfine-n", "dfine-l"])
def test_groups_stages_and_frozen_norms(name):
    model = family_of(name)(name, CLASSES)
    learning = {id(p) for p in model.parameters()}
    groups = model.param_groups(1e-4)
    grouped = [id(p) for g in groups for p in g["params"]]
    assert len(grouped) == len(learning) and set(grouped) == learning
    weights = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    decayed = {k for k, p in model.named_parameters() if id(p) in weights}
    kinds = torch.nn.BatchNorm2d, torch.nn.LayerNorm
    norms = {f"{k}.weight" for k, m in model.named_modules() if isinstance(m, kinds)}
    assert not any(k.endswith("bias") for k in decayed) and not decayed & norms
    assert {g["lr_scale"] for g in groups} == {1., SIZES[name].lr_scale}
    staged = [id(p) for modules in model.stages().values() for m in modules for p in m.parameters()]
    assert len(staged) == len(set(staged)) and set(staged) == learning
    assert set(SIZES) == {name for name, row in MODELS.items() if row.module == "jetson_det.models.detr.network"}
    stays = all(not m.training and not m.weight.requires_grad for m in model.train().backbone_norms())
    assert stays == SIZES[name].frozen and model.net.encoder.lateral_convs[0].norm.training
    assert not any(m.training for m in model.eval().modules())
    assert all(m.training for m in family_of(name)(name, CLASSES, freeze_norm=False).backbone_norms())


def test_fresh_weights_are_the_official_ones():
    torch.manual_seed(0)
    for name in ("rtdetr-r18", "dfine-n", "rtdetrv2-r18"):
        net = family_of(name)(name, CLASSES).net
        for k, m in net.named_modules():
            if isinstance(m, torch.nn.BatchNorm2d): assert (m.weight == 1).all(), k
        for head in (*net.decoder.class_embed, net.enc_score_head):
            torch.testing.assert_close(head.bias.sigmoid(), torch.full((3,), .01))
        for head in (*net.decoder.bbox_embed, net.enc_bbox_head):
            assert not head.layers[-1].weight.any() and not head.layers[-1].bias.any()
        for layer in net.decoder.layers:
            offsets = layer.encoder_attn.sampling_offsets
            assert not offsets.weight.any() and offsets.bias.abs().max() >= 4
        assert net.denoising_class_embed.weight[-1].abs().sum() == 0


def test_input_is_rgb_and_the_contract_says_so():
    from jetson_det.runtime.preprocess import Preprocessor
    model = family_of("dfine-n")("dfine-n", CLASSES)
    frame = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    ours, _ = Preprocessor(model.contract(SIZE))([frame])
    images = torch.from_numpy(frame.transpose(2, 0, 1)[None].copy())
    torch.testing.assert_close(model.normalize(images), torch.from_numpy(ours), atol=1e-6, rtol=1e-6)


def test_copies_and_checkpoints(tmp_path):
    from safetensors.torch import load_file, save_file
    for name in ("rtdetr-r18", "dfine-n"):
        model = network(name).eval()
        x = torch.rand(1, 3, *SIZE)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, str(tmp_path/"w.safetensors"))
        other = network(name, seed=1).eval()
        other.load_state_dict(load_file(str(tmp_path/"w.safetensors")))
        with torch.no_grad(): same = [m.decode(m(x)) for m in (model, other, copy.deepcopy(model))]
        for boxes, scores in same[1:]: assert torch.equal(boxes, same[0][0]) and torch.equal(scores, same[0][1])


@pytest.mark.parametrize("name", ["rtdetr-r18", "dfine-n"])
def test_half_precision_trains(name):
    model = network(name)
    images, boxes, labels = scenes((3, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16): outputs = model(model.normalize(images), boxes, labels)
    assert outputs.queries.boxes.dtype == torch.float32
    loss = model.loss(outputs, boxes, labels)
    loss.total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


ABSENT = {"GridSample", "LayerNormalization", "GroupNormalization", "Mod", "NonZero", "RoiAlign", "OneHot", "Unique",
          "HardSwish", "Gelu", "Mish", "ScatterND", "GatherElements"}


# one small network by default; the export's own tests hold the others
@pytest.mark.parametrize("name, opset, dynamic", [
    pytest.param("rtdetr-r18", 13, False, marks=pytest.mark.slow),
    pytest.param("rtdetrv2-r18", 16, True, marks=pytest.mark.slow),
    pytest.param("dfine-n", 13, False, marks=pytest.mark.slow), ("dfine-n", 16, True)])
def test_exported_graph_is_the_network(name, opset, dynamic, monkeypatch):
    "Those with an open batch are narrow: it is the same graph of fewer numbers."
    import onnxruntime
    from jetson_det.models.graph import simplify_onnx, trace_onnx
    if dynamic: small_detrs(monkeypatch.setitem)
    model = network(name).eval()
    graph = simplify_onnx(trace_onnx(model, SIZE, opset, dynamic))
    assert not ABSENT & {n.op_type for n in graph.graph.node}
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    x = F.interpolate(torch.rand(3 if dynamic else 1, 3, 6, 10), SIZE, mode="bilinear")
    with torch.no_grad(): boxes, scores = model.decode(model(x))
    a, b = session.run(["boxes", "scores"], {"images": x.numpy()})
    np.testing.assert_allclose(a / 160, boxes / 160, atol=1e-4)
    np.testing.assert_allclose(b, scores, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rtdetr-r18", "rtdetrv2-r18", "dfine-n"])
def test_overfits_two_images(name, tmp_path):
    "From nothing, at 128x192: AP50 over .95 on the two images that it is trained on (1 to 3 minutes each on one core)."
    from jetson_det.data.formats.registry import read_dataset
    from jetson_det.evaluate.coco import evaluate
    from jetson_det.models.session import torch_session
    from jetson_det.runtime.preprocess import letterbox
    from jetson_det.scenes.docks import write_scenes
    size = (128, 192)
    ds = read_dataset(write_scenes(tmp_path/"data", 2, size=size, splits={"train": 1.}, hard=0.))
    torch.manual_seed(0)
    model = family_of(name)(name, ds.classes, num_queries=60, freeze_norm=False)
    images = []
    for path in ds.paths:
        image, _ = letterbox(cv2.imread(str(ds.root/path)), size)
        images.append(torch.from_numpy(image.transpose(2, 0, 1).copy()))
    images = torch.stack(images)
    n = np.bincount(ds.box_image, minlength=2).max()
    boxes = torch.zeros(2, n, 4)
    labels = torch.full((2, n), -1)
    for i in range(2):
        mine = ds.box_image == i
        boxes[i, :mine.sum()] = torch.from_numpy(ds.boxes[mine]).float()
        labels[i, :mine.sum()] = torch.from_numpy(ds.labels[mine]).long()
    groups = [dict(params=g["params"], weight_decay=g["weight_decay"]) for g in model.param_groups()]
    opt = torch.optim.AdamW(groups, lr=4e-4)
    for step in range(600):
        model.train()
        loss = model.loss(model(model.normalize(images), boxes, labels), boxes, labels)
        opt.zero_grad()
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        if step % 50 != 49: continue
        ap = evaluate(torch_session(model, size), ds, progress=False).stats["AP50"]
        if ap > .95: return
    pytest.fail(f"AP50 {ap:.3f} after {step + 1} steps")
