# SPDX-License-Identifier: Apache-2.0
"""The library's attention in autograd against a dense softmax in double precision."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import BaseTorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sebp.attention import Sequences
from sebp.core import SebpError
from sebp.torch.attention.attend import Pattern, attend
from sebp.torch.attention.texts import Side, Texts
from sebp.torch.common.tensors import by_rows

FULL, CAUSAL = Pattern(False), Pattern(True)


def seen(of_q: Tensor, of_k: Tensor, pattern: Pattern) -> Tensor:
    """Which keys a query sees, from the number of each token's text: B x L x L_k.

    A text's tokens count without the gaps between them, and its last query meets its last key.
    """
    batch, queries = of_q.shape
    result = torch.zeros(batch, queries, of_k.shape[1], dtype=torch.bool)
    for row in range(batch):
        for text in set(of_q[row].tolist()) - {0}:
            at_q = (of_q[row] == text).nonzero()[:, 0].tolist()
            at_k = (of_k[row] == text).nonzero()[:, 0].tolist()
            for i, q in enumerate(at_q):
                own = i + len(at_k) - len(at_q)
                for j, k in enumerate(at_k):
                    is_near = pattern.window is None or abs(own - j) <= pattern.window
                    result[row, q, k] = is_near and (j <= own or not pattern.causal)
    return result


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute what attend() does, from all scores: B x L x H x D. mask: B x L x L_k."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    mask = mask[:, None]
    p = scores.masked_fill(~mask, -torch.inf).softmax(3)
    return (torch.where(mask, p, 0) @ v).transpose(1, 2)


def draw(shape: tuple[int, ...]) -> Tensor:
    """Draw numbers of f32 as doubles, to be differentiated."""
    return torch.randn(shape).double().requires_grad_()


def compare(got: Tensor, want: Tensor, inputs: list[Tensor], floats: list[Tensor]) -> None:
    """Compare results, and gradients of the same random dout."""
    assert want.abs().max() > 0.1
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)
    dout = torch.randn(want.shape)
    wanted = torch.autograd.grad(want, inputs, dout.double())
    found = torch.autograd.grad(got, floats, dout)
    for a, b in zip(found, wanted, strict=True):
        assert b.abs().max() > 0.01
        torch.testing.assert_close(a.double(), b.nan_to_num(), rtol=0, atol=1e-4)


def as_floats(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().float().requires_grad_() for x in inputs]


GATHERED = ("gaps", "a gap", "packed, padded")
AT_CORNERS = ("whole", "right", "one", "a text without tokens")

# The number of each token's text, 0 for padding.
LAYOUTS = {
    "whole": [[1] * 9, [1] * 9],
    "right": [[1] * 9, [1, 1, 1, 1, 0, 0, 0, 0, 0]],
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [0] * 8 + [1]],
    "gaps": [[1, 0, 1, 1, 1, 0, 0, 1, 0], [1] * 9],
    "packed": [[1, 1, 1, 2, 3, 3, 3, 3, 3], [1, 2, 2, 2, 2, 3, 4, 4, 4]],
    "a gap": [[1, 1, 0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0, 0]],
    "one, then two": [[1] * 9, [1, 1, 1, 1, 2, 2, 2, 2, 2]],
    "packed, padded": [[1, 1, 1, 2, 2, 2, 0, 0, 0], [1] * 9],
    "one": [[1] * 9],
    "a text without tokens": [[1] * 9, [0] * 9],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", [FULL, CAUSAL, Pattern(True, 2), Pattern(False, 1)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_attention_is_that_of_all_scores(layout: str, pattern: Pattern, has_bias: bool) -> None:
    of = torch.tensor(LAYOUTS[layout])
    texts = Texts.of_segments(of.numpy())
    if of.max() == 1:
        texts = Texts.of_masks(of.numpy() > 0, of.numpy() > 0)
    batch, length = of.shape
    inputs = [draw((batch, heads, length, 8)) for heads in (4, 2, 2)]
    inputs += [draw((1, 4, length, length))] if has_bias else []
    floats = as_floats(inputs)
    want = dense(*inputs[:3], seen(of, of, pattern), *inputs[3:])
    got = attend(*floats[:3], texts, pattern, *floats[3:])
    assert (got[of == 0] == 0).all()
    compare(got, want, inputs, floats)


@pytest.mark.parametrize("least", [-3e5, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
@pytest.mark.parametrize("is_direct", [True, False])
def test_gradients_that_are_lost_in_a_bias_are_refused(
    least: float, shape: tuple, is_direct: bool
) -> None:
    inputs = [draw((2, 4, 5, 8)) for _ in range(3)]
    floats = as_floats(inputs)
    bias = torch.zeros(*shape, 5, 5)
    bias[..., :2] = least  # which is all that the first two queries see
    with nullcontext() if is_direct else BaseTorchDispatchMode():
        outs = [attend(*floats, Texts.of_rows(2, 5, 5), CAUSAL, bias) for _ in range(2)]
    known = dense(*inputs, torch.ones(2, 5, 5).tril() > 0, bias.double())
    compare(outs[0][:, 2:], known[:, 2:], inputs, floats)
    with pytest.raises(RuntimeError, match="is to be -inf"):
        outs[1].sum().backward()


@pytest.mark.parametrize("pattern", [FULL, CAUSAL, Pattern(True, 3)])
@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, 4), (2, 1)])
def test_the_last_of_more_keys_meets_the_last_query(pattern: Pattern, shape: tuple) -> None:
    of_k = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    of_q = torch.ones(2, 3, dtype=torch.long)
    texts = Texts.of_masks(of_q.numpy() > 0, of_k.numpy() > 0)
    inputs = [draw((2, 4, n, 8)) for n in (3, 7, 7)] + [draw((*shape, 3, 7))]
    floats = as_floats(inputs)
    want = dense(*inputs[:3], seen(of_q, of_k, pattern), inputs[3])
    compare(attend(*floats[:3], texts, pattern, floats[3]), want, inputs, floats)


def test_scale_softcap_and_sizes_of_values() -> None:
    of = torch.tensor([[1, 1, 1, 2, 2, 2, 2]])
    texts = Texts.of_lengths(np.array([3, 4]))
    for width, width_v in ((8, 5), (5, 8)):
        inputs = [draw((1, 2, 7, n)) for n in (width, width, width_v)]
        floats = as_floats(inputs)
        for given in ({}, {"scaling": 0.7}, {"softcap": 0.5}, {"scaling": -1.0, "softcap": 2.0}):
            want = dense(*inputs, seen(of, of, CAUSAL), **given)
            compare(attend(*floats, texts, CAUSAL, **given), want, inputs, floats)


def test_empty_texts_texts_of_one_token_and_no_tokens() -> None:
    lengths = np.array([0, 1, 1, 0, 3, 0])
    texts = Texts.of_lengths(lengths)
    of = torch.tensor([[1, 2, 3, 3, 3]])
    inputs = [draw((1, 2, 5, 4)) for _ in range(3)]
    floats = as_floats(inputs)
    got = attend(*floats, texts, CAUSAL)
    compare(got, dense(*inputs, seen(of, of, CAUSAL)), inputs, floats)
    torch.testing.assert_close(got[:, :2], floats[2].transpose(1, 2)[:, :2], rtol=0, atol=1e-6)
    bias = torch.zeros(1, 1, 5, 5)
    torch.testing.assert_close(attend(*floats, texts, CAUSAL, bias), got, rtol=0, atol=1e-6)
    for batch, length in ((0, 4), (2, 0)):
        nothing = [torch.randn(batch, 2, length, 4, requires_grad=True) for _ in range(3)]
        out = attend(*nothing, Texts.of_rows(batch, length, length), FULL)
        assert out.shape == (batch, length, 2, 4)
        out.sum().backward()


def test_what_lies_in_padding_is_never_read() -> None:
    of = np.array(LAYOUTS["right"])
    inputs = [torch.randn(2, 2, 9, 4) for _ in range(3)]
    texts = Texts.of_masks(of > 0, of > 0)
    want = attend(*inputs, texts, FULL)
    for x in inputs:
        x.transpose(1, 2)[torch.tensor(of) == 0] = torch.nan
    assert torch.equal(attend(*inputs, texts, FULL), want)


# --------------------------------------------------------------------------------------------------
# Tensors


def test_projections_are_read_where_they_lie() -> None:
    fused = torch.randn(2, 5, 3 * 4 * 8)
    for x in fused.split(32, 2):
        heads = x.view(2, 5, 4, 8).transpose(1, 2)
        again = heads.transpose(1, 2).flatten(2)
        assert by_rows(again).data_ptr() == x.data_ptr()
    apart = torch.randn(2, 4, 5, 8).transpose(1, 2)[..., ::2].flatten(2).unflatten(2, (2, 8))
    assert by_rows(apart[:, :, 0]).data_ptr() == apart.data_ptr()
    assert by_rows(torch.randn(5, 6)[:, ::2]).is_contiguous()


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (3,), (1, 3)])
def test_only_the_gradients_asked_for(needed: tuple[int, ...]) -> None:
    texts = Texts.of_lengths(np.array([2, 4]))
    inputs = [torch.randn(1, 2, 6, 4) for _ in range(3)] + [torch.randn(1, 2, 6, 6)]
    every = [x.clone().requires_grad_() for x in inputs]
    some = [x.clone().requires_grad_(i in needed) for i, x in enumerate(inputs)]
    dout = torch.randn(1, 6, 2, 4)
    attend(*every[:3], texts, CAUSAL, every[3]).backward(dout)
    attend(*some[:3], texts, CAUSAL, some[3]).backward(dout)
    for i, (a, b) in enumerate(zip(some, every, strict=True)):
        assert torch.equal(a.grad, b.grad) if i in needed else a.grad is None


def test_without_gradients_nothing_is_kept() -> None:
    inputs = [torch.randn(1, 2, 6, 4, requires_grad=True) for _ in range(3)]
    texts = Texts.of_rows(1, 6, 6)
    want = attend(*inputs, texts, FULL)
    with torch.no_grad():
        out = attend(*inputs, texts, FULL)
    assert torch.equal(out, want) and want.requires_grad and not out.requires_grad


def test_bfloat16_is_float32_of_the_same_numbers_rounded() -> None:
    texts = Texts.of_lengths(np.array([5, 20, 7]))
    low = [torch.randn(1, 4, 32, 16, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    floats = [x.detach().float().requires_grad_() for x in low]
    out, want = attend(*low, texts, CAUSAL), attend(*floats, texts, CAUSAL)
    assert out.dtype == torch.bfloat16
    # One rounding to bf16's 8 bits, of numbers up to the largest of V.
    torch.testing.assert_close(out.float(), want, rtol=2**-7, atol=2**-8)
    dout = torch.randn(out.shape, dtype=torch.bfloat16)
    out.backward(dout)
    want.backward(dout.float())
    for a, b in zip(low, floats, strict=True):
        bound = 2**-6 * b.grad.abs().max()
        assert a.grad.dtype == torch.bfloat16
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=2**-6, atol=float(bound))


def test_refusals_name_what_is_wrong() -> None:
    q = torch.randn(1, 2, 6, 4)
    texts = Texts.of_rows(1, 6, 6)
    with pytest.raises(TypeError, match="query is on meta"):
        attend(q.to("meta"), q, q, texts, FULL)
    with pytest.raises(TypeError, match=r"value is on meta; sebp's attention is not"):
        attend(q, q, q.to("meta"), texts, FULL)
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(TypeError, match=f"query is {dtype}"):
            attend(q.to(dtype), q.to(dtype), q.to(dtype), texts, FULL)
    with pytest.raises(TypeError, match=r"query is torch.float32, but key is torch.bfloat16"):
        attend(q, q.bfloat16(), q, texts, FULL)
    with pytest.raises(ValueError, match=r"query is \(1, 2, 6, 4\), but texts lie in \(1, 5\)"):
        attend(q, q, q, Texts.of_rows(1, 5, 5), FULL)
    with pytest.raises(ValueError, match="the bias is"):
        attend(q, q, q, texts, FULL, torch.randn(1, 2, 6, 5))
    with pytest.raises(ValueError, match="neither can be 0"):
        attend(q, q, q, texts, FULL, scaling=0.0)
    with pytest.raises(SebpError, match="heads"):
        attend(torch.randn(1, 3, 6, 4), q, q, texts, FULL)
    with pytest.raises(SebpError, match="dropout"):
        attend(q, q, q, texts, FULL, dropout=1.0)


def test_a_second_derivative_is_refused() -> None:
    q = torch.randn(1, 2, 6, 4, requires_grad=True)
    out = attend(q, q, q, Texts.of_rows(1, 6, 6), FULL)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        dq.sum().backward()


def test_derivatives_that_the_operator_would_drop_are_refused() -> None:
    q, k, v = (torch.randn(1, 2, 3, 8) for _ in range(3))

    def of(query: Tensor) -> Tensor:
        return attend(query, k, v, Texts.of_rows(1, 3, 3), FULL).sum()

    for transform in (
        lambda: torch.func.jvp(of, (q,), (q,)),
        lambda: torch.func.grad(of)(q),
        lambda: torch.vmap(torch.func.jacfwd(of))(q[None]),
        lambda: torch.autograd.functional.jacobian(of, q, strategy="forward-mode", vectorize=True),
    ):
        with pytest.raises(RuntimeError, match="no derivatives of torch.func or of forward mode"):
            transform()
    torch.testing.assert_close(torch.vmap(of)(torch.stack((q, 2 * q)))[1], of(2 * q))


# --------------------------------------------------------------------------------------------------
# Dropout


def probabilities(dropout: float, heads: int = 2, length: int = 64) -> Tensor:
    """Read which probabilities were dropped, by values that are the identity: H x L x L."""
    q = torch.zeros(1, heads, length, length)
    v = torch.eye(length).expand(1, heads, length, length)
    out = attend(q, q, v, Texts.of_rows(1, length, length), FULL, dropout=dropout)
    return out[0].transpose(0, 1) * length


def test_dropout_drops_a_share_and_scales_the_rest() -> None:
    p = probabilities(0.25)
    kept = p[p != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.75))
    # Six standard deviations of a binomial.
    bound = 6 * (0.25 * 0.75 / p.numel()) ** 0.5
    assert abs(float((p == 0).float().mean()) - 0.25) < bound
    assert (p[0] == 0).ne(p[1] == 0).any()
    assert (probabilities(0.0) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_seed_is_pytorchs_generator(has_bias: bool) -> None:
    # A bias for each row of the batch goes text by text.
    inputs = [torch.randn(2, 2, 16, 8, requires_grad=True) for _ in range(3)]
    bias = [torch.randn(2, 1, 16, 16)] if has_bias else []
    texts = Texts.of_rows(2, 16, 16)

    def run(*inputs: Tensor) -> Tensor:
        return attend(*inputs, texts, CAUSAL, *bias, dropout=0.5)

    state = torch.get_rng_state()
    first, second = run(*inputs), run(*inputs)
    torch.set_rng_state(state)
    assert torch.equal(run(*inputs), first) and not torch.equal(first, second)
    torch.set_rng_state(state)
    again = checkpoint(run, *inputs, use_reentrant=False)
    dout = torch.randn_like(first)
    wanted = torch.autograd.grad(first, inputs, dout)
    for a, b in zip(torch.autograd.grad(again, inputs, dout), wanted, strict=True):
        assert torch.equal(a, b)
    no_dropout = attend(*inputs, texts, CAUSAL, *bias)
    assert not torch.equal(torch.autograd.grad(no_dropout, inputs, dout)[0], wanted[0])


@pytest.mark.parametrize("rows", [1, 2])
def test_each_text_has_dropout_of_its_own(rows: int) -> None:
    inputs = [torch.randn(1, 2, 16, 8).expand(2, -1, -1, -1) for _ in range(3)]
    texts, bias = Texts.of_rows(2, 16, 16), torch.zeros(rows, 1, 16, 16)
    assert torch.equal(*attend(*inputs, texts, FULL, bias))
    assert not torch.equal(*attend(*inputs, texts, FULL, bias, dropout=0.5))


def test_a_backward_has_its_forwards_dropout() -> None:
    q, k = (torch.randn(1, 1, 16, 16) for _ in range(2))
    v = torch.randn(1, 1, 16, 16, requires_grad=True)
    texts = Texts.of_rows(1, 16, 16)
    state = torch.get_rng_state()
    out = attend(q, k, v, texts, FULL, dropout=0.5)
    torch.set_rng_state(state)
    p = attend(q, k, torch.eye(16)[None, None], texts, FULL, dropout=0.5)[0, :, 0]
    assert 0.2 < float((p == 0).float().mean()) < 0.8
    dout = torch.randn_like(out)
    out.backward(dout)
    torch.testing.assert_close(v.grad[0, 0], p.t() @ dout[0, :, 0], rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Texts


def test_texts_are_gathered_only_where_they_must_be() -> None:
    for name, layout in LAYOUTS.items():
        of = np.array(layout)
        side = Side.of_segments(of) if of.max() > 1 else Side.of_mask(of > 0)
        assert (side.rows is not None) == (name in GATHERED), name
        np.testing.assert_array_equal(side.tokens, np.flatnonzero(of))
        pieces = [(row, at.tolist()) for row, at in side.columns() if at.numel() > 0]
        texts = [(r, t) for r, row in enumerate(layout) for t in sorted(set(row) - {0})]
        wanted = [(r, [i for i, t in enumerate(layout[r]) if t == text]) for r, text in texts]
        assert pieces == wanted, name
        assert side.begins_at_corner() == (name in AT_CORNERS), name


def test_sequences_from_offsets_are_those_of_the_lengths() -> None:
    texts = Sequences.from_offsets([0, 2, 2, 7])
    assert (len(texts), texts.total, texts.max_length) == (3, 7, 5)
    np.testing.assert_array_equal(texts.offsets, [0, 2, 2, 7])
    for wrong in ([1, 2], [0, 3, 2]):
        with pytest.raises(SebpError):
            Sequences.from_offsets(wrong)
    with pytest.raises(ValueError, match="empty"):
        Sequences.from_offsets([])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_is_of_no_account(dtype: torch.dtype) -> None:
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    want = attend(q, q, q, Texts.of_rows(1, 5, 5), CAUSAL)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = attend(q, q, q, Texts.of_rows(1, 5, 5), CAUSAL)
        got.sum().backward()
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(got, want)
    assert bool(q.grad.any())


@pytest.mark.parametrize("name", ["scaling", "softcap"])
def test_numbers_that_would_get_no_gradient_are_refused(name: str) -> None:
    q = torch.randn(1, 2, 5, 8)
    number = torch.tensor(0.3, requires_grad=True)
    with pytest.raises(TypeError, match=f"{name} is a Tensor"):
        attend(q, q, q, Texts.of_rows(1, 5, 5), FULL, **{name: number})
