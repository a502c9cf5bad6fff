# SPDX-License-Identifier: Apache-2.0
"""Runs of a comparison, kept in a CSV file so that none is repeated."""

import csv
import fcntl
import math
import os
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

Row = dict[str, str]
Rates = dict[str, tuple[float, float | None]]  # of each method, and of its basis phase

# Runs that choose a rate are judged by texts for that alone: of seed 0, and those above this.
MOST_SEED = 1_000_000


def choice_seeds(count: int) -> list[int]:
    """Return the seeds of `count` runs that choose a rate."""
    return [0, *range(MOST_SEED + 1, MOST_SEED + count)]


def is_choice(seed: int) -> bool:
    """Return whether a seed is that of a run that chooses a rate."""
    return seed == 0 or seed > MOST_SEED


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
            with self._path.open("a", newline="") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # several programs may add to one file
                writer = csv.DictWriter(file, self._columns)
                if file.seek(0, os.SEEK_END) == 0:
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


# --------------------------------------------------------------------------------------------------
# Rates before runs, and runs by their rates


def climb(rates: list[float], run: Callable[[float], float], is_lower_better: bool = False) -> dict:
    """Run rates until the neighbors of the best one are known.

    The first one is in the middle. So a wide range of rates costs few runs, and finds the best of
    them where the metric has one peak.

    Parameters
    ----------
    rates : list of float
        To choose from.
    run : callable
        Gives the metric of a rate.

    Returns
    -------
    dict of float to float
        The rates that were run, and their metrics.
    """
    rates = sorted(rates)
    todo, found = [rates[(len(rates) - 1) // 2]], {}
    while todo:
        found |= {rate: run(rate) for rate in todo}
        at = rates.index(best_rate(found, is_lower_better))
        todo = [rate for rate in rates[max(at - 1, 0) : at + 2] if rate not in found]
    return found


def choose_rates(
    methods: Iterable[str],
    given: dict[str, float],
    basis_rate: float | None,
    choose: Callable[[str, float | None], float],
) -> Rates:
    """Choose each method's rate.

    Parameters
    ----------
    methods : iterable of str
        Names. Full training comes first, as basis phases have its rate.
    given : dict of str to float
        Rates that are not to be chosen.
    basis_rate : float, optional
        Of basis phases, instead of that of full training.
    choose : callable
        Chooses a method's rate, given that of basis phases or None.
    """
    found: Rates = {}
    for method in sorted(methods, key=lambda name: name != "full"):
        first = basis_rate or found.get("full", (None,))[0]
        found[method] = (given.get(method) or choose(method, first), first)
    return found


def _of_basis_rate(name: str, rows: list[Row], rate_of_full: str | None) -> list[Row]:
    """Choose the runs whose basis phase had the rate of full training, where there are several."""
    rates = {row["basis_rate"] for row in rows}
    if len(rates) == 1:
        return rows
    if rate_of_full not in rates:
        raise SystemExit(f"{name}: runs of basis rates {', '.join(sorted(rates))}; which?")
    return [row for row in rows if row["basis_rate"] == rate_of_full]


def _of_best_rate(name: str, rows: list[Row], metric: str, is_lower_better: bool) -> list[Row]:
    """Choose a method's judged runs, at the rate that was best on the texts for that.

    Of the rates with as many runs that choose as any has, by their mean.
    """
    found: dict[float, list[float]] = {}
    for row in rows:
        if is_choice(int(row["seed"])):
            found.setdefault(float(row["rate"]), []).append(float(row[metric]))
    most = max(map(len, found.values()), default=0)
    choice = {rate: statistics.mean(one) for rate, one in found.items() if len(one) == most}
    rates = {row["rate"] for row in rows}
    if not choice and len(rates) > 1:
        raise SystemExit(f"{name}: runs of rates {', '.join(sorted(rates))}, and none to choose by")
    rate = f"{best_rate(choice, is_lower_better):g}" if choice else rates.pop()
    return [row for row in rows if row["rate"] == rate and not is_choice(int(row["seed"]))]


def group_rows(
    rows: list[Row], protocol: list[str], metric: str, is_lower_better: bool = False
) -> list[dict[str, list[Row]]]:
    """Sort the rows of a file by protocol and method, at the rate that the choice gives.

    Returns
    -------
    list of dict of str to list of dict
        For each protocol, the columns of which are named, the judged rows of each method by seed.
    """
    groups: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in rows:
        methods = groups.setdefault(tuple(row[name] for name in protocol), {})
        methods.setdefault(row["method"], []).append(row)
    found = []
    for methods in groups.values():
        chosen: dict[str, list[Row]] = {}
        for name in sorted(methods, key=lambda name: name != "full"):
            full = chosen["full"][0]["rate"] if chosen.get("full") else None
            of_method = _of_basis_rate(name, methods[name], full)
            judged = _of_best_rate(name, of_method, metric, is_lower_better)
            if judged:
                chosen[name] = sorted(judged, key=lambda row: int(row["seed"]))
        if chosen:
            found.append({name: chosen[name] for name in methods if name in chosen})
    return found
