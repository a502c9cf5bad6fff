# SPDX-License-Identifier: Apache-2.0
"""LoRA: against its formula, and against Hugging Face PEFT's."""

import copy
import io
import pickle
import warnings

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
    with pytest.raises(TypeError):
        sebp.apply_lora_to_model(net, 2.5, layers="*")
    with pytest.raises(ValueError, match="no feed-forward layers"):
        sebp.apply_lora_to_model(net, 2)
    assert not hasattr(net[0], "lora_a")


def refused(net, message, layers="*"):
    """Expect a refusal that leaves the model as it was."""
    state, modules = (
        copy.deepcopy(net.state_dict()),
        {n: vars(m).copy() for n, m in net.named_modules()},
    )
    trains = {n: p.requires_grad for n, p in net.named_parameters()}
    with pytest.raises(ValueError, match=message):
        sebp.apply_lora_to_model(net, 2, layers=layers)
    assert {n: vars(m) for n, m in net.named_modules()} == modules
    assert {n: p.requires_grad for n, p in net.named_parameters()} == trains
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)


def test_applied_twice():
    """It is refused, on whatever part of the layers, and the first one goes on."""
    net = make_net()
    sebp.apply_lora_to_model(net, 2, layers="0")
    refused(net, "0: it has LoRA already")
    assert sebp.apply_lora_to_model(net, 2, layers="2") == ["2"]
    assert sebp.merge_lora(net) == ["0", "2"]
    assert sebp.merge_lora(net) == []
    assert sebp.apply_lora_to_model(net, 2, layers=["0", "0", "*"]) == ["0", "2"]


def test_a_layer_of_two_names():
    """It has LoRA once."""
    net = make_net()
    net.add_module("again", net[0])
    assert sebp.apply_lora_to_model(net, 2, layers="*") == ["0", "2"]
    nn.init.normal_(net[0].lora_b)
    x = torch.randn(3, 12)
    want = net[0](x)
    sebp.merge_lora(net)
    torch.testing.assert_close(net.again(x), want, rtol=1e-4, atol=1e-5)


def test_shared_weights():
    """A weight that is another module's too would be merged into both, whatever holds it."""
    net = nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 20), nn.Linear(12, 20))
    net[1].weight = net[0].weight
    refused(net, "1: its weight is that of 0", layers="1")
    net[1].weight = nn.Parameter(net[0].weight.detach())
    refused(net, "1: its weight is that of 0", layers="1")
    net[1].weight = nn.Parameter(net[0].weight.detach()[:10])
    refused(net, "1: its weight is that of 0", layers="1")
    # One buffer for all is no sharing.
    flat = torch.randn(3, 20, 12)
    for module, part in zip(net, flat, strict=True):
        module.weight = nn.Parameter(part)
    assert sebp.apply_lora_to_model(net, 2, layers="*") == ["1", "2"]


def test_a_weight_that_is_computed():
    """What is merged into it would be lost at the next forward."""
    from torch.nn.utils import prune

    net = make_net()
    prune.l1_unstructured(net[2], "weight", amount=0.5)
    with pytest.raises(ValueError, match="2: its weight is not a parameter"):
        sebp.apply_lora_to_model(net, 2, layers="*")
    assert not hasattr(net[0], "lora_a")


def test_own_attributes():
    net = make_net()
    net[2].lora_scale = 3.0
    refused(net, "2: it has an attribute lora_scale")


FROZEN = {
    "nothing": lambda name: False,
    "weights": lambda name: name.endswith("weight"),
    "biases": lambda name: name.endswith("bias"),
    "a layer": lambda name: name.startswith("0."),
    "all": lambda name: True,
}


@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen(frozen):
    """What was frozen before stays so, while the factors train and after they are merged."""
    net = make_net()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not FROZEN[frozen](name))
    trains = {name: p.requires_grad for name, p in net.named_parameters()}
    sebp.apply_lora_to_model(net, 2, layers="*")
    for name, parameter in net.named_parameters():
        want = "lora" in name or (trains[name] and not name.endswith("weight"))
        assert parameter.requires_grad == want, name
    net(torch.randn(4, 12)).square().mean().backward()
    assert net[0].lora_b.grad.any()
    assert net[2].lora_b.grad.any()
    assert net[0].weight.grad is None
    sebp.merge_lora(net)
    assert {name: p.requires_grad for name, p in net.named_parameters()} == trains


def test_frozen_afterwards():
    """Factors are parameters of the model; merging asks what was before them."""
    net = make_net()
    sebp.apply_lora_to_model(net, 2, layers="*")
    net.requires_grad_(False)
    assert not net[0].lora_a.requires_grad
    sebp.merge_lora(net)
    assert net[0].weight.requires_grad
    assert not net[0].bias.requires_grad
    sebp.apply_lora_to_model(net, 2, layers="0")
    net[0].weight.requires_grad_(False)
    sebp.merge_lora(net)
    assert net[0].weight.requires_grad


WIDE = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


