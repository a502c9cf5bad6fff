# SPDX-License-Identifier: Apache-2.0
"""Autocast to bfloat16 without casts, and models of bfloat16."""

import itertools

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import sebp  # noqa: E402
from sebp._rules import Rule  # noqa: E402
from sebp.torch import linear  # noqa: E402
from sebp.torch.linear_layers import products  # noqa: E402
from sebp.torch.linear_layers.linear import sparse_linear  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16
OPERATOR = torch.ops.sebp.linear.default
# Of products of matrices rounded to bfloat16, in multiples of the sum of |a||b| (sebp/context.h).
MEDIUM = 2.0**-6.9
MIXTURES = list(itertools.product([F32, BF16], repeat=3))


@pytest.fixture(params=["library", "PyTorch"])
def forwards_by(request, monkeypatch):
    """Both ways to compute a forward, whichever this CPU has."""
    monkeypatch.setattr(products, "is_fast_in_bfloat16", lambda: request.param == "library")
    return request.param


@pytest.fixture
def by_library(monkeypatch):
    """The forward as it is where the library is fast in bfloat16."""
    monkeypatch.setattr(products, "is_fast_in_bfloat16", lambda: True)


def make(dtypes=(F32, F32, F32), transposed=False, m=24, n=40, k=70):
    x, w, bias = torch.randn(3, m // 3, k), torch.randn(n, k), torch.randn(n)
    w = w.t().contiguous() if transposed else w
    return [t.to(d).requires_grad_() for t, d in zip((x, w, bias), dtypes, strict=True)]


def make_gradient(m=24, n=40):
    return (torch.randn(3, m // 3, n) * (torch.arange(m // 3) < 6)[:, None]).to(BF16)


def cast():
    return torch.autocast("cpu", BF16)


def direct(x, w, bias, transposed=False):
    y = sparse_linear(x, w, bias, Rule(), transposed)
    assert y.grad_fn.name() == "sebp_linearBackward"
    return y


def by_operator(x, w, bias, transposed=False):
    y = OPERATOR(x, w, bias, None, transposed)
    assert "sebp_linearB" not in y.grad_fn.name()
    return y


def same(got, want):
    assert len(got) == len(want) > 0
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other) and bool(other.any())


def within(got, want, magnitude, terms):
    """Hold a result against the exact one, of float64."""
    bound = (MEDIUM + terms * 2.0**-22) * magnitude
    if got.dtype == BF16:
        bound = bound + 2.0**-8 * (want.abs() + bound)
    assert got.shape == want.shape
    assert bool(((got.double() - want).abs() <= bound).all())


def seen_operators(function):
    """List the operators that a function runs, by the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return {event.key for event in profiler.key_averages()}


# --------------------------------------------------------------------------------------------------
# Autocast


@pytest.mark.parametrize("dtypes", MIXTURES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("function", [direct, by_operator])
def test_mixtures_under_autocast(forwards_by, dtypes, transposed, function):
    """The dtypes are PyTorch's, and results are within the error of bfloat16."""
    x, w, bias = inputs = make(dtypes, transposed)
    dy = make_gradient()
    with cast():
        y = function(*inputs, transposed)
        plain = functional.linear(x, w.t() if transposed else w, bias)
    got, want = (torch.autograd.grad(out, inputs, dy) for out in (y, plain))
    assert [y.dtype, *(g.dtype for g in got)] == [BF16, *dtypes]
    assert [plain.dtype, *(g.dtype for g in want)] == [BF16, *dtypes]
    a, b, c, g = (t.detach().double() for t in (x, w, bias, dy))
    b = b.t() if transposed else b
    flat, g2 = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
    within(y, a @ b.t() + c, a.abs() @ b.abs().t() + c.abs(), 71)
    within(got[0], g @ b, g.abs() @ b.abs(), 40)
    dw, size = g2.t() @ flat, g2.abs().t() @ flat.abs()
    within(got[1], dw.t() if transposed else dw, size.t() if transposed else size, 24)
    within(got[2], g2.sum(0), g2.abs().sum(0), 24)


@pytest.mark.parametrize("dtypes", MIXTURES)
@pytest.mark.parametrize("transposed", [False, True])
def test_direct_calls_have_the_operators_bits(forwards_by, dtypes, transposed):
    inputs, dy = make(dtypes, transposed), make_gradient()
    with cast():
        ys = [function(*inputs, transposed) for function in (direct, by_operator)]
    same(ys[:1], ys[1:])
    same(*(torch.autograd.grad(y, inputs, dy) for y in ys))


def test_gradients_of_float32_are_not_rounded(by_library):
    inputs, dy = make(), make_gradient()
    with cast():
        y = linear(*inputs)
    for gradient in torch.autograd.grad(y, inputs, dy):
        assert not torch.equal(gradient, gradient.to(BF16).float())


def test_nothing_is_cast(by_library):
    """Neither operands nor gradients; and PyTorch's own linear does cast, so that this is seen."""
    layers = [nn.Linear(70, 40), nn.Linear(70, 40)]
    sebp.apply_sebp_to_model(layers[0])

    casts = {"aten::to", "aten::_to_copy", "aten::copy_", "aten::addmm", "aten::mm"}
    x = [torch.randn(24, 70).to(dtype).requires_grad_() for dtype in (F32, BF16)]
    dy = torch.ones(24, 40, dtype=BF16)

    def step(layer):
        for one in x:
            with cast():
                y = layer(one)
            y.backward(dy)
            layer.zero_grad()

    assert seen_operators(lambda: step(layers[1])) >= casts
    seen = seen_operators(lambda: step(layers[0]))
    assert {"sebp::linear", "sebp::linear_backward"} <= seen
    assert not seen & casts


@pytest.mark.parametrize("function", [direct, by_operator])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F32, F32)])
def test_operands_are_saved_as_they_came(function, dtypes):
    inputs = make(dtypes)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks, cast():
        function(*inputs)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in inputs[:2]]
    assert [t.dtype for t in saved] == list(dtypes[:2])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F32, F32), (F32, BF16, BF16)])
