"""Per-sample gradient norms of a linear layer: public functions, schemas, fakes, gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmix import _library
from fastmix.ops._check import check_float, check_same_device, check_tensor, dtype_name, shape_text
from fastmix.ops._route import call, differentiate_backward, kernel_answers, needs_gradient, note_kernels
from fastmix.reference import grad_norm as reference


def linear_grad_norm_sq(
    input: Tensor, grad_output: Tensor, *, bias: bool = True, lengths: Tensor | None = None
) -> Tensor:
    """Squared norm of every sample's gradient of a linear layer, without a weight-sized tensor for each sample.

    For y = a·Wᵀ + b, with a the layer's input and g the gradient of its output: ‖Σ_t g_t a_tᵀ‖² + ‖Σ_t g_t‖² for each
    sample, t over its positions; equals ``torch.einsum("bto,bti->boi", g, a).square().sum((1, 2)) +
    g.sum(1).square().sum(1)``. Computed as Σ_tu (a_t·a_u)(g_t·g_u) (the ghost norm) where sequences are short, else
    by the product itself, tile by tile; see `choose`. Sums are float32 for bfloat16 and float16. Differentiable in
    input and grad_output, as often as asked.

    Args:
        input: [B, …, I] the layer's input, float32, bfloat16, float16 or float64.
        grad_output: [B, …, O] the gradient of the layer's output, input's dtype and leading sizes.
        bias: whether the bias's part ‖Σ_t g_t‖² counts.
        lengths: [B] int32 or int64, for input [B, T, I]: only a sample's first `lengths` positions count, and what
            lies behind them is not read into any result.

    Returns:
        [B], float64 for float64 and float32 for the others.

    Raises:
        TypeError: input or grad_output is no floating-point tensor, their dtypes differ, or lengths is no integer
            tensor.
        ValueError: the leading sizes differ, input has no batch dimension, or lengths is not [B].

    Goodfellow, Efficient Per-Example Gradient Computations (arXiv:1510.01799); Li et al., Large Language Models Can Be
    Strong Differentially Private Learners (arXiv:2110.05679).
    """
    a, g = _flatten(input, grad_output)
    if lengths is not None:
        lengths = _check_lengths(lengths, input)
    if not kernel_answers("linear_grad_norm_sq", a):
        return reference.linear_grad_norm_sq(a, g, bias=bias, lengths=lengths)
    gram = choose(a.shape[1], a.shape[2], g.shape[2], is_cuda=a.is_cuda) == "gram"
    return call(torch.ops.fastmix.linear_grad_norm_sq.default, a, g, lengths, bool(bias), gram)


def linear_weight_grad(input: Tensor, grad_output: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
    """The gradient of a linear layer's weight, of samples with weights: what clipping by known norms sums.

    dW = Σ_b s_b Σ_t g_t a_tᵀ, where a is the layer's input, g the gradient of its output and s the sample weights;
    equals ``torch.einsum("b,bto,bti->oi", s, g, a)``. Accumulated in float32 for bfloat16 and float16, and returned so.
    Differentiable (by the reference).

    Args:
        input: [B, …, I] the layer's input, float32, bfloat16, float16 or float64.
        grad_output: [B, …, O] the gradient of the layer's output, input's dtype and leading sizes.
        sample_weight: [B] floating-point factors s; None: 1.

    Returns:
        dW [O, I], float64 for float64 and float32 for the others.

    Raises:
        TypeError: a tensor is no floating-point tensor, or the dtypes of input and grad_output differ.
        ValueError: the leading sizes differ, input has no batch dimension, or sample_weight is not [B].

    Lee and Kifer, Scaling up Differentially Private Deep Learning with Fast Per-Example Gradient Clipping
    (arXiv:2009.03106).
    """
    return _weight_grad("linear_weight_grad", input, grad_output, sample_weight)


def linear_weight_grad_with_norm(
    input: Tensor, grad_output: Tensor, *, sample_weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradient of a linear layer's weight and the squared norm of every sample's part of it, in one pass.

    dW = Σ_b s_b·dW_b and ‖dW_b‖², where dW_b = Σ_t g_t a_tᵀ is sample b's own gradient, a the layer's input, g the
    gradient of its output, and s the sample weights, which do not enter the norms. Accumulated in float32 for bfloat16
    and float16, and returned so. Differentiable (by the reference).

    Args:
        input: [B, …, I] the layer's input, float32, bfloat16, float16 or float64.
        grad_output: [B, …, O] the gradient of the layer's output, input's dtype and leading sizes.
        sample_weight: [B] floating-point factors s; None: 1.

    Returns:
        dW [O, I] and the squared norms [B], float64 for float64 and float32 for the others.

    Raises:
        TypeError: a tensor is no floating-point tensor, or the dtypes of input and grad_output differ.
        ValueError: the leading sizes differ, input has no batch dimension, or sample_weight is not [B].

    Goodfellow, Efficient Per-Example Gradient Computations (arXiv:1510.01799).
    """
    return _weight_grad("linear_weight_grad_with_norm", input, grad_output, sample_weight)


