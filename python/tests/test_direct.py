# SPDX-License-Identifier: Apache-2.0
"""Calls without PyTorch's dispatcher: when they are made, and that nobody can tell."""

import copy
import itertools
import os
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import sebp  # noqa: E402
from sebp._rules import parse_rule  # noqa: E402
from sebp.torch import linear  # noqa: E402
from sebp.torch.linear_layers import ops  # noqa: E402
from sebp.torch.linear_layers.direct import is_direct  # noqa: E402
from sebp.torch.linear_layers.linear import sparse_linear  # noqa: E402

OPERATOR = torch.ops.sebp.linear.default


def inputs(needs=(True, True, True), dtype=torch.float32, transposed=False):
    x, w, bias = torch.randn(3, 5, 4), torch.randn(6, 4), torch.randn(6)
    tensors = x, w.t().contiguous() if transposed else w, bias
    return [t.to(dtype).requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]


def gradient(dtype=torch.float32):
    """A dY of which some rows are zero."""
    return (torch.randn(3, 5, 6) * (torch.arange(5) < 3)[:, None]).to(dtype)


def gradients(y, tensors, dy, **options):
    wanted = [t for t in tensors if t.requires_grad]
    return torch.autograd.grad(y, wanted, dy, **options)


def same(got, want, is_zero=False):
    assert len(got) == len(want) > 0
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one, other)
    assert any(bool(other.any()) for other in want) != is_zero


def as_operator(x, w, bias):
    return OPERATOR(x, w, bias)


@contextmanager
def counted_calls():
    """Count the calls of each of the package's operators."""
    calls = {"linear_forward": 0, "linear_backward": 0}

    def spy(name):
        function = getattr(ops, name)

        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            patch.setattr(ops, name, spy(name))
        yield calls


# --------------------------------------------------------------------------------------------------
# Where it is so


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_plain_calls_are_direct(lead, dtype):
    """If this fails, layers still work, and every call costs the dispatcher and the operator."""
    layer = nn.Linear(4, 6).to(dtype)
    sebp.apply_sebp_to_model(layer)
    x = torch.randn(*lead, 4).to(dtype).requires_grad_()
    with counted_calls() as calls:
        y = layer(x)
        y.backward(torch.ones_like(y))
    assert y.grad_fn.name() == "sebp_linearBackward"
    assert calls == {"linear_forward": 0, "linear_backward": 0}
    assert bool(layer.weight.grad.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [False, True])
