# SPDX-License-Identifier: Apache-2.0
"""Parts of models that have to know where padding was left out: positions, biases, encoders."""

import copy
import pickle
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from families import make_batch, make_model  # noqa: E402
from torch import nn  # noqa: E402

import sebp  # noqa: E402
from sebp.torch.attention import relative_bias  # noqa: E402
from sebp.torch.common.packing import Packing  # noqa: E402


def pair(name, head="base", **options):
    """Make a model and its twin without padding, with what that reports."""
    plain = make_model(name, head).train()
    ours = copy.deepcopy(plain)
    return plain, ours, sebp.padding_free(ours, **options)


def first(output):
    """Give what a loss is made of."""
    return output.loss if getattr(output, "loss", None) is not None else output.last_hidden_state


def loss_of(model, batch):
    """Make a loss of real tokens alone."""
    value = first(model(**batch))
    real = batch.get("decoder_attention_mask", batch["attention_mask"]).bool()
    return value if value.dim() == 0 else value[real].tanh().mean()


def assert_same_step(plain, ours, batch):
    """Compare loss and gradients."""
    found = []
    for model in (plain, ours):
        model.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert sum(g is not None and bool(g.any()) for g in found[0][1].values()) > 10


# --------------------------------------------------------------------------------------------------
# Biases of relative positions


def test_bias_by_distance():
    stack = make_model("t5", "base").encoder
    assert relative_bias.goes_by_distance(stack)
    assert relative_bias.goes_by_distance(make_model("umt5", "base").encoder)
    assert not relative_bias.goes_by_distance(make_model("bart", "base").encoder)
    assert not relative_bias.goes_by_distance(nn.Linear(2, 2))


def _of_places(layer, queries, keys, device=None, past_seen_tokens=0):
    """Add what depends on the place of the query."""
    place = torch.arange(queries)[:, None].expand(queries, keys)
    return layer.relative_attention_bias(place.clamp(max=3)).permute(2, 0, 1)[None]


def _of_lengths(layer, queries, keys, device=None, past_seen_tokens=0):
    """Add what depends on the number of tokens."""
    place = torch.full((queries, keys), queries % 8)
    return layer.relative_attention_bias(place).permute(2, 0, 1)[None]


@pytest.mark.parametrize("compute", [_of_places, _of_lengths])
def test_bias_by_something_else(compute, monkeypatch):
    """Such a model runs as it is, also where its tables are zero and hide what they do."""
    model = make_model("t5_encoder", "base").train()
    kind = type(model.encoder.block[0].layer[0].SelfAttention)
    monkeypatch.setattr(kind, "compute_bias", compute)
    with torch.no_grad():
        model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
    report = sebp.padding_free(model)
    assert report.changed == []
    assert set(report.skipped.values()) == {"it cannot be told positions"}


@pytest.mark.parametrize("name", ["t5_encoder", "mpnet"])
def test_gaps_that_count(name):
    """A table of zeros would hide that a gap between two tokens counts, so gaps are refused."""
    plain, ours, report = pair(name)
    with pytest.warns(UserWarning, match="padding between the tokens of a text"):
        assert_same_step(plain, ours, make_batch(name, "base", "gaps", 1))
    assert report.calls[""] == 0
    assert_same_step(plain, ours, make_batch(name, "base", "right", 1))
    assert report.calls[""] == 1


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["t5_encoder", "umt5_encoder", "bart", "clip_text"])
def test_checkpointing(name, reentrant):
    """What is computed again has the same positions."""
    plain, ours, report = pair(name)
    for model in (plain, ours):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    for seed in (1, 2):
        assert_same_step(plain, ours, make_batch(name, "base", "right", seed))
    assert report.calls[""] == 2


