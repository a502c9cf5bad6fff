# SPDX-License-Identifier: Apache-2.0
"""The comparison of methods on an encoder runs, and its numbers are what it says they are."""

import importlib
import math
import statistics
import sys
from collections import Counter
from xml.etree import ElementTree

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("benchmarks")


METHODS = "full,lora,meprop,sparsegrad,sparsegrad-leading-fixed,frozen,full-then-frozen"
METHODS += ",mask-random,mask-gradient,galore"
TINY = "--batch 2 --rank 1 --leading 16 --threads 1 --held-out 5"
QUALITY = f"{TINY} --validation 10 --seeds 2 --rates 1e-3,1e-2 --fix-after 1"
LAYERS, HIDDEN, WIDE = 2, 32, 64
ELEMENTS = 2 * LAYERS * (HIDDEN + WIDE)


@pytest.fixture
def shootout(call, data, lapack, monkeypatch):
    """Give a function that runs the program on a tiny model, without processes for the memory."""
    config = transformers.BertConfig(
        vocab_size=12,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=WIDE,
    )
    transformers.BertModel(config).save_pretrained(data / "model")
    (data / "cola").mkdir()
    for part in ("train", "dev"):
        lines = (data / "sst2" / f"{part}.tsv").read_text().splitlines()
        pairs = [line.split("\t") for line in lines]
        lines = [f"source\t{label}\t\t{sentence}" for sentence, label in pairs]
        (data / "cola" / f"{part}.tsv").write_text("\n".join(lines))
    module = importlib.import_module("peft_shootout")

    def run_again(*words):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [*sys.argv, *words])
            assert module.parse().memory_of == words[1]
        return "123.5"

    for name in ("encoder_runs", "costs"):
        monkeypatch.setattr(importlib.import_module(name), "run_again", run_again)

    def run(options):
        return call("peft_shootout", f"--data {data} --model {data / 'model'} {TINY} {options}")

    return run


@pytest.fixture
def trainings(monkeypatch):
    """Give a list that grows with the method of each run."""
    module, begun = importlib.import_module("encoder_runs"), []

    class Counted(module.Training):
        def __init__(self, name, *rest, **named):
            begun.append(name)
            super().__init__(name, *rest, **named)

    monkeypatch.setattr(module, "Training", Counted)
    return begun


def test_quality(shootout, data, tables):
    intervals = importlib.import_module("intervals")
    plot = data / "plot.svg"
    options = f"{QUALITY} --steps 5,6 --basis-steps 2 --methods {METHODS} --plot {plot}"
    rows = shootout(options)
    printed = tables()
    names = METHODS.split(",")
    assert len(rows) == 2 * len(names) * (2 + 2)
    for n, corpus in enumerate(("sst2", "cola")):
        metrics = {}
        for m, method in enumerate(names):
            found = [r for r in rows if (r["corpus"], r["method"]) == (corpus, method)]
            assert {r["steps"] for r in found} == {("5", "6")[n]}
            choice = {r["rate"]: float(r["metric"]) for r in found if r["seed"] == "0"}
            assert list(choice) == ["0.001", "0.01"]
            best = max(choice, key=choice.get)
            chosen = [r for r in found if r["seed"] != "0"]
            assert [(r["rate"], r["seed"]) for r in chosen] == [(best, "1"), (best, "2")]
            assert chosen[0]["loss"] != chosen[1]["loss"]
            metrics[method] = {r["seed"]: 100 * float(r["metric"]) for r in chosen}
            rate_of_full = next(r for r in rows if r["corpus"] == corpus and r["seed"] == "1")[
                "rate"
            ]
            has_phase = method.startswith(("sparsegrad", "full-"))
            assert {r["basis_rate"] for r in found} == {rate_of_full if has_phase else ""}
            line = printed[2 * n][2 + m]
            assert line[:3] == [method, f"{rate_of_full}, {best}" if has_phase else best, "2"]
            values = list(metrics[method].values())
            assert line[3] == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
            for column, other in ((4, "full"), (5, "frozen")):
                if method == other or other not in metrics:
                    continue
                difference = intervals.compare_pairs(metrics[method], metrics[other])
                assert line[column].strip("*").startswith(f"{difference.mean:+.2f} (")
            elements = 0 if "frozen" in method else ELEMENTS
            elements = 2 * LAYERS * HIDDEN * WIDE if method == "full" else elements
            assert {r["elements"] for r in found} == {str(elements)}
            kept = {int(r["gradient_bytes"]) + int(r["state_bytes"]) for r in found}
            if method.startswith("mask"):
                assert 20 * elements <= min(kept) == max(kept) < 20 * elements + 100 * 2 * LAYERS
            elif not method.startswith(("sparsegrad", "meprop", "galore")):
                assert 12 * elements <= min(kept) == max(kept) < 13 * elements + 100
            # Of a mask they are the elements' values before training.
            has_bases = method.startswith(("sparsegrad", "mask"))
            assert (int(chosen[0]["bases_bytes"]) > 0) == has_bases
    root = ElementTree.parse(plot).getroot()
    assert Counter(child.tag.split("}")[-1] for child in root)["circle"] == 2 * len(names) * 2
    shootout(f"--report --plot {plot}")
    assert tables() == printed
    assert ElementTree.parse(plot).getroot()


