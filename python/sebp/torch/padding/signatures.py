# SPDX-License-Identifier: Apache-2.0
"""Names of arguments."""

import functools
import inspect

from torch import nn


@functools.lru_cache(maxsize=256)
def signature_of(forward: object) -> inspect.Signature:
    """Return a function's signature, from a cache."""
    return inspect.signature(forward)


def has_argument(module: nn.Module, name: str) -> bool:
    """Return whether the forward of a module's class names an argument."""
    return name in signature_of(type(module).forward).parameters
