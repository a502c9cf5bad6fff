# SPDX-License-Identifier: Apache-2.0
"""Products that are added to a weight in place: SparseGrad's step, and LoRA's factors."""

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
