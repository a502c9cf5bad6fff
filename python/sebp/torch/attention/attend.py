# SPDX-License-Identifier: Apache-2.0
"""The library's attention in autograd: within each text of a batch, forward and backward."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

from ...attention import AttentionOptions
from ..common.devices import reason_against
from ..common.forward import is_differentiated
from ..common.seeds import draw_seed
from ..common.tensors import DTYPES, by_rows
from ..linear_layers.direct import is_direct
from . import ops  # noqa: F401, registers sebp::attention
from .products import attention_backward, attention_forward
from .texts import Texts


@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees in its text, the ends of queries and keys aligned.

    Attributes
    ----------
    causal : bool
        Whether it sees none behind its own position.
    window : int or None
        How far before its position it sees keys, and without `causal` also behind it; None: all.
    """

    causal: bool
    window: int | None = None

    @property
    def windows(self) -> tuple[int, int]:
        """How many keys are seen before a query's position and behind it; -1: all."""
        window = -1 if self.window is None else self.window
        return window, -1 if self.causal else window


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    texts: Texts,
    pattern: Pattern,
    bias: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    bias_is_of_texts: bool = False,
) -> Tensor:
    """Compute attention within each text by the library.

    Inputs are read where they lie if the heads of a token are adjacent and tokens a constant stride
    apart, as after a projection, a fused one too; else they are copied once.

    Parameters
    ----------
    query : Tensor, B x H x L x D
        float32 or bfloat16, on the CPU or on a GPU that the library can work on; `key` and `value`
        as well.
    key : Tensor, B x H_k x L_k x D
        With H a multiple of H_k.
    value : Tensor, B x H_k x L_k x D_v
    texts : Texts
        Which tokens attend to which.
    pattern : Pattern
        Which keys of its text a query sees.
    bias : Tensor, 1 or B x 1 or H x L x L_k, optional
        What is added to the scores.
    scaling : float, optional
        Of the scores, not 0. Default: 1 / sqrt(D).
    softcap : float, optional
        Scores become softcap * tanh(scores / softcap).
    dropout : float
        Of probabilities, in [0, 1). Its seed is drawn from PyTorch's default generator, so that the
        same state of that gives the same numbers.
    bias_is_of_texts : bool
        The bias is not of the B rows but of each text alike, from its first token on: 1 x 1 or H x
        L' x L'_k, L' and L'_k the lengths of the longest text or more.

    Returns
    -------
    Tensor, B x L x H x D_v
        Zero for tokens of no text, and for queries that see no key.

    Raises
    ------
    TypeError
        If tensors are of other dtypes, or where the library cannot work; if `scaling` or `softcap`
        is a tensor.
    ValueError, SebpError
        If shapes or options do not go together.
    RuntimeError
        In a backward of the backward, and where ``torch.func`` or forward mode takes derivatives.
        On the CPU also in a backward, where the bias makes all scores of a query larger than 2^17,
        as a mask of -1e9 does, and the query has a gradient. The backward computes probabilities
        from the logarithm of their sum, which rounding has lost by then. Mask with -inf instead.
    """
    if has_torch_function((query, key, value)):  # a subclass, or a mode that changes calls
        return handle_torch_function(
            attend, (query, key, value), query, key, value, texts, pattern, bias, scaling, softcap,
            dropout=dropout, bias_is_of_texts=bias_is_of_texts,
        )  # fmt: skip
    _refuse_derivatives()
    _check(query, key, value, scaling, softcap)
    _check_shapes(query, key, value, texts, bias, bias_is_of_texts)
    window_left, window_right = pattern.windows
    is_plain = is_direct(query, key, value, bias)
    seed = draw_seed() if dropout > 0 else None
    options = AttentionOptions(
        heads=query.shape[1],
        kv_heads=key.shape[1],
        scale=query.shape[3] ** -0.5 if scaling is None else scaling,
        softcap=softcap or 0.0,
        causal=pattern.causal,
        window_left=window_left,
        window_right=window_right,
        dropout=dropout,
        seed=int(seed) if is_plain and seed is not None else 0,
    )
    how = _How(options, seed, is_plain)
    q, k, v = _in_rows(query, key, value)
    if bias is None:
        out = _side_by_side(q, k, v, None, texts, how)
    elif bias_is_of_texts or (
        bias.shape[0] == 1 and all(s.begins_at_corner() for s in (texts.queries, texts.keys))
    ):
        longest = texts.queries.max_length, texts.keys.max_length
        corner = bias[0, :, : longest[0], : longest[1]]
        out = _side_by_side(q, k, v, corner, texts, how)
    else:
        out = _one_by_one(q, k, v, bias, texts, how)
    return out.unflatten(2, (query.shape[1], -1))[..., : value.shape[3]]


