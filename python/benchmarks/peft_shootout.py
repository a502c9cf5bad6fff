# SPDX-License-Identifier: Apache-2.0
"""Compares SparseGrad with full fine-tuning, LoRA and MeProp: quality, time, memory.

    python peft_shootout.py --data DIR --csv runs.csv --plot peft.svg

Trains a pretrained encoder with a new head on SST-2 and CoLA by each of the methods that
methods.py lists, and prints what the trained models make of the held-out texts: the share of right
labels (SST-2), or Matthews' correlation (CoLA). For each seed all methods start from the same
weights and see the same texts in the same order. Padding is taken out for all, dropout is off, the
rate is constant, gradients are not clipped.

The rate is each method's own, the best of --rates: the one of highest metric after a run from the
first seed, on texts that were taken from the training texts and that no run trains on. The held-out
texts have no part in it.

Each run is added to --csv when it ends; runs found there are not repeated. So a long comparison may
be stopped and goes on where it was. A run that diverges ends there; its metrics and loss are NaN.

    python peft_shootout.py --data DIR --model bert-base --time     # the time of a step instead
    python peft_shootout.py --data DIR --model bert-base --memory   # peak memory of processes
    python peft_shootout.py --data DIR --model bert-base --basis    # what the basis phase takes
"""

import argparse
import csv
import hashlib
import math
import random
import statistics
from pathlib import Path

import costs
import torch
from common import Mode, Times, print_table, run_again, take_step
from drawing import Drawing
from encoder import PACKAGE, accuracy, judge, load_config, load_model, matthews, order_texts
from methods import METHODS, Sizes, Training
from texts import Texts, make_batch, read_texts
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from sebp import SebpError
from sebp.sparse import NONFINITE

METRICS = {"sst2": ("accuracy", accuracy), "cola": ("Matthews correlation", matthews)}
_KEY = ["corpus", "model", "method", "seed", "rate", "steps", "batch"]
_KEY += ["validation", "rank", "leading", "basis_steps", "fix_after", "threads", "data"]
_FOUND = ["validation_metric", "metric", "loss", "step_ms", "peak_mib", "energy", "elements"]
_FOUND += ["gradient_bytes", "state_bytes", "bases_bytes", "scratch_bytes"]
_COLORS = ("#7f7f7f", "#f0a63a", "#2f8f4e", "#1f5fa8", "#c0504d", "#7b4fa3", "#3aa6a6", "#555")

Row = dict[str, str]


# --------------------------------------------------------------------------------------------------
# Runs


class Corpus:
    """The texts of a corpus: to train on, to choose the rate by, and held out."""

    def __init__(self, data: Path, name: str, validation: int) -> None:
        texts = read_texts(data, name)
        random.Random(0).shuffle(texts)
        if validation >= len(texts):
            raise SystemExit(f"{name} has {len(texts)} training texts, not over {validation}")
        self.validation, self.held_out = texts[:validation], read_texts(data, name, "dev")
        # Some texts are there more than once. What judges is not to be learnt by heart.
        judging = {tuple(tokens) for tokens, _ in self.validation + self.held_out}
        self.train = [text for text in texts[validation:] if tuple(text[0]) not in judging]
        if not self.train:
            raise SystemExit(f"{name}: each training text is one of those that judge, too")


def name_data(data: Path, corpus: str) -> str:
    """Give a short name to what a corpus and its vocabulary hold, wherever they lie."""
    paths = [data / corpus / "train.tsv", data / corpus / "dev.tsv"]
    paths.append(data / "bert-base-uncased" / "vocab.txt")
    digests = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    return hashlib.sha256(digests.encode()).hexdigest()[:12]


