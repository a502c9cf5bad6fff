# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy by the library, and logits that are computed when something reads them."""

import copy
import pickle

import pytest
import torch
from logits import LABELS, LOSSES, close, head_and_logits, leaves
from models import make_batch, make_model
from torch.nn import functional

import sebp
from sebp.torch import linear_cross_entropy
from sebp.torch.blocks.logits import Logits

F32, BF16 = torch.float32, torch.bfloat16


# --------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("sizes", [((4, 7), 24, 65), ((9,), 16, 3), ((2, 3), 130, 1000)])
def test_is_the_cross_entropy_of_the_logits(dtype, reduction, smoothing, has_bias, sizes):
    torch.manual_seed(0)
    lead, k, v = sizes
    hidden, weight, bias = leaves((*lead, k), (v, k), (v,), dtype=dtype)
    labels = torch.randint(0, v, lead)
    labels[torch.rand(lead) < 0.4] = -100
    labels[(0,) * len(lead)] = 1
    inputs = [hidden, weight, bias] if has_bias else [hidden, weight]
    options = {"reduction": reduction, "label_smoothing": smoothing}
    loss = linear_cross_entropy(hidden, weight, labels, bias if has_bias else None, **options)
    logits = hidden.double() @ weight.double().t() + (bias.double() if has_bias else 0)
    right = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)
    assert loss.dtype == F32 and loss.shape == ()
    assert abs(float(loss.detach() - right.detach())) <= 2e-6 * abs(float(right.detach()))
    ours = torch.autograd.grad(3 * loss, inputs)
    known = torch.autograd.grad(3 * right, inputs)
    for one, other in zip(ours, known, strict=True):
        assert one.dtype == dtype
        close(one, other, 2e-6 if dtype == F32 else 1e-2)


def test_rows_without_a_label_have_no_gradient():
    hidden, weight = leaves((5, 8), (11, 8))
    labels = torch.tensor([1, -100, 2, -100, 3])
    with torch.no_grad():
        hidden[1] = torch.nan
    (dx,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden)
    assert bool((dx[1] == 0).all() and dx[0].ne(0).any() and dx.isfinite().all())


def test_of_no_labels_it_is_nan_and_the_sum_zero():
    hidden, weight = leaves((3, 8), (11, 8))
    labels = torch.full((3,), -100)
    loss = linear_cross_entropy(hidden, weight, labels)
    assert bool(loss.isnan())
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(loss, (hidden, weight)))
    assert float(linear_cross_entropy(hidden, weight, labels, reduction="sum")) == 0


def test_batched_gradients():
    hidden, weight = leaves((3, 8), (11, 8))
    loss, dloss = linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3])), torch.randn(4)
    (known,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (ours,) = torch.autograd.grad(loss, weight, dloss, is_grads_batched=True)
    assert torch.allclose(ours, dloss[:, None, None] * known, atol=1e-6)


def test_another_label_may_be_ignored():
    torch.manual_seed(0)
    hidden, weight = leaves((3, 8), (11, 8))
    labels = torch.tensor([0, 5, 0])
    ours = linear_cross_entropy(hidden, weight, labels, ignore_index=0)
    right = functional.cross_entropy(hidden @ weight.t(), labels, ignore_index=0)
    assert torch.allclose(ours, right, atol=1e-6)


def test_a_second_backward_gives_the_same_and_second_derivatives_are_refused():
    hidden, weight = leaves((3, 8), (11, 8))
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3]))
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(2 * loss, (hidden, weight), retain_graph=True)
    assert all(torch.allclose(2 * a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        (torch.tensor([1, 2, 11]), sebp.SebpError),
        (torch.tensor([1, 2, -1]), sebp.SebpError),
        (torch.tensor([1, 2]), ValueError),
        (torch.tensor([1.0, 2.0, 3.0]), TypeError),
    ],
)
def test_wrong_labels_are_refused(labels, error):
    hidden, weight = leaves((3, 8), (11, 8))
    with pytest.raises(error):
        linear_cross_entropy(hidden, weight, labels)


def test_wrong_options_are_refused():
    hidden, weight = leaves((3, 8), (11, 8))
    labels = torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match="none"):
        linear_cross_entropy(hidden, weight, labels, reduction="none")
    with pytest.raises(sebp.SebpError):
        linear_cross_entropy(hidden, weight, labels, label_smoothing=1.5)
    with pytest.raises(TypeError):
        linear_cross_entropy(hidden.double(), weight.double(), labels)


# --------------------------------------------------------------------------------------------------
# Logits that are deferred


