# SPDX-License-Identifier: Apache-2.0
"""What decides where texts begin with ``attn_implementation="sebp"``, and what is refused."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

import sebp
from sebp.torch.attention.mask_codes import sebp_mask

transformers = pytest.importorskip("transformers", minversion="5")
from attention_models import (  # noqa: E402
    draw_texts,
    flat,
    hidden,
    in_double,
    make,
    offsets,
    padded,
)
from transformers.masking_utils import (  # noqa: E402
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_causal_mask_function,
)


def test_cumulative_lengths_decide_over_positions() -> None:
    model, texts = make("llama"), draw_texts((6, 6))
    batch = flat("llama", texts)
    want = hidden(model, batch)
    batch["position_ids"] = torch.arange(12)[None] % 6
    assert torch.equal(hidden(model, batch), want)
    # Positions begin again at every third token, and not where texts do; the rotation is theirs.
    third = dict(batch, position_ids=torch.arange(12)[None] % 3)
    alone = [
        hidden(model, {"input_ids": t[None], "attention_mask": torch.ones(1, 6)}, use_cache=False)
        for t in texts
    ]
    assert torch.allclose(want, torch.cat(alone, 1), atol=1e-5)
    eager = in_double(model)
    mask = torch.block_diag(torch.ones(6, 6), torch.ones(6, 6)).tril()[None, None] > 0
    mask = torch.zeros(1, 1, 12, 12).double().masked_fill(~mask, -torch.inf)
    ids, at = third["input_ids"], third["position_ids"]
    wanted = eager(input_ids=ids, position_ids=at, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(hidden(model, third).double(), wanted, rtol=0, atol=5e-5)


def test_a_mask_of_ones_says_nothing_and_one_with_padding_too_much() -> None:
    # As flash attention has it: positions decide where the mask leaves nothing out. Where it leaves
    # something out "sdpa" would join the texts, so it is left open what is meant.
    model, texts = make("llama"), draw_texts((3, 4))
    batch = flat("llama", texts)
    both = {key: batch[key] for key in ("input_ids", "position_ids")}
    ones = torch.ones(1, 7, dtype=torch.long)
    want = hidden(model, batch)
    torch.testing.assert_close(hidden(model, both, attention_mask=ones), want)
    ones[0, 6] = 0
    with pytest.raises(ValueError, match="position_ids begin again.* padding"):
        model(**both, attention_mask=ones)
    two = {key: value.expand(2, -1) for key, value in both.items()}
    with pytest.raises(ValueError, match="position_ids begin again.* padding"):
        model(**two, attention_mask=ones.expand(2, -1))
    both["position_ids"] = torch.tensor([[0, 0, 1, 2, 3, 4, 5]])  # after a text of one token
    with pytest.raises(ValueError, match="position_ids begin again.* padding"):
        model(**both, attention_mask=ones)
    both["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 5, 0]])  # again at the padded token alone
    got = hidden(model, both, attention_mask=ones)[:, :6]
    both["position_ids"] = torch.arange(7)[None]
    torch.testing.assert_close(got, hidden(model, both, attention_mask=ones)[:, :6])


def test_a_transformers_without_lengths_of_queries_is_too_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transformers.masking_utils, "sdpa_mask", lambda cache_position: None)
    with pytest.raises(ImportError, match="too old"):
        sebp.register_attention()


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("wrong", [[0, 1, 2, 5, 6, 7], [0, 1, 0, 0, 2, 3], [3, 4, 5, 0, 1, 2]])
def test_positions_that_say_nothing_are_refused(wrong: list[int], use_cache: bool) -> None:
    model = make("llama")
    ids = draw_texts((6,))[0][None]
    at = torch.tensor([wrong])
    with pytest.raises(ValueError, match="do not say where texts begin"):
        model(input_ids=ids, position_ids=at, use_cache=use_cache)
    ends = offsets((3, 3))
    model(input_ids=ids, position_ids=at, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    if wrong[:5] == sorted(wrong[:5]):
        model(input_ids=ids, position_ids=at, attention_mask=mask)
    else:
        with pytest.raises(ValueError, match="position_ids begin again"):
            model(input_ids=ids, position_ids=at, attention_mask=mask)


@pytest.mark.parametrize("ends", [[0], [0, 5], [1, 6], [0, 7], [0, 4, 3, 6], [], [[0, 6]]])
def test_wrong_cumulative_lengths_are_refused(ends: list) -> None:
    model, ids = make("bert"), draw_texts((6,))[0][None]
    wrong, right = torch.tensor(ends), torch.tensor([0, 6])
    for q, k in ((wrong, right), (right, wrong)):
        with pytest.raises(ValueError, match="cu_seq_lens_"):
            model(input_ids=ids, cu_seq_lens_q=q, cu_seq_lens_k=k)
    with pytest.raises(ValueError, match="come together"):
        model(input_ids=ids, cu_seq_lens_q=right)
    with pytest.raises(ValueError, match="not a list of integers"):
        model(input_ids=ids, cu_seq_lens_q=right.float(), cu_seq_lens_k=right)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    with pytest.raises(ValueError, match="attention_mask has padding, and cu_seq_lens_q"):
        model(input_ids=ids, attention_mask=mask, cu_seq_lens_q=right, cu_seq_lens_k=right)


def test_texts_over_the_end_of_a_row_are_refused() -> None:
    """Lengths of another sequence: those of the text in an image's tower, say."""
    model, ids = make("bert"), torch.stack(draw_texts((6, 6)))
    ends = torch.tensor([0, 8, 12])
    with pytest.raises(ValueError, match="over the end of a row of 6 tokens"):
        model(input_ids=ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    ends = torch.tensor([0, 2, 6, 12])
    model(input_ids=ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_keys_that_the_mask_does_not_know_are_refused(name: str) -> None:
    """A prefix that a layer puts before its keys, say: the last keys would be left out."""
    layer, attend = attention_of(make(name))
    mask = torch.ones(1, 5, dtype=torch.long)
    mask[0, 4] = 0
    functions = {"bert": bidirectional_mask_function, "llama": causal_mask_function}
    codes = sebp_mask(
        1, 5, 5, attention_mask=mask, mask_function=functions[name],
        allow_is_bidirectional_skip=True,
    )  # fmt: skip
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
    attend(layer, q, k[:, :, :5], k[:, :, :5], codes)
    with pytest.raises(ValueError, match="1 x 5 keys, but there are 5 and 1 x 7"):
        attend(layer, q, k, k, codes)


def test_empty_texts_and_texts_of_one_token() -> None:
    model, texts = make("llama"), draw_texts((1, 1, 4))
    batch = flat("llama", texts)
    want = hidden(model, batch)
    for text, part in zip(texts, want[0].split((1, 1, 4)), strict=True):
        torch.testing.assert_close(part, hidden(model, {"input_ids": text[None]})[0])
    ends = torch.tensor([0, 0, 1, 2, 2, 6, 6])
    batch.update(cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    assert torch.equal(hidden(model, batch), want)


def attention_of(model: nn.Module) -> tuple[nn.Module, Callable]:
    """Find a model's first attention layer, and the function that it calls."""
    layer = next(m for m in model.modules() if hasattr(m, "is_causal") and hasattr(m, "config"))
    return layer, transformers.AttentionInterface()["sebp"]


@pytest.mark.parametrize(
    "more, match",
    [
        ({"s_aux": torch.zeros(4)}, "argument s_aux; .* sinks"),
        ({"output_attentions": True}, "argument output_attentions; .*eager"),
        ({"head_mask": torch.ones(4)}, "argument head_mask"),
        ({"new_argument": 1}, "argument new_argument; leave it out"),
        ({"new_argument": False}, "argument new_argument; leave it out"),
        ({"sliding_window": 2}, "sliding_window is 2, but the mask is None"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"attention_mask": torch.ones(1, 6)}, "attention_mask is torch.float32"),
        ({"attention_mask": torch.ones(1, 6, dtype=torch.long)}, "attention_mask is torch.int64"),
        ({"attention_mask": torch.full((1, 1, 6, 6), 2.0**62)}, "neither sebp's"),
        ({"attention_mask": torch.ones(1, 1, 6, 6) > 0, "softcap": 2.0}, "softcap goes with"),
        ({"position_bias": torch.zeros(1, 4, 6, 5)}, "the bias is"),
    ],
)
def test_what_attention_cannot_do_is_refused(more: dict, match: str) -> None:
    layer, attention = attention_of(make("llama"))
    q = torch.randn(1, 4, 6, 8)
    given = {"attention_mask": None, **more}
    with pytest.raises(ValueError, match=match):
        attention(layer, q, q, q, **given)
    with pytest.raises(ValueError, match="which see which is left open"):
        attention(layer, q[:, :, :3], q, q, None)
    none = {"s_aux": None, "head_mask": None, "output_attentions": False, "use_cache": True}
    attention(layer, q, q, q, None, **none)


def test_a_window_is_the_masks() -> None:
    layer, attention = attention_of(make("llama"))
    q = torch.randn(1, 4, 6, 8)
    mask = sebp_mask(1, 6, 6, mask_function=sliding_window_causal_mask_function(3))
    own = attention(layer, q, q, q, mask)[0]
    assert torch.equal(attention(layer, q, q, q, mask, sliding_window=3)[0], own)
    with pytest.raises(ValueError, match="sliding_window is 4, but that of the mask is 3"):
        attention(layer, q, q, q, mask, sliding_window=4)
    with pytest.raises(ValueError, match="sliding_window is 99, but that of the mask is 3"):
        attention(layer, q, q, q, mask, sliding_window=99)


def test_learned_queries_are_those_of_each_row() -> None:
    layer, attention = attention_of(make("bert"))
    q, k = torch.randn(1, 4, 3, 8), torch.randn(2, 4, 6, 8)
    out = attention(layer, q, k, k, None)[0]
    want = functional.scaled_dot_product_attention(q.expand(2, -1, -1, -1), k, k)
    torch.testing.assert_close(out, want.transpose(1, 2))


def test_a_bias_of_rows_does_not_go_with_texts_across_them() -> None:
    layer, attention = attention_of(make("bert"))
    q, ends = torch.randn(2, 4, 6, 8), torch.tensor([0, 4, 6, 12])
    of = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    assert attention(layer, q, q, q, None, **of)[0].shape == (2, 6, 4, 8)
    with pytest.raises(ValueError, match="position_bias with cu_seq_lens_q"):
        attention(layer, q, q, q, None, position_bias=torch.zeros(1, 4, 6, 6), **of)


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 6, 6) > 0])
def test_other_devices_are_refused(mask: torch.Tensor | None) -> None:
    layer, attention = attention_of(make("bert"))
    q = torch.randn(1, 4, 6, 8, device="meta")
    with pytest.raises(TypeError, match="query is on meta; .* works on the CPU"):
        attention(layer, q, q, q, mask)


