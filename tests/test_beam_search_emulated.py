"""The CUDA kernels of trie_beam_step without a GPU: tests/cuda_emulator runs their source on the CPU."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmix import Trie
from fastmix.ops import beam_search as ops
from fastmix.testing.beam_search import CASES, nodes_at, random_keys, step_reference
from fastmix.testing.cases import check_case
from fastmix.testing.parity import FORWARD_FACTOR, check_parity

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulator"))
import beam_emulator
import emulator as cuda
from beam_emulator import Bytes, draw

pytestmark = pytest.mark.skipif(cuda.compiler() is None, reason="needs g++")

INF = float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Large vocabularies cost the reference most; their splits are tried below.
QUICK_CASES = [case for case in CASES if case.inputs(torch.float32)["logits"].numel() < 100_000]


@pytest.fixture(scope="module")
def kernels():
    return beam_emulator.BeamEmulator(cuda.build(source=beam_emulator.SOURCE))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _trie(count: int, vocab_size: int, lengths: tuple[int, int] = (0, 4), exponent: float = 1.0, seed: int = 0) -> Trie:
    keys = random_keys(_generator(seed), count, vocab_size, lengths, exponent)
    return Trie.from_sequences(keys, vocab_size=vocab_size)


def _check_exactly(kernels: beam_emulator.BeamEmulator, inputs: dict[str, Any], orders=(0, 1, 7)) -> None:
    """The reference's results bit by bit, whatever the order of the threads between two barriers."""
    expected = step_reference(**inputs)
    for order in orders:
        for name, actual, wanted in zip(
            ("scores", "beam_index", "token", "node"), kernels.step(**inputs, order=order), expected, strict=True
        ):
            assert torch.equal(actual, wanted), f"{name}, order {order}"


@pytest.mark.parametrize("case", QUICK_CASES, ids=str)
def test_case(case, kernels):
    for dtype in DTYPES:
        check_case(case, dtype, function=lambda **inputs: kernels.step(**inputs)[0])
    inputs = case.inputs(torch.float32)
    first = kernels.step(**inputs)
    for order in (1, 7):
        for actual, expected in zip(kernels.step(**inputs, order=order), first, strict=True):
            assert torch.equal(actual, expected)
    # Without a normalisation there is one right answer, to the bit.
    _check_exactly(kernels, inputs | {"normalize": None, "beam_scores": inputs["beam_scores"].float()}, orders=(0,))


