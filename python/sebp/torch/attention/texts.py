# SPDX-License-Identifier: Apache-2.0
"""Where the texts of a batch lie, for attention: packed, padded, or with gaps.

A batch has B rows of L tokens. Attention sees B * L tokens in one list, of which each belongs to a
text or to none. Tokens of a text are in order; a text lies in one row, or texts lie end to end.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...attention import Sequences

Booleans = NDArray[np.bool_]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Side:
    """The texts among the queries, or among the keys and values.

    Attributes
    ----------
    shape : (int, int)
        B and L.
    tokens : int64 array
        Of all texts, one after the other: their indices among the B * L tokens.
    offsets : int64 array
        Where each text begins in `tokens`, and where the last one ends.
    sequences : Sequences
        The texts as the library takes them: among B * L rows, or where `rows` is not None, among
        the rows gathered.
    rows : Tensor of int64, or None
        `tokens`, where the library cannot be told where they lie: texts with gaps, and packed texts
        with padding. On the CPU, as all of this is.
    """

    shape: tuple[int, int]
    tokens: Integers
    offsets: Integers
    sequences: Sequences
    rows: Tensor | None = None

    @classmethod
    def of_rows(cls, batch: int, length: int) -> "Side":
        """Make B texts of L tokens."""
        return cls.of_lengths(np.full(batch, length, np.int64), (batch, length))

    @classmethod
    def of_lengths(cls, lengths: Integers, shape: tuple[int, int]) -> "Side":
        """Texts that lie end to end and have B * L tokens together."""
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        return cls(shape, np.arange(offsets[-1]), offsets, Sequences.from_lengths(lengths))

    @classmethod
    def of_mask(cls, mask: Booleans) -> "Side":
        """Make a text of the tokens of each row whose mask is True: B x L."""
        if mask.all():
            return cls.of_rows(*mask.shape)
        lengths = mask.sum(1, dtype=np.int64)
        # Rows whose mask changes twice at most, from 0 to 1 and back, hold one run.
        begins = (mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]).sum(1)
        if begins.max() > 1:
            return cls._gathered(mask, lengths)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        return cls(mask.shape, np.flatnonzero(mask), offsets, Sequences.from_mask(mask))

    @classmethod
    def of_segments(cls, segments: Integers) -> "Side":
        """Texts packed in rows: tokens of a row with one number are a text, 0 is none. B x L."""
        mask = segments > 0
        of_row = segments + np.arange(len(segments))[:, None] * (segments.max() + 1)
        numbers = of_row[mask]
        begins = np.flatnonzero(np.diff(numbers, prepend=-1))
        lengths = np.diff(begins, append=numbers.size)
        if mask.all():
            return cls.of_lengths(lengths, segments.shape)
        return cls._gathered(mask, lengths)

    @classmethod
    def of_numbers(cls, numbers: Integers, count: int) -> "Side":
        """Make texts of what :meth:`numbers` gives: B x L.

        Parameters
        ----------
        numbers : int64 array, B x L
        count : int
            How many texts there are; those that no token has are empty.
        """
        mask = numbers > 0
        lengths = np.bincount(numbers[mask], minlength=count + 1)[1:]
        if mask.all():
            return cls.of_lengths(lengths, numbers.shape)
        of_row = np.arange(1, len(numbers) + 1)[:, None]
        if count == len(numbers) and ((numbers == of_row) | ~mask).all():
            return cls.of_mask(mask)
        return cls._gathered(mask, lengths)

    def numbers(self) -> Tensor:
        """Give the number of each token's text: int64, B x L, from 1 on; 0 for none."""
        numbers = np.zeros(self.shape[0] * self.shape[1], np.int64)
        lengths = np.diff(self.offsets)
        numbers[self.tokens] = np.repeat(np.arange(1, lengths.size + 1), lengths)
        return torch.from_numpy(numbers.reshape(self.shape))

    def as_tensor(self) -> Tensor:
        """Say which tokens are a text as ``sebp::attention`` takes it, by `offsets` if they do."""
        is_whole = self.rows is None and self.tokens.size == self.shape[0] * self.shape[1]
        return torch.from_numpy(self.offsets) if is_whole else self.numbers()

    @classmethod
    def _gathered(cls, mask: Booleans, lengths: Integers) -> "Side":
        tokens = np.flatnonzero(mask)
        packed = cls.of_lengths(lengths, mask.shape)
        return cls(mask.shape, tokens, packed.offsets, packed.sequences, torch.from_numpy(tokens))

    @property
    def max_length(self) -> int:
        """The length of the longest text."""
        return int(np.diff(self.offsets).max(initial=0))

    def columns(self) -> list[tuple[int, Tensor]]:
        """Say for each text in which row it lies and which tokens of that row it has."""
        length = max(self.shape[1], 1)
        pieces = np.split(self.tokens, self.offsets[1:-1])
        return [
            (int(piece[0]) // length if piece.size else 0, torch.from_numpy(piece % length))
            for piece in pieces
        ]

    def begins_at_corner(self) -> bool:
        """Return whether each text has the first tokens of a row of its own, without gaps."""
        lengths = np.diff(self.offsets)
        at = np.arange(self.tokens.size) - np.repeat(self.offsets[:-1], lengths)
        return bool((self.tokens % max(self.shape[1], 1) == at).all())


@dataclass(frozen=True)
class Texts:
    """The texts of a batch: as many of keys as of queries, in one order."""

    queries: Side
    keys: Side

    @classmethod
    def of_rows(cls, batch: int, queries: int, keys: int) -> "Texts":
        """Make B texts of so many queries, and of so many keys."""
        side = Side.of_rows(batch, queries)
        return cls(side, side if queries == keys else Side.of_rows(batch, keys))

    @classmethod
    def of_lengths(cls, lengths: Integers) -> "Texts":
        """Texts that lie end to end in one row."""
        side = Side.of_lengths(lengths, (1, int(lengths.sum())))
        return cls(side, side)

    @classmethod
    def of_segments(cls, segments: Integers) -> "Texts":
        """Texts packed in rows (see :meth:`Side.of_segments`)."""
        side = Side.of_segments(segments)
        return cls(side, side)

    @classmethod
    def of_tensors(
        cls, queries: Tensor, keys: Tensor, shape: tuple[int, int], shape_k: tuple[int, int]
    ) -> "Texts":
        """Make what ``sebp::attention`` is told by `q_texts` and `k_texts`.

        Parameters
        ----------
        queries, keys : Tensor of int
            Cumulative lengths, or in two dimensions the number of each token's text.
        shape, shape_k : (int, int)
            B and L of the queries, and of the keys.

        Raises
        ------
        ValueError
            If they do not fit the shapes or each other.
        """
        told = [x.detach().cpu().numpy().astype(np.int64, copy=False) for x in (queries, keys)]
        shapes = tuple(shape), tuple(shape_k)
        counts = [x.size - 1 if x.ndim == 1 else int(x.max(initial=0)) for x in told]
        if all(x.ndim == 2 for x in told):
            counts.append(shapes[0][0])  # as rows have them; more texts without tokens do nothing
        sides = []
        for numbers, of in zip(told, shapes, strict=True):
            if numbers.ndim == 1:
                sides.append(Side.of_lengths(check_offsets(numbers, of, "texts"), of))
            elif numbers.shape != of:
                raise ValueError(f"the texts are told for {numbers.shape} tokens, but lie in {of}")
            else:
                sides.append(Side.of_numbers(numbers, max(counts)))
        return cls(*sides)

    @classmethod
    def of_masks(cls, queries: Booleans, keys: Booleans) -> "Texts":
        """Make a text of each row's tokens whose mask is True: B x L and B x L_k."""
        side = Side.of_mask(queries)
        same = queries is keys or np.array_equal(queries, keys)
        return cls(side, side if same else Side.of_mask(keys))


def check_offsets(offsets: Integers, shape: tuple[int, int], name: str) -> Integers:
    """Make lengths of the cumulative lengths of texts that lie end to end in B rows of L tokens.

    Raises
    ------
    ValueError
        If they are none, for so many tokens, or a text goes over the end of a row.
    """
    rows, length = shape
    lengths = np.diff(offsets)
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != rows * length or bool((lengths < 0).any()):
        raise ValueError(
            f"{name} goes from {first} to {last}, for {rows * length} tokens; it goes from 0 to"
            " their number and never falls"
        )
    if not np.isin(np.arange(1, rows) * length, offsets).all():
        raise ValueError(
            f"a text of {name} goes over the end of a row of {length} tokens: these are lengths of"
            " another sequence, or the batch is to be one row"
        )
    return lengths
