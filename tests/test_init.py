"""Initialisers against closed forms: moments and distributions of a million draws, fans counted by autograd."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

import fastmix.nn
from fastmix import init

MANY = 1_000_000
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
LARGEST_Z = 5.0  # exceeded once in 1.7 million
LARGEST_KS = 2.7  # √n·D of Kolmogorov and Smirnov, exceeded once in a million
SCHEMES = ("lecun", "xavier", "he")
DISTRIBUTIONS = ("normal", "uniform", "truncated_normal")


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def _check_moments(t, mean, std):
    """The sample's mean and variance lie within LARGEST_Z of their own standard errors."""
    x = t.detach().double().flatten() - mean
    variance_error = (x**4).mean().sub(std**4).sqrt()
    assert abs(x.mean()) < LARGEST_Z * std / math.sqrt(len(x))
    assert abs(x.square().mean() - std**2) < LARGEST_Z * variance_error / math.sqrt(len(x))


def _check_distribution(t, cdf):
    probability = cdf(t.detach().flatten()[:200_000].double().sort().values)
    steps = torch.arange(len(probability) + 1, dtype=torch.float64) / len(probability)
    distance = torch.maximum((probability - steps[:-1]).abs().max(), (probability - steps[1:]).abs().max())
    assert distance * math.sqrt(len(probability)) < LARGEST_KS


def _truncated_cdf(mean, sigma, cut):
    inside = math.erf(cut / math.sqrt(2))
    return lambda x: ((torch.special.ndtr((x - mean) / sigma) - 0.5) / inside + 0.5).clamp(0, 1)


def _std_of(initialise, t):
    """The exact standard deviation: the same draws as of one that has 1."""
    drawn = initialise(t, generator=_seeded())
    assert drawn is t
    unit = torch.empty_like(t)
    name = initialise.func.__name__ if isinstance(initialise, functools.partial) else initialise.__name__
    if "uniform" in name:
        unit.uniform_(-math.sqrt(3), math.sqrt(3), generator=_seeded())
    elif "truncated" in name:
        init.truncated_normal_(unit, generator=_seeded())
    else:
        unit.normal_(generator=_seeded())
    ratio = (t.detach() / unit).flatten()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    return float(ratio[0])


# Truncated normal


@pytest.mark.parametrize("cut", [0.01, 0.5, 1.0, 2.0, 3.5, math.inf])
def test_truncated_normal(cut):
    t = init.truncated_normal_(torch.empty(MANY), 0.7, 0.3, cut, generator=_seeded())
    _check_moments(t, 0.7, 0.3)
    k = 1.0
    if cut < math.inf:
        z = torch.linspace(-cut, cut, 100_001, dtype=torch.float64)
        weights = torch.exp(-z.square() / 2)
        k = float(torch.trapezoid(weights * z.square(), z) / torch.trapezoid(weights, z)) ** 0.5
        bounds = (0.7 - 0.3 * cut / k, 0.7 + 0.3 * cut / k)
        torch.testing.assert_close(t, nn.init.trunc_normal_(torch.empty(MANY), 0.7, 0.3 / k, *bounds, _seeded()))
    if cut >= 0.5:  # one that is narrower than that has a CDF that cancels
        _check_distribution(t, _truncated_cdf(0.7, 0.3 / k, cut))


def test_truncated_normal_of_the_usual_cut():
    drawn = init.truncated_normal_(torch.empty(MANY, dtype=torch.float64), generator=_seeded())
    usual = nn.init.trunc_normal_(
        torch.empty(MANY, dtype=torch.float64), std=1.1368472, a=-2.2736944, b=2.2736944, generator=_seeded()
    )
    torch.testing.assert_close(drawn, usual, rtol=1e-7, atol=0)  # the constant's own digits
    _check_moments(drawn, 0.0, 1.0)


@pytest.mark.parametrize("cut", [1e-300, 1e-6, 1e-3])
def test_a_tiny_cut_is_uniform(cut):
    t = init.truncated_normal_(torch.empty(MANY, dtype=torch.float64), 0.0, 1.0, cut, generator=_seeded())
    _check_distribution(t, lambda x: (x / math.sqrt(12) + 0.5).clamp(0, 1))


def test_no_deviation_is_the_mean():
    assert (init.truncated_normal_(torch.empty(5), 3.0, 0.0) == 3).all()


# Fans


def _layers():
    for groups in (1, 2):
        yield nn.Conv1d(6, 4, 3, groups=groups, padding=2)
        yield nn.Conv2d(6, 8, (3, 2), groups=groups, padding=2)
        yield nn.ConvTranspose1d(6, 4, 3, groups=groups)
        yield nn.ConvTranspose2d(4, 6, (2, 3), groups=groups)
    yield nn.Conv2d(6, 6, 3, groups=6, padding=2)
    yield nn.Conv3d(2, 4, 2, padding=1)
    yield nn.ConvTranspose3d(2, 4, 2)
    yield nn.Linear(6, 4)