def test_checkpointing(by_library, reentrant, dtypes):
    dy = make_gradient()
    results = []
    for through in (checkpoint, lambda function, *tensors, use_reentrant: function(*tensors)):
        torch.manual_seed(0)
        inputs = make(dtypes)
        with cast():
            y = through(
                lambda x, *rest: linear(torch.tanh(x), *rest), *inputs, use_reentrant=reentrant
            )
        y.backward(dy)
        results.append([t.grad for t in inputs])
    same(*results)


def test_autocast_within_autocast(by_library):
    """Without autocast inside, the layer is of float32 there."""
    inputs = make()
    with cast(), torch.autocast("cpu", enabled=False):
        y = linear(*inputs)
        with cast():
            low = linear(*inputs)
        operator = OPERATOR(*inputs)
    same([y, y], [linear(*inputs), operator])
    assert low.dtype == BF16
    with cast(), torch.autocast("cpu", enabled=False), pytest.raises(RuntimeError, match="dtype"):
        linear(inputs[0].to(BF16), *inputs[1:])  # as PyTorch's own


@pytest.mark.parametrize("function", [linear, by_operator])
def test_autocast_to_float16_is_pytorchs(function):
    inputs, dy = make(), make_gradient().half()
    with torch.autocast("cpu", torch.float16):
        y, want = function(*inputs), functional.linear(*inputs)
    assert y.dtype == torch.float16
    same([y], [want])
    got = torch.autograd.grad(y, inputs, dy)
    for one, other in zip(got, torch.autograd.grad(want, inputs, dy), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_autocast_leaves_float64_alone():
    inputs = make([torch.float64] * 3)
    with cast():
        ys = functional.linear(*inputs), linear(*inputs), by_operator(*inputs)
    assert ys[0].dtype == torch.float64
    same(ys[1:], [ys[0]] * 2)


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F32, BF16), (F32, BF16, F32)])
@pytest.mark.parametrize("function", [direct, by_operator])
@pytest.mark.parametrize("transposed", [False, True])
def test_double_backward(dtypes, function, transposed):
    inputs, dy = make(dtypes, transposed), make_gradient().requires_grad_()

    def plain(x, w, bias, transposed):
        return functional.linear(x, w.t() if transposed else w, bias)

    results = []
    for one in (function, plain):
        with cast():
            y = one(*inputs, transposed)
        first = torch.autograd.grad(y, inputs, dy, create_graph=True)
        loss = sum(g.float().square().mean() for g in first)
        results.append(torch.autograd.grad(loss, (*inputs[:2], dy)))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        scale = float(want.abs().max())
        torch.testing.assert_close(got.float(), want.float(), rtol=0.05, atol=0.02 * scale)


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F32, F32)])
@pytest.mark.parametrize("compiled_autograd", [False, True])
def test_compile(dtypes, compiled_autograd):
    inputs, dy = make(dtypes), make_gradient()
    with cast():
        want = torch.autograd.grad(by_operator(*inputs), inputs, dy)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=compiled_autograd):
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        with cast():
            y = compiled(*inputs)
        assert y.dtype == BF16
        y.backward(dy)
    same([t.grad for t in inputs], want)


