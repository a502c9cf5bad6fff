# SPDX-License-Identifier: Apache-2.0
"""What padding-free runs are proved by, and that they fall back where they are not."""

import copy
import random
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from models import NO_DROPOUT, SIZES, make_batch, make_model  # noqa: E402
from torch import nn  # noqa: E402

import sebp  # noqa: E402

MASK = (torch.arange(12) < torch.tensor([5, 12, 9, 3])[:, None]).long()


def jitter(model):
    """Make positions, norms and biases matter."""
    numbers = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=numbers) * (0.2 if p.dim() > 1 else 0.1))
    return model


def bert(**options):
    return transformers.BertModel(
        transformers.BertConfig(vocab_size=60, **SIZES, **{**NO_DROPOUT, **options})
    )


def ids(mask=MASK, seed=1):
    numbers = torch.Generator().manual_seed(seed)
    return torch.randint(5, 60, mask.shape, generator=numbers) * mask


class Head(nn.Module):
    """A BERT, and a loss made of its last hidden state and the mask."""

    def __init__(self, read):
        super().__init__()
        self.bert = bert()
        self.linear = nn.Linear(32, 3)
        self.read = read

    def forward(self, input_ids, attention_mask):
        h = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        return self.read(self, h, attention_mask)


def outcome(model, call, train):
    """Give loss and gradients of one call, or the error of its backward."""
    model.train(train)
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(train):
        loss = call(model)
    if not train:
        return loss.item(), None
    try:
        loss.backward()
    except RuntimeError as error:
        assert "gradient" in str(error)
        return loss.item(), "error"
    return loss.item(), [p.grad for p in model.parameters()]


def agree(make, call, batches=1, may_raise=False, runs=None):
    """Compare evaluation and training with the model as it is.

    `runs`: how many of the calls left padding out, in evaluation and in training.
    """
    plain = jitter(make())
    ours = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = sebp.apply_sebp_to_model(ours, padding=True)
        counts = []
        for train in (False, True):
            before = report.padding.calls[""]
            for batch in range(batches):
                want = outcome(plain, lambda m, b=batch: call(m, b), train)
                got = outcome(ours, lambda m, b=batch: call(m, b), train)
                if may_raise and got[1] == "error":
                    continue
                assert got[0] == pytest.approx(want[0], rel=3e-5, abs=1e-6)
                if train:
                    torch.testing.assert_close(got[1], want[1], rtol=1e-3, atol=1e-5)
            counts.append(report.padding.calls[""] - before)
    assert runs is None or counts == list(runs), (counts, report.padding.calls)
    return report


# --------------------------------------------------------------------------------------------------
# Heads that read real tokens alone, and heads that read padded ones


GOOD = {
    "first": lambda m, h, mask: m.linear(h[:, 0]).square().mean(),
    "masked": lambda m, h, mask: m.linear(h)[mask != 0].square().mean(),
    "last real": lambda m, h, mask: m.linear(h[torch.arange(4), mask.sum(1) - 1]).square().mean(),
    "masked maximum": lambda m, h, mask: (
        m.linear(h.masked_fill(mask[..., None] == 0, -1e9).amax(1)).square().mean()
    ),
}
# A product with zero is not free of NaN: proved by the backward alone.
GOOD_IN_TRAINING = {
    "mean": lambda m, h, mask: (
        m.linear((h * mask[..., None]).sum(1) / mask.sum(1, True)).square().mean()
    ),
    "flip": lambda m, h, mask: (m.linear(h.flip(1)).flip(1) * mask[..., None]).square().mean(),
}
BAD = {
    "mean": lambda m, h, mask: m.linear(h.mean(1)).square().mean(),
    "square": lambda m, h, mask: h.square().mean(),
    "maximum": lambda m, h, mask: m.linear(h.amax(1)).square().mean(),
    "last": lambda m, h, mask: m.linear(h[:, -1]).square().mean(),
    "norm": lambda m, h, mask: nn.functional.layer_norm(h, (32,)).mul(m.linear.weight[0]).mean(),
    "softmax": lambda m, h, mask: m.linear(h)[..., 0].log_softmax(1)[:, 0].mean(),
    "convolution": lambda m, h, mask: (
        nn.functional.conv1d(h.transpose(1, 2), m.linear.weight[:, :, None].repeat(1, 1, 3))
        .transpose(1, 2)[mask[:, 1:-1] != 0]
        .square()
        .mean()
    ),
    "detached": lambda m, h, mask: (m.linear(h[:, 0]) * h.detach().mean()).square().mean(),
}
# These show in the comparison alone: neither NaN nor a gradient goes through a whole number.
DISCRETE = {
    "sign": lambda m, h, mask: m.linear(h[:, 0]).mean() * (h[:, -1] > 0).float().mean(),
    "count": lambda m, h, mask: m.linear(h[:, 0]).mean() * h.sum(2).argmax(1).float().mean(),
}


