# SPDX-License-Identifier: Apache-2.0
"""Layers of which a few elements of the weight's gradient are trained.

A layer's forward and its gradients of inputs and bias are not changed. Its weight requires no
gradient. A hook on the forward makes the backward compute, from dY and X on the active rows, the k
elements that are kept. :mod:`.optimizer` takes a step with them.

The kept elements are not the weight's ``grad``, which has the shape of the weight, but they are
treated as the ``grad`` of others is. ``backward()`` computes them and ``torch.autograd.grad()``
does not, as their computation hangs on a leaf of the graph. :class:`.Backwards` notices
a ``zero_grad()`` of the model.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from ..._rules import Rule
from ..._structs import Matrix
from ...core import Context, Rows, SebpError
from ...sparse import (
    NONFINITE,
    AdamW,
    Basis,
    Moments,
    Sparse,
    SparseAdamW,
    add_elements,
    meprop_gradient,
    sampled_product,
    sparsegrad_gradient,
    sparsegrad_kept,
    sparsegrad_update,
    stochastic_add,
    take_elements,
    top_elements,
    weight_decay,
)
from ..common.context import thread_context
from ..common.rows import find_rows
from ..common.tensors import DTYPES, matrix_of
from ..linear_layers.products import library_backward
from .backwards import Backwards
from .checkpoint import load_moments
from .settings import Kind, Settings

LARGEST_FLOAT = float(np.finfo(np.float32).max)


def all_finite(matrix: Tensor) -> bool:
    """Return whether there is no NaN or Inf, by the sum first, which is fast."""
    return bool(matrix.sum().isfinite()) or bool(matrix.isfinite().all())


def energy_of(matrix: Tensor) -> float:
    """Compute the sum of squares in float32: NaN or Inf if an element is."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float32)) ** 2


def _active_rows(matrix: Matrix, active: Rows) -> Tensor:
    """Return the active rows of a tensor's matrix: no copy if all are."""
    rows = matrix.memory.reshape(matrix.rows, matrix.cols)
    return rows if len(active) == active.total else rows[torch.from_numpy(active.indices)]


class Scratch:
    """Memory for one gradient in the space where elements are chosen, shared by all layers."""

    def __init__(self) -> None:
        self.free()

    def matrix(self, shape: tuple[int, int]) -> Tensor:
        """Return the memory as a matrix; what it held is lost."""
        size = shape[0] * shape[1]
        if self.floats.numel() < size:
            self.floats = torch.empty(size, dtype=torch.float32, device="cpu")
        return self.floats[:size].view(shape)

    def free(self) -> None:
        """Give the memory back until it is needed again."""
        self.floats = torch.empty(0, dtype=torch.float32, device="cpu")


# --------------------------------------------------------------------------------------------------
# A layer