def test_sinks_are_refused_by_the_model_that_has_them() -> None:
    model = make("gpt_oss")
    with pytest.raises(ValueError, match="s_aux"):
        model(input_ids=draw_texts((6,))[0][None])


def test_the_users_is_causal() -> None:
    model = make("llama")
    reference = in_double(model)
    reference.config.is_causal = False
    batch = padded("llama", draw_texts())
    real = batch["attention_mask"].bool()
    want = hidden(reference, batch)[real]
    states = hidden(model, batch, is_causal=False)[real]
    torch.testing.assert_close(states.double(), want, rtol=0, atol=5e-5)
    model.config.is_causal = False
    states = hidden(model, batch)[real]
    torch.testing.assert_close(states.double(), want, rtol=0, atol=5e-5)
    layer, attention = attention_of(model)
    q, real = torch.randn(1, 4, 6, 8), torch.tensor([[1, 1, 1, 1, 0, 0]]).bool()
    for function, given in ((bidirectional_mask_function, True), (causal_mask_function, False)):
        skips = {"allow_is_bidirectional_skip": True}
        mask = sebp_mask(1, 6, 6, mask_function=function, attention_mask=real, **skips)
        attention(layer, q, q, q, mask, is_causal=not given)
        with pytest.raises(ValueError, match=f"is_causal is {given}, but the mask is "):
            attention(layer, q, q, q, mask, is_causal=given)


