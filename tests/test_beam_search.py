"""trie_beam_step: scores, order, what is no candidate, errors, compile."""

from __future__ import annotations

import threading

import pytest
import torch

import fastmix
from fastmix import Trie, _library
from fastmix.testing.beam_search import CASES, nodes_at, random_keys, step_reference
from fastmix.testing.cases import check_case

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INF = float("inf")


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _trie(count: int = 200, vocab_size: int = 40, seed: int = 0, lengths: tuple[int, int] = (0, 5)) -> Trie:
    return Trie.from_sequences(random_keys(_generator(seed), count, vocab_size, lengths))


def _step(trie: Trie, logits: torch.Tensor, nodes: torch.Tensor | None = None, **options):
    options = {"num_candidates": 8, "eos_token_id": 1} | options
    shape = logits.shape[:2]
    nodes = trie.roots.expand(shape[0])[:, None].expand(shape) if nodes is None else nodes
    scores = options.pop("beam_scores", torch.zeros(shape))
    return fastmix.trie_beam_step(logits, scores, nodes, trie, **options)


def _check_candidates(inputs: dict, actual) -> None:
    """Every candidate is legal, there once, in order, and the best: none left out scores more than the last one."""
    scores, beam_index, token, node = actual
    everything = {**inputs, "num_candidates": max(1, sum(inputs["logits"].shape[1:]) * 20)}
    every = step_reference(**{name: _to_float64(value) for name, value in everything.items()})
    for b in range(len(scores)):
        count = int((scores[b] > -INF).sum())
        assert (scores[b, count:] == -INF).all()
        for column, value in ((beam_index, 0), (token, -1), (node, -1)):
            assert (column[b, count:] == value).all()
        exists = every[0][b] > -INF
        *places, totals = (column[b][exists].tolist() for column in (*every[1:], every[0]))
        legal = dict(zip(zip(*places, strict=True), totals, strict=True))
        found = list(zip(beam_index[b].tolist(), token[b].tolist(), node[b].tolist(), strict=True))[:count]
        assert len(set(found)) == count == min(len(legal), scores.shape[1])
        for candidate, score in zip(found, scores[b].tolist(), strict=False):
            assert legal[candidate] == pytest.approx(score, rel=1e-5, abs=1e-4)
        keys = [(-s, *candidate) for s, candidate in zip(scores[b, :count].tolist(), found, strict=True)]
        assert keys == sorted(keys)
        rest = [score for candidate, score in legal.items() if candidate not in found]
        if rest and count:
            assert max(rest) <= float(scores[b, count - 1]) + 1e-4 + 1e-5 * abs(max(rest))


def _to_float64(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, dtype, recorded, assert_kernel):
    with recorded() as ops:
        check_case(case, dtype)
    assert_kernel(ops, "trie_beam_step", dtype)
    inputs = case.inputs(dtype)
    actual = fastmix.trie_beam_step(**inputs)
    assert actual.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    _check_candidates(inputs, actual)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_on_a_gpu(case, dtype, recorded, assert_kernel, needs_cuda_kernels):
    with recorded() as ops:
        check_case(case, dtype, "cuda")
    assert_kernel(ops, "trie_beam_step", dtype, "cuda")
    _check_candidates(
        case.inputs(dtype), [column.cpu() for column in fastmix.trie_beam_step(**case.inputs(dtype, "cuda"))]
    )


@pytest.mark.gpu
def test_in_a_cuda_graph(needs_cuda_kernels):
    """Nothing waits for the device: a captured step answers for whatever its inputs hold later."""
    trie = _trie(3000, 500).to("cuda")
    logits, scores = torch.empty(2, 5, 500, device="cuda"), torch.zeros(2, 5, device="cuda")
    nodes = trie.roots.expand(2)[:, None].repeat(1, 5)
    _step(trie, logits, nodes, beam_scores=scores)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(trie, logits, nodes, beam_scores=scores)
    for seed in range(3):
        logits.copy_(torch.randn(2, 5, 500, generator=_generator(seed)))
        nodes.copy_(nodes_at(trie, 2, (2, 5), _generator(seed)))
        graph.replay()
        expected = _step(trie, logits, nodes, beam_scores=scores)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_ties_are_broken_by_beam_and_token_exactly(seed, dtype):
    """Small whole numbers: no rounding anywhere, nearly every score shared by many candidates."""
    trie = _trie(600, 50, seed, (0, 4))
    generator = _generator(seed + 100)
    inputs = {
        "logits": torch.randint(-2, 3, (2, 7, 53), generator=generator).to(dtype),
        "beam_scores": torch.randint(-2, 1, (2, 7), generator=generator).float(),
        "nodes": nodes_at(trie, 3, (2, 7), generator),
        "trie": trie,
        "num_candidates": 11,
        "eos_token_id": [5, 9, 52],
        "normalize": None,
    }
    for actual, expected in zip(fastmix.trie_beam_step(**inputs), step_reference(**inputs), strict=True):
        assert torch.equal(actual, expected)


