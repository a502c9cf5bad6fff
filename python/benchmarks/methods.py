# SPDX-License-Identifier: Apache-2.0
"""Ways to train a model's feed-forward weights, at equal numbers of trained elements.

What else trains is a choice (:func:`choose_trained`) and trains alike in each: by AdamW without
weight decay. The feed-forward weights, N x K:

- full: all elements, by AdamW too;
- lora: frozen, with a product of K x r and r x N that trains, r (K + N) elements, times 1;
- meprop: the k = r (K + N) largest elements of each gradient, chosen anew in each step;
- sparsegrad: the same number in bases made from the gradients of the first steps, in which all
  elements train; all vectors of the bases, elements chosen anew in each step, as in the paper;
- sparsegrad-leading-fixed: the leading vectors of the bases alone, and after some more steps the
  elements stay the same;
- frozen: not at all. What the rest of the model learns alone;
- full-then-frozen: all elements for as many steps as SparseGrad's basis phase has, then none. What
  that phase does alone;
- mask-random, mask-gradient, mask-magnitude: k elements of each weight that never change: drawn
  by the run's seed; those of the largest gradient of the first step, in which these weights stand
  still; or of the largest magnitude;
- galore: all elements, by moments of k / max(N, K) projections of each gradient, onto its leading
  singular vectors of every 50th step;
- sparsegrad-leading: the leading vectors, elements chosen anew;
- sparsegrad-fixed: all vectors, elements that stay the same;
- pytorch: full, by PyTorch alone and with padding: how long a step takes as it is;
- pytorch-trimmed: the same, on batches that are trimmed to their longest text.

To add a method: derive a class from :class:`Method` that overrides what differs, mostly `optimize`
alone; from :class:`Sparse` where it has an optimizer like :class:`sebp.torch.SparseOptimizer`. Name
it in :data:`METHODS`, and say above what it is.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from common import Batch, Mode, Times, take_padding_out, take_step
from torch import nn

import sebp
from sebp import SebpError
from sebp.sparse import NONFINITE, Basis
from sebp.torch.apply.feed_forward import choose_layers


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
    train : str
        What trains, as :func:`choose_trained` takes it.
    """

    rank: int
    leading: int
    basis_steps: int = 30
    fix_after: int = 100
    train: str = "all"


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


@dataclass(frozen=True)
class Given:
    """What a method makes its optimizer of.

    Attributes
    ----------
    model : nn.Module
        To be trained.
    adamw : torch.optim.AdamW
        Of all its parameters that train.
    weights : list of nn.Parameter
        Of the feed-forward layers.
    k : int
        How many elements of each of them train.
    sizes : Sizes
        How much is trained.
    bases : dict of str to Basis or None
        SparseGrad's, where they are given.
    seed : int
        Of what a method draws.
    """

    model: nn.Module
    adamw: torch.optim.AdamW
    weights: list[nn.Parameter]
    k: int
    sizes: Sizes
    bases: dict[str, Basis] | None
    seed: int


# --------------------------------------------------------------------------------------------------
# The methods


