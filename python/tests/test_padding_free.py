# SPDX-License-Identifier: Apache-2.0
"""Encoders and decoders on real tokens alone: the same results as with padding."""

import copy
import inspect
import pickle
import subprocess
import sys
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from models import make_batch, make_model  # noqa: E402
from padding_free_models import DECODERS, ENCODERS, SIDES, pair, same, watch_rows  # noqa: E402
from torch import nn  # noqa: E402

import sebp  # noqa: E402
from sebp.torch.padding.models import proofs_of  # noqa: E402


def spy(capfd, monkeypatch):
    monkeypatch.setenv("SEBP_VERBOSE", "1")
    return lambda: [line for line in capfd.readouterr().err.split("\n") if "padding_free" in line]


# --------------------------------------------------------------------------------------------------
# One step


@SIDES
@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name, left):
    same(*pair(name), make_batch(name, 1, left))


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder(name):
    same(*pair(name), make_batch(name, 1))


@pytest.mark.filterwarnings("ignore:sebp")
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_reads_the_first_token(name, capfd, monkeypatch):
    """So it must not be padding: with padding on the left the model is as it was."""
    lines = spy(capfd, monkeypatch)
    same(*pair(name), make_batch(name, 1, left=True), packed=False)
    (line,) = lines()
    assert line.startswith("sebp,fallback,padding_free,")
    assert line.endswith(",a text whose first token is padding")


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_no_padding(name):
    batch = make_batch(name, 1)
    full = torch.ones_like(batch["attention_mask"])
    batch["input_ids"] = batch["input_ids"].clamp(min=5)
    same(*pair(name), {**batch, "attention_mask": full}, packed=False)


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_no_mask(name):
    plain, ours = pair(name)
    ids = make_batch(name, 1)["input_ids"]
    with pytest.warns(UserWarning, match="no attention_mask"):
        got = ours(ids).logits
    torch.testing.assert_close(got, plain(ids).logits)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_equal_lengths_and_holes(name):
    """Texts of one length go through attention together; padding may lie within a text."""
    batch = make_batch(name, 1)
    mask = torch.zeros_like(batch["attention_mask"])
    mask[0, :5], mask[1, :7], mask[2, :5], mask[3, 0], mask[3, 4:8] = 1, 1, 1, 1, 1
    batch["attention_mask"] = mask
    if name == "llama":
        batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
        batch["labels"][3, 4] = -100  # predicted from padding
    same(*pair(name), batch)


@pytest.mark.filterwarnings("ignore:sebp")
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_empty_text(name):
    """A text of padding alone."""
    plain, ours = pair(name)
    batch = make_batch(name, 1)
    batch["attention_mask"][2] = 0
    if name == "llama":
        batch["labels"][2] = -100
    same(plain, ours, batch, packed=name == "llama")
    batch["attention_mask"][:] = 0
    loss = ours(**batch).loss
    torch.testing.assert_close(loss, plain(**batch).loss, equal_nan=True)


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "qwen2"])
def test_positions_and_types_given(name):
    plain, ours = pair(name)
    batch = make_batch(name, 1)
    batch["position_ids"] = torch.arange(20, 4, -1)[None].expand(4, 16) % 19 + 2
    if name == "bert":
        batch["token_type_ids"] = torch.randint(0, 2, (4, 16))
    same(plain, ours, batch)
    batch["position_ids"] = batch["position_ids"][:1]
    for p in ours.parameters():
        p.grad = None
    torch.testing.assert_close(ours(**batch).loss, plain(**batch).loss)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "llama"])
