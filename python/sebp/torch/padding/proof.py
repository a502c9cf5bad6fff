# SPDX-License-Identifier: Apache-2.0
"""Proves that the result of a call is the same as with padding, or runs it with padding.

A :class:`Call` is one call of the outermost model that :func:`~sebp.padding_free` was called for.

- If its kind is new, the model runs again with padding and without dropout. The results of both
  runs, the last hidden states of base models, and what they leave in buffers and attributes, are
  compared. Under autocast float32 models are compared in float32 as well, where rounding hides
  less. Then every other text is changed (:mod:`.stir`), which the others must not notice. If there
  is a difference, all later calls of this kind run with padding.
- If no backward can follow, padded tokens hold NaN, and the result must not hold any.
- If a backward can follow, padded tokens hold numbers, large and small ones, and each must have a
  gradient of zero, which :meth:`~.Packing.pad` checks. Where that backward may not happen (in
  evaluation, or where a part ran without gradients) the model runs again with NaN.

Where the result is not proved, the model runs with padding, from the state at the beginning.
"""

import threading
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..common.devices import is_autocast, without_autocast
from ..common.packing import Packing, Unfit
from .differences import (
    SHORT_TOLERANCE,
    SHORT_TOUCHED,
    TOLERANCE,
    TOUCHED,
    Hidden,
    part_differs,
    real,
    real_of_others,
    states_differ,
)
from .trace import Once, State, WithoutDropout, copy_containers, leaves, put_containers_back

Kind = tuple[object, ...]

# The arguments and parts of results that are a decoder's memory of earlier calls.
CACHES = ("past_key_values", "cache")
_FIRST = "it came unexpectedly as the first of its kind"
# Reasons without a warning: nothing is lost, or the user knows.
_QUIET = ("no padding", "a cache", "torch.compile", "not on the CPU", _FIRST)


def trains(model: nn.Module) -> bool:
    """Return whether a backward has something to do in a model.

    Weights of a :class:`~sebp.torch.SparseOptimizer` ask for no gradient, as hooks of their layers
    collect it.
    """
    return any(p.requires_grad for p in model.parameters()) or any(
        getattr(hook, "is_in_use", False)
        for module in model.modules()
        for hook in module._forward_hooks.values()
    )


@dataclass
class Proofs:
    """What is known of a model's calls. It is copied and pickled along with the model.

    Attributes
    ----------
    check : bool
        Whether calls are proved. If not, padded tokens hold zeros, and only the backward checks.
    proved : set of Kind
        The kinds of calls whose results are the same.
    refused : dict of Kind to str
        The kinds that run with padding, and why.
    unfit : str
        Why no call of the model can run without padding; "" if that is not so.
    calls : Counter of str
        How many calls ran without padding, under "", and with padding, by reason.
    tokens : Counter of str
        How many tokens these calls had: "real", and padded ones "left out" or "computed". A call
        with padding is counted where its ``attention_mask`` is known.
    warned : set of str
        The reasons that a warning has told.
    owners : set of str
        Which functions of this package asked for it.
    settled : set of (bool, bool)
        The modes (training, with a backward) in which new kinds are not expected. In the others
        the state is saved before each call, which may have to be repeated.
    """

    check: bool
    proved: set[Kind] = field(default_factory=set)
    refused: dict[Kind, str] = field(default_factory=dict)
    unfit: str = ""
    calls: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    warned: set[str] = field(default_factory=set)
    owners: set[str] = field(default_factory=set)
    settled: set[tuple[bool, bool]] = field(default_factory=set)


class _OfThread(threading.local):
    call: "Call | None" = None


_of_thread = _OfThread()


def current_call() -> "Call | None":
    """Return the call that this thread is in."""
    return _of_thread.call


def _short(text: object, limit: int = 160) -> str:
    """Return the first line of a text, shortened."""
    line = (str(text).splitlines() or [""])[0]
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _has_nan(value: object) -> bool:
    return _is_floating(value) and bool(value.isnan().any())


# --------------------------------------------------------------------------------------------------
# A call


