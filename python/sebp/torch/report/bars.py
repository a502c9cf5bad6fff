# SPDX-License-Identifier: Apache-2.0
"""Draws bars that are made of parts as an SVG document. Lengths are in pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_MARGIN, _LABELS, _WIDTH, _TOTALS = 20, 110, 520, 110
_TOP, _HEIGHT, _STEP = 56, 24, 50
_COLOURS = ("#08306b", "#549ecd", "#ee9b4f", "#c9d1d9")


@dataclass(frozen=True)
class Bar:
    """A bar.

    Attributes
    ----------
    label : str
        At its left.
    parts : sequence of (str, float)
        What each is and how long, 0 or more, in any unit.
    total : str
        At its right.
    """

    label: str
    parts: Sequence[tuple[str, float]]
    total: str


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}">{escape(text)}</text>'


def _draw_bar(bar: Bar, y: int, longest: float) -> list[str]:
    marks = [
        _text(_LABELS - 8, y + 16, bar.label, "", "end"),
        _text(_LABELS + _WIDTH + 8, y + 16, bar.total),
    ]
    x = float(_LABELS)
    for (name, length), colour in zip(bar.parts, _COLOURS, strict=False):
        width = _WIDTH * length / longest if longest else 0.0
        if width:
            marks.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_HEIGHT}" fill="{colour}">'
                f"<title>{escape(name)}</title></rect>"
            )
        x += width
    # Names below, each after the one before it, with a square of its colour.
    x = float(_LABELS)
    for (name, _), colour in zip(bar.parts, _COLOURS, strict=False):
        marks.append(f'<rect x="{x:g}" y="{y + 29}" width="8" height="8" fill="{colour}"/>')
        marks.append(_text(x + 12, y + 37, name, "small"))
        x += 24 + 6.2 * len(name)
    return marks


def draw_bars(title: str, groups: Sequence[Sequence[Bar]]) -> str:
    """Draw bars one below the other.

    Parameters
    ----------
    title : str
    groups : sequence of sequences of Bar
        The bars of a group have one scale, and up to four parts.

    Returns
    -------
    str
        An SVG document.
    """
    marks, y = [_text(0, 30, title, "title")], _TOP
    for group in groups:
        longest = max((sum(length for _, length in bar.parts) for bar in group), default=0.0)
        for bar in group:
            marks += _draw_bar(bar, y, longest)
            y += _STEP
        y += _STEP // 4
    width = 2 * _MARGIN + _LABELS + _WIDTH + _TOTALS
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}"'
            f' viewBox="{-_MARGIN} 0 {width} {y}">',
            "<style>text{font:12px sans-serif;fill:#1f2933}"
            ".title{font-size:18px;font-weight:bold}.small{font-size:11px;fill:#697586}</style>",
            f'<rect x="{-_MARGIN}" width="{width}" height="{y}" fill="white"/>',
            *marks,
            "</svg>\n",
        ]
    )
