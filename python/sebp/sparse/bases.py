# SPDX-License-Identifier: Apache-2.0
"""Bases in which gradients are sparse, and the sums that they are made of."""

import ctypes
from os import PathLike, fsencode
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._library import load
from ..core.calls import Handle, call, within_int64
from ..core.context import Context, default_context
from ..core.matrices import Array, ArrayOrMatrix, as_matrix, as_target, copy_of


class Basis(Handle):
    """A pair of bases, u_out and u_in, in which gradients of N x K are sparse. Immutable.

    Made by :meth:`BasisSums.solve`, :meth:`from_vectors` and :meth:`load`.
    """

    def __init__(self, pointer: ctypes.c_void_p) -> None:
        super().__init__(pointer, "sebp_basis_destroy")

    @classmethod
    def from_vectors(cls, u_out: Array, u_in: Array) -> "Basis":
        """Make one from copies of given vectors; that they are orthonormal is not checked.

        Parameters
        ----------
        u_out : float32 array, r_out x N
            A row is a vector.
        u_in : float32 array, r_in x K

        Raises
        ------
        SebpError
            If one has no rows or more rows than columns, or holds a NaN or Inf.
        """
        pointer = ctypes.c_void_p()
        call("sebp_basis_from_vectors", as_matrix(u_out, "u_out"), as_matrix(u_in, "u_in"), pointer)
        return cls(pointer)

    @classmethod
    def load(cls, path: str | PathLike, context: Context | None = None) -> "Basis":
        """Read one from a file.

        Raises
        ------
        SebpError
            If the file cannot be read, is no basis, or is damaged.
        """
        context, pointer = context or default_context(), ctypes.c_void_p()
        context.call("sebp_basis_load", fsencode(path), pointer)
        return cls(pointer)

    def save(self, path: str | PathLike, context: Context | None = None) -> None:
        """Write it to a file. If this fails, the file is not changed.

        Raises
        ------
        SebpError
            If it cannot be written.
        """
        context = context or default_context()
        context.call("sebp_basis_save", self, fsencode(path))

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return (
            load().sebp_basis_out(self).cols,
            load().sebp_basis_in(self).cols,
        )

    @property
    def rank(self) -> tuple[int, int]:
        """r_out and r_in."""
        return (
            load().sebp_basis_out(self).rows,
            load().sebp_basis_in(self).rows,
        )

    @property
    def u_out(self) -> NDArray[np.float32]:
        """A copy of u_out: r_out x N."""
        return copy_of(load().sebp_basis_out(self))

    @property
    def u_in(self) -> NDArray[np.float32]:
        """A copy of u_in: r_in x K."""
        return copy_of(load().sebp_basis_in(self))

    @property
    def shares(self) -> tuple[float, float]:
        """The shares of the gradients' energy in u_out and u_in; NaN where not known."""
        return (
            load().sebp_basis_share_out(self),
            load().sebp_basis_share_in(self),
        )

    @property
    def bytes(self) -> int:
        """The memory its vectors take."""
        (n, k), (p, q) = self.shape, self.rank
        return 4 * (p * n + q * k)


class Sums(NamedTuple):
    """A copy of what a :class:`BasisSums` holds.

    Attributes
    ----------
    out : float32 array, N x N
        The sum of G G^T.
    into : float32 array, K x K
        The sum of G^T G.
    energy : float
        The sum of ||G||^2.
    count : int
        How many gradients were added.
    """

    out: NDArray[np.float32]
    into: NDArray[np.float32]
    energy: float
    count: int


class BasisSums(Handle):
    """The sums of G G^T and G^T G over gradients G: N x K, from which bases are made.

    Parameters
    ----------
    out_features, in_features : int
        N and K.

    Raises
    ------
    SebpError
        If one is below 1.
    MemoryError
        If there are no 4 (N^2 + K^2) bytes.
    """

    def __init__(self, out_features: int, in_features: int) -> None:
        pointer = ctypes.c_void_p()
        call("sebp_basis_sums_create", out_features, in_features, pointer)
        super().__init__(pointer, "sebp_basis_sums_destroy")
        self.shape = (out_features, in_features)

    def add(self, gradient: ArrayOrMatrix, context: Context | None = None) -> None:
        """Add a gradient, N x K.

        Raises
        ------
        SebpError
            If it has another shape, or holds a NaN or Inf; the sums are then as they were.
        """
        context = context or default_context()
        context.call("sebp_basis_sums_add", self, as_matrix(gradient, "gradient"))

    @property
    def count(self) -> int:
        """How many gradients were added."""
        return load().sebp_basis_sums_count(self)

    def sums(self) -> Sums:
        """Copy the sums."""
        energy = ctypes.c_double()
        out, into = (np.empty((size, size), np.float32) for size in self.shape)
        v_out, v_into = as_target(out, "out"), as_target(into, "into")
        call("sebp_basis_sums_export", self, energy, v_out, v_into)
        return Sums(out, into, energy.value, self.count)

    def set_sums(self, sums: Sums) -> None:
        """Replace these sums by copied ones.

        Raises
        ------
        SebpError
            If they are not of this shape, or not finite. Nothing has changed then.
        """
        v_out, v_into = as_matrix(sums.out, "out"), as_matrix(sums.into, "into")
        count = within_int64(sums.count)
        call("sebp_basis_sums_import", self, count, sums.energy, v_out, v_into)

    def solve(self, rank_out: int, rank_in: int, context: Context | None = None) -> Basis:
        """Return the leading eigenvectors of both sums.

        Parameters
        ----------
        rank_out, rank_in : int
            How many of each: in [1, N] and [1, K].
        context : Context, optional
            Default: the calling thread's own.

        Raises
        ------
        SebpError
            If a rank is out of range, there were too few gradients for it, or the library was built
            without LAPACK.
        """
        context, pointer = context or default_context(), ctypes.c_void_p()
        context.call("sebp_basis_solve", self, rank_out, rank_in, pointer)
        return Basis(pointer)
