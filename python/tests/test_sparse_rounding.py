# SPDX-License-Identifier: Apache-2.0
"""Steps on bfloat16 weights: to nearest they are lost, by chance they are right in the mean."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from mask_nets import bits  # noqa: E402
from sparse_nets import adamw, make_bases, make_net  # noqa: E402
from torch import nn  # noqa: E402

import sebp  # noqa: E402
from sebp.sparse import Basis, stochastic_add  # noqa: E402
from sebp.torch.common.tensors import matrix_of  # noqa: E402


def make(method, net, **options):
    """Train the net's layers by a method."""
    base = adamw(net, lr=1e-5, weight_decay=0)
    if method == "meprop":
        return sebp.apply_meprop_to_model(net, base, 600, "*", **options)
    if method == "galore":
        return sebp.apply_galore_to_model(net, base, 16, "*", scale=1.0, **options)
    if method == "mask":
        return sebp.apply_sparse_mask_to_model(net, base, 600, layers="*", **options)
    torch.manual_seed(3)
    vectors = torch.linalg.qr(torch.randn(32, 32)).Q.numpy()
    bases = {"* 32x32": Basis.from_vectors(vectors, vectors[::-1].copy())}
    return sebp.apply_sparsegrad_to_model(net, base, 600, layers="*", bases=bases, **options)


