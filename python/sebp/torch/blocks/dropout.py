# SPDX-License-Identifier: Apache-2.0
"""Dropout by a generator that works by counting, so that no mask is stored."""

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.overrides import handle_torch_function, has_torch_function_unary

from ..._structs import DropoutOptions
from ..common.context import context_of
from ..common.seeds import draw_seed
from ..common.tensors import matrix_of, new_like
from ..linear_layers.direct import has_numbers


def drop(x: Tensor, *, dropout: float) -> Tensor:
    """Set each element to zero with a probability p, and multiply the others by 1 / (1 - p).

    Parameters
    ----------
    x : Tensor
        float32 or bfloat16, contiguous.
    dropout : float
        p, in [0, 1). At 0 the result is x itself.

    Returns
    -------
    Tensor
        Of x's shape and dtype.

    Raises
    ------
    SebpError
        If `dropout` is out of range.
    """
    if has_torch_function_unary(x):  # a mode that changes functions
        return handle_torch_function(drop, (x,), x, dropout=dropout)
    if dropout == 0:
        return x
    options = DropoutOptions(ctypes.sizeof(DropoutOptions), dropout, int(draw_seed()))
    return _Drop.apply(x, options)


def drop_again(x: Tensor, options: DropoutOptions) -> Tensor:
    """Drop the elements that a call with the same options dropped, without autograd."""
    y = new_like(x)
    context_of(x).call("sebp_dropout_apply", _rows_of(x), None, options, _rows_of(y))
    return y


def _rows_of(x: Tensor) -> object:
    """Describe a tensor of any number of dimensions, as it is dropped: row by row."""
    return matrix_of(x if x.dim() > 0 else x[None])


class _Drop(torch.autograd.Function):
    """Y from X; the backward is the same function, and so is the backward of that."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, options: DropoutOptions) -> Tensor:
        ctx.options = options
        return drop_again(x, options)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, None]:
        if not has_numbers(dy):  # others step in, as with batched gradients: the library sees none
            ones = torch.ones(dy.shape, dtype=dy.dtype, device=dy.device)
            return dy * drop_again(ones, ctx.options), None
        if torch.is_grad_enabled():
            return _Drop.apply(dy, ctx.options), None
        return drop_again(dy, ctx.options), None
