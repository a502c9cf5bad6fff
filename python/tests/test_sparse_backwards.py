# SPDX-License-Identifier: Apache-2.0
"""Gradients of few elements: backwards between steps, and who drops what they leave."""

import copy
import gc
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from sparse_nets import (  # noqa: E402
    OPTIONS,
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


@pytest.mark.parametrize("method", ["sparsegrad", "meprop"])
@pytest.mark.parametrize("fix_after", [None, 1])
def test_accumulation(method, fix_after):
    """Micro-batches add up to the batch, exactly on small integers."""
    weights = []
    x, dy = (torch.randint(-3, 4, (10, size)).float() for size in (12, 20))
    for parts in (1, 2, 5):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 20))
        if method == "sparsegrad":
            swap = np.eye(20, dtype=np.float32)[::-1].copy(), np.eye(12, dtype=np.float32)
            bases = {"* 20x12": Basis.from_vectors(*swap)}
            optimizer = sebp.apply_sparsegrad_to_model(
                net,
                adamw(net),
                30,
                layers="*",
                bases=bases,
                fix_support_after=fix_after,
                accumulate=True,
            )
        else:
            optimizer = sebp.apply_meprop_to_model(
                net, adamw(net), 30, "*", fix_support_after=fix_after, accumulate=True
            )
        for _ in range(3):
            for part_x, part_dy in zip(x.chunk(parts), dy.chunk(parts), strict=True):
                (net(part_x) * part_dy).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(net[0].weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_second_backward():
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*", bases=make_bases())
    net(torch.randn(9, 12)).sum().backward()
    with pytest.raises(RuntimeError, match="2: a second backward before the step"):
        net(torch.randn(9, 12)).sum().backward()
    optimizer.zero_grad()
    net(torch.randn(9, 12)).sum().backward()
    optimizer.step()
    net(torch.randn(9, 12)).sum().backward()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_grad_is_no_backward(options):
    """``torch.autograd.grad()`` gives what it is asked for and leaves no gradient behind."""
    weights = []
    for asks in (False, True):
        net, optimizer = meprop_net(**options)
        x = torch.randn(9, 12, requires_grad=True)
        if asks:
            (grad,) = torch.autograd.grad(net(x).square().sum(), x)
            assert grad.any()
            net(x).square().sum().backward(inputs=[x])
        backward(net, 1)
        if asks:
            torch.autograd.grad(net(x).sum(), net[2].bias)
        optimizer.step()
        weights.append([net[0].weight.detach(), net[2].weight.detach()])
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("who", ["optimizer", "model", "base", "by hand"])
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_zero_grad(options, who, when):
    """Whoever drops gradients, and wherever in the loop, those of the sparse layers are dropped."""
    weights = []
    for drops in (False, True):
        net, optimizer = meprop_net(**options)

        def zero_grad(net=net, optimizer=optimizer):
            if who == "by hand":
                for parameter in net.parameters():
                    parameter.grad = None
            else:
                {"optimizer": optimizer, "model": net, "base": optimizer.base}[who].zero_grad()

        if drops and when != "after":
            backward(net, 1)
        if when == "before":
            zero_grad()
        y = net(torch.ones(9, 12)).square().sum()
        if when == "between":
            zero_grad()
        y.backward()
        if when == "after" and drops:
            # Nothing is there that would move.
            zero_grad()
            before = copy.deepcopy(net.state_dict())
            optimizer.step()
            torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
            return
        optimizer.step()
        weights.append([parameter.detach() for parameter in net.parameters()])
    torch.testing.assert_close(*weights, rtol=0, atol=0)


WHERE_NOTHING_ELSE_TRAINS = {
    "meprop": lambda net, given: sebp.apply_meprop_to_model(
        net, adamw(net), 30, "*", fix_support_after=1, accumulate=given
    ),
    "mask": lambda net, given: sebp.apply_sparse_mask_to_model(
        net, adamw(net), 30, layers="*", accumulate=given
    ),
    "galore": lambda net, given: sebp.apply_galore_to_model(
        net, adamw(net), 3, "*", accumulate=given
    ),
}


@pytest.mark.parametrize("apply", WHERE_NOTHING_ELSE_TRAINS.values(), ids=WHERE_NOTHING_ELSE_TRAINS)
def test_nothing_else_trains(apply):
    """A zero_grad() of the model cannot be seen, so a second backward is refused or said for."""
    nets, optimizers = [], []
    for given in (False, True, False):
        torch.manual_seed(3)
        net = make_net()
        for layer in (net[0], net[2]):
            layer.bias.requires_grad_(False)
        nets.append(net)
        optimizers.append(apply(net, given))
        backward(net, 0)
        optimizers[-1].step()
    net, optimizer = nets[0], optimizers[0]
    backward(net, 1)
    net.zero_grad()
    with pytest.raises(RuntimeError, match="no parameter beside the sparse layers had a gradient"):
        backward(net, 2)
    optimizer.zero_grad()
    backward(net, 2)
    optimizer.step()
    backward(nets[2], 2)
    optimizers[2].step()
    assert torch.equal(net[0].weight, nets[2][0].weight)
    for seed in (1, 2):
        backward(nets[1], seed)
    optimizers[1].step()
    assert not torch.equal(net[0].weight, nets[1][0].weight)
    backward(nets[1], 3)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("who", ["optimizer", "model", "base", "by hand", "at the same place"])
def test_zeros_written_to_gradients(options, who):
    """``set_to_none=False`` before a backward drops what layers keep, too."""
    weights = []
    for drops in (False, True):
        net, optimizer = meprop_net(**options)
        if drops:
            backward(net, 1)
            if who in ("by hand", "at the same place"):
                for bias in (net[0].bias, net[2].bias):
                    if who == "at the same place":  # mostly, as what is freed is used again
                        bias.grad = None
                    bias.grad = torch.zeros_like(bias)
            else:
                one = {"optimizer": optimizer, "model": net, "base": optimizer.base}[who]
                one.zero_grad(set_to_none=False)
            assert not net[0].bias.grad.any()
        backward(net, 2)
        optimizer.step()
        weights.append([net[0].weight.detach(), net[2].weight.detach()])
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_gradients_that_are_zeros():
    """That of all else may be: it was not written, or clipped before the step."""
    weights = []
    for parts in (1, 2):
        torch.manual_seed(7)
        net = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Linear(20, 8))
        optimizer = sebp.apply_sparse_mask_to_model(net, adamw(net), 30, layers="0")
        net[1].weight.requires_grad_(False)
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(3))
        dy = torch.tensor([1.0, -1.0]).repeat(4)[:, None]  # whose sum, the bias's gradient, is 0
        for part, by in zip(x.chunk(parts), dy.chunk(parts), strict=True):
            (net(part) * by).sum().backward()
        assert torch.equal(net[1].bias.grad, torch.zeros(8))
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        weights.append(net[0].weight.detach())
    torch.testing.assert_close(*weights)
    torch.manual_seed(7)
    assert not torch.equal(weights[0], nn.Linear(12, 20, bias=False).weight)


