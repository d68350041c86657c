"""What else computes the norms of a layer's per-sample gradients: batched products, einsum, unfolded convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = tuple[Tensor, ...]

# A linear layer: input [B, T, I] and grad_output [B, T, O], gradients [B, O, I].


def gradients(input: Tensor, grad_output: Tensor) -> Tensor:
    return torch.einsum("bto,bti->boi", grad_output, input)


def materialised_norm_sq(input: Tensor, grad_output: Tensor) -> Tensor:
    return _squared(gradients(input, grad_output)) + _squared(grad_output.sum(1))


def ghost_norm_sq(input: Tensor, grad_output: Tensor) -> Tensor:
    """As Opacus computes its ghost norms, the weight's and the bias's."""
    return weight_ghost_norm_sq(input, grad_output) + _squared(grad_output.sum(1))


def weight_ghost_norm_sq(input: Tensor, grad_output: Tensor) -> Tensor:
    gram_input = torch.einsum("bti,bui->btu", input, input)
    gram_grad = torch.einsum("bto,buo->btu", grad_output, grad_output)
    return (gram_input * gram_grad).sum((1, 2), dtype=torch.float32)


def weight_grad(input: Tensor, grad_output: Tensor, sample_weight: Tensor | None = None) -> Tensor:
    """Without norms: one product."""
    if sample_weight is not None:
        grad_output = grad_output * sample_weight[:, None, None].to(grad_output.dtype)
    return grad_output.flatten(0, 1).t() @ input.flatten(0, 1)


def materialised_weight_grad(input: Tensor, grad_output: Tensor) -> Tensors:
    grads = gradients(input, grad_output)
    return grads.sum(0, dtype=torch.float32), _squared(grads)


def looped_weight_grad(input: Tensor, grad_output: Tensor) -> Tensors:
    """A product for each sample, which fits in the cache while its norm is taken."""
    total = input.new_zeros(grad_output.shape[2], input.shape[2], dtype=torch.float32)
    norms = []
    for a, g in zip(input, grad_output, strict=True):
        grad = g.t() @ a
        norms.append(grad.float().flatten().square().sum())
        total += grad
    return total, torch.stack(norms)


def ghost_weight_grad(input: Tensor, grad_output: Tensor) -> Tensors:
    return weight_grad(input, grad_output).float(), weight_ghost_norm_sq(input, grad_output)


def materialised_gram(input: Tensor, grad_output: Tensor) -> Tensor:
    rows = torch.cat([gradients(input, grad_output).flatten(1), grad_output.sum(1)], dim=1).float()
    return rows @ rows.t()


def pairwise_gram(input: Tensor, grad_output: Tensor) -> Tensor:
    """Σ_tu (a_bt·a_cu)(g_bt·g_cu), from two products [B·T, B·T]."""
    (b, t, _), ones = input.shape, input.new_ones(())
    gram_input, gram_grad = (rows @ rows.t() for rows in (input.flatten(0, 1), grad_output.flatten(0, 1)))
    return ((gram_input + ones) * gram_grad).view(b, t, b, t).sum((1, 3), dtype=torch.float32)


# A convolution of two spatial dimensions


def conv_weight_grad(input, grad_output, kernel_size, stride, padding, dilation, groups=1) -> Tensor:
    """Without norms: PyTorch's own backward."""
    weight = input.new_empty(grad_output.shape[1], input.shape[1] // groups, *kernel_size)
    options = (stride, padding, dilation, False, [0, 0], groups)
    mask = [False, True, False]
    return torch.ops.aten.convolution_backward(grad_output, input, weight, None, *options, mask)[1]


def looped_conv(input: Tensor, grad_output: Tensor, kernel_size, **options) -> Tensors:
    one = (input.split(1), grad_output.split(1))
    return _sum_and_norms(
        torch.stack([conv_weight_grad(a, g, kernel_size, **options) for a, g in zip(*one, strict=True)])
    )


def unfolded_conv(input: Tensor, grad_output: Tensor, kernel_size, stride, padding, dilation, groups=1) -> Tensors:
    """As Opacus: an einsum with the unfolded input."""
    columns = F.unfold(input, kernel_size, dilation, padding, stride).unflatten(1, (groups, -1))
    g = grad_output.flatten(2).unflatten(1, (groups, -1))
    grads = torch.einsum("ngop,ngkp->ngok", g, columns)
    return _sum_and_norms(grads.reshape(len(input), grad_output.shape[1], -1, *kernel_size))


def grouped_conv(input: Tensor, grad_output: Tensor, kernel_size, stride, padding, dilation, groups=1) -> Tensors:
    """A convolution whose groups are the samples (Rochette et al. 2019)."""
    b, i = input.shape[:2]
    o = grad_output.shape[1]
    grads = F.conv3d(
        input.reshape(1, b * groups, i // groups, *input.shape[2:]),
        grad_output.reshape(b * o, 1, 1, *grad_output.shape[2:]),
        padding=(0, *padding),
        stride=(1, *dilation),
        dilation=(1, *stride),
        groups=b * groups,
    )
    kh, kw = kernel_size
    return _sum_and_norms(grads[..., :kh, :kw].reshape(b, o, i // groups, kh, kw))


# Scale and shift of a normalisation layer, embeddings


def affine_products(input: Tensor, grad_output: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensors:
    """As Opacus: the normalised input again, times the gradient."""
    normalised = (input if mean is None else input - mean[..., None]) * rstd[..., None]
    return (normalised * grad_output).sum((1, 3), dtype=torch.float32), grad_output.sum((1, 3), dtype=torch.float32)


def embedding_tables(input: Tensor, grad_output: Tensor, padding_idx: int | None, row_weight: Tensor | None) -> Tensor:
    """As Opacus: a table of gradients for each sample."""
    tables = grad_output.new_zeros(len(input), int(input.max()) + 1, grad_output.shape[2], dtype=torch.float32)
    rows = input[..., None].expand(grad_output.shape)
    return _squared(tables.scatter_add_(1, rows, grad_output.float()))


def embedding_pairs(input: Tensor, grad_output: Tensor, padding_idx: int | None, row_weight: Tensor | None) -> Tensor:
    """As Opacus's ghost norms: products of the rows whose ids are the same."""
    same = input[:, :, None] == input[:, None, :]
    return (same * torch.einsum("bld,bmd->blm", grad_output, grad_output)).sum((1, 2), dtype=torch.float32)


def _sum_and_norms(grads: Tensor) -> Tensors:
    return grads.sum(0, dtype=torch.float32), _squared(grads)


def _squared(grads: Tensor) -> Tensor:
    return grads.flatten(1).square().sum(1, dtype=torch.float32)