def test_runs_differ_by_the_method_alone(shootout):
    rows = shootout(
        f"{QUALITY} --corpus cola --steps 5 --basis-steps 9 --methods full,sparsegrad,meprop"
    )
    loss = {(r["method"], r["rate"], r["seed"]): r["loss"] for r in rows}
    best = {r["rate"] for r in rows if (r["method"], r["seed"]) == ("full", "1")}.pop()
    other = {"0.001": "0.01", "0.01": "0.001"}[best]
    # In a basis phase that does not end the rate is that of full training, whatever follows.
    assert (
        loss["full", best, "0"] == loss["sparsegrad", best, "0"] == loss["sparsegrad", other, "0"]
    )
    assert loss["full", best, "0"] != loss["full", other, "0"]
    assert loss["full", best, "1"] == loss["sparsegrad", "0.001", "1"]
    assert loss["full", "0.01", "0"] != loss["meprop", "0.01", "0"]


def test_goes_on(shootout, data, trainings):
    options = f"{QUALITY} --corpus sst2 --steps 4 --methods lora,meprop --rate lora=3e-3"
    rows = shootout(options)
    assert trainings == ["meprop", "meprop", "lora", "meprop", "lora", "meprop"]
    assert {r["rate"] for r in rows if r["method"] == "lora"} == {"0.003"}
    trainings.clear()
    assert shootout(options) == rows
    assert trainings == []
    path = data / "peft_shootout.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    again = shootout(options)
    assert trainings == [rows[-1]["method"]]
    assert again[:-1] == rows[:-1]
    times = {"step_ms": "", "cpu_s": ""}
    assert {**again[-1], **times} == {**rows[-1], **times}
    trainings.clear()
    assert len(shootout(options.replace("--steps 4", "--steps 3"))) == 2 * len(rows)
    trainings.clear()
    more = shootout(f"{options} --choices 2")[2 * len(rows) :]
    assert trainings[:2] == ["meprop", "meprop"]  # one more at each of two rates
    assert [row["seed"] for row in more[:2]] == ["1000001"] * 2
    assert [row["rate"] for row in more[:2]] == ["0.001", "0.01"]


def test_runs_of_other_texts_or_threads(shootout, data, trainings):
    """They are other runs."""
    options = f"{QUALITY} --corpus sst2 --steps 2 --methods meprop --rate meprop=1e-3 --seeds 1"
    rows = shootout(options)
    assert [(r["threads"], len(r["data"])) for r in rows] == [("1", 12)]
    rows = shootout(f"{options} --threads 2")
    assert [r["threads"] for r in rows] == ["1", "2"]
    path = data / "sst2" / "dev.tsv"
    path.write_text(path.read_text().replace("good", "bad"))
    rows = shootout(options)
    assert rows[0]["data"] == rows[1]["data"] != rows[2]["data"]
    assert trainings == ["meprop"] * 3


