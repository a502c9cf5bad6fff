# SPDX-License-Identifier: Apache-2.0
"""Puts all that suits a model into it by one call, and takes it out by another."""

from collections import Counter
from dataclasses import replace

from torch import nn

from .apply.changes import Changes
from .common.devices import reason_against
from .common.step import Batch, Loss
from .common.step_times import stop_timing, time_steps
from .report.compare import compare
from .report.run import Run, RunReport

_EXPECT_REAL_TOKENS = """\
expect   a step whose time grows with the real tokens, not with the padded length
expect   losses, gradients and results for real tokens as before, up to rounding: each kind of call
         is compared once with the model as it is, and runs as it was where they differ
expect   other random numbers in dropout"""
_EXPECT_ROWS = """\
expect   a shorter backward where its gradients have rows of zeros, as those of padded tokens have;
         the forward computes all tokens
expect   losses and gradients as before, up to rounding, but for random numbers in dropout"""


class Prepared(Changes):
    """What :func:`prepare` did to a model; ``str()`` reports it.

    As a context manager it undoes it at the end. It has the attributes of
    :class:`~sebp.torch.apply.changes.Changes`: `model`, `layers`, `padding` and `is_in`.
    """

    def __init__(self, model: nn.Module, check: bool = True, defer_logits: bool = False) -> None:
        super().__init__(model, check, defer_logits)
        found = (*self.layers.replaced, *self.layers.already)
        is_used = bool(
            found or self.padding.changed or self.padding.already or any(self.blocks.values())
        )
        self._is_timed = is_used and time_steps(self.model)
        self._run = Run(self.padding)

    def undo(self) -> None:
        """Make the model what it was before, as :meth:`Changes.undo` does."""
        if self.is_in and self._is_timed:
            stop_timing(self.model)
        super().undo()

    def report(self, batch: Batch | None = None, loss: Loss | None = None) -> RunReport:
        """Report what a run has computed since, and what it left out.

        Parameters
        ----------
        batch : mapping, sequence or Tensor, optional
            Take a step on it as :func:`~sebp.compare` does, to measure the parts of a step:
            products, attention and the rest. The model may be in use, and undone.
        loss : callable, optional
            As for :func:`~sebp.compare`.

        Returns
        -------
        RunReport
            A table by ``str()``, a drawing by ``save_svg()``.

        Raises
        ------
        TypeError, ValueError
            Those of :func:`~sebp.compare`.
        """
        report = self._run.report()  # first, as a comparison is counted too
        if batch is None:
            return report
        return replace(report, comparison=compare(self.model, batch, loss))

    def __str__(self) -> str:
        """Report what was changed, what was left and why, and what to expect."""
        layers, padding = self.layers, self.padding
        lines = [f"sebp.prepare: {type(self.model).__name__}"]
        lines += [
            f"changed  {name} runs on real tokens alone, in calls where that is proved the same"
            for name in padding.changed
        ]
        if layers.replaced:
            count = _count(layers.replaced, "linear layer")
            lines.append(f"changed  {count}: rows of zeros are skipped in the backward")
        if self.blocks:
            counts = "; ".join(f"{len(names)} x {kind}" for kind, names in self.blocks.items())
            lines.append(f"changed  computed by the library: {counts}")
        lines += [f"changed  {name}: logits are computed when read" for name in self.heads]
        lines += [f"had it   {name} runs on real tokens alone" for name in padding.already]
        if layers.already:
            lines.append(f"had it   {_count(layers.already, 'linear layer')}")
        lines += [f"left     {name}: {reason}" for name, reason in padding.skipped.items()]
        for reason, count in Counter(layers.skipped.values()).items():
            first = next(name for name, why in layers.skipped.items() if why == reason)
            lines.append(f"left     {first or 'the layer'}{_more(count - 1)}: {reason}")
        devices = {parameter.device for parameter in self.model.parameters()}
        reasons = {device.type: reason_against(device) for device in devices}
        if reasons and all(reasons.values()):
            device, reason = reasons.popitem()
            lines.append(f"expect   no gain on {device}: {reason}")
        elif padding.changed or padding.already:
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


def prepare(
    model: nn.Module, *, check: bool = True, defer_logits: bool = False, quiet: bool = False
) -> Prepared:
    """Put all that suits a model into it, in place, and print a short report.

    Base models of transformers run on real tokens alone, as by :func:`~sebp.padding_free`; linear
    layers that the library can compute skip rows of zeros in their backward, as by
    :func:`~sebp.apply_sebp_to_model`; norms, activations and dropout that the library knows run in
    one pass each. All of it is exact up to rounding. Parameters, names, optimizers and checkpoints
    stay as they are. What the model has of this package already is not changed, so a second call
    does nothing.

    Parameters
    ----------
    model : nn.Module
        Any model, the outermost that is called.
    check : bool, default True
        Whether each kind of call is compared with the model as it is, as for
        :func:`~sebp.padding_free`.
    defer_logits : bool, default False
        In training, language models of transformers compute logits only when something reads them.
        Cross-entropy does not: it is computed for labelled tokens alone, in chunks of the
        vocabulary. That saves the time and most of the memory of logits. Who reads them after the
        optimizer's step gets a RuntimeError, as the weights are no longer the same.
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
    prepared = Prepared(model, check, defer_logits)
    if not quiet:
        print(prepared)
    return prepared
