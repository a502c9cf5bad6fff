# SPDX-License-Identifier: Apache-2.0
"""Draws layers by tokens as an SVG document. Lengths are in pixels."""

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

_MARGIN = 20
_TOP = 92  # the title and the heads of the columns
_BOTTOM = 76  # the axis and the legend
_GRID = 640
_BARS = 60
_NOTES = 200  # bars, and the numbers beside them
_BLOCK_GAP = 4

_LEVELS = 24
_STOPS = ((204, 224, 241), (84, 158, 205), (8, 48, 107))  # of the colour scale, 0 excluded
_NOTHING = "#ffffff"
_INK, _FAINT, _FRAME, _BAR, _TRACK = "#1f2933", "#697586", "#c9d1d9", "#ee9b4f", "#f3f4f6"


def _colour(level: int) -> str:
    """Return the colour of a level, 0 (nothing) to _LEVELS (all)."""
    if level == 0:
        return _NOTHING
    place = (level - 1) / (_LEVELS - 1) * (len(_STOPS) - 1)
    below = min(int(place), len(_STOPS) - 2)
    pairs = zip(_STOPS[below], _STOPS[below + 1], strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - below)):02x}" for a, b in pairs)


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}">{escape(text)}</text>'


def _split(name: str) -> tuple[str, str]:
    """Split a layer's name into its block, up to the last number, and its name in the block."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    cut = numbers[-1] + 1 if numbers else 0
    return ".".join(parts[:cut]), ".".join(parts[cut:])


def _label_length(split: Sequence[tuple[str, str]], is_named: bool) -> int:
    """Return the characters that the longest label needs: a block's name, then a layer's in it."""
    if not is_named:
        return max([len(block or leaf) for block, leaf in split], default=0)
    alone = max([len(leaf) for block, leaf in split if not block], default=0)
    blocks = [(len(block), len(leaf)) for block, leaf in split if block]
    return max(alone, sum(map(max, zip(*blocks, strict=True))) + 3 if blocks else 0)


def _cells(share: NDArray[np.float64], y: int, height: int) -> dict[int, str]:
    """Outline one layer's cells, neighbours of the same level as one: a path for each level."""
    columns = min(len(share), _GRID // 2)
    edges = np.arange(columns + 1) * len(share) // columns
    means = np.add.reduceat(share, edges[:-1]) / np.diff(edges)
    levels = np.ceil(means * _LEVELS - 1e-9).astype(int)
    starts = [0, *(np.flatnonzero(np.diff(levels)) + 1).tolist(), columns]
    paths: dict[int, str] = {}
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        level = int(levels[start])
        left, right = (_GRID * i // columns for i in (start, end))
        if level:
            box = f"M{left} {y}h{right - left}v{height}h{left - right}z"
            paths[level] = paths.get(level, "") + box
    return paths


def _axis(length: int, y: int) -> list[str]:
    """Draw the ticks of the tokens below the grid."""
    step = 1
    while length > 8 * step:
        step *= 2
    marks = []
    for token in range(0, length + 1, step):
        x = _GRID * token / length
        marks.append(f'<path d="M{x:g} {y}v5" stroke="{_FAINT}"/>')
        marks.append(_text(x, y + 18, str(token), "small", "middle"))
    return [*marks, _text(_GRID / 2, y + 36, "token of the text", "small", "middle")]


def _legend(y: int) -> list[str]:
    """Draw the colour scale."""
    step = 8
    left = _GRID - step * _LEVELS
    box = f"M{left} {y}h{_GRID - left}v12H{left}zM{left - 26} {y}h14v12h-14z"
    marks = [_text(left - 36, y + 10, "share of the texts whose row is active", "small", "end")]
    for level in range(1, _LEVELS + 1):
        x = left + step * (level - 1)
        marks.append(f'<path d="M{x} {y}h{step}v12h-{step}z" fill="{_colour(level)}"/>')
    marks.append(f'<path d="{box}" fill="none" stroke="{_FRAME}"/>')
    for label, x in (("none", left - 19), ("50%", (left + _GRID) / 2), ("100%", _GRID)):
        marks.append(_text(x, y + 25, label, "small", "middle"))
    return marks


def draw(
    summary: str,
    names: Sequence[str],
    shares: Sequence[NDArray[np.float64]],
    notes: Sequence[str],
    length: int,
) -> str:
    """Draw the heat map.

    Parameters
    ----------
    summary : str
        A line below the title.
    names : sequence of str
        The layers, from top to bottom.
    shares : sequence of arrays
        For each layer the share of texts active at each token, or a single number.
    notes : sequence of str
        What to write at the right of each layer.
    length : int
        The tokens of a text; 0: no layer has any.

    Returns
    -------
    str
        An SVG document.
    """
    # Past 250 layers only their blocks are named.
    is_named = len(names) <= 250
    height, size, gap = (15, 11, 1) if len(names) <= 60 else (12, 10, 1) if is_named else (4, 10, 0)
    split = [_split(name) for name in names]
    left = int(0.61 * size * _label_length(split, is_named)) + _MARGIN + 8

    paths: dict[int, str] = {}
    marks: list[str] = []
    strips: list[str] = []
    y, free = 0, 0  # from where, and from where there is room for the next block's name
    for i, ((block, leaf), share) in enumerate(zip(split, shares, strict=True)):
        is_first = i == 0 or block != split[i - 1][0]
        y += _BLOCK_GAP if i and is_first else 0
        base = y + (height - 3 if is_named else 8)
        if is_first and y >= free and (block or not is_named):
            marks.append(_text(_MARGIN - left, base, block or leaf, "name"))
            free = y + size + 1
        if is_named:
            marks.append(_text(-8, base, leaf, "name", "end"))
            marks.append(_text(_GRID + _BARS + 62, base, f"{share.mean():.1%}", "name", "end"))
            marks.append(_text(_GRID + _NOTES, base, notes[i], "name faint", "end"))
            if len(share) == 1:
                style = "name light" if share[0] > 0.4 else "name faint"
                strips.append(_text(_GRID / 2, base, "rows are not tokens here", style, "middle"))
        for part, colour in ((1, _TRACK), (share.mean(), _BAR)):
            bar = f"M{_GRID + 12} {y + gap}h{part * _BARS:.1f}v{height - 2 * gap}H{_GRID + 12}z"
            marks.append(f'<path d="{bar}" fill="{colour}"/>')
        marks.append(
            f'<rect y="{y}" width="{_GRID}" height="{height}" fill="{_NOTHING}" stroke="{_FRAME}"'
            f' stroke-width="{gap / 2}"><title>{escape(names[i])}: {notes[i]}</title></rect>'
        )
        for level, path in _cells(share, y, height - gap).items():
            paths[level] = paths.get(level, "") + path
        y += height

    width = left + _GRID + _NOTES + _MARGIN
    total = _TOP + y + _BOTTOM
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{total}"'
            f' viewBox="0 0 {width} {total}">',
            "<style>text{font:12px sans-serif;fill:" + _INK + "}"
            ".title{font-size:18px;font-weight:bold}.small{font-size:11px;fill:" + _FAINT + "}"
            f".name{{font:{size}px monospace}}.faint{{fill:{_FAINT}}}"
            ".light{fill:white}</style>",
            f'<rect width="{width}" height="{total}" fill="white"/>',
            _text(_MARGIN, 32, "Active rows of dY in each linear layer", "title"),
            _text(_MARGIN, 54, summary),
            f'<g transform="translate({left} {_TOP})">',
            _text(-8, -8, "layer", "small", "end"),
            _text(_GRID + 12, -8, "activity", "small"),
            *([_text(_GRID + _NOTES, -8, "rows", "small", "end")] if is_named else []),
            *marks,
            *(f'<path d="{paths[i]}" fill="{_colour(i)}" pointer-events="none"/>' for i in paths),
            *strips,
            *(_axis(length, y + 4) if length else []),
            *_legend(y + 46),
            "</g>",
            "</svg>\n",
        ]
    )
