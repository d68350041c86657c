"""Whole models of fastmix.nn: sizes, shapes, initialisation, state, errors."""

from __future__ import annotations

import copy
import functools
import math
import re

import pytest
import torch
import torch.nn.functional as F

from fastmix import _library, nn
from fastmix.ops import _route
from fastmix.testing.parity import FORWARD_FACTOR, check_parity

SMALL = {"img_size": (12, 16), "patch_size": 4, "embed_dim": 24, "num_blocks": 2, "num_classes": 5}
IMAGE_MODELS = {
    "MLPMixer": nn.MLPMixer,
    "ResMLP": nn.ResMLP,
    "FeedForwardStack": nn.FeedForwardStack,
    "GMLP": nn.GMLP,
    "aMLP": functools.partial(nn.GMLP, attention_dim=8),
    "GFNet": nn.GFNet,
    "EAMLP": functools.partial(nn.EAMLP, num_heads=4, memory_size=6),
}
ENCODERS = {
    "Encoder": lambda: nn.Encoder(functools.partial(nn.MixerBlock, 24, 12), 2, torch.nn.LayerNorm(24)),
    "SynthesizerEncoder": lambda: nn.SynthesizerEncoder(embed_dim=24, seq_len=12, num_blocks=2),
    "TokenConvEncoder": lambda: nn.TokenConvEncoder(embed_dim=24, num_blocks=2),
    "FNet": lambda: nn.FNet(embed_dim=24, num_blocks=2),
}
ALL = pytest.mark.parametrize("name", [*IMAGE_MODELS, *ENCODERS])


def _make(name):
    return IMAGE_MODELS[name](**SMALL) if name in IMAGE_MODELS else ENCODERS[name]()


def _input(name):
    return torch.randn(3, 3, 12, 16) if name in IMAGE_MODELS else torch.randn(3, 12, 24)


