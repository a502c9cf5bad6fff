# SPDX-License-Identifier: Apache-2.0
"""SparseGrad and MeProp in PyTorch: the paper's layer, phases, checkpoints, memory, bad input."""

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import sebp  # noqa: E402
from sebp.sparse import Basis  # noqa: E402

try:
    from models import make_batch, make_model
except ImportError:
    make_batch = make_model = None


def orthonormal(size: int) -> np.ndarray:
    return np.linalg.qr(np.random.randn(size, size))[0].astype(np.float32)


def make_net(dtype=torch.float32) -> nn.Sequential:
    """Two layers of different shapes; the activation works in place."""
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(inplace=True), nn.Linear(20, 8)).to(dtype)


SHAPES = {"* 20x12": (20, 12), "* 8x20": (8, 20)}


def make_bases(rank=None) -> dict[str, Basis]:
    return {
        kind: Basis.from_vectors(*(orthonormal(size)[:rank] for size in shape))
        for kind, shape in SHAPES.items()
    }


# --------------------------------------------------------------------------------------------------
# The paper's layer


class PaperLayer:
    """The layer as the paper has it, in double precision: weight and activations rotated.

    Y = (X u_in) (u_out^T W u_in)^T u_out^T + b; Adam moves the k largest elements of the rotated
    weight's gradient, each with moments of its own, and all of b. Columns of u_out and u_in are
    vectors, of which the leading ones alone may have elements that train.
    """

    def __init__(self, layer, u_out, u_in, rank, k, lr, fix_after):
        self.u_out, self.u_in = u_out.T.astype(float), u_in.T.astype(float)
        self.weight = self.u_out.T @ layer.weight.detach().double().numpy() @ self.u_in
        self.bias = layer.bias.detach().double().numpy().copy()
        self.trains = np.zeros(self.weight.shape, bool)
        self.trains[:rank, :rank] = True
        self.k, self.lr, self.fix_after = k, lr, fix_after
        self.moments = {name: np.zeros_like(value) for name, value in self.state().items()}
        self.squares = {name: np.zeros_like(value) for name, value in self.state().items()}
        self.support = None

    def state(self):
        return {"weight": self.weight, "bias": self.bias}

    def forward(self, x):
        self.x = x @ self.u_in
        return self.x @ self.weight.T @ self.u_out.T + self.bias

    def backward(self, dy):
        rotated = dy @ self.u_out
        self.gradients = {"weight": rotated.T @ self.x, "bias": dy.sum(0)}
        return rotated @ self.weight @ self.u_in.T

    def step(self, t, beta1=0.9, beta2=0.999, eps=1e-8):
        r = np.where(self.trains, self.gradients["weight"], 0)
        chosen = np.zeros(r.size, bool)
        chosen[np.argsort(-np.abs(r).ravel(), kind="stable")[: self.k]] = True
        chosen = chosen.reshape(r.shape) if self.support is None else self.support
        for name, parameter in self.state().items():
            g, m, v = self.gradients[name], self.moments[name], self.squares[name]
            at = chosen if name == "weight" else np.ones(g.shape, bool)
            m[at] = beta1 * m[at] + (1 - beta1) * g[at]
            v[at] = beta2 * v[at] + (1 - beta2) * g[at] ** 2
            root = np.sqrt(v[at] / (1 - beta2**t)) + eps
            parameter[at] -= self.lr * (m[at] / (1 - beta1**t)) / root
        if t == self.fix_after:
            largest = np.argsort(-self.squares["weight"].ravel(), kind="stable")[: self.k]
            self.support = np.isin(np.arange(r.size), largest).reshape(r.shape)

    def reverted(self):
        return self.u_out @ self.weight @ self.u_in.T


@pytest.mark.parametrize("fix_after", [None, 1, 4])
@pytest.mark.parametrize("rank", [None, 6])
def test_ten_steps_of_the_paper(rank, fix_after):
    """Ten training steps agree with the paper's layer in double precision within rounding."""
    # No seed of the run: where two elements around the k-th are equal up to rounding, float32 may
    # choose the other one.
    np.random.seed(5)
    torch.manual_seed(5)
    net, k, lr = make_net(), 24, 0.01
    vectors = {kind: [orthonormal(size) for size in shape] for kind, shape in SHAPES.items()}
    bases = {kind: Basis.from_vectors(*(u[:rank] for u in pair)) for kind, pair in vectors.items()}
    paper = [
        PaperLayer(layer, *pair, rank, k, lr, fix_after)
        for layer, pair in zip((net[0], net[2]), vectors.values(), strict=True)
    ]
    before = [layer.weight.detach().clone() for layer in (net[0], net[2])]
    optimizer = sebp.apply_sparsegrad_to_model(
        net,
        torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0),
        k,
        layers="*",
        bases=bases,
        fix_support_after=fix_after,
    )
    for t in range(1, 11):
        x, target = torch.randn(40, 12), torch.randn(40, 8)
        real = (torch.rand(40, 1) < 0.5).float()
        optimizer.zero_grad()
        (0.5 * real * (net(x) - target) ** 2).sum().backward()
        assert all(layer.weight.grad is None for layer in (net[0], net[2]))
        optimizer.step()
        hidden = paper[0].forward(x.double().numpy())
        y = paper[1].forward(np.maximum(hidden, 0))
        d_hidden = paper[1].backward((y - target.numpy()) * real.numpy())
        paper[0].backward(d_hidden * (hidden > 0))
        for layer in paper:
            layer.step(t)
    for ours, theirs, old in zip((net[0], net[2]), paper, before, strict=True):
        weight = ours.weight.detach()
        assert (weight - old).abs().max() > lr
        np.testing.assert_allclose(weight.double(), theirs.reverted(), rtol=0, atol=1e-6)
        np.testing.assert_allclose(ours.bias.detach().double(), theirs.bias, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Phases, and what trains how


def make_batches(name: str) -> list[dict]:
    return [make_batch(name, seed) for seed in range(3)]


def train(model, optimizer, batches, steps, first=0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sgd(model) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def adamw(model, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **{"lr": 3e-3, **options})


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "llama"])
@pytest.mark.parametrize("with_sebp", [False, True])
@pytest.mark.usefixtures("lapack")
def test_models(name, with_sebp):
    """Both phases train; after the switch W moves within the bases, by k elements at a time."""
    pytest.importorskip("transformers")
    model, k, rank = make_model(name), 40, 12
    if with_sebp:
        sebp.apply_sebp_to_model(model, padding=True)
    optimizer = sebp.apply_sparsegrad_to_model(model, adamw(model), k, 4, rank)
    assert [len(kind.layers) for kind in optimizer.kinds] == [2] * (3 if name == "llama" else 2)
    assert not any("attention" in kind.name for kind in optimizer.kinds)
    batches = make_batches(name)
    losses = train(model, optimizer, batches, 3)
    assert optimizer.in_basis_phase
    weights = {n: p for n, p in model.named_parameters() if is_sparse(n, optimizer)}
    assert all(p in optimizer.base.state for p in weights.values())
    losses += train(model, optimizer, batches, 1, 3)
    assert not optimizer.in_basis_phase
    assert not any(p in optimizer.state for p in weights.values())
    for kind in optimizer.kinds:
        assert kind.basis.rank == (rank, rank)
        assert all(0.3 < share <= 1.0001 for share in kind.shares)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses += train(model, optimizer, batches, 1, 4)
    for n, p in model.named_parameters():
        moved = p.detach() - before[n]
        if n not in weights:
            assert bool(moved.any()) or not bool(p.grad.any())
            continue
        basis = next(kind.basis for kind in optimizer.kinds if n[: -len(".weight")] in kind.layers)
        step = basis.u_out @ (moved + 3e-5 * before[n]).numpy() @ basis.u_in.T
        assert np.count_nonzero(np.abs(step) > 1e-4) == k
    losses += train(model, optimizer, batches, 25, 5)
    assert sum(losses[-3:]) < sum(losses[:3])


