"""conv_weight_grad_with_norm and conv_grad_norm_sq: values, gradients, transposed convolutions, strides, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import fastmix
from fastmix.reference import conv_grad_norm as reference
from fastmix.testing.cases import check_case
from fastmix.testing.conv_grad_norm import CASES, conv_case
from fastmix.testing.grad_norm import check_norms
from fastmix.testing.parity import check_parity

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KERNEL_DTYPES = DTYPES[:3]
OP = "conv_weight_grad_with_norm"
CONV = (F.conv1d, F.conv2d, F.conv3d)
CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def _outputs(function, inputs: dict) -> tuple[torch.Tensor, ...]:
    outputs = function(**inputs)
    return (outputs,) if isinstance(outputs, torch.Tensor) else outputs


def _exact(inputs: dict) -> dict:
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _inputs(shape=(3, 4, 9, 8), out_channels=6, kernel_size=(3, 3), dtype=torch.float32, **options) -> dict:
    return conv_case("", shape, out_channels, kernel_size, **({"padding": 1} | options)).inputs(dtype)


def _sample_grads(function, weight_shape, inputs, grad_output, **options) -> torch.Tensor:
    """[B, *weight_shape]: the gradients of a convolution's weight by a backward for each sample."""
    weight = torch.zeros(weight_shape, dtype=inputs.dtype, requires_grad=True)
    grads = [
        torch.autograd.grad(function(x[None], weight, **options), weight, g[None])[0]
        for x, g in zip(inputs, grad_output, strict=True)
    ]
    return torch.stack(grads) if grads else torch.zeros(0, *weight_shape, dtype=inputs.dtype)


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
def test_case_on_a_gpu(case, dtype):
    check_case(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_norms_of_every_sample(case, dtype):
    """The halves are rounded before and summed in float32, so that their norms are as good."""
    inputs = case.inputs(dtype)
    check_norms(case.name, _outputs(case.function, inputs)[-1], _outputs(case.reference, _exact(inputs))[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if "with_norm" in case.name], ids=str)
def test_gradients_of_every_sample(case, dtype, recorded, assert_kernel):
    inputs = {name: value for name, value in case.inputs(dtype).items() if name != "sample_weight"}
    with recorded() as ops:
        actual = fastmix.conv_weight_grad_sample(**inputs)
    assert_kernel(ops, "conv_weight_grad_sample", dtype)
    expected = reference.conv_weight_grad_sample(**inputs)
    check_parity(case.name, actual, expected, reference.conv_weight_grad_sample(**_exact(inputs)), independent=1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_loop_over_samples(case):
    inputs = case.inputs(torch.float64)
    actual = _outputs(case.reference, inputs)
    x, g, kernel_size = inputs.pop("input"), inputs.pop("grad_output"), inputs.pop("kernel_size")
    weights, bias = inputs.pop("sample_weight", None), inputs.pop("bias", None)
    shape = (g.shape[1], x.shape[1] // inputs.get("groups", 1), *kernel_size)
    grads = _sample_grads(CONV[len(kernel_size) - 1], shape, x, g, **inputs)
    norm_sq = grads.flatten(1).square().sum(1)
    if bias:
        norm_sq = norm_sq + g.flatten(2).sum(2).square().sum(1)
    torch.testing.assert_close(actual[-1], norm_sq)
    if len(actual) == 2:
        torch.testing.assert_close(
            actual[0], torch.tensordot(torch.ones(len(x)).to(x) if weights is None else weights, grads, 1)
        )


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_options(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    spatial, groups = draw(1, 3), draw(1, 4)
    kernel, stride, padding, dilation = (
        tuple(draw(low, high) for _ in range(spatial)) for low, high in ((1, 4), (1, 4), (0, 3), (1, 3))
    )
    sizes = [max(1, d * (k - 1) + 1 - 2 * p) + draw(0, 6) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    case = conv_case("any", (draw(1, 3), groups * draw(1, 5), *sizes), groups * draw(1, 7), kernel, stride=stride,
                     padding=padding, dilation=dilation, groups=groups)  # fmt: skip
    check_case(case, data.draw(st.sampled_from(KERNEL_DTYPES)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("spatial", "options"),
    [
        (1, {"stride": 3, "padding": 2, "output_padding": 2}),
        (2, {}),
        (2, {"stride": 2, "padding": 1, "output_padding": 1}),
        (2, {"stride": 2, "dilation": 2, "groups": 3}),
        (3, {"stride": 2, "padding": 1, "groups": 3}),
    ],
)
def test_transposed_convolution(spatial, options, dtype):
    """Its weight's gradient is that of a convolution with the two tensors exchanged."""
    groups, kernel_size = options.get("groups", 1), (3, 4, 2)[:spatial]
    x = torch.randn(3, 6, *(5, 4, 3)[:spatial], dtype=torch.float64).to(dtype)
    shape = (6, 9 // groups, *kernel_size)
    function = CONV_TRANSPOSE[spatial - 1]
    output = function(x.double(), torch.zeros(shape, dtype=torch.float64), **options)
    g = torch.randn_like(output).to(dtype)
    grads = _sample_grads(function, shape, x.double(), g.double(), **options)
    of_conv = {name: value for name, value in options.items() if name != "output_padding"}
    dw, norm_sq = fastmix.conv_weight_grad_with_norm(g, x, kernel_size, **of_conv)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype != torch.float64 else {}
    torch.testing.assert_close(dw.double(), grads.sum(0), **tolerance)
    check_norms("transposed", norm_sq, grads.flatten(1).square().sum(1))


def test_an_int_holds_for_all_dimensions():
    inputs = _inputs((2, 4, 15, 14), 6, (3, 3), stride=2, padding=2, dilation=2)
    x, g = inputs["input"], inputs["grad_output"]
    expected = fastmix.conv_weight_grad_with_norm(**inputs)
    actual = fastmix.conv_weight_grad_with_norm(x, g, 3, stride=2, padding=2, dilation=2)
    as_lists = fastmix.conv_weight_grad_with_norm(x, g, [3, 3], stride=[2, 2], padding=[2, 2], dilation=[2, 2])
    for outputs in (actual, as_lists):
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    plain = _inputs(kernel_size=(1, 1), padding=0)
    assert torch.equal(fastmix.conv_grad_norm_sq(plain["input"], plain["grad_output"], 1, bias=False),
                       fastmix.conv_weight_grad_with_norm(**plain)[1])  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_of_halves_is_float32(dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    dw, norm_sq = fastmix.conv_weight_grad_with_norm(**_inputs(dtype=dtype))
    assert (dw.dtype, norm_sq.dtype) == (expected, expected)
    inputs = _inputs(dtype=dtype, bias=True)
    norms = fastmix.conv_grad_norm_sq(**inputs | {"input": 100 * inputs["input"]})
    assert norms.dtype == expected
    assert (norms > 256**2).all()
    assert norms.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"stride": 2}, {"kernel_size": (1, 1), "padding": 0}], ids=str)
def test_nearly_constant_images_lose_no_norm(options, dtype):
    inputs = _inputs((3, 4, 12, 12), dtype=torch.float64, **options)
    inputs["input"] = 1 + 0.01 * inputs["input"]
    inputs["grad_output"] -= inputs["grad_output"].mean((2, 3), keepdim=True)
    inputs = {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    _, norm_sq = fastmix.conv_weight_grad_with_norm(**inputs)
    check_norms("nearly constant", norm_sq, reference.conv_weight_grad_with_norm(**_exact(inputs))[1])


# Memory


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.cat([x, x], dim=3)[..., ::2],
        lambda x: torch.cat([x, x], dim=2)[:, :, 3 : 3 + x.shape[2]],
        lambda x: torch.cat([x, x], dim=1)[:, ::2],
        lambda x: x[:1].expand(x.shape),
        lambda x: x[:, :1].expand(x.shape),
        lambda x: x[:, :, :1, :1].expand(x.shape),
        lambda x: x.mT.contiguous().mT,
        lambda x: x.contiguous(memory_format=torch.channels_last),
    ],
    ids=["columns", "rows", "channels", "expanded batch", "expanded channels", "expanded pixels", "transposed",
         "channels last"],
)  # fmt: skip
def test_strides(view, groups, dtype):
    inputs = _inputs(groups=groups, dtype=dtype)
    a, g = (view(inputs.pop(name)) for name in ("input", "grad_output"))
    results = [
        fastmix.conv_weight_grad_with_norm(*pair, **inputs)
        for pair in ((a, g), (a.contiguous(), g), (a.contiguous(), g.contiguous()))
    ]
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


@pytest.mark.parametrize("groups", [1, 2])
def test_nan_stays_in_its_sample_and_channel(groups):
    inputs = _inputs(groups=groups)
    clean_dw, clean = fastmix.conv_weight_grad_with_norm(**inputs)
    inputs["grad_output"][1, 5, 2, 3] = float("nan")
    dw, norm_sq = fastmix.conv_weight_grad_with_norm(**inputs)
    assert norm_sq[1].isnan()
    assert torch.equal(norm_sq[::2], clean[::2])
    assert dw[5].isnan().all()
    torch.testing.assert_close(dw[:5], clean_dw[:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "out_channels", "options"),
    [((6, 16, 20, 20), 24, {}), ((1, 40, 30, 30), 48, {}), ((3, 32, 25, 25), 32, {"groups": 32}),
     ((4, 16, 17, 17), 32, {"groups": 2, "stride": 2})],
)  # fmt: skip
def test_thread_count_and_repetition_change_no_bit(shape, out_channels, options, dtype, ordinary_memory, needs_kernels):
    inputs = _inputs(shape, out_channels, dtype=dtype, **options)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(fastmix.conv_weight_grad_with_norm(**inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("shape", "out_channels", "groups"),
    [((2, 70, 40, 40), 90, 1), ((40, 3, 16, 16), 8, 1), ((3, 130, 33, 33), 130, 130)],
)
def test_work_for_several_threads(shape, out_channels, groups, ordinary_memory):
    case = conv_case(str(shape), shape, out_channels, (3, 3), padding=1, groups=groups)
    check_case(case, torch.float32)
    inputs = case.inputs(torch.float32)
    check_norms(case.name, case.function(**inputs)[1], case.reference(**_exact(inputs))[1])


# Gradients, transforms, the registered op, compilation


@pytest.mark.parametrize("options", [{}, {"groups": 2, "stride": 2}], ids=str)
def test_gradcheck(options):
    inputs = _inputs((2, 2, 4, 3), 2, (2, 2), dtype=torch.float64, **options)
    leaves = [inputs.pop(name).requires_grad_() for name in ("input", "grad_output")]
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(
        lambda a, g, w: fastmix.conv_weight_grad_with_norm(a, g, sample_weight=w, **inputs), [*leaves, weights]
    )
    assert gradcheck(lambda a, g: fastmix.conv_grad_norm_sq(a, g, **inputs), leaves)
    assert gradgradcheck(lambda a, g: fastmix.conv_grad_norm_sq(a, g, **inputs), leaves)


def test_gradient_and_transforms_in_float32():
    inputs = _inputs()
    a, g = inputs.pop("input"), inputs.pop("grad_output")

    def norms(a, g):
        return fastmix.conv_grad_norm_sq(a, g, **inputs)

    leaf = a.clone().requires_grad_()
    grad = torch.autograd.grad(norms(leaf, g).sum(), leaf)[0]
    tangent = torch.randn_like(a)
    _, derivative = torch.func.jvp(lambda a: norms(a, g), (a,), (tangent,))
    torch.testing.assert_close(derivative, (grad * tangent).flatten(1).sum(1))
    per_sample = torch.vmap(torch.func.grad(lambda a, g: norms(a[None], g[None]).sum()))(a, g)
    torch.testing.assert_close(per_sample, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, needs_kernels):
    a, g = torch.randn(2, 4, 1, 9, 8).to(dtype), torch.randn(2, 6, 1, 5, 4).to(dtype)
    arguments = (a, g, torch.randn(2), [1, 3, 3], [1, 2, 2], [0, 1, 1], [1, 1, 1], 2)
    torch.library.opcheck(torch.ops.fastmix.conv_weight_grad_with_norm.default, arguments)
    torch.library.opcheck(torch.ops.fastmix.conv_weight_grad_sample.default, arguments[:2] + arguments[3:])


def test_compile():
    torch._dynamo.reset()
    compiled = torch.compile(fastmix.conv_weight_grad_with_norm, fullgraph=True, backend="aot_eager")
    for height in (9, 11):
        inputs = _inputs((2, 4, height, 8), groups=2)
        torch.testing.assert_close(compiled(**inputs), fastmix.conv_weight_grad_with_norm(**inputs))


def test_fake_tensors_and_meta():
    for kernel_size, shape in [((3,), (2, 4, 9)), ((3, 2), (2, 4, 9, 8)), ((1, 2, 3), (2, 4, 5, 6, 7))]:
        inputs = _inputs(shape, 6, kernel_size, torch.bfloat16, groups=2)
        expected = fastmix.conv_weight_grad_with_norm(**inputs)
        inputs |= {name: inputs[name].to("meta") for name in ("input", "grad_output")}
        outputs = fastmix.conv_weight_grad_with_norm(**inputs)
        assert [(x.shape, x.dtype) for x in outputs] == [(x.shape, x.dtype) for x in expected]


# Errors


@pytest.mark.parametrize("function", [fastmix.conv_weight_grad_with_norm, fastmix.conv_grad_norm_sq])
@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "input must be a Tensor, got list", {"input": [1.0]}),
        (TypeError, "input must be float32, .* got int64", {"input": torch.ones(2, 4, 9, 8).long()}),
        (TypeError, "grad_output must be a Tensor, got NoneType", {"grad_output": None}),
        (TypeError, "grad_output must have the dtype of input, float32, got float16",
         {"grad_output": torch.ones(2, 6, 7, 6).half()}),
        (ValueError, r"input must be \[B, I, \*spatial\] with 1 to 3 .* got \[2, 4\]", {"input": torch.ones(2, 4)}),
        (ValueError, r"input must be \[B, I, \*spatial\] with 1 to 3 .* got \[2, 1, 1, 1, 1, 1\]",
         {"input": torch.ones(2, 1, 1, 1, 1, 1)}),
        (ValueError, r"grad_output must be \[B, O, \*spatial\] .* \[2, 4, 9, 8\], got \[2, 6, 7\]",
         {"grad_output": torch.ones(2, 6, 7)}),
        (ValueError, r"grad_output must be \[B, O, \*spatial\] .* got \[3, 6, 7, 6\]",
         {"grad_output": torch.ones(3, 6, 7, 6)}),
        (ValueError, r"grad_output must be \[B, O, 7, 6\] for these options, got \[2, 6, 6, 7\]",
         {"grad_output": torch.ones(2, 6, 6, 7)}),
        (ValueError, r"grad_output must be \[B, O, 4, 3\] for these options, got \[2, 6, 7, 6\]", {"stride": 2}),
        (ValueError, r"grad_output must be on the device of input, cpu, got meta",
         {"grad_output": torch.ones(2, 6, 7, 6, device="meta")}),
        (ValueError, r"kernel_size must be an int ≥ 1 or 2 of them, got \(3,\)", {"kernel_size": (3,)}),
        (ValueError, "kernel_size must be an int ≥ 1 or 2 of them, got 0", {"kernel_size": 0}),
        (ValueError, r"stride must be an int ≥ 1 or 2 of them, got \(1, 0\)", {"stride": (1, 0)}),
        (ValueError, r"stride must be an int ≥ 1 or 2 of them, got \(1, 1.5\)", {"stride": (1, 1.5)}),
        (ValueError, "padding must be an int ≥ 0 or 2 of them, got -1", {"padding": -1}),
        (ValueError, r"dilation must be an int ≥ 1 or 2 of them, got \[1, 1, 1\]", {"dilation": [1, 1, 1]}),
        (ValueError, "groups must divide I = 4 and O = 6, got 4", {"groups": 4}),
        (ValueError, "groups must divide I = 4 and O = 6, got 3", {"groups": 3}),
        (ValueError, "groups must divide I = 4 and O = 6, got 0", {"groups": 0}),
        (ValueError, "groups must divide I = 4 and O = 6, got 2.0", {"groups": 2.0}),
    ],
)  # fmt: skip
def test_errors(function, error, match, arguments):
    valid = {"input": torch.ones(2, 4, 9, 8), "grad_output": torch.ones(2, 6, 7, 6), "kernel_size": 3}
    with pytest.raises(error, match=match):
        function(**(valid | arguments))


@pytest.mark.parametrize(
    ("error", "match", "weights"),
    [
        (TypeError, "sample_weight must be a Tensor, got float", 0.5),
        (TypeError, "sample_weight must be float32, .* got bool", torch.tensor([True, False, True])),
        (ValueError, r"sample_weight must be \[B\] = \[3\], got \[2\]", torch.ones(2)),
    ],
)
def test_errors_of_sample_weight(error, match, weights):
    with pytest.raises(error, match=match):
        fastmix.conv_weight_grad_with_norm(**_inputs(), sample_weight=weights)


@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation"])
def test_neither_an_int_nor_a_sequence(name):
    """None and floats have no length: the error names the argument all the same."""
    valid = {"input": torch.ones(2, 4, 9, 8), "grad_output": torch.ones(2, 6, 7, 6), "kernel_size": 3}
    for value in (None, 1.5):
        with pytest.raises((TypeError, ValueError), match=f"{name} must be an int ≥ . or 2 of them, got {value}"):
            fastmix.conv_weight_grad_with_norm(**(valid | {name: value}))


def test_the_op_guards_memory_itself(needs_kernels):
    """Called without the public function's checks, as a compiled program may."""
    op = torch.ops.fastmix.conv_weight_grad_with_norm.default
    a, g = torch.randn(2, 4, 1, 9, 8), torch.randn(2, 6, 1, 9, 8)
    sizes = {"kernel_size": [1, 3, 3], "stride": [1, 1, 1], "padding": [0, 1, 1], "dilation": [1, 1, 1], "groups": 2}
    op(a, g, None, **sizes)
    for wrong in (
        {"kernel_size": [1, 3]}, {"kernel_size": [1, 0, 3]}, {"kernel_size": [1, 5, 3]}, {"stride": [1, 0, 1]},
        {"stride": [1, 1, 2]}, {"padding": [0, 0, 1]}, {"padding": [0, -1, 1]}, {"dilation": [1, 1, 0]},
        {"dilation": [1, 1]}, {"groups": 4}, {"groups": 0}, {"groups": -2},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must"):
            op(a, g, None, **(sizes | wrong))
    for wrong in (g[:1], g[:, :, 0], g[..., :5], g.double(), g.bfloat16()):
        with pytest.raises(ValueError, match="must"):
            op(a, wrong, None, **sizes)
    for wrong in (torch.ones(3), torch.ones(2).double(), torch.ones(2, 1)):
        with pytest.raises(ValueError, match="sample_weight must"):
            op(a, g, wrong, **sizes)
