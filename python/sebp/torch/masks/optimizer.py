# SPDX-License-Identifier: Apache-2.0
"""The optimizer of fixed masks."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..apply.feed_forward import refusal
from ..sparse.layer import all_finite
from ..sparse.memory import SparseBytes
from ..sparse.optimizer import SparseOptimizer
from ..sparse.settings import Kind, Settings, as_integer
from .adapter import SparseAdapter
from .adapter_layer import AdapterLayer
from .layer import MaskLayer
from .weight_bits import digest_of, elements_of, put_elements


class MaskOptimizer(SparseOptimizer):
    """Trains fixed elements of the chosen layers' weights, the rest by another optimizer.

    Made by :func:`~sebp.apply_sparse_mask_to_model`. All that is said of
    :class:`~sebp.torch.SparseOptimizer` holds, but that weights decay in the elements that train
    alone, so that the others stay as they are, bit for bit.

    Attributes
    ----------
    mask : str
        "random", "gradient", "magnitude" or "own".
    """

    def __init__(
        self,
        mask: str,
        base: torch.optim.Optimizer,
        kinds: list[Kind],
        layers: list[MaskLayer],
        settings: Settings,
        parameters: Iterable[nn.Parameter],
    ) -> None:
        super().__init__("SparseMask", base, kinds, layers, settings, parameters)
        self.mask = mask

    @property
    def is_chosen(self) -> bool:
        """Whether all elements are chosen; those with the largest gradient are after some steps."""
        return all(layer.is_chosen for layer in self.layers.values())

    def supports(self) -> dict[str, np.ndarray]:
        """Return the elements that train, by layer: row * columns + column, ascending; copies.

        Raises
        ------
        RuntimeError
            If they are still to be chosen, or after :meth:`release`.
        """
        self._refuse_unchosen()
        return {name: layer.moments.support.copy() for name, layer in self.layers.items()}

    def _refuse_unchosen(self) -> None:
        for name, layer in self.layers.items():
            if layer.moments is None:
                raise RuntimeError(f"{name}: the layer was released; its elements are not known")
            if not layer.is_chosen:
                raise RuntimeError(
                    f"{name}: its elements are still to be chosen by the gradients of"
                    f" {layer.choose_after} steps, of which {layer.steps_seen} were taken"
                )

    @torch.no_grad()
    def adapter(self, name: str = "adapter") -> SparseAdapter:
        """Return what training has made of the elements, to be saved or put into other models.

        It holds the masked elements of these layers alone, not what the user's optimizer trains.

        Parameters
        ----------
        name : str
            For messages.

        Raises
        ------
        RuntimeError
            If the elements are still to be chosen, or after :meth:`release`.
        ValueError
            If a weight has another dtype or shape than before training, or cannot be read row by
            row any more.
        """
        self._refuse_unchosen()
        layers = {}
        for layer_name, layer in self.layers.items():
            weight, support = layer.weight, layer.moments.support.copy()
            if reason := refusal(weight):
                raise ValueError(f"{layer_name}: its weight {reason}")
            if weight.dtype != layer.originals.dtype or weight.shape != layer.moments.shape:
                raise ValueError(
                    f"{layer_name}: its weight is of {weight.dtype} and {tuple(weight.shape)}, but"
                    f" was of {layer.originals.dtype} and {layer.moments.shape} before training"
                )
            base = weight.detach().clone()
            put_elements(base, support, layer.originals)
            layers[layer_name] = AdapterLayer.of_values(
                support,
                elements_of(weight, support),
                layer.originals.clone(),
                tuple(weight.shape),
                digest_of(base),
                isinstance(layer.module, nn.Linear),
            )
        return SparseAdapter(layers, name, self.mask)

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, object]:
        """Return what a run needs besides the model's state to go on bit for bit.

        Returns
        -------
        dict
            As that of a :class:`~sebp.torch.SparseOptimizer`, with the masks, and the values of the
            elements before training.
        """
        state = super().state_dict()
        state["sebp"]["mask"] = self.mask
        state["sebp"]["masks"] = {
            name: {**layer.state(), "choose_after": layer.choose_after}
            for name, layer in self.layers.items()
        }
        return state

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Go on where a run stopped, with its masks.

        Raises
        ------
        ValueError, SebpError
            As :meth:`SparseOptimizer.load_state_dict`. Nothing has changed then.
        """
        ours = state_dict.get("sebp")
        if ours is None or "masks" not in ours:
            raise ValueError("the checkpoint is of an optimizer without fixed masks")
        for name, layer in self.layers.items():
            try:
                self._check_state(name, layer, ours["masks"][name], ours["moments"][name])
            except KeyError as error:
                raise ValueError(f"the checkpoint is incomplete or too old: no {error}") from None
        super().load_state_dict(state_dict)
        self.mask = str(ours.get("mask"))
        for name, layer in self.layers.items():
            layer.choose_after = ours["masks"][name]["choose_after"]
            layer.load_state(ours["masks"][name])

    def _check_state(
        self,
        name: str,
        layer: MaskLayer,
        state: Mapping[str, object],
        moments: Mapping[str, object],
    ) -> None:
        """Raise ValueError unless a layer's part of a checkpoint can be gone on with."""
        originals, sums, weight = state["originals"], state["sums"], layer.weight
        as_integer("steps_seen", state["steps_seen"])
        as_integer("choose_after", state["choose_after"])
        if not moments["is_fixed"]:
            is_sum = isinstance(sums, Tensor) and sums.dtype == torch.float32
            if sums is not None and not (
                is_sum and sums.shape == weight.shape and sums.is_cpu and all_finite(sums)
            ):
                raise ValueError(f"the checkpoint's sum of gradients of {name} is not valid")
            return
        shape = tuple(moments["indices"].shape)
        if not isinstance(originals, Tensor) or not originals.is_cpu or originals.shape != shape:
            raise ValueError(f"the checkpoint's values of {name} before training are not valid")
        if originals.dtype != weight.dtype:
            raise ValueError(
                f"the checkpoint's values of {name} before training are of {originals.dtype}, its"
                f" weight is of {weight.dtype}"
            )

    # ---- what it is and what it takes ----

    def bytes(self) -> SparseBytes:
        """Return the memory that training the masked elements takes now.

        `bases` are the values of the elements before training, or the sums of the gradients by
        which elements are still to be chosen.
        """
        held = [one for layer in self.layers.values() for one in (layer.originals, layer.sums)]
        return super().bytes()._replace(bases=sum(one.nbytes for one in held if one is not None))

    def __repr__(self) -> str:
        """Describe it in a few lines."""
        if any(layer.moments is None for layer in self.layers.values()):
            return super().__repr__()
        what = f"mask: {self.mask}"
        if self.is_chosen:
            counts = [layer.moments.count for layer in self.layers.values()]
            total = sum(layer.weight.numel() for layer in self.layers.values())
            what += f", {sum(counts)} of {total} elements ({sum(counts) / total:.2%})"
        else:
            what += ", still to be chosen"
        return f"{super().__repr__()}\n{what}"
