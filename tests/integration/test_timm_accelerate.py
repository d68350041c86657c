"""timm's MLP-Mixer, ResMLP and gMLP, accelerated in place: every block, its options, and what is left alone."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastmix.integrations import timm as integration
from fastmix.integrations.timm import accelerate, restore

pytest.importorskip("timm")
import timm
from timm.layers import GluMlp, Mlp
from timm.models.mlp_mixer import Affine, MixerBlock, ResBlock, SpatialGatingBlock, SpatialGatingUnit

WHAT = {
    "MixerBlock": "MixerBlock → fastmix.token_mixing_mlp and its own channel MLP",
    "ResBlock": "ResBlock → fastmix.token_linear and its own channel MLP",
    "SpatialGatingUnit": "SpatialGatingUnit → fastmix.token_linear",
}


def _random(module: nn.Module) -> nn.Module:
    """Parameters none of which is without effect."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def _mixer(tokens=9, channels=14, hidden=21, **options) -> MixerBlock:
    return _random(MixerBlock(channels, tokens, mlp_ratio=(hidden / channels, 1.0), **options))


def _res(tokens=9, channels=14, **options) -> ResBlock:
    return _random(ResBlock(channels, tokens, mlp_ratio=1, **options))


def _gating(tokens=9, channels=14) -> SpatialGatingUnit:
    return _random(SpatialGatingUnit(2 * channels, tokens))


BLOCKS = {"token_mixing_mlp": _mixer, "token_linear": _res, "token_linear, gate": _gating}


@pytest.mark.parametrize("kind", list(BLOCKS))
@pytest.mark.parametrize(
    ("tokens", "channels"), [(1, 8), (7, 5), (49, 33), (100, 1), (196, 24), (197, 17), (1024, 19)], ids=str
)
def test_blocks_of_any_size(kind, tokens, channels, check_accelerated, assert_kernel):
    block = BLOCKS[kind](tokens, channels)
    x = torch.randn(2, tokens, channels * (2 if kind.endswith("gate") else 1))
    op = kind.partition(",")[0]
    ops = check_accelerated(integration, block, x)
    assert_kernel(ops, op)
    assert set(ops) <= {op, f"{op}_bwd"}


@pytest.mark.parametrize(
    "block",
    [
        partial(_mixer, act_layer=partial(nn.GELU, approximate="tanh")),
        partial(_mixer, act_layer=nn.ReLU),
        partial(_mixer, act_layer=nn.SiLU),
        partial(_mixer, norm_layer=Affine),
        partial(_mixer, norm_layer=partial(nn.LayerNorm, eps=0.1, bias=False)),
        partial(_mixer, norm_layer=partial(nn.LayerNorm, elementwise_affine=False)),
        partial(_mixer, mlp_layer=partial(Mlp, bias=False)),
        partial(_res, norm_layer=nn.LayerNorm),
    ],
)
def test_options_of_a_block(block, check_accelerated, assert_kernel):
    block = block()
    ops = check_accelerated(integration, block, torch.randn(2, 9, 14))
    assert_kernel(ops, "token_mixing_mlp" if isinstance(block, MixerBlock) else "token_linear")


@pytest.mark.parametrize("name", ["mixer_s32_224", "resmlp_12_224", "gmlp_ti16_224"])
def test_named_models_keep_their_logits(name, check_accelerated):
    model = timm.create_model(name, img_size=96, num_classes=10)
    model.blocks = model.blocks[:2]
    report = accelerate(model)
    kind = {"m": "MixerBlock", "r": "ResBlock", "g": "SpatialGatingUnit"}[name[0]]
    assert list(report.replaced.values()) == [WHAT[kind]] * 2
    restore(model)
    nn.init.normal_(model.head.weight)  # it is zero at first
    check_accelerated(integration, model, torch.randn(2, 3, 96, 96))


