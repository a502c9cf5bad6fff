# SPDX-License-Identifier: Apache-2.0
"""Norms, activations and dropout by the library, as functions of tensors."""

import pytest
import torch
from torch.nn import functional

from sebp.torch.blocks.activation import Activation, activate
from sebp.torch.blocks.dropout import drop
from sebp.torch.blocks.norm import Norm, normalize

F32, BF16 = torch.float32, torch.bfloat16
# Roundings of what is computed, as a share of the largest element.
TOLERANCE = {F32: 2e-6, BF16: 1.6e-2}
FUNCTIONS = {
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
    Activation.SILU: functional.silu,
}
SHAPES = [(7, 5, 48), (1, 33), (3, 1, 64), (64,), (0, 16)]


def off(ours, right):
    """Return the largest difference as a share of the largest element."""
    assert ours.shape == right.shape
    if right.numel() == 0:
        return 0.0
    ours, right = ours.detach().double(), right.detach().double()
    return float((ours - right).abs().max() / right.abs().max().clamp_min(1e-30))


def leaf(*shape, dtype=F32):
    return torch.randn(*shape).to(dtype).requires_grad_()


def gradients(outputs, inputs, weights):
    inputs = [one for one in inputs if one is not None]
    return torch.autograd.grad(outputs, inputs, weights)


def norm_in_torch(x, gain, shift, norm):
    x = x.double()
    if not norm.is_rms:
        x = x - x.mean(-1, keepdim=True)
    x = x * (x.square().mean(-1, keepdim=True) + norm.epsilon).rsqrt()
    x = x if gain is None else x * (gain.double() + norm.gain_offset)
    return x if shift is None else x + shift.double()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize("affine", ["", "gain", "gain+shift"])
@pytest.mark.parametrize("has_residual", [False, True])
def test_norms_are_those_of_float64(dtype, shape, is_rms, affine, has_residual):
    torch.manual_seed(len(shape))
    norm = Norm(is_rms, 1e-5, 1.0 if is_rms else 0.0)
    x = leaf(*shape, dtype=dtype)
    residual = leaf(*shape, dtype=dtype) if has_residual else None
    gain = leaf(shape[-1]) if "gain" in affine else None
    shift = leaf(shape[-1], dtype=dtype) if "shift" in affine else None
    dy, dh = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    y, h = normalize(x, gain, shift, norm, residual)
    assert y.dtype == h.dtype == dtype
    right_h = x if residual is None else x + residual
    right = norm_in_torch(right_h, gain, shift, norm)
    assert off(h, right_h) <= TOLERANCE[dtype]
    assert off(y, right) <= TOLERANCE[dtype]
    inputs = (x, residual, gain, shift)
    if residual is None:
        pairs = zip(gradients(y, inputs, dy), gradients(right, inputs, dy.double()), strict=True)
    else:
        pairs = zip(
            gradients((y, h), inputs, (dy, dh)),
            gradients((right, right_h), inputs, (dy.double(), dh)),
            strict=True,
        )
    for ours, known in pairs:
        assert ours.dtype == known.dtype
        assert off(ours, known) <= 4 * TOLERANCE[dtype]


def test_a_norm_whose_sum_alone_is_used_passes_its_gradient_on():
    x, residual, gain = leaf(3, 16), leaf(3, 16), leaf(16)
    _, h = normalize(x, gain, None, Norm(True, 1e-6), residual)
    dx, dresidual, dgain = torch.autograd.grad(h.sum(), (x, residual, gain))
    assert bool((dx == 1).all() and (dresidual == 1).all() and (dgain == 0).all())


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_those_of_pytorch(dtype, activation, is_gated, shape):
    torch.manual_seed(1)
    x, dy = leaf(*shape, dtype=dtype), torch.randn(shape).to(dtype)
    up = leaf(*shape, dtype=dtype) if is_gated else None
    y = activate(x, activation, up)
    right = FUNCTIONS[activation](x.double()) * (1 if up is None else up.double())
    assert y.dtype == dtype and off(y, right) <= TOLERANCE[dtype]
    known = gradients(right, (x, up), dy.double())
    for ours, one in zip(gradients(y, (x, up), dy), known, strict=True):
        assert ours.dtype == dtype and off(ours, one) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_as_many_and_keeps_the_mean(dtype, p):
    torch.manual_seed(2)
    x = torch.ones(200, 1000, dtype=dtype, requires_grad=True)
    y = drop(x, dropout=p)
    kept = y != 0
    assert abs(float(kept.float().mean()) - (1 - p)) < 5e-3  # 5 sigma are 3.5e-3 at most
    assert off(y[kept], torch.full_like(y[kept], 1 / (1 - p))) <= TOLERANCE[dtype]
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, y.detach())
    assert not torch.equal(drop(x, dropout=p), y)  # each call draws anew
    torch.manual_seed(2)
    assert torch.equal(drop(x, dropout=p), y)


