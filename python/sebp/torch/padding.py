# SPDX-License-Identifier: Apache-2.0
"""Lets the linear layers skip padded tokens in the forward too."""

import inspect
import threading
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef


class _OfThread(threading.local):
    """The padding that the calling thread is in, and those captured, one for each running model."""

    current: "padding | None" = None

    def __init__(self) -> None:
        self.captured: list[tuple[nn.Module, padding | None]] = []


_of_thread = _OfThread()


class padding:  # noqa: N801, a context manager that reads like a function
    """Within it, layers with SEBP compute the rows of real tokens alone.

    It concerns layers whose input is B x L x K, for a mask of B x L. Their outputs are zero at
    padded tokens, and of their inputs the backward keeps the rows of real tokens alone. So the
    model must not let real tokens depend on padded ones: hand it the same mask.

    The backward still looks at dY: a row that the mask leaves out and that has a gradient all the
    same is computed with if its input still exists, and is an error that says so if not.

    With gradient checkpointing, run the backward inside the context too, so that what is computed
    again is computed alike. Under ``torch.compile`` the mask is not used.

    Parameters
    ----------
    attention_mask : Tensor, B x L
        Of any dtype: not zero at real tokens. Padding may be on the left, on the right or between.
    keep_inputs : bool, default False
        Keep whole inputs for the backward: for models with hooks that change gradients.

    Raises
    ------
    TypeError
        If the mask is not a tensor.
    ValueError
        If the mask is not 2-D; and at the end, if layers with SEBP ran but none had an input that
        the mask fits.

    Examples
    --------
    >>> with sebp.padding(batch["attention_mask"]):
    ...     loss = model(**batch).loss
    >>> loss.backward()
    """

    def __init__(self, attention_mask: Tensor, keep_inputs: bool = False) -> None:
        if not isinstance(attention_mask, Tensor):
            raise TypeError(f"the mask is {type(attention_mask).__name__}, not a tensor")
        if attention_mask.dim() != 2:
            raise ValueError(
                f"the mask has shape {tuple(attention_mask.shape)}, not (batch, sequence length)"
            )
        self.shape = tuple(attention_mask.shape)
        self.keep_inputs = keep_inputs
        flags = attention_mask.detach().cpu().reshape(-1) != 0
        self.rows = flags.nonzero().reshape(-1)
        self._is_full = self.rows.numel() == flags.numel()
        self._outer: padding | None = None
        self._last: tuple[TensorWeakRef, int, Tensor] | None = None
        self._fitted = False
        self._misfit: tuple[int, ...] | None = None

    def fits(self, x: Tensor) -> bool:
        """Tell whether a layer's input, ... x K, is B x L x K and has rows to skip."""
        if x.shape[:-1] != self.shape:
            if x.dim() == 3:
                self._misfit = tuple(x.shape)
            return False
        self._fitted = True
        return not self._is_full

    def compact(self, x: Tensor) -> Tensor:
        """Give the rows of real tokens, m x K, of an input B x L x K.

        Layers that follow each other with the same input get the same tensor.
        """
        if self._last is not None:
            last, version, kept = self._last
            if last() is x and version == x._version:
                return kept
        kept = x.detach().reshape(-1, x.shape[-1]).index_select(0, self.rows)
        self._last = (TensorWeakRef(x), x._version, kept)
        return kept

    def skip(self) -> None:
        """Accept that layers run on real tokens alone, as with :func:`~sebp.padding_free`."""
        self._fitted = True

    def __enter__(self) -> "padding":
        self._outer, _of_thread.current = _of_thread.current, self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()
        if error is None and self._misfit is not None and not self._fitted:
            raise ValueError(
                f"the mask has shape {self.shape}, but the layers' inputs {self._misfit}"
            )

    def _leave(self) -> None:
        _of_thread.current, self._outer, self._last = self._outer, None, None


def current_padding() -> padding | None:
    """Give the innermost padding that the calling thread is in.

    Returns
    -------
    padding or None
        None also under ``torch.compile``.
    """
    return None if torch.compiler.is_compiling() else _of_thread.current


def _is_checkpointing(model: nn.Module) -> bool:
    """Ask a model of transformers, of version 5 or before, whether it checkpoints."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if hasattr(model, name):
            return getattr(model, name)
    return False


def _leave_last() -> None:
    _, context = _of_thread.captured.pop()
    if context is not None:
        context._leave()


def _enter_model(model: nn.Module, args: tuple, kwargs: dict) -> None:
    # Hooks behind a forward do not run for a KeyboardInterrupt in it: such a forward ends here.
    while any(running is model for running, _ in _of_thread.captured):
        _leave_last()
    context = None
    # What checkpointing computes again is computed after the model has returned, without the mask.
    if not (torch.compiler.is_compiling() or _is_checkpointing(model)):
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        mask = given.get("attention_mask", given.get("kwargs", {}).get("attention_mask"))
        if isinstance(mask, Tensor) and mask.dim() == 2:
            context = padding(mask).__enter__()
    _of_thread.captured.append((model, context))


def _leave_model(model: nn.Module, args: tuple, output: object) -> None:
    _leave_last()


def capture_padding(model: nn.Module) -> str:
    """Run each forward of a model within the padding that its ``attention_mask`` argument says.

    Parameters
    ----------
    model : nn.Module
        Gets two hooks. A mask that is absent or not B x L is not used, and neither is one under
        gradient checkpointing or ``torch.compile``.

    Returns
    -------
    str
        Why it cannot be done; "" where it was. An encoder-decoder's mask is the encoder's alone.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "the model is an encoder-decoder, whose attention_mask is the encoder's alone"
    if not is_captured(model):
        model._sebp_hooks = (
            model.register_forward_pre_hook(_enter_model, with_kwargs=True),
            model.register_forward_hook(_leave_model, always_call=True),
        )
    return ""


def is_captured(model: nn.Module) -> bool:
    """Tell whether :func:`capture_padding` was done."""
    return hasattr(model, "_sebp_hooks")


def release_padding(model: nn.Module) -> None:
    """Undo :func:`capture_padding`; nothing if it was not done."""
    if is_captured(model):
        for hook in model._sebp_hooks:
            hook.remove()
        del model._sebp_hooks