def test_autocast_keeps_the_dtype_of_the_sum(check_accelerated):
    """timm's is float32 by the scale, also where the input is bfloat16 already, as behind the patches' convolution."""
    context = partial(torch.autocast, "cpu", torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        check_accelerated(integration, _res(), torch.randn(2, 9, 14).to(dtype), context=context)


# Randomness


def _runs(block: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    output = block(x)
    return output.detach(), torch.get_rng_state()


@pytest.mark.parametrize("kind", ["token_mixing_mlp", "token_linear"])
@pytest.mark.parametrize("training", [True, False])
def test_drop_path_drops_the_same_paths(kind, training, check_accelerated, assert_kernel):
    block = BLOCKS[kind](drop_path=0.5).train(training)
    x = torch.randn(8, 9, 14)
    other = copy.deepcopy(block)
    accelerate(other)
    torch.manual_seed(5)
    (dropped,) = torch.nonzero((other.drop_path(torch.ones(8)) == 0) & training, as_tuple=True)
    assert (0 < len(dropped) < 8) == training
    assert torch.equal(_runs(block, x)[1], _runs(other, x)[1])
    ops = check_accelerated(integration, block, x)
    assert_kernel(ops, kind)


@pytest.mark.parametrize("name", ["drop1", "drop2"])
def test_dropout_is_timms_own(name, recorded, assert_kernel):
    block = _mixer().train()
    getattr(block.mlp_tokens, name).p = 0.4
    x = torch.randn(3, 9, 14)
    plain = _runs(block, x)[0]
    assert accelerate(block)
    with recorded() as ops:
        assert torch.equal(_runs(block, x)[0], plain)
    assert ops == []
    with recorded() as ops:
        block.eval()(x)
    assert_kernel(ops, "token_mixing_mlp")


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_gradient_checkpointing(kind):
    block = BLOCKS[kind]()
    accelerate(block)
    x = torch.randn(2, 9, 28 if kind.endswith("gate") else 14)
    grads = []
    for run in (block, partial(checkpoint, block, use_reentrant=False)):
        grads.append(torch.autograd.grad(run(x).square().sum(), list(block.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# What is left alone


class _QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class _Halved(MixerBlock):
    def forward(self, x):
        return super().forward(x) / 2


def _over_both(dim: int, **factory) -> nn.LayerNorm:
    return nn.LayerNorm((9, dim), elementwise_affine=False)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (partial(_mixer, mlp_layer=GluMlp, hidden=28, act_layer=nn.SiLU), "its mlp_tokens is a GluMlp"),
        (partial(_mixer, act_layer=_QuickGELU), "its mlp_tokens.act is a _QuickGELU"),
        (partial(_mixer, norm_layer=nn.RMSNorm), "its norm1 is a RMSNorm"),
        (partial(_mixer, norm_layer=_over_both), "its norm1 normalises over several dimensions"),
        (partial(_mixer, mlp_layer=partial(Mlp, norm_layer=nn.LayerNorm)), "its mlp_tokens.norm is a LayerNorm"),
        (partial(_res, norm_layer=nn.RMSNorm), "its norm1 is a RMSNorm"),
        (lambda: _Halved(14, 9), "_Halved, a subclass of MixerBlock"),
    ],
)
def test_blocks_that_the_kernels_do_not_know(make, reason):
    block = make()
    x = torch.randn(2, 9, 14)
    before = block(x)
    model = nn.Sequential(block, _mixer())
    report = accelerate(model)
    assert report.kept == {"0": reason}
    assert report.replaced == {"1": WHAT["MixerBlock"]}
    assert torch.equal(block(x), before)
    with pytest.raises(ValueError, match=r"found but left alone: \(the model\)"):
        accelerate(block)


def test_convolutions_are_left_alone():
    block = _mixer()
    block.mlp_tokens = Mlp(9, 21, use_conv=True)
    with pytest.raises(ValueError, match=r"its mlp_tokens\.fc1 is a Conv2d"):
        accelerate(block)


def test_report_of_a_gating_block():
    block = SpatialGatingBlock(14, 9)
    assert accelerate(block).replaced == {"mlp_channels.gate": WHAT["SpatialGatingUnit"]}
    assert type(block) is SpatialGatingBlock


@pytest.mark.parametrize("kind", ["token_mixing_mlp", "token_linear"])
def test_hooks_of_drop_path_fire(kind):
    block = BLOCKS[kind]()
    accelerate(block)
    calls = []
    block.drop_path.register_forward_hook(lambda *_: calls.append(1))
    block(torch.randn(2, 9, 14))
    assert len(calls) == 2
