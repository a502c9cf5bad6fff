# SPDX-License-Identifier: Apache-2.0
"""SparseGrad and MeProp: layers of which a few elements of the weight's gradient are trained.

A layer's forward and its gradients of inputs and bias stay its own. Its weight asks for no
gradient; a hook on the forward lets the backward compute, from dY and X on the active rows, the k
elements that are kept. The optimizer moves them, and hands the other parameters to the user's.

The kept elements are not the weight's ``grad``, which has the shape of the weight. They follow what
happens to the ``grad`` of others: a leaf in the graph has them collected by ``backward()`` and not
by ``torch.autograd.grad()``, and :class:`_Backwards` notices a ``zero_grad()`` of the model.
"""

import operator
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.weak import TensorWeakRef

from .._rules import Rule
from ..core import Array, Rows, SebpError
from ..sparse import (
    NONFINITE,
    AdamW,
    Basis,
    BasisSums,
    Moments,
    Sparse,
    SparseAdamW,
    Sums,
    add_elements,
    check_adamw,
    meprop_gradient,
    sparsegrad_gradient,
    sparsegrad_update,
    take_elements,
    top_elements,
    weight_decay,
)
from .apply import Layers
from .feed_forward import choose_layers, place_of, refusal
from .ops import _choose_x, _context, _find_rows, _flat, _indices_of, _run
from .padding import current_padding


class SparseBytes(NamedTuple):
    """Memory for the training of the sparse layers' weights, in bytes.

    Attributes
    ----------
    gradient : int
        Of all layers, between a backward and its step.
    state : int
        The optimizer's, of all layers.
    bases : int
        One for each kind of layers; during the basis phase the sums that they are made of.
    scratch : int
        One gradient of the largest layer, overwritten by each.
    """

    gradient: int
    state: int
    bases: int
    scratch: int


class _Settings(NamedTuple):
    """What a run is made with: all but the layers and bases. A checkpoint brings its own."""

    k: int
    basis_steps: int  # 0: there is no basis phase
    rank: tuple[int, int] | None
    fix_support_after: int | None
    accumulate: bool


def _array(tensor: Tensor) -> Array:
    """Give a tensor's memory as the library takes it from NumPy."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class _Scratch:
    """Room for one gradient in the space where elements are chosen."""

    def __init__(self) -> None:
        self.floats = torch.empty(0)

    def matrix(self, shape: tuple[int, int]) -> Tensor:
        size = shape[0] * shape[1]
        if self.floats.numel() < size:
            self.floats = torch.empty(size)
        return self.floats[:size].view(shape)


# --------------------------------------------------------------------------------------------------
# A layer

_LARGEST = float(np.finfo(np.float32).max)


def _is_finite(matrix: Tensor) -> bool:
    """Tell whether there is no NaN or Inf: then the sum is finite, unless it overflows."""
    return bool(matrix.sum().isfinite()) or bool(matrix.isfinite().all())


def _energy(matrix: Tensor) -> float:
    """Compute the sum of squares in float32: NaN or Inf if an element is."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float32)) ** 2


