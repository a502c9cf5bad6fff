# SPDX-License-Identifier: Apache-2.0
"""Parts of base models that have to know that padding is left out.

- Padding is removed where a base model is called, or at the entry of its encoder, if that is handed
  embeddings (CLIP's): such a model looks for a token of each text once more behind the encoder.
- It is restored where the base model returns, or at the exit of that encoder; where a pooler
  follows, before that.
- A model that cannot be told positions finds them itself: in a module that is called with padding
  then (BART's), or by how far two tokens are apart (T5's, MPNet's).
"""

import sys

import torch
from torch import Tensor, nn

from ..attention import mpnet, relative_bias
from ..common.forward import Forward, put_in, take_out
from ..common.packing import Packing, Unfit, current_packing
from .pad import pad, pad_first
from .proof import current_call
from .signatures import has_argument, signature_of

# --------------------------------------------------------------------------------------------------
# Where padding is removed, and where it is restored


def has_inner_entry(module: nn.Module) -> bool:
    """Return whether padding is removed within a base model, at the entry of its encoder."""
    encoder = getattr(module, "encoder", None)
    if not isinstance(encoder, nn.Module):
        return False
    first = list(signature_of(type(encoder).forward).parameters)[1:2]
    return first == ["inputs_embeds"] and has_argument(encoder, "attention_mask")


def _exit_of(module: nn.Module) -> nn.Module:
    """Find the part of a base model whose output is padded again: a pooler wants it padded."""
    encoder = getattr(module, "encoder", None)
    return encoder if _has_pooler(module) and isinstance(encoder, nn.Module) else module


def has_inner_exit(module: nn.Module) -> bool:
    """Return whether padding is restored within a base model alone."""
    return not has_inner_entry(module) and _exit_of(module) is not module


def _has_pooler(module: nn.Module) -> bool:
    return isinstance(getattr(module, "pooler", None), nn.Module)


def _pooler_forward(forward: Forward, x: Tensor, *args: object, **kwargs: object) -> object:
    """Replace a pooler's forward: call it on the padded last hidden state."""
    packing, call = current_packing(), current_call()
    if packing is not None and call is not None and packing.counts(x):
        x = pad(x, packing, call)
    return forward.original(x, *args, **kwargs)


def _exit_forward(forward: Forward, *args: object, **kwargs: object) -> object:
    """Replace the forward of a base model's encoder: restore padding in what it returns."""
    output = forward.original(*args, **kwargs)
    packing, call = current_packing(), current_call()
    if packing is None or call is None:
        return output
    return pad_first(output, packing, call)


def _encoder_forward(forward: Forward, *args: object, **kwargs: object) -> object:
    """Replace the forward of an encoder that gets embeddings: run it without padding."""
    packing, call = current_packing(), current_call()
    if packing is None or call is None:
        return forward.original(*args, **kwargs)
    given = signature_of(type(forward.module).forward).bind(forward.module, *args, **kwargs)
    named = dict(list(given.arguments.items())[1:])
    named |= named.pop("kwargs", {})
    x = named.pop("inputs_embeds")
    named.pop("attention_mask", None)
    if x.dim() != 3 or x.shape[:2] != packing.mask.shape:
        raise Unfit("its encoder is handed something else than an embedding for each token")
    for name, value in named.items():
        if isinstance(value, Tensor):
            raise Unfit(f"its encoder has the argument {name}")
    x = packing.pack(x)
    output = forward.original(x, attention_mask=packing.attention_mask, **named)
    return pad_first(output, packing, call)


# --------------------------------------------------------------------------------------------------
# Positions


def default_positions(module: nn.Module, given: dict[str, object], shape: torch.Size) -> Tensor:
    """Give each token the position that the model would give it, B x L or 1 x L.

    Parameters
    ----------
    module : nn.Module
        A base model that can be told positions.
    given : dict of str to object
        What it is called with.
    shape : torch.Size
        B x L.
    """
    embeddings = getattr(module, "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_inputs_embeds"):  # RoBERTa and its like
        if given.get("input_ids") is None:
            create = embeddings.create_position_ids_from_inputs_embeds
            both = "padding_idx" in signature_of(create).parameters
            return create(given["inputs_embeds"], *([embeddings.padding_idx] * both))
        create = getattr(embeddings, "create_position_ids_from_input_ids", None)
        create = create or sys.modules[type(module).__module__].create_position_ids_from_input_ids
        return create(given["input_ids"], embeddings.padding_idx)
    mask = given["attention_mask"]
    if module.config.model_type == "opt":  # which counts real tokens alone
        real = (mask != 0).long()
        return real.cumsum(1) * real - 1
    return torch.arange(shape[1], device=mask.device)[None]


