# SPDX-License-Identifier: Apache-2.0
"""Norms, with the dropout and the residual that come before them in a block."""

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.overrides import handle_torch_function, has_torch_function

from ..._structs import ACCUMULATE, DropoutOptions, Matrix, NormOptions
from ..common.context import context_of
from ..common.seeds import draw_seed
from ..common.tensors import matrix_of, new_like
from ..linear_layers.direct import has_numbers
from .dropout import drop_again

_RMS = 1  # SEBP_RMS_NORM
_OVERWRITE = 0


class Norm(NamedTuple):
    """Which norm.

    Attributes
    ----------
    is_rms : bool
        RMSNorm, else LayerNorm.
    epsilon : float
        Added to the mean square, or to the variance.
    gain_offset : float
        Added to the gain: 1 where a model keeps the gain less 1.
    """

    is_rms: bool
    epsilon: float
    gain_offset: float = 0.0


def normalize(
    x: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    norm: Norm,
    residual: Tensor | None = None,
    *,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute h = residual + dropout(x), and the norm of h.

    Parameters
    ----------
    x : Tensor, ... x N
        float32 or bfloat16, contiguous.
    gain, shift : Tensor, N, or None
        float32 or bfloat16.
    norm : Norm
    residual : Tensor, ... x N, optional
        Of x's shape and dtype, contiguous.
    dropout : float
        Probability of dropout, in [0, 1).

    Returns
    -------
    y : Tensor, ... x N
        (h - mean) / sqrt(variance + epsilon) * gain + shift, of x's dtype, rounded once; an
        RMSNorm's has no mean, and the mean square for the variance.
    h : Tensor, ... x N
        The input of the norm; x itself where there is neither residual nor dropout.

    Raises
    ------
    SebpError
        If shapes, dtypes or options do not go together.
    """
    tensors = (x, gain, shift, residual)
    if has_torch_function(tensors):  # a mode that changes functions
        return handle_torch_function(
            normalize, tensors, x, gain, shift, norm, residual, dropout=dropout
        )
    options = NormOptions(
        ctypes.sizeof(NormOptions),
        norm.is_rms,
        norm.epsilon,
        norm.gain_offset,
        dropout,
        int(draw_seed()) if dropout > 0 else 0,
    )
    y, h = _Norm.apply(x, residual, gain, shift, options)
    return y, x if h is None else h


class _Norm(torch.autograd.Function):
    """y, and h where that is not x."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        residual: Tensor | None,
        gain: Tensor | None,
        shift: Tensor | None,
        options: NormOptions,
    ) -> tuple[Tensor, Tensor | None]:
        y = new_like(x)
        h = None if residual is None and options.dropout == 0 else new_like(x)
        statistics = x.new_empty((math.prod(x.shape[:-1]), 2), dtype=torch.float32)
        context_of(x, residual, gain, shift).call(
            "sebp_norm_forward",
            *_matrices(x, residual, gain, shift),
            None,
            options,
            *_matrices(h, y, statistics),
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if h is None else h, statistics, gain)
        ctx.options, ctx.shift_dtype = options, None if shift is None else shift.dtype
        return y, h

    @staticmethod
    def backward(
        ctx: FunctionCtx, dy: Tensor | None, dh: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Compute the gradients; `dh` is that of h, as the residual of what follows."""
        h, statistics, gain = ctx.saved_tensors
        options = ctx.options
        if dy is None:
            dy = torch.zeros_like(h)
        if torch.is_grad_enabled() or not has_numbers(dy, dh, h, gain):
            return _backward_in_torch(ctx, dy, dh, h, gain)
        need_x, need_residual, need_gain, need_shift, _ = ctx.needs_input_grad
        drops = options.dropout > 0
        gradient = dx = dgain = dshift = None
        if need_residual or dh is not None or (need_x and not drops):
            options.dh_write = _OVERWRITE if dh is None else ACCUMULATE
            gradient = (
                new_like(h) if dh is None else dh.clone(memory_format=torch.contiguous_format)
            )
        if need_x:
            dx = new_like(h) if drops else gradient
        if need_gain:
            dgain = new_like(gain)
        if need_shift:
            dshift = h.new_empty(h.shape[-1], dtype=ctx.shift_dtype)
        context_of(dy, h, gain).call(
            "sebp_norm_backward",
            *_matrices(dy, h, statistics, gain),
            None,
            options,
            *_matrices(gradient, dx if drops else None, dgain, dshift),
        )
        return dx, gradient if need_residual else None, dgain, dshift, None


def _matrices(*tensors: Tensor | None) -> list[Matrix | None]:
    return [None if tensor is None else matrix_of(tensor) for tensor in tensors]


def _backward_in_torch(
    ctx: FunctionCtx, dy: Tensor, dh: Tensor | None, h: Tensor, gain: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Compute the gradients in PyTorch's operators, which have a backward themselves."""
    options = ctx.options
    x, g = h.float(), dy.float()
    mean = 0.0 if options.norm == _RMS else x.mean(-1, keepdim=True)
    centred = x - mean
    scale = (centred.square().mean(-1, keepdim=True) + options.epsilon).rsqrt()
    unit = centred * scale
    outer = tuple(range(h.dim() - 1))
    dgain = None if gain is None else (g * unit).sum(outer).to(gain.dtype)
    dshift = None if ctx.shift_dtype is None else g.sum(outer).to(ctx.shift_dtype)
    if gain is not None:
        g = g * (gain.float() + options.gain_offset)
    along = unit * (g * unit).mean(-1, keepdim=True)
    if options.norm != _RMS:
        along = along + g.mean(-1, keepdim=True)
    gradient = (scale * (g - along)).to(h.dtype)
    if dh is not None:
        gradient = gradient + dh
    dx = gradient
    if options.dropout > 0:
        dx = gradient * drop_again(
            torch.ones_like(h),
            DropoutOptions(ctypes.sizeof(DropoutOptions), options.dropout, options.seed),
        )
    # An argument that is None takes no gradient.
    needs = ctx.needs_input_grad
    found = dx, gradient, dgain, dshift, None
    return tuple(one if need else None for one, need in zip(found, needs, strict=True))
