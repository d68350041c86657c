"""The forward of a model that Opacus has made private, under a recorder, and what its backward finds.

Imports opacus: `fastmix.integrations.opacus` does so when asked.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from weakref import WeakSet

import torch
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from opacus.layers import DPMultiheadAttention
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from fastmix.per_sample._autograd import at_rest
from fastmix.per_sample._batch import map_tensors, tensors_in
from fastmix.per_sample._contributions import Contribution, combine
from fastmix.per_sample._functions import HANDLERS
from fastmix.per_sample._recorder import Recorder
from fastmix.per_sample.norms import record


class BatchGradients:
    """The gradients that the samples of one batch give one parameter."""

    def __init__(self, parameter: nn.Parameter, batch: int, scale: float):
        self.parameter, self.batch, self.scale = parameter, batch, scale
        self.uses: list[Contribution] = []
        self.inputs: list[tuple[Tensor, int]] = []  # of the model, of which the uses may be views; their versions

    def norms(self) -> Tensor:
        """[B]."""
        self._check_inputs()
        if self.batch == 0:
            dtype = torch.promote_types(self.parameter.dtype, torch.float32)
            return torch.zeros(0, dtype=dtype, device=self.parameter.device)
        with at_rest():
            return combine(self.uses).norm_sq().sqrt() * self.scale

    def total(self, weight: Tensor | None = None) -> Tensor:
        """Σ_b weight_b ∇_b, as the parameter's gradient; the weights are 1 if there are none."""
        if self.batch == 0:
            return torch.zeros_like(self.parameter)
        with at_rest():
            if weight is not None:
                weight = weight.to(self.parameter.device) * self.scale
            return combine(self.uses).total(weight).view_as(self.parameter).to(self.parameter.dtype)

    def release(self) -> None:
        self.uses.clear()
        self.inputs.clear()

    def _check_inputs(self) -> None:
        if any(tensor._version != version for tensor, version in self.inputs):
            raise RuntimeError(
                "an input of the model was changed in place between the backward and optimizer.step(): clone it "
                "before, or step first"
            )


class GradSample(list[BatchGradients]):
    """A parameter's `grad_sample`: batches whose gradients have accumulated since the last zero_grad."""

    def __getattr__(self, name: str):
        raise AttributeError(
            f"grad_sample has no {name!r}: fastmix forms no per-sample gradients, "
            "fastmix.integrations.opacus.restore(optimizer) gives them back"
        )

    def norms(self) -> Tensor:
        """[B], of all batches."""
        return torch.cat([batch.norms() for batch in self])

    def total(self, weight: Tensor) -> Tensor:
        """Σ_b weight_b ∇_b over all batches, which are let go of."""
        weights = weight.split([batch.batch for batch in self])
        totals = [batch.total(each) for batch, each in zip(self, weights, strict=True)]
        for batch in self:
            batch.release()
        return sum(totals[1:], start=totals[0])


