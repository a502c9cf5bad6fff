# SPDX-License-Identifier: Apache-2.0
"""``attn_implementation="sebp"``: the library's attention in models of transformers.

transformers has a table of attention functions and one of mask functions. With an entry in both,
every model that goes through them can have it, whatever its architecture.
"""

import functools
import inspect
import warnings

import numpy as np
import torch
from torch import Tensor, nn

from .attend import Pattern, attend
from .attention import attend_packed, check_packed
from .forward import is_traced
from .mask_codes import Mask, decode, decode_row, restarts, sebp_mask
from .packing import Unfit, lengths_of
from .texts import Side, Texts

NAME = "sebp"

# Arguments that models hand on and that do not change what attention computes.
_HARMLESS = {
    "deterministic",  # it always is
    "logits_to_keep",
    "max_length_k",  # found in the lengths
    "max_length_q",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "return_dict",
    "seq_idx",
    "use_cache",
}

_HINTS = {
    "output_attentions": "probabilities are never in memory as a whole: use 'eager'",
    "head_mask": "use 'eager'",
    "layer_head_mask": "use 'eager'",
    "s_aux": "sebp's attention has no sinks: use 'eager'",
    "sinks": "sebp's attention has no sinks: use 'eager'",
}

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


def register_attention() -> str:
    """Put "sebp" into transformers' tables of attention and mask functions.

    Models that go through these tables can then be made with ``attn_implementation="sebp"``, or
    changed by ``model.set_attn_implementation("sebp")``. Calling it again does nothing.

    It is a call of its own, as importing ``sebp`` loads neither PyTorch nor transformers, and what
    it does is not to depend on the order of imports.

    Returns
    -------
    str
        "sebp", so that ``attn_implementation=sebp.register_attention()`` can be written.

    Raises
    ------
    ImportError
        If transformers is not installed, or too old: its masks have no ``q_length`` then.
    LibraryNotFoundError, LibraryMismatchError
        If libsebp is not found, or is another version's.
    """
    import transformers
    import transformers.masking_utils

    from .. import _library

    mask_function = transformers.masking_utils.sdpa_mask
    if "q_length" not in inspect.signature(mask_function).parameters:
        raise ImportError(
            f"transformers {transformers.__version__} is too old for sebp's attention"
        )
    _library.load()
    if NAME not in transformers.AttentionInterface():
        # Under torch.compile they run as they are: lengths are read from tensors.
        disable = torch.compiler.disable
        transformers.AttentionInterface.register(NAME, disable(sebp_attention))
        transformers.AttentionMaskInterface.register(NAME, disable(sebp_mask))
    return NAME


