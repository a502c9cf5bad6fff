# SPDX-License-Identifier: Apache-2.0
"""Tables and a drawing of what came out of a comparison, from its runs alone."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common import print_table
from drawing import Drawing
from encoder_runs import METRICS, PROTOCOL
from intervals import Difference, compare_pairs, seeds_to_see
from runs import Row, group_rows

# BERT-base, arXiv 2410.07383: points that a method lies above full fine-tuning.
PUBLISHED = {
    "sst2": {"lora": -0.4, "meprop": -0.6, "sparsegrad": -0.3},
    "cola": {"lora": -0.6, "meprop": -0.6, "sparsegrad": -0.2},
}
NOTE = (
    "In brackets are 95% intervals of the mean difference over the seeds, in bold those that leave"
    " out 0.\nOf twenty differences that are none, one is in bold by chance."
)
_COLORS = ("#7f7f7f", "#f0a63a", "#2f8f4e", "#1f5fa8", "#c0504d", "#7b4fa3", "#3aa6a6", "#555")


@dataclass
class Comparison:
    """Runs of one protocol on one corpus.

    Attributes
    ----------
    corpus : str
    methods : dict of str to list of dict
        The rows of each method, one for each seed, at the rate that its choice gave.
    """

    corpus: str
    methods: dict[str, list[Row]]

    @property
    def title(self) -> str:
        """The protocol in words."""
        row = next(iter(self.methods.values()))[0]
        return (
            f"{self.corpus}, {METRICS[self.corpus][0]} × 100; {row['model']}, trained:"
            f" {row['train']}; {row['steps']} steps of {row['batch']} texts, rank {row['rank']},"
            f" leading {row['leading']}, basis steps {row['basis_steps']}, fixed after"
            f" {row['fix_after']}, {row['threads']} threads"
        )

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """The metric × 100 of each method by seed."""
        return {
            name: {row["seed"]: 100 * float(row["metric"]) for row in rows}
            for name, rows in self.methods.items()
        }


def compare_rows(rows: list[Row]) -> list[Comparison]:
    """Sort the rows of a file into comparisons."""
    groups = group_rows(rows, ["corpus", *PROTOCOL], "metric")
    return [Comparison(next(iter(group.values()))[0]["corpus"], group) for group in groups]


# --------------------------------------------------------------------------------------------------
# Tables


def difference_cell(difference: Difference | None, digits: int = 2) -> str:
    """Write a difference with its 95% interval; in bold if that leaves out 0."""
    if difference is None:
        return ""
    mean, half = difference.mean, difference.half
    words = f"{mean:+.{digits}f} ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})"
    return f"**{words}**" if difference.is_seen else words


def spread_cell(values: list[float], digits: int = 2) -> str:
    """Write a mean and the standard deviation of a seed."""
    if any(map(math.isnan, values)):
        return "nan"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def print_pairs(metrics: Mapping[str, dict[str, float]], digits: int = 2) -> None:
    """Print the difference of each method (a row) from each other one (a column)."""
    names = list(metrics)
    print_table(
        ["", *names[:-1]],
        [
            [name]
            + [
                difference_cell(compare_pairs(metrics[name], metrics[other]), digits)
                for other in names[:i]
            ]
            + [""] * (len(names) - 1 - i)
            for i, name in enumerate(names)
            if i > 0
        ],
    )


def _kept_bytes(rows: list[Row]) -> int:
    """Return the bytes of gradient and state of the feed-forward weights, the most of the runs."""
    return max(int(row["gradient_bytes"]) + int(row["state_bytes"]) for row in rows)


def _needed(corpus: str, name: str, difference: Difference | None) -> tuple[str, str]:
    """Return the published difference from full, and how many seeds would show it."""
    kind = "sparsegrad" if name.startswith("sparsegrad") else name
    published = PUBLISHED[corpus].get(kind)
    if published is None or difference is None:
        return "", ""
    return f"{published:+.1f}", str(seeds_to_see(published, difference.deviation))


def report(comparisons: list[Comparison]) -> None:
    """Print the tables of each comparison."""
    for comparison in comparisons:
        metrics = comparison.metrics
        full = comparison.methods.get("full")
        lines = []
        for name, rows in comparison.methods.items():
            row = rows[0]
            against = {
                other: compare_pairs(metrics[name], metrics[other])
                if other in metrics and other != name
                else None
                for other in ("full", "frozen")
            }
            kept = _kept_bytes(rows)
            rate = f"{row['basis_rate']}, {row['rate']}" if row["basis_rate"] else row["rate"]
            lines.append(
                [
                    name,
                    rate,
                    str(len(rows)),
                    spread_cell(list(metrics[name].values())),
                    *map(difference_cell, against.values()),
                    *_needed(comparison.corpus, name, against["full"]),
                    f"{statistics.mean(float(row['loss']) for row in rows):.3f}",
                    f"{statistics.median(float(row['cpu_s']) for row in rows):.1f}",
                    row["elements"],
                    f"{kept / 1024:.0f}",
                    f"{kept / _kept_bytes(full):.1%}" if full else "",
                    f"{(int(row['bases_bytes']) + int(row['scratch_bytes'])) / 1024:.0f}",
                    f"{float(row['peak_mib']):.0f}",
                ]
            )
        print(f"\n{comparison.title}\n")
        print_table(
            ["method", "rate", "seeds", "mean ± of a seed", "against full", "against frozen"]
            + ["published", "seeds to see that", "training loss", "CPU s", "elements"]
            + ["gradient and state KiB", "of full", "bases and scratch KiB", "peak MiB"],
            lines,
        )
        if len(metrics) > 2:
            print("\nEach method (row) less each other one:\n")
            print_pairs(metrics)
    print(f"\n{NOTE}")


# --------------------------------------------------------------------------------------------------
# A drawing


def _panel(page: Drawing, x: float, top: float, size: tuple[float, float], title: str) -> None:
    page.text(x + size[0] / 2, top - 18, title)
    page.line((x, top + size[1]), (x + size[0], top + size[1]), "#888")


def draw(comparisons: list[Comparison], path: Path) -> None:
    """Draw the differences from full training, or from the first method, and the memory.

    A dot for each seed, a thick line for the 95% interval of the mean. Not the speed of runs that
    came one after the other, on a machine that may have had other work.
    """
    names = list(dict.fromkeys(name for c in comparisons for name in c.methods))
    left, top, width, gap, line = 190, 50, 280, 40, 34
    height = line * len(names)
    bottom = top + height
    page = Drawing(left + (len(comparisons) + 1) * (width + gap), bottom + 60)
    colors = {name: _COLORS[n % len(_COLORS)] for n, name in enumerate(names)}
    middle = {name: top + line * (n + 0.5) for n, name in enumerate(names)}
    for name in names:
        page.text(left - 14, middle[name] + 4, name, "end")
    for i, comparison in enumerate(comparisons):
        x0, metrics = left + i * (width + gap), comparison.metrics
        base = "full" if "full" in metrics else next(iter(metrics))
        steps = next(iter(comparison.methods.values()))[0]["steps"]
        title = f"{comparison.corpus}, {METRICS[comparison.corpus][0]} × 100 less that of {base}"
        _panel(page, x0, top, (width, height), title)
        page.text(x0 + width / 2, bottom + 44, f"after {steps} steps; a dot is a seed")
        points = {
            name: [
                value - metrics[base][seed]
                for seed, value in found.items()
                if seed in metrics[base] and math.isfinite(value - metrics[base][seed])
            ]
            for name, found in metrics.items()
        }
        every = [value for values in points.values() for value in values] or [0.0]
        margin = 0.1 * (max(every) - min(every)) or 1.0
        low, high = min(every) - margin, max(every) + margin
        ticks = (0.2, 0.5, 1, 2, 5, 10, 20, 50)
        step = next(s for s in ticks if high - low <= 7 * s or s == ticks[-1])

        def at(value: float, x0: float = x0, low: float = low, high: float = high) -> float:
            return x0 + width * (value - low) / (high - low)

        for t in range(math.ceil(low / step), math.floor(high / step) + 1):
            page.line((at(t * step), top), (at(t * step), bottom), "#888" if t == 0 else "#ddd")
            page.text(at(t * step), bottom + 20, f"{t * step:+g}" if t else "0")
        for name, values in points.items():
            for value in values:
                page.dot(at(value), middle[name], colors[name])
            difference = compare_pairs(metrics[name], metrics[base])
            if difference and name != base:
                ends = [max(low, min(high, difference.mean + s * difference.half)) for s in (-1, 1)]
                y = middle[name] + 11
                page.line((at(ends[0]), y), (at(ends[1]), y), "#222", 3)
    first = comparisons[0].methods
    x0 = left + len(comparisons) * (width + gap)
    _panel(page, x0, top, (width, height), "gradient and state of the weights, MiB")
    sizes = {name: _kept_bytes(rows) / 2**20 for name, rows in first.items()}
    for name, size in sizes.items():
        length = (width - 60) * size / (max(sizes.values()) or 1)
        page.bar(x0, middle[name] - 10, length, line - 14, colors[name])
        page.text(x0 + length + 6, middle[name] + 4, f"{size:.3g}", "start")
    page.save(path)