def _fans(layer):
    """Counted: with weights of 1, an output is the number of its inputs, an input's gradient that of its outputs."""
    layer = layer.double()
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    spatial = layer.weight.ndim - 2
    channels = layer.weight.shape[0] if getattr(layer, "transposed", False) else layer.weight.shape[1]
    channels = getattr(layer, "in_channels", channels)
    x = torch.ones(1, channels, *[9] * spatial, dtype=torch.float64, requires_grad=True)
    output = layer(x)
    output.sum().backward()
    return float(output.detach().max()), float(x.grad.max())


@pytest.mark.parametrize("layer", list(_layers()), ids=str)
def test_variance_is_the_schemes(layer):
    fan_in, fan_out = _fans(layer)
    form = {"groups": getattr(layer, "groups", 1), "transposed": getattr(layer, "transposed", False)}
    for distribution in DISTRIBUTIONS:
        lecun, xavier, he = (
            functools.partial(getattr(init, f"{scheme}_{distribution}_"), **form) for scheme in SCHEMES
        )
        expected = {
            lecun: 1 / fan_in,
            functools.partial(lecun, gain=3.0): 9 / fan_in,
            xavier: 2 / (fan_in + fan_out),
            functools.partial(xavier, gain=0.5): 0.5 / (fan_in + fan_out),
            he: 2 / fan_in,
            functools.partial(he, a=0.5): 2 / 1.25 / fan_in,
            functools.partial(he, mode="fan_out"): 2 / fan_out,
        }
        for initialise, variance in expected.items():
            assert _std_of(initialise, layer.weight) == pytest.approx(math.sqrt(variance), rel=1e-12)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_million_draws(distribution, dtype):
    weight = nn.Parameter(torch.empty(100, 400, 5, 5, dtype=dtype))
    result = getattr(init, f"lecun_{distribution}_")(weight, gain=2.0, generator=_seeded())
    assert result is weight
    assert weight.grad_fn is None
    assert weight.dtype == dtype
    _check_moments(weight, 0.0, 0.02)
    if dtype not in HALVES:
        sigma = 0.02 * {"truncated_normal": 1.1368472343385565}.get(distribution, 1.0)
        cdf = _truncated_cdf(0.0, sigma, 2.0 if distribution == "truncated_normal" else 40.0)
        if distribution == "uniform":
            cdf = lambda x: (x / (0.02 * math.sqrt(12)) + 0.5).clamp(0, 1)  # noqa: E731
        _check_distribution(weight, cdf)


ALL = [getattr(init, f"{scheme}_{distribution}_") for scheme in SCHEMES for distribution in DISTRIBUTIONS]
ALL += [init.truncated_normal_, init.orthogonal_, functools.partial(init.roformer_v2_, hidden_size=8, num_layers=2)]


@pytest.mark.parametrize("initialise", ALL)
def test_any_tensor(initialise):
    meta = torch.empty(4, 6, device="meta", dtype=torch.bfloat16)
    assert initialise(meta, generator=_seeded()) is meta
    for shape in ((0, 3), (3, 0), (0, 0, 2)):
        initialise(torch.empty(shape))
    base = torch.full((6, 10), 7.0)
    view = base[:, ::2].t()
    assert initialise(view, generator=_seeded()) is view
    assert (view != 7).all()
    assert (base[:, 1::2] == 7).all()
    for dtype in HALVES:
        half, single = torch.empty(6, 8, dtype=dtype), torch.empty(6, 8)
        torch.testing.assert_close(
            initialise(half, generator=_seeded()), initialise(single, generator=_seeded()).to(dtype), rtol=0, atol=0
        )
    with pytest.raises(TypeError, match="t must be float32, bfloat16, float16 or float64, got int64"):
        initialise(torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="t must be a Tensor, got list"):
        initialise([1.0])


# Orthogonal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "groups", "transposed"),
    [
        ((7, 12), 1, False),
        ((12, 7), 1, False),
        ((6, 3, 2, 2), 1, False),
        ((6, 2, 3), 3, False),
        ((6, 1, 3), 6, False),
        ((8, 3, 2), 2, True),
        ((2, 9, 2), 1, True),
    ],
)
def test_orthogonal(shape, groups, transposed, dtype):
    t = init.orthogonal_(torch.empty(shape, dtype=dtype), 1.5, groups=groups, transposed=transposed)
    for weight in t.chunk(groups):
        matrix = (weight.transpose(0, 1) if transposed else weight).flatten(1)
        matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
        torch.testing.assert_close(matrix @ matrix.t(), 1.5**2 * torch.eye(len(matrix), dtype=dtype))


def test_orthogonal_is_uniform():
    """The first row of a Haar matrix is a uniform direction: its entries have mean 0 and variance 1/n."""
    generator = _seeded()
    entries = torch.stack([init.orthogonal_(torch.empty(3, 3), generator=generator)[0] for _ in range(2000)])
    for column in entries.unbind(1):
        _check_moments(column, 0.0, 3**-0.5)


