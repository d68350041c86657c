"""The importance-weighted estimate of a VAE's log p(x) in plain PyTorch: specification and the tests' oracle."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fastmix.reference._dtypes import compute_dtype


def importance_weighted_log_prob(log_px_z: Tensor, z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """logsumexp_k(log p(x|z_k) + log p(z_k) − log q(z_k|x)) − log K; −inf with gradients 0 where all weights are 0."""
    dtype = functools.reduce(torch.promote_types, map(compute_dtype, (log_px_z, z, mu, logvar)))
    log_px_z, z, mu, logvar = (x.to(dtype) for x in (log_px_z, z, mu, logvar))
    noise = (z - mu.unsqueeze(1)) * (-0.5 * logvar).exp().unsqueeze(1)
    # The two normalising constants cancel.
    log_weight = log_px_z + 0.5 * (logvar.unsqueeze(1) + noise.square() - z.square()).sum(2)
    largest = log_weight.detach().amax(1, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, 0)
    total = (log_weight - largest).exp().sum(1)
    none = total == 0
    log_total = torch.where(none, 1, total).log() + largest.squeeze(1)
    return torch.where(none, -torch.inf, log_total) - math.log(z.shape[1])
