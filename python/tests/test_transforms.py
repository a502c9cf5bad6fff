# SPDX-License-Identifier: Apache-2.0
"""Derivatives of ``torch.func`` and of forward mode: PyTorch's, or an error, but never dropped."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import sebp
from sebp.torch.attention.attend import Pattern, attend
from sebp.torch.attention.texts import Texts


def squares(model, parameters, x):
    return torch.func.functional_call(model, parameters, (x,)).square().sum()


TRANSFORMS = {
    "jvp": lambda model, parameters, x: torch.func.jvp(model, (x,), (x.sin(),))[1],
    "grad": lambda model, parameters, x: torch.func.grad(lambda own: squares(model, own, x))(
        parameters
    )["0.weight"],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_compiled_transforms_of_linear_layers(name):
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    ours, found = copy.deepcopy(plain), []
    sebp.prepare(ours, quiet=True)
    x = torch.randn(2, 4)
    for model in (plain, ours):
        parameters = {key: one.detach() for key, one in model.named_parameters()}

        @torch.compile(backend="eager")
        def run(x, model=model, parameters=parameters):
            return TRANSFORMS[name](model, parameters, x)

        found.append(run(x))
    assert found[0].abs().max() > 0.01
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("what", ["linear", "attention"])
def test_operators_drop_no_tangents(what, in_backward):
    x = torch.randn(2, 5, 8, requires_grad=in_backward)
    weight = torch.randn(8, 8)

    def of(x):
        if what == "linear":
            return torch.ops.sebp.linear(x, weight)
        heads = x.unflatten(2, (2, 4)).transpose(1, 2)
        return attend(heads, heads, heads, Texts.of_rows(2, 5, 5), Pattern(False))

    y = of(x) if in_backward else None
    with forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match="sebp"):
        if in_backward:
            torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))
        else:
            of(forward_ad.make_dual(x, torch.ones_like(x)))


def test_graphs_with_attention_drop_no_tangents():
    @torch.compile(backend="eager")
    def run(x):
        texts = torch.tensor([0, 2, 5])
        pattern = torch.tensor([0, -1, -1])
        return torch.ops.sebp.attention(x, x, x, None, texts, texts, pattern, None, 2, 2, 0.5)[0]

    x = torch.randn(1, 5, 8)
    run(x)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="sebp::attention"):
        run(forward_ad.make_dual(x, x))
