"""accelerate and restore of Opacus' engines and optimizers, what they refuse, and several processes."""

from __future__ import annotations

import gc
import pickle
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastmix.integrations.opacus import accelerate, restore
from fastmix.per_sample import grad_norms

pytest.importorskip("opacus")
from opacus import PrivacyEngine
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),  # on layers whose input needs no gradient
    pytest.mark.filterwarnings("ignore:PrivacyEngine detected new dataset"),
    pytest.mark.usefixtures("one_thread"),
]

MODES = ("hooks", "ghost")
_ghost_backward = DPTensorFastGradientClipping.backward


def reset(run, grads):
    """Takes a step of SGD back."""
    with torch.no_grad():
        for parameter, grad in zip(run.optimizer.params, grads, strict=True):
            parameter += 0.1 * grad


@pytest.mark.parametrize("mode", MODES)
def test_restore(mode, model, x, y, private):
    gc.collect()  # what other tests have left accelerated
    run = private(model(), way="engine", mode=mode)
    fast = run.step(x, y=y)
    restore(run.engine)
    assert type(run.engine) is PrivacyEngine
    assert type(run.optimizer) is (DPOptimizer if mode == "hooks" else DPOptimizerFastGradientClipping)
    assert "forward" not in vars(run.model)
    assert DPTensorFastGradientClipping.backward is _ghost_backward
    reset(run, fast)
    torch.testing.assert_close(run.step(x, y=y), fast)
    if mode == "hooks":
        assert run.model.first.weight.grad_sample.shape == (4, 8, 6)
    accelerate(run.optimizer)
    reset(run, fast)
    torch.testing.assert_close(run.step(x, y=y), fast)
    assert not isinstance(getattr(run.model.first.weight, "grad_sample", None), torch.Tensor)
    restore(run.optimizer)
    restore(run.optimizer)
    restore(run.engine)
    run.module.to_standard_module()
    assert not hasattr(run.model.first.weight, "grad_sample")


def test_a_model_is_made_private_again(model, x, y, private):
    run = private(model(), way="engine")
    again = private(run.module, engine=run.engine)
    assert again.module is run.module
    torch.testing.assert_close(again.step(x, y=y), private(model()).step(x, y=y))


# What is refused


def test_wrong_arguments():
    for wrong in (nn.Linear(2, 2), torch.optim.SGD(nn.Linear(2, 2).parameters())):
        for function in (accelerate, restore):
            with pytest.raises(TypeError, match=r"must be an opacus PrivacyEngine or DPOptimizer, got (Linear|SGD)"):
                function(wrong)


def test_twice(model, private):
    run = private(model(), way="engine")
    for target in (run.engine, run.optimizer):
        with pytest.raises(RuntimeError, match="accelerated already"):
            accelerate(target)
    run = private(model())
    with pytest.raises(RuntimeError, match="has made a model private already"):
        accelerate(run.engine)


@pytest.mark.parametrize("mode", ["ew", "no_op", "ghost_fsdp"])
def test_other_modes(mode, model, private):
    with pytest.raises(TypeError, match=f"grad_sample_mode must be 'hooks', 'functorch' or 'ghost' .* got '{mode}'"):
        private(model(), way="engine", mode=mode)
    if mode != "ghost_fsdp":
        run = private(model(), mode=mode)
        with pytest.raises(TypeError, match=r"GradSampleModule(ExpandedWeights|NoOp); served are GradSampleHooks"):
            accelerate(run.optimizer)


def test_other_classes(model, private):
    class Mine(DPOptimizer):
        pass

    class MyEngine(PrivacyEngine):
        pass

    run = private(model())
    run.optimizer.__class__ = Mine
    with pytest.raises(TypeError, match="Mine; served are DPOptimizer, AdaClip"):
        accelerate(run.optimizer)
    with pytest.raises(TypeError, match="MyEngine; served are PrivacyEngine or"):
        accelerate(MyEngine())
    restore(MyEngine())
    sgd = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match=r"must belong to one GradSampleModule, .* found 0"):
        accelerate(DPOptimizer(sgd, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=1))


