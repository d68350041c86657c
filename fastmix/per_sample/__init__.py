"""Per-sample gradients without per-sample backwards: norms, clipping, and what is made of them."""

from fastmix.per_sample.clipping import clipped_backward, gram
from fastmix.per_sample.gradient_normalize import gradient_normalize
from fastmix.per_sample.inequality import gradient_inequality
from fastmix.per_sample.input_gradients import input_gradient_norms, input_gradient_penalty, interpolate
from fastmix.per_sample.norms import GradNorms, RecordedNorms, grad_norms
from fastmix.per_sample.penalty import parameter_gradient_penalty
from fastmix.per_sample.statistics import gradient_noise_scale, importance_weights

__all__ = [
    "GradNorms",
    "RecordedNorms",
    "clipped_backward",
    "grad_norms",
    "gradient_inequality",
    "gradient_noise_scale",
    "gradient_normalize",
    "gram",
    "importance_weights",
    "input_gradient_norms",
    "input_gradient_penalty",
    "interpolate",
    "parameter_gradient_penalty",
]
