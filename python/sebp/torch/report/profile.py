# SPDX-License-Identifier: Apache-2.0
"""Shows what SEBP would save on a model and a batch, without changing the model."""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..._rules import RowRule, Rule, parse_rule
from ..apply.layers import linear_layers
from ..common.rows import find_rows
from ..common.step import Batch, Step, generators_kept, stand_ins, unwrap
from ..common.tensors import DTYPES, matrix_of
from ..padding.models import runs_padding_free
from .heat_map import draw
from .svg import Drawing


@dataclass(frozen=True, eq=False)
class LayerProfile:
    """Row sparsity of one layer's dY.

    Attributes
    ----------
    name : str
        The layer's name in the model.
    in_features, out_features : int
        K and N.
    is_active : array of bool, ... (the shape of the layer's output without N)
        Which rows of dY are active. A layer that ran several times has its calls one after the
        other along the first dimension.
    flops : int
        Flops of the dense backward: 2 M N K for each of dX and dW that training needs.
    """

    name: str
    in_features: int
    out_features: int
    is_active: NDArray[np.bool_]
    flops: int

    @property
    def rows(self) -> int:
        """M: the rows of dY."""
        return self.is_active.size

    @property
    def active(self) -> int:
        """m: those among them that are active."""
        return int(self.is_active.sum())

    @property
    def activity(self) -> float:
        """The share m / M; 0 where M is 0."""
        return self.active / max(self.rows, 1)


@dataclass(frozen=True)
class Profile(Drawing):
    """What :func:`profile` found. ``str()`` makes a table of it.

    Attributes
    ----------
    rule : Rule
        Which rows count as active.
    layers : list of LayerProfile
        In the order of the model's modules.
    without_gradient : list of str
        Linear layers that no gradient reached.
    shape : tuple of two int or None
        Texts and tokens of the batch: the B x L of most layers' outputs; None if none is B x L x N.
        Where the model ran without padding, by :func:`~sebp.padding_free`: 1 and the real tokens of
        all texts.
    is_padding_free : bool
        Whether it ran so.
    """

    rule: Rule
    layers: list[LayerProfile] = field(default_factory=list)
    without_gradient: list[str] = field(default_factory=list)
    shape: tuple[int, int] | None = None
    is_padding_free: bool = False

    @property
    def activity(self) -> float:
        """The share of active rows among the rows of all layers."""
        return sum(one.active for one in self.layers) / max(sum(one.rows for one in self.layers), 1)

    @property
    def saved(self) -> float:
        """The share of the flops of the linear layers' backward that SEBP would save."""
        saved = sum(one.flops * (1 - one.activity) for one in self.layers)
        return saved / max(sum(one.flops for one in self.layers), 1)

    def _summary(self) -> str:
        texts, length = self.shape or (0, 0)
        batch = f"{texts} text{'s' * (texts > 1)} of {length} tokens, " if self.shape else ""
        if self.is_padding_free:
            batch = f"{length} tokens without padding, "
        return (
            f"{batch}rows={self.rule}: {self.activity:.1%} of the rows are active, SEBP would save"
            f" {self.saved:.1%} of the flops of the linear layers' backward"
        )

    def __str__(self) -> str:
        """Make a table, a line for each layer."""
        width = max([len(one.name) for one in self.layers] + [5])
        lines = [
            f"{'layer':{width}}  {'in':>6} {'out':>6}  {'rows':>7} {'active':>7} activity   Gflop"
        ]
        for one in self.layers:
            lines.append(
                f"{one.name:{width}}  {one.in_features:6} {one.out_features:6}  {one.rows:7}"
                f" {one.active:7} {one.activity:8.1%} {one.flops / 1e9:7.3g}"
            )
        lines += [f"{name}: no gradient" for name in self.without_gradient]
        return "\n".join([*lines, self._summary()])

    def to_svg(self) -> str:
        """Draw a heat map of layers by tokens.

        The colour is the share of texts whose row is active at that token.

        Returns
        -------
        str
            An SVG document.
        """
        texts, length = self.shape or (0, 0)
        shares = []
        for one in self.layers:
            if one.is_active.ndim > 1:
                has_tokens = one.is_active.shape[-1] == length
            else:  # some models flatten batch and length into one dimension
                has_tokens = one.rows == texts * length
            if has_tokens and one.rows:
                shares.append(one.is_active.reshape(-1, length).mean(0))
            else:
                shares.append(np.array([one.activity]))
        notes = [f"{one.active} / {one.rows}" for one in self.layers]
        return draw(self._summary(), [one.name for one in self.layers], shares, notes, length)


