# SPDX-License-Identifier: Apache-2.0
"""``torch.set_float32_matmul_precision()`` holds for the library's products of float32."""

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import sebp  # noqa: E402
from sebp.sparse import meprop_gradient  # noqa: E402
from sebp.torch import linear  # noqa: E402
from sebp.torch.common.context import thread_context  # noqa: E402
from sebp.torch.common.tensors import matrix_of  # noqa: E402

LEVELS = ["highest", "high", "medium"]
# What errors may be, in multiples of the sum of |a||b| (sebp/context.h).
BOUNDS = {"highest": 2.0**-22, "high": 2.0**-14, "medium": 2.0**-6.9}


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.set_float32_matmul_precision("highest")


def inputs():
    """Of a size at which products of bfloat16 are faster where any are."""
    x, w, bias = torch.randn(300, 256), torch.randn(320, 256), torch.randn(320)
    return [t.requires_grad_() for t in (x, w, bias)]


def by_numpy(level, x, w, bias, dy):
    """Compute Y and the gradients by a context of its own, of this precision."""
    x, w, bias, dy = (t.detach().numpy() for t in (x, w, bias, dy))
    with sebp.Context(threads=torch.get_num_threads(), precision=level) as own:
        y = sebp.linear_forward(x, w, bias, context=own)
        found = y, *sebp.linear_backward(dy, x, w, context=own)
        return [torch.from_numpy(one) for one in found]


def as_conv1d(x, w, bias):
    return torch.ops.sebp.linear(x, w.t().contiguous(), bias, None, True)


def as_operator(x, w, bias):
    return torch.ops.sebp.linear(x, w, bias)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("function", [linear, as_operator])
def test_linear_layers(level, function):
    x, w, bias = given = inputs()
    dy = torch.randn(300, 320)
    torch.set_float32_matmul_precision(level)
    y = function(*given)
    got = y.detach(), *torch.autograd.grad(y, given, dy)
    for one, other in zip(got, by_numpy(level, *given, dy), strict=True):
        assert torch.equal(one, other)
    a, b = x.detach().double(), w.detach().double()
    off = (y.detach().double() - (a @ b.t() + bias.detach())).abs()
    bound = (BOUNDS[level] + 256 * 2.0**-22) * (a.abs() @ b.abs().t() + bias.detach().abs())
    assert bool((off <= bound).all())


@pytest.mark.parametrize("level", LEVELS)
def test_conv1d(level):
    given, dy = inputs(), torch.randn(300, 320)
    torch.set_float32_matmul_precision(level)
    y = as_conv1d(*given)
    got = y.detach(), *torch.autograd.grad(y, given, dy)
    for one, other in zip(got, by_numpy(level, *given, dy), strict=True):
        scale = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=1e-4, atol=max(BOUNDS[level], 1e-5) * scale)


def test_levels_differ_where_bfloat16_is_faster():
    """So that the comparisons above are not of three equal things."""
    given, dy = inputs(), torch.randn(300, 320)
    results = {level: by_numpy(level, *given, dy) for level in LEVELS}
    is_same = torch.equal(results["highest"][0], results["medium"][0])
    torch.set_float32_matmul_precision("medium")
    assert torch.equal(linear(*given), results["highest"][0]) == is_same


@pytest.mark.parametrize("forward", LEVELS)
@pytest.mark.parametrize("backward", LEVELS)
@pytest.mark.parametrize("function", [linear, as_operator])
def test_a_backward_has_the_precision_of_its_own_time(forward, backward, function):
    given, dy = inputs(), torch.randn(300, 320)
    torch.set_float32_matmul_precision(forward)
    y = function(*given)
    torch.set_float32_matmul_precision(backward)
    got = torch.autograd.grad(y, given, dy)
    for one, other in zip(got, by_numpy(backward, *given, dy)[1:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="PyTorch before 2.9")
@pytest.mark.parametrize(("name", "level"), [("bf16", "medium"), ("tf32", "high")])
def test_pytorchs_newer_settings(name, level):
    """For oneDNN, and for all backends where oneDNN has none of its own."""
    backends = torch.backends
    given, dy = inputs(), torch.randn(300, 320)
    want = by_numpy(level, *given, dy)[0]
    backends.mkldnn.matmul.fp32_precision = name
    assert torch.equal(linear(*given), want)
    backends.mkldnn.matmul.fp32_precision = "none"
    assert torch.equal(linear(*given), by_numpy("highest", *given, dy)[0])
    backends.fp32_precision = name
    try:
        assert torch.equal(linear(*given), want)
    finally:
        backends.fp32_precision = "none"


def test_a_context_for_each_precision():
    contexts = {}
    for level in [*LEVELS, *LEVELS]:
        torch.set_float32_matmul_precision(level)
        assert contexts.setdefault(level, thread_context()) is thread_context()
    assert len(set(map(id, contexts.values()))) == 3


def test_autocast_goes_before():
    """Of whatever precision, as bfloat16 is what autocast asks for."""
    given = inputs()
    results = []
    for level in LEVELS:
        torch.set_float32_matmul_precision(level)
        with torch.autocast("cpu", torch.bfloat16):
            y = linear(*given)
        results.append((y.detach(), *torch.autograd.grad(y, given, torch.ones_like(y))))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("level", LEVELS)
def test_sparse_layers_and_lora(level):
    """Their products are those of the same contexts."""
    (x, *_), dy = inputs(), torch.randn(300, 320)
    torch.set_float32_matmul_precision(level)
    got = meprop_gradient(matrix_of(dy), matrix_of(x.detach()), 50, context=thread_context())
    with sebp.Context(threads=torch.get_num_threads(), precision=level) as own:
        want = meprop_gradient(dy.numpy(), x.detach().numpy(), 50, context=own)
    assert (got.indices == want.indices).all() and (got.values == want.values).all()
    model = nn.Sequential(nn.Linear(256, 320))
    sebp.apply_lora_to_model(model, 64, layers="*")
    with torch.no_grad():
        model[0].lora_b.normal_()
    y, plain = model(x), nn.functional.linear(x, model[0].weight, model[0].bias)
    a, b = (t.detach().double() for t in (model[0].lora_a, model[0].lora_b))
    h = x.detach().double() @ a
    size = x.detach().double().abs() @ a.abs() @ b.abs()
    bound = (3 * BOUNDS[level] + 400 * 2.0**-22) * (size + plain.detach().abs() + 1)
    # Also of the layer's own product, which is PyTorch's here, of the same precision.
    assert bool(((y - plain).detach().double() - h @ b).abs().le(bound).all())
