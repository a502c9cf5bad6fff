# SPDX-License-Identifier: Apache-2.0
"""Takes the same training step of a model as it is and with SEBP, and says what differs."""

import copy
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor, nn

from ..apply.changes import Changes
from ..common.forward import as_it_is
from ..common.step import Batch, Loss, Step, parameters_for, unwrap
from ..common.step_times import forget_times, times_done
from ..common.work import Work, all_work_done, forget_work, work_done
from ..padding.models import proofs_of
from ..padding.trace import State, WithoutDropout
from .parts import Parts, parts_of

# What the order of sums may change, as a share of a gradient's largest element: in float32 some
# thousand roundings of 6e-8. In shorter formats one rounding is 4e-3, and where the terms of a sum
# cancel little of it is left: only gross errors can be told from that.
_TOLERANCE, _SHORT_TOLERANCE = 1e-3, 0.5
# Gradients smaller than this share of the largest are compared with it: some, as those of a key's
# bias, are nothing but rounding.
_SMALL = 1e-3
_GAIN = 1.05  # less than this differs from one run to the next
_ALL_ACTIVE = 0.95
_PROFILED = 3  # the steps of each that the profiler sees
_CHUNK = 2**24  # the elements that the optimizer's step is timed on at once


@dataclass(frozen=True)
class StepFigures:
    """What was measured of one way to take a step.

    Attributes
    ----------
    seconds : float
        The median, with the optimizer's step if that was asked for.
    loss : float
        Without dropout.
    dropped_loss : float
        As the model computes it, from the same state of the random number generators; in training
        with dropout.
    parts : Parts
        The time of another step, under PyTorch's profiler: the median of three.
    """

    seconds: float
    loss: float
    dropped_loss: float
    parts: Parts


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; ``str()`` makes a table of it.

    Attributes
    ----------
    name : str
        The model's class, its mode, and how often it was measured.
    plain, ours : StepFigures
        A step as it is, and with SEBP.
    speedup : float
        The median over pairs of steps of the time as it is / the time with SEBP.
    speedups : (float, float)
        The smallest and the largest.
    difference : float
        The largest difference of an element of a gradient, without dropout, as a share of the
        largest element of the same parameter's gradient (or of a thousandth of the largest of all).
        Infinity if one of them holds NaN.
    differs : str
        The parameter in which that is.
    has_dropout : bool
        Whether the model has any, in the mode it is in.
    real : float or None
        The share of real tokens, by the batch's ``attention_mask``.
    activity : float or None
        Active rows / rows of the gradients of linear layers, those of padded tokens included; None
        where PyTorch computed all of them.
    optimizer : float
        The seconds of the optimizer's step in both; 0 if it was not asked for.
    warnings : list of str
        What is wrong, and why nothing is gained where that is so.
    """

    name: str
    plain: StepFigures
    ours: StepFigures
    speedup: float
    speedups: tuple[float, float]
    difference: float
    differs: str
    has_dropout: bool
    real: float | None
    activity: float | None
    optimizer: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Make a table."""
        plain, ours = self.plain, self.ours
        low, high = self.speedups
        lines = [
            f"sebp.compare: {self.name}",
            f"{'':15}{'as it is':>12}{'with SEBP':>12}",
            f"{'step':15}{_milliseconds(plain.seconds)}{_milliseconds(ours.seconds)}"
            f"   {self.speedup:.2f} times as fast ({low:.2f} to {high:.2f})",
        ]
        notes = ("   of a step under PyTorch's profiler", "", "")
        for part, a, b, note in zip(Parts._fields, plain.parts, ours.parts, notes, strict=True):
            lines.append(f"  {part:13}{_milliseconds(a)}{_milliseconds(b)}{note}")
        if self.optimizer:
            lines.append(f"  {'AdamW':13}{2 * _milliseconds(self.optimizer)}")
        note = "   without dropout" if self.has_dropout else ""
        lines.append(f"{'loss':15}{plain.loss:12.6g}{ours.loss:12.6g}{note}")
        if self.has_dropout:
            note = ""
            if abs(plain.dropped_loss - ours.dropped_loss) > 1e-5 * abs(plain.dropped_loss):
                note = "   other random numbers"
            values = f"{plain.dropped_loss:12.6g}{ours.dropped_loss:12.6g}"
            lines.append(f"  {'with dropout':13}{values}{note}")
        where = f" ({self.differs})" if self.differs else ""
        lines.append(f"gradients      differ by {self.difference:.1e} of the largest{where}")
        if self.real is not None:
            lines.append(f"real tokens    {self.real:.1%}")
        if self.activity is not None:
            lines.append(f"active rows    {self.activity:.1%}")
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:9.2f} ms"


