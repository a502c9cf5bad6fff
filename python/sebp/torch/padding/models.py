# SPDX-License-Identifier: Apache-2.0
"""Runs encoders and decoders of transformers on real tokens alone.

Padding is removed where a base model gets its mask, and restored where it returns its last hidden
state. Between the two all rows are real tokens, so no layer has to look for them.
"""

import itertools
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from ..attention import mpnet, packed_texts
from ..common.forward import Forward, has, is_replaced, is_traced, is_transformed, put_in, take_out
from ..common.packing import Packing, current_packing, packed
from ..linear_layers.linear import linear_classes
from .pad import pad_first
from .parts import (
    can_be_told,
    default_positions,
    default_types,
    finds_positions,
    has_inner_entry,
    has_inner_exit,
    put_in_parts,
    take_out_parts,
)
from .proof import Call, Proofs, current_call, trains
from .refusals import PACKED, foreign_part, is_causal, refusal, settings_of, unfit_gaps
from .signatures import has_argument, signature_of
from .stir import stir


@dataclass
class PaddingFreeReport:
    """What :func:`padding_free` did, by the names of the encoders and decoders in a model.

    Attributes
    ----------
    changed : list of str
        Those that now run without padding, in calls for which the result is proved the same.
    already : list of str
        Those that did so before.
    skipped : dict of str to str
        Those not changed, and why.
    layers : int
        The number of linear layers in those changed.
    calls : Counter of str
        How many calls of the model have left padding out so far, under "", and how many have not,
        by the reason. It counts on as the model runs.
    tokens : Counter of str
        How many tokens these calls had: "real", and padded ones "left out" or "computed". Calls
        with padding are counted where they were given an ``attention_mask``, B x L, by its name.
    """

    changed: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    layers: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """Describe it in a few lines."""
        lines = [f"{name} runs without padding" for name in self.changed]
        if self.changed:
            lines[-1] += f": {self.layers} linear layers in all"
        lines += [f"{name} did already and is as it was" for name in self.already]
        lines += [f"{name} left alone: {reason}" for name, reason in self.skipped.items()]
        if self.calls:
            total = sum(self.calls.values())
            lines.append(f"of {total} calls {self.calls['']} left padding out")
            lines += [f"{n} did not: {reason}" for reason, n in self.calls.items() if reason]
        return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# One call of a base model


