"""The per-sample norms of a linear layer under autograd of every order, torch.func, torch.compile, and their errors."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fastmix
from fastmix.ops import grad_norm
from fastmix.reference import grad_norm as reference
from fastmix.testing.grad_norm import linear_case
from fastmix.testing.parity import GRADIENT_FACTOR, check_parity

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KERNEL_DTYPES = DTYPES[:3]
FORMS = ["gram", "direct"]
FUNCTIONS = [
    fastmix.linear_grad_norm_sq,
    fastmix.linear_weight_grad_with_norm,
    fastmix.linear_grad_gram,
    fastmix.linear_weight_grad,
]
WITH_SAMPLE_WEIGHT = pytest.mark.parametrize("function", FUNCTIONS[1::2], ids=lambda function: function.__name__)
LENGTHS = torch.tensor([3, 5])
OPTIONS = [{}, {"bias": False}, {"lengths": LENGTHS}]
WITH_OPTIONS = pytest.mark.parametrize("options", OPTIONS, ids=["bias", "no bias", "lengths"])


@pytest.fixture
def use(monkeypatch):
    """use("gram"), use("direct"): the form for all sizes."""
    return lambda form: monkeypatch.setattr(grad_norm, "choose", lambda *sizes, is_cuda=False: form)


def _pair(b=2, t=5, i=4, o=3, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(linear_case("linear_grad_norm_sq", "", (b, t, i, o)).inputs(dtype).values())


def _leaves(tensors) -> list[torch.Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


# Autograd


@WITH_OPTIONS
def test_gradcheck(options):
    def function(*pair):
        return fastmix.linear_grad_norm_sq(*pair, **options)

    leaves = _leaves(_pair(dtype=torch.float64))
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("function", FUNCTIONS[1:], ids=lambda function: function.__name__)
def test_gradcheck_of_what_the_reference_differentiates(function):
    leaves = _leaves(_pair(dtype=torch.float64))
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@WITH_SAMPLE_WEIGHT
def test_gradcheck_of_sample_weights(function):
    leaves = _leaves((*_pair(dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)))
    assert gradcheck(lambda a, g, w: function(a, g, sample_weight=w), leaves)


@WITH_OPTIONS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_double_backward(dtype, form, options, use, recorded, assert_kernel):
    """A penalty on the gradient of a norm."""

    def order_two(function, pair):
        leaves = _leaves(pair)
        grads = torch.autograd.grad(function(*leaves, **options).square().mean(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)

    use(form)
    pair = [0.5 * x for x in _pair(dtype=dtype)]
    with recorded() as ops:
        actual = order_two(fastmix.linear_grad_norm_sq, pair)
    assert_kernel(ops, "linear_grad_norm_sq_bwd", dtype)
    expected = order_two(reference.linear_grad_norm_sq, pair)
    oracle = order_two(reference.linear_grad_norm_sq, [x.double() for x in pair])
    for name, *grads in zip(("input", "grad_output"), actual, expected, oracle, strict=True):
        check_parity(f"second order, {name}", *grads, factor=GRADIENT_FACTOR)


def test_a_penalty_trains_through_a_layer():
    """The norm of the loss's gradient, differentiated with respect to the parameters."""
    x, target = torch.randn(4, 6, 5), torch.randn(4, 6, 3)

    def penalty(weight, norm_sq):
        y = (x @ weight.T).tanh()
        grad_output = 2 * (y - target) * (1 - y.square())
        return torch.autograd.grad(norm_sq(x, grad_output).sqrt().sum(), weight)[0]

    weight = torch.randn(3, 5)
    results = [
        penalty(weight.to(dtype).requires_grad_(), function)
        for dtype, function in [
            (torch.float32, fastmix.linear_grad_norm_sq),
            (torch.float32, reference.linear_grad_norm_sq),
        ]
    ]
    x, target = x.double(), target.double()
    oracle = penalty(weight.double().requires_grad_(), reference.linear_grad_norm_sq)
    check_parity("penalty", *results, oracle, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_gradient_only_where_it_is_asked_for(function):
    def loss(*pair):
        outputs = function(*pair)
        return sum(output.square().sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))

    pair = _pair()
    assert not loss(*pair).requires_grad
    leaves = _leaves(pair)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for i in range(2):
        arguments = [x.clone().requires_grad_(i == j) for j, x in enumerate(pair)]
        loss(*arguments).backward()
        assert [x.grad is not None for x in arguments] == [i == j for j in range(2)]
        torch.testing.assert_close(arguments[i].grad, expected[i])
    with torch.no_grad():
        assert not loss(*leaves).requires_grad
    with torch.inference_mode():
        assert loss(*leaves).is_inference()