class Runs:
    """The runs of a comparison, those of a file among them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._corpora: dict[str, Corpus] = {}
        self._data = {name: name_data(options.data, name) for name in options.corpus}
        self._rows: list[Row] = []
        path = options.csv
        if path and path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self._rows = list(reader)
                if reader.fieldnames != _KEY + _FOUND:
                    raise SystemExit(f"{path} is not a table of such runs")

    def get(self, corpus: str, method: str, rate: float, seed: int) -> Row:
        """Return a run's row, after the run if there is none."""
        key = self._key(corpus, method, rate, seed)
        for row in self._rows:
            if all(row[name] == value for name, value in key.items()):
                return row
        row = {**key, **{name: str(value) for name, value in self._run(key).items()}}
        self._rows.append(row)
        if path := self._options.csv:
            is_new = not path.exists()
            with path.open("a", newline="") as file:
                writer = csv.DictWriter(file, _KEY + _FOUND)
                if is_new:
                    writer.writeheader()
                writer.writerow(row)
        print(
            f"{corpus} {method} rate {rate:g} seed {seed}: {float(row['metric']):.4f},"
            f" validation {float(row['validation_metric']):.4f}, loss {float(row['loss']):.4f},"
            f" {float(row['step_ms']):.0f} ms a step",
            flush=True,
        )
        return row

    def _key(self, corpus: str, method: str, rate: float, seed: int) -> Row:
        options = self._options
        key = {
            "corpus": corpus,
            "model": str(options.model or PACKAGE),
            "method": method,
            "seed": seed,
            "rate": f"{rate:g}",
            "steps": options.steps[corpus],
            "batch": options.batch,
            "validation": options.validation,
            **vars(options.sizes),
            "threads": torch.get_num_threads(),
            "data": self._data[corpus],
        }
        return {name: str(key[name]) for name in _KEY}

    def _run(self, key: Row) -> dict[str, object]:
        options, name, seed = self._options, key["corpus"], int(key["seed"])
        peak = self._peak(key)
        if name not in self._corpora:
            self._corpora[name] = Corpus(options.data, name, options.validation)
        corpus = self._corpora[name]
        model = load_model(options.model, seed)
        training = Training(key["method"], model, float(key["rate"]), options.sizes)
        steps, size = options.steps[name], options.batch
        order = order_texts(corpus.train, steps * size, seed)
        mode, times, losses = Mode(key["method"], "", []), Times(), []
        for i in range(0, len(order), size):
            batch = make_batch(order[i : i + size], 128)
            try:
                losses.append(take_step(mode, model, training.optimizer, batch, times))
            except SebpError as error:
                if error.status != NONFINITE:
                    raise
                losses.append(math.nan)
            if not math.isfinite(losses[-1]):
                break
        share = training.share()
        found = dict.fromkeys(("validation_metric", "metric", "loss"), math.nan)
        finite = all(bool(p.isfinite().all()) for p in model.parameters())
        if finite and math.isfinite(losses[-1]):
            model = training.finish()
            measure = METRICS[name][1]

            def judged(texts: Texts) -> float:
                return measure(judge(model, texts), torch.tensor([label for _, label in texts]))

            found["validation_metric"] = judged(corpus.validation)
            found["metric"] = judged(corpus.held_out)
            found["loss"] = statistics.mean(losses[-50:])
        return {
            **found,
            "step_ms": statistics.median(times.step or [math.nan]),
            "elements": share.elements,
            "gradient_bytes": share.gradient,
            "state_bytes": share.state,
            "bases_bytes": share.bases,
            "scratch_bytes": share.scratch,
            "energy": " ".join(f"{x:.4f}" for pair in share.energy for x in pair),
            "peak_mib": peak,
        }

    def _peak(self, key: Row) -> str:
        """Measure the peak memory of a process that trains so, unless a run like it has it."""
        other = ("seed", "rate", "steps", "validation")
        for row in self._rows:
            if all(row[name] == value for name, value in key.items() if name not in other):
                return row["peak_mib"]
        # One corpus alone, so one count of steps, of which it has its own.
        return run_again("--memory-of", key["method"], "--corpus", key["corpus"], "--steps", "1")


