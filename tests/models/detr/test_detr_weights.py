"Weights of RT-DETR, RT-DETRv2 and D-FINE: hub folders, official names, our checkpoints, exported graphs."
import json
import re
import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from jetson_det.core import InputError  # noqa: E402
from jetson_det.models.detr.network import detr_classes  # noqa: E402
from jetson_det.models.detr.sizes import SIZES  # noqa: E402
from jetson_det.models.detr.weights import our_names, same_walk  # noqa: E402
from jetson_det.models.weights.load import load_weights, restore_batchnorm  # noqa: E402
from jetson_det.models.zoo import create_model  # noqa: E402
from jetson_det.runtime.contract import COCO_CLASSES  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ("sack", "person", "truck")
NAMES = ("dfine-n", "rtdetr-r18", "rtdetrv2-r18")


def trained(name, classes=CLASSES):
    "A model in evaluation mode whose every number is its own."
    torch.manual_seed(0)
    model = create_model(name, classes).eval()
    g = torch.Generator().manual_seed(0)
    for k, v in model.state_dict().items():
        if not v.is_floating_point() or k.endswith(("decoder.up", "reg_scale")): continue
        if k.endswith("running_var"): v.copy_(torch.rand(v.shape, generator=g) + .5)
        else: v.add_(torch.randn(v.shape, generator=g)*.02)
    return model


@pytest.fixture(scope="module")
def models(): return {name: trained(name) for name in NAMES}


def official(weights, name):
    "Our names -> those of lyuwenyu/RT-DETR and Peterande/D-FINE, written down apart from the rules under test."
    fine = name.startswith("dfine")
    first = name.startswith("rtdetr-")
    found = {}
    for k, v in weights.items():
        k = k[4:]
        b = "backbone."
        if k.startswith("backbone.model.embedder.embedder."):
            k = re.sub(r".*embedder\.(\d)", lambda m: f"backbone.conv1.conv1_{int(m[1]) + 1}", k)
        k = k.replace("backbone.model.embedder", "backbone.stem")
        if not fine:
            k = re.sub(r"backbone\.model\.encoder\.stages\.(\d)\.layers\.(\d)\.layer\.(\d)",
                       lambda m: f"backbone.res_layers.{m[1]}.blocks.{m[2]}.branch2{'abc'[int(m[3])]}", k)
            k = re.sub(r"backbone\.model\.encoder\.stages\.(\d)\.layers\.(\d)\.shortcut\.1",
                       r"backbone.res_layers.\1.blocks.\2.short.conv", k)
            k = re.sub(r"backbone\.model\.encoder\.stages\.(\d)\.layers\.(\d)\.shortcut",
                       r"backbone.res_layers.\1.blocks.\2.short", k)
        k = k.replace("backbone.model.encoder.stages", "backbone.stages").replace("convolution", "conv").replace(
            "normalization", "bn" if fine else "norm")
        k = re.sub(r"^encoder_input_proj\.(\d)\.([01])",
                   lambda m: f"encoder.input_proj.{m[1]}.{m[2] if first else ('conv', 'norm')[int(m[2])]}", k)
        k = re.sub(r"^decoder_input_proj\.(\d)\.([01])",
                   lambda m: f"decoder.input_proj.{m[1]}.{('conv', 'norm')[int(m[2])]}", k)
        k = re.sub(r"^enc_output\.([01])",
                   lambda m: f"decoder.enc_output.{m[1] if first else ('proj', 'norm')[int(m[1])]}", k)
        k = re.sub(r"^(enc_score_head|enc_bbox_head|denoising_class_embed)", r"decoder.\1", k)
        k = k.replace("decoder.class_embed", "decoder.dec_score_head").replace("decoder.bbox_embed",
                                                                               "decoder.dec_bbox_head")
        k = re.sub(r"^decoder\.(layers|lqe_layers|up|reg_scale)", r"decoder.decoder.\1", k)
        k = k.replace("encoder.aifi", "encoder.encoder").replace("encoder_attn_layer_norm", "norm2").replace(
            "encoder_attn", "cross_attn").replace("self_attn_layer_norm", "norm1")
        k = k.replace("mlp.fc", "linear").replace("mlp.layers.0", "linear1").replace("mlp.layers.1", "linear2").replace(
            "o_proj", "out_proj")
        k = k.replace("final_layer_norm", "norm3" if k.startswith("decoder") else "norm2")
        if fine:
            k = re.sub(r"_blocks\.(\d)\.csp_rep([12])", lambda m: f"_blocks.{m[1]}.cv{int(m[2]) + 1}.0", k)
            k = re.sub(r"_blocks\.(\d)\.conv([1234])",
                       lambda m: f"_blocks.{m[1]}." + {"1": "cv1", "2": "cv2.1", "3": "cv3.1", "4": "cv4"}[m[2]], k)
            k = re.sub(r"downsample_convs\.(\d)\.conv([12])", r"downsample_convs.\1.0.cv\2", k)
        found[k] = v
    for k in [k for k in found if ".q_proj." in k]:
        found[re.sub(r"q_proj\.(\w+)", r"in_proj_\1",
                     k)] = torch.cat([found.pop(k.replace("q_proj", p)) for p in ("q_proj", "k_proj", "v_proj")])
    return found