@pytest.mark.parametrize("method", ["full", "lora", "meprop", "sparsegrad"])
def test_run_that_diverges(shootout, data, trainings, capsys, monkeypatch, method):
    """It has a row and is not repeated, its rate is not chosen, and the comparison goes on."""
    plot = data / "plot.svg"
    options = f"{QUALITY} --corpus sst2 --steps 6 --basis-steps 2 --plot {plot}"
    monkeypatch.setattr(importlib.import_module("options"), "read_rate", float)

    def line_of(method):
        """Give the cells of a method's last line in the tables printed, after an empty one."""
        lines = capsys.readouterr().out.splitlines()
        found = [line for line in lines if line.startswith(f"| {method} ")]
        return [cell.strip() for cell in found[-1].split("|")]

    rows = shootout(f"{options} --methods {method} --rates 1e-3,1e30")
    trainings.clear()
    assert shootout(f"{options} --methods {method} --rates 1e-3,1e30") == rows
    assert trainings == []
    found = {r["rate"]: r for r in rows}
    for name in ("metric", "loss"):
        assert math.isnan(float(found["1e+30"][name]))
        assert math.isfinite(float(found["0.001"][name]))
    assert [r["rate"] for r in rows if r["seed"] == "2"] == ["0.001"]
    assert line_of(method)[2] == "0.001"
    other = "full" if method == "meprop" else "meprop"
    shootout(f"{options} --methods {method},{other} --rate {method}=1e30 --rate {other}=1e30")
    line = line_of(method)
    assert line[2] == "1e+30"
    assert line[4] == line[9] == "nan"
    assert line[5] == ""
    assert plot.exists()


def test_trains_on_no_text_that_judges(shootout, data):
    runs = importlib.import_module("encoder_runs")
    lines = ["a film\t0", "A Film\t0", "good\t1", "Good\t1", "bad plot\t0", "Bad Plot\t0"]
    (data / "sst2" / "train.tsv").write_text("\n".join(lines))
    (data / "sst2" / "dev.tsv").write_text("bad PLOT\t0")
    (data / "sst2" / "test.tsv").write_text("not good\t0")
    corpus = runs.Corpus(data, "sst2", 1, 99)
    assert len(corpus.validation) == 1 and len(corpus.held_out) == 2
    judging = [tokens for tokens, _ in corpus.validation + corpus.held_out]
    left = [text for text in runs.read_texts(data, "sst2") if text[0] not in judging]
    assert 0 < len(left) < len(lines) - 1
    assert sorted(corpus.train) == sorted(left)
    (data / "sst2" / "test.tsv").unlink()
    (data / "sst2" / "train.tsv").write_text("\n".join([*lines, "a plot\t1", "a bad film\t0"]))
    corpus = runs.Corpus(data, "sst2", 1, 2)
    assert len(corpus.held_out) == 1 + 2
    judging = [tokens for tokens, _ in corpus.validation + corpus.held_out]
    assert not [text for text in corpus.train if text[0] in judging]
    for part in ("train", "dev"):
        (data / "sst2" / f"{part}.tsv").write_text("\n".join(lines))
    with pytest.raises(SystemExit, match="each training text is one of those that judge"):
        runs.Corpus(data, "sst2", 1, 1)


def test_programs_share_a_file(tmp_path):
    """Two that began without one: a heading, and the rows of both."""
    run_file = importlib.import_module("runs").RunFile
    path = tmp_path / "runs.csv"
    files = [run_file(path, ["method"], ["loss"]) for _ in range(2)]
    for number, file in enumerate(files):
        file.add({"method": f"m{number}"}, {"loss": number})
    assert path.read_text().splitlines() == ["method,loss", "m0,0", "m1,1"]
    assert run_file(path, ["method"], ["loss"]).find({"method": "m1"})["loss"] == "1"


