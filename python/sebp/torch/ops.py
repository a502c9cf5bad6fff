# SPDX-License-Identifier: Apache-2.0
"""The operators ``sebp::linear`` and ``sebp::linear_backward``.

A weight is N x K, or K x N if `transposed` (as in Conv1D of transformers). A rule of
:mod:`sebp._rules` is given by its two numbers. With `rows`, the int64 indices of the m rows that
are not padding, the forward computes those rows only. Then `kept` may be X[rows], m x K, and the
backward holds on to it instead of X.
"""

import ctypes
import math
import os
import threading
import time
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils.weak import TensorWeakRef

from .._library import load
from .._rules import Rule
from .._structs import ACCUMULATE, BF16, F32, RULE_NONZERO, LinearOptions, Matrix
from ..core import Array, Context, Rows

_DTYPES = {torch.float32: F32, torch.bfloat16: BF16}


# --------------------------------------------------------------------------------------------------
# The calling thread's context


class _OfThread(threading.local):
    """What calls from one thread share."""

    context: Context | None = None
    threads = 0
    known: list["_KnownRows"]

    def __init__(self) -> None:
        self.known = []


_of_thread = _OfThread()
_forked = False


def _note_fork() -> None:
    global _forked, _work_lock
    _forked = True
    _work_lock = threading.Lock()


os.register_at_fork(after_in_child=_note_fork)


def _context() -> Context:
    """Give this thread's context, with as many threads as PyTorch works with.

    A forked child keeps the context it has inherited, which knows that OpenMP's threads are gone.
    """
    here = _of_thread
    if _forked:
        if here.context is None:
            here.context = Context(threads=1, gemm="native")
        return here.context
    threads = torch.get_num_threads()
    if here.context is None or here.threads != threads:
        here.context = Context(threads=threads)
        here.threads = threads
    return here.context


# --------------------------------------------------------------------------------------------------
# What the backwards have done so far, in all threads


class LayerKind(NamedTuple):
    """What the time of a layer's backward depends on, besides its rows."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    need_dx: bool
    need_dw: bool


class Work(NamedTuple):
    """Sums over backwards: rows of dY, those among them that were active, and time."""

    rows: int = 0
    active: int = 0
    seconds: float = 0.0


_work: dict[LayerKind, Work] = {}
_work_lock = threading.Lock()


def _count(kind: LayerKind, rows: int, active: int, seconds: float) -> None:
    with _work_lock:
        before = _work.get(kind, Work())
        _work[kind] = Work(before.rows + rows, before.active + active, before.seconds + seconds)


def work_done() -> dict[LayerKind, Work]:
    """Give what all backwards of this process have done so far.

    Returns
    -------
    dict of LayerKind to Work
        A copy. What PyTorch did in the library's place is not in it.
    """
    with _work_lock:
        return dict(_work)


# --------------------------------------------------------------------------------------------------
# Tensors as matrices


def _flat(tensor: Tensor) -> Tensor:
    """Make a tensor 2-D, all but its last dimension in one, copied only where it must be."""
    cols = tensor.shape[-1]
    flat = tensor.reshape(math.prod(tensor.shape[:-1]), cols)
    if (flat.shape[0] > 1 and flat.stride(0) < cols) or (cols > 1 and flat.stride(1) != 1):
        flat = flat.contiguous()
    return flat


def _array(tensor: Tensor) -> Array:
    """Give a tensor's memory as the library takes it from NumPy."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _view(tensor: Tensor) -> Matrix:
    """Describe a tensor made by :func:`_flat`, or a vector, to the library."""
    rows, cols = tensor.shape if tensor.dim() == 2 else (1, tensor.shape[0])
    stride = max(tensor.stride(0), cols) if rows > 1 else cols
    return Matrix(tensor.data_ptr(), rows, cols, stride, _DTYPES[tensor.dtype])


def _is_ours(*tensors: Tensor | None) -> bool:
    """Tell whether the library can work with these: on the CPU, all float32 or all bfloat16."""
    first = tensors[0]
    return first.dtype in _DTYPES and all(
        t is None or (t.dtype == first.dtype and t.device.type == "cpu") for t in tensors
    )


# --------------------------------------------------------------------------------------------------
# Row sets, found once for each dY


class _KnownRows(NamedTuple):
    """The rows of a tensor whose memory still holds what it held."""

    storage: StorageWeakRef
    version: int
    place: tuple[int, torch.Size, tuple[int, ...]]
    rule: Rule
    rows: Rows


