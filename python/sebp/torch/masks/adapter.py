# SPDX-License-Identifier: Apache-2.0
"""Adapters that are sparse differences of weights: saved, loaded, and switched in a live model."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..apply.feed_forward import refusal, refuse_shared
from .adapter_files import read_adapter, write_adapter
from .adapter_layer import AdapterLayer
from .weight_bits import are_same, digest_of, elements_of, put_elements


class SparseAdapter:
    """What training has made of the masked elements of weights.

    Returned by :meth:`MaskOptimizer.adapter`, and by :meth:`load`. An :class:`AdapterSwitch` puts
    it into a model.

    Parameters
    ----------
    layers : mapping of str to AdapterLayer
        By the names of the layers.
    name : str
        For messages.
    mask : str
        Which mask it is.
    """

    def __init__(self, layers: Mapping[str, AdapterLayer], name: str, mask: str) -> None:
        self.layers = dict(layers)
        self.name = name
        self.mask = mask

    @property
    def is_proved(self) -> bool:
        """Whether it knows the digest of each weight that it is for; PEFT's files have none."""
        return all(layer.digest is not None for layer in self.layers.values())

    def save(self, folder: str | os.PathLike) -> bool:
        """Save it in a folder, in the format of PEFT's SHiRA, with the digests of its base.

        Returns
        -------
        bool
            Whether PEFT's ``PeftModel.from_pretrained`` loads it. It does where all layers are
            ``nn.Linear``, with r (N + K) elements each, for one whole r. It adds float32
            differences, so that elements may differ from ours by rounding, and does not look
            whether the base is the right one.

        Raises
        ------
        ModuleNotFoundError
            If safetensors is not installed.
        OSError
            If the files cannot be written. Files that were there before are then as they were.
        ValueError
            If a value or a difference is not finite, as one that overflows float32.
        """
        return write_adapter(folder, self.layers, self.mask)

    @classmethod
    def load(cls, folder: str | os.PathLike, name: str | None = None) -> "SparseAdapter":
        """Load one that :meth:`save` or PEFT's SHiRA has saved.

        Parameters
        ----------
        folder : path
        name : str, optional
            For messages. Default: the folder's name.

        Raises
        ------
        ModuleNotFoundError
            If safetensors is not installed.
        OSError
            If a file cannot be read.
        ValueError
            If it is another kind of adapter, damaged, or holds more than elements of weights.
        """
        layers, mask = read_adapter(folder)
        return cls(layers, name or Path(folder).name, mask)

    def __repr__(self) -> str:
        """Describe it in a line."""
        count = sum(layer.delta.numel() for layer in self.layers.values())
        what = f"{self.mask}: {count} elements of {len(self.layers)} layers"
        return f"SparseAdapter({self.name!r}, {what})"


@dataclass(frozen=True)
class _Held:
    """Elements that an adapter has put into a weight, and what was there before."""

    support: NDArray
    values: Tensor
    originals: Tensor


