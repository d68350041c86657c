"""Norms of input gradients and penalties on them, against autograd's own double backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastmix import per_sample
from fastmix.testing.parity import GRADIENT_FACTOR, check_parity

B = 4


def _critic() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(20, 6), nn.SiLU(),
        nn.Linear(6, 1),
    )  # fmt: skip


def _mlp(c: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(c, 7), nn.Softplus(), nn.Linear(7, 1))


def _images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, 2, 4, 4, dtype=dtype)


def _plain_norms(fn, x: Tensor) -> Tensor:
    """Sample by sample, with what PyTorch has for a vector's norm."""
    norms = []
    for i in range(len(x)):
        (gradient,) = torch.autograd.grad(fn(x)[i].sum(), x, create_graph=True)
        norms.append(torch.linalg.vector_norm(gradient[i]))
    return torch.stack(norms)


PENALTIES = {
    "norms": (per_sample.input_gradient_norms, lambda fn, x: _plain_norms(fn, x)),
    "square": (per_sample.input_gradient_penalty, lambda fn, x: _plain_norms(fn, x).square().mean()),
    "target": (
        lambda fn, x: per_sample.input_gradient_penalty(fn, x, target=0.5),
        lambda fn, x: (_plain_norms(fn, x) - 0.5).square().mean(),
    ),
    "target 0": (
        lambda fn, x: per_sample.input_gradient_penalty(fn, x, target=0),
        lambda fn, x: _plain_norms(fn, x).square().mean(),
    ),
}


def _with_gradients(penalty, model: nn.Module, x: Tensor) -> list[Tensor]:
    """The value, and the gradients by x and all parameters."""
    x = x.clone().requires_grad_()
    value = penalty(model, x)
    weight = torch.linspace(1.0, 2.0, value.numel(), dtype=value.dtype).view_as(value)
    inputs = [x, *model.parameters()]
    grads = torch.autograd.grad((value * weight).sum(), inputs, allow_unused=True)  # the last bias has none
    return [value, *(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True))]


# Values and gradients


@pytest.mark.parametrize("name", PENALTIES)
def test_against_double_backward(name):
    ours, plain = PENALTIES[name]
    model, x = _critic().double(), _images(torch.float64)
    expected = _with_gradients(plain, model, x)
    assert sum(bool(grad.any()) for grad in expected) == len(expected) - 1
    torch.testing.assert_close(_with_gradients(ours, model, x), expected)


@pytest.mark.parametrize("name", PENALTIES)
def test_float32_keeps_the_tolerance_rule(name):
    ours, plain = PENALTIES[name]
    model, x = _critic(), _images()
    oracle = _with_gradients(plain, copy.deepcopy(model).double(), x.double())
    reference = _with_gradients(plain, model, x)
    for i, (actual, same, exact) in enumerate(zip(_with_gradients(ours, model, x), reference, oracle, strict=True)):
        check_parity(f"{name} {i}", actual, same, exact, factor=GRADIENT_FACTOR if i else 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_have_float32_norms(dtype):
    """Of gradients whose squares leave float16."""
    model = nn.Linear(8, 1).to(dtype)
    nn.init.constant_(model.weight, 1000.0)
    norms = per_sample.input_gradient_norms(model, torch.randn(B, 8, dtype=dtype))
    assert norms.dtype == torch.float32
    expected = model.weight.detach().float().norm().expand(B)
    torch.testing.assert_close(norms.detach(), expected)
    penalty = per_sample.input_gradient_penalty(model, torch.randn(B, 8, dtype=dtype), target=1.0)
    assert penalty.dtype == torch.float32
    penalty.backward()
    assert model.weight.grad.isfinite().all()
    assert model.weight.grad.all()


def test_autocast():
    model, x = _mlp(), torch.randn(B, 3)
    with torch.autocast("cpu"):
        norms = per_sample.input_gradient_norms(model, x)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, per_sample.input_gradient_norms(model, x), rtol=0.05, atol=0.0)
    norms.sum().backward()
    assert model[0].weight.grad.any()


