"""log p(x) of a VAE from many latents, in the memory of a few."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastmix.ops._check import check_choice, check_float, check_same_device, check_tensor, dtype_name, shape_text
from fastmix.ops.importance_weighted_log_prob import importance_weighted_log_prob

LIKELIHOODS = ("gaussian", "bernoulli")

# Decoded elements of a default chunk: 16 MiB in float32, large enough that calls cost little.
_CHUNK_ELEMENTS = 1 << 22

# Latents that are drawn with one seed. Whatever the chunks, latent k has the same draw.
_DRAWN_TOGETHER = 16


def vae_log_prob(
    x: Tensor,
    decoder: Callable[[Tensor], Tensor],
    mu: Tensor,
    logvar: Tensor,
    num_samples: int,
    *,
    likelihood: str = "gaussian",
    variance: float = 1.0,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate of a VAE's log p(x) with num_samples latents a sample, drawn, decoded and reduced in chunks.

    ``importance_weighted_log_prob(log p(x|z), z, mu, logvar)`` of latents z = mu + exp(logvar/2)·ε, whose mean is a
    lower bound of log p(x) that tightens as num_samples grows; −vae_log_prob(…).mean() is the loss of an
    importance-weighted autoencoder. Differentiable in x, mu, logvar and whatever the decoder is made of. Only one
    chunk is in memory at a time: where there are several and a gradient is asked for, each is decoded again in the
    backward pass (``torch.utils.checkpoint``), from the same latents, with the same dropout masks and under the same
    autocast. Which latents are drawn does not depend on chunk_size; the random state of a generator, or PyTorch's own
    on the CPU, advances by one number. A decoder with batch statistics in training mode sees the latents of a chunk
    as its batch, and sees them twice.

    Args:
        x: [B, …], of a floating-point dtype; for "bernoulli" the probabilities of 1, or 0 and 1.
        decoder: [N, D] → [N, …], the means ("gaussian") or logits ("bernoulli"), for N = chunk · B latents.
        mu: [B, D], means of the encoder's Gaussian q(z|x), of a floating-point dtype, which z has too.
        logvar: [B, D], logarithms of its variances.
        num_samples: K ≥ 1, latents for each sample.
        likelihood: "gaussian" or "bernoulli", the elements of x being independent given z.
        variance: of the Gaussian likelihood, above 0.
        chunk_size: latents for each sample that are decoded together; None: as many as give 4 million elements.
        generator: seeds the draws; one of any device. None: PyTorch's own.

    Returns:
        [B], float64 if x, mu, logvar or the decoder's output is, else float32.

    Raises:
        TypeError: x, mu or logvar is no floating-point tensor, or an argument is of another wrong type.
        ValueError: a shape, the decoder's output's among them, or a device does not fit, likelihood is unknown,
            variance is not above 0 or is given for "bernoulli", or num_samples or chunk_size is below 1.

    Kingma, Welling, Auto-Encoding Variational Bayes (arXiv:1312.6114); Burda, Grosse, Salakhutdinov, Importance
    Weighted Autoencoders (arXiv:1509.00519).
    """
    _check_tensors(x, mu, logvar)
    if not callable(decoder):
        raise TypeError(f"decoder must be callable, got {type(decoder).__name__}")
    _check_count("num_samples", num_samples)
    check_choice("likelihood", likelihood, LIKELIHOODS)
    log_px_z = _likelihood(likelihood, variance)
    if chunk_size is None:
        chunk_size = max(1, _CHUNK_ELEMENTS // max(1, x.numel(), mu.numel()))
    _check_count("chunk_size", chunk_size)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")

    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(1 << 31, (), generator=generator, device=device))

    def estimate(x: Tensor, mu: Tensor, logvar: Tensor, first: int, last: int) -> Tensor:
        noise = _draw(seed, first, last, mu)
        z = mu + (0.5 * logvar).exp().to(mu.dtype) * noise  # [chunk, B, D]
        decoded = _decode(decoder, z, x)
        return importance_weighted_log_prob(log_px_z(decoded, x).t(), z.transpose(0, 1), mu, logvar)

    bounds = [(first, min(first + chunk_size, num_samples)) for first in range(0, num_samples, chunk_size)]
    if len(bounds) == 1:
        return estimate(x, mu, logvar, 0, num_samples)
    if torch.is_grad_enabled():
        estimate = functools.partial(checkpoint, estimate, use_reentrant=False)
    # Each chunk's estimate is a mean of weights: its share is that of its latents.
    parts = [estimate(x, mu, logvar, *chunk) + math.log((chunk[1] - chunk[0]) / num_samples) for chunk in bounds]
    return _log_sum_exp(torch.stack(parts))