class _Layer:
    """One layer: the elements of its gradient since the last step, and their moments.

    During the basis phase it has neither: its weight's gradient is whole, and its hook notices a
    second one alone. Matrices are as the weight lies in memory: N x K, of a ``Conv1D`` K x N, where
    dY and X change places.
    """

    def __init__(self, name: str, module: nn.Module, settings: _Settings) -> None:
        self.name = name
        self.module = module
        self.settings = settings
        self.basis: Basis | None = None
        self.moments: SparseAdamW | None = None
        self.scratch = _Scratch()
        self.backwards: _Backwards | None = None
        self.hook: torch.utils.hooks.RemovableHandle | None = None
        self.drop_gradient()

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight

    def drop_gradient(self) -> None:
        self.has_gradient = False
        self.gradient: Sparse | None = None
        self.whole: Tensor | None = None  # with `accumulate`, while the support is not fixed
        self.is_finite = True

    # ---- in the backward ----

    def collect(
        self, dy: Tensor, x: Tensor | None, rows: Tensor | None, whole: Tensor | None
    ) -> None:
        """Compute the gradient's elements from dY and X, or X[rows] with `rows`."""
        if self.hook is None or (self.moments is None) != (x is None):
            return  # what was computed before the layer was released, or in another phase
        self.backwards.note()
        is_fixed = self.moments is not None and self.moments.is_fixed
        if self.has_gradient and not (is_fixed or self.settings.accumulate):
            raise RuntimeError(
                f"{self.name}: a second backward before the step, or a second call of the layer,"
                " but elements are chosen anew by each; pass accumulate=True"
            )
        self.has_gradient = True
        if x is None:
            return
        dy = _flat(dy if dy.dtype in (torch.float32, torch.bfloat16) else dy.float())
        active = _find_rows(dy, getattr(self.module, "sebp_rule", Rule()))
        if rows is None:
            x, compact = _flat(x), False
        else:
            x, compact = _choose_x(active, rows, x, whole)
        x = x.to(dy.dtype)
        if not isinstance(self.module, nn.Linear):
            if compact:
                dy, active = dy.index_select(0, _indices_of(active)), Rows.all(len(active))
            dy, x, compact = x, dy, False
        try:
            self._keep(dy, x, active, compact)
        except SebpError as error:
            if error.status != NONFINITE:
                raise
            self.is_finite = False

    def _keep(self, dy: Tensor, x: Tensor, active: Rows, compact: bool) -> None:
        context = _context()
        is_fixed = self.moments.is_fixed
        if self.basis is None and not is_fixed and not self.settings.accumulate:
            self.gradient = meprop_gradient(
                _array(dy),
                _array(x),
                self.settings.k,
                active,
                x_is_compact=compact,
                context=context,
            )
            return
        r = self.scratch.matrix(self.moments.shape)
        if self.basis is None:
            _run(dy, x, None, active, compact, None, r, None)
        else:
            sparsegrad_gradient(
                self.basis,
                _array(dy),
                _array(x),
                active,
                x_is_compact=compact,
                out=r.numpy(),
                context=context,
            )
        if is_fixed:
            # What lies beside the support tells of a gradient gone wrong all the same.
            self.is_finite = self.is_finite and _is_finite(r)
            taken = take_elements(r.numpy(), self.moments.support, context)
            if self.gradient is not None:
                taken.values[:] += self.gradient.values
            self.gradient = taken
        elif not self.settings.accumulate:
            self.gradient = top_elements(r.numpy(), self.settings.k, context)
        elif self.whole is None:
            self.whole = r.clone()
        else:
            self.whole += r

    # ---- in the step ----

    def finish_gradient(self, adamw: AdamW) -> bool:
        """Choose the elements where backwards were summed; False: there is no step with them."""
        if self.whole is not None:
            if not _is_finite(self.whole):
                return False
            self.gradient = top_elements(self.whole.numpy(), self.settings.k, _context())
        if self.gradient is None:
            return self.is_finite
        sound = self.is_finite and bool(np.isfinite(self.gradient.values).all())
        return sound and self._has_room(adamw)

    def _has_room(self, adamw: AdamW) -> bool:
        """Tell whether rate times moment does not overflow.

        No moment is larger than the largest gradient: a rate that makes it smaller is safe.
        """
        rate = adamw.lr / (1 - adamw.beta1 ** (self.moments.steps + 1))
        if rate < 0.5:
            return True
        values = self.gradient.values, self.moments.moments().moment1
        return rate * max(float(np.abs(one).max(initial=0)) for one in values) < _LARGEST / 2

    def step(self, adamw: AdamW) -> None:
        """Move the weight, if there is a gradient, which is then used up."""
        if self.gradient is None:
            return
        context, weight = _context(), _array(self.weight)
        self.moments.step(self.gradient, adamw, context)
        weight_decay(weight, adamw, context)
        if self.basis is None:
            add_elements(self.gradient, weight, context)
        else:
            sparsegrad_update(self.basis, self.gradient, weight, context)
        torch.autograd.graph.increment_version(self.weight)
        self.drop_gradient()
        after = self.settings.fix_support_after
        if after is not None and not self.moments.is_fixed and self.moments.steps >= after:
            self._fix_support()

    def _fix_support(self) -> None:
        """Go on with the k elements of largest second moment alone.

        One that overflowed goes on as the largest number, which decays: as Inf it would be no
        number to choose by, and its element would never move again.
        """
        old = self.moments.moments()
        squares = np.minimum(old.moment2, _LARGEST)
        chosen = top_elements(squares[None, :], self.settings.k, _context()).indices
        kept = (array[chosen] for array in (old.indices, old.moment1, squares))
        moments = SparseAdamW(self.moments.shape, old.indices[chosen])
        moments.set_moments(Moments(*kept, old.steps))
        self.moments = moments

    # ---- in and out of the model ----

    def watch(self, backwards: "_Backwards") -> None:
        """Let the weight train as usual."""
        self.detach()
        self._attach(backwards)

    def attach(
        self,
        basis: Basis | None,
        moments: SparseAdamW,
        scratch: _Scratch,
        backwards: "_Backwards",
    ) -> None:
        """Train the elements alone."""
        self.basis, self.moments, self.scratch = basis, moments, scratch
        self.weight.requires_grad_(False)
        self.weight.grad = None
        self._attach(backwards)

    def _attach(self, backwards: "_Backwards") -> None:
        self.backwards = backwards
        self.drop_gradient()
        if self.hook is None:
            # First of all hooks, as others may give another Y.
            self.hook = self.module.register_forward_hook(
                _Hook(self), prepend=True, with_kwargs=True
            )

    def detach(self) -> None:
        """Make the layer what it was."""
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
        if self.moments is not None:
            self.weight.requires_grad_(True)
        self.basis = self.moments = self.backwards = None
        self.drop_gradient()