class RecordedForward:
    """In the place of a model's `forward` while its GradSampleModule, or bare hooks, are accelerated."""

    def __init__(self, hooks: GradSampleHooks):
        self.hooks, self.model = hooks, inner_model(hooks)
        self.own = vars(self.model).get("forward")  # that of the object, if it has one
        self.is_ghost = isinstance(hooks, GradSampleHooksFastGradientClipping)
        self.synchronises = getattr(hooks._module, "require_backward_grad_sync", None)
        # Backwards that follow on another without a forward between them are of one batch.
        self.batch: dict[nn.Parameter, BatchGradients] = {}

    def attach(self) -> None:
        hooks = self.hooks
        enabled = hooks.hooks_enabled
        hooks.remove_hooks()
        hooks.hooks_enabled = enabled
        hooks.set_grad_sample_to_none()
        # Among the handles that Opacus' remove_hooks, cleanup and to_standard_module remove.
        hooks.autograd_grad_sample_hooks = hooks._module.autograd_grad_sample_hooks = [self]
        self.model.forward = self
        if self.synchronises is not None:  # DDP waits for gradients of weights: Opacus' optimizer adds them up
            hooks._module.require_backward_grad_sync = False
        if self.is_ghost:
            _ghosts.add(self)
            DPTensorFastGradientClipping.backward = _backward

    def remove(self) -> None:
        if self.own is None:
            del self.model.forward
        else:
            self.model.forward = self.own
        if self.synchronises is not None:
            self.hooks._module.require_backward_grad_sync = self.synchronises
        _ghosts.discard(self)
        if not _ghosts:
            DPTensorFastGradientClipping.backward = _opacus_backward

    def detach(self) -> None:
        """Opacus' hooks are back."""
        hooks = self.hooks
        enabled = hooks.hooks_enabled
        hooks.remove_hooks()
        hooks.set_grad_sample_to_none()
        options = {"loss_reduction": hooks.loss_reduction, "batch_first": hooks.batch_first}
        hooks.add_hooks(**options, force_functorch=hooks.force_functorch)
        hooks.hooks_enabled = enabled

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @property
    def original(self) -> Callable:
        return self.own or type(self.model).forward.__get__(self.model)

    def __call__(self, *args, **kwargs):
        trainable = any(parameter.requires_grad for parameter in self.model.parameters())
        if not (self.hooks.hooks_enabled and torch.is_grad_enabled() and self.model.training and trainable):
            return self.original(*args, **kwargs)
        self._begin_batch()
        given = [tensor for tensor in tensors_in((args, kwargs)) if tensor.requires_grad]
        leaves = {id(tensor): tensor.detach().requires_grad_() for tensor in given}
        if given:  # their gradients leave through the gate
            args, kwargs = map_tensors(lambda tensor: leaves.get(id(tensor), tensor), (args, kwargs))
        run = _Run(self, [leaves[id(tensor)] for tensor in given], list(tensors_in((args, kwargs))))
        return run.gate(run.forward(*args, **kwargs), given)

    def _begin_batch(self) -> None:
        self.batch = {}
        if self.is_ghost:
            for parameter in self.model.parameters():
                vars(parameter).pop("_norm_sample", None)

    def receive(self, size: int, found: dict[nn.Parameter, list[Contribution]], inputs: list) -> None:
        """Takes in what a backward found for a batch of this size."""
        for parameter, uses in found.items():
            gradients = self._batch_of(parameter, size)
            gradients.uses.extend(map(_detached, uses))
            gradients.inputs.extend(inputs)
            if self.is_ghost:
                parameter._norm_sample = gradients.norms()

    def _batch_of(self, parameter: nn.Parameter, size: int) -> BatchGradients:
        kept = getattr(parameter, "grad_sample", None)
        gradients = self.batch.get(parameter)
        if gradients is None or not (self.is_ghost or gradients in (kept or ())):
            scale = size if self.hooks.loss_reduction == "mean" else 1
            gradients = self.batch[parameter] = BatchGradients(parameter, size, scale)
            if not self.is_ghost:
                self._keep(parameter, kept, gradients)
        elif gradients.batch != size:
            raise ValueError(f"forwards before one backward must be of one batch, got {gradients.batch} and {size}")
        return gradients

    def _keep(self, parameter: nn.Parameter, kept: GradSample | None, gradients: BatchGradients) -> None:
        if kept and not self.hooks.grad_accumulation_allowed:
            raise ValueError(
                "Poisson sampling is not compatible with grad accumulation. You need to call optimizer.step() after "
                "every forward/backward pass or consider using BatchMemoryManager"
            )
        parameter.grad_sample = GradSample([*(kept or ()), gradients])

    def clip(self) -> None:
        """Adds the clipped gradients of the batch to `.grad`, by the factors that the ghost module computes."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and parameter not in self.batch:
                raise no_gradient(name)
        factors = self.hooks.get_clipping_coef()
        for parameter, gradients in self.batch.items():
            add_to_grad(parameter, gradients.total(factors))
        self.batch = {}


class _Run:
    """One forward."""

    def __init__(self, recorded: RecordedForward, leaves: list[Tensor], inputs: list[Tensor]):
        self.recorded, self.leaves = recorded, leaves
        self.inputs = [tensor for tensor in inputs if not tensor.is_inference()]  # the others count no versions
        self.recorder = Recorder(recorded.model, HANDLERS)
        dim = 0 if recorded.hooks.batch_first else 1
        sizes = [tensor.shape[dim] for tensor in inputs if tensor.ndim > dim]
        self.is_empty = bool(sizes) and not any(sizes)
        self.size = sizes[0] if sizes else None

    def forward(self, *args, **kwargs):
        recorded, batch = self.recorded, self.recorder.batch
        if self.is_empty:
            return recorded.original(*args, **kwargs)
        with record(recorded.model, self.recorder), self._attention_outputs():
            if recorded.hooks.batch_first:
                self.recorder.see_batch([args, kwargs])
            else:
                batch.size = self.size
                for tensor in self.inputs:
                    if tensor.ndim > 1 and tensor.shape[1] == batch.size:
                        self._place(tensor, 1)
            outputs = recorded.original(*args, **kwargs)
            self.size = batch.size
            return outputs

    def _place(self, tensor: Tensor, dim: int) -> None:
        """Tells the recorder where the samples are."""
        self.recorder.computed[tensor] = True
        self.recorder.batch.places.pop(tensor, None)
        self.recorder.batch.put(tensor, dim)

    @contextlib.contextmanager
    def _attention_outputs(self) -> Iterator[None]:
        """Opacus' attention puts samples and heads into one dimension, through which a recorder follows none."""
        with contextlib.ExitStack() as stack:
            for module in self.recorded.model.modules():
                if isinstance(module, DPMultiheadAttention):
                    dim = 0 if module.batch_first else 1
                    hook = module.out_proj.register_forward_pre_hook(
                        lambda _, args, dim=dim: self._place(args[0], dim), prepend=True
                    )
                    stack.callback(hook.remove)
            yield

    def gate(self, outputs, given: list[Tensor]):
        """The outputs with a graph of one node, at which their backward becomes ours."""
        found: dict[int, Tensor] = {}
        _map_outputs(lambda tensor: found.setdefault(id(tensor), tensor), outputs)
        found = {key: tensor for key, tensor in found.items() if tensor.requires_grad}
        if not found:
            return outputs
        ends = [_End.apply(tensor) for tensor in found.values()]
        leaf = torch.zeros((), requires_grad=True)
        gated = dict(zip(found, _Gate.apply(self, ends, list(found.values()), leaf, *given), strict=True))
        return _map_outputs(lambda tensor: gated.get(id(tensor), tensor), outputs)

    def backward(self, outputs: list[Tensor], grads: list[Tensor]) -> tuple[Tensor | None, ...]:
        """Takes in the gradients of the outputs; returns those of the inputs that require one."""
        recorder, recorded = self.recorder, self.recorded
        parameters = recorder.parameters
        if self.is_empty:
            found = {parameter: [] for parameter in parameters.values()}
        else:
            uses_by_name = recorder.collect(outputs, grads, keep=recorded.hooks.hooks_enabled)
            found = {parameters[name]: uses for name, uses in uses_by_name.items()}
        size = 0 if self.is_empty else self.size
        if recorded.hooks.hooks_enabled:
            recorded.receive(size, found, [(tensor, tensor._version) for tensor in self.inputs])
        else:  # an ordinary backward, the second of ghost clipping
            for parameter, uses in found.items():
                gradients = BatchGradients(parameter, size, 1)
                gradients.uses = uses
                add_to_grad(parameter, gradients.total())
            recorded.batch = {}
        if not self.leaves:
            return ()
        with torch.enable_grad():
            total = sum((output * grad).sum() for output, grad in zip(outputs, grads, strict=True))
        with recorder.at_rest(), recorder:  # for the second forward of checkpoints
            return recorder.pull([total], self.leaves, torch.ones_like(total))