def sebp_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Compute a layer's attention; transformers' models call it.

    Which tokens are a text is read from the first of these that says it: ``cu_seq_lens_q`` and
    ``cu_seq_lens_k``; a mask with padding; positions that begin again.

    Parameters
    ----------
    module : nn.Module
        The attention layer.
    query : Tensor, B x H x L x D
        float32 or bfloat16, on the CPU; `key` and `value` as well. Under autocast cast to its type.
    key, value : Tensor, B x H_k x L_k x D
    attention_mask : Tensor or None
        What :func:`~.mask_codes.sebp_mask` made, or one of padded keys, B x 1 x 1 x L_k. Another
        one of four dimensions goes on to transformers' "sdpa", with a warning.
    dropout, scaling, softcap
        As :func:`~.attend.attend` takes them.
    is_causal : bool, optional
        Default: what the mask says, or without one the module.
    sliding_window : int, optional
        A token sees those less than so many tokens away.
    position_bias : Tensor, 1 or B x 1 or H x L x L_k, optional
        What is added to the scores.
    position_ids : Tensor, B or 1 x L, optional
        The positions of the tokens. Where they begin again, so does a text.
    cu_seq_lens_q, cu_seq_lens_k : Tensor of int, texts + 1, optional
        Cumulative lengths of texts that lie end to end.
    **kwargs
        Refused unless known not to change the result.

    Returns
    -------
    out : Tensor, B x L x H x D
        Zero at padded tokens.
    None
        In the place of the probabilities.

    Raises
    ------
    ValueError
        For arguments that are not supported, contradict each other, or leave open what is meant.
    TypeError, SebpError
        For tensors that the library does not take.
    """
    _refuse(kwargs)
    if query.device.type != "cpu":
        raise TypeError(f"query is on {query.device}; attn_implementation='sebp' is for the CPU")
    lengths = lengths_of(attention_mask)
    if lengths is not None:
        return _of_packed(
            module, query, key, value, lengths, dropout, scaling, is_causal, sliding_window,
            softcap, position_bias,
        )  # fmt: skip
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    mask = None
    if attention_mask is not None and not is_traced():
        mask = decode(attention_mask) or decode_row(attention_mask, query.shape[2])
    if (attention_mask is not None and mask is None) or is_traced():
        return _by_sdpa(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, softcap,
            position_bias, (cu_seq_lens_q, cu_seq_lens_k),
        )  # fmt: skip
    if query.shape[0] == 1 < key.shape[0]:  # learned queries
        query = query.expand(key.shape[0], -1, -1, -1)
    if mask is not None:
        key, value = _fit(mask, query, key), _fit(mask, query, value)
    if position_bias is not None:
        position_bias = position_bias[..., : key.shape[2]]
    pattern = _pattern(module, mask, is_causal, sliding_window, query.shape[2], key.shape[2])
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        texts = _texts_of_offsets(mask, query, key, cu_seq_lens_q, cu_seq_lens_k)
        if position_bias is not None and query.shape[0] > 1:
            raise ValueError("position_bias with cu_seq_lens_q needs a batch of one row")
    else:
        texts = _texts(module, mask, pattern, query, key, position_ids)
    out = attend(query, key, value, texts, pattern, position_bias, scaling, softcap, dropout)
    return out, None


def _of_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    window: int | None,
    softcap: float | None,
    position_bias: Tensor | None,
) -> tuple[Tensor, None]:
    """Compute attention where ``padding_free`` has removed padding."""
    if position_bias is not None:
        raise Unfit("its attention has the argument position_bias")
    check_packed(query, key, lengths)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    out = attend_packed(
        query, key, value, lengths, is_causal, window, None, dropout, scaling, softcap
    )
    return out, None


def _refuse(kwargs: dict[str, object]) -> None:
    """Raise for arguments that could change the result."""
    for name, value in kwargs.items():
        if value is None or name in _HARMLESS:
            continue
        if name == "output_attentions" and value is False:
            continue
        hint = _HINTS.get(name, "leave it out, or use 'sdpa' or 'eager'")
        raise ValueError(f"attn_implementation='sebp' does not have the argument {name}; {hint}")


def _by_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    softcap: float | None,
    position_bias: Tensor | None,
    offsets: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, None]:
    """Let PyTorch compute what has a mask of its own, or is traced."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mask is not None and (mask.dim() != 4 or not _is_plain(mask)):
        raise ValueError(
            f"attention_mask is {mask.dtype} {tuple(mask.shape)}, which is neither sebp's nor one"
            " of four dimensions: give the model a mask of two, or use 'sdpa'"
        )
    if softcap is not None:
        raise ValueError(
            "softcap goes with a mask of two dimensions or none; with this one use 'eager'"
        )
    if offsets != (None, None):
        raise ValueError("cu_seq_lens_q and a mask of four dimensions: give one of them")
    if not is_traced():
        warnings.warn(
            f"{type(module).__name__}: a mask of four dimensions, so PyTorch's attention computes"
            " it; sebp's takes a mask of two dimensions, cu_seq_lens_q, or position_ids",
            stacklevel=3,
        )
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        position_bias=position_bias,
    )


def _is_plain(mask: Tensor) -> bool:
    """Return whether a mask is PyTorch's, and no sum of one and sebp's codes."""
    if mask.dtype == torch.bool:
        return True
    return mask.is_floating_point() and not bool((mask >= 2.0**60).any())


