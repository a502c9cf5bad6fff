# SPDX-License-Identifier: Apache-2.0
"""Training of encoders and decoders on real tokens alone: the losses and weights of padded ones."""

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")

from models import make_batch, make_model  # noqa: E402
from padding_free_models import DECODERS, ENCODERS, pair, watch_rows  # noqa: E402

import sebp  # noqa: E402
from sebp.torch.apply.feed_forward import choose_layers  # noqa: E402


def train(model, name, left=False, steps=10, autocast=False):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    losses = []
    for step in range(steps):
        batch = make_batch(name, step, left)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def agree(plain, ours, name, **options):
    start = copy.deepcopy(plain.state_dict())
    want, got = train(plain, name, **options), train(ours, name, **options)
    assert want.std() > 0
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(value, start[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("sparse", [False, True], ids=["plain", "sebp"])
@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_ten_steps(name, sparse):
    plain, ours = pair(name)
    if sparse:
        assert len(sebp.apply_sebp_to_model(ours).replaced) >= 8
    agree(plain, ours, name)


@pytest.mark.parametrize("name", DECODERS)
def test_ten_steps_with_padding_on_the_left(name):
    plain, ours = pair(name)
    sebp.apply_sebp_to_model(ours)
    agree(plain, ours, name, left=True)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_ten_steps_with_both(name):
    """``padding=True`` is the same thing, and goes together with it."""
    plain, ours = pair(name)
    sebp.apply_sebp_to_model(ours, padding=True)
    agree(plain, ours, name)


def test_rows_of_the_last_block(monkeypatch):
    """Of the real tokens only [CLS] is active in the last block's feed-forward layers."""
    import sebp.torch.linear_layers.products as products

    counts = []
    find = products.find_rows
    monkeypatch.setattr(
        products, "find_rows", lambda dy, rule: counts.append(find(dy, rule)) or counts[-1]
    )
    model = make_model("bert").train()
    sebp.padding_free(model)
    sebp.apply_sebp_to_model(model)
    batch = make_batch("bert", 0)
    model(**batch).loss.backward()
    tokens = int(batch["attention_mask"].sum())
    inside = [(len(rows), rows.total) for rows in counts if rows.total == tokens]
    assert inside[:3] == [(4, tokens)] * 3
    assert inside[-3:] == [(tokens, tokens)] * 3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_weights_that_ask_for_no_gradient(name):
    """They are trained on real tokens alone where nothing else in the model trains."""
    models = pair(name)
    rows = watch_rows(models[1])
    losses = []
    for model in models:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        weights = [module.weight for _, module in choose_layers(model, None, frozen=True)]
        for weight in weights:
            weight.requires_grad_(True)
        adamw = torch.optim.AdamW(weights, lr=1e-2)
        optimizer = sebp.apply_meprop_to_model(model, adamw, 40)
        assert not any(p.requires_grad for p in model.parameters())
        start = copy.deepcopy(model.state_dict())
        losses.append([])
        for step in range(3):
            loss = model(**make_batch(name, step)).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        moved = {key for key, value in model.state_dict().items() if not value.equal(start[key])}
        assert len(moved) == len(weights)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    tokens = [int(make_batch(name, step)["attention_mask"].sum()) for step in range(3)]
    # The first batch twice more, to see whether texts notice others.
    assert [count for count in rows if count != 64] == [*tokens[:1] * 2, *tokens]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_autocast(name):
    plain, ours = pair(name)
    sebp.apply_sebp_to_model(ours)
    want = train(plain, name, steps=3, autocast=True)
    got = train(ours, name, steps=3, autocast=True)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "distilbert", "llama"])
def test_gradient_checkpointing(name, reentrant):
    """What is computed again is computed on the same rows."""
    plain, ours = pair(name)
    for model in (plain, ours):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    rows = watch_rows(ours)
    agree(plain, ours, name, steps=3)
    tokens = [int(make_batch(name, step)["attention_mask"].sum()) for step in range(3)]
    # The first batch once more with padding and twice without, to compare with: nothing is computed
    # again there.
    proof = [64, tokens[0], tokens[0]]
    assert rows == [tokens[0], *proof, tokens[0], *(t for t in tokens[1:] for _ in range(2))]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_compile(name):
    """Under torch.compile the model is as it was."""
    plain, ours = pair(name)
    if name == "llama":
        plain.config.use_cache = ours.config.use_cache = False
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    want, got = train(plain, name, steps=2), train(compiled, name, steps=2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_gradient_of_the_padding():
    """A loss made outside the model must not depend on padding, where nothing was computed."""
    _, ours = pair("llama")
    batch = make_batch("llama", 1, left=True)
    mask = batch["attention_mask"]
    for _ in range(2):  # a call of another kind, unexpected, runs with padding at first
        ours(input_ids=batch["input_ids"], attention_mask=mask)
    last = int((mask[0] == 0).sum()) - 1
    for read in (
        lambda logits: logits[:, :-1][mask[:, 1:] != 0],  # the first is predicted from padding
        lambda logits: logits,
    ):
        loss = read(ours(input_ids=batch["input_ids"], attention_mask=mask).logits).square().mean()
        with pytest.raises(RuntimeError, match=rf"tokens .* is token ({last}|0) of text 0"):
            loss.backward()
        assert all(p.grad is None for p in ours.model.parameters())
