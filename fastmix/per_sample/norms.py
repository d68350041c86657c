"""Per-sample gradient norms of a model: the block that records, and what it found."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fastmix.ops._check import check_choice
from fastmix.per_sample._autograd import run_backward
from fastmix.per_sample._distributed import check_kind, check_seen, follow_shards, reshard
from fastmix.per_sample._functions import HANDLERS
from fastmix.per_sample._recorder import Recorder

# Parameters of the models that a block is open for.
_recorded: WeakIdKeyDictionary = WeakIdKeyDictionary()


class GradNorms:
    """Norms ‖∇L_i‖ of the samples' gradients, of all of a model's parameters and of each.

    Made by `grad_norms` and `clipped_backward`; read them after the backward. Results are float32 (float64 for float64
    models), in the order of the batch, of one backward after the other where they accumulate.
    """

    def __init__(self, names: list[str]):
        self._names = names
        self._groups: list[tuple[int, dict[str, Tensor], dict[str, str]]] = []  # B, squared norms, methods

    @property
    def total(self) -> Tensor:
        """[B]: ‖∇L_i‖ over all parameters."""
        return self.squared.sqrt()

    @property
    def squared(self) -> Tensor:
        """[B]: ‖∇L_i‖²."""
        return torch.stack(list(self._squared_per_parameter().values())).sum(0)

    @property
    def per_parameter(self) -> dict[str, Tensor]:
        """Name → [B]: the norm of the gradient of each parameter that requires one; 0 if the loss does not use it."""
        return {name: squared.sqrt() for name, squared in self._squared_per_parameter().items()}

    @property
    def methods(self) -> dict[str, str]:
        """Name → how its norms were computed: "fused" with the gradient, by "gram" or "direct", "generic", …"""
        self._finish()
        return {name: next((m[name] for *_, m in self._groups if name in m), "unused") for name in self._names}

    def _finish(self) -> None:
        if not self._groups:
            raise RuntimeError("there are no norms yet: call backward inside the grad_norms block, then read them")

    def _squared_per_parameter(self) -> dict[str, Tensor]:
        self._finish()
        found = [tensor for _, squared, _ in self._groups for tensor in squared.values()]
        like = found[0] if found else torch.zeros(())
        return {
            name: torch.cat([squared.get(name, like.new_zeros(b)) for b, squared, _ in self._groups])
            for name in self._names
        }

    def _add(self, batch: int, squared: dict[str, Tensor], methods: dict[str, str]) -> None:
        self._groups.append((batch, squared, methods))


class RecordedNorms(GradNorms):
    """The norms of a `grad_norms` block, with a backward for per-sample losses."""

    def __init__(self, recorder: Recorder, reduction: str, loss_scale: float, accumulate: bool):
        super().__init__(list(recorder.parameters))
        self._recorder = recorder
        self._reduction, self._loss_scale, self._accumulate = reduction, loss_scale, accumulate

    @property
    def num_backwards(self) -> int:
        """How many backwards the norms are from."""
        self._finish()
        return len(self._groups)

    @property
    def sample_scale(self) -> float:
        """The factor of each sample's gradient in the gradient of the loss."""
        self._finish()
        return self._loss_scale / (max(self._groups[-1][0], 1) if self._reduction == "mean" else 1)

    def backward(self, per_sample_losses: Tensor, *, retain_graph: bool = False) -> None:
        """Runs the backward of the losses' mean, or of their sum if the block's loss_reduction is "sum".

        Args:
            per_sample_losses: [B], sample i's loss in place i, of this process's samples.
            retain_graph: as of torch.Tensor.backward.

        Raises:
            TypeError: per_sample_losses is no Tensor.
            ValueError: it is not [B].
            RuntimeError: the block has ended, or a second backward without accumulate=True.
        """
        self._recorder.check_open()
        check_losses(per_sample_losses, self._recorder.batch.size)
        losses = per_sample_losses
        self._backward(losses.mean() if self._reduction == "mean" else losses.sum(), retain_graph=retain_graph)

    def _backwards(self) -> dict[Callable, Callable]:
        """What is called in the place of PyTorch's ways to run a backward."""

        def of_tensor(_, func, tensor, gradient=None, retain_graph=None, create_graph=False, inputs=None) -> None:
            self._backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)

        return {Tensor.backward: of_tensor, torch.autograd.backward: lambda _, func, *a, **k: self._backward(*a, **k)}

    def _backward(
        self, tensors, grad_tensors=None, retain_graph=None, create_graph=False, grad_variables=None, inputs=None
    ) -> None:
        recorder = self._recorder
        if recorder.is_spent:
            with recorder.pass_by():
                run_backward(tensors, grad_tensors, retain_graph, create_graph, grad_variables, inputs)
            return
        if create_graph:
            raise RuntimeError("create_graph=True is not served inside grad_norms: the norms are not differentiable")
        self._take_in()
        if self._groups and not self._accumulate:
            raise RuntimeError(
                "a second backward in one grad_norms block: open a block for each, or pass accumulate=True to append "
                "its samples"
            )
        outputs = [tensors] if isinstance(tensors, Tensor) else tensors
        check_seen(recorder, outputs)
        recorder.check_uses(outputs)
        recorder.running, recorder.retain = True, bool(retain_graph)
        try:
            with recorder:  # for the second forward of checkpoints
                run_backward(tensors, grad_tensors, retain_graph, create_graph, grad_variables, inputs)
        finally:
            recorder.running = False
        if not recorder.fired and recorder.batch.size != 0:
            raise RuntimeError("the backward reached no parameter whose use was recorded in the grad_norms block")
        recorder.fired = True
        self._take_in()
        if not retain_graph:
            recorder.release()

    def _finish(self) -> None:
        self._take_in()
        super()._finish()

    def _take_in(self) -> None:
        """Closes the group of a backward that has run."""
        recorder = self._recorder
        if recorder.penalised is not None:
            self._groups = [recorder.penalised]
        if not recorder.fired:
            return
        batch = recorder.batch.size or 0
        squared, methods = recorder.finish()
        batch = len(next(iter(squared.values()))) if squared else batch
        scale = (batch if self._reduction == "mean" else 1) / self._loss_scale
        self._add(batch, {name: value * scale**2 for name, value in squared.items()}, methods)


