# SPDX-License-Identifier: Apache-2.0
"""Logits that are computed when something reads them.

A language model's head gives a logit for each token and each word of the vocabulary, and training
reads them for one thing, the cross-entropy with the labels. :class:`Logits` stands for them until
then. Cross-entropy of them is computed from the hidden states and the head, for labelled tokens
alone, in chunks of the vocabulary. Whatever else is done with them computes them first.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from ..._rules import Rule
from ..autograd import dtypes_of, only_wanted, wanted_dtypes
from ..direct import is_plain
from ..forward import Forward
from ..tensors import DTYPES
from .loss import linear_cross_entropy

Step = Callable[[Tensor], Tensor]


class _Source:
    """What logits are made of, and the logits once there are any.

    Parameters
    ----------
    compute : callable
        Computes the logits from `hidden`.
    hidden : Tensor, ... x K
    weight : Tensor, V x K
    bias : Tensor, V, or None

    Attributes
    ----------
    dtype : torch.dtype
        The logits'.
    """

    def __init__(
        self,
        compute: Callable[[Tensor], Tensor],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> None:
        self._compute = compute
        self._is_cast = torch.is_autocast_enabled("cpu")
        self.dtype = torch.bfloat16 if self._is_cast else hidden.dtype
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self._versions = self._now()
        self._value: Tensor | None = None
        self._version = 0

    def _now(self) -> list[int]:
        tensors = (self.hidden, self.weight, self.bias)
        return [0 if one is None else one._version for one in tensors]

    @property
    def is_computed(self) -> bool:
        """Whether there are logits."""
        return self._value is not None

    def as_called(self) -> AbstractContextManager:
        """Return the autocast that the head was called in, for a ``with``.

        Raises
        ------
        RuntimeError
            Where what the logits are made of has changed since.
        """
        if self._now() != self._versions:
            raise RuntimeError(
                "sebp: the logits of this call were not computed, and the weights have changed"
                " since. Read them before the optimizer's step, or prepare(defer_logits=False)"
            )
        return torch.autocast("cpu", torch.bfloat16, enabled=self._is_cast)

    def value(self, is_last: bool) -> Tensor:
        """Compute the logits, as the model would have.

        Parameters
        ----------
        is_last : bool
            Whether no step follows.

        Returns
        -------
        Tensor, ... x V

        Raises
        ------
        RuntimeError
            If the weights have changed since; if a step follows and the logits have: it is not
            known whether the step was a copy.
        """
        if self._value is None:
            with torch.enable_grad(), self.as_called():
                self._value = self._compute(self.hidden)
            self._version = self._value._version
        if not is_last and self._value._version != self._version:
            raise RuntimeError(
                "sebp: logits have been changed in place after others were derived from them;"
                " prepare(defer_logits=False) computes them at once"
            )
        return self._value


class Logits(Tensor):
    """Logits that have not been computed, in some shape.

    It has the shape, the dtype and the place in autograd's graph that they have.

    Attributes
    ----------
    source : _Source
    steps : tuple of callable
        What has been done with the source's logits since.
    hidden : Tensor, ... x K
        The source's hidden states, after the same steps.
    """

    source: _Source
    steps: tuple[Step, ...]
    hidden: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Answer without logits where that can be done."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = None
        if func is functional.cross_entropy:
            found = _loss(*args, **kwargs)
        elif func in _STEPS and isinstance(args[0], Logits) and not args[0].source.is_computed:
            found = _STEPS[func](args[0], *args[1:], **kwargs)
        return func(*_computed(args), **_computed(kwargs)) if found is None else found

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Compute with the values, where an operator is called past ``__torch_function__``."""
        return func(*_computed(args), **_computed(kwargs or {}))


