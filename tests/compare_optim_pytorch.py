# SPDX-License-Identifier: Apache-2.0
"""Train with AdamW and with its sparse step beside ``torch.optim``, on random gradients.

Of the package ``sebp`` it uses the declarations, but calls the library itself. The seed is taken
from ``SEBP_TEST_SEED``, or from the clock, and printed. The last line counts:
``N passed, N failed, N skipped``.
"""

import ctypes
import os
import random
import sys
import time

import torch
from sebp import Context, SebpError
from sebp._library import load
from sebp._structs import F32, AdamWOptions, Matrix, SparseStruct
from sebp.core.calls import call

CASES = 20
STEPS = 25
# What the roundings of so many steps come to: of a step, which is of the size of the learning rate,
# some dozen; of the weight, two by PyTorch and one by the library.
OF_RATE = STEPS * 32 * 2.0**-24
OF_WEIGHT = STEPS * 3 * 2.0**-24


def view(tensor: torch.Tensor) -> Matrix:
    """A matrix argument: an f32 tensor."""
    rows, cols = tensor.shape
    return Matrix(tensor.data_ptr(), rows, cols, cols, F32)


def compare(
    name: str, got: torch.Tensor, want: torch.Tensor, start: torch.Tensor, rate: float
) -> None:
    """Raise ``AssertionError`` where two weights differ by more than rounding."""
    bound = OF_RATE * rate + OF_WEIGHT * torch.maximum(start.abs(), want.abs())
    worst = ((got - want).abs() / bound).max().item()
    assert worst <= 1, f"{name} is off by {worst:.3g} times the bound"


def train_dense(context: Context, shape: tuple[int, int], options: AdamWOptions) -> None:
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
        matrices = view(ours), view(moments[0]), view(moments[1])
        context.call("sebp_adamw_step", view(want.grad), step, options, *matrices)
    compare("AdamW", ours, want.detach(), start, options.learning_rate)
    assert (ours != start).float().mean() > 0.5, "most weights have not moved"


def train_sparse(context: Context, shape: tuple[int, int], options: AdamWOptions) -> None:
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
    call("sebp_sparse_adamw_create", *shape, None, 0, state)
    for _ in range(STEPS):
        chosen = torch.randperm(count)[: random.randint(1, count)].sort().values
        values = torch.randn(len(chosen))
        want.grad = torch.sparse_coo_tensor(
            chosen[None], values.clone(), (count,), check_invariants=True
        )
        torch_steps.step()
        gradient = SparseStruct(chosen.data_ptr(), values.data_ptr(), len(chosen), *shape)
        context.call("sebp_sparse_adamw_step", state, options, gradient)
        ours[chosen] += values
    load().sebp_sparse_adamw_destroy(state)
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
    context = Context()
    failed = 0
    for case in range(CASES):
        shape = random.randint(1, 40), random.randint(1, 40)
        options = AdamWOptions(
            ctypes.sizeof(AdamWOptions),
            random.choice([1e-3, 1e-5, 0.1]),
            random.choice([0.9, 0.5, 0.0]),
            random.choice([0.999, 0.99, 0.9]),
            random.choice([1e-8, 1e-3]),
            random.choice([0.0, 0.01, 0.5]),
        )
        try:
            (train_dense, train_sparse)[case % 2](context, shape, options)
        except (AssertionError, SebpError) as error:
            failed += 1
            print(f"case {case}, {shape[0]} x {shape[1]}: {error}")
    print(f"{CASES - failed} passed, {failed} failed, 0 skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
