# SPDX-License-Identifier: Apache-2.0
"""Proves that a call of a model comes out as it would with padding, or lets it run with padding.

A :class:`Call` is one call of the outermost model that :func:`~sebp.padding_free` was told of. It
ends in one of three ways.

- Its kind is new: the model runs again with padding and without dropout, and what both return is
  compared. On a difference no call of this kind leaves padding out from then on.
- No backward can follow: padded tokens held NaN, and what the model returns has to be free of it.
- A backward can follow: padded tokens held numbers like any other, and each must have a gradient
  of zero, which :meth:`~sebp.torch.packing.Packing.pad` looks at. In evaluation nobody may come to
  look, so there the model runs once more with NaN.

Where the result is not proved, the model runs with padding, from the random state at the beginning.
"""

import random
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .packing import Packing

Kind = tuple[object, ...]

# How far a result may be off, as a share of its largest element: by the order of sums, in float32
# and longer formats, and in shorter ones.
_TOLERANCE, _SHORT_TOLERANCE = 1e-4, 3e-2

# The arguments and parts of results that are a decoder's memory of earlier calls.
CACHES = ("past_key_values", "cache")
# Reasons that a script is not told of: nothing is lost, or it knows.
QUIET = ("no padding", "a cache", "torch.compile", "not on the CPU")


@dataclass
class Proofs:
    """What is known of a model's calls. It is copied and pickled along with the model.

    Attributes
    ----------
    check : bool
        Whether calls are proved. If not, padded tokens hold zeros, and the backward alone looks.
    proved : set of (Kind, bool)
        The kinds of calls that come out right, without and with a window that leaves tokens out.
    refused : dict of Kind to str
        The kinds that run with padding, and why.
    calls : Counter of str
        How many calls ran without padding, under "", and with padding, by reason.
    told : set of str
        The reasons that there was a warning of.
    owners : set of str
        Which functions of this package asked for it.
    """

    check: bool
    proved: set[tuple[Kind, bool]] = field(default_factory=set)
    refused: dict[Kind, str] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    told: set[str] = field(default_factory=set)
    owners: set[str] = field(default_factory=set)


class _OfThread(threading.local):
    call: "Call | None" = None


_of_thread = _OfThread()


def current_call() -> "Call | None":
    """Give the call that this thread is in."""
    return _of_thread.call


# --------------------------------------------------------------------------------------------------
# Without a trace


def _random_state() -> tuple:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _set_random_state(state: tuple) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])


