# SPDX-License-Identifier: Apache-2.0
"""The settings of SparseGrad, MeProp and GaLore: kinds of layers, k, phases and ranks."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ...sparse import Basis, BasisSums

UNKNOWN_SHARES = (float("nan"), float("nan"))


class Settings(NamedTuple):
    """The settings of a run, without layers and bases. A checkpoint has its own.

    Those with a default may be missing in a checkpoint that is older than they are.
    """

    k: int | None  # None: each layer's mask has a number of its own
    basis_steps: int  # 0: there is no basis phase
    rank: tuple[int, int] | None
    fix_support_after: int | None
    accumulate: bool
    basis_rate_factor: float | None = 1.0  # None: equal_length_factor()
    measure_energy_every: int | None = None
    refresh_every: int | None = None  # of GaLore, as is scale
    scale: float = 1.0
    rounding: str = "nearest"
    seed: int = 0
    drop_after: int | None = None

    def checked(self) -> "Settings":
        """Return them in their own types; raise TypeError or ValueError for bad ones."""
        return Settings(
            k=None if self.k is None else as_integer("k", self.k),
            basis_steps=as_integer("basis_steps", self.basis_steps),
            rank=check_pair(self.rank),
            fix_support_after=check_steps("fix_support_after", self.fix_support_after),
            accumulate=bool(self.accumulate),
            basis_rate_factor=check_factor("basis_rate_factor", self.basis_rate_factor),
            measure_energy_every=check_steps("measure_energy_every", self.measure_energy_every),
            refresh_every=check_steps("refresh_every", self.refresh_every),
            scale=check_factor("scale", self.scale),
            rounding=_check_rounding(self.rounding),
            seed=_check_seed(self.seed),
            drop_after=check_steps("drop_after", self.drop_after),
        )


@dataclass
class Kind:
    """Layers at the same place of each block, which share a basis.

    Attributes
    ----------
    name : str
        The layers' names with "*" for numbers, and `shape`: "layer.*.output.dense 768x3072".
    shape : (int, int)
        Of their weights: N x K; of a ``Conv1D`` K x N.
    layers : list of str
        Their names.
    basis : Basis or None
        None during the basis phase, and for MeProp.
    shares : (float, float)
        The shares of the energy of the gradients seen that lie in u_out and u_in, each side by
        itself; NaN where not known.
    block_shares : dict of int to float
        The share of the energy that lies in both, ||u_out G u_in^T||^2 / ||G||^2, by the step of
        whose gradients it was measured: the last one of the basis phase, and later ones with
        ``measure_energy_every``. Not measured with all vectors, which hold all.
    """

    name: str
    shape: tuple[int, int]
    layers: list[str] = field(default_factory=list)
    basis: Basis | None = None
    shares: tuple[float, float] = UNKNOWN_SHARES
    block_shares: dict[int, float] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether the basis has all vectors, of both sides, and so all of the energy."""
        return self.basis is not None and self.basis.rank == self.shape


def as_integer(name: str, value: object) -> int:
    """Return an integer; raise TypeError for anything else."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}, not an integer")
    return operator.index(value)


def equal_length_factor(k: int, shape: tuple[int, int]) -> float:
    """Return what makes a full step as long as one on k elements.

    Adam moves an element by about the learning rate. So the norm of a step on n elements is the
    rate times sqrt(n), in any orthonormal basis.
    """
    return math.sqrt(k / (shape[0] * shape[1]))


def check_factor(name: str, value: float | None) -> float | None:
    """Return a finite number >= 0, or None; raise TypeError or ValueError for others."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}, not a number")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}, not a finite number of 0 or more")
    return float(value)


def _check_rounding(value: str) -> str:
    if value not in ("nearest", "stochastic"):
        raise ValueError(f'rounding is {value!r}, not "nearest" or "stochastic"')
    return value


def _check_seed(value: int) -> int:
    seed = as_integer("seed", value)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, not from 0 to 2^64 - 1")
    return seed


def check_k(k: int, kind: Kind, shape: tuple[int, int]) -> None:
    """Raise TypeError or ValueError unless there are k elements to choose among."""
    k = as_integer("k", k)
    if not 1 <= k <= shape[0] * shape[1]:
        raise ValueError(f"k is {k}, but {kind.name} has 1 to {shape[0] * shape[1]} elements")


def check_steps(name: str, value: int | None) -> int | None:
    """Return a number of steps, 1 or more, or None; raise TypeError or ValueError for others."""
    if value is None:
        return None
    steps = as_integer(name, value)
    if steps < 1:
        raise ValueError(f"{name} is {steps}, not 1 or more")
    return steps


def check_pair(rank: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Return one rank or two as two, or None; raise TypeError or ValueError for others."""
    if rank is None:
        return None
    pair = tuple(rank) if isinstance(rank, Sequence) else (rank, rank)
    if len(pair) != 2:
        raise ValueError(f"rank is {rank!r}, not one number or two")
    return tuple(as_integer("rank", r) for r in pair)


def check_projection(kind: Kind, settings: Settings) -> None:
    """Raise unless GaLore can project the gradients of a kind as the settings say."""
    rank, most = settings.rank, min(kind.shape)
    if rank is None or rank[0] != rank[1] or not 1 <= rank[0] <= most:
        raise ValueError(f"rank is {rank and rank[0]}, but {kind.name} has 1 to {most} directions")
    if settings.refresh_every is None or settings.scale is None:
        raise ValueError("refresh_every or scale is None")


def check_lapack() -> None:
    """Raise SebpError if the library has no LAPACK: now, not after the basis phase."""
    sums = BasisSums(1, 1)
    sums.add(np.ones((1, 1), np.float32))
    sums.solve(1, 1)


def check_rank(kind: Kind, rank: tuple[int, int], basis_steps: int) -> None:
    """Raise ValueError unless the gradients of the basis phase span so many directions."""
    for size, r in zip(kind.shape, rank, strict=True):
        if not 1 <= r <= size:
            raise ValueError(f"rank is {r}, but {kind.name} has 1 to {size} directions")
        if r > basis_steps * len(kind.layers) * min(kind.shape):
            raise ValueError(
                f"{basis_steps} gradients of {len(kind.layers)} layers do not span {r} directions"
                f" of {kind.name}"
            )