def is_sparse(name: str, optimizer) -> bool:
    return any(name == f"{layer}.weight" for kind in optimizer.kinds for layer in kind.layers)


@pytest.mark.usefixtures("lapack")
def test_basis_phase_is_full_fine_tuning():
    """Until the switch all is bit for bit as without; then other weights are frozen nowhere."""
    pytest.importorskip("transformers")
    plain, model = make_model("bert"), make_model("bert")
    batches = make_batches("bert")
    train(plain, adamw(plain), batches, 4)
    optimizer = sebp.apply_sparsegrad_to_model(model, adamw(model), 9, 4)
    train(model, optimizer, batches, 4)
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("lapack")
def test_bases_of_another_run():
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, 3, layers="*")
    for _ in range(3):
        net(torch.randn(9, 12)).sum().backward()
        optimizer.step()
    bases = {kind.name: kind.basis for kind in optimizer.kinds}
    other = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(other, adamw(other), 5, layers="*", bases=bases)
    assert not optimizer.in_basis_phase
    assert "* 8x20: 1 layers, basis of 8 x 20" in repr(optimizer)


def test_numbers_are_the_groups():
    """Rate and decay are those of the weight's group at that step, so that schedulers work."""
    net = make_net()
    groups = [
        {"params": [net[0].weight], "lr": 0.1, "weight_decay": 0.5},
        {"params": [net[0].bias, net[2].bias], "lr": 0.0},
        {"params": [net[2].weight], "lr": 0.0},
    ]
    base = torch.optim.AdamW(groups)
    optimizer = sebp.apply_sparsegrad_to_model(net, base, 1, layers="*", bases=make_bases())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 2.0**-step)
    old = copy.deepcopy(net.state_dict())
    for step in range(2):
        net(torch.randn(9, 12)).sum().backward()
        before = net[0].weight.detach().clone()
        optimizer.step()
        lr = 0.1 * 2.0**-step
        moved = net[0].weight.detach() - (1 - 0.5 * lr) * before
        # AdamW's first step on an element is by the rate; u s v^T is of its norm.
        if step == 0:
            torch.testing.assert_close(moved.norm(), torch.tensor(lr), rtol=1e-4, atol=0)
        assert np.linalg.matrix_rank(moved.numpy(), tol=1e-5) == 1
        schedule.step()
    new = net.state_dict()
    assert all(torch.equal(old[key], new[key]) == (key != "0.weight") for key in old)


# --------------------------------------------------------------------------------------------------
# Backwards between steps