@pytest.mark.parametrize("way", [None, "engine"])
@pytest.mark.parametrize("wrap_model", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_hooks_that_are_removed_leave_nothing_behind(mode, wrap_model, way, model, x, y, private):
    """The model can be made private anew, and restoring the optimizer of before takes nothing from it."""
    own = model()
    first = private(own, way="engine", mode=mode, wrap_model=wrap_model)
    first.step_of(lambda: first.criterion(own(x), y))
    first.module.cleanup()
    assert "forward" not in vars(own)
    assert not hasattr(own.first.weight, "grad_sample")
    again = private(own, way=way, mode=mode)
    restore(first.optimizer)
    torch.testing.assert_close(again.step(x, y=y), private(model(), mode=mode).step(x, y=y))


def test_hooks_of_opacus_beside_ours(model, x, y, private, fast):
    run = fast(model())
    with pytest.raises(ValueError, match="Trying to add hooks twice"):
        private(run.model)
    run.module.remove_hooks()
    run.module.add_hooks()
    with pytest.raises(RuntimeError, match="the model has Opacus' own hooks again"):
        run.step(x, y=y)
    restore(run.optimizer)
    torch.testing.assert_close(run.step(x, y=y), private(model()).step(x, y=y))


def test_several_optimizers_of_one_model(model, x, y, private):
    def make(way):
        run = private(model(), way=way)
        run.model.first.requires_grad_(False)
        second = private(run.module, engine=run.engine).optimizer
        run.model.first.requires_grad_(True)
        return run, [run.optimizer, second]

    run, optimizers = make("engine")
    assert [len(optimizer.params) for optimizer in optimizers] == [4, 2]
    restore(optimizers[1])
    assert {type(optimizer) for optimizer in optimizers} == {DPOptimizer}
    torch.testing.assert_close(run.step(x, y=y), private(model()).step(x, y=y))


def test_engines_are_pickled(model, private):
    run = private(model(), way="engine")
    run.engine.dataset = None
    other = pickle.loads(pickle.dumps(run.engine))
    assert type(other) is type(run.engine)
    restore(other)
    assert type(other) is PrivacyEngine
    assert type(run.optimizer) is not DPOptimizer


def test_a_grad_norms_block(model, x, fast):
    run = fast(model())
    with grad_norms(run.model), pytest.raises(RuntimeError, match="block is open"):
        run.module(x)


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_without_a_gradient(mode, model, x, y, fast):
    run = fast(model(lambda self, x: self.first(x)[:, :4]), mode=mode)
    with pytest.raises(ValueError, match=r"no per-sample gradient of (second.weight|a parameter \[4, 8\])"):
        run.step(x, y=y)


def test_a_changed_input(model, x, fast):
    run = fast(model())
    run.module(x).sum().backward()
    x.zero_()
    with pytest.raises(RuntimeError, match=r"changed in place between the backward and optimizer\.step"):
        run.optimizer.step()


def test_a_second_backward(model, x, fast):
    module = fast(model()).module
    loss = module(x).square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(module(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_an_interrupted_forward_leaves_nothing_behind(model, x, fast):
    def body(self, x):
        raise KeyboardInterrupt

    run = fast(model(body))
    with pytest.raises(KeyboardInterrupt):
        run.module(x)
    run.model.body = lambda self, x: self.second(self.first(x))
    run.module(x).sum().backward()
    run.optimizer.step()


# Several processes


@pytest.fixture
def process_group(tmp_path):
    """Of one process."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=20))
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [DifferentiallyPrivateDistributedDataParallel, DistributedDataParallel])
@pytest.mark.parametrize(
    "options", [{}, {"clipping": "per_layer", "max_grad_norm": [0.1, 0.2, 0.3, 0.4]}, {"mode": "ghost"}], ids=str
)
def test_distributed(wrap, options, model, x, y, private, fast, process_group):
    run, opacus = (
        fast(wrap(model().double()), **options),
        private(DifferentiallyPrivateDistributedDataParallel(model()), **options),
    )
    assert "Distributed" in type(run.optimizer).__name__
    for _ in range(2):
        torch.testing.assert_close(run.step(x, y=y), opacus.step(x, y=y))