@contextlib.contextmanager
def grad_norms(
    model: nn.Module, loss_reduction: str = "mean", *, loss_scale: float = 1.0, accumulate: bool = False
) -> Iterator[RecordedNorms]:
    """A block in which the backward of a model's loss finds the norm of every sample's gradient as well.

    ::

        with fastmix.per_sample.grad_norms(model) as norms:
            loss = criterion(model(x), y)
            loss.backward()
        norms.total  # [B]: ‖∇_θ L_i‖ where loss = mean_i L_i

    The gradients in `.grad` are the ordinary ones. Functions that use a parameter are intercepted where PyTorch calls
    them, so the model is not wrapped or changed: products and convolutions compute a weight's gradient and the norms of
    its samples in one pass, common layers have forms of their own, all other uses of parameters take an exact generic
    path that is slower (see `methods` of the result). The batch is the first dimension of the model's first tensor
    argument and of what its layers see. Compiled models run eagerly inside the block.

    On several processes, the model may be in `DistributedDataParallel` or sharded by `fully_shard` (FSDP2): a block
    finds the norms of its process's samples, over all parameters, and `.grad` holds what PyTorch makes of the
    processes' losses, their mean. FullyShardedDataParallel and tensor parallel layers are not served.

    Args:
        model: whose parameters that require a gradient are followed.
        loss_reduction: "mean": the loss is the mean of the samples' losses L_i, and norms are of L_i, not of L_i / B;
            "sum": it is their sum. For other weights (a mean over tokens), call ``norms.backward(per_sample_losses)``.
        loss_scale: the factor by which the loss was multiplied (by a gradient scaler); norms are divided by it.
        accumulate: several backwards may run in the block; each appends its samples.

    Returns:
        A context manager that gives the `RecordedNorms`.

    Raises:
        ValueError: loss_reduction is unknown, loss_scale is not positive, the model has no trainable parameter or one
            that is distributed in a way that is not served, or, in the block, a layer sees another batch size or is
            coupled across the batch (BatchNorm in training).
        RuntimeError: a block is open for the model already; in the block: a second backward without accumulate=True, a
            backward with create_graph=True; after it: a backward of what was recorded in it.

    Goodfellow, Efficient Per-Example Gradient Computations (arXiv:1510.01799).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
    if not loss_scale > 0:
        raise ValueError(f"loss_scale must be positive, got {loss_scale}")
    check_kind(model)
    reshard(model)
    recorder = Recorder(model, HANDLERS)
    norms = RecordedNorms(recorder, loss_reduction, float(loss_scale), accumulate)
    with record(model, recorder):
        recorder.handlers = HANDLERS | norms._backwards()
        try:
            yield norms
        except BaseException:
            recorder.release()
            raise
        norms._take_in()


@contextlib.contextmanager
def record(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Activates the recorder for the model's forward and, whatever happens, leaves nothing behind."""
    if not recorder.parameters:
        raise ValueError("model must have a parameter that requires a gradient, got none")
    parameters = list(recorder.parameters.values())
    if any(parameter in _recorded for parameter in parameters):
        raise RuntimeError("a grad_norms block is open for this model already: blocks of one model do not nest")

    def find_batch(_, args, kwargs) -> None:
        if torch.is_grad_enabled():
            recorder.see_batch([*args, *kwargs.values()])

    handle = model.register_forward_pre_hook(find_batch, with_kwargs=True, prepend=True)
    # Nobody has compiled anything unless this module is loaded, which takes a second.
    compiled = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    _recorded.update((parameter, True) for parameter in parameters)
    try:
        with eager, follow_shards(model, recorder), recorder:
            yield
    finally:
        for parameter in parameters:
            del _recorded[parameter]
        handle.remove()
        recorder.closed = True


def check_losses(losses: Tensor, batch: int | None) -> None:
    if not isinstance(losses, Tensor):
        raise TypeError(f"per_sample_losses must be a Tensor, got {type(losses).__name__}")
    if losses.ndim != 1 or (batch is not None and len(losses) != batch):
        size = "[B]" if batch is None else f"[B] = [{batch}]"
        raise ValueError(f"per_sample_losses must be {size}, one loss a sample, got {list(losses.shape)}")
    if not losses.requires_grad:
        raise ValueError("per_sample_losses must depend on the model's parameters, got losses without a graph")
