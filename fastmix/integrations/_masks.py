"""The attention implementation of the models around replaced attention layers: it decides what masks they get."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from fastmix.integrations._replace import Replacement

NAME = "fastmix"
_BEFORE = "_attn_implementation_before_fastmix"


def pass_structure(model: nn.Module, replacements: Sequence[Replacement]) -> None:
    """Lets models all of whose attention layers are replaced make structured masks; the others keep theirs."""
    models = [part for part in _models(model, replacements) if not hasattr(part, _BEFORE)]
    before = [part.config._attn_implementation for part in models]  # several models may share one configuration
    for part, own in zip(models, before, strict=True):
        setattr(part, _BEFORE, own)
        part.config._attn_implementation = NAME


def pass_own_masks(model: nn.Module) -> None:
    """Undoes `pass_structure`."""
    for part in model.modules():
        if hasattr(part, _BEFORE):
            part.config._attn_implementation = getattr(part, _BEFORE)
            delattr(part, _BEFORE)


def _models(model: nn.Module, replacements: Sequence[Replacement]) -> Iterator[nn.Module]:
    for part in model.modules():
        for replacement in replacements:
            if replacement.masks_from is not None and isinstance(part, replacement.masks_from):
                layers = [layer for layer in part.modules() if isinstance(layer, replacement.original)]
                if layers and all(type(layer) is replacement.accelerated for layer in layers):
                    yield part
