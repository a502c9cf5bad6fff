# SPDX-License-Identifier: Apache-2.0
"""The operators ``sebp::linear`` and ``sebp::linear_backward``.

A weight is N x K, or K x N if `transposed` (as in Conv1D of transformers). A rule of
:mod:`sebp._rules` is given by its two numbers. `mask` is B x L, of the padded batch whose real
tokens X's rows are, where padding was taken out before; work is counted against its B * L rows, and
nothing else depends on it.
"""

import ctypes
import math
import time

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from .._library import load
from .._rules import Rule
from .._structs import ACCUMULATE, RULE_NONZERO, LinearOptions
from ..core import Rows
from .tensors import find_rows, flat, indices_of, is_ours, matrix_of, thread_context
from .work import LayerKind, count_work

# --------------------------------------------------------------------------------------------------
# sebp::linear


@torch.library.custom_op("sebp::linear", mutates_args=())
def linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    transposed: bool = False,
    kind: int = RULE_NONZERO,
    value: float = 0.0,
) -> Tensor:
    """Y = X W^T + b."""
    lead = x.shape[:-1]
    n = weight.shape[1 if transposed else 0]
    # PyTorch has oneDNN's product in bfloat16 too; in float32 it has MKL's, which on AMD's CPUs
    # takes twice as long. No result is a view: what follows may change it in place.
    if is_ours(x, weight, bias) and x.dtype == torch.float32:
        y = x.new_empty((*lead, n))
        _forward(x, weight, bias, transposed, y.view(math.prod(lead), n))
        return y
    w = _laid_out(weight)
    y = functional.linear(_laid_out(flat(x)), w.t() if transposed else w, bias)
    return torch.ops.aten._unsafe_view.default(y, (*lead, n))


def _laid_out(matrix: Tensor) -> Tensor:
    """Close the gaps between a matrix's rows.

    On Intel's processors with AMX PyTorch's product in bfloat16 reads past the rows of a matrix
    with gaps, and a NaN there gets into the result.
    """
    if matrix.dtype != torch.bfloat16 or matrix.t().is_contiguous():
        return matrix
    return matrix.contiguous()


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, y: Tensor) -> None:
    """Fill Y: M x N."""
    bias = None if bias is None else bias.contiguous()
    x, weight = flat(x), flat(weight)
    context = thread_context()
    options = LinearOptions(ctypes.sizeof(LinearOptions))
    if not transposed:
        context.check(
            load().sebp_linear_forward(
                context._handle,
                matrix_of(x),
                matrix_of(weight),
                None if bias is None else matrix_of(bias),
                None,
                options,
                matrix_of(y),
            )
        )
        return
    # X W, for W: K x N, is what the backward computes as dX = dY W; it is added to b.
    if bias is not None:
        options.dx_write = ACCUMULATE
        y.copy_(bias.expand(y.shape))
    all_rows = Rows.all(y.shape[0])
    context.check(
        load().sebp_linear_backward(
            context._handle,
            matrix_of(x),
            None,
            matrix_of(weight),
            all_rows._handle,
            options,
            matrix_of(y),
            None,
            None,
        )
    )


@linear_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    transposed: bool = False,
    kind: int = RULE_NONZERO,
    value: float = 0.0,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]))


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, weight, _, mask, ctx.transposed, ctx.kind, ctx.value = inputs
    # Not the mask itself: what checkpointing computes again has none, and has to save as much.
    ctx.total = math.prod(x.shape[:-1]) if mask is None else mask.numel()
    need_x, need_w, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if need_w else None, weight if need_x else None)


def _backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    # An argument left at its default is not among the inputs.
    needs = (*ctx.needs_input_grad, False)[:3]
    dx, dw, db = torch.ops.sebp.linear_backward(
        dy, x, weight, ctx.total, ctx.transposed, ctx.kind, ctx.value, *needs
    )
    return (
        dx if needs[0] else None,
        dw if needs[1] else None,
        db if needs[2] else None,
        *(None,) * 4,
    )


