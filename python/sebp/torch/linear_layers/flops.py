# SPDX-License-Identifier: Apache-2.0
"""Flop formulas of the operators of linear layers, for PyTorch's flop counters.

They count the dense products, as the formula of PyTorch's own linear does.
"""

import math

import torch


def linear_flop(
    x: torch.Size, weight: torch.Size, *args: object, out_shape: object = None, **kwargs: object
) -> int:
    """Count 2 M N K."""
    return 2 * math.prod(x[:-1]) * math.prod(weight)


def linear_backward_flop(
    dy: torch.Size,
    x: torch.Size | None,
    weight: torch.Size | None,
    total: int,
    transposed: bool,
    kind: int,
    value: float,
    dx_dtype: torch.dtype | None,
    dw_dtype: torch.dtype | None,
    db_dtype: torch.dtype | None,
    *,
    out_shape: object = None,
) -> int:
    """Count 2 M N K for each of dX and dW."""
    k = 0
    if weight is not None:
        k = weight[0 if transposed else 1]
    elif x is not None:
        k = x[-1]
    return 2 * math.prod(dy) * k * ((dx_dtype is not None) + (dw_dtype is not None))
