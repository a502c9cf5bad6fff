# SPDX-License-Identifier: Apache-2.0
"""Rotary positions, of queries and keys in one pass each."""

import ctypes
import functools
import threading
from collections.abc import Callable
from types import CellType, FunctionType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..._structs import RotaryOptions
from ..common.context import context_of, stream_of
from ..common.tensors import DTYPES, matrix_of, new_like
from ..linear_layers.direct import has_numbers, is_plain
from .code import same_code

NAME = "apply_rotary_pos_emb"

# --------------------------------------------------------------------------------------------------
# What models of transformers have, written as they have it


def rotate_half(x: Tensor) -> Tensor:
    """Turn pairs (a, b), half a head apart, into (-b, a)."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def rotate_whole_heads(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Turn all pairs of each head."""
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed


def rotate_first_elements(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Turn the pairs of each head's first elements, as many as there are angles."""
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    rotary_dim = cos.shape[-1]
    q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
    k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]
    q_embed = (q_rot * cos) + (rotate_half(q_rot) * sin)
    k_embed = (k_rot * cos) + (rotate_half(k_rot) * sin)
    q_embed = torch.cat([q_embed, q_pass], dim=-1)
    k_embed = torch.cat([k_embed, k_pass], dim=-1)
    return q_embed, k_embed


def known_rotation(forward: Callable) -> Callable | None:
    """Return which of these an attention's forward calls, or None.

    Parameters
    ----------
    forward : callable
        A function written in Python, decorated or not.
    """
    while (inner := _wrapped_in(forward)) is not None:
        forward = inner
    if not isinstance(forward, FunctionType) or NAME not in forward.__code__.co_names:
        return None
    called = forward.__globals__.get(NAME)
    known = (rotate_whole_heads, rotate_first_elements)
    return next((one for one in known if same_code(called, one)), None)


def _wrapped_in(forward: Callable) -> FunctionType | None:
    """Return the function that a decorator has put another around, and which that calls."""
    inner = getattr(forward, "__wrapped__", None)
    cells = getattr(forward, "__closure__", None) or ()
    is_called = isinstance(inner, FunctionType) and any(_content(one) is inner for one in cells)
    return inner if is_called else None


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def with_rotation(forward: FunctionType, rotation: Callable) -> FunctionType:
    """Return an attention's forward that calls :func:`rotate` for one of these.

    The function itself, its decorators, and the module that it is from stay as they are. It is made
    anew for each call: a cache would keep all that their closures hold alive.
    """
    inner, cells, names = _wrapped_in(forward), forward.__closure__, forward.__globals__
    if inner is not None:
        replaced = CellType(with_rotation(inner, rotation))
        cells = tuple(replaced if _content(one) is inner else one for one in cells)
    else:
        names = _Names(names)
        names[NAME] = functools.partial(rotate, rotation)
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, cells)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


class _Names(dict):
    """A few global names; the others are those of a module, as they are at the time."""

    def __init__(self, others: dict[str, object]) -> None:
        super().__init__({"__builtins__": others["__builtins__"]})
        self._others = others

    def __missing__(self, name: str) -> object:
        return self._others[name]


# --------------------------------------------------------------------------------------------------
# By the library


