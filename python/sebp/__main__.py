# SPDX-License-Identifier: Apache-2.0
"""``python3 -m sebp``: what libsebp, PyTorch and their OpenMP make of this machine and each other.

Exits with 1 if the library is not found or more than one OpenMP runtime is loaded.
"""

import ctypes
import importlib.util
import sys
from pathlib import Path

from . import LibraryMismatchError, LibraryNotFoundError, __version__, _library
from ._structs import Info
from .core import Context


def main() -> int:
    """Print what is found, one thing a line.

    Returns
    -------
    int
        The exit status.
    """
    print(f"python package   {__version__} in {Path(__file__).parent}")
    try:
        library = _library.load()
    except (LibraryNotFoundError, LibraryMismatchError) as error:
        print(error, file=sys.stderr)
        return 1
    info = Info(ctypes.sizeof(Info))
    library.sebp_info_get(None, info)
    print(f"libsebp          {library.sebp_version().decode()} at {library._name}")
    print(f"kernels          {library.sebp_isa().decode()}")
    print(f"oneDNN           {info.onednn.decode() or 'none'}")
    with Context() as context:
        print(f"threads          {context.threads} on {info.cores} cores")
    if importlib.util.find_spec("torch") is None:
        print("PyTorch          none")
    else:
        import torch

        from .torch import linear

        x = torch.ones(64, 64, requires_grad=True)
        linear(x, x).sum().backward()
        print(f"PyTorch          {torch.__version__}, {torch.get_num_threads()} threads")
    runtimes = _library.openmp_runtimes()
    print(f"OpenMP runtimes  {len(runtimes)}")
    for path in runtimes:
        print(f"                 {path}")
    if len(runtimes) > 1:
        print("More than one OpenMP runtime: their threads fight for the cores.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
