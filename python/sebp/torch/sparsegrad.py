# SPDX-License-Identifier: Apache-2.0
"""Putting SparseGrad and MeProp into a model."""

from collections.abc import Mapping

import torch
from torch import nn

from ..sparse import Basis
from .apply import Layers
from .feed_forward import choose_layers, place_of
from .sparse_base import check_base, numbers_of_steps, refuse_processes
from .sparse_layer import SparseLayer
from .sparse_optimizer import SparseOptimizer
from .sparse_settings import (
    Kind,
    Settings,
    as_integer,
    check_after,
    check_k,
    check_lapack,
    check_pair,
    check_rank,
)


def _make_kinds(chosen: list[tuple[str, nn.Module]]) -> list[Kind]:
    kinds: dict[str, Kind] = {}
    for name, module in chosen:
        n, k = module.weight.shape
        kind = f"{place_of(name)} {n}x{k}"
        kinds.setdefault(kind, Kind(kind, (n, k))).layers.append(name)
    return list(kinds.values())


def _check(optimizer: torch.optim.Optimizer, chosen: list[tuple[str, nn.Module]]) -> None:
    """Raise for what both methods refuse."""
    refuse_processes()
    if isinstance(optimizer, SparseOptimizer):
        raise TypeError("the optimizer has sparse layers already; give the one it was made with")
    check_base(optimizer)
    numbers_of_steps(optimizer, [(name, module.weight, 0) for name, module in chosen])


def apply_sparsegrad_to_model(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    k: int,
    basis_steps: int = 30,
    rank: int | tuple[int, int] | None = None,
    layers: Layers = None,
    *,
    bases: Mapping[str, Basis] | None = None,
    fix_support_after: int | None = None,
    accumulate: bool = False,
) -> SparseOptimizer:
    """Train a model's feed-forward layers by SparseGrad, all else by the user's optimizer.

    For `basis_steps` steps all weights train under the user's optimizer, and the gradients of these
    layers are summed for the bases, one pair for the layers at the same place of each block. Then
    only k elements of each gradient are computed and kept, in the bases' space, and AdamW's moments
    of them alone. W stays an ordinary weight. Use what is returned in the place of `optimizer`.

    Parameters
    ----------
    model : nn.Module
        Any model.
    optimizer : torch.optim.Optimizer
        Of all its parameters that train, these weights among them.
    k : int
        How many elements of each gradient are kept.
    basis_steps : int, default 30
        Steps from whose gradients bases are made.
    rank : int or (int, int), optional
        How many leading vectors of u_out and u_in. Default: all, or those of `bases`.
    layers : str, sequence of str, or callable, optional
        Which layers: shell patterns of names, or a function of name and module. Default: the
        feed-forward layers of BERT, RoBERTa, DistilBERT, GPT-2, Llama, Mistral and Qwen.
    bases : mapping of str to Basis, optional
        Bases made before, by the names of :attr:`SparseOptimizer.kinds`: there is no basis phase.
    fix_support_after : int, optional
        After so many steps in the bases' space go on with the k elements of largest second moment
        alone: state and gradient then take 20 bytes for each, which at k = 1.2% of the elements is
        2% of what full fine-tuning takes. Default: elements are chosen anew in each step, as in the
        paper, and moments of all that ever were are kept, 21 to 43 bytes each: more than 2%, and it
        grows with the steps.
    accumulate : bool, default False
        Allow more than one backward before a step while elements are chosen anew: each layer then
        holds its whole rotated gradient between them. With a fixed support it is not needed, but
        until there is one, and in the basis phase, a second backward is refused without it.

    Returns
    -------
    SparseOptimizer
        The optimizer to use.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what it should be; if a layer cannot be trained so; if the optimizer
        has sparse layers already, takes no step without a closure, or has ``maximize``,
        ``amsgrad``, ``warmup_steps`` or numbers that AdamW does not take; or if the basis phase is
        too short for the vectors asked for. The model is then as it was.
    SebpError
        If libsebp was built without LAPACK and there are no `bases`; or if a number of a group is
        out of range.
    RuntimeError
        Under ``torch.distributed``.
    """
    k, basis_steps = as_integer("k", k), as_integer("basis_steps", basis_steps)
    after, pair = check_after(fix_support_after), check_pair(rank)
    chosen = choose_layers(model, layers)
    _check(optimizer, chosen)
    kinds = _make_kinds(chosen)
    if bases is None and basis_steps < 1:
        raise ValueError(f"basis_steps is {basis_steps}, not 1 or more")
    for kind in kinds:
        if bases is None:
            check_rank(kind, pair or kind.shape, basis_steps)
            check_k(k, kind, pair or kind.shape)
            continue
        if kind.name not in bases:
            raise ValueError(f"there is no basis for {kind.name}")
        kind.basis = bases[kind.name]
        if not isinstance(kind.basis, Basis):
            raise TypeError(f"the basis of {kind.name} is {type(kind.basis).__name__}, not Basis")
        kind.shares = kind.basis.shares
        if kind.basis.shape != kind.shape:
            raise ValueError(f"{kind.name} is of {kind.shape}, its basis of {kind.basis.shape}")
        if pair is not None and kind.basis.rank != pair:
            raise ValueError(f"rank is {pair}, but the basis of {kind.name} has {kind.basis.rank}")
        check_k(k, kind, kind.basis.rank)
    if bases is None:
        check_lapack()
    settings = Settings(k, basis_steps if bases is None else 0, pair, after, bool(accumulate))
    made = [SparseLayer(name, module, settings) for name, module in chosen]
    return SparseOptimizer("SparseGrad", optimizer, kinds, made, settings, model.parameters())


def apply_meprop_to_model(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    k: int,
    layers: Layers = None,
    *,
    fix_support_after: int | None = None,
    accumulate: bool = False,
) -> SparseOptimizer:
    """Train a model's feed-forward layers by MeProp, as SparseGrad's paper runs it.

    The k largest elements of each weight's gradient are kept, without any bases; gradients of
    inputs and biases are whole. All arguments are those of :func:`apply_sparsegrad_to_model`.

    Returns
    -------
    SparseOptimizer
        The optimizer to use in the place of `optimizer`.

    Raises
    ------
    TypeError, ValueError, SebpError, RuntimeError
        As :func:`apply_sparsegrad_to_model`.
    """
    k, after = as_integer("k", k), check_after(fix_support_after)
    chosen = choose_layers(model, layers)
    _check(optimizer, chosen)
    kinds = _make_kinds(chosen)
    for kind in kinds:
        check_k(k, kind, kind.shape)
    settings = Settings(k, 0, None, after, bool(accumulate))
    made = [SparseLayer(name, module, settings) for name, module in chosen]
    return SparseOptimizer("MeProp", optimizer, kinds, made, settings, model.parameters())
