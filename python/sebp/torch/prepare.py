# SPDX-License-Identifier: Apache-2.0
"""Puts all that suits a model into it by one call, and takes it out by another."""

from collections import Counter
from types import TracebackType

from torch import Tensor, nn

from .. import _library
from .._rules import Rule
from .apply import Report, give_rules
from .layers import take_rule
from .padding_free import (
    PaddingFreeReport,
    has_asked,
    leave_padding_out,
    proofs_of,
    put_padding_back,
)
from .step import unwrap
from .tensors import DTYPES

_OWNER = "prepare"  # for leave_padding_out()

_EXPECT_REAL_TOKENS = """\
expect   a step whose time grows with the real tokens, not with the padded length
expect   losses, gradients and results for real tokens as before, up to rounding: each kind of call
         is compared once with the model as it is, and runs as it was where they differ
expect   other random numbers in dropout, as there are fewer tokens"""
_EXPECT_ROWS = """\
expect   a shorter backward where its gradients have rows of zeros, as those of padded tokens have;
         the forward computes all tokens
expect   losses and gradients as before, up to rounding"""


class Prepared:
    """What :func:`prepare` did to a model; ``str()`` reports it.

    As a context manager it undoes it at the end.

    Attributes
    ----------
    model : nn.Module
        The model, without what DistributedDataParallel or a compiler put around it.
    layers : Report
        The linear layers that skip rows of zeros, by name.
    padding : PaddingFreeReport
        The base models that run without padding, by name.
    is_in : bool
        Whether it is in the model: not yet undone.
    """

    def __init__(self, model: nn.Module, check: bool) -> None:
        self.model = model
        self.is_in = True
        # A rule of its own, so that undo() tells its layers from those changed since.
        rule = Rule()
        self.layers: Report = give_rules(model, rule, None, _reason_to_leave)
        self._given = [model.get_submodule(name) for name in self.layers.replaced]
        self._rule = rule
        proofs = proofs_of(model)
        self._has_asked = not has_asked(model, _OWNER)
        found = leave_padding_out(model, check if proofs is None else proofs.check, _OWNER)
        if proofs is not None:
            found.already, found.changed = found.changed + found.already, []
        self.padding: PaddingFreeReport = found

    def undo(self) -> None:
        """Make the model what it was before; twice is once.

        What was there before stays, and what has been put in since.
        """
        if not self.is_in:
            return
        self.is_in = False
        for layer in self._given:
            if vars(layer).get("sebp_rule") is self._rule:
                take_rule(layer)
        if self._has_asked:
            put_padding_back(self.model, _OWNER)

    def __enter__(self) -> "Prepared":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        """Report what was changed, what was left and why, and what to expect."""
        layers, padding = self.layers, self.padding
        lines = [f"sebp.prepare: {type(self.model).__name__}"]
        lines += [f"changed  {name} runs on real tokens alone" for name in padding.changed]
        if layers.replaced:
            count = _count(layers.replaced, "linear layer")
            lines.append(f"changed  {count}: rows of zeros are skipped in the backward")
        lines += [f"had it   {name} runs on real tokens alone" for name in padding.already]
        if layers.already:
            lines.append(f"had it   {_count(layers.already, 'linear layer')}")
        lines += [f"left     {name}: {reason}" for name, reason in padding.skipped.items()]
        for reason, count in Counter(layers.skipped.values()).items():
            first = next(name for name, why in layers.skipped.items() if why == reason)
            lines.append(f"left     {first or 'the layer'}{_more(count - 1)}: {reason}")
        if padding.changed or padding.already:
            lines.append(_EXPECT_REAL_TOKENS)
        elif layers.replaced or layers.already:
            lines.append(_EXPECT_ROWS)
        else:
            why = "no linear layer" if not layers.skipped else "no linear layer that it computes"
            lines.append(f"expect   no gain: libsebp finds {why} in this model")
        lines.append("measure  print(sebp.compare(model, batch))")
        lines.append("undo     .undo() of what sebp.prepare() returned" if self.is_in else "undone")
        return "\n".join(lines)


def _count(names: list[str], what: str) -> str:
    return f"{len(names)} {what}{'s' * (len(names) > 1)}"


def _more(count: int) -> str:
    return f" and {count} more" if count else ""


def _reason_to_leave(layer: nn.Module) -> str:
    """Return why the library would compute nothing of a layer, or ""."""
    weight = layer.weight
    if type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__name__}"
    if weight.device.type != "cpu":
        return f"its weight is on {weight.device}, and libsebp works on the CPU"
    if weight.dtype not in DTYPES:
        return f"its weight is of {weight.dtype}, and libsebp computes float32 and bfloat16"
    return ""


def prepare(model: nn.Module, *, check: bool = True, quiet: bool = False) -> Prepared:
    """Put all that suits a model into it, in place, and print a short report.

    Base models of transformers run on real tokens alone, as by :func:`~sebp.padding_free`; linear
    layers that the library can compute skip rows of zeros in their backward, as by
    :func:`~sebp.apply_sebp_to_model`. Both are exact. Parameters, names, optimizers and checkpoints
    stay as they are. What the model has of this package already is not changed, so a second call
    does nothing.

    Parameters
    ----------
    model : nn.Module
        Any model, the outermost that is called.
    check : bool, default True
        Whether each kind of call is compared with the model as it is, as for
        :func:`~sebp.padding_free`.
    quiet : bool, default False
        Print nothing.

    Returns
    -------
    Prepared
        Its ``undo()`` makes the model what it was; so does the end of a ``with``. ``str()`` is the
        report.

    Raises
    ------
    TypeError
        If the model is no ``nn.Module``.
    LibraryNotFoundError, LibraryMismatchError
        If libsebp is not found, or is another version's. Nothing has changed then.

    Examples
    --------
    >>> prepared = sebp.prepare(model)
    >>> trainer.train()
    >>> prepared.undo()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not an nn.Module")
    _library.load()
    prepared = Prepared(unwrap(model), check)
    if not quiet:
        print(prepared)
    return prepared
