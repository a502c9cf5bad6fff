# SPDX-License-Identifier: Apache-2.0
"""Tensors on a GPU: what the library computes there is what PyTorch computes in float64.

All of it is skipped without a GPU, and with a library that was built without CUDA.
"""

import copy
import subprocess
import sys
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

import sebp  # noqa: E402
from sebp._rules import parse_rule  # noqa: E402
from sebp.core import Context, Rows, SebpError  # noqa: E402
from sebp.torch import linear_cross_entropy  # noqa: E402
from sebp.torch.attention.attend import Pattern, attend  # noqa: E402
from sebp.torch.attention.texts import Texts  # noqa: E402
from sebp.torch.blocks.activation import Activation, activate  # noqa: E402
from sebp.torch.blocks.dropout import drop  # noqa: E402
from sebp.torch.blocks.norm import Norm, normalize  # noqa: E402
from sebp.torch.blocks.rotary import rotate, rotate_whole_heads  # noqa: E402
from sebp.torch.common.context import context_of  # noqa: E402
from sebp.torch.common.devices import cuda_version  # noqa: E402
from sebp.torch.common.rows import find_rows  # noqa: E402
from sebp.torch.common.tensors import matrix_of  # noqa: E402
from sebp.torch.common.work import work_done  # noqa: E402
from sebp.torch.linear_layers.products import library_backward  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(not cuda_version(), reason="the library was built without CUDA"),
]

F32, BF16 = torch.float32, torch.bfloat16
# Of sums of some hundreds of products, and of what is rounded once, as a share of the largest
# element.
TOLERANCE = {F32: 1e-5, BF16: 5e-3}


def off(ours, right):
    """Return the largest difference as a share of the largest element."""
    assert ours.shape == right.shape
    if right.numel() == 0:
        return 0.0
    ours, right = ours.detach().double(), right.detach().double()
    assert ours.device == right.device
    return float((ours - right).abs().max() / right.abs().max().clamp_min(1e-30))


def draw(*shape, dtype=F32):
    return torch.randn(shape, device="cuda").to(dtype)


def leaf(*shape, dtype=F32):
    return draw(*shape, dtype=dtype).requires_grad_()


def in_double(*tensors):
    return tuple(t.detach().double().requires_grad_(t.requires_grad) for t in tensors)


def some_rows(dy, share):
    """Set all but a share of a gradient's rows to zero."""
    rows = dy.view(-1, dy.shape[-1])
    rows[torch.randperm(len(rows), device=dy.device)[round(share * len(rows)) :]] = 0
    return dy


# --------------------------------------------------------------------------------------------------
# The linear layer


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(3, 5, 33, 17), (64, 8, 256, 384), (1, 1, 64, 8)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_float64(dtype, shape, share, transposed):
    *lead, k, n = shape
    x, b = leaf(*lead, k, dtype=dtype), leaf(n, dtype=dtype)
    w = leaf(*((k, n) if transposed else (n, k)), dtype=dtype)
    dy = some_rows(draw(*lead, n, dtype=dtype), share)
    before = sum(work.active for work in work_done().values())
    y = torch.ops.sebp.linear(x, w, b, None, transposed)
    ours = torch.autograd.grad(y, (x, w, b), dy)
    active = sum(work.active for work in work_done().values()) - before
    assert active == int(dy.view(-1, n).ne(0).any(1).sum())
    right = in_double(x, w, b)
    weight = right[1].t() if transposed else right[1]
    expected = functional.linear(right[0], weight, right[2])
    assert off(y, expected) <= TOLERANCE[dtype]
    gradients = torch.autograd.grad(expected, right, dy.double())
    for found, known, one in zip(ours, gradients, (x, w, b), strict=True):
        assert found.dtype == one.dtype
        assert off(found, known) <= TOLERANCE[dtype]


def test_layers_are_computed_by_the_library_without_the_dispatcher():
    layer = nn.Linear(64, 48, device="cuda")
    sebp.apply_sebp_to_model(layer)
    y = layer(draw(8, 64))
    assert "sebp_linear" in y.grad_fn.name()
    assert "sebp_linear" in layer(leaf(8, 64)[::2]).grad_fn.name()


