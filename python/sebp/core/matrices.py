# SPDX-License-Identifier: Apache-2.0
"""NumPy arrays as the library's matrices."""

import ctypes

import numpy as np
from numpy.typing import NDArray

from .._structs import BF16, F32, Matrix

Array = NDArray[np.float32] | NDArray[np.uint16]
# Functions that take this are given a matrix by those who have other arrays than NumPy's.
ArrayOrMatrix = Array | Matrix


def as_matrix(array: ArrayOrMatrix, name: str) -> Matrix:
    """Describe an array to the library, copied if its elements lie apart.

    Parameters
    ----------
    array : array or Matrix, M x K
        float32, or uint16 that holds bfloat16. A matrix is returned as it is.
    name : str
        The array's name, for messages.

    Returns
    -------
    Matrix
        It keeps the memory alive.

    Raises
    ------
    TypeError
        If the array is neither float32 nor uint16.
    ValueError
        If the array is not 2-D.
    """
    if isinstance(array, Matrix):
        return array
    array = np.asarray(array)
    if array.dtype not in (np.float32, np.uint16):
        raise TypeError(f"{name} is {array.dtype}, not float32 or uint16 (bfloat16)")
    if array.ndim != 2:
        raise ValueError(f"{name} has {array.ndim} dimensions, not 2")
    rows, cols = array.shape
    step, size = array.strides[0], array.itemsize
    if rows > 1 and cols > 0:
        gaps = step % size or step < cols * size
    else:
        step, gaps = cols * size, False
    is_copy = bool(gaps or (cols > 1 and array.strides[1] != size) or not array.flags.aligned)
    if is_copy:
        array = np.ascontiguousarray(array)
        step = cols * size
    dtype = F32 if array.dtype == np.float32 else BF16
    matrix = Matrix(array.ctypes.data, rows, cols, max(step // size, cols), dtype)
    matrix.memory, matrix.is_copy = array, is_copy
    return matrix


def as_vector(array: Array | None, name: str) -> Matrix | None:
    """Describe an array of one dimension, or of one row; None stays None."""
    if array is None:
        return None
    array = np.asarray(array)
    return as_matrix(array[None, :] if array.ndim == 1 else array, name)


def as_target(array: ArrayOrMatrix, name: str) -> Matrix:
    """Describe an array that the library writes to.

    Parameters
    ----------
    array : array or Matrix, M x K
        As :func:`as_matrix` takes it.
    name : str
        The array's name, for messages.

    Raises
    ------
    TypeError
        If the array is neither float32 nor uint16.
    ValueError
        If the array is not 2-D, or cannot be written to in place.
    """
    matrix = as_matrix(array, name)
    if isinstance(array, Matrix):
        is_in_place = not array.is_copy
    else:
        is_in_place = matrix.memory is array and array.flags.writeable
    if not is_in_place:
        raise ValueError(f"{name} is not an array that can be written to row by row")
    return matrix


def new_array(shape: int | tuple[int, int], like: Matrix) -> Array:
    """Make an array of a matrix's dtype, its elements not set."""
    return np.empty(shape, np.float32 if like.dtype == F32 else np.uint16)


def copy_of(matrix: Matrix) -> NDArray[np.float32]:
    """Copy a float32 matrix that the library holds."""
    floats = (ctypes.c_float * (matrix.rows * matrix.stride)).from_address(matrix.data)
    whole = np.frombuffer(floats, np.float32).reshape(matrix.rows, matrix.stride)
    return whole[:, : matrix.cols].copy()
