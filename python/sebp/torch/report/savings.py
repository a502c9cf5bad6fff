# SPDX-License-Identifier: Apache-2.0
"""Estimates what PyTorch's own products would have taken in place of those counted."""

import time

import torch
from torch.nn import functional

from ..common.work import LayerKind, Work, work_done

_MAX_ROWS = 512  # rows and outputs of the product that is timed


def dense_seconds_per_row(kind: LayerKind) -> float:
    """Time PyTorch's own products of a layer's backward or forward, on a part of the layer.

    On GPUs, where nothing is timed, it is 0.
    """
    if kind.device != "cpu":
        return 0.0
    n = min(kind.out_features, _MAX_ROWS)
    dy = torch.ones(_MAX_ROWS, n, dtype=kind.dtype)
    x = torch.ones(_MAX_ROWS, kind.in_features, dtype=kind.dtype)
    weight = torch.ones(n, kind.in_features, dtype=kind.dtype)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        if kind.is_forward:
            functional.linear(x, weight)
        if kind.need_dx:
            dy @ weight
        if kind.need_dw:
            dy.t() @ x
        times.append(time.perf_counter() - start)
    return min(times) / _MAX_ROWS * kind.out_features / max(n, 1)


class Savings:
    """Compares the work done since a time with an estimate of PyTorch's.

    PyTorch's time per row is measured once for each kind of layer, when it is first asked for.
    """

    def __init__(self) -> None:
        self._dense: dict[LayerKind, float] = {}

    def since(self, before: dict[LayerKind, Work]) -> tuple[float | None, float]:
        """Sum up the work since a time.

        Parameters
        ----------
        before : dict of LayerKind to Work
            What :func:`~.work.work_done` gave then.

        Returns
        -------
        activity : float or None
            Active rows / rows; None if no layer has worked since.
        saved : float
            Seconds: the estimate, minus the time taken.
        """
        done = work_between(before, work_done())
        rows = sum(work.rows for work in done.values())
        active = sum(work.active for work in done.values())
        saved = self.dense_seconds(done) - sum(work.seconds for work in done.values())
        return (active / rows if rows else None), saved

    def dense_seconds(self, done: dict[LayerKind, Work]) -> float:
        """Estimate PyTorch's time for some work, on all rows."""
        for kind in done.keys() - self._dense.keys():
            self._dense[kind] = dense_seconds_per_row(kind)
        return sum(self._dense[kind] * work.rows for kind, work in done.items())


def work_between(
    before: dict[LayerKind, Work], after: dict[LayerKind, Work]
) -> dict[LayerKind, Work]:
    """Subtract; kinds without new rows are left out."""
    found = {}
    for kind, now in after.items():
        then = before.get(kind, Work())
        if now.rows > then.rows:
            found[kind] = Work(*(a - b for a, b in zip(now, then, strict=True)))
    return found
