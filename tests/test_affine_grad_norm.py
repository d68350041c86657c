"""affine_grad_sample and affine_grad_norm_sq: values on every normalisation layer, gradients, strides, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import fastmix
from fastmix.reference import affine_grad_norm as reference
from fastmix.testing.affine_grad_norm import CASES, sample_case
from fastmix.testing.cases import check_case
from fastmix.testing.grad_norm import check_norms

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KERNEL_DTYPES = DTYPES[:3]
OP = "affine_grad_sample"


def _inputs(sizes=(3, 7, 12, 5), statistics=(3, 7, 12), dtype=torch.float32, **options) -> dict:
    return sample_case("", sizes, statistics, **options).inputs(dtype)


def _exact(inputs: dict) -> dict:
    return {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def _norms(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """[B], the squared norms."""
    return outputs if isinstance(outputs, torch.Tensor) else torch.cat(outputs, dim=1).square().sum(1)


# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, dtype, recorded, assert_kernel):
    with recorded() as ops:
        check_case(case, dtype)
    assert_kernel(ops, OP, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_on_a_gpu(case, dtype, recorded, assert_kernel):
    pytest.importorskip("triton")
    with recorded() as ops:
        check_case(case, dtype, "cuda")
    assert_kernel(ops, OP, dtype, "cuda")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_norms_of_every_sample(case, dtype):
    """The halves are rounded before and summed in float32, so that their norms are as good."""
    inputs = case.inputs(dtype)
    check_norms(case.name, _norms(case.function(**inputs)), _norms(case.reference(**_exact(inputs))))


def _layer_norm(x, weight, bias):
    """A layer over all dimensions behind the second one that leaves out nothing: [B, T, C]."""
    var, mean = torch.var_mean(x, dim=2, correction=0)
    view = x.unsqueeze(3)  # [B, T, C, 1]
    return F.layer_norm(x, weight.shape, weight, bias), view, mean[..., None], (var + 1e-5).rsqrt()[..., None]


def _rms_norm(x, weight, bias):
    rstd = (x.square().mean(2) + 1e-5).rsqrt()[..., None]
    return F.rms_norm(x, weight.shape, weight, 1e-5) + bias, x.unsqueeze(3), None, rstd


def _group_norm(x, weight, bias):
    """Three groups of the channels of [B, C, L]."""
    var, mean = torch.var_mean(x.view(len(x), 3, -1), dim=2, correction=0)
    mean, rstd = (value.repeat_interleave(x.shape[1] // 3, 1)[:, None] for value in (mean, (var + 1e-5).rsqrt()))
    return F.group_norm(x, 3, weight, bias), x.unsqueeze(1), mean, rstd


def _instance_norm(x, weight, bias):
    var, mean = torch.var_mean(x, dim=2, correction=0)
    output = F.instance_norm(x, weight=weight, bias=bias)
    return output, x.unsqueeze(1), mean[:, None], (var + 1e-5).rsqrt()[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("layer", "channel_dim"),
    [(_layer_norm, 2), (_rms_norm, 2), (_group_norm, 1), (_instance_norm, 1)],
    ids=["layer norm", "rms norm", "group norm", "instance norm"],
)
def test_gradients_of_the_layers(layer, channel_dim, dtype):
    """Against a backward for each sample through PyTorch's own layer."""
    x, g = torch.randn(2, 4, 9, 15, dtype=torch.float64)
    channels = x.shape[channel_dim]
    weight, bias = torch.ones(channels).double().requires_grad_(), torch.zeros(channels).double().requires_grad_()
    grads = [
        torch.autograd.grad(layer(x[b : b + 1], weight, bias)[0], (weight, bias), g[b : b + 1]) for b in range(len(x))
    ]
    expected = [torch.stack(rows) for rows in zip(*grads, strict=True)]
    output, view, *statistics = layer(x, weight, bias)
    arguments = [value if value is None else value.to(dtype) for value in (view, g.view(view.shape), *statistics)]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    for actual, grad in zip(fastmix.affine_grad_sample(*arguments), expected, strict=True):
        torch.testing.assert_close(actual.double(), grad, **tolerance)
    normalised = output.detach().to(dtype)  # γ = 1, β = 0
    norm_sq = fastmix.affine_grad_norm_sq(normalised, g.to(dtype), channel_dim=channel_dim)
    oracle = sum(grad.square().sum(1) for grad in expected)
    check_norms("normalised", norm_sq, oracle)
    only_scale = fastmix.affine_grad_norm_sq(normalised, g.to(dtype), channel_dim=channel_dim, bias=False)
    check_norms("scale", only_scale, expected[0].square().sum(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_of_halves_is_float32(dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = _inputs(dtype=dtype)
    assert {output.dtype for output in fastmix.affine_grad_sample(**inputs)} == {expected}
    x, g = 100 * inputs["input"], inputs["grad_output"]
    norm_sq = fastmix.affine_grad_norm_sq(x, g)
    assert norm_sq.dtype == expected
    assert (norm_sq > 256**2).all()
    assert norm_sq.isfinite().all()


def test_statistics_may_have_another_dtype():
    """A layer keeps them in float32, or float64 by mistake; the sums are the input's."""
    inputs = _inputs(dtype=torch.bfloat16)
    statistics = {name: inputs[name] for name in ("mean", "rstd")}
    expected = fastmix.affine_grad_sample(**inputs)
    for dtype in (torch.float32, torch.float64):
        cast = {name: value.to(dtype) for name, value in statistics.items()}
        outputs = fastmix.affine_grad_sample(**(inputs | cast))
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


# Memory


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(3, 7, 12, 5), (3, 20, 12, 1), (3, 1, 12, 20)], ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.cat([x, x], dim=3)[..., ::2],
        lambda x: torch.cat([x, x], dim=2)[:, :, 3 : 3 + x.shape[2]],
        lambda x: torch.cat([x, x], dim=1)[:, ::2],
        lambda x: x[:1].expand(x.shape),
        lambda x: x[:, :1].expand(x.shape),
        lambda x: x[:, :, :1].expand(x.shape),
        lambda x: x[..., :1].expand(x.shape),
        lambda x: x.mT.contiguous().mT,
        lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ],
    ids=["behind", "channels", "before", "expanded batch", "expanded before", "expanded channels", "expanded behind",
         "channels last", "reversed"],
)  # fmt: skip
def test_strides(view, sizes, dtype):
    inputs = _inputs(sizes, sizes[:3], dtype)
    a, g = (view(inputs.pop(name)) for name in ("input", "grad_output"))
    plain = fastmix.affine_grad_sample(a.contiguous(), g.contiguous(), **inputs)
    for pair in ((a, g), (a.contiguous(), g)):
        torch.testing.assert_close(fastmix.affine_grad_sample(*pair, **inputs), plain)