def test_scores_that_rounding_makes_equal_are_ties():
    """Far below zero float32 can't tell these logits apart: the smaller token wins, as the scores say."""
    trie = Trie.from_sequences([[2], [5], [7]])
    logits = torch.zeros(1, 1, 8)
    logits[0, 0, 7], logits[0, 0, 5] = 2e-6, 1e-6
    step = _step(trie, logits, beam_scores=torch.full((1, 1), -1e4), normalize=None, num_candidates=2)
    assert step.token.tolist() == [[2, 5]]
    assert step.scores.tolist() == [[-1e4, -1e4]]


def test_the_end_of_a_key_and_the_child_by_the_same_token():
    """Keys may contain the EOS token: the node tells what it is."""
    trie = Trie.from_sequences([[4], [4, 1], [4, 1, 1]])
    step = _step(trie, torch.zeros(1, 1, 6), torch.tensor([[trie.walk([4])]]), normalize=None, num_candidates=3)
    assert step.token.tolist() == [[1, 1, -1]]
    assert step.node.tolist() == [[-1, trie.walk([4, 1]), -1]]


@pytest.mark.parametrize("normalize", ["vocab", "allowed", None])
def test_formula(normalize):
    """Against the formula spelled out with a Python set of keys."""
    keys = {tuple(key) for key in random_keys(_generator(3), 60, 12, (0, 4))}
    trie = Trie.from_sequences(sorted(keys))
    logits = torch.randn(1, 1, 15, generator=_generator(4))
    prefix = next(key for key in sorted(keys) if len(key) == 4)[:1]
    tokens = sorted(
        {key[1] for key in keys if len(key) > 1 and key[:1] == prefix} | ({13} if prefix in keys else set())
    )
    row = logits[0, 0].double()
    norm = {"vocab": row.logsumexp(0), "allowed": row[tokens].logsumexp(0), None: 0}[normalize]
    expected = sorted(((float(row[t] - norm) - 2.5, t) for t in tokens), key=lambda pair: -pair[0])
    step = _step(
        trie,
        logits,
        torch.tensor([[trie.walk(prefix)]]),
        beam_scores=torch.tensor([[-2.5]]),
        num_candidates=20,
        eos_token_id=13,
        normalize=normalize,
    )
    assert step.token[0, : len(tokens)].tolist() == [t for _, t in expected]
    torch.testing.assert_close(
        step.scores[0, : len(tokens)], torch.tensor([s for s, _ in expected]), rtol=1e-5, atol=1e-5
    )
    assert step.token[0, len(tokens) :].eq(-1).all()


def test_nodes_of_a_step_are_those_of_a_walk():
    trie = _trie(3000, 25, lengths=(1, 6))
    prefixes = [[]]
    nodes = trie.roots[:, None]
    for depth in range(5):
        step = _step(
            trie, torch.randn(1, len(prefixes), 30), nodes, num_candidates=12, beam_scores=torch.zeros(1, len(prefixes))
        )
        prefixes = [
            [*prefixes[k], token] if node >= 0 else None
            for k, token, node in zip(*(column[0].tolist() for column in step[1:]), strict=True)
        ]
        keep = [i for i, prefix in enumerate(prefixes) if prefix is not None]
        prefixes, nodes = [prefixes[i] for i in keep], step.node[:, keep]
        assert nodes.tolist() == [[trie.walk(prefix) for prefix in prefixes]], depth
        assert prefixes


def test_values_that_are_no_nodes_yield_nothing():
    trie = Trie.concat([_trie(5000, 30, lengths=(1, 5)), Trie.from_substrings([[1, 2, 3, 1, 2] * 40, [2] * 90])])
    generator = _generator(1)
    legal = nodes_at(trie, 3, (2, 64), generator)
    forged = torch.randint(-(2**63), 2**63 - 1, (2, 64), generator=generator)
    for change in (forged, legal + 1, legal ^ 1 << 20, legal ^ 1 << 26, legal ^ 1 << 62, legal | 0xFFFFF, -legal - 2):
        nodes = torch.where(torch.rand(2, 64, generator=generator) < 0.9, change, legal)
        step = _step(trie, torch.randn(2, 64, 30), nodes, num_candidates=4000)
        for b, reader in enumerate(trie.readers):
            fine = [reader.walk(reader.prefix(node)) == node for node in nodes[b].tolist()]
            for k, token, node in zip(*(column[b].tolist() for column in step[1:]), strict=True):
                assert token < 0 or fine[k]
                assert node < 0 or reader.walk(reader.prefix(node)) == node


