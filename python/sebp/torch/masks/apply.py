# SPDX-License-Identifier: Apache-2.0
"""Applies a fixed mask to a model."""

from collections.abc import Mapping

import torch
from torch import nn

from ..apply.feed_forward import choose_layers
from ..apply.layers import Layers
from ..sparse.apply import check_optimizer, make_kinds
from ..sparse.settings import Settings, as_integer, check_k
from .layer import MaskLayer
from .optimizer import MaskOptimizer
from .supports import MASKS, OWN, OwnMasks, magnitude_support, own_supports, random_support


def apply_sparse_mask_to_model(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    k: int | None,
    mask: str | OwnMasks = "random",
    layers: Layers = None,
    *,
    seed: int = 0,
    gradient_steps: int = 1,
    accumulate: bool = False,
    rounding: str = "nearest",
) -> MaskOptimizer:
    """Train fixed elements of a model's feed-forward weights, the rest by the user's optimizer.

    Which k elements of each weight train is settled once. Of its gradient these alone are kept,
    which are computed on the active rows without the whole, and AdamW has moments of these alone,
    in 16 bytes each with their indices.
    The other elements never change, so what training has made is a sparse difference:
    :meth:`MaskOptimizer.adapter` returns it. Use the returned optimizer instead of `optimizer`.

    The masks are those of SHiRA (Bhardwaj et al., 2024) and, for "gradient", SIFT (Song et al.,
    2024).

    Parameters
    ----------
    model : nn.Module
        Any model.
    optimizer : torch.optim.Optimizer
        The optimizer of all parameters that train, including these weights.
    k : int or None
        How many elements of each weight train. With masks of one's own also None: as many as each
        mask has.
    mask : {"random", "gradient", "magnitude"} or mapping
        Which elements:

        - "random": drawn by `seed`, evenly;
        - "magnitude": those of the largest values of the weight;
        - "gradient": those with the largest gradient, summed over the first `gradient_steps` steps.
          In these steps the weights stand still, and all else trains. Their gradients are computed
          whole then, and take 4 bytes for each element of the weights, 8 from the second step on;
        - a mapping from a layer's name to a mask: a bool array or tensor of the shape that the
          weight has in memory, or indices, row * columns + column, ascending.
    layers : str, sequence of str, or callable, optional
        Which layers: shell patterns of names, or a function of name and module. Default: those of
        the mapping; else the feed-forward layers of BERT, RoBERTa, DistilBERT, GPT-2, Llama,
        Mistral and Qwen.
    seed : int, default 0
        Of the random mask, and of stochastic rounding. A layer's mask depends on it and on the
        layer's name.
    gradient_steps : int, default 1
        Of the mask by the gradient. A layer whose gradients are all zero waits for one that is not.
    accumulate : bool, default False
        Add up several backwards before a step even where nothing else trains, so that a
        ``zero_grad()`` of the model between them could not be seen.
    rounding : {"nearest", "stochastic"}
        How steps, and decay, are added to elements of bfloat16. To nearest, what is less than 2^-9
        of an element is lost. "stochastic" rounds up or down at random, so that the mean is right,
        without copies in float32. float32 weights are not concerned.

    Returns
    -------
    MaskOptimizer
        The optimizer to use.

    Raises
    ------
    TypeError, ValueError
        If an argument is not valid: an unknown mask, a `k` of 0 or over the elements that there
        are, a mask of another shape, of another number than `k`, or for no layer; if a layer cannot
        be trained so; if the optimizer has sparse layers already, or as
        :func:`apply_sparsegrad_to_model`. The model has not changed then.
    SebpError
        If a mask's indices are out of range, unsorted or repeated, or a weight holds a NaN or Inf
        where its magnitude is asked for; or if a number of a group is out of range.
    RuntimeError
        Under ``torch.distributed``.
    """
    own = mask if isinstance(mask, Mapping) else None
    if own is None and mask not in MASKS:
        raise ValueError(f"mask is {mask!r}, not one of {', '.join(MASKS)}, or masks by layer")
    if k is not None:
        k = as_integer("k", k)
    elif own is None:
        raise TypeError(f"k is None, but mask is {mask!r}, which needs a number of elements")
    settings = Settings(k, 0, None, None, accumulate, rounding=rounding, seed=seed).checked()
    gradient_steps = as_integer("gradient_steps", gradient_steps)
    if gradient_steps < 1:
        raise ValueError(f"gradient_steps is {gradient_steps}, not 1 or more")
    if own is not None and layers is None:
        chosen = choose_layers(model, lambda name, module: name in own)
    else:
        chosen = choose_layers(model, layers)
    check_optimizer(optimizer, chosen)
    kinds = make_kinds(chosen)
    if k is not None:
        for kind in kinds:
            check_k(k, kind, kind.shape)
    if own is not None:
        supports = own_supports(own, chosen, k)
    elif mask == "random":
        supports = {
            name: random_support(name, tuple(module.weight.shape), k, settings.seed)
            for name, module in chosen
        }
    elif mask == "magnitude":
        supports = {name: magnitude_support(name, module.weight, k) for name, module in chosen}
    else:
        supports = {}
    steps = 0 if supports else gradient_steps
    made = [MaskLayer(name, module, settings, supports.get(name), steps) for name, module in chosen]
    name = mask if own is None else OWN
    return MaskOptimizer(name, optimizer, kinds, made, settings, model.parameters())
