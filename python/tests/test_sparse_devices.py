# SPDX-License-Identifier: Apache-2.0
"""Sparse layers are trained on the CPU, wherever PyTorch makes new tensors and a model is moved.

"meta" stands for a GPU: its tensors have no memory of the CPU's either.
"""

import pytest

torch = pytest.importorskip("torch")
from sparse_nets import adamw, make_bases, make_net  # noqa: E402

import sebp  # noqa: E402


def sparsegrad(net, optimizer):
    return sebp.apply_sparsegrad_to_model(net, optimizer, 5, layers="*", bases=make_bases())


def sparsegrad_fixed(net, optimizer):
    options = dict(bases=make_bases(), fix_support_after=1, measure_energy_every=2)
    return sebp.apply_sparsegrad_to_model(net, optimizer, 5, layers="*", **options)


def meprop(net, optimizer):
    options = dict(fix_support_after=3, accumulate=True)
    return sebp.apply_meprop_to_model(net, optimizer, 5, "*", **options)


def galore(net, optimizer):
    return sebp.apply_galore_to_model(net, optimizer, 3, "*", refresh_every=2)


def mask(net, optimizer):
    options = dict(mask="gradient", gradient_steps=2)
    return sebp.apply_sparse_mask_to_model(net, optimizer, 5, layers="*", **options)


METHODS = [sparsegrad, sparsegrad_fixed, meprop, galore, mask]


def trained(apply, device, dtype):
    """Train on the CPU, while new tensors are made on a device; return the weights."""
    torch.manual_seed(11)
    net = make_net(dtype)
    batches = [torch.randn(9, 12, dtype=dtype) for _ in range(4)]
    with torch.device(device):
        optimizer = apply(net, adamw(net, foreach=False))
        for x in batches:
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    return [parameter.detach() for parameter in net.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apply", METHODS)
def test_tensors_are_made_elsewhere(apply, dtype, monkeypatch):
    bases = make_bases()
    monkeypatch.setitem(globals(), "make_bases", lambda: bases)
    here, elsewhere = (trained(apply, device, dtype) for device in ("cpu", "meta"))
    for one, other in zip(here, elsewhere, strict=True):
        assert other.is_cpu
        assert torch.equal(one, other)


@pytest.mark.parametrize("apply", METHODS)
def test_a_model_that_was_moved(apply):
    """A model takes its hooks along to a GPU, where the library would read the addresses."""
    net = make_net()
    layer = apply(net, adamw(net)).layers["2"]
    with pytest.raises(TypeError, match="2: its gradient is on meta, but .* on the CPU"):
        layer.collect(torch.ones(9, 8, device="meta"), torch.ones(9, 20, device="meta"))
    assert not layer.has_gradient
