# SPDX-License-Identifier: Apache-2.0
"""SparseGrad's and MeProp's optimizer and the user's, whatever else that one has."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import sebp  # noqa: E402
from sebp.torch import SparseOptimizer  # noqa: E402


class Averaging(torch.optim.SGD):
    """A schedule-free optimizer: its weights are y to train with, and their average x else."""

    beta = 0.9

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        for group in self.param_groups:
            group.update(train_mode=False, k=0, betas=(0.9, 0.999), eps=1e-8)
        self.defaults.update(train_mode=False, k=0)

    def _move(self, mode, weight):
        for group in self.param_groups:
            if group["train_mode"] == mode:
                continue
            group["train_mode"] = mode
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.data.lerp_(self.state[p]["z"], weight)

    def eval(self):
        self._move(False, 1 - 1 / self.beta)

    def train(self):
        self._move(True, 1 - self.beta)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"]
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.detach().clone())
                x = p.lerp(z, 1 - 1 / self.beta)
                z.sub_(p.grad, alpha=group["lr"])
                x.lerp_(z, 1 / group["k"])
                p.copy_(x.lerp(z, 1 - self.beta))
                p.grad.zero_()  # as some reuse it


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8))


def backward(net, seed):
    torch.manual_seed(seed)
    net(torch.randn(9, 12)).square().mean().backward()


def values(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def test_attributes_of_the_base():
    net = make_net()
    base = Averaging(net.parameters())
    optimizer = sebp.apply_meprop_to_model(net, base, 30, "0")
    assert optimizer.beta == base.beta == 0.9
    optimizer.train()
    assert base.param_groups[0]["train_mode"]
    optimizer.eval()
    assert not base.param_groups[0]["train_mode"]
    plain = make_net()
    optimizer = sebp.apply_meprop_to_model(plain, torch.optim.AdamW(plain.parameters()), 30, "0")
    assert not hasattr(optimizer, "train")
    with pytest.raises(AttributeError, match="neither SparseOptimizer nor its AdamW has .* 'beta'"):
        _ = optimizer.beta


def test_attributes_without_a_base():
    """An object that is not made yet, as copying and unpickling have it, asks nobody."""
    empty = SparseOptimizer.__new__(SparseOptimizer)
    for name in ("base", "beta", "__deepcopy__"):
        with pytest.raises(AttributeError, match="SparseOptimizer has no attribute"):
            getattr(empty, name)


class Copied(torch.optim.AdamW):
    """One whose copying is its own."""

    def __deepcopy__(self, memo):
        return "a copy"


def test_copies_are_refused():
    """They are not those of the user's optimizer instead."""
    net = make_net()
    optimizer = sebp.apply_meprop_to_model(net, Copied(net.parameters(), 0.1), 30, "0")
    assert copy.deepcopy(optimizer.base) == "a copy"
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="belongs to the model it was made for"):
            make(optimizer)


def test_base_is_copied_and_pickled():
    """The user's optimizer itself may be, as before."""
    net = make_net()
    base = torch.optim.AdamW(net.parameters())
    optimizer = sebp.apply_meprop_to_model(net, base, 30, "0")
    backward(net, 1)
    optimizer.step()
    for twin in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        torch.testing.assert_close(twin.state_dict(), base.state_dict())