class _Runner:
    """Takes steps of one model on one batch, each from the same state."""

    def __init__(self, model: nn.Module, batch: Batch, loss: Loss | None) -> None:
        self.model = model
        self.batch = _for_a_step(batch)
        self.step = Step(model, loss)
        self.state = State(model)
        self.tensors = parameters_for(self.step)

    def run(self, is_plain: bool, tensors: dict[str, Tensor] | None = None) -> tuple[float, float]:
        """Take a step; return its seconds and its loss."""
        self.state.put_back()
        batch = _for_a_step(self.batch)
        with as_it_is(self.model) if is_plain else nullcontext():
            start = perf_counter()
            loss = torch.func.functional_call(self.step, tensors or self.tensors, (batch,))
            return perf_counter() - start, float(loss)

    def parts(self, is_plain: bool) -> Parts:
        """Take a step under PyTorch's profiler."""
        self.state.put_back()
        batch = _for_a_step(self.batch)
        with as_it_is(self.model) if is_plain else nullcontext():
            return parts_of(lambda: torch.func.functional_call(self.step, self.tensors, (batch,)))

    def compare_gradients(self) -> tuple[list[float], float, str, bool]:
        """Take a step each way without dropout.

        Returns
        -------
        losses : list of two float
        difference : float
        differs : str
            As in :class:`Comparison`.
        has_dropout : bool
        """
        # The second backward adds its gradients to the first one's negatives, so that there is
        # one set of them, and what it leaves is the difference.
        tensors = parameters_for(self.step, keep_gradients=True)
        scales = dict.fromkeys(tensors, 0.0)
        losses = []
        with WithoutDropout() as dropout:
            losses.append(self.run(True, tensors)[1])
            for name, tensor in tensors.items():
                if tensor.grad is not None:
                    gradient = tensor.grad.to_dense()
                    scales[name] = _largest(gradient)
                    tensor.grad = gradient.neg_()
            losses.append(self.run(False, tensors)[1])
        min_scale = _SMALL * max(scales.values(), default=0.0)
        difference, differs = 0.0, ""
        for name, tensor in tensors.items():
            if tensor.grad is None:
                continue
            off, scale = _largest(tensor.grad.to_dense()), max(scales[name], min_scale)
            off = off / scale if scale else math.inf * off if off else 0.0
            off = off if math.isfinite(off) else math.inf
            if off > difference:
                difference, differs = off, name.removeprefix("model.")
        return losses, difference, differs, dropout.met


def _largest(tensor: Tensor) -> float:
    """Return the largest magnitude; NaN where there is one; 0 of nothing."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _for_a_step(value: object) -> object:
    """Copy a batch so far that a step changes nothing of it.

    Tensors are shared; those that require gradients are replaced, as theirs are not to change. A
    cache, to which a step adds, is copied as a whole.
    """
    if isinstance(value, Tensor):
        return value.detach().requires_grad_() if value.requires_grad else value
    if hasattr(value, "get_seq_length"):
        try:
            return copy.deepcopy(value)
        except RuntimeError as error:
            raise ValueError(
                f"the batch holds a {type(value).__name__} that cannot be copied for each step,"
                " perhaps as its tensors have gradients: make it under torch.no_grad(), or leave it"
                " out"
            ) from error
    if isinstance(value, Mapping):
        return {key: _for_a_step(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_for_a_step(one) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _refuse(model: nn.Module, repetitions: int) -> None:
    """Raise if a model cannot be compared."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not an nn.Module")
    if repetitions < 1:
        raise ValueError(f"repetitions is {repetitions}, not 1 or more")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}, and steps are timed on the CPU alone")
    for name, module in model.named_modules():
        if any(getattr(hook, "is_in_use", False) for hook in module._forward_hooks.values()):
            raise ValueError(f"{name}: a SparseOptimizer trains it; release() that first")


