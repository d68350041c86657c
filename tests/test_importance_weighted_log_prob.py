"""importance_weighted_log_prob: values, gradients of every order, strides, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Normal

from fastmix.losses import importance_weighted_log_prob
from fastmix.reference.importance_weighted_log_prob import importance_weighted_log_prob as reference
from fastmix.testing.cases import check_case
from fastmix.testing.importance_weighted_log_prob import CASES
from fastmix.testing.parity import GRADIENT_FACTOR, check_parity

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KERNEL_DTYPES = DTYPES[:3]
OP = "importance_weighted_log_prob"


def _arguments(b: int, k: int, d: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    shapes = {"log_px_z": (b, k), "z": (b, k, d), "mu": (b, d), "logvar": (b, d)}
    return {name: torch.randn(shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


# Values and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, dtype, recorded, assert_kernel):
    with recorded() as ops:
        check_case(case, dtype)
    assert_kernel(ops, OP, dtype)
    assert_kernel(ops, f"{OP}_bwd", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_on_a_gpu(case, dtype, recorded, assert_kernel):
    pytest.importorskip("triton")
    with recorded() as ops:
        check_case(case, dtype, "cuda")
    assert_kernel(ops, OP, dtype, "cuda")


def test_the_papers_formula():
    log_px_z, z, mu, logvar = _arguments(4, 6, 3, torch.float64).values()
    prior = Normal(0.0, 1.0).log_prob(z).sum(2)
    posterior = Normal(mu[:, None], (logvar / 2).exp()[:, None]).log_prob(z).sum(2)
    expected = (log_px_z + prior - posterior).logsumexp(1) - math.log(6)
    torch.testing.assert_close(importance_weighted_log_prob(log_px_z, z, mu, logvar), expected)


def test_dtypes_may_differ():
    """Under autocast the latents may be halves, the rest not."""
    arguments = _arguments(3, 5, 4)
    mixed = dict(arguments, z=arguments["z"].bfloat16(), mu=arguments["mu"].half())
    value = importance_weighted_log_prob(**mixed)
    assert value.dtype == torch.float32
    exact = importance_weighted_log_prob(**{name: x.double() for name, x in mixed.items()})
    torch.testing.assert_close(value, exact.float())
    value.sum().backward()
    assert importance_weighted_log_prob(**dict(mixed, mu=mixed["mu"].double())).dtype == torch.float64


def test_gradcheck():
    leaves = tuple(_arguments(2, 3, 2, torch.float64).values())
    assert gradcheck(importance_weighted_log_prob, leaves, check_forward_ad=True)
    assert gradgradcheck(importance_weighted_log_prob, leaves)


def test_second_order_of_the_kernel():
    """Through the registered backward."""

    def derivatives(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in arguments.values()]
        grads = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
        return *grads, *torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)

    arguments = _arguments(3, 20, 5)
    actual = derivatives(importance_weighted_log_prob, torch.float32)
    expected, oracle = (derivatives(reference, dtype) for dtype in (torch.float32, torch.float64))
    for i, tensors in enumerate(zip(actual, expected, oracle, strict=True)):
        check_parity(f"derivative {i}", *tensors, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_weight_at_all(dtype):
    """A density of 0 has no direction to grow in."""
    arguments = _arguments(2, 40, 3, dtype)
    arguments["log_px_z"] = torch.full((2, 40), -torch.inf, dtype=dtype, requires_grad=True)
    value = importance_weighted_log_prob(**arguments)
    assert (value == -torch.inf).all()
    grads = torch.autograd.grad(value.sum(), list(arguments.values()), create_graph=True)
    seconds = torch.autograd.grad(sum(grad.sum() for grad in grads), list(arguments.values()))
    assert all((grad == 0).all() for grad in (*grads, *seconds))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_infinite_and_undefined_weights(dtype):
    """In the first of two runs of latents or in the second."""
    arguments = _arguments(6, 1100, 4, dtype)
    log_px_z = arguments["log_px_z"].detach()
    log_px_z[0, 3], log_px_z[1, 1090], log_px_z[2, 3], log_px_z[3, 1090] = torch.nan, torch.nan, torch.inf, torch.inf
    log_px_z[4, 3], log_px_z[4, 1090] = torch.inf, torch.nan
    value = importance_weighted_log_prob(**dict(arguments, log_px_z=log_px_z))
    assert value[[0, 1, 4]].isnan().all()
    assert (value[[2, 3]] == torch.inf).all()
    assert value[5].isfinite()


def test_threads_do_not_change_a_bit(needs_kernels):
    arguments = _arguments(3, 2100, 33)

    def values():
        value = importance_weighted_log_prob(**arguments)
        return value, *torch.autograd.grad(value.sum(), list(arguments.values()))

    threads = torch.get_num_threads()
    several = values()
    torch.set_num_threads(1)
    try:
        for one, other in zip(values(), several, strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)


# Memory


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["log_px_z", "z", "mu", "logvar"])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.cat([x, x], dim=-1)[..., ::2],
        lambda x: torch.cat([x, x], dim=0)[::2],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x[:1].expand(x.shape),
        lambda x: x[..., :1].expand(x.shape),
    ],
    ids=["last", "samples", "samples last", "expanded batch", "expanded rows"],
)
def test_strides(view, name, dtype):
    arguments = {key: x.detach().to(dtype) for key, x in _arguments(4, 10, 9).items()}
    arguments[name] = view(arguments[name])
    plain = {key: x.clone(memory_format=torch.contiguous_format) for key, x in arguments.items()}
    grad_output = torch.ones(1).expand(4)
    grads = []
    for leaves in (arguments, plain):
        value = importance_weighted_log_prob(**{key: x.requires_grad_() for key, x in leaves.items()})
        grads.append((value, *torch.autograd.grad(value, list(leaves.values()), grad_output)))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


# Transforms and compilation


def test_transforms():
    log_px_z, z, mu, logvar = (x.detach() for x in _arguments(3, 6, 4).values())
    leaf = mu.clone().requires_grad_()
    grad = torch.autograd.grad(importance_weighted_log_prob(log_px_z, z, leaf, logvar).sum(), leaf)[0]

    def of_one(mu, *rest):
        log_px_z, z, logvar = (x[None] for x in rest)
        return importance_weighted_log_prob(log_px_z, z, mu[None], logvar).sum()

    torch.testing.assert_close(torch.vmap(torch.func.grad(of_one))(mu, log_px_z, z, logvar), grad)
    tangent = torch.randn_like(mu)
    _, slope = torch.func.jvp(lambda m: importance_weighted_log_prob(log_px_z, z, m, logvar), (mu,), (tangent,))
    torch.testing.assert_close(slope, (grad * tangent).sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, needs_kernels):
    arguments = _arguments(3, 5, 4)
    arguments["z"] = arguments["z"].detach().to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.fastmix.importance_weighted_log_prob.default, tuple(arguments.values()))
    plain = [x.detach() for x in arguments.values()]
    normalizer = torch.tensor([[1.0, 2.0]]).expand(3, 2)
    backward = torch.ops.fastmix.importance_weighted_log_prob_bwd.default
    torch.library.opcheck(backward, (torch.randn(3), *plain, normalizer))


def test_compile():
    torch._dynamo.reset()
    compiled = torch.compile(importance_weighted_log_prob, fullgraph=True, backend="aot_eager")
    for samples in (3, 4):
        leaves = tuple(_arguments(samples, 5, 4).values())
        expected = importance_weighted_log_prob(*leaves)
        torch.testing.assert_close(compiled(*leaves), expected)
        grads = torch.autograd.grad(compiled(*leaves).sum(), leaves)
        torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), leaves))


def test_meta():
    log_px_z, z, mu, logvar = (x.detach().to("meta", torch.bfloat16) for x in _arguments(3, 5, 4).values())
    value = importance_weighted_log_prob(log_px_z, z, mu, logvar)
    assert (value.shape, value.dtype) == ((3,), torch.float32)


# Errors


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "z must be a Tensor, got list", {"z": []}),
        (TypeError, "mu must be float32, .* got int64", {"mu": torch.ones(2, 4).long()}),
        (TypeError, "logvar must be a Tensor, got NoneType", {"logvar": None}),
        (TypeError, "log_px_z must be float32, .* got complex64", {"log_px_z": torch.ones(2, 3).cfloat()}),
        (ValueError, r"z must be \[B, K, D\] with K ≥ 1, got \[2, 4\]", {"z": torch.ones(2, 4)}),
        (ValueError, r"z must be \[B, K, D\] with K ≥ 1, got \[2, 0, 4\]", {"z": torch.ones(2, 0, 4)}),
        (ValueError, r"log_px_z must be \[B, K\] = \[2, 3\], .* got \[2\]", {"log_px_z": torch.ones(2)}),
        (ValueError, r"log_px_z must be \[B, K\] = \[2, 3\], .* got \[3, 2\]", {"log_px_z": torch.ones(3, 2)}),
        (ValueError, r"mu must be \[B, D\] = \[2, 4\], .* got \[2, 3\]", {"mu": torch.ones(2, 3)}),
        (ValueError, r"logvar must be \[B, D\] = \[2, 4\], .* got \[2, 1\]", {"logvar": torch.ones(2, 1)}),
        (ValueError, "mu must be on the device of z, cpu, got meta", {"mu": torch.ones(2, 4, device="meta")}),
    ],
)  # fmt: skip
def test_errors(error, match, arguments):
    good = {"log_px_z": torch.ones(2, 3), "z": torch.ones(2, 3, 4), "mu": torch.ones(2, 4), "logvar": torch.ones(2, 4)}
    with pytest.raises(error, match=match):
        importance_weighted_log_prob(**(good | arguments))


def test_the_op_guards_memory_itself(needs_kernels):
    """Called without the public function's checks, as a compiled program may."""
    forward = torch.ops.fastmix.importance_weighted_log_prob.default
    backward = torch.ops.fastmix.importance_weighted_log_prob_bwd.default
    good = {"log_px_z": torch.ones(2, 3), "z": torch.ones(2, 3, 4), "mu": torch.ones(2, 4), "logvar": torch.ones(2, 4)}
    saved = {"grad_output": torch.ones(2), "normalizer": torch.ones(2, 2)}
    for name, value in (good | saved).items():
        for wrong in (value[:1], value.double(), value[..., None]):
            if name in good:
                with pytest.raises(ValueError, match=f"{name if wrong.shape[0] == 2 else ''}.* must be"):
                    forward(**(good | {name: wrong}))
            with pytest.raises(ValueError, match=f"{name if wrong.shape[0] == 2 else ''}.* must be"):
                backward(**(good | saved | {name: wrong}))
