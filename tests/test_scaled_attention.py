"""scaled_attention: values and gradients, layouts, threads, log-sum-exp, NaN, dropout, and PyTorch's own function."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import fastmix
from fastmix.testing.cases import Case, check_case
from fastmix.testing.parity import check_parity
from fastmix.testing.scaled_attention import CASES, PACKED, scaled_attention_case, tokens_before_heads

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KERNEL_DTYPES = DTYPES[:3]
EACH_KERNEL_DTYPE = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)


def _run(case: Case, inputs: dict, grad_output: torch.Tensor | None = None) -> list[torch.Tensor]:
    """[outputs, gradients]"""
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.gradients}
    outputs = case.function(**(inputs | leaves))
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    grad_outputs = [grad_output, *(torch.ones_like(output) for output in outputs[1:])]
    grads = torch.autograd.grad(outputs, list(leaves.values()), grad_outputs)
    return [*(output.detach() for output in outputs), *grads]


def _ones(case: Case, inputs: dict) -> torch.Tensor:
    query, value = inputs["query"], inputs["value"]
    return query.new_ones(*query.shape[:3], value.shape[3])


def _assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, dtype, recorded, assert_kernel):
    with recorded() as ops:
        check_case(case, dtype)
    assert_kernel(ops, "scaled_attention", dtype)
    if case.gradients:
        assert_kernel(ops, "scaled_attention_bwd", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_on_a_gpu(case, dtype, recorded, assert_kernel):
    with recorded() as ops:
        check_case(case, dtype, "cuda")
    if _has_gpu_kernel(case):
        assert_kernel(ops, "scaled_attention", dtype, "cuda")
        if case.gradients:
            assert_kernel(ops, "scaled_attention_bwd", dtype, "cuda")


def _has_gpu_kernel(case: Case) -> bool:
    """PyTorch's own kernels answer plain cases, and the reference the largest heads."""
    inputs = case.inputs(torch.float32)
    plain = inputs.keys() <= {"query", "key", "value", "scale", "is_causal", "causal_alignment"}
    return not plain and inputs["query"].shape[3] <= 256


# PyTorch's own function, where it has the feature


def _sdpa(return_lse=False, **inputs):
    return F.scaled_dot_product_attention(**inputs, enable_gqa=inputs["query"].shape[1] != inputs["key"].shape[1])


@EACH_KERNEL_DTYPE
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 3, 17, 31, 16), {}),
        ((2, 2, 17, 31, 16), {"scale": 0.3}),
        ((2, 2, 70, 70, 16), {"is_causal": True}),
        ((2, 2, 17, 31, 16), {"is_causal": True}),
        ((2, 2, 31, 17, 16), {"is_causal": True}),
        ((2, 6, 17, 31, 16), {"kv_heads": 2}),
        ((2, 2, 17, 31, 16), {"mask": "bool"}),
        ((2, 2, 17, 31, 16), {"mask": "float", "mask_shape": (17, 31)}),
        ((2, 2, 17, 31, 16), {"mask": "-inf", "mask_shape": (2, 1, 17, 31), "scale": 1.0}),
    ],
)
def test_equals_scaled_dot_product_attention(shape, options, dtype):
    check_case(dataclasses.replace(scaled_attention_case("against SDPA", shape, **options), reference=_sdpa), dtype)


@pytest.mark.parametrize(
    ("query", "key"),
    [
        ((9, 8), (7, 8)),
        ((3, 9, 8), (3, 7, 8)),
        ((3, 9, 8), (2, 3, 7, 8)),
        ((2, 1, 9, 8), (3, 7, 8)),
        ((9, 8), (3, 7, 8)),
    ],
)
def test_leading_dimensions_may_be_missing_or_one(query, key):
    query, key, value = torch.randn(query), torch.randn(key), torch.randn(key)
    actual, lse = fastmix.scaled_attention(query, key, value, return_lse=True)
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(actual, expected)
    assert lse.shape == actual.shape[:-1]


@EACH_KERNEL_DTYPE
def test_half_precision_rounds_once(dtype):
    """An output is the float32 result, rounded: no probability is rounded before."""
    case = scaled_attention_case("long", (1, 2, 40, 300, 32))
    inputs = case.inputs(dtype)
    exact = case.reference(**{name: value.double() for name, value in inputs.items()})
    error = (case.function(**inputs).double() - exact).abs()
    accumulated = 16 * torch.finfo(torch.float32).eps * inputs["value"].abs().amax()
    assert (error <= torch.finfo(dtype).eps / 2 * exact.abs() + accumulated).all()