@pytest.mark.parametrize("name", PENALTIES)
def test_gradcheck_twice(name):
    """By x and the weights."""
    first, second = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (4, 3)))
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)

    def penalty(x, first, second):
        return PENALTIES[name][0](lambda x: torch.tanh(torch.tanh(x @ first.t()) @ second.t()).sum(1), x)

    assert torch.autograd.gradcheck(penalty, (x, first, second))
    assert torch.autograd.gradgradcheck(penalty, (x, first, second))


@pytest.mark.parametrize("shape", [(B,), (B, 1), (B, 3), (B, 2, 3, 1, 2)])
@pytest.mark.parametrize("column", [False, True])
def test_shapes(shape, column):
    x = torch.randn(shape, dtype=torch.float64)

    def fn(x):
        return x.reshape(B, -1).pow(3).sum(1, keepdim=column)

    expected = (3 * x.square()).reshape(B, -1).norm(dim=1)
    norms = per_sample.input_gradient_norms(fn, x)
    assert norms.shape == (B,)
    torch.testing.assert_close(norms.detach(), expected)


def test_strides():
    x = torch.randn(6, 5, B).permute(2, 0, 1)[:, ::2]

    def fn(x):
        return x.tanh().sum((1, 2))

    expected = (1 - x.tanh().square()).contiguous().flatten(1).norm(dim=1)
    torch.testing.assert_close(per_sample.input_gradient_norms(fn, x).detach(), expected)


def test_complex_input_counts_both_parts():
    x = torch.randn(B, 3, dtype=torch.complex128)
    parts = torch.view_as_real(x)

    def of_parts(parts):
        return (parts[..., 0].pow(3) * parts[..., 1]).sum(1)

    norms = per_sample.input_gradient_norms(lambda x: of_parts(torch.view_as_real(x)), x)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, per_sample.input_gradient_norms(of_parts, parts))


# Gradients of zero


def _flat_at_zero(x: Tensor, weight: Tensor) -> Tensor:
    return (x.square() * weight).sum(1)


