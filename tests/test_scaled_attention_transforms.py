"""scaled_attention under autograd of every order, torch.func, torch.compile, export and autocast."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastmix
from fastmix.reference import scaled_attention as reference
from fastmix.testing.cases import Case
from fastmix.testing.parity import GRADIENT_FACTOR, check_parity
from fastmix.testing.scaled_attention import scaled_attention_case


def _case(name: str, shape: tuple[int, ...], **options) -> Case:
    return scaled_attention_case(name, shape, return_lse=True, **options)


# Sizes of gradcheck, which differentiates element by element; together they have every option.
SMALL = [
    _case("plain", (2, 2, 3, 4, 2), kv_heads=1, value_size=3),
    _case("structure", (2, 1, 4, 5, 2), prefix_len=[2, 0], window_size=(2, 3), key_lengths=[5, 3], key_start=[1, 0],
          query_lengths=[4, 2], causal_alignment="bottom_right", query_scale="BT"),
    _case("biases", (1, 2, 3, 4, 4), value_size=1, mask="-inf", mask_shape=(2, 3, 4), buckets=4, max_distance=5,
          rotary=2, is_causal=True, query_scale="T"),
    _case("dropout", (1, 1, 3, 4, 4), value_size=2, dropout_p=0.3, dropout_seed=2, rotary=4, interleaved=False,
          mask="float"),
    _case("packed", (1, 2, 5, 6, 2), cu_seqlens_q=[0, 3, 4], cu_seqlens_k=[0, 2, 6], is_causal=True, buckets=4),
]  # fmt: skip
EACH_SMALL = pytest.mark.parametrize("case", SMALL, ids=str)

MEDIUM = [
    _case("plain", (2, 4, 17, 31, 16), kv_heads=2),
    _case("all", (2, 4, 17, 31, 16), kv_heads=2, prefix_len=[9, 0], key_lengths=[31, 20], mask="float", buckets=8,
          mask_shape=(1, 4, 17, 31), rotary=8, query_scale="BT", dropout_p=0.2, dropout_seed=3),
    _case("packed", (1, 4, 17, 31, 16), cu_seqlens_q=[0, 8, 17], cu_seqlens_k=[0, 10, 31], buckets=8),
]  # fmt: skip
EACH_MEDIUM = pytest.mark.parametrize("case", MEDIUM, ids=str)


def _split(case: Case, dtype: torch.dtype = torch.float32, function=None):
    """(function of the tensors that get a gradient, those tensors)."""
    inputs, function = case.inputs(dtype), function or case.function
    names = list(case.gradients)
    rest = {name: value for name, value in inputs.items() if name not in names}
    leaves = [inputs[name].clone().requires_grad_() for name in names]
    return (lambda *values: function(**dict(zip(names, values, strict=True)), **rest)), leaves


def _loss(outputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Not linear in output and log-sum-exp, and finite where nothing is attended to."""
    output, lse = outputs
    return output.float().square().sum() + lse.exp().mean()


# Autograd


