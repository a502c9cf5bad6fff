# SPDX-License-Identifier: Apache-2.0
"""GaLore in PyTorch: the paper's steps in double precision, checkpoints, memory, bad input."""

import copy
import io
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from sparse_nets import adamw, backward, make_net, sgd, train  # noqa: E402
from torch import nn  # noqa: E402

import sebp  # noqa: E402
from sebp.torch.sparse.galore import GaloreMoments, leading_vectors  # noqa: E402

try:
    from models import make_batch, make_model
except ImportError:
    make_batch = make_model = None


class PaperLayer:
    """A layer as the paper has it, in double precision, by a singular value decomposition.

    AdamW's epsilon is added after the bias is corrected, as torch.optim.AdamW does. The signs of
    singular vectors, which nobody defines, are as :func:`leading_vectors` has them.
    """

    def __init__(self, layer, rank, every, scale, lr, decay):
        self.weight = layer.weight.detach().double().numpy().copy()
        self.rank, self.every, self.scale, self.lr, self.decay = rank, every, scale, lr, decay
        self.moment = self.square = 0.0
        self.steps = 0

    def step(self, gradients, beta1=0.9, beta2=0.999, eps=1e-8):
        """Take one with the gradients of several backwards, the first of which chooses vectors."""
        is_left = self.weight.shape[0] <= self.weight.shape[1]
        if self.steps % self.every == 0:
            left, _, right = np.linalg.svd(gradients[0], full_matrices=False)
            vectors = (left.T if is_left else right)[: self.rank]
            at = np.abs(vectors).argmax(axis=1)
            self.vectors = vectors * np.sign(vectors[np.arange(self.rank), at])[:, None]
        g = sum(gradients)
        r = self.vectors @ g if is_left else g @ self.vectors.T
        self.steps += 1
        self.moment = beta1 * self.moment + (1 - beta1) * r
        self.square = beta2 * self.square + (1 - beta2) * r**2
        root = np.sqrt(self.square / (1 - beta2**self.steps)) + eps
        s = self.moment / (1 - beta1**self.steps) / root
        self.weight *= 1 - self.lr * self.decay
        self.weight -= self.lr * self.scale * (self.vectors.T @ s if is_left else s @ self.vectors)


@pytest.mark.parametrize("backwards", [1, 2])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_ten_steps_of_the_paper(backwards, kind):
    """Ten steps, with a refresh in the middle, of weights that are wider and that are higher."""
    np.random.seed(5)
    torch.manual_seed(5)
    net, rank, every, scale, lr, decay = make_net(), 3, 6, 0.25, 0.05, 0.1
    if kind == "conv1d":
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        net = nn.Sequential(conv1d(20, 12), nn.ReLU(), conv1d(8, 20))
    layers = [net[0], net[2]]
    paper = [PaperLayer(layer, rank, every, scale, lr, decay) for layer in layers]
    before = [layer.weight.detach().clone() for layer in layers]
    optimizer = sebp.apply_galore_to_model(
        net,
        adamw(net, lr=lr, weight_decay=decay),
        rank,
        "*",
        refresh_every=every,
        scale=scale,
    )
    for _ in range(10):
        gradients = [[], []]
        for _ in range(backwards):
            x, target = torch.randn(40, 12), torch.randn(40, 8)
            real = (torch.rand(40, 1) < 0.5).float()
            # The gradient in double precision, of a net that has the paper's weights.
            twin = copy.deepcopy(net).double().requires_grad_(True)
            for i, one in zip((0, 2), paper, strict=True):
                twin[i].weight.data = torch.from_numpy(one.weight.copy())
            (0.5 * real * (twin(x.double()) - target) ** 2).sum().backward()
            for i, place in enumerate((0, 2)):
                gradients[i].append(twin[place].weight.grad.numpy())
            (0.5 * real * (net(x) - target) ** 2).sum().backward()
        assert all(layer.weight.grad is None for layer in layers)
        optimizer.step()
        optimizer.zero_grad()
        for one, g in zip(paper, gradients, strict=True):
            one.step(g)
    for layer, one, old in zip(layers, paper, before, strict=True):
        weight = layer.weight.detach()
        assert (weight - old).abs().max() > lr / 2
        np.testing.assert_allclose(weight.double(), one.weight, rtol=0, atol=5e-6)


