# SPDX-License-Identifier: Apache-2.0
"""``sebp::linear`` without PyTorch's dispatcher, where that would only pass the call on.

An operator that is written in Python costs some 75 microseconds for a call of its forward and its
backward, which is more than a small layer's products take. What that pays for is that others
can step in between: modes, transforms, tracers, compilers, profilers, subclasses of tensors. The
dispatcher decides by the keys of the tensors and of the thread who steps in. Where these are the
plain ones nobody does, and the same functions are called directly.
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils._python_dispatch import TorchDispatchMode

from ..._rules import Rule
from ..common.devices import has_gpu
from ..common.forward import is_transformed
from .autograd import dtypes_of, only_wanted, wanted_dtypes
from .products import linear_backward, linear_forward

PLAIN = (Tensor, nn.Parameter)  # of these classes, not of one derived from them


def _keys(*names: str) -> object:
    """Make a set of dispatch keys."""
    key_set = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        key_set = key_set.add(getattr(torch._C.DispatchKey, name))
    return key_set


try:
    _keys_of = torch._C._dispatch_keys
    _keys_of_thread = torch._C._dispatch_tls_local_include_set
    _is_left_out = torch._C._dispatch_tls_is_dispatch_key_excluded
    _is_profiled = torch._C._autograd._profiler_enabled
    _has_function_mode = torch._C._is_torch_function_mode_enabled
    _modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack
    # Of a tensor in the memory of the CPU, or of a GPU, with strides that is not negated, wrapped,
    # quantized, nested or made for inference.
    _TENSOR = _keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")
    _TENSOR_ON_GPU = _keys("CUDA", "ADInplaceOrView", "AutogradCUDA", "AutocastCUDA")
    # Of a thread without modes, transforms or tracers.
    _THREAD = _keys("BackendSelect", "ADInplaceOrView")
    # Of one with modes.
    _THREAD_IN_MODES = _keys("BackendSelect", "ADInplaceOrView", "Python", "PythonTLSSnapshot")
    _AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality
    _IS_KNOWN = _keys("BackendSelect", "ADInplaceOrView") == _THREAD  # else sets have no ==
except AttributeError:  # a PyTorch that has other names for these
    _IS_KNOWN = False


class Watcher(TorchDispatchMode):
    """A mode that looks at operators, and changes neither them nor what they return.

    Within it the library computes what it computes without it. So what checkpointing computes again
    without the mode saves as many tensors as it did within.
    """


def is_direct(*tensors: Tensor | None) -> bool:
    """Return whether nobody steps in between an operator called with these and autograd.

    Autocast does not count.

    Parameters
    ----------
    tensors : Tensor or None

    Returns
    -------
    bool
        False also under ``torch.compile``, and where a profiler is to see the operator.
    """
    return is_plain(*tensors) and not (_has_function_mode() or _is_profiled())


def is_plain(*tensors: Tensor | None) -> bool:
    """Return whether tensors are ordinary ones, and no tracer or transform is at work.

    They lie on the CPU, or on one GPU that the library can work on. A profiler and modes that
    change functions do not count.

    Parameters
    ----------
    tensors : Tensor or None

    Returns
    -------
    bool
        False also under ``torch.compile``, in inference mode, and where this PyTorch cannot tell.
    """
    if (
        torch.compiler.is_compiling()
        or not _IS_KNOWN
        or not (_keys_of_thread() == _THREAD or _is_watched_alone())
        or _is_left_out(_AUTOGRAD)
        or is_transformed()
    ):
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN or _keys_of(tensor) != _TENSOR):
            return _are_plain_on_gpu(tensors)
    return True


def _are_plain_on_gpu(tensors: tuple[Tensor | None, ...]) -> bool:
    """Return whether all are ordinary ones on one GPU that the library can work on."""
    gpu = None
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in PLAIN or _keys_of(tensor) != _TENSOR_ON_GPU:
            return False
        index = tensor.get_device()
        if index != gpu and (gpu is not None or not has_gpu(index)):
            return False
        gpu = index
    return True


def has_numbers(*tensors: Tensor | None) -> bool:
    """Return whether a backward is given tensors with numbers, which the library can read.

    Parameters
    ----------
    tensors : Tensor or None

    Returns
    -------
    bool
        False of batched gradients. True within compiled autograd, as the library's calls break its
        graph. What else a backward did there would be compiled, and numbers that it keeps for
        itself with it.
    """
    return torch.compiler.is_compiling() or is_plain(*tensors)


def _is_watched_alone() -> bool:
    """Return whether all modes at work are :class:`Watcher`."""
    return _keys_of_thread() == _THREAD_IN_MODES and all(
        isinstance(mode, Watcher) for mode in _modes()
    )


class sebp_linear(torch.autograd.Function):
    """What ``sebp::linear`` computes. Its name is that of the node in the graph of gradients."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        total: int,
        transposed: bool,
        rule: Rule,
        dtype: torch.dtype | None,
    ) -> Tensor:
        """Compute Y, and save what the operator saves."""
        ctx.total, ctx.transposed, ctx.rule = total, transposed, rule
        ctx.dtypes = dtypes_of(x, weight, bias)
        need_x, need_w, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_w else None, weight if need_x else None)
        return linear_forward(x, weight, bias, transposed, dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
        """Compute the gradients, by ``sebp::linear_backward`` where others may step in."""
        x, weight = ctx.saved_tensors
        wanted = wanted_dtypes(ctx.needs_input_grad, ctx.dtypes)
        # With gradients of gradients autograd has to see the operator.
        if not torch.is_grad_enabled() and is_direct(dy, x, weight):
            gradients = linear_backward(dy, x, weight, ctx.total, ctx.transposed, ctx.rule, *wanted)
        else:
            found = torch.ops.sebp.linear_backward(
                dy, x, weight, ctx.total, ctx.transposed, *ctx.rule, *wanted
            )
            gradients = only_wanted(found, wanted)
        return (*gradients, None, None, None, None)


# What Function.apply() calls after it has looked for torch.func, which is_direct() has done before.
_apply = super(torch.autograd.Function, sebp_linear).apply


def direct_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    transposed: bool,
    rule: Rule,
    dtype: torch.dtype | None,
) -> Tensor:
    """Apply Y = X W^T + b, or X W + b, as ``sebp::linear`` does.

    Parameters
    ----------
    x : Tensor, ... x K
    weight : Tensor, N x K, or K x N if `transposed`
    bias : Tensor, N, or None
        All of tensors that :func:`is_direct` is true of, each float32 or bfloat16.
    mask : Tensor, B x L, or None
        Of the padded batch, as the operator takes it.
    transposed : bool
    rule : Rule
        Which rows of dY to keep.
    dtype : torch.dtype, or None
        Y's. None: X's.

    Returns
    -------
    Tensor, ... x N
        Y.
    """
    total = math.prod(x.shape[:-1]) if mask is None else mask.numel()
    return _apply(x, weight, bias, total, transposed, rule, dtype)