def same(model, source):
    found = model.state_dict()
    for k, v in source.state_dict().items():
        if "num_batches" not in k: assert torch.equal(found[k], v), k


# ---- official files ------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
def test_official_names(models, tmp_path, name):
    theirs = official(models[name].state_dict(), name)
    assert any("in_proj_weight" in k for k in theirs) and not any("net." in k or "mlp" in k for k in theirs)
    theirs.update({"decoder.anchors": torch.zeros(1, 8, 4), "decoder.valid_mask": torch.ones(1, 8, 1)})
    raw = {k: v*0 for k, v in theirs.items()}
    torch.save({"last_epoch": 71, "ema": {"module": theirs, "updates": 9}, "model": raw}, tmp_path/"a.pth")
    model = create_model(name, CLASSES)
    report = load_weights(model, tmp_path/"a.pth", CLASSES)
    assert (report.missing, report.unexpected, report.mismatched, report.carried) == ((), (), (), CLASSES)
    same(model, models[name])


def test_official_spot_checks():
    "Names copied from the repositories' own files, one of each kind."
    a = torch.zeros(2)
    three = torch.arange(6.)
    found = our_names({
        "backbone.res_layers.0.blocks.0.short.conv.weight": a,
        "backbone.res_layers.3.blocks.0.short.conv.norm.running_var": a, "backbone.conv1.conv1_3.norm.weight": a,
        "encoder.input_proj.2.1.running_mean": a, "encoder.input_proj.1.norm.bias": a,
        "encoder.pan_blocks.1.bottlenecks.2.conv1.conv.weight": a, "decoder.decoder.layers.1.norm2.bias": a,
        "decoder.dec_bbox_head.0.layers.2.weight": a, "decoder.enc_output.1.bias": a,
        "encoder.encoder.0.layers.0.norm2.weight": a, "decoder.decoder.layers.0.self_attn.in_proj_bias": three
    })
    assert set(found) >= {
        "net.backbone.model.encoder.stages.0.layers.0.shortcut.convolution.weight",
        "net.backbone.model.encoder.stages.3.layers.0.shortcut.1.normalization.running_var",
        "net.backbone.model.embedder.embedder.2.normalization.weight", "net.encoder_input_proj.2.1.running_mean",
        "net.encoder_input_proj.1.1.bias", "net.encoder.pan_blocks.1.bottlenecks.2.conv1.conv.weight",
        "net.decoder.layers.1.encoder_attn_layer_norm.bias", "net.decoder.bbox_embed.0.layers.2.weight",
        "net.enc_output.1.bias", "net.encoder.aifi.0.layers.0.final_layer_norm.weight"
    }
    assert found["net.decoder.layers.0.self_attn.k_proj.bias"].tolist() == [2., 3.]


# ---- the hub's folders ---------------------------------------------------------------------------

