# SPDX-License-Identifier: Apache-2.0
"""What a run with SEBP computed, and what it left out."""

from collections import Counter
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from .bars import Bar, draw_bars
from .compare import Comparison
from .padding_free import PaddingFreeReport
from .parts import Parts
from .savings import Savings
from .work import LayerKind, Work, work_done


@dataclass(frozen=True)
class RunReport:
    """What was counted and measured since a model was prepared; ``str()`` makes a table of it.

    Attributes
    ----------
    calls : Counter of str
        Calls of the model that left padding out, under "", and that did not, by the reason.
    tokens : Counter of str
        Tokens of these calls: "real", and padded ones "left out" and "computed".
    rows, active : int
        Rows of the gradients of linear layers, those of tokens left out included, and those that
        were active. As all that follows it is of the whole process, and of layers whose backward
        the library computed.
    seconds : float
        Time in the products of these backwards. Measured.
    dense_seconds : float
        What PyTorch would have taken for them on all rows. An estimate: its time per row is
        measured on 512 rows, once for each kind of layer.
    comparison : Comparison or None
        A step on one batch, if that was asked for.
    """

    calls: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    active: int = 0
    seconds: float = 0.0
    dense_seconds: float = 0.0
    comparison: Comparison | None = None

    def __str__(self) -> str:
        """Make a table."""
        lines = []
        if total := sum(self.tokens.values()):
            real, left, computed = (self.tokens[k] for k in ("real", "left out", "computed"))
            lines.append(
                f"tokens     {real} real ({real / total:.1%}), {left} padded left out,"
                f" {computed} padded computed"
            )
        if self.calls:
            lines.append(
                f"calls      {sum(self.calls.values())}, of which {self.calls['']} left padding out"
            )
            lines += [f"           {n} did not: {why}" for why, n in self.calls.items() if why]
        if self.rows:
            lines += [
                f"rows       {self.active} of {self.rows} rows of gradients were active"
                f" ({self.active / self.rows:.1%})",
                f"backward   {self.seconds:.2f} s in the products of linear layers, measured",
                f"           {self.dense_seconds:.2f} s by PyTorch on all rows, an estimate",
            ]
        if self.comparison is not None:
            lines.append(str(self.comparison))
        return "\n".join(lines or ["nothing has run since the model was prepared"])

    def to_svg(self) -> str:
        """Draw what ``str()`` says.

        Returns
        -------
        str
            An SVG document: tokens, the backward of linear layers, and the parts of a step if there
            is a comparison.
        """
        groups = []
        if total := sum(self.tokens.values()):
            names = {"real": "real", "left out": "padded, left out", "computed": "padded, computed"}
            parts = [(name, self.tokens[key]) for key, name in names.items()]
            groups.append([Bar("tokens", parts, str(total))])
        if self.rows:
            pairs = (
                ("with SEBP", "measured", self.seconds),
                ("PyTorch", "estimate", self.dense_seconds),
            )
            groups.append(
                [
                    Bar(label, [(f"backward of linear layers: {how}", taken)], f"{taken:.2f} s")
                    for label, how, taken in pairs
                ]
            )
        if self.comparison is not None:
            plain, ours = self.comparison.plain.parts, self.comparison.ours.parts
            groups.append([_bar_of("a step as it is", plain), _bar_of("with SEBP", ours)])
        return draw_bars("A run with SEBP", groups)

    def save_svg(self, path: str | PathLike[str]) -> None:
        """Write the drawing to a file.

        Parameters
        ----------
        path : str or path
            Where.
        """
        Path(path).write_text(self.to_svg(), encoding="utf-8")


def _bar_of(label: str, parts: Parts) -> Bar:
    return Bar(label, list(zip(Parts._fields, parts, strict=True)), f"{1e3 * parts.total:.1f} ms")


class Run:
    """Counts from now on.

    Parameters
    ----------
    padding : PaddingFreeReport
        Whose counts of calls go on.
    """

    def __init__(self, padding: PaddingFreeReport) -> None:
        self._padding = padding
        self._calls, self._tokens = Counter(padding.calls), Counter(padding.tokens)
        self._work: dict[LayerKind, Work] = work_done()
        self._savings = Savings()

    def report(self) -> RunReport:
        """Report what has been counted since."""
        now = work_done()
        done = [(work, self._work.get(kind, Work())) for kind, work in now.items()]
        seconds = sum(work.seconds - then.seconds for work, then in done)
        return RunReport(
            Counter(self._padding.calls) - self._calls,
            Counter(self._padding.tokens) - self._tokens,
            sum(work.rows - then.rows for work, then in done),
            sum(work.active - then.active for work, then in done),
            seconds,
            self._savings.since(self._work)[1] + seconds,
        )
