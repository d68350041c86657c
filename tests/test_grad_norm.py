"""A linear layer's per-sample norms, weighted gradient and Gram matrix: values, both forms, strides, threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastmix
from fastmix.ops import grad_norm
from fastmix.reference import grad_norm as reference
from fastmix.testing.cases import check_case
from fastmix.testing.grad_norm import CANCELLATION, CASES, check_norms, linear_case
from fastmix.testing.parity import check_parity

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KERNEL_DTYPES = DTYPES[:3]
FORMS = ["gram", "direct"]
NORM_CASES = [case for case in CASES if case.function is fastmix.linear_grad_norm_sq]
WITH_NORMS = [fastmix.linear_grad_norm_sq, fastmix.linear_weight_grad_with_norm, fastmix.linear_grad_gram]
FUNCTIONS = [*WITH_NORMS, fastmix.linear_weight_grad]


@pytest.fixture
def use(monkeypatch):
    """use("gram"), use("direct"): the form for all sizes."""
    return lambda form: monkeypatch.setattr(grad_norm, "choose", lambda *sizes, is_cuda=False: form)


def _pair(b=3, t=9, i=12, o=8, dtype=torch.float32) -> list[torch.Tensor]:
    return list(linear_case("linear_grad_norm_sq", "", (b, t, i, o)).inputs(dtype).values())


def _outputs(function, *arguments, **options) -> tuple[torch.Tensor, ...]:
    outputs = function(*arguments, **options)
    return (outputs,) if isinstance(outputs, torch.Tensor) else outputs


def _norms(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """[B], of what any of WITH_NORMS gives."""
    return outputs[-1].diagonal() if outputs[-1].ndim == 2 else outputs[-1]


def _exact(inputs: dict) -> dict:
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _sample_grads(a: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients [B, O, I] and [B, O] of F.linear by a backward for each sample."""
    weight, bias = a.new_zeros(g.shape[-1], a.shape[-1]).requires_grad_(), a.new_zeros(g.shape[-1]).requires_grad_()
    grads = [
        torch.autograd.grad(F.linear(sample, weight, bias), (weight, bias), grad)
        for sample, grad in zip(a, g, strict=True)
    ]
    weights, biases = zip(*grads, strict=True)
    return torch.stack(weights), torch.stack(biases)


# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, dtype, recorded, assert_kernel):
    with recorded() as ops:
        check_case(case, dtype)
    assert_kernel(ops, case.function.__name__, dtype)
    if case.gradients:
        assert_kernel(ops, "linear_grad_norm_sq_bwd", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_on_a_gpu(case, dtype, recorded, assert_kernel):
    pytest.importorskip("triton")
    with recorded() as ops:
        check_case(case, dtype, "cuda")
    assert_kernel(ops, case.function.__name__, dtype, "cuda")
    if case.gradients:
        assert_kernel(ops, "linear_grad_norm_sq_bwd", dtype, "cuda")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_each_form_serves_every_size(case, dtype, form, use):
    use(form)
    check_case(case, dtype)
    inputs = case.inputs(dtype)
    check_norms(case.name, case.function(**inputs), case.reference(**_exact(inputs)))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.function in WITH_NORMS], ids=str)
def test_norms_of_every_sample(case, dtype):
    """The halves are rounded before and summed in float32, so that their norms are as good."""
    inputs = case.inputs(dtype)
    actual, oracle = _outputs(case.function, **inputs), _outputs(case.reference, **_exact(inputs))
    check_norms(case.name, _norms(actual), _norms(oracle))


