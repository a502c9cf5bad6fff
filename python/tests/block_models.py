# SPDX-License-Identifier: Apache-2.0
"""Blocks as models of transformers write them, and a count of what the library computes."""

import functools

import torch
from torch import nn

from sebp.torch.blocks import forms


class RMSNorm(nn.Module):
    """As many models write it."""

    def __init__(self, size, epsilon=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = epsilon

    def forward(self, hidden_states):
        """Compute it."""
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class Output(nn.Module):
    """As BERT and its like have it."""

    def __init__(self, size, dropout=0.0):
        super().__init__()
        self.dense = nn.Linear(size, size)
        self.LayerNorm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states, input_tensor):
        hidden_states = self.dense(hidden_states)
        hidden_states = self.dropout(hidden_states)
        hidden_states = self.LayerNorm(hidden_states + input_tensor)
        return hidden_states  # noqa: RET504, as the models have it


class Gated(nn.Module):
    """As Llama and its like have it."""

    def __init__(self, size):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(size, 2 * size), nn.Linear(size, 2 * size)
        self.down_proj, self.act_fn = nn.Linear(2 * size, size), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Counting:
    """Counts the calls of the functions by which the library computes blocks."""

    def __init__(self, monkeypatch):
        self.calls = []
        for name in ("normalize", "activate", "drop"):
            monkeypatch.setattr(forms, name, self._counted(name, getattr(forms, name)))

    def _counted(self, name, function):
        @functools.wraps(function)
        def counted(*args, **kwargs):
            self.calls.append(name)
            return function(*args, **kwargs)

        return counted

    def take(self):
        calls, self.calls = self.calls, []
        return calls
