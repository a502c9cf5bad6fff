# SPDX-License-Identifier: Apache-2.0
"""Fixed masks in PyTorch: steps, which elements, checkpoints, memory."""

import copy
import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from mask_nets import (  # noqa: E402
    EPS,
    LR,
    NEAR,
    adamw,
    bits,
    draw_batch,
    draw_masks,
    loss_of,
    make_net,
    same,
)
from sparse_nets import backward  # noqa: E402
from torch import nn  # noqa: E402

import sebp  # noqa: E402

try:
    from models import make_batch, make_model
except ImportError:
    make_batch = make_model = None

# --------------------------------------------------------------------------------------------------
# Steps


class Adam:
    """AdamW in double precision on the elements of a matrix where a mask is 1."""

    def __init__(self, value, mask, decay):
        self.value, self.mask, self.decay = value.detach().double().numpy().copy(), mask, decay
        self.m, self.v = np.zeros_like(self.value), np.zeros_like(self.value)

    def step(self, gradient, t):
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        move = self.m / (1 - 0.9**t) / (np.sqrt(self.v / (1 - 0.999**t)) + EPS)
        self.value = self.value - self.mask * LR * (move + self.decay * self.value)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_ten_steps_in_double_precision(decay):
    net = make_net()
    before = copy.deepcopy(net)
    masks = draw_masks(net)
    optimizer = sebp.apply_sparse_mask_to_model(net, adamw(net, weight_decay=decay), 32, masks)
    w0, b0, w2, b2 = twins = [
        Adam(value, masks[name.split(".")[0]].numpy() if "weight" in name else 1.0, decay)
        for name, value in net.named_parameters()
    ]
    for t in range(1, 11):
        x, target, real = draw_batch()
        optimizer.zero_grad()
        loss_of(net, x, target, real).backward()
        assert net[0].weight.grad is net[2].weight.grad is None
        optimizer.step()
        x, target, real = (one.double().numpy() for one in (x, target, real))
        hidden = x @ w0.value.T + b0.value
        dy = real * (np.maximum(hidden, 0) @ w2.value.T + b2.value - target)
        d_hidden = dy @ w2.value * (hidden > 0)
        gradients = d_hidden.T @ x, d_hidden.sum(0), dy.T @ np.maximum(hidden, 0), dy.sum(0)
        for twin, gradient in zip(twins, gradients, strict=True):
            twin.step(gradient, t)
    for (name, ours), twin in zip(net.named_parameters(), twins, strict=True):
        np.testing.assert_allclose(ours.detach().double(), twin.value, **NEAR)
        old = before.get_parameter(name).detach()
        assert (ours.detach() - old).abs().max() > 5 * LR
        if "weight" in name:
            mask = masks[name.split(".")[0]]
            assert torch.equal(bits(ours)[~mask], bits(old)[~mask])
            assert (bits(ours) != bits(old))[mask].all()


def test_ten_steps_of_peft():
    """PEFT's SHiRA with the same mask: its difference from the base trains by Adam from zero."""
    peft = pytest.importorskip("peft")
    net = make_net()
    for layer in (net[0], net[2]):
        layer.bias.requires_grad_(False)
    config = peft.ShiraConfig(r=1, target_modules=["0", "2"], random_seed=3)
    theirs = peft.get_peft_model(copy.deepcopy(net), config)
    layers = {name: theirs.base_model.model.get_submodule(name) for name in ("0", "2")}
    masks = {}
    for name, layer in layers.items():
        rows, cols = layer.shira_indices["default"].long()
        masks[name] = rows * layer.in_features + cols
    ours = sebp.apply_sparse_mask_to_model(net, adamw(net), 32, masks)
    other = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=LR, eps=EPS, weight_decay=0.0
    )
    before = [layer.weight.detach().clone() for layer in (net[0], net[2])]
    for _ in range(10):
        batch = draw_batch()
        for model, optimizer in ((net, ours), (theirs, other)):
            optimizer.zero_grad()
            loss_of(model, *batch).backward()
            optimizer.step()
    merged = theirs.merge_and_unload()
    for at, old in zip((0, 2), before, strict=True):
        assert (net[at].weight - old).abs().max() > 5 * LR
        assert ((merged[at].weight != old) == (net[at].weight != old)).float().mean() > 0.99
        torch.testing.assert_close(net[at].weight, merged[at].weight, **NEAR)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("with_sebp", [False, True])
