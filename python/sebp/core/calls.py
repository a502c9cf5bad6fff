# SPDX-License-Identifier: Apache-2.0
"""Calls of the library: statuses as exceptions, and objects that the library makes."""

import ctypes

from .._library import load

NONFINITE = 14
"""The status of a :class:`~sebp.SebpError` about a NaN or Inf where there must be none."""

OUT_OF_RANGE = 8
"""The status of one about an option whose value is not one that it may have."""

UNSUPPORTED = 11
"""The status of one about what this build or this machine lacks."""

_ERROR_MEMORY = 10


class SebpError(RuntimeError):
    """A call of the library failed.

    Attributes
    ----------
    status : int
        The ``sebp_status`` it returned.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def check(status: int, message: str = "") -> None:
    """Raise if a call failed.

    Parameters
    ----------
    status : int
        What the call returned.
    message : str
        What the library says about it. Default: the meaning of the status.

    Raises
    ------
    SebpError, MemoryError
        If the status is not SEBP_SUCCESS.
    """
    if status:
        message = message or load().sebp_status_string(status).decode()
        raise MemoryError(message) if status == _ERROR_MEMORY else SebpError(status, message)


def call(function: str, *arguments: object) -> None:
    """Call a function of the library that takes no context.

    Parameters
    ----------
    function : str
        Its name in the library.
    arguments
        Its arguments. A :class:`Handle` is passed as the pointer it holds, None as NULL.

    Raises
    ------
    SebpError, MemoryError
        If the call fails.
    """
    check(getattr(load(), function)(*arguments))


def within_int64(count: int) -> int:
    """Return the nearest 64-bit number, as ctypes would pass on the low bits of a larger one."""
    return max(-(2**63), min(count, 2**63 - 1))


class Handle:
    """An object of the library, which is destroyed along with this one.

    It is passed to the library's functions as it is: ctypes reads its ``_as_parameter_``.

    Parameters
    ----------
    pointer : c_void_p
        What the library has made.
    destroy : str
        The function that destroys it.
    """

    def __init__(self, pointer: ctypes.c_void_p, destroy: str) -> None:
        # The function itself: when Python exits, modules may be gone before objects.
        self._destroy = getattr(load(), destroy)
        self._as_parameter_ = pointer

    def __del__(self) -> None:
        if getattr(self, "_as_parameter_", None):
            self._destroy(self._as_parameter_)
            self._as_parameter_ = None  # NULL
