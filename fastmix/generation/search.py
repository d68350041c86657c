"""Beam search over a trie, for any model that can be stepped."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastmix.generation._hypotheses import (
    Hypotheses,
    TrieBeamSearchOutput,
    check_int,
    check_normalize,
    check_trie,
    first_nodes,
    score_dtype,
    take_rows,
)
from fastmix.generation.trie import Trie
from fastmix.ops._check import check_float, dtype_name, shape_text
from fastmix.ops.beam_search import BeamStep, Reweighing, eos_token_ids, trie_beam_step
from fastmix.reference._trie import TrieReader

StepFunction = Callable[[Tensor | None, Tensor | None, object], tuple[Tensor, object]]


@torch.no_grad()
def trie_beam_search(
    step_fn: StepFunction,
    trie: Trie,
    *,
    num_beams: int,
    max_length: int,
    eos_token_id: int | Sequence[int],
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return_sequences: int | None = None,
    normalize: str | None = "vocab",
    do_sample: bool = False,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    fast_forward: bool = False,
    candidate_bias: Tensor | Reweighing | None = None,
) -> TrieBeamSearchOutput:
    """The best keys of a trie under an autoregressive model, by beam search: every result is a key, followed by EOS.

    The score of a key is Σ log p(token | tokens before it) / (number of tokens, EOS counted)^length_penalty. Beams,
    finished hypotheses and the end of the search are those of transformers' beam search under an exact mask of the
    allowed tokens. With at least as many beams as keys (for several EOS ids: as pairs of key and EOS id) the answer is
    exact. ``num_beams=1`` is greedy search, and with `do_sample` ancestral sampling.

    Args:
        step_fn: ``step_fn(tokens, beam_index, state) -> (logits, state)``, the model. Its first call gets
            ``(None, None, None)`` and returns the logits [B, V] of the first token, one row a sample. Every later one
            gets int64 tokens [B, K] to append (with `fast_forward` [B, K, T]), for each of them the beam [B, K] of its
            previous call that it continues (0 in the second call, which continues the first one's single row), and
            the state that it returned; it returns logits of shape ``tokens.shape + [V]``. There are always K beams;
            dead ones get an EOS id.
        trie: the keys, without EOS; one trie for all samples or one for each.
        num_beams: K ≥ 1.
        max_length: most tokens of a result, EOS counted. Beams that it cuts are dropped: they are no keys.
        eos_token_id: one id or several, allowed where a key ends.
        length_penalty: above 0 favours long results, below 0 short ones.
        early_stopping: True stops at K finished hypotheses; False when the best beam, were it to end now, would not
            beat the worst of them; "never" when no beam can beat it at any length.
        num_return_sequences: R, 1..num_beams. Default: num_beams.
        normalize: "vocab" (log-softmax over V), "allowed" (over what the trie allows) or None (logits as they are).
        do_sample: draws candidates without replacement in proportion to exp(score), as beam sampling does, in place
            of taking the best.
        temperature: divides the logits before the normalisation; only with `do_sample`.
        generator: of the logits' device, for `do_sample`.
        fast_forward: lets tokens that the trie forces on all beams go through the model in one call with the ones
            before them: the same results from fewer calls. Reads the beams on the host after every call.
        candidate_bias: float tensor broadcastable to [B, 1, V], added to the log-probabilities of every step, or what
            `lookahead_bias` returns.

    Returns:
        The R best keys of each sample (`TrieBeamSearchOutput`); EOS is the last token of each.

    Raises:
        TypeError: an argument, or what step_fn returns, is of another type.
        ValueError: an argument is out of range, or the logits have a wrong shape or device.
    """
    check_trie(trie)
    _check_arguments(step_fn, num_beams, max_length, length_penalty, early_stopping, num_return_sequences)
    check_normalize(normalize)
    _check_bias(candidate_bias)
    _check_sampling(do_sample, temperature, generator)

    logits, state = _call(step_fn, None, None, None)
    if logits.ndim != 2:
        raise ValueError(f"step_fn's first logits must be [B, V], got {shape_text(logits)}")
    eos = eos_token_ids(eos_token_id, logits.shape[1])
    if not eos:
        raise ValueError("eos_token_id must name at least one token: without it no key ends")
    # Every beam may end in each EOS id, and K candidates must be left. One beam takes one candidate: greedy search.
    num_candidates = 1 if num_beams == 1 else (1 + len(eos)) * num_beams
    select = _Selector(trie, eos, num_candidates, normalize, candidate_bias)
    if do_sample:
        select = _Sampler(select, temperature, generator)
    search = _Search(trie, logits, select, num_beams, max_length, length_penalty, early_stopping)

    search.advance(logits[:, None])
    num_model_calls = 1
    while search.length < max_length and search.is_alive():
        tokens = search.last_tokens(fill=eos[0])
        if fast_forward:
            tokens = torch.cat([tokens[..., None], search.forced_tokens(fill=eos[0])], 2)
        new_logits, state = _call(step_fn, tokens, search.rows, state)
        _check_logits(new_logits, tokens, logits)
        num_model_calls += 1
        search.replay(new_logits if fast_forward else new_logits[:, :, None])
    rows = num_beams if num_return_sequences is None else num_return_sequences
    return search.finished.output(trie, rows, num_model_calls)


class _Search:
    """The beams and the finished hypotheses of a batch, which `advance` takes one token further."""

    def __init__(
        self,
        trie: Trie,
        logits: Tensor,
        select: _Selector | _Sampler,
        num_beams: int,
        max_length: int,
        length_penalty: float,
        early_stopping: bool | str,
    ) -> None:
        batch, device, dtype = logits.shape[0], logits.device, score_dtype(logits)
        self._trie, self._select, self._num_beams = trie, select, num_beams
        self._max_length, self._length_penalty, self._early_stopping = max_length, length_penalty, early_stopping
        self._scores = torch.zeros((batch, 1), dtype=dtype, device=device)  # [B, K], best first, −inf: dead
        self._nodes = first_nodes(trie, logits)  # [B, K]
        self._tokens = torch.empty((batch, 1, 0), dtype=torch.int64, device=device)  # [B, K, length]
        self.rows = torch.zeros((batch, 1), dtype=torch.int64, device=device)  # [B, K], of the model's last call
        self.finished = Hypotheses(batch, num_beams, dtype, device)

    @property
    def length(self) -> int:
        return self._tokens.shape[2]

    def is_alive(self) -> bool:
        return bool((self._scores > -torch.inf).any())

    def advance(self, logits: Tensor) -> None:
        """One more token for every beam, from its logits [B, K, V]."""
        scores, beams, tokens, nodes = self._select(logits, self._scores, self._nodes)
        is_end = (nodes < 0) & (scores > -torch.inf)
        sequences = torch.cat([take_rows(self._tokens, beams), tokens[..., None]], 2)

        # Only an end among the best K candidates is a result; the others are there to keep K beams going.
        k, length_divisor = self._num_beams, sequences.shape[2] ** self._length_penalty
        ended = torch.where(is_end, scores / length_divisor, -torch.inf)[:, :k]
        self.finished.add(ended, self._nodes.gather(1, beams)[:, :k], sequences[:, :k])

        scores, best = scores.masked_fill(is_end, -torch.inf).sort(dim=1, descending=True, stable=True)
        best = best[:, :k]
        self._nodes, self._tokens = nodes.gather(1, best), take_rows(sequences, best)
        self.rows = self.rows.gather(1, beams.gather(1, best))
        self._scores = scores[:, :k].masked_fill(self._is_done(scores[:, :1]), -torch.inf)

    def replay(self, logits: Tensor) -> None:
        """As many more tokens as the model's last call was given, from its logits [B, K, T, V]."""
        self.rows = torch.arange(self._num_beams, device=logits.device).expand(logits.shape[:2])
        self.advance(logits[:, :, 0])
        for position in range(1, logits.shape[2]):
            self.advance(take_rows(logits[:, :, position], self.rows))  # the beams have changed places

    def last_tokens(self, fill: int) -> Tensor:
        """The token [B, K] that each beam took last, and `fill` for dead ones."""
        tokens = self._tokens[:, :, -1]
        return torch.where(self._scores > -torch.inf, tokens, fill)

    def forced_tokens(self, fill: int) -> Tensor:
        """The tokens [B, K, T] that live beams must take next, T as many as all of them allow; `fill` for dead ones."""
        most = self._max_length - self.length - 1
        chains = []
        for b, beams in enumerate(zip(self._nodes.tolist(), (self._scores > -torch.inf).tolist(), strict=True)):
            reader = self._trie.readers[b % self._trie.num_tries]
            for node, is_live in zip(*beams, strict=True):
                chains.append(_forced(reader, node, self.length, most) if is_live else None)
                most = most if chains[-1] is None else len(chains[-1])
        rows = [[fill] * most if chain is None else chain[:most] for chain in chains]
        return torch.tensor(rows, dtype=torch.int64, device=self._nodes.device).view(*self._nodes.shape, most)

    def _is_done(self, best: Tensor) -> Tensor:
        """Whether a sample's results are settled, [B, 1], by the best score of its beams."""
        worst = self.finished.scores[:, -1:]  # −inf as long as a row is free
        if self._early_stopping is True:
            return worst > -torch.inf
        may_gain = self._early_stopping == "never" and self._length_penalty > 0  # by getting longer
        length = self._max_length if may_gain else self.length
        return best / length**self._length_penalty <= worst


def _forced(reader: TrieReader, node: int, depth: int, most: int) -> list[int]:
    """The tokens that must follow a node of this depth, at most so many, up to a choice or the end of a key."""
    if reader.is_substrings or most == 0:
        return []  # a substring may end anywhere
    low, high = reader.interval(node)
    # The keys are sorted, so what the first and the last below the node share is shared by all.
    first, last = reader.key(low)[depth : depth + most], reader.key(high - 1)[depth : depth + most]
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return [token for token, _ in shared]


@dataclass(frozen=True)
class _Selector:
    """The best candidates of a step, as `trie_beam_step` returns them."""

    trie: Trie
    eos: list[int]
    num_candidates: int
    normalize: str | None
    candidate_bias: Tensor | Reweighing | None

    def __call__(self, logits: Tensor, beam_scores: Tensor, nodes: Tensor) -> BeamStep:
        return trie_beam_step(
            logits,
            beam_scores,
            nodes,
            self.trie,
            num_candidates=self.num_candidates,
            eos_token_id=self.eos,
            normalize=self.normalize,
            candidate_bias=self.candidate_bias,
        )


@dataclass(frozen=True)
class _Sampler:
    """Candidates drawn without replacement, in the order of the draws: the best after adding Gumbel noise."""

    select: _Selector
    temperature: float
    generator: torch.Generator | None

    def __call__(self, logits: Tensor, beam_scores: Tensor, nodes: Tensor) -> BeamStep:
        select, logits = self.select, logits.to(score_dtype(logits)) / self.temperature
        if select.candidate_bias is not None and not isinstance(select.candidate_bias, Tensor):
            logits, normalize = select.candidate_bias.reweigh(logits, nodes, select.trie, select.normalize)
            select = replace(select, normalize=normalize, candidate_bias=None)
        # Not exponential_, which is ten times as slow; in float64, whose steps do not show in the largest of them.
        uniform = torch.rand(logits.shape, dtype=torch.float64, device=logits.device, generator=self.generator)
        noise = uniform.clamp_min_(1e-300).log_().neg_().log_().neg_().to(logits.dtype)
        bias = noise if select.candidate_bias is None else noise + select.candidate_bias
        step = replace(select, candidate_bias=bias)(logits, beam_scores, nodes)
        drawn = noise.flatten(1).gather(1, step.beam_index * noise.shape[2] + step.token.clamp_min(0))
        return step._replace(scores=step.scores - drawn)


def _call(
    step_fn: StepFunction, tokens: Tensor | None, beam_index: Tensor | None, state: object
) -> tuple[Tensor, object]:
    result = step_fn(tokens, beam_index, state)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"step_fn must return (logits, state), got {type(result).__name__}")
    check_float("step_fn's logits", result[0])
    return result