def test_rows_by_a_rule():
    x, w, dy = leaf(40, 64), leaf(32, 64), draw(40, 32)
    dx, dw = torch.autograd.grad(sebp.torch.linear(x, w, rows=7), (x, w), dy)
    kept = torch.zeros_like(dy)
    largest = dy.norm(dim=1).topk(7).indices
    kept[largest] = dy[largest]
    assert off(dx, kept.double() @ w.double()) <= TOLERANCE[F32]
    assert off(dw, kept.double().t() @ x.double()) <= TOLERANCE[F32]
    assert int(dx.ne(0).any(1).sum()) == 7
    rows = find_rows(matrix_of(dy), parse_rule(("threshold", 2.5)))
    assert rows.indices.tolist() == dy.abs().gt(2.5).any(1).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_that_are_given(dtype):
    m, k, n = 96, 128, 64
    x, w, dy = (draw(*shape, dtype=dtype) for shape in ((m, k), (n, k), (m, n)))
    listed = np.array([1, 5, 6, 7, 50, 95])
    others = [i for i in range(m) if i not in listed]
    dx, dw, db = draw(m, k, dtype=dtype), draw(n, k, dtype=dtype), draw(n, dtype=dtype)
    views = [matrix_of(one) for one in (dy, x, w)]
    rows = Rows.from_indices(listed, m)
    library_backward(*views, rows, matrix_of(dx), matrix_of(dw), matrix_of(db[None]))
    kept = dy.double()
    kept[others] = 0
    assert off(dx, kept @ w.double()) <= TOLERANCE[dtype]
    assert not dx[others].any()
    assert off(dw, kept.t() @ x.double()) <= TOLERANCE[dtype]
    assert off(db, kept.sum(0)) <= TOLERANCE[dtype]


def test_strides():
    x = draw(20, 3, 80)[:, :, 8:72].requires_grad_()
    w = draw(48, 128)[:, 32:96].requires_grad_()
    dy = some_rows(draw(48, 20, 3).permute(1, 2, 0).contiguous(), 0.4)
    ours = torch.autograd.grad(sebp.torch.linear(x, w), (x, w), dy)
    right = in_double(x, w)
    known = torch.autograd.grad(functional.linear(*right), right, dy.double())
    for a, b in zip(ours, known, strict=True):
        assert off(a, b) <= TOLERANCE[F32]


def test_autocast():
    layer = nn.Linear(128, 64, device="cuda")
    plain = copy.deepcopy(layer)
    sebp.apply_sebp_to_model(layer)
    x = leaf(32, 128)
    dy = some_rows(draw(32, 64, dtype=BF16), 0.5)
    found = []
    for one in (layer, plain):
        x.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            y = one(x)
        assert y.dtype == BF16
        y.backward(dy)
        assert x.grad.dtype == one.weight.grad.dtype == F32
        found.append((y, x.grad, one.weight.grad, one.bias.grad))
    for a, b in zip(*found, strict=True):
        assert off(a, b) <= 2e-2
    assert "sebp" in layer(x).grad_fn.name()
    with torch.autocast("cuda", torch.float16):  # PyTorch's own
        assert layer(x).dtype == torch.float16


def test_double_backward():
    x, w = leaf(6, 16), leaf(8, 16)

    def second(linear):
        y = linear(x, w).square().sum()
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, w))

    for a, b in zip(second(sebp.torch.linear), second(functional.linear), strict=True):
        assert off(a, b) <= 10 * TOLERANCE[F32]


