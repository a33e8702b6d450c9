"""Starting weights: files that fit, files that do not, ONNX graphs of every kind, and what the BatchNorms become."""
import io
import warnings
from functools import lru_cache

import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

import numpy as np  # noqa: E402
from torch import nn  # noqa: E402

import oracles  # noqa: E402
from jetson_det.core import InputError  # noqa: E402
from jetson_det.models.weights.conv_graph import conv_colors, first_difference, model_convs  # noqa: E402
from jetson_det.models.weights.load import load_weights, restore_batchnorm  # noqa: E402
from jetson_det.core import match_classes  # noqa: E402
from jetson_det.models.yolox.network import YOLOX  # noqa: E402
from jetson_det.models.zoo import create_model  # noqa: E402
from jetson_det.runtime.contract import COCO_CLASSES, METADATA_KEY  # noqa: E402
from train_helpers import small_detrs  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ("sack", "person", "truck")


def trained(name="yolox-nano", classes=CLASSES, seed=0):
    "A model in evaluation mode whose every number is its own."
    torch.manual_seed(seed)
    model = create_model(name, classes).eval()
    for k, v in model.state_dict().items():
        if k.endswith("running_var") or k.endswith("bn.weight"): v.uniform_(.5, 1.5)
        elif k.endswith("running_mean") or k.endswith("bn.bias"): v.normal_(0, .2)
    return model


class Raw(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, images): return self.model(images).raw


class Decoded(Raw):
    def forward(self, images): return self.model.decode(self.model(images))


def export(module, path, fold=True, names=None, contract=None):
    path.write_bytes(graph_bytes(module, fold))
    return changed(path, names, contract)


def export_trained(wrapper, path, fold=True, names=None, contract=None):
    "A file of `trained()`."
    path.write_bytes(graph_of_trained(wrapper, fold))
    return changed(path, names, contract)


def graph_bytes(module, fold):
    "An ONNX file as torch writes it."
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mode = torch.onnx.TrainingMode.EVAL if fold else torch.onnx.TrainingMode.PRESERVE
        torch.onnx.export(module, (torch.zeros(1, 3, 64, 96),), file, opset_version=13, dynamo=False, training=mode,
                          do_constant_folding=fold)
    return file.getvalue()


@lru_cache
def graph_of_trained(wrapper, fold): return graph_bytes(wrapper(trained()), fold)


def changed(path, names, contract):
    "Put a contract into a file, and other names."
    graph = onnx.load(str(path))
    if contract is not None: graph.metadata_props.add(key=METADATA_KEY, value=contract.to_json())
    if names: _rename(graph, names)
    onnx.save(graph, str(path))
    return path


def _rename(graph, prefix):
    new = {t.name: f"{prefix}{i}" for i, t in enumerate(graph.graph.initializer)}
    for t in graph.graph.initializer: t.name = new[t.name]
    for n in graph.graph.node:
        n.name = ""
        n.input[:] = [new.get(i, i) for i in n.input]


def same_function(a, b, size=(96, 64), tol=1e-4):
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3))*255
    with torch.no_grad():
        return all(torch.allclose(p, q, rtol=tol, atol=tol) for p, q in zip(a.eval()(x)[:3], b.eval()(x)[:3]))


# ---- .pth ----------------------------------------------------------------------------------------

@pytest.mark.skipif(oracles.yolox() is None, reason=oracles.MISSING)
@pytest.mark.parametrize("name", ["yolox-nano", "yolox-tiny"])
def test_official_pth(tmp_path, name):
    torch.manual_seed(0)
    theirs = oracles.yolox_model(name, 80)
    torch.save({"model": theirs.state_dict(), "optimizer": {"state": {}}, "start_epoch": 300}, tmp_path/"a.pth")
    ours = create_model(name, COCO_CLASSES)
    report = load_weights(ours, tmp_path/"a.pth")
    assert len(report.carried) == 80 and not (report.missing or report.unexpected or report.mismatched or report.fresh
                                              or report.folded)
    found = ours.state_dict()
    for k, v in theirs.state_dict().items(): assert torch.equal(found[k], v), k


