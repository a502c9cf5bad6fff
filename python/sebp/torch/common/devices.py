# SPDX-License-Identifier: Apache-2.0
"""On which devices the library can work with tensors: the CPU, and NVIDIA GPUs in a build for them.

Tensors on the CPU are told by ``is_cpu``, before anything of ``torch.cuda`` is asked.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..._library import load
from ..._structs import Info

_MIN_CAPABILITY = (8, 0)


@functools.cache
def cuda_version() -> str:
    """Return the version of CUDA that the library was built with; "" without."""
    info = Info(ctypes.sizeof(Info))
    load().sebp_info_get(None, info)
    return info.cuda.decode()


@functools.cache
def _reason_against_gpu(index: int) -> str:
    """Return why the library cannot work on a GPU of PyTorch's, or "" if it can."""
    if not cuda_version():
        return "this libsebp was built without CUDA (./configure --with-cuda)"
    if torch.version.cuda is None:
        return "PyTorch's GPUs are not NVIDIA's"
    capability = torch.cuda.get_device_capability(index)
    if capability < _MIN_CAPABILITY:
        return "its compute capability is {}.{}; libsebp needs 8.0".format(*capability)
    return ""


@torch.compiler.assume_constant_result
def has_gpu(index: int) -> bool:
    """Return whether the library can work on a GPU.

    Parameters
    ----------
    index : int
        As PyTorch counts them.
    """
    return not _reason_against_gpu(index)


def reason_against(device: torch.device) -> str:
    """Return why the library cannot work on a device, or "" if it can."""
    if device.type == "cpu":
        return ""
    if device.type != "cuda":
        return "libsebp works on the CPU"
    return _reason_against_gpu(
        torch.cuda.current_device() if device.index is None else device.index
    )


def is_reachable(tensor: Tensor) -> bool:
    """Return whether the library can work where a tensor lies."""
    return tensor.is_cpu or (tensor.is_cuda and has_gpu(tensor.get_device()))


def are_together(*tensors: Tensor | None) -> bool:
    """Return whether tensors lie on one device, and the library can work there."""
    first = None
    for tensor in tensors:
        if tensor is None:
            continue
        if first is None:
            first = tensor
            if not is_reachable(tensor):
                return False
        elif not (tensor.is_cpu if first.is_cpu else tensor.get_device() == first.get_device()):
            return False
    return True


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype of autocast where a tensor lies; None where that is off."""
    kind = "cuda" if tensor.is_cuda else "cpu"
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def is_autocast() -> bool:
    """Return whether autocast is on, on the CPU or on GPUs."""
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turn autocast off within a ``with``, where it is on."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def gpus_of(model: nn.Module) -> set[int]:
    """Return the GPUs that a model's parameters lie on."""
    return {p.get_device() for p in model.parameters() if p.is_cuda}