def test_in_a_graph_of_a_compiler():
    layer = nn.Linear(32, 24, device="cuda")
    sebp.apply_sebp_to_model(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = leaf(10, 32)
    dy = draw(10, 24)
    a = torch.autograd.grad(compiled(x), (x, layer.weight), dy)
    b = torch.autograd.grad(layer(x), (x, layer.weight), dy)
    assert all(off(one, other) <= TOLERANCE[F32] for one, other in zip(a, b, strict=True))


# --------------------------------------------------------------------------------------------------
# Streams, graphs, threads, devices


def test_work_on_a_side_stream_waits_for_nothing_else():
    """The inputs are written late on that stream alone: another stream would read NaN."""
    m, k, n = 256, 128, 64
    good = draw(m, k), draw(n, k), some_rows(draw(m, n), 0.5)
    x, w, dy = (torch.full_like(one, torch.nan) for one in good)
    x.requires_grad_()
    w.requires_grad_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for late, one in zip((x, w, dy), good, strict=True):
                late.copy_(one)
        found = torch.autograd.grad(sebp.torch.linear(x, w), (x, w), dy)
        y = activate(found[0], Activation.GELU)
    torch.cuda.current_stream().wait_stream(side)
    expected = good[2].double() @ good[1].double(), good[2].double().t() @ good[0].double()
    for a, b in zip(found, expected, strict=True):
        assert off(a, b) <= TOLERANCE[F32]
    assert off(y, functional.gelu(expected[0])) <= TOLERANCE[F32]


def test_each_stream_and_thread_has_its_context():
    x = draw(2, 2)
    own = context_of(x)
    assert context_of(x, None, x) is own
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        on_side = context_of(x)
        assert on_side is not own
        assert context_of(x) is on_side
    assert context_of(x) is own
    found = []
    thread = threading.Thread(target=lambda: found.append(context_of(x)))
    thread.start()
    thread.join()
    assert found[0] is not own
    assert own.gpu_name
    assert own.gpu_name in torch.cuda.get_device_name()


def test_a_call_is_captured_in_a_graph():
    m, k, n = 128, 64, 96
    x, w, dy = draw(m, k), draw(n, k), draw(m, n)
    dx, dw, db = torch.empty_like(x), torch.empty_like(w), dy.new_empty(1, n)
    rows = Rows.from_indices(np.arange(0, m, 3), m)
    views = [matrix_of(one) for one in (dy, x, w)]
    results = [matrix_of(one) for one in (dx, dw, db)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        library_backward(*views, rows, *results)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        library_backward(*views, rows, *results)
    for one in (x, w, dy):
        one.normal_()
    graph.replay()
    kept = torch.zeros_like(dy, dtype=torch.float64)
    kept[::3] = dy[::3].double()
    assert off(dx, kept @ w.double()) <= TOLERANCE[F32]
    assert off(dw, kept.t() @ x.double()) <= TOLERANCE[F32]
    assert off(db[0], kept.sum(0)) <= TOLERANCE[F32]


def test_tensors_of_several_devices():
    x, w = leaf(4, 8), torch.randn(6, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="same device"):
        sebp.torch.linear(x, w)
    with pytest.raises(RuntimeError, match="same device"):
        context_of(x, w)
    with pytest.raises(RuntimeError, match="same device"):
        normalize(x, w[0], None, Norm(True, 1e-6))
    q = draw(1, 2, 4, 8)
    with pytest.raises(TypeError, match="key is on cpu"):
        attend(q, q.cpu(), q, Texts.of_rows(1, 4, 4), Pattern(False))
    with pytest.raises(TypeError, match="not int64 on cuda"):
        linear_cross_entropy(x, w.cuda(), torch.zeros(4, dtype=torch.int64))


def test_memory_of_the_host_is_refused():
    with Context(device="cuda") as context, pytest.raises(SebpError, match="memory"):
        sebp.linear_forward(
            np.ones((2, 2), np.float32), np.ones((2, 2), np.float32), context=context
        )


# --------------------------------------------------------------------------------------------------
# Attention


def attention_in_double(q, k, v, lengths, causal, window=None, bias=None):
    """Attend within each text: 1 x H x T x D; the result is 1 x T x H x D."""
    k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], 1) for one in (k, v))
    outs = []
    parts = zip(*(one.split(lengths, 2) for one in (q, k, v)), strict=True)
    for q_i, k_i, v_i in parts:
        length = q_i.shape[2]
        scores = q_i @ k_i.transpose(2, 3) * q.shape[3] ** -0.5
        if bias is not None:
            scores = scores + bias[..., :length, :length]
        at = torch.arange(length, device=q.device)
        behind = at[:, None] - at
        seen = behind >= 0 if causal else torch.ones_like(behind, dtype=torch.bool)
        if window is not None:
            seen = seen & (behind.abs() <= window)
        outs.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v_i)
    return torch.cat(outs, 2).transpose(1, 2)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("size", [64, 24])
