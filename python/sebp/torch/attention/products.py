# SPDX-License-Identifier: Apache-2.0
"""The library's attention on tensors, forward and backward, below autograd."""

import time

import torch
from torch import Tensor

from ..._structs import Matrix
from ...attention import AttentionOptions
from ..common.context import context_of
from ..common.step_times import add_attention
from ..common.tensors import matrix_of, new_like
from .texts import Side, Texts

# Rounding of a logarithm of this size makes probabilities wrong by 2^-8, as much as bfloat16 does.
_LOST = 2.0**17


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    texts: Texts,
    options: AttentionOptions,
    needs_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute what each query attends to.

    Parameters
    ----------
    q : Tensor, ... x (H D)
        The queries among which `texts` lie, in B x L rows.
    k, v : Tensor, ... x (H_k D)
    bias : Tensor, (1 or H times longest) x longest, or None
        float32.
    texts : Texts
    options : AttentionOptions
    needs_lse : bool
        Whether a backward may follow.

    Returns
    -------
    out : Tensor, of the shape of `q`
        Zero for tokens of no text.
    lse : Tensor, ... x H, or None
        float32.
    """
    start = time.perf_counter()
    of_q, of_k = texts.queries, texts.keys
    q_in, k_in, v_in = _gather(q, of_q), _gather(k, of_k), _gather(v, of_k)
    out = q_in.new_empty(q_in.shape)
    lse = None
    if needs_lse:
        shape = (*q_in.shape[:-1], options.heads)
        lse = q_in.new_empty(shape, dtype=torch.float32)
    context_of(q, k, v, bias).call(
        "sebp_attention_forward",
        matrix_of(q_in),
        matrix_of(k_in),
        matrix_of(v_in),
        _matrix(bias),
        of_q.sequences,
        of_k.sequences,
        options.as_struct(),
        matrix_of(out),
        _matrix(lse),
    )
    if of_q.rows is not None:
        out, lse = _scatter(out, of_q, q), None if lse is None else _scatter(lse, of_q, q)
    add_attention(time.perf_counter() - start)
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    texts: Texts,
    options: AttentionOptions,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of :func:`attention_forward`.

    Parameters
    ----------
    dout : Tensor, of the shape of `q`
    q, k, v, bias, texts, options
        As the forward was given them.
    out, lse : Tensor
        As the forward gave them.
    needs : four bool
        Which gradients are needed.

    Returns
    -------
    dq, dk, dv, dbias : Tensor or None
        None where it is not needed. Those of tokens of no text are zero.

    Raises
    ------
    RuntimeError
        Where a bias has made probabilities unknown that a gradient needs; not on a GPU.
    """
    if bias is not None and lse.is_cpu:
        _refuse_lost(dout, lse)
    start = time.perf_counter()
    of_q, of_k = texts.queries, texts.keys
    given = (dout, q, k, v, out, lse)
    if of_q.rows is not None or of_k.rows is not None:
        sides = (of_q, of_q, of_k, of_k, of_q, of_q)
        given = tuple(_gather(x, side) for x, side in zip(given, sides, strict=True))
    vdout, vq, vk, vv, vout, vlse = map(matrix_of, given)
    need_dq, need_dk, need_dv, need_dbias = needs
    dq = new_like(given[1]) if need_dq else None
    dk = new_like(given[2]) if need_dk else None
    dv = new_like(given[3]) if need_dv else None
    dbias = new_like(bias) if need_dbias else None
    context_of(dout, q, k, v, bias, out, lse).call(
        "sebp_attention_backward",
        vdout,
        vq,
        vk,
        vv,
        _matrix(bias),
        vout,
        vlse,
        of_q.sequences,
        of_k.sequences,
        options.as_struct(),
        _matrix(dq),
        _matrix(dk),
        _matrix(dv),
        _matrix(dbias),
    )
    if of_q.rows is not None:
        dq = None if dq is None else _scatter(dq, of_q, q)
    if of_k.rows is not None:
        dk = None if dk is None else _scatter(dk, of_k, k)
        dv = None if dv is None else _scatter(dv, of_k, v)
    add_attention(time.perf_counter() - start)
    return dq, dk, dv, dbias


def _refuse_lost(dout: Tensor, lse: Tensor) -> None:
    """Raise for a gradient of queries whose scores are so large that `lse` has lost their sum."""
    lost = ((lse.abs() > _LOST) & lse.isfinite()).any(-1)
    if bool(lost.any()) and bool(dout[lost].any()):
        raise RuntimeError(
            "sebp: all keys that a query sees have a large number for a bias: its gradient is lost"
            " in rounding; a bias that is a mask is to be -inf, or use attention 'eager'"
        )


def _matrix(x: Tensor | None) -> Matrix | None:
    return None if x is None else matrix_of(x)


def _gather(x: Tensor, side: Side) -> Tensor:
    """Take the rows of texts, where the library cannot be told where they lie."""
    if side.rows is None:
        return x
    return x.flatten(0, -2).index_select(0, side.rows.to(x.device))


def _scatter(rows: Tensor, side: Side, like: Tensor) -> Tensor:
    """Undo :func:`_gather`, with zeros for the other rows."""
    if side.rows is None:
        return rows
    *lead, _ = like.shape
    padded = rows.new_zeros(like.shape[:-1].numel(), rows.shape[-1])
    return padded.index_copy_(0, side.rows.to(rows.device), rows).view(*lead, rows.shape[-1])
