# SPDX-License-Identifier: Apache-2.0
"""Families of transformers with padding left out: equal to the plain model, or refused aloud.

Each case runs two batches of a kind: the first is one that may be compared with the plain model,
the second is on its own.
"""

import copy
import functools
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from families import FAMILIES, PADDINGS, make_batch, make_model, real_tokens  # noqa: E402

import sebp  # noqa: E402

MODES = ("prepared", "padding_free")
SEEDS = (1, 2)
# Those that have to leave padding out, for a loss on real tokens.
SKIPPING = [
    *("bert", "roberta", "xlm_roberta", "camembert", "electra", "mpnet", "albert", "distilbert"),
    *("t5_encoder", "umt5_encoder"),
    *("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "phi3"),
]
# Encoders beside which there is a decoder, or an image. Not all that the model looks up is theirs.
BESIDE = ["t5", "mt5", "umt5", "bart", "mbart", "m2m_100", "pegasus", "blenderbot", "marian"]
BESIDE += ["blenderbot_small", "plbart", "clip"]
# Those of which the encoder alone leaves padding out.
WITHIN = ["clip_text", "clip_text_ended", "metaclip_2_text", "owlvit_text"]
_DISTANT = ("mpnet", "mistral", "t5_encoder", "umt5_encoder")
# Those of them that do not count how far two tokens of a text are apart, padding between included.
ANYWHERE = [name for name in SKIPPING if name not in _DISTANT]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Such small models are fastest on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------------------
# Losses and gradients


def put_in(model, mode):
    """Let a model leave padding out, in one of two ways. It may say that it does not."""
    if mode == "prepared":
        sebp.prepare(model, defer_logits=True, quiet=True)
    else:
        sebp.padding_free(model)


def read(output, real, everywhere):
    """Make a loss of all that a base model returns, of hidden states at real tokens alone."""
    losses = []
    for name, value in output.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            numbers = torch.Generator().manual_seed(len(losses))
            value = value * torch.randn(value.shape, generator=numbers)
            chosen = value if everywhere or name not in real else value[real[name]]
            losses.append(chosen.tanh().mean())
    return sum(losses)


def loss_of(model, name, head, reads, batch):
    """Run a model, and give its loss: of all tokens if `reads` is "padded"."""
    torch.manual_seed(0)  # ViLT draws which parts of an image it looks at
    if head == "base":
        return read(model(**batch), real_tokens(name, batch), reads == "padded")
    if reads == "padded":
        batch = {**batch, "labels": batch["input_ids"]}
    return model(**batch).loss


def run(model, name, head, padding, reads):
    """Collect losses and gradients in training, then losses in evaluation.

    A RuntimeError that the backward raises about padding stands in the place of both.
    """
    results = []
    for seed in SEEDS:
        model.train().zero_grad()
        loss = loss_of(model, name, head, reads, make_batch(name, head, padding, seed))
        try:
            loss.backward()
        except RuntimeError as error:
            if "mask leaves out" not in str(error):
                raise
            results.append(error)
            continue
        gradients = {key: p.grad for key, p in model.named_parameters()}
        results.append((loss.detach(), gradients))
    with torch.no_grad():
        for seed in SEEDS:
            batch = make_batch(name, head, padding, seed)
            results.append((loss_of(model.eval(), name, head, reads, batch), {}))
    return results


@functools.lru_cache(maxsize=2)
def plain_run(name, head, padding, reads):
    """Give a model, and what comes out of it by itself."""
    model = make_model(name, head)
    results = run(copy.deepcopy(model), name, head, padding, reads)
    for loss, gradients in results:
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in gradients.values() if g is not None)
    assert sum(g is not None and bool(g.any()) for g in results[0][1].values()) >= 10
    return model, results


def assert_same(got, want):
    """Compare a loss and gradients within the rounding of sums."""
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    largest = max((float(g.abs().max()) for g in want[1].values() if g is not None), default=0.0)
    for key, gradient in want[1].items():
        ours = got[1][key]
        assert (ours is None) == (gradient is None), key
        if gradient is not None:
            off = float((ours - gradient).abs().max())
            allowed = 1e-3 * float(gradient.abs().max()) + 1e-5 * largest
            assert off <= allowed, f"{key} is off by {off:.2g}, {allowed:.2g} is allowed"


def check(name, head, padding, mode, reads="real", may_raise=False):
    """Compare a model with its twin that leaves padding out."""
    plain, want = plain_run(name, head, padding, reads)
    ours = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs as it is
        put_in(ours, mode)
        got = run(ours, name, head, padding, reads)
    phases = ("training, first", "training, second", "evaluation, first", "evaluation, second")
    for phase, mine, right in zip(phases, got, want, strict=True):
        if isinstance(mine, RuntimeError):
            assert may_raise, f"{phase} batch: {mine}"
            continue
        try:
            assert_same(mine, right)
        except AssertionError as error:
            raise AssertionError(f"{phase} batch: {error}") from None


