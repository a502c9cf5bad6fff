# SPDX-License-Identifier: Apache-2.0
"""Whole models compute the same with their blocks by the library."""

import copy
import io
import pickle

import pytest
import torch
from block_models import Output
from models import make_batch, make_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import sebp
from sebp.torch.blocks.put import give_blocks, take_blocks
from sebp.torch.common.forward import Forward, as_it_is

# How many norms the library computes in a forward of these models.
NORMS = {"bert": 4, "roberta": 4, "distilbert": 0, "gpt2": 0, "llama": 5, "mistral": 5, "qwen2": 5}


def losses_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def assert_same(ours, right, tolerance=2e-5):
    assert torch.allclose(ours[0], right[0], rtol=tolerance, atol=tolerance)
    assert ours[1].keys() == right[1].keys()
    largest = max(float(g.abs().max()) for g in right[1].values())
    for name, gradient in ours[1].items():
        assert gradient.dtype == right[1][name].dtype
        off = float((gradient - right[1][name]).abs().max())
        assert off <= tolerance * largest, f"{name} is off by {off / largest}"


# --------------------------------------------------------------------------------------------------
# Whole models


@pytest.mark.parametrize("name", NORMS)
def test_models_train_and_evaluate_the_same(name, counting):
    model, batch = make_model(name).train(), make_batch(name, 1)
    right = losses_and_gradients(model, batch)
    names = {key for key, _ in model.named_modules()}
    given = give_blocks(model)
    assert sum(map(len, given.values())) >= 8
    assert_same(losses_and_gradients(model, batch), right)
    called = counting.take()
    assert called.count("normalize") == NORMS[name] and called.count("activate") == 2
    assert {key for key, _ in model.named_modules()} == names
    model.eval()
    with torch.no_grad():
        ours = model(**batch).loss
        assert "activate" in counting.take()
        take_blocks(model)
        assert abs(float(ours - model(**batch).loss)) < 1e-5
    assert counting.take() == []
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_pure_bfloat16_models_train_the_same(name, counting):
    model, batch = make_model(name).train().to(torch.bfloat16), make_batch(name, 1)
    right = losses_and_gradients(model, batch)
    give_blocks(model)
    assert_same(losses_and_gradients(model, batch), right, 0.05)
    assert counting.take().count("normalize") == NORMS[name]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_under_autocast_models_train_the_same(name, counting):
    model, batch = make_model(name).train(), make_batch(name, 1)
    with torch.autocast("cpu", torch.bfloat16):
        right = losses_and_gradients(model, batch)
        give_blocks(model)
        assert_same(losses_and_gradients(model, batch), right, 0.05)
    assert counting.take().count("normalize") == NORMS[name]


def test_float64_is_left_to_pytorch(counting):
    model, batch = make_model("llama"), make_batch("llama", 1)
    give_blocks(model)
    model.double()
    with as_it_is(model):
        right = losses_and_gradients(model, batch)
    assert_same(losses_and_gradients(model, batch), right, 0)
    assert counting.take() == []
    assert give_blocks(make_model("llama").double()) == {}
    assert give_blocks(make_model("llama").to("meta")) == {}


def test_prepare_puts_blocks_in_and_undo_takes_them_out(counting):
    model, batch = make_model("bert").train(), make_batch("bert", 1)
    right = losses_and_gradients(model, batch)
    prepared = sebp.prepare(model, quiet=True)
    assert "4 x dropout, residual and norm in one pass" in str(prepared)
    assert_same(losses_and_gradients(model, batch), right)
    assert "normalize" in counting.take()
    again = sebp.prepare(model, quiet=True)
    assert again.blocks == {}
    again.undo()
    assert_same(losses_and_gradients(model, batch), right)
    assert "normalize" in counting.take()
    prepared.undo()
    assert not any("forward" in vars(module) for module in model.modules())


def test_undo_leaves_what_a_part_of_the_model_had():
    inner = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    model = nn.Sequential(inner, nn.GELU())
    prepared = sebp.prepare(inner, quiet=True)
    sebp.prepare(model, quiet=True).undo()
    with pytest.warns(UserWarning, match="of the rows are active"):
        sebp.compare(model, torch.randn(3, 4), lambda y: y.sum(), repetitions=1)
    assert "forward" in vars(inner[0]) and "forward" in vars(inner[1])
    assert "forward" not in vars(model[1])
    prepared.undo()
    assert not any("forward" in vars(module) for module in model.modules())


def test_remove_takes_what_prepare_put_in(counting):
    model = make_model("bert")
    sebp.prepare(model, quiet=True)
    sebp.remove_sebp_from_model(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_copies_and_pickles_keep_their_blocks(counting):
    model, batch = make_model("llama").train(), make_batch("llama", 1)
    right = losses_and_gradients(model, batch)
    give_blocks(model)
    file = io.BytesIO()
    pickle.dump(model, file)
    for other in (copy.deepcopy(model), pickle.loads(file.getvalue())):
        assert_same(losses_and_gradients(other, batch), right)
        assert counting.take().count("normalize") == 5
        forwards = [vars(m)["forward"] for m in other.modules() if "forward" in vars(m)]
        assert all(isinstance(one, Forward) for one in forwards)
        assert {id(one.module) for one in forwards} <= {id(m) for m in other.modules()}


def test_compiled_models_are_pytorchs(counting):
    block = Output(16, 0.0).train()
    x, residual = torch.randn(4, 16), torch.randn(4, 16)
    right = block(x, residual)
    give_blocks(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, residual), right, atol=1e-5)
    assert counting.take() == []


# --------------------------------------------------------------------------------------------------
# Dropout in models


def test_checkpointing_repeats_dropout():
    torch.manual_seed(0)
    block, x = Output(32, 0.3).train(), torch.randn(6, 32, requires_grad=True)
    give_blocks(block)
    torch.manual_seed(1)
    plain = torch.autograd.grad(block(x, x).square().sum(), [x, *block.parameters()])
    torch.manual_seed(1)
    y = checkpoint(block, x, x, use_reentrant=False)
    again = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("defer_logits", [False, True])
def test_gradient_checkpointing_of_models(name, reentrant, defer_logits):
    """The first call of a kind is watched, and what it saves is compared with the recomputation."""
    model, batch = make_model(name).train(), make_batch(name, 1)
    right = losses_and_gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with sebp.prepare(model, defer_logits=defer_logits, quiet=True):
        for _ in range(3):
            assert_same(losses_and_gradients(model, batch), right)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_all_is_pytorchs(p, counting):
    layer = nn.Dropout(p)
    give_blocks(nn.ModuleList([layer, nn.Linear(1, 1)]))
    x = torch.randn(5, 6)
    assert torch.equal(layer(x), x * (1 - p))
    assert counting.take() == []


def test_dropout_is_off_in_evaluation(counting):
    block = Output(16, 0.5)
    give_blocks(block)
    block.eval()
    x = torch.randn(3, 16)
    assert torch.equal(block(x, x), block(x, x))
    assert counting.take() == ["normalize"] * 2


def test_one_of_a_block_may_be_in_another_mode():
    block = Output(16, 0.5)
    give_blocks(block)
    block.train()
    block.dropout.eval()
    x = torch.randn(3, 16)
    assert torch.equal(block(x, x), block(x, x))
