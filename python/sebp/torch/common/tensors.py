# SPDX-License-Identifier: Apache-2.0
"""Tensors as the library's matrices."""

import math

import torch
from torch import Tensor

from ..._structs import BF16, F32, Matrix
from .devices import are_together, cuda_version, is_reachable

DTYPES = {torch.float32: F32, torch.bfloat16: BF16}


def matrix_of(tensor: Tensor) -> Matrix:
    """Describe a tensor to the library, all its dimensions but the last in one.

    The matrix is the tensor's own memory. Only where the library could not read that row by row
    (elements of a row lie apart, rows overlap or do not lie a constant stride apart, values are
    stored negated) it is a copy, and ``is_copy`` of the matrix says so.

    Parameters
    ----------
    tensor : Tensor, ... x K
        float32 or bfloat16, on the CPU or a GPU that the library can work on, of any strides.

    Returns
    -------
    Matrix, M x K
        It keeps the memory alive.

    Raises
    ------
    TypeError
        If the tensor is of another dtype, on another device, or has no memory that can be read:
        sparse and fake tensors, for example.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None or tensor.layout != torch.strided or not is_reachable(tensor):
        raise TypeError(
            f"a tensor is of {tensor.dtype} on {tensor.device}, {tensor.layout}; not of float32 or"
            f" bfloat16 {_where()} with strides"
        )
    shape = tensor.shape
    rows, cols = math.prod(shape[:-1]), shape[-1]
    stride = cols if tensor.is_contiguous() else _row_stride(tensor, rows, cols)
    is_copy = stride is None or tensor.is_neg()
    if is_copy:
        tensor, stride = tensor.resolve_neg().contiguous(), cols
    address = tensor.data_ptr()
    if address == 0 and rows * cols > 0:
        raise TypeError(f"a {type(tensor).__name__} has no memory of its own")
    matrix = Matrix(address, rows, cols, stride, dtype)
    matrix.memory = tensor
    if is_copy:
        matrix.is_copy = True
    return matrix


def _where() -> str:
    return "on the CPU or a GPU" if cuda_version() else "on the CPU"


def new_like(tensor: Tensor) -> Tensor:
    """Make a tensor of the same shape and dtype for the library to fill.

    It is contiguous: what the library writes to has to be the tensor's own memory, and
    :func:`matrix_of` would copy one with the strides of a transposed tensor.
    """
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def by_rows(tensor: Tensor) -> Tensor:
    """Return a tensor as it is where the library can read it row by row, or else a copy.

    Autograd sees the copy, so it is made once for a forward and its backward.
    """
    *lead, cols = tensor.shape
    if tensor.is_contiguous() or _row_stride(tensor, math.prod(lead), cols) is not None:
        return tensor
    return tensor.contiguous()


def matrix_of_size(tensor: Tensor, rows: int, cols: int, dtype: int) -> Matrix:
    """Describe a tensor as :func:`matrix_of` does; faster where it is contiguous and of this size.

    Parameters
    ----------
    tensor : Tensor, ... x K
        As :func:`matrix_of` takes it.
    rows, cols : int
        The M and K that it should have.
    dtype : int
        ``DTYPES[tensor.dtype]``.

    Returns
    -------
    Matrix
        M x K, or of the size that the tensor has. It keeps the memory alive.

    Raises
    ------
    TypeError
        As :func:`matrix_of` does.
    """
    if (
        tensor.layout is torch.strided
        and tensor.shape[-1] == cols
        and tensor.numel() == rows * cols
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and (address := tensor.data_ptr()) != 0
    ):
        matrix = Matrix(address, rows, cols, cols, dtype)
        matrix.memory = tensor
        return matrix
    return matrix_of(tensor)


def _row_stride(tensor: Tensor, rows: int, cols: int) -> int | None:
    """Return the stride between a tensor's rows, or None where there is none that serves."""
    *strides, step = tensor.stride()
    if cols > 1 and step != 1:
        return None
    if rows == 1:
        return cols
    stride = following = None
    for size, step in zip(reversed(tensor.shape[:-1]), reversed(strides), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != following:
            return None
        following = size * step
    return stride if stride >= cols else None


def is_ours(*tensors: Tensor | None) -> bool:
    """Return whether the library can work with these: each float32 or bfloat16, in one place."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            return False
    return are_together(*tensors)