@EACH_KERNEL_DTYPE
@pytest.mark.parametrize("kind", ["float", "-inf"])
def test_parameters_wider_than_the_query(kind, dtype):
    """A mask, a bias and a query_scale in float32 beside half queries."""
    shape = (2, 2, 17, 31, 16)
    case = scaled_attention_case("float32 parameters", shape, mask=kind, buckets=8, query_scale="T", return_lse=True)
    wide = ("attn_mask", "bias_weight", "query_scale")

    def widened(function):
        def call(**inputs):
            dtype = torch.promote_types(inputs["query"].dtype, torch.float32)
            return function(**(inputs | {name: inputs[name].to(dtype) for name in wide}))

        return call

    check_case(dataclasses.replace(case, function=widened(case.function), reference=widened(case.reference)), dtype)
    inputs = case.inputs(dtype)
    leaves = {name: inputs[name].float().requires_grad_() for name in wide}
    case.function(**(inputs | leaves))[0].sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves.values())


@EACH_KERNEL_DTYPE
def test_steps_of_decoding_are_rows_of_the_whole(dtype):
    """One query at a time against a growing cache."""
    case = scaled_attention_case("decoding", (2, 4, 20, 20, 16), kv_heads=2, rotary=8, is_causal=True)
    inputs = case.inputs(dtype)
    steps = []
    for i in range(20):
        step = {"query": inputs["query"][:, :, i : i + 1], "causal_alignment": "bottom_right"}
        step |= {name: inputs[name][:, :, : i + 1] for name in ("key", "value")}
        steps.append(case.function(**(inputs | step)))
    exact = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    whole = case.reference(**inputs), case.reference(**exact)
    check_parity("decoding", torch.cat(steps, dim=2), *whole, independent=2)


# Layouts


_VIEWS = {
    "tokens before heads": tokens_before_heads,
    "part of the channels": lambda x: torch.cat([x, x], dim=3)[..., x.shape[3] :],
    "every second token": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded batch": lambda x: x[:1].expand(x.shape),
    "expanded heads": lambda x: x[:, :1].expand(x.shape),
    "expanded tokens": lambda x: x[:, :, :1].expand(x.shape),
    "expanded channels": lambda x: x[..., :1].expand(x.shape),
}


@EACH_KERNEL_DTYPE
@pytest.mark.parametrize("name", _VIEWS)
def test_strides(name, dtype, needs_kernels):
    """Of query, key, value, mask and the output's gradient: the same bits as with contiguous ones."""
    view = _VIEWS[name]
    case = scaled_attention_case(name, (2, 4, 21, 70, 24), kv_heads=2, mask="float", return_lse=True)
    inputs = case.inputs(dtype)
    strided = inputs | {key: view(inputs[key]) for key in ("query", "key", "value", "attn_mask")}
    grad_output = view(torch.randn(2, 4, 21, 24).to(dtype))
    contiguous = {
        key: value.contiguous() if isinstance(value, torch.Tensor) else value for key, value in strided.items()
    }
    _assert_equal(_run(case, strided, grad_output), _run(case, contiguous, grad_output.contiguous()))


