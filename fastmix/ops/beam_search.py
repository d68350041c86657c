"""Trie-masked beam search, one step: public function, schema, fake, and what a GPU needs allocated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastmix import _library
from fastmix.ops._check import check_choice, check_float, check_same_device, check_tensor, dtype_name, shape_text
from fastmix.ops._route import call, kernel_answers, note_kernels
from fastmix.reference import beam_search as reference

_NORMALIZE = {None: 0, "vocab": 1, "allowed": 2}
MAX_EOS = 16  # they travel to a GPU by value


class BeamStep(NamedTuple):
    """The best candidates of a step, [B, num_candidates] each; what does not exist is −inf, 0, −1, −1."""

    scores: Tensor
    beam_index: Tensor
    token: Tensor
    node: Tensor


class Trie(Protocol):
    """What the op needs of a `fastmix.Trie`."""

    arena: Tensor
    num_tries: int
    vocab_size: int


class Reweighing(Protocol):
    """A candidate_bias that changes log-probabilities otherwise than by a sum."""

    def reweigh(
        self, logits: Tensor, nodes: Tensor, trie: Trie, normalize: str | None
    ) -> tuple[Tensor, str | None]: ...


def trie_beam_step(
    logits: Tensor,
    beam_scores: Tensor,
    nodes: Tensor,
    trie: Trie,
    *,
    num_candidates: int,
    eos_token_id: int | Sequence[int],
    normalize: str | None = "vocab",
    candidate_bias: Tensor | Reweighing | None = None,
) -> BeamStep:
    """One step of beam search under a prefix tree: log-softmax, the children's scores and their top-k in one pass.

    score(k, v) = beam_scores[k] + log p(v | k) + candidate_bias[k, v], for the tokens v of the children of nodes[k],
    and for the EOS tokens where a key ends. The candidates come ordered by score (descending), then beam, then token
    (ascending), exactly as their float32 scores say; of the same token, the end of the key comes before the child.
    It has no gradient.

    Args:
        logits: [B, K, V], float32, bfloat16, float16 or float64, rows of any stride. V may exceed the vocabulary.
        beam_scores: [B, K] sums of log-probabilities so far; −inf is a dead beam. Computed with as float32
            (float64 for float64 logits).
        nodes: int64 [B, K], from `Trie.roots`, `Trie.walk` or a previous step; −1 is a dead beam, as is any other
            value that is no node.
        trie: a `Trie` on the device of logits: one for all samples, or B of them (`Trie.concat`), one a sample.
        num_candidates: how many to return a sample, at least 1.
        eos_token_id: the EOS token, or a list of at most 16 (an empty one: ends of keys are no candidates).
        normalize: "vocab" (log-softmax over V), "allowed" (over the beam's own candidates) or None (logits as they
            are).
        candidate_bias: float, broadcastable to [B, K, V], added after the normalisation; or the result of
            `fastmix.generation.lookahead_bias`.

    Returns:
        (scores, beam_index, token, node), [B, num_candidates] each: float32 (float64), and int64. The node of an EOS
        is −1. Where there are fewer candidates, score −inf, beam 0, token −1, node −1. A score of −inf or NaN is none.

    Raises:
        TypeError: a dtype is none of those named.
        ValueError: a shape, a device or `normalize` is none of those named, V is smaller than the vocabulary, an EOS
            is outside 0..V−1, or the number of tries is neither 1 nor B.
    """
    check_float("logits", logits)
    if logits.ndim != 3:
        raise ValueError(f"logits must be [B, K, V], got {shape_text(logits)}")
    batch, beams, width = logits.shape
    _check_rows("beam_scores", beam_scores, logits)
    check_float("beam_scores", beam_scores)
    _check_rows("nodes", nodes, logits)
    if nodes.dtype != torch.int64:
        raise TypeError(f"nodes must be int64, got {dtype_name(nodes.dtype)}")
    _check_trie(trie, logits)
    if not isinstance(num_candidates, int) or num_candidates < 1:
        raise ValueError(f"num_candidates must be a positive int, got {num_candidates!r}")
    check_choice("normalize", normalize, tuple(_NORMALIZE))
    eos = eos_token_ids(eos_token_id, width)
    if candidate_bias is not None and not isinstance(candidate_bias, Tensor):
        if not hasattr(candidate_bias, "reweigh"):
            raise TypeError(
                f"candidate_bias must be a Tensor or the result of lookahead_bias, got {type(candidate_bias).__name__}"
            )
        logits, normalize = candidate_bias.reweigh(logits, nodes, trie, normalize)
        candidate_bias = None
    if candidate_bias is not None:
        candidate_bias = _expanded_bias(candidate_bias, logits)
    if kernel_answers("trie_beam_step", logits):
        bias = None if candidate_bias is None else candidate_bias.float().expand(batch, beams, width)
        return BeamStep(
            *call(
                torch.ops.fastmix.trie_beam_step.default,
                logits,
                beam_scores,
                nodes,
                trie.arena,
                num_candidates,
                eos,
                _NORMALIZE[normalize],
                bias,
            )
        )
    if candidate_bias is not None:
        candidate_bias = candidate_bias.expand(batch, beams, width)
    return BeamStep(
        *reference.trie_beam_step(
            logits,
            beam_scores,
            nodes,
            trie.arena,
            num_candidates=num_candidates,
            eos_token_ids=eos,
            normalize=normalize,
            candidate_bias=candidate_bias,
        )
    )


def eos_token_ids(eos_token_id: int | Sequence[int], width: int) -> list[int]:
    """The distinct EOS tokens, ascending, checked against the width of the logits."""
    if not isinstance(eos_token_id, int) and not hasattr(eos_token_id, "__iter__"):
        raise TypeError(f"eos_token_id must be an int or a list of ints, got {type(eos_token_id).__name__}")
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    if not all(isinstance(token, int) and 0 <= token < width for token in eos):
        raise ValueError(f"eos_token_id must be in 0..V−1 = 0..{width - 1}, got {eos_token_id!r}")
    if len(eos) > MAX_EOS:
        raise ValueError(f"eos_token_id must be at most {MAX_EOS} tokens, got {len(eos)}")
    return sorted(set(eos))


def _check_rows(name: str, value: Tensor, logits: Tensor) -> None:
    check_tensor(name, value)
    if value.shape != logits.shape[:2]:
        raise ValueError(f"{name} must be [B, K] = {list(logits.shape[:2])}, got {shape_text(value)}")
    check_same_device(name, value, "logits", logits)


def _check_trie(trie: Trie, logits: Tensor) -> None:
    if not isinstance(getattr(trie, "arena", None), Tensor):
        raise TypeError(f"trie must be a fastmix.Trie, got {type(trie).__name__}")
    check_same_device("trie", trie.arena, "logits", logits)
    batch, _, width = logits.shape
    if trie.num_tries not in (1, batch):
        raise ValueError(f"trie must hold one trie or B = {batch}, got {trie.num_tries}")
    if width < trie.vocab_size:
        raise ValueError(f"logits must have at least the trie's vocabulary of {trie.vocab_size}, got V = {width}")


def _expanded_bias(bias: Tensor, logits: Tensor) -> Tensor:
    """bias with three dimensions, each of them that of logits or 1."""
    check_float("candidate_bias", bias)
    check_same_device("candidate_bias", bias, "logits", logits)
    sizes = (1,) * (3 - bias.ndim) + tuple(bias.shape)
    if len(sizes) > 3 or any(size not in (1, full) for size, full in zip(sizes, logits.shape, strict=True)):
        raise ValueError(
            f"candidate_bias must be broadcastable to [B, K, V] = {shape_text(logits)}, got {shape_text(bias)}"
        )
    return bias.reshape(sizes)


torch.library.define(
    "fastmix::trie_beam_step",
    "(Tensor logits, Tensor beam_scores, Tensor nodes, Tensor arena, int num_candidates, int[] eos_token_ids, "
    "int normalize, Tensor? bias) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("fastmix::trie_beam_step")
def _(logits, beam_scores, nodes, arena, num_candidates, eos_token_ids, normalize, bias):
    shape = (logits.shape[0], num_candidates)
    integers = [nodes.new_empty(shape) for _ in range(3)]
    return logits.new_empty(shape, dtype=torch.float32), *integers


def _no_gradient(ctx, *grads):
    raise RuntimeError("trie_beam_step has no gradient; call it under torch.no_grad()")


torch.library.register_autograd("fastmix::trie_beam_step", _no_gradient, setup_context=lambda ctx, inputs, output: None)


# Allocated here, so that running out of a GPU's memory is torch.OutOfMemoryError.
def _trie_beam_step_cuda(logits, beam_scores, nodes, arena, num_candidates, eos_token_ids, normalize, bias):
    batch, beams, width = logits.shape
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    size = workspace_bytes(batch, beams, width, logits.element_size(), num_candidates)
    workspace = arena.new_empty(size)
    scores = logits.new_empty((batch, num_candidates), dtype=torch.float32)
    outputs = [scores, *(nodes.new_empty((batch, num_candidates)) for _ in range(3))]
    torch.ops.fastmix.trie_beam_step_out.default(
        logits,
        beam_scores.float().contiguous(),
        nodes.contiguous(),
        arena,
        num_candidates,
        eos_token_ids,
        normalize,
        bias,
        workspace,
        *outputs,
    )
    return tuple(outputs)


def workspace_bytes(batch: int, beams: int, width: int, element_bytes: int, num_candidates: int) -> int:
    """What the CUDA kernels need between their launches; BeamPlan in csrc/cuda/beam_search_launch.h checks it."""
    rows = batch * beams
    lists = rows * max(1, min(2048 // max(rows, 1), width * element_bytes // 16384, 32))
    size = lists * 24 + (rows + 1) // 2 * 8
    if num_candidates <= 2048:
        return size + lists * (num_candidates + 1) * 16
    return size + batch * (4112 + 2 * num_candidates) * 12


if _library.cuda_loaded:
    torch.library.impl("fastmix::trie_beam_step", "CUDA", _trie_beam_step_cuda)
note_kernels("trie_beam_step")
