# SPDX-License-Identifier: Apache-2.0
"""``sebp::linear`` against PyTorch's own linear and its autograd."""

import itertools
import random

import pytest

torch = pytest.importorskip("torch")

import sebp  # noqa: E402
from sebp._rules import Rule, parse_rule  # noqa: E402
from sebp._structs import RULE_NONZERO  # noqa: E402
from sebp.torch import linear  # noqa: E402

functional = torch.nn.functional
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}


def close(got, want, terms, magnitude):
    """Hold two results against each other, each within its own rounding of the exact sum.

    `terms` is the length of the sums, `magnitude` each sum of absolute values.
    """
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    bound = 2 * terms * 2.0**-23 * magnitude + 1e-30
    if got.dtype == torch.bfloat16:
        bound = bound + EPS[got.dtype] * (want.double().abs() + bound)
    off = (got.double() - want.double()).abs()
    assert bool((off <= bound).all()), f"off by {float((off - bound).max())}"


def make(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def lay(tensor, layout):
    """Give a tensor other strides, or the same value from another shape."""
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "gaps":
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), float("nan"))
        wide = wide.to(tensor.dtype)
        wide[..., : tensor.shape[-1]] = tensor
        return wide[..., : tensor.shape[-1]]
    if layout == "expanded":
        return tensor[..., :1].expand(tensor.shape)
    return tensor


def mask_rows(shape, kind):
    """Mark the rows that have a gradient."""
    if kind == "none":
        return torch.ones(shape, dtype=torch.bool)
    if kind == "all":
        return torch.zeros(shape, dtype=torch.bool)
    if kind == "scattered":
        return torch.rand(shape) < 0.4
    lengths = torch.randint(1, shape[-1] + 1, (*shape[:-1], 1))
    mask = torch.arange(shape[-1]) < lengths
    return mask.flip(-1) if kind == "left" else mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", ["none", "right", "left", "scattered", "all"])
@pytest.mark.parametrize("layout", ["plain", "transposed", "gaps", "expanded"])
@pytest.mark.parametrize("transposed", [False, True], ids=["NxK", "KxN"])
def test_against_autograd(dtype, padding, layout, transposed):
    lead = [random.randint(1, 12) for _ in range(random.choice([1, 2, 2, 3]))]
    n, k = random.randint(1, 150), random.randint(1, 150)
    x, w, bias = make(*lead, k, dtype=dtype), make(n, k, dtype=dtype), make(n, dtype=dtype)
    bias = bias if random.random() < 0.8 else None
    inputs = [x, w] if bias is None else [x, w, bias]
    dy = torch.randn(*lead, n).to(dtype)
    dy = lay(dy, layout) * mask_rows(tuple(lead), padding)[..., None]
    dy = lay(dy, layout) if layout != "expanded" else dy
    laid = [lay(t, layout if layout != "expanded" else "plain") for t in inputs[:2]]
    if transposed:
        laid[1] = lay(w.t(), layout if layout != "expanded" else "plain")
    y = torch.ops.sebp.linear(*laid, bias, None, transposed)
    got = torch.autograd.grad(y, inputs, dy)
    want_y = functional.linear(*inputs)
    want = torch.autograd.grad(want_y, inputs, dy)
    a, b, g = (t.detach().double().abs().reshape(-1, t.shape[-1]) for t in (x, w, dy))
    m = g.shape[0]
    full = a @ b.T + (0 if bias is None else bias.detach().double().abs())
    close(y, want_y, k + 1, full.view(y.shape))
    close(got[0], want[0], n, (g @ b).view(x.shape))
    close(got[1], want[1], m, g.T @ a)
    if bias is not None:
        close(got[2], want[2], m, g.sum(0))
    if padding != "all" and bool(dy.any()):
        assert bool(want[1].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stretched", ["all", "rows", "columns", "batch"])
def test_expanded_gradients(dtype, transposed, stretched):
    """A dY of strides 0, as sums and means make it."""
    x, w, bias = make(3, 5, 8, dtype=dtype), make(6, 8, dtype=dtype), make(6, dtype=dtype)
    shape = {"all": (1, 1, 1), "rows": (1, 1, 6), "columns": (3, 5, 1), "batch": (1, 5, 6)}
    dy = torch.randn(shape[stretched])
    if stretched in ("columns", "batch"):
        dy[:, 1:4] = 0
    dy = dy.to(dtype).expand(3, 5, 6)
    assert 0 in dy.stride()
    weight = w.t() if transposed else w
    y = torch.ops.sebp.linear(x, weight, bias, None, transposed)
    got = torch.autograd.grad(y, (x, w, bias), dy)
    want = torch.autograd.grad(functional.linear(x, w, bias), (x, w, bias), dy)
    within = dict(rtol=2e-2, atol=5e-2) if dtype == torch.bfloat16 else {}
    for one, other in zip(got, want, strict=True):
        assert bool(other.any())
        torch.testing.assert_close(one, other, **within)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(0, 4, 3), (5, 0, 3), (5, 4, 0), (1, 1, 1), (0, 0, 0)])
