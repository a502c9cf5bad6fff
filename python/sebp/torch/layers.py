# SPDX-License-Identifier: Apache-2.0
"""The linear function, and the modules that use it."""

import os
import sys

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from .._rules import RowRule, Rule, parse_rule
from . import ops  # noqa: F401, registers sebp::linear
from .padding import current_padding

_DTYPES = (torch.float32, torch.bfloat16)


def _refusal(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """Say why PyTorch's own linear has to be used; "": it has not."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if x.dim() == 0 or weight.dim() != 2:
        return "shape"
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"device {tensor.device.type}"
        if tensor.layout != torch.strided:
            return f"layout {tensor.layout}"
        if tensor.dtype not in _DTYPES:
            return f"dtype {tensor.dtype}"
    if torch.is_autocast_enabled("cpu"):
        if torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return f"autocast to {torch.get_autocast_dtype('cpu')}"
    elif any(tensor.dtype != x.dtype for tensor in tensors):
        return "mixed dtypes"
    if not torch.compiler.is_compiling() and (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return "torch.func"
    return ""


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return functional.linear(x, weight.t() if transposed else weight, bias)


def _sparse(x: Tensor, weight: Tensor, bias: Tensor | None, rule: Rule, transposed: bool) -> Tensor:
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    padding = current_padding()
    if padding is None and not needs_grad:
        return _dense(x, weight, bias, transposed)
    reason = _refusal(x, weight, bias)
    if reason:
        if not torch.compiler.is_compiling() and os.environ.get("SEBP_VERBOSE") == "1":
            print(f"sebp,fallback,{tuple(x.shape)},{tuple(weight.shape)},{reason}", file=sys.stderr)
        return _dense(x, weight, bias, transposed)
    rows = kept = None
    if padding is not None and padding.fits(x):
        rows = padding.rows
        if needs_grad and not padding.keep_inputs:
            kept = padding.compact(x)
    elif not needs_grad:
        return _dense(x, weight, bias, transposed)
    return torch.ops.sebp.linear.default(x, weight, bias, rows, kept, transposed, *rule)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, rows: RowRule = "nonzero"
) -> Tensor:
    """Apply Y = X W^T + b, with a backward on the active rows of dY alone.

    What the library does not do (other devices and dtypes, ``torch.func``) PyTorch's own linear
    does; with SEBP_VERBOSE=1 a line on standard error says so.

    Parameters
    ----------
    x : Tensor, ... x K
        float32 or bfloat16, on the CPU, any strides.
    weight : Tensor, N x K
        Of X's dtype.
    bias : Tensor, N, optional
        Of X's dtype.
    rows : "nonzero", int, ("threshold", float) or ("energy", float)
        Which rows of dY to keep: those not all zero (exact), the k of largest norm, those with a
        magnitude over a threshold, or the fewest that hold a share 1 - delta of the energy.

    Returns
    -------
    Tensor, ... x N
        Y.

    Raises
    ------
    TypeError, ValueError
        For the rule.
    RuntimeError
        For shapes that do not go together, as PyTorch does.
    """
    return _sparse(x, weight, bias, parse_rule(rows), False)


class SebpLinear(nn.Linear):
    """An ``nn.Linear`` whose backward works on active rows alone.

    :func:`~sebp.apply_sebp_to_model` makes a layer one by changing its class, so that it stays the
    same object with the same parameters and hooks.

    Attributes
    ----------
    sebp_rule : Rule
        Which rows of dY to keep.
    """

    original_class = nn.Linear
    sebp_rule = Rule()

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to ... x K."""
        return _sparse(input, self.weight, self.bias, self.sebp_rule, False)

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f"{super().extra_repr()}, rows={self.sebp_rule}"
