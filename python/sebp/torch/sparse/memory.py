# SPDX-License-Identifier: Apache-2.0
"""The memory that training the sparse layers takes."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .layer import SparseLayer
from .settings import Kind


class SparseBytes(NamedTuple):
    """Memory for the training of the sparse layers' weights, in bytes.

    Attributes
    ----------
    gradient : int
        Of all layers, between a backward and its step.
    state : int
        The optimizer's, of all layers.
    bases : int
        One for each kind of layers; during the basis phase the sums that they are made of.
    scratch : int
        One gradient of the largest layer, overwritten by each.
    """

    gradient: int
    state: int
    bases: int
    scratch: int


def _bytes_of(tensors: Iterable[object]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def count_bytes(
    kinds: Iterable[Kind],
    layers: Iterable[SparseLayer],
    base: torch.optim.Optimizer,
    in_basis_phase: bool,
) -> SparseBytes:
    """Count it: in the basis phase what the user's optimizer has, then what the layers have."""
    layers = list(layers)
    if in_basis_phase:
        weights = [layer.weight for layer in layers]
        return SparseBytes(
            _bytes_of(weights),
            sum(_bytes_of(base.state.get(weight, {}).values()) for weight in weights),
            sum(4 * (n * n + k * k) for n, k in (kind.shape for kind in kinds)),
            0,
        )
    return SparseBytes(
        sum(layer.gradient_bytes for layer in layers),
        sum(layer.moments.bytes for layer in layers),
        sum(kind.basis.bytes for kind in kinds if kind.basis is not None),
        4 * max((layer.scratch.floats.numel() for layer in layers), default=0),
    )
