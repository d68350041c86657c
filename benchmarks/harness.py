"""Measures a case: parity first (`failure_of`), then all providers in turns (`run_case`).

Definitions, valid for every record:
  gbps, gflops        the case's bytes and operations (declared with the case) over the median time
  ratio_to_best_peer  best peer's median / own median: above 1 is faster than the best peer; for a peer, "best peer"
                      is the best of all peers, so the best one has 1. null where no peer ran. Yardsticks don't count
  ratio_to_limit      limit time / median, where limit time = max(bytes / copy rate, operations / product rate + exps /
                      exp rate) with the rates of a large copy, a large matrix product and torch.exp measured in the
                      same run (exps count on CPUs only). At most about 1; a case whose data stay in the cache may pass
                      it. null for a case that declares none
  peak_mib            memory in use at the peak of one call beyond what was in use before it, output included
  yardstick           the provider does something else than the case, to be compared with all the same
  bytes_per_key       of the index that the provider builds or opens, null for other cases
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmix.benchmarks.limits import Limits, timer
from fastmix.testing.cases import Case, check_case

OURS = "fastmix"
FORWARD, BOTH = "forward", "forward+backward"
MODES = (FORWARD, BOTH)
MIN_ROUNDS, MAX_ROUNDS = 5, 200


@dataclass(frozen=True)
class Provider:
    """An implementation of a case. `missing` says why it can't run here; without `backward` it runs forward only.

    A yardstick is timed with the others and is no peer: it computes something else, so its result is not compared.
    """

    name: str
    function: Callable[..., Tensor | tuple[Tensor, ...]] | None = None
    missing: str | None = None
    backward: bool = True
    full_only: bool = False
    yardstick: bool = False
    bytes_per_key: Callable[[], float] | None = None


@dataclass(frozen=True)
class BenchCase:
    """A parity case in one dtype, with its bytes and operations per mode, and its peers.

    A headline is measured with one CPU thread too. A case that moves no known number of bytes has no limit. exps are
    its exponentials, of an activation for example, beside flops. `missing` says why the case can't run here at all.
    """

    case: Case
    dtype: torch.dtype
    moved_bytes: dict[str, int]
    flops: dict[str, int]
    peers: tuple[Provider, ...]
    headline: bool = False
    full_only: bool = False
    missing: str | None = None
    bytes_per_key: Callable[[], float] | None = None
    exps: dict[str, int] = field(default_factory=dict)

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.case.gradients else (FORWARD,)

    @property
    def providers(self) -> tuple[Provider, ...]:
        return (Provider(OURS, self.case.function, bytes_per_key=self.bytes_per_key), *self.peers)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass
class Outcome:
    """What came of a case: figures to put on record, and providers that were not timed."""

    figures: list[dict[str, Any]] = field(default_factory=list)
    not_run: list[dict[str, str]] = field(default_factory=list)


def failure_of(bench: BenchCase, device: str) -> str | None:
    """Why nothing may be recorded for a case: our result is not the reference's, or there is none."""
    try:
        check_case(bench.case, bench.dtype, device)
    except Exception as error:  # an exception of the kernel is as much a failure as a wrong value
        return f"{type(error).__name__}: {error}"
    return None


def run_case(
    bench: BenchCase,
    device: str,
    limits: Limits,
    budget_s: float,
    full: bool = False,
    peak_mib: Callable[[str, str, Callable[[], object]], float | None] | None = None,
) -> Outcome:
    """Times all providers of a case without failure, with the current number of threads, in its modes.

    Args:
        bench: the case.
        device: "cpu" or "cuda".
        limits: what the machine can do with this number of threads.
        budget_s: seconds of timing per mode; five rounds are made in any case.
        full: runs every peer; else those marked full_only stay out.
        peak_mib: measures that figure for a provider's name, a mode and the call; without it it is null.
    """
    outcome = Outcome()
    inputs = bench.case.inputs(bench.dtype, device)
    grad_output = draw_grad_output(bench.case, inputs)
    time_once = timer(device)
    providers = {provider.name: provider for provider in bench.providers}
    yardsticks = {name for name, provider in providers.items() if provider.yardstick}
    for mode in bench.modes:
        calls = {}
        for provider, call_or_reason in _calls(bench, inputs, grad_output, mode, full).items():
            if callable(call_or_reason):
                calls[provider.name] = call_or_reason
            else:
                outcome.not_run.append({"provider": provider.name, "mode": mode, "reason": call_or_reason})
        estimate_ms = sum(time_once(call) for call in calls.values())
        rounds = int(min(max(1e3 * budget_s / estimate_ms, MIN_ROUNDS), MAX_ROUNDS))
        times = take_turns(calls, rounds, time_once)
        moved_bytes, flops, exps = (of_mode.get(mode, 0) for of_mode in (bench.moved_bytes, bench.flops, bench.exps))
        for name, figures in summarise(times, limits, moved_bytes, flops, exps, yardsticks).items():
            size = providers[name].bytes_per_key
            others = {
                "peak_mib": peak_mib(name, mode, calls[name]) if peak_mib else None,
                "yardstick": name in yardsticks,
                "bytes_per_key": size() if size else None,
            }
            outcome.figures.append({"provider": name, "mode": mode, **figures, **others})
    return outcome


