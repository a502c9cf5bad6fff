# SPDX-License-Identifier: Apache-2.0
"""All that suits a model: put in, and taken out."""

from types import TracebackType
from typing import TypeVar

from torch import Tensor, nn

from ... import _library
from ..._rules import Rule
from ..blocks.put import give_blocks, give_heads, given_in, take_blocks, take_heads
from ..common.devices import reason_against
from ..common.step import unwrap
from ..common.tensors import DTYPES
from ..linear_layers.linear import take_rule
from ..padding.models import (
    PaddingFreeReport,
    has_asked,
    leave_padding_out,
    proofs_of,
    put_padding_back,
)
from .layers import PREPARED, Report, give_rules

_Self = TypeVar("_Self", bound="Changes")


class Changes:
    """What this package puts into a model; as a context manager it takes it out at the end.

    Parameters
    ----------
    model : nn.Module
    check : bool
        As for :func:`~sebp.padding_free`.
    defer_logits : bool
        As for :func:`~sebp.prepare`.

    Attributes
    ----------
    model : nn.Module
        The model, without what DistributedDataParallel or a compiler put around it.
    layers : Report
        The linear layers that skip rows of zeros, by name.
    padding : PaddingFreeReport
        The base models that run without padding, by name.
    blocks : dict of str to list of str
        The norms, activations and dropouts that the library computes, by what they are.
    heads : list of str
        The heads whose logits are deferred.
    is_in : bool
        Whether it is in the model: not yet undone.

    Raises
    ------
    TypeError
        If the model is no ``nn.Module``.
    LibraryNotFoundError, LibraryMismatchError
        If libsebp is not found, or is another version's. Nothing has changed then.
    """

    def __init__(self, model: nn.Module, check: bool = True, defer_logits: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}, not an nn.Module")
        _library.load()
        self.model = model = unwrap(model)
        self.is_in = True
        # A rule of its own, so that undo() tells its layers from those changed since.
        rule = Rule()
        self.layers: Report = give_rules(model, rule, None, _reason_to_leave)
        self._given = [model.get_submodule(name) for name in self.layers.replaced]
        self._rule = rule
        proofs = proofs_of(model)
        self._has_asked = not has_asked(model, PREPARED)
        found = leave_padding_out(model, check if proofs is None else proofs.check, PREPARED)
        if proofs is not None:
            found.already, found.changed = found.changed + found.already, []
        self.padding: PaddingFreeReport = found
        self._had_before = given_in(model)  # by another call, for a part of the model
        self.blocks = give_blocks(model)
        self.heads = give_heads(model) if defer_logits else []

    def undo(self) -> None:
        """Make the model what it was before; twice is once.

        What was there before stays, and what has been put in since.
        """
        if not self.is_in:
            return
        self.is_in = False
        # Layers may have been copied within the model, as PEFT does with those of modules_to_save.
        for layer in {*self._given, *self.model.modules()}:
            if vars(layer).get("sebp_rule") is self._rule:
                take_rule(layer)
        # From all other modules, as some may be copies of those that were changed.
        if self.blocks:
            take_blocks(self.model, self._had_before)
        if self.heads:
            take_heads(self.model, self._had_before)
        if self._has_asked:
            put_padding_back(self.model, PREPARED)

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


def _reason_to_leave(layer: nn.Module) -> str:
    """Return why the library would compute nothing of a layer, or ""."""
    weight = layer.weight
    if type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__name__}"
    if reason := reason_against(weight.device):
        return f"its weight is on {weight.device}, and {reason}"
    if weight.dtype not in DTYPES:
        return f"its weight is of {weight.dtype}, and libsebp computes float32 and bfloat16"
    return ""
