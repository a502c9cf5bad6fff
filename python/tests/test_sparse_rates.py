# SPDX-License-Identifier: Apache-2.0
"""The rates of sparse layers: those of the basis phase, and of which optimizers they are taken."""

import copy
import math
import warnings

import pytest

torch = pytest.importorskip("torch")
from sparse_nets import adamw, backward, make_net, sgd  # noqa: E402

import sebp  # noqa: E402

K = 20


def groups_of(net, rates):
    """Make groups of the weights that will be sparse, at a rate each, and of all else."""
    weights = [net[0].weight, net[2].weight]
    others = [net[0].bias, net[2].bias]
    return [{"params": [w], "lr": lr} for w, lr in zip(weights, rates, strict=True)] + [
        {"params": others}
    ]


@pytest.mark.parametrize("factor", [None, 0.25, 0])
@pytest.mark.parametrize("base_class", ["AdamW", "NAdam", "Adamax"])
@pytest.mark.usefixtures("lapack")
def test_basis_phase_at_its_rate(factor, base_class):
    """Bit for bit as groups of the sparse weights at that rate, with schedule, decay and all."""
    net = make_net()
    twin = copy.deepcopy(net)
    make, options = getattr(torch.optim, base_class), dict(lr=0.01)
    if base_class == "AdamW":
        options["weight_decay"] = 0.1
    base = make(net.parameters(), **options)
    optimizer = sebp.apply_sparsegrad_to_model(
        net, base, K, 5, layers="*", basis_rate_factor=factor
    )
    shapes = (20 * 12, 8 * 20)
    factors = [math.sqrt(K / size) if factor is None else factor for size in shapes]
    plain = make(groups_of(twin, [0.01 * one for one in factors]), **options)
    start = copy.deepcopy(net.state_dict())
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(one, lambda step: 0.5**step) for one in (optimizer, plain)
    ]
    for step in range(4):
        for model, one in ((net, optimizer), (twin, plain)):
            backward(model, step)
            one.step()
            one.zero_grad()
        for schedule in schedules:
            schedule.step()
    assert len(base.param_groups) == 1
    assert [id(p) for p in base.param_groups[0]["params"]] == [id(p) for p in net.parameters()]
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=1e-6, atol=1e-8)
    for name, value in net.state_dict().items():
        moved = not torch.equal(value, start[name])
        assert moved == (name.endswith("bias") or factor != 0)


@pytest.mark.usefixtures("lapack")
def test_steps_are_as_long_before_and_after():
    """By default AdamW's first step and the first of the k elements have the same norm."""
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(
        net, adamw(net, weight_decay=0), K, 1, rank=8, layers="*"
    )
    norms = []
    for step in range(2):
        before = net[0].weight.detach().clone()
        backward(net, step)
        optimizer.step()
        optimizer.zero_grad()
        norms.append(float((net[0].weight.detach() - before).norm()))
    assert norms[0] > 0
    # A gradient of exactly zero, behind the ReLU, moves nothing.
    assert 0.5 < norms[0] / norms[1] < 1.01


@pytest.mark.usefixtures("lapack")
def test_groups_after_a_step_that_fails():
    class Failing(torch.optim.AdamW):
        def step(self, closure=None):
            raise RuntimeError("no step")

    net = make_net()
    base = Failing(net.parameters())
    optimizer = sebp.apply_sparsegrad_to_model(net, base, K, 5, layers="*")
    backward(net, 0)
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.step()
    assert [group["params"] for group in base.param_groups] == [list(net.parameters())]


@pytest.mark.parametrize("factor", [-1, math.nan, math.inf, "1", True])
def test_bad_factors(factor):
    net = make_net()
    error = ValueError if isinstance(factor, (float, int)) and factor is not True else TypeError
    with pytest.raises(error, match="basis_rate_factor is"):
        sebp.apply_sparsegrad_to_model(net, adamw(net), K, 5, layers="*", basis_rate_factor=factor)
    assert not any(module._forward_hooks for module in net)


