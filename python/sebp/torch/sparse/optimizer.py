# SPDX-License-Identifier: Apache-2.0
"""The optimizer of SparseGrad, MeProp and GaLore.

It takes steps with the elements that :mod:`.layer` collects, and leaves the other parameters
to the user's optimizer.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ...core import SebpError
from ...sparse import NONFINITE, BasisSums, SparseAdamW
from ..apply.feed_forward import refusal
from ..common.context import thread_context
from ..common.tensors import matrix_of
from .backwards import Backwards
from .base_optimizer import (
    StepGuard,
    drop_state,
    numbers_of_steps,
    refuse_evaluation,
    refuse_processes,
    scaled_rates,
)
from .checkpoint import load_basis, load_sums, settings_of, tensors_of
from .energy import describe, keep_measured, measure_last, plan_measures
from .layer import LARGEST_FLOAT, Scratch, SparseLayer, energy_of
from .memory import SparseBytes, count_bytes
from .settings import (
    UNKNOWN_SHARES,
    Kind,
    Settings,
    as_integer,
    check_lapack,
    equal_length_factor,
)

# Of the gradients of a kind: half of what sums take, as theirs is rounded otherwise than this one.
_MOST_ENERGY = LARGEST_FLOAT / 4
# What torch.optim.Optimizer itself has, and does for the user's optimizer.
_OF_BASE = (
    "add_param_group",
    "register_state_dict_pre_hook",
    "register_state_dict_post_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
)


class SparseOptimizer(torch.optim.Optimizer):
    """Trains the chosen layers' weights by few elements, the rest by another optimizer.

    Made by :func:`~sebp.apply_sparsegrad_to_model`, :func:`~sebp.apply_meprop_to_model` and
    :func:`~sebp.apply_galore_to_model`, whose layers count as sparse ones. It shares
    ``param_groups`` and ``state`` with the user's optimizer, so that schedulers work with
    either. The sparse weights stay in their groups. Their step takes ``lr``, ``weight_decay``
    (decoupled, on the whole of W), ``betas`` and ``eps`` from there; without ``weight_decay``
    there is none. A group without ``betas`` or ``eps``, as those of SGD and Lion, is refused,
    as a rate of AdamW is no rate of theirs; so are ``maximize``, ``amsgrad``, and weight decay
    that is added to the gradient. As these weights have no ``grad``, the user's optimizer skips
    them. Its state for them is deleted, which frees the memory.

    Their gradients come from ``backward()``, not from ``torch.autograd.grad()``. They are dropped
    by :meth:`zero_grad`, and by ``zero_grad()`` of the model or of the user's optimizer: that is
    seen by the ``grad`` of the other parameters, which is gone, or with ``set_to_none=False`` zero
    where a backward begins. Where no other parameter has a gradient, or only zeros that have been
    written to since, it cannot be seen, and a second backward before a step is refused, unless
    ``accumulate=True`` asks for the sum.
    Clipping does not see them. A step with a ``GradScaler``, which does not see them either, is
    refused.

    All other attributes are those of the user's optimizer. A step of the user's optimizer alone is
    refused, as it would leave the sparse layers out.

    ``train()`` and ``eval()`` of a schedule-free optimizer, which swap weights, work as before. The
    sparse weights are not averaged by it and so the same in both. If it trained them in the basis
    phase, they start from their average, which is what ``eval()`` puts in. Its ``warmup_steps`` are
    refused.

    It belongs to the model it was made for and cannot be copied or pickled: see :meth:`state_dict`.

    Attributes
    ----------
    base : torch.optim.Optimizer
        The user's.
    kinds : list of Kind
        The layers, by kind.
    method : "SparseGrad", "MeProp" or "GaLore"
    steps : int
        How many steps were taken, those of the basis phase among them.
    layers : dict of str to SparseLayer
        What trains each layer, by its name.
    settings : Settings
        What the run was made with.
    sums : dict of str to BasisSums
        During the basis phase, by kind; then empty.
    """

    def __init__(
        self,
        method: str,
        base: torch.optim.Optimizer,
        kinds: list[Kind],
        layers: list[SparseLayer],
        settings: Settings,
        parameters: Iterable[nn.Parameter],
    ) -> None:
        super().__init__(base.param_groups, base.defaults)
        for name in _OF_BASE:
            setattr(self, name, getattr(base, name))
        self.method = method
        self.base = base
        self.kinds = kinds
        self.steps = 0
        self.layers = {layer.name: layer for layer in layers}
        for index, layer in enumerate(layers):
            layer.index, layer.count = index, len(layers)
        self.settings = settings
        self.sums: dict[str, BasisSums] = {}
        self._energies: dict[str, float] = {}
        self._share_groups()
        # First what may run out of memory, before the model is changed.
        has_phase = settings.basis_steps > 0
        sums = {kind.name: BasisSums(*kind.shape) for kind in kinds if has_phase}
        moments = {} if has_phase else self._new_moments()
        self._backwards = Backwards(layers, base, parameters, settings.accumulate)
        if has_phase:
            self._begin_basis_phase(sums, dict.fromkeys(sums, 0.0))
        else:
            self._begin_sparse_phase(moments)
        self._guard = StepGuard(base)

    def __getattr__(self, name: str) -> object:
        """Return an attribute of the user's optimizer."""
        base = vars(self).get("base")
        # Python's own protocols, such as copying, are not passed on to another object.
        if base is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        try:
            return getattr(base, name)
        except AttributeError:
            ours, theirs = type(self).__name__, type(base).__name__
            raise AttributeError(
                f"neither {ours} nor its {theirs} has an attribute {name!r}", name=name, obj=self
            ) from None

    def _share_groups(self) -> None:
        self.param_groups, self.state = self.base.param_groups, self.base.state

    # ---- phases ----

    @property
    def in_basis_phase(self) -> bool:
        """Whether gradients are still collected, and all weights train as usual."""
        return bool(self.sums)

    def _begin_basis_phase(self, sums: dict[str, BasisSums], energies: dict[str, float]) -> None:
        self.sums, self._energies = sums, energies
        for kind in self.kinds:
            kind.basis = None
        for layer in self.layers.values():
            layer.watch(self._backwards)

    def _new_moments(self) -> dict[str, SparseAdamW]:
        return {
            name: self.layers[name].new_moments(kind) for kind in self.kinds for name in kind.layers
        }

    def _begin_sparse_phase(self, moments: dict[str, SparseAdamW]) -> None:
        self.sums = {}
        scratch = Scratch()
        for kind in self.kinds:
            for name in kind.layers:
                layer = self.layers[name]
                layer.attach(kind.basis, moments[name], scratch, self._backwards)
        plan_measures(self.kinds, self.layers, self.settings, self.steps + 1)
        drop_state(self.base, [layer.weight for layer in self.layers.values()])

    def _solve(self) -> None:
        bases = [
            self.sums[kind.name].solve(*(self.settings.rank or kind.shape), thread_context())
            for kind in self.kinds
        ]
        for kind, basis in zip(self.kinds, bases, strict=True):
            kind.basis, kind.shares = basis, basis.shares
            measure_last(kind, self.layers, self.steps)
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
            If a gradient of these layers holds a NaN or Inf, or numbers so large that a step would
            overflow, or in the basis phase the sum of their squares. The message names the step and
            the layers. The gradients of these layers are dropped, but for ``weight.grad`` in the
            basis phase. Also if a number of a group is out of range; gradients are then kept. In
            both cases no parameter and no sum has changed. At the end of the basis phase also if a
            basis cannot be computed. That step was taken; the next one adds its gradients and tries
            again.
        ValueError, RuntimeError
            If a group has an option that is not supported, or decays a weight by more than itself
            where ``rounding="stochastic"`` rounds it; under ``torch.distributed`` or a
            ``GradScaler``; if a schedule-free optimizer is in evaluation mode; if a sparse weight
            requires a gradient again, or none in the basis phase, has another dtype, shape or
            device, is not contiguous any more, or has become that of another. No parameter has
            changed, and gradients are kept.
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

    # A GradScaler then announces itself instead of dividing the gradients that it sees.
    _step_supports_amp_scaling = True

    def _refuse_surroundings(self) -> None:
        """Raise where the gradients of sparse layers would be wrong or missing."""
        refuse_processes()
        refuse_evaluation(self.base)
        if vars(self).pop("found_inf", None) is not None:
            vars(self).pop("grad_scale")
            raise RuntimeError(
                "a GradScaler does not see the gradients of sparse layers; train without, in"
                " bfloat16 or float32"
            )
        owners: dict[nn.Parameter, str] = {}
        for kind in self.kinds:
            for name in kind.layers:
                layer = self.layers[name]
                reason = refusal(layer.weight)
                if not reason and layer.weight.shape != kind.shape:
                    reason = f"is of {tuple(layer.weight.shape)}, not {kind.shape}"
                if not reason and layer.weight.dtype != layer.dtype:
                    reason = f"is of {layer.weight.dtype}, and was of {layer.dtype}"
                if not reason and (other := owners.setdefault(layer.weight, name)) != name:
                    reason = f"has become that of {other}"
                if reason:
                    raise ValueError(f"{name}: its weight {reason}")
        for name, layer in self.layers.items():
            if self.in_basis_phase and not layer.weight.requires_grad:
                raise RuntimeError(
                    f"{name}: its weight was frozen, but it is trained here until release()"
                )
            if layer.weight.requires_grad and not self.in_basis_phase:
                raise RuntimeError(
                    f"{name}: its weight asks for a gradient, but its elements are trained here;"
                    " weight.requires_grad_(False), or release()"
                )

    def _refuse(self, names: Sequence[str]) -> None:
        """Raise if there are layers with whose gradients no step can be taken."""
        if names:
            self._backwards.drop()
            raise SebpError(
                NONFINITE,
                f"step {self.steps + 1}: the gradient of {', '.join(names)} holds a NaN, an Inf or"
                " too large numbers; no parameter was changed",
            )

    def _step_basis_phase(self) -> None:
        # All are checked before the first is added.
        grads, refused, energies = [], [], dict(self._energies)
        for kind in self.kinds:
            for name in kind.layers:
                grad = self.layers[name].weight.grad
                if grad is None:
                    continue
                energy = energies[kind.name] + energy_of(grad)
                if energy < _MOST_ENERGY:
                    energies[kind.name] = energy
                    grads.append((self.sums[kind.name], grad))
                else:
                    refused.append(name)
        self._refuse(refused)
        for sums, grad in grads:
            sums.add(matrix_of(grad), thread_context())
        self._energies = energies
        with scaled_rates(self.base, self._basis_factors()):
            self._guard.step(self.base)
        self.steps += 1
        self._backwards.drop()
        if self.steps >= self.settings.basis_steps:
            self._solve()

    def _basis_factors(self) -> dict[Tensor, float]:
        """Return what each sparse weight's learning rate is multiplied by in the basis phase."""
        factors = {}
        for kind in self.kinds:
            factor = self.settings.basis_rate_factor
            if factor is None:
                factor = equal_length_factor(self.settings.k, kind.shape)
            factors |= {self.layers[name].weight: factor for name in kind.layers}
        return factors

    def _step_sparse(self) -> None:
        layers = self.layers.values()
        numbers = numbers_of_steps(
            self, [(one.name, one.weight, one.moments.steps) for one in layers]
        )
        pairs = list(zip(layers, numbers, strict=True))
        for layer, adamw in pairs:
            layer.check_decay(adamw)
        self._refuse([layer.name for layer, adamw in pairs if not layer.finish_gradient(adamw)])
        self._guard.step(self.base)
        self.steps += 1
        keep_measured(self.kinds, self.layers, self.steps)
        for layer, adamw in pairs:
            layer.step(adamw)
        self._backwards.drop()
        plan_measures(self.kinds, self.layers, self.settings, self.steps + 1)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients; a step drops those of the sparse layers itself."""
        self.base.zero_grad(set_to_none)
        self._backwards.drop()

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Refuse to be copied."""
        raise TypeError(
            f"a {type(self).__name__} belongs to the model it was made for; copy its state_dict()"
        )

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, object]:
        """Return what a run needs besides the model's state to go on bit for bit.

        Returns
        -------
        dict
            That of the user's optimizer, and under "sebp" settings, steps, moments, supports, and
            bases or the sums of the basis phase.
        """
        ours = {
            "method": self.method,
            "settings": self.settings._asdict(),
            "kinds": {kind.name: list(kind.layers) for kind in self.kinds},
            "steps": self.steps,
            "sums": {kind: tensors_of(sums.sums()) for kind, sums in self.sums.items()},
            "bases": {},
            "moments": {},
        }
        for kind in self.kinds:
            if kind.basis is not None:
                ours["bases"][kind.name] = {
                    "u_out": torch.from_numpy(kind.basis.u_out),
                    "u_in": torch.from_numpy(kind.basis.u_in),
                    "shares": kind.shares,
                    "block_shares": dict(kind.block_shares),
                }
        for name, layer in self.layers.items():
            if layer.moments is not None:
                ours["moments"][name] = {
                    "is_fixed": layer.moments.is_fixed,
                    **tensors_of(layer.moments.moments()),
                }
        return {**self.base.state_dict(), "sebp": ours}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Go on where a run stopped, in whatever phase either of them is.

        All settings but k are those of the checkpoint, as the learning rates of groups are.
        `accumulate`, which allows something and changes no result, is on if either run has it.

        Raises
        ------
        ValueError
            If the checkpoint is not of such an optimizer, or of other layers or another k; if it is
            incomplete, or its parts contradict each other. Nothing has changed then.
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
            settings = settings_of(ours, self.method, self.kinds, self.settings)
            steps = as_integer("steps", ours["steps"])
            for kind in self.kinds:
                if ours["sums"]:
                    sums[kind.name] = load_sums(kind, ours["sums"], settings)
                    continue
                if self.method == "SparseGrad":
                    bases[kind.name] = load_basis(kind, ours["bases"])
                basis = bases[kind.name][0] if bases else None
                for name in kind.layers:
                    saved = ours["moments"][name]
                    moments[name] = self.layers[name].load_moments(kind, basis, saved, settings)
        except KeyError as error:
            raise ValueError(f"the checkpoint is incomplete or too old: no {error}") from None
        if sums:
            check_lapack()
        self.base.load_state_dict(theirs)
        self._share_groups()
        self.steps, self.settings = steps, settings
        self._backwards.accumulate = settings.accumulate
        for layer in self.layers.values():
            layer.settings = settings
        for kind in self.kinds:
            kind.basis, kind.shares, kind.block_shares = bases.get(
                kind.name, (None, UNKNOWN_SHARES, {})
            )
        if sums:
            energies = {name: ours["sums"][name]["energy"] for name in sums}
            self._begin_basis_phase(sums, energies)
        else:
            self._begin_sparse_phase(moments)

    # ---- what it is and what it takes ----

    def bytes(self) -> SparseBytes:
        """Return the memory that training the sparse layers' weights takes now."""
        return count_bytes(self.kinds, self.layers.values(), self.base, self.in_basis_phase)

    def __repr__(self) -> str:
        """Describe it in a few lines."""
        if any(layer.backwards is None for layer in self.layers.values()):
            return f"{self.method} on {len(self.layers)} layers, released in step {self.steps}"
        phase = f"in step {self.steps}"
        if self.in_basis_phase:
            phase = f"basis phase, {self.steps} of {self.settings.basis_steps} steps"
        lines = [f"{self.method} on {len(self.layers)} layers, {phase}"]
        for kind in self.kinds:
            line = f"{kind.name}: {len(kind.layers)} layers"
            if kind.basis is not None:
                line += ", basis of {} x {}".format(*kind.basis.rank)
            lines.append(line)
            lines += describe(kind)
        memory = ", ".join(f"{name} {size}" for name, size in self.bytes()._asdict().items())
        return "\n".join([*lines, f"bytes: {memory}", f"all else: {type(self.base).__name__}"])

    def release(self) -> None:
        """Restore the model's layers; their weights keep their values.

        Do not use this object afterwards.
        """
        for layer in self.layers.values():
            layer.detach()
        self._backwards.release()
        self._guard.release()
