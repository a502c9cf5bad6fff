# SPDX-License-Identifier: Apache-2.0
"""The library on NumPy arrays: contexts, row sets, and the linear layer.

A linear layer is Y = X W^T + b with X: M x K, W: N x K, b: N, Y and its gradient dY: M x N. Arrays
are float32, or uint16 that hold bfloat16 (the upper half of a float32). Rows may be any stride
apart; elements of a row lie next to each other, and an array where they do not is copied.
"""

from .calls import SebpError
from .context import Context, default_context
from .linear import linear_backward, linear_forward
from .matrices import Array
from .rows import Rows

__all__ = [
    "Array",
    "Context",
    "Rows",
    "SebpError",
    "default_context",
    "linear_backward",
    "linear_forward",
]
