# SPDX-License-Identifier: Apache-2.0
"""The calling thread's contexts."""

import functools
import threading

import torch

from .._library import load
from ..core import Context


class _OfThread(threading.local):
    """The contexts that all calls from one thread share, one for each precision."""

    def __init__(self) -> None:
        self.contexts: dict[str, Context] = {}
        self.threads = 0


_of_thread = _OfThread()

# PyTorch's names of precisions as the library's. TF32 has 11 bits, the sum of two bfloat16 16.
_LEVELS = {"tf32": "high", "bf16": "medium"}
_NAMES = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
_precision_of = getattr(torch._C, "_get_fp32_precision_getter", None)


def _precision() -> str:
    """Return the library's precision for products of float32, as PyTorch has been told.

    ``torch.set_float32_matmul_precision()`` sets what oneDNN may do, and so do the newer settings
    in ``torch.backends``. That is read, as the former cannot be read where the latter were used.
    """
    if _precision_of is None:  # a PyTorch before 2.9
        name = _NAMES[torch.get_float32_matmul_precision()]
    else:
        name = _precision_of("mkldnn", "matmul")
    return _LEVELS.get(name, "highest")


def thread_context() -> Context:
    """Return this thread's context, with as many threads as PyTorch works with.

    Its products of float32 are as exact as ``torch.set_float32_matmul_precision()`` asks for at the
    moment. In a forked child it works on one thread, as the library knows that OpenMP's are gone.

    Returns
    -------
    Context
        The same at each call, until PyTorch's number of threads or its precision changes.
    """
    here, precision = _of_thread, _precision()
    threads = torch.get_num_threads()
    if here.threads != threads:
        here.contexts, here.threads = {}, threads
    context = here.contexts.get(precision)
    if context is None:
        context = here.contexts[precision] = Context(threads=threads, precision=precision)
    return context


@functools.cache
def is_fast_in_bfloat16() -> bool:
    """Return whether the library's products in bfloat16 are known to be as fast as PyTorch's.

    They measured as fast on CPUs that multiply bfloat16 by AVX-512 or AMX, and more than twice as
    fast on other x86-64 CPUs. On CPUs of other kinds they have not been measured.
    """
    thread_context()  # which settles the tier
    return load().sebp_isa().decode() in ("avx2", "avx512", "avx512bf16", "amx")
