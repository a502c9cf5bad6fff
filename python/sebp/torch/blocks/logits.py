# SPDX-License-Identifier: Apache-2.0
"""Logits that are computed when something reads them.

A language model's head gives a logit for each token and each word of the vocabulary, and training
reads them for one thing, the cross-entropy with the labels. :class:`Logits` stands for them until
then. Cross-entropy of them is computed from the hidden states and the head, for labelled tokens
alone, in chunks of the vocabulary. Whatever else is done with them computes them first.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from ..._rules import Rule
from ...core import SebpError
from ..common.devices import autocast_dtype
from ..common.forward import Forward
from ..common.tensors import DTYPES
from ..linear_layers.autograd import dtypes_of, only_wanted, wanted_dtypes
from ..linear_layers.direct import is_plain
from ..linear_layers.linear import sparse_linear
from .loss import linear_cross_entropy

Step = Callable[[Tensor], Tensor]
_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


class _Source:
    """What logits are made of, and what has become of them.

    The head itself is not asked again: it may have other weights by then, as after
    ``torch.func.functional_call``, or others of them may train.

    Parameters
    ----------
    hidden : Tensor, ... x K
    weight : Tensor, V x K
    bias : Tensor, V, or None
    rule : Rule or None
        Which rows of the gradient the head keeps; None where it is PyTorch's own.

    Attributes
    ----------
    dtype : torch.dtype
        The logits'.
    is_computed : bool
        Whether there are logits, which all that follows reads.
    has_loss : bool
        Whether a loss with gradients has been computed without them.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rule: Rule | None
    ) -> None:
        self._rule = rule
        self._is_cast = autocast_dtype(hidden) is not None
        self.dtype = torch.bfloat16 if self._is_cast else hidden.dtype
        # What is frozen now stays so in the graph of these logits.
        self.hidden, self.weight, self.bias = map(_as_it_trains, (hidden, weight, bias))
        self._tensors = [one for one in (hidden, weight, bias) if one is not None]
        self.is_computed = self.has_loss = False
        self._versions, self._sums = self._now(), self._sums_now()

    def _now(self) -> list[tuple[int, int]]:
        return [(one._version, one.data_ptr()) for one in self._tensors]

    def _sums_now(self) -> list[int]:
        """Sum up all bits: who writes to ``.data``, as some optimizers do, leaves no version."""
        return [_sum_of_bits(one.detach()) for one in self._tensors]

    def as_called(self) -> AbstractContextManager:
        """Return the autocast that the head was called in, for a ``with``.

        Raises
        ------
        RuntimeError
            Where what the logits are made of has changed since.
        """
        if self._now() != self._versions or self._sums_now() != self._sums:
            raise RuntimeError(
                "sebp: the logits of this call were not computed, and the weights have changed"
                " since. Read them before the optimizer's step, or prepare(defer_logits=False)"
            )
        device = self.hidden.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self._is_cast)

    def compute(self) -> Tensor:
        """Compute the logits, as the model would have."""
        tensors, logits = (self.hidden, self.weight, self.bias), None
        with self.as_called():
            if self._rule is not None:
                logits = sparse_linear(*tensors, self._rule, False)
            if logits is None:
                logits = functional.linear(*tensors)
        self.is_computed = True
        return logits