@pytest.mark.parametrize(
    "how", ["full", "causal", "window", "bias"], ids=lambda how: how
)  # fmt: skip
def test_attention(dtype, size, how):
    lengths = [5, 1, 130, 33, 0, 64]
    total = sum(lengths)
    q, k, v = (leaf(1, heads, total, size, dtype=dtype) for heads in (4, 2, 2))
    bias = leaf(1, 4, 130, 130) if how == "bias" else None
    causal, window = how == "causal", 9 if how == "window" else None
    texts = Texts.of_lengths(np.array(lengths))
    inputs = [one for one in (q, k, v, bias) if one is not None]
    dout = draw(1, total, 4, size, dtype=dtype)
    out = attend(q, k, v, texts, Pattern(causal, window), bias, bias_is_of_texts=True)
    ours = torch.autograd.grad(out, inputs, dout)
    right = in_double(*inputs)
    expected = attention_in_double(
        *right[:3], lengths, causal, window, right[3] if bias is not None else None
    )
    tolerance = 2 * TOLERANCE[dtype]
    assert off(out, expected) <= tolerance
    for a, b in zip(ours, torch.autograd.grad(expected, right, dout.double()), strict=True):
        assert off(a, b) <= 2 * tolerance


@pytest.mark.parametrize("gaps", [False, True])
def test_attention_of_a_padded_batch(gaps):
    batch, length, heads, size = 4, 40, 2, 32
    mask = np.arange(length) < np.array([[7], [40], [1], [22]])
    if gaps:
        mask[1, 3:9] = False
    q, k, v = (leaf(batch, heads, length, size) for _ in range(3))
    dout = draw(batch, length, heads, size)
    out = attend(q, k, v, Texts.of_masks(mask, mask), Pattern(False))
    real = torch.from_numpy(mask).cuda()
    right = in_double(q, k, v)
    expected = functional.scaled_dot_product_attention(*right, real[:, None, None]).transpose(1, 2)
    expected = expected * real[:, :, None, None]
    assert off(out, expected) <= TOLERANCE[F32]
    known = torch.autograd.grad(expected, right, dout.double())
    for a, b in zip(torch.autograd.grad(out, (q, k, v), dout), known, strict=True):
        assert off(a, b) <= 2 * TOLERANCE[F32]


def test_attention_draws_the_dropout_of_the_cpu():
    q = draw(1, 2, 48, 32)
    found = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(5)
        x = q.detach().to(device).requires_grad_()
        out = attend(x, x, x, Texts.of_lengths(np.array([30, 18])), Pattern(True), dropout=0.4)
        out.square().sum().backward()
        found.append((out.detach().cuda(), x.grad.cuda()))
    for a, b in zip(*found, strict=True):
        assert off(a, b) <= 5e-5


