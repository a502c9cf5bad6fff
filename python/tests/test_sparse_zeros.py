# SPDX-License-Identifier: Apache-2.0
"""Gradients of zeros tell nothing, so nothing is chosen by them."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from sparse_nets import adamw, backward, make_bases, make_net  # noqa: E402

import sebp  # noqa: E402

K = 20
METHODS = {
    "mask": lambda net: sebp.apply_sparse_mask_to_model(
        net, adamw(net, weight_decay=0.0), K, "gradient", "*"
    ),
    "meprop": lambda net: sebp.apply_meprop_to_model(
        net, adamw(net, weight_decay=0.0), K, "*", fix_support_after=1
    ),
    "sparsegrad": lambda net: sebp.apply_sparsegrad_to_model(
        net, adamw(net, weight_decay=0.0), K, layers="*", bases=make_bases(), fix_support_after=1
    ),
    "galore": lambda net: sebp.apply_galore_to_model(
        net, adamw(net, weight_decay=0.0), 3, "*", refresh_every=3
    ),
}


def closed_net():
    """Make one whose last layer is 0, as that of a new adapter: behind it gradients are 0."""
    net = make_net()
    torch.nn.init.zeros_(net[2].weight)
    return net


@pytest.mark.parametrize("name", ["mask", "meprop", "sparsegrad"])
def test_elements_are_chosen_by_what_is_not_zero(name):
    net = closed_net()
    optimizer = METHODS[name](net)
    layer = optimizer.layers["0"]
    before = net[0].weight.detach().clone()
    backward(net, 0)
    optimizer.step()
    assert not layer.moments.is_fixed
    assert torch.equal(net[0].weight, before)
    with torch.no_grad():
        net[2].weight.normal_()
    backward(net, 1)
    optimizer.step()
    assert layer.moments.is_fixed
    assert layer.moments.count == K
    assert not np.array_equal(layer.moments.support, np.arange(K))
    backward(net, 2)
    optimizer.step()
    assert int((net[0].weight != before).sum()) >= K


@pytest.mark.parametrize("first", [0, 3])
def test_vectors_are_chosen_by_what_is_not_zero(first):
    """In the first step, and where vectors are chosen anew."""
    net = make_net()
    optimizer = METHODS["galore"](net)
    moments = optimizer.layers["0"].moments
    for step in range(first):
        backward(net, step)
        optimizer.step()
    old = moments.vectors
    weights = net[2].weight.detach().clone(), net[0].weight.detach().clone()
    with torch.no_grad():
        net[2].weight.zero_()
    backward(net, 4)
    optimizer.step()
    assert moments.steps == first
    assert moments.vectors is old
    assert torch.equal(net[0].weight, weights[1])
    with torch.no_grad():
        net[2].weight.copy_(weights[0])
    backward(net, 5)
    optimizer.step()
    assert moments.steps == first + 1
    assert moments.vectors is not old
    assert not torch.equal(net[0].weight, weights[1])


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_no_text(name):
    net = make_net()
    optimizer = METHODS[name](net)
    (net(torch.randn(0, 12)).sum() * 1).backward()
    optimizer.step()
    for seed in range(3):
        backward(net, seed)
        optimizer.step()
    if name != "galore":
        assert all(layer.moments.is_fixed for layer in optimizer.layers.values())
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", METHODS)
def test_another_default_dtype(name, dtype):
    """What the library works in is float32 all the same."""
    weights = []
    for default in (torch.float32, dtype):
        torch.manual_seed(1)
        np.random.seed(1)
        net = make_net()
        x = torch.randn(3, 9, 12)
        torch.set_default_dtype(default)
        try:
            optimizer = METHODS[name](net)
            for batch in x:
                net(batch).square().sum().backward()
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        weights.append(net[0].weight)
    assert torch.equal(*weights)
