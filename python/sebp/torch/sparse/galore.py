# SPDX-License-Identifier: Apache-2.0
"""GaLore: layers whose gradient is projected to few directions, where AdamW's moments live.

Zhao, Zhang, Chen, Wang, Anandkumar, Tian, "GaLore: memory-efficient LLM training by gradient
low-rank projection", 2024 (arXiv 2403.03507). With a weight W of N x K, u the r leading singular
vectors of one gradient on its smaller side, and S AdamW's step on R::

    N <= K:    R = u dW       r x K    u: r x N    W += scale u^T S
    N >  K:    R = dW u^T     N x r    u: r x K    W += scale S u

R is computed on the active rows as (dY u^T)^T X or dY^T (X u^T), so dW itself is formed only in the
steps that choose u anew.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..._structs import Matrix
from ...core import Context, Rows
from ...sparse import AdamW, Basis, adamw_step, lora_merge
from ..common.context import thread_context
from ..common.tensors import matrix_of
from ..linear_layers.products import library_backward
from .layer import SparseLayer, all_finite
from .settings import Kind, Settings, as_integer, check_projection


def leading_vectors(gradient: Tensor, rank: int) -> Tensor:
    """Compute the leading singular vectors of a gradient on its smaller side.

    They are eigenvectors of the smaller Gram matrix, in double precision, as squares of singular
    values lie far apart. The sums of bases (``sebp_basis_sums_add``) would do the larger side too,
    which costs up to the square of the sides' ratio more. A vector's sign is such that its element
    of largest magnitude is positive: moments outlive their vectors, so steps depend on it.

    Parameters
    ----------
    gradient : Tensor, N x K
        Finite.
    rank : int
        r, from 1 to min(N, K).

    Returns
    -------
    Tensor, r x N where N <= K, else r x K
        float32; a row is a vector.
    """
    g = gradient.double()
    gram = g @ g.t() if g.shape[0] <= g.shape[1] else g.t() @ g
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).t()
    largest = vectors.abs().argmax(dim=1, keepdim=True)
    return (vectors * vectors.gather(1, largest).sign()).float().contiguous()


class GaloreCopy(NamedTuple):
    """A copy of a :class:`GaloreMoments`' state: its tensors, and the number of steps."""

    vectors: Tensor | None
    moment1: Tensor
    moment2: Tensor
    steps: int


