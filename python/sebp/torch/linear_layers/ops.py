# SPDX-License-Identifier: Apache-2.0
"""Registers the operators ``sebp::linear``, ``sebp::linear_backward`` and ``sebp::active_rows``.

A weight is N x K, or K x N if `transposed` (as in Conv1D of transformers). A rule of
:mod:`sebp._rules` is given by its two numbers. `mask` is B x L, of the padded batch whose real
tokens X's rows are, where padding was taken out before; work is counted against its B * L rows, and
nothing else depends on it. Operands are float32 or bfloat16, in any mixture. Y is of `dtype`, or of
X's. Under autocast that is bfloat16, and each gradient is of its operand's dtype, so that nothing
is cast. A gradient whose dtype is None is not computed.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..._rules import Rule
from ..._structs import RULE_NONZERO
from ..common.forward import refuse_tangents
from ..common.rows import find_rows
from ..common.tensors import is_ours, matrix_of
from .autograd import backward, double_backward, save_for_backward, save_for_double_backward
from .flops import linear_backward_flop, linear_flop
from .products import linear_backward, linear_forward, sizes

# --------------------------------------------------------------------------------------------------
# sebp::linear


@torch.library.custom_op("sebp::linear", mutates_args=())
def linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    transposed: bool = False,
    kind: int = RULE_NONZERO,
    value: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Y = X W^T + b."""
    refuse_tangents("sebp::linear")
    return linear_forward(x, weight, bias, transposed, dtype)


@linear_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    transposed: bool = False,
    kind: int = RULE_NONZERO,
    value: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    shape = (*x.shape[:-1], weight.shape[1 if transposed else 0])
    return x.new_empty(shape, dtype=x.dtype if dtype is None else dtype)


linear_op.register_autograd(backward, setup_context=save_for_backward)
register_flop_formula(torch.ops.sebp.linear)(linear_flop)


def _autocast(device: str, key: str) -> Callable[..., Tensor]:
    """Make what the operator does under a device's autocast."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def call(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        transposed: bool = False,
        kind: int = RULE_NONZERO,
        value: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Call the operator for a Y of autocast's dtype. Operands are not cast beforehand."""
        if dtype is None and x.dtype != torch.float64:  # which autocast leaves as it is
            dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return torch.ops.sebp.linear(x, weight, bias, mask, transposed, kind, value, dtype)

    return call


_library = torch.library.Library("sebp", "IMPL")  # what it registers lasts as long as it does
for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _library.impl("linear", _autocast(_device, _key), _key)


# --------------------------------------------------------------------------------------------------
# sebp::linear_backward


@torch.library.custom_op("sebp::linear_backward", mutates_args=())
def linear_backward_op(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    total: int,
    transposed: bool,
    kind: int,
    value: float,
    dx_dtype: torch.dtype | None,
    dw_dtype: torch.dtype | None,
    db_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dX, dW and db on the active rows; what is not needed is empty."""
    refuse_tangents("sebp::linear_backward")
    rule = Rule(kind, value)
    found = linear_backward(dy, x, weight, total, transposed, rule, dx_dtype, dw_dtype, db_dtype)
    return tuple(dy.new_empty(0) if one is None else one for one in found)


@linear_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    total: int,
    transposed: bool,
    kind: int,
    value: float,
    dx_dtype: torch.dtype | None,
    dw_dtype: torch.dtype | None,
    db_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    n, k = sizes(dy, x, weight, transposed)
    shapes = (*dy.shape[:-1], k), (k, n) if transposed else (n, k), (n,)
    return tuple(
        dy.new_empty(0) if dtype is None else dy.new_empty(shape, dtype=dtype)
        for shape, dtype in zip(shapes, (dx_dtype, dw_dtype, db_dtype), strict=True)
    )


linear_backward_op.register_autograd(double_backward, setup_context=save_for_double_backward)
register_flop_formula(torch.ops.sebp.linear_backward)(linear_backward_flop)


# --------------------------------------------------------------------------------------------------
# sebp::active_rows, for second derivatives


@torch.library.custom_op("sebp::active_rows", mutates_args=())
def active_rows_op(dy: Tensor, kind: int, value: float) -> Tensor:
    """Mark the active rows of dY: M x 1, of dY's dtype, 1 or 0."""
    active = dy.new_zeros((math.prod(dy.shape[:-1]), 1))
    if not is_ours(dy):
        return active.fill_(1)
    rows = find_rows(matrix_of(dy), Rule(kind, value))
    return active.index_fill_(0, torch.from_numpy(rows.indices).to(dy.device), 1)


@active_rows_op.register_fake
def _(dy: Tensor, kind: int, value: float) -> Tensor:
    return dy.new_empty((math.prod(dy.shape[:-1]), 1))
