# SPDX-License-Identifier: Apache-2.0
"""The products of a linear layer's forward and backward, by the library or by PyTorch."""

import ctypes
import math
import time

import torch
from torch import Tensor
from torch.nn import functional

from .._rules import Rule
from .._structs import ACCUMULATE, F32, LinearOptions, Matrix
from ..core import Rows
from .context import thread_context
from .rows import find_rows
from .tensors import DTYPES, is_ours, matrix_of, matrix_of_size
from .work import LayerKind, count_work

# --------------------------------------------------------------------------------------------------
# Forward


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Compute Y = X W^T + b, or X W + b.

    Parameters
    ----------
    x : Tensor, ... x K
    weight : Tensor, N x K, or K x N if `transposed`
    bias : Tensor, N, or None
    transposed : bool

    Returns
    -------
    Tensor, ... x N
        Y. It is no view: what follows may change it in place.
    """
    shape = (*x.shape[:-1], weight.shape[1 if transposed else 0])
    # PyTorch has oneDNN's product in bfloat16 too; in float32 it has MKL's, which on AMD's CPUs
    # takes twice as long.
    if is_ours(x, weight, bias) and x.dtype == torch.float32:
        y = x.new_empty(shape)
        if transposed:
            _library_forward_transposed(x, weight, bias, y)
        else:
            _library_forward(x, weight, bias, y)
        return y
    w = _laid_out(weight)
    y = functional.linear(_laid_out(_flat(x)), w.t() if transposed else w, bias)
    return torch.ops.aten._unsafe_view.default(y, shape)


def _library_forward(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Fill Y: ... x N, of float32, just made."""
    n, k = weight.shape
    m = math.prod(x.shape[:-1])
    thread_context().call(
        "sebp_linear_forward",
        matrix_of_size(x, m, k, F32),
        matrix_of_size(weight, n, k, F32),
        None if bias is None else matrix_of_size(bias, 1, n, F32),
        None,
        None,
        Matrix(y.data_ptr(), m, n, n, F32),
    )


def _library_forward_transposed(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """As :func:`_library_forward` for W: K x N."""
    context, vx, vw, vy = thread_context(), matrix_of(x), matrix_of(weight), matrix_of(y)
    # X W is what the backward computes as dX = dY W; it is added to b.
    options = LinearOptions(ctypes.sizeof(LinearOptions))
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
    if matrix.dtype != torch.bfloat16 or matrix.t().is_contiguous():
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
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute dX, dW and db on the active rows.

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
    need_dx, need_dw, need_db : bool

    Returns
    -------
    dx : Tensor, ... x K
    dw : Tensor, of the weight's shape
    db : Tensor, N
        None where it is not needed.
    """
    if not is_ours(dy, x, weight):
        return _dense_backward(dy, x, weight, transposed, need_dx, need_dw, need_db)
    start = time.perf_counter()
    n, k = sizes(dy, x, weight, transposed)
    w_rows, w_cols = (k, n) if transposed else (n, k)
    *lead, _ = dy.shape
    m, dtype = math.prod(lead), DTYPES[dy.dtype]
    vdy = matrix_of_size(dy, m, n, dtype)
    active = find_rows(vdy, rule)
    dx = dw = db = vx = vw = vdx = vdw = vdb = None
    if need_dx:
        dx = dy.new_empty((*lead, k))
        vw = matrix_of_size(weight, w_rows, w_cols, dtype)
        vdx = Matrix(dx.data_ptr(), m, k, k, dtype)
    if need_dw:
        dw = dy.new_empty((w_rows, w_cols))
        vx = matrix_of_size(x, m, k, dtype)
        vdw = Matrix(dw.data_ptr(), w_rows, w_cols, w_cols, dtype)
    if need_db:
        db = dy.new_empty(n)
        vdb = Matrix(db.data_ptr(), 1, n, n, dtype)
    run = _library_backward_transposed if transposed else library_backward
    run(vdy, vx, vw, active, vdx, vdw, vdb)
    count_work(
        LayerKind(n, k, dy.dtype, need_dx, need_dw),
        total,
        len(active),
        time.perf_counter() - start,
    )
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
    """
    thread_context().call("sebp_linear_backward", dy, x, weight, active, None, dx, dw, db)


def _library_backward_transposed(
    dy: Matrix,
    x: Matrix | None,
    weight: Matrix | None,
    active: Rows,
    dx: Matrix | None,
    dw: Matrix | None,
    db: Matrix | None,
) -> None:
    """As :func:`library_backward` for W: K x N. In dW X and dY change places, in dX W and W^T."""
    if dx is not None:
        thread_context().call("sebp_linear_forward", dy, weight, None, active, None, dx)
    if db is not None:
        library_backward(dy, None, None, active, None, None, db)
    if dw is not None:
        library_backward(x, dy, None, active, None, dw, None)


def _dense_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    transposed: bool,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute by PyTorch what the library does not take, with all rows active."""
    dy2 = dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1])
    dx = dw = db = None
    if need_dx:
        w = weight.t() if transposed else weight
        dx = (dy2 @ w).view((*dy.shape[:-1], w.shape[1]))
    if need_dw:
        x2 = x.reshape(dy2.shape[0], x.shape[-1])
        dw = x2.t() @ dy2 if transposed else dy2.t() @ x2
    if need_db:
        db = dy2.sum(0)
    return dx, dw, db