def hub_folder(folder, name, model, labels):
    "A folder that transformers writes, of a network with the model's weights."
    size = SIZES[name]
    Config, Whole = detr_classes(size.kind)
    label2id = {name: i for i, name in enumerate(labels)}
    config = Config(backbone_config=dict(size.backbone), **size.settings, id2label=dict(enumerate(labels)),
                    label2id=label2id)
    whole = Whole(config).eval()
    with torch.no_grad():
        found = whole.model.load_state_dict({k[4:]: v for k, v in model.state_dict().items()}, strict=False)
    assert not found.unexpected_keys and all("points_scale" in k for k in found.missing_keys)
    whole.save_pretrained(folder)
    return whole


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_transformers_wrote(models, tmp_path, name):
    whole = hub_folder(tmp_path/"hub", name, models[name], CLASSES)
    model = create_model(name, CLASSES).eval()
    report = load_weights(model, tmp_path/"hub")
    assert (report.kind, report.missing, report.unexpected, report.carried) == ("hub", (), (), CLASSES)
    same(model, models[name])
    x = torch.rand(1, 3, 320, 352, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): ours, theirs = model(x).queries, whole(x)
    distance = torch.cdist(torch.cat([ours.logits[-1], ours.boxes[-1]], -1),
                           torch.cat([theirs.logits, theirs.pred_boxes], -1),
                           compute_mode="donot_use_mm_for_euclid_dist")
    # cells that are equally sure may change places
    assert distance.amin(1).max() < 1e-3 and distance.amin(2).max() < 1e-3


def test_a_lone_safetensors_with_the_heads_at_the_top(models, tmp_path):
    "Files of transformers 4 have the heads twice, or once at the top; classes by `classes`."
    hub_folder(tmp_path/"hub", "dfine-n", models["dfine-n"], CLASSES)
    tensors = safetensors.load_file(tmp_path/"hub/model.safetensors")
    moved = {re.sub(r"^model\.decoder\.(class_embed|bbox_embed)", r"\1", k): v for k, v in tensors.items()}
    for kept in (moved, {**moved, **tensors}):
        safetensors.save_file({k: v.clone() for k, v in kept.items()}, tmp_path/"a.safetensors")
        model = create_model("dfine-n", CLASSES)
        report = load_weights(model, tmp_path/"a.safetensors", CLASSES)
        assert (report.kind, report.missing, report.unexpected) == ("safetensors", (), ())
        same(model, models["dfine-n"])


