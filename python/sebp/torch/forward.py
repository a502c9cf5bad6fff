# SPDX-License-Identifier: Apache-2.0
"""Puts a function in the place of one module's forward, and takes it out again.

The module keeps its class, so that tools which look layers up by class find them.
"""

import functools
import inspect
import types
from collections.abc import Callable

import torch
from torch import nn

# What tools read of a function: they are given the class's forward instead.
_OF_FUNCTIONS = ("__code__", "__globals__", "__closure__", "__defaults__", "__kwdefaults__")


class Forward:
    """What stands in a module's ``__dict__`` as its forward: a function of this package.

    Unlike a bound method it is pickled as what it is, and deep-copied along with its module.

    Attributes
    ----------
    module : nn.Module
        Whose forward it is.
    function : callable
        A function of a module of this package. It gets this object, then what the forward is
        called with.
    is_out : bool
        Whether it was taken out. Whoever still holds it gets what was there before.
    """

    def __init__(self, module: nn.Module, function: Callable) -> None:
        self.module = module
        self.function = function
        self.is_out = False
        self.previous = vars(module).get("forward")

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Call the function."""
        if self.is_out:
            return self.original(*args, **kwargs)
        return self.function(self, *args, **kwargs)

    @property
    def original(self) -> Callable:
        """What the module's forward was before, bound to the module."""
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


class _Unbound:
    """A :class:`Forward` as a function of its module, which tools bind to that again."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def __call__(self, module: nn.Module, *args: object, **kwargs: object) -> object:
        return self.forward(*args, **kwargs)


def _ours(forward: object) -> Forward | None:
    """Give the :class:`Forward` that a forward is, or is bound to."""
    if isinstance(forward, types.MethodType) and isinstance(forward.__func__, _Unbound):
        forward = forward.__func__.forward
    return forward if isinstance(forward, Forward) else None


def _all_of(module: nn.Module) -> list[Forward]:
    """List what was put into a module, also where somebody has wrapped it since."""
    return vars(module).get("_sebp_forwards", [])


def put_in(module: nn.Module, function: Callable) -> None:
    """Make `function` a module's forward; nothing if it is already.

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


def has(module: nn.Module, function: Callable) -> bool:
    """Tell whether :func:`put_in` was done, and not undone."""
    return any(one.function is function for one in _all_of(module))


def take_out(module: nn.Module, function: Callable) -> None:
    """Undo :func:`put_in`; nothing if it was not done."""
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
        return


def is_replaced(module: nn.Module) -> bool:
    """Tell whether somebody else has put a forward in a module's place."""
    forward = vars(module).get("forward")
    while (ours := _ours(forward)) is not None:
        forward = ours.previous
    return forward is not None


def is_traced() -> bool:
    """Tell whether a program is being made of what runs: by ``torch.jit.trace``, export or ONNX.

    It has to be PyTorch's own, to run where this package is not.
    """
    return torch.jit.is_tracing() or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def is_transformed() -> bool:
    """Tell whether ``torch.func`` or forward-mode differentiation is at work."""
    return (
        torch.autograd.forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
