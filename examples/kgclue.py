"""Questions answered from a knowledge base: a RoFormer writes the key of a triple, under the prefix tree of all keys.

    python examples/kgclue.py --data DIR     # KgCLUE: train.json, dev.json, test_public.json
    python examples/kgclue.py                # questions made from WordNet (Debian's wordnet-base)

A triple is subject S, predicate P, object O, and S may end with what tells it from others of its name, M, in full-width
brackets. The model reads the question and writes S [SEP] P [SEP] M; O is looked up, not written. It is one encoder with
UniLM's mask, trained from scratch on characters: [CLS] question [SEP] S [SEP] P [SEP] M [EOS]. Every way of decoding is
scored on the same model: freely, under the tree, with look-ahead (what the question mentions weighs more), and with
fast-forward (characters that the tree forces cost no call). The score is (EM + F1) / 2 of O, as the benchmark defines
it, F1 by the longest common subsequence of characters.

Xu et al., KgCLUE: a large-scale Chinese knowledge graph question answering (https://github.com/CLUEbenchmark/KgCLUE).
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from character_seq2seq import BATCH, EOS, SEP, Alphabet, Reader, add_options, train, write_freely
from tabulate import tabulate
from tqdm import tqdm
from wordnet import nouns

from fastmix import Trie
from fastmix.generation import lookahead_bias, trie_beam_search


@dataclass(frozen=True)
class Example:
    question: str
    subject: str
    predicate: str
    meaning: str
    object: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.subject, self.predicate, self.meaning


@dataclass(frozen=True)
class Data:
    train: list[Example]
    test: list[Example]
    knowledge: dict[tuple[str, str, str], list[str]]  # key → objects


# The benchmark's files


def load(folder: Path) -> Data:
    """The knowledge base is the triples of all three files."""
    train, dev, test = (_read(folder / name) for name in ("train.json", "dev.json", "test_public.json"))
    return Data(train, test, _knowledge([*train, *dev, *test]))


def _read(path: Path) -> list[Example]:
    with path.open(encoding="utf-8") as lines:
        return [_example(json.loads(line)) for line in lines if line.strip()]


def _example(record: dict[str, str]) -> Example:
    whole, predicate, object = (part.strip() for part in record["answer"].split("|||"))
    subject, meaning = re.fullmatch(r"(.*?)(?:（([^（）]*)）)?", whole, re.DOTALL).groups(default="")
    return Example(record["question"], subject or whole, predicate, meaning, object)


def _knowledge(examples: Iterable[Example]) -> dict[tuple[str, str, str], list[str]]:
    knowledge: dict[tuple[str, str, str], list[str]] = {}
    for example in examples:
        objects = knowledge.setdefault(example.key, [])
        if example.object not in objects:
            objects.append(example.object)
    return knowledge


# The same from WordNet

PREDICATES = {"@": "hypernym", "@i": "class", "#p": "whole", "%p": "part", "#m": "group", "%m": "member"}
ASKED = {
    "hypernym": ("what kind of thing is a {s}?", "a {s} is a special case of what?", "name the hypernym of {s}"),
    "class": ("what is {s} an instance of?", "which class does {s} belong to?", "who or what is {s}?"),
    "whole": ("what is a {s} part of?", "which whole has a {s}?", "where do you find a {s}?"),
    "part": ("what parts does a {s} have?", "name a part of {s}", "what does a {s} contain?"),
    "group": ("what group is {s} a member of?", "to which group does {s} belong?", "of what is {s} a member?"),
    "member": ("who is a member of {s}?", "name a member of {s}", "what belongs to the group {s}?"),
}
# WordNet's files of nouns, by number: what tells apart two nouns of one name.
FILES = ["tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling"]
FILES += ["food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process"]
FILES += ["quantity", "relation", "shape", "state", "substance", "time"]


def generate(folder: Path, count: int, seed: int) -> Data:
    """`count` questions on WordNet's nouns, a tenth of them for the test; the knowledge base is all of its triples."""
    synsets = {noun.offset: noun for noun in nouns(folder)}
    triples = [
        Example("", noun.names[0], PREDICATES[kind], FILES[noun.file - 3], synsets[target].names[0])
        for noun in synsets.values()
        for kind, target in noun.pointers
        if target in synsets and kind in PREDICATES
    ]
    knowledge, generator = _knowledge(triples), random.Random(seed)
    drawn = generator.sample(sorted(knowledge.items()), min(count, len(knowledge)))
    examples = [
        Example(generator.choice(ASKED[predicate]).format(s=subject), subject, predicate, meaning, objects[0])
        for (subject, predicate, meaning), objects in drawn
    ]
    held_out = max(1, len(examples) // 10)
    return Data(examples[held_out:], examples[:held_out], knowledge)


def tokens_of(alphabet: Alphabet, key: tuple[str, str, str]) -> list[int]:
    s, p, m = map(alphabet.tokens, key)
    return [*s, SEP, *p, SEP, *m]


# Decoding: reader, tokens of the questions → the best key of each


def under_tree(
    reader: Reader,
    questions: list[list[int]],
    *,
    trie: Trie,
    num_beams: int,
    longest: int,
    look_ahead: bool,
    fast_forward: bool,
) -> list[list[int]]:
    found = trie_beam_search(
        reader,
        trie,
        num_beams=num_beams,
        max_length=longest,
        eos_token_id=EOS,
        num_return_sequences=1,
        fast_forward=fast_forward,
        candidate_bias=lookahead_bias(trie, questions, sep_token_id=SEP) if look_ahead else None,
    )
    return [[token for token in row if token not in (EOS, -1)] for row in found.sequences[:, 0].tolist()]


# The score


def lcs(a: str, b: str) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for letter in a:
        before = row
        row = [0]
        for j, other in enumerate(b):
            row.append(before[j] + 1 if letter == other else max(before[j + 1], row[j]))
    return row[-1]


def f1(answer: str, truth: str) -> float:
    return 2 * lcs(answer, truth) / max(len(answer) + len(truth), 1)


@dataclass(frozen=True)
class Score:
    exact: float  # EM of the object
    f1: float
    keys: float  # the share of questions answered by a key that exists
    calls: int

    @property
    def mean(self) -> float:
        return (self.exact + self.f1) / 2


def evaluate(data: Data, alphabet: Alphabet, trie: Trie, decode: Callable, name: str, model: torch.nn.Module) -> Score:
    """decode(reader, questions) → the tokens of a key for each question; the trie's payloads number the objects."""
    objects = list(data.knowledge.values())
    exact = matched = existing = calls = 0
    for start in tqdm(range(0, len(data.test), BATCH), desc=name, unit="batch"):
        batch = data.test[start : start + BATCH]
        questions = [alphabet.question(example.question) for example in batch]
        reader = Reader(model, questions)
        with torch.inference_mode():
            keys = decode(reader, questions)
        calls += reader.calls
        for key, example in zip(keys, batch, strict=True):
            found = trie.payloads(key) if trie.contains(key) else []
            answer = objects[found[0]][0] if len(found) else ""
            existing += len(found) > 0
            exact += answer == example.object
            matched += f1(answer, example.object)
    count = len(data.test)
    return Score(exact / count, matched / count, existing / count, calls)


def main(argv: list[str] | None = None) -> dict[str, Score]:
    """Returns the score of each way of decoding."""
    parser = argparse.ArgumentParser(description="Knowledge-base questions under a prefix tree.")
    parser.add_argument("--data", type=Path, help="a folder with KgCLUE's JSON lines; without it, WordNet makes them")
    parser.add_argument("--questions", type=int, default=20000, help="how many are made from WordNet")
    add_options(parser, epochs=8)
    options = parser.parse_args(argv)
    data = load(options.data) if options.data else generate(options.wordnet, options.questions, options.seed)
    texts = [text for example in data.train for text in (example.question, *example.key)]
    alphabet = Alphabet([*texts, *(text for key in data.knowledge for text in key)])
    keys = [tokens_of(alphabet, key) for key in data.knowledge]
    trie, longest = Trie.from_sequences(keys), max(map(len, keys)) + 1
    print(f"{len(data.train)} questions, {len(keys)} keys, {len(alphabet)} characters")
    pairs = [(alphabet.question(example.question), tokens_of(alphabet, example.key)) for example in data.train]
    model = train(pairs, alphabet, longest, options)
    ways: dict[str, Callable] = {"free": lambda reader, questions: write_freely(reader, longest)}
    for beams in sorted({1, options.beams}):
        for extra in ((), ("look-ahead",), ("look-ahead", "fast-forward")):
            how = {"look_ahead": "look-ahead" in extra, "fast_forward": "fast-forward" in extra}
            name = ", ".join((f"tree, {beams} beam{'s' * (beams > 1)}", *extra))
            ways[name] = partial(under_tree, trie=trie, num_beams=beams, longest=longest, **how)
    scores = {name: evaluate(data, alphabet, trie, decode, name, model) for name, decode in ways.items()}
    rows = [
        (name, *(f"{100 * value:.1f}" for value in (s.mean, s.exact, s.f1, s.keys)), s.calls)
        for name, s in scores.items()
    ]
    table = tabulate(
        rows, headers=("decoding", "score", "EM", "F1", "keys that exist, %", "model calls"), tablefmt="github"
    )
    print(table)
    if options.out:
        options.out.write_text(table + "\n")
    return scores


if __name__ == "__main__":
    main()