def test_the_best_rate():
    runs = importlib.import_module("runs")
    found = {8e-4: 0.6, 4e-4: 0.7, 1e-4: 0.5, 2e-4: 0.7}
    assert runs.best_rate(found) == 2e-4
    assert runs.best_rate(found, is_lower_better=True) == 1e-4
    assert runs.describe_choice("x", found, 2e-4).startswith("x: rate 0.0002 of 0.0001: 0.5000")
    assert "rate 0.0001, at the edge of" in runs.describe_choice("x", found, 1e-4)
    for lower in (False, True):
        found = {1e-4: float("nan"), 2e-4: -0.1, 4e-4: float("nan")}
        assert runs.best_rate(found, lower) == 2e-4


def test_seeds():
    read_seeds = importlib.import_module("options").read_seeds
    assert list(read_seeds("3")) == [1, 2, 3]
    assert list(read_seeds("4-5")) == [4, 5]
    for words in ("0", "-1", "0-2", "3-2", "a", "2-", "", "1000001"):
        with pytest.raises(ValueError):
            read_seeds(words)


def test_climbing_runs_few_rates():
    runs = importlib.import_module("runs")
    metrics = {1e-5: 0.1, 1e-4: 0.2, 1e-3: 0.5, 1e-2: 0.3, 1e-1: 0.9}
    assert runs.climb(list(metrics)[::-1], metrics.get) == {
        rate: metrics[rate] for rate in (1e-3, 1e-4, 1e-2)
    }
    assert list(runs.climb(list(metrics), metrics.get, is_lower_better=True))[-1] == 1e-5
    assert runs.climb([1e-2], metrics.get) == {1e-2: 0.3}
    assert set(runs.climb([1e-2, 1e-1], metrics.get)) == {1e-2, 1e-1}


def test_intervals_of_paired_differences():
    intervals = importlib.import_module("intervals")
    # Tables of Student's t.
    for probability, degrees, quantile in (
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 9, 2.26216),
        (0.975, 100, 1.98397),
        (0.8, 10, 0.87906),
        (0.975, 10**6, 1.95997),
    ):
        assert intervals.student_t(probability, degrees) == pytest.approx(quantile, rel=5e-6)
    for probability, degrees in ((1, 3), (0.4, 3), (0.9, 0)):
        with pytest.raises(ValueError, match="no quantile"):
            intervals.student_t(probability, degrees)
    found = intervals.compare_pairs({"1": 3, "2": 5, "9": 7, "4": 4}, {"4": 1, "2": 4, "1": 1})
    assert found.count == 3 and found.mean == 2 and found.deviation == 1
    assert found.half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert not found.is_seen
    assert found._replace(half=1.9).is_seen
    assert intervals.compare_pairs({"1": 1.0}, {"1": 2.0}) is None
    assert intervals.compare_pairs({"1": 1.0, "2": math.nan}, {"1": 1.0, "2": 1.0}) is None
    # What tables of power give for effects of half a deviation, 0.8 and 1.
    assert [intervals.seeds_to_see(d, 1) for d in (-0.5, 0.8, 1)] == [34, 15, 10]
    assert intervals.seeds_to_see(0.3, 0) == 2
    with pytest.raises(ValueError, match="a difference of 0"):
        intervals.seeds_to_see(0, 1)