@pytest.mark.parametrize("method", ["sparsegrad", "meprop"])
@pytest.mark.parametrize("fix_after", [None, 1])
def test_accumulation(method, fix_after):
    """Micro-batches add up to the batch, exactly on small integers."""
    weights = []
    x, dy = (torch.randint(-3, 4, (10, size)).float() for size in (12, 20))
    for parts in (1, 2, 5):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 20))
        if method == "sparsegrad":
            swap = np.eye(20, dtype=np.float32)[::-1].copy(), np.eye(12, dtype=np.float32)
            bases = {"* 20x12": Basis.from_vectors(*swap)}
            optimizer = sebp.apply_sparsegrad_to_model(
                net,
                adamw(net),
                30,
                layers="*",
                bases=bases,
                fix_support_after=fix_after,
                accumulate=True,
            )
        else:
            optimizer = sebp.apply_meprop_to_model(
                net, adamw(net), 30, "*", fix_support_after=fix_after, accumulate=True
            )
        for _ in range(3):
            for part_x, part_dy in zip(x.chunk(parts), dy.chunk(parts), strict=True):
                (net(part_x) * part_dy).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(net[0].weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_second_backward():
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*", bases=make_bases())
    net(torch.randn(9, 12)).sum().backward()
    with pytest.raises(RuntimeError, match="2: a second backward before the step"):
        net(torch.randn(9, 12)).sum().backward()
    optimizer.zero_grad()
    net(torch.randn(9, 12)).sum().backward()
    optimizer.step()
    net(torch.randn(9, 12)).sum().backward()


OPTIONS = {
    "anew": {},
    "accumulate": {"accumulate": True},
    "fixed": {"fix_support_after": 1},
}


def meprop_net(**options):
    """Make a net that is after its first step: a support that is fixed after it is."""
    torch.manual_seed(7)
    net = make_net()
    optimizer = sebp.apply_meprop_to_model(net, adamw(net), 30, "*", **options)
    backward(net, 0)
    optimizer.step()
    optimizer.zero_grad()
    return net, optimizer


def backward(net, seed) -> None:
    numbers = torch.Generator().manual_seed(seed)
    net(torch.randn(9, 12, generator=numbers)).square().sum().backward()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_grad_is_no_backward(options):
    """``torch.autograd.grad()`` gives what it is asked for and leaves no gradient behind."""
    weights = []
    for asks in (False, True):
        net, optimizer = meprop_net(**options)
        x = torch.randn(9, 12, requires_grad=True)
        if asks:
            (grad,) = torch.autograd.grad(net(x).square().sum(), x)
            assert grad.any()
            net(x).square().sum().backward(inputs=[x])
        backward(net, 1)
        if asks:
            torch.autograd.grad(net(x).sum(), net[2].bias)
        optimizer.step()
        weights.append([net[0].weight.detach(), net[2].weight.detach()])
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("who", ["optimizer", "model", "base", "by hand"])
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_zero_grad(options, who, when):
    """Whoever drops gradients, and wherever in the loop, those of the sparse layers are dropped."""
    weights = []
    for drops in (False, True):
        net, optimizer = meprop_net(**options)

        def zero_grad(net=net, optimizer=optimizer):
            if who == "by hand":
                for parameter in net.parameters():
                    parameter.grad = None
            else:
                {"optimizer": optimizer, "model": net, "base": optimizer.base}[who].zero_grad()

        if drops and when != "after":
            backward(net, 1)
        if when == "before":
            zero_grad()
        y = net(torch.ones(9, 12)).square().sum()
        if when == "between":
            zero_grad()
        y.backward()
        if when == "after" and drops:
            # Nothing is there that would move.
            zero_grad()
            before = copy.deepcopy(net.state_dict())
            optimizer.step()
            torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
            return
        optimizer.step()
        weights.append([parameter.detach() for parameter in net.parameters()])
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_gradients_replaced_by_hand():
    """Other tensors in the place of gradients are no ``zero_grad()``; nor is a graph of them."""
    weights = []
    for replaces in (False, True):
        net, optimizer = meprop_net(accumulate=True)
        backward(net, 1)
        if replaces:
            net[0].bias.grad = net[0].bias.grad.clone()
            net[2].bias.grad = net[2].bias.grad.clone()
        backward(net, 2)
        optimizer.step()
        weights.append([net[0].weight.detach(), net[2].weight.detach()])
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("who", ["model", "base"])
@pytest.mark.parametrize("raises", [False, True])
def test_zero_grad_of_what_trains_behind(options, who, raises):
    """All other parameters have their new gradient before a sparse layer's backward begins.

    So after a backward that raised between the sparse layers, which never came to its end.
    """
    weights = []
    for drops in (False, True):
        torch.manual_seed(7)
        net = nn.Sequential(
            nn.Linear(12, 20, bias=False), nn.Linear(20, 8, bias=False), nn.Linear(8, 2)
        )
        optimizer = sebp.apply_meprop_to_model(net, adamw(net), 30, ["0", "1"], **options)
        backward(net, 0)
        optimizer.step()
        optimizer.zero_grad()
        if drops and raises:
            hidden = net[0](torch.ones(9, 12))
            hidden.register_hook(lambda grad: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                net[2](net[1](hidden)).sum().backward()
        elif drops:
            backward(net, 1)
        if drops:
            {"model": net, "base": optimizer.base}[who].zero_grad()
        backward(net, 2)
        optimizer.step()
        weights.append([parameter.detach() for parameter in net.parameters()])
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_backward_that_raises_keeps_the_sum():
    """Without ``zero_grad()`` what was summed before is kept, as that of other parameters is."""
    net, optimizer = meprop_net(accumulate=True)
    backward(net, 1)
    before = optimizer.layers["0"].whole.clone()
    y = net(torch.ones(9, 12))
    hidden = net[0](torch.ones(9, 12))
    hidden.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net[2](hidden).sum().backward()
    (0 * y).sum().backward()
    assert torch.equal(optimizer.layers["0"].whole, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_within_a_backward(reentrant):
    """Gradient checkpoints: nothing has a gradient yet where the inner backward begins."""
    weights = []
    for checkpoints in (False, True):
        torch.manual_seed(7)
        net = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Linear(20, 8, bias=False))
        optimizer = sebp.apply_meprop_to_model(net, adamw(net), 30, "*")
        for seed in range(2):
            x = torch.full((9, 12), seed + 1.0, requires_grad=True)
            if checkpoints:
                hidden = torch.utils.checkpoint.checkpoint(net[0], x, use_reentrant=reentrant)
            else:
                hidden = net[0](x)
            net[1](hidden).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([parameter.detach() for parameter in net.parameters()])
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_parameter_outside_the_model():
    """The optimizer's, but the model's ``zero_grad()`` leaves its gradient."""
    net, scale = make_net(), nn.Parameter(torch.ones(()))
    optimizer = sebp.apply_meprop_to_model(
        net, torch.optim.AdamW([*net.parameters(), scale]), 30, "*"
    )
    for _ in range(2):
        (scale * net(torch.ones(9, 12))).sum().backward()
        net.zero_grad()
    assert scale.grad is not None
    before = copy.deepcopy(net.state_dict())
    optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_released_is_freed():
    """At once, not when cycles are looked for; and no parameter has a hook any more."""
    net, optimizer = meprop_net()
    backward(net, 1)
    optimizer.step()
    optimizer.release()
    assert not any(parameter._backward_hooks for parameter in net.parameters())
    objects = net, net[0].weight, optimizer, optimizer.base
    alive = [weakref.ref(one) for one in objects]
    gc.collect()
    gc.disable()
    try:
        del net, optimizer, objects
        assert not any(one() is not None for one in alive)
    finally:
        gc.enable()


@pytest.mark.usefixtures("lapack")
def test_second_backward_in_the_basis_phase():
    """What would fail after the basis phase fails in it, at the first step."""
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, 3, layers="*")
    for drop in (optimizer.zero_grad, net.zero_grad, optimizer.step):
        backward(net, 0)
        with pytest.raises(RuntimeError, match="2: a second backward before the step"):
            backward(net, 1)
        drop()
        optimizer.zero_grad()
    for _ in range(2):
        backward(net, 1)
        optimizer.step()
        net.zero_grad()
    assert not optimizer.in_basis_phase
    twice = nn.Linear(4, 4)
    optimizer = sebp.apply_sparsegrad_to_model(twice, adamw(twice), 5, 3, layers="*")
    with pytest.raises(RuntimeError, match="a second call of the layer"):
        twice(twice(torch.ones(2, 4))).sum().backward()
    summing = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(
        summing, adamw(summing), 5, 3, layers="*", accumulate=True
    )
    for _ in range(5):
        backward(summing, 0)
        backward(summing, 1)
        optimizer.step()
        optimizer.zero_grad()
    assert not optimizer.in_basis_phase


@pytest.mark.parametrize("options", [OPTIONS["accumulate"], OPTIONS["fixed"]])
def test_layer_that_runs_twice(options):
    """Its gradient is the sum, whatever dense gradients are there already."""
    net, optimizer = meprop_net(**options)
    twin = copy.deepcopy(net).requires_grad_(True)
    for model in (net, twin):
        x = torch.full((9, 12), 0.5)
        (model(x).square().sum() + model(x + 1).square().sum()).backward()
    for name in ("0", "2"):
        layer = optimizer.layers[name]
        assert layer.finish_gradient(sebp.sparse.AdamW())
        want = twin.get_submodule(name).weight.grad.flatten()[layer.gradient.indices.copy()]
        assert want.any()
        torch.testing.assert_close(torch.from_numpy(layer.gradient.values), want)


def test_failed_step_keeps_the_sum():
    """A step refused for a number of its group can be taken later, with more backwards before."""
    weights = []
    for fails in (False, True):
        net, optimizer = meprop_net(accumulate=True)
        backward(net, 1)
        if fails:
            optimizer.param_groups[0]["lr"] = -1.0
            with pytest.raises(sebp.SebpError):
                optimizer.step()
            optimizer.param_groups[0]["lr"] = 3e-3
        backward(net, 2)
        optimizer.step()
        weights.append([parameter.detach() for parameter in net.parameters()])
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.usefixtures("lapack")
def test_backward_of_an_old_graph():
    """A backward of what was computed in another phase, or before release(), does no harm."""
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, 3, layers="*")
    states, outputs = [], []
    for _ in range(4):
        states.append(copy.deepcopy(optimizer.state_dict()))
        outputs.append(net[2](torch.randn(3, 20)).sum())
        backward(net, 1)
        optimizer.step()
        optimizer.zero_grad()
    outputs[0].backward()
    backward(net, 2)
    optimizer.load_state_dict(states[0])
    outputs[3].backward()
    backward(net, 2)
    optimizer.release()
    net.zero_grad()
    outputs[2].backward()
    net.zero_grad()
    backward(net, 1)
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("order", ["before", "behind"])
def test_other_hooks(order):
    """The gradient is that of the layer's own output, not of what a hook makes of it."""
    net = nn.Sequential(nn.Linear(12, 20))
    twin = copy.deepcopy(net)
    twin[0].register_forward_hook(lambda module, args, y: 3 * y)
    if order == "before":
        net[0].register_forward_hook(lambda module, args, y: 3 * y)
    optimizer = sebp.apply_meprop_to_model(net, adamw(net), 240, "*")
    if order == "behind":
        net[0].register_forward_hook(lambda module, args, y: 3 * y)
    for model in (net, twin):
        backward(model, 0)
    gradient = optimizer.layers["0"].gradient.values.reshape(20, 12)
    np.testing.assert_allclose(gradient, twin[0].weight.grad, rtol=1e-4, atol=1e-4)