@pytest.mark.parametrize("sizes", [(3, 1, 4, 5), (2, 6, 5, 3), (0, 4, 3, 2)], ids=str)
def test_reference_is_the_loop_over_samples(sizes):
    a, g = _pair(*sizes, dtype=torch.float64)
    weights, biases = _sample_grads(a, g) if sizes[0] else (torch.zeros(0, 2, 3), torch.zeros(0, 2))
    factors = torch.arange(sizes[0]).double()
    rows = torch.cat([weights.flatten(1), biases], dim=1).to(a)
    of_weight = weights.square().sum((1, 2)).to(a)
    dw, norm_sq = reference.linear_weight_grad_with_norm(a, g, sample_weight=factors)
    for actual, expected in [
        (reference.linear_grad_norm_sq(a, g), rows.square().sum(1)),
        (reference.linear_grad_norm_sq(a, g, bias=False), of_weight),
        (norm_sq, of_weight),
        (dw, torch.tensordot(factors, weights.to(a), 1)),
        (reference.linear_weight_grad(a, g, sample_weight=factors), torch.tensordot(factors, weights.to(a), 1)),
        (reference.linear_grad_gram(a, g), rows @ rows.T),
        (reference.linear_grad_gram(a, g, bias=False), weights.flatten(1).to(a) @ weights.flatten(1).T.to(a)),
    ]:
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("features", [(30, 12), (40, 40), (256, 1024)], ids=str)
def test_choose_takes_the_gram_form_of_short_sequences(features):
    forms = [grad_norm.choose(t, *features) for t in range(1, 1000)]
    assert set(forms) == {"gram", "direct"}
    assert forms == sorted(forms, reverse=True)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_any_number_of_positions_dimensions(function):
    a, g = _pair(t=12)
    flat = _outputs(function, a, g)
    for shape in ((3, 4, 3), (3, 2, 3, 2)):
        folded = _outputs(function, a.view(*shape, 12), g.view(*shape, 8))
        assert all(torch.equal(x, y) for x, y in zip(flat, folded, strict=True))
    single = _outputs(function, a[:, 0], g[:, 0])
    assert all(torch.equal(x, y) for x, y in zip(single, _outputs(function, a[:, :1], g[:, :1]), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_result_of_halves_is_float32(function, dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {output.dtype for output in _outputs(function, *_pair(dtype=dtype))} == {expected}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [20.0, 1e3])
def test_a_norm_beyond_256_is_finite_in_float16(size, form, use):
    """Its square is beyond what float16 holds."""
    use(form)
    a, g = (size * x for x in _pair(dtype=torch.float16))
    for function in WITH_NORMS:
        outputs = _outputs(function, a, g)
        assert all(output.isfinite().all() for output in outputs)
        assert (_norms(outputs) > 256**2).all()


# Cancellation


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(3, 6, 40, 30), (2, 64, 16, 100), (2, 130, 100, 9), (1, 300, 70, 70)], ids=str)
@pytest.mark.parametrize("kind", CANCELLATION)
def test_cancellation_loses_no_norm(kind, sizes, dtype, form, use):
    """Each form must, wherever `choose` draws the line."""
    use(form)
    a, g = linear_case("linear_grad_norm_sq", "", sizes, transform=CANCELLATION[kind]).inputs(dtype).values()
    for bias in (True, False):
        oracle = reference.linear_grad_norm_sq(a.double(), g.double(), bias=bias)
        check_norms(kind, fastmix.linear_grad_norm_sq(a, g, bias=bias), oracle)
    oracle = reference.linear_weight_grad_with_norm(a.double(), g.double())
    check_norms(kind, fastmix.linear_weight_grad_with_norm(a, g)[1], oracle[1])
    check_norms(
        kind, fastmix.linear_grad_gram(a, g).diagonal(), reference.linear_grad_gram(a.double(), g.double()).diagonal()
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_norm_of_zero_is_zero(form, use):
    """Σ_t g_t = 0 exactly while all a_t are one vector: never less than 0, whose root would be NaN."""
    use(form)
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-9, 9, (2, 1, 33), generator=generator).expand(2, 16, 33).float()
    g = torch.randint(-9, 9, (2, 8, 20), generator=generator).repeat_interleave(2, 1).float()
    g[:, 1::2] *= -1
    assert torch.equal(fastmix.linear_grad_norm_sq(a, g), torch.zeros(2))
    assert torch.equal(fastmix.linear_weight_grad_with_norm(a, g)[1], torch.zeros(2))
    assert (fastmix.linear_grad_norm_sq(a / 7, g / 3) >= 0).all()


# Lengths and memory


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_behind_a_length_is_not_read(dtype, form, use):
    use(form)
    a, g = _pair(b=5, dtype=dtype)
    lengths = torch.tensor([9, 4, 0, 1, 7])
    clean_a, clean_g = a.clone(), g.clone()
    for b, length in enumerate(lengths):
        a[b, length:], g[b, length:] = float("nan"), float("inf")
        clean_a[b, length:], clean_g[b, length:] = 0, 0
    leaves = a.requires_grad_(), g.requires_grad_()
    norm_sq = fastmix.linear_grad_norm_sq(*leaves, lengths=lengths)
    grads = torch.autograd.grad(norm_sq.sum(), leaves)
    assert torch.equal(norm_sq, fastmix.linear_grad_norm_sq(*leaves, lengths=lengths.int()))
    clean = clean_a.requires_grad_(), clean_g.requires_grad_()
    expected = fastmix.linear_grad_norm_sq(*clean)
    torch.testing.assert_close(norm_sq, expected)
    expected_grads = torch.autograd.grad(expected.sum(), clean)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        for b, length in enumerate(lengths):
            torch.testing.assert_close(grad[b, :length], expected_grad[b, :length])
            assert (grad[b, length:] == 0).all()
    assert norm_sq[2] == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.cat([x, x], dim=2)[..., 4:-4],
        lambda x: torch.cat([x, x], dim=2)[..., ::2],
        lambda x: torch.cat([x, x], dim=1)[:, ::2],
        lambda x: x[:1].expand(x.shape),
        lambda x: x[:, :1].expand(x.shape),
        lambda x: x[..., :1].expand(x.shape),
        lambda x: x.mT.contiguous().mT,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    ],
    ids=["part", "every other feature", "every other position", "expanded batch", "expanded positions",
         "expanded features", "transposed", "positions first"],
)  # fmt: skip
def test_strides(view, dtype, form, use):
    """Of the input, of grad_output and of the norms' gradient."""
    use(form)
    a, g = (view(x) for x in _pair(i=12, o=10, dtype=dtype))
    for function in FUNCTIONS:
        results = [
            _outputs(function, *pair) for pair in ((a, g), (a.contiguous(), g.contiguous()), (a.contiguous(), g))
        ]
        for other in results[1:]:
            torch.testing.assert_close(results[0], other)
    grads = []
    for pair in ((a, g), (a.contiguous(), g.contiguous())):
        leaves = [x.detach().requires_grad_() for x in pair]
        grads.append(torch.autograd.grad(fastmix.linear_grad_norm_sq(*leaves).sum(), leaves))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_in_its_sample(form, use):
    use(form)
    a, g = _pair()
    clean = [_outputs(function, a, g) for function in WITH_NORMS]
    a[1, 2, 3] = float("nan")
    for function, before in zip(WITH_NORMS, clean, strict=True):
        norms = _norms(_outputs(function, a, g))
        assert norms[1].isnan()
        torch.testing.assert_close(norms[::2], _norms(before)[::2])


