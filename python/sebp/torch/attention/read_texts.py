# SPDX-License-Identifier: Apache-2.0
"""Reads from what models of transformers hand to attention which tokens are a text.

The operator ``sebp::texts`` does the same in a graph: what is read from numbers is known only when
it runs.
"""

import functools
import inspect
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .attend import Pattern
from .mask_codes import Mask, decode, restarts
from .texts import Side, Texts, check_offsets

# Arguments of a module's forward beside which there is one sequence only. A module that has others
# may attend from one sequence to another of the same length.
_OF_ONE_SEQUENCE = {
    "self",
    "hidden_states",
    "attention_mask",
    "mask",
    "cache",
    "past_key_value",
    "past_key_values",
    "layer_past",
    "use_cache",
    "output_attentions",
    "position_bias",
    "position_embeddings",
    "position_ids",
    "cache_position",
}


def attends_to_itself(kind: type[nn.Module]) -> bool:
    """Return whether a module's forward gets one sequence only, which then has its own keys."""
    if torch.compiler.is_compiling():  # a compiler sees through no cache
        return _has_one_sequence.__wrapped__(kind)
    return _has_one_sequence(kind)


@functools.lru_cache(maxsize=1024)
def _has_one_sequence(kind: type[nn.Module]) -> bool:
    parameters = inspect.signature(kind.forward).parameters.values()
    return all(p.kind is p.VAR_KEYWORD or p.name in _OF_ONE_SEQUENCE for p in parameters)


@dataclass(frozen=True)
class Told:
    """What a call of attention is told about texts, beside its mask.

    Attributes
    ----------
    shape, shape_k : (int, int)
        B and L of the queries, B and L_k of the keys.
    position_ids : Tensor, B or 1 x L, or None
    offsets_q, offsets_k : Tensor of int, texts + 1, or None
        Cumulative lengths.
    is_causal : bool or None
        The argument.
    module_is_causal : bool
        What the module says, for a call without mask and argument.
    sliding_window : int or None
        The argument.
    is_of_one_sequence : bool
        Whether the module can attend to its own sequence only: :func:`attends_to_itself`.
    """

    shape: tuple[int, int]
    shape_k: tuple[int, int]
    position_ids: Tensor | None
    offsets_q: Tensor | None
    offsets_k: Tensor | None
    is_causal: bool | None
    module_is_causal: bool
    sliding_window: int | None
    is_of_one_sequence: bool


def read_texts(mask: Mask | None, told: Told) -> tuple[Texts, Pattern]:
    """Find out which tokens are a text, and which of its keys a query sees.

    It is read from the first of these that says it: cumulative lengths; a mask with padding;
    positions that begin again.

    Raises
    ------
    ValueError
        If they contradict each other or leave open what is meant.
    """
    check_mask(mask, told)
    pattern = _pattern(mask, told)
    if told.offsets_q is not None or told.offsets_k is not None:
        return _texts_of_offsets(mask, told), pattern
    return _texts(mask, pattern, told), pattern


def check_mask(mask: Mask | None, told: Told) -> None:
    """Raise where a mask is for other queries or keys."""
    if mask is None:
        return
    queries = told.shape[1]
    if mask.queries != queries or mask.segments.shape != told.shape_k:
        rows, tokens = mask.segments.shape
        keys, length = told.shape_k
        raise ValueError(
            f"the mask is for {mask.queries} queries and {rows} x {tokens} keys, but there are"
            f" {queries} and {keys} x {length}"
        )


# --------------------------------------------------------------------------------------------------
# Which keys a query sees


