# SPDX-License-Identifier: Apache-2.0
"""Whether two functions do the same, judged by their bytecode."""

import builtins
import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType


def same_code(function: Callable, template: FunctionType) -> bool:
    """Return whether a function does what a template does, step by step.

    Names of local variables, annotations and the docstring may differ. Nothing else may: names of
    attributes, constants, defaults and what global names stand for are the same. A global name may
    stand for another function of the same code.

    Parameters
    ----------
    function, template : callable
        Functions written in Python; of anything else the answer is False.

    Returns
    -------
    bool
        False may also mean that it is not known.
    """
    if not isinstance(function, FunctionType) or not _same_steps(
        function.__code__, template.__code__
    ):
        return False
    if function.__defaults__ != template.__defaults__ or function.__kwdefaults__:
        return False
    # At each call, as modules may be patched.
    names = _global_names(template.__code__)
    return all(_same(_named(function, name), _named(template, name)) for name in names)


@functools.lru_cache(maxsize=1024)
def _same_steps(code: CodeType, right: CodeType) -> bool:
    if code.co_freevars or right.co_freevars:
        return False
    counts = ("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_nlocals")
    if any(getattr(code, name) != getattr(right, name) for name in counts):
        return False
    # Where a function is defined does not matter; that it is a generator, for example, does.
    if (code.co_flags ^ right.co_flags) & ~inspect.CO_NESTED:
        return False
    return list(_steps(code)) == list(_steps(right))


def _named(function: FunctionType, name: str) -> object:
    """Return what a global name stands for in a function; Ellipsis: nothing."""
    return function.__globals__.get(name, getattr(builtins, name, ...))


def _same(value: object, known: object) -> bool:
    if known is ...:
        return False
    return value is known or (isinstance(known, FunctionType) and same_code(value, known))


def _steps(code: CodeType) -> Iterator[tuple]:
    """Go through the instructions: what each does, and to what."""
    for step in dis.get_instructions(code):
        if "FAST" in step.opname:  # local variables, by their numbers
            yield step.opname, step.arg
        else:
            yield step.opname, type(step.argval), step.argval


@functools.lru_cache(maxsize=64)
def _global_names(code: CodeType) -> frozenset[str]:
    steps = dis.get_instructions(code)
    return frozenset(step.argval for step in steps if "GLOBAL" in step.opname)
