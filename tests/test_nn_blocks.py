"""Blocks and mixing sublayers of fastmix.nn against the papers' formulas in plain PyTorch, values and gradients."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn as tnn

from fastmix import nn
from fastmix.testing.parity import FORWARD_FACTOR, GRADIENT_FACTOR, check_parity

B, S, C = 3, 12, 24


# The formulas


def _layer(norm, x):
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _linear(layer, x):
    return F.linear(x, layer.weight, layer.bias)


def _mlp(mlp, x, act=F.gelu):
    return _linear(mlp.fc2, act(_linear(mlp.fc1, x)))


def _mixer(block, x):
    x = x + _mlp(block.mlp_tokens, _layer(block.norm1, x).mT).mT
    return x + _mlp(block.mlp_channels, _layer(block.norm2, x))


def _resmlp(block, x):
    affine = lambda norm, x: norm.alpha * x + norm.beta  # noqa: E731
    x = x + block.ls1 * _linear(block.linear_tokens, affine(block.norm1, x).mT).mT
    return x + block.ls2 * _mlp(block.mlp_channels, affine(block.norm2, x))


def _feed_forward(block, x):
    x = x + _mlp(block.mlp1, _layer(block.norm1, x))
    return x + _mlp(block.mlp2, _layer(block.norm2, x.mT)).mT


def _gate(unit, x, added=None):
    u, v = x.chunk(2, dim=-1)
    v = _linear(unit.proj, _layer(unit.norm, v).mT).mT
    return (u * (v if added is None else v + added)).to(v.dtype)  # of an autocast product


def _gmlp(block, x):
    mlp, normed = block.mlp_channels, _layer(block.norm, x)
    added = None
    if block.attn is not None:
        q, k, v = _linear(block.attn.qkv, normed).chunk(3, dim=-1)
        added = _linear(block.attn.proj, (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v)
    return x + _linear(mlp.fc2, _gate(mlp.gate, F.gelu(_linear(mlp.fc1, normed)), added))


def _per_head(heads, *tensors):
    """[B, S, C] to the heads' [B, S, C/heads]."""
    return zip(*(tensor.chunk(heads, dim=-1) for tensor in tensors), strict=True)


def _external(module, x):
    outputs = []
    for (q,) in _per_head(module.num_heads, _linear(module.proj_in, x)):
        weights = (q @ module.mk.t()).softmax(dim=1)
        outputs.append(weights / (1e-9 + weights.sum(dim=2, keepdim=True)) @ module.mv)
    return _linear(module.proj_out, torch.cat(outputs, dim=-1))


def _synthesizer(module, x):
    hidden = F.relu(_linear(module.fc1, x)) if hasattr(module, "fc1") else x
    outputs = []
    for i, (h, value) in enumerate(_per_head(module.num_heads, hidden, _linear(module.value, x))):
        if module.kind == "random":
            r = module.r[i]
        elif module.kind == "factorized_random":
            r = module.r1[i] @ module.r2[i].t()
        elif module.kind == "dense":
            r = h @ module.w2[0][i].t() + module.b2[0][i]
        else:
            a, b = (h @ w[i].t() + c[i] for w, c in zip(module.w2, module.b2, strict=True))
            r = a.repeat_interleave(b.shape[-1], dim=-1) * b.repeat(1, 1, a.shape[-1])
        outputs.append(r.softmax(dim=-1) @ value)
    return _linear(module.out, torch.cat(outputs, dim=-1))


def _token_conv(module, x):
    a, b = _linear(module.proj_in, x).chunk(2, dim=-1)
    x, k = a * torch.sigmoid(b), module.kernel_size
    left = k - 1 if module.causal else (k - 1) // 2
    windows = F.pad(x, (0, 0, left, k - 1 - left)).unfold(1, k, 1)  # [B, S, C, K]
    channels = x.shape[-1] // module.num_heads
    if module.kind == "dynamic":
        kernel = _linear(module.proj_kernel, x).unflatten(-1, (-1, k)).softmax(-1).repeat_interleave(channels, dim=2)
    elif module.kind == "lightweight":
        kernel = module.kernel.softmax(-1).repeat_interleave(channels, dim=0)
    else:
        kernel = module.kernel
    return _linear(module.proj_out, (windows * kernel).sum(-1))