@pytest.mark.parametrize("name", ["t5_encoder", "umt5_encoder", "bart", "clip_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_attention_by_the_library(name, dtype):
    """With "sebp" attention, in dtypes that the library has and in one that it has not."""
    plain = make_model(name, "base").to(dtype).train()
    ours = copy.deepcopy(plain)
    if dtype != torch.float64:
        ours.set_attn_implementation(sebp.register_attention())
    report = sebp.padding_free(ours)
    for seed in (1, 2):
        batch = make_batch(name, "base", "right", seed)
        if dtype != torch.bfloat16:
            assert_same_step(plain, ours, batch)
        else:
            want, got = (loss_of(model, batch) for model in (plain, ours))
            torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)
    assert report.calls[""] == 2


# --------------------------------------------------------------------------------------------------
# Positions that a model finds by itself


@pytest.mark.parametrize("name", ["bart", "m2m_100", "pegasus"])
def test_positions_of_embeddings(name):
    """They are found where a model is handed embeddings, too."""
    plain, ours, report = pair(name)
    for seed in (1, 2):
        batch = make_batch(name, "base", "right", seed)
        ids = batch.pop("input_ids")
        found = []
        for model in (plain, ours):
            embeds = model.get_input_embeddings()(ids)
            out = model(inputs_embeds=embeds, **batch).last_hidden_state
            found.append(out[batch["decoder_attention_mask"].bool()])
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert report.calls[""] == 2


def test_positions_of_padded_tokens():
    """M2M100 counts the tokens that are not its padding token, which may be real ones."""
    plain, ours, report = pair("m2m_100")
    batch = make_batch("m2m_100", "base", "right", 1)
    batch["input_ids"][0, 1] = plain.config.pad_token_id
    want, got = (model(**batch).encoder_last_hidden_state for model in (plain, ours))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)
    assert report.calls[""] == 1


def test_positions_of_something_else(monkeypatch):
    """What is neither tokens nor of their shape cannot be padded again."""
    from transformers.modeling_outputs import BaseModelOutput

    plain = make_model("m2m_100", "base").train()

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs):
        x = self.embed_tokens(input_ids) + self.embed_positions(input_ids + 1)
        return BaseModelOutput(last_hidden_state=x)

    monkeypatch.setattr(type(plain.encoder), "forward", forward)
    ours = copy.deepcopy(plain)
    sebp.padding_free(ours)
    batch = make_batch("m2m_100", "base", "right", 1)
    with pytest.warns(UserWarning, match="its positions come from something else than its tokens"):
        got = ours(**batch).last_hidden_state
    torch.testing.assert_close(got, plain(**batch).last_hidden_state)


@pytest.mark.parametrize("name", ["switch_transformers", "nllb_moe"])
def test_experts_of_a_capacity(name):
    """Which tokens an expert leaves out depends on those before, of the text or of the row."""
    _, _, report = pair(name)
    assert report.changed == []
    assert "its experts take no more than so many tokens of a text" in report.skipped.values()


# --------------------------------------------------------------------------------------------------
# Encoders that are handed embeddings


def test_largest_of_all_tokens():
    """CLIP's last norm makes padded tokens small again; a maximum over all has them nonetheless."""
    plain, ours, report = pair("clip_text")
    mask = (torch.arange(12) < torch.tensor([[12], [11], [10], [10]])).long()
    found = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs as it is
        for seed in range(4):
            ids = torch.randint(6, 59, mask.shape, generator=torch.Generator().manual_seed(seed))
            batch = {"input_ids": ids * mask, "attention_mask": mask}
            want, got = (m(**batch).last_hidden_state.abs().amax(1).mean() for m in (plain, ours))
            with pytest.raises(RuntimeError, match="mask leaves out"):
                got.backward()
            found += int(abs(float(want - got)) > 1e-3)
    assert found > 0
    assert report.calls[""] == 4


@pytest.mark.parametrize("name", ["clip_text", "clip_text_ended", "metaclip_2_text"])
def test_pooled_tokens_in_evaluation(name):
    """Without the check padded tokens are zeros; the token that is pooled is the model's own."""
    plain, ours, report = pair(name, check=False)
    batch = make_batch(name, "base", "right", 1)
    with torch.no_grad():
        want, got = (model.eval()(**batch) for model in (plain, ours))
    torch.testing.assert_close(got.pooler_output, want.pooler_output, rtol=1e-4, atol=1e-5)
    real = batch["attention_mask"].bool()
    states = got.last_hidden_state
    torch.testing.assert_close(states[real], want.last_hidden_state[real], rtol=1e-4, atol=1e-5)
    assert bool((states[~real] == 0).all())
    assert report.calls[""] == 1


def test_last_token_of_a_padded_row():
    """SigLIP pools it, though it is padding: so the model runs as it is."""
    plain, ours, report = pair("siglip_text")
    batch = make_batch("siglip_text", "base", "right", 1)
    with pytest.warns(UserWarning, match="pooler_output came out otherwise"):
        got = ours(**batch).pooler_output
    torch.testing.assert_close(got, plain(**batch).pooler_output)
    assert report.calls[""] == 0
    # Where all last tokens are real it is proved, and that says nothing of other batches.
    for last in (1, 1, 0, 0):
        mask = batch["attention_mask"].clone()
        mask[:, 0], mask[:, -1] = 1, torch.tensor([1, 1, 1, last])
        mask[:, 4:6] = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it runs as it is
            want, got = (
                model(batch["input_ids"], attention_mask=mask).pooler_output.tanh().mean()
                for model in (plain, ours)
            )
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        got.backward()
    assert report.calls[""] == 2