def test_profile_is_no_backward():
    x = torch.randn(6, 12)
    weights = []
    for profiles in (False, True):
        torch.manual_seed(3)
        model = make_net()
        optimizer = sebp.apply_meprop_to_model(model, sgd(model), k=5, layers="*")
        model(x).square().sum().backward()
        if profiles:
            sebp.profile(model, x, loss=lambda y: y.sum())
        optimizer.step()
        weights.append(model[0].weight.detach())
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)
    torch.manual_seed(3)
    assert not torch.equal(weights[0], make_net()[0].weight)


def test_meprop_is_the_top_of_the_gradient():
    net, twin = make_net(), make_net()
    twin.load_state_dict(net.state_dict())
    k = 17
    optimizer = sebp.apply_meprop_to_model(net, adamw(net, weight_decay=0.1), k, "*")
    x = torch.randn(30, 12)
    net(x).square().sum().backward()
    optimizer.step()
    twin(x).square().sum().backward()
    for layer, plain in ((net[0], twin[0]), (net[2], twin[2])):
        assert torch.equal(layer.bias.grad, plain.bias.grad)
        grad = plain.weight.grad.flatten()
        at = grad.abs().topk(k).indices
        want = plain.weight.detach().flatten() * (1 - 3e-4)
        want[at] -= 3e-3 * grad[at].sign()
        torch.testing.assert_close(layer.weight.detach().flatten(), want, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Checkpoints


def make_run(method, name="bert", **options):
    model = make_model(name)
    base = adamw(model)
    if method == "meprop":
        return model, sebp.apply_meprop_to_model(model, base, 30, **options)
    return model, sebp.apply_sparsegrad_to_model(model, base, 30, 4, 12, **options)


@pytest.mark.parametrize("method", ["sparsegrad", "meprop"])
@pytest.mark.parametrize("stop", [2, 4, 6, 9])
@pytest.mark.parametrize("fix_after", [None, 4])
@pytest.mark.usefixtures("lapack")
def test_resume(method, stop, fix_after):
    """A resumed run goes on bit for bit."""
    pytest.importorskip("transformers")
    batches = make_batches("bert")
    model, optimizer = make_run(method, fix_support_after=fix_after)
    train(model, optimizer, batches, stop)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    want = train(model, optimizer, batches, 7, stop)
    file.seek(0)
    again, resumed = make_run(method, fix_support_after=fix_after)
    saved = torch.load(file)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.steps == stop
    assert train(again, resumed, batches, 7, stop) == want
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(optimizer.kinds, resumed.kinds, strict=True):
        np.testing.assert_array_equal(one.shares, other.shares)


@pytest.mark.parametrize("stop", [2, 4, 7])
@pytest.mark.parametrize("at", [1, 3, 6])
@pytest.mark.usefixtures("lapack")
def test_resume_in_another_phase(at, stop):
    """A checkpoint goes on in an optimizer of any phase, with a gradient at hand."""

    def start():
        torch.manual_seed(0)
        net = make_net()
        options = dict(layers="*", fix_support_after=2)
        return net, sebp.apply_sparsegrad_to_model(net, adamw(net), 20, 3, **options)

    def go_on(net, optimizer, first, last):
        for step in range(first, last):
            optimizer.zero_grad()
            backward(net, step)
            optimizer.step()

    plain, optimizer = start()
    go_on(plain, optimizer, 0, stop)
    saved = copy.deepcopy((plain.state_dict(), optimizer.state_dict()))
    go_on(plain, optimizer, stop, 9)
    net, resumed = start()
    go_on(net, resumed, 0, at)
    backward(net, 8)
    net.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert resumed.in_basis_phase == (stop < 3)
    go_on(net, resumed, stop, 9)
    for one, other in zip(plain.parameters(), net.parameters(), strict=True):
        assert torch.equal(one, other)
    resumed.release()
    assert all(p.requires_grad for p in net.parameters())
    assert not net[0]._forward_hooks


OTHERS = {
    "rank and phase": dict(basis_steps=5, rank=8),
    "support": dict(basis_steps=2, rank=6, fix_support_after=3),
    "bases": dict(bases=True),
    "accumulate": dict(basis_steps=9, accumulate=True),
}


@pytest.mark.parametrize("stop", [2, 5, 7])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.usefixtures("lapack")
def test_resume_in_another_optimizer(other, accumulate, stop):
    """A checkpoint goes on by its own settings, whatever the optimizer was made with."""

    def start(options):
        torch.manual_seed(0)
        net = make_net()
        if options.pop("bases", None):
            options["bases"] = make_bases()
        return net, sebp.apply_sparsegrad_to_model(net, adamw(net), 20, layers="*", **options)

    def go_on(net, optimizer, first, last):
        for step in range(first, last):
            for part in range(1 + accumulate):
                backward(net, 2 * step + part)
            optimizer.step()
            optimizer.zero_grad()

    mine = dict(basis_steps=4, rank=7, fix_support_after=2, accumulate=accumulate)
    plain, optimizer = start(mine)
    go_on(plain, optimizer, 0, stop)
    saved = copy.deepcopy((plain.state_dict(), optimizer.state_dict()))
    go_on(plain, optimizer, stop, 9)
    net, resumed = start(dict(other))
    net.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    go_on(net, resumed, stop, 9)
    for one, another in zip(plain.parameters(), net.parameters(), strict=True):
        assert torch.equal(one, another)
    for one, another in zip(optimizer.kinds, resumed.kinds, strict=True):
        assert one.basis.rank == another.basis.rank == (7, 7)
    assert repr(optimizer) == repr(resumed) or (other.get("accumulate") and not accumulate)


@pytest.mark.usefixtures("lapack")
def test_accumulate_from_now_on():
    """What a run did not allow may be allowed when it goes on."""
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, 3, layers="*")
    saved = optimizer.state_dict()
    optimizer.release()
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*", accumulate=True)
    optimizer.load_state_dict(saved)
    for step in range(5):
        backward(net, step)
        backward(net, step)
        optimizer.step()
        optimizer.zero_grad()
    assert not optimizer.in_basis_phase