def _every_second(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def test_strides_of_options(needs_kernels):
    options = {"prefix_len": [9, 0], "query_lengths": [20, 21], "key_lengths": [70, 60], "key_start": [3, 0]}
    case = scaled_attention_case("options", (2, 4, 21, 70, 24), rotary=8, positions=True, buckets=8, query_scale="BT",
                                 mask="bool", return_lse=True, **options)  # fmt: skip
    inputs = case.inputs(torch.float32)
    apart = {name: _every_second(x) for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    _assert_equal(*(_run(case, each, _ones(case, inputs)) for each in (inputs | apart, inputs)))


def test_the_heads_of_a_token_lie_side_by_side(needs_kernels):
    """As the projection that follows reads them, without a copy."""
    query, key, value = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 5)
    assert fastmix.scaled_attention(query, key, value).transpose(1, 2).is_contiguous()


def test_inputs_are_left_as_they_were():
    case = scaled_attention_case("all", (2, 4, 21, 40, 16), mask="float", buckets=8, rotary=8, query_scale="BT")
    inputs = case.inputs(torch.float32)
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    _run(case, inputs, _ones(case, inputs))
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


# Threads and repetition


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        scaled_attention_case("one head", (1, 1, 300, 200, 16), return_lse=True),
        scaled_attention_case("causal", (1, 3, 200, 200, 16), is_causal=True, buckets=8),
        scaled_attention_case("shared mask", (3, 4, 70, 90, 16), kv_heads=1, mask="float", mask_shape=(1, 1, 70, 90)),
        scaled_attention_case("row mask", (3, 4, 70, 90, 16), mask="float", mask_shape=(1, 1, 1, 90), query_scale="T"),
        scaled_attention_case("one query", (1, 4, 1, 1500, 32), kv_heads=2, rotary=32),
        scaled_attention_case("packed", (1, 2, 60, 101, 16), **PACKED, dropout_p=0.2, dropout_seed=3, buckets=8),
    ],
    ids=str,
)
def test_thread_count_and_repetition_change_no_bit(case, dtype, needs_kernels):
    inputs = case.inputs(dtype)
    grad_output = torch.randn(_ones(case, inputs).shape).to(dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(_run(case, inputs, grad_output))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        _assert_equal(other, results[0])


@pytest.mark.parametrize(
    "case",
    [
        scaled_attention_case("several blocks", (1, 2, 520, 530, 64), is_causal=True),
        # Without gradients: that of one query's 1300 keys exceeds the bound by 4 % (docs/decisions.md, open).
        scaled_attention_case("decoding", (2, 4, 1, 1300, 64), kv_heads=2, fixed=("query", "key", "value")),
        scaled_attention_case(
            "many heads", (6, 12, 40, 50, 32), buckets=8, mask="float", mask_shape=(1, 12, 40, 50), return_lse=True
        ),
    ],
    ids=str,
)
def test_work_for_several_threads(case, ordinary_memory):
    check_case(case, torch.float32)


# The log-sum-exp


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse_is_that_of_the_scores(dtype):
    """Natural, before dropout, in at least float32, and beside it the output is the same."""
    case = scaled_attention_case("lse", (2, 2, 17, 31, 16), mask="bool", dropout_p=0.5, dropout_seed=0, return_lse=True)
    inputs = case.inputs(dtype)
    output, lse = case.function(**inputs)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    scores = inputs["query"].double() @ inputs["key"].double().mT / 4
    exact = scores.masked_fill(~inputs["attn_mask"], -torch.inf).logsumexp(dim=3)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(output, case.function(**(inputs | {"return_lse": False})))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_lse_alone(dtype):
    case = scaled_attention_case(
        "lse", (2, 4, 17, 31, 16), kv_heads=2, mask="-inf", key_lengths=[31, 0], return_lse=True
    )
    lse_alone = dataclasses.replace(
        case,
        function=lambda **inputs: case.function(**inputs)[1],
        reference=lambda **inputs: case.reference(**inputs)[1],
        gradients={"query": 2, "key": 2, "attn_mask": 0},
    )
    check_case(lse_alone, dtype)


# NaN


_BAD = (float("nan"), float("inf"), -float("inf"))


def _spoil(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """NaN and infinities in x [B, H, N, D] where places [B or 1, N] says."""
    bad = torch.tensor(_BAD, dtype=x.dtype)[torch.arange(x.numel()) % 3].view(x.shape)
    return torch.where(places[:, None, :, None], bad, x)


def _columns(*ranges: tuple[int, int], length: int = 90) -> torch.Tensor:
    places = torch.arange(length)
    return torch.stack([(places >= first) & (places < last) for first, last in ranges])


# (options, the queries and the keys that take no part)
_UNSEEN = {
    "key_lengths": ({"key_lengths": [90, 33]}, None, _columns((90, 90), (33, 90))),
    "key_start": ({"key_start": [70, 0]}, None, _columns((0, 70), (0, 0))),
    "query_lengths": ({"query_lengths": [0, 21]}, _columns((0, 70), (21, 70), length=70), _columns((0, 90), (0, 0))),
    "causal": ({"is_causal": True}, None, _columns((70, 90))),
    "window": ({"window_size": (5, 3)}, None, _columns((73, 90))),
    "prefix": ({"prefix_len": [0, 80]}, None, _columns((70, 90), (80, 90))),
    "bottom right": (
        {"window_size": (4, -1), "causal_alignment": "bottom_right", "key_lengths": [90, 80]},
        None,
        _columns((0, 16), (0, 6)) | _columns((90, 90), (80, 90)),
    ),
}


@EACH_KERNEL_DTYPE
@pytest.mark.parametrize("name", _UNSEEN)
def test_what_nobody_attends_to_may_be_anything(name, dtype):
    """Bit for bit: NaN and infinities there reach no result and no gradient."""
    options, queries, keys = _UNSEEN[name]
    case = scaled_attention_case(name, (2, 4, 70, 90, 16), kv_heads=2, rotary=8, buckets=8, return_lse=True, **options)
    inputs = case.inputs(dtype)
    spoiled = inputs | {key: _spoil(inputs[key], keys) for key in ("key", "value")}
    if queries is not None:
        spoiled["query"] = _spoil(inputs["query"], queries)
    actual, expected = (_run(case, each, _ones(case, each)) for each in (spoiled, inputs))
    _assert_equal(actual, expected)
    assert all(result.isfinite().all() for result in actual[2:])


@EACH_KERNEL_DTYPE
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_columns_that_a_mask_hides_may_be_anything(kind, dtype):
    case = scaled_attention_case(kind, (2, 2, 70, 90, 16), mask=kind, mask_shape=(2, 1, 70, 90), return_lse=True)
    inputs, hidden = case.inputs(dtype), _columns((3, 50), (0, 90))
    hide = False if kind == "bool" else -torch.inf
    inputs["attn_mask"] = inputs["attn_mask"].masked_fill(hidden[:, None, None], hide)
    spoiled = inputs | {key: _spoil(inputs[key], hidden) for key in ("key", "value")}
    actual, expected = (_run(case, each, _ones(case, each)) for each in (spoiled, inputs))
    _assert_equal(actual, expected)


@EACH_KERNEL_DTYPE
def test_rows_outside_all_sequences_may_be_anything(dtype):
    case = scaled_attention_case("packed", (1, 2, 66, 120, 16), **PACKED, rotary=8, buckets=8, return_lse=True)
    inputs = case.inputs(dtype)
    keys = _columns((101, 120), length=120) | _columns((9, 12), length=120)  # an empty sequence of queries sees 9 … 11
    spoiled = {key: _spoil(inputs[key], keys) for key in ("key", "value")}
    spoiled["query"] = _spoil(inputs["query"], _columns((60, 66), length=66) | _columns((5, 40), length=66))
    actual, expected = (_run(case, inputs | each, _ones(case, inputs)) for each in (spoiled, {}))
    _assert_equal(actual, expected)
    assert not actual[0][:, :, 60:].any()


@EACH_KERNEL_DTYPE
@pytest.mark.parametrize("options", [{"is_causal": True}, {"window_size": (9, 3)}, {"mask": "bool"}, {"mask": "-inf"}])
def test_nan_in_a_value_stays_in_the_rows_that_attend_to_it(options, dtype):
    case = scaled_attention_case("a value is NaN", (2, 2, 70, 70, 16), **options)
    inputs = case.inputs(dtype)
    clean = case.function(**inputs)
    value = inputs["value"].clone()
    value[1, 0, 37] = float("nan")
    output = case.function(**(inputs | {"value": value}))
    one_hot = torch.zeros_like(value)
    one_hot[1, 0, 37] = 1
    attends = case.function(**(inputs | {"value": one_hot}))[..., 0] > 0
    assert 0 < attends.sum() < 70
    assert output[attends].isnan().all()
    assert torch.equal(output[~attends], clean[~attends])


@pytest.mark.parametrize("bad", _BAD)
def test_a_value_that_is_not_finite_stays_in_its_channel(bad, needs_kernels):
    """As in PyTorch's own function, and an infinity stays one."""
    query, key, value = torch.randn(3, 1, 2, 40, 8)
    value[0, 1, 17, 5] = bad
    actual, expected = (f(query=query, key=key, value=value) for f in (fastmix.scaled_attention, _sdpa))
    torch.testing.assert_close(actual, expected, equal_nan=True)