@pytest.mark.parametrize("wrap", [
    lambda w: w,
    lambda w: {"model": w},
    lambda w: {"state_dict": {"module." + k: v for k, v in w.items()}},
    lambda w: {"model": {k: v*0 for k, v in w.items()}, "ema": {"module": w, "updates": 7}},
    lambda w: {k: v for k, v in w.items() if "num_batches" not in k},
    lambda w: {k: v.half() if v.is_floating_point() else v for k, v in w.items()},
], ids=["bare", "model", "parallel", "ema first", "no counters", "half"])
def test_pth_in_many_wrappings(tmp_path, wrap):
    source = trained()
    torch.save(wrap(source.state_dict()), tmp_path/"a.pth")
    model = create_model("yolox-nano", CLASSES)
    report = load_weights(model, tmp_path/"a.pth", classes=CLASSES)
    assert report.carried == CLASSES and not report.missing
    found = model.state_dict()
    for k, v in source.state_dict().items():
        have = found[k]
        # half precision
        assert have.dtype == v.dtype and ("num_batches" in k or torch.allclose(have, v, rtol=1e-3, atol=1e-4)), k


def test_unexpected_weights_are_reported(tmp_path):
    torch.save({**trained().state_dict(), "head.extra": torch.zeros(3)}, tmp_path/"a.pth")
    report = load_weights(create_model("yolox-nano", CLASSES), tmp_path/"a.pth", classes=CLASSES)
    assert report.unexpected == ("head.extra",) and "unexpected: head.extra" in str(report)


# ---- classes -------------------------------------------------------------------------------------

def test_rows_are_carried_by_name(tmp_path):
    source = trained(classes=COCO_CLASSES)
    torch.save({"model": source.state_dict()}, tmp_path/"a.pth")
    model = create_model("yolox-nano", ["Sack", "dog", "Person"])
    report = load_weights(model, tmp_path/"a.pth")
    assert (report.carried, report.fresh, len(report.left)) == (("dog", "Person"), ("Sack",), 78)
    assert {k.split(".")[1] for k in report.mismatched} == {"cls_preds"} and len(report.mismatched) == 6
    x = torch.rand(1, 3, 64, 64)*255
    with torch.no_grad(): a, b = model.eval()(x), source(x)
    dog = COCO_CLASSES.index("dog")
    torch.testing.assert_close(a.cls[..., 1:], b.cls[..., [dog, 0]])
    torch.testing.assert_close(a.reg, b.reg)
    assert torch.allclose(a.cls[..., 0].sigmoid(), torch.tensor(.01))


def test_same_number_of_classes_in_another_order(tmp_path):
    torch.save(trained().state_dict(), tmp_path/"a.pth")
    model = create_model("yolox-nano", CLASSES[::-1])
    load_weights(model, tmp_path/"a.pth", classes=CLASSES)
    found = model.state_dict()
    for k, v in trained().state_dict().items():
        assert torch.equal(found[k], v.flip(0) if "cls_preds" in k else v)


def test_unnamed_classes_start_anew(tmp_path):
    torch.save(trained().state_dict(), tmp_path/"a.pth")
    report = load_weights(create_model("yolox-nano", CLASSES), tmp_path/"a.pth")
    assert report.fresh == CLASSES and report.carried == ()


def test_matching_of_names():
    assert match_classes(["PERSON", "traffic_light", "person "], COCO_CLASSES) == [0, 9, 0]
    assert match_classes(["person", "Person"], ["Person", "person"]) == [1, 0]  # the exact name first
    assert match_classes(["a"], None) == [None]


def test_wrong_number_of_names(tmp_path):
    torch.save(trained().state_dict(), tmp_path/"a.pth")
    with pytest.raises(InputError, match="2 class names for a head of 3"):
        load_weights(create_model("yolox-nano", ["a"]), tmp_path/"a.pth", classes=["a", "b"])


# ---- what is refused -----------------------------------------------------------------------------

