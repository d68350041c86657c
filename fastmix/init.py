"""Initialisers, in place and returning their tensor: variance scaling by fans, truncated, orthogonal, T5's, Fixup's.

A weight is laid out as PyTorch lays it out, [out, in/groups, *kernel], a transposed convolution's [in, out/groups,
*kernel]. An output of the layer sums fan_in = in/groups·∏kernel products, an input takes part in
fan_out = out/groups·∏kernel; where a layer has groups or is transposed, say so, since its weight does not show it.
Strides are not counted: an output of a transposed convolution sums about fan_in/∏stride products.

bfloat16 and float16 tensors are drawn in float32 and rounded once. Empty tensors and those on the meta device come back
as they are.
"""

from __future__ import annotations

from torch import Generator, Tensor, nn

from fastmix._init_fixup import fixup_
from fastmix._init_gain import activation_gain
from fastmix._init_scaling import (
    check_finite,
    check_weight,
    draw_truncated,
    fill,
    he_normal_,
    he_truncated_normal_,
    he_uniform_,
    lecun_normal_,
    lecun_truncated_normal_,
    lecun_uniform_,
    xavier_normal_,
    xavier_truncated_normal_,
    xavier_uniform_,
)
from fastmix.ops._check import check_choice, check_float, shape_text

__all__ = [
    "activation_gain",
    "fixup_",
    "he_normal_",
    "he_truncated_normal_",
    "he_uniform_",
    "lecun_normal_",
    "lecun_truncated_normal_",
    "lecun_uniform_",
    "orthogonal_",
    "roformer_v2_",
    "t5_attention_",
    "truncated_normal_",
    "xavier_normal_",
    "xavier_truncated_normal_",
    "xavier_uniform_",
]


def truncated_normal_(
    t: Tensor, mean: float = 0.0, std: float = 1.0, cut: float = 2.0, *, generator: Generator | None = None
) -> Tensor:
    """Fills t from a normal distribution that is cut off on both sides, with a *resulting* standard deviation of std.

    N(mean, σ²) restricted to [mean − cut·σ, mean + cut·σ], where σ = std/k and k² = 1 − √(2/π)·cut·exp(−cut²/2) /
    erf(cut/√2) is the variance that the cut leaves of a unit normal: k = 0.8796 for cut = 2, so σ = 1.1368·std.
    ``torch.nn.init.trunc_normal_(t, std=std, a=-2 * std, b=2 * std)`` gives 0.8796·std instead. The usual form, as in
    Keras; Burkardt, The Truncated Normal Distribution (2014).

    Args:
        t: float32, bfloat16, float16 or float64, of any shape.
        mean: of the result.
        std: the standard deviation of the result, ≥ 0.
        cut: where the normal distribution is cut off, in its own σ; > 0, infinite for no cut; a small one gives a
            nearly uniform distribution.
        generator: to draw with, None for PyTorch's own.

    Returns:
        t.

    Raises:
        TypeError: t is no floating-point tensor.
        ValueError: std is negative, cut is not positive, or one of mean and std is not finite.
    """
    check_float("t", t)
    check_finite("mean", mean)
    check_finite("std", std, 0)
    if not cut > 0:
        raise ValueError(f"cut must be positive, got {cut}")
    return fill(t, lambda x: draw_truncated(x, std, generator, mean, cut))