@pytest.mark.parametrize("accumulate", [True, False])
def test_gradients_that_were_zeros_before_they_were_written(accumulate):
    """Clipping between two backwards, or ``zero_grad(set_to_none=False)``: it cannot be known."""
    weights = []
    for parts in (1, 2):
        torch.manual_seed(7)
        net = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Linear(20, 8))
        optimizer = sebp.apply_sparse_mask_to_model(
            net, adamw(net), 30, layers="0", accumulate=accumulate
        )
        net[1].weight.requires_grad_(False)
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(3))
        dy = torch.tensor([1.0, -1.0]).repeat(4)[:, None]
        for i, (part, by) in enumerate(zip(x.chunk(parts), dy.chunk(parts), strict=True)):
            loss = (net(part) * by).sum()
            if i == 1 and not accumulate:
                with pytest.raises(RuntimeError, match="a gradient other than zero"):
                    loss.backward()
                return
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        weights.append(net[0].weight.detach())
    torch.testing.assert_close(*weights)


def test_gradients_replaced_by_hand():
    """Other tensors in the place of gradients are no ``zero_grad()``; nor is a graph of them."""
    weights = []
    for replaces in (False, True):
        net, optimizer = meprop_net(accumulate=True)
        backward(net, 1)
        if replaces:
            net[0].bias.grad = net[0].bias.grad.clone()
            net[2].bias.grad = net[2].bias.grad.clone()
        backward(net, 2)
        optimizer.step()
        weights.append([net[0].weight.detach(), net[2].weight.detach()])
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("who", ["model", "base"])
@pytest.mark.parametrize("raises", [False, True])
def test_zero_grad_of_what_trains_behind(options, who, raises):
    """All other parameters have their new gradient before a sparse layer's backward begins.

    So after a backward that raised between the sparse layers, which never came to its end.
    """
    weights = []
    for drops in (False, True):
        torch.manual_seed(7)
        net = nn.Sequential(
            nn.Linear(12, 20, bias=False), nn.Linear(20, 8, bias=False), nn.Linear(8, 2)
        )
        optimizer = sebp.apply_meprop_to_model(net, adamw(net), 30, ["0", "1"], **options)
        backward(net, 0)
        optimizer.step()
        optimizer.zero_grad()
        if drops and raises:
            hidden = net[0](torch.ones(9, 12))
            hidden.register_hook(lambda grad: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                net[2](net[1](hidden)).sum().backward()
        elif drops:
            backward(net, 1)
        if drops:
            {"model": net, "base": optimizer.base}[who].zero_grad()
        backward(net, 2)
        optimizer.step()
        weights.append([parameter.detach() for parameter in net.parameters()])
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_backward_that_raises_keeps_the_sum():
    """Without ``zero_grad()`` what was summed before is kept, as that of other parameters is."""
    net, optimizer = meprop_net(accumulate=True)
    backward(net, 1)
    before = optimizer.layers["0"].whole.clone()
    y = net(torch.ones(9, 12))
    hidden = net[0](torch.ones(9, 12))
    hidden.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net[2](hidden).sum().backward()
    (0 * y).sum().backward()
    assert torch.equal(optimizer.layers["0"].whole, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_within_a_backward(reentrant):
    """Gradient checkpoints: nothing has a gradient yet where the inner backward begins."""
    weights = []
    for checkpoints in (False, True):
        torch.manual_seed(7)
        net = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Linear(20, 8, bias=False))
        optimizer = sebp.apply_meprop_to_model(net, adamw(net), 30, "*")
        for seed in range(2):
            x = torch.full((9, 12), seed + 1.0, requires_grad=True)
            if checkpoints:
                hidden = torch.utils.checkpoint.checkpoint(net[0], x, use_reentrant=reentrant)
            else:
                hidden = net[0](x)
            net[1](hidden).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([parameter.detach() for parameter in net.parameters()])
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_parameter_outside_the_model():
    """The optimizer's, but the model's ``zero_grad()`` leaves its gradient."""
    net, scale = make_net(), nn.Parameter(torch.ones(()))
    optimizer = sebp.apply_meprop_to_model(
        net, torch.optim.AdamW([*net.parameters(), scale]), 30, "*"
    )
    for _ in range(2):
        (scale * net(torch.ones(9, 12))).sum().backward()
        net.zero_grad()
    assert scale.grad is not None
    before = copy.deepcopy(net.state_dict())
    optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_released_is_freed():
    """At once, not when cycles are looked for; and no parameter has a hook any more."""
    net, optimizer = meprop_net()
    backward(net, 1)
    optimizer.step()
    optimizer.release()
    assert not any(parameter._backward_hooks for parameter in net.parameters())
    objects = net, net[0].weight, optimizer, optimizer.base
    alive = [weakref.ref(one) for one in objects]
    gc.collect()
    gc.disable()
    try:
        del net, optimizer, objects
        assert not any(one() is not None for one in alive)
    finally:
        gc.enable()


@pytest.mark.usefixtures("lapack")
def test_second_backward_in_the_basis_phase():
    """What would fail after the basis phase fails in it, at the first step."""
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, 3, layers="*")
    for drop in (optimizer.zero_grad, net.zero_grad, optimizer.step):
        backward(net, 0)
        with pytest.raises(RuntimeError, match="2: a second backward before the step"):
            backward(net, 1)
        drop()
        optimizer.zero_grad()
    for _ in range(2):
        backward(net, 1)
        optimizer.step()
        net.zero_grad()
    assert not optimizer.in_basis_phase
    twice = nn.Linear(4, 4)
    optimizer = sebp.apply_sparsegrad_to_model(twice, adamw(twice), 5, 3, layers="*")
    with pytest.raises(RuntimeError, match="a second call of the layer"):
        twice(twice(torch.ones(2, 4))).sum().backward()
    summing = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(
        summing, adamw(summing), 5, 3, layers="*", accumulate=True
    )
    for _ in range(5):
        backward(summing, 0)
        backward(summing, 1)
        optimizer.step()
        optimizer.zero_grad()
    assert not optimizer.in_basis_phase


