# SPDX-License-Identifier: Apache-2.0
"""What is added to a weight in place: SparseGrad's step, LoRA's factors, sums in bf16."""

import ctypes

from .._structs import StochasticOptions
from ..core.context import Context, default_context
from ..core.matrices import ArrayOrMatrix, as_matrix, as_target
from .bases import Basis
from .elements import Sparse


def sparsegrad_update(
    basis: Basis, s: Sparse, w: ArrayOrMatrix, context: Context | None = None
) -> None:
    """Compute W += u_out^T S u_in, in place.

    Parameters
    ----------
    basis : Basis
        Of N x K.
    s : Sparse, r_out x r_in
    w : array or Matrix, N x K
        Either dtype.
    context : Context, optional
        Default: the calling thread's own.

    Raises
    ------
    SebpError
        If shapes do not go together, or S is not valid or holds a NaN or Inf.
    ValueError
        If `w` cannot be written to in place.
    """
    context = context or default_context()
    context.call("sebp_sparsegrad_update", basis, s.struct(), as_target(w, "w"))


def lora_merge(
    a: ArrayOrMatrix,
    b: ArrayOrMatrix,
    scale: float,
    w: ArrayOrMatrix,
    context: Context | None = None,
) -> None:
    """Compute W += scale (A B)^T, in place.

    Parameters
    ----------
    a : array or Matrix, K x r
    b : array or Matrix, r x N
    scale : float
        alpha / r.
    w : array or Matrix, N x K
    context : Context, optional
        Default: the calling thread's own.

    Raises
    ------
    SebpError
        If shapes do not go together, or `scale` is not finite.
    ValueError
        If `w` cannot be written to in place.
    """
    context = context or default_context()
    v_a, v_b, v_w = as_matrix(a, "a"), as_matrix(b, "b"), as_target(w, "w")
    context.call("sebp_lora_merge", v_a, v_b, scale, v_w)


def stochastic_add(
    d: ArrayOrMatrix | None,
    w: ArrayOrMatrix,
    *,
    seed: int,
    offset: int,
    decay: float = 0.0,
    context: Context | None = None,
) -> None:
    """Compute W <- (1 - decay) W + D in place, by stochastic rounding to bf16.

    The mean of what an element becomes is the sum itself as float32 has it, so steps that rounding
    to nearest would lose move W in the mean. What float32 loses stays lost: 1 - `decay` is one of
    multiples of 2^-24.

    Parameters
    ----------
    d : float32 array or Matrix, N x K, or None
        None: 0.
    w : Matrix of bf16, N x K
    seed, offset : int
        From 0 to 2^64 - 1: of the random numbers. No two calls of a run have both alike.
    decay : float, default 0
        From 0 to 1.
    context : Context, optional
        Default: the calling thread's own.

    Raises
    ------
    SebpError
        If shapes or dtypes are others, `decay` is out of range, or D holds a NaN or Inf. W is as it
        was then.
    ValueError
        If `w` cannot be written to in place, or `seed` or `offset` is out of range.
    """
    context = context or default_context()
    for name, value in (("seed", seed), ("offset", offset)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} is {value}, not from 0 to 2^64 - 1")
    options = StochasticOptions(ctypes.sizeof(StochasticOptions), seed, offset, decay)
    v_d = None if d is None else as_matrix(d, "d")
    context.call("sebp_stochastic_add", v_d, options, as_target(w, "w"))
