# SPDX-License-Identifier: Apache-2.0
"""What an adapter has of one layer: elements of its weight, and which weight they are for."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AdapterLayer:
    """Elements of a weight.

    Attributes
    ----------
    indices : int64 array, 2 x k
        Rows and columns, ascending: by rows, and by columns within a row.
    delta : Tensor, k
        float32: what is added to the elements of the base.
    values : Tensor, k, or None
        What the elements are with the adapter, of the weight's dtype. The sum of base and `delta`
        may differ from them by rounding. None: they are that sum.
    originals : Tensor, k, or None
        What they are in the base. None where the adapter was read from a file.
    shape : (int, int) or None
        The weight's. None where the file does not tell, as those of PEFT.
    digest : str or None
        That of the base's weight, by :func:`~.weight_bits.digest_of`. None likewise.
    is_linear : bool
        Whether the layer is an ``nn.Linear``, and no ``Conv1D``.
    """

    indices: NDArray[np.int64]
    delta: Tensor
    values: Tensor | None = None
    originals: Tensor | None = None
    shape: tuple[int, int] | None = None
    digest: str | None = None
    is_linear: bool = True

    @classmethod
    def of_values(
        cls,
        support: NDArray[np.int64],
        values: Tensor,
        originals: Tensor,
        shape: tuple[int, int],
        digest: str,
        is_linear: bool,
    ) -> "AdapterLayer":
        """Make one from what elements are and what they were.

        Parameters
        ----------
        support : int64 array, k
            row * columns + column, ascending.
        values, originals : Tensor, k
        shape, digest, is_linear
            As the attributes.
        """
        indices = np.stack(np.divmod(support, shape[1]))
        delta = (values.double() - originals.double()).float()
        return cls(indices, delta, values, originals, shape, digest, is_linear)

    def support(self, shape: tuple[int, int]) -> NDArray[np.int64]:
        """Return the elements of a weight of a shape: row * columns + column, ascending.

        Raises
        ------
        ValueError
            If the adapter is for another shape, or has elements beyond this one.
        """
        if self.shape is not None and tuple(self.shape) != tuple(shape):
            raise ValueError(f"is of {tuple(shape)}, but the adapter's of {tuple(self.shape)}")
        rows, cols = self.indices
        if rows.size and (rows.max() >= shape[0] or cols.max() >= shape[1]):
            raise ValueError(f"is of {tuple(shape)}, but the adapter has elements beyond that")
        return rows * shape[1] + cols

    def values_on(self, originals: Tensor) -> Tensor:
        """Return what the elements are on a base that has `originals` there.

        Raises
        ------
        ValueError
            If they are of another dtype, or one is not finite.
        """
        if self.values is not None:
            if self.values.dtype != originals.dtype:
                raise ValueError(
                    f"is of {originals.dtype}, but the adapter's of {self.values.dtype}"
                )
            return self.values
        values = (originals.float() + self.delta).to(originals.dtype)
        if not values.isfinite().all():
            raise ValueError("would hold a NaN or Inf")
        return values

    def check(self) -> None:
        """Raise ValueError unless it is valid by itself, as in a file."""
        rows, cols = self.indices
        if rows.size == 0:
            raise ValueError("has no elements")
        if rows.min() < 0 or cols.min() < 0:
            raise ValueError("has an index below 0")
        row_steps, col_steps = np.diff(rows), np.diff(cols)
        if not np.all((row_steps > 0) | ((row_steps == 0) & (col_steps > 0))):
            raise ValueError("has indices that are unsorted or repeated")
        held = [self.delta] if self.values is None else [self.delta, self.values]
        for one in held:
            if one.shape != (rows.size,):
                raise ValueError(f"has {rows.size} indices, but values of {tuple(one.shape)}")
            if not bool(one.isfinite().all()):
                raise ValueError("holds a NaN or Inf")
        if self.shape is not None:
            try:
                self.support(self.shape)
            except ValueError as error:
                raise ValueError(f"has a weight that {error}") from None
        if self.delta.dtype != torch.float32:
            raise ValueError(f"has differences of {self.delta.dtype}, not of float32")