@pytest.mark.parametrize("options", [OPTIONS["accumulate"], OPTIONS["fixed"]])
def test_layer_that_runs_twice(options):
    """Its gradient is the sum, whatever dense gradients are there already."""
    net, optimizer = meprop_net(**options)
    twin = copy.deepcopy(net).requires_grad_(True)
    for model in (net, twin):
        x = torch.full((9, 12), 0.5)
        (model(x).square().sum() + model(x + 1).square().sum()).backward()
    for name in ("0", "2"):
        layer = optimizer.layers[name]
        assert layer.finish_gradient(sebp.sparse.AdamW())
        want = twin.get_submodule(name).weight.grad.flatten()[layer.gradient.indices.copy()]
        assert want.any()
        torch.testing.assert_close(torch.from_numpy(layer.gradient.values), want)


def test_failed_step_keeps_the_sum():
    """A step refused for a number of its group can be taken later, with more backwards before."""
    weights = []
    for fails in (False, True):
        net, optimizer = meprop_net(accumulate=True)
        backward(net, 1)
        if fails:
            optimizer.param_groups[0]["lr"] = -1.0
            with pytest.raises(sebp.SebpError):
                optimizer.step()
            optimizer.param_groups[0]["lr"] = 3e-3
        backward(net, 2)
        optimizer.step()
        weights.append([parameter.detach() for parameter in net.parameters()])
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.usefixtures("lapack")
def test_backward_of_an_old_graph():
    """A backward of what was computed in another phase, or before release(), does no harm."""
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, 3, layers="*")
    states, outputs = [], []
    for _ in range(4):
        states.append(copy.deepcopy(optimizer.state_dict()))
        outputs.append(net[2](torch.randn(3, 20)).sum())
        backward(net, 1)
        optimizer.step()
        optimizer.zero_grad()
    outputs[0].backward()
    backward(net, 2)
    optimizer.load_state_dict(states[0])
    outputs[3].backward()
    backward(net, 2)
    optimizer.release()
    net.zero_grad()
    outputs[2].backward()
    net.zero_grad()
    backward(net, 1)
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("order", ["before", "behind"])
def test_other_hooks(order):
    """The gradient is that of the layer's own output, not of what a hook makes of it."""
    net = nn.Sequential(nn.Linear(12, 20))
    twin = copy.deepcopy(net)
    twin[0].register_forward_hook(lambda module, args, y: 3 * y)
    if order == "before":
        net[0].register_forward_hook(lambda module, args, y: 3 * y)
    optimizer = sebp.apply_meprop_to_model(net, adamw(net), 240, "*")
    if order == "behind":
        net[0].register_forward_hook(lambda module, args, y: 3 * y)
    for model in (net, twin):
        backward(model, 0)
    gradient = optimizer.layers["0"].gradient.values.reshape(20, 12)
    np.testing.assert_allclose(gradient, twin[0].weight.grad, rtol=1e-4, atol=1e-4)