@pytest.mark.parametrize("shape", [(), (1,), (12,), (7, 1), (3, 1, 1), (3, 7, 1), (1, 7, 12), (3, 1, 12)], ids=str)
def test_statistics_broadcast(shape):
    inputs = _inputs(statistics=shape)
    full = {name: inputs[name].expand(3, 7, 12).contiguous() for name in ("mean", "rstd")}
    torch.testing.assert_close(fastmix.affine_grad_sample(**inputs), fastmix.affine_grad_sample(**(inputs | full)))
    transposed = {name: value.mT.contiguous().mT for name, value in full.items()}
    torch.testing.assert_close(
        fastmix.affine_grad_sample(**(inputs | transposed)), fastmix.affine_grad_sample(**inputs)
    )


@pytest.mark.parametrize("sizes", [(3, 7, 12, 5), (3, 20, 12, 1), (3, 1, 12, 20)], ids=str)
def test_nan_stays_in_its_sample_and_channel(sizes):
    inputs = _inputs(sizes, sizes[:3])
    clean = fastmix.affine_grad_sample(**inputs)
    inputs["input"][1, 0, 5, 0] = float("nan")
    scale, shift = fastmix.affine_grad_sample(**inputs)
    assert torch.equal(shift, clean[1])
    expected = clean[0].clone()
    expected[1, 5] = float("nan")
    torch.testing.assert_close(scale, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(2, 300, 129, 1), (1, 1, 40, 900), (9, 20, 33, 10)], ids=str)
