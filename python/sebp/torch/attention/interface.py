# SPDX-License-Identifier: Apache-2.0
"""``attn_implementation="sebp"``: the library's attention in models of transformers.

transformers has a table of attention functions and one of mask functions. With an entry in both,
every model that goes through them can have it, whatever its architecture.
"""

import inspect
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..common.devices import autocast_dtype, reason_against
from ..common.forward import is_traced
from ..common.packing import lengths_of
from .attend import attend, attend_told
from .mask_codes import decode, decode_row, sebp_mask
from .packed_texts import attend_packed, check_bias, check_packed
from .read_texts import Told, attends_to_itself, read_texts

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

    from ... import _library

    mask_function = transformers.masking_utils.sdpa_mask
    if "q_length" not in inspect.signature(mask_function).parameters:
        raise ImportError(
            f"transformers {transformers.__version__} is too old for sebp's attention"
        )
    _library.load()
    if NAME not in transformers.AttentionInterface():
        transformers.AttentionInterface.register(NAME, sebp_attention)
        transformers.AttentionMaskInterface.register(NAME, sebp_mask)
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
        float32 or bfloat16, on the CPU or on a GPU that the library can work on; `key` and `value`
        as well. Under autocast cast to its type.
    key, value : Tensor, B x H_k x L_k x D
    attention_mask : Tensor or None
        What :func:`~.mask_codes.sebp_mask` made, or one of padded keys, 1 or B x 1 x 1 x L_k.
        Another one of four dimensions goes on to transformers' "sdpa", with a warning.
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
    if not query.is_cpu and (reason := reason_against(query.device)):
        raise TypeError(f"query is on {query.device}; attn_implementation='sebp' is not: {reason}")
    if query.shape[0] == 1 < key.shape[0]:  # learned queries
        query = query.expand(key.shape[0], -1, -1, -1)
    scores = _Scores(dropout, scaling, softcap, is_causal, sliding_window, position_bias)
    told = position_ids, cu_seq_lens_q, cu_seq_lens_k
    if not torch.compiler.is_compiling() or is_traced():
        return _attention(module, query, key, value, attention_mask, scores, *told), None
    if not _fits_a_graph(key, attention_mask, scores):
        return _without_a_graph(module, query, key, value, attention_mask, scores, *told), None
    query, key, value = _cast(query, key, value)
    told = _told(module, query, key, scores, *told)
    found = torch.ops.sebp.texts(
        attention_mask, told.position_ids, told.offsets_q, told.offsets_k, told.shape,
        told.shape_k, told.is_causal, told.module_is_causal, told.sliding_window,
        told.is_of_one_sequence,
    )  # fmt: skip
    return attend_told(query, key, value, found, scaling, softcap, dropout), None


@dataclass(frozen=True)
class _Scores:
    """How scores and probabilities are made: arguments of :func:`sebp_attention`."""

    dropout: float
    scaling: float | None
    softcap: float | None
    is_causal: bool | None
    window: int | None
    bias: Tensor | None


def _fits_a_graph(key: Tensor, mask: Tensor | None, scores: _Scores) -> bool:
    """Return whether nothing has to be read from tensors but by operators."""
    if scores.bias is not None:  # may be cut text by text
        return False
    if mask is None:
        return True
    return mask.dtype == torch.int64 and mask.dim() == 2 and mask.shape[1] == key.shape[2]


def _cast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Cast them as autocast says."""
    dtype = autocast_dtype(query)
    if dtype is None:
        return query, key, value
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _told(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    scores: _Scores,
    position_ids: Tensor | None,
    offsets_q: Tensor | None,
    offsets_k: Tensor | None,
) -> Told:
    """Put together what is known of texts."""
    return Told(
        (query.shape[0], query.shape[2]),
        (key.shape[0], key.shape[2]),
        position_ids,
        offsets_q,
        offsets_k,
        None if scores.is_causal is None else bool(scores.is_causal),
        # As "sdpa" has it, which says True for a module that says nothing.
        bool(getattr(module, "is_causal", True)),
        scores.window,
        attends_to_itself(type(module)),
    )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scores: _Scores,
    position_ids: Tensor | None,
    offsets_q: Tensor | None,
    offsets_k: Tensor | None,
) -> Tensor:
    """Compute a call of :func:`sebp_attention`: B x L x H x D."""
    lengths = lengths_of(attention_mask)
    if lengths is not None:
        return _of_packed(module, query, key, value, lengths, scores)
    query, key, value = _cast(query, key, value)
    mask = None
    if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.shape[0] == 1:
        attention_mask = attention_mask.expand(key.shape[0], -1, -1, -1)  # it is for all rows
    if attention_mask is not None and not is_traced():
        mask = decode(attention_mask) or decode_row(attention_mask, query.shape[2])
    if (attention_mask is not None and mask is None) or is_traced():
        if (offsets_q, offsets_k) != (None, None):
            raise ValueError("cu_seq_lens_q and a mask of four dimensions: give one of them")
        return _by_sdpa(module, query, key, value, attention_mask, scores)
    if mask is not None and mask.has_room:  # what lies behind the mask is a static cache's room
        tokens = mask.segments.shape[1]
        key, value = key[:, :, :tokens], value[:, :, :tokens]
    told = _told(module, query, key, scores, position_ids, offsets_q, offsets_k)
    texts, pattern = read_texts(mask, told)
    bias = scores.bias
    if bias is not None:
        bias = bias[..., : key.shape[2]]
        if offsets_q is not None and query.shape[0] > 1:
            raise ValueError("position_bias with cu_seq_lens_q needs a batch of one row")
    return attend(
        query, key, value, texts, pattern, bias, scores.scaling, scores.softcap, scores.dropout
    )


_without_a_graph = torch.compiler.disable(_attention)


def _of_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    scores: _Scores,
) -> Tensor:
    """Compute attention where ``padding_free`` has removed padding."""
    check_packed(query, key, lengths)
    check_bias(module, scores.bias)
    is_causal = scores.is_causal
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    return attend_packed(
        query, key, value, lengths, is_causal, scores.window, scores.bias, scores.dropout,
        scores.scaling, scores.softcap,
    )  # fmt: skip


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
    scores: _Scores,
) -> Tensor:
    """Let PyTorch compute what has a mask of its own, or is traced."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mask is not None and (mask.dim() != 4 or not _is_plain(mask)):
        raise ValueError(
            f"attention_mask is {mask.dtype} {tuple(mask.shape)}, which is neither sebp's nor one"
            " of four dimensions: give the model a mask of two, or use 'sdpa'"
        )
    if scores.softcap is not None:
        raise ValueError(
            "softcap goes with a mask of two dimensions or none; with this one use 'eager'"
        )
    if not is_traced():
        warnings.warn(
            f"{type(module).__name__}: a mask of four dimensions, so PyTorch's attention computes"
            " it; sebp's takes a mask of two dimensions, cu_seq_lens_q, or position_ids",
            stacklevel=4,
        )
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        mask,
        dropout=scores.dropout,
        scaling=scores.scaling,
        is_causal=scores.is_causal,
        position_bias=scores.bias,
    )[0]


def _is_plain(mask: Tensor) -> bool:
    """Return whether a mask is PyTorch's, and no sum of one and sebp's codes."""
    if mask.dtype == torch.bool:
        return True
    return mask.is_floating_point() and not bool((mask >= 2.0**60).any())
