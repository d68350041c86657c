"""Linear layers and convolutions: products with a weight.

They become an autograd function of our own, whose backward computes the weight's gradient and the norms of its samples
together. A handler is called in the place of the function that it is named after.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmix.per_sample._batch import Batch, Place
from fastmix.per_sample._contributions import Contribution, Conv, Linear, Samples, sum_of
from fastmix.per_sample._double_backward import ConvInputGrad
from fastmix.per_sample._recorder import Recorder


class _Product(torch.autograd.Function):
    """layer.output(x, weight, bias), with the gradients of weight and bias taken from the recorder."""

    @staticmethod
    def forward(ctx, recorder: Recorder, layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.recorder, ctx.layer, ctx.targets = recorder, layer, (weight, bias)
        ctx.x_shape = x.shape
        # One tensor more than PyTorch's functions save: that a checkpoint's second forward was not recorded shows.
        more = x.new_empty(0)
        ctx.save_for_backward(x if weight.requires_grad else None, weight if x.requires_grad else None, more)
        return layer.output(x, weight, bias)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        recorder, layer = ctx.recorder, ctx.layer
        x, weight, _ = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[2:]
        if recorder.pulling:  # a vector-Jacobian product of our own passes by
            needs_weight = needs_bias = False
        elif not recorder.is_spent:
            recorder.check_backward()
        if x is None:  # whose values no gradient needs
            x = grad_output.new_empty(()).expand(ctx.x_shape)
        dx = layer.input_grad(grad_output, x, weight) if needs_x else None
        dw = db = None
        if needs_weight:
            dw = recorder.receive(ctx.targets[0], layer.weight_contribution(x, grad_output), need_total=True)
        if needs_bias:
            db = recorder.receive(ctx.targets[1], layer.bias_contribution(grad_output), need_total=True)
        return None, None, dx, dw, db


def _apply(recorder: Recorder, layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = _autocast(x)
    recorder.expect(weight, bias)
    output = _Product.apply(recorder, layer, x, weight, bias)
    output.grad_fn.metadata["fastmix.per_sample"] = recorder
    recorder.batch.put(output, recorder.batch.place(x))
    return output


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    if x.is_floating_point() and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device)) if x.dtype != torch.float64 else x
    return x


def _is_product(recorder: Recorder, x: object, weight: object, bias: object) -> bool:
    """Whether x has samples, weight and bias have none, and one of them needs a gradient."""
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or not recorder.has_samples(x):
        return False
    if not (x.is_floating_point() and weight.is_floating_point()):
        return False  # a complex layer
    parameters = [weight] if bias is None else [weight, bias]
    return not any(map(recorder.has_samples, parameters)) and any(map(recorder.is_target, parameters))


# Products with a matrix


class _LinearLayer:
    """x·Wᵀ + b, or x·W + b for a weight [I, O]."""

    def __init__(self, batch: Batch, place: Place, transposed: bool):
        self.batch, self.place, self.transposed = batch, place, transposed

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        matrix = (weight if self.transposed else weight.t()).to(x.dtype)
        # Not F.linear, whose output is a view, which an activation could not change in place.
        output = x.new_empty((*x.shape[:-1], matrix.shape[1]))
        rows, to = x.reshape(-1, x.shape[-1]), output.view(-1, matrix.shape[1])
        torch.mm(rows, matrix, out=to) if bias is None else torch.addmm(bias.to(x.dtype), rows, matrix, out=to)
        return output

    def input_grad(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(g.dtype)
        return g @ (weight.t() if self.transposed else weight)

    def weight_contribution(self, x: Tensor, g: Tensor) -> Contribution:
        a, g = self._sequences(x), self._sequences(g)
        return Linear(g, a) if self.transposed else Linear(a, g)

    def bias_contribution(self, g: Tensor) -> Contribution:
        g = self._sequences(g)
        return Samples(g[:, 0] if g.shape[1] == 1 else sum_of(g, (1,)))

    def _sequences(self, x: Tensor) -> Tensor:
        """[B, T, C]."""
        x = self.batch.by_sample(x, self.place)
        return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


def linear(recorder: Recorder, func: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _is_product(recorder, input, weight, bias) or weight.ndim != 2:
        return recorder.follow(func, input, weight, bias)
    place = recorder.batch.place(input)
    if place is None or input.ndim < 2:
        raise recorder.no_batch(input.shape, weight, bias)
    return _apply(recorder, _LinearLayer(recorder.batch, place, False), input, weight, bias)


def matmul(recorder: Recorder, func: Callable, input: Tensor, other: Tensor, **kwargs) -> Tensor:
    if kwargs or not _is_product(recorder, input, other, None) or other.ndim != 2 or input.ndim < 2:
        return recorder.follow(func, input, other, **kwargs)
    place = recorder.batch.place(input)
    if place is None:
        raise recorder.no_batch(input.shape, other)
    return _apply(recorder, _LinearLayer(recorder.batch, place, True), input, other, None)


def addmm(recorder: Recorder, func: Callable, input: Tensor, mat1: Tensor, mat2: Tensor, **kwargs) -> Tensor:
    if kwargs or not _is_product(recorder, mat1, mat2, input) or input.ndim != 1:
        return recorder.follow(func, input, mat1, mat2, **kwargs)
    place = recorder.batch.place(mat1)
    if place is None:
        raise recorder.no_batch(mat1.shape, mat2, input)
    return _apply(recorder, _LinearLayer(recorder.batch, place, True), mat1, mat2, input)


# Convolutions


class _ConvLayer:
    """A convolution, or with output_padding a transposed one, for which x and g change places."""

    def __init__(self, func: Callable, weight: Tensor, options: dict, output_padding: tuple[int, ...] | None = None):
        self.func, self.kernel_size, self.options = func, tuple(weight.shape[2:]), options
        self.output_padding = output_padding

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        options = {} if self.output_padding is None else {"output_padding": self.output_padding}
        return self.func(x, weight, bias, **self.options, **options)

    def input_grad(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(g.dtype)
        if self.output_padding is not None:
            spatial = len(self.kernel_size)
            dx = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1](g, weight, **self.options)
            for dim, size in enumerate(x.shape[2:], start=2):
                dx = dx.narrow(dim, 0, size)
            return dx
        options = self.options
        sizes = (options["stride"], options["padding"], options["dilation"], False, [0], options["groups"])
        return ConvInputGrad.apply(g, weight, x.to(g.dtype), *sizes)

    def weight_contribution(self, x: Tensor, g: Tensor) -> Contribution:
        if self.output_padding is None:
            return Conv(x, g, self.kernel_size, self.options)
        # An output padding of a stride or more makes positions that no input reaches.
        surplus = [p // s for p, s in zip(self.output_padding, self.options["stride"], strict=True)]
        if any(surplus):
            x = F.pad(x, [size for right in reversed(surplus) for size in (0, right)])
        return Conv(g, x, self.kernel_size, self.options)

    def bias_contribution(self, g: Tensor) -> Contribution:
        return Samples(sum_of(g, tuple(range(2, g.ndim))))


def _sizes(value: int | tuple[int, ...], spatial: int) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * spatial if len(sizes) == 1 else sizes


def conv(
    recorder: Recorder, func: Callable, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1
) -> Tensor:
    if not _is_product(recorder, input, weight, bias):
        return recorder.follow(func, input, weight, bias, stride, padding, dilation, groups)
    spatial = weight.ndim - 2
    place = recorder.batch.place(input)
    if place is None or input.ndim != weight.ndim:
        raise recorder.no_batch(input.shape, weight, bias)
    if place != 0:
        return recorder.follow(func, input, weight, bias, stride, padding, dilation, groups)
    dilation = _sizes(dilation, spatial)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        input = F.pad(input, [size for both in reversed(total) for size in (0, both % 2)])
        padding = tuple(both // 2 for both in total)
    options = {"stride": _sizes(stride, spatial), "padding": _sizes(padding, spatial), "dilation": dilation}
    return _apply(recorder, _ConvLayer(func, weight, options | {"groups": groups}), input, weight, bias)


def conv_transpose(
    recorder: Recorder,
    func: Callable,
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    output_padding=0,
    groups=1,
    dilation=1,
) -> Tensor:
    if not _is_product(recorder, input, weight, bias):
        return recorder.follow(func, input, weight, bias, stride, padding, output_padding, groups, dilation)
    place = recorder.batch.place(input)
    if place is None or input.ndim != weight.ndim:
        raise recorder.no_batch(input.shape, weight, bias)
    if place != 0:
        return recorder.follow(func, input, weight, bias, stride, padding, output_padding, groups, dilation)
    spatial = weight.ndim - 2
    sizes = {"stride": stride, "padding": padding, "dilation": dilation}
    options = {name: _sizes(value, spatial) for name, value in sizes.items()} | {"groups": groups}
    layer = _ConvLayer(func, weight, options, _sizes(output_padding, spatial))
    return _apply(recorder, layer, input, weight, bias)
