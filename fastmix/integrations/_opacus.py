"""Opacus' engines, optimizers and models accelerated in place, and put back.

Imports opacus: `fastmix.integrations.opacus` does so when asked.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from weakref import WeakKeyDictionary, WeakSet

from opacus import PrivacyEngine
from opacus.grad_sample import (
    AbstractGradSampleHooks,
    GradSampleHooks,
    GradSampleHooksFastGradientClipping,
    GradSampleModule,
    GradSampleModuleFastGradientClipping,
)
from opacus.optimizers import DPOptimizer
from opacus.utils.adaptive_clipping.adaptive_clipping_utils import PrivacyEngineAdaptiveClipping

from fastmix.integrations._opacus_forward import RecordedForward, inner_model, recorded_forward
from fastmix.integrations._opacus_optimizers import ACCELERATED

_MODES = ("hooks", "functorch", "ghost")
_HOOKS = (
    GradSampleHooks,
    GradSampleModule,
    GradSampleHooksFastGradientClipping,
    GradSampleModuleFastGradientClipping,
)
_OPTIMIZER_OF = {accelerated: original for original, accelerated in ACCELERATED.items()}
_accelerated: WeakSet[DPOptimizer] = WeakSet()


class _Engine(PrivacyEngine):
    """Accelerates what it makes private, and remembers the optimizers."""

    def make_private(self, *, module, grad_sample_mode: str = "hooks", **kwargs) -> tuple:
        if grad_sample_mode not in _MODES:
            raise TypeError(
                f"grad_sample_mode must be {_list(map(repr, _MODES))} with an accelerated engine, got "
                f"{grad_sample_mode!r}: restore the engine by fastmix.integrations.opacus.restore(engine) for others"
            )
        result = super().make_private(module=module, grad_sample_mode=grad_sample_mode, **kwargs)
        hooks, optimizer = result[:2]
        _accelerate_optimizer(optimizer, hooks)
        _made_by.setdefault(self, WeakSet()).add(optimizer)
        return result


class AcceleratedPrivacyEngine(_Engine, PrivacyEngine):
    pass


class AcceleratedPrivacyEngineAdaptiveClipping(_Engine, PrivacyEngineAdaptiveClipping):
    pass


_ENGINES = {
    PrivacyEngine: AcceleratedPrivacyEngine,
    PrivacyEngineAdaptiveClipping: AcceleratedPrivacyEngineAdaptiveClipping,
}
_ENGINE_OF = {accelerated: original for original, accelerated in _ENGINES.items()}
_made_by: WeakKeyDictionary[PrivacyEngine, WeakSet[DPOptimizer]] = WeakKeyDictionary()


def accelerate(target: PrivacyEngine | DPOptimizer) -> None:
    _check_class(target)
    kind = type(target)
    if kind in _ENGINE_OF or kind in _OPTIMIZER_OF:
        raise RuntimeError("privacy_engine_or_optimizer is accelerated already: accelerate it once")
    if not isinstance(target, PrivacyEngine):
        _accelerate_optimizer(target, _hooks_of(target))
        return
    if kind not in _ENGINES:
        raise TypeError(f"privacy_engine_or_optimizer is a {kind.__name__}; served are {_names(_ENGINES)}")
    if target.dataset is not None:
        raise RuntimeError("this engine has made a model private already: accelerate the optimizer that it returned")
    target.__class__ = _ENGINES[kind]


def restore(target: PrivacyEngine | DPOptimizer) -> None:
    _check_class(target)
    if type(target) in _OPTIMIZER_OF:
        _restore_optimizers(target._recorded_hooks)
    if type(target) in _ENGINE_OF:
        for optimizer in _made_by.pop(target, ()):
            restore(optimizer)
        target.__class__ = _ENGINE_OF[type(target)]


def _check_class(target: object) -> None:
    if not isinstance(target, (PrivacyEngine, DPOptimizer)):
        raise TypeError(
            f"privacy_engine_or_optimizer must be an opacus PrivacyEngine or DPOptimizer, got {type(target).__name__}"
        )


def _accelerate_optimizer(optimizer: DPOptimizer, hooks: AbstractGradSampleHooks) -> None:
    if type(optimizer) not in ACCELERATED:
        raise TypeError(f"the optimizer is a {type(optimizer).__name__}; served are {_names(ACCELERATED)}")
    if type(hooks) not in _HOOKS:
        raise TypeError(f"the model was made private by a {type(hooks).__name__}; served are {_names(_HOOKS)}")
    if recorded_forward(hooks) is None:
        RecordedForward(hooks).attach()
    optimizer.__class__ = ACCELERATED[type(optimizer)]
    optimizer._recorded_hooks = hooks
    _accelerated.add(optimizer)


def _restore_optimizers(hooks: AbstractGradSampleHooks) -> None:
    """All of one model, which has one kind of hooks."""
    for optimizer in [each for each in _accelerated if each._recorded_hooks is hooks]:
        optimizer.__class__ = _OPTIMIZER_OF[type(optimizer)]
        del optimizer._recorded_hooks
        _accelerated.remove(optimizer)
    recorded = recorded_forward(hooks)
    if recorded is not None:
        recorded.detach()


def _hooks_of(optimizer: DPOptimizer) -> AbstractGradSampleHooks:
    """The GradSampleModule of the optimizer's parameters. Nothing of Opacus leads from these to it."""
    parameters = set(optimizer.params)
    found = []
    for hooks in gc.get_objects():
        if AbstractGradSampleHooks in type(hooks).__mro__ and "_module" in vars(hooks) | vars(hooks).get(
            "_modules", {}
        ):
            is_active = type(hooks) not in _HOOKS or "autograd_grad_sample_hooks" in vars(hooks)
            if is_active and parameters <= set(inner_model(hooks).parameters()):
                found.append(hooks)
    if len(found) != 1:
        raise ValueError(
            f"the optimizer's parameters must belong to one GradSampleModule, as make_private returns it, found "
            f"{len(found)}"
        )
    return found[0]


def _names(classes: Iterable[type]) -> str:
    return _list(each.__name__ for each in classes)


def _list(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}"
