"""The ratio of a value and its gradient's norm: public function, schemas, fakes, gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix import _library
from fastmix.ops._check import check_choice, check_float, check_same_device, shape_text
from fastmix.ops._route import call, differentiate_backward, kernel_answers, note_kernels
from fastmix.reference import gradient_ratio as reference

# Of the papers.
_DEFAULT_EPS = {"gn": 0.0, "gran": 0.1}


def gradient_ratio(value: Tensor, gradient: Tensor, *, mode: str = "gn", eps: float | None = None) -> Tensor:
    """Each sample's value, normalised by the norm of its gradient, as GANs' discriminators use it.

    With n = ‖gradient_b‖ over all that belongs to a sample: value/(n + |value| + eps) for "gn" (gradient
    normalisation, in [−1, 1]), value·n/(n² + eps) for "gran" (GraN). Where that is 0/0 it is 0, with gradient 0. Sums
    are float32 for bfloat16 and float16. Differentiable as often as asked, in both arguments.

    Args:
        value: [B], float32, bfloat16, float16 or float64.
        gradient: [B, …] the gradient of each value by its input, of any of these dtypes and any strides.
        mode: "gn" or "gran".
        eps: at least 0; None: 0 for "gn", whose paper has none, and 0.1 for "gran", as in its paper.

    Returns:
        [B], float64 if an argument is, else float32.

    Raises:
        TypeError: value or gradient is no floating-point tensor, or eps is no number.
        ValueError: value is not [B], gradient is not [B, …] or on another device, mode is unknown, or eps is negative.

    Wu et al., Gradient Normalization for Generative Adversarial Networks (arXiv:2109.02235); Bhaskara et al., GraN-GAN:
    Piecewise Gradient Normalization for Generative Adversarial Networks (arXiv:2111.03162).
    """
    check_float("value", value)
    check_float("gradient", gradient)
    check_same_device("gradient", gradient, "value", value)
    if value.ndim != 1:
        raise ValueError(f"value must be [B], got {shape_text(value)}")
    if gradient.ndim == 0 or gradient.shape[0] != value.shape[0]:
        raise ValueError(f"gradient must be [B, …] with B = {value.shape[0]}, got {shape_text(gradient)}")
    eps = resolve_eps(mode, eps)
    if value.dtype != torch.float64 and kernel_answers("gradient_ratio", gradient):
        return call(torch.ops.fastmix.gradient_ratio.default, value.float(), _rows(gradient), mode == "gran", eps)[0]
    return reference.gradient_ratio(value, gradient, mode=mode, eps=eps)


def resolve_eps(mode: str, eps: float | None) -> float:
    """The eps of a mode; raises what `gradient_ratio` does of these arguments."""
    check_choice("mode", mode, tuple(_DEFAULT_EPS))
    if eps is None:
        return _DEFAULT_EPS[mode]
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a float or None, got {type(eps).__name__}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and at least 0, got {eps}")
    return float(eps)


def _rows(gradient: Tensor) -> Tensor:
    """[B, N], a view if a sample's elements lie beside each other, in whatever order: a norm does not care."""
    if gradient.ndim == 1:
        return gradient.unsqueeze(1)
    if gradient.ndim > 2 and not gradient.is_contiguous():
        order = sorted(range(1, gradient.ndim), key=lambda dim: -gradient.stride(dim))
        gradient = gradient.permute(0, *order)
    rows = gradient.flatten(1)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define(
    "fastmix::gradient_ratio",
    "(Tensor value, Tensor gradient, bool gran, float eps) -> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "fastmix::gradient_ratio_bwd",
    "(Tensor grad_output, Tensor value, Tensor gradient, Tensor norm, bool gran, float eps) -> (Tensor, Tensor)",
    tags=_TAGS,
)


@torch.library.register_fake("fastmix::gradient_ratio")
def _(value, gradient, gran, eps):
    return value.new_empty(value.shape), value.new_empty(value.shape)


@torch.library.register_fake("fastmix::gradient_ratio_bwd")
def _(grad_output, value, gradient, norm, gran, eps):
    return value.new_empty(value.shape), gradient.new_empty(gradient.shape)


def _save(ctx, inputs, output):
    value, gradient, *ctx.options = inputs
    norm = output[1]
    ctx.save_for_backward(value, gradient, norm)
    ctx.mark_non_differentiable(norm)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, _):
    if grad_output is None:
        return None, None, None, None
    grads = call(torch.ops.fastmix.gradient_ratio_bwd.default, grad_output, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None


torch.library.register_autograd("fastmix::gradient_ratio", _backward, setup_context=_save)
differentiate_backward(
    "gradient_ratio_bwd",
    lambda value, gradient, gran, eps: reference.gradient_ratio(
        value, gradient, mode="gran" if gran else "gn", eps=eps
    ),
    num_inputs=2,
    num_saved=1,
)


def _gradient_ratio_cuda(value, gradient, gran, eps):
    from tritonkernels.gradient_ratio import gradient_ratio as kernel

    return kernel(value, gradient, gran, eps)


def _gradient_ratio_bwd_cuda(grad_output, value, gradient, norm, gran, eps):
    from tritonkernels.gradient_ratio import gradient_ratio_bwd as kernel

    return kernel(grad_output, value, gradient, norm, gran, eps)


if _library.triton_serves:
    torch.library.impl("fastmix::gradient_ratio", "CUDA", _gradient_ratio_cuda)
    torch.library.impl("fastmix::gradient_ratio_bwd", "CUDA", _gradient_ratio_bwd_cuda)
note_kernels("gradient_ratio")
note_kernels("gradient_ratio_bwd")