modes = pytest.mark.parametrize("mode", MODES)


def bases():
    """List all base models: padded on the right in both modes, and in other places in one."""
    cases = []
    for place, name in enumerate(FAMILIES):
        cases += [(name, "right", mode) for mode in MODES]
        cases += [(name, there, MODES[(place + i) % 2]) for i, there in enumerate(PADDINGS[1:])]
    return cases


@pytest.mark.parametrize(("name", "padding", "mode"), bases())
def test_base_model(name, padding, mode):
    check(name, "base", padding, mode)


def heads():
    """List all heads: padded on the right in both modes, and in one more place in one of them."""
    cases = []
    for place, name in enumerate(FAMILIES):
        for head in FAMILIES[name].heads.split():
            more = (PADDINGS[1 + place % 5], MODES[place % 2])
            cases += [(name, head, *where) for where in (*[("right", m) for m in MODES], more)]
    return cases


@pytest.mark.parametrize(("name", "head", "padding", "mode"), heads())
def test_head(name, head, padding, mode):
    """A head may read padded tokens by itself.

    A question is answered by a softmax over all tokens, and a decoder's first token is predicted
    from a padded one if texts are padded on the left.
    """
    reads_padded = head == "qa" or (head in ("lm", "seq") and padding != "right")
    check(name, head, padding, mode, may_raise=reads_padded)


@pytest.mark.parametrize(("padding", "mode"), [("right", "padding_free"), ("left", "prepared")])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_that_reads_padded_tokens(name, padding, mode):
    """On purpose: by a mean over all tokens, or by labels at each of them."""
    check(name, "base", padding, mode, "padded", may_raise=True)
    for head in {"lm", "mlm"}.intersection(FAMILIES[name].heads.split()):
        check(name, head, padding, mode, "padded", may_raise=True)


@modes
@pytest.mark.parametrize("name", SKIPPING)
def test_evaluation_without_no_grad(name, mode):
    """All that a model returns is its own, though gradients could be asked for."""
    plain = make_model(name, "base").eval()
    ours = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs as it is
        put_in(ours, mode)
        for seed in SEEDS:
            batch = make_batch(name, "base", "right", seed)
            want, got = (m(**batch).last_hidden_state for m in (plain, ours))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@modes
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_largest_of_all_tokens(name, mode):
    """A padded token counts where it is larger than the real ones, however large those are."""
    plain = make_model(name, "base").train()
    with torch.no_grad():
        plain.norm.weight.mul_(100)
    ours = copy.deepcopy(plain)
    mask = (torch.arange(16) < torch.tensor([[16], [15], [14], [14]])).long()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs as it is
        put_in(ours, mode)
        for _ in SEEDS:
            ids = torch.randint(6, 60, mask.shape) * mask
            want, got = (m(ids, mask).last_hidden_state.abs().amax(1).mean() for m in (plain, ours))
            try:
                got.backward()
            except RuntimeError as error:
                assert "mask leaves out" in str(error)  # noqa: PT017
            else:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Which leave padding out


@pytest.fixture
def shapes(monkeypatch):
    """Collect the shapes of tokens that embeddings look up. Hooks would end the skipping."""
    seen = []
    lookup = torch.nn.functional.embedding

    def embedding(tokens, *args, **kwargs):
        seen.append(tuple(tokens.shape))
        return lookup(tokens, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "embedding", embedding)
    return seen


@modes
@pytest.mark.parametrize(
    ("name", "padding"),
    [(name, padding) for name in SKIPPING for padding in ("right", "single")]
    + [(name, "gaps") for name in ANYWHERE],
)
def test_leaves_padding_out(name, padding, mode, shapes):
    """Known families do, without a warning, from the second batch on without a comparison."""
    ours = make_model(name, "base").train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        put_in(ours, mode)
        for seed in SEEDS:
            shapes.clear()
            batch = make_batch(name, "base", padding, seed)
            loss_of(ours, name, "base", "real", batch).backward()
    tokens = int(batch["attention_mask"].sum())
    assert shapes[0] == (1, tokens)
    assert tuple(batch["input_ids"].shape) not in shapes, "a comparison with the plain model"


@modes
@pytest.mark.parametrize("name", [*BESIDE, *WITHIN])
def test_an_encoder_leaves_padding_out(name, mode, monkeypatch):
    """Parts of models do, without a warning: attention gets real tokens alone."""
    from sebp.torch.attention import packed_texts

    seen = []
    attend = packed_texts.attend

    def attended(query, *args, **kwargs):
        seen.append(tuple(query.shape[::2]))
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(packed_texts, "attend", attended)
    ours = make_model(name, "base").train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        put_in(ours, mode)
        for seed in SEEDS:
            seen.clear()
            batch = make_batch(name, "base", "right", seed)
            loss_of(ours, name, "base", "real", batch).backward()
    tokens = int(batch["attention_mask"].sum())
    assert seen == [(1, tokens)] * 2  # its layers, without a comparison with the plain model