@EACH_SMALL
def test_gradcheck(case):
    function, leaves = _split(case, torch.float64)

    def finite(*values):
        output, lse = function(*values)
        return output, lse.exp()

    assert gradcheck(finite, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(finite, leaves, fast_mode=True)


def _grads_of_order_two(function, inputs):
    inputs = [value.detach().requires_grad_() for value in inputs]
    grads = torch.autograd.grad(_loss(function(*inputs)), inputs, create_graph=True)
    return torch.autograd.grad(sum(grad.float().square().sum() for grad in grads), inputs)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@EACH_MEDIUM
def test_double_backward(case, dtype, recorded, assert_kernel):
    function, inputs = _split(case, dtype)
    plain, _ = _split(case, dtype, case.reference)
    with recorded() as ops:
        actual = _grads_of_order_two(function, inputs)
    assert_kernel(ops, "scaled_attention_bwd", dtype)
    expected = _grads_of_order_two(plain, inputs)
    oracle = _grads_of_order_two(plain, [value.double() for value in inputs])
    for name, *grads in zip(case.gradients, actual, expected, oracle, strict=True):
        check_parity(f"second order, {name}", *grads, factor=GRADIENT_FACTOR)


@pytest.mark.kernel
@EACH_MEDIUM
def test_gradient_only_where_it_is_asked_for(case):
    function, leaves = _split(case)
    expected = torch.autograd.grad(_loss(function(*leaves)), leaves)
    for i, value in enumerate(leaves):
        others = [leaf.detach() for leaf in leaves]
        others[i] = value
        (grad,) = torch.autograd.grad(_loss(function(*others)), value)
        torch.testing.assert_close(grad, expected[i])
    with torch.no_grad():
        assert not any(output.requires_grad for output in function(*leaves))
    with torch.inference_mode():
        assert all(output.is_inference() for output in function(*leaves))


@pytest.mark.kernel
@pytest.mark.parametrize("used", [0, 1])
@EACH_MEDIUM
def test_gradient_of_one_output(case, used):
    """The other's is None, which counts as zero."""
    function, leaves = _split(case)
    outputs = function(*leaves)
    zeros = [output * 0 if i != used else output for i, output in enumerate(outputs)]
    expected = torch.autograd.grad(sum(x.sum() for x in zeros), leaves, retain_graph=True)
    actual = torch.autograd.grad(outputs[used].sum(), leaves, materialize_grads=True)
    torch.testing.assert_close(actual, expected)


@pytest.mark.kernel
@EACH_MEDIUM
def test_gradient_of_a_grad_output_with_strides(case):
    """sum() hands back an expanded gradient, a transposition a transposed one."""
    function, leaves = _split(case)
    output, lse = function(*leaves)
    drawn = torch.randn(output.shape)
    for scalar, grad_output in [
        (output.sum() + lse.sum(), torch.ones_like(output)),
        ((output.mT * drawn.mT.contiguous()).sum() + lse.sum(), drawn),
    ]:
        actual = torch.autograd.grad(scalar, leaves, retain_graph=True)
        grads = grad_output, torch.ones_like(lse)
        torch.testing.assert_close(actual, torch.autograd.grad((output, lse), leaves, grads, retain_graph=True))


def test_tables_of_rotary_may_be_trained():
    """By the reference, since the kernels have no gradient for them."""
    inputs = scaled_attention_case("rotary", (1, 2, 3, 4, 4), rotary=4).inputs(torch.float64)
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    tables = [inputs[name].requires_grad_() for name in ("cos", "sin")]

    def function(*tables):
        return fastmix.scaled_attention(query, key, value, rotary=fastmix.Rotary(*tables))

    assert gradcheck(function, tables)
    half = [x.float().detach() for x in (query, key, value)]
    tables = [table.detach().float().requires_grad_() for table in tables]
    output = fastmix.scaled_attention(*half, rotary=fastmix.Rotary(*tables))
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(output.square().sum(), tables))


def test_saved_tensors_are_freed_and_checked(needs_kernels):
    function, leaves = _split(MEDIUM[0])
    output = function(*leaves)[0]
    output.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.sum().backward()
    query = leaves[0].detach().clone().requires_grad_() * 1
    output = function(query, *leaves[1:])[0]
    query.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@EACH_MEDIUM
def test_checkpoint(case):
    function, leaves = _split(case)
    expected = torch.autograd.grad(function(*leaves)[0].sum(), leaves)
    output = torch.utils.checkpoint.checkpoint(lambda *x: function(*x)[0], *leaves, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(output.sum(), leaves), expected, strict=True))


def test_checkpoint_replays_dropout():
    """Without a seed of the caller's: it is drawn from the generator, which the checkpoint restores."""
    x = torch.randn(1, 2, 9, 8, requires_grad=True)

    def function(x):
        return fastmix.scaled_attention(x, x, x, dropout_p=0.5).square().sum()

    torch.manual_seed(1)
    expected = torch.autograd.grad(function(x), x)[0]
    torch.manual_seed(1)
    loss = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


# torch.func and forward mode