def draw_grad_output(case: Case, inputs: dict[str, Any]) -> Tensor | None:
    """A gradient of the output for the backward, None where there is none."""
    return torch.randn_like(case.reference(**inputs)) if case.gradients else None


def _calls(bench: BenchCase, inputs: dict[str, Any], grad_output: Tensor | None, mode: str, full: bool) -> dict:
    """Provider → its call of this mode, tried once, or the reason why it is not timed."""
    calls: dict[Provider, Callable[[], object] | str] = {}
    for provider in bench.providers:
        reason = _excluded(provider, mode, full)
        if reason is None:
            call = prepare(provider.function, bench.case, inputs, grad_output, mode)
            if provider.name == OURS:
                expected = call()  # has been checked, and far more strictly; this is its warm-up too
            else:
                reason = _unfit(call, expected, provider.yardstick)
        calls[provider] = reason or call
    return calls


def take_turns(
    calls: dict[str, Callable[[], object]], rounds: int, time_once: Callable[[Callable[[], object]], float]
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round; all calls once per round, so that a slow spell hits all alike.

    What follows a call of twice its time is made once more: a loop over samples leaves caches and memory in such a
    state that the next call may take four times as long.
    """
    times = {name: [] for name in calls}
    before = 0.0
    for _ in range(rounds):
        for name, call in calls.items():
            elapsed = time_once(call)
            if before > 2 * elapsed:
                elapsed = time_once(call)
            times[name].append(elapsed)
            before = elapsed
    return times


def summarise(
    times: dict[str, list[float]],
    limits: Limits,
    moved_bytes: int,
    flops: int,
    exps: int = 0,
    yardsticks: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
    """Provider → its figures, as this file's opening defines them."""
    medians = {name: float(np.median(values)) for name, values in times.items()}
    peers = medians.keys() - {OURS, *yardsticks}
    best_peer = min((medians[name] for name in peers), default=None)
    limit_ms = limits.milliseconds(moved_bytes, flops, exps)
    return {
        name: {
            "median_ms": median,
            "p20_ms": float(np.percentile(times[name], 20)),
            "p80_ms": float(np.percentile(times[name], 80)),
            "gbps": moved_bytes / median / 1e6,
            "gflops": flops / median / 1e6,
            "ratio_to_best_peer": best_peer and best_peer / median,
            "ratio_to_limit": limit_ms / median if limit_ms else None,
        }
        for name, median in medians.items()
    }


def prepare(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    case: Case,
    inputs: dict[str, Any],
    grad_output: Tensor | None,
    mode: str,
) -> Callable[[], tuple[Tensor, ...]]:
    """A call of one mode, without arguments: the outputs, or the gradients of the case's differentiable arguments."""
    if mode == FORWARD:

        def forward():
            with torch.no_grad():
                outputs = function(**inputs)
            return (outputs,) if isinstance(outputs, Tensor) else outputs

        return forward
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.gradients}
    arguments = {**inputs, **leaves}
    return lambda: torch.autograd.grad(function(**arguments), tuple(leaves.values()), grad_output)


def _excluded(provider: Provider, mode: str, full: bool) -> str | None:
    if provider.missing:
        return provider.missing
    if mode == BOTH and not provider.backward:
        return "it has no gradient"
    if provider.full_only and not full:
        return "only with --full"
    return None


def _unfit(call: Callable[[], tuple[Tensor, ...]], expected: tuple[Tensor, ...], yardstick: bool) -> str | None:
    """Why a peer is not timed: it raises, or computes something else than the case."""
    try:
        actual = call()
    except Exception as error:
        return f"it raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if yardstick:
        return None
    for got, wanted in zip(actual, expected, strict=True):
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            return f"it computes something else: {got.dtype} {list(got.shape)}"
        finite = wanted.isfinite()
        if not torch.equal(got.where(~finite, 0), wanted.where(~finite, 0)):
            return "it computes something else: its infinities are at other places"
        got, wanted = got.where(finite, 0), wanted.where(finite, 0)
        if difference := difference_of_others(got, wanted):
            return f"it computes something else: {difference:.1%} away from the reference"
    return None


def difference_of_others(got: Tensor, wanted: Tensor) -> float | None:
    """Root mean square of the difference over that of `wanted`, None if it is small enough to be the same thing.

    That is 1 %, and some roundings: PyTorch sums some gradients of bfloat16 in bfloat16, and is 3 % off.
    """
    difference, size = ((t.abs().float().square().mean().sqrt()) for t in (got - wanted, wanted))
    return None if difference <= (0.01 + 8 * torch.finfo(got.dtype).eps) * size else float(difference / size)