class GaloreMoments:
    """The vectors that a layer's gradient is projected on, and AdamW's moments of R.

    Parameters
    ----------
    shape : (int, int)
        N and K.
    rank : int
        r.
    """

    is_fixed = True  # several backwards are summed in R

    def __init__(self, shape: tuple[int, int], rank: int) -> None:
        rows, cols = shape
        self.rank, self.width = rank, min(shape)
        self.is_left = rows <= cols  # u projects the rows of dW
        self.shape = (rank, cols) if self.is_left else (rows, rank)
        self.vectors: Tensor | None = None  # until the first gradient
        self.moment1 = torch.zeros(self.shape, dtype=torch.float32, device="cpu")
        self.moment2 = torch.zeros(self.shape, dtype=torch.float32, device="cpu")
        self.steps = 0

    @property
    def bytes(self) -> int:
        """The memory it takes."""
        vectors = 0 if self.vectors is None else self.vectors.numel()
        return 4 * (vectors + self.moment1.numel() + self.moment2.numel())

    def project(self, vectors: Tensor, gradient: Tensor) -> Tensor:
        """Compute R from a whole gradient."""
        return vectors @ gradient if self.is_left else gradient @ vectors.t()

    def project_factors(
        self, vectors: Tensor, left: Matrix, right: Matrix, active: Rows, context: Context
    ) -> Tensor:
        """Compute R of left^T right on the active rows, by two products with r columns."""
        wide, other = (left, right) if self.is_left else (right, left)
        narrow, r = (
            torch.empty(shape, dtype=torch.float32, device="cpu")
            for shape in ((wide.rows, vectors.shape[0]), self.shape)
        )
        inside = matrix_of(narrow)
        context.call("sebp_linear_forward", wide, matrix_of(vectors), None, active, None, inside)
        factors = (inside, other) if self.is_left else (other, inside)
        library_backward(*factors, None, active, None, matrix_of(r), None)
        return r

    def step(self, r: Tensor, adamw: AdamW, context: Context) -> Tensor:
        """Take a step on R: return S."""
        self.steps += 1
        s = torch.zeros(self.shape, dtype=torch.float32, device="cpu")
        adamw_step(
            *(matrix_of(one) for one in (r, s, self.moment1, self.moment2)),
            self.steps,
            adamw._replace(weight_decay=0.0),
            context,
        )
        return s

    def add(self, s: Tensor, scale: float, w: Matrix, context: Context) -> None:
        """Add S, projected back, to W."""
        factors = (s.t(), self.vectors) if self.is_left else (self.vectors.t(), s.t())
        a, b = (matrix_of(one.contiguous()) for one in factors)
        lora_merge(a, b, scale, w, context)

    def moments(self) -> GaloreCopy:
        """Copy the state."""
        vectors = None if self.vectors is None else self.vectors.clone()
        return GaloreCopy(vectors, self.moment1.clone(), self.moment2.clone(), self.steps)

    def set_moments(self, copy: GaloreCopy) -> None:
        """Replace the state by a copied one; raise ValueError, and change nothing, for others."""
        vectors, steps = copy.vectors, as_integer("steps", copy.steps)
        if steps < 0 or (steps > 0) != (vectors is not None):
            raise ValueError(f"{steps} steps, {'no' if vectors is None else 'with'} vectors")
        sizes = {"moment1": self.shape, "moment2": self.shape}
        if vectors is not None:
            sizes["vectors"] = (self.rank, self.width)
        for name, size in sizes.items():
            tensor = getattr(copy, name)
            if tensor.shape != size or tensor.dtype != torch.float32:
                raise ValueError(f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, not {size}")
            if not all_finite(tensor):
                raise ValueError(f"{name} holds a NaN or Inf")
        if (copy.moment2 < 0).any():
            raise ValueError("moment2 holds a negative number")
        self.vectors = None if vectors is None else vectors.contiguous().clone()
        self.moment1, self.moment2 = copy.moment1.clone(), copy.moment2.clone()
        self.steps = steps


class GaloreLayer(SparseLayer):
    """One layer that GaLore trains: R since the last step, and its moments.

    In the first step, and each `refresh_every` steps, the first backward chooses the vectors anew
    from its whole dW, before R is computed. They are the layer's once the step is taken. Where that
    dW is zero, the layer waits for one that is not, and meanwhile takes no step.
    """

    moments: GaloreMoments | None

    def new_moments(self, kind: Kind) -> GaloreMoments:
        """Make moments before the first step."""
        return GaloreMoments(kind.shape, self.settings.rank[0])

    def load_moments(
        self, kind: Kind, basis: Basis | None, saved: dict[str, object], settings: Settings
    ) -> GaloreMoments:
        """Make moments from a checkpoint."""
        check_projection(kind, settings)
        moments = GaloreMoments(kind.shape, settings.rank[0])
        try:
            moments.set_moments(GaloreCopy(**{name: saved[name] for name in GaloreCopy._fields}))
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the checkpoint's moments of {self.name}: {error}") from None
        return moments

    def drop_gradient(self) -> None:
        """Forget what backwards have computed since the last step."""
        super().drop_gradient()
        self._chosen: Tensor | None = None  # vectors, until the step

    @property
    def gradient_bytes(self) -> int:
        """The memory of R."""
        return 4 * self.moments.shape[0] * self.moments.shape[1]

    def keep(self, left: Matrix, right: Matrix, active: Rows) -> None:
        """Add R of left^T right to that of earlier backwards, on new vectors where it is time."""
        moments = self.moments
        if self._chosen is None and moments.steps % self.settings.refresh_every == 0:
            dw = torch.empty(self.weight.shape, dtype=torch.float32, device="cpu")
            library_backward(left, right, None, active, None, matrix_of(dw), None)
            if not all_finite(dw):
                self.is_finite = False
                return
            if not dw.any():
                return  # it has no leading vectors: the next one that is not zero chooses
            self._chosen = leading_vectors(dw, moments.rank)
            r = moments.project(self._chosen, dw)
        else:
            vectors = moments.vectors if self._chosen is None else self._chosen
            r = moments.project_factors(vectors, left, right, active, thread_context())
        self.whole = r if self.whole is None else self.whole + r

    def finish_gradient(self, adamw: AdamW) -> bool:
        """Return whether a step can be taken."""
        if self.whole is None or not self.is_finite:
            return self.is_finite
        return all_finite(self.whole) and self.has_room(adamw)

    def largest(self) -> float:
        """Return a bound of what a step at a rate of 1 can add to an element before division."""
        scale = max(self.settings.scale, 1.0) * self.moments.rank
        return scale * max(float(one.abs().max()) for one in (self.whole, self.moments.moment1))

    def step(self, adamw: AdamW) -> None:
        """Take a step, if there is a gradient, and drop the gradient."""
        if self.whole is None:
            return
        if self._chosen is not None:
            self.moments.vectors = self._chosen
        s = self.moments.step(self.whole, adamw, thread_context())
        self.move_weight(partial(self.moments.add, s, self.settings.scale), adamw)
        self.drop_gradient()
