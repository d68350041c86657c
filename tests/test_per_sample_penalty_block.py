"""What a grad_norms block allows before and after parameter_gradient_penalty, and what its norms then are.

The norms are compared with the microbatch loop, the gradients with the penalty of an ordinary forward.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fastmix import per_sample
from fastmix.per_sample import grad_norms, parameter_gradient_penalty
from fastmix.testing.per_sample import (
    SmallModel,
    check_tensors,
    gram_of,
    norms_of,
    per_sample_grads,
    total_of,
    weighted_losses,
)

B, T, C = 3, 5, 4
NEAR = torch.testing.assert_close


def draw(dtype=torch.float64):
    return SmallModel().to(dtype), torch.randn(B, T, C, dtype=dtype)


def loss_of(losses, penalty):
    return losses.mean() + 0.3 * penalty


def grads_of(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def expected_grads(model, x, loss=loss_of, factor=1.0):
    """Of the loss with the penalty of an ordinary forward."""
    model = copy.deepcopy(model)
    model.zero_grad()
    losses = factor * weighted_losses(model, x)
    loss(losses, parameter_gradient_penalty(model, losses)).backward()
    return grads_of(model)


def penalised(model, x, **options):
    with grad_norms(model, **options) as norms:
        losses = weighted_losses(model, x)
        penalty = parameter_gradient_penalty(model, losses)
    return norms, losses, penalty


# The norms


@pytest.mark.parametrize("options", [{}, {"loss_reduction": "sum", "loss_scale": 8.0}, {"accumulate": True}], ids=str)
def test_norms_before_and_after_the_backward(options):
    """They are those of the losses, whatever the block's own loss would have been."""
    model, x = draw()
    grads = per_sample_grads(model, (x,))
    total, each = total_of(grads), norms_of(grads)

    def check(norms):
        NEAR(norms.total, total)
        NEAR(norms.squared, total.square())
        NEAR(norms.per_parameter, each)
        assert not norms.squared.requires_grad
        assert norms.methods.keys() == each.keys()
        assert "unused" not in norms.methods.values()
        assert norms.num_backwards == 1

    with grad_norms(model, **options) as norms:
        losses = weighted_losses(model, x)
        with pytest.raises(RuntimeError, match="no norms yet"):
            norms.total.sum()
        penalty = parameter_gradient_penalty(model, losses)
        assert not grads_of(model)
        check(norms)
        loss_of(losses, penalty).backward()
        check(norms)
    check(norms)
    NEAR(penalty, total.square().mean())


def test_norms_of_a_penalty_after_the_block():
    model, x = draw()
    with grad_norms(model) as norms:
        losses = weighted_losses(model, x)
    penalty = parameter_gradient_penalty(model, losses)
    NEAR(norms.total, total_of(per_sample_grads(model, (x,))))
    loss_of(losses, penalty).backward()
    NEAR(grads_of(model), expected_grads(model, x))


def test_gram_and_clipping_of_the_same_losses():
    model, x = draw()
    grads = per_sample_grads(model, (x,))
    norms, losses, penalty = penalised(model, x)
    NEAR(per_sample.gram(model, losses), gram_of(grads))
    NEAR(per_sample.clipped_backward(losses, model, 1.0).total, total_of(grads))
    model.zero_grad()
    loss_of(losses, penalty).backward()
    NEAR(grads_of(model), expected_grads(model, x))
    NEAR(norms.total, total_of(grads))


# Backwards


@pytest.mark.parametrize("inside", [True, False])
def test_where_the_backward_runs(inside):
    model, x = draw()
    with grad_norms(model):
        losses = weighted_losses(model, x)
        loss = loss_of(losses, parameter_gradient_penalty(model, losses))
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    NEAR(grads_of(model), expected_grads(model, x))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("loss", [lambda losses, _: losses.mean(), lambda _, penalty: penalty], ids=["loss", "penalty"])
def test_one_without_the_other(inside, loss):
    model, x = draw()
    expected = expected_grads(model, x, loss)
    with grad_norms(model):
        losses = weighted_losses(model, x)
        value = loss(losses, parameter_gradient_penalty(model, losses))
        if inside:
            value.backward()
    if not inside:
        value.backward()
    NEAR(grads_of(model), expected)


