# SPDX-License-Identifier: Apache-2.0
"""Compares SparseGrad with full fine-tuning, LoRA and MeProp: quality, time, memory.

    python peft_shootout.py --data DIR --train feed-forward,head --csv runs.csv --plot peft.svg

Trains a pretrained encoder with a new head on SST-2 and CoLA by each of the methods that
methods.py lists, and prints what the trained models make of the held-out texts: the share of right
labels (SST-2), or Matthews' correlation (CoLA). For each seed all methods start from the same
weights and see the same texts in the same order. Padding is taken out for all, dropout is off, the
rate is constant, gradients are not clipped.

The rate is each method's own, the best of --rates: the one of highest metric after a run from a
seed of its own, or of highest mean after --choices such runs, on texts that were taken from the
training texts and that no run trains on. The held-out texts have no part in it. Rates are run from
the middle one on, until both neighbors of the best one are known. Methods with a basis phase take
the rate of full fine-tuning in that phase, or --basis-rate.

Each run is added to --csv when it ends; runs found there are not repeated. So a long comparison may
be stopped and goes on where it was: all methods of a seed come before the next seed. A run that
diverges ends there; its metric and loss are NaN.

    python peft_shootout.py --report --csv runs.csv --plot peft.svg # tables of the runs so far
    python peft_shootout.py --data DIR --model bert-base --time     # the time of a step instead
    python peft_shootout.py --data DIR --model bert-base --memory   # peak memory of processes
    python peft_shootout.py --data DIR --model bert-base --basis    # what the basis phase takes
"""

import argparse
from functools import partial
from pathlib import Path

import costs
import torch
from encoder import load_config, load_model
from encoder_runs import FOUND, KEY, METRICS, EncoderRuns
from methods import DEFAULT, METHODS, Sizes, check_parts
from options import (
    choose_names,
    read_count,
    read_counts,
    read_rate,
    read_rates,
    read_rates_of_methods,
    read_seeds,
)
from results import Comparison, compare_rows, draw, report
from runs import RunFile, choose_rates
from torch import nn
from transformers import BertConfig, BertForSequenceClassification