def test_whole_steps_are_direct(dtype, cast):
    """Within a model, under autocast and in every backward of a step."""
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3, bias=False)).to(dtype)
    sebp.apply_sebp_to_model(model)
    optimizer = torch.optim.AdamW(model.parameters())
    with counted_calls() as calls:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16) if cast else nullcontext():
                loss = model(torch.randn(7, 4).to(dtype)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert calls == {"linear_forward": 0, "linear_backward": 0}


# --------------------------------------------------------------------------------------------------
# That it is the same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:])
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("rows", ["nonzero", 4])
def test_same_bits(dtype, transposed, needs, cast, rows):
    tensors = inputs(needs, dtype, transposed)
    rule = parse_rule(rows)
    with torch.autocast("cpu", torch.bfloat16) if cast else nullcontext():
        y = sparse_linear(*tensors, rule, transposed)
        want = OPERATOR(*tensors, None, transposed, *rule)
    assert (y.grad_fn.name() == "sebp_linearBackward") and "sebp_linearB" not in want.grad_fn.name()
    same([y.detach()], [want.detach()])
    dy = gradient(y.dtype)
    same(gradients(y, tensors, dy), gradients(want, tensors, dy))


@pytest.mark.parametrize(
    "make", ["transposed", "gaps", "expanded", "negated", "empty", "0 columns"]
)
def test_same_bits_of_other_layouts(make):
    x, w, bias = inputs()
    dy = gradient()
    if make == "transposed":
        x, w = torch.randn(4, 5, 3).transpose(0, 2), torch.randn(4, 6).t()
    elif make == "gaps":
        x, w = torch.randn(3, 5, 9)[..., 2:6], torch.randn(6, 7)[:, :4]
        dy = dy.repeat(1, 1, 2)[..., :6]
    elif make == "expanded":
        x, dy = torch.randn(5, 4).expand(3, 5, 4), torch.ones(()).expand(3, 5, 6)
    elif make == "negated":
        x, dy = (torch.complex(t.detach(), t.detach()).conj().imag for t in (x, dy))
        assert x.is_neg() and dy.is_neg()
    elif make == "empty":
        x, dy = x.detach()[:0], dy[:0]
    else:
        x, w = x.detach()[..., :0], w.detach()[:, :0]
    tensors = [t.detach().requires_grad_() for t in (x, w, bias)]
    y, want = linear(*tensors), OPERATOR(*tensors)
    assert torch.equal(y, want)
    same(gradients(y, tensors, dy), gradients(want, tensors, dy), is_zero=make == "empty")


def test_saved_tensors_and_hooks():
    """Both save the same tensors; hooks of tensors and of the graph see the same gradients."""
    results = []
    for function in (linear, as_operator):
        torch.manual_seed(0)
        tensors, dy, seen = inputs(), gradient(), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, seen=seen: seen.append(t) or t * 2, lambda t, seen=seen: seen.append(t) or t
        ):
            y = function(*tensors)
        for tensor in (*tensors, y):
            tensor.register_hook(lambda g, seen=seen: seen.append(g) or g * 3)
        y.grad_fn.register_hook(lambda gx, gy, seen=seen: seen.extend((*gx[:3], *gy)))
        y.grad_fn.register_prehook(lambda gy, seen=seen: seen.extend(gy))
        results.append([*seen, *gradients(y, tensors, dy), *seen])
    same(*results)


@pytest.mark.parametrize("unpacked", [torch.float64, "Parameter", "view"])
def test_unpacked_as_something_else(unpacked):
    """What a hook gives back is not what was saved, so it is looked at again."""

    def unpack(tensor):
        if unpacked == "Parameter":
            return nn.Parameter(tensor)
        return tensor[...] if unpacked == "view" else tensor.to(unpacked)

    results = []
    for function in (linear, as_operator):
        torch.manual_seed(0)
        tensors, dy = inputs(), gradient()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), unpack):
            y = function(*tensors)
        try:
            results.append(gradients(y, tensors, dy))
        except RuntimeError as error:
            results.append(type(error))
    if isinstance(results[1], type):
        assert results[0] is results[1]
    else:
        same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("which", "shape"), [(0, (2, 5, 4)), (0, (3, 5, 3)), (1, (5, 4)), (1, (6, 5))]
)
def test_unpacked_in_another_size(which, shape, dtype):
    """Sizes are those of the tensors: nothing is read past their end."""
    tensors = inputs(dtype=dtype)
    other = torch.ones(shape, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.dim() == 3, lambda is_x: other if is_x == (which == 0) else tensors[is_x ^ 1]
    ):
        y = linear(*tensors)
    with pytest.raises(
        (sebp.SebpError, RuntimeError), match="should be|must match|invalid gradient"
    ):
        y.backward(gradient(dtype))


@pytest.mark.parametrize("kind", ["reentrant", "not", "selective", "counted in the backward"])
@pytest.mark.parametrize("cast", [False, True])
def test_checkpoints(kind, cast):
    options = {"use_reentrant": kind == "reentrant"}
    if kind == "selective":
        options["context_fn"] = lambda: create_selective_checkpoint_contexts([OPERATOR])
    counter = FlopCounterMode(display=False) if kind == "counted in the backward" else nullcontext()
    results = []
    for function in (linear, as_operator):
        torch.manual_seed(0)
        tensors, dy = inputs(), gradient(torch.bfloat16 if cast else torch.float32)
        with torch.autocast("cpu", torch.bfloat16) if cast else nullcontext():
            y = checkpoint(lambda *t, f=function: f(torch.tanh(t[0]), *t[1:]), *tensors, **options)
        with counter:
            y.backward(dy)
        results.append([t.grad for t in tensors])
    same(*results)