def _pattern(mask: Mask | None, told: Told) -> Pattern:
    """Put together what the mask, the arguments and the module say; raise where they differ."""
    sliding_window, is_causal = told.sliding_window, told.is_causal
    queries, keys = told.shape[1], told.shape_k[1]
    window = None if sliding_window is None else sliding_window - 1
    if window is not None and window < 0:
        raise ValueError(f"sliding_window is {sliding_window}")
    if window is not None and window >= keys - 1:
        window = None
    if mask is None:
        # As "sdpa" has it, which says True for a module that says nothing.
        causal = told.module_is_causal if is_causal is None else bool(is_causal)
        if window is not None:
            raise ValueError(
                f"sliding_window is {sliding_window}, but the mask is None and so has no window"
            )
        if causal and 1 < queries != keys:
            raise ValueError(
                f"{queries} queries and {keys} keys without a mask: which see which is left open"
            )
        return Pattern(causal)
    pattern = mask.pattern
    if sliding_window is not None and window != pattern.window:
        own = None if pattern.window is None else pattern.window + 1
        raise ValueError(f"sliding_window is {sliding_window}, but that of the mask is {own}")
    if is_causal is None or bool(is_causal) == pattern.causal:
        return pattern
    raise ValueError(
        f"is_causal is {is_causal}, but the mask is {'' if pattern.causal else 'not '}causal;"
        " config.is_causal changes both"
    )


# --------------------------------------------------------------------------------------------------
# Which tokens are a text


def _texts_of_offsets(mask: Mask | None, told: Told) -> Texts:
    """Read the texts from cumulative lengths."""
    offsets_q, offsets_k = told.offsets_q, told.offsets_k
    if offsets_q is None or offsets_k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k come together, but one is None")
    if mask is not None and not mask.segments.all():
        raise ValueError("attention_mask has padding, and cu_seq_lens_q is given: give one of them")
    sides = (
        _side_of_offsets(offsets_q, told.shape, "q"),
        _side_of_offsets(offsets_k, told.shape_k, "k"),
    )
    if sides[0].offsets.size != sides[1].offsets.size:
        counts = (sides[0].offsets.size - 1, sides[1].offsets.size - 1)
        raise ValueError(f"cu_seq_lens_q has {counts[0]} texts, but cu_seq_lens_k {counts[1]}")
    return Texts(*sides)


def _side_of_offsets(offsets: Tensor, shape: tuple[int, int], name: str) -> Side:
    """Check cumulative lengths and make a side of them."""
    if offsets.dim() != 1 or offsets.is_floating_point() or offsets.numel() == 0:
        given = tuple(offsets.shape)
        raise ValueError(f"cu_seq_lens_{name} is {offsets.dtype} {given}, not a list of integers")
    numbers = offsets.detach().cpu().numpy().astype(np.int64)
    return Side.of_lengths(check_offsets(numbers, shape, f"cu_seq_lens_{name}"), shape)


def _texts(mask: Mask | None, pattern: Pattern, told: Told) -> Texts:
    """Read the texts from a mask, or from positions."""
    (batch, queries), keys, position_ids = told.shape, told.shape_k[1], told.position_ids
    if mask is not None and not mask.is_told:
        raise ValueError(_NOT_TOLD)
    if mask is not None and mask.segments.max(initial=0) > 1:
        return Texts.of_segments(mask.segments)
    may_be_own = queries == keys and not (mask is not None and mask.is_of_keys)
    is_own = pattern.causal or (may_be_own and told.is_of_one_sequence)
    if mask is None or mask.segments.all():
        begins = _begins(position_ids, batch, queries) if queries == keys else None
        if begins is None:
            return Texts.of_rows(batch, queries, keys)
        if not is_own or batch > 1:
            raise ValueError(_PACKED)
        return Texts.of_segments(begins.cumsum(1))
    real = mask.segments > 0
    if queries == keys:
        _check_positions(position_ids, real)
    of_queries = real[:, -queries:] if is_own else np.ones((batch, queries), np.bool_)
    if queries == 0:
        of_queries = real[:, :0]
    if pattern.window is not None:
        _check_window(pattern, real, is_own)
    return Texts.of_masks(of_queries, real)


def _check_positions(position_ids: Tensor | None, real: np.ndarray) -> None:
    """Raise where positions of real tokens do not rise in a row that has padding: B x L."""
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != real.shape[1]:
        return
    positions = position_ids.detach().cpu().numpy()
    if positions.shape[0] not in (1, real.shape[0]):
        return
    for row, seen in zip(np.broadcast_to(positions, real.shape), real, strict=True):
        if (np.diff(row[seen]) <= 0).any():
            raise ValueError(_PACKED)