@pytest.mark.parametrize("name", GOOD)
def test_heads_that_read_real_tokens(name):
    agree(lambda: Head(GOOD[name]), lambda m, _: m(ids(), MASK), runs=(1, 1))


@pytest.mark.parametrize("name", GOOD_IN_TRAINING)
def test_heads_that_multiply_by_the_mask(name):
    agree(lambda: Head(GOOD_IN_TRAINING[name]), lambda m, _: m(ids(), MASK), runs=(0, 1))


@pytest.mark.parametrize("name", BAD)
def test_heads_that_read_padded_tokens(name):
    agree(lambda: Head(BAD[name]), lambda m, _: m(ids(), MASK), batches=2, runs=(0, 0))


@pytest.mark.parametrize("name", DISCRETE)
def test_heads_that_read_whole_numbers(name):
    agree(lambda: Head(DISCRETE[name]), lambda m, _: m(ids(), MASK), batches=2)


def test_one_number_of_many_that_differs():
    def read(self, h, mask):
        numbers = h[:, 0].repeat(1, 9000)
        numbers[-1, -1] = h[0, -1].nan_to_num(3.0).sum()
        return numbers

    model = jitter(Head(read)).eval()
    report = sebp.padding_free(model)
    with torch.no_grad(), pytest.warns(UserWarning, match="came out otherwise"):
        numbers = model(ids(), MASK)
    assert numbers.numel() > 2**20 and not report.calls[""]
    sebp.remove_padding_free(model)
    with torch.no_grad():
        assert torch.equal(numbers, model(ids(), MASK))


def test_a_head_that_reads_a_padded_token_later():
    """Nothing told of it in the first batch, whose texts are long enough."""
    masks = [(torch.arange(12) < torch.tensor([8, 12, 9, 7])[:, None]).long(), MASK]
    read = lambda m, h, mask: m.linear(h[:, 6]).square().mean()  # noqa: E731
    report = agree(
        lambda: Head(read),
        lambda m, b: m(ids(masks[b]), masks[b]),
        batches=2,
        may_raise=True,
        runs=(1, 2),
    )
    assert "depends on padded tokens" in str(report)


@pytest.mark.parametrize("grad", [False, True])
def test_evaluation_with_gradients_on(grad):
    """Nobody may call the backward, so it is proved all the same."""
    masks = [(torch.arange(12) < torch.tensor([8, 12, 9, 7])[:, None]).long(), MASK]
    plain = jitter(Head(lambda m, h, mask: m.linear(h[:, 6]).square().mean())).eval()
    ours = copy.deepcopy(plain)
    report = sebp.padding_free(ours)
    with torch.set_grad_enabled(grad):
        first = [m(ids(masks[0]), masks[0]).item() for m in (plain, ours)]
        with pytest.warns(UserWarning, match="in evaluation, run with padding"):
            second = [m(ids(masks[1]), masks[1]).item() for m in (plain, ours)]
    assert first[1] == pytest.approx(first[0])
    assert second[1] == pytest.approx(second[0])
    assert report.calls[""] == 1


