# SPDX-License-Identifier: Apache-2.0
"""Which modules the library computes, and that whatever does not fit runs as it is."""

import gc
import weakref

import pytest
import torch
from block_models import Gated, Output, RMSNorm
from torch import nn

from sebp.torch.blocks.put import give_blocks


def run_block(block):
    torch.manual_seed(2)
    x, residual = torch.randn(3, 16), torch.randn(3, 16)
    return block(x, residual) if isinstance(block, Output) else block(x)


@pytest.mark.parametrize("make", [lambda: Output(16), lambda: Gated(16), lambda: RMSNorm(16)])
def test_known_blocks_are_known(make, counting):
    block = make()
    right = run_block(block)
    give_blocks(block)
    assert torch.allclose(run_block(block), right, atol=1e-5)
    assert len(counting.take()) == 1


@pytest.mark.parametrize("part", ["dropout", "LayerNorm"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_within_a_block_are_called(part, kind):
    block, seen = Output(16), []
    give_blocks(block)
    getattr(getattr(block, part), kind)(lambda *args: seen.append(args[0]))
    run_block(block)
    assert seen == [getattr(block, part)]


def test_hooks_on_all_modules_are_called():
    block, seen = Output(16), []
    give_blocks(block)
    hook = nn.modules.module.register_module_forward_hook(lambda m, *args: seen.append(type(m)))
    try:
        run_block(block)
    finally:
        hook.remove()
    assert nn.LayerNorm in seen and nn.Dropout in seen


def test_a_part_replaced_later_is_called():
    block = Output(16)
    give_blocks(block)
    block.LayerNorm = nn.Identity()
    x = torch.randn(3, 16)
    assert torch.equal(block(x, x), block.dense(x) + x)
    gated = Gated(16)
    give_blocks(gated)
    gated.act_fn = nn.Tanh()
    right = gated.down_proj(torch.tanh(gated.gate_proj(x)) * gated.up_proj(x))
    assert torch.equal(gated(x), right)


def test_a_forward_replaced_later_is_called():
    block = Output(16)
    give_blocks(block)
    block.LayerNorm.forward = lambda x: x * 0
    assert bool((run_block(block) == 0).all())


def test_a_forward_replaced_before_is_left():
    layer = nn.RMSNorm(8, 1e-6)
    layer.forward = lambda x: x * 0
    assert give_blocks(layer) == {}


class Subclass(nn.LayerNorm):
    """One that might do anything."""

    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    "module",
    [
        Subclass(8),
        nn.LayerNorm(8),  # PyTorch computes it as fast
        nn.RMSNorm((2, 8), 1e-6),
        nn.RMSNorm(8),  # its epsilon depends on the dtype
        nn.ReLU(),
        nn.SiLU(inplace=True),
        nn.Dropout(0.5, inplace=True),
        nn.AlphaDropout(0.5),
        nn.Dropout1d(0.5),
        nn.GroupNorm(2, 8),
        nn.Tanh(),
    ],
    ids=lambda module: str(module),
)
def test_others_are_left(module):
    assert give_blocks(nn.ModuleList([module, nn.Linear(1, 1)])) == {}


def test_without_parameters_nothing_is_changed():
    assert give_blocks(nn.Sequential(nn.GELU(), nn.Dropout())) == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double(),
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x.to_sparse(),
        lambda x: nn.Parameter(x),
    ],
    ids=["float64", "transposed", "strided", "sparse", "parameter"],
)
def test_unusual_tensors_give_what_pytorch_gives(change):
    x = change(torch.randn(16, 16))
    for layer in (
        nn.SiLU(),
        nn.GELU(),
        nn.RMSNorm(x.shape[-1], 1e-6, dtype=x.dtype),
        nn.Dropout(0.0),
    ):
        try:
            right = layer(x)
        except (RuntimeError, NotImplementedError):
            continue
        give_blocks(nn.ModuleList([layer, nn.Linear(1, 1)]))
        ours = layer(x)
        assert type(ours) is type(right) and ours.stride() == right.stride() or x.is_sparse
        assert torch.allclose(ours.to_dense(), right.to_dense(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: nn.RMSNorm(16, 1e-6), lambda: RMSNorm(16)])
def test_mixed_dtypes_give_what_pytorch_gives(dtype, of_weight, make):
    layer = make().to(of_weight)
    x = torch.randn(3, 16, dtype=dtype)
    try:
        right = layer(x)
    except RuntimeError:
        right = None
    give_blocks(layer)
    if right is None:
        with pytest.raises(RuntimeError):
            layer(x)
        return
    assert layer(x).dtype == right.dtype
    assert torch.allclose(layer(x).float(), right.float(), atol=0.05)


def test_inference_mode_and_torch_func_are_pytorchs(counting):
    layer, x = nn.RMSNorm(8, 1e-6), torch.randn(3, 8)
    right = layer(x)
    give_blocks(layer)
    with torch.inference_mode():
        assert torch.equal(layer(x), right)
    jacobian = torch.func.jacrev(layer)(x)
    assert jacobian.shape == (3, 8, 3, 8)
    assert torch.equal(torch.func.vmap(layer)(x), right)
    assert counting.take() == []