def _draw(seed: int, first: int, last: int, like: Tensor) -> Tensor:
    """[last − first, B, D], normal: the noise of these latents."""
    start = first - first % _DRAWN_TOGETHER
    generator = torch.Generator(like.device)
    drawn = [
        torch.randn(
            _DRAWN_TOGETHER,
            *like.shape,
            generator=generator.manual_seed(seed + i),
            device=like.device,
            dtype=like.dtype,
        )
        for i in range(start // _DRAWN_TOGETHER, -(-last // _DRAWN_TOGETHER))
    ]
    return torch.cat(drawn)[first - start : last - start]


def _decode(decoder: Callable[[Tensor], Tensor], z: Tensor, x: Tensor) -> Tensor:
    """[chunk, B, N], what the decoder makes of z [chunk, B, D], for x [B, …] of N elements a sample."""
    decoded = decoder(z.flatten(0, 1))
    check_tensor("what decoder returns", decoded)
    expected = (z.shape[0] * z.shape[1], *x.shape[1:])
    if decoded.shape != expected:
        raise ValueError(f"decoder must return {list(expected)} for z {list(z.flatten(0, 1).shape)} and x "
                         f"{shape_text(x)}, got {shape_text(decoded)}")  # fmt: skip
    if not decoded.is_floating_point():
        raise TypeError(f"decoder must return a floating-point tensor, got {dtype_name(decoded.dtype)}")
    return decoded.reshape(*z.shape[:2], math.prod(x.shape[1:]))


def _likelihood(likelihood: str, variance: float) -> Callable[[Tensor, Tensor], Tensor]:
    """(what is decoded [chunk, B, N], x [B, …]) → log p(x|z) [chunk, B], in float32 at least."""
    if isinstance(variance, bool) or not isinstance(variance, (int, float)):
        raise TypeError(f"variance must be a float, got {type(variance).__name__}")
    if not 0 < variance < math.inf:
        raise ValueError(f"variance must be above 0 and finite, got {variance}")
    if likelihood == "bernoulli" and variance != 1:
        raise ValueError(f"variance must be left at 1 for the likelihood 'bernoulli', got {variance}")

    def pair(decoded: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        dtype = functools.reduce(torch.promote_types, (decoded.dtype, x.dtype), torch.float32)
        return decoded.to(dtype), x.to(dtype).reshape(decoded.shape[1:]).expand(decoded.shape)

    def bernoulli(decoded: Tensor, x: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(*pair(decoded, x), reduction="none").sum(2)

    def gaussian(decoded: Tensor, x: Tensor) -> Tensor:
        squares = F.mse_loss(*pair(decoded, x), reduction="none").sum(2)
        return -0.5 * (squares / variance + decoded.shape[2] * math.log(2 * math.pi * variance))

    return bernoulli if likelihood == "bernoulli" else gaussian


def _log_sum_exp(parts: Tensor) -> Tensor:
    """log Σ exp over the chunks [chunks, B]; unlike logsumexp, with gradients 0 where all are −inf."""
    none = (parts == -torch.inf).all(0)
    return torch.where(none, -torch.inf, torch.where(none, 0, parts).logsumexp(0))


def _check_tensors(x: Tensor, mu: Tensor, logvar: Tensor) -> None:
    for name, value in (("x", x), ("mu", mu), ("logvar", logvar)):
        check_float(name, value)
        check_same_device(name, value, "x", x)
    if x.ndim == 0:
        raise ValueError(f"x must be [B, …], got {shape_text(x)}")
    if mu.ndim != 2 or mu.shape[0] != x.shape[0]:
        raise ValueError(f"mu must be [B, D] with B = {x.shape[0]}, got {shape_text(mu)}")
    if logvar.shape != mu.shape:
        raise ValueError(f"logvar must be [B, D] = {list(mu.shape)}, as mu is, got {shape_text(logvar)}")


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
