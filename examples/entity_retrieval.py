"""Misspelt mentions → one of 115,000 real names: autoregressive retrieval under the prefix tree of the names.

    python examples/entity_retrieval.py

The names are WordNet's nouns (Debian's wordnet-base). A mention is a name as people write it: letters swapped, dropped,
doubled or wrong, words left out. The model reads the mention and writes the name; it is trained on names of which the
test's are no part, so that it has to learn how mentions are made, not which names there are: those are in the tree, and
can be exchanged without training. Scored on the same model: written freely (one guess), under the tree by beam search,
with and without fast-forward; recall at 1 and at K, and the time of a mention.

De Cao et al., Autoregressive Entity Retrieval (arXiv:2010.00904).
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from character_seq2seq import BATCH, EOS, Alphabet, Reader, add_options, train, write_freely
from tabulate import tabulate
from tqdm import tqdm
from wordnet import nouns

from fastmix import Trie
from fastmix.generation import trie_beam_search


@dataclass(frozen=True)
class Score:
    first: float  # recall at 1
    any: float  # recall at K
    names: float  # the share of first answers that are names
    calls: int
    seconds: float  # a mention


def load_names(folder: Path) -> list[str]:
    return sorted({name for noun in nouns(folder) for name in noun.names})


def misspell(name: str, generator: random.Random) -> str:
    """One to three changes, and now and then a word less."""
    words = name.split(" ")
    if len(words) > 2 and generator.random() < 0.3:
        del words[generator.randrange(len(words))]
    letters = list(" ".join(words))
    for _ in range(generator.randint(1, 3)):
        i = generator.randrange(len(letters))
        change = generator.choice(("swap", "drop", "double", "replace"))
        if change == "swap" and i + 1 < len(letters):
            letters[i], letters[i + 1] = letters[i + 1], letters[i]
        elif change == "drop" and len(letters) > 3:
            del letters[i]
        elif change == "double":
            letters.insert(i, letters[i])
        else:
            letters[i] = generator.choice("abcdefghijklmnopqrstuvwxyz")
    return "".join(letters)


# Retrieval: reader → K lists of tokens for each mention, best first


def free(reader: Reader, longest: int) -> list[list[list[int]]]:
    return [[tokens] for tokens in write_freely(reader, longest)]


def under_tree(
    reader: Reader, longest: int, *, trie: Trie, num_beams: int, fast_forward: bool
) -> list[list[list[int]]]:
    found = trie_beam_search(
        reader, trie, num_beams=num_beams, max_length=longest, eos_token_id=EOS, fast_forward=fast_forward
    )
    return [[[token for token in row if token not in (EOS, -1)] for row in rows] for rows in found.sequences.tolist()]


def evaluate(
    model: torch.nn.Module, alphabet: Alphabet, trie: Trie, pairs: list[tuple[str, str]], find: Callable, way: str
) -> Score:
    """Pairs are mentions and their names."""
    first = anywhere = existing = calls = 0
    seconds = 0.0
    for start in tqdm(range(0, len(pairs), BATCH), desc=way, unit="batch"):
        batch = pairs[start : start + BATCH]
        begin = time.perf_counter()
        reader = Reader(model, [alphabet.question(mention) for mention, _ in batch])
        with torch.inference_mode():
            answers = find(reader)
        seconds += time.perf_counter() - begin
        calls += reader.calls
        for found, (_, name) in zip(answers, batch, strict=True):
            truth = alphabet.tokens(name)
            first += found[0] == truth
            anywhere += truth in found
            existing += trie.contains(found[0])
    count = len(pairs)
    return Score(first / count, anywhere / count, existing / count, calls, seconds / count)


def main(argv: list[str] | None = None) -> dict[str, Score]:
    """Returns the score of each way of retrieval."""
    parser = argparse.ArgumentParser(description="Names from misspelt mentions, under a prefix tree.")
    parser.add_argument("--mentions", type=int, default=2000, help="how many are asked for in the test")
    parser.add_argument("--training", type=int, default=40000, help="how many the model is trained on, each epoch")
    add_options(parser, epochs=4)
    options = parser.parse_args(argv)
    names, generator = load_names(options.wordnet), random.Random(options.seed)
    alphabet = Alphabet(names)
    begin = time.perf_counter()
    trie = Trie.from_sequences([alphabet.tokens(name) for name in names])
    print(f"{len(names)} names in a tree of {trie.nbytes / 2**20:.1f} MiB, {time.perf_counter() - begin:.2f} s")
    drawn = generator.sample(names, len(names))
    tests = [(misspell(name, generator), name) for name in drawn[: options.mentions]]
    known = drawn[options.mentions :][: options.training]
    pairs = [(alphabet.question(misspell(name, generator)), alphabet.tokens(name)) for name in known]
    longest = max(map(len, names)) + 1
    model = train(pairs, alphabet, longest, options)
    ways: dict[str, Callable] = {"free": partial(free, longest=longest)}
    for beams in sorted({1, options.beams}):
        for fast_forward in (False, True):
            way = f"tree, {beams} beam{'s' * (beams > 1)}" + ", fast-forward" * fast_forward
            how = {"trie": trie, "num_beams": beams, "fast_forward": fast_forward}
            ways[way] = partial(under_tree, longest=longest, **how)
    scores = {way: evaluate(model, alphabet, trie, tests, find, way) for way, find in ways.items()}
    rows = [
        (way, *(f"{100 * value:.1f}" for value in (s.first, s.any, s.names)), s.calls, f"{1000 * s.seconds:.1f}")
        for way, s in scores.items()
    ]
    headers = ("retrieval", "recall@1", "recall@K", "names, %", "model calls", "ms a mention")
    table = tabulate(rows, headers=headers, tablefmt="github")
    print(table)
    if options.out:
        options.out.write_text(table + "\n")
    return scores


if __name__ == "__main__":
    main()
