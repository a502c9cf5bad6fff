# SPDX-License-Identifier: Apache-2.0
"""What it costs that PyTorch and libsebp take turns: in one pool of threads, and in two.

    python openmp.py

PyTorch's GELU and a linear layer run many times: all of the one and then all of the other, and in
turn. The layer is PyTorch's own, for comparison; or libsebp's, in one pool, which is the package as
it is, or in two. For two, a process loads a copy of the library that is bound to a copy of libgomp
under another name, as happens where nothing makes the two share.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np

import sebp
from sebp import _library


def measure(layer: str, rows: int, runs: int) -> list[float]:
    """Time both alone and in turn, on as many threads.

    Returns
    -------
    list of float
        Microseconds of a GELU, of a linear layer, and of one of each in turn; and how many threads
        the layer has added to the process.
    """
    rng = np.random.default_rng(1)
    x, w = (rng.standard_normal((n, 768), np.float32) for n in (rows, 3072))
    _library.load()
    import torch

    context = sebp.Context(torch.get_num_threads())
    hidden, x_torch, w_torch = torch.randn(rows, 3072), torch.from_numpy(x), torch.from_numpy(w)
    tasks = Path("/proc/self/task")

    def gelu() -> None:
        torch.nn.functional.gelu(hidden)

    def linear() -> None:
        if layer == "pytorch":
            torch.nn.functional.linear(x_torch, w_torch)
        else:
            sebp.linear_forward(x, w, context=context)

    def microseconds(*functions: Callable[[], None]) -> float:
        start = perf_counter()
        for _ in range(runs):
            for function in functions:
                function()
        return 1e6 * (perf_counter() - start) / runs

    microseconds(gelu)
    before = len(list(tasks.iterdir()))
    microseconds(linear)
    added = len(list(tasks.iterdir())) - before
    return [microseconds(gelu), microseconds(linear), microseconds(gelu, linear), added]


def copy_with_own_openmp(folder: Path) -> str:
    """Copy libsebp, and the libgomp that it names under another name.

    Returns
    -------
    str
        The path of the copy of libsebp.
    """
    _library.load()
    copies = {"libsebp.so": "libsebp.so.0", "libgomp": "libgomq.so.1"}
    for name, copy in copies.items():
        original = Path(_library.mapped_files(name)[0]).read_bytes()
        (folder / copy).write_bytes(original.replace(b"libgomp.so.1\0", b"libgomq.so.1\0"))
    return str(folder / "libsebp.so.0")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--runs", type=int, default=300, help="of each, for one time")
    parser.add_argument("--repetitions", type=int, default=5, help="processes for each layer")
    parser.add_argument("--measure", metavar="LAYER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        if options.measure == "two pools":
            _library.share_openmp = lambda: None
        print(*measure(options.measure, options.rows, options.runs))
        return

    from common import print_table

    with tempfile.TemporaryDirectory() as folder:
        own = {"SEBP_LIBRARY": copy_with_own_openmp(Path(folder)), "LD_LIBRARY_PATH": folder}
        layers = {"pytorch": {}, "one pool": {}, "two pools": own}
        measured = {layer: [] for layer in layers}
        for _ in range(options.repetitions):
            for layer, environment in layers.items():
                done = subprocess.run(
                    [sys.executable, __file__, *sys.argv[1:], "--measure", layer],
                    # The library's own GEMM, as oneDNN is bound to a runtime by itself.
                    env={**os.environ, "SEBP_GEMM": "native", **environment},
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                gelu, linear, turn, added = map(float, done.stdout.split())
                measured[layer].append([added, gelu, linear, turn, turn - gelu - linear])
    rows = []
    for layer, times in measured.items():
        medians = [statistics.median(column) for column in zip(*times, strict=True)]
        share = medians[4] / (medians[1] + medians[2])
        rows.append([layer, *(f"{m:.0f}" for m in medians), f"{share:.0%}"])
    header = ["layer", "threads added", "GELU us", "linear us", "in turn us", "lost us", "lost"]
    print_table(header, rows)


if __name__ == "__main__":
    main()
