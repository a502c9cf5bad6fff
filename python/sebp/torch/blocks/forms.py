# SPDX-License-Identifier: Apache-2.0
"""The modules whose forwards the library computes, and how.

A module is known by its class, where that is PyTorch's own, or by what its forward does, step by
step: the models of transformers have the same few blocks under many names. Everything that may
change later is looked at in each call, and where it does not fit the module's own forward runs.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..direct import is_plain
from ..forward import Forward, is_replaced
from ..tensors import DTYPES
from .activation import Activation, activate
from .code import same_code
from .dropout import drop
from .norm import Norm, normalize
from .rotary import known_rotation, with_rotation


class Form(NamedTuple):
    """A kind of module.

    Attributes
    ----------
    name : str
        What such a module is, for reports.
    fits : callable
        Returns whether a module is one.
    forward : callable
        Its forward by the library, for :func:`~sebp.torch.forward.put_in`.
    """

    name: str
    fits: Callable[[nn.Module], bool]
    forward: Callable


def _can_do(*tensors: Tensor | None) -> bool:
    """Return whether the library can read these and nobody steps in."""
    return is_plain(*tensors) and all(
        tensor is None or (tensor.dtype in DTYPES and tensor.is_contiguous()) for tensor in tensors
    )


def _is_bare(module: nn.Module) -> bool:
    """Return whether a module runs no hooks and no forward of others, which may be left out."""
    every = torch.nn.modules.module
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
        or is_replaced(module)
    )


# --------------------------------------------------------------------------------------------------
# Dropout


def _is_dropout(module: nn.Module) -> bool:
    return type(module) is nn.Dropout and not module.inplace


def _dropout_of(module: nn.Module) -> float:
    """Return the probability of dropout; outside [0, 1) it is for PyTorch."""
    return module.p if module.training else 0.0


def _dropout_forward(forward: Forward, input: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return forward.original(input)
    dropout = _dropout_of(forward.module)
    if 0 < dropout < 1 and _is_dropout(forward.module) and _can_do(input):
        return drop(input, dropout=dropout)
    return forward.original(input)


# --------------------------------------------------------------------------------------------------
# Norms


def _llama_norm(self: nn.Module, x: Tensor) -> Tensor:
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * x.to(dtype)


def _olmo_norm(self: nn.Module, x: Tensor) -> Tensor:
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + self.variance_epsilon)
    return (self.weight * x).to(dtype)


def _t5_norm(self: nn.Module, x: Tensor) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + self.variance_epsilon)
    if self.weight.dtype in [torch.float16, torch.bfloat16]:
        x = x.to(self.weight.dtype)
    return self.weight * x


def _gemma_norm(self: nn.Module, x: Tensor) -> Tensor:
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float())
    return output.type_as(x)


def _gemma_unit(self: nn.Module, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def _norm_of(module: nn.Module) -> Norm | None:
    """Return which norm a module is, or None."""
    kind = type(module)
    if kind is nn.LayerNorm:
        return Norm(False, module.eps) if len(module.normalized_shape) == 1 else None
    if kind is nn.RMSNorm:
        is_fit = len(module.normalized_shape) == 1 and module.eps is not None
        return Norm(True, module.eps) if is_fit else None
    offset = _rms_offset(kind)
    if offset is None or "_norm" in vars(module) or not isinstance(module.weight, Tensor):
        return None
    return Norm(True, module.eps if offset else module.variance_epsilon, offset)


def _rms_offset(kind: type) -> float | None:
    """Return what a class adds to its gain, if it is an RMSNorm written out, or None."""
    for template in (_llama_norm, _olmo_norm, _t5_norm):
        if same_code(kind.forward, template):
            return 0.0
    unit = getattr(kind, "_norm", None)
    return 1.0 if same_code(kind.forward, _gemma_norm) and same_code(unit, _gemma_unit) else None


def _norm_by_library(
    module: nn.Module, x: Tensor, residual: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor] | None:
    """Compute a module's norm of residual + dropout(x), as :func:`normalize` does, or None.

    In mixed dtypes each module has rules of its own; only the plain cases are for the library.
    """
    norm = _norm_of(module)
    if norm is None or not 0 <= norm.epsilon < math.inf:
        return None
    gain, shift = module.weight, getattr(module, "bias", None)
    if not _can_do(x, residual, gain, shift) or x.dim() == 0:
        return None
    if any(one is not None and one.dtype != x.dtype for one in (residual, gain, shift)):
        return None
    if any(one is not None and one.shape != x.shape[-1:] for one in (gain, shift)):
        return None
    if gain is None and tuple(module.normalized_shape) != x.shape[-1:]:
        return None
    return normalize(x, gain, shift, norm, residual, dropout=dropout)


def _is_rms_norm(module: nn.Module) -> bool:
    """Return whether a module is an RMSNorm; a LayerNorm by itself PyTorch computes as fast."""
    norm = _norm_of(module)
    return norm is not None and norm.is_rms


def _is_usual(args: tuple, kwargs: dict) -> bool:
    """Return whether a call has one argument, a tensor, and no compiler is at work."""
    if torch.compiler.is_compiling():
        return False
    return len(args) == 1 and not kwargs and isinstance(args[0], Tensor)


def _norm_forward(forward: Forward, *args: object, **kwargs: object) -> Tensor:
    is_usual = _is_usual(args, kwargs)
    found = _norm_by_library(forward.module, args[0]) if is_usual else None
    return forward.original(*args, **kwargs) if found is None else found[0]


# --------------------------------------------------------------------------------------------------
# Activations


def _silu(self: nn.Module, input: Tensor) -> Tensor:
    return nn.functional.silu(input)


def _gelu_new(self: nn.Module, input: Tensor) -> Tensor:
    return (
        0.5
        * input
        * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (input + 0.044715 * torch.pow(input, 3.0))))
    )


def _gelu_fast(self: nn.Module, input: Tensor) -> Tensor:
    return 0.5 * input * (1.0 + torch.tanh(input * 0.7978845608 * (1.0 + 0.044715 * input * input)))


def _by_attribute(self: nn.Module, input: Tensor) -> Tensor:
    return self.act(input)


def _activation_of(module: nn.Module) -> Activation | None:
    """Return which activation a module is, or None."""
    kind = type(module)
    if kind is nn.GELU:
        return {"none": Activation.GELU, "tanh": Activation.GELU_TANH}.get(module.approximate)
    if kind is nn.SiLU:
        return None if module.inplace else Activation.SILU
    found = _written_activation(kind)
    return _activation_in(module) if found == "act" else found


def _written_activation(kind: type) -> Activation | str | None:
    """Return which activation a class writes out; "act" where its instances hold it."""
    if same_code(kind.forward, _silu):
        return Activation.SILU
    if same_code(kind.forward, _gelu_new) or same_code(kind.forward, _gelu_fast):
        return Activation.GELU_TANH
    return "act" if same_code(kind.forward, _by_attribute) else None


def _activation_in(module: nn.Module) -> Activation | None:
    act = vars(module).get("act")
    if act is nn.functional.gelu:
        return Activation.GELU
    is_partial = isinstance(act, functools.partial) and act.func is nn.functional.gelu
    if is_partial and not act.args and act.keywords == {"approximate": "tanh"}:
        return Activation.GELU_TANH
    return None


def _activation_forward(forward: Forward, *args: object, **kwargs: object) -> Tensor:
    if _is_usual(args, kwargs) and args[0].dim() > 0 and _can_do(args[0]):
        activation = _activation_of(forward.module)
        if activation is not None:
            return activate(args[0], activation)
    return forward.original(*args, **kwargs)


# --------------------------------------------------------------------------------------------------
# Blocks


def _post_norm(self: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    x = self.dense(x)
    x = self.dropout(x)
    x = self.LayerNorm(x + residual)
    return x  # noqa: RET504, as the models have it


def _is_post_norm(module: nn.Module) -> bool:
    return (
        same_code(type(module).forward, _post_norm)
        and _is_dropout(module.dropout)
        and _norm_of(module.LayerNorm) is not None
    )


def _post_norm_forward(forward: Forward, x: Tensor, residual: Tensor) -> Tensor:
    block = forward.module
    if torch.compiler.is_compiling() or not _is_post_norm(block):
        return forward.original(x, residual)
    dropout = _dropout_of(block.dropout)
    if not (0 <= dropout < 1 and _is_bare(block.dropout) and _is_bare(block.LayerNorm)):
        return forward.original(x, residual)
    x = block.dense(x)
    if x.shape == residual.shape:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        found = _norm_by_library(block.LayerNorm, x.to(dtype), residual.to(dtype), dropout)
        if found is not None:
            return found[0]
    return block.LayerNorm(block.dropout(x) + residual)


def _gated(self: nn.Module, x: Tensor) -> Tensor:
    y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return y  # noqa: RET504


def _gated_at_once(self: nn.Module, x: Tensor) -> Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _is_gated(module: nn.Module) -> bool:
    written, act = type(module).forward, getattr(module, "act_fn", None)
    return (
        (same_code(written, _gated) or same_code(written, _gated_at_once))
        and isinstance(act, nn.Module)
        and _activation_of(act) is not None
    )


def _gated_forward(forward: Forward, x: Tensor) -> Tensor:
    block = forward.module
    is_known = not torch.compiler.is_compiling() and _is_gated(block)
    if not (is_known and _is_bare(block.act_fn)):
        return forward.original(x)
    gate, up = block.gate_proj(x), block.up_proj(x)
    if gate.dim() > 0 and gate.shape == up.shape and gate.dtype == up.dtype and _can_do(gate, up):
        return block.down_proj(activate(gate, _activation_of(block.act_fn), up))
    return block.down_proj(block.act_fn(gate) * up)


def _has_rotation(module: nn.Module) -> bool:
    return known_rotation(type(module).forward) is not None


def _rotary_forward(forward: Forward, *args: object, **kwargs: object) -> object:
    """Run an attention's own forward, in which queries and keys are turned by the library."""
    written, rotation = type(forward.module).forward, None
    if not torch.compiler.is_compiling() and forward.previous is None:
        rotation = known_rotation(written)
    if rotation is None:
        return forward.original(*args, **kwargs)
    return with_rotation(written, rotation)(forward.module, *args, **kwargs)


FORMS = (
    Form("attention with rotary positions", _has_rotation, _rotary_forward),
    Form("dropout, residual and norm in one pass", _is_post_norm, _post_norm_forward),
    Form("gated activation in one pass", _is_gated, _gated_forward),
    Form("RMSNorm", _is_rms_norm, _norm_forward),
    Form("activation", lambda module: _activation_of(module) is not None, _activation_forward),
    Form("dropout", _is_dropout, _dropout_forward),
)
