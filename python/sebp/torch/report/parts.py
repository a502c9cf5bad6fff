# SPDX-License-Identifier: Apache-2.0
"""What a step spends its time on, as PyTorch's profiler sees it."""

import re
from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

# Attention comes first: the products within it are its own.
_ATTENTION = re.compile("attention", re.IGNORECASE)
_PRODUCT = re.compile(r"(?<!bi)(?<!tri)linear|^aten::(add)?mm$|^aten::(ba)?d?d?bmm$", re.IGNORECASE)


class Parts(NamedTuple):
    """Seconds of a step.

    Attributes
    ----------
    products : float
        Linear layers and other products of matrices, forward and backward.
    attention : float
        Operators of attention. Where a model writes attention out by hand, its products are among
        those above and the others are in the rest.
    rest : float
        All else, Python included.
    """

    products: float
    attention: float
    rest: float

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(self)


def parts_of(run: Callable[[], object]) -> Parts:
    """Run something once under the profiler, which takes some time itself.

    Parameters
    ----------
    run : callable
        The step.

    Returns
    -------
    Parts
        Its time.
    """
    with profile(activities=[ProfilerActivity.CPU]) as found:
        start = perf_counter()
        run()
        total = perf_counter() - start
    products = attention = 0.0
    left = [event for event in found.events() if event.cpu_parent is None]
    while left:
        event: FunctionEvent = left.pop()
        if _ATTENTION.search(event.name):
            attention += event.cpu_time_total / 1e6
        elif _PRODUCT.search(event.name):
            products += event.cpu_time_total / 1e6
        else:
            left += event.cpu_children
    return Parts(products, attention, max(0.0, total - products - attention))