def test_function_transforms_are_pytorchs():
    x, w, _ = (t.detach() for t in make())
    results = []
    for function in (linear, functional.linear):
        with cast():
            results.append(torch.func.grad(lambda w, f=function: f(x, w).float().sum())(w))
    same(results[:1], results[1:])


def test_batched_gradients():
    inputs, dys = make(), torch.stack([make_gradient(), make_gradient()])
    with cast():
        y = direct(*inputs)
    want = [torch.autograd.grad(y, inputs, dy, retain_graph=True) for dy in dys]
    got = torch.autograd.grad(y, inputs, dys, is_grads_batched=True)
    same(got, [torch.stack(both) for both in zip(*want, strict=True)])


def test_flop_counters():
    counts = []
    for function in (linear, functional.linear):
        inputs = make()
        with FlopCounterMode(display=False) as counter, cast():
            function(*inputs).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 6 * 24 * 40 * 70


@pytest.mark.parametrize("dtypes", MIXTURES)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(dtypes, dtype, transposed):
    inputs = make(dtypes, transposed, 6, 5, 4)
    check = torch.library.opcheck
    check(OPERATOR, (*inputs, None, transposed, 0, 0.0, dtype))
    dy = torch.randn(3, 2, 5).to(dtype).requires_grad_()
    arguments = (dy, inputs[0], inputs[1], 6, transposed, 0, 0.0, *dtypes)
    check(torch.ops.sebp.linear_backward.default, arguments)


# --------------------------------------------------------------------------------------------------
# Models


def make_net():
    return nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 8))


def test_gradients_are_no_worse_than_pytorchs(by_library):
    """Against those of float32, over a model's layers."""
    plain, ours = make_net(), make_net()
    ours.load_state_dict(plain.state_dict())
    sebp.apply_sebp_to_model(ours)
    x, labels = torch.randn(200, 24), torch.randint(8, (200,))
    results = []
    for model, enabled in ((plain, False), (plain, True), (ours, True)):
        with torch.autocast("cpu", BF16, enabled=enabled):
            loss = functional.cross_entropy(model(x), labels)
        parameters = list(model.parameters())
        results.append((loss.detach(), *torch.autograd.grad(loss, parameters)))
    exact, theirs, own = results
    torch.testing.assert_close(own[0], exact[0], rtol=1e-2, atol=1e-2)
    for want, other, got in zip(exact[1:], theirs[1:], own[1:], strict=True):
        assert got.dtype == want.dtype == F32
        assert float((got - want).norm()) <= 1.5 * float((other - want).norm()) + 1e-6


def test_models_of_bfloat16(by_library, monkeypatch, capfd):
    """All products are the library's, and nothing is cast."""
    monkeypatch.setenv("SEBP_VERBOSE", "1")
    plain, ours = make_net().to(BF16), make_net().to(BF16)
    ours.load_state_dict(plain.state_dict())
    sebp.apply_sebp_to_model(ours)
    x, dy = torch.randn(30, 24).to(BF16), torch.randn(30, 8).to(BF16)

    def step(model):
        model(x).backward(dy)
        return [p.grad for p in model.parameters()]

    seen = seen_operators(lambda: step(ours))
    assert not seen & {"aten::to", "aten::_to_copy", "aten::copy_", "aten::addmm", "aten::mm"}
    assert "fallback" not in capfd.readouterr().err
    ours.zero_grad()
    for got, want in zip(step(ours), step(plain), strict=True):
        assert got.dtype == BF16
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * float(want.abs().max()))
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2)
    before = functional.mse_loss(ours(x), dy).item()
    for _ in range(20):
        optimizer.zero_grad()
        functional.mse_loss(ours(x), dy).backward()
        optimizer.step()
    assert functional.mse_loss(ours(x), dy).item() < 0.9 * before