# Attention


@pytest.mark.parametrize("convention", ["split", "query"])
def test_t5_attention(convention):
    heads, head_dim, dim = 4000, 16, 25
    q_proj, k_proj = nn.Linear(dim, heads * head_dim), nn.Linear(dim, heads * head_dim, bias=False)
    bias = q_proj.bias.clone()
    result = init.t5_attention_(q_proj, k_proj, convention, head_dim=head_dim, generator=_seeded())
    assert result == (q_proj, k_proj)
    assert torch.equal(q_proj.bias, bias)
    q_std, k_std = (dim**-0.5 * head_dim**-0.25,) * 2 if convention == "split" else ((dim * 16) ** -0.5, dim**-0.5)
    _check_moments(q_proj.weight, 0.0, q_std)
    _check_moments(k_proj.weight, 0.0, k_std)
    x = torch.ones(dim)  # second moment 1: q and k are normal, and heads independent
    scores = ((q_proj.weight @ x) * (k_proj.weight @ x)).unflatten(0, (heads, head_dim)).sum(1)
    squares = scores.detach().square()
    assert abs(squares.mean() - 1) < LARGEST_Z * squares.std() / math.sqrt(heads)


def test_t5_attention_of_weights_that_differ():
    q, k = torch.empty(8 * 1000, 16), torch.empty(2 * 1000, 64, dtype=torch.bfloat16)
    assert init.t5_attention_(q, k, "query", head_dim=1000, generator=_seeded()) == (q, k)
    _check_moments(q, 0.0, (16 * 1000) ** -0.5)
    _check_moments(k, 0.0, 64**-0.5)


def test_t5_attention_is_the_modules():
    module = fastmix.nn.T5Attention(32, 4, 8)
    torch.manual_seed(0)
    module.reset_parameters()
    q, k = module.q.weight.clone(), module.k.weight.clone()
    init.t5_attention_(module.q, module.k, "query", head_dim=8, generator=_seeded())
    torch.testing.assert_close(module.q.weight, q)
    torch.testing.assert_close(module.k.weight, k)


def test_roformer_v2():
    t = init.roformer_v2_(torch.empty(1000, 1000, dtype=torch.float64), 512, 12, generator=_seeded())
    sigma = 1.13684723 / math.sqrt(512) * 12**-0.5
    _check_distribution(t, _truncated_cdf(0.0, sigma, 2.0))
    _check_moments(t, 0.0, (512 * 12) ** -0.5)


# Wrong input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: init.truncated_normal_(torch.empty(2), std=-1), "std must be finite and at least 0, got -1"),
        (lambda: init.truncated_normal_(torch.empty(2), math.nan), "mean must be finite, got nan"),
        (lambda: init.truncated_normal_(torch.empty(2), cut=0), "cut must be positive, got 0"),
        (lambda: init.truncated_normal_(torch.empty(2), cut=math.nan), "cut must be positive, got nan"),
        (lambda: init.lecun_normal_(torch.empty(2)), r"t must have at least 2 dimensions, \[out, in, …\], got \[2\]"),
        (lambda: init.xavier_uniform_(torch.empty(2, 2), -1), "gain must be finite and at least 0, got -1"),
        (lambda: init.xavier_normal_(torch.empty(4, 2), groups=3), r"groups must divide t.shape\[0\] = 4, got 3"),
        (lambda: init.lecun_uniform_(torch.empty(4, 2), groups=0), "groups must divide .* got 0"),
        (
            lambda: init.he_normal_(torch.empty(2, 2), mode="both"),
            "mode must be one of 'fan_in', 'fan_out', got 'both'",
        ),
        (lambda: init.he_normal_(torch.empty(2, 2), mode="fan_mean"), "mode must be one of"),
        (lambda: init.he_uniform_(torch.empty(2, 2), math.inf), "a must be finite, got inf"),
        (lambda: init.orthogonal_(torch.empty(3)), "t must have at least 2 dimensions"),
        (lambda: init.roformer_v2_(torch.empty(3), 0, 1), "hidden_size must be at least 1, got 0"),
        (lambda: init.roformer_v2_(torch.empty(3), 8, -1), "num_layers must be at least 1, got -1"),
        (
            lambda: init.t5_attention_(torch.empty(4, 2), torch.empty(4, 2), "both", head_dim=2),
            "convention must be one of 'split', 'query', got 'both'",
        ),
        (
            lambda: init.t5_attention_(torch.empty(4, 2), torch.empty(5, 2), head_dim=2),
            r"k_proj must be \[heads·2, dim\], got \[5, 2\]",
        ),
        (lambda: init.t5_attention_(torch.empty(4), torch.empty(4), head_dim=2), r"q_proj must be \[heads·2, dim\]"),
        (lambda: init.t5_attention_(torch.empty(4, 2), torch.empty(4, 2), head_dim=0), "head_dim must be at least 1"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
