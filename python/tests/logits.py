# SPDX-License-Identifier: Apache-2.0
"""A head whose logits are deferred, and losses of them."""

import torch
from torch import nn
from torch.nn import functional

from sebp.torch.blocks.logits import head_forward
from sebp.torch.common.forward import put_in


def leaves(*shapes, dtype=torch.float32):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def close(ours, right, tolerance):
    largest = float(right.detach().abs().max()) if right.numel() else 0.0
    assert ours.shape == right.shape
    assert float((ours.detach() - right.detach()).abs().amax()) <= tolerance * max(largest, 1e-30)


def head_and_logits(bias=True):
    """Make a head of its own, its deferred logits and those that it would have made."""
    torch.manual_seed(1)
    head, hidden = nn.Linear(8, 11, bias=bias).train(), torch.randn(2, 5, 8, requires_grad=True)
    right = head(hidden)
    put_in(head, head_forward)
    return head, hidden, head(hidden), right


LABELS = torch.tensor([[1, 2, -100, 4, 5], [-100, 7, 8, 9, 10]])
LOSSES = {
    "shifted": lambda y: functional.cross_entropy(
        y[..., :-1, :].contiguous().view(-1, 11), LABELS[:, 1:].reshape(-1)
    ),
    "shifted, without the last index": lambda y: functional.cross_entropy(
        y[:, :-1].reshape(-1, y.size(-1)), LABELS[:, 1:].reshape(-1)
    ),
    "by a module": lambda y: nn.CrossEntropyLoss(label_smoothing=0.1)(
        y.float().view(-1, y.shape[-1]), LABELS.view(-1)
    ),
    "summed": lambda y: functional.cross_entropy(
        y.flatten(0, 1), LABELS.flatten(), reduction="sum"
    ),
    "by a mask": lambda y: functional.cross_entropy(y[LABELS != -100], LABELS[LABELS != -100]),
    "to the device": lambda y: functional.cross_entropy(
        y.to("cpu").to(torch.float32).reshape((-1, 11)), LABELS.view(-1)
    ),
}
