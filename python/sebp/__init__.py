# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on CPUs without computing rows that cannot matter.

On a PyTorch model::

    import sebp
    sebp.prepare(model)

The layer on NumPy arrays is in :mod:`sebp.core`, SparseGrad on them in :mod:`sebp.sparse`,
PyTorch's in :mod:`sebp.torch`. These modules need no import of their own. PyTorch is imported when
one of its names is first used.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from ._library import LibraryMismatchError, LibraryNotFoundError, openmp_runtimes
from ._version import __version__
from .core import Context, Rows, SebpError, linear_backward, linear_forward

if TYPE_CHECKING:
    from . import core as core
    from . import sparse as sparse
    from . import torch as torch
    from .torch import (
        AdapterSwitch,
        Comparison,
        PaddingFreeReport,
        Prepared,
        Profile,
        Report,
        SparseAdapter,
        apply_galore_to_model,
        apply_lora_to_model,
        apply_meprop_to_model,
        apply_sebp_to_model,
        apply_sparse_mask_to_model,
        apply_sparsegrad_to_model,
        compare,
        merge_lora,
        padding_free,
        prepare,
        profile,
        register_attention,
        remove_padding_free,
        remove_sebp_from_model,
    )
    from .torch.trainer import SebpCallback

# Not in __all__: a star import is not to put its own torch in the place of PyTorch.
_MODULES = ("attention", "core", "sparse", "torch")
_OF_TORCH = (
    "AdapterSwitch",
    "Comparison",
    "PaddingFreeReport",
    "Prepared",
    "Profile",
    "Report",
    "SparseAdapter",
    "apply_galore_to_model",
    "apply_lora_to_model",
    "apply_meprop_to_model",
    "apply_sebp_to_model",
    "apply_sparse_mask_to_model",
    "apply_sparsegrad_to_model",
    "compare",
    "merge_lora",
    "padding_free",
    "prepare",
    "profile",
    "register_attention",
    "remove_padding_free",
    "remove_sebp_from_model",
)

__all__ = [
    "AdapterSwitch",
    "Comparison",
    "Context",
    "LibraryMismatchError",
    "LibraryNotFoundError",
    "PaddingFreeReport",
    "Prepared",
    "Profile",
    "Report",
    "Rows",
    "SebpCallback",
    "SebpError",
    "SparseAdapter",
    "__version__",
    "apply_galore_to_model",
    "apply_lora_to_model",
    "apply_meprop_to_model",
    "apply_sebp_to_model",
    "apply_sparse_mask_to_model",
    "apply_sparsegrad_to_model",
    "compare",
    "linear_backward",
    "linear_forward",
    "merge_lora",
    "openmp_runtimes",
    "padding_free",
    "prepare",
    "profile",
    "register_attention",
    "remove_padding_free",
    "remove_sebp_from_model",
]


def __getattr__(name: str) -> object:
    # Not "from . import torch", which asks for the attribute and so comes back to here.
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _OF_TORCH:
        try:
            return getattr(importlib.import_module(f"{__name__}.torch"), name)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ModuleNotFoundError(
                f"sebp.{name} needs PyTorch, which is not installed: pip install torch",
                name="torch",
            ) from error
    if name == "SebpCallback":
        return importlib.import_module(f"{__name__}.torch.trainer").SebpCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def __dir__() -> list[str]:
    """List the public names, but for those that need a package which is not installed."""
    names = {*__all__, *_MODULES}
    if not _is_installed("torch"):
        names -= {*_OF_TORCH, "SebpCallback", "torch"}
    elif not _is_installed("transformers"):
        names.discard("SebpCallback")
    return sorted(names)
