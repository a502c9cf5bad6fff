# SPDX-License-Identifier: Apache-2.0
"""Bad input to SparseGrad and MeProp."""

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from sparse_nets import (  # noqa: E402
    adamw,
    backward,
    make_bases,
    make_net,
    meprop_net,
    sgd,
)
from torch import nn  # noqa: E402

import sebp  # noqa: E402
from sebp.sparse import Basis  # noqa: E402


@pytest.mark.parametrize("fix_after", [None, 1])
@pytest.mark.parametrize("method", ["sparsegrad", "meprop"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_not_finite(method, fix_after, accumulate):
    """The step is refused by name and number, nothing has moved, and training can go on."""
    net = make_net()
    options = dict(layers="*", fix_support_after=fix_after, accumulate=accumulate)
    if method == "sparsegrad":
        options["bases"] = make_bases()
        optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, **options)
    else:
        optimizer = sebp.apply_meprop_to_model(net, adamw(net), 5, **options)
    net(torch.randn(9, 12)).sum().backward()
    optimizer.step()
    x = torch.randn(9, 12)
    x[4, 3] = float("nan")
    before = copy.deepcopy(net.state_dict())
    moments = copy.deepcopy(optimizer.state_dict()["sebp"]["moments"])
    net(x).sum().backward()
    with pytest.raises(sebp.SebpError, match="step 2: the gradient of .*2.* holds a NaN"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    for name, saved in optimizer.state_dict()["sebp"]["moments"].items():
        assert all(
            torch.equal(torch.as_tensor(saved[key]), torch.as_tensor(value))
            for key, value in moments[name].items()
        )
    optimizer.zero_grad()
    net(torch.randn(9, 12)).sum().backward()
    optimizer.step()
    assert optimizer.steps == 2
    assert all(value.isfinite().all() for value in net.state_dict().values())


@pytest.mark.parametrize("method", ["sparsegrad", "meprop"])
def test_not_finite_beside_the_support(method):
    """A NaN is refused wherever it is: here in one row of a gradient whose support is elsewhere."""
    net = nn.Sequential(nn.Linear(12, 20))
    if method == "sparsegrad":
        unit = {"* 20x12": Basis.from_vectors(*(np.eye(n, dtype=np.float32) for n in (20, 12)))}
        optimizer = sebp.apply_sparsegrad_to_model(
            net, adamw(net), 4, layers="*", bases=unit, fix_support_after=1
        )
    else:
        optimizer = sebp.apply_meprop_to_model(net, adamw(net), 4, "*", fix_support_after=1)
    dy = torch.zeros(9, 20)
    dy[:, 0] = 1
    (net(torch.ones(9, 12)) * dy).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy(net.state_dict())
    dy[3, 7] = float("inf")
    (net(torch.ones(9, 12)) * dy).sum().backward()
    with pytest.raises(sebp.SebpError, match="step 2: the gradient of 0 holds a NaN"):
        optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    optimizer.zero_grad()
    # Numbers so large that their sum is not finite are finite all the same.
    dy[3, 7], dy[4, 8] = 3e38, 3e38
    (net(torch.ones(9, 12)) * dy).sum().backward()
    optimizer.step()
    assert optimizer.steps == 2


@pytest.mark.parametrize("method", ["sparsegrad", "meprop"])
def test_support_of_squares_that_overflow(method):
    """A gradient may be finite where its square is not: these elements are the largest."""
    net = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8))
    options = dict(k=30, layers="*", fix_support_after=2)
    if method == "sparsegrad":
        options["bases"] = make_bases()
        optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), **options)
    else:
        optimizer = sebp.apply_meprop_to_model(net, adamw(net), **options)
    for step, scale in enumerate((1.0, 1e25, 1.0)):
        optimizer.zero_grad()
        (scale * net(torch.ones(9, 12) * torch.arange(1, 13)).sum()).backward()
        large = {n: layer.gradient.indices for n, layer in optimizer.layers.items() if step == 1}
        optimizer.step()
        for name, indices in large.items():
            np.testing.assert_array_equal(optimizer.layers[name].moments.support, indices)
    assert optimizer.steps == 3
    assert all(value.isfinite().all() for value in net.state_dict().values())


