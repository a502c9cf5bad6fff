# SPDX-License-Identifier: Apache-2.0
"""Reasons for which one call of a base model runs with padding."""

import functools

import torch
from torch import Tensor, nn

from ..attention import mpnet, packed_texts
from ..common.devices import are_together
from ..common.forward import is_replaced
from ..common.packing import Packing
from .parts import counts_distances
from .proof import CACHES, Call, trains

# What has a row for each token.
PACKED = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")
# What may be there and changes nothing of it.
_HARMLESS = ("attention_mask", "return_dict", "num_items_in_batch")
# What may be False.
_FLAGS = ("use_cache", "output_attentions", "output_hidden_states", "output_router_logits")
# Packages whose modules work token by token, except those known to be attention.
_PACKAGES = ("torch", "transformers", "peft", "sebp")
# Modules of PyTorch that look at other tokens, and ends of the names of transformers' own.
_MIXING = (
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
)
_MIXING_NAMES = (
    "Mixer",
    "ShortConv",
    "DeltaNet",
    "LightningAttention",
    "LinearAttention",
    "MambaLayer",
)
# Entries of a configuration that heads read, and write.
_OF_HEADS = ("problem_type", "id2label", "label2id")
# Hooks that work on any number of tokens: those of this package, those that compute weights, and
# two of transformers.
_HOOKS = ("sebp.", "torch.nn.utils.")
_HOOK_NAMES = ("make_inputs_require_grads", "output_capturing_hook")


def is_causal(module: nn.Module) -> bool:
    """Return whether tokens attend only to those before them."""
    return any(getattr(one, "is_causal", False) is True for one in module.modules())


def refusal(module: nn.Module, given: dict[str, object], call: Call) -> str:
    """Return why a call has to run with padding, or "" if it does not.

    Parameters
    ----------
    module : nn.Module
        A base model, with what :func:`~sebp.padding_free` notes of it.
    given : dict of str to object
        Its arguments, by name.
    call : Call
        What it is a part of.

    Returns
    -------
    str
        The reason, for a warning.
    """
    config, mask = module.config, given.get("attention_mask")
    if given.get("use_cache") or any(given.get(name) is not None for name in CACHES):
        return "a cache"
    if config._attn_implementation not in packed_texts.NAMES and not mpnet.is_mpnet(module):
        return f"the attention has been set to {config._attn_implementation}"
    if mask is None:
        return "no padding: texts lie end to end" if _is_packed(given) else "no attention_mask"
    if type(mask) not in (Tensor, nn.Parameter):
        return f"a mask of class {type(mask).__name__}"
    if mask.dim() != 2:
        return f"a mask of {mask.dim()} dimensions"
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor) or not are_together(tokens, mask):
        return "not on the CPU"
    for name in PACKED:
        value = given.get(name)
        if isinstance(value, Tensor) and value.shape[:2] not in (mask.shape, (1, mask.shape[1])):
            return f"{name} of another shape than attention_mask"
    return (
        _unfit_configuration(module, given, call)
        or _unknown_argument(given)
        or _unfit_mask(module, mask)
        or ("" if call.is_again else _unfit_gradients(module))
        or foreign_part(module)
        or _foreign_hook(call.model)
        or _labelled_padding(module, mask, call.given)
    )


class _Same:
    """Equal for one object alone, which it keeps, so that no later one has its identity."""

    def __init__(self, one: object) -> None:
        self.one = one

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.one is self.one

    def __hash__(self) -> int:
        return id(self.one)


def settings_of(module: nn.Module) -> tuple:
    """Return what a base model's results may depend on, and may be changed later.

    That is its configuration, and the forwards that other code has put into its parts.
    """
    settings = tuple(
        (name, value if isinstance(value, (bool, int, float, str, type(None))) else repr(value))
        for name, value in vars(module.config).items()
        if isinstance(value, (bool, int, float, str, list, tuple, dict, type(None)))
        and name not in _OF_HEADS
    )
    replaced = tuple(
        (name, _Same(vars(one)["forward"]))
        for name, one in module.named_modules()
        if "forward" in vars(one) and is_replaced(one)
    )
    return settings, replaced


def unfit_gaps(module: nn.Module, packing: Packing) -> str:
    """Return why padding between the tokens of a text matters to the model, or ""."""
    if packing.side == "gaps" and counts_distances(module):
        return "padding between the tokens of a text, where it matters how far they are apart"
    if packing.side == "gaps" and packing.may_cut:
        return "padding between the tokens of a text, and a window of attention"
    return ""


def _is_packed(given: dict[str, object]) -> bool:
    """Return whether a call without a mask says where texts begin that lie end to end."""
    if given.get("cu_seq_lens_q") is not None:
        return True
    positions = given.get("position_ids")
    return (
        isinstance(positions, Tensor)
        and positions.dim() == 2
        and bool((positions[:, 1:] == positions[:, :1]).any())
    )