def test_foreign_checkpoints():
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*", bases=make_bases())
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="without sparse layers"):
        optimizer.load_state_dict(adamw(net).state_dict())
    meprop = sebp.apply_meprop_to_model(*(lambda net: (net, adamw(net)))(make_net()), 5, "*")
    ours = state["sebp"]
    settings = {**ours["settings"], "k": 6}
    kinds = {"* 20x12": ["0"], "* 8x20": ["1"]}
    for other in (
        meprop.state_dict(),
        {**state, "sebp": {**ours, "settings": settings}},
        {**state, "sebp": {**ours, "kinds": kinds}},
    ):
        with pytest.raises(ValueError, match="other layers, or another k"):
            optimizer.load_state_dict(other)
    broken = copy.deepcopy(state)
    broken["sebp"]["bases"]["* 8x20"]["u_in"][0, 0] = float("nan")
    with pytest.raises(sebp.SebpError):
        optimizer.load_state_dict(broken)
    broken["sebp"]["bases"]["* 8x20"]["u_in"] = torch.eye(7)
    with pytest.raises(ValueError, match="not \\(8, 20\\)"):
        optimizer.load_state_dict(broken)
    for key in ("settings", "steps", "bases", "moments"):
        old = {name: value for name, value in ours.items() if name != key}
        with pytest.raises(ValueError, match=f"incomplete or too old: no '{key}'"):
            optimizer.load_state_dict({**state, "sebp": old})
    optimizer.load_state_dict(state)


def test_checkpoint_of_another_shape():
    """MeProp has no basis that would tell, and the elements would fit."""
    small, large = (nn.Sequential(nn.Linear(12, size)) for size in (20, 24))
    optimizers = [sebp.apply_meprop_to_model(net, sgd(net), 5, "*") for net in (small, large)]
    with pytest.raises(ValueError, match="other layers"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())


BREAKS = {
    "rank below k": (7, lambda ours: ours["bases"]["* 8x20"].update(u_in=torch.eye(20)[:1])),
    "fewer in a support": (7, lambda ours: cut(ours["moments"]["2"], 19)),
    "fewer chosen anew": (5, lambda ours: cut(ours["moments"]["2"], 19)),
    "more in a support": (5, lambda ours: ours["moments"]["2"].update(is_fixed=True)),
    "rank of the basis phase": (2, lambda ours: ours["settings"].update(rank=(9, 9))),
    "steps of the basis phase": (2, lambda ours: ours["settings"].update(basis_steps=0)),
    "moments": (5, lambda ours: ours["moments"]["2"]["moment2"].fill_(-1)),
    "sums": (2, lambda ours: ours["sums"]["* 8x20"].update(energy=1e30)),
}


def cut(moments, count):
    moments.update({key: moments[key][:count] for key in ("indices", "moment1", "moment2")})


