# SPDX-License-Identifier: Apache-2.0
"""A layer of which a fixed mask trains.

The kept elements of dW = dY^T X are computed on the active rows. dW is held whole only where the
mask is chosen by it, in the steps before, in which the weight stands still.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..._structs import Matrix
from ...core import Context
from ...sparse import AdamW, Basis, SparseAdamW, top_elements
from ..common.context import thread_context
from ..common.tensors import matrix_of
from ..sparse.backwards import Backwards
from ..sparse.layer import LARGEST_FLOAT, Scratch, SparseLayer, all_finite
from ..sparse.settings import Kind, Settings
from .weight_bits import elements_of, put_elements


class MaskLayer(SparseLayer):
    """A :class:`~sebp.torch.sparse.layer.SparseLayer` whose support is fixed from the beginning.

    Parameters
    ----------
    name, module, settings
        As for :class:`~sebp.torch.sparse.layer.SparseLayer`.
    support : int64 array, optional
        The elements that train, ascending. Default: the `k` of `settings` with the largest
        gradient, summed over the first steps.
    choose_after : int
        How many steps these are.

    Attributes
    ----------
    originals : Tensor or None
        The values of the elements before training, of the weight's dtype; None while they are
        still to be chosen.
    sums : Tensor or None
        The sum of the gradients of the steps so far; None once the elements are chosen.
    steps_seen : int
        How many steps there were before the elements are chosen.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        settings: Settings,
        support: NDArray[np.int64] | None,
        choose_after: int = 0,
    ) -> None:
        super().__init__(name, module, settings)
        self._first_support = support
        self.choose_after = choose_after
        self.originals: Tensor | None = None
        self.sums: Tensor | None = None
        self.steps_seen = 0

    @property
    def is_chosen(self) -> bool:
        """Whether it is known which elements train."""
        return self.moments is not None and self.moments.is_fixed

    @property
    def sums_whole(self) -> bool:
        """Elements are chosen by a sum."""
        return True

    # ---- in the step ----

    def finish_gradient(self, adamw: AdamW) -> bool:
        """Return False if no step can be taken."""
        if self.is_chosen:
            return super().finish_gradient(adamw) and self._can_decay(adamw)
        if self.whole is None or not self.is_finite:
            return self.is_finite
        total = self.whole
        if self.sums is not None:
            total = self.scratch.matrix(self.moments.shape)
            torch.add(self.sums, self.whole, out=total)
        return all_finite(total)

    def _can_decay(self, adamw: AdamW) -> bool:
        """Return whether a decay by more than the weight itself does not overflow."""
        factor = adamw.lr * adamw.weight_decay
        if factor <= 1 or self.gradient is None:
            return True
        largest = float(self._kept_weight().abs().max())
        return factor * largest < LARGEST_FLOAT / 2

    def _kept_weight(self) -> Tensor:
        return elements_of(self.weight, self.moments.support)

    def step(self, adamw: AdamW) -> None:
        """Take a step, or add the gradient to those by which elements are chosen."""
        if self.is_chosen:
            super().step(adamw)
            return
        if self.whole is not None:
            self.sums = self.whole if self.sums is None else self.sums.add_(self.whole)
        self.steps_seen += 1
        self.drop_gradient()
        # A layer that has had no gradient yet, or only zeros, waits for one.
        if self.steps_seen >= self.choose_after and self.sums is not None and self.sums.any():
            shape, k = self.moments.shape, self.settings.k
            support = top_elements(matrix_of(self.sums), k, thread_context()).indices
            self.moments, self.sums = SparseAdamW(shape, support), None
            self.scratch.free()  # needed no more
            self.originals = self._kept_weight()

    def decay(self, weight: Matrix, adamw: AdamW, context: Context) -> None:
        """Let the kept elements decay, and no others, together with the step."""
        factor = np.float32(adamw.lr * adamw.weight_decay)
        if factor > 0:
            self.gradient.values[:] -= factor * self._kept_weight().float().numpy()

    def move_weight(self, add: Callable[[Matrix, Context], None], adamw: AdamW) -> None:
        """Let the kept elements decay, and add a step to them.

        To be rounded stochastically they are taken out of the weight, as there are few.
        """
        if not self.rounds_stochastically:
            super().move_weight(add, adamw)
            return
        kept, step = self._kept_weight(), torch.from_numpy(self.gradient.values)
        self.add_stochastically(matrix_of(step[None]), matrix_of(kept[None]), adamw)
        put_elements(self.weight, self.moments.support, kept)

    # ---- in and out of the model ----

    def new_moments(self, kind: Kind) -> SparseAdamW:
        """Make moments before the first step."""
        support, self._first_support = self._first_support, None
        return SparseAdamW(kind.shape, support)

    def attach(
        self,
        basis: Basis | None,
        moments: SparseAdamW,
        scratch: Scratch,
        backwards: Backwards,
    ) -> None:
        """Train only the kept elements, whose values are kept as they are now."""
        super().attach(basis, moments, scratch, backwards)
        self.originals = self._kept_weight() if moments.is_fixed else None

    def state(self) -> dict[str, object]:
        """Return what a checkpoint needs besides the moments."""
        sums = None if self.sums is None else self.sums.clone()  # which is added to in place
        return {"originals": self.originals, "sums": sums, "steps_seen": self.steps_seen}

    def load_state(self, state: dict[str, object]) -> None:
        """Go on from what :meth:`state` returned, after moments of the same time were attached."""
        copies = (
            None if one is None else one.clone() for one in (state["originals"], state["sums"])
        )
        self.originals, self.sums = copies
        self.steps_seen = state["steps_seen"]
