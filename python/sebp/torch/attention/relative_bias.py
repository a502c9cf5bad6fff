# SPDX-License-Identifier: Apache-2.0
"""Attention with a bias that goes by how far two tokens are apart, as T5's.

Such a layer computes the bias of all pairs of tokens that it attends to. On packed texts that would
be T x T, of places in the row. One for the longest text serves all of them, from its corner on.
"""

import copy
import inspect
import threading

import torch
from torch import Tensor, nn

from ..common.forward import Forward, OfModule, has, put_in, take_out
from ..common.packing import lengths_of

_TABLE = "relative_attention_bias"
_LENGTHS = ["query_length", "key_length"]


class _OfThread(threading.local):
    longest: int | None = None  # of the packed texts that a layer is attending within


_of_thread = _OfThread()


def _layers_of(model: nn.Module) -> list[nn.Module]:
    """List the attention layers of a model that can add a bias for pairs of tokens."""
    return [one for one in model.modules() if hasattr(one, "compute_bias")]


def goes_by_distance(model: nn.Module) -> bool:
    """Return whether positions matter to a model only in biases that go by distance.

    That is so if each of its attention layers has a table of biases, or takes that of another one,
    and what it reads from the table for two tokens depends on how far they are apart alone. The
    layer's own method is asked, with a table that has another number at each place.
    """
    layers = _layers_of(model)
    tables = [one for one in layers if isinstance(getattr(one, _TABLE, None), nn.Embedding)]
    return bool(tables) and all(map(_has_form, layers)) and all(map(_reads_distances, tables))


def _has_form(layer: nn.Module) -> bool:
    """Return whether a layer's method takes the numbers of queries and keys."""
    return list(inspect.signature(type(layer).compute_bias).parameters)[1:3] == _LENGTHS


@torch.no_grad()
def _reads_distances(layer: nn.Module) -> bool:
    """Return whether a bias of n x n has equal numbers at equal distances, for all n alike."""
    count, heads = getattr(layer, _TABLE).weight.shape
    numbers = torch.arange(count * heads, dtype=torch.float32, device="cpu").view(count, heads)
    probe = copy.copy(layer)
    probe._modules = {**layer._modules, _TABLE: nn.Embedding.from_pretrained(numbers)}
    size = 2 * getattr(layer, "relative_attention_max_distance", 128)
    whole, part = (type(layer).compute_bias(probe, n, n) for n in (size, size // 2))
    return (
        torch.equal(whole[..., 1:, 1:], whole[..., :-1, :-1])
        and torch.equal(part, whole[..., : size // 2, : size // 2])
        and whole.shape == (1, heads, size, size)
    )


class _Bias(OfModule):
    """Replaces a layer's method that computes the bias.

    Attributes
    ----------
    layer : nn.Module
        The layer.
    users : int
        How many models that hold it have asked for it.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.users = 0

    def __call__(
        self, query_length: int, key_length: int, *args: object, **kwargs: object
    ) -> Tensor:
        if not torch.compiler.is_compiling() and _of_thread.longest is not None:
            query_length = key_length = _of_thread.longest
        compute = type(self.layer).compute_bias
        return compute(self.layer, query_length, key_length, *args, **kwargs)


def _attention_forward(forward: Forward, *args: object, **kwargs: object) -> object:
    """Replace an attention layer's forward: tell its method how long the texts are.

    They are read from the mask, as a layer that is computed again by checkpointing has no more than
    that.
    """
    if torch.compiler.is_compiling():
        return forward.original(*args, **kwargs)
    found = (lengths_of(one) for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
    lengths = next((one for one in found if one is not None), None)
    outer, _of_thread.longest = _of_thread.longest, lengths and max(lengths)
    try:
        return forward.original(*args, **kwargs)
    finally:
        _of_thread.longest = outer


def is_of_texts(module: nn.Module) -> bool:
    """Return whether the bias that an attention layer hands over is one for the longest text."""
    return has(module, _attention_forward)


def is_prepared(model: nn.Module) -> bool:
    """Return whether layers of a model compute such a bias."""
    return any(is_of_texts(one) for one in model.modules())


def prepare(model: nn.Module) -> None:
    """Let the layers of a model that :func:`goes_by_distance` compute biases for packed texts."""
    for layer in _layers_of(model):
        if not is_of_texts(layer):
            layer.compute_bias = _Bias(layer)
            put_in(layer, _attention_forward)
        layer.compute_bias.users += 1


def restore(model: nn.Module) -> None:
    """Undo :func:`prepare`; layers change when no model that holds them is left."""
    for layer in _layers_of(model):
        if not is_of_texts(layer):
            continue
        layer.compute_bias.users -= 1
        if layer.compute_bias.users == 0:
            del layer.compute_bias
            take_out(layer, _attention_forward)