def _remember(tensor: Tensor, rule: Rule, rows: Rows) -> None:
    known = _of_thread.known
    known.append(
        _KnownRows(
            StorageWeakRef(tensor.untyped_storage()),
            tensor._version,
            (tensor.data_ptr(), tensor.shape, tensor.stride()),
            rule,
            rows,
        )
    )
    del known[:-4]


def _find_rows(dy: Tensor, rule: Rule) -> Rows:
    """Find the active rows of a 2-D dY, or recall them.

    Layers that follow each other directly, and layers whose outputs are added up, get the same
    memory as dY. The weak reference keeps the address of a storage from being used again.
    """
    place = (dy.data_ptr(), dy.shape, dy.stride())
    for entry in _of_thread.known:
        if (
            entry.place == place
            and entry.rule == rule
            and entry.version == dy._version
            and not entry.storage.expired()
        ):
            return entry.rows
    rows = Rows._find(_view(dy), rule.struct(), _context())
    _remember(dy, rule, rows)
    return rows


def _rows_of(indices: Tensor, total: int) -> Rows:
    return Rows._make("sebp_rows_from_indices", indices.data_ptr(), indices.numel(), total)


def _indices_of(rows: Rows) -> Tensor:
    return torch.from_numpy(rows.indices)


# --------------------------------------------------------------------------------------------------
# sebp::linear


@torch.library.custom_op("sebp::linear", mutates_args=())
def linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    kept: Tensor | None = None,
    transposed: bool = False,
    kind: int = RULE_NONZERO,
    value: float = 0.0,
) -> Tensor:
    """Y = X W^T + b, of which a row is computed only if it is in `rows`; the others are zero."""
    lead = x.shape[:-1]
    total = math.prod(lead)
    n = weight.shape[1 if transposed else 0]
    # PyTorch has oneDNN's product in bfloat16 too; in float32 it has MKL's, which on AMD's CPUs
    # takes twice as long. No result is a view: what follows may change it in place.
    if _is_ours(x, weight, bias) and (rows is not None or x.dtype == torch.float32):
        y = x.new_empty((*lead, n))
        _forward(x, weight, bias, rows, kept, transposed, y.view(total, n))
        return y
    x = x.reshape(total, x.shape[-1])
    x = x if rows is None else x.index_select(0, rows)
    y = functional.linear(x, weight.t() if transposed else weight, bias)
    if rows is not None:
        y = y.new_zeros((total, n)).index_copy_(0, rows, y)
    return torch.ops.aten._unsafe_view.default(y, (*lead, n))


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    kept: Tensor | None,
    transposed: bool,
    y: Tensor,
) -> None:
    """Fill Y: M x N."""
    total = y.shape[0]
    active = None if rows is None else _rows_of(rows, total)
    bias = None if bias is None else bias.contiguous()
    x, weight = _flat(x if kept is None or transposed else kept), _flat(weight)
    context = _context()
    options = LinearOptions(ctypes.sizeof(LinearOptions))
    if not transposed:
        options.x_is_compact = kept is not None
        context.check(
            load().sebp_linear_forward(
                context._handle,
                _view(x),
                _view(weight),
                None if bias is None else _view(bias),
                None if active is None else active._handle,
                options,
                _view(y),
            )
        )
        return
    # X W, for W: K x N, is what the backward computes as dX = dY W; it is added to b.
    if bias is not None:
        options.dx_write = ACCUMULATE
        if rows is None:
            y.copy_(bias.expand(y.shape))
        else:
            y.zero_().index_copy_(0, rows, bias.expand(rows.numel(), -1))
    active = Rows.all(total) if active is None else active
    context.check(
        load().sebp_linear_backward(
            context._handle,
            _view(x),
            None,
            _view(weight),
            active._handle,
            options,
            _view(y),
            None,
            None,
        )
    )


@linear_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    kept: Tensor | None = None,
    transposed: bool = False,
    kind: int = RULE_NONZERO,
    value: float = 0.0,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]))


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, weight, _, rows, kept, ctx.transposed, ctx.kind, ctx.value = inputs
    need_w = ctx.needs_input_grad[1]
    ctx.whole = None
    if kept is None:
        rows = None
    elif need_w:
        ctx.whole, ctx.version = TensorWeakRef(x), x._version
        x = kept
    ctx.save_for_backward(x if need_w else None, weight, rows)


