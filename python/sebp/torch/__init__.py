# SPDX-License-Identifier: Apache-2.0
"""The linear layer and attention of libsebp in PyTorch, on tensors of float32 and bfloat16.

They lie on the CPU or, where the library was built with CUDA, on a GPU.
"""

from .apply.layers import Report, apply_sebp_to_model, remove_sebp_from_model
from .apply.lora import apply_lora_to_model, merge_lora
from .attention.interface import register_attention
from .blocks.loss import linear_cross_entropy
from .linear_layers.linear import linear
from .masks.adapter import AdapterSwitch, SparseAdapter
from .masks.apply import apply_sparse_mask_to_model
from .masks.optimizer import MaskOptimizer
from .padding.models import PaddingFreeReport, padding_free, remove_padding_free
from .prepare import Prepared, prepare
from .report.compare import Comparison, compare
from .report.profile import LayerProfile, Profile, profile
from .report.run import RunReport
from .sparse.apply import apply_galore_to_model, apply_meprop_to_model, apply_sparsegrad_to_model
from .sparse.optimizer import SparseOptimizer

__all__ = [
    "AdapterSwitch",
    "Comparison",
    "LayerProfile",
    "MaskOptimizer",
    "PaddingFreeReport",
    "Prepared",
    "Profile",
    "Report",
    "RunReport",
    "SparseAdapter",
    "SparseOptimizer",
    "apply_lora_to_model",
    "apply_galore_to_model",
    "apply_meprop_to_model",
    "apply_sebp_to_model",
    "apply_sparse_mask_to_model",
    "apply_sparsegrad_to_model",
    "compare",
    "linear",
    "linear_cross_entropy",
    "merge_lora",
    "padding_free",
    "prepare",
    "profile",
    "register_attention",
    "remove_padding_free",
    "remove_sebp_from_model",
]
