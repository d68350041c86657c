"""scaled_attention's reference where it stands alone: pictures of masks, T5's buckets, rotary tables."""

from __future__ import annotations

import pytest
import torch

import fastmix
from fastmix.reference import scaled_attention as reference
from fastmix.reference._attention import relative_buckets


def _picture(t: int, s: int, b: int = 1, **options) -> list[list[str]]:
    """For each sample a row of "#" (attended) and "." for each query."""
    value = torch.eye(s, dtype=torch.float64).expand(b, 1, s, s)
    weights = reference.scaled_attention(
        torch.zeros(b, 1, t, 1).double(), torch.zeros(b, 1, s, 1).double(), value, **options
    )
    return [["".join("#" if weight > 0 else "." for weight in row) for row in sample[0]] for sample in weights]


def test_unilms_mask():
    """The first prefix_len keys are seen by all, the rest causally."""
    assert _picture(5, 5, 3, prefix_len=torch.tensor([3, 0, 5])) == [
        ["###..", "###..", "###..", "####.", "#####"],
        ["#....", "##...", "###..", "####.", "#####"],
        ["#####"] * 5,
    ]


def test_alignments():
    assert _picture(2, 4, is_causal=True) == [["#...", "##.."]]
    assert _picture(2, 4, is_causal=True, causal_alignment="bottom_right") == [["###.", "####"]]
    assert _picture(4, 2, is_causal=True, causal_alignment="bottom_right") == [["..", "..", "#.", "##"]]
    lengths = {"query_lengths": torch.tensor([2, 3]), "key_lengths": torch.tensor([4, 3])}
    assert _picture(3, 5, 2, is_causal=True, causal_alignment="bottom_right", **lengths) == [
        ["###..", "####.", "....."],
        ["#....", "##...", "###.."],
    ]


def test_windows_and_padding():
    assert _picture(4, 5, window_size=(1, 0)) == [["#....", "##...", ".##..", "..##."]]
    assert _picture(4, 5, window_size=(-1, 1)) == [["##...", "###..", "####.", "#####"]]
    assert _picture(2, 5, window_size=(1, 0), causal_alignment="bottom_right") == [["..##.", "...##"]]
    assert _picture(3, 4, is_causal=True, key_start=torch.tensor([1])) == [["....", ".#..", ".##."]]
    assert _picture(2, 4, key_lengths=torch.tensor([2]), query_lengths=torch.tensor([1])) == [["##..", "...."]]


def test_packed_sequences():
    """Of 2 queries and 3 keys, of none and 1, of 1 and 2; a query and two keys belong to none."""
    packed = {"cu_seqlens_q": torch.tensor([0, 2, 2, 3]), "cu_seqlens_k": torch.tensor([0, 3, 4, 6])}
    assert _picture(4, 8, **packed) == [["###.....", "###.....", "....##..", "........"]]
    assert _picture(4, 8, **packed, is_causal=True) == [["#.......", "##......", "....#...", "........"]]
    assert _picture(4, 8, **packed, prefix_len=torch.tensor([2, 0, 0]), causal_alignment="bottom_right") == [
        ["##......", "###.....", "....##..", "........"]
    ]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (4, 2000), (17, 100)])
def test_buckets_are_t5s(buckets, max_distance, bidirectional):
    modeling_t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-3000, 3000)
    expected = modeling_t5.T5Attention._relative_position_bucket(distance, bidirectional, buckets, max_distance)
    assert torch.equal(relative_buckets(distance, buckets, bidirectional, max_distance), expected)


def test_some_buckets():
    """So that the buckets are tested without transformers, too."""
    distance = torch.tensor([-1000, -8, -7, -1, 0, 1, 7, 8, 15, 16, 127, 128, 1000])
    assert relative_buckets(distance, 32, True, 128).tolist() == [15, 8, 7, 1, 0, 17, 23, 24, 25, 26, 31, 31, 31]
    assert relative_buckets(distance[:5], 32, False, 128).tolist() == [31, 8, 7, 1, 0]
    assert relative_buckets(distance[5:], 32, False, 128).tolist() == [0] * 8


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_depends_on_distance_alone(interleaved):
    """Equal tokens everywhere: with rotation the score of (i, j) is a function of j − i, without it one number."""
    angle = torch.arange(9, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    rotary = fastmix.Rotary(angle.cos(), angle.sin(), interleaved)
    query = torch.tensor([0.3, -1.0, 2.0, 0.7, 5.0], dtype=torch.float64).expand(1, 1, 1, 5)
    key = torch.tensor([1.3, 0.2, -0.4, 1.1, 0.0], dtype=torch.float64).expand(1, 1, 1, 5)
    scores = []
    for i in range(9):
        for j in range(9):
            at = rotary._replace(query_positions=torch.tensor([i]), key_positions=torch.tensor([j]))
            scores.append(reference.scaled_attention(query, key, key, rotary=at, return_lse=True)[1])
    scores = torch.stack(scores).view(9, 9)
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert len({round(scores[0, j].item(), 6) for j in range(9)}) == 9