def _given(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, object]:
    """Name all arguments of a call, those of the class's forward."""
    bound = signature_of(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    given = dict(list(bound.items())[1:])
    return {**given.pop("kwargs", {}), **given}


_serial = itertools.count()


def _is_left_alone() -> bool:
    """Return whether a call runs as the model itself would run it.

    That is so in tracing, export and ``torch.func``, and in a backward, which computes again what
    ran with padding before.
    """
    if torch.compiler.is_compiling():  # first of all: dynamo does not know all of the others
        return True
    is_in_backward = torch._C._current_graph_task_id() != -1
    return is_in_backward or is_traced() or is_transformed()


def _prove(module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> object:
    """Run a call of a model as a :class:`Call`, which proves its result."""
    try:
        given = _given(module, args, kwargs)
    except TypeError:  # whoever replaced the forward takes other arguments than the class
        given = dict(kwargs)
    proofs = proofs_of(module) or module._sebp_outer_proofs[0]
    return Call(module, proofs, given).run(forward, args, kwargs)


def _whole_forward(forward: Forward, *args: object, **kwargs: object) -> object:
    """Replace the forward of the model that :func:`padding_free` was called for."""
    if _is_left_alone() or current_call() is not None:
        return forward.original(*args, **kwargs)
    return _prove(forward.module, forward.original, args, kwargs)


def _base_forward(forward: Forward, *args: object, **kwargs: object) -> object:
    """Replace a base model's forward: remove padding, if that can be done."""
    module, call = forward.module, current_call()
    if _is_left_alone() or current_packing() is not None:
        return forward.original(*args, **kwargs)
    if call is not None and call.is_plain:
        return call.watch(module._sebp_name, partial(forward.original, *args, **kwargs))
    if call is None:
        return _prove(module, forward, args, kwargs)
    given = _given(module, args, kwargs)
    if call.stirs:
        given = stir(given)
    if torch.is_grad_enabled() and not call.has_backward:
        # Of another model than the one that padding_free() was called for.
        call.has_backward = trains(module)
    kind, reason = None, refusal(module, given, call)
    if not reason:
        window = getattr(module.config, "sliding_window", None)
        packing = Packing(given["attention_mask"], window, given.get("input_ids"))
        causal = tuple(getattr(one, "is_causal", None) for one in module.modules())
        # Which token is pooled behind the encoder may depend on nothing but its place.
        edges = packing.edges if has_inner_entry(module) else None
        name = (module._sebp_name, causal, edges, settings_of(module))
        kind = call.kind_of(name, packing, given)
        reason = unfit_gaps(module, packing)
        if not reason and not call.is_again:
            reason = call.proofs.refused.get(kind, "")
    if reason:
        call.reasons.append(reason)
        if os.environ.get("SEBP_VERBOSE") == "1":
            print(f"sebp,fallback,padding_free,{type(module).__name__},{reason}", file=sys.stderr)
    if reason or call.is_unexpected(kind):
        return call.watch(module._sebp_name, partial(forward.original, *args, **kwargs))
    call.begin(kind, packing)
    packed_texts.register()  # where the model has been unpickled, nobody has yet
    given = given if has_inner_entry(module) else _pack(module, given, packing)

    def run() -> object:
        with packed(packing):
            output = forward.original(**given)
        return output if has_inner_exit(module) else pad_first(output, packing, call)

    return call.watch(module._sebp_name, run, packing)


def _pack(module: nn.Module, given: dict[str, object], packing: Packing) -> dict[str, object]:
    """Remove padding from a model's arguments."""
    shape = packing.mask.shape
    result = dict(given)
    if can_be_told(module) and given.get("position_ids") is None:
        result["position_ids"] = default_positions(module, given, shape)
    if has_argument(module, "token_type_ids") and given.get("token_type_ids") is None:
        result["token_type_ids"] = default_types(module, shape)
    for name in PACKED:
        if result.get(name) is not None:
            result[name] = packing.pack(result[name])
    result["attention_mask"] = packing.attention_mask
    if has_argument(module, "use_cache"):
        result["use_cache"] = False
    return result


# --------------------------------------------------------------------------------------------------
# Models


def _bases(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the base models of transformers in a model that take a mask, by name."""
    if "transformers.modeling_utils" not in sys.modules:
        return []
    from transformers import PreTrainedModel

    return [
        (name or type(module).__name__, module)
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
        and module.base_model is module
        and has_argument(module, "attention_mask")
    ]


def _reason_against(module: nn.Module) -> str:
    """Return why an encoder or decoder cannot run without padding, or "" if it can."""
    import transformers

    kind = type(module)
    if int(transformers.__version__.split(".")[0]) < 5:
        return f"it is of transformers {transformers.__version__}, which is before 5"
    if is_replaced(module):
        return "its forward has been replaced"
    if reason := foreign_part(module):
        return reason
    has_table = hasattr(sys.modules[kind.__module__], "ALL_ATTENTION_FUNCTIONS")
    if not has_table and not mpnet.is_mpnet(module):
        return "its attention is not one of transformers' table of attentions"
    if getattr(module.config, "is_encoder_decoder", False) and is_causal(module):
        return "it reads what the encoder returns, too"
    try:
        _ = module.config.sliding_window
    except AttributeError:
        pass
    except Exception:
        return "its configuration has no one window of attention for all layers"
    if getattr(module.config, "expert_capacity", None) is not None:
        return "its experts take no more than so many tokens of a text"
    if not finds_positions(module):
        return "it cannot be told positions"
    if module.config._attn_implementation not in packed_texts.NAMES and not mpnet.is_mpnet(module):
        return f'its attention is "{module.config._attn_implementation}", not "sdpa" or "sebp"'
    return ""


def padding_free(model: nn.Module, check: bool = True) -> PaddingFreeReport:
    """Make models of transformers compute real tokens only, in place.

    Padding is removed where a base model (BertModel, LlamaModel, ...) gets its 2-D
    ``attention_mask``, and restored at its last hidden state: heads work as before. Attention runs
    within each text, by the library, or by PyTorch text by text in dtypes that the library has not.
    Parameters, names, configurations and checkpoints are not changed.

    Results are the model's own up to rounding. Where they might not be, a call runs with padding:

    - The first call of each kind (training or evaluation, padding left or right, arguments given,
      configuration) runs once more with padding and without dropout, and then on other texts. What
      buffers and attributes held before is put back. The results and the last hidden states of base
      models are compared, under autocast in float32 as well, and some texts are changed, which the
      others must not notice. If there is a difference, all later calls of this kind run with
      padding, and a warning says so.
    - Models with layers that look at other tokens, and are no attention, are left alone:
      convolutions, recurrent layers, Mamba, linear attention, norms over a batch.
    - Calls run with padding if labels are at padded tokens (not -100) or predicted from them, if
      there is a cache, an unknown argument or a hook within the layers, and, in encoders, if the
      first token of a text is padding.
    - In training, a gradient at a padded token raises a RuntimeError in ``backward()``.
    - Where no backward can follow, padded tokens hold NaN inside the model. A call whose result
      holds NaN runs again with padding. So a model that returns something about padded tokens
      (logits of each token, the last hidden state) is evaluated with padding.

    Parameters
    ----------
    model : nn.Module
        The outermost model that is called. The base models in it are found.
    check : bool, default True
        Whether results are compared, as above. If not, padded tokens are zeros where a base model
        returns them, in evaluation too. The backward still checks their gradients.

    Returns
    -------
    PaddingFreeReport
        The base models changed, those changed before, and those not changed, with the reason. It
        counts calls while the model runs.

    Raises
    ------
    RuntimeError
        In a backward, if a padded token has a gradient.
    """
    report = leave_padding_out(model, check, "padding_free")
    if report.already:
        warnings.warn("runs without padding already: " + ", ".join(report.already), stacklevel=2)
    return report


def leave_padding_out(model: nn.Module, check: bool, owner: str) -> PaddingFreeReport:
    """Do what :func:`padding_free` does, for one owner.

    Parameters
    ----------
    model : nn.Module
    check : bool
        As there.
    owner : str
        A function of this package. It is undone when each owner has called
        :func:`put_padding_back`.

    Returns
    -------
    PaddingFreeReport
        Base models that this owner has changed before are in `already`, those of another owner in
        `changed`.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's
    proofs = proofs_of(model) or Proofs(check)
    proofs.check = check
    is_again = owner in proofs.owners
    proofs.owners.add(owner)
    report = PaddingFreeReport(calls=proofs.calls, tokens=proofs.tokens)
    changed: list[nn.Module] = []
    layers: set[nn.Module] = set()
    found = _bases(model)
    for name, module in found:
        reason = _reason_against(module)
        if has(module, _base_forward) and is_again:
            report.already.append(name)
        elif reason:
            report.skipped[name] = reason
        else:
            _change(name, module, proofs)
            if not any(module in outer.modules() for outer in changed):
                report.changed.append(name)
                changed.append(module)
            layers.update(m for m in module.modules() if type(m) in linear_classes())
    for name, module in found:  # of a model with parts that run without padding, these are told
        if any(part is not module and part in module.modules() for part in changed):
            report.skipped.pop(name, None)
    report.layers = len(layers)
    if report.changed or report.already:
        model._sebp_proofs = proofs
        put_in(model, _whole_forward)
    if not found:
        report.skipped[type(model).__name__] = (
            "there is no base model of transformers in it that takes an attention_mask"
        )
    return report


def _change(name: str, module: nn.Module, proofs: Proofs) -> None:
    """Make one base model run without padding."""
    packed_texts.register()
    outer = vars(module).get("_sebp_outer_proofs", [])
    if any(one is proofs for one in outer):
        return
    module._sebp_outer_proofs = [*outer, proofs]
    if outer:
        return
    module._sebp_name = f"{name} {next(_serial)}"
    put_in(module, _base_forward)
    put_in_parts(module)


def proofs_of(model: nn.Module) -> Proofs | None:
    """Return what is known of a model's calls, or None if its padding is not left out."""
    return vars(model).get("_sebp_proofs")


def has_asked(model: nn.Module, owner: str) -> bool:
    """Return whether :func:`leave_padding_out` was called for a model by one owner."""
    proofs = proofs_of(model)
    return proofs is not None and owner in proofs.owners


def runs_padding_free(model: nn.Module) -> bool:
    """Return whether :func:`padding_free` has changed something in a model."""
    return any(has(module, _base_forward) for module in model.modules())


def remove_padding_free(model: nn.Module) -> list[str]:
    """Undo :func:`padding_free`.

    Parameters
    ----------
    model : nn.Module
        Any model.

    Returns
    -------
    list of str
        The names of the encoders and decoders put back; empty if there were none.
    """
    return put_padding_back(model, "padding_free")


def put_padding_back(model: nn.Module, owner: str) -> list[str]:
    """Undo :func:`leave_padding_out` for one owner; the model changes when no owner is left.

    Parameters
    ----------
    model : nn.Module
        Any model.
    owner : str
        As there.

    Returns
    -------
    list of str
        The names of the encoders and decoders put back.
    """
    model = getattr(model, "_orig_mod", model)
    proofs = proofs_of(model)
    if proofs is None:
        return []
    proofs.owners.discard(owner)
    if proofs.owners:
        return []
    take_out(model, _whole_forward)
    del model._sebp_proofs
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if has(module, _base_forward) and _restore(module, proofs)
    ]


def _restore(module: nn.Module, proofs: Proofs) -> bool:
    """Restore a base model; False if another model holds it for which padding is left out, too."""
    module._sebp_outer_proofs = [one for one in module._sebp_outer_proofs if one is not proofs]
    if module._sebp_outer_proofs:
        return False
    take_out(module, _base_forward)
    take_out_parts(module)
    del module._sebp_name, module._sebp_outer_proofs
    return True