def test_images_and_texts():
    """CLIP's texts leave padding out beside images, whose patches are all there."""
    plain, ours, report = pair("clip")
    for seed in (1, 2):
        batch = {**make_batch("clip", "base", "right", seed), "return_loss": True}
        assert_same_step(plain, ours, batch)
    assert report.calls[""] == 2
    mask = batch["attention_mask"]
    assert report.tokens["left out"] >= int((mask == 0).sum())
    vision = transformers.CLIPVisionModel(plain.config.vision_config)
    assert "no base model" in sebp.padding_free(vision).skipped["CLIPVisionModel"]


# --------------------------------------------------------------------------------------------------
# Encoders with a decoder


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_labels_of_the_decoder(name):
    """They are not the encoder's, though they may be as many."""
    plain, ours, report = pair(name, "s2s")
    for seed in (1, 2):
        batch = make_batch(name, "s2s", "right", seed)
        labels = batch["input_ids"].clamp(min=6)
        assert_same_step(plain, ours, {**batch, "labels": labels})
    assert report.calls[""] == 2
    assert report.skipped == {
        name: "it reads what the encoder returns, too" for name in report.skipped
    }
    assert len(report.skipped) == 1


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generation(name):
    plain, ours, _ = pair(name, "s2s")
    batch = make_batch(name, "s2s", "right", 1)
    del batch["labels"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs as it is
        want, got = (m.eval().generate(**batch, max_new_tokens=4) for m in (plain, ours))
    assert torch.equal(got, want)


# --------------------------------------------------------------------------------------------------
# Copies, and what is left of it


@pytest.mark.parametrize("name", ["t5", "bart", "clip_text"])
def test_copies_and_undoing(name):
    plain, ours, _ = pair(name)
    batch = make_batch(name, "base", "right", 1)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same_step(plain, twin, batch)
    assert len(sebp.remove_padding_free(ours)) == 1
    for module in ours.modules():
        left = [key for key in vars(module) if "sebp" in key or key in ("forward", "compute_bias")]
        assert left == []
    want, got = (first(model(**batch)) for model in (plain, ours))
    assert torch.equal(got, want)


def test_a_part_that_two_models_hold():
    """It goes on without padding when one of them is put back."""
    plain, ours, report = pair("t5_encoder")
    part = sebp.padding_free(ours.encoder)
    batch = make_batch("t5_encoder", "base", "right", 1)
    assert_same_step(plain, ours, batch)
    sebp.remove_padding_free(ours)
    assert_same_step(plain.encoder, ours.encoder, batch)
    assert (report.calls[""], part.calls[""]) == (1, 1)
    sebp.remove_padding_free(ours.encoder)
    assert not any("compute_bias" in vars(module) for module in ours.modules())


@pytest.mark.parametrize("name", ["t5_encoder", "bart", "clip_text"])
def test_compile(name):
    """Under torch.compile the model is as it was, in one graph."""
    plain, ours, _ = pair(name)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    batch = make_batch(name, "base", "right", 1)
    want, got = (loss_of(model, batch) for model in (plain, compiled))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Kinds of batches


def test_where_padding_is():
    one, two = [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]
    for rows, side in (
        ([one, [1] * 5, [0] * 5], "right"),
        ([two, [1] * 5, [0] * 5], "left"),
        ([one, two], "around"),
        ([[0, 1, 1, 0, 0]], "around"),
        ([one, [1, 0, 1, 0, 0]], "gaps"),
        ([two, [0, 1, 0, 1, 1]], "gaps"),
    ):
        packing = Packing(torch.tensor(rows))
        assert packing.side == side
        assert packing.has_several == (sum(map(any, rows)) > 1)


def test_convolutions_mix_texts():
    """They are refused before anything runs, as few numbers show it at first."""
    plain, ours, report = pair("lfm2", "lm")
    assert "ShortConv, which looks at other tokens" in str(report.skipped)
    assert_same_step(plain, ours, make_batch("lfm2", "lm", "right", 1))
    assert not report.calls[""]