class Lion(torch.optim.Optimizer):
    """It has betas, but its rate is a tenth of Adam's and there is no eps."""

    def __init__(self, params):
        super().__init__(params, dict(lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0))


class Prodigy(torch.optim.Optimizer):
    """It has all of AdamW's numbers, and a factor of the rate beside them."""

    def __init__(self, params):
        super().__init__(params, dict(lr=1.0, betas=(0.9, 0.99), eps=1e-8, d=1e-6))


class OtherAdamW(torch.optim.Optimizer):
    """By its name its decay is decoupled."""

    def __init__(self, params):
        super().__init__(params, dict(lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1))


OTHERS = {
    "SGD": (lambda p: torch.optim.SGD(p, 0.1), "has no betas and no eps, so SGD is not of Adam's"),
    "Lion": (Lion, "its group has no eps, so Lion is not"),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, 0.1), "its group has no betas, so RMSprop"),
    "L2": (lambda p: torch.optim.Adam(p, weight_decay=0.1), "Adam adds its weight_decay to"),
    "Adamax": (lambda p: torch.optim.Adamax(p, weight_decay=0.1), "Adamax adds its weight_decay"),
    "Prodigy": (Prodigy, "Prodigy multiplies the rate by a factor d that it adapts"),
}


@pytest.mark.parametrize(("make", "message"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("method", ["sparsegrad", "meprop"])
def test_optimizers_of_another_kind(make, message, method):
    """Whose rates are no rates of AdamW: refused, unless the group says them."""
    net = make_net()
    apply = getattr(sebp, f"apply_{method}_to_model")
    with pytest.raises(ValueError, match=f"0: .*{message}"):
        apply(net, make(net.parameters()), K, layers="*")
    assert all(p.requires_grad for p in net.parameters())
    assert not any(module._forward_hooks for module in net)


@pytest.mark.parametrize("make", [OtherAdamW, torch.optim.Adamax], ids=["AdamW", "no decay"])
def test_optimizers_that_do_not_say_how_they_decay(make):
    net = make_net()
    optimizer = sebp.apply_meprop_to_model(net, make(net.parameters()), K, layers="*")
    assert optimizer.kinds
    optimizer.release()
    base = torch.optim.Adamax(net.parameters(), weight_decay=0.1)
    base.param_groups[0]["decoupled_weight_decay"] = True
    sebp.apply_meprop_to_model(net, base, K, layers="*")


class LAMB(torch.optim.Optimizer):
    """It has AdamW's numbers, but its rate is a share of each weight's norm."""

    def __init__(self, params):
        super().__init__(params, dict(lr=5e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0))


@pytest.mark.parametrize("make", [LAMB, OtherAdamW, torch.optim.NAdam, sgd])
def test_rates_that_may_mean_something_else(make):
    """By its name an optimizer is of Adam's kind, or not; one whose group says it is taken so."""
    net = make_net()
    base = make(net) if make is sgd else make(net.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sebp.apply_sparse_mask_to_model(net, base, K, layers="*")
    told = [str(one.message) for one in caught if "rate that LAMB has" in str(one.message)]
    assert len(told) == (make is LAMB) == len(caught)
    assert not caught or caught[0].filename == __file__


def test_rates_said_by_hand():
    """A group of its own, with AdamW's numbers, beside SGD for all else."""
    net = make_net()
    numbers = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    base = torch.optim.SGD(
        [
            {"params": [net[0].weight, net[2].weight], **numbers},
            {"params": [net[0].bias, net[2].bias]},
        ],
        lr=0.1,
    )
    optimizer = sebp.apply_meprop_to_model(net, base, K, "*")
    before = copy.deepcopy(net.state_dict())
    backward(net, 0)
    optimizer.step()
    moved = (net[0].weight.detach() - before["0.weight"]).abs()
    assert torch.count_nonzero(moved) == K
    torch.testing.assert_close(moved.max(), torch.tensor(1e-3), rtol=1e-3, atol=0)
    torch.testing.assert_close(
        net[0].bias.detach(), before["0.bias"] - 0.1 * net[0].bias.grad, rtol=1e-5, atol=1e-6
    )