def test_whole_numbers_tell_nothing():
    """Predictions do not show whether a NaN went into them."""
    plain = jitter(Head(lambda m, h, mask: m.linear(h.sum(1)).argmax(1))).eval()
    ours = copy.deepcopy(plain)
    report = sebp.padding_free(ours)
    with torch.no_grad(), pytest.warns(UserWarning, match="not of floating point"):
        assert torch.equal(ours(ids(), MASK), plain(ids(), MASK))
    assert report.calls[""] == 0


@pytest.mark.parametrize("head", ["QuestionAnswering", "TokenClassification", "MaskedLM"])
@pytest.mark.parametrize("labels", ["real", "all"])
def test_heads_of_transformers(head, labels):
    config = transformers.BertConfig(vocab_size=60, num_labels=3, **SIZES, **NO_DROPOUT)
    if head == "QuestionAnswering":
        config.num_labels = 2
        targets = dict(start_positions=torch.tensor([1, 2, 3, 1]), end_positions=MASK.sum(1) - 1)
    else:
        target = ids() % 3
        targets = dict(labels=target if labels == "all" else target.masked_fill(MASK == 0, -100))
    make = getattr(transformers, f"BertFor{head}")
    trains = 0 if head == "QuestionAnswering" or labels == "all" else 1
    agree(
        lambda: make(config),
        lambda m, _: m(input_ids=ids(), attention_mask=MASK, **targets).loss,
        batches=2,
        runs=(0, 2 * trains),
    )


@pytest.mark.parametrize("labels", ["collator", "all", "right"])
@pytest.mark.parametrize("trained", ["", "bias", "lm_head"])
def test_labels_of_a_decoder(labels, trained):
    """Padded on the left, the first token of a text is predicted from a padded one."""
    mask = MASK.flip(1)
    target = {
        "collator": ids(mask).masked_fill(mask == 0, -100),
        "all": ids(mask),
        "right": ids(mask).masked_fill(mask.cumsum(1) * mask <= 1, -100),
    }[labels]

    def make():
        config = transformers.OPTConfig(
            vocab_size=60,
            ffn_dim=64,
            word_embed_proj_dim=32,
            dropout=0.0,
            tie_word_embeddings=False,
            **SIZES,
        )
        model = transformers.OPTForCausalLM(config)
        for name, p in model.named_parameters():
            p.requires_grad_(trained in name)
        return model

    def call(model, _):
        return model(ids(mask), attention_mask=mask, labels=target, use_cache=False).loss

    agree(make, call, batches=2)


# --------------------------------------------------------------------------------------------------
# Whose mask it is


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.bert = bert()

    def forward(self, a, a_mask, b, b_mask):
        a, b = (self.bert(*x).last_hidden_state[:, 0] for x in ((a, a_mask), (b, b_mask)))
        return nn.functional.cross_entropy(a @ b.T / 8, torch.arange(len(a)))


class InADict(nn.Module):
    def __init__(self):
        super().__init__()
        self.bert = bert()

    def forward(self, features):
        return self.bert(**features).last_hidden_state[:, 0].square().mean()


class Nested(nn.Module):
    """A model that calls itself, and another beside it."""

    def __init__(self, depth=2):
        super().__init__()
        self.bert = bert()
        self.inner = Nested(depth - 1) if depth else None
        self.linear = nn.Linear(32, 32)

    def forward(self, input_ids, attention_mask):
        y = self.bert(input_ids, attention_mask).last_hidden_state[:, 0]
        table = self.linear(torch.ones(*attention_mask.shape, 32)).mean((0, 1))  # not tokens
        if self.inner is not None:
            y = y * self.inner(input_ids[:, :7], attention_mask[:, :7])
        return y * table if y.shape[0] != 4 or self.inner else y


def test_two_towers():
    other = (torch.arange(12) < torch.tensor([10, 4, 12, 8])[:, None]).long()
    agree(Towers, lambda m, _: m(ids(), MASK, ids(other, 2), other), runs=(1, 1))
    batch = (ids(), MASK, ids(MASK[:, :9], 2), MASK[:, :9])
    agree(Towers, lambda m, _: m(*batch), runs=(1, 1))


