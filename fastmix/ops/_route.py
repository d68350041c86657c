"""The one decision of the package: does a registered kernel answer a call, or the PyTorch reference?

Everything that uses a private PyTorch API is here; tests/test_route.py tries it on every supported version.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastmix import _library

KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

# Op → the device types for which a kernel is registered.
kernels: dict[str, frozenset[str]] = {}


# Op → whether its kernels reach the sizes of an input.
_reaches: dict[str, Callable[[Tensor], bool]] = {}


def note_kernels(op: str, reaches: Callable[[Tensor], bool] = lambda x: True) -> None:
    """Records for which devices `fastmix::op` has a kernel. Called once, after all registrations of the op.

    reaches(x) says whether the kernels serve a tensor of x's device and sizes.
    """
    _reaches[op] = reaches
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    kernels[op] = frozenset(key.lower() for key in ("CPU", "CUDA") if has(f"fastmix::{op}", key))


def kernel_answers(op: str, x: Tensor) -> bool:
    """True if `torch.ops.fastmix.<op>` has a kernel for x's device, dtype and sizes and may be called here.

    Under functorch transforms (vmap, jvp, grad, …) and inside a forward-mode AD level the reference answers:
    those see through PyTorch functions, not through an op.
    """
    if x.device.type not in kernels[op]:
        if _library.missing_reason and not torch.compiler.is_compiling():
            _warn_once()
        return False
    return (
        x.dtype in KERNEL_DTYPES
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0  # no public function tells
        and _reaches[op](x)
    )


def needs_gradient(*arguments: object) -> bool:
    """Whether autograd has to know of an op with these arguments."""
    if torch.compiler.is_compiling():  # the quick way can't be traced
        return torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in arguments)
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)


def call(op: torch._ops.OpOverload, *args):
    """op(*args), below autograd where nothing needs a gradient: its Python layer is more than half of a call's cost."""
    if torch.compiler.is_compiling() or needs_gradient(*args):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the autocast dtype of the first one's device, where autocast is on: for ops that it casts."""
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    castable = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in castable else t for t in tensors)


def data_is_visible(x: Tensor) -> bool:
    """True if x's values may be read: not while compiling or tracing, inside a functorch transform, or capturing a CUDA
    graph, and not of a tensor that has none."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        or x.is_meta
        or isinstance(x, FakeTensor)
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        f"fastmix has no compiled kernels here ({_library.missing_reason}); the PyTorch reference answers, "
        "correct but slower. `fastmix doctor` tells more.",
        stacklevel=4,
    )


def differentiate_backward(
    op_bwd: str,
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    num_inputs: int,
    *,
    num_saved: int = 0,
    num_outputs: int = 1,
) -> None:
    """Gives the backward op `fastmix::op_bwd(*grad_outputs, *inputs, *saved, *options)` its own gradient.

    The backward of `reference(*inputs, *options)` is its vector-Jacobian product; differentiating that, as often as
    asked, is double backward. Slower than a kernel, and the same code for every op. The op returns a gradient for each
    of the num_inputs inputs, which are tensors or None (of any size where the input is None or needs none); `saved` is
    what the forward kept. A gradient of an output may be None too.
    """
    first, last = num_outputs, num_outputs + num_inputs

    def setup_context(ctx, inputs, output):
        options = inputs[last + num_saved :]
        tensors = [value if isinstance(value, Tensor) else None for value in options]
        ctx.save_for_backward(*inputs[:last], *tensors)
        ctx.options = [None if isinstance(value, Tensor) else value for value in options]
        ctx.set_materialize_grads(False)

    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        grad_outputs, inputs = saved[:first], saved[first:last]
        options = [value if tensor is None else tensor for tensor, value in zip(saved[last:], ctx.options, strict=True)]
        outputs_used = [i for i, value in enumerate(grad_outputs) if value is not None]
        varied = [i for i, value in enumerate(inputs) if value is not None and value.is_floating_point()]

        def of_varied(*values: Tensor) -> tuple[Tensor, ...]:
            arguments = dict(enumerate(inputs)) | dict(zip(varied, values, strict=True))
            outputs = reference(*map(arguments.get, range(num_inputs)), *options)
            outputs = (outputs,) if num_outputs == 1 else outputs
            return tuple(outputs[i] for i in outputs_used)

        def reference_bwd(grad_outputs: tuple[Tensor, ...], *values: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(of_varied, *values)[1](grad_outputs)

        values = [inputs[i] for i in varied]
        cotangents = tuple(
            torch.zeros_like(value) if grad is None or grad.shape != value.shape else grad
            for value, grad in zip(values, (grads[i] for i in varied), strict=True)
        )
        used = tuple(grad_outputs[i] for i in outputs_used)
        grad_used, *found = torch.func.vjp(reference_bwd, used, *values)[1](cotangents)
        grad_grads = dict(zip(outputs_used, grad_used, strict=True))
        result = dict(zip(varied, found, strict=True))
        others = [None] * (num_saved + len(options))
        return *map(grad_grads.get, range(num_outputs)), *map(result.get, range(num_inputs)), *others

    torch.library.register_autograd(f"fastmix::{op_bwd}", backward, setup_context=setup_context)
