# SPDX-License-Identifier: Apache-2.0
"""The share of the gradients' energy that leading vectors hold: measured, kept, described.

Energy is the squared Frobenius norm. What u_out holds and what u_in holds, each by itself, is known
from the sums of the basis phase. What both hold together, the r x r block that trains, is less, and
has to be measured on gradients. It falls as training goes on.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ...sparse import Basis
from .layer import SparseLayer, energy_of
from .settings import Kind, Settings


def _block_energy(basis: Basis, grad: Tensor) -> float:
    """Compute ||u_out G u_in^T||^2."""
    u_out, u_in = torch.from_numpy(basis.u_out), torch.from_numpy(basis.u_in)
    return energy_of(u_out @ grad.float() @ u_in.t())


def measure_last(kind: Kind, layers: Mapping[str, SparseLayer], step: int) -> None:
    """Measure the basis phase's last gradients, which the weights still have, on a new basis."""
    kind.block_shares = {}
    grads = [layers[name].weight.grad for name in kind.layers]
    grads = [grad for grad in grads if grad is not None]
    whole = sum(map(energy_of, grads))
    if whole > 0 and not kind.is_whole:
        kind.block_shares[step] = sum(_block_energy(kind.basis, grad) for grad in grads) / whole


def keep_measured(kinds: Iterable[Kind], layers: Mapping[str, SparseLayer], step: int) -> None:
    """Keep what layers have measured in a step."""
    for kind in kinds:
        pairs = [layers[name].energies for name in kind.layers]
        whole = sum(pair[1] for pair in pairs)
        if 0 < whole < math.inf:
            kind.block_shares[step] = sum(pair[0] for pair in pairs) / whole


def plan_measures(
    kinds: Iterable[Kind], layers: Mapping[str, SparseLayer], settings: Settings, step: int
) -> None:
    """Tell layers whether `step`, the next one, is one to measure in."""
    every = settings.measure_energy_every
    for kind in kinds:
        has_block = kind.basis is not None and not kind.is_whole
        for name in kind.layers:
            layers[name].measures = has_block and every is not None and step % every == 0


def describe(kind: Kind) -> list[str]:
    """Describe in lines what was measured, and nothing else."""
    lines = []
    if kind.basis is not None and not any(map(math.isnan, kind.shares)):
        lines.append(
            "    in the basis phase u_out alone holds {:.1%} of the energy, u_in alone"
            " {:.1%}".format(*kind.shares)
        )
    if kind.block_shares:
        ends = sorted({min(kind.block_shares), max(kind.block_shares)})
        lines += [f"    in step {n} both together hold {kind.block_shares[n]:.1%}" for n in ends]
    return lines