def test_embeddings_given(name):
    plain, ours = pair(name)
    batch = make_batch(name, 1)
    ids = batch.pop("input_ids")
    x = plain.get_input_embeddings()(ids).detach().requires_grad_()
    want, got = (m(inputs_embeds=x, **batch).loss for m in (plain, ours))
    torch.testing.assert_close(got, want)
    want, got = (torch.autograd.grad(loss, x)[0] for loss in (want, got))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_other_heads():
    config = make_model("bert").config
    batch = make_batch("bert", 1)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for head, target in (
        (transformers.BertForMaskedLM, labels),
        (transformers.BertForTokenClassification, labels.clamp(max=1)),
    ):
        plain = head(config)
        ours = copy.deepcopy(plain)
        assert sebp.padding_free(ours).changed == ["bert"]
        same(plain, ours, {**batch, "labels": target})
    plain = transformers.BertModel(config).train()
    ours = copy.deepcopy(plain)
    assert sebp.padding_free(ours).changed == ["BertModel"]
    del batch["labels"]
    want, got = plain(**batch), ours(**batch)
    torch.testing.assert_close(got.pooler_output, want.pooler_output)
    got = ours(batch["input_ids"], batch["attention_mask"], return_dict=False)
    torch.testing.assert_close(got[1], want.pooler_output)
    inside = batch["attention_mask"].bool()
    torch.testing.assert_close(got[0][inside], want.last_hidden_state[inside])


def test_tuple_of_a_decoder():
    plain, ours = pair("llama")
    batch = make_batch("llama", 1)
    got = ours.model(batch["input_ids"], batch["attention_mask"], return_dict=False)
    want = plain.model(batch["input_ids"], batch["attention_mask"], use_cache=False)
    inside = batch["attention_mask"].bool()
    torch.testing.assert_close(got[0][inside], want.last_hidden_state[inside])


def test_sequence_classification_by_a_decoder():
    torch.manual_seed(0)
    plain = transformers.LlamaForSequenceClassification(make_model("llama").config).train()
    ours = copy.deepcopy(plain)
    sebp.padding_free(ours)
    batch = make_batch("llama", 1)
    same(plain, ours, {**batch, "labels": torch.tensor([0, 1, 1, 0])})


def test_dropout():
    """It is drawn: losses differ from call to call, in training alone."""
    model = make_model("bert")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    batch = make_batch("bert", 1)
    sebp.padding_free(model)
    losses = [model.train()(**batch).loss.item() for _ in range(3)]
    assert len(set(losses)) == 3
    assert len({model.eval()(**batch).loss.item() for _ in range(3)}) == 1


# --------------------------------------------------------------------------------------------------
# What is left to the model as it was


def test_generate():
    plain, ours = pair("llama")
    plain.eval()
    ours.eval()
    batch = make_batch("llama", 1, left=True)
    del batch["labels"]
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    want, got = (m.generate(**batch, **options) for m in (plain, ours))
    assert torch.equal(got, want)


def test_cache():
    plain, ours = pair("llama")
    batch = make_batch("llama", 1)
    rows = watch_rows(ours)
    tokens = int(batch["attention_mask"].sum())
    assert ours(**batch).past_key_values is None
    assert ours(**batch, use_cache=True).past_key_values.get_seq_length() == 16
    assert ours.eval()(**batch).past_key_values.get_seq_length() == 16
    with torch.no_grad(), pytest.warns(UserWarning, match="logits depends on padded tokens"):
        got = ours(**batch, use_cache=False)
    torch.testing.assert_close(got.loss, plain.eval()(**batch).loss)
    assert rows == [tokens, 64, tokens, tokens, 64, 64, tokens, 64]
    cache = transformers.DynamicCache(config=ours.config)
    names = inspect.signature(ours.model.forward).parameters
    name = "cache" if "cache" in names else "past_key_values"  # as older ones call it
    ours.train()(**batch, **{name: cache})
    assert cache.get_seq_length() == 16