@pytest.mark.parametrize("seed", range(60))
def test_random_steps_exactly(kernels, seed):
    """Whole logits make nearly every score a tie, and so does rounding of close ones far below zero."""
    choose, generator = random.Random(seed), _generator(seed)
    vocab_size = choose.choice([1, 2, 17, 53, 300, 5000, 9001])
    batch, beams = choose.choice([1, 2]), choose.choice([1, 3, 9])
    keys = random_keys(generator, choose.choice([1, 5, 100, 3000]), vocab_size, (0, 5), choose.choice([1.0, 3.0, 6.0]))
    if seed % 3 == 0:
        trie = Trie.from_substrings(keys[:100], vocab_size=vocab_size)
    else:
        trie = Trie.from_sequences(keys if seed % 3 == 1 else [(key * 3 + [0] * 3)[:3] for key in keys])
    shape = batch, beams, max(vocab_size, trie.vocab_size)
    inputs = draw(trie, shape, seed, depth=choose.choice([0, 1, 3]))
    kind = choose.choice(["whole", "normal", "close", "constant"])
    if kind == "constant":
        inputs["logits"].zero_()
    elif kind != "whole":
        inputs["logits"] = torch.randn(shape, generator=generator) * (1e-2 if kind == "close" else 1)
        inputs["beam_scores"] -= 1e4 if kind == "close" else 0
    if choose.random() < 0.3:
        marks = torch.rand(shape, generator=generator)
        inputs["logits"][marks < 0.1], inputs["logits"][marks > 0.97] = -INF, torch.nan
    if choose.random() < 0.5:
        inputs["beam_scores"][torch.rand(shape[:2], generator=generator) < 0.3] = -INF
    if choose.random() < 0.4:
        bias = torch.randn(choose.choice([shape, shape[2:], (batch, 1, 1), (1, beams, 1)]), generator=generator)
        least = choose.choice([-1e9, -1e4, torch.finfo(torch.float32).min, -INF])
        inputs["candidate_bias"] = bias.where(torch.rand(bias.shape, generator=generator) < 0.8, least)
    inputs["logits"] = inputs["logits"].to(choose.choice(DTYPES))
    inputs["num_candidates"] = choose.choice([1, 2, 7, 40, 200])
    inputs["eos_token_id"] = sorted({choose.randrange(shape[2]) for _ in range(choose.choice([0, 1, 3, 16]))})
    _check_exactly(kernels, inputs, orders=(seed % 2, seed + 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_splits_of_a_row(kernels, dtype):
    """Candidates with the N-th score lie in every split, a large node has more than are listed; a key ends there."""
    trie = Trie.from_sequences([[], *random_keys(_generator(), 20000, 33003, (1, 2))], vocab_size=33003)
    inputs = draw(trie, (1, 2, 33003), depth=0, num_candidates=6)
    inputs["logits"] = inputs["logits"].to(dtype)
    assert kernels.plan("splits", inputs["logits"], 6) > 3
    _check_exactly(kernels, inputs)
    _check_exactly(kernels, inputs | {"logits": torch.zeros(1, 2, 33003, dtype=dtype)})
    inputs["logits"][..., [3, 17000, 33002]] = 5
    _check_exactly(kernels, inputs | {"eos_token_id": [3, 17000, 33002], "num_candidates": 20})


def test_the_end_of_a_key_and_the_child_by_the_same_token(kernels):
    trie = Trie.from_sequences([[5], *([5, token] for token in range(200))])
    inputs = draw(trie, (1, 2, 200), eos_token_id=[0, 50, 100, 199])
    inputs |= {"nodes": torch.full((1, 2), trie.walk([5])), "logits": torch.zeros(1, 2, 200)}
    for num_candidates in (1, 2, 51, 52, 53, 300):
        _check_exactly(kernels, inputs | {"num_candidates": num_candidates})


def test_zeros_of_both_signs_are_a_tie(kernels):
    inputs = draw(_trie(100, 30, (1, 1)), (1, 2, 30), depth=0, num_candidates=9, beam_scores=torch.tensor([[-0.0, 0]]))
    logits = torch.where(torch.rand(1, 2, 30, generator=_generator()) < 0.5, 0.0, -0.0)
    _check_exactly(kernels, inputs | {"logits": logits})


@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
@pytest.mark.parametrize("width", [8191, 20000, 33003])
def test_log_sum_exp_of_several_splits(kernels, width, normalize):
    trie = _trie(9000, width, (1, 1))
    logits = 8 * torch.randn(1, 2, width, generator=_generator())
    logits[..., -1] = logits[:, 1, 0] = 30  # beside the whole vectors of 16 bytes
    options = {"depth": 0, "num_candidates": 5, "normalize": normalize}
    for dtype in DTYPES:
        inputs = draw(trie, logits.shape, **options) | {"logits": logits.to(dtype)}
        scores, _, token, _ = kernels.step(**inputs)
        oracle, _, expected, _ = step_reference(**inputs | {"logits": inputs["logits"].double()})
        check_parity("scores", scores, step_reference(**inputs)[0], oracle, independent=1, factor=FORWARD_FACTOR)
        if dtype == torch.float32:
            assert torch.equal(token, expected)


def test_more_than_65536_keys_under_a_node(kernels):
    keys = torch.cartesian_prod(torch.arange(300), torch.arange(300)).numpy()
    trie = Trie.from_sequences(keys)
    for depth in (0, 1):
        _check_exactly(kernels, draw(trie, (1, 3, 300), depth=depth, num_candidates=200))


@pytest.mark.parametrize("num_candidates", [2047, 2048, 2049, 5000])
def test_many_candidates(kernels, num_candidates):
    """From 2049 on nothing is listed: the second kernel looks at everything."""
    inputs = draw(_trie(6000, 3000, (1, 2)), (1, 2, 3001), depth=0, num_candidates=num_candidates)
    for normalize in (None, "allowed"):
        _check_exactly(kernels, inputs | {"logits": torch.zeros(1, 2, 3001), "normalize": None})
        inputs["normalize"] = normalize
        scores, *_ = kernels.step(**inputs)
        torch.testing.assert_close(scores, step_reference(**inputs)[0])


@pytest.mark.parametrize("sign", [1, -1])
def test_candidates_that_get_better_and_better(kernels, sign):
    """What is kept must be dropped for what comes later, within a row and from beam to beam; and the reverse."""
    inputs = draw(_trie(7000, 7000, (1, 1)), (1, 1, 7000), depth=0, num_candidates=20)
    _check_exactly(kernels, inputs | {"logits": sign * torch.arange(7000.0)[None, None]})
    inputs = draw(_trie(3000, 250, (1, 1)), (1, 60, 250), depth=0, num_candidates=200)
    _check_exactly(kernels, inputs | {"beam_scores": sign * torch.arange(60.0)[None]})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beam_score", [-1e3, -1e4])
def test_ties_made_by_rounding_at_the_boundary(kernels, dtype, beam_score):
    """The best by logit are larger tokens than others that rounding gives the same score."""
    width, trie = 3000, _trie(3000, 3000, (1, 1))
    logits = torch.arange(width).float().mul(1e-7).expand(1, 1, width)
    inputs = draw(trie, (1, 1, width), depth=0, beam_scores=torch.full((1, 1), beam_score))
    for num_candidates in (1, 5, 100):
        for offset in (0.0, 3.0):
            changed = {"logits": (logits + offset).to(dtype), "num_candidates": num_candidates}
            _check_exactly(kernels, inputs | changed, orders=(0,))
            for bias in (torch.zeros(1), torch.linspace(0, 1e-4, width)):
                _check_exactly(kernels, inputs | changed | {"candidate_bias": bias}, orders=(1,))


@pytest.mark.parametrize("first", [True, False])
def test_ties_at_the_edge_of_what_rounds_to_one_score(kernels, first):
    """The logits of what is not listed: the smallest of those with this score, and all but the largest."""
    half = torch.tensor(2.0**-11)  # of the distance between numbers next to -10000
    if first:
        small, large = half.nextafter(torch.tensor(1.0)), 1e-3
    else:
        small, large = 1e-3, (3 * half).nextafter(torch.tensor(0.0))
    logits = torch.full((1, 1, 30), -1.0)
    logits[..., :10], logits[..., 10:25] = small, large
    assert (logits[..., :25] - 1e4).unique().numel() == 1
    inputs = draw(_trie(3000, 30, (1, 1)), (1, 1, 30), depth=0, beam_scores=torch.full((1, 1), -1e4), logits=logits)
    for num_candidates in range(1, 26):
        _check_exactly(kernels, inputs | {"num_candidates": num_candidates}, orders=(0,))


def test_a_bias_that_turns_the_order_around(kernels):
    """logit + bias is the same number nearly everywhere, by sums that round differently."""
    width = 2000
    inputs = draw(_trie(2000, width, (1, 1)), (1, 1, width), depth=0)
    for beam_score in (0.0, -1e-3, -37.3, -5e3):
        for logits in (torch.linspace(-100, 100, width), torch.linspace(0, 100, width)):
            inputs |= {"logits": logits[None, None], "candidate_bias": -logits}
            for num_candidates in (1, 3, 30):
                changed = {"beam_scores": torch.full((1, 1), beam_score), "num_candidates": num_candidates}
                _check_exactly(kernels, inputs | changed, orders=(3,))


@pytest.mark.parametrize("normalize", ["vocab", "allowed", None])
def test_the_largest_numbers(kernels, normalize):
    """Rows that are masked by the least number, not by −inf, and sums that overflow."""
    least = torch.finfo(torch.float32).min
    inputs = draw(_trie(100, 30, (1, 1)), (1, 2, 30), depth=0, num_candidates=4, normalize=normalize)
    masked = torch.full((1, 2, 30), least)
    masked[..., 3] = 0
    for logits in (torch.full((1, 2, 30), least), torch.full((1, 2, 30), -least), masked):
        _check_exactly(kernels, inputs | {"logits": logits})
        first = torch.arange(30) < 20
        for bias in (first * least, first * -least, least * torch.linspace(1, 0.6, 30)):
            _check_exactly(kernels, inputs | {"logits": logits, "candidate_bias": bias})


@pytest.mark.parametrize("offset", range(9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_alignment(kernels, dtype, offset):
    """What surrounds the row is NaN."""
    trie = _trie(100, 30, (0, 3))
    for width in (30, 31, 37):
        memory = torch.full((2, 3, width + 19), torch.nan, dtype=dtype)
        inputs = draw(trie, (2, 3, width), num_candidates=8, normalize="vocab")
        rows = memory[:, :, offset : offset + width]
        rows.copy_(inputs["logits"])
        scores = kernels.step(**inputs | {"logits": rows})[0]
        torch.testing.assert_close(scores, step_reference(**inputs)[0])


def test_values_that_are_no_nodes(kernels):
    tries = [_trie(2000, 30, (1, 5)), Trie.from_substrings([[1, 2, 3, 1, 2] * 40, [2] * 90])]
    trie, generator = Trie.concat(tries), _generator(1)
    legal = nodes_at(trie, 3, (2, 24), generator)
    forged = torch.randint(-(2**63), 2**63 - 1, (2, 24), generator=generator)
    for change in (forged, legal + 1, legal ^ 1 << 20, legal ^ 1 << 26, legal ^ 1 << 62, legal | 0xFFFFF):
        nodes = torch.where(torch.rand(2, 24, generator=generator) < 0.7, change, legal)
        _check_exactly(kernels, draw(trie, (2, 24, 30)) | {"nodes": nodes}, orders=(0,))


def test_damaged_bytes_give_no_crash(kernels):
    """Among them children in disorder and several by the same token."""
    trie, generator = _trie(3000, 40, (1, 3)), _generator(2)
    for _ in range(40):
        damaged = trie.arena.clone()
        places = torch.randint(64, len(damaged), (60,), generator=generator)
        damaged[places] = torch.randint(256, (60,), generator=generator, dtype=torch.uint8)
        inputs = draw(trie, (1, 6, 41), depth=1, num_candidates=5)
        scores, beam_index, token, _ = kernels.step(**inputs | {"trie": Bytes(damaged)})
        assert (scores[:, 1:] <= scores[:, :-1]).all()
        assert ((beam_index >= 0) & (beam_index < 6) & (token < 41)).all()
    damaged = trie.arena.clone()
    damaged[trie.arena.view(torch.int64)[8 + 12] :].zero_()  # every symbol the same
    kernels.step(**draw(trie, (1, 6, 41), depth=0, num_candidates=5) | {"trie": Bytes(damaged)})


# What Python does around the kernels. The op of csrc/cuda/beam_search.cu is registered for the CPU here.


@pytest.fixture(scope="module")
def emulated_op(kernels):
    source = cuda.ROOT.joinpath("csrc/cuda/beam_search.cu").read_text()
    schema = re.search(r'"(trie_beam_step_out\(.*?-> \(\))"', re.sub(r'"\s*"', "", source)).group(1)
    registration = torch.library.Library("fastmix", "FRAGMENT")
    if not hasattr(torch.ops.fastmix, "trie_beam_step_out"):
        registration.define(schema)
    registration.impl("trie_beam_step_out", kernels.trie_beam_step_out, "CPU")
    yield ops._trie_beam_step_cuda
    registration._destroy()


@pytest.mark.parametrize("num_candidates", [1, 40, 2048, 2049])
@pytest.mark.parametrize("shape", [(1, 1, 53), (2, 3, 53), (1, 2, 33003), (0, 3, 53), (2, 0, 53)])
def test_what_python_allocates(emulated_op, shape, num_candidates):
    """The emulated op compares the workspace's size with the launcher's."""
    for dtype in DTYPES:
        inputs = draw(_trie(300, 53), shape, num_candidates=num_candidates)
        logits = inputs["logits"].to(dtype).mT.contiguous().mT
        rows = inputs["beam_scores"].double().mT.contiguous().mT, inputs["nodes"].mT.contiguous().mT
        results = emulated_op(logits, *rows, inputs["trie"].arena, num_candidates, [1], 0, None)
        for actual, expected in zip(results, step_reference(**inputs), strict=True):
            assert torch.equal(actual, expected)


def test_no_access_out_of_bounds():
    """The same source under the address and undefined-behaviour sanitizers."""
    cuda.build(sanitize=True, source=beam_emulator.SOURCE)
    names = ["libasan.so", "libubsan.so"]
    paths = [
        subprocess.check_output([cuda.compiler(), f"-print-file-name={name}"], text=True).strip() for name in names
    ]
    environment = {**os.environ, "LD_PRELOAD": ":".join(paths), "ASAN_OPTIONS": "detect_leaks=0"}
    program = [sys.executable, str(Path(beam_emulator.__file__))]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "sanitized: ok" in done.stdout
