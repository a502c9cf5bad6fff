# SPDX-License-Identifier: Apache-2.0
"""LoRA: against its formula, and against Hugging Face PEFT's."""

import copy

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import sebp  # noqa: E402


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8))


@pytest.mark.parametrize("with_sebp", [False, True])
def test_formula(with_sebp):
    net = make_net()
    if with_sebp:
        sebp.apply_sebp_to_model(net)
    assert sebp.apply_lora_to_model(net, 3, alpha=6, layers="*") == ["0", "2"]
    layer = net[0]
    assert (layer.lora_a.shape, layer.lora_b.shape) == ((12, 3), (3, 20))
    assert layer.lora_a.abs().max() > 0
    assert not layer.lora_b.any()
    assert not layer.weight.requires_grad
    nn.init.normal_(layer.lora_b)
    x, dy = torch.randn(5, 12, requires_grad=True), torch.randn(5, 20)
    dy[1:3] = 0
    inputs = (x, layer.lora_a, layer.lora_b, layer.bias)
    want_y = x @ layer.weight.t() + layer.bias + 2 * (x @ layer.lora_a) @ layer.lora_b
    want = torch.autograd.grad(want_y, inputs, dy)
    y = layer(x)
    torch.testing.assert_close(y, want_y)
    for one, other in zip(torch.autograd.grad(y, inputs, dy), want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_merge(name):
    """The merged model is one of its class with the same outputs, and trains as before."""
    pytest.importorskip("transformers")
    from models import make_batch, make_model

    model = make_model(name)
    keys = list(model.state_dict())
    modules = {n: set(vars(m)) for n, m in model.named_modules()}
    names = sebp.apply_lora_to_model(model, 3)
    assert len(names) == 4
    train = [p for n, p in model.named_parameters() if p.requires_grad]
    assert sum(p.numel() for n, p in model.named_parameters() if "lora" in n) == sum(
        3 * sum(model.get_submodule(n).weight.shape) for n in names
    )
    weights = {n: model.get_submodule(n).weight.detach().clone() for n in names}
    optimizer = torch.optim.AdamW(train, lr=1e-2)
    batch = make_batch(name, 1)
    losses = []
    for _ in range(10):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(w, model.get_submodule(n).weight) for n, w in weights.items())
    with torch.no_grad():
        want = model(**batch).logits
        assert sebp.merge_lora(model) == names
        torch.testing.assert_close(model(**batch).logits, want, rtol=1e-4, atol=1e-5)
    assert not any(torch.equal(w, model.get_submodule(n).weight) for n, w in weights.items())
    assert list(model.state_dict()) == keys
    assert {n: set(vars(m)) for n, m in model.named_modules()} == modules
    assert all(p.requires_grad for p in model.parameters())
    assert sebp.merge_lora(model) == []


def test_peft():
    """Ten steps from the same start give the losses and the factors of PEFT's LoRA."""
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    from models import make_batch, make_model

    ours, theirs = make_model("bert"), make_model("bert")
    names = sebp.apply_lora_to_model(ours, 3, alpha=6)
    config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, target_modules=names)
    theirs = peft.get_peft_model(theirs, config)
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_("lora" in name)
    for name in names:
        twin = theirs.base_model.model.get_submodule(name)
        a = ours.get_submodule(name).lora_a
        assert twin.lora_A["default"].weight.shape == (3, a.shape[0])
        with torch.no_grad():
            a.copy_(twin.lora_A["default"].weight.t())
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for model in (ours, theirs)
    ]
    for step in range(10):
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(**make_batch("bert", step)).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
    for name in names:
        layer, twin = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
        product = (layer.lora_a @ layer.lora_b).t()
        want = twin.lora_B["default"].weight @ twin.lora_A["default"].weight
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(product, want, rtol=0, atol=1e-3)


def test_other_hooks():
    """A hook that was there before sees the whole output, as it does of the merged layer."""
    net = make_net()
    net[0].register_forward_hook(lambda module, args, y: 3 * y)
    sebp.apply_lora_to_model(net, 2, layers="*")
    nn.init.normal_(net[0].lora_b)
    x = torch.randn(4, 12)
    want = net(x)
    sebp.merge_lora(net)
    torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-5)


def test_merge_of_what_is_not_finite():
    """No weight is changed if one of them could not be read afterwards."""
    net = make_net()
    sebp.apply_lora_to_model(net, 2, layers="*")
    nn.init.normal_(net[0].lora_b)
    nn.init.constant_(net[2].lora_b, float("nan"))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="2: lora_a or lora_b holds a NaN"):
        sebp.merge_lora(net)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    nn.init.zeros_(net[2].lora_b)
    assert sebp.merge_lora(net) == ["0", "2"]


def test_copies():
    net = make_net()
    sebp.apply_lora_to_model(net, 2, layers="*")
    nn.init.normal_(net[0].lora_b)
    twin, x = copy.deepcopy(net), torch.randn(4, 12)
    torch.testing.assert_close(twin(x), net(x))
    sebp.merge_lora(net)
    torch.testing.assert_close(twin(x), net(x))
    sebp.merge_lora(twin)
    torch.testing.assert_close(twin(x), net(x))


def test_refusals():
    net = make_net()
    for rank, alpha, message in ((0, None, "rank is 0"), (2, float("nan"), "alpha is nan")):
        with pytest.raises(ValueError, match=message):
            sebp.apply_lora_to_model(net, rank, alpha, layers="*")
    with pytest.raises(ValueError, match="no feed-forward layers"):
        sebp.apply_lora_to_model(net, 2)
    assert not hasattr(net[0], "lora_a")
    sebp.apply_lora_to_model(net, 2, layers="*")
    with pytest.raises(ValueError, match="0: its weight is frozen"):
        sebp.apply_lora_to_model(net, 2, layers="*")