def test_folders_that_are_refused(models, tmp_path):
    model = create_model("dfine-n", CLASSES)
    hub_folder(tmp_path/"hub", "dfine-n", models["dfine-n"], CLASSES)
    config = json.loads((tmp_path/"hub/config.json").read_text())
    (tmp_path/"hub/config.json").write_text(json.dumps({**config, "id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(InputError, match="2 class names for a head of 3"): load_weights(model, tmp_path/"hub")
    (tmp_path/"hub/config.json").write_text(json.dumps({**config, "model_type": "detr"}))
    with pytest.raises(InputError, match="model_type 'detr'; those that are read: d_fine, rt_detr, rt_detr_v2"):
        load_weights(model, tmp_path/"hub")
    (tmp_path/"hub/config.json").write_text(
        json.dumps({**config, "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}))
    assert load_weights(model, tmp_path/"hub").carried == () # nobody named them
    (tmp_path/"hub/model.safetensors").rename(tmp_path/"hub/pytorch_model.bin")
    with pytest.raises(InputError, match="no model.safetensors .*pickle"): load_weights(model, tmp_path/"hub")


def test_voc_spellings_of_coco(tmp_path):
    "The hub's COCO files say sofa, aeroplane, motorbike, pottedplant, diningtable, tvmonitor."
    voc = {"couch": "sofa", "airplane": "aeroplane", "motorcycle": "motorbike", "potted plant": "pottedplant",
           "dining table": "diningtable", "tv": "tvmonitor"}
    source = create_model("dfine-n", COCO_CLASSES)
    torch.save(source.state_dict(), tmp_path/"a.pth")
    report = load_weights(create_model("dfine-n", ["couch", "potted_plant", "TV", "glove"]), tmp_path/"a.pth",
                          [voc.get(c, c) for c in COCO_CLASSES])
    assert (report.carried, report.fresh) == (("couch", "potted_plant", "TV"), ("glove",))


# ---- classes -------------------------------------------------------------------------------------

def test_rows_go_by_name_and_new_ones_stay_fresh(models, tmp_path):
    from jetson_det.models.checkpoint import save_checkpoint
    source = models["dfine-n"]
    save_checkpoint(tmp_path/"ckpt", source, None, None, {}, source.contract((64, 96)))
    model = create_model("dfine-n", ["glove", "Truck", "sack", "bag"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = load_weights(model, tmp_path/"ckpt")
    assert (report.kind, report.left) == ("checkpoint", ("person",))
    assert (report.carried, report.fresh) == (("Truck", "sack"), ("glove", "bag"))
    rows = [k for k in before if re.search(r"class_embed|enc_score_head", k)]
    assert set(report.mismatched) == set(rows) and len(rows) == 2*3 + 2 + 1
    after = model.state_dict()
    known = source.state_dict()
    for k in rows:
        new = after[k]
        old = known[k]
        assert torch.equal(new[1], old[2]) and torch.equal(new[2], old[0]), k
        assert torch.equal(new[0], before[k][0]) and torch.equal(new[3], before[k][3]), k
        if "denoising" in k: assert torch.equal(new[-1], old[-1]) and len(new) == 5


def test_the_wrong_model_is_named_and_nothing_changes(models, tmp_path):
    torch.save(official(models["rtdetr-r18"].state_dict(), "rtdetr-r18"), tmp_path/"r18.pth")
    torch.save(create_model("yolox-nano", CLASSES).state_dict(), tmp_path/"nano.pth")
    model = create_model("dfine-n", CLASSES)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError,
                       match="not the weights of dfine-n: they are those of rtdetr-r18; use model.name=rtdetr-r18"):
        load_weights(model, tmp_path/"r18.pth", CLASSES)
    with pytest.raises(InputError, match="they are those of yolox-nano"): load_weights(model, tmp_path/"nano.pth")
    with pytest.raises(InputError, match="not the weights of yolox-nano: they are those of rtdetr-r18"):
        load_weights(create_model("yolox-nano", CLASSES), tmp_path/"r18.pth")
    with pytest.raises(InputError, match="2 class names for a head of 3"):
        load_weights(create_model("rtdetr-r18", CLASSES), tmp_path/"r18.pth", ["a", "b"])
    torch.save({"decoder.x": torch.zeros(2)}, tmp_path/"none.pth")
    with pytest.raises(InputError, match="is missing"): load_weights(model, tmp_path/"none.pth")
    for k, v in model.state_dict().items(): assert torch.equal(v, before[k]), k


# ---- exported graphs -----------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("name, fresh, simplify", [
    ("dfine-n", False, True),
    ("dfine-n", True, True),
    ("rtdetr-r18", False, False),
    ("rtdetrv2-r18", False, True),
])
def test_a_graph_that_our_export_wrote(models, tmp_path, name, fresh, simplify):
    pytest.importorskip("onnx")
    from jetson_det.export.onnx import export_onnx, parity_frames
    frames = parity_frames((64, 96))[1:] # without the gray one, whose cells are equally sure and may change places
    source = create_model(name, CLASSES).eval() if fresh else models[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_onnx(source, tmp_path/"a.onnx", (64, 96), simplify=simplify, frames=frames)
        model = create_model(name, ["Truck", "glove", "sack"]).eval()
        x = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(2))
        report = load_weights(model, tmp_path/"a.onnx")
    with torch.no_grad(): want_boxes, want_scores = source.decode(source(x))
    assert (report.carried, report.fresh) == (("Truck", "sack"), ("glove",)) and report.folded > 50
    lost = {re.sub(r"\.\d+", "", k) for k in report.missing}
    last = len(model.net.decoder.layers) - 1
    assert not any(f"class_embed.{last}." in k for k in report.missing) and "net.denoising_class_embed.weight" in lost
    assert lost <= {
        "net.denoising_class_embed.weight", "net.decoder.class_embed.weight", "net.decoder.class_embed.bias",
        "net.decoder.up", "net.decoder.reg_scale", "net.decoder.lqe_layers.reg_conf.layers.weight",
        "net.decoder.lqe_layers.reg_conf.layers.bias"
    }
    # glove's fresh row has a say in the order of the cells, so the answers are compared with all classes known; cells
    # that are equally sure may change places
    all_known = create_model(name, CLASSES[::-1]).eval()
    load_weights(all_known, tmp_path/"a.onnx", batches=[(x*255).to(torch.uint8)])
    with torch.no_grad(): boxes, scores = all_known.decode(all_known(x))
    assert torch.allclose(scores.sort(1)[0], want_scores.flip(-1).sort(1)[0], atol=1e-3)
    assert torch.allclose(boxes.sort(1)[0], want_boxes.sort(1)[0], atol=.5)
    with pytest.raises(InputError, match=f"not a rtdetr-r34: it is a {name}; use model.name={name}"):
        load_weights(create_model("rtdetr-r34", CLASSES), tmp_path/"a.onnx")


def graph(*nodes, stored):
    onnx = pytest.importorskip("onnx")
    import numpy as np
    h = onnx.helper
    info = lambda n: onnx.helper.make_tensor_value_info(n, 1, [4])
    return h.make_model(
        h.make_graph([h.make_node(op, i, [o]) for op, i, o in nodes], "g", [info("x")], [info("y")],
                     [onnx.numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in stored.items()]))


def test_walking_two_graphs():
    a = graph(("Mul", ["x", "w"], "p"), ("Add", ["p", "b"], "q"), ("Relu", ["q"], "r"), ("Mul", ["r", "x"], "y"),
              stored=dict(w=[1, 2, 3, 4], b=[5, 6, 7, 8]))
    b = graph(("Mul", ["x", "s"], "k"), ("Add", ["k", "t"], "l"), ("Relu", ["l"], "m"), ("Mul", ["m", "x"], "y"),
              stored=dict(s=[9, 9, 9, 9], t=[8, 8, 8, 8]))
    assert [(p.tolist(), q.tolist()) for p, q in same_walk(a, b)] == [([1, 2, 3, 4], [9]*4), ([5, 6, 7, 8], [8]*4)]
    bare = graph(("Relu", ["x"], "m"), ("Mul", ["m", "x"], "y"), stored={})
    assert [q.tolist() for _, q in same_walk(a, bare)] == [[1]*4, [0]*4] # a factor of 1 and a term of 0 were left out
    crossed = graph(("Mul", ["x", "s"], "k"), ("Add", ["k", "t"], "l"), ("Relu", ["k"], "m"), ("Mul", ["m", "x"], "y"),
                    stored=dict(s=[9]*4, t=[8]*4))
    longer = graph(("Relu", ["x"], "m"), ("Mul", ["m", "x"], "z"), ("Relu", ["z"], "y"), stored={})
    assert same_walk(a, crossed) is None and same_walk(a, longer) is None and same_walk(bare, a) is None


def test_foreign_graphs_are_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    onnx.save(graph(("Relu", ["x"], "y"), stored={}), str(tmp_path/"a.onnx"))
    with pytest.raises(InputError, match="has no contract"):
        load_weights(create_model("dfine-n", CLASSES), tmp_path/"a.onnx")
    (tmp_path/"a.onnx").write_bytes(b"torn")
    with pytest.raises(InputError, match="torn"): load_weights(create_model("dfine-n", CLASSES), tmp_path/"a.onnx")


def test_restored_batchnorms_of_a_detr(models):
    model = trained("rtdetr-r18")
    x = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad(): want = model.decode(model(model.normalize(x)))
    restore_batchnorm(model, [x])
    with torch.no_grad(): have = model.decode(model(model.normalize(x)))
    assert torch.allclose(have[1], want[1], atol=1e-3)
    before = models["rtdetr-r18"].backbone_norms()[3]
    assert not torch.equal(model.backbone_norms()[3].running_mean, before.running_mean)


# ---- the families -----------------------------------------------------------------------------------

def test_every_family_reads_weights(tmp_path):
    from jetson_det.models.detector import Detector
    from jetson_det.models.zoo import families
    for family in families():
        assert family.fill is not Detector.fill and family.class_rows, family
        assert family.recognize.__func__ is not Detector.recognize.__func__, family
        assert family.read_onnx.__func__ is not Detector.read_onnx.__func__, family
    model = create_model("yolox-nano", CLASSES)
    torch.save(model.state_dict(), tmp_path/"a.pth")
    class New(type(model)):
        family = "new"
        fill = Detector.fill
    with pytest.raises(InputError, match="no weights are read for the family 'new'"):
        load_weights(New("yolox-nano", CLASSES), tmp_path/"a.pth")
