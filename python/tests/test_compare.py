# SPDX-License-Identifier: Apache-2.0
"""One step of a model as it is and with SEBP."""

import copy
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")

from models import make_batch, make_model  # noqa: E402
from test_prepare import insides, same_insides  # noqa: E402
from torch import nn  # noqa: E402

import sebp  # noqa: E402
from sebp.torch.common.forward import put_in, take_out  # noqa: E402
from sebp.torch.report.parts import parts_of  # noqa: E402

# Tiny models gain no time, or as much as the machine's other work leaves.
pytestmark = pytest.mark.filterwarnings(
    "ignore:sebp.compare. no time is gained", "ignore:sebp.compare. 100.0% of the rows"
)


def make_plain():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 3))


def loss_of_some(y):
    return y[:3].square().mean()


def random_states():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def same_random_states(before):
    now = random_states()
    assert torch.equal(before[0], now[0])
    assert before[1] == now[1]
    assert all(np.array_equal(a, b) for a, b in zip(before[2], now[2], strict=True))


def compare(model, batch, **arguments):
    return sebp.compare(model, batch, repetitions=2, **arguments)


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_model_of_transformers(name, mode):
    model = make_model(name).train(mode == "training")
    batch = make_batch(name, 1)
    found = compare(model, batch)
    loss = model(**batch).loss.item()
    assert found.plain.loss == pytest.approx(loss, rel=1e-6)
    assert found.ours.loss == pytest.approx(loss, rel=1e-5)
    # Decoders in evaluation run with padding, and sums without their zeros have the same bits.
    assert (mode == "evaluation" and not found.differs) or 0 < found.difference < 1e-4
    assert not found.differs or found.differs in dict(model.named_parameters())
    assert found.real == float(batch["attention_mask"].float().mean())
    assert 0 < found.activity <= found.real + 1e-6
    assert not found.has_dropout
    assert found.plain.seconds > 0
    assert not [text for text in found.warnings if "rounding" in text]
    assert f"{mode}, 2 pairs of steps" in str(found)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("name", ["bert", "plain"])
def test_leaves_all_as_it_was(name, prepared):
    """Weights, gradients, buffers, hooks, modes, counts and random numbers."""
    if name == "plain":
        model, batch, loss = make_plain().train(), torch.randn(9, 6), loss_of_some
        model[2].eval()
    else:
        model, batch, loss = make_model(name).train(), make_batch(name, 1), None
        model.config.hidden_dropout_prob = 0.5
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
    if prepared:
        report = sebp.prepare(model, quiet=True)
        if name == "bert":
            model(**batch).loss.backward()
            assert report.padding.calls == {"": 1}
            tokens = dict(report.padding.tokens)
    calls = []
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
        parameter.register_post_accumulate_grad_hook(calls.append)
    gradients = {key: (p.grad, p.grad.clone()) for key, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    before, states = insides(model), random_states()
    compare(model, batch, loss=loss, optimizer_step=True)
    same_random_states(states)
    same_insides(before, insides(model))
    assert [module.training for module in model.modules()] == modes
    for key, parameter in model.named_parameters():
        assert parameter.grad is gradients[key][0]
        assert torch.equal(parameter.grad, gradients[key][1])
    assert not calls
    if prepared and name == "bert":
        assert report.padding.calls == {"": 1}
        assert report.padding.tokens == tokens


def test_gradients_of_the_batch():
    model, x = make_plain(), torch.randn(9, 6, requires_grad=True)
    y = x * 2
    for batch in (x, [x], {"input": x}, y):
        assert compare(model, batch, loss=loss_of_some).difference < 1e-4
    assert x.grad is None
    y.sum().backward()


def test_error_leaves_all_as_it_was():
    model = make_plain()

    def loss(y):
        torch.rand(1)
        raise ZeroDivisionError

    x = torch.randn(9, 6)
    before, states = insides(model), random_states()
    with pytest.raises(ZeroDivisionError):
        compare(model, x, loss=loss)
    same_insides(before, insides(model))
    same_random_states(states)


# --------------------------------------------------------------------------------------------------
# A comparison that can fail


def test_notices_a_wrong_gradient():
    """Rows left out that are not zero: the loss is right, gradients are not."""
    model = make_plain().eval()
    sebp.apply_sebp_to_model(model, rows=1)
    with pytest.warns(UserWarning, match="a gradient, that of .*: not rounding"):
        found = compare(model, torch.randn(9, 6), loss=lambda y: y.square().mean())
    assert found.difference > 0.1
    assert found.plain.loss == pytest.approx(found.ours.loss)


def wrong_forward(forward, x):
    return forward.original(x) * 2


def slow_forward(forward, x):
    time.sleep(0.5)
    return forward.original(x)


def nan_backward(forward, x):
    y = forward.original(x)
    y.register_hook(lambda g: g * torch.nan)
    return y


def no_backward(forward, x):
    return forward.original(x).detach()


@pytest.mark.parametrize(
    ("wrong", "least"), [(wrong_forward, 1e-3), (nan_backward, np.inf), (no_backward, 0.5)]
)
def test_notices_what_is_wrong(wrong, least):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.Linear(3, 3))
    put_in(model[1], wrong)
    with pytest.warns(UserWarning, match="not rounding"):
        found = compare(model, torch.randn(9, 6), loss=lambda y: y.square().mean())
    assert found.difference >= least
    assert bool([t for t in found.warnings if t.startswith("the loss")]) == (wrong is wrong_forward)
    take_out(model[1], wrong)
    assert compare(model, torch.randn(9, 6), loss=loss_of_some).difference < 1e-4