@pytest.mark.parametrize("how", ["positions", "lengths"])
def test_texts_end_to_end_have_no_padding(how):
    """So that leaves nothing to warn of."""
    model = make_model("llama").train()
    sebp.register_attention()
    model.set_attn_implementation("sebp")
    report = sebp.padding_free(model)
    ids = torch.arange(5, 12)[None]
    texts = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}
    if how == "lengths":
        offsets = torch.tensor([0, 3, 7], dtype=torch.int32)
        texts.update(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, labels=ids, use_cache=False, **texts).loss.backward()
    assert report.calls == {"no padding: texts lie end to end": 1}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"output_hidden_states": True}, "the argument output_hidden_states"),
        ({"output_attentions": True}, "the argument output_attentions"),
        ({"is_causal": False}, "the argument is_causal"),
        ({"encoder_hidden_states": torch.zeros(4, 16, 32)}, "the argument encoder_hidden_states"),
        ({"attention_mask": torch.ones(4, 1, 16, 16).bool()}, "a mask of 4 dimensions"),
        ({"attention_mask": None}, "no attention_mask"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_fallbacks(options, reason, capfd, monkeypatch):
    lines = spy(capfd, monkeypatch)
    plain, ours = pair("bert")
    batch = {**make_batch("bert", 1), **options}
    rows = watch_rows(ours)
    want, got = plain(**batch), ours(**batch)
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.hidden_states, want.hidden_states)
    assert rows == [64]
    assert lines() == [f"sebp,fallback,padding_free,BertModel,{reason}"]


@SIDES
def test_sliding_window(left):
    """Proved once for texts shorter than the window, and again for longer ones."""
    plain, ours = pair("mistral")
    plain.config.sliding_window = ours.config.sliding_window = 4
    for model in (plain, ours):
        model.model.config.sliding_window = 4
    for seed, most in ((1, 3), (2, 7), (3, 7)):
        batch = make_batch("mistral", seed, left)
        mask = batch["attention_mask"]
        mask *= ((mask.flip(1) if left else mask).cumsum(1) <= most).flip(1 if left else ())
        batch["labels"] = batch["input_ids"].masked_fill(mask.cumsum(1) * mask <= 1, -100)
        same(plain, ours, batch, packed=seed != 2)  # as the first of its kind
    same(plain, ours, batch)
    assert len(proofs_of(ours).proved) == 2


@pytest.mark.filterwarnings("ignore:sebp")
def test_other_attention_set_later():
    plain, ours = pair("bert")
    ours.set_attn_implementation("eager")
    same(plain, ours, make_batch("bert", 1), packed=False)
    assert sebp.remove_padding_free(ours) == ["bert"]
    assert ours.config._attn_implementation == "eager"


@pytest.mark.filterwarnings("ignore")
def test_tracing():
    _, ours = pair("bert")
    batch = make_batch("bert", 1)
    inputs = (batch["input_ids"], batch["attention_mask"])
    ours.eval()
    ours.config.return_dict = False
    with torch.no_grad():
        traced = torch.jit.trace(ours, inputs)
        other = make_batch("bert", 2)
        inputs = (other["input_ids"], other["attention_mask"])
        torch.testing.assert_close(traced(*inputs)[0], ours(*inputs)[0])


# --------------------------------------------------------------------------------------------------
# The report, and the way back


