"""How per_sample.grad_norms is used: blocks, accumulation, hooks, exceptions."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmix import per_sample
from fastmix.testing.per_sample import RELATIVE_ERROR, Expected, SmallModel, norms_of, run_block, weighted_losses

B, T, C = 3, 5, 4


def _input(batch=B):
    return torch.randn(batch, T, C)


# The block


def test_in_the_ordinary_way():
    model, x, target = SmallModel(), _input(), torch.randn(B, T, 2)
    criterion = nn.MSELoss()

    def losses(model, x, target):
        return F.mse_loss(model(x), target, reduction="none").mean((1, 2))

    expected = Expected.of(model, (x, target), losses)
    with per_sample.grad_norms(model) as norms:
        loss = criterion(model(x), target)
        loss.backward()
    expected.check_norms(norms)
    expected.check_grad(model, "mean")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_norms_backward(reduction):
    model, x = SmallModel(), _input()
    expected = Expected.of(model, (x,))
    with per_sample.grad_norms(model, reduction) as norms:
        norms.backward(weighted_losses(model, x))
    expected.check_norms(norms)
    expected.check_grad(model, reduction)


def test_token_means_over_padded_sequences():
    """The batch's mean over tokens weighs samples by their lengths: such losses are given sample by sample."""
    lengths = torch.tensor([5, 2, 3])
    model, x = SmallModel(), _input()

    def losses(model, x, lengths):
        inside = torch.arange(T) < lengths[:, None]
        return (model(x).square().sum(2) * inside).sum(1) / lengths

    expected = Expected.of(model, (x, lengths), losses)
    with per_sample.grad_norms(model) as norms:
        norms.backward(losses(model, x, lengths))
    expected.check_norms(norms)


def test_the_block_changes_no_value():
    model, x = SmallModel(), _input()
    plain = model(x)
    with per_sample.grad_norms(model):
        output = model(x)
    assert type(output) is torch.Tensor
    torch.testing.assert_close(output, plain, rtol=0.0, atol=0.0)


def test_norms_are_read_in_and_after_the_block():
    model, x = SmallModel(), _input()
    with per_sample.grad_norms(model, "sum") as norms:
        weighted_losses(model, x).sum().backward()
        inside = norms.total
    torch.testing.assert_close(norms.total, inside, rtol=0.0, atol=0.0)
    torch.testing.assert_close(norms.squared, norms.total.square())
    by_parameter = torch.stack([norm.square() for norm in norms.per_parameter.values()]).sum(0)
    torch.testing.assert_close(by_parameter, norms.squared)


def test_inputs_made_inside_the_block():
    model, given = SmallModel(), _input()
    expected = Expected.of(model, (given,))
    with per_sample.grad_norms(model, "sum") as norms:
        x = torch.zeros(B, T, C).copy_(given)
        weighted_losses(model, x).sum().backward()
    expected.check_norms(norms)


def test_torch_autograd_backward():
    model, x = SmallModel(), _input()
    expected = Expected.of(model, (x,))
    with per_sample.grad_norms(model, "sum") as norms:
        torch.autograd.backward(weighted_losses(model, x).sum())
    expected.check_norms(norms)
    expected.check_grad(model)


def test_a_model_called_by_keywords():
    model = SmallModel()
    x = _input()
    expected = Expected.of(model, (x,))
    with per_sample.grad_norms(model, "sum") as norms:
        weighted_losses(lambda x: model(x=x), x).sum().backward()
    expected.check_norms(norms)


def test_evaluation_inside_the_block():
    model, x = SmallModel(), _input()
    expected = Expected.of(model, (x,))
    with per_sample.grad_norms(model, "sum") as norms:
        losses = weighted_losses(model, x)
        with torch.no_grad():
            model(_input(2 * B + 1))
        losses.sum().backward()
        with torch.inference_mode():
            model(_input(1))
    expected.check_norms(norms)


def test_part_of_aSmallModel():
    body, head = nn.Linear(C, 6), nn.Linear(6, 2)
    x = torch.randn(B, C)
    expected = Expected.of(nn.Sequential(body, head), (x,))
    with per_sample.grad_norms(head, "sum") as norms:
        weighted_losses(nn.Sequential(body, head), x).sum().backward()
    oracle = norms_of(expected.oracle)["1.weight"]
    torch.testing.assert_close(norms.per_parameter["weight"].double(), oracle, rtol=RELATIVE_ERROR, atol=0.0)
    torch.testing.assert_close(body.weight.grad, expected.ordinary["0.weight"])


