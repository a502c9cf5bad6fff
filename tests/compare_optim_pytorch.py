# SPDX-License-Identifier: Apache-2.0
"""Train with AdamW and with its sparse step beside ``torch.optim``, on random gradients.

Run as ``compare_optim_pytorch.py LIBRARY``, where LIBRARY is the path of libsebp.so. The seed is
taken from ``SEBP_TEST_SEED``, or from the clock, and printed. The last line counts:
``N passed, N failed, N skipped``.
"""

import ctypes
import os
import random
import sys
import time

import torch

CASES = 20
STEPS = 25
# What the roundings of so many steps come to: of a step, which is of the size of the learning rate,
# some dozen; of the weight, two by PyTorch and one by the library.
OF_RATE = STEPS * 32 * 2.0**-24
OF_WEIGHT = STEPS * 3 * 2.0**-24


class Matrix(ctypes.Structure):
    """``sebp_matrix`` of matrix.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("dtype", ctypes.c_int),
    ]


class Sparse(ctypes.Structure):
    """``sebp_sparse`` of sparse.h."""

    _fields_ = [
        ("indices", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
    ]


class Options(ctypes.Structure):
    """``sebp_adamw_options`` of optim.h."""

    _fields_ = [
        ("size_bytes", ctypes.c_size_t),
        ("learning_rate", ctypes.c_double),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("epsilon", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
    ]


def view(tensor: torch.Tensor) -> object:
    """A matrix argument: an f32 tensor, by reference."""
    rows, cols = tensor.shape
    return ctypes.byref(Matrix(tensor.data_ptr(), rows, cols, cols, 0))


def succeed(status: int) -> None:
    """Raise ``AssertionError`` where a call of the library failed."""
    assert status == 0, f"status {status}"


def compare(
    name: str, got: torch.Tensor, want: torch.Tensor, start: torch.Tensor, rate: float
) -> None:
    """Raise ``AssertionError`` where two weights differ by more than rounding."""
    bound = OF_RATE * rate + OF_WEIGHT * torch.maximum(start.abs(), want.abs())
    worst = ((got - want).abs() / bound).max().item()
    assert worst <= 1, f"{name} is off by {worst:.3g} times the bound"


def train_dense(
    library: ctypes.CDLL, context: ctypes.c_void_p, shape: tuple[int, int], options: Options
) -> None:
    """Dense steps beside ``torch.optim.AdamW``."""
    want = torch.randn(shape).requires_grad_()
    ours, start = want.detach().clone(), want.detach().clone()
    moments = torch.zeros(shape), torch.zeros(shape)
    torch_steps = torch.optim.AdamW(
        [want],
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        weight_decay=options.weight_decay,
    )
    for step in range(1, STEPS + 1):
        want.grad = torch.randn(shape)
        torch_steps.step()
        succeed(
            library.sebp_adamw_step(
                context,
                view(want.grad),
                ctypes.c_int64(step),
                ctypes.byref(options),
                view(ours),
                view(moments[0]),
                view(moments[1]),
            )
        )
    compare("AdamW", ours, want.detach(), start, options.learning_rate)
    assert (ours != start).float().mean() > 0.5, "most weights have not moved"


def train_sparse(
    library: ctypes.CDLL, context: ctypes.c_void_p, shape: tuple[int, int], options: Options
) -> None:
    """Steps on elements chosen anew beside ``torch.optim.SparseAdam``.

    The two place epsilon differently, so it is made too small to matter.
    """
    count = shape[0] * shape[1]
    want = torch.randn(count).requires_grad_()
    ours, start = want.detach().clone(), want.detach().clone()
    options.epsilon = 1e-20
    torch_steps = torch.optim.SparseAdam(
        [want],
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
    )
    state = ctypes.c_void_p()
    rows, cols = ctypes.c_int64(shape[0]), ctypes.c_int64(shape[1])
    succeed(
        library.sebp_sparse_adamw_create(rows, cols, None, ctypes.c_int64(0), ctypes.byref(state))
    )
    for _ in range(STEPS):
        chosen = torch.randperm(count)[: random.randint(1, count)].sort().values
        values = torch.randn(len(chosen))
        want.grad = torch.sparse_coo_tensor(
            chosen[None], values.clone(), (count,), check_invariants=True
        )
        torch_steps.step()
        gradient = Sparse(chosen.data_ptr(), values.data_ptr(), len(chosen), *shape)
        succeed(
            library.sebp_sparse_adamw_step(
                context, state, ctypes.byref(options), ctypes.byref(gradient)
            )
        )
        ours[chosen] += values
    library.sebp_sparse_adamw_destroy(state)
    compare("SparseAdam", ours, want.detach(), start, options.learning_rate)


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
    library = ctypes.CDLL(sys.argv[1])
    context = ctypes.c_void_p()
    succeed(library.sebp_context_create(None, ctypes.byref(context)))
    failed = 0
    for case in range(CASES):
        shape = random.randint(1, 40), random.randint(1, 40)
        options = Options(
            ctypes.sizeof(Options),
            random.choice([1e-3, 1e-5, 0.1]),
            random.choice([0.9, 0.5, 0.0]),
            random.choice([0.999, 0.99, 0.9]),
            random.choice([1e-8, 1e-3]),
            random.choice([0.0, 0.01, 0.5]),
        )
        try:
            (train_dense, train_sparse)[case % 2](library, context, shape, options)
        except AssertionError as error:
            failed += 1
            print(f"case {case}, {shape[0]} x {shape[1]}: {error}")
    library.sebp_context_destroy(context)
    print(f"{CASES - failed} passed, {failed} failed, 0 skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
