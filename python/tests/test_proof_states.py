# SPDX-License-Identifier: Apache-2.0
"""What the results of a call do not show: states, changes since, and losses behind the model."""

import copy
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

import families  # noqa: E402
from models import make_batch, make_model  # noqa: E402
from test_proof import MASK, Base, agree, bert, ids  # noqa: E402
from torch import nn  # noqa: E402

import sebp  # noqa: E402


def leaking(name, share, silent):
    """Let a layer add a share of the token before to each, across texts where they are packed."""
    model = make_model(name).train()
    layer = dict(model.named_modules())[
        {"bert": "bert.encoder.layer.0.output", "llama": "model.layers.0.mlp"}[name]
    ]
    forward = layer.forward

    def mixed(*args, **kwargs):
        y = forward(*args, **kwargs)
        return y + share * y.roll(1, 1)

    layer.forward = mixed
    if silent:  # as a new head, behind which nothing is seen
        head = model.classifier if name == "bert" else model.score
        nn.init.zeros_(head.weight)
    return model


def run_twice(model, name, autocast=False):
    """Return the counts of two calls of a model from which padding is taken out."""
    report = sebp.padding_free(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of padding that stays in
        for seed in (1, 2):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model(**make_batch(name, seed)).loss.backward()
    return report.calls


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("silent", [False, True])
def test_tokens_that_mix(silent, autocast):
    """Under autocast less than its rounding; behind a head of zeros."""
    calls = run_twice(leaking("bert", 3e-3, silent), "bert", autocast)
    assert calls[""] == 0
    assert any("last hidden state" in reason or "came out" in reason for reason in calls)
    calls = run_twice(leaking("bert", 0.0, silent), "bert", autocast)
    assert set(calls) == {""}


def test_less_than_any_tolerance():
    """Of 1e-4 it is that a result may be off, but a text may not notice others at all."""
    calls = run_twice(leaking("bert", 3e-5, False), "bert")
    assert calls[""] == 0
    assert any("depends on other texts" in reason for reason in calls)


class ReturnsItsLoss(Base):
    """Only a loss is seen, which is NaN where nothing is labelled."""

    def __init__(self):
        super().__init__()
        self.bert = bert()
        forward = self.bert.encoder.layer[0].output.forward

        def mixed(x, y):
            y = forward(x, y)
            return y + 0.3 * y.roll(1, 1)

        self.bert.encoder.layer[0].output.forward = mixed

    def forward(self, input_ids, attention_mask, labels):
        h = self.linear(self.encode(input_ids, attention_mask))
        return nn.functional.cross_entropy(h.flatten(0, 1), labels.flatten())


def test_nan_shows_nothing():
    model = ReturnsItsLoss().train()
    report = sebp.padding_free(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for labelled in (False, True):
            labels = torch.full(MASK.shape, -100)
            labels[:, 0] = 1 if labelled else -100
            model(ids(), MASK, labels)
    assert report.calls[""] == 0


@pytest.mark.parametrize("name", ["falcon_h1", "jamba", "bamba", "qwen3_next", "lfm2"])
def test_layers_that_mix_tokens(name):
    """They are refused before they run."""
    sizes = dict(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    kinds = {
        "falcon_h1": ("FalconH1", dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8)),
        "jamba": ("Jamba", dict(mamba_dt_rank=4, num_experts=2)),
        "bamba": ("Bamba", dict(mamba_n_heads=8, mamba_d_head=8)),
        "qwen3_next": (
            "Qwen3Next",
            dict(
                layer_types=["linear_attention", "full_attention"],
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                linear_num_key_heads=2,
                linear_num_value_heads=4,
                num_experts=2,
                head_dim=8,
            ),
        ),
        "lfm2": ("Lfm2", dict(layer_types=["conv", "full_attention"])),
    }
    prefix, more = kinds[name]
    config = getattr(transformers, f"{prefix}Config")(**sizes, **more)
    model = getattr(transformers, f"{prefix}Model")(config)
    report = sebp.padding_free(model)
    assert not report.changed
    assert "looks at other tokens" in str(report)


@pytest.mark.parametrize("name", ["opt", "biogpt"])
@pytest.mark.parametrize("check", [False, True])
def test_positions_that_count_real_tokens(name, check):
    """Those of texts that are padded on the left."""
    plain = families.make_model(name, "lm").train()
    ours = copy.deepcopy(plain)
    report = sebp.padding_free(ours, check=check)
    for seed in (1, 2):
        batch = families.make_batch(name, "lm", "left", seed)
        first = batch["attention_mask"].argmax(1)
        batch["labels"][torch.arange(len(first)), first] = -100  # predicted from padding
        losses = []
        for model in (plain, ours):
            model.zero_grad()
            losses.append(model(**batch).loss)
            losses[-1].backward()
        torch.testing.assert_close(losses[1], losses[0])
        for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5)
    assert set(report.calls) == {""}


def test_nested_rope_that_depends_on_the_length():
    model = families.make_model("gemma3", "lm").train()
    base = model.model
    parameters = base.config.rope_parameters
    nested = {key: value for key, value in parameters.items() if isinstance(value, dict)}
    assert nested  # else this tests nothing
    next(iter(nested.values()))["rope_type"] = "dynamic"
    report = sebp.padding_free(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(**families.make_batch("gemma3", "lm", "right", 1))
    assert report.calls[""] == 0
    assert "rotary embeddings that depend on the length (dynamic)" in str(report)


OUTSIDE = {
    "clamp": lambda h: h.clamp(-2, 2).mean(1).square().mean(),
    "hardtanh": lambda h: nn.functional.hardtanh(h).mean(1).square().mean(),
    "median": lambda h: h.median(1).values.square().mean(),
    "maximum": lambda h: h.amax(1).square().mean(),
    "mean": lambda h: h.mean(1).square().mean(),
}


@pytest.mark.parametrize("loss", OUTSIDE.values(), ids=OUTSIDE)
def test_losses_behind_the_model(loss):
    """No call of the model shows them, but their gradient does, at large numbers or small ones."""
    model = bert().train()
    sebp.padding_free(model)
    h = model(ids(), attention_mask=MASK).last_hidden_state
    with pytest.raises(RuntimeError, match="gradient"):
        loss(h).backward()


def test_noise_of_short_formats():
    """It is finite, however large the states are."""
    model = bert().train().half()
    sebp.padding_free(model)
    with torch.no_grad():
        model.encoder.layer[-1].output.LayerNorm.weight.fill_(3e4)
    h = model(ids(), attention_mask=MASK).last_hidden_state
    assert h[MASK == 0].isfinite().all()


CHANGES = {
    "window": lambda model: setattr(model.config, "sliding_window", 3),
    "part": lambda model: _mix(model.model.layers[0].mlp),
}


def _mix(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x) + forward(x).roll(1, 1)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_after_the_proof(change):
    plain = families.make_model("mistral", "lm").train()
    ours = copy.deepcopy(plain)
    report = sebp.padding_free(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in (1, 2, 3, 4):
            batch = families.make_batch("mistral", "lm", "right", seed)
            torch.testing.assert_close(ours(**batch).loss, plain(**batch).loss)
            if seed == 2:
                assert report.calls[""] == 2
                change(plain)
                change(ours)


def _add_share(layer, share):
    forward = type(layer).forward
    layer.forward = lambda x: forward(layer, x) + share * forward(layer, x).roll(1, 1)


def test_another_forward_of_the_same_name():
    """It is told by itself, not by what it is called."""
    plain = families.make_model("llama", "lm").train()
    ours = copy.deepcopy(plain)
    for model in (plain, ours):
        _add_share(model.model.layers[0].mlp, 0.0)
    report = sebp.padding_free(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed, share in ((1, 0.0), (2, 1.0), (3, 1.0)):
            if share:
                for model in (plain, ours):
                    _add_share(model.model.layers[0].mlp, share)
            batch = families.make_batch("llama", "lm", "right", seed)
            torch.testing.assert_close(ours(**batch).loss, plain(**batch).loss)
    assert report.calls[""] == 1


class MovesATensor(Base):
    def __init__(self):
        super().__init__()
        self.center = torch.zeros(32)

    def forward(self, input_ids, attention_mask):
        h = self.encode(input_ids, attention_mask)
        self.center.mul_(0.5).add_(h.detach()[:, 0].mean(0))
        return self.loss(h - self.center)


class KeepsAList(Base):
    def __init__(self):
        super().__init__()
        self.losses, self.counts = [], {"calls": 0}

    def forward(self, input_ids, attention_mask):
        loss = self.loss(self.encode(input_ids, attention_mask))
        self.losses.append(loss.item())
        self.counts["calls"] += 1
        return loss * len(self.losses) * self.counts["calls"]


@pytest.mark.parametrize("make", [MovesATensor, KeepsAList])
def test_attributes_that_change_in_place(make):
    """Once in a call, however often it is compared."""
    agree(make, lambda m, b: m(ids(seed=b + 1), MASK), batches=3)


def test_configuration_that_cannot_be_read():
    """As where each layer has a window of its own."""
    model = bert()

    class Config(type(model.config)):
        @property
        def sliding_window(self):
            raise RuntimeError("which layer's?")

    model.config.__class__ = Config
    report = sebp.padding_free(model)
    assert "no one window of attention for all layers" in str(report)