def choose_rate(runs: Runs, corpus: str, method: str, rates: list[float]) -> float:
    """Choose the rate of the best validation metric, the lowest of equals; NaN is the worst."""
    found = {r: float(runs.get(corpus, method, r, 1)["validation_metric"]) for r in sorted(rates)}
    best = max(found, key=lambda r: -math.inf if math.isnan(found[r]) else found[r])
    edge = len(found) > 1 and best in (min(found), max(found))
    others = ", ".join(f"{r:g}: {value:.4f}" for r, value in found.items())
    print(f"{corpus} {method}: rate {best:g}{', at the edge' if edge else ''} of {others}")
    return best


# --------------------------------------------------------------------------------------------------
# What came out


def mean_of(rows: list[Row], name: str) -> float:
    """Return the mean of a column."""
    return statistics.mean(float(row[name]) for row in rows)


def metrics_of(rows: list[Row]) -> list[float]:
    """Return the metrics of the runs that did not diverge."""
    metrics = [float(row["metric"]) for row in rows]
    return [metric for metric in metrics if math.isfinite(metric)]


def against_full(rows: list[Row], full: list[Row]) -> str:
    """Say how far metrics lie above those of full fine-tuning from the same seeds.

    A seed sets the head and the texts of all methods, so what these do to the metric cancels.
    """
    pairs = zip(rows, full, strict=True)
    differences = [float(row["metric"]) - float(other["metric"]) for row, other in pairs]
    if rows is full or len(differences) < 2 or not all(map(math.isfinite, differences)):
        return ""
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{statistics.mean(differences):+.4f} ± {error:.4f}"


def kept_bytes(row: Row) -> int:
    """Return the bytes of gradient and state of the feed-forward weights."""
    return int(row["gradient_bytes"]) + int(row["state_bytes"])


def report(results: dict[str, dict[str, list[Row]]], full_bytes: int) -> None:
    """Print a table for each corpus."""
    for corpus, methods in results.items():
        lines = []
        for method, rows in methods.items():
            metric = [float(row["metric"]) for row in rows]
            if any(map(math.isnan, metric)):
                metric = [math.nan]
            spread = f" ± {statistics.stdev(metric):.4f}" if len(metric) > 1 else ""
            row = rows[0]
            aside = int(row["bases_bytes"]) + int(row["scratch_bytes"])
            lines.append(
                [
                    method,
                    row["rate"],
                    row["elements"],
                    f"{statistics.mean(metric):.4f}{spread}",
                    f"{min(metric):.4f} to {max(metric):.4f}",
                    against_full(rows, methods["full"]) if "full" in methods else "",
                    f"{mean_of(rows, 'loss'):.4f}",
                    f"{1e3 / statistics.median(float(row['step_ms']) for row in rows):.2f}",
                    f"{float(row['peak_mib']):.0f}",
                    f"{max(map(kept_bytes, rows)) / 1024:.0f}",
                    f"{max(map(kept_bytes, rows)) / full_bytes:.1%}",
                    f"{aside / 1024:.0f}",
                ]
            )
        row = next(iter(methods.values()))[0]
        print(f"\n{corpus}, {row['steps']} steps of {row['batch']} texts:\n")
        print_table(
            ["method", "rate", "elements", METRICS[corpus][0], "from - to", "against full"]
            + ["training loss", "steps/s", "peak MiB", "gradient and state KiB", "of full"]
            + ["bases and scratch KiB"],
            lines,
        )


