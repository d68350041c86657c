"""The penalty on the parameters' per-sample gradients, against functional transforms and finite differences."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from fastmix.per_sample import parameter_gradient_penalty


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)).to(dtype)


def conv():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 3, 2), nn.Softplus(), nn.Flatten(), nn.Linear(6, 2)).double()


def losses_of(model, x):
    return model(x).square().flatten(1).sum(1)


@pytest.mark.parametrize(("build", "shape"), [(mlp, (4, 3)), (mlp, (4, 2, 3)), (conv, (4, 1, 3))])
def test_value_and_gradients(build, shape):
    model = build()
    x = torch.randn(shape, dtype=torch.float64)
    parameters = dict(model.named_parameters())

    def loss(parameters, sample):
        return functional_call(model, parameters, sample[None]).square().sum()

    grads = vmap(grad(loss), (None, 0))(parameters, x)
    expected = sum(each.flatten(1).square().sum(1) for each in grads.values()).mean()
    torch.testing.assert_close(parameter_gradient_penalty(model, losses_of(model, x)), expected)
    assert all(p.grad is None for p in parameters.values())
    # Finite differences: torch.func's own second gradient through LayerNorm is another than theirs.
    inputs = tuple(parameters.values())
    assert torch.autograd.gradcheck(lambda *_: parameter_gradient_penalty(model, losses_of(model, x)), inputs)


def test_shared_frozen_and_complex_parameters():
    layer = nn.Linear(3, 3, bias=False, dtype=torch.complex128)
    frozen = nn.Linear(3, 3, dtype=torch.complex128).requires_grad_(False)
    model = nn.Sequential(layer, frozen, layer)
    x = torch.randn(2, 3, dtype=torch.complex128)
    losses = model(x).abs().square().sum(1)
    grads = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for loss in losses]
    expected = torch.stack([each.abs().square().sum() for each in grads]).mean()
    torch.testing.assert_close(parameter_gradient_penalty(model, losses), expected)


def test_a_zero_gradient_gives_no_nan():
    model = mlp()
    value = parameter_gradient_penalty(model, 0 * losses_of(model, torch.randn(2, 3, dtype=torch.float64)))
    value.backward()
    assert value == 0
    assert all(p.grad.count_nonzero() == 0 for p in model.parameters())


def test_an_empty_batch_gives_zero():
    model = mlp()
    value = parameter_gradient_penalty(model, losses_of(model, torch.zeros(0, 3, dtype=torch.float64)))
    value.backward()
    assert value == 0


def test_training_through_it_lowers_it():
    model = mlp(torch.float32)
    x = torch.randn(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    values = []
    for _ in range(10):
        optimizer.zero_grad()
        value = parameter_gradient_penalty(model, losses_of(model, x))
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.9 * values[0]


def test_halves_are_squared_in_float32():
    model = mlp(torch.bfloat16)
    assert parameter_gradient_penalty(model, losses_of(model, torch.randn(2, 3).bfloat16())).dtype == torch.float32


def test_wrong_input():
    model, x = mlp(), torch.randn(2, 3, dtype=torch.float64)
    losses = losses_of(model, x)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        parameter_gradient_penalty(losses, model)
    with pytest.raises(ValueError, match=r"per_sample_losses must be \[B\]"):
        parameter_gradient_penalty(model, losses.sum())
    with pytest.raises(ValueError, match="must depend on a parameter"):
        parameter_gradient_penalty(mlp(), losses)
    with pytest.raises(ValueError, match="got none"):
        parameter_gradient_penalty(nn.ReLU(), losses)