def rotate(
    rotation: Callable, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Do what `rotation` does, by the library where it can read the tensors.

    Parameters
    ----------
    rotation : callable
        :func:`rotate_whole_heads` or :func:`rotate_first_elements`.
    q : Tensor, B x H x L x D
    k : Tensor, B x H_k x L x D
    cos, sin : Tensor, 1 or B x L x R
        Of the angles of each token; the second half of R is as the first. R is D, or less for
        :func:`rotate_first_elements`.
    unsqueeze_dim : int

    Returns
    -------
    (Tensor, Tensor)
        Of the shapes of `q` and `k`, in the dtype that the products with `cos` have.
    """
    if _can_do(rotation, q, k, cos, sin, unsqueeze_dim):
        table = _table_of(cos, sin)
        if table is not None:
            return _turned(q, cos, table), _turned(k, cos, table)
    return rotation(q, k, cos, sin, unsqueeze_dim)


def _can_do(
    rotation: Callable, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int
) -> bool:
    if unsqueeze_dim != 1 or not is_plain(q, k, cos, sin):
        return False
    if not (q.dim() == k.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape):
        return False
    if cos.requires_grad or sin.requires_grad or cos.dtype != sin.dtype:
        return False
    batch, _, length, size = q.shape
    angles = cos.shape[2]
    return (
        all(one.dtype in DTYPES for one in (q, k, cos))
        and k.shape[0] == batch
        and k.shape[2:] == (length, size)
        and cos.shape[0] in (1, batch)
        and cos.shape[1] == length
        and angles % 2 == 0
        and 0 < angles <= size
        and (angles == size or rotation is rotate_first_elements)
        and all(one.transpose(1, 2).is_contiguous() for one in (q, k))
    )


# Options of a table, which is made here: none of them matters.
_UNUSED = (0, 0, 10000.0, 1.0, 1.0, 4.0, 8192.0)


class _OfThread(threading.local):
    """The last cosines and sines, which all layers of a model share, and their table."""

    angles: tuple[Tensor, Tensor, int, int, int] | None = None
    copies: tuple[Tensor, Tensor] | None = None
    table: Tensor | None = None


_of_thread = _OfThread()


def _table_of(cos: Tensor, sin: Tensor) -> Tensor | None:
    """Return the library's table, (1 or B) L x R, or None where the halves are not alike.

    Who writes to ``.data``, or by NumPy, leaves no version. So on the CPU the table is used again
    only for equal numbers. On a GPU, where a comparison would have to be waited for, it is made
    anew, and only whether the halves are alike is known from before.
    """
    here = _of_thread
    # On another stream of a GPU the table may not be there yet, and its memory is not held for it.
    stream = 0 if cos.is_cpu else stream_of(cos.get_device())
    now = (cos._version, sin._version, stream)
    last = here.angles
    # They are held, so that nothing else can be at their place.
    if last is not None and last[0] is cos and last[1] is sin and last[2:] == now:
        if not cos.is_cpu:
            return None if here.table is None else _make_table(cos, sin)
        if all(torch.equal(one, copy) for one, copy in zip((cos, sin), here.copies, strict=True)):
            return here.table
    half = cos.shape[2] // 2
    alike = all(torch.equal(one[..., :half], one[..., half:]) for one in (cos, sin))
    here.angles = (cos, sin, *now)
    here.copies = (cos.clone(), sin.clone()) if cos.is_cpu else None
    here.table = _make_table(cos, sin) if alike else None
    return here.table


def _make_table(cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[2] // 2
    return torch.cat((cos[..., :half], sin[..., :half]), dim=-1).float().flatten(0, 1)


def _turned(x: Tensor, cos: Tensor, table: Tensor) -> Tensor:
    """Turn the heads of x: B x H x L x D."""
    batch, _, length, size = x.shape
    x = x.to(torch.promote_types(x.dtype, cos.dtype)).transpose(1, 2)
    positions = None
    if cos.shape[0] != batch:
        positions = torch.arange(length, device=x.device).repeat(batch)
    y = Turn.apply(x.flatten(2), table, positions, size, False)
    return y.unflatten(2, (-1, size)).transpose(1, 2)


class Turn(torch.autograd.Function):
    """Rows of heads, turned; the gradient is turned back."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        table: Tensor,
        positions: Tensor | None,
        size: int,
        is_back: bool,
    ) -> Tensor:
        """Turn rows, forward or back."""
        ctx.arguments = table, positions, size, is_back
        y = new_like(x)
        options = RotaryOptions(ctypes.sizeof(RotaryOptions), size, *_UNUSED)
        context_of(x, table, positions).call(
            "sebp_rotary_backward" if is_back else "sebp_rotary_forward",
            matrix_of(x),
            None if positions is None else positions.data_ptr(),
            matrix_of(table),
            None,
            options,
            matrix_of(y),
        )
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Turn the gradient the other way."""
        table, positions, size, is_back = ctx.arguments
        turn = Turn.apply if has_numbers(dy) else _turn_in_torch
        return turn(dy, table, positions, size, not is_back), None, None, None, None


def _turn_in_torch(
    x: Tensor, table: Tensor, positions: Tensor | None, size: int, is_back: bool
) -> Tensor:
    """Do what :class:`Turn` does where others step in, as with batched gradients."""
    of_rows = table if positions is None else table[positions]
    cos, sin = of_rows.view(*x.shape[:-1], 1, -1).to(x.dtype).chunk(2, dim=-1)
    sin = -sin if is_back else sin
    half = cos.shape[-1]
    each = x.reshape(*x.shape[:-1], -1, size)
    a, b, rest = each.split((half, half, size - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).reshape(x.shape)