class _Defer(torch.autograd.Function):
    """Logits from hidden states and a head, but for their values."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        source: _Source,
        steps: tuple[Step, ...],
        dtype: torch.dtype,
    ) -> Logits:
        shape = (*hidden.shape[:-1], weight.shape[0])
        ctx.dtypes, ctx.dtype = dtypes_of(hidden, weight, bias), source.dtype
        logits = Tensor._make_wrapper_subclass(Logits, shape, dtype=dtype, device="cpu")
        ctx.save_for_backward(hidden, weight)
        return logits

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        wanted = wanted_dtypes(ctx.needs_input_grad, ctx.dtypes)
        total = dy.numel() // dy.shape[-1] if dy.shape[-1] else 0
        found = torch.ops.sebp.linear_backward(
            dy.to(ctx.dtype), hidden, weight, total, False, *Rule(), *wanted
        )
        return (*only_wanted(found, wanted), *(None,) * 3)


def _make(source: _Source, steps: tuple[Step, ...], hidden: Tensor, dtype: torch.dtype) -> Logits:
    with torch.enable_grad():
        logits = _Defer.apply(hidden, source.weight, source.bias, source, steps, dtype)
    logits.source, logits.steps, logits.hidden = source, steps, hidden
    return logits


def _computed(value: object) -> object:
    """Replace logits by ordinary tensors, in containers too."""
    if isinstance(value, Logits):
        result = value.source.value(not value.steps)
        for step in value.steps:
            result = step(result)
        return result
    if isinstance(value, dict):
        return {key: _computed(one) for key, one in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_computed(one) for one in value)
    return value


# --------------------------------------------------------------------------------------------------
# What can be done without logits


_METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in (
            "shape",
            "dtype",
            "device",
            "layout",
            "ndim",
            "is_cpu",
            "is_cuda",
            "is_sparse",
            "is_quantized",
            "is_leaf",
            "requires_grad",
            "grad_fn",
            "_version",
        )
    ),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.nelement,
    Tensor.__len__,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.element_size,
}


def _after(logits: Logits, step: Step, hidden: Tensor, dtype: torch.dtype) -> Logits:
    return _make(logits.source, (*logits.steps, step), hidden, dtype)


def _float(logits: Logits) -> Logits:
    if logits.dtype == torch.float32:
        return logits
    return _after(logits, Tensor.float, logits.hidden, torch.float32)


def _to(logits: Logits, *args: object, **kwargs: object) -> Logits | None:
    """To the CPU, where they are, or to float32."""
    if kwargs or len(args) != 1:
        return None
    (to,) = args
    if to == torch.float32 or to == logits.dtype:
        return _float(logits) if to == torch.float32 else logits
    is_here = isinstance(to, (str, torch.device)) and torch.device(to) == logits.device
    return logits if is_here else None


def _contiguous(logits: Logits) -> Logits:
    return _after(logits, Tensor.contiguous, logits.hidden.contiguous(), logits.dtype)


def _reshape(logits: Logits, *shape: object) -> Logits | None:
    """To rows of logits again; the hidden states are reshaped alike."""
    if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)):
        shape = tuple(shape[0])
    classes = logits.shape[-1]
    if not all(isinstance(size, int) for size in shape) or not shape or shape[-1] != classes:
        return None
    if -1 in shape and classes == 0:
        return None
    hidden = logits.hidden.reshape(*shape[:-1], logits.hidden.shape[-1])
    return _after(logits, lambda x: x.reshape(shape), hidden, logits.dtype)


def _flatten(logits: Logits, start_dim: int = 0, end_dim: int = -1) -> Logits | None:
    last = logits.dim() - 1
    end_dim = end_dim + last + 1 if end_dim < 0 else end_dim
    if end_dim >= last or start_dim < 0:
        return None
    hidden = logits.hidden.flatten(start_dim, end_dim)
    return _after(logits, lambda x: x.flatten(start_dim, end_dim), hidden, logits.dtype)


def _take(logits: Logits, index: object) -> Logits | None:
    """Take tokens: by slices of all dimensions but the last, or by a mask of them."""
    if isinstance(index, Tensor):
        if type(index) is not Tensor or index.dtype != torch.bool:
            return None
        if index.shape != logits.shape[:-1]:
            return None
    else:
        parts = index if isinstance(index, tuple) else (index,)
        if not all(part is Ellipsis or isinstance(part, slice) for part in parts):
            return None
        # The last dimension is whole where no part is left for it, or the one for it takes all.
        given = len(parts) - (Ellipsis in parts)
        reaches_last = given == logits.dim() or parts[-1] is not Ellipsis and Ellipsis in parts
        if given > logits.dim() or (reaches_last and parts[-1] != slice(None)):
            return None
    return _after(logits, lambda x: x[index], logits.hidden[index], logits.dtype)


_STEPS = {
    Tensor.float: _float,
    Tensor.to: _to,
    Tensor.contiguous: _contiguous,
    Tensor.view: _reshape,
    Tensor.reshape: _reshape,
    Tensor.flatten: _flatten,
    Tensor.__getitem__: _take,
}


def _loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """Compute ``torch.nn.functional.cross_entropy``, or None where it wants logits."""
    if not isinstance(input, Logits) or input.source.is_computed or input.dim() != 2:
        return None
    if type(target) is not Tensor or target.dtype != torch.int64 or not target.is_cpu:
        return None
    if target.shape != input.shape[:1] or weight is not None or reduction not in ("mean", "sum"):
        return None
    if size_average is not None or reduce is not None or not 0 <= label_smoothing <= 1:
        return None
    source = input.source
    with source.as_called():
        loss = linear_cross_entropy(
            input.hidden,
            source.weight,
            target,
            source.bias,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    return loss.to(input.dtype)


# --------------------------------------------------------------------------------------------------
# Heads


def head_forward(forward: Forward, hidden: Tensor) -> Tensor:
    """Replace the forward of a language model's head, in training: give :class:`Logits`."""
    head = forward.module
    if torch.compiler.is_compiling() or not _can_defer(head, hidden):
        return forward.original(hidden)
    source = _Source(forward.original, hidden, head.weight, head.bias)
    return _make(source, (), hidden, source.dtype)


def _can_defer(head: nn.Module, hidden: Tensor) -> bool:
    if not (head.training and torch.is_grad_enabled() and type(head) is nn.Linear):
        return False
    tensors = [one for one in (hidden, head.weight, head.bias) if one is not None]
    if torch.is_autocast_enabled("cpu"):
        has_dtypes = torch.get_autocast_dtype("cpu") == torch.bfloat16
    else:
        has_dtypes = all(one.dtype == hidden.dtype for one in tensors)
    return (
        has_dtypes
        and is_plain(*tensors)
        and all(one.dtype in DTYPES for one in tensors)
        and hidden.dim() > 1
        and hidden.shape[-1] == head.weight.shape[1]
        and any(one.requires_grad for one in tensors)
    )
