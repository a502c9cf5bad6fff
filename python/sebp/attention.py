# SPDX-License-Identifier: Apache-2.0
"""Attention over texts of different lengths, on NumPy arrays.

Arrays are as in :mod:`sebp.core`. Queries lie in M rows of H heads of D columns, keys and values in
M_k rows of kv_heads heads; :class:`Sequences` say which rows are a text's. ``attention.h`` tells
what is computed.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._library import load
from ._structs import AttentionOptionsStruct
from .core.calls import Handle, call
from .core.context import Context, default_context
from .core.matrices import Array, as_matrix, new_array
from .core.rows import whole_numbers

_SIZE = ctypes.sizeof(AttentionOptionsStruct)


class Sequences(Handle):
    """Where the texts of a batch lie among the rows of a matrix. Immutable.

    Made by :meth:`from_lengths`, :meth:`from_padded`, :meth:`from_mask` and :meth:`from_offsets`.
    """

    def __init__(self, pointer: ctypes.c_void_p) -> None:
        super().__init__(pointer, "sebp_sequences_destroy")

    @classmethod
    def _make(cls, constructor: str, *arguments: object) -> "Sequences":
        pointer = ctypes.c_void_p()
        call(constructor, *arguments, pointer)
        return cls(pointer)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int]) -> "Sequences":
        """Texts of these lengths, end to end."""
        array = whole_numbers(lengths, "lengths")
        return cls._make("sebp_sequences_from_lengths", array.ctypes.data, array.size)

    @classmethod
    def from_padded(cls, lengths: Sequence[int], sequence_length: int) -> "Sequences":
        """Texts padded on the right to `sequence_length` rows each."""
        array = whole_numbers(lengths, "lengths")
        return cls._make(
            "sebp_sequences_from_padded", array.ctypes.data, array.size, sequence_length
        )

    @classmethod
    def from_mask(cls, mask: ArrayLike) -> "Sequences":
        """Texts of the rows whose mask is not 0: texts x sequence_length, a run in each."""
        array = np.ascontiguousarray(np.asarray(mask) != 0).view(np.uint8)
        if array.ndim != 2:
            raise ValueError(f"mask has {array.ndim} dimensions, not 2")
        return cls._make("sebp_sequences_from_mask", array.ctypes.data, *array.shape)

    @classmethod
    def from_offsets(cls, offsets: Sequence[int]) -> "Sequences":
        """Texts that lie end to end, by their cumulative lengths (``cu_seqlens``), the first 0."""
        array = whole_numbers(offsets, "offsets")
        if array.size == 0:
            raise ValueError("offsets are empty; they begin with 0")
        return cls._make("sebp_sequences_from_offsets", array.ctypes.data, array.size - 1)

    @property
    def total(self) -> int:
        """M: among how many rows the texts lie."""
        return load().sebp_sequences_total(self)

    @property
    def max_length(self) -> int:
        """The length of the longest."""
        return load().sebp_sequences_max_length(self)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Their cumulative lengths: one more than there are texts, the first 0."""
        first = load().sebp_sequences_offsets(self)
        held = (ctypes.c_int64 * (len(self) + 1)).from_address(first)
        return np.array(held, dtype=np.int64)

    def __len__(self) -> int:
        """How many texts there are."""
        return load().sebp_sequences_count(self)


@dataclass(frozen=True)
class AttentionOptions:
    """What ``sebp_attention_options`` of attention.h has, under the same names."""

    heads: int = 1
    kv_heads: int = 0
    scale: float = 0.0
    softcap: float = 0.0
    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    dropout: float = 0.0
    seed: int = 0
    offset: int = 0

    def as_struct(self) -> AttentionOptionsStruct:
        """Give them as the library takes them."""
        return AttentionOptionsStruct(
            _SIZE,
            self.heads,
            self.kv_heads,
            self.scale,
            self.softcap,
            self.causal,
            self.window_left,
            self.window_right,
            self.dropout,
            self.seed,
            self.offset,
        )


def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    q_sequences: Sequences,
    k_sequences: Sequences | None = None,
    options: AttentionOptions = AttentionOptions(),
    bias: NDArray[np.float32] | None = None,
    context: Context | None = None,
) -> tuple[Array, NDArray[np.float32]]:
    """Attend: softmax(scale Q K^T + bias) V, text by text and head by head.

    Parameters
    ----------
    q : array, M x (heads D)
        float32, or uint16 that holds bfloat16; `k` and `v` as well.
    k, v : array, M_k x (kv_heads D)
    q_sequences, k_sequences : Sequences
        The texts among the rows of `q`, and of `k` and `v`; by default the same.
    options : AttentionOptions
    bias : float32 array, (heads L) x L_k or L x L_k, optional
    context : Context, optional

    Returns
    -------
    out : array, M x (heads D)
        Of the dtype of `q`; rows outside the texts are zero.
    lse : float32 array, M x heads
        What :func:`attention_backward` needs.

    Raises
    ------
    TypeError
        If a dtype is another.
    SebpError
        If shapes, dtypes, sequences or options do not go together.
    """
    context = context or default_context()
    vq, vk, vv = as_matrix(q, "q"), as_matrix(k, "k"), as_matrix(v, "v")
    vb = as_matrix(bias, "bias") if bias is not None else None
    out = new_array((vq.rows, vq.cols), like=vq)
    lse = np.empty((vq.rows, options.heads), np.float32)
    targets = as_matrix(out, "out"), as_matrix(lse, "lse")
    given = options.as_struct()
    context.call(
        "sebp_attention_forward", vq, vk, vv, vb, q_sequences, k_sequences, given, *targets
    )
    return out, lse


def attention_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: NDArray[np.float32],
    q_sequences: Sequences,
    k_sequences: Sequences | None = None,
    options: AttentionOptions = AttentionOptions(),
    bias: NDArray[np.float32] | None = None,
    context: Context | None = None,
) -> tuple[Array, Array, Array, NDArray[np.float32] | None]:
    """Differentiate :func:`attention_forward`.

    Parameters
    ----------
    dout : array, M x (heads D)
        The gradient of `out`.
    q, k, v, q_sequences, k_sequences, options, bias, context
        As the forward was given them.
    out, lse : array
        As the forward gave them.

    Returns
    -------
    dq, dk, dv : array
        Of the shapes of `q`, `k` and `v`, and of their dtype.
    dbias : float32 array or None
        Of the shape of `bias`; None without one.

    Raises
    ------
    TypeError, SebpError
        As :func:`attention_forward`.
    """
    context = context or default_context()
    inputs = [as_matrix(array, name) for array, name in ((q, "q"), (k, "k"), (v, "v"))]
    vd, vo, vl = as_matrix(dout, "dout"), as_matrix(out, "out"), as_matrix(lse, "lse")
    vb = as_matrix(bias, "bias") if bias is not None else None
    gradients = [new_array((view.rows, view.cols), like=view) for view in inputs]
    dbias = np.empty((vb.rows, vb.cols), np.float32) if vb is not None else None
    targets = [as_matrix(gradient, "gradient") for gradient in gradients]
    vdb = as_matrix(dbias, "dbias") if dbias is not None else None
    sequences = q_sequences, k_sequences
    given = options.as_struct()
    context.call(
        "sebp_attention_backward", vd, *inputs, vb, vo, vl, *sequences, given, *targets, vdb
    )
    return gradients[0], gradients[1], gradients[2], dbias
