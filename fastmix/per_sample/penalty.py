"""The mean squared norm of per-sample gradients, to be trained through."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from fastmix.per_sample._contributions import combine, real
from fastmix.per_sample._distributed import Processes, check_kind
from fastmix.per_sample._observer import recorder_of
from fastmix.per_sample._recorder import Recorder
from fastmix.per_sample.norms import check_losses


def parameter_gradient_penalty(model: nn.Module, per_sample_losses: Tensor) -> Tensor:
    """Gradient penalty on the parameters: mean_i ‖∇_θ L_i‖², to be trained through.

    ::

        with fastmix.per_sample.grad_norms(model) as norms:
            losses = criterion(model(x), y)  # one for each sample
            penalty = fastmix.per_sample.parameter_gradient_penalty(model, losses)
        (losses.mean() + 0.1 * penalty).backward()
        norms.total  # [B]: the ‖∇_θ L_i‖ that the penalty found

    Losses from a forward inside a `grad_norms` block take one backward with a graph, from whose parts, each layer's
    input and the gradient of its output, the norms are computed; those of an ordinary forward are served too, exactly
    but slowly, by a backward for each sample. Either is differentiated by a second backward through the model, in the
    block or after it; the block records no other backward then, and its norms are the penalty's. `.grad` stays as it
    is, and no root is taken, so that a sample without a gradient gives no NaN. On several processes the mean is over a
    process's samples.

    Args:
        model: whose parameters θ that require a gradient are followed.
        per_sample_losses: [B], sample i's loss in place i.

    Returns:
        A scalar, float32 (float64 for float64 models); 0 for an empty batch.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the losses are not [B] or do not depend on a trainable parameter of the model, the model has no
            trainable parameter or is sharded, or a part of it is checkpointed in the block.
        RuntimeError: a function of the model has no double backward, such as PyTorch's flash attention on a CPU;
            ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` and :func:`fastmix.scaled_attention` have one.

    Drucker and Le Cun, Improving Generalization Performance Using Double Backpropagation (1992).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_kind(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("model must have a parameter that requires a gradient, got none")
    recorder = recorder_of(per_sample_losses, parameters) if isinstance(per_sample_losses, Tensor) else None
    check_losses(per_sample_losses, recorder.batch.size if recorder else None)
    if Processes.of(model, parameters).sharded:
        raise ValueError("model must not be sharded by fully_shard, which frees what a second backward needs")
    if recorder is None:
        squares = _of_each_loss(list(parameters.values()), per_sample_losses)
    else:
        squares = _of_recorded(recorder, per_sample_losses)
    if not squares:
        raise ValueError("per_sample_losses must depend on a parameter of model that requires a gradient")
    return torch.stack(squares).sum() / max(len(per_sample_losses), 1)


def _of_each_loss(parameters: list[Tensor], losses: Tensor) -> list[Tensor]:
    """‖∇_p L_i‖² of each loss and parameter."""
    squares = []
    for loss in losses.unbind() or [losses.sum()]:
        grads = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        squares += [_square(grad) for grad in grads if grad is not None]
    return squares


def _square(grad: Tensor) -> Tensor:
    grad = grad.to_dense() if grad.is_sparse else grad
    return real(grad.to(torch.promote_types(grad.dtype, torch.float32))).square().sum()


def _of_recorded(recorder: Recorder, losses: Tensor) -> list[Tensor]:
    """Σ_i ‖∇_p L_i‖² of each parameter."""
    with torch.enable_grad(), recorder.pass_by():
        try:
            found = recorder.collect([losses], [torch.ones_like(losses)], create_graph=True)
        except CheckpointError as error:
            raise ValueError(
                "model must not be checkpointed where a penalty is taken in a grad_norms block: use the losses of an "
                "ordinary forward"
            ) from error
        uses = {name: combine(of) for name, of in found.items()}
        norm_sq = {name: use.norm_sq() for name, use in uses.items()}
    methods = {name: use.alone for name, use in uses.items()}
    recorder.penalised = len(losses), {name: squared.detach() for name, squared in norm_sq.items()}, methods
    return [squared.sum() for squared in norm_sq.values()]
