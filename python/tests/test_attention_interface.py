# SPDX-License-Identifier: Apache-2.0
"""``attn_implementation="sebp"`` in models of transformers, against eager attention."""

import copy
import itertools
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5")
import families  # noqa: E402
from attention_models import (  # noqa: E402
    LENGTHS,
    draw_texts,
    flat,
    hidden,
    in_double,
    make,
    padded,
    positions,
)

ENCODERS = ("bert", "roberta", "modernbert")
DECODERS = ("llama", "mistral", "gemma2", "qwen3", "gpt2")


def gradients(model: nn.Module, states: list[Tensor], douts: list[Tensor]) -> dict[str, Tensor]:
    """Differentiate the sum of states times dout, for all parameters."""
    model.zero_grad()
    sum((s * d.to(s.dtype)).sum() for s, d in zip(states, douts, strict=True)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check(model: nn.Module, states: list[Tensor], want: list[Tensor], reference: nn.Module) -> None:
    """Compare what real tokens get, and the gradients of all parameters."""
    douts = [torch.randn(x.shape) for x in want]
    wanted = gradients(reference, want, douts)
    found = gradients(model, states, douts)
    for a, b in zip(states, want, strict=True):
        assert b.abs().max() > 0.1
        torch.testing.assert_close(a.double(), b, rtol=0, atol=5e-5)
    assert found.keys() == wanted.keys() and len(found) > 5
    largest = max(g.abs().max() for g in wanted.values())
    for name, gradient in wanted.items():
        bound = float(2e-5 * largest)
        torch.testing.assert_close(found[name].double(), gradient, rtol=0, atol=bound, msg=name)


def test_importing_loads_no_transformers() -> None:
    code = (
        "import sys, sebp.torch; print('transformers' in sys.modules);"
        "import sebp; sebp.register_attention(); sebp.register_attention();"
        "from transformers import AttentionInterface as A, AttentionMaskInterface as M;"
        "print('sebp' in A(), 'sebp' in M())"
    )
    words = [sys.executable, "-c", code]
    said = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert said.split() == ["False", "True", "True"]


@pytest.mark.parametrize(
    "name, way",
    [
        *itertools.product([*ENCODERS, *DECODERS], ["flat", "right", "left", "ones"]),
        *itertools.product(DECODERS, ["positions"]),
    ],
)
def test_texts_are_computed_as_if_alone(name: str, way: str) -> None:
    model = make(name)
    reference = in_double(model)
    texts = draw_texts(LENGTHS if way != "ones" else (6, 6, 6))
    want = [
        hidden(reference, {"input_ids": t[None], "position_ids": positions(name, (len(t),))})[0]
        for t in texts
    ]
    if way in ("flat", "positions"):
        batch = flat(name, texts)
        if way == "positions":
            batch = {key: batch[key] for key in ("input_ids", "position_ids")}
            batch["use_cache"] = False
        states = list(hidden(model, batch)[0].split([len(t) for t in texts]))
    else:
        batch = padded(name, texts, left=way == "left")
        states = hidden(model, batch)
        states = [s[m] for s, m in zip(states, batch["attention_mask"].bool(), strict=True)]
    check(model, states, want, reference)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("use_cache", [False, True])
def test_positions_alone_say_where_texts_begin(name: str, use_cache: bool) -> None:
    # With a cache transformers' masks do not see it, but flash-attention does.
    model, texts = make(name), draw_texts()
    batch = flat(name, texts)
    both = {key: batch[key] for key in ("input_ids", "position_ids")}
    want = hidden(model, batch)
    torch.testing.assert_close(hidden(model, both, use_cache=use_cache), want)
    one = {"input_ids": both["input_ids"], "use_cache": use_cache}
    assert (hidden(model, one) - want).abs().max() > 1e-3


def test_rows_of_packed_texts() -> None:
    model = make("llama")
    rows = [(4, 2, 3), (1, 8)]
    texts = [draw_texts(lengths) for lengths in rows]
    batch = {
        "input_ids": torch.stack([torch.cat(row) for row in texts]),
        "position_ids": torch.cat([positions("llama", lengths) for lengths in rows]),
    }
    states = hidden(model, batch, use_cache=False)
    for row, lengths, got in zip(texts, rows, states, strict=True):
        for text, part in zip(row, got.split(lengths), strict=True):
            torch.testing.assert_close(part, hidden(model, {"input_ids": text[None]})[0])
    with pytest.raises(ValueError, match="use_cache=False"):
        hidden(model, batch, use_cache=True)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gaps_leave_the_order_of_tokens(name: str) -> None:
    model = make(name)
    reference = in_double(model)
    batch = families.make_batch(name, "base", "gaps", 1)
    real = batch["attention_mask"].bool()
    want, states = hidden(reference, batch), hidden(model, batch)
    check(model, [states[real]], [want[real]], reference)


def test_a_bias_of_positions_goes_with_flattened_texts() -> None:
    model = transformers.T5EncoderModel(families.FAMILIES["t5"].make_config()).eval()
    model.set_attn_implementation("sebp")
    reference = in_double(model)
    texts = draw_texts()
    batch = flat("t5", texts)
    del batch["position_ids"]
    states = list(hidden(model, batch)[0].split(list(LENGTHS)))
    want = [hidden(reference, {"input_ids": text[None]})[0] for text in texts]
    check(model, states, want, reference)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_the_padding_of_keys_is_not_that_of_as_many_queries(name: str) -> None:
    model = make(name)
    reference = in_double(model)
    batch = padded(name, draw_texts((6, 3)))
    del batch["position_ids"]
    batch["decoder_input_ids"] = torch.stack(draw_texts((6, 6)))
    want, states = hidden(reference, batch), hidden(model, batch)
    check(model, [states], [want], reference)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    batch["decoder_attention_mask"], real = mask, mask.bool()
    want, states = hidden(reference, batch), hidden(model, batch)
    check(model, [states[real]], [want[real]], reference)


# --------------------------------------------------------------------------------------------------
# Collators, losses, the Trainer


@pytest.mark.parametrize("has_lengths", [True, False])
def test_the_loss_of_flattened_texts_is_that_of_padded_ones(has_lengths: bool) -> None:
    model = make("qwen3", "lm")
    reference = in_double(model)
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=has_lengths)
    texts = draw_texts((7, 2, 5))
    batch = collator([{"input_ids": text.tolist()} for text in texts])
    assert ("cu_seq_lens_q" in batch) == has_lengths
    wanted = padded("qwen3", texts)
    wanted["labels"] = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, -100)
    loss, want = model(**batch).loss, reference(**wanted).loss
    torch.testing.assert_close(loss.double(), want.double(), rtol=1e-5, atol=0)
    for one in (loss, want):
        one.backward()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-3, atol=1e-6)


