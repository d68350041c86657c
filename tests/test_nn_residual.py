"""Residual forms, NTK parametrisation and RMSNorm against their formulas, and what PyTorch does with modules."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn as tnn

from fastmix import nn, per_sample

B, C = 5, 8
FORMS = ("post", "pre", "rezero", "skipinit", "fixup", "warmup_alpha")


def _branch():
    return tnn.Sequential(tnn.Linear(C, 2 * C), tnn.GELU(), tnn.Linear(2 * C, C))


def _residual(form, branch=None, **kwargs):
    options = {"norm": tnn.LayerNorm(C)} if form in ("post", "pre", "warmup_alpha") else {}
    options |= {"alpha_steps": 4} if form == "warmup_alpha" else {}
    return nn.Residual(_branch() if branch is None else branch, form, **options | kwargs)


def _randomise(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def _expected(residual, x, alpha):
    f, norm = residual.branch, residual.norm
    if residual.form == "fixup":
        b, scale = residual.biases, residual.scale
        y = F.linear(x + b[0], f[0].weight, f[0].bias)
        y = F.linear(F.gelu(y + b[1]) + b[2], f[2].weight, f[2].bias)
        return x + scale * y + b[3]
    return {
        "post": lambda: norm(x + f(x)),
        "pre": lambda: x + f(norm(x)),
        "rezero": lambda: x + residual.scale * f(x),
        "skipinit": lambda: x + residual.scale * f(x),
        "warmup_alpha": lambda: norm(x + alpha * f(x)),
    }[residual.form]()


# The forms


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_its_formula(form):
    residual = _randomise(_residual(form)).double()
    if form == "warmup_alpha":
        residual.num_steps.fill_(3)
    x = torch.randn(B, C, dtype=torch.float64, requires_grad=True)
    actual, expected = residual(x), _expected(residual, x, 0.75)
    torch.testing.assert_close(actual, expected)
    inputs = [x, *residual.parameters()]
    weights = torch.randn(B, C, dtype=torch.float64)
    gradients = (torch.autograd.grad((y * weights).sum(), inputs) for y in (actual, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("form", ["rezero", "skipinit", "fixup", "warmup_alpha"])
def test_at_first_it_is_the_identity(form):
    residual = _residual(form)
    assert residual.alpha == (1.0 if form == "fixup" else 0.0)
    x = torch.randn(B, C)
    assert torch.equal(residual(x), residual.norm(x) if form == "warmup_alpha" else x)


@pytest.mark.parametrize("form", ["rezero", "skipinit", "fixup"])
def test_it_learns_from_the_identity(form):
    residual = _residual(form)
    optimizer = torch.optim.SGD(residual.parameters(), 0.1)
    x, target = torch.randn(B, C), torch.randn(B, C)
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(residual(x), target).backward()
        optimizer.step()
    assert all((parameter.grad != 0).any() for parameter in residual.parameters())


def test_post_norm_forgets_its_input_as_a_power_of_two():
    """Of x, 2^(−l/2) is left after l layers whose branches are as large as their input, and independent of it."""

    class Noise(tnn.Module):
        def forward(self, x):
            return torch.randn_like(x)

    torch.manual_seed(0)
    n, layers = 100_000, 12
    x = start = F.layer_norm(torch.randn(n), (n,))
    for layer in range(1, layers + 1):
        x = nn.Residual(Noise(), "post", norm=tnn.LayerNorm(n, elementwise_affine=False))(x)
        left = float(x @ start / n)
        assert abs(left - 2 ** (-layer / 2)) < 5 / math.sqrt(n)  # of means of n products, each of deviation ≤ 1


def test_rezero_shares_alpha_in_a_layer():
    attention, mlp = _residual("rezero"), _residual("rezero")
    mlp.scale = attention.scale
    model = tnn.Sequential(attention, mlp)
    assert sum(parameter is attention.scale for parameter in model.parameters()) == 1
    model(torch.randn(B, C)).sum().backward()
    assert attention.scale.grad != 0


def test_fixup_of_a_branch_that_is_no_sequence():
    class Attention(tnn.Module):
        def __init__(self):
            super().__init__()
            self.value = tnn.Linear(C, C)
            self.out = tnn.Linear(C, C)

        def forward(self, x, mask, *, scale):
            return self.out(self.value(x) * mask * scale)

    residual = _residual("fixup", Attention())
    assert (residual.branch.out.weight == 0).all()
    assert (residual.branch.out.bias == 0).all()
    assert residual.biases.shape == (2,)
    _randomise(residual)
    x, mask = torch.randn(B, C), torch.rand(C)
    expected = x + residual.scale * residual.branch(x + residual.biases[0], mask, scale=2.0) + residual.biases[1]
    torch.testing.assert_close(residual(x, mask, scale=2.0), expected)


def test_fixups_arguments_are_the_first_layers():
    class Scaled(tnn.Linear):
        def forward(self, x, factor):
            return super().forward(x) * factor

    residual = _randomise(_residual("fixup", tnn.Sequential(Scaled(C, C), tnn.Linear(C, C))))
    b, (first, second) = residual.biases, residual.branch
    x = torch.randn(B, C)
    expected = x + residual.scale * second(first(x + b[0], 3.0) + b[1]) + b[2]
    torch.testing.assert_close(residual(x, 3.0), expected)
    torch.testing.assert_close(residual(x, factor=3.0), expected)


def test_arguments_are_the_branchs():
    residual = _residual("pre", nn.T5Attention(C, 2, 4, dropout=0.0))
    x, lengths = torch.randn(2, 6, C), torch.tensor([6, 3])
    expected = x + residual.branch(residual.norm(x), key_lengths=lengths)
    torch.testing.assert_close(residual(x, key_lengths=lengths), expected)


# The schedule


def _alphas(residual, steps):
    alphas = []
    for _ in range(steps):
        alphas.append(float(residual.alpha))
        residual(torch.randn(2, C))
    return alphas


def test_alpha_rises_with_forwards_in_training():
    residual = _residual("warmup_alpha")
    assert _alphas(residual, 6) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    residual = _residual("warmup_alpha")
    assert _alphas(residual, 2) == [0.0, 0.25]
    assert _alphas(residual.eval(), 2) == [0.5, 0.5]
    assert _alphas(residual.train(), 2) == [0.5, 0.75]


def test_alpha_rises_with_steps():
    residual = _residual("warmup_alpha", advance="step")
    assert _alphas(residual, 2) == [0.0, 0.0]
    for expected in (0.25, 0.5, 0.75, 1.0, 1.0):
        residual.step()
        assert residual.alpha == expected
    for other in (_residual("warmup_alpha"), _residual("pre")):
        with pytest.raises(ValueError, match=r"step\(\) must be called where form is 'warmup_alpha' and advance"):
            other.step()


def test_alpha_is_in_the_state_dict():
    residual = _residual("warmup_alpha")
    _alphas(residual, 3)
    assert "num_steps" in residual.state_dict()
    loaded = _residual("warmup_alpha")
    loaded.load_state_dict(residual.state_dict())
    assert loaded.alpha == copy.deepcopy(residual).alpha == 0.75
    assert residual.half().alpha == 0.75
    residual.reset_parameters()
    assert residual.alpha == 0


def test_alpha_is_exact_after_many_steps():
    residual = _residual("warmup_alpha", tnn.Identity(), norm=tnn.Identity(), alpha_steps=100_000).double()
    residual.num_steps.fill_(33_333)
    x = torch.ones(1, dtype=torch.float64)
    assert residual(x) == 1 + 33_333 / 100_000
    assert residual.to(torch.bfloat16)(x.bfloat16()) == torch.tensor(1.33334).bfloat16()


# The layers


def test_ntk_linear_is_its_formula():
    layer = _randomise(nn.NTKLinear(C, 3)).double()
    x = torch.randn(2, B, C, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.bias + x @ layer.weight.t() / math.sqrt(C))
    assert nn.NTKLinear(C, 3, bias=False).bias is None
    assert list(nn.NTKLinear(C, 3, bias=False).state_dict()) == ["weight"]
    assert repr(layer) == f"NTKLinear(in_features={C}, out_features=3, bias=True)"


def test_ntk_linear_starts_with_moments_of_one():
    torch.manual_seed(0)
    layer = nn.NTKLinear(1000, 1000)
    assert (layer.bias == 0).all()
    weight = layer.weight.detach().double().flatten()
    z = 5 / math.sqrt(len(weight))
    assert abs(weight.mean()) < z
    assert abs(weight.square().mean() - 1) < z * math.sqrt(2)
    squares = layer(torch.ones(1000)).detach().square()
    assert abs(squares.mean() - 1) < 5 * math.sqrt(2 / 1000)


def test_ntk_linear_is_a_linear_layer_with_another_step():
    layer, linear = nn.NTKLinear(16, 3), tnn.Linear(16, 3)
    with torch.no_grad():
        linear.weight.copy_(layer.weight / 4)
        linear.bias.copy_(layer.bias)
    x = torch.randn(B, 16)
    torch.testing.assert_close(layer(x), linear(x))
    for module in (layer, linear):
        module(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, linear.weight.grad / 4)


@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("shape", [C, (3, C)])
def test_rms_norm_is_its_formula(shape, eps):
    norm = _randomise(nn.RMSNorm(shape, eps)).double()
    x = torch.randn(B, 3, C, dtype=torch.float64)
    dims = (-1,) if shape == C else (-2, -1)
    epsilon = torch.finfo(torch.float64).eps if eps is None else eps
    expected = x / (x.square().mean(dims, keepdim=True) + epsilon).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    peer = tnn.RMSNorm(shape, eps).double()
    peer.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), peer(x))
    assert repr(norm) == repr(peer)
    assert nn.RMSNorm(shape, elementwise_affine=False).weight is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_of_mixed_dtypes_is_fused(dtype):
    """Where PyTorch warns that it is not."""
    norm = nn.RMSNorm(C)
    x = torch.randn(B, C, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = norm(x)
    assert torch.equal(actual, F.rms_norm(x, (C,), torch.ones(C, dtype=dtype)))
    actual.float().sum().backward()
    assert norm.weight.grad.dtype == torch.float32


# What PyTorch does with modules


MODULES = {form: lambda form=form: _residual(form) for form in FORMS}
MODULES |= {"NTKLinear": lambda: nn.NTKLinear(C, C), "RMSNorm": lambda: nn.RMSNorm(C)}


@pytest.mark.parametrize("name", MODULES)
def test_compiled_once(name):
    torch.compiler.reset()
    module = _randomise(MODULES[name]())
    plain = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for step in range(6):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            x = torch.randn(B, C)
            torch.testing.assert_close(compiled(x), plain(x))
    if name == "warmup_alpha":
        assert module.num_steps == 6


@pytest.mark.parametrize("name", MODULES)
def test_autocast_and_dtypes(name):
    module = _randomise(MODULES[name]())
    x = torch.randn(B, C)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(x)
        assert output.dtype == (torch.bfloat16 if name == "NTKLinear" else torch.float32)
        output = module(x.bfloat16())
        assert output.dtype == torch.bfloat16
        output.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert MODULES[name]().to(dtype)(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", MODULES)
def test_state_dict_deepcopy_and_gradcheck(name):
    module = _randomise(MODULES[name]()).double().eval()
    other = MODULES[name]().double().eval()
    other.load_state_dict(module.state_dict())
    x = torch.randn(2, C, dtype=torch.float64, requires_grad=True)
    assert torch.equal(other(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert torch.autograd.gradcheck(module, x)
    assert torch.autograd.gradgradcheck(module, x)


@pytest.mark.parametrize("name", MODULES)
def test_per_sample_norms(name):
    module = _randomise(MODULES[name]()).double()
    module.eval()
    x = torch.randn(B, C, dtype=torch.float64)
    with per_sample.grad_norms(module) as norms:
        losses = module(x).square().sum(1)
        norms.backward(losses)
    parameters = list(module.parameters())
    for i in range(B):
        gradients = torch.autograd.grad(module(x[i : i + 1]).square().sum(), parameters, allow_unused=True)
        total = sum(g.square().sum() for g in gradients if g is not None).sqrt()
        torch.testing.assert_close(norms.total[i], total)


def test_device_and_dtype():
    kwargs = {"device": "meta", "dtype": torch.float16}
    modules = (
        nn.NTKLinear(3, 4, **kwargs),
        nn.RMSNorm(3, **kwargs),
        nn.Residual(tnn.Linear(3, 3, **kwargs), "fixup", **kwargs),
        nn.Residual(tnn.Linear(3, 3, **kwargs), "skipinit", **kwargs),
    )
    for module in modules:
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.float16)}
    warmup = nn.Residual(tnn.Identity(), "warmup_alpha", norm=tnn.Identity(), alpha_steps=2, device="meta")
    assert warmup.num_steps.is_meta
    warmup.to_empty(device="cpu").reset_parameters()
    assert warmup.alpha == 0


def test_repr():
    assert "form='pre'" in repr(_residual("pre"))
    assert "form='warmup_alpha', alpha_steps=4, advance='step'" in repr(_residual("warmup_alpha", advance="step"))


# Wrong input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: nn.Residual(_branch(), "postn"),
            ValueError,
            "form must be one of 'post', 'pre', .* got 'postn'",
        ),
        (lambda: nn.Residual(torch.relu, "rezero"), TypeError, "branch must be a torch.nn.Module, got builtin"),
        (lambda: nn.Residual(_branch()), TypeError, "norm must be a torch.nn.Module where form is 'pre', got NoneType"),
        (
            lambda: nn.Residual(_branch(), "rezero", norm=tnn.LayerNorm(C)),
            ValueError,
            "norm must be None where form is 'rezero', got LayerNorm",
        ),
        (lambda: _residual("warmup_alpha", alpha_steps=None), ValueError, "alpha_steps must be at least 1 .* got None"),
        (lambda: _residual("warmup_alpha", alpha_steps=0), ValueError, "alpha_steps must be at least 1 .* got 0"),
        (lambda: _residual("post", alpha_steps=3), ValueError, "alpha_steps and advance must be left out"),
        (lambda: _residual("fixup", advance="step"), ValueError, "alpha_steps and advance must be left out"),
        (lambda: _residual("warmup_alpha", advance="epoch"), ValueError, "advance must be one of 'forward', 'step'"),
        (
            lambda: _residual("fixup", tnn.GELU()),
            ValueError,
            "must have a linear layer or a convolution, GELU",
        ),
        (lambda: _residual("rezero", tnn.Linear(C, 1))(torch.ones(2, C)), ValueError, r"\[2, 8\], got \[2, 1\]"),
        (
            lambda: _residual("rezero", tnn.LSTM(C, C))(torch.ones(2, C)),
            TypeError,
            r"branch\(x\) must be a Tensor, got tuple",
        ),
        (lambda: nn.NTKLinear(0, 3), ValueError, "in_features must be at least 1, got 0"),
        (lambda: nn.NTKLinear(3, -1), ValueError, "out_features must be at least 0, got -1"),
    ],
)
def test_wrong_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
