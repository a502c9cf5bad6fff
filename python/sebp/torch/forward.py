# SPDX-License-Identifier: Apache-2.0
"""Puts a function in the place of one module's forward, and takes it out again.

The module keeps its class, so that tools which look layers up by class find them.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import nn


class Forward:
    """What stands in a module's ``__dict__`` as its forward: a function of this package.

    Unlike a bound method it is pickled as what it is, and deep-copied along with its module.

    Attributes
    ----------
    function : callable
        A function of a module of this package. It gets the module, then what the forward is called
        with, and may call :meth:`original`.
    """

    def __init__(self, module: nn.Module, function: Callable) -> None:
        self.function = function
        self._module = module
        self._previous = vars(module).get("forward")

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Call the function."""
        return self.function(self._module, *args, **kwargs)

    # As a bound method has them, for tools that wrap forwards.

    @property
    def __func__(self) -> Callable:
        return self.function

    @property
    def __self__(self) -> nn.Module:
        return self._module

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @property
    def original(self) -> Callable:
        """What the module's forward was before, bound to the module."""
        if self._previous is not None:
            return self._previous
        return functools.partial(type(self._module).forward, self._module)


def _chain(module: nn.Module) -> list[Forward]:
    """List what stands in the place of a module's forward, last put in first."""
    chain = []
    forward = vars(module).get("forward")
    while isinstance(forward, Forward):
        chain.append(forward)
        forward = forward._previous
    return chain


def put_in(module: nn.Module, function: Callable) -> None:
    """Make `function` a module's forward; nothing if it is already.

    Parameters
    ----------
    module : nn.Module
    function : callable
        Of a module of this package: ``function(module, *args, **kwargs)``.
    """
    if not has(module, function):
        module.forward = Forward(module, function)


def has(module: nn.Module, function: Callable) -> bool:
    """Tell whether :func:`put_in` was done, and nobody else has put in something since."""
    return any(one.function is function for one in _chain(module))


def take_out(module: nn.Module, function: Callable) -> None:
    """Undo :func:`put_in`; nothing if it was not done."""
    chain = _chain(module)
    for place, one in enumerate(chain):
        if one.function is not function:
            continue
        if place > 0:
            chain[place - 1]._previous = one._previous
        elif one._previous is None:
            del module.forward
        else:
            module.forward = one._previous
        return


def original(module: nn.Module, function: Callable) -> Callable:
    """Give what `function` stands in the place of, bound to the module.

    Parameters
    ----------
    module : nn.Module
    function : callable
        What was put in.

    Returns
    -------
    callable
        The class's forward where nothing else was there, or where it was taken out since.
    """
    for one in _chain(module):
        if one.function is function:
            return one.original
    return functools.partial(type(module).forward, module)


def is_replaced(module: nn.Module) -> bool:
    """Tell whether somebody else has put a forward in a module's place."""
    forward = vars(module).get("forward")
    while isinstance(forward, Forward):
        forward = forward._previous
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
