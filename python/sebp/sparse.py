# SPDX-License-Identifier: Apache-2.0
"""SparseGrad and MeProp on NumPy arrays: bases, gradients of few elements, and their AdamW.

With a weight W: N x K, vectors u_out: r_out x N and u_in: r_in x K (a row is a vector), and X, dY
and their active rows as in :mod:`sebp.core`, a step of SparseGrad on a layer is::

    r = sparsegrad_gradient(basis, dy, x)   # u_out (dY^T X) u_in^T: r_out x r_in
    kept = top_elements(r, k)
    state.step(kept, AdamW(lr=1e-4))        # the gradient's values become the step
    sparsegrad_update(basis, kept, w)       # W += u_out^T S u_in, in place

For MeProp ``meprop_gradient`` takes the place of the first two, ``add_elements`` of the last.
"""

import ctypes
from os import PathLike, fsencode
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _library
from ._rules import RowRule, parse_rule
from ._structs import ACCUMULATE, AdamWOptions, LinearOptions, Matrix, SparseStruct
from .core import Array, Context, Rows, _fail, _view, default_context, whole_numbers

NONFINITE = 14
"""The status of a :class:`~sebp.SebpError` about a NaN or Inf where there must be none."""

_ROTATIONS = ("auto", "factors", "dy", "x", "out_in", "in_out")


class Sparse(NamedTuple):
    """The few elements of a matrix that are kept; the others are zero.

    Attributes
    ----------
    indices : int64 array, k
        row * cols + col, ascending.
    values : float32 array, k
    shape : (int, int)
        Rows and columns of the matrix.
    """

    indices: NDArray[np.int64]
    values: NDArray[np.float32]
    shape: tuple[int, int]

    def struct(self, *, is_written: bool = False) -> SparseStruct:
        """Describe it to the library, which reads its arrays in place.

        Parameters
        ----------
        is_written : bool, default False
            Whether it writes the values, too.

        Raises
        ------
        TypeError
            If the arrays are not of int64 and float32.
        ValueError
            If they are not vectors of one length, without gaps; or if the values are written and
            cannot be.
        """
        indices, values = self.indices, self.values
        if indices.dtype != np.int64 or values.dtype != np.float32:
            raise TypeError(f"indices are {indices.dtype} and values {values.dtype}")
        if indices.ndim != 1 or indices.shape != values.shape:
            raise ValueError(f"indices have shape {indices.shape}, but values {values.shape}")
        if not (indices.flags.c_contiguous and values.flags.c_contiguous):
            raise ValueError("indices or values have gaps")
        if is_written and not values.flags.writeable:
            raise ValueError("values are not an array that can be written to")
        return SparseStruct(indices.ctypes.data, values.ctypes.data, indices.size, *self.shape)


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


def _within_int64(count: int) -> int:
    """Give the nearest 64-bit number, for the library to refuse: ctypes would take the low bits."""
    return max(-(2**63), min(count, 2**63 - 1))


def _target(array: Array, name: str) -> Matrix:
    """Describe an array that is written to."""
    view, held = _view(array, name)
    if held is not array or not array.flags.writeable:
        raise ValueError(f"{name} is not an array that can be written to row by row")
    return view


def _copy(view: Matrix) -> NDArray[np.float32]:
    """Copy a float32 matrix of the library's."""
    floats = (ctypes.c_float * (view.rows * view.stride)).from_address(view.data)
    whole = np.frombuffer(floats, np.float32).reshape(view.rows, view.stride)
    return whole[:, : view.cols].copy()


# --------------------------------------------------------------------------------------------------
# Bases


