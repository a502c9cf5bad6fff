# SPDX-License-Identifier: Apache-2.0
"""SparseGrad and MeProp on NumPy arrays: bases, gradients of few elements, and their AdamW.

With a weight W: N x K, vectors u_out: r_out x N and u_in: r_in x K (a row is a vector), and X, dY
and their active rows as in :mod:`sebp.core`, a step of SparseGrad on a layer is::

    r = sparsegrad_gradient(basis, dy, x)   # u_out (dY^T X) u_in^T: r_out x r_in
    kept = top_elements(r, k)
    state.step(kept, AdamW(lr=1e-4))        # the gradient's values become the step
    sparsegrad_update(basis, kept, w)       # W += u_out^T S u_in, in place

For MeProp ``meprop_gradient`` takes the place of the first two, ``add_elements`` of the last. For
elements that are chosen once ``sampled_product``, or ``sparsegrad_kept``, takes the place of the
first two.
"""

from ..core.calls import NONFINITE
from .adamw import AdamW, Moments, SparseAdamW, adamw_step, check_adamw, weight_decay
from .bases import Basis, BasisSums, Sums
from .elements import Sparse, add_elements, take_elements, top_elements
from .gradients import meprop_gradient, sampled_product, sparsegrad_gradient, sparsegrad_kept
from .updates import lora_merge, sparsegrad_update, stochastic_add

__all__ = [
    "NONFINITE",
    "AdamW",
    "Basis",
    "BasisSums",
    "Moments",
    "Sparse",
    "SparseAdamW",
    "Sums",
    "adamw_step",
    "add_elements",
    "check_adamw",
    "lora_merge",
    "meprop_gradient",
    "sampled_product",
    "sparsegrad_gradient",
    "sparsegrad_kept",
    "sparsegrad_update",
    "stochastic_add",
    "take_elements",
    "top_elements",
    "weight_decay",
]
