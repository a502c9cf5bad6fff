# SPDX-License-Identifier: Apache-2.0
"""One forward and backward of a model, which leaves it as it was."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

Batch = Mapping[str, object] | Sequence[object] | Tensor
Loss = Callable[[object], Tensor]


class Step(nn.Module):
    """A forward and a backward, as a module, so that both see the parameters it is given.

    Parameters
    ----------
    model : nn.Module
    loss : callable, optional
        Computes a scalar loss from what the model returned. Default: its ``loss``, or the scalar
        that it is.
    """

    def __init__(self, model: nn.Module, loss: Loss | None = None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss or _loss_of

    def forward(self, batch: Batch) -> Tensor:
        """Run both.

        Returns
        -------
        Tensor
            The loss, detached.

        Raises
        ------
        TypeError
            If the batch is nothing to call a model with.
        ValueError
            If there is no scalar loss, or nothing that it depends on can be trained.
        """
        if isinstance(batch, Mapping):
            output = self.model(**batch)
        elif isinstance(batch, Tensor):
            output = self.model(batch)
        elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
            output = self.model(*batch)
        else:
            raise TypeError(
                f"the batch is a {type(batch).__name__}, not a mapping, a sequence or a Tensor"
            )
        loss = self.loss(output)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError("loss= returned no Tensor of one element")
        if not loss.requires_grad:
            raise ValueError("the loss has no gradient: nothing that it depends on is trained")
        loss.backward()
        return loss.detach()


def _loss_of(output: object) -> Tensor:
    """Find the loss in what a model returned."""
    loss = output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif not isinstance(output, Tensor):
        loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(
            "the model returned no loss. A model of transformers needs labels in the batch; for any"
            " other say how it is computed: loss=lambda output: ..."
        )
    return loss


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the state of all random number generators."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def stand_ins(model: nn.Module) -> dict[str, Tensor]:
    """Make tensors to run a model with instead of its parameters and buffers.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    dict of str to Tensor
        For ``torch.func.functional_call``: those of :func:`parameters_for`, whose gradients are
        dropped at once, and copies of the buffers.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return buffers | parameters_for(model)


def parameters_for(model: nn.Module, keep_gradients: bool = False) -> dict[str, Tensor]:
    """Make tensors to run a model with instead of its parameters.

    Parameters
    ----------
    model : nn.Module
    keep_gradients : bool, default False
        Whether they keep their gradients, or drop them at once.

    Returns
    -------
    dict of str to Tensor
        They share the parameters' memory, but not their gradients and hooks.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        leaf = parameter.detach().requires_grad_(parameter.requires_grad)
        if leaf.requires_grad and not keep_gradients:
            leaf.register_post_accumulate_grad_hook(_drop_gradient)
        tensors[name] = leaf
    return tensors


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model itself, without what DistributedDataParallel or a compiler put around it."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model
