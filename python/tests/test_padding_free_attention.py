# SPDX-License-Identifier: Apache-2.0
"""Attention where padding has been left out: by the library, in each of its ways."""

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")

from models import make_batch, make_model  # noqa: E402

import sebp  # noqa: E402
from sebp.torch.attention import packed_texts  # noqa: E402
from sebp.torch.attention.attend import Pattern, attend  # noqa: E402
from sebp.torch.attention.texts import Texts  # noqa: E402
from sebp.torch.padding.trace import WithoutDropout  # noqa: E402


@pytest.fixture
def calls(monkeypatch):
    """Note the dtypes that the library's attention is called with."""
    dtypes = []

    def noted(query, *args, **kwargs):
        dtypes.append(query.dtype)
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(packed_texts, "attend", noted)
    return dtypes


@pytest.mark.parametrize("name", ["bert", "llama", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_library_computes_what_it_can(name, dtype, calls):
    model = make_model(name).to(dtype).train()
    sebp.padding_free(model, check=False)
    model(**make_batch(name, 1)).loss.backward()
    if dtype == torch.float64:
        assert calls == []
    else:
        assert calls == [dtype] * 2  # its layers


@pytest.mark.parametrize(
    ("name", "left"),
    [("bert", False), ("llama", False), ("llama", True), ("mistral", False), ("mistral", True)],
)
def test_a_model_that_has_sebp_attention(name, left):
    plain = make_model(name).train()
    ours = copy.deepcopy(plain)
    ours.set_attn_implementation(sebp.register_attention())
    report = sebp.padding_free(ours)
    assert len(report.changed) == 1
    for seed in range(2):
        batch = make_batch(name, seed, left)
        want, got = plain(**batch).loss, ours(**batch).loss
        torch.testing.assert_close(got, want)
        plain.zero_grad()
        ours.zero_grad()
        want.backward()
        got.backward()
        for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)
    assert report.calls[""] == 2
    assert sebp.remove_padding_free(ours)
    torch.testing.assert_close(ours(**batch).loss, plain(**batch).loss)


def test_autocast_computes_in_its_dtype(calls):
    model = make_model("llama")
    sebp.padding_free(model, check=False)
    with torch.autocast("cpu", torch.bfloat16):
        model(**make_batch("llama", 1)).loss.backward()
    assert calls == [torch.bfloat16] * 2


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_checkpointing_draws_the_same_dropout(name):
    model = make_model(name).train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    for layer in model.bert.encoder.layer if name == "bert" else ():
        layer.attention.self.dropout.p = 0.5
    batch, found = make_batch(name, 1), []
    sebp.padding_free(model, check=False)
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        model.zero_grad()
        model(**batch).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(second, first)


def test_dropout_can_be_turned_off():
    q = torch.randn(1, 2, 7, 8)
    given = (q, q, q, Texts.of_rows(1, 7, 7), Pattern(False))
    with WithoutDropout() as without:
        assert torch.equal(attend(*given), attend(*given, dropout=0.0))
    assert not without.met
    with WithoutDropout() as without:
        assert torch.equal(attend(*given, dropout=0.5), attend(*given))
    assert without.met
    assert not torch.equal(attend(*given, dropout=0.5), attend(*given))


def test_a_bias_of_texts():
    lengths, heads = [3, 0, 5, 2], 2
    q, k, v = (torch.randn(1, heads, 10, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, heads, 6, 7, requires_grad=True)
    got = packed_texts.attend_packed(q, k, v, lengths, False, bias=bias)
    want, at = [], 0
    for length in lengths:
        part = [x[:, :, at : at + length] for x in (q, k, v)]
        mask = bias[:, :, :length, :length]
        y = torch.nn.functional.scaled_dot_product_attention(*part, attn_mask=mask)
        want.append(y.transpose(1, 2))
        at += length
    want = torch.cat(want, 1)
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(want)
    inputs = (q, k, v, bias)
    ours = torch.autograd.grad(got, inputs, dy)
    for mine, right in zip(ours, torch.autograd.grad(want, inputs, dy), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the bias is"):
        packed_texts.attend_packed(q, k, v, lengths, False, bias=bias[:, :, :4])


def test_no_tokens():
    q = torch.randn(1, 2, 0, 8)
    assert packed_texts.attend_packed(q, q, q, [], True, window=4).shape == (1, 0, 2, 8)
