# SPDX-License-Identifier: Apache-2.0
"""How SparseGrad and MeProp work with the user's optimizer."""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...core import SebpError
from ...sparse import AdamW, check_adamw
from ..common.context import thread_context

# Options of a group that change an optimizer's step, those of schedule-free ones included, whose
# warm-up is part of the step.
_NOT_DONE = ("maximize", "amsgrad", "warmup_steps")


def check_base(optimizer: torch.optim.Optimizer) -> None:
    """Raise for optimizers that cannot train the other parameters.

    Raises
    ------
    TypeError
        If it is none of ``torch.optim``, has sparse layers already, or its step needs a closure.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"the optimizer is {type(optimizer).__name__}, not of torch.optim")
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    if any(isinstance(hook, StepGuard) for hook in hooks):
        raise TypeError("the optimizer has sparse layers already; release() those first")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"a step of {type(optimizer).__name__} needs a closure, which computes gradients anew"
            " within it; that is not done for sparse layers"
        )


def warn_of_rates(optimizer: torch.optim.Optimizer) -> None:
    """Warn of an optimizer that has betas and eps, but may not be of Adam's kind, as LAMB.

    Whose betas and eps are those of a group alone has been given them by hand.
    """
    wrapped = getattr(optimizer, "optimizer", optimizer)
    classes = (*type(optimizer).__mro__, *type(wrapped).__mro__)
    is_adam = any("adam" in one.__name__.lower() for one in classes)
    if is_adam or not {"betas", "eps"} <= set(getattr(optimizer, "defaults", {})):
        return
    warnings.warn(
        f"the step of sparse layers is AdamW's, at the rate that {type(optimizer).__name__} has for"
        " their weights, which by its name is not of Adam's kind: if its rates mean something"
        " else, as LAMB's do, give these weights a group of their own with a rate of AdamW's",
        stacklevel=4,
    )


class StepGuard:
    """Refuses steps that the user's optimizer takes alone, without those of the sparse layers.

    Parameters
    ----------
    base : torch.optim.Optimizer
        The user's.
    """

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self._is_open = False
        self._hook = None
        if hasattr(base, "_optimizer_step_pre_hooks"):  # not where it wraps another one
            self._hook = base.register_step_pre_hook(self)

    def __call__(self, base: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """Raise, as a hook before a step, where it is taken alone."""
        if not self._is_open:
            raise RuntimeError(
                f"a step of {type(base).__name__} alone leaves its sparse layers out; call that of"
                " the SparseOptimizer made with it, or release() that"
            )

    def step(self, base: torch.optim.Optimizer) -> None:
        """Take a step of the user's optimizer."""
        self._is_open = True
        try:
            base.step()
        finally:
            self._is_open = False

    def release(self) -> None:
        """Stop refusing steps."""
        if self._hook is not None:
            self._hook.remove()


def _numbers_of(name: str, group: Mapping[str, object], kind: str) -> AdamW:
    """Read the numbers of a layer's step from its weight's group; refuse unsupported options.

    A rate means another thing to Adam than to SGD or Lion: an optimizer is of Adam's kind where its
    groups have both betas and eps. One can be put into the weight's group by hand.
    """
    missing = [option for option in ("betas", "eps") if option not in group]
    if missing:
        raise ValueError(
            f"{name}: its group has no {' and no '.join(missing)}, so {kind} is not of Adam's kind,"
            " as the step of sparse layers is; give its weight a group of its own, with the lr,"
            " betas and eps of AdamW"
        )
    for option in _NOT_DONE:
        if group.get(option):
            raise ValueError(f"{name}: {option} is not done by the step of sparse layers")
    if "d" in group:
        raise ValueError(
            f"{name}: {kind} multiplies the rate by a factor d that it adapts, which the step of"
            " sparse layers does not"
        )
    # Of those that do not say it, Adamax adds its decay to the gradient.
    if group.get("weight_decay") and not group.get("decoupled_weight_decay", "AdamW" in kind):
        raise ValueError(
            f"{name}: {kind} adds its weight_decay to the gradient, or does not say that it does"
            " not, but the step of sparse layers decouples it, as AdamW does; take AdamW, a"
            " weight_decay of 0, or put decoupled_weight_decay=True into the weight's group"
        )
    given = {option: group.get(option) for option in ("lr", "betas", "eps")}
    given["weight_decay"] = group.get("weight_decay", 0.0)
    try:
        lr, (beta1, beta2), eps, decay = given.values()
        return AdamW(float(lr), float(beta1), float(beta2), float(eps), float(decay))
    except (TypeError, ValueError):
        raise ValueError(f"{name}: its group's numbers are not those of AdamW: {given}") from None


