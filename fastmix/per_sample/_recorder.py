"""Follows a model's parameters through its forward and collects per-sample gradients in its backward.

While a `Recorder` is active, every PyTorch function that is called reaches `__torch_function__`. Tensors without
samples (parameters, buffers, constants, and what is computed from them alone) are told from those with samples, whose
batch dimension is known. Where one without, which needs a gradient, meets one with samples, a parameter is used:
`_products.py` and `_layers.py` know how for common functions, and any other takes the generic path.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from fastmix.per_sample._autograd import at_rest, nodes_below, run_backward, run_grad
from fastmix.per_sample._batch import ROWS, Batch, Place, is_in_place, is_injective, map_tensors, tensors_in
from fastmix.per_sample._contributions import Contribution, Derived, Generic, combine
from fastmix.per_sample._observer import Observer

_NOTHING: frozenset[str] = frozenset()


class Recorder(TorchFunctionMode):
    """The uses of a model's parameters, and the norms that its backward found."""

    def __init__(self, model: torch.nn.Module, handlers: dict[Callable, Callable]):
        super().__init__()
        self.model, self.handlers = model, handlers
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.leaves: dict[str, Tensor] = dict(self.parameters)  # what stands for them in the graph
        self.sharded = False
        self.batch = Batch()
        self.closed = False
        # A tensor without samples → the names of the parameters that it is computed from.
        self.sources: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.computed: WeakIdKeyDictionary = WeakIdKeyDictionary()  # inside the block, with samples
        self.names: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
            self.sources[tensor], self.names[tensor] = _NOTHING, name
        for name, parameter in self.parameters.items():
            self.sources[parameter] = frozenset((name,))
        self.uses_expected: dict[str, int] = defaultdict(int)  # those without gradients too
        self.uses_recorded: dict[Node, int] = defaultdict(int)
        self.observers: weakref.WeakSet[Observer] = weakref.WeakSet()
        # Of the backward that is running
        self.running = self.retain = self.collecting = self.keeping = self.pulling = False
        self.fired = False
        # What a penalty on the norms found: B, squared norms, methods. No backward is recorded after it.
        self.penalised: tuple[int, dict[str, Tensor], dict[str, str]] | None = None
        self.passing = False  # what is called passes by
        self.norm_sq: dict[str, Tensor] = {}
        self.methods: dict[str, str] = {}
        self.uses: dict[str, list[Contribution]] = defaultdict(list)

    # The forward

    def stand_in(self, name: str, tensor: Tensor) -> None:
        """From now on, the tensor is the parameter in the graph; its values may be gone after the backward."""
        self.names[tensor], self.sources[tensor] = name, _NOTHING
        if name in self.parameters:
            self.leaves[name], self.sources[tensor], self.sharded = tensor, frozenset((name,)), True

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.passing:
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            return self._in_backward(func, args, kwargs) if self.running else self._count(func, args, kwargs)
        handler = self.handlers.get(func)
        if handler is not None:
            return handler(self, func, *args, **kwargs)
        return self.follow(func, *args, **kwargs)

    def _in_backward(self, func: Callable, args: tuple, kwargs: dict):
        """The backward itself passes by. A checkpoint's second forward has gradients, and must still be seen."""
        if func is not torch.autograd.backward:
            return func(*args, **kwargs)
        with self:
            return run_backward(*args, **kwargs)

    def _count(self, func: Callable, args: tuple, kwargs: dict):
        """Without gradients: uses still count, since this may be the first forward of a reentrant checkpoint."""
        tensors = list(tensors_in((args, kwargs)))
        result = func(*args, **kwargs)
        if all(tensor in self.sources for tensor in tensors):
            names = _NOTHING.union(*map(self.sources.get, tensors))
            for output in tensors_in(result):
                self.sources[output] = names
            return result
        for _ in range(3 if func is F.multi_head_attention_forward else len(list(tensors_in(result)))):
            self.expect(*tensors)
        return result

    def see_batch(self, arguments: list) -> None:
        """The batch is the first dimension of the model's first tensor argument."""
        tensors = [tensor for tensor in tensors_in(arguments) if tensor.ndim]
        if not tensors:
            return
        size = tensors[0].shape[0]
        if self.batch.size not in (None, size):
            raise ValueError(
                f"the model must be called with batches of one size inside a block, got {size} after {self.batch.size}"
            )
        self.batch.size = size
        for tensor in tensors:
            if tensor.shape[0] == size and tensor not in self.names:
                self.sources.pop(tensor, None)  # made inside the block, and no constant

    def follow(self, func: Callable, *args, **kwargs):
        """Any function: notes what its result is, and takes the generic path where it uses a parameter."""
        tensors = list(tensors_in((args, kwargs)))
        with_samples = [tensor for tensor in tensors if self.has_samples(tensor)]
        if with_samples and any(self.is_target(tensor) for tensor in tensors):
            return self._generic(func, args, kwargs, with_samples)
        result = func(*args, **kwargs)
        changed = [args[0]] if is_in_place(func) and isinstance(args[0], Tensor) else []
        outputs = changed or list(tensors_in(result))
        if not with_samples:
            names = _NOTHING.union(*(self.sources.get(tensor, _NOTHING) for tensor in tensors))
            for output in outputs:
                self.sources[output] = names
                if output.grad_fn is not None:
                    output.grad_fn.metadata["fastmix.sources"] = ", ".join(sorted(names))
            return result
        for output in outputs:
            self.computed[output] = True
        if not changed or self.sources.pop(args[0], None) is not None:  # samples were written into a constant
            self.batch.note(func, args, kwargs, with_samples, outputs)
        return result

    def has_samples(self, tensor: Tensor) -> bool:
        if tensor in self.sources:
            return False
        batch = self.batch
        if tensor.requires_grad or tensor in self.computed or batch.inside_attention or batch.size in (None, 0, 1):
            return True
        # Else an input of the model without a batch dimension, such as position ids [1, T].
        return tensor.ndim > 0 and tensor.shape[0] > 1 and tensor.shape[0] % batch.size == 0

    def is_target(self, tensor: Tensor | None) -> bool:
        """Whether a tensor without samples leads a gradient to parameters, now or in a checkpoint's second forward."""
        if tensor is None or not self.sources.get(tensor):
            return False
        return tensor.requires_grad or not torch.is_grad_enabled()

    def expect(self, *targets: Tensor | None) -> None:
        """Counts one use of the targets' parameters."""
        for target in targets if not self.running else ():
            for name in self.sources[target] if self.is_target(target) else ():
                self.uses_expected[name] += 1
            if torch.is_grad_enabled() and self.is_target(target):
                self.uses_recorded[get_gradient_edge(target).node] += 1

    def name_of(self, *targets: Tensor | None) -> str:
        """What an error calls a layer with these parameters, tensors computed from some, or buffers."""
        names = set()
        for target in targets:
            if target is not None:
                names |= {self.names[target]} if target in self.names else self.sources.get(target, _NOTHING)
        return " and ".join(map(repr, sorted(names)))

    def no_batch(self, shape: torch.Size, *targets: Tensor | None) -> ValueError:
        return ValueError(
            f"the layer of {self.name_of(*targets)} must see the batch, of {self.batch.size} samples, as the first "
            f"dimension, or rows that a view made of it; got {list(shape)}"
        )

    def _generic(self, func: Callable, args: tuple, kwargs: dict, with_samples: list[Tensor]):
        targets, aliases = [], []

        def alias(tensor: Tensor) -> Tensor:
            # A node of this use's own: the samples' tensors may depend on the same parameter.
            if not self.is_target(tensor):
                return tensor
            targets.append(tensor)
            aliases.append(tensor.view_as(tensor))
            return aliases[-1]

        args, kwargs = map_tensors(alias, args), map_tensors(alias, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, (tuple, list)):
            # One output may be computed from another: its own part of the gradient arrives behind a view.
            result = map_tensors(lambda output: output.view_as(output) if output.requires_grad else output, result)
        outputs = [args[0]] if result is None else [output for output in tensors_in(result) if output.requires_grad]
        used = [get_gradient_edge(tensor) for tensor in aliases]
        self.batch.note(func, args, kwargs, with_samples, outputs)
        for output in outputs:
            place = self._generic_place(func, args, output)
            if place is None:
                raise self.no_batch(output.shape, *targets)
            self.batch.put(output, place)
            self.expect(*targets)
            self.observe(output, targets, self._vector_jacobian_products(output, place, targets, used))
        return result

    def _vector_jacobian_products(self, output: Tensor, place: Place, targets: list[Tensor], used: list[GradientEdge]):
        edge = get_gradient_edge(output)
        shapes = [target.shape for target in targets]
        by_sample = functools.partial(self.batch.by_sample, place=place)

        def vjp(g: Tensor) -> tuple[Tensor | None, ...]:
            return self.pull([edge], used, g)

        size = self.batch.size

        def contributions(g: Tensor) -> list[Contribution]:
            return [Generic(g, size, shape, by_sample, vjp, i) for i, shape in enumerate(shapes)]

        return contributions

    def _generic_place(self, func: Callable, args: tuple, output: Tensor) -> Place | None:
        batch = self.batch
        if func in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
            # Outputs are [T, B, H] or [B, T, H], states [layers, B, H]; the arguments end with batch_first.
            x = args[0]
            if x.ndim != 3 or batch.size not in (1, x.shape[0 if args[-1] else 1]) or batch.place(x) != 1 - args[-1]:
                return None
            return 0 if args[-1] and output.shape[:2] == x.shape[:2] else 1
        if batch.inside_attention and func is not torch.cat:
            if output.ndim and output.shape[0] == batch.size:
                return 0
            return ROWS if output.ndim and output.shape[0] % max(batch.size, 1) == 0 else None
        return batch.place(output)

    def observe(
        self, output: Tensor, targets: list[Tensor], contributions: Callable[[Tensor], list[Contribution]]
    ) -> None:
        """In the backward, contributions(gradient of output) are what this use gives each of the targets."""
        observer = Observer(self, targets, contributions)
        self.observers.add(observer)
        output.register_hook(observer)
        output.grad_fn.metadata["fastmix.per_sample"] = self

    # The backward

    def receive(self, target: Tensor, contribution: Contribution, *, need_total: bool) -> Tensor | None:
        """Takes in what one use gives `target`; returns its summed gradient if that is needed."""
        if self.is_spent:
            return contribution.total().view(target.shape).to(target.dtype)
        self.fired = True
        names = self.sources[target]
        (name, *others) = names
        if not self.collecting and not others and target is self.leaves[name] and self.uses_expected[name] <= 1:
            if need_total:
                total, norm_sq = contribution.total_with_norm()
                self._note(name, norm_sq, contribution.fused)
                return total.view(target.shape).to(target.dtype)
            self._note(name, contribution.norm_sq(), contribution.alone)
            return None
        for name in names:
            carried = self._carry(target, contribution, name)
            if self.collecting or self.uses_expected[name] > 1:
                use = carried if self.collecting and not self.sharded else carried.without_graph()
                self.uses[name].append(use.kept() if self.keeping else use)
            else:
                self._note(name, carried.norm_sq(), carried.alone)
        total = need_total and not self.collecting
        return contribution.total().view(target.shape).to(target.dtype) if total else None

    def _carry(self, target: Tensor, contribution: Contribution, name: str) -> Contribution:
        parameter = self.leaves[name]
        if target is parameter:
            return contribution

        isometric = target._base is parameter and parameter.is_contiguous() and is_injective(target)

        def pull(grad: Tensor) -> Tensor:
            grad = grad.view(target.shape)
            if isometric:  # which needs no graph
                whole = grad.new_zeros(parameter.shape)
                offset = target.storage_offset() - parameter.storage_offset()
                whole.as_strided(target.shape, target.stride(), offset).copy_(grad)
                return whole
            (found,) = self.pull([target], [parameter], grad.to(target.dtype))
            return grad.new_zeros(parameter.shape) if found is None else found.to(grad.dtype)

        return Derived(contribution, pull, parameter.shape, isometric)

    def pull(self, outputs: list, inputs: list, grad: Tensor) -> tuple[Tensor | None, ...]:
        """A vector-Jacobian product through a part of the graph, inside the backward or beside it."""
        self.pulling = True
        try:
            create_graph = torch.is_grad_enabled()
            return run_grad(outputs, inputs, [grad], True, create_graph, allow_unused=True)
        finally:
            self.pulling = False

    def _note(self, name: str, norm_sq: Tensor, method: str) -> None:
        if name in self.norm_sq:
            raise RuntimeError(f"the backward used {name!r} more often than the forward inside the block")
        self.norm_sq[name] = norm_sq
        self.methods[name] = method

    def collect(
        self,
        outputs: Sequence[Tensor | GradientEdge],
        grads: Sequence[Tensor | None] | None = None,
        *,
        create_graph: bool = False,
        keep: bool = False,
    ) -> dict[str, list[Contribution]]:
        """Name → what the parameter's uses give a backward of outputs from grads or ones, maybe kept; .grad stays."""
        self.check_uses(outputs)
        self.uses.clear()
        self.running, self.retain, self.collecting, self.keeping = True, True, True, keep
        try:
            with self.pass_by() if create_graph else self:  # for the second forward of checkpoints
                run_grad(outputs, list(self.leaves.values()), grads, True, create_graph, allow_unused=True)
            return dict(self.uses)
        finally:
            self.running = self.collecting = self.keeping = self.fired = False
            self.uses = defaultdict(list)

    @contextlib.contextmanager
    def pass_by(self) -> Iterator[None]:
        """For functions of our own that need gradients."""
        passing, self.passing = self.passing, True
        try:
            yield
        finally:
            self.passing = passing

    @property
    def is_spent(self) -> bool:
        """Whether a backward that runs is an ordinary one."""
        return self.penalised is not None and not self.collecting

    def check_uses(self, outputs: Sequence[Tensor | GradientEdge]) -> None:
        """Raises if a tensor without samples leads to the outputs in a way that was not recorded."""
        if not self.uses_recorded:
            return  # a second backward through the same graph
        followed = {get_gradient_edge(leaf).node: name for name, leaf in self.leaves.items()}
        found: dict[Node, int] = defaultdict(int)
        for node in nodes_below(outputs, lambda node: "fastmix.sources" in node.metadata):
            for parent, _ in node.next_functions:
                if parent in followed or (parent is not None and "fastmix.sources" in parent.metadata):
                    found[parent] += 1
        for node, count in found.items():
            if count > self.uses_recorded[node]:
                name = followed.get(node) or node.metadata["fastmix.sources"]
                raise RuntimeError(
                    f"a use of {name!r} was not recorded: a parameter must reach the loss through PyTorch's functions, "
                    "called inside the block; an autograd Function of one's own or a scripted one hides it"
                )

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """For computations of our own, which the forward's bookkeeping must not see."""
        running, self.running = self.running, True
        try:
            with at_rest():
                yield
        finally:
            self.running = running

    def follows(self, parameters: dict[str, torch.nn.Parameter]) -> bool:
        """Whether these are the recorded ones, sharded or not, under whatever names."""
        names = {id(p): name for own in (self.parameters, self.leaves) for name, p in own.items()}
        return {names.get(id(p)) for p in parameters.values()} == self.parameters.keys()

    def finish(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Squared norms and methods of the backward that ended, by parameter; the next one starts afresh."""
        with self.at_rest():
            for name, uses in self.uses.items():
                use = combine(uses)
                self._note(name, use.norm_sq(), use.alone)
        found = self.norm_sq, self.methods
        self.norm_sq, self.methods, self.uses = {}, {}, defaultdict(list)
        self.fired = False
        if not self.retain:
            self.batch, self.uses_expected, self.uses_recorded = Batch(), defaultdict(int), defaultdict(int)
        return found

    def check_backward(self) -> None:
        """Of the backward that runs."""
        self.check_open()
        if torch.is_grad_enabled() and not self.collecting:
            raise RuntimeError("create_graph=True is not served inside grad_norms: the norms are not differentiable")

    def check_open(self) -> None:
        if self.closed and not self.collecting:
            raise RuntimeError(
                "this backward belongs to a grad_norms block that has ended: call backward inside the block"
            )

    def release(self) -> None:
        """Lets go of the graph."""
        for observer in self.observers:
            observer.release()
        self.observers.clear()
        self.uses.clear()
