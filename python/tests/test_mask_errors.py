# SPDX-License-Identifier: Apache-2.0
"""Fixed masks in PyTorch: bad input, and gradients and sums that are not finite."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from mask_nets import (  # noqa: E402
    adamw,
    bits,
    make_net,
    same,
)
from torch import nn  # noqa: E402

import sebp  # noqa: E402


def is_as_before(net, before, optimizer=None, state=None) -> None:
    assert all(torch.equal(bits(p), bits(q)) for p, q in zip(net.parameters(), before, strict=True))
    if optimizer is not None:
        assert same(optimizer.state_dict()["sebp"], state)


@pytest.mark.parametrize("mask", ["random", "gradient"])
@pytest.mark.parametrize("what", ["dy", "x", "twice"])
def test_not_finite(mask, what):
    """A NaN is refused wherever it is: here in a row of a gradient whose mask is elsewhere."""
    net = nn.Sequential(nn.Linear(12, 20))
    kept = {"0": [1, 2, 3]} if mask == "random" else "gradient"
    optimizer = sebp.apply_sparse_mask_to_model(net, adamw(net), 3, kept, "*", gradient_steps=9)
    x, dy = torch.ones(9, 12), torch.zeros(9, 20)
    dy[:, 0] = 1
    (net(x) * dy).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = [p.detach().clone() for p in net.parameters()]
    state = copy.deepcopy(optimizer.state_dict()["sebp"])
    if what == "twice":  # the backward that goes wrong is not the last
        (net(x) * torch.full((9, 20), float("inf"))).sum().backward()
    elif what == "dy":
        dy[3, 7] = float("inf")
    else:
        x[3, 7] = float("nan")
    (net(x) * dy).sum().backward()
    with pytest.raises(sebp.SebpError, match="step 2: the gradient of 0 holds a NaN"):
        optimizer.step()
    is_as_before(net, before, optimizer, state)
    optimizer.zero_grad()
    # What belongs to no active row does not count.
    x, dy = torch.ones(9, 12), torch.ones(9, 20)
    x[5], dy[5] = float("nan"), 0
    y = net(x)
    y.backward(dy)
    net[0].bias.grad.zero_()
    optimizer.step()
    assert optimizer.steps == 2 and net[0].weight.isfinite().all()


def test_sums_that_overflow():
    """The sum of the gradients by which elements are chosen."""
    net = nn.Sequential(nn.Linear(12, 20, bias=False))
    optimizer = sebp.apply_sparse_mask_to_model(
        net, adamw(net), 3, "gradient", "*", gradient_steps=3
    )
    for step in range(2):
        dy = torch.zeros(9, 20)
        dy[0] = 3e38
        (net(torch.ones(9, 12)) * dy).sum().backward()
        if step == 0:
            optimizer.step()
    with pytest.raises(sebp.SebpError, match="step 2: the gradient of 0"):
        optimizer.step()
    for _ in range(2):
        (net(torch.ones(9, 12))).sum().backward()
        optimizer.step()
    assert optimizer.is_chosen


def test_decay_that_overflows():
    net = nn.Sequential(nn.Linear(12, 20))
    with torch.no_grad():
        net[0].weight.fill_(1e38)
    optimizer = sebp.apply_sparse_mask_to_model(net, adamw(net, weight_decay=1e3), 3, layers="*")
    before = [p.detach().clone() for p in net.parameters()]
    y = net(torch.ones(9, 12))
    y.backward(torch.ones_like(y))
    with pytest.raises(sebp.SebpError, match="step 1"):
        optimizer.step()
    is_as_before(net, before)


OF_ZERO = [3, 5, 8]


@pytest.mark.parametrize(
    ("k", "mask", "kind", "message"),
    [
        (0, "random", ValueError, "k is 0, but .* has 1 to 240 elements"),
        (-1, "gradient", ValueError, "k is -1"),
        (241, "magnitude", ValueError, "k is 241, but"),
        (0.01, "random", TypeError, "k is 0.01, not an integer"),
        (None, "random", TypeError, "k is None"),
        (5, "snip", ValueError, "mask is 'snip', not one of random, gradient, magnitude"),
        (5, None, ValueError, "mask is None"),
        (3, {"0": OF_ZERO}, ValueError, "there is no mask for 2"),
        (3, {"0": OF_ZERO, "2": OF_ZERO, "3": OF_ZERO}, ValueError, "mask for '3', which is none"),
        (3, {"0": OF_ZERO, "2": [5, 3, 8]}, sebp.SebpError, "the mask of 2: .*indices"),
        (3, {"0": OF_ZERO, "2": [3, 3, 8]}, sebp.SebpError, "the mask of 2: .*indices"),
        (3, {"0": OF_ZERO, "2": [3, 8, 240]}, sebp.SebpError, "the mask of 2: .*indices"),
        (3, {"0": OF_ZERO, "2": [-1, 3, 8]}, sebp.SebpError, "the mask of 2: .*indices"),
        (3, {"0": OF_ZERO, "2": [3, 8]}, ValueError, "the mask of 2 has 2 elements, but k is 3"),
        (None, {"0": OF_ZERO, "2": np.empty(0, int)}, ValueError, "the mask of 2 is empty"),
        (None, {"0": OF_ZERO, "2": torch.zeros(12, 20).bool()}, ValueError, "of 2 is empty"),
        (None, {"0": OF_ZERO, "2": torch.ones(20, 12).bool()}, ValueError, "of 2 is of .20, 12"),
        (None, {"0": OF_ZERO, "2": [True] * 240}, ValueError, "of 2 is of .240,"),
        (None, {"0": OF_ZERO, "2": torch.ones(12, 20)}, TypeError, "of 2 is of float32, not of bo"),
        (None, {"0": OF_ZERO, "2": torch.ones(9).bfloat16()}, TypeError, "of 2 is of torch.bfloat"),
        (None, {"0": OF_ZERO, "2": torch.ones(12, 20).int()}, ValueError, "not a list"),
        (
            None,
            {"0": OF_ZERO, "2": np.array([2**64 - 1], np.uint64)},
            ValueError,
            "index of 184467",
        ),
        (None, {"0": OF_ZERO, "2": torch.ones(9, device="meta").int()}, ValueError, "is on meta"),
    ],
)
def test_bad_masks(k, mask, kind, message):
    net = make_net()
    before = copy.deepcopy(net)
    attributes = {name: set(vars(m)) for name, m in net.named_modules()}
    with pytest.raises(kind, match=message):
        sebp.apply_sparse_mask_to_model(net, adamw(net), k, mask, "*")
    is_as_before(net, list(before.parameters()))
    assert {name: set(vars(m)) for name, m in net.named_modules()} == attributes
    assert all(p.requires_grad for p in net.parameters())
    assert not net[0]._forward_hooks


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (dict(seed=-1), ValueError, "seed is -1"),
        (dict(seed=1.5), TypeError, "seed is 1.5"),
        (dict(gradient_steps=0), ValueError, "gradient_steps is 0"),
        (dict(layers="none"), ValueError, "no linear layer to train"),
    ],
)
def test_bad_arguments(options, kind, message):
    net = make_net()
    with pytest.raises(kind, match=message):
        sebp.apply_sparse_mask_to_model(net, adamw(net), 5, **(dict(layers="*") | options))
    assert all(p.requires_grad for p in net.parameters())


def test_bad_models(monkeypatch):
    net = make_net()
    with torch.no_grad():
        net[2].weight[3, 4] = float("nan")
    with pytest.raises(sebp.SebpError, match="2: its weight: .*NaN"):
        sebp.apply_sparse_mask_to_model(net, adamw(net), 5, "magnitude", "*")
    away = make_net().to("meta")
    with pytest.raises(ValueError, match="0: its weight is on meta"):
        sebp.apply_sparse_mask_to_model(away, adamw(away), 5, layers="*")
    distributed = torch.distributed
    if distributed.is_available():
        monkeypatch.setattr(distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
        with pytest.raises(RuntimeError, match="not summed over processes"):
            sebp.apply_sparse_mask_to_model(make_net(), adamw(net), 5, layers="*")


def test_dtype_that_changes():
    net = make_net()
    optimizer = sebp.apply_sparse_mask_to_model(net, adamw(net), 5, layers="*")
    net.to(torch.bfloat16)
    with pytest.raises(ValueError, match="0: its weight is of torch.bfloat16 .* but was of"):
        optimizer.adapter()