def draw(results: dict[str, dict[str, list[Row]]], path: Path) -> None:
    """Draw each run's metric as a dot, and each method's memory.

    Not the speed of runs that came one after the other, on a machine that may have had other work.
    """
    names = list(next(iter(results.values())))
    left, top, width, gap, line = 190, 50, 250, 50, 34
    bottom = top + line * len(names)
    panels = len(results) + 2
    page = Drawing(left + panels * (width + gap), bottom + 60)
    colors = dict(zip(METHODS, _COLORS, strict=True))
    for n, name in enumerate(names):
        page.text(left - 14, top + line * (n + 0.5) + 4, name, "end")

    def panel(i: int, title: str) -> float:
        x = left + i * (width + gap)
        page.text(x + width / 2, top - 18, title)
        page.line((x, bottom), (x + width, bottom), "#888")
        return x

    for i, (corpus, methods) in enumerate(results.items()):
        steps = next(iter(methods.values()))[0]["steps"]
        x0 = panel(i, f"{corpus}, {METRICS[corpus][0]} after {steps} steps")
        found = {name: metrics_of(rows) for name, rows in methods.items()}
        every = [value for values in found.values() for value in values] or [0.0]
        low, high = min(every), max(every)
        margin = 0.1 * (high - low) or 0.01
        low, high = low - margin, high + margin
        step = next(s for s in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if high - low <= 6 * s)
        for t in range(math.ceil(low / step), math.floor(high / step) + 1):
            x = x0 + width * (t * step - low) / (high - low)
            page.line((x, top), (x, bottom))
            page.text(x, bottom + 20, f"{t * step:g}")
        for n, name in enumerate(names):
            y = top + line * (n + 0.5)
            at = [x0 + width * (value - low) / (high - low) for value in found[name]]
            if not at:
                continue
            mean = statistics.mean(at)
            page.line((mean, y - 12), (mean, y + 12), colors[name], 3)
            for x in at:
                page.dot(x, y, colors[name])
    first = next(iter(results.values()))
    corpus = next(iter(results))
    bars = {
        f"{corpus}, peak memory of a process, MiB": {
            name: float(rows[0]["peak_mib"]) for name, rows in first.items()
        },
        "gradient and state of the weights, MiB": {
            name: max(map(kept_bytes, rows)) / 2**20 for name, rows in first.items()
        },
    }
    for i, (title, values) in enumerate(bars.items(), len(results)):
        x0 = panel(i, title)
        for n, name in enumerate(names):
            length = (width - 40) * values[name] / max(values.values())
            page.bar(x0, top + line * n + 7, length, line - 14, colors[name])
            page.text(x0 + length + 6, top + line * (n + 0.5) + 4, f"{values[name]:.4g}", "start")
    page.text(left + width / 2, bottom + 44, "a dot for each seed, a line at the mean")
    page.save(path)


# --------------------------------------------------------------------------------------------------
# Programs