def test_mask_in_a_dict():
    call = lambda m, _: m({"input_ids": ids(), "attention_mask": MASK})  # noqa: E731
    agree(InADict, call, runs=(1, 1))


def test_nested():
    agree(Nested, lambda m, _: m(ids(), MASK).square().mean(), runs=(1, 1))


@pytest.mark.parametrize("shape", [(1, 12), (12, 12), (4, 4)])
def test_ambiguous_shapes(shape):
    """One text, and as many texts as tokens."""
    mask = (torch.arange(shape[1]) < torch.arange(1, shape[0] + 1)[:, None].clamp(2)).long()
    agree(lambda: Head(GOOD["masked"]), lambda m, _: m(ids(mask), mask), runs=(1, 1))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("size", [3, 12])
def test_models_that_are_not_of_transformers(batch_first, size):
    """Their forward is left alone; the backward finds its rows by itself."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(60, 16)
            layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.linear = nn.Linear(16, 3)

        def forward(self, input_ids, attention_mask):
            x = self.embedding(input_ids if batch_first else input_ids.T)
            y = self.linear(self.encoder(x, src_key_padding_mask=attention_mask == 0))
            y = y if batch_first else y.transpose(0, 1)
            return y[attention_mask != 0].square().mean()

    mask = (torch.arange(12) < torch.arange(1, size + 1)[:, None]).long()
    plain = jitter(Net())
    ours = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match="leaves no padding out"):
        sebp.apply_sebp_to_model(ours, padding=True)
    want, got = (outcome(m, lambda m: m(ids(mask), mask), True) for m in (plain, ours))
    assert got[0] == pytest.approx(want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# What ends it


def test_hooks(recwarn):
    """A hook within the layers would see other rows than it was written for."""
    plain = make_model("bert").train()
    ours = copy.deepcopy(plain)
    report = sebp.padding_free(ours)
    shapes = {}
    for name, model in (("plain", plain), ("ours", ours)):
        model.bert.encoder.layer[0].register_forward_hook(
            lambda m, x, y, name=name: shapes.update({name: y.shape})
        )
        model(**make_batch("bert", 1))
    assert shapes["ours"] == shapes["plain"]
    assert report.calls[""] == 0
    assert "a hook on bert.encoder.layer.0" in str(recwarn.list[-1].message)


def test_hooks_that_may_stay():
    ours = make_model("bert").train()
    report = sebp.padding_free(ours)
    ours.register_forward_hook(lambda *a: None)
    ours.register_forward_pre_hook(lambda *a: None)
    ours.enable_input_require_grads()
    nn.utils.parametrizations.weight_norm(ours.bert.encoder.layer[0].output.dense)
    ours(**make_batch("bert", 1)).loss.backward()
    assert report.calls[""] == 1


def test_global_hook():
    ours = make_model("bert").train()
    report = sebp.padding_free(ours)
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        with pytest.warns(UserWarning, match="a hook on all modules"):
            ours(**make_batch("bert", 1))
    finally:
        handle.remove()
    assert report.calls[""] == 0


def test_each_reason_is_told_once():
    ours = make_model("bert").train()
    sebp.padding_free(ours)
    ids = make_batch("bert", 1)["input_ids"]
    with pytest.warns(UserWarning, match="no attention_mask") as caught:
        for _ in range(3):
            ours(ids)
    assert len(caught) == 1


# --------------------------------------------------------------------------------------------------
# No trace


class Noisy(nn.Module):
    """Draws numbers of three generators, drops out, and keeps statistics in buffers."""

    def __init__(self, reads_padding):
        super().__init__()
        self.bert = bert(hidden_dropout_prob=0.1)
        self.norm = nn.BatchNorm1d(32)
        self.register_buffer("calls", torch.zeros(()))
        self.reads_padding = reads_padding

    def forward(self, input_ids, attention_mask):
        h = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        self.calls += 1
        h = h[:, -1] if self.reads_padding else h[:, 0]
        scale = 1 + random.random() + np.random.rand() + torch.rand(()).item()
        return (self.norm(h) ** 3 * torch.arange(32)).mean() * scale


@pytest.mark.filterwarnings("ignore:sebp")
@pytest.mark.parametrize("reads_padding", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_no_trace(reads_padding, train):
    """Falling back, all is as it would have been; and if not, as after one call."""
    plain = jitter(Noisy(reads_padding)).train(train)
    ours = copy.deepcopy(plain)
    sebp.padding_free(ours)
    states = []
    for model in (plain, ours):
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        with torch.set_grad_enabled(train):
            losses = [model(ids(), MASK).item() for _ in range(2)]
        states.append((losses, torch.get_rng_state(), random.random(), np.random.rand()))
    assert ours.calls == plain.calls == 2
    assert ours.norm.num_batches_tracked == plain.norm.num_batches_tracked
    assert bool(ours.norm.running_mean.isfinite().all())
    assert states[0][2:] == states[1][2:]
    if reads_padding or not train:
        assert states[1][0] == pytest.approx(states[0][0], rel=1e-4)
        assert torch.equal(states[0][1], states[1][1])
        torch.testing.assert_close(ours.norm.running_mean, plain.norm.running_mean)
    else:  # dropout draws as many numbers as there are tokens
        assert not torch.equal(states[0][1], states[1][1])


def test_dropout_does_not_hide_a_difference():
    plain = transformers.BertForQuestionAnswering(transformers.BertConfig(vocab_size=60, **SIZES))
    ours = jitter(plain).train()
    report = sebp.padding_free(ours)
    positions = dict(start_positions=torch.tensor([1, 2, 3, 1]), end_positions=MASK.sum(1) - 1)
    with pytest.warns(UserWarning, match="loss came out as"):
        ours(input_ids=ids(), attention_mask=MASK, **positions)
    assert report.calls[""] == 0


def test_an_error_of_the_model_costs_nothing():
    ours = make_model("bert").train()
    report = sebp.padding_free(ours)
    batch = make_batch("bert", 1)
    with pytest.raises(IndexError):
        ours(**{**batch, "input_ids": batch["input_ids"] + 1000})
    ours(**batch)
    assert report.calls[""] == 1


def test_without_check():
    """For those who know: zeros at padded tokens, and the backward alone looks."""
    plain = jitter(bert()).eval()
    ours = copy.deepcopy(plain)
    report = sebp.padding_free(ours, check=False)
    with torch.no_grad():
        want, got = (m(ids(), MASK).last_hidden_state for m in (plain, ours))
    torch.testing.assert_close(got[MASK != 0], want[MASK != 0])
    assert not got[MASK == 0].any()
    assert report.calls[""] == 1
    with pytest.raises(RuntimeError, match="labels at padded tokens"):
        ours(ids(), MASK).last_hidden_state.sum().backward()


@pytest.mark.parametrize("frozen", ["bert", ""])
def test_frozen_weights(frozen):
    """Where a head alone trains its backward comes as far as the padding."""

    def make(name, reads):
        model = Head(reads[name])
        for key, p in model.named_parameters():
            p.requires_grad_(not key.startswith(frozen))
        return model

    def loss(model, _):
        y = model(ids(), MASK)
        return y if y.requires_grad else y + torch.zeros((), requires_grad=True)

    agree(lambda: make("first", GOOD), loss, runs=(1, 1))
    agree(lambda: make("mean", GOOD_IN_TRAINING), loss, runs=(0, 1 if frozen else 0))
    for name in BAD:
        agree(lambda name=name: make(name, BAD), loss, runs=(0, 0))


def test_report_counts():
    ours = make_model("bert").train()
    report = sebp.apply_sebp_to_model(ours, padding=True)
    assert "bert runs without padding: 13 linear layers in all" in str(report)
    assert "calls" not in str(report)
    ours(**make_batch("bert", 1))
    assert "of 1 calls 1 left padding out" in str(report)
    with pytest.warns(UserWarning):
        ours(make_batch("bert", 1)["input_ids"])
    assert "of 2 calls 1 left padding out\n1 did not: no attention_mask" in str(report)


def test_bf16():
    """Rounded results are compared as such, under autocast and in a model of bfloat16."""
    for autocast in (True, False):
        ours = make_model("bert").train()
        ours = ours if autocast else ours.bfloat16()
        report = sebp.apply_sebp_to_model(ours, padding=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours(**make_batch("bert", 1)).loss.backward()
        assert report.padding.calls == {"": 1}


# --------------------------------------------------------------------------------------------------
# Models that do more than return a result


class Base(nn.Module):
    """A BERT whose first token is read; what else it does is up to those derived from it."""

    def __init__(self):
        super().__init__()
        self.bert = bert()
        self.linear = nn.Linear(32, 3)

    def encode(self, input_ids, attention_mask):
        return self.bert(input_ids, attention_mask=attention_mask).last_hidden_state

    def loss(self, h):
        return self.linear(h[:, 0]).square().mean()


class ReturnsItsDict(Base):
    """As sentence-transformers does; the mean is over all tokens, or over real ones."""

    def __init__(self, masked):
        super().__init__()
        self.masked = masked

    def forward(self, features):
        h = self.encode(features["input_ids"], features["attention_mask"])
        mask = features["attention_mask"][..., None]
        mean = (h * mask).sum(1) / mask.sum(1) if self.masked else h.mean(1)
        features.update(token_embeddings=h, sentence_embedding=self.linear(mean))
        return features


class CountsInABuffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, input_ids, attention_mask):
        self.steps += 1
        h = self.encode(input_ids, attention_mask)
        return self.steps * (self.loss(h) + h.mean())


class ReassignsABuffer(CountsInABuffer):
    def forward(self, input_ids, attention_mask):
        self.steps = self.steps + 1
        return self.steps * self.loss(self.encode(input_ids, attention_mask))


class CountsInAnAttribute(Base):
    n = 0

    def forward(self, input_ids, attention_mask):
        self.n += 1
        return self.n * self.loss(self.encode(input_ids, attention_mask))


class KeepsStatistics(Base):
    """Of all tokens, for evaluation."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(32))

    def forward(self, input_ids, attention_mask):
        h = self.encode(input_ids, attention_mask)
        if self.training:
            with torch.no_grad():
                self.center.lerp_(h.mean((0, 1)), 0.5)
        return self.loss(h if self.training else h - self.center)