@pytest.mark.parametrize(("stop", "breaks"), BREAKS.values(), ids=BREAKS)
@pytest.mark.parametrize("at", [1, 5, 7])
@pytest.mark.usefixtures("lapack")
def test_broken_checkpoints(stop, breaks, at):
    """What could not go on is refused, and nothing has changed."""

    def held(optimizer):
        saved = optimizer.state_dict()
        return [saved["state"], *(saved["sebp"][name] for name in ("sums", "bases", "moments"))]

    def run(steps):
        net = make_net()
        options = dict(layers="*", rank=7, fix_support_after=3)
        optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 20, 3, **options)
        for step in range(steps):
            backward(net, step)
            optimizer.step()
            optimizer.zero_grad()
        return net, optimizer

    saved = copy.deepcopy(run(stop)[1].state_dict())
    breaks(saved["sebp"])
    net, optimizer = run(at)
    before = copy.deepcopy(held(optimizer)), repr(optimizer), optimizer.settings
    with pytest.raises((ValueError, sebp.SebpError)):
        optimizer.load_state_dict(saved)
    torch.testing.assert_close(held(optimizer), before[0], rtol=0, atol=0)
    assert (repr(optimizer), optimizer.settings) == before[1:]
    backward(net, 0)
    optimizer.step()


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


# --------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("fix_after", [None, 1])
@pytest.mark.parametrize("method", ["sparsegrad", "meprop"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_not_finite(method, fix_after, accumulate):
    """The step is refused by name and number, nothing has moved, and training can go on."""
    net = make_net()
    options = dict(layers="*", fix_support_after=fix_after, accumulate=accumulate)
    if method == "sparsegrad":
        options["bases"] = make_bases()
        optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, **options)
    else:
        optimizer = sebp.apply_meprop_to_model(net, adamw(net), 5, **options)
    net(torch.randn(9, 12)).sum().backward()
    optimizer.step()
    x = torch.randn(9, 12)
    x[4, 3] = float("nan")
    before = copy.deepcopy(net.state_dict())
    moments = copy.deepcopy(optimizer.state_dict()["sebp"]["moments"])
    net(x).sum().backward()
    with pytest.raises(sebp.SebpError, match="step 2: the gradient of .*2.* holds a NaN"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    for name, saved in optimizer.state_dict()["sebp"]["moments"].items():
        assert all(
            torch.equal(torch.as_tensor(saved[key]), torch.as_tensor(value))
            for key, value in moments[name].items()
        )
    optimizer.zero_grad()
    net(torch.randn(9, 12)).sum().backward()
    optimizer.step()
    assert optimizer.steps == 2
    assert all(value.isfinite().all() for value in net.state_dict().values())


@pytest.mark.parametrize("method", ["sparsegrad", "meprop"])
def test_not_finite_beside_the_support(method):
    """A NaN is refused wherever it is: here in one row of a gradient whose support is elsewhere."""
    net = nn.Sequential(nn.Linear(12, 20))
    if method == "sparsegrad":
        unit = {"* 20x12": Basis.from_vectors(*(np.eye(n, dtype=np.float32) for n in (20, 12)))}
        optimizer = sebp.apply_sparsegrad_to_model(
            net, adamw(net), 4, layers="*", bases=unit, fix_support_after=1
        )
    else:
        optimizer = sebp.apply_meprop_to_model(net, adamw(net), 4, "*", fix_support_after=1)
    dy = torch.zeros(9, 20)
    dy[:, 0] = 1
    (net(torch.ones(9, 12)) * dy).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy(net.state_dict())
    dy[3, 7] = float("inf")
    (net(torch.ones(9, 12)) * dy).sum().backward()
    with pytest.raises(sebp.SebpError, match="step 2: the gradient of 0 holds a NaN"):
        optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    optimizer.zero_grad()
    # Numbers so large that their sum is not finite are finite all the same.
    dy[3, 7], dy[4, 8] = 3e38, 3e38
    (net(torch.ones(9, 12)) * dy).sum().backward()
    optimizer.step()
    assert optimizer.steps == 2


@pytest.mark.parametrize("method", ["sparsegrad", "meprop"])
def test_support_of_squares_that_overflow(method):
    """A gradient may be finite where its square is not: these elements are the largest."""
    net = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8))
    options = dict(k=30, layers="*", fix_support_after=2)
    if method == "sparsegrad":
        options["bases"] = make_bases()
        optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), **options)
    else:
        optimizer = sebp.apply_meprop_to_model(net, adamw(net), **options)
    for step, scale in enumerate((1.0, 1e25, 1.0)):
        optimizer.zero_grad()
        (scale * net(torch.ones(9, 12) * torch.arange(1, 13)).sum()).backward()
        large = {n: layer.gradient.indices for n, layer in optimizer.layers.items() if step == 1}
        optimizer.step()
        for name, indices in large.items():
            np.testing.assert_array_equal(optimizer.layers[name].moments.support, indices)
    assert optimizer.steps == 3
    assert all(value.isfinite().all() for value in net.state_dict().values())


