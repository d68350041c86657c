"""Checks of models of fully_shard (FSDP2)."""

from __future__ import annotations

import copy

import pytest
import torch
from common import (
    MAX_NORM,
    SIZE,
    check,
    check_clipped,
    check_norms,
    clip,
    draw,
    grads_of,
    mesh,
    one_process,
    shard,
)
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from fastmix import per_sample
from fastmix.testing.per_sample import Expected, SmallModel, weighted_losses


@check(True, False)
def sharded(reshard_after_forward: bool) -> None:
    plain, x, own = draw("unequal")
    model = shard(plain, reshard_after_forward=reshard_after_forward)
    parameters = list(model.parameters())
    for _ in range(2):
        for check_backward in (check_norms, check_clipped):
            check_backward(model, plain, x, own)
            with torch.no_grad():
                model(x[own])  # after which model.parameters() may give others
            for p in parameters:
                p.grad = None
    check_norms(model, plain, x, own, "sum")
    check_clipped(model, plain, x, own, mode="per_layer", times=2)


@check("replicas", "shards")
def sharded_over_two_dimensions(kind: str) -> None:
    plain, x, own = draw("unequal")
    model = shard(plain, mesh=mesh(SIZE, 1) if kind == "replicas" else mesh(1, SIZE))
    check_norms(model, plain, x, own)
    check_clipped(model, plain, x, own)


@check("empty", "all")
def sharded_with_an_empty_batch(split: str) -> None:
    plain, x, own = draw(split)
    model = shard(plain)
    for _ in range(2):
        check_clipped(model, plain, x, own)


@check()
def sharded_and_frozen() -> None:
    plain, x, own = draw("unequal")
    plain.small.conv.requires_grad_(False)
    plain.twice.bias.requires_grad_(False)
    plain.down.requires_grad_(False)
    model = shard(plain)
    check_norms(model, plain, x, own)
    check_clipped(model, plain, x, own)


class Language(nn.Module):
    """Ids [B, T] to logits, by a layer of attention, with one matrix for both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True) for _ in range(2))
        self.recurrent = nn.GRU(4, 4, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.head(self.recurrent(x)[0])


@check()
def sharded_language_model() -> None:
    """Tied weights, checkpoints, attention, and a layer that takes the generic path."""
    plain, x, own = draw("unequal", Language())
    ids = torch.randint(7, x.shape[:2])
    model = copy.deepcopy(plain)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh())
    fully_shard([model.embedding, model.head], mesh=mesh())
    fully_shard(model, mesh=mesh())
    check_norms(model, plain, ids, own)
    check_clipped(model, plain, ids, own)


@check()
def sharded_and_sequence_first() -> None:
    """A block's input has its samples elsewhere than in front."""

    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.block = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.inner(x).transpose(0, 1)).transpose(0, 1).clone()

    plain, x, own = draw("unequal", SequenceFirst())
    model = shard(plain, ("block",))
    check_norms(model, plain, x, own)
    check_clipped(model, plain, x, own)


@check()
def sharded_in_mixed_precision() -> None:
    """Norms are those of the model in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    plain, x, own = draw("equal", SmallModel())
    plain, x = plain.float(), x.float()
    model = shard(plain, ("inner",), mp_policy=policy)
    low = copy.deepcopy(plain).bfloat16()
    expected = Expected.of(low, (x[own].bfloat16(),))
    with per_sample.grad_norms(model, "sum") as norms:
        per_sample.clipped_backward(weighted_losses(model, x[own]), model, float("inf"))
        weighted_losses(model, x[own]).sum().backward()
    expected.check_norms(norms)
    grads = grads_of(model)
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    model.zero_grad()
    weighted_losses(model, x[own]).sum().backward()
    twice = grads_of(model)
    for name, grad in grads.items():  # unclipped, the sum is the ordinary gradient
        error = (grad - 2 * twice[name]).norm() / twice[name].norm()
        assert error < 4 * torch.finfo(torch.bfloat16).eps, (name, error)


@check()
def sharded_training() -> None:
    """Steps of an optimizer between the backwards."""
    plain, x, own = draw("unequal")
    model = shard(plain)
    optimizers = [torch.optim.Adam(each.parameters(), 0.1) for each in (plain, model)]
    for _ in range(3):
        for p, grad in zip(plain.parameters(), one_process(plain, x).values(), strict=True):
            p.grad = grad / SIZE
        model.zero_grad()
        clip(model, x[own])
        for optimizer in optimizers:
            optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.full_tensor(), plain.get_parameter(name))


@check()
def sharded_gram() -> None:
    plain, x, own = draw("unequal")
    model = shard(plain)
    with per_sample.grad_norms(model):
        actual = per_sample.gram(model, weighted_losses(model, x[own]))
    with per_sample.grad_norms(plain):
        expected = per_sample.gram(plain, weighted_losses(plain, x[own]))
    torch.testing.assert_close(actual, expected)


@check()
def sharded_hooks_run() -> None:
    plain, x, own = draw("unequal")
    model = shard(plain)
    seen = []
    model.twice.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.full_tensor()))
    clip(model, x[own])
    (grad,) = seen
    torch.testing.assert_close(grad, one_process(plain, x)["twice.weight"] / SIZE)


# Errors


@check()
def errors() -> None:
    plain, x, own = draw("unequal")
    model = shard(plain)
    losses = weighted_losses(model, x[own])
    with pytest.raises(
        ValueError, match=r"of fully_shard must come from a forward inside a grad_norms block, got an ordinary one"
    ):
        per_sample.clipped_backward(losses, model, MAX_NORM)
    losses.sum().backward()
    with pytest.raises(
        ValueError, match=r"sharded by a fully_shard module of the model, got 'weight', a DTensor \[Shard\(dim=0\)"
    ):
        per_sample.grad_norms(model.twice).__enter__()
    register_fsdp_forward_method(model, "encode")
    with (
        pytest.raises(RuntimeError, match=r"of the sharded parameter '.*' was not recorded: .* must be called"),
        per_sample.grad_norms(model),
    ):
        weighted_losses(model.encode, x[own]).sum().backward()
    flat = FullyShardedDataParallel(copy.deepcopy(plain).float(), device_id=torch.get_default_device())
    with pytest.raises(ValueError, match=r"sharded by torch\.distributed.* got FullyShardedDataParallel"):
        per_sample.grad_norms(flat).__enter__()


@check()
def tensor_parallel() -> None:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), mesh(), plan)
    with pytest.raises(
        ValueError, match=r"got '0.weight', a DTensor \[Shard\(dim=0\)\] of another kind, such as tensor parallel"
    ):
        per_sample.grad_norms(model).__enter__()
    losses = weighted_losses(model, torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"got '0.weight', a DTensor"):
        per_sample.clipped_backward(losses, model, MAX_NORM)