def linear_grad_gram(input: Tensor, grad_output: Tensor, *, bias: bool = True) -> Tensor:
    """Inner products of the samples' gradients of a linear layer, without a tensor of B weights.

    ⟨dW_b, dW_c⟩ + ⟨db_b, db_c⟩ = Σ_tu (a_bt·a_cu)(g_bt·g_cu) + Σ_tu g_bt·g_cu for all pairs of samples; its diagonal
    is `linear_grad_norm_sq`. Sums are float32 for bfloat16 and float16. Differentiable (by the reference).

    Args:
        input: [B, …, I] the layer's input, float32, bfloat16, float16 or float64.
        grad_output: [B, …, O] the gradient of the layer's output, input's dtype and leading sizes.
        bias: whether the bias's part counts.

    Returns:
        [B, B], float64 for float64 and float32 for the others.

    Raises:
        TypeError: input or grad_output is no floating-point tensor, or their dtypes differ.
        ValueError: the leading sizes differ, or input has no batch dimension.

    Goodfellow, Efficient Per-Example Gradient Computations (arXiv:1510.01799).
    """
    a, g = _flatten(input, grad_output)
    if kernel_answers("linear_grad_gram", a) and not needs_gradient(a, g):
        return call(torch.ops.fastmix.linear_grad_gram.default, a, g, bool(bias))
    return reference.linear_grad_gram(a, g, bias=bias)


def choose(t: int, i: int, o: int, *, is_cuda: bool = False) -> str:
    """ "gram" or "direct": how the norms of [B, t, i] inputs and [B, t, o] gradients are computed.

    The symmetric Gram form takes t²·(i + o) operations a sample, the direct one 2·t·i·o. On a CPU the Gram form's run
    at 0.9 of the direct one's rate, and its sums over lanes cost as much as 64 more features.
    """
    if is_cuda:
        return "gram" if t * (i + o) < 2 * i * o else "direct"
    return "gram" if t * (i + o + 64) < 1.8 * i * o else "direct"


def _weight_grad(name: str, input: Tensor, grad_output: Tensor, sample_weight: Tensor | None):
    a, g = _flatten(input, grad_output)
    if sample_weight is not None:
        sample_weight = check_sample_weight(sample_weight, input)
    if kernel_answers(name, a) and not needs_gradient(a, g, sample_weight):
        return call(getattr(torch.ops.fastmix, name).default, a, g, sample_weight)
    return getattr(reference, name)(a, g, sample_weight=sample_weight)


def check_sample_weight(sample_weight: Tensor, input: Tensor) -> Tensor:
    check_float("sample_weight", sample_weight)
    check_same_device("sample_weight", sample_weight, "input", input)
    if sample_weight.shape != input.shape[:1]:
        raise ValueError(f"sample_weight must be [B] = [{input.shape[0]}], got {shape_text(sample_weight)}")
    return sample_weight if input.dtype == torch.float64 else sample_weight.float()


def check_pair(input: Tensor, grad_output: Tensor) -> None:
    """What every layer's input and grad_output must be."""
    check_float("input", input)
    check_float("grad_output", grad_output)
    check_same_device("grad_output", grad_output, "input", input)
    if grad_output.dtype != input.dtype:
        raise TypeError(
            f"grad_output must have the dtype of input, {dtype_name(input.dtype)}, got {dtype_name(grad_output.dtype)}"
        )


