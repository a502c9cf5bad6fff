# SPDX-License-Identifier: Apache-2.0
"""The few elements of a matrix that are kept, and how they are chosen."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._structs import Matrix, SparseStruct
from ..core.context import Context, default_context
from ..core.matrices import ArrayOrMatrix, as_matrix, as_target


class Sparse(NamedTuple):
    """The few elements of a matrix that are kept; the others are zero.

    Attributes
    ----------
    indices : int64 array, k
        row * cols + col, ascending.
    values : float32 array, k
    shape : (int, int)
        Rows and columns of the matrix.
    """

    indices: NDArray[np.int64]
    values: NDArray[np.float32]
    shape: tuple[int, int]

    def struct(self, *, is_written: bool = False) -> SparseStruct:
        """Describe it to the library, which reads its arrays in place.

        Parameters
        ----------
        is_written : bool, default False
            Whether the library writes the values, too.

        Raises
        ------
        TypeError
            If the arrays are not of int64 and float32.
        ValueError
            If they are not vectors of one length, without gaps; or if the values are written and
            cannot be.
        """
        indices, values = self.indices, self.values
        if indices.dtype != np.int64 or values.dtype != np.float32:
            raise TypeError(f"indices are {indices.dtype} and values {values.dtype}")
        if indices.ndim != 1 or indices.shape != values.shape:
            raise ValueError(f"indices have shape {indices.shape}, but values {values.shape}")
        if not (indices.flags.c_contiguous and values.flags.c_contiguous):
            raise ValueError("indices or values have gaps")
        if is_written and not values.flags.writeable:
            raise ValueError("values are not an array that can be written to")
        return SparseStruct(indices.ctypes.data, values.ctypes.data, indices.size, *self.shape)


def room_for(k: int, shape: tuple[int, int]) -> Sparse:
    """Make room for k elements, for the library to refuse a k that is out of range."""
    room = min(max(k, 0), shape[0] * shape[1] + 1)
    return Sparse(np.empty(room, np.int64), np.empty(room, np.float32), shape)


def top_elements(r: NDArray[np.float32] | Matrix, k: int, context: Context | None = None) -> Sparse:
    """Choose the k elements of largest magnitude, of equal ones those of the lowest index.

    Parameters
    ----------
    r : float32 array or Matrix, rows x cols
    k : int
        From 1 to rows * cols.
    context : Context, optional
        Default: the calling thread's own.

    Raises
    ------
    SebpError
        If `k` is out of range, or `r` holds a NaN or Inf.
    """
    context = context or default_context()
    view = as_matrix(r, "r")
    kept = room_for(k, (view.rows, view.cols))
    context.call("sebp_sparse_top", view, kept.struct())
    return kept


def take_elements(
    r: NDArray[np.float32] | Matrix, indices: NDArray[np.int64], context: Context | None = None
) -> Sparse:
    """Take elements chosen before.

    Parameters
    ----------
    r : float32 array or Matrix, rows x cols
    indices : int64 array
        row * cols + col, ascending.
    context : Context, optional
        Default: the calling thread's own.

    Raises
    ------
    SebpError
        If indices are out of range, unsorted or repeated, or one of the elements is a NaN or Inf.
    """
    context = context or default_context()
    view = as_matrix(r, "r")
    kept = Sparse(indices, np.empty(indices.shape, np.float32), (view.rows, view.cols))
    context.call("sebp_sparse_take", view, kept.struct())
    return kept


def add_elements(s: Sparse, w: ArrayOrMatrix, context: Context | None = None) -> None:
    """Add the elements of S to W, N x K, in place.

    Raises
    ------
    SebpError
        If S is not of W's shape, not valid, or holds a NaN or Inf.
    ValueError
        If `w` cannot be written to in place.
    """
    context = context or default_context()
    context.call("sebp_sparse_add", s.struct(), as_target(w, "w"))
