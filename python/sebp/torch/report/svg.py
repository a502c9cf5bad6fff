# SPDX-License-Identifier: Apache-2.0
"""Results that can be drawn."""

from os import PathLike
from pathlib import Path


class Drawing:
    """What has ``to_svg()``, and so ``save_svg()``."""

    def to_svg(self) -> str:
        """Draw it.

        Returns
        -------
        str
            An SVG document.
        """
        raise NotImplementedError

    def save_svg(self, path: str | PathLike[str]) -> None:
        """Write the drawing to a file.

        Parameters
        ----------
        path : str or path
            Where.
        """
        Path(path).write_text(self.to_svg(), encoding="utf-8")