@pytest.mark.parametrize("rows", ["nonzero", 4])
def test_second_derivatives(rows):
    results = []
    rule = parse_rule(rows)
    for function in (lambda *t: linear(*t, rows=rows), lambda *t: OPERATOR(*t, None, False, *rule)):
        torch.manual_seed(0)
        tensors, dy = inputs(), gradient().requires_grad_()
        first = gradients(function(*tensors), tensors, dy, create_graph=True)
        loss = sum((g.square() * g).sum() for g in first)
        results.append([*first, *torch.autograd.grad(loss, (tensors[0], tensors[1], dy))])
    same(*results)


def test_anomaly_mode():
    x, w, bias = inputs()
    with torch.autograd.detect_anomaly(check_nan=True), pytest.warns(UserWarning, match="linear"):
        y = linear(x, w, bias)
        with pytest.raises(RuntimeError, match="'sebp_linearBackward' returned nan values"):
            y.backward(torch.full_like(y, float("nan")))


def test_copies():
    layer = nn.Linear(4, 6)
    sebp.apply_sebp_to_model(layer)
    layer(torch.randn(3, 4)).sum().backward()
    twin = copy.deepcopy(layer)
    x = torch.randn(5, 4)
    y, want, dy = twin(x), layer(x), torch.ones(5, 6)
    assert y.grad_fn.name() == want.grad_fn.name() == "sebp_linearBackward"
    same(gradients(y, [twin.weight], dy), gradients(want, [layer.weight], dy))