def test_wrong_size_names_the_right_one(tmp_path):
    torch.save({"model": trained("yolox-tiny").state_dict()}, tmp_path/"a.pth")
    model = create_model("yolox-nano", CLASSES)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError,
                       match="not the weights of yolox-nano: they are those of yolox-tiny; use model.name=yolox-tiny"):
        load_weights(model, tmp_path/"a.pth")
    for k, v in model.state_dict().items(): assert torch.equal(v, before[k])  # nothing half loaded


def test_weights_of_no_model(tmp_path):
    torch.save({"layer1.weight": torch.zeros(3)}, tmp_path/"a.pth")
    with pytest.raises(InputError, match="is missing"):
        load_weights(create_model("yolox-nano", CLASSES), tmp_path/"a.pth")
    torch.save([1, 2], tmp_path/"a.pth")
    with pytest.raises(InputError, match="holds no weights"):
        load_weights(create_model("yolox-nano", CLASSES), tmp_path/"a.pth")


@pytest.mark.parametrize("name, says", [
    ("none.pth", "no such file.*official weights"),
    ("a.bin", "not as .bin"),
    ("folder", "neither a checkpoint"),
])
def test_no_source(tmp_path, name, says):
    (tmp_path/"a.bin").write_bytes(b"x")
    (tmp_path/"folder").mkdir()
    with pytest.raises(InputError, match=says) as e: load_weights(create_model("yolox-nano", CLASSES), tmp_path/name)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("suffix", [".pth", ".onnx"])
def test_torn_file(tmp_path, suffix):
    path = tmp_path/("a" + suffix)
    model = create_model("yolox-nano", CLASSES)
    if suffix == ".pth": torch.save({"model": trained().state_dict()}, path)
    else: export_trained(Raw, path)
    data = path.read_bytes()
    for keep in (0, 1, 1000, len(data)//2, len(data) - 100):
        path.write_bytes(data[:keep])
        with pytest.raises(InputError) as e: load_weights(model, path)
        assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_a_pickle_of_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self): return open, (str(tmp_path/"ran"), "w")
    torch.save({"model": Evil()}, tmp_path/"a.pth")
    with pytest.raises(InputError, match="more than tensors"):
        load_weights(create_model("yolox-nano", CLASSES), tmp_path/"a.pth")
    assert not (tmp_path/"ran").exists()


# ---- checkpoints ---------------------------------------------------------------------------------

def test_checkpoint_folder(tmp_path):
    "The averaged weights where there are some; the classes from its contract; a torn one is refused."
    pytest.importorskip("safetensors")
    from jetson_det.models.checkpoint import save_checkpoint
    raw = trained(seed=1)
    averaged = trained(seed=2)
    for name, ema in (("both", averaged), ("raw", None)):
        save_checkpoint(tmp_path/name, raw, ema, None, {}, raw.contract((64, 96)))
        model = create_model("yolox-nano", ["Truck", "glove"])
        report = load_weights(model, tmp_path/name)
        assert (report.kind, report.carried, report.fresh) == ("checkpoint", ("Truck",), ("glove",))
        source = (ema or raw).state_dict()
        assert torch.equal(model.state_dict()["head.reg_preds.0.weight"], source["head.reg_preds.0.weight"])
        assert torch.equal(model.state_dict()["head.cls_preds.1.bias"][0], source["head.cls_preds.1.bias"][2])
    with pytest.raises(InputError, match="they are those of yolox-nano"):
        load_weights(create_model("yolox-tiny", CLASSES), tmp_path/"raw")
    file = tmp_path/"both/ema.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match="torn"): load_weights(create_model("yolox-nano", CLASSES), tmp_path/"both")