# torch.func and forward mode


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_jvp_and_vmap(function):
    pair = _pair(dtype=torch.float64)
    tangents = tuple(torch.randn_like(x) for x in pair)
    outputs, derivatives = torch.func.jvp(function, pair, tangents)
    if isinstance(outputs, torch.Tensor):
        outputs, derivatives = (outputs,), (derivatives,)
    _, pull = torch.func.vjp(function, *pair)
    drawn = tuple(torch.randn_like(output) for output in outputs)
    grads = pull(drawn if len(drawn) > 1 else drawn[0])
    products = sum((grad * tangent).sum() for grad, tangent in zip(grads, tangents, strict=True))
    torch.testing.assert_close(sum((d * w).sum() for d, w in zip(derivatives, drawn, strict=True)), products)

    many = torch.stack([pair[1], 2 * pair[1]]).float()
    mapped = torch.vmap(function, in_dims=(None, 0))(pair[0].float(), many)
    single = function(pair[0].float(), many[1])
    if isinstance(single, torch.Tensor):
        mapped, single = (mapped,), (single,)
    for all_outputs, output in zip(mapped, single, strict=True):
        torch.testing.assert_close(all_outputs[1], output)


def test_forward_mode_in_float32():
    """Where a kernel would silently give a derivative of zero."""
    a, g = _pair()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(a, torch.ones_like(a))
        tangent = forward_ad.unpack_dual(fastmix.linear_grad_norm_sq(dual, g)).tangent
    leaf = a.requires_grad_()
    grad = torch.autograd.grad(fastmix.linear_grad_norm_sq(leaf, g).sum(), leaf)[0]
    torch.testing.assert_close(tangent, grad.sum((1, 2)))


def test_grad_of_vmap():
    a, g = _pair()
    per_sample = torch.vmap(torch.func.grad(lambda x, y: fastmix.linear_grad_norm_sq(x[None], y[None]).sum()))(a, g)
    leaf = a.requires_grad_()
    torch.testing.assert_close(per_sample, torch.autograd.grad(fastmix.linear_grad_norm_sq(leaf, g).sum(), leaf)[0])


# The registered ops, compilation, autocast


@pytest.mark.parametrize(("gram", "dtype"), [(True, torch.float32), (False, torch.bfloat16)], ids=str)
def test_opcheck(gram, dtype, needs_kernels):
    ops, leaves = torch.ops.fastmix, _leaves(_pair(dtype=dtype))
    lengths = LENGTHS.int()
    torch.library.opcheck(ops.linear_grad_norm_sq.default, (*leaves, lengths, True, gram))
    torch.library.opcheck(ops.linear_grad_norm_sq_bwd.default, (torch.randn(2), *leaves, lengths, True, gram))
    pair = [leaf.detach() for leaf in leaves]
    torch.library.opcheck(ops.linear_weight_grad.default, (*pair, torch.randn(2)))
    torch.library.opcheck(ops.linear_weight_grad_with_norm.default, (*pair, torch.randn(2)))
    torch.library.opcheck(ops.linear_grad_gram.default, (*pair, gram))


