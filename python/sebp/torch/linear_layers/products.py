# SPDX-License-Identifier: Apache-2.0
"""The products of a linear layer's forward and backward, by the library or by PyTorch."""

import ctypes
import math
import time

import torch
from torch import Tensor
from torch.nn import functional

from ..._rules import Rule
from ..._structs import (
    ACCUMULATE,
    BF16,
    PRECISION_MEDIUM,
    RULE_SAMPLED,
    LinearOptions,
    Matrix,
)
from ...core import Rows
from ..common.context import context_of, is_fast_in_bfloat16
from ..common.rows import find_rows, sample_rows
from ..common.seeds import draw_seed
from ..common.tensors import DTYPES, is_ours, matrix_of, matrix_of_size
from ..common.work import LayerKind, count_work, counts_forwards, device_of

_KNOWN = frozenset((None, *DTYPES))

# Of products whose Y, or dY, is of bfloat16, as under autocast: what is of float32 is rounded too,
# while it is packed. Of others PyTorch's precision holds, which the context has.
_BY_BF16 = LinearOptions(ctypes.sizeof(LinearOptions), precision=PRECISION_MEDIUM)

# --------------------------------------------------------------------------------------------------
# Forward


@counts_forwards
def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute Y = X W^T + b, or X W + b.

    Parameters
    ----------
    x : Tensor, ... x K
    weight : Tensor, N x K, or K x N if `transposed`
    bias : Tensor, N, or None
        Each of float32 or bfloat16, in any mixture; or all of another dtype.
    transposed : bool
    dtype : torch.dtype, optional
        Y's. Default: X's.

    Returns
    -------
    Tensor, ... x N
        Y. It is no view: what follows may change it in place.
    """
    shape = (*x.shape[:-1], weight.shape[1 if transposed else 0])
    y_dtype = x.dtype if dtype is None else dtype
    is_known = y_dtype in DTYPES and is_ours(x, weight, bias)
    if is_known and _is_for_library(x, y_dtype):
        y = x.new_empty(shape, dtype=y_dtype)
        run = _library_forward_transposed if transposed else _library_forward
        run(x, weight, bias, y)
        return y
    if is_known or dtype is not None:
        x, weight = x.to(y_dtype), weight.to(y_dtype)
        bias = None if bias is None else bias.to(y_dtype)
    w = _laid_out(weight)
    y = functional.linear(_laid_out(_flat(x)), w.t() if transposed else w, bias)
    return torch.ops.aten._unsafe_view.default(y, shape)


def _is_for_library(x: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the library computes a forward, whose rows are all active, of a Y of a dtype.

    On a GPU PyTorch does: cuBLAS has a product for each shape, which adds the bias as well.
    """
    return x.is_cpu and (dtype == torch.float32 or is_fast_in_bfloat16())


