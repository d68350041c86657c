"""In-place replacement of a peer's modules: what every integration shares.

A module is replaced by giving the object another class: a subclass of the peer's that overrides `forward` and adds no
state. Parameters, buffers, state-dict keys, hooks and sharing stay the module's own, a copy or a pickle of the model
stays replaced, and restoring needs no bookkeeping: the class is all that differs.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn


def no_obstacle(module: nn.Module) -> str | None:
    return None


def every_module(module: nn.Module) -> bool:
    return True


@dataclass(frozen=True)
class Replacement:
    """Modules of exactly the class `original` become `accelerated`.

    accelerated is a subclass of original, in a module of its own file's top level (so that it pickles), without
    further state. obstacle(module) says why a module of this class can't be replaced, or None. Modules of which
    concerns(module) is false do another job under the same class, and are passed over. masks_from is the class of
    models whose attention implementation decides which masks the modules get (`_masks.py`).
    """

    original: type[nn.Module]
    accelerated: type[nn.Module]
    what: str
    obstacle: Callable[[nn.Module], str | None] = no_obstacle
    concerns: Callable[[nn.Module], bool] = every_module
    masks_from: type[nn.Module] | None = None

    def __str__(self) -> str:
        return f"{self.original.__name__} → {self.what}"


@dataclass(frozen=True)
class Report:
    """What of a model fastmix computes. True if there is anything; its text is a table.

    Attributes:
        replaced: module name → what it was and what computes it now. A module with two names is there twice.
        kept: module name → why a module of a kind that fastmix replaces was left alone.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.replaced)

    def __str__(self) -> str:
        parts = [_table(f"fastmix computes {_count(self.replaced)}:", self.replaced)]
        if self.kept:
            parts.append(_table(f"left alone, {_count(self.kept)}:", self.kept))
        return "\n".join(parts)


def load_replacements(integration: str, peers: Mapping[str, str]) -> tuple[Replacement, ...]:
    """The REPLACEMENTS of an integration's private modules whose peer is installed; peers is module → import name."""
    installed = [module for module, peer in peers.items() if importlib.util.find_spec(peer)]
    if not installed:
        names = " or ".join(dict.fromkeys(peers.values()))
        raise ImportError(f"fastmix.integrations.{integration} needs {names}: pip install fastmix[{integration}]")
    modules = [importlib.import_module(f"fastmix.integrations.{name}") for name in installed]
    return tuple(replacement for module in modules for replacement in module.REPLACEMENTS)


def replace(model: nn.Module, replacements: Sequence[Replacement], peer: str) -> Report:
    """Replaces in place; the report names all modules that are replaced now, by this call or an earlier one."""
    report = Report()
    for name, module, replacement in _candidates(model, replacements):
        if type(module) is replacement.accelerated:
            report.replaced[name] = str(replacement)
        elif reason := _obstacle(module, replacement):
            report.kept[name] = reason
        else:
            module.__class__ = replacement.accelerated
            report.replaced[name] = str(replacement)
    if not report:
        looked_for = ", ".join(map(str, replacements))
        found = f"; found but left alone: {_sentence(report.kept)}" if report.kept else ""
        raise ValueError(f"model has nothing that fastmix replaces in {peer}; looked for {looked_for}{found}")
    return report


def put_back(model: nn.Module, replacements: Sequence[Replacement]) -> None:
    """Undoes `replace`."""
    for _, module, replacement in _candidates(model, replacements):
        if type(module) is replacement.accelerated:
            module.__class__ = replacement.original


def _candidates(model: nn.Module, replacements: Sequence[Replacement]) -> Iterator[tuple[str, nn.Module, Replacement]]:
    """Every module, under each of its names, that is of a replacement's class or of a subclass."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules(remove_duplicate=False):
        for replacement in replacements:
            if isinstance(module, replacement.original) and replacement.concerns(module):
                yield name, module, replacement


def _obstacle(module: nn.Module, replacement: Replacement) -> str | None:
    if type(module) is not replacement.original:
        return f"{type(module).__name__}, a subclass of {replacement.original.__name__}"
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    return replacement.obstacle(module)


def _count(entries: dict[str, str]) -> str:
    return f"{len(entries)} module{'' if len(entries) == 1 else 's'}"


def _sentence(entries: dict[str, str]) -> str:
    return ", ".join(f"{name or '(the model)'} ({reason})" for name, reason in entries.items())


def _table(title: str, entries: dict[str, str]) -> str:
    rows = {name or "(the model)": text for name, text in entries.items()}
    width = max(map(len, rows), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows.items())])