@pytest.mark.parametrize(
    ("function", "dtype"),
    [*((FUNCTIONS[0], dtype) for dtype in DTYPES), *((function, torch.float32) for function in FUNCTIONS[1:])],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_compile(function, dtype):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for t in (5, 40):
        leaves = _leaves(_pair(t=t, dtype=dtype))
        results = [call(*leaves) for call in (compiled, function)]
        torch.testing.assert_close(*results)
        results = [(result,) if isinstance(result, torch.Tensor) else result for result in results]
        losses = [sum(output.sum() for output in outputs) for outputs in results]
        torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in losses))
        with torch.no_grad():
            torch.testing.assert_close(compiled(*leaves), function(*leaves))


def test_compiled_program_calls_the_kernel(assert_kernel):
    torch._dynamo.reset()
    compiled = torch.compile(fastmix.linear_grad_norm_sq, fullgraph=True)
    leaves = _leaves(_pair())
    compiled(*leaves)
    with torch.profiler.profile() as profile:
        compiled(*leaves).sum().backward()
    ops = [event.name.removeprefix("fastmix::") for event in profile.events() if event.name.startswith("fastmix::")]
    assert_kernel(ops, "linear_grad_norm_sq")
    assert_kernel(ops, "linear_grad_norm_sq_bwd")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_fake_tensors_and_meta(function, dtype):
    expected = function(*_pair(dtype=dtype))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = function(*(mode.from_tensor(x) for x in _pair(dtype=dtype)))
    meta = function(*(x.to("meta") for x in _pair(dtype=dtype)))
    for outputs in (fake, meta):
        pairs = zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (outputs, expected)), strict=True)
        assert all((x.shape, x.dtype) == (y.shape, y.dtype) for x, y in pairs)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_autocast_leaves_the_inputs_as_they_are(function):
    for dtype in (torch.float32, torch.float64):
        expected = function(*_pair(dtype=dtype))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(function(*_pair(dtype=dtype)), expected, rtol=0, atol=0)


# Errors


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "input must be a Tensor, got list", {"input": [[1.0]]}),
        (TypeError, "input must be float32, .* got int64", {"input": torch.ones(2, 9, 6).long()}),
        (TypeError, "grad_output must be a Tensor, got NoneType", {"grad_output": None}),
        (TypeError, "grad_output must be float32, .* got complex64", {"grad_output": torch.ones(2, 9, 5) * 1j}),
        (
            TypeError,
            "grad_output must have the dtype of input, float32, got bfloat16",
            {"grad_output": torch.ones(2, 9, 5).bfloat16()},
        ),
        (ValueError, r"input must be \[B, …, I\], got \[9\]", {"input": torch.ones(9), "grad_output": torch.ones(9)}),
        (ValueError, r"grad_output must be \[2, 9, O\] .* got \[2, 8, 5\]", {"grad_output": torch.ones(2, 8, 5)}),
        (ValueError, r"grad_output must be \[2, 9, O\] .* got \[3, 9, 5\]", {"grad_output": torch.ones(3, 9, 5)}),
        (ValueError, r"grad_output must be \[2, 9, O\] .* got \[2, 5\]", {"grad_output": torch.ones(2, 5)}),
        (
            ValueError,
            "grad_output must be on the device of input, cpu, got meta",
            {"grad_output": torch.ones(2, 9, 5, device="meta")},
        ),
    ],
)
def test_errors(function, error, match, arguments):
    with pytest.raises(error, match=match):
        function(**({"input": torch.ones(2, 9, 6), "grad_output": torch.ones(2, 9, 5)} | arguments))