def test_thread_count_and_repetition_change_no_bit(sizes, dtype, ordinary_memory):
    inputs = _inputs(sizes, sizes[:3], dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(fastmix.affine_grad_sample(**inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("sizes", [(1, 3000, 130, 1), (2, 1, 64, 3000), (40, 50, 65, 1)], ids=str)
def test_work_for_several_threads(sizes, ordinary_memory):
    case = sample_case(str(sizes), sizes, sizes[:3])
    check_case(case, torch.float32)
    inputs = case.inputs(torch.float32)
    check_norms(case.name, _norms(case.function(**inputs)), _norms(case.reference(**_exact(inputs))))


# Gradients, transforms, the registered op, compilation


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "no mean"])
def test_gradcheck(mean):
    inputs = _inputs((2, 3, 2, 2), (2, 3, 1), torch.float64, mean=mean)
    leaves = [value if value is None else value.requires_grad_() for value in inputs.values()]
    assert gradcheck(fastmix.affine_grad_sample, leaves)
    pair = leaves[:2]
    assert gradcheck(fastmix.affine_grad_norm_sq, pair, check_forward_ad=True)
    assert gradgradcheck(fastmix.affine_grad_norm_sq, pair)


def test_gradient_and_transforms_in_float32():
    a, g = torch.randn(2, 3, 7, 6)
    leaf = a.clone().requires_grad_()
    grad = torch.autograd.grad(fastmix.affine_grad_norm_sq(leaf, g).sum(), leaf)[0]
    tangent = torch.randn_like(a)
    _, derivative = torch.func.jvp(lambda a: fastmix.affine_grad_norm_sq(a, g), (a,), (tangent,))
    torch.testing.assert_close(derivative, (grad * tangent).flatten(1).sum(1))
    single = torch.func.grad(lambda a, g: fastmix.affine_grad_norm_sq(a[None], g[None]).sum())
    torch.testing.assert_close(torch.vmap(single)(a, g), grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, needs_kernels):
    op = torch.ops.fastmix.affine_grad_sample.default
    a, g = torch.randn(2, 2, 4, 6, 3).to(dtype)
    statistics = torch.rand(2, 4, 1).expand(2, 4, 6)
    mean = statistics if dtype == torch.float32 else None
    torch.library.opcheck(op, (a, g, mean, statistics))


def test_compile():
    torch._dynamo.reset()
    compiled = torch.compile(fastmix.affine_grad_sample, fullgraph=True, backend="aot_eager")
    for rows in (7, 9):
        inputs = _inputs((2, rows, 12, 1), (2, rows, 1))
        torch.testing.assert_close(compiled(**inputs), fastmix.affine_grad_sample(**inputs))
    compiled = torch.compile(fastmix.affine_grad_norm_sq, fullgraph=True, backend="aot_eager")
    a, g = torch.randn(2, 3, 7, 6)
    torch.testing.assert_close(compiled(a, g, channel_dim=1), fastmix.affine_grad_norm_sq(a, g, channel_dim=1))


def test_meta():
    inputs = {name: value.to("meta") for name, value in _inputs(dtype=torch.bfloat16).items()}
    for output in fastmix.affine_grad_sample(**inputs):
        assert (output.shape, output.dtype, output.device.type) == ((3, 12), torch.float32, "meta")


# Errors


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "input must be a Tensor, got list", {"input": [1.0]}),
        (TypeError, "input must be float32, .* got int64", {"input": torch.ones(2, 3, 4, 5).long()}),
        (TypeError, "grad_output must be a Tensor, got NoneType", {"grad_output": None}),
        (TypeError, "grad_output must have the dtype of input, float32, got float64",
         {"grad_output": torch.ones(2, 3, 4, 5).double()}),
        (TypeError, "rstd must be a Tensor, got NoneType", {"rstd": None}),
        (TypeError, "rstd must be float32, .* got int64", {"rstd": torch.ones(2, 3, 1).long()}),
        (TypeError, "mean must be a Tensor, got float", {"mean": 0.0}),
        (ValueError, r"input must be \[B, R, C, L\], got \[2, 3, 4\]", {"input": torch.ones(2, 3, 4)}),
        (ValueError, r"grad_output must be \[2, 3, 4, 5\] as input, got \[2, 3, 5, 4\]",
         {"grad_output": torch.ones(2, 3, 5, 4)}),
        (ValueError, r"rstd must broadcast to \[B, R, C\] = \[2, 3, 4\], got \[2, 3\]", {"rstd": torch.ones(2, 3)}),
        (ValueError, r"mean must broadcast to \[B, R, C\] = \[2, 3, 4\], got \[2, 3, 4, 1\]",
         {"mean": torch.ones(2, 3, 4, 1)}),
        (ValueError, "grad_output must be on the device of input, cpu, got meta",
         {"grad_output": torch.ones(2, 3, 4, 5, device="meta")}),
        (ValueError, "rstd must be on the device of input, cpu, got meta", {"rstd": torch.ones(4, device="meta")}),
    ],
)  # fmt: skip
def test_errors(error, match, arguments):
    x, statistics = torch.ones(2, 3, 4, 5), torch.ones(2, 3, 1)
    valid = {"input": x, "grad_output": x, "mean": statistics, "rstd": statistics}
    with pytest.raises(error, match=match):
        fastmix.affine_grad_sample(**(valid | arguments))


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "input must be a Tensor, got NoneType", {"input": None}),
        (TypeError, "grad_output must have the dtype of input, float32, got float16",
         {"grad_output": torch.ones(2, 3, 4).half()}),
        (ValueError, r"grad_output must be \[2, 3, 4\] as input, got \[2, 4, 3\]",
         {"grad_output": torch.ones(2, 4, 3)}),
        *((ValueError, rf"channel_dim must be a dimension of input \[2, 3, 4\] behind the first, got {dim}",
           {"channel_dim": dim}) for dim in (0, 3, -3, -4)),
        (ValueError, r"channel_dim must be a dimension of input \[3\] behind the first, got -1",
         {"input": torch.ones(3), "grad_output": torch.ones(3)}),
        (ValueError, r"channel_dim must be a dimension of input \[\] behind the first, got -1",
         {"input": torch.ones(()), "grad_output": torch.ones(())}),
    ],
)  # fmt: skip
def test_errors_of_norms(error, match, arguments):
    x = torch.ones(2, 3, 4)
    with pytest.raises(error, match=match):
        fastmix.affine_grad_norm_sq(**({"input": x, "grad_output": x} | arguments))


