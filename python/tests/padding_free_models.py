# SPDX-License-Identifier: Apache-2.0
"""A model and its twin without padding, and how they are compared."""

import copy

import pytest
import torch
from models import make_model
from torch import nn

import sebp

ENCODERS = ["bert", "roberta", "distilbert"]
DECODERS = ["llama", "qwen2", "mistral"]
SIDES = pytest.mark.parametrize("left", [False, True], ids=["right", "left"])


def pair(name):
    """Make a model and its twin without padding."""
    plain = make_model(name).train()
    ours = copy.deepcopy(plain)
    report = sebp.padding_free(ours)
    assert len(report.changed) == 1
    assert not report.skipped
    return plain, ours


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def watch_rows(model):
    """Collect how many rows the first linear layer of the first block is given."""
    layer = next(m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "0" in n)
    forward = layer.forward
    if not hasattr(forward, "rows"):  # another watcher would be another forward, and proved anew

        def watched(x):
            watched.rows.append(x[..., 0].numel())
            return forward(x)

        layer.forward = watched  # a hook would end it
    layer.forward.rows = []
    return layer.forward.rows


def same(plain, ours, batch, packed=True):
    """Check loss, logits and all gradients, and whether padding was computed."""
    rows = watch_rows(ours)
    want, got = plain(**batch), ours(**batch)
    torch.testing.assert_close(got.loss, want.loss)
    if got.logits.dim() == 2:
        torch.testing.assert_close(got.logits, want.logits)
    else:
        inside = batch["attention_mask"].bool()
        torch.testing.assert_close(got.logits[inside], want.logits[inside])
    want, got = gradients(plain, want.loss), gradients(ours, got.loss)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert sum(g is not None and bool(g.any()) for g in got.values()) > 20
    tokens, every = int(batch["attention_mask"].sum()), batch["input_ids"].numel()
    assert rows[0] == (tokens if packed else every)
    # The model as it is, to compare with, and without padding, with other texts the second time.
    assert rows[1:] in ([], [every], [every, tokens, tokens])