@pytest.mark.parametrize("target", [None, 0.0, 1.5])
def test_zero_gradients_of_any_order(target):
    """The gradient of samples 0 and 2 is 0."""
    x = torch.randn(3, 2, dtype=torch.float64)
    x[0] = x[2] = 0
    weight = torch.randn(2, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()

    def penalty(x):
        return per_sample.input_gradient_penalty(lambda x: _flat_at_zero(x, weight), x, target=target)

    value = penalty(x)
    alone = penalty(x[1:2])
    torch.testing.assert_close(value, (alone + 2 * (target or 0) ** 2) / 3)
    first = torch.autograd.grad(value, (x, weight), create_graph=True)
    torch.testing.assert_close(first[1], torch.autograd.grad(alone, weight)[0] / 3)
    assert not first[0][0].any()
    assert first[0][1].all()
    second = torch.autograd.grad(sum(grad.sum() for grad in first), (x, weight))
    assert all(grad.isfinite().all() for grad in second)
    assert second[1].all()
    if target is not None and target > 0:
        assert not second[0][0].any()


def test_all_of_a_dead_network():
    """Every unit is off."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))
    nn.init.constant_(model[0].bias, -100.0)
    penalty = per_sample.input_gradient_penalty(model, torch.randn(B, 3), target=1.0)
    assert penalty == 1
    penalty.backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


# Graphs


def test_gradients_flow_to_a_generator():
    generator, critic = nn.Linear(2, 3), _mlp()
    z = torch.randn(B, 2)
    fake = generator(z)
    per_sample.input_gradient_penalty(critic, fake, target=1.0).backward()
    found = generator.weight.grad.clone()
    generator.zero_grad()
    (_plain_norms(critic, generator(z)) - 1).square().mean().backward()
    torch.testing.assert_close(found, generator.weight.grad)
    assert found.any()


def test_ordinary_input_gets_no_gradient():
    model, x = _mlp(), torch.randn(B, 3)
    per_sample.input_gradient_penalty(model, x).backward()
    assert x.grad is None
    assert not x.requires_grad
    assert model[0].weight.grad.any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_without_gradients_there_is_no_graph(mode, requires_grad):
    model, x = _mlp(), torch.randn(B, 3, requires_grad=requires_grad)
    kept = []
    expected = per_sample.input_gradient_norms(model, x)
    with mode():
        norms = per_sample.input_gradient_norms(lambda x: kept.append(model(x)) or kept[-1], x)
        penalty = per_sample.input_gradient_penalty(model, x * 1, target=1.0)
        assert not torch.is_grad_enabled()
    assert not norms.requires_grad
    assert not penalty.requires_grad
    torch.testing.assert_close(norms, expected.detach())
    torch.testing.assert_close(penalty, (expected.detach() - 1).square().mean())
    with pytest.raises(RuntimeError, match="second time"):  # what the backward needed is freed
        kept[0].sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_samples_made_in_inference_mode():
    model = _mlp()
    with torch.inference_mode():
        x = torch.randn(B, 3)
    per_sample.input_gradient_penalty(model, x).backward()
    assert model[0].weight.grad.any()


class _Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_only_the_inputs_gradient_is_computed():
    """One forward and one backward of two layers, without the gradients of their weights."""
    model, x = _mlp(), torch.randn(B, 3)
    with _Products() as products:
        per_sample.input_gradient_norms(model, x)
    assert products.count == 4


def test_an_empty_batch():
    model, x = _critic(), _images()[:0]
    assert per_sample.input_gradient_norms(model, x).shape == (0,)
    for target in (None, 1.0):
        penalty = per_sample.input_gradient_penalty(model, x, target=target)
        assert penalty == 0
        penalty.backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_training_with_the_penalty_makes_the_gradient_of_norm_one():
    critic = _mlp()
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.03)
    real, fake = torch.randn(32, 3), torch.randn(32, 3) + 2

    def penalty() -> Tensor:
        return per_sample.input_gradient_penalty(critic, per_sample.interpolate(real, fake), target=1.0)

    before = penalty()
    for _ in range(60):
        optimizer.zero_grad()
        (critic(fake).mean() - critic(real).mean() + 10 * penalty()).backward()
        optimizer.step()
    assert penalty() < before / 10


# Compiled and transformed


def test_torch_func_grad_by_the_input():
    model, x = _mlp().double(), torch.randn(B, 3, dtype=torch.float64)
    found = torch.func.grad(lambda x: per_sample.input_gradient_penalty(model, x))(x)
    x = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(per_sample.input_gradient_penalty(model, x), x)
    torch.testing.assert_close(found, expected)


def test_other_transforms_are_refused():
    model = _mlp()
    with pytest.raises(RuntimeError, match=r"requires_grad_\(\) .*functorch"):
        torch.func.vmap(lambda x: per_sample.input_gradient_norms(model, x))(torch.randn(2, B, 3))


def test_in_a_compiled_function():
    """It runs eagerly there, so that it trains."""
    model, x = _mlp(), torch.randn(B, 3)

    def penalty(x):
        return 2 * per_sample.input_gradient_penalty(model, 2 * x, target=1.0)

    expected = penalty(x)
    expected.backward()
    grads = [parameter.grad for parameter in model[0].parameters()]
    model.zero_grad()
    with pytest.raises(RuntimeError, match="disable"):
        torch.compile(penalty, backend="aot_eager", fullgraph=True)(x)
    found = torch.compile(penalty, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected)
    found.backward()
    torch.testing.assert_close([parameter.grad for parameter in model[0].parameters()], grads)


def test_of_a_compiled_function():
    """PyTorch has no double backward of it, and says so."""
    model, x = _mlp(), torch.randn(B, 3)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        norms = per_sample.input_gradient_norms(compiled, x)
        torch.testing.assert_close(norms, per_sample.input_gradient_norms(model, x))
    with pytest.raises(RuntimeError, match=r"double backward|create_graph"):
        per_sample.input_gradient_norms(compiled, x).sum().backward()


# Wrong input


def _couples(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(layer), nn.Linear(4, 1))


@pytest.mark.parametrize("call", [per_sample.input_gradient_norms, per_sample.input_gradient_penalty])
@pytest.mark.parametrize(
    ("fn", "x", "kind", "message"),
    [
        (3, torch.ones(B, 3), TypeError, "fn must be callable, got int"),
        (_mlp(), [1.0], TypeError, "x must be a Tensor, got list"),
        (_mlp(), torch.ones(B, 3, dtype=torch.long), TypeError, "x must be a floating-point or complex.*got int64"),
        (_mlp(), torch.tensor(1.0), ValueError, r"x must be \[B, ...\].*got a scalar"),
        (nn.Linear(3, 2), torch.ones(B, 3), ValueError, r"fn's output must be \[B\] or \[B, 1\].*B = 4, got \[4, 2\]"),
        (lambda x: x.sum(), torch.ones(B, 3), ValueError, r"fn's output must be .*got \[\]"),
        (lambda x: x[:, :, None].sum(1, True), torch.ones(B, 3), ValueError, r"must be .*got \[4, 1, 1\]"),
        (lambda x: (x.sum(1),), torch.ones(B, 3), TypeError, "fn's output must be a Tensor, got tuple"),
        (lambda x: x.sum(1).detach(), torch.ones(B, 3), ValueError, "fn's output must depend on x"),
        (lambda x: nn.Linear(3, 1)(torch.ones(B, 3)), torch.ones(B, 3), ValueError, "fn's output must depend on x"),
        (lambda x: x.sum(1).long(), torch.ones(B, 3), TypeError, "fn's output must be a real.*got int64"),
        (lambda x: x.sum(1) * 1j, torch.ones(B, 3), TypeError, "fn's output must be a real.*got complex64"),
        (_couples(nn.BatchNorm1d(4)), torch.ones(B, 3), ValueError, "fn has the layer '1.0', a BatchNorm1d that is in"),
        (_couples(nn.LazyBatchNorm1d()), torch.ones(B, 3), ValueError, "'1.0', a LazyBatchNorm1d that is in training"),
        (_couples(nn.BatchNorm1d(4)).forward, torch.ones(B, 3), ValueError, "fn has the layer '1.0', a BatchNorm1d"),
        (
            _couples(nn.BatchNorm1d(4, track_running_stats=False)).eval(),
            torch.ones(B, 3),
            ValueError,
            "'1.0', a BatchNorm1d that keeps no running statistics",
        ),
    ],
)
def test_wrong_arguments(call, fn, x, kind, message):
    with pytest.raises(kind, match=message):
        call(fn, x)


def test_batch_norm_in_evaluation():
    model = _couples(nn.BatchNorm1d(4)).eval().double()
    x = torch.randn(B, 3, dtype=torch.float64)
    x.requires_grad_()
    torch.testing.assert_close(per_sample.input_gradient_norms(model, x), _plain_norms(model, x))


@pytest.mark.parametrize("target", [-1.0, float("nan"), float("inf")])
def test_wrong_targets(target):
    with pytest.raises(ValueError, match=f"target must be finite and at least 0, got {target}"):
        per_sample.input_gradient_penalty(_mlp(), torch.randn(B, 3), target=target)
    with pytest.raises(TypeError, match="target must be a float or None, got str"):
        per_sample.input_gradient_penalty(_mlp(), torch.randn(B, 3), target=str(target))
