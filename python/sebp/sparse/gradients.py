# SPDX-License-Identifier: Apache-2.0
"""Gradients of which few elements are computed or kept: SparseGrad's and MeProp's."""

import ctypes

import numpy as np
from numpy.typing import NDArray

from .._rules import RowRule, parse_rule
from .._structs import ACCUMULATE, LinearOptions, Matrix
from ..core.context import Context, default_context
from ..core.matrices import ArrayOrMatrix, as_matrix, as_target
from ..core.rows import Rows
from .bases import Basis
from .elements import Sparse, room_for

_ROTATIONS = ("auto", "factors", "dy", "x", "out_in", "in_out")


def _options(
    rows: Rows | RowRule, x_is_compact: bool, accumulate: bool = False
) -> tuple[Rows | None, LinearOptions]:
    """Return the rows if they are given, and the options, which hold the rule if they are not."""
    options = LinearOptions(ctypes.sizeof(LinearOptions), x_is_compact=x_is_compact)
    options.dw_write = ACCUMULATE if accumulate else 0
    if isinstance(rows, Rows):
        return rows, options
    options.rule = parse_rule(rows).struct()
    return None, options


def sparsegrad_gradient(
    basis: Basis,
    dy: ArrayOrMatrix,
    x: ArrayOrMatrix,
    rows: Rows | RowRule = "nonzero",
    *,
    x_is_compact: bool = False,
    rotation: str = "auto",
    out: NDArray[np.float32] | Matrix | None = None,
    accumulate: bool = False,
    context: Context | None = None,
) -> NDArray[np.float32] | Matrix:
    """Compute R = u_out (dY^T X) u_in^T on the active rows.

    Parameters
    ----------
    basis : Basis
        Of N x K.
    dy : array or Matrix, M x N
    x : array or Matrix, M x K
        m x K with `x_is_compact`. Of dY's dtype.
    rows : Rows, or "nonzero", int, ("threshold", float), ("energy", float)
        The active rows, or the rule that finds them in `dy`.
    x_is_compact : bool
        Whether the i-th row of `x` is the i-th row of `rows`, which is a :class:`~sebp.Rows` then.
    rotation : {"auto", "factors", "dy", "x", "out_in", "in_out"}
        The order of the products: the cheapest, or one to try.
    out : float32 array or Matrix, r_out x r_in, optional
        Where R is put.
    accumulate : bool
        Add to what `out` holds.
    context : Context, optional
        Default: the calling thread's own.

    Returns
    -------
    float32 array, r_out x r_in
        R, or `out` where it is given.

    Raises
    ------
    SebpError
        If shapes, dtypes or rows do not go together.
    ValueError
        If `rotation` is not in its list, `out` cannot be written to in place, or for the rule.
    """
    context = context or default_context()
    if out is None:
        out = np.zeros(basis.rank, np.float32)
    v_dy, v_x = as_matrix(dy, "dy"), as_matrix(x, "x")
    given, options = _options(rows, x_is_compact, accumulate)
    order, v_out = _ROTATIONS.index(rotation), as_target(out, "out")
    context.call("sebp_sparsegrad_gradient", basis, v_dy, v_x, given, options, order, v_out)
    return out


def sparsegrad_kept(
    basis: Basis,
    dy: ArrayOrMatrix,
    x: ArrayOrMatrix,
    indices: NDArray[np.int64],
    rows: Rows | RowRule = "nonzero",
    *,
    x_is_compact: bool = False,
    rotation: str = "auto",
    out: NDArray[np.float32] | None = None,
    accumulate: bool = False,
    context: Context | None = None,
) -> Sparse:
    """Compute chosen elements of R = u_out (dY^T X) u_in^T on the active rows.

    Parameters
    ----------
    basis, dy, x, rows, x_is_compact, rotation, context
        As for :func:`sparsegrad_gradient`.
    indices : int64 array, k
        row * cols + col in R, r_out x r_in, ascending, each once.
    out, accumulate
        As for :func:`sampled_product`.

    Returns
    -------
    Sparse, r_out x r_in
        Of `indices`, and of `out` where it is given: no copies.

    Raises
    ------
    SebpError, TypeError, ValueError
        As for :func:`sparsegrad_gradient` and :func:`sampled_product`.
    """
    context = context or default_context()
    v_dy, v_x = as_matrix(dy, "dy"), as_matrix(x, "x")
    given, options = _options(rows, x_is_compact, accumulate)
    values = np.zeros(indices.shape, np.float32) if out is None else out
    kept = Sparse(indices, values, basis.rank)
    order, written = _ROTATIONS.index(rotation), kept.struct(is_written=True)
    context.call("sebp_sparsegrad_kept", basis, v_dy, v_x, given, options, order, written)
    return kept


def meprop_gradient(
    dy: ArrayOrMatrix,
    x: ArrayOrMatrix,
    k: int,
    rows: Rows | RowRule = "nonzero",
    *,
    x_is_compact: bool = False,
    context: Context | None = None,
) -> Sparse:
    """Compute the k elements of largest magnitude of dW = dY^T X, which is never held whole.

    Parameters
    ----------
    dy : array or Matrix, M x N
    x : array or Matrix, M x K
        m x K with `x_is_compact`. Of dY's dtype.
    k : int
        From 1 to N K.
    rows, x_is_compact, context
        As for :func:`sparsegrad_gradient`.

    Returns
    -------
    Sparse, N x K

    Raises
    ------
    SebpError
        If shapes, dtypes or rows do not go together, `k` is out of range, or dW holds a NaN or Inf.
    """
    context = context or default_context()
    v_dy, v_x = as_matrix(dy, "dy"), as_matrix(x, "x")
    given, options = _options(rows, x_is_compact)
    kept = room_for(k, (v_dy.cols, v_x.cols))
    context.call("sebp_meprop_gradient", v_dy, v_x, given, options, kept.struct())
    return kept


def sampled_product(
    dy: ArrayOrMatrix,
    x: ArrayOrMatrix,
    indices: NDArray[np.int64],
    rows: Rows | RowRule = "nonzero",
    *,
    x_is_compact: bool = False,
    out: NDArray[np.float32] | None = None,
    accumulate: bool = False,
    context: Context | None = None,
) -> Sparse:
    """Compute chosen elements of dW = dY^T X on the active rows, without the others.

    Parameters
    ----------
    dy : array or Matrix, M x N
    x : array or Matrix, M x K
        m x K with `x_is_compact`. Of dY's dtype.
    indices : int64 array, k
        row * cols + col in dW, N x K, ascending, each once.
    rows, x_is_compact, context
        As for :func:`sparsegrad_gradient`.
    out : float32 array, k, optional
        Where the values are put.
    accumulate : bool
        Add to what `out` holds.

    Returns
    -------
    Sparse, N x K
        Of `indices`, and of `out` where it is given: no copies.

    Raises
    ------
    SebpError
        If shapes, dtypes or rows do not go together, indices are out of range, unsorted or
        repeated, or one of the elements is, or becomes, a NaN or Inf. `out` is as it was then.
    TypeError, ValueError
        If the arrays are not as :meth:`Sparse.struct` takes them, to write to the values.
    """
    context = context or default_context()
    v_dy, v_x = as_matrix(dy, "dy"), as_matrix(x, "x")
    given, options = _options(rows, x_is_compact, accumulate)
    values = np.zeros(indices.shape, np.float32) if out is None else out
    kept = Sparse(indices, values, (v_dy.cols, v_x.cols))
    written = kept.struct(is_written=True)
    context.call("sebp_sampled_product", v_dy, v_x, given, options, written)
    return kept
