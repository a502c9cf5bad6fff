# SPDX-License-Identifier: Apache-2.0
"""Attention within each text of a packed batch.

It replaces "sdpa" in transformers' table of attention functions, so that every model which uses
that table has it. Calls whose mask is not a :class:`~sebp.torch.common.packing.Packing`'s go on to
transformers' own. Configurations are not changed.
"""

import functools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..common.devices import autocast_dtype
from ..common.packing import Unfit, current_packing, lengths_of
from ..common.tensors import DTYPES
from . import relative_bias
from .attend import Pattern, attend
from .texts import Texts

SDPA = "sdpa"
NAMES = (SDPA, "sebp")  # attentions that compute packed texts


@functools.lru_cache(maxsize=16)  # the layers of a model have the same texts
def _texts_of(lengths: tuple[int, ...]) -> Texts:
    return Texts.of_lengths(np.array(lengths, np.int64))


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    is_causal: bool,
    window: int | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute attention within each text: by the library, or by PyTorch for dtypes it has not.

    Parameters
    ----------
    query : Tensor, 1 x heads x T x D
    key, value : Tensor, 1 x heads or fewer x T x D
    lengths : list of int
        Of the texts, T in all.
    is_causal : bool
        Whether a token attends only to itself and those before it.
    window : int, optional
        A token attends to those less than so many tokens away.
    bias : Tensor, 1 x heads x L x L, optional
        What is added to the scores, for texts of up to L tokens.
    dropout : float
        Of probabilities.
    scaling : float, optional
        Of scores.
    softcap : float, optional
        Scores become softcap * tanh(scores / softcap).

    Returns
    -------
    Tensor, 1 x T x heads x D
        What each token attends to.

    Raises
    ------
    Unfit
        If a text is longer than a window that the model's configuration does not name.
    """
    if dtype := autocast_dtype(query):
        query, key, value = (x.to(dtype) for x in (query, key, value))
    packing = current_packing()
    is_cut = window is not None and max(lengths, default=0) > window
    if is_cut and packing is not None and not packing.may_cut:
        raise Unfit(f"its attention has a window of {window}, which no sliding_window names")
    if query.dtype in DTYPES:
        pattern = Pattern(is_causal, None if window is None else window - 1)
        texts = _texts_of(tuple(lengths))
        return attend(
            query, key, value, texts, pattern, bias, scaling, softcap, dropout,
            bias_is_of_texts=True,
        )  # fmt: skip
    if softcap is not None:
        raise Unfit(f"its attention has the argument softcap, in {query.dtype}")
    return _text_by_text(query, key, value, lengths, is_causal, window, bias, dropout, scaling)


def _text_by_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    is_causal: bool,
    window: int | None,
    bias: Tensor | None,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """Compute it by PyTorch; adjacent texts of one length are computed together."""
    sizes, texts = [], []
    for length in lengths:
        if texts and sizes[-1] == length:
            texts[-1] += 1
        else:
            sizes.append(length)
            texts.append(1)
    groups = list(zip(texts, sizes, strict=True))

    def split(x: Tensor) -> list[Tensor]:
        """Return each group as texts x heads x length x D."""
        parts = x[0].transpose(0, 1).split([count * length for count, length in groups])
        return [
            part.unflatten(0, group).transpose(1, 2)
            for part, group in zip(parts, groups, strict=True)
        ]

    outputs = []
    for (_, length), q, k, v in zip(groups, split(query), split(key), split(value), strict=True):
        mask = _mask(length, is_causal, window, bias, q)
        y = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=is_causal and mask is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(y.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None]


def _mask(
    length: int, is_causal: bool, window: int | None, bias: Tensor | None, query: Tensor
) -> Tensor | None:
    """Return a text's mask, length x length or heads x length x length, or None."""
    is_cut = window is not None and length > window
    if not is_cut and bias is None:
        return None
    token = torch.arange(length, device=query.device)
    distance = token[:, None] - token
    seen = (distance >= 0) if is_causal else torch.ones_like(distance, dtype=torch.bool)
    if is_cut:
        seen &= distance.abs() < window
    if bias is None:
        return seen
    bias = bias[0, :, :length, :length].to(query.dtype)
    return bias if bool(seen.all()) else bias.masked_fill(~seen, -torch.inf)


def check_packed(query: Tensor, key: Tensor, lengths: list[int]) -> None:
    """Raise an :class:`Unfit` where queries or keys are not the tokens of packed texts.

    Parameters
    ----------
    query, key : Tensor, 1 x heads x T x D
    lengths : list of int
        Of the texts.
    """
    tokens = sum(lengths)
    if query.shape[0] != 1 or query.shape[2] != tokens or key.shape[2] != tokens:
        raise Unfit("its attention is not of tokens to the tokens of their text")


def check_bias(module: nn.Module, bias: Tensor | None) -> None:
    """Raise an :class:`Unfit` for a bias that may be one of places in the row of packed texts."""
    if bias is not None and not relative_bias.is_of_texts(module):
        raise Unfit("its attention has the argument position_bias")


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """Replace transformers' "sdpa"."""
    lengths = None if torch.compiler.is_compiling() else lengths_of(attention_mask)
    if lengths is None:
        return _of_transformers["sdpa"](
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **({} if position_bias is None else {"position_bias": position_bias}),
            **kwargs,
        )
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise Unfit(f"its attention has the argument {name}")
    check_packed(query, key, lengths)
    check_bias(module, position_bias)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    window = kwargs.get("sliding_window")
    out = attend_packed(
        query, key, value, lengths, is_causal, window, position_bias, dropout, scaling
    )
    return out, None


_of_transformers: dict[str, object] = {}


def register() -> None:
    """Put this attention into transformers' table, if it is not there."""
    from transformers import AttentionInterface

    if AttentionInterface()[SDPA] is not _sdpa:
        _of_transformers[SDPA] = AttentionInterface()[SDPA]
        AttentionInterface.register(SDPA, _sdpa)
