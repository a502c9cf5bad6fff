# SPDX-License-Identifier: Apache-2.0
"""LoRA on the active rows: a frozen weight, and a product of two thin matrices that trains."""

import math
import operator
import warnings

import torch
from torch import Tensor, nn

from ..._rules import Rule
from ...sparse import lora_merge
from ..common.context import thread_context
from ..common.devices import autocast_dtype
from ..common.tensors import DTYPES, matrix_of
from ..linear_layers.linear import sparse_linear
from .feed_forward import choose_layers, refusal
from .layers import Layers

_ATTRIBUTES = ("lora_a", "lora_b", "lora_scale", "lora_hook", "lora_weight_trains")
_NARROW = (torch.bfloat16, torch.float16)


def _add_product(module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor:
    """Add scale (X A) B to a layer's output. Both factors are transposed, as in ``Conv1D``."""
    x = args[0] if args else next(iter(kwargs.values()))
    a, b = module.lora_a, module.lora_b
    rule = getattr(module, "sebp_rule", Rule())
    if a.dtype in _NARROW and a.requires_grad and not torch.compiler.is_compiling():
        warnings.warn(
            f"factors of LoRA are of {a.dtype}, as the model was cast after they were added: the"
            " small steps of an optimizer are rounded away",
            stacklevel=2,
        )
    h = _product(x, a, rule)
    return (y + _product(module.lora_scale * h, b, rule)).to(y.dtype)


def _product(x: Tensor, factor: Tensor, rule: Rule) -> Tensor:
    """Multiply by a factor. Y is of its dtype, as it should not be rounded, or of autocast's."""
    is_cast = autocast_dtype(x) is not None
    if not is_cast and x.dtype not in DTYPES:
        x = x.to(factor.dtype)
    y = sparse_linear(x, factor, None, rule, True, factor.dtype)
    if y is not None:
        return y
    return (x if is_cast else x.to(factor.dtype)) @ factor


def _has_lora(module: nn.Module) -> bool:
    return _add_product in module._forward_hooks.values()


def _new_factors(module: nn.Module, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    weight = module.weight
    n, k = weight.shape if isinstance(module, nn.Linear) else reversed(weight.shape)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a = weight.new_empty((k, rank), dtype=dtype, requires_grad=False)
    b = weight.new_zeros((rank, n), dtype=dtype, requires_grad=False)
    nn.init.uniform_(a, -1 / math.sqrt(k), 1 / math.sqrt(k))
    return nn.Parameter(a), nn.Parameter(b)


def apply_lora_to_model(
    model: nn.Module, rank: int, alpha: float | None = None, layers: Layers = None
) -> list[str]:
    """Give a model's feed-forward layers Y = X W^T + b + (alpha / rank) (X A) B, in place.

    W is frozen. A: K x rank and B: rank x N are the layer's parameters ``lora_a`` and ``lora_b``.
    A starts at random as ``nn.Linear``'s weight does, B at zero. Make the optimizer afterwards.
    Biases and other layers are not changed.

    Where W is bfloat16 or float16, A and B are float32, as those are too coarse for the steps of
    most learning rates. Otherwise they have W's dtype. Products are computed in the dtype of A and
    B, or in that of autocast; Y has W's. A and B are parameters of the model like others. So freeze
    what is to be frozen before: ``requires_grad_(False)`` of the model would freeze them, too. And
    ``to(torch.bfloat16)`` of the model would cast them, too, and a forward then warns.

    Parameters
    ----------
    model : nn.Module
        Any model. The weights may be frozen, and of float32, bfloat16, float16 or float64.
    rank : int
        At least 1.
    alpha : float, optional
        Default: `rank`, so that the factor is 1.
    layers : str, sequence of str, or callable, optional
        Which layers: shell patterns of names, or a function of name and module. Default: the
        feed-forward layers of BERT, RoBERTa, DistilBERT, GPT-2, Llama, Mistral and Qwen.

    Returns
    -------
    list of str
        Their names.

    Raises
    ------
    TypeError
        If `rank` is no integer.
    ValueError
        If `rank` is below 1, `alpha` is not finite, or a layer cannot be trained so: it has LoRA
        already, is trained by a :class:`~sebp.torch.SparseOptimizer`, or its weight is not a
        parameter, of another dtype, on another device, or another module's as well. No layer has
        changed then.
    """
    rank = operator.index(rank)
    if rank < 1:
        raise ValueError(f"rank is {rank}, not 1 or more")
    scale = 1.0 if alpha is None else alpha / rank
    if not math.isfinite(scale):
        raise ValueError(f"alpha is {alpha}")
    chosen = choose_layers(model, layers, frozen=True)
    for name, module in chosen:
        if _has_lora(module):
            raise ValueError(f"{name}: it has LoRA already; merge_lora() first")
        for attribute in _ATTRIBUTES:
            if hasattr(module, attribute):
                raise ValueError(f"{name}: it has an attribute {attribute} of its own")
    factors = [_new_factors(module, rank) for _, module in chosen]
    for (_, module), (a, b) in zip(chosen, factors, strict=True):
        module.lora_a, module.lora_b, module.lora_scale = a, b, scale
        # Before all other hooks, as these should see the layer's whole output.
        module.lora_hook = module.register_forward_hook(
            _add_product, prepend=True, with_kwargs=True
        )
        module.lora_weight_trains = module.weight.requires_grad
        module.weight.requires_grad_(False)
    return [name for name, _ in chosen]


def _merge(module: nn.Module) -> None:
    """Add the product to the weight, each element rounded once."""
    a, b, weight = module.lora_a, module.lora_b, module.weight
    on_cpu = a.is_cpu and b.is_cpu
    if refusal(weight) or not on_cpu or a.dtype == torch.float64:
        weight.copy_(_merged(module))
        return
    a, b = a.float(), b.float()
    if not isinstance(module, nn.Linear):
        a, b = b.t().contiguous(), a.t().contiguous()
    lora_merge(matrix_of(a), matrix_of(b), module.lora_scale, matrix_of(weight), thread_context())
    torch.autograd.graph.increment_version(weight)


def _merged(module: nn.Module) -> Tensor:
    """Return the merged weight, computed by PyTorch where the library cannot."""
    dtype = torch.promote_types(module.weight.dtype, torch.float32)
    product = module.lora_scale * (module.lora_a.to(dtype) @ module.lora_b.to(dtype))
    if isinstance(module, nn.Linear):
        product = product.t()
    return (module.weight.to(dtype) + product).to(module.weight.dtype)


@torch.no_grad()
def merge_lora(model: nn.Module) -> list[str]:
    """Add each product to its weight, W += (alpha / rank) (A B)^T, and restore the layers.

    A weight trains again if it did before :func:`apply_lora_to_model`, and stays frozen if not. The
    sum is computed in float32 (in float64 where W is float64) and rounded once.

    Parameters
    ----------
    model : nn.Module
        Any model.

    Returns
    -------
    list of str
        The names of the layers that had LoRA; empty if none had.

    Raises
    ------
    ValueError
        If one of the matrices holds a NaN or Inf, or a weight of float16 would after the sum.
        Nothing has changed then.
    """
    layers = [(name, module) for name, module in model.named_modules() if _has_lora(module)]
    for name, module in layers:
        if not (module.lora_a.isfinite().all() and module.lora_b.isfinite().all()):
            raise ValueError(f"{name}: lora_a or lora_b holds a NaN or Inf; nothing was merged")
        if module.weight.dtype == torch.float16 and not _merged(module).isfinite().all():
            raise ValueError(f"{name}: its weight would hold a NaN or Inf; nothing was merged")
    for _, module in layers:
        _merge(module)
        module.weight.requires_grad_(module.lora_weight_trains)
        module.lora_hook.remove()
        for attribute in _ATTRIBUTES:
            delattr(module, attribute)
    return [name for name, _ in layers]