_NOT_TOLD = """\
position_ids do not say where texts begin: each is to be one more than the one before, or that of \
the first token again. Give cu_seq_lens_q and cu_seq_lens_k, or an attention_mask."""

_PACKED = """\
position_ids begin again, but 'sdpa' and flash attention would not part texts there: the batch has \
padding, or several rows and a cache or a mask, or this may be attention to another sequence. Give \
cu_seq_lens_q and cu_seq_lens_k, or use_cache=False and no attention_mask."""


def _begins(position_ids: Tensor | None, batch: int, length: int) -> np.ndarray | None:
    """Find where texts begin by positions: B x L; None for one text a row."""
    if position_ids is None or position_ids.dim() != 2 or length < 2:
        return None
    if position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
        return None
    positions = position_ids.detach().cpu().numpy()
    if (np.diff(positions, axis=1) == 1).all():
        return None
    begins = restarts(positions)
    if begins is None:
        raise ValueError(_NOT_TOLD)
    return np.broadcast_to(begins, (batch, length))


def _check_window(pattern: Pattern, real: np.ndarray, is_own: bool) -> None:
    """Raise where a window would go by other distances than those in the padded rows."""
    if not is_own:
        raise ValueError(
            "a sliding window over a padded batch, by a module that may attend to another"
            " sequence: use 'sdpa'"
        )
    first = real.argmax(1)
    last = real.shape[1] - real[:, ::-1].argmax(1)
    lengths = real.sum(1)
    if bool(((last - first != lengths) & (lengths > 0)).any()):
        raise ValueError(
            f"attention_mask has gaps within texts, and attention a window of {pattern.window} to"
            " a side: whether the gaps count is left open; use 'sdpa', where they do"
        )


# --------------------------------------------------------------------------------------------------
# sebp::texts


@torch.library.custom_op("sebp::texts", mutates_args=())
def texts_op(
    mask: Tensor | None,
    position_ids: Tensor | None,
    offsets_q: Tensor | None,
    offsets_k: Tensor | None,
    shape: list[int],
    shape_k: list[int],
    is_causal: bool | None,
    module_is_causal: bool,
    sliding_window: int | None,
    is_of_one_sequence: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what :func:`read_texts` does.

    Returns
    -------
    q_texts, k_texts, pattern : Tensor of int64
        As ``sebp::attention`` takes them: cumulative lengths where they were given, or else the
        number of each token's text, B x L and B x L_k.
    """
    codes = None if mask is None else decode(mask)
    if mask is not None and codes is None:
        raise ValueError(
            f"attention_mask is {mask.dtype} {tuple(mask.shape)}, which is none of sebp's, or it"
            " leaves out all tokens"
        )
    told = Told(
        tuple(shape), tuple(shape_k), position_ids, offsets_q, offsets_k, is_causal,
        module_is_causal, sliding_window, is_of_one_sequence,
    )  # fmt: skip
    texts, pattern = read_texts(codes, told)
    seen = torch.tensor([pattern.causal, *pattern.windows], dtype=torch.int64, device="cpu")
    if offsets_q is not None:
        return offsets_q.cpu().long().clone(), offsets_k.cpu().long().clone(), seen
    return texts.queries.numbers(), texts.keys.numbers(), seen


@texts_op.register_fake
def _(
    mask: Tensor | None,
    position_ids: Tensor | None,
    offsets_q: Tensor | None,
    offsets_k: Tensor | None,
    shape: list[int],
    shape_k: list[int],
    is_causal: bool | None,
    module_is_causal: bool,
    sliding_window: int | None,
    is_of_one_sequence: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = shape, shape_k
    if offsets_q is not None and offsets_k is not None:
        shapes = offsets_q.shape, offsets_k.shape
    q_texts, k_texts, seen = (
        torch.empty(one, dtype=torch.int64, device="cpu") for one in (*shapes, (3,))
    )
    return q_texts, k_texts, seen
