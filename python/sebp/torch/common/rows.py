# SPDX-License-Identifier: Apache-2.0
"""The active rows of gradients."""

from ..._rules import Rule
from ..._structs import Matrix
from ...core import Rows
from .context import context_of


def find_rows(dy: Matrix, rule: Rule) -> Rows:
    """Find the active rows of dY.

    They are found in each call, from what the memory holds then. An address, a shape and a version
    counter do not tell whether it has changed: NumPy, ``.data`` and what other processes send leave
    all three as they were.

    Parameters
    ----------
    dy : Matrix, M x N
        Made by :func:`~.tensors.matrix_of`.
    rule : Rule
        Which rows are active; not ``RULE_SAMPLED``, whose rows have weights.

    Returns
    -------
    Rows
        Of M.
    """
    return Rows.find(dy, rule, context_of(dy.memory))


def sample_rows(dy: Matrix, x: Matrix | None, rule: Rule, seed: int) -> Rows:
    """Draw a weighted sample of the rows of dY.

    Parameters
    ----------
    dy : Matrix, M x N
    x : Matrix, M x K, or None
        None: dY alone decides.
    rule : Rule
        Of the kind ``RULE_SAMPLED``.
    seed : int

    Returns
    -------
    Rows
        Of M, with weights for dW and db.
    """
    return Rows.sample(dy, rule.value, seed, x, context_of(dy.memory))
