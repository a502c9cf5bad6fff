# SPDX-License-Identifier: Apache-2.0
"""Runs a model once more without side effects, and finds what a run changed."""

import copy
import dataclasses
import random
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..attention.attend import attend
from ..blocks.dropout import drop
from ..blocks.norm import normalize
from ..common.devices import gpus_of
from ..common.packing import Unfit
from ..linear_layers.direct import Watcher

_PLAIN_VALUES = (bool, int, float, str, type(None), Tensor)


def copy_containers(value: object) -> object:
    """Copy dicts, lists and tuples, and those in them; everything else is shared."""
    if type(value) in (dict, UserDict) or (isinstance(value, UserDict)):
        result = copy.copy(value)
        for key, part in value.items():
            result[key] = copy_containers(part)
        return result
    if type(value) in (list, tuple):
        return type(value)(copy_containers(part) for part in value)
    return value


def put_containers_back(value: object, before: object) -> object:
    """Give dicts and lists what :func:`copy_containers` found in them.

    Returns
    -------
    object
        `value` where it is such a container as before, else what was there before.
    """
    if type(value) is not type(before):
        return before
    if isinstance(value, (dict, UserDict)):
        parts = {key: put_containers_back(value.get(key), old) for key, old in before.items()}
        value.clear()
        value.update(parts)
    elif type(value) is list:
        old = before
        if len(value) == len(before):
            old = [put_containers_back(*pair) for pair in zip(value, before, strict=True)]
        value[:] = old
    elif type(value) is tuple:
        for pair in zip(value, before, strict=True):
            put_containers_back(*pair)
    else:
        return before
    return value


