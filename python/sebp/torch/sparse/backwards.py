# SPDX-License-Identifier: Apache-2.0
"""Whether the gradients that layers keep are still wanted."""

import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef


class KeepsGradient(Protocol):
    """What keeps something of a gradient between a backward and its step.

    Attributes
    ----------
    has_gradient : bool
        Whether it keeps something now.
    """

    has_gradient: bool

    def drop_gradient(self) -> None:
        """Forget it."""


class _Seen:
    """A gradient as it was: tells whether another one still is that, and nothing was written to it.

    It does not hold the gradient. The reference is dead once the gradient is, whatever comes to be
    at its place in memory.
    """

    def __init__(self, grad: Tensor) -> None:
        self._grad, self._version = TensorWeakRef(grad), grad._version

    def still_is(self, grad: Tensor) -> bool:
        return self._grad() is grad and self._version == grad._version


def _is_zero(grad: Tensor) -> bool:
    return not (grad._values() if grad.is_sparse else grad).any()


class Backwards:
    """Knows whether ``zero_grad()`` was called since the last backward.

    ``zero_grad()`` of the model, or of the user's optimizer, deletes the ``grad`` of the parameters
    that both have, or with ``set_to_none=False`` writes zeros to it. What layers keep is then
    dropped as well. For that a backward is noticed before it gives any of these parameters a new
    ``grad``. Where none of them has one, as nothing else trains, it cannot be known: a second
    backward is then refused, unless sums are wanted.

    Zeros count before a backward, and only where something was written since the last one: before a
    step clipping may have written to gradients that were zeros all along. Where all were, zeros
    tell nothing: a second backward is then added where sums are wanted, and else refused.

    Parameters
    ----------
    layers : sequence of KeepsGradient
    base : torch.optim.Optimizer
        The user's.
    parameters : iterable of nn.Parameter
        The model's.
    accumulate : bool
        Whether backwards may be summed even so.
    """

    def __init__(
        self,
        layers: Sequence[KeepsGradient],
        base: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        accumulate: bool,
    ) -> None:
        self.layers = layers
        self.accumulate = accumulate
        self.base = base
        self.parameters = set(parameters)
        # The parameters that had a gradient after the last backward, and what it was then.
        self._with_grad: dict[Tensor, _Seen] = {}
        self._has_numbers = False  # whether any of these gradients was not zero
        # Backwards that have not ended. Each reference is dead once its backward is over.
        self._tasks: dict[int, weakref.ref] = {}
        self._handles: dict[Tensor, torch.utils.hooks.RemovableHandle] = {}
        self._watch()

    def _watched(self) -> list[Tensor]:
        """Return the parameters that both the model and the user's optimizer have."""
        groups = self.base.param_groups
        return [p for group in groups for p in group["params"] if p in self.parameters]

    def _watch(self) -> None:
        """Put a hook on each parameter that trains, which runs before it gets a gradient."""
        for parameter in self._watched():
            if parameter.requires_grad and parameter not in self._handles:
                self._handles[parameter] = parameter.register_hook(self._before_grad)

    def _before_grad(self, grad: Tensor) -> None:
        self.note()

    def note(self) -> None:
        """Note that a backward is running; called within it."""
        task = torch._C._current_graph_task_id()
        if task in self._tasks:
            return
        self.drop_unwanted(counts_zeros=True)
        self._refuse_unknown()
        remember = partial(self._remember, task)
        self._tasks[task] = weakref.ref(remember)
        torch.autograd.Variable._execution_engine.queue_callback(remember)

    def _remember(self, task: int) -> None:
        """Remember, at the end of a backward, which parameters have a gradient."""
        self._tasks = {
            other: end for other, end in list(self._tasks.items()) if other != task and end()
        }
        self._with_grad = {p: _Seen(p.grad) for p in self._watched() if p.grad is not None}
        # A small one mostly tells.
        by_size = sorted(self._with_grad, key=Tensor.numel)
        self._has_numbers = not all(_is_zero(p.grad) for p in by_size)
        self._watch()  # some may have been frozen before

    def _is_within_another(self) -> bool:
        """Return whether a backward has begun and not ended, nor raised an error."""
        return any(end() for end in list(self._tasks.values()))

    def _refuse_unknown(self) -> None:
        """Raise where it cannot be known whether what layers keep is to be added to."""
        if self.accumulate or self._has_numbers or self._is_within_another():
            return
        is_unknown = all(self._is_gone(p, True) for p in self._with_grad)
        if is_unknown and any(layer.has_gradient for layer in self.layers):
            raise RuntimeError(
                "a second backward before the step, but no parameter beside the sparse layers had a"
                " gradient other than zero in the first one, by which a zero_grad() of the model"
                " would be seen; call zero_grad() of the SparseOptimizer, or pass accumulate=True"
                " to add them up"
            )

    def drop_unwanted(self, *, counts_zeros: bool = False) -> None:
        """Drop what layers keep if ``zero_grad()`` was called since the last backward.

        Parameters
        ----------
        counts_zeros : bool
            Whether zeros that were written count, too.
        """
        if self._is_within_another():
            return  # which has looked
        ends = self._tasks
        # A backward that raised an error has not ended, so what it left is not known.
        parameters = self._watched() if ends else self._with_grad
        counts_zeros = counts_zeros and (bool(ends) or self._has_numbers)
        if (ends or parameters) and all(self._is_gone(p, counts_zeros) for p in parameters):
            self.drop()

    def _is_gone(self, parameter: Tensor, counts_zeros: bool) -> bool:
        """Return whether a parameter's gradient was deleted, or zeros were written to it."""
        grad = parameter.grad
        if grad is None or not counts_zeros:
            return grad is None
        seen = self._with_grad.get(parameter)
        return not (seen is not None and seen.still_is(grad)) and _is_zero(grad)

    def drop(self) -> None:
        """Drop what layers keep."""
        self._with_grad, self._has_numbers = {}, False
        self._tasks = {}
        for layer in self.layers:
            layer.drop_gradient()

    def release(self) -> None:
        """Remove the hooks."""
        for hook in self._handles.values():
            hook.remove()
        self._handles = {}
