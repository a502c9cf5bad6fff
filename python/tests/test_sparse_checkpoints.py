# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of sparse layers."""

import copy
import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from sparse_nets import (  # noqa: E402
    adamw,
    backward,
    make_bases,
    make_batches,
    make_model,
    make_net,
    sgd,
    train,
)
from torch import nn  # noqa: E402

import sebp  # noqa: E402


def make_run(method, name="bert", **options):
    model = make_model(name)
    base = adamw(model)
    if method == "meprop":
        return model, sebp.apply_meprop_to_model(model, base, 30, **options)
    return model, sebp.apply_sparsegrad_to_model(model, base, 30, 4, 12, **options)


@pytest.mark.parametrize("method", ["sparsegrad", "meprop"])
@pytest.mark.parametrize("stop", [2, 4, 6, 9])
@pytest.mark.parametrize("options", [{}, {"fix_support_after": 4}, {"drop_after": 4}])
@pytest.mark.usefixtures("lapack")
def test_resume(method, stop, options):
    """A resumed run goes on bit for bit."""
    pytest.importorskip("transformers")
    batches = make_batches("bert")
    model, optimizer = make_run(method, **options)
    train(model, optimizer, batches, stop)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    want = train(model, optimizer, batches, 7, stop)
    file.seek(0)
    again, resumed = make_run(method, **options)
    saved = torch.load(file)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.steps == stop
    assert train(again, resumed, batches, 7, stop) == want
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(optimizer.kinds, resumed.kinds, strict=True):
        np.testing.assert_array_equal(one.shares, other.shares)


@pytest.mark.parametrize("stop", [2, 4, 7])
@pytest.mark.parametrize("at", [1, 3, 6])
@pytest.mark.usefixtures("lapack")
def test_resume_in_another_phase(at, stop):
    """A checkpoint goes on in an optimizer of any phase, with a gradient at hand."""

    def start():
        torch.manual_seed(0)
        net = make_net()
        options = dict(layers="*", fix_support_after=2)
        return net, sebp.apply_sparsegrad_to_model(net, adamw(net), 20, 3, **options)

    def go_on(net, optimizer, first, last):
        for step in range(first, last):
            optimizer.zero_grad()
            backward(net, step)
            optimizer.step()

    plain, optimizer = start()
    go_on(plain, optimizer, 0, stop)
    saved = copy.deepcopy((plain.state_dict(), optimizer.state_dict()))
    go_on(plain, optimizer, stop, 9)
    net, resumed = start()
    go_on(net, resumed, 0, at)
    backward(net, 8)
    net.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert resumed.in_basis_phase == (stop < 3)
    go_on(net, resumed, stop, 9)
    for one, other in zip(plain.parameters(), net.parameters(), strict=True):
        assert torch.equal(one, other)
    resumed.release()
    assert all(p.requires_grad for p in net.parameters())
    assert not net[0]._forward_hooks


OTHERS = {
    "rank and phase": dict(basis_steps=5, rank=8),
    "support": dict(basis_steps=2, rank=6, fix_support_after=3),
    "bases": dict(bases=True),
    "accumulate": dict(basis_steps=9, accumulate=True),
    "rate of the basis phase": dict(basis_steps=4, basis_rate_factor=0.5),
}


@pytest.mark.parametrize("stop", [2, 5, 7])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.usefixtures("lapack")
def test_resume_in_another_optimizer(other, accumulate, stop):
    """A checkpoint goes on by its own settings, whatever the optimizer was made with."""

    def start(options):
        torch.manual_seed(0)
        net = make_net()
        if options.pop("bases", None):
            options["bases"] = make_bases()
        return net, sebp.apply_sparsegrad_to_model(net, adamw(net), 20, layers="*", **options)

    def go_on(net, optimizer, first, last):
        for step in range(first, last):
            for part in range(1 + accumulate):
                backward(net, 2 * step + part)
            optimizer.step()
            optimizer.zero_grad()

    mine = dict(basis_steps=4, rank=7, fix_support_after=2, accumulate=accumulate)
    plain, optimizer = start(mine)
    go_on(plain, optimizer, 0, stop)
    saved = copy.deepcopy((plain.state_dict(), optimizer.state_dict()))
    go_on(plain, optimizer, stop, 9)
    net, resumed = start(dict(other))
    net.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    go_on(net, resumed, stop, 9)
    for one, another in zip(plain.parameters(), net.parameters(), strict=True):
        assert torch.equal(one, another)
    for one, another in zip(optimizer.kinds, resumed.kinds, strict=True):
        assert one.basis.rank == another.basis.rank == (7, 7)
    assert repr(optimizer) == repr(resumed) or (other.get("accumulate") and not accumulate)


