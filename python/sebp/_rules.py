# SPDX-License-Identifier: Apache-2.0
"""Row rules, as users write them and as the library takes them."""

import functools
import operator
from typing import NamedTuple, SupportsIndex

from ._structs import (
    RULE_ENERGY,
    RULE_NONZERO,
    RULE_SAMPLED,
    RULE_THRESHOLD,
    RULE_TOP,
    RuleStruct,
)

RowRule = str | SupportsIndex | tuple[str, float]


class Rule(NamedTuple):
    """Which rows of dY to keep.

    Attributes
    ----------
    kind : int
        One of ``RULE_NONZERO``, ``RULE_THRESHOLD``, ``RULE_TOP``, ``RULE_ENERGY`` and
        ``RULE_SAMPLED``.
    value : float
        The threshold, the number of rows, delta, or the share; 0 for ``RULE_NONZERO``.
    """

    kind: int = RULE_NONZERO
    value: float = 0.0

    @functools.lru_cache(maxsize=64)  # noqa: B019, keeps tuples of two numbers alive
    def struct(self, seed: int = 0) -> RuleStruct:
        """Write the rule as the library takes it.

        Parameters
        ----------
        seed : int
            In [0, 2^64). Of ``RULE_SAMPLED``; others have none.

        Returns
        -------
        RuleStruct
            A ``sebp_rule``. Others get the same one, so it is not to be changed.

        Raises
        ------
        ValueError
            If there is no such seed.
        """
        made = RuleStruct(self.kind)
        if self.kind == RULE_THRESHOLD:
            made.threshold = self.value
        elif self.kind == RULE_TOP:
            made.count = int(self.value)
        elif self.kind == RULE_ENERGY:
            made.delta = self.value
        elif self.kind == RULE_SAMPLED:
            if not 0 <= seed < 2**64:
                raise ValueError(f"seed is {seed}, not in [0, 2^64)")
            made.seed, made.share = seed, self.value
        return made

    def __deepcopy__(self, memo: dict) -> "Rule":
        """Give a copied layer the same rule, so that what has put it in knows the layer."""
        return self

    def __str__(self) -> str:
        """Write the rule as a user would."""
        if self.kind == RULE_TOP:
            return str(int(self.value))
        if self.kind == RULE_NONZERO:
            return "nonzero"
        return f"{_NAMES[self.kind]} {self.value:g}"


_NAMES = {RULE_THRESHOLD: "threshold", RULE_ENERGY: "energy", RULE_SAMPLED: "sampled"}


def parse_rule(rows: RowRule) -> Rule:
    """Read a rule.

    Parameters
    ----------
    rows : "nonzero", int, ("threshold", float), ("energy", float) or ("sampled", float)
        Rows that are not all zero (exact); the k rows of largest norm; rows with a magnitude over a
        threshold; the fewest rows that hold a share 1 - delta of the energy; a weighted sample of a
        share of the active rows.

    Returns
    -------
    Rule
        The rule.

    Raises
    ------
    TypeError
        If `rows` is none of these.
    ValueError
        If k < 1, the threshold is negative or NaN, delta is outside [0, 1), or the share outside
        (0, 1].
    """
    if isinstance(rows, Rule):
        return rows
    if isinstance(rows, str):
        if rows == "nonzero":
            return Rule()
        raise ValueError(f'rows is "{rows}", not "nonzero", a number of rows or a pair')
    if isinstance(rows, tuple) and len(rows) == 2:
        name, value = rows[0], float(rows[1])
        if name == "threshold":
            if not value >= 0:
                raise ValueError(f"the threshold is {value}, not 0 or more")
            return Rule(RULE_THRESHOLD, value)
        if name == "energy":
            if not 0 <= value < 1:
                raise ValueError(f"delta is {value}, not in [0, 1)")
            return Rule(RULE_ENERGY, value)
        if name == "sampled":
            if not 0 < value <= 1:
                raise ValueError(f"the share is {value}, not in (0, 1]")
            return Rule(RULE_SAMPLED, value)
        raise ValueError(
            f'rows is {rows!r}, not ("threshold", eps), ("energy", delta) or ("sampled", share)'
        )
    if isinstance(rows, bool) or not hasattr(rows, "__index__"):
        raise TypeError(f"rows is {rows!r}, not a rule")
    count = operator.index(rows)
    if count < 1:
        raise ValueError(f"rows is {count}, but at least 1 row must be kept")
    return Rule(RULE_TOP, float(count))
