"""How alike two definitions are: a RoFormer learns from labelled pairs, and a smaller one its cosines.

    python examples/similarity.py [--out similarity.md]

The sentences are WordNet's definitions of nouns (Debian's wordnet-base), 82,000 of them, and the true similarity of two
is that of their meanings by Wu and Palmer: the depth of the nearest common kind, relative to their own depths. The
teacher, trained from scratch on words, sees pairs of two tasks under one `SentencePairHead`: whether two definitions
are similar, and whether they contradict each other (sisters of one kind: what is a cat is no dog), the second follows
from the first (a kind of it), or neither. The head must be asked for every pair. The student, a fraction of the size,
learns the teacher's cosines from sentences without labels (`similarity_distillation_loss`), so that a vector for each
sentence is enough. Scored by Spearman's rank correlation with the true similarity, on pairs of definitions that none of
them has seen.

Su, RoFormer-Sim (technical report, 2021); Reimers and Gurevych, Sentence-BERT (arXiv:1908.10084); Wu and Palmer, Verb
Semantics and Lexical Selection (arXiv:cmp-lg/9406033).
"""

from __future__ import annotations

import argparse
import random
import re
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from wordnet import add_option, nouns

from fastmix.losses import SentencePairHead, similarity_distillation_loss
from fastmix.nn import RoFormerSim

PAD, UNKNOWN = range(2)
LONGEST = 24  # words of a sentence
SIMILAR = 0.5  # from here on two meanings are called so
CONTRADICTION, ENTAILMENT, NEUTRAL = 2, 3, 4  # columns of the head; 0 and 1: similar or not


@dataclass(frozen=True, order=True)
class Meaning:
    """path: its kinds, from the root down to itself, the first of each where WordNet has several."""

    path: tuple[str, ...]
    words: tuple[str, ...]


Pair = tuple[Meaning, Meaning]


def load(folder: Path) -> list[Meaning]:
    entries = {noun.offset: noun for noun in nouns(folder)}
    meanings = []
    for noun in entries.values():
        path = [noun.offset]
        while kinds := [target for kind, target in entries[path[-1]].pointers if kind in ("@", "@i")]:
            path.append(kinds[0])
        definition = noun.gloss.split(";")[0].lower()  # examples follow
        meanings.append(Meaning(tuple(reversed(path)), tuple(re.findall(r"\w+", definition)[:LONGEST])))
    return [meaning for meaning in meanings if meaning.words]


def wu_palmer(a: Meaning, b: Meaning) -> float:
    common = sum(x == y for x, y in zip(a.path, b.path, strict=False))
    return 2 * common / (len(a.path) + len(b.path))


class Pairs:
    """Draws pairs of some meanings."""

    def __init__(self, meanings: Iterable[Meaning], generator: random.Random) -> None:
        self.meanings, self.generator = sorted(meanings), generator  # what is below a kind lies together
        self.paths = [meaning.path for meaning in self.meanings]
        self.at = {path: i for i, path in enumerate(self.paths)}

    def draw(self, depth: Callable[[int], int]) -> Pair:
        """Two below a kind of the first, the depth(len(path))-th."""
        while True:
            a = self.generator.choice(self.meanings)
            kind = a.path[: depth(len(a.path))]
            last = bisect_right(self.paths, kind, key=lambda path: path[: len(kind)])
            b = self.meanings[self.generator.randrange(bisect_left(self.paths, kind), last)]
            if b is not a:
                return a, b

    def graded(self) -> Pair:
        """Of any similarity: the kind is at any depth."""
        return self.draw(lambda length: self.generator.randint(1, max(1, length - 1)))

    def related(self) -> tuple[Pair, int]:
        """A pair and its label, each label as often."""
        label = self.generator.choice((CONTRADICTION, ENTAILMENT, NEUTRAL))
        while True:
            if label == NEUTRAL:
                a, b = self.draw(lambda length: 1)
                found = wu_palmer(a, b) < SIMILAR
            elif label == CONTRADICTION:
                a, b = self.draw(lambda length: max(1, length - 1))
                found = len(a.path) == len(b.path)
            else:
                a = self.generator.choice(self.meanings)
                kinds = [path for i in range(1, len(a.path)) if (path := a.path[:i]) in self.at]
                b = self.meanings[self.at[self.generator.choice(kinds)]] if kinds else a
                found = b is not a
            if found:
                return (a, b), label