def test_threads():
    """Several threads' backwards through one graph and one weight."""
    weight = torch.randn(6, 4).requires_grad_()
    xs = [torch.randn(9, 4) for _ in range(4)]
    ys = [linear(x, weight) for x in xs]
    failed = []

    def work(y):
        try:
            for _ in range(20):
                y.backward(torch.ones_like(y), retain_graph=True)
        except Exception as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=work, args=(y,)) for y in ys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    want = 20 * sum(x.sum(0) for x in xs).expand(6, 4)
    torch.testing.assert_close(weight.grad, want, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forks():
    """A child goes on with the context and the graph that it has inherited."""
    tensors, dy = inputs(), gradient()
    y = linear(*tensors)
    want = gradients(y, tensors, dy, retain_graph=True)
    child = os.fork()
    if child == 0:
        is_same = False
        try:
            torch.set_num_threads(1)
            again = linear(*tensors)
            for one in (y, again):
                same(gradients(one, tensors, dy), want)
            is_same = again.grad_fn.name() == "sebp_linearBackward"
        finally:
            os._exit(0 if is_same else 1)
    assert os.waitpid(child, 0)[1] == 0


# --------------------------------------------------------------------------------------------------
# Where it is not so


class Seen(TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_operators():
    tensors, dy = inputs(), gradient()
    with Seen() as both:
        y = linear(*tensors)
        gradients(y, tensors, dy)
    y = linear(*tensors)
    with Seen() as backward:
        gradients(y, tensors, dy)
    assert {"sebp::linear", "sebp::linear_backward"} <= both.names
    assert "sebp::linear_backward" in backward.names


def test_function_modes_see_the_operator():
    with SeenFunctions() as mode:
        linear(*inputs())
    assert OPERATOR in mode.functions


def test_flop_counters():
    tensors = inputs()
    counts = []
    for function in (linear, as_operator, nn.functional.linear):
        with FlopCounterMode(display=False) as forward:
            y = function(*tensors)
        y = function(*tensors)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1] == counts[2] == (2 * 15 * 6 * 4, 4 * 15 * 6 * 4)


def test_profilers_see_the_operators():
    tensors, dy = inputs(), gradient()
    before = linear(*tensors)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        linear(*tensors)
        gradients(before, tensors, dy)
    names = {event.key for event in profiler.key_averages()}
    assert {"sebp::linear", "sebp::linear_backward"} <= names


def test_batched_gradients():
    """Neither kind of vmap goes past the operator."""
    tensors = inputs()
    dys = torch.stack([gradient(), gradient()])
    y = linear(*tensors)
    want = [gradients(y, tensors, dy, retain_graph=True) for dy in dys]
    want = [torch.stack(both) for both in zip(*want, strict=True)]
    got = gradients(y, tensors, dys, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(got, tuple(want))
    got = torch.func.vmap(lambda dy: gradients(y, tensors, dy, retain_graph=True))(dys)
    torch.testing.assert_close(got, tuple(want))


def test_tracing_records_pytorch_alone():
    x, w, bias = (t.detach() for t in inputs())
    layer = nn.Linear(4, 6)
    sebp.apply_sebp_to_model(layer)
    graph = torch.jit.trace(layer, x).graph
    assert "sebp" not in str(graph) and "aten::linear" in str(graph)
    exported = torch.export.export(layer, (x,), strict=False)
    assert "sebp" not in str(exported.graph)


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t.to("meta"),
        lambda t: t.double().to_sparse(),
        lambda t: t.to_mkldnn(),
        lambda t: torch.complex(t, t).conj(),
        lambda t: torch.complex(t, t).conj().imag,
        lambda t: torch._efficientzerotensor(t.shape),
        lambda t: torch.nested.nested_tensor([t, t]),
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        lambda t: torch._subclasses.FakeTensorMode().from_tensor(t),
        lambda t: nn.Buffer(t).as_subclass(type("Other", (torch.Tensor,), {})),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_others_know_about(make):
    tensor = torch.ones(3, 4)
    assert is_direct(tensor, nn.Parameter(tensor), None)
    assert not is_direct(tensor, make(tensor))


def test_threads_that_others_know_about():
    tensor = torch.ones(3, 4)
    with torch.inference_mode():
        made = torch.ones(3, 4)
        assert not is_direct(tensor)
    assert not is_direct(made)
    with forward_ad.dual_level():
        assert not is_direct(tensor)
    with torch._C._AutoDispatchBelowAutograd():
        assert not is_direct(tensor)
    with torch.device("cpu"):
        assert not is_direct(tensor)
    inside = []
    torch.func.vmap(lambda t: inside.append(is_direct(tensor)) or t)(tensor)
    torch.func.functionalize(lambda t: inside.append(is_direct(tensor)) or t * 1)(tensor)
    assert inside == [False, False]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert is_direct(tensor)


@pytest.mark.parametrize("compiled_autograd", [False, True])
def test_compile(compiled_autograd):
    tensors, dy = inputs(), gradient()
    want = gradients(OPERATOR(*tensors), tensors, dy)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=compiled_autograd):
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        with counted_calls() as calls:
            y = compiled(*tensors)
            y.backward(dy)
    assert calls["linear_backward"] > 0
    same([t.grad for t in tensors], want)


def test_compiled_backward_of_a_direct_forward():
    tensors, dy = inputs(), gradient()
    want = gradients(OPERATOR(*tensors), tensors, dy)
    y = linear(*tensors)
    compiler = torch.compile(backend="aot_eager")
    with torch._dynamo.compiled_autograd._enable(compiler):
        y.backward(dy)
    same([t.grad for t in tensors], want)


def test_another_pytorch():
    """Without the functions that tell who steps in, all goes by the operator."""
    program = """
import torch
import torch._dynamo
del torch._C._dispatch_keys
from sebp.torch import linear
w = torch.ones(6, 4, requires_grad=True)
y = linear(torch.ones(3, 4), w)
y.sum().backward()
assert "sebp_linearB" not in y.grad_fn.name() and "sebp" in y.grad_fn.name()
assert bool((w.grad == 3).all())
"""
    subprocess.run([sys.executable, "-c", program], check=True)