@pytest.mark.parametrize("method", ["sparsegrad", "meprop", "galore", "mask"])
def test_movement(method):
    """200 steps at 1e-5 go as far by chance as in float32, and hardly anywhere to nearest."""
    torch.manual_seed(0)
    start = (0.05 * torch.randn(32, 32)).bfloat16()
    gradient = torch.randn(32, 32)
    moved = {}
    for name, dtype, rounding in (
        ("float32", torch.float32, "nearest"),
        ("nearest", torch.bfloat16, "nearest"),
        ("stochastic", torch.bfloat16, "stochastic"),
    ):
        net = nn.Sequential(nn.Linear(32, 32, bias=False))
        net[0].weight.data = start.clone().to(dtype)
        options = {"fix_support_after": 1} if method in ("sparsegrad", "meprop") else {}
        optimizer = make(method, net, rounding=rounding, **options)
        x = torch.eye(32, dtype=dtype)
        for _ in range(200):
            (net(x) * gradient.t().to(dtype)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved[name] = (net[0].weight.detach().float() - start.float()).flatten()
    exact = moved.pop("float32")
    length = float(exact @ exact)
    share = {name: float(one @ exact) / length for name, one in moved.items()}
    # Each element errs by a walk whose steps are at most a neighbour's distance, 2^-8 of it.
    noise = (200 * 1e-5 * 0.2 * 2**-8) ** 0.5 * float(exact.norm()) / length
    assert abs(share["stochastic"] - 1) < 5 * noise < 0.5
    assert share["nearest"] < 0.5


def test_mean_of_decay():
    """A decay that to nearest does nothing is right in the mean, without a gradient beside it."""
    w = torch.full((64, 640), 0.75, dtype=torch.bfloat16)
    stochastic_add(None, matrix_of(w), seed=1, offset=2, decay=2.0**-11)
    lost = 0.75 - float(w.double().mean())
    # Elements go down by 2^-8 with a probability of 0.75 / 8.
    assert abs(lost / (0.75 * 2.0**-11) - 1) < 0.1
    assert len(w.unique()) == 2


def test_same_seed_same_bits():
    """Of a run and of one resumed; another seed gives others; float32 weights are not concerned."""
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(4)
        np.random.seed(4)
        net = make_net(torch.bfloat16)
        optimizer = sebp.apply_sparsegrad_to_model(
            net,
            adamw(net),
            30,
            layers="*",
            bases=make_bases(),
            rounding="stochastic",
            seed=seed,
        )
        for step in range(4):
            if step == 2 and len(results) == 1:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer.release()
                optimizer = sebp.apply_sparsegrad_to_model(
                    net, adamw(net), 30, layers="*", bases=make_bases()
                )
                optimizer.load_state_dict(saved)
            torch.manual_seed(step)
            net(torch.randn(9, 12).bfloat16()).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(net[0].weight.detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    weights = []
    for rounding in ("nearest", "stochastic"):
        torch.manual_seed(4)
        net = make_net()
        optimizer = sebp.apply_meprop_to_model(net, adamw(net), 30, "*", rounding=rounding)
        net(torch.ones(9, 12)).square().sum().backward()
        optimizer.step()
        weights.append(net[0].weight.detach())
    assert torch.equal(*weights)


@pytest.mark.parametrize("mask", ["random", "gradient"])
def test_masks_resumed(mask):
    """The same bits as without a break; what does not train keeps its own, in spite of decay."""
    results = []
    for breaks in (False, True):
        torch.manual_seed(4)
        net = make_net(torch.bfloat16)
        before = copy.deepcopy(net)
        base = adamw(net, weight_decay=0.1)
        optimizer = sebp.apply_sparse_mask_to_model(
            net, base, 30, mask, "*", rounding="stochastic", seed=5
        )
        for step in range(4):
            if step == 2 and breaks:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer.release()
                optimizer = sebp.apply_sparse_mask_to_model(net, adamw(net), 30, mask, "*")
                optimizer.load_state_dict(saved)
            net(
                torch.full((9, 12), 0.5 + step, dtype=torch.bfloat16)
            ).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, support in optimizer.supports().items():
            new, old = (bits(one.get_submodule(name).weight).flatten() for one in (net, before))
            moved = np.flatnonzero((new != old).numpy())
            assert moved.size > 15 and np.isin(moved, support).all()
        results.append(bits(net[0].weight))
    assert torch.equal(*results)


@pytest.mark.parametrize("method", ["sparsegrad", "meprop", "galore", "mask"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rounding": "up"}, ValueError, "rounding is 'up', not"),
        ({"rounding": None}, ValueError, "rounding is None"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"seed": 2**64}, ValueError, "seed is 18446744073709551616"),
        ({"seed": 0.5}, TypeError, "seed is 0.5, not an integer"),
    ],
)
def test_bad_options(method, options, error, message):
    net = nn.Sequential(nn.Linear(32, 32, bias=False))
    with pytest.raises(error, match=message):
        make(method, net, **options)
    assert not net[0]._forward_hooks


@pytest.mark.parametrize("method", ["meprop", "galore", "mask"])
def test_decay_by_more_than_the_weight(method):
    """Rounding by chance does not do it; that is said before anything has changed."""
    net = nn.Sequential(nn.Linear(32, 32)).bfloat16()
    optimizer = make(method, net, rounding="stochastic")
    optimizer.param_groups[0].update(lr=0.5, weight_decay=3.0)
    net(torch.ones(4, 32, dtype=torch.bfloat16)).sum().backward()
    before = copy.deepcopy(net)
    with pytest.raises(ValueError, match=r"0: lr \* weight_decay is 1.5, over 1"):
        optimizer.step()
    assert optimizer.steps == 0
    assert all(map(torch.equal, net.parameters(), before.parameters()))
    optimizer.param_groups[0]["weight_decay"] = 2.0
    optimizer.step()  # the gradients are still there
    assert not torch.equal(net[0].weight, before[0].weight)


def test_bad_sums():
    w = torch.ones(3, 4, dtype=torch.bfloat16)
    d = torch.ones(3, 4)
    matrix = matrix_of(w)
    with pytest.raises(sebp.SebpError, match="d is 2x4"):
        stochastic_add(matrix_of(d[:2]), matrix, seed=0, offset=0)
    with pytest.raises(sebp.SebpError, match="w is not bf16"):
        stochastic_add(None, matrix_of(d), seed=0, offset=0)
    with pytest.raises(sebp.SebpError, match="decay is 2, not in"):
        stochastic_add(None, matrix, seed=0, offset=0, decay=2.0)
    d[1, 1] = float("inf")
    with pytest.raises(sebp.SebpError, match="d holds"):
        stochastic_add(matrix_of(d), matrix, seed=0, offset=0)
    for seed, offset in ((-1, 0), (0, 2**64)):
        with pytest.raises(ValueError, match="not from 0 to 2"):
            stochastic_add(None, matrix, seed=seed, offset=offset)
    assert (w == 1).all()
