"""Models on several processes: DistributedDataParallel, and `fully_shard` (FSDP2).

Both are data parallel: a sample lives on one process, which sees all parameters, so that its gradient and its norm are
whole there, and sums over samples are what travels.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from fastmix.per_sample._autograd import nodes_below, run_grad
from fastmix.per_sample._batch import tensors_in
from fastmix.per_sample._recorder import Recorder

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _loaded(module: str, name: str) -> type | tuple[()]:
    """A class of PyTorch's, for isinstance: nothing is an instance of it unless somebody has imported it."""
    return getattr(sys.modules.get(module), name, ())


def _is_dtensor(tensor: Tensor) -> bool:
    return isinstance(tensor, _loaded("torch.distributed.tensor", "DTensor"))


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its distribution over processes."""
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor


class Processes:
    """The processes among which a model's samples are divided, and how its gradients come together.

    `reduced` names the parameters whose gradients are averaged over the processes, `sharded` those of them that are
    shards made by `fully_shard`. On one process there are none of either.
    """

    def __init__(self, groups: list[ProcessGroup], reduced: set[str], sharded: set[str]):
        self.groups, self.reduced, self.sharded = groups, reduced, sharded

    @classmethod
    def of(cls, model: nn.Module, parameters: dict[str, nn.Parameter]) -> Processes:
        """`parameters` are the trainable ones, sharded."""
        sharded = {name for name, p in parameters.items() if _is_dtensor(p)}
        if sharded:
            meshes = {parameters[name].device_mesh for name in sharded}
            if len(meshes) > 1:
                raise ValueError(f"model must be sharded over one mesh, got {sorted(map(str, meshes))}")
            mesh = meshes.pop()
            return cls([mesh.get_group(dim) for dim in range(mesh.ndim)], sharded, sharded)
        kind = _loaded("torch.nn.parallel", "DistributedDataParallel")
        replicas = [module for module in model.modules() if isinstance(module, kind)]
        groups = {replica.process_group for replica in replicas}
        if len(groups) > 1:
            raise ValueError(f"the DistributedDataParallel in model must have one process group, got {len(groups)}")
        own = {
            id(p)
            for replica in replicas
            for name, p in replica.module.named_parameters()
            if name not in replica.parameters_to_ignore
        }
        return cls(list(groups), {name for name, p in parameters.items() if id(p) in own}, set())

    @property
    def size(self) -> int:
        return math.prod(group.size() for group in self.groups)

    @property
    def is_first(self) -> bool:
        return all(group.rank() == 0 for group in self.groups)

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the processes."""
        tensor = tensor.clone()
        for group in self.groups:
            torch.distributed.all_reduce(tensor, group=group)
        return tensor

    def average(self, grad: Tensor, parameter: nn.Parameter) -> Tensor:
        """The processes' mean, as a gradient of the sharded parameter."""
        from torch.distributed.tensor import DTensor, Partial

        mesh = parameter.device_mesh
        terms = DTensor.from_local(grad, mesh, [Partial()] * mesh.ndim, run_check=False)
        return (terms.redistribute(placements=parameter.placements) / self.size).to(parameter.device)

    def add_late(self, terms: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
        """Divides what the first process gives by the number of processes, and adds it to `.grad` on all of them.

        DistributedDataParallel with find_unused_parameters takes no gradients of parameters without a path to the loss.
        """
        names = sorted(self.reduced - self.sharded)
        if not names:
            return
        (group,) = self.groups
        given = torch.tensor([name in terms for name in names], device=parameters[names[0]].device)
        torch.distributed.broadcast(given, group=group, group_src=0)
        for name, is_given in zip(names, given.tolist(), strict=True):
            if is_given:
                parameter = parameters[name]
                term = terms.get(name, torch.zeros_like(parameter, requires_grad=False))
                torch.distributed.broadcast(term, group=group, group_src=0)
                term = term.div_(self.size)
                parameter.grad = term if parameter.grad is None else parameter.grad.add_(term)


# Parameters that fully_shard shards


def check_kind(model: nn.Module) -> None:
    """Raises if parameters are distributed in another way than `fully_shard`'s."""
    if "torch.distributed.fsdp" not in sys.modules and "torch.distributed.tensor" not in sys.modules:
        return
    for module in model.modules():
        if isinstance(module, _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")):
            raise ValueError(
                "model must be sharded by torch.distributed.fsdp.fully_shard, which keeps parameters apart, got "
                "FullyShardedDataParallel"
            )
    managed = {name for places in _owners(model).values() for name, *_ in places}
    for name, parameter in model.named_parameters():
        if _is_dtensor(parameter) and name not in managed:
            raise ValueError(
                f"the parameters of model must be plain ones, or sharded by a fully_shard module of the model, got "
                f"{name!r}, a DTensor {list(parameter.placements)} of another kind, such as tensor parallel"
            )


def reshard(model: nn.Module) -> None:
    """Makes the model's parameters the sharded ones, where a forward without a backward has left others."""
    for owner in _owners(model):
        owner.reshard()


@contextlib.contextmanager
def follow_shards(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Tells the recorder, in every forward, which tensors stand for sharded parameters in the graph."""
    handles = []
    for owner, places in _owners(model).items():
        given: list[Tensor] = []

        def before(_, args, kwargs, given=given) -> None:
            given[:] = tensors_in((args, kwargs))

        def after(_, args, kwargs, given=given, places=places) -> None:
            for name, module, attribute in places:
                parameter = getattr(module, attribute)
                if _is_dtensor(parameter):
                    raise ValueError(
                        f"parameter {name!r} must be a plain tensor in the forward, got a DTensor "
                        f"{list(parameter.placements)}: fully_shard is not served together with tensor parallelism"
                    )
                recorder.stand_in(name, parameter)
            # Arguments are handed through a node of fully_shard's own.
            for old, new in zip(given, tensors_in((args, kwargs)), strict=True):
                if old is not new and old in recorder.batch.places:
                    recorder.batch.places[new] = recorder.batch.places[old]
            given.clear()

        handles.append(owner.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        handles.append(owner.register_forward_pre_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_seen(recorder: Recorder, outputs: Sequence[Tensor | GradientEdge]) -> None:
    """Raises if the outputs use a sharded parameter that no hook has seen, because a method was called for it."""
    unseen = {p.shape: name for name, p in recorder.parameters.items() if _is_dtensor(recorder.leaves[name])}
    for node in nodes_below(outputs) if unseen else ():
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and leaf not in recorder.names and leaf.shape in unseen:
            raise RuntimeError(
                f"a use of the sharded parameter {unseen[leaf.shape]!r} was not recorded: modules of fully_shard must "
                "be called, not their methods, inside the block"
            )


def _owners(model: nn.Module) -> dict[nn.Module, list[tuple[str, nn.Module, str]]]:
    """The modules that fully_shard was called on → (name, module, attribute) of the parameters that each manages."""
    kind = _loaded("torch.distributed.fsdp", "FSDPModule")
    names = {id(p): name for name, p in model.named_parameters()} if kind else {}
    owners: dict[nn.Module, list[tuple[str, nn.Module, str]]] = defaultdict(list)

    def walk(module: nn.Module, owner: nn.Module | None) -> None:
        owner = module if isinstance(module, kind) else owner
        if owner is not None:
            places = module.named_parameters(recurse=False, remove_duplicate=False)
            owners[owner] += [(names[id(p)], module, attribute) for attribute, p in places]
        for child in module.children():
            walk(child, owner)

    if kind:
        walk(model, None)
    return owners


# DistributedDataParallel's own node in the graph


def past_sink(losses: Tensor, weight: Tensor) -> tuple[list[Tensor | GradientEdge], list[Tensor], Node | None]:
    """Outputs and their gradients in the backward of the weighted losses, below the node that watches for it.

    For find_unused_parameters and static_graph, DistributedDataParallel puts a node behind the model, which takes a
    backward for the one that fills `.grad`. Also returns that node, if there is one.
    """
    sink = None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        sink = next((node for node in nodes_below([losses]) if node.name() == "_DDPSinkBackward"), None)
    if sink is None:
        return [losses], [weight], None
    needed = [i for i, needs in enumerate(sink.needs_input_grad[1:]) if needs]
    edges = [GradientEdge(sink, i) for i in needed]
    grads = run_grad([losses], edges, [weight], retain_graph=True, allow_unused=True)
    inputs = [GradientEdge(*edge) for edge in sink.next_functions if edge[0] is not None]
    pairs = [(edge, grad) for edge, grad in zip(inputs, grads, strict=True) if grad is not None]
    if not pairs:
        return [losses], [weight], sink
    return [edge for edge, _ in pairs], [grad for _, grad in pairs], sink


def tell_sink(sink: Node) -> None:
    """Inside the backward that fills `.grad`."""
    sink.apply(*[None] * (len(sink.needs_input_grad) - 1))
