# SPDX-License-Identifier: Apache-2.0
"""Counts what the backwards of linear layers have done so far, in all threads."""

import os
import threading
from typing import NamedTuple

import torch


class LayerKind(NamedTuple):
    """What the time of a layer's backward depends on, besides its rows."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    need_dx: bool
    need_dw: bool


class Work(NamedTuple):
    """Sums over backwards: rows of the padded batch, those that were active, and time."""

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
    """Add one backward to the sums of its kind."""
    with _lock:
        sums = _work.get(kind)
        if sums is None:
            _work[kind] = [rows, active, seconds]
        else:
            sums[0] += rows
            sums[1] += active
            sums[2] += seconds


def forget_work(done: dict[LayerKind, Work]) -> None:
    """Count on from what :func:`work_done` returned before; what came since is not counted."""
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
    with _lock:
        return {kind: Work(*sums) for kind, sums in _work.items()}