def test_report_of_several_rates(data):
    """It takes those that the validation texts chose, and refuses what it cannot choose among."""
    results, runs = importlib.import_module("results"), importlib.import_module("encoder_runs")

    def row(method, seed, rate, metric, **others):
        made = {**dict.fromkeys(runs.KEY + runs.FOUND, "1"), "corpus": "cola", "basis_rate": ""}
        made |= {"method": method, "seed": str(seed), "rate": rate, "metric": str(metric)}
        return made | others

    rows = [row("full", 0, "0.1", 0.4), row("full", 0, "0.2", 0.5), row("full", 0, "0.3", 0.3)]
    rows += [row("full", seed, rate, seed) for seed in (2, 1) for rate in ("0.1", "0.2")]
    rows += [row("sparsegrad", 1, "0.5", 7, basis_rate=rate) for rate in ("0.1", "0.2")]
    rows += [row("full", 1, "0.9", 1, train="head")]
    one, other = results.compare_rows(rows)
    assert one.metrics == {"full": {"1": 100, "2": 200}, "sparsegrad": {"1": 700}}
    assert [r["rate"] for r in one.methods["full"]] == ["0.2", "0.2"]
    assert one.methods["sparsegrad"][0]["basis_rate"] == "0.2"
    assert other.metrics == {"full": {"1": 100}} and "trained: head" in other.title
    assert results.compare_rows(rows[:3]) == []
    more = importlib.import_module("runs").choice_seeds(2)[1]
    again = [row("full", more, "0.1", 0.6), row("full", more, "0.2", 0.4)]
    (two, _) = results.compare_rows(rows[:3] + again + rows[3:])
    # By the mean of two, where a rate has one alone it is not among them; the basis phase follows.
    assert [r["rate"] for r in two.methods["full"]] == ["0.1", "0.1"]
    assert two.methods["sparsegrad"][0]["basis_rate"] == "0.1"
    with pytest.raises(SystemExit, match="no runs yet but those that choose rates"):
        importlib.import_module("peft_shootout").show([], None)
    with pytest.raises(SystemExit, match="lora: runs of rates 0.1, 0.2, and none to choose by"):
        results.compare_rows([row("lora", 1, "0.1", 1), row("lora", 1, "0.2", 2)])
    with pytest.raises(SystemExit, match="sparsegrad: runs of basis rates 0.1, 0.3; which"):
        results.compare_rows([row("sparsegrad", 1, "1", 1, basis_rate=r) for r in ("0.1", "0.3")])


def test_what_trains(data, shootout):
    methods = importlib.import_module("methods")
    encoder = importlib.import_module("encoder")

    def trained(parts):
        model = encoder.load_model(data / "model")
        methods.choose_trained(model, parts)
        return {name for name, p in model.named_parameters() if p.requires_grad}

    blocks = [f"bert.encoder.layer.{i}." for i in range(LAYERS)]
    places = ("intermediate.dense.weight", "output.dense.weight")
    weights = {block + place for block in blocks for place in places}
    head = {
        f"{name}.{p}" for name in ("bert.pooler.dense", "classifier") for p in ("weight", "bias")
    }
    assert trained("feed-forward") == weights
    assert trained("feed-forward,head") == weights | head
    assert len(trained("all")) > 20 > len(weights | head)
    for parts in ("head", "all,head", "feed-forward,bias", ""):
        with pytest.raises(ValueError, match="what trains is all, or feed-forward"):
            trained(parts)
    body = encoder.load_model(data / "model").bert
    body.pooler = None
    with pytest.raises(ValueError, match="BertModel has no head"):
        methods.choose_trained(body, "feed-forward,head")


@pytest.mark.parametrize("method", ["frozen", "full-then-frozen", "sparsegrad", "full", "lora"])
def test_what_a_control_trains(data, shootout, method):
    """Weights move as long as the method says, all else that is frozen never."""
    import torch

    methods, runs = importlib.import_module("methods"), importlib.import_module("encoder_runs")
    texts = runs.read_texts(data, "sst2")
    model = importlib.import_module("encoder").load_model(data / "model")
    before = {name: p.clone() for name, p in model.named_parameters()}
    sizes = methods.Sizes(1, 16, 2, 1, "feed-forward,head")
    training = methods.Training(method, model, 1e-2, sizes, basis_rate=1e-3)
    weight = "bert.encoder.layer.1.output.dense.weight"
    rates, moved, last = [], [], before[weight]
    for _ in range(4):
        rates.append(training.optimizer.param_groups[0]["lr"])
        training.train([runs.make_batch(texts[:4], 128)])
        now = dict(model.named_parameters())[weight].detach().clone()
        moved.append(not torch.equal(now, last))
        last = now
    assert moved == {
        "frozen": [False] * 4,
        "full-then-frozen": [True, True, False, False],
        "lora": [False] * 4,
    }.get(method, [True] * 4)
    has_phase = method in ("full-then-frozen", "sparsegrad")
    assert rates == ([1e-3, 1e-3, 1e-2, 1e-2] if has_phase else [1e-2] * 4)
    after = dict(training.finish().named_parameters())
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])
    for name, value in before.items():
        if "attention" in name or "embeddings" in name or name.endswith(".output.dense.bias"):
            assert torch.equal(after[name], value), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--methods full,fast", "no method 'fast'; there are: full, lora, "),
        ("--methods full,full", "a method twice"),
        ("--corpus imdb", "no corpus 'imdb'; there are: sst2, cola"),
        ("--corpus sst2 --validation 40", "sst2 has 40 training texts, not over 40"),
        ("--rate fast=1e-4", "no method 'fast'"),
        ("--methods full --leading 0", None),
        ("--methods lora --rate lora=2", None),
        ("--methods lora --rates 1e-4,x", None),
        ("--steps 5,5,5", None),
        ("--batch 2,2,2", None),
        ("--seeds 0", None),
        ("--seeds 3-2", None),
        ("--train head", None),
        ("--methods full,frozen --train feed-forward", None),
        ("--report --csv nowhere.csv", None),
        ("--model bert-base", None),
        ("--model nowhere", "no folder nowhere"),
    ],
)
def test_bad_options(shootout, options, message, data):
    with pytest.raises(SystemExit, match=message) as raised:
        shootout(f"{options} --steps 2" if "--steps" not in options else options)
    assert message is not None or raised.value.code == 2
    assert not (data / "peft_shootout.csv").exists()


