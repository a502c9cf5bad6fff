# SPDX-License-Identifier: Apache-2.0
"""Contexts: the threads and the scratch memory that calls work with."""

import ctypes
import threading
from types import TracebackType

from .._library import load
from .._structs import DEVICE_CPU, DEVICE_CUDA, ContextOptions, Info
from .calls import Handle, check

_PLACEMENTS = ("none", "compact", "spread")
_GEMMS = ("auto", "native", "onednn")
_PRECISIONS = ("highest", "split", "high", "medium")
_DEVICES = {"cpu": DEVICE_CPU, "cuda": DEVICE_CUDA}


class Context(Handle):
    """Threads and scratch memory. Used by one thread at a time.

    In a forked child, contexts work on one thread, whatever is asked for, as the child has none of
    OpenMP's threads. That holds for inherited contexts and for new ones, if ``sebp`` was imported
    before the fork. Where PyTorch has used threads and ``sebp`` is imported only in the child, ask
    for ``threads=1``. Also call ``torch.set_num_threads(1)``, without which PyTorch's own operators
    hang there.

    Parameters
    ----------
    threads : int, default 0
        0: one for each physical core this process may use.
    placement : {"none", "compact", "spread"}
        Where threads are bound.
    gemm : {"auto", "native", "onednn"}
        Which matrix product does the work.
    workspace_bytes : int, default 0
        Bound on scratch memory; 0: 64 MiB.
    precision : {"highest", "split", "high", "medium"}
        How exact products of float32 have to be, as ``sebp/context.h`` says. The variable
        SEBP_PRECISION goes before it.
    device : {"cpu", "cuda"}
        What computes. On a GPU all that calls read and write lies in its memory, which NumPy arrays
        do not: :mod:`sebp.torch` uses such contexts for tensors. Threads mean nothing there, and
        `placement` is refused.
    gpu : int, optional
        Which one, from 0 on, as CUDA counts them. Default: the calling thread's current one, which
        it has to be in each call.
    stream : int, default 0
        The ``cudaStream_t`` to work on, as a number; 0: the default stream.

    Raises
    ------
    SebpError
        If an option or an environment variable has a value that it may not have, or the build lacks
        what was asked for; if there is no such GPU.
    ValueError
        If `placement`, `gemm`, `precision` or `device` is not in its list.
    """

    def __init__(
        self,
        threads: int = 0,
        placement: str = "none",
        gemm: str = "auto",
        workspace_bytes: int = 0,
        precision: str = "highest",
        device: str = "cpu",
        gpu: int | None = None,
        stream: int = 0,
    ) -> None:
        if device not in _DEVICES:
            raise ValueError(f'device is {device!r}, not "cpu" or "cuda"')
        pointer = ctypes.c_void_p()
        message = ctypes.create_string_buffer(256)
        options = ContextOptions(
            size_bytes=ctypes.sizeof(ContextOptions),
            threads=threads,
            placement=_PLACEMENTS.index(placement),
            gemm=_GEMMS.index(gemm),
            workspace_bytes=workspace_bytes,
            message=ctypes.cast(message, ctypes.c_char_p),
            message_bytes=len(message),
            device=_DEVICES[device],
            precision=1 + _PRECISIONS.index(precision),
            gpu=0 if gpu is None else 1 + gpu,
            stream=stream or None,
        )
        check(load().sebp_context_create(options, pointer), message.value.decode())
        super().__init__(pointer, "sebp_context_destroy")

    @property
    def threads(self) -> int:
        """The number of threads it works with."""
        return load().sebp_context_threads(self)

    @property
    def scratch_bytes(self) -> int:
        """The maximum of scratch memory it has held so far."""
        return load().sebp_context_scratch_bytes(self)

    @property
    def gpu_name(self) -> str:
        """The name of the GPU that it works on; "" on the CPU."""
        info = Info(ctypes.sizeof(Info))
        check(load().sebp_info_get(self, info))
        return info.gpu.decode()

    def call(self, function: str, *arguments: object) -> None:
        """Call a function of the library with this context.

        Parameters
        ----------
        function : str
            Its name in the library.
        arguments
            Its arguments after the context. A :class:`Handle` is passed as the pointer it holds,
            None as NULL.

        Raises
        ------
        SebpError, MemoryError
            If the call fails.
        """
        status = getattr(load(), function)(self, *arguments)
        if status:
            check(status, load().sebp_context_message(self).decode())

    def close(self) -> None:
        """Free it. Do not use it afterwards; closing twice does nothing."""
        self.__del__()

    def __enter__(self) -> "Context":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


_of_thread = threading.local()


def default_context() -> Context:
    """Return the calling thread's own context, made with defaults on first use.

    Returns
    -------
    Context
        The same one for each call from this thread.
    """
    if not hasattr(_of_thread, "context"):
        _of_thread.context = Context()
    return _of_thread.context