def test_what_all_optimizers_have():
    """Groups are added, and hooks of checkpoints run, where the user's optimizer does it."""
    net = make_net()
    seen = []

    class Counting(torch.optim.AdamW):
        def add_param_group(self, group):
            seen.append("group")
            super().add_param_group(group)

    base = Counting(net.parameters())
    optimizer = sebp.apply_meprop_to_model(net, base, 30, "0")
    seen.clear()
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert seen == ["group"]
    assert optimizer.param_groups is base.param_groups
    assert base.param_groups[1]["lr"] == 0.5
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("after saving"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("before loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("after loading"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen[1:] == ["before saving", "after saving", "before loading", "after loading"]


def test_step_of_the_base_alone():
    """It would leave the sparse layers out, whoever calls it, until they are released."""
    net = make_net()
    base = torch.optim.AdamW(net.parameters(), 0.1)
    optimizer = sebp.apply_meprop_to_model(net, base, 30, "0")
    backward(net, 1)
    before = values(net)
    with pytest.raises(RuntimeError, match="a step of AdamW alone leaves its sparse layers out"):
        base.step()
    torch.testing.assert_close(values(net), before, rtol=0, atol=0)
    for other in (base, optimizer):
        with pytest.raises(TypeError, match="has sparse layers already"):
            sebp.apply_meprop_to_model(net, other, 30, "2")
    optimizer.step()
    assert not torch.equal(net[0].weight, before["0.weight"])
    optimizer.release()
    backward(net, 2)
    base.step()
    sebp.apply_meprop_to_model(net, base, 30, "2")


def test_closures():
    """An optimizer that computes gradients within its step is refused, and the model left alone."""
    net = make_net()
    with pytest.raises(TypeError, match="a step of LBFGS needs a closure"):
        sebp.apply_meprop_to_model(net, torch.optim.LBFGS(net.parameters()), 30, "0")
    assert net[0].weight.requires_grad
    assert not net[0]._forward_hooks


def test_warmup_of_its_own():
    """The rate of the sparse layers' step is the group's, which does not tell of such a warmup."""
    net = make_net()
    base = Averaging(net.parameters())
    base.param_groups[0]["warmup_steps"] = 0
    sebp.apply_meprop_to_model(net, base, 30, "0").release()
    base.param_groups[0]["warmup_steps"] = 5
    with pytest.raises(ValueError, match="0: warmup_steps is not done"):
        sebp.apply_meprop_to_model(net, base, 30, "0")


@pytest.mark.usefixtures("lapack")
@pytest.mark.parametrize("method", ["meprop", "sparsegrad"])
def test_step_in_evaluation_mode(method):
    """It is refused before anything is summed or moved, and taken in training mode."""
    net = make_net()
    base = Averaging(net.parameters())
    if method == "meprop":
        optimizer = sebp.apply_meprop_to_model(net, base, 30, "0")
    else:
        optimizer = sebp.apply_sparsegrad_to_model(net, base, 30, 3, layers="0")
    backward(net, 1)
    before = values(net)
    with pytest.raises(RuntimeError, match=r"Averaging is in evaluation mode: call train\(\)"):
        optimizer.step()
    torch.testing.assert_close(values(net), before, rtol=0, atol=0)
    assert optimizer.steps == 0
    assert all(sums.count == 0 for sums in optimizer.sums.values())
    optimizer.train()
    optimizer.step()
    assert optimizer.steps == 1


@pytest.mark.usefixtures("lapack")
def test_averages_at_the_end_of_the_basis_phase():
    """The sparse weights go on from what ``eval()`` gives; the others as if nothing had been."""
    nets = [make_net()]
    nets.append(copy.deepcopy(nets[0]))
    bases = [Averaging(net.parameters()) for net in nets]
    optimizer = sebp.apply_sparsegrad_to_model(
        nets[0], bases[0], 30, 3, layers="0", basis_rate_factor=1
    )
    for base in (optimizer, bases[1]):
        base.train()
    for seed in range(3):
        for net, one in zip(nets, (optimizer, bases[1]), strict=True):
            backward(net, seed)
            one.step()
            one.zero_grad()
    assert not optimizer.in_basis_phase
    assert bases[0].param_groups[0]["train_mode"]
    trained = [values(net) for net in nets]
    bases[1].eval()
    average = nets[1][0].weight
    assert (average - trained[1]["0.weight"]).abs().max() > 1e-4
    torch.testing.assert_close(trained[0].pop("0.weight"), average.detach(), rtol=0, atol=1e-7)
    del trained[1]["0.weight"]
    torch.testing.assert_close(*trained, rtol=0, atol=0)

    # From here on the weight is the same in both modes, and the others move as before.
    weight = nets[0][0].weight.detach().clone()
    optimizer.eval()
    torch.testing.assert_close(nets[0][0].weight.detach(), weight, rtol=0, atol=0)
    torch.testing.assert_close(nets[0][2].weight, nets[1][2].weight, rtol=0, atol=0)
    optimizer.train()
    torch.testing.assert_close(nets[0][0].weight.detach(), weight, rtol=0, atol=0)
    assert not bases[0].state.get(nets[0][0].weight)


def test_averages_of_an_earlier_run():
    """An optimizer that has trained the weights before they become sparse."""
    net = make_net()
    base = Averaging(net.parameters())
    base.train()
    for seed in range(3):
        backward(net, seed)
        base.step()
    twin, other = copy.deepcopy((net, base))
    other.eval()
    sebp.apply_meprop_to_model(net, base, 30, "0")
    torch.testing.assert_close(net[0].weight, twin[0].weight, rtol=0, atol=1e-7)
    assert base.param_groups[0]["train_mode"]


@pytest.mark.usefixtures("lapack")
def test_schedule_free():
    """The package itself trains: losses fall, and a resumed run goes on bit for bit."""
    schedulefree = pytest.importorskip("schedulefree")

    def make(net):
        base = schedulefree.AdamWScheduleFree(net.parameters(), lr=1e-2)
        return sebp.apply_sparsegrad_to_model(
            net, base, 60, 3, layers="*", bases=None, fix_support_after=3
        )

    def train(net, optimizer, seeds):
        optimizer.train()
        losses = []
        for seed in seeds:
            torch.manual_seed(seed % 3)
            loss = net(torch.randn(9, 12)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        optimizer.eval()
        return losses

    net = make_net()
    optimizer = make(net)
    losses = train(net, optimizer, range(30))
    assert losses[-1] < 0.5 * losses[0]
    twin = make_net()
    twin.load_state_dict(net.state_dict())
    resumed = make(twin)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(net, optimizer, range(5)) == train(twin, resumed, range(5))
    torch.testing.assert_close(values(net), values(twin), rtol=0, atol=0)
    with pytest.raises(TypeError, match="needs a closure"):
        net = make_net()
        base = schedulefree.AdamWScheduleFreeClosure(net.parameters())
        sebp.apply_meprop_to_model(net, base, 30, "0")