def leaves(value: object, skipped: tuple[str, ...] = (), name: str = "") -> Iterator[tuple]:
    """Go through a structure of dicts, tuples, lists and dataclasses.

    Parameters
    ----------
    value : object
    skipped : tuple of str
        Keys that are left out.
    name : str
        Of the whole.

    Yields
    ------
    (str, object)
        The name of each part, unlike all others, and the part.
    """
    if isinstance(value, (Mapping, UserDict)):
        for key, part in value.items():
            if key not in skipped:
                yield from leaves(part, skipped, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (tuple, list)):
        for place, part in enumerate(value):
            yield from leaves(part, skipped, f"{name}[{place}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        yield from leaves(parts, skipped, name)
    else:
        yield name or "what it returns", value


# --------------------------------------------------------------------------------------------------
# What a run may change


class State:
    """Random states, buffers, and the numbers, tensors, lists and dicts that are attributes.

    The state is saved when this object is made. Tensors are compared by value: a norm's statistics
    change without a change of their version.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._random = torch.get_rng_state(), random.getstate(), np.random.get_state()
        self._on_gpus = {index: torch.cuda.get_rng_state(index) for index in gpus_of(model)}
        self._buffers = [
            (name, module, key, buffer, None if buffer is None else buffer.detach().clone())
            for name, module in model.named_modules()
            for key, buffer in module._buffers.items()
        ]
        self._attributes = [
            (name, module, _plain_values(module), _copies(module))
            for name, module in model.named_modules()
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore all of it."""
        torch.set_rng_state(self._random[0])
        random.setstate(self._random[1])
        np.random.set_state(self._random[2])
        for index, state in self._on_gpus.items():
            torch.cuda.set_rng_state(state, index)
        for _, module, key, buffer, value in self._buffers:
            if module._buffers.get(key) is not buffer:
                module._buffers[key] = buffer
            if buffer is not None and not torch.equal(buffer, value):
                buffer.copy_(value)
        for _, module, values, copies in self._attributes:
            now = vars(module)
            for key in _plain_values(module).keys() - values.keys():
                del now[key]
            for key, value in values.items():
                if now.get(key, self) is not value:
                    now[key] = value
                if not _is_unchanged(value, copies.get(key)):
                    _put_value_back(value, copies[key])

    def changes(self) -> dict[str, object]:
        """Return copies of what has changed since then, by name."""
        found: dict[str, object] = {}
        for name, module, key, _, value in self._buffers:
            now = module._buffers.get(key)
            if now is not None and (value is None or not torch.equal(now, value)):
                found[f"{name}.{key}"] = now.detach().clone()
        for name, module, values, copies in self._attributes:
            for key, now in _plain_values(module).items():
                if now is values.get(key, self) and _is_unchanged(now, copies.get(key)):
                    continue
                for place, part in leaves(now, name=f"{name}.{key}"):
                    found[place] = part.detach().clone() if isinstance(part, Tensor) else part
        return found


def _plain_values(module: nn.Module) -> dict[str, object]:
    return {
        key: value
        for key, value in vars(module).items()
        if (isinstance(value, _PLAIN_VALUES) and not key.startswith("_sebp"))
        or (type(value) in (list, dict) and not key.startswith("_"))
    }


def _copies(module: nn.Module) -> dict[str, object]:
    """Copy the attributes of a module that may change and stay the same object."""
    found: dict[str, object] = {}
    for key, value in _plain_values(module).items():
        if isinstance(value, Tensor) and value.layout == torch.strided:
            found[key] = value.detach().clone()
        elif isinstance(value, (list, dict)):
            found[key] = copy_containers(value)
    return found


def _is_unchanged(value: object, before: object) -> bool:
    """Return whether an attribute holds what its copy does; without a copy it cannot change."""
    if before is None:
        return True
    if isinstance(value, Tensor):
        return value.shape == before.shape and torch.equal(value, before)
    now, then = dict(leaves(value)), dict(leaves(before))
    return now.keys() == then.keys() and all(now[key] is then[key] for key in now)


def _put_value_back(value: object, before: object) -> None:
    if not isinstance(value, Tensor):
        put_containers_back(value, before)
    elif value.shape == before.shape:
        value.copy_(before)
    else:
        value.data = before.clone()


# --------------------------------------------------------------------------------------------------
# Ways to run


_DROPOUTS = (
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
    torch.dropout,
    torch.dropout_,
    torch.alpha_dropout,
    torch.feature_dropout,
    torch.feature_alpha_dropout,
)
_OF_THIS_PACKAGE = (attend, drop, normalize)  # they are told their dropout by this name


class WithoutDropout(TorchFunctionMode):
    """Turns dropout off.

    Attributes
    ----------
    met : bool
        Whether there was any.
    """

    met = False

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Return the input of dropout, and call all other functions."""
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            x, p, training = (*args, *(None,) * 3)[:3]
            x = kwargs.get("input", x)
            p = kwargs.get("p", 0.5 if p is None else p)
            training = kwargs.get("training", kwargs.get("train", training))
            if p and training is not False:
                self.met = True
            return x
        if func in _OF_THIS_PACKAGE:
            self.met = self.met or kwargs["dropout"] > 0
            kwargs["dropout"] = 0.0
        if func is functional.scaled_dot_product_attention:
            p = kwargs.pop("dropout_p", args[4] if len(args) > 4 else 0.0)
            self.met = self.met or p > 0
            args = (*args[:4], *((0.0, *args[5:]) if len(args) > 4 else ()))
        return func(*args, **kwargs)


class Once(Watcher):
    """Raises :class:`Unfit` before anything that must not happen twice.

    That is talking to other processes, writing to parameters or arguments, and drawing from another
    generator than the default one. None of these could be undone.

    Parameters
    ----------
    model : nn.Module
    arguments : iterable of Tensor
        What it is called with.
    """

    def __init__(self, model: nn.Module, arguments: Iterable[Tensor]) -> None:
        super().__init__()
        kept = [*model.parameters(), *arguments]
        self._kept = {t.untyped_storage()._cdata for t in kept if t.layout == torch.strided}

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Look at an operator before it runs."""
        kwargs = kwargs or {}
        if "c10d" in func.namespace:
            raise Unfit("it talks to other processes in its forward")
        if kwargs.get("generator") is not None:
            raise Unfit("it draws from a generator of its own")
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                is_written = argument.alias_info is not None and argument.alias_info.is_write
                if is_written and isinstance(value, Tensor) and self._is_kept(value):
                    raise Unfit("it writes to its parameters or arguments in its forward")
        return func(*args, **kwargs)

    def _is_kept(self, tensor: Tensor) -> bool:
        return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in self._kept
