"""What per-sample gradient norms say about a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmix.per_sample._contributions import real
from fastmix.per_sample._distributed import Processes, whole
from fastmix.per_sample.norms import GradNorms, RecordedNorms


def importance_weights(norms: GradNorms) -> Tensor:
    """Weights of samples that are drawn in proportion to their gradients' norms.

    With p_i = ‖∇L_i‖ / Σ_j ‖∇L_j‖, the least variance that importance sampling of gradients can have, a sample's weight
    is 1/(B·p_i): Σ over draws of weight·∇L_i / draws estimates the mean gradient without bias. Samples without a
    gradient are never drawn and have weight 0; if no sample has one, all weights are 1. The samples are those that
    `norms` holds, on several processes each process's own.

    Args:
        norms: of the B samples.

    Returns:
        [B].

    Raises:
        TypeError: norms is no GradNorms.
        RuntimeError: norms has none yet.

    Zhao and Zhang, Stochastic Optimization with Importance Sampling (arXiv:1401.2753); Katharopoulos and Fleuret, Not
    All Samples Are Created Equal (arXiv:1803.00942).
    """
    _check(norms, GradNorms)
    total = norms.total
    sum_ = total.sum()
    if total.numel() == 0 or sum_ == 0:
        return torch.ones_like(total)
    return torch.where(total > 0, sum_ / (len(total) * total), 0.0)


def gradient_noise_scale(norms: GradNorms, model: nn.Module) -> Tensor:
    """The simple noise scale tr(Σ)/‖G‖² of a batch: about the batch size beyond which larger ones stop to pay.

    From the mean of ‖g_i‖² over the B samples and ‖ḡ‖² of their mean gradient ḡ in `.grad`:
    tr(Σ) = (mean ‖g_i‖² − ‖ḡ‖²)·B/(B − 1) and ‖G‖² = (B·‖ḡ‖² − mean ‖g_i‖²)/(B − 1) are without bias, their ratio is
    not: average it over many batches. It is negative if the batch shows no gradient beyond noise.

    The batch of a model in `DistributedDataParallel` or of `fully_shard` is that of all processes, which must call the
    function together. Where their batches differ in size, ḡ in `.grad` is the mean of their means, with weights w_i of
    the samples, and Σ w_i² stands for 1/B: tr(Σ) = (mean ‖g_i‖² − ‖ḡ‖²)/(1 − Σ w_i²) and
    ‖G‖² = (‖ḡ‖² − Σ w_i²·mean ‖g_i‖²)/(1 − Σ w_i²).

    Args:
        norms: those of one backward in a `grad_norms` block.
        model: whose `.grad` holds that backward's gradient and nothing else; `DistributedDataParallel` itself, not the
            module in it.

    Returns:
        A scalar tensor, the same on all processes.

    Raises:
        TypeError: norms is not from a `grad_norms` block.
        ValueError: norms are of several backwards or of fewer than two samples, or no parameter has a gradient.
        RuntimeError: norms has none yet.

    McCandlish et al., An Empirical Model of Large-Batch Training (arXiv:1812.06162), appendix A.1.
    """
    _check(norms, RecordedNorms)
    if norms.num_backwards != 1:
        raise ValueError(f"norms must be those of one backward, got {norms.num_backwards}")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = [p.grad for p in parameters.values() if p.grad is not None]
    if not grads:
        raise ValueError("model must hold the gradients of the backward in .grad, got none")
    processes = Processes.of(model, parameters)
    squared, scale = norms.squared, norms.sample_scale
    b = len(squared)
    sums = torch.stack([squared.sum(), *squared.new_tensor([b, b * scale, b * scale**2])])
    sum_sq, b, sum_scale, sum_scale_sq = processes.sum(sums)
    if b < 2:
        raise ValueError(f"norms must be of at least 2 samples, got {int(b)}")
    grad_sq = sum(whole(real(grad).square().sum(dtype=squared.dtype)) for grad in grads)
    mean_sq, norm_sq, weight_sq = sum_sq / b, grad_sq * (processes.size / sum_scale) ** 2, sum_scale_sq / sum_scale**2
    return (mean_sq - norm_sq) / (norm_sq - weight_sq * mean_sq)


def _check(norms: object, kind: type) -> None:
    if not isinstance(norms, kind):
        raise TypeError(f"norms must be {kind.__name__}, got {type(norms).__name__}")