def test_one_backward_after_the_other():
    model, x = draw()
    with grad_norms(model) as norms:
        losses = weighted_losses(model, x)
        penalty = parameter_gradient_penalty(model, losses)
        norms.backward(losses, retain_graph=True)
        NEAR(grads_of(model), expected_grads(model, x, lambda losses, _: losses.mean()))
    (0.3 * penalty).backward()
    NEAR(grads_of(model), expected_grads(model, x))
    NEAR(norms.total, total_of(per_sample_grads(model, (x,))))


def test_two_penalties():
    model, x = draw()
    with grad_norms(model) as norms:
        losses = weighted_losses(model, x)
        first, second = (parameter_gradient_penalty(model, factor * losses) for factor in (1, 2))
        NEAR(second, 4 * first)
        (losses.mean() + 0.1 * first + 0.05 * second).backward()
    NEAR(grads_of(model), expected_grads(model, x))
    NEAR(norms.total, 2 * total_of(per_sample_grads(model, (x,))))  # of the last one


def test_gradients_accumulate():
    model, x = draw()
    expected = expected_grads(model, x)
    for _ in range(2):
        _, losses, penalty = penalised(model, x)
        loss_of(losses, penalty).backward()
    NEAR(grads_of(model), {name: 2 * grad for name, grad in expected.items()})


def test_third_derivatives():
    # Not through a LayerNorm, whose second backward in PyTorch has no third.
    model, x = nn.Sequential(nn.Linear(C, 6), nn.Tanh(), nn.Linear(6, 2)).double(), torch.randn(B, C).double()
    parameters = list(model.parameters())

    def third(penalty):
        grads = torch.autograd.grad(penalty, parameters, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), parameters)

    NEAR(third(penalised(model, x)[2]), third(parameter_gradient_penalty(model, weighted_losses(model, x))))


def test_create_graph_without_a_penalty():
    model, x = draw()
    with grad_norms(model):
        losses = weighted_losses(model, x)
        with pytest.raises(RuntimeError, match="create_graph=True is not served"):
            losses.sum().backward(create_graph=True)
        with pytest.raises(RuntimeError, match="create_graph=True is not served"):
            torch.autograd.grad(losses.sum(), list(model.parameters()), create_graph=True)
        parameter_gradient_penalty(model, losses)


# The block's end


def test_blocks_that_follow():
    model, x = draw()
    total = total_of(per_sample_grads(model, (x,)))
    _, losses, penalty = penalised(model, x)
    loss_of(losses, penalty).backward()
    model.zero_grad()
    with grad_norms(model) as norms:  # an ordinary one
        weighted_losses(model, x).mean().backward()
    NEAR(norms.total, total)
    NEAR(grads_of(model), expected_grads(model, x, lambda losses, _: losses.mean()))
    model.zero_grad()
    norms, losses, penalty = penalised(model, x)
    loss_of(losses, penalty).backward()
    NEAR(norms.total, total)
    NEAR(grads_of(model), expected_grads(model, x))


def test_the_graph_is_freed():
    class Watched:
        pass

    model, x = draw()
    norms, losses, penalty = penalised(model, x)
    losses.grad_fn.metadata["watched"] = Watched()
    watched = weakref.ref(losses.grad_fn.metadata["watched"])
    loss_of(losses, penalty).backward()
    del losses, penalty
    gc.collect()
    assert watched() is None
    assert norms.total.isfinite().all()


# Batches and gradients of nothing


def test_an_empty_batch():
    model, x = draw()
    norms, losses, penalty = penalised(model, x[:0])
    assert penalty == 0
    assert norms.total.shape == (0,)
    (losses.sum() + penalty).backward()
    assert all(p.grad.count_nonzero() == 0 for p in model.parameters())


@pytest.mark.parametrize("factor", [0.0, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)], ids=["all", "one"])
def test_zero_gradients(factor):
    model, x = draw()
    with grad_norms(model) as norms:
        losses = factor * weighted_losses(model, x)
        penalty = parameter_gradient_penalty(model, losses)
    assert norms.total[1] == 0
    loss_of(losses, penalty).backward()
    NEAR(grads_of(model), expected_grads(model, x, factor=factor))


def test_complex_parameters():
    layer = nn.Linear(3, 3, bias=False, dtype=torch.complex128)
    model, x = nn.Sequential(layer, layer), torch.randn(2, 3, dtype=torch.complex128)
    found = []
    for block in (grad_norms(model), contextlib.nullcontext()):
        model.zero_grad()
        with block:
            penalty = parameter_gradient_penalty(model, model(x).abs().square().sum(1))
        penalty.backward()
        found.append((penalty, layer.weight.grad))
    NEAR(*found)


