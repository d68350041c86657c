"""Token MLP, y = residual + scale ⊙ (W2·act(W1·norm(x) + b1) + b2), token linear, y = residual + scale ⊙ gate ⊙
(W·norm(x) + bias + added), and their gradients.

The MLP of a short sequence stays on chip (_token_mlp_fwd.py); everything else is products along the tokens
(_token_product.py), that of a long sequence two of them with a hidden buffer [B, D, C]. The backward recomputes the
hidden layer beside its gradient (_token_mlp_bwd.py). What is hidden or a gradient multiplies in bfloat16, or in TF32
for a float16 x, whose range it may leave.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkernels._launch import noted_launches, rows, tf32, wide
from tritonkernels._token_gradients import factor_bwd, input_gradient, weight_grad
from tritonkernels._token_mlp_bwd import hidden_bwd
from tritonkernels._token_mlp_fwd import mlp_on_chip, stays_on_chip
from tritonkernels._token_norm import AFFINE, LAYER, TOKEN_LAYER, Normalised, normalised
from tritonkernels._token_product import token_product


def token_mixing_mlp(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    norm: int,
    eps: float,
    activation: int,
    add_x: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """(y, saved), saved of no elements: the backward needs the inputs only."""
    x = rows(x)
    residual = x if add_x else None if residual is None else rows(residual)
    out = x.new_empty(x.shape[0], w2.shape[0], x.shape[2])
    hidden_dtype = wide(x.dtype)
    if out.numel() > 0:
        u = normalised(x, norm, eps, norm_weight, norm_bias)
        if stays_on_chip(x.shape[1], w2.shape[0], x.dtype):
            mlp_on_chip(u, w1, w2, b1, b2, scale, residual, activation, out)
        else:
            hidden = x.new_empty(x.shape[0], w1.shape[0], x.shape[2], dtype=hidden_dtype)
            how = {"tf32": tf32(x.dtype)}
            token_product(w1[None], u, hidden, operand=x.dtype, bias=b1, activation=activation, **how)
            operands = {"operand": hidden_dtype, **how}
            token_product(w2[None], Normalised(hidden), out, bias=b2, scale=scale, residual=residual, **operands)
    return out, x.new_empty(0, dtype=hidden_dtype)


def token_mixing_mlp_bwd(
    grad_output: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    saved: Tensor,
    norm: int,
    eps: float,
    activation: int,
    add_x: bool,
    input_grad: bool,
    parameter_grads: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x, w1, w2, b1, b2, norm_weight, norm_bias, scale, of no elements where there is none."""
    x, dy = rows(x), rows(grad_output)
    operands = {"operand": wide(x.dtype), "tf32": tf32(x.dtype)}
    u = normalised(x, norm, eps, norm_weight, norm_bias)
    once = u.for_rows(w1.shape[0])
    hidden, dhidden, db1, dscale = hidden_bwd(once, dy, w1, w2, b1, scale, activation, parameter_grads, **operands)
    dy_of_x = dy if add_x else None
    dx, dnorm_weight, dnorm_bias = input_gradient(
        w1[None], dhidden, u, dy_of_x, input_grad, parameter_grads, **operands
    )
    dw1 = dw2 = db2 = None
    if parameter_grads:
        dw1 = weight_grad(dhidden, once, **operands)[0].to(w1.dtype)
        dw2 = weight_grad(dy, Normalised(hidden), **operands)[0].to(w2.dtype)
        # b2 lies before scale as the product does.
        z = None if b2 is None or scale is None else b2[None, :, None].expand(dy.shape)
        _, _, dscale_of_b2, db2 = factor_bwd(dy, z=z, scale=scale, dscale=z is not None, dbias=b2 is not None)
        db2 = None if db2 is None else db2[0]
        dscale = dscale if dscale_of_b2 is None else dscale + dscale_of_b2
    return _or_empty(x, dx, dw1, dw2, db1, db2, dnorm_weight, dnorm_bias, dscale)


def token_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gate: Tensor | None,
    added: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    norm: int,
    eps: float,
    add_x: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """(y, saved): saved is W·norm(x) + bias + added where gate or scale multiply it and `save` asks for it."""
    x = rows(x)
    heads = _with_heads(weight)
    out = x.new_empty(x.shape[0], heads.shape[1], x.shape[2])
    keeps = save and (gate is not None or scale is not None)
    saved = x.new_empty(out.shape if keeps else 0, dtype=wide(x.dtype))
    added, gate, residual = (None if tensor is None else rows(tensor) for tensor in (added, gate, residual))
    if out.numel() > 0:
        token_product(
            heads,
            normalised(x, norm, eps, norm_weight, norm_bias),
            out,
            operand=x.dtype,
            tf32=tf32(x.dtype),
            bias=bias,
            added=added,
            gate=gate,
            scale=scale,
            residual=x if add_x else residual,
            saved=saved if keeps else None,
        )
    return out, saved


