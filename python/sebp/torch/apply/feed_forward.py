# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model SparseGrad, MeProp and LoRA train."""

import re
import warnings
from collections.abc import Callable

import torch
from torch import nn

from .layers import Layers, chooser, linear_layers

# The two or three linear layers of a feed-forward block: BERT and RoBERTa, DistilBERT, and GPT-2,
# Llama, Mistral and Qwen.
_FEED_FORWARD = re.compile(
    r"(^|\.)\d+\.((intermediate|output)\.dense|ffn\.lin[12]|mlp\.(c_fc|c_proj|\w+_proj))$"
)
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_TRAINED = (torch.float32, torch.bfloat16)
_FROZEN = (*_TRAINED, torch.float16, torch.float64)


def choose_layers(
    model: nn.Module, layers: Layers, *, frozen: bool = False
) -> list[tuple[str, nn.Module]]:
    """List the layers that one of these methods is to train.

    Parameters
    ----------
    model : nn.Module
        Any model.
    layers : str, sequence of str, or callable, optional
        Shell patterns of names, or a function of name and module. Default: the feed-forward layers
        of models of transformers, and of others that use the same names.
    frozen : bool, default False
        Whether the method does not train the weights themselves, so that they may be frozen.

    Returns
    -------
    list of (str, nn.Module)
        ``nn.Linear`` and ``Conv1D``, with SEBP or without, in the order of the model. A warning
        names others among those chosen: layers of a derived class, or with another forward.

    Raises
    ------
    ValueError
        If there are none; or if one of them is trained by a :class:`~sebp.torch.SparseOptimizer`,
        or has a weight that is not a parameter, as under ``weight_norm`` and pruning, not on the
        CPU, or in memory that another module's parameter has, too; or that is not of float32 or
        bfloat16, not row by row in memory, or frozen. With `frozen` it may be frozen, on a GPU, in
        any order in memory, and of float16 or float64 as well.
    """
    if layers is None:

        def is_chosen(name: str, module: nn.Module) -> bool:
            return _FEED_FORWARD.search(name) is not None

    else:
        is_chosen = chooser(layers)
    known = linear_layers(model)
    chosen = [(name, module) for name, module in known if is_chosen(name, module)]
    _warn_of_others(model, known, is_chosen)
    if not chosen:
        what = "no feed-forward layers known by name" if layers is None else f"none in {layers!r}"
        raise ValueError(f"no linear layer to train: {what}; see the argument layers")
    for name, module in chosen:
        if reason := refusal(module.weight, frozen=frozen):
            raise ValueError(f"{name}: its weight {reason}")
        if "weight" not in module._parameters:
            raise ValueError(f"{name}: its weight is not a parameter, but computed from others")
        if not (frozen or module.weight.requires_grad):
            raise ValueError(f"{name}: its weight is frozen")
        if any(getattr(hook, "is_in_use", False) for hook in module._forward_hooks.values()):
            raise ValueError(f"{name}: a SparseOptimizer has it already; release() that first")
    refuse_shared(model, chosen)
    return chosen


def _warn_of_others(
    model: nn.Module,
    known: list[tuple[str, nn.Module]],
    is_chosen: Callable[[str, nn.Module], bool],
) -> None:
    """Warn of layers that are linear by their class, and chosen, but not known to be so."""
    others = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, _ in known:
        others.pop(name, None)
    left = [(name, module) for name, module in others.items() if is_chosen(name, module)]
    if left:
        name, module = left[0]
        reason = f"its class is {type(module).__name__}"
        if "forward" in vars(module):
            reason = "its forward has been replaced"
        warnings.warn(
            f"{len(left)} linear layers are left as they are, such as {name}: {reason}",
            stacklevel=4,
        )


def refuse_shared(model: nn.Module, chosen: list[tuple[str, nn.Module]]) -> None:
    """Raise ValueError if a chosen weight lies where another module's parameter does.

    What is done to the weight would be done to that, too.
    """
    spans = [
        (owner, _span(parameter))
        for owner, module in model.named_modules()
        for parameter in module.parameters(recurse=False)
    ]
    for name, module in chosen:
        start, end = _span(module.weight)
        for owner, (other_start, other_end) in spans:
            if owner != name and start < other_end and other_start < end:
                raise ValueError(f"{name}: its weight is that of {owner}")


def _span(parameter: nn.Parameter) -> tuple[int, int]:
    """Return the first address of a parameter and the one after its last; (0, 0) if unknown."""
    if type(parameter) is not nn.Parameter or not (parameter.is_cpu or parameter.is_cuda):
        return 0, 0
    if parameter.numel() == 0:
        return 0, 0
    last = sum((n - 1) * step for n, step in zip(parameter.shape, parameter.stride(), strict=True))
    start = parameter.data_ptr()
    return start, start + (last + 1) * parameter.element_size()


def refusal(weight: nn.Parameter, *, frozen: bool = False) -> str:
    """Return why the library cannot train a weight, or one beside a `frozen` one; "" if it can."""
    if not (weight.is_cpu or (frozen and weight.is_cuda)):
        return f"is on {weight.device}"
    if weight.dtype not in (_FROZEN if frozen else _TRAINED):
        return f"is of {weight.dtype}"
    return "" if frozen or weight.is_contiguous() else "is not row by row in memory"


def place_of(name: str) -> str:
    """Return a layer's name without its numbers: "layer.*.output.dense"."""
    return _NUMBER.sub("*", name)
