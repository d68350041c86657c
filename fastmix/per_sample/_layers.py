"""Embeddings and normalisation layers: few parameters touched by each sample.

They keep PyTorch's backward; the per-sample gradients of their parameters are computed beside it, from the layer's
input and the gradient of its output. A handler is called in the place of the function that it is named after.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmix.ops.affine_grad_norm import affine_grad_sample
from fastmix.per_sample._contributions import Contribution, Embedding, Samples
from fastmix.per_sample._recorder import Recorder

# Tables


def embedding(
    recorder: Recorder,
    func: Callable,
    input,
    weight,
    padding_idx=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq=False,
    sparse=False,
) -> Tensor:
    options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if not recorder.is_target(weight) or not recorder.has_samples(input):
        return recorder.follow(func, input, weight, *options)
    _refuse_scale_by_frequency(recorder, weight, scale_grad_by_freq)
    place = recorder.batch.place(input)
    if place is None:
        raise recorder.no_batch(input.shape, weight)
    output = func(input, weight, *options)
    recorder.expect(weight)
    batch, num = recorder.batch, len(weight)
    ids = batch.by_sample(input, place)
    ids = ids.flatten(1) if ids.ndim > 1 else ids[:, None]
    padding = None if padding_idx is None else padding_idx % num

    def contributions(g: Tensor) -> list[Contribution]:
        g = batch.by_sample(g, place)
        return [Embedding(ids, g.reshape(*ids.shape, g.shape[-1]), num, padding)]

    recorder.observe(output, [weight], contributions)
    recorder.batch.put(output, place)
    return output


def embedding_bag(
    recorder: Recorder,
    func: Callable,
    input,
    weight,
    offsets=None,
    max_norm=None,
    norm_type=2,
    scale_grad_by_freq=False,
    mode="mean",
    sparse=False,
    per_sample_weights=None,
    include_last_offset=False,
    padding_idx=None,
) -> Tensor:
    options = (offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse)
    options += (per_sample_weights, include_last_offset, padding_idx)
    if offsets is not None and (recorder.batch.size is None or not recorder.uses_expected):
        # The model's first argument, all bags' ids in a row, told nothing about the batch.
        recorder.batch.size = len(offsets) - bool(include_last_offset)
    if not recorder.is_target(weight) or mode == "max":
        return recorder.follow(func, input, weight, *options)
    _refuse_scale_by_frequency(recorder, weight, scale_grad_by_freq)
    output = func(input, weight, *options)
    if recorder.batch.size is None:
        recorder.batch.size = len(output)
    if len(output) != recorder.batch.size:
        raise recorder.no_batch(output.shape, weight)
    recorder.expect(weight)
    num = len(weight)
    padding = None if padding_idx is None else padding_idx % num
    if per_sample_weights is None:
        per_sample_weights = torch.ones_like(input, dtype=torch.promote_types(weight.dtype, torch.float32))
    ids, row_weight = _bags(input, offsets, per_sample_weights, include_last_offset)
    if mode == "mean":
        counted = row_weight if padding is None else row_weight * (ids != padding)
        row_weight = row_weight / counted.sum(1, keepdim=True).clamp(min=1)

    def contributions(g: Tensor) -> list[Contribution]:
        return [Embedding(ids, g[:, None].expand(*ids.shape, -1), num, padding, row_weight)]

    recorder.observe(output, [weight], contributions)
    return output


def _bags(input: Tensor, offsets: Tensor | None, weights: Tensor, has_last: bool) -> tuple[Tensor, Tensor]:
    """Ids [B, longest bag] and the factors of their rows, 0 where a bag is shorter."""
    if input.ndim == 2:
        return input, weights
    ends = offsets[1:] if has_last else torch.cat([offsets[1:], offsets.new_tensor([len(input)])])
    starts = offsets[:-1] if has_last else offsets
    place = torch.arange(int((ends - starts).max()) if len(starts) else 0, device=input.device)
    place, inside = starts[:, None] + place, place < (ends - starts)[:, None]
    place = place.where(inside, 0)
    if len(input) == 0:
        return place.to(input.dtype), weights.new_zeros(place.shape)
    return input[place], weights[place] * inside


def _refuse_scale_by_frequency(recorder: Recorder, weight: Tensor, scale_grad_by_freq: bool) -> None:
    if scale_grad_by_freq:
        raise ValueError(
            f"the embedding of {recorder.name_of(weight)} has scale_grad_by_freq=True, by which a sample's gradient "
            "depends on the rest of the batch: it has no per-sample gradient"
        )


# Normalisation


def layer_norm(recorder: Recorder, func: Callable, input, normalized_shape, weight=None, bias=None, eps=1e-5) -> Tensor:
    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        if _is_differentiable(x):
            return _moments(x, (2, 3), eps)
        _, mean, rstd = torch.native_layer_norm(x, x.shape[2:], None, None, eps)
        return mean[..., 0], rstd[..., 0]

    arguments = (normalized_shape, weight, bias, eps)
    return _normalize(recorder, func, (input, *arguments), weight, bias, -len(normalized_shape), statistics)


def rms_norm(recorder: Recorder, func: Callable, input, normalized_shape, weight=None, eps=None) -> Tensor:
    def statistics(x: Tensor) -> tuple[None, Tensor]:
        smallest = torch.finfo(input.dtype).eps if eps is None else eps
        return None, (x.square().mean((2, 3)) + smallest).rsqrt()[..., None]

    arguments = (normalized_shape, weight, eps)
    return _normalize(recorder, func, (input, *arguments), weight, None, -len(normalized_shape), statistics)


def group_norm(recorder: Recorder, func: Callable, input, num_groups, weight=None, bias=None, eps=1e-5) -> Tensor:
    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        return _of_groups(x, num_groups, eps)

    return _normalize(recorder, func, (input, num_groups, weight, bias, eps), weight, bias, 1, statistics)


def instance_norm(
    recorder: Recorder,
    func: Callable,
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
) -> Tensor:
    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        if use_input_stats:
            return _of_groups(x, x.shape[2], eps)
        return running_mean, (running_var + eps).rsqrt()

    arguments = (running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _normalize(recorder, func, (input, *arguments), weight, bias, 1, statistics)


def batch_norm(
    recorder: Recorder,
    func: Callable,
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
) -> Tensor:
    if training and not recorder.running:
        modules = (name for name, module in recorder.model.named_modules() if "BatchNorm" in type(module).__name__)
        name = recorder.name_of(weight, bias, running_mean) or " or ".join(map(repr, modules))
        raise ValueError(
            f"batch_norm of {name} is in training mode, where a sample's gradient depends on the rest of the batch: "
            "there are no per-sample gradients; use its eval mode, or GroupNorm or LayerNorm"
        )

    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        return running_mean, (running_var + eps).rsqrt()

    arguments = (running_mean, running_var, weight, bias, training, momentum, eps)
    return _normalize(recorder, func, (input, *arguments), weight, bias, 1, statistics)


def _normalize(
    recorder: Recorder,
    func: Callable,
    args: tuple,
    weight: Tensor | None,
    bias: Tensor | None,
    first: int,
    statistics: Callable[[Tensor], tuple[Tensor | None, Tensor]],
) -> Tensor:
    """func(*args), with weight and bias watched.

    They lie along the dimensions of args[0] from `first` < 0 to the last, or along the dimension `first` = 1;
    statistics gives affine_grad_sample's mean and rstd for the input [B, R, C, L].
    """
    x = args[0]
    parameters = [tensor for tensor in (weight, bias) if tensor is not None]
    targets = [tensor for tensor in parameters if recorder.is_target(tensor)]
    if not targets or not recorder.has_samples(x) or any(map(recorder.has_samples, parameters)):
        return recorder.follow(func, *args)
    place = recorder.batch.place(x)
    if place is None or (first == 1 and place != 0):
        raise recorder.no_batch(x.shape, *targets)
    output = func(*args)
    recorder.batch.put(output, place)
    recorder.expect(*targets)
    batch = recorder.batch

    def contributions(g: Tensor) -> list[Contribution]:
        a, g = (_positions(batch.by_sample(tensor, place), first) for tensor in (x.to(g.dtype), g))
        mean, rstd = statistics(a.to(torch.promote_types(a.dtype, torch.float32)))
        grads = affine_grad_sample(a, g, mean, rstd)
        pairs = zip((weight, bias), grads, strict=True)
        return [Samples(grad.view(-1, *p.shape)) for p, grad in pairs if p is not None and recorder.is_target(p)]

    recorder.observe(output, targets, contributions)
    return output


def _of_groups(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation [B, 1, C] of groups of channels of x [B, 1, C, L]."""
    b, _, c, length = x.shape
    if _is_differentiable(x):
        statistics = _moments(x.reshape(b, num_groups, -1, length), (2, 3), eps)
        statistics = [value[..., 0] for value in statistics]
    else:
        _, *statistics = torch.native_group_norm(x.squeeze(1).contiguous(), None, None, b, c, length, num_groups, eps)
    return tuple(value.repeat_interleave(c // num_groups, 1)[:, None] for value in statistics)


def _is_differentiable(x: Tensor) -> bool:
    """Whether a second backward may ask for the gradient of its statistics, which PyTorch's own do not have."""
    return torch.is_grad_enabled() and x.requires_grad


def _moments(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation over dims, the last of which is kept."""
    mean = x.mean(dims, keepdim=True)
    var = (x - mean).square().mean(dims, keepdim=True)
    return mean[..., 0], (var + eps).rsqrt()[..., 0]


def _positions(x: Tensor, first: int) -> Tensor:
    """[B, R, C, L]: the channels, and the positions before and behind them."""
    if first == 1:
        return x.reshape(len(x), 1, x.shape[1], x.shape[2:].numel())
    return x.reshape(len(x), x.shape[1:first].numel(), x.shape[first:].numel(), 1)
