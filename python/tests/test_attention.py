# SPDX-License-Identifier: Apache-2.0
"""Attention against PyTorch's scaled_dot_product_attention and autograd, text by text."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sebp.attention import AttentionOptions, Sequences, attention_backward, attention_forward
from sebp.core import SebpError


def seen(n: int, m: int, options: AttentionOptions) -> Tensor:
    """Which keys each query sees: n x m."""
    at = torch.arange(n)[:, None] + m - n
    key = torch.arange(m)[None, :]
    mask = torch.ones(n, m, dtype=torch.bool)
    if options.causal:
        mask &= key <= at
    if options.window_left >= 0:
        mask &= key >= at - options.window_left
    return mask


def reference(q: Tensor, k: Tensor, v: Tensor, texts: tuple, options: AttentionOptions) -> Tensor:
    """PyTorch's, for each text by itself, in double precision."""
    of_q, of_k = (sequences.offsets for sequences in texts)
    d = q.shape[1] // options.heads
    outs = []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(of_q), itertools.pairwise(of_k), strict=True):
        heads = [
            x.view(1, x.shape[0], -1, d).transpose(1, 2) for x in (q[q0:q1], k[k0:k1], v[k0:k1])
        ]
        mask = seen(q1 - q0, k1 - k0, options)
        out = scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
        outs.append(out.transpose(1, 2).reshape(q1 - q0, -1))
    return torch.cat(outs)


@pytest.mark.parametrize("heads,kv_heads", [(1, 0), (4, 0), (4, 2), (6, 1)])
@pytest.mark.parametrize("causal,window_left", [(False, -1), (True, -1), (True, 5)])
@pytest.mark.parametrize("crossed", [False, True])
def test_attention_is_pytorchs(
    heads: int, kv_heads: int, causal: bool, window_left: int, crossed: bool
) -> None:
    torch.manual_seed(heads + 10 * causal)
    options = AttentionOptions(
        heads=heads, kv_heads=kv_heads, causal=causal, window_left=window_left
    )
    of_q = Sequences.from_lengths([5, 1, 40, 17])
    of_k = Sequences.from_lengths([9, 3, 300, 17]) if crossed else of_q
    d, kv = 12, kv_heads or heads
    q = torch.randn(of_q.total, heads * d, dtype=torch.double).float().double().requires_grad_()
    k, v = (torch.randn(of_k.total, kv * d).double().requires_grad_() for _ in range(2))
    dout = torch.randn(of_q.total, heads * d)
    want = reference(q, k, v, (of_q, of_k), options)
    want.backward(dout.double())

    arrays = [x.detach().float().numpy() for x in (q, k, v)]
    out, lse = attention_forward(*arrays, of_q, of_k, options)
    got = attention_backward(dout.numpy(), *arrays, out, lse, of_q, of_k, options)
    np.testing.assert_allclose(out, want.detach(), rtol=0, atol=2e-5)
    for gradient, x in zip(got, (q, k, v), strict=False):
        assert np.abs(gradient).max() > 0.1
        np.testing.assert_allclose(gradient, x.grad, rtol=0, atol=1e-4)


def test_bias_is_added_and_has_a_gradient() -> None:
    torch.manual_seed(1)
    n, heads, d = 20, 3, 8
    texts = Sequences.from_lengths([n])
    options = AttentionOptions(heads=heads)
    q, k, v = (torch.randn(n, heads * d, requires_grad=True) for _ in range(3))
    bias = torch.randn(heads, n, n, requires_grad=True)
    parts = [x.view(1, n, heads, d).transpose(1, 2) for x in (q, k, v)]
    want = scaled_dot_product_attention(*parts, attn_mask=bias[None])
    want = want.transpose(1, 2).reshape(n, -1)
    dout = torch.randn_like(want)
    want.backward(dout)
    arrays = [x.detach().numpy() for x in (q, k, v)]
    flat = bias.detach().numpy().reshape(heads * n, n)
    out, lse = attention_forward(*arrays, texts, options=options, bias=flat)
    *_, dbias = attention_backward(
        dout.numpy(), *arrays, out, lse, texts, options=options, bias=flat
    )
    np.testing.assert_allclose(out, want.detach(), rtol=0, atol=2e-5)
    np.testing.assert_allclose(dbias.reshape(bias.shape), bias.grad, rtol=0, atol=1e-4)


def test_padded_rows_are_zero_and_never_read() -> None:
    rng = np.random.default_rng(0)
    mask = np.array([[0, 1, 1, 1], [1, 1, 0, 0]])
    texts = Sequences.from_mask(mask)
    assert (len(texts), texts.total, texts.max_length) == (2, 8, 3)
    padding = mask.reshape(-1) == 0
    q = rng.normal(size=(8, 4)).astype(np.float32)
    q[padding] = np.nan
    out, _ = attention_forward(q, q, q, texts)
    assert np.isfinite(out).all() and (out[padding] == 0).all()
    packed = Sequences.from_lengths([3, 2])
    alone, _ = attention_forward(q[~padding], q[~padding], q[~padding], packed)
    np.testing.assert_array_equal(out[~padding], alone)


def test_bad_arguments_are_named() -> None:
    q = np.ones((4, 6), np.float32)
    with pytest.raises(SebpError, match="heads"):
        attention_forward(q, q, q, Sequences.from_lengths([4]), options=AttentionOptions(heads=4))
    with pytest.raises(SebpError, match="q_sequences are for 3 rows"):
        attention_forward(q, q, q, Sequences.from_lengths([3]))
    with pytest.raises(ValueError, match="mask has 1 dimensions"):
        Sequences.from_mask([1, 1])
    with pytest.raises(SebpError):
        Sequences.from_mask([[1, 0, 1]])