class AdapterSwitch:
    """Puts sparse adapters into a model, one at a time, bit for bit.

    Only the elements of an adapter are written. What was there before is kept, and put back when
    another one takes its place. Before an adapter is put in, the digest of each weight tells
    whether it is the one that the adapter was trained on.

    Parameters
    ----------
    model : nn.Module
        Any model; with no adapter in it, unless `active` is given.
    active : SparseAdapter, optional
        The one that is in the model now, such as the one that was just trained there.

    Attributes
    ----------
    active : SparseAdapter or None
        Which one is in the model.

    Raises
    ------
    ValueError
        If `active` is not in the model, was read from a file, so that nobody knows what was there
        before, or is of another base.
    """

    def __init__(self, model: nn.Module, active: SparseAdapter | None = None) -> None:
        self.model = model
        self.active: SparseAdapter | None = None
        self._held: dict[str, _Held] = {}
        if active is not None:
            self._held = {name: self._find(active, name) for name in active.layers}
            self.active = active

    def _find(self, adapter: SparseAdapter, name: str) -> _Held:
        """Return the elements of an adapter that is said to be in the model."""
        layer, weight = adapter.layers[name], self._weight(adapter, name)
        if layer.originals is None:
            raise ValueError(
                f"{adapter.name} was read from a file, which does not tell what was in the place of"
                " its elements"
            )
        held = _Held(self._support(adapter, name, weight), layer.values, layer.originals)
        if not are_same(elements_of(weight, held.support), held.values):
            raise ValueError(f"{adapter.name} is not in the model: {name} has other elements")
        _check_base(adapter, name, _without(weight, held))
        return held

    def _weight(self, adapter: SparseAdapter, name: str) -> Tensor:
        """Return the weight of a layer; raise ValueError where it cannot be written to."""
        try:
            module = self.model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{adapter.name}: the model has no layer {name}") from None
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2:
            raise ValueError(f"{adapter.name}: {name} of the model is no linear layer")
        if reason := refusal(weight):
            raise ValueError(f"{adapter.name}: the weight of {name} {reason}")
        if any(getattr(hook, "is_in_use", False) for hook in module._forward_hooks.values()):
            raise ValueError(
                f"{adapter.name}: {name} is trained by a SparseOptimizer; release() that first"
            )
        return weight

    def _refuse_shared(self, adapter: SparseAdapter | None) -> None:
        """Raise ValueError where an adapter would change more than the layers that it is for."""
        names = [] if adapter is None else list(adapter.layers)
        chosen = [(name, self.model.get_submodule(name)) for name in names]
        try:
            refuse_shared(self.model, chosen)
        except ValueError as error:
            raise ValueError(f"{adapter.name}: {error}") from None

    @staticmethod
    def _support(adapter: SparseAdapter, name: str, weight: Tensor) -> NDArray:
        try:
            return adapter.layers[name].support(tuple(weight.shape))
        except ValueError as error:
            raise ValueError(f"{adapter.name}: the weight of {name} {error}") from None

    @torch.no_grad()
    def switch(self, adapter: SparseAdapter | None, *, unproved: bool = False) -> None:
        """Put an adapter into the model, in the place of the one that is there.

        Parameters
        ----------
        adapter : SparseAdapter or None
            None: the base alone.
        unproved : bool, default False
            Take an adapter from a file of PEFT's, too, which does not tell which base it is for.

        Raises
        ------
        ValueError
            If the adapter is of another base, by name: a layer is missing, has another shape or
            dtype, or another digest; if a weight is another module's as well; if it does not know
            its base and `unproved` is not set; if elements that were put in have been changed
            since; or if a layer is trained by a :class:`~sebp.torch.SparseOptimizer`.
            The model has not changed then.
        """
        bases = {}
        for name, held in self._held.items():
            weight = self._weight(self.active, name)
            if weight.shape.numel() <= held.support[-1] or not are_same(
                elements_of(weight, held.support), held.values
            ):
                raise ValueError(
                    f"elements of {name} have been changed since {self.active.name} was put in"
                )
            bases[name] = weight
        new = {}
        for name, layer in ({} if adapter is None else adapter.layers).items():
            weight = self._weight(adapter, name)
            support = self._support(adapter, name, weight)
            base = _without(weight, self._held.get(name))
            if layer.digest is not None:
                _check_base(adapter, name, base)
            elif not unproved:
                raise ValueError(
                    f"{adapter.name} does not tell which base it is for: its file has no digest of"
                    f" {name}; unproved=True takes it all the same"
                )
            originals = elements_of(base, support)
            try:
                new[name] = _Held(support, layer.values_on(originals), originals)
            except ValueError as error:
                raise ValueError(f"{adapter.name}: the weight of {name} {error}") from None
            bases[name] = weight
        self._refuse_shared(adapter)
        for name, held in self._held.items():
            put_elements(bases[name], held.support, held.originals)
        for name, held in new.items():
            put_elements(bases[name], held.support, held.values)
        self._held, self.active = new, adapter

    def merge(self) -> list[str]:
        """Leave the adapter in the model for good; the values before it are forgotten.

        Returns
        -------
        list of str
            The names of its layers; empty if none was in.
        """
        names = list(self._held)
        self._held, self.active = {}, None
        return names


def _without(weight: Tensor, held: _Held | None) -> Tensor:
    """Return a weight without the elements that an adapter has put in; a copy where there are."""
    weight = weight.detach()
    if held is not None:
        weight = weight.clone()
        put_elements(weight, held.support, held.originals)
    return weight


def _check_base(adapter: SparseAdapter, name: str, base: Tensor) -> None:
    """Raise ValueError unless a weight is the one that an adapter was trained on."""
    if digest_of(base) != adapter.layers[name].digest:
        raise ValueError(
            f"{adapter.name} is of another base: the weight of {name} is not the one that it was"
            " trained on"
        )
