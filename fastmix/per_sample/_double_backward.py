"""Functions whose gradient by their input is differentiated again, cheaper than PyTorch differentiates it.

Derivatives of every order are PyTorch's own. An activation whose backward depends on x by its pieces alone sends no
gradient of zeros into the graph of x, and a weight's gradient of a convolution's backward is computed as that of a
convolution, not as a convolution of transposed tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_INPUT, _WEIGHT = [True, False, False], [False, True, False]


class Scale:
    """The numbers s = 1, one a sample, and whether the backward that runs is only after the input's gradient."""

    def __init__(self, x: Tensor):
        self.tensor = x.new_ones(len(x)).requires_grad_()
        self.only_input = False


class Conv(torch.autograd.Function):
    """torch.convolution(x, weight, s·bias); options: what it takes beside them."""

    @staticmethod
    def forward(ctx, scale: Scale, s: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *options) -> Tensor:
        ctx.scale, ctx.options, ctx.x_shape = scale, options, x.shape
        ctx.save_for_backward(x if weight.requires_grad else None, weight, bias)
        ctx.set_materialize_grads(False)
        return torch.ops.aten.convolution.default(x, weight, bias, *options)

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        others = [None] * len(ctx.options)
        if grad is None:
            return None, None, None, None, None, *others
        x, weight, bias = ctx.saved_tensors
        _, needs_s, needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        like = grad.new_empty(()).expand(ctx.x_shape) if x is None else x.detach()
        needs_weight = needs_weight and not ctx.scale.only_input
        backward = torch.ops.aten.convolution_backward.default
        dw = None
        if torch.is_grad_enabled():
            dx = ConvInputGrad.apply(grad, weight, like, *ctx.options) if needs_x else None
            if needs_weight:
                dw = backward(grad, x, weight, None, *ctx.options, _WEIGHT)[1]
        else:
            dx, dw, _ = backward(grad, like, weight, None, *ctx.options, [needs_x, needs_weight, False])
        ds = db = None
        if bias is not None:
            sums = grad.flatten(2).sum(2)  # [B, C]
            ds = (sums * bias).sum(1) if needs_s else None
            db = sums.sum(0) if needs_bias and not ctx.scale.only_input else None
        return None, ds, dx, dw, db, *others


class ConvInputGrad(torch.autograd.Function):
    """The gradient by x, of the shape of `like`, which is linear in grad and in weight."""

    @staticmethod
    def forward(ctx, grad: Tensor, weight: Tensor, like: Tensor, *options) -> Tensor:
        ctx.options = options
        ctx.save_for_backward(grad, weight)
        ctx.set_materialize_grads(False)
        return torch.ops.aten.convolution_backward.default(grad, like, weight, None, *options, _INPUT)[0]

    @staticmethod
    def backward(ctx, tangent: Tensor | None):
        others = [None] * (1 + len(ctx.options))
        if tangent is None:
            return None, None, *others
        grad, weight = ctx.saved_tensors
        needs_grad, needs_weight, *_ = ctx.needs_input_grad
        by_grad = by_weight = None
        if needs_grad:
            by_grad = torch.ops.aten.convolution.default(tangent, weight, None, *ctx.options)
        if needs_weight:
            backward = torch.ops.aten.convolution_backward.default
            by_weight = backward(grad, tangent, weight, None, *ctx.options, _WEIGHT)[1]
        return by_grad, by_weight, *others


class ReLU(torch.autograd.Function):
    """Saves its result, as PyTorch's does."""

    @staticmethod
    def forward(ctx, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        y = F.relu(x, inplace)
        ctx.save_for_backward(y)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        if grad is None:
            return None, None
        return torch.ops.aten.threshold_backward.default(grad, ctx.saved_tensors[0].detach(), 0), None


class LeakyReLU(torch.autograd.Function):
    """Saves x, so that its result may be changed in place, or in place its result, which tells a positive slope's
    pieces: as PyTorch's does."""

    @staticmethod
    def forward(ctx, x: Tensor, slope: float, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        y = F.leaky_relu(x, slope, inplace)
        ctx.options = slope, inplace
        ctx.save_for_backward(y if inplace else x)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        if grad is None:
            return None, None, None
        saved = ctx.saved_tensors[0].detach()
        return torch.ops.aten.leaky_relu_backward.default(grad, saved, *ctx.options), None, None


class MaxPool2d(torch.autograd.Function):
    """sizes: kernel, stride, padding, dilation and ceil_mode."""

    @staticmethod
    def forward(ctx, x: Tensor, *sizes) -> Tensor:
        y, indices = torch.ops.aten.max_pool2d_with_indices.default(x, *sizes)
        ctx.sizes = sizes
        ctx.save_for_backward(x, indices)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        others = [None] * len(ctx.sizes)
        if grad is None:
            return None, *others
        x, indices = ctx.saved_tensors
        backward = torch.ops.aten.max_pool2d_with_indices_backward.default
        return backward(grad, x.detach(), *ctx.sizes, indices), *others