# ---- ONNX ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrapper, fold, names", [
    pytest.param(Raw, True, "w", id="raw folded nameless"),
    pytest.param(Raw, False, None, id="raw unfolded named"),
    pytest.param(Decoded, True, None, id="decoded folded named"),
    pytest.param(Decoded, False, "w", id="decoded unfolded nameless"),
])
def test_onnx_round_trip(tmp_path, wrapper, fold, names):
    source = trained()
    export_trained(wrapper, tmp_path/"a.onnx", fold, names)
    model = create_model("yolox-nano", CLASSES)
    report = load_weights(model, tmp_path/"a.onnx", classes=CLASSES)
    assert report.carried == CLASSES and not (report.missing or report.unexpected)
    assert report.folded == (104 if fold else 0)
    assert same_function(model, source)
    if not fold:
        found = model.state_dict()
        for k, v in source.state_dict().items():
            if "num_batches" not in k: torch.testing.assert_close(found[k], v, msg=k)


@pytest.mark.parametrize("classes", [("a",), ("a", "b", "c", "d")], ids=["1", "4"])
def test_onnx_with_awkward_class_counts(tmp_path, classes):
    "One class looks like the object layer, four look like the box layer."
    source = trained(classes=classes)
    export(Raw(source), tmp_path/"a.onnx", names="w")
    model = create_model("yolox-nano", classes)
    load_weights(model, tmp_path/"a.onnx", classes=classes)
    assert same_function(model, source)


def test_onnx_after_a_simplifier(tmp_path):
    onnxslim = pytest.importorskip("onnxslim")
    source = trained()
    export_trained(Decoded, tmp_path/"a.onnx", contract=source.contract((64, 96)))
    onnx.save(onnxslim.slim(onnx.load(str(tmp_path/"a.onnx"))), str(tmp_path/"b.onnx"))
    model = create_model("yolox-nano", ["Person", "Sack"])
    report = load_weights(model, tmp_path/"b.onnx")
    assert report.carried == ("Person", "Sack") and report.left == ("truck",)  # names from the contract inside
    x = torch.rand(1, 3, 64, 64)*255
    with torch.no_grad(): assert torch.allclose(model.eval()(x).cls, source.eval()(x).cls[..., [1, 0]], atol=1e-4)


def test_onnx_in_another_order_of_nodes(tmp_path):
    "A graph's nodes may stand in any order that respects what feeds what."
    source = trained()
    export_trained(Raw, tmp_path/"a.onnx", names="w")
    model = onnx.load(str(tmp_path/"a.onnx"))
    nodes = list(model.graph.node)
    known = {i.name for i in model.graph.initializer} | {i.name for i in model.graph.input} | {""}
    order = []
    while nodes:  # the last one that can stand here
        node = next(n for n in reversed(nodes) if all(i in known for i in n.input))
        nodes.remove(node)
        order.append(node)
        known |= set(node.output)
    del model.graph.node[:]
    model.graph.node.extend(order)
    onnx.save(model, str(tmp_path/"b.onnx"))
    again = create_model("yolox-nano", CLASSES)
    load_weights(again, tmp_path/"b.onnx", classes=CLASSES)
    assert same_function(again, source)


def test_onnx_of_another_size_and_of_no_yolox(tmp_path):
    export_trained(Raw, tmp_path/"nano.onnx")
    with pytest.raises(InputError, match="not a yolox-s: its graph is that of yolox-nano"):
        load_weights(create_model("yolox-s", CLASSES), tmp_path/"nano.onnx")
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(other, (torch.zeros(1, 3, 32, 32),), str(tmp_path/"other.onnx"), dynamo=False)
    with pytest.raises(
            InputError,
            match=r"not a yolox-nano: .*Conv.* has the weight \(8, 3, 3, 3\) where the model has \(16, 12, 3, 3\)"):
        load_weights(create_model("yolox-nano", CLASSES), tmp_path/"other.onnx")


@pytest.mark.parametrize("name, package, has_contract", [("yolo11n", "ultralytics", False),
                                                         ("rtdetr-r18", "transformers", True)])
def test_onnx_of_another_family_names_the_model(monkeypatch, tmp_path, name, package, has_contract):
    "By its graph, or by its contract."
    pytest.importorskip(package, reason=f"the package {package} is not installed")
    small_detrs(monkeypatch.setitem)
    theirs = trained()
    export_trained(Decoded, tmp_path/"nano.onnx", contract=theirs.contract((64, 96)) if has_contract else None)
    with pytest.raises(InputError, match=f"not a {name}: its graph is that of yolox-nano; use model.name=yolox-nano$"):
        load_weights(create_model(name, CLASSES), tmp_path/"nano.onnx")


