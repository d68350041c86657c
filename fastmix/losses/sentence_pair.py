"""Sentence pairs: classification of two vectors, similarity within a batch, and its distillation."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmix.ops._check import check_float, check_same_device, check_tensor, dtype_name, shape_text

# The logit of a class that is not the group's: no share in the softmax, and finite, so that no 0 · inf arises.
_MASKED = -1e12


class SentencePairHead(nn.Module):
    """Classes of a pair of sentences from their vectors, for one or several tasks: [u, v, |u − v|]·Wᵀ, without a bias.

    Each task has its group of columns: with the default ``group_sizes=(2, 3)``, columns 0–1 say whether the sentences
    are similar and 2–4 contradiction, entailment or neutral, so that one head learns from both kinds of data. Given
    the group of each pair, ``F.cross_entropy(head(u, v, group), labels)`` over all columns, the labels counted over
    all columns too, is the cross-entropy within the group.
    Reimers and Gurevych, Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks (arXiv:1908.10084).

    Args:
        dim: size D of a vector.
        group_sizes: columns of each group.
    """

    def __init__(self, dim: int, group_sizes: Sequence[int] = (2, 3)) -> None:
        super().__init__()
        sizes = tuple(group_sizes)
        if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"group_sizes must be one or more positive ints, got {sizes}")
        self.dim, self.group_sizes = dim, sizes
        self.dense = nn.Linear(3 * dim, sum(sizes), bias=False)

    def forward(self, u: Tensor, v: Tensor, group: Tensor | None = None) -> Tensor:
        """The logits of a batch of pairs.

        Args:
            u: [B, dim], the first sentences' vectors, of a floating-point dtype.
            v: [B, dim], the second sentences', u's dtype.
            group: [B], int32 or int64, the group of each pair, 0 … len(group_sizes) − 1; None masks nothing.

        Returns:
            [B, sum(group_sizes)]; with group, columns of the others are −1e12 (float16's lowest value, −65504).

        Raises:
            TypeError: u or v is of no floating-point dtype, they differ in it, or group is no int32 or int64.
            ValueError: a shape or a device does not fit, or a group is outside. Groups are read on a CPU only, where
                that costs no waiting, and not in a compiled function; there a pair of no group has all columns masked.
        """
        check_float("u", u)
        check_float("v", v)
        if u.ndim != 2 or u.shape[1] != self.dim:
            raise ValueError(f"u must be [B, {self.dim}], got {shape_text(u)}")
        if v.shape != u.shape:
            raise ValueError(f"v must be shaped as u, {shape_text(u)}, got {shape_text(v)}")
        if v.dtype != u.dtype:
            raise TypeError(f"v must be {dtype_name(u.dtype)} as u is, got {dtype_name(v.dtype)}")
        logits = self.dense(torch.cat([u, v, (u - v).abs()], dim=1))
        if group is None:
            return logits
        _check_indices("group", group, u, len(self.group_sizes))
        low = max(_MASKED, torch.finfo(logits.dtype).min)
        columns = logits.split(self.group_sizes, dim=1)
        return torch.cat([part.masked_fill((group != i)[:, None], low) for i, part in enumerate(columns)], dim=1)

    def extra_repr(self) -> str:
        return f"{self.dim}, group_sizes={self.group_sizes}"


def in_batch_similarity_loss(vectors: Tensor, partner: Tensor | None = None, scale: float = 30.0) -> Tensor:
    """Finds each sentence's partner among all sentences of the batch, by cosine similarity: SimBERT's loss.

    mean_i −log( exp(scale·S[i, p_i]) / Σ_{j ≠ i} exp(scale·S[i, j]) ), S the cosine similarities of the batch and p_i
    the partner of i: all sentences but i itself and its partner are negatives. Computed in float32 (float64 for
    float64), also under autocast. A vector of zeros has similarity 0 to all.

    Args:
        vectors: [B, D], of a floating-point dtype.
        partner: [B], int32 or int64, each vector's partner, another than itself; by default 2i and 2i + 1 are partners
            of each other, and B is even.
        scale: factor of the similarities, an inverse temperature.

    Returns:
        A scalar, float32 or float64; NaN for an empty batch, as PyTorch's means are.

    Raises:
        TypeError: vectors are of no floating-point dtype, or partner is no int32 or int64.
        ValueError: a shape or a device does not fit, B is odd without partner, or a partner is outside or the vector
            itself (its values are read on a CPU only, and not in a compiled function).

    Su, SimBERT: Integrating Retrieval and Generation into BERT (technical report, 2020), and RoFormer-Sim (2021).
    """
    _check_vectors("vectors", vectors)
    rows = torch.arange(len(vectors), device=vectors.device)
    if partner is not None:
        _check_indices("partner", partner, vectors, len(vectors))
        if _is_readable(partner) and bool((partner == rows).any()):
            itself = int((partner == rows).nonzero()[0])
            raise ValueError(f"partner must be another than the vector itself, got {itself} for vector {itself}")
    elif len(vectors) % 2:
        raise ValueError(f"vectors must be an even number without partner, got {shape_text(vectors)}")
    scores = scale * _cosine_similarities(vectors)
    scores = scores.masked_fill(rows == rows[:, None], -torch.inf)
    return F.cross_entropy(scores, rows ^ 1 if partner is None else partner.long())


def similarity_distillation_loss(student: Tensor, teacher: Tensor, scale: float = 100.0) -> Tensor:
    """Makes the cosine similarities of one model's vectors those of another's: what a slow teacher knows of pairs.

    scale·mean((S_student − S_teacher)²) over the [B, B] matrices of the batch's cosine similarities. The mean counts
    the diagonal, where both are 1. Computed in float32 (float64 for float64), also under autocast. A vector of zeros
    has similarity 0 to all, itself included.

    Args:
        student: [B, D], of a floating-point dtype.
        teacher: [B, D'], of a floating-point dtype; D' need not be D. No gradient flows into it.
        scale: factor of the loss.

    Returns:
        A scalar, float32 or float64; NaN for an empty batch, as PyTorch's means are.

    Raises:
        TypeError: an argument is of no floating-point dtype.
        ValueError: an argument is no matrix, their numbers of rows differ, or their devices.

    Su, RoFormer-Sim: Integrating Retrieval and Generation into RoFormer (technical report, 2021); Tung and Mori,
    Similarity-Preserving Knowledge Distillation (arXiv:1907.09682).
    """
    _check_vectors("student", student)
    _check_vectors("teacher", teacher)
    if len(teacher) != len(student):
        raise ValueError(f"teacher must be [{len(student)}, D], one row for each of student, got {shape_text(teacher)}")
    check_same_device("teacher", teacher, "student", student)
    difference = _cosine_similarities(student) - _cosine_similarities(teacher.detach())
    return scale * difference.square().mean()


def _cosine_similarities(vectors: Tensor) -> Tensor:
    """[B, B]. Rows of zeros stay zeros, with finite gradients."""
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    squared = vectors.square().sum(dim=1, keepdim=True)
    unit = vectors * torch.where(squared > 0, squared, 1.0).rsqrt()
    with _no_autocast(vectors.device.type):
        return unit @ unit.mT


def _no_autocast(device: str) -> contextlib.AbstractContextManager:
    """Autocast would round the factors of the product, and with them differences of similarities."""
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()


def _check_vectors(name: str, vectors: Tensor) -> None:
    check_float(name, vectors)
    if vectors.ndim != 2:
        raise ValueError(f"{name} must be [B, D], got {shape_text(vectors)}")


def _check_indices(name: str, indices: Tensor, vectors: Tensor, count: int) -> None:
    """One index in 0 … count − 1 for each vector."""
    check_tensor(name, indices)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {dtype_name(indices.dtype)}")
    if indices.shape != vectors.shape[:1]:
        raise ValueError(f"{name} must be [{len(vectors)}], got {shape_text(indices)}")
    check_same_device(name, indices, "the vectors", vectors)
    if len(indices) > 0 and _is_readable(indices):
        smallest, largest = torch.stack(indices.aminmax()).tolist()
        if smallest < 0 or largest >= count:
            raise ValueError(f"{name} must be in 0..{count - 1}, got values from {smallest} to {largest}")


def _is_readable(indices: Tensor) -> bool:
    """On a GPU reading values would wait for the device, and while compiling there are none."""
    return indices.is_cpu and not torch.compiler.is_compiling()
