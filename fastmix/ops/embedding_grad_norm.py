"""Per-sample gradient norms of an embedding table: public function, schema, fake."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix.ops._check import check_float, check_same_device, check_tensor, dtype_name, shape_text
from fastmix.ops._route import call, kernel_answers, needs_gradient, note_kernels
from fastmix.reference import embedding_grad_norm as reference


def embedding_grad_norm_sq(
    input: Tensor, grad_output: Tensor, *, padding_idx: int | None = None, row_weight: Tensor | None = None
) -> Tensor:
    """Squared norm of every sample's gradient of an embedding table, without a table for each sample.

    Rows of equal ids add up before they are squared: Σ_v ‖Σ_(l: id_l = v) w_l·g_l‖² for each sample. float32 for
    bfloat16 and float16. Differentiable in grad_output and row_weight (by the reference).

    Args:
        input: [B, …] int64 or int32, the ids.
        grad_output: [B, …, D] the gradient of the embedded ids; float32, bfloat16, float16 or float64.
        padding_idx: an id whose row gets no gradient.
        row_weight: input's shape, floating-point: factors w of the rows of grad_output, which may then be expanded (the
            mean of a bag: its gradient for each of its ids, and w = 1/length).

    Returns:
        [B], float64 for float64 and float32 for the others.

    Raises:
        TypeError: a tensor has another kind of dtype.
        ValueError: a shape or a device differs.

    Goodfellow, Efficient Per-Example Gradient Computations (arXiv:1510.01799).
    """
    check_tensor("input", input)
    if input.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input must be int32 or int64, got {dtype_name(input.dtype)}")
    if padding_idx is not None and not isinstance(padding_idx, int):
        raise TypeError(f"padding_idx must be an int or None, got {type(padding_idx).__name__}")
    check_float("grad_output", grad_output)
    check_same_device("grad_output", grad_output, "input", input)
    if input.ndim == 0 or grad_output.shape[:-1] != input.shape:
        sizes = ", ".join(map(str, input.shape)) or "B, …"
        raise ValueError(
            f"grad_output must be [{sizes}, D] for input {shape_text(input)}, got {shape_text(grad_output)}"
        )
    b, length = input.shape[0], input.shape[1:].numel()
    ids, g = input.reshape(b, length), grad_output.reshape(b, length, grad_output.shape[-1])
    if row_weight is not None:
        check_float("row_weight", row_weight)
        check_same_device("row_weight", row_weight, "input", input)
        if row_weight.shape != input.shape:
            raise ValueError(f"row_weight must be {shape_text(input)} as input, got {shape_text(row_weight)}")
        row_weight = row_weight.reshape(b, length).to(torch.float64 if g.dtype == torch.float64 else torch.float32)
    if kernel_answers("embedding_grad_norm_sq", g) and not needs_gradient(g, row_weight):
        ids = ids.long()
        return call(torch.ops.fastmix.embedding_grad_norm_sq.default, ids, g, row_weight, padding_idx)
    return reference.embedding_grad_norm_sq(ids, g, padding_idx=padding_idx, row_weight=row_weight)


torch.library.define(
    "fastmix::embedding_grad_norm_sq",
    "(Tensor input, Tensor grad_output, Tensor? row_weight, int? padding_idx) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("fastmix::embedding_grad_norm_sq")
def _(input, grad_output, row_weight, padding_idx):
    return grad_output.new_empty(input.shape[0], dtype=torch.float32)


note_kernels("embedding_grad_norm_sq")