@EACH_SMALL
def test_jvp_and_vjp(case):
    function, leaves = _split(case, torch.float64)
    values = tuple(leaf.detach() for leaf in leaves)
    tangents = tuple(torch.randn_like(value) for value in values)
    _, derivatives = torch.func.jvp(lambda *x: function(*x)[0], values, tangents)
    _, pull = torch.func.vjp(lambda *x: function(*x)[0], *values)
    drawn = torch.randn_like(derivatives)
    products = sum((grad * tangent).sum() for grad, tangent in zip(pull(drawn), tangents, strict=True))
    torch.testing.assert_close((drawn * derivatives).sum(), products)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"key_lengths": torch.tensor([4, 6])}], ids=str)
def test_vmap(options):
    query, key, value = torch.randn(3, 2, 2, 5, 4), torch.randn(2, 2, 6, 4), torch.randn(2, 2, 6, 4)
    mapped = torch.vmap(lambda query: fastmix.scaled_attention(query, key, value, **options))(query)
    expected = torch.stack([fastmix.scaled_attention(q, key, value, **options) for q in query])
    torch.testing.assert_close(mapped, expected)


def test_per_sample_gradients():
    x, weight = torch.randn(3, 5, 4), torch.randn(8, 2)

    def loss(weight, sample):
        heads = sample.view(1, 5, 2, 2).transpose(1, 2)
        return fastmix.scaled_attention(heads, heads, heads, relative_bias=fastmix.RelativeBias(weight)).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    for sample, grad in zip(x, per_sample, strict=True):
        leaf = weight.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(loss(leaf, sample), leaf)[0], grad)


# The registered ops


def _op_arguments(case: Case, dtype: torch.dtype) -> list:
    """As the public function hands them to the op, the first six requiring grad where they can."""
    found = []

    def keep(*arguments):
        found.extend(x.detach().clone() if isinstance(x, torch.Tensor) else x for x in arguments)
        return fastmix.scaled_attention(arguments[0], arguments[1], arguments[2], return_lse=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "attend", keep)
        case.reference(**case.inputs(dtype))
    return [x.requires_grad_() if i < 6 and x is not None and x.is_floating_point() else x for i, x in enumerate(found)]


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EACH_MEDIUM
def test_opcheck(case, dtype, needs_kernels):
    arguments = _op_arguments(case, dtype)
    op, bwd = (getattr(torch.ops.fastmix, name).default for name in ("scaled_attention", "scaled_attention_bwd"))
    torch.library.opcheck(op, arguments)
    with torch.no_grad():
        output, *saved = op(*arguments)
    asked = [x is not None and x.requires_grad for x in arguments[3:6]]
    inputs, options = [x if x is None else x.detach() for x in arguments[:6]], arguments[6:]
    for grad_lse, grads in [(torch.randn_like(saved[0]), asked), (None, [False] * 3)]:
        given = torch.randn_like(output), grad_lse, *inputs, output, *saved, *options, *grads
        torch.library.opcheck(bwd, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.kernel
def test_gradients_have_the_heads_of_a_token_side_by_side(needs_kernels):
    arguments = _op_arguments(MEDIUM[1], torch.float32)
    with torch.no_grad():
        outputs = torch.ops.fastmix.scaled_attention.default(*arguments)
        given = outputs[0], None, *arguments[:6], *outputs, *arguments[6:], False, True, True
        dq, dk, dv, dmask, dtable, dscale = torch.ops.fastmix.scaled_attention_bwd.default(*given)
    assert all(x.transpose(1, 2).is_contiguous() for x in (outputs[0], dq, dk, dv))
    assert (list(dmask.shape), dtable.shape, list(dscale.shape)) == ([0], arguments[4].shape, [2, 17])


# torch.compile and export


def _compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in MEDIUM), (MEDIUM[1], torch.bfloat16), (MEDIUM[0], torch.float64)],
    ids=str,
)
def test_compile(case, dtype):
    function, leaves = _split(case, dtype)
    results = []
    for run in (function, _compiled(function, backend="aot_eager")):
        outputs = run(*leaves)
        results.append([*outputs, *torch.autograd.grad(_loss(outputs), leaves)])
    torch.testing.assert_close(*results)


def test_compile_with_inductor():
    def function(x, lengths):
        return fastmix.scaled_attention(x, x, x, key_lengths=lengths, is_causal=True).relu()

    x, lengths = torch.randn(2, 2, 9, 8, requires_grad=True), torch.tensor([9, 5])
    outputs = [f(x, lengths) for f in (_compiled(function), function)]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in outputs))