def default_types(module: nn.Module, shape: torch.Size) -> Tensor | None:
    """Give each token the type that the model would give it, 1 x L; None where it needs none.

    A model takes them from a buffer, which may be too short for all texts end to end.
    """
    types = getattr(getattr(module, "embeddings", None), "token_type_ids", None)
    return types[:, : shape[1]] if isinstance(types, Tensor) and types.dim() == 2 else None


def can_be_told(module: nn.Module) -> bool:
    """Return whether a base model has an argument for positions."""
    return has_argument(module, "position_ids")


def _positions_of(module: nn.Module) -> nn.Module | None:
    """Return the module in which a base model that cannot be told positions finds them, or None."""
    if can_be_told(module) or not has_argument(module, "input_ids"):
        return None
    part = getattr(module, "embed_positions", None)
    return part if isinstance(part, nn.Module) else None


def finds_positions(module: nn.Module) -> bool:
    """Return whether positions are right in a base model that leaves padding out."""
    return (
        can_be_told(module)
        or _positions_of(module) is not None
        or relative_bias.goes_by_distance(module)
    )


def counts_distances(module: nn.Module) -> bool:
    """Return whether it matters how far two tokens are apart, padding between them included."""
    return mpnet.is_mpnet(module) or relative_bias.is_prepared(module)


def _positions_forward(forward: Forward, *args: object, **kwargs: object) -> object:
    """Replace the forward of a module of positions: call it as with padding.

    It is handed tokens, or something of which it takes the shape alone.
    """
    packing = current_packing()
    if packing is None:
        return forward.original(*args, **kwargs)
    values = [*args, *kwargs.values()]
    texts = packing.mask.shape[0] if any(_is_of_tokens(one, packing) for one in values) else 1
    y = forward.original(
        *(_padded(one, packing, texts) for one in args),
        **{name: _padded(one, packing, texts) for name, one in kwargs.items()},
    )
    length = packing.mask.shape[1]
    if y.dim() == 2:
        y = y[None]
    if y.dim() != 3 or y.shape[0] not in (1, texts) or y.shape[1] != length:
        raise Unfit("its positions are not one for each token")
    return packing.pack(y)


def _is_of_tokens(value: object, packing: Packing) -> bool:
    """Return whether a value is a whole number for each token, 1 x T."""
    shape = (1, packing.rows.numel())
    return isinstance(value, Tensor) and value.shape == shape and not value.is_floating_point()


def _padded(value: object, packing: Packing, texts: int) -> object:
    """Return what a module of positions would be handed with padding."""
    shape = (1, packing.rows.numel())
    length = packing.mask.shape[1]
    if _is_of_tokens(value, packing):
        tokens = packing.tokens
        if tokens is None or not torch.equal(packing.pack(tokens), value):
            raise Unfit("its positions come from something else than its tokens")
        return tokens
    if isinstance(value, Tensor) and value.shape[:2] == shape:
        return value.new_zeros(()).expand(texts, length, *value.shape[2:])
    if isinstance(value, tuple) and value[:2] == shape:  # torch.Size is one
        return torch.Size((texts, length, *value[2:]))
    if isinstance(value, Tensor):
        raise Unfit("its positions come from something else than its tokens")
    return value


# --------------------------------------------------------------------------------------------------
# All of them


def _replacements(module: nn.Module) -> list[tuple[nn.Module, object]]:
    """List the parts of a base model whose forward is replaced, and by what."""
    found = []
    if has_inner_entry(module):
        found.append((module.encoder, _encoder_forward))
    elif _exit_of(module) is not module:
        found.append((_exit_of(module), _exit_forward))
    elif _has_pooler(module):
        found.append((module.pooler, _pooler_forward))
    positions = _positions_of(module)
    if positions is not None:
        found.append((positions, _positions_forward))
    return found


def put_in_parts(module: nn.Module) -> None:
    """Change the parts of a base model."""
    if mpnet.is_mpnet(module):
        mpnet.prepare(module)
    if relative_bias.goes_by_distance(module):
        relative_bias.prepare(module)
    for part, forward in _replacements(module):
        put_in(part, forward)


def take_out_parts(module: nn.Module) -> None:
    """Undo :func:`put_in_parts`."""
    if mpnet.is_mpnet(module):
        mpnet.restore(module)
    relative_bias.restore(module)
    for part, forward in _replacements(module):
        take_out(part, forward)
