"""Models, inputs, outputs and losses with which an Opacus run works, accelerated as before."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("opacus")
from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleHooks

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),  # on layers whose input needs no gradient
    pytest.mark.usefixtures("one_thread"),
]

MODES = ("hooks", "ghost")


@pytest.fixture
def check_same(private, fast):
    """check_same(make, loss, …): a step of loss(module, criterion) takes what Opacus' own takes."""

    def step(run, loss):
        return run.step_of(lambda: loss(run.module, run.criterion))

    def check(make, loss, **options):
        actual = step(fast(make(), **options), loss)
        torch.testing.assert_close(actual, step(private(make(), **options), loss))
        assert all(grad.any() for grad in actual)

    return check


# Outputs


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: list


class Answer(dict):
    """As transformers' ModelOutput, whose items are attributes too."""

    def __getattr__(self, name):
        return self[name]


OUTPUTS = {
    "tuple": (lambda self, x: (self.second(self.first(x)), self.first.weight.sum(), None), lambda out: out[0]),
    "dictionary": (lambda self, x: {"a": [self.second(self.first(x))], "b": 1}, lambda out: out["a"][0]),
    "a class of its own": (lambda self, x: Answer(logits=self.second(self.first(x))), lambda out: out.logits),
    "dataclass": (lambda self, x: Output(self.second(self.first(x)), [x]), lambda out: out.logits),
    "two that count": (lambda self, x: (self.second(h := self.first(x)), h), lambda out: out[0] + out[1][:, :4]),
    "one twice": (lambda self, x: [z := self.second(self.first(x)), z], lambda out: out[0] * out[1]),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", list(OUTPUTS))
def test_outputs(name, mode, model, x, y, check_same, fast):
    body, logits = OUTPUTS[name]
    check_same(lambda: model(body), lambda module, criterion: criterion(logits(module(x)), y), mode=mode)
    run = fast(model(body), mode=mode)
    assert type(run.module(x)) is type(body(run.model, x))


@pytest.mark.parametrize("mode", MODES)
def test_the_output_may_be_changed_in_place(mode, model, x, y, private, fast):
    actual, expected = fast(model(), mode=mode), private(model(), mode=mode)
    actual = actual.step_of(lambda run=actual: run.criterion(run.module(x).relu_(), y))
    expected = expected.step_of(lambda run=expected: run.criterion(run.module(x).relu(), y))  # Opacus' hooks forbid it
    torch.testing.assert_close(actual, expected)


def test_a_loss_inside_the_model(model, x, y, check_same):
    def body(self, input, labels):
        return F.cross_entropy(self.second(self.first(input)), labels)

    check_same(lambda: model(body), lambda module, _: module(input=x, labels=y))


# Forwards and inputs


def test_checkpointing(model, x, y, private, fast):
    def body(self, x, use_reentrant=False):
        return self.second(checkpoint(self.first, x, use_reentrant=use_reentrant).tanh())

    expected = private(model()).step(x, y=y)
    torch.testing.assert_close(fast(model(body)).step(x, y=y), expected)
    x.requires_grad_()
    torch.testing.assert_close(fast(model(body)).step(x, y=y), expected)
    with pytest.raises(RuntimeError, match="When use_reentrant=True"):
        fast(model(functools.partial(body, use_reentrant=True))).step(x, y=y)


def test_an_input_that_the_model_changes(model, x, y, private, fast):
    def body(self, x):
        return self.second(self.first(x.mul_(2)))

    actual = fast(model(body)).step(x.clone(), y=y)
    torch.testing.assert_close(actual, private(model(body)).step(x.clone(), y=y))


def test_several_forwards_of_one_batch(model, x, y, private, fast, check_same):
    def loss(module, criterion):
        return criterion(module(x) * module(2 * x), y)

    check_same(model, loss)
    hooks, ghost = private(model()), fast(model(), mode="ghost")  # which Opacus' own refuses
    found = [run.step_of(lambda run=run: loss(run.module, run.criterion)) for run in (hooks, ghost)]
    torch.testing.assert_close(*found)


def test_forwards_of_several_batches(model, x, fast):
    module = fast(model()).module
    with pytest.raises(ValueError, match=r"must be of one batch, got (4 and 2|2 and 4)"):
        (module(x).sum() + module(x[:2]).sum()).backward()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(4, 6), nn.Linear(6, 6), nn.Linear(6, 4, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.body(self.embedding(ids)).tanh()).mean(1)


@pytest.mark.parametrize("mode", MODES)
def test_tied_parameters(mode, y, private, fast):
    """Opacus' ghost clipping refuses them."""
    ids = torch.tensor([[0, 1], [2, 1], [3, 3], [0, 2]])
    torch.testing.assert_close(fast(Tied(), mode=mode).step(ids, y=y), private(Tied()).step(ids, y=y))


@pytest.mark.parametrize("mode", MODES)
def test_the_graph_goes_with_the_backward(mode, model, x, y, fast):
    graph = []

    def body(self, x):
        graph.append(weakref.ref(hidden := self.first(x).tanh()))
        return self.second(hidden.exp())

    run = fast(model(body), mode=mode)
    run.criterion(run.module(x), y).backward()
    assert graph[0]() is None
    run = weakref.ref(run.model)
    gc.collect()
    assert run() is None


@pytest.mark.parametrize("mode", MODES)
def test_inputs_that_require_a_gradient(mode, model, x, y, private):
    def find(way, mode):
        run = private(model(lambda self, x, scale: self.second(self.first(x * scale))), way=way, mode=mode)
        leaf = x.clone().requires_grad_()
        return [*run.step_of(lambda: run.criterion(run.module(leaf.sin(), scale=leaf), y)), leaf.grad]

    # To the input's gradient Opacus' ghost clipping adds that of its second backward.
    torch.testing.assert_close(find("engine", mode), find(None, "hooks"))


@pytest.mark.parametrize("mode", MODES)
def test_without_wrapping_the_model(mode, model, x, y, private, fast):
    found = []
    for run in (fast(model(), mode=mode, wrap_model=False), private(model(), mode=mode, wrap_model=False)):
        assert isinstance(run.module, GradSampleHooks)
        found.append(run.step_of(lambda run=run: run.criterion(run.model(x), y)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("disable", [lambda module: module.disable_hooks(), lambda module: module.eval()])
def test_ordinary_backwards(disable, model, x, y, fast):
    run = fast(model())
    disable(run.module)
    run.criterion(run.module(x), y).backward()
    expected = torch.autograd.grad(run.criterion(run.model.body(run.model, x), y), run.optimizer.params)
    torch.testing.assert_close(run.grads(), list(expected))
    with pytest.raises(ValueError, match=r"no per-sample gradient of a parameter \[8, 6\]"):
        run.optimizer.step()


# Ghost clipping


def test_one_backward(model, x, y, private, fast):
    """Where Opacus runs two."""
    passes = []

    def body(self, x):
        h = self.first(x)
        h.register_hook(lambda _: passes.append(1))
        return self.second(h.tanh())

    for make, expected in ((private, 2), (fast, 1)):
        passes.clear()
        run = make(model(body), mode="ghost")
        run.criterion(run.module(x), y).backward()
        assert len(passes) == expected


def test_losses_are_combined(model, x, y, check_same):
    """By the arithmetic of Opacus' losses, which makes new ones of them."""
    check_same(model, lambda module, criterion: criterion(z := module(x), y) / 3 + 2 * criterion(-z, y), mode="ghost")


def test_a_loop_of_ones_own(model, x, y, private):
    """Two backwards, as Opacus' criterion runs them, but with other weights."""

    def find(way):
        run = private(model(), way=way, mode="ghost")
        losses = F.cross_entropy(run.module(x), y, reduction="none")
        losses.mean().backward(retain_graph=True)
        run.optimizer.zero_grad()
        weight = run.module.get_clipping_coef() * torch.tensor([1.0, 0.0, 0.5, 1.0])
        run.module.disable_hooks()
        (weight * losses).sum().backward()
        run.module.enable_hooks()
        return [*run.grads(), run.module.per_sample_gradient_norms]

    torch.testing.assert_close(find("engine"), find(None))


# The objects


@pytest.mark.parametrize("mode", MODES)
def test_copies_pickles_and_checkpoints(mode, x, fast):
    run = fast(nn.Linear(6, 4), mode=mode)
    state = copy.deepcopy(run.module.state_dict())
    assert list(state) == ["_module.weight", "_module.bias"]
    for other in (copy.deepcopy(run.module), pickle.loads(pickle.dumps(run.module))):
        assert other._module.forward.model is other._module
        torch.testing.assert_close(other(x), run.module(x))
    engine, file = PrivacyEngine(accountant="rdp"), io.BytesIO()
    engine.save_checkpoint(path=file, module=run.module, optimizer=run.optimizer)
    with torch.no_grad():
        run.model.weight.zero_()
    file.seek(0)
    engine.load_checkpoint(path=file, module=run.module, optimizer=run.optimizer)
    torch.testing.assert_close(run.module.state_dict(), state)


def test_the_signature_stays(fast):
    class Labelled(nn.Linear):
        def forward(self, input_ids, labels=None):
            return super().forward(input_ids)

    run = fast(Labelled(6, 4))
    assert list(inspect.signature(run.model.forward).parameters) == ["input_ids", "labels"]


def test_grad_sample_explains_itself(model, x, fast):
    run = fast(model())
    run.module(x).sum().backward()
    with pytest.raises(AttributeError, match="fastmix forms no per-sample gradients"):
        run.model.first.weight.grad_sample.shape  # noqa: B018
    run.module.zero_grad()
    assert run.model.first.weight.grad_sample is None