class _Backwards:
    """Tells whether the gradients that were there after the last backward are still wanted.

    ``zero_grad()`` of the model, or of the user's optimizer, leaves no ``grad`` to the parameters
    that they share. What layers keep is then dropped as well. A backward is noticed before it gives
    any of these parameters a new ``grad``.
    """

    def __init__(
        self,
        layers: Sequence[_Layer],
        base: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
    ) -> None:
        self.layers = layers
        self.base = base
        self.parameters = set(parameters)
        self._with_grad: list[Tensor] = []
        # Backwards that have not come to their end; what is referred to lives as long as they do.
        self._tasks: dict[int, weakref.ref] = {}
        self._hooks: dict[Tensor, torch.utils.hooks.RemovableHandle] = {}
        self._watch()

    def _watched(self) -> list[Tensor]:
        """Give the parameters that both ``zero_grad()`` reach."""
        groups = self.base.param_groups
        return [p for group in groups for p in group["params"] if p in self.parameters]

    def _watch(self) -> None:
        """Have each parameter that trains tell before it is given a gradient."""
        for parameter in self._watched():
            if parameter.requires_grad and parameter not in self._hooks:
                self._hooks[parameter] = parameter.register_hook(self._before_grad)

    def _before_grad(self, grad: Tensor) -> None:
        self.note()

    def note(self) -> None:
        """Take notice of a backward, within it."""
        task = torch._C._current_graph_task_id()
        if task in self._tasks:
            return
        self.drop_unwanted()
        remember = partial(self._remember, task)
        self._tasks[task] = weakref.ref(remember)
        torch.autograd.Variable._execution_engine.queue_callback(remember)

    def _remember(self, task: int) -> None:
        """Remember, at the end of a backward, which parameters have a gradient."""
        self._tasks = {
            other: end for other, end in list(self._tasks.items()) if other != task and end()
        }
        self._with_grad = [p for p in self._watched() if p.grad is not None]
        self._watch()  # some may have been frozen before

    def drop_unwanted(self) -> None:
        """Drop what layers keep if ``zero_grad()`` was called since the last backward."""
        ends = list(self._tasks.values())
        if any(end() for end in ends):
            return  # within another backward, which has looked
        # What a backward that raised has left is not known: it never came to its end.
        parameters = self._watched() if ends else self._with_grad
        if (ends or parameters) and all(p.grad is None for p in parameters):
            self.drop()

    def drop(self) -> None:
        """Drop what layers keep."""
        self._with_grad = []
        self._tasks = {}
        for layer in self.layers:
            layer.drop_gradient()

    def release(self) -> None:
        """Take no notice any more."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}


class _Collect(torch.autograd.Function):
    """Gives a token in the place of Y, and in the backward dY to the layer.

    Of its inputs a leaf alone has a gradient: so it runs in a ``backward()``, which is for all
    leaves, and not in ``torch.autograd.grad()`` of others.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        leaf: Tensor,
        y: Tensor,
        layer: _Layer,
        x: Tensor | None,
        rows: Tensor | None,
        whole: Tensor | None,
    ) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, rows)
        ctx.whole = None if whole is None else (TensorWeakRef(whole), whole._version)
        return y.new_zeros(()).expand(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
        x, rows = ctx.saved_tensors
        whole = None
        if ctx.whole is not None:
            whole, version = ctx.whole[0](), ctx.whole[1]
            whole = None if whole is None or whole._version != version else whole
        ctx.layer.collect(dy, x, rows, whole)
        return None, None, None, None, None, None


class _Tap(torch.autograd.Function):
    """Gives Y as it is, and in the backward dY to both it and the token."""

    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, token: Tensor) -> Tensor:
        # The same memory, but to autograd no view of Y, which could not be changed in place.
        return y.data

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
        return dy, dy


@torch.compiler.disable
def _tap(layer: _Layer, x: Tensor, y: Tensor) -> Tensor:
    rows = whole = None
    if layer.moments is None:
        x = None
    else:
        padding = current_padding()
        skips = padding is not None and hasattr(layer.module, "sebp_rule") and padding.fits(x)
        if skips and not padding.keep_inputs:
            x, rows, whole = padding.compact(x), padding.rows, x
        x = x.detach()
    # The output has a gradient even where neither input nor bias has one.
    leaf = torch.empty(0, requires_grad=True)
    return _Tap.apply(y, _Collect.apply(leaf, y.detach(), layer, x, rows, whole))


class _Hook:
    """The forward hook of a layer.

    It does nothing in a copy of the model, and where another weight stands in for the layer's, as
    ``torch.func.functional_call`` and so :func:`~sebp.profile` have it.
    """

    def __init__(self, layer: _Layer | None) -> None:
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


# --------------------------------------------------------------------------------------------------
# The optimizer


_UNKNOWN = (float("nan"), float("nan"))
# Of the gradients of a kind: half of what sums take, as theirs is rounded otherwise than this one.
_MOST_ENERGY = _LARGEST / 4
_NOT_DONE = ("maximize", "amsgrad")


def _numbers_of(name: str, group: Mapping[str, object]) -> AdamW:
    """Read the numbers of a layer's step from its weight's group, and refuse what is not done."""
    for option in _NOT_DONE:
        if group.get(option):
            raise ValueError(f"{name}: {option} is not done by the step of sparse layers")
    given = {
        "lr": group.get("lr"),
        "betas": group.get("betas", (0.9, 0.999)),
        "eps": group.get("eps", 1e-8),
        "weight_decay": group.get("weight_decay", 0.0),
    }
    try:
        lr, (beta1, beta2), eps, decay = given.values()
        return AdamW(float(lr), float(beta1), float(beta2), float(eps), float(decay))
    except (TypeError, ValueError):
        raise ValueError(f"{name}: its group's numbers are not those of AdamW: {given}") from None


