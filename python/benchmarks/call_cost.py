# SPDX-License-Identifier: Apache-2.0
"""What a call of one linear layer costs, forward and backward, beside PyTorch's own.

The layer with SEBP computes the same products on the same rows, all of which have a gradient. What
it takes beyond PyTorch's is the cost of a call where the layer is tiny; a large layer's products
differ too. "operator" calls ``torch.ops.sebp.linear``, as layers do where others step in: modes,
profilers, compilers. Modes take turns; a time is the minimum of all rounds, in CPU time of the
process, so that other programs disturb it little.
"""

import argparse
from collections.abc import Callable
from time import process_time

import torch
from torch import Tensor, nn

import sebp

Step = Callable[[], Tensor]


def make_modes(shape: list[int], n: int, dtype: torch.dtype) -> dict[str, Step]:
    """Give the forward of one layer in each way, on tensors of its own."""
    layer = nn.Linear(shape[-1], n).to(dtype)
    with_sebp = nn.Linear(shape[-1], n).to(dtype)
    sebp.apply_sebp_to_model(with_sebp)
    x = torch.randn(shape).to(dtype).requires_grad_()
    operator = torch.ops.sebp.linear.default
    return {
        "pytorch": lambda: layer(x),
        "operator": lambda: operator(x, layer.weight, layer.bias),
        "sebp": lambda: with_sebp(x),
    }


def run(forward: Step, dy: Tensor, calls: int) -> float:
    """Return the microseconds of CPU time that a forward and a backward take."""
    start = process_time()
    for _ in range(calls):
        forward().backward(dy)
    return (process_time() - start) / calls * 1e6


def measure(modes: dict[str, Step], dy: Tensor, rounds: int, calls: int) -> dict[str, float]:
    """Return the minimum of each mode's times; the first round is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in modes}
    for number in range(rounds + 1):
        for name, forward in modes.items():
            time = run(forward, dy, calls)
            if number > 0:
                times[name].append(time)
    return {name: min(all_times) for name, all_times in times.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument(
        "--shapes", nargs="*", default=["4x8x16:16", "32x768:3072"], help="of X, then N"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{'X:N':>16} {'dtype':>9} {'pytorch us':>11} {'operator':>9} {'sebp':>7} {'more':>6}")
    for text in arguments.shapes:
        lead, n = text.split(":")
        shape = [int(size) for size in lead.split("x")]
        for dtype in (torch.float32, torch.bfloat16):
            dy = torch.randn(*shape[:-1], int(n)).to(dtype)
            is_tiny = dy.numel() * shape[-1] < 1e6
            modes = make_modes(shape, int(n), dtype)
            times = measure(modes, dy, arguments.rounds, 20 if is_tiny else 1)
            own, operator, ours = times.values()
            name = str(dtype).removeprefix("torch.")
            print(
                f"{text:>16} {name:>9} {own:11.0f} {operator:9.0f} {ours:7.0f} {ours - own:+6.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