def test_empty(shape, transposed):
    m, n, k = shape
    x, w, bias = make(m, k), make(n, k), make(n)
    dy = torch.randn(m, n)
    y = torch.ops.sebp.linear(x, w.t() if transposed else w, bias, None, transposed)
    want = functional.linear(x, w, bias)
    torch.testing.assert_close(y, want)
    got = torch.autograd.grad(y, (x, w, bias), dy)
    torch.testing.assert_close(got, torch.autograd.grad(want, (x, w, bias), dy))


def test_nan_and_inf():
    """A row of dY that holds one is active; what an inactive row of X holds does not spread."""
    x, w = make(6, 4), make(5, 4)
    dy = torch.randn(6, 5)
    dy[0], dy[4], dy[5] = 0, 0, -0.0
    dy[1, 2], dy[4, 3] = float("nan"), float("inf")
    got = torch.autograd.grad(linear(x, w), (x, w), dy)
    want = torch.autograd.grad(functional.linear(x, w), (x, w), dy)
    torch.testing.assert_close(got, want, equal_nan=True)
    dy[1], dy[4] = 1, 0
    with torch.no_grad():
        x[0] = float("nan")
    dw = torch.autograd.grad(linear(x, w), w, dy)[0]
    torch.testing.assert_close(dw, dy[1:].T @ x.detach()[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_output_changed_in_place(shape, dtype):
    x, weight = torch.randn(*shape), torch.randn(4, 5)
    bias = torch.tensor([30.0, -30.0, 30.0, -30.0])  # of Y of both signs, whatever is drawn
    gradients = []
    for function in (sebp.torch.linear, torch.nn.functional.linear):
        inputs = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = function(*inputs).relu_()
        y.sum().backward()
        gradients.append([t.grad for t in inputs])
    assert gradients[0][1].count_nonzero() > 0
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_input_changed_in_place():
    """As with PyTorch's own layer, an input that has changed since is an error."""
    x, w = make(6, 4), make(5, 4)
    middle = x * 1
    y = linear(middle, w)
    with torch.no_grad():
        middle += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def keep(dy, rule):
    """Say which rows a rule keeps, straight from its definition."""
    flat = dy.detach().double().reshape(-1, dy.shape[-1])
    energy = flat.square().sum(1)
    kind, value = rule.kind, rule.value
    if str(rule).startswith("threshold"):
        return flat.abs().amax(1) > value
    order = torch.sort(energy, descending=True, stable=True).indices
    if str(rule).startswith("energy"):
        share = energy[order].cumsum(0) >= (1 - value) * energy.sum()
        count = int(share.long().argmax()) + 1
    else:
        assert kind != RULE_NONZERO
        count = int(value)
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[:count]] = True
    return mask & (energy > 0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [7, ("threshold", 1.5), ("energy", 0.3)])
def test_rules(rows, transposed):
    x, w, bias = make(4, 9, 13), make(17, 13), make(17)
    rule = parse_rule(rows)
    weight = w.t().contiguous() if transposed else w
    y = torch.ops.sebp.linear(x, weight, bias, None, transposed, *rule)
    dy = torch.randn(4, 9, 17) * torch.rand(4, 9, 1)
    kept = dy * keep(dy, rule).view(4, 9, 1)
    assert 0 < int(keep(dy, rule).sum()) < 36
    got = torch.autograd.grad(y, (x, w, bias), dy)
    want = torch.autograd.grad(functional.linear(x, w, bias), (x, w, bias), kept)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_needs_input_grad(needs, transposed):
    if not any(needs):
        return
    x, w, bias = make(3, 5, 4), make(6, 4), make(6)
    weight = (w.detach().t().contiguous() if transposed else w.detach()).requires_grad_()
    inputs = [
        t.detach().requires_grad_(need) for t, need in zip((x, weight, bias), needs, strict=True)
    ]
    y = torch.ops.sebp.linear(*inputs, None, transposed)
    dy = torch.randn_like(y) * mask_rows((3, 5), "right")[..., None]
    y.backward(dy)
    plain = inputs[1].t() if transposed else inputs[1]
    wanted = [t for t in inputs if t.requires_grad]
    want = iter(torch.autograd.grad(functional.linear(inputs[0], plain, inputs[2]), wanted, dy))
    for tensor, need in zip(inputs, needs, strict=True):
        if need:
            torch.testing.assert_close(tensor.grad, next(want))
        else:
            assert tensor.grad is None


def test_frozen_layers_keep_no_inputs():
    x, w = make(5, 4), make(6, 4).detach()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        linear(x, w)
    assert saved == [w.shape]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(dtype, transposed):
    x, w, bias = make(2, 3, 4, dtype=dtype), make(5, 4, dtype=dtype), make(5, dtype=dtype)
    w = w.detach().t().contiguous().requires_grad_() if transposed else w
    check = torch.library.opcheck
    for mask in (None, torch.ones(2, 4, dtype=torch.bool)):
        check(torch.ops.sebp.linear.default, (x, w, bias, mask, transposed))
    dy = make(2, 3, 5, dtype=dtype)
    backward = torch.ops.sebp.linear_backward.default
    check(backward, (dy, x, w, 6, transposed, 0, 0.0, dtype, dtype, dtype))
    check(backward, (dy, None, w, 6, transposed, 2, 3.0, dtype, None, None))
    check(torch.ops.sebp.active_rows.default, (dy.detach(), 2, 3.0))


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck_in_double(transposed):
    x, w, bias = (make(*s, dtype=torch.float64) for s in ((2, 3, 4), (5, 4), (5,)))
    w = w.detach().t().contiguous().requires_grad_() if transposed else w

    def function(x, w, bias):
        return torch.ops.sebp.linear(x, w, bias, None, transposed)

    assert torch.autograd.gradcheck(function, (x, w, bias))
    assert torch.autograd.gradgradcheck(function, (x, w, bias))


@pytest.mark.parametrize("rows", ["nonzero", 3, ("energy", 0.4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_double_backward(rows, transposed):
    """The second derivative of what was computed, against PyTorch's of the same."""
    rule = parse_rule(rows)
    x, w, bias = make(2, 4, 3), make(5, 3), make(5)
    dy = (torch.randn(2, 4, 5) * mask_rows((2, 4), "right")[..., None]).requires_grad_()
    active = torch.ones(8, dtype=torch.bool) if rows == "nonzero" else keep(dy, rule)

    def second(first):
        loss = sum((t.square() * t).sum() for t in first)
        return torch.autograd.grad(loss, (x, w, dy))

    weight = w.t() if transposed else w
    y = torch.ops.sebp.linear(x, weight, bias, None, transposed, *rule)
    got = second(torch.autograd.grad(y, (x, w, bias), dy, create_graph=True))
    y = functional.linear(x, w, bias)
    kept = dy * active.view(2, 4, 1)
    want = second(torch.autograd.grad(y, (x, w, bias), kept, create_graph=True))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_retain_graph_and_hooks():
    x, w = make(6, 4), make(5, 4)
    y = linear(x, w)
    seen = []
    y.register_hook(lambda g: seen.append(g) or g * 2)
    dy = torch.randn(6, 5)
    y.backward(dy, retain_graph=True)
    y.backward(dy)
    assert len(seen) == 2
    torch.testing.assert_close(w.grad, 4 * dy.T @ x.detach())


def write_by_operator(dy, array):
    dy.zero_()
    dy[4] = 2


def write_by_data(dy, array):
    dy.data.zero_()
    dy.data[4] = 2


def write_by_numpy(dy, array):
    array[:] = 0
    array[4] = 2


def write_to_storage(dy, array):
    value = torch.zeros(6, 5)
    value[4] = 2
    dy.untyped_storage().copy_(value.untyped_storage())


def write_by_file(dy, array):
    """As what receives from a socket or another process does: into the memory itself."""
    value = torch.zeros(6, 5)
    value[4] = 2
    memoryview(array).cast("B")[:] = value.numpy().tobytes()


@pytest.mark.parametrize(
    "write", [write_by_operator, write_by_data, write_by_numpy, write_to_storage, write_by_file]
)
@pytest.mark.parametrize("rows", ["nonzero", 1, ("threshold", 0.5)])
def test_changes_of_dy_are_seen(write, rows):
    """Rows found for a dY are not those of what its memory holds later."""
    x, w = make(6, 4), make(5, 4)
    y = linear(x, w, rows=rows)
    array = torch.zeros(6, 5).numpy()
    dy = torch.from_numpy(array)
    array[1] = 1
    y.backward(dy, retain_graph=True)
    write(dy, array)
    assert bool(dy[4].any())
    x.grad = w.grad = None
    y.backward(dy)
    torch.testing.assert_close(w.grad, dy.T @ x.detach())
    torch.testing.assert_close(x.grad, dy @ w.detach())
    assert bool(w.grad.any())


def test_rows_of_a_sum_of_gradients():
    """Gradients of two layers are added up in the memory of one, whose rows were known."""
    x, first, second, third = make(6, 4), make(5, 4), make(3, 5), make(3, 5)
    masks = torch.zeros(2, 6, 1)
    masks[0, 1] = masks[1, 4] = 1

    def loss(function):
        middle = function(x, first)
        return (function(middle, second) * masks[0] + function(middle, third) * masks[1]).sum()

    inputs = (x, first, second, third)
    got = torch.autograd.grad(loss(linear), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(loss(functional.linear), inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x, w, bias = make(3, 5, 8), make(6, 8), make(6)
    dy = torch.randn(3, 5, 6).to(dtype) * mask_rows((3, 5), "right")[..., None]
    results = []
    for function in (linear, functional.linear):
        with torch.autocast("cpu", dtype):
            y = function(x, w, bias)
        assert y.dtype == dtype
        results.append((y, *torch.autograd.grad(y, (x, w, bias), dy)))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_autocast_of_the_operator():
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.ops.sebp.linear(make(3, 8), make(6, 8))
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    x, w = make(3, 5, 4), make(6, 4)
    dy = torch.randn(3, 5, 6) * mask_rows((3, 5), "right")[..., None]
    y = checkpoint(lambda x: linear(torch.tanh(x), w), x, use_reentrant=reentrant)
    got = torch.autograd.grad(y, (x, w), dy) if not reentrant else None
    if reentrant:
        y.backward(dy)
        got = x.grad, w.grad
    want = torch.autograd.grad(functional.linear(torch.tanh(x), w), (x, w), dy)
    torch.testing.assert_close(got, want)


def test_compile():
    x, w, bias = make(3, 5, 8), make(6, 8), make(6)
    dy = torch.randn(3, 5, 6) * mask_rows((3, 5), "right")[..., None]
    compiled = torch.compile(
        lambda x, w, b: linear(torch.relu(x), w, b), fullgraph=True, backend="aot_eager"
    )
    got = torch.autograd.grad(compiled(x, w, bias), (x, w, bias), dy)
    want = torch.autograd.grad(functional.linear(torch.relu(x), w, bias), (x, w, bias), dy)
    torch.testing.assert_close(got, want)


def test_fallbacks_say_so(monkeypatch, capfd):
    monkeypatch.setenv("SEBP_VERBOSE", "1")
    w = make(6, 4, dtype=torch.float64)
    linear(make(3, 4, dtype=torch.float64), w)
    assert "sebp,fallback,(3, 4),(6, 4),dtype torch.float64" in capfd.readouterr().err
    linear(torch.empty(3, 4, device="meta"), make(6, 4).to("meta"))
    assert "device meta" in capfd.readouterr().err
    torch.func.vmap(linear, (0, None))(torch.randn(2, 3, 4), make(6, 4))
    assert "torch.func" in capfd.readouterr().err
    monkeypatch.setenv("SEBP_VERBOSE", "0")
    linear(make(3, 4, dtype=torch.float64), w)
    assert capfd.readouterr().err == ""


def test_function_transforms():
    x, w = torch.randn(2, 3, 4), torch.randn(6, 4)
    got = torch.func.grad(lambda w: linear(x, w).square().sum())(w)
    want = torch.func.grad(lambda w: functional.linear(x, w).square().sum())(w)
    torch.testing.assert_close(got, want)
    got = torch.func.jvp(lambda w: linear(x, w), (w,), (torch.ones_like(w),))
    want = torch.func.jvp(lambda w: functional.linear(x, w), (w,), (torch.ones_like(w),))
    torch.testing.assert_close(got, want)


def test_bad_arguments():
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        linear(make(3, 4), make(6, 5))
    with pytest.raises(ValueError):
        linear(make(3, 4), make(6, 4), rows=0)
    with pytest.raises(RuntimeError):
        linear(make(3, 4), make(6, 4, dtype=torch.bfloat16))


def test_work_is_counted():
    """Rows, active rows and time of each kind of layer, whichever threads compute it."""
    import threading

    from sebp.torch.common.work import LayerKind, Work, work_done

    kind = LayerKind(7, 11, torch.float32, True, True)
    kinds = {kind, kind._replace(need_dx=False)}
    before = work_done()

    def work():
        for _ in range(20):
            dy = torch.zeros(10, 7)
            dy[:3] = 1
            w = make(7, 11)
            linear(make(10, 11), w).backward(dy)
            linear(torch.randn(10, 11), w).backward(dy)
            linear(make(10, 11, dtype=torch.float64), make(7, 11, dtype=torch.float64)).sum()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    after = work_done()
    for one in kinds:
        then = before.get(one, Work())
        assert after[one].rows - then.rows == 40 * 10
        assert after[one].active - then.active == 40 * 3
        assert 0 < after[one].seconds - then.seconds < 60
    assert {one for one in after if after[one] != before.get(one)} == kinds


def test_threads():
    """Two threads, each with a context of its own."""
    import threading

    failed = []

    def work():
        try:
            for _ in range(5):
                x, w = make(40, 30), make(20, 30)
                dy = torch.randn(40, 20) * (torch.rand(40, 1) < 0.5)
                linear(x, w).backward(dy)
                torch.testing.assert_close(w.grad, dy.T @ x.detach())
        except Exception as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed


def test_rule_text():
    assert [str(r) for r in (Rule(), parse_rule(5), parse_rule(("energy", 0.1)))] == [
        "nonzero",
        "5",
        "energy 0.1",
    ]