def _numbers(
    optimizer: torch.optim.Optimizer, layers: Sequence[tuple[str, Tensor, int]]
) -> list[AdamW]:
    """Read the numbers of steps, and have them checked before anything has moved.

    Parameters
    ----------
    layers : sequence of (str, Tensor, int)
        Name and weight of each, and the number of steps taken.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    numbers, known = [], set()
    for name, weight, steps in layers:
        if id(weight) not in groups:
            raise ValueError(f"{name}: its weight is not among the optimizer's parameters")
        adamw = _numbers_of(name, groups[id(weight)])
        if (adamw, steps) not in known:
            try:
                check_adamw(adamw, steps, _context())
            except SebpError as error:
                raise SebpError(error.status, f"{name}: {error}; {adamw}") from None
            known.add((adamw, steps))
        numbers.append(adamw)
    return numbers


def _refuse_processes() -> None:
    distributed = torch.distributed
    if (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    ):
        raise RuntimeError("gradients of sparse layers are not summed over processes")


@dataclass
class Kind:
    """Layers at the same place of each block, which share a basis.

    Attributes
    ----------
    name : str
        The layers' names with "*" for numbers, and `shape`: "layer.*.output.dense 768x3072".
    shape : (int, int)
        Of their weights: N x K; of a ``Conv1D`` K x N.
    layers : list of str
        Their names.
    basis : Basis or None
        None during the basis phase, and for MeProp.
    shares : (float, float)
        The shares of the energy of the gradients seen that lie in u_out and u_in; NaN where not
        known.
    """

    name: str
    shape: tuple[int, int]
    layers: list[str] = field(default_factory=list)
    basis: Basis | None = None
    shares: tuple[float, float] = _UNKNOWN


class SparseOptimizer(torch.optim.Optimizer):
    """Trains the chosen layers' weights by SparseGrad or MeProp, all else by another optimizer.

    Made by :func:`~sebp.apply_sparsegrad_to_model` and :func:`~sebp.apply_meprop_to_model`. It
    shares ``param_groups`` and ``state`` with the user's optimizer, so that schedulers may be given
    either. The sparse weights stay in their groups, from which their step takes ``lr``,
    ``weight_decay`` (decoupled), ``betas`` and ``eps``; what a group lacks is as in
    ``torch.optim.AdamW``, without decay; ``maximize`` and ``amsgrad`` are refused. As they have no
    ``grad``, the user's optimizer passes them by, and what it kept for them is deleted: that memory
    is free.

    Their gradients come from ``backward()``, not from ``torch.autograd.grad()``. They are dropped
    by :meth:`zero_grad`, and by ``zero_grad()`` of the model or of the user's optimizer, but not if
    these are told to write zeros (``set_to_none=False``), nor where no other parameter has a
    gradient. Clipping does not see them, nor does a ``GradScaler``, with which a step is refused.

    It belongs to the model it was made for and is not copied or pickled: see :meth:`state_dict`.

    Attributes
    ----------
    base : torch.optim.Optimizer
        The user's.
    kinds : list of Kind
        The layers, by kind.
    method : "SparseGrad" or "MeProp"
    steps : int
        How many steps were taken, those of the basis phase among them.
    """

    def __init__(
        self,
        method: str,
        base: torch.optim.Optimizer,
        kinds: list[Kind],
        layers: list[_Layer],
        settings: _Settings,
        parameters: Iterable[nn.Parameter],
    ) -> None:
        super().__init__(base.param_groups, base.defaults)
        self.method = method
        self.base = base
        self.kinds = kinds
        self.steps = 0
        self._layers = {layer.name: layer for layer in layers}
        self._settings = settings
        self._sums: dict[str, BasisSums] = {}
        self._energies: dict[str, float] = {}
        self._share_groups()
        # What there may be no memory for, before anything is done to the model.
        has_phase = settings.basis_steps > 0
        sums = {kind.name: BasisSums(*kind.shape) for kind in kinds if has_phase}
        moments = {} if has_phase else self._new_moments()
        self._backwards = _Backwards(layers, base, parameters)
        if has_phase:
            self._begin_basis_phase(sums, dict.fromkeys(sums, 0.0))
        else:
            self._begin_sparse_phase(moments)

    def _share_groups(self) -> None:
        self.param_groups, self.state = self.base.param_groups, self.base.state

    # ---- phases ----

    @property
    def in_basis_phase(self) -> bool:
        """Whether gradients are still collected, and all weights train as usual."""
        return bool(self._sums)

    def _begin_basis_phase(self, sums: dict[str, BasisSums], energies: dict[str, float]) -> None:
        self._sums, self._energies = sums, energies
        for kind in self.kinds:
            kind.basis = None
        for layer in self._layers.values():
            layer.watch(self._backwards)

    def _new_moments(self) -> dict[str, SparseAdamW]:
        return {
            name: SparseAdamW(kind.shape if kind.basis is None else kind.basis.rank)
            for kind in self.kinds
            for name in kind.layers
        }

    def _begin_sparse_phase(self, moments: dict[str, SparseAdamW]) -> None:
        self._sums = {}
        scratch = _Scratch()
        for kind in self.kinds:
            for name in kind.layers:
                layer = self._layers[name]
                layer.attach(kind.basis, moments[name], scratch, self._backwards)
                self.base.state.pop(layer.weight, None)

    def _solve(self) -> None:
        bases = [
            self._sums[kind.name].solve(*(self._settings.rank or kind.shape), _context())
            for kind in self.kinds
        ]
        for kind, basis in zip(self.kinds, bases, strict=True):
            kind.basis, kind.shares = basis, basis.shares
        self._begin_sparse_phase(self._new_moments())

    # ---- a step ----

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take a step.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and its gradients.

        Returns
        -------
        Tensor or None
            What `closure` returned.

        Raises
        ------
        SebpError
            If a gradient of these layers holds a NaN or Inf, or numbers so large that a step or, in
            the basis phase, the sum of their squares would be one: the message names step and
            layers, and what these layers keep of it is dropped. If a number of a group is out of
            range; gradients are then kept. No parameter has changed in either case, nor anything
            that is summed. At the end of the basis phase also if a basis cannot be had: that step
            was taken, and the next one adds its gradients and tries again.
        ValueError, RuntimeError
            For a group's option that is not done; under ``torch.distributed`` or a ``GradScaler``;
            if a sparse weight asks for a gradient again, or is of another dtype or shape, on
            another device or not row by row in memory any more. No parameter has changed, and
            gradients are kept.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_surroundings()
        self._share_groups()
        self._backwards.drop_unwanted()
        with torch.no_grad():
            if self.in_basis_phase:
                self._step_basis_phase()
            else:
                self._step_sparse()
        return loss

    # So that a GradScaler tells that it is there, instead of dividing what it sees by its scale.
    _step_supports_amp_scaling = True

    def _refuse_surroundings(self) -> None:
        """Raise for what the gradients of sparse layers do not go through."""
        _refuse_processes()
        if vars(self).pop("found_inf", None) is not None:
            vars(self).pop("grad_scale")
            raise RuntimeError(
                "a GradScaler does not see the gradients of sparse layers; train without, in"
                " bfloat16 or float32"
            )
        for kind in self.kinds:
            for name in kind.layers:
                weight = self._layers[name].weight
                reason = refusal(weight)
                if not reason and weight.shape != kind.shape:
                    reason = f"is of {tuple(weight.shape)}, not {kind.shape}"
                if reason:
                    raise ValueError(f"{name}: its weight {reason}")
        if self.in_basis_phase:
            return
        for name, layer in self._layers.items():
            if layer.weight.requires_grad:
                raise RuntimeError(
                    f"{name}: its weight asks for a gradient, but its elements are trained here;"
                    " weight.requires_grad_(False), or release()"
                )

    def _refuse(self, names: Sequence[str]) -> None:
        """Raise if the gradients of some layers cannot be stepped with."""
        if names:
            self._backwards.drop()
            raise SebpError(
                NONFINITE,
                f"step {self.steps + 1}: the gradient of {', '.join(names)} holds a NaN, an Inf or"
                " too large numbers; no parameter was changed",
            )

    def _step_basis_phase(self) -> None:
        # All are looked at before the first is added.
        grads, refused, energies = [], [], dict(self._energies)
        for kind in self.kinds:
            for name in kind.layers:
                grad = self._layers[name].weight.grad
                if grad is None:
                    continue
                energy = energies[kind.name] + _energy(grad)
                if energy < _MOST_ENERGY:
                    energies[kind.name] = energy
                    grads.append((self._sums[kind.name], grad))
                else:
                    refused.append(name)
        self._refuse(refused)
        for sums, grad in grads:
            sums.add(_array(grad), _context())
        self._energies = energies
        self.base.step()
        self.steps += 1
        self._backwards.drop()
        if self.steps >= self._settings.basis_steps:
            self._solve()

    def _step_sparse(self) -> None:
        layers = self._layers.values()
        numbers = _numbers(self, [(one.name, one.weight, one.moments.steps) for one in layers])
        pairs = list(zip(layers, numbers, strict=True))
        self._refuse([layer.name for layer, adamw in pairs if not layer.finish_gradient(adamw)])
        self.base.step()
        for layer, adamw in pairs:
            layer.step(adamw)
        self.steps += 1
        self._backwards.drop()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients; a step has used up those of the sparse layers anyway."""
        self.base.zero_grad(set_to_none)
        self._backwards.drop()

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Refuse to be copied."""
        raise TypeError(
            f"a {type(self).__name__} belongs to the model it was made for; copy its state_dict()"
        )

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, object]:
        """Give all that a resumed run needs besides the model's own: it goes on bit for bit.

        Returns
        -------
        dict
            The user's optimizer's, and under "sebp" the rest: settings, steps, the sums of the
            basis phase or bases, supports and moments.
        """
        ours = {
            "method": self.method,
            "settings": self._settings._asdict(),
            "kinds": {kind.name: list(kind.layers) for kind in self.kinds},
            "steps": self.steps,
            "sums": {kind: _tensors(sums.sums()) for kind, sums in self._sums.items()},
            "bases": {},
            "moments": {},
        }
        for kind in self.kinds:
            if kind.basis is not None:
                ours["bases"][kind.name] = {
                    "u_out": torch.from_numpy(kind.basis.u_out),
                    "u_in": torch.from_numpy(kind.basis.u_in),
                    "shares": kind.shares,
                }
        for name, layer in self._layers.items():
            if layer.moments is not None:
                ours["moments"][name] = {
                    "is_fixed": layer.moments.is_fixed,
                    **_tensors(layer.moments.moments()),
                }
        return {**self.base.state_dict(), "sebp": ours}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Go on where a run stopped, whatever phase it was in and this one is.

        The checkpoint brings its settings, as it brings the rates of groups: `basis_steps`, `rank`
        and `fix_support_after` are those of the run that stopped. `accumulate`, which allows and
        changes nothing, holds if either was made with it.

        Raises
        ------
        ValueError
            If the checkpoint is not of such an optimizer, or of other layers or another k; if it is
            incomplete, or its parts do not go together. Nothing has changed then.
        SebpError
            If bases, sums or moments are not valid or of another shape; or if it is of the basis
            phase, and libsebp was built without LAPACK. Nothing has changed then.
        """
        theirs = dict(state_dict)
        ours = theirs.pop("sebp", None)
        if ours is None:
            raise ValueError("the checkpoint is of an optimizer without sparse layers")
        sums, bases, moments = {}, {}, {}
        try:
            settings, steps = self._check_checkpoint(ours), _integer("steps", ours["steps"])
            for kind in self.kinds:
                if ours["sums"]:
                    sums[kind.name] = _load_sums(kind, ours["sums"], settings)
                    continue
                if self.method == "SparseGrad":
                    bases[kind.name] = _load_basis(kind, ours["bases"])
                basis = bases[kind.name][0] if bases else None
                moments |= _load_moments(kind, basis, ours["moments"], settings)
        except KeyError as error:
            raise ValueError(f"the checkpoint is incomplete or too old: no {error}") from None
        if sums:
            _check_lapack()
        self.base.load_state_dict(theirs)
        self._share_groups()
        self.steps, self._settings = steps, settings
        for layer in self._layers.values():
            layer.settings = settings
        for kind in self.kinds:
            kind.basis, kind.shares = bases.get(kind.name, (None, _UNKNOWN))
        if sums:
            energies = {name: ours["sums"][name]["energy"] for name in sums}
            self._begin_basis_phase(sums, energies)
        else:
            self._begin_sparse_phase(moments)

    def _check_checkpoint(self, ours: Mapping[str, object]) -> _Settings:
        """Give the settings to go on with, or raise if the run was another."""
        kinds = {kind.name: list(kind.layers) for kind in self.kinds}
        saved = _Settings(**{name: ours["settings"][name] for name in _Settings._fields})
        if (ours["method"], ours["kinds"], saved.k) != (self.method, kinds, self._settings.k):
            raise ValueError(
                f"the checkpoint is of {ours['method']}, other layers, or another k; this is"
                f" {self.method} with {len(self._layers)} layers and k={self._settings.k}"
            )
        return saved._replace(
            basis_steps=_integer("basis_steps", saved.basis_steps),
            rank=_check_pair(saved.rank),
            fix_support_after=_check_after(saved.fix_support_after),
            accumulate=bool(saved.accumulate or self._settings.accumulate),
        )

    # ---- what it is and what it takes ----

    def bytes(self) -> SparseBytes:
        """Count the memory that the training of the sparse layers' weights takes now."""
        gradient = state = scratch = 0
        for layer in self._layers.values():
            weight = layer.weight
            if self.in_basis_phase:
                gradient += weight.numel() * weight.element_size()
                kept = self.base.state.get(weight, {}).values()
                state += sum(t.numel() * t.element_size() for t in kept if isinstance(t, Tensor))
                continue
            rows, cols = layer.moments.shape
            state += layer.moments.bytes
            if layer.moments.is_fixed:
                gradient += 4 * layer.settings.k
            elif layer.settings.accumulate:
                gradient += 4 * rows * cols
            else:
                gradient += 12 * layer.settings.k
            scratch = 4 * layer.scratch.floats.numel()
        if self.in_basis_phase:
            bases = sum(4 * (n * n + k * k) for n, k in (kind.shape for kind in self.kinds))
        else:
            bases = sum(kind.basis.bytes for kind in self.kinds if kind.basis is not None)
        return SparseBytes(gradient, state, bases, scratch)

    def __repr__(self) -> str:
        """Say it in a few lines."""
        phase = f"in step {self.steps}"
        if self.in_basis_phase:
            phase = f"basis phase, {self.steps} of {self._settings.basis_steps} steps"
        lines = [f"{self.method} on {len(self._layers)} layers, {phase}"]
        for kind in self.kinds:
            line = f"{kind.name}: {len(kind.layers)} layers"
            if kind.basis is not None:
                line += ", basis of {} x {}".format(*kind.basis.rank)
                line += ", which hold {:.1%} and {:.1%} of the energy".format(*kind.shares)
            lines.append(line)
        memory = ", ".join(f"{name} {size}" for name, size in self.bytes()._asdict().items())
        return "\n".join([*lines, f"bytes: {memory}", f"all else: {type(self.base).__name__}"])

    def release(self) -> None:
        """Make the model's layers what they were; their weights are ordinary at all times.

        Afterwards this object is not to be used.
        """
        for layer in self._layers.values():
            layer.detach()
        self._backwards.release()


