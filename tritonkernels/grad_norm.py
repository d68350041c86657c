"""Per-sample gradients of a linear layer, dW_b = Σ_t g_t a_tᵀ for a = input and g = grad_output.

Squared norms by the Gram form (_grad_norm_gram.py) or the direct one (_grad_norm_direct.py), the gradient of these, the
sum of dW_b beside its norms (_grad_norm_weight.py), and inner products. The gradient of norms goes through a product of
all positions with each other or through dW_b, inner products through dW_b: in memory, for as many samples or outputs at
a time as stay small (_grad_norm_product.py). What lies between multiplies in bfloat16, or in TF32 for a float16 input,
whose range it may leave.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonkernels._grad_norm_direct import direct_parts
from tritonkernels._grad_norm_gram import gram_parts, norm_sq_by_gram
from tritonkernels._grad_norm_product import product
from tritonkernels._grad_norm_weight import weight_grad_with_norm
from tritonkernels._launch import noted_launches, rows, wide

_BUFFER = 1 << 26  # elements of a product in memory


def linear_grad_norm_sq(input: Tensor, grad_output: Tensor, lengths: Tensor | None, bias: bool, gram: bool) -> Tensor:
    """[B] in fp32."""
    if grad_output.numel() == 0:
        return torch.zeros(input.shape[0], device=input.device, dtype=torch.float32)
    a, g = rows(input), rows(grad_output)
    return norm_sq_by_gram(a, g, lengths, bias) if gram else direct_parts(a, g, lengths, bias, None).sum(1)


def linear_grad_norm_sq_bwd(
    grad_norm_sq: Tensor, input: Tensor, grad_output: Tensor, lengths: Tensor | None, bias: bool, gram: bool
) -> tuple[Tensor, Tensor]:
    """2w times the gradients of the squared norms, w = grad_norm_sq, each sample's in the form that keeps its norm."""
    da = torch.empty(input.shape, device=input.device, dtype=input.dtype)
    dg = torch.empty(grad_output.shape, device=input.device, dtype=input.dtype)
    if grad_output.numel() == 0:
        return da.zero_(), dg
    a, g = rows(input), rows(grad_output)
    t = a.shape[1]
    parts = gram_parts(a, g, lengths, bias) if gram and t > 1 else None
    direct = parts is not None or not gram
    elements = max(t * t if gram else 1, a.shape[2] * g.shape[2] if direct else 1)
    samples = max(1, _BUFFER // elements)
    for first in range(0, a.shape[0], samples):
        chunk = slice(first, first + samples)
        tensors = *(x[chunk] for x in (a, g, da, dg)), bias
        of_samples = {"lengths": lengths, "gram": parts}
        of_samples = {name: None if x is None else x[chunk] for name, x in of_samples.items()}
        scale = 2 * grad_norm_sq[chunk].float()
        if gram:
            _through_positions(*tensors, scale, of_samples)
        if direct:
            _through_gradients(*tensors, scale, of_samples | {"lost": True})
    return da, dg


def _through_positions(a: Tensor, g: Tensor, da: Tensor, dg: Tensor, bias: bool, scale: Tensor, samples: dict) -> None:
    """da_t = scale·Σ_u (g_t·g_u) a_u and dg_t = scale·Σ_u (a_t·a_u + 1) g_u."""
    between = torch.empty(a.shape[0], a.shape[1], a.shape[1], device=a.device, dtype=wide(a.dtype))
    one = a.new_ones(()).expand(a.shape[:2]) if bias else None
    last = {"positions": "mk", "chained": True, "scale": scale, **samples}
    product(g, g.mT, between, positions="mn", **samples)
    product(between, a, da, **last)
    product(a, a.mT, between, positions="mn", added=one, **samples)
    product(between, g, dg, **last)


def _through_gradients(a: Tensor, g: Tensor, da: Tensor, dg: Tensor, bias: bool, scale: Tensor, samples: dict) -> None:
    """da_t = scale·dWᵀ g_t and dg_t = scale·(dW a_t + Σ_u g_u)."""
    dw = torch.empty(a.shape[0], g.shape[2], a.shape[2], device=a.device, dtype=wide(a.dtype))
    sums = _sums_of_positions(g, dw.dtype, **samples)[:, 0] if bias else None
    last = {"positions": "n", "chained": True, "scale": scale, **samples}
    product(g.mT, a, dw, positions="k", **samples)
    product(dw.mT, g.mT, da.mT, **last)
    product(dw, a.mT, dg.mT, added=sums, **last)


def _sums_of_positions(x: Tensor, dtype: torch.dtype, **samples: object) -> Tensor:
    """Σ_t x_t [B, 1, features]."""
    ones = x.new_ones(()).expand(x.shape[0], 1, x.shape[1])
    sums = torch.empty(x.shape[0], 1, x.shape[2], device=x.device, dtype=dtype)
    return product(ones, x, sums, positions="k", **samples)


def linear_weight_grad_with_norm(
    input: Tensor, grad_output: Tensor, sample_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dW [out_features, in_features], norm_sq [B]) in fp32."""
    if input.numel() == 0 or grad_output.numel() == 0:
        dw = torch.zeros(grad_output.shape[2], input.shape[2], device=input.device, dtype=torch.float32)
        return dw, dw.new_zeros(input.shape[0])
    return weight_grad_with_norm(rows(input), rows(grad_output), sample_weight)


def linear_grad_gram(input: Tensor, grad_output: Tensor, bias: bool) -> Tensor:
    """[B, B] in fp32: of one position (a_b·a_c + 1)(g_b·g_c), else the products of dW_b with each other, by blocks."""
    (batch, t, in_features), out_features = input.shape, grad_output.shape[2]
    gram = torch.zeros(batch, batch, device=input.device, dtype=torch.float32)
    if grad_output.numel() == 0:
        return gram
    if t == 1:
        flat = (x.transpose(0, 1) for x in (input, grad_output))  # [1, B, …]
        of_a, of_g = (product(x, x.mT, torch.empty_like(gram)[None], positions="")[0] for x in flat)
        return of_g * (of_a + 1) if bias else of_g * of_a
    slab = max(1, _BUFFER // max(1, batch * in_features))
    for first in range(0, out_features, slab):
        g = grad_output[..., first : first + slab].mT
        dw = torch.empty(batch, g.shape[1], in_features, device=g.device, dtype=torch.float32)
        _add_inner_products(gram, product(g, input, dw, positions=""))
    if bias:
        _add_inner_products(gram, _sums_of_positions(grad_output, torch.float32))
    return gram


def _add_inner_products(gram: Tensor, gradients: Tensor) -> None:
    gradients = gradients.flatten(1)
    # In place, which autocast lets be.
    gram.addmm_(gradients, gradients.mT)


def compile_cases(target: int) -> list[dict[str, object]]:
    """Launches of representative shapes on sm_<target>, for tests/triton_compile.py; `main` are the measured ones."""
    a, g, lengths, w = _meta(8, 1024, 1024, 4096, torch.bfloat16)
    large = target >= 90  # on sm_80 8 bytes of a tile of the gradient do not fit into registers
    cases = noted_launches("B8 T1024", True, linear_grad_norm_sq, a, g, lengths, True, True)
    cases += noted_launches("B8 T1024", large, linear_weight_grad_with_norm, a, g, w)
    cases += noted_launches("B8 T1024", True, linear_grad_norm_sq_bwd, w, a, g, lengths, True, True)
    a, g, _, w = _meta(64, 50, 768, 768, torch.float16)
    cases += noted_launches("B64 T50", large, linear_weight_grad_with_norm, a, g, w)
    a, g, *_ = _meta(4, 512, 512, 512, torch.float32)
    cases += noted_launches("B4 T512 float32", False, linear_grad_norm_sq, a, g, None, True, True)
    a, g, *_ = _meta(64, 1, 1024, 1024, torch.bfloat16)
    cases += noted_launches("B64 T1", True, linear_grad_norm_sq, a, g, None, True, True)
    # The one row of Σ_t g_t is too small for the large matrix units.
    return [case | {"main": case["main"] and case["constants"].get("BLOCK_M") != 16} for case in cases]


def _meta(batch: int, t: int, in_features: int, out_features: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    a = torch.empty(batch, t, in_features, device="meta", dtype=dtype)
    g = a.new_empty(batch, t, out_features)
    return a, g, a.new_empty(batch, dtype=torch.int32), a.new_empty(batch, dtype=torch.float32)