def _check_logits(logits: Tensor, tokens: Tensor, first: Tensor) -> None:
    expected = [*tokens.shape, first.shape[1]]
    if list(logits.shape) != expected:
        raise ValueError(f"step_fn's logits must be [*tokens.shape, V] = {expected}, got {shape_text(logits)}")
    if logits.device != first.device or logits.dtype != first.dtype:
        raise ValueError(
            f"step_fn's logits must stay {dtype_name(first.dtype)} on {first.device}, "
            f"got {dtype_name(logits.dtype)} on {logits.device}"
        )


def _check_arguments(step_fn, num_beams, max_length, length_penalty, early_stopping, num_return_sequences) -> None:
    if not callable(step_fn):
        raise TypeError(f"step_fn must be callable, got {type(step_fn).__name__}")
    check_int("num_beams", num_beams, 1)
    check_int("max_length", max_length, 1)
    if not isinstance(length_penalty, (int, float)) or not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be a finite number, got {length_penalty!r}")
    if not (isinstance(early_stopping, bool) or early_stopping == "never"):
        raise ValueError(f'early_stopping must be True, False or "never", got {early_stopping!r}')
    if num_return_sequences is not None:
        check_int("num_return_sequences", num_return_sequences, 1, num_beams)


def _check_bias(candidate_bias: object) -> None:
    if isinstance(candidate_bias, Tensor):
        check_float("candidate_bias", candidate_bias)
    elif candidate_bias is not None and not hasattr(candidate_bias, "reweigh"):
        raise TypeError(
            f"candidate_bias must be a Tensor or the result of lookahead_bias, got {type(candidate_bias).__name__}"
        )


def _check_sampling(do_sample: object, temperature: object, generator: object) -> None:
    if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, got {temperature!r}")
    if not do_sample and temperature != 1:
        raise ValueError(f"temperature must be 1 without do_sample, got {temperature}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
