# SPDX-License-Identifier: Apache-2.0
"""Applies SparseGrad, MeProp and GaLore to a model."""

from collections.abc import Mapping

import torch
from torch import nn

from ...sparse import Basis
from ..apply.feed_forward import choose_layers, place_of
from ..apply.layers import Layers
from .base_optimizer import check_base, numbers_of_steps, refuse_processes, warn_of_rates
from .galore import GaloreLayer
from .layer import SparseLayer
from .optimizer import SparseOptimizer
from .settings import (
    Kind,
    Settings,
    as_integer,
    check_k,
    check_lapack,
    check_projection,
    check_rank,
)


def make_kinds(chosen: list[tuple[str, nn.Module]]) -> list[Kind]:
    """Put layers at the same place of each block, and of one shape, together."""
    kinds: dict[str, Kind] = {}
    for name, module in chosen:
        n, k = module.weight.shape
        kind = f"{place_of(name)} {n}x{k}"
        kinds.setdefault(kind, Kind(kind, (n, k))).layers.append(name)
    return list(kinds.values())


def check_optimizer(optimizer: torch.optim.Optimizer, chosen: list[tuple[str, nn.Module]]) -> None:
    """Raise for what all methods refuse, and warn of rates that may be none of AdamW's."""
    refuse_processes()
    if isinstance(optimizer, SparseOptimizer):
        raise TypeError("the optimizer has sparse layers already; give the one it was made with")
    check_base(optimizer)
    numbers_of_steps(optimizer, [(name, module.weight, 0) for name, module in chosen])
    warn_of_rates(optimizer)


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
    drop_after: int | None = None,
    basis_rate_factor: float | None = None,
    measure_energy_every: int | None = None,
    rounding: str = "nearest",
    seed: int = 0,
) -> SparseOptimizer:
    """Train a model's feed-forward layers by SparseGrad, the rest by the user's optimizer.

    For `basis_steps` steps the user's optimizer trains all weights, those of these layers at a
    lower rate, and their gradients are summed for the bases. Layers at the same place of each block
    share a pair of bases. Then only k elements of each gradient, in the bases' space, are
    computed and kept, and AdamW's moments of these. W stays an ordinary weight. Use the returned
    optimizer instead of `optimizer`.

    Parameters
    ----------
    model : nn.Module
        Any model.
    optimizer : torch.optim.Optimizer
        The optimizer of all parameters that train, including these weights.
    k : int
        How many elements of each gradient are kept.
    basis_steps : int, default 30
        The number of steps from whose gradients the bases are made.
    rank : int or (int, int), optional
        How many leading vectors of u_out and u_in. Default: all, or those of `bases`.
    layers : str, sequence of str, or callable, optional
        Which layers: shell patterns of names, or a function of name and module. Default: the
        feed-forward layers of BERT, RoBERTa, DistilBERT, GPT-2, Llama, Mistral and Qwen.
    bases : mapping of str to Basis, optional
        Bases made before, by the names of :attr:`SparseOptimizer.kinds`. There is then no basis
        phase.
    fix_support_after : int, optional
        After how many steps in the bases' space the elements are fixed: the k of largest second
        moment, once there is one that is not 0. State and gradient then take 20 bytes for each,
        which at k = 1.2% of the elements is 2% of full fine-tuning's. Default: elements are chosen
        anew in each step, as in the paper. Moments of all that were ever chosen are then kept, in
        22 to 43 bytes each, which is more than 2% and grows with the steps, unless `drop_after`
        bounds it.
    accumulate : bool, default False
        Allow more than one backward before a step in the basis phase and while elements are chosen
        anew. In the latter case each layer holds its whole rotated gradient between them. With a
        fixed support several backwards are allowed anyway where another parameter had a gradient in
        the first one: if nothing else trains, a ``zero_grad()`` of the model between them could not
        be seen.
    drop_after : int, optional
        While elements are chosen anew, drop after each so many steps the moments of those that were
        not chosen since the last time: what has not been among the k for n to 2 n steps. Moments of
        at most 2 n k elements are then kept. One that is chosen again begins as a new one.
    basis_rate_factor : float, optional
        In the basis phase the learning rate of these layers' weights is that of their group, times
        this. 1: the paper's. Default: sqrt(k / (N K)), a tenth where k is 1% of the elements. All
        elements move then, so at a rate that suits k of them a full step is 1 / factor times as
        long as those that follow. It has wrecked pretrained models within 30 steps.
    measure_energy_every : int, optional
        After each so many steps measure which share of the gradients' energy the leading vectors of
        both sides hold together: ``block_shares`` of each kind, and ``print(optimizer)``. It takes
        the time of these weights' dW in full fine-tuning in that step, and one dW of memory.
        Default: only at the end of the basis phase, where dW is at hand.
    rounding : {"nearest", "stochastic"}
        How steps are added to bfloat16 weights after the basis phase, and their decay. To nearest,
        what is less than 2^-9 of an element is lost. "stochastic" rounds up or down at random, so
        that the mean is right, without a copy in float32; it takes the memory of one such weight in
        float32, which all layers share. float32 weights are not concerned.
    seed : int, default 0
        Of these random numbers.

    Returns
    -------
    SparseOptimizer
        The optimizer to use.

    Raises
    ------
    TypeError, ValueError
        If an argument is not valid; if a layer cannot be trained so; if the optimizer has sparse
        layers already, needs a closure, or has ``maximize``, ``amsgrad``, ``warmup_steps`` or
        numbers that AdamW does not take; or if the basis phase is too short for `rank` vectors. The
        model has not changed then.
    SebpError
        If libsebp was built without LAPACK and there are no `bases`; or if a number of a group is
        out of range.
    RuntimeError
        Under ``torch.distributed``.
    """
    settings = Settings(
        k,
        basis_steps,
        rank,
        fix_support_after,
        accumulate,
        basis_rate_factor=basis_rate_factor,
        measure_energy_every=measure_energy_every,
        drop_after=drop_after,
        rounding=rounding,
        seed=seed,
    ).checked()
    k, pair = settings.k, settings.rank
    chosen = choose_layers(model, layers)
    check_optimizer(optimizer, chosen)
    kinds = make_kinds(chosen)
    if bases is None and settings.basis_steps < 1:
        raise ValueError(f"basis_steps is {settings.basis_steps}, not 1 or more")
    for kind in kinds:
        if bases is None:
            check_rank(kind, pair or kind.shape, settings.basis_steps)
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
    if bases is not None:
        settings = settings._replace(basis_steps=0)
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
    drop_after: int | None = None,
    rounding: str = "nearest",
    seed: int = 0,
) -> SparseOptimizer:
    """Train a model's feed-forward layers by MeProp, as SparseGrad's paper runs it.

    The k largest elements of each weight's gradient are kept, without bases. Gradients of inputs
    and biases are whole. The arguments are those of :func:`apply_sparsegrad_to_model`.

    Returns
    -------
    SparseOptimizer
        The optimizer to use instead of `optimizer`.

    Raises
    ------
    TypeError, ValueError, SebpError, RuntimeError
        As :func:`apply_sparsegrad_to_model`.
    """
    settings = Settings(
        k,
        0,
        None,
        fix_support_after,
        accumulate,
        drop_after=drop_after,
        rounding=rounding,
        seed=seed,
    ).checked()
    chosen = choose_layers(model, layers)
    check_optimizer(optimizer, chosen)
    kinds = make_kinds(chosen)
    for kind in kinds:
        check_k(settings.k, kind, kind.shape)
    made = [SparseLayer(name, module, settings) for name, module in chosen]
    return SparseOptimizer("MeProp", optimizer, kinds, made, settings, model.parameters())


