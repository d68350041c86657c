"""Token-mixing MLP (MLP-Mixer) and token linear (ResMLP, gMLP): public functions, schemas, fakes, gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmix import _library
from fastmix.ops._check import FLOATS, check_choice, check_float, check_same_device, dtype_name, shape_text
from fastmix.ops._route import autocast, call, differentiate_backward, kernel_answers, needs_gradient, note_kernels
from fastmix.reference import token_mixing as reference

# Their places are the numbers that the kernels know them by.
_NORMS = (None, "layer", "affine", "token_layer")
_ACTIVATIONS = tuple(reference.ACTIVATIONS)


def token_mixing_mlp(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "gelu",
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Two-layer perceptron along the tokens, with the normalisation before it and the residual sum after it.

    y = residual + scale ⊙ (w2·act(w1·U + b1) + b2) with U = norm(x), the token-mixing half of an MLP-Mixer block.
    Equals ``residual + scale * (w2 @ act(w1 @ U + b1[:, None]) + b2[:, None])``. float32 accumulation for bfloat16 and
    float16.

    Args:
        x: [B, S, C] tokens by channels, float32, bfloat16, float16 or float64; S, C ≥ 1.
        w1: [D, S], x's dtype; D ≥ 1.
        w2: [S_out, D], x's dtype; S_out ≥ 1.
        b1: [D], like all vectors here of any floating-point dtype.
        b2: [S_out].
        norm: None (U = x), "layer" (LayerNorm over the channels), "affine" (U = norm_weight ⊙ x + norm_bias, per
            channel) or "token_layer" (LayerNorm over the tokens).
        norm_weight: [C], of "token_layer" [S]; None is 1.
        norm_bias: as norm_weight; None is 0.
        eps: added to the variance by the two LayerNorms.
        activation: "gelu" (with erf), "gelu_tanh", "relu" or "silu".
        scale: [C], None is 1.
        residual: [B, S_out, C]; x itself is fastest, also in the backward.

    Returns:
        [B, S_out, C], x's dtype, or residual's if that is wider. Under autocast x, w1 and w2 are cast, residual is not.

    Raises:
        TypeError: a tensor is no floating-point tensor, or w1 or w2 has another dtype than x.
        ValueError: a shape or a device does not fit x, norm or activation is unknown, norm_weight or norm_bias comes
            without norm, or eps is negative.

    Tolstikhin et al., MLP-Mixer: An all-MLP Architecture for Vision (arXiv:2105.01601).
    """
    check_float("x", x)
    x, w1, w2 = autocast(x, w1, w2)
    s, c = _check_tokens(x)
    d = _check_weight("w1", w1, x, "[D, S]", "S", s)
    s_out = _check_weight("w2", w2, x, "[S_out, D]", "D", d)
    _check_vector("b1", b1, x, "D", d)
    _check_vector("b2", b2, x, "S_out", s_out)
    _check_norm(x, norm, norm_weight, norm_bias, eps)
    check_choice("activation", activation, _ACTIVATIONS)
    _check_vector("scale", scale, x, "C", c)
    _check_like_output("residual", residual, x, s_out)
    wider = residual is not None and residual.dtype != x.dtype
    if wider or not kernel_answers("token_mixing_mlp", x):
        named = {"norm": norm, "norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps, "scale": scale}
        named |= {"activation": activation}
        if wider:
            return residual + token_mixing_mlp(x, w1, w2, b1, b2, **named)
        return reference.token_mixing_mlp(x, w1, w2, b1, b2, **named, residual=residual)
    add_x = residual is x
    tensors = (x, w1, w2, *_in_float32(b1, b2, norm_weight, norm_bias, scale), None if add_x else residual)
    options = (_NORMS.index(norm), eps, _ACTIVATIONS.index(activation), add_x, needs_gradient(*tensors))
    return call(torch.ops.fastmix.token_mixing_mlp.default, *tensors, *options)[0]


def token_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    gate: Tensor | None = None,
    added: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Linear map along the tokens, with the normalisation before it and the gate, scale and residual sum after it.

    y = residual + scale ⊙ gate ⊙ (weight·U + bias + added) with U = norm(x): ResMLP's token mixing (scale, residual),
    gMLP's gating unit (gate), aMLP's (added), Synthesizer's (weight = softmax(R)). Equals
    ``residual + scale * gate * (weight @ U + bias[:, None] + added)``. float32 accumulation for bfloat16 and float16.

    Args:
        x: [B, S, C] tokens by channels, float32, bfloat16, float16 or float64; S, C ≥ 1.
        weight: [S_out, S], or [heads, S_out, S], each head's for its own C/heads channels; x's dtype; S_out ≥ 1.
        bias: [S_out], or [heads, S_out] if weight has heads; like all vectors here of any floating-point dtype.
        norm: None (U = x), "layer" (LayerNorm over the channels), "affine" (U = norm_weight ⊙ x + norm_bias, per
            channel) or "token_layer" (LayerNorm over the tokens).
        norm_weight: [C], of "token_layer" [S]; None is 1.
        norm_bias: as norm_weight; None is 0.
        eps: added to the variance by the two LayerNorms.
        gate: [B, S_out, C], x's dtype; None is 1.
        added: [B, S_out, C], x's dtype; None is 0.
        scale: [C]; None is 1.
        residual: [B, S_out, C]; x itself is fastest, also in the backward.

    Returns:
        [B, S_out, C], x's dtype, or residual's if that is wider. Under autocast x, weight, gate and added are cast,
        residual is not.

    Raises:
        TypeError: a tensor is no floating-point tensor, or weight, gate or added has another dtype than x.
        ValueError: a shape or a device does not fit x, C is no multiple of heads, norm is unknown, norm_weight or
            norm_bias comes without norm, or eps is negative.

    Touvron et al., ResMLP (arXiv:2105.03404); Liu et al., Pay Attention to MLPs (arXiv:2105.08050).
    """
    check_float("x", x)
    x, weight, gate, added = autocast(x, weight, gate, added)
    s, c = _check_tokens(x)
    heads = _check_heads(weight, bias, x)
    s_out = _check_weight("weight", weight, x, "[heads, S_out, S]" if heads else "[S_out, S]", "S", s)
    if not heads:
        _check_vector("bias", bias, x, "S_out", s_out)
    _check_norm(x, norm, norm_weight, norm_bias, eps)
    _check_vector("scale", scale, x, "C", c)
    for name, value in (("gate", gate), ("added", added), ("residual", residual)):
        _check_like_output(name, value, x, s_out)
    wider = residual is not None and residual.dtype != x.dtype
    if wider or not kernel_answers("token_linear", x):
        named = {"norm": norm, "norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps, "scale": scale}
        named |= {"gate": gate, "added": added}
        if wider:
            return residual + token_linear(x, weight, bias, **named)
        return reference.token_linear(x, weight, bias, **named, residual=residual)
    add_x = residual is x
    bias, norm_weight, norm_bias, scale = _in_float32(bias, norm_weight, norm_bias, scale)
    tensors = (x, weight, bias, norm_weight, norm_bias, gate, added, scale, None if add_x else residual)
    options = (_NORMS.index(norm), eps, add_x, needs_gradient(*tensors))
    return call(torch.ops.fastmix.token_linear.default, *tensors, *options)[0]


def _in_float32(*vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(v if v is None or v.dtype is torch.float32 else v.to(torch.float32) for v in vectors)


# Checks


def _check_tokens(x: Tensor) -> tuple[int, int]:
    if x.ndim != 3 or 0 in x.shape[1:]:
        raise ValueError(f"x must be [B, S, C] with S, C ≥ 1, got {shape_text(x)}")
    return x.shape[1], x.shape[2]


def _check_weight(name: str, weight: Tensor, x: Tensor, form: str, column: str, columns: int) -> int:
    """Returns the number of rows."""
    _check_same_dtype(name, weight, x)
    if weight.ndim != form.count(",") + 1 or weight.shape[-1] != columns or weight.shape[-2] == 0:
        raise ValueError(f"{name} must be {form} with {column} = {columns}, got {shape_text(weight)}")
    return weight.shape[-2]


def _check_heads(weight: Tensor, bias: Tensor | None, x: Tensor) -> int:
    """The number of heads, 0 for a weight without; checks what the heads alone decide."""
    check_float("weight", weight)
    if weight.ndim != 3:
        return 0
    heads, s_out, _ = weight.shape
    if heads == 0 or x.shape[2] % heads != 0:
        raise ValueError(
            f"weight must be [heads, S_out, S] with C = {x.shape[2]} a multiple of heads, got {heads} heads"
        )
    if bias is not None:
        _check_float_beside_x("bias", bias, x)
        if list(bias.shape) != [heads, s_out]:
            raise ValueError(f"bias must be [heads, S_out] = {[heads, s_out]}, got {shape_text(bias)}")
    return heads


def _check_norm(x: Tensor, norm: str | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    check_choice("norm", norm, _NORMS)
    for name, value in (("norm_weight", weight), ("norm_bias", bias)):
        if norm is None and value is not None:
            raise ValueError(f"{name} must be None without norm, got {shape_text(value)}")
        _check_vector(name, value, x, *(("S", x.shape[1]) if norm == "token_layer" else ("C", x.shape[2])))
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


def _check_vector(name: str, value: Tensor | None, x: Tensor, letter: str, size: int) -> None:
    if value is None or _fits(value, x, (size,)):
        return
    _check_float_beside_x(name, value, x)
    raise ValueError(f"{name} must be [{letter}] = [{size}], got {shape_text(value)}")


def _check_like_output(name: str, value: Tensor | None, x: Tensor, s_out: int) -> None:
    expected = (x.shape[0], s_out, x.shape[2])
    if value is None or (_fits(value, x, expected) and (value.dtype == x.dtype or name == "residual")):
        return
    _check_float_beside_x(name, value, x)
    if value.shape != expected:
        raise ValueError(f"{name} must be [B, S_out, C] = {list(expected)}, got {shape_text(value)}")
    _check_same_dtype(name, value, x)


def _fits(value: object, x: Tensor, shape: tuple[int, ...]) -> bool:
    """The quick way past the checks that tell what is wrong: a call checks up to nine tensors."""
    return isinstance(value, Tensor) and value.shape == shape and value.device == x.device and value.dtype in FLOATS


def _check_same_dtype(name: str, value: Tensor, x: Tensor) -> None:
    _check_float_beside_x(name, value, x)
    if value.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {dtype_name(x.dtype)}, got {dtype_name(value.dtype)}")


def _check_float_beside_x(name: str, value: Tensor, x: Tensor) -> None:
    check_float(name, value)
    check_same_device(name, value, "x", x)


# Schemas, fakes, gradients. `saved` is what the forward keeps for the backward, of no elements where it keeps nothing:
# token_mixing_mlp on a CPU in float32 w1·U + b1 [B, D, C], token_linear the factor of gate and scale [B, S_out, C].
# A backward op returns a gradient for each tensor in the forward's order, one of no elements where there is none.

_MLP_TENSORS = (
    "Tensor x, Tensor w1, Tensor w2, Tensor? b1, Tensor? b2, Tensor? norm_weight, Tensor? norm_bias, Tensor? scale"
)
_LINEAR_TENSORS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? gate, Tensor? added, "
    "Tensor? scale"
)
_NUM_TENSORS = 8
_GRADIENTS = f"({', '.join(['Tensor'] * _NUM_TENSORS)})"
for _name, _tensors, _options in (
    ("token_mixing_mlp", _MLP_TENSORS, "int norm, float eps, int activation, bool add_x"),
    ("token_linear", _LINEAR_TENSORS, "int norm, float eps, bool add_x"),
):
    torch.library.define(
        f"fastmix::{_name}",
        f"({_tensors}, Tensor? residual, {_options}, bool save) -> (Tensor, Tensor)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    torch.library.define(
        f"fastmix::{_name}_bwd",
        f"(Tensor grad_output, {_tensors}, Tensor saved, {_options}, bool input_grad, bool parameter_grads) "
        f"-> {_GRADIENTS}",
        tags=(torch.Tag.pt2_compliant_tag,),
    )


def _saved(x: Tensor, *shape: int) -> Tensor:
    """float16 could overflow."""
    return x.new_empty(shape, dtype=torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32)


@torch.library.register_fake("fastmix::token_mixing_mlp")
def _(x, w1, w2, b1, b2, norm_weight, norm_bias, scale, residual, norm, eps, activation, add_x, save):
    keeps = save and x.device.type == "cpu" and x.dtype == torch.float32
    saved = (x.shape[0], w1.shape[0], x.shape[2]) if keeps else (0,)
    return x.new_empty(x.shape[0], w2.shape[0], x.shape[2]), _saved(x, *saved)


@torch.library.register_fake("fastmix::token_linear")
def _(x, weight, bias, norm_weight, norm_bias, gate, added, scale, residual, norm, eps, add_x, save):
    out = (x.shape[0], weight.shape[-2], x.shape[2])
    keeps = save and (gate is not None or scale is not None)
    return x.new_empty(out), _saved(x, *(out if keeps else (0,)))


def _empty_like_each(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in tensors)


@torch.library.register_fake("fastmix::token_mixing_mlp_bwd")
def _(grad_output, x, *arguments):
    *_, input_grad, parameter_grads = arguments
    parameters = arguments[: _NUM_TENSORS - 1] if parameter_grads else (None,) * (_NUM_TENSORS - 1)
    return _empty_like_each(x, x if input_grad else None, *parameters)


@torch.library.register_fake("fastmix::token_linear_bwd")
def _(grad_output, x, weight, bias, norm_weight, norm_bias, gate, added, scale, *arguments):
    *_, input_grad, parameter_grads = arguments
    parameters = (weight, bias, norm_weight, norm_bias, scale) if parameter_grads else (None,) * 5
    return _empty_like_each(x, x if input_grad else None, *parameters[:4], gate, added, parameters[4])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:_NUM_TENSORS], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.options = inputs[_NUM_TENSORS + 1 : -1]
    ctx.set_materialize_grads(False)


def _register_backward(op: str, differentiable: Callable[..., Tensor]) -> None:
    op_bwd = getattr(torch.ops.fastmix, f"{op}_bwd").default

    def backward(ctx, grad_output, grad_saved):
        needs = ctx.needs_input_grad
        if grad_output is None:
            return (None,) * len(needs)
        wanted = needs[0], any(needs[1:_NUM_TENSORS])
        grads = call(op_bwd, grad_output, *ctx.saved_tensors, *ctx.options, *wanted)
        grads = [grad if need else None for grad, need in zip(grads, needs, strict=False)]
        return *grads, grad_output if needs[_NUM_TENSORS] else None, *(None,) * (len(needs) - _NUM_TENSORS - 1)

    torch.library.register_autograd(f"fastmix::{op}", backward, setup_context=_save)
    differentiate_backward(f"{op}_bwd", differentiable, num_inputs=_NUM_TENSORS, num_saved=1)


def _mlp(x, w1, w2, b1, b2, norm_weight, norm_bias, scale, norm, eps, activation, add_x, *_):
    """The reference with the op's arguments."""
    named = {"norm": _NORMS[norm], "norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps, "scale": scale}
    named |= {"activation": _ACTIVATIONS[activation], "residual": x if add_x else None}
    return reference.token_mixing_mlp(x, w1, w2, b1, b2, **named)


def _linear(x, weight, bias, norm_weight, norm_bias, gate, added, scale, norm, eps, add_x, *_):
    named = {"norm": _NORMS[norm], "norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps, "scale": scale}
    named |= {"gate": gate, "added": added, "residual": x if add_x else None}
    return reference.token_linear(x, weight, bias, **named)


_register_backward("token_mixing_mlp", _mlp)
_register_backward("token_linear", _linear)


def _token_mixing_mlp_cuda(*arguments):
    from tritonkernels.token_mixing import token_mixing_mlp

    return token_mixing_mlp(*arguments)


def _token_mixing_mlp_bwd_cuda(*arguments):
    from tritonkernels.token_mixing import token_mixing_mlp_bwd

    return token_mixing_mlp_bwd(*arguments)


def _token_linear_cuda(*arguments):
    from tritonkernels.token_mixing import token_linear

    return token_linear(*arguments)


def _token_linear_bwd_cuda(*arguments):
    from tritonkernels.token_mixing import token_linear_bwd

    return token_linear_bwd(*arguments)


if _library.triton_serves:
    torch.library.impl("fastmix::token_mixing_mlp", "CUDA", _token_mixing_mlp_cuda)
    torch.library.impl("fastmix::token_mixing_mlp_bwd", "CUDA", _token_mixing_mlp_bwd_cuda)
    torch.library.impl("fastmix::token_linear", "CUDA", _token_linear_cuda)
    torch.library.impl("fastmix::token_linear_bwd", "CUDA", _token_linear_bwd_cuda)
for _name in ("token_mixing_mlp", "token_mixing_mlp_bwd", "token_linear", "token_linear_bwd"):
    note_kernels(_name)
