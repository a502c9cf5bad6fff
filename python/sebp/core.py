# SPDX-License-Identifier: Apache-2.0
"""The library on NumPy arrays: contexts, row sets, and the linear layer.

A linear layer is Y = X W^T + b with X: M x K, W: N x K, b: N, Y and its gradient dY: M x N. Arrays
are float32, or uint16 that hold bfloat16 (the upper half of a float32). Rows may be any stride
apart; elements of a row lie next to each other, and an array where they do not is copied.
"""

import ctypes
import threading
from collections.abc import Sequence
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _library
from ._rules import RowRule, Rule, parse_rule
from ._structs import BF16, F32, ContextOptions, Dropped, LinearOptions, Matrix

Array = NDArray[np.float32] | NDArray[np.uint16]

_PLACEMENTS = ("none", "compact", "spread")
_GEMMS = ("auto", "native", "onednn")
_ERROR_MEMORY = 10


class SebpError(RuntimeError):
    """A call of the library failed.

    Attributes
    ----------
    status : int
        The ``sebp_status`` it returned.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _fail(status: int, message: str) -> None:
    meaning = _library.load().sebp_status_string(status).decode()
    if status == _ERROR_MEMORY:
        raise MemoryError(message or meaning)
    raise SebpError(status, message or meaning)


class Context:
    """Threads and scratch memory. Used by one thread at a time.

    A forked child may use those it has inherited, and make its own: both work on one thread,
    whatever is asked for, as OpenMP's threads have stayed behind. The fork is seen if ``sebp`` was
    imported before. Where PyTorch has worked on threads, and ``sebp`` is imported in the child
    alone, ask for ``threads=1``, and call ``torch.set_num_threads(1)``, without which PyTorch's own
    operators hang there, too.

    Parameters
    ----------
    threads : int, default 0
        0: one for each physical core this process may use.
    placement : {"none", "compact", "spread"}
        Where threads are bound.
    gemm : {"auto", "native", "onednn"}
        Which matrix product does the work.
    workspace_bytes : int, default 0
        Bound on scratch memory; 0: 64 MiB.

    Raises
    ------
    SebpError
        If an option or an environment variable has a value that it may not have, or the build lacks
        what was asked for.
    ValueError
        If `placement` or `gemm` is not in its list.
    """

    def __init__(
        self,
        threads: int = 0,
        placement: str = "none",
        gemm: str = "auto",
        workspace_bytes: int = 0,
    ) -> None:
        self._handle = ctypes.c_void_p()
        self._library = _library.load()
        message = ctypes.create_string_buffer(256)
        options = ContextOptions(
            size_bytes=ctypes.sizeof(ContextOptions),
            threads=threads,
            placement=_PLACEMENTS.index(placement),
            gemm=_GEMMS.index(gemm),
            workspace_bytes=workspace_bytes,
            message=ctypes.cast(message, ctypes.c_char_p),
            message_bytes=len(message),
        )
        status = self._library.sebp_context_create(
            ctypes.byref(options), ctypes.byref(self._handle)
        )
        if status:
            _fail(status, message.value.decode())

    @property
    def threads(self) -> int:
        """The number of threads it works with."""
        return self._library.sebp_context_threads(self._handle)

    @property
    def scratch_bytes(self) -> int:
        """The most scratch memory it has held so far."""
        return self._library.sebp_context_scratch_bytes(self._handle)

    def check(self, status: int) -> None:
        """Raise where a call with this context failed.

        Parameters
        ----------
        status : int
            What the call returned.

        Raises
        ------
        SebpError, MemoryError
            If it is not SEBP_SUCCESS.
        """
        if status:
            _fail(status, self._library.sebp_context_message(self._handle).decode())

    def close(self) -> None:
        """Free it. Afterwards it is not to be used; closing twice does nothing."""
        if self._handle:
            self._library.sebp_context_destroy(self._handle)
            self._handle = ctypes.c_void_p()

    def __enter__(self) -> "Context":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()


_of_thread = threading.local()


def default_context() -> Context:
    """Give the calling thread's own context, made with defaults on first use.

    Returns
    -------
    Context
        The same one for each call from this thread.
    """
    if not hasattr(_of_thread, "context"):
        _of_thread.context = Context()
    return _of_thread.context


def whole_numbers(values: ArrayLike, name: str) -> NDArray[np.int64]:
    """Take integers as the library does.

    Parameters
    ----------
    values : array-like, n
        Of any type of integers; empty, of any type.
    name : str
        Theirs, for messages.

    Returns
    -------
    int64 array, n

    Raises
    ------
    TypeError
        If they are of another type: numbers with fractions would lose them, and a mask is no list.
    ValueError
        If they have other than one dimension.
    """
    array = np.asarray(values)
    if array.size > 0 and array.dtype.kind not in "iu":
        raise TypeError(f"{name} are {array.dtype}, not integers")
    if array.ndim != 1:
        raise ValueError(f"{name} have {array.ndim} dimensions, not 1")
    return np.ascontiguousarray(array, dtype=np.int64)


class Rows:
    """A row set: the sorted list of the m active rows among M. Immutable.

    Made by :meth:`all`, :meth:`from_mask`, :meth:`from_lengths`, :meth:`from_indices` and
    :meth:`find`.
    """

    def __init__(self, handle: ctypes.c_void_p) -> None:
        self._library = _library.load()
        self._handle = handle

    @classmethod
    def _make(cls, constructor: str, *arguments: object) -> "Rows":
        handle = ctypes.c_void_p()
        function = getattr(_library.load(), constructor)
        status = function(*arguments, ctypes.byref(handle))
        if status:
            _fail(status, "")
        return cls(handle)

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
    def find(cls, dy: Array, rows: RowRule = "nonzero", context: Context | None = None) -> "Rows":
        """Take the active rows of a gradient under a rule.

        Parameters
        ----------
        dy : array, M x N
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
            If `dy` is not 2-D, or for the rule.
        """
        rule = parse_rule(rows).struct()
        view, _held = _view(dy, "dy")
        return cls.find_at(view, rule, context or default_context())

    @classmethod
    def find_at(cls, view: Matrix, rule: ctypes.Structure, context: Context) -> "Rows":
        """Find the active rows of a matrix that is described to the library already.

        Parameters
        ----------
        view : Matrix, M x N
        rule : RuleStruct
        context : Context

        Returns
        -------
        Rows
            Of M.
        """
        handle = ctypes.c_void_p()
        context.check(context._library.sebp_rows_find(context._handle, view, rule, handle))
        return cls(handle)

    @property
    def total(self) -> int:
        """M: among how many rows the set was made."""
        return self._library.sebp_rows_total(self._handle)

    @property
    def activity(self) -> float:
        """The share m / M of active rows; 0 where M is 0."""
        return self._library.sebp_rows_activity(self._handle)

    @property
    def indices(self) -> NDArray[np.int64]:
        """The active rows, ascending, as a copy."""
        count = len(self)
        if count == 0:
            return np.empty(0, np.int64)
        address = self._library.sebp_rows_indices(self._handle)
        listed = (ctypes.c_int64 * count).from_address(address)
        return np.frombuffer(listed, np.int64).copy()

    def dropped(self, dy: Array, context: Context | None = None) -> tuple[int, float]:
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
        context = context or default_context()
        view, _held = _view(dy, "dy")
        result = Dropped()
        context.check(self._library.sebp_rows_dropped(context._handle, view, self._handle, result))
        return result.rows, result.energy

    def __len__(self) -> int:
        """Count the active rows, m."""
        return self._library.sebp_rows_count(self._handle)

    def __repr__(self) -> str:
        return f"Rows({len(self)} of {self.total})"

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.sebp_rows_destroy(self._handle)


def _view(array: Array, name: str) -> tuple[Matrix, Array]:
    """Describe an array, copied if its elements lie apart; the second result holds the memory."""
    array = np.asarray(array)
    if array.dtype not in (np.float32, np.uint16):
        raise TypeError(f"{name} is {array.dtype}, not float32 or uint16 (bfloat16)")
    if array.ndim != 2:
        raise ValueError(f"{name} has {array.ndim} dimensions, not 2")
    rows, cols = array.shape
    step, size = array.strides[0], array.itemsize
    if rows > 1 and cols > 0:
        gaps = step % size or step < cols * size
    else:
        step, gaps = cols * size, False
    if gaps or (cols > 1 and array.strides[1] != size) or not array.flags.aligned:
        array = np.ascontiguousarray(array)
        step = cols * size
    dtype = F32 if array.dtype == np.float32 else BF16
    return Matrix(array.ctypes.data, rows, cols, max(step // size, cols), dtype), array


def _bias_view(array: Array | None, name: str) -> tuple[Matrix | None, Array | None]:
    if array is None:
        return None, None
    array = np.asarray(array)
    return _view(array[None, :] if array.ndim == 1 else array, name)


def _rows_handle(rows: Rows | None) -> ctypes.c_void_p | None:
    return rows._handle if rows is not None else None


def linear_forward(
    x: Array,
    w: Array,
    bias: Array | None = None,
    rows: Rows | None = None,
    *,
    x_is_compact: bool = False,
    context: Context | None = None,
) -> Array:
    """Compute Y = X W^T + b on the active rows; the others are zero.

    Parameters
    ----------
    x : array, M x K
        m x K with `x_is_compact`.
    w : array, N x K
        Of X's dtype.
    bias : array, N, optional
        Either dtype.
    rows : Rows, optional
        The active rows. Default: all.
    x_is_compact : bool
        Whether the i-th row of `x` is the i-th active row.
    context : Context, optional
        Default: the calling thread's own.

    Returns
    -------
    array, M x N
        Y, of X's dtype.

    Raises
    ------
    TypeError
        If an array is neither float32 nor uint16.
    ValueError
        If an array has the wrong number of dimensions.
    SebpError
        If shapes, dtypes or rows do not go together.
    """
    context = context or default_context()
    (vx, x), (vw, w), (vb, bias) = _view(x, "x"), _view(w, "w"), _bias_view(bias, "bias")
    total = rows.total if x_is_compact and rows is not None else vx.rows
    y = np.empty((total, vw.rows), x.dtype)
    vy, y = _view(y, "y")
    options = LinearOptions(ctypes.sizeof(LinearOptions), x_is_compact=x_is_compact)
    context.check(
        context._library.sebp_linear_forward(
            context._handle, vx, vw, vb, _rows_handle(rows), options, vy
        )
    )
    return y


def linear_backward(
    dy: Array,
    x: Array | None = None,
    w: Array | None = None,
    rows: Rows | RowRule = "nonzero",
    *,
    bias: bool = True,
    x_is_compact: bool = False,
    context: Context | None = None,
) -> tuple[Array | None, Array | None, Array | None]:
    """Compute dX, dW and db from dY on the active rows alone.

    Parameters
    ----------
    dy : array, M x N
        The gradient of Y.
    x : array, M x K, optional
        m x K with `x_is_compact`. Without it there is no dW.
    w : array, N x K, optional
        Without it there is no dX.
    rows : Rows, or "nonzero", int, ("threshold", float), ("energy", float)
        The active rows, or the rule that finds them in `dy`.
    bias : bool
        Whether db is wanted.
    x_is_compact : bool
        Whether the i-th row of `x` is the i-th row of `rows`, which is a :class:`Rows` then.
    context : Context, optional
        Default: the calling thread's own.

    Returns
    -------
    dx : array, M x K, or None
        Zero outside the active rows.
    dw : array, N x K, or None
    db : array, N, or None
        All of dY's dtype.

    Raises
    ------
    TypeError
        If an array is neither float32 nor uint16.
    ValueError
        If an array has the wrong number of dimensions, or for the rule.
    SebpError
        If shapes, dtypes or rows do not go together.
    """
    context = context or default_context()
    rule = Rule() if isinstance(rows, Rows) else parse_rule(rows)
    given = rows if isinstance(rows, Rows) else None
    vdy, dy = _view(dy, "dy")
    vx = vw = vdx = vdw = vdb = dx = dw = db = None
    if x is not None:
        vx, x = _view(x, "x")
        vdw, dw = _view(np.empty((vdy.cols, vx.cols), dy.dtype), "dw")
    if w is not None:
        vw, w = _view(w, "w")
        vdx, dx = _view(np.empty((vdy.rows, vw.cols), dy.dtype), "dx")
    if bias:
        db = np.empty(vdy.cols, dy.dtype)
        vdb, _held = _bias_view(db, "db")
    options = LinearOptions(ctypes.sizeof(LinearOptions), rule.struct(), x_is_compact=x_is_compact)
    context.check(
        context._library.sebp_linear_backward(
            context._handle, vdy, vx, vw, _rows_handle(given), options, vdx, vdw, vdb
        )
    )
    return dx, dw, db