def attend_told(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    told: tuple[Tensor, Tensor, Tensor],
    scaling: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Do what :func:`attend` does in a graph, where texts and pattern are tensors without values.

    Parameters
    ----------
    query, key, value, scaling, softcap, dropout
        As there.
    told : tuple of three Tensor
        `q_texts`, `k_texts` and `pattern` of ``sebp::attention``.

    Returns
    -------
    Tensor, B x L x H x D_v

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As there.
    """
    _refuse_derivatives()
    _check(query, key, value, scaling, softcap)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    heads = query.shape[1], key.shape[1]
    q, k, v = _in_rows(query, key, value)
    seed = draw_seed() if dropout > 0 else None
    numbers = *heads, scale, softcap or 0.0, dropout
    out = torch.ops.sebp.attention(q, k, v, None, *told, seed, *numbers)[0]
    return out.unflatten(2, (heads[0], -1))[..., : value.shape[3]]


def _refuse_derivatives() -> None:
    if is_differentiated():
        raise RuntimeError(
            "sebp's attention has no derivatives of torch.func or of forward mode;"
            " attn_implementation='eager' has them"
        )


def _in_rows(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Give them as the library has them, the heads of a token in one: B x L x (H D)."""
    width, width_v = query.shape[3], value.shape[3]
    if width != width_v:  # the library has one head size; zeros change no score and no output
        wide = max(width, width_v)
        query, key, value = (functional.pad(x, (0, wide - x.shape[3])) for x in (query, key, value))
    return tuple(x.transpose(1, 2).flatten(2) for x in (query, key, value))


def _check(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, softcap: float | None
) -> None:
    """Raise for tensors and numbers that the library does not take."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not tensor.is_cpu and (reason := reason_against(tensor.device)):
            raise TypeError(f"{name} is on {tensor.device}; sebp's attention is not: {reason}")
        if tensor.device != query.device:
            raise TypeError(f"query is on {query.device}, but {name} is on {tensor.device}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}; sebp's attention has float32 and bfloat16")
        if tensor.dtype != query.dtype:
            raise TypeError(f"query is {query.dtype}, but {name} is {tensor.dtype}")
    for name, number in (("scaling", scaling), ("softcap", softcap)):
        if isinstance(number, Tensor):
            raise TypeError(f"{name} is a Tensor, which would get no gradient; give a float")
    if scaling == 0 or softcap == 0:
        raise ValueError(f"scaling is {scaling} and softcap {softcap}; neither can be 0")


def _check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    texts: Texts,
    bias: Tensor | None,
    bias_is_of_texts: bool,
) -> None:
    """Raise for tensors that do not go with the texts."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        side = texts.queries if tensor is query else texts.keys
        if tensor.dim() != 4 or (tensor.shape[0], tensor.shape[2]) != side.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, but texts lie in {side.shape}")
    if bias is None:
        return
    if bias.device != query.device or not bias.is_floating_point():
        raise TypeError(
            f"the bias is {bias.dtype} on {bias.device}, not of numbers on {query.device}"
        )
    batch, heads, lengths = query.shape[0], query.shape[1], (query.shape[2], key.shape[2])
    is_fit = bias.dim() == 4 and bias.shape[0] in (1, batch) and bias.shape[1] in (1, heads)
    if bias_is_of_texts:
        lengths = texts.queries.max_length, texts.keys.max_length
        longer = is_fit and bias.shape[2] >= lengths[0] and bias.shape[3] >= lengths[1]
        is_fit = longer and bias.shape[0] == 1
    else:
        is_fit = is_fit and bias.shape[2:] == lengths
    if not is_fit:
        raise ValueError(
            f"the bias is {tuple(bias.shape)}, not 1 or {batch} x 1 or {heads} x {lengths}"
        )


class _How(NamedTuple):
    """Options, the operator's seed, and whether that is called directly (:func:`is_direct`)."""

    options: AttentionOptions
    seed: Tensor | None
    is_direct: bool


def _side_by_side(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    texts: Texts,
    how: _How,
) -> Tensor:
    """Compute all texts in one call: B x L x (H D). bias: 1 or H x longest x longest."""
    if bias is not None:
        bias = bias.float().flatten(0, 1).contiguous()
    q, k, v = by_rows(q), by_rows(k), by_rows(v)
    options = how.options
    if how.is_direct:
        return _apply(q, k, v, bias, texts, options)
    told = _tensors_of(texts, options)
    return torch.ops.sebp.attention(q, k, v, bias, *told, how.seed, *_numbers_of(options))[0]


def _tensors_of(texts: Texts, options: AttentionOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Give `q_texts`, `k_texts` and `pattern` of ``sebp::attention``."""
    seen = options.causal, options.window_left, options.window_right
    pattern = torch.tensor(seen, dtype=torch.int64, device="cpu")
    return texts.queries.as_tensor(), texts.keys.as_tensor(), pattern


def _numbers_of(options: AttentionOptions) -> tuple[float, ...]:
    """Give the arguments of ``sebp::attention`` behind its tensors."""
    heads = options.heads, options.kv_heads
    return (*heads, options.scale, options.softcap, options.dropout, options.offset)


def _one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    texts: Texts,
    how: _How,
) -> Tensor:
    """Compute each text by itself, as each has a bias of its own: B x L x (H D)."""
    outs = []
    sides = texts.queries.columns(), texts.keys.columns()
    for number, ((row, at_q), (row_k, at_k)) in enumerate(zip(*sides, strict=True)):
        row = row if at_q.numel() > 0 else row_k
        text = Texts.of_rows(1, at_q.numel(), at_k.numel())
        own = bias[row if bias.shape[0] > 1 else 0][:, at_q][:, :, at_k]
        parts = (q[row, at_q], k[row, at_k], v[row, at_k])
        q_i, k_i, v_i = (part[None] for part in parts)
        of_text = how._replace(options=replace(how.options, offset=number))
        outs.append(_side_by_side(q_i, k_i, v_i, own, text, of_text).squeeze(0))
    tokens = torch.from_numpy(texts.queries.tokens).to(q.device)
    padded = q.new_zeros(q.shape[0] * q.shape[1], q.shape[2])
    return padded.index_copy(0, tokens, torch.cat([padded[:0], *outs])).view(q.shape)


class sebp_attention(torch.autograd.Function):
    """What ``sebp::attention`` computes. Its name is that of the node in the graph of gradients."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        texts: Texts,
        options: AttentionOptions,
    ) -> Tensor:
        """Compute what each query attends to, and save what the operator saves."""
        out, lse = attention_forward(q, k, v, bias, texts, options, any(ctx.needs_input_grad))
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.texts, ctx.options = texts, options
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients, by ``sebp::attention_backward`` where others may step in."""
        needs, saved = ctx.needs_input_grad[:4], ctx.saved_tensors
        if not torch.is_grad_enabled() and is_direct(dout, *saved):
            found = attention_backward(dout, *saved, ctx.texts, ctx.options, needs)
            return (*found, None, None)
        options = ctx.options
        seed = torch.tensor(options.seed, dtype=torch.int64, device="cpu")
        found = torch.ops.sebp.attention_backward(
            dout, *saved, *_tensors_of(ctx.texts, options), seed, needs, *_numbers_of(options)
        )
        found = (g if need else None for g, need in zip(found, needs, strict=True))
        return (*found, None, None)


# What Function.apply() calls after it has looked for torch.func, which is_direct() has done before.
_apply = super(torch.autograd.Function, sebp_attention).apply
