# SPDX-License-Identifier: Apache-2.0
"""Drawings as SVG, without a library."""

from html import escape
from pathlib import Path


class Drawing:
    """A white page to draw on; x goes right and y down."""

    def __init__(self, width: int, height: int) -> None:
        self._parts = [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' "
            "font-family='sans-serif' font-size='12'>",
            f"<rect width='{width}' height='{height}' fill='white'/>",
        ]

    def text(self, x: float, y: float, words: object, anchor: str = "middle") -> None:
        """Write words whose middle, start or end is at x."""
        self._parts.append(
            f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'>{escape(str(words))}</text>"
        )

    def line(self, start: tuple, end: tuple, color: str = "#ddd", thick: float = 1) -> None:
        """Draw a straight line."""
        self.curve([start, end], color, thick)

    def curve(self, points: list[tuple], color: str, thick: float) -> None:
        """Draw a line through points."""
        where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(
            f"<polyline fill='none' stroke='{color}' stroke-width='{thick}' points='{where}'/>"
        )

    def bar(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """Fill a rectangle whose upper left corner is (x, y)."""
        self._parts.append(
            f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{height:.1f}'"
            f" fill='{color}'/>"
        )

    def dot(self, x: float, y: float, color: str) -> None:
        """Draw a dot."""
        self._parts.append(
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4.5' fill='{color}' fill-opacity='0.7'/>"
        )

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text("\n".join([*self._parts, "</svg>\n"]))
