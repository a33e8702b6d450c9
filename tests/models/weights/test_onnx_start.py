"""A training that starts from an ONNX file, whose BatchNorms were folded away, keeps what the file knows."""
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from torch import nn  # noqa: E402

from jetson_det.models.graph import trace_onnx  # noqa: E402
from jetson_det.models.weights.load import restore_batchnorm  # noqa: E402
from jetson_det.models.zoo import create_model  # noqa: E402
from label_files import put  # noqa: E402
from train_helpers import config, each_family, small_detrs  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ("red", "blue")
COLORS = (40, 40, 200), (200, 40, 40) # BGR
SIZE = 64


# ---- the function stays, whatever the family -----------------------------------------------------------

def with_tiny_filters(name, factor):
    """A model whose every filter in front of a BatchNorm is `factor` times as large, and the BatchNorms. A head that is
    there for training alone (YOLO26) has none in a file, and stays."""
    torch.manual_seed(0)
    model = create_model(name, CLASSES).eval()
    newest = [None]
    norms = []
    def shrink(norm, args):
        norms.append(norm)
        with torch.no_grad():
            newest[0].weight.mul_(factor)
            norm.running_mean.normal_(0, .1*factor)
            norm.running_var.uniform_(.5*factor**2, 1.5*factor**2)
            norm.bias.normal_(0, .2)
    hooks = []
    for m in model.modules():
        if isinstance(m, nn.Conv2d): hooks.append(m.register_forward_hook(lambda conv, *_: newest.insert(0, conv)))
        if isinstance(m, nn.BatchNorm2d): hooks.append(m.register_forward_pre_hook(shrink))
    with torch.no_grad(): model(torch.zeros(1, 3, SIZE, SIZE))
    for hook in hooks: hook.remove()
    return model, norms


@pytest.mark.parametrize("name", each_family())
@pytest.mark.parametrize("factor", [1e-2, pytest.param(1e3, marks=pytest.mark.slow)])
def test_filters_get_a_size_and_the_function_stays(monkeypatch, name, factor):
    small_detrs(monkeypatch.setitem)
    model, norms = with_tiny_filters(name, factor)
    images = torch.randint(0, 256, (2, 3, SIZE, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    statistics = [m.running_var.clone() for m in norms]
    with torch.no_grad(): want = model.decode(model(model.normalize(images)))
    restore_batchnorm(model, [images])
    with torch.no_grad(): have = model.decode(model(model.normalize(images)))
    torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-2)
    sizes = [m.weight.flatten(1).norm(dim=1) for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(bool(torch.allclose(size, torch.ones_like(size), atol=1e-4)) for size in sizes) >= len(norms)
    assert not any(torch.equal(m.running_var, before) for m, before in zip(norms, statistics))
    for k, v in model.state_dict().items(): assert v.isfinite().all(), k


class Pair(nn.Module):
    "A convolution and a BatchNorm, and a second BatchNorm that no convolution feeds."
    def __init__(self, bias):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=bias)
        self.norm = nn.BatchNorm2d(4)
        self.alone = nn.BatchNorm2d(4)
    def normalize(self, images): return images.float()
    def forward(self, x): return self.alone(self.norm(self.conv(x)).relu())


@pytest.mark.parametrize("bias", [False, True])
def test_filters_of_all_sizes(bias):
    "Tiny, huge, and one of zeros; with a bias in front of the BatchNorm too."
    torch.manual_seed(0)
    model = Pair(bias).eval()
    sizes = torch.tensor([1e-6, 1., 1e6, 0.])
    with torch.no_grad():
        model.conv.weight.mul_(sizes[:, None, None, None])
        model.norm.running_var.copy_((sizes*100)**2 + 1e-6)
        model.norm.weight.normal_()
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad(): want = model(images.float())
    restore_batchnorm(model, [images[:2], images[2:]])
    with torch.no_grad(): have = model(images.float())
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
    with torch.no_grad(): torch.testing.assert_close(model.train()(images.float()), want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.conv.weight.flatten(1).norm(dim=1), torch.tensor([1., 1., 1., 0.]))
    for v in model.state_dict().values(): assert v.isfinite().all()


# ---- a detector of squares, and what a training makes of it -----------------------------------------------

def squares(n=8):
    "Images of a red and a blue rectangle each, and their boxes."
    g = np.random.default_rng(0)
    images = g.integers(99, 130, (n, SIZE, SIZE, 3)).astype(np.uint8)
    boxes = np.zeros((n, 2, 4), np.float32)
    for i in range(n):
        for k, color in enumerate(COLORS):
            w, h = g.integers(14, 26, 2)
            x = 32*k + g.integers(0, 32 - w)
            y = g.integers(0, SIZE - h)
            images[i, y:y + h, x:x + w] = color
            boxes[i, k] = x, y, x + w, y + h
    return images, boxes


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    "An ONNX file that finds the squares, and the dataset of them."
    folder = tmp_path_factory.mktemp("squares")
    pictures, boxes = squares()
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    targets = torch.from_numpy(boxes), torch.tensor([[0, 1]]*len(boxes))
    torch.manual_seed(0)
    model = create_model("yolox-nano", CLASSES).train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = .1
    adam = torch.optim.Adam(model.parameters(), lr=.004)
    sgd = torch.optim.SGD(model.param_groups(), lr=.002, momentum=.9, nesterov=True) # whose minima are flatter
    for optimizer in [adam]*140 + [sgd]*60:
        loss = model.loss(model(images), *targets).total
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.)
        optimizer.step()
    graph = trace_onnx(model.eval(), (SIZE, SIZE))
    graph.metadata_props.add(key="names", value=str(dict(enumerate(CLASSES))))
    onnx.save(graph, str(folder/"a.onnx"))
    files = {"data/data.yaml": f"train: images\nnames: [{', '.join(CLASSES)}]\n"}
    for i, (image, pair) in enumerate(zip(pictures, boxes)):
        files[f"data/images/{i}.png"] = cv2.imencode(".png", image)[1].tobytes()
        lines = [f"{k} {(x + u)/2/SIZE} {(y + v)/2/SIZE} {(u - x)/SIZE} {(v - y)/SIZE}"
                 for k, (x, y, u, v) in enumerate(pair.tolist())]
        files[f"data/labels/{i}.txt"] = "\n".join(lines)
    put(folder, files)
    return folder/"a.onnx", folder/"data"


