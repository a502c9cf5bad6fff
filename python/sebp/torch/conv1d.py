# SPDX-License-Identifier: Apache-2.0
"""GPT-2's linear layer, whose weight is K x N. Imported only once transformers is."""

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from .._rules import Rule
from .layers import _sparse


class SebpConv1D(Conv1D):
    """A ``Conv1D`` of transformers whose backward works on active rows alone.

    Attributes
    ----------
    sebp_rule : Rule
        Which rows of dY to keep.
    """

    original_class = Conv1D
    sebp_rule = Rule()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ... x K."""
        return _sparse(x, self.weight, self.bias, self.sebp_rule, True)

    def __repr__(self) -> str:
        return f"SebpConv1D(nf={self.nf}, nx={self.nx}, rows={self.sebp_rule})"