def test_names_of_strangers_are_escaped(tmp_path):
    "In files, folders, classes and layers."
    name = "a\x1b[31mb\u202ec\nd\x9b2J"
    model = create_model("yolox-nano", CLASSES)
    folder = tmp_path/name
    folder.mkdir()
    (folder/"torn.pth").write_bytes(b"x")
    (folder/"torn.onnx").write_bytes(b"x")
    (folder/"torn.safetensors").write_bytes(b"x")
    torch.save({name: torch.zeros(3)}, folder/"strange.pth")
    torch.save({"model": trained(classes=("p", "q")).state_dict()}, folder/"w.pth")
    export_trained(Raw, folder/"nano.onnx")
    graph = onnx.load(str(folder/"nano.onnx"))
    for node in graph.graph.node:
        node.name = name
        del node.attribute[:]
    onnx.save(graph, str(folder/"nano.onnx"))
    (folder/"config.json").write_text('{"model_type": "\\u001b[31m\\u202e"}')
    said = []
    for source, classes in (("torn.pth", None), ("torn.onnx", None), ("torn.safetensors", None), ("strange.pth", None),
                            ("nano.onnx", None), ("w.pth", [name, "x", "y"]), ("gone.pth", None), (".", None)):
        with pytest.raises(InputError) as e: load_weights(model, folder/source, classes)
        said.append(str(e.value))
    said.append(str(load_weights(model, folder/"w.pth", [name, "q"])).replace("\n  ", ""))
    for text in said: assert text.isprintable(), text


def test_first_difference_in_the_middle():
    "The first convolution that differs is named, not the last or all of them."
    convs = list(model_convs(YOLOX, "yolox-nano", 3))
    place = next(i for i, c in enumerate(convs) if "dark4.0.dconv" in c.name)
    assert "dark4.0.dconv" in first_difference([*convs[:place], convs[place]._replace(stride=1), *convs[place + 1:]],
                                               convs)


@pytest.mark.parametrize("name", YOLOX.names)
def test_every_convolution_is_told_apart(name):
    for c in (1, 4): assert len(set(conv_colors(model_convs(YOLOX, name, c)))) == len(model_convs(YOLOX, name, c))


@pytest.fixture(scope="module")
def tasks():
    pytest.importorskip("ultralytics")
    from jetson_det.models.ultralytics.package import ultralytics_tasks
    return ultralytics_tasks()


def of_the_package(tasks, name, names):
    "A detector of the package Ultralytics, every number its own, and ours with its weights."
    net = tasks.DetectionModel(name + ".yaml", nc=len(names), verbose=False).eval()
    net.names = dict(enumerate(names))
    g = torch.Generator().manual_seed(0)
    for k, v in net.state_dict().items():
        if k.endswith("running_var"): v.uniform_(.5, 1.5, generator=g)
        elif k.endswith(("running_mean", "bn.bias")): v.normal_(0, .2, generator=g)
    ours = create_model(name, names).eval()
    ours.load_state_dict({k: v for k, v in net.state_dict().items() if ".dfl." not in k})
    return net, ours


