# SPDX-License-Identifier: Apache-2.0
"""Runs encoders and decoders of transformers on real tokens alone.

A batch of B texts padded to L tokens goes through the model as one text of its T real tokens.
Layers that work row by row do not notice. Attention is told where texts end by a :class:`_Packing`,
which travels with the model's keyword arguments: so it is also there for gradient checkpointing,
which computes again after the model has returned. What the last layer gives is padded again.
"""

import inspect
import os
import sys
import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .padding import current_padding

# The module whose output is padded again, of models in which all tokens of a text attend to each
# other; what follows it in them reads the first token.
_ENCODERS = {"BertModel": "encoder", "DistilBertModel": "transformer", "RobertaModel": "encoder"}
# Models whose own output is padded again, in which tokens attend to those before them.
_DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model")

_ARGUMENT = "sebp_packing"
_PACKED = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")


@dataclass
class PaddingFreeReport:
    """What :func:`padding_free` did, by the names of the encoders and decoders in a model.

    Attributes
    ----------
    changed : list of str
        Those that run without padding now.
    already : list of str
        Those that did before, and are as they were.
    skipped : dict of str to str
        Those left alone, and why.
    """

    changed: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Say it in a few lines."""
        lines = [f"{name} runs without padding" for name in self.changed]
        lines += [f"{name} did already and is as it was" for name in self.already]
        lines += [f"{name} left alone: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


class _Name(str):
    """The attention's name in a configuration, which makes it known wherever that is loaded."""

    __slots__ = ()

    def __reduce__(self) -> tuple:
        return _registered_name, ()


_ATTENTION = _Name("sebp")  # in transformers' attention interface


# --------------------------------------------------------------------------------------------------
# Packing and padding


class _Packing(NamedTuple):
    """Where the tokens of a packed batch come from.

    Texts are in the order of their lengths, so that those of one length lie together.
    """

    shape: tuple[int, int]  # B, L
    rows: Tensor  # T: the tokens' indices in the padded batch, B * L tokens
    groups: list[tuple[int, int]]  # number of texts, and the length of each
    is_causal: bool

    @classmethod
    def of(cls, mask: Tensor, is_causal: bool) -> "_Packing":
        """Read a mask, B x L, not zero at real tokens."""
        real = mask != 0
        lengths, order = real.sum(1).sort(stable=True)
        text, token = real[order].nonzero(as_tuple=True)
        values, counts = lengths.unique_consecutive(return_counts=True)
        groups = zip(counts.tolist(), values.tolist(), strict=True)
        groups = [(texts, length) for texts, length in groups if length > 0]
        return cls(tuple(mask.shape), order[text] * mask.shape[1] + token, groups, is_causal)

    def pack(self, x: Tensor) -> Tensor:
        """Take the real tokens of B x L x ... as 1 x T x ..., or of 1 x L for all texts."""
        x = x.expand(*self.shape, *x.shape[2:]).flatten(0, 1)
        return x.index_select(0, self.rows)[None]


class _Pad(torch.autograd.Function):
    """Makes B x L x H of 1 x T x H, with zeros at padded tokens."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, packing: _Packing) -> Tensor:
        ctx.packing = packing
        texts, length = packing.shape
        y = x.new_zeros((texts * length, x.shape[2])).index_copy_(0, packing.rows, x[0])
        return y.view(texts, length, -1)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor, None]:
        packing = ctx.packing
        dy = dy.flatten(0, 1)
        is_padding = torch.ones(dy.shape[0], dtype=torch.bool)
        is_padding[packing.rows] = False
        wrong = is_padding.nonzero()[:, 0]
        wrong = wrong[dy.detach().index_select(0, wrong).ne(0).any(1)]
        if wrong.numel() > 0:
            text, token = divmod(int(wrong[0]), packing.shape[1])
            raise RuntimeError(
                f"sebp.padding_free: {wrong.numel()} tokens that attention_mask leaves out have a"
                f" gradient (the first is token {token} of text {text}), but were not computed. The"
                " loss must not depend on them: label them -100, and with padding on the left the"
                " first token of each text too, as it is predicted from padding."
            )
        return dy.index_select(0, packing.rows)[None], None


# --------------------------------------------------------------------------------------------------
# Attention


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Let tokens attend within their texts: heads of 1 x heads x T x D to 1 x T x heads x D.

    Texts of one length go together. Without a packing it is transformers' own "sdpa".
    """
    packing = kwargs.pop(_ARGUMENT, None)
    if packing is None:
        from transformers import AttentionInterface

        plain = AttentionInterface()["sdpa"]
        return plain(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    sizes = [texts * length for texts, length in packing.groups]

    def split(x: Tensor) -> list[Tensor]:
        """Make texts x heads x length x D of each group."""
        return [
            part.unflatten(0, group).transpose(1, 2)
            for part, group in zip(x[0].transpose(0, 1).split(sizes), packing.groups, strict=True)
        ]

    parts = [
        functional.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=dropout,
            is_causal=packing.is_causal,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        for q, k, v in zip(split(query), split(key), split(value), strict=True)
    ]
    return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])[None], None