def apply_galore_to_model(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int,
    layers: Layers = None,
    *,
    refresh_every: int = 200,
    scale: float = 0.25,
    accumulate: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
) -> SparseOptimizer:
    """Train a model's layers by GaLore, the rest by the user's optimizer.

    Each weight's gradient is projected onto its `rank` leading singular vectors on the weight's
    smaller side, and AdamW's moments are kept of the projection R alone. All elements of W move. R
    is computed on the active rows, and the whole gradient of one layer at a time only where its
    vectors are chosen: in the first step and each `refresh_every` steps. Moments then go on as they
    are, as in the paper (arXiv 2403.03507). Use the returned optimizer instead of `optimizer`.

    Parameters
    ----------
    model : nn.Module
        Any model.
    optimizer : torch.optim.Optimizer
        The optimizer of all parameters that train, including these weights. The paper's learning
        rates are higher than AdamW's, as `scale` is part of the step.
    rank : int
        How many vectors.
    layers : str, sequence of str, or callable, optional
        As for :func:`apply_sparsegrad_to_model`. The paper trains those of attention, too.
    refresh_every : int, default 200
        After how many steps the vectors are chosen anew, from the first backward of that step whose
        gradient is not zero. Until there is one the layer takes no step.
    scale : float, default 0.25
        What the step is multiplied by when it is projected back.
    accumulate : bool, default False
        Add up several backwards before a step even where nothing else trains, so that a
        ``zero_grad()`` of the model between them could not be seen.
    rounding, seed
        As for :func:`apply_sparsegrad_to_model`.

    Returns
    -------
    SparseOptimizer
        The optimizer to use.

    Raises
    ------
    TypeError, ValueError, SebpError, RuntimeError
        As :func:`apply_sparsegrad_to_model`, and if `rank` is not from 1 to the smaller side of
        each weight, `refresh_every` is below 1, or `scale` is negative or not finite.
    """
    rank, scale = as_integer("rank", rank), float("nan") if scale is None else scale
    given = Settings(
        k=0,
        basis_steps=0,
        rank=rank,
        fix_support_after=None,
        accumulate=accumulate,
        refresh_every=as_integer("refresh_every", refresh_every),
        scale=scale,
        rounding=rounding,
        seed=seed,
    )
    settings = given.checked()
    chosen = choose_layers(model, layers)
    check_optimizer(optimizer, chosen)
    kinds = make_kinds(chosen)
    for kind in kinds:
        check_projection(kind, settings)
    made = [GaloreLayer(name, module, settings) for name, module in chosen]
    return SparseOptimizer("GaLore", optimizer, kinds, made, settings, model.parameters())
