# SPDX-License-Identifier: Apache-2.0
"""Rotary positions by the library, alone and in attention."""

import functools

import pytest
import torch
from models import make_batch, make_model
from transformers.models.llama import modeling_llama

import sebp
from sebp.torch.blocks import rotary
from sebp.torch.blocks.put import give_blocks
from sebp.torch.blocks.rotary import (
    known_rotation,
    rotate,
    rotate_first_elements,
    rotate_whole_heads,
    with_rotation,
)

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def turned(monkeypatch):
    """Collect the shapes of what the library turns."""
    shapes = []
    own = rotary.Turn.apply

    def apply(x, *rest):
        shapes.append(tuple(x.shape))
        return own(x, *rest)

    monkeypatch.setattr(rotary.Turn, "apply", apply)
    return shapes


def heads(batch, count, length, size, dtype=F32):
    """Make queries as a projection gives them."""
    x = torch.randn(batch, length, count, size).to(dtype)
    return x.transpose(1, 2).requires_grad_()


def angles(batch, length, size, dtype=F32):
    half = torch.randn(batch, length, size // 2)
    both = torch.cat((half, half), dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


def compare(rotation, q, k, cos, sin, tolerance):
    ours, right = rotate(rotation, q, k, cos, sin), rotation(q, k, cos, sin)
    gradients = [torch.randn(one.shape).to(one.dtype) for one in right]
    for one, known in zip(ours, right, strict=True):
        assert one.dtype == known.dtype and one.shape == known.shape
        if rotation is rotate_whole_heads and one.numel() > 0:
            assert one.stride() == known.stride()
        assert torch.allclose(one, known, atol=tolerance, rtol=tolerance)
    own = torch.autograd.grad(ours, (q, k), gradients)
    for one, known in zip(own, torch.autograd.grad(right, (q, k), gradients), strict=True):
        assert one.dtype == known.dtype
        assert torch.allclose(one, known, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("of_angles", [F32, BF16])
@pytest.mark.parametrize("own_angles", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(1, 7), (3, 5), (2, 0)])
def test_whole_heads(dtype, of_angles, own_angles, batch, length, turned):
    torch.manual_seed(0)
    q, k = heads(batch, 4, length, 16, dtype), heads(batch, 2, length, 16, dtype)
    cos, sin = angles(batch if own_angles else 1, length, 16, of_angles)
    compare(rotate_whole_heads, q, k, cos, sin, 2e-6 if dtype == of_angles == F32 else 0.04)
    assert turned[:2] == [(batch, length, 64), (batch, length, 32)]


@pytest.mark.parametrize("size", [4, 12, 16])
def test_first_elements(size, turned):
    q, k = heads(2, 3, 6, 16), heads(2, 3, 6, 16)
    compare(rotate_first_elements, q, k, *angles(1, 6, size), 2e-6)
    assert len(turned) == 4


def test_second_derivatives():
    q, k = heads(1, 2, 3, 8), heads(1, 2, 3, 8)
    cos, sin = angles(1, 3, 8)

    def second(rotation):
        y, _ = rotation(q, k, cos, sin)
        (first,) = torch.autograd.grad(y.pow(3).sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), q)[0]

    ours = second(functools.partial(rotate, rotate_whole_heads))
    assert torch.allclose(ours, second(rotate_whole_heads), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rotation", [rotate_whole_heads, rotate_first_elements])
def test_batched_gradients(rotation):
    q, k = heads(2, 2, 3, 8), heads(2, 2, 3, 8)
    cos, sin = angles(1, 3, 8 if rotation is rotate_whole_heads else 4)
    weights = torch.randn(5, 2, 2, 3, 8)
    ours, right = (f(q, k, cos, sin)[0] for f in (functools.partial(rotate, rotation), rotation))
    (one,) = torch.autograd.grad(ours, q, weights, is_grads_batched=True)
    (known,) = torch.autograd.grad(right, q, weights, is_grads_batched=True)
    assert torch.allclose(one, known, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant, turned):
    model, batch = make_model("llama").train(), make_batch("llama", 1)
    right = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    prepared = sebp.prepare(model, quiet=True)
    for _ in range(2):
        assert_same(gradients(model, batch), right)
    assert turned
    prepared.undo()
    assert not any("forward" in vars(module) for module in model.modules())


def unlike_halves():
    cos, sin = angles(1, 5, 8)
    return heads(1, 2, 5, 8), heads(1, 2, 5, 8), torch.cat((cos[..., :4], sin[..., :4]), -1), sin


def angles_that_train():
    cos, sin = angles(1, 5, 8)
    return heads(1, 2, 5, 8), heads(1, 2, 5, 8), cos.requires_grad_(), sin


def copied_heads():
    return heads(1, 2, 5, 8).contiguous(), heads(1, 2, 5, 8), *angles(1, 5, 8)


def in_float64():
    cos, sin = angles(1, 5, 8)
    return heads(1, 2, 5, 8).double(), heads(1, 2, 5, 8).double(), cos.double(), sin.double()


@pytest.mark.parametrize("make", [unlike_halves, angles_that_train, copied_heads, in_float64])
def test_the_unusual_is_pytorchs(make, turned):
    q, k, cos, sin = make()
    ours = rotate(rotate_whole_heads, q, k, cos, sin)
    right = rotate_whole_heads(q, k, cos, sin)
    assert all(torch.equal(one, known) for one, known in zip(ours, right, strict=True))
    assert turned == []


def test_wrong_shapes_raise_as_before():
    q, k = heads(1, 2, 5, 8), heads(1, 2, 5, 8)
    for cos, sin in (angles(1, 4, 8), angles(1, 5, 6)):
        with pytest.raises(RuntimeError):
            rotate(rotate_whole_heads, q, k, cos, sin)


def test_angles_changed_in_place_count():
    q, k = heads(1, 2, 5, 8), heads(1, 2, 5, 8)
    cos, sin = angles(1, 5, 8)
    compare(rotate_whole_heads, q, k, cos, sin, 2e-6)
    cos.mul_(0.5)
    compare(rotate_whole_heads, q, k, cos, sin, 2e-6)
    cos.data.mul_(0.5)  # which leaves no version, and so does NumPy
    compare(rotate_whole_heads, q, k, cos, sin, 2e-6)
    sin.numpy()[:, 2] *= -1
    compare(rotate_whole_heads, q, k, cos, sin, 2e-6)
    sin[..., 0] = 7  # now the halves are not alike
    compare(rotate_whole_heads, q, k, cos, sin, 2e-6)


# --------------------------------------------------------------------------------------------------
# In models


def gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [float(loss.detach()), *(p.grad for p in model.parameters())]


def assert_same(ours, right):
    assert ours[0] == pytest.approx(right[0], rel=1e-5)
    assert all(torch.allclose(a, b, atol=2e-6) for a, b in zip(ours[1:], right[1:], strict=True))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_models(name, turned):
    model, batch = make_model(name).train(), make_batch(name, 1)
    right = gradients(model, batch)
    assert len(give_blocks(model)["attention with rotary positions"]) == 2
    assert_same(gradients(model, batch), right)
    assert len(turned) == 8  # two layers, queries and keys, forward and backward
    assert modeling_llama.apply_rotary_pos_emb.__module__ == modeling_llama.__name__


def other_rotation(q, k, cos, sin, unsqueeze_dim=1):
    return q * 2, k


def test_a_function_replaced_later_is_called(monkeypatch, turned):
    model, batch = make_model("llama").train(), make_batch("llama", 1)
    give_blocks(model)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other_rotation)
    ours = gradients(model, batch)
    assert turned == []
    assert_same(ours, gradients(make_model("llama").train(), batch))


def test_a_forward_replaced_later_is_called(monkeypatch, turned):
    model, batch = make_model("llama").train(), make_batch("llama", 1)
    give_blocks(model)

    def forward(self, hidden_states, **kwargs):
        return hidden_states, None

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    model(**batch)
    assert turned == []


def test_other_global_names_are_those_of_the_module(monkeypatch, turned):
    model, batch = make_model("llama").train(), make_batch("llama", 1)
    model.set_attn_implementation("eager")
    give_blocks(model)
    right = gradients(model, batch)
    seen, own = [], modeling_llama.eager_attention_forward

    def eager(*args, **kwargs):
        seen.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager)
    assert_same(gradients(model, batch), right)
    assert len(seen) == 2


def calls_another(q, k):
    return other_rotation(q, k, 1, 2)


def decorated(function):
    @functools.wraps(function)
    def around(*args):
        return function(*args) + 1

    return around


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):  # as rotate_whole_heads has it
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed


def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def attends(q, k, cos, sin):
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    return (q * k).sum()


def test_decorators_stay(turned):
    forward = decorated(decorated(attends))
    assert known_rotation(forward) is rotate_whole_heads
    q, k, (cos, sin) = heads(1, 2, 5, 8), heads(1, 2, 5, 8), angles(1, 5, 8)
    ours = with_rotation(forward, rotate_whole_heads)(q, k, cos, sin)
    assert len(turned) == 2
    assert torch.allclose(ours, forward(q, k, cos, sin), atol=1e-5) and len(turned) == 2


@pytest.mark.parametrize("other", [calls_another, decorated(calls_another), len, None])
def test_others_are_not_known(other):
    assert known_rotation(other) is None


def test_rotate_half_counts_too(monkeypatch):
    assert known_rotation(attends) is rotate_whole_heads
    monkeypatch.setitem(globals(), "rotate_half", lambda x: x)
    assert known_rotation(attends) is None