def test_wrong_shapes_raise_as_before():
    layer = nn.RMSNorm(8, 1e-6)
    give_blocks(layer)
    with pytest.raises(RuntimeError):
        layer(torch.randn(3, 9))
    with pytest.raises(TypeError):
        layer(torch.randn(3, 8), torch.randn(3, 8))


def put(block):
    """Give one block to the library, whatever it has itself."""
    give_blocks(nn.ModuleList([block, nn.Linear(1, 1)]))
    return block


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Output(16), ("hidden_states", "input_tensor")),
        (lambda: Gated(16), ("x",)),
        (lambda: RMSNorm(16), ("hidden_states",)),
        (lambda: nn.Dropout(0.0), ("input",)),
        (nn.GELU, ("input",)),
    ],
)
def test_arguments_may_have_names(make, names):
    block, given = make(), {name: torch.randn(3, 16) for name in names}
    right = block(**given)
    put(block)
    assert torch.allclose(block(**given), right, atol=1e-6)
    with pytest.raises(TypeError):
        block(nonsense=1)


@pytest.mark.parametrize("part", ["LayerNorm", "dropout", "dense"])
@pytest.mark.parametrize("is_none", [False, True])
def test_parts_that_are_not_there(part, is_none):
    block = Output(16)
    delattr(block, part)
    if is_none:
        setattr(block, part, None)
    put(block)
    with pytest.raises((TypeError, AttributeError)):
        run_block(block)


@pytest.mark.parametrize("name", ["weight", "variance_epsilon"])
def test_a_norm_without_its_parts_is_left(name):
    norm = RMSNorm(16)
    delattr(norm, name)
    assert put(norm) is norm and "forward" not in vars(norm)


def test_a_bias_that_the_forward_does_not_read_is_not_added():
    norm = RMSNorm(16)
    right = run_block(norm)
    norm.bias = nn.Parameter(torch.ones(16))
    assert torch.allclose(run_block(put(norm)), right, atol=1e-6)


def test_an_epsilon_that_is_learned_has_its_gradient():
    norm = RMSNorm(16)
    norm.variance_epsilon = nn.Parameter(torch.tensor(0.1))
    run_block(put(norm)).sum().backward()
    assert norm.variance_epsilon.grad is not None


class Noisy(nn.Module):
    """A parametrization that draws random numbers."""

    def forward(self, x):
        return x * torch.rand(())


def test_a_parametrized_gain_is_computed_once():
    norm = RMSNorm(16)
    nn.utils.parametrize.register_parametrization(norm, "weight", Noisy())
    right = run_block(norm)
    assert torch.allclose(run_block(put(norm)), right, atol=1e-6)


def test_scripted_modules_are_left():
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 4))))
    give_blocks(model)
    assert model(torch.randn(2, 4)).shape == (2, 4)


class Unhashable:
    """A forward that is an object, and equal to any other."""

    def __eq__(self, other):
        return True

    def __call__(self, x):
        return x


def test_a_forward_that_is_an_object_is_not_known():
    kind = type("Kind", (nn.Module,), {"forward": Unhashable()})
    assert put(kind())(3) == 3


@pytest.mark.parametrize("make", [lambda: RMSNorm(16), lambda: nn.RMSNorm(16, 1e-6), nn.GELU])
@pytest.mark.parametrize("is_before", [False, True])
def test_a_class_that_is_patched_runs_as_patched(make, is_before, monkeypatch):
    block, patched = make(), lambda self, x: x * 0
    if not is_before:
        put(block)
    monkeypatch.setattr(type(block), "forward", patched)
    assert not put(block)(torch.randn(3, 16)).any()
    monkeypatch.undo()
    assert bool(block(torch.randn(3, 16)).any())


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.Dropout])
def test_a_class_that_is_patched_runs_so_within_a_block(kind, monkeypatch):
    block = put(Output(16))
    monkeypatch.setattr(kind, "forward", lambda self, x: x * 0)
    x = torch.randn(3, 16)
    right = torch.zeros(3, 16) if kind is nn.LayerNorm else block.LayerNorm(x)
    assert torch.allclose(block(x, x), right, atol=1e-6)


@pytest.mark.parametrize("of_all", [False, True])
def test_calls_that_are_replaced_are_made(of_all, monkeypatch):
    block, seen = put(Output(16)), []
    kind = nn.Module if of_all else nn.LayerNorm
    call = nn.Module.__call__

    def counted(self, *args):
        seen.append(type(self))
        return call(self, *args)

    monkeypatch.setattr(kind, "__call__", counted)
    run_block(block)
    assert nn.LayerNorm in seen


def test_nothing_keeps_what_a_forward_holds_alive():
    def hold(norm):
        class Local(nn.Module):
            def forward(self, x):
                return x * norm.weight

        put(Local())
        return weakref.ref(norm)

    gone = hold(RMSNorm(16))
    gc.collect()
    assert gone() is None