class Basis:
    """A pair of bases, u_out and u_in, in which gradients of N x K are sparse. Immutable.

    Made by :meth:`BasisSums.solve`, :meth:`from_vectors` and :meth:`load`.
    """

    def __init__(self, handle: ctypes.c_void_p) -> None:
        self._library = _library.load()
        self._handle = handle

    @classmethod
    def from_vectors(cls, u_out: Array, u_in: Array) -> "Basis":
        """Take vectors at hand, as copies; that they are orthonormal is not checked.

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
        handle = ctypes.c_void_p()
        (v_out, u_out), (v_in, u_in) = _view(u_out, "u_out"), _view(u_in, "u_in")
        status = _library.load().sebp_basis_from_vectors(v_out, v_in, handle)
        if status:
            _fail(status, "")
        return cls(handle)

    @classmethod
    def load(cls, path: str | PathLike, context: Context | None = None) -> "Basis":
        """Read one from a file.

        Raises
        ------
        SebpError
            If the file cannot be read, is no basis, or is damaged.
        """
        context, handle = context or default_context(), ctypes.c_void_p()
        context.check(context._library.sebp_basis_load(context._handle, fsencode(path), handle))
        return cls(handle)

    def save(self, path: str | PathLike, context: Context | None = None) -> None:
        """Write it to a file; what that held is kept if this fails.

        Raises
        ------
        SebpError
            If it cannot be written.
        """
        context = context or default_context()
        context.check(self._library.sebp_basis_save(context._handle, self._handle, fsencode(path)))

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return (
            self._library.sebp_basis_out(self._handle).cols,
            self._library.sebp_basis_in(self._handle).cols,
        )

    @property
    def rank(self) -> tuple[int, int]:
        """r_out and r_in."""
        return (
            self._library.sebp_basis_out(self._handle).rows,
            self._library.sebp_basis_in(self._handle).rows,
        )

    @property
    def u_out(self) -> NDArray[np.float32]:
        """A copy of u_out: r_out x N."""
        return _copy(self._library.sebp_basis_out(self._handle))

    @property
    def u_in(self) -> NDArray[np.float32]:
        """A copy of u_in: r_in x K."""
        return _copy(self._library.sebp_basis_in(self._handle))

    @property
    def shares(self) -> tuple[float, float]:
        """The shares of the gradients' energy in u_out and u_in; NaN where not known."""
        return (
            self._library.sebp_basis_share_out(self._handle),
            self._library.sebp_basis_share_in(self._handle),
        )

    @property
    def bytes(self) -> int:
        """The memory its vectors take."""
        (n, k), (p, q) = self.shape, self.rank
        return 4 * (p * n + q * k)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.sebp_basis_destroy(self._handle)


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


