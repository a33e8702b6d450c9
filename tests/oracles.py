"""The packages that our numbers are held against, imported in a way that works on a machine without a GPU."""
import functools
import importlib
import warnings


def _define_torchvision_operators():
    """Let torchvision be imported beside a CPU build of torch.

    The torchvision wheel on PyPI is built against the CUDA build of torch. Beside a CPU build its compiled library does
    not load, so the operators it would bring, nms and qnms, are unknown when its Python code decorates them, and
    `import torchvision` fails. The package yolox imports torchvision for its post-processing, which none of our
    comparisons call. Declaring the two operators, without any code behind them, is enough; calling one fails.
    """
    import torch
    try: importlib.import_module("torchvision")
    except RuntimeError as e:
        if "torchvision::nms" not in str(e): raise
        lib = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"): lib.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_library"] = lib  # the declarations live as long as this object


@functools.lru_cache
def yolox():
    "The package yolox (0.3.0), or None where it is not installed."
    try: importlib.import_module("torch")
    except ImportError: return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _define_torchvision_operators()
        try: return importlib.import_module("yolox.models") and importlib.import_module("yolox")
        except ImportError as e:
            if (e.name or "").split(".")[0] not in ("yolox", "loguru", "tabulate", "thop", "psutil", "ninja",
                                                    "pycocotools"):
                raise
            return None


MISSING = "the package yolox is not installed: pip install --no-deps --no-build-isolation yolox==0.3.0"


def yolox_model(name, n_classes):
    "A model of the yolox package, by our name, set up as its own Exp does; in training mode."
    import torch
    from yolox.models import YOLOX, YOLOPAFPN, YOLOXHead

    from jetson_det.models.yolox.network import SIZES
    size = SIZES[name]
    channels = [256, 512, 1024]
    depthwise = name == "yolox-nano"
    model = YOLOX(YOLOPAFPN(size.depth, size.width, in_channels=channels, depthwise=depthwise),
                  YOLOXHead(n_classes, size.width, in_channels=channels, depthwise=depthwise))
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.eps, m.momentum = 1e-3, .03
    model.head.initialize_biases(1e-2)
    return model.train()


def yolox_targets(boxes, labels):
    """Our boxes (B,G,4) xyxy and labels (B,G) as the yolox package wants them: (B,G,5) label cx cy w h, padded with
    zeros at the end."""
    import torch
    rows = torch.cat([labels[..., None].float(), (boxes[..., :2] + boxes[..., 2:])/2, boxes[..., 2:] - boxes[..., :2]],
                     -1)
    out = torch.zeros_like(rows)
    for i, row in enumerate(rows):
        real = row[labels[i] >= 0]
        out[i, :len(real)] = real
    return out


def yolox_loss(head, outputs, targets, l1):
    """The yolox package's loss on our `YOLOXOutputs`: what its head does after its last convolution.

    Returns total, iou (weighted), obj, cls, l1, as its `get_losses` does.
    """
    import torch

    from jetson_det.models.yolox.anchors import anchors_for
    anchors = anchors_for(outputs.grids, outputs.reg.device)
    sizes = [h*w for h, w in outputs.grids]
    decoded = torch.cat([(outputs.reg[..., :2] + anchors.cells)*anchors.strides,
                         outputs.reg[..., 2:].exp()*anchors.strides, outputs.obj, outputs.cls], -1)
    head.use_l1 = l1
    xs, ys = ([c[None] for c in anchors.cells[:, k].split(sizes)] for k in (0, 1))
    strides = [s[None] for s in anchors.strides[:, 0].split(sizes)]
    images = torch.zeros(len(targets), 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.cuda.amp.autocast is deprecated
        return head.get_losses(images, xs, ys, strides, targets, decoded, [outputs.reg] if l1 else [],
                               torch.float32)[:5]


def random_scene(batch, n, size, classes, small=12., large=.4, seed=0):
    "Boxes (B,n,4) xyxy px inside (h, w), sides `small` px and up to `large` of the longer side, and labels (B,n)."
    import torch
    g = torch.Generator().manual_seed(seed)
    h, w = size
    wh = torch.rand(batch, n, 2, generator=g)**2*max(size)*large + small
    wh = torch.minimum(wh, torch.tensor([w, h]) - 4.)
    middle = wh/2 + torch.rand(batch, n, 2, generator=g)*(torch.tensor([w, h]) - wh)
    return torch.cat([middle - wh/2, middle + wh/2], -1), torch.randint(0, classes, (batch, n), generator=g)


def plausible_outputs(boxes, labels, size, classes, noise=.25, seed=1):
    """Outputs of a network that has learned something: each anchor point finds the box it lies in, or the nearest,
    roughly."""
    import torch

    from jetson_det.models.yolox.anchors import STRIDES, YOLOXOutputs, anchors_for
    g = torch.Generator().manual_seed(seed)
    grids = tuple((size[0]//s, size[1]//s) for s in STRIDES)
    anchors = anchors_for(grids, boxes.device)
    middle = (boxes[..., :2] + boxes[..., 2:])/2
    wh = boxes[..., 2:] - boxes[..., :2]
    away = ((anchors.centers[:, None] - middle[:, None]).abs()/wh[:, None].clamp(min=1)).amax(-1)
    near = away.masked_fill((labels < 0)[:, None], 1e9).argmin(-1)[..., None].expand(-1, -1, 2)
    middle = middle.gather(1, near)
    wh = wh.gather(1, near).clamp(min=1)
    dice = torch.randn(*wh.shape[:2], 4, generator=g)*noise
    reg = torch.cat([(middle + dice[..., :2]*wh)/anchors.strides - anchors.cells,
                     (wh*(1 + dice[..., 2:]).clamp(.3)/anchors.strides).log()], -1)
    logits = torch.randn(*wh.shape[:2], 1 + classes, generator=g) - 3
    return YOLOXOutputs(reg, logits[..., :1].clone(), logits[..., 1:].clone(), grids)
