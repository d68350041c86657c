"""fastmix.nn.T5Attention as a module; its values are compared with transformers' in tests/integration."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from fastmix import nn

B, S = 2, 7


def test_starts_as_t5_does():
    module = nn.T5Attention(64, 4, 32, has_relative_attention_bias=True, num_buckets=64)
    tables = (module.q, module.k, module.v, module.o, module.relative_attention_bias)
    for layer, variance in zip(tables, (1 / (64 * 32), 1 / 64, 1 / 64, 1 / 128, 1 / 64), strict=True):
        weight = layer.weight.detach()
        assert abs(float(weight.square().mean()) / variance - 1) < 5 * (2 / weight.numel()) ** 0.5
    assert module.relative_bias == (module.relative_attention_bias.weight, True, 128)
    decoder = nn.T5Attention(8, 2, 4, is_decoder=True, has_relative_attention_bias=True, max_distance=20)
    assert decoder.relative_bias[1:] == (False, 20)
    assert nn.T5Attention(8, 2, 4).relative_bias is None


def test_calls_its_op(recorded, assert_kernel):
    with recorded() as ops:
        nn.T5Attention(8, 2, has_relative_attention_bias=True)(torch.randn(B, S, 8))
    assert_kernel(ops, "scaled_attention")


def test_compile_autocast_and_dtype():
    module = nn.T5Attention(8, 2, 4, is_decoder=True, has_relative_attention_bias=True, dropout=0.0)
    x = torch.randn(B, S, 8)
    expected = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, expected)
    grads = [torch.autograd.grad(output.square().sum(), list(module.parameters())) for output in (compiled, expected)]
    torch.testing.assert_close(*grads)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    assert copy.deepcopy(module).bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_dropout():
    """In training only, of the weights: the mean over many draws is the output without."""
    module, x = nn.T5Attention(8, 2, 4, dropout=0.5), torch.randn(1, S, 8)
    many = module(x.expand(2000, -1, -1))
    deviation = many.std(dim=0, correction=0)
    output = module.eval()(x)[0]
    assert deviation.min() > 0
    assert ((many.mean(dim=0) - output).abs() < 5 * deviation / 2000**0.5).all()


def test_wrong_input():
    module = nn.T5Attention(8, 2)
    with pytest.raises(ValueError, match=re.escape("x must be [B, length, 8], got [2, 7, 9]")):
        module(torch.randn(B, S, 9))
    with pytest.raises(ValueError, match=re.escape("key_value_states must be [B, length, 8], got [7, 8]")):
        module(torch.randn(B, S, 8), torch.randn(S, 8))