def profile(
    model: nn.Module,
    batch: Batch,
    rows: RowRule = "nonzero",
    loss: Callable[[object], Tensor] | None = None,
) -> Profile:
    """Run one forward and backward, and find for each linear layer which rows of dY are active.

    Nothing is changed: parameters, their gradients and hooks, buffers, training mode, and random
    number generators stay as they are. The model may have SEBP. With an inexact rule, the rows that
    a layer leaves out are then missing in the layers before it.

    Parameters
    ----------
    model : nn.Module
        Any model, in the mode it is to be profiled in.
    batch : mapping, sequence or Tensor
        What the model is called with, including labels if the model computes its loss from them.
    rows : "nonzero", int, ("threshold", float) or ("energy", float)
        Which rows count as active, as for :func:`~sebp.apply_sebp_to_model`.
    loss : callable, optional
        Computes a scalar loss from what the model returned. Default: its ``loss``, or the scalar
        that it is.

    Returns
    -------
    Profile
        A table by ``str()``, numbers in ``layers``, a picture by ``save_svg()``.

    Raises
    ------
    TypeError, ValueError
        If `rows` is no rule; ValueError also if there is no scalar loss.
    LibraryNotFoundError, LibraryMismatchError
        If libsebp is not found, or is another version's.

    Examples
    --------
    >>> profile = sebp.profile(model, next(iter(loader)))
    >>> print(profile)
    >>> profile.save_svg("profile.svg")
    """
    rule = parse_rule(rows)
    model = unwrap(model)
    layers = linear_layers(model)
    found: dict[str, list[NDArray[np.bool_]]] = {name: [] for name, _ in layers}
    flops = dict.fromkeys(found, 0)

    def look(name: str, flops_per_row: int, dy: Tensor) -> None:
        dy = dy.detach().cpu()
        rows = find_rows(matrix_of(dy if dy.dtype in DTYPES else dy.float()), rule)
        is_active = np.zeros(rows.total, bool)
        is_active[rows.indices] = True
        found[name].append(is_active.reshape(dy.shape[:-1]))
        flops[name] += flops_per_row * is_active.size

    def note(name: str, layer: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> None:
        if y.requires_grad:
            x = args[0] if args else next(iter(kwargs.values()))
            products = x.requires_grad + layer.weight.requires_grad
            y.register_hook(partial(look, name, 2 * products * layer.weight.numel()))

    with ExitStack() as stack:
        stack.enter_context(generators_kept())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, layer in layers:
            handle = layer.register_forward_hook(
                partial(note, name), prepend=True, with_kwargs=True
            )
            stack.callback(handle.remove)
        step = Step(model, loss)
        torch.func.functional_call(step, stand_ins(step), (batch,))

    shapes = Counter(call.shape for calls in found.values() for call in calls if call.ndim == 2)
    shape = shapes.most_common(1)[0][0] if shapes else None
    is_padding_free = shape is not None and shape[0] == 1 and runs_padding_free(model)
    result = Profile(rule, shape=shape, is_padding_free=is_padding_free)
    for name, layer in layers:
        if not found[name]:
            result.without_gradient.append(name)
            continue
        is_active = _join(found[name])
        n, k = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
        result.layers.append(LayerProfile(name, k, n, is_active, flops[name]))
    return result


def _join(calls: list[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """Concatenate the rows of a layer's calls, flattened where their shapes differ."""
    if len({(call.ndim, *call.shape[1:]) for call in calls}) > 1 or calls[0].ndim == 0:
        calls = [call.reshape(-1) for call in calls]
    return np.concatenate(calls)
