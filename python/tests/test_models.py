# SPDX-License-Identifier: Apache-2.0
"""Whole models: the same losses and parameters as without SEBP, step by step."""

import copy
from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from models import make_batch, make_model  # noqa: E402

import sebp  # noqa: E402

NAMES = ["bert", "roberta", "gpt2", "llama"]
MORE_NAMES = ["distilbert", "qwen2", "mistral"]


def train(model, name, steps=10, left=False, autocast=False, full=False):
    """Take AdamW steps, and give the losses; `full`: no text is padded."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    model.train()
    losses = []
    for step in range(steps):
        batch = make_batch(name, step, left)
        if full:
            batch = fill(batch)
        cast = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
        with cast:
            loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def fill(batch):
    """Put tokens where the padding is."""
    mask = batch["attention_mask"]
    ids = torch.where(mask == 0, 7, batch["input_ids"])
    labels = ids if batch["labels"].dim() == 2 else batch["labels"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(mask), "labels": labels}


def agree(name, left=False, full=False, frozen="", **apply):
    plain = make_model(name)
    for key, parameter in plain.named_parameters():
        parameter.requires_grad_(not (frozen and frozen in key))
    ours = copy.deepcopy(plain)
    report = sebp.apply_sebp_to_model(ours, **apply)
    assert len(report.replaced) >= 8
    assert not report.skipped
    want = train(plain, name, left=left, full=full)
    got = train(ours, name, left=left, full=full)
    assert want.std() > 0
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    start = make_model(name).state_dict()
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key], rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(value, start[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", NAMES + MORE_NAMES)
def test_ten_steps(name, left):
    agree(name, left)


@pytest.mark.filterwarnings("ignore:sebp")
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", NAMES + MORE_NAMES)
def test_ten_steps_with_the_mask(name, left):
    agree(name, left, padding=True)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_without_padding(name, padding):
    agree(name, full=True, padding=padding)


@pytest.mark.parametrize("rows", [64, ("threshold", 0.0), ("energy", 0.0)])
@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_with_rules_that_keep_all(name, rows):
    agree(name, rows=rows)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(
    ("name", "frozen"), [("bert", "embeddings"), ("bert", ".0."), ("gpt2", "mlp"), ("llama", ".0.")]
)
def test_ten_steps_with_frozen_weights(name, frozen, padding):
    agree(name, frozen=frozen, padding=padding)


@pytest.mark.parametrize("name", NAMES + MORE_NAMES)
def test_walk(name):
    """Every linear layer of the model is found, and nothing else is changed."""
    from transformers.pytorch_utils import Conv1D

    model = make_model(name)
    linear = [key for key, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
    classes = {key: type(m) for key, m in model.named_modules()}
    state = model.state_dict()
    assert sebp.apply_sebp_to_model(model).replaced == linear
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(after[key].data_ptr() == state[key].data_ptr() for key in state)
    changed = [key for key, m in model.named_modules() if "sebp_rule" in vars(m)]
    assert changed == linear
    assert all(type(m) is classes[key] for key, m in model.named_modules())
    assert sebp.remove_sebp_from_model(model) == linear
    assert not any("sebp_rule" in vars(m) or "forward" in vars(m) for m in model.modules())


def test_mask_is_used_and_released():
    model = make_model("bert")
    batch = make_batch("bert", 0)
    rows = []
    query = model.bert.encoder.layer[0].attention.self.query
    sebp.apply_sebp_to_model(model, padding=True)
    ours = query.forward
    query.forward = lambda x: rows.append(x[..., 0].numel()) or ours(x)
    tokens = int(batch["attention_mask"].sum())
    model(**batch)
    model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
    with pytest.raises(IndexError):
        model(**{**batch, "input_ids": batch["input_ids"] + 1000})
    with pytest.warns(UserWarning, match="no attention_mask"):
        model(input_ids=batch["input_ids"])
    query.forward = ours
    sebp.remove_sebp_from_model(model)
    query.forward = lambda x: rows.append(x[..., 0].numel()) or type(query).forward(query, x)
    model(**batch)
    # Compared with the model as it is, then with other texts in the batch.
    assert rows == [tokens, 64, tokens, tokens, tokens, 64, 64]
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.bert)


@pytest.mark.parametrize("name", NAMES + MORE_NAMES)
def test_rows_are_sparse(name, capfd, monkeypatch):
    """The layers do see the padding: in all of them fewer rows than there are tokens."""
    import sebp.torch.linear_layers.products as products

    counts = []
    find = products.find_rows
    monkeypatch.setattr(
        products, "find_rows", lambda dy, rule: counts.append(find(dy, rule)) or counts[-1]
    )
    model = make_model(name)
    sebp.apply_sebp_to_model(model)
    batch = make_batch(name, 0)
    model(**batch).loss.backward()
    tokens = int(batch["attention_mask"].sum())
    inside = [rows for rows in counts if rows.total == batch["input_ids"].numel()]
    assert len(inside) >= 8
    assert all(len(rows) <= tokens for rows in inside)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_autocast(name):
    plain = make_model(name)
    ours = copy.deepcopy(plain)
    sebp.apply_sebp_to_model(ours)
    want = train(plain, name, steps=3, autocast=True)
    got = train(ours, name, steps=3, autocast=True)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_gradient_checkpointing(name, padding):
    plain = make_model(name)
    ours = copy.deepcopy(plain)
    sebp.apply_sebp_to_model(ours, padding=padding)
    ours.gradient_checkpointing_enable()
    want, got = train(plain, name, steps=3), train(ours, name, steps=3)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [False, True])
def test_compile(padding):
    plain = make_model("bert")
    ours = copy.deepcopy(plain)
    sebp.apply_sebp_to_model(ours, padding=padding)
    want = train(plain, "bert", steps=2)
    got = train(torch.compile(ours, backend="aot_eager"), "bert", steps=2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_inexact_rules_train(name):
    """Few rows give another loss, and a loss that falls."""
    model = make_model(name)
    sebp.apply_sebp_to_model(model, rows=6)
    batch = make_batch(name, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