def _backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple:
    x, weight, rows = ctx.saved_tensors
    # An argument left at its default is not among the inputs.
    needs = (*ctx.needs_input_grad, False)[:3]
    whole = ctx.whole() if ctx.whole is not None else None
    if whole is not None and whole._version != ctx.version:
        whole = None
    dx, dw, db = torch.ops.sebp.linear_backward(
        dy, x, weight, rows, whole, ctx.transposed, ctx.kind, ctx.value, *needs
    )
    return (
        dx if needs[0] else None,
        dw if needs[1] else None,
        db if needs[2] else None,
        *(None,) * 5,
    )


linear_op.register_autograd(_backward, setup_context=_setup)
linear_op.register_autocast("cpu", torch.bfloat16)


# --------------------------------------------------------------------------------------------------
# sebp::linear_backward


@torch.library.custom_op("sebp::linear_backward", mutates_args=())
def linear_backward_op(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    rows: Tensor | None,
    whole: Tensor | None,
    transposed: bool,
    kind: int,
    value: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dX, dW and db on the active rows; what is not needed is empty.

    `x` is X, or X[rows] with `rows`, and then `whole` is X if it still exists.
    """
    if not _is_ours(dy, x, weight):
        return _dense_backward(dy, x, weight, rows, transposed, need_dx, need_dw, need_db)
    start = time.perf_counter()
    rule = Rule(kind, value)
    dy2 = _flat(dy)
    active = _find_rows(dy2, rule)
    x2 = _flat(x) if need_dw else None
    compact = False
    if rows is not None and need_dw:
        x2, compact = _choose_x(active, rows, x2, whole)
    k = weight.shape[0 if transposed else 1]
    dx = dy.new_empty((*dy.shape[:-1], k) if need_dx else 0)
    dx2 = dx.view(dy2.shape[0], k) if need_dx else None
    dw = dy.new_empty(weight.shape if need_dw else 0)
    db = dy.new_empty(dy2.shape[1] if need_db else 0)
    run = _run_transposed if transposed else _run
    run(
        dy2,
        x2,
        _flat(weight) if need_dx else None,
        active,
        compact,
        dx2,
        dw if need_dw else None,
        db if need_db else None,
    )
    if need_dx and rule.kind == RULE_NONZERO:
        _remember(dx2, rule, active)
    _count(
        LayerKind(dy2.shape[1], k, dy.dtype, need_dx, need_dw),
        dy2.shape[0],
        len(active),
        time.perf_counter() - start,
    )
    return dx, dw, db


def _choose_x(
    active: Rows, rows: Tensor, kept: Tensor, whole: Tensor | None
) -> tuple[Tensor, bool]:
    """Pick the rows of X that belong to the active rows of dY; True: as a compact matrix.

    A mask only says which rows the forward may skip. Where a skipped row has a gradient all the
    same, its row of X is needed, which is there only if X is.
    """
    indices = _indices_of(active)
    positions = torch.searchsorted(rows, indices)
    if positions.numel() == 0:
        return kept[:0], True
    inside = positions < rows.numel()
    if bool((inside & (rows[positions.clamp(max=rows.numel() - 1)] == indices)).all()):
        return (kept if len(active) == rows.numel() else kept.index_select(0, positions)), True
    if whole is None:
        outside = indices[~torch.isin(indices, rows)]
        raise RuntimeError(
            f"sebp.padding: {outside.numel()} rows that the mask leaves out have a gradient (the"
            f" first is row {int(outside[0])}), but their inputs were not kept. Either the loss"
            " depends on padded tokens, and the mask is wrong; or a hook changes the gradients,"
            " and sebp.padding(mask, keep_inputs=True) is needed."
        )
    return _flat(whole), False


def _run(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    active: Rows,
    compact: bool,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    """Fill those of dX, dW and db that are there."""
    context = _context()
    options = LinearOptions(ctypes.sizeof(LinearOptions), x_is_compact=compact)
    context.check(
        load().sebp_linear_backward(
            context._handle,
            _view(dy),
            None if x is None else _view(x),
            None if weight is None else _view(weight),
            active._handle,
            options,
            None if dx is None else _view(dx),
            None if dw is None else _view(dw),
            None if db is None else _view(db),
        )
    )


def _run_transposed(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    active: Rows,
    compact: bool,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    """As :func:`_run` for a weight W: K x N. X and dY change places in dW, W and W^T in dX."""
    context = _context()
    if dx is not None:
        options = LinearOptions(ctypes.sizeof(LinearOptions))
        context.check(
            load().sebp_linear_forward(
                context._handle,
                _view(dy),
                _view(weight),
                None,
                active._handle,
                options,
                _view(dx),
            )
        )
    if db is not None:
        _run(dy, None, None, active, False, None, None, db)
    if dw is not None:
        if compact:
            dy = dy.index_select(0, _indices_of(active))
            active = Rows.all(len(active))
        _run(x, dy, None, active, False, None, dw, None)


def _dense_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    rows: Tensor | None,
    transposed: bool,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do without the library what it does not do, with all rows active."""
    dy2 = dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1])
    w = weight.t() if transposed else weight
    dx = dw = db = None
    if need_dx:
        dx = (dy2 @ w).view((*dy.shape[:-1], w.shape[1]))
    if need_dw:
        active = dy2 if rows is None else dy2.index_select(0, rows)
        x2 = x.reshape(active.shape[0], w.shape[1])
        dw = x2.t() @ active if transposed else active.t() @ x2
    if need_db:
        db = dy2.sum(0)
    return tuple(dy.new_empty(0) if t is None else t for t in (dx, dw, db))


