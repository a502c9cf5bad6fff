# SPDX-License-Identifier: Apache-2.0
"""Which modules the library computes, and that models compute the same with them."""

import copy
import functools
import gc
import io
import math
import pickle
import weakref

import pytest
import torch
from models import make_batch, make_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import sebp
from sebp.torch.blocks import forms
from sebp.torch.blocks.code import same_code
from sebp.torch.blocks.put import give_blocks, take_blocks
from sebp.torch.forward import Forward, as_it_is

# How many norms the library computes in a forward of these models.
NORMS = {"bert": 4, "roberta": 4, "distilbert": 0, "gpt2": 0, "llama": 5, "mistral": 5, "qwen2": 5}


class RMSNorm(nn.Module):
    """As many models write it."""

    def __init__(self, size, epsilon=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = epsilon

    def forward(self, hidden_states):
        """Compute it."""
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class Output(nn.Module):
    """As BERT and its like have it."""

    def __init__(self, size, dropout=0.0):
        super().__init__()
        self.dense = nn.Linear(size, size)
        self.LayerNorm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states, input_tensor):
        hidden_states = self.dense(hidden_states)
        hidden_states = self.dropout(hidden_states)
        hidden_states = self.LayerNorm(hidden_states + input_tensor)
        return hidden_states  # noqa: RET504, as the models have it


class Gated(nn.Module):
    """As Llama and its like have it."""

    def __init__(self, size):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(size, 2 * size), nn.Linear(size, 2 * size)
        self.down_proj, self.act_fn = nn.Linear(2 * size, size), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Counting:
    """Counts the calls of the functions by which the library computes blocks."""

    def __init__(self, monkeypatch):
        self.calls = []
        for name in ("normalize", "activate", "drop"):
            monkeypatch.setattr(forms, name, self._counted(name, getattr(forms, name)))

    def _counted(self, name, function):
        @functools.wraps(function)
        def counted(*args, **kwargs):
            self.calls.append(name)
            return function(*args, **kwargs)

        return counted

    def take(self):
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture
def counting(monkeypatch):
    return Counting(monkeypatch)


def losses_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def assert_same(ours, right, tolerance=2e-5):
    assert torch.allclose(ours[0], right[0], rtol=tolerance, atol=tolerance)
    assert ours[1].keys() == right[1].keys()
    largest = max(float(g.abs().max()) for g in right[1].values())
    for name, gradient in ours[1].items():
        assert gradient.dtype == right[1][name].dtype
        off = float((gradient - right[1][name]).abs().max())
        assert off <= tolerance * largest, f"{name} is off by {off / largest}"


# --------------------------------------------------------------------------------------------------
# Whole models


@pytest.mark.parametrize("name", NORMS)
def test_models_train_and_evaluate_the_same(name, counting):
    model, batch = make_model(name).train(), make_batch(name, 1)
    right = losses_and_gradients(model, batch)
    names = {key for key, _ in model.named_modules()}
    given = give_blocks(model)
    assert sum(map(len, given.values())) >= 8
    assert_same(losses_and_gradients(model, batch), right)
    called = counting.take()
    assert called.count("normalize") == NORMS[name] and called.count("activate") == 2
    assert {key for key, _ in model.named_modules()} == names
    model.eval()
    with torch.no_grad():
        ours = model(**batch).loss
        assert "activate" in counting.take()
        take_blocks(model)
        assert abs(float(ours - model(**batch).loss)) < 1e-5
    assert counting.take() == []
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_pure_bfloat16_models_train_the_same(name, counting):
    model, batch = make_model(name).train().to(torch.bfloat16), make_batch(name, 1)
    right = losses_and_gradients(model, batch)
    give_blocks(model)
    assert_same(losses_and_gradients(model, batch), right, 0.05)
    assert counting.take().count("normalize") == NORMS[name]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_under_autocast_models_train_the_same(name, counting):
    model, batch = make_model(name).train(), make_batch(name, 1)
    with torch.autocast("cpu", torch.bfloat16):
        right = losses_and_gradients(model, batch)
        give_blocks(model)
        assert_same(losses_and_gradients(model, batch), right, 0.05)
    assert counting.take().count("normalize") == NORMS[name]


def test_float64_is_left_to_pytorch(counting):
    model, batch = make_model("llama"), make_batch("llama", 1)
    give_blocks(model)
    model.double()
    with as_it_is(model):
        right = losses_and_gradients(model, batch)
    assert_same(losses_and_gradients(model, batch), right, 0)
    assert counting.take() == []
    assert give_blocks(make_model("llama").double()) == {}
    assert give_blocks(make_model("llama").to("meta")) == {}


def test_prepare_puts_blocks_in_and_undo_takes_them_out(counting):
    model, batch = make_model("bert").train(), make_batch("bert", 1)
    right = losses_and_gradients(model, batch)
    prepared = sebp.prepare(model, quiet=True)
    assert "4 dropout, residual and norm in one pass" in str(prepared)
    assert_same(losses_and_gradients(model, batch), right)
    assert "normalize" in counting.take()
    again = sebp.prepare(model, quiet=True)
    assert again.blocks == {}
    again.undo()
    assert_same(losses_and_gradients(model, batch), right)
    assert "normalize" in counting.take()
    prepared.undo()
    assert not any("forward" in vars(module) for module in model.modules())