@pytest.mark.parametrize("history", [False, True])
def test_step_that_overflows(history):
    """By this gradient, or by what is left of an earlier one."""
    net, optimizer = meprop_net()
    if history:
        (1e30 * net(torch.randn(9, 12)).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 1e12
    before = copy.deepcopy(net.state_dict())
    moments = [layer.moments.moments() for layer in optimizer.layers.values()]
    ((1 if history else 1e30) * net(torch.randn(9, 12)).sum()).backward()
    with pytest.raises(sebp.SebpError, match="step .: the gradient of 0, 2 holds .*too large"):
        optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    for layer, old in zip(optimizer.layers.values(), moments, strict=True):
        np.testing.assert_equal(layer.moments.moments(), old)
    # Neither gradients nor rates are too large by themselves.
    optimizer.param_groups[0]["lr"] = 1.0
    (1e30 * net(torch.randn(9, 12)).sum()).backward()
    optimizer.step()


BAD_NUMBERS = [
    ({"lr": -1.0}, sebp.SebpError, "learning_rate|lr"),
    ({"eps": float("nan")}, sebp.SebpError, "eps"),
    ({"betas": (0.9, 1.0)}, sebp.SebpError, "beta"),
    ({"weight_decay": -1.0}, sebp.SebpError, "decay"),
    ({"lr": None}, ValueError, "numbers are not those of AdamW: {'lr': None"),
    ({"betas": (0.9, 0.99, 0.999)}, ValueError, "numbers are not those"),
    ({"maximize": True}, ValueError, "maximize is not done"),
    ({"amsgrad": True}, ValueError, "amsgrad is not done"),
]


@pytest.mark.parametrize(("numbers", "kind", "message"), BAD_NUMBERS)
def test_bad_numbers(numbers, kind, message):
    """One group's bad numbers: refused when applied, and in a step before anything has moved."""

    def groups(net):
        return [{"params": net[0].parameters()}, {"params": net[2].parameters()}]

    net = make_net()
    base = torch.optim.AdamW(groups(net))
    base.param_groups[1].update(numbers)
    with pytest.raises(kind, match=f"^2: .*({message})"):
        sebp.apply_meprop_to_model(net, base, 5, "*")
    assert net[0].weight.requires_grad
    base = torch.optim.AdamW(groups(net))
    optimizer = sebp.apply_meprop_to_model(net, base, 5, "*")
    backward(net, 0)
    before = copy.deepcopy(net.state_dict())
    good = dict(base.param_groups[1])
    base.param_groups[1].update(numbers)
    with pytest.raises(kind, match=f"^2: .*({message})"):
        optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert (optimizer.steps, optimizer.layers["0"].moments.steps) == (0, 0)
    assert not base.state
    # The gradients are kept.
    base.param_groups[1].update(good)
    optimizer.step()
    assert not any(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_base_that_fails():
    """Nothing of ours has moved where the user's optimizer raises."""

    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("no step")

    net = make_net()
    optimizer = sebp.apply_meprop_to_model(net, Failing(net.parameters(), lr=0.1), 5, "*")
    backward(net, 0)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert optimizer.layers["0"].moments.steps == 0


@pytest.mark.parametrize("phase", ["basis", "sparse"])
@pytest.mark.usefixtures("lapack")
def test_grad_scaler(phase):
    """A scaler does not see the sparse gradients: refused at the first step, not half done."""
    net = make_net()
    options = {"bases": make_bases()} if phase == "sparse" else {"basis_steps": 3}
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*", **options)
    scaler = torch.amp.GradScaler("cpu")
    before = copy.deepcopy(net.state_dict())
    scaler.scale(net(torch.randn(9, 12)).sum()).backward()
    with pytest.raises(RuntimeError, match="GradScaler does not see"):
        scaler.step(optimizer)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    optimizer.zero_grad()
    backward(net, 0)
    optimizer.step()
    optimizer.zero_grad()
    off = torch.amp.GradScaler("cpu", enabled=False)
    off.scale(net(torch.randn(9, 12)).sum()).backward()
    off.step(optimizer)
    assert optimizer.steps == 2


def test_weights_that_ask_again():
    """Unfrozen by hand, a weight would be moved by both optimizers."""
    net, optimizer = meprop_net()
    net.requires_grad_(True)
    backward(net, 1)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="0: its weight asks for a gradient"):
        optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


CHANGES = {
    "dtype": (lambda net: net.half(), "is of torch.float16"),
    "layout": (
        lambda net: setattr(net[2].weight, "data", net[2].weight.data.t().contiguous().t()),
        "is not row by row",
    ),
    "shape": (lambda net: setattr(net[2].weight, "data", torch.ones(1, 20)), r"is of \(1, 20\)"),
}


@pytest.mark.parametrize("phase", ["basis", "sparse"])
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
@pytest.mark.usefixtures("lapack")
def test_weights_that_are_others(phase, change, message):
    """What the library cannot write to is refused before other layers have moved."""
    net = make_net()
    options = {"bases": make_bases()} if phase == "sparse" else {"basis_steps": 3}
    optimizer = sebp.apply_sparsegrad_to_model(net, sgd(net), 5, layers="*", **options)
    backward(net, 0)
    change(net)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=f"[02]: its weight {message}"):
        optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert optimizer.steps == 0
    assert all(not sums.count for sums in optimizer.sums.values())


def test_state_of_the_base_loaded():
    """Rates that came with a checkpoint of the user's optimizer hold for the sparse layers too."""
    net, optimizer = meprop_net()
    state = optimizer.base.state_dict()
    state["param_groups"][0]["lr"] = 0.0
    optimizer.base.load_state_dict(state)
    backward(net, 1)
    before = copy.deepcopy(net.state_dict())
    optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert optimizer.param_groups is optimizer.base.param_groups


def test_no_copies():
    _, optimizer = meprop_net()
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="belongs to the model it was made for; copy its state"):
            make(optimizer)


@pytest.mark.usefixtures("lapack")
def test_twice():
    """One optimizer for a layer, in the basis phase too, and none around another."""
    net = make_net()
    base = adamw(net)
    first = sebp.apply_sparsegrad_to_model(net, base, 5, 3, layers="0")
    with pytest.raises(ValueError, match="0: a SparseOptimizer has it already"):
        sebp.apply_sparsegrad_to_model(net, base, 5, 3, layers="*")
    with pytest.raises(ValueError, match="0: a SparseOptimizer has it already"):
        sebp.apply_lora_to_model(net, 2, layers="*")
    with pytest.raises(TypeError, match="has sparse layers already"):
        sebp.apply_meprop_to_model(net, first, 5, "2")
    first.release()
    sebp.apply_sparsegrad_to_model(net, base, 5, 3, layers="*")


@pytest.mark.parametrize("method", ["meprop", "lora"])
def test_weight_of_an_embedding(method):
    """Which would lose its gradient."""
    net = nn.Sequential(nn.Embedding(8, 12), nn.Linear(12, 8))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match="1: its weight is that of 0"):
        if method == "lora":
            sebp.apply_lora_to_model(net, 2, layers="*")
        else:
            sebp.apply_meprop_to_model(net, adamw(net), 5, "*")
    assert net[0].weight.requires_grad