@pytest.mark.parametrize("history", [False, True])
def test_step_that_overflows(history):
    """By this gradient, or by what is left of an earlier one."""
    net, optimizer = meprop_net()
    if history:
        (1e30 * net(torch.randn(9, 12)).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 1e12
    before = copy.deepcopy(net.state_dict())
    moments = [layer.moments.moments() for layer in optimizer.layers.values()]
    ((1 if history else 1e30) * net(torch.randn(9, 12)).sum()).backward()
    with pytest.raises(sebp.SebpError, match="step .: the gradient of 0, 2 holds .*too large"):
        optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    for layer, old in zip(optimizer.layers.values(), moments, strict=True):
        np.testing.assert_equal(layer.moments.moments(), old)
    # Neither gradients nor rates are too large by themselves.
    optimizer.param_groups[0]["lr"] = 1.0
    (1e30 * net(torch.randn(9, 12)).sum()).backward()
    optimizer.step()


BAD_NUMBERS = [
    ({"lr": -1.0}, sebp.SebpError, "learning_rate|lr"),
    ({"eps": float("nan")}, sebp.SebpError, "eps"),
    ({"betas": (0.9, 1.0)}, sebp.SebpError, "beta"),
    ({"weight_decay": -1.0}, sebp.SebpError, "decay"),
    ({"lr": None}, ValueError, "numbers are not those of AdamW: {'lr': None"),
    ({"betas": (0.9, 0.99, 0.999)}, ValueError, "numbers are not those"),
    ({"maximize": True}, ValueError, "maximize is not done"),
    ({"amsgrad": True}, ValueError, "amsgrad is not done"),
]


@pytest.mark.parametrize(("numbers", "kind", "message"), BAD_NUMBERS)
def test_bad_numbers(numbers, kind, message):
    """One group's bad numbers: refused when applied, and in a step before anything has moved."""

    def groups(net):
        return [{"params": net[0].parameters()}, {"params": net[2].parameters()}]

    net = make_net()
    base = torch.optim.AdamW(groups(net))
    base.param_groups[1].update(numbers)
    with pytest.raises(kind, match=f"^2: .*({message})"):
        sebp.apply_meprop_to_model(net, base, 5, "*")
    assert net[0].weight.requires_grad
    base = torch.optim.AdamW(groups(net))
    optimizer = sebp.apply_meprop_to_model(net, base, 5, "*")
    backward(net, 0)
    before = copy.deepcopy(net.state_dict())
    good = dict(base.param_groups[1])
    base.param_groups[1].update(numbers)
    with pytest.raises(kind, match=f"^2: .*({message})"):
        optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert (optimizer.steps, optimizer.layers["0"].moments.steps) == (0, 0)
    assert not base.state
    # The gradients are kept.
    base.param_groups[1].update(good)
    optimizer.step()
    assert not any(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_base_that_fails():
    """Nothing of ours has moved where the user's optimizer raises."""

    class Failing(torch.optim.AdamW):
        def step(self, closure=None):
            raise RuntimeError("no step")

    net = make_net()
    optimizer = sebp.apply_meprop_to_model(net, Failing(net.parameters(), lr=0.1), 5, "*")
    backward(net, 0)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert optimizer.layers["0"].moments.steps == 0


@pytest.mark.parametrize("phase", ["basis", "sparse"])
@pytest.mark.usefixtures("lapack")
def test_grad_scaler(phase):
    """A scaler does not see the sparse gradients: refused at the first step, not half done."""
    net = make_net()
    options = {"bases": make_bases()} if phase == "sparse" else {"basis_steps": 3}
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*", **options)
    scaler = torch.amp.GradScaler("cpu")
    before = copy.deepcopy(net.state_dict())
    scaler.scale(net(torch.randn(9, 12)).sum()).backward()
    with pytest.raises(RuntimeError, match="GradScaler does not see"):
        scaler.step(optimizer)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    optimizer.zero_grad()
    backward(net, 0)
    optimizer.step()
    optimizer.zero_grad()
    off = torch.amp.GradScaler("cpu", enabled=False)
    off.scale(net(torch.randn(9, 12)).sum()).backward()
    off.step(optimizer)
    assert optimizer.steps == 2


def test_weights_that_ask_again():
    """Unfrozen by hand, a weight would be moved by both optimizers."""
    net, optimizer = meprop_net()
    net.requires_grad_(True)
    backward(net, 1)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="0: its weight asks for a gradient"):
        optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


CHANGES = {
    "dtype": (lambda net: net.half(), "is of torch.float16"),
    "layout": (
        lambda net: setattr(net[2].weight, "data", net[2].weight.data.t().contiguous().t()),
        "is not row by row",
    ),
    "shape": (lambda net: setattr(net[2].weight, "data", torch.ones(1, 20)), r"is of \(1, 20\)"),
    "precision": (lambda net: net.bfloat16(), "is of torch.bfloat16, and was of torch.float32"),
}


@pytest.mark.parametrize("phase", ["basis", "sparse"])
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
@pytest.mark.usefixtures("lapack")
def test_weights_that_are_others(phase, change, message):
    """What the library cannot write to is refused before other layers have moved."""
    net = make_net()
    options = {"bases": make_bases()} if phase == "sparse" else {"basis_steps": 3}
    optimizer = sebp.apply_sparsegrad_to_model(net, sgd(net), 5, layers="*", **options)
    backward(net, 0)
    change(net)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=f"[02]: its weight {message}"):
        optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert optimizer.steps == 0
    assert all(not sums.count for sums in optimizer.sums.values())