def losses_and_gradients(model, batch, loss_of=lambda model, batch: model(**batch).loss):
    model.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(ours, right):
    close(ours[0], right[0], 1e-5)
    largest = max(float(g.abs().max()) for g in right[1].values())
    for name, gradient in ours[1].items():
        assert float((gradient - right[1][name]).abs().max()) <= 2e-5 * largest, name


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_language_models_train_without_logits(name):
    model, batch = make_model(name).train(), make_batch(name, 1)
    right = losses_and_gradients(model, batch)
    with sebp.prepare(model, defer_logits=True, quiet=True) as prepared:
        assert prepared.heads == ["lm_head"] and "computed when read" in str(prepared)
        model(**batch)  # the first of its kind is compared, and so reads them
        output = model(**batch)
        assert type(output.logits) is Logits and not output.logits.source.is_computed
        assert output.logits.shape == (4, 16, 99) and output.logits.requires_grad
        assert_same(losses_and_gradients(model, batch), right)
        assert not output.logits.source.is_computed
        model.eval()
        assert type(model(**batch).logits) is torch.Tensor
        model.train()
        with torch.no_grad():
            assert type(model(**batch).logits) is torch.Tensor
    assert type(model(**batch).logits) is torch.Tensor
    assert "forward" not in vars(model.lm_head)


def test_without_the_option_logits_are_there():
    model, batch = make_model("llama").train(), make_batch("llama", 1)
    with sebp.prepare(model, quiet=True):
        assert type(model(**batch).logits) is torch.Tensor


OTHERS = {
    "one class": lambda y: y[..., 5].square().mean(),
    "some classes": lambda y: functional.cross_entropy(
        y[..., :6].flatten(0, 1), LABELS.flatten() % 5
    ),
    "each loss": lambda y: functional.cross_entropy(
        y.view(-1, 11), LABELS.view(-1), reduction="none"
    ).mean(),
    "weights": lambda y: functional.cross_entropy(
        y.view(-1, 11), LABELS.view(-1), weight=torch.arange(11.0)
    ),
    "classes second": lambda y: functional.cross_entropy(y.transpose(1, 2), LABELS),
    "probabilities": lambda y: functional.cross_entropy(
        y.view(-1, 11), torch.full((10, 11), 1 / 11)
    ),
    "divided": lambda y: functional.cross_entropy((y / 2).view(-1, 11), LABELS.view(-1)),
    "softmax": lambda y: (y.log_softmax(-1) * torch.arange(11.0)).mean(),
    "another shape": lambda y: y.view(-1, 55).square().mean(),
    "float64": lambda y: y.double().mean() + y.to(torch.float64).sum(),
    "an index": lambda y: y[1, 2].sum() + y[:, torch.tensor([0, 3])].square().sum(),
    "stacked": lambda y: torch.stack([y, y]).square().sum(),
    "operators": lambda y: (y @ torch.ones(11, 1)).sum() + (-y).exp().sum() + (y > 0).sum(),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", [*LOSSES, *OTHERS])
def test_losses_are_the_same(name, bias):
    loss_of = LOSSES.get(name) or OTHERS[name]
    head, hidden, ours, right = head_and_logits(bias)
    inputs = [hidden, *head.parameters()]
    one, known = loss_of(ours), loss_of(right)
    assert type(one) is torch.Tensor and one.dtype == known.dtype
    assert ours.source.is_computed == (name in OTHERS)
    close(one, known, 1e-6)
    pairs = zip(torch.autograd.grad(one, inputs), torch.autograd.grad(known, inputs), strict=True)
    for gradient, other in pairs:
        close(gradient, other, 2e-6)


def test_what_is_read_later_is_the_same():
    head, _, ours, right = head_and_logits()
    flat = ours.view(-1, 11)
    functional.cross_entropy(flat, LABELS.view(-1)).backward()
    assert torch.equal(ours.argmax(-1), right.argmax(-1))
    assert torch.allclose(flat.detach(), right.detach().view(-1, 11))
    assert flat.data_ptr() == ours.data_ptr() == flat.data_ptr()
    assert ours.tolist() == right.tolist() and repr(ours) == repr(right)


def test_numbers_changed_in_place_are_seen():
    _, _, ours, right = head_and_logits()
    ours, right = ours * 1, right * 1
    assert type(ours) is torch.Tensor
    _, _, ours, right = head_and_logits()
    flat = ours.view(-1, 11)
    with torch.no_grad():
        ours.detach().zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        functional.cross_entropy(flat, LABELS.view(-1))
    assert bool((ours.detach() == 0).all())


@pytest.mark.parametrize("read", [lambda y: y.sum(), LOSSES["shifted"]])
def test_weights_changed_since_are_an_error(read):
    head, _, ours, _ = head_and_logits()
    with torch.no_grad():
        head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="the weights have changed"):
        read(ours)


def test_read_before_they_stay():
    head, _, ours, right = head_and_logits()
    ours.sum()
    with torch.no_grad():
        head.weight.mul_(2)
    assert torch.allclose(ours.detach(), right.detach())


