"export.onnx and models.session: the file computes what the checkpoint does, and says what it is."
import copy
import subprocess
import sys
import warnings
from functools import lru_cache

import cv2
import numpy as np
import onnx
import pytest
import torch

from jetson_det.core import InputError, rng_for
from jetson_det.data.dataset import DetDataset
from jetson_det.evaluate.coco import evaluate
from jetson_det.export import onnx as export
from jetson_det.export.onnx import export_onnx, parity_frames, weights_sha256
from jetson_det.models.graph import operators
from jetson_det.models.session import checkpoint_of, load_detector, open_artifact, torch_session
from jetson_det.models.zoo import create_model
from jetson_det.runtime.contract import METADATA_KEY, Contract
from jetson_det.runtime.files import sha256_file
from jetson_det.models.checkpoint import save_checkpoint

SIZE = (96, 160)
CLASSES = ("Sack", "Person")
ABSENT = {
    "GridSample", "LayerNormalization", "GroupNormalization", "Mod", "NonZero", "RoiAlign", "OneHot", "Unique",
    "HardSwish", "Gelu", "Mish"
}
COMPUTED = {
    "Shape", "Gather", "GatherND", "ConstantOfShape", "Range", "Expand", "Tile", "NonMaxSuppression", "TopK", "Loop",
    "If", "Where", "Cast"
}


def network(seed=1, name="yolox-nano"): return copy.deepcopy(made(seed, name))


@lru_cache
def made(seed, name):
    "Random weights with activations of a trained network's size."
    torch.manual_seed(seed)
    model = create_model(name, CLASSES)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.momentum = .98 if name == "yolox-nano" else .9
    with torch.no_grad():
        large = torch.nn.functional.interpolate(torch.rand(4, 3, 6, 10) * 255, SIZE, mode="bilinear")
        model(large + torch.nn.functional.avg_pool2d(torch.rand(4, 3, 98, 162) * 255, 3, 1))
        for p in [*model.head.obj_preds, *model.head.cls_preds]:
            p.weight.mul_(10)
            p.bias.fill_(-1)
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A training's folder: its best checkpoint has averaged weights that are not the raw ones, and the ONNX made of it."
    folder = tmp_path_factory.mktemp("run")
    averaged = network()
    contract = averaged.contract(SIZE, dataset="0123456789abcdef", config="fedcba9876543210", extra={"epoch": 3})
    save_checkpoint(folder / "best", network(seed=0), averaged, None, {"step": 3}, contract)
    export_onnx(folder, folder / "m.onnx")
    return folder


def test_graph_is_for_tensorrt_8(run):
    model = onnx.load(str(run / "m.onnx"))
    onnx.checker.check_model(model, full_check=True)
    # ONNX Runtime 1.10 reads IR 8
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 13)] and model.ir_version <= 8
    ops = set(operators(run / "m.onnx"))
    assert not ops & (ABSENT | COMPUTED | {"BatchNormalization", "Identity", "Constant"})
    shape = lambda v: (v.name, v.type.tensor_type.elem_type, [d.dim_value for d in v.type.tensor_type.shape.dim])
    assert [shape(v) for v in model.graph.input] == [("images", 1, [1, 3, 96, 160])]
    assert [shape(v) for v in model.graph.output] == [("boxes", 1, [1, 315, 4]), ("scores", 1, [1, 315, 2])]
    # TensorRT casts INT64 to INT32: only small constants of shapes and slices may be INT64
    for t in model.graph.initializer:
        assert t.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64)
        if t.data_type == onnx.TensorProto.INT64: assert np.prod(t.dims) <= 8