def test_in_another_process(tmp_path):
    """A model that is loaded puts its attention into transformers' table there."""
    plain, ours = pair("bert")
    batch = make_batch("bert", 1)
    torch.save((ours, batch, plain(**batch).loss.detach()), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, batch, loss = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(model(**batch).loss.detach(), loss)\n"
        "from sebp.torch.padding.models import proofs_of\n"
        "assert proofs_of(model).calls[''] == 1, proofs_of(model)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_there_and_back(tmp_path):
    plain, ours = make_model("bert"), make_model("bert")
    parameters = dict(ours.named_parameters())
    report = sebp.padding_free(ours)
    assert report.changed == ["bert"]
    assert str(report) == "bert runs without padding: 13 linear layers in all"
    assert all(parameters[name] is p for name, p in ours.named_parameters())
    ours.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")
    saved = [(tmp_path / name / "config.json").read_text() for name in ("ours", "plain")]
    assert saved[0] == saved[1]
    with pytest.warns(UserWarning, match="without padding already: bert"):
        assert sebp.padding_free(ours).already == ["bert"]
    for _ in range(2):
        twin = copy.deepcopy(ours)
        assert sebp.remove_padding_free(twin) == ["bert"]
        assert not any("forward" in vars(m) for m in twin.modules())
        assert not any(key.startswith("_sebp") for m in twin.modules() for key in vars(m))
        ours = pickle.loads(pickle.dumps(ours))
    same(plain, ours, make_batch("bert", 1))
    assert sebp.remove_padding_free(ours) == ["bert"]
    assert sebp.remove_padding_free(ours) == []
    same(plain, ours, make_batch("bert", 1), packed=False)


@pytest.mark.parametrize("first", ["sebp", "padding_free"])
def test_remove_is_apart(first):
    """SEBP in the layers and padding-free are put in and taken out each on its own."""
    plain, ours = pair("bert")
    sebp.apply_sebp_to_model(ours)
    if first == "sebp":
        sebp.remove_sebp_from_model(ours)
    else:
        sebp.remove_padding_free(ours)
    same(plain, ours, make_batch("bert", 1), packed=first == "sebp")


def test_one_configuration_for_two_models():
    """What is done to one model does not concern the other."""
    plain = make_model("bert").train()
    first, second = copy.deepcopy(plain), copy.deepcopy(plain)
    second.config = first.config
    for module in second.modules():
        if hasattr(module, "config"):
            module.config = first.config
    sebp.padding_free(first)
    batch = make_batch("bert", 1)
    same(plain, second, batch, packed=False)
    sebp.padding_free(second)
    sebp.remove_padding_free(first)
    same(plain, second, batch)


def test_old_transformers(monkeypatch):
    model = make_model("bert")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    report = sebp.padding_free(model)
    assert report.skipped == {"bert": "it is of transformers 4.57.1, which is before 5"}


def test_left_alone():
    class Mixer(nn.Linear):
        pass

    model = make_model("bert")
    model.bert.encoder.layer[0].output.dense = Mixer(64, 32)
    report = sebp.padding_free(model)
    assert report.skipped == {"bert": "it holds a Mixer, which may look at other tokens"}
    assert "bert left alone: it holds a Mixer" in str(report)

    model = nn.Sequential(nn.Linear(3, 3))
    report = sebp.padding_free(model)
    assert report.changed == []
    assert "there is no base model of transformers" in report.skipped["Sequential"]
    assert "forward" not in vars(model)

    model = make_model("bert")
    model.set_attn_implementation("eager")
    reason = 'its attention is "eager", not "sdpa" or "sebp"'
    assert sebp.padding_free(model).skipped == {"bert": reason}
    assert model.config._attn_implementation == "eager"

    model = make_model("bert")
    model.bert.forward = model.bert.forward
    assert sebp.padding_free(model).skipped == {"bert": "its forward has been replaced"}


def test_encoder_used_as_a_decoder():
    config = copy.deepcopy(make_model("bert").config)
    config.is_decoder = True
    plain = transformers.BertLMHeadModel(config).train()
    ours = copy.deepcopy(plain)
    assert sebp.padding_free(ours).changed == ["bert"]
    same(plain, ours, make_batch("llama", 1))


def test_two_encoders():
    model = nn.ModuleDict({"query": make_model("bert"), "text": make_model("roberta")})
    assert sebp.padding_free(model).changed == ["query.bert", "text.roberta"]


@pytest.mark.filterwarnings("ignore:sebp")
@pytest.mark.parametrize("shape", [(4, 15), (3, 16), (4, 17)])
def test_mask_of_the_wrong_shape(shape):
    """The model says what it says by itself."""
    plain, ours = pair("bert")
    batch = make_batch("bert", 1)
    batch["attention_mask"] = torch.ones(shape)
    batch["attention_mask"][0, 2:] = 0
    errors = []
    for model in (plain, ours):
        with pytest.raises((RuntimeError, IndexError)) as error:
            model(**batch)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.filterwarnings("ignore:sebp")
def test_rope_that_depends_on_the_length():
    """Left to the model: the longest text is shorter than what it is padded to."""
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=8,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    )
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(config).train()
    ours = copy.deepcopy(plain)
    sebp.padding_free(ours)
    same(plain, ours, make_batch("llama", 0, length=32), packed=False)