class SparseLayer:
    """One layer: the elements of its gradient since the last step, and their moments.

    During the basis phase it has neither: the weight has a whole gradient, and the hook only
    notices a second backward. Matrices have the weight's shape: N x K, or K x N for a ``Conv1D``,
    where dY and X change places.
    """

    def __init__(self, name: str, module: nn.Module, settings: Settings) -> None:
        self.name = name
        self.module = module
        self.settings = settings
        self.dtype = module.weight.dtype  # which the weight keeps
        self.basis: Basis | None = None
        self.moments: SparseAdamW | None = None
        self.scratch = Scratch()
        self.backwards: Backwards | None = None
        self.hook: torch.utils.hooks.RemovableHandle | None = None
        self.index, self.count = 0, 1  # of all layers of the optimizer, which tells
        self.measures = False  # the energies of the next step's gradients
        self.drop_gradient()

    @property
    def weight(self) -> nn.Parameter:
        """The module's weight, whichever it is now."""
        return self.module.weight

    @property
    def sums_whole(self) -> bool:
        """Whether whole gradients are summed while the support is not fixed."""
        return self.settings.accumulate

    def drop_gradient(self) -> None:
        """Forget what backwards have computed since the last step."""
        self.has_gradient = False
        self.gradient: Sparse | None = None
        self.whole: Tensor | None = None  # the sum, where `sums_whole` and not fixed
        self.is_finite = True
        # ||R||^2 and ||dW||^2, each summed over the backwards, where they are measured.
        self.energies = (0.0, 0.0)

    def new_moments(self, kind: Kind) -> SparseAdamW:
        """Make moments before the first step."""
        return SparseAdamW(kind.shape if kind.basis is None else kind.basis.rank)

    def load_moments(
        self, kind: Kind, basis: Basis | None, saved: dict[str, object], settings: Settings
    ) -> SparseAdamW:
        """Make moments from a checkpoint; raise unless they suit k."""
        return load_moments(self.name, kind, basis, saved, settings)

    @property
    def gradient_bytes(self) -> int:
        """The memory of the gradient between a backward and its step, after the basis phase."""
        if self.moments.is_fixed:
            return 4 * self.moments.count
        if self.sums_whole:
            return 4 * self.moments.shape[0] * self.moments.shape[1]
        return 12 * self.settings.k

    # ---- in the backward ----

    def collect(self, dy: Tensor, x: Tensor | None) -> None:
        """Compute the gradient's elements from dY and X."""
        if self.hook is None or (self.moments is None) != (x is None):
            return  # what was computed before the layer was released, or in another phase
        if x is not None and not dy.is_cpu:  # of a model that was moved since
            raise TypeError(
                f"{self.name}: its gradient is on {dy.device}, but sparse layers are trained on the"
                " CPU"
            )
        self.backwards.note()
        is_fixed = self.moments is not None and self.moments.is_fixed
        if self.has_gradient and not (is_fixed or self.sums_whole):
            raise RuntimeError(
                f"{self.name}: a second backward before the step, or a second call of the layer,"
                " but elements are chosen anew by each; pass accumulate=True"
            )
        self.has_gradient = True
        if x is None:
            return
        dy = dy if dy.dtype in DTYPES else dy.float()
        left, right = matrix_of(dy), matrix_of(x.to(dy.dtype))
        active = find_rows(left, getattr(self.module, "sebp_rule", Rule()))
        if not isinstance(self.module, nn.Linear):
            left, right = right, left
        try:
            self.keep(left, right, active)
        except SebpError as error:
            if error.status != NONFINITE:
                raise
            self.is_finite = False

    def keep(self, left: Matrix, right: Matrix, active: Rows) -> None:
        """Keep elements of left^T right: dY^T X, or X^T dY for a ``Conv1D``."""
        context = thread_context()
        is_fixed = self.moments.is_fixed
        if is_fixed and not self.measures:
            self._keep_fixed(left, right, active)
            return
        if self.basis is None and not self.sums_whole:
            k = self.settings.k
            self.gradient = meprop_gradient(left, right, k, active, context=context)
            return
        r = self.scratch.matrix(self.moments.shape)
        if self.basis is None:
            library_backward(left, right, None, active, None, matrix_of(r), None)
        else:
            out = matrix_of(r)
            sparsegrad_gradient(self.basis, left, right, active, out=out, context=context)
            if self.measures:
                self._measure(r, left, right, active)
        if is_fixed:
            # A NaN outside the support is an error in the gradient, too.
            self.is_finite = self.is_finite and all_finite(r)
            taken = take_elements(matrix_of(r), self.moments.support, context)
            if self.gradient is not None:
                taken.values[:] += self.gradient.values
            self.gradient = taken
        elif not self.sums_whole:
            self.gradient = top_elements(matrix_of(r), self.settings.k, context)
        elif self.whole is None:
            self.whole = r.clone()
        else:
            self.whole += r

    def _measure(self, r: Tensor, left: Matrix, right: Matrix, active: Rows) -> None:
        """Add to the energies those of R and of dW, which is computed for that."""
        dw = torch.empty(self.weight.shape, dtype=torch.float32, device="cpu")
        library_backward(left, right, None, active, None, matrix_of(dw), None)
        part, whole = self.energies
        self.energies = part + energy_of(r), whole + energy_of(dw)

    def _keep_fixed(self, left: Matrix, right: Matrix, active: Rows) -> None:
        """Compute the elements of a fixed support, and no whole gradient."""
        # A NaN beside the support is an error in the gradient, too.
        both = (all_finite(_active_rows(matrix, active)) for matrix in (left, right))
        self.is_finite = self.is_finite and all(both)
        product = sampled_product
        if self.basis is not None:
            product = partial(sparsegrad_kept, self.basis)
        self.gradient = product(
            left,
            right,
            self.moments.support,
            active,
            out=None if self.gradient is None else self.gradient.values,
            accumulate=self.gradient is not None,
            context=thread_context(),
        )

    # ---- in the step ----

    def finish_gradient(self, adamw: AdamW) -> bool:
        """Choose the elements where backwards were summed; False if no step can be taken."""
        if self.whole is not None:
            if not all_finite(self.whole):
                return False
            self.gradient = top_elements(matrix_of(self.whole), self.settings.k, thread_context())
        if self.gradient is None:
            return self.is_finite
        sound = self.is_finite and bool(np.isfinite(self.gradient.values).all())
        return sound and self.has_room(adamw)

    def has_room(self, adamw: AdamW) -> bool:
        """Return whether learning rate times moment does not overflow.

        No moment is larger than the largest gradient, so a factor below 1/2 is safe.
        """
        rate = adamw.lr / (1 - adamw.beta1 ** (self.moments.steps + 1))
        return rate < 0.5 or rate * self.largest() < LARGEST_FLOAT / 2

    @property
    def rounds_stochastically(self) -> bool:
        """Whether sums are rounded stochastically: those of bfloat16, if the settings say so."""
        return self.settings.rounding == "stochastic" and self.weight.dtype == torch.bfloat16

    def check_decay(self, adamw: AdamW) -> None:
        """Raise ValueError for a decay by more than the weight, which such a sum does not take."""
        decay = adamw.lr * adamw.weight_decay
        if self.rounds_stochastically and decay > 1:
            raise ValueError(
                f"{self.name}: lr * weight_decay is {decay:g}, over 1, which"
                ' rounding="stochastic" does not do'
            )

    def largest(self) -> float:
        """Return the largest magnitude in gradient and first moments."""
        values = self.gradient.values, self.moments.moments().moment1
        return max(float(np.abs(one).max(initial=0)) for one in values)

    def step(self, adamw: AdamW) -> None:
        """Take a step, if there is a gradient, and drop the gradient."""
        if self.gradient is None:
            return
        self.moments.step(self.gradient, adamw, thread_context())
        if self.basis is None:
            self.move_weight(partial(add_elements, self.gradient), adamw)
        else:
            self.move_weight(partial(sparsegrad_update, self.basis, self.gradient), adamw)
        if self.measures and self.moments.is_fixed:
            self.scratch.free()  # of the whole R, which other steps do not need
        self.drop_gradient()
        after = self.settings.fix_support_after
        if after is not None and not self.moments.is_fixed and self.moments.steps >= after:
            self._fix_support()
        if self.settings.drop_after and self.moments.steps % self.settings.drop_after == 0:
            self.moments.drop_unused()

    def move_weight(self, add: Callable[[Matrix, Context], None], adamw: AdamW) -> None:
        """Let the weight decay, and add a step to it.

        Where a bfloat16 weight is rounded stochastically, the step is made in the scratch memory
        first, and decay and step are one sum.

        Parameters
        ----------
        add : callable
            Adds the step to a matrix of the weight's shape.
        adamw : AdamW
        """
        context, weight = thread_context(), matrix_of(self.weight)
        if not self.rounds_stochastically:
            self.decay(weight, adamw, context)
            add(weight, context)
        else:
            step = matrix_of(self.scratch.matrix(self.weight.shape).zero_())
            add(step, context)
            self.add_stochastically(step, weight, adamw)
        torch.autograd.graph.increment_version(self.weight)

    def add_stochastically(self, step: Matrix, weight: Matrix, adamw: AdamW) -> None:
        """Add a step to a bfloat16 matrix that decays, each element rounded up or down at random.

        The random numbers are those of this layer's step: another offset for each.
        """
        stochastic_add(
            step,
            weight,
            seed=self.settings.seed,
            offset=self.moments.steps * self.count + self.index,
            decay=adamw.lr * adamw.weight_decay,
            context=thread_context(),
        )

    def decay(self, weight: Matrix, adamw: AdamW, context: Context) -> None:
        """Let the weight decay, before the step in ``gradient`` is added to it."""
        weight_decay(weight, adamw, context)

    def _fix_support(self) -> None:
        """Keep only the k elements of largest second moment from now on, if one is not zero.

        A moment that overflowed becomes the largest float, which decays. An Inf could not be
        chosen by, and its element would never move again.
        """
        old = self.moments.moments()
        squares = np.minimum(old.moment2, LARGEST_FLOAT)
        if not squares.any():
            return  # all gradients were zero, which tells nothing: choose by the next ones
        chosen = top_elements(squares[None, :], self.settings.k, thread_context()).indices
        kept = (array[chosen] for array in (old.indices, old.moment1, squares))
        moments = SparseAdamW(self.moments.shape, old.indices[chosen])
        moments.set_moments(Moments(*kept, old.steps))
        self.moments = moments
        self.scratch.free()  # no whole gradient is needed any more

    # ---- in and out of the model ----

    def watch(self, backwards: Backwards) -> None:
        """Let the weight train as usual."""
        self.detach()
        self._attach(backwards)

    def attach(
        self,
        basis: Basis | None,
        moments: SparseAdamW,
        scratch: Scratch,
        backwards: Backwards,
    ) -> None:
        """Train only the kept elements."""
        self.basis, self.moments, self.scratch = basis, moments, scratch
        self.weight.requires_grad_(False)
        self.weight.grad = None
        self._attach(backwards)

    def _attach(self, backwards: Backwards) -> None:
        self.backwards = backwards
        self.drop_gradient()
        if self.hook is None:
            # Before all other hooks, as these may return another Y.
            self.hook = self.module.register_forward_hook(
                _Hook(self), prepend=True, with_kwargs=True
            )

    def detach(self) -> None:
        """Restore the layer."""
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
        if self.moments is not None:
            self.weight.requires_grad_(True)
        self.basis = self.moments = self.backwards = None
        self.drop_gradient()


