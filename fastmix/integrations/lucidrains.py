"""fastmix inside mlp-mixer-pytorch and g-mlp-pytorch, without touching their code."""

from __future__ import annotations

from torch import nn

from fastmix.integrations._replace import Replacement, Report, load_replacements, put_back, replace

__all__ = ["accelerate", "restore"]


def accelerate(model: nn.Module) -> Report:
    """Replaces, in place, the token mixing of an MLPMixer, MLPMixer3D, gMLP or gMLPVision.

    A mixer's ``PreNormResidual`` around a token MLP becomes :func:`fastmix.token_mixing_mlp`; gMLP's
    ``SpatialGatingUnit``, with heads, causal, with circulant matrices, an activation or tiny attention,
    :func:`fastmix.token_linear`: the same functions, except that under autocast the gating unit's result has the
    autocast dtype, not float32. MLPs over channels stay as they are. So do the state dict, the modules' hooks and the
    model's own code; a second call changes nothing, and copies and pickles of the model stay accelerated. Subclasses,
    and modules with another norm or activation than the kernels know, are left alone. So are those whose inner modules
    carry hooks or were exchanged, also if that happens later; and a token MLP computes as before while dropout is
    active in it.

    Args:
        model: a model of these packages, or any module that contains parts of one.

    Returns:
        What fastmix computes in the model now: true if anything, printable, ``.replaced`` maps each module's name to
        what replaced it, ``.kept`` the name of each that was left alone to the reason.

    Raises:
        TypeError: model is not a module.
        ValueError: model has nothing to replace.
        ImportError: neither package is installed.
    """
    return replace(model, _replacements(), "mlp-mixer-pytorch and g-mlp-pytorch models")


def restore(model: nn.Module) -> None:
    """Undoes :func:`accelerate`, in place; changes nothing in a model that was not accelerated.

    Args:
        model: the model, or a copy of it, accelerated or not.

    Returns:
        None.

    Raises:
        TypeError: model is not a module.
        ImportError: neither package is installed.
    """
    put_back(model, _replacements())


def _replacements() -> tuple[Replacement, ...]:
    return load_replacements("lucidrains", {"_mlp_mixer": "mlp_mixer_pytorch", "_g_mlp": "g_mlp_pytorch"})
