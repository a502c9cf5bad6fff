# SPDX-License-Identifier: Apache-2.0
"""The calling thread's context."""

import threading

import torch

from ..core import Context


class _OfThread(threading.local):
    """The context that all calls from one thread share."""

    context: Context | None = None
    threads = 0


_of_thread = _OfThread()


def thread_context() -> Context:
    """Return this thread's context, with as many threads as PyTorch works with.

    In a forked child it works on one thread, as the library knows that OpenMP's are gone.

    Returns
    -------
    Context
        The same at each call, until PyTorch's number of threads changes.
    """
    here = _of_thread
    threads = torch.get_num_threads()
    if here.context is None or here.threads != threads:
        here.context = Context(threads=threads)
        here.threads = threads
    return here.context