@pytest.mark.parametrize("shape", [(7, 31), (31, 7), (9, 9)])
def test_leading_vectors(shape):
    g = torch.randn(shape)
    vectors = leading_vectors(g, 4)
    left, _, right = np.linalg.svd(g.double().numpy(), full_matrices=False)
    want = left.T[:4] if shape[0] <= shape[1] else right[:4]
    dots = np.abs((want * vectors.double().numpy()).sum(axis=1))
    np.testing.assert_allclose(dots, 1, rtol=0, atol=1e-6)
    assert (vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all()


def test_whole_rank_is_adam_in_a_rotated_space():
    """With all directions and a scale of 1 nothing of the gradient is lost."""
    net = nn.Sequential(nn.Linear(12, 20, bias=False))
    before = net[0].weight.detach().clone()
    optimizer = sebp.apply_galore_to_model(
        net, adamw(net, lr=0.1, weight_decay=0), 12, "*", scale=1.0
    )
    (net(torch.randn(40, 12)) - 1).square().sum().backward()
    optimizer.step()
    # Adam's first step has the length of its rate in each element.
    moved = net[0].weight.detach() - before
    torch.testing.assert_close(moved.norm(), torch.tensor(0.1 * math.sqrt(240)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_models(name):
    """Losses fall, with padding left out, and a resumed run goes on bit for bit."""
    pytest.importorskip("transformers")
    batches = [make_batch(name, seed) for seed in range(3)]

    def make():
        model = make_model(name)
        sebp.apply_sebp_to_model(model, padding=True)
        return model, sebp.apply_galore_to_model(
            model, adamw(model, lr=0.01), 4, refresh_every=5, scale=0.5
        )

    model, optimizer = make()
    losses = train(model, optimizer, batches, 18)
    assert sum(losses[-3:]) < sum(losses[:3])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    want = train(model, optimizer, batches, 6, 18)
    file.seek(0)
    saved = torch.load(file)
    again, resumed = make()
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert train(again, resumed, batches, 6, 18) == want
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert repr(optimizer) == repr(resumed)


def test_settings_of_a_checkpoint():
    """Rank, interval and scale are the checkpoint's."""
    runs = []
    for options in (dict(rank=3, refresh_every=2, scale=0.5), dict(rank=5)):
        torch.manual_seed(1)
        net = make_net()
        runs.append((net, sebp.apply_galore_to_model(net, adamw(net), layers="*", **options)))
    (net, optimizer), (twin, resumed) = runs
    backward(net, 0)
    optimizer.step()
    optimizer.zero_grad()
    twin.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(1, 4):
        for model, one in ((net, optimizer), (twin, resumed)):
            backward(model, seed)
            one.step()
            one.zero_grad()
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_dropped_gradients():
    """What zero_grad() drops, its choice of vectors too, has left nothing."""
    weights = []
    for drops in (False, True):
        torch.manual_seed(2)
        net = make_net()
        optimizer = sebp.apply_galore_to_model(net, adamw(net), 3, "*", refresh_every=1)
        for seed in range(3):
            if drops:
                backward(net, 9)
                optimizer.zero_grad()
            backward(net, seed)
            optimizer.step()
            optimizer.zero_grad()
        weights.append(copy.deepcopy(net.state_dict()))
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_memory():
    """R, and vectors and two moments: no whole gradient is kept."""
    net = make_net()
    optimizer = sebp.apply_galore_to_model(net, adamw(net), 3, "*")
    r = 3 * 20 + 3 * 20
    assert optimizer.bytes() == (4 * r, 8 * r, 0, 0)
    backward(net, 0)
    assert [tuple(one.whole.shape) for one in optimizer.layers.values()] == [(20, 3), (3, 20)]
    optimizer.step()
    assert optimizer.bytes() == (4 * r, 8 * r + 4 * 3 * (12 + 8), 0, 0)
    assert "GaLore on 2 layers, in step 1" in repr(optimizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "autocast"])
def test_half(dtype):
    torch.manual_seed(1)
    net = make_net(torch.float32 if dtype == "autocast" else dtype)
    optimizer = sebp.apply_galore_to_model(net, adamw(net, lr=0.05), 4, "*", refresh_every=7)
    x, target = torch.randn(64, 12), torch.randn(64, 8)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            y = net(x.to(net[0].weight.dtype))
        loss = (y.float() - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[3] < losses[0]


# --------------------------------------------------------------------------------------------------
# Bad input


BAD = [
    ({"rank": 0}, ValueError, "rank is 0, but .* 20x12 has 1 to 12"),
    ({"rank": 9}, ValueError, "rank is 9, but .* 8x20 has 1 to 8"),
    ({"rank": 2.0}, TypeError, "rank is 2.0, not an integer"),
    ({"rank": (2, 2)}, TypeError, "rank is"),
    ({"refresh_every": 0}, ValueError, "refresh_every is 0"),
    ({"refresh_every": None}, TypeError, "refresh_every is None"),
    ({"scale": -1}, ValueError, "scale is -1"),
    ({"scale": math.inf}, ValueError, "scale is inf"),
    ({"scale": None}, ValueError, "scale is nan"),
    ({"scale": "1"}, TypeError, "scale is '1'"),
    ({"layers": "9"}, ValueError, "none in '9'"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments(options, error, message):
    net = make_net()
    with pytest.raises(error, match=message):
        sebp.apply_galore_to_model(net, adamw(net), **{"rank": 3, "layers": "*", **options})
    assert all(p.requires_grad for p in net.parameters())
    assert not any(module._forward_hooks for module in net)


@pytest.mark.parametrize("at", [0, 1])
def test_not_finite(at):
    """In a step that chooses vectors and in one that does not: nothing moves, training goes on."""
    net = make_net()
    optimizer = sebp.apply_galore_to_model(net, sgd(net), 3, "*")
    for step in range(at):
        backward(net, step)
        optimizer.step()
        optimizer.zero_grad()
    x = torch.randn(9, 12)
    x[4, 3] = math.nan
    before = copy.deepcopy(net.state_dict())
    moments = copy.deepcopy(optimizer.state_dict()["sebp"]["moments"])
    net(x).sum().backward()
    with pytest.raises(sebp.SebpError, match=f"step {at + 1}: the gradient of .*2.* holds a NaN"):
        optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["sebp"]["moments"], moments, rtol=0, atol=0)
    optimizer.zero_grad()
    backward(net, 3)
    optimizer.step()
    assert optimizer.steps == at + 1
    assert all(value.isfinite().all() for value in net.state_dict().values())


BREAKS = {
    "rank": lambda ours: ours["settings"].update(rank=(9, 9)),
    "interval": lambda ours: ours["settings"].update(refresh_every=None),
    "no vectors": lambda ours: ours["moments"]["2"].update(vectors=None),
    "shape": lambda ours: ours["moments"]["2"].update(vectors=torch.ones(3, 20)),
    "dtype": lambda ours: ours["moments"]["2"].update(moment1=torch.ones(3, 20).double()),
    "NaN": lambda ours: ours["moments"]["2"]["moment1"].fill_(math.nan),
    "negative": lambda ours: ours["moments"]["2"]["moment2"].fill_(-1),
    "steps": lambda ours: ours["moments"]["2"].update(steps=-1),
    "no tensor": lambda ours: ours["moments"]["2"].update(moment1=3),
    "missing": lambda ours: ours["moments"]["2"].pop("moment1"),
}


@pytest.mark.parametrize("breaks", BREAKS.values(), ids=BREAKS)
def test_broken_checkpoints(breaks):
    """What could not go on is refused, and nothing has changed."""
    net = make_net()
    optimizer = sebp.apply_galore_to_model(net, adamw(net), 3, "*")
    backward(net, 0)
    optimizer.step()
    optimizer.zero_grad()
    saved = copy.deepcopy(optimizer.state_dict())
    breaks(saved["sebp"])
    before = copy.deepcopy(optimizer.state_dict()["sebp"]["moments"])
    with pytest.raises(ValueError):
        optimizer.load_state_dict(saved)
    torch.testing.assert_close(optimizer.state_dict()["sebp"]["moments"], before, rtol=0, atol=0)
    other = sebp.apply_meprop_to_model(*(lambda net: (net, adamw(net)))(make_net()), 3, "*")
    with pytest.raises(ValueError, match="the checkpoint is of MeProp"):
        optimizer.load_state_dict(other.state_dict())


def test_state_without_steps():
    """A checkpoint from before the first step has no vectors."""
    net = make_net()
    optimizer = sebp.apply_galore_to_model(net, adamw(net), 3, "*")
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert isinstance(optimizer.layers["0"].moments, GaloreMoments)
    assert optimizer.layers["0"].moments.vectors is None
    backward(net, 0)
    optimizer.step()
