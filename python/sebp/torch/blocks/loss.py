# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of hidden states and a head, without all of the logits at once."""

import ctypes
import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..._structs import PRECISION_MEDIUM, CrossEntropyOptions
from ..common.context import context_of
from ..common.devices import autocast_dtype
from ..common.tensors import matrix_of
from ..linear_layers.direct import has_numbers


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute the cross-entropy of the logits hidden W^T + b, of labelled rows alone.

    The vocabulary is walked along in chunks, so that memory does not grow with it. Gradients are
    computed in the forward, where the logits are at hand.

    Parameters
    ----------
    hidden : Tensor, ... x K
        float32 or bfloat16, on the CPU or on a GPU that the library can work on, as all others are.
        Under autocast to bfloat16 what is of float32 is rounded while it is read.
    weight : Tensor, V x K
        float32 or bfloat16.
    labels : int64 Tensor, of the leading dimensions of `hidden`
    bias : Tensor, V, optional
    ignore_index : int
        The label of rows that do not count.
    reduction : "mean" or "sum"
        Over labelled rows.
    label_smoothing : float
        In [0, 1].

    Returns
    -------
    Tensor
        A float32 number; NaN for the mean over no rows, as PyTorch has it.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not go together, or for `reduction`.
    SebpError
        If a label or `label_smoothing` is out of range.
    RuntimeError
        In a backward of the backward.
    """
    if labels.dtype != torch.int64 or labels.device != hidden.device:
        raise TypeError(
            f"labels are {labels.dtype} on {labels.device}, not int64 on {hidden.device}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels are {tuple(labels.shape)}, hidden {tuple(hidden.shape)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction is {reduction!r}, not "mean" or "sum"')
    labels = labels.flatten().contiguous()
    count = int((labels != ignore_index).sum()) if reduction == "mean" else 1
    options = CrossEntropyOptions(
        ctypes.sizeof(CrossEntropyOptions), ignore_index, label_smoothing, 1 / max(count, 1)
    )
    if autocast_dtype(hidden) == torch.bfloat16:
        options.precision = PRECISION_MEDIUM
    loss = _CrossEntropy.apply(hidden, weight, bias, labels, options)
    return loss if count > 0 else loss + math.nan


def _compute(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    options: CrossEntropyOptions,
    needs: tuple[bool, ...],
) -> tuple[float, list[Tensor | None]]:
    """Compute the loss, and the gradients of the first three that are needed."""
    loss = ctypes.c_double()
    # Over chunks of the vocabulary that of `hidden` is summed up: in float32, not in bfloat16.
    dtypes = (torch.float32, weight.dtype, None if bias is None else bias.dtype)
    inputs = (hidden, weight, bias)
    gradients = [
        one.new_empty(one.shape, dtype=dtype) if needed else None
        for one, dtype, needed in zip(inputs, dtypes, needs, strict=True)
    ]
    context_of(*inputs, labels).call(
        "sebp_linear_cross_entropy",
        *(None if one is None else matrix_of(one) for one in inputs),
        labels.data_ptr(),
        options,
        loss,
        *(None if one is None else matrix_of(one) for one in gradients),
    )
    if gradients[0] is not None:
        gradients[0] = gradients[0].to(hidden.dtype)
    return loss.value, gradients


class _CrossEntropy(torch.autograd.Function):
    """The loss, as `options` scale it."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: CrossEntropyOptions,
    ) -> Tensor:
        needs = ctx.needs_input_grad[:3]
        loss, gradients = _compute(hidden, weight, bias, labels, options, needs)
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.options, ctx.gradients = options, gradients
        return torch.tensor(loss, dtype=torch.float32, device=hidden.device)

    @staticmethod
    def backward(ctx: FunctionCtx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "sebp's cross-entropy has no second derivatives; those of the logits have them:"
                " sebp.prepare(model, defer_logits=False)"
            )
        inputs, gradients = ctx.saved_tensors, ctx.gradients
        ctx.gradients = None  # one reference less, so that autograd need not copy them
        if gradients is None:  # a second backward
            _, gradients = _compute(*inputs, ctx.options, ctx.needs_input_grad[:3])
        if not has_numbers(dloss):  # others step in, as with batched gradients
            gradients = [None if one is None else one * dloss.to(one.dtype) for one in gradients]
        elif not dloss.is_cpu:  # whose value is not known without a wait for the GPU
            gradients = [None if one is None else one.mul_(dloss) for one in gradients]
        elif (factor := float(dloss)) != 1:
            gradients = [None if one is None else one.mul_(factor) for one in gradients]
        return (*gradients, None, None)
