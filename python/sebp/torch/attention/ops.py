# SPDX-License-Identifier: Apache-2.0
"""Registers the operators ``sebp::attention`` and ``sebp::attention_backward``.

All that differs from batch to batch is a tensor, so that a graph which holds the operators serves
for all of them:

- `q_texts` and `k_texts`, int64 or int32, say which tokens are a text among B x L queries and among
  B x L_k keys: the cumulative lengths of texts that lie end to end, as flash attention's users know
  them; or in two dimensions the number of each token's text, from 1 on in their order, 0 for none.
- `pattern`, three int64: whether attention is causal, how many keys before a query's position are
  seen, and how many behind it; -1: all.
- `seed`, an int64, or None without dropout.

The rest is as attention.h has it.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.flop_counter import register_flop_formula

from ...attention import AttentionOptions
from ..common.forward import refuse_tangents
from .flops import attention_backward_flop, attention_flop
from .products import attention_backward, attention_forward
from .texts import Texts

NO_SECOND = "sebp's attention has no second derivatives; attn_implementation='eager' has them"


def _options(
    pattern: Tensor,
    seed: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    softcap: float,
    dropout: float,
    offset: int,
) -> AttentionOptions:
    causal, left, right = pattern.tolist()
    number = 0 if seed is None else int(seed)
    return AttentionOptions(
        heads, kv_heads, scale, softcap, bool(causal), left, right, dropout, number, offset
    )


# --------------------------------------------------------------------------------------------------
# sebp::attention


@torch.library.custom_op("sebp::attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    q_texts: Tensor,
    k_texts: Tensor,
    pattern: Tensor,
    seed: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    softcap: float = 0.0,
    dropout: float = 0.0,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return out, B x L x (H D), and lse, B x L x H."""
    refuse_tangents("sebp::attention")
    texts = Texts.of_tensors(q_texts, k_texts, q.shape[:2], k.shape[:2])
    options = _options(pattern, seed, heads, kv_heads, scale, softcap, dropout, offset)
    return attention_forward(q, k, v, bias, texts, options, True)


@attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    q_texts: Tensor,
    k_texts: Tensor,
    pattern: Tensor,
    seed: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    softcap: float = 0.0,
    dropout: float = 0.0,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((*q.shape[:-1], heads), dtype=torch.float32)
    return q.new_empty(q.shape), lse


def _save(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, *rest = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    # No more than the direct way saves: checkpointing may compute again by that, and counts.
    ctx.save_for_backward(q, k, v, bias, out, lse)
    ctx.told, ctx.options = rest[:4], rest[4:]


def _backward(ctx: FunctionCtx, dout: Tensor, _: Tensor) -> tuple:
    needs = ctx.needs_input_grad[:4]
    gradients = torch.ops.sebp.attention_backward(
        dout, *ctx.saved_tensors, *ctx.told, needs, *ctx.options
    )
    found = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return (*found, *(None,) * 10)


attention_op.register_autograd(_backward, setup_context=_save)
register_flop_formula(torch.ops.sebp.attention, get_raw=True)(attention_flop)


# --------------------------------------------------------------------------------------------------
# sebp::attention_backward


@torch.library.custom_op("sebp::attention_backward", mutates_args=())
def attention_backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q_texts: Tensor,
    k_texts: Tensor,
    pattern: Tensor,
    seed: Tensor | None,
    needs: list[bool],
    heads: int,
    kv_heads: int,
    scale: float,
    softcap: float = 0.0,
    dropout: float = 0.0,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute dq, dk, dv and dbias; what is not needed is empty."""
    refuse_tangents("sebp::attention_backward")
    texts = Texts.of_tensors(q_texts, k_texts, q.shape[:2], k.shape[:2])
    options = _options(pattern, seed, heads, kv_heads, scale, softcap, dropout, offset)
    found = attention_backward(dout, q, k, v, bias, out, lse, texts, options, tuple(needs))
    return tuple(q.new_empty(0) if one is None else one for one in found)


@attention_backward_op.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q_texts: Tensor,
    k_texts: Tensor,
    pattern: Tensor,
    seed: Tensor | None,
    needs: list[bool],
    heads: int,
    kv_heads: int,
    scale: float,
    softcap: float = 0.0,
    dropout: float = 0.0,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(
        x.new_empty(x.shape) if needed else q.new_empty(0)
        for x, needed in zip((q, k, v, bias), needs, strict=True)
    )


def _save_nothing(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
    pass


def _refuse(ctx: FunctionCtx, *gradients: Tensor) -> tuple:
    raise RuntimeError(NO_SECOND)


attention_backward_op.register_autograd(_refuse, setup_context=_save_nothing)
register_flop_formula(torch.ops.sebp.attention_backward, get_raw=True)(attention_backward_flop)