linear_op.register_autograd(_backward, setup_context=_setup)
linear_op.register_autocast("cpu", torch.bfloat16)


# --------------------------------------------------------------------------------------------------
# sebp::linear_backward


@torch.library.custom_op("sebp::linear_backward", mutates_args=())
def linear_backward_op(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    total: int,
    transposed: bool,
    kind: int,
    value: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dX, dW and db on the active rows; what is not needed is empty.

    `total` is the rows of the padded batch, against which work is counted.
    """
    if not is_ours(dy, x, weight):
        return _dense_backward(dy, x, weight, transposed, need_dx, need_dw, need_db)
    start = time.perf_counter()
    dy2 = flat(dy)
    active = find_rows(dy2, Rule(kind, value))
    n, k = _sizes(dy, x, weight, transposed)
    dx = dy.new_empty((*dy.shape[:-1], k) if need_dx else 0)
    dw = dy.new_empty(((k, n) if transposed else (n, k)) if need_dw else 0)
    db = dy.new_empty(n if need_db else 0)
    run = _run_transposed if transposed else run_backward
    run(
        dy2,
        flat(x) if need_dw else None,
        flat(weight) if need_dx else None,
        active,
        dx.view(dy2.shape[0], k) if need_dx else None,
        dw if need_dw else None,
        db if need_db else None,
    )
    count_work(
        LayerKind(n, k, dy.dtype, need_dx, need_dw),
        total,
        len(active),
        time.perf_counter() - start,
    )
    return dx, dw, db


def _sizes(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, transposed: bool
) -> tuple[int, int]:
    """Give N and K; K is 0 where neither dX nor dW is wanted."""
    if weight is not None:
        return dy.shape[-1], weight.shape[0 if transposed else 1]
    return dy.shape[-1], 0 if x is None else x.shape[-1]


def run_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    active: Rows,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    """Fill those of dX, dW and db that are there.

    Parameters
    ----------
    dy : Tensor, M x N
    x : Tensor, M x K, or None where dW is not wanted
    weight : Tensor, N x K, or None where dX is not wanted
    active : Rows
        Of M.
    dx : Tensor, M x K, or None
    dw : Tensor, N x K, or None
    db : Tensor, N, or None
    """
    context = thread_context()
    options = LinearOptions(ctypes.sizeof(LinearOptions))
    context.check(
        load().sebp_linear_backward(
            context._handle,
            matrix_of(dy),
            None if x is None else matrix_of(x),
            None if weight is None else matrix_of(weight),
            active._handle,
            options,
            None if dx is None else matrix_of(dx),
            None if dw is None else matrix_of(dw),
            None if db is None else matrix_of(db),
        )
    )


def _run_transposed(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    active: Rows,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    """As :func:`run_backward` for a weight W: K x N. X and dY change places in dW, W, W^T in dX."""
    context = thread_context()
    if dx is not None:
        options = LinearOptions(ctypes.sizeof(LinearOptions))
        context.check(
            load().sebp_linear_forward(
                context._handle,
                matrix_of(dy),
                matrix_of(weight),
                None,
                active._handle,
                options,
                matrix_of(dx),
            )
        )
    if db is not None:
        run_backward(dy, None, None, active, None, None, db)
    if dw is not None:
        run_backward(x, dy, None, active, None, dw, None)


def _dense_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    transposed: bool,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do without the library what it does not do, with all rows active."""
    dy2 = dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1])
    dx = dw = db = None
    if need_dx:
        w = weight.t() if transposed else weight
        dx = (dy2 @ w).view((*dy.shape[:-1], w.shape[1]))
    if need_dw:
        x2 = x.reshape(dy2.shape[0], x.shape[-1])
        dw = x2.t() @ dy2 if transposed else dy2.t() @ x2
    if need_db:
        db = dy2.sum(0)
    return tuple(dy.new_empty(0) if t is None else t for t in (dx, dw, db))