def test_models(name, with_sebp):
    """The kept elements are those of PyTorch's gradient, on padded texts, and for ``Conv1D``."""
    pytest.importorskip("transformers")
    model, twin = make_model(name), make_model(name)
    if with_sebp:
        sebp.apply_sebp_to_model(model)
    optimizer = sebp.apply_sparse_mask_to_model(model, adamw(model), 50)
    batch = make_batch(name, 1)
    model(**batch).loss.backward()
    twin(**batch).loss.backward()
    assert len(optimizer.layers) >= 4
    for layer_name, layer in optimizer.layers.items():
        support = optimizer.supports()[layer_name]
        want = twin.get_submodule(layer_name).weight.grad.flatten()[support]
        assert want.count_nonzero() > 25
        torch.testing.assert_close(torch.from_numpy(layer.gradient.values), want)
        assert layer.weight.grad is None
    for (one, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=one)


@pytest.mark.parametrize("mask", ["random", "gradient"])
def test_accumulation(mask):
    """Two backwards are one of both batches: exactly, as all numbers are small integers."""
    nets = [nn.Sequential(nn.Linear(12, 20)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    batches = [torch.randint(-3, 4, (2, 9, n)).float() for n in (12, 20)]
    moved = []
    for net, joint in zip(nets, (False, True), strict=True):
        optimizer = sebp.apply_sparse_mask_to_model(net, adamw(net), 30, mask, "*")
        for _ in range(2):
            if joint:
                pairs = [[one.flatten(0, 1) for one in batches]]
            else:
                pairs = zip(*batches, strict=True)
            for x, dy in pairs:
                (net(x) * dy).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append(net[0].weight.detach())
    assert torch.equal(*map(bits, moved))
    assert not torch.equal(moved[0], make_net()[0].weight)


@pytest.mark.parametrize("way", ["checkpoint", "compile", "twice"])
def test_ways_to_run(way):
    nets = [make_net(), make_net()]
    nets[1].load_state_dict(nets[0].state_dict())
    x, target, real = draw_batch()
    for net in nets:
        optimizer = sebp.apply_sparse_mask_to_model(net, adamw(net), 32, layers="*")
        forward = net
        if net is nets[1] and way == "checkpoint":

            def forward(x, net=net):
                return torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)

        elif net is nets[1] and way == "compile":
            forward = torch.compile(net, backend="eager")
        for _ in range(2):
            optimizer.zero_grad()
            if way == "twice" and net is nets[1]:  # the same layers in two calls of one backward
                (
                    loss_of(forward, x[:20], target[:20], real[:20])
                    + loss_of(forward, x[20:], target[20:], real[20:])
                ).backward()
            else:
                loss_of(forward, x, target, real).backward()
            optimizer.step()
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), **NEAR)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_bfloat16(decay):
    """Each kept element is rounded once; the others keep their bits."""
    net = make_net(torch.bfloat16)
    before = copy.deepcopy(net)
    optimizer = sebp.apply_sparse_mask_to_model(
        net, adamw(net, lr=0.05, eps=1e-8, weight_decay=decay), 32, layers="*"
    )
    dy = torch.randn(40, 12).bfloat16()
    (net(torch.randn(40, 12).bfloat16()) * dy).sum().backward()
    signs = {name: np.sign(one.gradient.values) for name, one in optimizer.layers.items()}
    optimizer.step()
    for name, support in optimizer.supports().items():
        new, old = (model.get_submodule(name).weight.detach() for model in (net, before))
        kept = old.flatten()[support].double()
        step = torch.from_numpy(0.05 * signs[name])
        want = kept - step - 0.05 * decay * kept
        # Half a unit in the last of 8 places, and f32's rounding of the step.
        assert ((new.flatten()[support].double() - want).abs() <= want.abs() * 2**-8 + 1e-6).all()
        assert (step != 0).sum() > 20
        others = torch.ones(new.numel(), dtype=torch.bool)
        others[support] = False
        assert torch.equal(bits(new).flatten()[others], bits(old).flatten()[others])