def test_zero_sizes():
    for sizes in ((0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2), (2, 4, 3, 0), (0, 0, 0, 0)):
        b, _, i, o = sizes
        a, g = _pair(*sizes)
        expected = g.sum(1).square().sum(1)
        torch.testing.assert_close(fastmix.linear_grad_norm_sq(a, g), expected)
        assert torch.equal(fastmix.linear_grad_norm_sq(a, g, bias=False), torch.zeros(b))
        dw, norm_sq = fastmix.linear_weight_grad_with_norm(a, g)
        assert torch.equal(dw, torch.zeros(o, i))
        assert torch.equal(norm_sq, torch.zeros(b))
        assert torch.equal(fastmix.linear_weight_grad(a, g), torch.zeros(o, i))
        torch.testing.assert_close(fastmix.linear_grad_gram(a, g).diagonal(), expected)
        leaves = a.requires_grad_(), g.requires_grad_()
        grads = torch.autograd.grad(fastmix.linear_grad_norm_sq(*leaves).sum(), leaves)
        assert [grad.shape for grad in grads] == [a.shape, g.shape]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(5, 60, 70, 90), (1, 300, 100, 130), (37, 1, 200, 300), (2, 400, 64, 33)], ids=str)
def test_thread_count_and_repetition_change_no_bit(sizes, dtype, form, use, ordinary_memory, needs_kernels):
    use(form)
    a, g = _pair(*sizes, dtype=dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            leaves = a.clone().requires_grad_(), g.clone().requires_grad_()
            norm_sq = fastmix.linear_grad_norm_sq(*leaves)
            others = [output for function in FUNCTIONS[1:] for output in _outputs(function, a, g)]
            results.append([norm_sq, *torch.autograd.grad(norm_sq.sum(), leaves), *others])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("sizes", [(3, 200, 260, 300), (2, 700, 130, 128), (150, 1, 130, 260)], ids=str)
def test_work_for_several_threads(sizes, function, ordinary_memory):
    case = linear_case(function.__name__, str(sizes), sizes)
    check_case(case, torch.float32)
    if function in WITH_NORMS:
        inputs = case.inputs(torch.float32)
        oracle = _outputs(case.reference, **_exact(inputs))
        check_norms(case.name, _norms(_outputs(function, **inputs)), _norms(oracle))


def test_the_gram_matrix_is_symmetric_with_the_norms_on_its_diagonal():
    a, g = _pair(b=19)
    gram = fastmix.linear_grad_gram(a, g)
    assert torch.equal(gram, gram.T)
    check_norms("diagonal", gram.diagonal(), reference.linear_grad_norm_sq(a.double(), g.double()))


def test_sample_weights_scale_the_gradient_and_not_the_norms():
    a, g = _pair()
    dw, norm_sq = fastmix.linear_weight_grad_with_norm(a, g, sample_weight=torch.tensor([0.0, 1.0, 0.0]))
    plain = fastmix.linear_weight_grad_with_norm(a, g)
    assert torch.equal(norm_sq, plain[1])
    oracle = g[1].double().T @ a[1].double()
    check_parity("the one sample's gradient", dw, g[1].T @ a[1], oracle)
    for weights in (torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]).double()):
        assert torch.equal(fastmix.linear_weight_grad_with_norm(a, g, sample_weight=weights)[0], dw)
        alone = fastmix.linear_weight_grad(a, g, sample_weight=weights)
        check_parity("without norms", alone, g[1].T @ a[1], oracle)
