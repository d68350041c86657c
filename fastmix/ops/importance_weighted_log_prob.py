"""The importance-weighted estimate of a VAE's log p(x): public function, schemas, fakes, gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix import _library
from fastmix.ops._check import check_float, check_same_device, shape_text
from fastmix.ops._route import call, differentiate_backward, kernel_answers, note_kernels
from fastmix.reference import importance_weighted_log_prob as reference


def importance_weighted_log_prob(log_px_z: Tensor, z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Estimate of a VAE's log-density log p(x) of each sample x from K latents z_k, drawn from q(z|x) = N(mu, σ²).

    logsumexp_k(log p(x|z_k) + log p(z_k) − log q(z_k|x)) − log K, with σ² = exp(logvar) and p(z) the standard normal
    density. Its expectation is a lower bound of log p(x), which gets tighter as K grows; K = 1 is the usual bound with
    one draw. In one pass over z, with float32 sums for bfloat16 and float16. A sample all of whose weights are 0 has
    the value −inf, with gradients 0. Differentiable as often as asked, in all four.

    Args:
        log_px_z: [B, K], the decoder's log p(x|z_k), float32, bfloat16, float16 or float64. Keep it in float32 at
            least: log-densities are large numbers, of which bfloat16 has three digits.
        z: [B, K, D], the latents, of any of these dtypes and any strides, K ≥ 1.
        mu: [B, D], means of the encoder's Gaussian.
        logvar: [B, D], logarithms of its variances.

    Returns:
        [B], float64 if an argument is, else float32.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a shape does not fit, K is 0, or an argument is on another device than z.

    Burda, Grosse, Salakhutdinov, Importance Weighted Autoencoders (arXiv:1509.00519).
    """
    check_float("z", z)
    if z.ndim != 3 or z.shape[1] == 0:
        raise ValueError(f"z must be [B, K, D] with K ≥ 1, got {shape_text(z)}")
    b, k, d = z.shape
    for name, value, letters, shape in (
        ("log_px_z", log_px_z, "K", (b, k)),
        ("mu", mu, "D", (b, d)),
        ("logvar", logvar, "D", (b, d)),
    ):
        check_float(name, value)
        check_same_device(name, value, "z", z)
        if value.shape != shape:
            raise ValueError(f"{name} must be [B, {letters}] = {list(shape)}, as z has it, got {shape_text(value)}")
    exact = any(value.dtype == torch.float64 for value in (log_px_z, mu, logvar))
    if not exact and kernel_answers("importance_weighted_log_prob", z):
        op = torch.ops.fastmix.importance_weighted_log_prob.default
        return call(op, log_px_z.float(), z, mu.float(), logvar.float())[0]
    return reference.importance_weighted_log_prob(log_px_z, z, mu, logvar)


_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define(
    "fastmix::importance_weighted_log_prob",
    "(Tensor log_px_z, Tensor z, Tensor mu, Tensor logvar) -> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "fastmix::importance_weighted_log_prob_bwd",
    "(Tensor grad_output, Tensor log_px_z, Tensor z, Tensor mu, Tensor logvar, Tensor normalizer) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


@torch.library.register_fake("fastmix::importance_weighted_log_prob")
def _(log_px_z, z, mu, logvar):
    return log_px_z.new_empty(z.shape[:1]), log_px_z.new_empty(z.shape[0], 2)


@torch.library.register_fake("fastmix::importance_weighted_log_prob_bwd")
def _(grad_output, log_px_z, z, mu, logvar, normalizer):
    return tuple(x.new_empty(x.shape) for x in (log_px_z, z, mu, logvar))


def _save(ctx, inputs, output):
    normalizer = output[1]
    ctx.save_for_backward(*inputs, normalizer)
    ctx.mark_non_differentiable(normalizer)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, _):
    if grad_output is None:
        return None, None, None, None
    return call(torch.ops.fastmix.importance_weighted_log_prob_bwd.default, grad_output, *ctx.saved_tensors)


torch.library.register_autograd("fastmix::importance_weighted_log_prob", _backward, setup_context=_save)
differentiate_backward(
    "importance_weighted_log_prob_bwd", reference.importance_weighted_log_prob, num_inputs=4, num_saved=1
)


def _importance_weighted_log_prob_cuda(log_px_z, z, mu, logvar):
    from tritonkernels.importance_weighted_log_prob import importance_weighted_log_prob as kernel

    return kernel(log_px_z, z, mu, logvar)


def _importance_weighted_log_prob_bwd_cuda(grad_output, log_px_z, z, mu, logvar, normalizer):
    from tritonkernels.importance_weighted_log_prob import importance_weighted_log_prob_bwd as kernel

    return kernel(grad_output, log_px_z, z, mu, logvar, normalizer)


if _library.triton_serves:
    torch.library.impl("fastmix::importance_weighted_log_prob", "CUDA", _importance_weighted_log_prob_cuda)
    torch.library.impl("fastmix::importance_weighted_log_prob_bwd", "CUDA", _importance_weighted_log_prob_bwd_cuda)
note_kernels("importance_weighted_log_prob")
note_kernels("importance_weighted_log_prob_bwd")
