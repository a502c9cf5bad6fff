# SPDX-License-Identifier: Apache-2.0
"""Seeds of dropout and of samples of rows."""

import torch
from torch import Tensor


def draw_seed() -> Tensor:
    """Draw a seed from PyTorch's default generator: an int64, which a graph can hold.

    It is that of the CPU for tensors on GPUs too, so that nothing has to wait for them.
    ``torch.manual_seed`` makes what is drawn repeatable, and so does checkpointing, which restores
    the generator before it computes a forward again.

    Returns
    -------
    Tensor, 1
    """
    return torch.randint(2**63 - 1, (1,), device="cpu")
