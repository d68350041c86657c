"""fastmix inside transformers' models, without touching their code: FNet's Fourier transform."""

from __future__ import annotations

from torch import nn

from fastmix.integrations._replace import Replacement, Report, put_back, replace

__all__ = ["accelerate", "restore"]


def accelerate(model: nn.Module) -> Report:
    """Replaces, in place, the modules of a transformers model for which fastmix has kernels.

    ``FNetBasicFourierTransform`` becomes :func:`fastmix.fourier_mixing`: the same function, Re(fft2) over tokens and
    channels, also in bfloat16 and float16, in which torch.fft refuses or, under autocast, answers in float32: fastmix
    keeps the input's dtype. The state dict, the modules' hooks and the model's own code stay as they are;
    a second call changes nothing, and copies and pickles of the model stay accelerated. Subclasses, and modules
    whose forward or Fourier transform was exchanged, are left alone.

    Args:
        model: a transformers model, or any module that contains parts of one.

    Returns:
        What fastmix computes in the model now: true if anything, printable, ``.replaced`` maps each module's name to
        what replaced it, ``.kept`` the name of each that was left alone to the reason.

    Raises:
        TypeError: model is not a module.
        ValueError: model has nothing to replace.
        ImportError: transformers is not installed.
    """
    return replace(model, _replacements(), "transformers models")


def restore(model: nn.Module) -> None:
    """Undoes :func:`accelerate`, in place; changes nothing in a model that was not accelerated.

    Args:
        model: the model, or a copy of it, accelerated or not.

    Returns:
        None.

    Raises:
        TypeError: model is not a module.
        ImportError: transformers is not installed.
    """
    put_back(model, _replacements())


def _replacements() -> tuple[Replacement, ...]:
    try:
        from fastmix.integrations import _fnet
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        raise ImportError(
            "fastmix.integrations.transformers needs transformers: pip install fastmix[transformers]"
        ) from error
    return _fnet.REPLACEMENTS
