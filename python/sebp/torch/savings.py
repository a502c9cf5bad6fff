# SPDX-License-Identifier: Apache-2.0
"""Estimates what PyTorch's own backwards would have taken in place of those counted."""

import time

import torch

from .work import LayerKind, Work, work_done

_MAX_ROWS = 512  # rows and outputs of the product that is timed


def dense_seconds_per_row(kind: LayerKind) -> float:
    """Time PyTorch's own products of a layer's backward, on a part of the layer."""
    n = min(kind.out_features, _MAX_ROWS)
    dy = torch.ones(_MAX_ROWS, n, dtype=kind.dtype)
    x = torch.ones(_MAX_ROWS, kind.in_features, dtype=kind.dtype)
    weight = torch.ones(n, kind.in_features, dtype=kind.dtype)
    times = []
    for _ in range(3):
        start = time.perf_counter()
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
        rows = active = 0
        saved = 0.0
        for kind, now in work_done().items():
            then = before.get(kind, Work())
            if now.rows == then.rows:
                continue
            if kind not in self._dense:
                self._dense[kind] = dense_seconds_per_row(kind)
            rows += now.rows - then.rows
            active += now.active - then.active
            saved += self._dense[kind] * (now.rows - then.rows) - (now.seconds - then.seconds)
        return (active / rows if rows else None), saved