@pytest.mark.parametrize(
    ("error", "match", "lengths"),
    [
        (TypeError, "lengths must be a Tensor, got list", [1, 2]),
        (TypeError, "lengths must be int32 or int64, got float32", torch.ones(2)),
        (ValueError, r"lengths must be \[B\] = \[2\], got \[3\]", torch.tensor([1, 2, 3])),
        (ValueError, r"lengths must be \[B\] = \[2\], got \[2, 1\]", torch.tensor([[1], [2]])),
        (ValueError, "lengths must be on the device of input, cpu, got meta", torch.ones(2, device="meta").int()),
    ],
)
def test_errors_of_lengths(error, match, lengths):
    with pytest.raises(error, match=match):
        fastmix.linear_grad_norm_sq(torch.ones(2, 9, 6), torch.ones(2, 9, 5), lengths=lengths)


@pytest.mark.parametrize("shape", [(2,), (2, 3, 4)], ids=str)
def test_lengths_are_for_sequences(shape):
    with pytest.raises(ValueError, match=r"lengths are for input \[B, T, I\], got \[2(, 3, 4)?, 6\]"):
        fastmix.linear_grad_norm_sq(torch.ones(*shape, 6), torch.ones(*shape, 5), lengths=LENGTHS)


@pytest.mark.parametrize(
    ("error", "match", "weights"),
    [
        (TypeError, "sample_weight must be a Tensor, got float", 0.5),
        (TypeError, "sample_weight must be float32, .* got int64", torch.tensor([1, 2])),
        (ValueError, r"sample_weight must be \[B\] = \[2\], got \[2, 1\]", torch.ones(2, 1)),
        (ValueError, r"sample_weight must be \[B\] = \[2\], got \[\]", torch.ones(())),
        (ValueError, "sample_weight must be on the device of input, cpu, got meta", torch.ones(2, device="meta")),
    ],
)
@WITH_SAMPLE_WEIGHT
def test_errors_of_sample_weight(function, error, match, weights):
    with pytest.raises(error, match=match):
        function(torch.ones(2, 9, 6), torch.ones(2, 9, 5), sample_weight=weights)


def test_the_ops_guard_memory_themselves(needs_kernels):
    """Called without the public functions' checks, as a compiled program may."""
    ops = torch.ops.fastmix
    a, g = _pair()
    lengths, norm_grad = LENGTHS.int(), torch.ones(2)
    calls = {
        "norm_sq": lambda a, g: ops.linear_grad_norm_sq(a, g, None, True, True),
        "norm_sq_bwd": lambda a, g: ops.linear_grad_norm_sq_bwd(norm_grad, a, g, None, True, False),
        "weight": lambda a, g: ops.linear_weight_grad(a, g, None),
        "weight and norm": lambda a, g: ops.linear_weight_grad_with_norm(a, g, None),
        "gram": lambda a, g: ops.linear_grad_gram(a, g, True),
    }
    for call in calls.values():
        for wrong in (g[:1], g[:, :2], g[0], g.double(), g.bfloat16()):
            with pytest.raises(ValueError, match=r"grad_output|input"):
                call(a, wrong)
        for dtype in (torch.float64, torch.int32):
            with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
                call(a.to(dtype), g.to(dtype))
        with pytest.raises(ValueError, match="input"):
            call(a[0], g[0])
    for wrong in (lengths[:1], lengths.long(), lengths.float(), lengths[None]):
        with pytest.raises(ValueError, match="lengths"):
            ops.linear_grad_norm_sq(a, g, wrong, True, True)
        with pytest.raises(ValueError, match="lengths"):
            ops.linear_grad_norm_sq_bwd(norm_grad, a, g, wrong, True, True)
    for wrong in (norm_grad[:1], norm_grad.double(), norm_grad[None]):
        with pytest.raises(ValueError, match="grad_norm_sq"):
            ops.linear_grad_norm_sq_bwd(wrong, a, g, None, True, True)
        with pytest.raises(ValueError, match="sample_weight"):
            ops.linear_weight_grad(a, g, wrong)
        with pytest.raises(ValueError, match="sample_weight"):
            ops.linear_weight_grad_with_norm(a, g, wrong)
