# SPDX-License-Identifier: Apache-2.0
"""Elements of a weight, read and written bit for bit, and the digest of a whole weight."""

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def _bits_of(tensor: Tensor) -> NDArray[np.integer]:
    """Return a tensor's memory as integers; NumPy has no bfloat16."""
    return tensor.detach().view(_INTEGERS[tensor.dtype]).numpy().reshape(-1)


def elements_of(weight: Tensor, indices: NDArray[np.int64]) -> Tensor:
    """Copy elements of a weight.

    Parameters
    ----------
    weight : Tensor, N x K
        float32 or bfloat16, on the CPU, contiguous.
    indices : int64 array, k
        row * K + column, each in range.

    Returns
    -------
    Tensor, k
        Of the weight's dtype.
    """
    return torch.from_numpy(_bits_of(weight)[indices]).view(weight.dtype)


def put_elements(weight: Tensor, indices: NDArray[np.int64], values: Tensor) -> None:
    """Write elements of a weight.

    Parameters
    ----------
    weight : Tensor, N x K
        As :func:`elements_of` takes it.
    indices : int64 array, k
    values : Tensor, k
        Of the weight's dtype.
    """
    _bits_of(weight)[indices] = _bits_of(values)
    torch.autograd.graph.increment_version(weight)


def are_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits; -0 is not 0."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and bool((_bits_of(one) == _bits_of(other)).all())
    )


def digest_of(weight: Tensor) -> str:
    """Compute the SHA-256 of a weight: of its dtype, its shape and the bytes of its elements.

    Parameters
    ----------
    weight : Tensor, N x K
        As :func:`elements_of` takes it.

    Returns
    -------
    str
        "sha256:" and 64 digits.
    """
    rows, cols = weight.shape
    digest = hashlib.sha256(f"{weight.dtype} {rows}x{cols}\n".encode())
    digest.update(_bits_of(weight))
    return f"sha256:{digest.hexdigest()}"
