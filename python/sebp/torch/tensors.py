# SPDX-License-Identifier: Apache-2.0
"""Tensors as the library's matrices, and the calling thread's context."""

import math
import threading

import torch
from torch import Tensor

from .._rules import Rule
from .._structs import BF16, F32, Matrix
from ..core import Array, Context, Rows

DTYPES = {torch.float32: F32, torch.bfloat16: BF16}


# --------------------------------------------------------------------------------------------------
# The calling thread's context


class _OfThread(threading.local):
    """The context that all calls from one thread share."""

    context: Context | None = None
    threads = 0


_of_thread = _OfThread()


def thread_context() -> Context:
    """Give this thread's context, with as many threads as PyTorch works with.

    In a forked child it works on one thread, as the library knows that OpenMP's are gone.

    Returns
    -------
    Context
        The same at each call, until PyTorch's number of threads changes.
    """
    here = _of_thread
    threads = torch.get_num_threads()
    if here.context is None or here.threads != threads:
        here.context = Context(threads=threads)
        here.threads = threads
    return here.context


# --------------------------------------------------------------------------------------------------
# Tensors as matrices


def flat(tensor: Tensor) -> Tensor:
    """Make a tensor 2-D, all but its last dimension in one, copied only where it must be.

    Parameters
    ----------
    tensor : Tensor, ... x K
        Of any strides.

    Returns
    -------
    Tensor, M x K
        Its rows are contiguous and do not overlap; there may be gaps between them.
    """
    cols = tensor.shape[-1]
    result = tensor.reshape(math.prod(tensor.shape[:-1]), cols)
    if (result.shape[0] > 1 and result.stride(0) < cols) or (cols > 1 and result.stride(1) != 1):
        result = result.contiguous()
    return result


def array_of(tensor: Tensor) -> Array:
    """Give a tensor's memory as the library takes it from NumPy.

    Parameters
    ----------
    tensor : Tensor
        float32 or bfloat16, on the CPU.

    Returns
    -------
    array
        A view, float32, or uint16 for bfloat16.
    """
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def matrix_of(tensor: Tensor) -> Matrix:
    """Describe a tensor made by :func:`flat`, or a vector, to the library.

    Parameters
    ----------
    tensor : Tensor, M x K or K
        float32 or bfloat16, on the CPU. It must outlive what is returned.

    Returns
    -------
    Matrix
        A view of its memory.
    """
    rows, cols = tensor.shape if tensor.dim() == 2 else (1, tensor.shape[0])
    stride = max(tensor.stride(0), cols) if rows > 1 else cols
    return Matrix(tensor.data_ptr(), rows, cols, stride, DTYPES[tensor.dtype])


def is_ours(*tensors: Tensor | None) -> bool:
    """Tell whether the library can work with these: on the CPU, all float32 or all bfloat16."""
    first = tensors[0]
    return first.dtype in DTYPES and all(
        t is None or (t.dtype == first.dtype and t.device.type == "cpu") for t in tensors
    )


def find_rows(dy: Tensor, rule: Rule) -> Rows:
    """Find the active rows of dY.

    They are found in each call, from what the memory holds then. An address, a shape and a version
    counter do not tell whether it has changed: NumPy, ``.data`` and what other processes send leave
    all three as they were.

    Parameters
    ----------
    dy : Tensor, M x N
        Made by :func:`flat`.
    rule : Rule
        Which rows are active.

    Returns
    -------
    Rows
        Of M.
    """
    return Rows.find_at(matrix_of(dy), rule.struct(), thread_context())


def indices_of(rows: Rows) -> Tensor:
    """Give the indices of active rows as a tensor of int64, ascending."""
    return torch.from_numpy(rows.indices)