def _register() -> None:
    """Make the attention known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    if _ATTENTION not in AttentionInterface():
        AttentionInterface.register(_ATTENTION, _attention)
        AttentionMaskInterface.register(_ATTENTION, AttentionMaskInterface()["sdpa"])


def _registered_name() -> str:
    _register()
    return _ATTENTION


# --------------------------------------------------------------------------------------------------
# A model's hooks


def _refusal(model: nn.Module, given: dict[str, object]) -> str:
    """Say why a call has to be left to the model as it is; "": it has not."""
    config, mask = model.config, given.get("attention_mask")
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if config._attn_implementation != _ATTENTION:
        return f"the attention has been set to {config._attn_implementation}"
    if not isinstance(mask, Tensor):
        return "no attention_mask" if mask is None else f"a mask of {type(mask).__name__}"
    if mask.dim() != 2:
        return f"a mask of {mask.dim()} dimensions"
    if not isinstance(tokens, Tensor) or tokens.device.type != "cpu" or mask.device.type != "cpu":
        return "not on the CPU"
    if torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.jit.trace or torch.func"
    if given.get("past_key_values") is not None:
        return "past_key_values"
    if type(model).__name__ in _DECODERS:
        cache = given.get("use_cache")
        # In training nobody reads the cache that is there by default.
        if cache or (cache is None and config.use_cache and not model.training):
            return "use_cache"
    for name in ("output_attentions", "output_hidden_states", "chunk_size_feed_forward"):
        if given.get(name, getattr(config, name, None)):
            return name
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        return f"rotary embeddings that depend on the length ({rope['rope_type']})"
    if given.get("is_causal", getattr(config, "is_causal", None)) is not None:
        return "is_causal"
    return _unknown_argument(given) or _unfit_mask(model, mask)


def _unknown_argument(given: dict[str, object]) -> str:
    """Find an argument that may hold something for each token."""
    for name, value in given.items():
        if name not in (*_PACKED, "attention_mask") and isinstance(value, Tensor) and value.dim():
            return f"the argument {name}"
    return ""


def _unfit_mask(model: nn.Module, mask: Tensor) -> str:
    """Say why this mask does not go with the model."""
    real = mask != 0
    window = getattr(model.config, "sliding_window", None)
    if window is not None and mask.shape[1] > window:
        return f"a sliding window of {window}"
    if bool(real.all()):
        return "no padding"
    if not bool(real.any()):
        return "no tokens"
    if type(model).__name__ in _ENCODERS and not bool(real[:, 0].all()):
        return "a text whose first token is padding"
    return ""


def _given(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, object]:
    """Name all arguments of a call."""
    given = dict(inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments)
    return {**given.pop("kwargs", {}), **given}


def _default_positions(model: nn.Module, given: dict[str, object], shape: torch.Size) -> Tensor:
    """Give each token the position that the model would give it, B x L or 1 x L."""
    embeddings = getattr(model, "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_input_ids"):  # RoBERTa
        if given.get("input_ids") is None:
            return embeddings.create_position_ids_from_inputs_embeds(
                given["inputs_embeds"], embeddings.padding_idx
            )
        return embeddings.create_position_ids_from_input_ids(
            given["input_ids"], embeddings.padding_idx
        )
    return torch.arange(shape[1])[None]


def _enter(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Pack the arguments of a model."""
    if torch.compiler.is_compiling():
        return None
    _register()
    given = _given(model, args, kwargs)
    reason = _refusal(model, given)
    if reason:
        if os.environ.get("SEBP_VERBOSE") == "1":
            print(f"sebp,fallback,padding_free,{type(model).__name__},{reason}", file=sys.stderr)
        return None
    mask = given["attention_mask"]
    for name in ("input_ids", "inputs_embeds"):
        if given.get(name) is not None and given[name].shape[:2] != mask.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)},"
                f" but {name} {tuple(given[name].shape)}"
            )
    if given.get("position_ids") is None:
        given["position_ids"] = _default_positions(model, given, mask.shape)
    is_decoder = type(model).__name__ in _DECODERS
    packing = _Packing.of(mask, is_decoder)
    for name in _PACKED:
        if given.get(name) is not None:
            given[name] = packing.pack(given[name])
    # A mask of 4 dimensions is taken as it is, so that none is made for T x T.
    given["attention_mask"] = mask.new_ones(1, 1, 1, 1)
    given[_ARGUMENT] = packing
    if is_decoder:
        given["use_cache"] = False
    outer = current_padding()
    if outer is not None:
        outer.skip()
    return (), given