class AveragesItsWeights(Base):
    def __init__(self):
        super().__init__()
        self.average = nn.Linear(32, 3).requires_grad_(False)

    def forward(self, input_ids, attention_mask):
        with torch.no_grad():
            self.average.weight.lerp_(self.linear.weight, 0.1)
        h = self.encode(input_ids, attention_mask)
        return self.loss(h) + self.average(h[:, 0]).square().mean()


class HasAGenerator(Base):
    def __init__(self):
        super().__init__()
        self.numbers = torch.Generator().manual_seed(3)

    def forward(self, input_ids, attention_mask):
        scale = torch.rand((), generator=self.numbers)
        return scale * self.loss(self.encode(input_ids, attention_mask))


class EncodesWithoutGradients(Base):
    """The head reads padding in the second batch alone."""

    def forward(self, input_ids, attention_mask):
        with torch.no_grad():
            h = self.encode(input_ids, attention_mask)
        return self.linear(h[:, 6]).square().mean()


class ChangesInPlace(Base):
    def forward(self, input_ids, attention_mask):
        h = self.encode(input_ids, attention_mask)
        h[attention_mask == 0] = -1e9
        return self.linear(h.amax(1)).square().mean()


class WritesToItsArguments(Base):
    def forward(self, input_ids, attention_mask):
        input_ids.add_(attention_mask).remainder_(60)
        return self.loss(self.encode(input_ids, attention_mask))


