# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model SparseGrad, MeProp and LoRA are about."""

import re

import torch
from torch import nn

from .apply import Layers, chooser, linear_layers

# The two or three linear layers of a feed-forward block: BERT and RoBERTa, DistilBERT, and GPT-2,
# Llama, Mistral and Qwen.
_FEED_FORWARD = re.compile(
    r"(^|\.)\d+\.((intermediate|output)\.dense|ffn\.lin[12]|mlp\.(c_fc|c_proj|\w+_proj))$"
)
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def choose_layers(model: nn.Module, layers: Layers) -> list[tuple[str, nn.Module]]:
    """List the layers that are to be trained in another way.

    Parameters
    ----------
    model : nn.Module
        Any model.
    layers : str, sequence of str, or callable, optional
        Shell patterns of names, or a function of name and module. Default: the feed-forward layers
        of models of transformers, and of others that name theirs alike.

    Returns
    -------
    list of (str, nn.Module)
        ``nn.Linear`` and ``Conv1D``, with SEBP or without, in the order of the model.

    Raises
    ------
    ValueError
        If there are none; or if one of them is trained by a :class:`~sebp.torch.SparseOptimizer`,
        or has a weight that is not on the CPU, not of float32 or bfloat16, not row by row in
        memory, frozen, or shared with another module.
    """
    if layers is None:
        chosen = [(name, m) for name, m in linear_layers(model) if _FEED_FORWARD.search(name)]
    else:
        is_chosen = chooser(layers)
        chosen = [(name, m) for name, m in linear_layers(model) if is_chosen(name, m)]
    if not chosen:
        what = "no feed-forward layers known by name" if layers is None else f"none in {layers!r}"
        raise ValueError(f"no linear layer to train: {what}; see the argument layers")
    owners: dict[int, list[str]] = {}
    for owner, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(owner)
    for name, module in chosen:
        if reason := refusal(module.weight):
            raise ValueError(f"{name}: its weight {reason}")
        if not module.weight.requires_grad:
            raise ValueError(f"{name}: its weight is frozen")
        if any(getattr(hook, "is_in_use", False) for hook in module._forward_hooks.values()):
            raise ValueError(f"{name}: a SparseOptimizer has it already; release() that first")
        others = [owner for owner in owners[id(module.weight)] if owner != name]
        if others:
            raise ValueError(f"{name}: its weight is that of {others[0]}")
    return chosen


def refusal(weight: nn.Parameter) -> str:
    """Say why a weight cannot be trained by the library; "": it can."""
    if weight.device.type != "cpu":
        return f"is on {weight.device}"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"is of {weight.dtype}"
    return "" if weight.is_contiguous() else "is not row by row in memory"


def place_of(name: str) -> str:
    """Give what layers at the same place of each block have in common: "layer.*.output.dense"."""
    return _NUMBER.sub("*", name)
