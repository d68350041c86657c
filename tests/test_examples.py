"""The examples run, and do what they say."""

from __future__ import annotations

import pytest
import torch

from fastmix.testing.grad_norm import RELATIVE_ERROR
from fastmix.testing.parity import GRADIENT_FACTOR, check_parity

OPS = {
    "mixer": "token_mixing_mlp",
    "resmlp": "token_linear",
    "feed_forward": "token_mixing_mlp",
    "gmlp": "token_linear",
    "amlp": "token_linear",
    "external_attention": "external_attention",
    "synthesizer": "token_linear",
    "depthwise": "token_conv",
    "lightweight": "token_conv",
    "dynamic": "token_conv",
    "fnet": "fourier_mixing",
    "gfnet": "global_filter",
}


@pytest.fixture(scope="module")
def train_mixer(example):
    with example("train_mixer", "sklearn", "matplotlib") as module:
        yield module


@pytest.fixture(scope="module")
def per_sample_digits(example):
    with example("per_sample_digits", "sklearn") as module:
        yield module


@pytest.fixture(scope="module")
def kgclue(example):
    with example("kgclue") as module:
        yield module


@pytest.fixture(scope="module")
def entity_retrieval(example):
    with example("entity_retrieval") as module:
        yield module


@pytest.fixture(scope="module")
def init_depth(example):
    with example("init_depth", "matplotlib") as module:
        yield module


@pytest.mark.parametrize("name", OPS)
def test_train_mixer(name, train_mixer, tmp_path, capsys, ordinary_memory, threads_kept):
    """The same loss curve with and without kernels, and it falls.

    Every step builds on the rounding of those before it. How far apart that may bring the curves is what the tolerance
    rule says: about as far from the float64 curve as the reference's is in float32.
    """
    plot = tmp_path / "digits.png"
    fast, reference = train_mixer.main(["--model", name, "--epochs", "2", "--out", str(plot)])[name]
    assert f"| {name} " in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sum(fast.losses[-5:]) < 0.8 * sum(fast.losses[:5])
    oracle = train_mixer.train(name, train_mixer.standardised(train_mixer.load()), epochs=2, dtype=torch.float64)
    curves = (torch.tensor(run.losses) for run in (fast, reference))
    check_parity(f"{name}, loss", *curves, torch.tensor(oracle.losses).double(), factor=GRADIENT_FACTOR)


def test_train_mixer_recognises_digits(train_mixer, ordinary_memory, threads_kept):
    torch.set_num_threads(1)
    assert train_mixer.train("mixer", train_mixer.standardised(train_mixer.load()), epochs=8).accuracy >= 0.95


@pytest.mark.parametrize("name", OPS)
def test_train_mixer_with_and_without_kernels(name, train_mixer, recorded, assert_kernel):
    """What the two curves compare."""
    model = train_mixer.MODELS[name][0]()
    x = torch.randn(2, 1, 8, 8)
    with recorded() as ops:
        model(x).sum().backward()
    assert_kernel(ops, OPS[name])
    with train_mixer.without_kernels(), recorded() as ops:
        model(x).sum().backward()
    assert ops == []


def test_train_mixer_takes_every_model(train_mixer):
    assert train_mixer.MODELS.keys() == OPS.keys()


@pytest.mark.parametrize("name", ["transformer", "cnn"])
def test_per_sample_digits(name, per_sample_digits, capsys, ordinary_memory, threads_kept):
    """Norms of the whole epoch are the loop's, and importance sampling by them trains."""
    run = per_sample_digits.main(["--model", name, "--epochs", "2"])[name]
    assert f"| {name} " in capsys.readouterr().out
    assert run.difference <= RELATIVE_ERROR
    assert run.losses[0] > 2 * run.losses[1] > 2 * run.losses[2]
    assert all(scale > 0 for scale in run.noise_scales)
    assert run.accuracy >= 0.85


NOUNS = ("dog", "cat", "horse", "red fox", "grey wolf", "house mouse", "owl", "lark", "trout", "pike", "bee", "ant")


