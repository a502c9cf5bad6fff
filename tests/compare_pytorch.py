# SPDX-License-Identifier: Apache-2.0
"""Compare the linear layer with PyTorch's, forward and backward, on random shapes.

Of the package ``sebp`` it uses the declarations and the objects behind them, but calls the library
itself, on outputs that hold NaN. The seed is taken from ``SEBP_TEST_SEED``, or from the clock, and
printed. The last line counts: ``N passed, N failed, N skipped``.
"""

import ctypes
import os
import random
import sys
import time
from dataclasses import dataclass

import torch
from sebp import Context, Rows, SebpError
from sebp._structs import BF16, F32, LinearOptions, Matrix

CASES = 60
F32_EPS = 2.0**-23
BF16_EPS = 2.0**-7


def view(tensor: torch.Tensor) -> Matrix:
    """Describe a 2-D tensor to the library.

    Parameters
    ----------
    tensor : torch.Tensor
        Rows of any stride, elements next to each other.

    Returns
    -------
    Matrix
        A ``sebp_matrix``. Valid while the tensor lives.
    """
    dtype = {torch.float32: F32, torch.bfloat16: BF16}[tensor.dtype]
    rows, cols = tensor.shape
    return Matrix(tensor.data_ptr(), rows, cols, tensor.stride(0), dtype)


@dataclass
class Case:
    """One layer: sizes as in linear.h, and the lengths of its padded sequences.

    Attributes
    ----------
    sequences, length : int
        M = sequences * length.
    n, k : int
        out_features and in_features.
    lengths : list of int
        Active rows at the head of each sequence; the others hold no gradient.
    dtype : torch.dtype
        Of all matrices.
    given : bool
        Whether the rows are given by their lengths, or found.
    """

    sequences: int
    length: int
    n: int
    k: int
    lengths: list[int]
    dtype: torch.dtype
    given: bool


def random_case(numbers: random.Random) -> Case:
    """Draw one case.

    Parameters
    ----------
    numbers : random.Random
        Where the numbers come from.

    Returns
    -------
    Case
        With at least one active row.
    """
    sequences = numbers.randint(1, 8)
    length = numbers.randint(1, 64)
    lengths = [numbers.randint(0, length) for _ in range(sequences)]
    lengths[numbers.randrange(sequences)] = length
    return Case(
        sequences,
        length,
        numbers.randint(1, 200),
        numbers.randint(1, 200),
        lengths,
        numbers.choice([torch.float32, torch.bfloat16]),
        numbers.random() < 0.5,
    )


def compare(name: str, got: torch.Tensor, want: torch.Tensor, magnitude: torch.Tensor) -> None:
    """Hold a result against PyTorch's, each within its own rounding of the exact sum.

    Parameters
    ----------
    name : str
        What is compared.
    got, want : torch.Tensor
        The library's result and PyTorch's.
    magnitude : torch.Tensor
        Of each element, terms * sum of |a||b| in double.

    Raises
    ------
    AssertionError
        If they are further apart than rounding explains, or if all is zero.
    """
    bound = 2 * F32_EPS * magnitude
    if got.dtype == torch.bfloat16:
        bound = bound + BF16_EPS * want.double().abs() * (1 + BF16_EPS)
    off = (got.double() - want.double()).abs()
    if not bool((off <= bound).all()):
        worst = (off - bound).argmax()
        raise AssertionError(
            f"{name}: {got.flatten()[worst]} but PyTorch has {want.flatten()[worst]}"
        )
    if want.count_nonzero() == 0:
        raise AssertionError(f"{name}: all zero, which proves nothing")


def run_case(context: Context, case: Case) -> None:
    """Compute one case in both and compare.

    Parameters
    ----------
    context : Context
        Whose threads work.
    case : Case
        The layer.

    Raises
    ------
    SebpError
        If a call fails.
    AssertionError
        If a result differs.
    """
    m = case.sequences * case.length
    x = torch.randn(m, case.k).to(case.dtype).requires_grad_()
    w = torch.randn(case.n, case.k).to(case.dtype).requires_grad_()
    bias = torch.randn(1, case.n).to(case.dtype).requires_grad_()
    active = torch.cat([torch.arange(case.length) < count for count in case.lengths])
    dy = (torch.randn(m, case.n) * active[:, None]).to(case.dtype)

    want_y = torch.nn.functional.linear(x, w, bias[0])
    want_y.backward(dy)

    rows = Rows.from_lengths(case.lengths, case.length) if case.given else None
    options = LinearOptions(ctypes.sizeof(LinearOptions))
    nan = float("nan")
    y, dx, dw, db = (torch.full_like(t, nan) for t in (want_y, x, w, bias))
    with torch.no_grad():
        vx, vw, vb, vdy = view(x), view(w), view(bias), view(dy)
        context.call("sebp_linear_forward", vx, vw, vb, rows, options, view(y))
        outputs = view(dx), view(dw), view(db)
        context.call("sebp_linear_backward", vdy, vx, vw, rows, options, *outputs)

        a, b, g = x.double().abs(), w.double().abs(), dy.double().abs()
        count = int(active.sum())
        in_y = active if case.given else torch.ones_like(active)
        compare("Y", y, want_y * in_y[:, None], (case.k + 1) * (a @ b.T + bias.double().abs()))
        compare("dX", dx, x.grad, case.n * (g @ b))
        compare("dW", dw, w.grad, count * (g.T @ a))
        compare("db", db, bias.grad, count * g.sum(0, keepdim=True))


def main() -> int:
    """Run all cases.

    Returns
    -------
    int
        0 if all passed, else 1.
    """
    seed = int(os.environ.get("SEBP_TEST_SEED") or time.time())
    print(f"SEBP_TEST_SEED={seed}")
    numbers = random.Random(seed)
    torch.manual_seed(seed)
    failed = 0
    with Context() as context:
        for _ in range(CASES):
            case = random_case(numbers)
            try:
                run_case(context, case)
            except (AssertionError, SebpError) as error:
                failed += 1
                print(f"{case}: {error}")
    print(f"{CASES - failed} passed, {failed} failed, 0 skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
