# SPDX-License-Identifier: Apache-2.0
"""Changes some texts of a batch, to see whether the others notice."""

import torch
from torch import Tensor

_TOKENS = ("input_ids", "inputs_embeds")


def stirred_texts(mask: Tensor) -> Tensor:
    """Choose every other text, in the order in which a packed batch has them.

    So each of the others has a changed one before it.

    Parameters
    ----------
    mask : Tensor of bool, B x L
        Which tokens are real.

    Returns
    -------
    Tensor of bool, B
    """
    lengths, order = mask.sum(1).sort(stable=True)
    order = order[lengths > 0]
    chosen = torch.zeros(mask.shape[0], dtype=torch.bool, device=mask.device)
    chosen[order[::2]] = True
    return chosen


def stir(given: dict[str, object]) -> dict[str, object]:
    """Let the tokens of the chosen texts change places within each text.

    Parameters
    ----------
    given : dict of str to object
        The arguments of a base model.

    Returns
    -------
    dict of str to object
        The same with other tokens or embeddings; the same object where there is no mask, B x L.
    """
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return given
    mask = mask != 0
    result = dict(given)
    for name in _TOKENS:
        value = given.get(name)
        if isinstance(value, Tensor) and value.shape[:2] == mask.shape:
            value = value.detach().clone()
            for text in stirred_texts(mask).nonzero()[:, 0].tolist():
                value[text, mask[text]] = value[text, mask[text]].roll(1, 0)
            result[name] = value
    return result
