"""What one use of a parameter adds to the samples' gradients, and how it is summed, squared and multiplied.

A contribution stands for the B per-sample gradients that one call of a function gives one parameter. It holds what they
are made of (a layer's input and the gradient of its output), not the gradients.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastmix.ops.conv_grad_norm import conv_weight_grad_sample, conv_weight_grad_with_norm
from fastmix.ops.embedding_grad_norm import embedding_grad_norm_sq
from fastmix.ops.grad_norm import (
    choose,
    linear_grad_gram,
    linear_grad_norm_sq,
    linear_weight_grad,
    linear_weight_grad_with_norm,
)
from fastmix.per_sample._autograd import at_rest


class Contribution(abc.ABC):
    """norm_sq [B], the total Σ_b w_b ∇_b, single samples' gradients ∇_b, and their Gram matrix [B, B]."""

    fused = "fused"  # how total_with_norm works, for `methods`
    alone = "direct"  # how norm_sq works

    def __init__(self, batch: int, shape: torch.Size):
        self.batch, self.shape = batch, shape

    @abc.abstractmethod
    def total(self, weight: Tensor | None = None) -> Tensor:
        """Σ_b weight_b ∇_b; without a weight, Σ_b ∇_b."""

    def norm_sq(self) -> Tensor:
        squares = [real(self.sample(b)).square().sum() for b in range(self.batch)]
        return torch.stack(squares) if squares else real(self.total()).new_zeros(0)

    def total_with_norm(self) -> tuple[Tensor, Tensor]:
        return self.total(), self.norm_sq()

    @abc.abstractmethod
    def sample(self, b: int) -> Tensor:
        """∇_b, in the accumulators' dtype."""

    def gram(self) -> Tensor:
        return self.apart().gram()

    def apart(self) -> Samples:
        """The same, as B gradients."""
        grads = [self.sample(b) for b in range(self.batch)]
        return Samples(torch.stack(grads) if grads else self.total().new_zeros((0, *self.shape)))

    def without_graph(self) -> Contribution:
        """The same, to be evaluated after the backward has freed the graph."""
        return self

    def kept(self) -> Contribution:
        """The same, to be asked for norms and a sum."""
        return self


class Samples(Contribution):
    """Gradients small enough to be kept: of a bias, of a normalisation layer's scale."""

    fused = alone = "per-sample gradients"

    def __init__(self, grads: Tensor):
        super().__init__(len(grads), grads.shape[1:])
        self.grads = grads.to(torch.promote_types(grads.dtype, torch.float32))

    def total(self, weight: Tensor | None = None) -> Tensor:
        return self.grads.sum(0) if weight is None else torch.tensordot(weight.to(self.grads.dtype), self.grads, 1)

    def norm_sq(self) -> Tensor:
        return real(self.grads).flatten(1).square().sum(1)

    def sample(self, b: int) -> Tensor:
        return self.grads[b]

    def gram(self) -> Tensor:
        grads = real(self.grads).flatten(1)
        return grads @ grads.t()


class Linear(Contribution):
    """dW_b = Σ_t g_t a_tᵀ, of a [B, T, I] and g [B, T, O]."""

    def __init__(self, a: Tensor, g: Tensor):
        super().__init__(len(a), torch.Size((g.shape[2], a.shape[2])))
        self.a, self.g = a, g.to(a.dtype)
        self.alone = choose(a.shape[1], a.shape[2], g.shape[2], is_cuda=a.is_cuda)

    def total(self, weight: Tensor | None = None) -> Tensor:
        return linear_weight_grad(self.a, self.g, sample_weight=weight)

    def norm_sq(self) -> Tensor:
        return linear_grad_norm_sq(self.a, self.g, bias=False)

    def total_with_norm(self) -> tuple[Tensor, Tensor]:
        return linear_weight_grad_with_norm(self.a, self.g)

    def sample(self, b: int) -> Tensor:
        return linear_weight_grad(self.a[b : b + 1], self.g[b : b + 1])

    def gram(self) -> Tensor:
        return linear_grad_gram(self.a, self.g, bias=False)

    def kept(self) -> Contribution:
        """The gradients themselves, where they take at most half the memory of what they are made of: the sum is then
        nearly free. The product would round those of halves."""
        is_small = 2 * self.batch * self.shape.numel() <= self.a.numel() + self.g.numel()
        if not is_small or self.a.is_cuda or self.a.dtype not in (torch.float32, torch.float64):
            return self
        with at_rest():
            return Samples(self.g.mT @ self.a)


