"""fastmix inside timm, without touching its code: the token mixing of MLP-Mixer, ResMLP and gMLP."""

from __future__ import annotations

from torch import nn

from fastmix.integrations._replace import Replacement, Report, load_replacements, put_back, replace

__all__ = ["accelerate", "restore"]


def accelerate(model: nn.Module) -> Report:
    """Replaces, in place, the token mixing of a timm model (``mixer_*``, ``resmlp_*``, ``gmlp_*``).

    The token half of ``MixerBlock`` becomes :func:`fastmix.token_mixing_mlp`, that of ``ResBlock`` and the whole
    ``SpatialGatingUnit`` of a ``SpatialGatingBlock`` :func:`fastmix.token_linear`: the same functions, with the norm
    before and the sum or gate after. Channel MLPs stay timm's. Stochastic depth drops the same paths as timm from the
    same random state. The state dict, the modules' hooks and the model's own code stay as they are; a second call
    changes nothing, and copies and pickles of the model stay accelerated. Subclasses, and blocks with another MLP
    (``GluMlp``), norm or activation than the kernels know, are left alone. So are those whose inner modules carry
    hooks or were exchanged (LoRA), also if that happens later; and a block computes as timm does while dropout is
    active in its token MLP.

    Args:
        model: a timm model, or any module that contains parts of one.

    Returns:
        What fastmix computes in the model now: true if anything, printable, ``.replaced`` maps each module's name to
        what replaced it, ``.kept`` the name of each that was left alone to the reason.

    Raises:
        TypeError: model is not a module.
        ValueError: model has nothing to replace.
        ImportError: timm is not installed.
    """
    return replace(model, _replacements(), "timm models")


def restore(model: nn.Module) -> None:
    """Undoes :func:`accelerate`, in place; changes nothing in a model that was not accelerated.

    Args:
        model: the model, or a copy of it, accelerated or not.

    Returns:
        None.

    Raises:
        TypeError: model is not a module.
        ImportError: timm is not installed.
    """
    put_back(model, _replacements())


def _replacements() -> tuple[Replacement, ...]:
    return load_replacements("timm", {"_timm": "timm"})
