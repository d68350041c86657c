"""What `kgclue.py` and `entity_retrieval.py` share: a RoFormer that reads characters and writes characters.

One encoder with UniLM's mask, trained on [CLS] question [SEP] answer [EOS], and read by the search under a prefix tree.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
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
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="a folder with data.noun")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--dim", type=int, default=128, help="channels, a multiple of 32")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3, help="the largest learning rate")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the table, Markdown")


def nouns(folder: Path) -> Iterator[list[str]]:
    """The fields of each of WordNet's synsets of nouns (wndb(5WN))."""
    path = folder / "data.noun"
    if not path.is_file():
        raise SystemExit(f"no WordNet at {path}: install Debian's wordnet-base, or name its folder by --wordnet")
    with path.open(encoding="ascii") as lines:
        for line in lines:
            if not line.startswith(" "):  # the licence
                yield line.split(" | ")[0].split()


def noun_names(fields: list[str]) -> list[str]:
    count = int(fields[3], 16)
    return [name.replace("_", " ") for name in fields[4 : 4 + 2 * count : 2]]


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
    """The model on a batch of questions: `trie_beam_search` asks it for the logits of what follows."""

    def __init__(self, model: RoFormerForSeq2Seq, questions: list[list[int]]) -> None:
        self.model, self.questions, self.calls = model, pad(questions), 0
        self.lengths = torch.tensor([len(question) for question in questions])

    def __call__(
        self, tokens: Tensor | None, beam_index: Tensor | None, decoded: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """tokens [B, K] or [B, K, T] are appended to decoded [B, K, N]."""
        if tokens is None:
            decoded = torch.empty(len(self.questions), 1, 0, dtype=torch.long)
            return self._logits(decoded, 1)[:, 0, 0], decoded
        added = tokens if tokens.ndim == 3 else tokens[..., None]
        rows = beam_index[..., None].expand(-1, -1, decoded.shape[2])
        decoded = torch.cat([decoded.gather(1, rows), added], dim=2)
        logits = self._logits(decoded, added.shape[2])
        return logits if tokens.ndim == 3 else logits[:, :, 0], decoded

    def _logits(self, decoded: Tensor, last: int) -> Tensor:
        """[B, K, last, V]: of what follows each of the last tokens."""
        self.calls += 1
        b, k, n = decoded.shape
        prefix = self.lengths.repeat_interleave(k)
        text = torch.nn.functional.pad(self.questions.repeat_interleave(k, 0), (0, n), value=PAD)
        text.scatter_(1, prefix[:, None] + torch.arange(n), decoded.view(b * k, n))
        is_answer = torch.arange(text.shape[1]) >= prefix[:, None]
        logits, _ = self.model(text, is_answer.long(), prefix, lengths=prefix + n)
        place = prefix[:, None] + torch.arange(n - last, n)
        return logits.gather(1, place[..., None].expand(-1, -1, logits.shape[2])).view(b, k, last, -1)


def write_freely(reader: Reader, longest: int) -> list[list[int]]:
    """The most probable character, one after the other, without a tree."""
    logits, decoded = reader(None, None, None)
    first = torch.zeros(len(logits), 1, dtype=torch.long)
    while decoded.shape[2] < longest and not (decoded == EOS).any(2).all():
        logits, decoded = reader(logits.view(len(logits), -1).argmax(-1, keepdim=True), first, decoded)
    return [row[: row.index(EOS)] if EOS in row else row for row in decoded[:, 0].tolist()]
