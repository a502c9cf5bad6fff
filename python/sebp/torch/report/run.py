# SPDX-License-Identifier: Apache-2.0
"""What a run with SEBP computed, and what it left out."""

from collections import Counter
from dataclasses import dataclass, field

from ..common.step_times import Times, times_done
from ..common.work import LayerKind, Work, all_work_done
from ..padding.models import PaddingFreeReport
from .bars import Bar, draw_bars
from .compare import Comparison
from .parts import Parts
from .savings import Savings, work_between
from .svg import Drawing


@dataclass(frozen=True)
class RunReport(Drawing):
    """What was counted and measured since a model was prepared; ``str()`` makes a table of it.

    Attributes
    ----------
    calls : Counter of str
        Calls of the model that left padding out, under "", and that did not, by the reason.
    tokens : Counter of str
        Tokens of these calls: "real", and padded ones "left out" and "computed".
    times : Times
        Of the steps of prepared models: all of it, and what of it the library's products and
        attention took. As all that follows it is of the whole process. Measured.
    rows, active : int
        Rows of the gradients of linear layers, those of tokens left out included, and those that
        were active, of layers whose backward the library computed.
    seconds, forward_seconds : float
        Time in the products of these layers' backwards, and of their forwards. Measured, also in
        models that are not prepared, and compiled ones.
    dense_seconds, dense_forward_seconds : float
        What PyTorch would have taken for them on all rows, those of tokens left out included. An
        estimate: its time per row is measured on 512 rows, once for each kind of layer.
    comparison : Comparison or None
        A step on one batch, if that was asked for.
    """

    calls: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    times: Times = Times()
    rows: int = 0
    active: int = 0
    seconds: float = 0.0
    dense_seconds: float = 0.0
    forward_seconds: float = 0.0
    dense_forward_seconds: float = 0.0
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
        if self.times.steps:
            times = self.times
            lines += [
                f"time       {times.total:.2f} s in {times.steps} steps, each of a forward and its"
                " backward",
                f"           {times.products:.2f} s of it in products of linear layers with SEBP",
                f"           {times.attention:.2f} s in the library's attention",
                f"           {times.rest:.2f} s in the rest: norms, activations, the loss, Python",
            ]
        if self.rows:
            lines.append(
                f"rows       {self.active} of {self.rows} rows of gradients were active"
                f" ({self.active / self.rows:.1%})"
            )
        for name, seconds, dense in self._passes():
            lines += [
                f"{name:11}{seconds:.2f} s in the products of linear layers, measured",
                f"           {dense:.2f} s by PyTorch on all rows, an estimate",
            ]
        if self.comparison is not None:
            lines.append(str(self.comparison))
        return "\n".join(lines or ["nothing has run since the model was prepared"])

    def _passes(self) -> list[tuple[str, float, float]]:
        """Give the name of each pass that the library computed, its time, and PyTorch's."""
        passes = [
            ("forward", self.forward_seconds, self.dense_forward_seconds),
            ("backward", self.seconds, self.dense_seconds),
        ]
        return [one for one in passes if one[1] > 0]

    def to_svg(self) -> str:
        """Draw what ``str()`` says.

        Returns
        -------
        str
            An SVG document: tokens, the time of steps, the products of linear layers, and the parts
            of a step if there is a comparison.
        """
        groups = []
        if total := sum(self.tokens.values()):
            names = {"real": "real", "left out": "padded, left out", "computed": "padded, computed"}
            parts = [(name, self.tokens[key]) for key, name in names.items()]
            groups.append([Bar("tokens", parts, str(total))])
        if self.times.steps:
            _, total, products, attention = self.times
            parts = Parts(products, attention, self.times.rest)
            groups.append([Bar("steps", list(parts._asdict().items()), f"{total:.2f} s")])
        if passes := self._passes():
            bars = []
            for column, (label, how) in enumerate(
                (("with SEBP", "measured"), ("PyTorch", "estimate"))
            ):
                parts = [(f"{one[0]} of linear layers: {how}", one[1 + column]) for one in passes]
                bars.append(Bar(label, parts, f"{sum(taken for _, taken in parts):.2f} s"))
            groups.append(bars)
        if self.comparison is not None:
            plain, ours = self.comparison.plain.parts, self.comparison.ours.parts
            groups.append([_bar_of("a step as it is", plain), _bar_of("with SEBP", ours)])
        return draw_bars("A run with SEBP", groups)


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
        self._work: dict[LayerKind, Work] = all_work_done()
        self._times = times_done()
        self._savings = Savings()

    def report(self) -> RunReport:
        """Report what has been counted since."""
        times = times_done().since(self._times)
        done = work_between(self._work, all_work_done())
        backwards = {kind: work for kind, work in done.items() if not kind.is_forward}
        forwards = {kind: work for kind, work in done.items() if kind.is_forward}
        return RunReport(
            Counter(self._padding.calls) - self._calls,
            Counter(self._padding.tokens) - self._tokens,
            times,
            sum(work.rows for work in backwards.values()),
            sum(work.active for work in backwards.values()),
            sum(work.seconds for work in backwards.values()),
            self._savings.dense_seconds(backwards),
            sum(work.seconds for work in forwards.values()),
            self._savings.dense_seconds(forwards),
        )