class MovesItsArguments(Base):
    """Takes some out of the dict it is given, and puts others in."""

    def forward(self, features):
        more = features.pop("more")
        features["added"] = [more["scale"]]
        more["scale"] = 2 * more["scale"]
        h = self.encode(features.pop("input_ids"), features["attention_mask"])
        return self.linear(h.mean(1)).square().mean() * more["scale"]


class Result:
    def __init__(self, loss):
        self.loss = loss


class ReturnsAnObject(Base):
    def forward(self, input_ids, attention_mask):
        return Result(self.linear(self.encode(input_ids, attention_mask).mean(1)).square().mean())


class Checkpoints(Base):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.bert.config.hidden_dropout_prob = 0.1
        for module in self.bert.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1

    def forward(self, input_ids, attention_mask):
        h = torch.utils.checkpoint.checkpoint(
            lambda x: self.encode(input_ids, attention_mask) + x,
            torch.zeros((), requires_grad=True),
            use_reentrant=self.reentrant,
        )
        return self.loss(h)


LATER = [(torch.arange(12) < torch.tensor([8, 12, 9, 7])[:, None]).long(), MASK, MASK]


@pytest.mark.filterwarnings("ignore:sebp")
@pytest.mark.parametrize(
    "make",
    [
        CountsInABuffer,
        ReassignsABuffer,
        CountsInAnAttribute,
        KeepsStatistics,
        AveragesItsWeights,
        HasAGenerator,
        EncodesWithoutGradients,
        ChangesInPlace,
        ReturnsAnObject,
        WritesToItsArguments,
        MovesItsArguments,
        lambda: ReturnsItsDict(True),
        lambda: ReturnsItsDict(False),
        lambda: Checkpoints(False),
        lambda: Checkpoints(True),
    ],
)
def test_models_that_do_more(make):
    """Three steps of training and an evaluation, with all that they leave behind."""
    plain = jitter(make())
    outcomes = []
    for told in (False, True):
        model = copy.deepcopy(plain)
        if told:
            sebp.padding_free(model)
        values = []
        torch.manual_seed(7)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for mask in LATER:
            optimizer.zero_grad()
            args = (ids(mask), mask)
            if isinstance(model, ReturnsItsDict):
                args = (dict(input_ids=args[0], attention_mask=mask),)
            if isinstance(model, MovesItsArguments):
                more = {"scale": torch.ones(())}
                args = (dict(more=more, input_ids=args[0], attention_mask=mask),)
            loss = model.train()(*args)
            if isinstance(loss, dict):
                assert loss is args[0]
                loss = loss["sentence_embedding"].square().mean()
            loss = getattr(loss, "loss", loss)
            loss.backward()
            optimizer.step()
            values.append(loss.detach())
        if isinstance(model, MovesItsArguments):
            assert more["scale"] == 2
            assert args[0].keys() == {"attention_mask", "added"}
            args = (dict(more=more, input_ids=ids(), attention_mask=MASK),)
        with torch.no_grad():
            last = model.eval()(*args)
        if isinstance(last, dict):
            last = last["token_embeddings"].square().mean() + last["sentence_embedding"].sum()
        values.append(getattr(last, "loss", last))
        outcomes.append((values, model.state_dict(), getattr(model, "n", 0)))
    torch.testing.assert_close(outcomes[1][0], outcomes[0][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(outcomes[1][1], outcomes[0][1], rtol=1e-3, atol=1e-5)
    assert outcomes[1][2] == outcomes[0][2]


@pytest.mark.parametrize("value", [0.5, 2, -1])
def test_masks_of_other_values(value):
    """OPT makes positions of them."""
    config = transformers.OPTConfig(
        vocab_size=60, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, **SIZES
    )
    plain = jitter(transformers.OPTForCausalLM(config)).train()
    ours = copy.deepcopy(plain)
    report = sebp.padding_free(ours)
    labels = ids().masked_fill(MASK == 0, -100)
    ours(ids(), attention_mask=MASK, labels=labels)
    mask = MASK.float() * value
    with pytest.warns(UserWarning, match="other values than 0 and 1"):
        losses = [m(ids(), attention_mask=mask, labels=labels).loss for m in (plain, ours)]
    assert torch.equal(*losses)
    assert report.calls[""] == 1


def test_a_part_put_in_later():
    class Mixer(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.mean(1, keepdim=True)[..., :1]

    ours = jitter(make_model("bert")).train()
    report = sebp.padding_free(ours)
    batch = make_batch("bert", 1)
    ours(**batch)
    ours.bert.encoder.layer[0].intermediate.dense = Mixer(32, 64)
    plain = copy.deepcopy(ours)
    sebp.remove_padding_free(plain)
    with pytest.warns(UserWarning, match="it holds a Mixer"):
        assert torch.equal(ours(**batch).loss, plain(**batch).loss)
    assert report.calls[""] == 1


def test_hook_on_the_base_model():
    """It would see what padded tokens hold."""
    ours = jitter(make_model("bert")).eval()
    report = sebp.padding_free(ours)
    seen = []
    ours.bert.register_forward_hook(lambda m, x, y: seen.append(y.last_hidden_state))
    batch = make_batch("bert", 1)
    with torch.no_grad(), pytest.warns(UserWarning, match="a hook on bert"):
        ours(**batch)
    assert len(seen) == 1
    assert bool(seen[0].isfinite().all())
    assert report.calls[""] == 0


def test_wrapped_and_unwrapped():
    """As accelerate wraps a forward in autocast, and takes that off again."""
    import types

    for whole in (True, False):
        model = make_model("bert").train()
        model = model if whole else model.bert
        batch = make_batch("bert", 1)
        batch = batch if whole else {k: v for k, v in batch.items() if k != "labels"}
        report = sebp.apply_sebp_to_model(model, padding=True)
        inner = model.forward.__func__
        model.forward = types.MethodType(torch.autocast("cpu", torch.bfloat16)(inner), model)
        model(**batch)
        model.forward = types.MethodType(inner, model)
        for _ in range(2):
            model(**batch)
        assert report.padding.calls[""] >= 2
        sebp.remove_sebp_from_model(model)
        assert "forward" not in vars(model)
        sebp.apply_sebp_to_model(model, padding=True)
        model(**batch)


def test_bound_to_its_module():
    """As accelerate binds the forward that it finds where it takes its own off."""
    import types

    plain, model = make_model("bert").train(), make_model("bert").train()
    report = sebp.padding_free(model)
    batch = make_batch("bert", 1)
    model.forward = types.MethodType(model.forward, model)
    torch.testing.assert_close(model(**batch).loss, plain(**batch).loss)
    assert report.calls[""] == 1
    sebp.remove_padding_free(model)
    assert "forward" not in vars(model)


class Named(nn.Module):
    """Hands a word through, or says another, beside what it computes."""

    def __init__(self, says=None):
        super().__init__()
        self.bert = make_model("bert").bert
        self.says = says

    def forward(self, features):
        out = self.bert(features["input_ids"], features["attention_mask"]).pooler_output
        return {"out": out, "modality": self.says or features["modality"]}


@pytest.mark.parametrize("says", [None, "image"])
def test_words_handed_through(says):
    """A word of the arguments does not depend on padded tokens; another one may."""
    model = Named(says).eval()
    report = sebp.padding_free(model)
    features = {**make_batch("bert", 1), "modality": "text"}
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(features)
    assert report.calls[""] == (says is None)
    assert ["modality is not of floating" in str(one.message) for one in caught] == [True] * bool(
        says
    )


def test_a_base_model_of_two():
    """Taking one out leaves the other as it was."""
    first, second = make_model("bert").train(), make_model("bert").train()
    second.bert = first.bert
    one, other = sebp.padding_free(first), sebp.padding_free(second)
    batch = make_batch("bert", 1)
    assert sebp.remove_padding_free(first) == []
    second(**batch)
    first(**batch)
    assert (one.calls[""], other.calls[""]) == (0, 1)
    assert sebp.remove_padding_free(second) == ["bert"]
    assert "forward" not in vars(first.bert)