class Method:
    """A way to train; this one is full training, and others override what differs.

    Attributes
    ----------
    plain : bool
        PyTorch alone, padding and all.
    trims : bool
        Batches are trimmed to their longest text.
    has_basis_phase : bool
        Whether it begins with `Sizes.basis_steps` steps of full training, which may have a learning
        rate of their own.
    """

    plain = False
    trims = False
    has_basis_phase = False

    def change(self, model: nn.Module, sizes: Sizes) -> None:
        """Change the model, or which of its parameters train, before AdamW is made."""

    def optimize(self, given: Given) -> torch.optim.Optimizer:
        """Make the optimizer that takes the steps."""
        return given.adamw

    def warm_up(self, sizes: Sizes) -> int:
        """Return after how many steps all others are alike."""
        return 0

    def goes_on(self, given: Given) -> bool:
        """Return whether a step would change the model."""
        return True

    def share(self, given: Given, optimizer: torch.optim.Optimizer) -> Share:
        """Count what the training of the feed-forward weights takes now."""
        return share_of(given.weights, optimizer)

    def finish(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Make the trained model an ordinary one."""


class PyTorch(Method):
    """Full training by PyTorch alone.

    Parameters
    ----------
    trims : bool
        Whether batches are trimmed.
    """

    plain = True

    def __init__(self, trims: bool = False) -> None:
        self.trims = trims


class Lora(Method):
    """Frozen weights with products of low rank beside them."""

    def change(self, model: nn.Module, sizes: Sizes) -> None:
        """Freeze the weights and put the products beside them."""
        sebp.apply_lora_to_model(model, sizes.rank)

    def share(self, given: Given, optimizer: torch.optim.Optimizer) -> Share:
        """Count the products' factors."""
        names = (".lora_a", ".lora_b")
        factors = [p for name, p in given.model.named_parameters() if name.endswith(names)]
        return share_of(factors, optimizer)

    def finish(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Add the products to the weights."""
        sebp.merge_lora(model)


class Frozen(Method):
    """Weights that do not train."""

    def change(self, model: nn.Module, sizes: Sizes) -> None:
        """Freeze them."""
        for _, module in choose_layers(model, None):
            module.weight.requires_grad_(False)


class FullThenFrozen(Method):
    """Weights that train in full for the steps of a basis phase, and no more."""

    has_basis_phase = True

    def optimize(self, given: Given) -> torch.optim.Optimizer:
        """Let AdamW freeze the weights after its step of that number."""
        steps = 0

        def count(adamw: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
            nonlocal steps
            steps += 1
            if steps == given.sizes.basis_steps:
                for weight in given.weights:
                    weight.requires_grad_(False)
                    weight.grad = None
                    adamw.state.pop(weight, None)

        given.adamw.register_step_post_hook(count)
        return given.adamw

    def warm_up(self, sizes: Sizes) -> int:
        """Return the steps of full training."""
        return sizes.basis_steps

    def goes_on(self, given: Given) -> bool:
        """Return whether these steps are to come, or something else trains."""
        return any(p.requires_grad for p in given.model.parameters())


class Sparse(Method):
    """Few elements of each weight.

    Parameters
    ----------
    leading : bool
        Leading vectors of the bases alone.
    fixed : bool
        Elements stay the same after a while.
    """

    def __init__(self, leading: bool = False, fixed: bool = False) -> None:
        self._leading, self._fixed = leading, fixed

    def fix_after(self, sizes: Sizes) -> int | None:
        """Return after how many steps on few elements these stay the same; None: never."""
        return sizes.fix_after if self._fixed else None

    def leading(self, sizes: Sizes) -> int | None:
        """Return how many vectors each side of a basis has; None: all."""
        return sizes.leading if self._leading else None

    def warm_up(self, sizes: Sizes) -> int:
        """Return the same for all: fixed elements or not, they are compared after as many steps."""
        return sizes.fix_after

    def share(self, given: Given, optimizer: torch.optim.Optimizer) -> Share:
        """Count by the optimizer's own account."""
        energy = [kind.shares for kind in optimizer.kinds]
        return Share(given.k * len(given.weights), *optimizer.bytes(), energy)

    def finish(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Restore the layers."""
        optimizer.release()


class MeProp(Sparse):
    """The largest elements of each gradient."""

    def optimize(self, given: Given) -> torch.optim.Optimizer:
        """Put MeProp into the layers."""
        fix_after = self.fix_after(given.sizes)
        return sebp.apply_meprop_to_model(
            given.model, given.adamw, given.k, fix_support_after=fix_after
        )


class SparseGrad(Sparse):
    """The largest elements in bases of the gradients."""

    has_basis_phase = True

    def warm_up(self, sizes: Sizes) -> int:
        """Return the steps of the basis phase and as many as MeProp has."""
        return sizes.basis_steps + sizes.fix_after

    def optimize(self, given: Given) -> torch.optim.Optimizer:
        """Put SparseGrad into the layers."""
        return sebp.apply_sparsegrad_to_model(
            given.model,
            given.adamw,
            given.k,
            given.sizes.basis_steps,
            self.leading(given.sizes),
            bases=given.bases,
            fix_support_after=self.fix_after(given.sizes),
            basis_rate_factor=1.0,  # the rate of these steps is chosen, as full's is
        )


class Mask(Sparse):
    """Elements that never change.

    Parameters
    ----------
    mask : str
        Which, as :func:`sebp.apply_sparse_mask_to_model` takes it.
    """

    def __init__(self, mask: str) -> None:
        super().__init__(fixed=True)
        self._mask = mask

    def warm_up(self, sizes: Sizes) -> int:
        """Return the step by whose gradient elements are chosen."""
        return 1 if self._mask == "gradient" else 0

    def optimize(self, given: Given) -> torch.optim.Optimizer:
        """Choose the elements."""
        return sebp.apply_sparse_mask_to_model(
            given.model, given.adamw, given.k, self._mask, seed=given.seed
        )


class Galore(Sparse):
    """Gradients that are projected onto their leading singular vectors."""

    def optimize(self, given: Given) -> torch.optim.Optimizer:
        """Put GaLore into the layers, with moments of no more than k elements each."""
        rank = max(1, given.k // max(given.weights[0].shape))
        return sebp.apply_galore_to_model(
            given.model, given.adamw, rank, refresh_every=GALORE_REFRESH
        )

    def warm_up(self, sizes: Sizes) -> int:
        """Return the step in which the first vectors are chosen."""
        return 1


GALORE_REFRESH = 50  # steps from one choice of vectors to the next

METHODS = {
    "full": Method(),
    "lora": Lora(),
    "meprop": MeProp(),
    "sparsegrad": SparseGrad(),
    "sparsegrad-leading-fixed": SparseGrad(leading=True, fixed=True),
    "frozen": Frozen(),
    "full-then-frozen": FullThenFrozen(),
    "mask-random": Mask("random"),
    "mask-gradient": Mask("gradient"),
    "galore": Galore(),
    "mask-magnitude": Mask("magnitude"),
    "sparsegrad-leading": SparseGrad(leading=True),
    "sparsegrad-fixed": SparseGrad(fixed=True),
    "pytorch": PyTorch(),
    "pytorch-trimmed": PyTorch(trims=True),
}
DEFAULT = list(METHODS)[: list(METHODS).index("galore") + 1]


# --------------------------------------------------------------------------------------------------
# Training


def check_parts(parts: str) -> None:
    """Raise ValueError unless these are parts that :func:`choose_trained` takes."""
    chosen = set(parts.split(","))
    if chosen != {"all"} and chosen not in ({"feed-forward"}, {"feed-forward", "head"}):
        raise ValueError(f"{parts!r}: what trains is all, or feed-forward, or feed-forward,head")


def choose_trained(model: nn.Module, parts: str) -> None:
    """Freeze all parameters but those of some parts.

    Parameters
    ----------
    model : nn.Module
        Of transformers, with or without a head.
    parts : str
        "all"; or "feed-forward", the weights of these layers, and after a comma, if wanted, "head",
        which is all that comes after the blocks: a pooling layer and what classifies.

    Raises
    ------
    ValueError
        For other parts, or if there is no head. No parameter has changed.
    """
    check_parts(parts)
    chosen = parts.split(",")
    if "all" in chosen:
        return
    trained = {id(module.weight) for _, module in choose_layers(model, None)}
    if "head" in chosen:
        body = {id(p) for p in model.base_model.parameters()}
        pooler = getattr(model.base_model, "pooler", None)
        body -= {id(p) for p in pooler.parameters()} if pooler is not None else set()
        head = {id(p) for p in model.parameters()} - body
        if not head:
            raise ValueError(f"{type(model).__name__} has no head to train")
        trained |= head
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def share_of(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Share:
    """Count what the training of parameters takes that an optimizer of PyTorch trains."""
    trained = [p for p in parameters if p.requires_grad]
    return Share(
        sum(p.numel() for p in trained),
        sum(p.nbytes for p in trained),
        sum(t.nbytes for p in trained for t in optimizer.state.get(p, {}).values()),
    )


def elements_of_layer(model: nn.Module, rank: int) -> int:
    """Return the number of elements that are trained of each layer, r (K + N)."""
    counts = {rank * sum(module.weight.shape) for _, module in choose_layers(model, None)}
    if len(counts) > 1:
        raise SystemExit(f"layers of different sizes would have {sorted(counts)} elements trained")
    return counts.pop()


class NothingTrainsError(ValueError):
    """Says that a method leaves no parameter to train."""


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
        basis_rate: float | None = None,
        seed: int = 0,
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
        basis_rate : float, optional
            The rate in the basis phase, of methods that have one; default: `rate`.
        seed : int, default 0
            Of what the method draws.

        Raises
        ------
        NothingTrainsError
            If no parameter is left to train. The model is frozen then, and as it was otherwise.
        ValueError
            As :func:`choose_trained`.
        """
        self.model = model
        self._method = method = METHODS[name]
        choose_trained(model, sizes.train)
        weights = [module.weight for _, module in choose_layers(model, None)]
        k = elements_of_layer(model, sizes.rank)
        method.change(model, sizes)
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise NothingTrainsError(f"{name} with {sizes.train}: no parameter trains")
        if not method.plain:
            take_padding_out(model)
        adamw = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
        if basis_rate is not None and method.has_basis_phase and bases is None:
            _begin_at(basis_rate, adamw, sizes.basis_steps)
        self._given = Given(model, adamw, weights, k, sizes, bases, seed)
        self.optimizer = method.optimize(self._given)

    def train(self, batches: Iterable[Batch]) -> tuple[list[float], Times]:
        """Train until a loss is not finite, or the method does not go on.

        Returns
        -------
        list of float, Times
            Losses, the last of which may be NaN, and times.
        """
        mode, times, losses = Mode("", "", []), Times(), []
        for batch in batches:
            if not self.goes_on():
                break
            try:
                losses.append(take_step(mode, self.model, self.optimizer, batch, times))
            except SebpError as error:
                if error.status != NONFINITE:
                    raise
                losses.append(math.nan)
            if not math.isfinite(losses[-1]):
                break
        return losses, times

    def goes_on(self) -> bool:
        """Return whether a step would change the model."""
        return self._method.goes_on(self._given)

    def is_finite(self) -> bool:
        """Return whether all parameters are."""
        return all(bool(p.isfinite().all()) for p in self.model.parameters())

    def share(self) -> Share:
        """Count what the training of the feed-forward weights takes now."""
        return self._method.share(self._given, self.optimizer)

    def finish(self) -> nn.Module:
        """Return the trained model as an ordinary one."""
        self._method.finish(self.model, self.optimizer)
        sebp.remove_sebp_from_model(self.model)
        return self.model


def _begin_at(rate: float, adamw: torch.optim.AdamW, steps: int) -> None:
    """Give AdamW another learning rate for its first steps."""
    later = [group["lr"] for group in adamw.param_groups]
    for group in adamw.param_groups:
        group["lr"] = rate
    taken = 0

    def count(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        nonlocal taken
        taken += 1
        if taken == steps:
            for group, lr in zip(optimizer.param_groups, later, strict=True):
                group["lr"] = lr

    adamw.register_step_post_hook(count)
