# SPDX-License-Identifier: Apache-2.0
"""``sebp::attention`` as an operator: compilers, modes, FLOPs, seeds."""

import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from test_attend import CAUSAL, FULL, LAYOUTS, seen
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sebp.torch.attention.attend import Pattern, attend, attend_told
from sebp.torch.attention.texts import Side, Texts

PATTERNS = [FULL, CAUSAL, Pattern(True, 2), Pattern(False, 1)]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def texts_of(layout: str) -> Texts:
    of = np.array(LAYOUTS[layout])
    return Texts.of_segments(of) if of.max() > 1 else Texts.of_masks(of > 0, of > 0)


def told_by(texts: Texts, pattern: Pattern) -> tuple[Tensor, Tensor, Tensor]:
    seen = torch.tensor([pattern.causal, *pattern.windows], dtype=torch.int64)
    return texts.queries.as_tensor(), texts.keys.as_tensor(), seen


@pytest.fixture(autouse=True)
def without_graphs():
    yield
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------
# Texts as tensors


@pytest.mark.parametrize("layout", LAYOUTS)
def test_texts_are_what_their_tensors_tell(layout: str) -> None:
    texts = texts_of(layout)
    shape = texts.queries.shape
    tensor = texts.queries.as_tensor()
    assert tensor.dim() == (1 if layout in ("whole", "packed", "one", "one, then two") else 2)
    for told in (tensor, texts.queries.numbers()):
        again = Texts.of_tensors(told, told, shape, shape).queries
        np.testing.assert_array_equal(again.tokens, texts.queries.tokens)
        lengths = np.diff(texts.queries.offsets)
        found = np.diff(again.offsets)
        np.testing.assert_array_equal(found, lengths[: found.size])  # but for empty ones at the end
        assert not lengths[found.size :].any()
        assert (again.rows is None) == (texts.queries.rows is None)


def test_texts_without_tokens_keep_their_place() -> None:
    mask, keys = np.array([[1, 1], [0, 0], [1, 0]]) > 0, np.ones((3, 4), bool)
    texts = Texts.of_masks(mask, keys)
    given = texts.queries.as_tensor(), texts.keys.as_tensor()
    again = Texts.of_tensors(*given, (3, 2), (3, 4))
    assert np.diff(again.queries.offsets).tolist() == [2, 0, 1]
    assert np.diff(again.keys.offsets).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    "told, message",
    [
        ([0, 3], "from 0 to 3, for 8 tokens"),
        ([1, 8], "from 1 to 8"),
        ([0, 5, 4, 8], "never falls"),
        ([0, 3, 8], "over the end of a row of 4"),
        ([[1, 1], [2, 2]], "told for"),
    ],
)
def test_texts_that_cannot_be(told: list, message: str) -> None:
    given, q = torch.tensor(told), torch.randn(2, 4, 8)
    pattern = torch.tensor([0, -1, -1])
    with pytest.raises(ValueError, match=message):
        torch.ops.sebp.attention(q, q, q, None, given, given, pattern, None, 1, 1, 1.0)


# --------------------------------------------------------------------------------------------------
# The operator