class Call:
    """One call of a model.

    Attributes
    ----------
    model : nn.Module
        The outermost model, for which :func:`~sebp.padding_free` was called.
    given : dict of str to object
        The arguments of the call.
    is_plain : bool
        Whether all of it runs with padding.
    has_backward : bool
        Whether a backward can reach padded tokens and look at their gradients.
    is_again : bool
        Whether this is the run to compare with, in which gradients are off.
    stirs : bool
        Whether every other text is another one in this run.
    """

    def __init__(self, model: nn.Module, proofs: Proofs, given: dict[str, object]) -> None:
        self.model = model
        self.proofs = proofs
        self.given = given
        self.is_plain = False
        self.is_again = False
        self.stirs = False
        self.has_backward = torch.is_grad_enabled() and (
            trains(model)
            or any(isinstance(v, Tensor) and v.requires_grad for _, v in leaves(given))
        )
        self.reasons: list[str] = []
        self._packings: list[tuple[Kind, Packing]] = []
        self._hidden: Hidden = {}
        self._entered: Counter[str] = Counter()
        # Without a backward any call may have to be repeated.
        self._mode = (model.training, self.has_backward)
        self._is_settled = self._mode in proofs.settled
        is_open = proofs.check and self._mode != (True, True)
        self._state = State(model) if is_open or not self._is_settled else None
        self._is_unwatched = not model.training
        self._has_short_weights = not {
            p.dtype for p in model.parameters() if p.is_floating_point()
        } <= {torch.float32, torch.float64}
        self._is_short = self._has_short_weights

    # ---- called by modules within it ----

    def kind_of(self, name: object, packing: Packing, arguments: dict[str, object]) -> Kind:
        """Return of what kind a module's part in this call is.

        Calls of one kind may differ in their numbers, but in nothing else that decides whether
        tokens mix.

        Parameters
        ----------
        name : object
            Of what runs on real tokens.
        packing : Packing
            Of its batch.
        arguments : dict of str to object
            Its arguments.
        """

        def form(given: dict[str, object]) -> frozenset:
            return frozenset(
                (name, value if isinstance(value, (bool, str)) else type(value).__name__)
                for name, value in given.items()
                if value is not None
            )

        return (
            type(self.model).__name__,
            name,
            packing.side,
            packing.has_several,
            packing.may_cut,
            self.model.training,
            self.has_backward,
            torch.is_grad_enabled(),
            is_autocast(),
            form(arguments),
            form(self.given),
        )

    def is_unexpected(self, kind: Kind) -> bool:
        """Return whether a kind is new, but the state at the beginning was not saved."""
        needs_state = self.is_new(kind) or not torch.is_grad_enabled()
        is_so = self.proofs.check and needs_state and self._state is None
        if is_so:
            self.proofs.settled.discard(self._mode)
            self.reasons.append(_FIRST)
        return is_so

    def begin(self, kind: Kind, packing: Packing) -> None:
        """Note that a part of the call is about to run without padding."""
        self._is_short = self._is_short or is_autocast()
        self._packings.append((kind, packing))

    def watch(self, name: str, run: Callable, packing: Packing | None = None) -> object:
        """Run a base model, and keep its last hidden state where it may be compared.

        Parameters
        ----------
        name : str
            The base model's.
        run : callable
            Returns what it returns, B x L x H.
        packing : Packing, optional
            Of its batch, if it runs without padding.
        """
        if not (self.is_again or (self.proofs.check and self._state is not None)):
            return run()
        key = name, self._entered[name]
        self._entered[name] += 1
        output = run()
        state = output[0] if isinstance(output, tuple) else output
        state = getattr(state, "last_hidden_state", state)
        if isinstance(state, Tensor):
            self._hidden[key] = state.detach(), packing
        return output

    def is_new(self, kind: Kind) -> bool:
        """Return whether no call of a kind was proved so far (without a check: made)."""
        return kind not in self.proofs.proved

    def leave_unwatched(self) -> None:
        """Note that there are padded tokens whose gradients will not be checked."""
        self._is_unwatched = True

    # ---- the call ----

    def run(self, forward: Callable, args: tuple, kwargs: dict) -> object:
        """Call the model, and prove the result or compute it with padding.

        Parameters
        ----------
        forward : callable
            The model's own, in which modules remove padding.
        args, kwargs
            What it was called with.
        """
        if self.proofs.unfit:
            self.is_plain = True
            self._count(self.proofs.unfit)
            return self._within(forward, args, kwargs)
        before = copy_containers((args, kwargs))
        # They live as long as this call, so that no other tensor has their identity.
        tensors = [value for _, value in leaves(before) if isinstance(value, Tensor)]
        given = {id(tensor) for tensor in tensors}
        check = self.proofs.check and self._state is not None
        try:
            scout = Once(self.model, tensors) if check and not self._is_settled else nullcontext()
            output = self._within(forward, args, kwargs, scout)
        except Exception as error:
            # If the model itself raises this, it will raise it again.
            may_go_on = self._state is not None and (self._packings or isinstance(error, Unfit))
            if not may_go_on or _is_end_of_recomputation(error):
                raise
            reason = f"it failed without padding: {_short(error)}"
            if isinstance(error, Unfit):
                reason = self.proofs.unfit = str(error)
            return self._with_padding(reason, forward, (args, kwargs), before)
        if not self._packings:
            nothing = "no attention_mask came to a known model"
            self._count(self.reasons[-1] if self.reasons else nothing)  # the innermost model's
            return output
        problem = ""
        if check:
            try:
                problem = self._problem(output, given, forward, before)
            except Exception as error:
                problem = f"it could not be run again: {_short(error)}"
        if problem:
            return self._with_padding(problem, forward, (args, kwargs), before)
        self.proofs.proved.update(kind for kind, _ in self._packings)
        if _FIRST not in self.reasons and not (self._is_unwatched and self.model.training):
            self.proofs.settled.add(self._mode)
        self._count("")
        return output

    def _problem(self, output: object, given: set[int], forward: Callable, before: tuple) -> str:
        """Return what is not proved, or ""."""
        ours = dict(leaves(output, CACHES))
        changes = self._state.changes()
        packings, hidden = list(self._packings), self._hidden
        new = [packing for kind, packing in packings if self.is_new(kind)]
        problem = ""
        if not self.has_backward:
            problem = self._unproved(ours, changes, given, before)
        elif self._is_unwatched:
            self.has_backward = False
            again, more, _ = self._again(False, forward, before)
            self.has_backward = True
            problem = self._unproved(again, more, given, before)
        if new and not problem:
            right, right_changes, has_dropout = self._again(True, forward, before)
            right_hidden = self._hidden
            if has_dropout:
                ours, changes, _ = self._again(False, forward, before)
                hidden = self._hidden
            tolerance = SHORT_TOLERANCE if self._is_short else TOLERANCE
            for name, value in {**right, **right_changes}.items():
                mine = ours.get(name, changes.get(name))
                problem = problem or part_differs(name, mine, value, new[0].mask, tolerance)
            problem = problem or states_differ(hidden, right_hidden, tolerance, real)
            problem = problem or self._exactly(new, forward, before)
        self._packings = packings
        return problem

    def _exactly(self, new: list[Packing], forward: Callable, before: tuple) -> str:
        """Return what differs in the longest format at hand, and where texts are changed, or ""."""
        is_longer = is_autocast() and not self._has_short_weights
        if is_longer:
            try:
                with without_autocast():
                    return self._in_this_format(True, new, forward, before)
            except Exception:
                pass  # its arguments are of autocast's dtype
        return self._in_this_format(False, new, forward, before)

    def _in_this_format(
        self, compares: bool, new: list[Packing], forward: Callable, before: tuple
    ) -> str:
        """Compare hidden states, and look whether texts notice others."""
        has_several = any(packing.has_several for packing in new)
        if not (compares or has_several):
            return ""
        self._is_short = self._has_short_weights
        self._again(False, forward, before)
        hidden, problem = self._hidden, ""
        if compares:
            self._again(True, forward, before)
            tolerance = SHORT_TOLERANCE if self._is_short else TOLERANCE
            problem = states_differ(hidden, self._hidden, tolerance, real)
        if has_several and not problem:
            self.stirs = True
            try:
                self._again(False, forward, before)
            finally:
                self.stirs = False
            tolerance = SHORT_TOUCHED if self._is_short else TOUCHED
            problem = states_differ(hidden, self._hidden, tolerance, real_of_others)
            if problem.endswith("came out otherwise"):
                problem = "a text's last hidden state depends on other texts"
        return problem

    def _unproved(
        self, parts: dict[str, object], changes: dict[str, object], given: set[int], before: tuple
    ) -> str:
        """Return what may depend on padded tokens, which hold NaN, or ""."""
        # Words that are handed through, as sentence-transformers does with the name of a modality.
        words = {(name.rpartition(".")[2], v) for name, v in leaves(before) if isinstance(v, str)}
        for name, value in parts.items():
            if value is None or id(value) in given:
                continue
            if isinstance(value, str) and (name, value) in words:
                continue
            if not isinstance(value, float) and not _is_floating(value):
                return f"{name} is not of floating point, and so does not show what it depends on"
        for name, value in {**parts, **changes}.items():
            if value is None or id(value) in given:
                continue
            if value != value if isinstance(value, float) else _has_nan(value):
                return f"{name} depends on padded tokens"
        return ""

    def _again(
        self, is_plain: bool, forward: Callable, before: tuple
    ) -> tuple[dict[str, object], dict[str, object], bool]:
        """Run once more from the same state, without dropout and without side effects.

        Returns
        -------
        (dict of str to object, dict of str to object, bool)
            What it returned, what it changed, and whether there is dropout.
        """
        after = State(self.model)
        args, kwargs = copy_containers(before)
        self._state.put_back()
        self.is_plain, self.is_again = is_plain, True
        try:
            with torch.no_grad(), WithoutDropout() as dropout:
                output = self._within(forward, args, kwargs)
                return dict(leaves(output, CACHES)), self._state.changes(), dropout.met
        finally:
            self.is_plain = self.is_again = False
            after.put_back()

    def _with_padding(self, reason: str, forward: Callable, given: tuple, before: tuple) -> object:
        """Repeat the call with padding, and run all later ones of its kind so."""
        kinds = [kind for kind, _ in self._packings]
        self._state.put_back()
        put_containers_back(given, before)
        self.is_plain = True
        # Where the model itself fails, nothing is known of the kind.
        output = self._within(forward, *given)
        self.proofs.refused.update((kind, reason) for kind in kinds)
        self._count(reason)
        return output

    def _within(self, forward: Callable, args: tuple, kwargs: dict, mode: object = None) -> object:
        self._packings, self._hidden, self._entered = [], {}, Counter()
        _of_thread.call = self
        try:
            with ExitStack() as stack:
                stack.enter_context(mode or nullcontext())
                return forward(*args, **kwargs)
        finally:
            _of_thread.call = None

    # ---- warnings and counts ----

    def _count(self, reason: str) -> None:
        """Count a call, and warn once for each reason to run with padding."""
        self.proofs.calls[reason] += 1
        self._count_tokens("computed" if reason else "left out")
        if not reason or reason in self.proofs.warned or reason.startswith(_QUIET):
            return
        self.proofs.warned.add(reason)
        what = "such calls run" if self.model.training else "such calls, in evaluation, run"
        warnings.warn(
            f"sebp: {type(self.model).__name__}: {what} with padding, as the model does by itself:"
            f" {reason}",
            stacklevel=2,
        )

    def _count_tokens(self, padded: str) -> None:
        """Count the tokens of a call, the padded ones under a name."""
        masks = [packing.mask for _, packing in self._packings]
        if padded == "computed":
            mask = self.given.get("attention_mask")
            masks = [mask] if isinstance(mask, Tensor) and mask.dim() == 2 else []
        for mask in masks:
            real = int(torch.count_nonzero(mask))
            self.proofs.tokens["real"] += real
            self.proofs.tokens[padded] += mask.numel() - real


def _is_end_of_recomputation(error: Exception) -> bool:
    """Return whether an error is how checkpointing ends a recomputation early."""
    return isinstance(error, torch.utils.checkpoint._StopRecomputationError)