def _library_forward(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Fill Y: ... x N, just made."""
    n, k = weight.shape
    m, dtype = math.prod(x.shape[:-1]), DTYPES[y.dtype]
    context_of(x, weight, bias).call(
        "sebp_linear_forward",
        matrix_of_size(x, m, k, DTYPES[x.dtype]),
        matrix_of_size(weight, n, k, DTYPES[weight.dtype]),
        None if bias is None else matrix_of_size(bias, 1, n, DTYPES[bias.dtype]),
        None,
        _BY_BF16 if dtype == BF16 else None,
        Matrix(y.data_ptr(), m, n, n, dtype),
    )


def _library_forward_transposed(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """As :func:`_library_forward` for W: K x N."""
    context = context_of(x, weight, bias)
    vx, vw, vy = matrix_of(x), matrix_of(weight), matrix_of(y)
    # X W is what the backward computes as dX = dY W; it is added to b.
    options = LinearOptions(ctypes.sizeof(LinearOptions))
    if vy.dtype == BF16:
        options.precision = PRECISION_MEDIUM
    if bias is not None:
        options.dx_write = ACCUMULATE
        y.copy_(bias.expand(y.shape))
    rows = Rows.all(vy.rows)
    context.call("sebp_linear_backward", vx, None, vw, rows, options, vy, None, None)


def _flat(tensor: Tensor) -> Tensor:
    """Make a tensor 2-D, with contiguous rows that do not overlap, copied only where it must be."""
    cols = tensor.shape[-1]
    result = tensor.reshape(math.prod(tensor.shape[:-1]), cols)
    if (result.shape[0] > 1 and result.stride(0) < cols) or (cols > 1 and result.stride(1) != 1):
        result = result.contiguous()
    return result


def _laid_out(matrix: Tensor) -> Tensor:
    """Close the gaps between a matrix's rows.

    On Intel's processors with AMX PyTorch's product in bfloat16 reads past the rows of a matrix
    with gaps, and a NaN there gets into the result.
    """
    if matrix.dtype != torch.bfloat16 or not matrix.is_cpu or matrix.t().is_contiguous():
        return matrix
    return matrix.contiguous()


# --------------------------------------------------------------------------------------------------
# Backward


def linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    total: int,
    transposed: bool,
    rule: Rule,
    dx_dtype: torch.dtype | None,
    dw_dtype: torch.dtype | None,
    db_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute dX, dW and db on the active rows.

    Under ``RULE_SAMPLED`` dX is that of all rows that are not zero, and exact; dW and db are those
    of a weighted sample, and unbiased. Its seed is drawn here and not in the forward, so that what
    checkpointing computes again draws the same numbers as before, and each backward is a sample of
    its own.

    Parameters
    ----------
    dy : Tensor, ... x N
    x : Tensor, ... x K, or None where dW is not needed
    weight : Tensor, N x K, or K x N if `transposed`, or None where dX is not needed
    total : int
        The rows of the padded batch, against which work is counted.
    transposed : bool
    rule : Rule
        Which rows of dY are active.
    dx_dtype, dw_dtype, db_dtype : torch.dtype or None
        Of each result; None where it is not needed.

    Returns
    -------
    dx : Tensor, ... x K
    dw : Tensor, of the weight's shape
    db : Tensor, N
        None where it is not needed.
    """
    dtypes = dx_dtype, dw_dtype, db_dtype
    if not (is_ours(dy, x, weight) and _KNOWN.issuperset(dtypes)):
        return _dense_backward(dy, x, weight, transposed, *dtypes)
    start = time.perf_counter()
    if not dy.is_cpu:  # whose matrix units take one dtype, as PyTorch's products do
        x, weight = (None if one is None else one.to(dy.dtype) for one in (x, weight))
    n, k = sizes(dy, x, weight, transposed)
    w_rows, w_cols = (k, n) if transposed else (n, k)
    *lead, _ = dy.shape
    m, dtype = math.prod(lead), DTYPES[dy.dtype]
    vdy = matrix_of_size(dy, m, n, dtype)
    is_sampled = rule.kind == RULE_SAMPLED
    active = find_rows(vdy, Rule() if is_sampled else rule)
    dx = dw = db = vx = vw = vdx = vdw = vdb = None
    if dx_dtype is not None:
        dx = dy.new_empty((*lead, k), dtype=dx_dtype)
        vw = matrix_of_size(weight, w_rows, w_cols, DTYPES[weight.dtype])
        vdx = Matrix(dx.data_ptr(), m, k, k, DTYPES[dx_dtype])
    if dw_dtype is not None:
        dw = dy.new_empty((w_rows, w_cols), dtype=dw_dtype)
        vx = matrix_of_size(x, m, k, DTYPES[x.dtype])
        vdw = Matrix(dw.data_ptr(), w_rows, w_cols, w_cols, DTYPES[dw_dtype])
    if db_dtype is not None:
        db = dy.new_empty(n, dtype=db_dtype)
        vdb = Matrix(db.data_ptr(), 1, n, n, DTYPES[db_dtype])
    run = _library_backward_transposed if transposed else library_backward
    options = _BY_BF16 if dtype == BF16 else None

    def count(active: Rows, need_dx: bool, need_dw: bool, start: float) -> float:
        """Count what has been computed since `start`; now, on the CPU."""
        now = time.perf_counter()
        kind = LayerKind(n, k, dy.dtype, need_dx, need_dw, False, device_of(dy))
        count_work(kind, total, len(active), now - start if dy.is_cpu else 0.0)
        return now

    if is_sampled and not (dw is None and db is None):
        if dx is not None:
            run(vdy, None, vw, active, vdx, None, None, options)
            start = count(active, True, False, start)
        sample = sample_rows(vdy, vx, rule, int(draw_seed()))
        run(vdy, vx, None, sample, None, vdw, vdb, options)
        count(sample, False, dw is not None, start)
    else:
        run(vdy, vx, vw, active, vdx, vdw, vdb, options)
        count(active, dx is not None, dw is not None, start)
    return dx, dw, db


def sizes(dy: Tensor, x: Tensor | None, weight: Tensor | None, transposed: bool) -> tuple[int, int]:
    """Return N and K; K is 0 where neither dX nor dW is wanted."""
    if weight is not None:
        return dy.shape[-1], weight.shape[0 if transposed else 1]
    return dy.shape[-1], 0 if x is None else x.shape[-1]


def library_backward(
    dy: Matrix,
    x: Matrix | None,
    weight: Matrix | None,
    active: Rows,
    dx: Matrix | None,
    dw: Matrix | None,
    db: Matrix | None,
    options: LinearOptions | None = None,
) -> None:
    """Fill those of dX, dW and db that are there.

    Parameters
    ----------
    dy : Matrix, M x N
    x : Matrix, M x K, or None where dW is not wanted
    weight : Matrix, N x K, or None where dX is not wanted
    active : Rows
        Of M.
    dx : Matrix, M x K, or None
    dw : Matrix, N x K, or None
    db : Matrix, 1 x N, or None
    options : LinearOptions, optional
    """
    context = context_of(dy.memory, *(one.memory for one in (x, weight) if one is not None))
    context.call("sebp_linear_backward", dy, x, weight, active, options, dx, dw, db)


def _library_backward_transposed(
    dy: Matrix,
    x: Matrix | None,
    weight: Matrix | None,
    active: Rows,
    dx: Matrix | None,
    dw: Matrix | None,
    db: Matrix | None,
    options: LinearOptions | None,
) -> None:
    """As :func:`library_backward` for W: K x N. In dW X and dY change places, in dX W and W^T."""
    if dx is not None:
        context = context_of(dy.memory, weight.memory)
        context.call("sebp_linear_forward", dy, weight, None, active, options, dx)
    if db is not None:
        library_backward(dy, None, None, active, None, None, db, options)
    if dw is not None:
        library_backward(x, dy, None, active, None, dw, None, options)


def _dense_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    transposed: bool,
    dx_dtype: torch.dtype | None,
    dw_dtype: torch.dtype | None,
    db_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute by PyTorch what the library does not take, in dY's dtype, with all rows active."""
    dy2 = dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1])
    dx = dw = db = None
    if dx_dtype is not None:
        w = (weight.t() if transposed else weight).to(dy.dtype)
        dx = (dy2 @ w).view((*dy.shape[:-1], w.shape[1])).to(dx_dtype)
    if dw_dtype is not None:
        x2 = x.reshape(dy2.shape[0], x.shape[-1]).to(dy.dtype)
        dw = (x2.t() @ dy2 if transposed else dy2.t() @ x2).to(dw_dtype)
    if db_dtype is not None:
        db = dy2.sum(0).to(db_dtype)
    return dx, dw, db