def _draw_parameters(model):
    """Away from an initialisation of zeros, under which wrong layers would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# Sizes


@pytest.mark.parametrize(
    ("make", "blocks", "dim", "hidden", "millions"),
    [
        (nn.mixer_s16, 8, 512, (256, 2048), 18.5),
        (nn.mixer_b16, 12, 768, (384, 3072), 59.9),
        (nn.mixer_l16, 24, 1024, (512, 4096), 208.2),
        (nn.resmlp_12, 12, 384, (196, 1536), 15.4),
        (nn.resmlp_24, 24, 384, (196, 1536), 30.0),
        (nn.resmlp_36, 36, 384, (196, 1536), 44.7),
        (nn.gmlp_ti16, 30, 128, (196, 768), 5.9),
        (nn.gmlp_s16, 30, 256, (196, 1536), 19.4),
        (nn.gmlp_b16, 30, 512, (196, 3072), 73.1),
        (nn.FeedForwardStack, 12, 768, (788, 3072), 61.9),
        (functools.partial(nn.GFNet, embed_dim=512, num_blocks=19), 19, 512, (None, 2048), 43.1),
    ],
)
def test_the_papers_sizes(make, blocks, dim, hidden, millions):
    with torch.device("meta"):
        model = make()
    assert len(model.blocks) == blocks
    shapes = {name.partition("blocks.0.")[2]: list(p.shape) for name, p in model.named_parameters()}
    tokens, channels = hidden
    assert [channels, dim] in shapes.values()
    if tokens is not None:
        seq_len = 197 if isinstance(model, nn.FeedForwardStack) else 196
        assert [tokens, seq_len] in shapes.values()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert model.head.out_features == 1000


@pytest.mark.parametrize(("make", "blocks", "dim"), [(nn.fnet_base, 12, 768), (nn.fnet_large, 24, 1024)])
def test_fnet_sizes(make, blocks, dim):
    with torch.device("meta"):
        model = make()
        assert len(make(num_blocks=3).blocks) == 3
    assert len(model.blocks) == blocks
    assert model.blocks[-1].mlp.fc1.weight.shape == (4 * dim, dim)
    assert model.blocks[-1].norm2.eps == 1e-12


def test_named_constructors_take_other_sizes():
    model = nn.mixer_s16(img_size=64, num_blocks=1, num_classes=0)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 512)
    for make, init_values in ((nn.resmlp_12, 1e-4), (nn.resmlp_24, 1e-5), (nn.resmlp_36, 1e-6)):
        assert make(num_blocks=1).blocks[0].ls1.eq(init_values).all()
    assert nn.gmlp_ti16(num_blocks=1, attention_dim=64).blocks[0].attn.proj.in_features == 64


# Values


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_image_model(name):
    model, x = _draw_parameters(_make(name)).eval(), _input(name)
    logits = model(x)
    assert logits.shape == (3, 5)
    # A sample's logits are its own.
    torch.testing.assert_close(model(x[1:2]), logits[1:2])
    assert not torch.allclose(logits[0], logits[1], rtol=1e-3)
    # All of an image counts, and the order of its tokens.
    assert not torch.allclose(model(x.flip(2)), logits, rtol=1e-3)
    model = IMAGE_MODELS[name](**SMALL | {"num_classes": 0, "in_chans": 1})
    assert model(x[:, :1]).shape == (3, 24)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder(name):
    model, x = _draw_parameters(_make(name)).eval(), _input(name)
    tokens = model(x)
    assert tokens.shape == x.shape
    torch.testing.assert_close(model(x[1:2]), tokens[1:2])
    assert not torch.allclose(model(x.flip(1)).flip(1), tokens, rtol=1e-3)


@ALL
def test_reference_and_kernels_agree(name, monkeypatch):
    model, x = _draw_parameters(_make(name)).eval(), _input(name)
    output, oracle = model(x), copy.deepcopy(model).double()(x.double())
    monkeypatch.setattr(_route, "kernels", dict.fromkeys(_route.kernels, frozenset()))
    monkeypatch.setattr(_library, "missing_reason", None)  # no warning
    check_parity(name, output, model(x), oracle, independent=1, factor=FORWARD_FACTOR)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_what_surrounds_the_blocks(name):
    """Patches, positions and class token before them; norm, class token or mean, and classifier behind."""
    model, x = _draw_parameters(_make(name)), _input(name)
    stem = model.stem if hasattr(model, "stem") else model.patch_embed
    tokens = F.conv2d(x, stem.proj.weight, stem.proj.bias, stride=4).flatten(2).mT
    with_class_token = isinstance(model, nn.FeedForwardStack)
    if with_class_token:
        tokens = torch.cat([model.cls_token.expand(3, 1, 24), tokens], dim=1)
    if hasattr(model, "pos_embed"):
        tokens = tokens + model.pos_embed
    for block in model.blocks:
        tokens = block(tokens)
    tokens = model.norm(tokens)
    pooled = tokens[:, 0] if with_class_token else tokens.mean(dim=1)
    torch.testing.assert_close(model(x), model.head(pooled))


def test_patches_go_row_by_row():
    """Token i·(W/p) + j is the patch at row i, column j, as GFNet's filter takes it."""
    model = nn.GFNet(**SMALL)
    x = torch.zeros(1, 3, 12, 16)
    x[:, :, 4:8, 8:12] = 1.0
    tokens = model.patch_embed(x) - model.patch_embed.proj.bias
    assert tokens.any(dim=2)[0].nonzero().flatten().tolist() == [1 * 4 + 2]


# State


@ALL
def test_state_dict_round_trip(name):
    model, other, x = _draw_parameters(_make(name)).eval(), _make(name).eval(), _input(name)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x), rtol=0, atol=0)


@ALL
def test_dtype_and_device(name):
    model = _make(name).to(torch.bfloat16)
    assert model(_input(name).to(torch.bfloat16)).dtype == torch.bfloat16
    with torch.device("meta"):
        assert {p.device.type for p in _make(name).state_dict().values()} == {"meta"}