def _as_it_trains(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.requires_grad else tensor.detach()


def _sum_of_bits(x: Tensor) -> int:
    """Add a tensor's elements up as integers, many at once where they lie in whole words."""
    x = x.contiguous().flatten()
    bytes_before, size = x.storage_offset() * x.element_size(), x.numel() * x.element_size()
    is_wide = bytes_before % 8 == 0 and size % 8 == 0
    return int(x.view(torch.int64 if is_wide else _INTEGERS[x.dtype]).sum())


class Logits(Tensor):
    """Logits that have not been computed, in some shape.

    It has the shape, the dtype and the place in autograd's graph that they have.

    Attributes
    ----------
    source : _Source
    hidden : Tensor, ... x K
        The source's hidden states, after all that has been done with the logits since.
    """

    source: _Source
    hidden: Tensor
    _parent: "tuple[Logits, Step] | None"
    _numbers: Tensor | None
    _version_then: int

    def numbers(self) -> Tensor:
        """Return these logits as an ordinary tensor, the same each time.

        Raises
        ------
        RuntimeError
            If the weights have changed since, or what these were derived from: it is not known
            whether they would be a copy.
        """
        if self._numbers is None:
            with torch.inference_mode(False), torch.set_grad_enabled(self.requires_grad), _unseen():
                self._numbers = self._compute()
            self._version_then = self._numbers._version
            self._parent = None
        return self._numbers

    def _compute(self) -> Tensor:
        if self._parent is None:
            return self.source.compute()
        parent, step = self._parent
        numbers = parent.numbers()
        if numbers._version != parent._version_then:
            raise RuntimeError(
                "sebp: logits have been changed in place after others were derived from them;"
                " prepare(defer_logits=False) computes them at once"
            )
        return step(numbers)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Answer without logits where that can be done."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        _refuse_gradients(func, args, kwargs)
        found = None
        if func is functional.cross_entropy:
            found = _loss(*args, **kwargs)
        elif func in _STEPS and _may_step(args[0]):
            # What is no step, and what is an error, is up to the operator itself.
            with suppress(RuntimeError, IndexError, TypeError, ValueError):
                found = _STEPS[func](*args, **kwargs)
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
        dtype: torch.dtype,
    ) -> Logits:
        shape = (*hidden.shape[:-1], weight.shape[0])
        ctx.dtypes, ctx.dtype = dtypes_of(hidden, weight, bias), source.dtype
        logits = Tensor._make_wrapper_subclass(Logits, shape, dtype=dtype, device=hidden.device)
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
        return (*only_wanted(found, wanted), *(None,) * 2)


def _make(
    source: _Source,
    hidden: Tensor,
    dtype: torch.dtype,
    parent: tuple[Logits, Step] | None = None,
) -> Logits:
    with _unseen():
        logits = _Defer.apply(hidden, source.weight, source.bias, source, dtype)
    logits.source, logits.hidden, logits._parent = source, hidden, parent
    logits._numbers, logits._version_then = None, 0
    return logits


@contextmanager
def _unseen() -> Iterator[None]:
    """Save tensors past the hooks of others.

    Checkpointing counts what is saved within it, and logits are computed once: it would count less
    when it computes again.
    """
    with ExitStack() as stack:
        with suppress(RuntimeError):  # where hooks are forbidden there are none
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_pack, _unpack))
        yield


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor, tensor._version


def _unpack(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError(
            "sebp: what the gradient of logits is made of has been modified by an inplace operation"
        )
    return tensor


def _computed(value: object) -> object:
    """Replace logits by ordinary tensors, in containers too."""
    if isinstance(value, Logits):
        return value.numbers()
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
    Tensor.__hash__,
}

_GRADIENTS = {Tensor.register_hook, Tensor.retain_grad, Tensor.grad.__get__}


def _refuse_gradients(func: Callable, args: tuple, kwargs: dict) -> None:
    """Raise where the gradient of logits is asked for that a loss was computed without."""
    if func in _GRADIENTS:
        asked = args[:1]
    elif func is torch.autograd.grad:
        asked = args[1]
    elif func is torch.autograd.backward:
        asked = kwargs.get("inputs") or ()
    else:
        return
    if any(isinstance(one, Logits) and one.source.has_loss for one in asked):
        raise RuntimeError(
            "sebp: the loss was computed without these logits, so they get no gradient. Ask for it"
            " before the loss, by a hook or retain_grad(), or prepare(defer_logits=False)"
        )


def _may_step(logits: object) -> bool:
    """Return whether a step can be taken without numbers."""
    is_open = isinstance(logits, Logits) and not logits.source.is_computed
    return is_open and not torch.is_inference_mode_enabled()


def _after(logits: Logits, step: Step, hidden: Tensor, dtype: torch.dtype) -> Logits:
    return _make(logits.source, hidden, dtype, (logits, step))


