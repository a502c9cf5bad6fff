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

from ..common.forward import Forward, has_own_forward, is_replaced
from ..common.tensors import DTYPES
from ..linear_layers.direct import is_plain
from .activation import Activation, activate
from .code import same_code
from .dropout import drop
from .norm import Norm, normalize
from .rotary import known_rotation, with_rotation

_CALL = nn.Module.__call__  # which tools replace for a while, to see each call


class Form(NamedTuple):
    """A kind of module.

    Attributes
    ----------
    name : str
        What such a module is, for reports.
    fits : callable
        Returns whether a module is one.
    forward : callable
        Its forward by the library, for :func:`~sebp.torch.common.forward.put_in`.
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
    """Return whether a module runs no hooks and nothing of others, which may be left out."""
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
        or type(module).__call__ is not _CALL
    )


def _is_of(module: nn.Module, kind: type) -> bool:
    """Return whether a module is of one of PyTorch's classes, as PyTorch has it."""
    return type(module) is kind and has_own_forward(kind)


# --------------------------------------------------------------------------------------------------
# Dropout


def _is_dropout(module: nn.Module) -> bool:
    return _is_of(module, nn.Dropout) and not module.inplace


def _dropout_of(module: nn.Module) -> float:
    """Return the probability of dropout; outside [0, 1) it is for PyTorch."""
    return module.p if module.training else 0.0


def _dropout_forward(forward: Forward, *args: object, **kwargs: object) -> Tensor:
    if _is_usual(args, kwargs):
        dropout = _dropout_of(forward.module)
        if 0 < dropout < 1 and _is_dropout(forward.module) and _can_do(args[0]):
            return drop(args[0], dropout=dropout)
    return forward.original(*args, **kwargs)


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
    is_rms = _is_of(module, nn.RMSNorm)
    if is_rms or _is_of(module, nn.LayerNorm):
        is_fit = len(module.normalized_shape) == 1 and _is_number(module.eps)
        return Norm(is_rms, module.eps) if is_fit else None
    offset = _rms_offset(type(module))
    # A gain that a property computes may be another one each time, and is read once a forward.
    if offset is None or "_norm" in vars(module) or hasattr(type(module), "weight"):
        return None
    epsilon = getattr(module, "eps" if offset else "variance_epsilon", None)
    is_fit = isinstance(getattr(module, "weight", None), Tensor) and _is_number(epsilon)
    return Norm(True, epsilon, offset) if is_fit else None


def _is_number(value: object) -> bool:
    """Return whether it is a number, and not a parameter that is learned."""
    return isinstance(value, (int, float))


def _rms_offset(kind: type) -> float | None:
    """Return what a class adds to its gain, if it is an RMSNorm written out, or None."""
    forward, unit = _written(kind), getattr(kind, "_norm", None)
    if any(same_code(forward, template) for template in (_llama_norm, _olmo_norm, _t5_norm)):
        return 0.0
    return 1.0 if same_code(forward, _gemma_norm) and same_code(unit, _gemma_unit) else None


def _written(kind: type) -> object:
    """Return a class's forward, or None; a scripted module's has none."""
    return getattr(kind, "forward", None)


def _norm_by_library(
    module: nn.Module, x: Tensor, residual: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor] | None:
    """Compute a module's norm of residual + dropout(x), as :func:`normalize` does, or None.

    In mixed dtypes each module has rules of its own; only the plain cases are for the library.
    """
    norm = _norm_of(module)
    if norm is None or not 0 <= norm.epsilon < math.inf:
        return None
    gain, shift = module.weight, None if norm.is_rms else module.bias
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


def _is_usual(args: tuple, kwargs: dict, count: int = 1) -> bool:
    """Return whether a call has so many arguments, tensors without a name, and none compiles it."""
    if torch.compiler.is_compiling():
        return False
    return len(args) == count and not kwargs and all(isinstance(one, Tensor) for one in args)


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
    if _is_of(module, nn.GELU):
        return {"none": Activation.GELU, "tanh": Activation.GELU_TANH}.get(module.approximate)
    if _is_of(module, nn.SiLU):
        return None if module.inplace else Activation.SILU
    found = _written_activation(type(module))
    return _activation_in(module) if found == "act" else found


def _written_activation(kind: type) -> Activation | str | None:
    """Return which activation a class writes out; "act" where its instances hold it."""
    forward = _written(kind)
    if same_code(forward, _silu):
        return Activation.SILU
    if same_code(forward, _gelu_new) or same_code(forward, _gelu_fast):
        return Activation.GELU_TANH
    return "act" if same_code(forward, _by_attribute) else None


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
        same_code(_written(type(module)), _post_norm)
        and _is_dropout(getattr(module, "dropout", None))
        and _norm_of(getattr(module, "LayerNorm", None)) is not None
    )


def _post_norm_forward(forward: Forward, *args: object, **kwargs: object) -> Tensor:
    block = forward.module
    if not _is_usual(args, kwargs, 2) or not _is_post_norm(block):
        return forward.original(*args, **kwargs)
    dropout = _dropout_of(block.dropout)
    if not (0 <= dropout < 1 and _is_bare(block.dropout) and _is_bare(block.LayerNorm)):
        return forward.original(*args)
    x, residual = args
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
    written, act = _written(type(module)), getattr(module, "act_fn", None)
    return (
        (same_code(written, _gated) or same_code(written, _gated_at_once))
        and isinstance(act, nn.Module)
        and _activation_of(act) is not None
    )


def _gated_forward(forward: Forward, *args: object, **kwargs: object) -> Tensor:
    block = forward.module
    if not (_is_usual(args, kwargs) and _is_gated(block) and _is_bare(block.act_fn)):
        return forward.original(*args, **kwargs)
    (x,) = args
    gate, up = block.gate_proj(x), block.up_proj(x)
    if gate.dim() > 0 and gate.shape == up.shape and gate.dtype == up.dtype and _can_do(gate, up):
        return block.down_proj(activate(gate, _activation_of(block.act_fn), up))
    return block.down_proj(block.act_fn(gate) * up)


def _has_rotation(module: nn.Module) -> bool:
    return known_rotation(_written(type(module))) is not None


def _rotary_forward(forward: Forward, *args: object, **kwargs: object) -> object:
    """Run an attention's own forward, in which queries and keys are turned by the library."""
    written, rotation = _written(type(forward.module)), None
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