def test_a_trie_is_read_by_several_threads():
    trie, logits = _trie(2000, 40), torch.randn(2, 9, 40)
    expected, wrong = _step(trie, logits), []

    def work():
        for _ in range(50):
            if not all(torch.equal(a, b) for a, b in zip(_step(trie, logits), expected, strict=True)):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("shape", [(1, 40, 3000), (3, 17, 20000), (40, 2, 500)])
def test_thread_count_changes_no_bit(shape, ordinary_memory):
    trie = _trie(20000, shape[2], lengths=(1, 4))
    generator = _generator(2)
    logits, nodes = torch.randn(shape, generator=generator), nodes_at(trie, 1, shape[:2], generator)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(_step(trie, logits, nodes, num_candidates=2 * shape[1]))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_large_vocabulary_is_summed_accurately(dtype):
    """Equal logits: every probability is 1/V."""
    width = 152064
    trie = Trie.from_sequences([[3], [width - 1]])
    step = _step(trie, torch.full((1, 1, width), 11.0, dtype=dtype), num_candidates=2, eos_token_id=[])
    expected = -torch.tensor(float(width), dtype=torch.float64).log()
    torch.testing.assert_close(step.scores[0].double(), expected.expand(2), rtol=1e-6, atol=0)


# Errors

GOOD = {
    "logits": torch.zeros(2, 3, 10),
    "beam_scores": torch.zeros(2, 3),
    "nodes": torch.zeros(2, 3, dtype=torch.int64),
    "num_candidates": 4,
    "eos_token_id": 1,
}


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "logits must be a Tensor, got list", {"logits": [[1.0]]}),
        (TypeError, "logits must be float32, .* got int64", {"logits": torch.zeros(2, 3, 10).long()}),
        (ValueError, r"logits must be \[B, K, V\], got \[2, 10\]", {"logits": torch.zeros(2, 10)}),
        (ValueError, r"beam_scores must be \[B, K\] = \[2, 3\], got \[2, 4\]", {"beam_scores": torch.zeros(2, 4)}),
        (TypeError, "beam_scores must be float32, .* got int64", {"beam_scores": torch.zeros(2, 3).long()}),
        (ValueError, r"nodes must be \[B, K\] = \[2, 3\], got \[3\]", {"nodes": torch.zeros(3).long()}),
        (TypeError, "nodes must be int64, got int32", {"nodes": torch.zeros(2, 3).int()}),
        (ValueError, "nodes must be on the device of logits, cpu, got meta", {"nodes": GOOD["nodes"].to("meta")}),
        (TypeError, "trie must be a fastmix.Trie, got dict", {"trie": {}}),
        (ValueError, "num_candidates must be a positive int, got 0", {"num_candidates": 0}),
        (ValueError, "num_candidates must be a positive int, got 2.0", {"num_candidates": 2.0}),
        (ValueError, r"eos_token_id must be in 0..V−1 = 0..9, got 10", {"eos_token_id": 10}),
        (ValueError, r"eos_token_id must be in 0..V−1 = 0..9, got \[3, -1\]", {"eos_token_id": [3, -1]}),
        (TypeError, "eos_token_id must be an int or a list of ints, got NoneType", {"eos_token_id": None}),
        (ValueError, "at most 16 tokens, got 17", {"logits": torch.zeros(2, 3, 30), "eos_token_id": range(17)}),
        (ValueError, "normalize must be one of None, 'vocab', 'allowed', got 'all'", {"normalize": "all"}),
        (ValueError, "at least the trie's vocabulary of 9, got V = 8", {"logits": torch.zeros(2, 3, 8)}),
        (TypeError, "candidate_bias must be a Tensor or .* got list", {"candidate_bias": [1.0]}),
        (TypeError, "candidate_bias must be float32, .* got int64", {"candidate_bias": torch.zeros(10).long()}),
        (ValueError, r"broadcastable to \[B, K, V\] = \[2, 3, 10\], got \[9\]", {"candidate_bias": torch.zeros(9)}),
        (ValueError, r"broadcastable to .* got \[1, 2, 3, 10\]", {"candidate_bias": torch.zeros(1, 2, 3, 10)}),
    ],
)  # fmt: skip
def test_errors(error, match, arguments):
    trie = Trie.from_sequences([[3, 8], [8]])
    with pytest.raises(error, match=match):
        fastmix.trie_beam_step(**{**GOOD, "trie": trie, **arguments})