def _fnet(block, x):
    if isinstance(block.mixing, nn.LinearMixing):
        mixed = block.mixing.weight_tokens @ x @ block.mixing.weight_channels
    else:
        mixed = torch.fft.fft2(x).real
    x = _layer(block.norm1, x + mixed)
    return _layer(block.norm2, x + _mlp(block.mlp, x, functools.partial(F.gelu, approximate="tanh")))


def _gfnet(block, x):
    image = _layer(block.norm1, x).unflatten(1, (block.filter.h, block.filter.w))
    spectrum = torch.fft.rfft2(image, dim=(1, 2), norm="ortho") * torch.view_as_complex(block.filter.complex_weight)
    filtered = torch.fft.irfft2(spectrum, s=image.shape[1:3], dim=(1, 2), norm="ortho").flatten(1, 2)
    return x + _mlp(block.mlp, _layer(block.norm2, filtered))


def _pre_norm(block, x):
    x = x + _external(block.mixer, _layer(block.norm1, x))
    return x + _mlp(block.mlp, _layer(block.norm2, x), F.silu)


SYNTHESIZER_KINDS = ("random", "factorized_random", "dense", "factorized_dense")
CONV_KINDS = {"depthwise": 1, "lightweight": 4, "dynamic": 3}
# Name → (how to make it, its formula, the op it calls).
MODULES = {
    "MixerBlock": (lambda: nn.MixerBlock(C, S), _mixer, "token_mixing_mlp"),
    "ResMLPBlock": (lambda: nn.ResMLPBlock(C, S), _resmlp, "token_linear"),
    "FeedForwardBlock": (lambda: nn.FeedForwardBlock(C, S), _feed_forward, "token_mixing_mlp"),
    "SpatialGatingUnit": (lambda: nn.SpatialGatingUnit(C, S), _gate, "token_linear"),
    "GMLPBlock": (lambda: nn.GMLPBlock(C, S), _gmlp, "token_linear"),
    "GMLPBlock, aMLP": (lambda: nn.GMLPBlock(C, S, attention_dim=8), _gmlp, "token_linear"),
    "ExternalAttention": (lambda: nn.ExternalAttention(C, 4, 5, 2), _external, "external_attention"),
    "PreNormBlock": (
        lambda: nn.PreNormBlock(C, functools.partial(nn.ExternalAttention, C), 2.0, activation="silu"),
        _pre_norm,
        "external_attention",
    ),
    **{
        f"Synthesizer, {kind}": (
            functools.partial(nn.Synthesizer, C, S, kind, num_heads=3, rank=2),
            _synthesizer,
            "token_linear" if "random" in kind else None,
        )
        for kind in SYNTHESIZER_KINDS
    },
    "Synthesizer, fixed": (lambda: nn.Synthesizer(C, S, num_heads=2, trainable=False), _synthesizer, "token_linear"),
    **{
        f"TokenConv, {kind}": (functools.partial(nn.TokenConv, C, 5, kind, num_heads=heads), _token_conv, "token_conv")
        for kind, heads in CONV_KINDS.items()
    },
    "TokenConv, causal": (lambda: nn.TokenConv(C, 4, causal=True), _token_conv, "token_conv"),
    "FNetBlock": (lambda: nn.FNetBlock(C, dropout=0.0), _fnet, "fourier_mixing"),
    "FNetBlock, linear": (lambda: nn.FNetBlock(C, mixing="linear", seq_len=S, dropout=0.0), _fnet, "token_linear"),
    "FNetBlock, random": (lambda: nn.FNetBlock(C, mixing="random", seq_len=S, dropout=0.0), _fnet, "token_linear"),
    "GFNetBlock": (lambda: nn.GFNetBlock(C, 3, 4), _gfnet, "global_filter"),
}
ALL = pytest.mark.parametrize("name", MODULES)