# --------------------------------------------------------------------------------------------------
# In the graph


class _Collect(torch.autograd.Function):
    """Returns a token of Y's shape; its backward hands dY to the layer.

    Its only input that requires a gradient is a leaf. So its backward runs in ``backward()``, which
    computes the gradients of all leaves, and not in ``torch.autograd.grad()`` of other tensors.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        leaf: Tensor,
        y: Tensor,
        layer: SparseLayer,
        x: Tensor | None,
    ) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return y.new_zeros(()).expand(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
        (x,) = ctx.saved_tensors
        ctx.layer.collect(dy, x)
        return None, None, None, None


class _Tap(torch.autograd.Function):
    """Returns Y; its backward passes dY on to both Y and the token."""

    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, token: Tensor) -> Tensor:
        # The same memory, but no view of Y for autograd: a view could not be changed in place.
        return y.data

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
        return dy, dy


@torch.compiler.disable
def _tap(layer: SparseLayer, x: Tensor, y: Tensor) -> Tensor:
    x = None if layer.moments is None else x.detach()
    # The output has a gradient even where neither input nor bias has one.
    leaf = torch.empty(0, requires_grad=True, device="cpu")
    return _Tap.apply(y, _Collect.apply(leaf, y.detach(), layer, x))


class _Hook:
    """The forward hook of a layer.

    It does nothing in a copy of the model, and where another weight replaces the layer's, as in
    ``torch.func.functional_call`` and so in :func:`~sebp.profile`.
    """

    def __init__(self, layer: SparseLayer | None) -> None:
        self.layer = layer
        self.weight = None if layer is None else layer.weight

    @property
    def is_in_use(self) -> bool:
        """Whether an optimizer trains the layer."""
        return self.layer is not None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor | None:
        if module.weight is not self.weight or not torch.is_grad_enabled():
            return None
        return _tap(self.layer, args[0] if args else next(iter(kwargs.values())), y)

    def __reduce__(self) -> tuple:
        return _Hook, (None,)
