"""The token convolutions in Triton's interpreter, which serves fp32 and fp16 (its bfloat16 arithmetic is wrong)."""

import pytest
import torch

pytest.importorskip("triton")

from fastmix.ops import token_conv as ops
from fastmix.reference import token_conv as reference
from fastmix.testing.cases import check_case
from fastmix.testing.token_conv import CASES, token_conv_case
from tritonkernels import _token_conv_dynamic, _token_conv_tile, token_conv

# One or two of each kind of case: a tap of a program takes the interpreter milliseconds.
NAMES = ("2x1x6", "2x2x15", "2x7x10", "a chunk", "expanded", "empty batch", "large logits", "transposed kernel")
SMALL = [case for case in CASES if any(name in case.name for name in NAMES)]
KINDS = ["depthwise", "lightweight", "dynamic"]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, kind, causal):
        ctx.save_for_backward(x, kernel)
        ctx.options = kind, causal
        return ops._token_conv_cuda(x, kernel, kind, causal)

    @staticmethod
    def backward(ctx, grad_output):
        return *ops._token_conv_bwd_cuda(grad_output, *ctx.saved_tensors, *ctx.options), None, None


def _function(x, kernel, kind, causal):
    return _Convolution.apply(x, kernel, kind, causal)


@pytest.fixture(autouse=True)
def _nan_filled_memory(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))


@pytest.fixture
def small_blocks(monkeypatch):
    for module in (token_conv, _token_conv_tile, _token_conv_dynamic):
        original = module.power_of_two
        monkeypatch.setattr(module, "power_of_two", lambda *args, original=original: min(4, original(*args)))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_case(case):
    check_case(case, torch.float32, function=_function)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_more_than_one_tile(kind, causal, small_blocks):
    """Of tokens, channels and taps."""
    case = token_conv_case("tiles", (1, 6, 6), 5, kind=kind, causal=causal)
    check_case(case, torch.float16, function=_function)


@pytest.mark.parametrize("kind", ["depthwise", "lightweight"])
def test_parts_of_more_than_one_tile(kind, small_blocks, monkeypatch):
    monkeypatch.setattr(token_conv, "_PROGRAMS", 2)  # for five tiles, so that the last part is not full
    check_case(token_conv_case("parts", (5, 4, 4), 2, kind=kind, heads=2), torch.float32, function=_function)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_stays_in_its_receptive_field(kind, value):
    inputs = token_conv_case("nan", (2, 9, 4), 3, kind=kind, heads=2).inputs(torch.float32)
    inputs["x"][1, 4, 1] = value
    y = _function(**inputs)
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[1, 3:6, 1] = True
    assert torch.equal(~y.isfinite(), reached)
    dx, dkernel = ops._token_conv_bwd_cuda(torch.ones_like(y), inputs["x"], inputs["kernel"], kind, False)
    assert dx.isfinite().all()
    assert dkernel[-1 if kind == "lightweight" else 0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic(kind, small_blocks):
    x, *arguments = token_conv_case("twice", (2, 6, 6), 3, kind=kind, heads=2).inputs(torch.float16).values()
    first, second = (ops._token_conv_bwd_cuda(x, x, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["lightweight", "dynamic"])
def test_masked_and_nan_logits_as_in_the_reference(kind):
    inputs = token_conv_case("masked", (1, 6, 4), 3, kind=kind, heads=2).inputs(torch.float32)
    inputs["kernel"].view(-1, 3)[0, 1] = -float("inf")
    torch.testing.assert_close(_function(**inputs), reference.token_conv(**inputs))
    inputs["kernel"].view(-1, 3)[1] = float("nan")
    assert torch.equal(_function(**inputs).isnan(), reference.token_conv(**inputs).isnan())