def _optimizer_seconds(model: nn.Module) -> float:
    """Time AdamW's step on copies of the parameters that train, some at once."""
    chunks: list[list[Tensor]] = [[]]
    for parameter in model.parameters():
        if parameter.requires_grad:
            if sum(p.numel() for p in chunks[-1]) > _CHUNK:
                chunks.append([])
            chunks[-1].append(parameter)
    seconds = 0.0
    for chunk in filter(None, chunks):
        copies = [parameter.detach().clone().requires_grad_() for parameter in chunk]
        for one in copies:
            one.grad = torch.zeros_like(one)
        optimizer = torch.optim.AdamW(copies, fused=True)
        times = []
        for _ in range(4):
            start = perf_counter()
            optimizer.step()
            times.append(perf_counter() - start)
        seconds += statistics.median(times[1:])  # the first makes the moments
    return seconds


def _keep_counts(model: nn.Module, stack: ExitStack) -> None:
    """Give the counts of calls that were there before what they count now, at the end.

    So that warnings which only this comparison has given come again, for who trains the model
    later, they are forgotten, by Python too: it does so at the end of any ``catch_warnings``.
    """
    stack.enter_context(warnings.catch_warnings())
    if (proofs := proofs_of(model)) is None:
        return
    stack.callback(proofs.warned.intersection_update, set(proofs.warned))
    for counter in (proofs.calls, proofs.tokens):
        stack.callback(counter.update, Counter(counter))
        stack.callback(counter.clear)  # callbacks run in reverse


def _keep_gradients(model: nn.Module, stack: ExitStack) -> None:
    """Take the gradients away and give them back: a loss may be of the parameters themselves."""
    for parameter in model.parameters():
        stack.callback(setattr, parameter, "grad", parameter.grad)
        parameter.grad = None


