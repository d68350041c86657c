"""gradient_normalize on every function that a discriminator may call, against PyTorch's own double backward."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils.checkpoint import checkpoint

from fastmix.per_sample import gradient_normalize
from fastmix.testing.gradient_normalize import discriminator_of, note_claims, plain, values_and_gradients


@pytest.fixture
def claims(monkeypatch):
    return note_claims(monkeypatch)


class Apply(nn.Module):
    """function(hidden, parameter [3, 1, 1])."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(0.5 + torch.rand(3, 1, 1))

    def forward(self, h):
        return self.function(h, self.weight)


def _compare(model, x, mode="gn"):
    torch.manual_seed(3)  # for dropout
    expected = values_and_gradients(copy.deepcopy(model), x, plain, mode)
    torch.manual_seed(3)
    actual = values_and_gradients(model, x, gradient_normalize, mode)
    for name, grad in expected.items():
        if grad is not None and actual[name] is not None:
            torch.testing.assert_close(actual[name], grad, msg=lambda text, name=name: f"{name}: {text}")
        else:  # a bias that only moves D̂ by what it adds may get no gradient or zeros
            assert actual[name] is None or not actual[name].any(), name
            assert grad is None or not grad.any(), name


def _trained_batch_norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(3)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


class _Square(torch.autograd.Function):
    """Which no interception of functions sees."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class _Residual(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.conv, self.inplace = nn.Conv2d(3, 3, 3, padding=1), inplace

    def forward(self, h):
        out = self.conv(F.relu(h, inplace=self.inplace))
        if self.inplace:
            out += h
            return out
        return h + out


def _no_grad_mask(h, w):
    with torch.no_grad():
        mask = (h > 0.1).to(h.dtype)
    return h * mask


def _written(h, w):
    """Samples in a tensor that was a constant."""
    buffer = h.new_zeros(4, 6, 6, 6)
    buffer[:, :3] = h
    buffer[:, 3:].add_(h)
    return buffer


def _set(place):
    def function(h, w):
        h = h + w
        h[place(h)] = 0.7
        return h

    return function


def _added_unseen(h, w):
    h = h + w
    with torch.no_grad():
        h.add_(0.7)
    return h


def _added_to_data(h, w):
    h = h + w
    h.data.add_(0.7)
    return h


class _Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, h):
        return checkpoint(lambda h: F.relu(self.conv(h)), h, use_reentrant=False)


PIECEWISE_LINEAR = {
    "relu": nn.ReLU(), "relu in place": nn.ReLU(inplace=True), "leaky relu": nn.LeakyReLU(0.1),
    "leaky relu in place": nn.LeakyReLU(0.2, inplace=True), "negative slope": nn.LeakyReLU(-0.5),
    "slope of 0": nn.LeakyReLU(0.0), "leaky relu, then changed": Apply(lambda h, w: F.leaky_relu(h, 0.2).mul_(2)),
    "slope of 0, then changed": Apply(lambda h, w: F.leaky_relu(h, 0.0).mul_(2)),
    "relu of a view in place": Apply(lambda h, w: F.relu(h.view(4, -1), inplace=True)),
    "relu, function": Apply(lambda h, w: torch.relu(h)), "relu, method": Apply(lambda h, w: h.relu()),
    "relu_": Apply(lambda h, w: (h * w).relu_()), "prelu": nn.PReLU(3), "prelu of one": nn.PReLU(),
    "prelu of rows": nn.Sequential(nn.Flatten(), nn.PReLU(108)),
    "relu6": nn.ReLU6(), "hardtanh": nn.Hardtanh(-0.2, 0.3), "clamp": Apply(lambda h, w: h.clamp(min=-0.3, max=0.2)),
    "clamp from below": Apply(lambda h, w: torch.clamp(h, -0.1)), "abs": Apply(lambda h, w: h.abs()),
    "max pool": nn.MaxPool2d(2), "overlapping max pool": nn.MaxPool2d(3, 2, padding=1),
    "max pool 1d": nn.Sequential(nn.Flatten(2), nn.MaxPool1d(2)),
    "max pool 3d": nn.Sequential(nn.Unflatten(1, (1, 3)), nn.MaxPool3d((1, 2, 2))),
    "average pool": nn.AvgPool2d(2), "adaptive average": nn.AdaptiveAvgPool2d(2),
    "adaptive max": nn.AdaptiveMaxPool2d(2),
    "mean": Apply(lambda h, w: h.mean((2, 3))), "sum": Apply(lambda h, w: h.sum(dim=-1)),
    "amax": Apply(lambda h, w: h.amax(1)), "batch norm": _trained_batch_norm(),
    "batch norm without scale": nn.BatchNorm2d(3, affine=False),
    "conv": nn.Conv2d(3, 4, 3), "conv of stride": nn.Conv2d(3, 4, 4, 2, 1),
    "conv without bias": nn.Conv2d(3, 4, 3, bias=False),
    "grouped conv": nn.Conv2d(3, 6, 3, groups=3), "dilated conv": nn.Conv2d(3, 4, 2, dilation=2),
    "same": nn.Conv2d(3, 4, 4, padding="same"), "valid": nn.Conv2d(3, 4, 4, padding="valid"),
    "reflect": nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "replicate": nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"),
    "circular": nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "transposed conv": nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1),
    "grouped transposed conv": nn.ConvTranspose2d(3, 6, 3, groups=3),
    "conv 1d": nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 5)),
    "conv 3d": nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 2, 2)),
    "nearest": nn.Upsample(scale_factor=2), "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "pixel unshuffle": nn.PixelUnshuffle(2), "zero padding": nn.ZeroPad2d((1, 0, 2, 1)),
    "reflection": nn.ReflectionPad2d(1),
    "linear of tokens": Apply(lambda h, w: F.linear(h.flatten(2), torch.ones(2, 36, dtype=h.dtype), w[:2, 0, 0])),
    "matmul": Apply(lambda h, w: h @ w.expand(3, 6, 4)[0]),
    "matmul from the left": Apply(lambda h, w: w[:, 0].t() @ h.flatten(2)),
    "residual": _Residual(False), "residual in place": _Residual(True),
    "cat": Apply(lambda h, w: torch.cat([h, h.relu()], 1)),
    "cat of labels": Apply(lambda h, w: torch.cat([h, w.expand(4, 3, 6, 6)], 1)),
    "stack": Apply(lambda h, w: torch.stack([h, 2 * h], dim=1)), "chunk": Apply(lambda h, w: h.chunk(2, dim=2)[0]),
    "getitem": Apply(lambda h, w: h[:, 1:, ..., ::2]), "permute": Apply(lambda h, w: h.permute(0, 3, 1, 2)),
    "add": Apply(lambda h, w: h + w), "add a number": Apply(lambda h, w: 0.5 + h),
    "subtract": Apply(lambda h, w: 1 - h),
    "subtract in place": Apply(lambda h, w: (2 * h).sub_(w)), "alpha": Apply(lambda h, w: torch.add(h, w, alpha=2)),
    "multiply": Apply(lambda h, w: -h * w / 3), "multiply in place": Apply(lambda h, w: (h + 1).mul_(w.detach())),
    "where": Apply(lambda h, w: torch.where(h > 0, h, w)), "masked": Apply(_no_grad_mask),
    "detached factor": Apply(lambda h, w: h * h.detach()), "detached addend": Apply(lambda h, w: h + h.detach()),
    "shape": Apply(lambda h, w: h.view(h.shape[0], h.size(1), -1)),
    "expand": Apply(lambda h, w: h[:, :1].expand(-1, 5, 6, 6)),
    "dropout": nn.Dropout(0.5).train(), "dropout of channels": nn.Dropout2d(0.5).train(),
    "spectral norm, parametrization": parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
    "weight norm, parametrization": parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
    "spectral norm": spectral_norm(nn.Conv2d(3, 4, 3)),
}  # fmt: skip

GENERAL = {
    "silu": nn.SiLU(), "tanh": nn.Tanh(), "softplus": nn.Softplus(), "softmax": nn.Softmax(1),
    "square": Apply(lambda h, w: h * h), "power": Apply(lambda h, w: h**2), "product": Apply(lambda h, w: h[:, :1] * h),
    "quotient": Apply(lambda h, w: w / (h.abs() + 1)), "layer norm": nn.LayerNorm([3, 6, 6]),
    "group norm": nn.GroupNorm(3, 3),
    "instance norm": nn.InstanceNorm2d(3, affine=True),
    "attention": Apply(lambda h, w: h @ h.mT),
    "hidden function": Apply(lambda h, w: _Square.apply(h)), "hidden addend": Apply(lambda h, w: h + _Square.apply(h)),
    "hidden weight": Apply(lambda h, w: F.conv2d(h, _Square.apply(h).mean((0, 2, 3)).view(1, 3, 1, 1))),
    "dynamic weight": Apply(lambda h, w: F.conv2d(h, h.mean((0, 2, 3)).view(1, 3, 1, 1))),
    "written": Apply(_written), "channel set": Apply(_set(lambda h: (slice(None), 0))),
    "mask set": Apply(_set(lambda h: h > 0)), "added unseen": Apply(_added_unseen),
    "added to data": Apply(_added_to_data), "checkpoint": _Checkpointed(),
    "mean of the batch": Apply(lambda h, w: h - h.mean(0)),
    "reordered batch": Apply(lambda h, w: h[[1, 0, 3, 2]]), "flipped batch": Apply(lambda h, w: h.flip(0)),
    "transposed batch": Apply(lambda h, w: h[..., :4].transpose(0, 3).transpose(0, 3)),
    "smooth before convolution": nn.Sequential(nn.SiLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ELU()),
    "constant padding": nn.ConstantPad2d(1, 0.3),
}  # fmt: skip


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_piecewise_linear(name, claims):
    model, x = discriminator_of(copy.deepcopy(PIECEWISE_LINEAR[name]))
    if "dropout" in name:
        model.layers.train()
    _compare(model, x)
    assert claims == [True]


@pytest.mark.parametrize("name", GENERAL)
def test_everything_else_takes_the_general_path(name, claims):
    model, x = discriminator_of(copy.deepcopy(GENERAL[name]))
    _compare(model, x)
    assert claims == [False]