def compare(options: argparse.Namespace) -> None:
    """Train, and print and draw what came out."""
    words = ", ".join(f"{name} {value}" for name, value in vars(options.sizes).items())
    print(f"{words}; PyTorch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    runs = EncoderRuns(options)
    rates = {
        corpus: choose_rates(
            options.methods, options.rate, options.basis_rate, partial(runs.choose_rate, corpus)
        )
        for corpus in options.corpus
    }
    found = [
        Comparison(corpus, {method: [] for method in options.methods}) for corpus in options.corpus
    ]
    for seed in options.seeds:  # the outer loop, so that few seeds come early
        for comparison in found:
            for method, rows in comparison.methods.items():
                rate, basis_rate = rates[comparison.corpus][method]
                rows.append(runs.get(comparison.corpus, method, rate, seed, basis_rate))
    show(found, options.plot)


def show(comparisons: list[Comparison], plot: Path | None) -> None:
    """Print and draw comparisons."""
    if not comparisons:
        raise SystemExit("no runs yet but those that choose rates")
    report(comparisons)
    if plot:
        draw(comparisons, plot)


# --------------------------------------------------------------------------------------------------
# Options


def _of_each(corpora: list[str], counts: list[int]) -> dict[str, int]:
    """Give each corpus its count, or all of them the only one."""
    return dict(zip(corpora, counts * (len(corpora) // len(counts)), strict=True))


def parse() -> argparse.Namespace:
    """Read the options and look whether they make sense."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="as texts.read_texts() takes it")
    add("--model", metavar="DIR", help="folder of a model of transformers, or bert-base: that")
    add("--corpus", default="sst2,cola", metavar="NAME,...")
    add(
        "--methods",
        metavar="NAME,...",
        help=f"of {', '.join(METHODS)}; default: to galore",
    )
    add("--train", default="all", metavar="PART,...", help="all, or feed-forward and head")
    add("--seeds", type=read_seeds, default="3", help="runs of each method; M-N: these seeds")
    add("--steps", type=read_counts, default=[400], help="of a run; N,N: of each corpus")
    add("--batch", type=read_counts, default=[16], help="texts in a batch; N,N: of each corpus")
    add("--rates", type=read_rates, default=[3e-5, 8e-5, 2e-4], help="to choose from")
    add("--choices", type=read_count, default=1, help="runs that choose, of each rate")
    add("--rate", action="append", default=[], metavar="METHOD=X", help="no choice for this one")
    add("--basis-rate", type=read_rate, metavar="X", help="of basis phases; default: full's")
    add("--validation", type=read_count, default=500, help="training texts to choose the rate by")
    add(
        "--held-out",
        type=read_count,
        default=2000,
        help="training texts that stand in for a test.tsv",
    )
    add("--rank", type=read_count, help="LoRA's; default: 0.9%% of the hidden size")
    add("--leading", type=read_count, help="leading vectors; default: a third of the hidden size")
    add("--basis-steps", type=read_count, default=30, help="from whose gradients bases are made")
    add("--fix-after", type=read_count, default=100, help="steps until elements stay the same")
    add("--threads", type=read_count, help="PyTorch's and libsebp's; default: PyTorch's choice")
    add("--csv", type=Path, metavar="FILE", help="runs, to be added to; of costs: the table")
    add("--plot", type=Path, metavar="FILE", help="draw what came out as an SVG")
    add("--report", action="store_true", help="print and draw the runs of --csv, and run nothing")
    add("--time", action="store_true", help="time of a step, all methods in turn, instead")
    add("--cpu", action="store_true", help="of --time: CPU time; with --threads 1")
    add("--memory", action="store_true", help="peak memory of each method's process instead")
    add("--basis", action="store_true", help="what the basis phase takes instead")
    add("--rounds", type=read_count, default=10, help="of --time and --basis: steps of each")
    add("--length", type=read_count, default=128, help="of --time and such: texts are padded to it")
    add("--memory-of", metavar="NAME", help=argparse.SUPPRESS)
    add("--given-bases", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report and not (options.csv and options.csv.exists()):
        parser.error("--report needs the --csv of some runs")
    if not (options.report or options.data):
        parser.error("--data is missing")
    options.corpus = choose_names(options.corpus, METRICS, "corpus")
    options.methods = choose_names(options.methods or ",".join(DEFAULT), METHODS, "method")
    for name in ("steps", "batch"):
        if len(getattr(options, name)) not in (1, len(options.corpus)):
            parser.error(f"--{name}: not one count, and not one for each corpus")
    options.steps = _of_each(options.corpus, options.steps)
    options.batches = _of_each(options.corpus, options.batch)
    options.batch = options.batches[options.corpus[0]]
    try:
        check_parts(options.train)
    except ValueError as error:
        parser.error(f"--train {error}")
    trains = not (options.report or options.memory or options.memory_of)
    if trains and options.train == "feed-forward" and "frozen" in options.methods:
        parser.error("--train feed-forward: frozen has nothing to train")
    try:
        options.rate = read_rates_of_methods(options.rate, METHODS)
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
    if options.report:
        show(compare_rows(RunFile(options.csv, KEY, FOUND).rows), options.plot)
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    hidden = 768 if options.model == "bert-base" else load_config(options.model).hidden_size
    rank = options.rank or max(1, round(0.009 * hidden))
    leading = options.leading or hidden // 3
    options.sizes = Sizes(rank, leading, options.basis_steps, options.fix_after, options.train)
    if options.time or options.memory or options.basis or options.memory_of:
        title = f"{options.model or 'MiniLM-L6'}, {options.corpus[0]}"
        make_batches = partial(costs.batches_of_texts, options)
        costs.run(options, title, lambda: make_model(options), make_batches)
    else:
        compare(options)


if __name__ == "__main__":
    main()
