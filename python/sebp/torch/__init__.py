# SPDX-License-Identifier: Apache-2.0
"""The linear layer of libsebp in PyTorch, on CPU tensors of float32 and bfloat16."""

from .apply import Report, apply_sebp_to_model, remove_sebp_from_model
from .layers import SebpLinear, linear
from .padding import padding

__all__ = [
    "Report",
    "SebpLinear",
    "apply_sebp_to_model",
    "linear",
    "padding",
    "remove_sebp_from_model",
]
