# SPDX-License-Identifier: Apache-2.0
"""LoRA on the active rows: a frozen weight, and a product of two thin matrices that trains."""

import math

import torch
from torch import Tensor, nn

from .._rules import Rule
from ..sparse import lora_merge
from .apply import Layers
from .feed_forward import choose_layers
from .layers import sparse_linear
from .tensors import array_of, thread_context


def _add_product(module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor:
    """Add scale (X A) B to a layer's output. Both factors lie as a ``Conv1D``'s weight does."""
    x = args[0] if args else next(iter(kwargs.values()))
    rule = getattr(module, "sebp_rule", Rule())
    h = _product(x, module.lora_a, rule)
    return y + _product(module.lora_scale * h, module.lora_b, rule)


def _product(x: Tensor, factor: Tensor, rule: Rule) -> Tensor:
    y = sparse_linear(x, factor, None, rule, True)
    return x @ factor if y is None else y


def apply_lora_to_model(
    model: nn.Module, rank: int, alpha: float | None = None, layers: Layers = None
) -> list[str]:
    """Give a model's feed-forward layers Y = X W^T + b + (alpha / rank) (X A) B, in place.

    W is frozen; A: K x rank, which starts at random as ``nn.Linear``'s weight does, and B: rank x
    N, which starts at zero, are the layer's parameters ``lora_a`` and ``lora_b``, for any
    optimizer made afterwards. Biases and other layers are left as they are.

    Parameters
    ----------
    model : nn.Module
        Any model.
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
    ValueError
        If `rank` is below 1, `alpha` is not finite, or a layer cannot be trained so.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}, not 1 or more")
    scale = 1.0 if alpha is None else alpha / rank
    if not math.isfinite(scale):
        raise ValueError(f"alpha is {alpha}")
    chosen = choose_layers(model, layers)
    for _, module in chosen:
        weight = module.weight
        n, k = weight.shape if isinstance(module, nn.Linear) else reversed(weight.shape)
        a, b = weight.new_empty(k, rank), weight.new_zeros(rank, n)
        nn.init.uniform_(a, -1 / math.sqrt(k), 1 / math.sqrt(k))
        module.lora_a, module.lora_b = nn.Parameter(a), nn.Parameter(b)
        module.lora_scale = scale
        # First of all hooks, as others are to see the layer's whole output.
        module.lora_hook = module.register_forward_hook(
            _add_product, prepend=True, with_kwargs=True
        )
        weight.requires_grad_(False)
    return [name for name, _ in chosen]


@torch.no_grad()
def merge_lora(model: nn.Module) -> list[str]:
    """Add each product to its weight, W += (alpha / rank) (A B)^T, and make layers what they were.

    Parameters
    ----------
    model : nn.Module
        Any model.

    Returns
    -------
    list of str
        The names of the layers that had LoRA.

    Raises
    ------
    ValueError
        If one of the matrices holds a NaN or Inf: nothing has changed then.
    """
    names = []
    layers = [(n, module) for n, module in model.named_modules() if hasattr(module, "lora_hook")]
    for name, module in layers:
        if not (module.lora_a.isfinite().all() and module.lora_b.isfinite().all()):
            raise ValueError(f"{name}: lora_a or lora_b holds a NaN or Inf; nothing was merged")
    for name, module in layers:
        a, b, weight = module.lora_a, module.lora_b, module.weight
        if not isinstance(module, nn.Linear):
            a, b = b.t().contiguous(), a.t().contiguous()
        lora_merge(array_of(a), array_of(b), module.lora_scale, array_of(weight), thread_context())
        torch.autograd.graph.increment_version(weight)
        weight.requires_grad_(True)
        module.lora_hook.remove()
        for attribute in ("lora_a", "lora_b", "lora_scale", "lora_hook"):
            delattr(module, attribute)
        names.append(name)
    return names