class Encoder(nn.Module):
    """Sentences → vectors [B, dim], from words that occur at least twice in what it was made for."""

    def __init__(self, meanings: Iterable[Meaning], dim: int, blocks: int) -> None:
        super().__init__()
        counts = Counter(word for meaning in meanings for word in meaning.words)
        known = sorted(word for word, count in counts.items() if count > 1)
        self.ids = {word: i for i, word in enumerate(known, start=UNKNOWN + 1)}
        vocabulary = {"vocab_size": UNKNOWN + 1 + len(known), "pad_token_id": PAD, "max_seq_len": LONGEST}
        sizes = {"embed_dim": dim, "num_blocks": blocks, "num_heads": dim // 32}
        self.model = RoFormerSim(pooling="mean", **vocabulary, **sizes)

    def forward(self, meanings: Iterable[Meaning]) -> Tensor:
        rows = [torch.tensor([self.ids.get(word, UNKNOWN) for word in meaning.words]) for meaning in meanings]
        lengths = torch.tensor([len(row) for row in rows])
        ids = pad_sequence(rows, batch_first=True, padding_value=PAD)
        return self.model.encode(ids, lengths=lengths, normalize=False)


def train(name: str, modules: list[nn.Module], loss: Callable[[], Tensor], options: argparse.Namespace) -> None:
    parameters = [p for module in modules for p in module.train().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=options.steps, pct_start=0.1)
    with tqdm(range(options.steps), desc=name, unit="step") as progress:
        for _ in progress:
            value = loss()
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{value.item():.3f}", refresh=False)
    for module in modules:
        module.eval()


def pair_loss(encoder: Encoder, head: SentencePairHead, pairs: Pairs, batch: int) -> Tensor:
    """Half of the batch are pairs of the first task, half of the second."""
    graded = [pairs.graded() for _ in range(batch // 2)]
    related = [pairs.related() for _ in range(batch - len(graded))]
    labels = [int(wu_palmer(a, b) >= SIMILAR) for a, b in graded] + [label for _, label in related]
    first, second = zip(*graded, *(pair for pair, _ in related), strict=True)
    u, v = encoder([*first, *second]).chunk(2)
    group = torch.tensor([0] * len(graded) + [1] * len(related))
    return F.cross_entropy(head(u, v, group), torch.tensor(labels))


def distillation_loss(student: Encoder, teacher: Encoder, pairs: Pairs, batch: int) -> Tensor:
    sentences = [meaning for _ in range(batch // 2) for meaning in pairs.graded()]
    with torch.no_grad():
        target = teacher(sentences)
    return similarity_distillation_loss(student(sentences), target)


@dataclass(frozen=True)
class Score:
    spearman: float
    of_teacher: float  # the same with the teacher's cosines
    microseconds: float | None  # a sentence


def shared_words(a: Meaning, b: Meaning) -> float:
    """Jaccard's index."""
    return len({*a.words} & {*b.words}) / len({*a.words} | {*b.words})


def vectors(encoder: Encoder, pairs: list[Pair]) -> tuple[Tensor, Tensor, float]:
    """Of the first sentences, of the second, and the microseconds for each."""
    sentences = [meaning for side in zip(*pairs, strict=True) for meaning in side]
    start = time.perf_counter()
    with torch.no_grad():
        rows = [encoder(sentences[i : i + 256]) for i in range(0, len(sentences), 256)]
    microseconds = 1e6 * (time.perf_counter() - start) / len(sentences)
    return *torch.cat(rows).chunk(2), microseconds


def evaluate(teacher: Encoder, head: SentencePairHead, student: Encoder, pairs: list[Pair]) -> dict[str, Score]:
    u, v, slow = vectors(teacher, pairs)
    small_u, small_v, fast = vectors(student, pairs)
    with torch.no_grad():
        no, yes = head(u, v)[:, :2].unbind(1)
    truth, cosines = [wu_palmer(a, b) for a, b in pairs], F.cosine_similarity(u, v)
    ways = {
        "words in common": ([shared_words(a, b) for a, b in pairs], None),
        "teacher, head": (yes - no, slow),
        "teacher, cosine": (cosines, slow),
        "student, cosine": (F.cosine_similarity(small_u, small_v), fast),
    }
    return {way: Score(rank(values, truth), rank(values, cosines), cost) for way, (values, cost) in ways.items()}


def rank(a: Sequence[float] | Tensor, b: Sequence[float] | Tensor) -> float:
    """Spearman's ρ."""
    return float(spearmanr(a, b).statistic)


def main(argv: list[str] | None = None) -> dict[str, Score]:
    """Returns the score of each way to compare two sentences."""
    parser = argparse.ArgumentParser(description="Sentence similarity: a pair classifier, distilled to cosines.")
    add_option(parser)
    parser.add_argument("--steps", type=int, default=600, help="of the teacher, and as many of the student")
    parser.add_argument("--batch", type=int, default=128, help="pairs of a step")
    parser.add_argument("--pairs", type=int, default=4000, help="of the test")
    parser.add_argument("--dim", type=int, default=128, help="the teacher's channels, a multiple of 32")
    parser.add_argument("--blocks", type=int, default=2, help="the teacher's")
    parser.add_argument("--rate", type=float, default=2e-3, help="the largest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the table, Markdown")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    generator = random.Random(options.seed)
    meanings = load(options.wordnet)
    generator.shuffle(meanings)
    held_out, seen = meanings[: len(meanings) // 10], meanings[len(meanings) // 10 :]
    pairs = Pairs(seen, generator)
    teacher, head = Encoder(seen, options.dim, options.blocks), SentencePairHead(options.dim)
    print(f"{len(seen)} sentences, {len(held_out)} held out, {len(teacher.ids)} words")
    train("teacher", [teacher, head], lambda: pair_loss(teacher, head, pairs, options.batch), options)
    student = Encoder(seen, 32, 1)
    train("student", [student], lambda: distillation_loss(student, teacher, pairs, options.batch), options)
    unseen = Pairs(held_out, generator)
    scores = evaluate(teacher, head, student, [unseen.graded() for _ in range(options.pairs)])
    rows = [(name, *astuple(score)) for name, score in scores.items()]
    headers = ("similarity by", "Spearman's ρ with the truth", "with the teacher's cosine", "µs a sentence")
    table = tabulate(rows, headers=headers, tablefmt="github", floatfmt=("", ".3f", ".3f", ".0f"))
    print(table)
    if options.out:
        options.out.write_text(table + "\n")
    return scores


if __name__ == "__main__":
    main()