def make(name: str) -> tnn.Module:
    """With parameters that are neither 0 nor 1, so that none of them goes unnoticed."""
    module = MODULES[name][0]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def _run(function, module, x):
    """The output, and the gradients of x and of the parameters."""
    x = x.detach().requires_grad_()
    output = function(module, x)
    draw = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad(output, [x, *parameters], draw.to(output.dtype))
    return output.detach(), dict(zip(("x", *names), grads, strict=True))


def _check(module, formula, x):
    output, grads = _run(lambda module, x: module(x), module, x)
    expected, expected_grads = _run(formula, module, x)
    with torch.autocast("cpu", enabled=False):
        oracle, oracle_grads = _run(formula, copy.deepcopy(module).double(), x.double())
    check_parity("output", output, expected, oracle, independent=1, factor=FORWARD_FACTOR)
    for name, grad in grads.items():
        named = {"independent": int(name == "x"), "factor": GRADIENT_FACTOR}
        check_parity(f"gradient of {name}", grad, expected_grads[name], oracle_grads[name], **named)


@ALL
def test_values_and_gradients(name):
    _check(make(name), MODULES[name][1], torch.randn(B, S, C))


@ALL
def test_calls_its_op(name, recorded, assert_kernel):
    _, _, op = MODULES[name]
    with recorded() as ops:
        make(name)(torch.randn(B, S, C))
    if op is None:
        assert ops == []
    else:
        assert_kernel(ops, op)


@pytest.mark.parametrize("name", ["MixerBlock", "ResMLPBlock", "FeedForwardBlock", "GMLPBlock, aMLP"])
def test_bfloat16(name):
    _check(make(name).bfloat16(), MODULES[name][1], torch.randn(B, S, C).bfloat16())


def test_the_gate_takes_what_is_added():
    unit, x, added = make("SpatialGatingUnit"), torch.randn(B, S, C), torch.randn(B, S, C // 2)
    expected, oracle = _gate(unit, x, added), _gate(copy.deepcopy(unit).double(), x.double(), added.double())
    check_parity("output", unit(x, added), expected, oracle, independent=1)


@pytest.mark.parametrize(
    ("activation", "function"),
    [("gelu_tanh", functools.partial(F.gelu, approximate="tanh")), ("relu", F.relu), ("silu", F.silu)],
)
def test_activation(activation, function):
    """The same one along the tokens and along the channels."""
    block, x = nn.MixerBlock(C, S, activation=activation), torch.randn(B, S, C)

    def formula(block, x):
        x = x + _mlp(block.mlp_tokens, _layer(block.norm1, x).mT, function).mT
        return x + _mlp(block.mlp_channels, _layer(block.norm2, x), function)

    _check(block, formula, x)


@ALL
@pytest.mark.filterwarnings("ignore:.*Memory Efficient attention")
def test_compile(name):
    """In one graph, forward and backward."""
    module, x = make(name), torch.randn(B, S, C)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    output, grads = _run(lambda _, x: compiled(x), module, x)
    expected, expected_grads = _run(lambda module, x: module(x), module, x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(grads, expected_grads)


@ALL
def test_autocast(name):
    """Products are bfloat16; the sum over the blocks, and the parameters' gradients, stay float32."""
    with torch.autocast("cpu", torch.bfloat16):
        _check(make(name), MODULES[name][1], torch.randn(B, S, C))
        assert make(name)(torch.randn(B, S, C)).dtype == (torch.float32 if "Block" in name else torch.bfloat16)


def test_lengths_keep_padding_out():
    """Of a Fourier encoder: what padding holds changes nothing before it."""
    model, x = nn.FNet(embed_dim=C, num_blocks=2, dropout=0.0), torch.randn(B, S, C)
    lengths = torch.tensor([S, 5, 1])
    changed = torch.where(torch.arange(S)[:, None] < lengths[:, None, None], x, 1e3)
    outputs = model(x, lengths), model(changed, lengths)
    for b, length in enumerate(lengths):
        torch.testing.assert_close(outputs[0][b, :length], outputs[1][b, :length])
        alone = model(x[b : b + 1, :length])[0]
        torch.testing.assert_close(outputs[0][b, :length], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(outputs[0][1, :5], model(x)[1, :5], atol=1e-2)
