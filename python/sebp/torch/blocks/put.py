# SPDX-License-Identifier: Apache-2.0
"""Puts the library's forwards into the blocks of a model, and takes them out."""

import sys
from collections.abc import Collection

from torch import nn

from ..common.devices import is_reachable
from ..common.forward import has, is_replaced, put_in, take_out
from ..common.tensors import DTYPES
from .forms import FORMS
from .logits import head_forward


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


def give_heads(model: nn.Module) -> list[str]:
    """Let heads of language models of transformers give their logits when something reads them.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    list of str
        The names of the heads that were changed.
    """
    if "transformers.modeling_utils" not in sys.modules:
        return []
    from transformers import PreTrainedModel

    models = [one for one in model.modules() if isinstance(one, PreTrainedModel)]
    heads = {id(head) for one in models if (head := one.get_output_embeddings()) is not None}
    given = []
    for name, module in model.named_modules():
        is_head = id(module) in heads and type(module) is nn.Linear
        if is_head and not is_replaced(module) and not has(module, head_forward):
            put_in(module, head_forward)
            given.append(name)
    return given


def _is_readable(parameter: nn.Parameter) -> bool:
    return parameter.dtype in DTYPES and is_reachable(parameter)


def given_in(model: nn.Module) -> set[nn.Module]:
    """Return the modules that :func:`give_blocks` or :func:`give_heads` has changed, and are so."""
    functions = (head_forward, *(form.forward for form in FORMS))
    return {one for one in model.modules() if any(has(one, function) for function in functions)}


def take_blocks(model: nn.Module, but: Collection[nn.Module] = ()) -> None:
    """Undo :func:`give_blocks`, whoever called it, except of some modules."""
    for module in model.modules():
        if module not in but:
            for form in FORMS:
                take_out(module, form.forward)


def take_heads(model: nn.Module, but: Collection[nn.Module] = ()) -> None:
    """Undo :func:`give_heads`, whoever called it, except of some modules."""
    for module in model.modules():
        if module not in but:
            take_out(module, head_forward)