# --------------------------------------------------------------------------------------------------
# Which elements


def supports_of(net, **options):
    optimizer = sebp.apply_sparse_mask_to_model(net, adamw(net), 32, layers="*", **options)
    found = optimizer.supports()
    optimizer.release()
    return found


def test_random_masks():
    net = make_net()
    first, again, other = (supports_of(net, seed=seed) for seed in (4, 4, 5))
    for name in ("0", "2"):
        np.testing.assert_array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])
        assert first[name].size == 32 and (np.diff(first[name]) > 0).all()
    assert not np.array_equal(first["0"], first["2"])
    alone = sebp.apply_sparse_mask_to_model(net, adamw(net), 32, layers=["2"], seed=4)
    np.testing.assert_array_equal(alone.supports()["2"], first["2"])


def test_random_masks_are_even():
    """Each element is drawn k / (N K) of the times: within six standard deviations."""
    net = nn.Sequential(nn.Linear(4, 5))
    count, draws = np.zeros(20), 400
    for seed in range(draws):
        optimizer = sebp.apply_sparse_mask_to_model(net, adamw(net), 5, layers="*", seed=seed)
        count[optimizer.supports()["0"]] += 1
        optimizer.release()
    assert (abs(count - draws / 4) < 6 * np.sqrt(draws * 0.25 * 0.75)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_magnitudes(dtype):
    net = make_net(dtype)
    for name, support in supports_of(net, mask="magnitude").items():
        size = net.get_submodule(name).weight.detach().float().abs().flatten()
        others = np.setdiff1d(np.arange(size.numel()), support)
        assert size[support].min() >= size[others].max()


@pytest.mark.parametrize("steps", [1, 3])
def test_largest_gradients(steps):
    """The weights stand still while gradients are summed, and all else trains."""
    net = make_net()
    before = copy.deepcopy(net)
    optimizer = sebp.apply_sparse_mask_to_model(
        net, adamw(net, weight_decay=0.1), 32, "gradient", "*", gradient_steps=steps
    )
    sums = {"0": 0.0, "2": 0.0}
    for step in range(1, steps + 1):
        assert not optimizer.is_chosen
        with pytest.raises(RuntimeError, match=f"{steps} steps, of which {step - 1} were taken"):
            optimizer.supports()
        twin = copy.deepcopy(net)
        for layer in (twin[0], twin[2]):
            layer.weight.requires_grad_(True)
        for _ in range(2):
            batch = draw_batch()
            loss_of(net, *batch).backward()
            loss_of(twin, *batch).backward()
        for name in sums:
            sums[name] += twin.get_submodule(name).weight.grad
        optimizer.step()
        optimizer.zero_grad()
        for name in sums:
            assert torch.equal(net.get_submodule(name).weight, before.get_submodule(name).weight)
            assert not torch.equal(net.get_submodule(name).bias, before.get_submodule(name).bias)
    assert optimizer.is_chosen
    for name, total in sums.items():
        want = total.abs().flatten().topk(32).indices.sort().values
        np.testing.assert_array_equal(optimizer.supports()[name], want)
    loss_of(net, *draw_batch()).backward()
    optimizer.step()
    for name, support in optimizer.supports().items():
        moved = bits(net.get_submodule(name).weight) != bits(before.get_submodule(name).weight)
        np.testing.assert_array_equal(np.flatnonzero(moved.flatten().numpy()), support)


def test_snapshot_while_choosing():
    """A state that was taken is not changed by later steps."""
    net = nn.Sequential(nn.Linear(12, 20))
    optimizer = sebp.apply_sparse_mask_to_model(
        net, adamw(net), 9, "gradient", "*", gradient_steps=3
    )
    states = []
    for seed in range(2):
        backward(net, seed)
        optimizer.step()
        states.append(optimizer.state_dict()["sebp"]["masks"]["0"])
    assert [state["steps_seen"] for state in states] == [1, 2]
    assert not torch.equal(states[0]["sums"], states[1]["sums"])


def test_layer_without_gradient_waits():
    """Elements cannot be chosen by a gradient that is not there."""
    net = make_net()
    optimizer = sebp.apply_sparse_mask_to_model(net, adamw(net), 32, "gradient", "*")
    net[2](torch.randn(5, 20)).square().sum().backward()
    optimizer.step()
    assert [one.is_chosen for one in optimizer.layers.values()] == [False, True]
    optimizer.zero_grad()
    loss_of(net, *draw_batch()).backward()
    optimizer.step()
    assert optimizer.is_chosen


def test_forms_of_own_masks():
    net = make_net()
    masks = draw_masks(net)
    listed = {name: torch.flatten(mask).nonzero().flatten() for name, mask in masks.items()}
    forms = [
        masks,
        {name: mask.numpy() for name, mask in masks.items()},
        listed,
        {name: indices.tolist() for name, indices in listed.items()},
        {name: indices.numpy().astype(np.uint16) for name, indices in listed.items()},
    ]
    for form in forms:
        for k in (32, None):
            optimizer = sebp.apply_sparse_mask_to_model(net, adamw(net), k, form)
            for name, support in optimizer.supports().items():
                np.testing.assert_array_equal(support, listed[name])
            optimizer.release()
    # Each layer with a number of its own, of the layers that have a mask.
    optimizer = sebp.apply_sparse_mask_to_model(net, adamw(net), None, {"2": [7]})
    assert {name: one.size for name, one in optimizer.supports().items()} == {"2": 1}
    assert net[0].weight.requires_grad and not net[2].weight.requires_grad


# --------------------------------------------------------------------------------------------------
# Checkpoints


def run(net, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = loss_of(net, *draw_batch())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def start(mask, **options):
    torch.manual_seed(0)
    net = make_net()
    k = 32
    if mask == "own":
        mask, k = {"0": [1, 5, 9], "2": [0, 239]}, None
    return net, sebp.apply_sparse_mask_to_model(net, adamw(net), k, mask, "*", **options)


@pytest.mark.parametrize("stop", [0, 2, 5])
@pytest.mark.parametrize("mask", ["random", "gradient", "own"])
def test_resume(mask, stop):
    """A resumed run goes on bit for bit, also within the steps that choose, and so its adapter."""
    net, optimizer = start(mask, gradient_steps=4)
    run(net, optimizer, stop)
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    want = run(net, optimizer, 6, stop)
    file.seek(0)
    again, resumed = start(mask, gradient_steps=9, seed=8)
    run(again, resumed, 3)  # of another mask, with a gradient of its own
    loss_of(again, *draw_batch()).backward()
    saved = torch.load(file)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.steps == stop
    assert run(again, resumed, 6, stop) == want
    for one, other in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(bits(one), bits(other))
    adapters = [one.adapter() for one in (optimizer, resumed)]
    for name, layer in adapters[0].layers.items():
        other = adapters[1].layers[name]
        np.testing.assert_array_equal(layer.indices, other.indices)
        assert torch.equal(layer.delta, other.delta) and layer.digest == other.digest


def broken(saved, at, value):
    saved = copy.deepcopy(saved)
    part = saved["sebp"]
    for key in at[:-1]:
        part = part[key]
    if value is None:
        del part[at[-1]]
    else:
        part[at[-1]] = value
    return saved


@pytest.mark.parametrize(
    ("steps", "at", "value", "message"),
    [
        (5, ("masks",), None, "without fixed masks"),
        (5, ("masks", "0"), None, "incomplete"),
        (5, ("masks", "2", "originals"), torch.zeros(31), "2 before training are not valid"),
        (5, ("masks", "2", "originals"), torch.zeros(32).bfloat16(), "bfloat16"),
        (5, ("masks", "2", "originals"), 7, "2 before training are not valid"),
        (5, ("moments", "0", "indices"), torch.arange(31, -1, -1), "indices"),
        (2, ("masks", "2", "sums"), torch.zeros(3, 3), "sum of gradients of 2 is not valid"),
        (2, ("masks", "2", "sums"), torch.full((12, 20), torch.nan), "sum of gradients of 2"),
        (2, ("method",), "MeProp", "is of MeProp"),
        (2, ("settings", "k"), 31, "another k"),
    ],
)
def test_broken_checkpoints(steps, at, value, message):
    net, optimizer = start("gradient", gradient_steps=4)
    run(net, optimizer, steps)
    saved = copy.deepcopy(optimizer.state_dict())
    with pytest.raises((ValueError, sebp.SebpError), match=message):
        optimizer.load_state_dict(broken(saved, at, value))
    assert same(optimizer.state_dict(), saved)


def test_checkpoint_of_another_method():
    net, optimizer = start("random")
    with pytest.raises(ValueError, match="without fixed masks"):
        optimizer.load_state_dict(adamw(net).state_dict())
    twin = make_net()
    other = sebp.apply_meprop_to_model(twin, adamw(twin), 32, "*")
    with pytest.raises(ValueError, match="the checkpoint is of SparseMask"):
        other.load_state_dict(optimizer.state_dict())


# --------------------------------------------------------------------------------------------------
# Memory, and out of the model


@pytest.mark.parametrize("mask", ["random", "gradient"])
def test_memory(mask):
    """Gradient and state at k = 1.1%: at most 2% of full fine-tuning's 12 bytes, no scratch."""
    net = nn.Sequential(nn.Linear(768, 3072), nn.Linear(3072, 768))
    elements = sum(layer.weight.numel() for layer in net)
    k = 7 * (768 + 3072)
    optimizer = sebp.apply_sparse_mask_to_model(net, adamw(net), k, mask, "*")
    for _ in range(2):
        net(torch.randn(2, 768)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    memory = optimizer.bytes()
    assert 2 * 20 * k <= memory.gradient + memory.state <= 0.02 * 12 * elements
    assert (memory.bases, memory.scratch) == (2 * 4 * k, 0)
    assert f"{2 * k} of {elements} elements (1.14%)" in repr(optimizer)


def test_memory_while_choosing():
    net = make_net()
    optimizer = sebp.apply_sparse_mask_to_model(
        net, adamw(net), 32, "gradient", "*", gradient_steps=2
    )
    loss_of(net, *draw_batch()).backward()
    optimizer.step()
    memory = optimizer.bytes()
    assert (memory.gradient, memory.bases, memory.scratch) == (4 * 480, 4 * 480, 4 * 240)
    assert "mask: gradient, still to be chosen" in repr(optimizer)


def test_release():
    net = make_net()
    before = {name: (type(m), set(vars(m))) for name, m in net.named_modules()}
    optimizer = sebp.apply_sparse_mask_to_model(net, adamw(net), 5, layers="*")
    with pytest.raises(ValueError, match="0: its weight is frozen"):
        sebp.apply_sparse_mask_to_model(net, adamw(net), 5, layers="*")
    with pytest.raises(TypeError, match="sparse layers already"):
        sebp.apply_sparse_mask_to_model(make_net(), optimizer, 5, layers="*")
    loss_of(net, *draw_batch()).backward()
    optimizer.release()
    with pytest.raises(RuntimeError, match="0: the layer was released"):
        optimizer.adapter()
    assert str(optimizer) == "SparseMask on 2 layers, released in step 0"
    assert {name: (type(m), set(vars(m))) for name, m in net.named_modules()} == before
    assert all(p.requires_grad for p in net.parameters())
