# SPDX-License-Identifier: Apache-2.0
"""Applies SEBP to the linear layers of a model, and removes it."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from ... import _library
from ..._rules import RowRule, Rule, parse_rule
from ..blocks.put import take_blocks, take_heads
from ..common.forward import has_own_forward, is_replaced
from ..common.step_times import stop_timing
from ..linear_layers.linear import give_rule, has_rule, linear_classes, take_rule
from ..padding.models import PaddingFreeReport, leave_padding_out, put_padding_back

OWNER = "apply_sebp_to_model"  # for leave_padding_out()
PREPARED = "prepare"  # likewise, of sebp.prepare
Layers = str | Sequence[str] | Callable[[str, nn.Module], bool] | None


@dataclass
class Report:
    """What :func:`apply_sebp_to_model` did, by the names of the layers.

    Attributes
    ----------
    rule : Rule
        Which rows of dY the layers keep.
    replaced : list of str
        Layers that have SEBP now.
    already : list of str
        Layers that had it before, and are as they were.
    skipped : dict of str to str
        Linear layers not changed, and why.
    padding : PaddingFreeReport or None
        What was changed to leave padding out in the forward, if that was asked for.
    """

    rule: Rule
    replaced: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    padding: PaddingFreeReport | None = None

    def __str__(self) -> str:
        """Describe it in a few lines."""
        lines = [f"SEBP: {len(self.replaced)} linear layers replaced, rows={self.rule}"]
        if self.padding is not None:
            lines.append(str(self.padding))
        if self.already:
            lines.append(f"{len(self.already)} had it already and are as they were")
        lines += [f"{name} left alone: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def _refusal(module: nn.Module) -> str:
    """Return why a linear layer is not changed, or "" if it is."""
    if type(module) not in linear_classes():
        return f"its class is {type(module).__name__}"
    is_own = has_own_forward(type(module)) and not is_replaced(module)
    return "" if is_own else "its forward has been replaced"


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the layers that have SEBP or could have it, by name.

    Parameters
    ----------
    model : nn.Module
        Any model.

    Returns
    -------
    list of (str, nn.Module)
        In the order of the model's modules, each once.
    """
    return [(name, module) for name, module in model.named_modules() if not _refusal(module)]


def chooser(layers: Layers) -> Callable[[str, nn.Module], bool]:
    """Turn an argument `layers` into a function of name and module."""
    if layers is None:
        return lambda name, module: True
    if callable(layers):
        return layers
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"layers holds a {type(pattern).__name__}, not a name or pattern")
    return lambda name, module: any(fnmatchcase(name, pattern) for pattern in patterns)


def give_rules(
    model: nn.Module, rule: Rule, layers: Layers, reason: Callable[[nn.Module], str] = lambda m: ""
) -> Report:
    """Give linear layers a backward on active rows, and warn of nothing.

    Parameters
    ----------
    model : nn.Module
    rule : Rule
    layers : str, sequence of str, or callable, optional
        As for :func:`apply_sebp_to_model`.
    reason : callable
        Returns why a layer is to be skipped that could be changed, or "".

    Returns
    -------
    Report
        Of the layers chosen.
    """
    report = Report(rule)
    is_chosen = chooser(layers)
    chosen = [(name, module) for name, module in _linear(model) if is_chosen(name, module)]
    for name, module in chosen:
        if has_rule(module):
            report.already.append(name)
        elif why := _refusal(module) or reason(module):
            report.skipped[name] = why
        else:
            give_rule(module, rule)
            report.replaced.append(name)
    return report


def _linear(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the layers that are linear by their class."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, linear_classes())]


def apply_sebp_to_model(
    model: nn.Module,
    rows: RowRule = "nonzero",
    layers: Layers = None,
    padding: bool = False,
    check: bool = True,
) -> Report:
    """Give a model's linear layers a backward on active rows only, in place.

    Layers stay the same objects with the same parameters, hooks and names, so that optimizers,
    checkpoints and tied weights are not touched. A layer that has SEBP already is not changed, and
    a warning says so. A warning also says if no layer is chosen.

    Parameters
    ----------
    model : nn.Module
        Any model. Its ``nn.Linear`` and transformers ``Conv1D`` are changed, classes derived from
        them are not.
    rows : "nonzero", int, ("threshold", float), ("energy", float) or ("sampled", float)
        Which rows of dY to keep: those not all zero (exact), the k of largest norm, those with a
        magnitude over a threshold, the fewest that hold a share 1 - delta of the energy, or, for
        the gradients of weight and bias, a weighted sample of a share of the active rows.
    layers : str, sequence of str, or callable, optional
        Which layers: shell patterns of names ("*.mlp.*"), or a function of name and module.
        Default: all.
    padding : bool, default False
        Leave padded tokens out in the forward too, by :func:`~sebp.padding_free`.
    check : bool, default True
        Of `padding`: whether what the model returns is compared.

    Returns
    -------
    Report
        The layers replaced, those that had SEBP already, and those not changed, with the reason.

    Raises
    ------
    TypeError, ValueError
        If `rows` is not a rule: k < 1, a negative threshold, delta outside [0, 1); or if `layers`
        holds anything but names and patterns.
    LibraryNotFoundError, LibraryMismatchError
        If libsebp is not found, or is another version's.
    """
    rule = parse_rule(rows)
    _library.load()
    report = give_rules(model, rule, layers)
    if padding:
        report.padding = leave_padding_out(model, check, OWNER)
        if not (report.padding.changed or report.padding.already):
            warnings.warn(f"the forward leaves no padding out: {report.padding}", stacklevel=2)
    if not (report.replaced or report.already or report.skipped):
        reason = "the model has no linear layers"
        if linear := _linear(model):
            reason = f"layers={layers!r} matches none of {len(linear)}, such as {linear[0][0]!r}"
        warnings.warn(f"no layer was replaced: {reason}", stacklevel=2)
    if report.already:
        warnings.warn(
            f"{len(report.already)} layers had SEBP already and are as they were;"
            " remove_sebp_from_model() first to change their rows",
            stacklevel=2,
        )
    return report


def remove_sebp_from_model(model: nn.Module) -> list[str]:
    """Undo :func:`apply_sebp_to_model`.

    Parameters
    ----------
    model : nn.Module
        Any model.

    Returns
    -------
    list of str
        The names of the layers restored; empty if none had SEBP.
    """
    put_padding_back(model, OWNER)
    put_padding_back(model, PREPARED)
    take_blocks(model)
    take_heads(model)
    stop_timing(model)
    return [name for name, module in model.named_modules() if take_rule(module)]