def test_contract_in_the_file(run):
    from jetson_det.runtime.sessions import open_session
    contract = open_session(run / "m.onnx", threads=1).contract
    assert contract.classes == CLASSES and contract.input_size == SIZE
    assert contract.output == "boxes_scores" and contract.opset == 13
    assert (contract.dataset, contract.config, contract.extra) == ("0123456789abcdef", "fedcba9876543210", {"epoch": 3})
    assert contract.made_from == sha256_file(run / "best" / "ema.safetensors") # the averaged weights ship
    assert (contract.confidence, contract.iou) == (.25, .45)
    assert 0 <= contract.parity["boxes"] < 1e-4 and 0 <= contract.parity["scores"] < 1e-4
    assert contract.parity["frames"] == 3


def test_contracts_of_before_are_read(run, tmp_path):
    """Contracts of Ultralytics' models once had the key "licence"; their files and checkpoints still open."""
    extra = {"licence": "AGPL-3.0 (network: Ultralytics)"}
    model = network()
    save_checkpoint(tmp_path / "old", model, None, None, {}, model.contract(SIZE, extra=extra))
    assert load_detector(tmp_path / "old")[1].extra == extra
    assert export_onnx(tmp_path / "old", tmp_path / "old.onnx").extra == extra
    assert open_artifact(tmp_path / "old.onnx", threads=1).contract.extra == extra


def test_contract_survives_another_onnxslim(run, tmp_path):
    import onnxslim
    onnx.save(onnxslim.slim(onnx.load(str(run / "m.onnx"))), str(tmp_path / "again.onnx"))
    props = {p.key: p.value for p in onnx.load(str(tmp_path / "again.onnx")).metadata_props}
    assert Contract.from_json(props[METADATA_KEY]).made_from == sha256_file(run / "best" / "ema.safetensors")


def test_same_file_twice_replaced_whole_and_in_silence(run, tmp_path, capfd):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"an export jetson_det.contract")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="(?!jetson_det|torch.onnx)")
        export_onnx(run, path)
    assert capfd.readouterr() == ("", "")
    assert path.read_bytes() == (run / "m.onnx").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("name, size, dynamic", [
    ("yolox-nano", (64, 224), False),
    ("yolox-tiny", (160, 96), True),
    ("yolox-nano", (32, 32), True),
])
def test_any_height_and_width(tmp_path, name, size, dynamic):
    model = network(name=name)
    contract = export_onnx(model, tmp_path / "m.onnx", size, dynamic_batch=dynamic, confidence=.1, iou=.6)
    assert contract.input_size == size and contract.made_from == weights_sha256(model)
    assert (contract.confidence, contract.iou) == (.1, .6)
    session = open_artifact(tmp_path / "m.onnx", threads=1)
    in_torch = torch_session(model, size)
    assert session.batch_size == (None if dynamic else 1)
    session.max_detections = in_torch.max_detections = 1000
    in_torch.confidence, in_torch.iou = .1, .6
    frames = [cv2.resize(f, (333, 250)) for f in parity_frames(size)]
    for a, b in zip(session(frames), in_torch(frames)):
        assert abs(len(a.scores) - len(b.scores)) <= 1
        n = min(len(a.scores), len(b.scores))
        np.testing.assert_allclose(a.scores[:n], b.scores[:n], atol=1e-4)


def test_unsimplified_and_another_opset_agree(tmp_path):
    model = network()
    contract = export_onnx(model, tmp_path / "m.onnx", SIZE, opset=17, simplify=False)
    assert contract.opset == 17 and onnx.load(str(tmp_path / "m.onnx")).opset_import[0].version == 17
    assert contract.parity["scores"] < 1e-4 and "Constant" in operators(tmp_path / "m.onnx")


