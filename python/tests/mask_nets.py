# SPDX-License-Identifier: Apache-2.0
"""What the tests of fixed masks share: small nets, masks, batches, and comparisons by bits."""

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

# Of Adam's steps: so large that errors of gradients by rounding, of 1e-5 here, count at most
# LR / EPS times.
LR, EPS = 0.01, 0.1
NEAR = dict(rtol=0, atol=10 * 1e-5 * LR / EPS)


def make_net(dtype=torch.float32) -> nn.Sequential:
    """Two layers whose N + K is 32."""
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(inplace=True), nn.Linear(20, 12)).to(dtype)


def adamw(model, **options) -> torch.optim.Optimizer:
    settings = dict(lr=LR, eps=EPS, weight_decay=0.0) | options
    return torch.optim.AdamW(model.parameters(), **settings)


def draw_masks(net, k=32) -> dict[str, torch.Tensor]:
    masks = {}
    for name in ("0", "2"):
        weight = net.get_submodule(name).weight
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[torch.randperm(weight.numel())[:k]] = True
        masks[name] = mask.view(weight.shape)
    return masks


def loss_of(net, x, target, real):
    return (0.5 * real * (net(x) - target) ** 2).sum()


def draw_batch(outputs=12):
    return torch.randn(40, 12), torch.randn(40, outputs), (torch.rand(40, 1) < 0.5).float()


def same(one, other) -> bool:
    """Return whether two checkpoints are the same, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


def bits(tensor) -> torch.Tensor:
    return tensor.detach().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)