def _tensors(copy: tuple) -> dict[str, object]:
    """Give a copied state as PyTorch saves it: arrays as tensors, by name."""
    return {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in copy._asdict().items()
    }


def _arrays(saved: dict[str, object]) -> dict[str, object]:
    """Undo :func:`_tensors`."""
    return {
        name: value.numpy() if isinstance(value, Tensor) else value for name, value in saved.items()
    }


def _load_sums(kind: Kind, saved: Mapping[str, dict], settings: _Settings) -> BasisSums:
    """Make a kind's sums of a checkpoint's, from which bases can be had."""
    rank = settings.rank or kind.shape
    _check_rank(kind, rank, settings.basis_steps)
    _check_k(settings.k, kind, rank)
    sums = BasisSums(*kind.shape)
    sums.set_sums(Sums(**_arrays(saved[kind.name])))
    return sums


def _load_basis(kind: Kind, saved: Mapping[str, dict]) -> tuple[Basis, tuple[float, float]]:
    """Make a kind's basis of a checkpoint's, with the shares of energy."""
    arrays = _arrays(saved[kind.name])
    basis = Basis.from_vectors(arrays["u_out"], arrays["u_in"])
    if basis.shape != kind.shape:
        raise ValueError(
            f"the checkpoint's basis of {kind.name} is of {basis.shape}, not {kind.shape}"
        )
    return basis, tuple(arrays["shares"])


