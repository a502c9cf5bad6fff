# SPDX-License-Identifier: Apache-2.0
"""MPNet's attention, which does not use transformers' table of attention functions."""

import math

from torch import Tensor, nn

from ..common.forward import (
    Forward,
    OfModule,
    guard_replicas,
    put_in,
    stop_guarding,
    take_out,
)
from ..common.packing import current_packing, lengths_of
from .packed_texts import attend_packed


def is_mpnet(module: nn.Module) -> bool:
    """Return whether a module is an ``MPNetModel`` of transformers."""
    kind = type(module)
    return kind.__name__ == "MPNetModel" and kind.__module__.startswith("transformers.models.mpnet")


class _PositionBias(OfModule):
    """Replaces the encoder's method that computes one bias for all its layers."""

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder

    def __call__(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        packing = current_packing()
        if packing is not None:
            # It depends on distances alone: 1 x heads x L x L serves texts of up to L tokens.
            x = x.new_empty(1, packing.mask.shape[1], 0)
        return type(self.encoder).compute_position_bias(self.encoder, x, *args, **kwargs)


def _attention_forward(
    forward: Forward,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: object,
) -> tuple:
    module, packing = forward.module, current_packing()
    if packing is None:
        return forward.original(
            hidden_states, attention_mask, position_bias, output_attentions, **kwargs
        )
    size = module.attention_head_size

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, size)).transpose(1, 2)

    y = attend_packed(
        heads(module.q(hidden_states)),
        heads(module.k(hidden_states)),
        heads(module.v(hidden_states)),
        lengths_of(packing.attention_mask),
        False,
        bias=position_bias,
        dropout=module.dropout.p if module.training else 0.0,
        scaling=1 / math.sqrt(size),
    )
    return (module.o(y.flatten(2)),)


def prepare(model: nn.Module) -> None:
    """Give an ``MPNetModel`` an attention that works on packed texts."""
    model.encoder.compute_position_bias = _PositionBias(model.encoder)
    guard_replicas(model.encoder)
    for layer in model.encoder.layer:
        put_in(layer.attention.attn, _attention_forward)


def restore(model: nn.Module) -> None:
    """Undo :func:`prepare`."""
    vars(model.encoder).pop("compute_position_bias", None)
    stop_guarding(model.encoder)
    for layer in model.encoder.layer:
        take_out(layer.attention.attn, _attention_forward)