def test_remove_takes_what_prepare_put_in(counting):
    model = make_model("bert")
    sebp.prepare(model, quiet=True)
    sebp.remove_sebp_from_model(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_copies_and_pickles_keep_their_blocks(counting):
    model, batch = make_model("llama").train(), make_batch("llama", 1)
    right = losses_and_gradients(model, batch)
    give_blocks(model)
    file = io.BytesIO()
    pickle.dump(model, file)
    for other in (copy.deepcopy(model), pickle.loads(file.getvalue())):
        assert_same(losses_and_gradients(other, batch), right)
        assert counting.take().count("normalize") == 5
        forwards = [vars(m)["forward"] for m in other.modules() if "forward" in vars(m)]
        assert all(isinstance(one, Forward) for one in forwards)
        assert {id(one.module) for one in forwards} <= {id(m) for m in other.modules()}


def test_compiled_models_are_pytorchs(counting):
    block = Output(16, 0.0).train()
    x, residual = torch.randn(4, 16), torch.randn(4, 16)
    right = block(x, residual)
    give_blocks(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, residual), right, atol=1e-5)
    assert counting.take() == []


# --------------------------------------------------------------------------------------------------
# Dropout in models


def test_checkpointing_repeats_dropout():
    torch.manual_seed(0)
    block, x = Output(32, 0.3).train(), torch.randn(6, 32, requires_grad=True)
    give_blocks(block)
    torch.manual_seed(1)
    plain = torch.autograd.grad(block(x, x).square().sum(), [x, *block.parameters()])
    torch.manual_seed(1)
    y = checkpoint(block, x, x, use_reentrant=False)
    again = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("defer_logits", [False, True])
def test_gradient_checkpointing_of_models(name, reentrant, defer_logits):
    """The first call of a kind is watched, and what it saves is compared with the recomputation."""
    model, batch = make_model(name).train(), make_batch(name, 1)
    right = losses_and_gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with sebp.prepare(model, defer_logits=defer_logits, quiet=True):
        for _ in range(3):
            assert_same(losses_and_gradients(model, batch), right)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_all_is_pytorchs(p, counting):
    layer = nn.Dropout(p)
    give_blocks(nn.ModuleList([layer, nn.Linear(1, 1)]))
    x = torch.randn(5, 6)
    assert torch.equal(layer(x), x * (1 - p))
    assert counting.take() == []


def test_dropout_is_off_in_evaluation(counting):
    block = Output(16, 0.5)
    give_blocks(block)
    block.eval()
    x = torch.randn(3, 16)
    assert torch.equal(block(x, x), block(x, x))
    assert counting.take() == ["normalize"] * 2


def test_one_of_a_block_may_be_in_another_mode():
    block = Output(16, 0.5)
    give_blocks(block)
    block.train()
    block.dropout.eval()
    x = torch.randn(3, 16)
    assert torch.equal(block(x, x), block(x, x))


# --------------------------------------------------------------------------------------------------
# What does not fit runs as it is


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


# --------------------------------------------------------------------------------------------------
# Bytecode


def template(self, x):
    y = x * self.weight
    return y + 1.0


def test_names_of_variables_and_docstrings_do_not_count():
    def other(this, given: torch.Tensor) -> torch.Tensor:
        """Do it."""
        found: torch.Tensor = given * this.weight
        return found + 1.0

    assert same_code(other, template)


def off_by_a_constant(self, x):
    y = x * self.weight
    return y + 2.0


def off_by_a_type(self, x):
    y = x * self.weight
    return y + 1


def off_by_an_attribute(self, x):
    y = x * self.scale
    return y + 1.0


def off_by_an_operator(self, x):
    y = x / self.weight
    return y + 1.0


def off_by_a_variable(self, x):
    y = x * self.weight  # noqa: F841
    return x + 1.0


def off_by_a_default(self, x=None):
    y = x * self.weight
    return y + 1.0


def off_by_an_argument(self, x, *rest):
    y = x * self.weight
    return y + 1.0


OTHERS = [one for name, one in sorted(globals().items()) if name.startswith("off_by")]


@pytest.mark.parametrize("other", OTHERS, ids=lambda one: one.__name__)
def test_anything_else_counts(other):
    assert not same_code(other, template)


def test_global_names_have_to_stand_for_the_same():
    source = "def f(self, x):\n    return math.sqrt(x)\n"
    mine, theirs = {"math": math}, {"math": torch}
    exec(source, mine)
    exec(source, theirs)
    assert same_code(mine["f"], mine["f"])
    assert not same_code(theirs["f"], mine["f"])


@pytest.mark.parametrize("other", [len, None, torch.sqrt, nn.Linear])
def test_what_has_no_bytecode_is_not_known(other):
    assert not same_code(other, template)
