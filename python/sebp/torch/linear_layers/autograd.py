# SPDX-License-Identifier: Apache-2.0
"""The autograd formulas of the operators of :mod:`.ops`: first and second derivatives."""

import functools
import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..._structs import RULE_NONZERO, RULE_SAMPLED
from .products import sizes

Dtypes = tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None]

# --------------------------------------------------------------------------------------------------
# Of sebp::linear


def dtypes_of(x: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Dtypes:
    """Return the dtypes of three tensors, None for those that are not there."""
    return (
        None if x is None else x.dtype,
        None if weight is None else weight.dtype,
        None if bias is None else bias.dtype,
    )


def wanted_dtypes(needs: tuple[bool, ...], dtypes: Dtypes) -> Dtypes:
    """Return the dtypes of those gradients that are needed, and None for the others."""
    x, weight, bias = dtypes
    return x if needs[0] else None, weight if needs[1] else None, bias if needs[2] else None


def only_wanted(gradients: tuple[Tensor, ...], wanted: Dtypes) -> tuple[Tensor | None, ...]:
    """Return None in place of what ``sebp::linear_backward`` returns where nothing is wanted."""
    return tuple(
        None if one is None else gradient for gradient, one in zip(gradients, wanted, strict=True)
    )


def save_for_backward(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    """Save what :func:`backward` needs."""
    x, weight, bias, mask, ctx.transposed, ctx.kind, ctx.value, _ = inputs
    # Not the mask itself: what checkpointing computes again has none, and has to save as much.
    ctx.total = math.prod(x.shape[:-1]) if mask is None else mask.numel()
    ctx.dtypes = dtypes_of(x, weight, bias)
    need_x, need_w, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if need_w else None, weight if need_x else None)


def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
    """Compute the gradients of the arguments of ``sebp::linear``, by ``sebp::linear_backward``."""
    x, weight = ctx.saved_tensors
    # An argument left at its default is not among the inputs.
    wanted = wanted_dtypes((*ctx.needs_input_grad, False), ctx.dtypes)
    found = torch.ops.sebp.linear_backward(
        dy, x, weight, ctx.total, ctx.transposed, ctx.kind, ctx.value, *wanted
    )
    return (*only_wanted(found, wanted), *(None,) * 5)


# --------------------------------------------------------------------------------------------------
# Of sebp::linear_backward, in PyTorch's own operators. With A the diagonal matrix that keeps the
# active rows, dX = A dY W, dW = (A dY)^T X and db = 1^T A dY.


def save_for_double_backward(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
    """Save what :func:`double_backward` needs."""
    dy, x, weight, _, ctx.transposed, ctx.kind, ctx.value, *wanted = inputs
    ctx.needs = [one is not None for one in wanted]
    ctx.save_for_backward(dy, x, weight)


def double_backward(ctx: FunctionCtx, g_dx: Tensor, g_dw: Tensor, g_db: Tensor) -> tuple:
    """Compute the gradients of the arguments of ``sebp::linear_backward``.

    Raises
    ------
    RuntimeError
        For a weighted sample: another one would be drawn here.
    """
    if ctx.kind == RULE_SAMPLED:
        raise RuntimeError(
            'a layer with rows=("sampled", share) has no second derivatives, as its dW is a sample'
        )
    dy, x, weight = ctx.saved_tensors
    need_dx, need_dw, need_db = ctx.needs
    n, k = sizes(dy, x, weight, ctx.transposed)
    total = math.prod(dy.shape[:-1])
    # One dtype for all, as under autocast they may differ.
    dtypes = dtypes_of(dy, x, weight)  # of what gradients are returned for
    dtype = functools.reduce(torch.promote_types, filter(None, dtypes))
    dy2, g_dx, g_dw, g_db = (t.to(dtype) for t in (dy.reshape(total, n), g_dx, g_dw, g_db))
    x, weight = (None if t is None else t.to(dtype) for t in (x, weight))
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
    found = g_dy.view(dy.shape), g_x, g_w
    cast = (None if g is None else g.to(d) for g, d in zip(found, dtypes, strict=True))
    return (*cast, *(None,) * 7)
