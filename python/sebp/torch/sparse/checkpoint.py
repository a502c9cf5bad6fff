# SPDX-License-Identifier: Apache-2.0
"""The parts of a checkpoint of SparseGrad and MeProp, to and from what PyTorch saves."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ...sparse import Basis, BasisSums, Moments, SparseAdamW, Sums
from .settings import Kind, Settings, check_k, check_rank


def tensors_of(copy: tuple) -> dict[str, object]:
    """Return a copied state as PyTorch saves it: arrays as tensors, by name."""
    return {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in copy._asdict().items()
    }


def arrays_of(saved: dict[str, object]) -> dict[str, object]:
    """Undo :func:`tensors_of`."""
    return {
        name: value.numpy() if isinstance(value, Tensor) else value for name, value in saved.items()
    }


def load_sums(kind: Kind, saved: Mapping[str, dict], settings: Settings) -> BasisSums:
    """Make a kind's sums from a checkpoint; raise unless its bases can be computed from them."""
    rank = settings.rank or kind.shape
    check_rank(kind, rank, settings.basis_steps)
    check_k(settings.k, kind, rank)
    sums = BasisSums(*kind.shape)
    sums.set_sums(Sums(**arrays_of(saved[kind.name])))
    return sums


def load_basis(kind: Kind, saved: Mapping[str, dict]) -> tuple[Basis, tuple[float, float]]:
    """Make a kind's basis from a checkpoint, with the shares of energy."""
    arrays = arrays_of(saved[kind.name])
    basis = Basis.from_vectors(arrays["u_out"], arrays["u_in"])
    if basis.shape != kind.shape:
        raise ValueError(
            f"the checkpoint's basis of {kind.name} is of {basis.shape}, not {kind.shape}"
        )
    return basis, tuple(arrays["shares"])


def load_moments(
    kind: Kind, basis: Basis | None, saved: Mapping[str, dict], settings: Settings
) -> dict[str, SparseAdamW]:
    """Make the moments of a kind's layers from a checkpoint; raise unless they suit k."""
    shape = kind.shape if basis is None else basis.rank
    check_k(settings.k, kind, shape)
    moments = {}
    for name in kind.layers:
        arrays = arrays_of(saved[name])
        is_fixed = arrays.pop("is_fixed")
        one = SparseAdamW(shape, arrays["indices"] if is_fixed else None)
        one.set_moments(Moments(**arrays))
        if one.count < settings.k and one.steps > 0 or is_fixed and one.count != settings.k:
            raise ValueError(
                f"the checkpoint has moments of {one.count} elements of {name}, but k is"
                f" {settings.k}"
            )
        moments[name] = one
    return moments