@pytest.mark.parametrize("with_sebp", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", WIDE)
def test_dtypes(dtype, transposed, with_sebp):
    """Y is of the base's dtype, factors and gradients of float32 or more; merging rounds once."""
    wide = WIDE[dtype]
    if transposed:
        layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(20, 12)
        nn.init.normal_(layer.weight)
    else:
        layer = nn.Linear(12, 20)
    net = nn.Sequential(layer).to(dtype)
    if with_sebp:
        sebp.apply_sebp_to_model(net)
    sebp.apply_lora_to_model(net, 3, alpha=6, layers="*")
    assert {layer.lora_a.dtype, layer.lora_b.dtype} == {wide}
    nn.init.normal_(layer.lora_b)
    x, dy = torch.randn(5, 12, dtype=dtype, requires_grad=True), torch.randn(5, 20, dtype=dtype)
    y = net(x)
    assert y.dtype == dtype
    grads = torch.autograd.grad(y, (x, layer.lora_a, layer.lora_b), dy)
    assert [grad.dtype for grad in grads] == [dtype, wide, wide]

    a, b, x64 = (t.detach().double().requires_grad_() for t in (layer.lora_a, layer.lora_b, x))
    weight = layer.weight.double() if transposed else layer.weight.double().t()
    want = x64 @ weight + layer.bias.double() + 2 * (x64 @ a) @ b
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), want, rtol=rounding, atol=20 * rounding)
    wants = torch.autograd.grad(want, (x64, a, b), dy.double())
    torch.testing.assert_close(grads[0].double(), wants[0], rtol=rounding, atol=20 * rounding)
    exact = 20 * torch.finfo(wide).eps
    for grad, one in zip(grads[1:], wants[1:], strict=True):
        torch.testing.assert_close(grad.double(), one, rtol=exact, atol=20 * exact)

    product = 2 * (a @ b).detach()
    sum64 = layer.weight.double() + (product if transposed else product.t())
    sebp.merge_lora(net)
    assert layer.weight.dtype == dtype
    off = (layer.weight.double() - sum64).abs()
    # Half a unit in the last place, and what the sum is off by before.
    assert (off <= (0.5 * torch.finfo(dtype).eps + 20 * exact) * sum64.abs() + 20 * exact).all()


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(base):
    net = make_net().to(base)
    sebp.apply_sebp_to_model(net)
    sebp.apply_lora_to_model(net, 2, layers="*")
    nn.init.normal_(net[0].lora_b)
    x = torch.randn(5, 12, dtype=base)
    want = net.float()(x.float())
    net.to(base)
    for layer in (net[0], net[2]):
        layer.lora_a.data, layer.lora_b.data = layer.lora_a.data.float(), layer.lora_b.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.1)
    y.float().square().mean().backward()
    for factor in (net[0].lora_a, net[2].lora_b):
        assert factor.grad.dtype == torch.float32
        assert factor.grad.any()