def _load_moments(
    kind: Kind, basis: Basis | None, saved: Mapping[str, dict], settings: _Settings
) -> dict[str, SparseAdamW]:
    """Make the moments of a kind's layers of a checkpoint's, with which k elements can train."""
    shape = kind.shape if basis is None else basis.rank
    _check_k(settings.k, kind, shape)
    moments = {}
    for name in kind.layers:
        arrays = _arrays(saved[name])
        is_fixed = arrays.pop("is_fixed")
        one = SparseAdamW(shape, arrays["indices"] if is_fixed else None)
        one.set_moments(Moments(**arrays))
        if one.count < settings.k and one.steps > 0 or is_fixed and one.count != settings.k:
            raise ValueError(
                f"the checkpoint has moments of {one.count} elements of {name}, but k is"
                f" {settings.k}"
            )
        moments[name] = one
    return moments


# --------------------------------------------------------------------------------------------------
# Into a model


def _make_kinds(chosen: list[tuple[str, nn.Module]]) -> list[Kind]:
    kinds: dict[str, Kind] = {}
    for name, module in chosen:
        n, k = module.weight.shape
        kind = f"{place_of(name)} {n}x{k}"
        kinds.setdefault(kind, Kind(kind, (n, k))).layers.append(name)
    return list(kinds.values())