@linear_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    total: int,
    transposed: bool,
    kind: int,
    value: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, k = _sizes(dy, x, weight, transposed)
    return (
        dy.new_empty((*dy.shape[:-1], k) if need_dx else 0),
        dy.new_empty(((k, n) if transposed else (n, k)) if need_dw else 0),
        dy.new_empty(n if need_db else 0),
    )


# Second derivatives, in PyTorch's own operators. With A the diagonal matrix that keeps the active
# rows, dX = A dY W, dW = (A dY)^T X and db = 1^T A dY.


@torch.library.custom_op("sebp::active_rows", mutates_args=())
def active_rows_op(dy: Tensor, kind: int, value: float) -> Tensor:
    """Mark the active rows of dY: M x 1, of dY's dtype, 1 or 0."""
    dy2 = flat(dy)
    active = dy.new_zeros((dy2.shape[0], 1))
    if not is_ours(dy):
        return active.fill_(1)
    return active.index_fill_(0, indices_of(find_rows(dy2, Rule(kind, value))), 1)


@active_rows_op.register_fake
def _(dy: Tensor, kind: int, value: float) -> Tensor:
    return dy.new_empty((math.prod(dy.shape[:-1]), 1))


def _setup_double(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    dy, x, weight, _, ctx.transposed, ctx.kind, ctx.value, *ctx.needs = inputs
    ctx.save_for_backward(dy, x, weight)


def _double_backward(
    ctx: torch.autograd.function.FunctionCtx, g_dx: Tensor, g_dw: Tensor, g_db: Tensor
) -> tuple:
    dy, x, weight = ctx.saved_tensors
    need_dx, need_dw, need_db = ctx.needs
    n, k = _sizes(dy, x, weight, ctx.transposed)
    total = math.prod(dy.shape[:-1])
    dy2 = dy.reshape(total, n)
    active = None
    if ctx.kind != RULE_NONZERO:
        active = torch.ops.sebp.active_rows(dy.detach(), ctx.kind, ctx.value)
    kept_dy = dy2 if active is None else dy2 * active
    g_dy = dy2.new_zeros((total, n))
    g_x = g_w = None
    if need_dx:
        g_dx = g_dx.reshape(total, k)
        w = weight.t() if ctx.transposed else weight
        g_dy = g_dy + g_dx @ w.t()
        g_w = g_dx.t() @ kept_dy if ctx.transposed else kept_dy.t() @ g_dx
    if need_dw:
        g_dw = g_dw.t() if ctx.transposed else g_dw
        g_dy = g_dy + x.reshape(total, k) @ g_dw.t()
        g_x = (kept_dy @ g_dw).view((*dy.shape[:-1], k))
    if need_db:
        g_dy = g_dy + g_db
    if active is not None:
        g_dy = g_dy * active
    return (g_dy.view(dy.shape), g_x, g_w, *(None,) * 7)


linear_backward_op.register_autograd(_double_backward, setup_context=_setup_double)


# --------------------------------------------------------------------------------------------------
# What FLOP counters are told: the dense products, as of PyTorch's own linear


@register_flop_formula(torch.ops.sebp.linear)
def _linear_flop(
    x: torch.Size, weight: torch.Size, *args: object, out_shape: object = None, **kwargs: object
) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)


@register_flop_formula(torch.ops.sebp.linear_backward)
def _linear_backward_flop(
    dy: torch.Size,
    x: torch.Size | None,
    weight: torch.Size | None,
    total: int,
    transposed: bool,
    kind: int,
    value: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    *,
    out_shape: object = None,
) -> int:
    k = 0
    if weight is not None:
        k = weight[0 if transposed else 1]
    elif x is not None:
        k = x[-1]
    return 2 * math.prod(dy) * k * (need_dx + need_dw)
