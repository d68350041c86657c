"""Per-sample gradients without per-sample backwards: norms, clipping, and what is made of them."""

from fastmix.per_sample.clipping import clipped_backward, gram
from fastmix.per_sample.norms import GradNorms, RecordedNorms, grad_norms
from fastmix.per_sample.statistics import gradient_noise_scale, importance_weights

__all__ = [
    "GradNorms",
    "RecordedNorms",
    "clipped_backward",
    "grad_norms",
    "gradient_noise_scale",
    "gram",
    "importance_weights",
]
