# SPDX-License-Identifier: Apache-2.0
"""Whatever is done with deferred logits gives the same numbers and gradients, or an error."""

import pytest
import torch
from logits import LABELS, LOSSES, close, head_and_logits
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sebp._rules import Rule
from sebp.torch.blocks.logits import Logits, head_forward
from sebp.torch.common.forward import as_it_is, put_in
from sebp.torch.linear_layers.linear import give_rule


def in_place(change):
    """Change derived logits in place, and read these again."""

    def loss_of(y):
        derived = change(y)
        derived.div_(3)
        derived.register_hook(lambda dy: dy * 2)
        return derived.logsumexp(-1).sum() + derived.square().sum()

    return loss_of


def read_with_inference(y):
    loss = functional.cross_entropy(y.view(-1, 11), LABELS.view(-1))
    with torch.inference_mode():
        y.view(-1, 11).argmax(-1)
    return loss + y.logsumexp(-1).square().mean()


def without_gradients(y):
    with torch.no_grad():
        fixed = y[:, 1:].exp()
        shifted = y[:, :-1].contiguous()
    return (fixed * y[:, :-1]).sum() + (shifted * y[:, 1:]).sum()


def with_retained(y):
    flat = y.view(-1, 11)
    flat.retain_grad()
    functional.cross_entropy(flat, LABELS.view(-1)).backward(retain_graph=True)
    return (flat.grad.square() * flat).sum()


AT_ONCE = {
    "changed in place": in_place(lambda y: y[:, 1:]),
    "a copy changed in place": in_place(lambda y: y[:, 1:].contiguous()),
    "a flat copy changed in place": in_place(lambda y: y[:, :-1].reshape(-1, 11)),
    "masked and changed in place": in_place(lambda y: y[LABELS != -100]),
    "read in inference mode": read_with_inference,
    "partly without gradients": without_gradients,
    "a retained gradient": with_retained,
    "in a checkpoint": lambda y: checkpoint(
        lambda z: z.view(-1, 11).logsumexp(-1).sum(), y, use_reentrant=False
    ),
    "arguments with names": lambda y: (
        y.contiguous(memory_format=torch.contiguous_format).reshape(shape=(-1, 11))
        * y.float(memory_format=torch.preserve_format).view(size=(10, 11))
    ).sum(),
}


@pytest.mark.parametrize("name", AT_ONCE)
def test_whatever_is_done_gives_the_same(name):
    head, hidden, ours, right = head_and_logits()
    inputs = [hidden, *head.parameters()]
    one, known = AT_ONCE[name](ours), AT_ONCE[name](right)
    close(one, known, 1e-6)
    pairs = zip(torch.autograd.grad(one, inputs), torch.autograd.grad(known, inputs), strict=True)
    for gradient, other in pairs:
        close(gradient, other, 2e-6)


def test_reentrant_checkpoints():
    head, hidden, ours, right = head_and_logits()
    found = []
    for one in (ours, right):
        checkpoint(lambda y: y.view(-1, 11).logsumexp(-1).sum(), one, use_reentrant=True).backward()
        found.append((hidden.grad, head.weight.grad, head.bias.grad))
        hidden.grad = head.weight.grad = head.bias.grad = None
    for gradient, other in zip(*found, strict=True):
        close(gradient, other, 2e-6)


def test_derived_without_gradients_they_have_none():
    head, hidden, ours, _ = head_and_logits()
    with torch.no_grad():
        flat = ours.view(-1, 11)
        assert not functional.cross_entropy(flat, LABELS.view(-1)).requires_grad
    assert not ours.source.is_computed
    assert not functional.cross_entropy(flat, LABELS.view(-1)).requires_grad
    (gradient,) = torch.autograd.grad(flat.square().sum(), hidden, allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize(
    "ask",
    [
        lambda loss, y: y.register_hook(lambda dy: dy),
        lambda loss, y: y.retain_grad(),
        lambda loss, y: torch.autograd.grad(loss, y),
        lambda loss, y: torch.autograd.grad(loss, [y], allow_unused=True),
        lambda loss, y: loss.backward(inputs=[y]),
        lambda loss, y: torch.autograd.backward(loss, inputs=y),
        lambda loss, y: y.grad,
    ],
)
def test_gradients_of_logits_left_out_are_an_error(ask):
    _, _, ours, _ = head_and_logits()
    flat = ours.view(-1, 11)
    loss = functional.cross_entropy(flat, LABELS.view(-1))
    for one in (ours, flat):
        with pytest.raises(RuntimeError, match="get no gradient"):
            ask(loss, one)


def test_asked_for_before_gradients_are_there():
    _, _, ours, right = head_and_logits()
    for one in (ours, right):
        one.retain_grad()
        functional.cross_entropy(one.view(-1, 11), LABELS.view(-1)).backward()
    close(ours.grad, right.grad, 1e-6)


@pytest.mark.parametrize("wrong", [11, -1])
def test_labels_out_of_range_are_pytorchs_error(wrong):
    _, _, ours, _ = head_and_logits()
    with pytest.raises(IndexError, match="out of bounds"):
        functional.cross_entropy(ours.view(-1, 11), torch.full((10,), wrong))


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data.mul_(2),
        lambda weight: weight.data[10, 7].add_(1e-3),
        lambda weight: setattr(weight, "data", weight.data.clone()),
        lambda weight: weight.detach().numpy().fill(0),
    ],
)
def test_weights_changed_past_their_version_are_an_error(change):
    head, _, ours, _ = head_and_logits()
    change(head.weight)
    with pytest.raises(RuntimeError, match="the weights have changed"):
        ours.sum()


