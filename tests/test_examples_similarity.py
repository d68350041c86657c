"""examples/similarity.py: its pairs and labels, and that the distilled cosines rank as the truth does."""

from __future__ import annotations

import random

import pytest


@pytest.fixture(scope="module")
def similarity(example):
    with example("similarity", "scipy") as module:
        yield module


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    """A folder with 213 nouns as wndb(5WN) writes them: 4 kinds of a thing, 4 of each, 12 of each of these.

    Definitions name the two kinds, each by one of three words, among others.
    """
    generator, lines = random.Random(0), ["  1 the licence", "00000001 03 n 01 thing 0 000 | whatever is"]

    def add(above: int, *kinds: str) -> int:
        offset = len(lines)
        words = [kind + generator.choice("xyz") for kind in kinds]
        words += generator.sample(["a", "such", "some", "of", "kind", "that", "is", "the"], 4)
        generator.shuffle(words)
        gloss = f'{" ".join(words)}; "an example"'
        lines.append(f"{offset:08} 05 n 02 noun{offset} 0 name 0 001 @ {above:08} n 0000 | {gloss}")
        return offset

    for i in range(4):
        upper = add(1, f"upper{i}")
        for j in range(4):
            lower = add(upper, f"upper{i}", f"lower{i}{j}")
            for _ in range(12):
                add(lower, f"upper{i}", f"lower{i}{j}")
    folder = tmp_path_factory.mktemp("wordnet")
    (folder / "data.noun").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.usefixtures("ordinary_memory")
def test_ranks_unseen_pairs(similarity, wordnet, capsys):
    """Both rank better than words in common do, the student much as the teacher."""
    small = ["--steps", "150", "--batch", "32", "--dim", "32", "--blocks", "1", "--rate", "5e-3", "--pairs", "500"]
    table = wordnet / "similarity.md"
    scores = similarity.main(["--wordnet", str(wordnet), *small, "--out", str(table)])
    assert table.read_text() in capsys.readouterr().out
    teacher, student = scores["teacher, cosine"], scores["student, cosine"]
    assert teacher.of_teacher == pytest.approx(1)
    assert teacher.spearman > scores["words in common"].spearman
    assert student.of_teacher > 0.7
    assert student.spearman > scores["words in common"].spearman


def test_load(similarity, wordnet):
    """Paths go from the root down, definitions end before the examples."""
    meanings = {meaning.path: meaning for meaning in similarity.load(wordnet)}
    assert len(meanings) == 1 + 4 + 4 * 4 + 4 * 4 * 12
    thing, upper, lower, leaf = (f"{i:08}" for i in (1, 2, 3, 4))
    assert (thing, upper, lower, leaf) in meanings
    assert meanings[(thing,)].words == ("whatever", "is")
    assert {"upper0", "lower00"} < {word[:-1] for word in meanings[thing, upper, lower, leaf].words}


def test_without_wordnet(similarity, tmp_path):
    with pytest.raises(SystemExit, match="wordnet-base"):
        similarity.main(["--wordnet", str(tmp_path)])


def meaning_of(similarity, path):
    return similarity.Meaning(tuple(path), ("word",))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [("rabc", "rabc", 1.0), ("rabc", "rabd", 0.75), ("rabc", "ra", 2 / 3), ("rab", "rcd", 1 / 3)],
)
def test_wu_palmer(a, b, expected, similarity):
    """2·depth of the common kind / (depth + depth), the root's depth 1."""
    assert similarity.wu_palmer(meaning_of(similarity, a), meaning_of(similarity, b)) == pytest.approx(expected)


def test_graded_pairs(similarity, wordnet):
    """Each similarity is there, two different meanings each."""
    pairs = similarity.Pairs(similarity.load(wordnet), random.Random(0))
    drawn = [pairs.graded() for _ in range(600)]
    assert all(a is not b for a, b in drawn)
    found = {similarity.wu_palmer(a, b) for a, b in drawn if len(a.path) == len(b.path) == 4}
    assert found == {0.25, 0.5, 0.75}


def test_related_pairs(similarity, wordnet):
    """Labels are what they say: sisters, a kind of the other, neither."""
    pairs = similarity.Pairs(similarity.load(wordnet), random.Random(0))
    seen = set()
    for _ in range(300):
        (a, b), label = pairs.related()
        seen.add(label)
        if label == similarity.ENTAILMENT:
            assert a.path[: len(b.path)] == b.path
            assert len(b.path) < len(a.path)
        elif label == similarity.CONTRADICTION:
            assert a.path[:-1] == b.path[:-1]
            assert a.path != b.path
        else:
            assert similarity.wu_palmer(a, b) < similarity.SIMILAR
    assert seen == {similarity.CONTRADICTION, similarity.ENTAILMENT, similarity.NEUTRAL}
