# SPDX-License-Identifier: Apache-2.0
"""Sparse layers in a model: memory, and ways to run."""

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from sparse_nets import (  # noqa: E402
    adamw,
    make_bases,
    make_batches,
    make_model,
    make_net,
    sgd,
)
from torch import nn  # noqa: E402

import sebp  # noqa: E402

# --------------------------------------------------------------------------------------------------
# Memory


def test_memory_of_a_fixed_support():
    """Gradient and state at k = 1%: at most 2% of the 12 bytes of full fine-tuning."""
    net = nn.Sequential(nn.Linear(768, 3072), nn.Linear(3072, 768))
    k = 768 * 3072 // 100
    optimizer = sebp.apply_meprop_to_model(net, sgd(net), k, "*", fix_support_after=1)
    net(torch.randn(2, 768)).sum().backward()
    optimizer.step()
    memory = optimizer.bytes()
    full = 12 * sum(layer.weight.numel() for layer in net)
    assert 0 < memory.gradient + memory.state <= 0.02 * full


@pytest.mark.usefixtures("lapack")
def test_memory():
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, 3, layers="*")
    elements = 20 * 12 + 8 * 20
    sums = 4 * (20**2 + 12**2 + 8**2 + 20**2)
    for step in range(4):
        if step == 1:
            # AdamW's own counts of steps take 4 bytes each.
            assert optimizer.bytes() == (4 * elements, 8 * elements + 2 * 4, sums, 0)
        net(torch.randn(9, 12)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    memory = optimizer.bytes()
    assert memory.gradient == 12 * 5 * 2
    assert 16 * 5 * 2 <= memory.state < 8 * elements
    assert (memory.bases, memory.scratch) == (sums, 4 * 20 * 12)


@pytest.mark.usefixtures("lapack")
def test_no_whole_gradient_once_the_support_is_fixed():
    """Nor is there memory for one, but in steps that measure its energy."""
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(
        net, adamw(net), 5, 1, 6, layers="*", fix_support_after=1, measure_energy_every=4
    )
    scratch = []
    for _ in range(5):
        net(torch.randn(9, 12)).sum().backward()
        scratch.append(optimizer.bytes().scratch)
        optimizer.step()
        optimizer.zero_grad()
    whole = 4 * 6 * 6
    assert scratch == [0, whole, 0, whole, 0]
    assert optimizer.bytes().gradient == 4 * 5 * 2


@pytest.mark.parametrize("drop_after", [None, 2])
def test_memory_that_is_bounded(drop_after):
    """Moments of what is chosen in each step, unless dropped, are in the end those of all."""
    net = nn.Sequential(nn.Linear(200, 100, bias=False))
    optimizer = sebp.apply_meprop_to_model(net, adamw(net), 200, "*", drop_after=drop_after)
    moments = optimizer.layers["0"].moments
    for step in range(12):
        (net(torch.randn(9, 200)) * torch.randn(9, 100)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if drop_after and step % 2:
            assert 200 <= moments.count <= 2 * 200
    assert (moments.count > 4 * 200) == (drop_after is None)
    # A table of 2^9 or 2^10 places, and a bit for each.
    assert (optimizer.bytes().state < 17 * 1024) == (drop_after == 2)


@pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (1.5, TypeError)])
def test_bad_intervals_of_dropping(steps, error):
    net = make_net()
    with pytest.raises(error, match="drop_after is"):
        sebp.apply_meprop_to_model(net, adamw(net), 5, "*", drop_after=steps)


# --------------------------------------------------------------------------------------------------
# In a model


def test_release_and_copies():
    net = make_net()
    before = {name: (type(m), set(vars(m))) for name, m in net.named_modules()}
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*", bases=make_bases())
    assert not net[0].weight.requires_grad
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        twin(torch.randn(9, 12)).sum().backward()
    net(torch.randn(9, 12)).sum().backward()
    optimizer.step()
    optimizer.release()
    assert all(p.requires_grad for p in net.parameters())
    assert {name: (type(m), set(vars(m))) for name, m in net.named_modules()} == before
    assert not net[0]._forward_hooks
    net(torch.randn(9, 12)).sum().backward()
    assert net[0].weight.grad is not None


@pytest.mark.parametrize(
    "way", ["plain", "checkpoint", "reentrant", "compile", "aot_eager", "sebp", "keyword"]
)
def test_ways_to_run(way):
    """The step is the same, whatever surrounds the layer, and with no gradient of its input."""
    moved = []
    for run in ("plain", way):
        torch.manual_seed(0)
        np.random.seed(0)
        net = nn.Sequential(nn.Linear(12, 20, bias=False), nn.ReLU(inplace=True), nn.Linear(20, 8))
        if run == "sebp":
            sebp.apply_sebp_to_model(net)
        optimizer = sebp.apply_sparsegrad_to_model(net, sgd(net), 5, layers="*", bases=make_bases())
        x = torch.randn(9, 12)
        forward = net
        if run in ("checkpoint", "reentrant"):
            x.requires_grad_(run == "reentrant")

            def forward(x, net=net, run=run):
                reentrant = run == "reentrant"
                return torch.utils.checkpoint.checkpoint(net, x, use_reentrant=reentrant)

        elif run in ("compile", "aot_eager"):
            forward = torch.compile(net, backend="eager" if run == "compile" else run)
        elif run == "keyword":

            def forward(x, net=net):
                return net[2](input=net[1](net[0](input=x)))

        for _ in range(2):
            forward(x).square().sum().backward()
            optimizer.step()
        moved.append(net[0].weight.detach().clone())
    torch.testing.assert_close(*moved)


@pytest.mark.parametrize("kind", ["weights", "autocast", "autocast to float16"])
@pytest.mark.usefixtures("lapack")
def test_half(kind):
    """Half of the bits: in weights and all else, or where autocast has them."""
    torch.manual_seed(1)
    net = make_net(torch.bfloat16 if kind == "weights" else torch.float32)
    dtype = torch.float16 if kind.endswith("float16") else torch.bfloat16
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net, lr=0.05), 20, 3, layers="*")
    x, target = torch.randn(64, 12), torch.randn(64, 8)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=kind != "weights"):
            y = net(x.to(net[0].weight.dtype))
        loss = (y.float() - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[3] < losses[0]


@pytest.mark.usefixtures("lapack")
def test_trainer(tmp_path):
    """Hugging Face's Trainer steps, schedules, saves and resumes it."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    items = [
        {key: value[i] for key, value in batch.items()}
        for batch in make_batches("bert")
        for i in range(4)
    ]
    finals = []
    for resume in (False, True):
        model = make_model("bert")
        optimizer = sebp.apply_sparsegrad_to_model(model, adamw(model), 30, 2, 12)
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=6,
            save_steps=3,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            seed=1,
        )
        trainer = transformers.Trainer(
            model, arguments, train_dataset=items, optimizers=(optimizer, None)
        )
        last = str(tmp_path / "checkpoint-3") if resume else None
        trainer.train(resume_from_checkpoint=last)
        assert not optimizer.in_basis_phase
        assert optimizer.steps == 6
        finals.append(model.state_dict())
    for key, value in finals[0].items():
        assert torch.equal(value, finals[1][key])