def _leave(module: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
    """Pad the last hidden state, which is the first output."""
    packing = kwargs.get(_ARGUMENT)
    if packing is None:
        return output
    if isinstance(output, tuple):
        return (_Pad.apply(output[0], packing), *output[1:])
    output.last_hidden_state = _Pad.apply(output.last_hidden_state, packing)
    return output


# --------------------------------------------------------------------------------------------------
# Models


def _known_class(module: nn.Module) -> type | None:
    """Find the class of transformers that a module is of, or derived from."""
    for base in type(module).__mro__:
        is_known = base.__name__ in (*_ENCODERS, *_DECODERS)
        if is_known and base.__module__.startswith("transformers.models."):
            return base
    return None


def _reason_against(module: nn.Module, known: type) -> str:
    """Say why an encoder or decoder cannot run without padding; "": it can."""
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        return f"it is of transformers {transformers.__version__}, which is before 5"
    if type(module) is not known:
        return f"its class is {type(module).__name__}"
    if "forward" in vars(module):
        return "its forward has been replaced"
    if known.__name__ in _ENCODERS and getattr(module.config, "is_decoder", False):
        return "it is an encoder used as a decoder"
    if module.config._attn_implementation not in ("sdpa", _ATTENTION):
        return f'its attention is "{module.config._attn_implementation}", not "sdpa"'
    return ""


def padding_free(model: nn.Module) -> PaddingFreeReport:
    """Let a model of transformers compute real tokens alone, in place.

    Padding is taken out before the embeddings and put back after the last layer, as zeros: heads
    work as before. Attention runs text by text, by ``scaled_dot_product_attention``. Parameters,
    names and checkpoints stay as they are. Losses and gradients are those of the model with
    padding, if the loss leaves padded tokens out; the backward checks that. What hooks within the
    layers see is 1 x T x H, the T real tokens of all texts, shorter texts first.

    While it is so, the configuration names the attention "sebp". Pickled, with the model or alone,
    it needs this package where it is loaded; what ``save_pretrained`` writes does not.

    It concerns BERT, DistilBERT, RoBERTa, Llama, Mistral and Qwen2 with "sdpa" attention. A call is
    left to the model as it was, and with SEBP_VERBOSE=1 a line on standard error says why, if it
    has no mask or a full one, makes or uses a cache, asks for attentions or hidden states, or gives
    an encoder a text whose first token is padding; and under ``torch.compile``. In training the
    cache that decoders make by default is not made.

    Parameters
    ----------
    model : nn.Module
        Any model; the encoders and decoders in it are found.

    Returns
    -------
    PaddingFreeReport
        Those changed, those that had been, and those left alone, with the reason.

    Raises
    ------
    ValueError
        In a call, if the mask does not have the shape of the tokens.
    RuntimeError
        In a backward, if the loss depends on padded tokens.
    """
    report = PaddingFreeReport()
    for name, module in model.named_modules():
        known = _known_class(module)
        if known is None:
            continue
        name = name or known.__name__
        reason = _reason_against(module, known)
        if hasattr(module, "_sebp_padding_free"):
            report.already.append(name)
        elif reason:
            report.skipped[name] = reason
        else:
            _register()
            last = module.get_submodule(_ENCODERS.get(known.__name__, ""))
            module.config._attn_implementation = _ATTENTION
            module._sebp_padding_free = (
                module.register_forward_pre_hook(_enter, with_kwargs=True),
                last.register_forward_hook(_leave, with_kwargs=True),
            )
            report.changed.append(name)
    if report.already:
        warnings.warn("runs without padding already: " + ", ".join(report.already), stacklevel=2)
    if not (report.changed or report.already or report.skipped):
        names = ", ".join(sorted((*_ENCODERS, *_DECODERS)))
        report.skipped[type(model).__name__] = f"there is none of {names} in it"
    return report


def runs_padding_free(model: nn.Module) -> bool:
    """Tell whether :func:`padding_free` has changed something in a model."""
    return any(hasattr(module, "_sebp_padding_free") for module in model.modules())


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
    names = []
    for name, module in model.named_modules():
        if hasattr(module, "_sebp_padding_free"):
            for hook in module._sebp_padding_free:
                hook.remove()
            del module._sebp_padding_free
            if module.config._attn_implementation == _ATTENTION:
                module.config._attn_implementation = "sdpa"
            names.append(name or type(module).__name__)
    return names