def test_profile_is_no_backward():
    x = torch.randn(6, 12)
    weights = []
    for profiles in (False, True):
        torch.manual_seed(3)
        model = make_net()
        optimizer = sebp.apply_meprop_to_model(model, sgd(model), k=5, layers="*")
        model(x).square().sum().backward()
        if profiles:
            sebp.profile(model, x, loss=lambda y: y.sum())
        optimizer.step()
        weights.append(model[0].weight.detach())
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)
    torch.manual_seed(3)
    assert not torch.equal(weights[0], make_net()[0].weight)


def test_meprop_is_the_top_of_the_gradient():
    net, twin = make_net(), make_net()
    twin.load_state_dict(net.state_dict())
    k = 17
    optimizer = sebp.apply_meprop_to_model(net, adamw(net, weight_decay=0.1), k, "*")
    x = torch.randn(30, 12)
    net(x).square().sum().backward()
    optimizer.step()
    twin(x).square().sum().backward()
    for layer, plain in ((net[0], twin[0]), (net[2], twin[2])):
        assert torch.equal(layer.bias.grad, plain.bias.grad)
        grad = plain.weight.grad.flatten()
        at = grad.abs().topk(k).indices
        want = plain.weight.detach().flatten() * (1 - 3e-4)
        want[at] -= 3e-3 * grad[at].sign()
        torch.testing.assert_close(layer.weight.detach().flatten(), want, rtol=0, atol=1e-6)