def trained_on(known, tmp_path, *words):
    "AP before and after 12 epochs on the file's own images; the model at the start and the trainer."
    from jetson_det.train.data import resolve_settings, training_data
    from jetson_det.train.loop import Trainer
    file, data = known
    cfg = config(data, f"data.input_size=[{SIZE},{SIZE}]", f"model.weights={file}", "train.overfit_batches=4",
                 "train.batch_size=2", "train.accumulate=1", "train.epochs=12", "augment.multiscale=0", *words)
    resolve_settings(cfg)
    trainer = Trainer(cfg, training_data(cfg, tmp_path, lambda line: None), tmp_path/"none", callbacks=[],
                      say=lambda line: None)
    before = trainer.evaluate()["AP"]
    start = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.fit()
    return before, trainer.evaluate()["AP"], start, trainer


def test_a_rate_near_zero_keeps_the_ap(known, tmp_path):
    before, after, *_ = trained_on(known, tmp_path, "train.lr=1e-9")
    assert before > .6 and abs(after - before) < .06, (before, after)


@pytest.mark.parametrize("words", [
    pytest.param([], id="as it is"),
    pytest.param(["train.optimizer=adamw", "train.lr=0.0005"], id="adamw", marks=pytest.mark.slow),
    pytest.param(["train.weight_decay=0.05"], id="weight decay", marks=pytest.mark.slow),
    pytest.param(["train.ema=false"], id="no average", marks=pytest.mark.slow),
    pytest.param(["train.freeze=[stem,dark2]"], id="frozen", marks=pytest.mark.slow),
    pytest.param(["train.precision=bf16"], id="bf16", marks=pytest.mark.slow),
])
def test_twelve_epochs_on_its_own_boxes_keep_them(known, tmp_path, words):
    "No filter is replaced in them, the first layer's as little as others'."
    before, after, start, trainer = trained_on(known, tmp_path, *words)
    assert before > .6 and after > .9*before, (before, after)
    for k, v in trainer.model.state_dict().items():
        if v.ndim != 4 or "preds" in k: continue
        alike = torch.cosine_similarity(v.flatten(), start[k].flatten(), 0)
        assert alike > .95, (k, alike)
