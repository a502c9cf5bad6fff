# SPDX-License-Identifier: Apache-2.0
"""Puts the library's forwards into the blocks of a model, and takes them out."""

from torch import nn

from ..forward import has, is_replaced, put_in, take_out
from ..tensors import DTYPES
from .forms import FORMS


def give_blocks(model: nn.Module) -> dict[str, list[str]]:
    """Let the library compute the norms, activations and dropouts of a model that it knows.

    Nothing is changed in a model that has no parameter which the library could read. Modules stay
    the same objects, with the same parameters, hooks and names. A module whose forward has been
    replaced is left alone.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    dict of str to list of str
        The names of the modules that were changed, by what they are. Those that were changed before
        are not among them.
    """
    given: dict[str, list[str]] = {}
    if not any(_is_readable(parameter) for parameter in model.parameters()):
        return given
    for name, module in model.named_modules():
        form = next((form for form in FORMS if form.fits(module)), None)
        if form is None or is_replaced(module) or has(module, form.forward):
            continue
        if all(_is_readable(parameter) for parameter in module.parameters()):
            put_in(module, form.forward)
            given.setdefault(form.name, []).append(name)
    return given


def _is_readable(parameter: nn.Parameter) -> bool:
    return parameter.device.type == "cpu" and parameter.dtype in DTYPES


def take_blocks(model: nn.Module) -> None:
    """Undo :func:`give_blocks`, whoever called it."""
    for module in model.modules():
        take_block(module)


def take_block(module: nn.Module) -> None:
    """Give a module its own forward again, if it was changed."""
    for form in FORMS:
        take_out(module, form.forward)