def test_training_lowers_the_penalty():
    model, x = draw(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    values = []
    for _ in range(10):
        optimizer.zero_grad()
        _, losses, penalty = penalised(model, x)
        loss_of(losses, penalty).backward()
        optimizer.step()
        values.append(penalty.item())
    assert values[-1] < 0.9 * values[0]


# Precision and modes


def check_low_precision(model, x, losses_of):
    """The block errs as an ordinary forward in bfloat16 errs."""

    def run(model, x, block):
        model = copy.deepcopy(model)
        with block(model):
            losses = losses_of(model, x)
            penalty = parameter_gradient_penalty(model, losses)
        loss_of(losses, penalty).backward()
        return {"value": penalty.detach()[None]} | grads_of(model)

    oracle = run(copy.deepcopy(model).double(), x.double(), contextlib.nullcontext)
    actual, reference = run(model, x, grad_norms), run(model, x, contextlib.nullcontext)
    assert actual["value"].dtype == torch.float32
    for names in (["value"], [name for name in oracle if name != "value"]):
        check_tensors(
            ", ".join(names), *({n: found[n] for n in names} for found in (actual, reference, oracle)), torch.bfloat16
        )


def test_bfloat16():
    model, x = draw(torch.bfloat16)
    check_low_precision(model, x, weighted_losses)


@pytest.mark.parametrize("around", ["forward", "all"])
def test_autocast(around):
    model, x = draw(torch.float32)

    def autocast(x):
        return torch.autocast("cpu", torch.bfloat16, enabled=x.dtype != torch.float64)

    def losses_of(model, x):
        with autocast(x):
            return weighted_losses(model, x)

    with autocast(x) if around == "all" else contextlib.nullcontext():
        check_low_precision(model, x, losses_of)


class Checkpointed(nn.Module):
    def __init__(self, inner, use_reentrant):
        super().__init__()
        self.first, self.inner, self.use_reentrant = nn.Linear(C, C), inner, use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, self.first(x).tanh(), use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("outside", [False, True], ids=["in the block", "after it"])
@pytest.mark.parametrize(
    ("inner", "shape"),
    [(lambda: nn.Linear(C, C), (B, C)), (lambda: nn.Linear(C, 6), (B, C)), (SmallModel, (B, T, C))],
    ids=["a square weight, as its transpose", "a wide weight", "model"],
)
def test_a_checkpoint(inner, shape, outside):
    model, x = Checkpointed(inner(), False).double(), torch.randn(shape).double()
    with grad_norms(model):
        losses = weighted_losses(model, x)
        if not outside:
            with pytest.raises(ValueError, match="model must not be checkpointed"):
                parameter_gradient_penalty(model, losses)
    if outside:
        with pytest.raises(ValueError, match="model must not be checkpointed"):
            parameter_gradient_penalty(model, losses)
    # As the message says.
    NEAR(
        parameter_gradient_penalty(model, weighted_losses(model, x)),
        total_of(per_sample_grads(model, (x,))).square().mean(),
    )


def test_a_checkpoint_without_parameters():
    class Model(SmallModel):
        def forward(self, x):
            return self.out(checkpoint(torch.tanh, self.conv(self.inner(x).mT).mT * self.scale, use_reentrant=False))

    model, x = Model().double(), torch.randn(B, T, C).double()
    _, losses, penalty = penalised(model, x)
    loss_of(losses, penalty).backward()
    NEAR(grads_of(model), expected_grads(model, x))


def test_a_reentrant_checkpoint():
    model, x = Checkpointed(SmallModel(), True), torch.randn(B, T, C)
    with pytest.raises(RuntimeError, match="checkpoint"):
        penalised(model, x)


def test_flash_attention():
    """It has no double backward on a CPU; the norms alone are found."""

    class Model(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x, need_weights=False)[0]

    model, x = Model(4, 2, batch_first=True).double(), torch.randn(B, T, 4).double()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        norms, _, penalty = penalised(model, x)
    NEAR(norms.total, total_of(per_sample_grads(model, (x,))))
    with pytest.raises(RuntimeError, match=r"flash_attention.* is not implemented"):
        penalty.backward()