def token_linear_bwd(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gate: Tensor | None,
    added: Tensor | None,
    scale: Tensor | None,
    saved: Tensor,
    norm: int,
    eps: float,
    add_x: bool,
    input_grad: bool,
    parameter_grads: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias, norm_weight, norm_bias, gate, added, scale, of no elements where there is none."""
    x, dy = rows(x), rows(grad_output)
    heads = _with_heads(weight)
    gate = None if gate is None else rows(gate)
    factor = gate is not None or scale is not None
    dz, dgate, dscale, dbias = factor_bwd(
        dy,
        heads=heads.shape[0],
        z=saved if factor else None,
        gate=gate,
        scale=scale,
        dz=wide(x.dtype) if factor else None,
        dgate=gate is not None,
        dscale=scale is not None and parameter_grads,
        dbias=bias is not None and parameter_grads,
    )
    dz = dy if dz is None else dz
    operands = {"operand": wide(x.dtype), "tf32": tf32(x.dtype)}
    u = normalised(x, norm, eps, norm_weight, norm_bias)
    dx, dnorm_weight, dnorm_bias = input_gradient(
        heads, dz, u, dy if add_x else None, input_grad, parameter_grads, **operands
    )
    dweight = dadded = None
    if parameter_grads:
        dweight = weight_grad(dz, u, heads=heads.shape[0], **operands).to(weight.dtype).view(weight.shape)
    if added is not None:
        dadded = dz.to(added.dtype) if factor else dz.clone(memory_format=torch.contiguous_format)
    dbias = None if dbias is None else dbias.view(bias.shape)
    return _or_empty(x, dx, dweight, dbias, dnorm_weight, dnorm_bias, dgate, dadded, dscale)


def _or_empty(x: Tensor, *gradients: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _with_heads(weight: Tensor) -> Tensor:
    return weight if weight.ndim == 3 else weight[None]


def compile_cases(target: int) -> list[dict[str, object]]:
    """Launches of representative shapes on sm_<target>, for tests/triton_compile.py; `main` are the measured ones."""
    return _mlp_cases() + _linear_cases(target)


def _mlp_cases() -> list[dict[str, object]]:
    cases = []
    for batch, s, c, d, dtype in (
        (256, 196, 512, 256, torch.bfloat16),
        (8, 4096, 512, 2048, torch.bfloat16),
        (3, 49, 130, 65, torch.float16),
    ):
        x = torch.empty(batch, s, c, dtype=dtype, device="meta")
        w1, w2 = x.new_empty(d, s), x.new_empty(s, d)
        b1, b2, of_channels = (x.new_empty(size, dtype=torch.float32) for size in (d, s, c))
        tensors = x, w1, w2, b1, b2, of_channels, of_channels, None
        options = LAYER.value, 1e-6, 0, True
        label, main = f"B{batch} S{s} C{c} D{d}", s == 196
        cases += noted_launches(label, main, token_mixing_mlp, *tensors, None, *options, True)
        if s < 1000:
            # Two accumulators and what they become: some 80 bytes of the last step do not fit into registers.
            cases += noted_launches(
                label, False, token_mixing_mlp_bwd, x, *tensors, x.new_empty(0), *options, True, True
            )
    return cases


def _linear_cases(target: int) -> list[dict[str, object]]:
    cases = []
    for label, batch, s, c, heads, dtype, norm, options in (
        ("gMLP", 256, 196, 768, 1, torch.bfloat16, LAYER.value, {"gate"}),
        ("heads", 3, 49, 48, 4, torch.float16, TOKEN_LAYER.value, {"gate", "added", "scale", "residual"}),
        ("float32", 2, 100, 96, 1, torch.float32, AFFINE.value, {"scale", "add_x"}),
    ):
        x = torch.empty(batch, s, c, dtype=dtype, device="meta")
        weight, bias, scale = (
            x.new_empty(shape, dtype=kind)
            for shape, kind in (((heads, s, s), dtype), ((heads, s), torch.float32), (c, torch.float32))
        )
        norm_weight = bias[0] if norm == TOKEN_LAYER.value else scale
        gate, added, residual = (x if option in options else None for option in ("gate", "added", "residual"))
        scale = scale if "scale" in options else None
        tensors = x, weight, bias, norm_weight, norm_weight, gate, added, scale
        saved = x.new_empty(x.shape, dtype=wide(dtype))
        numbers = norm, 1e-6, "add_x" in options
        main = dtype == torch.bfloat16
        cases += noted_launches(label, main, token_linear, *tensors, residual, *numbers, True)
        if main:
            main = target == 90  # on sm_80 8 bytes of a weight's gradient do not fit into registers
            cases += noted_launches(label, main, token_linear_bwd, x, *tensors, saved, *numbers, True, True)
    return cases
