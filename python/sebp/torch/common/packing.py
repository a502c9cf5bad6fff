# SPDX-License-Identifier: Apache-2.0
"""Removes padding from a batch, and restores it.

A batch of B texts padded to L tokens goes through a model as one text of its T real tokens. Layers
that work token by token do not notice. The attention mask says where texts end: a :class:`Packing`
makes one of int64 that holds cumulative lengths, which no other code takes for a mask. As a mask it
also reaches what checkpointing computes again after the model has returned.
"""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Unfit(Exception):
    """A model does what it cannot do without padding; the message says what."""


class Packing:
    """Where the tokens of a packed batch come from.

    Texts are sorted by length, so that those of one length are adjacent.

    Attributes
    ----------
    mask : Tensor of bool, B x L
        Which tokens are real.
    rows : Tensor of int64, T
        The tokens' indices in the padded batch, of B * L tokens.
    side : "right", "left", "around" or "gaps"
        Where the padding is: after all texts, before all, both, or between tokens of a text.
    edges : (bool, bool)
        Whether the first tokens of all rows are real, and the last ones: they may be pooled.
    tokens : Tensor, B x L, or None
        The tokens with padding, if they are known.
    has_several : bool
        Whether there is more than one text with tokens.
    attention_mask : Tensor of int64, 1 x 1 x 1 x (texts + 1)
        Cumulative lengths of the texts that have tokens. On the CPU, where each layer reads them.
    may_cut : bool
        Whether a text is longer than the window of attention that the configuration names.
    """

    def __init__(
        self, mask: Tensor, window: int | None = None, tokens: Tensor | None = None
    ) -> None:
        self.mask = mask != 0
        self.tokens = tokens
        lengths, order = self.mask.sum(1).sort(stable=True)
        text, token = self.mask[order].nonzero(as_tuple=True)
        self.rows = order[text] * mask.shape[1] + token
        self.side = self._side()
        self.edges = bool(self.mask[:, 0].all()), bool(self.mask[:, -1].all())
        ends = lengths[lengths > 0].cumsum(0).cpu()
        self.attention_mask = torch.cat([ends.new_zeros(1), ends]).view(1, 1, 1, -1)
        self.has_several = ends.numel() > 1
        self.may_cut = window is not None and int(lengths[-1]) > window

    def _side(self) -> str:
        """Return where the padding is."""
        ends, begins = self.mask[:, :-1] > self.mask[:, 1:], self.mask[:, :-1] < self.mask[:, 1:]
        if not bool(begins.any()):
            return "right"
        if not bool(ends.any()):
            return "left"
        is_whole = begins.sum(1) + self.mask[:, 0] <= 1
        return "around" if bool(is_whole.all()) else "gaps"

    def counts(self, x: Tensor) -> bool:
        """Return whether x is 1 x T x ...; work is then counted for the whole batch."""
        return x.dim() == 3 and x.shape[0] == 1 and x.shape[1] == self.rows.numel()

    def pack(self, x: Tensor) -> Tensor:
        """Take the real tokens of B x L x ... as 1 x T x ..., or of 1 x L for all texts."""
        x = x.expand(*self.mask.shape, *x.shape[2:]).flatten(0, 1)
        return x.index_select(0, self.rows)[None]

    def pad(self, x: Tensor, fill: Tensor) -> Tensor:
        """Turn 1 x T x H into B x L x H, with `fill`, 1 x H or B * L x H, at padded tokens.

        Its backward raises a RuntimeError where a padded token has a gradient.
        """
        return _Pad.apply(x, self, fill)


_CAUSES = """\
The model did not compute them. What is likely:
- labels at padded tokens: they have to be -100;
- texts padded on the left: the first token of each is predicted from a padded one. Label it -100
  too, or pad on the right;
- a loss over all tokens (a question-answering head's softmax, a mean over the text) that does not
  leave padded ones out;
- a head that reads a padded token: the first of a text padded on the left, or the last of one
  padded on the right;
- a hook that changes gradients.
remove_padding_free(model) trains the model as it is."""


class _Pad(torch.autograd.Function):
    """Turns 1 x T x H into B x L x H."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, packing: Packing, fill: Tensor
    ) -> Tensor:
        ctx.packing = packing
        texts, length = packing.mask.shape
        # No view: what follows may change it in place.
        y = x.new_empty(texts, length, x.shape[2])
        y.view(texts * length, -1).copy_(fill).index_copy_(0, packing.rows, x[0])
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple:
        packing = ctx.packing
        dy = dy.reshape(-1, dy.shape[-1])
        dx = dy.index_select(0, packing.rows)
        padded = (~packing.mask).flatten().nonzero()[:, 0]
        wrong = padded[dy.detach().index_select(0, padded).ne(0).any(1)]
        # Where training has diverged, NaN is everywhere and says nothing about what was read.
        if wrong.numel() > 0 and bool(dx.detach().isfinite().all()):
            text, token = divmod(int(wrong[0]), packing.mask.shape[1])
            raise RuntimeError(
                f"sebp: {wrong.numel()} tokens that attention_mask leaves out have a gradient (the"
                f" first is token {token} of text {text}). {_CAUSES}"
            )
        return dx[None], None, None


def lengths_of(attention_mask: Tensor | None) -> list[int] | None:
    """Read the lengths of packed texts from the mask that attention gets.

    Parameters
    ----------
    attention_mask : Tensor or None
        :attr:`Packing.attention_mask`, or anything else.

    Returns
    -------
    list of int or None
        None if it is any other mask, one of integers that are 0 and 1 too.
    """
    if (
        attention_mask is None
        or attention_mask.dtype != torch.int64
        or attention_mask.dim() != 4
        or attention_mask.shape[:3] != (1, 1, 1)
    ):
        return None
    ends = attention_mask.flatten().tolist()
    lengths = [end - begin for begin, end in itertools.pairwise(ends)]
    is_packing = ends[:1] == [0] and all(length > 0 for length in lengths)
    return lengths if is_packing else None


# --------------------------------------------------------------------------------------------------
# The packing that the calling thread computes on


class _OfThread(threading.local):
    packing: Packing | None = None


_of_thread = _OfThread()


@contextmanager
def packed(packing: Packing) -> Iterator[None]:
    """Note that this thread computes on a packed batch, within a ``with``."""
    outer, _of_thread.packing = _of_thread.packing, packing
    try:
        yield
    finally:
        _of_thread.packing = outer


def current_packing() -> Packing | None:
    """Return the packing that the calling thread computes on, or None."""
    return _of_thread.packing