def test_compile_of_many_shapes():
    compiled = _compiled(fastmix.scaled_attention, backend="aot_eager", dynamic=True)
    for shape in ((2, 2, 7, 9, 6), (3, 4, 5, 11, 4)):
        inputs = scaled_attention_case("", shape, is_causal=True).inputs(torch.float32)
        query = inputs.pop("query").requires_grad_()
        outputs = [f(query, **inputs) for f in (compiled, fastmix.scaled_attention)]
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), query) for y in outputs))


@pytest.mark.kernel
def test_compiled_program_calls_the_kernel(assert_kernel):
    function, leaves = _split(MEDIUM[1])
    compiled = _compiled(lambda *x: function(*x)[0], backend="aot_eager")
    compiled(*leaves)
    with torch.profiler.profile() as profile:
        compiled(*leaves).sum().backward()
    ops = [event.name.removeprefix("fastmix::") for event in profile.events() if event.name.startswith("fastmix::")]
    assert_kernel(ops, "scaled_attention")
    assert_kernel(ops, "scaled_attention_bwd")


@pytest.mark.gpu
@EACH_MEDIUM
def test_in_a_cuda_graph(case):
    inputs = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in case.inputs(torch.bfloat16).items()}
    case.function(**inputs)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = case.function(**inputs)
    inputs["query"].mul_(2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(outputs, case.function(**inputs), strict=True))


def test_export():
    class Model(torch.nn.Module):
        def forward(self, x, lengths):
            return fastmix.scaled_attention(x, x, x, key_lengths=lengths, is_causal=True)

    batch = torch.export.Dim("batch", min=2, max=64)
    inputs = torch.randn(3, 2, 5, 4), torch.tensor([5, 4, 2])
    program = torch.export.export(Model(), inputs, dynamic_shapes={"x": {0: batch}, "lengths": {0: batch}})
    x, lengths = torch.randn(7, 2, 5, 4), torch.tensor([5, 4, 3, 2, 1, 0, 5])
    torch.testing.assert_close(program.module()(x, lengths), Model()(x, lengths))


@EACH_MEDIUM
def test_fake_tensors_and_meta(case):
    inputs = case.inputs(torch.bfloat16)
    expected = case.function(**inputs)
    meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    with torch._subclasses.FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        found = case.function(**fake)
    for outputs in (found, case.function(**meta)):
        for output, like in zip(outputs, expected, strict=True):
            assert (output.shape, output.dtype) == (like.shape, like.dtype)


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EACH_MEDIUM
def test_autocast(case, dtype):
    """query, key and value are cast; a mask, a bias and a query_scale stay in float32."""
    function, leaves = _split(case)
    with torch.autocast("cpu", dtype):
        output, lse = function(*leaves)
    cast = [
        x.to(dtype) if name in ("query", "key", "value") else x for name, x in zip(case.gradients, leaves, strict=True)
    ]
    assert output.dtype == dtype
    assert torch.equal(output, function(*cast)[0])
    assert torch.equal(lse, function(*cast)[1])
    grads = torch.autograd.grad(output.sum() + lse.sum(), leaves)
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_autocast_leaves_float64():
    function, leaves = _split(MEDIUM[1], torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = function(*leaves)
    assert all(torch.equal(a, b) for a, b in zip(outputs, function(*leaves), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_autocast_of_a_mask_in_the_inputs_dtype(dtype):
    """Whatever autocast makes of the query, a mask in the dtype that it had serves."""
    case = scaled_attention_case("masked", (1, 2, 9, 8, 4), mask="float", mask_shape=(9, 8))
    inputs = case.inputs(dtype)
    inputs["attn_mask"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = case.function(**inputs)
    assert output.dtype == torch.bfloat16
    cast = {name: value.bfloat16() for name, value in inputs.items()} | {"attn_mask": inputs["attn_mask"].float()}
    assert torch.equal(output, case.function(**cast))
    (grad,) = torch.autograd.grad(output.sum(), inputs["attn_mask"])
    assert grad.dtype == dtype