@pytest.mark.parametrize("phase", ["basis", "sparse"])
@pytest.mark.usefixtures("lapack")
def test_weights_tied_later(phase):
    """The gradient of one of the two layers would be missing."""
    net = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
    if phase == "basis":
        optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, 3, layers="*")
    else:
        optimizer = sebp.apply_meprop_to_model(net, adamw(net), 5, "*")
    net[2].weight = net[0].weight
    backward(net, 0)
    with pytest.raises(ValueError, match="2: its weight has become that of 0"):
        optimizer.step()


@pytest.mark.usefixtures("lapack")
def test_weight_frozen_in_the_basis_phase():
    """It would train again once that ends."""
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, 3, layers="*")
    net[0].weight.requires_grad_(False)
    backward(net, 0)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="0: its weight was frozen"):
        optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    optimizer.release()
    assert not net[0].weight.requires_grad


def test_state_of_the_base_loaded():
    """Rates that came with a checkpoint of the user's optimizer hold for the sparse layers too."""
    net, optimizer = meprop_net()
    state = optimizer.base.state_dict()
    state["param_groups"][0]["lr"] = 0.0
    optimizer.base.load_state_dict(state)
    backward(net, 1)
    before = copy.deepcopy(net.state_dict())
    optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert optimizer.param_groups is optimizer.base.param_groups


def test_no_copies():
    _, optimizer = meprop_net()
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="belongs to the model it was made for; copy its state"):
            make(optimizer)


@pytest.mark.usefixtures("lapack")
def test_twice():
    """One optimizer for a layer, in the basis phase too, and none around another."""
    net = make_net()
    base = adamw(net)
    first = sebp.apply_sparsegrad_to_model(net, base, 5, 3, layers="0")
    with pytest.raises(ValueError, match="0: a SparseOptimizer has it already"):
        sebp.apply_sparsegrad_to_model(net, base, 5, 3, layers="*")
    with pytest.raises(ValueError, match="0: a SparseOptimizer has it already"):
        sebp.apply_lora_to_model(net, 2, layers="*")
    with pytest.raises(TypeError, match="has sparse layers already"):
        sebp.apply_meprop_to_model(net, first, 5, "2")
    first.release()
    sebp.apply_sparsegrad_to_model(net, base, 5, 3, layers="*")


@pytest.mark.parametrize("method", ["meprop", "lora"])
def test_weight_of_an_embedding(method):
    """Which would lose its gradient."""
    net = nn.Sequential(nn.Embedding(8, 12), nn.Linear(12, 8))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match="1: its weight is that of 0"):
        if method == "lora":
            sebp.apply_lora_to_model(net, 2, layers="*")
        else:
            sebp.apply_meprop_to_model(net, adamw(net), 5, "*")
    assert net[0].weight.requires_grad


@pytest.mark.usefixtures("lapack")
def test_not_finite_in_the_basis_phase():
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, 3, layers="*")
    before = copy.deepcopy(net.state_dict())
    net(torch.full((3, 12), float("inf"))).sum().backward()
    with pytest.raises(sebp.SebpError, match="step 1: the gradient of 0, 2 holds"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert optimizer.in_basis_phase
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(9, 12)).sum().backward()
        optimizer.step()
    assert not optimizer.in_basis_phase


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.usefixtures("lapack")
def test_too_large_in_the_basis_phase(resumes):
    """Refused by name before any layer's gradient is in the sums: by itself, or with the others."""

    def step(net, optimizer, large=None):
        optimizer.zero_grad()
        backward(net, 0)
        if large is not None:
            net[2].weight.grad.fill_(0)[0, 0] = large
        optimizer.step()

    def held(net, optimizer):
        saved = optimizer.state_dict()
        return copy.deepcopy([net.state_dict(), saved["state"], saved["sebp"]["sums"]])

    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, 9, layers="*")
    step(net, optimizer)
    for large in (2e19, 7e18):
        if large < 1e19:
            step(net, optimizer, large)
        if resumes:
            saved = optimizer.state_dict()
            optimizer.release()
            optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, 9, layers="*")
            optimizer.load_state_dict(saved)
        before = held(net, optimizer)
        with pytest.raises(sebp.SebpError, match=r"step \d: the gradient of 2 holds .*too large"):
            step(net, optimizer, large)
        torch.testing.assert_close(held(net, optimizer), before, rtol=0, atol=0)
    step(net, optimizer)
    assert [sums["count"] for sums in optimizer.state_dict()["sebp"]["sums"].values()] == [3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 161}, "k is 161, but .* 8x20 has 1 to 160"),
        ({"k": 10, "rank": 3}, "k is 10"),
        ({"rank": 9}, "rank is 9, but .* 8x20 has 1 to 8"),
        ({"rank": (0, 1)}, "rank is 0"),
        ({"basis_steps": 1}, "1 gradients of 1 layers do not span 20 directions"),
        ({"basis_steps": 0}, "basis_steps is 0"),
        ({"fix_support_after": 0}, "fix_support_after is 0"),
        ({"layers": "9"}, "none in '9'"),
        ({"layers": None}, "no feed-forward layers known by name"),
        ({"bases": {}}, "no basis for"),
    ],
)
def test_bad_arguments(options, message):
    net = make_net()
    options = {"k": 5, "basis_steps": 3, "layers": "*", **options}
    base = adamw(net)
    with pytest.raises(ValueError, match=message):
        sebp.apply_sparsegrad_to_model(net, base, **options)
    assert all(p.requires_grad for p in net.parameters())
    assert not any(module._forward_hooks for module in net)