def test_inputs_of_bfloat16_are_kept_as_they_are():
    """The library takes them with factors of float32; the product is that of a copy in float32."""
    net = nn.Sequential(nn.Linear(12, 20)).to(torch.bfloat16)
    sebp.apply_lora_to_model(net, 3, layers="*")
    nn.init.normal_(net[0].lora_b)
    x = torch.randn(5, 12, dtype=torch.bfloat16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = net(x)
    assert {t.dtype for t in saved if t.shape == x.shape} == {torch.bfloat16}
    wide = x.detach().float().requires_grad_()
    plain = nn.functional.linear(x, net[0].weight, net[0].bias)
    want = (plain + wide @ net[0].lora_a @ net[0].lora_b).to(torch.bfloat16)
    torch.testing.assert_close(y, want, rtol=2.0**-8, atol=1e-3)
    factors = net[0].lora_a, net[0].lora_b
    dy = torch.randn(5, 20).to(torch.bfloat16)
    got, other = (torch.autograd.grad(out, factors, dy) for out in (y, want))
    torch.testing.assert_close(got, other)


def test_small_steps_of_bfloat16():
    """Steps far below the spacing of bfloat16 add up."""
    net = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    sebp.apply_lora_to_model(net, 4, layers="*")
    nn.init.normal_(net[0].lora_b)
    before = net[0].lora_a.detach().clone()
    optimizer = torch.optim.AdamW([net[0].lora_a], lr=1e-6, weight_decay=0)
    for _ in range(20):
        optimizer.zero_grad()
        net(torch.ones(8, 64, dtype=torch.bfloat16)).float().square().mean().backward()
        optimizer.step()
    moved = (net[0].lora_a - before).abs()
    assert (moved > 1e-5).float().mean() > 0.9


def test_cast_afterwards():
    """The model's to() casts factors, too: they still compute, and a forward warns."""
    net = make_net()
    sebp.apply_lora_to_model(net, 2, layers="*")
    nn.init.normal_(net[0].lora_b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        want = net(torch.ones(3, 12))
    net.to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"factors of LoRA are of torch.bfloat16"):
        y = net(torch.ones(3, 12, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.1)
    weight = net[0].weight.double() + (net[0].lora_a.double() @ net[0].lora_b.double()).t()
    sebp.merge_lora(net)
    torch.testing.assert_close(net[0].weight.double(), weight, rtol=0.004, atol=1e-6)
    net.float()
    sebp.apply_lora_to_model(net, 2, layers="*")
    net.double()
    assert net(torch.ones(3, 12, dtype=torch.float64)).dtype == torch.float64
    assert sebp.merge_lora(net) == ["0", "2"]


def test_merge_into_a_weight_in_another_order():
    net = make_net()
    net[0].weight = nn.Parameter(torch.randn(12, 20).t())
    sebp.apply_lora_to_model(net, 2, layers="0")
    nn.init.normal_(net[0].lora_b)
    x = torch.randn(3, 12)
    want = net(x)
    sebp.merge_lora(net)
    torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-5)


def test_merge_that_overflows_float16():
    net = make_net().half()
    sebp.apply_lora_to_model(net, 2, layers="*")
    nn.init.constant_(net[2].lora_a, 300.0)
    nn.init.constant_(net[2].lora_b, 300.0)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="2: its weight would hold a NaN or Inf"):
        sebp.merge_lora(net)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints(dtype):
    """Factors are saved and loaded by name, and a model as a whole, with what it was before."""
    nets = [make_net().to(dtype) for _ in range(2)]
    for net in nets:
        net[0].weight.requires_grad_(False)
        sebp.apply_lora_to_model(net, 2, layers="*")
        nn.init.normal_(net[0].lora_b)
    assert {"0.lora_a", "0.lora_b", "2.lora_a", "2.lora_b"} <= nets[0].state_dict().keys()
    nets[1].load_state_dict(nets[0].state_dict())
    stream = io.BytesIO()
    torch.save(nets[0], stream)
    stream.seek(0)
    nets.append(torch.load(stream, weights_only=False))
    nets.append(pickle.loads(pickle.dumps(nets[0])))
    x = torch.randn(3, 12, dtype=dtype)
    want = nets[0](x)
    for net in nets:
        torch.testing.assert_close(net(x), want, rtol=0, atol=0)
        assert sebp.merge_lora(net) == ["0", "2"]
        assert not net[0].weight.requires_grad
        assert net[2].weight.requires_grad
        assert not net[0]._forward_hooks
    for net in nets[1:]:
        torch.testing.assert_close(net.state_dict(), nets[0].state_dict(), rtol=0, atol=0)


def test_transformer_encoder():
    """PyTorch's fast path for inference, which calls no layers, is not taken."""
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    sebp.apply_lora_to_model(net, 2, layers=["linear1", "linear2"])
    nn.init.normal_(net.linear1.lora_b)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        y = net(x)
    torch.testing.assert_close(y, net(x), rtol=1e-5, atol=1e-5)
    sebp.merge_lora(net)
    torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-5)


def test_compile():
    net = make_net().to(torch.bfloat16)
    sebp.apply_sebp_to_model(net)
    sebp.apply_lora_to_model(net, 2, layers="*")
    nn.init.normal_(net[0].lora_b)
    x = torch.randn(3, 12, dtype=torch.bfloat16)
    want = net(x)
    torch.testing.assert_close(
        torch.compile(net, backend="aot_eager", fullgraph=True)(x), want, rtol=0.02, atol=0.05
    )


def test_beside_a_sparse_optimizer():
    """Each layer is trained in one way."""
    net = make_net()
    optimizer = sebp.apply_meprop_to_model(
        net, torch.optim.AdamW(net.parameters(), lr=0.1), 5, layers="0"
    )
    refused(net, "0: a SparseOptimizer has it already")
    assert sebp.apply_lora_to_model(net, 2, layers="2") == ["2"]
    optimizer.release()
    with pytest.raises(ValueError, match="2: its weight is frozen"):
        sebp.apply_meprop_to_model(net, torch.optim.AdamW(net.parameters(), lr=0.1), 5, layers="2")


class Doubled(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_linear_layers_left_out(recwarn):
    """Of those that were asked for a warning tells."""
    net = nn.Sequential(nn.Linear(12, 12), Doubled(12, 12), nn.Linear(12, 12))
    assert sebp.apply_lora_to_model(net, 2, layers="0") == ["0"]
    assert not recwarn
    with pytest.warns(
        UserWarning, match="1 linear layers are left .*, such as 1: its class is Dou"
    ):
        assert sebp.apply_lora_to_model(net, 2, layers=["1", "2"]) == ["2"]
    net[1] = nn.Linear(12, 12)
    net[1].forward = torch.relu
    with (
        pytest.warns(UserWarning, match="such as 1: its forward has been replaced"),
        pytest.raises(ValueError, match="no linear layer to train"),
    ):
        sebp.apply_lora_to_model(net, 2, layers="1")
