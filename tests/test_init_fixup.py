"""Fixup: what it sets on which layers, and that the learning rate does not depend on the depth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmix.nn
from fastmix import init


def _seeded():
    return torch.Generator().manual_seed(0)


def _branch(dim=6, layers=3):
    steps = [nn.Linear(dim, dim)]
    for _ in range(layers - 1):
        steps += [nn.ReLU(), nn.Linear(dim, dim)]
    return nn.Sequential(*steps)


def _model(depth=5, dim=6, layers=3):
    blocks = [fastmix.nn.Residual(_branch(dim, layers), "fixup") for _ in range(depth)]
    return nn.Sequential(nn.Linear(4, dim), *blocks, nn.ReLU(), nn.Linear(dim, 3))


def test_fixup():
    model = _model()
    stem = model[0].weight.clone()
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.fill_(7)
    assert init.fixup_(model, generator=_seeded()) is model
    generator = _seeded()
    for block in model[1:6]:
        assert block.scale == 1
        assert (block.biases == 0).all()
        for layer in (block.branch[0], block.branch[2]):
            he = init.he_normal_(torch.empty(6, 6), generator=generator)
            torch.testing.assert_close(layer.weight, 5 ** (-1 / 4) * he)  # L = 5, m = 3
            assert (layer.bias == 0).all()
        assert (block.branch[4].weight == 0).all()
        assert (block.branch[4].bias == 0).all()
    assert torch.equal(model[0].weight, stem)
    x = torch.randn(2, 4)
    assert torch.equal(model[:6](x), model[0](x))
    assert (model(x) == 0).all()


class _Mixed(nn.Module):
    """A branch of every kind of layer, in an order of its own."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.ntk = fastmix.nn.NTKLinear(4, 9)
        self.conv = nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False)
        self.last = nn.Conv1d(4, 4, 1)


def test_fixup_of_other_layers():
    model = nn.ModuleList([_Mixed() for _ in range(3)])
    init.fixup_(model, model, generator=_seeded())
    generator, scale = _seeded(), 3 ** (-1 / 8)  # L = 3, m = 5
    for branch in model:
        packed = init.he_normal_(torch.empty(12, 4), generator=generator)
        torch.testing.assert_close(branch.attention.in_proj_weight, scale * packed)
        assert (branch.attention.in_proj_bias == 0).all()
        out = init.he_normal_(torch.empty(4, 4), generator=generator)
        torch.testing.assert_close(branch.attention.out_proj.weight, scale * out)
        ntk = init.he_normal_(torch.empty(9, 4), generator=generator)
        torch.testing.assert_close(branch.ntk.weight, scale * 2 * ntk)
        conv = init.he_normal_(torch.empty(4, 3, 3), groups=2, transposed=True, generator=generator)
        torch.testing.assert_close(branch.conv.weight, scale * conv)
        assert (branch.last.weight == 0).all()


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.block = fastmix.nn.Residual(_branch(), "fixup")
        self.head = nn.Linear(6, 9)
        self.head.weight = self.embedding.weight


def test_fixup_leaves_a_tied_classifier():
    model = _Tied()
    init.fixup_(model)
    assert (model.embedding.weight != 0).any()


def test_fixup_of_one_layer_and_of_no_classifier():
    model = nn.Sequential(nn.Linear(6, 6), fastmix.nn.Residual(nn.Linear(6, 6), "fixup"))
    init.fixup_(model)
    assert (model[0].weight != 0).any()
    assert (model[1].branch.weight == 0).all()
    init.fixup_(_model().to("meta"))


def test_fixup_of_torchvisions_resnet():
    models = pytest.importorskip("torchvision").models
    model = models.resnet18(norm_layer=lambda channels: nn.Identity())
    blocks = [module for module in model.modules() if isinstance(module, models.resnet.BasicBlock)]
    init.fixup_(model, [(block.conv1, block.conv2) for block in blocks], generator=_seeded())
    generator = _seeded()
    for block in blocks:
        he = init.he_normal_(torch.empty_like(block.conv1.weight), generator=generator)
        torch.testing.assert_close(block.conv1.weight, he * 8**-0.5)  # L = 8, m = 2
        assert (block.conv2.weight == 0).all()
    assert (model.layer4[0].downsample[0].weight != 0).all()
    assert (model.fc.weight == 0).all()


def _change(depth):
    """How far a step of SGD moves the outputs, second step, where all layers have gradients."""
    torch.manual_seed(0)
    model = init.fixup_(_model(depth, 32, 2).double())
    x, target = torch.randn(64, 4).double(), torch.randn(64, 3).double()
    changes = []
    for _ in range(3):
        before = model(x)
        F.mse_loss(before, target).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
        changes.append((model(x) - before).norm().item())
    return changes[-1]


def test_fixup_learns_alike_at_any_depth():
    shallow, deep = _change(4), _change(100)
    assert 0.2 < deep / shallow < 5  # 25 times as deep


@pytest.mark.parametrize(
    ("fix", "error", "message"),
    [
        (
            lambda: init.fixup_(nn.Sequential(nn.Linear(2, 2))),
            ValueError,
            "must have branches .* got Sequential without",
        ),
        (lambda: init.fixup_(nn.Linear(2, 2), []), ValueError, "must have branches"),
        (lambda: init.fixup_(3), TypeError, "model must be a torch.nn.Module, got int"),
        (lambda: init.fixup_(_model(), [nn.Linear(2, 2)]), ValueError, "branches must be parts of model"),
        (lambda: init.fixup_(nn.ReLU(), [nn.ReLU()]), ValueError, "must have a linear layer or a convolution, ReLU"),
        (lambda: init.fixup_(m := _branch(), [m, m[:1]]), ValueError, "must not share layers, Linear.* is in 2"),
        (
            lambda: init.fixup_(m := nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), [m]),
            ValueError,
            "must have parameters for weights",
        ),
    ],
)
def test_fixup_of_what_has_no_branches(fix, error, message):
    with pytest.raises(error, match=message):
        fix()