def test_the_network_is_left_as_it_was(tmp_path):
    model = network().train()
    model.backbone.backbone.stem.eval()
    strides = [p.stride() for p in model.parameters()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    export_onnx(model, tmp_path / "m.onnx", SIZE)
    torch_session(model, SIZE)(parity_frames(SIZE))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # the memory order too: it decides how a training's sums are rounded
    assert [p.stride() for p in model.parameters()] == strides
    boxes, scores = model.decode(model(torch.zeros(2, 3, *SIZE)))
    (boxes.sum() + scores.sum()).backward() # still trainable: no inference tensors were left behind
    assert all(p.grad is not None for p in model.parameters())


def test_a_graph_that_computes_something_else_is_refused(run, tmp_path, monkeypatch):
    def broken(graph):
        from onnx import numpy_helper
        graph = onnx.ModelProto.FromString(graph.SerializeToString())
        t = max(graph.graph.initializer, key=lambda t: np.prod(t.dims))
        t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t) * np.float32(1.05), t.name))
        return graph
    monkeypatch.setattr(export, "simplify_onnx", broken)
    old = b"an export jetson_det.contract"
    (tmp_path / "m.onnx").write_bytes(old)
    with pytest.raises(RuntimeError, match="does not compute what the network does"):
        export_onnx(run, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_another_program_s_file_stays(run, tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"of somebody else")
    with pytest.raises(InputError, match="jetson-det did not write it"): export_onnx(run, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == b"of somebody else"


def test_a_network_of_nan_is_refused(tmp_path):
    model = network()
    with torch.no_grad(): model.head.reg_preds[0].bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="inf"): export_onnx(model, tmp_path / "m.onnx", SIZE)
    assert not list(tmp_path.iterdir())


def scenes(folder, session, n=16):
    """Images, and as their truth what `session` finds: shifted a little, some left out. So its AP is far from 0 and
    from 1."""
    rng = rng_for(21)
    where = []
    boxes = []
    labels = []
    for i in range(n):
        noise = rng.integers(0, 256, (120, 200, 3), np.uint8)
        image = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), float(rng.uniform(1, 6))), None, 0, 255, cv2.NORM_MINMAX)
        cv2.imwrite(str(folder / f"{i:02d}.png"), image)
        found = session(image)
        for b, l in zip(found.boxes[:12], found.labels[:12]):
            if rng.random() < .3: continue
            b = np.clip(b + rng.normal(0, .06, 4) * max(b[2] - b[0], b[3] - b[1]), 0, [200, 120, 200, 120])
            if (b[2:] - b[:2]).min() > 3:
                where.append(i)
                boxes.append(b)
                labels.append(l)
    return DetDataset(folder, CLASSES, [f"{i:02d}.png" for i in range(n)], [[120, 200]] * n, where, boxes, labels)


def test_checkpoint_and_onnx_have_the_same_ap(run, tmp_path):
    in_torch = open_artifact(run)
    on_ort = open_artifact(run / "m.onnx", threads=1)
    in_torch.confidence = .05
    ds = scenes(tmp_path, in_torch)
    a, b = (evaluate(s, ds, batch=4, progress=False) for s in (in_torch, on_ort))
    assert .1 < a.stats["AP"] < .95 and a.boxes > 50, a
    for k, v in a.stats.items():
        assert (v is None) == (b.stats[k] is None)
        if v is not None: assert abs(v - b.stats[k]) < 1e-3, (k, v, b.stats[k])
    for ca, cb in zip(a.per_class, b.per_class): assert abs(ca["AP"] - cb["AP"]) < 1e-3


def test_wrong_calls_are_one_line_and_write_nothing(run, tmp_path):
    model = network()
    (tmp_path / "weights.pth").touch()
    for call, text in [
        (lambda: export_onnx(model, tmp_path / "m.onnx"), "input_size is needed"),
        (lambda: export_onnx(run, tmp_path / "m.onnx", (416, 400)), "416x400 .*multiples of 32"),
        (lambda: export_onnx(run, tmp_path / "m.onnx", (0, 32)), "multiples of 32"),
        (lambda: export_onnx(run, tmp_path / "m.onnx", "416"), "two numbers"),
        (lambda: export_onnx(run, tmp_path / "m.engine"), "ends in .onnx"),
        (lambda: export_onnx(run, tmp_path / "no" / "m.onnx"), "no such folder"),
        (lambda: export_onnx(run, tmp_path / "m.onnx", opset=21), "opset is 21"),
        (lambda: export_onnx(run, tmp_path / "m.onnx", iou=2), "iou is 2"),
        (lambda: export_onnx(tmp_path / "gone", tmp_path / "m.onnx"), "no such folder"),
        (lambda: export_onnx(tmp_path / "weights.pth", tmp_path / "m.onnx"), "not a checkpoint"),
        (lambda: open_artifact(tmp_path), "neither a checkpoint"),
        (lambda: open_artifact(tmp_path / "weights.pth"), "weights alone"),
        (lambda: open_artifact(tmp_path / "gone.onnx"), "no such file"),
        (lambda: open_artifact(run, contract="yolox"), "its own contract"),
        (lambda: open_artifact(run, device="tpu"), "cpu, cuda or cuda:N"),
    ]:
        with pytest.raises(InputError, match=text) as e: call()
        assert "\n" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pth"]


