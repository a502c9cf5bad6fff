# SPDX-License-Identifier: Apache-2.0
"""Which share of the gradients' energy the leading vectors of both sides hold together."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from sparse_nets import adamw, backward, make_bases, make_net  # noqa: E402

import sebp  # noqa: E402

NAMES = {"* 20x12": "0", "* 8x20": "2"}


def share(kind, grads) -> float:
    """Compute it in double precision, by definition."""
    u_out, u_in = kind.basis.u_out.astype(float), kind.basis.u_in.astype(float)
    parts = [u_out @ grad.double().numpy() @ u_in.T for grad in grads]
    return sum((r**2).sum() for r in parts) / sum(float((g.double() ** 2).sum()) for g in grads)


def gradients(net, seed, weights) -> dict[str, torch.Tensor]:
    """Compute those of a twin, whose weights have a grad."""
    twin = copy.deepcopy(net).requires_grad_(True)
    backward(twin, seed)
    return {name: twin.get_submodule(name).weight.grad for name in weights}


@pytest.mark.parametrize("fix_after", [None, 1])
@pytest.mark.usefixtures("lapack")
def test_measured(fix_after):
    """On the last gradients of the basis phase, then in every third step, and in no other."""
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(
        net,
        adamw(net, lr=0.05),
        20,
        4,
        rank=5,
        layers="*",
        fix_support_after=fix_after,
        measure_energy_every=3,
    )
    grads = {}
    for step in range(1, 11):
        grads[step] = gradients(net, step, NAMES.values())
        backward(net, step)
        optimizer.step()
        optimizer.zero_grad()
    for kind in optimizer.kinds:
        assert set(kind.block_shares) == {4, 6, 9}
        for step, value in kind.block_shares.items():
            assert 0.05 < value < 1
            assert value == pytest.approx(share(kind, [grads[step][NAMES[kind.name]]]), rel=1e-5)
        first, last = kind.block_shares[4], kind.block_shares[9]
        assert f"in step 4 both together hold {first:.1%}\n" in repr(optimizer)
        assert f"in step 9 both together hold {last:.1%}\n" in repr(optimizer)
        assert "in step 6" not in repr(optimizer)


def test_several_backwards():
    """Each counts by itself; what zero_grad() drops does not."""
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(
        net,
        adamw(net),
        20,
        layers="*",
        bases=make_bases(6),
        accumulate=True,
        measure_energy_every=1,
    )
    backward(net, 9)
    optimizer.zero_grad()
    grads = [gradients(net, seed, NAMES.values()) for seed in (1, 2)]
    for seed in (1, 2):
        backward(net, seed)
    optimizer.step()
    for kind in optimizer.kinds:
        want = share(kind, [one[NAMES[kind.name]] for one in grads])
        assert kind.block_shares == {1: pytest.approx(want, rel=1e-5)}


@pytest.mark.usefixtures("lapack")
def test_nothing_that_was_not_measured():
    """With all vectors there is no block; with bases of another run no figure until the first."""
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(
        net, adamw(net), 20, 3, layers="*", measure_energy_every=1
    )
    for step in range(5):
        backward(net, step)
        optimizer.step()
        optimizer.zero_grad()
    assert not any(kind.block_shares for kind in optimizer.kinds)
    assert "together" not in repr(optimizer)
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(
        net, adamw(net), 20, layers="*", bases=make_bases(5), measure_energy_every=2
    )
    backward(net, 0)
    optimizer.step()
    assert "hold" not in repr(optimizer)
    # A layer without a gradient has no energy.
    optimizer.zero_grad()
    optimizer.step()
    assert not any(kind.block_shares for kind in optimizer.kinds)


@pytest.mark.usefixtures("lapack")
def test_in_checkpoints():
    """Measured shares and the interval come with a checkpoint; an older one has neither."""

    def make(every):
        net = make_net()
        return net, sebp.apply_sparsegrad_to_model(
            net, adamw(net), 20, 2, rank=5, layers="*", measure_energy_every=every
        )

    def go_on(net, optimizer, steps):
        for step in steps:
            backward(net, step)
            optimizer.step()
            optimizer.zero_grad()

    net, optimizer = make(2)
    go_on(net, optimizer, range(5))
    twin, resumed = make(None)
    twin.load_state_dict(net.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    resumed.load_state_dict(saved)
    for one in ((net, optimizer), (twin, resumed)):
        go_on(*one, range(5, 7))
    for kind, other in zip(optimizer.kinds, resumed.kinds, strict=True):
        assert kind.block_shares == other.block_shares
        assert set(kind.block_shares) == {2, 4, 6}
    assert repr(optimizer) == repr(resumed)
    for basis in saved["sebp"]["bases"].values():
        del basis["block_shares"]
    del saved["sebp"]["settings"]["measure_energy_every"]
    resumed.load_state_dict(saved)
    assert resumed.settings.measure_energy_every is None
    assert not any(kind.block_shares for kind in resumed.kinds)


@pytest.mark.parametrize(("every", "error"), [(0, ValueError), (-1, ValueError), (0.5, TypeError)])
def test_bad_intervals(every, error):
    net = make_net()
    with pytest.raises(error, match="measure_energy_every is"):
        sebp.apply_sparsegrad_to_model(
            net, adamw(net), 20, 3, layers="*", measure_energy_every=every
        )


@pytest.mark.usefixtures("lapack")
def test_sides_say_more_than_the_block():
    """Gradients of two directions each, in the two halves of a basis phase: sides hold half."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    optimizer = sebp.apply_sparsegrad_to_model(
        net, adamw(net, lr=0.0), 1, 4, rank=2, layers="*", basis_rate_factor=0
    )
    # E_00, E_11 twice as large, then E_02, E_13 so that u_out holds all and u_in does not.
    places = [(0, 0, 2.0), (1, 1, 2.0), (0, 2, 1.0), (1, 3, 1.0)]
    for i, j, size in places:
        x, dy = torch.zeros(1, 4), torch.zeros(1, 4)
        x[0, j], dy[0, i] = 1, size
        (net(x) * dy).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    (kind,) = optimizer.kinds
    np.testing.assert_allclose(kind.shares, (1.0, 0.8), rtol=1e-6)
    assert kind.block_shares == {4: 0.0}
