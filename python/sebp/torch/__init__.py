# SPDX-License-Identifier: Apache-2.0
"""The linear layer of libsebp in PyTorch, on CPU tensors of float32 and bfloat16."""

from .apply import Report, apply_sebp_to_model, remove_sebp_from_model
from .layers import SebpLinear, linear
from .padding import padding
from .padding_free import PaddingFreeReport, padding_free, remove_padding_free
from .profile import LayerProfile, Profile, profile

__all__ = [
    "LayerProfile",
    "PaddingFreeReport",
    "Profile",
    "Report",
    "SebpLinear",
    "apply_sebp_to_model",
    "linear",
    "padding",
    "padding_free",
    "profile",
    "remove_padding_free",
    "remove_sebp_from_model",
]
