# SPDX-License-Identifier: Apache-2.0
"""Times the steps of prepared models, and within them the library's products and attention.

A step goes from the begin of a model's forward to the end of its backward, the loss in between
included; without gradients, and where no backward has come when the next forward begins, to the end
of the forward. Each thread has steps of its own: PyTorch runs a backward on CPUs in the thread that
calls it. Nothing is counted of compiled models, of models on GPUs, whose work is not done when a
call returns, and of a backward that begins when its step has ended: a second one of the same graph,
or one of a model in a reentrant checkpoint as a whole.
"""

import functools
import os
import threading
import time
from typing import NamedTuple

import torch
from torch import nn

from .forward import Forward, has, is_traced, put_in, take_out


class Times(NamedTuple):
    """Sums over steps.

    Attributes
    ----------
    steps : int
        Forwards of prepared models.
    total : float
        Seconds, as all that follow.
    products : float
        In products of linear layers that have SEBP, forward and backward.
    attention : float
        In the library's attention, forward and backward.
    """

    steps: int = 0
    total: float = 0.0
    products: float = 0.0
    attention: float = 0.0

    @property
    def rest(self) -> float:
        """All else: norms, activations, the loss, what PyTorch computes itself, Python."""
        return max(0.0, self.total - self.products - self.attention)

    def since(self, before: "Times") -> "Times":
        """Subtract what was counted before."""
        return Times(*(now - then for now, then in zip(self, before, strict=True)))


class _OfThread(threading.local):
    """The step that a thread is in."""

    def __init__(self) -> None:
        self.begin: float | None = None  # None: in no step
        self.end = 0.0  # when the step was last seen at work
        self.products = 0.0
        self.attention = 0.0
        self.is_in_forward = False
        self.backwards: set[int] = set()  # that have not ended

    def times(self) -> Times:
        """Return the times of the step."""
        if self.begin is None:
            return Times()
        return Times(1, self.end - self.begin, self.products, self.attention)


_of_thread = _OfThread()
_done = Times()
_lock = threading.Lock()


def _note_fork() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_note_fork)


def times_done() -> Times:
    """Return the times of all steps of this process; of those not ended, this thread's."""
    with _lock:
        return _add(_done, _of_thread.times())


def forget_times(times: Times) -> None:
    """Count on from what :func:`times_done` returned before; what came since is not counted."""
    global _done
    with _lock:
        _of_thread.begin = None
        _done = times


def _add(a: Times, b: Times) -> Times:
    return Times(*(x + y for x, y in zip(a, b, strict=True)))


def _end_step() -> None:
    global _done
    here = _of_thread
    with _lock:
        _done = _add(_done, here.times())
    here.begin = None


# --------------------------------------------------------------------------------------------------
# Within a step


def add_products(seconds: float) -> None:
    """Add the time of a product that has just ended."""
    here = _of_thread
    if here.begin is not None:
        here.products += seconds
        _is_at_work(here)


def add_attention(seconds: float) -> None:
    """Add the time of an attention that has just ended."""
    here = _of_thread
    if here.begin is not None:
        here.attention += seconds
        _is_at_work(here)


def _is_at_work(here: _OfThread) -> None:
    """Note the time; in a backward that is not known yet, ask to be told of its end."""
    here.end = time.perf_counter()
    backward = torch._C._current_graph_task_id()
    if backward != -1 and backward not in here.backwards:
        here.backwards.add(backward)
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(functools.partial(_end_backward, backward))


def _end_backward(backward: int) -> None:
    """End the step, unless this backward was within another, as checkpointing has them."""
    here = _of_thread
    here.backwards.discard(backward)
    if here.begin is not None:
        here.end = time.perf_counter()
        if not here.backwards:
            _end_step()


# --------------------------------------------------------------------------------------------------
# Models


def _timed_forward(forward: Forward, *args: object, **kwargs: object) -> object:
    """Replace a prepared model's forward: time its steps."""
    if torch.compiler.is_compiling() or is_traced():
        return forward.original(*args, **kwargs)
    if _is_on_gpu(forward.module):
        return forward.original(*args, **kwargs)
    here = _of_thread
    # Within another prepared model, or computed again in a backward.
    if here.is_in_forward or torch._C._current_graph_task_id() != -1:
        return forward.original(*args, **kwargs)
    if here.begin is not None:
        _end_step()
    here.products = here.attention = 0.0
    here.backwards.clear()  # of those that failed nobody has told the end
    here.begin = here.end = time.perf_counter()
    here.is_in_forward, is_open = True, False
    try:
        output = forward.original(*args, **kwargs)
        is_open = torch.is_grad_enabled()
        return output
    finally:
        here.is_in_forward = False
        if here.begin is not None:
            here.end = time.perf_counter()
            if not is_open:
                _end_step()


def _is_on_gpu(model: nn.Module) -> bool:
    first = next(model.parameters(), None)
    return first is not None and first.is_cuda


class _Scriptable:
    """Gives ``torch.jit.script`` the model without this."""

    def __init__(self, model: nn.Module, previous: object) -> None:
        self.model = model
        self.previous = previous

    def __call__(self) -> nn.Module:
        stop_timing(self.model)
        return self.model if self.previous is None else self.previous()


def time_steps(model: nn.Module) -> bool:
    """Time the steps of a model; False if that is done already."""
    if has(model, _timed_forward):
        return False
    put_in(model, _timed_forward)
    model.__prepare_scriptable__ = _Scriptable(model, vars(model).get("__prepare_scriptable__"))
    return True


def stop_timing(model: nn.Module) -> None:
    """Undo :func:`time_steps`, if it was done."""
    take_out(model, _timed_forward)
    scriptable = vars(model).get("__prepare_scriptable__")
    if isinstance(scriptable, _Scriptable):
        if scriptable.previous is None:
            del model.__prepare_scriptable__
        else:
            model.__prepare_scriptable__ = scriptable.previous