# --------------------------------------------------------------------------------------------------
# Blocks


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize("width", [48, 768, 1000])
def test_norms(dtype, is_rms, width):
    x, residual = leaf(9, 7, width, dtype=dtype), leaf(9, 7, width, dtype=dtype)
    gain, shift = leaf(width, dtype=dtype), None if is_rms else leaf(width, dtype=dtype)
    dy, dh = draw(9, 7, width, dtype=dtype), draw(9, 7, width, dtype=dtype)
    y, h = normalize(x, gain, shift, Norm(is_rms, 1e-5), residual)
    inputs = [one for one in (x, residual, gain, shift) if one is not None]
    ours = torch.autograd.grad((y, h), inputs, (dy, dh))
    right = in_double(*inputs)
    right_h = right[0] + right[1]
    if is_rms:
        right_y = functional.rms_norm(right_h, (width,), right[2], 1e-5)
    else:
        right_y = functional.layer_norm(right_h, (width,), right[2], right[3], 1e-5)
    # In bfloat16 the norm is of h as it is rounded.
    tolerance = {F32: 1e-5, BF16: 2e-2}[dtype]
    assert off(y, right_y) <= tolerance
    assert off(h, right_h) <= tolerance
    known = torch.autograd.grad((right_y, right_h), right, (dy.double(), dh.double()))
    for a, b in zip(ours, known, strict=True):
        assert off(a, b) <= tolerance


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("is_gated", [False, True])
def test_activations(activation, is_gated):
    function = {
        Activation.GELU: functional.gelu,
        Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
        Activation.SILU: functional.silu,
    }[activation]
    inputs = [leaf(33, 130) for _ in range(1 + is_gated)]
    dy = draw(33, 130)
    y = activate(inputs[0], activation, *inputs[1:])
    right = in_double(*inputs)
    expected = function(right[0]) * (right[1] if is_gated else 1)
    assert off(y, expected) <= TOLERANCE[F32]
    known = torch.autograd.grad(expected, right, dy.double())
    for a, b in zip(torch.autograd.grad(y, inputs, dy), known, strict=True):
        assert off(a, b) <= TOLERANCE[F32]


def test_dropout_is_that_of_the_cpu():
    x = draw(50, 77)
    torch.manual_seed(3)
    ours = drop(x.requires_grad_(), dropout=0.3)
    torch.manual_seed(3)
    assert torch.equal(ours.detach().cpu(), drop(x.detach().cpu(), dropout=0.3))
    ours.sum().backward()
    assert torch.equal(x.grad != 0, ours != 0)
    torch.manual_seed(4)
    y, _ = normalize(x, None, None, Norm(False, 1e-5), x, dropout=0.5)
    torch.manual_seed(4)
    host = x.detach().cpu()
    expected, _ = normalize(host, None, None, Norm(False, 1e-5), host, dropout=0.5)
    assert off(y, expected.cuda()) <= TOLERANCE[F32]


def test_rotary_positions():
    q, k = (draw(2, 13, heads, 32).transpose(1, 2).requires_grad_() for heads in (4, 2))
    angles = torch.outer(torch.arange(13.0), 0.7 ** torch.arange(16.0)).repeat(1, 2)[None].cuda()
    cos, sin = angles.cos(), angles.sin()
    found = rotate(rotate_whole_heads, q, k, cos, sin)
    assert "Turn" in str(found[0].grad_fn.next_functions[0][0].next_functions[0][0].name())
    right = rotate_whole_heads(q, k, cos, sin)
    weights = [draw(*one.shape) for one in found]
    ours = torch.autograd.grad(found, (q, k), weights)
    known = torch.autograd.grad(right, (q, k), weights)
    for a, b in zip((*found, *ours), (*right, *known), strict=True):
        assert off(a, b) <= TOLERANCE[F32]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_of_a_head(dtype, reduction):
    hidden, w, b = leaf(6, 9, 64, dtype=dtype), leaf(501, 64, dtype=dtype), leaf(501, dtype=dtype)
    labels = torch.randint(0, 501, (6, 9), device="cuda")
    labels[labels % 3 == 0] = -100
    loss = linear_cross_entropy(hidden, w, labels, b, reduction=reduction, label_smoothing=0.1)
    assert loss.is_cuda
    ours = torch.autograd.grad(2 * loss, (hidden, w, b))
    right = in_double(hidden, w, b)
    logits = functional.linear(*right).flatten(0, 1)
    expected = functional.cross_entropy(
        logits, labels.flatten(), reduction=reduction, label_smoothing=0.1
    )
    assert off(loss, expected) <= TOLERANCE[F32]
    for a, b in zip(ours, torch.autograd.grad(2 * expected, right), strict=True):
        assert off(a, b) <= 2 * TOLERANCE[dtype]


