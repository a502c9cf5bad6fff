# SPDX-License-Identifier: Apache-2.0
"""Row sets: which rows of a matrix are active."""

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._library import load
from .._rules import RowRule, parse_rule
from .._structs import RULE_SAMPLED, Dropped
from .calls import Handle, call
from .context import Context, default_context
from .matrices import ArrayOrMatrix, as_matrix


def whole_numbers(values: ArrayLike, name: str) -> NDArray[np.int64]:
    """Return integers as the library takes them.

    Parameters
    ----------
    values : array-like, n
        Of any type of integers; empty, of any type.
    name : str
        The values' name, for messages.

    Returns
    -------
    int64 array, n

    Raises
    ------
    TypeError
        If they are of another type: fractions would be lost, and a mask is not a list of numbers.
    ValueError
        If they have other than one dimension.
    """
    array = np.asarray(values)
    if array.size > 0 and array.dtype.kind not in "iu":
        raise TypeError(f"{name} are {array.dtype}, not integers")
    if array.ndim != 1:
        raise ValueError(f"{name} have {array.ndim} dimensions, not 1")
    return np.ascontiguousarray(array, dtype=np.int64)


class Rows(Handle):
    """A row set: the sorted list of the m active rows among M. Immutable.

    Made by :meth:`all`, :meth:`from_mask`, :meth:`from_lengths`, :meth:`from_indices`, :meth:`find`
    and :meth:`sample`.
    """

    def __init__(self, pointer: ctypes.c_void_p) -> None:
        super().__init__(pointer, "sebp_rows_destroy")

    @classmethod
    def _make(cls, constructor: str, *arguments: object) -> "Rows":
        pointer = ctypes.c_void_p()
        call(constructor, *arguments, pointer)
        return cls(pointer)

    @classmethod
    def all(cls, total: int) -> "Rows":
        """Take all of `total` rows."""
        return cls._make("sebp_rows_all", total)

    @classmethod
    def from_mask(cls, mask: ArrayLike) -> "Rows":
        """Take the rows where a mask, of any shape, read row by row, is not zero."""
        flags = np.ascontiguousarray(np.asarray(mask) != 0)
        return cls._make("sebp_rows_from_mask", flags.ctypes.data, flags.size)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], sequence_length: int) -> "Rows":
        """Take the first lengths[s] rows of each sequence s, right-padded to `sequence_length`.

        Raises
        ------
        TypeError, ValueError
            If `lengths` are not integers in one dimension.
        SebpError
            If a length is below 0 or over `sequence_length`.
        """
        counts = whole_numbers(lengths, "lengths")
        return cls._make("sebp_rows_from_lengths", counts.ctypes.data, counts.size, sequence_length)

    @classmethod
    def from_indices(cls, indices: ArrayLike, total: int) -> "Rows":
        """Take the rows listed: ascending, each once, each in [0, total).

        Raises
        ------
        TypeError, ValueError
            If they are not integers in one dimension.
        SebpError
            If they are not as listed.
        """
        listed = whole_numbers(indices, "indices")
        return cls._make("sebp_rows_from_indices", listed.ctypes.data, listed.size, total)

    @classmethod
    def find(
        cls, dy: ArrayOrMatrix, rows: RowRule = "nonzero", context: Context | None = None
    ) -> "Rows":
        """Take the active rows of a gradient under a rule.

        Parameters
        ----------
        dy : array or Matrix, M x N
            The gradient.
        rows : "nonzero", int, ("threshold", float) or ("energy", float)
            The rule.
        context : Context, optional
            Whose threads scan. Default: the calling thread's own.

        Raises
        ------
        TypeError
            If `dy` is neither float32 nor uint16.
        ValueError
            If `dy` is not 2-D, or for the rule. A rule with weights is for :meth:`sample`.
        """
        rule = parse_rule(rows)
        if rule.kind == RULE_SAMPLED:
            raise ValueError(
                f"rows are {rule}, which have weights, for dW and db of a linear layer alone:"
                " Rows.sample() draws them"
            )
        context, pointer = context or default_context(), ctypes.c_void_p()
        context.call("sebp_rows_find", as_matrix(dy, "dy"), rule.struct(), pointer)
        return cls(pointer)

    @classmethod
    def sample(
        cls,
        dy: ArrayOrMatrix,
        share: float,
        seed: int,
        x: ArrayOrMatrix | None = None,
        context: Context | None = None,
    ) -> "Rows":
        """Draw a weighted sample of the rows of a gradient, with which dW and db are unbiased.

        WTA-CRS (Liu et al., NeurIPS 2023): the largest rows are kept and the others drawn. dW is
        the sum of ``weights[i] * outer(dy[i], x[i])``. What the library draws by and with which
        probabilities is in rows.h.

        Parameters
        ----------
        dy : array or Matrix, M x N
            The gradient.
        share : float
            Of the rows that are not zero, in (0, 1].
        seed : int
            In [0, 2^64). Another one is another sample.
        x : array or Matrix, M x K, optional
            The layer's input, which makes the variance least. Default: dY alone decides.
        context : Context, optional
            Whose threads scan. Default: the calling thread's own.

        Returns
        -------
        Rows
            For :func:`sebp.linear_backward` without `w`. Others refuse it.

        Raises
        ------
        TypeError
            If an array is neither float32 nor uint16.
        ValueError
            If an array is not 2-D, or `share` or `seed` is out of range.
        SebpError
            If `x` has not M rows.
        """
        rule = parse_rule(("sampled", share)).struct(seed)
        context, pointer = context or default_context(), ctypes.c_void_p()
        vx = None if x is None else as_matrix(x, "x")
        context.call("sebp_rows_sample", as_matrix(dy, "dy"), vx, rule, pointer)
        return cls(pointer)

    @property
    def total(self) -> int:
        """M: among how many rows the set was made."""
        return load().sebp_rows_total(self)

    @property
    def activity(self) -> float:
        """The share m / M of active rows; 0 where M is 0."""
        return load().sebp_rows_activity(self)

    @property
    def indices(self) -> NDArray[np.int64]:
        """The active rows, ascending, as a copy."""
        count = len(self)
        if count == 0:
            return np.empty(0, np.int64)
        address = load().sebp_rows_indices(self)
        listed = (ctypes.c_int64 * count).from_address(address)
        return np.frombuffer(listed, np.int64).copy()

    @property
    def weights(self) -> NDArray[np.float32] | None:
        """The weights of a sample, in the order of the indices, as a copy; None: all 1."""
        address = load().sebp_rows_weights(self)
        if address is None:
            return None
        listed = (ctypes.c_float * len(self)).from_address(address)
        return np.frombuffer(listed, np.float32).copy()

    @property
    def variance(self) -> float:
        """How uncertain a sample makes dW: E ||error||^2 is at most this, of what rows.h names."""
        return load().sebp_rows_variance(self)

    def dropped(self, dy: ArrayOrMatrix, context: Context | None = None) -> tuple[int, float]:
        """Measure what the set drops of a gradient.

        Parameters
        ----------
        dy : array, M x N
            The gradient.
        context : Context, optional
            Default: the calling thread's own.

        Returns
        -------
        rows : int
            How many rows are not all zero and not in the set.
        energy : float
            Their share of the squared norm of `dy`.

        Raises
        ------
        SebpError
            If the set was made for another M.
        """
        context, result = context or default_context(), Dropped()
        context.call("sebp_rows_dropped", as_matrix(dy, "dy"), self, result)
        return result.rows, result.energy

    def __len__(self) -> int:
        """Count the active rows, m."""
        return load().sebp_rows_count(self)

    def __repr__(self) -> str:
        return f"Rows({len(self)} of {self.total})"
