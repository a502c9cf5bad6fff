# SPDX-License-Identifier: Apache-2.0
"""Whether two functions do the same, judged by their bytecode."""

import dis
import functools
from collections.abc import Callable, Iterator
from types import FunctionType


@functools.lru_cache(maxsize=1024)
def same_code(function: Callable, template: Callable) -> bool:
    """Return whether a function does what a template does, step by step.

    Names of local variables, annotations and the docstring may differ. Nothing else may: names of
    attributes, constants, defaults and what global names stand for are the same.

    Parameters
    ----------
    function, template : callable
        Functions written in Python; of anything else the answer is False.

    Returns
    -------
    bool
        False may also mean that it is not known.
    """
    if not isinstance(function, FunctionType):
        return False
    code, right = function.__code__, template.__code__
    if code.co_freevars or right.co_freevars:
        return False
    if function.__defaults__ != template.__defaults__ or function.__kwdefaults__:
        return False
    counts = ("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_nlocals")
    if any(getattr(code, name) != getattr(right, name) for name in counts):
        return False
    if list(_steps(function)) != list(_steps(template)):
        return False
    missing = object()
    return all(
        function.__globals__.get(name, missing) is template.__globals__.get(name, missing)
        for name in _global_names(template)
    )


def _steps(function: Callable) -> Iterator[tuple]:
    """Go through the instructions: what each does, and to what."""
    for step in dis.get_instructions(function):
        if "FAST" in step.opname:  # local variables, by their numbers
            yield step.opname, step.arg
        else:
            yield step.opname, type(step.argval), step.argval


def _global_names(function: Callable) -> set[str]:
    return {step.argval for step in dis.get_instructions(function) if "GLOBAL" in step.opname}
