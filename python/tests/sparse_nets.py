# SPDX-License-Identifier: Apache-2.0
"""What the tests of SparseGrad, MeProp and GaLore share: small nets, their bases, and steps."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import sebp  # noqa: E402
from sebp.sparse import Basis  # noqa: E402

try:
    from models import make_batch, make_model
except ImportError:
    make_batch = make_model = None


def orthonormal(size: int) -> np.ndarray:
    return np.linalg.qr(np.random.randn(size, size))[0].astype(np.float32)


def make_net(dtype=torch.float32) -> nn.Sequential:
    """Two layers of different shapes; the activation works in place."""
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(inplace=True), nn.Linear(20, 8)).to(dtype)


SHAPES = {"* 20x12": (20, 12), "* 8x20": (8, 20)}


def make_bases(rank=None) -> dict[str, Basis]:
    return {
        kind: Basis.from_vectors(*(orthonormal(size)[:rank] for size in shape))
        for kind, shape in SHAPES.items()
    }


def make_batches(name: str) -> list[dict]:
    return [make_batch(name, seed) for seed in range(3)]


def train(model, optimizer, batches, steps, first=0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sgd(model) -> torch.optim.Optimizer:
    """Make one that is not of Adam's kind, but has the numbers of an AdamW step in its group."""
    group = {"params": model.parameters(), "betas": (0.9, 0.999), "eps": 1e-8}
    return torch.optim.SGD([group], lr=0.1)


def adamw(model, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **{"lr": 3e-3, **options})


OPTIONS = {
    "anew": {},
    "accumulate": {"accumulate": True},
    "fixed": {"fix_support_after": 1},
}


def meprop_net(**options):
    """Make a net that is after its first step: a support that is fixed after it is."""
    torch.manual_seed(7)
    net = make_net()
    optimizer = sebp.apply_meprop_to_model(net, adamw(net), 30, "*", **options)
    backward(net, 0)
    optimizer.step()
    optimizer.zero_grad()
    return net, optimizer


def backward(net, seed) -> None:
    numbers = torch.Generator().manual_seed(seed)
    net(torch.randn(9, 12, generator=numbers)).square().sum().backward()