def _flatten(input: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T, I] and [B, T, O]."""
    check_pair(input, grad_output)
    if input.ndim < 2:
        raise ValueError(f"input must be [B, …, I], got {shape_text(input)}")
    if grad_output.shape[:-1] != input.shape[:-1]:
        sizes = ", ".join(map(str, input.shape[:-1]))
        raise ValueError(f"grad_output must be [{sizes}, O] as input's leading sizes, got {shape_text(grad_output)}")
    if input.ndim == 2:
        return input.unsqueeze(1), grad_output.unsqueeze(1)
    return input.flatten(1, -2), grad_output.flatten(1, -2)


def _check_lengths(lengths: Tensor, input: Tensor) -> Tensor:
    check_tensor("lengths", lengths)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths must be int32 or int64, got {dtype_name(lengths.dtype)}")
    check_same_device("lengths", lengths, "input", input)
    if input.ndim != 3:
        raise ValueError(f"lengths are for input [B, T, I], got {shape_text(input)}")
    if lengths.shape != input.shape[:1]:
        raise ValueError(f"lengths must be [B] = [{input.shape[0]}], got {shape_text(lengths)}")
    return lengths.int()


_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define(
    "fastmix::linear_grad_norm_sq",
    "(Tensor input, Tensor grad_output, Tensor? lengths, bool bias, bool gram) -> Tensor",
    tags=_TAGS,
)
torch.library.define(
    "fastmix::linear_grad_norm_sq_bwd",
    "(Tensor grad_norm_sq, Tensor input, Tensor grad_output, Tensor? lengths, bool bias, bool gram) "
    "-> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "fastmix::linear_weight_grad", "(Tensor input, Tensor grad_output, Tensor? sample_weight) -> Tensor", tags=_TAGS
)
torch.library.define(
    "fastmix::linear_weight_grad_with_norm",
    "(Tensor input, Tensor grad_output, Tensor? sample_weight) -> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define("fastmix::linear_grad_gram", "(Tensor input, Tensor grad_output, bool bias) -> Tensor", tags=_TAGS)


@torch.library.register_fake("fastmix::linear_grad_norm_sq")
def _(input, grad_output, lengths, bias, gram):
    return input.new_empty(input.shape[0], dtype=torch.float32)


@torch.library.register_fake("fastmix::linear_grad_norm_sq_bwd")
def _(grad_norm_sq, input, grad_output, lengths, bias, gram):
    return input.new_empty(input.shape), grad_output.new_empty(grad_output.shape)


@torch.library.register_fake("fastmix::linear_weight_grad")
def _fake_weight_grad(input, grad_output, sample_weight):
    return input.new_empty([grad_output.shape[2], input.shape[2]], dtype=torch.float32)


@torch.library.register_fake("fastmix::linear_weight_grad_with_norm")
def _(input, grad_output, sample_weight):
    return _fake_weight_grad(input, grad_output, sample_weight), input.new_empty(input.shape[0], dtype=torch.float32)


@torch.library.register_fake("fastmix::linear_grad_gram")
def _(input, grad_output, bias):
    return input.new_empty([input.shape[0]] * 2, dtype=torch.float32)


def _save(ctx, inputs, output):
    *tensors, ctx.bias, ctx.gram = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_norm_sq):
    op = torch.ops.fastmix.linear_grad_norm_sq_bwd.default
    return *call(op, grad_norm_sq, *ctx.saved_tensors, ctx.bias, ctx.gram), None, None, None


def _reference(input, grad_output, lengths, bias, gram):
    """With the op's arguments."""
    return reference.linear_grad_norm_sq(input, grad_output, bias=bias, lengths=lengths)


torch.library.register_autograd("fastmix::linear_grad_norm_sq", _backward, setup_context=_save)
differentiate_backward("linear_grad_norm_sq_bwd", _reference, num_inputs=2)


def _linear_grad_norm_sq_cuda(input, grad_output, lengths, bias, gram):
    from tritonkernels.grad_norm import linear_grad_norm_sq as kernel

    return kernel(input, grad_output, lengths, bias, gram)


def _linear_grad_norm_sq_bwd_cuda(grad_norm_sq, input, grad_output, lengths, bias, gram):
    from tritonkernels.grad_norm import linear_grad_norm_sq_bwd as kernel

    return kernel(grad_norm_sq, input, grad_output, lengths, bias, gram)


def _linear_weight_grad_cuda(input, grad_output, sample_weight):
    return _linear_weight_grad_with_norm_cuda(input, grad_output, sample_weight)[0]


def _linear_weight_grad_with_norm_cuda(input, grad_output, sample_weight):
    from tritonkernels.grad_norm import linear_weight_grad_with_norm as kernel

    return kernel(input, grad_output, sample_weight)


def _linear_grad_gram_cuda(input, grad_output, bias):
    from tritonkernels.grad_norm import linear_grad_gram as kernel

    return kernel(input, grad_output, bias)


if _library.triton_serves:
    torch.library.impl("fastmix::linear_grad_norm_sq", "CUDA", _linear_grad_norm_sq_cuda)
    torch.library.impl("fastmix::linear_grad_norm_sq_bwd", "CUDA", _linear_grad_norm_sq_bwd_cuda)
    torch.library.impl("fastmix::linear_weight_grad", "CUDA", _linear_weight_grad_cuda)
    torch.library.impl("fastmix::linear_weight_grad_with_norm", "CUDA", _linear_weight_grad_with_norm_cuda)
    torch.library.impl("fastmix::linear_grad_gram", "CUDA", _linear_grad_gram_cuda)
for _name in ("norm_sq", "norm_sq_bwd", "gram"):
    note_kernels(f"linear_grad_{_name}")
note_kernels("linear_weight_grad")
note_kernels("linear_weight_grad_with_norm")