@pytest.mark.usefixtures("lapack")
def test_not_finite_in_the_basis_phase():
    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, 3, layers="*")
    before = copy.deepcopy(net.state_dict())
    net(torch.full((3, 12), float("inf"))).sum().backward()
    with pytest.raises(sebp.SebpError, match="step 1: the gradient of 0, 2 holds"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert optimizer.in_basis_phase
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(9, 12)).sum().backward()
        optimizer.step()
    assert not optimizer.in_basis_phase


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.usefixtures("lapack")
def test_too_large_in_the_basis_phase(resumes):
    """Refused by name before any layer's gradient is in the sums: by itself, or with the others."""

    def step(net, optimizer, large=None):
        optimizer.zero_grad()
        backward(net, 0)
        if large is not None:
            net[2].weight.grad.fill_(0)[0, 0] = large
        optimizer.step()

    def held(net, optimizer):
        saved = optimizer.state_dict()
        return copy.deepcopy([net.state_dict(), saved["state"], saved["sebp"]["sums"]])

    net = make_net()
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, 9, layers="*")
    step(net, optimizer)
    for large in (2e19, 7e18):
        if large < 1e19:
            step(net, optimizer, large)
        if resumes:
            saved = optimizer.state_dict()
            optimizer.release()
            optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, 9, layers="*")
            optimizer.load_state_dict(saved)
        before = held(net, optimizer)
        with pytest.raises(sebp.SebpError, match=r"step \d: the gradient of 2 holds .*too large"):
            step(net, optimizer, large)
        torch.testing.assert_close(held(net, optimizer), before, rtol=0, atol=0)
    step(net, optimizer)
    assert [sums["count"] for sums in optimizer.state_dict()["sebp"]["sums"].values()] == [3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 161}, "k is 161, but .* 8x20 has 1 to 160"),
        ({"k": 10, "rank": 3}, "k is 10"),
        ({"rank": 9}, "rank is 9, but .* 8x20 has 1 to 8"),
        ({"rank": (0, 1)}, "rank is 0"),
        ({"basis_steps": 1}, "1 gradients of 1 layers do not span 20 directions"),
        ({"basis_steps": 0}, "basis_steps is 0"),
        ({"fix_support_after": 0}, "fix_support_after is 0"),
        ({"layers": "9"}, "none in '9'"),
        ({"layers": None}, "no feed-forward layers known by name"),
        ({"bases": {}}, "no basis for"),
    ],
)
def test_bad_arguments(options, message):
    net = make_net()
    options = {"k": 5, "basis_steps": 3, "layers": "*", **options}
    base = adamw(net)
    with pytest.raises(ValueError, match=message):
        sebp.apply_sparsegrad_to_model(net, base, **options)
    assert all(p.requires_grad for p in net.parameters())
    assert not any(module._forward_hooks for module in net)


def test_bad_models():
    net = make_net()
    with pytest.raises(ValueError, match="2: its weight is not among"):
        sebp.apply_sparsegrad_to_model(net, adamw(net[0]), 5, layers="*")
    with pytest.raises(TypeError, match="not of torch.optim"):
        sebp.apply_sparsegrad_to_model(net, None, 5, layers="*")
    for name, value in (("k", 0.01), ("k", True), ("rank", (6.0, 6)), ("basis_steps", 2.5)):
        with pytest.raises(TypeError, match=f"{name} is .*, not an integer"):
            sebp.apply_sparsegrad_to_model(net, adamw(net), layers="*", **{"k": 5, name: value})
    with pytest.raises(ValueError, match="rank is .*, not one number or two"):
        sebp.apply_sparsegrad_to_model(net, adamw(net), 5, rank=(1, 2, 3), layers="*")
    with pytest.raises(TypeError, match="20x12 is ndarray, not Basis"):
        sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*", bases={"* 20x12": np.eye(3)})
    bases = make_bases()
    bases["* 8x20"] = bases["* 20x12"]
    with pytest.raises(ValueError, match="is of \\(8, 20\\), its basis of \\(20, 12\\)"):
        sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*", bases=bases)
    sebp.apply_meprop_to_model(net, adamw(net), 5, "0")
    with pytest.raises(ValueError, match="0: its weight is frozen"):
        sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*")
    double = make_net(torch.float64)
    with pytest.raises(ValueError, match="float64"):
        sebp.apply_meprop_to_model(double, adamw(double), 5, "*")
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="0: its weight is that of 1"):
        sebp.apply_meprop_to_model(tied, adamw(tied), 5, "*")


@pytest.mark.usefixtures("lapack")
def test_no_memory(monkeypatch):
    """For the sums of all kinds: the model is as it was."""

    def make(self, out_features, in_features):
        if (out_features, in_features) == (8, 20):
            raise MemoryError
        init(self, out_features, in_features)

    init = sebp.sparse.BasisSums.__init__
    monkeypatch.setattr(sebp.sparse.BasisSums, "__init__", make)
    net = make_net()
    with pytest.raises(MemoryError):
        sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*")
    assert not any(module._forward_hooks for module in net)
    assert not any(parameter._backward_hooks for parameter in net.parameters())


def test_no_lapack(monkeypatch):
    """A library without it is told of before the basis phase, not after."""

    def solve(self, rank_out, rank_in, context=None):
        raise sebp.SebpError(11, "install liblapacke-dev")

    net = make_net()
    with monkeypatch.context() as patch:
        # As if it had one, where there is none.
        patch.setattr("sebp.torch.sparse.apply.check_lapack", lambda: None)
        optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*")
    saved = optimizer.state_dict()
    optimizer.release()
    monkeypatch.setattr(sebp.sparse.BasisSums, "solve", solve)
    with pytest.raises(sebp.SebpError, match="liblapacke"):
        sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*")
    optimizer = sebp.apply_sparsegrad_to_model(net, adamw(net), 5, layers="*", bases=make_bases())
    with pytest.raises(sebp.SebpError, match="liblapacke"):
        optimizer.load_state_dict(saved)
    assert not optimizer.in_basis_phase


def test_rank_beside_bases():
    """It is theirs, and not left out of account where it is another."""
    for rank, is_good in ((None, True), (7, True), ((7, 7), True), (6, False), ((7, 6), False)):
        net = make_net()
        options = dict(layers="*", bases=make_bases(7), rank=rank)
        if is_good:
            sebp.apply_sparsegrad_to_model(net, sgd(net), 5, **options)
            continue
        with pytest.raises(ValueError, match="rank is .*, but the basis of .* has"):
            sebp.apply_sparsegrad_to_model(net, sgd(net), 5, **options)
        assert all(parameter.requires_grad for parameter in net.parameters())