def test_a_small_gradient_that_is_wrong():
    """It is not hidden by a large one, unless it is too small to matter."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Identity(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight.mul_(1e2)
        model[2].weight.mul_(1e-1)
    put_in(model[1], no_backward)
    with pytest.warns(UserWarning, match="that of 0"):
        compare(model, torch.randn(9, 6), loss=loss_of_some)


def test_gradients_that_are_zero():
    model = make_plain().eval()
    found = compare(model, torch.randn(9, 6), loss=lambda y: y.sum() * 0)
    assert found.difference == 0


def test_a_loss_that_is_not_finite():
    with pytest.warns(UserWarning, match="own loss is not finite"):
        compare(make_plain(), torch.randn(9, 6), loss=lambda y: y.sum() * torch.nan)


def test_sparse_gradients():
    model = nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Linear(6, 3))
    found = compare(model, torch.tensor([[1, 2, 1]]), loss=loss_of_some)
    assert found.difference < 1e-4
    assert model[0].weight.grad is None


# --------------------------------------------------------------------------------------------------
# What it says


@pytest.mark.parametrize("name", ["bert", "plain"])
def test_dropout(name):
    """Gradients are compared without it, as the library draws other numbers."""
    if name == "plain":
        model, batch = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.Linear(9, 3)), None
        batch = torch.randn(9, 6)
    else:
        model, batch = make_model(name), make_batch(name, 1)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
    found = compare(model.train(), batch, loss=None if name == "bert" else loss_of_some)
    assert found.has_dropout
    assert found.difference < 1e-4
    assert found.plain.loss == pytest.approx(found.ours.loss, rel=1e-5)
    assert found.plain.dropped_loss != pytest.approx(found.plain.loss, rel=1e-3)
    assert found.ours.dropped_loss != pytest.approx(found.plain.dropped_loss, rel=1e-5)
    assert "other random numbers" in str(found)


def test_warns_where_all_rows_are_active():
    model, batch = make_model("bert").train(), make_batch("bert", 1)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    batch["labels"] = batch["input_ids"] % 2
    tokens = nn.Module()
    tokens.bert, tokens.head = model.bert, nn.Linear(32, 2)
    tokens.forward = lambda input_ids, attention_mask: tokens.head(
        tokens.bert(input_ids, attention_mask).last_hidden_state
    )
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with pytest.warns(UserWarning, match="100.0% of the rows are active"):
        found = compare(tokens, batch, loss=lambda y: y.square().mean())
    assert found.real == 1
    assert found.activity == 1


@pytest.mark.filterwarnings("default:sebp.compare. no time is gained")
def test_warns_where_nothing_is_computed():
    model = make_plain().double()
    with pytest.warns(UserWarning, match=r"none of it \(its weight is of torch.float64"):
        found = compare(model, torch.randn(9, 6).double(), loss=loss_of_some)
    assert found.activity is None
    assert found.difference == 0
    assert "active rows" not in str(found)


@pytest.mark.filterwarnings("default:sebp.compare. no time is gained")
def test_says_why_padding_stays():
    """A model that takes longer with SEBP, and has a hook that would see real tokens alone."""
    model = make_model("bert").train()
    model.bert.encoder.layer[0].register_forward_hook(lambda *a: None)
    put_in(model.dropout, slow_forward)
    with pytest.warns(UserWarning, match=r"padding stays in the forward \(a hook on bert"):
        compare(model, make_batch("bert", 1))


def test_optimizer_step():
    model = make_plain()
    found = compare(model, torch.randn(9, 6), loss=loss_of_some, optimizer_step=True)
    assert found.optimizer > 0
    assert min(found.plain.seconds, found.ours.seconds) > found.optimizer
    assert "AdamW" in str(found)


def test_parts():
    """Each part is found, in the model as it is and with SEBP."""
    found = compare(make_model("bert").train(), make_batch("bert", 1))
    for side in (found.plain, found.ours):
        assert min(side.parts) > 0
    model, x = make_plain(), torch.randn(9, 6)
    assert parts_of(lambda: model(x).sum().backward()).attention == 0
    parts = parts_of(lambda: None)
    assert parts.products == 0
    assert parts.total == parts.rest >= 0


@pytest.mark.parametrize("kind", ["bf16", "autocast"])
def test_bfloat16(kind):
    model, batch = make_model("bert").train(), make_batch("bert", 1)
    if kind == "bf16":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        found = compare(model, batch)
    assert not [text for text in found.warnings if "rounding" in text]
    assert found.difference > 0


def test_compiled_models():
    model = make_plain()
    twin = copy.deepcopy(model)
    found = compare(torch.compile(model), torch.randn(9, 6), loss=loss_of_some)
    assert found.difference < 1e-4
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


# --------------------------------------------------------------------------------------------------
# Errors


def test_bad_batches():
    model = make_plain()
    before = insides(model)
    for batch in ("text", None, 3):
        with pytest.raises(TypeError, match="the batch is a .*, not a mapping, a sequence or"):
            compare(model, batch)
    with pytest.raises(ValueError, match="no loss. .* loss=lambda"):
        compare(model, torch.randn(9, 6))
    with pytest.raises(ValueError, match="loss= returned no Tensor of one element"):
        compare(model, torch.randn(9, 6), loss=lambda y: y)
    with pytest.raises(RuntimeError):
        compare(model, torch.randn(9, 7), loss=loss_of_some)
    same_insides(before, insides(model))


def test_bad_models():
    x = torch.randn(9, 6)
    with pytest.raises(TypeError, match="model is a str"):
        compare("bert", x)
    with pytest.raises(ValueError, match="weight is on meta"):
        compare(nn.Linear(6, 3, device="meta"), x)
    with pytest.raises(ValueError, match="nothing that it depends on is trained"):
        compare(make_plain().requires_grad_(False), x, loss=loss_of_some)
    with pytest.raises(ValueError, match="repetitions is 0"):
        sebp.compare(make_plain(), x, repetitions=0)


def test_a_sparse_optimizer_is_refused():
    model = make_plain()
    optimizer = torch.optim.AdamW(model.parameters())
    sebp.apply_meprop_to_model(model, optimizer, 5, layers="0")
    with pytest.raises(ValueError, match="0: a SparseOptimizer trains it"):
        compare(model, torch.randn(9, 6), loss=loss_of_some)


def test_a_loss_of_the_parameters_leaves_their_gradients():
    model, batch = make_model("bert").train(), make_batch("bert", 1)
    parameters = list(model.parameters())
    parameters[0].grad = torch.ones_like(parameters[0])
    before = [p.grad for p in parameters]
    values = parameters[0].grad.clone()
    sebp.compare(
        model,
        batch,
        repetitions=1,
        loss=lambda output: output.loss + sum(p.square().sum() for p in parameters),
    )
    assert all(p.grad is grad for p, grad in zip(parameters, before, strict=True))
    assert torch.equal(parameters[0].grad, values)


def test_gradients_of_what_a_batch_holds_deeper():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, pair):
            return self.layer(pair[0]["x"]) + pair[1]

    x, y = torch.randn(5, 4, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    sebp.compare(Model(), {"pair": ({"x": x}, y)}, repetitions=1, loss=lambda out: out.sum())
    assert x.grad is None
    assert y.grad is None


# --------------------------------------------------------------------------------------------------
# What a comparison leaves behind


def cache_of(model, ids):
    model.config.use_cache = True
    return model.model(input_ids=ids).past_key_values


@pytest.mark.parametrize("prepared", [False, True])
def test_a_cache_in_the_batch(prepared):
    """Each step gets a copy of it, as a step adds to it."""
    model = make_model("llama").eval()
    ids = torch.randint(5, 90, (2, 9))
    with torch.no_grad():
        cache = cache_of(model, ids[:, :4])
    keys = cache.layers[0].keys.clone()
    batch = {"input_ids": ids[:, 4:], "labels": ids[:, 4:], "past_key_values": cache}
    if prepared:
        sebp.prepare(model, quiet=True)
    found = compare(model, batch)
    assert cache.get_seq_length() == 4
    assert torch.equal(cache.layers[0].keys, keys)
    assert found.difference < 1e-4
    whole = model(**batch)
    assert found.ours.loss == pytest.approx(whole.loss.item(), rel=1e-5)
    assert cache.get_seq_length() == 9  # the user's own call adds to it


def test_a_cache_that_cannot_be_copied():
    model = make_model("llama").eval()
    ids = torch.randint(5, 90, (2, 9))
    batch = {"input_ids": ids, "labels": ids, "past_key_values": cache_of(model, ids)}
    with pytest.raises(ValueError, match=r"a DynamicCache that cannot be copied .*no_grad"):
        compare(model, batch)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.filterwarnings("default:sebp")
def test_warnings_come_again_in_training(prepared):
    """What is told while steps are compared is told to who trains the model afterwards."""
    model = make_model("bert").train()
    batch = make_batch("bert", 1, left=True)
    text = "BertForSequenceClassification: such calls run with padding"
    if prepared:
        sebp.prepare(model, quiet=True)
    with pytest.warns(UserWarning, match=text):
        compare(model, batch)
    sebp.prepare(model, quiet=True)
    with pytest.warns(UserWarning, match=text):
        model(**batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch)  # and then no more
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f"sebp: {text}")
        compare(model, batch)


def test_python_forgets_warnings_of_a_comparison(capfd):
    code = """
import sys
sys.path.insert(0, "tests")
import sebp
from models import make_batch, make_model
model, batch = make_model("bert").train(), make_batch("bert", 1, left=True)
sebp.prepare(model, quiet=True)
sebp.compare(model, batch, repetitions=1)
print("trains", file=sys.stderr, flush=True)
model(**batch)
model(**batch)
"""
    folder = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)
    before, after = capfd.readouterr().err.split("trains")
    assert before.count("run with padding") == after.count("run with padding") == 1