def double_for_one_call(head, hidden):
    tensors = {name: (2 * p).detach().requires_grad_() for name, p in head.named_parameters()}
    return torch.func.functional_call(head, tensors, hidden), [*tensors.values()]


def replace_the_weight(head, hidden):
    logits, inputs = head(hidden), [*head.parameters()]
    head.weight = nn.Parameter(torch.zeros_like(head.weight))
    return logits, inputs


def thaw_the_weight(head, hidden):
    head.weight.requires_grad_(False)
    logits = head(hidden)
    head.weight.requires_grad_()
    return logits, [*head.parameters()]


def normalize_the_weight(head, hidden):
    """Compute the weight anew at each call, as ``weight_norm`` does."""
    head.weight_g = nn.Parameter(torch.ones(()))
    weight = head.weight.detach()
    del head.weight
    head.register_forward_pre_hook(lambda m, x: setattr(m, "weight", m.weight_g * weight))
    logits, scale = head(hidden), head.weight_g
    head.weight_g = nn.Parameter(torch.full((), 3.0))
    head(hidden)
    return logits, [scale, head.bias]


@pytest.mark.parametrize("how", ["loss", "read"])
@pytest.mark.parametrize("has_rule", [False, True])
@pytest.mark.parametrize(
    "call", [double_for_one_call, replace_the_weight, thaw_the_weight, normalize_the_weight]
)
def test_logits_are_of_the_weights_of_their_call(call, has_rule, how):
    loss = LOSSES["shifted"] if how == "loss" else lambda y: y.square().sum()
    found = []
    for is_deferred in (True, False):
        torch.manual_seed(1)
        head, hidden = nn.Linear(8, 11), torch.randn(2, 5, 8)
        if has_rule:
            give_rule(head, Rule())
        if is_deferred:
            put_in(head, head_forward)
        logits, inputs = call(head, hidden)
        assert isinstance(logits, Logits) is is_deferred
        value = loss(logits)
        found.append((value, *torch.autograd.grad(value, inputs, allow_unused=True)))
    for one, right in zip(*found, strict=True):
        assert (one is None) is (right is None)
        if right is not None:
            close(one, right, 2e-6)


def test_what_tokens_were_taken_by_may_change():
    _, _, ours, right = head_and_logits()
    mask, first = LABELS > 4, torch.tensor(1)
    of_ours, of_right = ((y[mask], y[:, first : first + 2]) for y in (ours, right))
    mask.logical_not_()
    first.fill_(0)
    for one, other in zip(of_ours, of_right, strict=True):
        close(one, other, 1e-6)


def test_weights_of_nan_have_not_changed():
    head, hidden, _, _ = head_and_logits()
    with torch.no_grad():
        head.weight.fill_(torch.nan)
    assert bool(head(hidden).isnan().all())


def test_weights_changed_between_logits_and_their_gradient_are_an_error():
    head, _, ours, _ = head_and_logits()
    total = ours.square().sum()
    with torch.no_grad():
        head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        total.backward()


def test_logits_are_keys():
    _, _, ours, _ = head_and_logits()
    flat = ours.view(-1, 11)
    assert {ours: 1, flat: 2}[flat] == 2 and hash(flat) == hash(flat)
    assert not ours.source.is_computed


HOOKS = {
    "backward": lambda head: head.register_full_backward_hook(lambda m, dx, dy: (dx[0] * 3,)),
    "before backward": lambda head: head.register_full_backward_pre_hook(
        lambda m, dy: (dy[0] * 3,)
    ),
    "forward": lambda head: head.register_forward_hook(lambda m, x, y: y * 3),
    "in place": lambda head: head.register_forward_hook(lambda m, x, y: y.mul_(3)),
    "before forward": lambda head: head.register_forward_pre_hook(lambda m, x: x[0] * 3),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_on_the_head(name):
    head, hidden, _, _ = head_and_logits()
    HOOKS[name](head)

    def gradients():
        return torch.autograd.grad(LOSSES["shifted"](head(hidden)), [hidden, *head.parameters()])

    ours = gradients()
    with as_it_is(head):
        right = gradients()
    for one, other in zip(ours, right, strict=True):
        close(one, other, 2e-6)


def test_a_head_takes_its_argument_by_name():
    head, hidden, _, right = head_and_logits()
    assert torch.equal(head(input=hidden), right)


def test_a_class_that_is_patched_runs_as_patched(monkeypatch):
    head, hidden, _, _ = head_and_logits()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x * 0)
    assert type(head(hidden)) is torch.Tensor and not head(hidden).any()