@pytest.mark.parametrize("layout", ["packed", "right", "gaps", "packed, padded"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_operator_is_one(layout: str, has_bias: bool, dropout: float) -> None:
    texts = texts_of(layout)
    q, k, v = (draw(*texts.queries.shape, heads * 4) for heads in (4, 2, 2))
    longest = texts.queries.max_length
    bias = draw(4 * longest, longest) if has_bias else None
    seed = torch.tensor([7]) if dropout > 0 else None
    arguments = (q, k, v, bias, *told_by(texts, CAUSAL), seed, 4, 2, 0.5, 0.0, dropout, 0)
    torch.library.opcheck(torch.ops.sebp.attention.default, arguments)
    out, lse = torch.ops.sebp.attention(*arguments)
    assert out.requires_grad and not lse.requires_grad
    backward = (torch.randn_like(out), *arguments[:4], out, lse, *arguments[4:8])
    backward = [x.detach() if isinstance(x, Tensor) else x for x in backward]
    needs = [True, False, True, has_bias]
    # Without the check of its own derivative, which is refused.
    torch.library.opcheck(
        torch.ops.sebp.attention_backward.default,
        (*backward, needs, *arguments[8:]),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias_rows", [0, 1, 2])
def test_the_same_bits_where_others_step_in(layout: str, bias_rows: int) -> None:
    texts = texts_of(layout)
    batch, length = texts.queries.shape
    inputs = [draw(batch, heads, length, 8) for heads in (4, 2, 2)]
    inputs += [draw(min(bias_rows, batch), 4, length, length)] if bias_rows else []
    dout = torch.randn(batch, length, 4, 8)

    def step() -> list[Tensor]:
        torch.manual_seed(3)
        out = attend(*inputs[:3], texts, CAUSAL, *inputs[3:], dropout=0.5)
        return [out, *torch.autograd.grad(out, inputs, dout)]

    want = step()
    with FlopCounterMode(display=False):
        found = step()
    assert want[0].any() and all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("mode_is_first", [False, True])
@pytest.mark.parametrize("layout", ["packed", "gaps"])
def test_checkpointing_where_others_step_in_once(layout: str, mode_is_first: bool) -> None:
    """The operator and the direct way save as many tensors of the same shapes."""
    texts = texts_of(layout)
    inputs = [draw(*texts.queries.shape[:1], 2, texts.queries.shape[1], 8) for _ in range(3)]

    def run(*inputs: Tensor) -> Tensor:
        return attend(*inputs, texts, CAUSAL, dropout=0.5)

    torch.manual_seed(3)
    want = run(*inputs)
    dout = torch.randn_like(want)
    wanted = torch.autograd.grad(want, inputs, dout)
    torch.manual_seed(3)
    modes = [FlopCounterMode(display=False), nullcontext()]
    first, second = modes if mode_is_first else modes[::-1]
    with first:
        out = checkpoint(run, *inputs, use_reentrant=False)
    with second:
        found = torch.autograd.grad(out, inputs, dout)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_profilers_see_it() -> None:
    q, texts = draw(1, 2, 6, 4), Texts.of_rows(1, 6, 6)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        attend(q, q, q, texts, FULL).sum().backward()
    names = {event.key for event in found.key_averages()}
    assert {"sebp::attention", "sebp::attention_backward"} <= names


def test_a_second_derivative_of_the_operator_is_refused() -> None:
    q = draw(1, 6, 8)
    told = told_by(Texts.of_rows(1, 6, 6), FULL)
    out, _ = torch.ops.sebp.attention(q, q, q, None, *told, None, 2, 2, 1.0)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        dq.sum().backward()


# --------------------------------------------------------------------------------------------------
# FLOPs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_flops_are_those_of_pairs_that_see_each_other(layout: str, pattern: Pattern) -> None:
    of, texts = torch.tensor(LAYOUTS[layout]), texts_of(layout)
    q, k, v = (draw(*of.shape[:1], heads, of.shape[1], 8) for heads in (4, 2, 2))
    pairs = int(seen(of, of, pattern).sum())
    assert pairs > 8
    with FlopCounterMode(display=False) as counter:
        out = attend(q, k, v, texts, pattern)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 2 * 2 * pairs * 4 * 8
    assert counter.get_total_flops() == 3.5 * forward  # as PyTorch counts, five products for two


def test_flops_of_the_gradients_that_are_needed() -> None:
    for needed, products in (((0,), 3), ((1,), 3), ((2,), 2), ((0, 1), 4)):
        inputs = [torch.randn(1, 1, 6, 4).requires_grad_(i in needed) for i in range(3)]
        out = attend(*inputs, Texts.of_rows(1, 6, 6), FULL)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == products * 2 * 36 * 4


def test_flops_of_fewer_queries_and_of_tensors_without_values() -> None:
    q, k = draw(1, 2, 3, 4), draw(1, 2, 7, 4)
    with FlopCounterMode(display=False) as counter:
        attend(q, k, k, Texts.of_rows(1, 3, 7), CAUSAL)
    assert counter.get_total_flops() == 4 * (5 + 6 + 7) * 8
    with torch._subclasses.FakeTensorMode(), FlopCounterMode(display=False) as counter:
        x = torch.empty(2, 5, 8)
        told = torch.empty(3, dtype=torch.int64)
        torch.ops.sebp.attention(x, x, x, None, told, told, told, None, 2, 2, 1.0)
    assert counter.get_total_flops() == 4 * 2 * 5 * 5 * 8


# --------------------------------------------------------------------------------------------------
# Graphs

BACKENDS = ["aot_eager", "inductor"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_serves_all_texts(backend: str) -> None:
    inputs = [draw(1, heads, 9, 8) for heads in (4, 2, 2)]
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        lambda told, *inputs: attend_told(*inputs, told, 0.3, 2.0, 0.0) * 2,
        backend=backend,
        fullgraph=True,
    )
    for lengths, pattern in itertools.product(([3, 2, 4], [1, 8, 0], [0, 0, 9]), PATTERNS):
        texts = Texts.of_lengths(np.array(lengths))
        want = attend(*inputs, texts, pattern, scaling=0.3, softcap=2.0) * 2
        found = compiled(told_by(texts, pattern), *inputs)
        torch.testing.assert_close(found, want)
        dout = torch.randn_like(want)
        for a, b in zip(
            *(torch.autograd.grad(x, inputs, dout) for x in (found, want)), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_draws_its_seed_at_each_call(backend: str) -> None:
    told = told_by(Texts.of_rows(1, 16, 16), FULL)
    q, v = torch.zeros(1, 2, 16, 16), torch.eye(16).expand(1, 2, 16, 16).clone().requires_grad_()
    compiled = torch.compile(
        lambda q, v: attend_told(q, q, v, told, None, None, 0.5), backend=backend, fullgraph=True
    )
    state = torch.get_rng_state()
    first, second = compiled(q, v), compiled(q, v)
    assert not torch.equal(first, second)
    assert 0.3 < float((first == 0).float().mean()) < 0.7
    torch.set_rng_state(state)
    assert torch.equal(compiled(q, v), first)
    # The backward has its forward's, also where another forward has been between.
    dout = torch.randn_like(first)
    for out in (first, second):
        (dv,) = torch.autograd.grad(out, v, dout)
        for head in range(2):
            p = out[0, :, head].detach()
            torch.testing.assert_close(dv[0, head], p.t() @ dout[0, :, head], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_in_a_graph_repeats_dropout(backend: str) -> None:
    told = told_by(Texts.of_rows(1, 16, 16), CAUSAL)
    inputs = [draw(1, 2, 16, 8) for _ in range(3)]

    def run(*inputs: Tensor) -> Tensor:
        return attend_told(*inputs, told, None, None, 0.5)

    def again(*inputs: Tensor) -> Tensor:
        return checkpoint(run, *inputs, use_reentrant=False)

    dout = torch.randn(1, 16, 2, 8)
    found = []
    for function in (run, again):
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        torch.manual_seed(5)
        out = compiled(*inputs)
        found.append((out, *torch.autograd.grad(out, inputs, dout)))
    # The numbers of a graph are those of its other operators too, so only its own go together: V's
    # gradient is linear in the probabilities of the forward.
    for out, _, _, dv in found:
        assert out.abs().max() > 0.1
        torch.testing.assert_close((dv * inputs[2]).sum(), (out * dout).sum(), rtol=1e-4, atol=1e-4)
    if backend == "aot_eager":
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


def test_texts_of_numbers_in_a_graph() -> None:
    side = Side.of_segments(np.array(LAYOUTS["packed, padded"]))
    texts = Texts(side, side)
    inputs = [draw(2, 2, 9, 4) for _ in range(3)]
    compiled = torch.compile(
        lambda told, *inputs: attend_told(*inputs, told, None, None, 0.0),
        backend="aot_eager",
        fullgraph=True,
    )
    found, want = compiled(told_by(texts, CAUSAL), *inputs), attend(*inputs, texts, CAUSAL)
    assert torch.equal(found, want)
    dout = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(x, inputs, dout) for x in (found, want)), strict=True):
        assert torch.equal(a, b)