# --------------------------------------------------------------------------------------------------
# Models


def on_gpu(batch):
    return {name: value.cuda() for name, value in batch.items()}


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_step_of_a_prepared_model(name):
    pytest.importorskip("transformers", minversion="5.0")
    from models import make_batch, make_model

    plain = make_model(name).cuda()
    model = copy.deepcopy(plain)
    prepared = sebp.prepare(model, quiet=True, defer_logits=name == "llama")
    assert "no gain" not in str(prepared)
    assert prepared.layers.replaced
    assert prepared.padding.changed
    assert prepared.blocks
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (plain, model)]
    for seed in (1, 2):  # the first is compared with the model as it is
        batch = on_gpu(make_batch(name, seed))
        losses = [one(**batch).loss for one in (plain, model)]
        assert off(losses[1], losses[0]) <= 1e-5
        for loss in losses:
            loss.backward()
        for (parameter, ours), right in zip(
            model.named_parameters(), plain.parameters(), strict=True
        ):
            assert (ours.grad is None) == (right.grad is None), parameter
            if right.grad is not None and right.grad.abs().max() > 1e-7:
                assert off(ours.grad, right.grad) <= 2e-4, parameter
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert prepared.padding.calls[""] == 2
    with torch.no_grad():
        plain.eval()
        model.eval()
        batch = on_gpu(make_batch(name, 3))
        real = batch["attention_mask"].bool()
        a, b = (one(**batch).logits for one in (model, plain))
        assert off(a, b) <= 1e-4 if name == "bert" else off(a[real], b[real]) <= 1e-4
    prepared.undo()


def test_a_step_with_dropout_and_autocast():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from models import SIZES, make_batch

    config = transformers.BertConfig(vocab_size=99, **SIZES)
    model = transformers.BertForSequenceClassification(config).cuda()
    prepared = sebp.prepare(model, quiet=True)
    for seed in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**on_gpu(make_batch("bert", seed))).loss
        loss.backward()
        assert loss.isfinite()
    assert prepared.padding.calls[""] == 3
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_attention_of_flattened_texts():
    pytest.importorskip("transformers", minversion="5.24")  # 5.17 adds a mask of its own
    from models import make_batch, make_model

    plain = make_model("llama").cuda()
    model = copy.deepcopy(plain)
    model.set_attn_implementation(sebp.register_attention())
    batch = on_gpu(make_batch("llama", 1))
    losses = [one(**batch).loss for one in (plain, model)]
    assert off(losses[1], losses[0]) <= 1e-5
    real = batch["attention_mask"].bool()
    lengths = batch["attention_mask"].sum(1)
    offsets = functional.pad(lengths.cumsum(0), (1, 0)).int()
    positions = torch.cat([torch.arange(int(n)) for n in lengths]).cuda()
    told = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    flat = {"input_ids": batch["input_ids"][real][None], "position_ids": positions[None]}
    a = model(**flat, **told, use_cache=False).logits[0]
    b = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[real]
    assert off(a, b) <= 1e-4


def test_lora_trains_and_merges():
    layer = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)).cuda()
    sebp.apply_sebp_to_model(layer)
    sebp.apply_lora_to_model(layer, 4, layers="*")
    x = draw(5, 32)
    for one in layer.modules():
        if hasattr(one, "lora_b"):
            assert one.lora_a.is_cuda
            nn.init.normal_(one.lora_b)
    layer(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for n, p in layer.named_parameters() if "lora" in n)
    before = layer(x)
    sebp.merge_lora(layer)
    assert off(layer(x), before) <= TOLERANCE[F32]


# --------------------------------------------------------------------------------------------------
# What is said of it


def test_main_names_the_gpus():
    done = subprocess.run(
        [sys.executable, "-m", "sebp"], capture_output=True, text=True, timeout=60, check=False
    )
    assert f"CUDA             {cuda_version()}" in done.stdout
    assert torch.cuda.get_device_name(0) in done.stdout