def numbers_of_steps(
    optimizer: torch.optim.Optimizer, layers: Sequence[tuple[str, Tensor, int]]
) -> list[AdamW]:
    """Read the numbers of steps, and check them before any parameter changes.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        The user's.
    layers : sequence of (str, Tensor, int)
        Name and weight of each, and the number of steps taken.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    numbers, known = [], set()
    for name, weight, steps in layers:
        if id(weight) not in groups:
            raise ValueError(f"{name}: its weight is not among the optimizer's parameters")
        adamw = _numbers_of(name, groups[id(weight)], type(optimizer).__name__)
        if (adamw, steps) not in known:
            try:
                check_adamw(adamw, steps, thread_context())
            except SebpError as error:
                raise SebpError(error.status, f"{name}: {error}; {adamw}") from None
            known.add((adamw, steps))
        numbers.append(adamw)
    return numbers


@contextmanager
def scaled_rates(
    optimizer: torch.optim.Optimizer, factors: Mapping[Tensor, float]
) -> Iterator[None]:
    """Multiply the learning rates of some parameters while an optimizer takes a step.

    These parameters leave their group meanwhile for one of the same options and another rate. What
    a step writes to its groups, as schedule-free ones do, is kept for the group itself alone.

    Parameters
    ----------
    factors : mapping of Tensor to float
        By parameter. A factor of 1 changes nothing.
    """
    groups = optimizer.param_groups
    all_of = [group["params"] for group in groups]
    count = len(groups)
    try:
        for group in groups[:count]:
            others: dict[float, list[Tensor]] = {}
            for p in group["params"]:
                others.setdefault(factors.get(p, 1.0), []).append(p)
            group["params"] = others.pop(1.0, [])
            groups.extend(
                {**group, "params": params, "lr": factor * group["lr"]}
                for factor, params in others.items()
            )
        yield
    finally:
        del groups[count:]
        for group, parameters in zip(groups, all_of, strict=True):
            group["params"] = parameters


def refuse_processes() -> None:
    """Raise under ``torch.distributed``."""
    distributed = torch.distributed
    if (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    ):
        raise RuntimeError("gradients of sparse layers are not summed over processes")


# --------------------------------------------------------------------------------------------------
# Schedule-free optimizers, whose weights are others in train() than in eval()


def _swaps_weights(optimizer: torch.optim.Optimizer) -> bool:
    has_both = all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))
    return has_both and "train_mode" in optimizer.param_groups[0]


def refuse_evaluation(optimizer: torch.optim.Optimizer) -> None:
    """Raise if a schedule-free optimizer is in evaluation mode, where it takes no step."""
    if _swaps_weights(optimizer) and not optimizer.param_groups[0]["train_mode"]:
        name = type(optimizer).__name__
        raise RuntimeError(f"{name} is in evaluation mode: call train() before a step")


@torch.no_grad()
def drop_state(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor]) -> None:
    """Delete an optimizer's state for weights; a schedule-free one leaves their average."""
    state, groups = optimizer.state, optimizer.param_groups
    swaps = _swaps_weights(optimizer) and groups[0]["train_mode"]
    if swaps and any(state.get(weight) for weight in weights):
        # By its own eval(), with no other weights in its groups; train() then does nothing.
        chosen, all_of = set(weights), [group["params"] for group in groups]
        try:
            for group in groups:
                group["params"] = [p for p in group["params"] if p in chosen]
            optimizer.eval()
            for weight in weights:
                state.pop(weight, None)
            optimizer.train()
        finally:
            for group, parameters in zip(groups, all_of, strict=True):
                group["params"] = parameters
    for weight in weights:
        state.pop(weight, None)
