"""mlp-mixer-pytorch and g-mlp-pytorch, accelerated in place: every option, and what is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastmix.integrations import lucidrains as integration
from fastmix.integrations.lucidrains import accelerate

pytest.importorskip("mlp_mixer_pytorch")
pytest.importorskip("g_mlp_pytorch")
from g_mlp_pytorch import SpatialGatingUnit, gMLP
from mlp_mixer_pytorch import MLPMixer, MLPMixer3D
from mlp_mixer_pytorch.mlp_mixer_pytorch import PreNormResidual

MIXER, GATING = "PreNormResidual → fastmix.token_mixing_mlp", "SpatialGatingUnit → fastmix.token_linear"


def _random(module: nn.Module) -> nn.Module:
    """Parameters none of which is without effect."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def _token_mlp(tokens=9, channels=14, hidden=21, activation=None, **convolution) -> PreNormResidual:
    layers = [
        nn.Conv1d(tokens, hidden, **{"kernel_size": 1} | convolution),
        activation or nn.GELU(),
        nn.Dropout(0.0),
        nn.Conv1d(hidden, tokens, **{"kernel_size": 1} | convolution),
        nn.Dropout(0.0),
    ]
    return _random(PreNormResidual(channels, nn.Sequential(*layers)))


def _gating(tokens=9, channels=14, **options) -> SpatialGatingUnit:
    return _random(SpatialGatingUnit(2 * channels, tokens, **options))


# mlp-mixer-pytorch


@pytest.mark.parametrize(("tokens", "channels"), [(1, 8), (7, 5), (100, 1), (196, 24), (1024, 3)], ids=str)
def test_token_mlp_of_any_size(tokens, channels, check_accelerated, assert_kernel):
    ops = check_accelerated(integration, _token_mlp(tokens, channels), torch.randn(2, tokens, channels))
    assert_kernel(ops, "token_mixing_mlp")


@pytest.mark.parametrize("activation", [nn.GELU("tanh"), nn.ReLU(), nn.SiLU(inplace=True)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_options_of_a_token_mlp(activation, bias, check_accelerated, assert_kernel):
    block = _token_mlp(activation=activation, bias=bias)
    assert_kernel(check_accelerated(integration, block, torch.randn(2, 9, 14)), "token_mixing_mlp")


def test_mixers_over_images_and_videos(check_accelerated):
    sizes = {"channels": 3, "patch_size": 4, "dim": 10, "depth": 2, "num_classes": 4}
    image, video = torch.randn(2, 3, 8, 12), torch.randn(2, 3, 4, 8, 8)
    models = (
        (MLPMixer(image_size=(8, 12), **sizes), image),
        (MLPMixer3D(image_size=8, time_size=4, time_patch_size=2, **sizes), video),
    )
    for model, x in models:
        ops = check_accelerated(integration, _random(model), x)
        assert len(ops) in (0, 4)
        report = accelerate(model)
        assert report.replaced == {"2.0": MIXER, "3.0": MIXER}
        assert report.kept == {}  # the MLPs over channels are none of the modules in question


@pytest.mark.parametrize("layer", [2, 4])
def test_dropout_is_the_peers_own(layer, recorded, assert_kernel):
    block = _token_mlp().train()
    block.fn[layer].p = 0.4
    other = copy.deepcopy(block)
    accelerate(block)
    x = torch.randn(3, 9, 14)
    with recorded() as ops:
        outputs = [(torch.manual_seed(3), module(x))[1] for module in (block, other)]
    assert torch.equal(*outputs)
    assert ops == []
    with recorded() as ops:
        block.eval()(x)
    assert_kernel(ops, "token_mixing_mlp")


class _Halved(PreNormResidual):
    def forward(self, x):
        return super().forward(x) / 2


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: _token_mlp(kernel_size=3, padding=1), "its fn.0 is no linear map over tokens"),
        (lambda: _token_mlp(activation=nn.Tanh()), "its fn.1 is a Tanh"),
        (lambda: PreNormResidual(14, nn.Sequential(nn.Conv1d(9, 9, 1), nn.GELU())), "its fn has 2 layers"),
        (lambda: _Halved(14, _token_mlp().fn), "_Halved, a subclass of PreNormResidual"),
    ],
)
def test_token_mlps_that_the_kernels_do_not_know(make, reason):
    block = make()
    x = torch.randn(2, 9, 14)
    before = block(x)
    report = accelerate(nn.Sequential(block, _token_mlp()))
    assert report.kept == {"0": reason}
    assert report.replaced == {"1": MIXER}
    assert torch.equal(block(x), before)


# g-mlp-pytorch


@pytest.mark.parametrize(("tokens", "channels"), [(1, 8), (7, 5), (100, 1), (196, 24), (1024, 3)], ids=str)
def test_gating_unit_of_any_size(tokens, channels, check_accelerated, assert_kernel):
    ops = check_accelerated(integration, _gating(tokens, channels), torch.randn(2, tokens, 2 * channels))
    assert_kernel(ops, "token_linear")


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("circulant", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_options_of_a_gating_unit(heads, causal, circulant, added, check_accelerated, assert_kernel):
    unit = _gating(heads=heads, causal=causal, circulant_matrix=circulant)
    inputs = [torch.randn(2, 9, 28), *([torch.randn(2, 9, 14)] if added else [])]
    assert_kernel(check_accelerated(integration, unit, *inputs), "token_linear")
    if causal:  # takes shorter sequences too
        check_accelerated(integration, unit, *(x[:, :5] for x in inputs))


def test_activation_of_the_gate(check_accelerated, assert_kernel):
    unit = _gating(act=nn.Tanh())
    ops = check_accelerated(integration, unit, torch.randn(2, 9, 28), torch.randn(2, 9, 14))
    assert_kernel(ops, "token_linear")
    calls = []
    unit.act = nn.Identity()
    unit.act.register_forward_hook(lambda *_: calls.append(1))
    unit(torch.randn(2, 9, 28))
    assert calls == [1]


@pytest.mark.parametrize(
    "options", [{"causal": True, "act": nn.Tanh()}, {"attn_dim": 6, "causal": True}, {"heads": 2, "shift_tokens": 1}]
)
def test_language_model(options, check_accelerated):
    model = _random(gMLP(num_tokens=30, dim=8, depth=2, seq_len=12, **options))
    ops = check_accelerated(integration, model, torch.randint(0, 30, (2, 12)))
    assert len(ops) in (0, 4)
    report = accelerate(model)
    assert list(report.replaced.values()) == [GATING] * 2
    assert report.kept == {}


def test_layers_are_dropped_as_before():
    model = _random(gMLP(num_tokens=30, dim=8, depth=6, seq_len=12, prob_survival=0.5)).train()
    other = copy.deepcopy(model)
    accelerate(other)
    ids = torch.randint(0, 30, (2, 12))
    states = []
    for either in (model, other):
        torch.manual_seed(1)
        gradients = torch.autograd.grad(either(ids).sum(), list(either.parameters()), allow_unused=True)
        states.append([gradient is None for gradient in gradients])
    assert states[0] == states[1]
    assert any(states[0])


def test_an_exchanged_norm_is_called():
    unit = _gating()
    unit.norm = nn.RMSNorm(14)
    with pytest.raises(ValueError, match="its norm is a RMSNorm"):
        accelerate(unit)
