# SPDX-License-Identifier: Apache-2.0
"""Values of options that comparisons of methods have."""

from collections.abc import Collection

from runs import is_choice


def choose_names(words: str, known: Collection[str], what: str) -> list[str]:
    """Read names with commas between them; raise SystemExit for others, or one twice."""
    names = words.split(",")
    for name in names:
        if name not in known:
            raise SystemExit(f"no {what} {name!r}; there are: {', '.join(known)}")
    if len(set(names)) < len(names):
        raise SystemExit(f"{words}: a {what} twice")
    return names


def read_rate(words: str) -> float:
    """Read a learning rate; raise ValueError unless it is between 0 and 1."""
    value = float(words)
    if not 0 < value < 1:
        raise ValueError
    return value


def read_rates(words: str) -> list[float]:
    """Read learning rates with commas between them."""
    return [read_rate(word) for word in words.split(",")]


def read_rates_of_methods(words: list[str], known: Collection[str]) -> dict[str, float]:
    """Read METHOD=X, each a word; raise ValueError unless X is a rate."""
    pairs = [word.partition("=") for word in words]
    if pairs:
        choose_names(",".join(name for name, _, _ in pairs), known, "method")
    return {name: read_rate(value) for name, _, value in pairs}


def read_count(words: str) -> int:
    """Read a number of at least 1; raise ValueError for others."""
    value = int(words)
    if value < 1:
        raise ValueError
    return value


def read_counts(words: str) -> list[int]:
    """Read such numbers with commas between them."""
    return [read_count(word) for word in words.split(",")]


def read_seeds(words: str) -> range:
    """Read N, the seeds 1 to N, or M-N; raise ValueError for others, and those of choices."""
    first, dash, last = words.rpartition("-")
    seeds = range(read_count(first) if dash else 1, read_count(last) + 1)
    if not seeds or is_choice(seeds[-1]):
        raise ValueError
    return seeds


# What argparse says that a value is not.
read_rate.__name__, read_rates.__name__ = "rate", "rates"
read_count.__name__, read_counts.__name__, read_seeds.__name__ = "count", "counts", "seeds"