def compare(options: argparse.Namespace) -> None:
    """Train, and print and draw what came out."""
    words = ", ".join(f"{name} {value}" for name, value in vars(options.sizes).items())
    print(f"{words}; PyTorch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    runs = Runs(options)
    results: dict[str, dict[str, list[Row]]] = {}
    for corpus in options.corpus:
        rates = {
            method: options.rate.get(method) or choose_rate(runs, corpus, method, options.rates)
            for method in options.methods
        }
        found = {method: [] for method in options.methods}
        for seed in range(1, options.seeds + 1):  # the outer loop, so that few seeds come early
            for method, rate in rates.items():
                found[method].append(runs.get(corpus, method, rate, seed))
        results[corpus] = found
    report(results, costs.full_bytes(make_model(options)))
    if options.plot:
        draw(results, options.plot)


def _names(words: str, known: dict, what: str) -> list[str]:
    names = words.split(",")
    for name in names:
        if name not in known:
            raise SystemExit(f"no {what} {name!r}; there are: {', '.join(known)}")
    if len(set(names)) < len(names):
        raise SystemExit(f"{words}: a {what} twice")
    return names


def parse_rate(words: str) -> float:
    """Read a learning rate; raise ValueError unless it is between 0 and 1."""
    rate = float(words)
    if not 0 < rate < 1:
        raise ValueError
    return rate


def _rates(words: str) -> list[float]:
    return [parse_rate(word) for word in words.split(",")]


def _count(words: str) -> int:
    count = int(words)
    if count < 1:
        raise ValueError
    return count


def _counts(words: str) -> list[int]:
    return [_count(word) for word in words.split(",")]


for _type, _what in ((_rates, "rate"), (_count, "count"), (_counts, "count")):
    _type.__name__ = _what


def parse() -> argparse.Namespace:
    """Read the options and look whether they make sense."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", required=True, help="as texts.read_texts() takes it")
    add("--model", metavar="DIR", help="folder of a model of transformers, or bert-base: that")
    add("--corpus", default="sst2,cola", metavar="NAME,...")
    add("--methods", metavar="NAME,...", help=f"of {', '.join(METHODS)}; default: the first five")
    add("--seeds", type=_count, default=3, help="runs of each method")
    add("--steps", type=_counts, default=[400], help="of a run; N,N: of each corpus")
    add("--batch", type=_count, default=16, help="texts in a batch")
    add("--rates", type=_rates, default=[3e-5, 8e-5, 2e-4], help="to choose from")
    add("--rate", action="append", default=[], metavar="METHOD=X", help="no choice for this one")
    add("--validation", type=_count, default=500, help="training texts to choose the rate by")
    add("--rank", type=_count, help="LoRA's; default: 0.9%% of the hidden size")
    add("--leading", type=_count, help="leading vectors; default: a third of the hidden size")
    add("--basis-steps", type=_count, default=30, help="from whose gradients bases are made")
    add("--fix-after", type=_count, default=100, help="steps until elements stay the same")
    add("--threads", type=_count, help="PyTorch's and libsebp's; default: PyTorch's choice")
    add("--csv", type=Path, metavar="FILE", help="runs, to be added to; of costs: the table")
    add("--plot", type=Path, metavar="FILE", help="draw what came out as an SVG")
    add("--time", action="store_true", help="time of a step, all methods in turn, instead")
    add("--memory", action="store_true", help="peak memory of each method's process instead")
    add("--basis", action="store_true", help="what the basis phase takes instead")
    add("--rounds", type=_count, default=10, help="of --time and --basis: steps of each")
    add("--length", type=_count, default=128, help="of --time and such: texts are padded to it")
    add("--memory-of", metavar="NAME", help=argparse.SUPPRESS)
    add("--given-bases", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.corpus = _names(options.corpus, METRICS, "corpus")
    default = ",".join(list(METHODS)[:5])
    options.methods = _names(options.methods or default, METHODS, "method")
    if len(options.steps) not in (1, len(options.corpus)):
        parser.error(f"--steps: {len(options.steps)} counts for {len(options.corpus)} corpora")
    steps = options.steps * len(options.corpus)
    options.steps = dict(zip(options.corpus, steps[: len(options.corpus)], strict=True))
    given = [word.partition("=") for word in options.rate]
    _names(",".join(method for method, _, _ in given) or "full", METHODS, "method")
    try:
        options.rate = {method: parse_rate(x) for method, _, x in given}
    except ValueError:
        parser.error(f"--rate: not METHOD=X with X between 0 and 1: {' '.join(options.rate)}")
    costs_only = options.time or options.memory or options.basis or options.memory_of
    if options.model == "bert-base" and not costs_only:
        parser.error("bert-base has random weights: for --time, --memory and --basis")
    return options


def make_model(options: argparse.Namespace) -> nn.Module:
    """Make the model that the options name, from the first seed."""
    if options.model != "bert-base":
        return load_model(options.model)
    torch.manual_seed(1)
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(config)


def main() -> None:
    """Run what the options ask for."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    hidden = 768 if options.model == "bert-base" else load_config(options.model).hidden_size
    rank = options.rank or max(1, round(0.009 * hidden))
    leading = options.leading or hidden // 3
    options.sizes = Sizes(rank, leading, options.basis_steps, options.fix_after)
    if options.time or options.memory or options.basis or options.memory_of:
        costs.run(options, lambda: make_model(options))
    else:
        compare(options)


if __name__ == "__main__":
    main()
