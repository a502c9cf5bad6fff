# SPDX-License-Identifier: Apache-2.0
"""Flop formulas of the operators of attention, for PyTorch's flop counters.

They count the pairs of a query and a key that it sees.
"""

import math

import numpy as np
from torch import Tensor
from torch._subclasses import FakeTensor

from .texts import Texts


def _pairs(q: Tensor, k: Tensor, q_texts: Tensor, k_texts: Tensor, pattern: Tensor) -> int:
    """Count the pairs of a query and a key that it sees; without values of texts, all of a row."""
    if any(isinstance(x, FakeTensor) or x.is_meta for x in (q_texts, k_texts, pattern)):
        return math.prod(q.shape[:2]) * k.shape[1]
    texts = Texts.of_tensors(q_texts, k_texts, q.shape[:2], k.shape[:2])
    causal, left, right = pattern.tolist()
    right = 0 if causal else right
    pairs = 0
    lengths = np.diff(texts.queries.offsets), np.diff(texts.keys.offsets)
    for queries, keys in zip(*lengths, strict=True):
        at = np.arange(queries) + keys - queries
        first = np.zeros_like(at) if left < 0 else np.maximum(at - left, 0)
        last = np.full_like(at, keys - 1) if right < 0 else np.minimum(at + right, keys - 1)
        pairs += int(np.maximum(last - first + 1, 0).sum())
    return pairs


def attention_flop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    q_texts: Tensor,
    k_texts: Tensor,
    pattern: Tensor,
    *args: object,
    out_val: object = None,
    **kwargs: object,
) -> int:
    """Count 2 H D for each of the two products of a pair."""
    return 4 * q.shape[-1] * _pairs(q, k, q_texts, k_texts, pattern)


def attention_backward_flop(
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
    *args: object,
    out_val: object = None,
    **kwargs: object,
) -> int:
    """Count 2 H D for each product of a pair: the scores again, dP, and a gradient each."""
    need_dq, need_dk, need_dv, need_dbias = needs
    products = 1 + (need_dq or need_dk or need_dbias) + need_dq + need_dk + need_dv
    return 2 * products * q.shape[-1] * _pairs(q, k, q_texts, k_texts, pattern)
