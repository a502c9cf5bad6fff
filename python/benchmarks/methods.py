# SPDX-License-Identifier: Apache-2.0
"""Ways to train a model's feed-forward weights, at equal numbers of trained elements.

All else, from embeddings to biases, trains alike in each: by AdamW without weight decay. The
feed-forward weights, N x K:

- full: all elements, by AdamW too;
- lora: frozen, with a product of K x r and r x N that trains, r (K + N) elements, times 1;
- meprop: the k = r (K + N) largest elements of each gradient, chosen anew in each step;
- sparsegrad: the same number in bases made from the gradients of the first steps, in which all
  elements train; all vectors of the bases, elements chosen anew in each step, as in the paper;
- sparsegrad-leading-fixed: the leading vectors of the bases alone, and after some more steps the
  elements stay the same;
- sparsegrad-leading: the leading vectors, elements chosen anew;
- sparsegrad-fixed: all vectors, elements that stay the same;
- pytorch: full, by PyTorch alone and with padding: how long a step takes as it is.
"""

from dataclasses import dataclass, field

import torch
from common import take_padding_out
from torch import nn

import sebp
from sebp.sparse import Basis
from sebp.torch import SparseOptimizer
from sebp.torch.apply.feed_forward import choose_layers


@dataclass(frozen=True)
class Method:
    """One of the ways above.

    Attributes
    ----------
    kind : {"full", "lora", "meprop", "sparsegrad"}
    leading : bool
        Leading vectors of the bases alone.
    fixed : bool
        Elements stay the same after a while.
    plain : bool
        PyTorch alone.
    """

    kind: str
    leading: bool = False
    fixed: bool = False
    plain: bool = False


METHODS = {
    "full": Method("full"),
    "lora": Method("lora"),
    "meprop": Method("meprop"),
    "sparsegrad": Method("sparsegrad"),
    "sparsegrad-leading-fixed": Method("sparsegrad", leading=True, fixed=True),
    "sparsegrad-leading": Method("sparsegrad", leading=True),
    "sparsegrad-fixed": Method("sparsegrad", fixed=True),
    "pytorch": Method("full", plain=True),
}


@dataclass(frozen=True)
class Sizes:
    """How much is trained, the same for every method.

    Attributes
    ----------
    rank : int
        LoRA's r.
    leading : int
        How many vectors of each side of a basis are the leading ones.
    basis_steps : int
        From whose gradients bases are made.
    fix_after : int
        Steps in the bases' space after which elements stay the same.
    """

    rank: int
    leading: int
    basis_steps: int = 30
    fix_after: int = 100


@dataclass
class Share:
    """What the training of the feed-forward weights takes.

    Attributes
    ----------
    elements : int
        That are trained.
    gradient, state, bases, scratch : int
        Bytes, as :class:`sebp.torch.sparse.optimizer.SparseBytes` counts them.
    energy : list of (float, float)
        The shares of the gradients' energy in the two sides of each basis.
    """

    elements: int
    gradient: int
    state: int
    bases: int = 0
    scratch: int = 0
    energy: list[tuple[float, float]] = field(default_factory=list)


def elements_of_layer(model: nn.Module, rank: int) -> int:
    """Return the number of elements that are trained of each layer, r (K + N)."""
    counts = {rank * sum(module.weight.shape) for _, module in choose_layers(model, None)}
    if len(counts) > 1:
        raise SystemExit(f"layers of different sizes would have {sorted(counts)} elements trained")
    return counts.pop()


class Training:
    """A model that is trained by a method.

    Attributes
    ----------
    model : nn.Module
        The model, changed in place.
    optimizer : torch.optim.Optimizer
        Which takes the steps.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        rate: float,
        sizes: Sizes,
        bases: dict[str, Basis] | None = None,
    ) -> None:
        """Begin.

        Parameters
        ----------
        name : str
            Of the method.
        model : nn.Module
            To be trained.
        rate : float
            The learning rate.
        sizes : Sizes
            How much is trained.
        bases : dict of str to Basis, optional
            SparseGrad's; without, it begins with full training.
        """
        method = METHODS[name]
        self.model = model
        self._method = method
        self._weights = [module.weight for _, module in choose_layers(model, None)]
        self._k = k = elements_of_layer(model, sizes.rank)
        if method.kind == "lora":
            sebp.apply_lora_to_model(model, sizes.rank)
        if not method.plain:
            take_padding_out(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        adamw = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
        self.optimizer: torch.optim.Optimizer = adamw
        fix_after = sizes.fix_after if method.fixed else None
        if method.kind == "meprop":
            self.optimizer = sebp.apply_meprop_to_model(
                model, adamw, k, fix_support_after=fix_after
            )
        elif method.kind == "sparsegrad":
            self.optimizer = sebp.apply_sparsegrad_to_model(
                model,
                adamw,
                k,
                sizes.basis_steps,
                sizes.leading if method.leading else None,
                bases=bases,
                fix_support_after=fix_after,
            )

    def share(self) -> Share:
        """Count what the training of the feed-forward weights takes now."""
        if isinstance(self.optimizer, SparseOptimizer):
            kinds = self.optimizer.kinds
            elements = self._k * len(self._weights)
            return Share(elements, *self.optimizer.bytes(), [kind.shares for kind in kinds])
        if self._method.kind == "lora":
            names = (".lora_a", ".lora_b")
            trained = [p for name, p in self.model.named_parameters() if name.endswith(names)]
        else:
            trained = self._weights
        state = self.optimizer.state
        return Share(
            sum(p.numel() for p in trained),
            sum(p.nbytes for p in trained),
            sum(t.nbytes for p in trained for t in state.get(p, {}).values()),
        )

    def finish(self) -> nn.Module:
        """Return the trained model as an ordinary one."""
        if isinstance(self.optimizer, SparseOptimizer):
            self.optimizer.release()
        if self._method.kind == "lora":
            sebp.merge_lora(self.model)
        return self.model
