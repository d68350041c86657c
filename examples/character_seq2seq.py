"""What `kgclue.py` and `entity_retrieval.py` share: a RoFormer that reads characters and writes characters.

One encoder with UniLM's mask, trained on [CLS] question [SEP] answer [EOS], and read by the search under a prefix tree.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable
from pathlib import Path

import torch
import wordnet
from torch import Tensor
from tqdm import tqdm

from fastmix.nn import RoFormerForSeq2Seq

PAD, CLS, SEP, EOS, UNKNOWN = range(5)
BATCH = 32
LONGEST = 64  # characters of a question
Pair = tuple[list[int], list[int]]  # a question's tokens, its answer's


class Alphabet:
    def __init__(self, texts: Iterable[str]) -> None:
        self.ids = {letter: i for i, letter in enumerate(sorted(set().union(*texts)), start=UNKNOWN + 1)}

    def __len__(self) -> int:
        return UNKNOWN + 1 + len(self.ids)

    def tokens(self, text: str) -> list[int]:
        return [self.ids.get(letter, UNKNOWN) for letter in text]

    def question(self, text: str) -> list[int]:
        return [CLS, *self.tokens(text[:LONGEST]), SEP]


def pad(rows: list[list[int]]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)


def add_options(parser: argparse.ArgumentParser, *, epochs: int) -> None:
    wordnet.add_option(parser)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--dim", type=int, default=128, help="channels, a multiple of 32")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3, help="the largest learning rate")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the table, Markdown")


def train(pairs: list[Pair], alphabet: Alphabet, longest: int, options: argparse.Namespace) -> RoFormerForSeq2Seq:
    """A model for answers of at most `longest` tokens, [EOS] counted."""
    torch.manual_seed(options.seed)
    model = RoFormerForSeq2Seq(
        vocab_size=len(alphabet),
        embed_dim=options.dim,
        num_blocks=options.blocks,
        num_heads=options.dim // 32,
        max_seq_len=LONGEST + 2 + longest,
        dropout=0.0,
        attention_dropout=0.0,
    )
    steps = options.epochs * -(-len(pairs) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=steps, pct_start=0.1)
    generator = random.Random(options.seed)
    with tqdm(total=steps, desc="training", unit="step") as progress:
        for _ in range(options.epochs):
            generator.shuffle(pairs)
            for start in range(0, len(pairs), BATCH):
                loss = _loss(model, pairs[start : start + BATCH])
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                progress.update()
    return model.eval()


def _loss(model: RoFormerForSeq2Seq, pairs: list[Pair]) -> Tensor:
    """The mean cross entropy of the answers' characters."""
    text = pad([[*question, *answer, EOS] for question, answer in pairs])
    prefix = torch.tensor([len(question) for question, _ in pairs])
    lengths = torch.tensor([len(question) + len(answer) + 1 for question, answer in pairs])
    place = torch.arange(text.shape[1])
    is_answer = (place >= prefix[:, None]) & (place < lengths[:, None])
    _, loss = model(text, is_answer.long(), prefix, text.masked_fill(~is_answer, -100), lengths=lengths)
    return loss


class Reader:
    """A model that counts its calls: what `trie_beam_search` asks for the logits of what follows the questions."""

    def __init__(self, model: RoFormerForSeq2Seq, questions: list[list[int]]) -> None:
        self.calls = 0
        self.step = model.step_fn(pad(questions), torch.tensor([len(question) for question in questions]))

    def __call__(self, *args) -> tuple[Tensor, object]:
        self.calls += 1
        return self.step(*args)


def write_freely(reader: Reader, longest: int) -> list[list[int]]:
    """The most probable character, one after the other, without a tree."""
    logits, state = reader(None, None, None)
    first, written = torch.zeros(len(logits), 1, dtype=torch.long), []
    while len(written) < longest and not (written and (torch.cat(written, 1) == EOS).any(1).all()):
        written.append(logits.view(len(logits), -1).argmax(-1, keepdim=True))
        logits, state = reader(written[-1], first, state)
    rows = torch.cat(written, 1).tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in rows]
