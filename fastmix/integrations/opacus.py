"""fastmix inside Opacus, without touching its code: clipped gradients of differentially private training."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opacus import PrivacyEngine
    from opacus.optimizers import DPOptimizer

__all__ = ["accelerate", "restore"]


def accelerate(privacy_engine_or_optimizer: PrivacyEngine | DPOptimizer) -> None:
    """Lets an Opacus run take its per-sample norms and clipped gradients from fastmix, in one backward.

    ::

        engine = PrivacyEngine()
        fastmix.integrations.opacus.accelerate(engine)  # before make_private, or accelerate(optimizer) behind it
        model, optimizer, loader = engine.make_private(module=model, optimizer=optimizer, data_loader=loader, …)

    The rest of the script stays as it is. Modes "hooks", "functorch" and "ghost" give Opacus' clipped gradients, with
    its flat, per-layer and adaptive clipping, also distributed, in virtual steps (``BatchMemoryManager``) and for empty
    Poisson batches; noise, accountant, schedulers and checkpoints are Opacus' own. The model's forward runs under the
    recorder of :func:`fastmix.per_sample.grad_norms` in the place of Opacus' hooks, and the backward computes no
    gradient of a weight: `.grad` is filled by ``optimizer.step()`` (by ``loss.backward()`` in ghost mode, which runs no
    second backward). `grad_sample` holds no tensor but what the samples' gradients are made of. Parameters may be tied,
    and the model's inputs may require gradients. Only calls of the whole model are recorded, not those of a part of it.

    Args:
        privacy_engine_or_optimizer: a ``PrivacyEngine``, whose ``make_private`` and ``make_private_with_epsilon`` will
            return accelerated objects; or the ``DPOptimizer`` that they returned.

    Returns:
        None.

    Raises:
        TypeError: the argument is something else, or of a class that is not served (FSDP, expanded weights, a subclass
            of one's own); ``make_private`` raises it for such a mode.
        ValueError: the optimizer's parameters belong to no GradSampleModule, or to several.
        RuntimeError: the argument is accelerated already, or an engine has made a model private already. In the
            step: Opacus' hooks were removed and added again.
        ImportError: opacus is not installed.

    Abadi et al., Deep Learning with Differential Privacy (arXiv:1607.00133); Yousefpour et al., Opacus
    (arXiv:2109.12298).
    """
    _implementation().accelerate(privacy_engine_or_optimizer)


def restore(privacy_engine_or_optimizer: PrivacyEngine | DPOptimizer) -> None:
    """Undoes :func:`accelerate`: Opacus' hooks and classes are back; changes nothing in what was not accelerated.

    Args:
        privacy_engine_or_optimizer: an engine, with all optimizers and models that it made private since, or an
            optimizer with its model and the other optimizers of this model.

    Returns:
        None.

    Raises:
        TypeError: the argument is no ``PrivacyEngine`` or ``DPOptimizer``.
        ImportError: opacus is not installed.
    """
    _implementation().restore(privacy_engine_or_optimizer)


def _implementation():
    if importlib.util.find_spec("opacus") is None:
        raise ImportError("fastmix.integrations.opacus needs opacus: pip install fastmix[per-sample]")
    from fastmix.integrations import _opacus

    return _opacus