class Double(torch.autograd.Function):
    """A function of somebody else, which autograd calls past ``__torch_function__``."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


@pytest.mark.parametrize("change", [lambda y: y, lambda y: y.view(-1, 11)])
def test_functions_of_others_see_numbers_and_give_gradients(change):
    head, hidden, ours, right = head_and_logits()
    inputs = [hidden, *head.parameters()]
    one, known = Double.apply(change(ours)).square().sum(), (change(right) * 2).square().sum()
    close(one, known, 1e-6)
    pairs = zip(torch.autograd.grad(one, inputs), torch.autograd.grad(known, inputs), strict=True)
    for gradient, other in pairs:
        close(gradient, other, 2e-6)


def test_copies_and_pickles_are_numbers(tmp_path):
    _, _, ours, right = head_and_logits()
    torch.save(ours, tmp_path / "logits.pt")
    for other in (
        torch.load(tmp_path / "logits.pt"),
        pickle.loads(pickle.dumps(ours)),
        copy.deepcopy(ours.detach()),
    ):
        assert type(other) is torch.Tensor and torch.allclose(other.detach(), right.detach())


def test_float64_and_autocast_to_float16_have_logits_at_once():
    head, hidden, _, _ = head_and_logits()
    with torch.autocast("cpu", torch.float16):
        assert type(head(hidden)) is torch.Tensor
    assert type(head.double()(hidden.double())) is torch.Tensor


@pytest.mark.parametrize("of_hidden", [F32, BF16])
@pytest.mark.parametrize("within", [True, False])
def test_autocast(of_hidden, within):
    """The product is that of bfloat16, wherever the loss is asked for."""
    head, hidden, _, _ = head_and_logits()
    hidden = hidden.detach().to(of_hidden).requires_grad_()
    right = functional.linear(hidden.to(BF16), head.weight.to(BF16), head.bias.to(BF16))
    with torch.autocast("cpu", BF16):
        ours = head(hidden)
        loss = LOSSES["by a module"](ours) if within else None
    loss = LOSSES["by a module"](ours) if loss is None else loss
    known = LOSSES["by a module"](right)
    assert type(ours) is Logits and ours.dtype == BF16 and not ours.source.is_computed
    assert loss.dtype == F32 and abs(float(loss.detach() - known.detach())) < 0.02
    inputs = [hidden, *head.parameters()]
    pairs = zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(known, inputs), strict=True)
    for gradient, other in pairs:
        assert gradient.dtype == other.dtype
        close(gradient.float(), other.float(), 0.03)
    assert ours.detach().dtype == BF16
    assert torch.allclose(ours.detach().float(), right.detach().float(), atol=0.02)


@pytest.mark.parametrize("of_call", [False, True])
@pytest.mark.parametrize("of_loss", [False, True])
@pytest.mark.parametrize("of_hidden", [F32, BF16])
@pytest.mark.parametrize("name", ["shifted", "by a module", "summed"])
def test_losses_have_pytorchs_dtype(of_call, of_loss, of_hidden, name):
    head, hidden, _, _ = head_and_logits()
    head, hidden = head.to(of_hidden), hidden.detach().to(of_hidden).requires_grad_()
    with torch.autocast("cpu", BF16, enabled=of_call):
        ours, right = head(hidden), functional.linear(hidden, head.weight, head.bias)
    with torch.autocast("cpu", BF16, enabled=of_loss):
        one, known = LOSSES[name](ours), LOSSES[name](right)
    assert not ours.source.is_computed and one.dtype == known.dtype
    assert abs(float(one.detach() - known.detach())) <= 0.01 * float(known.detach())


def test_compiled_heads_have_logits():
    head, hidden, _, right = head_and_logits()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(hidden), right, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_language_models_under_autocast(name):
    model, batch = make_model(name).train(), make_batch(name, 1)
    with torch.autocast("cpu", BF16):
        right = losses_and_gradients(model, batch)
        with sebp.prepare(model, defer_logits=True, quiet=True):
            model(**batch)
            output = model(**batch)
            assert type(output.logits) is Logits and not output.logits.source.is_computed
            ours = losses_and_gradients(model, batch)
    assert abs(float(ours[0] - right[0])) < 0.02
    for key, gradient in ours[1].items():
        assert gradient.dtype == F32
        close(gradient, right[1][key], 0.1)


def test_bfloat16():
    model, batch = make_model("llama").train().to(BF16), make_batch("llama", 1)
    right = losses_and_gradients(model, batch)
    with sebp.prepare(model, defer_logits=True, quiet=True):
        model(**batch)
        output = model(**batch)
        assert type(output.logits) is Logits and output.logits.dtype == BF16
        ours = losses_and_gradients(model, batch)
    assert abs(float(ours[0] - right[0])) < 0.02
    for name, gradient in ours[1].items():
        assert gradient.dtype == BF16
        close(gradient.float(), right[1][name].float(), 0.1)
