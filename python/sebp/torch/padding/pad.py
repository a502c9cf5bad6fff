# SPDX-License-Identifier: Apache-2.0
"""What padded tokens hold where a base model returns its last hidden state."""

import functools
import itertools

import numpy as np
import torch
from torch import Tensor

from ..common.packing import Packing
from .proof import Call

_calls = itertools.count()


@functools.lru_cache(maxsize=64)
def _noise(width: int) -> Tensor:
    """Return numbers for a padded token: 1 x H, between 2 and 4 in size, of either sign.

    They are not zero, so that a loss which reads them has a gradient there, and not alike, so that
    a norm does not take them away.
    """
    numbers = np.random.default_rng(width)
    return _signed(2 + 2 * numbers.random((1, width)), numbers)


def _signed(sizes: np.ndarray, numbers: np.random.Generator) -> Tensor:
    signs = numbers.integers(0, 2, sizes.shape) * 2 - 1
    return torch.from_numpy((signs * sizes).astype(np.float32))


def _noise_like(x: Tensor, packing: Packing) -> Tensor:
    """Return numbers for padded tokens, every other of them larger than any of x.

    A maximum has the large ones. A function that cuts large numbers off has the others. They differ
    from token to token and call to call: a function that has derivative zero at one of them does
    not at all.
    """
    largest = min(float(x.detach().abs().amax()), torch.finfo(x.dtype).max / 16)
    texts, length = packing.mask.shape
    call = next(_calls)
    numbers = np.random.default_rng(call)
    token = _signed(1 + numbers.random((texts * length, 1)), numbers)
    token[call % 2 :: 2] /= 16
    token *= largest if 0 < largest < 1e30 else 1
    return (token.to(x.device) * _noise(x.shape[2]).to(x.device)).to(x.dtype)


def pad(x: Tensor, packing: Packing, call: Call) -> Tensor:
    """Turn hidden states, 1 x T x H, into B x L x H.

    Padded tokens hold numbers where a backward can follow, else NaN; zeros where nothing is
    checked. States that are B x L x H already get them anew, as a norm makes them smaller.
    """
    if x.shape[:2] == packing.mask.shape:
        x = packing.pack(x)
    if not call.proofs.check:
        fill = x.new_zeros(1, x.shape[2])
    elif call.has_backward:
        fill = _noise_like(x, packing)
    else:
        fill = x.new_full((1, x.shape[2]), torch.nan)
    if call.has_backward and not torch.is_grad_enabled():
        if not call.is_again:
            call.leave_unwatched()
    elif call.has_backward and not x.requires_grad:
        # Nothing in the model trains, but something behind it: the backward is to come here.
        x = x.detach().requires_grad_()
    return packing.pad(x, fill)


def pad_first(output: object, packing: Packing, call: Call) -> object:
    """Pad the last hidden state, which is the first thing a model returns."""
    if isinstance(output, Tensor):
        return pad(output, packing, call)
    if isinstance(output, tuple):
        return (pad(output[0], packing, call), *output[1:])
    output.last_hidden_state = pad(output.last_hidden_state, packing, call)
    return output
