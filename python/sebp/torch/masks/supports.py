# SPDX-License-Identifier: Apache-2.0
"""Which elements of a weight a fixed mask trains: drawn, the largest of a matrix, or given."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ...core import SebpError
from ...sparse import SparseAdamW, top_elements
from ..common.context import thread_context
from ..common.tensors import matrix_of

MASKS = ("random", "gradient", "magnitude")
OWN = "own"

OwnMasks = Mapping[str, ArrayLike | Tensor]


def random_support(name: str, shape: tuple[int, int], k: int, seed: int) -> NDArray[np.int64]:
    """Draw k elements of a weight, all sets of k equally likely.

    The draw depends on the seed and the layer's name, and on no other layer.

    Parameters
    ----------
    name : str
        The layer's.
    shape : (int, int)
        The weight's.
    k : int
        From 1 to the number of its elements.
    seed : int
        0 or more.

    Returns
    -------
    int64 array, k
        row * columns + column, ascending.
    """
    numbers = np.random.default_rng([seed, *name.encode()])
    drawn = numbers.choice(shape[0] * shape[1], k, replace=False, shuffle=False)
    return np.sort(drawn).astype(np.int64)


def magnitude_support(name: str, weight: Tensor, k: int) -> NDArray[np.int64]:
    """Choose the k elements of largest magnitude of a weight, of equal ones the first.

    Raises
    ------
    SebpError
        If the weight holds a NaN or Inf.
    """
    try:
        return top_elements(matrix_of(weight.detach().float()), k, thread_context()).indices
    except SebpError as error:
        raise SebpError(error.status, f"{name}: its weight: {error}") from None


def own_supports(
    masks: OwnMasks, chosen: list[tuple[str, nn.Module]], k: int | None
) -> dict[str, NDArray[np.int64]]:
    """Check the user's masks, and make lists of them.

    Parameters
    ----------
    masks : mapping of str to array or Tensor
        By a layer's name: bool, of its weight's shape; or integers, k ascending indices.
    chosen : list of (str, nn.Module)
        The layers to train.
    k : int, optional
        How many elements each is to have.

    Returns
    -------
    dict of str to int64 array

    Raises
    ------
    TypeError
        If a mask is neither of bool nor of integers.
    ValueError
        If a layer has no mask, or a mask no layer; if a mask is of another shape or number, empty,
        or not on the CPU.
    SebpError
        If indices are out of range, unsorted or repeated.
    """
    names = {name for name, _ in chosen}
    if missing := [name for name in names if name not in masks]:
        raise ValueError(f"there is no mask for {sorted(missing)[0]}")
    if others := [name for name in masks if name not in names]:
        raise ValueError(f"there is a mask for {others[0]!r}, which is none of the layers to train")
    supports = {}
    for name, module in chosen:
        shape = tuple(module.weight.shape)
        support = _support_of(name, masks[name], shape)
        if k is not None and support.size != k:
            raise ValueError(f"the mask of {name} has {support.size} elements, but k is {k}")
        if support.size == 0:
            raise ValueError(f"the mask of {name} is empty")
        try:
            SparseAdamW(shape, support)
        except SebpError as error:
            raise SebpError(error.status, f"the mask of {name}: {error}") from None
        supports[name] = support
    return supports


def _support_of(name: str, mask: ArrayLike | Tensor, shape: tuple[int, int]) -> NDArray[np.int64]:
    """Return a mask as indices, which may be out of range, unsorted or repeated."""
    if isinstance(mask, Tensor):
        if not mask.is_cpu:
            raise ValueError(f"the mask of {name} is on {mask.device}, its weight on the CPU")
        if mask.dtype == torch.bfloat16:  # which NumPy has not
            raise TypeError(f"the mask of {name} is of {mask.dtype}, not of bool or integers")
        mask = mask.detach().numpy()
    array = np.asarray(mask)
    if array.dtype == np.bool_:
        if array.shape != shape:
            raise ValueError(f"the mask of {name} is of {array.shape}, its weight of {shape}")
        return np.flatnonzero(array).astype(np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"the mask of {name} is of {array.dtype}, not of bool or integers")
    if array.ndim != 1:
        raise ValueError(f"the mask of {name} is of integers of shape {array.shape}, not a list")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"the mask of {name} has an index of {array.max()}")
    return np.ascontiguousarray(array, np.int64)