def _fit(mask: Mask, query: Tensor, states: Tensor) -> Tensor:
    """Take the keys or values that a mask is for; those behind are a static cache's room."""
    rows, tokens = mask.segments.shape
    is_fit = tokens == states.shape[2] or (mask.has_room and tokens < states.shape[2])
    if mask.queries != query.shape[2] or not is_fit or rows != states.shape[0]:
        raise ValueError(
            f"the mask is for {mask.queries} queries and {rows} x {tokens} keys, but there are"
            f" {query.shape[2]} and {states.shape[0]} x {states.shape[2]}"
        )
    return states[:, :, :tokens]


# --------------------------------------------------------------------------------------------------
# Which keys a query sees


def _pattern(
    module: nn.Module,
    mask: Mask | None,
    is_causal: bool | None,
    sliding_window: int | None,
    queries: int,
    keys: int,
) -> Pattern:
    """Put together what the mask, the arguments and the module say; raise where they differ."""
    window = None if sliding_window is None else sliding_window - 1
    if window is not None and window < 0:
        raise ValueError(f"sliding_window is {sliding_window}")
    if window is not None and window >= keys - 1:
        window = None
    if mask is None:
        # As "sdpa" has it, which says True for a module that says nothing.
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        causal = bool(causal)
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


def _texts_of_offsets(
    mask: Mask | None,
    query: Tensor,
    key: Tensor,
    offsets_q: Tensor | None,
    offsets_k: Tensor | None,
) -> Texts:
    """Read the texts from cumulative lengths."""
    if offsets_q is None or offsets_k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k come together, but one is None")
    if mask is not None and not mask.segments.all():
        raise ValueError("attention_mask has padding, and cu_seq_lens_q is given: give one of them")
    sides = [
        _side_of_offsets(offsets, states, name)
        for offsets, states, name in ((offsets_q, query, "q"), (offsets_k, key, "k"))
    ]
    if sides[0].offsets.size != sides[1].offsets.size:
        counts = (sides[0].offsets.size - 1, sides[1].offsets.size - 1)
        raise ValueError(f"cu_seq_lens_q has {counts[0]} texts, but cu_seq_lens_k {counts[1]}")
    return Texts(*sides)


def _side_of_offsets(offsets: Tensor, states: Tensor, name: str) -> Side:
    """Check cumulative lengths and make a side of them."""
    total = states.shape[0] * states.shape[2]
    if offsets.dim() != 1 or offsets.is_floating_point() or offsets.numel() == 0:
        shape = tuple(offsets.shape)
        raise ValueError(f"cu_seq_lens_{name} is {offsets.dtype} {shape}, not a list of integers")
    lengths = np.diff(offsets.detach().cpu().numpy().astype(np.int64))
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != total or bool((lengths < 0).any()):
        raise ValueError(
            f"cu_seq_lens_{name} goes from {first} to {last}, for {total} tokens; it goes from 0 to"
            " their number and never falls"
        )
    rows, length = states.shape[0], states.shape[2]
    if not np.isin(np.arange(1, rows) * length, np.cumsum(lengths)).all():
        raise ValueError(
            f"a text of cu_seq_lens_{name} goes over the end of a row of {length} tokens: these are"
            " lengths of another sequence, or the batch is to be one row"
        )
    return Side.of_lengths(lengths, (rows, length))


def _texts(
    module: nn.Module,
    mask: Mask | None,
    pattern: Pattern,
    query: Tensor,
    key: Tensor,
    position_ids: Tensor | None,
) -> Texts:
    """Read the texts from a mask, or from positions."""
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if mask is not None and not mask.is_told:
        raise ValueError(_NOT_TOLD)
    if mask is not None and mask.segments.max(initial=0) > 1:
        return Texts.of_segments(mask.segments)
    may_be_own = queries == keys and not (mask is not None and mask.is_of_keys)
    is_own = pattern.causal or (may_be_own and _attends_to_itself(type(module)))
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


@functools.lru_cache(maxsize=1024)
def _attends_to_itself(kind: type[nn.Module]) -> bool:
    """Return whether a module's forward gets one sequence only, which then has its own keys."""
    parameters = inspect.signature(kind.forward).parameters.values()
    return all(p.kind is p.VAR_KEYWORD or p.name in _OF_ONE_SEQUENCE for p in parameters)


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