def _float(logits: Logits) -> Logits:
    if logits.dtype == torch.float32:
        return logits
    return _after(logits, Tensor.float, logits.hidden, torch.float32)


def _to(logits: Logits, *args: object, **kwargs: object) -> Logits | None:
    """To the device, where they are, or to float32."""
    if not kwargs.keys() <= {"device", "dtype"}:
        return None
    result = logits
    for to in (*args, *kwargs.values()):
        if isinstance(to, (str, torch.device)) and _is_there(torch.device(to), logits.device):
            continue
        if not isinstance(to, torch.dtype) or to not in (torch.float32, logits.dtype):
            return None
        result = _float(logits) if to == torch.float32 else logits
    return result


def _is_there(to: torch.device, device: torch.device) -> bool:
    """Return whether moving there moves nothing; without a number it is the current GPU."""
    if to.type == "cuda" and to.index is None:
        to = torch.device("cuda", torch.cuda.current_device())
    return to == device


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
        index = index.clone()  # the caller's may change before it is used again
    else:
        parts = index if isinstance(index, tuple) else (index,)
        if not all(part is Ellipsis or _is_fixed(part) for part in parts):
            return None
        # The last dimension is whole where no part is left for it, or the one for it takes all.
        given = len(parts) - (Ellipsis in parts)
        reaches_last = given == logits.dim() or parts[-1] is not Ellipsis and Ellipsis in parts
        if given > logits.dim() or (reaches_last and parts[-1] != slice(None)):
            return None
    return _after(logits, lambda x: x[index], logits.hidden[index], logits.dtype)


def _is_fixed(part: object) -> bool:
    """Return whether it is a slice, and its bounds are no tensors, which may change."""
    return isinstance(part, slice) and all(
        bound is None or isinstance(bound, int) for bound in (part.start, part.stop, part.step)
    )


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
    if type(target) is not Tensor or target.dtype != torch.int64 or target.device != input.device:
        return None
    if target.shape != input.shape[:1] or weight is not None or reduction not in ("mean", "sum"):
        return None
    if size_average is not None or reduce is not None or not 0 <= label_smoothing <= 1:
        return None
    source = input.source
    tensors = input.hidden, source.weight, source.bias
    if not input.requires_grad:  # they were derived without gradients
        tensors = tuple(None if one is None else one.detach() for one in tensors)
    hidden, head, bias = tensors
    with source.as_called():
        try:
            loss = linear_cross_entropy(
                hidden,
                head,
                target,
                bias,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
            )
        except SebpError:  # a label out of range: PyTorch has an error of its own
            return None
    source.has_loss = source.has_loss or loss.requires_grad
    # Under autocast PyTorch computes this loss in float32.
    return loss if autocast_dtype(target) else loss.to(input.dtype)


# --------------------------------------------------------------------------------------------------
# Heads


def head_forward(forward: Forward, *args: object, **kwargs: object) -> Tensor:
    """Replace the forward of a language model's head, in training: give :class:`Logits`."""
    head = forward.module
    is_usual = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
    if torch.compiler.is_compiling() or not is_usual or not _is_in_training(head):
        return forward.original(*args, **kwargs)
    (hidden,), weight, bias = args, head.weight, head.bias
    if not _can_defer(hidden, weight, bias):
        return forward.original(hidden)
    source = _Source(hidden, weight, bias, vars(head).get("sebp_rule"))
    return _make(source, source.hidden, source.dtype)


def _is_in_training(head: nn.Module) -> bool:
    return head.training and torch.is_grad_enabled() and type(head) is nn.Linear


def _can_defer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = [one for one in (hidden, weight, bias) if one is not None]
    if cast := autocast_dtype(hidden):
        has_dtypes = cast == torch.bfloat16
    else:
        has_dtypes = all(one.dtype == hidden.dtype for one in tensors)
    return (
        has_dtypes
        and is_plain(*tensors)
        and all(one.dtype in DTYPES for one in tensors)
        and hidden.dim() > 1
        and hidden.shape[-1] == weight.shape[1]
        and any(one.requires_grad for one in tensors)
    )
