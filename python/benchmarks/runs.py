# SPDX-License-Identifier: Apache-2.0
"""Runs of a comparison, kept in a CSV file so that none is repeated."""

import csv
import math
from pathlib import Path

Row = dict[str, str]


class RunFile:
    """The runs of a comparison: a row for each, of what it was (its key) and what came out.

    Attributes
    ----------
    rows : list of dict of str to str
        All of them, those found in the file first.

    Raises
    ------
    SystemExit
        If the file has other columns.
    """

    def __init__(self, path: Path | None, key: list[str], found: list[str]) -> None:
        """Read a file, if there is one; None: keep runs in memory alone."""
        self._path, self._columns = path, key + found
        self.rows: list[Row] = []
        if path and path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.rows = list(reader)
                if reader.fieldnames != self._columns:
                    raise SystemExit(f"{path} is not a table of such runs")

    def find(self, key: Row) -> Row | None:
        """Return the run of a key, or the first one of part of a key; None if there is none."""
        for row in self.rows:
            if all(row[name] == value for name, value in key.items()):
                return row
        return None

    def add(self, key: Row, found: dict[str, object]) -> Row:
        """Add a run, to the file as well, and return its row."""
        row = {**key, **{name: str(value) for name, value in found.items()}}
        self.rows.append(row)
        if self._path:
            is_new = not self._path.exists()
            with self._path.open("a", newline="") as file:
                writer = csv.DictWriter(file, self._columns)
                if is_new:
                    writer.writeheader()
                writer.writerow(row)
        return row


def best_rate(found: dict[float, float], is_lower_better: bool = False) -> float:
    """Return the rate of the best number, the lowest rate of equals; NaN is the worst."""
    sign = -1 if is_lower_better else 1
    values = {rate: sign * found[rate] for rate in sorted(found)}
    return max(values, key=lambda r: -math.inf if math.isnan(values[r]) else values[r])


def describe_choice(name: str, found: dict[float, float], best: float) -> str:
    """Say which rate was chosen, and whether a lower or higher one might be better still."""
    edge = len(found) > 1 and best in (min(found), max(found))
    others = ", ".join(f"{rate:g}: {found[rate]:.4f}" for rate in sorted(found))
    return f"{name}: rate {best:g}{', at the edge' if edge else ''} of {others}"
