# SPDX-License-Identifier: Apache-2.0
"""Activations of a Transformer's feed-forward layers, gated or not."""

import ctypes
import functools
from enum import IntEnum

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

from ..._structs import ActivationOptions
from ..common.context import context_of
from ..common.tensors import matrix_of, new_like
from ..linear_layers.direct import has_numbers


class Activation(IntEnum):
    """``sebp_activation`` of activation.h, but for ReLU, which PyTorch computes as fast."""

    GELU = 0
    GELU_TANH = 1
    SILU = 2


def _silu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Do what PyTorch's operator of this name does, which has no backward."""
    s = torch.sigmoid(x)
    return dy * s * (1 + x * (1 - s))


_aten = torch.ops.aten
_BACKWARDS = {
    Activation.GELU: _aten.gelu_backward,
    Activation.GELU_TANH: functools.partial(_aten.gelu_backward, approximate="tanh"),
    Activation.SILU: _silu_backward,
}
_FORWARDS = {
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: functools.partial(functional.gelu, approximate="tanh"),
    Activation.SILU: functional.silu,
}


def activate(x: Tensor, activation: Activation, up: Tensor | None = None) -> Tensor:
    """Compute f(x), or gated f(x) * up.

    Parameters
    ----------
    x : Tensor, ... x N
        float32 or bfloat16, contiguous.
    activation : Activation
        f.
    up : Tensor, ... x N, optional
        Of x's shape and dtype, contiguous.

    Returns
    -------
    Tensor, ... x N
        Of x's dtype, rounded once.
    """
    if has_torch_function((x, up)):  # a mode that changes functions
        return handle_torch_function(activate, (x, up), x, activation, up)
    return _Activate.apply(x, up, activation)


class _Activate(torch.autograd.Function):
    """Y from X, or from gate and up."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, up: Tensor | None, activation: Activation) -> Tensor:
        y = new_like(x)
        options = ActivationOptions(ctypes.sizeof(ActivationOptions))
        inputs = matrix_of(x), None if up is None else matrix_of(up)
        context_of(x, up).call(
            "sebp_activation_forward", activation, *inputs, None, options, matrix_of(y)
        )
        ctx.save_for_backward(x, up)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, up = ctx.saved_tensors
        # For second derivatives, and where others step in, in operators that have them.
        if torch.is_grad_enabled() or not has_numbers(dy, x, up):
            gradient = dy if up is None else dy * up
            dup = None if up is None else dy * _FORWARDS[ctx.activation](x)
            return _BACKWARDS[ctx.activation](gradient, x), dup, None
        need_x, need_up, _ = ctx.needs_input_grad
        dx = new_like(x) if need_x else None
        dup = new_like(up) if need_up else None
        options = ActivationOptions(ctypes.sizeof(ActivationOptions))
        inputs = (None if one is None else matrix_of(one) for one in (dy, x, up))
        outputs = (None if one is None else matrix_of(one) for one in (dx, dup))
        context_of(dy, x, up).call(
            "sebp_activation_backward", ctx.activation, *inputs, None, options, *outputs
        )
        return dx, dup, None
