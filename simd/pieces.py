# SPDX-License-Identifier: Apache-2.0
"""Prints simd/pieces.h: activations and their slopes as polynomials, piece by piece.

    python3 simd/pieces.py > simd/pieces.h

Needs numpy. Piece n has its center at n * width; its coefficients stand at n mod PIECES, the lowest
power first. The polynomials have a nearly least maximal error (Lawson's iteration), relative to the
function where that does not pass through 0 in the piece. The first piece is 0, the last one is 1.
"""

import math
from collections.abc import Callable

import numpy


def normal(x: float) -> float:
    """Give the normal distribution's share below x."""
    return math.erfc(-x / math.sqrt(2)) / 2


def normal_slope(x: float) -> float:
    """Give the derivative of x normal(x)."""
    return normal(x) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def curve(x: float) -> float:
    """Give what the tanh form has in its exponential."""
    return 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def sigmoid(x: float) -> float:
    """Give 1 / (1 + exp(-x))."""
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def tanh_share(x: float) -> float:
    """Give the share of x that the tanh form keeps."""
    return sigmoid(curve(x))


def tanh_slope(x: float) -> float:
    """Give the derivative of x tanh_share(x)."""
    w = curve(x)
    bend = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return sigmoid(w) + x * bend * sigmoid(w) * sigmoid(-w)


def silu_slope(x: float) -> float:
    """Give the derivative of x sigmoid(x)."""
    return sigmoid(x) + x * sigmoid(x) * sigmoid(-x)


def fit(
    function: Callable[[float], float], center: float, width: float, degree: int
) -> list[numpy.float32]:
    """Find the coefficients of one piece, each rounded to f32 before the next is found."""
    count = 40 * (degree + 1)
    r = numpy.cos(numpy.pi * (numpy.arange(count) + 0.5) / count) * width / 2 * 1.0001
    y = numpy.array([function(center + each) for each in r])
    scale = numpy.maximum(abs(y), abs(y).max() / 16)
    coefficients = []
    left = y.copy()
    for lowest in range(degree + 1):
        # What is left is r^lowest times a polynomial.
        powers = numpy.stack([r**k for k in range(lowest, degree + 1)], axis=1)
        sizes = abs(powers).max(axis=0)
        weights = numpy.ones(count)
        for _ in range(60):
            by = numpy.sqrt(weights) / scale
            found = numpy.linalg.lstsq(powers / sizes * by[:, None], left * by, rcond=None)[0]
            error = abs(powers / sizes @ found - left) / scale
            weights *= error + 1e-30
            weights /= weights.sum()
        coefficients.append(numpy.float32(found[0] / sizes[0]))
        left = left - float(coefficients[-1]) * r**lowest
    return coefficients


def table(
    name: str,
    function: Callable[[float], float],
    degree: int,
    pieces: int,
    first: int,
    width: float,
) -> None:
    """Print the coefficients of pieces from `first` on, which is 0 as the last one is 1."""
    zero, one = numpy.float32(0), numpy.float32(1)
    last = first + pieces - 1
    of_piece = {first: [zero] * (degree + 1), last: [one] + [zero] * degree}
    for n in range(first + 1, last):
        of_piece[n] = fit(function, n * width, width, degree)
    order = sorted(of_piece, key=lambda n: n % pieces)
    print(f"static const float {name}[{degree + 1} * {pieces}] = {{")
    for power in range(degree + 1):
        print(f"    /* r^{power} */")
        for at in range(0, pieces, 4):
            values = [float(of_piece[n][power]) for n in order[at : at + 4]]
            text = [f"{value:.9g}F," if value % 1 else f"{int(value)}," for value in values]
            print("    " + " ".join(text))
    print("};\n")


def geometry(name: str, pieces: int, first: int, width: float) -> tuple[int, int, float]:
    """Print where a table's pieces lie, and return it."""
    print(f"#define {name}_PIECES {pieces}\n#define {name}_FIRST {first}")
    print(f"#define {name}_WIDTH {width}F\n")
    return pieces, first, width


def main() -> None:
    """Print the header."""
    print("""/* SPDX-License-Identifier: Apache-2.0 */
/** @file pieces.h Polynomials for vec_math.h, made by pieces.py, which says their order. */
/* clang-format off */
#ifndef SEBP_PIECES_H
#define SEBP_PIECES_H
""")
    where = geometry("NORMAL", 32, -16, 13 / 32)
    table("normal_share", normal, 7, *where)
    table("normal_slope", normal_slope, 7, *where)
    table("tanh_share", tanh_share, 7, *where)
    table("tanh_slope", tanh_slope, 7, *where)
    table("sigmoid_slope", silu_slope, 7, *geometry("SIGMOID", 32, -17, 11 / 8))
    where = geometry("NORMAL_SHORT", 16, -8, 3 / 4)
    table("normal_share_short", normal, 5, *where)
    table("normal_slope_short", normal_slope, 6, *where)
    table("tanh_share_short", tanh_share, 5, *where)
    table("tanh_slope_short", tanh_slope, 6, *where)
    where = geometry("SIGMOID_SHORT", 16, -9, 9 / 4)
    table("sigmoid_share_short", sigmoid, 6, *where)
    table("sigmoid_slope_short", silu_slope, 7, *where)
    print("#endif")


if __name__ == "__main__":
    main()
