# SPDX-License-Identifier: Apache-2.0
"""Tiny models of transformers with "sebp" attention, and texts laid end to end or padded."""

import copy

import torch
from families import VOCABULARY, make_model
from torch import Tensor, nn

import sebp

LENGTHS = (5, 1, 7, 3)
START = {"roberta": 2}  # the first position


def make(name: str, head: str = "base") -> nn.Module:
    """Make a tiny model with "sebp"."""
    model = make_model(name, head).eval()
    assert sebp.register_attention() == "sebp"
    model.set_attn_implementation("sebp")
    assert model.config._attn_implementation == "sebp"
    return model


def in_double(model: nn.Module) -> nn.Module:
    """Copy a model, with eager attention and in double precision."""
    copied = copy.deepcopy(model).double()
    copied.set_attn_implementation("eager")
    return copied


def draw_texts(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [torch.randint(6, VOCABULARY, (n,)) for n in lengths]


def positions(name: str, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None] + START.get(name, 0)


def offsets(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def flat(name: str, texts: list[Tensor]) -> dict[str, Tensor | int]:
    """Lay texts end to end, as flash-attention's users do."""
    lengths = tuple(len(text) for text in texts)
    ends, longest = offsets(lengths), max(lengths)
    return {
        "input_ids": torch.cat(texts)[None],
        "position_ids": positions(name, lengths),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def padded(name: str, texts: list[Tensor], left: bool = False) -> dict[str, Tensor]:
    """Pad texts to the longest, with positions that do not count padding."""
    longest = max(len(text) for text in texts)
    ids, mask, at = (torch.zeros(len(texts), longest, dtype=torch.long) for _ in range(3))
    for i, text in enumerate(texts):
        where = slice(longest - len(text), None) if left else slice(len(text))
        ids[i, where], mask[i, where] = text, 1
        at[i, where] = torch.arange(len(text))
    return {"input_ids": ids, "attention_mask": mask, "position_ids": at + START.get(name, 0)}


def hidden(model: nn.Module, batch: dict, **more: object) -> Tensor:
    return model(**batch, **more).last_hidden_state
