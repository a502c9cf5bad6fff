# SPDX-License-Identifier: Apache-2.0
"""The linear function, and the forward of layers that use it."""

import os
import sys
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..._rules import RowRule, Rule, parse_rule
from ..common.devices import autocast_dtype, is_reachable
from ..common.forward import Forward, is_traced, is_transformed, put_in, take_out
from ..common.packing import current_packing
from ..common.tensors import DTYPES
from . import ops  # noqa: F401, registers sebp::linear
from .direct import PLAIN, direct_linear, is_direct


def _refused_kind(tensors: tuple[Tensor, ...]) -> str:
    """Return why tensors or calls of this kind are PyTorch's own, or ""."""
    if is_traced():
        return "tracing or export"
    is_compiling = torch.compiler.is_compiling()
    if any(tensor.is_nested for tensor in tensors):
        return "a nested tensor"
    for tensor in tensors:
        # A subclass knows best what a product with it is: quantized, distributed, nested, ...
        if not is_compiling and type(tensor) not in PLAIN:
            return f"a tensor of class {type(tensor).__name__}"
        if not is_reachable(tensor):
            return f"device {tensor.device.type}"
        if tensor.device != tensors[0].device:  # PyTorch has an error of its own
            return "several devices"
        if tensor.layout != torch.strided:
            return f"layout {tensor.layout}"
    return "torch.func" if is_transformed() else ""


