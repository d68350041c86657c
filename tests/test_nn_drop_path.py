"""Stochastic depth: its distribution, per sample, and what the blocks make of it."""

from __future__ import annotations

import importlib

import pytest
import torch

from fastmix import nn

S, C = 4, 8
BLOCKS = {
    "MixerBlock": nn.MixerBlock,
    "ResMLPBlock": nn.ResMLPBlock,
    "FeedForwardBlock": nn.FeedForwardBlock,
    "GMLPBlock": nn.GMLPBlock,
    "GFNetBlock": lambda dim, seq_len, **named: nn.GFNetBlock(dim, seq_len // 2, 2, **named),
    "PreNormBlock": lambda dim, seq_len, **named: nn.PreNormBlock(dim, lambda: nn.TokenConv(dim), **named),
}


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_sample_is_dropped_or_scaled(p):
    n = 20_000
    x = torch.randn(n, 2, 3)
    y = nn.DropPath(p)(x)
    kept = y.ne(0).any(dim=(1, 2))
    torch.testing.assert_close(y[kept], x[kept] / (1 - p))
    assert not y[~kept].any()
    # A binomial count is within five standard deviations of its mean but once in two million seeds.
    assert abs(int((~kept).sum()) - n * p) < 5 * (n * p * (1 - p)) ** 0.5


def test_the_gradient_goes_the_same_way():
    x = torch.randn(64, 3).requires_grad_()
    y = nn.DropPath(0.5)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, torch.where(y == 0, 0.0, 2.0))


def test_identity_in_evaluation_and_without_rate():
    x = torch.randn(4, 3)
    assert nn.DropPath(0.5).eval()(x) is x
    assert nn.DropPath(0.0)(x) is x


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_a_rate_outside_of_0_to_1(p):
    for make in (nn.DropPath, lambda p: nn.MixerBlock(C, S, drop_path=p)):
        with pytest.raises(ValueError, match=rf"drop-path probability must be in \[0, 1\), got {p}"):
            make(p)
    with pytest.raises(ValueError, match=rf"drop_path_rate must be in \[0, 1\), got {p}"):
        nn.ResMLP(img_size=8, patch_size=4, drop_path_rate=p)


def test_repr():
    assert repr(nn.DropPath(0.25)) == "DropPath(p=0.25)"


def test_the_rate_rises_linearly_with_depth():
    model = nn.GMLP(img_size=8, patch_size=4, embed_dim=C, num_blocks=5, drop_path_rate=0.2)
    rates = torch.tensor([block.drop_path.p for block in model.blocks])
    torch.testing.assert_close(rates, torch.linspace(0, 0.2, 5))
    (only,) = nn.GMLP(img_size=8, patch_size=4, embed_dim=C, num_blocks=1, drop_path_rate=0.2).blocks
    assert only.drop_path.p == 0


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_drops_each_branch_for_each_sample(name):
    """Each branch is there twice as large, or not at all: no more than these outcomes, and all of them."""
    block = BLOCKS[name](C, S, drop_path=0.5)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(1, S, C).expand(200, -1, -1)
    outputs = block(x)
    outcomes = torch.unique(outputs.detach().round(decimals=3), dim=0)
    branches = 1 if name in ("GMLPBlock", "GFNetBlock") else 2
    assert len(outcomes) == 2**branches
    assert outputs.isclose(x).all(dim=(1, 2)).any()  # a sample all of whose branches are dropped
    if branches == 1:  # the two outcomes lie around what evaluation gives
        torch.testing.assert_close(outcomes.mean(0), block.eval()(x[0:1])[0], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "module", "op"),
    [
        ("MixerBlock", "_layers", "token_mixing_mlp"),
        ("FeedForwardBlock", "_layers", "token_mixing_mlp"),
        ("ResMLPBlock", "resmlp", "token_linear"),
    ],
)
def test_the_sum_is_fused_where_nothing_is_dropped(name, module, op, monkeypatch):
    module = importlib.import_module(f"fastmix.nn.{module}")
    original, fused = getattr(module, op), []

    def spy(x, *args, residual=None, **named):
        fused.append(residual is x)
        return original(x, *args, residual=residual, **named)

    monkeypatch.setattr(module, op, spy)
    block, x = BLOCKS[name](C, S, drop_path=0.5), torch.randn(2, S, C)
    block(x)
    block.eval()(x)
    BLOCKS[name](C, S)(x)
    assert fused == [False, True, True]


def test_compile():
    """In one graph; the compiled draw is as good as the eager one."""
    block = torch.compile(nn.MixerBlock(C, S, drop_path=0.5), fullgraph=True, backend="aot_eager")
    x = torch.randn(1, S, C).expand(200, -1, -1)
    assert len(torch.unique(block(x).detach().round(decimals=3), dim=0)) == 4