def test_bad_models():
    net = make_net()
    with pytest.raises(ValueError, match="2: its weight is not among"):
        sebp.apply_sparsegrad_to_model(net, adamw(net[0]), 5, layers="*")
    with pytest.raises(TypeError, match="not of torch.optim"):
        sebp.apply_sparsegrad_to_model(net, None, 5, layers="*")
    bad = ("k", 0.01), ("k", True), ("k", None), ("rank", (6.0, 6)), ("basis_steps", 2.5)
    for name, value in bad:
        with pytest.raises(TypeError, match=f"{name} is .*, not an integer"):
            sebp.apply_sparsegrad_to_model(net, adamw(net), layers="*", **{"k": 5, name: value})
    with pytest.raises(ValueError, match="rank is .*, not one number or two"):
        sebp.apply_sparsegrad_to_model(net, adamw(net), 5, rank=(1, 2, 3), layers="*")
    with pytest.raises(TypeError, match="20x12 is ndarray, not Basis"):
        sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*", bases={"* 20x12": np.eye(3)})
    bases = make_bases()
    bases["* 8x20"] = bases["* 20x12"]
    with pytest.raises(ValueError, match="is of \\(8, 20\\), its basis of \\(20, 12\\)"):
        sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*", bases=bases)
    sebp.apply_meprop_to_model(net, adamw(net), 5, "0")
    with pytest.raises(ValueError, match="0: its weight is frozen"):
        sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*")
    double = make_net(torch.float64)
    with pytest.raises(ValueError, match="float64"):
        sebp.apply_meprop_to_model(double, adamw(double), 5, "*")
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="0: its weight is that of 1"):
        sebp.apply_meprop_to_model(tied, adamw(tied), 5, "*")


@pytest.mark.usefixtures("lapack")
def test_no_memory(monkeypatch):
    """For the sums of all kinds: the model is as it was."""

    def make(self, out_features, in_features):
        if (out_features, in_features) == (8, 20):
            raise MemoryError
        init(self, out_features, in_features)

    init = sebp.sparse.BasisSums.__init__
    monkeypatch.setattr(sebp.sparse.BasisSums, "__init__", make)
    net = make_net()
    with pytest.raises(MemoryError):
        sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*")
    assert not any(module._forward_hooks for module in net)
    assert not any(parameter._backward_hooks for parameter in net.parameters())


def test_no_lapack(monkeypatch):
    """A library without it is told of before the basis phase, not after."""

    def solve(self, rank_out, rank_in, context=None):
        raise sebp.SebpError(11, "install liblapacke-dev")

    net = make_net()
    with monkeypatch.context() as patch:
        # As if it had one, where there is none.
        patch.setattr("sebp.torch.sparse.apply.check_lapack", lambda: None)
        optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*")
    saved = optimizer.state_dict()
    optimizer.release()
    monkeypatch.setattr(sebp.sparse.BasisSums, "solve", solve)
    with pytest.raises(sebp.SebpError, match="liblapacke"):
        sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*")
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*", bases=make_bases())
    with pytest.raises(sebp.SebpError, match="liblapacke"):
        optimizer.load_state_dict(saved)
    assert not optimizer.in_basis_phase


def test_rank_beside_bases():
    """It is theirs, and not left out of account where it is another."""
    for rank, is_good in ((None, True), (7, True), ((7, 7), True), (6, False), ((7, 6), False)):
        net = make_net()
        options = dict(layers="*", bases=make_bases(7), rank=rank)
        if is_good:
            sebp.apply_sparsegrad_to_model(net, sgd(net), 5, **options)
            continue
        with pytest.raises(ValueError, match="rank is .*, but the basis of .* has"):
            sebp.apply_sparsegrad_to_model(net, sgd(net), 5, **options)
        assert all(parameter.requires_grad for parameter in net.parameters())
