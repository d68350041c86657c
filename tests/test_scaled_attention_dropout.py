"""scaled_attention's dropout: its random words, and what of them depends on what."""

from __future__ import annotations

import pytest
import torch

import fastmix
from fastmix.reference._attention import philox

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_words_are_philox(counter, key, words):
    """Random123's known answers for philox4x32-10."""
    found = philox(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(word) for word in found) == words


def _word(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers."""
    c0, c1, c2, c3 = counter
    for i in range(10):
        k0, k1 = (key[0] + i * 0x9E3779B9) % 2**32, (key[1] + i * 0xBB67AE85) % 2**32
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 % 2**32, p0 >> 32 ^ c3 ^ k1, p0 % 2**32
    return [c0, c1, c2, c3]


def _dropped(p: float, seed, shape=(2, 3, 40, 90, 8), **options) -> torch.Tensor:
    """[B, H, T, S] the weights: of equal keys and of values that are the columns of an identity."""
    b, h, t, s, d = shape
    value = torch.eye(s).expand(b, h, s, s)
    options |= {"dropout_p": p, "dropout_seed": seed}
    return fastmix.scaled_attention(torch.ones(b, h, t, d), torch.ones(b, h, s, d), value, **options)


def test_dropout_drops_a_share_and_scales_the_rest():
    weights = _dropped(0.3, 5) * 90
    kept = weights > 0
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / 0.7))
    assert abs(kept.double().mean() - 0.7) < 5 * (0.3 * 0.7 / kept.numel()) ** 0.5
    for dim in range(4):  # no index is without effect
        assert not torch.equal(*(kept.index_select(dim, torch.tensor([i])) for i in (0, 1)))


def test_dropout_is_a_function_of_seed_and_place():
    weights = _dropped(0.3, 5)
    assert torch.equal(weights, _dropped(0.3, torch.tensor([5])))
    assert torch.equal(weights, _dropped(0.3, torch.tensor(5)))
    assert not torch.equal(weights, _dropped(0.3, 6))
    assert not torch.equal(weights, _dropped(0.3, 5 + 2**32))
    part = _dropped(0.3, 5, shape=(1, 2, 17, 90, 8))
    assert torch.equal(part, weights[:1, :2, :17])
    fewer = _dropped(0.3, 5, shape=(2, 3, 40, 61, 8))
    assert torch.equal(fewer > 0, weights[..., :61] > 0)
    sequences = {"cu_seqlens_q": torch.tensor([0, 40, 80]), "cu_seqlens_k": torch.tensor([0, 90, 180])}
    packed = _dropped(0.3, 5, (1, 3, 80, 180, 8), **sequences)
    assert torch.equal(packed[0, :, :40, :90] > 0, weights[0] > 0)
    assert torch.equal(packed[0, :, 40:, 90:] > 0, weights[1] > 0)


def test_dropout_without_a_seed_follows_the_global_generator():
    torch.manual_seed(1)
    first, second = _dropped(0.3, None), _dropped(0.3, None)
    torch.manual_seed(1)
    assert torch.equal(_dropped(0.3, None), first)
    assert not torch.equal(first, second)


def test_dropout_of_everything_and_of_nothing():
    assert not _dropped(1.0, 5).any()
    assert torch.equal(_dropped(0.0, 5), _dropped(0.0, None))
    assert _dropped(1.0, 5).shape == (2, 3, 40, 90)


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1, 2**40 + 3, -1, -(2**63), 2**63 - 1])
def test_the_word_of_each_weight(seed):
    """Counter (j // 4, i, head, sample), key the seed's halves; kept where the word is at least p · 2³²."""
    key = [seed % 2**32, (seed >> 32) % 2**32]
    kept = _dropped(0.3, seed, shape=(2, 2, 3, 11, 4)) > 0
    for n, h, i, j in kept.new_ones(kept.shape).nonzero().tolist():
        assert kept[n, h, i, j] == (_word([j // 4, i, h, n], key)[j % 4] >= int(0.3 * 2**32))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True, "prefix_len": torch.tensor([50, 0])}], ids=["plain", "prefix"]
)
def test_dropout_is_the_same_on_a_gpu(options):
    kept = _dropped(0.3, 2**40 + 5, **options) > 0
    b, h, t, s = kept.shape
    query, key, value = (
        x.cuda() for x in (torch.ones(b, h, t, 8), torch.ones(b, h, s, 8), torch.eye(s).expand(b, h, s, s))
    )
    options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    output = fastmix.scaled_attention(query, key, value, dropout_p=0.3, dropout_seed=2**40 + 5, **options)
    assert torch.equal(output.cpu() > 0, kept)