@pytest.mark.usefixtures("lapack")
def test_accumulate_from_now_on():
    """What a run did not allow may be allowed when it goes on."""
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, 3, layers="*")
    saved = optimizer.state_dict()
    optimizer.release()
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*", accumulate=True)
    optimizer.load_state_dict(saved)
    for step in range(5):
        backward(net, step)
        backward(net, step)
        optimizer.step()
        optimizer.zero_grad()
    assert not optimizer.in_basis_phase


def test_foreign_checkpoints():
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*", bases=make_bases())
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="without sparse layers"):
        optimizer.load_state_dict(adamw(net).state_dict())
    meprop = sebp.apply_meprop_to_model(*(lambda net: (net, adamw(net)))(make_net()), 5, "*")
    ours = state["sebp"]
    settings = {**ours["settings"], "k": 6}
    kinds = {"* 20x12": ["0"], "* 8x20": ["1"]}
    for other in (
        meprop.state_dict(),
        {**state, "sebp": {**ours, "settings": settings}},
        {**state, "sebp": {**ours, "kinds": kinds}},
    ):
        with pytest.raises(ValueError, match="other layers, or another k"):
            optimizer.load_state_dict(other)
    broken = copy.deepcopy(state)
    broken["sebp"]["bases"]["* 8x20"]["u_in"][0, 0] = float("nan")
    with pytest.raises(sebp.SebpError):
        optimizer.load_state_dict(broken)
    broken["sebp"]["bases"]["* 8x20"]["u_in"] = torch.eye(7)
    with pytest.raises(ValueError, match="not \\(8, 20\\)"):
        optimizer.load_state_dict(broken)
    for key in ("settings", "steps", "bases", "moments"):
        old = {name: value for name, value in ours.items() if name != key}
        with pytest.raises(ValueError, match=f"incomplete or too old: no '{key}'"):
            optimizer.load_state_dict({**state, "sebp": old})
    optimizer.load_state_dict(state)


def test_checkpoint_of_another_shape():
    """MeProp has no basis that would tell, and the elements would fit."""
    small, large = (nn.Sequential(nn.Linear(12, size)) for size in (20, 24))
    optimizers = [sebp.apply_meprop_to_model(net, sgd(net), 5, "*") for net in (small, large)]
    with pytest.raises(ValueError, match="other layers"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())


BREAKS = {
    "rank below k": (7, lambda ours: ours["bases"]["* 8x20"].update(u_in=torch.eye(20)[:1])),
    "fewer in a support": (7, lambda ours: cut(ours["moments"]["2"], 19)),
    "fewer chosen anew": (5, lambda ours: cut(ours["moments"]["2"], 19)),
    "more in a support": (5, lambda ours: ours["moments"]["2"].update(is_fixed=True)),
    "rank of the basis phase": (2, lambda ours: ours["settings"].update(rank=(9, 9))),
    "steps of the basis phase": (2, lambda ours: ours["settings"].update(basis_steps=0)),
    "used": (5, lambda ours: ours["moments"]["2"]["used"].fill_(2)),
    "used of others": (5, lambda ours: ours["moments"]["2"].update(used=torch.ones(3).byte())),
    "moments": (5, lambda ours: ours["moments"]["2"]["moment2"].fill_(-1)),
    "sums": (2, lambda ours: ours["sums"]["* 8x20"].update(energy=1e30)),
}


def cut(moments, count):
    moments.update({key: moments[key][:count] for key in ("indices", "moment1", "moment2", "used")})


@pytest.mark.parametrize(("stop", "breaks"), BREAKS.values(), ids=BREAKS)
@pytest.mark.parametrize("at", [1, 5, 7])
@pytest.mark.usefixtures("lapack")
def test_broken_checkpoints(stop, breaks, at):
    """What could not go on is refused, and nothing has changed."""

    def held(optimizer):
        saved = optimizer.state_dict()
        return [saved["state"], *(saved["sebp"][name] for name in ("sums", "bases", "moments"))]

    def run(steps):
        net = make_net()
        options = dict(layers="*", rank=7, fix_support_after=3)
        optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 20, 3, **options)
        for step in range(steps):
            backward(net, step)
            optimizer.step()
            optimizer.zero_grad()
        return net, optimizer

    saved = copy.deepcopy(run(stop)[1].state_dict())
    breaks(saved["sebp"])
    net, optimizer = run(at)
    before = copy.deepcopy(held(optimizer)), repr(optimizer), optimizer.settings
    with pytest.raises((ValueError, sebp.SebpError)):
        optimizer.load_state_dict(saved)
    torch.testing.assert_close(held(optimizer), before[0], rtol=0, atol=0)
    assert (repr(optimizer), optimizer.settings) == before[1:]
    backward(net, 0)
    optimizer.step()