def says_the_same(a, b, rows_a, rows_b, tol=1e-3):
    x = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(): (p, s), (q, t) = (m.eval().decode(m.eval()(x)) for m in (a, b))
    return torch.allclose(p, q, atol=1e-1, rtol=tol) and torch.allclose(s[..., rows_a], t[..., rows_b], atol=tol)


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
def test_onnx_as_ultralytics_exports_it(tasks, tmp_path, name):
    "Fused, with its own decoding and the convolution over the bins; the names as it writes them."
    import copy
    net, ours = of_the_package(tasks, name, CLASSES)
    fused = copy.deepcopy(net).fuse(verbose=False).eval()
    fused.model[-1].export = True
    fused.model[-1].format = "onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(fused, (torch.zeros(1, 3, 64, 96),), str(tmp_path/"a.onnx"), opset_version=17, dynamo=False)
    graph = onnx.load(str(tmp_path/"a.onnx"))
    graph.metadata_props.add(key="names", value=str(net.names))
    onnx.save(graph, str(tmp_path/"a.onnx"))
    assert any(tuple(i.dims) == (1, 16, 1, 1) for i in graph.graph.initializer)
    model = create_model(name, ["Person", "sack", "glove"])
    report = load_weights(model, tmp_path/"a.onnx")
    assert (report.carried, report.fresh) == (("Person", "sack"), ("glove",))
    assert (report.left, report.missing) == (("truck",), ()) and report.folded > 50
    assert says_the_same(model, ours, [0, 1], [1, 0])


def test_onnx_of_our_yolo11_into_its_p2_graph(tasks, tmp_path):
    _, ours = of_the_package(tasks, "yolo11n", CLASSES)
    export(Decoded(ours), tmp_path/"a.onnx", contract=ours.contract((64, 96)))
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    again = create_model("yolo11n", CLASSES)
    assert load_weights(again, tmp_path/"a.onnx", batches=[images]).folded == 0
    assert says_the_same(again, ours, [0, 1, 2], [0, 1, 2])
    lite = create_model("yolo11n-p2-lite", CLASSES)
    report = load_weights(lite, tmp_path/"a.onnx")
    early, restored = (m.state_dict()["model.4.cv1.conv.weight"].flatten(1) for m in (lite, again))
    torch.testing.assert_close(nn.functional.normalize(early), nn.functional.normalize(restored)) # but for its size
    assert len(report.loaded) > 200
    with pytest.raises(InputError, match="not a yolov8n: "):
        load_weights(create_model("yolov8n", CLASSES), tmp_path/"a.onnx")


def test_layers_that_a_graph_cannot_tell_apart(tasks, tmp_path):
    "YOLOv8-n with 64 classes: its box and its class branch look the same."
    names = [f"c{i}" for i in range(64)]
    export(Decoded(create_model("yolov8n", names).eval()), tmp_path/"a.onnx")
    with pytest.raises(InputError, match="cannot be told apart"):
        load_weights(create_model("yolov8n", names), tmp_path/"a.onnx", names)


# ---- a trusted .pt -------------------------------------------------------------------------------

