# SPDX-License-Identifier: Apache-2.0
"""The calling thread's contexts."""

import functools
import threading

import torch
from torch import Tensor

from ..._library import load
from ...core import Context
from .devices import reason_against


class _OfThread(threading.local):
    """The contexts that all calls from one thread share.

    One for each precision, and on GPUs also for each of them and each stream.
    """

    def __init__(self) -> None:
        self.contexts: dict[str, Context] = {}
        self.threads = 0
        self.on_gpus: dict[tuple[int, int, str], Context] = {}


_of_thread = _OfThread()

# PyTorch's names of precisions as the library's. TF32 has 11 bits, the sum of two bfloat16 16.
_LEVELS = {"tf32": "high", "bf16": "medium"}
_NAMES = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
_precision_of = getattr(torch._C, "_get_fp32_precision_getter", None)


def _precision(backend: str) -> str:
    """Return the library's precision for products of float32, as PyTorch has been told.

    ``torch.set_float32_matmul_precision()`` sets what oneDNN and cuBLAS may do, and so do the newer
    settings in ``torch.backends``. That is read, as the former cannot be read where the latter were
    used.

    Parameters
    ----------
    backend : "mkldnn" or "cuda"
    """
    if _precision_of is None:  # a PyTorch before 2.9
        name = _NAMES[torch.get_float32_matmul_precision()]
    else:
        name = _precision_of(backend, "matmul")
    return _LEVELS.get(name, "highest")


# torch.cuda.current_stream(gpu).cuda_stream, without an object made for it.
_raw_stream_of = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def thread_context() -> Context:
    """Return this thread's context on the CPU, with as many threads as PyTorch works with.

    Its products of float32 are as exact as ``torch.set_float32_matmul_precision()`` asks for at the
    moment. In a forked child it works on one thread, as the library knows that OpenMP's are gone.

    Returns
    -------
    Context
        The same at each call, until PyTorch's number of threads or its precision changes.
    """
    here, precision = _of_thread, _precision("mkldnn")
    threads = torch.get_num_threads()
    if here.threads != threads:
        here.contexts, here.threads = {}, threads
    context = here.contexts.get(precision)
    if context is None:
        context = here.contexts[precision] = Context(threads=threads, precision=precision)
    return context


def context_of(*tensors: Tensor | None) -> Context:
    """Return this thread's context for a call that reads these tensors.

    On a GPU it works on PyTorch's current stream. What the library reads and writes there needs no
    ``record_stream()``: PyTorch's allocator gives the memory of a tensor that is gone to others of
    the same stream alone, and their kernels run after the library's.

    Parameters
    ----------
    tensors : Tensor or None
        The first is a tensor.

    Returns
    -------
    Context
        On the CPU :func:`thread_context`'s.

    Raises
    ------
    RuntimeError
        If they lie on several devices; in a CUDA graph's capture, if there is no context yet.
    TypeError
        If the library cannot work where they lie.
    """
    for tensor in tensors:
        if tensor is not None and not tensor.is_cpu:
            return _context_on_gpu(tensors)
    return thread_context()


class _GpuContext(Context):
    """A context on a GPU, which is the current one in its calls, whatever it is around them."""

    def __init__(self, gpu: int, stream: int, precision: str) -> None:
        self._gpu = gpu
        with torch.cuda.device(gpu):
            super().__init__(precision=precision, device="cuda", gpu=gpu, stream=stream)

    def call(self, function: str, *arguments: object) -> None:
        """Call a function of the library, as :meth:`Context.call` does."""
        if torch.cuda.current_device() == self._gpu:
            super().call(function, *arguments)
        else:
            with torch.cuda.device(self._gpu):
                super().call(function, *arguments)


def _context_on_gpu(tensors: tuple[Tensor | None, ...]) -> Context:
    """Return the context for tensors that are not all on the CPU."""
    gpu = None
    for tensor in tensors:
        if tensor is None:
            continue
        if gpu is None:
            gpu, first = tensor.get_device(), tensor
        elif tensor.get_device() != gpu:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices,"
                f" {first.device} and {tensor.device}!"
            )
    if not first.is_cuda:
        raise TypeError(f"a tensor is on {first.device}, and {reason_against(first.device)}")
    key = gpu, stream_of(gpu), _precision("cuda")
    here = _of_thread.on_gpus
    context = here.get(key)
    if context is None:
        if reason := reason_against(first.device):
            raise TypeError(f"a tensor is on {first.device}, and {reason}")
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "sebp: the first call on a stream cannot be captured in a CUDA graph: make one"
                " before, on the stream of the capture"
            )
        context = here[key] = _GpuContext(*key)
    return context


def stream_of(gpu: int) -> int:
    """Return PyTorch's current stream on a GPU as the number that CUDA has for it."""
    if _raw_stream_of is not None:
        return _raw_stream_of(gpu)
    return torch.cuda.current_stream(gpu).cuda_stream


@functools.cache
def is_fast_in_bfloat16() -> bool:
    """Return whether the library's products in bfloat16 are known to be as fast as PyTorch's.

    They measured as fast on CPUs that multiply bfloat16 by AVX-512 or AMX, and more than twice as
    fast on other x86-64 CPUs. On CPUs of other kinds they have not been measured.
    """
    thread_context()  # which settles the tier
    return load().sebp_isa().decode() in ("avx2", "avx512", "avx512bf16", "amx")
