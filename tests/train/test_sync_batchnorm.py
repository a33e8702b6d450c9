"""BatchNorm over several processes, and of a single value a channel."""
import shutil
from copy import deepcopy

import pytest
import torch
from process_helpers import preload, together
from torch import nn
from train_helpers import config, each_family, family_words, result_of, scenes, small_detrs

from jetson_det.core import InputError
from jetson_det.models.checkpoint import list_checkpoints
from jetson_det.train.loop import train
from jetson_det.train.sync_batchnorm import allow_single_values
from jetson_det.train.world import World

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def preloaded(): preload()


def rank_normalized(world):
    """In a process: gradients and statistics of a small network, of images 0-4 in rank 0 and 5-7 in rank 1; and of
    all of them by torch alone."""
    from jetson_det.train.sync_batchnorm import sync_batchnorm
    from jetson_det.train.world import sum_step
    torch.manual_seed(0)
    x = torch.randn(8, 3, 6, 5)
    def run(images, synced):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=.3), nn.SiLU(), nn.Conv2d(4, 5, 1),
                            nn.BatchNorm2d(5), nn.Sigmoid()).train()
        assert len(sync_batchnorm(net, world if synced else World())) == (2 if synced else 0)
        net(images).square().sum().backward()
        if synced: sum_step(world, list(net.parameters()), {"images": len(images)})
        return [p.grad for p in net.parameters()] + list(net.buffers())
    mine = run(x[:5] if world.main else x[5:], True)
    whole = run(x, False)
    return max(
        float((a - b).abs().max()/b.abs().max()) if i not in (0, 4) else float((a - b).abs().max())
        for i, (a, b) in enumerate(zip(mine, whole))
        if i not in (1, 5))


def test_synced_batchnorm_is_batchnorm_of_the_joint_batch():
    "To 1e-5; the convolutions' own biases are without effect, and without gradient but for rounding."
    assert together(rank_normalized, 2) < 1e-5


# ---- CUDA's kernels, played on the CPU

def play_kernels():
    "What torch's kernels for BatchNorm over processes compute."
    per_channel = (0, 2, 3)
    def shaped(v): return v.view(1, -1, 1, 1)
    def stats(x, eps):
        return x.mean(per_channel), (x.var(per_channel, unbiased=False) + eps).rsqrt()
    def gather(x, means, invstds, running_mean, running_var, momentum, eps, counts):
        n = counts.view(-1, 1)
        mean = (means * n).sum(0) / n.sum()
        squares = invstds**-2 - eps + means.square()
        var = (squares * n).sum(0) / n.sum() - mean.square()
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * n.sum() / (n.sum() - 1), momentum)
        return mean, (var + eps).rsqrt()
    def elemt(x, weight, bias, mean, invstd, eps):
        return (x - shaped(mean)) * shaped(invstd * weight) + shaped(bias)
    def reduce(grad, x, mean, invstd, weight, *needed):
        sums = grad.sum(per_channel), (grad * (x - shaped(mean))).sum(per_channel)
        return *sums, sums[1] * invstd, sums[0]
    def backward(grad, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts):
        n = counts.sum()
        centered = (x - shaped(mean)) * shaped(invstd.square() * sum_dy_xmu / n)
        return (grad - shaped(sum_dy / n) - centered) * shaped(invstd * weight)
    kernels = dict(batch_norm_stats=stats, batch_norm_gather_stats_with_counts=gather, batch_norm_elemt=elemt,
                   batch_norm_backward_reduce=reduce, batch_norm_backward_elemt=backward)
    for name, kernel in kernels.items(): setattr(torch, name, kernel)


def rank_normalized_by_kernels(world):
    "In a process: `rank_normalized` by torch's own layer for GPUs, its kernels played on the CPU."
    from jetson_det.train import sync_batchnorm as syncing
    play_kernels()
    syncing._has_kernels = lambda x: True
    return rank_normalized(world)


def test_the_layer_for_gpus_is_batchnorm_of_the_joint_batch(): assert together(rank_normalized_by_kernels, 2) < 1e-5


# ---- a single value a channel

def one_value(layers):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    assert allow_single_values(net) == layers
    return net.train()


def test_a_single_value_is_normalized_by_the_running_statistics():
    net = one_value(2)
    net(torch.randn(4, 3, 1, 1))
    before = [b.clone() for b in net.buffers()]
    x = torch.randn(1, 3, 1, 1, requires_grad=True)
    net(x).sum().backward()
    assert all(map(torch.equal, before, net.buffers())) and x.grad.abs().sum() > 0
    assert torch.equal(net(x), net.eval()(x))


def test_more_values_are_normalized_as_ever():
    plain = nn.BatchNorm2d(3)
    mine = nn.BatchNorm2d(3)
    allow_single_values(mine)
    for shape in ((2, 3, 1, 1), (1, 3, 1, 2), (5, 3, 4, 4)):
        x = torch.randn(shape)
        assert torch.equal(plain(x), mine(x))
    assert list(plain.state_dict()) == list(mine.state_dict())
    assert all(map(torch.equal, plain.buffers(), mine.buffers()))


def test_a_copy_keeps_its_own_statistics():
    mine = nn.Sequential(nn.BatchNorm2d(3))
    allow_single_values(mine)
    theirs = deepcopy(mine)
    theirs(torch.ones(2, 3, 1, 1))
    assert mine[0].running_mean.sum() == 0 and theirs[0].running_mean.sum() > 0


SINGLE = ["data.input_size=[32,32]", "augment.multiscale=0", "train.batch_size=4", "train.accumulate=1",
          "train.epochs=2", "train.no_aug_epochs=0", "train.trackers=[]"]

@pytest.mark.parametrize("name", [*each_family(["yolox-nano", "dfine-n"]),
                                  *each_family(["yolov8n", "rtdetr-r18"], slow=True)])
def test_a_last_batch_of_one_at_32_pixels_trains_and_resumes_exactly(tmp_path, name, monkeypatch):
    "9 images in batches of 4; a map of one pixel at stride 32."
    small_detrs(monkeypatch.setitem)
    data = scenes(tmp_path/"data")
    cfg = config(data, *family_words(name), *SINGLE)
    train(cfg, tmp_path/"whole")
    cut = tmp_path/"cut"
    shutil.copytree(tmp_path/"whole", cut)
    for p in list_checkpoints(cut)[-1:]: shutil.rmtree(p)
    for part in ("best", "last"): shutil.rmtree(cut/part)
    train(cfg, cut, resume=True)
    assert result_of(cut) == result_of(tmp_path/"whole")


def test_averages_are_measured_over_a_last_batch_of_one(tmp_path):
    cfg = config(scenes(tmp_path/"data"), *SINGLE, "train.epochs=3", "train.swa_epochs=2", "train.average_best=2")
    assert train(cfg, tmp_path/"run")["steps"] == 9


@pytest.mark.parametrize("words", [["train.batch_size=1"], ["train.overfit_batches=1", "train.batch_size=1"]])
def test_batches_of_one_value_alone_are_refused_before_the_first_step(tmp_path, words):
    data = scenes(tmp_path/"data")
    with pytest.raises(InputError, match="32x32 in micro-batches of one image leaves BatchNorm one value a channel"):
        train(config(data, *SINGLE, *words), tmp_path/"run")
    assert not (tmp_path/"run").exists()
    assert train(config(data, *SINGLE, "train.epochs=1", *words, "train.freeze_bn=true"), tmp_path/"run")["steps"] > 0
