# SPDX-License-Identifier: Apache-2.0
"""AdamW on the elements of a matrix that train."""

import ctypes
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._library import load
from .._structs import AdamWOptions
from ..core.calls import Handle, call, within_int64
from ..core.context import Context, default_context
from ..core.matrices import ArrayOrMatrix, as_matrix, as_target
from ..core.rows import whole_numbers
from .elements import Sparse


class AdamW(NamedTuple):
    """The numbers of an AdamW step; the defaults are those of ``torch.optim.AdamW``."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2

    def struct(self) -> AdamWOptions:
        """Write them as the library takes them."""
        return AdamWOptions(ctypes.sizeof(AdamWOptions), *self)


def weight_decay(w: ArrayOrMatrix, adamw: AdamW, context: Context | None = None) -> None:
    """Compute W *= 1 - lr weight_decay, in place.

    Raises
    ------
    SebpError
        If one of the two numbers is negative or not finite.
    ValueError
        If `w` cannot be written to in place.
    """
    context = context or default_context()
    context.call("sebp_weight_decay", adamw.struct(), as_target(w, "w"))


def adamw_step(
    gradient: ArrayOrMatrix,
    w: ArrayOrMatrix,
    moment1: ArrayOrMatrix,
    moment2: ArrayOrMatrix,
    step: int,
    adamw: AdamW,
    context: Context | None = None,
) -> None:
    """Take a step on all elements of a matrix: `w` and both moments change in place.

    Parameters
    ----------
    gradient : array or Matrix, N x K
    w : array or Matrix, N x K
        Either dtype.
    moment1, moment2 : float32 array or Matrix, N x K
        Zeros before the first step.
    step : int
        From 1 on.
    adamw : AdamW
    context : Context, optional
        Default: the calling thread's own.

    Raises
    ------
    SebpError
        If shapes do not go together, a number is out of range, or the gradient holds a NaN or Inf.
        Nothing has changed then.
    ValueError
        If what changes cannot be written to in place.
    """
    context = context or default_context()
    targets = as_target(w, "w"), as_target(moment1, "moment1"), as_target(moment2, "moment2")
    g = as_matrix(gradient, "gradient")
    context.call("sebp_adamw_step", g, within_int64(step), adamw.struct(), *targets)


class Moments(NamedTuple):
    """A copy of a :class:`SparseAdamW`'s state.

    Attributes
    ----------
    indices : int64 array
        Ascending.
    moment1, moment2 : float32 array
    steps : int
    used : uint8 array or None
        1 for those that the next :meth:`SparseAdamW.drop_unused` keeps. None: all.
    """

    indices: NDArray[np.int64]
    moment1: NDArray[np.float32]
    moment2: NDArray[np.float32]
    steps: int
    used: NDArray[np.uint8] | None = None


class SparseAdamW(Handle):
    """AdamW's moments of the elements of a matrix that train.

    Parameters
    ----------
    shape : (int, int)
        Rows and columns of the matrix.
    support : int64 array, optional
        The elements that train: row * cols + col, ascending; 16 bytes each. Default: chosen anew in
        each step; the state then grows by 22 to 43 bytes for each new one.

    Raises
    ------
    TypeError, ValueError
        If indices are not integers in one dimension.
    SebpError
        If they are out of range, unsorted or repeated.
    """

    def __init__(self, shape: tuple[int, int], support: ArrayLike | None = None) -> None:
        address, count = None, 0
        if support is not None:
            listed = whole_numbers(support, "indices")
            address, count = listed.ctypes.data, listed.size
        pointer = ctypes.c_void_p()
        call("sebp_sparse_adamw_create", *shape, address, count, pointer)
        super().__init__(pointer, "sebp_sparse_adamw_destroy")
        self.shape = shape
        self.is_fixed = support is not None

    @property
    def count(self) -> int:
        """How many elements it has moments of."""
        return load().sebp_sparse_adamw_count(self)

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return load().sebp_sparse_adamw_steps(self)

    @property
    def bytes(self) -> int:
        """The memory it takes."""
        return load().sebp_sparse_adamw_bytes(self)

    @property
    def support(self) -> NDArray[np.int64]:
        """The fixed support: no copy, read-only."""
        if not self.is_fixed or self.count == 0:
            return np.empty(0, np.int64)
        address = load().sebp_sparse_adamw_support(self)
        memory = (ctypes.c_int64 * self.count).from_address(address)
        memory.owner = self  # lives as long as the array
        listed = np.frombuffer(memory, np.int64)
        listed.flags.writeable = False
        return listed

    def step(self, gradient: Sparse, adamw: AdamW, context: Context | None = None) -> None:
        """Take a step: the gradient's values are replaced by what is to be added to the weights.

        Parameters
        ----------
        gradient : Sparse
            With a fixed support, on exactly that support. Its values are written to.
        adamw : AdamW
            `weight_decay` is ignored: see :func:`weight_decay`.
        context : Context, optional
            Default: the calling thread's own.

        Raises
        ------
        SebpError
            If the gradient is of another shape or support, or holds a NaN or Inf. Nothing has
            changed then.
        TypeError, ValueError
            If the gradient's arrays are not as :meth:`Sparse.struct` takes them, to write to them.
        """
        context = context or default_context()
        written = gradient.struct(is_written=True)
        context.call("sebp_sparse_adamw_step", self, adamw.struct(), written)

    def drop_unused(self) -> None:
        """Drop the moments of elements that no gradient has had since the last call of this.

        Called after each n-th step, it drops what has not been chosen for n to 2 n steps. With a
        fixed support nothing is done.
        """
        call("sebp_sparse_adamw_drop_unused", self)

    def moments(self) -> Moments:
        """Copy the state."""
        count = self.count
        copy = Moments(
            np.empty(count, np.int64),
            np.empty(count, np.float32),
            np.empty(count, np.float32),
            self.steps,
            np.empty(count, np.uint8),
        )
        call("sebp_sparse_adamw_export", self, *(array.ctypes.data for array in copy[:3]))
        call("sebp_sparse_adamw_export_used", self, copy.used.ctypes.data)
        return copy

    def set_moments(self, moments: Moments) -> None:
        """Replace the state by a copied one.

        Raises
        ------
        TypeError, ValueError
            If its indices are not integers, or its arrays not of one length.
        SebpError
            If it does not match the shape or the support, or is not valid. Nothing has changed in
            any case.
        """
        indices = whole_numbers(moments.indices, "indices")
        m, v = (np.ascontiguousarray(array, np.float32) for array in moments[1:3])
        if not indices.shape == m.shape == v.shape:
            raise ValueError(f"{indices.size} indices, but {m.size} and {v.size} moments")
        used = None if moments.used is None else np.ascontiguousarray(moments.used)
        if used is not None and (
            used.dtype != np.uint8 or used.shape != m.shape or (used > 1).any()
        ):
            raise ValueError(f"used is not {m.size} numbers of 0 or 1, of uint8")
        addresses = (array.ctypes.data for array in (indices, m, v))
        steps = within_int64(moments.steps)
        call("sebp_sparse_adamw_import", self, steps, *addresses, indices.size)
        if used is not None:
            call("sebp_sparse_adamw_import_used", self, used.ctypes.data, used.size)


def check_adamw(adamw: AdamW, steps: int = 0, context: Context | None = None) -> None:
    """Check the numbers of the step that follows `steps` steps, without taking it.

    Raises
    ------
    SebpError
        If one of them is out of range.
    """
    empty = np.empty(0, np.int64), np.empty(0, np.float32)
    state = SparseAdamW((1, 1), empty[0])
    state.set_moments(Moments(*empty, empty[1], steps))
    state.step(Sparse(*empty, (1, 1)), adamw, context)
