# SPDX-License-Identifier: Apache-2.0
"""The parts of a checkpoint of sparse layers, to and from what PyTorch saves."""

from collections.abc import Mapping, Sequence

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


def settings_of(
    saved: Mapping[str, object], method: str, kinds: Sequence[Kind], settings: Settings
) -> Settings:
    """Return the settings to go on with; raise ValueError if the checkpoint is of another run."""
    known = {**Settings._field_defaults, **saved["settings"]}
    theirs = Settings(**{name: known[name] for name in Settings._fields})
    layers = {kind.name: list(kind.layers) for kind in kinds}
    if (saved["method"], saved["kinds"], theirs.k) != (method, layers, settings.k):
        raise ValueError(
            f"the checkpoint is of {saved['method']}, other layers, or another k; this is"
            f" {method} with {sum(map(len, layers.values()))} layers and k={settings.k}"
        )
    return theirs._replace(accumulate=theirs.accumulate or settings.accumulate).checked()


def load_sums(kind: Kind, saved: Mapping[str, dict], settings: Settings) -> BasisSums:
    """Make a kind's sums from a checkpoint; raise unless its bases can be computed from them."""
    rank = settings.rank or kind.shape
    check_rank(kind, rank, settings.basis_steps)
    check_k(settings.k, kind, rank)
    sums = BasisSums(*kind.shape)
    sums.set_sums(Sums(**arrays_of(saved[kind.name])))
    return sums


def load_basis(kind: Kind, saved: Mapping[str, dict]) -> tuple[Basis, tuple, dict]:
    """Make a kind's basis from a checkpoint, with all shares of energy."""
    arrays = arrays_of(saved[kind.name])
    basis = Basis.from_vectors(arrays["u_out"], arrays["u_in"])
    if basis.shape != kind.shape:
        raise ValueError(
            f"the checkpoint's basis of {kind.name} is of {basis.shape}, not {kind.shape}"
        )
    shares = {int(step): float(share) for step, share in arrays.get("block_shares", {}).items()}
    return basis, tuple(arrays["shares"]), shares


def load_moments(
    name: str, kind: Kind, basis: Basis | None, saved: Mapping[str, object], settings: Settings
) -> SparseAdamW:
    """Make the moments of a kind's layer from a checkpoint; raise unless they suit k."""
    shape = kind.shape if basis is None else basis.rank
    if settings.k is not None:
        check_k(settings.k, kind, shape)
    arrays = arrays_of(saved)
    is_fixed = arrays.pop("is_fixed")
    moments = SparseAdamW(shape, arrays["indices"] if is_fixed else None)
    moments.set_moments(Moments(**arrays))
    count = moments.count
    k = count if settings.k is None else settings.k
    if count < k and moments.steps > 0 or is_fixed and count != k:
        raise ValueError(f"the checkpoint has moments of {count} elements of {name}, but k is {k}")
    return moments