def test_dropout_in_a_norm_is_the_one_of_its_backward():
    torch.manual_seed(3)
    x, residual, gain, shift = leaf(9, 40), leaf(9, 40), leaf(40), leaf(40)
    norm, dy = Norm(False, 1e-12), torch.randn(9, 40)
    y, h = normalize(x, gain, shift, norm, residual, dropout=0.4)
    mask = ((h - residual).detach() / x.detach()).round(decimals=4)
    values = set(mask.unique().tolist())
    assert len(values) == 2 and min(values) == 0 and abs(max(values) - 1 / 0.6) < 1e-4
    right = norm_in_torch(x * (mask > 0) / 0.6 + residual, gain, shift, norm)
    inputs = (x, residual, gain, shift)
    known = gradients(right, inputs, dy.double())
    for ours, one in zip(gradients(y, inputs, dy), known, strict=True):
        assert off(ours, one) <= 1e-5


def second(make, inputs):
    """Return the gradients of the size of a gradient."""
    first = torch.autograd.grad(make().square().sum(), inputs, create_graph=True)
    return torch.autograd.grad(sum(one.square().sum() for one in first), inputs)


@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize("has_shift", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_norms_have_second_derivatives(is_rms, has_shift, has_residual):
    torch.manual_seed(4)
    norm = Norm(is_rms, 1e-5)
    x, residual, gain, shift = (
        leaf(*shape) if is_there else None
        for shape, is_there in (
            ((6, 20), True),
            ((6, 20), has_residual),
            ((20,), True),
            ((20,), has_shift),
        )
    )
    inputs = [one for one in (x, residual, gain, shift) if one is not None]
    ours = second(lambda: normalize(x, gain, shift, norm, residual)[0], inputs)
    added = 0 if residual is None else residual
    right = second(lambda: norm_in_torch(x + added, gain, shift, norm), inputs)
    for one, known in zip(ours, right, strict=True):
        assert off(one, known) <= 1e-4


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("is_gated", [False, True])
def test_activations_have_second_derivatives(activation, is_gated):
    torch.manual_seed(5)
    inputs = [leaf(6, 20), *([leaf(6, 20)] if is_gated else [])]
    x, up = inputs[0], inputs[1] if is_gated else None
    f = FUNCTIONS[activation]
    ours = second(lambda: activate(x, activation, up), inputs)
    right = second(lambda: f(x.double()) * (1 if up is None else up.double()), inputs)
    for one, known in zip(ours, right, strict=True):
        assert off(one, known) <= 1e-5


def test_dropout_has_second_derivatives():
    torch.manual_seed(6)
    x = leaf(5, 30)
    torch.manual_seed(7)
    mask = drop(torch.ones(5, 30), dropout=0.3)

    def ours():
        torch.manual_seed(7)
        return drop(x, dropout=0.3) * x

    (one,), (known,) = second(ours, [x]), second(lambda: mask * x * x, [x])
    assert off(one, known) <= 1e-6


@pytest.mark.parametrize("what", ["drop", "norm"])
def test_what_is_no_probability_is_refused(what):
    x = torch.ones(2, 4)
    for p in (1.0, -0.1, float("nan")):
        with pytest.raises(RuntimeError, match="dropout|probability"):
            if what == "drop":
                drop(x, dropout=p)
            else:
                normalize(x, None, None, Norm(False, 1e-5), dropout=p)


def test_nan_stays_in_its_row():
    x = torch.ones(3, 8)
    x[1, 2] = torch.nan
    y, _ = normalize(x, None, None, Norm(True, 1e-6), torch.ones(3, 8))
    assert y.isnan().any(1).tolist() == [False, True, False]
    assert activate(x, Activation.SILU).isnan().sum() == 1


# --------------------------------------------------------------------------------------------------
# Gradients and saved tensors as others may give them

BLOCKS = {
    "RMSNorm": lambda x, gain: normalize(x, gain, None, Norm(True, 1e-5))[0],
    "LayerNorm": lambda x, gain: normalize(x, gain, gain, Norm(False, 1e-5), x)[0],
    "dropout and norm": lambda x, gain: normalize(x, gain, gain, Norm(False, 1e-5), x, dropout=0.3)[
        0
    ],
    "GELU": lambda x, gain: activate(x, Activation.GELU) * gain,
    "SiLU": lambda x, gain: activate(x, Activation.SILU) * gain,
    "gated": lambda x, gain: activate(x, Activation.GELU_TANH, x.flip(0)) * gain,
    "dropout": lambda x, gain: drop(x, dropout=0.4) * gain,
    "dropout alone": lambda x, gain: drop(x + gain, dropout=0.4),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    "change",
    [
        lambda dy: dy.t().contiguous().t(),
        lambda dy: dy[:, :1].expand(12, 20),
        lambda dy: dy.repeat(1, 2)[:, ::2],
        lambda dy: torch._neg_view(dy),
    ],
    ids=["transposed", "expanded", "strided", "negated"],
)
def test_gradients_of_any_strides(name, change):
    inputs, dy = (leaf(12, 20), leaf(20)), change(torch.randn(12, 20))
    y = BLOCKS[name](*inputs)
    right = torch.autograd.grad(y, inputs, dy.resolve_neg().contiguous(), retain_graph=True)
    for one, known in zip(torch.autograd.grad(y, inputs, dy), right, strict=True):
        assert off(one, known) <= 1e-6


@pytest.mark.parametrize("name", BLOCKS)
def test_saved_tensors_may_come_back_with_other_strides(name):
    inputs, state = (leaf(12, 20), leaf(20)), torch.get_rng_state()
    right = torch.autograd.grad(BLOCKS[name](*inputs).square().sum(), inputs)
    torch.set_rng_state(state)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (x.dim() == 2, x.mT.contiguous() if x.dim() == 2 else x),
        lambda given: given[1].mT if given[0] else given[1],
    ):
        loss = BLOCKS[name](*inputs).square().sum()
    for one, known in zip(torch.autograd.grad(loss, inputs), right, strict=True):
        assert off(one, known) <= 1e-6


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_gradients(name, create_graph):
    inputs, dy = (leaf(4, 6), leaf(6)), torch.randn(3, 4, 6)
    y = BLOCKS[name](*inputs)
    ours = torch.autograd.grad(
        y, inputs, dy, is_grads_batched=True, retain_graph=True, create_graph=create_graph
    )
    each = [torch.autograd.grad(y, inputs, one, retain_graph=True) for one in dy]
    for one, known in zip(ours, zip(*each, strict=True), strict=True):
        assert off(one, torch.stack(known)) <= 1e-5


def test_compiled_autograd():
    """What one block keeps for its backward is not compiled into another's."""
    from torch._dynamo import compiled_autograd

    torch._dynamo.reset()
    norms = {
        f"epsilon {epsilon}": lambda x, gain, e=epsilon: normalize(x, gain, None, Norm(True, e))[0]
        for epsilon in (1e-5, 0.5)
    }
    for name, block in {**BLOCKS, **norms}.items():
        inputs = leaf(4, 6), leaf(6)
        loss = block(*inputs).square().sum()
        right = torch.autograd.grad(loss, inputs, retain_graph=True)
        with compiled_autograd._enable(torch.compile(backend="aot_eager")):
            loss.backward()
        for one, known in zip(inputs, right, strict=True):
            assert off(one.grad, known) <= 1e-6, name