def test_a_run_of_the_trainer(tmp_path: object) -> None:
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=4,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=True,
        learning_rate=1e-2,
    )
    data = [{"input_ids": text.tolist()} for text in draw_texts((7, 2, 5, 1) * 4)]
    losses = []
    for way in ("eager", "sebp"):
        model = make("llama", "lm")
        model.set_attn_implementation(way)
        collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=way == "sebp")
        run = transformers.Trainer(model, arguments, collator, data)
        losses.append(run.train().training_loss)
    assert losses[0] > 1 and abs(losses[0] - losses[1]) < 1e-4


def test_checkpointing_repeats_dropout() -> None:
    config = families.FAMILIES["llama"].make_config()
    config.attention_dropout = 0.5
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="sebp").train()
    batch = flat("llama", draw_texts())
    found = []
    for way in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model.gradient_checkpointing_disable()
        if way is not None:
            model.gradient_checkpointing_enable(way)
        torch.manual_seed(7)
        states = hidden(model, batch, use_cache=False)
        found.append((states, gradients(model, [states], [torch.ones_like(states) / 8])))
    for states, of in found[1:]:
        assert torch.equal(states, found[0][0])
        assert all(torch.equal(of[name], gradient) for name, gradient in found[0][1].items())
    torch.manual_seed(8)
    assert not torch.equal(hidden(model, batch, use_cache=False), found[0][0])
    model.eval()
    assert torch.equal(hidden(model, batch), hidden(model, batch))


def test_autocast_and_bfloat16() -> None:
    model, texts = make("llama"), draw_texts()
    batch = flat("llama", texts)
    want = hidden(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        states = hidden(model, batch)
    gradients(model, [states], [torch.ones_like(states)])
    low = hidden(copy.deepcopy(model).bfloat16(), batch)
    assert low.dtype == torch.bfloat16
    for other in (states, low):
        error = (other.float() - want).abs().max() / want.abs().max()
        assert 0 < error < 0.05


def test_compiled_models_run_as_they_are() -> None:
    model, batch = make("llama"), flat("llama", draw_texts())
    del batch["position_ids"]
    want = hidden(model, batch, use_cache=False)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(hidden(compiled, batch, use_cache=False), want)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_traced_models_are_pytorchs() -> None:
    model = make("bert")
    batch = padded("bert", draw_texts((6, 3)))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    model.config.return_dict = False
    traced = torch.jit.trace(model, (ids, mask))
    assert "scaled_dot_product_attention" in str(traced.inlined_graph)
    real = mask.bool()
    torch.testing.assert_close(traced(ids, mask)[0][real], model(ids, mask)[0][real])


# --------------------------------------------------------------------------------------------------
# Caches


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_that_of_eager_attention(name: str, cache: str) -> None:
    head = "s2s" if name in ("t5", "bart") else "lm"
    model = make(name, head)
    batch = padded(name, draw_texts((3, 6, 1)), left=True)
    del batch["position_ids"]
    said = []
    for way in ("eager", "sebp"):
        model.set_attn_implementation(way)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model.generate(
                **batch,
                max_new_tokens=8,
                min_new_tokens=8,
                do_sample=False,
                cache_implementation=cache,
                output_logits=True,
                return_dict_in_generate=True,
                disable_compile=True,
            )
        said.append((out.sequences, torch.stack(out.logits)))
    assert torch.equal(said[0][0], said[1][0])
    torch.testing.assert_close(said[1][1], said[0][1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_text_in_two_pieces_is_the_whole(name: str) -> None:
    model = make(name)
    text = draw_texts((11,))[0][None]
    want = hidden(model, {"input_ids": text})
    first = model(input_ids=text[:, :7], use_cache=True)
    cache = first.get("cache") or first.get("past_key_values")
    key = "cache" if "cache" in first else "past_key_values"
    second = hidden(model, {"input_ids": text[:, 7:], key: cache})
    torch.testing.assert_close(torch.cat([first.last_hidden_state, second], 1), want)