def test_a_window_over_gaps_is_refused() -> None:
    model = make("mistral")
    ids = draw_texts((12,))[0][None]
    gaps = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="gaps within texts"):
        model(input_ids=ids, attention_mask=gaps)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_the_users_own_goes_to_pytorch_with_a_warning(dtype: torch.dtype) -> None:
    model = make("llama")
    reference = in_double(model)
    ids = draw_texts((6,))[0][None]
    seen = (torch.rand(6, 6) < 0.5).logical_or(torch.eye(6) > 0)[None, None]
    mask = torch.zeros(1, 1, 6, 6).masked_fill(~seen, torch.finfo(torch.float32).min)
    given = seen if dtype == torch.bool else mask
    with pytest.warns(UserWarning, match="LlamaAttention: a mask of four dimensions"):
        states = hidden(model, {"input_ids": ids, "attention_mask": given})
    want = hidden(reference, {"input_ids": ids, "attention_mask": mask.double()})
    torch.testing.assert_close(states.double(), want, rtol=0, atol=5e-5)


def test_a_mask_of_padded_keys_alone_is_the_librarys() -> None:
    model = make("layoutlm")
    batch = padded("layoutlm", draw_texts((6, 3)))
    real = batch["attention_mask"].bool()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        states = hidden(model, batch)
    want = hidden(in_double(model), batch)
    torch.testing.assert_close(states.double()[real], want[real], rtol=0, atol=5e-5)


def test_a_mask_of_padded_keys_may_be_one_for_all_rows() -> None:
    model = make("layoutlm")
    batch = {"input_ids": torch.stack(draw_texts((6, 6))), "attention_mask": torch.ones(1, 6)}
    batch["attention_mask"][0, 4:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        states = hidden(model, batch)
    want = hidden(in_double(model), batch)
    torch.testing.assert_close(states.double()[:, :4], want[:, :4], rtol=0, atol=5e-5)


@pytest.mark.parametrize("attention", ["sebp", "sdpa"])
def test_a_mask_of_integers_is_not_taken_for_packed_texts(attention: str) -> None:
    model = make("bert")
    sebp.padding_free(model)
    model.set_attn_implementation(attention)
    mask = torch.ones(1, 1, 1, 6, dtype=torch.int64)
    with pytest.raises((ValueError, RuntimeError), match="(?i)int64|long"):
        hidden(model, {"input_ids": draw_texts((6,))[0][None], "attention_mask": mask})