def test_refuses_another_table(shootout, data):
    (data / "peft_shootout.csv").write_text("mode,step_ms\nfast,1\n")
    with pytest.raises(SystemExit, match="is not a table of such runs"):
        shootout("--steps 2")
    assert (data / "peft_shootout.csv").read_text() == "mode,step_ms\nfast,1\n"


def test_times(shootout):
    rows = shootout(f"--time --rounds 2 --length 20 --methods {METHODS},pytorch")
    rows = {row["method"]: row for row in rows}
    assert set(rows) == {*METHODS.split(","), "pytorch"}
    for row in rows.values():
        parts = [float(row[f"{part}_ms"]) for part in ("forward", "backward", "optimizer")]
        assert 0 < max(parts) < float(row["step_ms"])
    assert float(rows["full"]["ratio"]) == 1
    assert float(rows["lora"]["ratio"]) != 1
    for row in rows.values():
        assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])
    # The elements stay the same by now, and all have been chosen: 4 bytes of gradient, 16 of state.
    assert int(rows["sparsegrad-leading-fixed"]["gradient_and_state_bytes"]) < 21 * ELEMENTS


def test_memory(shootout, capsys):
    (row,) = shootout("--memory --methods full")
    assert row == {"method": "full", "peak_mib": "123.5", "peak_given_bases_mib": "123.5"}
    capsys.readouterr()
    for name in (*METHODS.split(","), "collect", "leading", "all"):
        shootout(f"--memory-of {name} --given-bases")
        assert 100 < float(capsys.readouterr().out) < 5000


def test_basis(shootout):
    rows = shootout("--basis --rounds 2 --length 20 --leading 1 --batch 8")
    assert [(r["rank_out"], r["rank_in"]) for r in rows] == [
        ("1", "1"),
        (str(WIDE), str(HIDDEN)),
        ("1", "1"),
        (str(HIDDEN), str(WIDE)),
    ]
    for leading, whole in (rows[:2], rows[2:]):
        for side in ("energy_out", "energy_in"):
            assert 0.1 < float(leading[side]) < float(whole[side]) - 1e-5
            assert float(whole[side]) == pytest.approx(1, abs=1e-5)
    assert {int(r["sums_bytes"]) for r in rows} == {2 * 4 * (WIDE**2 + HIDDEN**2)}


def test_matthews():
    import torch

    matthews = importlib.import_module("encoder").matthews
    labels = torch.tensor([1, 0, 0, 0])
    assert matthews(torch.tensor([1, 1, 0, 0]), labels) == pytest.approx(2 / 12**0.5)
    assert matthews(1 - labels, labels) == pytest.approx(-1)
    assert matthews(torch.ones(4, dtype=torch.long), labels) == 0
