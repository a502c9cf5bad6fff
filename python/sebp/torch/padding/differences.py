# SPDX-License-Identifier: Apache-2.0
"""How the results of two runs of a model differ."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..common.packing import Packing
from .stir import stirred_texts

# The last hidden states of base models, B x L x H, and the packing if they ran without padding, by
# name and number of the call.
Hidden = dict[tuple[str, int], tuple[Tensor, Packing | None]]

# How far a result may be off, as a share of its largest element: by the order of sums, in float32
# and longer formats, and in shorter ones.
TOLERANCE, SHORT_TOLERANCE = 1e-4, 3e-2
# The same where one text has changed and another is looked at: nothing but the number of rows that
# a product has could change its bits, as that of an expert.
TOUCHED, SHORT_TOUCHED = 1e-5, 2**-8
_PIECE = 2**20  # the elements that are compared at once


def part_differs(name: str, ours: object, right: object, mask: Tensor, tolerance: float) -> str:
    """Return how one part of two results differs, or "" if it is equal within rounding."""
    if not isinstance(right, Tensor):
        if right is None or isinstance(right, str) or ours == right:
            return "" if ours == right else f"{name} differs"
        if isinstance(right, (int, float)) and isinstance(ours, (int, float)):
            right, ours = torch.tensor(float(right)), torch.tensor(float(ours))
        else:
            return f"{name} is a {type(right).__name__}, which cannot be compared"
    if not isinstance(ours, Tensor) or ours.shape != right.shape or ours.dtype != right.dtype:
        return f"{name} is of another shape or kind"
    ours, right = ours.detach(), right.detach()
    if _off(ours, right) <= tolerance:
        return ""
    if right.shape[:2] == mask.shape and _off(ours[mask], right[mask]) <= tolerance:
        return ""
    if right.numel() == 1:
        return f"{name} came out as {ours.item():.6g}, not {right.item():.6g}"
    return f"{name} came out otherwise"


def _off(ours: Tensor, right: Tensor) -> float:
    """Return the largest difference, as a share of the largest of the elements that differ."""
    if not right.is_floating_point():
        return 0.0 if torch.equal(ours, right) else float("inf")
    difference = scale = 0.0
    # In pieces: the logits of a batch may take most of the memory there is.
    pieces = (one.reshape(-1).split(_PIECE) for one in (ours, right))
    for a, b in zip(*pieces, strict=True):
        differs = (a != b) & ~(a.isnan() & b.isnan())
        a, b = a[differs].double(), b[differs].double()
        if a.numel() == 0:
            continue
        off = (a - b).abs().nan_to_num(torch.inf, posinf=torch.inf)
        difference = max(difference, float(off.max()))
        scale = max(scale, float(b.abs().nan_to_num(0, posinf=0).max()))
    if difference == 0:
        return 0.0
    return difference / max(scale, 1e-30) if math.isfinite(difference) else float("inf")


def states_differ(ours: Hidden, right: Hidden, tolerance: float, seen: Callable) -> str:
    """Return how the hidden states of two runs differ, or "".

    Parameters
    ----------
    ours, right : Hidden
        Those of a run in which padding was left out, and of another one.
    tolerance : float
        As a share of the largest that differs.
    seen : callable
        Returns the tokens that are compared, bool, B x L, given a packing.
    """
    for key, (state, packing) in ours.items():
        other, other_packing = right.get(key, (None, None))
        if seen is real_of_others and packing is not None and other_packing is None:
            return "it did not run again without padding"
        if packing is None or other is None:
            continue
        rows = seen(packing)
        if state.shape != other.shape or state[rows].isnan().any():
            return "its last hidden state cannot be compared"
        if _off(state[rows], other[rows]) > tolerance:
            return "its last hidden state came out otherwise"
    return ""


def real(packing: Packing) -> Tensor:
    """Return which tokens are real, B x L."""
    return packing.mask


def real_of_others(packing: Packing) -> Tensor:
    """Return the real tokens of texts that were not stirred."""
    return packing.mask & ~stirred_texts(packing.mask)[:, None]