def _real_share(batch: Batch) -> float | None:
    """Return the share of real tokens by a batch's mask, or None if it has none."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not mask.numel():
        return None
    return int(torch.count_nonzero(mask)) / mask.numel()


def _activity(before: dict, after: dict) -> float | None:
    """Return active rows / rows of the work done between, or None if there was none."""
    rows = active = 0
    for kind, now in after.items():
        then = before.get(kind, Work())
        rows += now.rows - then.rows
        active += now.active - then.active
    return active / rows if rows else None


def _compare(
    runner: _Runner, changes: Changes, repetitions: int, optimizer_step: bool
) -> Comparison:
    """Take all steps."""
    model, sides = runner.model, (True, False)
    for is_plain in sides:
        runner.run(is_plain)
    optimizer = _optimizer_seconds(model) if optimizer_step else 0.0
    losses, difference, differs, has_dropout = runner.compare_gradients()
    seconds: dict[bool, list[float]] = {side: [] for side in sides}
    dropped: dict[bool, float] = {}
    calls, work = Counter(changes.padding.calls), work_done()
    for repetition in range(repetitions):
        for side in sides if repetition % 2 == 0 else sides[::-1]:
            taken, dropped[side] = runner.run(side)
            seconds[side].append(taken + optimizer)
    activity = _activity(work, work_done())
    calls = Counter(changes.padding.calls) - calls
    speedups = [a / b for a, b in zip(*seconds.values(), strict=True)]
    parts = [(runner.parts(True), runner.parts(False)) for _ in range(_PROFILED)]
    plain, ours = (
        StepFigures(
            statistics.median(seconds[side]),
            losses[i],
            dropped[side],
            sorted((pair[i] for pair in parts), key=lambda one: one.total)[_PROFILED // 2],
        )
        for i, side in enumerate(sides)
    )
    mode = "training" if model.training else "evaluation"
    name = (
        f"{type(model).__name__}, {mode}, {repetitions} pair{'s' * (repetitions > 1)} of steps,"
        f" {torch.get_num_threads()} threads"
    )
    found = Comparison(
        name,
        plain,
        ours,
        statistics.median(speedups),
        (min(speedups), max(speedups)),
        difference,
        differs,
        has_dropout,
        _real_share(runner.batch),
        activity,
        optimizer,
    )
    found.warnings.extend(_what_differs(found, model))
    found.warnings.extend(_why_no_gain(found, changes, calls))
    return found


def _what_differs(found: Comparison, model: nn.Module) -> list[str]:
    """Say in what the two differ by more than rounding."""
    plain, ours = found.plain.loss, found.ours.loss
    if not math.isfinite(plain):
        return ["the model's own loss is not finite, so there is nothing to compare"]
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    is_long = kinds <= {torch.float32, torch.float64} and not torch.is_autocast_enabled("cpu")
    tolerance = _TOLERANCE if is_long else _SHORT_TOLERANCE
    texts = []
    if not abs(plain - ours) <= tolerance * abs(plain):
        texts.append(f"the loss is {ours:.6g} with SEBP and {plain:.6g} as it is: not rounding")
    if not found.difference <= tolerance:
        texts.append(
            f"a gradient, that of {found.differs}, differs by {found.difference:.1e}: not rounding"
        )
    return texts


def _why_no_gain(found: Comparison, changes: Changes, calls: Counter[str]) -> list[str]:
    """Say that nothing is gained, and why, where that is so."""
    texts = []
    is_all_active = found.activity is not None and found.activity > _ALL_ACTIVE
    if is_all_active:
        texts.append(
            f"{found.activity:.1%} of the rows are active, so there is next to nothing to leave"
            " out: texts of one length, or labels of padded tokens that count (they should be -100)"
        )
    reasons = [why for why in calls if why not in ("", "no padding")]
    if found.activity is None and not calls[""]:
        skipped = [*changes.layers.skipped.values()]
        why = f"libsebp computed none of it ({skipped[0] if skipped else 'no linear layer trains'})"
    elif found.speedup >= _GAIN:
        return texts
    elif is_all_active:
        why = "PyTorch's own products take no longer than libsebp's here"
    elif reasons:
        why = f"padding stays in the forward ({reasons[0]})"
    elif found.speedups[1] >= _GAIN:
        why = "steps differ too much from one to the next; the machine may be busy"
    elif calls[""] and not changes.model.training:
        why = "in evaluation with gradients each call is computed twice"
    else:
        why = "the rows left out are too few, or the layers too small, to make up for the calls"
    return [*texts, f"no time is gained: {why}"]


def compare(
    model: nn.Module,
    batch: Batch,
    loss: Loss | None = None,
    *,
    optimizer_step: bool = False,
    repetitions: int = 7,
) -> Comparison:
    """Take the same step of a model as it is and with SEBP, in turn, and say what differs.

    A step is a forward and a backward, in the mode the model is in, under the autocast that the
    caller has. Each begins from the same parameters, buffers and random numbers, and the model is
    left as it was: these, its gradients and its hooks. The model may have SEBP already; it is
    compared with what :func:`~sebp.prepare` adds to that. Gradients are kept once, and the model is
    not copied. A compiled model runs uncompiled.

    Parameters
    ----------
    model : nn.Module
        Any model on the CPU.
    batch : mapping, sequence or Tensor
        What the model is called with, including labels if the model computes its loss from them.
        A cache in it is copied for each step.
    loss : callable, optional
        Computes a scalar loss from what the model returned. Default: its ``loss``, or the scalar
        that it is.
    optimizer_step : bool, default False
        Add the time of a step of ``torch.optim.AdamW`` to both. It is the same in both, and is
        measured on copies of some of the parameters at a time.
    repetitions : int, default 7
        How many pairs of steps are timed, after one of each that is not.

    Returns
    -------
    Comparison
        A table by ``str()``. A warning says if losses or gradients differ by more than rounding, if
        all rows are active, and if no time is gained, and why.

    Raises
    ------
    TypeError
        If the model is no ``nn.Module``, or the batch is nothing to call one with.
    ValueError
        If there is no scalar loss or nothing to train, the model is not on the CPU, a
        SparseOptimizer trains it, the batch holds a cache that cannot be copied, or `repetitions`
        is below 1.
    LibraryNotFoundError, LibraryMismatchError
        If libsebp is not found, or is another version's.

    Examples
    --------
    >>> print(sebp.compare(model, next(iter(loader))))
    """
    if isinstance(model, nn.Module):
        model = unwrap(model)
    _refuse(model, repetitions)
    with ExitStack() as stack:
        changes = stack.enter_context(Changes(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        runner = _Runner(model, batch, loss)
        stack.callback(runner.state.put_back)
        _keep_counts(changes.model, stack)
        stack.callback(forget_work, all_work_done())
        stack.callback(forget_times, times_done())
        _keep_gradients(changes.model, stack)
        found = _compare(runner, changes, repetitions, optimizer_step)
    for text in found.warnings:
        warnings.warn(f"sebp.compare: {text}", stacklevel=2)
    return found
