# SPDX-License-Identifier: Apache-2.0
"""Counts what the linear layers that have SEBP have done so far, in all threads."""

import functools
import math
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .packing import current_packing
from .step_times import add_products


class LayerKind(NamedTuple):
    """What the time of a layer's forward or backward depends on, besides its rows."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    need_dx: bool
    need_dw: bool
    is_forward: bool = False
    device: str = "cpu"


class Work(NamedTuple):
    """Sums over passes: rows of the padded batch, those that were active, and time on the CPU.

    All rows that a forward computes are active: those of padding that was left out are not.
    """

    rows: int = 0
    active: int = 0
    seconds: float = 0.0


_work: dict[LayerKind, list] = {}  # sums in the order of Work's
_lock = threading.Lock()


def _note_fork() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_note_fork)


def count_work(kind: LayerKind, rows: int, active: int, seconds: float) -> None:
    """Add a backward, or a forward, that has just ended to the sums of its kind."""
    add_products(seconds)
    with _lock:
        sums = _work.get(kind)
        if sums is None:
            _work[kind] = [rows, active, seconds]
        else:
            sums[0] += rows
            sums[1] += active
            sums[2] += seconds


def device_of(tensor: Tensor) -> str:
    """Return the kind of a tensor's device."""
    return "cpu" if tensor.is_cpu else tensor.device.type


def counts_forwards(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Count the calls of a function that computes a layer's Y: ... x N from x: ... x K."""

    @functools.wraps(function)
    def counted(x: Tensor, *args: object) -> Tensor:
        start = time.perf_counter()
        y = function(x, *args)
        packing = current_packing()
        rows = total = math.prod(x.shape[:-1])
        if packing is not None and packing.counts(x):
            total = packing.mask.numel()
        kind = LayerKind(y.shape[-1], x.shape[-1], y.dtype, False, False, True, device_of(y))
        seconds = time.perf_counter() - start if y.is_cpu else 0.0  # a GPU has yet to begin
        count_work(kind, total, rows, seconds)
        return y

    return counted


def forget_work(done: dict[LayerKind, Work]) -> None:
    """Count on from what :func:`all_work_done` gave before; what came since is not counted."""
    with _lock:
        _work.clear()
        _work.update({kind: list(sums) for kind, sums in done.items()})


def work_done() -> dict[LayerKind, Work]:
    """Return what all backwards of this process have done so far.

    Returns
    -------
    dict of LayerKind to Work
        A copy. Backwards that PyTorch computed instead of the library are not counted.
    """
    return {kind: work for kind, work in all_work_done().items() if not kind.is_forward}


def all_work_done() -> dict[LayerKind, Work]:
    """Return what :func:`work_done` does, and the same of forwards."""
    with _lock:
        return {kind: Work(*sums) for kind, sums in _work.items()}