def test_damaged_checkpoints(run, tmp_path):
    import shutil
    for damage, text in [(lambda p: p.write_bytes(p.read_bytes()[:-10]), "torn"),
                         (lambda p: p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1])), "altered"),
                         (lambda p: p.unlink(), "missing")]:
        shutil.rmtree(tmp_path / "best", ignore_errors=True)
        shutil.copytree(run / "best", tmp_path / "best")
        damage(tmp_path / "best" / "ema.safetensors")
        for call in (lambda: open_artifact(tmp_path), lambda: export_onnx(tmp_path / "best", tmp_path / "m.onnx")):
            with pytest.raises(InputError, match=f"ema.safetensors.*{text}"): call()
    save_checkpoint(tmp_path/"other", network(), None, None, {},
                    network().contract(SIZE)._replace(classes=("Sack", "Person", "Forklift")))
    with pytest.raises(InputError, match="not those of yolox-nano"): load_detector(tmp_path / "other")


def test_newest_whole_checkpoint_of_a_run_without_a_best_one(tmp_path):
    model = network()
    for step in (10, 20):
        save_checkpoint(tmp_path/"checkpoints"/f"step-{step:08d}", model, None, None, {"step": step},
                        model.contract(SIZE))
    assert checkpoint_of(tmp_path).name == "step-00000020"
    (tmp_path / "checkpoints" / "step-00000020" / "state.json").write_text("{")
    assert checkpoint_of(tmp_path).name == "step-00000010"


def test_an_onnx_is_opened_without_torch(run):
    code = (
        f"import sys\nfrom jetson_det.models.session import open_artifact\nopen_artifact({str(run / 'm.onnx')!r},"
        " threads=1)\nprint('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.data
def test_a_trained_network_has_the_same_ap_everywhere(data, tmp_path):
    "COCO weights, mapped from the stored ONNX, on generated scenes: the network, its export and the stored ONNX agree."
    from jetson_det.data.formats.registry import read_dataset
    from jetson_det.models.weights.load import load_weights
    from jetson_det.runtime.contract import COCO_CLASSES
    from jetson_det.scenes.docks import write_scenes
    model = create_model("yolox-nano", COCO_CLASSES)
    load_weights(model, data / "models/yolox_nano_coco_416.onnx")
    contract = export_onnx(model, tmp_path / "m.onnx", (416, 416))
    assert contract.parity["boxes"] < 3e-4 and contract.parity["scores"] < 1e-5, contract.parity
    ds = read_dataset(write_scenes(tmp_path / "scenes", 12, (270, 480), seed=2, splits={"val": 1.}))
    sessions = [torch_session(model, (416, 416)), open_artifact(tmp_path / "m.onnx", threads=1),
                open_artifact(data / "models/yolox_nano_coco_416.onnx", contract="yolox", threads=1)]
    a, b, c = (evaluate(s, ds, batch=4, progress=False) for s in sessions)
    assert a.stats["AP50"] > .3, a # Person is known, Sack is not
    for k, v in a.stats.items():
        if v is not None:
            assert abs(v - b.stats[k]) < 1e-3 and abs(v - c.stats[k]) < 1e-3, (k, v, b.stats[k], c.stats[k])
