# SPDX-License-Identifier: Apache-2.0
"""Row-wise layers, losses and embeddings beside PyTorch's and transformers' formulas, with autograd.

Of the package ``sebp`` it uses the declarations, but calls the library itself. The seed is taken
from ``SEBP_TEST_SEED``, or from the clock, and printed. The last line counts:
``N passed, N failed, N skipped``.
"""

import ctypes
import os
import random
import sys
import time
from collections.abc import Callable

import torch
from sebp import Context, SebpError
from sebp._structs import (
    BF16,
    F32,
    ActivationOptions,
    CrossEntropyOptions,
    EmbeddingOptions,
    EmbeddingStruct,
    Matrix,
    NormOptions,
    RotaryOptions,
)
from torch.nn import functional

ROUNDS = 12
DTYPES = {torch.float32: F32, torch.bfloat16: BF16}
# In f32 the roundings of a few operations; in bf16 PyTorch rounds in between, so more than one.
NEAR = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


def view(tensor: torch.Tensor | None) -> Matrix | None:
    """A matrix argument: a tensor of two dimensions, or of one as a row."""
    if tensor is None:
        return None
    rows, cols = tensor.shape if tensor.dim() == 2 else (1, len(tensor))
    return Matrix(tensor.data_ptr(), rows, cols, cols, DTYPES[tensor.dtype])