class BasisSums:
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
        self._library = _library.load()
        self._handle = ctypes.c_void_p()
        self.shape = (out_features, in_features)
        status = self._library.sebp_basis_sums_create(out_features, in_features, self._handle)
        if status:
            _fail(status, "")

    def add(self, gradient: Array, context: Context | None = None) -> None:
        """Add a gradient, N x K.

        Raises
        ------
        SebpError
            If it has another shape, or holds a NaN or Inf; the sums are then as they were.
        """
        context = context or default_context()
        view, _held = _view(gradient, "gradient")
        context.check(self._library.sebp_basis_sums_add(context._handle, self._handle, view))

    @property
    def count(self) -> int:
        """How many gradients were added."""
        return self._library.sebp_basis_sums_count(self._handle)

    def sums(self) -> Sums:
        """Copy the sums."""
        energy = ctypes.c_double()
        out, into = (np.empty((size, size), np.float32) for size in self.shape)
        status = self._library.sebp_basis_sums_export(
            self._handle, energy, _target(out, "out"), _target(into, "into")
        )
        if status:
            _fail(status, "")
        return Sums(out, into, energy.value, self.count)

    def set_sums(self, sums: Sums) -> None:
        """Put copied sums in the place of these.

        Raises
        ------
        SebpError
            If they are not of this shape, or not finite. Nothing has changed then.
        """
        (v_out, _out), (v_into, _into) = _view(sums.out, "out"), _view(sums.into, "into")
        status = self._library.sebp_basis_sums_import(
            self._handle, _within_int64(sums.count), sums.energy, v_out, v_into
        )
        if status:
            _fail(status, "")

    def solve(self, rank_out: int, rank_in: int, context: Context | None = None) -> Basis:
        """Give the leading eigenvectors of both sums.

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
        context, handle = context or default_context(), ctypes.c_void_p()
        context.check(
            self._library.sebp_basis_solve(context._handle, self._handle, rank_out, rank_in, handle)
        )
        return Basis(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.sebp_basis_sums_destroy(self._handle)


# --------------------------------------------------------------------------------------------------
# Gradients


def _operands(
    dy: Array, x: Array, rows: Rows | RowRule, x_is_compact: bool, accumulate: bool
) -> tuple[Matrix, Matrix, ctypes.c_void_p | None, LinearOptions, tuple]:
    """Give what gradients are computed from; the last holds the memory of the others."""
    (v_dy, dy), (v_x, x) = _view(dy, "dy"), _view(x, "x")
    options = LinearOptions(ctypes.sizeof(LinearOptions), x_is_compact=x_is_compact)
    options.dw_write = ACCUMULATE if accumulate else 0
    handle = None
    if isinstance(rows, Rows):
        handle = rows._handle
    else:
        options.rule = parse_rule(rows).struct()
    return v_dy, v_x, handle, options, (dy, x)


def sparsegrad_gradient(
    basis: Basis,
    dy: Array,
    x: Array,
    rows: Rows | RowRule = "nonzero",
    *,
    x_is_compact: bool = False,
    rotation: str = "auto",
    out: NDArray[np.float32] | None = None,
    accumulate: bool = False,
    context: Context | None = None,
) -> NDArray[np.float32]:
    """Compute R = u_out (dY^T X) u_in^T on the active rows.

    Parameters
    ----------
    basis : Basis
        Of N x K.
    dy : array, M x N
    x : array, M x K
        m x K with `x_is_compact`. Of dY's dtype.
    rows : Rows, or "nonzero", int, ("threshold", float), ("energy", float)
        The active rows, or the rule that finds them in `dy`.
    x_is_compact : bool
        Whether the i-th row of `x` is the i-th row of `rows`, which is a :class:`~sebp.Rows` then.
    rotation : {"auto", "factors", "dy", "x", "out_in", "in_out"}
        The order of the products: the cheapest, or one to try.
    out : float32 array, r_out x r_in, optional
        Where R is put.
    accumulate : bool
        Add to what `out` holds.
    context : Context, optional
        Default: the calling thread's own.

    Returns
    -------
    float32 array, r_out x r_in
        R.

    Raises
    ------
    SebpError
        If shapes, dtypes or rows do not go together.
    ValueError
        If `rotation` is not in its list, `out` cannot be written to in place, or for the rule.
    """
    context = context or default_context()
    if out is None:
        out = np.zeros(basis.rank, np.float32)
    v_dy, v_x, handle, options, _held = _operands(dy, x, rows, x_is_compact, accumulate)
    context.check(
        context._library.sebp_sparsegrad_gradient(
            context._handle,
            basis._handle,
            v_dy,
            v_x,
            handle,
            options,
            _ROTATIONS.index(rotation),
            _target(out, "out"),
        )
    )
    return out


def meprop_gradient(
    dy: Array,
    x: Array,
    k: int,
    rows: Rows | RowRule = "nonzero",
    *,
    x_is_compact: bool = False,
    context: Context | None = None,
) -> Sparse:
    """Compute the k elements of largest magnitude of dW = dY^T X, which is never held whole.

    Parameters
    ----------
    dy : array, M x N
    x : array, M x K
        m x K with `x_is_compact`. Of dY's dtype.
    k : int
        From 1 to N K.
    rows, x_is_compact, context
        As for :func:`sparsegrad_gradient`.

    Returns
    -------
    Sparse, N x K

    Raises
    ------
    SebpError
        If shapes, dtypes or rows do not go together, `k` is out of range, or dW holds a NaN or Inf.
    """
    context = context or default_context()
    v_dy, v_x, handle, options, _held = _operands(dy, x, rows, x_is_compact, False)
    kept = _room(k, (v_dy.cols, v_x.cols))
    context.check(
        context._library.sebp_meprop_gradient(
            context._handle, v_dy, v_x, handle, options, kept.struct()
        )
    )
    return kept


# --------------------------------------------------------------------------------------------------
# Elements


def _room(k: int, shape: tuple[int, int]) -> Sparse:
    """Make room for k elements, but not for more than there are, as the library looks first."""
    room = min(max(k, 0), shape[0] * shape[1] + 1)
    return Sparse(np.empty(room, np.int64), np.empty(room, np.float32), shape)


def top_elements(r: NDArray[np.float32], k: int, context: Context | None = None) -> Sparse:
    """Choose the k elements of largest magnitude, of equal ones those of the lowest index.

    Parameters
    ----------
    r : float32 array, rows x cols
    k : int
        From 1 to rows * cols.
    context : Context, optional
        Default: the calling thread's own.

    Raises
    ------
    SebpError
        If `k` is out of range, or `r` holds a NaN or Inf.
    """
    context = context or default_context()
    view, _held = _view(r, "r")
    kept = _room(k, (view.rows, view.cols))
    context.check(context._library.sebp_sparse_top(context._handle, view, kept.struct()))
    return kept


def take_elements(
    r: NDArray[np.float32], indices: NDArray[np.int64], context: Context | None = None
) -> Sparse:
    """Take elements chosen before.

    Parameters
    ----------
    r : float32 array, rows x cols
    indices : int64 array
        row * cols + col, ascending.
    context : Context, optional
        Default: the calling thread's own.

    Raises
    ------
    SebpError
        If indices are out of range, unsorted or repeated, or one of the elements is a NaN or Inf.
    """
    context = context or default_context()
    view, _held = _view(r, "r")
    kept = Sparse(indices, np.empty(indices.shape, np.float32), (view.rows, view.cols))
    context.check(context._library.sebp_sparse_take(context._handle, view, kept.struct()))
    return kept


def add_elements(s: Sparse, w: Array, context: Context | None = None) -> None:
    """Add the elements of S to W, N x K, in place.

    Raises
    ------
    SebpError
        If S is not of W's shape, not valid, or holds a NaN or Inf.
    ValueError
        If `w` cannot be written to in place.
    """
    context = context or default_context()
    view = _target(w, "w")
    context.check(context._library.sebp_sparse_add(context._handle, s.struct(), view))


def sparsegrad_update(basis: Basis, s: Sparse, w: Array, context: Context | None = None) -> None:
    """Compute W += u_out^T S u_in, in place.

    Parameters
    ----------
    basis : Basis
        Of N x K.
    s : Sparse, r_out x r_in
    w : array, N x K
        Either dtype.
    context : Context, optional
        Default: the calling thread's own.

    Raises
    ------
    SebpError
        If shapes do not go together, or S is not valid or holds a NaN or Inf.
    ValueError
        If `w` cannot be written to in place.
    """
    context = context or default_context()
    view = _target(w, "w")
    context.check(
        context._library.sebp_sparsegrad_update(context._handle, basis._handle, s.struct(), view)
    )


def weight_decay(w: Array, adamw: AdamW, context: Context | None = None) -> None:
    """Compute W *= 1 - lr weight_decay, in place.

    Raises
    ------
    SebpError
        If one of the two numbers is negative or not finite.
    ValueError
        If `w` cannot be written to in place.
    """
    context = context or default_context()
    view = _target(w, "w")
    context.check(context._library.sebp_weight_decay(context._handle, adamw.struct(), view))


def lora_merge(a: Array, b: Array, scale: float, w: Array, context: Context | None = None) -> None:
    """Compute W += scale (A B)^T, in place.

    Parameters
    ----------
    a : array, K x r
    b : array, r x N
    scale : float
        alpha / r.
    w : array, N x K
    context : Context, optional
        Default: the calling thread's own.

    Raises
    ------
    SebpError
        If shapes do not go together, or `scale` is not finite.
    ValueError
        If `w` cannot be written to in place.
    """
    context = context or default_context()
    (v_a, a), (v_b, b), v_w = _view(a, "a"), _view(b, "b"), _target(w, "w")
    context.check(context._library.sebp_lora_merge(context._handle, v_a, v_b, scale, v_w))


# --------------------------------------------------------------------------------------------------
# AdamW on the elements that train


class Moments(NamedTuple):
    """A copy of a :class:`SparseAdamW`'s state.

    Attributes
    ----------
    indices : int64 array
        Ascending.
    moment1, moment2 : float32 array
    steps : int
    """

    indices: NDArray[np.int64]
    moment1: NDArray[np.float32]
    moment2: NDArray[np.float32]
    steps: int


class SparseAdamW:
    """AdamW's moments of the elements of a matrix that train.

    Parameters
    ----------
    shape : (int, int)
        Rows and columns of the matrix.
    support : int64 array, optional
        The elements that train: row * cols + col, ascending; 16 bytes each. Default: chosen anew in
        each step; the state then grows by 21 to 43 bytes for each new one.

    Raises
    ------
    TypeError, ValueError
        If indices are not integers in one dimension.
    SebpError
        If they are out of range, unsorted or repeated.
    """

    def __init__(self, shape: tuple[int, int], support: ArrayLike | None = None) -> None:
        self._library = _library.load()
        self._handle = ctypes.c_void_p()
        self.shape = shape
        self.is_fixed = support is not None
        address, count = None, 0
        if support is not None:
            listed = whole_numbers(support, "indices")
            address, count = listed.ctypes.data, listed.size
        status = self._library.sebp_sparse_adamw_create(*shape, address, count, self._handle)
        if status:
            _fail(status, "")

    @property
    def count(self) -> int:
        """How many elements it has moments of."""
        return self._library.sebp_sparse_adamw_count(self._handle)

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return self._library.sebp_sparse_adamw_steps(self._handle)

    @property
    def bytes(self) -> int:
        """The memory it takes."""
        return self._library.sebp_sparse_adamw_bytes(self._handle)

    @property
    def support(self) -> NDArray[np.int64]:
        """The fixed support: no copy, to be read alone."""
        if not self.is_fixed or self.count == 0:
            return np.empty(0, np.int64)
        address = self._library.sebp_sparse_adamw_support(self._handle)
        memory = (ctypes.c_int64 * self.count).from_address(address)
        memory.owner = self  # lives as long as the array
        listed = np.frombuffer(memory, np.int64)
        listed.flags.writeable = False
        return listed

    def step(self, gradient: Sparse, adamw: AdamW, context: Context | None = None) -> None:
        """Take a step: the gradient's values become what is to be added to the weights.

        Parameters
        ----------
        gradient : Sparse
            With a fixed support on exactly that. Its values are written to.
        adamw : AdamW
            `weight_decay` is not looked at: see :func:`weight_decay`.
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
        context.check(
            self._library.sebp_sparse_adamw_step(
                context._handle, self._handle, adamw.struct(), written
            )
        )

    def moments(self) -> Moments:
        """Copy the state."""
        count = self.count
        copy = Moments(
            np.empty(count, np.int64),
            np.empty(count, np.float32),
            np.empty(count, np.float32),
            self.steps,
        )
        status = self._library.sebp_sparse_adamw_export(
            self._handle, *(array.ctypes.data for array in copy[:3])
        )
        if status:
            _fail(status, "")
        return copy

    def set_moments(self, moments: Moments) -> None:
        """Put a copied state in the place of this one.

        Raises
        ------
        TypeError, ValueError
            If its indices are not integers, or its arrays not of one length.
        SebpError
            If it does not go with the shape or the support, or is not valid. Nothing has changed
            in any case.
        """
        indices = whole_numbers(moments.indices, "indices")
        m, v = (np.ascontiguousarray(array, np.float32) for array in moments[1:3])
        if not indices.shape == m.shape == v.shape:
            raise ValueError(f"{indices.size} indices, but {m.size} and {v.size} moments")
        status = self._library.sebp_sparse_adamw_import(
            self._handle,
            _within_int64(moments.steps),
            indices.ctypes.data,
            m.ctypes.data,
            v.ctypes.data,
            indices.size,
        )
        if status:
            _fail(status, "")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.sebp_sparse_adamw_destroy(self._handle)


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