def test_import_pt(tasks, tmp_path):
    "A file as the package's trainer writes it: the averaged network, halved, under 'ema'."
    import copy

    from jetson_det.models.ultralytics.import_pt import import_pt
    net, ours = of_the_package(tasks, "yolo11n", CLASSES)
    saved = {"epoch": 3, "model": None, "ema": copy.deepcopy(net).half(), "updates": 9, "optimizer": None,
             "train_args": {"data": "a.yaml"}, "date": "x"}
    torch.save(saved, tmp_path/"best.pt")
    model = create_model("yolo11n", ["Truck", "glove", "sack"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match="can run any code"): import_pt(tmp_path/"best.pt")
    with pytest.raises(InputError, match="import-pt --trust"): load_weights(model, tmp_path/"best.pt")
    for k, v in model.state_dict().items(): assert torch.equal(v, before[k])
    made = import_pt(tmp_path/"best.pt", trust=True)
    for path in (made, tmp_path/"best.pt"):
        model = create_model("yolo11n", ["Truck", "glove", "sack"])
        report = load_weights(model, path)
        assert (report.carried, report.fresh) == (("Truck", "sack"), ("glove",))
        assert (report.left, report.missing, report.kind) == (("person",), (), "safetensors")
        found = model.state_dict()
        for k, v in ours.state_dict().items():
            if ".cv3." not in k or ".2." not in k.split("cv3")[1]:
                assert torch.allclose(found[k].float(), v.float(), atol=2e-3, rtol=1e-3), k
    (tmp_path/"best.pt").write_bytes((tmp_path/"best.pt").read_bytes() + b"\0") # no longer the file that was imported
    with pytest.raises(InputError): load_weights(model, tmp_path/"best.pt")
    from typer.testing import CliRunner
    from jetson_det.cli import app
    torch.save({"model": net}, tmp_path/"b.pt")
    call = ["import-pt", str(tmp_path/"b.pt"), "--trust", "--out", str(tmp_path/"c.safetensors")]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0 and "3 classes: sack, person, truck" in done.output
    assert (tmp_path/"c.safetensors").exists()
    assert CliRunner().invoke(app, call).exit_code == 0 # an import may be made anew
    (tmp_path/"c.safetensors").write_bytes(b"of somebody else")
    done = CliRunner().invoke(app, call)
    assert done.exit_code and (tmp_path/"c.safetensors").read_bytes() == b"of somebody else"


@pytest.mark.parametrize("content, says", [
    pytest.param(lambda: {"model": {"a": torch.zeros(1)}}, "holds no network", id="tensors"),
    pytest.param(lambda: {"model": nn.Linear(1, 1)}, "no names of classes", id="another"),
    pytest.param(None, "not imported", id="torn"),
])
def test_import_pt_of_something_else(tasks, tmp_path, content, says):
    from jetson_det.models.ultralytics.import_pt import import_pt
    if content: torch.save(content(), tmp_path/"a.pt")
    else: (tmp_path/"a.pt").write_bytes(b"torn")
    with pytest.raises(InputError, match=says) as e: import_pt(tmp_path/"a.pt", trust=True)
    assert "\n" not in str(e.value) and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


# ---- BatchNorms ----------------------------------------------------------------------------------

def test_restored_batchnorms_train_as_before(tmp_path):
    "After folding, training mode is another function than evaluation; restored, it is the same on the images measured."
    source = trained()
    images = torch.randint(0, 256, (4, 3, 64, 96), dtype=torch.uint8)
    restore_batchnorm(source, [images])  # so that the original is at rest on these images too
    export(Raw(source), tmp_path/"a.onnx")
    folded = create_model("yolox-nano", CLASSES)
    restored = create_model("yolox-nano", CLASSES)
    load_weights(folded, tmp_path/"a.onnx", classes=CLASSES)
    report = load_weights(restored, tmp_path/"a.onnx", classes=CLASSES, batches=[images[:2], images[2:]])
    assert report.folded == 0 and same_function(restored, source, tol=1e-3)
    x = images.float()
    with torch.no_grad(): want, bad, good = (m.train()(x).raw for m in (source, folded, restored))
    assert (good - want).norm() < 1e-3*want.norm() < (bad - want).norm()


@pytest.mark.data
def test_the_stored_onnx_gives_its_own_outputs(data):
    "The COCO-trained file, mapped back: box numbers, object and classes to 1e-3, on real photographs."
    ort = pytest.importorskip("onnxruntime")
    cv2 = pytest.importorskip("cv2")
    path = data/"models/yolox_nano_coco_416.onnx"
    model = create_model("yolox-nano", COCO_CLASSES)
    report = load_weights(model, path)
    assert len(report.carried) == 80 and report.folded == 104 and not report.missing
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = []
    for photo in sorted((data/"datasets/images").glob("*.jpg")):
        image = cv2.imread(str(photo))
        canvas = np.full((416, 416, 3), 114, np.uint8)
        r = 416/max(image.shape[:2])
        small = cv2.resize(image, None, fx=r, fy=r)[:416, :416]
        canvas[:small.shape[0], :small.shape[1]] = small
        images.append(canvas.transpose(2, 0, 1).copy())
    images = torch.from_numpy(np.stack(images))

    def check():
        for x in images[:, None].float():
            want = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
            with torch.no_grad(): out = model.eval()(x)
            assert want[..., 4].max() > .5  # it sees something
            have = torch.cat([out.reg, out.obj.sigmoid(), out.cls.sigmoid()], -1)
            torch.testing.assert_close(have, want, rtol=0, atol=1e-3)
    check()
    restore_batchnorm(model, [images])
    check()