class _End(torch.autograd.Function):
    """The end of the model's graph, without the values of the output, which may be changed in place behind the gate."""

    @staticmethod
    def forward(ctx, output: Tensor) -> Tensor:
        return output.new_empty(()).expand(output.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class _Gate(torch.autograd.Function):
    """The outputs of a run. The backward of what was computed from them ends here."""

    @staticmethod
    def forward(ctx, run: _Run, ends: list[Tensor], outputs: list[Tensor], *_: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*ends)  # and with them the model's graph, which is freed as any other
        return tuple(output.detach() for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None):
        pairs = [(end, grad) for end, grad in zip(ctx.saved_tensors, grads, strict=True) if grad is not None]
        ends, grads = [end for end, _ in pairs], [grad for _, grad in pairs]
        of_inputs = ctx.run.backward(ends, grads) if pairs else [None] * len(ctx.run.leaves)
        return None, None, None, None, *of_inputs


# Ghost clipping

_opacus_backward = DPTensorFastGradientClipping.backward
_ghosts: WeakSet[RecordedForward] = WeakSet()


def _backward(self: DPTensorFastGradientClipping) -> None:
    """DPTensorFastGradientClipping.backward without the second backward, where the module is accelerated."""
    recorded = recorded_forward(self.module)
    if recorded is None or not self.module.hooks_enabled:
        _opacus_backward(self)
        return
    losses = self.loss_per_sample
    (losses.mean(dim=0) if self.loss_reduction == "mean" else losses.sum(dim=0)).backward()
    self.optimizer.zero_grad(set_to_none=True)
    recorded.clip()


# What is shared


def inner_model(hooks: GradSampleHooks) -> nn.Module:
    """The model itself, without the wrapper of data parallel training."""
    model = hooks._module
    is_wrapper = isinstance(model, (DistributedDataParallel, DifferentiallyPrivateDistributedDataParallel))
    return model.module if is_wrapper else model


def recorded_forward(hooks: GradSampleHooks) -> RecordedForward | None:
    """Of hooks that are accelerated."""
    forward = vars(inner_model(hooks)).get("forward")
    return forward if isinstance(forward, RecordedForward) and forward.hooks is hooks else None


def no_gradient(name: str) -> ValueError:
    return ValueError(
        f"there is no per-sample gradient of {name}: the loss must depend on it through a forward of the whole model "
        "in training mode, or it must be frozen"
    )


def _detached(use: Contribution) -> Contribution:
    """Lets the graph go with the backward, and not with the optimizer's step."""
    for name, value in vars(use).items():
        if isinstance(value, Tensor):
            setattr(use, name, value.detach())
        elif isinstance(value, Contribution):
            _detached(value)
    return use


def add_to_grad(parameter: nn.Parameter, grad: Tensor) -> None:
    parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)


def _fields(value: object) -> Iterator[tuple[str, object]]:
    return ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))


def _is_record(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, (type, dict))


def _map_outputs(function: Callable[[Tensor], Tensor], value):
    """map_tensors that keeps the class of a dictionary or dataclass, such as transformers' ModelOutput."""
    if isinstance(value, dict) or _is_record(value):
        result = copy.copy(value)
        for key, item in list(value.items()) if isinstance(value, dict) else _fields(value):
            item = _map_outputs(function, item)
            result.__setitem__(key, item) if isinstance(value, dict) else object.__setattr__(result, key, item)
        return result
    if isinstance(value, (tuple, list)):
        items = [_map_outputs(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return map_tensors(function, value)
