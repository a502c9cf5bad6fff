# SPDX-License-Identifier: Apache-2.0
"""Replicas that ``DataParallel`` makes of a prepared model compute with their own parameters."""

import copy

import pytest
import torch
from torch import nn

import sebp

pytest.importorskip("transformers", minversion="5")
from families import make_batch, make_model  # noqa: E402


def replicate(model, factor):
    """Do what ``torch.nn.parallel.replicate`` does on GPUs, with parameters times a factor."""
    modules = list(model.modules())
    replicas = {id(one): one._replicate_for_data_parallel() for one in modules}
    for one in modules:
        replica = replicas[id(one)]
        for name, child in one._modules.items():
            setattr(replica, name, replicas[id(child)])
        for name, parameter in one._parameters.items():
            setattr(replica, name, None if parameter is None else factor * parameter)
    return replicas[id(model)]


@pytest.mark.parametrize(
    ("name", "head"),
    [("bert", "seq"), ("llama", "lm"), ("t5_encoder", "tok"), ("mpnet", "tok"), ("gpt2", "lm")],
)
def test_replicas_have_parameters_of_their_own(name, head):
    plain, batch = make_model(name, head).train(), make_batch(name, head, "right", 1)
    ours = copy.deepcopy(plain)
    before = {key: set(vars(one)) for key, one in ours.named_modules()}
    prepared = sebp.prepare(ours, defer_logits=True, quiet=True)
    assert prepared.padding.changed and prepared.layers.replaced
    for model in (ours, copy.deepcopy(ours)):
        found = []
        for one in (plain, model):
            one.zero_grad()
            loss = replicate(one, 1.1)(**batch).loss
            loss.backward()
            found.append((loss.detach(), *(p.grad for p in one.parameters())))
        for gradient, right in zip(*found, strict=True):
            torch.testing.assert_close(gradient, right)
    prepared.undo()
    assert {key: set(vars(one)) for key, one in ours.named_modules()} == before


def test_a_forward_that_was_there_before_stays_in_replicas():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.GELU())
    model[1].forward = lambda x: 7 * x
    sebp.prepare(model, quiet=True)
    x = torch.randn(2, 3)
    torch.testing.assert_close(replicate(model, 2)(x), 7 * nn.Linear.forward(layer, x) * 2)