def _refusal(tensors: tuple[Tensor, ...], transposed: bool, direct: bool, may_mix: bool) -> str:
    """Return why PyTorch's own linear has to be used, or "" if it has not."""
    # What is recorded is not direct.
    if not direct and (reason := _refused_kind(tensors)):
        return reason
    x, weight = tensors[:2]
    if weight.dim() != 2:
        return "shape"
    n, k = weight.shape
    if transposed:
        n, k = k, n
    if x.dim() == 0 or x.shape[-1] != k or (len(tensors) == 3 and tensors[2].shape != (n,)):
        return "shape"
    dtype = x.dtype
    is_mixed = False
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"dtype {tensor.dtype}"
        is_mixed = is_mixed or tensor.dtype != dtype
    if cast := autocast_dtype(x):
        return "" if cast == torch.bfloat16 else f"autocast to {cast}"
    return "mixed dtypes" if is_mixed and not may_mix else ""


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rule: Rule,
    transposed: bool,
    dtype: torch.dtype | None = None,
) -> Tensor | None:
    """Apply Y = X W^T + b, or X W + b, by ``sebp::linear``.

    Parameters
    ----------
    x : Tensor, ... x K
    weight : Tensor, N x K, or K x N if `transposed`
    bias : Tensor, N, or None
    rule : Rule
        Which rows of dY to keep.
    transposed : bool
    dtype : torch.dtype, optional
        Y's, where autocast does not choose it; operands may then be of either dtype. Default:
        theirs, which is one.

    Returns
    -------
    Tensor, ... x N, or None
        Y, or None where PyTorch's own linear has to be used.
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    needs_grad = torch.is_grad_enabled() and (
        weight.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
    )
    direct = needs_grad and is_direct(*tensors)
    may_mix = dtype in DTYPES
    reason = _refusal(tensors, transposed, direct, may_mix) if needs_grad else "no gradient"
    if reason:
        is_worth_a_line = needs_grad and not torch.compiler.is_compiling()
        if is_worth_a_line and os.environ.get("SEBP_VERBOSE") == "1":
            print(f"sebp,fallback,{tuple(x.shape)},{tuple(weight.shape)},{reason}", file=sys.stderr)
        return None
    packing = None if torch.compiler.is_compiling() else current_packing()
    mask = packing.mask if packing is not None and packing.counts(x) else None
    if autocast_dtype(x):
        dtype = torch.bfloat16  # operands are not cast: the product rounds them
    if direct:
        return direct_linear(x, weight, bias, mask, transposed, rule, dtype)
    return torch.ops.sebp.linear.default(x, weight, bias, mask, transposed, *rule, dtype)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, rows: RowRule = "nonzero"
) -> Tensor:
    """Apply Y = X W^T + b, with a backward on the active rows of dY alone.

    PyTorch's own linear does what the library does not: other devices and dtypes, subclasses of
    tensors, tracing and export, ``torch.func``. With SEBP_VERBOSE=1 a line on standard error says
    so.

    Under autocast to bfloat16 Y is bfloat16, and each operand may be of either dtype. None is cast:
    the product rounds them. Products of float32 are as exact as
    ``torch.set_float32_matmul_precision()`` asks for when they are computed, forward and backward.

    Parameters
    ----------
    x : Tensor, ... x K
        float32 or bfloat16, on the CPU or on a GPU that the library can work on, any strides.
    weight : Tensor, N x K
        Of X's dtype, but under autocast.
    bias : Tensor, N, optional
        Of X's dtype, but under autocast.
    rows : "nonzero", int, ("threshold", float), ("energy", float) or ("sampled", float)
        Which rows of dY to keep: those not all zero (exact), the k of largest norm, those with a
        magnitude over a threshold, the fewest that hold a share 1 - delta of the energy, or, for
        the gradients of weight and bias, a weighted sample of a share of the active rows
        (unbiased). Its seed comes from PyTorch's default generator, in each backward.

    Returns
    -------
    Tensor, ... x N
        Y, of X's dtype or autocast's. Gradients have the dtypes of what they are gradients of.

    Raises
    ------
    TypeError, ValueError
        For the rule.
    RuntimeError
        For shapes that do not go together, as PyTorch does.
    """
    y = sparse_linear(x, weight, bias, parse_rule(rows), False)
    return functional.linear(x, weight, bias) if y is None else y


# --------------------------------------------------------------------------------------------------
# Layers


def _forward(forward: Forward, *args: Tensor, **kwargs: Tensor) -> Tensor:
    layer = forward.module
    is_transposed = not isinstance(layer, nn.Linear)
    if kwargs and not args:
        name = "x" if is_transposed else "input"
        args, kwargs = ((kwargs[name],), {}) if [*kwargs] == [name] else (args, kwargs)
    # What the layer itself refuses; and a weight that a property computes, which may be another
    # one each time and is read once a forward.
    if len(args) != 1 or kwargs or hasattr(type(layer), "weight"):
        return forward.original(*args, **kwargs)
    y = sparse_linear(args[0], layer.weight, layer.bias, layer.sebp_rule, is_transposed)
    return forward.original(*args) if y is None else y


class _Scriptable:
    """Gives ``torch.jit.script`` the layer as PyTorch has it, which it then keeps in the model."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self) -> nn.Module:
        take_rule(self.layer)
        warnings.warn("torch.jit.script has taken SEBP out of the layers it compiles", stacklevel=2)
        return self.layer


def linear_classes() -> tuple[type, ...]:
    """Return ``nn.Linear``, and ``Conv1D`` if transformers is loaded."""
    module = sys.modules.get("transformers.pytorch_utils")
    return (nn.Linear,) if module is None else (nn.Linear, module.Conv1D)


def has_rule(layer: nn.Module) -> bool:
    """Return whether a layer has SEBP."""
    return "sebp_rule" in vars(layer)


def give_rule(layer: nn.Module, rule: Rule) -> None:
    """Give a layer a backward on active rows only.

    Parameters
    ----------
    layer : nn.Module
        An ``nn.Linear`` or ``Conv1D``. It stays the same object, of the same class.
    rule : Rule
        Which rows of dY to keep; the layer's ``sebp_rule`` from now on.
    """
    layer.sebp_rule = rule
    layer.__prepare_scriptable__ = _Scriptable(layer)
    put_in(layer, _forward)


def take_rule(layer: nn.Module) -> bool:
    """Undo :func:`give_rule`; False if the layer had no SEBP."""
    if not has_rule(layer):
        return False
    take_out(layer, _forward)
    del layer.sebp_rule, layer.__prepare_scriptable__
    return True
