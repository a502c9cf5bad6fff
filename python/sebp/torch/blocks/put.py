# SPDX-License-Identifier: Apache-2.0
"""Puts the library's forwards into the blocks of a model, and takes them out."""

from torch import nn

from ..forward import has, is_replaced, put_in, take_out
from .forms import FORMS


def give_blocks(model: nn.Module) -> dict[str, list[str]]:
    """Let the library compute the norms, activations and dropouts of a model that it knows.

    Modules stay the same objects, with the same parameters, hooks and names. A module whose forward
    has been replaced is left alone.

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
    for name, module in model.named_modules():
        form = next((form for form in FORMS if form.fits(module)), None)
        if form is not None and not is_replaced(module) and not has(module, form.forward):
            put_in(module, form.forward)
            given.setdefault(form.name, []).append(name)
    return given


def take_blocks(model: nn.Module) -> None:
    """Undo :func:`give_blocks`, whoever called it."""
    for module in model.modules():
        take_block(module)


def take_block(module: nn.Module) -> None:
    """Give a module its own forward again, if it was changed."""
    for form in FORMS:
        take_out(module, form.forward)