@ALL
def test_every_parameter_gets_a_gradient(name):
    model = _draw_parameters(_make(name))
    model(_input(name)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def _mlp_names(name):
    return {f"{name}.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("make", "outside", "block"),
    [
        (nn.GFNet, {"pos_embed"}, {"filter.complex_weight"} | _mlp_names("mlp")),
        (nn.FeedForwardStack, {"cls_token", "pos_embed"}, _mlp_names("mlp1") | _mlp_names("mlp2")),
    ],
)
def test_names_of_the_papers_code(make, outside, block):
    norms = {f"norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    around = {f"{name}.{kind}" for name in ("patch_embed.proj", "norm", "head") for kind in ("weight", "bias")}
    blocks = {f"blocks.{i}.{name}" for i in (0, 1) for name in block | norms}
    assert make(**SMALL).state_dict().keys() == outside | around | blocks


def test_frozen_random_weights_are_state_and_not_trained():
    for module, names in (
        (nn.Synthesizer(8, 4, trainable=False), {"r"}),
        (nn.Synthesizer(8, 4, "factorized_random", trainable=False), {"r1", "r2"}),
        (nn.LinearMixing(8, 4, trainable=False), {"weight_tokens", "weight_channels"}),
    ):
        assert names <= module.state_dict().keys()
        assert not names & dict(module.named_parameters()).keys()


# Initialisation


def _assert_std(weight, std):
    """The sample's mean and deviation are within five standard errors of those asked for."""
    weight, n = weight.detach(), weight.numel()
    assert abs(float(weight.mean())) < 5 * std / math.sqrt(n)
    assert abs(float(weight.std()) - std) < 5 * std / math.sqrt(2 * n)


def test_mixer_starts_as_flax_does():
    model = nn.MLPMixer(img_size=64, embed_dim=64, num_blocks=1, num_classes=7)
    block = model.blocks[0]
    for layer in (block.mlp_tokens.fc1, block.mlp_channels.fc1, block.mlp_channels.fc2, model.stem.proj):
        fan_in = layer.weight[0].numel()
        _assert_std(layer.weight, fan_in**-0.5)
        assert float(layer.weight.detach().abs().max()) < 2 / 0.8796 * fan_in**-0.5 + 1e-6
        assert not layer.bias.any()
    assert not model.head.weight.any()
    assert not model.head.bias.any()


def test_resmlp_starts_as_the_papers_code_does():
    block = nn.ResMLP(img_size=64, embed_dim=64, num_blocks=1, init_values=1e-5).blocks[0]
    for layer in (block.linear_tokens, block.mlp_channels.fc1):
        _assert_std(layer.weight, 0.02)
        assert not layer.bias.any()
    for norm in (block.norm1, block.norm2):
        assert norm.alpha.eq(1).all()
        assert not norm.beta.any()
    assert block.ls1.eq(1e-5).all()
    assert block.ls2.eq(1e-5).all()


def test_gmlps_gate_starts_open():
    """W ≈ 0 and b = 1: the gate gives u, the first half, as it came."""
    model = nn.GMLP(img_size=64, embed_dim=32, num_blocks=1)
    gate = model.blocks[0].mlp_channels.gate
    _assert_std(gate.proj.weight, 1e-6)
    assert gate.proj.bias.eq(1).all()
    x = torch.randn(2, 16, 192)
    torch.testing.assert_close(gate(x), x[..., :96], atol=1e-4, rtol=1e-4)
    _assert_std(model.blocks[0].mlp_channels.fc1.weight, 0.02)


def test_the_others_start_as_their_papers_do():
    block = nn.FNet(embed_dim=64, num_blocks=1, mixing="linear", seq_len=16).blocks[0]
    for weight in (block.mlp.fc1.weight, block.mlp.fc1.bias, block.mlp.fc2.weight, *block.mixing.parameters()):
        _assert_std(weight, 0.02)
    assert not block.mlp.fc2.bias.any()
    _assert_std(nn.LinearMixing(64, 16, trainable=False).weight_channels, 1 / 8)
    _assert_std(nn.Synthesizer(64, 16).r, 1.0)
    _assert_std(nn.ExternalAttention(64).mk, 0.02)
    for model in (nn.GFNet(**SMALL), nn.FeedForwardStack(**SMALL)):
        _assert_std(model.pos_embed, 0.02)
        assert model.blocks[0].norm1.weight.eq(1).all()
    kernel = nn.TokenConv(256, 9).kernel
    assert float(kernel.detach().abs().max()) <= 1 / 3
    _assert_std(kernel, 1 / 3 / 3**0.5)


# Wrong input


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_an_image_of_another_size(name):
    for shape in ([2, 3, 12, 12], [2, 1, 12, 16], [3, 12, 16]):
        with pytest.raises(ValueError, match=re.escape(f"x must be [B, 3, 12, 16], got {shape}")):
            _make(name)(torch.randn(shape))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.MLPMixer(img_size=230), "img_size must be a multiple of patch_size = 16, got 230"),
        (lambda: nn.GFNet(img_size=(32, 40)), "img_size must be a multiple of patch_size = 16, got (32, 40)"),
        (lambda: nn.MixerBlock(8, 4, activation="tanh"), "activation must be one of 'gelu', 'gelu_tanh', "),
        (lambda: nn.GMLPBlock(8, 4, activation="tanh"), "activation must be one of 'gelu', 'gelu_tanh', "),
        (lambda: nn.ResMLP(activation="tanh"), "activation must be one of 'gelu', 'gelu_tanh', "),
        (lambda: nn.SpatialGatingUnit(7, 4), "dim must be even, got 7"),
        (lambda: nn.Synthesizer(8, 4, "sparse"), "kind must be one of 'random', 'factorized_random', "),
        (lambda: nn.Synthesizer(8, 4, num_heads=3), "num_heads must divide the 8 channels, got 3"),
        (lambda: nn.Synthesizer(8, 4, "dense", trainable=False), "trainable must be True where kind is 'dense'"),
        (lambda: nn.ExternalAttention(8, 0), "num_heads must divide the 8 channels, got 0"),
        (lambda: nn.TokenConv(8, kind="wide"), "kind must be one of 'depthwise', 'lightweight', 'dynamic', got 'wide'"),
        (lambda: nn.TokenConv(8, 0), "kernel_size must be at least 1, got 0"),
        (lambda: nn.TokenConv(8, num_heads=2), "num_heads must be 1 where kind is 'depthwise', got 2"),
        (lambda: nn.FNet(mixing="wavelet"), "mixing must be one of 'fourier', 'linear', 'random', got 'wavelet'"),
        (lambda: nn.FNet(mixing="linear"), "seq_len must be the number of tokens where mixing is 'linear', got None"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    "module",
    [
        nn.MixerBlock(8, 4),
        nn.ResMLPBlock(8, 4),
        nn.FeedForwardBlock(8, 4),
        nn.GMLPBlock(8, 4),
        nn.SpatialGatingUnit(8, 4),
        nn.Synthesizer(8, 4),
        nn.LinearMixing(8, 4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_another_number_of_tokens_or_channels(module):
    for shape in ([2, 5, 8], [2, 4, 7], [4, 8]):
        with pytest.raises(ValueError, match=re.escape(f"x must be [B, 4, 8], got {shape}")):
            module(torch.randn(shape))


def test_lengths_without_fourier():
    model = nn.FNet(embed_dim=8, num_blocks=1, mixing="random", seq_len=4)
    with pytest.raises(ValueError, match="lengths must be None where mixing is not 'fourier'"):
        model(torch.randn(1, 4, 8), torch.tensor([2]))


def test_repr_names_what_matters():
    shown = {
        nn.Affine(8): "Affine(8)",
        nn.LinearMixing(8, 4): "LinearMixing(8, seq_len=4)",
        nn.TokenConv(8, 3, "dynamic", num_heads=2): "kernel_size=3, kind='dynamic', num_heads=2, causal=False",
        nn.Synthesizer(8, 4): "8, seq_len=4, kind='random', num_heads=1",
        nn.ExternalAttention(8, 2, 5): "num_heads=2, memory_size=5",
        nn.MixerBlock(8, 4): "activation='gelu'",
    }
    for module, text in shown.items():
        assert text in repr(module)
