# SPDX-License-Identifier: Apache-2.0
"""The linear layer on NumPy arrays."""

import ctypes

from .._rules import RowRule, Rule, parse_rule
from .._structs import LinearOptions
from .context import Context, default_context
from .matrices import Array, as_matrix, as_vector, new_array
from .rows import Rows


def linear_forward(
    x: Array,
    w: Array,
    bias: Array | None = None,
    rows: Rows | None = None,
    *,
    x_is_compact: bool = False,
    context: Context | None = None,
) -> Array:
    """Compute Y = X W^T + b on the active rows; the others are zero.

    Parameters
    ----------
    x : array, M x K
        m x K with `x_is_compact`.
    w : array, N x K
        Of X's dtype.
    bias : array, N, optional
        Either dtype.
    rows : Rows, optional
        The active rows. Default: all.
    x_is_compact : bool
        Whether the i-th row of `x` is the i-th active row.
    context : Context, optional
        Default: the calling thread's own.

    Returns
    -------
    array, M x N
        Y, of X's dtype.

    Raises
    ------
    TypeError
        If an array is neither float32 nor uint16.
    ValueError
        If an array has the wrong number of dimensions.
    SebpError
        If shapes, dtypes or rows do not go together.
    """
    context = context or default_context()
    vx, vw, vb = as_matrix(x, "x"), as_matrix(w, "w"), as_vector(bias, "bias")
    total = rows.total if x_is_compact and rows is not None else vx.rows
    y = new_array((total, vw.rows), like=vx)
    options = LinearOptions(ctypes.sizeof(LinearOptions), x_is_compact=x_is_compact)
    context.call("sebp_linear_forward", vx, vw, vb, rows, options, as_matrix(y, "y"))
    return y


def linear_backward(
    dy: Array,
    x: Array | None = None,
    w: Array | None = None,
    rows: Rows | RowRule = "nonzero",
    *,
    bias: bool = True,
    x_is_compact: bool = False,
    seed: int = 0,
    context: Context | None = None,
) -> tuple[Array | None, Array | None, Array | None]:
    """Compute dX, dW and db from dY on the active rows alone.

    Parameters
    ----------
    dy : array, M x N
        The gradient of Y.
    x : array, M x K, optional
        m x K with `x_is_compact`. Without it there is no dW.
    w : array, N x K, optional
        Without it there is no dX.
    rows : Rows, or "nonzero", int, ("threshold", float), ("energy", float), ("sampled", float)
        The active rows, or the rule that finds them in `dy`. Of a weighted sample dW and db are
        unbiased, and dX, for which `rows` is the rule, is exact.
    bias : bool
        Whether db is wanted.
    x_is_compact : bool
        Whether the i-th row of `x` is the i-th row of `rows`, which is a :class:`Rows` then.
    seed : int
        Of a sample, in [0, 2^64).
    context : Context, optional
        Default: the calling thread's own.

    Returns
    -------
    dx : array, M x K, or None
        Zero outside the active rows.
    dw : array, N x K, or None
    db : array, N, or None
        All of dY's dtype.

    Raises
    ------
    TypeError
        If an array is neither float32 nor uint16.
    ValueError
        If an array has the wrong number of dimensions, or for the rule.
    SebpError
        If shapes, dtypes or rows do not go together.
    """
    context = context or default_context()
    rule = Rule() if isinstance(rows, Rows) else parse_rule(rows)
    given = rows if isinstance(rows, Rows) else None
    vdy = as_matrix(dy, "dy")
    vx = vw = vdx = vdw = vdb = dx = dw = db = None
    if x is not None:
        vx = as_matrix(x, "x")
        dw = new_array((vdy.cols, vx.cols), like=vdy)
        vdw = as_matrix(dw, "dw")
    if w is not None:
        vw = as_matrix(w, "w")
        dx = new_array((vdy.rows, vw.cols), like=vdy)
        vdx = as_matrix(dx, "dx")
    if bias:
        db = new_array(vdy.cols, like=vdy)
        vdb = as_vector(db, "db")
    options = LinearOptions(
        ctypes.sizeof(LinearOptions), rule.struct(seed), x_is_compact=x_is_compact
    )
    context.call("sebp_linear_backward", vdy, vx, vw, given, options, vdx, vdw, vdb)
    return dx, dw, db
