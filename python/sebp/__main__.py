# SPDX-License-Identifier: Apache-2.0
"""``python3 -m sebp``: what libsebp, PyTorch and their OpenMP make of this machine and each other.

Exits with 1 if the library is not found, if the environment allows no context, or if PyTorch and
the library do not work in the same pool of threads.
"""

import ctypes
import importlib.util
import itertools
import sys
from pathlib import Path

import numpy as np

from . import LibraryMismatchError, LibraryNotFoundError, SebpError, __version__, _library
from ._structs import Info
from .core import Context, linear_forward
from .core.calls import OUT_OF_RANGE, UNSUPPORTED
from .sparse import BasisSums


def _has_lapack(context: Context) -> bool:
    """Tell whether the library can solve for bases, which only LAPACK does."""
    sums = BasisSums(1, 1)
    sums.add(np.ones((1, 1), np.float32), context=context)
    try:
        sums.solve(1, 1, context=context)
    except SebpError as error:
        if error.status != UNSUPPORTED:
            raise
        return False
    return True


def _print_gpus() -> None:
    """Print the GPUs, one a line, with why the library does not work on one."""
    for gpu in itertools.count():
        try:
            with Context(device="cuda", gpu=gpu) as context:
                print(f"GPU {gpu:<13}{context.gpu_name}")
        except SebpError as error:
            if error.status == OUT_OF_RANGE:  # that was the last one
                return
            print(f"GPU {gpu:<13}{error}")
            if error.status != UNSUPPORTED:  # no driver, or no GPU
                return


def _print_library() -> None:
    library = _library.load()
    info = Info(ctypes.sizeof(Info))
    library.sebp_info_get(None, info)
    path = next(iter(_library.mapped_files("libsebp.so")), library._name)
    print(f"libsebp          {library.sebp_version().decode()} at {path}")
    with Context() as context:
        print(f"kernels          {library.sebp_isa().decode()}")
        print(f"OpenMP           {info.openmp or 'none'}")
        print(f"oneDNN           {info.onednn.decode() or 'none'}")
        print(f"hwloc            {info.hwloc.decode() or 'none'}")
        print(f"LAPACK           {'yes' if _has_lapack(context) else 'none'}")
        print(f"threads          {context.threads} on {info.cores} cores")
    print(f"CUDA             {info.cuda.decode() or 'none'}")
    if info.cuda:
        _print_gpus()


def _shares_pool() -> bool | None:
    """Return whether the library brings no threads of its own after PyTorch has worked on as many.

    Returns
    -------
    bool or None
        None where it cannot be measured: on one thread, or without ``/proc``.
    """
    import torch

    tasks = Path("/proc/self/task")
    with Context() as context:
        if context.threads == 1 or not tasks.exists():
            return None
        torch.set_num_threads(context.threads)
        x = torch.ones(1024, 1024)
        x.sigmoid_()
        before = len(list(tasks.iterdir()))
        linear_forward(x.numpy(), x.numpy(), context=context)
        return len(list(tasks.iterdir())) == before


def _print_torch() -> bool:
    """Print what there is of PyTorch; False: its threads and the library's are two pools."""
    if importlib.util.find_spec("torch") is None:
        print("PyTorch          none")
        return True
    import torch

    print(f"PyTorch          {torch.__version__}, {torch.get_num_threads()} threads")
    shared = _shares_pool()
    pools = {None: "not measured: that takes two threads, and /proc", True: "one", False: "two"}
    print(f"thread pools     {pools[shared]}")
    return shared is not False


def main() -> int:
    """Print what is found, one thing a line.

    Returns
    -------
    int
        The exit status.
    """
    print(f"python package   {__version__} in {Path(__file__).parent}")
    try:
        _print_library()
        shared = _print_torch()
    except (LibraryNotFoundError, LibraryMismatchError, SebpError) as error:
        print(error, file=sys.stderr)
        return 1
    runtimes = _library.openmp_runtimes()
    print(f"OpenMP runtimes  {len(runtimes)}")
    for path in runtimes:
        print(f"                 {path}")
    if not shared:
        if not _library.brings_llvm_openmp(_library.load()):
            # Else loading it has warned, and said what to do.
            print(
                "Two pools: PyTorch's threads and libsebp's fight for the cores.", file=sys.stderr
            )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