def test_random_numbers_are_drawn_as_without_the_block():
    model, x = nn.Sequential(nn.Linear(C, 6), nn.Dropout(0.5), nn.Linear(6, 2)), torch.randn(B, C)
    torch.manual_seed(3)
    weighted_losses(model, x).sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    torch.manual_seed(3)
    run_block(model, (x,))
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)


def test_input_gradients():
    model, x = SmallModel(), _input().requires_grad_()
    plain = torch.autograd.grad(weighted_losses(model, x).sum(), x)[0]
    run_block(model, (x,))
    torch.testing.assert_close(x.grad, plain)


def test_an_empty_batch():
    model = nn.Sequential(nn.Linear(C, 6), nn.ReLU(), nn.Linear(6, 2))
    norms = run_block(model, (torch.randn(0, C),))
    assert norms.total.shape == (0,)
    assert torch.equal(model[0].weight.grad, torch.zeros(6, C))


# Several backwards


def test_gradients_accumulate_over_blocks():
    model, first, second = SmallModel(), _input(), _input(4)
    expected = [Expected.of(model, (x,)) for x in (first, second)]
    for x, one in zip((first, second), expected, strict=True):
        one.check_norms(run_block(model, (x,)))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, sum(one.ordinary[name] for one in expected))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulation_on_purpose(reduction):
    model, batches = SmallModel(), [_input(), _input(2)]
    expected = [Expected.of(model, (x,)) for x in batches]
    with per_sample.grad_norms(model, reduction, accumulate=True) as norms:
        for x in batches:
            losses = weighted_losses(model, x)
            (losses.mean() if reduction == "mean" else losses.sum()).backward()
    oracle = {name: torch.cat([one.oracle[name] for one in expected]) for name in expected[0].oracle}
    reference = {name: torch.cat([one.reference[name] for one in expected]) for name in oracle}
    Expected(reference, oracle, {}, torch.float32).check_norms(norms)


def test_a_graph_that_is_kept():
    model, x = SmallModel(), _input()
    expected = Expected.of(model, (x,))
    with per_sample.grad_norms(model, "sum", accumulate=True) as norms:
        loss = weighted_losses(model, x).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    expected.check_grad(model, factor=2)
    assert norms.total.shape == (2 * B,)
    torch.testing.assert_close(norms.total[:B], norms.total[B:])


def test_parameters_hooks_run_once_and_change_no_norm():
    model, x = SmallModel(), _input()
    expected = Expected.of(model, (x,))
    calls = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: calls.append(name) or 2 * grad)
    norms = run_block(model, (x,))
    assert sorted(calls) == sorted(expected.oracle)
    expected.check_norms(norms)
    expected.check_grad(model, factor=2)


def test_module_hooks_run():
    model, x = SmallModel(), _input()
    expected = Expected.of(model, (x,))
    seen = []
    model.out.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model.out.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_output[0].shape))
    expected.check_norms(run_block(model, (x,)))
    assert seen == [(B, T, 2)] * 2


# Exceptions


def _state(model):
    hooks = [functools.reduce(lambda count, hooks: count + len(hooks), _hooks(module), 0) for module in model.modules()]
    return hooks, [parameter._backward_hooks for parameter in model.parameters()], torch.is_grad_enabled()


def _hooks(module):
    return [value for name, value in vars(module).items() if name.endswith("_hooks")]


@pytest.mark.parametrize("where", ["before", "forward", "after the forward", "backward", "after the backward"])
def test_after_an_exception_the_model_is_as_before(where):
    model, x = SmallModel(), _input()
    expected = Expected.of(model, (x,))
    before = _state(model)

    def fail(*_):
        raise KeyError(where)

    handle = model.out.register_forward_hook(fail) if where == "forward" else None
    with pytest.raises(KeyError, match=where), per_sample.grad_norms(model, "sum"):  # noqa: PT012
        if where == "before":
            fail()
        losses = weighted_losses(model, x)
        if where == "after the forward":
            fail()
        if where == "backward":
            losses.register_hook(fail)
        losses.sum().backward()
        fail()
    if handle:
        handle.remove()
    assert _state(model) == before
    model.zero_grad()
    weighted_losses(model, x).sum().backward()  # no trace of the block
    expected.check_grad(model)
    model.zero_grad()
    expected.check_norms(run_block(model, (x,)))
    expected.check_grad(model)


def test_nothing_stays_when_the_block_ends():
    model, x = SmallModel(), _input()
    before = _state(model)
    run_block(model, (x,))
    assert _state(model) == before
    assert not torch.overrides._is_torch_function_mode_enabled()