def test_the_op_guards_memory_itself(needs_kernels):
    """Called without the public function's checks, as a compiled program may."""
    op = torch.ops.fastmix.affine_grad_sample.default
    x, statistics = torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4)
    for wrong in (x[:1], x[0], x.double(), x.bfloat16()):
        with pytest.raises(ValueError, match="grad_output must"):
            op(x, wrong, None, statistics)
    for wrong in (statistics[:1], statistics[..., :1], statistics.double(), statistics[0]):
        with pytest.raises(ValueError, match="rstd must"):
            op(x, x, None, wrong)
        with pytest.raises(ValueError, match="mean must"):
            op(x, x, wrong, statistics)
    with pytest.raises(ValueError, match="input must"):
        op(x[0], x[0], None, statistics)
    with pytest.raises(ValueError, match="input must be float32, bfloat16 or float16"):
        op(x.double(), x.double(), None, statistics)


def test_reference_is_what_it_says():
    inputs = _inputs(dtype=torch.float64)
    x, g, mean, rstd = inputs.values()
    scale = torch.einsum("brcl,brcl->bc", g, (x - mean[..., None]) * rstd[..., None])
    actual = reference.affine_grad_sample(**inputs)
    torch.testing.assert_close(actual, (scale, torch.einsum("brcl->bc", g)), rtol=1e-12, atol=1e-12)