def _buffers(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Copy a model's buffers."""
    return [(b, b.detach().clone()) for b in model.buffers() if not b.is_inference()]


@torch.no_grad()
def _set_buffers(buffers: list[tuple[Tensor, Tensor]]) -> None:
    """Put back those that have changed. Statistics of norms change without their version."""
    for buffer, value in buffers:
        if not torch.equal(buffer, value):
            buffer.copy_(value)


@contextmanager
def _no_trace(model: nn.Module) -> Iterator[None]:
    """Put random states and buffers back at the end."""
    state, buffers = _random_state(), _buffers(model)
    try:
        yield
    finally:
        _set_random_state(state)
        _set_buffers(buffers)


_DROPOUTS = (
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
    torch.dropout,
    torch.dropout_,
    torch.alpha_dropout,
    torch.feature_dropout,
    torch.feature_alpha_dropout,
)


class _WithoutDropout(TorchFunctionMode):
    """Leaves dropout out; `met`: there was some."""

    met = False

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            x, p, training = (*args, *(None,) * 3)[:3]
            x = kwargs.get("input", x)
            p = kwargs.get("p", 0.5 if p is None else p)
            training = kwargs.get("training", kwargs.get("train", training))
            if p and training is not False:
                self.met = True
            return x
        if func is functional.scaled_dot_product_attention:
            p = kwargs.pop("dropout_p", args[4] if len(args) > 4 else 0.0)
            self.met = self.met or p > 0
            args = (*args[:4], *((0.0, *args[5:]) if len(args) > 4 else ()))
        return func(*args, **kwargs)


# --------------------------------------------------------------------------------------------------
# What models return


def _leaves(value: object, name: str = "what it returns") -> Iterator[tuple[str, object]]:
    """Go through what a model returned, each part with its name."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key not in CACHES:
                yield from _leaves(part, str(key))
    elif isinstance(value, (tuple, list)):
        for place, part in enumerate(value):
            yield from _leaves(part, f"{name}[{place}]")
    elif hasattr(value, "__dataclass_fields__"):
        yield from _leaves(vars(value), name)
    else:
        yield name, value


def _tolerance(model: nn.Module) -> float:
    """Say how far a model's results may be off, by the shortest format that it computes in."""
    formats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    is_long = formats <= {torch.float32, torch.float64} and not torch.is_autocast_enabled("cpu")
    return _TOLERANCE if is_long else _SHORT_TOLERANCE


def _differs(name: str, ours: object, right: Tensor, mask: Tensor, tolerance: float) -> str:
    """Compare one tensor with that of the model as it is; "": they are equal within rounding."""
    if not isinstance(ours, Tensor) or ours.shape != right.shape or ours.dtype != right.dtype:
        return f"{name} is of another shape or kind"
    ours, right = ours.detach(), right.detach()
    if not right.is_floating_point():
        return "" if torch.equal(ours, right) else f"{name} differs"

    def off(a: Tensor, b: Tensor) -> float:
        """Give the largest difference, as a share of the largest finite element."""
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        if bool(same.all()):
            return 0.0
        largest = b[b.isfinite()].abs().max() if bool(b.isfinite().any()) else b.new_zeros(())
        difference = torch.where(same, 0.0, a - b).abs().max() / largest.clamp_min(1e-30)
        return float(difference) if difference.isfinite() else float("inf")

    if off(ours, right) <= tolerance:
        return ""
    if right.shape[:2] == mask.shape and off(ours[mask], right[mask]) <= tolerance:
        return ""
    if right.numel() == 1:
        return f"{name} came out as {ours.item():.6g}, not {right.item():.6g}"
    return f"{name} came out otherwise"


# --------------------------------------------------------------------------------------------------
# A call


class Call:
    """One call of a model.

    Attributes
    ----------
    model : nn.Module
        The outermost model that was told of.
    given : dict of str to object
        The arguments of the call.
    is_plain : bool
        Whether all of it runs with padding.
    has_backward : bool
        Whether a backward can reach padded tokens and look at their gradients.
    """

    def __init__(self, model: nn.Module, proofs: Proofs, given: dict[str, object]) -> None:
        self.model = model
        self.proofs = proofs
        self.given = given
        self.is_plain = False
        self.has_backward = torch.is_grad_enabled() and (
            any(p.requires_grad for p in model.parameters())
            or any(isinstance(v, Tensor) and v.requires_grad for v in given.values())
        )
        self.reasons: list[str] = []
        self._packings: list[tuple[Kind, Packing]] = []
        self._random = self._before = _random_state()
        self._buffers: list[tuple[Tensor, Tensor]] | None = None

    # ---- what modules within it ask and tell ----

    def kind_of(self, name: str, packing: Packing, names: frozenset[str]) -> Kind:
        """Say of what kind a module's part in this call is.

        Calls of one kind are alike in all that decides whether tokens mix, but numbers.

        Parameters
        ----------
        name : str
            Of what runs on real tokens.
        packing : Packing
            Of its batch.
        names : frozenset of str
            Its arguments.
        """
        return (
            name,
            packing.side,
            self.model.training,
            self.has_backward,
            torch.is_autocast_enabled("cpu"),
            names,
            frozenset(name for name, value in self.given.items() if value is not None),
        )

    def begin(self, kind: Kind, packing: Packing) -> None:
        """Note that a part of the call is about to run without padding."""
        # What follows may have to be undone.
        if not self._is_proved(kind, packing) or self.model.training:
            self._buffers = self._buffers or _buffers(self.model)
        if self.is_new(kind, packing):
            self._before = _random_state()
        self._packings.append((kind, packing))

    def undo(self) -> None:
        """Make as if the part last begun had not been, as it cannot run without padding."""
        self._packings.pop()
        _set_random_state(self._before)
        _set_buffers(self._buffers or [])

    def refuse(self, kind: Kind, reason: str) -> None:
        """Note that calls of a kind cannot run without padding."""
        self.proofs.refused[kind] = reason
        self.reasons.append(reason)

    def is_new(self, kind: Kind, packing: Packing) -> bool:
        """Tell whether calls of a kind have neither been proved nor, without a check, been made."""
        return (kind, packing.has_window) not in self.proofs.proved

    def _is_proved(self, kind: Kind, packing: Packing) -> bool:
        return not self.proofs.check or (kind, packing.has_window) in self.proofs.proved

    # ---- from beginning to end ----

    def run(self, forward: Callable, args: tuple, kwargs: dict) -> object:
        """Call the model, and prove what comes out or have it made with padding.

        Parameters
        ----------
        forward : callable
            The model's own, within which modules leave padding out.
        args, kwargs
            What it was called with.
        """
        try:
            output = self._within(forward, args, kwargs)
        except Exception as error:
            if all(self._is_proved(kind, packing) for kind, packing in self._packings):
                raise
            return self._with_padding(f"it failed without padding: {error}", forward, args, kwargs)
        packings = self._packings
        if not packings:
            reason = self.reasons[0] if self.reasons else "no attention_mask came to a known model"
            self.proofs.calls[reason] += 1
            self._tell(reason)
            return output
        problem = ""
        if self.proofs.check and not self.has_backward:
            problem = self._unproved(output)
        elif self.proofs.check and not self.model.training:
            self.has_backward = False
            problem = self._unproved(self._again(False, forward, args, kwargs)[0])
            self.has_backward = True
        new = [(k, p) for k, p in packings if not self._is_proved(k, p)]
        if new and not problem:
            problem = self._difference(output, new[0][1].mask, forward, args, kwargs)
        if not problem:
            self.proofs.proved.update((kind, packing.has_window) for kind, packing in packings)
            self.proofs.calls[""] += 1
            return output
        return self._with_padding(problem, forward, args, kwargs)

    def _with_padding(self, reason: str, forward: Callable, args: tuple, kwargs: dict) -> object:
        """Make the call again as the model does by itself, and all of its kind from now on."""
        _set_random_state(self._random)
        _set_buffers(self._buffers or [])
        self.is_plain = True
        # Where the model itself fails, nothing is known of the kind.
        output = self._within(forward, args, kwargs)
        self.proofs.refused.update((kind, reason) for kind, _ in self._packings)
        self.proofs.calls[reason] += 1
        self._tell(reason)
        return output

    def _within(self, forward: Callable, args: tuple, kwargs: dict) -> object:
        _of_thread.call = self
        try:
            return forward(*args, **kwargs)
        finally:
            _of_thread.call = None

    def _again(
        self, is_plain: bool, forward: Callable, args: tuple, kwargs: dict
    ) -> tuple[object, bool]:
        """Run once more from the same random state, without dropout; True: there is some."""
        packings, self._packings = self._packings, []
        self.is_plain = is_plain
        with _no_trace(self.model), torch.no_grad(), _WithoutDropout() as dropout:
            _set_random_state(self._random)
            result = self._within(forward, args, kwargs)
        self.is_plain, self._packings = False, packings
        return result, dropout.met

    def _unproved(self, output: object) -> str:
        """Say what of the output may depend on padded tokens, which hold NaN; "": nothing."""
        inputs = [value for _, value in _leaves(self.given)]
        for name, value in _leaves(output):
            if value is None or any(value is one for one in inputs):
                continue
            if not isinstance(value, Tensor) or not (
                value.is_floating_point() or value.is_complex()
            ):
                return f"{name} is not of floating point, and so does not show what it depends on"
            if bool(value.isnan().any()):
                return f"{name} depends on padded tokens"
        return ""

    def _difference(
        self, output: object, mask: Tensor, forward: Callable, args: tuple, kwargs: dict
    ) -> str:
        """Compare with what the model as it is returns; "": it is equal within rounding."""
        right, has_dropout = self._again(True, forward, args, kwargs)
        if has_dropout:
            output, _ = self._again(False, forward, args, kwargs)
        ours = dict(_leaves(output))
        tolerance = _tolerance(self.model)
        for name, value in _leaves(right):
            if isinstance(value, Tensor):
                problem = _differs(name, ours.get(name), value, mask, tolerance)
                if problem:
                    return problem
        return ""

    def _tell(self, reason: str) -> None:
        """Warn, once for each reason."""
        if reason in self.proofs.told or reason.startswith(QUIET):
            return
        self.proofs.told.add(reason)
        what = "such calls run" if self.model.training else "such calls, in evaluation, run"
        warnings.warn(
            f"sebp: {type(self.model).__name__}: {what} with padding, as the model does by itself:"
            f" {reason}",
            stacklevel=2,
        )