def orthogonal_(
    t: Tensor, gain: float = 1.0, *, groups: int = 1, transposed: bool = False, generator: Generator | None = None
) -> Tensor:
    """Fills t with gain times a (semi-)orthogonal matrix [out, fan_in], uniform among them; one for each group.

    The rows are orthonormal where out/groups ≤ fan_in, else the columns are. ``torch.nn.init.orthogonal_(t, gain)`` is
    the same with groups = 1: of a depthwise convolution it makes one matrix [out, ∏kernel], whose rows are short.
    Saxe et al., Exact solutions to the nonlinear dynamics of learning in deep linear neural networks (arXiv:1312.6120).

    Args:
        t: weight [out, in/groups, *kernel].
        gain: factor on the matrix.
        groups: of the convolution.
        transposed: whether t is a transposed convolution's, [in, out/groups, *kernel].
        generator: to draw with, None for PyTorch's own.

    Returns:
        t.

    Raises:
        TypeError: t is no floating-point tensor.
        ValueError: t has fewer than 2 dimensions, gain is not finite, or groups does not divide t.shape[0].
    """
    check_finite("gain", gain)
    check_weight(t, groups)

    def draw(x: Tensor) -> Tensor:
        for group in x.unflatten(0, (groups, -1)):
            weight = group.transpose(0, 1) if transposed else group
            weight.copy_(nn.init.orthogonal_(weight.new_empty(weight.shape), gain, generator=generator))
        return x

    return fill(t, draw)


# Attention


def t5_attention_(
    q_proj: nn.Linear | Tensor,
    k_proj: nn.Linear | Tensor,
    convention: str = "split",
    *,
    head_dim: int,
    generator: Generator | None = None,
) -> tuple[nn.Linear | Tensor, nn.Linear | Tensor]:
    """Fills the projections of queries and keys so that q·k has second moment 1: attention without 1/√head_dim.

    Normal, of LeCun's variance 1/dim, divided by √head_dim for both ("split"), or by head_dim for the queries' alone
    ("query", as T5's code does: std (dim·head_dim)^−½). For ``scaled_attention(q, k, v, scale=1.0)``.
    Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (arXiv:1910.10683).

    Args:
        q_proj: the linear layer that makes the queries, or its weight [num_heads·head_dim, dim]; a bias stays.
        k_proj: the keys' likewise; its dim may be another.
        convention: "split" or "query".
        head_dim: channels of a head.
        generator: to draw with, None for PyTorch's own.

    Returns:
        q_proj and k_proj.

    Raises:
        TypeError: a projection is neither a layer with a weight nor a floating-point tensor.
        ValueError: an unknown convention, a weight that is not [heads·head_dim, dim], or head_dim < 1.
    """
    check_choice("convention", convention, ("split", "query"))
    if head_dim < 1:
        raise ValueError(f"head_dim must be at least 1, got {head_dim}")
    weights = []
    for name, layer in (("q_proj", q_proj), ("k_proj", k_proj)):
        weight = layer.weight if isinstance(layer, nn.Linear) else layer
        check_float(name, weight)
        if weight.ndim != 2 or weight.shape[0] % head_dim:
            raise ValueError(f"{name} must be [heads·{head_dim}, dim], got {shape_text(weight)}")
        weights.append(weight)
    exponents = (-0.25, -0.25) if convention == "split" else (-0.5, 0.0)
    for weight, exponent in zip(weights, exponents, strict=True):
        lecun_normal_(weight, head_dim**exponent, generator=generator)
    return q_proj, k_proj


def roformer_v2_(t: Tensor, hidden_size: int, num_layers: int, *, generator: Generator | None = None) -> Tensor:
    """Fills t as RoFormerV2 does: normal with σ = 1.13684723/√(hidden_size·num_layers), cut off at ±2σ.

    The standard deviation that results is 1/√(hidden_size·num_layers): LeCun's, and less for depth, so that a post-norm
    stack without warm-up changes by a bounded amount in a step. Su et al., RoFormerV2 (2022,
    github.com/ZhuiyiTechnology/roformer-v2).

    Args:
        t: a weight or an embedding, of any shape.
        hidden_size: channels of the model.
        num_layers: blocks of the model.
        generator: to draw with, None for PyTorch's own.

    Returns:
        t.

    Raises:
        TypeError: t is no floating-point tensor.
        ValueError: hidden_size or num_layers is less than 1.
    """
    for name, size in (("hidden_size", hidden_size), ("num_layers", num_layers)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    return truncated_normal_(t, std=(hidden_size * num_layers) ** -0.5, generator=generator)