@linear_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    rows: Tensor | None,
    whole: Tensor | None,
    transposed: bool,
    kind: int,
    value: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    k = weight.shape[0 if transposed else 1]
    return (
        dy.new_empty((*dy.shape[:-1], k) if need_dx else 0),
        dy.new_empty(weight.shape if need_dw else 0),
        dy.new_empty(dy.shape[-1] if need_db else 0),
    )


# Second derivatives, in PyTorch's own operators. With A the diagonal matrix that keeps the active
# rows, dX = A dY W, dW = (A dY)^T X and db = 1^T A dY.


@torch.library.custom_op("sebp::active_rows", mutates_args=())
def active_rows_op(dy: Tensor, kind: int, value: float) -> Tensor:
    """Mark the active rows of dY: M x 1, of dY's dtype, 1 or 0."""
    dy2 = _flat(dy)
    active = dy.new_zeros((dy2.shape[0], 1))
    if not _is_ours(dy):
        return active.fill_(1)
    return active.index_fill_(0, _indices_of(_find_rows(dy2, Rule(kind, value))), 1)


@active_rows_op.register_fake
def _(dy: Tensor, kind: int, value: float) -> Tensor:
    return dy.new_empty((math.prod(dy.shape[:-1]), 1))


def _setup_double(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    dy, x, weight, rows, _, ctx.transposed, ctx.kind, ctx.value, *ctx.needs = inputs
    ctx.save_for_backward(dy, x, weight, rows)


def _double_backward(
    ctx: torch.autograd.function.FunctionCtx, g_dx: Tensor, g_dw: Tensor, g_db: Tensor
) -> tuple:
    dy, x, weight, rows = ctx.saved_tensors
    need_dx, need_dw, need_db = ctx.needs
    w = weight.t() if ctx.transposed else weight
    n, k = w.shape
    total = math.prod(dy.shape[:-1])
    dy2 = dy.reshape(total, n)
    active = None
    if rows is not None:
        active = dy.new_zeros((total, 1)).index_fill(0, rows, 1)
        x = None if x is None else x.new_zeros((total, k)).index_copy(0, rows, x)
    elif ctx.kind != RULE_NONZERO:
        active = torch.ops.sebp.active_rows(dy.detach(), ctx.kind, ctx.value)
    kept_dy = dy2 if active is None else dy2 * active
    g_dy = dy2.new_zeros((total, n))
    g_x = g_w = None
    if need_dx:
        g_dx = g_dx.reshape(total, k)
        g_dy = g_dy + g_dx @ w.t()
        g_w = g_dx.t() @ kept_dy if ctx.transposed else kept_dy.t() @ g_dx
    if need_dw:
        g_dw = g_dw.t() if ctx.transposed else g_dw
        g_dy = g_dy + x.reshape(total, k) @ g_dw.t()
        g_x = kept_dy @ g_dw
        g_x = g_x.view((*dy.shape[:-1], k)) if rows is None else g_x.index_select(0, rows)
    if need_db:
        g_dy = g_dy + g_db
    if active is not None:
        g_dy = g_dy * active
    return (g_dy.view(dy.shape), g_x, g_w, *(None,) * 8)


linear_backward_op.register_autograd(_double_backward, setup_context=_setup_double)