def test_the_batch_must_fit_the_arena():
    trie = Trie.concat([Trie.from_sequences([[3]]), Trie.from_sequences([[4]]), Trie.from_sequences([[5]])])
    with pytest.raises(ValueError, match="trie must hold one trie or B = 2, got 3"):
        fastmix.trie_beam_step(**GOOD, trie=trie)


def test_backward_is_refused():
    logits = torch.zeros(1, 1, 10, requires_grad=True)
    step = _step(Trie.from_sequences([[3], [4]]), logits)
    if _library.missing_reason is None:
        with pytest.raises(RuntimeError, match="trie_beam_step has no gradient"):
            step.scores.sum().backward()


def test_the_op_guards_memory_itself(needs_kernels):
    """Called without the public function's checks, as a compiled program may."""
    op = torch.ops.fastmix.trie_beam_step.default
    trie = Trie.from_sequences([[3, 8], [8]])
    good = [torch.zeros(2, 3, 10), torch.zeros(2, 3), torch.zeros(2, 3).long(), trie.arena, 4, [1], 1, None]

    def refused(match, **changes):
        arguments = list(good)
        for place, value in changes.items():
            arguments[int(place[1:])] = value
        with pytest.raises(ValueError, match=match):
            op(*arguments)

    refused("logits must be .B, K, V.", _0=torch.zeros(3, 10))
    refused("logits must be float32, bfloat16 or float16", _0=torch.zeros(2, 3, 10, dtype=torch.float64))
    refused("beam_scores must be", _1=torch.zeros(2, 4))
    refused("nodes must be int64", _2=torch.zeros(2, 3))
    refused("trie: its bytes must be uint8", _3=trie.arena.to(torch.int16))
    refused(
        "trie: its bytes must be uint8, contiguous, aligned",
        _3=torch.cat([trie.arena, trie.arena])[1 : len(trie.arena)],
    )
    refused("trie: its bytes are damaged", _3=trie.arena[:40])
    refused("trie: its bytes are damaged", _3=trie.arena[:200])
    refused("trie: its bytes are damaged", _3=trie.arena[: len(trie.arena) - 8])
    refused("num_candidates must be positive", _4=0)
    refused("eos_token_id must be in", _5=[10])
    refused("bias must be float32", _7=torch.zeros(2, 3, 9))
    assert op(*good)[0].shape == (2, 4)
    # Logits narrower than the vocabulary: what is beyond them is no candidate.
    assert op(torch.zeros(2, 3, 5), *good[1:2], trie.roots.expand(2, 3), *good[3:])[2][0].tolist() == [3, 3, 3, -1]


# PyTorch


def test_opcheck(needs_kernels):
    trie = _trie()
    nodes = nodes_at(trie, 2, (2, 3), _generator())
    arguments = (torch.randn(2, 3, 40), torch.zeros(2, 3), nodes, trie.arena, 6, [1], 1)
    for bias in (None, torch.randn(2, 3, 40)):
        torch.library.opcheck(torch.ops.fastmix.trie_beam_step.default, (*arguments, bias))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_compile(dtype, needs_kernels):
    trie = _trie()

    def function(logits, scores, nodes):
        step = fastmix.trie_beam_step(
            logits * 2, scores, nodes, trie, num_candidates=6, eos_token_id=[1, 3], candidate_bias=torch.ones(40)
        )
        return step.scores + 1, step.node

    compiled = torch.compile(function, fullgraph=True)
    for batch in (2, 5):
        nodes = nodes_at(trie, 2, (batch, 3), _generator(batch))
        arguments = torch.randn(batch, 3, 40, dtype=dtype), torch.zeros(batch, 3), nodes
        for actual, expected in zip(compiled(*arguments), function(*arguments), strict=True):
            torch.testing.assert_close(actual, expected)


def test_autocast_changes_nothing():
    trie, logits = _trie(), torch.randn(2, 3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        inside = _step(trie, logits)
    assert all(torch.equal(a, b) for a, b in zip(inside, _step(trie, logits), strict=True))