def _unfit_configuration(module: nn.Module, given: dict[str, object], call: Call) -> str:
    """Return which option of the configuration does not work on packed texts, or ""."""
    config = module.config
    # In training nobody reads the cache that is there by default.
    is_default = given.get("use_cache") is None and getattr(config, "use_cache", False)
    if is_default and not call.model.training and is_causal(module):
        return "a cache"
    for name in ("output_attentions", "output_hidden_states", "chunk_size_feed_forward"):
        if getattr(config, name, None):
            return name
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):  # some have one for each type of layer
        kind = part.get("rope_type", "default") if isinstance(part, dict) else "default"
        if kind in ("dynamic", "longrope"):
            return f"rotary embeddings that depend on the length ({kind})"
    return "is_causal" if getattr(config, "is_causal", None) is not None else ""


def _unknown_argument(given: dict[str, object]) -> str:
    """Find an argument that may have a row for each token, or ask for something unknown."""
    for name, value in given.items():
        is_off = value is None or (value is False and name in _FLAGS)
        if not (is_off or name in PACKED or name in _HARMLESS):
            return f"the argument {name}"
    return ""


def _unfit_gradients(module: nn.Module) -> str:
    """Return why this call may be computed again in a backward, or "" if it is not.

    Checkpointing around the model does that: it runs the model without gradients, or with hooks on
    saved tensors. The repetition would run with padding, and with another dropout.
    """
    if not module.training or not trains(module):
        return ""
    if not torch.is_grad_enabled():
        return "gradients are off, but it is in training"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "hooks on saved tensors, as checkpointing has"
    return ""


def mixes_tokens(module: nn.Module) -> bool:
    """Return whether a module is known to look at other tokens, and is no attention.

    A convolution of one token at a time does not; a norm over a batch does.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return any(size != 1 for size in module.kernel_size)
    return isinstance(module, _MIXING) or type(module).__name__.endswith(_MIXING_NAMES)


def foreign_part(module: nn.Module) -> str:
    """Find a part that was added or compiled since, and may mix tokens."""
    for name, one in module.named_modules():
        if type(one).__module__.split(".")[0] not in _PACKAGES:
            return f"it holds a {type(one).__name__}, which may look at other tokens"
        if mixes_tokens(one):
            return f"{name} is a {type(one).__name__}, which looks at other tokens"
        if one._compiled_call_impl is not None or hasattr(one, "_orig_mod"):
            return f"torch.compile of {name}"
    return ""


def _foreign_hook(model: nn.Module) -> str:
    """Find a hook that would see real tokens only, or padding, and may not expect that."""
    for name, one in model.named_modules():
        if one is model:
            continue  # its hooks see the model from outside
        for hooks in (
            one._forward_hooks,
            one._forward_pre_hooks,
            one._backward_hooks,
            one._backward_pre_hooks,
        ):
            for hook in hooks.values() if hooks else ():
                if not _is_known_hook(hook):
                    return f"a hook on {name}, which would see other tokens"
    return "a hook on all modules" if nn.modules.module._has_any_global_hook() else ""


def _is_known_hook(hook: object) -> bool:
    """Return whether a hook works on any number of rows."""
    hook = hook.func if isinstance(hook, functools.partial) else hook
    origin = getattr(hook, "__module__", None) or type(hook).__module__
    return origin.startswith(_HOOKS) or getattr(hook, "__name__", "") in _HOOK_NAMES


def _unfit_mask(module: nn.Module, mask: Tensor) -> str:
    """Return why the model cannot run on the real tokens of this mask, or ""."""
    real = mask != 0
    if bool(real.all()):
        return "no padding"
    if not bool(real.any()):
        return "no tokens"
    if not bool((real == mask).all()):
        return "a mask with other values than 0 and 1"
    chunk = getattr(module.config, "attention_chunk_size", None)
    if chunk is not None and mask.shape[1] > chunk:
        return f"attention in chunks of {chunk}"
    if not bool(real[:, 0].all()) and not is_causal(module):
        return "a text whose first token is padding"
    return ""


def _labelled_padding(module: nn.Module, mask: Tensor, given: dict[str, object]) -> str:
    """Find labels at padded tokens, or predicted from them, in the arguments of the whole call."""
    if getattr(module.config, "is_encoder_decoder", False):
        return ""  # labels are the decoder's
    real = mask != 0
    arguments = dict(given)
    for value in given.values():
        if isinstance(value, dict):
            arguments.update(value)
    for name, labels in arguments.items():
        if (
            "label" not in str(name)
            or not isinstance(labels, Tensor)
            or labels.is_floating_point()
            or labels.shape[-1:] != mask.shape[-1:]
            or labels.numel() != mask.numel()
        ):
            continue
        is_labelled = labels.reshape(mask.shape) >= 0
        if bool((is_labelled & ~real).any()):
            return f"{name} at padded tokens, which are not -100"
        if is_causal(module) and bool((is_labelled[:, 1:] & ~real[:, :-1]).any()):
            return (
                f"{name} predicted from padded tokens: with padding on the left the first token of"
                " each text has to be -100 too"
            )
    return ""