@pytest.fixture
def wordnet(tmp_path):
    """A folder with a few nouns, each of which is an animal, as wndb(5WN) writes them."""
    lines = ["  1 the licence", "00000001 05 n 01 animal 0 000 | a living thing"]
    for i, noun in enumerate(NOUNS, start=2):
        lines.append(f"{i:08} 05 n 02 {noun.replace(' ', '_')} 0 beast 0 001 @ 00000001 n 0000 | a kind")
    (tmp_path / "data.noun").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_kgclue_from_wordnet(kgclue, wordnet, capsys, ordinary_memory):
    """Under the tree every answer is a key that exists; fast-forward takes fewer calls to the same answers."""
    small = ["--epochs", "20", "--dim", "32", "--blocks", "1", "--beams", "2", "--rate", "1e-2"]
    table = wordnet / "scores.md"
    scores = kgclue.main(["--wordnet", str(wordnet), *small, "--out", str(table)])
    assert table.read_text() in capsys.readouterr().out
    assert all(score.keys == 1 for name, score in scores.items() if name.startswith("tree"))
    assert scores["tree, 2 beams"].exact == 1  # all are animals
    slow, fast = scores["tree, 2 beams, look-ahead"], scores["tree, 2 beams, look-ahead, fast-forward"]
    assert (fast.exact, fast.f1) == (slow.exact, slow.f1)
    assert fast.calls < slow.calls


def test_kgclue_reads_the_benchmarks_files(kgclue, tmp_path):
    record = '{"id": 0, "question": "龙晶?", "answer": "龙晶（游戏） ||| 繁体 ||| 龍晶"}\n'
    for name in ("train", "dev", "test_public"):
        (tmp_path / f"{name}.json").write_text(record)
    data = kgclue.load(tmp_path)
    assert data.train == [kgclue.Example("龙晶?", "龙晶", "繁体", "游戏", "龍晶")]
    assert data.knowledge == {("龙晶", "繁体", "游戏"): ["龍晶"]}


def test_kgclue_without_data(kgclue, tmp_path):
    with pytest.raises(SystemExit, match="wordnet-base"):
        kgclue.main(["--wordnet", str(tmp_path)])


@pytest.mark.parametrize(
    ("a", "b", "expected"), [("abc", "abc", 1.0), ("abc", "xyz", 0.0), ("abcd", "acx", 4 / 7), ("", "", 0.0)]
)
def test_kgclue_f1(a, b, expected, kgclue):
    """2·LCS / (len a + len b)."""
    assert kgclue.f1(a, b) == pytest.approx(expected)


def test_entity_retrieval(entity_retrieval, wordnet, capsys, ordinary_memory):
    """Under the tree every answer is a name, and K beams find the name of every mention among K names."""
    small = ["--epochs", "1", "--dim", "32", "--blocks", "1", "--beams", "14", "--mentions", "5"]
    scores = entity_retrieval.main(["--wordnet", str(wordnet), *small, "--out", str(wordnet / "scores.md")])
    assert (wordnet / "scores.md").read_text() in capsys.readouterr().out
    assert all(score.names == 1 for way, score in scores.items() if way.startswith("tree"))
    assert scores["tree, 14 beams"].any == 1
    assert scores["tree, 14 beams, fast-forward"].calls <= scores["tree, 14 beams"].calls
    assert len(entity_retrieval.load_names(wordnet)) == 14


def test_init_depth(init_depth, tmp_path, capsys):
    """Norms keep the second moment, pre-norm adds 1 a layer, what starts as the identity is the identity."""
    path = tmp_path / "curves.png"
    curves = init_depth.main(["--layers", "8", "--dim", "128", "--out", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "| orthogonal " in capsys.readouterr().out
    assert {form for _, form in curves} == set(init_depth.FORMS)
    for form in ("post", "warmup_alpha"):
        assert curves["lecun", form][0] == pytest.approx([1.0] * 8, rel=1e-3)
    assert curves["orthogonal", "pre"][0][-1] == pytest.approx(1 + 8, rel=0.2)
    for form in ("rezero", "skipinit", "fixup"):
        moments, grads = curves["he", form]
        assert len(set(moments)) == 1
        assert grads == pytest.approx([1.0] * 8)
    assert curves["he", "none"][0][-1] > 100 * curves["lecun", "none"][0][-1]