def _integer(name: str, value: object) -> int:
    """Take what counts as an integer, now and not after the basis phase."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}, not an integer")
    return operator.index(value)


def _check(optimizer: torch.optim.Optimizer, chosen: list[tuple[str, nn.Module]]) -> None:
    """Raise for what both methods refuse."""
    _refuse_processes()
    if isinstance(optimizer, SparseOptimizer):
        raise TypeError("the optimizer has sparse layers already; give the one it was made with")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"the optimizer is {type(optimizer).__name__}, not of torch.optim")
    _numbers(optimizer, [(name, module.weight, 0) for name, module in chosen])


def _check_k(k: int, kind: Kind, shape: tuple[int, int]) -> None:
    if not 1 <= k <= shape[0] * shape[1]:
        raise ValueError(f"k is {k}, but {kind.name} has 1 to {shape[0] * shape[1]} elements")


def _check_after(fix_support_after: int | None) -> int | None:
    if fix_support_after is None:
        return None
    after = _integer("fix_support_after", fix_support_after)
    if after < 1:
        raise ValueError(f"fix_support_after is {after}, not 1 or more")
    return after


def _check_pair(rank: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if rank is None:
        return None
    pair = tuple(rank) if isinstance(rank, Sequence) else (rank, rank)
    if len(pair) != 2:
        raise ValueError(f"rank is {rank!r}, not one number or two")
    return tuple(_integer("rank", r) for r in pair)


def _check_lapack() -> None:
    """Raise now, not after the basis phase, if the library has no LAPACK."""
    sums = BasisSums(1, 1)
    sums.add(np.ones((1, 1), np.float32))
    sums.solve(1, 1)


def _check_rank(kind: Kind, rank: tuple[int, int], basis_steps: int) -> None:
    for size, r in zip(kind.shape, rank, strict=True):
        if not 1 <= r <= size:
            raise ValueError(f"rank is {r}, but {kind.name} has 1 to {size} directions")
        if r > basis_steps * len(kind.layers) * min(kind.shape):
            raise ValueError(
                f"{basis_steps} gradients of {len(kind.layers)} layers do not span {r} directions"
                f" of {kind.name}"
            )


def apply_sparsegrad_to_model(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    k: int,
    basis_steps: int = 30,
    rank: int | tuple[int, int] | None = None,
    layers: Layers = None,
    *,
    bases: Mapping[str, Basis] | None = None,
    fix_support_after: int | None = None,
    accumulate: bool = False,
) -> SparseOptimizer:
    """Train a model's feed-forward layers by SparseGrad, all else by the user's optimizer.

    For `basis_steps` steps all weights train under the user's optimizer, and the gradients of these
    layers are summed for the bases, one pair for the layers at the same place of each block. Then
    only k elements of each gradient are computed and kept, in the bases' space, and AdamW's moments
    of them alone. W stays an ordinary weight. Use what is returned in the place of `optimizer`.

    Parameters
    ----------
    model : nn.Module
        Any model.
    optimizer : torch.optim.Optimizer
        Of all its parameters that train, these weights among them.
    k : int
        How many elements of each gradient are kept.
    basis_steps : int, default 30
        Steps from whose gradients bases are made.
    rank : int or (int, int), optional
        How many leading vectors of u_out and u_in. Default: all.
    layers : str, sequence of str, or callable, optional
        Which layers: shell patterns of names, or a function of name and module. Default: the
        feed-forward layers of BERT, RoBERTa, DistilBERT, GPT-2, Llama, Mistral and Qwen.
    bases : mapping of str to Basis, optional
        Bases made before, by the names of :attr:`SparseOptimizer.kinds`: there is no basis phase.
    fix_support_after : int, optional
        After so many steps in the bases' space go on with the k elements of largest second moment
        alone: state and gradient then take 20 bytes for each, which at k = 1.2% of the elements is
        2% of what full fine-tuning takes. Default: elements are chosen anew in each step, as in the
        paper, and moments of all that ever were are kept, 21 to 43 bytes each: more than 2%, and it
        grows with the steps.
    accumulate : bool, default False
        Allow more than one backward before a step while elements are chosen anew: each layer then
        holds its whole rotated gradient between them. With a fixed support it is not needed, but
        until there is one, and in the basis phase, a second backward is refused without it.

    Returns
    -------
    SparseOptimizer
        The optimizer to use.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what it should be; if a layer cannot be trained so; if the optimizer
        has ``maximize``, ``amsgrad`` or no numbers of AdamW's; or if the basis phase is too short
        for the vectors asked for. The model is then as it was.
    SebpError
        If libsebp was built without LAPACK and there are no `bases`; or if a number of a group is
        out of range.
    RuntimeError
        Under ``torch.distributed``.
    """
    k, basis_steps = _integer("k", k), _integer("basis_steps", basis_steps)
    after, pair = _check_after(fix_support_after), _check_pair(rank)
    chosen = choose_layers(model, layers)
    _check(optimizer, chosen)
    kinds = _make_kinds(chosen)
    if bases is None and basis_steps < 1:
        raise ValueError(f"basis_steps is {basis_steps}, not 1 or more")
    for kind in kinds:
        if bases is None:
            _check_rank(kind, pair or kind.shape, basis_steps)
            _check_k(k, kind, pair or kind.shape)
            continue
        if kind.name not in bases:
            raise ValueError(f"there is no basis for {kind.name}")
        kind.basis = bases[kind.name]
        if not isinstance(kind.basis, Basis):
            raise TypeError(f"the basis of {kind.name} is {type(kind.basis).__name__}, not Basis")
        kind.shares = kind.basis.shares
        if kind.basis.shape != kind.shape:
            raise ValueError(f"{kind.name} is of {kind.shape}, its basis of {kind.basis.shape}")
        _check_k(k, kind, kind.basis.rank)
    if bases is None:
        _check_lapack()
    settings = _Settings(k, basis_steps if bases is None else 0, pair, after, bool(accumulate))
    made = [_Layer(name, module, settings) for name, module in chosen]
    return SparseOptimizer("SparseGrad", optimizer, kinds, made, settings, model.parameters())


def apply_meprop_to_model(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    k: int,
    layers: Layers = None,
    *,
    fix_support_after: int | None = None,
    accumulate: bool = False,
) -> SparseOptimizer:
    """Train a model's feed-forward layers by MeProp, as SparseGrad's paper runs it.

    The k largest elements of each weight's gradient are kept, without any bases; gradients of
    inputs and biases are whole. All arguments are those of :func:`apply_sparsegrad_to_model`.

    Returns
    -------
    SparseOptimizer
        The optimizer to use in the place of `optimizer`.

    Raises
    ------
    TypeError, ValueError, SebpError, RuntimeError
        As :func:`apply_sparsegrad_to_model`.
    """
    k, after = _integer("k", k), _check_after(fix_support_after)
    chosen = choose_layers(model, layers)
    _check(optimizer, chosen)
    kinds = _make_kinds(chosen)
    for kind in kinds:
        _check_k(k, kind, kind.shape)
    settings = _Settings(k, 0, None, after, bool(accumulate))
    made = [_Layer(name, module, settings) for name, module in chosen]
    return SparseOptimizer("MeProp", optimizer, kinds, made, settings, model.parameters())
