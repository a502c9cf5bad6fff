# SPDX-License-Identifier: Apache-2.0
"""The mask that attention gets from transformers when it is the library's.

transformers asks a function for each model's mask and tells it, by functions of its own, which keys
a query sees. Other attentions make B x L x L_k numbers of that. Ours says the same in B x L_k codes
of int64, one for each key: the number of its text in its row, and what holds for all of them.

The code of a padded token is 0, so that as a mask of booleans it is the padding. Others have these
bits, so that a mask says the same where it has been detached, sliced or copied:

- 0 to 19: the number of the text, from 1 on; the largest: position_ids do not tell
- 20 to 39: one more than the window, 0 without one
- 40 to 59: how many queries there are, which are the last of these tokens, or the others' own
- 60: whether attention is causal
- 61: whether keys may follow that the mask leaves out, the room of a static cache
- 62: always set, as in no mask of zeros and ones
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ..common.forward import is_traced
from .attend import Pattern

_FIELD = 2**20 - 1
_UNTOLD = _FIELD
_CAUSAL = 1 << 60
_ROOM = 1 << 61
_OURS = 1 << 62
_MODULE = "transformers.masking_utils"


@dataclass(frozen=True)
class Mask:
    """What a mask of codes says.

    Attributes
    ----------
    pattern : Pattern
        Which keys of its text a query sees.
    queries : int
        How many queries there are in a row.
    segments : int64 array, B x L_k
        The number of each key's text, 0 for padding.
    is_told : bool
        Whether the positions that say where texts begin were understood.
    is_of_keys : bool
        Whether it says nothing of the queries: which of them are padding.
    has_room : bool
        Whether there may be more keys than it says, behind these.
    """

    pattern: Pattern
    queries: int
    segments: NDArray[np.int64]
    is_told: bool = True
    is_of_keys: bool = False
    has_room: bool = False

    def encode(self) -> Tensor:
        """Make a mask of it: int64, B x L_k."""
        same = _header(self.pattern, self.queries, self.segments.shape[1], self.has_room)
        segments = self.segments if self.is_told else np.full_like(self.segments, _UNTOLD)
        return torch.from_numpy(np.where(segments > 0, segments | same, 0))


def _header(pattern: Pattern, queries: int, tokens: int, has_room: bool) -> int:
    """Make the bits that are the same for all keys."""
    window = 0 if pattern.window is None else pattern.window + 1
    if max(window, queries, tokens) >= _FIELD:
        raise ValueError(f"sebp's attention takes rows of less than {_FIELD} tokens")
    same = _OURS + (_CAUSAL if pattern.causal else 0) + (_ROOM if has_room else 0)
    return same + queries * 2**40 + window * 2**20


def decode(mask: Tensor) -> Mask | None:
    """Read a mask of codes, or return None if it is another."""
    if mask.dtype != torch.int64 or mask.dim() != 2 or mask.numel() == 0:
        return None
    codes = mask.cpu().numpy()
    same = codes & ~_FIELD
    header = int(same.max())
    if not header & _OURS or (same != np.where(codes == 0, 0, header)).any():
        return None
    segments, window = codes & _FIELD, header >> 20 & _FIELD
    pattern = Pattern(bool(header & _CAUSAL), window - 1 if window > 0 else None)
    is_told = not bool((segments == _UNTOLD).any())
    queries, has_room = header >> 40 & _FIELD, bool(header & _ROOM)
    return Mask(pattern, queries, segments, is_told, has_room=has_room)


def decode_row(mask: Tensor, queries: int) -> Mask | None:
    """Read a mask of PyTorch's that is the same for all queries: B x 1 x 1 x L_k.

    Returns
    -------
    Mask or None
        None for any other, or where a query would see no key: PyTorch sees all of them then.
    """
    if mask.dim() != 4 or mask.shape[1:3] != (1, 1) or mask.requires_grad:
        return None
    mask = mask.cpu()
    if mask.dtype == torch.bool:
        real = mask
    elif mask.is_floating_point():
        real = mask == 0
        if not bool((real | (mask <= torch.finfo(mask.dtype).min)).all()):
            return None
    else:
        return None
    segments = real[:, 0, 0].numpy().astype(np.int64)
    is_seen = bool(segments.any(1).all())
    return Mask(Pattern(False), queries, segments, is_of_keys=True) if is_seen else None


# --------------------------------------------------------------------------------------------------
# What transformers' functions say


@dataclass
class _Seen:
    """Which keys are seen, as found in a function of transformers."""

    causal: bool = False
    full: bool = False
    before: int | None = None
    around: int | None = None
    segments: Tensor | None = None
    positions: Tensor | None = None

    def pattern(self) -> Pattern | None:
        """Return it as a :class:`Pattern`, or None if it is none."""
        if self.causal and not self.full and self.around is None:
            return Pattern(True, self.before)
        if self.full and not self.causal and self.before is None:
            return Pattern(False, self.around)
        return None


def _read(function: Callable, seen: _Seen) -> bool:
    """Add to `seen` what a mask function says; False if it is not one of those known here."""
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        seen.causal = True
        return True
    if function is masking_utils.bidirectional_mask_function:
        seen.full = True
        return True
    code = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None)
    if getattr(function, "__module__", "") != _MODULE or code is None or cells is None:
        return False
    held = dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True))
    match function.__qualname__.split(".")[0], held:
        case "and_masks", {"mask_functions": functions, **rest} if not rest:
            return all(_read(one, seen) for one in functions)
        case "sliding_window_overlay", {"sliding_window": int(window), **rest} if not rest:
            is_first, seen.before = seen.before is None, window - 1
            return is_first and window > 0
        case "sliding_window_bidirectional_overlay", {"sliding_window": int(window), **rest} if (
            not rest
        ):
            is_first, seen.around = seen.around is None, window
            return is_first and window >= 0
        case "packed_sequence_mask_function", {"packed_sequence_mask": Tensor() as segments}:
            is_first, seen.segments = seen.segments is None, segments
            return is_first
        case "remap_positions_for_packed_sequence", {
            "mask_function": inner,
            "position_ids": Tensor() as positions,
        }:
            is_first, seen.positions = seen.positions is None, positions
            return is_first and _read(inner, seen)
    return False


def restarts(positions: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    """Find where texts begin in rows of positions: B x L.

    Returns
    -------
    bool array, B x L, or None
        None if positions do not say it: each is to be one more than the one before, or that of the
        row's first token again.
    """
    begins = np.diff(positions, axis=1, prepend=positions[:, :1]) != 1
    if not bool((positions == positions[:, :1])[begins].all()):
        return None
    return begins


# --------------------------------------------------------------------------------------------------
# The mask function


def sebp_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    **kwargs: object,
) -> Tensor | None:
    """Make a model's mask; transformers calls it, and its ``sdpa_mask`` describes the arguments.

    Returns
    -------
    Tensor or None
        None where there is nothing to say, as with "sdpa". Codes of int64, B x tokens, where the
        library's attention can do what is asked for. Else ``sdpa_mask``'s: B x 1 x L x L_k.
    """
    from transformers import masking_utils

    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function or masking_utils.causal_mask_function,
        "attention_mask": attention_mask,
        "local_size": local_size,
        "allow_is_causal_skip": allow_is_causal_skip,
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip,
        "use_vmap": use_vmap,
        **kwargs,
    }
    if not torch.compiler.is_compiling() or is_traced():
        return _make_mask(**arguments)
    # A graph has no values of tensors, and the closures of functions made in it cannot be read.
    is_causal = arguments["mask_function"] is masking_utils.causal_mask_function
    is_full = arguments["mask_function"] is masking_utils.bidirectional_mask_function
    may_skip = allow_is_causal_skip if is_causal else is_full and allow_is_bidirectional_skip
    is_of_rows = attention_mask is None or attention_mask.dim() == 2
    if not may_skip or not is_of_rows or use_vmap or isinstance(q_offset, Tensor):
        return _make_without_a_graph(**arguments)
    first = q_offset - kv_offset
    tokens = _tokens_seen(is_causal, first, q_length, kv_length)
    is_aligned = not is_causal or (tokens == kv_length and (q_length in (1, tokens)))
    if attention_mask is None and is_aligned:
        return None
    same = _header(Pattern(is_causal), q_length, tokens, tokens < kv_length)
    if attention_mask is None:
        return torch.ones(batch_size, tokens, dtype=torch.int64) * (same + 1)
    real = attention_mask[:, kv_offset : kv_offset + tokens] != 0
    real = functional.pad(real, (0, tokens - real.shape[1]))  # the mask may end before the keys do
    return real.expand(batch_size, -1).long() * (same + 1)


def _tokens_seen(is_causal: bool, first: int, queries: int, keys: int) -> int:
    """Return how many keys are seen, the first query at `first`.

    What lies behind the last query is not: room that a static cache has left.
    """
    if is_causal and first + queries > keys:
        raise ValueError(f"{queries} queries at {first} have {keys} keys only")
    return min(keys, first + queries) if is_causal else keys


def _make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable,
    attention_mask: Tensor | None,
    allow_is_causal_skip: bool,
    allow_is_bidirectional_skip: bool,
    use_vmap: bool,
    **kwargs: object,
) -> Tensor | None:
    """Make the mask of :func:`sebp_mask` outside of graphs."""
    from transformers import masking_utils

    def dense() -> Tensor | None:
        return masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            use_vmap=use_vmap,
            **kwargs,
        )

    pattern, seen = None, _Seen()
    if not is_traced() and (attention_mask is None or attention_mask.dim() == 2):
        pattern = seen.pattern() if _read(mask_function, seen) else None
        is_packed = seen.segments is not None
        # Whoever does not allow to leave the mask out goes on to put something into it.
        may_skip = allow_is_causal_skip or is_packed if seen.causal else allow_is_bidirectional_skip
        is_whole = is_packed == (seen.positions is not None) and may_skip and not use_vmap
        pattern = pattern if is_whole else None
        if pattern == Pattern(False, seen.around) and seen.around is not None:
            # The window goes by the distance between a query and a key, whose ends have to meet.
            pattern = pattern if int(q_offset) + q_length == kv_offset + kv_length else None
    if pattern is None:
        return dense()
    first = int(q_offset) - kv_offset
    tokens = _tokens_seen(pattern.causal, first, q_length, kv_length)
    if pattern.window is not None and pattern.window >= tokens - 1:
        pattern = Pattern(pattern.causal)
    is_told = True
    if seen.segments is not None:
        segments = seen.segments.cpu().numpy()
        segments = segments - segments[:, :1] + 1
        is_told = restarts(seen.positions.cpu().numpy()) is not None
        segments = np.broadcast_to(segments, (batch_size, tokens))
    else:
        segments = _of_padding(attention_mask, batch_size, tokens, kv_offset)
        if not segments.any():
            return dense()
        is_aligned = not pattern.causal or (tokens == kv_length and q_length in (1, tokens))
        if pattern.window is None and is_aligned and bool(segments.all()):
            return None
    return Mask(pattern, q_length, segments, is_told, has_room=tokens < kv_length).encode()


_make_without_a_graph = torch.compiler.disable(_make_mask)


def _of_padding(mask: Tensor | None, batch: int, tokens: int, offset: int) -> NDArray[np.int64]:
    """Give the one text of each row the number 1, and padding 0: B x tokens."""
    segments = np.ones((batch, tokens), np.int64)
    if mask is None:
        return segments
    real = mask[:, offset : offset + tokens].detach().cpu().numpy() != 0
    segments[:, : real.shape[1]] *= real
    segments[:, real.shape[1] :] = 0  # the mask ends before the keys do
    return segments
