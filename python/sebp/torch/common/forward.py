# SPDX-License-Identifier: Apache-2.0
"""Replaces one module's forward by a function, and restores it.

The module keeps its class, so that tools which look up layers by class find them.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

# Attributes of functions that tools read. They get those of the class's forward.
_OF_FUNCTIONS = ("__code__", "__globals__", "__closure__", "__defaults__", "__kwdefaults__")


def has_own_forward(kind: type) -> bool:
    """Return whether a class has the forward that it was written with, not one put in since.

    Parameters
    ----------
    kind : type
        A class that defines a forward, as PyTorch's own do.
    """
    forward = vars(kind).get("forward")
    return (
        isinstance(forward, types.FunctionType)
        and forward.__module__ == kind.__module__
        and not hasattr(forward, "__wrapped__")
    )


class OfModule:
    """What this package puts into one module's ``__dict__``, and what knows that module.

    ``DataParallel`` copies that dictionary to replicas, which have parameters of their own. They
    are made without it, as PyTorch has them.
    """


class _Replicate(OfModule):
    """Replaces the method by which ``DataParallel`` makes a module's replicas."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> nn.Module:
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        own = vars(replica)
        for name, value in list(own.items()):
            if isinstance(value, OfModule):
                del own[name]
        own.pop("_sebp_forwards", None)
        forward = _before_ours(self.module)
        if forward is not None:
            own["forward"] = forward
        return replica


def guard_replicas(module: nn.Module) -> None:
    """Make replicas of a module without what is :class:`OfModule`, from now on."""
    vars(module).setdefault("_replicate_for_data_parallel", _Replicate(module))


def stop_guarding(module: nn.Module) -> None:
    """Undo :func:`guard_replicas`, if nothing is left that is :class:`OfModule`."""
    found = [name for name, value in vars(module).items() if isinstance(value, OfModule)]
    if found == ["_replicate_for_data_parallel"]:
        del module._replicate_for_data_parallel


class Forward(OfModule):
    """A function of this package as the forward in a module's ``__dict__``.

    Unlike a bound method it is pickled as such, and deep-copied along with its module.

    Attributes
    ----------
    module : nn.Module
        The module whose forward it is.
    function : callable
        A function of a module of this package. It gets this object, then what the forward is
        called with.
    is_out : bool
        Whether it was removed, or the model runs :func:`as_it_is`. Calls of it then go to what was
        there before.
    """

    def __init__(self, module: nn.Module, function: Callable) -> None:
        self.module = module
        self.function = function
        self.is_out = False
        self.previous = vars(module).get("forward")
        self._written = _written(module)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_written"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state, _written=_written(state["module"]))

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Call the function."""
        if args and args[0] is self.module:  # a tool has bound it to its module, as a method
            args = args[1:]
        # What is put into the class later is for all of its modules.
        if self.is_out or _written(self.module) is not self._written:
            return self.original(*args, **kwargs)
        return self.function(self, *args, **kwargs)

    @property
    def original(self) -> Callable:
        """The module's forward before this one, bound to the module."""
        if self.previous is not None:
            return self.previous
        return functools.partial(type(self.module).forward, self.module)

    # As a bound method and a function have them, for tools that wrap or read forwards.

    @property
    def __func__(self) -> Callable:
        return _Unbound(self)

    @property
    def __self__(self) -> nn.Module:
        return self.module

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def __getattr__(self, name: str) -> object:
        if name in _OF_FUNCTIONS and "module" in vars(self):
            return getattr(type(self.module).forward, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _written(module: nn.Module) -> object:
    """Return the forward of a module's class; a scripted module's has none."""
    return getattr(type(module), "forward", None)


class _Unbound:
    """A :class:`Forward` as a function of its module, which tools can bind to the module again."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def __call__(self, module: nn.Module, *args: object, **kwargs: object) -> object:
        return self.forward(*args, **kwargs)


def _ours(forward: object) -> Forward | None:
    """Return the :class:`Forward` that a forward is, or is bound to."""
    if isinstance(forward, types.MethodType):
        forward = forward.__func__
    if isinstance(forward, _Unbound):
        forward = forward.forward
    return forward if isinstance(forward, Forward) else None


def _all_of(module: nn.Module) -> list[Forward]:
    """List what was put into a module, even if it has been wrapped since."""
    return vars(module).get("_sebp_forwards", [])


def put_in(module: nn.Module, function: Callable) -> None:
    """Make `function` a module's forward, if it is not.

    Parameters
    ----------
    module : nn.Module
    function : callable
        Of a module of this package: ``function(forward, *args, **kwargs)``.
    """
    if not has(module, function):
        forward = Forward(module, function)
        module._sebp_forwards = [*_all_of(module), forward]
        module.forward = forward
        guard_replicas(module)


def has(module: nn.Module, function: Callable) -> bool:
    """Return whether `function` was put in, and not taken out."""
    return any(one.function is function for one in _all_of(module))


def take_out(module: nn.Module, function: Callable) -> None:
    """Undo :func:`put_in`, if it was done."""
    for forward in _all_of(module):
        if forward.function is not function:
            continue
        forward.is_out = True
        left = [one for one in module._sebp_forwards if one is not forward]
        if left:
            module._sebp_forwards = left
        else:
            del module._sebp_forwards
        if _ours(vars(module).get("forward")) is forward:
            if forward.previous is None:
                del module.forward
            else:
                module.forward = forward.previous
        for one in left:
            if _ours(one.previous) is forward:
                one.previous = forward.previous
        stop_guarding(module)
        return


@contextmanager
def as_it_is(model: nn.Module) -> Iterator[None]:
    """Run a model within a ``with`` as if this package had put nothing into it."""
    put = [one for module in model.modules() for one in _all_of(module) if not one.is_out]
    for one in put:
        one.is_out = True
    try:
        yield
    finally:
        for one in put:
            one.is_out = False


def is_replaced(module: nn.Module) -> bool:
    """Return whether other code has replaced a module's forward."""
    return _before_ours(module) is not None


def _before_ours(module: nn.Module) -> Callable | None:
    """Return what other code has made a module's forward, or None if none has."""
    forward = vars(module).get("forward")
    while (ours := _ours(forward)) is not None:
        forward = ours.previous
    return forward


def is_traced() -> bool:
    """Return whether calls are recorded by ``torch.jit.trace``, export or ONNX.

    Only PyTorch's own operators may be recorded, to run where this package is not installed.
    """
    return torch.jit.is_tracing() or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


# In a graph their answers are those of the time at which it is made: it is not used in other
# transforms.


@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    """Return whether ``torch.func`` or forward-mode differentiation is active."""
    return (
        torch.autograd.forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


@torch.compiler.assume_constant_result
def is_differentiated() -> bool:
    """Return whether a transform of ``torch.func``, or forward mode, takes derivatives of a call.

    The dispatcher drops them where an operator of ``torch.library`` has no formula for them, if no
    tensor requires a gradient besides.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    kinds = torch._C._functorch.TransformType
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(one.key() in (kinds.Grad, kinds.Jvp) for one in stack)


def refuse_tangents(name: str) -> None:
    """Raise within an operator of ``torch.library`` that is called in forward mode.

    The dispatcher does so where a tensor requires a gradient. Where none does, and in graphs that
    were made before, it would drop the tangents.

    Parameters
    ----------
    name : str
        The operator's.

    Raises
    ------
    NotImplementedError
        In forward mode.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        raise NotImplementedError(f"{name} has no derivatives of forward mode")
