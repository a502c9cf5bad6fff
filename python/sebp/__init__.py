# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on CPUs without computing rows that cannot matter.

On a PyTorch model::

    import sebp
    sebp.apply_sebp_to_model(model)

The layer on NumPy arrays is in :mod:`sebp.core`, SparseGrad on them in :mod:`sebp.sparse`,
PyTorch's in :mod:`sebp.torch`. PyTorch is imported when one of its names is first used.
"""

from typing import TYPE_CHECKING

from ._library import LibraryMismatchError, LibraryNotFoundError, openmp_runtimes
from ._version import __version__
from .core import Context, Rows, SebpError, linear_backward, linear_forward

if TYPE_CHECKING:
    from .torch import (
        PaddingFreeReport,
        Profile,
        Report,
        apply_lora_to_model,
        apply_meprop_to_model,
        apply_sebp_to_model,
        apply_sparsegrad_to_model,
        merge_lora,
        padding_free,
        profile,
        remove_padding_free,
        remove_sebp_from_model,
    )
    from .torch.trainer import SebpCallback

_OF_TORCH = (
    "PaddingFreeReport",
    "Profile",
    "Report",
    "apply_lora_to_model",
    "apply_meprop_to_model",
    "apply_sebp_to_model",
    "apply_sparsegrad_to_model",
    "merge_lora",
    "padding_free",
    "profile",
    "remove_padding_free",
    "remove_sebp_from_model",
)

__all__ = [
    "Context",
    "LibraryMismatchError",
    "LibraryNotFoundError",
    "PaddingFreeReport",
    "Profile",
    "Report",
    "Rows",
    "SebpCallback",
    "SebpError",
    "__version__",
    "apply_lora_to_model",
    "apply_meprop_to_model",
    "apply_sebp_to_model",
    "apply_sparsegrad_to_model",
    "linear_backward",
    "linear_forward",
    "merge_lora",
    "openmp_runtimes",
    "padding_free",
    "profile",
    "remove_padding_free",
    "remove_sebp_from_model",
]


def __getattr__(name: str) -> object:
    if name in _OF_TORCH:
        from . import torch

        return getattr(torch, name)
    if name == "SebpCallback":
        from .torch.trainer import SebpCallback

        return SebpCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