class Conv(Contribution):
    """The gradient of a convolution's weight from x [B, I, *spatial] and g [B, O, *spatial]."""

    def __init__(self, x: Tensor, g: Tensor, kernel_size: tuple[int, ...], options: dict):
        super().__init__(len(x), torch.Size((g.shape[1], x.shape[1] // options["groups"], *kernel_size)))
        self.x, self.g, self.kernel_size, self.options = x, g.to(x.dtype), kernel_size, options

    def total_with_norm(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return conv_weight_grad_with_norm(self.x, self.g, self.kernel_size, sample_weight=weight, **self.options)

    @functools.cached_property
    def samples(self) -> Samples | None:
        """The gradients themselves, where they take no more memory than what they are made of."""
        if self.batch * self.shape.numel() > self.x.numel() + self.g.numel():
            return None
        return Samples(conv_weight_grad_sample(self.x, self.g, self.kernel_size, **self.options))

    def total(self, weight: Tensor | None = None) -> Tensor:
        return self.samples.total(weight) if self.samples else self.total_with_norm(weight)[0]

    def norm_sq(self) -> Tensor:
        return self.samples.norm_sq() if self.samples else self.total_with_norm()[1]

    def sample(self, b: int) -> Tensor:
        one = slice(b, b + 1)
        return conv_weight_grad_sample(self.x[one], self.g[one], self.kernel_size, **self.options)[0]

    def gram(self) -> Tensor:
        return self.samples.gram() if self.samples else super().gram()


class Embedding(Contribution):
    """Rows w_l·g_l added to a table at ids [B, L], g [B, L, D]."""

    fused = alone = "rows by id"

    def __init__(self, ids: Tensor, g: Tensor, num: int, padding_idx: int | None, row_weight: Tensor | None = None):
        super().__init__(len(ids), torch.Size((num, g.shape[2])))
        self.ids, self.g, self.padding_idx, self.row_weight = ids, g, padding_idx, row_weight

    def rows(self, of: slice | Tensor = slice(None)) -> Tensor:
        """The rows in the accumulators' dtype, those of the padding 0."""
        rows = self.g[of].to(torch.promote_types(self.g.dtype, torch.float32))
        if self.row_weight is not None:
            rows = rows * self.row_weight[of, :, None].to(rows.dtype)
        return rows if self.padding_idx is None else rows.masked_fill((self.ids[of] == self.padding_idx)[..., None], 0)

    def total(self, weight: Tensor | None = None) -> Tensor:
        rows = self.rows() if weight is None else self.rows() * weight[:, None, None]
        return rows.new_zeros(self.shape).index_add_(0, self.ids.flatten(), rows.flatten(0, 1))

    def norm_sq(self) -> Tensor:
        return embedding_grad_norm_sq(self.ids, self.g, padding_idx=self.padding_idx, row_weight=self.row_weight)

    def sample(self, b: int) -> Tensor:
        rows = self.rows(slice(b, b + 1))[0]
        return rows.new_zeros(self.shape).index_add_(0, self.ids[b], rows)

    def gram(self) -> Tensor:
        ids, rows = self.ids.flatten(), self.rows()
        lines = [((self.ids[b, :, None] == ids) * (rows[b] @ rows.flatten(0, 1).t())).sum(0) for b in range(self.batch)]
        return torch.stack(lines).unflatten(1, (self.batch, -1)).sum(2)


class Generic(Contribution):
    """Any function: vector-Jacobian products with all but one sample's part of the output's gradient zeroed.

    vjp(g)[index] is the gradient for the parameter from the output's gradient g, None if there is no path; by_sample(g)
    views a tensor of the output's shape with the samples first.
    """

    fused = alone = "generic"

    def __init__(self, g: Tensor, batch: int, shape: torch.Size, by_sample: Callable, vjp: Callable, index: int):
        super().__init__(batch, shape)
        self.g, self.by_sample, self.vjp, self.index = g, by_sample, vjp, index

    def total(self, weight: Tensor | None = None) -> Tensor:
        g = self.g
        if weight is not None:
            g = g.clone()
            rows = self.by_sample(g)
            rows.mul_(weight.to(g.dtype).view(-1, *[1] * (rows.ndim - 1)))
        return self._push(g)

    def sample(self, b: int) -> Tensor:
        g = torch.zeros_like(self.g)
        self.by_sample(g)[b] = self.by_sample(self.g)[b]
        return self._push(g)

    def without_graph(self) -> Contribution:
        return self.apart()

    def _push(self, g: Tensor) -> Tensor:
        grad = self.vjp(g)[self.index]
        grad = g.new_zeros(self.shape) if grad is None else grad
        return grad.to(torch.promote_types(grad.dtype, torch.float32))


class Derived(Contribution):
    """What `inner` gives a tensor that is computed from the parameter, carried on to the parameter by `pull`."""

    fused = alone = "generic"

    def __init__(self, inner: Contribution, pull: Callable[[Tensor], Tensor], shape: torch.Size, isometric: bool):
        super().__init__(inner.batch, shape)
        self.inner, self.pull, self.isometric = inner, pull, isometric
        if isometric:
            self.fused, self.alone = inner.fused, inner.alone

    def total(self, weight: Tensor | None = None) -> Tensor:
        return self.pull(self.inner.total(weight))

    def norm_sq(self) -> Tensor:
        return self.inner.norm_sq() if self.isometric else super().norm_sq()

    def sample(self, b: int) -> Tensor:
        return self.pull(self.inner.sample(b))

    def gram(self) -> Tensor:
        return self.inner.gram() if self.isometric else super().gram()

    def without_graph(self) -> Contribution:
        if self.isometric:
            return Derived(self.inner.without_graph(), self.pull, self.shape, True)
        return self.apart()

    def kept(self) -> Contribution:
        return Derived(self.inner.kept(), self.pull, self.shape, self.isometric)


class Sum(Contribution):
    """Several uses of one parameter, which add up before they are squared: the cross terms count."""

    fused = alone = "sum of uses"

    def __init__(self, uses: list[Contribution]):
        super().__init__(uses[0].batch, uses[0].shape)
        self.uses = uses

    def total(self, weight: Tensor | None = None) -> Tensor:
        return sum(use.total(weight) for use in self.uses)

    def sample(self, b: int) -> Tensor:
        return sum(use.sample(b) for use in self.uses)

    def norm_sq(self) -> Tensor:
        pairs = [(p, q) for i, p in enumerate(self.uses) for q in self.uses[:i]]
        if not all(_is_tied(*pair) for pair in pairs):
            return super().norm_sq()
        own = sum(use.norm_sq() for use in self.uses)
        norm_sq = own + 2 * sum(_cross(*pair) for pair in pairs)
        # Where the uses cancel, the difference of large numbers has lost its digits.
        for b in (norm_sq < 0.05 * own).nonzero().flatten().tolist():
            norm_sq[b] = real(self.sample(b)).square().sum()
        return norm_sq


def combine(uses: list[Contribution]) -> Contribution:
    """The uses of one parameter as one contribution."""
    linear = [use for use in uses if isinstance(use, Linear)]
    if len(linear) > 1:
        # Uses of a linear layer's weight are one use on longer sequences.
        a, g = (torch.cat([getattr(use, name) for use in linear], dim=1) for name in "ag")
        uses = [use for use in uses if not isinstance(use, Linear)] + [Linear(a, g)]
    samples = [use for use in uses if isinstance(use, Samples)]
    if len(samples) > 1:
        grads = sum(use.grads for use in samples)
        uses = [use for use in uses if not isinstance(use, Samples)] + [Samples(grads)]
    return uses[0] if len(uses) == 1 else Sum(uses)


def _is_tied(p: Contribution, q: Contribution) -> bool:
    return {type(p), type(q)} == {Linear, Embedding}


def _cross(p: Contribution, q: Contribution) -> Tensor:
    """⟨∇_b, ∇'_b⟩ [B] of an embedding table that is a linear layer's weight too: Σ_(t, l) g_t[id_l] (a_t·h_l)."""
    linear, embedding = (p, q) if isinstance(p, Linear) else (q, p)
    rows = embedding.rows()
    ids = embedding.ids[:, None].expand(-1, linear.g.shape[1], -1)
    return (linear.g.gather(2, ids).to(rows.dtype) * (linear.a.to(rows.dtype) @ rows.mT)).sum((1, 2))


def real(grad: Tensor) -> Tensor:
    """A complex gradient as real and imaginary parts, over which norms and inner products are taken."""
    return torch.view_as_real(grad) if grad.is_complex() else grad


def sum_of(g: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The sum over dims, in float32 for the halves."""
    return g.sum(dims, dtype=torch.promote_types(g.dtype, torch.float32)) if dims else g