def compare(name: str, got: torch.Tensor, want: torch.Tensor, near: float) -> None:
    """Raise ``AssertionError`` where two tensors differ by more than rounding, or are all zero."""
    want = want.detach().float().reshape(got.shape)
    off = (got.float() - want).abs() / (1 + want.abs())
    assert off.max().item() <= near, f"{name} is off by {off.max().item():.3g}"
    assert (got != 0).any(), f"{name} is all zero"


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A random tensor that takes a gradient."""
    return torch.randn(shape).to(dtype).requires_grad_()


def norms(context: Context, rows: int, cols: int, dtype: torch.dtype) -> None:
    """LayerNorm, and RMSNorm as LLaMA and Gemma have it, with a residual before it."""
    rms, offset = random.choice([(0, 0.0), (1, 0.0), (1, 1.0)])
    x, residual = leaf(rows, cols, dtype=dtype), leaf(rows, cols, dtype=dtype)
    gain, shift, dy = leaf(cols), leaf(cols), torch.randn(rows, cols).to(dtype)
    total = (x + residual).float()
    if rms:
        normal = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5)
        want = (normal * (gain + offset)).to(dtype)
    else:
        want = functional.layer_norm(total, (cols,), gain, shift, 1e-5).to(dtype)
    want.backward(dy)
    options = NormOptions(ctypes.sizeof(NormOptions), norm=rms, epsilon=1e-5, gain_offset=offset)
    h, y, dh = (torch.empty(rows, cols, dtype=dtype) for _ in range(3))
    statistics, dgain, dshift = (
        torch.empty(rows, 2),
        torch.empty(cols),
        torch.empty(cols),
    )
    added = None if rms else shift
    context.call(
        "sebp_norm_forward",
        view(x),
        view(residual),
        view(gain),
        view(added),
        None,
        options,
        view(h),
        view(y),
        view(statistics),
    )
    context.call(
        "sebp_norm_backward",
        view(dy),
        view(h),
        view(statistics),
        view(gain),
        None,
        options,
        view(dh),
        None,
        view(dgain),
        view(dshift),
    )
    near = NEAR[dtype]
    compare("y", y, want, near)
    compare("dx", dh, x.grad, near)
    compare("dgain", dgain, gain.grad, near * 10)
    if not rms:
        compare("dshift", dshift, shift.grad, near * 10)


def activations(context: Context, rows: int, cols: int, dtype: torch.dtype) -> None:
    """All four, gated and not."""
    kind = random.randrange(4)
    function = (
        functional.gelu,
        lambda x: functional.gelu(x, approximate="tanh"),
        functional.silu,
        functional.relu,
    )[kind]
    x, up = leaf(rows, cols, dtype=dtype), leaf(rows, cols, dtype=dtype)
    gated, dy = random.random() < 0.5, torch.randn(rows, cols).to(dtype)
    want = function(x) * up if gated else function(x)
    want.backward(dy)
    options = ActivationOptions(ctypes.sizeof(ActivationOptions))
    y, dx, dup = (torch.empty(rows, cols, dtype=dtype) for _ in range(3))
    second = view(up) if gated else None
    context.call("sebp_activation_forward", kind, view(x), second, None, options, view(y))
    context.call(
        "sebp_activation_backward",
        kind,
        view(dy),
        view(x),
        second,
        None,
        options,
        view(dx),
        view(dup) if gated else None,
    )
    compare("y", y, want, NEAR[dtype])
    compare("dx", dx, x.grad, NEAR[dtype])
    if gated:
        compare("dup", dup, up.grad, NEAR[dtype])


def llama_frequencies(dims: int, base: float, factor: float, length: float) -> torch.Tensor:
    """Llama 3's frequencies, as transformers' ``_compute_llama3_parameters`` has them."""
    frequencies = 1.0 / (base ** (torch.arange(0, dims, 2).double() / dims))
    waves = 2 * torch.pi / frequencies
    low, high = length / 1.0, length / 4.0
    scaled = torch.where(waves > low, frequencies / factor, frequencies)
    smooth = (length / waves - 1.0) / (4.0 - 1.0)
    smoothed = (1 - smooth) * frequencies / factor + smooth * frequencies
    return torch.where((waves >= high) & (waves <= low), smoothed, scaled)


def rotary(context: Context, rows: int, cols: int, dtype: torch.dtype) -> None:
    """Halves as LLaMA turns them, with its scaling, and pairs as GPT-J does."""
    heads, size = random.randint(1, 4), random.choice([32, 64])
    dims, pairs = random.choice([size, size // 2]), random.random() < 0.5
    x, dy = (
        leaf(rows, heads * size, dtype=dtype),
        torch.randn(rows, heads * size).to(dtype),
    )
    positions = torch.randint(0, 3000, (rows,))
    angles = positions[:, None] * llama_frequencies(dims, 500000.0, 8.0, 8192.0)
    turned = x.float().view(rows, heads, size)[..., :dims]
    if pairs:
        cos, sin = (
            f(angles).repeat_interleave(2, -1)[:, None].float() for f in (torch.cos, torch.sin)
        )
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        cos, sin = (
            f(torch.cat((angles, angles), -1))[:, None].float() for f in (torch.cos, torch.sin)
        )
        other = torch.cat((-turned[..., dims // 2 :], turned[..., : dims // 2]), -1)
    rest = x.float().view(rows, heads, size)[..., dims:]
    want = torch.cat((turned * cos + other * sin, rest), -1).view(rows, heads * size).to(dtype)
    want.backward(dy)
    options = RotaryOptions(
        ctypes.sizeof(RotaryOptions), size, pairs, 0, 500000.0, 8.0, 1.0, 4.0, 8192.0
    )
    table, y, dx = torch.empty(3000, dims), torch.empty_like(dy), torch.empty_like(dy)
    context.call("sebp_rotary_table", options, view(table))
    for function, given, result in (("forward", x, y), ("backward", dy, dx)):
        context.call(
            f"sebp_rotary_{function}",
            view(given),
            positions.data_ptr(),
            view(table),
            None,
            options,
            view(result),
        )
    compare("y", y, want, NEAR[dtype])
    compare("dx", dx, x.grad, NEAR[dtype])


def entropy_options(smoothing: float) -> CrossEntropyOptions:
    """The mean over labelled rows."""
    return CrossEntropyOptions(ctypes.sizeof(CrossEntropyOptions), -100, smoothing, 0.0)


def cross_entropy(context: Context, rows: int, cols: int, dtype: torch.dtype) -> None:
    """Of logits."""
    smoothing = random.choice([0.0, 0.1])
    logits, labels = leaf(rows, cols, dtype=dtype), torch.randint(0, cols, (rows,))
    labels[1:][torch.rand(rows - 1) < 0.3] = -100
    want = functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    want.backward()
    loss, dlogits = ctypes.c_double(), torch.empty(rows, cols, dtype=dtype)
    context.call(
        "sebp_cross_entropy",
        view(logits),
        labels.data_ptr(),
        entropy_options(smoothing),
        ctypes.byref(loss),
        view(dlogits),
    )
    assert abs(loss.value - want.item()) <= 1e-5 * (1 + want.item()), "loss"
    compare("dlogits", dlogits, logits.grad, NEAR[dtype] / 10)


def head(context: Context, rows: int, cols: int, dtype: torch.dtype) -> None:
    """Of hidden states and a head of more classes."""
    classes, smoothing = random.randint(2, 3000), random.choice([0.0, 0.1])
    hidden, weight = leaf(rows, cols, dtype=dtype), leaf(classes, cols, dtype=dtype)
    bias, labels = leaf(classes), torch.randint(0, classes, (rows,))
    labels[1:][torch.rand(rows - 1) < 0.3] = -100
    logits = hidden.float() @ weight.float().T + bias
    want = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    want.backward()
    loss = ctypes.c_double()
    dhidden, dweight, dbias = (
        torch.empty(rows, cols),
        torch.empty(classes, cols),
        torch.empty(classes),
    )
    context.call(
        "sebp_linear_cross_entropy",
        view(hidden),
        view(weight),
        view(bias),
        labels.data_ptr(),
        entropy_options(smoothing),
        ctypes.byref(loss),
        view(dhidden),
        view(dweight),
        view(dbias),
    )
    assert abs(loss.value - want.item()) <= 1e-4 * (1 + want.item()), "loss"
    near = NEAR[dtype] * (1 if dtype == torch.bfloat16 else 10)
    compare("dhidden", dhidden, hidden.grad, near)
    compare("dweight", dweight, weight.grad, near)
    compare("dbias", dbias, bias.grad, near)


def embeddings(context: Context, rows: int, cols: int, dtype: torch.dtype) -> None:
    """BERT's three tables, and the first one's gradient with a padding index."""
    sizes = random.randint(2, 500), random.randint(2, 60), 2
    tables = [leaf(size, cols, dtype=dtype) for size in sizes]
    indices = [torch.randint(0, size, (rows,)) for size in sizes]
    dy = torch.randn(rows, cols).to(dtype)
    want = functional.embedding(indices[0], tables[0], padding_idx=0)
    for table, index in zip(tables[1:], indices[1:], strict=True):
        want = want + functional.embedding(index, table)
    want.backward(dy)
    options = EmbeddingOptions(ctypes.sizeof(EmbeddingOptions), padding_index=0)
    y, dtable = (
        torch.empty(rows, cols, dtype=dtype),
        torch.empty(sizes[0], cols, dtype=dtype),
    )
    structs = (EmbeddingStruct * 3)(
        *((view(t), i.data_ptr()) for t, i in zip(tables, indices, strict=True))
    )
    context.call("sebp_embedding_forward", structs, 3, None, options, view(y))
    context.call(
        "sebp_embedding_backward", view(dy), indices[0].data_ptr(), None, options, view(dtable)
    )
    compare("y", y, want, NEAR[dtype])
    if (indices[0] != 0).any():
        compare("dtable", dtable, tables[0].grad, NEAR[dtype] * 4)


def clipping(context: Context, rows: int, cols: int, dtype: torch.dtype) -> None:
    """``torch.nn.utils.clip_grad_norm_`` of two matrices."""
    del dtype
    ours = [torch.randn(rows, cols), torch.randn(cols)]
    theirs = [torch.zeros_like(gradient) for gradient in ours]
    for parameter, gradient in zip(theirs, ours, strict=True):
        parameter.grad = gradient.clone()
    want = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    views, norm = (
        (Matrix * 2)(*(view(gradient) for gradient in ours)),
        ctypes.c_double(),
    )
    context.call("sebp_gradient_norm", views, 2, ctypes.byref(norm))
    assert abs(norm.value - want.item()) <= 1e-5 * want.item(), "norm"
    if norm.value > 0.5:
        context.call("sebp_scale", views, 2, 0.5 / norm.value)
    for parameter, gradient in zip(theirs, ours, strict=True):
        compare("clipped", gradient, parameter.grad, 1e-5)


CHECKS: list[Callable[[Context, int, int, torch.dtype], None]] = [
    norms,
    activations,
    rotary,
    cross_entropy,
    head,
    embeddings,
    clipping,
]


def main() -> int:
    """Run all cases.

    Returns
    -------
    int
        0 if all passed, else 1.
    """
    seed = int(os.environ.get("SEBP_TEST_SEED") or time.time())
    print(f"SEBP_TEST_SEED={seed}")
    random.seed(seed)
    torch.manual_seed(seed)
    context = Context()
    passed = failed = 0
    for check in CHECKS:
        for case in range(ROUNDS):
            dtype = (torch.float32, torch.bfloat16)[case % 2]
            rows, cols = random.randint(2, 40), random.randint(2, 200)
            try:
                check(context, rows, cols, dtype)
                passed += 1
            except (AssertionError, SebpError) as error:
                failed += 1
                print(f"{check.__name__} {case}, {rows} x {cols}, {dtype}: {error}")
    print(f"{passed} passed, {failed} failed, 0 skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
